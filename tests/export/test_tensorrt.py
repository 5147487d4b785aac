"""Plans of TensorRT for RTX, really built, for GPUs that are not there."""

from __future__ import annotations

import _thread
import json
import logging
import multiprocessing
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import external_data_helper, helper, numpy_helper

import ldmrt
from ldmrt.bundle import Bundle
from ldmrt.engines.tensorrt import LIBRARIES
from ldmrt.errors import BuildError, EngineMismatch
from ldmrt.export.build import _Build, _Draft
from ldmrt.export.folder import BundleFolder
from ldmrt.export.options import Options
from ldmrt.export.source import Source
from ldmrt.export.tensorrt import _check_refittable, _in_a_thread, build_plan
from ldmrt.graph import Graph
from ldmrt.manifest import MANIFEST, FileRecord
from ldmrt.pipeline import Pipeline
from ldmrt.verify import read_trials, waiting
from tests.engines.fake_tensorrt import Cuda, write_plan
from tests.engines.tensorrt_gpu import RTX as FAKE_RTX

pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'ldmrt[tensorrt-rtx]'", exc_type=ImportError)
pytestmark = pytest.mark.rtx

RTX = LIBRARIES["tensorrt-rtx"]
BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
TARGETS = ("sm_86", "sm_89", "sm_120")


@pytest.fixture(scope="module")
def rtx_bundle(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model` in float16 for three GPUs. Do not write to it."""
    out = tmp_path_factory.mktemp("bundles") / "rtx"
    bundle: Bundle = ldmrt.build_engines(tiny_model, out, engine="tensorrt-rtx", targets=TARGETS)
    return bundle.path


def test_what_a_bundle_holds(rtx_bundle: Path) -> None:
    bundle = Bundle.open(rtx_bundle)
    plans = [record for record in bundle.manifest.engines if record.kind == "tensorrt-rtx"]
    assert [(r.component, r.rows) for r in plans] == [("text_encoder", 1), ("step", 2), ("decoder", 1), ("encoder", 1)]
    for record in plans:
        assert record.targets == TARGETS
        assert record.dtype == "float16"
        assert record.versions["tensorrt-rtx"] == RTX.load().__version__
        assert record.certificate.status.startswith("unverified: target absent")
        assert 0 < max(record.certificate.relative_error.values()) < record.certificate.tolerance
        plan = bundle.checked(record.files[0])
        assert plan.suffix == ".plan"
        assert plan.stat().st_size > 1000
    others = {record.component: record for record in bundle.manifest.engines if record.kind == "torch"}
    assert others.keys() == {"context", "schedule"}
    assert all(record.certificate.status == "verified" for record in others.values())
    assert {cubin.arch for cubin in bundle.cubins()} == {86, 89, 120}  # the sampler's kernels


def test_what_the_target_needs_to_verify_is_kept(rtx_bundle: Path) -> None:
    bundle = Bundle.open(rtx_bundle)
    for record, kept in waiting(bundle):
        trials, expected = read_trials(bundle.checked(kept))
        assert [trial.kind for trial in trials] == ["real"]
        assert all(outputs and all(t.isfinite().all() for t in outputs.values()) for outputs in expected)
        assert record.component != "decoder" or expected[0]["image"].shape[1] == 3


def test_the_same_build_again_reuses_the_plans(rtx_bundle: Path, tiny_model: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in rtx_bundle.rglob("*.plan")}
    ldmrt.build_engines(tiny_model, rtx_bundle, engine="tensorrt-rtx", targets=reversed(TARGETS))  # type: ignore[arg-type]
    assert {path: path.stat().st_mtime_ns for path in rtx_bundle.rglob("*.plan")} == before


def test_a_plan_does_not_run_on_a_cpu(rtx_bundle: Path) -> None:
    with pytest.raises(EngineMismatch, match=r"was built for GPUs \(sm_86, sm_89, sm_120\), the device is a CPU"):
        Pipeline.from_bundle(rtx_bundle, device="cpu")("a cat", num_inference_steps=1)


def test_the_key_changes_with_what_shapes_a_plan(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def key(targets: tuple[str, ...] = ("sm_89",), level: int | None = None, **more: Any) -> str:
        options = Options("tensorrt-rtx", "float16", ((64, 64),), (1,), targets, level, **more)
        build = _Build(Source.open(tiny_model), BundleFolder(tmp_path), options, lambda _what, _done, _total: None)
        build.weights = {"vae": FileRecord(file="weights/vae", sha256="0" * 64)}
        graph = Graph(name="decoder", inputs=(), weights={}, constants={}, nodes=(), outputs={})
        return build.key(_Draft(graph, (64, 64), 1, "float16"), "vae")

    keys = [key(), key(("sm_86",)), key(("sm_86", "sm_89")), key(level=3), key(level=4), key(workspace=1 << 30)]
    keys += [key(refit=True), key(weight_streaming=True)]
    assert keys[0] == key()
    monkeypatch.setattr(RTX.load(), "__version__", "1.99.0")
    keys.append(key())
    assert len(set(keys)) == len(keys)


def onnx_of(bundle: Path, component: str) -> Path:
    return next(bundle.glob(f"{component}-*.onnx"))


def test_builds_repeat_to_the_byte(rtx_bundle: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        build_plan(RTX, onnx_of(rtx_bundle, "decoder"), tmp_path / name, targets=["sm_89"])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_progress_and_the_log(rtx_bundle: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    phases: list[tuple[str, int, int]] = []
    with caplog.at_level(logging.DEBUG, "ldmrt.tensorrt"):
        build_plan(
            RTX,
            onnx_of(rtx_bundle, "encoder"),
            tmp_path / "plan",
            targets=["sm_89"],
            optimization_level=1,
            workspace=1 << 28,
            on_phase=lambda *phase: phases.append(phase),
        )
    assert phases
    assert all(0 <= done <= total for _, done, total in phases)
    assert any(record.name == "ldmrt.tensorrt" for record in caplog.records)


def test_weights_that_may_stay_in_the_hosts_memory(rtx_bundle: Path, tmp_path: Path) -> None:
    graph = onnx_of(rtx_bundle, "decoder")
    build_plan(RTX, graph, tmp_path / "streaming", targets=["sm_86", "sm_89"], weight_streaming=True)
    build_plan(RTX, graph, tmp_path / "whole", targets=["sm_86", "sm_89"])
    assert (tmp_path / "streaming").read_bytes() != (tmp_path / "whole").read_bytes()


def test_weights_of_a_plan_that_do_not_change(tmp_path: Path) -> None:
    """With the strict fake: the library itself needs a GPU to build a plan whose weights change, and to read it."""
    weights = [numpy_helper.from_array(np.ones(4, np.float32), name) for name in ("a", "b")]
    for weight in weights:
        external_data_helper.set_external_data(weight, "weights", 0, 16)
    graph = helper.make_graph([], "step", [], [], weights)
    (tmp_path / "step.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    Cuda.active = True
    try:
        for held in (("a", "b"), ("a",)):
            plan = write_plan({}, {"y": (1,)}, refit=True, weights=dict.fromkeys(held, 1.0))
            if "b" in held:
                _check_refittable(FAKE_RTX, plan, tmp_path / "step.onnx")
            else:
                with pytest.raises(
                    BuildError, match=r"does not let 1 weights of step.onnx change, b among them .*--refit"
                ):
                    _check_refittable(FAKE_RTX, plan, tmp_path / "step.onnx")
    finally:
        Cuda.active = False


def test_what_is_no_graph_is_refused_with_the_reason(tmp_path: Path) -> None:
    broken = tmp_path / "step.onnx"
    broken.write_bytes(b"nothing of the kind")
    with pytest.raises(BuildError, match=r"tensorrt-rtx cannot read step.onnx: .*; use --engine torch"):
        build_plan(RTX, broken, tmp_path / "plan", targets=["sm_89"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step.onnx"]


def test_a_graph_of_free_shapes_is_refused(tiny_bundle_onnx: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"cannot build text_encoder-.* for sm_89: .*optimization profile"):
        build_plan(RTX, onnx_of(tiny_bundle_onnx, "text_encoder"), tmp_path / "plan", targets=["sm_89"])
    assert not list(tmp_path.iterdir())


def test_what_is_raised_beside_the_main_thread_is_raised_in_it() -> None:
    def work() -> None:
        raise MemoryError("no room")

    stop = threading.Event()
    with pytest.raises(MemoryError, match="no room"):
        _in_a_thread(work, stop)
    assert stop.is_set()


def test_an_interrupt_stops_the_build_and_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    def interrupt(what: str, _done: int, _total: int) -> None:
        if "tensorrt-rtx" in what:
            _thread.interrupt_main()

    with pytest.raises(KeyboardInterrupt):
        ldmrt.build_engines(
            tiny_model, tmp_path / "out", engine="tensorrt-rtx", targets=["sm_89"], on_progress=interrupt
        )
    assert not (tmp_path / "out").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ldmrt-")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"targets": ["sm_90"]}, r"does not build for target 'sm_90'; choose among sm_80, sm_86"),
        ({"targets": ["ampere"]}, r"does not build for target 'ampere'"),
        ({"targets": ["sm_89"], "optimization_level": 6}, r"optimization level is 6, expected 0 to 5"),
        ({"targets": ["sm_89"], "dtype": "bfloat16"}, r"in bfloat16 cannot be tried here: ONNX Runtime"),
        ({"targets": ["sm_89"], "workspace": 5}, r"workspace is 5 bytes, expected at least"),
    ],
)
def test_options_that_cannot_be(tiny_model: Path, tmp_path: Path, arguments: Any, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        ldmrt.build_engines(tiny_model, tmp_path / "out", engine="tensorrt-rtx", **arguments)
    assert not (tmp_path / "out").exists()


def test_without_a_gpu_and_without_a_target(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldmrt.export.options.gpu_at_hand", lambda: None)
    with pytest.raises(BuildError, match=r"there is no GPU here; say what to build for: --target sm_80 or "):
        ldmrt.build_engines(tiny_model, tmp_path / "out", engine="tensorrt-rtx")


# What a build imports on its way, which takes longer than a small model's build.
_IMPORTED = (
    "diffusers.models",
    "ldmrt.export.build",
    "ldmrt.export.onnx",
    "ldmrt.export.tensorrt",
    "onnxruntime",
    "onnxscript",
    "tensorrt_rtx_bindings",
    "torch.onnx",
    "transformers",
    "triton",
)


@pytest.mark.slow
def test_a_build_killed_at_any_moment_leaves_the_bundle_as_it_was_or_whole(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kill -9, 30 times, at moments spread over a whole build. The processes are forks of one that has imported what they need."""
    monkeypatch.chdir(tmp_path)  # which that one looks for packages in: it must not find the repository's folders
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(_IMPORTED))
    out = tmp_path / "out"
    ldmrt.build_engines(tiny_model, out, engine="torch", dtype="float32")
    first = (out / MANIFEST).read_bytes()

    def start() -> Any:
        options = {"engine": "tensorrt-rtx", "targets": ["sm_89"]}
        process = context.Process(target=ldmrt.build_engines, args=(tiny_model, out), kwargs=options)
        process.start()
        return process

    def whole_build() -> float:
        (out / MANIFEST).write_bytes(first)
        begun = time.monotonic()
        process = start()
        process.join()
        assert process.exitcode == 0
        return time.monotonic() - begun

    whole_build()  # what is compiled once and kept, such as Triton's kernels, is there from now on
    seconds = whole_build()
    complete = {(e.component, e.kind) for e in Bundle.open(out).manifest.engines}
    killed = 0
    for number in range(30):
        (out / MANIFEST).write_bytes(first)
        process = start()
        process.join(seconds * (number + 1) / 31)
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        bundle = Bundle.open(out)
        engines = {(e.component, e.kind) for e in bundle.manifest.engines}
        assert (out / MANIFEST).read_bytes() == first or engines == complete
        for record in bundle.records():
            bundle.checked(record)
    assert killed >= 25, "the moments do not lie within a build"
    whole_build()
    assert not list(out.rglob("*.tmp"))


@pytest.mark.slow
def test_a_model_of_real_size_for_three_gpus(tmp_path: Path) -> None:
    """Stable Diffusion 1.5's architecture, weights random: within 10 GB, and not in an hour."""
    work = ["--work", str(tmp_path), "--no-record"]
    targets = [part for target in TARGETS for part in ("--target", target)]
    command = [sys.executable, str(BENCHMARKS / "real_size.py"), "--engine", "tensorrt-rtx", *targets, *work]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["peak_rss_bytes"] < 10e9
    bundle = Bundle.open(tmp_path / "bundle-tensorrt-rtx")
    plans = [record for record in bundle.manifest.engines if record.kind == "tensorrt-rtx"]
    assert [record.component for record in plans] == ["text_encoder", "step", "decoder", "encoder"]
    for record in plans:
        assert record.targets == TARGETS
        assert bundle.checked(record.files[0]).stat().st_size > 50e6
        assert max(record.certificate.relative_error.values()) < record.certificate.tolerance
