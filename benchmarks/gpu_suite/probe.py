"""What the suite runs on: the device and its rates, what computes the operators, and whether TensorRT for RTX would."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from gpu_suite.results import Figures
from gpu_suite.session import Session, nvidia_smi
from ldmrt.kernels import launch, native


def probe(session: Session, unit: str) -> None:
    """Look around; nothing here decides what runs later."""
    part = session.results.part
    with part(unit, "device") as figures:
        figures.update(session.facts)
    with part(unit, "operators") as figures:
        figures["computed_by"] = launch.describe(session.device)
        figures["native"] = native.why_not() or "loaded"
        figures["installed"] = {
            name: importlib.util.find_spec(name) is not None
            for name in ("diffusers", "transformers", "triton", "onnxruntime")
        }
    with part(unit, "rates") as figures:
        rates = session.rates
        figures.update(
            {"gemm_tflop_per_second": round(rates.gemm / 1e12, 3), "copy_gb_per_second": round(rates.copy / 1e9, 1)}
        )
        if session.cuda:
            figures["clocks_power_temperature"] = nvidia_smi("clocks.sm,clocks.mem,power.draw,temperature.gpu")
    with part(unit, "tensorrt for rtx") as figures:
        _tensorrt(session, figures)


def _tensorrt(session: Session, figures: Figures) -> None:
    """Whether the bindings are there, start here, and can build for this GPU. Nothing is built."""
    names = [name for name in ("tensorrt_rtx", "tensorrt_rtx_bindings") if importlib.util.find_spec(name) is not None]
    if not names:
        figures["installed"] = False
        return
    trt: Any = importlib.import_module(names[0])
    figures.update({"installed": True, "version": trt.__version__})
    figures["targets"] = sorted(name for name in dir(trt.ComputeCapability) if name.startswith("SM"))
    if not session.cuda:
        return
    major, minor = torch.cuda.get_device_capability(session.device)
    figures["target_is_known"] = f"SM{major}{minor}" in figures["targets"]
    logger = trt.Logger(trt.Logger.ERROR)
    figures["runtime"] = trt.Runtime(logger) is not None
    builder = trt.Builder(logger)
    config = builder.create_builder_config()
    if figures["target_is_known"]:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, f"SM{major}{minor}"), 0)
    figures["builder"] = True
