"""A VLM judge behind an OpenAI-compatible chat endpoint, such as vLLM's or SGLang's.

What goes wrong is one of four, and none becomes a score:

    a question's    status 400, 413, 422, a refusal, no text, too late, ...: an Answer with that fault
    an attempt's    status 500, a broken connection, no JSON: asked again, NUM_ATTEMPTS in all, then as above
    the server's    not there, 429, 502, 503, 504: waited for, at most reward.max_wait_s, then the run ends
    the user's      the key, the address, the model: the run ends at once, with one line

One event loop in a thread has the requests of all threads on their way, `reward.num_parallel` at once. So a deadline
is one for the whole of an exchange, however slowly its bytes come, and `close` ends them all.
"""

import asyncio
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import FIRST_EXCEPTION, CancelledError, Future, wait
from typing import Any

import httpx

from mteditflow.config.reward import RewardConfig
from mteditflow.record import ending
from mteditflow.reward.chat import Wording, read_completion, request
from mteditflow.reward.vlm import Answer, Question

API_KEY = "MTEDITFLOW_API_KEY"
"""Environment variable of the key, where the server wants one."""
CHAT = "/chat/completions"
NUM_ATTEMPTS = 3
MAX_BACKOFF_S = 10.0
CONNECT_S = 10.0
START_S = 30.0  # a server that is not there at the start is waited for no longer
MAX_ANSWER_BYTES = 2**24  # 1024 tokens with 20 likeliest each are 2 MiB
MAX_REDIRECTS = 3
BUSY = {408, 425, 429, 502, 503, 504, *range(520, 530)}


class Fault(Exception):
    """A question alone cannot be answered: `args` are kind (of types.FAULTS), and what more there is to say."""


class Refused(Exception):
    """The server refuses a request as it is put: `args` are its status and words."""


class Broken(Exception):
    """An attempt failed, another may not: `args` are what happened."""


class Down(Exception):
    """The server is not there, or busy: `args` are what happened, whether it is there, the seconds it asks to wait."""


class RemoteVlm:
    """`config.vlm` at `config.url`, from `check` to `close`."""

    is_remote = True

    def __init__(self, config: RewardConfig, backoff_s: float = 1.0) -> None:
        """backoff_s: seconds before the second attempt; they double with each. ValueError: a key that is none."""
        self.config, self.url, self.backoff_s = config, config.url.rstrip("/"), backoff_s
        self.num_tokens = {"prompt_tokens": 0, "completion_tokens": 0}  # of all answers, where the server counts
        self._key = read_key()
        self._wording, self._said = Wording(), set[str]()
        self._last_answer_s, self._waiting_since_s = 0.0, 0.0  # of the monotonic clock; 0: none, not
        self._places = asyncio.Semaphore(config.num_parallel)
        limits = httpx.Limits(max_connections=None)  # the semaphore's places bound them
        timeout = httpx.Timeout(None, connect=CONNECT_S)  # the rest is bounded as a whole
        self._client = httpx.AsyncClient(limits=limits, timeout=timeout, headers={"Accept-Encoding": "identity"})
        self._lock, self._is_closed = threading.Lock(), False  # no work is handed to a loop that ends
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="judge", daemon=True)
        self._thread.start()

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer per question. ValueError, one line: the server or a setting, not a question, is at fault."""
        if self._is_closed:
            raise RuntimeError("the judge is closed")
        futures, problems = list[Future[Answer]](), list[ValueError]()
        try:
            for question in questions:  # the first are on their way while the next are written
                futures.append(self._start(self._answer(request(question, self.config), question, problems)))
            waiting = set(futures)
            while waiting:
                done, waiting = wait(waiting, ending.PERIOD_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                ending.check()
            return [future.result() for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def check(self, question: Question) -> None:
        """Ask a question before anything is trained. ValueError, one line: such questions cannot be answered here."""
        self._start(self._check(request(question, self.config), question)).result()

    def close(self) -> None:
        """Have what is on its way end soon; the calls that wait for it raise CancelledError."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _start(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        with self._lock:
            if self._is_closed:  # since the call began
                work.close()
                raise CancelledError("the judge is closed")
            return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()

    async def _check(self, body: dict[str, Any], question: Question) -> None:
        names, refusal = await self._served_names()
        if names and self.config.vlm_path not in names:
            there = ", ".join(names[:5])
            self._say(f"reward.vlm {self.config.vlm!r} is not in the list of {self.url} ({there}): asked all the same")
        name = f"reward.url {self.url!r}"
        try:
            answer = await self._ask(body, question)
        except Fault as fault:
            kind, text = fault.args
            remedy = self._remedy(kind, text, body, question, names, refusal)
            raise ValueError(f"{name} gives no answer ({text}): {remedy}") from None
        if answer.fault == "form: no logprobs":
            raise ValueError(f"reward.readout is 'expected', for which {name} gives no logprobs: take 'direct'")
        await self._check_sight(body, len(question.images))
        if answer.fault:  # of pictures that are no edits, so no reason to stop
            self._say(f"reward.vlm {self.config.vlm!r}: no scores in a first answer ({answer.fault}): see judge check")

    def _remedy(
        self, kind: str, text: str, body: dict[str, Any], question: Question, names: list[str], refusal: str
    ) -> str:
        """What to do where a first question is not answered, by what the server says to it and to `/models`."""
        if kind == "late":
            return "raise reward.timeout_s, for the first answer reward.max_wait_s"
        if text.startswith("413"):
            return f"a question has {len(json.dumps(body)) / 2**20:.1f} MiB: let it take such bodies"
        if question.readout == "expected" and "logprob" in text:
            return "take reward.readout 'direct', which needs no logprobs"
        if names and self.config.vlm_path not in names:
            return f"as reward.vlm give one of {', '.join(names[:5])}"
        if refusal:  # some proxies answer 400 or 500 to a wrong key
            return f"it refuses its list of models too: is {API_KEY} right, and the address, up to and with /v1?"
        if kind == "broken":
            return "give the address of an OpenAI-compatible server, up to and with /v1"
        return f"it must take {len(question.images)} pictures in a question: see `mteditflow judge serve`"

    async def _check_sight(self, body: dict[str, Any], num_images: int) -> None:
        """Compare the tokens that a question has with and without its pictures, where the server counts them."""
        if not (before := self.num_tokens["prompt_tokens"]):
            return
        system, user = body["messages"]
        blind = {**user, "content": [part for part in user["content"] if part["type"] == "text"]}
        try:
            await self._complete({**body, "messages": [system, blind], "max_tokens": 1})
        except Fault:
            return
        if self.num_tokens["prompt_tokens"] == 2 * before:
            raise ValueError(
                f"reward.vlm {self.config.vlm!r} at {self.url!r} sees no pictures: a question with {num_images} has no "
                f"more tokens than one without: serve a vision-language model"
            )

    async def _served_names(self) -> tuple[list[str], str]:
        """The names that the server lists, and what it says where it refuses to; some have no list."""
        try:
            body = await self._attempts("GET", "/models", None)
        except Refused as error:
            return [], "" if error.args[0] in (404, 405) else error.args[1]
        except Fault as fault:
            return [], fault.args[1]
        models = body.get("data") if isinstance(body, dict) else None
        models = models if isinstance(models, list) else []
        return [str(model["id"]) for model in models if isinstance(model, dict) and "id" in model], ""

    async def _answer(self, body: dict[str, Any], question: Question, problems: list[ValueError]) -> Answer:
        """Ask, unless one of `problems`, of the same call, says that it is in vain: a place that a failed question
        frees is taken before the caller hears of it.
        """
        async with self._places:
            if problems:
                raise problems[0]
            try:
                return await self._ask(body, question)
            except Fault as fault:
                kind, text = fault.args
                return Answer(text="", grades=None, fault=f"{kind}: {text}")
            except ValueError as error:
                problems.append(error)
                raise

    async def _ask(self, body: dict[str, Any], question: Question) -> Answer:
        found = await self._complete(body)
        answer = read_completion(found, len(question.instructions), question.readout)
        if answer is None:
            raise Fault("broken", f"no completion: {self._shown(json.dumps(found))}")
        return Answer(
            text=self._without_key(answer.text), grades=answer.grades, fault=answer.fault, off_mass=answer.off_mass
        )

    async def _complete(self, body: dict[str, Any]) -> Any:
        """The body of a chat completion, put as the server wants it; how it does is remembered."""
        wording, tried, refused = self._wording, list[Wording](), None
        while True:
            tried.append(wording)
            try:
                found = await self._attempts("POST", CHAT, wording.put(body))
            except Refused as error:
                refused = refused or error
                is_new = not self._last_answer_s
                others = [other for other in wording.others(error.args[1], is_new=is_new) if other not in tried]
                if not others:
                    raise Fault("status", "{}: {}".format(*refused.args)) from None
                wording = others[0]
                continue
            self._last_answer_s = time.monotonic()
            if wording != self._wording:
                self._wording = wording
                self._say(f"reward.url {self.url} {wording}")
            usage = found.get("usage") if isinstance(found, dict) else None
            for name in self.num_tokens:
                count = usage.get(name) if isinstance(usage, dict) else None
                self.num_tokens[name] += count if isinstance(count, int) else 0
            return found

    async def _attempts(self, method: str, path: str, body: dict[str, Any] | None) -> Any:
        """The JSON of a reply; waits while the server is down, as long as it may."""
        data = None if body is None else json.dumps(body).encode()
        num_broken, num_down, since = 0, 0, 0.0
        while True:
            try:
                found = await self._try(method, path, data)
                self._say_waiting(None)
                return found
            except Broken as error:
                num_broken += 1
                if num_broken == NUM_ATTEMPTS:
                    raise Fault("broken", error.args[0]) from None
                pause = self.backoff_s * 2 ** (num_broken - 1)
            except Down as error:
                text, is_there, asked_s = error.args
                now, num_down, limit = time.monotonic(), num_down + 1, self.config.max_wait_s
                since = since or now
                if not is_there and not self._last_answer_s:
                    limit = min(limit, START_S)
                left = since + limit - now
                if left <= 0:
                    if self._last_answer_s > since:  # others are answered
                        raise Fault("status", text) from None
                    raise ValueError(
                        f"reward.url {self.url!r} gave no answer in {limit:g} s ({text}): start the judge's server "
                        f"there (docs/judge.md), or raise reward.max_wait_s"
                    ) from None
                if num_down > 1 and self._last_answer_s < since:
                    self._say_waiting(text, limit)
                pause = min(max(asked_s, self.backoff_s * 2 ** min(num_down - 1, 20)), left)
            await asyncio.sleep(min(pause, MAX_BACKOFF_S))

    async def _try(self, method: str, path: str, data: bytes | None) -> Any:
        """The JSON of one exchange, within its deadline; until the first answer the server may still load its model."""
        seconds = self.config.timeout_s
        if path == CHAT and not self._last_answer_s:
            seconds = max(seconds, self.config.max_wait_s)
        try:
            async with asyncio.timeout(seconds):
                status, pause, text = await self._exchange(method, self.url + path, data)
        except TimeoutError:
            raise Fault("late", f"nothing in {seconds:g} s") from None
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.ProxyError) as error:
            if not self._last_answer_s and isinstance(root_cause(error), socket.gaierror):
                raise ValueError(f"reward.url {self.url!r} has a host that is not known: correct it") from None
            raise Down(self._shown(f"{type(error).__name__}: {error}"), False, 0.0) from None
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise Broken(self._shown(f"{type(error).__name__}: {error}")) from None
        return self._read(status, pause, text, path)

    async def _exchange(self, method: str, url: str, data: bytes | None) -> tuple[int, float, str]:
        """Status, seconds that the server asks to wait, and text of a reply, at the end of its redirections."""
        for _ in range(MAX_REDIRECTS + 1):
            headers = {"Content-Type": "application/json"} if data else {}
            if self._key and is_same_host(self.url, url):
                headers["Authorization"] = f"Bearer {self._key}"
            async with self._client.stream(method, url, content=data, headers=headers) as response:
                if response.has_redirect_location:
                    url = str(response.url.join(response.headers["location"]))
                    is_same = is_same_host(self.url, url)
                    end = "write that" if is_same or not self._key else "which is sent no key: write that"
                    self._say(f"reward.url {self.url} redirects to {self._shown(url)}: {end}")
                    continue
                content = bytearray()
                async for chunk in response.aiter_bytes():
                    content += chunk
                    if len(content) > MAX_ANSWER_BYTES:
                        raise Fault("too_large", f"an answer of more than {MAX_ANSWER_BYTES >> 20} MiB")
                pause = response.headers.get("retry-after", "")
                return response.status_code, float(pause) if pause.isdigit() else 0.0, content.decode(errors="replace")
        raise ValueError(f"reward.url {self.url!r} redirects more than {MAX_REDIRECTS} times: give the address behind")

    def _read(self, status: int, pause: float, text: str, path: str) -> Any:
        """The JSON of a reply, or what its status means."""
        shown, name = self._shown(text), f"reward.url {self.url!r} answers {status}"
        if path == CHAT and (status == 401 or (status == 403 and not self._last_answer_s)):
            raise ValueError(f"{name}, it wants another key: set the environment variable {API_KEY}")
        if status in (404, 405) and path == CHAT:
            raise ValueError(
                f"{name} to {path} ({shown}): give the address up to and with /v1, and as reward.vlm a served name"
            )
        if status in BUSY:
            raise Down(f"{status}: {shown}", True, pause)
        if status >= 500:
            raise Broken(f"{status}: {shown}")
        if not 200 <= status < 300:
            raise Refused(status, shown)
        try:
            body = json.loads(text)
        except ValueError:
            raise Broken(f"no JSON: {shown}") from None
        error = body.get("error") if isinstance(body, dict) and not body.get("choices") else None
        if error:  # some say so under status 200
            code = error.get("code") if isinstance(error, dict) else None
            return self._read(code if isinstance(code, int) and 400 <= code < 600 else 500, pause, text, path)
        return body

    def _without_key(self, text: str) -> str:
        for form in (self._key, json.dumps(self._key)[1:-1], self._key.replace("/", "\\/")):  # as JSON may write it
            text = text.replace(form, "***") if form else text
        return text

    def _shown(self, text: str) -> str:
        """A server's words as a message may hold them: one short line, without the key."""
        return " ".join(self._without_key(text).split())[:160]

    def _say(self, line: str) -> None:
        """Print a line once."""
        if line not in self._said:
            self._said.add(line)
            print_line(line)

    def _say_waiting(self, text: str | None, limit: float = 0.0) -> None:
        """Print a line where waiting for the server begins, and where it ends (None)."""
        if text and not self._waiting_since_s:
            self._waiting_since_s = time.monotonic()
            print_line(f"reward.url {self.url} is down ({text}): waiting up to {limit:g} s")
        elif text is None and self._waiting_since_s:
            seconds, self._waiting_since_s = time.monotonic() - self._waiting_since_s, 0.0
            print_line(f"reward.url {self.url} answers again after {seconds:.0f} s")


def print_line(line: str) -> None:
    """Print a line on stderr, which a progress bar shows above itself; of several ranks the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(line, file=sys.stderr, flush=True)


def read_key() -> str:
    """The key of the environment, '' where there is none. ValueError: characters that no header holds."""
    key = os.environ.get(API_KEY, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(f"{API_KEY} holds blanks, control characters or other than ASCII: set it to the key alone")
    return key


def is_same_host(first: str, second: str) -> bool:
    """Whether the key for one address may go to another: the same host and port, not from https down to http."""
    a, b = httpx.URL(first), httpx.URL(second)
    is_upgrade = (a.scheme, b.scheme, a.port, b.port) == ("http", "https", None, None)
    return a.host == b.host and (is_upgrade or (a.scheme, a.port) == (b.scheme, b.port))


def root_cause(error: BaseException) -> BaseException:
    """The error at the bottom of a chain."""
    while following := error.__cause__ or error.__context__:
        error = following
    return error
