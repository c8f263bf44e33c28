"""`mteditflow judge serve`: the command that serves the judge of a config where `reward.url` says, and runs it.

Each server gets as many pictures per question as the turns and the reference images need, and room for the question
and the longest answer. Where the data is not on this machine, it serves sessions without references.
None is told to trust code that a model brings along.
"""

import json
import math
import os
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from importlib.util import find_spec
from urllib.parse import urlsplit

from mteditflow.config import Config
from mteditflow.config.ranges import require
from mteditflow.data import count_references

LOCAL = ("localhost", "127.0.0.1", "::1", "")
KEY = "$MTEDITFLOW_API_KEY"
MIN_CONTEXT, CONTEXT_STEP = 8192, 1024
QUESTION_TOKENS, IMAGE_TOKENS = 750, 400  # half as much again as Qwen3-VL has, for other tokenizers


@dataclass(frozen=True, kw_only=True)
class Server:
    """A program that serves models."""

    package: str
    modules: tuple[str, ...]  # that it needs
    words: list[str]  # of the command
    environment: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """The command as a shell takes it; the key is named, not written."""
        words = [f'"{KEY}"' if word == KEY else shlex.quote(word) for word in self.words]
        return " ".join([*(f'{name}="{value}"' for name, value in self.environment.items()), *words])

    @property
    def is_installed(self) -> bool:
        """Whether it can be run here."""
        return shutil.which(self.words[0]) is not None and all(find_spec(name) for name in self.modules)


def serve_judge(config: Config, *, is_started: bool) -> int:
    """Print the commands, or run the first one that is installed and return its exit code. ValueError: none is."""
    reward = config.reward
    require(reward.judge == "vlm", "reward.judge", reward.judge, "must be 'vlm': no other is served")
    found = servers(config)
    if not is_started:
        for server in found:
            print(f"# {server.package}{' (installed)' if server.is_installed else ''}\n{server}")
        print(f"# then: --reward.url {_address(reward.url)}")
        return 0
    for server in found:
        if server.is_installed:
            print(server, flush=True)
            key = os.environ.get(KEY[1:], "").strip()
            environment = {name: key for name in server.environment}
            return subprocess.call(
                [key if word == KEY else word for word in server.words], env={**os.environ, **environment}
            )
    raise ValueError("--start: no server is installed here: pip install vllm, or sglang, where the GPUs are")


def servers(config: Config) -> list[Server]:
    """The servers that can serve the judge of a config, best first."""
    reward, num_references = config.reward, count_references(config)[1]
    num_images = 1 + num_references + max(config.data.num_turns, config.num_held_out_turns)
    address = urlsplit(_address(reward.url))
    port = address.port or {"http": 80, "https": 443}[address.scheme]
    place = ["--host", "127.0.0.1" if address.hostname in LOCAL else "0.0.0.0", "--port", str(port)]
    context, limit = str(context_length(num_images, reward.max_answer_tokens)), json.dumps({"image": num_images})
    has_key = bool(os.environ.get(KEY[1:], "").strip())
    vllm = ["vllm", "serve", reward.vlm_path, *place, "--limit-mm-per-prompt", limit, "--max-model-len", context]
    sglang = ["python", "-m", "sglang.launch_server", "--model-path", reward.vlm_path, *place]
    sglang += ["--limit-mm-data-per-request", limit, "--context-length", context]
    sglang += ["--api-key", KEY] if has_key else []
    found = [
        Server(package="vllm", modules=("vllm",), words=vllm, environment={"VLLM_API_KEY": KEY} if has_key else {}),
        Server(package="sglang", modules=("sglang",), words=sglang),
    ]
    if reward.readout != "expected" and not has_key:  # it gives no logprobs, and asks for no key
        words = ["transformers", "serve", reward.vlm_path, *place]
        found.append(Server(package="transformers", modules=("fastapi", "uvicorn", "openai"), words=words))
    return found


def context_length(num_images: int, max_answer_tokens: int) -> int:
    """Tokens that a question with its answer may have."""
    num = QUESTION_TOKENS + IMAGE_TOKENS * num_images + max_answer_tokens
    return max(MIN_CONTEXT, CONTEXT_STEP * math.ceil(num / CONTEXT_STEP))


def _address(url: str) -> str:
    return url or "http://localhost:8000/v1"
