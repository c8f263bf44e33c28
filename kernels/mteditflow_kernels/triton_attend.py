"""A token's attention to what was read before it, all rows of a batch at once: what a judge's answer is decoded with.

The places of the cache are shared out, SPLIT to a program, so that a batch of 16 keeps a GPU busy; a second kernel puts
their sums together. A program reads no further than its row goes. Queries and keys come as the projections made them;
the program that has a row's last place also writes the new key and value there.
"""

# pyright: reportArgumentType=false, reportGeneralTypeIssues=false, reportCallIssue=false, reportOperatorIssue=false
# (constexpr parameters take plain values)

import torch
import triton
import triton.language as tl
from torch import Tensor

SPLIT, PLACES = 256, 64  # places of a program, and of a turn of its loop
MIN_HEADS = 16  # rows of a product, at least


@triton.jit
def _turned(x, at, inside, weight, cosine, sine, angle_at, eps, HEADS: tl.constexpr, HEAD: tl.constexpr):
    """Heads (HEADS, HEAD) normalised and turned, float32; each number meets the one half a head away."""
    dims = tl.arange(0, HEAD)
    other = (dims + HEAD // 2) % HEAD
    here = tl.load(x + at + dims[None, :], inside, other=0.0).to(tl.float32)
    there = tl.load(x + at + other[None, :], inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(here * here, 1) / HEAD + eps)[:, None]
    here = here * scale * tl.load(weight + dims).to(tl.float32)[None, :]
    there = there * scale * tl.load(weight + other).to(tl.float32)[None, :]
    there = tl.where(dims[None, :] < HEAD // 2, -there, there)
    cosines = tl.load(cosine + angle_at + dims).to(tl.float32)[None, :]
    return here * cosines + there * tl.load(sine + angle_at + dims).to(tl.float32)[None, :]


@triton.jit
def _attend_kernel(
    query, key, value, cached_keys, cached_values, places, query_weight, key_weight, cosine, sine, sums, log_sums,
    cache_row, cache_head, eps, softmax_scale, NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr,
    HEAD: tl.constexpr, SPLIT: tl.constexpr, PLACES: tl.constexpr,
):  # fmt: skip
    """Sums over a part of the places, of the GROUP queries that share a key; HEADS is GROUP filled up."""
    row, head = tl.program_id(0) // NUM_HEADS, tl.program_id(0) % NUM_HEADS
    dims, group = tl.arange(0, HEAD), tl.arange(0, HEADS)
    place = tl.load(places + row).to(tl.int32)  # of the new key
    first = tl.program_id(1) * SPLIT
    last = tl.minimum(first + SPLIT, place)
    cache_at = row.to(tl.int64) * cache_row + head.to(tl.int64) * cache_head
    inside = (group < GROUP)[:, None]
    query_at = (tl.program_id(0) * GROUP + group)[:, None] * HEAD
    q = _turned(query, query_at, inside, query_weight, cosine, sine, row * HEAD, eps, HEADS, HEAD) * softmax_scale
    q = q.to(cached_keys.dtype.element_ty)
    best = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    result = tl.zeros([HEADS, HEAD], tl.float32)
    for start in range(first, last, PLACES):
        at = start + tl.arange(0, PLACES)
        is_there = at < last
        offset = cache_at + at[:, None].to(tl.int64) * HEAD + dims[None, :]
        k = tl.load(cached_keys + offset, is_there[:, None], other=0.0)
        scores = tl.where(is_there[None, :], tl.dot(q, tl.trans(k), input_precision="ieee"), float("-inf"))
        better = tl.maximum(best, tl.max(scores, 1))
        factor, p = tl.exp(best - better), tl.exp(scores - better[:, None])
        v = tl.load(cached_values + offset, is_there[:, None], other=0.0)
        total = total * factor + tl.sum(p, 1)
        result = result * factor[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        best = better
    if (place >= first) & (place < first + SPLIT):
        one = tl.arange(0, 1)
        new_at = (tl.program_id(0) + one)[:, None] * HEAD
        k = _turned(key, new_at, new_at >= 0, key_weight, cosine, sine, row * HEAD, eps, 1, HEAD)
        k = k.to(cached_keys.dtype.element_ty)
        v = tl.load(value + new_at + dims[None, :])
        store_at = cache_at + place.to(tl.int64) * HEAD + dims[None, :] + one[:, None]
        tl.store(cached_keys + store_at, k)
        tl.store(cached_values + store_at, v)
        scores = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
        better = tl.maximum(best, scores)
        factor, p = tl.exp(best - better), tl.exp(scores - better)
        total = total * factor + p
        result = result * factor[:, None] + p[:, None] * v.to(tl.float32)
        best = better
    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    at = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)) * GROUP + group
    tl.store(sums + at[:, None].to(tl.int64) * HEAD + dims[None, :], result / total[:, None], inside)
    tl.store(log_sums + at, tl.where(is_empty, float("-inf"), best + tl.log(total)), group < GROUP)


@triton.jit
def _merge_kernel(sums, log_sums, attended, num_splits, GROUP: tl.constexpr, SPLITS: tl.constexpr, HEAD: tl.constexpr):
    """The whole of the parts, for one query; SPLITS is their number filled up."""
    pair, member = tl.program_id(0) // GROUP, tl.program_id(0) % GROUP
    split, dims = tl.arange(0, SPLITS), tl.arange(0, HEAD)
    at = (pair * num_splits + split) * GROUP + member
    logs = tl.load(log_sums + at, split < num_splits, other=float("-inf"))
    weights = tl.exp(logs - tl.max(logs, 0))
    parts = tl.load(sums + at[:, None].to(tl.int64) * HEAD + dims[None, :], (split < num_splits)[:, None], other=0.0)
    whole = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(attended + tl.program_id(0) * HEAD + dims, whole.to(attended.dtype.element_ty))


def attend_cache(
    query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, places: Tensor,
    weights: tuple[Tensor, Tensor], angles: tuple[Tensor, Tensor], eps: float,
) -> Tensor:  # fmt: skip
    """Compute `reference.attend_cache`."""
    num_rows, num_heads, size = key.shape
    group, num_splits = query.shape[1] // num_heads, -(-keys.shape[2] // SPLIT)
    sums = torch.empty(num_rows, num_heads, num_splits, group, size, dtype=torch.float32, device=query.device)
    log_sums = torch.empty(num_rows, num_heads, num_splits, group, dtype=torch.float32, device=query.device)
    out = torch.empty_like(query)
    heads = max(MIN_HEADS, triton.next_power_of_2(group))
    _attend_kernel[num_rows * num_heads, num_splits](
        query, key, value, keys, values, places, *weights, *angles, sums, log_sums, *keys.stride()[:2], eps, size**-0.5,
        NUM_HEADS=num_heads, GROUP=group, HEADS=heads, HEAD=size, SPLIT=SPLIT, PLACES=PLACES, num_warps=4,
    )  # fmt: skip
    _merge_kernel[num_rows * num_heads * group,](
        sums, log_sums, out, num_splits, GROUP=group, SPLITS=triton.next_power_of_2(num_splits), HEAD=size, num_warps=4
    )
    return out
