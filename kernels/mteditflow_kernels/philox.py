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


def _rounds(words: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Ten rounds on words and keys below 2^32.

    A product of two such numbers wraps around in int64 to the bits of the unsigned one: its low word is its lower half,
    its high word the upper half, to which a shift adds the sign. Words that only enter an exclusive or may keep what
    stands above their 32 bits, and so may the keys; what is multiplied next is masked.
    """
    c0, c1, c2, c3 = words
    k0, k1 = key
    for _ in range(NUM_ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = (product1 >> 32) ^ (c1 ^ k0), (product0 >> 32) ^ (c3 ^ k1)
        c0 &= MASK  # in place: they are new
        c2 &= MASK
        c1, c3 = product1, product0
        k0, k1 = k0 + WEYL[0], k1 + WEYL[1]
    return c0, c1 & MASK, c2, c3 & MASK


def philox_4x32(counter: Tensor, key: Tensor) -> Tensor:
    """Draw four random words (..., 4) from `counter` (..., 4) and `key` (..., 2), uint32 values in int64."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    return torch.stack(torch.broadcast_tensors(*_rounds((c0, c1, c2, c3), (k0, k1))), dim=-1)


def _words(keys: Tensor, num_elements: int) -> tuple[Tensor, ...]:
    """Four times (B, ceil(num_elements / 4)) words: counter 0 is element // 4, the rest is in `keys` (B, 5)."""
    key0, key1, counter1, counter2, counter3 = keys[:, :, None].unbind(1)  # (B, 1) each
    counter0 = torch.arange(-(-num_elements // 4), dtype=torch.int64, device=keys.device)[None]  # (1, n)
    return _rounds((counter0, counter1, counter2, counter3), (key0, key1))


def counter_uniform(keys: Tensor, n: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 (B, n); element i is word i % 4 of counter i // 4. `keys` (B, 5) int64."""
    uniforms = [(word >> 8).to(torch.float32) * 2.0**-24 for word in _words(keys, n)]
    return torch.stack(uniforms, dim=-1).flatten(1)[:, :n]


def counter_normal(keys: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers, float32 (B, *shape), by Box-Muller.

    `keys` (B, 5) int64 are key0, key1, counter1, counter2, counter3.
    Words (w0, w1) give elements 4i and 4i + 1 as r cos and r sin with r = sqrt(-2 log u0), angle 2 pi u1, u0 in (0, 1];
    words (w2, w3) give the next two. Logarithm and sine run in float64, because their vectorised and scalar forms
    differ in the last bit, by which an element would depend on its place in memory; rounding to float32 hides it.
    """
    num_elements, parts = math.prod(shape), []
    words = [(word >> 8).to(torch.float64) for word in _words(keys, num_elements)]  # integers below 2^24
    for first, second in (words[:2], words[2:]):
        radius = torch.sqrt(-2.0 * torch.log((first + 1.0) * 2.0**-24))
        angle = second * (2.0 * math.pi * 2.0**-24)
        parts += [(radius * torch.cos(angle)).to(torch.float32), (radius * torch.sin(angle)).to(torch.float32)]
    return torch.stack(parts, dim=-1).flatten(1)[:, :num_elements].reshape(len(keys), *shape).contiguous()


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
