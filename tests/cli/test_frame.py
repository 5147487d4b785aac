"""The command line as such: help, usage, errors."""

from __future__ import annotations

import subprocess
import sys

import pytest

import ldmrt
from ldmrt.cli import failures

from .conftest import Run, refused


@pytest.mark.parametrize("command", ["", "generate", "build-engines", "convert", "inspect", "tune", "serve", "doctor"])
def test_help(run: Run, command: str) -> None:
    ended = run(*command.split(), "--help")
    assert ended.code == 0
    assert "Usage: ldmrt" in ended.out
    assert all(line == line.rstrip() and len(line) <= 80 for line in ended.out.splitlines())
    assert ended.err == ""


@pytest.mark.parametrize("argument", ["--help", "--version", "generate --help"])
def test_what_is_quick_imports_nothing_heavy(argument: str) -> None:
    code = f"""
import sys
from ldmrt.cli import main
sys.argv = ["ldmrt", *{argument.split()}]
try:
    main()
except SystemExit as end:
    assert end.code == 0
heavy = {{"torch", "numpy", "PIL", "diffusers", "transformers"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"ldmrt {ldmrt.__version__}\n", "")


@pytest.mark.parametrize(
    "args",
    [
        ["paint"],
        ["generate"],
        ["generate", "a", "--surprise"],
        ["generate", "a", "--steps", "many"],
        ["generate", "a", "--engine", "tensorflow"],
        ["generate", "a", "--dtype", "int4"],
        ["generate", "a", "--device", "gpu"],
        *(
            ["generate", "a", "--size", size]
            for size in ("512", "512x", "x", "0x8", "-8x8", "8.0x8", "1e3x8", "9x9x9", "")
        ),
        ["build-engines", "model"],
        ["build-engines", "model", "--out", "out", "--size", "big"],
        ["build-engines", "model", "--out", "out", "--batch", "two"],
        ["inspect"],
    ],
)
def test_usage_errors(run: Run, args: list[str]) -> None:
    ended = run(*args)
    assert ended.code == 2
    assert ended.out == ""
    assert "Usage: ldmrt" in ended.err
    assert "Traceback" not in ended.err


def test_an_unexpected_error_is_called_a_bug(generate: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division\nby zero")

    monkeypatch.setattr("ldmrt.pipeline.Pipeline.from_bundle", fail)
    refused(generate(), "unexpected ZeroDivisionError: division by zero", "--verbose", "report it")
    verbose = generate("--verbose")
    assert verbose.code == 1
    assert "Traceback" in verbose.err


def test_errors_of_the_system_say_the_cure() -> None:
    assert "smaller --size" in failures.message(MemoryError())
    assert "smaller --size" in failures.message(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"))
    assert failures.message(OSError(28, "No space left on device", "/x")).startswith(
        "/x: No space left on device; make"
    )
    assert "check that the path" in failures.message(PermissionError(13, "Permission denied", "/x"))
