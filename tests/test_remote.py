"""The judge behind a server: a real HTTP server in a thread, with its failures."""

import base64
import io
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_MAX_TEXT_TOKENS
from PIL import Image
from rollouts import rollout_of
from tiny_judge import colour_question, save_dino

from mteditflow.config import Config, RewardConfig
from mteditflow.config.command import train as main
from mteditflow.record.metrics import read_lines
from mteditflow.reward import build_reward
from mteditflow.reward.vlm import RUBRIC, VlmJudge
from mteditflow.reward.vlm_server import API_KEY, NUM_ATTEMPTS, RemoteVlm
from mteditflow.types import FAULTS, EditTask

Reply = tuple[int, Any]  # status and body: JSON, or text as it is
SCORES = "<Turn1Score>4</Turn1Score><Turn2Score>2</Turn2Score>"


def completion(text: str | None) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}]}


class Server:
    """Serves model 'judge'; `reply` answers a question from its number and body."""

    def __init__(self) -> None:
        self.reply: Callable[[int, dict[str, Any]], Reply] = lambda number, body: (200, completion(SCORES))
        self.models: Reply = (200, {"data": [{"id": "judge"}]})
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.num_open, self.most_open, self.lock = 0, 0, threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.headers.append(dict(self.headers))
                self.send(outer.models if self.path == "/v1/models" else (404, "no such path"))

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
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
                status, body = reply
                data = (body if isinstance(body, str) else json.dumps(body)).encode()
                try:
                    self.send_response(status)
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

    @property
    def config(self) -> RewardConfig:
        url = f"http://127.0.0.1:{self.http.server_port}/v1"
        return RewardConfig(judge="vlm", vlm="judge", url=url, consistency="none", timeout_s=20.0)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(API_KEY, raising=False)
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def ask(server: Server, **values: Any) -> RemoteVlm:
    return RemoteVlm(replace(server.config, **values), backoff_s=0.001)


def fails(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_what_the_server_is_sent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts and lossless images in the order of the question; sampling, and a seed of the question's own."""
    monkeypatch.setenv(API_KEY, "secret")
    first = colour_question([0, 2], ["make it red", "make it blue"])
    second = replace(first, key=first.key + 1)
    vlm = ask(server, temperature=0.3, max_answer_tokens=77, num_parallel=1)
    assert [answer.text for answer in vlm([first, second, first])] == [SCORES] * 3
    body = server.bodies[0]
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0.3, 77)
    assert server.bodies[0] == server.bodies[2] and server.bodies[0]["seed"] != server.bodies[1]["seed"]
    system, user = body["messages"]
    assert system == {"role": "system", "content": RUBRIC} and user["role"] == "user"
    for part, sent in zip(first.parts, user["content"], strict=True):
        if isinstance(part, str):
            assert sent == {"type": "text", "text": part}
        else:
            head, data = sent["image_url"]["url"].split(",")
            picture = np.array(Image.open(io.BytesIO(base64.b64decode(data))))
            assert head == "data:image/png;base64" and torch.equal(torch.from_numpy(picture).permute(2, 0, 1), part)
    assert server.headers[0]["Authorization"] == "Bearer secret"


def test_answers_keep_their_order_and_the_server_its_limit(server: Server) -> None:
    """Later questions are answered sooner, three at once and no more."""

    def reply(number: int, body: dict[str, Any]) -> Reply:
        time.sleep(0.02 + 0.05 * (number % 3 == 0))
        return 200, completion(body["messages"][1]["content"][2]["text"])

    server.reply = reply
    questions = [colour_question([0], [str(i)]) for i in range(9)]
    answers = ask(server, num_parallel=3)(questions)
    assert [answer.text for answer in answers] == [f"Turn 1. Instruction: {i}\nImage after turn 1:" for i in range(9)]
    assert server.most_open == 3


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, status: int) -> None:
    server.reply = lambda number, _: (status, "busy") if number < NUM_ATTEMPTS - 1 else (200, completion("done"))
    (answer,) = ask(server)([colour_question([0], ["a"])])
    assert answer.text == "done" and len(server.bodies) == NUM_ATTEMPTS


def test_a_server_that_stays_busy_stops_the_run(server: Server) -> None:
    server.reply = lambda number, _: (503, "over\nloaded")
    vlm = ask(server)
    message = r"reward.url .* gave no answer in 6 attempts \(status 503: over loaded\): start the judge's server"
    fails(lambda: vlm([colour_question([0], ["a"])]), message)
    assert len(server.bodies) == NUM_ATTEMPTS


def test_a_slow_server_stops_the_run(server: Server) -> None:
    released = threading.Event()
    server.reply = lambda number, _: (released.wait(20), (200, completion("late")))[1]
    vlm = ask(server, timeout_s=0.1)
    try:
        fails(lambda: vlm([colour_question([0], ["a"])]), "in 6 attempts .ReadTimeout.* or raise reward.timeout_s")
    finally:
        released.set()


def test_a_server_that_is_down(server: Server) -> None:
    """Before the first question, and between two."""
    vlm = ask(server)
    server.http.shutdown()
    server.http.server_close()
    fails(lambda: vlm([colour_question([0], ["a"])]), "gave no answer in 6 attempts .ConnectError")
    fails(lambda: ask(server), "gave no answer in 6 attempts .ConnectError")


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ((401, "who?"), f"answers 401, it wants another key: set the environment variable {API_KEY}"),
        ((404, "nothing"), "answers 404 to /models: give the address up to and with /v1"),
        ((200, {"data": [{"id": "other"}, {"id": "third"}]}), "'judge' is not served at .* there is other, third"),
        ((200, ["judge"]), "'judge' is not served at .* there is no model"),
        ((200, "<html>hello</html>"), "with '<html>hello</html>', which is no JSON"),
    ],
)
def test_a_server_that_is_no_judge(server: Server, models: Reply, message: str) -> None:
    server.models = models
    fails(lambda: ask(server), message)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, "who?"), "answers 401, it wants another key"),
        ((404, "nothing"), "answers 404 to /chat/completions"),
        ((400, {"error": "at most 1 image(s)"}), r"answers 400 .*at most 1 image\(s\).* as docs/judge.md says"),
        ((200, {"result": "ok"}), "answers, but is no OpenAI-compatible endpoint"),
        ((200, "ok"), "which is no JSON"),
    ],
)
def test_answers_that_no_retry_can_mend(server: Server, reply: Reply, message: str) -> None:
    server.reply = lambda number, _: reply
    vlm = ask(server)
    fails(lambda: vlm([colour_question([0], ["a"])] * 3), message)
    assert len(server.bodies) <= 3  # each question once


def test_scores_and_answers_that_cannot_be_read(server: Server) -> None:
    """Rows 1 and 3 get no text or an unfinished one, over and over: invalid, not 0. The others are scored."""
    by_instruction = {"a1": None, "a3": "<Turn1Score>4</Turn1Sc"}

    def reply(number: int, body: dict[str, Any]) -> Reply:
        name = body["messages"][1]["content"][2]["text"].split()[3]
        return 200, completion(by_instruction.get(name, SCORES))

    server.reply = reply
    judge = VlmJudge(server.config, ask(server))
    tasks = [
        EditTask(id=i, source=torch.zeros(3, 8, 8), instructions=(f"a{i}", "b"), edit_types=("", "")) for i in range(4)
    ]
    score = judge(rollout_of(tasks, torch.zeros(2, 4, 3, 8, 8)))
    assert score.values[[0, 2]].tolist() == [[0.75, 0.25]] * 2
    assert score.values[[1, 3]].isnan().all() and len(server.bodies) == 4 + 2 + 2
    assert score.words == (SCORES, "", SCORES, "<Turn1Score>4</Turn1Sc") and score.faults is not None
    assert [FAULTS[fault] for fault in score.faults] == ["", "form", "", "form"]
    seeds = {body["seed"] for body in server.bodies}
    assert len(seeds) == len(server.bodies)  # a retry has another seed


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mteditflow.reward.vlm_server")
    monkeypatch.setitem(sys.modules, "httpx", None)
    config = RewardConfig(judge="vlm", url="http://127.0.0.1:1/v1")
    fails(lambda: build_reward(Config(reward=config)), r"reward.url needs the package httpx: pip install 'mteditflow")


def test_a_run_with_a_judge_behind_a_server(
    server: Server, tiny_pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole program: the paper's two rewards move the adapter; then the server goes, and the run says so."""
    save_dino(tmp_path / "dino", "dinov3")

    def reply(number: int, body: dict[str, Any]) -> Reply:
        score = 1 + body["seed"] % 5
        return 200, completion("?" if number == 0 else f"<Turn1Score>{score}</Turn1Score><Turn2Score>2</Turn2Score>")

    server.reply = reply
    values = {
        "model.path": tiny_pipeline_folder, "model.max_text_tokens": TINY_MAX_TEXT_TOKENS, "lora.rank": 2,
        "data.num_turns": 2, "rollout.num_tasks": 1, "rollout.group_size": 6, "rollout.num_steps": 3,
        "evaluation.num_sessions": 2, "evaluation.num_sessions_short": 1, "evaluation.num_strips": 1,
        "evaluation.num_steps": 1, "evaluation.every": 0, "reward.judge": "vlm", "reward.vlm": "judge",
        "reward.url": server.config.url, "reward.num_retries": 0, "reward.consistency": tmp_path / "dino",
        "reward.readout": "direct", "run.num_iterations": 2, "run.folder": tmp_path / "run",
    }  # fmt: skip
    arguments = [word for name, value in values.items() for word in (f"--{name}", str(value))]
    main(arguments)
    first, second = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert first["reward/valid_share"] == pytest.approx(5 / 6) and second["reward/valid_share"] == 1
    scores = [1 + body["seed"] % 5 for body in server.bodies[6:]]
    assert second["reward/turn_1"] == pytest.approx(sum(scores) / 6 / 4 - 0.25) and second["reward/turn_2"] == 0.25
    assert 0 < second["reward/consistency"] < 1 and second["update/grad_norm"] > 0
    server.models = (401, "")
    with pytest.raises(SystemExit) as exited:
        main([*arguments, "--run.num_iterations", "3"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert exited.value.code == 2 and said.startswith("mteditflow: reward.url") and API_KEY in said
