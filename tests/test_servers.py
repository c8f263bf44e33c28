"""Real servers: `transformers serve` with a small judge, and LiteLLM's proxy in front of it, both on loopback.

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
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serve_transformers import leave_out_videos
from tiny_judge import COLOUR_SCORES, colour_question, save_vlm, small_tokenizer, teach
from transformers import LlamaConfig, LlamaForCausalLM

from mteditflow.config import RewardConfig
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
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """Name and url of a judge that tells red from blue, at `transformers serve`, which loads what it is asked for."""
    python = BIN / "python"
    code = (
        "from transformers.utils.import_utils import is_serve_available as is_there\nraise SystemExit(not is_there())"
    )
    if not python.is_file() or subprocess.run([python, "-c", code], check=False).returncode:
        pytest.skip("transformers serve is not installed: pip install 'mteditflow[servers]'")
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        leave_out_videos(patch.setattr)
        save_vlm(folder)
        vlm = LocalVlm(RewardConfig(judge="vlm", vlm=str(folder), temperature=0, num_retries=0), torch.device("cpu"))
        teach(vlm)
        vlm.model.generation_config.do_sample = True
        vlm.model.save_pretrained(folder)
    port, program = str(free_port()), str(Path(__file__).parent / "serve_transformers.py")
    words = [str(python), program, "serve", "--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    with started(words, f"http://127.0.0.1:{port}/health", folder / "log.txt", HF_HUB_OFFLINE="1"):
        yield str(folder), f"http://127.0.0.1:{port}/v1"


def judge_at(name: str, url: str, **values: object) -> RemoteVlm:
    fields = {"temperature": 0.0, "num_retries": 0, "max_answer_tokens": 20, "readout": "direct", **values}
    return RemoteVlm(RewardConfig(judge="vlm", vlm=name, url=url, **fields))  # pyright: ignore[reportArgumentType]


def assert_judges(name: str, url: str) -> None:
    """Every pair of colours, four at once: red is 1, blue is 5; logprobs there are none."""
    vlm = judge_at(name, url, num_parallel=4)
    vlm.check(colour_question([0, 2]))
    pairs = [*product(COLOUR_SCORES, repeat=2)] * 2
    answers = vlm([colour_question(pair) for pair in pairs])
    assert [answer.grades for answer in answers] == [tuple(COLOUR_SCORES[colour] for colour in pair) for pair in pairs]
    prompt, answered = vlm.num_tokens.values()
    assert prompt > 9 * 3 * 16 and answered == 9 * 15 + 1  # 16 an image, 15 an answer
    vlm.close()
    expected = judge_at(name, url, readout="expected")
    with pytest.raises(ValueError, match=r"readout is 'expected', for which .* gives no logprobs: take 'direct'"):
        expected.check(replace(colour_question([0, 2]), readout="expected"))
    expected.close()


def refuses(vlm: RemoteVlm, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        vlm.check(colour_question([0, 2]))
    vlm.close()


def test_transformers_serve(served: tuple[str, str], tmp_path: Path) -> None:
    """It answers 200 to a question with pictures for a model of texts too, and 500 for one that is not there."""
    name, url = served
    assert_judges(name, url)
    refuses(judge_at("other", url), r"gives no answer .500: .*as reward.vlm give one of")
    refuses(judge_at(name, url.removesuffix("/v1")), "answers 404 to /chat/completions")
    small: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tokenizer = small_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **small, **ends)).save_pretrained(tmp_path)
    refuses(judge_at(str(tmp_path), url), "sees no pictures: a question with 3 has no more tokens than one without")


def test_litellm_in_front_of_it(
    served: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Under another name, with a key; a wrong key and a wrong name are one line each."""
    program = BIN / "litellm"
    if not program.is_file():
        pytest.skip("LiteLLM is not installed in MTEDITFLOW_SERVERS: pip install 'litellm[proxy]'")
    name, url = served
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
