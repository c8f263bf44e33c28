"""A VLM of a few million parameters in Qwen3-VL's true format: its classes, processor, chat template and files.

All sizes are small, and two things are made for the embedded world. Patches are Qwen3-VL's own, 16 pixels and 2 x 2 of
them a token, so that a picture of 64 x 64 is four tokens: one for each place that can hold an object. The tokenizer has
a token for every byte, as Qwen's has, and one for each sentence of the question and each word of the world's
instructions; other texts are read byte by byte.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration

START, END, VISION_START, VISION_END = "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO, PAD = "<|image_pad|>", "<|video_pad|>", "<|endoftext|>"
SPECIAL = (START, END, VISION_START, VISION_END, IMAGE, VIDEO)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(texts: Sequence[str]) -> Any:
    """Make a tokenizer with one token per byte, one for each of `texts`, the longest first, and Qwen's special ones."""
    vocabulary = {token: i for i, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, pad_token=PAD, additional_special_tokens=list(SPECIAL)
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.add_tokens([AddedToken(text, normalized=False) for text in texts])  # pyright: ignore[reportArgumentType]
    return fast


def save_processor(folder: Path, tokenizer: Any, patch_size: int, num_pixels: tuple[int, int]) -> None:
    """Write the processor, which resizes pictures to a number of pixels between two.

    The files are written one by one, as in Qwen's own repository, and not by Qwen3VLProcessor: that wants a processor
    of videos, which torchvision alone can make. So the folder is the same with torchvision and without, and loads.
    """
    sizes = {"patch_size": patch_size, "merge_size": 2, "temporal_patch_size": 2}
    size = {"shortest_edge": num_pixels[0], "longest_edge": num_pixels[1]}
    norm = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    files = {
        "preprocessor_config.json": {
            "image_processor_type": "Qwen2VLImageProcessorFast",
            **sizes,
            **norm,
            "size": size,
        },
        "video_preprocessor_config.json": {"video_processor_type": "Qwen3VLVideoProcessor", **sizes, **norm},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps({"processor_class": "Qwen3VLProcessor", **content}, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    tokenizer.save_pretrained(folder)


def build_model(tokenizer: Any, text: dict[str, Any], vision: dict[str, Any], seed: int) -> Any:
    """Make the model with random float32 weights, a function of `seed`; the global random state is left as it was.

    text, vision: sizes, keywords of Qwen3VLTextConfig and Qwen3VLVisionConfig.
    """
    image, video, start, end = tokenizer.convert_tokens_to_ids([IMAGE, VIDEO, VISION_START, VISION_END])
    config: Any = Qwen3VLConfig(
        text_config={"vocab_size": len(tokenizer), **text},
        vision_config={"out_hidden_size": text["hidden_size"], **vision},
        image_token_id=image, video_token_id=video, vision_start_token_id=start, vision_end_token_id=end,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    generation: Any = model.generation_config
    generation.eos_token_id, generation.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    generation.do_sample, generation.top_k, generation.temperature = True, 20, 0.7  # as in Qwen's own file
    return model
