"""What of a transformer is trained, and its copies for rollouts, averages and the reference: LoRA adapters (lora.py) or
the weights themselves (full_weights.py).
"""

import difflib
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mteditflow.transformer.sharded import cut_like, local

AdapterName = Literal["current", "old", "off", "ema"]
Weights = dict[str, nn.Parameter]


def copy_names(has_old: bool) -> tuple[AdapterName, ...]:
    """Names of the copies that a run has, `off` aside."""
    return ("current", "old", "ema") if has_old else ("current", "ema")


class Adapters:
    """current is trained, old (under NFT) is the rollout policy, ema is evaluated and exported, off is the reference:
    the model as it was. All start alike, are float32, and change in place: a captured graph sees new weights.
    """

    def __init__(
        self, targets: list[str], weights: dict[AdapterName, Weights], switch: Callable[[AdapterName], nn.Module]
    ) -> None:
        """targets: full names of the modules that are trained. weights: of each copy, always in the same order.

        switch: selects a copy, or 'off', and returns the transformer that uses it. It must neither touch requires_grad
        nor a graph that is pending.
        """
        self.targets, self._weights, self._switch = targets, weights, switch
        self._select("current")

    @property
    def num_modules(self) -> int:
        """Modules that are trained."""
        return len(self.targets)

    @property
    def trainable(self) -> list[tuple[str, nn.Parameter]]:
        """Names and parameters of `current`, float32, always in the same order."""
        return list(self._weights["current"].items())

    def parameters(self) -> set[nn.Parameter]:
        """The weights of all copies."""
        return {weight for weights in self._weights.values() for weight in weights.values()}

    def _select(self, name: AdapterName) -> None:
        assert name == "off" or name in self._weights, f"no adapter {name!r}: there are off, {', '.join(self._weights)}"
        self.transformer: Any = self._switch(name)  # what `velocity` calls
        self.selected: AdapterName = name

    @contextmanager
    def use(self, name: AdapterName) -> Iterator[None]:
        """Select the weights that `velocity` uses; on leaving, those from before."""
        before = self.selected
        self._select(name)
        try:
            yield
        finally:
            self._select(before)

    @torch.no_grad()
    def copy(self, source: AdapterName, target: AdapterName, decay: float = 0.0) -> None:
        """target <- decay * target + (1 - decay) * source, in place; an exact copy at decay 0."""
        assert 0 <= decay <= 1, decay
        new = [local(weight) for weight in self._weights[source].values()]
        old = [local(weight) for weight in self._weights[target].values()]
        if decay == 0:
            torch._foreach_copy_(old, new)  # pyright: ignore[reportPrivateImportUsage]
        else:
            torch._foreach_lerp_(old, new, 1 - decay)  # pyright: ignore[reportPrivateImportUsage]

    def state(self, name: AdapterName) -> dict[str, Tensor]:
        """A copy of the weights by name: `<module>.lora_A.weight` (r, in) and `.lora_B.weight` (out, r), or the names
        of the transformer's own state dict. What is cut stays so.
        """
        return {key: weight.detach().clone() for key, weight in self._weights[name].items()}

    @torch.no_grad()
    def load(self, name: AdapterName, state: dict[str, Tensor]) -> None:
        """Put back what `state` gave, or all of it whole on every rank. ValueError for the state of another rank, other
        targets or another model.
        """
        weights = self._weights[name]
        differing = [key for key in weights.keys() | state.keys() if _shape(weights, key) != _shape(state, key)]
        if differing:
            key = min(differing)
            raise ValueError(
                f"adapter {name!r} does not fit the model: {key} is {_shape(state, key)} in the state, "
                f"{_shape(weights, key)} in the model ({len(differing)} differ): lora.rank, lora.targets and "
                f"model.path must be as when it was saved"
            )
        for key, weight in weights.items():
            local(weight).copy_(local(cut_like(weight, state[key])))


def _shape(state: Mapping[str, Tensor], key: str) -> tuple[int, ...] | None:
    return tuple(state[key].shape) if key in state else None


def _is_match(name: str, target: str) -> bool:
    """Whether a target names the module: by its full name, by the end of it, or by a pattern with * ? [ over all."""
    if any(sign in target for sign in "*?["):
        return fnmatchcase(name, target)
    return name == target or name.endswith(f".{target}")


def name_targets(names: Collection[str], linears: Collection[str]) -> tuple[str, ...]:
    """Return targets that name these of the linears and no others: names within a block where that does it."""
    found: dict[str, None] = {}
    for name in (name for name in linears if name in names):
        short = re.sub(r"^\w+\.\d+\.", "", name)
        is_enough = all(other in names for other in linears if _is_match(other, short))
        found[short if is_enough else name] = None
    return tuple(found)


def find_targets(transformer: nn.Module, targets: Sequence[str], default: Sequence[str] = ()) -> list[str]:
    """Full names of the linears that `targets` name, or `default` where there are none: a family's, of which a
    transformer need not have all. ValueError for a target that names none.
    """
    linears = [name for name, module in transformer.named_modules() if isinstance(module, nn.Linear)]
    bound = {name for name in linears if any(_is_match(name, target) for target in targets or default)}
    for target in targets:
        if not any(_is_match(name, target) for name in bound):
            # The candidates are names within a block, and their own tails: 'attn.to_q', 'to_q'.
            names = {re.sub(r"^\w+\.\d+\.", "", name) for name in linears}
            names |= {name.rsplit(".", 1)[-1] for name in names}
            nearest = difflib.get_close_matches(target, sorted(names), n=3, cutoff=0.3) or sorted(names)[:3]
            raise ValueError(
                f"lora.targets: {target!r} matches no linear of the model; nearest are {', '.join(nearest)}"
            )
    if not bound:
        raise ValueError("lora.targets: the family's default targets match no linear of the model; name some")
    return [name for name in linears if name in bound]
