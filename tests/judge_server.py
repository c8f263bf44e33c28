"""A judge's server on loopback, a real one over HTTP, that fails as servers do."""

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from mteditflow.config import RewardConfig
from mteditflow.reward.vlm_server import API_KEY, RemoteVlm

Raw = Callable[[BaseHTTPRequestHandler], None]  # writes its reply itself
Reply = tuple[int, Any] | tuple[int, Any, dict[str, str]] | Raw  # status, body (JSON, or text as it is), headers
SCORES = "<Turn1Score>4</Turn1Score><Turn2Score>2</Turn2Score>"


def completion(content: Any, **message: Any) -> dict[str, Any]:
    """A completion whose message has this content; of `message`, finish_reason, logprobs and usage go where they
    belong.
    """
    reason, logprobs = message.pop("finish_reason", "stop"), message.pop("logprobs", None)
    usage = message.pop("usage", {"prompt_tokens": 100, "completion_tokens": 20})
    message |= {"role": "assistant", "content": content}
    return {"choices": [{"message": message, "finish_reason": reason, "logprobs": logprobs}], "usage": usage}


class Server:
    """Serves model 'judge'; `reply` answers a question from its number and body. A question without pictures, by which
    a judge is checked, is answered with fewer tokens and not counted.
    """

    def __init__(self) -> None:
        self.reply: Callable[[int, dict[str, Any]], Reply] = lambda number, body: (200, completion(SCORES))
        self.models: Reply = (200, {"data": [{"id": "judge"}]})
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.num_open, self.most_open, self.lock = 0, 0, threading.Lock()
        self.is_stopping = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.headers.append(dict(self.headers))
                self.send(outer.models if self.path == "/v1/models" else (404, "no such path"))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.headers.append(dict(self.headers))
                if not any(part["type"] == "image_url" for part in body["messages"][1]["content"]):
                    self.send((200, completion("", usage={"prompt_tokens": 10, "completion_tokens": 1})))
                    return
                with outer.lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.num_open += 1
                    outer.most_open = max(outer.most_open, outer.num_open)
                reply = outer.reply(number, body) if self.path == "/v1/chat/completions" else (404, "no such path")
                with outer.lock:
                    outer.num_open -= 1
                self.send(reply)

            def send(self, reply: Reply) -> None:
                try:
                    if callable(reply):
                        reply(self)
                        return
                    body = reply[1]
                    data = (body if isinstance(body, str) else json.dumps(body)).encode()
                    self.send_response(reply[0])
                    for name, value in (reply[2] if len(reply) == 3 else {}).items():
                        self.send_header(name, value)
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                except OSError:  # the client has given up waiting
                    pass

            def log_message(self, format: str, *args: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        threading.Thread(target=lambda: self.http.serve_forever(poll_interval=0.01), daemon=True).start()

    def close(self) -> None:
        """Answer nobody any more."""
        self.is_stopping.set()
        self.http.shutdown()
        self.http.server_close()

    def wait(self, seconds: float = 20.0) -> None:
        """Wait until the server is closed."""
        self.is_stopping.wait(seconds)

    def hang(self, _: BaseHTTPRequestHandler) -> None:
        """Reply nothing."""
        self.wait()

    def trickle(self, handler: BaseHTTPRequestHandler) -> None:
        """Reply with good scores, a byte at a time, for seconds."""
        data = json.dumps(completion(SCORES)).encode()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        for byte in data:
            handler.wfile.write(bytes([byte]))
            self.wait(0.05)

    @property
    def config(self) -> RewardConfig:
        url = f"http://127.0.0.1:{self.http.server_port}/v1"
        return RewardConfig(judge="vlm", vlm="judge", url=url, consistency="none", timeout_s=20.0, max_wait_s=20.0)


def drop(handler: BaseHTTPRequestHandler) -> None:
    """Reply half a header, and hang up."""
    handler.wfile.write(b"HTTP/1.1 200 O")
    handler.close_connection = True


def flood(handler: BaseHTTPRequestHandler) -> None:
    """Reply without an end."""
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" " * 2**20)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.delenv(API_KEY, raising=False)
    server = Server()
    yield server
    server.close()


@pytest.fixture
def ask(server: Server) -> Iterator[Callable[..., RemoteVlm]]:
    """Makes judges at the server, and closes them."""
    made: list[RemoteVlm] = []

    def make(**values: Any) -> RemoteVlm:
        made.append(RemoteVlm(replace(server.config, **values), backoff_s=0.001))
        return made[-1]

    yield make
    for vlm in made:
        vlm.close()


def fails(call: Callable[[], object], message: str) -> str:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def nested(body: dict[str, Any], key: str) -> bool:
    return key in json.dumps(body)
