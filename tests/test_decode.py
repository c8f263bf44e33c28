"""A judge's answer in this process: tokens as transformers draws them, stops, pictures, and the read-out 'expected'."""

import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_judge import SPECIAL, save_vlm, small_processor, token_ids, without_video
from tokenizers import normalizers
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen3VLForConditionalGeneration

from mteditflow.config import RewardConfig
from mteditflow.pictures import to_pil
from mteditflow.reward import qwen3_vl, vlm_local
from mteditflow.reward.decode import CHECK_EVERY
from mteditflow.reward.vlm import Question, closed_at
from mteditflow.reward.vlm_local import LocalVlm, make_form

CPU = torch.device("cpu")


def question(num_turns: int, seed: int, text: str = "paint it", size: tuple[int, int] = (16, 16)) -> Question:
    """Pictures of noise."""
    random = torch.Generator().manual_seed(seed)
    images = [torch.randint(256, (3, *size), generator=random, dtype=torch.uint8) for _ in range(num_turns + 1)]
    return Question(
        images=tuple(images), instructions=tuple(f"{text} {turn}" for turn in range(num_turns)), readout="direct",
        key=torch.arange(5) + seed,
    )  # fmt: skip


FIRST = question(2, 1)
QUESTIONS = [
    FIRST,
    question(3, 2, "a longer instruction than the others have"),
    question(1, 3, "x", (16, 24)),
    replace(question(2, 4), images=(FIRST.images[0], *question(2, 4).images[1:])),  # of the group of the first
    question(2, 5),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A Qwen3-VL with random weights."""
    path = tmp_path_factory.mktemp("random")
    with pytest.MonkeyPatch.context() as patch:
        without_video(patch)
        save_vlm(path)
        yield path


def local(folder: Path, **values: Any) -> LocalVlm:
    fields = {"temperature": 0.0, "num_retries": 0, "max_answer_tokens": 30, "readout": "direct", **values}
    return LocalVlm(RewardConfig(judge="vlm", vlm=str(folder), consistency="none", **fields), CPU)


# Tokens


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_tokens_are_those_of_generate(folder: Path, temperature: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Greedy and sampled, token by token, of rows that differ in images, sizes, turns and text, two of one group; also
    where a batch is read in parts.
    """
    vlm = local(folder, temperature=temperature)
    keys = torch.stack([question.key for question in QUESTIONS])
    with torch.inference_mode():
        expected = vlm._generate(vlm.prepare(QUESTIONS), keys)
    ends = [next((i for i, token in enumerate(row) if token in vlm._ends), len(row)) for row in expected]
    written = list[list[int]]()
    monkeypatch.setattr(vlm, "_answer", lambda tokens, num_turns: written.append(tokens))
    monkeypatch.setattr(vlm, "_is_finished", lambda tokens, num_turns: False)
    for at_once in (2**15, 200):
        monkeypatch.setattr(qwen3_vl, "PREFILL_TOKENS", at_once)
        written.clear()
        vlm(QUESTIONS)
        for end, row, found in zip(ends, expected, written, strict=True):
            assert found[:end] == row[:end] and (end == 30 or found[end] in vlm._ends)
    assert max(ends) == 30 and len({tuple(row) for row in written}) == len(written)


def test_prompts_are_the_processor_s(folder: Path) -> None:
    vlm = local(folder)
    with torch.inference_mode():
        prompts, inputs = vlm._prompts(QUESTIONS), vlm.prepare(QUESTIONS)
    for prompt, ids, mask in zip(prompts, inputs["input_ids"], inputs["attention_mask"], strict=True):
        assert torch.equal(prompt.ids, ids[mask.bool()])
    assert prompts[0].head == prompts[3].head and len({prompt.head for prompt in prompts}) == 4


class Counted:
    """How often a module was called, and with how many pictures."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: Any) -> None:
        self.calls, known = list[int](), module.forward

        def forward(*arguments: Any, **options: Any) -> Any:
            self.calls.append(len(options["grid_thw"]) if "grid_thw" in options else 1)
            return known(*arguments, **options)

        monkeypatch.setattr(module, "forward", forward)


def test_a_picture_is_encoded_once_and_a_source_once_for_its_group(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = local(folder, max_answer_tokens=1)
    seen = Counted(monkeypatch, vlm.model.model.visual)
    wave = [FIRST, replace(FIRST, images=(FIRST.images[0].clone(), FIRST.images[1], FIRST.images[0]))]
    vlm(wave)
    assert seen.calls == [3]  # the source, two edits; one edit is the source, another there twice
    alone = [answer.text for answer in vlm([QUESTIONS[3]])]
    assert seen.calls == [3, 2]  # a group's next wave
    assert alone == [answer.text for answer in local(folder, max_answer_tokens=1)([QUESTIONS[3]])]
    monkeypatch.setattr(qwen3_vl, "KEPT_SOURCES", 1)
    vlm([QUESTIONS[4]])
    vlm([FIRST])
    assert seen.calls == [3, 2, 3, 3]


# The end of an answer


@pytest.mark.parametrize(
    ("kept", "more", "num_turns"),
    [
        ("<Turn1Score>4</Turn1Score>", " and more", 1),
        (None, "<Turn1Score>4</Turn1Score>", 2),
        ("<Turn2Score>4</Turn2Score><Turn1Score>x</Turn1Score>", "\n", 2),
        (None, "<Thought>a <Turn1Score>4</Turn1Score>", 1),
        (None, "<Thought><Turn1Score>4</Turn1Score></Thought>", 1),
        ("<Thought>a</Thought><Turn1Score>4</Turn1Score>", "<Turn1Score>", 1),
        (None, "", 1),
    ],
)
def test_where_an_answer_is_complete(kept: str | None, more: str, num_turns: int) -> None:
    assert closed_at(f"{kept or ''}{more}", num_turns) == (None if kept is None else len(kept))


class Dictated:
    """Logits that say given texts, one for each row, and then go on with a letter for ever."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, vlm: LocalVlm, texts: Sequence[str]) -> None:
        tokenizer, self.num_drawn = vlm.processor.tokenizer, 0
        ids = [tokenizer(text).input_ids for text in texts]

        def draw(logits: Tensor, chance: Tensor | None, temperature: float) -> Tensor:
            at, self.num_drawn = self.num_drawn, self.num_drawn + 1
            filler = tokenizer("a").input_ids
            tokens = [row[at] if at < len(row) else filler[0] for row in ids]
            return torch.tensor(tokens + filler * (len(logits) - len(tokens)))

        monkeypatch.setattr("mteditflow.reward.decode.draw", draw)
        self.longest = max(map(len, ids))


def test_a_batch_ends_soon_after_its_last_tag(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each answer has its words up to its own last tag, or its end; of what was written at most CHECK_EVERY - 1 tokens
    are of no use, or twice as many and one where a look is on its way while the next tokens are written, as on a GPU.
    """
    scores = "<Turn1Score>2</Turn1Score><Turn2Score>5</Turn2Score>"
    texts = [f"<Thought>{'a' * 40}</Thought>{scores}", f"{SPECIAL[1]}{scores}", scores, scores.replace("5", "4.5")]
    for num_late in (0, 1):
        vlm = local(folder, max_answer_tokens=200)
        assert vlm._decode
        vlm._decode.num_late = num_late
        dictated = Dictated(monkeypatch, vlm, texts)
        answers = vlm([question(2, i) for i in range(4)])
        assert [answer.text for answer in answers] == [texts[0], "", texts[2], texts[3]]
        assert [answer.grades for answer in answers] == [(2, 5), None, (2, 5), None]
        assert [answer.fault for answer in answers] == ["", "form", "", "form"]
        assert 0 <= dictated.num_drawn - dictated.longest <= CHECK_EVERY * (1 + num_late) - 1


def test_an_answer_that_is_cut_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = local(folder, max_answer_tokens=11)
    dictated = Dictated(monkeypatch, vlm, ["<Turn1Score>2</Turn1Score> and then"])
    (answer,) = vlm([FIRST])
    assert (answer.grades, answer.fault, dictated.num_drawn) == (None, "cut", 11)
    assert answer.text.startswith("<Turn1Score>2</Turn1Score>")


def test_close_ends_a_batch_and_begins_no_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vlm = local(folder, max_answer_tokens=1000, num_parallel=1)
    dictated = Dictated(monkeypatch, vlm, ["a"])
    known = vlm.processor.tokenizer.decode

    def decode(*arguments: Any, **options: Any) -> str:
        if dictated.num_drawn > 20:
            vlm.close()
        return known(*arguments, **options)

    monkeypatch.setattr(vlm.processor.tokenizer, "decode", decode)
    assert len(vlm([FIRST, FIRST])) == 1 and dictated.num_drawn < 20 + 2 * CHECK_EVERY


def test_a_thread_gets_the_same_answers(folder: Path) -> None:
    """Grad mode is a thread's own, and another thread's is on."""
    vlm, found = local(folder), list[Any]()
    thread = threading.Thread(target=lambda: found.append(vlm(QUESTIONS)))
    thread.start()
    thread.join()
    assert found == [vlm(QUESTIONS)]


# The read-out 'expected'


def brute_force(model: Any, vlm: LocalVlm, asked: Question) -> tuple[list[float], list[float], Tensor]:
    """Expectations and other mass at every turn's place, each by a pass of its own of transformers' whole model; and
    the logits of the digits (K, 5).
    """
    tokenizer, (text,) = vlm.processor.tokenizer, vlm._texts([asked])
    digits = tokenizer.convert_tokens_to_ids(["1", "2", "3", "4", "5"])
    grades, others, found = [], [], []
    for turn in range(1, len(asked.instructions) + 1):
        before = "".join(f"<Turn{i}Score>3</Turn{i}Score>\n" for i in range(1, turn))
        images = [to_pil(image) for image in asked.images]
        inputs = vlm.processor(text=f"{text}{before}<Turn{turn}Score>", images=images, return_tensors="pt")
        logits = model(**inputs.to(CPU, model.dtype)).logits[0, -1]
        p = logits.softmax(0)[digits]
        grades.append(float((p * torch.arange(1, 6)).sum() / p.sum()))
        others.append(float(1 - p.sum()))
        found.append(logits[digits])
    return grades, others, torch.stack(found)


@torch.inference_mode()
def test_expectations_are_those_of_brute_force(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a batch and alone. A logit that is off by d moves sum j q_j, q the shares of the five digits, by at most
    sum q_j |j - E| d <= 2 d, and their mass by d / 4 at most; d is twice what float32 costs transformers.
    """
    monkeypatch.setattr(vlm_local, "MAX_OFF_MASS", 1.0)
    vlm, model = local(folder, readout="expected"), Qwen3VLForConditionalGeneration
    plain, exact = (model.from_pretrained(folder, dtype=dtype).eval() for dtype in (torch.float32, torch.float64))
    answers = vlm(QUESTIONS)
    for asked, answer in zip(QUESTIONS, answers, strict=True):
        grades, others, logits = brute_force(exact, vlm, asked)
        d = 2 * (brute_force(plain, vlm, asked)[2].double() - logits).abs().max().item()
        (alone,) = vlm([asked])
        assert 0 < d < 1e-4 and answer.grades and alone.grades and len(answer.grades) == len(asked.instructions)
        for found in (answer, alone):
            assert found.grades == pytest.approx(grades, abs=2 * d)
            assert found.off_mass == pytest.approx(max(others), abs=d)
        assert answer.grades == pytest.approx(alone.grades, abs=4 * d)
        assert len(grades) == 1 or max(grades) - min(grades) > 40 * d  # turns are told apart


def test_mass_on_no_score_makes_an_answer_invalid(folder: Path) -> None:
    answers = local(folder, readout="expected")(QUESTIONS)
    for answer in answers:
        assert answer.grades is None and answer.fault.startswith("mass: ") and 0.5 < answer.off_mass < 1
    sure = vlm_local._expected(torch.tensor([[0.1, 0.0, 0.0, 0.0, 0.5], [0.0, 0.0, 1.0, 0.0, 0.0]]))
    assert sure.grades == pytest.approx((2.6 / 0.6, 3.0)) and sure.off_mass == pytest.approx(0.4)
    assert sure.text.startswith("Turn 1: 4.33 (1 to 5: 0.100 ")
    assert vlm_local._expected(torch.tensor([[torch.nan] * 5])).grades is None


def test_the_form_of_an_answer(folder: Path) -> None:
    """Cut before a turn's score it is the beginning of what is asked for."""
    tokenizer = local(folder).processor.tokenizer
    form = make_form(tokenizer, "it")
    assert tokenizer.decode(form.ids[: form.places[1]]) == "<Turn1Score>3</Turn1Score>\n<Turn2Score>"
    assert tokenizer.convert_ids_to_tokens(form.digits) == ["1", "2", "3", "4", "5"] and len(form.places) == 9
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("4", "four")
    with pytest.raises(
        ValueError, match=r"reward.readout is 'expected': it does not write each score as one"
    ) as caught:
        make_form(tokenizer, "it")
    assert "\n" not in str(caught.value)


# Other architectures


@torch.inference_mode()
def test_another_architecture_goes_through_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Qwen2.5-VL, in both ways."""
    monkeypatch.setattr(vlm_local, "MAX_OFF_MASS", 1.0)
    without_video(monkeypatch)
    processor = small_processor(4, (64, 4096))
    config: Any = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(processor.tokenizer), "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0},
        },
        vision_config={"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4,
                       "out_hidden_size": 32, "fullatt_block_indexes": [1], "window_size": 16},
        **token_ids(processor.tokenizer),
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    settings = RewardConfig(judge="vlm", consistency="none", readout="expected", max_answer_tokens=5)
    vlm = LocalVlm(settings, CPU, (processor, model))
    asked = [FIRST, question(2, 2, "a longer instruction than the others have")]
    for found, one in zip(vlm(asked), asked, strict=True):
        assert found.grades == pytest.approx(brute_force(model, vlm, one)[0], abs=1e-5)
    writer = LocalVlm(replace(settings, readout="direct"), CPU, (processor, model))
    texts = [answer.text for answer in writer(asked)]
    assert texts == [writer([one])[0].text for one in asked] and len(set(texts)) == 2
