"""What the stages of one process share: the device, its measured rates, the models, the time that is left."""

from __future__ import annotations

import subprocess
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from gpu_suite.models import Model
from gpu_suite.results import Results
from ldmrt.bench.measure import copy_rate, gemm_rate
from ldmrt.capture import Recorder


@dataclass(frozen=True)
class Rates:
    """What the device was seen to do in this run.

    Attributes:
        gemm: FLOP/s of a large matrix product in the dtype of the models.
        copy: bytes per second, read and written, of a large copy.
    """

    gemm: float
    copy: float


@dataclass
class Session:
    """One process of the suite.

    Attributes:
        device: where everything runs.
        tiny: the dry run: small architectures, few repetitions.
        results: where figures go.
        deadline: `time.time()` at which the run is to be over.
        dtype: the precision of the models.
        inductor_cache: folder of torch.compile's cache, or None.
        kernels: folder of kernels compiled elsewhere, or None.
        brief: of a network only the first batch size, captured step by step.
    """

    device: torch.device
    tiny: bool
    results: Results
    deadline: float
    dtype: torch.dtype
    inductor_cache: Path | None = None
    kernels: Path | None = None
    brief: bool = False
    _models: dict[str, Model] = field(default_factory=dict)

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.time()

    def runs(self, count: int) -> int:
        """So many repetitions, or two in the dry run."""
        return 2 if self.tiny else count

    def model(self, name: str) -> Model:
        """A model, made once."""
        if name not in self._models:
            self._models[name] = Model(name, tiny=self.tiny, dtype=self.dtype, device=self.device)
        return self._models[name]

    def only_model(self, name: str) -> Model:
        """A model, and the memory of the others' weights given back; their graphs stay."""
        for other, model in self._models.items():
            if other != name:
                model.forget_weights()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        return self.model(name)

    def recorder(self) -> Recorder | None:
        """What captures CUDA graphs; None on a CPU."""
        return Recorder(self.device) if self.cuda else None

    @cached_property
    def rates(self) -> Rates:
        """Measured when first asked for, after half a second of work: clocks rise under load."""
        side, nbytes = (256, 1 << 20) if self.tiny else (None, None)
        if self.cuda:
            end = time.time() + 0.5
            while time.time() < end:
                gemm_rate(self.device, self.dtype, side=4096, runs=3)
        return Rates(gemm_rate(self.device, self.dtype, side=side), copy_rate(self.device, nbytes=nbytes))

    def synchronize(self) -> None:
        """Wait for the GPU."""
        if self.cuda:
            torch.cuda.synchronize(self.device)

    @cached_property
    def facts(self) -> dict[str, Any]:
        """The device, for every row."""
        if not self.cuda:
            return {"device": "cpu", "dry_run": True}
        properties = torch.cuda.get_device_properties(self.device)
        asked = "driver_version,power.limit,clocks.max.sm,clocks.max.mem"
        return {
            "device": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
            **dict(zip(asked.split(","), nvidia_smi(asked), strict=False)),
        }


def nvidia_smi(fields: str) -> list[str]:
    """What nvidia-smi says of the first GPU; nothing if it is not there."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [value.strip() for value in done.stdout.strip().split(",")]
