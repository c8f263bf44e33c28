"""FLUX.1-Kontext as a policy: what the stock FluxKontextPipeline computes, cut at the places where a trainer needs it.

Text, latents, position ids, guidance and timestep are made by the pipeline's own methods or in its own order of
operations, so that a deterministic rollout here is a stock generation (tests/test_policy.py says to how many bits). The
condition is never resized: the stock pipeline needs `_auto_resize=False` to do the same.

Precision: the frozen base runs in the config's dtype. LoRA weights, latents, velocities and images are float32; text
embeddings, which are only ever an input of the base, have its dtype.

Adapters are switched by two fields of each peft layer rather than by peft's `set_adapter`: that one also sets
requires_grad, which would cut `current` out of training while another is selected, and walks all modules of the
transformer at every call.
"""

import difflib
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from diffusers.pipelines.flux.pipeline_flux_kontext import FluxKontextPipeline
from diffusers.utils import logging
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mteditflow.config import LoraConfig, ModelConfig
from mteditflow.flow import sigma_schedule
from mteditflow.types import Condition

TARGETS = (
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    *(f"{name}.net.{layer}" for name in ("ff", "ff_context") for layer in ("0.proj", "2")),
    "proj_mlp",
)

# What `flow.sigma_schedule` assumes. A pipeline with another scheduler would be trained on noise levels at which it
# does not sample.
SCHEDULER = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "base_shift": 0.5,
    "max_shift": 1.15,
    "base_image_seq_len": 256,
    "max_image_seq_len": 4096,
    "shift_terminal": None,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
}

MAX_CACHED_PROMPTS = 512  # 4 MiB each for FLUX.1-Kontext at 512 text tokens in bfloat16

AdapterName = Literal["current", "old", "off", "ema"]


class FluxKontextPolicy:
    """See `mteditflow.policy.Policy`."""

    def __init__(
        self,
        path: str,
        config: ModelConfig,
        lora: LoraConfig,
        *,
        seed: int,
        has_old: bool,
        device: torch.device,
        loaded: FluxKontextPipeline | None = None,
    ) -> None:
        self.device = device
        self.dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[config.dtype]
        pipeline: Any = loaded or _load(path, self.dtype)
        pipeline.set_progress_bar_config(disable=True)
        pipeline.to(device)
        for module in (pipeline.text_encoder, pipeline.text_encoder_2, pipeline.vae, pipeline.transformer):
            module.requires_grad_(False).eval()
        _check_scheduler(pipeline.scheduler, path)
        self.pipeline = pipeline
        self.config = config

        pixels = 2 * pipeline.vae_scale_factor  # per side of a token
        for name, value in (("model.height", config.height), ("model.width", config.width)):
            if value % pixels:
                raise ValueError(f"{name} is {value}: must be a multiple of {pixels} for the autoencoder of {path!r}")
        self._grid = (config.height // pixels, config.width // pixels)
        self.num_tokens = self._grid[0] * self._grid[1]
        self.num_channels: int = pipeline.transformer.config.in_channels
        self._image_ids = self._position_ids()  # (2 L, 3)
        self._text_ids = torch.zeros(config.max_text_tokens, 3, device=device, dtype=self.dtype)  # (T, 3)
        self._prompts: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

        self.lora = lora
        self._targets = list(lora.targets) or list(TARGETS)
        self.num_bound_modules = _check_targets(pipeline.transformer, self._targets, is_default=not lora.targets)
        names: tuple[AdapterName, ...] = ("current", "old", "ema") if has_old else ("current", "ema")
        self._layers, self._adapters = _add_adapters(pipeline.transformer, lora, self._targets, names, seed)
        assert len(self._layers) == self.num_bound_modules
        self.selected: AdapterName = "current"
        self._select("current")

    @property
    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of adapter `current`."""
        return list(self._adapters["current"].items())

    # Text and images

    @torch.no_grad()
    def encode_text(self, instructions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Text embeddings (N, T, E) and pooled ones (N, E'), in the base's dtype.

        Each prompt is encoded alone, so that its bits do not depend on the others, and kept (the most recently used
        MAX_CACHED_PROMPTS): the text encoders are frozen.
        """
        unique = list(dict.fromkeys(instructions))
        encoded = [self._encode_prompt(prompt) for prompt in unique]
        while len(self._prompts) > MAX_CACHED_PROMPTS:
            self._prompts.popitem(last=False)
        place = {prompt: index for index, prompt in enumerate(unique)}
        rows = torch.tensor([place[prompt] for prompt in instructions]).to(self.device, non_blocking=True)
        text, pooled = (torch.stack(column) for column in zip(*encoded, strict=True))
        return text[rows], pooled[rows]  # (N, T, E), (N, E')

    def _encode_prompt(self, prompt: str) -> tuple[Tensor, Tensor]:
        if prompt in self._prompts:
            self._prompts.move_to_end(prompt)
        else:
            text, pooled, _ = self.pipeline.encode_prompt(
                prompt, device=self.device, max_sequence_length=self.config.max_text_tokens
            )
            self._prompts[prompt] = (text[0], pooled[0])
        return self._prompts[prompt]

    @torch.no_grad()
    def encode_image(self, images: Tensor, microbatch_size: int = 16) -> Tensor:
        """Images (N, 3, H, W) in [-1, 1] to clean latents (N, L, C), float32.

        The mode of the VAE, shifted, scaled and packed. Always `microbatch_size` rows at a
        time: bits do not depend on N.
        """
        assert images.shape[1:] == (3, self.config.height, self.config.width), images.shape

        def encode(rows: Tensor) -> Tensor:
            # The pipeline's own: (mode - shift) * scale; generator is unused by the mode.
            latents = self.pipeline._encode_vae_image(image=rows.to(self.device, self.dtype), generator=None)
            return self.pipeline._pack_latents(latents, *latents.shape).float()

        return _in_chunks(encode, images, microbatch_size)

    @torch.no_grad()
    def decode(self, latents: Tensor, microbatch_size: int = 16) -> Tensor:
        """Latents (N, L, C) to images (N, 3, H, W) clamped to [-1, 1], float32, not rounded.

        Always `microbatch_size` rows at a time: bits do not depend on N.
        """
        assert latents.shape[1:] == (self.num_tokens, self.num_channels), latents.shape
        vae, size = self.pipeline.vae, (self.config.height, self.config.width)

        def decode(rows: Tensor) -> Tensor:
            unpacked = self.pipeline._unpack_latents(rows.to(self.dtype), *size, self.pipeline.vae_scale_factor)
            unpacked = (unpacked / vae.config.scaling_factor) + vae.config.shift_factor
            return vae.decode(unpacked, return_dict=False)[0].float().clamp(-1, 1)

        return _in_chunks(decode, latents, microbatch_size)

    # Velocity

    def _position_ids(self) -> Tensor:
        """Ids (2 L, 3) of the noisy tokens, then of the condition's, whose first column is 1."""
        noisy = self.pipeline._prepare_latent_image_ids(1, *self._grid, self.device, self.dtype)
        condition = noisy.clone()
        condition[:, 0] = 1
        return torch.cat([noisy, condition])

    def velocity(self, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Velocity (B, L, C), float32, of latents (B, L, C) at noise level sigma (B,), under the selected adapter."""
        batch, num_tokens = latents.shape[:2]
        guidance = None
        if self.pipeline.transformer.config.guidance_embeds:
            guidance = torch.full([1], self.config.guidance_scale, device=self.device, dtype=torch.float32).expand(
                batch
            )
        timestep = (sigma.float() * 1000).to(
            self.dtype
        )  # rounded to the base's dtype on this scale, as the pipeline does
        predicted = self.pipeline.transformer(
            hidden_states=torch.cat([latents.to(self.dtype), condition.image.to(self.dtype)], dim=1),
            timestep=timestep / 1000,
            guidance=guidance,
            pooled_projections=condition.pooled,
            encoder_hidden_states=condition.text,
            txt_ids=self._text_ids,
            img_ids=self._image_ids,
            return_dict=False,
        )[0]
        return predicted[:, :num_tokens].float().contiguous()

    def sigmas(self, num_steps: int) -> Tensor:
        """FLUX's shifted schedule of noise levels (S+1,), float64 on the host."""
        return sigma_schedule(num_steps, self.num_tokens)

    # Adapters

    def _select(self, name: AdapterName) -> None:
        assert name == "off" or name in self._adapters, (
            f"no adapter {name!r}: there are off, {', '.join(self._adapters)}"
        )
        for layer in self._layers:
            layer._disable_adapters = name == "off"
            if name != "off":
                layer._active_adapter = [name]
        self.selected = name

    @contextmanager
    def adapter(self, name: AdapterName) -> Iterator[None]:
        """Selects the weights that `velocity` uses; on leaving, those from before. Never touches requires_grad."""
        before = self.selected
        self._select(name)
        try:
            yield
        finally:
            self._select(before)

    @torch.no_grad()
    def copy_adapter(self, source: AdapterName, target: AdapterName, decay: float = 0.0) -> None:
        """target <- decay * target + (1 - decay) * source, in place; an exact copy at decay 0."""
        assert 0 <= decay <= 1, decay
        new: list[Tensor] = [*self._adapters[source].values()]
        old: list[Tensor] = [*self._adapters[target].values()]
        if decay == 0:
            torch._foreach_copy_(old, new)  # pyright: ignore[reportPrivateImportUsage]
        else:
            torch._foreach_lerp_(old, new, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def adapter_state(self, name: AdapterName) -> dict[str, Tensor]:
        """A copy of the adapter's weights, `<module>.lora_A.weight` (r, in) and `<module>.lora_B.weight` (out, r)."""
        return {key: weight.detach().clone() for key, weight in self._adapters[name].items()}

    @torch.no_grad()
    def load_adapter_state(self, name: AdapterName, state: dict[str, Tensor]) -> None:
        """Puts back what `adapter_state` gave."""
        weights = self._adapters[name]
        differing = [key for key in weights.keys() | state.keys() if _shape(weights, key) != _shape(state, key)]
        if differing:
            key = min(differing)
            raise ValueError(
                f"adapter {name!r} does not fit the model: {key} is {_shape(state, key)} in the state, "
                f"{_shape(weights, key)} in the model ({len(differing)} differ): lora.rank, lora.targets and "
                f"model.path must be as when it was saved"
            )
        for key, weight in weights.items():
            weight.copy_(state[key])

    def save_lora(self, folder: Path, adapter: AdapterName = "ema") -> None:
        """Writes pytorch_lora_weights.safetensors (float32; rank, alpha) for the stock `load_lora_weights(folder)`."""
        # No more metadata than loading needs: a key that another peft does not know would make it unreadable there.
        metadata = {"r": self.lora.rank, "lora_alpha": self.lora.alpha, "target_modules": sorted(self._targets)}
        FluxKontextPipeline.save_lora_weights(
            folder,
            transformer_lora_layers={key: weight.cpu() for key, weight in self.adapter_state(adapter).items()},
            transformer_lora_adapter_metadata=metadata,
        )


def _load(path: str, dtype: torch.dtype) -> FluxKontextPipeline:
    """The pipeline of a folder or a hub name."""
    with warnings.catch_warnings():
        # `dtype` is its new name; the old one is known to every diffusers that pyproject.toml allows.
        warnings.filterwarnings("ignore", message="`torch_dtype` is deprecated")
        logging.disable_progress_bar()  # the run has its own, and none where output is piped
        return FluxKontextPipeline.from_pretrained(path, torch_dtype=dtype)


def _shape(state: dict[str, Any], key: str) -> tuple[int, ...] | None:
    return tuple(state[key].shape) if key in state else None


def _in_chunks(function: Callable[[Tensor], Tensor], values: Tensor, size: int) -> Tensor:
    """function of `size` rows at a time; the last chunk is filled up with copies of its last row."""
    chunks = []
    for rows in values.split(size):
        missing = size - len(rows)
        full = torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]) if missing else rows
        chunks.append(function(full)[: len(rows)])
    return torch.cat(chunks)


def _check_scheduler(scheduler: Any, path: str) -> None:
    for name, value in SCHEDULER.items():
        found = scheduler.config.get(name, value)
        if found != value:
            raise ValueError(f"scheduler of {path!r} has {name} {found!r}: FLUX.1-Kontext's schedule has {value!r}")


def _check_targets(transformer: nn.Module, targets: Sequence[str], *, is_default: bool) -> int:
    """Number of linears that `targets` name; each must name one, unless the list is the family's default."""
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    bound = set()
    for target in targets:
        matching = {name for name in linears if name == target or name.endswith(f".{target}")}
        if not matching and not is_default:
            # The candidates are names within a block, and their own tails: 'attn.to_q', 'to_q'.
            names = {re.sub(r"^\w+\.\d+\.", "", name) for name in linears}
            names |= {name.rsplit(".", 1)[-1] for name in names}
            nearest = difflib.get_close_matches(target, sorted(names), n=3, cutoff=0.3) or sorted(names)[:3]
            raise ValueError(
                f"lora.targets: {target!r} matches no linear of the model; nearest are {', '.join(nearest)}"
            )
        bound |= matching
    if not bound:
        raise ValueError("lora.targets: the family's default targets match no linear of the model; name some")
    return len(bound)


def _add_adapters(
    transformer: Any, lora: LoraConfig, targets: list[str], names: Sequence[AdapterName], seed: int
) -> tuple[list[LoraLayer], dict[str, dict[str, nn.Parameter]]]:
    """The peft layers, and each adapter's float32 parameters by name.

    All adapters start alike, by peft's 'gaussian' rule: A ~ N(0, 1/r^2), B = 0. The numbers are drawn here, on the
    host: a function of `seed` on every device, and the global random state is left as it was.
    """
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # several are meant
        for name in names:
            config = peft.LoraConfig(
                r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, init_lora_weights="gaussian"
            )
            transformer.add_adapter(config, adapter_name=name)
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}
    adapters: dict[str, dict[str, nn.Parameter]] = {}
    for name in names:
        generator = torch.Generator().manual_seed(seed)
        weights: dict[str, nn.Parameter] = {}
        for module, layer in layers.items():
            down, up = layer.lora_A[name].float().weight, layer.lora_B[name].float().weight
            assert isinstance(down, nn.Parameter) and isinstance(up, nn.Parameter)
            down.data.copy_(torch.randn(down.shape, generator=generator) / lora.rank)
            up.data.zero_()
            weights |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        for weight in weights.values():
            weight.requires_grad_(name == "current")
        adapters[name] = weights
    return list(layers.values()), adapters
