"""On which held-out sessions, and how, an editor is evaluated: what two evaluations must have in common."""

from dataclasses import asdict
from typing import Any

from mteditflow.config import Config

MAY_DIFFER = ("evaluation.every", "evaluation.num_sessions_short", "data.num_turns", "data.seed")
"""Fields of `data` and `evaluation` that do not touch the evaluations before and after training."""


def check_held_out(configs: dict[str, Config], remedy: str) -> None:
    """ValueError unless all, by name, are evaluated on the same sessions by the same editor in the same way.

    These fields fix the base's evaluation to the bit, which all therefore share.
    """
    (first, config), *others = configs.items()
    expected = held_out(config)
    for name, other in others:
        for key, value in held_out(other).items():
            if value != expected[key]:
                raise ValueError(
                    f"{first} and {name} disagree on held-out data: {key} is {expected[key]!r} and {value!r}; {remedy}"
                )


def held_out(config: Config) -> dict[str, Any]:
    """The fields that an evaluation depends on, dotted; those of the reward aside, which the embedded world ignores."""
    sections = ("model", "data", "evaluation")
    fields = {f"{name}.{key}": value for name in sections for key, value in asdict(getattr(config, name)).items()}
    return {key: value for key, value in fields.items() if key not in MAY_DIFFER} | {
        "evaluation.num_turns": config.num_held_out_turns,
        "rollout.hand_off": config.rollout.hand_off,
        "rollout.microbatch_size": config.rollout.microbatch_size,
        "run.backend": config.run.backend,
    }
