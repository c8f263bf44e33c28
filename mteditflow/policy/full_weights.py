"""Full fine-tuning: the transformer's own weights are trained, with `lora.rank` 0.

Rank 0 rather than a field of its own, because then no setting contradicts another: `lora.targets` says which linears
are trained (empty: every weight of the transformer), `lora.rank` says how (0: as they are; else by a change of that
rank), and the checkpoints of runs that knew no such field still resume. `lora.alpha` has no meaning here.

Copies (`current`, `ema`, `old`) are modules of their own; `off` is the pipeline's transformer, untouched. Weights that
are not trained are the same tensors in all. Swapping weights into one module (or torch.func.functional_call) would be
as small, but what runs after the call would then see the wrong weights: a checkpointed block recomputes its forward
during backward, when the weights of `current` are swapped out again. A module of its own is right whenever it runs.

Precision: trained weights, their gradients and their averages are float32. The forward pass runs in `model.dtype`: a
float32 weight is rounded to the base's dtype where it is used, so the bits are those of the stock pipeline with the
exported weights in that dtype, in a rollout as in training. With float32 nothing is cast.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mteditflow.config import LoraConfig
from mteditflow.policy.adapters import AdapterName, Adapters, LoraAdapters, Weights, blend, bound_modules, put


def build_adapters(
    transformer: nn.Module, lora: LoraConfig, default_targets: Sequence[str], *, seed: int, has_old: bool
) -> Adapters:
    """What is trained of a frozen transformer: LoRA adapters, or with rank 0 its weights.

    default_targets: of LoRA, where `lora.targets` is empty. seed: of LoRA's initial weights. has_old: with NFT's `old`.
    """
    if lora.rank == 0:
        return FullWeights(transformer, lora, has_old=has_old)
    return LoraAdapters(transformer, lora, default_targets, seed=seed, has_old=has_old)


class FullWeights:
    """`Adapters` whose weights are those of the transformer, by its own names. ValueError as for LoRA's targets."""

    def __init__(self, transformer: nn.Module, lora: LoraConfig, *, has_old: bool) -> None:
        self.lora = lora
        self.targets = _modules(transformer, lora.targets)
        trained = {id(weight) for name in self.targets for weight in _own(transformer, name).values()}
        copies: tuple[AdapterName, ...] = ("current", "ema", "old") if has_old else ("current", "ema")
        self._transformers: dict[AdapterName, nn.Module] = {"off": transformer}
        self._weights: dict[AdapterName, Weights] = {}
        for name in copies:
            self._transformers[name] = _copy(transformer, trained)
            self._weights[name] = _trained(self._transformers[name], self.targets, is_trainable=name == "current")
        self.selected: AdapterName = "current"

    @property
    def transformer(self) -> Any:
        """The transformer of the selected weights."""
        return self._transformers[self.selected]

    @property
    def num_modules(self) -> int:
        """Modules whose weights are trained."""
        return len(self.targets)

    @property
    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Names and weights of `current`, float32, always in the same order."""
        return list(self._weights["current"].items())

    @contextmanager
    def use(self, name: AdapterName) -> Iterator[None]:
        """Selects the transformer that `velocity` calls; on leaving, the one from before."""
        assert name in self._transformers, f"no adapter {name!r}: there are {', '.join(self._transformers)}"
        before, self.selected = self.selected, name
        try:
            yield
        finally:
            self.selected = before

    def copy(self, source: AdapterName, target: AdapterName, decay: float = 0.0) -> None:
        """target <- decay * target + (1 - decay) * source, in place; an exact copy at decay 0."""
        blend(self._weights[source], self._weights[target], decay)

    def state(self, name: AdapterName) -> dict[str, Tensor]:
        """A copy of the trained weights, float32, by their names in the transformer's own state dict."""
        return {key: weight.detach().clone() for key, weight in self._weights[name].items()}

    def load(self, name: AdapterName, state: dict[str, Tensor]) -> None:
        """Puts back what `state` gave. ValueError for the state of other targets or another model."""
        put(name, self._weights[name], state)


class _Rounded(nn.Module):
    """A float32 weight in the precision in which it is used; its gradient is float32."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, weight: Tensor) -> Tensor:
        return weight.to(self.dtype)


def _modules(transformer: nn.Module, targets: Sequence[str]) -> list[str]:
    """Names of the modules to train: those that `targets` name, or all that have weights."""
    if targets:
        return bound_modules(transformer, targets, is_default=False)
    return [name for name, module in transformer.named_modules() if any(True for _ in module.parameters(recurse=False))]


def _own(transformer: nn.Module, name: str) -> dict[str, nn.Parameter]:
    return dict(transformer.get_submodule(name).named_parameters(recurse=False))


def _copy(transformer: nn.Module, trained: set[int]) -> nn.Module:
    """A copy that shares every tensor of the transformer but the trained weights."""
    tensors: list[Tensor] = [*transformer.parameters(), *transformer.buffers()]
    return copy.deepcopy(transformer, {id(tensor): tensor for tensor in tensors if id(tensor) not in trained})


def _trained(transformer: nn.Module, names: Sequence[str], *, is_trainable: bool) -> Weights:
    """The trained weights of a copy, made float32 and rounded where they are used."""
    weights: Weights = {}
    for name in names:
        module = transformer.get_submodule(name)
        for leaf, weight in _own(transformer, name).items():
            dtype = weight.dtype
            weight.data = weight.data.float()
            weight.requires_grad_(is_trainable)
            if dtype != torch.float32:
                # unsafe: the parametrization changes the dtype, which is what it is for
                parametrize.register_parametrization(module, leaf, _Rounded(dtype), unsafe=True)
            weights[f"{name}.{leaf}".lstrip(".")] = weight
    return weights
