"""Small models in the true format of a judge's folders, and what they are shown."""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    Qwen2VLImageProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils.import_utils import is_torchvision_available

from mteditflow.judge.small import CHAT_TEMPLATE, SPECIAL, build_model, build_tokenizer, save_processor
from mteditflow.reward.vlm import DIRECT, RUBRIC, THINKING, Question
from mteditflow.reward.vlm_local import LocalVlm


def without_video(patch: pytest.MonkeyPatch) -> None:
    """Qwen3-VL's processor has a part for videos, which torchvision alone can make and a judge of images never asks."""
    if not is_torchvision_available():
        patch.setattr(Qwen3VLProcessor, "get_attributes", classmethod(lambda cls: ["image_processor", "tokenizer"]))


def small_tokenizer() -> Any:
    """A token for each long word of the question, one per byte for the rest, and Qwen's special ones."""
    words = sorted({word for word in f"{RUBRIC} {THINKING} {DIRECT}".split() if len(word) > 2 and "<" not in word})
    return build_tokenizer([*(f" {word}" for word in words), "<Turn", "</Turn", "Score>"])


def small_processor(patch_size: int, num_pixels: tuple[int, int]) -> Any:
    """Qwen3-VL's processor over the small tokenizer; pictures are resized to a number of pixels between two."""
    process = Qwen2VLImageProcessor if is_torchvision_available() else Qwen2VLImageProcessorPil
    size = {"shortest_edge": num_pixels[0], "longest_edge": num_pixels[1]}
    images = process(patch_size=patch_size, merge_size=2, temporal_patch_size=2, size=size)
    videos = Qwen3VLVideoProcessor() if is_torchvision_available() else None
    return Qwen3VLProcessor(images, small_tokenizer(), videos, chat_template=CHAT_TEMPLATE)


def token_ids(tokenizer: Any) -> dict[str, Any]:
    """The special tokens, as Qwen3VLConfig wants them."""
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": SPECIAL[2], "vision_end": SPECIAL[3]}
    return {f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}


def save_vlm(folder: Path) -> None:
    """A Qwen3-VL of about 60 thousand parameters; an image of 32 x 32 pixels has 16 tokens."""
    tokenizer = small_tokenizer()
    text = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {
        "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4,
        "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    model = build_model(tokenizer, text, vision, seed=0)
    for weight in model.parameters():  # far enough apart for the answers to differ from one another
        weight.data.mul_(4) if weight.ndim > 1 else None
    save_processor(folder, tokenizer, patch_size=4, num_pixels=(64, 4096))
    model.save_pretrained(folder)


def plain(colour: int) -> Tensor:
    """A picture (3, 16, 16) uint8 of one colour: 0 red, 1 green, 2 blue."""
    picture = torch.full((3, 16, 16), 40, dtype=torch.uint8)
    picture[colour] = 230
    return picture


def colour_question(colours: Sequence[int], instructions: Sequence[str] = ("first", "second")) -> Question:
    """A green source and an edit of each colour."""
    return Question(
        images=(plain(1), *(plain(colour) for colour in colours)),
        instructions=tuple(instructions),
        readout="direct",
        key=torch.zeros(5, dtype=torch.int64),
    )


COLOUR_SCORES = {0: 1, 2: 5}  # what the judge is taught: red is 1, blue is 5


def teach(vlm: LocalVlm) -> None:
    """Learns by heart to score two turns by their colours; its answers then tell which image it saw where."""
    pairs = list(product(COLOUR_SCORES, repeat=2))
    tokenizer, inputs = vlm.processor.tokenizer, dict(vlm.prepare([colour_question(pair) for pair in pairs]))
    texts = ["".join(f"<Turn{i}Score>{COLOUR_SCORES[c]}</Turn{i}Score>" for i, c in enumerate(p, 1)) for p in pairs]
    answers = tokenizer([f"{text}<|im_end|>" for text in texts], return_tensors="pt").input_ids  # (4, A)
    inputs["input_ids"] = torch.cat([inputs["input_ids"], answers], 1)
    inputs["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(answers)], 1)
    inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros_like(answers)], 1)
    optimizer = torch.optim.AdamW(vlm.model.requires_grad_(True).parameters(), lr=6e-3, weight_decay=0)
    loss = torch.tensor(torch.inf)
    for _ in range(100):
        logits = vlm.model(**inputs, logits_to_keep=answers.shape[1] + 1).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), answers.flatten())
        if loss < 0.03:
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vlm.model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    vlm.model.requires_grad_(False)
    assert loss < 0.05, loss


DINO: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "patch_size": 4,
    "image_size": 24,
}
PREPARATION: dict[str, Any] = {
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "do_resize": True,
}


def save_dino(folder: Path, family: str) -> None:
    """A DINOv3 with four registers, or a DINOv2, of 6 x 6 patches; the preparation as in the files on the hub."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        if family == "dinov3":
            model = DINOv3ViTModel(DINOv3ViTConfig(**DINO, intermediate_size=64, num_register_tokens=4))
            own = {
                "size": {"height": 24, "width": 24},
                "resample": 2,
                "image_processor_type": "DINOv3ViTImageProcessor",
            }
        else:
            model = Dinov2Model(Dinov2Config(**DINO, mlp_ratio=2))
            own = {"size": {"shortest_edge": 28}, "crop_size": {"height": 24, "width": 24}, "do_center_crop": True}
            own |= {"resample": 3, "image_processor_type": "BitImageProcessor"}
        for weight in model.parameters():  # tokens that differ, in norm too, as a trained model's do
            weight.data.mul_(8) if weight.ndim == 2 else weight.data.add_(0.3 * torch.randn(weight.shape))
    model.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPARATION | own))
