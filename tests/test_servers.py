"""Real servers: `transformers serve` with the small judge that ships, and LiteLLM's proxy in front of it, both on
loopback.

They are those of this interpreter, or of the one in the folder MTEDITFLOW_SERVERS (LiteLLM wants an older rich than we
do, so it has a place of its own). Skipped where neither has them.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from tiny_judge import small_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from mteditflow.config import Config, RewardConfig
from mteditflow.config.reward import SMALL
from mteditflow.judge.check import Sample, find_problems, make_samples
from mteditflow.reward.vlm import Answer
from mteditflow.reward.vlm_local import LocalVlm
from mteditflow.reward.vlm_server import API_KEY, RemoteVlm

BIN = Path(os.environ.get("MTEDITFLOW_SERVERS", Path(sys.executable).parent))
KEY = "sk-of-loopback"
START_S = 300.0


@pytest.fixture(autouse=True)
def loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(API_KEY, raising=False)


@contextmanager
def started(words: list[str], url: str, log: Path, **environment: str) -> Iterator[None]:
    """A program that serves at `url`, from when it answers there; `log` gets what it says."""
    names = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}  # its own packages alone
    with log.open("wb") as file:
        process = subprocess.Popen(
            words, env={**names, "OMP_NUM_THREADS": "1", **environment}, stdout=file, stderr=subprocess.STDOUT
        )
    try:
        end = time.monotonic() + START_S
        while time.monotonic() < end:
            try:
                httpx.get(url, trust_env=False)
                break
            except httpx.TransportError:
                assert process.poll() is None, log.read_text()[-2000:]
                time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where `transformers serve` is, which loads what it is asked for; in float32, as a judge in a CPU's process is."""
    python = BIN / "python"
    code = (
        "from transformers.utils.import_utils import is_serve_available as is_there\nraise SystemExit(not is_there())"
    )
    if not python.is_file() or subprocess.run([python, "-c", code], check=False).returncode:
        pytest.skip("transformers serve is not installed: pip install 'mteditflow[servers]'")
    port, program = str(free_port()), str(Path(__file__).parent / "serve_transformers.py")
    words = [str(python), program, "serve", "--host", "127.0.0.1", "--port", port]
    words += ["--device", "cpu", "--dtype", "float32"]
    log = tmp_path_factory.mktemp("served") / "log.txt"
    with started(words, f"http://127.0.0.1:{port}/health", log, HF_HUB_OFFLINE="1"):
        yield f"http://127.0.0.1:{port}/v1"


def config_of(name: str, **values: object) -> RewardConfig:
    """Of a judge that always writes the likeliest token."""
    fields = {"temperature": 0.0, "num_retries": 0, "max_answer_tokens": 40, "readout": "direct", **values}
    return RewardConfig(judge="vlm", vlm=name, **fields)  # pyright: ignore[reportArgumentType]


def judge_at(name: str, url: str, **values: object) -> RemoteVlm:
    return RemoteVlm(config_of(name, url=url, **values))


@cache
def samples() -> list[Sample]:
    """Sessions of three turns, good and bad ones."""
    return make_samples(Config(reward=config_of(SMALL)), 8)


@cache
def answers_here() -> list[Answer]:
    """What the small judge says of them in this process."""
    return LocalVlm(config_of(SMALL), torch.device("cpu"))([sample.question for sample in samples()])


def assert_judges(name: str, url: str) -> None:
    """It says word for word what it says in this process, four at once, and tells good from bad; logprobs there are
    none.
    """
    vlm, questions = judge_at(name, url, num_parallel=4), [sample.question for sample in samples()]
    vlm.check(questions[0])
    answers = vlm(questions)
    assert [(found.text, found.grades) for found in answers] == [(here.text, here.grades) for here in answers_here()]
    assert find_problems(samples(), answers) == []
    prompt, answered = vlm.num_tokens.values()
    assert prompt > 10 * 4 * 4 and answered == 9 * 12 + 1  # four an image, nine tags and digits, two breaks, the end
    vlm.close()
    expected = judge_at(name, url, readout="expected")
    with pytest.raises(ValueError, match=r"readout is 'expected', for which .* gives no logprobs: take 'direct'"):
        expected.check(replace(questions[0], readout="expected"))
    expected.close()


def refuses(vlm: RemoteVlm, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vlm.check(samples()[0].question)
    vlm.close()


def test_transformers_serve(url: str, tmp_path: Path) -> None:
    """It answers 200 to a question with pictures for a model of texts too, and 500 for one that is not there."""
    assert_judges(SMALL, url)
    refuses(judge_at("other", url), r"gives no answer .500: .*as reward.vlm give one of")
    refuses(judge_at(SMALL, url.removesuffix("/v1")), "answers 404 to /chat/completions")
    small: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **small, **ends)).save_pretrained(tmp_path)
    refuses(judge_at(str(tmp_path), url), "sees no pictures: a question with 4 has no more tokens than one without")


def test_litellm_in_front_of_it(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Under another name, with a key; a wrong key and a wrong name are one line each."""
    program = BIN / "litellm"
    if not program.is_file():
        pytest.skip("LiteLLM is not installed in MTEDITFLOW_SERVERS: pip install 'litellm[proxy]'")
    name = config_of(SMALL).vlm_path
    (tmp_path / "proxy.yaml").write_text(
        f"model_list:\n  - model_name: judge\n    litellm_params:\n      model: hosted_vllm/{name}\n"
        f"      api_base: {url}\n      api_key: none\ngeneral_settings:\n  master_key: {KEY}\n"
    )
    port = free_port()
    words = [str(program), "--config", str(tmp_path / "proxy.yaml"), "--host", "127.0.0.1", "--port", str(port)]
    proxy = f"http://127.0.0.1:{port}"
    with started(words, f"{proxy}/health/liveliness", tmp_path / "log.txt", LITELLM_LOCAL_MODEL_COST_MAP="True"):
        monkeypatch.setenv(API_KEY, KEY)
        assert_judges("judge", f"{proxy}/v1")
        refuses(judge_at("other", f"{proxy}/v1"), "Invalid model name.*as reward.vlm give one of judge")
        for key in ("", "sk-of-another"):
            monkeypatch.setenv(API_KEY, key)
            refuses(judge_at("judge", f"{proxy}/v1"), f"refuses its list of models too: is {API_KEY} right")
        assert KEY not in capfd.readouterr().err
