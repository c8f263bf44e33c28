"""A VLM judge in this process: resident on its device, asked in batches.

Reward was 78 s of a step before UniRL batched a resident judge, and 4 s after. Rows of a batch are padded on the left,
so that all answers begin at one place. A token is drawn by Gumbel's trick with numbers counted by Philox from the
question's key: an answer depends on its own question alone, up to the rounding of the logits, and on no global state.
"""

from collections.abc import Sequence
from typing import Any

import torch
from mteditflow_kernels import counter_uniform
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor, GenerationConfig, LogitsProcessorList
from transformers.processing_utils import ProcessorMixin
from transformers.utils.import_utils import is_torchvision_available
from transformers.utils.logging import disable_progress_bar

from mteditflow.config.errors import first_line
from mteditflow.config.reward import RewardConfig
from mteditflow.noise import TURN_SHIFT
from mteditflow.pictures import to_pil
from mteditflow.reward.vlm import Answer, Question, answer_of

TOP_K = 20  # likeliest tokens among which one is drawn, as in Qwen3-VL's own generation config


class CountedSampling:
    """Logits processor: leaves one of the TOP_K likeliest tokens possible, drawn at `temperature`.

    argmax_i(logit_i / temperature - log(-log u_i)) has the distribution of softmax(logit / temperature).
    """

    def __init__(self, keys: Tensor, temperature: float, prompt_length: int) -> None:
        self.keys, self.temperature, self.prompt_length = keys, temperature, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits (B, V) of the next token after input_ids (B, T)."""
        top = scores.float().topk(min(TOP_K, scores.shape[1]))
        keys = self.keys.clone()
        keys[:, 2] += (input_ids.shape[1] - self.prompt_length) << TURN_SHIFT
        uniform = counter_uniform(keys, top.values.shape[1])
        place = (top.values / self.temperature - (-uniform.log()).log()).argmax(1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, top.indices.gather(1, place), 0.0)


class LocalVlm:
    """`config.vlm` by transformers, bfloat16 on a GPU and float32 on a CPU. ValueError: it is no VLM, or not there."""

    is_remote = False

    def __init__(self, config: RewardConfig, device: torch.device) -> None:
        self.config, self.device = config, device
        self.dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        self.processor, self.model = _load(config, self.dtype)
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

    def __call__(self, questions: Sequence[Question]) -> list[Answer]:
        """One answer per question, `config.num_parallel` at a time."""
        size = self.config.num_parallel
        texts = [
            text for start in range(0, len(questions), size) for text in self._generate(questions[start : start + size])
        ]
        return [answer_of(text, len(q.instructions)) for text, q in zip(texts, questions, strict=True)]

    def close(self) -> None:
        """A batch is short, and ends by itself."""

    @torch.inference_mode()
    def _generate(self, questions: Sequence[Question]) -> list[str]:
        inputs = self.prepare(questions).to(self.device, self.dtype)
        length = inputs["input_ids"].shape[1]
        processors = LogitsProcessorList()
        if self.config.temperature > 0:
            keys = torch.stack([question.key for question in questions]).to(self.device)
            processors.append(CountedSampling(keys, self.config.temperature, length))  # pyright: ignore[reportArgumentType]
        tokens = self.model.generate(**inputs, generation_config=self._generation, logits_processor=processors)
        return self.processor.tokenizer.batch_decode(tokens[:, length:], skip_special_tokens=True)

    def prepare(self, questions: Sequence[Question]) -> Any:
        """The model's inputs, on the host."""
        texts = [
            self.processor.apply_chat_template(messages(question), tokenize=False, add_generation_prompt=True)
            for question in questions
        ]
        images = [[to_pil(image) for image in question.images] for question in questions]
        return self.processor(text=texts, images=images, padding=True, return_tensors="pt")


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
        processor: Any = AutoProcessor.from_pretrained(path)
        model: Any = AutoModelForImageTextToText.from_pretrained(path, dtype=dtype)
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
