"""Random-weight Qwen-Image-Edit pipelines in the true format: real component classes, small."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.processing_utils
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage
from diffusers.models.transformers.transformer_qwenimage import QwenImageTransformer2DModel
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit import QwenImageEditPipeline
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import QwenImageEditPlusPipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from tokenizers import Regex
from tokenizers.pre_tokenizers import ByteLevel, Split
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
)
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX
from transformers.utils.import_utils import is_torchvision_available

from mteditflow.config import LoraConfig, ModelConfig
from mteditflow.pictures import round_to_8_bit
from mteditflow.policy import Policy, build_policy
from mteditflow.policy.qwen_image_edit import PICTURE, QwenImageEdit
from mteditflow.types import Condition

VARIANTS = ("edit", "2509", "2511")
LORA = LoraConfig(rank=4, alpha=16, targets=())  # a power of two apart: the bits are peft's
PROMPTS = ("make the red square blue", "remove the big blue circle", "add a blue circle")  # of 5, 5 and 4 tokens
SQUARE, WIDE, LARGE = (64, 64), (64, 96), (128, 192)  # WIDE is not square: a swap would show
SPECIAL = ("endoftext", "im_start", "im_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad")
VIDEO = "video_processor"
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
# As published, constant for constant.
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "shift": 1.0,
    "use_dynamic_shifting": True,
    "base_shift": 0.5,
    "max_shift": 0.9,
    "base_image_seq_len": 256,
    "max_image_seq_len": 8192,
    "shift_terminal": 0.02,
}


def _pieces(text: str) -> list[str]:
    """What Qwen2's tokenizer splits a text into, in its alphabet of bytes."""
    words = Split(Regex(PRETOKENIZE_REGEX), behavior="isolated").pre_tokenize_str(text)
    return [
        piece
        for word, _ in words
        for piece, _ in ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)
    ]


def _merged(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding: the pair of lowest rank first."""
    tokens = list(word)
    while pairs := [pair for pair in pairwise(tokens) if pair in ranks]:
        best = min(pairs, key=lambda pair: ranks[pair])
        at = next(i for i in range(len(tokens) - 1) if (tokens[i], tokens[i + 1]) == best)
        tokens[at : at + 2] = ["".join(best)]
    return tokens


def tokenizer(texts: Sequence[str]) -> Qwen2Tokenizer:
    """Each word of `texts` is a token, as each of the template is in Qwen2's own vocabulary of 151,643."""
    specials = [f"<|{name}|>" for name in SPECIAL]
    ranks: dict[tuple[str, str], int] = {}
    for text in texts:
        for special in specials:
            text = text.replace(special, "\0")
        for word in dict.fromkeys(piece for part in text.split("\0") for piece in _pieces(part)):
            while len(tokens := _merged(word, ranks)) > 1:
                ranks[tokens[0], tokens[1]] = len(ranks)
    words = [*specials, *sorted(ByteLevel.alphabet()), *("".join(pair) for pair in ranks)]
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys(words))}
    return Qwen2Tokenizer(vocab=vocabulary, merges=list(ranks), additional_special_tokens=specials[1:])  # pyright: ignore[reportArgumentType]


def _text_encoder(tokens: Qwen2Tokenizer, width: int) -> Qwen2_5_VLForConditionalGeneration:
    ids = {name: int(tokens.convert_tokens_to_ids(f"<|{name}|>")) for name in SPECIAL}  # pyright: ignore[reportArgumentType]
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokens),
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "bos_token_id": ids["endoftext"],
            "eos_token_id": ids["im_end"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": width,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def scheduler() -> FlowMatchEulerDiscreteScheduler:
    """The published one."""
    return FlowMatchEulerDiscreteScheduler(**SCHEDULER)


def build_pipeline(variant: str, prompts: Sequence[str], seed: int = 0) -> Any:
    """A pipeline of about 200 thousand float32 weights, a function of `seed`."""
    family = QwenImageEditPipeline if variant == "edit" else QwenImageEditPlusPipeline
    parts = ("scheduler", "vae", "text_encoder", "tokenizer", "processor", "transformer")
    template: str = family(**dict.fromkeys(parts)).prompt_template_encode  # pyright: ignore[reportArgumentType]
    tokens = tokenizer([template.replace("{}", PICTURE.format(1) + PICTURE.format(2)), *prompts])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline = family(
            scheduler=scheduler(),
            vae=AutoencoderKLQwenImage(
                base_dim=8,
                z_dim=4,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                latents_mean=[-0.8, 0.1, 0.4, -0.2],
                latents_std=[2.8, 1.5, 2.3, 1.2],
            ),
            text_encoder=_text_encoder(tokens, 32),
            tokenizer=tokens,
            processor=Qwen2VLProcessor(Qwen2VLImageProcessor(), tokens, _video_processor(), chat_template=CHAT),
            transformer=QwenImageTransformer2DModel(
                in_channels=16,
                out_channels=4,
                num_layers=2,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                axes_dims_rope=(4, 6, 6),
                zero_cond_t=variant == "2511",
            ),
        )
    return pipeline


class NoVideoProcessor(dict[str, Any]):
    """Stands for the video processor, which transformers has with torchvision only and the pipelines never use."""

    _auto_class = None
    model_input_names = ("pixel_values_videos",)

    @classmethod
    def from_pretrained(cls, *_: Any, **__: Any) -> "NoVideoProcessor":
        return cls()


def _video_processor() -> Any:
    if is_torchvision_available():
        return transformers.Qwen2VLVideoProcessor()
    return NoVideoProcessor()


def without_torchvision(patch: pytest.MonkeyPatch) -> None:
    """Lets the processor be made and loaded where there is no torchvision; with it, nothing is replaced."""
    if is_torchvision_available():
        return
    module = transformers.processing_utils
    check = module.ProcessorMixin.check_argument_for_proper_class

    def checked(self: Any, name: str, argument: Any) -> Any:
        return None if name == VIDEO else check(self, name, argument)

    patch.setattr(module.ProcessorMixin, "check_argument_for_proper_class", checked)
    mapping = type(module.MODALITY_TO_AUTOPROCESSOR_MAPPING)
    own = mapping.__getitem__
    patch.setattr(mapping, "__getitem__", lambda self, key: NoVideoProcessor if key == VIDEO else own(self, key))
    patch.setattr("mteditflow.policy.pipelines.find_spec", lambda name: True)


def save(variant: str, prompts: Sequence[str], folder: Path) -> Path:
    """The folder of a pipeline, `model_index.json` and all."""
    build_pipeline(variant, prompts).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Path]]:
    with pytest.MonkeyPatch.context() as patch:
        without_torchvision(patch)
        root = tmp_path_factory.mktemp("qwen")
        yield {variant: save(variant, PROMPTS, root / variant) for variant in VARIANTS}


def config_of(
    folder: Path, size: tuple[int, int] = WIDE, condition: tuple[int, int] = (0, 0), **fields: Any
) -> ModelConfig:
    """By default 5 tokens, those of the first two prompts: no padding. The vision input is the first pipeline's: the
    condition's size.
    """
    pixels = max((condition[0] or size[0]) * (condition[1] or size[1]), 3136)
    given = {"vision_pixels": pixels, "max_text_tokens": 5, "cfg_scale": 4.0} | fields
    return ModelConfig(
        path=str(folder), height=size[0], width=size[1], condition_height=condition[0], condition_width=condition[1],
        **given,
    )  # fmt: skip


def build(config: ModelConfig) -> Policy:
    return build_policy(config, LORA, seed=3, has_old=True)


def editor_of(policy: Policy) -> QwenImageEdit:
    assert isinstance(policy.editor, QwenImageEdit)
    return policy.editor


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(num: int, size: tuple[int, int] = WIDE) -> Tensor:
    coarse = torch.nn.functional.interpolate(draw(num, 3, 8, 8, seed=5), size, mode="bilinear")
    return round_to_8_bit(coarse.clamp(-1, 1))


def noise(policy: Policy, num: int, seed: int = 0) -> Tensor:
    return draw(num, policy.num_tokens, policy.num_channels, seed=seed)


def condition_on(policy: Policy, prompts: list[str], source: Tensor, rows: int = 16) -> Condition:
    scale = policy.config.cfg_scale
    text = policy.encode_text(prompts, source, has_cfg=scale != 1)
    return Condition(text=text, image=policy.encode_image(source, microbatch_size=rows), cfg_scale=scale)


def perturb(policy: Policy, name: Any, seed: int = 1) -> None:
    state = policy.adapters.state(name)
    changed = {key: own + 0.2 * draw(*own.shape, seed=seed + i) for i, (key, own) in enumerate(state.items())}
    policy.adapters.load(name, changed)
