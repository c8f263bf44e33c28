"""The intervals of a study against closed forms, and its verdicts."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from mteditflow.evaluate.edival import Evaluation
from mteditflow.evaluate.held_out import save_evaluation
from mteditflow.record.alarms import LIMITS
from mteditflow.study.cells import read_study, runs_of
from mteditflow.study.statistics import Estimate, Outcome, Outcomes, estimate, moderate, spreads, verdict
from mteditflow.study.study_page import write_study

T_975 = {2: 4.3027, 4: 2.7764, 1e9: 1.9600}  # Student's t, from tables
T_52 = 2.0066  # of 13 x 4 degrees of freedom
NUM_CELLS, NUM_SEEDS = 4, 3


def test_two_way_spread_is_the_textbook_one() -> None:
    """Balanced: m' = interaction squares / ((C - 1)(R - 1)), m = squares within cells / (C (R - 1))."""
    o = np.random.default_rng(0).normal(60, 3, (NUM_CELLS, NUM_SEEDS))
    alone, paired = spreads({f"{c}": dict(enumerate(row)) for c, row in enumerate(o)})
    centered = o - o.mean(1, keepdims=True)
    rest = centered - centered.mean(0)
    assert paired.dof == (NUM_CELLS - 1) * (NUM_SEEDS - 1) == 6
    assert paired.mean_square == pytest.approx((rest**2).sum() / 6, rel=1e-9)
    assert alone.mean_square == pytest.approx((centered**2).sum() / (NUM_CELLS * (NUM_SEEDS - 1)), rel=1e-9)
    of_seeds = NUM_CELLS * (centered.mean(0) ** 2).sum()
    satterthwaite = (centered**2).sum() ** 2 / (of_seeds**2 / 2 + (rest**2).sum() ** 2 / 6)
    assert alone.dof == pytest.approx(satterthwaite, rel=1e-9)


def test_what_all_seeds_share_does_not_spread_differences() -> None:
    """O = cell + seed exactly: nothing is left, and the seeds' own part has no more freedom than R - 1."""
    points = {"a": {0: 50.0, 1: 53.0, 2: 56.0}, "b": {0: 60.0, 1: 63.0, 2: 66.0}, "once": {0: 1.0}}
    alone, paired = spreads(points)
    assert paired.mean_square == pytest.approx(0, abs=1e-20) and paired.dof == 2
    assert alone.mean_square == pytest.approx(9.0) and alone.dof == pytest.approx(2.0)


@pytest.mark.parametrize("points", [{"a": {0: 1.0}, "b": {0: 2.0}}, {"a": {0: 1.0}}])
def test_one_seed_has_no_spread(points: dict[str, dict[int, float]]) -> None:
    assert [(spread.mean_square, spread.dof) for spread in spreads(points)] == [(0.0, 0), (0.0, 0)]


def test_sums_of_squares_of_cells_add_up() -> None:
    """Over a grid with holes, squares and degrees of freedom of the cells are those of all; one seed has none."""
    random = np.random.default_rng(5)
    points = {str(c): {s: random.normal(60 + 4 * s, 3) for s in range(4) if (c + s) % 5} for c in range(4)}
    alone, paired = spreads(points | {"once": {2: 50.0}})
    assert all(of == pytest.approx((paired.mean_square, paired.dof), rel=1e-9) for of in paired.of.values())
    shared = alone.mean_square - paired.mean_square
    dof = alone.mean_square**2 / (paired.mean_square**2 / 6 + shared**2 / 3)  # of four seeds
    assert all(of == pytest.approx((alone.mean_square, dof), rel=1e-9) for of in alone.of.values())
    assert paired.dof == 14 - 5 - 3  # 13 runs in four cells, and one; five cells and four seeds less one


def test_moderation_finds_the_spread_of_spreads() -> None:
    """Mean squares that are m0 f0 / chi2(f0), as the fit supposes: of 4,000 cells m0 to 3 %, f0 to 15 %; a cell's own
    pulls as strongly as its degrees of freedom say. Squares of one spread have one for all.
    """
    random, prior, prior_dof, dof = np.random.default_rng(3), 9.0, 6.0, 4.0
    true = prior * prior_dof / random.chisquare(prior_dof, 4000)
    found = moderate({str(i): (m * random.chisquare(dof), dof) for i, m in enumerate(true)} | {"new": (0.3, 0.2)})
    (fitted, fitted_dof) = found["new"]
    assert fitted_dof - 0.2 == pytest.approx(prior_dof, rel=0.15)
    assert (fitted * fitted_dof - 0.3) / (fitted_dof - 0.2) == pytest.approx(prior, rel=0.03)
    errors = [np.log(found[str(i)][0] / m) for i, m in enumerate(true)]
    assert np.std(errors) < 0.75 * np.sqrt(torch.polygamma(1, torch.tensor(dof / 2)))  # of a cell's own mean square
    alike = moderate({str(i): (4.0 * dof, dof) for i in range(8)})
    assert set(alike.values()) == {(4.0, 32)}


def test_cells_of_few_seeds_do_not_hide_what_others_show() -> None:
    """200 studies of 14 cells of ten seeds and 14 of three: f0 = 4 is below 15 in nine of ten (by moments of logs,
    which take both alike, up to 35), and where there is one spread it is above 8 in 19 of 20 (by moments: 3.4).
    """
    random, dof = np.random.default_rng(5), np.array([9.0] * 14 + [2.0] * 14)
    fitted: dict[str, list[float]] = {"differ": [], "alike": []}
    for _ in range(200):
        for name, own in (("differ", 9 * 4 / random.chisquare(4, 28)), ("alike", np.full(28, 9.0))):
            squares = own * random.chisquare(dof)
            found = moderate({str(c): (s, f) for c, (s, f) in enumerate(zip(squares, dof, strict=True))})
            fitted[name].append(found["0"][1] - 9)  # of one spread for all: the sum of all but its own
    assert np.quantile(fitted["differ"], 0.9) < 15 and 3 < np.median(fitted["differ"]) < 6
    assert np.quantile(fitted["alike"], 0.05) > 8


def test_intervals_cover_where_cells_differ_in_spread() -> None:
    """Of 400 studies of 14 cells without an effect, whose spreads differ as the fit supposes: 95 % intervals hold 0 for
    91.5 to 98.5 % of any pair (three standard errors are 3.3 %). Of the two that spread most they hold it more often
    than intervals of one spread for all, and are wider by 15 % at least; of the two that spread least, narrower.
    """
    random, any_pair, noisy, widths = np.random.default_rng(4), [], [], []
    for _ in range(400):
        deviations = np.sqrt(9 * 4 / random.chisquare(4, 14))
        order = np.argsort(deviations)
        o = 50 + random.normal(size=(14, 5)) * deviations[:, None] + random.normal(0, 3, 5)
        cells = {str(c): {s: outcome(value, [value] * 40) for s, value in enumerate(row)} for c, row in enumerate(o)}
        outcomes = Outcomes(BASE, cells)
        found = [outcomes.difference(str(a), str(b), range(5)) for a, b in ((0, 1), order[-2:], order[:2])]
        pooled = 2 * T_52 * np.sqrt(2 * outcomes.paired.mean_square / 5)
        of_any, of_noisy, of_quiet = (it for it in found if it is not None)
        any_pair.append(of_any.low <= 0 <= of_any.high)
        noisy.append((of_noisy.low <= 0 <= of_noisy.high, abs(of_noisy.value) <= pooled / 2))
        widths.append([(it.high - it.low) / pooled for it in (of_noisy, of_quiet)])
    assert 0.915 <= np.mean(any_pair) <= 0.985
    assert np.mean(noisy, axis=0)[0] > np.mean(noisy, axis=0)[1] + 0.04
    wider, narrower = np.mean(widths, axis=0)
    assert wider > 1.15 and narrower < 0.85


@pytest.mark.parametrize("dof", T_975)
def test_interval_of_the_seeds_alone_is_students(dof: float) -> None:
    """100,000 draws: a quantile's standard error is sqrt(p (1 - p) / n) / density, 0.046 for t of 2 (density 0.0108 at
    4.30), 0.014 for t of 4 (0.035) and 0.008 for the normal (0.058); four of these.
    """
    found = estimate(7.0, np.full(2000, 7.0), 4.0, dof)
    tolerance = 2 * 4 * (0.046 if dof == 2 else 0.014) + 0.005  # two decimals are kept
    assert found.value == 7 and found.high - 7 == pytest.approx(2 * T_975[dof], abs=tolerance)
    assert 7 - found.low == pytest.approx(2 * T_975[dof], abs=tolerance)


def test_interval_adds_sessions_and_seeds_in_quadrature() -> None:
    """Normal deviates of 3 and 4 points: 1.96 * 5. The 3 points come from 2000 draws: standard error 1.6 %, of 9/25."""
    samples = np.random.default_rng(2).normal(0, 3, 2000)
    both, sessions = estimate(0, samples, 16.0, 1e9), estimate(0, samples, 16.0, 0)
    assert both.high == pytest.approx(9.8, rel=0.05) and both.low == pytest.approx(-9.8, rel=0.05)
    assert [sessions.low, sessions.high] == pytest.approx(np.quantile(samples, [0.025, 0.975]), abs=0.01)


def outcome(
    overall: float, samples: Sequence[float] = (50,) * 2000, drift: float = 1.0, credit: Sequence[float] = (0.0,)
) -> Outcome:
    return Outcome(
        point=np.array([0, 0, 0, overall]), samples=np.array(samples), rewards=(0.0, 0.0), success=np.array([50.0]),
        drift=np.array([drift]), credit=np.array(credit),
    )  # fmt: skip


BASE = Evaluation(
    verdict=torch.ones(4, 1, dtype=torch.bool), consistency=torch.full((4, 1), 0.25),
    valid=torch.ones(4, dtype=torch.bool), edit_types=[("a",)] * 4,
    images=torch.zeros(1, 1, 3, 2, 2), num_steps=1,
)  # fmt: skip


def make_outcomes() -> Outcomes:
    """Base O is sqrt(1 * 1/4) = 50 %, in every sample."""
    a = {0: outcome(60, [58, 62] * 1000), 1: outcome(64, [62, 66] * 1000)}
    b = {0: outcome(57, [55, 59] * 1000), 1: outcome(61, [59, 63] * 1000), 2: outcome(90, [90] * 2000)}
    return Outcomes(BASE, {"a": a, "b": b, "once": {0: outcome(70, [70] * 2000)}})


def test_prediction_is_the_rank_correlation_over_cells() -> None:
    """Cells whose mean credit is -.4 to -.1 leave drifts in that order but for two neighbours: 1 - 6 * 2 / (5 * 24) =
    0.9. A cell whose credit is unknown has no part; four cells are too few.
    """
    drifts = [0.1, 0.3, 0.2, 0.8, 2.0]
    cells = {
        str(i): {seed: outcome(50, drift=drift + seed, credit=(-0.5 + 0.1 * i, -0.3 + 0.1 * i)) for seed in (0, 1)}
        for i, drift in enumerate(drifts)
    }
    unknown = {"unknown": {0: outcome(50, drift=9.0, credit=(np.nan,))}}
    assert Outcomes(BASE, cells | unknown).prediction() == {"rank_correlation": 0.9, "num_cells": 5}
    del cells["0"]
    assert Outcomes(BASE, cells | unknown).prediction() is None


def test_differences_are_paired_by_session_and_seed() -> None:
    """a - b is 3 at both seeds that they share and in every sample, and b's third seed has no part."""
    outcomes = make_outcomes()
    assert outcomes.base_point[3] == pytest.approx(50) and outcomes.paired.dof == 1
    assert outcomes.paired.mean_square == pytest.approx(0, abs=1e-20)
    assert outcomes.difference("a", "b", [0, 1, 2]) == Estimate(value=3, low=3, high=3)
    assert outcomes.difference("b", "a", [1]) == Estimate(value=-3, low=-3, high=-3)
    assert outcomes.difference("a", "b", [2]) is None and outcomes.difference("a", "absent", [0]) is None


def test_gain_keeps_the_spread_of_the_seeds() -> None:
    outcomes = make_outcomes()
    gain, of_one = outcomes.gain("a", [0, 1, 2]), outcomes.gain("once", [0])
    assert gain is not None and gain.value == 12 and gain.low < 10 and gain.high > 14
    assert of_one is not None and of_one.value == 20 and of_one.high - of_one.low > gain.high - gain.low
    assert outcomes.gain("absent", [0]) is None


FOR, AGAINST, OPEN = (Estimate(value=v, low=v - 1, high=v + 1) for v in (2, -2, 0))


@pytest.mark.parametrize(
    ("claims", "expected"),
    [
        ([FOR, FOR], "agrees with the paper"),
        ([FOR, OPEN], "agrees with the paper in 1 of 2 pairs, the others not decided at this size"),
        ([OPEN, OPEN], "not decided at this size (interval contains 0)"),
        ([FOR, AGAINST], "against the paper"),
        ([AGAINST, None], "against the paper"),
        ([FOR, None], "not finished"),
        ([], "no order expected"),
    ],
)
def test_verdict(claims: list[Estimate | None], expected: str) -> None:
    assert verdict(claims) == expected


def made(success: float) -> Evaluation:
    """Twenty sessions of one turn, of which a share succeeds, with a cast of two thresholds."""
    verdict = (torch.arange(20) < 20 * success)[:, None]
    drift = torch.tensor([2 * LIMITS["cast"], 0, 0, 0, 0, torch.nan]).expand(20, 1, 6)
    return Evaluation(
        verdict=verdict, consistency=torch.ones(20, 1), valid=torch.ones(20, dtype=torch.bool),
        edit_types=[("a",)] * 20, images=torch.zeros(1, 1, 3, 2, 2), num_steps=1, drift=drift,
    )  # fmt: skip


def test_each_comparison_is_held_against_its_own_editor(tmp_path: Path) -> None:
    """The same question on two worlds: gains over the base of each, and spreads of the seeds of each."""
    cells = {"K=2": {"data.num_turns": 2}, "K=1": {"data.num_turns": 1}}
    other = {name: fields | {"model.path": "elsewhere"} for name, fields in cells.items()}
    base = {"evaluation.num_turns": 1, "evaluation.num_sessions": 20, "evaluation.num_sessions_short": 6}
    comparisons = {"here": {"question": "Here?", "cells": cells}, "there": {"question": "There?", "cells": other}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({"base": base, "seeds": [0, 1], "comparisons": comparisons}, sort_keys=False))
    found = read_study(path)
    runs = [run for run in runs_of(found, tmp_path) if run.seed == 0 or run.config.model.path != "elsewhere"]
    for run in runs:
        before, after = (0.25, 0.5 + 0.05 * run.seed) if run.config.model.path == "elsewhere" else (0.6, 0.8)
        run.folder.mkdir(parents=True)
        save_evaluation(run.folder, "before", made(before))
        save_evaluation(run.folder, "after", made(after if run.config.data.num_turns == 2 else before))
        line = {"iteration": 0, "reward/instruction": 0.5, "drift/credit_1": -0.25, "drift/credit_2": None}
        (run.folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    how = {"command": "study", "commits": ["unknown"], "num_finished": 6, "num_runs": 8}
    page = write_study(tmp_path, found, runs, how).read_text()
    contents = json.loads((tmp_path / "study.json").read_text())
    here, there = contents["comparisons"]
    assert [one["editor"] for one in contents["editors"]] == [here["editor"], there["editor"]]
    assert there["editor"] == "elsewhere" and [one["paired_seed_std"]["dof"] for one in contents["editors"]] == [1, 0]
    assert here["before"]["MT"] == 60 and there["before"]["MT"] == 25
    gain = np.sqrt(np.array([0.8, 0.6, 0.5, 0.25])) * 100
    assert here["rows"][0]["gain"]["value"] == pytest.approx(gain[0] - gain[1], abs=0.01)
    assert there["rows"][0]["gain"]["value"] == pytest.approx(gain[2] - gain[3], abs=0.01)
    assert "There? On elsewhere. **No order expected" in page and f"Here? On {here['editor']}." in page
    assert "elsewhere **nothing for the seeds**" in page and "None" not in page and "Undefined" not in page
    assert "| before | 60 | 2.00 | | |" in page and "| K=2 | 80 | 2.00 | \N{MINUS SIGN}0.25, unknown |" in page
    only = write_study(tmp_path, found, [run for run in runs if run.config.model.path != "elsewhere"], how)
    assert "| K=1 | not there yet |" in only.read_text()  # of an editor with no finished run
