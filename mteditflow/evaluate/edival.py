"""EdiVal's metrics on held-out sessions: MT, IF, CC and O per turn, with bootstrap intervals over sessions.

The verdict f of a turn is grade >= 4. MT_t = mean f_t, IF_t = mean of prod_{k<=t} f_k, CC_t = mean consistency where
defined, O_t = sqrt(IF_t CC_t) on the aggregates. Evaluation runs the ODE from noise that every run shares, so two
evaluations are paired. In the embedded world the grade is the exact verifier's, whatever reward trains; for tasks
without a known truth the reward judges, and sessions that it could not score are left out of every metric.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.table import Table
from torch import Tensor

from mteditflow.advantage import SUCCESS
from mteditflow.config import Config
from mteditflow.flow import make_schedule
from mteditflow.noise import EVALUATION
from mteditflow.pictures import from_pil
from mteditflow.policy import AdapterName, Policy
from mteditflow.record.metrics import strip
from mteditflow.reward import CONSISTENCY, INSTRUCTION, Rewards
from mteditflow.reward.exact import grade_pictures, measure_consistency, quality, read_rollout
from mteditflow.rollout import roll_out
from mteditflow.types import EditTask, Rollout, Scores

NUM_BOOTSTRAP = 2000
MAX_TILE = 256  # pixels: what is wider is made smaller in strips, of which a page has many
METRICS = ("MT", "IF", "CC", "O")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Verdicts (n, K) bool, consistency (n, K) with NaN where undefined, edit types, and the edits of the first
    sessions. Sessions that are not `valid` could not be scored and have no part in the metrics.
    """

    verdict: Tensor
    consistency: Tensor
    valid: Tensor  # (n,) bool
    edit_types: list[tuple[str, ...]]
    images: Tensor  # (K, num_strips, 3, H, W)
    num_steps: int  # denoising steps per turn

    def is_of(self, config: Config) -> bool:
        """Whether an evaluation by this config is comparable: the same sessions, turns, steps and pictures."""
        own = (*self.verdict.shape, self.images.shape[1], self.num_steps)
        wanted = config.evaluation
        return own == (wanted.num_sessions, config.num_held_out_turns, wanted.num_strips, wanted.num_steps)


def has_truth(tasks: list[EditTask]) -> bool:
    """Whether the exact verifier can judge all of the tasks."""
    return all(task.truth is not None for task in tasks)


def evaluate(
    policy: Policy, tasks: list[EditTask], config: Config, adapter: AdapterName, reward: Rewards | None = None
) -> Evaluation:
    """One trajectory of each task under an adapter, by the ODE, judged by the exact verifier where it can judge all
    tasks, and else by `reward`. ValueError where more than run.max_invalid_share could not be scored.
    """
    schedule = make_schedule(policy.sigmas(config.evaluation.num_steps))
    judge = _by_truth if has_truth(tasks) else reward
    assert judge is not None, "tasks without truth need a reward"
    pictures, scores = [], []
    with policy.adapters.use(adapter):
        for start in range(0, len(tasks), 64):
            rollout = roll_out(
                policy, tasks[start : start + 64], schedule, EVALUATION, config.rollout,
                num_turns=config.num_held_out_turns, group_size=1, cfg_scale=config.model.cfg_scale,
            )  # fmt: skip
            scores.append(judge(rollout))
            num_wanted = max(0, config.evaluation.num_strips - start)
            pictures.append(torch.stack([turn.image[:num_wanted] for turn in rollout.turns]).cpu())
    instruction = torch.cat([part.instruction.cpu() for part in scores])
    valid = torch.cat([part.valid.cpu() for part in scores])
    measured = [part.rewards[CONSISTENCY].cpu() for part in scores if CONSISTENCY in part.rewards]
    consistency = torch.cat(measured) if measured else torch.full_like(instruction, torch.nan)
    if (~valid).float().mean() > config.run.max_invalid_share:
        raise ValueError(
            f"{int((~valid).sum())} of {len(valid)} held-out sessions could not be scored, more than "
            f"run.max_invalid_share {config.run.max_invalid_share:g}: look at the reward, judge {config.reward.judge!r}"
        )
    return Evaluation(
        verdict=(instruction >= SUCCESS) & valid[:, None], consistency=consistency, valid=valid,
        edit_types=[task.edit_types for task in tasks], images=torch.cat(pictures, dim=1),
        num_steps=config.evaluation.num_steps,
    )  # fmt: skip


def _by_truth(rollout: Rollout) -> Scores:
    """The exact verifier's scores. All are valid: a picture that the editor breaks is a failure of the editor."""
    world = read_rollout(rollout)
    rewards = {INSTRUCTION: quality(grade_pictures(*world), "five"), CONSISTENCY: measure_consistency(*world)}
    valid = torch.ones(len(rollout.group), dtype=torch.bool)
    return Scores(rewards=rewards, weights={}, valid=valid)


def _mean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean over the sessions (..., n, K) of what is defined; NaN where nothing is."""
    defined = ~np.isnan(values)
    count = defined.sum(-2)
    return np.where(count > 0, np.where(defined, values, 0.0).sum(-2) / np.maximum(count, 1), np.nan)


def _metrics(verdict: NDArray[np.float64], consistency: NDArray[np.float64]) -> NDArray[np.float64]:
    """MT, IF, CC, O in percent, (4, ..., K), of verdicts and consistency (..., n, K); NaN has no part."""
    marginal, joint, kept = _mean(verdict), _mean(verdict.cumprod(-1)), _mean(consistency)
    return 100 * np.stack([marginal, joint, kept, np.sqrt(joint * kept)])


def _tables(evaluation: Evaluation) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Verdicts and consistency (n, K); NaN in the rows that are not valid."""
    verdict, kept = (
        values.double().masked_fill(~evaluation.valid[:, None], torch.nan).numpy()
        for values in (evaluation.verdict, evaluation.consistency)
    )
    return verdict, kept


def resampled(evaluation: Evaluation) -> NDArray[np.float64]:
    """Metrics of bootstrap samples of the sessions, (4, NUM_BOOTSTRAP, K); paired: n alone fixes the samples.

    After many turns few sessions have anything left that no instruction touched. A sample with none of them takes the
    consistency of all: to leave it out would keep, of O, the samples in which such sessions are.
    """
    n = len(evaluation.verdict)
    index = np.random.default_rng(0).integers(n, size=(NUM_BOOTSTRAP, n))
    verdict, kept = _tables(evaluation)
    marginal, joint, consistency, _ = _metrics(verdict[index], kept[index])
    consistency = np.where(np.isnan(consistency), point_metrics(evaluation)[2], consistency)
    return np.stack([marginal, joint, consistency, np.sqrt(joint * consistency)])


def _interval(samples: NDArray[np.float64]) -> list[float] | None:
    if np.isnan(samples).any():  # defined in no session
        return None
    return [round(float(q), 2) for q in np.quantile(samples, [0.025, 0.975])]


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 2)


def point_metrics(evaluation: Evaluation) -> NDArray[np.float64]:
    """MT, IF, CC, O in percent, (4, K)."""
    return _metrics(*_tables(evaluation))


def summary(evaluation: Evaluation) -> dict:
    """The metrics per turn with 95 % intervals, and the success per edit type, in the layout that the report reads.
    None where a metric is not defined; CC_sessions says in how many sessions CC is.
    """
    point, samples = point_metrics(evaluation), resampled(evaluation)
    num_kept = (~np.isnan(_tables(evaluation)[1])).sum(0)
    turns = [
        {"turn": turn + 1, "CC_sessions": int(num_kept[turn])}
        | {name: _rounded(point[m, turn]) for m, name in enumerate(METRICS)}
        | {f"{name}_interval": _interval(samples[m, :, turn]) for m, name in enumerate(METRICS)}
        for turn in range(point.shape[1])
    ]
    done: dict[str, list[bool]] = {}
    for n in evaluation.valid.nonzero()[:, 0].tolist():
        for verdict, edit_type in zip(evaluation.verdict[n].tolist(), evaluation.edit_types[n], strict=True):
            done.setdefault(edit_type, []).append(verdict)
    by_type = {name: {"success": round(sum(d) / len(d), 4), "count": len(d)} for name, d in sorted(done.items())}
    num_valid = int(evaluation.valid.sum())
    counts = {"num_sessions": num_valid, "num_invalid": len(evaluation.valid) - num_valid}
    return counts | {"turns": turns, "edit_types": by_type}


def compare(before: Evaluation, after: Evaluation) -> dict:
    """Paired gains per turn with 95 % intervals: the same sessions are drawn for both; sessions that are not valid in
    both have no part.
    """
    both = before.valid & after.valid
    before, after = replace(before, valid=both), replace(after, valid=both)
    gain = point_metrics(after) - point_metrics(before)
    samples = resampled(after) - resampled(before)
    turns = [
        {"turn": turn + 1}
        | {f"{name}_gain": _rounded(gain[m, turn]) for m, name in enumerate(METRICS)}
        | {f"{name}_gain_interval": _interval(samples[m, :, turn]) for m, name in enumerate(METRICS)}
        for turn in range(gain.shape[1])
    ]
    return {"num_sessions": int(both.sum()), "turns": turns}


def save_evaluation(folder: Path, name: str, evaluation: Evaluation) -> None:
    """`evaluation_NAME.json` with the figures, `evaluation_NAME.safetensors` with the verdicts; both appear whole or
    not at all.
    """
    save_verdicts(folder / f"evaluation_{name}.safetensors", evaluation)
    save_json(folder / f"evaluation_{name}.json", summary(evaluation))


def load_evaluation(folder: Path, name: str) -> Evaluation | None:
    """What `save_evaluation` wrote, or None."""
    path = folder / f"evaluation_{name}.safetensors"
    if not path.exists() or not (folder / f"evaluation_{name}.json").exists():
        return None
    return load_verdicts(path)


def save_verdicts(path: Path, evaluation: Evaluation) -> None:
    """An evaluation as one safetensors file, which appears whole or not at all."""
    names = ("verdict", "consistency", "valid", "images")
    tensors = {name: getattr(evaluation, name).contiguous() for name in names}
    metadata = {"edit_types": json.dumps(evaluation.edit_types), "num_steps": str(evaluation.num_steps)}
    _replace(path, safetensors.torch.save(tensors, metadata))


def load_verdicts(path: Path) -> Evaluation:
    """What `save_verdicts` wrote. A file from before sessions could be invalid has none that is."""
    with safetensors.safe_open(path, "pt") as file:
        metadata, verdict = file.metadata(), file.get_tensor("verdict")
        all_valid = torch.ones(len(verdict), dtype=torch.bool)
        return Evaluation(
            verdict=verdict, consistency=file.get_tensor("consistency"),
            valid=file.get_tensor("valid") if "valid" in file.keys() else all_valid,  # noqa: SIM118
            edit_types=[tuple(row) for row in json.loads(metadata["edit_types"])],
            images=file.get_tensor("images"), num_steps=int(metadata.get("num_steps", 0)),
        )  # fmt: skip


def save_json(path: Path, value: dict) -> None:
    """A file that appears whole or not at all."""
    _replace(path, json.dumps(value, indent=1).encode())


def save_comparison(folder: Path, before: Evaluation, after: Evaluation) -> None:
    """`comparison.json`: the paired gains."""
    save_json(folder / "comparison.json", compare(before, after))


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(content)
    temporary.replace(path)


def strips_of(tasks: list[EditTask], evaluations: dict[str, Evaluation], sessions: Iterable[int]) -> Image.Image:
    """Source and turns of some of the first sessions, a row for each evaluation, by name."""
    rows, captions = [], []
    for n in sessions:
        for label, evaluation in evaluations.items():
            rows.append([_small(image) for image in (tasks[n].source, *evaluation.images[:, n])])
            captions.append([label, *tasks[n].instructions[: len(evaluation.images)]])
    return strip(rows, captions, scale=2 if rows[0][0].shape[2] <= MAX_TILE // 2 else 1)


def _small(image: Tensor) -> Tensor:
    """An image (3, H, W), made smaller where it is wider than a tile of a strip."""
    if image.shape[2] <= MAX_TILE:
        return image
    size = (round(image.shape[1] * MAX_TILE / image.shape[2]), MAX_TILE)
    return torch.nn.functional.interpolate(image[None].float(), size, mode="bilinear", antialias=True)[0]


def save_strips(folder: Path, iteration: int, tasks: list[EditTask], before: Evaluation, after: Evaluation) -> Tensor:
    """`strips/iteration-NNNNNN.png`: source and turns of the first sessions, base above current. Returns (3, H, W) in
    [-1, 1].
    """
    shown = {"base": before, f"iteration {iteration}": after}
    picture = strips_of(tasks, shown, range(before.images.shape[1]))
    path = folder / "strips" / f"iteration-{iteration:06d}.png"
    path.parent.mkdir(exist_ok=True)
    picture.save(path)
    return from_pil(picture)


def final_table(folder: Path) -> Table:
    """Before, after and paired gain per turn, from the run folder's files."""
    before, after, comparison = (
        json.loads((folder / f"{name}.json").read_text())["turns"]
        for name in ("evaluation_before", "evaluation_after", "comparison")
    )
    sessions = json.loads((folder / "evaluation_after.json").read_text())["num_sessions"]
    table = Table(title=f"{sessions} held-out sessions, percent [95 % interval]")
    for column in ("turn", "", *METRICS):
        table.add_column(column, justify="left" if column == "" else "right")
    for b, a, g in zip(before, after, comparison, strict=True):
        table.add_row(str(b["turn"]), "before", *(format_figure(b[m], b[f"{m}_interval"]) for m in METRICS))
        table.add_row("", "after", *(format_figure(a[m], a[f"{m}_interval"]) for m in METRICS))
        table.add_row(
            "",
            "gain",
            *(format_figure(g[f"{m}_gain"], g[f"{m}_gain_interval"], "+") for m in METRICS),
            end_section=True,
        )
    return table


def format_figure(value: float | None, interval: list[float] | None, sign: str = "") -> str:
    """A figure with its interval, as the tables on the terminal show it."""
    if value is None or interval is None:
        return "not defined"
    return f"{value:{sign}.1f} [{interval[0]:{sign}.1f}, {interval[1]:{sign}.1f}]"
