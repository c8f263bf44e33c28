"""The editor that is trained: one file per family of editors, and one `Policy` that the rest of the trainer sees."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from mteditflow.config import Config, LoraConfig, ModelConfig
from mteditflow.config.ranges import require
from mteditflow.data import count_references
from mteditflow.distributed import local_device
from mteditflow.policy import flux2, flux_kontext, qwen_image_edit
from mteditflow.policy.encoding import hasten_upsampling, in_chunks, rows_at_a_time
from mteditflow.policy.family import Base, Family
from mteditflow.policy.lora_file import Lora, adapter_for, padded_state, parse_lora
from mteditflow.policy.pipelines import (
    DTYPES,
    check_finite,
    check_scheduler,
    linear_shapes,
    load_pipeline,
    load_tokenizers,
    model_path,
    prepare_pipeline,
    read_index,
    stock_class,
    token_grids,
)
from mteditflow.policy.published import MODELS
from mteditflow.record.clock import phase
from mteditflow.transformer.adapters import AdapterName, Adapters, copy_names, name_targets
from mteditflow.transformer.attention import choose_attention
from mteditflow.transformer.base import check_float8
from mteditflow.transformer.compiled import (
    allow_graphs,
    compile_blocks,
    is_compiled,
    replay_blocks,
    run_blocks_eagerly,
)
from mteditflow.transformer.full_weights import full_weights
from mteditflow.transformer.lora import lora_adapters
from mteditflow.transformer.rope import fuse_rope
from mteditflow.transformer.sharded import shard
from mteditflow.types import Condition, Shape

__all__ = [
    "DTYPES", "AdapterName", "Adapters", "Family", "Policy", "build_policy", "check_references", "configured_family",
    "family_of", "linear_shapes", "model_path", "read_lora", "start_adapter", "start_state", "stock_class",
    "token_counter", "with_start",
]  # fmt: skip

FAMILIES = (flux_kontext.FAMILY, flux2.FAMILY, qwen_image_edit.FAMILY)


class Policy:
    """An editor with adapters.

    Rows of images and latents go through the autoencoder so many at a time as `encoding.rows_at_a_time` says, so that
    the bits of a row do not depend on how many there are.
    """

    def __init__(
        self,
        pipeline: Any,
        config: ModelConfig,
        lora: LoraConfig,
        *,
        seed: int,
        has_old: bool,
        device: torch.device,
        keeps_originals: bool = False,
        mesh: DeviceMesh | None = None,
    ) -> None:
        """Take over a pipeline of a known family. seed: of the adapter's initial weights. has_old: with an adapter
        `old` besides `current` and `ema`. keeps_originals: of a quantised base, for whoever measures its error. mesh:
        the GPUs over which the transformer, or what of it is trained, is cut; from then on a velocity takes all ranks.
        ValueError for a size, a scheduler or a target that cannot be, or a GPU that cannot have the base.
        """
        family = family_of(type(pipeline).__name__)
        assert family is not None, type(pipeline)
        self.originals = prepare_pipeline(
            pipeline, config, device, keeps_originals=keeps_originals, is_cut=mesh is not None
        )
        self.is_cut = mesh is not None
        if device.type == "cpu" and hasattr(pipeline, "vae"):
            hasten_upsampling(pipeline.vae)
        check_scheduler(pipeline, config, family.scheduler)
        self._pixels = 2 * getattr(pipeline, "vae_scale_factor", family.pixels_per_token // 2)
        self._configured, self._others = config, dict[Shape, Policy]()
        self.family, self.device = family, device
        self.takes_several = type(pipeline).__name__ in family.several
        self.pipeline: Any = pipeline  # with the adapters in its transformer
        self.num_channels: int = pipeline.transformer.config.in_channels  # C, of a latent token
        self._fit(((config.height, config.width),), {})
        base = self._base
        if device.type == "cuda" and not lora.is_full:  # whose norms are trained
            fuse_rope(pipeline.transformer)
        self.attention = choose_attention(  # before the transformer is copied, in full fine-tuning
            pipeline.transformer, config.attention, dtype=base.dtype, device=device, is_masked=family.is_masked
        )
        self.is_compiled = is_compiled(config, lora, device)
        if lora.is_full:
            self.adapters = full_weights(pipeline.transformer, lora, has_old=has_old, device=device, mesh=mesh)
        else:
            self.adapters = lora_adapters(
                pipeline.transformer, lora, family.targets, seed=seed, has_old=has_old, is_compiled=self.is_compiled,
                device=device,
            )  # fmt: skip
        if self.is_compiled:
            compile_blocks(pipeline.transformer)
        if mesh is not None:  # last: it renames the classes of the blocks
            shard(pipeline.transformer, mesh, set() if lora.is_full else self.adapters.parameters())

    def _fit(self, shape: Shape, prompts: dict[str, dict[str, Tensor]]) -> None:
        """Take an editor for sessions of a shape."""
        config, *others = (self._configured.at(*size) for size in shape)
        grid, *grids = token_grids(config, self._pixels)
        grids += [token_grids(other, self._pixels)[1] for other in others]
        self._base = Base(
            pipeline=self.pipeline, config=config, device=self.device, grid=grid, condition_grid=grids[0],
            references=shape[1:], reference_grids=tuple(grids[1:]), prompts=prompts,
        )  # fmt: skip
        self.config, self.dtype, self.shape = config, self._base.dtype, shape
        self.num_tokens = grid[0] * grid[1]  # L, latent tokens of an edit
        self.num_condition_tokens = sum(math.prod(grid) for grid in grids)  # L', of the images that it is made of
        self.editor = self.family.editor(self._base)

    def at(self, shape: Shape) -> "Policy":
        """Return the policy for sessions of a shape: all is shared but the editor, its positions and its schedule."""
        if shape == self.shape:
            return self
        if not self._others:
            self._others[self.shape] = self
        if shape not in self._others:
            assert shape[1:] == () or self.takes_several, shape
            other = copy(self)
            other._fit(shape, self._base.prompts)
            self._others[shape] = other
            allow_graphs(len(self._others))
        return self._others[shape]

    @phase("encode text")
    @torch.no_grad()
    def encode_text(
        self, instructions: Sequence[str], images: Tensor, *, has_cfg: bool, references: Sequence[Tensor] = ()
    ) -> dict[str, Tensor]:
        """Encode N instructions on images (N, 3, H, W), and on references (N, 3, h, w) each: a dict of tensors with
        leading dimension N.

        has_cfg: with what the unconditional half of classifier-free guidance needs.
        """
        assert self.editor.has_cfg or not has_cfg, "the model takes no guidance: the config allows none"
        if references:
            return self.editor.encode_text(instructions, images, has_cfg=has_cfg, references=references)
        return self.editor.encode_text(instructions, images, has_cfg=has_cfg)

    @phase("encode images")
    @torch.no_grad()
    def encode_image(self, images: Tensor, microbatch_size: int = 0) -> Tensor:
        """Encode images (N, 3, H, W) in [-1, 1], resized to the condition's size: clean latents (N, L', C), float32."""
        size = microbatch_size or rows_at_a_time(*self.config.condition_size)
        return in_chunks(lambda rows: self.editor.encode_image(rows).float(), images, size)

    def encode_references(self, references: Sequence[Tensor], microbatch_size: int = 0) -> list[Tensor]:
        """Encode references (N, 3, h, w) of the policy's shape, each as if it were the image that is edited."""
        alike = [self.at((size,)) for size in self.shape[1:]]
        return [at.encode_image(images, microbatch_size) for at, images in zip(alike, references, strict=True)]

    @phase("decode")
    @torch.no_grad()
    def decode(self, latents: Tensor, microbatch_size: int = 0) -> Tensor:
        """Decode latents (N, L, C): images (N, 3, H, W) clamped to [-1, 1], float32, not rounded to 8 bits."""
        assert latents.shape[1:] == (self.num_tokens, self.num_channels), latents.shape

        def decode(rows: Tensor) -> Tensor:
            return self.editor.decode(rows.to(self.dtype)).float().clamp(-1, 1)

        return in_chunks(decode, latents, microbatch_size or rows_at_a_time(self.config.height, self.config.width))

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Predict the velocity (B, L, C), float32, of latents (B, L, C) at noise level sigma (B,), under the selected
        adapter and with the condition's guidance.
        """
        num_tokens = (latents.shape[1], condition.image.shape[1])
        assert num_tokens == (self.num_tokens, self.num_condition_tokens), num_tokens
        return self.editor.velocity(self.adapters.transformer, latents, sigma, condition)

    def run_eagerly(self) -> None:
        """From now on, run the transformer's blocks as they are, not compiled."""
        run_blocks_eagerly(self.pipeline.transformer)
        for policy in (self, *self._others.values()):
            policy.is_compiled = False

    def replay(self) -> None:
        """From now on, compute a velocity that is trained on by the pass that samples (`compiled.replay_blocks`)."""
        replay_blocks(self.pipeline.transformer)

    def sigmas(self, num_steps: int) -> Tensor:
        """Return the model's own schedule of noise levels (S+1,), float64 on the host."""
        return self.editor.sigmas(num_steps)


def family_of(pipeline_class: str) -> Family | None:
    """Find the family of a pipeline by the name of its diffusers class."""
    return next((family for family in FAMILIES if pipeline_class in family.pipelines), None)


def configured_family(config: ModelConfig) -> Family:
    """Find the family of `config.path` by its model_index.json. ValueError where there is none."""
    path = model_path(config)
    name = read_index(path)["_class_name"]
    family = family_of(name)
    if family is None:
        supported = ", ".join(name for family in FAMILIES for name in family.pipelines)
        raise ValueError(f"model.path {path!r} is a {name}, which cannot be trained here: supported are {supported}")
    return family


def token_counter(config: ModelConfig) -> Callable[[str], int]:
    """Return what counts the tokens of an instruction in the configured editor, of which tokenizers alone are read."""
    return configured_family(config).count_tokens(load_tokenizers(config))


def check_references(config: Config) -> None:
    """Raise ValueError where sessions have reference images, and the model takes the one that is edited alone."""
    (_, most), path = count_references(config), config.model.path
    if most:
        name = MODELS[path].pipeline if path in MODELS else read_index(model_path(config.model))["_class_name"]
        family = family_of(name)
        remedy = f"a {name} takes one: take FLUX.2, Qwen-Image-Edit-2509 or -2511, or sessions of one image"
        has_several = f"sessions of data.path {config.data.path!r} have up to {most + 1} images"
        require(not family or name in family.several, "model.path", path, f"{has_several}, and {remedy}")


def read_lora(word: str, config: ModelConfig) -> Lora:
    """Read the LoRA that `word` names for the editor of `config`. ValueError as for `parse_lora`."""
    return parse_lora(word, config.path, linear_shapes(config), configured_family(config).originals)


def with_start(config: Config) -> Config:
    """Return the config with rank, alpha and targets of the LoRA that it starts from, where it names one.

    ValueError: one line, of a LoRA that cannot be had.
    """
    lora = config.lora
    if not lora.init_from:
        return config
    try:
        adapter = adapter_for([read_lora(lora.init_from, config.model)], lora)
    except ValueError as error:
        raise ValueError(f"lora.init_from: {error}") from None
    targets = name_targets(adapter.targets, linear_shapes(config.model))
    return replace(config, lora=replace(adapter, targets=targets, init_from=lora.init_from))


def start_state(policy: Policy, lora: LoraConfig) -> dict[str, Tensor]:
    """Weights, for `Adapters.load`, of the LoRA that training starts from; where the adapter is wider, B is 0."""
    state = policy.adapters.state("current")
    for key, weight in state.items():
        if key.endswith(".lora_B.weight"):
            weight.zero_()
    return padded_state(read_lora(lora.init_from, policy.config), lora, state)


@contextmanager
def start_adapter(policy: Policy, lora: LoraConfig) -> Iterator[AdapterName]:
    """Give the adapter under which the policy is what training starts from: none or, in the place of the average, the
    LoRA of lora.init_from.
    """
    if not lora.init_from:
        yield "off"
        return
    now = policy.adapters.state("ema")  # of a run that goes on, not the start's
    policy.adapters.load("ema", start_state(policy, lora))
    try:
        yield "ema"
    finally:
        policy.adapters.load("ema", now)


def build_policy(
    config: ModelConfig,
    lora: LoraConfig,
    seed: int,
    *,
    has_old: bool,
    keeps_originals: bool = False,
    mesh: DeviceMesh | None = None,
) -> Policy:
    """Build the policy of `config.path` on this process's GPU or else the CPU; the rest as for `Policy`."""
    family, path = configured_family(config), model_path(config)
    if config.vision_pixels and not family.is_text_of_image:
        raise ValueError(
            f"model.vision_pixels is {config.vision_pixels}: the text encoder of {path!r} sees no image; it must be 0"
        )
    device = local_device()
    check_float8(config.base, device)  # before 24 GB are read
    pipeline = load_pipeline(config, family.packages)
    policy = Policy(
        pipeline, config, lora, seed=seed, has_old=has_old, device=device, keeps_originals=keeps_originals, mesh=mesh
    )
    check_finite(pipeline, path)
    if lora.init_from:
        state = start_state(policy, lora)
        for name in copy_names(has_old):
            policy.adapters.load(name, state)
    if config.cfg_scale != 1 and not policy.editor.has_cfg:
        reason = "is distilled and takes no guidance" if policy.editor.is_distilled else "has its guidance embedded"
        remedy = "" if policy.editor.is_distilled else "; set model.guidance_scale"
        raise ValueError(f"model.cfg_scale is {config.cfg_scale:g}: {path!r} {reason}, so it must be 1{remedy}")
    return policy
