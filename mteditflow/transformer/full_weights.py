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

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mteditflow.config import LoraConfig
from mteditflow.transformer.adapters import AdapterName, Adapters, Weights, copy_names, find_targets


def full_weights(transformer: nn.Module, lora: LoraConfig, *, has_old: bool) -> Adapters:
    """Copies of a frozen transformer's own weights, by its own names. ValueError as for LoRA's targets."""
    targets = _find_modules(transformer, lora.targets)
    trained = {id(weight) for name in targets for weight in _weights_of(transformer, name).values()}
    names = copy_names(has_old)
    transformers: dict[AdapterName, nn.Module] = {name: _copy(transformer, trained) for name in names}
    weights: dict[AdapterName, Weights] = {
        name: _prepare(transformers[name], targets, is_trainable=name == "current") for name in names
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


def _weights_of(transformer: nn.Module, name: str) -> Weights:
    return dict(transformer.get_submodule(name).named_parameters(recurse=False))


def _copy(transformer: nn.Module, trained: set[int]) -> nn.Module:
    """A copy that shares every tensor of the transformer but the trained weights."""
    tensors: list[Tensor] = [*transformer.parameters(), *transformer.buffers()]
    return copy.deepcopy(transformer, {id(tensor): tensor for tensor in tensors if id(tensor) not in trained})


def _prepare(transformer: nn.Module, names: Sequence[str], *, is_trainable: bool) -> Weights:
    """The trained weights of a copy, made float32 and rounded where they are used."""
    weights: Weights = {}
    for name in names:
        module = transformer.get_submodule(name)
        for leaf, weight in _weights_of(transformer, name).items():
            dtype = weight.dtype
            weight.data = weight.data.float()
            weight.requires_grad_(is_trainable)
            if dtype != torch.float32:
                # unsafe: the parametrization changes the dtype, which is what it is for
                parametrize.register_parametrization(module, leaf, _Rounded(dtype), unsafe=True)
            weights[f"{name}.{leaf}".lstrip(".")] = weight
    return weights
