"""What an engine is said to need, against what it takes on the CPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ldmrt.bundle import Bundle
from ldmrt.engines.torch import TorchEngine, packing
from ldmrt.footprint import footprint
from ldmrt.kernels import memory, native
from ldmrt.manifest import EngineRecord
from ldmrt.network import sizes
from ldmrt.opening import builtin_bundle
from ldmrt.rehearsal import weightless

CPU = torch.device("cpu")
FREE = {"rows": 2, "tokens": 77}

needs_native = pytest.mark.skipif(native.why_not() is not None, reason="plain torch takes more than the C++ bodies")


def engines(path: Path) -> list[EngineRecord]:
    """One engine of each component, of the fewest rows."""
    found: dict[str, EngineRecord] = {}
    for record in Bundle.open(path).manifest.engines:
        found.setdefault(record.component, record)
    return list(found.values())


def measured(engine: TorchEngine) -> int:
    """The most bytes that torch's allocator has lent at one time of a run, by torch's own profiler."""
    inputs = {name: torch.zeros(sizes(spec, **FREE), dtype=spec.dtype) for name, spec in engine.inputs.items()}
    engine.run(inputs)  # what is made at the first run stays
    with torch.profiler.profile(profile_memory=True) as profile:
        engine.run(inputs)
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    most = now = 0
    for _, change in changes:
        now += change
        most = max(most, now)
    return most


@needs_native
@pytest.mark.parametrize("record", engines(builtin_bundle()), ids=lambda record: record.component)
def test_activations_are_what_the_cpu_takes(record: EngineRecord, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LARGE", 1 << 60)  # everything through torch's allocator, which the profiler sees
    bundle = Bundle.open(builtin_bundle())
    graph = bundle.graph(record)
    engine = TorchEngine(graph, bundle.parameters(record.weights, CPU), CPU)
    found = footprint(graph, FREE, weightless(), CPU)
    # Equal but for what an operator takes for itself, such as a picture of few channels in another order: below 2 %.
    assert found.activations == pytest.approx(measured(engine), rel=0.02)
    assert 0 < found.outputs <= found.activations


@pytest.mark.parametrize("name", ["tiny_bundle", "tiny_bundle_v", "tiny_bundle_xl", "builtin"])
def test_weights_are_what_is_held_on_the_cpu(name: str, request: pytest.FixtureRequest) -> None:
    path = builtin_bundle() if name == "builtin" else request.getfixturevalue(name)
    counted: dict[str, int] = {}
    bundle = Bundle.open(path)
    for weights in bundle.manifest.weights:
        records = [record for record in engines(path) if record.weights == weights]
        meta = weightless()
        for record in records:
            footprint(bundle.graph(record), {"rows": 1, "tokens": 77}, meta, CPU)
            TorchEngine(bundle.graph(record), bundle.parameters(weights, CPU), CPU)
        counted[weights] = meta.nbytes + sum(packing(bundle.graph(record)) for record in records)
    assert counted == {weights: bundle.parameters(weights, CPU).nbytes for weights in counted}


def test_more_rows_take_as_many_times_more(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    one, two, four = (
        footprint(bundle.graph(record), FREE, weightless(), CPU).activations for record in bundle.find("step")
    )
    assert (two, four) == (2 * one, 4 * one)
