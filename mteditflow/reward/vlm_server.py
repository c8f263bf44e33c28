"""A VLM judge behind an OpenAI-compatible chat endpoint (vLLM, SGLang).

A server that is busy or restarts is waited for, a bounded number of times; one that is down, refuses the key or does
not have the model stops the run with one line. Nothing of that becomes a score.
"""

import base64
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
from mteditflow_kernels import counter_uniform
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential
from torch import Tensor

from mteditflow.config.reward import RewardConfig
from mteditflow.pictures import png_bytes, to_pil
from mteditflow.reward.vlm import Answer, Question, answer_of

API_KEY = "MTEDITFLOW_API_KEY"
"""Environment variable of the key, where the server wants one."""
NUM_ATTEMPTS, MAX_BACKOFF_S = 6, 30.0  # 1 + 2 + 4 + 8 + 16 s in all between them


class UnavailableError(RuntimeError):
    """The server gave no answer this time; another attempt may get one."""


class RemoteVlm:
    """`config.vlm` at `config.url`. ValueError, one line: no such model or no server there."""

    is_remote = True

    def __init__(self, config: RewardConfig, backoff_s: float = 1.0) -> None:
        """backoff_s: seconds before the second attempt; they double with each."""
        self.config, self.url = config, config.url.rstrip("/")
        key = os.environ.get(API_KEY)
        self._client = httpx.Client(
            timeout=httpx.Timeout(config.timeout_s, connect=min(10.0, config.timeout_s)),
            limits=httpx.Limits(max_connections=config.num_parallel),
            headers={"Authorization": f"Bearer {key}"} if key else {},
        )
        self._retrying = Retrying(
            stop=stop_after_attempt(NUM_ATTEMPTS),
            wait=wait_exponential(multiplier=backoff_s, max=MAX_BACKOFF_S),
            retry=retry_if_exception_type(UnavailableError),
            reraise=True,
        )
        self._check_model()

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer per question, `config.num_parallel` on their way at once."""
        pool = ThreadPoolExecutor(self.config.num_parallel)
        try:
            texts = list(pool.map(self._ask, questions))
        finally:
            pool.shutdown(cancel_futures=True)
        return [answer_of(text, len(q.instructions)) for text, q in zip(texts, questions, strict=True)]

    def close(self) -> None:
        """Have what is on its way fail."""
        self._client.close()

    def request(self, question: Question) -> dict[str, Any]:
        """The body of a chat completion."""
        content = [
            {"type": "text", "text": part}
            if isinstance(part, str)
            else {"type": "image_url", "image_url": {"url": data_url(part)}}
            for part in question.parts
        ]
        return {
            "model": self.config.vlm,
            "messages": [{"role": "system", "content": question.rubric}, {"role": "user", "content": content}],
            "max_tokens": self.config.max_answer_tokens,
            "temperature": self.config.temperature,
            "seed": int(counter_uniform(question.key[None], 1).item() * 2**24),
        }

    def _check_model(self) -> None:
        """Before the first rollout, not after it."""
        body = self._send("GET", "/models", None)
        names = [str(model.get("id")) for model in _list(body, "data")]
        if self.config.vlm not in names:
            raise ValueError(
                f"reward.vlm {self.config.vlm!r} is not served at reward.url {self.url!r}: there is "
                f"{', '.join(names) or 'no model'}"
            )

    def _ask(self, question: Question) -> str:
        body = self._send("POST", "/chat/completions", self.request(question))
        choices = _list(body, "choices")
        message = choices[0].get("message") if choices else None
        if not isinstance(message, dict):
            raise ValueError(
                f"reward.url {self.url!r} answers, but is no OpenAI-compatible endpoint: {str(body)[:120]}"
            )
        return message.get("content") or ""

    def _send(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        try:
            return self._retrying.copy()(self._try, method, path, body)
        except UnavailableError as error:
            raise ValueError(
                f"reward.url {self.url!r} gave no answer in {NUM_ATTEMPTS} attempts ({error}): start the judge's "
                f"server there (docs/judge.md), or raise reward.timeout_s"
            ) from error

    def _try(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        try:
            response = self._client.request(method, self.url + path, json=body)
        except httpx.TransportError as error:
            raise UnavailableError(f"{type(error).__name__}: {error}") from error
        status, text = response.status_code, " ".join(response.text.split())[:160]
        if status == 429 or status >= 500:
            raise UnavailableError(f"status {status}: {text}")
        name = f"reward.url {self.url!r} answers {status}"
        if status in (401, 403):
            raise ValueError(f"{name}, it wants another key: set the environment variable {API_KEY}")
        if status == 404:
            raise ValueError(f"{name} to {path}: give the address up to and with /v1, and as reward.vlm a served name")
        if not response.is_success:
            raise ValueError(f"{name} to {path} ({text}): start the server as docs/judge.md says")
        try:
            return response.json()
        except ValueError:
            remedy = "give the address of an OpenAI-compatible server"
            raise ValueError(f"{name} with {text!r}, which is no JSON: {remedy}") from None


def data_url(image: Tensor) -> str:
    """An image (3, h, w) uint8 as a PNG in base64."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(to_pil(image))).decode()


def _list(body: Any, name: str) -> list[dict[str, Any]]:
    """body[name] where it is a list of objects, else nothing."""
    values = body.get(name) if isinstance(body, dict) else None
    return [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []
