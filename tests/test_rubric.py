"""A rubric of the user's: refused in one line where it does not fit, told to the judge, and part of what a run is."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import finished_runs
import pytest
import torch
from rollouts import rollout_of

from mteditflow.config import AdvantageConfig, Config, DataConfig, EvaluationConfig, RewardConfig, command
from mteditflow.config.rubric import MAX_CHARACTERS, check_rubric
from mteditflow.record.checkpoint import keep_rubric
from mteditflow.reward import Rewards, build_reward
from mteditflow.reward.exact import ExactInstruction
from mteditflow.reward.vlm import RUBRIC, Answer, Question, VlmJudge, answer_of
from mteditflow.types import EditTask

SMALL: dict[str, Any] = {
    "evaluation.num_sessions": 2, "evaluation.every": 0, "reward.consistency": "none",
    "advantage.consistency_weight": 0, "optimizer.schedule": "constant",
}  # fmt: skip
GOOD = "Score every turn from 1, ignored, to 5, perfect.\n{form}\n"
TAGS = "<Turn1Score>X</Turn1Score> <Turn2Score>X</Turn2Score>"


def config_of(path: Path, num_turns: int = 2, readout: str = "thinking", num_held_out_turns: int = 0) -> Config:
    return Config(
        data=DataConfig(num_turns=num_turns),
        reward=RewardConfig(judge="vlm", rubric=str(path), consistency="none", readout=readout),  # pyright: ignore[reportArgumentType]
        advantage=AdvantageConfig(consistency_weight=0),
        evaluation=EvaluationConfig(num_turns=num_held_out_turns),
    )


@pytest.fixture
def rubric(tmp_path: Path) -> Path:
    path = tmp_path / "rubric.txt"
    path.write_text(GOOD)
    return path


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"From 1 (bad) to 5 (good):\n{TAGS}",
        GOOD + "<rules>Turns 1 to 2 are scored one by one; score turns 1 to 2 alike.</rules>",
        GOOD + "For example\n<Turn1Score>4</Turn1Score>",
        GOOD + "Write <Thought>your reasons</Thought> first.",
        "Bewerte jede Runde mit 1 bis 5.\n{form}",
    ],
)
def test_what_is_taken(rubric: Path, text: str) -> None:
    rubric.write_text(text)
    check_rubric(config_of(rubric))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: copy what `mteditflow judge rubric` prints"),
        ("\ufeff \n", "is empty"),
        ("Say 1 or 5 \0 {form}", "is no text, it holds a zero byte"),
        (
            GOOD + "x" * MAX_CHARACTERS,
            f"has {len(GOOD) + MAX_CHARACTERS} characters: must have at most 8000",
        ),
        (GOOD + "x" * 5 * MAX_CHARACTERS, f"has {len(GOOD) + 5 * MAX_CHARACTERS} bytes: must have at most 8000"),
        ("How good is it?\n{form}", "does not name the scale"),
        ("From 1 to 10.\n{form}", "does not name the scale"),
        ("Marks of 1.5 and 5.5\n{form}", "does not name the scale"),
        ("Score from 1 to 5.", "does not state the form of the answer: add a line {form}"),
        ("A 5 is good. Give a score of 1 to 10.\n{form}", "has scores from 1 to 10: must be from 1 to 5"),
        ("5 is best, 1 bad. Rate it on a scale of 0-5.\n{form}", "has scores from 0 to 5: must be from 1 to 5"),
        (GOOD + "<Turn1Score>10</Turn1Score>", "has '<Turn1Score>10</Turn1Score>': must be <Turn1Score>X</Turn1Score>"),
        (GOOD + "<Turn1Score>X</Turn2Score>", "has '<Turn1Score>X</Turn2Score>': must be <Turn1Score>X</Turn1Score>"),
        (
            "1 to 5: <Turn1Score>X</Turn1Score>",
            "lacks the tag <Turn2Score>, and a session of 2 has Turn1Score to",
        ),
        (GOOD + TAGS + "<Turn3Score>X</Turn3Score>", "has the tag <Turn3Score>, and a session of 2 has Turn1Score to"),
        (GOOD + "<turn1score>X</turn1score>", "has the tag <turn1score>"),
        (
            "1 to 5: <Score>X</Score>",
            "has the tag <Score>, and a session of 2 has Turn1Score to Turn2Score: ",
        ),
    ],
)
def test_what_is_refused(rubric: Path, text: str, message: str) -> None:
    rubric.write_text(text)
    with pytest.raises(ValueError) as caught:
        check_rubric(config_of(rubric))
    assert str(caught.value).startswith(f"reward.rubric is '{rubric}': {message}") and "\n" not in str(caught.value)


def test_what_is_no_text_is_refused_by_build_reward(tmp_path: Path) -> None:
    """Before a model or a server is looked for."""
    (tmp_path / "latin.txt").write_bytes("1 für schlecht, 5 gut {form}".encode("latin-1"))
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0")
    for name, message in (
        ("latin.txt", r"is no text in UTF-8 \(byte 3\): save it"),
        ("picture.png", r"is no text in UTF-8 \(byte 0\)"),
        ("missing.txt", "is no file: give the path of a text file"),
        (".", "is no file"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            build_reward(config_of(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_it_has_to_fit_the_settings(rubric: Path) -> None:
    rubric.write_text(GOOD + "First a <Thought>.")
    check_rubric(config_of(rubric))
    with pytest.raises(ValueError, match=r"asks for a <Thought>, and reward.readout 'direct' has none"):
        check_rubric(config_of(rubric, readout="direct"))
    rubric.write_text(f"1 to 5: {TAGS}")
    with pytest.raises(ValueError, match=r"lacks the tag <Turn3Score>, and a session of 3"):  # held out sessions
        check_rubric(config_of(rubric, num_held_out_turns=3))
    rubric.write_text(GOOD)
    check_rubric(config_of(rubric, num_held_out_turns=3))
    with pytest.raises(ValueError, match=r"reward.rubric is 'a.txt': judge 'exact' reads none: must be empty"):
        RewardConfig(rubric="a.txt")


class Always:
    """Answers 4 and 2; keeps what it was asked."""

    is_remote = False

    def __init__(self) -> None:
        self.asked: list[Question] = []

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        self.asked += questions
        return [answer_of("<Turn1Score>4</Turn1Score><Turn2Score>2</Turn2Score>", 2) for _ in questions]

    def close(self) -> None:
        pass


@pytest.mark.parametrize("is_given", [True, False])
def test_the_judge_is_told_it(rubric: Path, is_given: bool) -> None:
    """With the form of the session's turns in its place, whatever line ends and byte order mark the file has."""
    rubric.write_bytes(b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode())
    config, ask = config_of(rubric if is_given else Path()).reward if is_given else RewardConfig(judge="vlm"), Always()
    task = EditTask(id=0, source=torch.zeros(3, 8, 8), instructions=("a", "b", "c"), edit_types=("",) * 3)
    score = VlmJudge(config, ask)(rollout_of([task], torch.zeros(2, 3, 3, 8, 8)))
    assert score.values.tolist() == [[0.75, 0.25]] * 3 and len(ask.asked) == 3 and score.truth is None
    told = "Score every turn from 1, ignored, to 5, perfect.\n" + TAGS.replace("> <", ">\n<")
    assert {question.rubric for question in ask.asked} == {told if is_given else RUBRIC}


def test_the_printed_rubric_is_taken(rubric: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What users copy holds ours, and fits any number of turns."""
    assert command.main(["judge", "rubric"]) == 0
    text = capsys.readouterr().out
    assert text.startswith(RUBRIC)
    rubric.write_text(text)
    for num_turns in (1, 2, 9):
        check_rubric(config_of(rubric, num_turns=num_turns, readout="expected"))


def test_a_run_goes_on_by_its_own_rubric_alone(tmp_path: Path) -> None:
    """Compared by its text, wherever that is from."""
    keep_rubric(tmp_path, GOOD, is_resumed=False)
    assert (tmp_path / "rubric.txt").read_text() == GOOD
    keep_rubric(tmp_path, GOOD, is_resumed=True)
    for text, message in ((GOOD + "!", "is another now"), ("", "is none now")):
        with pytest.raises(ValueError, match=rf"reward.rubric: the text was .*rubric.txt, {message}") as caught:
            keep_rubric(tmp_path, text, is_resumed=True)
        assert "\n" not in str(caught.value) and (tmp_path / "rubric.txt").read_text() == GOOD
    keep_rubric(tmp_path, "", is_resumed=False)  # a run that begins anew
    assert not (tmp_path / "rubric.txt").exists()
    keep_rubric(tmp_path, "", is_resumed=True)
    with pytest.raises(ValueError, match=r"reward.rubric: the text was none, is another now"):
        keep_rubric(tmp_path, GOOD, is_resumed=True)


def test_a_changed_rubric_is_noticed(
    rubric: Path, tiny_pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """A run of one iteration that is to go on: by the same text under another path, and not by another text."""
    constant = Rewards(rewards={"instruction": ExactInstruction()}, weights={"instruction": 1.0})
    monkeypatch.setattr("mteditflow.run.build_reward", lambda _: constant)
    values = {"model.path": tiny_pipeline_folder, "reward.judge": "vlm", "reward.rubric": rubric}

    def train(**overrides: Any) -> None:
        settings = values | {name.replace("__", "."): value for name, value in overrides.items()}
        finished_runs.train(tmp_path / "run", tiny_pipeline_folder, **{**SMALL, **settings})

    train(run__num_iterations=1)
    copied = tmp_path / "copy.txt"
    copied.write_text(GOOD)
    train(run__num_iterations=2, reward__rubric=copied)
    rubric.write_text(GOOD + "Be kind.")
    capsys.readouterr()
    with pytest.raises(SystemExit):
        train(run__num_iterations=3)
    error = capsys.readouterr().err
    assert error.startswith("mteditflow: reward.rubric: the text was") and error.count("\n") == 1
