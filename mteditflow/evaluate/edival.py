"""EdiVal's metrics of held-out sessions: MT, IF, CC and O per turn, with bootstrap intervals over sessions.

The verdict f of a turn is grade >= 4. MT_t = mean f_t, IF_t = mean of prod_{k<=t} f_k, CC_t = mean consistency where
defined, O_t = sqrt(IF_t CC_t) on the aggregates. Sessions that could not be scored are left out of every metric.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mteditflow.record.drift import KINDS
from mteditflow.record.figures import METRICS

NUM_BOOTSTRAP = 2000

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Verdicts (n, K) bool, consistency (n, K) with NaN where undefined, edit types, the edits of the first sessions,
    drift and, where it was asked for, the success of each turn on its true input. Sessions that are not `valid` could
    not be scored and have no part in the metrics.
    """

    verdict: Tensor
    consistency: Tensor
    valid: Tensor  # (n,) bool
    edit_types: list[tuple[str, ...]]
    images: Tensor  # (K, num_strips, 3, H, W); a picture that is smaller stands at the left and the top
    num_steps: int  # denoising steps per turn
    drift: Tensor | None = None  # (n, K, 6), record/drift.py; NaN where unknown; None: an older file
    num_whole: int = 0  # sessions of which nobody knows what is untouched: their drift is that of the whole picture
    true_success: Tensor | None = None  # (n, K) 1 or 0, NaN where not scored; None: not evaluated
    true_inputs: str = ""  # of true_success: 'drawn', by the embedded world, or 'source', evaluate/exposure.py


def point_metrics(evaluation: Evaluation) -> Floats:
    """Compute MT, IF, CC, O in percent, (4, K)."""
    return metrics(*_mask_invalid(evaluation))


def resampled_metrics(evaluation: Evaluation) -> Floats:
    """Compute the metrics of bootstrap samples of the sessions, (4, NUM_BOOTSTRAP, K); paired: n alone fixes the
    samples.

    After many turns few sessions have anything left that no instruction touched. A sample with none of them takes the
    consistency of all: to leave it out would keep, of O, the samples in which such sessions are.
    """
    index = _sample(len(evaluation.verdict))
    verdict, kept = _mask_invalid(evaluation)
    marginal, joint, consistency, _ = metrics(verdict[index], kept[index])
    consistency = np.where(np.isnan(consistency), point_metrics(evaluation)[2], consistency)
    return np.stack([marginal, joint, consistency, np.sqrt(joint * consistency)])


def metrics(verdict: Floats, consistency: Floats) -> Floats:
    """Compute MT, IF, CC, O in percent, (4, ..., K), of verdicts and consistency (..., n, K); NaN has no part."""
    marginal, joint, kept = _mean(verdict), _mean(verdict.cumprod(-1)), _mean(consistency)
    return 100 * np.stack([marginal, joint, kept, np.sqrt(joint * kept)])


def _mean(values: Floats) -> Floats:
    """Average the sessions (..., n, K) where they are defined; NaN where none is."""
    defined = ~np.isnan(values)
    count = defined.sum(-2)
    return np.where(count > 0, np.where(defined, values, 0.0).sum(-2) / np.maximum(count, 1), np.nan)


def _mask_invalid(evaluation: Evaluation) -> tuple[Floats, Floats]:
    """Verdicts and consistency (n, K), NaN in the rows that are not valid."""
    invalid = ~evaluation.valid[:, None]
    tables = (evaluation.verdict, evaluation.consistency)
    verdict, kept = (table.double().masked_fill(invalid, torch.nan).numpy() for table in tables)
    return verdict, kept


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """Sum up metrics per turn with 95 % intervals, and success per edit type, as evaluation_*.json has them.

    None where a metric is not defined; CC_sessions says in how many sessions CC is.
    """
    num_kept = (~np.isnan(_mask_invalid(evaluation)[1])).sum(0).tolist()
    turns = _turns(point_metrics(evaluation), resampled_metrics(evaluation))
    means = _mean_turns(_session_values(evaluation), len(turns))
    num_valid = int(evaluation.valid.sum())
    return {
        "num_sessions": num_valid,
        "num_invalid": len(evaluation.valid) - num_valid,
        "num_whole_pictures": evaluation.num_whole,
        "true_inputs": evaluation.true_inputs,
        "turns": [turn | {"CC_sessions": num} | more for turn, num, more in zip(turns, num_kept, means, strict=True)],
        "edit_types": success_by_type(evaluation),
    }


def held_out_figures(evaluation: Evaluation) -> dict[str, float]:
    """List the figures of a short evaluation as metrics.jsonl has them, in percent."""
    point = point_metrics(evaluation)
    values = {
        f"heldout/{metric}_{turn + 1}": float(point[i, turn])
        for i, metric in enumerate(METRICS)
        for turn in range(point.shape[1])
    }
    by_type = success_by_type(evaluation)
    return values | {f"heldout/success_{kind}": 100 * of["success"] for kind, of in by_type.items()}


def success_by_type(evaluation: Evaluation) -> dict[str, dict[str, float]]:
    """Compute success, in [0, 1], and count of each type of edit, over all turns of the valid sessions."""
    done: dict[str, list[bool]] = {}
    for n in evaluation.valid.nonzero()[:, 0].tolist():
        for verdict, edit_type in zip(evaluation.verdict[n].tolist(), evaluation.edit_types[n], strict=True):
            done.setdefault(edit_type, []).append(verdict)
    return {
        name: {"success": round(sum(verdicts) / len(verdicts), 4), "count": len(verdicts)}
        for name, verdicts in sorted(done.items())
    }


def session_scores(evaluation: Evaluation) -> Tensor:
    """Score every session (n,), in [0, 1]: its mean over the turns of success times consistency, which counts as 1
    where it is undefined; NaN where the session could not be scored.
    """
    kept = evaluation.consistency.double().nan_to_num(nan=1.0)
    return (evaluation.verdict * kept).mean(1).masked_fill(~evaluation.valid, torch.nan)


def compare(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Compute paired gains per turn with 95 % intervals: the same sessions are drawn for both; sessions that are not
    valid in both have no part. Of the sizes of drifts, success on true inputs and compounding, the change.
    """
    both = before.valid & after.valid
    before, after = replace(before, valid=both), replace(after, valid=both)
    gain, samples = (of(after) - of(before) for of in (point_metrics, resampled_metrics))
    old, new = _session_values(before), _session_values(after)
    names = [name for name in new if name in old and name not in KINDS]
    changes = _mean_turns({f"{name}_change": new[name] - old[name] for name in names}, gain.shape[1])
    turns = [turn | change for turn, change in zip(_turns(gain, samples, "_gain"), changes, strict=True)]
    return {"num_sessions": int(both.sum()), "turns": turns}


def _session_values(evaluation: Evaluation) -> dict[str, Floats]:
    """List what is a plain mean over sessions, (n, K) by name, NaN where undefined: drifts and their sizes, and in
    percent success on true inputs and what it is ahead of success on the editor's own output, compounding.
    """
    invalid, values = ~evaluation.valid[:, None], dict[str, Floats]()
    if evaluation.drift is not None:
        for kind, drift in zip(KINDS, evaluation.drift.double().unbind(2), strict=True):
            drift = drift.masked_fill(invalid, torch.nan)
            values |= {kind: drift.numpy(), f"{kind}_size": drift.abs().numpy()}
    if evaluation.true_success is not None:
        success = 100 * evaluation.true_success.double().masked_fill(invalid, torch.nan).numpy()
        values |= {"MT_true": success, "compounding": success - 100 * _mask_invalid(evaluation)[0]}
    return values


def _mean_turns(values: dict[str, Floats], num_turns: int) -> list[dict[str, Any]]:
    """Make a dict for each turn of the means over sessions of values (n, K), and of their 95 % intervals."""
    turns: list[dict[str, Any]] = [{} for _ in range(num_turns)]
    for name, table in values.items():
        digits = 2 if name.startswith(("MT", "compounding")) else 4
        point, samples = _mean(table), _resampled_means(table)
        for turn, row in enumerate(turns):
            row[name] = _round(point[turn], digits)
            row[f"{name}_interval"] = _interval(samples[:, turn], digits)
    return turns


def _resampled_means(table: Floats) -> Floats:
    """Average the bootstrap samples of `resampled_metrics` of values (n, K): (NUM_BOOTSTRAP, K). A sample in which none
    is defined takes the mean of all.
    """
    defined = ~np.isnan(table)
    times = _sample_counts(len(table))  # (B, n)
    count, total = times @ defined, times @ np.where(defined, table, 0.0)
    return np.where(count > 0, total / np.maximum(count, 1), _mean(table))


@lru_cache(maxsize=4)
def _sample_counts(n: int) -> Floats:
    """Count how often each of n sessions is in each bootstrap sample, (NUM_BOOTSTRAP, n)."""
    return np.stack([np.bincount(row, minlength=n) for row in _sample(n)]).astype(np.float64)


def _sample(n: int) -> NDArray[np.int64]:
    """Draw the sessions of the bootstrap samples, (NUM_BOOTSTRAP, n); n alone fixes them."""
    return np.random.default_rng(0).integers(n, size=(NUM_BOOTSTRAP, n))


def _turns(point: Floats, samples: Floats, suffix: str = "") -> list[dict[str, Any]]:
    """Make a dict for each turn of metrics (4, K) and bootstrap samples (4, B, K) of them."""
    return [
        {"turn": turn + 1}
        | {f"{name}{suffix}": _round(point[m, turn]) for m, name in enumerate(METRICS)}
        | {f"{name}{suffix}_interval": _interval(samples[m, :, turn]) for m, name in enumerate(METRICS)}
        for turn in range(point.shape[1])
    ]


def _interval(samples: Floats, digits: int = 2) -> list[float | None] | None:
    """The ends that 95 % of the samples lie between; None where the metric is defined in no session."""
    return None if np.isnan(samples).any() else [_round(end, digits) for end in np.quantile(samples, [0.025, 0.975])]


def _round(value: float, digits: int = 2) -> float | None:
    return None if np.isnan(value) else round(float(value), digits) + 0.0  # no -0.0
