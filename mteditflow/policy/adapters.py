"""What of a transformer is trained, and its copies for rollouts, averages and the reference: here as LoRA adapters, in
full_weights.py as weights of its own.

LoRA adapters are switched by two fields of each peft layer rather than by peft's `set_adapter`: that one also sets
requires_grad, which would cut `current` out of training while another is selected, and walks all modules of the
transformer at every call.
"""

import difflib
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal, Protocol

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from mteditflow.config import LoraConfig

AdapterName = Literal["current", "old", "off", "ema"]


class Adapters(Protocol):
    """current is trained, old (under NFT) is the rollout policy, ema is evaluated and exported, off is the reference:
    the model as it was. All start alike, are float32, and change in place: a captured graph sees new weights.
    """

    lora: LoraConfig
    targets: list[str]
    """Full names of the modules that are trained."""
    selected: AdapterName
    """The weights that `transformer` uses now."""

    @property
    def transformer(self) -> Any:
        """The transformer under the selected weights: what `velocity` calls."""
        ...

    @property
    def num_modules(self) -> int:
        """Modules that are trained."""
        ...

    @property
    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of `current`, float32, always in the same order."""
        ...

    def use(self, name: AdapterName) -> AbstractContextManager[None]:
        """Selects weights; on leaving, those from before. Never touches requires_grad, nor a graph that is pending."""
        ...

    def copy(self, source: AdapterName, target: AdapterName, decay: float = 0.0) -> None:
        """target <- decay * target + (1 - decay) * source, in place; an exact copy at decay 0."""
        ...

    def state(self, name: AdapterName) -> dict[str, Tensor]:
        """A copy of the trained weights, by name."""
        ...

    def load(self, name: AdapterName, state: dict[str, Tensor]) -> None:
        """Puts back what `state` gave. ValueError for the state of another rank, other targets or another model."""
        ...


class LoraAdapters:
    """The weights of `Adapters` are low-rank changes of linears; `off` is no adapter.

    All start alike, by peft's 'gaussian' rule: A ~ N(0, 1/r^2), B = 0, a function of `seed` on every device.
    ValueError for a target that matches nothing.
    """

    def __init__(
        self, transformer: nn.Module, lora: LoraConfig, default_targets: Sequence[str], *, seed: int, has_old: bool
    ) -> None:
        self.lora = lora
        self.transformer = transformer
        targets = list(lora.targets or default_targets)
        self.targets = bound_modules(transformer, targets, is_default=not lora.targets)  # full names
        names: tuple[AdapterName, ...] = ("current", "old", "ema") if has_old else ("current", "ema")
        self._layers, self._weights = _add(transformer, lora, self.targets, names, seed)
        assert len(self._layers) == len(self.targets)
        self._select("current")

    @property
    def num_modules(self) -> int:
        """Modules that the adapter changes."""
        return len(self.targets)

    @property
    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of adapter `current`, float32, always in the same order."""
        return list(self._weights["current"].items())

    def _select(self, name: AdapterName) -> None:
        assert name == "off" or name in self._weights, f"no adapter {name!r}: there are off, {', '.join(self._weights)}"
        for layer in self._layers:
            layer._disable_adapters = name == "off"
            if name != "off":
                layer._active_adapter = [name]
        self.selected: AdapterName = name

    @contextmanager
    def use(self, name: AdapterName) -> Iterator[None]:
        """Selects the weights that `velocity` uses; on leaving, those from before. Never touches requires_grad."""
        before = self.selected
        self._select(name)
        try:
            yield
        finally:
            self._select(before)

    def copy(self, source: AdapterName, target: AdapterName, decay: float = 0.0) -> None:
        """target <- decay * target + (1 - decay) * source, in place; an exact copy at decay 0."""
        blend(self._weights[source], self._weights[target], decay)

    def state(self, name: AdapterName) -> dict[str, Tensor]:
        """A copy of the adapter's weights, `<module>.lora_A.weight` (r, in) and `<module>.lora_B.weight` (out, r)."""
        return {key: weight.detach().clone() for key, weight in self._weights[name].items()}

    def load(self, name: AdapterName, state: dict[str, Tensor]) -> None:
        """Puts back what `state` gave. ValueError for the state of another rank, other targets or another model."""
        put(name, self._weights[name], state)


Weights = dict[str, nn.Parameter]


@torch.no_grad()
def blend(source: Weights, target: Weights, decay: float) -> None:
    """target <- decay * target + (1 - decay) * source, in place; an exact copy at decay 0."""
    assert 0 <= decay <= 1, decay
    new: list[Tensor] = [*source.values()]
    old: list[Tensor] = [*target.values()]
    if decay == 0:
        torch._foreach_copy_(old, new)  # pyright: ignore[reportPrivateImportUsage]
    else:
        torch._foreach_lerp_(old, new, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def put(name: AdapterName, weights: Weights, state: dict[str, Tensor]) -> None:
    """Copies a state into weights of the same names and shapes. ValueError where they differ."""
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


def _shape(state: dict[str, Any], key: str) -> tuple[int, ...] | None:
    return tuple(state[key].shape) if key in state else None


def _is_match(name: str, target: str) -> bool:
    """Whether a target names the module: by its full name, by the end of it, or by a pattern with * ? [ over all."""
    if any(sign in target for sign in "*?["):
        return fnmatchcase(name, target)
    return name == target or name.endswith(f".{target}")


def bound_modules(transformer: nn.Module, targets: Sequence[str], *, is_default: bool) -> list[str]:
    """Full names of the linears that `targets` name; each must name one, unless the list is the family's default."""
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    bound = set()
    for target in targets:
        matching = {name for name in linears if _is_match(name, target)}
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
    return [name for name in linears if name in bound]


def _add(
    transformer: Any, lora: LoraConfig, targets: list[str], names: Sequence[AdapterName], seed: int
) -> tuple[list[LoraLayer], dict[str, dict[str, nn.Parameter]]]:
    """The peft layers, and each adapter's float32 parameters by name.

    The numbers are drawn here, on the host; the global random state is left as it was.
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
