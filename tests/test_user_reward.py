"""A function as a reward: docs/judge.md followed to the letter, what it does to the advantage, what is refused."""

import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_MAX_TEXT_TOKENS
from torch import Tensor

from mteditflow.advantage import advantages
from mteditflow.config import AdvantageConfig, Config, RewardConfig
from mteditflow.config.cli import from_yaml
from mteditflow.config.command import train as main
from mteditflow.config.reward import parse_also
from mteditflow.data import training_tasks
from mteditflow.distributed import Ranks
from mteditflow.noise import EVALUATION
from mteditflow.objective import build_objective
from mteditflow.policy import build_policy
from mteditflow.record.metrics import read_lines
from mteditflow.reward import build_reward, user_function
from mteditflow.rollout import sample_rollout
from mteditflow.types import Rollout

GUIDE = (Path(__file__).parent.parent / "docs" / "judge.md").read_text()
SECTION = GUIDE[GUIDE.index("## A reward of your own") :]
ONE_RANK = Ranks(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with the guide's files, as of a console script: not on sys.path."""
    for language, name in (("python", "my_rewards.py"), ("yaml", "my.yaml")):
        match = re.search(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)
        assert match
        (tmp_path / name).write_text(match[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("my_"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def rollout(tiny_config: Config) -> Rollout:
    policy = build_policy(tiny_config.model, tiny_config.lora, seed=0, has_old=False)
    tasks = training_tasks(tiny_config, 0, ONE_RANK)
    return sample_rollout(policy, build_objective(tiny_config), tasks, tiny_config, 0)


def z_of_pairs(values: Tensor) -> Tensor:
    """z of 2 groups of 2."""
    pairs = values.double().reshape(2, 2)
    return ((pairs - pairs.mean(1, keepdim=True)) / (pairs.std(1, correction=0, keepdim=True) + 1e-4)).flatten()


def test_the_guides_function_changes_the_advantage_as_the_formula_says(
    folder: Path, rollout: Rollout, tiny_config: Config
) -> None:
    config = replace(tiny_config, reward=from_yaml(folder / "my.yaml").reward)
    assert config.data.num_turns == 2
    scores = build_reward(config)(rollout)
    assert list(scores.rewards) == ["instruction", "consistency", "sharpness"]
    assert scores.weights == {"instruction": 1.0, "consistency": 0.3, "sharpness": 0.2}
    sharpness = torch.stack([turn.image.diff(dim=3).abs().flatten(1).mean(1) for turn in rollout.turns], dim=1)
    torch.testing.assert_close(scores.rewards["sharpness"], sharpness, rtol=1e-6, atol=0)
    paper = AdvantageConfig(std="group")
    plain = advantages(build_reward(tiny_config)(rollout), rollout.group, paper)
    expected = plain.double() + 0.2 * z_of_pairs(sharpness.mean(1))[:, None]
    found = advantages(scores, rollout.group, paper)
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)  # float32 z of up to 2, sums of 3
    assert (found - plain).abs().min() > 0.1


def run_arguments(pipeline: Path, folder: Path, values: dict[str, Any]) -> list[str]:
    values = {
        "model.path": pipeline, "model.max_text_tokens": TINY_MAX_TEXT_TOKENS, "lora.rank": 2,
        "data.num_turns": 2, "rollout.num_tasks": 1, "rollout.group_size": 4, "rollout.num_steps": 3,
        "evaluation.num_sessions": 2, "evaluation.num_sessions_short": 1, "evaluation.num_strips": 1,
        "evaluation.num_steps": 1, "evaluation.every": 0, "run.num_iterations": 1, "run.folder": folder / "run",
    } | values  # fmt: skip
    return ["--config", "my.yaml", *(word for name, value in values.items() for word in (f"--{name}", str(value)))]


def test_a_run_by_the_guide(folder: Path, tiny_pipeline_folder: Path) -> None:
    """Trained with, logged by its name, and weighed in reward/mean."""
    main(run_arguments(tiny_pipeline_folder, folder, {}))
    (line,) = read_lines(folder / "run" / "metrics.jsonl")
    assert line["reward/sharpness"] > 0 and line["update/grad_norm"] > 0
    expected = line["reward/instruction"] + 0.3 * line["reward/consistency"] + 0.2 * line["reward/sharpness"]
    assert line["reward/mean"] == pytest.approx(expected, rel=1e-5)
    assert (folder / "run" / "report.html").exists()


FUNCTIONS = """
import numpy as np
import torch
NUM_CALLS = [0]
def lists(sources, instructions, pictures):
    assert sources.shape == pictures.shape[1:] and len(instructions) == len(sources)
    return [[float(len(text)) for text in texts] for texts in instructions]
def arrays(sources, instructions, pictures):
    return np.array(lists(sources, instructions, pictures)).astype(int)
def greedy(sources, instructions, pictures):
    values = pictures.mean(dim=(2, 3, 4)).T.clone()
    sources.zero_(), pictures.zero_(), instructions.clear()
    return values
def transposed(sources, instructions, pictures):
    return pictures.mean(dim=(2, 3, 4))
def squeezed(sources, instructions, pictures):
    return pictures.mean(dim=(2, 3, 4)).T.squeeze()
def summed(sources, instructions, pictures):
    return pictures.sum()
def nothing(sources, instructions, pictures):
    return None
def words(sources, instructions, pictures):
    return np.array([["good"] * len(pictures)] * len(sources))
def ragged(sources, instructions, pictures):
    return [[1.0], *[[1.0, 2.0]] * (len(sources) - 1)]
def spectrum(sources, instructions, pictures):
    return torch.fft.fft(pictures.mean(dim=(2, 3, 4)).T)
def endless(sources, instructions, pictures):
    return torch.full((pictures.shape[1], len(pictures)), torch.inf)
def undefined(sources, instructions, pictures):
    return torch.full((pictures.shape[1], len(pictures)), torch.nan)
def ranked(sources, instructions, pictures):
    values = pictures.diff(dim=-1).abs().mean(dim=(2, 3, 4)).T
    return values - values.mean(0)
def drawn(sources, instructions, pictures):
    return torch.rand(pictures.shape[1], len(pictures))
def broken(sources, instructions, pictures):
    raise KeyError("no such thing")
def late(sources, instructions, pictures):
    NUM_CALLS[0] += 1
    values = pictures.mean(dim=(2, 3, 4)).T
    if NUM_CALLS[0] > 3:
        raise RuntimeError("out of luck\\nand of words")
    return values
def late_infinite(sources, instructions, pictures):
    NUM_CALLS[0] += 1
    values = pictures.mean(dim=(2, 3, 4)).T
    if NUM_CALLS[0] > 3:
        values[1, 1] = -torch.inf
    return values
number = 3
"""
TRIED = r"\(N, K\) = \(4, 2\); called with trajectory 0 of task 0 in the trial before training and 3 more$"
WRONG = {
    "my_nowhere:f": r"cannot be imported from the working folder or sys.path \(ModuleNotFoundError: No module",
    "my_broken:f": r"cannot be imported .* \(NameError: name 'x' is not defined\); python -c 'import my_broken'",
    "my_functions:f": r"my_functions.py has no function or class 'f'",
    "my_functions:number": r"my_functions.py has no function or class 'number'",
    "my_functions:lists:a/b": r"lists is a function, and a path is a class's: leave it out",
    "my_functions:transposed": rf"gives shape \(2, 4\), must give a number, or NaN, per trajectory and turn: {TRIED}",
    "my_functions:squeezed": r"gives shape \(2,\), must give .* \(N, K\) = \(1, 2\); called with .* training$",
    "my_functions:summed": r"gives shape \(\), must give",
    "my_functions:nothing": r"gives NoneType \(.*\), must give a number",
    "my_functions:words": r"gives ndarray \(.*\), must give a number",
    "my_functions:ragged": r"gives list \(.*\), must give a number",
    "my_functions:spectrum": r"gives complex numbers, must give a number",
    "my_functions:endless": r"gives an infinite number, .*: turn 1 of trajectory 0 of task 0 in the trial",
    "my_functions:undefined": r"gives NaN alone, for 4 trajectories of 4 tasks: must give numbers",
    "my_functions:ranked": r"gives a trajectory \[.*\] beside others and \[0.0, 0.0\] alone: .* by itself",
    "my_functions:broken": r"raises KeyError: 'no such thing' \(line 38 of .*my_functions.py\); called with traj",
}


@pytest.mark.parametrize(("also", "message"), WRONG.items())
def test_what_is_no_reward_is_one_line_before_the_run(
    also: str, message: str, folder: Path, tiny_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(user_function, "NUM_TRIED", 4)
    (folder / "my_functions.py").write_text(FUNCTIONS)
    (folder / "my_broken.py").write_text("y = x\n")
    with pytest.raises(ValueError, match=rf"reward\.also is '{also}': .*{message}") as caught:
        build_reward(replace(tiny_config, reward=RewardConfig(also=also)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "late",
            r"raises RuntimeError: out of luck \(line \d+ of .*\); called with trajectory 0 of task",
        ),
        ("late_infinite", r"gives an infinite number, must give a number, or NaN: turn 2 of trajectory 1 of task"),
    ],
)
def test_what_fails_later_names_iteration_and_trajectory(
    name: str, message: str, folder: Path, rollout: Rollout, tiny_config: Config
) -> None:
    (folder / "my_functions.py").write_text(FUNCTIONS)
    reward = build_reward(replace(tiny_config, reward=RewardConfig(also=f"my_functions:{name}")))  # tried three times
    later = replace(rollout, noise=replace(rollout.noise, step=6))
    where = f"{message} {rollout.tasks[0].id} in iteration 7"
    with pytest.raises(ValueError, match=rf"reward\.also is 'my_functions:{name}': {where}") as caught:
        reward(later)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"in an evaluation"):
        reward(replace(rollout, noise=EVALUATION))


def test_a_run_stops_in_one_line(folder: Path, tiny_pipeline_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "my_functions.py").write_text(FUNCTIONS)
    with pytest.raises(SystemExit) as exited:
        main(run_arguments(tiny_pipeline_folder, folder, {"reward.also": "my_functions:late"}))
    said = capsys.readouterr().err.splitlines()[-1]
    assert exited.value.code == 2
    assert re.match(
        r"mteditflow: reward.also is 'my_functions:late': raises RuntimeError: .* in iteration 1 and 3", said
    )


def test_a_function_may_draw_and_may_change_what_it_gets(folder: Path, rollout: Rollout, tiny_config: Config) -> None:
    (folder / "my_functions.py").write_text(FUNCTIONS)
    names = ("greedy", "drawn", "my_rewards:sharpness")
    also = tuple(name if ":" in name else f"my_functions:{name}" for name in names)
    before = [turn.image.clone() for turn in rollout.turns]
    sources = rollout.sources.clone()
    scores = build_reward(replace(tiny_config, reward=RewardConfig(also=also)))(rollout)
    alone = build_reward(replace(tiny_config, reward=RewardConfig(also="my_rewards:sharpness")))(rollout)
    assert torch.equal(scores.rewards["sharpness"], alone.rewards["sharpness"])
    assert all(torch.equal(turn.image, old) for turn, old in zip(rollout.turns, before, strict=True))
    assert torch.equal(rollout.sources, sources)
    torch.testing.assert_close(scores.rewards["greedy"], torch.stack([b.mean(dim=(1, 2, 3)) for b in before], dim=1))


def test_a_list_of_functions_and_their_weights(folder: Path, rollout: Rollout, tiny_config: Config) -> None:
    (folder / "my_functions.py").write_text(FUNCTIONS)
    reward = build_reward(
        replace(
            tiny_config,
            reward=RewardConfig(also=("my_functions:lists", "my_functions:arrays=2", "my_rewards:sharpness=0")),
        )
    )
    scores = reward(rollout)
    assert scores.weights == {"instruction": 1.0, "consistency": 0.3, "lists": 1.0, "arrays": 2.0, "sharpness": 0.0}
    assert torch.equal(scores.rewards["arrays"], scores.rewards["lists"])
    expected = [[len(text) for text in rollout.tasks[g].instructions[:2]] for g in rollout.group.tolist()]
    assert scores.rewards["lists"].tolist() == expected


@pytest.mark.parametrize(
    ("also", "message"),
    [
        ("sharpness", r"must be module:function, module:Class:PATH or model:PATH, with =weight"),
        ("a:b=", "must be module:function"),
        ("a:b=1=2", "must be module:function"),
        ("model:a/mean", "there is a mean already: rename the folder"),
        ("model:/", "the path must end in the name of a folder"),
        (("model:a/f-1", "b:f_1:g"), "two rewards have one name"),
        ("a:b=heavy", "the weight must be a number, not negative"),
        ("a:b=-1", "the weight must be a number, not negative"),
        ("a:b=inf", "the weight must be a number, not negative"),
        ("a:mean", "there is a mean already: rename the function"),
        ("a:success_1", "there is a success_1 already"),
        (("a:f", "b:f"), "two rewards have one name"),
    ],
)
def test_what_the_config_refuses(also: str | tuple[str, ...], message: str) -> None:
    with pytest.raises(ValueError, match=rf"reward\.also is .*: {message}"):
        RewardConfig(also=also)


def test_what_an_entry_says() -> None:
    assert parse_also("a.b:c=0.25").weight == 0.25 and parse_also("a.b:c").weight == 1
    found = parse_also("a.b:C:me/my=x/v1.5=0.5")
    assert (found.name, found.module, found.function, found.path, found.weight) == (
        "C",
        "a.b",
        "C",
        "me/my=x/v1.5",
        0.5,
    )
    found = parse_also("model:me/my-model.v1")
    assert (found.name, found.module, found.path, found.weight) == ("my_model_v1", "", "me/my-model.v1", 1)
