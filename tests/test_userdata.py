"""Users' sessions as tasks: order over resumes and ranks, who is held out, damaged images, and whole runs."""

import json
import re
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from photos import PHOTOS, copy_photos, photo
from PIL import Image
from rollouts import GivenRewards, rollout_of

from mteditflow.config import Config, DataConfig, EvaluationConfig, ModelConfig, RolloutConfig, cli
from mteditflow.config.command import check, train
from mteditflow.data import all_instructions, check_data, cut_lines, held_out_tasks, training_tasks
from mteditflow.data.images import fit_picture, read_picture
from mteditflow.data.userdata import held_out_images, is_held_out_image
from mteditflow.distributed import Ranks
from mteditflow.plan.dry_run import dry_run
from mteditflow.policy import token_counter
from mteditflow.record.metrics import read_lines
from mteditflow.reward.exact import ExactInstruction
from mteditflow.types import EditTask, Rollout, Scores

SHARE = 0.6


def ranks(rank: int = 0, world_size: int = 1) -> Ranks:
    return Ranks(rank=rank, world_size=world_size, device=torch.device("cpu"))


def record(name: str, i: int, num_turns: int = 2) -> dict[str, Any]:
    return {"image": f"photos/{name}", "instructions": [f"session {i} of {name}", "b", "c", "d"][:num_turns]}


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Config]:
    """A config on a JSONL in a folder with the photographs."""
    copy_photos(tmp_path / "photos")

    def config(records: list[dict[str, Any]], name: str = "a.jsonl", num_tasks: int = 4, **data: Any) -> Config:
        path = tmp_path / name
        path.write_text("".join(f"{json.dumps(it)}\n" for it in records))
        return Config(
            data=DataConfig(**({"path": str(path), "num_turns": 2, "held_out_share": SHARE} | data)),
            rollout=RolloutConfig(num_tasks=num_tasks),
            evaluation=EvaluationConfig(num_sessions=2, num_sessions_short=1, num_strips=1),
        )

    return config


def first(tasks: list[EditTask]) -> list[str]:
    return [task.instructions[0] for task in tasks]


RECORDS = [record(name, i) for i in range(3) for name in PHOTOS]
HELD_OUT = {Path(name).name for name in held_out_images((f"photos/{name}" for name in PHOTOS), SHARE)}


def test_a_task_is_the_picture_and_its_instructions(make: Callable[..., Config]) -> None:
    box = [0.1, 0.0, 0.9, 1.0]
    name = sorted(set(PHOTOS) - HELD_OUT)[0]
    own = {**record(name, 0, 4), "untouched_objects": [["a", {"name": "b", "box": box}], [], [], []]}
    own["objects"] = [{"name": "b", "box": box}, "c"]
    config = make([own], num_tasks=1)
    (task,) = training_tasks(config, 5, ranks())
    seen = fit_picture(read_picture(photo(name)), height=64, width=64, fit="crop")
    assert torch.equal(task.source, seen.image) and task.id == 5 and task.truth is None
    assert task.instructions == (f"session 0 of {name}", "b") and task.edit_types == ("unspecified",) * 2
    assert [it.name for it in task.untouched[0]] == ["a", "b"] and task.untouched[1] == () and len(task.untouched) == 2
    assert [it.name for it in task.objects] == ["b", "c"] and task.objects[0] == task.untouched[0][1]
    region, (x0, _, x1, _) = task.untouched[0][1], seen.frame
    expected = (max(0, (0.1 - x0) / (x1 - x0)), 0, min(1, (0.9 - x0) / (x1 - x0)), 1)
    assert region.box is not None and region.box == pytest.approx(expected)
    large = replace(config, model=ModelConfig(height=96, width=160), data=replace(config.data, fit="stretch"))
    (task,) = training_tasks(large, 0, ranks())
    assert task.source.shape == (3, 96, 160) and task.untouched[0][1].box == tuple(box)


def test_order_is_of_seed_and_step_alone(make: Callable[..., Config]) -> None:
    """Every epoch visits each session once; ranks share a step; neither the file's order nor the process counts."""
    config = make(RECORDS)
    steps = [training_tasks(config, i, ranks()) for i in range(12)]
    every = [name for step in steps for name in first(step)]
    trained = {it["instructions"][0] for it in RECORDS if Path(it["image"]).name not in HELD_OUT}
    num = len(trained)
    assert 2 * num <= len(every) and set(every[:num]) == set(every[num : 2 * num]) == trained
    assert every[:num] != every[num : 2 * num]  # another order in the next epoch
    ids = [task.id for step in steps for task in step]
    assert ids == list(range(48))
    for world_size in (2, 4):
        parts = [training_tasks(config, 7, ranks(rank, world_size)) for rank in range(world_size)]
        found = {task.id: task.instructions for part in parts for task in part}
        assert found == {task.id: task.instructions for task in steps[7]}
    again = make(RECORDS[::-1], "b.jsonl")  # read anew, in another order
    assert first(training_tasks(again, 7, ranks())) == first(steps[7])
    other = replace(config, data=replace(config.data, seed=1))
    assert [n for i in range(12) for n in first(training_tasks(other, i, ranks()))] != every
    size = config.rollout.group_size  # 4 tasks of so many trajectories, which a rank more than tasks share too
    assert [task.id for task in training_tasks(config, 7, ranks(2 * size - 1, 4 * size))] == [29]


def test_the_order_is_pinned(make: Callable[..., Config]) -> None:
    """A release that changes it would give a resumed run other tasks."""
    assert [task.instructions[0].split()[1::2] for task in training_tasks(make(RECORDS), 1, ranks())] == PINNED


PINNED = [["2", "china.jpg"], ["0", "china.jpg"], ["1", "china.jpg"], ["0", "rocket.jpg"]]


def test_held_out_are_whole_images_and_stay_so(make: Callable[..., Config]) -> None:
    config = make(RECORDS)
    assert HELD_OUT and set(PHOTOS) > HELD_OUT
    tasks = held_out_tasks(
        replace(config, evaluation=EvaluationConfig(num_sessions=3 * len(HELD_OUT), num_sessions_short=1, num_strips=1))
    )
    assert {name.split()[-1] for name in first(tasks)} == HELD_OUT
    assert [task.id for task in tasks] == list(range(3 * len(HELD_OUT)))
    assert first(held_out_tasks(config)) == first(tasks)[:2]
    more = make([*RECORDS, record("../photos/chelsea.png", 9)], "b.jsonl")
    assert {it for it in PHOTOS if is_held_out_image(f"photos/{it}", 0.9)} >= HELD_OUT  # a larger share adds
    assert len(held_out_tasks(more)) == 2
    share = np.mean([is_held_out_image(f"{i}.jpg", 0.2) for i in range(10_000)])
    assert abs(share - 0.2) < 4 * (0.2 * 0.8 / 10_000) ** 0.5  # four standard deviations


def test_held_out_of_its_own(make: Callable[..., Config], tmp_path: Path) -> None:
    make(RECORDS[:2], "held.jsonl")
    config = make(RECORDS[2:7], held_out=str(tmp_path / "held.jsonl"))
    check_data(config, is_speaking=False)
    assert {it.split()[-1] for it in first(held_out_tasks(config))} == set(PHOTOS[:2])
    assert {it for i in range(9) for it in first(training_tasks(config, i, ranks()))} == {
        it["instructions"][0] for it in RECORDS[2:7]
    }
    for records, path in ((RECORDS[1:5], "held.jsonl"), (RECORDS, "a.jsonl")):
        both = make(records, held_out=str(tmp_path / path), seed=len(records))
        with pytest.raises(ValueError, match=r"data.held_out is .* has images of data.path"):
            cached_anew(both)
        check_data(both, is_speaking=False, is_training=False)  # as configs/edival.yaml, where nothing is trained


def cached_anew(config: Config) -> None:
    """As in another process: files are read once."""
    from mteditflow.data import userdata

    for function in (userdata.read_named, userdata.training_source, userdata.held_out_source):
        function.cache_clear()
    check_data(config, is_speaking=True)


def test_damaged_images_are_named_and_replaced(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The next session of the epoch takes the slot, whether or not the damage was known before, on any rank."""
    monkeypatch.setattr("mteditflow.data.userdata.MAX_BAD_SHARE", 0.1)
    (tmp_path / "photos" / "torn.jpg").write_bytes(photo("china.jpg").read_bytes()[:30_000])
    records = [*RECORDS, *(record("torn.jpg", i) for i in range(2))]
    assert not is_held_out_image("photos/torn.jpg", SHARE)
    config = make(records, num_tasks=2)
    steps = [first(training_tasks(config, i, ranks())) for i in range(20)]
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and all("image photos/torn.jpg: damaged: image file is truncated" in line for line in err)
    assert {line.split()[2] for line in err} == {"a.jsonl:22:", "a.jsonl:23:"}
    assert not any("torn.jpg" in name for step in steps for name in step)
    whole = make([it for it in records if "torn" not in it["image"]], "whole.jsonl", num_tasks=2)
    num = sum(not is_held_out_image(it["image"], SHARE) for it in records)
    counts = Counter(name for step in steps for name in step)
    assert set(counts) == {n for i in range(20) for n in first(training_tasks(whole, i, ranks()))}
    assert sum(counts.values()) == 40 > num
    cached_anew(config)
    parts = [first(training_tasks(config, i, ranks(rank, 2))) for i in range(19, -1, -1) for rank in range(2)]
    assert parts == [[name] for step in steps[::-1] for name in step]


def test_too_much_damage_stops_with_one_line(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "photos" / "torn.jpg").write_bytes(photo("china.jpg").read_bytes()[:30_000])
    missing = make([*RECORDS, record("nowhere.png", 0), record("gone.png", 0)])
    with pytest.raises(ValueError, match=r"2 of 23 sessions are damaged, more than 5%"):
        check_data(missing, is_speaking=False)
    found = make([*RECORDS, record("torn.jpg", 0), record("torn.jpg", 1)], "b.jsonl")
    check_data(found, is_speaking=False)  # not known yet
    with pytest.raises(ValueError, match=r"2 of 23 sessions are damaged.*data check .*b.jsonl"):
        for i in range(9):
            training_tasks(found, i, ranks())
    monkeypatch.setattr("mteditflow.data.userdata.MAX_BAD_SHARE", 1.0)
    nothing = make([record("torn.jpg", i) for i in range(3)], "c.jsonl")
    with pytest.raises(ValueError, match=r"none of its 3 images can be read"):
        training_tasks(nothing, 0, ranks())


def test_too_few_whole_pictures_held_out_stop_a_run_before_anything_is_loaded(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The check of counts does not read pictures; the run does, before judge and editor."""
    monkeypatch.setattr("mteditflow.data.userdata.MAX_BAD_SHARE", 1.0)
    torn = photo("china.jpg").read_bytes()[:30_000]
    for name in HELD_OUT:
        (tmp_path / "photos" / name).write_bytes(torn)
    config = make(RECORDS)
    check_data(config, is_speaking=False)
    for loader in ("build_reward", "build_policy"):
        monkeypatch.setattr(f"mteditflow.run.{loader}", lambda *_, **__: pytest.fail("loaded before pictures are read"))
    words = [f"--{name}={value}" for name, value in cli.changed_fields(config).items()]
    with pytest.raises(SystemExit):
        train([*words, f"--run.folder={tmp_path / 'run'}", "--model.path=embedded", "--reward.judge=vlm",
               "--reward.consistency=none", "--advantage.consistency_weight=0"])  # fmt: skip
    (line,) = [it for it in capsys.readouterr().err.splitlines() if "num_sessions" in it]
    num = 3 * len(HELD_OUT)
    assert f"has 0 held-out sessions of 2 turns beside {num} with damaged pictures; lower it" in line


def test_check_and_a_run_find_the_same_faults(
    make: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "photos" / "torn.jpg").write_bytes(photo("china.jpg").read_bytes()[:30_000])
    faulty = [{"image": "photos/china.jpg"}, {"prompt": "a"}, record("gone.png", 0), record("torn.jpg", 0)]
    faulty += [{**record("china.jpg", 0), "untouched_objects": [["a"]]}, {**record("china.jpg", 0), "objects": [{}]}]
    monkeypatch.setattr("mteditflow.data.userdata.MAX_BAD_SHARE", 1.0)
    config = make([*RECORDS, *faulty])
    check_data(config, is_speaking=True)
    held_out_tasks(config)
    for i in range(9):
        training_tasks(config, i, ranks())
    by_run = re.findall(r"skipped (a.jsonl:\d+): ", capsys.readouterr().err)
    assert check([config.data.path, "--num_turns", "2", "--max_bad_share", "1"]) == 0
    by_check = re.findall(r"^  (a.jsonl:\d+): ", capsys.readouterr().out, re.M)
    assert sorted(by_run) == sorted(by_check) == [f"a.jsonl:{i}" for i in range(22, 28)]


def test_check_and_a_run_count_the_same_instructions_that_are_cut(
    make: Callable[..., Config], tiny_pipeline_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the turns that a run has, each text once; by the tokenizer alone."""
    long = "make the red square " * 5
    texts = [[long, "add a circle", long], ["remove a", long, "add a"], ["remove a", "add a", long], ["add a"]]
    config = make([{"image": f"photos/{name}", "instructions": it} for name, it in zip(PHOTOS, texts, strict=False)])
    model = replace(config.model, path=str(tiny_pipeline_folder), max_text_tokens=8)
    (line,) = cut_lines(all_instructions(config), token_counter(model), 8)
    assert line == "1 of 4 instructions are longer than model.max_text_tokens 8: their ends are not read"
    told = [config.data.path, "--num_turns", "2", "--model", model.path, "--max_text_tokens"]
    assert check([*told, "8"]) == 0 and line in capsys.readouterr().out.splitlines()
    assert check([*told, "99"]) == 0 and "are longer" not in capsys.readouterr().out


def test_a_plan_says_what_a_run_would_refuse(make: Callable[..., Config]) -> None:
    config = make(RECORDS)
    assert dry_run(config).problem is None
    many = replace(config, evaluation=replace(config.evaluation, num_sessions=20))
    problem = dry_run(many).problem
    assert problem and "evaluation.num_sessions is 20: " in problem and "held-out sessions of 2 turns" in problem


def test_check_and_a_run_allow_the_same_share(make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch) -> None:
    """29 of 100, where 0.29 * 100 is less than 29 in floating point."""
    records = [*(record(PHOTOS[i % 7], i) for i in range(71)), *(record("gone.png", i) for i in range(29))]
    for share, is_fit in ((0.29, True), (0.28, False)):
        monkeypatch.setattr("mteditflow.data.userdata.MAX_BAD_SHARE", share)
        config = make(records, f"{share}.jsonl")
        assert check([config.data.path, "--num_turns", "2", "--max_bad_share", str(share)]) == (0 if is_fit else 1)
        with nullcontext() if is_fit else pytest.raises(ValueError, match="29 of 100 sessions are damaged"):
            check_data(config, is_speaking=False)


def test_check_data_says_what_is_skipped(
    make: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mteditflow.data.userdata.MAX_BAD_SHARE", 0.5)
    config = make([*RECORDS, *(record(f"gone{i}.png", 0) for i in range(12))])
    check_data(config, is_speaking=True)
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 13 and "a.jsonl:22: no such file" in err[0] and err[10] == "mteditflow: skipped 2 more"
    num = 3 * len(HELD_OUT)
    assert err[11].startswith(f"mteditflow: {21 - num} sessions of") and err[12].startswith(f"mteditflow: {num} ")


def test_settings_that_do_not_fit_the_data(make: Callable[..., Config]) -> None:
    config = make(RECORDS)
    cases = {
        "data.num_turns is 3: no session of .* the longest has 2":
            replace(config, data=replace(config.data, num_turns=3)),
        "evaluation.num_sessions is 256: .* held-out sessions of 2 turns; lower it .* or raise data.held_out_share":
            replace(config, evaluation=EvaluationConfig()),
        "evaluation.num_sessions is 2: .* has 0 held-out sessions of 4 turns":
            replace(config, evaluation=replace(config.evaluation, num_turns=4)),
        "data.path is 'nowhere.jsonl': cannot be read": replace(config, data=DataConfig(path="nowhere.jsonl")),
    }  # fmt: skip
    for message, unfit in cases.items():
        with pytest.raises(ValueError, match=message) as error:
            check_data(unfit, is_speaking=False)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"model.height is 96: must be 64"):
        check_data(Config(model=ModelConfig(height=96)), is_speaking=False)
    check_data(replace(config, model=ModelConfig(height=96)), is_speaking=False)
    wrong: list[tuple[str, Any]] = [
        ("held_out", "a.jsonl"),
        ("held_out_share", 0.0),
        ("path", ""),
    ]
    for name, value in wrong:
        with pytest.raises(ValueError, match=f"data.{name} is "):
            DataConfig(**{name: value})


def arguments_of(folder: Path, pipeline: Path, data: Path) -> list[str]:
    values = {
        "model.path": pipeline, "model.max_text_tokens": 8, "model.height": 48, "model.width": 64, "lora.rank": 2,
        "data.path": data, "data.num_turns": 2, "data.held_out_share": SHARE, "rollout.num_tasks": 2,
        "rollout.group_size": 2, "rollout.num_steps": 3, "objective.name": "grpo", "run.num_iterations": 1,
        "evaluation.num_sessions": 2, "evaluation.num_sessions_short": 1, "evaluation.num_strips": 1,
        "evaluation.num_steps": 2, "run.folder": folder,
    }  # fmt: skip
    return cli.as_arguments({key: str(value) for key, value in values.items()})


def redness(rollout: Rollout) -> Scores:
    """A reward that looks at pictures: how red each turn is."""
    red = torch.stack([turn.image[:, 0].flatten(1).mean(1) for turn in rollout.turns], dim=1) / 2 + 0.5
    rewards = {"instruction": red.clamp(0, 1)}
    return Scores(rewards=rewards, weights={"instruction": 1.0}, valid=torch.ones(len(red)).bool())


def test_a_run_on_users_data(
    make: Callable[..., Config], tmp_path: Path, tiny_pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    long = {"image": "photos/china.jpg", "instructions": ["make the red square blue " * 4, "b"]}
    make([*RECORDS, long])
    monkeypatch.setattr("mteditflow.run.build_reward", lambda config: GivenRewards(redness))
    monkeypatch.setattr("mteditflow.evaluate.compare_editors.check_judge", lambda config: None)
    train(arguments_of(tmp_path / "run", tiny_pipeline_folder, tmp_path / "a.jsonl"))
    said = " ".join(capsys.readouterr().err.split())
    assert "1 of 23 instructions are longer than model.max_text_tokens 8: their ends are not read" in said
    (line,) = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert 0 < line["reward/instruction"] < 1 and line["update/grad_norm"] > 0
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").exists()
    strip = Image.open(tmp_path / "run" / "strips" / "iteration-000001.png")
    assert strip.width > strip.height
    assert "Judge against truth" not in (tmp_path / "run" / "report.html").read_text()


def test_the_worlds_judges_cannot_score_it(
    make: Callable[..., Config], tmp_path: Path, tiny_pipeline_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(RECORDS)
    arguments = arguments_of(tmp_path / "run", tiny_pipeline_folder, tmp_path / "a.jsonl")
    for judge in ("exact", "simulated_thinking", "simulated_direct"):
        with pytest.raises(SystemExit) as stop:
            train([*arguments, f"--reward.judge={judge}"])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.count("\n") == 1
        assert err.startswith(f"mteditflow: reward.judge is '{judge}': knows only the embedded world's pictures")
    assert not (tmp_path / "run").exists()
    task = replace(training_tasks(make(RECORDS), 0, ranks())[0], source=torch.zeros(3, 64, 64))
    rollout = rollout_of([task], torch.zeros(3, 1, 3, 64, 64))
    with pytest.raises(ValueError, match=r"a task has no truth to compare with: take another reward.judge"):
        ExactInstruction()(rollout)


def turn() -> Any:
    return type("Turn", (), {"image": torch.zeros(1, 3, 64, 64)})()
