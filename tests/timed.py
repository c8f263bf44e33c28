"""Which metrics a resumed run does not repeat."""


def is_timed(name: str) -> bool:
    """Whether a metric depends on the clock or the machine, by the end of its name (mteditflow/record/metrics.py)."""
    return name.endswith(("_s", "_per_second", "_gib"))
