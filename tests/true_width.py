"""Two blocks of a published transformer at its true width, on fake tensors, and torch's own account of a training pass:
no weight is allocated, and nothing is computed.

The account is that of a GPU: what differs there from the CPU's operators is put in their place (`_of_a_gpu`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import MagicMock

import diffusers
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh

from mteditflow.config import Config
from mteditflow.config.cli import from_overrides
from mteditflow.plan.memory import Sizes, read_sizes
from mteditflow.policy import DTYPES, Adapters
from mteditflow.policy.published import MODELS
from mteditflow.transformer.base import quantise
from mteditflow.transformer.full_weights import full_weights
from mteditflow.transformer.lean_qwen import make_lean
from mteditflow.transformer.lora import lora_adapters
from mteditflow.transformer.sharded import shard

SIDE, TEXT, ROWS = 32, 512, 2  # tokens per side at 512 px, and of a text; rows: what is copied in a batch is seen


class _FusedNorm(torch.autograd.Function):
    """What torch's RMSNorm keeps on a GPU: its input as it is, and one float32 number for each row of it. On the CPU
    it is made of other operators, which keep a float32 copy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x, torch.empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


@contextmanager
def fake_tensors() -> Iterator[None]:
    """Fake tensors, with torch's RMSNorm as on a GPU."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True):
        patch.setattr(nn.RMSNorm, "forward", lambda self, x: _FusedNorm.apply(x))
        yield


class Account(MemTracker):
    """torch's account of live bytes, without its account by module: that one hooks every module, in ten times the
    seconds.
    """

    def __init__(self, *tracked: Any) -> None:
        """Count storages from now on, and those of modules, optimizers and tensors that are there."""
        super().__init__()
        self._mod_tracker = MagicMock(is_bw=False, parents=())
        self.track_external(*tracked)

    def live(self, kind: str = "current") -> int:
        """Bytes that are live now, or at the peak."""
        return sum(parts["Total"] for parts in self.get_tracker_snapshot(kind).values())


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """A transformer of a few blocks with its adapters, and the inputs of a forward pass."""

    config: Config
    sizes: Sizes
    transformer: Any
    adapters: Adapters
    inputs: dict[str, Any]

    @property
    def blocks(self) -> list[nn.Module]:
        """All blocks, in the order in which they run."""
        return [*self.transformer.transformer_blocks, *getattr(self.transformer, "single_transformer_blocks", ())]

    def account(self) -> Account:
        """An account in which weights, gradients and inputs are there already."""
        trained = [weight for _, weight in self.adapters.trainable]
        for weight in trained:
            weight.grad = torch.zeros_like(weight)
        inputs = [value for value in self.inputs.values() if isinstance(value, Tensor)]
        return Account(self.transformer, trained, [weight.grad for weight in trained], inputs)

    def forward(self) -> Tensor:
        """Run the transformer."""
        return self.transformer(**self.inputs, return_dict=False)[0]


def build(
    path: str, base: str, num_double: int, num_single: int, mesh: DeviceMesh | None = None, **fields: Any
) -> Blocks:
    """Build blocks of a published model at 512 px, within `fake_tensors`, cut where there is a mesh. fields: of the
    config, 'section__name'.
    """
    known = MODELS[path]
    transformer = dict(known.transformer) | {"num_layers": num_double}
    if "num_single_layers" in transformer:
        transformer["num_single_layers"] = num_single
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, path, replace(known, transformer=transformer))
        vision = 147456 if "Qwen" in path else 0
        config = from_overrides(
            {
                "model.path": path, "model.compile": "off", "model.base": base, "model.height": 512, "model.width": 512,
                "model.max_text_tokens": TEXT - (147456 // 28**2 + 20 if vision else 0), "model.vision_pixels": vision,
                "lora.targets": [], "lora.rank": 64, "optimizer.microbatch_size": ROWS,
            } | {name.replace("__", "."): value for name, value in fields.items()}
        )  # fmt: skip
        sizes = read_sizes(config)
    dtype, default = DTYPES[config.model.dtype], torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    model: Any = getattr(diffusers, sizes.family.transformer)(**transformer).requires_grad_(False).eval()
    torch.set_default_dtype(default)
    if config.model.quantised:
        quantise(model, config.model.quantised, torch.device("cpu"))
    if "Qwen" in path:
        make_lean(model)
    if config.lora.is_full:
        adapters = full_weights(model, config.lora, has_old=False, device=torch.device("cpu"), mesh=mesh)
        model = adapters.transformer
    else:
        adapters = lora_adapters(model, config.lora, sizes.family.targets, seed=0, has_old=False)
    if mesh is not None and not config.lora.is_full:
        shard(model, mesh, adapters.parameters())
    if config.model.is_checkpointed:
        model.enable_gradient_checkpointing()
    return Blocks(
        config=config,
        sizes=sizes,
        transformer=model,
        adapters=adapters,
        inputs=_inputs(known.pipeline, transformer, dtype),
    )


def _inputs(pipeline: str, transformer: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    tokens, width = 2 * SIDE**2, transformer["joint_attention_dim"]
    inputs: dict[str, Any] = {
        "hidden_states": torch.empty(ROWS, tokens, transformer["in_channels"], dtype=dtype),
        "encoder_hidden_states": torch.empty(ROWS, TEXT, width, dtype=dtype),
        "timestep": torch.empty(ROWS, dtype=dtype),
    }
    if "Qwen" in pipeline:
        mask = torch.empty(ROWS, TEXT, dtype=torch.bool)
        return inputs | {"img_shapes": [[(1, SIDE, SIDE)] * 2] * ROWS, "encoder_hidden_states_mask": mask}
    axes = 3 if "Kontext" in pipeline else 4
    inputs["guidance"] = torch.empty(ROWS) if transformer["guidance_embeds"] else None
    inputs |= {"img_ids": torch.empty(tokens, axes, dtype=dtype), "txt_ids": torch.empty(TEXT, axes, dtype=dtype)}
    if "Kontext" in pipeline:
        inputs["pooled_projections"] = torch.empty(ROWS, transformer["pooled_projection_dim"], dtype=dtype)
    return inputs
