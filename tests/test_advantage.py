"""Advantages against the golden tables (G = 4, K = 3; computed in float64 from the formulas) and their invariants."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from mteditflow.advantage import advantages, aggregate_turns, mean_reward
from mteditflow.config import AdvantageConfig
from mteditflow.objective.nft import optimality
from mteditflow.types import Scores

paper = partial(AdvantageConfig, std="group")  # the golden values are for the paper's std, and its weight of 0.3

NAN = float("nan")
IF = torch.tensor([[5, 5, 5], [5, 1, 5], [3, 3, 3], [4, 5, 2]], dtype=torch.float64).sub(1).div(4)
CC = torch.tensor([[0.95, 0.93, 0.90], [0.96, 0.95, 0.94], [0.90, 0.88, 0.86], [0.94, 0.90, 0.91]], dtype=torch.float64)
GROUP = torch.zeros(4, dtype=torch.int64)
FOUR, SIX = 6e-5, 6e-7  # half a unit of the last printed decimal, and a fifth of it to spare

GOLDEN = [  # aggregation, R_IF, z
    ("mean", [1, 0.666667, 0.5, 0.666667], [1.6050, -0.2293, -1.1464, -0.2293]),
    ("min", [1, 0, 0.5, 0.25], [1.5209, -1.1829, 0.1690, -0.5070]),
    ("prod", [1, 0, 0.125, 0.1875], [1.7060, -0.8331, -0.5158, -0.3571]),
    ("geomean", [1, 0, 0.5, 0.572357], [1.3573, -1.4592, -0.0510, 0.1529]),
    ("binary_all", [1, 0, 0, 0], [1.7317, -0.5772, -0.5772, -0.5772]),
    ("prefix_soft", [1, 0.333333, 0.291667, 0.5625], [1.6108, -0.7591, -0.9072, 0.0555]),
]
BY_HAND = [
    ("sum", [3, 2, 1.5, 2]),
    ("last", [1, 1, 0.5, 0.25]),
    ("binary_mean", [1, 2 / 3, 0, 2 / 3]),
    ("prefix_binary", [1, 1 / 3, 0, 2 / 3]),
]


def make_scores(
    instruction: Tensor = IF, consistency: Tensor = CC, valid: Tensor | None = None, weight: float = 0.3
) -> Scores:
    everyone = torch.ones(len(instruction), dtype=torch.bool)
    return Scores(
        rewards={"instruction": instruction, "consistency": consistency},
        weights={"instruction": 1.0, "consistency": weight},
        valid=everyone if valid is None else valid,
    )


def two_groups() -> tuple[Scores, Tensor]:
    return make_scores(torch.cat([IF, IF.flip(0) * 0.5]), torch.cat([CC, CC * 0.9])), torch.arange(8) // 4


def has_no_spread(advantage: Tensor, group: Tensor) -> list[bool]:
    return [not advantage[group == g].any() for g in group.unique()]


def is_close(actual: Tensor, expected: object, atol: float) -> None:
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype), rtol=0, atol=atol)


@pytest.mark.parametrize(("how", "reward", "z"), GOLDEN)
def test_golden_aggregations(how: str, reward: list[float], z: list[float]) -> None:
    is_close(aggregate_turns(IF, how), reward, SIX)
    config = paper(turn_aggregation=how)  # pyright: ignore[reportArgumentType]
    is_close(advantages(make_scores(weight=0), GROUP, config), [[value] * 3 for value in z], FOUR)


@pytest.mark.parametrize(("how", "reward"), BY_HAND)
def test_other_aggregations(how: str, reward: list[float]) -> None:
    is_close(aggregate_turns(IF, how), reward, 1e-15)  # a few float64 roundings of numbers up to 3


def test_golden_fusion_and_optimality() -> None:
    advantage = advantages(make_scores(), GROUP, paper())
    is_close(advantage, [[value] * 3 for value in (1.703758, 0.145890, -1.600612, -0.249036)], SIX)
    is_close(optimality(advantage[:, 0], 5.0), [0.670376, 0.514589, 0.339939, 0.475096], SIX)
    reward_level = advantages(make_scores(), GROUP, paper(fusion="reward"))
    is_close(reward_level, [[value] * 3 for value in (1.584763, -0.173291, -1.184307, -0.227164)], SIX)


def test_golden_aggregate_at_advantage() -> None:
    advantage = advantages(make_scores(), GROUP, paper(aggregate_at="advantage"))
    is_close(advantage, [[value] * 3 for value in (1.024894, 0.478081, -1.236592, -0.266383)], SIX)


def test_golden_return_to_go() -> None:
    config = paper(credit="return_to_go")
    expected = [
        [1.6056, 1.6771, 0.962],
        [-0.2294, -0.7623, 0.962],
        [-1.1469, -0.7623, -0.5772],
        [-0.2294, -0.1525, -1.3467],
    ]
    is_close(advantages(make_scores(weight=0), GROUP, config), expected, FOUR)


def z_by_hand(values: Tensor) -> Tensor:
    return (values - values.mean(0)) / (values.std(0, correction=0) + 1e-4)


ROUNDING = 1e-11  # float64 differences of 1e-16 in rewards, over a std of at least 1e-2, with room


def test_per_turn_and_early_stop() -> None:
    expected = z_by_hand(IF) + 0.3 * z_by_hand(CC)
    is_close(advantages(make_scores(), GROUP, paper(credit="per_turn")), expected, ROUNDING)
    # trajectory 1 fails at turn 1, 2 at turn 0, 3 at turn 2: nothing after that
    alive = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]])
    is_close(advantages(make_scores(), GROUP, paper(credit="early_stop")), expected * alive, ROUNDING)


def test_return_to_go_of_consistency() -> None:
    config = paper(credit="return_to_go")
    to_go = [values.flip(1).cumsum(1).flip(1) for values in (IF, CC)]
    is_close(advantages(make_scores(), GROUP, config), z_by_hand(to_go[0]) + 0.3 * z_by_hand(to_go[1]), ROUNDING)


def test_global_std() -> None:
    scores, group = two_groups()
    reward = scores.instruction.mean(1)
    expected = torch.cat([reward[:4] - reward[:4].mean(), reward[4:] - reward[4:].mean()])
    expected = expected / (reward.std(correction=0) + 1e-4)
    actual = advantages(replace(scores, weights={"instruction": 1.0, "consistency": 0}), group, paper(std="global"))
    is_close(actual[:, 0], expected, ROUNDING)


@pytest.mark.parametrize("credit", ["broadcast", "per_turn", "return_to_go", "early_stop"])
@pytest.mark.parametrize("fusion", ["advantage", "reward"])
def test_invalid_trajectory_is_as_if_absent(credit: str, fusion: str) -> None:
    config = paper(credit=credit, fusion=fusion)  # pyright: ignore[reportArgumentType]
    row = torch.full((1, 3), NAN, dtype=torch.float64)
    scores = make_scores(torch.cat([IF[:2], row, IF[2:]]), torch.cat([CC[:2], row, CC[2:]]), torch.arange(5) != 2)
    advantage = advantages(scores, torch.zeros(5, dtype=torch.int64), config)
    assert torch.equal(advantage[2], torch.zeros(3, dtype=torch.float64))
    is_close(advantage[[0, 1, 3, 4]], advantages(make_scores(), GROUP, config), ROUNDING)


def test_group_with_one_valid_trajectory_is_dropped() -> None:
    scores, group = two_groups()
    valid = torch.tensor([True, False, False, False, True, True, True, True])
    scores = make_scores(scores.instruction, scores.rewards["consistency"], valid)
    for config in (paper(), paper(std="global")):
        advantage = advantages(scores, group, config)
        assert torch.equal(advantage[:4], torch.zeros(4, 3, dtype=torch.float64))
        assert (advantage[4:].abs() > 0.01).all()
        assert has_no_spread(advantage, group) == [True, False]
        rest = make_scores(scores.instruction[4:], scores.rewards["consistency"][4:])
        is_close(advantage[4:], advantages(rest, GROUP, config), ROUNDING)  # no part in the batch's std either
    nobody = make_scores(scores.instruction, scores.rewards["consistency"], torch.zeros(8, dtype=torch.bool))
    assert not advantages(nobody, group, paper()).any()


def test_undefined_consistency_contributes_nothing() -> None:
    consistency = CC.clone()
    consistency[1] = NAN
    consistency[0, 1] = NAN
    scores = make_scores(consistency=consistency)
    advantage = advantages(scores, GROUP, paper())[:, 0]
    defined = torch.tensor([(0.95 + 0.90) / 2, CC[2].mean(), CC[3].mean()], dtype=torch.float64)
    expected = z_by_hand(IF.mean(1))
    is_close(advantage[1], expected[1], ROUNDING)
    is_close(advantage[[0, 2, 3]], expected[[0, 2, 3]] + 0.3 * z_by_hand(defined), ROUNDING)
    # before z, the mean of the others stands in
    filled = torch.stack([defined[0], defined.mean(), defined[1], defined[2]])
    reward_level = advantages(scores, GROUP, paper(fusion="reward"))[:, 0]
    is_close(reward_level, z_by_hand(IF.mean(1) + 0.3 * filled), ROUNDING)
    # return to go: a missing turn counts as the mean of the trajectory's remaining ones
    to_go = advantages(scores, GROUP, paper(credit="return_to_go"))
    rest = torch.stack([torch.tensor(0.90, dtype=torch.float64) * 2, CC[2, 1:].sum(), CC[3, 1:].sum()])
    sums = z_by_hand(IF[:, 1:].sum(1))[[0, 2, 3]] + 0.3 * z_by_hand(rest)
    is_close(to_go[[0, 2, 3], 1], sums, ROUNDING)
    nothing = make_scores(consistency=torch.full_like(CC, NAN))
    is_close(advantages(nothing, GROUP, paper())[:, 0], expected, ROUNDING)


@pytest.mark.parametrize("fusion", ["advantage", "reward"])
@pytest.mark.parametrize("std", ["group", "global"])
def test_zero_spread_is_exactly_zero(fusion: str, std: str) -> None:
    # the same scores in another order of turns: equal means, up to rounding
    flat = torch.tensor([[0.1, 0.7, 0.3], [0.7, 0.3, 0.1], [0.3, 0.1, 0.7], [0.1, 0.3, 0.7]], dtype=torch.float64)
    scores = make_scores(torch.cat([flat, IF]), torch.cat([flat, CC]))
    group = torch.arange(8) // 4
    config = paper(fusion=fusion, std=std)  # pyright: ignore[reportArgumentType]
    advantage = advantages(scores, group, config)
    assert torch.equal(advantage[:4], torch.zeros(4, 3, dtype=torch.float64))
    assert has_no_spread(advantage, group) == [True, False]


def test_zero_spread_of_one_reward_leaves_the_other() -> None:
    scores = make_scores(instruction=torch.full_like(IF, 0.1))
    is_close(advantages(scores, GROUP, paper())[:, 0], 0.3 * z_by_hand(CC.mean(1)), ROUNDING)
    assert has_no_spread(
        advantages(replace(scores, weights={"instruction": 1.0, "consistency": 0}), GROUP, paper()), GROUP
    ) == [True]


def test_permutation_of_rows() -> None:
    scores, group = two_groups()
    order = torch.randperm(8, generator=torch.Generator().manual_seed(1))
    shuffled = make_scores(scores.instruction[order], scores.rewards["consistency"][order])
    for config in (paper(), paper(std="global"), paper(credit="early_stop")):
        is_close(advantages(shuffled, group[order], config), advantages(scores, group, config)[order], ROUNDING)


def test_float32_scores() -> None:
    scores = make_scores(IF.float(), CC.float())
    advantage = advantages(scores, GROUP, paper())
    assert advantage.dtype == torch.float32
    # consistency rounded to float32 (6e-8), over its std of 0.025, times 0.3; and the result's own rounding (1e-7)
    is_close(advantage.double(), advantages(make_scores(), GROUP, paper()), 1e-6)


def test_nan_of_a_valid_row_is_an_error() -> None:
    instruction = IF.clone()
    instruction[2, 1] = NAN
    with pytest.raises(ValueError, match="instruction"):
        advantages(make_scores(instruction), GROUP, paper())
    consistency = CC.clone()
    consistency[0, 0] = float("inf")
    with pytest.raises(ValueError, match="advantage"):
        advantages(make_scores(consistency=consistency), GROUP, paper())
    with pytest.raises(ValueError, match="turn_aggregation"):
        aggregate_turns(IF, "median")


def test_optimality_is_clamped() -> None:
    assert optimality(torch.tensor([-9.0, -5.0, 0.0, 5.0, 9.0]), 5.0).tolist() == [0, 0, 0.5, 1, 1]


# More rewards than two


EXTRA = torch.tensor([[0.1, 0.4, 0.2], [0.9, NAN, 0.7], [0.3, 0.3, 0.3], [NAN, NAN, NAN]], dtype=torch.float64)


def three(weight: float = 0.5) -> Scores:
    scores = make_scores()
    return replace(
        scores, rewards=scores.rewards | {"sharpness": EXTRA}, weights=scores.weights | {"sharpness": weight}
    )


def test_a_third_reward_adds_its_z() -> None:
    """Undefined in a trajectory, it contributes nothing there."""
    z = torch.zeros(4, dtype=torch.float64)
    z[:3] = z_by_hand(torch.tensor([0.7 / 3, 1.6 / 2, 0.3], dtype=torch.float64))
    both = z_by_hand(IF.mean(1)), z_by_hand(CC.mean(1))
    is_close(advantages(three(), GROUP, paper())[:, 0], both[0] + 0.3 * both[1] + 0.5 * z, ROUNDING)
    assert torch.equal(advantages(three(0.0), GROUP, paper()), advantages(make_scores(), GROUP, paper()))


def test_a_third_reward_before_z_and_per_turn() -> None:
    """Where rewards are added, the group's mean stands in; per turn each turn has a z of its own."""
    kept = torch.tensor([0.7 / 3, 1.6 / 2, 0.3], dtype=torch.float64)
    filled = torch.cat([kept, kept.mean()[None]])
    expected = z_by_hand(IF.mean(1) + 0.3 * CC.mean(1) + 0.5 * filled)
    is_close(advantages(three(), GROUP, paper(fusion="reward"))[:, 0], expected, ROUNDING)
    per_turn = advantages(three(), GROUP, paper(credit="per_turn")) - z_by_hand(IF) - 0.3 * z_by_hand(CC)
    is_close(per_turn[:3, 0], 0.5 * z_by_hand(EXTRA[:3, 0]), ROUNDING)
    is_close(per_turn[[0, 2], 1], 0.5 * z_by_hand(EXTRA[[0, 2], 1]), ROUNDING)
    assert per_turn[1, 1].abs() < ROUNDING and per_turn[3].abs().max() < ROUNDING


def test_only_the_first_reward_is_aggregated_by_choice() -> None:
    scores = make_scores()
    swapped = replace(scores, rewards=dict(reversed(scores.rewards.items())))
    config = paper(turn_aggregation="min")
    expected = z_by_hand(IF.amin(1)) + 0.3 * z_by_hand(CC.mean(1))
    is_close(advantages(scores, GROUP, config)[:, 0], expected, ROUNDING)
    is_close(advantages(swapped, GROUP, config)[:, 0], 0.3 * z_by_hand(CC.amin(1)) + z_by_hand(IF.mean(1)), ROUNDING)


def test_mean_reward_is_what_is_maximised() -> None:
    """R_IF by its aggregation, the others' means, weighted as in the advantage; over the valid, where defined."""
    valid = torch.tensor([True, True, True, False])
    scores = replace(three(), valid=valid)
    extra = torch.tensor([0.7 / 3, 1.6 / 2, 0.3], dtype=torch.float64).mean()
    expected = IF[:3].amin(1).mean() + 0.3 * CC[:3].mean() + 0.5 * extra
    is_close(mean_reward(scores, paper(turn_aggregation="min")), expected, 1e-15)
    nowhere = make_scores(consistency=torch.full_like(CC, NAN))
    is_close(mean_reward(nowhere, paper()), IF.mean(), 1e-15)
