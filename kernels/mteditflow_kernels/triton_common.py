"""What the Triton kernels share: geometry, sums in a fixed order, noise.

A program takes BLOCK elements of one row; partial sums go to a workspace, and the program that arrives last at a row
adds them up in the order of the blocks, whatever the order of arrival: one launch, no float added atomically, the same
bits for a row in every batch. Coefficients come from the float32 table of the schedule, so no kernel computes a square
root, division or logarithm of it, and `enable_fp_fusion=False` keeps every product and sum rounded as eager torch
rounds it.

Noise is Philox-4x32-10 and Box-Muller in float32 by polynomials; its difference to `philox.counter_normal`, which
rounds float64, is at most NORMAL_ERROR.
"""

# pyright: reportGeneralTypeIssues=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from mteditflow_kernels import reference

BLOCK = 1024  # elements of a program: 8 of bfloat16, 16 bytes, for each of 128 threads
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
# |normal| <= 5.77, a product of two float32 numbers, radius and sine, each within 4 roundings of 2^-24.
NORMAL_ERROR = 5.77 * 8 * 2**-24

C_X, C_V, STD = tl.constexpr(reference.C_X), tl.constexpr(reference.C_V), tl.constexpr(reference.STD)
SCALE, CONST = tl.constexpr(reference.LOG_PROB_SCALE), tl.constexpr(reference.LOG_PROB_CONST)
COLUMNS = tl.constexpr(reference.NUM_COLUMNS)


@triton.jit
def _normal_pair(word0, word1):
    """Make two normals of two words, by polynomials: ln x on mantissas in [sqrt 1/2, sqrt 2), sine and cosine on a
    quarter turn about 0. The coefficients are Chebyshev fits, off by less than 2e-8.
    """
    count = ((word0 >> 8) + 1).to(tl.int32).to(tl.float32)  # 1 .. 2^24, exact
    bits = count.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = f * -0.08101558685302734 + 0.12712307274341583
    p = p * f - 0.12972238659858704
    p = p * f + 0.14202174544334412
    p = p * f - 0.16642247140407562
    p = p * f + 0.20001468062400818
    p = p * f - 0.25000298023223877
    p = p * f + 0.333333283662796
    square = f * f
    octaves = (exponent - 24).to(tl.float32)
    log = octaves * 0.693359375 + (f + (p * f * square - 0.5 * square - octaves * 2.12194440e-4))  # ln 2 in two parts
    radius = tl.sqrt_rn(-2.0 * log)

    turn = (word1 >> 8).to(tl.int32) + (1 << 21)  # 24 bits of a turn, half a quarter ahead
    quarter = (turn >> 22) & 3
    t = ((turn & 0x3FFFFF) - (1 << 21)).to(tl.float32) * 2.384185791015625e-07  # [-1/2, 1/2) of a quarter, exact
    z = t * t
    sine = ((-0.004602163098752499 * z + 0.07968021929264069) * z - 0.6459634900093079) * z + 1.5707963705062866
    sine = sine * t
    cosine = ((0.00090362987248227 * z - 0.02086007036268711) * z + 0.25366920232772827) * z - 1.2337005138397217
    cosine = cosine * z + 1.0
    is_odd = (quarter & 1) == 1
    x = tl.where(is_odd, sine, cosine)
    y = tl.where(is_odd, cosine, sine)
    x = tl.where((quarter == 1) | (quarter == 2), -x, x)
    y = tl.where(quarter >= 2, -y, y)
    return radius * x, radius * y


@triton.jit
def normals(keys, block, BLOCK: tl.constexpr):
    """Make the normals (BLOCK,) of a row's elements from block * BLOCK on; `keys` points to the row's five."""
    key0 = tl.load(keys).to(tl.uint32)
    key1 = tl.load(keys + 1).to(tl.uint32)
    counter = (block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = counter * 0
    counter1 = zero + tl.load(keys + 2).to(tl.uint32)
    counter2 = zero + tl.load(keys + 3).to(tl.uint32)
    counter3 = zero + tl.load(keys + 4).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox_impl(counter, counter1, counter2, counter3, key0, key1)
    n0, n1 = _normal_pair(w0, w1)
    n2, n3 = _normal_pair(w2, w3)
    return tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))


@triton.jit
def elements(num_elements, BLOCK: tl.constexpr):
    """Find where this program's BLOCK elements of its row lie, and which of them the row has."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    return tl.program_id(1).to(tl.int64) * num_elements + place, place < num_elements


@triton.jit
def load(tensor, offset, inside):
    """Load as float32, 0 outside the row."""
    return tl.load(tensor + offset, inside, other=0.0).to(tl.float32)


@triton.jit
def coefficients_of(table, steps, step, HAS_STEPS: tl.constexpr):
    """Point to the row of the table for this program's row: that of its step, or of the one step for all."""
    if HAS_STEPS:
        step = tl.load(steps + tl.program_id(1)).to(tl.int32)
    return table + step * COLUMNS


@triton.jit
def mean_of(velocity, latents, coefficients, offset, inside):
    """Compute the step's mean; returns it and the velocity."""
    v = load(velocity, offset, inside)
    return tl.load(coefficients + C_X) * load(latents, offset, inside) + tl.load(coefficients + C_V) * v, v


@triton.jit
def is_last(ticket, total):
    """Say whether this program is the last of `total` to arrive; what the others stored before is visible to it."""
    number = tl.atomic_add(ticket, 1, sem="acq_rel")
    is_last = number == total - 1
    if is_last:
        tl.store(ticket, 0)  # for the next launch
    return is_last


@triton.jit
def ordered_sum(partial, num_blocks, BLOCKS: tl.constexpr):
    """Sum the partial sums of a row's blocks, in the blocks' order."""
    place = tl.arange(0, BLOCKS)
    return tl.sum(tl.load(partial + place, mask=place < num_blocks, other=0.0, cache_modifier=".cg"))


_TICKETS: dict[tuple[torch.device, int], list[Tensor]] = {}  # all that there were: a CUDA graph may hold any of them


def tickets(num_rows: int, device: torch.device) -> Tensor:
    """Lend zeros, (num_rows + 1,) or more, which every kernel leaves zero. There is one set per stream, since kernels
    of two streams may run at once.
    """
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    sets = _TICKETS.setdefault((device, stream), [])
    if not sets or len(sets[-1]) <= num_rows:
        sets.append(torch.zeros(max(256, 2 * num_rows), dtype=torch.int32, device=device))
    return sets[-1]


def geometry(rows: Tensor) -> tuple[int, int, int]:
    """Measure (B, ...): B, D, and the number of blocks of a row."""
    num_rows, num_elements = len(rows), rows[0].numel()
    return num_rows, num_elements, -(-num_elements // BLOCK)


def step_arguments(table: Tensor, step: Tensor | int) -> tuple[Tensor, Tensor, int, bool]:
    """Make a kernel's arguments table, steps, step and HAS_STEPS; what is not used holds anything."""
    is_per_row = isinstance(step, Tensor)
    return table, step if is_per_row else table, 0 if is_per_row else step, is_per_row
