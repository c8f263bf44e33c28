"""The judge behind a server: a real HTTP server in a thread, with its failures."""

import asyncio
import base64
import io
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import CancelledError, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_MAX_TEXT_TOKENS
from judge_server import SCORES, Reply, Server, completion, drop, fails, flood, nested
from PIL import Image
from rollouts import rollout_of
from tiny_judge import colour_question, save_dino

from mteditflow.config.cli import from_yaml
from mteditflow.config.command import train as main
from mteditflow.record.checkpoint import load_latest
from mteditflow.record.metrics import read_lines
from mteditflow.reward.vlm import RUBRIC, VlmJudge
from mteditflow.reward.vlm_server import API_KEY, RemoteVlm
from mteditflow.types import FAULTS, EditTask

QUESTION = colour_question([0, 2])
KEY = "sk-very/secret"


def test_what_the_server_is_sent(
    server: Server, ask: Callable[..., RemoteVlm], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts and lossless images in the order of the question; sampling, and a seed of the question's own."""
    monkeypatch.setenv(API_KEY, " secret\n")
    first = colour_question([0, 2], ["make it red", "make it blue"])
    second = replace(first, key=first.key + 1)
    vlm = ask(temperature=0.3, max_answer_tokens=77, num_parallel=1)
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
    assert all(headers["Authorization"] == "Bearer secret" for headers in server.headers)


# One question


SINGLE: dict[str, tuple[Callable[[Server], Reply], str]] = {
    "status 400": (lambda _: (400, {"error": {"message": "flagged by the content filter"}}), "status"),
    "status 403": (lambda _: (403, {"error": "moderation"}), "status"),
    "status 413": (lambda _: (413, "<html>too large</html>"), "status"),
    "status 422": (lambda _: (422, {"detail": "no"}), "status"),
    "status 500": (lambda _: (500, "Internal Server Error"), "broken"),
    "an error under status 200": (lambda _: (200, {"error": {"code": 400, "message": "no"}}), "status"),
    "cut": (lambda _: (200, completion("<Thought>Turn 1 is", finish_reason="length")), "cut"),
    "cut within the scores": (lambda _: (200, completion(SCORES[:-1], finish_reason="length")), "cut"),
    "cut while thinking": (lambda _: (200, completion(f"<think>{SCORES}", finish_reason="length")), "cut"),
    "no content": (lambda _: (200, completion(None)), "empty"),
    "thoughts alone": (lambda _: (200, completion(None, reasoning_content=SCORES)), "empty"),
    "blanks": (lambda _: (200, completion(" \n")), "empty"),
    "no choices": (lambda _: (200, {"choices": []}), "empty"),
    "a refusal": (lambda _: (200, completion(None, refusal="I cannot help")), "refused"),
    "a filter": (lambda _: (200, completion(SCORES, finish_reason="content_filter")), "refused"),
    "a refusal in words": (lambda _: (200, completion("I'm sorry, I can't assist with that.")), "form"),
    "another language": (lambda _: (200, completion("<第一轮分数>4</第一轮分数><第二轮分数>2</第二轮分数>")), "form"),
    "digits of another script": (lambda _: (200, completion(SCORES.replace("4", "\uff14"))), "form"),
    "no completion": (lambda _: (200, {"result": "ok"}), "broken"),
    "no JSON": (lambda _: (200, "<html>hello</html>"), "broken"),
    "a broken connection": (lambda _: drop, "broken"),
    "no end": (lambda _: flood, "too_large"),
    "no reply": (lambda server: server.hang, "late"),
    "a byte at a time": (lambda server: server.trickle, "late"),
}
"""What may befall one question: a reply, and the fault that it is."""
FINE: dict[str, tuple[Any, dict[str, Any]]] = {
    "parts": ([{"type": "thinking", "text": "?"}, {"type": "text", "text": SCORES}], {}),
    "two parts": ([{"type": "text", "text": SCORES[:30]}, {"type": "text", "text": SCORES[30:]}], {}),
    "reasoning_content": (SCORES, {"reasoning_content": SCORES.replace("4", "1")}),
    "reasoning": (SCORES, {"reasoning": "<Turn1Score>1</Turn1Score>"}),
    "a thought": (f"<think>{SCORES.replace('4', '1')}</think>\n{SCORES}", {}),
    "a thought that the prompt began": (f"so {SCORES.replace('4', '1')}</think>{SCORES}", {}),
    "two thoughts": (f"<think>so</think><Thought>{SCORES.replace('4', '3')}</Thought>{SCORES}", {}),
    "Markdown": (f"**Scores**\n```xml\n{SCORES}\n```\nDone.", {}),
    "bold digits": ("**<Turn1Score>**4**</Turn1Score>**\n- `<Turn2Score>` 2 `</Turn2Score>`", {}),
    "the very end": (SCORES, {"finish_reason": "length"}),
}
"""Contents and fields of messages that hold the scores 4 and 2."""


@pytest.mark.parametrize("name", FINE)
def test_scores_are_read_as_servers_give_them(server: Server, ask: Callable[..., RemoteVlm], name: str) -> None:
    content, fields = FINE[name]
    server.reply = lambda number, _: (200, completion(content, **fields))
    (answer,) = ask()([QUESTION])
    assert answer.grades == (4, 2) and answer.fault == ""


@pytest.mark.parametrize("name", SINGLE)
def test_a_question_that_fails_is_one_invalid_trajectory(
    server: Server, ask: Callable[..., RemoteVlm], name: str
) -> None:
    """One in five calls fails in this way: those have no score and this fault, the others all have theirs.

    What replies for seconds, or never, would be read as good scores by a judge without a deadline.
    """
    reply, fault = SINGLE[name]
    num = 10
    tasks = [
        EditTask(id=i, source=torch.zeros(3, 8, 8), instructions=(f"a{i}", "b"), edit_types=("", ""))
        for i in range(num)
    ]

    def is_bad(body: dict[str, Any]) -> bool:
        return nested(body, "Instruction: a3") or nested(body, "Instruction: a7")

    server.reply = lambda number, body: reply(server) if is_bad(body) else (200, completion(SCORES))
    vlm = ask(timeout_s=2.0 if fault == "late" else 60.0, num_retries=0)
    vlm.check(QUESTION)
    score = VlmJudge(vlm.config, vlm)(rollout_of(tasks, torch.zeros(2, num, 3, 8, 8)))
    assert score.faults is not None
    faults = [FAULTS[number] for number in score.faults.tolist()]
    assert faults == [fault if i in (3, 7) else "" for i in range(num)]
    assert score.values[[3, 7]].isnan().all()
    good = [i for i in range(num) if i not in (3, 7)]
    assert score.values[good].tolist() == [[0.75, 0.25]] * 8


def test_a_retry_has_another_seed(server: Server, ask: Callable[..., RemoteVlm]) -> None:
    """Rows 1 and 3 get no text or an unfinished one, over and over: invalid, not 0."""
    by_instruction = {"a1": None, "a3": "<Turn1Score>4</Turn1Sc"}

    def reply(number: int, body: dict[str, Any]) -> Reply:
        name = body["messages"][1]["content"][2]["text"].split()[3]
        return 200, completion(by_instruction.get(name, SCORES))

    server.reply = reply
    tasks = [
        EditTask(id=i, source=torch.zeros(3, 8, 8), instructions=(f"a{i}", "b"), edit_types=("", "")) for i in range(4)
    ]
    score = VlmJudge(server.config, ask())(rollout_of(tasks, torch.zeros(2, 4, 3, 8, 8)))
    assert score.values[[0, 2]].tolist() == [[0.75, 0.25]] * 2
    assert score.values[[1, 3]].isnan().all() and len(server.bodies) == 4 + 2 + 2
    assert score.words == (SCORES, "", SCORES, "<Turn1Score>4</Turn1Sc") and score.faults is not None
    assert [FAULTS[fault] for fault in score.faults] == ["", "empty", "", "form"]
    seeds = {body["seed"] for body in server.bodies}
    assert len(seeds) == len(server.bodies)


# What a server wants


@pytest.mark.parametrize(
    ("refuses", "text", "said"),
    [
        ("seed", "Unexpected fields in the request: {'seed'}", "takes no seed"),
        ("seed", "bad request", "takes no seed"),
        ("max_tokens", "'max_tokens' is not supported: use 'max_completion_tokens'", "wants max_completion_tokens"),
        ("temperature", "'temperature' does not support 0.7 with this model", "takes no temperature"),
    ],
)
def test_a_server_that_refuses_a_field_is_asked_without(
    server: Server, ask: Callable[..., RemoteVlm], refuses: str, text: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """The first time twice, then at once; and the user is told, once."""
    server.reply = lambda number, body: (400, {"error": text}) if refuses in body else (200, completion(SCORES))
    vlm = ask(max_answer_tokens=77)
    vlm.check(QUESTION)
    assert len(server.bodies) == 2
    answers = vlm([QUESTION] * 3)
    assert [answer.grades for answer in answers] == [(4, 2)] * 3 and len(server.bodies) == 5
    last = server.bodies[-1]
    assert refuses not in last and last.get("max_tokens", last.get("max_completion_tokens")) == 77
    assert capfd.readouterr().err.count(said) == 1


def test_a_field_that_one_refusal_names_is_kept(server: Server, ask: Callable[..., RemoteVlm]) -> None:
    """A question of its own trouble is tried without the field that its refusal names; the others keep theirs."""
    server.reply = lambda number, body: (
        (400, "max_tokens is too large for the seed of doubt") if nested(body, "bad") else (200, completion(SCORES))
    )
    vlm = ask()
    vlm.check(QUESTION)
    answers = vlm([colour_question([0, 2], ["bad", "b"])]) + vlm([QUESTION])
    assert [answer.fault.partition(":")[0] for answer in answers] == ["status", ""]
    assert "seed" in server.bodies[-1] and "max_tokens" in server.bodies[-1] and "seed" not in server.bodies[-2]


def test_an_alias_that_is_not_listed_is_asked(
    server: Server, ask: Callable[..., RemoteVlm], capfd: pytest.CaptureFixture[str]
) -> None:
    server.models = (200, {"data": [{"id": "other"}, {"id": "third"}]})
    ask().check(QUESTION)
    (line,) = capfd.readouterr().err.splitlines()
    assert "'judge' is not in the list of" in line and "(other, third): asked all the same" in line
    for models in ((404, "no such path"), (200, "<html>"), (200, ["judge"]), (403, "not with this key")):
        server.models = models
        ask().check(QUESTION)
    assert capfd.readouterr().err == ""


def test_a_key_goes_to_its_own_host_alone(
    server: Server, ask: Callable[..., RemoteVlm], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Redirected to another path of its host the key goes along; to another host, or another port of it, never."""
    monkeypatch.setenv(API_KEY, KEY)
    port, other = server.http.server_port, Server()
    try:
        for address, has_key in (
            (f"http://127.0.0.1:{port}/v1/chat/completions?again", True),
            (f"http://localhost:{port}/v1/chat/completions?again", False),
            (f"http://127.0.0.1:{other.http.server_port}/v1/chat/completions", False),
        ):
            seen, target = [], other if str(other.http.server_port) in address else server

            def redirect(number: int, body: dict[str, Any], address: str = address) -> Reply:
                return 307, "", {"Location": address}

            server.reply = redirect
            server.headers.clear()
            other.headers.clear()
            with suppress(ValueError):  # the path with '?again' is not served
                seen = ask()([QUESTION])
            assert ("Authorization" in target.headers[-1]) is has_key
            assert "Authorization" in server.headers[0]
            said = capfd.readouterr().err
            assert "redirects to" in said and ("which is sent no key" in said) is not has_key and KEY not in said
        assert [answer.grades for answer in seen] == [(4, 2)]
        server.reply = lambda number, _: (307, "", {"Location": f"http://127.0.0.1:{port}/v1/chat/completions"})
        fails(lambda: ask()([QUESTION]), "redirects more than 3 times")
    finally:
        other.close()


def test_a_key_is_in_no_message(
    server: Server, ask: Callable[..., RemoteVlm], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A server that says it back: in words, in errors, and escaped as some write JSON."""
    monkeypatch.setenv(API_KEY, KEY)
    server.reply = lambda number, _: (200, completion(f"your key is {KEY} {SCORES}"))
    (answer,) = ask()([QUESTION])
    assert answer.text == f"your key is *** {SCORES}" and answer.grades == (4, 2)
    for reply in ((404, f"bad {KEY}"), (404, KEY.replace("/", "\\/")), (200, {"choices": [KEY]}), (400, {"e": KEY})):
        server.reply = lambda number, _, reply=reply: reply
        with suppress(ValueError):
            (answer,) = ask()([QUESTION])
            assert "***" in answer.fault and "secret" not in answer.fault
            continue
        assert "secret" not in fails(lambda: ask()([QUESTION]), r"\*\*\*")
    assert "secret" not in capfd.readouterr().err


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "tab\tbed", "schlüssel", "\x7f"])
def test_a_key_that_is_none(ask: Callable[..., RemoteVlm], monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv(API_KEY, key)
    assert key not in fails(ask, f"{API_KEY} holds blanks, control characters")


# Threads


def test_answers_keep_their_order_and_the_server_its_limit(server: Server, ask: Callable[..., RemoteVlm]) -> None:
    """Three threads ask, later questions are answered sooner, three at once and no more."""

    def reply(number: int, body: dict[str, Any]) -> Reply:
        server.wait(0.02 + 0.05 * (number % 3 == 0))
        return 200, completion(body["messages"][1]["content"][2]["text"])

    server.reply = reply
    vlm = ask(num_parallel=3)
    questions = [[colour_question([0], [f"{wave}{i}"]) for i in range(4)] for wave in "abc"]
    with ThreadPoolExecutor(3) as pool:
        waves = list(pool.map(vlm, questions))
    for wave, answers in zip("abc", waves, strict=True):
        assert [answer.text for answer in answers] == [
            f"Turn 1. Instruction: {wave}{i}\nImage after turn 1:" for i in range(4)
        ]
    assert server.most_open == 3


def test_closing_ends_what_is_on_its_way(server: Server, ask: Callable[..., RemoteVlm]) -> None:
    """A thread that waits for replies that never come gets an error; no thread is left, and no question accepted."""
    threads = set(threading.enumerate())
    server.reply = lambda number, _: server.hang
    vlm = ask()
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(vlm, [QUESTION] * 20)
        while not server.bodies:
            time.sleep(0.01)
        vlm.close()
        with pytest.raises(CancelledError):
            asked.result()
    vlm.close()
    assert [thread.name for thread in set(threading.enumerate()) - threads if thread.name == "judge"] == []
    with pytest.raises(RuntimeError, match="the judge is closed"):
        vlm([QUESTION])


def test_an_error_leaves_nothing_on_its_way(server: Server, ask: Callable[..., RemoteVlm]) -> None:
    """The first question is refused for the key; those that wait for their replies are given up."""
    server.reply = lambda number, _: server.hang if number else (401, "no")
    vlm = ask(num_parallel=4)
    fails(lambda: vlm([QUESTION] * 9), "answers 401")
    for _ in range(500):
        if not asyncio.all_tasks(vlm._loop):
            break
        time.sleep(0.01)
    assert not asyncio.all_tasks(vlm._loop) and len(server.bodies) <= 5


def run_arguments(server: Server, pipeline: Path, folder: Path, **values: object) -> list[str]:
    """Words of a short training with the judge at the server."""
    given = {
        "model.path": pipeline, "model.max_text_tokens": TINY_MAX_TEXT_TOKENS, "lora.rank": 2, "data.num_turns": 2,
        "rollout.num_tasks": 1, "rollout.group_size": 6, "rollout.num_steps": 3, "evaluation.num_sessions": 2,
        "evaluation.num_sessions_short": 1, "evaluation.num_strips": 1, "evaluation.num_steps": 1,
        "evaluation.every": 0, "reward.judge": "vlm", "reward.vlm": "judge", "reward.url": server.config.url,
        "reward.num_retries": 0, "reward.readout": "direct", "run.num_iterations": 2, "run.folder": folder,
    } | {name.replace("__", "."): value for name, value in values.items()}  # fmt: skip
    return [word for name, value in given.items() for word in (f"--{name}", str(value))]


def test_a_run_in_which_one_call_in_five_fails(server: Server, tiny_pipeline_folder: Path, tmp_path: Path) -> None:
    """As many optimizer steps as without, each fault counted under its name, and no score but those of good answers."""
    ways, bad = list(SINGLE.values()), {}

    def score_of(seed: int) -> int:
        return 1 + seed % 7 % 5

    def reply(number: int, body: dict[str, Any]) -> Reply:
        seed = body["seed"]
        if number and seed % 5 == 0:  # the first question only tries the server
            return bad.setdefault(seed, ways[len(bad) * 5 % len(ways)])[0](server)
        return 200, completion(f"<Turn1Score>{score_of(seed)}</Turn1Score><Turn2Score>2</Turn2Score>")

    server.reply = reply
    num_iterations, group_size = 4, 12
    words = run_arguments(
        server, tiny_pipeline_folder, tmp_path / "run", rollout__group_size=group_size, reward__timeout_s=3,
        reward__consistency="none", advantage__consistency_weight=0, run__num_iterations=num_iterations,
    )  # fmt: skip
    main(words)
    lines, seeds = read_lines(tmp_path / "run" / "metrics.jsonl"), list(dict.fromkeys(b["seed"] for b in server.bodies))
    assert len(seeds) == 1 + num_iterations * group_size and len(bad) >= 5
    for place, line in enumerate(lines):
        part = seeds[1 + place * group_size :][:group_size]
        faults = Counter(bad[seed][1] for seed in part if seed in bad)
        assert {name: line[f"judge/fault_{name}"] for name in FAULTS[1:]} == {name: faults[name] for name in FAULTS[1:]}
        good = [score_of(seed) for seed in part if seed not in bad]
        assert line["reward/valid_share"] == pytest.approx(len(good) / group_size)
        assert line["reward/turn_1"] == pytest.approx(sum(good) / len(good) / 4 - 0.25, rel=1e-5)
    config = from_yaml(tmp_path / "run" / "config.yaml")
    saved = load_latest(tmp_path / "run", config, print)
    assert saved is not None and saved.iteration == num_iterations
    steps = {value.item() for key, value in saved.state["optimizer"].items() if key.endswith(".step")}
    assert steps == {num_iterations * config.optimizer.num_updates}


def test_a_run_with_a_judge_behind_a_server(
    server: Server, tiny_pipeline_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole program: the paper's two rewards move the adapter; then the server goes, and the run says so."""
    save_dino(tmp_path / "dino", "dinov3")

    def reply(number: int, body: dict[str, Any]) -> Reply:
        score = 1 + body["seed"] % 5
        return 200, completion("?" if number == 1 else f"<Turn1Score>{score}</Turn1Score><Turn2Score>2</Turn2Score>")

    server.reply = reply
    arguments = run_arguments(
        server, tiny_pipeline_folder, tmp_path / "run", reward__consistency=tmp_path / "dino"
    )  # fmt: skip
    main(arguments)
    first, second = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert first["reward/valid_share"] == pytest.approx(5 / 6) and second["reward/valid_share"] == 1
    scores = [1 + body["seed"] % 5 for body in server.bodies[7:]]
    assert second["reward/turn_1"] == pytest.approx(sum(scores) / 6 / 4 - 0.25) and second["reward/turn_2"] == 0.25
    assert 0 < second["reward/consistency"] < 1 and second["update/grad_norm"] > 0
    server.reply = lambda number, _: (401, "")
    with pytest.raises(SystemExit) as exited:
        main([*arguments, "--run.num_iterations", "3"])
    said = capsys.readouterr().err.splitlines()[-1]
    assert exited.value.code == 2 and said.startswith("mteditflow: reward.url") and API_KEY in said
