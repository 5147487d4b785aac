"""Options that several commands have, and how their values are read."""

from __future__ import annotations

import logging
import re
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from ldmrt.cli.failures import VERBOSE
from ldmrt.errors import BadRequest
from ldmrt.extension import Extension


def _set_verbose(ctx: typer.Context, value: bool) -> None:
    if value:
        ctx.meta[VERBOSE] = True
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s")
        logging.getLogger("ldmrt").setLevel(logging.DEBUG)


Verbose = Annotated[
    bool, typer.Option("--verbose", callback=_set_verbose, help="Log to stderr, and show tracebacks of errors.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout, and nothing else there.")]


class Size(NamedTuple):
    """Width and height in pixels."""

    width: int
    height: int


def parse_size(text: str) -> Size:
    """Read `512x768`."""
    found = re.fullmatch(r"([1-9][0-9]{0,4})[xX]([1-9][0-9]{0,4})", text.strip())
    if found is None:
        raise typer.BadParameter(f"{text!r} is no size, expected WIDTHxHEIGHT in pixels, such as 512x512")
    return Size(int(found[1]), int(found[2]))


def parse_extension(text: str) -> Extension:
    """Read `0,256,0,0`."""
    if re.fullmatch(r"\s*[0-9]{1,5}\s*(,\s*[0-9]{1,5}\s*){3}", text) is None:
        raise typer.BadParameter(
            f"{text!r} is no extension, expected pixels to the left, right, above and below, such as 0,256,0,0"
        )
    return Extension(*map(int, text.split(",")))


class LoraChoice(NamedTuple):
    """A LoRA's file, and how much of it."""

    path: Path
    scale: float


def parse_lora(text: str) -> LoraChoice:
    """Read `style.safetensors` or `style.safetensors:0.8`."""
    path, colon, scale = text.rpartition(":")
    try:
        return LoraChoice(Path(path if colon else text), float(scale) if colon else 1.0)
    except ValueError:  # the colon is part of the path
        return LoraChoice(Path(text), 1.0)


class EmbeddingChoice(NamedTuple):
    """The file of a textual inversion, and the word that stands for it, if it is not its own."""

    path: Path
    token: str | None


def parse_embedding(text: str) -> EmbeddingChoice:
    """Read `cat.safetensors` or `cat.safetensors:<my-cat>`."""
    found = re.fullmatch(r"(.+\.\w+):(.+)", text)
    return EmbeddingChoice(Path(text), None) if found is None else EmbeddingChoice(Path(found[1]), found[2])


def lora_option(what: str) -> Any:
    """`--lora`, which says what it does with a LoRA."""
    return typer.Option(
        "--lora",
        metavar="PATH[:SCALE]",
        parser=parse_lora,
        help=f"{what}, and how much of it (default: 1); repeatable.",
    )


def parse_device(text: str) -> str:
    """Read `cpu`, `cuda`, `cuda:N` or `auto`."""
    from ldmrt import config

    try:
        return config.parse_device(text)
    except BadRequest as error:
        raise typer.BadParameter(str(error)) from error


Device = Annotated[
    str | None,
    typer.Option(
        metavar="cpu|cuda[:N]",
        parser=parse_device,
        help="Where to run. Default: LDMRT_DEVICE, or a GPU if there is one.",
    ),
]


class Dtype(StrEnum):
    """Precisions."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class EngineChoice(StrEnum):
    """Engine kinds."""

    auto = "auto"
    torch = "torch"
    onnxruntime = "onnxruntime"
    tensorrt = "tensorrt"
    tensorrt_rtx = "tensorrt-rtx"


EngineOption = Annotated[EngineChoice, typer.Option(help="Which engines to use where the bundle has several kinds.")]
DtypeOption = Annotated[Dtype, typer.Option(help="Which engines to use where the bundle has several precisions.")]
