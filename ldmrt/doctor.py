"""What this machine has and what ldmrt can run on it. Nothing here fails: what cannot be found out is reported as such."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import ldmrt

# The packages of each extra in pyproject.toml (a test compares the two).
EXTRAS: dict[str, tuple[str, ...]] = {
    "export": ("diffusers", "transformers", "huggingface_hub", "PyYAML", "onnx", "onnxscript"),
    "onnxruntime": ("onnxruntime",),
    "onnxruntime-gpu": ("onnxruntime-gpu",),
    "triton": ("triton",),
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt-rtx-cu13-libs", "tensorrt-rtx-cu13-bindings"),
    "serve": ("fastapi", "starlette", "uvicorn", "prometheus-client", "python-multipart"),
    "ray": ("ray",),
    "bench": ("matplotlib", "nvidia-ml-py"),
}
# What decides how fast a CPU is at this, as /proc/cpuinfo calls it.
CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def examine() -> dict[str, Any]:
    """Everything, as one JSON-safe document."""
    torch = _torch()
    return {
        "ldmrt": ldmrt.__version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cpu": _cpu(),
        "memory": _memory(),
        "disk": _disk(),
        "torch": torch,
        "cuda": _cuda(torch["missing"]),
        "native": {"missing": _native(torch["missing"])},
        "engines": engine_kinds(),
        "extras": {name: packages(name) for name in EXTRAS},
    }


def engine_kinds() -> dict[str, str | None]:
    """Every engine kind, and what keeps it from running here, or None."""
    onnxruntime = importlib.util.find_spec("onnxruntime") is not None
    return {
        "torch": _torch()["missing"],
        "onnxruntime": None if onnxruntime else "onnxruntime is not installed: pip install 'ldmrt[onnxruntime]'",
        "tensorrt": _tensorrt("tensorrt"),
        "tensorrt-rtx": _tensorrt("tensorrt-rtx"),
    }


def packages(name: str) -> dict[str, Any]:
    """The packages of an extra that are there with their versions, those that are not, and how to install them."""
    versions = {package: _version(package) for package in EXTRAS[name]}
    return {
        "present": {package: version for package, version in versions.items() if version},
        "missing": [package for package, version in versions.items() if not version],
        "install": f"pip install 'ldmrt[{name}]'",
    }


def cpu_features(cpuinfo: str) -> dict[str, bool]:
    """Which of `CPU_FEATURES` a text like /proc/cpuinfo's lists."""
    found = re.search(r"^flags\s*:(.*)$", cpuinfo, re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return {name: name in flags for name in CPU_FEATURES}


def _cpu() -> dict[str, Any]:
    text = _read("/proc/cpuinfo")
    name = re.search(r"^model name\s*:\s*(.*)$", text, re.MULTILINE)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "name": name[1].strip() if name else platform.processor() or platform.machine(),
        "cores": cores,
        "features": cpu_features(text),
    }


def _memory() -> dict[str, int]:
    values = {
        key: int(value) * 1024
        for key, value in re.findall(r"^(\w+):\s+(\d+) kB$", _read("/proc/meminfo"), re.MULTILINE)
    }
    total, available = values.get("MemTotal", 0), values.get("MemAvailable", 0)
    limit = _read("/sys/fs/cgroup/memory.max").strip()  # a container's
    if limit.isdigit() and int(limit) < total:
        used = _read("/sys/fs/cgroup/memory.current").strip()
        total = int(limit)
        available = min(available, total - int(used)) if used.isdigit() else min(available, total)
    return {"total": total, "available": max(0, available)}


def _disk() -> dict[str, int]:
    try:
        usage = shutil.disk_usage(Path())
    except OSError:  # the folder was removed under us
        return {"total": 0, "free": 0}
    return {"total": usage.total, "free": usage.free}


def _torch() -> dict[str, Any]:
    try:
        import torch
    except (ImportError, OSError) as error:  # OSError: one of its libraries does not load
        return {
            "version": None,
            "threads": 0,
            "missing": f"torch cannot be imported ({error}): pip install 'torch>=2.11'",
        }
    return {"version": torch.__version__, "threads": torch.get_num_threads(), "missing": None}


def _cuda(no_torch: str | None) -> dict[str, Any]:
    driver = Path("/proc/driver/nvidia/version").exists()
    if no_torch is not None:
        return {"version": None, "gpus": [], "missing": "torch is missing"}
    import torch

    if torch.cuda.is_available():
        properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
        gpus = [{"name": p.name, "bytes": p.total_memory, "capability": f"sm_{p.major}{p.minor}"} for p in properties]
        return {"version": torch.version.cuda, "gpus": gpus, "missing": None}
    if not driver:
        missing = "no NVIDIA GPU or driver found: the CPU is used"
    elif torch.version.cuda is None:
        missing = "there is an NVIDIA driver, but this torch is for the CPU only: install one with CUDA (pytorch.org)"
    else:
        missing = f"there is an NVIDIA driver, but torch's CUDA {torch.version.cuda} cannot use it: update the driver"
    return {"version": torch.version.cuda, "gpus": [], "missing": missing}


def _tensorrt(kind: str) -> str | None:
    if (no_torch := _torch()["missing"]) is not None:
        return str(no_torch)
    from ldmrt.engines.tensorrt import LIBRARIES, gpu_at_hand
    from ldmrt.errors import EngineMismatch

    try:
        LIBRARIES[kind].load()
    except EngineMismatch as error:
        return str(error)
    return None if gpu_at_hand() else f"engine {kind} runs on an NVIDIA GPU, and there is none here"


def _native(no_torch: str | None) -> str | None:
    if no_torch is not None:
        return "torch is missing"
    from ldmrt.kernels import native

    return native.why_not()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
