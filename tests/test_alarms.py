"""Alarms: closed forms of what they measure, and that a hacked run rings and an honest one does not."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from rollouts import rollout_of
from train_runs import Arguments

from mteditflow.config import Config
from mteditflow.config.command import train as main
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks, alone
from mteditflow.pictures import round_to_8_bit
from mteditflow.record.alarms import (
    ALARMS,
    LIMITS,
    NUM_ITERATIONS,
    added_figures,
    credit_figures,
    find_alarms,
    held_out_figures,
    is_unedited,
    rollout_figures,
)
from mteditflow.record.drift import KINDS
from mteditflow.record.files import read_json, write_json
from mteditflow.record.metrics import read_lines
from mteditflow.report.run_report import report_contents
from mteditflow.types import Condition, Rollout, Scores
from mteditflow.world.drift import AXES, drifted
from mteditflow.world.render import render

NOTHING = Condition(text={}, image=torch.zeros(0))


def made(pictures: list[torch.Tensor], config: Config) -> tuple[Rollout, Scores]:
    """A rollout of two trajectories per task that made these pictures (N, 3, 64, 64), turn by turn."""
    tasks = training_tasks(config, 0, Ranks(rank=0, world_size=1, device=torch.device("cpu")))
    rollout = rollout_of(tasks, torch.stack(pictures))
    return rollout, scores_of(torch.full((len(rollout.group), len(pictures)), 0.9))


def scores_of(consistency: torch.Tensor) -> Scores:
    rewards = {"instruction": torch.full_like(consistency, 0.9), "consistency": consistency}
    return Scores(rewards=rewards, weights={}, valid=torch.ones(len(consistency)).bool())


@pytest.fixture
def config() -> Config:
    default = Config()
    return replace(default, data=replace(default.data, num_turns=2))


def honest(config: Config) -> list[torch.Tensor]:
    """The pictures that the instructions ask for, without a fault."""
    tasks = training_tasks(config, 0, Ranks(rank=0, world_size=1, device=torch.device("cpu")))
    return [render([task.truth.scenes()[turn + 1] for task in tasks]).repeat_interleave(2, dim=0) for turn in range(2)]


def test_a_small_edit_is_one_and_noise_is_none() -> None:
    before = torch.zeros(3, 3, 64, 64)
    after = before.clone()
    after[0, :, 8:16, 8:16] = 0.4  # one block by a fifth of the range
    after[1] += 0.1 * torch.randn(3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert is_unedited(before, after).tolist() == [False, True, True]


def test_honest_pictures_do_not_ring(config: Config) -> None:
    figures = rollout_figures(*made(honest(config), config), alone())
    watched = figures | added_figures([figures])
    drifts = {f"drift/{kind}{size}_{turn}" for kind in KINDS for size in ("", "_size") for turn in (1, 2)}
    assert watched.keys() == (ALARMS.keys() | drifts) - {"alarm/held_out_gap"}
    assert figures["alarm/no_edit_share"] == 0 and figures["alarm/over_edit_share"] == 0
    assert find_alarms(watched) == []


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("noise", "alarm/grain_drift"),
        ("grey", "alarm/saturation_drift"),
        ("vivid", "alarm/saturation_drift"),
        ("warm or cold", "alarm/cast_drift"),
        ("warm or cold", "alarm/drift_growth"),
        ("blurred", "alarm/sharpness_drift"),
        ("faded", "alarm/contrast_drift"),
        ("ignored", "alarm/no_edit_share"),
        ("repainted", "alarm/over_edit_share"),
    ],
)
def test_a_hacked_run_rings(fault: str, expected: str, config: Config) -> None:
    pictures = honest(config)
    rollout, scores = made(pictures, config)
    before, drift = rollout_figures(rollout, scores, alone()), torch.zeros(len(pictures[1]), 4)
    match fault:
        case "warm or cold":  # as many of one as of the other
            drift[::2, 0], drift[1::2, 0] = 0.12, -0.12
        case "blurred":
            drift[:, AXES.index("blur")] = 0.4
        case "faded":
            drift[:, AXES.index("fade")] = 0.2
        case "noise":
            noise = torch.randn(pictures[1].shape, generator=torch.Generator().manual_seed(0))
            pictures[1] = (pictures[1] + 0.2 * noise).clamp(-1, 1)
        case "grey":
            pictures[1] = pictures[1].mean(1, keepdim=True).expand_as(pictures[1])
        case "vivid":
            grey = pictures[1].mean(1, keepdim=True)
            pictures[1] = (grey + 3 * (pictures[1] - grey)).clamp(-1, 1)
        case "ignored":
            sources = torch.stack([task.source for task in rollout.tasks])[rollout.group]
            pictures = [round_to_8_bit(sources), round_to_8_bit(sources)]
        case "repainted":
            scores = scores_of(torch.full_like(scores.instruction, 0.5))
    pictures[1] = drifted(pictures[1], drift)
    rollout = replace(
        rollout, turns=[replace(turn, image=own) for turn, own in zip(rollout.turns, pictures, strict=True)]
    )
    after = rollout_figures(rollout, scores, alone())
    assert expected in find_alarms(after | added_figures([before] * NUM_ITERATIONS + [after] * NUM_ITERATIONS))


def test_a_picture_that_is_not_finite_is_left_out(config: Config) -> None:
    pictures = honest(config)
    whole = rollout_figures(*made(pictures, config), alone())
    pictures[0][3] = torch.nan
    figures = rollout_figures(*made(pictures, config), alone())
    assert all(value == value for value in figures.values())
    assert figures["drift/cast_size_2"] == pytest.approx(whole["drift/cast_size_2"], abs=0.01)


def sizes(**of_turns: tuple[float, float]) -> dict[str, float]:
    """The sizes of drifts at turns 1 and 2; the others have none."""
    given = {kind: of_turns.get(kind, (0.0, 0.0)) for kind in KINDS}
    return {f"drift/{kind}_size_{turn + 1}": values[turn] for kind, values in given.items() for turn in range(2)}


def test_what_an_editor_brings_is_no_alarm_and_what_training_adds_is() -> None:
    """An editor that drifts by 0.3 at turn 2: mended it is quiet, also from one iteration to the next; one sign made
    the other is the same size; added, each limit is where the alarm rings, and so does growth alone.
    """
    begun = [sizes(cast=(0.05, 0.3), contrast=(0.02, 0.1))] * 5
    assert find_alarms(added_figures(begun)) == []
    mended = [*begun, *[sizes(cast=(0.02, 0.05 + 0.02 * (n % 2)), contrast=(0.01, 0.02)) for n in range(5)]]
    figures = added_figures(mended)
    assert find_alarms(figures) == [] and figures["alarm/cast_drift"] == pytest.approx(-0.24, abs=0.02)
    for kind, limit in LIMITS.items():
        for share, expected in ((0.9, []), (1.1, [f"alarm/{kind}_drift", "alarm/drift_growth"])):
            assert find_alarms(added_figures([sizes()] * 3 + [sizes(**{kind: (0.0, share * limit)})] * 3)) == expected
    at_once = added_figures([sizes()] * 3 + [sizes(cast=(0.1, 0.1))] * 3)
    assert find_alarms(at_once) == ["alarm/cast_drift"]  # painted at turn 1, and not more of it at turn 2


@pytest.mark.parametrize("kind", LIMITS)
def test_what_other_tasks_move_is_no_alarm_and_what_stands_out_of_it_is(kind: str) -> None:
    """Sizes that scatter from one iteration to the next by a whole limit: at most one of 20 runs rings in 60 of them;
    with five limits more, at once or by and by, it does.
    """
    random, limit, num_rung, noisy = Random(0), LIMITS[kind], 0, list[float]()
    for _ in range(20):
        noisy = [limit * (4 + random.gauss(0, 1)) for _ in range(60)]
        lines = [sizes(**{kind: (0.0, size)}) for size in noisy]
        num_rung += any(find_alarms(added_figures(lines[:num])) for num in range(6, 61))
    assert num_rung <= 1
    for grown in (lambda n: 5.0 * (n > 50), lambda n: n / 12):
        rising = [sizes(**{kind: (0.0, size + limit * grown(n))}) for n, size in enumerate(noisy)]
        assert f"alarm/{kind}_drift" in find_alarms(added_figures(rising))


def test_what_is_unknown_is_no_alarm() -> None:
    """As lines of metrics have it: None; and as they are before they are written: NaN."""
    none: dict[str, Any] = dict.fromkeys(sizes())
    nan = dict.fromkeys(sizes(), float("nan"))
    for lines in ([none] * 6, [nan] * 6, [none] * 3 + [sizes(cast=(0.1, 0.9))] * 3, [{}] * 6):
        assert find_alarms(added_figures(lines)) == []
    partly = added_figures([none, sizes(), none, nan, sizes(cast=(0.1, 0.9)), none])
    assert partly["alarm/cast_drift"] == pytest.approx(0.9)


def test_the_gap_between_judge_and_truth() -> None:
    """Of the last three iterations: (0.9 + 0.7) / 2 by the judge; what is unknown has no part."""
    values: dict[str, Any] = {"reward/success_1": 0.9, "reward/success_2": 0.7, "heldout/MT_1": 50, "heldout/MT_2": 30}
    assert held_out_figures([values], values) == {"alarm/held_out_gap": pytest.approx(0.4)}
    assert held_out_figures([{"reward/success_1": 0.9}], {}) == {} == held_out_figures([], values)
    lines = [{"reward/success_1": one, "reward/success_2": 0.7} for one in (0.0, 1.0, None, 0.8)]
    partly = values | {"reward/success_3": None, "heldout/MT_3": 10, "heldout/MT_4": None}
    assert held_out_figures(lines, partly) == {"alarm/held_out_gap": pytest.approx(0.4)}
    assert find_alarms(held_out_figures([values], values)) == ["alarm/held_out_gap"]
    assert find_alarms({"alarm/held_out_gap": float("nan")}) == []


@pytest.mark.parametrize("leniency", [0.0, 50.0])
def test_a_judge_that_likes_damage_rings_at_the_end(
    arguments: Arguments, tmp_path: Path, capsys: pytest.CaptureFixture[str], leniency: float
) -> None:
    """Without an evaluation on the way, too: a tiny editor of random weights damages every picture and edits none."""
    judge: dict[str, Any] = {"reward__judge": "simulated_direct", "reward__leniency": leniency} if leniency else {}
    main(arguments(tmp_path, run__num_iterations=1, evaluation__every=0, **judge))
    assert ("alarm, judge against truth" in capsys.readouterr().err) == (leniency > 0)
    row = (tmp_path / "report.html").read_text().partition("<td>Judge against truth")[2].partition("</tr>")[0]
    assert ("since iteration 1" in row) == (leniency > 0) and ("quiet" in row) == (leniency == 0)


def test_without_truth_no_judge_is_held_against_it(klein_run: Path) -> None:
    """A run with a short evaluation, of sessions that its own judge scores."""
    lines = read_lines(klein_run / "metrics.jsonl")
    assert "heldout/MT_1" in lines[0] and not any("alarm/held_out_gap" in line for line in lines)


def test_the_page_holds_the_judge_against_what_was_evaluated(lora_run: Path, tmp_path: Path) -> None:
    """The best average, after 2 of 9 iterations, where judge and truth agreed; later they did not."""
    shutil.copy(lora_run / "config.yaml", tmp_path)
    after = read_json(lora_run / "evaluation_after.json")
    write_json(tmp_path / "evaluation_after.json", after)
    agreeing = {f"reward/success_{row['turn']}": row["MT"] / 100 for row in after["turns"]}
    apart = {name: value + 1 for name, value in agreeing.items()}
    lines = [
        {"iteration": n, "heldout/best_iteration": min(n + 1, 2), **(apart if n > 1 else agreeing)} for n in range(9)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (row,) = (row for row in report_contents(tmp_path)["alarms"] if row["title"] == "Judge against truth")
    assert (row["last"], row["first"]) == (0, None)
    text = (tmp_path / "config.yaml").read_text()
    assert "  path: embedded\n" in text
    (tmp_path / "config.yaml").write_text(text.replace("  path: embedded\n", "  path: photos.jsonl\n"))
    assert "Judge against truth" not in [row["title"] for row in report_contents(tmp_path)["alarms"]]


def test_credit_is_the_correlation_within_groups() -> None:
    """Numpy's, of each group's deviations; what is the same in a whole group, or unknown, has no part."""
    generator = torch.Generator().manual_seed(0)
    drift, group = torch.randn(12, 2, len(KINDS), generator=generator), torch.arange(3).repeat_interleave(4)
    advantages = torch.randn(12, 2, generator=generator) + 9 * group[:, None]
    drift[5, 1, 2] = torch.nan
    figures = credit_figures(drift, group, advantages)
    size = (drift / torch.tensor(list(LIMITS.values())))[..., :5].square().sum(-1).sqrt()
    for turn, added in enumerate((size[:, 0], size[:, 1] - size[:, 0]), start=1):
        rows = [row for row in range(12) if not added[row].isnan()]
        pairs = np.array([(added[row].item(), advantages[row, turn - 1].item()) for row in rows])
        for number in range(3):
            of_group = [place for place, row in enumerate(rows) if group[row] == number]
            pairs[of_group] -= pairs[of_group].mean(0)
        assert figures[f"drift/credit_{turn}"] == pytest.approx(np.corrcoef(pairs.T)[0, 1], abs=1e-6)
    even = credit_figures(drift, group, torch.ones(12, 2))
    assert all(value != value for value in even.values())
