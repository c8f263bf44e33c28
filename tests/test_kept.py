"""The base's evaluation is used again where nothing that it depends on differs, and only there."""

import copy
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from update_parts import ONE_RANK, change

from mteditflow.config import Config
from mteditflow.data import held_out_tasks
from mteditflow.evaluate import kept
from mteditflow.evaluate.edival import Evaluation
from mteditflow.policy import Policy, build_policy
from mteditflow.types import EditTask


@pytest.fixture(scope="module")
def config(tiny_config: Config) -> Config:
    return change(tiny_config, "evaluation", num_sessions=3, num_sessions_short=1, num_strips=1, num_steps=2)


@pytest.fixture(scope="module")
def policy(config: Config) -> Policy:
    return build_policy(config.model, config.lora, 0, has_old=False)


@pytest.fixture(scope="module")
def tasks(config: Config) -> list[EditTask]:
    return held_out_tasks(config)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MTEDITFLOW_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "evaluations"


def an_evaluation(seed: int = 0) -> Evaluation:
    generator = torch.Generator().manual_seed(seed)
    consistency = torch.rand(3, 2, generator=generator)
    consistency[0, 1] = torch.nan
    return Evaluation(
        verdict=consistency > 0.5, consistency=consistency, valid=torch.tensor([True, False, True]),
        edit_types=[("subject_add", "text_change")] * 3, images=torch.rand(2, 1, 3, 8, 8, generator=generator),
        num_steps=2,
    )  # fmt: skip


def is_same(found: Evaluation, made: Evaluation) -> bool:
    """To the bit, NaN included."""
    one, other = vars(found), vars(made)
    tensors = {name for name, value in one.items() if isinstance(value, torch.Tensor)}
    assert len(tensors) == 4
    others = [name for name in one if name not in tensors]
    return [one[name] for name in others] == [other[name] for name in others] and all(
        one[name].dtype == other[name].dtype and one[name].numpy().tobytes() == other[name].numpy().tobytes()
        for name in tensors
    )


@pytest.fixture
def find(policy: Policy, tasks: list[EditTask], config: Config) -> Callable[..., tuple[Evaluation, list[str], int]]:
    """An evaluation, found or made (`made`), what was said, and how often it was made."""

    def find(made: Evaluation, config: Config = config) -> tuple[Evaluation, list[str], int]:
        lines: list[str] = []
        calls: list[None] = []

        def make() -> Evaluation:
            calls.append(None)
            return made

        return kept.kept_evaluation(policy, tasks, config, ONE_RANK, make, lines.append), lines, len(calls)

    return find


def test_made_once(find: Any, cache: Path, config: Config) -> None:
    """By a run with other training settings too."""
    first, other = an_evaluation(), an_evaluation(seed=1)
    _, lines, num_made = find(first)
    assert num_made == 1 and lines == ["evaluating the base on 3 held-out sessions"]
    (entry,) = cache.glob("*.json")
    assert len(list(cache.iterdir())) == 2

    config = change(change(config, "lora", rank=4), "optimizer", learning_rate=0.5)
    config = change(change(config, "run", seed=7, folder="elsewhere", num_iterations=3), "evaluation", every=1)
    config = change(change(config, "rollout", group_size=4, num_steps=2), "reward", judge="simulated_direct")
    found, lines, num_made = find(other, config)
    assert num_made == 0 and is_same(found, first)
    assert lines == [f"evaluated the base on 3 held-out sessions before, by the same settings: taken from {entry}"]


@pytest.mark.parametrize("damage", ["cut", "a byte", "no verdicts", "no JSON", "other settings"])
def test_a_damaged_entry_is_made_again(damage: str, find: Any, cache: Path) -> None:
    find(an_evaluation())
    (entry,) = cache.glob("*.json")
    (verdicts,) = cache.glob("*.safetensors")
    content = bytearray(verdicts.read_bytes())
    match damage:
        case "cut":
            verdicts.write_bytes(content[:-1])
        case "a byte":
            content[-1] ^= 1
            verdicts.write_bytes(content)
        case "no verdicts":
            verdicts.unlink()
        case "no JSON":
            entry.write_text("{")
        case _:
            entry.write_text(json.dumps(json.loads(entry.read_text()) | {"depends_on": {}}))
    other = an_evaluation(seed=1)
    found, lines, num_made = find(other)
    assert num_made == 1 and found is other
    assert lines == [
        f"the kept evaluation {entry} is damaged: made again", "evaluating the base on 3 held-out sessions"
    ]  # fmt: skip
    found, lines, num_made = find(an_evaluation())
    assert num_made == 0 and len(lines) == 1 and is_same(found, other)


def test_nothing_is_kept_where_nobody_wants_it_or_nothing_can_be(
    find: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [find(an_evaluation())[2] for _ in range(2)] == [1, 1]  # MTEDITFLOW_CACHE is empty in the tests
    (tmp_path / "file").touch()
    monkeypatch.setenv("MTEDITFLOW_CACHE", str(tmp_path / "file"))
    _, lines, num_made = find(an_evaluation())
    assert num_made == 1 and "could not be kept in" in lines[-1] and "\n" not in lines[-1]


def test_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, value, expected in (
        ("MTEDITFLOW_CACHE", "", None),
        ("MTEDITFLOW_CACHE", "~/here", "/home/someone/here"),
        ("MTEDITFLOW_CACHE", None, "/home/someone/.cache/mteditflow"),
        ("XDG_CACHE_HOME", "/caches", "/caches/mteditflow"),
    ):
        monkeypatch.delenv(name, raising=False)
        if value is not None:
            monkeypatch.setenv(name, value)
        assert kept.cache_folder() == (Path(expected) / "evaluations" if expected else None)


def test_the_newest_stay(find: Any, cache: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "NUM_KEPT", 2)
    for steps in (1, 2, 3):
        find(an_evaluation(), change(config, "evaluation", num_steps=steps))
    assert len(list(cache.iterdir())) == 4
    assert find(an_evaluation(), change(config, "evaluation", num_steps=3))[2] == 0
    assert find(an_evaluation(), change(config, "evaluation", num_steps=1))[2] == 1


def with_model(policy: Policy, config: Config) -> Any:
    """A policy as of another `config.model`, for what asks it no more than that."""
    other = copy.copy(policy)
    other.config = config.model
    return other


SETTINGS = [
    ("model", {"guidance_scale": 3.0}),
    ("model", {"is_checkpointed": True}),
    ("evaluation", {"num_steps": 3}),
    ("evaluation", {"num_strips": 2, "num_sessions_short": 2}),
    ("evaluation", {"num_turns": 3}),
    ("rollout", {"hand_off": "latents"}),
    ("rollout", {"microbatch_size": 2}),
    ("run", {"backend": "triton"}),
]


@pytest.mark.parametrize(("section", "values"), SETTINGS)
def test_settings(section: str, values: Any, policy: Policy, tasks: list[EditTask], config: Config) -> None:
    before = kept.dependencies(policy, tasks, config)
    assert before is not None and before == kept.dependencies(policy, tasks, replace(config))
    config = change(config, section, **values)
    assert kept.dependencies(with_model(policy, config), tasks, config) != before


def test_what_a_run_made_of_auto(policy: Policy, tasks: list[EditTask], config: Config) -> None:
    before = kept.dependencies(policy, tasks, config)
    compiled = with_model(policy, change(config, "model", compile="blocks"))
    assert kept.dependencies(compiled, tasks, config) != before
    other = with_model(policy, config)
    other.attention = "another"
    assert kept.dependencies(other, tasks, config) != before


def test_sessions(policy: Policy, tasks: list[EditTask], config: Config) -> None:
    before, (first, *rest) = kept.dependencies(policy, tasks, config), tasks
    source = first.source.clone()
    source[0, 0, 0] += 1e-3
    for other in (
        replace(first, source=source), replace(first, id=99), replace(first, truth=rest[0].truth),
        replace(first, instructions=("make the ball red", *first.instructions[1:])),
    ):  # fmt: skip
        assert kept.dependencies(policy, [other, *rest], config) != before
    assert kept.dependencies(policy, rest, config) != before
    assert kept.dependencies(policy, [replace(first, source=first.source.clone()), *rest], config) == before


def test_files_of_the_editor(policy: Policy, tasks: list[EditTask], config: Config, tmp_path: Path) -> None:
    before = kept.dependencies(policy, tasks, config)
    folder = tmp_path / "moved"
    shutil.copytree(config.model.path, folder)
    moved = change(config, "model", path=str(folder))
    assert kept.dependencies(with_model(policy, moved), tasks, moved) == before  # its place is not its content
    (weights,) = (folder / "transformer").glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert kept.dependencies(with_model(policy, moved), tasks, moved) != before
    unknown = change(config, "model", path="someone/unknown")
    assert kept.dependencies(with_model(policy, unknown), tasks, unknown) is None


def test_program_and_machine(
    policy: Policy, tasks: list[EditTask], config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = kept.dependencies(policy, tasks, config)
    (tmp_path / "philox.py").write_text("NUM_ROUNDS = 7")
    for where, name, value in (
        (kept, "__file__", str(tmp_path / "evaluate" / "kept.py")),
        (kept.mteditflow_kernels, "__file__", str(tmp_path / "__init__.py")),
        (kept, "version", lambda _: "0.0"),
        (kept, "_device", lambda _: "another"),
        (kept.torch, "get_num_threads", lambda: 64),
        (kept.torch, "get_float32_matmul_precision", lambda: "high"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, value)
            assert kept.dependencies(policy, tasks, config) != before
    assert kept.dependencies(policy, tasks, config) == before


def test_judged_by_a_reward(policy: Policy, tasks: list[EditTask], config: Config, tmp_path: Path) -> None:
    """Kept where the judge's files can be told, and never where a server judges."""
    tasks = [replace(task, truth=None) for task in tasks]
    for name in ("judge", "dino"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(name)
    vlm, dino = str(tmp_path / "judge"), str(tmp_path / "dino")
    config = change(
        change(config, "advantage", consistency_weight=0.0), "reward", judge="vlm", vlm=vlm, consistency=dino
    )
    before = kept.dependencies(policy, tasks, config)
    assert before is not None
    assert kept.dependencies(policy, tasks, change(config, "reward", also="my_rewards:sharpness=0.2")) == before
    assert kept.dependencies(policy, tasks, change(config, "reward", temperature=0.5)) != before
    assert kept.dependencies(policy, tasks, change(config, "reward", consistency="none")) != before
    texts = []
    for name, text in (("a", "1 to 5: {form}"), ("b", "1 to 5: {form}"), ("b", "1 to 5, each: {form}")):
        (tmp_path / name).write_text(text)
        texts.append(kept.dependencies(policy, tasks, change(config, "reward", rubric=str(tmp_path / name))))
    assert before != texts[0] == texts[1] != texts[2]  # a rubric's text counts, not its path
    for name in ("judge", "dino"):
        (tmp_path / name / "weights").write_text("other")
        assert kept.dependencies(policy, tasks, config) != before
        (tmp_path / name / "weights").write_text(name)
    assert kept.dependencies(policy, tasks, config) == before
    for values in ({"url": "http://host:8000/v1"}, {"vlm": "someone/unknown"}, {"consistency": "someone/unknown"}):
        assert kept.dependencies(policy, tasks, change(config, "reward", **values)) is None
