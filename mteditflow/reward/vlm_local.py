"""A VLM judge in this process: resident on its device, a wave of questions in one batch.

Reward was 78 s of a step before UniRL batched a resident judge, and 4 s after. Qwen3-VL goes through reward/qwen3_vl.py
and decode.py; any other architecture through transformers' `generate`, slower, with the same tokens drawn.

The read-out 'expected' writes nothing. It reads, in one pass over the question and an answer of the form that was asked
for, with what probability each of the digits 1 to 5 stands at each turn's place: sum j p(j) / sum p(j). At the places
before, the answer has NEUTRAL, for every trajectory alike. A judge that looks at its own grades would pull the next
ones towards them (a halo); with the same digit everywhere that pull is the same for all of a group, and goes out with
the group's mean, where the likeliest digit would make it jump between neighbours and cost another pass.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, LogitsProcessorList
from transformers.processing_utils import ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available
from transformers.utils.logging import disable_progress_bar

from mteditflow.config.errors import first_line
from mteditflow.config.reward import RewardConfig
from mteditflow.pictures import to_pil
from mteditflow.reward.decode import CHECK_EVERY, Decoder, draw, gumbel
from mteditflow.reward.qwen3_vl import Encoder, Prompt, make_prompt, prefill
from mteditflow.reward.vlm import MAX_OFF_MASS, Answer, Question, answer_of, closed_at

NEUTRAL = 3  # what the turns before were scored, where 'expected' reads a turn's score
MAX_TURNS = 9
TAG_TOKENS = 16  # of a closing tag, at most: one for each byte


@dataclass(frozen=True, kw_only=True)
class Form:
    """The answer that 'expected' puts in the judge's mouth, of MAX_TURNS turns; one of fewer turns is its beginning."""

    ids: Tensor  # (A,) int64
    places: tuple[int, ...]  # of the turns' scores among them
    digits: Tensor  # (5,) int64: the tokens of the scores 1 to 5


def make_form(tokenizer: Any, name: str) -> Form:
    """The form in a tokenizer's tokens. ValueError, one line: a score is not one token there, the rest unchanged."""
    answers = [
        torch.tensor(tokenizer("\n".join(f"<Turn{t}Score>{digit}</Turn{t}Score>" for t in range(1, MAX_TURNS + 1)),
                               add_special_tokens=False).input_ids)
        for digit in range(1, 6)
    ]  # fmt: skip
    remedy = f"reward.readout is 'expected': {name} does not write each score as one token; take 'thinking' or 'direct'"
    if len({len(ids) for ids in answers}) > 1:
        raise ValueError(remedy)
    ids = torch.stack(answers)  # (5, A)
    places = (ids != ids[:1]).any(0).nonzero()[:, 0]
    digits = ids[:, places]  # (5, places)
    if len(places) != MAX_TURNS or (digits != digits[:, :1]).any() or len(digits[:, 0].unique()) != 5:
        raise ValueError(remedy)
    return Form(ids=ids[NEUTRAL - 1], places=tuple(places.tolist()), digits=digits[:, 0])


class CountedSampling:
    """Logits processor of transformers: leaves one token possible, which `draw` says."""

    def __init__(self, keys: Tensor, temperature: float, prompt_length: int) -> None:
        self.keys, self.temperature, self.prompt_length = keys, temperature, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (B, V) of the next token after input_ids (B, T)."""
        chance = gumbel(self.keys, input_ids.shape[1] - self.prompt_length, 1)[0]
        token = draw(scores.float(), chance, self.temperature)
        return torch.full_like(scores, -torch.inf).scatter(1, token[:, None], 0.0)


class LocalVlm:
    """`config.vlm` by transformers, bfloat16 on a GPU and float32 on a CPU."""

    is_remote = False

    def __init__(self, config: RewardConfig, device: torch.device, loaded: tuple[Any, Any] | None = None) -> None:
        """loaded: processor and model, where they are there already. ValueError: it is no VLM, or not there, or has no
        such read-out.
        """
        self.config, self.device = config, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.processor, self.model = loaded or _load(config, self.dtype)
        self.processor.tokenizer.padding_side = "left"
        self.model.requires_grad_(False).eval().to(device)
        defaults = self.model.generation_config
        self._generation = GenerationConfig(
            do_sample=False,  # what chance there is comes from CountedSampling
            max_new_tokens=config.max_answer_tokens,
            eos_token_id=defaults.eos_token_id or self.processor.tokenizer.eos_token_id,
            pad_token_id=defaults.pad_token_id or self.processor.tokenizer.pad_token_id,
        )
        # What `generate` is not told it takes from here; Qwen's own file has it sample.
        self.model.generation_config = self._generation
        ends: Any = self._generation.eos_token_id
        self._ends = {ends} if isinstance(ends, int) else set(ends)
        is_expected, name = config.readout == "expected", f"reward.vlm {config.vlm!r}"
        self._form = make_form(self.processor.tokenizer, name) if is_expected else None
        self._encode = self._decode = None
        if self.model.config.model_type == "qwen3_vl":
            self._encode = Encoder(self.processor, self.model)
            self._decode = Decoder(self.model, config.temperature)
        self._is_closing = False

    @torch.inference_mode()
    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer per question, `config.num_parallel` at a time."""
        size, answers = self.config.num_parallel, list[Answer]()
        ask = self._expect if self._form else self._write
        for first in range(0, len(questions), size):
            if not self._is_closing:
                answers += ask(questions[first : first + size])
        return answers

    def close(self) -> None:
        """Have the batch that is being answered end within some tokens; no other begins."""
        self._is_closing = True

    def prepare(self, questions: Sequence[Question]) -> Any:
        """The processor's inputs of any model, on the host, padded on the left."""
        images = [[to_pil(image) for image in question.images] for question in questions]
        return self.processor(text=self._texts(questions), images=images, padding=True, return_tensors="pt")

    def _texts(self, questions: Sequence[Question]) -> list[str]:
        template: Callable[..., str] = self.processor.apply_chat_template
        return [template(messages(question), tokenize=False, add_generation_prompt=True) for question in questions]

    def _prompts(self, questions: Sequence[Question]) -> list[Prompt]:
        assert self._encode
        pictures = self._encode([question.images for question in questions])
        ids = self.processor.tokenizer(self._texts(questions)).input_ids
        return [make_prompt(of_text, of_row, self.model) for of_text, of_row in zip(ids, pictures, strict=True)]

    def _write(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers in the judge's own words."""
        keys = torch.stack([question.key for question in questions])
        if self._decode is None:
            written = self._generate(self.prepare(questions), keys)
        else:
            prompts = self._prompts(questions)
            order = _neighbours(prompts)
            num_turns = [len(questions[row].instructions) for row in order]

            def is_finished(row: int, tokens: list[int]) -> bool:
                return self._is_closing or self._is_finished(tokens, num_turns[row])

            found = self._decode([prompts[i] for i in order], keys[order], self.config.max_answer_tokens, is_finished)
            written = [found[order.index(row)] for row in range(len(questions))]
        return [self._answer(tokens, len(q.instructions)) for tokens, q in zip(written, questions, strict=True)]

    def _is_finished(self, tokens: list[int], num_turns: int) -> bool:
        decode, last = self.processor.tokenizer.decode, tokens[-CHECK_EVERY - TAG_TOKENS :]
        if not self._ends.isdisjoint(last):
            return True
        return "Score>" in decode(last) and closed_at(decode(tokens, skip_special_tokens=True), num_turns) is not None

    def _answer(self, tokens: list[int], num_turns: int) -> Answer:
        """What was said up to the last closing tag that was asked for, or to the end."""
        end = next((i for i, token in enumerate(tokens) if token in self._ends), None)
        text = self.processor.tokenizer.decode(tokens[:end], skip_special_tokens=True)
        closed = closed_at(text, num_turns)
        if end is None and closed is None:
            return Answer(text=text, grades=None, fault="cut")
        return answer_of(text[:closed], num_turns)

    def _generate(self, inputs: Any, keys: Tensor) -> list[list[int]]:
        """Answers of any architecture by transformers."""
        inputs = inputs.to(self.device, self.dtype)
        length, processors = inputs["input_ids"].shape[1], LogitsProcessorList()
        if self.config.temperature > 0:
            sampling = CountedSampling(keys.to(self.device), self.config.temperature, length)
            processors.append(sampling)  # pyright: ignore[reportArgumentType]
        tokens = self.model.generate(**inputs, generation_config=self._generation, logits_processor=processors)
        return tokens[:, length:].tolist()

    def _expect(self, questions: Sequence[Question]) -> list[Answer]:
        """Answers by the probabilities of the digits."""
        form, num_turns = self._form, [len(question.instructions) for question in questions]
        assert form
        forced = [form.ids[: form.places[num - 1]] for num in num_turns]
        if self._decode is None:
            logits = self._forced_logits(questions, forced)
            order = list(range(len(questions)))
        else:
            prompts = [p.followed(ids) for p, ids in zip(self._prompts(questions), forced, strict=True)]
            order = _neighbours(prompts)
            places = [
                [len(prompts[row].ids) - len(forced[row]) + place - 1 for place in form.places[: num_turns[row]]]
                for row in order
            ]
            logits = prefill(self.model, [prompts[row] for row in order], places, None)
        found = logits.softmax(1)[:, form.digits.to(self.device)].cpu().split([num_turns[row] for row in order])
        return [_expected(found[order.index(row)]) for row in range(len(questions))]

    def _forced_logits(self, questions: Sequence[Question], forced: Sequence[Tensor]) -> Tensor:
        """Logits (M, V) at every turn's place in turn, of any architecture; all questions have as many turns."""
        inputs, form = self.prepare(questions), self._form
        assert form
        shape, answers = inputs["input_ids"].shape, torch.stack([*forced])
        for name, value in inputs.items():
            if value.shape == shape:  # ids, masks and kinds of tokens; an answer is text, kind 0
                behind = {"input_ids": answers, "attention_mask": torch.ones_like(answers)}
                inputs[name] = torch.cat([value, behind.get(name, torch.zeros_like(answers)).to(value.dtype)], 1)
        num = answers.shape[1] + 1
        logits = self.model(**inputs.to(self.device, self.dtype), logits_to_keep=num).logits.float()
        places = torch.tensor([place for place in form.places if place < num])
        return logits[:, places.to(self.device)].flatten(0, 1)


def _expected(probabilities: Tensor) -> Answer:
    """The answer that probabilities (K, 5) of the scores 1 to 5 are."""
    mass = probabilities.sum(1)
    grades = (probabilities @ torch.arange(1.0, 6.0) / mass).tolist()
    shares = [" ".join(f"{p:.3f}" for p in row) for row in probabilities.tolist()]
    text = "\n".join(f"Turn {i}: {g:.2f} (1 to 5: {s})" for i, (g, s) in enumerate(zip(grades, shares, strict=True), 1))
    off_mass = 1 - mass.min().item()
    if not off_mass <= MAX_OFF_MASS:  # NaN is not
        return Answer(text=text, grades=None, fault=f"mass: {off_mass:.2f} on no score", off_mass=off_mass)
    return Answer(text=text, grades=tuple(grades), off_mass=max(0.0, off_mass))


def _neighbours(prompts: Sequence[Prompt]) -> list[int]:
    """The order in which those that begin alike are neighbours, else as it was."""
    heads = [prompt.head for prompt in prompts]
    return sorted(range(len(heads)), key=lambda row: heads.index(heads[row]))


def messages(question: Question) -> list[dict[str, Any]]:
    """Make the chat that a question is, for a processor's template."""
    content = [
        {"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in question.parts
    ]
    return [
        {"role": "system", "content": [{"type": "text", "text": question.rubric}]},
        {"role": "user", "content": content},
    ]


_parts = ProcessorMixin.get_attributes.__func__


def _parts_but_videos(cls: type) -> list[str]:
    """Name the parts of a processor without the one for videos, which wants torchvision and which no judge needs."""
    return [name for name in _parts(cls) if name != "video_processor"]


def _load(config: RewardConfig, dtype: torch.dtype) -> tuple[Any, Any]:
    """Processor and model of a folder or a hub name."""
    name, path = f"reward.vlm {config.vlm!r}", config.vlm_path
    disable_progress_bar()  # the run has its own
    if not is_torchvision_available():
        ProcessorMixin.get_attributes = classmethod(_parts_but_videos)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        processor: Any = AutoProcessor.from_pretrained(path, trust_remote_code=False)  # nor asked about on the terminal
        model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, trust_remote_code=False)
    except ImportError as error:
        raise ValueError(f"{name} needs a package that is missing ({first_line(error)}): install it") from error
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{name} cannot be loaded as a vision-language model ({first_line(error)}): give the folder or hub name "
            f"of one, such as Qwen/Qwen3-VL-8B-Instruct"
        ) from error
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(f"{name} has no chat template: give an instruction-tuned {model.config.model_type}")
    return processor, model
