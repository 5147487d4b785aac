"""Commands, in this process and in processes of their own: what they print where, and how they end."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from ldmrt.cli import app


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """`--verbose` sets it up for the whole process, over this test's stderr."""
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    yield
    for handler in set(root.handlers) - set(before):
        root.removeHandler(handler)
    root.setLevel(level)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process."""

    def call(*args: object) -> Ended:
        with pytest.raises(SystemExit) as caught:
            app([str(arg) for arg in args], prog_name="ldmrt")
        captured = capsys.readouterr()
        return Ended(int(caught.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def generate(run: Run, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run `ldmrt generate` with a small model, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: run(
        "generate", "a red circle", "--engines", tiny_bundle, "--steps", 2, "--device", "cpu", *args
    )


def refused(ended: Ended, *words: str) -> None:
    """It ended with one line on stderr that says these words."""
    assert ended.code == 1
    assert ended.out == ""
    assert ended.err.startswith("ldmrt: ")
    assert ended.err.count("\n") == 1
    for word in words:
        assert word in ended.err


def content(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start a command as a process of its own; what it leaves running or open is ended with the test."""
    with ExitStack() as stack:

        def call(*args: object, stdout: int | IO[str] = subprocess.PIPE) -> subprocess.Popen[str]:
            process = stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-m", "ldmrt", *map(str, args)],
                    cwd=tmp_path,
                    env={**os.environ, "OMP_NUM_THREADS": "1"},
                    stdout=stdout,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
            stack.callback(process.kill)
            return process

        yield call


def wait(process: subprocess.Popen[str]) -> Ended:
    out, err = process.communicate(timeout=120)
    return Ended(process.returncode, out or "", err)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait until something has happened that a process does."""
    end = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.01)


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
