"""EdiVal's metrics, paired gains, and the files of an evaluation."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TINY_MAX_TEXT_TOKENS
from rollouts import GivenRewards
from torch import Tensor
from update_parts import ONE_RANK

from mteditflow.config import Config, DataConfig, EvaluationConfig, LoraConfig, ModelConfig, RolloutConfig
from mteditflow.config.reward import RewardConfig
from mteditflow.data import held_out_tasks
from mteditflow.evaluate.comparison_page import final_table
from mteditflow.evaluate.edival import Evaluation, compare, metrics, point_metrics, summary
from mteditflow.evaluate.held_out import (
    evaluate,
    load_evaluation,
    load_verdicts,
    save_comparison,
    save_evaluation,
    save_verdicts,
)
from mteditflow.evaluate.kept import problem_of
from mteditflow.policy import build_policy
from mteditflow.record.figures import METRICS
from mteditflow.reward.overlap import Overlap
from mteditflow.types import Rollout, Scores

PUBLISHED_IF, PUBLISHED_CC = (59.97, 32.69, 16.61), (95.32, 92.24, 90.22)  # FLUX.1-Kontext-dev, algorithms.md section 5
PUBLISHED_O = (75.61, 54.91, 38.71)


def make(verdict: Tensor, consistency: Tensor | None = None) -> Evaluation:
    n, num_turns = verdict.shape
    return Evaluation(
        verdict=verdict.bool(),
        consistency=torch.full((n, num_turns), 0.8) if consistency is None else consistency,
        valid=torch.ones(n, dtype=torch.bool),
        edit_types=[("subject_add", "color_alter", "text_change")[:num_turns]] * n,
        images=torch.zeros(num_turns, 1, 3, 4, 4),
        num_steps=3,
    )


def test_published_figures() -> None:
    """10,000 sessions of which 5,997 succeed at turn 1, 3,269 of these at turn 2 too, and 1,661 of these at turn 3."""
    counts = torch.tensor([round(100 * value) for value in PUBLISHED_IF])
    verdict = torch.arange(10_000)[:, None] < counts
    verdict[counts[1] + 10, 2] = True  # success after a failure: MT counts it, IF does not
    point = point_metrics(make(verdict, torch.tensor(PUBLISHED_CC, dtype=torch.float64).expand(10_000, 3) / 100))
    marginal, joint, kept, overall = point
    assert joint == pytest.approx(PUBLISHED_IF, abs=1e-9) and kept == pytest.approx(PUBLISHED_CC, abs=1e-9)
    assert marginal[2] == pytest.approx(PUBLISHED_IF[2] + 0.01, abs=1e-9)
    assert overall == pytest.approx(PUBLISHED_O, abs=0.0051)  # two decimals are published


def test_overall_is_of_the_aggregates() -> None:
    """Not the mean of each session's own: sqrt(1/2 * 0.5), not (sqrt(1 * 1) + sqrt(0 * 0)) / 2."""
    point = point_metrics(make(torch.tensor([[1], [0]]), torch.tensor([[1.0], [0.0]])))
    assert point[:, 0] == pytest.approx([50, 50, 50, 50])
    point = point_metrics(make(torch.tensor([[1], [0]]), torch.tensor([[0.2], [0.6]])))
    assert point[3, 0] == pytest.approx(100 * (0.5 * 0.4) ** 0.5)


def test_undefined_consistency_is_left_out() -> None:
    nan = torch.nan
    point = point_metrics(make(torch.tensor([[1, 1], [1, 0]]), torch.tensor([[0.5, nan], [0.75, 0.25]])))
    assert point[2] == pytest.approx([62.5, 25.0])
    samples = metrics(np.ones((5, 2, 3)), np.full((5, 2, 3), 0.5))
    assert samples.shape == (4, 5, 3) and samples[2] == pytest.approx(50)


def test_consistency_that_few_sessions_have() -> None:
    """Of 8 sessions one has a consistency at turn 1, none at turn 2. In the third of the bootstrap samples without that
    session, (7/8)^8, CC is that of all, so that O varies with IF alone: IF is 0 in (1/2)^8 of the samples at most.
    """
    kept = torch.full((8, 2), torch.nan)
    kept[3, 0] = 0.5
    verdict = torch.ones(8, 2)
    verdict[:4, 0] = 0
    evaluation = make(verdict, kept)
    first, second = summary(evaluation)["turns"]
    assert (first["CC"], first["CC_interval"], first["CC_sessions"]) == (50, [50, 50], 1)
    expected = [(value * 50) ** 0.5 for value in (first["IF"], *first["IF_interval"])]
    assert [first["O"], *first["O_interval"]] == pytest.approx(expected, abs=0.0051)  # two decimals
    assert [second[name] for name in ("MT", "IF", "CC", "CC_interval", "O")] == [100, 50, None, None, None]
    assert second["CC_sessions"] == 0
    gain = compare(evaluation, evaluation)["turns"][1]
    assert (gain["IF_gain"], gain["CC_gain"], gain["O_gain_interval"]) == (0, None, None)


def test_identical_evaluations_gain_nothing() -> None:
    verdict = torch.rand(40, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    for turn in compare(make(verdict), make(verdict))["turns"]:
        for name in METRICS:
            assert turn[f"{name}_gain"] == 0 and turn[f"{name}_gain_interval"] == [0, 0]


def test_a_better_evaluation_gains() -> None:
    """Paired: 8 of 64 sessions go from failure to success, none back, so no bootstrap sample has a loss."""
    before = torch.zeros(64, 3)
    before[:32] = 1
    after = before.clone()
    after[32:40] = 1
    for turn in compare(make(before), make(after))["turns"]:
        assert turn["IF_gain"] == 12.5 and turn["MT_gain"] == 12.5 and turn["CC_gain"] == 0
        low, high = turn["IF_gain_interval"]
        # Binomial(64, 1/8): mean 8, standard deviation sqrt(7); 1.96 of these are 5.2 sessions, 8.1 points.
        assert low == pytest.approx(12.5 - 8.1, abs=1.6) and high == pytest.approx(12.5 + 8.1, abs=1.6)
        assert turn["O_gain_interval"][0] > 0
        assert turn["O_gain"] == pytest.approx(100 * ((0.625 * 0.8) ** 0.5 - (0.5 * 0.8) ** 0.5), abs=0.005)
    worse = compare(make(after), make(before))["turns"][2]
    assert worse["IF_gain"] == -12.5 and worse["IF_gain_interval"][1] < 0


def test_summary_counts_edit_types() -> None:
    evaluation = make(torch.tensor([[1, 0], [1, 1], [0, 1], [1, 0]]))
    found = summary(evaluation)
    assert found["num_sessions"] == 4
    assert found["edit_types"] == {
        "color_alter": {"success": 0.5, "count": 4},
        "subject_add": {"success": 0.75, "count": 4},
    }
    first, second = found["turns"]
    assert (first["MT"], first["IF"], second["MT"], second["IF"]) == (75, 75, 50, 25)
    low, high = first["MT_interval"]
    assert low <= 75 <= high and (low, high) != (75, 75)


def test_files_round_trip(tmp_path: Path) -> None:
    consistency = torch.tensor([[0.5, torch.nan], [0.25, 1.0]])
    evaluation = replace(make(torch.tensor([[1, 0], [0, 1]]), consistency), images=torch.rand(2, 1, 3, 4, 4))
    assert load_evaluation(tmp_path, "before") is None
    save_evaluation(tmp_path, "before", evaluation)
    save_evaluation(tmp_path, "after", evaluation)
    save_comparison(tmp_path, evaluation, evaluation)
    loaded = load_evaluation(tmp_path, "before")
    assert loaded is not None and loaded.edit_types == evaluation.edit_types and loaded.num_steps == 3
    assert torch.equal(loaded.verdict, evaluation.verdict) and torch.equal(loaded.images, evaluation.images)
    torch.testing.assert_close(loaded.consistency, consistency, rtol=0, atol=0, equal_nan=True)
    assert json.loads((tmp_path / "evaluation_before.json").read_text()) == summary(evaluation)
    assert final_table(tmp_path).row_count == 6  # before, after and gain of two turns
    (tmp_path / "evaluation_before.json").unlink()  # killed between the two files
    assert load_evaluation(tmp_path, "before") is None


def test_an_evaluation_of_other_settings_is_not_taken_for_this_one() -> None:
    wanted = EvaluationConfig(num_sessions=2, num_sessions_short=2, num_strips=1, num_steps=3)
    config = Config(data=DataConfig(num_turns=2), evaluation=wanted)

    def problem(config: Config) -> str:
        return problem_of(held_out_tasks(config), config, {})

    others: list[dict[str, Any]] = [{"num_sessions": 3}, {"num_steps": 4}, {"num_turns": 3}, {"has_true_inputs": True}]
    changed = [problem(replace(config, evaluation=replace(wanted, **other))) for other in others]
    assert len({problem(config), *changed}) == 1 + len(others)
    trained_on_one = replace(config, data=DataConfig(num_turns=1), evaluation=replace(wanted, num_turns=2))
    assert problem(trained_on_one) == problem(replace(config, evaluation=replace(wanted, num_turns=2)))


def test_evaluation_is_deterministic_and_sees_the_adapter(tiny_pipeline_folder: Path) -> None:
    config = Config(
        model=ModelConfig(path=str(tiny_pipeline_folder), max_text_tokens=TINY_MAX_TEXT_TOKENS),
        lora=LoraConfig(rank=2, alpha=4),
        data=DataConfig(num_turns=1),  # trained on fewer turns than it is evaluated at
        rollout=RolloutConfig(num_steps=3),
        evaluation=EvaluationConfig(num_sessions=3, num_turns=2, num_sessions_short=3, num_strips=2, num_steps=3),
    )
    policy, tasks = build_policy(config.model, config.lora, 0, has_old=False), held_out_tasks(config)
    base, again = evaluate(policy, tasks, config, "off", ONE_RANK), evaluate(policy, tasks, config, "ema", ONE_RANK)
    assert base.images.shape == (2, 2, 3, 64, 64) and base.verdict.shape == (3, 2)
    assert torch.equal(base.images, again.images)  # B is 0: the same noise, the same pictures
    policy.adapters.load("ema", {key: weight + 0.1 for key, weight in policy.adapters.state("ema").items()})
    moved = evaluate(policy, tasks, config, "ema", ONE_RANK)
    assert not torch.equal(moved.images, base.images)
    assert torch.equal(evaluate(policy, tasks, config, "off", ONE_RANK).images, base.images)
    fewer = replace(config, evaluation=replace(config.evaluation, num_sessions=2, num_sessions_short=2))
    assert held_out_tasks(fewer)[1].instructions == tasks[1].instructions  # the first sessions of every number


def test_sessions_without_scores_have_no_part() -> None:
    """Metrics, intervals and edit types are those of the valid sessions; gains those of the sessions valid in both."""
    verdict = torch.rand(60, 3, generator=torch.Generator().manual_seed(0)) < 0.6
    kept = torch.rand(60, 3, generator=torch.Generator().manual_seed(1))
    valid = torch.arange(60) % 3 > 0
    whole, some = make(verdict, kept), make(verdict[valid], kept[valid])
    masked = replace(whole, valid=valid, consistency=kept.masked_fill(~valid[:, None], torch.nan))
    assert point_metrics(masked) == pytest.approx(point_metrics(some), abs=1e-12)
    found = summary(masked)
    assert found["num_sessions"] == 40 and found["num_invalid"] == 20
    assert found["edit_types"] == summary(some)["edit_types"] and summary(some)["num_invalid"] == 0
    other = replace(make(~verdict, kept), valid=torch.arange(60) % 5 > 0)
    both = masked.valid & other.valid
    gains = compare(masked, other)
    expected = point_metrics(make(~verdict[both], kept[both])) - point_metrics(make(verdict[both], kept[both]))
    assert gains["num_sessions"] == int(both.sum()) == 32
    assert [turn["O_gain"] for turn in gains["turns"]] == pytest.approx(expected[3], abs=0.0051)  # two decimals


def test_an_evaluation_written_before_there_were_invalid_sessions_is_read(tmp_path: Path) -> None:
    evaluation = make(torch.ones(3, 2))
    save_verdicts(tmp_path / "old.safetensors", evaluation)
    tensors = safetensors.torch.load_file(tmp_path / "old.safetensors")
    del tensors["valid"]
    metadata = {"edit_types": json.dumps(evaluation.edit_types), "num_steps": "3"}
    safetensors.torch.save_file(tensors, tmp_path / "old.safetensors", metadata)
    assert load_verdicts(tmp_path / "old.safetensors").valid.tolist() == [True] * 3


class Judge:
    """Scores that depend on a task alone; every third task gets none."""

    def __call__(self, rollout: Rollout) -> Scores:
        ids, num_turns = torch.tensor([task.id for task in rollout.tasks]), len(rollout.turns)
        instruction = torch.stack([(ids + turn) % 5 / 4 for turn in range(num_turns)], dim=1)
        valid = ids % 3 > 0
        rewards = {
            "instruction": instruction.masked_fill(~valid[:, None], torch.nan),
            "consistency": torch.full_like(instruction, 0.5),
        }
        return Scores(rewards=rewards, weights={}, valid=valid)


def test_tasks_without_truth_are_judged_by_the_reward(
    tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ids 1, 2, 4 and 5 of 0..5 count: at turn 1 they score 1, 2, 4, 0 of 4, at turn 2 2, 3, 0, 1; 3 is success."""
    config = Config(
        model=ModelConfig(path=str(tiny_pipeline_folder), max_text_tokens=TINY_MAX_TEXT_TOKENS),
        lora=LoraConfig(rank=2, alpha=4),
        evaluation=EvaluationConfig(num_sessions=6, num_turns=2, num_sessions_short=2, num_strips=2, num_steps=1),
    )
    policy = build_policy(config.model, config.lora, 0, has_old=False)
    tasks = [replace(task, truth=None) for task in held_out_tasks(config)]
    with Overlap(GivenRewards(Judge()), RewardConfig(), ONE_RANK.device) as judge:  # pyright: ignore[reportArgumentType]
        evaluation = evaluate(policy, tasks, config, "off", ONE_RANK, judge)
        monkeypatch.setattr("mteditflow.evaluate.held_out.MAX_INVALID_SHARE", 0.3)
        with pytest.raises(ValueError, match=r"^2 of 6 held-out sessions could not be scored, .* 30%: look at the rew"):
            evaluate(policy, tasks, config, "off", ONE_RANK, judge)
    assert evaluation.valid.tolist() == [False, True, True, False, True, True]
    assert point_metrics(evaluation)[:3].tolist() == [[25, 25], [25, 0], [50, 50]]
