"""How a command ends that fails: one line on stderr, and the exit code that goes with it."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import typer
from typer.core import TyperGroup

from ldmrt.errors import BadRequest, LdmrtError

VERBOSE = "ldmrt.verbose"  # where the flag stands in the context
# Errors name the parameters of the Python interface; whoever typed a command knows them as these.
_FLAGS = {
    "clip_skip": "--clip-skip",
    "device": "--device",
    "eta": "--eta",
    "guidance_rescale": "--guidance-rescale",
    "guidance_scale": "--guidance-scale",
    "memory_budget": "--memory-budget",
    "num_images_per_prompt": "--num-images",
    "num_inference_steps": "--steps",
    "sampler": "--sampler",
    "seed": "--seed",
    "strength": "--strength",
    "variation_seed": "--variation-seed",
    "variation_strength": "--variation-strength",
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
            if ctx.meta.get(VERBOSE):
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
