"""The command line. Every command is a file; heavy imports happen inside it, so that `--help` is quick."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

import ldmrt
from ldmrt.cli.bench import bench, bench_compare
from ldmrt.cli.build import build_engines
from ldmrt.cli.convert import convert
from ldmrt.cli.doctor import doctor
from ldmrt.cli.failures import Commands
from ldmrt.cli.generate import generate
from ldmrt.cli.inspect import inspect
from ldmrt.cli.options import Verbose
from ldmrt.cli.serve import serve
from ldmrt.cli.tune import tune
from ldmrt.cli.verify import verify
from ldmrt.config import share_cores

app = typer.Typer(
    name="ldmrt",
    cls=Commands,
    help="Compile latent diffusion models, and run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
app.command("generate")(generate)
app.command("build-engines")(build_engines)
app.command("convert")(convert)
app.command("tune")(tune)
app.command("serve")(serve)
app.command("inspect")(inspect)
app.command("verify")(verify)
app.command("bench")(bench)
app.command("bench-compare")(bench_compare)
app.command("doctor")(doctor)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"ldmrt {ldmrt.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    _verbose: Verbose = False,
) -> None:
    """Compile latent diffusion models, and run them."""


def main() -> None:
    """The entry point `ldmrt`."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a file name that is not UTF-8 must not stop the output
            stream.reconfigure(errors="backslashreplace")
    share_cores(os.environ)
    app()
