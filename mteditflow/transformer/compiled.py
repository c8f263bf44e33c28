"""The transformer's repeated blocks by torch.compile: one graph for each class of block, number of rows, and with or
without gradients, whichever adapter is selected.

What would make more of them is taken away before a block is called: an input that needs no gradient in the first
trained block and one in those behind it, and inputs that lie otherwise in memory. The options keep a rounding wherever
eager bfloat16 has one, so that the graph that is trained on computes the bits of the graph that sampled; where it does
not, training replays the sampling graph (`replay_blocks`). No CUDA graphs of Inductor's: rollout.cuda_graph captures a
whole turn, compiled blocks and all.
"""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import utils as dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.utils.checkpoint import checkpoint

from mteditflow.config import LoraConfig, ModelConfig
from mteditflow.transformer.sharded import repeated_blocks

BACKEND = "inductor"
OPTIONS: dict[str, Any] = {"emulate_precision_casts": True}
STREAMS = ("hidden_states", "encoder_hidden_states")  # what flows from block to block, as diffusers names it
TIMED = ("_compile.compile_inner", "backward._backward_impl")  # the names under which torch keeps its seconds
MAX_GRAPHS = 64
"""Graphs of a class of block for sessions of one shape, beyond which torch gives up: two for each number of rows, and
each again for the negative text of true guidance. Rollouts and evaluations have at most two numbers of rows each;
torch's own limit is 8."""


def is_compiled(model: ModelConfig, lora: LoraConfig, device: torch.device) -> bool:
    """Whether the blocks are compiled: `auto` is on a GPU. ValueError where that is asked for and cannot be."""
    if model.compile == "blocks" and lora.is_full:
        raise ValueError(
            "model.compile is 'blocks': with lora.is_full each copy of the weights is a transformer of its own, which "
            "would be compiled by itself; take auto or off"
        )
    return model.compile == "blocks" or (model.compile == "auto" and device.type == "cuda" and not lora.is_full)


def compile_blocks(transformer: Any) -> None:
    """Compile the repeated blocks of a transformer with its adapters. Graphs are made when a block is first called."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(_cache_folder()))
    allow_graphs(1)
    for block, is_trained in _repeated_blocks(transformer):
        block.forward = _compiled(block, is_trained)


def allow_graphs(num_shapes: int) -> None:
    """Let torch make as many graphs as sessions of so many shapes need."""
    dynamo_config = torch._dynamo.config
    dynamo_config.recompile_limit = max(dynamo_config.recompile_limit, MAX_GRAPHS * num_shapes)


def run_blocks_eagerly(transformer: Any) -> None:
    """Take `compile_blocks` back."""
    for block, _ in _repeated_blocks(transformer):
        block.__dict__.pop("forward", None)


def replay_blocks(transformer: Any) -> None:
    """Run the blocks' forward pass without gradients where it is trained on, and again, with gradients, on the way
    back: the graph that sampled computes the velocity, to the bit, at the price of checkpointing.
    """

    trained = {block for block, is_trained in _repeated_blocks(transformer) if is_trained}

    def run(block: nn.Module, *inputs: Any) -> Any:
        if block not in trained:
            with torch.no_grad():
                return block(*inputs)
        # Reentrant: what is checkpointed runs under no_grad. Nothing would be trained, and nothing be said, if none of
        # its inputs needed a gradient.
        prepared = [_with_gradient(value) if isinstance(value, Tensor) else value for value in inputs[:2]]
        return checkpoint(block, *prepared, *inputs[2:], use_reentrant=True, preserve_rng_state=False)

    transformer.enable_gradient_checkpointing(run)


def count_graphs() -> tuple[int, float]:
    """Graphs that this process has compiled so far, and the seconds that took."""
    times = (dynamo.compilation_time_metrics.get(name, ()) for name in TIMED)
    return dynamo.counters["stats"]["unique_graphs"], sum(sum(values) for values in times)


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mteditflow" / "inductor"


def _repeated_blocks(transformer: Any) -> list[tuple[nn.Module, bool]]:
    """The blocks in the order in which they are called; whether a block, or one before it, has weights that are
    trained, so that it needs gradients.
    """
    blocks, is_trained = [], False
    for _, block in repeated_blocks(transformer):
        is_trained |= any(weight.requires_grad for weight in block.parameters())
        blocks.append((block, is_trained))
    return blocks


def _with_gradient(value: Tensor) -> Tensor:
    return value if value.requires_grad else value.detach().requires_grad_()


def _compiled(block: nn.Module, is_trained: bool) -> Callable[..., Any]:
    """A block's forward pass, compiled; without gradients, in training too, where none is needed."""
    signature = inspect.signature(block.forward)
    run = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=BACKEND, options=OPTIONS)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()  # checkpointing gives by position what is else given by name
        with torch.set_grad_enabled(is_trained and torch.is_grad_enabled()):
            for name in STREAMS:
                value = given.arguments.get(name)
                if value is not None:
                    value = value.contiguous()
                    given.arguments[name] = _with_gradient(value) if torch.is_grad_enabled() else value.detach()
            try:
                return run(**given.arguments)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                reason = next(line for line in str(error).splitlines() if line.strip())
                raise ValueError(
                    f"model.compile: a {type(block).__name__} cannot be compiled ({reason}); set model.compile off"
                ) from error

    return forward
