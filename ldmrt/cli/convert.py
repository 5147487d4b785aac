"""`ldmrt convert`: from a pickled checkpoint to safetensors."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from ldmrt.cli.options import Json, Verbose
from ldmrt.cli.output import bytes_text, print_json


def convert(
    source: Annotated[
        Path, typer.Argument(metavar="SRC", help="Checkpoint that is a pickle: .ckpt, .pt, .pth or .bin.")
    ],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Safetensors file to write.")],
    averaged: Annotated[
        bool,
        typer.Option(
            "--ema/--no-ema",
            help="Take the averaged weights (EMA) where the checkpoint has them, as for making pictures.",
        ),
    ] = True,
    json: Json = False,
    _verbose: Verbose = False,
) -> None:
    """Convert a pickled checkpoint to safetensors, without running what it may hold."""
    from ldmrt.export.convert import convert as convert_file

    made = convert_file(source, target, averaged=averaged)
    if json:
        print_json({"file": str(target.resolve()), **vars(made)})
        return
    kind = f", {made.averaged} of them averaged (EMA)" if made.averaged else ""
    typer.echo(f"{made.tensors} tensor{'s' * (made.tensors != 1)}{kind}, {bytes_text(made.nbytes)}, in {target}. Next:")
    typer.echo(f"  ldmrt build-engines {shlex.quote(str(target))} --out DIR")
