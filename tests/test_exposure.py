"""The exposure-bias curve: turn k on its true input, on any number of ranks and after a kill, for any data."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rollouts import GivenRewards
from thread_ranks import on_ranks
from torch import Tensor
from update_parts import ONE_RANK, build, change, in_chunks

from mteditflow.config import Config
from mteditflow.config.reward import RewardConfig
from mteditflow.data import held_out_tasks
from mteditflow.distributed import Ranks
from mteditflow.evaluate.comparison_page import terminal_table
from mteditflow.evaluate.edival import Evaluation, compare, summary
from mteditflow.evaluate.exposure import evaluate_editor, num_sessions, true_input_tasks
from mteditflow.evaluate.held_out import evaluate, load_verdicts, part_folder, save_verdicts
from mteditflow.policy import Policy
from mteditflow.reward.overlap import Overlap
from mteditflow.rollout import Sampler
from mteditflow.types import Region, Rollout, Scores
from mteditflow.world.render import render

K = 3


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    """Five sessions of three turns, in parts of 2, 2 and 1; their ten later turns in five parts."""
    sessions = {"num_sessions": 5, "num_sessions_short": 2, "num_strips": 1, "num_steps": 2, "num_turns": K}
    return change(in_chunks(tiny_config, 2), "evaluation", has_true_inputs=True, **sessions)


@pytest.fixture(scope="module")
def policies(config: Config) -> list[Policy]:
    return [build(config) for _ in range(2)]


def judge(rollout: Rollout) -> Scores:
    """Success where a picture is bright enough; a session of one turn whose id is 7 gets no scores."""
    means = rollout.pictures.flatten(2).mean(2).T  # (N, K)
    ids = torch.tensor([rollout.tasks[g].id for g in rollout.group.tolist()])
    values = (means > means.median()).float().masked_fill((ids == 7)[:, None], torch.nan)
    return Scores(rewards={"instruction": values}, weights={}, valid=~values.isnan().any(1))


def evaluated(policies: list[Policy], config: Config, num_ranks: int, *, is_user: bool, **how: Any) -> list[Evaluation]:
    tasks = [replace(task, truth=None) if is_user else task for task in held_out_tasks(config)]

    def work(ranks: Ranks) -> Evaluation:
        with Overlap(GivenRewards(judge), RewardConfig(), ranks.device) as beside:  # pyright: ignore[reportArgumentType]
            return evaluate_editor(policies[ranks.rank], tasks, config, "ema", ranks, beside, **how)

    return on_ranks(num_ranks, work)


def bits(evaluation: Evaluation) -> list[Any]:
    return [value.numpy().tobytes() if isinstance(value, Tensor) else value for value in vars(evaluation).values()]


def test_the_true_input_is_what_the_edits_before_should_have_made(config: Config) -> None:
    """Its edit, carried out without a fault, is the same as in the session; ids are of no other turn."""
    tasks = held_out_tasks(config)
    for turn in range(1, K):
        made = true_input_tasks(tasks, turn)
        for task, once in zip(tasks, made, strict=True):
            assert once.instructions == (task.instructions[turn],) and once.edit_types == (task.edit_types[turn],)
            assert torch.equal(once.source, render([task.truth.scenes()[turn]])[0])
            assert once.truth.scenes() == task.truth.scenes()[turn : turn + 2]
    ids = [task.id for turn in range(K) for task in true_input_tasks(tasks, turn)]
    assert len(set(ids)) == len(ids) and ids[:5] == [task.id for task in tasks]


def test_a_users_instruction_is_carried_out_on_the_source(config: Config) -> None:
    """With what is untouched after all instructions so far, since that is what the data say."""
    ball, tree = Region(name="ball"), Region(name="tree")
    task = replace(held_out_tasks(config)[0], truth=None, untouched=((ball, tree), (tree,), ()), objects=(ball, tree))
    (once,) = true_input_tasks([task], 1)
    assert torch.equal(once.source, task.source) and once.untouched == ((tree,),) and once.objects == (ball, tree)


@pytest.mark.parametrize("is_user", [False, True])
def test_it_is_success_of_sessions_of_one_turn(policies: list[Policy], config: Config, is_user: bool) -> None:
    """Turn 1 has the same input in both; the rest of the evaluation is what it is without; kept in files."""
    (found,) = evaluated(policies, config, 1, is_user=is_user)
    plain = change(config, "evaluation", has_true_inputs=False)
    (without,) = evaluated(policies, plain, 1, is_user=is_user)
    assert without.true_success is None and without.true_inputs == ""
    bare = replace(found, true_success=None, true_inputs="")
    assert bits(bare) == bits(without)
    assert found.true_inputs == ("source" if is_user else "drawn") and found.true_success is not None
    assert torch.equal(found.true_success[:, 0], found.verdict[:, 0].float())
    if not is_user:
        once = change(config, "evaluation", num_turns=1)
        for turn in range(1, K):
            later = evaluate(policies[0], true_input_tasks(held_out_tasks(config), turn), once, "ema", ONE_RANK)
            assert torch.equal(found.true_success[:, turn], later.verdict[:, 0].float())
    unknown = found.true_success.isnan()
    assert unknown.nonzero().tolist() == ([[2, 1]] if is_user else [])  # session 2 at turn 2 has the id 7


def test_it_is_kept_in_files(policies: list[Policy], config: Config, tmp_path: Path) -> None:
    (found,) = evaluated(policies, config, 1, is_user=True)
    save_verdicts(tmp_path / "some.safetensors", found)
    again = load_verdicts(tmp_path / "some.safetensors")
    assert bits(again) == bits(found)


def test_ranks_and_a_kill_change_nothing(
    policies: list[Policy], config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the third of five parts of later turns is rolled out; two ranks go on with what is missing."""
    tasks, rolled, original = held_out_tasks(config), list[int](), Sampler.__call__
    (one,) = evaluated(policies, config, 1, is_user=False)
    folder = part_folder(tmp_path / "evaluating", policies[0], tasks, config, "after 3 iterations")

    class Killed(BaseException): ...

    def counted(self: Sampler, rows: Tensor) -> Rollout:
        if len(rolled) == 5:
            raise Killed
        rolled.append(self.tasks[int(rows[0])].id)
        return original(self, rows)

    with monkeypatch.context() as patch:
        patch.setattr(Sampler, "__call__", counted)
        with pytest.raises(Killed):
            evaluated(policies, config, 1, is_user=False, folder=folder)
        assert rolled == [0, 2, 4, 5, 7]
        rolled[:] = [-1] * 6  # no more kills
        shown: list[int] = []
        found = evaluated(policies, config, 2, is_user=False, folder=folder, show=shown.append)
    assert sorted(rolled[6:])[0] >= 7 and len(rolled[6:]) <= 4  # what was not whole is made again
    assert [bits(rank) for rank in found] == [bits(one)] * 2
    assert max(shown) == num_sessions(tasks, config) == 15
    folder.remove()
    assert not folder.path.exists()


def evaluation(verdict: list[list[int]], true: list[list[float]]) -> Evaluation:
    n = len(verdict)
    return Evaluation(
        verdict=torch.tensor(verdict).bool(), consistency=torch.full((n, 2), 0.8), valid=torch.ones(n).bool(),
        edit_types=[("a", "b")] * n, images=torch.zeros(2, 1, 3, 4, 4), num_steps=1,
        drift=torch.linspace(-0.2, 0.2, n * 2 * 6).view(n, 2, 6), true_success=torch.tensor(true), true_inputs="drawn",
    )  # fmt: skip


def test_figures_by_hand() -> None:
    """Three of four on true inputs at turn 2 and one of four on its own output: 50 points compound, paired. A turn
    without a score has no part in either.
    """
    before = evaluation([[1, 1], [1, 0], [1, 0], [1, 0]], [[1, 1], [1, 1], [1, 1], [1, 0]])
    turn = summary(before)["turns"][1]
    assert (turn["MT"], turn["MT_true"], turn["compounding"]) == (25, 75, 50)
    low, high = turn["compounding_interval"]
    assert 0 <= low < 50 < high <= 100
    after = evaluation([[1, 1], [1, 1], [1, 1], [1, 0]], [[1, 1], [1, 1], [1, float("nan")], [1, 0]])
    assert summary(after)["turns"][1]["MT_true"] == 66.67 and summary(after)["turns"][1]["compounding"] == 0
    caption = terminal_table({"base": summary(before)}, {}).caption
    assert isinstance(caption, str) and caption.startswith("base, turn 2: 75.0 % on true inputs, 50.0 points")
    change = compare(before, after)["turns"][1]
    assert change["compounding_change"] == pytest.approx(-33.33) and change["cast_size_change"] == 0
    assert before.drift is not None
    drift = before.drift[:, 1].double().numpy()
    for place, kind in enumerate(("cast", "tint", "contrast", "saturation", "sharpness", "grain")):
        assert turn[kind] == pytest.approx(drift[:, place].mean(), abs=6e-5)
        assert turn[f"{kind}_size"] == pytest.approx(np.abs(drift[:, place]).mean(), abs=6e-5)
        assert turn[f"{kind}_size_interval"][0] <= turn[f"{kind}_size"] <= turn[f"{kind}_size_interval"][1]
