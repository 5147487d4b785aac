"""Hostile files, some of them here and as many as there is time for by `benchmarks/fuzz.py artefacts`; and that what is wrong would be seen."""

from __future__ import annotations

import ast
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import fuzz_artefacts
import tables
from fuzz_artefacts import KINDS, Kind
from ldmrt.errors import BundleError


def test_whatever_is_opened_ends_well_or_with_an_error_of_ours() -> None:
    """In a process of its own, which has one thread: it forks."""
    kinds = [name for name, kind in KINDS.items() if not kind.builds]
    command = [
        sys.executable,
        "benchmarks/fuzz.py",
        "artefacts",
        "--seconds",
        "4",
        "--no-record",
        "--kinds",
        ",".join(kinds),
    ]
    done = subprocess.run(command, cwd=tables.ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    figures = ast.literal_eval(done.stdout.strip().splitlines()[-1])
    assert figures["cases"] >= 20
    assert figures["findings"] == 0


def raising(error: BaseException) -> Callable[[Path], None]:
    def use(_folder: Path) -> None:
        raise error

    return use


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (lambda _folder: None, "fine"),
        (raising(BundleError("it is damaged")), "refused"),
        (raising(ValueError("no")), "ValueError at test_fuzz_artefacts.py"),
        (raising(MemoryError()), "MemoryError at "),
        (raising(SystemExit(1)), "SystemExit at "),
    ],
)
def test_how_a_case_ends(use: Callable[[Path], object], said: str, tmp_path: Path) -> None:
    assert fuzz_artefacts._opened(Kind(lambda _draw, _folder: None, use), tmp_path, []).startswith(said)


@pytest.mark.parametrize(
    ("event", "given", "said"),
    [
        ("open", ("/etc/passwd", "r", os.O_RDONLY), "reads '/etc/passwd'"),
        ("open", ("/nowhere/file", "w", os.O_WRONLY | os.O_CREAT), "changes '/nowhere/file'"),
        ("os.remove", ("/nowhere/file", -1), "changes '/nowhere/file'"),
        ("subprocess.Popen", ("sh", ["sh"], None, None), "subprocess.Popen"),
        ("socket.connect", (socket.AF_INET, ("127.0.0.1", 9)), "socket.connect"),
        ("pickle.find_class", ("os", "system"), "pickle.find_class"),
        ("import", ("diffusers.models", None, None, None, None), "imports diffusers.models"),
        ("open", (str(fuzz_artefacts._WORK / "a"), "w", os.O_WRONLY | os.O_CREAT), None),
        ("open", (sys.prefix + "/a.py", "r", os.O_RDONLY), None),
        ("import", ("torch.nn", None, None, None, None), None),
    ],
)  # fmt: skip
def test_what_opening_a_file_never_needs_is_noted(event: str, given: tuple[object, ...], said: str | None) -> None:
    noted: list[str] = []
    fuzz_artefacts._watch(KINDS["weights"], event, given, noted)
    assert noted == [] if said is None else noted[0].startswith(said)


def test_the_compiler_may_import_what_it_builds_with() -> None:
    noted: list[str] = []
    fuzz_artefacts._watch(KINDS["diffusers"], "import", ("diffusers", None, None, None, None), noted)
    assert noted == []
