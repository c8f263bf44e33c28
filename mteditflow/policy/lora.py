"""LoRA adapters: low-rank changes of linears, by peft; `off` is no adapter.

They are switched by two fields of each peft layer rather than by peft's `set_adapter`: that one also sets
requires_grad, which would cut `current` out of training while another is selected, and walks all modules of the
transformer at every call.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from mteditflow.config import LoraConfig
from mteditflow.policy.adapters import AdapterName, Adapters, Weights, copy_names, find_targets


def lora_adapters(
    transformer: Any, lora: LoraConfig, default_targets: Sequence[str], *, seed: int, has_old: bool
) -> Adapters:
    """Adapters in a frozen transformer, where `lora.targets` is empty on the linears that `default_targets` name.

    All start alike, by peft's 'gaussian' rule: A ~ N(0, 1/r^2), B = 0, a function of `seed` on every device.
    ValueError for a target that matches nothing.
    """
    targets, names = find_targets(transformer, lora.targets, default_targets), copy_names(has_old)
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # several are meant
        for name in names:
            config = peft.LoraConfig(
                r=lora.rank, lora_alpha=lora.alpha, target_modules=targets, init_lora_weights="gaussian"
            )
            transformer.add_adapter(config, adapter_name=name)
    layers = {name: module for name, module in transformer.named_modules() if isinstance(module, LoraLayer)}
    assert len(layers) == len(targets)

    def switch(name: AdapterName) -> nn.Module:
        for layer in layers.values():
            layer._disable_adapters = name == "off"
            if name != "off":
                layer._active_adapter = [name]
        return transformer

    return Adapters(targets, {name: _draw(layers, name, lora.rank, seed) for name in names}, switch)


def _draw(layers: dict[str, LoraLayer], name: AdapterName, rank: int, seed: int) -> Weights:
    """An adapter's float32 parameters by name; the numbers are drawn here, on the host."""
    generator, weights = torch.Generator().manual_seed(seed), Weights()
    for module, layer in layers.items():
        down, up = layer.lora_A[name].float().weight, layer.lora_B[name].float().weight
        assert isinstance(down, nn.Parameter) and isinstance(up, nn.Parameter)
        down.data.copy_(torch.randn(down.shape, generator=generator) / rank)
        up.data.zero_()
        weights |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    for weight in weights.values():
        weight.requires_grad_(name == "current")
    return weights
