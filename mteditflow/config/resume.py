"""What a run that goes on may change: how it is carried out, and nothing that its numbers follow from.

A name stands for what is behind it: two folders with the same editor are one, and a file of sessions without its bad
row is the same data. What is behind the names of a run is kept in its folder, as the text of its rubric is.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mteditflow.config.settings import IDLE

OPERATIONAL = {
    "model.attention", "model.compile", "model.is_checkpointed", "data.allowed_folder",
    "rollout.wave_size", "rollout.cuda_graph",
    "reward.rubric", "reward.url", "reward.timeout_s", "reward.max_wait_s", "reward.max_answer_tokens",
    "reward.num_retries", "reward.num_parallel", "reward.overlap", "reward.green_sms",
    "run.folder", "run.num_iterations", "run.save_every", "run.num_checkpoints", "run.num_judged",
    "run.max_ratio_error", "run.num_gpus", "run.gpu_gib", "run.patience", "run.log_to",
}  # fmt: skip
"""Fields that may change, with all of the sections below. Of a rubric the text is compared, instead of its path."""
SECTIONS = ("evaluation.", "distributed.")
SESSIONS = ("data.path", "data.held_out", "data.held_out_share")
"""Fields that choose the sessions to train on; those are compared where they are the user's."""


def meaning(sections: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the fields of a config, as JSON has it, that a run's numbers follow from, by 'section.field'."""
    fields = {f"{section}.{name}": value for section, values in sections.items() for name, value in values.items()}
    idle = IDLE.get(fields.get("objective.name", ""), ())
    found = {
        name: value
        for name, value in fields.items()
        if name not in OPERATIONAL and name not in idle and not name.startswith(SECTIONS)
    }
    # Both move over the whole run, so its length matters.
    is_moving = found.get("rollout.window_placement") == "progressive" and not found.get("rollout.iters_per_window")
    if is_moving or found.get("optimizer.schedule") == "linear":
        found["run.num_iterations"] = fields.get("run.num_iterations")
    if found.get("model.text_encoder") == "offload":  # of the same bits
        found["model.text_encoder"] = "resident"
    return found


def check_resume(
    saved: Mapping[str, Any], config: Mapping[str, Any], path: Path, contents: Mapping[str, str] | None = None
) -> None:
    """Raise ValueError, naming the fields, where a config changes the problem that the `saved` one set.

    contents: of fields that name something, how what is behind the name differs; '' where it does not.
    """
    before, now, contents = meaning(saved), meaning(config), contents or {}
    same = {name for name, difference in contents.items() if not difference}
    same |= set(SESSIONS if "data.path" in same else ())
    changed = [f"{name}: {difference}" for name, difference in contents.items() if difference]
    changed += [
        f"{name}: was {before.get(name)!r}, is {now.get(name)!r}"
        for name in dict.fromkeys([*now, *before])
        if before.get(name) != now.get(name) and name not in same and not contents.get(name)
    ]
    if changed:
        raise ValueError(
            f"cannot resume {path} with another config ({'; '.join(changed)}): "
            "set these back, or use another run.folder"
        )
