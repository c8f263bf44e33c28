"""EdiVal's metrics of held-out sessions: MT, IF, CC and O per turn, with bootstrap intervals over sessions.

The verdict f of a turn is grade >= 4. MT_t = mean f_t, IF_t = mean of prod_{k<=t} f_k, CC_t = mean consistency where
defined, O_t = sqrt(IF_t CC_t) on the aggregates. Sessions that could not be scored are left out of every metric.
"""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mteditflow.record.figures import METRICS

NUM_BOOTSTRAP = 2000

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Verdicts (n, K) bool, consistency (n, K) with NaN where undefined, edit types, and the edits of the first
    sessions. Sessions that are not `valid` could not be scored and have no part in the metrics.
    """

    verdict: Tensor
    consistency: Tensor
    valid: Tensor  # (n,) bool
    edit_types: list[tuple[str, ...]]
    images: Tensor  # (K, num_strips, 3, H, W); a picture that is smaller stands at the left and the top
    num_steps: int  # denoising steps per turn


def point_metrics(evaluation: Evaluation) -> Floats:
    """Compute MT, IF, CC, O in percent, (4, K)."""
    return metrics(*_mask_invalid(evaluation))


def resampled_metrics(evaluation: Evaluation) -> Floats:
    """Compute the metrics of bootstrap samples of the sessions, (4, NUM_BOOTSTRAP, K); paired: n alone fixes the
    samples.

    After many turns few sessions have anything left that no instruction touched. A sample with none of them takes the
    consistency of all: to leave it out would keep, of O, the samples in which such sessions are.
    """
    n = len(evaluation.verdict)
    index = np.random.default_rng(0).integers(n, size=(NUM_BOOTSTRAP, n))
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
    done: dict[str, list[bool]] = {}
    for n in evaluation.valid.nonzero()[:, 0].tolist():
        for verdict, edit_type in zip(evaluation.verdict[n].tolist(), evaluation.edit_types[n], strict=True):
            done.setdefault(edit_type, []).append(verdict)
    num_valid = int(evaluation.valid.sum())
    return {
        "num_sessions": num_valid,
        "num_invalid": len(evaluation.valid) - num_valid,
        "turns": [turn | {"CC_sessions": num} for turn, num in zip(turns, num_kept, strict=True)],
        "edit_types": {
            name: {"success": round(sum(verdicts) / len(verdicts), 4), "count": len(verdicts)}
            for name, verdicts in sorted(done.items())
        },
    }


def compare(before: Evaluation, after: Evaluation) -> dict[str, Any]:
    """Compute paired gains per turn with 95 % intervals: the same sessions are drawn for both; sessions that are not
    valid in both have no part.
    """
    both = before.valid & after.valid
    before, after = replace(before, valid=both), replace(after, valid=both)
    gain, samples = (of(after) - of(before) for of in (point_metrics, resampled_metrics))
    return {"num_sessions": int(both.sum()), "turns": _turns(gain, samples, "_gain")}


def _turns(point: Floats, samples: Floats, suffix: str = "") -> list[dict[str, Any]]:
    """Make a dict for each turn of metrics (4, K) and bootstrap samples (4, B, K) of them."""
    return [
        {"turn": turn + 1}
        | {f"{name}{suffix}": _round(point[m, turn]) for m, name in enumerate(METRICS)}
        | {f"{name}{suffix}_interval": _interval(samples[m, :, turn]) for m, name in enumerate(METRICS)}
        for turn in range(point.shape[1])
    ]


def _interval(samples: Floats) -> list[float | None] | None:
    """The ends that 95 % of the samples lie between; None where the metric is defined in no session."""
    return None if np.isnan(samples).any() else [_round(end) for end in np.quantile(samples, [0.025, 0.975])]


def _round(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 2)
