"""FLUX.2: FLUX.2-klein-base and the distilled klein (Flux2KleinPipeline), FLUX.2-dev (Flux2Pipeline).

What the stock pipelines compute, cut at the places where a trainer needs it: text, latents, position ids and the shift
of the schedule are made by their own methods, and a deterministic rollout here is a stock generation, bit for bit in
float32 (tests/test_flux2.py). In bfloat16 the stock pipeline rounds the latents, and what guidance combines, after
every step; here both stay float32.

klein-base takes true classifier-free guidance against the empty prompt, which is encoded once and kept here: a row of
its own for each trajectory would double the memory of the text. klein is distilled to few steps and takes none.
FLUX.2-dev has its guidance embedded.

Unlike FLUX.1's, the schedule depends on the number of steps and not on that of the tokens alone, so that training and
evaluation at different numbers of steps see different noise levels; and its last step is large.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from diffusers.pipelines.flux2.pipeline_flux2 import Flux2Pipeline, compute_empirical_mu, format_input
from einops import rearrange
from torch import Tensor

from mteditflow.policy.encoding import Prompts, resize
from mteditflow.policy.family import ATTENTION, FLOW_MATCHING, NEEDED, OF_WEIGHTS, Base, Family, Saved, Stream, width_of
from mteditflow.policy.lora_names import FLUX2
from mteditflow.types import Condition


class Flux2:
    """See `family.Editor`. The text of a condition: 'text' (N, T, E), three layers of the text encoder."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.pipeline: Any = base.pipeline
        self._has_embedded_guidance = isinstance(self.pipeline, Flux2Pipeline)
        self.is_distilled = bool(self.pipeline.config.get("is_distilled", False))
        self.has_cfg = not (self._has_embedded_guidance or self.is_distilled)
        self._check_room()
        self._image_ids = self._position_ids()  # (L + L', 4)
        text_ids = self.pipeline._prepare_text_ids(torch.empty(1, base.config.max_text_tokens, 1))[0]
        self._text_ids = text_ids.to(base.device)  # (T, 4)
        self._prompts = Prompts(base, ("text",))
        self._unconditional: Tensor | None = None  # (T, E)

    def encode_text(
        self, instructions: Sequence[str], images: Tensor, *, has_cfg: bool, references: Sequence[Tensor] = ()
    ) -> dict[str, Tensor]:
        """Text embeddings (N, T, E), in the base's dtype; the images play no part.

        has_cfg: the empty prompt is encoded too, unless it was before.
        """
        if has_cfg and self._unconditional is None:
            self._unconditional = self._prompts.encode("")["text"]
        return self._prompts(instructions)

    def encode_image(self, images: Tensor) -> Tensor:
        """The mode of the VAE, in patches of 2 x 2, normalised by the statistics of its batch norm and packed."""
        pictures = resize(images.to(self.base.device), self.base.config.condition_size).to(self.base.dtype)
        latents = self.pipeline._encode_vae_image(image=pictures, generator=None)  # the mode needs no generator
        return self.pipeline._pack_latents(latents)

    def decode(self, latents: Tensor) -> Tensor:
        """The VAE's pictures of latents unpacked and with the statistics of its batch norm."""
        vae, dtype = self.pipeline.vae, self.base.dtype
        mean = vae.bn.running_mean.view(1, -1, 1, 1).to(dtype)  # (1, C, 1, 1)
        std = torch.sqrt(vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).to(dtype)
        # `_unpack_latents_with_ids` by another way: the ids count rows and columns in order, and Flux2Pipeline's would
        # sync with the host for each row.
        unpacked = rearrange(latents, "n (h w) c -> n c h w", h=self.base.grid[0])
        return vae.decode(self.pipeline._unpatchify_latents(unpacked * std + mean), return_dict=False)[0]

    def _position_ids(self) -> Tensor:
        """Ids (L + L', 4) of the noisy tokens, then of the condition's, whose first column is 10, and of the
        references', 20 and so on.
        """
        base = self.base
        grids = (base.grid, base.condition_grid, *base.reference_grids)
        noisy, *images = (torch.empty(1, 1, *grid) for grid in grids)
        ids = [self.pipeline._prepare_latent_ids(noisy)[0], self.pipeline._prepare_image_ids(images)[0]]
        return torch.cat(ids).to(self.base.device)

    def velocity(self, transformer: Any, latents: Tensor, sigma: Tensor, condition: Condition) -> Tensor:
        """Velocity (B, L, C), float32, of latents (B, L, C) at noise level sigma (B,), with the condition's guidance:
        without + cfg_scale (with - without) the text.
        """

        def predict(text: Tensor) -> Tensor:
            assert text.shape[1] == len(self._text_ids), text.shape
            inputs = {
                "guidance": self.base.embedded_guidance(latents) if self._has_embedded_guidance else None,
                "encoder_hidden_states": text,
                "txt_ids": self._text_ids,
                "img_ids": self._image_ids,
            }
            return self.base.predict(transformer, latents, sigma, condition.image, inputs)

        velocity = predict(condition.text["text"])
        if condition.cfg_scale == 1:
            return velocity
        assert self._unconditional is not None, "encode_text was not asked for guidance"
        # contiguous, as the stock pipeline's: a stride of 0 would be another matrix product
        without = predict(self._unconditional.repeat(len(latents), 1, 1))
        return without + condition.cfg_scale * (velocity - without)

    def sigmas(self, num_steps: int) -> Tensor:
        """FLUX.2's shifted schedule of noise levels (S+1,), float64 on the host; mu depends on L and on S."""
        rows, columns = self.base.grid
        mu = compute_empirical_mu(rows * columns, num_steps)
        # numpy, as in the pipeline: torch divides a number by a tensor in two roundings, and the first would not be 1
        shifted = self.pipeline.scheduler.time_shift(mu, 1.0, np.linspace(1, 1 / num_steps, num_steps))
        return torch.from_numpy(np.append(shifted, 0.0))

    def _check_room(self) -> None:
        """Raise ValueError where the chat template, at whose end the pipeline cuts a prompt, leaves none for one."""
        limit, num_tokens = self.base.config.max_text_tokens, _template_tokens(self.pipeline)
        if limit <= num_tokens:
            raise ValueError(
                f"model.max_text_tokens is {limit}: the chat template of {self.base.config.path!r} takes {num_tokens} "
                f"tokens itself; take {self.pipeline.tokenizer_max_length}, as the stock pipeline does"
            )


def _stream(attention: tuple[str, ...], feed_forward: str) -> Stream:
    """What a block keeps of one of its two streams, by the names of its projections and its feed-forward, 3 d wide."""
    names = {attention[:3]: 1, attention[3:]: 1, (f"{feed_forward}.linear_in",): 1, (f"{feed_forward}.linear_out",): 3}
    return Stream(
        needed=NEEDED | {"both halves of SwiGLU": 6, "SiLU of the gate": 3}, inputs=names, of_weights=OF_WEIGHTS
    )


def _template_tokens(pipeline: Any) -> int:
    """Count the tokens of the chat template around an instruction."""
    if isinstance(pipeline, Flux2Pipeline):
        message, given = format_input([""], pipeline.system_message), {}
    else:
        message = [[{"role": "user", "content": ""}]]
        given = {"add_generation_prompt": True, "enable_thinking": False}
    encoded = pipeline.tokenizer.apply_chat_template(message, tokenize=True, return_dict=True, **given)
    return len(encoded["input_ids"][0])


def _count_tokens(pipeline: Any) -> Callable[[str], int]:
    """See `Family.count_tokens`: those of the chat template are among them."""
    tokenizer = getattr(pipeline.tokenizer, "tokenizer", pipeline.tokenizer)  # dev has a processor
    around = _template_tokens(pipeline)
    return lambda text: around + len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


FAMILY = Family(
    pipelines=("Flux2Pipeline", "Flux2KleinPipeline"),
    editor=Flux2,
    transformer="Flux2Transformer2DModel",
    targets=(
        *ATTENTION,
        *(f"{name}.{layer}" for name in ("ff", "ff_context") for layer in ("linear_in", "linear_out")),
        *(f"attn.{name}" for name in ("to_qkv_mlp_proj", "to_out")),  # single blocks
    ),
    # base_shift and max_shift play no part: the pipeline computes mu itself
    scheduler=FLOW_MATCHING | {"shift_terminal": None, "use_flow_sigmas": False},
    saved=Saved(
        double=(_stream(ATTENTION[:4], "ff"), _stream(ATTENTION[4:], "ff_context")),
        single=Stream(
            needed={
                "input of LayerNorm": 1,
                "q, k, v and both halves of SwiGLU, one tensor": 9,
                "q, k of attention": 2,
                "output of attention": 1,
                "SiLU of the gate": 3,
            },
            inputs={("attn.to_qkv_mlp_proj",): 1, ("attn.to_out",): 4},
            of_weights={"output of LayerNorm, for the scale": 1, "output of the block, for the gate": 1},
        ),
        compiled=(-3, -3),  # the gate's SiLU runs again
        forward=21.4,
        beyond=15.0,
        again=15.3,
    ),
    several=("Flux2Pipeline", "Flux2KleinPipeline"),
    picture_numbers=769,
    block_weights=13,  # 4 of attention, 9 of a gated feed-forward of 3 d
    # of modulation, once for all blocks: of both streams, of the one, and of the output
    row_weights=lambda transformer: (12 + 3 + 2) * width_of(transformer) ** 2,
    count_tokens=_count_tokens,
    stock_arguments=lambda pipeline, model: {
        "guidance_scale": model.guidance_scale if pipeline == "Flux2Pipeline" else model.cfg_scale
    },
    originals=FLUX2,
    comfyui=(  # its class Flux2 is a Flux there: `flux_to_diffusers` holds for it too
        rf"transformer_blocks\.\d+\.({'|'.join(ATTENTION)}|ff(_context)?\.linear_(in|out))",
        r"single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)",
        r"x_embedder|context_embedder|proj_out|norm_out\.linear",
    ),
)
