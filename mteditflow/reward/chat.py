"""The two ends of a chat completion: how a question is put, and what the judge's answer says.

Servers differ in both. Some take no seed or want the longest answer under another name; `Wording` is what one of them
wants. An answer's text is a string or a list of parts; what was thought before it is a field of its own
(`reasoning_content`, `reasoning`) or stands in the text, and is no answer either way; a refusal is a field, a reason to
finish, or words.
"""

import base64
import math
from dataclasses import dataclass, replace
from typing import Any

from mteditflow_kernels import counter_uniform
from torch import Tensor

from mteditflow.config.reward import RewardConfig
from mteditflow.pictures import png_bytes, to_pil
from mteditflow.reward.vlm import MAX_OFF_MASS, SCORE, Answer, Question, after_thought, answer_of, read_answer

Token = tuple[str, dict[str, float]]
"""A token's text, and the probabilities of the likeliest ones at its place."""


def request(question: Question, config: RewardConfig) -> dict[str, Any]:
    """The body of a chat completion, in the usual wording."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(part)}}
        for part in question.parts
    ]
    is_expected = question.readout == "expected"
    return {
        "model": config.vlm_path,
        "messages": [{"role": "system", "content": question.rubric}, {"role": "user", "content": content}],
        "max_tokens": config.max_answer_tokens,
        # At 0 every server gives the probabilities of the model; at others, some give those of the sampling.
        "temperature": 0.0 if is_expected else config.temperature,
        "seed": int(counter_uniform(question.key[None], 1).item() * 2**24),
        **({"logprobs": True, "top_logprobs": 20} if is_expected else {}),
    }


def data_url(image: Tensor) -> str:
    """An image (3, h, w) uint8 as a PNG in base64."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(to_pil(image))).decode()


@dataclass(frozen=True, kw_only=True)
class Wording:
    """How a server wants a question put."""

    limit: str = "max_tokens"
    has_seed: bool = True
    has_temperature: bool = True
    num_logprobs: int = 20

    def put(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body of `request` in this wording."""
        dropped = {"max_tokens"}
        dropped |= set() if self.has_seed else {"seed"}
        dropped |= set() if self.has_temperature else {"temperature"}
        put = {name: value for name, value in body.items() if name not in dropped} | {self.limit: body["max_tokens"]}
        return put | {"top_logprobs": self.num_logprobs} if "top_logprobs" in put else put

    def others(self, text: str, *, is_new: bool) -> list["Wording"]:
        """What may be taken where a server refuses this, with that text: what the text names; of a server that has not
        answered yet, what is refused most often too.
        """
        found = {
            "seed": replace(self, has_seed=False),
            "max_tokens": replace(self, limit="max_completion_tokens"),
            "temperature": replace(self, has_temperature=False),
            "logprobs": replace(self, num_logprobs=5),
        }
        guesses = ["seed", "max_tokens"] if is_new else []
        names = [*(name for name in found if name in text), *guesses]
        return [found[name] for name in dict.fromkeys(names) if found[name] != self]

    def __str__(self) -> str:
        """What a user may want to know of it."""
        parts = ["takes no seed, so its answers may not repeat"] if not self.has_seed else []
        parts += [] if self.has_temperature else ["takes no temperature"]
        parts += [] if self.limit == "max_tokens" else [f"wants {self.limit}"]
        parts += [] if self.num_logprobs == 20 else [f"gives {self.num_logprobs} likeliest tokens"]
        return ", ".join(parts)


def read_completion(body: Any, num_turns: int, readout: str) -> Answer | None:
    """The answer that a completion's body holds; None where it is no completion."""
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list):
        return None
    choice = choices[0] if choices else {"message": {}}
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict):
        return None
    text, reason = text_of(message.get("content")), choice.get("finish_reason")
    thought = text_of(message.get("reasoning_content") or message.get("reasoning"))
    words = "\n".join(filter(None, (thought, text)))
    if message.get("refusal") or reason == "content_filter":
        return Answer(text=text_of(message.get("refusal")) or words, grades=None, fault="refused")
    is_expected = readout == "expected"
    answer = expected_answer(choice.get("logprobs"), num_turns) if is_expected else answer_of(text, num_turns)
    if answer.grades is not None:
        return Answer(text=words, grades=answer.grades, off_mass=answer.off_mass)
    fault = "cut: at reward.max_answer_tokens" if reason == "length" else answer.fault if text.strip() else "empty"
    return Answer(text=words, grades=None, fault=fault, off_mass=answer.off_mass)


def text_of(content: Any) -> str:
    """The text of a message's content, which is a string, a list of parts, or nothing."""
    if isinstance(content, str):
        return content
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    texts = [part.get("text") for part in parts if part.get("type") in ("text", "output_text")]
    return "".join(text for text in texts if isinstance(text, str))


def expected_answer(logprobs: Any, num_turns: int) -> Answer:
    """The expectation of each turn's score, by the probabilities of the tokens at the place of its digit.

        E = sum_j j p(j) / sum_j p(j),  j = 1 .. 5;  off mass 1 - sum_j p(j), the largest of the turns

    A digit that is not among the likeliest tokens counts as off mass.
    """
    tokens = read_tokens(logprobs)
    text = "".join(token for token, _ in tokens)
    if read_answer(text, num_turns) is None:
        return Answer(text=text, grades=None, fault="form" if tokens else "form: no logprobs")
    rest = after_thought(text)
    start = len(text) - len(rest)
    places = {int(match[1]): start + match.start(2) for match in SCORE.finditer(rest)}
    masses = [digit_masses(tokens, places[turn]) for turn in range(1, num_turns + 1)]
    off_mass = max(0.0, *(1 - sum(mass) for mass in masses))
    if off_mass > MAX_OFF_MASS:
        return Answer(text=text, grades=None, fault="mass", off_mass=off_mass)
    grades = tuple(sum(j * p for j, p in enumerate(mass, start=1)) / sum(mass) for mass in masses)
    return Answer(text=text, grades=grades, off_mass=off_mass)


def read_tokens(logprobs: Any) -> list[Token]:
    """The tokens of an answer in the form of OpenAI's `logprobs`; none where they have another."""
    try:
        entries = [(entry, [entry, *entry["top_logprobs"]]) for entry in logprobs["content"]]
        return [(entry["token"], {one["token"]: math.exp(one["logprob"]) for one in top}) for entry, top in entries]
    except (KeyError, TypeError, OverflowError):
        return []


def digit_masses(tokens: list[Token], place: int) -> list[float]:
    """The probabilities of the digits 1 to 5 in the token that covers the character at `place`.

    What stands beside the digit in that token, as in '>4', has to stand beside the others too, blanks before it aside.
    """
    start = 0
    for token, likeliest in tokens:
        if start <= place < start + len(token):
            before, after = token[: place - start].lstrip(), token[place - start + 1 :]
            forms = [f"{before}{digit}{after}" for digit in range(1, 6)]
            return [sum(p for text, p in likeliest.items() if text.lstrip() == form) for form in forms]
        start += len(token)
    return [0.0] * 5
