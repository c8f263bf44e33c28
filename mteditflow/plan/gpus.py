"""GPUs by name, to plan for one that is not at hand: `--dry_run --gpu h100 --price 2.5`. Imports no torch.

Peaks are NVIDIA's, dense (half of the figures with sparsity), of tensor cores that accumulate in float32; `fp32` is
without tensor cores, as torch multiplies float32. Memory is the total capacity that torch's out-of-memory errors name,
rounded down to whole GiB: what is cut off is about the CUDA context.

How much of the bf16 peak a whole forward pass of a large editor reaches has been reported of few GPUs (FLUX.1-dev at
1024 px, 74.4 TFLOP a pass, one image at a time):

    H100   0.31 eager, 0.47 compiled   28 steps in 6.7 and 4.5 s (PyTorch's devlog on torch.compile and diffusers)
    L40S   0.42 eager, 0.55 compiled   a pass in 0.493 and 0.374 s (the benchmarks of diffusers)
    L20    0.70 eager, 0.86 compiled   28 steps in 24.94 and 20.24 s, of a peak of 119.5 TFLOP/s (cache-dit)

The slower the GPU, the larger the share. On an H200 a matrix product was measured at 769 to 798 TFLOP/s, of which a
pass of FLUX.1-Kontext can keep 0.68 of the peak at most (derived: 576 passes of 37.6 TFLOP in 32 s).
"""

import difflib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mteditflow.config.ranges import require

Span = tuple[float, float]
"""What is to be expected, at the slowest and at the fastest."""


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What a whole forward pass reaches, as a share of the GPU's bf16 peak, and whence that is known."""

    eager: Span
    compiled: Span
    source: str


HOPPER = Shares(
    eager=(0.31, 0.46), compiled=(0.47, 0.68),
    source="from FLUX.1-dev on an H100 (reported: 6.7 s eager, 4.5 s compiled, one image at a time) to what a matrix "
    "product reaches on an H200 (measured: 769 to 798 TFLOP/s; a whole forward pass 0.68 of the peak, eager 1 / 1.5 of "
    "that, derived)",
)  # fmt: skip
ADA_SERVER = Shares(
    eager=(0.36, 0.50), compiled=(0.47, 0.66),
    source="from FLUX.1-dev's forward pass on an L40S (reported: 0.493 s eager, 0.374 s compiled), a sixth less to a "
    "fifth more",
)  # fmt: skip
UNREPORTED = Shares(
    eager=(0.31, 0.70), compiled=(0.47, 0.86),
    source="no report of it is known: from what an H100 to what an L20 was reported to reach",
)  # fmt: skip
FASTER = Shares(
    eager=(0.20, 0.46), compiled=(0.30, 0.68),
    source="no report of it is known: from two thirds of the least to the most of an H100 (ours)",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A model of GPU: GiB that torch can have, peaks in TFLOP/s, TB/s of its memory, watts of the board at most, GB/s
    in one direction to the others of its node: NVLink, else PCIe."""

    name: str
    device: str  # what `torch.cuda.get_device_name()` contains
    gib: float
    bf16: float
    fp8: float  # 0: has none
    fp32: float
    bandwidth: float
    watts: int
    link: float
    source: str
    shares: Shares = UNREPORTED


GPUS = {gpu.name: gpu for gpu in (
    Gpu(name="h100", device="H100 80GB HBM3", gib=79, bf16=989, fp8=1979, fp32=67, bandwidth=3.35, watts=700,
        link=450, source="NVIDIA's datasheet of the H100 SXM", shares=HOPPER),
    Gpu(name="h100_pcie", device="H100 PCIe", gib=79, bf16=756, fp8=1513, fp32=51, bandwidth=2.0, watts=350,
        link=63, source="NVIDIA's datasheet of the H100 PCIe"),
    Gpu(name="h200", device="H200", gib=139, bf16=989, fp8=1979, fp32=67, bandwidth=4.8, watts=700,
        link=450, source="NVIDIA's datasheet of the H200 SXM", shares=HOPPER),
    Gpu(name="b200", device="B200", gib=178, bf16=2250, fp8=4500, fp32=75, bandwidth=8.0, watts=1000,
        link=900, source="NVIDIA's specifications of the HGX B200", shares=FASTER),
    Gpu(name="a100_80", device="A100-SXM4-80GB", gib=79, bf16=312, fp8=0, fp32=19.5, bandwidth=2.04, watts=400,
        link=300, source="NVIDIA's datasheet of the A100 SXM"),
    Gpu(name="a100_40", device="A100-SXM4-40GB", gib=39, bf16=312, fp8=0, fp32=19.5, bandwidth=1.56, watts=400,
        link=300, source="NVIDIA's datasheet of the A100 SXM"),
    Gpu(name="l40s", device="L40S", gib=44, bf16=362, fp8=733, fp32=91.6, bandwidth=0.86, watts=350,
        link=31.5, source="NVIDIA's datasheet of the L40S", shares=ADA_SERVER),
    Gpu(name="l4", device="L4", gib=22, bf16=121, fp8=242, fp32=30.3, bandwidth=0.3, watts=72,
        link=31.5, source="NVIDIA's datasheet of the L4"),
    Gpu(name="rtx3090", device="RTX 3090", gib=23, bf16=71, fp8=0, fp32=35.6, bandwidth=0.94, watts=350,
        link=31.5, source="NVIDIA's whitepaper of the GA102"),
    Gpu(name="rtx4090", device="RTX 4090", gib=23, bf16=165, fp8=330, fp32=82.6, bandwidth=1.01, watts=450,
        link=31.5, source="NVIDIA's whitepaper of the Ada architecture"),
    Gpu(name="rtx5090", device="RTX 5090", gib=31, bf16=209, fp8=419, fp32=104.8, bandwidth=1.79, watts=575,
        link=63, source="NVIDIA's whitepaper of the RTX Blackwell architecture"),
    Gpu(name="rtx6000ada", device="RTX 6000 Ada", gib=47, bf16=364, fp8=728, fp32=91.1, bandwidth=0.96, watts=300,
        link=31.5, source="NVIDIA's datasheet of the RTX 6000 Ada"),
)}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What `mteditflow profile` measured on a GPU: TFLOP/s of forward passes, and of forward and backward ones."""

    path: Path
    model: dict[str, Any]  # the fields of `model` that it depends on
    forward: float
    training: float


@dataclass(frozen=True, kw_only=True)
class Target:
    """The GPU that a run is planned for, what an hour of it costs, and what was measured on it."""

    gpu: Gpu
    price: float | None = None
    measured: Measured | None = None


def read_target(gpu: str | None, price: float | None, calibration: Path | None) -> Target | None:
    """Read --gpu, --price and --calibration; None where no GPU is named. ValueError: one line of what is wrong."""
    if gpu is None:
        require(price is None, "--price", price, "is of an hour of a GPU: name it with --gpu")
        require(calibration is None, "--calibration", str(calibration), "is of a GPU: name it with --gpu")
        return None
    is_price = price is None or 0 <= price < math.inf
    require(is_price, "--price", price, "must be what an hour of one GPU costs, 0 or more")
    found = find_gpu(gpu)
    return Target(gpu=found, price=price, measured=read_measured(calibration, found) if calibration else None)


def find_gpu(name: str) -> Gpu:
    """Find a GPU by its name, whatever its case and signs. ValueError: not known; the names, the nearest first."""
    key = _plain(name)
    for gpu in GPUS.values():
        if key == _plain(gpu.name):
            return gpu
    near = sorted(GPUS, key=lambda known: -difflib.SequenceMatcher(None, key, _plain(known)).ratio())
    raise ValueError(f"--gpu is {name!r}: known are {', '.join(near)}")


def _plain(name: str) -> str:
    letters = "".join(sign for sign in name.lower() if sign.isalnum())
    return letters.removeprefix("nvidia").removeprefix("geforce")


def gpu_of(device: str) -> Gpu | None:
    """Find the GPU that calls itself `device`; None where it is not in the table."""
    found = [gpu for gpu in GPUS.values() if gpu.device in device]
    return max(found, key=lambda gpu: len(gpu.device), default=None)  # 'L4' is in 'L40S'


def read_measured(path: Path, gpu: Gpu) -> Measured:
    """Read the profile.json of a GPU. ValueError: no such file, or of another GPU."""
    try:
        figures: Any = json.loads(path.read_text())
        rates, device = figures["tflop_per_second"], str(figures["device"])
        measured = Measured(
            path=path,
            model=dict(figures["model"]),
            forward=float(rates["denoise"]),
            training=float(rates["forward, backward"]),
        )
    except OSError as error:
        raise ValueError(f"--calibration {path} cannot be read ({error.strerror}): give a profile.json") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise ValueError(
            f"--calibration {path} is no profile: give the profile.json that 'mteditflow profile' wrote on that GPU"
        ) from None
    if gpu_of(device) != gpu:
        raise ValueError(f"--calibration {path} was measured on {device!r}: give one of {gpu.name}, or leave it out")
    return measured
