"""Pictures of several sizes in one iteration: each size computes what a run of that size alone would."""

import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed_sizes import SQUARE, TALL, WIDE, evaluated, of_sizes, redness
from PIL import Image
from rollouts import GivenRewards
from thread_ranks import on_ranks
from torch import Tensor
from update_parts import ADVANTAGE, ONE_RANK, as_nft, assert_near, build, change, in_chunks, step

from mteditflow.config import Config, DataConfig, ModelConfig, RewardConfig, RolloutConfig, cli
from mteditflow.config.cli import from_yaml
from mteditflow.config.command import train
from mteditflow.data import size_shares, training_tasks
from mteditflow.data.images import nearest_size
from mteditflow.distributed import Ranks, alone, check_world
from mteditflow.flow import sigma_schedule
from mteditflow.objective import build_objective
from mteditflow.plan.compiling import num_graphs
from mteditflow.plan.dry_run import dry_run
from mteditflow.plan.estimate import estimate
from mteditflow.plan.gpus import GPUS, Target
from mteditflow.plan.memory import memory_plan, read_sizes
from mteditflow.policy import Policy
from mteditflow.profile.account import row_flops
from mteditflow.record.alarms import rollout_figures
from mteditflow.record.metrics import read_lines
from mteditflow.report.seen import choose_of_all
from mteditflow.report.strips import draw_sessions
from mteditflow.reward.overlap import join
from mteditflow.reward.user_function import NUM_TRIED, build_also
from mteditflow.rollout import sample_rollout, sample_waves
from mteditflow.types import EditTask, Rollout, Rollouts, Scores
from mteditflow.update import Microbatches

CONFIGS = Path(__file__).parent.parent / "configs"


def at(config: Config, size: tuple[int, int]) -> Config:
    return change(config, "model", height=size[0], width=size[1])


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    """GRPO, 4 tasks of 2 trajectories in microbatches of 2, every step noisy."""
    return change(in_chunks(tiny_config, 2), "rollout", num_tasks=4)


@pytest.fixture(scope="module")
def policy(config: Config) -> Policy:
    return build(config)


def made(policy: Policy, config: Config, tasks: list[EditTask], ranks: Ranks = ONE_RANK) -> Rollout | Rollouts:
    return join(sample_waves(policy, build_objective(config), tasks, config, 0, ranks))


def assert_equal(one: Rollout, other: Rollout) -> None:
    """The same bits at every turn."""
    for a, b in zip(one.turns, other.turns, strict=True):
        assert torch.equal(a.latents, b.latents) and torch.equal(a.image, b.image)
        assert torch.equal(a.old_log_prob.nan_to_num(), b.old_log_prob.nan_to_num())
    assert torch.equal(one.schedule.sigmas, other.schedule.sigmas)


@pytest.mark.parametrize("objective", ["grpo", "nft"])
def test_a_size_is_rolled_out_as_if_it_were_the_only_one(config: Config, objective: str) -> None:
    """Noise, schedule, text, pictures and log-probs, by a policy that was built for that size; K turns keep it."""
    config = change(config, "objective", name=objective)
    tasks = of_sizes(training_tasks(config, 0, ONE_RANK), [SQUARE, WIDE, WIDE, TALL])
    policy = build(config)
    mixed = made(policy, config, tasks)
    assert [part.shape for part in mixed.parts] == [(SQUARE,), (WIDE,), (TALL,)]
    assert [part.group.tolist() for part in mixed.parts] == [[0, 0], [0, 0, 1, 1], [0, 0]]
    for part, places in zip(mixed.parts, ([0], [1, 2], [3]), strict=True):
        (height, width), *_ = part.shape
        sized = at(config, (height, width))
        alone_tasks = [tasks[n] for n in places]
        single = sample_rollout(build(sized), build_objective(sized), alone_tasks, sized, 0)
        assert_equal(part, single)
        assert [tuple(turn.image.shape[2:]) for turn in part.turns] == [(height, width)] * 2
        num_tokens = height * width // 256
        assert torch.equal(part.schedule.sigmas, sigma_schedule(3, num_tokens).float())
        assert part.turns[0].latents.shape[2] == num_tokens
    assert not torch.equal(mixed.parts[0].schedule.sigmas, mixed.parts[1].schedule.sigmas)  # 16 tokens and 15


def test_one_size_is_one_rollout(policy: Policy, config: Config) -> None:
    """Without buckets nothing is cut, and the policy is the one that was built."""
    tasks = training_tasks(config, 0, ONE_RANK)
    rollout = made(policy, config, tasks)
    assert isinstance(rollout, Rollout) and rollout.parts == (rollout,)
    assert policy.at(tasks[0].shape) is policy and policy.at((WIDE,)).at(tasks[0].shape) is policy
    assert policy.at((WIDE,)) is policy.at((WIDE,)) and policy.at((WIDE,)).adapters is policy.adapters


def test_a_size_that_no_token_divides(policy: Policy) -> None:
    with pytest.raises(ValueError, match=r"model.width is 56: must .* be a multiple of 16"):
        policy.at(((64, 56),))


def as_rows(microbatches: Microbatches, advantages: Tensor) -> list[tuple[int, int, list[int]]]:
    return [(m.part, m.turn, m.rows.tolist()) for _, m in microbatches([advantages])]


def test_a_microbatch_has_one_size(policy: Policy, config: Config) -> None:
    """Rows are filled up within their part, and every wanted transition is there once."""
    config = change(config, "data", num_turns=1)
    tasks = of_sizes(training_tasks(config, 0, ONE_RANK), [SQUARE, WIDE, WIDE, TALL])
    rollout = made(policy, config, tasks)
    advantages = torch.tensor([1.0, 0, 1, 0, 1, 1, 0, 0])[:, None]
    found = as_rows(Microbatches(rollout, build_objective(config), config, ONE_RANK), advantages)
    assert found[::2] == [(1, 0, [0, 2]), (0, 0, [0, 0]), (1, 0, [3, 3])] and found[::2] == found[1::2]  # two draws


@pytest.mark.parametrize("objective", ["grpo", "nft"])
def test_an_update_is_that_of_all_sizes_together(config: Config, objective: str) -> None:
    """The gradient is the mean over all transitions of all sizes, and GRPO's first ratio is 1 to the bit."""
    config = change(config, "objective", name=objective)
    tasks = of_sizes(training_tasks(config, 0, ONE_RANK)[:2], [WIDE, TALL])
    config = change(config, "rollout", num_tasks=2)
    gradients = []
    for chosen in (tasks, tasks[:1], tasks[1:]):
        policy, sized = build(config), change(config, "rollout", num_tasks=len(chosen))
        first = 0 if chosen is not tasks[1:] else 2
        advantage = ADVANTAGE if len(chosen) == 2 else ADVANTAGE[:2] if chosen[0] is tasks[0] else ADVANTAGE[2:]
        figures, (gradient,) = step(policy, made(policy, sized, chosen), advantage, sized)  # pyright: ignore[reportArgumentType]
        gradients.append(gradient)
        if objective == "grpo":
            assert figures["update/first_ratio_error"] == 0
        assert figures["update/num_transitions"] == 2 * len(chosen) * 2 * build_objective(sized).num_draws, first
    both, wide, tall = gradients
    # sums of 2 to 8 microbatches' gradients in another order, each of some 1e3 terms
    assert_near(both, (wide + tall) / 2, 100)
    assert not torch.equal(wide, tall)


def test_two_ranks_make_the_rows_of_one(config: Config) -> None:
    """Also where a group lies across ranks; with a base that is cut, every rank makes as many forward passes."""
    config = change(change(config, "rollout", num_tasks=3, group_size=4), "data", num_turns=1)
    tasks = of_sizes(training_tasks(config, 0, ONE_RANK), [WIDE, TALL, SQUARE])
    policy = build(config)
    whole = made(policy, config, tasks)
    rows = [(part.shape, turn.latents[:, n]) for part in whole.parts for turn in part.turns for n in range(4)]
    found, num_waves = list[tuple[Any, Tensor]](), list[int]()
    for rank in range(2):
        ranks = Ranks(rank=rank, world_size=2, device=torch.device("cpu"))
        mine = of_sizes(training_tasks(config, 0, ranks), [[WIDE, TALL], [TALL, SQUARE]][rank])
        waves = list(sample_waves(policy, build_objective(config), mine, config, 0, ranks))
        num_waves.append(sum(-(-len(wave.group) // 2) for wave in waves))
        found += [(w.shape, turn.latents[:, n]) for w in waves for turn in w.turns for n in range(len(w.group))]
    assert num_waves == [3, 3]
    assert [shape for shape, _ in found] == [shape for shape, _ in rows]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(found, rows, strict=True))


def test_an_evaluation_by_size(config: Config) -> None:
    """Each session as among those of its size alone, back in the order of the tasks, on any number of ranks; a picture
    that is smaller than others stands in a corner, and is drawn by its own size.
    """
    sessions = {"num_sessions": 7, "num_sessions_short": 6, "num_strips": 4, "num_steps": 2}
    config = change(config, "evaluation", **sessions)
    tasks = training_tasks(change(config, "rollout", num_tasks=7), 0, ONE_RANK)
    sizes = [TALL, SQUARE, TALL, WIDE, SQUARE, TALL, WIDE]
    tasks, policies = of_sizes(tasks, sizes), [build(config) for _ in range(2)]
    seen: list[Any] = []
    whole = evaluated(policies[0], config, tasks, alone(), seen.extend)
    assert whole.images.shape == (2, 4, 3, 80, 80) and len(whole.verdict) == 7
    for size in (SQUARE, WIDE, TALL):
        places = [n for n, other in enumerate(sizes) if other == size]
        few = change(config, "evaluation", num_sessions=len(places), num_sessions_short=2, num_strips=2)
        single = evaluated(build(at(few, size)), at(few, size), [tasks[n] for n in places], alone())
        assert torch.equal(whole.consistency[places], single.consistency)
        for number, n in enumerate([n for n in places if n < 4][:2]):
            height, width = size
            assert torch.equal(whole.images[:, n, :, :height, :width], single.images[:, number])
            assert (whole.images[:, n, :, height:] == 1).all() and (whole.images[:, n, :, :, width:] == 1).all()
    assert {session.words for session in seen} <= {f"of {n}" for n in range(7)} and seen
    for ranks_found in on_ranks(2, lambda ranks: evaluated(policies[ranks.rank], config, tasks, ranks)):
        assert torch.equal(ranks_found.consistency, whole.consistency)
        assert torch.equal(ranks_found.images, whole.images)
    strip = draw_sessions(tasks, {"base": whole}, range(4))
    # a column is as wide as the widest tile, 80 pixels drawn twice as large, and a row as high as the highest
    assert strip.width == 10 + 3 * (2 * 80 + 10) and strip.height > 4 * 2 * 80


def test_figures_and_what_is_seen(policy: Policy, config: Config) -> None:
    """Over all parts: means over trajectories, and the pictures of the right one."""
    tasks = of_sizes(training_tasks(config, 0, ONE_RANK), [SQUARE, WIDE, WIDE, TALL])
    rollout = made(policy, config, tasks)
    scores = [redness(part) for part in rollout.parts]
    both = Scores(
        rewards={name: torch.cat([s.rewards[name] for s in scores]) for name in scores[0].rewards}, weights={},
        valid=torch.ones(8).bool(), words=tuple(word for s in scores for word in s.words),
    )  # fmt: skip
    whole = rollout_figures(rollout, both, ONE_RANK)
    parts = [rollout_figures(part, s, ONE_RANK) for part, s in zip(rollout.parts, scores, strict=True)]
    share = torch.tensor([part["alarm/no_edit_share"] for part in parts], dtype=torch.float64)
    assert whole["alarm/no_edit_share"] == pytest.approx((share @ torch.tensor([2.0, 4, 2]).double()).item() / 8)
    for session in choose_of_all(rollout, both, 8, ONE_RANK):
        number = session.task - tasks[0].id
        assert session.words == f"of {session.task}" and session.pictures[0].shape == tasks[number].source.shape
        red = [(picture[0].mean() / 2 + 0.5).item() for picture in session.pictures[1:]]
        assert session.rewards["instruction"] == pytest.approx(red, abs=1e-6)


def test_the_nearest_aspect() -> None:
    sizes = [(512, 512), (416, 624), (624, 416), (384, 688)]
    pictures = {(4000, 3000): 1, (3000, 3100): 0, (1080, 1920): 2, (1920, 1080): 3, (500, 400): 1, (10, 4000): 2}
    assert {size: sizes.index(nearest_size(size, sizes)) for size in pictures} == pictures


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """A JSONL of 8 pictures of 3:2, 3 of 2:3 and one that is square, an object on the left of each; beside it
    held.jsonl, of four others.
    """
    lines = []
    for number, size in enumerate([(150, 100)] * 8 + [(100, 150)] * 3 + [(90, 90)]):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / f"{number}.png")
        box = '{"name": "a", "box": [0.0, 0.25, 0.5, 0.75]}'
        lines.append(f'{{"image": "{number}.png", "instructions": ["make {number} red", "b"], "objects": [{box}]}}\n')
    path = tmp_path / "a.jsonl"
    path.write_text("".join(lines))
    for number, size in enumerate([(150, 100), (100, 150), (90, 90), (150, 100)]):
        Image.effect_noise(size, 40).convert("RGB").save(tmp_path / f"held{number}.png")
    held = [f'{{"image": "held{n}.png", "instructions": ["a", "b"]}}\n' for n in range(4)]
    (tmp_path / "held.jsonl").write_text("".join(held))
    return path


def of_photographs(path: Path, **values: Any) -> Config:
    held_out = str(path.parent / "held.jsonl")
    data = DataConfig(path=str(path), held_out=held_out, num_turns=2, buckets=("80x48", "48x80"))
    return Config(data=data, rollout=RolloutConfig(num_tasks=12, microbatch_size=16), **values)


def test_pictures_take_the_nearest_bucket(photographs: Path) -> None:
    config = of_photographs(photographs, optimizer=replace(Config().optimizer, microbatch_size=16))
    tasks = {task.instructions[0]: task for task in training_tasks(config, 0, ONE_RANK)}
    expected = [WIDE] * 8 + [TALL] * 3 + [SQUARE]
    assert [tasks[f"make {n} red"].shape for n in range(12)] == [(size,) for size in expected]
    # 3:2 at 5:3: a tenth of the height is cut, of 3:2 itself nothing of the width
    (region,) = tasks["make 0 red"].objects
    assert region.box == pytest.approx((0.0, (0.25 - 0.05) / 0.9, 0.5, (0.75 - 0.05) / 0.9))
    shares = size_shares(config)
    assert shares == {SQUARE: 1 / 12, WIDE: 8 / 12, TALL: 3 / 12}
    away = replace(config, data=replace(config.data, path="nowhere.jsonl"))
    assert size_shares(away) == {SQUARE: 1 / 3, WIDE: 1 / 3, TALL: 1 / 3}


def test_a_users_reward_is_tried_on_pictures_of_one_size(
    photographs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On those of the first's size, as a rollout has them."""
    code = "seen = []\ndef shade(sources, instructions, pictures):\n"
    code += "    seen.append(sources.shape)\n    return pictures.mean((2, 3, 4)).T\n"
    (tmp_path / "my_shade.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    reward = RewardConfig(judge="vlm", consistency="none", also="my_shade:shade")
    optimizer = replace(Config().optimizer, microbatch_size=16)
    advantage = replace(Config().advantage, consistency_weight=0)
    config = of_photographs(photographs, reward=reward, optimizer=optimizer, advantage=advantage)
    shapes = [task.source.shape for task in training_tasks(config, 0, ONE_RANK)[:NUM_TRIED]]
    num_alike = shapes.count(shapes[0])
    assert 1 < num_alike < NUM_TRIED
    assert [*build_also(config, torch.device("cpu"))] == ["shade"]
    assert sys.modules.pop("my_shade").seen == [(num, *shapes[0]) for num in (max(num_alike, 3), 1, max(num_alike, 3))]


def test_what_buckets_may_be() -> None:
    data = {"path": "a.jsonl", "num_turns": 1}
    for text in ("512", "512:512", "512x500", "0x64", "9000x64", "512 x 512", "\u0665x512"):
        with pytest.raises(ValueError, match=rf"data.buckets is {re.escape(repr(text))}: must be WIDTHxHEIGHT"):
            DataConfig(**data, buckets=(text,))
    with pytest.raises(ValueError, match=r"data.buckets is \('64x64',\): the embedded world's pictures have one size"):
        DataConfig(buckets=("64x64",))
    with pytest.raises(ValueError, match=r"rollout.microbatch_size is 32: with data.buckets .*group_size, 16"):
        Config(data=DataConfig(**data, buckets=("64x48",)))
    with pytest.raises(ValueError, match=r"optimizer.microbatch_size is 32: with data.buckets"):
        Config(data=DataConfig(**data, buckets=("64x48",)), rollout=RolloutConfig(microbatch_size=8))
    config = from_yaml(CONFIGS / "kontext_nft_24gb.yaml")
    config = change(change(config, "rollout", num_tasks=3), "distributed", shard="full")
    check_world(change(config, "rollout", microbatch_size=2), 8)
    with pytest.raises(ValueError, match=r"rollout.microbatch_size is 4: .* must divide its 6 trajectories"):
        check_world(config, 8)


def test_a_condition_of_its_own_size_follows() -> None:
    model = ModelConfig(height=512, width=512, condition_height=1024, condition_width=1024)
    assert model.at(512, 512) is model and model.at(416, 624).condition_size == (832, 1248)
    same = ModelConfig(height=512, width=512, condition_height=512, condition_width=512)
    assert same.at(416, 624).condition_size == (416, 624) == ModelConfig().at(416, 624).condition_size


def test_the_plan_is_of_the_largest_and_the_hours_of_the_mix(photographs: Path) -> None:
    config = change(from_yaml(CONFIGS / "kontext_nft_24gb.yaml"), "data", path=str(photographs))
    config = change(
        config,
        "data",
        held_out=str(photographs.parent / "held.jsonl"),
        num_turns=2,
        buckets=("768x512", "512x768", "384x384"),
    )
    sizes = read_sizes(config)
    singles = {size: config.at(*size) for size in config.sizes}
    plans = {size: sum(memory_plan(single, sizes).values()) for size, single in singles.items()}
    assert sum(memory_plan(config, sizes).values()) == max(plans.values()) == plans[512, 768] > plans[384, 384]
    # 8 of 3:2, 3 of 2:3, and the square one takes the first square
    shares = {(512, 512): 1 / 12, (512, 768): 8 / 12, (768, 512): 3 / 12, (384, 384): 0}
    target = Target(gpu=GPUS["h200"])
    found = {size: estimate(single, sizes, 0.0, target) for size, single in singles.items()}
    mixed = estimate(config, sizes, 0.0, target)
    assert mixed is not None
    for end in (0, 1):
        for name in ("forward", "forward_backward", "guided", "decode", "encode"):
            expected = sum(shares[size] * getattr(both[end], name) for size, both in found.items() if both)
            assert getattr(mixed[end], name) == pytest.approx(expected)
    table = dry_run(change(config, "run", gpu_gib=60.0)).table
    for row in ("512 x 512 .*8%", "768 x 512 .*67%", "512 x 768 .*25%", "384 x 384 .*0%"):
        assert re.search(row, table)
    away = dry_run(change(change(config, "run", gpu_gib=60.0), "data", path="nowhere.jsonl")).table
    assert "Sizes of pictures, alike: data.path is not on this machine" in away and "384 x 384  " in away
    assert num_graphs(config) == 4 * num_graphs(singles[512, 512])


def test_the_account_counts_the_mix(policy: Policy, config: Config, photographs: Path) -> None:
    mixed = replace(config, data=of_photographs(photographs, optimizer=config.optimizer).data)
    rows = {size: row_flops(at(config, size), build(at(config, size))).total for size in (SQUARE, WIDE, TALL)}
    expected = (rows[SQUARE] + 8 * rows[WIDE] + 3 * rows[TALL]) / 12
    assert row_flops(mixed, policy).total == pytest.approx(expected)
    assert as_nft(mixed).sizes == (SQUARE, WIDE, TALL)


def test_a_run_on_pictures_of_several_sizes(
    photographs: Path, tmp_path: Path, tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the files to strips, report and a LoRA whose card says the sizes; GRPO's first ratio is 1."""
    monkeypatch.setattr("mteditflow.run.build_reward", lambda config: GivenRewards(redness))
    monkeypatch.setattr("mteditflow.evaluate.compare_editors.check_judge", lambda config: None)
    values = {
        "model.path": tiny_pipeline_folder, "model.max_text_tokens": 8, "lora.rank": 2, "data.path": photographs,
        "data.buckets": "[80x48, 48x80]", "data.num_turns": 2, "rollout.num_tasks": 4,
        "data.held_out": photographs.parent / "held.jsonl",
        "rollout.group_size": 2, "rollout.num_steps": 3, "rollout.window_size": 1, "rollout.microbatch_size": 2,
        "optimizer.microbatch_size": 2, "objective.name": "grpo", "run.num_iterations": 2, "evaluation.every": 1,
        "evaluation.num_sessions": 4, "evaluation.num_sessions_short": 3, "evaluation.num_strips": 3,
        "evaluation.num_steps": 2, "run.folder": tmp_path / "run",
    }  # fmt: skip
    train(cli.as_arguments({key: str(value) for key, value in values.items()}))
    lines = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert [line["update/first_ratio_error"] for line in lines] == [0, 0]
    assert all(line["update/grad_norm"] > 0 for line in lines) and "heldout/O_2" in lines[0]
    assert (tmp_path / "run" / "report.html").exists()
    card = (tmp_path / "run" / "lora" / "README.md").read_text()
    assert "It was trained on pictures of 80 x 48 and 48 x 80, too" in card
    config = from_yaml(tmp_path / "run" / "config.yaml")
    assert {task.shape for n in range(2) for task in training_tasks(config, n, ONE_RANK)} >= {(WIDE,), (TALL,)}
