"""EdiVal's metrics on held-out sessions: MT, IF, CC and O per turn, with bootstrap intervals over sessions.

The verdict f of a turn is grade >= 4. MT_t = mean f_t, IF_t = mean of prod_{k<=t} f_k, CC_t = mean consistency where
defined, O_t = sqrt(IF_t CC_t) on the aggregates. Evaluation runs the ODE from noise that every run shares, so two
evaluations are paired.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from numpy.typing import NDArray
from rich.table import Table
from torch import Tensor

from mteditflow.config import Config
from mteditflow.flow import step_table
from mteditflow.metrics import strip
from mteditflow.policy import AdapterName, Policy
from mteditflow.reward.exact import score_pictures
from mteditflow.rollout import roll_out
from mteditflow.types import EditTask
from mteditflow.world.verify import MIN_SCORE_DONE

NOISE_SEED = 20_606  # of every evaluation; training seeds are other keys, since a step of evaluation is this one
NUM_BOOTSTRAP = 2000
METRICS = ("MT", "IF", "CC", "O")


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Verdicts (n, K) bool, consistency (n, K) with NaN where undefined, edit types, and the edits of the first
    sessions.
    """

    verdict: Tensor
    consistency: Tensor
    edit_types: list[tuple[str, ...]]
    images: Tensor  # (K, num_strips, 3, H, W)
    num_steps: int  # denoising steps per turn

    def is_of(self, config: Config) -> bool:
        """Whether an evaluation by this config is comparable: the same sessions, turns, steps and pictures."""
        own = (*self.verdict.shape, self.images.shape[1], self.num_steps)
        wanted = config.evaluation
        return own == (wanted.num_sessions, config.num_held_out_turns, wanted.num_strips, wanted.num_steps)


def evaluate(policy: Policy, tasks: list[EditTask], config: Config, adapter: AdapterName) -> Evaluation:
    """One trajectory of each task under an adapter, by the ODE, judged by the exact verifier."""
    sigmas = policy.sigmas(config.evaluation.num_steps)
    pictures = []
    with policy.adapters.use(adapter):
        for start in range(0, len(tasks), 64):
            rollout = roll_out(
                policy, tasks[start : start + 64], num_turns=config.num_held_out_turns, group_size=1, sigmas=sigmas,
                table=step_table(sigmas, noise_level=0.0), trained_steps=(), hand_off=config.rollout.hand_off,
                microbatch_size=config.rollout.microbatch_size, seed=NOISE_SEED, step=2**31,
                cfg_scale=config.model.cfg_scale, cuda_graph=config.rollout.cuda_graph,
            )  # fmt: skip
            pictures.append(torch.stack([turn.image for turn in rollout.turns]).cpu())
    images = torch.cat(pictures, dim=1)  # (K, n, 3, H, W)
    grades, kept = score_pictures([task.truth for task in tasks], torch.stack([task.source for task in tasks]), images)
    return Evaluation(
        verdict=grades >= MIN_SCORE_DONE, consistency=kept, edit_types=[task.edit_types for task in tasks],
        images=images[:, : config.evaluation.num_strips], num_steps=config.evaluation.num_steps,
    )  # fmt: skip


def _metrics(verdict: NDArray[np.float64], consistency: NDArray[np.float64]) -> NDArray[np.float64]:
    """MT, IF, CC, O in percent, (4, ..., K), of verdicts and consistency (..., n, K)."""
    marginal, joint = verdict.mean(-2), verdict.cumprod(-1).mean(-2)
    defined = ~np.isnan(consistency)
    kept = np.where(defined, consistency, 0.0).sum(-2) / np.maximum(defined.sum(-2), 1)
    return 100 * np.stack([marginal, joint, kept, np.sqrt(joint * kept)])


def resampled(evaluation: Evaluation) -> NDArray[np.float64]:
    """Metrics of bootstrap samples of the sessions, (4, NUM_BOOTSTRAP, K); paired: n alone fixes the samples."""
    n = len(evaluation.verdict)
    index = np.random.default_rng(0).integers(n, size=(NUM_BOOTSTRAP, n))
    return _metrics(evaluation.verdict.double().numpy()[index], evaluation.consistency.double().numpy()[index])


def _interval(samples: NDArray[np.float64]) -> list[float]:
    return [round(float(q), 2) for q in np.quantile(samples, [0.025, 0.975])]


def point_metrics(evaluation: Evaluation) -> NDArray[np.float64]:
    """MT, IF, CC, O in percent, (4, K)."""
    return _metrics(evaluation.verdict.double().numpy(), evaluation.consistency.double().numpy())


def summary(evaluation: Evaluation) -> dict:
    """The metrics per turn with 95 % intervals, and the success per edit type, in the layout that the report reads."""
    point, samples = point_metrics(evaluation), resampled(evaluation)
    turns = [
        {"turn": turn + 1}
        | {name: round(float(point[m, turn]), 2) for m, name in enumerate(METRICS)}
        | {f"{name}_interval": _interval(samples[m, :, turn]) for m, name in enumerate(METRICS)}
        for turn in range(point.shape[1])
    ]
    done: dict[str, list[bool]] = {}
    for verdicts, types in zip(evaluation.verdict.tolist(), evaluation.edit_types, strict=True):
        for verdict, edit_type in zip(verdicts, types, strict=True):
            done.setdefault(edit_type, []).append(verdict)
    by_type = {name: {"success": round(sum(d) / len(d), 4), "count": len(d)} for name, d in sorted(done.items())}
    return {"num_sessions": len(evaluation.verdict), "turns": turns, "edit_types": by_type}


def compare(before: Evaluation, after: Evaluation) -> dict:
    """Paired gains per turn with 95 % intervals: the same sessions are drawn for both."""
    gain = point_metrics(after) - point_metrics(before)
    samples = resampled(after) - resampled(before)
    turns = [
        {"turn": turn + 1}
        | {f"{name}_gain": round(float(gain[m, turn]), 2) for m, name in enumerate(METRICS)}
        | {f"{name}_gain_interval": _interval(samples[m, :, turn]) for m, name in enumerate(METRICS)}
        for turn in range(gain.shape[1])
    ]
    return {"num_sessions": len(before.verdict), "turns": turns}


def save_evaluation(folder: Path, name: str, evaluation: Evaluation) -> None:
    """`evaluation_NAME.json` with the figures, `evaluation_NAME.safetensors` with the verdicts; both appear whole or
    not at all.
    """
    tensors = {
        "verdict": evaluation.verdict.contiguous(),
        "consistency": evaluation.consistency.contiguous(),
        "images": evaluation.images.contiguous(),
    }
    metadata = {"edit_types": json.dumps(evaluation.edit_types), "num_steps": str(evaluation.num_steps)}
    _replace(folder / f"evaluation_{name}.safetensors", safetensors.torch.save(tensors, metadata))
    _replace(folder / f"evaluation_{name}.json", json.dumps(summary(evaluation), indent=1).encode())


def load_evaluation(folder: Path, name: str) -> Evaluation | None:
    """What `save_evaluation` wrote, or None."""
    path = folder / f"evaluation_{name}.safetensors"
    if not path.exists() or not (folder / f"evaluation_{name}.json").exists():
        return None
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        types = [tuple(row) for row in json.loads(metadata["edit_types"])]
        return Evaluation(
            verdict=file.get_tensor("verdict"), consistency=file.get_tensor("consistency"), edit_types=types,
            images=file.get_tensor("images"), num_steps=int(metadata.get("num_steps", 0)),
        )  # fmt: skip


def save_comparison(folder: Path, before: Evaluation, after: Evaluation) -> None:
    """`comparison.json`: the paired gains."""
    _replace(folder / "comparison.json", json.dumps(compare(before, after), indent=1).encode())


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}")
    temporary.write_bytes(content)
    temporary.replace(path)


def save_strips(folder: Path, iteration: int, tasks: list[EditTask], before: Evaluation, after: Evaluation) -> Tensor:
    """`strips/iteration-NNNNNN.png`: source and turns of the first sessions, base above current. Returns (3, H, W) in
    [-1, 1].
    """
    rows, captions = [], []
    for n in range(before.images.shape[1]):
        for label, evaluation in (("base", before), (f"iteration {iteration}", after)):
            rows.append([tasks[n].source, *evaluation.images[:, n]])
            captions.append([label, *tasks[n].instructions])
    picture = strip(rows, captions, scale=2)
    path = folder / "strips" / f"iteration-{iteration:06d}.png"
    path.parent.mkdir(exist_ok=True)
    picture.save(path)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1) / 127.5 - 1


def final_table(folder: Path) -> Table:
    """Before, after and paired gain per turn, from the run folder's files."""
    before, after, gains = (
        json.loads((folder / f"{name}.json").read_text())["turns"]
        for name in ("evaluation_before", "evaluation_after", "comparison")
    )
    sessions = json.loads((folder / "evaluation_after.json").read_text())["num_sessions"]
    table = Table(title=f"{sessions} held-out sessions, percent [95 % interval]")
    for column in ("turn", "", *METRICS):
        table.add_column(column, justify="left" if column == "" else "right")
    for b, a, g in zip(before, after, gains, strict=True):
        table.add_row(str(b["turn"]), "before", *(_cell(b[m], b[f"{m}_interval"]) for m in METRICS))
        table.add_row("", "after", *(_cell(a[m], a[f"{m}_interval"]) for m in METRICS))
        table.add_row(
            "", "gain", *(_cell(g[f"{m}_gain"], g[f"{m}_gain_interval"], "+") for m in METRICS), end_section=True
        )
    return table


def _cell(value: float, interval: list[float], sign: str = "") -> str:
    return f"{value:{sign}.1f} [{interval[0]:{sign}.1f}, {interval[1]:{sign}.1f}]"
