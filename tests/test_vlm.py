"""The VLM judge: the question, its strict answer, retries, and a small Qwen3-VL in the true format that answers."""

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rollouts import rollout_of
from tiny_judge import COLOUR_SCORES, colour_question, plain, save_vlm, small_tokenizer, teach
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from mteditflow.config import AdvantageConfig, Config, DataConfig, EvaluationConfig, RewardConfig
from mteditflow.guards import GuardError
from mteditflow.noise import NoiseSource
from mteditflow.reward import Rewards, build_reward, check_scores
from mteditflow.reward.vlm import DIRECT, THINKING, Answer, Question, VlmJudge, answer_of, read_answer, to_judge_size
from mteditflow.reward.vlm_local import CountedSampling, LocalVlm
from mteditflow.types import FAULTS, EditTask

CPU = torch.device("cpu")
GOOD = "<Turn1Score>4</Turn1Score>\n<Turn2Score>2</Turn2Score>"


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        (GOOD, [4, 2]),
        (f"<Thought>Turn 1 ... turn 2 ...</Thought>\n{GOOD}", [4, 2]),
        ("<Turn2Score> 2 </Turn2Score> and <Turn1Score>\n5</Turn1Score>", [5, 2]),
        (f"<Thought>{GOOD.replace('4', '1')}</Thought>{GOOD}", [4, 2]),
        (f"<Thought>a</Thought><Thought>b</Thought>{GOOD}", [4, 2]),
        (f"<think>{GOOD.replace('4', '1')}</think>{GOOD}", [4, 2]),
        (GOOD.replace("4", "**4**"), [4, 2]),
        (f"<think>{GOOD}", None),
        (f"<Thought>{GOOD}</Thought>", None),  # scores before </Thought> alone
        (f"<Thought>so far {GOOD}", None),  # cut off
        (GOOD.replace("4", "4.5"), None),
        (GOOD.replace("4", "10"), None),
        (GOOD.replace("4", "0"), None),
        (GOOD.replace("4", "6"), None),
        (GOOD.replace("4", "four"), None),
        (GOOD.replace("</Turn1Score>", "</Turn2Score>"), None),
        (GOOD.replace("</Turn1Score>", ""), None),
        ("<Turn1Score>4</Turn1Score>", None),  # a turn is missing
        (f"{GOOD}<Turn1Score>4</Turn1Score>", None),  # a turn is there twice
        (f"{GOOD}<Turn3Score>4</Turn3Score>", None),  # one that was not asked for
        ("", None),
        ("I cannot judge this.", None),
    ],
)
def test_reading_an_answer(text: str, scores: list[int] | None) -> None:
    assert read_answer(text, 2) == scores


def test_the_question_shows_source_instructions_and_edits_in_order() -> None:
    question = colour_question([0, 2], ["make it red", "make it blue"])
    parts = question.parts
    assert [part for part in parts if isinstance(part, str)][:3] == [
        "Source image:",
        "Turn 1. Instruction: make it red\nImage after turn 1:",
        "Turn 2. Instruction: make it blue\nImage after turn 2:",
    ]
    for place, colour in ((1, 1), (3, 0), (5, 2)):
        image = parts[place]
        assert isinstance(image, Tensor) and torch.equal(image, plain(colour))
    assert parts[6] == f"{DIRECT}\n<Turn1Score>X</Turn1Score>\n<Turn2Score>X</Turn2Score>" and len(parts) == 7
    assert str(replace(question, readout="thinking").parts[6]).startswith(THINKING)


def test_what_the_judge_is_to_judge_size() -> None:
    """To the nearest of 256 levels; shrunk to the longest side, never enlarged."""
    levels = torch.arange(256) / 127.5 - 1
    picture = levels.reshape(1, 1, 16, 16).expand(2, 3, 16, 16)
    assert torch.equal(to_judge_size(picture, 16)[1, 2].flatten(), torch.arange(256, dtype=torch.uint8))
    assert (
        torch.equal(to_judge_size(picture, 512), to_judge_size(picture, 16))
        and to_judge_size(picture * 3, 16).max() == 255
    )
    assert to_judge_size(torch.zeros(1, 3, 300, 400), 100).shape == (1, 3, 75, 100)
    assert to_judge_size(torch.zeros(1, 3, 300, 400), 100).unique().tolist() == [128]


# Retries and what cannot be scored


def source(step: int) -> NoiseSource:
    return NoiseSource(seed=0, step=step)


def build_judge(config: RewardConfig) -> VlmJudge:
    """The judge alone, as a run builds it."""
    rewards = build_reward(Config(reward=config, advantage=AdvantageConfig(consistency_weight=0))).rewards
    (judge,) = rewards.values()
    assert isinstance(judge, VlmJudge)
    return judge


def tasks_of(num_tasks: int) -> list[EditTask]:
    return [
        EditTask(id=10 + i, source=torch.zeros(3, 16, 16), instructions=(f"a{i}", f"b{i}"), edit_types=("", ""))
        for i in range(num_tasks)
    ]


def numbered(num_rows: int, num_turns: int = 2) -> Tensor:
    """Pictures (K, N, 3, 16, 16) whose level tells turn and row."""
    level = torch.arange(num_turns * num_rows).reshape(num_turns, num_rows, 1, 1, 1) / 127.5 - 1
    return level.expand(num_turns, num_rows, 3, 16, 16)


class Script:
    """Answers by try and row; keeps what it was asked."""

    is_remote = False

    def __init__(self, answers: Sequence[dict[int, str]]) -> None:
        self.answers, self.asked = list(answers), list[Sequence[Question]]()

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        answers = self.answers[len(self.asked)]
        self.asked.append(questions)
        return [answer_of(answers.get(int(question.images[1].max()), "no"), 2) for question in questions]

    def close(self) -> None: ...


def test_scores_retries_and_invalid_trajectories() -> None:
    """Row 2 needs a second try, row 3 gets none that can be read, row 1 is not finite and never asked about."""
    script = Script([{0: GOOD}, {2: GOOD.replace("4", "5")}, {}])
    pictures = numbered(4).clone()
    pictures[1, 1, 0, 3, 3] = torch.nan
    config = RewardConfig(judge="vlm", consistency="none")
    score = VlmJudge(config, script)(rollout_of(tasks_of(2), pictures, source(5)))
    scores, faults = score.values, score.faults
    assert faults is not None and [FAULTS[fault] for fault in faults] == ["", "not_finite", "", "form"]
    assert score.words == (GOOD, "", GOOD.replace("4", "5"), "no")
    assert scores[[0, 2]].tolist() == [[0.75, 0.25], [1.0, 0.25]] and scores[[1, 3]].isnan().all()
    rows = [[int(question.images[1].max()) for question in questions] for questions in script.asked]
    assert rows == [[0, 2, 3], [2, 3], [3]]
    for question, row in zip(script.asked[0], rows[0], strict=True):
        assert question.instructions == (f"a{row // 2}", f"b{row // 2}")
        assert [int(image.max()) for image in question.images] == [128, row, 4 + row]
    keys = torch.stack([question.key for questions in script.asked for question in questions])
    assert len(keys.unique(dim=0)) == 6  # each try of each row has a chance of its own
    binary = VlmJudge(replace(config, scale="binary"), Script([{0: GOOD}, {}, {}]))
    found = binary(rollout_of(tasks_of(1), numbered(2))).values
    assert found[0].tolist() == [1.0, 0.0] and found[1].isnan().all()


def test_a_key_depends_on_the_trajectory_alone() -> None:
    first, other = Script([{}]), Script([{}])
    config = RewardConfig(judge="vlm", num_retries=0)
    for script, tasks in ((first, tasks_of(2)), (other, tasks_of(2)[::-1])):
        VlmJudge(config, script)(rollout_of(tasks, numbered(4), source(7)))
    assert torch.equal(
        torch.stack([question.key for question in first.asked[0]]),
        torch.stack([question.key for question in other.asked[0]])[[2, 3, 0, 1]],
    )


def test_a_judge_that_never_answers_stops_the_run_with_one_line() -> None:
    config = RewardConfig(judge="vlm", num_retries=1)
    rewards = Rewards(rewards={"instruction": VlmJudge(config, Script([{}, {}]))}, weights={"instruction": 1.0})
    scores = rewards(rollout_of(tasks_of(2), numbered(4)))
    message = r"100% of the trajectories .*judge 'vlm' \(form 4; the last answer without a score ends 'no'\)"
    with pytest.raises(GuardError, match=message) as caught:
        check_scores(scores, Config(reward=config))
    assert "\n" not in str(caught.value)


# Sampling


def test_sampling_has_the_distribution_of_softmax() -> None:
    """20,000 tokens at temperature 0.7: each frequency within 5 standard deviations."""
    num = 20_000
    logits = torch.tensor([1.0, 0.0, 2.0, -30.0, 0.5]).expand(num, 5)
    keys = torch.zeros(num, 5, dtype=torch.int64)
    keys[:, 3] = torch.arange(num)
    sampling = CountedSampling(keys, 0.7, prompt_length=4)
    drawn = sampling(torch.zeros(num, 6), logits)
    assert (drawn == 0).sum(1).eq(1).all() and drawn.isneginf().sum(1).eq(4).all()
    expected = (logits[0].double() / 0.7).softmax(0)
    for token, p in enumerate(expected.tolist()):
        share = (drawn[:, token] == 0).double().mean().item()
        assert abs(share - p) <= 5 * math.sqrt(p * (1 - p) / num) + 1e-12
    assert torch.equal(drawn[:9], CountedSampling(keys[:9], 0.7, 4)(torch.zeros(9, 6), logits[:9]))
    assert not torch.equal(drawn, sampling(torch.zeros(num, 7), logits))  # the next token has other numbers


# A model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-VL that was taught to tell red from blue."""
    path = tmp_path_factory.mktemp("vlm")
    save_vlm(path)
    vlm = LocalVlm(RewardConfig(judge="vlm", vlm=str(path), temperature=0, num_retries=0), CPU)
    teach(vlm)
    generation = vlm.model.generation_config
    generation.do_sample, generation.temperature = True, 0.7
    vlm.model.save_pretrained(path)
    return path


def local_config(folder: Path, **values: object) -> RewardConfig:
    fields = {"temperature": 0.0, "num_retries": 0, "max_answer_tokens": 20, "readout": "direct", **values}
    return RewardConfig(judge="vlm", vlm=str(folder), consistency="none", **fields)  # pyright: ignore[reportArgumentType]


def test_scores_of_a_model_are_those_of_the_images_in_their_turns(folder: Path) -> None:
    """Every pair of colours, in a batch of another composition than it was taught with: red is 1, blue is 5."""
    judge = build_judge(local_config(folder, num_parallel=3))
    task = EditTask(id=0, source=plain(1) / 127.5 - 1, instructions=("first", "second"), edit_types=("", ""))
    colours = [(2, 0), (0, 2), (0, 0), (2, 2), (2, 0)]
    pictures = torch.stack([torch.stack([plain(pair[turn]) for pair in colours]) for turn in range(2)]) / 127.5 - 1
    scores = judge(rollout_of([task], pictures)).values
    expected = [[(COLOUR_SCORES[colour] - 1) / 4 for colour in pair] for pair in colours]
    assert scores.tolist() == expected


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_an_answer_does_not_depend_on_the_batch(folder: Path, temperature: float) -> None:
    """Alone, and beside a longer question, so with padding on its left: greedy and sampled."""
    long = colour_question([0, 2], ["first", "a much longer instruction, which pads the others"])
    questions = [colour_question([2, 0]), long, colour_question([0, 0], ["x", "second"])]
    keys = torch.arange(15).reshape(3, 5)
    questions = [replace(question, key=key) for question, key in zip(questions, keys, strict=True)]
    vlm = LocalVlm(local_config(folder, temperature=temperature, num_parallel=3), CPU)
    alone = [vlm([question])[0] for question in questions]
    assert vlm(questions) == alone and vlm(questions[::-1]) == alone[::-1]
    if temperature:  # hot enough to differ: other numbers, other answers
        hot = LocalVlm(local_config(folder, temperature=20.0), CPU)
        again = [replace(question, key=question.key + 1) for question in questions]
        assert hot(questions) == hot(questions) != hot(again)


def test_images_reach_the_model_in_the_order_of_the_text(folder: Path) -> None:
    vlm = LocalVlm(local_config(folder), CPU)
    inputs = vlm.prepare([colour_question([0, 2]), colour_question([2, 0], ["longer words here", "second"])])
    text = vlm.processor.tokenizer.batch_decode(inputs["input_ids"])
    parts = [r"Source image:<\|vision_start\|>", r"Turn 1\. Instruction: first\nImage after turn 1:<\|vision_start\|>"]
    assert re.search(".*".join([*parts, "Instruction: second\nImage after turn 2:"]), text[0], re.DOTALL)
    assert inputs["attention_mask"][0, 0] == 0 and inputs["attention_mask"][:, -1].all()  # padded on the left
    pixels = inputs["pixel_values"].reshape(6, -1, 3, 32).mean((1, 3)).argmax(1)  # the brightest channel of each image
    assert pixels.tolist() == [1, 0, 2, 1, 2, 0]


def test_folders_that_are_no_judge(folder: Path, tmp_path: Path) -> None:
    small: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=300, **small)).save_pretrained(tmp_path / "text")
    small_tokenizer().save_pretrained(tmp_path / "text")
    (tmp_path / "empty").mkdir()
    for name in ("text", "empty", "missing"):
        with pytest.raises(ValueError, match=r"reward.vlm .* cannot be loaded as a vision-language model") as caught:
            build_judge(local_config(tmp_path / name))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=r"reward.vlm 'owner/name' cannot be loaded"):  # no such name, or no network
        build_judge(local_config(Path("owner/name")))
    (tmp_path / "mute").mkdir()
    for file in folder.iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / "mute" / file.name).symlink_to(file)
    with pytest.raises(ValueError, match="has no chat template: give an instruction-tuned qwen3_vl"):
        build_judge(local_config(tmp_path / "mute"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"url": "host:8000/v1"}, "reward.url is 'host:8000/v1': must begin with http"),
        ({"url": "http://"}, "reward.url is 'http://': must begin with http"),
        ({"url": "http://ho st/v1"}, "reward.url is 'http://ho st/v1': must begin with http"),
        ({"url": "http://host:port/v1"}, "reward.url is no address: write http://host:8000/v1"),
        ({"url": "http://me:secret@host/v1"}, "^reward.url must hold no user, password or .* MTEDITFLOW_API_KEY$"),
        ({"url": "http://host/v1?key=secret"}, "^reward.url must hold no user, password or .* MTEDITFLOW_API_KEY$"),
        ({"max_wait_s": -1.0}, r"reward.max_wait_s is -1.0: must lie in \[0, 86400\]"),
        ({"vlm": ""}, "reward.vlm is '': must be a hub name or a folder"),
        ({"num_parallel": 0}, r"reward.num_parallel is 0: must lie in \[1, "),
        ({"timeout_s": 0.0}, r"reward.timeout_s is 0.0: must lie in \(0, "),
        ({"num_retries": 10}, r"reward.num_retries is 10: must lie in \[0, 9\]"),
        ({"temperature": 0.0}, "reward.num_retries is 2: without sampling"),
        ({"leniency": 1.0}, "reward.leniency is 1.0: judge 'vlm' has none"),
    ],
)
def test_what_is_refused(values: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardConfig(judge="vlm", **values)


def test_what_is_refused_across_sections() -> None:
    vlm = RewardConfig(judge="vlm")
    with pytest.raises(ValueError, match=r"data.num_turns is 10: must be at most 9 for reward.judge 'vlm'"):
        Config(reward=vlm, data=DataConfig(num_turns=10))
    ten = EvaluationConfig(num_turns=10)
    with pytest.raises(ValueError, match=r"evaluation.num_turns is 10: must be at most 9 for reward.judge 'vlm'"):
        Config(reward=vlm, data=DataConfig(path="a.jsonl"), evaluation=ten)
    Config(reward=vlm, data=DataConfig(path="a.jsonl"), evaluation=replace(ten, num_turns=9))
    assert Config(reward=vlm, evaluation=ten).num_held_out_turns == 10  # by the embedded world's verifier
    with pytest.raises(ValueError, match=r"advantage.consistency_weight is 0.3: reward.consistency is 'none'"):
        Config(reward=replace(vlm, consistency="none"))
    Config(reward=replace(vlm, consistency="none"), advantage=AdvantageConfig(consistency_weight=0))
