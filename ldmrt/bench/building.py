"""A build in a process of its own, so that the memory it took is not missing from what is measured after it.

    python -P -m ldmrt.bench.building

The one line on standard input is what to build, as JSON; each line on standard output is a message: how far it is, what it raised, or the most memory
that it had, which is the last.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO, cast

import ldmrt
from ldmrt import errors
from ldmrt.bench.memory import peak_resident
from ldmrt.bench.replies import open_replies
from ldmrt.errors import BuildError, LdmrtError

OnProgress = Callable[[str, int, int], None]


def build_apart(model: Path, bundle: Path, options: dict[str, Any], on_progress: OnProgress) -> int:
    """Build, or add to, a bundle in another process.

    Args:
        model: see `ldmrt.build_engines`.
        bundle: the folder.
        options: its other arguments, as JSON has them.
        on_progress: called with (what is being done, steps done, steps in all).

    Returns:
        The most memory in bytes that the process had.

    Raises:
        LdmrtError: what the build raised.
        BuildError: the process has ended in the middle.
    """
    task = json.dumps({"model": str(model), "out": str(bundle), **options})
    command = [sys.executable, "-P", "-m", "ldmrt.bench.building"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        try:
            with contextlib.suppress(BrokenPipeError), cast("TextIO", child.stdin) as told:
                told.write(task)  # if it has ended already, its exit code tells
            for line in cast("TextIO", child.stdout):
                message = json.loads(line)
                if "peak" in message:
                    return int(message["peak"])
                if "error" in message:
                    raise getattr(errors, message["error"])(message["told"])
                on_progress(message["what"], message["done"], message["total"])
        finally:
            child.terminate()
    raise BuildError(
        f"the build of {model.name} stopped with exit code {child.returncode}"
        f"{', for want of memory it may be' if child.returncode == -9 else ''}; try it alone: ldmrt build-engines {model} --out DIR"
    )


def main() -> None:
    """The process."""
    replies = open_replies()
    task = json.loads(sys.stdin.read())
    if task.get("sizes"):  # which JSON has made lists of
        task["sizes"] = [tuple(size) for size in task["sizes"]]

    def tell(**message: Any) -> None:
        replies.write(json.dumps(message) + "\n")

    try:
        ldmrt.build_engines(**task, on_progress=lambda what, done, total: tell(what=what, done=done, total=total))
        tell(peak=peak_resident())
    except LdmrtError as error:
        tell(error=type(error).__name__, told=str(error))


if __name__ == "__main__":
    main()
