"""`mteditflow judge`: checking a judge by sessions whose grades are known, and the command that serves it."""

import json
import os
import shlex
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from judge_server import SCORES, Reply, Server, completion
from PIL import Image
from serve_transformers import leave_out_videos
from tiny_judge import save_vlm

from mteditflow.config import Config, DataConfig, ModelConfig, RewardConfig, command
from mteditflow.config.reward import SMALL_FOLDER
from mteditflow.judge.check import make_samples
from mteditflow.judge.serve import KEY, context_length, servers
from mteditflow.reward.chat import request
from mteditflow.reward.vlm_server import API_KEY

ROOT = Path(__file__).parent.parent


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(API_KEY, raising=False)
    server = Server()
    yield server
    server.close()


def check(server: Server, *words: str) -> int:
    url = server.config.url
    return command.main(
        ["judge", "check", "--reward.judge", "vlm", "--reward.vlm", "judge", "--reward.url", url, *words]
    )


def by_change(number: int, body: dict[str, Any]) -> Reply:
    """5 for a turn whose picture is another than the one before, else 1."""
    urls = [part["image_url"]["url"] for part in body["messages"][1]["content"] if part["type"] == "image_url"]
    grades = [5 if before != after else 1 for before, after in pairwise(urls)]
    text = "".join(f"<Turn{turn}Score>{grade}</Turn{turn}Score>" for turn, grade in enumerate(grades, start=1))
    return 200, completion(text)


def test_samples_are_what_the_verifier_says() -> None:
    """Good ones are 5 at every turn, bad ones 1; in the place of other data as large as their editor's pictures."""
    samples = make_samples(Config(data=DataConfig(num_turns=4)), 6)
    assert [sample.kind for sample in samples] == ["good", "bad"] * 3
    assert [sample.truth for sample in samples] == [(5,) * 4, (1,) * 4] * 3
    assert {image.shape for sample in samples for image in sample.question.images} == {(3, 64, 64)}
    assert all(len(sample.question.images) == 5 and len(sample.question.instructions) == 4 for sample in samples)
    large = make_samples(Config(data=DataConfig(path="a.jsonl"), model=ModelConfig(height=192, width=128)), 2)
    for small, shown in zip(samples[0].question.images[:2], large[0].question.images, strict=False):
        assert shown.shape == (3, 192, 192) and torch.equal(shown[:, 1::3, 1::3], small)
    assert len({tuple(sample.question.key.tolist()) for sample in samples}) == 6


def test_a_judge_that_can_be_used(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.reply = by_change
    assert check(server, "--num_sessions", "6") == 0
    said = capsys.readouterr().out
    assert len(server.bodies) == 1 + 6  # that which tries the server, and the sessions
    assert said.count("5 5 5") == 6 and said.count("1 1 1") == 6 and "the judge can be used" in said
    assert "tokens of a question: 100; of an answer: 20" in said and "one question alone: 0." in said
    assert "an iteration's 128 trajectories: about" in said


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        (
            lambda *_: (200, completion(SCORES + "<Turn3Score>4</Turn3Score>")),
            "good sessions from bad ones: 3.33 and 3.33",
        ),
        (lambda *_: (200, completion("I see [red] squares.")), r"6 of 6 answers hold no scores \(form 6\)"),
        (lambda *_: (200, completion("<Thought>", finish_reason="length")), r"6 of 6 answers hold no scores \(cut 6\)"),
    ],
)
def test_a_judge_that_cannot_be_used(
    server: Server, capsys: pytest.CaptureFixture[str], reply: Any, problem: str
) -> None:
    server.reply = reply
    assert check(server, "--num_sessions", "6") == 1
    out = capsys.readouterr().out
    assert f"wrong: {problem}".replace("\\", "") in out or f"wrong: it does not tell {problem}" in out
    assert "can be used" not in out


def test_a_judge_in_this_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that has learnt nothing writes what holds no scores."""
    leave_out_videos(monkeypatch.setattr)
    save_vlm(tmp_path)
    words = ("--reward.judge", "vlm", "--reward.vlm", str(tmp_path), "--reward.max_answer_tokens", "4")
    assert command.main(["judge", "check", "--num_sessions", "2", *words]) == 1
    out = capsys.readouterr().out
    assert "wrong: 2 of 2 answers hold no scores" in out and "tokens of a question" not in out


def test_a_judge_that_is_not_there(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server.reply = lambda *_: (401, "who?")
    with pytest.raises(SystemExit) as exited:
        check(server)
    assert exited.value.code == 2 and "it wants another key" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exited:
        command.main(["judge", "check"])
    assert exited.value.code == 2 and "reward.judge is 'exact': must be 'vlm'" in capsys.readouterr().err


# Serving


def config_at(url: str = "", readout: Any = "thinking", num_turns: int = 3, max_answer_tokens: int = 1024) -> Config:
    reward = RewardConfig(judge="vlm", url=url, readout=readout, max_answer_tokens=max_answer_tokens)
    return Config(reward=reward, data=DataConfig(num_turns=num_turns))


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


def test_commands_that_fit_the_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY, raising=False)
    vllm, sglang, transformers = (shlex.split(str(found)) for found in servers(config_at("http://gpu7:9001/v1")))
    assert vllm[:3] == ["vllm", "serve", "Qwen/Qwen3-VL-8B-Instruct"] and transformers[:2] == ["transformers", "serve"]
    assert option(sglang, "--model-path") == "Qwen/Qwen3-VL-8B-Instruct"
    for words in (vllm, sglang, transformers):
        assert (option(words, "--port"), option(words, "--host")) == ("9001", "0.0.0.0")
    assert option(vllm, "--limit-mm-per-prompt") == option(sglang, "--limit-mm-data-per-request") == '{"image": 4}'
    assert option(vllm, "--max-model-len") == option(sglang, "--context-length") == "8192"
    local = shlex.split(str(servers(config_at(num_turns=9, max_answer_tokens=9000))[0]))
    assert (option(local, "--port"), option(local, "--host")) == ("8000", "127.0.0.1")
    assert option(local, "--limit-mm-per-prompt") == '{"image": 10}'
    assert int(option(local, "--max-model-len")) == context_length(10, 9000) == 14336
    assert [found.package for found in servers(config_at(readout="expected"))] == ["vllm", "sglang"]
    assert option(shlex.split(str(servers(config_at("https://judge.example/v1"))[0])), "--port") == "443"


def test_a_question_has_room_for_reference_images(tmp_path: Path) -> None:
    """The source, K edits and the most references of a session, of training or held out: pictures and tokens."""
    for name in ("train", "held"):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
        images = [f"{name}.png", *["held.png"] * (2 if name == "train" else 5)]
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps({'images': images, 'instructions': ['a'] * 3})}\n")
    config = config_at(max_answer_tokens=9000)
    data = {"path": str(tmp_path / "train.jsonl"), "held_out": str(tmp_path / "held.jsonl")}
    vllm, sglang, _ = (found.words for found in servers(replace(config, data=replace(config.data, **data))))
    assert option(vllm, "--limit-mm-per-prompt") == option(sglang, "--limit-mm-data-per-request") == '{"image": 9}'
    assert int(option(vllm, "--max-model-len")) == context_length(9, 9000) == 14336 > context_length(4, 9000)


def test_the_judge_that_ships_is_served_and_asked_for_by_its_folder() -> None:
    """A server loads what it is asked for, or lists what it loaded: the same name in the command and in a question."""
    config = Config(reward=RewardConfig(judge="vlm", vlm="small", url="http://localhost:8000/v1", readout="direct"))
    asked = request(make_samples(config, 2)[0].question, config.reward)["model"]
    assert asked == str(SMALL_FOLDER) and all(asked in found.words for found in servers(config))


def test_a_key_is_named_and_not_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv(API_KEY, "sk-secret")
    assert command.main(["judge", "serve", "--reward.judge", "vlm", "--reward.url", "http://localhost:8001/v1"]) == 0
    out = capsys.readouterr().out
    assert "secret" not in out and f'VLLM_API_KEY="{KEY}" vllm serve' in out and f'--api-key "{KEY}"' in out
    assert "transformers serve" not in out and "--reward.url http://localhost:8001/v1" in out


def test_a_server_is_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is installed is run with the key in its environment, and its exit code is ours; nothing is one line."""
    words = ["judge", "serve", "--reward.judge", "vlm", "--start"]
    monkeypatch.setenv(API_KEY, "sk-secret")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as exited:
        command.main(words)
    assert exited.value.code == 2 and "--start: no server is installed here" in capsys.readouterr().err
    (tmp_path / "vllm.py").touch()
    program = tmp_path / "vllm"
    program.write_text(f'#!/bin/sh\necho "$VLLM_API_KEY" "$@" > {tmp_path / "said"}\nexit 3\n')
    os.chmod(program, 0o755)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert command.main(words) == 3
    assert (tmp_path / "said").read_text().startswith("sk-secret serve Qwen/Qwen3-VL-8B-Instruct --host 127.0.0.1")
    assert "secret" not in capsys.readouterr().out


def test_nobody_asks_for_foreign_code() -> None:
    """A model's own code is never run: every loader of a reward refuses it, without a question on the terminal, and no
    server is told to trust it.
    """
    for path in (ROOT / "mteditflow").rglob("*.py"):
        for line in path.read_text().splitlines():
            is_refused = "trust_remote_code=False" in line or '"trust_remote_code": False' in line
            assert "trust_remote" not in line or is_refused, (path, line)
            is_loader = path.parent.name == "reward" and "Auto" in line and ".from_pretrained(" in line
            assert not is_loader or is_refused or "**SAFE" in line, (path, line)
    assert not any("trust" in word for found in servers(config_at()) for word in found.words)
