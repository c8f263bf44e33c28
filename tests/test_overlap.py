"""Waves of a rollout, scored while the next is made: the same bits whatever is hidden, and nothing left running."""

import random
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
import torch
from rich.console import Console
from rollouts import rollout_of
from update_parts import change

from mteditflow.advantage import advantages
from mteditflow.config import AdvantageConfig, Config, RewardConfig
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks
from mteditflow.guards import GuardError
from mteditflow.objective import build_objective
from mteditflow.policy import Policy, build_policy
from mteditflow.profile.command import build_case
from mteditflow.profile.overlap import compare, hidden_share, table
from mteditflow.reward import Judged, Rewards, cut_scores, is_trained_by_group
from mteditflow.reward.overlap import Busy, Overlap, efficiency, join
from mteditflow.rollout import cut_waves, sample_rollout, sample_waves
from mteditflow.types import EditTask, Rollout, Score, Scores

CPU = torch.device("cpu")
ONE_RANK = Ranks(rank=0, world_size=1, device=CPU)


class Judge:
    """Scores by a trajectory's place in its group, after a random while; `is_remote` as told."""

    def __init__(self, is_remote: bool, most_s: float = 0.0, fails_at: int = -1) -> None:
        self.is_remote, self.most_s, self.fails_at = is_remote, most_s, fails_at
        self.threads: list[int] = []
        self.num_now = self.most_now = 0

    def __call__(self, rollout: Rollout) -> Score:
        self.num_now += 1
        self.most_now = max(self.most_now, self.num_now)
        self.threads.append(threading.get_ident())
        assert not torch.is_grad_enabled() or threading.current_thread() is threading.main_thread()
        time.sleep(random.SystemRandom().uniform(0, self.most_s))
        self.num_now -= 1
        if self.fails_at in rollout.member.tolist():
            raise ValueError("the judge fell over")
        return Score(values=(rollout.member * 7 % 5 / 4)[:, None].expand(-1, len(rollout.turns)).clone())


def rewards_of(judge: Any) -> Rewards:
    return Rewards(rewards={"instruction": judge}, weights={"instruction": 1.0})


def wave_of(num_rows: int, first: int = 0) -> Rollout:
    task = EditTask(id=0, source=torch.zeros(3, 4, 4), instructions=("a", "b"), edit_types=("", ""))
    made = rollout_of([task], torch.zeros(2, num_rows, 3, 4, 4))
    return replace(made, member=torch.arange(first, first + num_rows))


@pytest.mark.parametrize(
    ("wave_size", "microbatch", "expected"),
    [(0, 2, [4, 4, 4]), (0, 3, [6, 6]), (0, 32, [12]), (1, 2, [2] * 6), (3, 2, [4, 4, 4]), (5, 5, [5, 5, 2]),
     (100, 1, [12])],
)  # fmt: skip
def test_waves_are_whole_microbatches(wave_size: int, microbatch: int, expected: list[int]) -> None:
    config = replace(Config().rollout, group_size=4, wave_size=wave_size, microbatch_size=microbatch)
    waves = cut_waves(range(1, 13), config)
    assert [len(wave) for wave in waves] == expected and torch.equal(torch.cat(waves), torch.arange(1, 13))


@pytest.fixture(scope="module")
def policy(tiny_config: Config) -> Policy:
    return build_policy(tiny_config.model, tiny_config.lora, seed=0, has_old=False)


@pytest.mark.parametrize(
    ("hand_off", "num_tasks", "num_ranks"), [("pixels", 2, 1), ("latents", 4, 2), ("pixels", 4, 3)]
)
def test_a_row_is_the_same_in_every_wave(
    policy: Policy, tiny_config: Config, hand_off: Any, num_tasks: int, num_ranks: int
) -> None:
    values = {"num_tasks": num_tasks, "group_size": 3, "microbatch_size": 2, "hand_off": hand_off}
    config = change(tiny_config, "rollout", **values)
    ranks = Ranks(rank=num_ranks - 1, world_size=num_ranks, device=CPU)  # of three ranks the last begins within a group
    tasks, every = training_tasks(config, 0, ranks), training_tasks(config, 0, ONE_RANK)
    whole, rows = sample_rollout(policy, build_objective(config), every, config, 0), ranks.share(3 * num_tasks)
    mine = slice(rows.start, rows.stop)
    for wave_size in (0, 1, 4):
        cut = change(config, "rollout", wave_size=wave_size)
        waves = list(sample_waves(policy, build_objective(config), tasks, cut, 0, ranks))
        (made,) = join(waves).parts
        assert len(waves) > 1 or (wave_size != 1 and num_ranks == 3)
        assert torch.equal(made.group + tasks[0].id, whole.group[mine]) and torch.equal(made.member, whole.member[mine])
        for turn, expected in zip(made.turns, whole.turns, strict=True):
            assert torch.equal(turn.latents, expected.latents[:, mine]) and torch.equal(
                turn.image, expected.image[mine]
            )
            assert torch.equal(turn.old_log_prob.nan_to_num(), expected.old_log_prob[:, mine].nan_to_num())
            assert torch.equal(turn.condition.image, expected.condition.image[mine])
            for name, value in expected.condition.text.items():
                assert torch.equal(turn.condition.text[name], value[mine])


def test_the_autoencoder_takes_no_more_than_a_microbatch(
    policy: Policy, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small pictures go through it sixteen at a time, of which a wave of two would fill fourteen with nothing."""
    sizes, decode = set[int](), policy.editor.decode
    monkeypatch.setattr(policy.editor, "decode", lambda rows: sizes.add(len(rows)) or decode(rows))
    config = change(tiny_config, "rollout", microbatch_size=2, wave_size=2)
    next(sample_waves(policy, build_objective(config), training_tasks(config, 0, ONE_RANK), config, 0, ONE_RANK))
    assert sizes == {2}


@pytest.mark.parametrize("is_remote", [False, True])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_scores_come_in_the_order_of_the_waves(overlap: Any, is_remote: bool) -> None:
    judge, waves = Judge(is_remote, most_s=0.03), [wave_of(2, first) for first in range(0, 12, 2)]
    with Overlap(rewards_of(judge), RewardConfig(overlap=overlap), CPU) as beside:
        (gathered,) = beside.gather(waves).parts
        assert torch.equal(gathered.member, torch.arange(12))
        scores = list(beside.scores())
        again = beside.start(waves[1])()
    found = torch.cat([score.instruction[:, 0] for score in [*scores, again]])
    assert torch.equal(found, torch.tensor([*range(12), 2, 3]) * 7 % 5 / 4)
    is_here = [thread == threading.get_ident() for thread in judge.threads]
    assert all(is_here) if overlap == "off" else not any(is_here)
    if overlap == "on" and not is_remote:
        assert len(set(judge.threads)) == 1 and judge.most_now == 1


def test_a_server_is_asked_about_several_waves_at_once() -> None:
    gate = threading.Barrier(3, timeout=20)  # opens when three waves are there at once

    class Gated(Judge):
        def __call__(self, rollout: Rollout) -> Score:
            gate.wait()
            return super().__call__(rollout)

    with Overlap(rewards_of(Gated(is_remote=True)), RewardConfig(overlap="on"), CPU) as beside:
        for first in (0, 2, 4):
            beside.submit(wave_of(2, first))
        assert len(list(beside.scores())) == 3


@pytest.mark.parametrize("is_remote", [False, True])
def test_the_judge_is_at_work_beside_rollout_and_training(is_remote: bool) -> None:
    """A judge that ends with a wave only when the next is made, and with the last wave only when the first group is
    being trained on: in turn, both would wait for ever. Of 8 trajectories in waves of 2, the fourth wave is the last.
    """
    begun, may_end = threading.Semaphore(0), threading.Semaphore(0)

    class Gated(Judge):
        def __call__(self, rollout: Rollout) -> Score:
            begun.release()
            assert may_end.acquire(timeout=20)
            return super().__call__(rollout)

    def waves() -> Iterator[Rollout]:
        for first in (0, 2, 4, 6):
            yield wave_of(2, first)
            assert begun.acquire(timeout=20)  # this wave is being scored
            if first < 6:
                may_end.release()

    config = change(change(Config(), "rollout", num_tasks=2, group_size=4), "advantage", std="group")
    with Overlap(rewards_of(Gated(is_remote)), RewardConfig(overlap="on"), CPU) as beside:
        beside.gather(waves())
        groups = iter(Judged(beside.scores(), config, ONE_RANK))
        first = next(groups)
        may_end.release()
        assert [len(part) for part in (first, *groups)] == [4, 4]


@pytest.mark.parametrize("is_remote", [False, True])
@pytest.mark.parametrize("overlap", ["off", "on"])
def test_a_judge_that_falls_over_is_heard_within_the_wave(overlap: Any, is_remote: bool) -> None:
    """The wave after is not begun, and no thread is left."""
    num_made, before = 0, threading.active_count()

    def waves() -> Iterator[Rollout]:
        nonlocal num_made
        for first in range(0, 12, 2):
            num_made += 1
            yield wave_of(2, first)
            time.sleep(0.3)  # its rollout: long enough to hear of the wave before

    judge = Judge(is_remote, fails_at=2)  # in the second wave
    with (
        pytest.raises(ValueError, match="the judge fell over"),
        Overlap(rewards_of(judge), RewardConfig(overlap=overlap), CPU) as beside,
    ):
        beside.gather(waves())
    assert num_made <= 3 and threading.active_count() == before


def test_what_is_asked_over_http_is_ended_after_a_fault() -> None:
    closed = threading.Event()

    class Slow(Judge):
        def __call__(self, rollout: Rollout) -> Score:
            assert closed.wait(20)
            raise ValueError("cut off")

        def close(self) -> None:
            closed.set()

    with (
        pytest.raises(RuntimeError, match="elsewhere"),
        Overlap(rewards_of(Slow(is_remote=True)), RewardConfig(overlap="on"), CPU) as beside,
    ):
        beside.submit(wave_of(2))
        raise RuntimeError("elsewhere")
    assert closed.is_set()


def random_scores(num_rows: int) -> Scores:
    values = torch.rand(num_rows, 2, generator=torch.Generator().manual_seed(0))
    valid = torch.arange(num_rows) % 7 != 3
    kept = values.flip(0).masked_fill(values > 0.9, torch.nan)
    rewards = {"instruction": values.masked_fill(~valid[:, None], torch.nan), "consistency": kept}
    return Scores(rewards=rewards, weights={"instruction": 1.0, "consistency": 0.3}, valid=valid)


def cut(scores: Scores, sizes: list[int]) -> Iterator[Scores]:
    start = 0
    for size in sizes:
        yield cut_scores(scores, slice(start, start + size))
        start += size


@pytest.mark.parametrize("sizes", [[12], [4, 4, 4], [2] * 6, [5, 5, 2]])
@pytest.mark.parametrize("std", ["group", "global"])
def test_advantages_by_group_are_those_of_all(std: Any, sizes: list[int]) -> None:
    config, scores, group = Config(advantage=AdvantageConfig(std=std)), random_scores(12), torch.arange(12) // 4
    config = change(config, "rollout", num_tasks=3, group_size=4)
    judged = Judged(cut(scores, sizes), config, ONE_RANK)
    parts = list(judged)
    expected = advantages(scores, group, config.advantage)
    assert [len(part) for part in parts] == ([4, 4, 4] if std == "group" else [12])
    assert torch.equal(torch.cat(parts), expected)
    assert torch.equal(judged.advantages, expected) and torch.equal(judged.group, group)
    assert torch.equal(judged.scores.instruction.nan_to_num(), scores.instruction.nan_to_num())


def test_a_group_is_trained_on_before_the_last_is_scored() -> None:
    """Unless every score is needed for one deviation."""
    taken = 0

    def waves() -> Iterator[Scores]:
        nonlocal taken
        for part in cut(random_scores(12), [4, 4, 4]):
            taken += 1
            yield part

    for std, expected in (("group", 1), ("global", 3)):
        taken = 0
        config = change(Config(), "rollout", num_tasks=3, group_size=4)
        next(iter(Judged(waves(), change(config, "advantage", std=std), ONE_RANK)))
        assert taken == expected


@pytest.mark.parametrize(
    ("num_ranks", "std", "shard", "expected"),
    [(1, "group", "none", True), (3, "group", "none", True), (2, "group", "none", False), (3, "global", "none", False),
     (3, "group", "full", False)],
)  # fmt: skip
def test_when_a_group_is_trained_on_as_soon_as_it_is_scored(
    num_ranks: int, std: str, shard: str, expected: bool
) -> None:
    """Three groups: of two ranks each has one and a half."""
    config = change(change(Config(), "rollout", num_tasks=3, group_size=4), "advantage", std=std)
    config = change(config, "distributed", shard=shard)
    assert is_trained_by_group(config, Ranks(rank=0, world_size=num_ranks, device=CPU)) is expected


def test_too_few_scores_stop_before_the_last_group_is_used_up() -> None:
    scores, config = random_scores(12), change(Config(), "rollout", num_tasks=3, group_size=4)
    config = change(config, "advantage", std="group")
    scores = replace(scores, valid=scores.valid & (torch.arange(12) < 5))
    judged = Judged(cut(scores, [4, 4, 4]), config, ONE_RANK)
    with pytest.raises(GuardError, match="67% of the trajectories could not be scored"):
        list(judged)


def test_busy_counts_a_second_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 5.0, 20.0, 21.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    busy = Busy()
    with busy, busy:
        pass
    with busy:
        pass
    assert busy.read() == 6.0 and busy.read() == 0.0


@pytest.mark.parametrize(
    ("exposed", "judge", "step", "expected"),
    [(10.0, 10.0, 30.0, 0.0), (1.0, 10.0, 21.0, 0.9), (30.0, 40.0, 40.0, 1.0), (5.0, 10.0, 9.0, 1.25)],
)
def test_efficiency(exposed: float, judge: float, step: float, expected: float) -> None:
    """(T_a + T_b - T_ab) / min(T_a, T_b) with T_a = step - exposed, T_b = judge, T_ab = step."""
    assert efficiency({"reward/exposed_s": exposed, "reward/judge_s": judge}, step) == pytest.approx(expected)


def test_green_is_refused_where_there_is_none() -> None:
    with pytest.raises(ValueError, match=r"reward.overlap is 'green': cpu has no green contexts .*; take 'on'"):
        Overlap(rewards_of(Judge(is_remote=False)), RewardConfig(overlap="green"), CPU)


def test_the_profile_measures_both_and_says_which_to_keep(tiny_config: Config) -> None:
    """The shares by hand; a small run of its own, whose times say nothing."""
    off, on = ({"total_s": total, "judge_s": 4.0, "exposed_s": 0.0} for total in (10.0, 7.0))
    assert hidden_share(off, on) == 0.75 and hidden_share(on, off) == -1.0  # 3 of 4 s, and 3 of 3 lost
    config = change(tiny_config, "rollout", microbatch_size=2)
    case = build_case(change(config, "optimizer", microbatch_size=2))
    figures = compare(case, lambda: rewards_of(Judge(is_remote=False)), num_rounds=1)
    assert list(figures["medians"]) == ["off", "on"] == list(figures["times_off"]) and figures["advice"] in (
        "off",
        "on",
    )
    console = Console(file=StringIO(), width=120)
    console.print(table(figures | {"advice": "off"}, "on"))
    shown = console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "take reward.overlap: off" in shown and "waited for it s" in shown
