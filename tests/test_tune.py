"""Tuning with a stub for the clock: what is asked, what is chosen, what is kept; and the command."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmrt import choices, tune
from ldmrt.bundle import Bundle
from ldmrt.choices import OPERATORS, Machine
from ldmrt.cli import app
from ldmrt.cli.tune import describe, show
from ldmrt.errors import BadRequest, EngineMismatch
from ldmrt.export import cubins
from ldmrt.graph import Graph, Node
from ldmrt.kernels import geglu, launch, ops, tuning
from ldmrt.kernels.tuning import Call, Form
from ldmrt.opening import builtin_bundle
from ldmrt.pipeline import Pipeline

CUDA = torch.device("cuda", 0)
MACHINE = Machine(gpu="A GPU", capability=89, driver="1.2", torch="2.13", triton="3.7", kernels={})


@pytest.fixture(autouse=True)
def _nothing_chosen() -> Iterator[None]:
    tuning.clear()
    yield
    tuning.clear()


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    return Bundle.open(tiny_bundle)


class Clock:
    """Says that candidates take so much of the default's time: by number, the others as long as the default.

    Attributes:
        asked: what was timed.
    """

    def __init__(self, shares: Mapping[int, float] | None = None, missing: Sequence[int] = ()) -> None:
        self.asked: list[tuple[Call, tuple[Any, ...]]] = []
        self._shares = shares or {}
        self._missing = set(missing)

    def __call__(self, call: Call, candidates: Sequence[Any]) -> dict[Any, float]:
        self.asked.append((call, tuple(candidates)))
        numbers = {each: number for number, each in enumerate(OPERATORS[call.operator].candidates(89, call.problem))}
        return {
            each: 1e-4 * self._shares.get(numbers[each], 1.0)
            for each in candidates
            if numbers[each] not in self._missing
        }


def run(bundle: Bundle, place: Path, timer: tune.Timer, machine: Machine = MACHINE) -> tune.Report:
    return tune.tune(bundle, CUDA, place, machine=machine, timer=timer)


# ---------------------------------------------------------------------------------------------------- what is asked


def test_the_problems_are_those_of_all_engines(bundle: Bundle, tmp_path: Path) -> None:
    clock = Clock()
    report = run(bundle, tmp_path, clock)
    asked = [call for call, _ in clock.asked]
    assert len(set(asked)) == len(asked)
    assert {call.operator for call in asked} == set(OPERATORS)
    assert {(each.operator, each.problem) for each in report.measurements} == {
        (call.operator, call.problem) for call in asked
    }
    # As many calls as the graphs have nodes, each engine run once.
    graphs = [bundle.graph(record) for record in bundle.manifest.engines]
    nodes = [node.op for graph in graphs for node in graph.nodes if not _for_the_library(graph, node)]
    expected = {name: nodes.count(f"ldmrt.{name}.default") for name in OPERATORS}
    # By default a library multiplies, and then comes a GEGLU.
    expected["geglu"] += expected["linear_geglu"]
    for name in OPERATORS:
        assert sum(each.calls for each in report.measurements if each.operator == name) == expected[name] > 0


def _for_the_library(graph: Graph, node: Node) -> bool:
    """Whether it is a convolution that does not keep the sides: there is nothing to choose."""
    if node.op != "ldmrt.conv2d.default":
        return False
    _, weight, _, padding = node.args
    shapes = {spec.name: spec.shape for spec in graph.weights.values()} | {
        each.name: each.shape for each in graph.nodes
    }
    side = shapes[weight.name][2]
    assert isinstance(side, int)
    return bool(padding != side // 2)


def test_text_has_the_length_of_the_encoder_s_window() -> None:
    shapes = Bundle.open(builtin_bundle())
    (encoder,) = shapes.find("text_encoder")
    assert tune._window(shapes.graph(encoder)) == 20
    assert tune._window(shapes.graph(shapes.find("step")[0])) == 0


def test_the_candidates_are_timed_on_what_the_kernels_of_the_bundle_are_compiled_for(bundle: Bundle) -> None:
    """The collected calls launch the same kernels as the engines that `build-engines --target` runs."""
    graphs = [bundle.graph(record) for record in bundle.find("step")]
    calls = tune.collect({record.key: bundle.graph(record) for record in bundle.find("step")}, 89)
    with launch.recording(89) as variants:
        for counter in calls.values():
            for call in counter:
                arguments = [
                    torch.empty_strided(each.shape, each.strides, dtype=each.dtype, device="meta")
                    if isinstance(each, Form)
                    else each
                    for each in call.arguments
                ]
                ops.OPERATORS[f"ldmrt.{call.operator}.default"](*arguments)
    expected = {variant for variant in cubins.variants(graphs, 89) if not variant.kernel.startswith("sampler.")}
    assert set(variants) == expected
    assert expected


def test_only_engines_of_the_precision_in_use(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(EngineMismatch, match="float16"):
        tune.tune(bundle, CUDA, tmp_path, dtype="float16", machine=MACHINE, timer=Clock())
    assert list(tmp_path.iterdir()) == []


def test_without_triton_only_what_is_there_is_timed(bundle: Bundle, tmp_path: Path) -> None:
    """A bundle brings the kernels of the defaults; torch's own attention is always there."""
    clock = Clock()
    machine = MACHINE.model_copy(update={"triton": None})
    report = run(bundle, tmp_path, clock, machine)
    total = 0
    for call, candidates in clock.asked:
        every = OPERATORS[call.operator].candidates(89, call.problem)
        total += len(every) - len(candidates)
        others = [each for each in candidates if each != every[0]]
        assert every[0] in candidates
        assert [each.body for each in others] == ["sdpa"] * len(others)
    assert report.skipped == sum(each.skipped for each in report.measurements) > 0


# ---------------------------------------------------------------------------------------------------- what is chosen


@pytest.mark.parametrize(("share", "number"), [(0.5, 1), (0.96, 1), (0.98, 0), (1.0, 0), (1.5, 0)])
def test_another_is_chosen_if_it_is_faster_by_more_than_the_noise(
    bundle: Bundle, tmp_path: Path, share: float, number: int
) -> None:
    report = run(bundle, tmp_path, Clock({1: share}))
    for each in report.measurements:
        candidates = OPERATORS[each.operator].candidates(89, each.problem)
        chosen = candidates[min(number, len(candidates) - 1)]
        assert (each.default, each.choice) == (candidates[0], chosen)
        assert each.default_seconds == pytest.approx(1e-4)
        assert each.seconds == pytest.approx(1e-4 * (share if chosen != candidates[0] else 1))
        assert OPERATORS[each.operator].choose(89, each.problem) == chosen
    # What is saved is saved in the engines, each run once, by what has another candidate.
    saved = [engine.default_seconds - engine.seconds for engine in report.engines]
    assert sum(saved) == pytest.approx(sum(each.calls * (1e-4 - each.seconds) for each in report.measurements))
    for engine, seconds in zip(report.engines, saved, strict=True):
        assert 0 <= seconds <= (1 - share) * engine.default_seconds * (1 + 1e-9) if number else seconds == 0
        assert (seconds > 0) == (number > 0)


def test_the_calls_of_a_problem_are_weighted() -> None:
    """Ten small calls and one large one: what is better for the ten may lose."""
    problem = geglu.Problem(4096, 1280, torch.float16)
    default, other = geglu.OPERATOR.candidates(89, problem)[:2]
    small, large = (Call("geglu", problem, (Form((rows, 2560), (2560, 1), 0, torch.float16),)) for rows in (1024, 4096))
    times = {small: {default: 10e-6, other: 8e-6}, large: {default: 100e-6, other: 130e-6}}
    offered = {call: dict(table) for call, table in times.items()}

    def measured(often: int) -> tuple[tune.Measurement | None, dict[Call, tuple[float, float]], int]:
        counter = Counter({small: often, large: 1})
        return tune._measure(counter, geglu.OPERATOR, MACHINE, lambda call, candidates: offered[call])

    few, seconds, _ = measured(10)
    assert few is not None
    assert (few.choice, few.calls) == (default, 11)
    assert few.default_seconds == pytest.approx((10 * 10e-6 + 100e-6) / 11)
    assert seconds == {small: (10e-6, 10e-6), large: (100e-6, 100e-6)}
    many, seconds, _ = measured(40)
    assert many is not None
    assert many.choice == other
    assert seconds == {small: (10e-6, 8e-6), large: (100e-6, 130e-6)}


def test_what_cannot_be_launched_is_left_out_and_counted(bundle: Bundle, tmp_path: Path) -> None:
    report = run(bundle, tmp_path, Clock({1: 0.1, 2: 0.5}, missing=[1]))
    for each in report.measurements:
        candidates = OPERATORS[each.operator].candidates(89, each.problem)
        assert each.choice == candidates[2 if len(candidates) > 2 else 0]
        assert each.skipped == (len(candidates) > 1)
    assert report.skipped == sum(each.skipped for each in report.measurements)


def test_a_default_that_cannot_be_launched_gives_way(bundle: Bundle, tmp_path: Path) -> None:
    report = run(bundle, tmp_path, Clock({1: 5.0, 2: 7.0}, missing=[0]))
    assert report.measurements
    for each in report.measurements:
        assert each.choice != each.default
        assert each.default_seconds is None
    assert all(engine.default_seconds == engine.seconds > 0 for engine in report.engines)
    assert choices.load(tmp_path, MACHINE) == len(report.measurements)


def test_where_nothing_can_be_launched(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(EngineMismatch, match=r"none of \d+ candidates can be launched on A GPU"):
        run(bundle, tmp_path, Clock(missing=range(20)))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------- what is kept


def contents(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_the_choices_are_kept_beside_the_bundle_and_count_in_the_next_process(bundle: Bundle, tmp_path: Path) -> None:
    before = contents(bundle.path)
    report = run(bundle, tmp_path, Clock({1: 0.5}))
    assert contents(bundle.path) == before
    assert [path.name for path in tmp_path.iterdir()] == [report.path.name]
    step = bundle.graph(bundle.find("step")[0])
    tuned = cubins.variants([step], 89)
    tuning.clear()
    untuned = cubins.variants([step], 89)
    assert choices.load(tmp_path, MACHINE) == len(report.measurements)
    assert cubins.variants([step], 89) == tuned != untuned


def test_tuning_another_bundle_adds_to_the_file(bundle: Bundle, tiny_bundle_v: Path, tmp_path: Path) -> None:
    first = run(bundle, tmp_path, Clock({1: 0.5}))
    second = run(Bundle.open(tiny_bundle_v), tmp_path, Clock())
    both = {(each.operator, each.problem) for each in (*first.measurements, *second.measurements)}
    assert choices.load(tmp_path, MACHINE) == len(both) > len(first.measurements)
    # Of what both have, the later measurement counts.
    for each in second.measurements:
        assert OPERATORS[each.operator].choose(89, each.problem) == each.default


# ---------------------------------------------------------------------------------------------------- the clock


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> torch.device:
    """A CPU for which kernels seem to be ready, whose graphs are plain calls and whose events are a table."""

    class Recorder:
        def __init__(self, device: torch.device) -> None:
            pass

        def record(self, work: Callable[[], None]) -> Callable[[], None]:
            work()
            return work

    monkeypatch.setattr(tune, "Recorder", Recorder)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(launch, "ready", lambda device: True)
    monkeypatch.setattr(launch, "architecture", lambda device: 89)
    return torch.device("cpu")


def test_each_candidate_is_recorded_as_chosen_and_timed_in_turn(
    fake_gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = geglu.Problem(4, 64, torch.float16)
    candidates = geglu.OPERATOR.candidates(89, problem)
    computed: list[object] = []

    def operator(x: torch.Tensor) -> None:
        assert x.shape == (4, 128)
        chosen = geglu.OPERATOR.choose(89, problem)
        if chosen == candidates[1]:
            raise RuntimeError("out of shared memory")
        computed.append(chosen)

    def alternate(cases: Mapping[str, object], **_: object) -> dict[str, list[float]]:
        if "once" in cases:
            return {"once": [1e-3, 4e-4, 5e-4]}  # five of these are as long as one graph should be
        return {name: [(int(name) + 1) * 1e-3] * 2 + [9.0] for name in cases}

    monkeypatch.setitem(ops.OPERATORS, "ldmrt.geglu.default", operator)
    monkeypatch.setattr(tune, "alternate", alternate)
    call = Call("geglu", problem, (Form((4, 128), (128, 1), 0, torch.float16),))
    found = tune.Stopwatch(fake_gpu)(call, candidates)
    assert found == {
        each: pytest.approx((number + 1) * 1e-3 / 5) for number, each in enumerate(candidates) if number != 1
    }
    assert computed == [each for number, each in enumerate(candidates) if number != 1 for _ in range(5)]
    assert geglu.OPERATOR.choose(89, problem) == candidates[0]


def test_without_kernels_there_is_nothing_to_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "ready", lambda device: False)
    monkeypatch.setattr(launch, "describe", lambda device: "plain torch: LDMRT_KERNELS=reference switches them off")
    with pytest.raises(EngineMismatch, match="nothing to tune, the operators run in plain torch: LDMRT_KERNELS"):
        tune.Stopwatch(CUDA)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.bool])
def test_arguments_are_made_as_they_were(dtype: torch.dtype) -> None:
    for form in (
        Form((2, 3, 4), (24, 4, 1), 0, dtype),
        Form((2, 3, 4), (48, 12, 1), 5, dtype),
        Form((2, 3, 4), (12, 1, 3), 8, dtype),
        Form((2, 3, 4), (0, 0, 1), 0, dtype),
        Form((), (), 0, dtype),
    ):
        made = tune._made(form, torch.device("cpu"))
        assert Form.of(made) == form
        assert made.count_nonzero() > 0
    assert tune._made(1e-5, torch.device("cpu")) == 1e-5


# ---------------------------------------------------------------------------------------------------- the command


Ended = tuple[int, str, str]


@pytest.fixture
def ldmrt(capsys: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    def call(*args: object) -> Ended:
        with pytest.raises(SystemExit) as caught:
            app(["tune", *map(str, args)], prog_name="ldmrt")
        captured = capsys.readouterr()
        return int(caught.value.code or 0), captured.out, captured.err

    return call


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A GPU and its clock for the command. Gives the cache folder."""
    monkeypatch.setenv("LDMRT_CACHE", str(tmp_path))
    monkeypatch.setattr(tune, "find_gpu", lambda device: CUDA)
    monkeypatch.setattr(tune, "machine_with", lambda device: MACHINE)
    monkeypatch.setattr(tune, "Stopwatch", lambda device: Clock({1: 0.5, 2: 0.25}))
    return tmp_path


def test_help(ldmrt: Callable[..., Ended]) -> None:
    code, out, err = ldmrt("--help")
    assert (code, err) == (0, "")
    assert "Usage: ldmrt tune" in out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(
    ldmrt: Callable[..., Ended], tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("LDMRT_CACHE", str(tmp_path))
    monkeypatch.delenv("LDMRT_DEVICE", raising=False)
    for args in ((), ("--json",), ("--device", "cuda"), ("--engines", tiny_bundle)):
        code, out, err = ldmrt(*args)
        assert (code, out) == (1, "")
        assert err.startswith("ldmrt: tuning times kernels on a GPU, and torch ")
        assert err.count("\n") == 1
    code, out, err = ldmrt("--device", "cpu")
    assert (code, out) == (1, "")
    assert err == "ldmrt: --device is 'cpu', and tuning times kernels on a GPU; use cuda\n"
    assert list(tmp_path.iterdir()) == []


def test_which_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert tune.find_gpu(None) == tune.find_gpu("auto") == tune.find_gpu("cuda") == torch.device("cuda", 1)
    assert tune.find_gpu("cuda:0") == torch.device("cuda", 0)
    with pytest.raises(BadRequest, match="'cuda:2' was asked for, and torch sees 2 GPUs"):
        tune.find_gpu("cuda:2")


def test_as_json(ldmrt: Callable[..., Ended], tiny_bundle: Path, stubbed: Path) -> None:
    code, out, err = ldmrt("--engines", tiny_bundle, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    path = Path(document["kept_in"])
    assert path == stubbed / "kernels" / "a-gpu.json"
    assert len(choices.read(path, MACHINE)) == len(document["problems"]) > 0
    assert document["machine"]["gpu"] == "A GPU"
    for each in document["problems"]:
        assert each["changed"] == (each["us"] < each["default_us"]) == (each["choice"] != each["default"])
    steps = [each for each in document["engines"] if each["component"] == "step"]
    assert [each["engine"] for each in steps] == [record.label for record in Bundle.open(tiny_bundle).find("step")]
    assert all(0 < each["us"] < each["default_us"] for each in steps)


def test_as_a_table(ldmrt: Callable[..., Ended], tiny_bundle: Path, stubbed: Path) -> None:
    code, out, err = ldmrt("--engines", tiny_bundle)
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0].split() == ["operator", "problem", "calls", "default", "us", "best", "us", "choice"]
    assert any(
        line.startswith("attention") and " head_size=8 heads=4 " in line and "block_m=" in line for line in lines
    )
    step = next(line for line in lines if line.startswith("step (torch, float32, 64x64, 2 rows)"))
    default, best, saved = map(float, step.split()[-3:])
    assert saved == pytest.approx(default - best, abs=0.11)
    assert saved > 0
    assert " problems timed on A GPU, " in lines[-2]
    assert lines[-1] == f"kept in {stubbed / 'kernels' / 'a-gpu.json'}"


def test_a_default_that_cannot_be_launched_has_no_time(capsys: pytest.CaptureFixture[str]) -> None:
    problem = geglu.Problem(4, 64, torch.float16)
    choice = geglu.OPERATOR.candidates(89, problem)[0]
    found = tune.Measurement("geglu", problem, 3, choice, choice, None, 1e-5, 2)
    report = tune.Report(MACHINE, Path("there.json"), (found,), (), 2)
    document = describe(report)
    assert document["problems"][0]["default_us"] is None
    show(document)
    assert capsys.readouterr().out.splitlines()[1].split()[-4:] == ["3", "-", "10.0", "default"]


def test_nothing_of_the_build_is_imported() -> None:
    code = (
        "import sys, ldmrt.tune, ldmrt.cli.tune; print([n for n in sys.modules if n.startswith('ldmrt.export') or n in "
        "('diffusers', 'transformers', 'onnx')])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---------------------------------------------------------------------------------------------------- a real GPU


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu(
    ldmrt: Callable[..., Ended], tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tuned from end to end, then a picture with the choices: that without them within 1e-3, since sums change their order."""
    monkeypatch.setenv("LDMRT_CACHE", str(tmp_path))
    arguments: dict[str, Any] = {"num_inference_steps": 4, "seed": 3, "output_type": "latent"}
    untuned = Pipeline.from_bundle(tiny_bundle, device="cuda")("a test", **arguments).latents
    code, out, err = ldmrt("--engines", tiny_bundle, "--json")
    assert (code, err) == (0, "")
    document = json.loads(out)
    assert {each["operator"] for each in document["problems"]} == set(OPERATORS)
    assert all(each["us"] > 0 for each in document["problems"])
    tuning.clear()
    tuned = Pipeline.from_bundle(tiny_bundle, device="cuda")
    for each in document["problems"]:
        operator = OPERATORS[each["operator"]]
        fields = {**each["problem"], "dtype": getattr(torch, each["problem"]["dtype"])}
        chosen = operator.choose(launch.architecture(CUDA), operator.problem(**fields))
        assert choices.encoded(chosen) == each["choice"]
    latents = tuned("a test", **arguments).latents
    assert float((latents - untuned).double().norm() / untuned.double().norm()) < 1e-3
