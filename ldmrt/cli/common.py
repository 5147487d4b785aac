"""What the commands share: how failures end, how values are read, where output goes."""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup

from ldmrt.errors import BadRequest, LdmrtError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

_VERBOSE = "ldmrt.verbose"
# Errors name the parameters of the Python interface; whoever typed a command knows them as these.
_FLAGS = {
    "clip_skip": "--clip-skip",
    "device": "--device",
    "eta": "--eta",
    "guidance_scale": "--guidance-scale",
    "num_images_per_prompt": "--num-images",
    "num_inference_steps": "--steps",
    "sampler": "--sampler",
    "seed": "--seed",
}


class Commands(TyperGroup):
    """The root command. Whatever fails ends in one line on stderr and an exit code; the traceback is shown on request."""

    def invoke(self, ctx: Any) -> Any:
        """Run a command."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from error
        except BrokenPipeError as error:
            _silence_stdout()
            raise typer.Exit(1) from error
        except Exception as error:
            if hasattr(error, "format_message"):  # a usage error, which typer itself prints
                raise
            if ctx.meta.get(_VERBOSE):
                traceback.print_exception(error)
            typer.echo(f"ldmrt: {' '.join(message(error).split())}", err=True)
            if isinstance(error, OSError):
                _silence_stdout()  # it may be stdout that failed, and it would fail again at exit
            raise typer.Exit(1) from error
        return result


def message(error: Exception) -> str:
    """What to tell the user of an error."""
    text = str(error)
    if isinstance(error, LdmrtError):
        if isinstance(error, BadRequest) and error.param in _FLAGS and text.startswith(f"{error.param} "):
            text = _FLAGS[error.param] + text.removeprefix(error.param)
        return text
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "out of memory" in text:
        return "there is not enough memory for this; use a smaller --size, a smaller batch, or a smaller --dtype"
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename is not None else ""
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        cure = "make room, or choose another place" if full else "check that the path exists and may be used"
        return f"{where}{error.strerror or text}; {cure}"
    return (
        f"unexpected {type(error).__name__}: {text[:200]}; run with --verbose for the traceback; this is a bug, "
        "please report it"
    )


def _silence_stdout() -> None:
    """Let what is still in the buffer go nowhere: Python would try to write it at exit, and complain."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # stdout is not a file (a test's, an embedder's)
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - it stays until the process ends


# ---------------------------------------------------------------------------------------------------- options


def _set_verbose(ctx: typer.Context, value: bool) -> None:
    if value:
        ctx.meta[_VERBOSE] = True
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


def parse_device(text: str) -> str:
    """Read `cpu`, `cuda`, `cuda:N` or `auto`."""
    from ldmrt import config

    try:
        return config.parse_device(text)
    except BadRequest as error:
        raise typer.BadParameter(str(error)) from error


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


# ---------------------------------------------------------------------------------------------------- output


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(value, indent=1, allow_nan=False))


def table(rows: list[list[str]], header: list[str] | None = None) -> None:
    """Columns on stdout, as wide as they need to be."""
    lines = [header, *rows] if header else rows
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def size_text(size: tuple[int, int] | None) -> str:
    """`512x768`, or `-` for what does not depend on it."""
    return f"{size[0]}x{size[1]}" if size else "-"


def bytes_text(count: float) -> str:
    """`1.2 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


@contextmanager
def progress_bar(text: str) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr, on a terminal only. Gives a function that takes `description`, `completed`, `total`, `advance`."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = _stderr()
    bar: Progress
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(text, total=None)
        yield lambda **changes: bar.update(task, **changes)


def _stderr() -> Console:
    from rich.console import Console

    return Console(stderr=True, highlight=False, markup=False)


@contextmanager
def shown_warnings() -> Iterator[None]:
    """Warnings as lines on stderr; those that are meant for programmers are left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda text, *_: typer.echo(f"ldmrt: warning: {' '.join(str(text).split())}", err=True)
        yield
