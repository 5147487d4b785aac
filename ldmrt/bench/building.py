"""A build in a process of its own, so that the memory it took is not missing from what is measured after it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import ldmrt
from ldmrt.bench.memory import peak_resident
from ldmrt.errors import BuildError, LdmrtError

OnProgress = Callable[[str, int, int], None]


def build_apart(model: Path, bundle: Path, options: dict[str, Any], on_progress: OnProgress) -> int:
    """Build, or add to, a bundle in another process.

    Args:
        model: see `ldmrt.build_engines`.
        bundle: the folder.
        options: its other arguments.
        on_progress: called with (what is being done, steps done, steps in all).

    Returns:
        The most memory in bytes that the process had.

    Raises:
        LdmrtError: what the build raised.
        BuildError: the process has ended in the middle.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_build, args=(sender, model, bundle, options), daemon=True)
    child.start()
    sender.close()
    try:
        while True:
            found = receiver.recv()
            if isinstance(found, int):
                return found
            if isinstance(found, LdmrtError):
                raise found
            on_progress(*found)
    except EOFError:
        child.join()
        raise BuildError(
            f"the build of {model.name} stopped with exit code {child.exitcode}"
            f"{', for want of memory it may be' if child.exitcode == -9 else ''}; try it alone: ldmrt build-engines {model} --out DIR"
        ) from None
    finally:
        child.terminate()
        child.join()


def _build(sender: Connection, model: Path, bundle: Path, options: dict[str, Any]) -> None:
    try:
        ldmrt.build_engines(model, bundle, **options, on_progress=lambda *now: sender.send(now))
        sender.send(peak_resident())
    except LdmrtError as error:
        sender.send(error)
