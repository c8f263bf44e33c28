"""Small FLUX.2 pipelines in the true format, with random weights: the real component, tokenizer and processor classes,
written to a folder without a download.
"""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers.models.autoencoders.autoencoder_kl_flux2 import AutoencoderKLFlux2
from diffusers.models.transformers.transformer_flux2 import Flux2Transformer2DModel
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import Flux2KleinPipeline
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn

from mteditflow.world.tiny_kontext import flux_scheduler

MAX_TEXT_TOKENS = {"klein": 80, "dev": 288}  # a token is a byte: 28 and 225 of them are the chat templates'
WIDTH = 16  # of the text encoders; the transformer sees three layers of it
QWEN_SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
MISTRAL_SPECIALS = (
    *("<unk>", "<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
    *("[IMG]", "[IMG_BREAK]", "[IMG_END]"),
)
# What Qwen3's template makes of one message without thinking, and Mistral Small's of a system and a user message.
QWEN_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
MISTRAL_TEMPLATE = (
    "<s>{% for m in messages %}{% set text = m.content[0].text %}"
    "{% if m.role == 'system' %}[SYSTEM_PROMPT]{{ text }}[/SYSTEM_PROMPT]{% else %}[INST]{{ text }}[/INST]{% endif %}"
    "{% endfor %}"
)
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (8, 8, 8, 8),
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 64,
}
TRANSFORMER: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 3 * WIDTH,
    "axes_dims_rope": (4, 4, 4, 4),
}


def _bytes(specials: tuple[str, ...]) -> dict[str, int]:
    return {token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])}


def qwen_tokenizer() -> Any:
    """Qwen2's own class over single bytes."""
    tokenizer = transformers.Qwen2Tokenizer(vocab=_bytes(QWEN_SPECIALS), merges=[], eos_token="<|im_end|>")
    tokenizer.add_tokens([transformers.AddedToken(token, special=True) for token in QWEN_SPECIALS])
    tokenizer.chat_template = QWEN_TEMPLATE
    return tokenizer


def _qwen() -> Any:
    """As Qwen3-4B and 8B but for the sizes; the pipeline reads the states after layers 9, 18 and 27."""
    config = transformers.Qwen3Config(
        vocab_size=len(QWEN_SPECIALS) + 256, hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=28,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, initializer_range=0.2,
    )  # fmt: skip
    return transformers.Qwen3ForCausalLM(config)


def pixtral_processor_class() -> Any:
    """transformers' own. Without torchvision it hides the class, whose file asks for two functions on images; those of
    the PIL backend take their place, and no image comes near them here.
    """
    if not importlib.util.find_spec("torchvision"):
        from transformers.models.pixtral import image_processing_pil_pixtral

        sys.modules["transformers.models.pixtral.image_processing_pixtral"] = image_processing_pil_pixtral
    module: Any = importlib.import_module("transformers.models.pixtral.processing_pixtral")
    return module.PixtralProcessor


def _pixtral() -> Any:
    from transformers.models.pixtral.image_processing_pil_pixtral import PixtralImageProcessorPil

    tokenizer = Tokenizer(models.BPE(_bytes(MISTRAL_SPECIALS), [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    fast: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>",
        padding_side="left", additional_special_tokens=list(MISTRAL_SPECIALS[4:]),
    )  # fmt: skip
    return pixtral_processor_class()(
        image_processor=PixtralImageProcessorPil(), tokenizer=fast, chat_template=MISTRAL_TEMPLATE
    )


def _mistral() -> Any:
    """As Mistral Small 3 but for the sizes; the pipeline reads the states after layers 10, 20 and 30."""
    text = {
        "model_type": "mistral", "vocab_size": len(MISTRAL_SPECIALS) + 256, "hidden_size": WIDTH, "head_dim": 8,
        "intermediate_size": 32, "num_hidden_layers": 31, "num_attention_heads": 2, "num_key_value_heads": 1,
        "initializer_range": 0.2, "sliding_window": None,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "head_dim": 8, "image_size": 32, "patch_size": 16,
    }  # fmt: skip
    config = transformers.Mistral3Config(text_config=text, vision_config=vision, image_token_index=8)
    return transformers.Mistral3ForConditionalGeneration(config)


def tiny_pipeline(family: str, *, is_distilled: bool = False) -> Any:
    """A 'klein' or 'dev' pipeline, always with the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        vae = AutoencoderKLFlux2(**VAE)
        for name, statistic in vae.bn.named_buffers():  # other than mean 0 and variance 1: they have to be used
            if name != "num_batches_tracked":
                statistic.copy_(0.5 + torch.rand(statistic.shape))
        transformer = Flux2Transformer2DModel(**TRANSFORMER, guidance_embeds=family == "dev")
        encoder = _mistral() if family == "dev" else _qwen()
    parts: dict[str, Any] = {"scheduler": flux_scheduler(), "vae": vae, "transformer": transformer}
    parts |= {"text_encoder": encoder, "tokenizer": _pixtral() if family == "dev" else qwen_tokenizer()}
    for part in parts.values():
        if isinstance(part, nn.Module):
            part.eval()
    return Flux2Pipeline(**parts) if family == "dev" else Flux2KleinPipeline(**parts, is_distilled=is_distilled)


def save_tiny(folder: Path, family: str, *, is_distilled: bool = False) -> Path:
    """The folder, with such a pipeline in it."""
    tiny_pipeline(family, is_distilled=is_distilled).save_pretrained(folder)
    return folder
