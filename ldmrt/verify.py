"""Compare engines with what the original module made of the same inputs, and certify what was found.

The oracle is diffusers' and transformers' own module with the same weights, in float32; the measure is the relative L2 error of each
output, the largest of them where there are several. What it made is kept in the bundle for engines that cannot run where they are
built: they are verified on their target, where neither the original nor its library need be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ldmrt.bundle import Bundle
from ldmrt.components import is_step, parts
from ldmrt.engines.protocol import Engine, TensorSpec
from ldmrt.errors import BuildError, BundleError
from ldmrt.manifest import Certificate, EngineRecord, FileRecord, write_manifest
from ldmrt.rows import axis, run_rows
from ldmrt.weights import WeightFile, write

# float32: sums in another order. bfloat16 keeps 8 bits and float16 11, and rounding piles up over a hundred layers.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}
# What an engine kind's float32 is by itself. ONNX Runtime adds up the values of a group norm in single numbers, one after the other: a norm
# over 4 x 1024 x 1024 values is off by 1e-4, a decoder with thirty of them by 5e-4. TensorRT multiplies float32 as TF32, which has float16's bits.
FLOAT32_TOLERANCE = {"onnxruntime": 2e-3, "tensorrt": TOLERANCE["float16"], "tensorrt-rtx": TOLERANCE["float16"]}

Tensors = Mapping[str, torch.Tensor]

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Trial:
    """Inputs to try an engine on.

    Attributes:
        kind: what kind of inputs they are: `random`, `real` or `extreme`.
        inputs: by name, in float32 (token ids in int64).
        expected: what the original module makes of them, where that is known already.
    """

    kind: str
    inputs: Tensors
    expected: Tensors | None = None

    def first(self) -> Trial:
        """The first entry alone."""
        alone = {name: tensor[:1] for name, tensor in self.inputs.items()}
        expected = self.expected and {name: tensor.narrow(axis(name), 0, 1) for name, tensor in self.expected.items()}
        return Trial(self.kind, alone, expected)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||, infinity if either has NaN or infinity."""
    found, expected = found.double(), expected.double()
    if not (found.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    scale = float(expected.norm())
    return float((found - expected).norm()) / (scale if scale > 0 else 1.0)


def tolerance(kind: str, dtype: str) -> float:
    """The largest relative error of an engine of a kind and precision that is accepted."""
    return FLOAT32_TOLERANCE.get(kind, TOLERANCE[dtype]) if dtype == "float32" else TOLERANCE[dtype]


def certify(
    label: str,
    engine: str,
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
    limit = tolerance(engine, dtype)
    for kind, error in errors.items():
        if not error <= limit:
            raise BuildError(
                f"{label} does not agree with the original model: relative error {error:.2e} on {kind} inputs, at most {limit:.0e} "
                f"is accepted in {dtype}; {'report this' if dtype == 'float32' else 'build with --dtype float32, and report this if it persists'}"
            )
    return Certificate(
        status="verified",
        reference=reference,
        relative_error={kind: float(f"{error:.2e}") for kind, error in errors.items()},
        tolerance=limit,
    )


def _is_finite(tensors: Tensors) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def unverified(record: EngineRecord, trials: FileRecord) -> EngineRecord:
    """An engine whose target is absent: what its certificate says was found on ONNX Runtime, with the ONNX that it was built from."""
    certificate = record.certificate.model_copy(
        update={
            "status": f"unverified: target absent (its ONNX agrees, on ONNX Runtime {record.versions['onnxruntime']})"
        }
    )
    return record.model_copy(update={"certificate": certificate, "trials": trials})


def run_engine(engine: Engine, inputs: Tensors, device: torch.device = _CPU) -> dict[str, torch.Tensor]:
    """Run an engine on float32 inputs, cast to what it takes, where it takes them; outputs in float32 on the CPU."""
    cast = {name: inputs[name].to(device=device, dtype=spec.dtype) for name, spec in engine.inputs.items()}
    return {name: tensor.float().cpu() for name, tensor in engine.run(cast).items()}


def run_denoiser(
    context: Engine, schedule: Engine, step: Engine, inputs: Tensors, device: torch.device = _CPU
) -> dict[str, torch.Tensor]:
    """Run the three parts of a denoising network one after the other, as one network."""
    hoisted = run_engine(context, inputs, device) | run_engine(schedule, inputs, device)
    return run_engine(step, {**inputs, **hoisted}, device)


def write_trials(path: Path, trials: Sequence[Trial], expected: Sequence[Tensors]) -> str:
    """Keep trials and what the original made of them, in a safetensors file. Returns its SHA-256."""
    tensors: dict[str, torch.Tensor] = {}
    for trial, outputs in zip(trials, expected, strict=True):
        tensors |= {f"{trial.kind}.inputs.{name}": tensor for name, tensor in trial.inputs.items()}
        tensors |= {f"{trial.kind}.outputs.{name}": tensor for name, tensor in outputs.items()}
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()]
    return write(path, specs, tensors.__getitem__)


def read_trials(path: Path) -> tuple[list[Trial], list[dict[str, torch.Tensor]]]:
    """What `write_trials` kept.

    Raises:
        BundleError: the file is damaged.
    """
    inputs: dict[str, dict[str, torch.Tensor]] = {}
    outputs: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in WeightFile(path).items():
        kind, what, name = [*key.split(".", 2), "", ""][:3]
        if what not in ("inputs", "outputs"):
            raise BundleError(f"{path} holds {key!r}, which is no trial; build the bundle again")
        (inputs if what == "inputs" else outputs).setdefault(kind, {})[name] = tensor
    if not inputs or inputs.keys() != outputs.keys():
        raise BundleError(f"{path} holds no whole trials; build the bundle again")
    return [Trial(kind, inputs[kind]) for kind in inputs], [outputs[kind] for kind in inputs]


def waiting(bundle: Bundle) -> list[tuple[EngineRecord, FileRecord]]:
    """The engines that could not be verified where they were built, each with its trials."""
    engines = bundle.manifest.engines
    return [(r, r.trials) for r in engines if r.trials is not None and r.certificate.status != "verified"]


def complete(
    bundle: Bundle,
    device: torch.device,
    architecture: str | None,
    on_progress: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
) -> list[EngineRecord]:
    """Verify what could not be verified where it was built, as far as this machine can, and keep that in the manifest.

    Args:
        bundle: the opened bundle.
        device: where to run the engines.
        architecture: of the GPU there, such as `sm_89`; engines for others are left as they are.
        on_progress: called with (what is being done, engines done, engines in all).

    Returns:
        The engines that are verified now.

    Raises:
        BuildError: an engine does not agree with the original model; the manifest is as it was.
        EngineMismatch: an engine cannot be loaded here.
    """
    pairs = [(record, kept) for record, kept in waiting(bundle) if architecture in record.targets]
    done = []
    for number, (record, kept) in enumerate(pairs):
        on_progress(record.label, number, len(pairs))
        trials, expected = read_trials(bundle.checked(kept))
        found = run_trials(record, trials, partial(_load, bundle, record, device), device)
        reference = f"{record.certificate.reference}, on {architecture}"
        certificate = certify(record.label, record.kind, record.dtype, trials, found, expected, reference)
        done.append(record.model_copy(update={"certificate": certificate}))
    changed = {record.key: record for record in done}
    engines = tuple(changed.get(record.key, record) for record in bundle.manifest.engines)
    write_manifest(bundle.path, bundle.manifest.model_copy(update={"engines": engines}))
    return done


def _load(bundle: Bundle, record: EngineRecord, device: torch.device, component: str) -> Engine:
    """The engine itself, or the part of its network that runs once per request."""
    if component == record.component:
        return bundle.load(record, device)
    found = bundle.find(component, kind="torch", dtype=record.dtype, size=record.size)
    if not found:
        raise BundleError(f"{bundle.path} has no {component} engine for {record.label}; build the bundle again")
    return bundle.load(found[0], device)


def run_trials(
    record: EngineRecord, trials: Sequence[Trial], load: Callable[[str], Engine], device: torch.device = _CPU
) -> list[dict[str, torch.Tensor]]:
    """What an engine makes of trials, the parts of a denoising network as one; `load(component)` gives the engine of each."""
    if is_step(record.component):
        context, schedule, step = map(load, parts(record.component))
        run = partial(run_denoiser, context, schedule, step, device=device)
    else:
        run = partial(run_engine, load(record.component), device=device)
    return [run_rows(run, trial.inputs, record.rows) for trial in trials]
