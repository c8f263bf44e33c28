"""What a family of editors is: the facts that plans, cards, exports and CUDA graphs ask for, and the editor itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from mteditflow.config import ModelConfig
from mteditflow.policy.lora_names import Names
from mteditflow.policy.pipelines import DTYPES
from mteditflow.types import Condition, Shape

ATTENTION = (  # the projections of a block with a stream for the image and one for the text, as diffusers names them
    *(f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")),
    *(f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
)
FLOW_MATCHING = {  # what every schedule here assumes of the stock scheduler's config
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "invert_sigmas": False,
    "stochastic_sampling": False,
}


def width_of(transformer: Mapping[str, Any]) -> int:
    """d, the width of a transformer's blocks, from its config."""
    return transformer["num_attention_heads"] * transformer["attention_head_dim"]


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What autograd keeps of a block for each token of a stream, in widths of the block, in the precision of the
    forward pass. torch's own account of blocks of true width agrees (tests/test_activations.py).
    """

    needed: Mapping[str, float]
    """For the gradient to the block's input, whatever is trained in it."""
    inputs: Mapping[tuple[str, ...], float]
    """Inputs of linears, by the names of those that read the one tensor: kept where one of them is trained."""
    of_weights: Mapping[str, float]
    """Besides all inputs, where every weight is trained: what scales, gates and the norms of q and k multiply."""


NEEDED = {"inputs of two LayerNorms": 2, "q, k before their norms": 2, "q, k, v": 3, "output of attention": 1}
OF_WEIGHTS = {"outputs of two LayerNorms, for the scales": 2, "outputs of attention and feed-forward, for the gates": 2}


def gelu_streams(image: str, text: str) -> tuple[Stream, Stream]:
    """Return the streams of a block as FLUX.1 and Qwen-Image have it, by the names of their feed-forwards: 4 d wide."""
    image_names, text_names = ATTENTION[:4], ATTENTION[4:]
    first, second = (
        Stream(
            needed=NEEDED | {"input of GELU": 4},
            inputs={names[:3]: 1, names[3:]: 1, (f"{feed_forward}.net.0.proj",): 1, (f"{feed_forward}.net.2",): 4},
            of_weights=OF_WEIGHTS,
        )
        for names, feed_forward in ((image_names, image), (text_names, text))
    )
    return first, second


@dataclass(frozen=True, kw_only=True)
class Saved:
    """Memory of a forward and a backward pass through the blocks."""

    double: tuple[Stream, Stream]  # of a block with a stream for the image and one for the text
    single: Stream | None = None  # of a block with one
    statistics: int = 3  # float32 numbers per token and head: of RMSNorm for q and for k, of attention
    compiled: tuple[float, float] = (0.0, 0.0)
    """Widths per token that a block with two streams, and one with one, keeps more where it is compiled: what torch's
    partitioner decides (docs/log.md)."""
    forward: float
    """Widths per token that live at once in a forward pass that keeps nothing."""
    beyond: float
    """Widths per token beyond what is kept, at the peak: in the last block, where most is held."""
    again: float
    """The same where blocks are run again: beyond the inputs of all and what the last one keeps."""


@dataclass(frozen=True, kw_only=True)
class Base:
    """A pipeline, frozen and on its device, with the settings of the run: what an editor computes with."""

    pipeline: Any
    config: ModelConfig
    device: torch.device
    grid: tuple[int, int]  # rows and columns of the L tokens of an edit
    condition_grid: tuple[int, int]  # of the L' tokens of the image that is edited
    references: Shape = ()  # height and width of each reference
    reference_grids: tuple[tuple[int, int], ...] = ()  # of its tokens, which follow
    prompts: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # what `encoding.Prompts` keeps

    @property
    def dtype(self) -> torch.dtype:
        """The precision of the pipeline and of its forward passes."""
        return DTYPES[self.config.dtype]

    def predict(
        self, transformer: Any, latents: Tensor, sigma: Tensor, image: Tensor, inputs: Mapping[str, Any]
    ) -> Tensor:
        """Run the transformer on noisy tokens (B, L, C), then the image's (B, L', C): velocity (B, L, C), float32.

        The timestep is rounded to the base's dtype on the scale of 1000, as the stock pipelines do.
        """
        predicted = transformer(
            hidden_states=torch.cat([latents.to(self.dtype), image.to(self.dtype)], dim=1),
            timestep=(sigma.float() * 1000).to(self.dtype) / 1000,
            return_dict=False,
            **inputs,
        )[0]
        return predicted[:, : latents.shape[1]].float().contiguous()

    def embedded_guidance(self, latents: Tensor) -> Tensor:
        """`model.guidance_scale` for each of B rows, float32."""
        scale = torch.full([1], self.config.guidance_scale, device=latents.device, dtype=torch.float32)
        return scale.expand(len(latents))


class Editor(Protocol):
    """A model of one family, by the methods of its stock pipeline; `Policy` cuts rows into chunks and lends adapters.

    A row's bits must not depend on its companions, nor on whether gradients are taken.
    """

    has_cfg: bool
    """Whether the model takes true classifier-free guidance."""
    is_distilled: bool
    """Whether the model is distilled to few steps, which NFT blurs."""

    def encode_text(
        self, instructions: Sequence[str], images: Tensor, *, has_cfg: bool, references: Sequence[Tensor] = ()
    ) -> dict[str, Tensor]:
        """Encode N instructions on images (N, 3, H, W): a dict of tensors with leading dimension N.

        has_cfg: with what the unconditional half of classifier-free guidance needs. references: (N, 3, h, w) each, of a
        family that has `several`.
        """
        ...

    def encode_image(self, images: Tensor) -> Tensor:
        """Encode images (B, 3, H, W) in [-1, 1], at the condition's size, to clean latents (B, L', C)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Decode latents (B, L, C) in the base's dtype to images (B, 3, H, W) in about [-1, 1]."""
        ...

    def velocity(self, transformer: Any, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Predict the velocity (B, L, C), float32, at noise level sigma (B,), with the condition's guidance."""
        ...

    def sigmas(self, num_steps: int) -> Tensor:
        """Return the model's own schedule of noise levels (S+1,), float64 on the host."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """Editors that compute alike."""

    pipelines: tuple[str, ...]
    """Names of the diffusers classes, as model_index.json has them."""
    editor: Callable[[Base], Editor]
    """The class of the editor. ValueError for a setting that it cannot have."""
    transformer: str
    """Name of the transformer's diffusers class."""
    targets: tuple[str, ...]
    """Linears that are adapted where `lora.targets` is empty."""
    scheduler: Mapping[str, object]
    """Constants of the stock scheduler that `Editor.sigmas` assumes: with others it would sample at other levels."""
    saved: Saved
    picture_numbers: float
    """Numbers per pixel that live at once while the autoencoder decodes, which takes more than encoding."""
    block_weights: int
    """A block of width d has this many times d^2 weights per token, double (each stream its own) and single alike."""
    row_weights: Callable[[Mapping[str, Any]], int]
    """Weights that act once per row, from the transformer's config: modulation, pooled text; embedded times aside."""
    count_tokens: Callable[[Any], Callable[[str], int]]
    """Of a pipeline, of which the tokenizers are enough: what counts the tokens of an instruction. The end of one that
    has more than `model.max_text_tokens` is not read."""
    stock_arguments: Callable[[str, ModelConfig], dict[str, Any]]
    """Arguments of a call of the stock pipeline, by its class, that make the edit the one that was trained."""
    note: str = ""
    """What the stock pipeline does with the picture's size unless it is told not to."""
    originals: Names = field(default_factory=dict)
    """Names of the model's original code, by which LoRAs of others call its linears; {}: diffusers' own."""
    comfyui: tuple[str, ...] = ()
    """Patterns of the modules for which ComfyUI has keys, each of a whole name; (): unknown."""
    uncapturable: tuple[str, ...] = ()
    """Flags of the transformer's config under which its forward pass waits for the host: no CUDA graph."""
    is_masked: bool = False
    """Whether attention has a mask, over the padding of texts."""
    is_text_of_image: bool = False
    """Whether the text encoder sees the image too, so that each trajectory has a text of its own."""
    several: tuple[str, ...] = ()
    """Those of the pipelines that take reference images beside the one that is edited."""
    packages: tuple[str, ...] = ()
    """Packages without which the pipeline cannot be loaded, and diffusers does not say so."""
    pixels_per_token: int = 16
    """Per side: an autoencoder of 8, and patches of 2."""
    num_text_tokens: Callable[[ModelConfig], int] = lambda model: model.max_text_tokens
    """T, for the plan."""
    text_tokens_of_image: Callable[[ModelConfig], int] = lambda _: 0
    """Those of T that each reference adds."""
