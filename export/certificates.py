"""Engines that have been written, run as the runtime would run them and compared with the original module."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from functools import partial

import torch

from ldmrt.bundle import Bundle
from ldmrt.components import runs_once
from ldmrt.engines.protocol import Engine
from ldmrt.engines.tensorrt import LIBRARIES, gpu_at_hand
from ldmrt.export.component import Component
from ldmrt.export.folder import BundleFolder
from ldmrt.export.source import Checkpoint
from ldmrt.manifest import EngineRecord
from ldmrt.verify import Tensors, Trial, certify, run_trials, unverified, write_trials


def certified(
    folder: BundleFolder,
    bundle: Bundle,
    component: Component,
    checkpoint: Checkpoint,
    records: Sequence[EngineRecord],
    trials: Sequence[Trial],
    expected: Sequence[Tensors],
) -> list[EngineRecord]:
    """A component's engines with their certificates.

    A plan for another GPU than the one at hand cannot run here: its ONNX stands in for it, on ONNX Runtime, and
    what the original made of the trials is kept, so that `ldmrt verify` can complete its certificate where it runs.

    Args:
        folder: where trials are kept.
        bundle: the bundle under way; its files can be loaded.
        component: what the engines were made of.
        checkpoint: its weights.
        records: the engines, all parts of a network together.
        trials: what to try them on.
        expected: what the original makes of each.

    Raises:
        BuildError: an engine does not agree with the original.
    """
    found = _outputs(bundle, records, trials)
    original = type(component.original)
    library = original.__module__.partition(".")[0]
    reference = f"{library} {importlib.metadata.version(library)} {original.__name__}, float32" + (
        ", LoRAs fused" if checkpoint.fused else ""
    )
    if _device_for(records).type == "cuda":
        reference += f", on {gpu_at_hand()}"
    certificates = {
        record.key: certify(
            record.label,
            "onnxruntime" if _is_foreign(record) else record.kind,
            record.dtype,
            trials,
            found[record.key],
            expected,
            reference,
        )
        for record in records
        if record.key in found
    }
    # The parts of a network that run once per request are verified within the whole network.
    whole = next(iter(certificates.values()))
    records = [r.model_copy(update={"certificate": certificates.get(r.key, whole)}) for r in records]
    if not any(_is_foreign(record) for record in records):
        return records
    digest = hashlib.sha256("".join(sorted(record.key for record in records)).encode()).hexdigest()[:8]
    name = f"trials/{component.name}-{digest}.safetensors"
    kept = folder.write(name, lambda path: write_trials(path, trials, expected))
    return [unverified(r, kept) if _is_foreign(r) else r for r in records]


def _is_foreign(record: EngineRecord) -> bool:
    """Whether an engine is for another GPU than the one at hand."""
    return record.kind in LIBRARIES and gpu_at_hand() not in record.targets


def _device_for(records: Sequence[EngineRecord]) -> torch.device:
    """Where engines are verified: on the GPU what is made for one, if it is there; float32 on the CPU, without TF32."""
    own = any(r.kind in LIBRARIES or (r.kind == "torch" and r.dtype != "float32") for r in records)
    foreign = any(_is_foreign(record) for record in records)
    return torch.device("cuda" if own and not foreign and gpu_at_hand() is not None else "cpu")


def _outputs(
    bundle: Bundle, records: Sequence[EngineRecord], trials: Sequence[Trial]
) -> dict[str, list[dict[str, torch.Tensor]]]:
    """What each engine makes of each trial, by the engine's key; `context` and `schedule` run within `step`."""
    device = _device_for(records)
    named = {record.component: record for record in records}

    def load(record: EngineRecord, component: str) -> Engine:
        record = record if component == record.component else named[component]
        if not _is_foreign(record):
            return bundle.load(record, device)
        from ldmrt.engines.onnxruntime import OnnxRuntimeEngine

        # A VAE's weights are few and its convolutions many: prepared for them it takes half the time, even for one run.
        once = record.component not in ("decoder", "encoder")
        return OnnxRuntimeEngine(bundle.checked(record.files[1]), threads=torch.get_num_threads(), once=once)

    # One engine after the other: several of a large network do not fit into memory together.
    return {
        record.key: run_trials(record, trials, partial(load, record), device)
        for record in records
        if not runs_once(record.component)
    }
