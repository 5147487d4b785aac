"""What NVML says, over a fake of it, and without it."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from ldmrt.bench.nvml import watching

CUDA = torch.device("cuda", 0)


class NVMLError(Exception):
    """As the library has it."""


@pytest.fixture
def nvml(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A library that knows one GPU, whose figures are attributes, and counts who is inside."""
    fake: Any = ModuleType("pynvml")
    fake.__spec__ = ModuleSpec("pynvml", None)
    fake.NVMLError, fake.open = NVMLError, 0
    fake.NVML_CLOCK_SM, fake.NVML_CLOCK_MEM, fake.NVML_TEMPERATURE_GPU = 1, 2, 0
    fake.clock, fake.power, fake.heat, fake.reasons, fake.energy, fake.running = 1980, 512_300, 61, 0, 0, [1]

    def handle(uuid: str) -> str:
        if uuid != "GPU-42":
            raise NVMLError("Not Found")
        return uuid

    def count(by: int) -> None:
        fake.open += by

    def energy(handle: str) -> int:
        if fake.energy is None:
            raise NVMLError("Not Supported")
        return int(fake.energy)

    fake.nvmlInit, fake.nvmlShutdown = lambda: count(1), lambda: count(-1)
    fake.nvmlDeviceGetHandleByUUID = handle
    fake.nvmlSystemGetDriverVersion = lambda: "580.1"
    fake.nvmlDeviceGetClockInfo = lambda handle, kind: {1: fake.clock, 2: 2619}[kind]
    fake.nvmlDeviceGetPowerUsage = lambda handle: fake.power
    fake.nvmlDeviceGetTemperature = lambda handle, sensor: fake.heat
    fake.nvmlDeviceGetMemoryInfo = lambda handle: SimpleNamespace(used=7)
    fake.nvmlDeviceGetComputeRunningProcesses = lambda handle: fake.running
    fake.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: fake.reasons
    fake.nvmlDeviceGetTotalEnergyConsumption = energy
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    return fake


def see(monkeypatch: pytest.MonkeyPatch, uuid: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=uuid))


def test_a_reading_is_of_all_samples(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, "42")
    with watching(CUDA) as (watch, missing):
        assert missing is None
        assert watch is not None
        watch.sample()
        nvml.clock, nvml.power, nvml.heat, nvml.reasons, nvml.energy, nvml.running = (
            1755,
            600_000,
            70,
            0x24,
            90_000,
            [1, 2],
        )
        watch.sample()
        nvml.clock, nvml.power, nvml.reasons, nvml.energy = 1900, 100_000, 0x1, 120_000
        watch.sample()
        found = watch.reading(images=4)
        assert nvml.open == 1
        # A reading begins anew.
        watch.sample()
        again = watch.reading(images=4)
    assert nvml.open == 0
    assert found.sm_clock_mhz == (1755, 1980)
    assert found.memory_clock_mhz == (2619, 2619)
    assert (found.power_watts, found.temperature_celsius, found.processes) == (600.0, 70, 2)
    assert found.held_back == ("power cap", "heat")  # being idle, the lowest bit, is no fault
    assert found.joules_per_image == 120 / 2 / 4  # two times four images between three samples
    assert again.sm_clock_mhz == (1900, 1900)
    assert again.joules_per_image is None


def test_a_gpu_that_counts_no_energy(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, "42")
    nvml.energy = None
    with watching(CUDA) as (watch, _):
        assert watch is not None
        watch.sample()
        watch.sample()
        assert watch.reading(images=1).joules_per_image is None


def test_a_gpu_that_nvml_does_not_know_is_said(nvml: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    see(monkeypatch, "43")
    with watching(CUDA) as (watch, missing):
        assert watch is None
        assert "Not Found" in str(missing)
    assert nvml.open == 0


def test_without_the_package_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with watching(CUDA) as (watch, missing):
        assert watch is None
        assert "ldmrt[bench]" in str(missing)


def test_a_cpu_has_none() -> None:
    with watching(torch.device("cpu")) as found:
        assert found == (None, None)
