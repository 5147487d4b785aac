"""What commands print: JSON and tables on stdout, progress and warnings on stderr."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress


def print_json(value: object) -> None:
    """One JSON document on stdout."""
    typer.echo(json.dumps(value, indent=1, allow_nan=False))


def table(rows: list[list[str]], header: list[str] | None = None) -> None:
    """Columns on stdout, as wide as they need to be."""
    lines = [header, *rows] if header else rows
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def rich_table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """Columns on stdout with a title, the first to the left and figures to the right, as wide as they need to be."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    made = Table(title=title, box=box.SIMPLE, title_justify="left", show_header=any(header))
    for number, name in enumerate(header):
        made.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        made.add_row(*map(Text, row))  # names are no markup
    console = Console(highlight=False)
    needed = console.measure(made, options=console.options.update(width=1000)).maximum
    Console(highlight=False, width=max(needed, len(title))).print(made)


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
