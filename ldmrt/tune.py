"""Which kernels are the fastest on the GPU at hand, for the problems that a bundle's engines have.

The engines' graphs run on the meta device, and what the operators are asked for is collected; then each candidate of each problem is
timed, weighted by how often the problem occurs. A default stays unless another is faster by more than the noise.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ldmrt import choices
from ldmrt.bench.measure import alternate
from ldmrt.bundle import Bundle
from ldmrt.capture import Recorder
from ldmrt.choices import OPERATORS, Machine, machine_with
from ldmrt.config import parse_device
from ldmrt.errors import BadRequest, BundleError, EngineMismatch
from ldmrt.graph import Graph
from ldmrt.kernels import launch, ops, tuning
from ldmrt.kernels.tuning import Call, Form
from ldmrt.loader import EngineLoader
from ldmrt.manifest import EngineRecord
from ldmrt.rehearsal import rehearse

# By how much of the default's time another choice must be faster.
NOISE = 0.03

# Free dimensions are given what a request usually has: a prompt and its negative, in one window of the text encoder.
_ROWS = 2
_TOKENS = 77

# A single kernel may take a few microseconds, less than its launch: several in a row are timed as one CUDA graph, of about this long.
_IN_A_ROW = 20
_SECONDS = 2e-3
_ROUNDS = 9

Timer = Callable[[Call, Sequence[Any]], Mapping[Any, float]]
"""Gives the seconds of a call with each of some choices; a choice that cannot be launched is left out."""

Progress = Callable[[str, int, int], None]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measurement:
    """What was found for a problem.

    Attributes:
        operator: the operator's name.
        problem: the problem.
        calls: how often the engines have it, each run once.
        default: what computes it untuned.
        choice: what is to compute it from now on.
        default_seconds: of a call with the default, the mean of the calls; None if it cannot be launched.
        seconds: of a call with the choice.
        skipped: how many candidates could not be launched.
    """

    operator: str
    problem: Any
    calls: int
    default: Any
    choice: Any
    default_seconds: float | None
    seconds: float
    skipped: int


@dataclass(frozen=True)
class Measured:
    """What `measure` found.

    Attributes:
        problems: how many there are.
        measurements: of those that have a candidate that can be launched, what takes longest first.
        seconds: by graph, what its tuned operators take in one run with the defaults, and with the choices.
        skipped: how many candidates could not be launched.
    """

    problems: int
    measurements: tuple[Measurement, ...]
    seconds: Mapping[str, tuple[float, float]]
    skipped: int


@dataclass(frozen=True)
class EngineTimes:
    """Seconds that the tuned operators of an engine take in one run.

    Attributes:
        engine: which.
        default_seconds: with the defaults.
        seconds: with the choices.
    """

    engine: EngineRecord
    default_seconds: float
    seconds: float


@dataclass(frozen=True)
class Report:
    """What `tune` found.

    Attributes:
        machine: where.
        path: the file where it is kept.
        measurements: by problem, what takes longest first.
        engines: what it means for each engine.
        skipped: how many candidates could not be launched, those of problems included of which none could.
    """

    machine: Machine
    path: Path
    measurements: tuple[Measurement, ...]
    engines: tuple[EngineTimes, ...]
    skipped: int


def find_gpu(device: str | None) -> torch.device:
    """The GPU to tune for.

    Args:
        device: `cuda`, `cuda:N`, or `auto` or None for the current one.

    Raises:
        BadRequest: there is none, or not this one.
    """
    name = parse_device(device or "auto")
    if name == "cpu":
        raise BadRequest("device is 'cpu', and tuning times kernels on a GPU; use cuda", param="device")
    count = torch.cuda.device_count()
    if count == 0:
        raise BadRequest(
            f"tuning times kernels on a GPU, and torch {torch.__version__} finds none here; "
            "run `ldmrt tune` on the machine that has it"
        )
    found = torch.device("cuda" if name == "auto" else name)
    index = torch.cuda.current_device() if found.index is None else found.index
    if index >= count:
        raise BadRequest(f"device {name!r} was asked for, and torch sees {count} GPUs here; use cuda", param="device")
    return torch.device("cuda", index)


def tune(
    bundle: Bundle,
    device: torch.device,
    place: Path,
    *,
    dtype: str | None = None,
    on_progress: Progress = lambda what, done, total: None,
    machine: Machine | None = None,
    timer: Timer | None = None,
) -> Report:
    """Time the candidates for the problems of a bundle's torch engines, and keep the fastest. They count in this process, too.

    Args:
        bundle: the bundle; it stays as it is.
        device: the GPU.
        place: the folder to keep the choices in, `choices.folder(os.environ)` for a pipeline to find them.
        dtype: the precision of the engines where the bundle has several; None for the one that is used on a GPU.
        on_progress: called with what is timed, how many problems are done, and how many there are.
        machine: what the measurement holds for; None for the machine with the device.
        timer: what times; None for a `Stopwatch`.

    Raises:
        EngineMismatch: the bundle has no torch engine, or no kernel can be launched.
        BundleError: the bundle is damaged.
        OSError: the choices cannot be written.
    """
    loader = EngineLoader(bundle, device, "torch", dtype)
    components = dict.fromkeys(record.component for record in bundle.manifest.engines if record.kind == "torch")
    records = [record for component in components for record in loader.records(component)]
    machine = machine or machine_with(device)
    if timer is None:
        _register_kernels(bundle)
        timer = Stopwatch(device)

    on_progress("reading the engines", 0, 1)
    graphs = {record.key: bundle.graph(record) for record in records}
    found = measure(graphs, machine, timer, on_progress=on_progress)
    if found.problems and not found.measurements:
        raise EngineMismatch(
            f"none of {found.skipped} candidates can be launched on {machine.gpu}: run with --verbose to see why each was skipped"
        )
    entries = [
        choices.entry(each.operator, each.problem, each.choice, each.default_seconds, each.seconds)
        for each in found.measurements
    ]
    path = choices.keep(place, machine, entries)
    for each in found.measurements:
        tuning.override(each.operator, machine.capability, each.problem, each.choice)
    engines = (EngineTimes(record, *found.seconds[record.key]) for record in records)
    return Report(
        machine=machine,
        path=path,
        measurements=found.measurements,
        engines=tuple(each for each in engines if each.default_seconds > 0),
        skipped=found.skipped,
    )


def measure(
    graphs: Mapping[str, Graph],
    machine: Machine,
    timer: Timer,
    *,
    on_progress: Progress = lambda what, done, total: None,
) -> Measured:
    """Time the candidates for the problems of some graphs' torch engines. Nothing is changed.

    Args:
        graphs: by a name each.
        machine: what the measurement holds for.
        timer: what times.
        on_progress: called with what is timed, how many problems are done, and how many there are.
    """
    calls = collect(graphs, machine.capability)
    problems: dict[tuple[str, Any], Counter[Call]] = {}
    for counter in calls.values():
        for call, count in counter.items():
            problems.setdefault((call.operator, call.problem), Counter())[call] += count

    found: list[Measurement] = []
    times: dict[Call, tuple[float, float]] = {}
    skipped = 0
    for done, (key, counter) in enumerate(problems.items()):
        on_progress(key[0], done, len(problems))
        best, seconds, failed = _measure(counter, OPERATORS[key[0]], machine, timer)
        skipped += failed
        if best is not None:
            found.append(best)
            times |= seconds
    return Measured(
        problems=len(problems),
        measurements=tuple(sorted(found, key=lambda each: -each.calls * each.seconds)),
        seconds={name: _sums(calls[name], times) for name in graphs},
        skipped=skipped,
    )


class Stopwatch:
    """Times calls on a GPU as they run in a pipeline: in a CUDA graph, without the time that launches take.

    Args:
        device: the GPU.

    Raises:
        EngineMismatch: no kernel can be launched on it.
    """

    def __init__(self, device: torch.device) -> None:
        if not launch.ready(device):
            raise EngineMismatch(
                f"there is nothing to tune, the operators run in {launch.describe(device)}; install ldmrt[triton], or build "
                "the bundle for this GPU"
            )
        self._device = device

    def __call__(self, call: Call, candidates: Sequence[Any]) -> dict[Any, float]:
        """The median seconds of a call with each of the candidates that can be launched."""
        function = ops.OPERATORS[f"ldmrt.{call.operator}.default"]
        names = {str(number): candidate for number, candidate in enumerate(candidates)}
        arch = launch.architecture(self._device)
        recorder = Recorder(self._device)
        replays: dict[str, Callable[[], None]] = {}
        count = 0
        with torch.inference_mode(), torch.cuda.device(self._device):
            arguments = arguments_of(call, self._device)

            def several() -> None:
                for _ in range(count):
                    function(*arguments)

            for name, candidate in names.items():
                with tuning.trying(call.operator, arch, call.problem, candidate):
                    try:
                        count = count or self._count(lambda: function(*arguments))
                        replays[name] = recorder.record(several)
                    except Exception as error:  # noqa: BLE001 - a compiler may raise anything, and then this is no candidate
                        _log.info("%s %s cannot run %s: %s", call.operator, call.problem, candidate, error)
            found = alternate(replays, runs=_ROUNDS, device=self._device)
        return {names[name]: median(seconds) / count for name, seconds in found.items()}

    def _count(self, work: Callable[[], object]) -> int:
        """How many in a row take about `_SECONDS`."""
        once = min(alternate({"once": work}, runs=3, device=self._device)["once"])
        return max(1, min(_IN_A_ROW, int(_SECONDS / once)))


def _made(argument: Any, device: torch.device) -> Any:
    if not isinstance(argument, Form):
        return argument
    last = sum((size - 1) * stride for size, stride in zip(argument.shape, argument.strides, strict=True))
    elements = argument.offset + last + 1
    if argument.dtype.is_floating_point:
        storage = torch.randn(elements, dtype=argument.dtype, device=device)
    else:
        storage = torch.ones(elements, dtype=argument.dtype, device=device)
    return storage.as_strided(argument.shape, argument.strides, argument.offset)


def collect(graphs: Mapping[str, Graph], arch: int) -> dict[str, Counter[Call]]:
    """What the operators are asked for in a run of each graph's engine on an architecture, such as 89, by the graph's name."""
    sizes = {"rows": _ROWS, "tokens": max((_window(graph) for graph in graphs.values()), default=0) or _TOKENS}
    found: dict[str, Counter[Call]] = {}
    for name, graph in graphs.items():
        with launch.recording(arch), tuning.recording() as calls:
            rehearse(graph, sizes)
        found[name] = Counter(calls)
    return found


def arguments_of(call: Call, device: torch.device) -> list[Any]:
    """New arguments for a call: tensors of its forms, with numbers, since zeros are multiplied at less power and a higher clock."""
    return [_made(argument, device) for argument in call.arguments]


def _window(graph: Graph) -> int:
    """The tokens of a text encoder's window; 0 for what is none."""
    shapes = [spec.shape for spec in graph.inputs if spec.name == "input_ids"]
    return next((shape[1] for shape in shapes if isinstance(shape[1], int)), 0)


def _measure(
    counter: Counter[Call], operator: tuning.Operator[Any, Any], machine: Machine, timer: Timer
) -> tuple[Measurement | None, dict[Call, tuple[float, float]], int]:
    """The calls of one problem: what is best for it, of each call the seconds with the default and with that, and how many
    candidates could not be launched.
    """
    problem = next(iter(counter)).problem
    candidates = operator.candidates(machine.capability, problem)
    default = candidates[0]
    # Without Triton there are only the kernels that bundles bring, which are the defaults.
    left = [each for each in candidates if machine.triton is not None or each == default or not operator.launches(each)]
    seconds: dict[Call, Mapping[Any, float]] = {}
    for call in counter:
        seconds[call] = timer(call, left)
        left = [each for each in left if each in seconds[call]]
    skipped = len(candidates) - len(left)
    if not left:
        return None, {}, skipped
    means = {
        each: sum(count * seconds[call][each] for call, count in counter.items()) / counter.total() for each in left
    }
    choice = min(means, key=lambda each: means[each])
    if default in means and means[choice] >= (1 - NOISE) * means[default]:
        choice = default
    measurement = Measurement(
        operator=operator.name,
        problem=problem,
        calls=counter.total(),
        default=default,
        choice=choice,
        default_seconds=means.get(default),
        seconds=means[choice],
        skipped=skipped,
    )
    compared = default if default in means else choice
    return measurement, {call: (seconds[call][compared], seconds[call][choice]) for call in counter}, skipped


def _sums(counter: Counter[Call], times: Mapping[Call, tuple[float, float]]) -> tuple[float, float]:
    known = [(count, times[call]) for call, count in counter.items() if call in times]
    return sum(count * default for count, (default, _) in known), sum(count * chosen for count, (_, chosen) in known)


def _register_kernels(bundle: Bundle) -> None:
    """Make the bundle's compiled kernels known to the launcher.

    Raises:
        BundleError: a file is missing or damaged.
    """
    try:
        for folder in {bundle.checked(record).parent for record in bundle.manifest.kernels}:
            launch.register(folder)
    except (OSError, ValueError) as error:
        raise BundleError(f"{error}; build the bundle again with `ldmrt build-engines`") from error
