"""Full fine-tuning: the transformer's own weights are trained, with `lora.is_full`.

`lora.targets` says which linears are trained (empty: every weight of the transformer); rank and alpha have no meaning
here.

Copies (`current`, `ema`, `old`) are modules of their own; `off` is the pipeline's transformer, untouched. Weights that
are not trained are the same tensors in all. Swapping weights into one module (or torch.func.functional_call) would be
as small, but what runs after the call would then see the wrong weights: a checkpointed block recomputes its forward
during backward, when the weights of `current` are swapped out again. A module of its own is right whenever it runs.

Precision: trained weights, their gradients and their averages are float32. The forward pass runs in `model.base`: a
float32 weight is rounded to the base's dtype where it is used, so the bits are those of the stock pipeline with the
exported weights in that dtype, in a rollout as in training. With float32 nothing is cast.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.utils import parametrize

from mteditflow.config import LoraConfig
from mteditflow.transformer.adapters import AdapterName, Adapters, Weights, copy_names, find_targets
from mteditflow.transformer.sharded import shard


def full_weights(
    transformer: nn.Module,
    lora: LoraConfig,
    *,
    has_old: bool,
    device: torch.device,
    mesh: DeviceMesh | None = None,
) -> Adapters:
    """Copies of a frozen transformer's own weights on a device, by its own names. mesh: over which copies are cut; the
    transformer itself is not. ValueError as for LoRA's targets.
    """
    targets = _find_modules(transformer, lora.targets)
    names = copy_names(has_old)
    transformers: dict[AdapterName, nn.Module] = {name: _copy(transformer, is_cut=mesh is not None) for name in names}
    weights: dict[AdapterName, Weights] = {
        name: _prepare(transformers[name], targets, device, mesh, is_trainable=name == "current") for name in names
    }
    transformers["off"] = transformer
    return Adapters(targets, weights, transformers.__getitem__)


class _Rounded(nn.Module):
    """A float32 weight in the precision in which it is used; its gradient is float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)


def _find_modules(transformer: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the modules to train: those that `targets` name, or all that have weights."""
    if targets:
        return find_targets(transformer, targets)
    return [name for name, module in transformer.named_modules() if any(True for _ in module.parameters(recurse=False))]


def _copy(transformer: nn.Module, *, is_cut: bool) -> nn.Module:
    """A copy that shares every tensor of the transformer; where it is to be cut, as parameters of its own, which FSDP
    moves.
    """
    shared: dict[int, Any] = {id(tensor): tensor for tensor in [*transformer.parameters(), *transformer.buffers()]}
    if is_cut:
        shared |= {id(weight): nn.Parameter(weight.data, requires_grad=False) for weight in transformer.parameters()}
    return copy.deepcopy(transformer, shared)


def _prepare(
    transformer: nn.Module,
    targets: Sequence[str],
    device: torch.device,
    mesh: DeviceMesh | None,
    *,
    is_trainable: bool,
) -> Weights:
    """The trained weights of a copy, made float32 and rounded where they are used; unit by unit where it is cut."""
    if mesh is None:
        _make_trained(transformer, targets, device, is_trainable=is_trainable)
    else:
        remaining = list(targets)

        def prepare(prefix: str, _: nn.Module) -> None:
            inside = [name for name in remaining if not prefix or f"{name}.".startswith(f"{prefix}.")]
            remaining[:] = [name for name in remaining if name not in inside]
            _make_trained(transformer, inside, device, is_trainable=is_trainable)

        shard(transformer, mesh, prepare=prepare)
    return _trained_weights(transformer, targets)


def _make_trained(transformer: nn.Module, names: Sequence[str], device: torch.device, *, is_trainable: bool) -> None:
    """Give modules float32 weights of their own."""
    for name in names:
        module = transformer.get_submodule(name)
        for leaf, weight in list(module.named_parameters(recurse=False)):
            trained = nn.Parameter(weight.to(device, torch.float32, copy=True), is_trainable)
            module.register_parameter(leaf, trained)
            if weight.dtype != torch.float32:
                # unsafe: the parametrization changes the dtype, which is what it is for
                parametrize.register_parametrization(module, leaf, _Rounded(weight.dtype), unsafe=True)


def _trained_weights(transformer: nn.Module, names: Sequence[str]) -> Weights:
    """The trained weights as they are held, whole or cut, by the names of the transformer's own state dict."""
    weights: Weights = {}
    for name in names:
        module: Any = transformer.get_submodule(name)
        held = dict(module.named_parameters(recurse=False))
        if parametrize.is_parametrized(module):
            held |= {leaf: rounded.original for leaf, rounded in module.parametrizations.items()}
        weights |= {f"{name}.{leaf}".lstrip("."): weight for leaf, weight in held.items()}
    return weights
