"""What autograd keeps of a transformer between a forward pass and its backward pass, from shapes alone.

Per row and block, for each token of a stream, with c bytes a number (4 in float32, 2 otherwise), width d, rank r:

    c d (what the gradient needs + inputs of linears that are trained) + c r (trained linears) + 4 statistics (heads)

A family says the widths (`family.Saved`). What a block keeps once per row (modulation) is left out, and the two numbers
of a LayerNorm per token: below 0.1 %; so is the loss, whose tensors are as small as latents. Where the forward pass is
not float32, a trained weight is rounded for it, and the copy kept.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from mteditflow.policy.family import Saved, Stream, width_of


@dataclass(frozen=True, kw_only=True)
class Pass:
    """A training pass through a transformer."""

    saved: Saved
    transformer: Mapping[str, Any]  # its config
    trained: Mapping[str, int]  # weights that are trained of each linear, by full name
    num_trained: int  # weights in all
    is_whole: bool  # every weight is trained
    is_compiled: bool
    rank: int  # of the LoRA; 0: the linears' own weights are trained
    num_bytes: int  # of a number in the forward pass
    image_tokens: int  # of output and condition
    text_tokens: int


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Bytes of a pass."""

    per_row: float  # kept at the end of the forward pass
    at_peak: float  # per row, besides, at the peak of the backward pass
    per_pass: float  # rounded weights, whatever the number of rows
    at_blocks: tuple[float, ...]  # of per_row, what is kept when a block is at work, the last blocks' in their order


def bytes_kept(of: Pass, *, is_checkpointed: bool) -> Kept:
    """Bytes that a pass keeps; with checkpointing the inputs of its blocks, and at the peak the last one run again."""
    blocks, one_width = _blocks(of), of.num_bytes * width_of(of.transformer) * (of.image_tokens + of.text_tokens)
    rounded = of.num_bytes * of.num_trained if of.num_bytes < 4 else 0
    if is_checkpointed and blocks:
        # what another block keeps more than the last when it is run again
        at_blocks = [number * one_width + size - blocks[-1] for number, size in enumerate(blocks, start=1)]
        again, rounded = of.saved.again * one_width + blocks[-1], rounded / len(blocks)
        return Kept(per_row=at_blocks[-1], at_peak=again, per_pass=rounded, at_blocks=tuple(at_blocks))
    last_norm = of.num_bytes * width_of(of.transformer) * of.image_tokens
    at_blocks, beyond = [size + last_norm for size in accumulate(blocks)], of.saved.beyond * one_width
    return Kept(per_row=sum(blocks) + last_norm, at_peak=beyond, per_pass=rounded, at_blocks=tuple(at_blocks))


def _blocks(of: Pass) -> list[float]:
    """Bytes per row of each block, from the first on in which something is trained: none before has a gradient."""
    saved, num_single = of.saved, of.transformer.get("num_single_layers") or 0
    all_tokens = of.image_tokens + of.text_tokens
    one_width = of.num_bytes * width_of(of.transformer) * all_tokens
    double = tuple(zip(saved.double, (of.image_tokens, of.text_tokens), strict=True))
    more = [of.is_compiled * widths * one_width for widths in saved.compiled]
    blocks = [(f"transformer_blocks.{i}.", double, more[0]) for i in range(of.transformer["num_layers"])]
    if saved.single is not None:
        single = ((saved.single, all_tokens),)
        blocks += [(f"single_transformer_blocks.{i}.", single, more[1]) for i in range(num_single)]
    sizes = []
    for prefix, streams, extra in blocks:
        names = {name.removeprefix(prefix) for name in of.trained if name.startswith(prefix)}
        if names or sizes:
            sizes.append(extra + sum(tokens * _per_token(of, stream, names) for stream, tokens in streams))
    return sizes


def _per_token(of: Pass, stream: Stream, names: set[str]) -> float:
    """Bytes of a token in a block of which the linears `names` are trained."""
    widths = sum(stream.needed.values())
    widths += sum(width for readers, width in stream.inputs.items() if of.is_whole or names.intersection(readers))
    widths += sum(stream.of_weights.values()) if of.is_whole else 0
    num_trained = sum(len(names.intersection(readers)) for readers in stream.inputs)
    statistics = 4 * of.saved.statistics * of.transformer["num_attention_heads"]
    return of.num_bytes * (widths * width_of(of.transformer) + num_trained * of.rank) + statistics
