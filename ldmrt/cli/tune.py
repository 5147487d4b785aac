"""`ldmrt tune`: the fastest kernels for a bundle on this machine's GPU."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldmrt.cli.options import Dtype, Json, Verbose, parse_device
from ldmrt.cli.output import print_json, progress_bar, table

if TYPE_CHECKING:
    from ldmrt.tune import Report


def tune(
    engines: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A bundle made by build-engines. Default: the built-in model.")
    ] = None,
    dtype: Annotated[
        Dtype, typer.Option(help="Which engines to tune for where the bundle has several precisions.")
    ] = Dtype.auto,
    device: Annotated[
        str | None,
        typer.Option(
            metavar="cuda[:N]", parser=parse_device, help="Which GPU. Default: LDMRT_DEVICE, or the first one."
        ),
    ] = None,
    json: Json = False,
    _verbose: Verbose = False,
) -> None:
    """Time the kernels that a bundle can use on this GPU, and keep the fastest in this machine's cache."""
    started = time.perf_counter()
    from ldmrt import choices
    from ldmrt.bundle import Bundle
    from ldmrt.config import from_env
    from ldmrt.opening import builtin_bundle
    from ldmrt.tune import find_gpu, tune as tune_bundle

    gpu = find_gpu(device or from_env(os.environ).device)
    bundle = Bundle.open(engines or builtin_bundle())
    with progress_bar("starting") as update:
        report = tune_bundle(
            bundle,
            gpu,
            choices.folder(os.environ),
            dtype=None if dtype is Dtype.auto else dtype.value,
            on_progress=lambda what, done, total: update(description=what, completed=done, total=total),
        )
    document = describe(report)
    document["seconds"] = round(time.perf_counter() - started, 3)
    if json:
        print_json(document)
    else:
        show(document)


def describe(report: Report) -> dict[str, Any]:
    """A report as one JSON-safe document."""
    from ldmrt.choices import encoded

    return {
        "machine": report.machine.model_dump(mode="json"),
        "kept_in": str(report.path),
        "problems": [
            {
                "operator": each.operator,
                "problem": encoded(each.problem),
                "calls": each.calls,
                "default": encoded(each.default),
                "default_us": _microseconds(each.default_seconds),
                "choice": encoded(each.choice),
                "us": _microseconds(each.seconds),
                "changed": each.choice != each.default,
                "skipped": each.skipped,
            }
            for each in report.measurements
        ],
        "engines": [
            {
                "engine": each.engine.label,
                "component": each.engine.component,
                "default_us": _microseconds(each.default_seconds),
                "us": _microseconds(each.seconds),
            }
            for each in report.engines
        ],
        "skipped": report.skipped,
    }


def show(document: Mapping[str, Any]) -> None:
    """The document as tables on stdout."""
    problems, engines = document["problems"], document["engines"]
    if problems:
        rows = [
            [
                each["operator"],
                _text(each["problem"]),
                str(each["calls"]),
                "-" if each["default_us"] is None else f"{each['default_us']:.1f}",
                f"{each['us']:.1f}",
                _text(each["choice"]) if each["changed"] else "default",
            ]
            for each in problems
        ]
        table(rows, ["operator", "problem", "calls", "default us", "best us", "choice"])
        typer.echo()
        rows = [
            [
                each["engine"],
                *(f"{us:.1f}" for us in (each["default_us"], each["us"], each["default_us"] - each["us"])),
            ]
            for each in engines
        ]
        table(rows, ["these operators in one run of", "default us", "best us", "saved us"])
        typer.echo()
    changed = sum(each["changed"] for each in problems)
    typer.echo(
        f"{len(problems)} problems timed on {document['machine']['gpu']}, {changed} changed from the default; "
        f"{document['skipped']} candidates cannot be launched"
    )
    typer.echo(f"kept in {document['kept_in']}")


def _text(fields: Mapping[str, Any]) -> str:
    """Fields in a cell of a table; of a choice of torch's own body nothing but its name."""
    if fields.get("body") == "sdpa":
        return "sdpa"
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        flat |= value if isinstance(value, dict) else {name: value}
    return " ".join(f"{name}={value}" for name, value in flat.items())


def _microseconds(seconds: float | None) -> float | None:
    return None if seconds is None else round(1e6 * seconds, 3)
