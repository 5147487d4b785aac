"""Compare engines with the original module, in float32, and certify what was found.

The oracle is diffusers' and transformers' own module with the same weights; the measure is the relative L2 error of each output,
the largest of them where there are several.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ldmrt.bundle import Certificate
from ldmrt.engines.protocol import Engine
from ldmrt.errors import BuildError

# float32: sums in another order. bfloat16 keeps 8 bits and float16 11, and rounding piles up over a hundred layers.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Trial:
    """Inputs in float32 (token ids in int64), by name, and what kind of inputs they are (`random`, `real`, `extreme`)."""

    kind: str
    inputs: Tensors


def reference_outputs(
    module: torch.nn.Module, trials: Sequence[Trial], names: Sequence[str]
) -> list[dict[str, torch.Tensor]]:
    """What the original module, in float32, makes of each trial."""
    with torch.inference_mode():
        return [dict(zip(names, module(*trial.inputs.values()), strict=True)) for trial in trials]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||, infinity if either has NaN or infinity."""
    found, expected = found.double(), expected.double()
    if not (found.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    scale = float(expected.norm())
    return float((found - expected).norm()) / (scale if scale > 0 else 1.0)


def certify(
    label: str,
    dtype: str,
    trials: Sequence[Trial],
    found: Sequence[Tensors],
    expected: Sequence[Tensors],
    reference: str,
) -> Certificate:
    """A certificate for an engine's outputs.

    Raises:
        BuildError: an error is above the tolerance; says which component and by how much.
    """
    errors: dict[str, float] = {}
    for trial, ours, theirs in zip(trials, found, expected, strict=True):
        if not _is_finite(theirs):
            raise BuildError(
                f"{label}: the original model itself gives NaN or infinity on {trial.kind} inputs in float32; its weights are "
                "damaged: copy the model again"
            )
        if not _is_finite(ours):
            raise BuildError(
                f"{label} gives NaN or infinity on {trial.kind} inputs, the original model in float32 does not; "
                f"build with --dtype {'bfloat16 or float32' if dtype == 'float16' else 'float32'}"
            )
        worst = max(relative_error(ours[name], theirs[name]) for name in theirs)
        errors[trial.kind] = max(errors.get(trial.kind, 0.0), worst)
    limit = TOLERANCE[dtype]
    for kind, error in errors.items():
        if not error <= limit:
            raise BuildError(
                f"{label} does not agree with the original model: relative error {error:.2e} on {kind} inputs, at most {limit:.0e} "
                f"is accepted in {dtype}; build with --dtype float32, and report this if it persists"
            )
    return Certificate(
        status="verified",
        reference=reference,
        relative_error={kind: float(f"{error:.2e}") for kind, error in errors.items()},
        tolerance=limit,
    )


def _is_finite(tensors: Tensors) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def run_engine(engine: Engine, inputs: Tensors) -> dict[str, torch.Tensor]:
    """Run an engine on float32 inputs, cast to what it takes; outputs in float32."""
    cast = {name: inputs[name].to(spec.dtype) for name, spec in engine.inputs.items()}
    return {name: tensor.float() for name, tensor in engine.run(cast).items()}


def run_denoiser(context: Engine, schedule: Engine, step: Engine, inputs: Tensors) -> dict[str, torch.Tensor]:
    """Run the three parts of a denoising network one after the other, as one network."""
    hoisted = run_engine(context, inputs) | run_engine(schedule, inputs)
    return run_engine(step, {**inputs, **hoisted})


def run_rows(
    run: Callable[[Tensors], dict[str, torch.Tensor]], trial: Trial, rows: int | None
) -> dict[str, torch.Tensor]:
    """Run a trial through an engine of `rows` rows: in slices, the last one filled up by repetition."""
    if rows is None:
        return run(trial.inputs)
    count = next(iter(trial.inputs.values())).shape[0]
    parts: list[dict[str, torch.Tensor]] = []
    for start in range(0, count, rows):
        index = torch.arange(start, start + rows) % count
        result = run({name: tensor[index] for name, tensor in trial.inputs.items()})
        parts.append({name: tensor[: count - start] for name, tensor in result.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def sample_picture(width: int, height: int) -> torch.Tensor:
    """A smooth picture with hard edges, (1, 3, height, width) in [-1, 1]: what an image encoder meets, unlike noise."""
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    u, v = x / width, y / height
    red = 0.5 + 0.5 * np.sin(6.0 * u + 2.0 * v)
    green = np.where((u - 0.5) ** 2 + (v - 0.45) ** 2 < 0.07, 0.9, 0.25 + 0.4 * v)
    blue = np.where((np.floor(8 * u) + np.floor(8 * v)) % 2 == 0, 0.2, 0.7) * (0.5 + 0.5 * u)
    return torch.from_numpy(np.stack([red, green, blue])[None] * 2 - 1).float()


def noise(seed: int, *shape: int) -> torch.Tensor:
    """Standard normal numbers from a seed, float32."""
    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
