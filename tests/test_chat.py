"""Scores from the probabilities of a server's tokens, against brute force."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from mteditflow.reward.chat import expected_answer, text_of
from mteditflow.reward.vlm import MAX_OFF_MASS

VOCABULARY = ["1", "2", "3", "4", "5", "0", "6", "7", "8", "9", "X", "four", "<", "\n", "a", "b", "c", "d", "e", "f",
              "g", "h", "i", "j"]  # fmt: skip


def place(token: str, likeliest: dict[str, float]) -> dict[str, Any]:
    """A token's entry, from probabilities."""
    top = [{"token": text, "logprob": math.log(p)} for text, p in likeliest.items()]
    return {"token": token, "logprob": math.log(likeliest[token]), "top_logprobs": top}


def answer_with(digits: Sequence[dict[str, Any]], before: str = "") -> dict[str, Any]:
    """An answer's logprobs, with these entries as its digits; all other tokens are certain."""
    entries = [place(before, {before: 1.0})] if before else []
    for turn, digit in enumerate(digits, start=1):
        entries += [place(f"<Turn{turn}", {f"<Turn{turn}": 1.0}), place("Score>", {"Score>": 1.0}), digit]
        entries += [place("</Turn", {"</Turn": 1.0}), place(f"{turn}Score>\n", {f"{turn}Score>\n": 1.0})]
    return {"content": entries}


def test_expectation_against_brute_force() -> None:
    """Random logits over 24 tokens, of which the server tells the 20 likeliest; the digits stand out, as they do.

    A digit that is not told has less than the least of the 20, of which there are 4 at most: the error of E is below
    4 * 4 points * that, of the off mass below 4 times it.
    """
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        logits = torch.randn(3, len(VOCABULARY), generator=generator, dtype=torch.float64) * 2
        logits[:, :5] += 5
        p = logits.softmax(1)
        entries, least = [], 0.0
        for row in p:
            top = row.topk(20)
            likeliest = {VOCABULARY[i]: q for i, q in zip(top.indices.tolist(), top.values.tolist(), strict=True)}
            token = VOCABULARY[int(row[:5].argmax())]
            entries.append(place(token, likeliest))
            least = max(least, top.values.min().item())
        answer = expected_answer(answer_with(entries), 3)
        digits = p[:, :5]
        expected = (digits * torch.arange(1, 6)).sum(1) / digits.sum(1)
        if 1 - digits.sum(1).min() > MAX_OFF_MASS:
            assert answer.fault == "mass"
            continue
        assert answer.grades is not None
        torch.testing.assert_close(torch.tensor(answer.grades).double(), expected, rtol=0, atol=16 * least + 1e-6)
        assert abs(answer.off_mass - (1 - digits.sum(1).min().item())) <= 4 * least + 1e-12


@pytest.mark.parametrize(
    ("token", "likeliest", "grade", "off_mass"),
    [
        ("4", {"4": 0.5, "5": 0.25, "2": 0.25}, 3.75, 0.0),
        ("4", {"4": 0.5, " 4": 0.25, "5": 0.25}, 4.25, 0.0),  # with a blank and without it, one digit
        (" 2", {" 2": 0.75, "1": 0.25}, 1.75, 0.0),
        ("3", {"3": 0.6, "I": 0.4}, 3.0, 0.4),
        ("3</", {"3</": 0.5, "5</": 0.25, "3": 0.25}, 11 / 3, 0.25),  # what stands beside it has to
        ("5", {"5": 0.5, "10": 0.25, "0": 0.25}, 5.0, 0.5),
    ],
)
def test_forms_of_a_digit(token: str, likeliest: dict[str, float], grade: float, off_mass: float) -> None:
    logprobs = answer_with([place(token, likeliest)])
    if token == "3</":
        logprobs["content"][3] = place("Turn", {"Turn": 1.0})
    answer = expected_answer(logprobs, 1)
    assert answer.grades is not None and answer.grades[0] == pytest.approx(grade, abs=1e-12)
    assert answer.off_mass == pytest.approx(off_mass, abs=1e-12)


def test_what_holds_no_expectation() -> None:
    certain = place("4", {"4": 1.0})
    rare = place("4", {"4": 0.3, "I": 0.4, "No": 0.3})
    answer = expected_answer(answer_with([certain, rare]), 2)
    assert (answer.grades, answer.fault) == (None, "mass") and answer.off_mass == pytest.approx(0.7)
    for logprobs in (
        None,
        {},
        {"content": None},
        {"content": []},
        {"content": [{"token": "4"}]},
        "?",
        {"content": [3]},
    ):
        assert expected_answer(logprobs, 2).fault == "form: no logprobs"
    assert expected_answer(answer_with([certain]), 2).fault == "form"
    assert expected_answer(answer_with([certain, place("x", {"x": 0.6, "4": 0.4})]), 2).fault == "form"


def test_a_thought_is_no_place_of_a_score() -> None:
    thought = "<think><Turn1Score>1</Turn1Score></think>"
    answer = expected_answer(answer_with([place("4", {"4": 1.0}), place("2", {"2": 1.0})], before=thought), 2)
    assert answer.grades == (4, 2) and answer.off_mass == 0


def test_texts_of_contents() -> None:
    parts = [
        {"type": "text", "text": "a"},
        {"type": "image_url"},
        "b",
        {"type": "output_text", "text": "c"},
        {"text": 3},
    ]
    assert text_of(parts) == "ac" and text_of("x") == "x"
    assert text_of(None) == text_of(3) == text_of([]) == text_of({"text": "x"}) == ""
