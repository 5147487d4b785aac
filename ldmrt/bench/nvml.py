"""What the driver says of a GPU while it works, through NVML, if nvidia-ml-py is installed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict

_MISSING = "clocks, power and temperature of the GPU: nvidia-ml-py is not installed: pip install 'ldmrt[bench]'"
# Bits of NVML's clock event reasons that say the GPU was held back.
_HELD_BACK = {
    0x04: "power cap",
    0x08: "hardware slowdown",
    0x20: "heat",
    0x40: "heat (hardware)",
    0x80: "power brake",
}


class GpuReading(BaseModel):
    """What was read after each run of a case.

    Attributes:
        driver: its version.
        sm_clock_mhz: the lowest and the highest.
        memory_clock_mhz: the lowest and the highest.
        power_watts: the most.
        temperature_celsius: the most.
        used_bytes: the most memory in use, of all processes.
        processes: the most that computed on it, this one included.
        held_back: why it did not run at full clocks.
        joules_per_image: idle moments between runs included; None where the GPU does not count them, or of a single run.
    """

    model_config = ConfigDict(frozen=True)

    driver: str
    sm_clock_mhz: tuple[int, int]
    memory_clock_mhz: tuple[int, int]
    power_watts: float
    temperature_celsius: int
    used_bytes: int
    processes: int
    held_back: tuple[str, ...]
    joules_per_image: float | None


class Watch:
    """Reads the figures of a GPU whenever it is told to.

    Args:
        nvml: the module `pynvml`, initialised.
        handle: its handle of the GPU.
    """

    def __init__(self, nvml: Any, handle: Any) -> None:
        self._nvml, self._handle = nvml, handle
        self._driver = nvml.nvmlSystemGetDriverVersion()
        self._read: list[dict[str, Any]] = []

    def sample(self) -> None:
        """Read once; microseconds to a millisecond, so not within what is timed."""
        nvml, handle = self._nvml, self._handle
        self._read.append(
            {
                "sm": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
                "memory": nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
                "watts": nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
                "celsius": nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
                "used": nvml.nvmlDeviceGetMemoryInfo(handle).used,
                "processes": len(nvml.nvmlDeviceGetComputeRunningProcesses(handle)),
                "reasons": nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle),
                "joules": self._joules(),
            }
        )

    def _joules(self) -> float | None:
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError:  # older than Volta
            return None

    def reading(self, images: int) -> GpuReading:
        """All samples since the last call, in one; there must be one.

        Args:
            images: drawn from one sample to the next.
        """
        read, self._read = self._read, []

        def all_of(name: str) -> list[Any]:
            return [one[name] for one in read]

        reasons = 0
        for one in all_of("reasons"):
            reasons |= one
        first, last = read[0]["joules"], read[-1]["joules"]
        return GpuReading(
            driver=self._driver,
            sm_clock_mhz=(min(all_of("sm")), max(all_of("sm"))),
            memory_clock_mhz=(min(all_of("memory")), max(all_of("memory"))),
            power_watts=max(all_of("watts")),
            temperature_celsius=max(all_of("celsius")),
            used_bytes=max(all_of("used")),
            processes=max(all_of("processes")),
            held_back=tuple(name for bit, name in _HELD_BACK.items() if reasons & bit),
            joules_per_image=None
            if None in (first, last) or len(read) < 2
            else (last - first) / (len(read) - 1) / images,
        )


@contextmanager
def watching(device: torch.device) -> Iterator[tuple[Watch | None, str | None]]:
    """A watch for the length of the block; or None, and why. On a CPU both are None."""
    if device.type != "cuda":
        yield None, None
        return
    if importlib.util.find_spec("pynvml") is None:
        yield None, _MISSING
        return
    nvml: Any = importlib.import_module("pynvml")
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        yield None, _refused(error)
        return
    try:
        try:
            handle = nvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            watch = Watch(nvml, handle)
            watch.sample()
            watch.reading(1)
        except nvml.NVMLError as error:
            yield None, _refused(error)
            return
        yield watch, None
    finally:
        nvml.nvmlShutdown()


def _refused(error: Exception) -> str:
    return f"clocks, power and temperature of the GPU: NVML says {error}"
