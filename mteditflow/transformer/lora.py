"""LoRA adapters: low-rank changes of linears, y = W x + b + (alpha / r) B A x; `off` is no adapter.

A linear of our own instead of peft's, which is the oracle in tests and reads and writes the same files. Peft casts its
input to float32 and keeps that copy for the backward pass, three times where q, k and v have one input; here the branch
runs in the input's precision, as under autocast and as the exported LoRA does in the stock pipeline, and the one input
is kept once. Trained weights and their gradients are float32.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from mteditflow.config import LoraConfig
from mteditflow.transformer.adapters import AdapterName, Adapters, Weights, copy_names, find_targets


class LoraLinear(nn.Module):
    """A frozen linear and the selected adapter's branch. Adapters are switched by putting their weights into `down`
    (r, in) and `up` (out, r), and its scale into `scaling`, a number or a tensor without dimension: a compiled graph
    stays the same, and neither requires_grad nor a pending graph is touched.
    """

    def __init__(self, base: nn.Linear, scaling: float) -> None:
        super().__init__()
        self.base = base
        self.scaling: float | Tensor = scaling
        self.down: nn.Parameter | None = None
        self.up: nn.Parameter | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out), in the dtype of x."""
        if self.down is None or self.up is None:
            return self.base(x)
        rows = x.flatten(0, -2)  # (N, in)
        y, h = self.base(rows), linear(rows, self.down.to(x.dtype)) * self.scaling  # (N, out), (N, r)
        # In place: one pass over y. Nobody else holds it, and no backward pass needs its value. Neither is it a view,
        # whose change in place would cost two copies of the gradient: a quarter of this layer's time on a CPU.
        y.addmm_(h, self.up.to(x.dtype).t())
        return y.unflatten(0, x.shape[:-1])


def lora_adapters(
    transformer: Any,
    lora: LoraConfig,
    default_targets: Sequence[str],
    *,
    seed: int,
    has_old: bool,
    is_compiled: bool = False,
    device: torch.device | None = None,
) -> Adapters:
    """Adapters in a frozen transformer, where `lora.targets` is empty on the linears that `default_targets` name.

    All start alike, by peft's 'gaussian' rule: A ~ N(0, 1/r^2), B = 0, a function of `seed` on every device.
    is_compiled: all copies, and `off`, share a graph: they need a gradient alike, and `off` is `current` times 0.
    device: of the adapters, where it is not the transformer's.
    ValueError for a target that matches nothing.
    """
    targets = find_targets(transformer, lora.targets, default_targets)
    layers: dict[str, LoraLinear] = {}
    for target in targets:
        parent, _, leaf = target.rpartition(".")
        layers[target] = LoraLinear(transformer.get_submodule(target), lora.alpha / lora.rank)
        setattr(transformer.get_submodule(parent), leaf, layers[target])
    device = device or next(iter(layers.values())).base.weight.device
    weights: dict[AdapterName, Weights] = {
        name: _draw(layers, lora.rank, seed, device, is_trained=is_compiled or name == "current")
        for name in copy_names(has_old)
    }
    scale, zero = (torch.tensor(value, device=device) for value in (lora.alpha / lora.rank, 0.0))

    def switch(name: AdapterName) -> nn.Module:
        selected = weights.get(name, weights["current"] if is_compiled else {})
        for target, layer in layers.items():
            layer.down, layer.up = selected.get(f"{target}.lora_A.weight"), selected.get(f"{target}.lora_B.weight")
            if is_compiled:  # the same tensor in all layers, not written to: a graph that is pending may hold it
                layer.scaling = zero if name == "off" else scale
        return transformer

    return Adapters(targets, weights, switch)


def _draw(layers: dict[str, LoraLinear], rank: int, seed: int, device: torch.device, *, is_trained: bool) -> Weights:
    """An adapter's float32 parameters by name; the numbers are drawn on the host."""
    generator, weights = torch.Generator().manual_seed(seed), Weights()
    for target, layer in layers.items():
        base = layer.base
        down = torch.randn(rank, base.in_features, generator=generator) / rank
        both = {"lora_A": down, "lora_B": torch.zeros(base.out_features, rank)}
        for name, values in both.items():
            parameter = nn.Parameter(values.to(device), requires_grad=is_trained)
            weights[f"{target}.{name}.weight"] = parameter
    return weights
