"""A rubric of the user's own: the text file of `reward.rubric`, which takes the place of the judge's system text.

The form of the answer is fixed, since a program reads it; the message states it, by number of turns and read-out. A
rubric states it too, so that the two cannot contradict: by FORM, which becomes a line of tags for each turn, or by the
tags themselves. `mteditflow judge rubric` prints the one to begin with.
"""

import re
from pathlib import Path

from mteditflow.config.settings import Config

FORM = "{form}"
MAX_CHARACTERS = 8000  # about 2,000 tokens, a quarter of the prompt that docs/judge.md has a server take
TAG = re.compile(r"<\s*/?\s*(\w*(?:score|grade|rating)\w*|turn\w*\d\w*)\s*>", re.IGNORECASE)
"""What looks like a tag of an answer."""
BETWEEN = re.compile(r"<(Turn\d+Score)>(.*?)</(Turn\d+Score)>", re.DOTALL)
SCALE = re.compile(
    r"(?:scor|rate\b|rating|scale|grade|points)[^.\n]{0,60}?(?<!turn )(?<!turns )\b"
    r"(\d+)\s*(?:to|through|[-\u2013])\s*(\d+)",
    re.IGNORECASE,
)
SHORTER = f"must have at most {MAX_CHARACTERS} characters, since pictures stand beside it"
COPY = "copy what `mteditflow judge rubric` prints, and change that"


def form_of(num_turns: int) -> str:
    """Write the form of the scores, a line for each turn."""
    return "\n".join(f"<Turn{turn}Score>X</Turn{turn}Score>" for turn in range(1, num_turns + 1))


def read_rubric(path: str) -> str:
    """Read the text of a rubric file. ValueError, one line: it is no text, empty, too long, without scale or form."""
    file = Path(path)
    try:
        if not file.is_file():
            raise _refuse(path, "is no file: give the path of a text file, or leave the field out")
        if file.stat().st_size > 4 * MAX_CHARACTERS:  # bytes of the longest text
            raise _refuse(path, f"has {file.stat().st_size} bytes: {SHORTER}")
        text = file.read_bytes().decode("utf-8-sig").replace("\r\n", "\n").strip()
    except OSError as error:
        raise _refuse(path, f"cannot be read ({error.strerror}): give the path of a text file") from None
    except UnicodeDecodeError as error:
        raise _refuse(path, f"is no text in UTF-8 (byte {error.start}): save it as UTF-8") from None
    if "\0" in text:
        raise _refuse(path, "is no text, it holds a zero byte: give a text file in UTF-8")
    if not text:
        raise _refuse(path, f"is empty: {COPY}, or leave the field out")
    if len(text) > MAX_CHARACTERS:
        raise _refuse(path, f"has {len(text)} characters: {SHORTER}")
    if not all(re.search(rf"(?<![\w.]){score}(?!\w|\.\d)", text) for score in (1, 5)):
        raise _refuse(path, f"does not name the scale: must say what scores of 1 and of 5 mean; {COPY}")
    if FORM not in text and not TAG.search(text):
        raise _refuse(path, f"does not state the form of the answer: add a line {FORM}, which becomes that of the tags")
    return text


def check_rubric(config: Config) -> None:
    """Raise ValueError, one line, where the rubric of a config cannot be read or contradicts the form of the answer."""
    path = config.reward.rubric
    if not path:
        return
    text = read_rubric(path)
    for low, high in SCALE.findall(text):
        if (low, high) != ("1", "5"):
            raise _refuse(path, f"has scores from {low} to {high}: must be from 1 to 5")
    for first, values, last in BETWEEN.findall(text):
        if first != last or not {*re.findall(r"\d+(?:\.\d+)?", values)} <= {*"12345"}:
            raise _refuse(path, f"has {f'<{first}>{values}</{last}>'!r}: must be <{first}>X</{first}>, X from 1 to 5")
    if "<Thought>" in text and config.reward.readout != "thinking":
        remedy = f"reward.readout {config.reward.readout!r} has none: leave it out, or set 'thinking'"
        raise _refuse(path, f"asks for a <Thought>, and {remedy}")
    found = {match[1] for match in TAG.finditer(text)}
    for num_turns in sorted({config.data.num_turns, config.num_held_out_turns}):
        tags = {f"Turn{turn}Score" for turn in range(1, num_turns + 1)}
        wrong = sorted(found - tags) or ([] if FORM in text else sorted(tags - found))
        if wrong:
            problem = "has the tag" if wrong[0] in found else "lacks the tag"
            needed = f"a session of {num_turns} has Turn1Score to Turn{num_turns}Score"
            raise _refuse(path, f"{problem} <{wrong[0]}>, and {needed}: write {FORM} in place of the tags")


def fill_rubric(text: str, num_turns: int) -> str:
    """Put the form of K turns in its place."""
    return text.replace(FORM, form_of(num_turns))


def _refuse(path: str, problem: str) -> ValueError:
    return ValueError(f"reward.rubric is {path!r}: {problem}")
