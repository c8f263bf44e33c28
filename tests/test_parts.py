"""An evaluation in parts: the same bits on any number of ranks, and after a kill only what is missing is evaluated."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rollouts import GivenRewards
from thread_ranks import on_ranks
from torch import Tensor
from update_parts import build, change, in_chunks

from mteditflow.config import Config
from mteditflow.config.cli import to_yaml
from mteditflow.config.command import evaluate as main
from mteditflow.config.reward import RewardConfig
from mteditflow.data import held_out_tasks
from mteditflow.distributed import Ranks, alone
from mteditflow.evaluate import kept
from mteditflow.evaluate.compare_editors import compare_sessions
from mteditflow.evaluate.edival import Evaluation
from mteditflow.evaluate.held_out import evaluate, load_verdicts, part_folder
from mteditflow.evaluate.parts import PartFolder, make_rounds, part_size
from mteditflow.policy import Policy
from mteditflow.report.seen import Seen, read_compared
from mteditflow.reward.overlap import Overlap
from mteditflow.rollout import Sampler
from mteditflow.types import Condition, Rollout, Scores
from mteditflow.watch import progress

NUM_SESSIONS, MICROBATCH = 10, 4  # parts of 4, 4 and 2
PATIENCE = 300  # seconds for other processes on a busy machine


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    sessions = {"num_sessions": NUM_SESSIONS, "num_sessions_short": 6, "num_strips": 5, "num_steps": 2}
    return change(in_chunks(tiny_config, MICROBATCH), "evaluation", **sessions)


@pytest.fixture(scope="module")
def policies(config: Config) -> list[Policy]:
    """For a rank each: which adapter is selected is a fact of a process."""
    return [build(config) for _ in range(3)]


def judge(rollout: Rollout) -> Scores:
    """A judge and another reward that differ; session 3 gets no scores."""
    means = rollout.pictures.flatten(2).mean(2).T  # (N, K)
    ids = torch.tensor([rollout.tasks[g].id for g in rollout.group.tolist()])
    valid = ids != 3
    scores = {"instruction": means.abs().masked_fill(~valid[:, None], torch.nan), "taste": means + ids[:, None] % 4}
    return Scores(rewards=scores, weights={}, valid=valid, words=("word",) * len(ids))


def evaluated(
    policies: list[Policy], config: Config, num_ranks: int, *, adapter: Any = "ema", more: Any = None, **how: Any
) -> list[tuple[Evaluation, list[Seen]]]:
    """The evaluation and what is to be shown, on each rank; judged by `more`, or else by the truth."""
    tasks = held_out_tasks(config)
    if more is not None:
        tasks = [replace(task, truth=None) for task in tasks]

    def work(ranks: Ranks) -> tuple[Evaluation, list[Seen]]:
        seen: list[Seen] = []
        with Overlap(GivenRewards(more), RewardConfig(), ranks.device) as beside:  # pyright: ignore[reportArgumentType]
            found = evaluate(policies[ranks.rank], tasks, config, adapter, ranks, beside, see=seen.extend, **how)
        return found, seen

    return on_ranks(num_ranks, work)


def bits(found: tuple[Evaluation, list[Seen]]) -> list[Any]:
    """All that there is to an evaluation, comparable."""
    evaluation, seen = found

    def flat(value: Any) -> Any:
        return (value.dtype, value.shape, value.contiguous().numpy().tobytes()) if isinstance(value, Tensor) else value

    sessions = [repr(vars(session) | {"pictures": [flat(p) for p in session.pictures]}) for session in seen]
    return [flat(value) for value in vars(evaluation).values()] + sessions


def test_parts_and_rounds() -> None:
    """Whole microbatches, a part for each of 64 ranks where there are so many, and never more than 32 sessions."""
    sizes = [part_size(*sessions) for sessions in ((10, 4), (64, 2), (572, 2), (256, 3), (10_000, 5), (10_000, 64))]
    assert sizes == [4, 2, 8, 3, 30, 64]
    missing = {0: 4, 2: 4, 3: 4, 7: 2}

    def dealt(is_in_step: bool) -> list[list[tuple[int | None, bool]]]:
        ranks = [Ranks(rank=rank, world_size=2, device=torch.device("cpu")) for rank in range(2)]
        both = zip(*(make_rounds(missing, r, is_in_step=is_in_step) for r in ranks), strict=True)
        return [[(one.mine, one.is_wanted) for one in rounds] for rounds in both]

    assert dealt(False) == [[(0, True), (2, True)], [(3, True), (7, True)]]
    assert dealt(True) == [[(0, True), (2, True)], [(3, True), (3, False)], [(7, True), (7, False)]]


@pytest.mark.parametrize("more", [None, judge])
def test_any_number_of_ranks_has_the_bits_of_one(
    policies: list[Policy], config: Config, more: Callable[[Rollout], Scores] | None
) -> None:
    """On every rank; 3 parts leave one of 2 ranks without one in the second round."""
    (one,) = evaluated(policies, config, 1, more=more)
    assert one[0].verdict.shape == (10, 2) and one[0].images.shape[:2] == (2, 5) and len(one[1]) > 2
    assert one[0].valid.tolist() == [n != 3 or more is None for n in range(10)]
    for num_ranks in (2, 3):
        assert [bits(found) for found in evaluated(policies, config, num_ranks, more=more)] == [bits(one)] * num_ranks


def test_in_step(policies: list[Policy], config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a forward pass is one of all ranks, all ranks make the same ones in the same order, those of meetings
    between them; what only keeps step is not judged.
    """
    judged: list[int] = []

    def count(rollout: Rollout) -> Scores:
        judged.append(len(rollout.group))
        return judge(rollout)

    def work(ranks: Ranks) -> tuple[Evaluation, list[Seen], list[int]]:
        policy, rows, seen = policies[ranks.rank], list[int](), list[Seen]()
        alone = policy.velocity

        def together(latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
            rows.append(len(latents))
            assert ranks.gather_objects(("forward", len(rows))) == [("forward", len(rows))] * ranks.world_size
            return alone(latents, sigma, condition)

        with (
            monkeypatch.context() as patch,
            Overlap(GivenRewards(count), RewardConfig(), ranks.device) as beside,  # pyright: ignore[reportArgumentType]
        ):
            patch.setattr(policy, "velocity", together)
            sharded = change(config, "distributed", shard="full")
            return evaluate(policy, tasks, sharded, "ema", ranks, beside, see=seen.extend), seen, rows

    tasks = [replace(task, truth=None) for task in held_out_tasks(config)]
    (one,) = evaluated(policies, config, 1, more=judge)
    found = on_ranks(2, work)
    assert [bits(rank[:2]) for rank in found] == [bits(one)] * 2
    assert [rank[2] for rank in found] == [[4, 4, 4, 4, 2, 2, 2, 2]] * 2  # two turns of two steps each
    assert sorted(judged) == [2, 4, 4]


class Killed(BaseException):
    """As a kill does, nothing is done about it."""


class Parts(list[int]):
    """The first session of every part that was rolled out; after `limit` of them comes a kill."""

    limit = -1


@pytest.fixture
def rolled(monkeypatch: pytest.MonkeyPatch) -> Parts:
    original, parts = Sampler.__call__, Parts()

    def counted(self: Sampler, rows: Tensor) -> Rollout:
        if len(parts) == parts.limit:
            raise Killed
        parts.append(self.tasks[int(rows[0])].id)
        return original(self, rows)

    monkeypatch.setattr(Sampler, "__call__", counted)
    return parts


@pytest.fixture
def parts_of(policies: list[Policy], config: Config, tmp_path: Path) -> Callable[..., PartFolder]:
    def make(what: str = "after 3 iterations", config: Config = config) -> PartFolder:
        return part_folder(tmp_path / "evaluating", policies[0], held_out_tasks(config), config, what)

    return make


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_after_a_kill_the_rest_is_evaluated(
    policies: list[Policy], config: Config, parts_of: Callable[..., PartFolder], rolled: Parts, num_ranks: int
) -> None:
    """Killed on one rank when the third part is rolled out, with which the first was there; gone on with on others."""
    config = in_chunks(config, 2)
    (one,) = evaluated(policies, config, 1, more=judge)
    assert rolled == [0, 2, 4, 6, 8]
    folder = parts_of(config=config)
    rolled.clear()
    rolled.limit = 3
    with pytest.raises(Killed):
        evaluated(policies, config, 1, more=judge, folder=folder)
    assert sorted(folder.load()) == [0, 1]
    rolled.clear()
    rolled.limit = -1
    shown: list[int] = []
    found = evaluated(policies, config, num_ranks, more=judge, folder=folder, show=shown.append)
    assert sorted(rolled) == [4, 6, 8] and [bits(rank) for rank in found] == [bits(one)] * num_ranks
    assert sorted(set(shown)) == ([4, 8, 10] if num_ranks == 2 else [4, 10])
    rolled.clear()
    assert bits(evaluated(policies, config, 1, more=judge, folder=folder)[0]) == bits(one) and not rolled
    folder.remove()
    assert not folder.path.exists()


def test_parts_of_something_else_are_not_taken(
    policies: list[Policy], config: Config, parts_of: Callable[..., PartFolder], rolled: Parts
) -> None:
    """Other weights, other settings, a file that was cut: these are evaluated again."""
    folder = parts_of()
    evaluated(policies, config, 1, folder=folder)
    assert rolled == [0, 4, 8]
    path = folder.path / "part-000001.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    rolled.clear()
    evaluated(policies, config, 1, folder=folder)
    assert rolled == [4] and path.read_bytes() == whole
    for other, seen in (
        (parts_of("after 4 iterations"), config),
        (parts_of("after 4 iterations", change(config, "evaluation", num_steps=1)), config),
        (parts_of("after 4 iterations", change(config, "run", num_judged=1)), config),
    ):
        rolled.clear()
        evaluated(policies, seen, 1, folder=other)
        assert rolled == [0, 4, 8]
    assert {path.name for path in folder.path.iterdir()} == {
        "about.json",
        *(f"part-{n:06d}.safetensors" for n in range(3)),
    }


def test_what_a_broken_judge_said_is_not_kept(
    policies: list[Policy], config: Config, parts_of: Callable[..., PartFolder], rolled: Parts
) -> None:
    """The same line on every rank, and all is evaluated again once it is mended."""

    def broken(rollout: Rollout) -> Scores:
        scores = judge(rollout)
        nothing = {name: torch.full_like(values, torch.nan) for name, values in scores.rewards.items()}
        return replace(scores, rewards=nothing, valid=torch.zeros_like(scores.valid))

    def work(ranks: Ranks) -> str:
        with (
            Overlap(GivenRewards(broken), RewardConfig(), ranks.device) as beside,  # pyright: ignore[reportArgumentType]
            pytest.raises(ValueError, match="10 of 10 held-out sessions could not be scored") as caught,
        ):
            evaluate(policies[ranks.rank], tasks, config, "ema", ranks, beside, folder=folder)
        return str(caught.value)

    folder, tasks = parts_of(), [replace(task, truth=None) for task in held_out_tasks(config)]
    first, second = on_ranks(2, work)
    assert first == second and not folder.path.exists()
    rolled.clear()
    (found,) = evaluated(policies, config, 1, more=judge, folder=folder)
    assert rolled == [0, 4, 8] and found[0].valid.sum() == 9


def test_what_is_only_shown_may_have_no_score(policies: list[Policy], config: Config, tmp_path: Path) -> None:
    """The one session that the run shows again gets no score from a judge that samples its answers."""

    def silent(rollout: Rollout) -> Scores:
        nothing = torch.full((len(rollout.group), len(rollout.turns)), torch.nan)
        return Scores(rewards={"instruction": nothing}, weights={}, valid=~nothing.isnan().any(1))

    config = change(config, "run", num_judged=1)
    (before, _), (after, _) = (evaluated(policies, config, 1, adapter=name, more=judge)[0] for name in ("off", "ema"))
    tasks = [replace(task, truth=None) for task in held_out_tasks(config)]
    with Overlap(GivenRewards(silent), RewardConfig(), torch.device("cpu")) as beside:  # pyright: ignore[reportArgumentType]
        compare_sessions(tmp_path, policies[0], tasks, before, after, config, alone(), beside)
    (session,) = read_compared(tmp_path)
    assert [turn["judge"]["text"] for turn in session["after"]["turns"]] == ["no score"] * config.num_held_out_turns
    assert session["before"]["picture"] and session["reason"] == "worst after training"


def test_the_main_rank_looks_for_a_kept_evaluation(
    policies: list[Policy], config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rolled: Parts
) -> None:
    """The others have what it found, or make it with it."""
    monkeypatch.setenv("MTEDITFLOW_CACHE", str(tmp_path))
    asked: list[int] = []
    original = kept.dependencies

    def dependencies(policy: Policy, *rest: Any) -> Any:
        asked.append(policies.index(policy))
        return original(policy, *rest)

    monkeypatch.setattr(kept, "dependencies", dependencies)
    tasks, lines = held_out_tasks(config), [list[str](), list[str]()]

    def work(ranks: Ranks) -> tuple[Evaluation, list[Seen]]:
        policy = policies[ranks.rank]

        def make() -> Evaluation:
            return evaluate(policy, tasks, config, "off", ranks)

        return kept.kept_evaluation(policy, tasks, config, ranks, make, lines[ranks.rank].append), []

    first, second = on_ranks(2, work), on_ranks(2, work)
    assert sorted(rolled) == [0, 4, 8] and asked == [0, 0]
    assert [bits(found) for found in first + second] == [bits(first[0])] * 4
    assert "taken from" in lines[0][-1]


def test_progress_is_a_line_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    """40 of 100 sessions are there; then two every 10 s, and a line every 30 s but for the last."""
    now, lines = [0.0], list[str]()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.show_sessions(100, None, lines.append) as show:
        for done in range(40, 102, 2):
            show(done)
            now[0] += 10
    assert len(lines) == 9 and lines[0] == "evaluated 46 of 100 held-out sessions, 4 min left"
    assert lines[-1] == "evaluated 94 of 100 held-out sessions, 30 s left"


def test_the_command_on_two_ranks(config: Config, tmp_path: Path, rolled: Parts) -> None:
    """By torchrun, sharded, after a kill on one rank: the files of one rank, one table, only the rest is rolled out."""
    settings, counts = tmp_path / "config.yaml", tmp_path / "counts"
    settings.write_text(to_yaml(in_chunks(config, 2)))
    script = tmp_path / "evaluate.py"
    script.write_text(
        "import os, sys, torch\n"
        "from pathlib import Path\n"
        "from mteditflow.config.command import evaluate\n"
        "from mteditflow.rollout import Sampler\n"
        "torch.set_num_threads(1)\n"
        "original = Sampler.__call__\n"
        "def counted(self, rows):\n"
        f"    with Path({str(counts)!r}).open('a') as file:\n"
        "        print(self.tasks[int(rows[0])].id, file=file)\n"
        "    return original(self, rows)\n"
        "Sampler.__call__ = counted\n"
        "evaluate(sys.argv[1:])\n"
    )
    words = ["base", "--config", str(settings), "--out"]
    main([*words, str(tmp_path / "one")])
    rolled.clear()
    rolled.limit = 3
    with pytest.raises(Killed):
        main([*words, str(tmp_path / "two")])
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    words = [*words, str(tmp_path / "two"), "--distributed.shard", "full"]
    done = subprocess.run([*launch, *words], capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out sessions, percent") == done.stdout.count("page: ") == 1
    assert sorted(counts.read_text().split()) == ["4", "6", "8", "8"]  # the second rank keeps step in the last round
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert files == sorted(path.relative_to(tmp_path / "two") for path in (tmp_path / "two").rglob("*.*"))
    assert len(files) == 5
    for file in files:
        if file.suffix == ".safetensors":  # whose metadata come in any order
            one, two = (bits((load_verdicts(tmp_path / name / file), [])) for name in ("one", "two"))
        else:
            one, two = ((tmp_path / name / file).read_bytes() for name in ("one", "two"))
        assert one == two, file
