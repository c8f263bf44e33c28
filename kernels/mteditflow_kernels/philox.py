"""Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) in plain torch.

A normal number is a function of (seed, step, task, trajectory, turn, denoising step, element) and of nothing else: the
same trajectory has the same noise whatever the batch, its place in it, the number of ranks, or a resume.

Words are uint32 values held in int64. Uniforms keep the upper 24 bits of a word, which float32 represents exactly: a
float32 kernel starts from the same number, and [0, 1) never rounds to 1. The normals end at sqrt(48 ln 2) = 5.77
standard deviations.
"""

import math

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
NUM_ROUNDS = 10
TURN_SHIFT = 16


def _multiply(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Multiply: high and low 32 bits, by 16-bit halves, since the whole product overflows a signed int64."""
    low = (word & 0xFFFF) * multiplier  # < 2^48
    high = (word >> 16) * multiplier + (low >> 16)  # < 2^49
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def _rounds(words: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    c0, c1, c2, c3 = words
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        high0, low0 = _multiply(c0, MULTIPLIERS[0])
        high1, low1 = _multiply(c2, MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return c0, c1, c2, c3


def philox_4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Draw four random words (..., 4) from `counter` (..., 4) and `key` (..., 2), uint32 values in int64."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    return torch.stack(torch.broadcast_tensors(*_rounds((c0, c1, c2, c3), (k0, k1))), dim=-1)


def _words(keys: Tensor, num_elements: int) -> Tensor:
    """Draw words (B, ceil(num_elements / 4), 4): counter 0 is element // 4, the rest is in `keys` (B, 5)."""
    key0, key1, counter1, counter2, counter3 = keys[:, :, None].unbind(1)  # (B, 1) each
    counter0 = torch.arange(-(-num_elements // 4), dtype=torch.int64, device=keys.device)[None]  # (1, n)
    return torch.stack(_rounds((counter0, counter1, counter2, counter3), (key0, key1)), dim=-1)


def counter_uniform(keys: Tensor, n: int) -> Tensor:
    """Draw uniform numbers in [0, 1), float32 (B, n); element i is word i % 4 of counter i // 4. `keys` (B, 5)."""
    words = _words(keys, n).flatten(1)[:, :n]
    return (words >> 8).to(torch.float32) * 2.0**-24


def counter_normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Draw standard normal numbers, float32 (B, *shape), by Box-Muller.

    `keys` (B, 5) int64 are key0, key1, counter1, counter2, counter3.
    Words (w0, w1) give elements 4i and 4i + 1 as r cos and r sin with r = sqrt(-2 log u0), angle 2 pi u1, u0 in (0, 1];
    words (w2, w3) give the next two. Logarithm and sine run in float64, because their vectorised and scalar forms
    differ in the last bit, by which an element would depend on its place in memory; rounding to float32 hides it.
    """
    num_elements = math.prod(shape)
    uniforms = (_words(keys, num_elements) >> 8).to(torch.float64)  # (B, n, 4), integers below 2^24
    radius = torch.sqrt(-2.0 * torch.log((uniforms[..., 0::2] + 1.0) * 2.0**-24))  # (B, n, 2)
    angle = uniforms[..., 1::2] * (2.0 * math.pi * 2.0**-24)
    normals = torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1)  # (B, n, 2, 2)
    return normals.to(torch.float32).flatten(1)[:, :num_elements].reshape(len(keys), *shape).contiguous()


def noise_keys(*, seed: int, step: int, task: Tensor, trajectory: Tensor, turn: int, denoising_step: int) -> Tensor:
    """(N, 5) int64: key (seed, step) and counters (denoising_step + 2^16 turn, trajectory, task), all modulo 2^32.

    `task` and `trajectory` (N,) int64; denoising_step in [0, 2^16), turn in [0, 2^16).
    """
    assert 0 <= denoising_step < 1 << TURN_SHIFT and 0 <= turn < 1 << (32 - TURN_SHIFT)
    seed_word, step_word, place = (
        torch.full_like(task, value & MASK, dtype=torch.int64)
        for value in (seed, step, denoising_step + (turn << TURN_SHIFT))
    )
    return torch.stack([seed_word, step_word, place, trajectory.to(torch.int64) & MASK, task.to(torch.int64) & MASK], 1)
