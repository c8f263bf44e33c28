"""The Triton ops of the transformer's blocks and of the judge's decoding against the reference, as `triton_cases.py`
has those of rollout and training: rows to 8 bits, norm and rope, attention.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import triton.language as tl
from mteditflow_kernels import attend_cache, norm_rope, quantise_rows, reference
from mteditflow_kernels.reference import RopePart
from near import ROUNDING, assert_near, draw
from test_rope import both, flux, qwen
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle
from triton_cases import DTYPES  # and with it the backend, the device, and NaN in memory that nothing was written to


def _exact_e4m3(
    builder: Any, value: Any, to: Any, rounding: Any, known: Callable = InterpreterBuilder.create_fp_to_fp
) -> Any:
    """Convert as the hardware and torch do: the interpreter's own conversion loses a carry, 1.96 becomes 1."""
    if to.scalar != tl.float8e4nv:
        return known(builder, value, to, rounding)
    return TensorHandle(torch.from_numpy(value.data).to(torch.float8_e4m3fn).view(torch.uint8).numpy(), tl.float8e4nv)


@pytest.mark.parametrize(("dtype", "shape"), product(DTYPES, [(3, 64), (2, 2, 2064), (1, 1), (5, 63)]))
def test_quantised_rows(dtype: torch.dtype, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference's bits; a row of zeros and an outlier, too. Registered as torch.library asks."""
    monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", _exact_e4m3)
    x = draw(0, *shape, dtype=dtype)
    x[0, ..., 0] *= 1000
    x[-1] *= 0 if shape[0] == 3 else 1
    for rows in (x, x[1:], x.mT.contiguous().mT):
        (q, scale), (expected, expected_scale) = quantise_rows(rows), reference.quantise_rows(rows)
        assert q.dtype == torch.float8_e4m3fn and torch.equal(q.view(torch.uint8), expected.view(torch.uint8))
        assert torch.equal(scale, expected_scale)
    torch.library.opcheck(torch.ops.mteditflow.quantise_rows.default, (x,), atol=0.0, rtol=0.0)


def streams(dtype: torch.dtype, size: int) -> list[RopePart]:
    """Text as it comes and image as a part of a wider projection; heads of `size`."""
    parts = []
    for i, tokens in enumerate((3, 11)):
        wide, angle = draw(i, 2, tokens, 7, size, dtype=dtype), draw(i + 2, tokens, size // 2)
        x = wide[:, :, 2:5] if i else wide[:, :, :3].contiguous()
        turns = torch.view_as_real(torch.polar(torch.ones_like(angle), angle)).flatten(1)
        parts.append((x, draw(i + 4, size, dtype=dtype), turns))
    return parts


def turn(op: Callable, parts: Sequence[Any], heads: Tensor) -> list[Tensor]:
    """The output, and the gradients of the inputs; that of the output lies as an attention leaves it."""
    inputs = [x.detach().requires_grad_() for x, *_ in parts]
    out = op([(x, *rest) for x, (_, *rest) in zip(inputs, parts, strict=True)], 1e-6)
    return [out.detach(), *torch.autograd.grad(out, inputs, heads.to(out.dtype).transpose(1, 2))]


@pytest.mark.parametrize(("dtype", "size"), product(DTYPES, [8, 128]))
def test_norm_rope(dtype: torch.dtype, size: int) -> None:
    parts, heads = streams(dtype, size), draw(9, 2, 3, 14, size, dtype=dtype)
    exact = [tuple(tensor.double() for tensor in part) for part in parts]
    found, eager, expected = (
        turn(op, p, heads) for op, p in ((norm_rope, parts), (reference.norm_rope, parts), (reference.norm_rope, exact))
    )
    for own, other, true in zip(found, eager, expected, strict=True):
        assert own.dtype == dtype and own.is_contiguous()
        assert_near(own, other, true, ROUNDING[dtype])
    for row in range(2):  # alone
        alone = turn(norm_rope, [(x[row : row + 1], *rest) for x, *rest in parts], heads[row : row + 1])
        assert all(torch.equal(a[0], b[row]) for a, b in zip(alone, found, strict=True))


def test_norm_rope_is_registered() -> None:
    """As torch.library asks, without a graph break, and under a checkpoint, which gives what was kept once only: always
    the eager bits.
    """
    parts, heads = streams(torch.bfloat16, 16), draw(9, 2, 3, 14, 16, dtype=torch.bfloat16)
    fields = [list(field) for field in zip(*parts, strict=True)]
    fields[0] = [x.detach().requires_grad_() for x in fields[0]]
    torch.library.opcheck(torch.ops.mteditflow.norm_rope.default, (*fields, 1e-6), atol=0.0, rtol=0.0)
    compiled = torch.compile(norm_rope, fullgraph=True, backend="aot_eager")
    checkpointed = partial(checkpoint, norm_rope, use_reentrant=False)
    for op in (compiled, checkpointed):
        for own, other in zip(turn(norm_rope, parts, heads), turn(op, parts, heads), strict=True):
            assert torch.equal(own, other)


def _exact_dot(
    builder: Any, a: Any, b: Any, d: Any, *options: Any, known: Callable = InterpreterBuilder.create_dot
) -> Any:
    """Multiply bfloat16 as the hardware does: to the interpreter they are 16-bit integers."""
    a, b = (
        TensorHandle(torch.from_numpy(x.data.view("int16")).view(torch.bfloat16).float().numpy(), tl.float32)
        if x.dtype.scalar == tl.bfloat16 else x
        for x in (a, b)
    )  # fmt: skip
    return known(builder, a, b, d, *options)


@pytest.mark.parametrize(
    ("dtype", "sizes"), zip(DTYPES, [(8, 2, 32, 530), (4, 2, 128, 300), (3, 3, 16, 64)], strict=True)
)
def test_attention_to_a_cache(dtype: torch.dtype, sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """At the first and the last place, and at the ends of a part; what lies behind a row's place is never read."""
    if "TRITON_INTERPRET" in os.environ:
        monkeypatch.setattr(InterpreterBuilder, "create_dot", _exact_dot)
    heads, num, size, length = sizes
    places = torch.tensor([0, length - 1, 255, 256, length // 2]).clamp(max=length - 1)
    query, key, value = (draw(i, 5, n, size, dtype=dtype) for i, n in enumerate((heads, num, num)))
    weights = (draw(3, size, dtype=dtype), draw(4, size, dtype=dtype))
    angle = draw(5, 5, size // 2).repeat(1, 2)
    angles = (angle.cos().to(dtype), angle.sin().to(dtype))
    wider = [draw(6 + i, 6, num, length + 64, size, dtype=dtype) for i in range(2)]
    caches = [part[:5, :, :length] for part in wider]
    is_read = (torch.arange(length) < places[:, None])[:, None, :, None]

    def refer(kind: torch.dtype) -> Tensor:
        q, k, v, w0, w1, cosine, sine = (x.to(kind) for x in (query, key, value, *weights, *angles))
        keys, values = (part.to(kind) * is_read for part in caches)
        return reference.attend_cache(q, k, v, keys, values, places, (w0, w1), (cosine, sine), 1e-6)

    exact, eager = refer(torch.float64), refer(dtype)
    kept = [torch.where(is_read, part, torch.nan) for part in caches]
    for cache, known in zip(caches, kept, strict=True):
        cache.copy_(known)
    found = attend_cache(query, key, value, caches[0], caches[1], places, weights, angles, 1e-6)
    assert_near(found, eager, exact, ROUNDING[dtype])
    rows = torch.arange(5)
    assert torch.equal(caches[1][rows, :, places], value)
    expected = reference.norm_turn(key, weights[1], angles, 1e-6)
    assert_near(caches[0][rows, :, places], expected, expected.double(), ROUNDING[dtype])
    for cache, known in zip(caches, kept, strict=True):
        cache[rows, :, places] = known[rows, :, places]
        assert torch.equal(cache.nan_to_num(), known.nan_to_num())  # nothing else is written
    alone = attend_cache(
        query[1:2], key[1:2], value[1:2], caches[0][1:2], caches[1][1:2], places[1:2], weights,
        (angles[0][1:2], angles[1][1:2]), 1e-6,
    )  # fmt: skip
    assert torch.equal(alone[0], found[1])


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="its models are on the host")
@pytest.mark.parametrize("make", [flux, qwen])
def test_attention(make: Callable) -> None:
    """FLUX.1 and Qwen-Image with the kernel against diffusers, float32: some hundred roundings of the largest."""
    for eager, own in zip(*both(make()), strict=True):
        assert not torch.equal(own, eager) and (own - eager).abs().max() <= 300 * 2.0**-24 * eager.abs().max()
