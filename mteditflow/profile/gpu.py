"""What a GPU draws, and what holds it back, by NVML (the package nvidia-ml-py): sampled by a thread beside the run.

A single look at the end of an iteration would find the GPU at rest. Without a GPU, the package or its driver nothing is
reported; what a device does not tell has no key. Every figure is of the whole GPU, whoever else uses it.
"""

import threading
import time
from collections.abc import Callable
from importlib import import_module
from itertools import pairwise
from statistics import fmean
from typing import Any, Self

import torch

PERIOD = 1.0  # s between samples
GIB = 2**30
REASONS = {"power": 0x04 | 0x80, "thermal": 0x20 | 0x40, "hardware": 0x08}
"""NVML's bits for clocks held down: by the power cap or brake; by temperature, in software or hardware; a slowdown."""
KWH = 3.6e6  # joules


def open_meter(device: torch.device, nvml: Any = None) -> "GpuMeter | None":
    """Start to sample a GPU; None where there is none, or no NVML. `nvml` stands in for the module pynvml.

    The device is found by its UUID, so that CUDA_VISIBLE_DEVICES, and CUDA's order of devices, are of no matter.
    """
    if device.type != "cuda":
        return None
    try:
        nvml = nvml or import_module("pynvml")
    except ImportError:
        return None
    uuid = torch.cuda.get_device_properties(device).uuid
    try:
        nvml.nvmlInit()
        handle = _find(nvml, str(uuid))
    except nvml.NVMLError:
        return None
    return GpuMeter(nvml, handle)


def _find(nvml: Any, uuid: str) -> Any:
    """Handle of a GPU, or of a slice of one (MIG), whose UUID torch gives without its prefix."""
    try:
        return nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except nvml.NVMLError:
        return nvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}")


class GpuMeter:
    """Samples of a GPU since the last `read`; energy by its counter, or where it has none by the sampled power."""

    def __init__(self, nvml: Any, handle: Any, now: Callable[[], float] = time.monotonic) -> None:
        def throttling(mask: int) -> Callable[[], float]:
            return lambda: float(bool(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle) & mask))

        self._error, self._now = nvml.NVMLError, now
        # joules since the driver was loaded
        self._read_energy = lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000
        sources: dict[str, Callable[[], float]] = {
            "gpu/power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000,
            "gpu/sm_clock_mhz": lambda: float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            "gpu/memory_clock_mhz": lambda: float(nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM)),
            "gpu/temperature_c": lambda: float(nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            "gpu/memory_used_gib": lambda: nvml.nvmlDeviceGetMemoryInfo(handle).used / GIB,
            **{f"gpu/throttled_by_{reason}_share": throttling(mask) for reason, mask in REASONS.items()},
        }
        self._sources = {name: source for name, source in sources.items() if self._ask(source) is not None}
        self._has_counter = self._ask(self._read_energy) is not None
        self._samples: list[tuple[float, dict[str, float]]] = []  # s, figures
        self._lock, self._stop = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="GPU meter")

    def __enter__(self) -> Self:
        self._joules = self._ask(self._read_energy)
        self.sample()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def sample(self) -> None:
        """Look at the GPU once; what it does not say now is left out."""
        figures = {name: value for name, source in self._sources.items() if (value := self._ask(source)) is not None}
        with self._lock:
            self._samples.append((self._now(), figures))

    def read(self) -> dict[str, float]:
        """Means over the samples since the last `read`, of temperature and memory the highest; and the energy, in kWh.

        The same names every time, NaN where a GPU that told once does not tell now.
        """
        self.sample()
        with self._lock:
            samples, self._samples = self._samples, self._samples[-1:]
        values: dict[str, float] = {}
        between = samples[1:-1] or samples  # at both ends the GPU rests, while the host reads
        for name in self._sources:
            known = [figures[name] for _, figures in between if name in figures] or [float("nan")]
            values[name] = max(known) if name in ("gpu/temperature_c", "gpu/memory_used_gib") else fmean(known)
        joules = self._joules_since(samples)
        return values if joules is None else values | {"gpu/energy_kwh": joules / KWH}

    def _joules_since(self, samples: list[tuple[float, dict[str, float]]]) -> float | None:
        """Energy since the last read; None for a GPU that has neither a counter nor tells its power."""
        if self._has_counter:
            before, self._joules = self._joules, self._ask(self._read_energy)
            return float("nan") if before is None or self._joules is None else self._joules - before
        if "gpu/power_w" not in self._sources:
            return None
        known = [(at, figures["gpu/power_w"]) for at, figures in samples if "gpu/power_w" in figures]
        return sum((b - a) * (p + q) / 2 for (a, p), (b, q) in pairwise(known))  # trapezoids

    def _ask(self, source: Callable[[], float]) -> float | None:
        """A figure; None where the device, or its driver, does not give it."""
        try:
            return source()
        except self._error:
            return None

    def _run(self) -> None:
        while not self._stop.wait(PERIOD):
            self.sample()
