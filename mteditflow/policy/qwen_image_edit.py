"""Qwen-Image-Edit, -2509 and -2511: what the stock QwenImageEditPipeline (the first) and QwenImageEditPlusPipeline (the
others) compute, cut at the places where a trainer needs it.

Text, latents, shapes, guidance and timestep are made by the pipelines' own methods or in their order of operations. An
image enters as a picture file holds it, in 8 bits, and is resized as the pipelines resize a PIL image, but to the
configured sizes: `model.condition_height`, `condition_width` for the autoencoder and `model.vision_pixels` for the text
encoder, which sees the image too.

Texts have one fixed length, that of the longest instruction with its vision tokens, and a mask: the bits of a row then
do not depend on its companions. Masked keys have probability 0 and stand behind the text's own, so that padding
changes nothing but the order of sums (tests/test_qwen.py says by how much). The negative prompt has one length anyway.

Precision: the base runs in the config's dtype. Trained weights, latents, guidance, velocities and images are
float32; text embeddings, which are only ever an input of the base, have its dtype.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import (
    CONDITION_IMAGE_SIZE,
    VAE_IMAGE_SIZE,
    QwenImageEditPlusPipeline,
    calculate_dimensions,
    calculate_shift,
)
from PIL import Image
from torch import Tensor

from mteditflow.config import ModelConfig
from mteditflow.pictures import to_pil, to_uint8
from mteditflow.policy.encoding import encoders_on
from mteditflow.policy.family import ATTENTION, FLOW_MATCHING, Base, Family, Saved, gelu_streams, width_of
from mteditflow.transformer.lean_qwen import make_lean
from mteditflow.types import Condition

NEGATIVE_PROMPT = " "  # of the model cards; the pipelines have none of their own
PICTURE = "Picture {}: <|vision_start|><|image_pad|><|vision_end|>"  # of the Plus pipeline, for each image
VISION_TOKEN = 28  # pixels per side of a vision token of Qwen2.5-VL
NUM_TEMPLATE_TOKENS = 20  # about, of the template around the instruction


class QwenImageEdit:
    """See `family.Editor`. The text of a condition: 'text' (N, T, E) with 'mask' (N, T) bool, and for true guidance
    'negative' (N, T', E).
    """

    has_cfg = True
    is_distilled = False

    def __init__(self, base: Base) -> None:
        self.base, self.config = base, base.config
        self.pipeline: Any = base.pipeline
        make_lean(self.pipeline.transformer)
        self._is_plus = isinstance(self.pipeline, QwenImageEditPlusPipeline)
        # frames, rows, columns
        self._shapes = [(1, *grid) for grid in (base.grid, base.condition_grid, *base.reference_grids)]
        sizes = ((self.config.height, self.config.width), *base.references)
        self.vision_sizes = [self._vision_size(height, width) for height, width in sizes]
        self.num_text_tokens = self._num_template_tokens() + self.config.max_text_tokens  # T
        # as the pipelines make them: mean, and one over the standard deviation rounded to the base's dtype
        vae = self.pipeline.vae.config
        mean, std = (
            torch.tensor(value).view(1, -1, 1, 1, 1).to(base.device, base.dtype)
            for value in (vae.latents_mean, vae.latents_std)
        )
        self._latents_mean, self._latents_scale = mean, 1.0 / std

    def _vision_size(self, height: int, width: int) -> tuple[int, int]:
        """Height and width at which the text encoder is given an image, of its own aspect."""
        pixels = self.config.vision_pixels or (CONDITION_IMAGE_SIZE if self._is_plus else VAE_IMAGE_SIZE)
        wide, high = calculate_dimensions(pixels, width / height)
        return int(high), int(wide)

    def _num_template_tokens(self) -> int:
        """Tokens of an empty instruction, vision tokens included, without the system's part, which is dropped."""
        pictures = "".join(PICTURE.format(n) for n in range(1, 1 + len(self.vision_sizes)))
        text = self.pipeline.prompt_template_encode.format(pictures if self._is_plus else "")
        blank = [Image.new("RGB", (width, height)) for height, width in self.vision_sizes]
        tokens = self.pipeline.processor(text=[text], images=blank, return_tensors="pt")["input_ids"]
        return tokens.shape[1] - self.pipeline.prompt_template_encode_start_idx

    def encode_text(
        self, instructions: Sequence[str], images: Tensor, *, has_cfg: bool, references: Sequence[Tensor] = ()
    ) -> dict[str, Tensor]:
        """Embeddings (N, T, E) of N instructions on images (N, 3, H, W) and references, in the base's dtype, and their
        mask.

        Each is encoded alone, as the pipelines do, so that its bits do not depend on the others; one that is repeated
        with its image, once.
        """
        prompts = [self._cut(instruction) for instruction in instructions]
        seen = [*zip(*map(self._resize, (images, *references), self.vision_sizes), strict=True)]
        keys = [(prompt, *(it.tobytes() for it in some)) for prompt, some in zip(prompts, seen, strict=True)]
        unique = {key: row for row, key in enumerate(keys)}
        with encoders_on(self.pipeline, self.base.device):
            encoded = {key: self._encode_row(prompts[row], seen[row], has_cfg) for key, row in unique.items()}
        rows = [encoded[key] for key in keys]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _encode_row(self, prompt: str, pictures: Sequence[Image.Image], has_cfg: bool) -> dict[str, Tensor]:
        text = self._embed(prompt, pictures)
        missing = self.num_text_tokens - len(text)
        assert missing >= 0, (len(text), self.num_text_tokens)
        row = {
            "text": torch.nn.functional.pad(text, (0, 0, 0, missing)),
            "mask": torch.arange(self.num_text_tokens, device=self.base.device) < len(text),
        }
        return row | ({"negative": self._embed(NEGATIVE_PROMPT, pictures)} if has_cfg else {})

    def _embed(self, prompt: str, pictures: Sequence[Image.Image]) -> Tensor:
        """The pipeline's embeddings (T', E) of a prompt on pictures."""
        image = [*pictures] if self._is_plus else pictures[0]
        return self.pipeline.encode_prompt(prompt, image=image, device=self.base.device)[0][0]

    def _cut(self, prompt: str) -> str:
        """The instruction, or as much of its beginning as has no more than max_text_tokens."""
        limit, tokenizer = self.config.max_text_tokens, self.pipeline.tokenizer
        tokens, cut = tokenizer(prompt)["input_ids"], limit
        while len(tokens) > limit:  # what is cut within a letter or a word may have more tokens than it had
            prompt = tokenizer.decode(tokens[:cut])
            tokens, cut = tokenizer(prompt)["input_ids"], cut - 1
        return prompt

    def _resize(self, images: Tensor, size: tuple[int, int]) -> list[Image.Image]:
        return [self.pipeline.image_processor.resize(picture, *size) for picture in _pictures(images)]

    def encode_image(self, images: Tensor) -> Tensor:
        """Images rounded to 8 bits and resized; then the mode of the VAE, normalised and packed."""
        pictures = self.pipeline.image_processor.preprocess(_pictures(images), *self.config.condition_size)
        pictures = pictures.unsqueeze(2).to(self.base.device, self.base.dtype)  # (B, 3, 1, H', W'): video of one frame
        latents = self.pipeline._encode_vae_image(image=pictures, generator=None)  # the mode uses no generator
        batch, channels, _, height, width = latents.shape
        return self.pipeline._pack_latents(latents, batch, channels, height, width)

    def decode(self, latents: Tensor) -> Tensor:
        """The VAE's pictures of latents unpacked, with their own mean and scale."""
        size, factor = (self.config.height, self.config.width), self.pipeline.vae_scale_factor
        unpacked = self.pipeline._unpack_latents(latents, *size, factor)
        unpacked = unpacked / self._latents_scale + self._latents_mean
        return self.pipeline.vae.decode(unpacked, return_dict=False)[0][:, :, 0]

    def velocity(self, transformer: Any, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Velocity (B, L, C), float32, of latents (B, L, C) at noise level sigma (B,).

        With guidance s: v' = v- + s (v+ - v-), then each token scaled to the norm of v+.
        """

        def predict(text: Tensor, mask: Tensor | None) -> Tensor:
            inputs = {
                "encoder_hidden_states": text,
                "encoder_hidden_states_mask": mask,
                "img_shapes": [self._shapes] * len(latents),
            }
            return self.base.predict(transformer, latents, sigma, condition.image, inputs)

        velocity = predict(condition.text["text"], condition.text["mask"])
        if condition.cfg_scale == 1:
            return velocity
        negative = predict(condition.text["negative"], None)
        guided = negative + condition.cfg_scale * (velocity - negative)
        norm, guided_norm = (torch.norm(value, dim=-1, keepdim=True) for value in (velocity, guided))
        return guided * (norm / guided_norm)

    def sigmas(self, num_steps: int) -> Tensor:
        """The pipeline's schedule of noise levels (S+1,), float64 on the host."""
        rows, columns = self.base.grid
        return schedule(self.pipeline.scheduler.config, num_steps, rows * columns)


def schedule(config: Any, num_steps: int, num_tokens: int) -> Tensor:
    """Noise levels (S+1,), float64, of a scheduler's config at L tokens of the output: FLUX.1's shift with constants of
    its own, then stretched so that the last level before 0 is `shift_terminal`.
    """
    mu = calculate_shift(  # with the pipelines' own defaults
        num_tokens,
        config.get("base_image_seq_len", 256),
        config.get("max_image_seq_len", 4096),
        config.get("base_shift", 0.5),
        config.get("max_shift", 1.15),
    )
    unshifted = torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64)
    sigmas = 1 / (1 + math.exp(-mu) * (1 / unshifted - 1))  # e^mu / (e^mu + 1/s - 1), and 1 exactly where s is 1
    terminal = config.get("shift_terminal")
    if terminal:
        if num_steps < 2:
            raise ValueError(f"num_steps is {num_steps}: must be at least 2, from 1 to the last level {terminal:g}")
        sigmas = 1 - (1 - sigmas) * (1 - terminal) / (1 - sigmas[-1])
    return torch.cat([sigmas, torch.zeros(1, dtype=torch.float64)])


def _pictures(images: Tensor) -> list[Image.Image]:
    """Images (N, 3, H, W) in [-1, 1] as PIL has them, in 8 bits."""
    return [to_pil(pixels) for pixels in to_uint8(images)]


def _num_text_tokens(model: ModelConfig) -> int:
    """With the image's vision tokens, at -2509's size where the config leaves it open."""
    return model.max_text_tokens + _num_vision_tokens(model) + NUM_TEMPLATE_TOKENS


def _num_vision_tokens(model: ModelConfig) -> int:
    return (model.vision_pixels or 384**2) // VISION_TOKEN**2


FAMILY = Family(
    pipelines=("QwenImageEditPipeline", "QwenImageEditPlusPipeline"),
    editor=QwenImageEdit,
    transformer="QwenImageTransformer2DModel",
    targets=(*ATTENTION, *(f"{name}.net.{layer}" for name in ("img_mlp", "txt_mlp") for layer in ("0.proj", "2"))),
    scheduler=FLOW_MATCHING,  # the shift's constants are taken from the scheduler's own config
    saved=Saved(
        double=gelu_streams("img_mlp", "txt_mlp"),
        statistics=1,
        compiled=(2, 0),  # of -2511
        forward=13.2,
        beyond=6.75,
        again=4.7,
    ),
    several=("QwenImageEditPlusPipeline",),
    picture_numbers=1731,
    block_weights=12,  # 4 of attention, 8 of a feed-forward of 4 d
    # of modulation: of both streams in each block, and of the output
    row_weights=lambda transformer: (12 * transformer["num_layers"] + 2) * width_of(transformer) ** 2,
    count_tokens=lambda pipeline: lambda text: len(pipeline.tokenizer(text, verbose=False)["input_ids"]),
    stock_arguments=lambda _, model: {"true_cfg_scale": model.cfg_scale, "negative_prompt": f'"{NEGATIVE_PROMPT}"'},
    note="The stock pipeline encodes the picture at about a megapixel, whatever its size",
    comfyui=(  # each module of a model whose names are diffusers' own
        rf"transformer_blocks\.\d+\.({'|'.join(ATTENTION)}|(img|txt)_mod\.1|(img|txt)_mlp\.net\.(0\.proj|2))",
        r"img_in|txt_in|proj_out|norm_out\.linear|time_text_embed\.timestep_embedder\.linear_[12]",
    ),
    uncapturable=("zero_cond_t",),  # of -2511: makes a tensor of Python numbers in every forward pass
    is_masked=True,
    is_text_of_image=True,
    packages=("torchvision",),  # transformers loads the processor's class with it only
    num_text_tokens=_num_text_tokens,
    text_tokens_of_image=_num_vision_tokens,
)
