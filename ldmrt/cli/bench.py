"""`ldmrt bench` and `ldmrt bench-compare`: how fast a bundle is here, and whether that has changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ldmrt.cli.options import Device, Dtype, EngineChoice, Json, Size, Verbose, parse_size
from ldmrt.cli.output import print_json, progress_bar, rich_table, shown_warnings
from ldmrt.errors import BadRequest


class Architecture(StrEnum):
    """What random weights can be made of, and the built-in model."""

    shapes = "shapes"
    sd15 = "sd15"
    sd15_controlnet = "sd15-controlnet"
    sd21 = "sd21"
    sdxl = "sdxl"


def bench(
    engines: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="A bundle made by build-engines, or a folder of a model, of which one is built and kept in the cache.",
        ),
    ] = None,
    arch: Annotated[
        Architecture | None,
        typer.Option(
            help="Instead: an architecture at its real size, with random weights kept in the cache (sd15: 2 GB, sdxl: 7 GB). "
            "Default: shapes, the built-in model."
        ),
    ] = None,
    size: Annotated[
        list[Size] | None,
        typer.Option(
            metavar="WxH", parser=parse_size, help="Width and height in pixels; repeatable. Default: the model's."
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", help="Images drawn together; repeatable. Default: all that the bundle has engines for, or 1."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(metavar="N", help="Denoising steps. Default: the model's.")] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(
            metavar="F", help="1: without guidance. Default: the model's; the first case is drawn without, too."
        ),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(metavar="NAME", help="As in `ldmrt generate`. Default: the model's.")
    ] = None,
    runs: Annotated[int, typer.Option(metavar="N", min=1, help="Timed runs of each case.")] = 9,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Another program to draw the first case in turn with ours: diffusers, torch.compile, onnxruntime, openvino, "
            "stable-diffusion.cpp; repeatable.",
        ),
    ] = None,
    mlperf: Annotated[
        bool,
        typer.Option(
            "--mlperf",
            help="In the manner of MLPerf Inference's SDXL: 20 steps of euler at 1024x1024, guidance 8, its negative prompt; "
            "single stream and offline (--batch N). Unofficial.",
        ),
    ] = False,
    engine: Annotated[
        EngineChoice, typer.Option(help="Which engines to measure. auto: every kind that the bundle has.")
    ] = EngineChoice.auto,
    dtype: Annotated[
        Dtype, typer.Option(help="Precision. auto: the best one here that the bundle has or can be built in.")
    ] = Dtype.auto,
    device: Device = None,
    output: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write every time that was taken, for bench-compare.")
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Draw the report: .png, or .html with its tables. Needs matplotlib."),
    ] = None,
    json: Json = False,
    _verbose: Verbose = False,
) -> None:
    """Measure how fast pictures are drawn: cold, warm, by stage, size and batch, beside this machine's own rates and other programs."""
    from ldmrt.config import from_env

    config = from_env(os.environ)
    if engines is not None and arch is not None:
        raise BadRequest(f"--engines {engines} and --arch {arch.value} were given: choose one")
    if mlperf:
        _check_alone({"--size": size, "--steps": steps, "--guidance-scale": guidance_scale, "--sampler": sampler})
        arch = arch if engines or arch else Architecture.sdxl
    _check_files({"--output": output, "--plot": plot})

    import torch

    from ldmrt.bench.run import Plan, bench as measure
    from ldmrt.bench.subject import Wish, subject
    from ldmrt.bench.tables import headline, tables

    if config.threads:
        torch.set_num_threads(config.threads)
    kind, precision = (None if one.value == "auto" else one.value for one in (engine, dtype))
    with shown_warnings(), progress_bar("starting") as update:

        def on_progress(what: str, done: int, total: int) -> None:
            update(description=what, completed=done, total=total)

        plan = Plan(
            device=device or config.device,
            engine=kind,
            dtype=precision,
            sizes=size or (),
            batches=batch or (),
            steps=steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            runs=runs,
            against=against or (),
            mlperf=mlperf,
        ).filled()
        wish = Wish(sizes=plan.sizes, batches=plan.batches, dtype=precision, engine=kind)
        chosen = subject(engines, arch and arch.value, config.cache, wish, on_progress)
        if not plan.batches and chosen.build is not None:
            plan = replace(plan, batches=(1,))
        report = measure(chosen, plan, on_progress)
    if output is not None:
        report.write(output)
    if plot is not None:
        from ldmrt.bench.plot import write_plot

        write_plot(report, plot)
    if json:
        print_json(report.document())
    else:
        typer.echo(headline(report))
        for table in tables(report):
            rich_table(*table)
    for line in (*report.warnings, *report.notes):
        typer.echo(f"ldmrt: warning: {line}", err=True)


def _check_alone(options: Mapping[str, object]) -> None:
    """Refuse what --mlperf says itself."""
    for option, value in options.items():
        if value is not None:
            raise BadRequest(f"{option} and --mlperf were given, which says that itself: leave one out")


def _check_files(options: Mapping[str, Path | None]) -> None:
    """Refuse files that cannot be written, before anything is measured."""
    for option, path in options.items():
        if path is not None and not path.absolute().parent.is_dir():
            raise BadRequest(f"{option} {path}: there is no folder {path.parent}; make it, or choose another")
    if (plot := options.get("--plot")) is not None:
        from ldmrt.bench.plot import check_plot

        check_plot(plot)


def bench_compare(
    before: Annotated[Path, typer.Argument(metavar="A.json", help="What `ldmrt bench --output` wrote.")],
    after: Annotated[Path, typer.Argument(metavar="B.json", help="The same, later.")],
    json: Json = False,
    _verbose: Verbose = False,
) -> None:
    """Say of every figure whether B is faster than A, slower, or the difference is noise."""
    from ldmrt.bench.compare import compare
    from ldmrt.bench.report import Report
    from ldmrt.bench.tables import comparison_table

    found = compare(Report.read(before), Report.read(after))
    if json:
        print_json(found.model_dump(mode="json"))
        return
    rich_table(*comparison_table(found))
    for note in found.notes:
        typer.echo(note)
