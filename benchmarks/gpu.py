"""What a GPU makes of ldmrt, in under nine minutes and without a download: are the kernels right, how fast is everything, why.

    python benchmarks/gpu.py [--stages probe,correctness,sd15] [--out FOLDER] [--budget-seconds 520]
    python benchmarks/gpu.py --device cpu --tiny        a dry run of everything, in seconds
    python benchmarks/gpu.py --compile-for sm_90 --kernels FOLDER      on any machine: the kernels, for later runs to bring along

A worker process runs the stages in turn; when one brings it down, or overstays, another worker goes on with the rest. The results
file is replaced after every part of a stage. Exit code 1: something was computed wrongly, or could not be checked.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gpu_suite import table
from gpu_suite.results import DeviceLost, Results
from ldmrt.bench.ledger import append, provenance

HERE = Path(__file__).resolve().parent
OPERATORS = (
    "attention",
    "group_norm_silu",
    "add_group_norm_silu",
    "add_upsample",
    "geglu",
    "add_layer_norm",
    "sampler_step",
)
MODELS = ("sd15", "sdxl")
ROWS = "rows.jsonl"
PLAIN = " (plain torch)"
_LOST = 75  # the worker's exit code when the GPU no longer answers it


class Stage(NamedTuple):
    """A stage: its units, each of which a new worker can begin with.

    Attributes:
        units: in order.
        least: seconds that must be left for a unit to begin.
        limit: seconds after which a unit is ended.
    """

    units: tuple[str, ...]
    least: float
    limit: float


STAGES = {
    "probe": Stage(("probe",), 5, 60),
    "compile": Stage(("compile",), 60, 240),
    "correctness": Stage(tuple(f"correctness.{name}" for name in OPERATORS), 10, 100),
    "candidates": Stage(tuple(f"candidates.{name}" for name in MODELS), 20, 120),
    "tune": Stage(tuple(f"tune.{name}" for name in MODELS), 30, 120),
    "kernels": Stage(tuple(f"kernels.{name}" for name in OPERATORS), 10, 60),
    "sd15": Stage(("sd15",), 30, 150),
    "sdxl": Stage(("sdxl",), 40, 150),
    "decode": Stage(tuple(f"decode.{name}" for name in MODELS), 20, 90),
    "breakdown": Stage(tuple(f"breakdown.{name}" for name in MODELS), 20, 90),
    "floors": Stage(("floors",), 20, 90),
    "peers": Stage(tuple(f"peers.{name}" for name in MODELS), 40, 420),
}
# What is tried again with the operators in plain torch when it fails: a slower figure is better than none.
AGAIN = {"sd15", "sdxl", "decode.sd15", "decode.sdxl"}


def units_of(names: Sequence[str]) -> list[str]:
    """The units of stages, or single units, by name.

    Raises:
        ValueError: there is no such stage or unit.
    """
    found: list[str] = []
    for name in names:
        stage = STAGES.get(name.split(".")[0], Stage((), 0, 0))
        chosen = stage.units if name in STAGES else tuple(unit for unit in stage.units if unit == name)
        if not chosen:
            raise ValueError(f"there is no stage {name!r}, expected some of {', '.join(STAGES)}")
        found += chosen
    return found


def stage_of(unit: str) -> Stage:
    """The stage that a unit belongs to."""
    return STAGES[unit.removesuffix(PLAIN).split(".")[0]]


# ---------------------------------------------------------------------------------------------------- the worker


def work(args: argparse.Namespace, units: Sequence[str]) -> int:
    """Run units one after the other in this process. Returns its exit code."""
    import torch

    from gpu_suite.session import Session
    from gpu_suite.tuning_stage import CHOICES
    from ldmrt import choices
    from ldmrt.kernels import launch

    results = Results(args.out)
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", device.index or 0)
        torch.cuda.init()  # type: ignore[no-untyped-call]
        torch.cuda.set_device(device)
    dtype = getattr(torch, args.dtype or ("float16" if device.type == "cuda" else "float32"))
    if args.kernels is not None:
        launch.register(args.kernels)
    if device.type == "cuda":
        choices.load(args.out / CHOICES, choices.machine_with(device))
    session = Session(device, args.tiny, results, args.deadline, dtype, args.inductor_cache, args.kernels, args.brief)
    results.data["facts"] = session.facts
    for unit in units:
        stage = stage_of(unit)
        if session.left() < stage.least and not args.tiny:
            results.end(unit, "skipped", f"{max(0, session.left()):.0f} s are left, it needs {stage.least:.0f} s")
            continue
        results.begin(unit)
        try:
            _functions()[unit.removesuffix(PLAIN)](session, unit)
            session.synchronize()
        except DeviceLost as error:
            results.end(unit, "died", str(error))
            return _LOST
        except Exception:
            with results.part(unit, "outside of its parts"):
                raise
        results.end(unit, "failed" if results.failed_parts(unit) else "done")
    return 0


def _functions() -> dict[str, Callable[[Any, str], None]]:
    """What runs each unit."""
    from gpu_suite import ahead, breakdown, candidates, floors, kernel_stages, networks, peers, probe, tuning_stage

    found: dict[str, Callable[[Any, str], None]] = {
        "probe": probe.probe,
        "compile": ahead.compile_ahead,
        "floors": floors.floors,
    }
    for name in OPERATORS:
        found[f"correctness.{name}"] = partial(kernel_stages.check_operator, name=name)
        found[f"kernels.{name}"] = partial(kernel_stages.time_operator, name=name)
    for name in MODELS:
        found[name] = partial(networks.denoise, name=name)
        found[f"candidates.{name}"] = partial(candidates.check_candidates, name=name)
        found[f"tune.{name}"] = partial(tuning_stage.tune_model, name=name)
        found[f"decode.{name}"] = partial(networks.decode, name=name)
        found[f"breakdown.{name}"] = partial(breakdown.breakdown, name=name)
        found[f"peers.{name}"] = partial(peers.peers, name=name)
    return found


def compile_only(args: argparse.Namespace) -> int:
    """Compile the kernels of all stages for a GPU that need not be here. Returns the exit code."""
    from gpu_suite.ahead import compile_into
    from ldmrt.export.cubins import architecture

    count, problems = compile_into(args.kernels, architecture(args.compile_for))
    for problem in problems:
        sys.stdout.write(f"cannot be compiled: {problem}\n")
    sys.stdout.write(f"{count} kernels for {args.compile_for} in {args.kernels}\n")
    return 1 if problems else 0


# ---------------------------------------------------------------------------------------------------- the supervisor


class Supervisor:
    """Runs workers until every unit has had its turn or the time is over, and writes the ledger's rows.

    Args:
        args: the command line.
        units: all of them, in order.
    """

    def __init__(self, args: argparse.Namespace, units: Sequence[str]) -> None:
        self.args = args
        self.pending = list(units)
        self._recorded: set[str] = set()

    def run(self) -> None:
        """Run all."""
        while self.pending:
            first = self.pending[0]
            # What runs in plain torch has a process of its own, since kernels are chosen once per process.
            alone = first.endswith(PLAIN)
            units = [first] if alone else [unit for unit in self.pending if not unit.endswith(PLAIN)]
            environment = {**os.environ, **({"LDMRT_KERNELS": "reference"} if alone else {})}
            self._watch(units, environment)
        self._record()

    def _watch(self, units: Sequence[str], environment: Mapping[str, str]) -> None:
        command = [sys.executable, str(HERE / "gpu.py"), "--units", ",".join(units), *_passed_on(self.args)]
        worker = subprocess.Popen(command, env={**environment}, start_new_session=True)
        reason = None
        try:
            while worker.poll() is None:
                time.sleep(0.5)
                self._record()
                reason = self._overstayed()
                if reason is not None:
                    break
        finally:
            if worker.poll() is None:
                os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
        self._conclude(units, worker.returncode, reason)

    def _overstayed(self) -> str | None:
        """Why the worker is to be ended now, if it is."""
        running = Results(self.args.out).data["running"]
        # The dry run shows that everything works, however slow the machine is.
        if self.args.tiny:
            return None
        if time.time() > self.args.deadline:
            return "the time is over"
        if running is not None and time.time() - running["since"] > stage_of(running["unit"]).limit:
            return f"it took more than {stage_of(running['unit']).limit:.0f} s"
        return None

    def _conclude(self, units: Sequence[str], code: int, reason: str | None) -> None:
        """Note what became of the units, and decide what is left."""
        results = Results(self.args.out)
        running = results.data["running"]
        ended = set(results.data["units"])
        if running is not None:
            results.end(running["unit"], "ended" if reason else "died", reason or f"its process ended with code {code}")
        elif code not in (0, _LOST) or reason:
            # It fell between two units, or before the first: nothing says that the next one would fare better.
            ended |= set(units)
            for unit in set(units) - set(results.data["units"]):
                results.end(unit, "not run", reason or f"the worker ended with code {code} before it")
        again = [u + PLAIN for u in units if u in AGAIN and _without_figures(results.data["units"].get(u, {}))]
        self.pending = again + [unit for unit in self.pending if unit not in ended]
        if time.time() > self.args.deadline and not self.args.tiny:
            for unit in self.pending:
                results.end(unit, "not run", "the time is over")
            self.pending = []

    def _record(self) -> None:
        """Add the rows of the units that have ended since."""
        results = Results(self.args.out)
        for unit, entry in results.data["units"].items():
            if entry["status"] == "running" or unit in self._recorded:
                continue
            self._recorded.add(unit)
            for name, figures in _rows(unit, entry):
                facts = {"source": self.args.source, **results.data.get("facts", {}), "dry_run": self.args.tiny}
                append(self.args.out / ROWS, f"gpu: {unit}: {name}", {**figures, **facts})


def _without_figures(entry: Mapping[str, Any]) -> bool:
    """Whether a unit of `AGAIN` has had its turn and was to no avail."""
    timed = [part for part in entry.get("parts", {}).values() if {"step_seconds", "seconds"} & part.keys()]
    return entry.get("status") in ("failed", "died") and not timed


def _rows(unit: str, entry: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """A unit's rows of the ledger: its parts, or for correctness one row of all."""
    parts = entry.get("parts", {})
    if not unit.startswith("correctness"):
        return [(name, dict(figures)) for name, figures in parts.items() if figures and "error" not in figures]
    checked = [body for part in parts.values() for body in part.values() if isinstance(body, dict)]
    wrong = [name for name, figures in parts.items() if not figures.get("right")]
    largest = {key: max((body[key] for body in checked), default=None) for key in ("of_bound", "relative_error")}
    return [("all sizes", {"cases": len(parts), "wrong": wrong, **largest})]


def _passed_on(args: argparse.Namespace) -> list[str]:
    given = ["--device", args.device, "--out", str(args.out), "--deadline", str(args.deadline)]
    given += ["--brief"] * args.brief + ["--tiny"] * args.tiny + (["--dtype", args.dtype] if args.dtype else [])
    folders = {"--inductor-cache": args.inductor_cache, "--kernels": args.kernels}
    return given + [word for option, path in folders.items() if path for word in (option, str(path))]


# ---------------------------------------------------------------------------------------------------- the command line


def wrong(data: Mapping[str, Any]) -> list[str]:
    """What was computed wrongly, or could not be checked: a correctness unit that did not end well, a part that is not right."""
    found = []
    for unit, entry in data["units"].items():
        if unit.startswith("correctness") and entry["status"] in ("failed", "died", "ended", "not run"):
            found.append(unit)
        found += [f"{unit}: {name}" for name, part in entry.get("parts", {}).items() if part.get("right") is False]
    return list(dict.fromkeys(found))


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with what it leaves out filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--stages",
        default=",".join(name for name in STAGES if name != "candidates"),
        help="in the order in which they are to run; decode.sdxl is a part of one",
    )
    parser.add_argument("--out", type=Path, default=None, help="folder of the results; default benchmarks/results/gpu")
    parser.add_argument("--budget-seconds", type=float, default=520.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny architectures: a dry run")
    parser.add_argument("--brief", action="store_true", help="of a network only the first batch size, captured")
    parser.add_argument("--dtype", default=None, choices=("float16", "bfloat16", "float32"))
    parser.add_argument(
        "--inductor-cache", type=Path, default=None, help="folder of torch.compile's cache, kept between runs"
    )
    parser.add_argument("--kernels", type=Path, default=None, help="folder of kernels compiled elsewhere")
    parser.add_argument(
        "--compile-for", default=None, metavar="sm_90", help="only compile the kernels for this GPU into --kernels"
    )
    parser.add_argument("--source", default=None, help="the commit, where the tree comes without git")
    parser.add_argument("--units", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, default=None, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        args.chosen = units_of(args.stages.split(","))
    except ValueError as error:
        parser.error(str(error))
    if args.compile_for is not None and args.kernels is None:
        parser.error("--compile-for needs the folder to write to: add --kernels FOLDER")
    if args.device == "cpu" and not args.tiny:
        parser.error("on a CPU only the dry run makes sense: add --tiny")
    if args.out is None:
        args.out = HERE.parent / "build" / "gpu-dry-run" if args.tiny else HERE / "results" / "gpu"
    args.out = args.out.resolve()
    args.deadline = args.deadline or time.time() + args.budget_seconds
    return args


def main() -> None:
    """The command line."""
    args = arguments()
    if args.compile_for is not None:
        sys.exit(compile_only(args))
    if args.units is not None:
        sys.exit(work(args, args.units.split(",")))
    (args.out / "suite.json").unlink(missing_ok=True)
    results = Results(args.out)
    results.data |= {"dry_run": args.tiny, "source": args.source, **provenance(), "budget_seconds": args.budget_seconds}
    results.save()
    start = time.time()
    Supervisor(args, args.chosen).run()
    data = Results(args.out).data
    for line in table.lines(data):
        sys.stdout.write(line + "\n")
    problems = wrong(data)
    sys.stdout.write(
        f"{time.time() - start:.0f} s; results in {args.out}; "
        + ("WRONG: " + "; ".join(problems) if problems else "nothing wrong")
        + "\n"
    )
    sys.exit(1 if problems else 0)


if __name__ == "__main__":
    main()
