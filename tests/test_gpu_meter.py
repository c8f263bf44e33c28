"""Figures of a fake NVML: of which GPU, energy by counter or by power, and nothing where there is none."""

import math
import sys
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mteditflow.profile import gpu as module
from mteditflow.profile.gpu import GpuMeter, open_meter

CUDA = torch.device("cuda", 0)
NAMES = {"gpu/power_w", "gpu/sm_clock_mhz", "gpu/memory_clock_mhz", "gpu/temperature_c", "gpu/memory_used_gib"}
NAMES |= {f"gpu/throttled_by_{reason}_share" for reason in ("power", "thermal", "hardware")}


class NvmlError(Exception):
    """As pynvml.NVMLError."""


class Nvml:
    """Two GPUs that NVML counts in another order than CUDA does; handles are their UUIDs. `missing` functions fail."""

    NVMLError = NvmlError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, *missing: str, uuids: tuple[str, ...] = ("GPU-aaaa", "GPU-bbbb")) -> None:
        self.missing, self.uuids, self.handles = set(missing), uuids, []
        self.watts, self.joules, self.reasons, self.celsius = 500.0, 1e6, 0, 60

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvml") and name in self.missing:
            return self.fail
        return super().__getattribute__(name)

    def fail(self, *_: Any) -> Any:
        raise NvmlError("not supported")

    def nvmlInit(self) -> None:
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        if uuid not in self.uuids:
            raise NvmlError("not found")
        self.handles.append(uuid)
        return uuid

    def nvmlDeviceGetPowerUsage(self, _: str) -> int:
        return round(1000 * self.watts)

    def nvmlDeviceGetTotalEnergyConsumption(self, _: str) -> int:
        return round(1000 * self.joules)

    def nvmlDeviceGetClockInfo(self, _: str, kind: int) -> int:
        return {self.NVML_CLOCK_SM: 1755, self.NVML_CLOCK_MEM: 2619}[kind]

    def nvmlDeviceGetTemperature(self, _: str, kind: int) -> int:
        assert kind == self.NVML_TEMPERATURE_GPU
        return self.celsius

    def nvmlDeviceGetMemoryInfo(self, _: str) -> SimpleNamespace:
        return SimpleNamespace(used=3 * 2**29)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, _: str) -> int:
        return self.reasons


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The time of meters, which sample only when they are told to."""
    monkeypatch.setattr(module, "PERIOD", 3600)
    return SimpleNamespace(at=0.0)


def meter_of(nvml: Nvml, now: SimpleNamespace) -> GpuMeter:
    return GpuMeter(nvml, "GPU-aaaa", lambda: now.at)


def as_visible(monkeypatch: pytest.MonkeyPatch, *uuids: str) -> None:
    """What torch sees of the GPUs that CUDA_VISIBLE_DEVICES, by index or by UUID, leaves it."""
    properties = [SimpleNamespace(uuid=uuid) for uuid in uuids]
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties[device.index])


@pytest.mark.parametrize(
    ("visible", "index", "handle"),
    [
        (["aaaa", "bbbb"], 0, "GPU-aaaa"),
        (["bbbb"], 0, "GPU-bbbb"),
        (["bbbb", "aaaa"], 1, "GPU-aaaa"),
        (["cc"], 0, "MIG-cc"),
    ],
)
def test_the_gpu_is_the_one_that_is_used(
    visible: list[str], index: int, handle: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_visible(monkeypatch, *visible)
    nvml = Nvml(uuids=("GPU-aaaa", "GPU-bbbb", "MIG-cc"))
    assert open_meter(torch.device("cuda", index), nvml) is not None and nvml.handles == [handle]


def test_nothing_without_a_gpu_or_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    as_visible(monkeypatch, "aaaa")
    assert open_meter(torch.device("cpu"), Nvml()) is None
    assert open_meter(CUDA, Nvml("nvmlInit")) is None  # no driver
    assert open_meter(CUDA, Nvml(uuids=())) is None
    monkeypatch.setitem(sys.modules, "pynvml", None)  # not installed
    assert open_meter(CUDA) is None
    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    assert open_meter(CUDA) is not None


def test_figures_of_an_iteration(now: SimpleNamespace) -> None:
    """Means of what is sampled in between, the highest temperature, the counter's difference."""
    nvml = Nvml()
    with meter_of(nvml, now) as meter:
        for watts, reasons, celsius in ((600.0, 0x04, 70), (700.0, 0x44, 75)):
            nvml.watts, nvml.reasons, nvml.celsius = watts, reasons, celsius
            meter.sample()
        nvml.watts, nvml.reasons, nvml.celsius, nvml.joules = 100.0, 0x01, 50, 1e6 + 36000
        first, second = meter.read(), meter.read()
    assert first == {
        "gpu/power_w": 650, "gpu/sm_clock_mhz": 1755, "gpu/memory_clock_mhz": 2619, "gpu/temperature_c": 75,
        "gpu/memory_used_gib": 1.5, "gpu/throttled_by_power_share": 1, "gpu/throttled_by_thermal_share": 0.5,
        "gpu/throttled_by_hardware_share": 0, "gpu/energy_kwh": pytest.approx(0.01, rel=1e-12),
    }  # fmt: skip
    assert second.keys() == first.keys() and second["gpu/energy_kwh"] == 0 and second["gpu/power_w"] == 100


def test_energy_from_power_where_there_is_no_counter(now: SimpleNamespace) -> None:
    """500 W rising to 700 over 10 s, 700 for 20 s more: 6000 + 14000 J; the next iteration begins where this ended."""
    nvml = Nvml("nvmlDeviceGetTotalEnergyConsumption")
    with meter_of(nvml, now) as meter:
        now.at, nvml.watts = 10.0, 700.0
        meter.sample()
        now.at = 30.0
        assert meter.read()["gpu/energy_kwh"] == pytest.approx(20000 / 3.6e6, rel=1e-12)
        now.at = 31.0
        assert meter.read()["gpu/energy_kwh"] == pytest.approx(700 / 3.6e6, rel=1e-12)


def test_what_a_device_does_not_tell_has_no_key(now: SimpleNamespace) -> None:
    nvml = Nvml("nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage", "nvmlDeviceGetClockInfo")
    with meter_of(nvml, now) as meter:
        assert meter.read().keys() == NAMES - {"gpu/power_w", "gpu/sm_clock_mhz", "gpu/memory_clock_mhz"}


def test_a_device_that_falls_silent_stops_nothing(now: SimpleNamespace) -> None:
    nvml = Nvml()
    with meter_of(nvml, now) as meter:
        nvml.watts = 300.0
        meter.sample()
        nvml.missing = {"nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage"}
        meter.sample()
        figures, later = meter.read(), meter.read()
    assert figures["gpu/power_w"] == 300 and math.isnan(figures["gpu/energy_kwh"])
    assert math.isnan(later["gpu/power_w"]) and later.keys() == NAMES | {"gpu/energy_kwh"}


def test_a_thread_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PERIOD", 1e-3)
    nvml, is_sampled = Nvml(), threading.Event()

    def reasons(_: str) -> int:
        if threading.current_thread() is not threading.main_thread():
            is_sampled.set()
        return 0

    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = reasons
    with GpuMeter(nvml, "GPU-aaaa") as meter:
        assert is_sampled.wait(60)
    assert not meter._thread.is_alive()
