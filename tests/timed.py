"""Which metrics a resumed run does not repeat."""

from mteditflow.record.metrics import TIMED


def is_timed(name: str) -> bool:
    """Whether a metric depends on the clock or the machine, by the beginning of its name."""
    return name.startswith(TIMED)
