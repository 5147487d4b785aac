"""The TensorRT engine over a fake of its library: data, addresses, capture, lifetimes, refusals."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ldmrt.slots
from ldmrt.bundle import Bundle
from ldmrt.decoding import Decoding
from ldmrt.denoise import Denoiser
from ldmrt.engines.activation import ActivationMemory
from ldmrt.engines.gpu import Gpu
from ldmrt.engines.plan import TensorRtEngine
from ldmrt.engines.protocol import Engine, TensorSpec
from ldmrt.engines.tensorrt import LIBRARIES, Library, log
from ldmrt.errors import BundleError, EngineMismatch
from ldmrt.kernels import native
from ldmrt.kernels.sampler import sampler_step_reference
from ldmrt.parameters import Parameters
from ldmrt.samplers.ddim import ddim
from ldmrt.schedule import NoiseSchedule
from tests.engines import fake_tensorrt
from tests.engines.fake_tensorrt import calls, violations, write_plan
from tests.engines.tensorrt_gpu import RTX, TENSORRT, CapturingRecorder, FakeGpu

CPU = torch.device("cpu")
SHAPES: dict[str, Any] = {"inputs": {"x": (2, 3), "t": (3,)}, "outputs": {"y": (2, 3)}}

Load = Callable[..., TensorRtEngine]


@pytest.fixture(autouse=True)
def _nobody_dies_too_early() -> Iterator[None]:
    calls.clear()
    yield
    gc.collect()
    assert not violations


@pytest.fixture
def memory() -> ActivationMemory:
    return ActivationMemory(FakeGpu())


@pytest.fixture
def load(memory: ActivationMemory, tmp_path: Path) -> Load:
    def loaded(
        library: Library = RTX, *, cache: Path | None = None, weight_budget: int | None = None, **plan: Any
    ) -> TensorRtEngine:
        file = tmp_path / f"plan-{len(list(tmp_path.iterdir()))}.plan"
        file.write_bytes(write_plan(**{**SHAPES, **plan}))
        return TensorRtEngine(
            file, library, memory, label="step (tensorrt-rtx)", cache=cache, weight_budget=weight_budget
        )

    return loaded


def values(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(2, 3, generator=generator), "t": torch.randn(3, generator=generator)}


def expected(inputs: dict[str, torch.Tensor], scale: float = 1.0) -> torch.Tensor:
    return (inputs["x"] + inputs["t"]) * scale


@pytest.mark.parametrize("library", [RTX, TENSORRT])
def test_inputs_outputs_and_numbers(load: Load, library: Library) -> None:
    engine = load(library, scale=0.5)
    assert engine.inputs == {
        "x": TensorSpec("x", (2, 3), torch.float32),
        "t": TensorSpec("t", (3,), torch.float32),
    }
    assert engine.outputs == {"y": TensorSpec("y", (2, 3), torch.float32)}
    assert torch.equal(engine.run(values())["y"], expected(values(), 0.5))
    buffers = {**values(1), "y": torch.zeros(2, 3)}
    engine.bind(buffers)
    engine.enqueue()
    assert torch.equal(buffers["y"], expected(values(1), 0.5))


@pytest.mark.parametrize(
    ("name", "dtype"), [("HALF", torch.float16), ("BF16", torch.bfloat16), ("FLOAT", torch.float32)]
)
def test_precisions_and_token_ids(load: Load, name: str, dtype: torch.dtype) -> None:
    engine = load(inputs={"ids": (1, 4)}, outputs={"y": (1, 4)}, integers=["ids"], dtype=name)
    assert engine.inputs["ids"].dtype == torch.int64
    made = engine.run({"ids": torch.arange(4).view(1, 4)})["y"]
    assert made.dtype == dtype
    assert made.tolist() == [[0, 1, 2, 3]]


def test_addresses_are_set_once(load: Load) -> None:
    engine = load()
    buffers = {**values(), "y": torch.zeros(2, 3)}
    engine.bind(buffers)
    for seed in (3, 4):
        buffers["x"].copy_(values(seed)["x"])
        engine.enqueue()
        assert torch.equal(buffers["y"], buffers["x"] + buffers["t"])
    addresses = [f"set_tensor_address {name}" for name in ("x", "t", "y")]
    assert calls == ["set_device_memory", *addresses, "execute_async_v3", "execute_async_v3"]


def test_a_run_between_two_steps_does_not_move_the_bound_buffers(load: Load) -> None:
    engine = load()
    buffers = {**values(), "y": torch.zeros(2, 3)}
    engine.bind(buffers)
    engine.enqueue()
    first = engine.run(values(1))["y"]
    assert torch.equal(buffers["y"], expected(values()))
    second = engine.run(values(2))["y"]
    assert torch.equal(first, expected(values(1)))
    assert torch.equal(second, expected(values(2)))
    buffers["x"].zero_()
    engine.enqueue()
    assert torch.equal(buffers["y"], buffers["t"].expand(2, 3))


def test_a_run_keeps_neither_what_was_given_nor_what_was_made(load: Load) -> None:
    engine, inputs = load(), values()
    given, made = weakref.ref(inputs["x"]), weakref.ref(engine.run(inputs)["y"])
    inputs.clear()
    assert given() is None
    assert made() is None


def test_binding_again(load: Load) -> None:
    engine = load()
    old, new = ({**values(), "y": torch.zeros(2, 3)} for _ in range(2))
    engine.bind(old)
    engine.bind(new)
    engine.enqueue()
    assert torch.equal(new["y"], expected(values()))
    assert not old["y"].any()


def test_strided_inputs_of_a_run(load: Load) -> None:
    inputs = values()
    strided = {**inputs, "x": inputs["x"].T.contiguous().T}
    assert not strided["x"].is_contiguous()
    assert torch.equal(load().run(strided)["y"], expected(inputs))


# ---------------------------------------------------------------------------------------------------- memory and capture


def test_engines_that_run_one_after_the_other_share_their_memory(load: Load, memory: ActivationMemory) -> None:
    small, large = load(memory=256, scale=2.0), load(memory=4096, scale=3.0)
    for seed in range(2):
        assert torch.equal(small.run(values(seed))["y"], expected(values(seed), 2.0))
        assert torch.equal(large.run(values(seed))["y"], expected(values(seed), 3.0))
    assert isinstance(memory.gpu, FakeGpu)
    assert memory.gpu.blocks == [4096]


@pytest.mark.parametrize("library", [RTX, TENSORRT])
def test_a_captured_engine_replays_on_its_buffers_and_its_memory_whatever_is_loaded_after_it(
    load: Load, library: Library
) -> None:
    engine = load(library, memory=256, scale=2.0)
    buffers = {**values(), "y": torch.zeros(2, 3)}
    engine.bind(buffers)
    replay = CapturingRecorder().record(engine.enqueue)
    larger = load(library, memory=1 << 16)
    for seed in range(3):
        larger.run(values(seed))
        for name, tensor in values(seed).items():
            buffers[name].copy_(tensor)
        replay()
        assert torch.equal(buffers["y"], expected(values(seed), 2.0))


def test_a_plan_that_cannot_be_captured_runs_without(load: Load) -> None:
    engine = load(capturable=False)
    engine.bind({**values(), "y": torch.zeros(2, 3)})
    with pytest.raises(
        EngineMismatch, match="cannot be captured in a CUDA graph: use capture='off', or build it again"
    ):
        CapturingRecorder().record(engine.enqueue)
    engine.enqueue()


@pytest.mark.usefixtures("operators_only")
def test_the_sampling_loop_and_the_decoder_in_one_graph(load: Load, tiny_bundle: Path) -> None:
    """Over plans as step and decoder, what is captured gives what runs call by call, for a second image too."""
    bundle = Bundle.open(tiny_bundle)
    context, schedule = (bundle.load(bundle.find(part)[0], CPU) for part in ("context", "schedule"))
    table = ddim(NoiseSchedule.from_dict(bundle.manifest.model.schedule), 3)
    generator = torch.Generator().manual_seed(0)
    cond = {"encoder_hidden_states": torch.randn(77, 32, generator=generator)}
    hoisted = {**context.run({name: state[None] for name, state in cond.items()}), **_scheduled(schedule)}
    step_inputs = {"latents": (1, 4, 8, 8)} | {name: tuple(tensor.shape) for name, tensor in hoisted.items()}

    def loop(recorder: CapturingRecorder | None) -> tuple[Denoiser, Decoding]:
        step = load(inputs=step_inputs, outputs={"noise": (1, 4, 8, 8)}, scale=0.1, memory=4096)
        decoder = load(inputs={"latents": (1, 4, 8, 8)}, outputs={"image": (1, 3, 64, 64)}, memory=1 << 17)
        made = Denoiser(
            context, schedule, step, capacity=1, tokens=77, evaluations=4, with_noise=False, device=CPU,
            recorder=recorder,  # type: ignore[arg-type]
        )  # fmt: skip
        return made, Decoding(decoder, made.slots.x)

    captured, decoding = loop(CapturingRecorder())
    captured.capture(3, decoding.work)
    plain, reference = loop(None)
    for _ in range(2):
        latents = torch.randn(4, 8, 8, generator=generator)
        for denoiser, pictures in ((captured, decoding), (plain, reference)):
            denoiser.admit(0, latents=latents, table=table, guidance_scale=1.0, cond=cond, uncond=None)
            denoiser.steps(3, pictures.work)
            denoiser.release(0)
        assert not torch.equal(plain.latents(0), latents)
        assert torch.equal(captured.latents(0), plain.latents(0))
        assert torch.equal(decoding.images, reference.images)
        assert torch.equal(decoding.images.view(-1)[:256], captured.latents(0).view(-1))


def _scheduled(schedule: Engine) -> dict[str, torch.Tensor]:
    return schedule.run({"timesteps": torch.ones(1, dtype=schedule.inputs["timesteps"].dtype)})


@pytest.fixture
def operators_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorder sees torch's operators, not the native library's."""
    monkeypatch.setattr(ldmrt.slots, "sampler_step", sampler_step_reference)
    monkeypatch.setattr(native, "serves", lambda x: False)


def test_what_dies_in_which_order(load: Load, tmp_path: Path) -> None:
    engine = load(cache=tmp_path / "cache")
    engine.run(values())
    calls.clear()
    del engine
    assert calls == ["context destroyed", "cache destroyed", "engine destroyed"]


def test_a_strict_fake_notices_the_wrong_order(load: Load) -> None:
    engine = load()
    del engine._engine
    del engine
    assert violations == ["the engine died before its context"]
    violations.clear()


# ---------------------------------------------------------------------------------------------------- weights

REFIT: dict[str, Any] = {"refit": True, "weights": {"a": 2.0, "b": 3.0, "c": 1.0}, "joined": ["a", "b"]}
WEIGHTS = {name: TensorSpec(name, (1,), torch.float32) for name in ("a", "b", "c", "elsewhere")}


def numbers(**values: float) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([float(value)]) for name, value in values.items()}


def test_weights_change_in_a_plan_and_come_back(load: Load) -> None:
    parameters = Parameters.of(numbers(a=2, b=3, c=1, elsewhere=9), CPU)
    engine = load(**REFIT)
    engine.follow(parameters, WEIGHTS)
    buffers = {**values(), "y": torch.zeros(2, 3)}
    engine.bind(buffers)

    def scale() -> float:
        engine.enqueue()
        assert torch.equal(engine.run(values())["y"], buffers["y"])
        return float((buffers["y"] / expected(values())).mean())

    assert scale() == pytest.approx(6)
    parameters.update(numbers(a=5))  # what the library has joined with it, `b`, is given too
    assert scale() == pytest.approx(15)
    parameters.adjust({"c": lambda weight: weight + 1})
    assert scale() == pytest.approx(30)
    late = load(**REFIT)  # such as one for another batch size
    late.follow(parameters, WEIGHTS)
    assert torch.allclose(late.run(values())["y"], expected(values(), 30))
    parameters.restore()
    assert scale() == pytest.approx(12)
    parameters.adjust({"c": None})
    assert scale() == pytest.approx(6)
    with pytest.raises(EngineMismatch, match="no weight 'elsewhere' to change"):
        parameters.update(numbers(elsewhere=1))


def test_weights_that_a_plan_does_not_take(load: Load) -> None:
    with pytest.raises(EngineMismatch, match=r"does not take other weights; build it again .* --refit`"):
        load().follow(Parameters.of({}, CPU), WEIGHTS)
    parameters = Parameters.of(numbers(a=2, b=3, c=1), CPU)
    stubborn = load(**REFIT, stubborn=True)
    stubborn.follow(parameters, WEIGHTS)
    with pytest.raises(EngineMismatch, match=r"step \(tensorrt-rtx\) does not take other weights \(no reason given\)"):
        parameters.update(numbers(c=2))
    parameters = Parameters.of(numbers(a=2, b=3, c=1), CPU)
    load(**REFIT, dtype="HALF").follow(parameters, WEIGHTS)
    with pytest.raises(EngineMismatch, match=r"does not take the weight 'c' \(another type was expected\)"):
        parameters.update(numbers(c=2))
    parameters = Parameters.of(numbers(a=2, b=3, c=1), CPU)
    load(**REFIT).follow(parameters, {"a": WEIGHTS["a"]})
    with pytest.raises(EngineMismatch, match="does not take the weight 'b'"):
        parameters.update(numbers(a=2))


@pytest.mark.parametrize(
    ("budget", "held"), [(None, 1024), (0, 0), (3000, 3000), (1 << 40, 4096)], ids=["proposed", "none", "some", "all"]
)
def test_weights_in_the_hosts_memory(load: Load, memory: ActivationMemory, budget: int | None, held: int) -> None:
    engine = load(streamable=4096, weight_budget=budget)
    assert engine._engine.weight_streaming_budget_v2 == held
    assert torch.equal(engine.run(values())["y"], expected(values()))
    assert len(memory.block()) >= 1024 + 4096 - held


# ---------------------------------------------------------------------------------------------------- the runtime cache


def test_what_was_compiled_is_kept_after_the_first_run(load: Load, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    first = load(cache=cache)
    assert calls == ["compiled"]
    assert not cache.exists()
    first.bind({**values(), "y": torch.zeros(2, 3)})
    assert not cache.exists()
    first.enqueue()
    (kept,) = cache.rglob("*.cache")
    kept.unlink()
    first.enqueue()
    assert not kept.exists()


def test_the_next_process_compiles_nothing(memory: ActivationMemory, tmp_path: Path) -> None:
    plan = tmp_path / "a.plan"
    plan.write_bytes(write_plan(**SHAPES))
    for compiled in (["compiled"], []):
        calls.clear()
        engine = TensorRtEngine(plan, RTX, memory, label="a", cache=tmp_path)
        assert calls == compiled
        engine.run(values())
        del engine


def test_a_library_that_compiles_nothing_keeps_nothing(load: Load, tmp_path: Path) -> None:
    load(TENSORRT, cache=tmp_path / "cache").run(values())
    assert not (tmp_path / "cache").exists()


# ---------------------------------------------------------------------------------------------------- refusals


def test_enqueue_before_bind(load: Load) -> None:
    with pytest.raises(EngineMismatch, match="enqueue before bind"):
        load().enqueue()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": None}, "'x' is missing"),
        ({"x": torch.zeros(3, 2)}, r"'x' is \(3, 2\) float32, expected \(2, 3\) float32"),
        ({"x": torch.zeros(2, 3).half()}, r"'x' is \(2, 3\) float16, expected \(2, 3\) float32"),
        ({"x": torch.zeros(2, 3, device="meta")}, "'x' is on meta, expected cpu"),
    ],
)
def test_tensors_that_do_not_fit(load: Load, changed: dict[str, Any], message: str) -> None:
    engine = load()
    tensors = {name: tensor for name, tensor in {**values(), **changed}.items() if tensor is not None}
    with pytest.raises(EngineMismatch, match=f"input {message}"):
        engine.run(tensors)
    with pytest.raises(EngineMismatch, match=f"buffer {message}"):
        engine.bind({**tensors, "y": torch.zeros(2, 3)})
    assert "execute_async_v3" not in calls


def test_buffers_must_be_contiguous_and_complete(load: Load) -> None:
    engine = load()
    with pytest.raises(EngineMismatch, match=r"buffer 'x' has the strides \(1, 2\), expected it contiguous"):
        engine.bind({**values(), "x": torch.zeros(3, 2).T, "y": torch.zeros(2, 3)})
    with pytest.raises(EngineMismatch, match="buffer 'y' is missing"):
        engine.bind(values())


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"inputs": {"x": (-1, 3)}}, r"has 'x' of \(-1, 3\) FLOAT, expected fixed sizes"),
        ({"dtype": "INT8"}, r"has 'x' of \(2, 3\) INT8, expected fixed sizes and one of FLOAT"),
    ],
)
def test_plans_that_are_not_for_this_runtime(load: Load, plan: dict[str, Any], message: str) -> None:
    with pytest.raises(BundleError, match=message):
        load(**plan)


@pytest.mark.parametrize(
    ("library", "plan", "kind", "reason"),
    [
        (RTX, {"version": "1.6.0.1"}, EngineMismatch, "VERSION_MISMATCH"),
        (RTX, {"version": "1.6.0.1", "targets": ["sm_120"]}, EngineMismatch, "VERSION_MISMATCH, UNSUPPORTED_CC"),
        (TENSORRT, {"version": "10.13.2.6"}, EngineMismatch, "Serialization assertion failed."),
    ],
)
def test_a_plan_that_the_library_refuses(
    load: Load, library: Library, plan: dict[str, Any], kind: type[Exception], reason: str
) -> None:
    with pytest.raises(kind) as caught:
        load(library, **plan)
    assert f"step (tensorrt-rtx): {library.kind} 1.7.1.116 does not load " in str(caught.value)
    assert f"({reason}); see `ldmrt doctor`, or build it again with `ldmrt build-engines" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"), [(b"foreign", "MALFORMED_ENGINE"), (b"", "cannot be read"), (None, "cannot be read")]
)
def test_a_file_that_is_no_plan(memory: ActivationMemory, tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "a.plan"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(BundleError, match=message):
        TensorRtEngine(file, RTX, memory, label="a")


def test_what_the_library_fails_at(load: Load) -> None:
    with pytest.raises(EngineMismatch, match=r"cannot be made ready \(no reason given\)"):
        load(unfit=True)
    engine = load()
    for reason in ("an illegal address", "no memory"):
        engine._engine._plan["fails"] = reason
        with pytest.raises(EngineMismatch, match=rf"fails \({reason}\); see `ldmrt doctor`, or use --engine torch"):
            engine.run(values())


def test_an_error_that_did_no_harm_is_no_reason(load: Load) -> None:
    log(TENSORRT).log(fake_tensorrt.ILogger.Severity.ERROR, "an old story")
    with pytest.raises(EngineMismatch, match="Serialization assertion failed"):
        load(TENSORRT, version="10.13.2.6")


# ---------------------------------------------------------------------------------------------------- the library itself


@pytest.mark.rtx
def test_the_library_refuses_a_foreign_file(memory: ActivationMemory, tmp_path: Path) -> None:
    file = tmp_path / "a.plan"
    file.write_bytes(b"x" * 4096)
    with pytest.raises(BundleError, match="MALFORMED_ENGINE"):
        TensorRtEngine(file, LIBRARIES["tensorrt-rtx"], memory, label="a")


@pytest.mark.gpu
def test_a_plan_on_the_gpu(tmp_path: Path) -> None:
    """Built, run, captured and replayed; and what was compiled at run time is kept."""
    pytest.importorskip("onnx")
    library = next((one for one in LIBRARIES.values() if _runs(one)), None)
    if library is None:
        pytest.skip("no TensorRT library that runs on this GPU")
    gpu = Gpu(torch.device("cuda"))
    plan = _relu_plan(library, tmp_path / "relu.plan", gpu.architecture)
    engine = TensorRtEngine(plan, library, ActivationMemory(gpu), label="relu", cache=tmp_path / "cache")
    x = torch.randn(2, 3, device=gpu.device)
    assert torch.equal(engine.run({"x": x})["y"], x.relu())
    assert bool(list(tmp_path.rglob("*.cache"))) == library.compiles_at_run_time
    y = torch.zeros_like(x)
    engine.bind({"x": x, "y": y})
    from ldmrt.capture import Recorder

    replay = Recorder(gpu.device).record(engine.enqueue)
    for _ in range(3):
        x.normal_()
        replay()
        assert torch.equal(y, x.relu())


def _runs(library: Library) -> bool:
    try:
        library.load()
    except EngineMismatch:
        return False
    return library.targets is None or Gpu(torch.device("cuda")).architecture in library.targets


def _relu_plan(library: Library, path: Path, architecture: str) -> Path:
    from onnx import TensorProto, helper, save

    from ldmrt.export.tensorrt import build_plan

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, (2, 3)) for name in ("x", "y")]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "relu", values[:1], values[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    save(model, path.with_suffix(".onnx"))
    build_plan(library, path.with_suffix(".onnx"), path, targets=(architecture,))
    return path
