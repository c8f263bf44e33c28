"""What of a judge's server stops a run, and what is waited for."""

import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import pytest
from judge_server import SCORES, Reply, Server, completion, fails, nested
from tiny_judge import colour_question

from mteditflow.config import Config, RewardConfig
from mteditflow.reward import build_reward
from mteditflow.reward.vlm_server import API_KEY, NUM_ATTEMPTS, RemoteVlm

QUESTION = colour_question([0, 2])
KEY = "sk-very/secret"


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, "who?"), f"answers 401, it wants another key: set the environment variable {API_KEY}"),
        ((403, "who?"), f"answers 403, it wants another key: set the environment variable {API_KEY}"),
        ((404, "nothing"), "answers 404 to /chat/completions .nothing.: give the address up to and with /v1"),
        ((405, "nothing"), "answers 405 to /chat/completions"),
        ((400, {"error": "judge is not a multimodal model"}), "400: .*not a multimodal model.*take 3 pictures"),
        ((400, {"error": "At most 1 image(s)"}), r"At most 1 image\(s\).* see `mteditflow judge serve`"),
        ((413, "too large"), "413: too large.: a question has 0.0 MiB: let it take such bodies"),
        ((200, {"result": "ok"}), "no completion: .*: give the address of an OpenAI-compatible server"),
        ((200, "<html>\nhi"), "no JSON: <html> hi.: give the address of an OpenAI-compatible server"),
        ((500, "oops"), "500: oops"),
        ((200, completion(SCORES, usage={"prompt_tokens": 10})), "'judge' at .* sees no pictures: a question with 3"),
    ],
)
def test_a_server_that_is_no_judge_is_found_at_once(
    server: Server, ask: Callable[..., RemoteVlm], reply: Reply, message: str
) -> None:
    server.reply = lambda number, _: reply
    fails(lambda: ask().check(QUESTION), message)


@pytest.mark.parametrize(
    ("models", "message"),
    [
        ((400, "No connected db."), f"is {API_KEY} right, and the address, up to and with /v1"),
        ((500, "Internal Server Error"), f"is {API_KEY} right, and the address, up to and with /v1"),
        ((200, {"data": [{"id": "other"}]}), "as reward.vlm give one of other"),
    ],
)
def test_what_a_proxy_says_to_a_wrong_key_or_name(
    server: Server, ask: Callable[..., RemoteVlm], models: Reply, message: str
) -> None:
    """LiteLLM without a database: 500 without a key, 400 with a wrong one and for a model that it does not have."""
    server.models, server.reply = models, lambda number, _: (400, {"error": "no"})
    fails(lambda: ask().check(QUESTION), f"gives no answer .400: .*: .*{message}")


def test_what_is_known_later_stops_the_run_too(server: Server, ask: Callable[..., RemoteVlm]) -> None:
    """A key that is withdrawn, a model that is gone; all others that are on their way end."""
    vlm = ask(num_parallel=2)
    vlm.check(QUESTION)
    for status in (401, 404):
        server.reply = lambda number, _, status=status: (status, "gone")
        fails(lambda: vlm([QUESTION] * 30), f"answers {status}")
    assert len(server.bodies) < 20


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_server_is_asked_again(server: Server, ask: Callable[..., RemoteVlm], status: int) -> None:
    server.reply = lambda number, _: (status, "busy") if number < NUM_ATTEMPTS - 1 else (200, completion("done"))
    (answer,) = ask()([QUESTION])
    assert answer.text == "done" and len(server.bodies) == NUM_ATTEMPTS


def test_a_server_that_stays_away_stops_the_run(
    server: Server, ask: Callable[..., RemoteVlm], capfd: pytest.CaptureFixture[str]
) -> None:
    """Busy, and then down, before the first question and between two: after max_wait_s, with one line at its start."""
    vlm = ask(max_wait_s=0.05)
    vlm.check(QUESTION)
    server.reply = lambda number, _: (503, "over\nloaded")
    message = (
        r"gave no answer in 0.05 s \({}.*: start the judge's server there .docs/judge.md., or raise reward.max_wait_s"
    )
    fails(lambda: vlm([QUESTION]), message.format("503: over loaded"))
    server.close()
    fails(lambda: vlm([QUESTION] * 20), message.format("ConnectError"))
    fails(lambda: ask(max_wait_s=0.05).check(QUESTION), message.format("ConnectError"))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 2 and all("is down" in line and "waiting up to 0.05 s" in line for line in lines)


def test_a_server_that_restarts_is_waited_for(
    server: Server, ask: Callable[..., RemoteVlm], capfd: pytest.CaptureFixture[str]
) -> None:
    """Its first replies after the restart are that it loads; no question is lost, and two lines say so."""
    vlm = ask(num_parallel=4)
    vlm.check(QUESTION)
    server.reply = lambda number, _: (503, "loading") if number < 30 else (200, completion(SCORES))
    assert [answer.grades for answer in vlm([QUESTION] * 8)] == [(4, 2)] * 8
    first, second = capfd.readouterr().err.splitlines()
    assert "is down (503: loading): waiting up to 20 s" in first and "answers again after" in second


def test_one_question_that_is_never_answered_is_not_a_server_that_is_down(
    server: Server, ask: Callable[..., RemoteVlm]
) -> None:
    """Its connections are refused service while those of others are not."""
    bad = colour_question([0, 2], ["bad", "b"])
    server.reply = lambda number, body: (429, "not you") if nested(body, "bad") else (200, completion(SCORES))
    vlm = ask(max_wait_s=0.3, num_parallel=2)
    vlm.check(QUESTION)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(vlm, [bad])
        while not asked.done():
            vlm([QUESTION])
        assert asked.result()[0].fault.startswith("status: 429: not you")


def test_a_first_answer_may_take_longer(server: Server, ask: Callable[..., RemoteVlm]) -> None:
    """A server that loads its model when it is asked: reward.max_wait_s then, reward.timeout_s later."""

    def reply(number: int, body: dict[str, Any]) -> Reply:
        server.wait(0.3)
        return 200, completion(SCORES)

    server.reply = reply
    vlm = ask(timeout_s=0.05)
    vlm.check(QUESTION)
    (answer,) = vlm([QUESTION])
    assert answer.fault == "late: nothing in 0.05 s"
    fails(lambda: ask(timeout_s=0.05, max_wait_s=0.05).check(QUESTION), "nothing in 0.05 s.: raise reward.timeout_s")


def test_a_host_that_is_not_known(server: Server) -> None:
    vlm = RemoteVlm(replace(server.config, url="http://no-such-host.invalid/v1"))
    fails(lambda: vlm.check(QUESTION), "has a host that is not known")
    vlm.close()


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "mteditflow.reward.vlm_server")
    monkeypatch.setitem(sys.modules, "httpx", None)
    config = RewardConfig(judge="vlm", url="http://127.0.0.1:1/v1")
    fails(lambda: build_reward(Config(reward=config)), r"reward.url needs the package httpx: pip install 'mteditflow")
