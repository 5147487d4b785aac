"""The native library is found, checked and refused for a stated reason."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

from ldmrt.kernels import native


def test_exactly_one_of_library_and_reason() -> None:
    assert native.available() == (native.library() is not None) == (native.why_not() is None)


def test_library_has_the_expected_abi_version() -> None:
    library = native.library()
    if library is None:
        pytest.skip(str(native.why_not()))
    assert library.ldmrt_abi_version() == native.ABI_VERSION


@pytest.mark.parametrize("value", ["0", "false", "No", " off "])
def test_variable_switches_it_off(value: str, tmp_path: Path) -> None:
    library, why_not = native.find({"LDMRT_NATIVE": value}, tmp_path)
    assert library is None
    assert why_not is not None
    assert "LDMRT_NATIVE" in why_not


@pytest.mark.parametrize("environ", [{}, {"LDMRT_NATIVE": ""}, {"LDMRT_NATIVE": "1"}, {"LDMRT_NATIVE": "On"}])
def test_missing_library_is_named(environ: dict[str, str], tmp_path: Path) -> None:
    library, why_not = native.find(environ, tmp_path)
    assert library is None
    assert why_not is not None
    assert native.FILE_NAME in why_not


def test_garbage_in_the_variable_is_quoted(tmp_path: Path) -> None:
    library, why_not = native.find({"LDMRT_NATIVE": "maybe"}, tmp_path)
    assert library is None
    assert why_not is not None
    assert "'maybe'" in why_not


@pytest.mark.parametrize("level", native.LEVELS)
def test_an_instruction_set_is_chosen_or_the_reason_is_named(level: str) -> None:
    library = native.library()
    if library is None:
        pytest.skip(str(native.why_not()))
    highest = int(library.ldmrt_highest_level())
    try:
        found, why_not = native.find({"LDMRT_CPU_LEVEL": f" {level.upper()} "}, files("ldmrt.kernels"))
        if native.LEVELS.index(level) <= highest:
            assert (found is not None, why_not) == (True, None)
        else:
            assert found is None
            assert why_not is not None
            assert f"LDMRT_CPU_LEVEL={level} asks for instructions that this processor has not" in why_not
    finally:
        assert library.ldmrt_use_level(highest)


def test_an_unknown_instruction_set_is_refused() -> None:
    if not native.available():
        pytest.skip(str(native.why_not()))
    found, why_not = native.find({"LDMRT_CPU_LEVEL": "sse9"}, files("ldmrt.kernels"))
    assert found is None
    assert why_not == "LDMRT_CPU_LEVEL='sse9' is none of baseline, avx2, avx512, avx512_bf16, amx"


def test_another_build_is_loaded_by_its_full_path(tmp_path: Path) -> None:
    found, why_not = native.find({"LDMRT_NATIVE": str(tmp_path / "mine.so")}, tmp_path)
    assert found is None
    assert why_not is not None
    assert "mine.so cannot be loaded" in why_not


def test_damaged_library_is_a_reason_not_a_crash(tmp_path: Path) -> None:
    (tmp_path / native.FILE_NAME).write_bytes(b"\x7fELF and no more")
    library, why_not = native.find({}, tmp_path)
    assert library is None
    assert why_not is not None
    assert "cannot be loaded" in why_not


def test_other_abi_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Other:
        def __init__(self, path: str) -> None:
            self.path = path

        def ldmrt_abi_version(self) -> int:
            return native.ABI_VERSION + 1

    monkeypatch.setattr(ctypes, "CDLL", Other)
    (tmp_path / native.FILE_NAME).touch()
    library, why_not = native.find({}, tmp_path)
    assert library is None
    assert why_not is not None
    assert f"has ABI version {native.ABI_VERSION + 1}, expected {native.ABI_VERSION}" in why_not


def test_library_without_the_version_symbol_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda _path: object())
    (tmp_path / native.FILE_NAME).touch()
    library, why_not = native.find({}, tmp_path)
    assert library is None
    assert why_not is not None
    assert "ldmrt_abi_version" in why_not


def test_sampler_step_runs_without_the_library() -> None:
    """In a process of its own, because the library is looked for once."""
    script = """
import torch
from ldmrt.kernels import native
from ldmrt.kernels.sampler import WIDTH, Basis, Column, sampler_step

assert not native.available(), native.library()
assert "LDMRT_NATIVE=0" in native.why_not(), native.why_not()
table = torch.zeros(1, WIDTH)
table[0, Column.NEXT_X + Basis.M] = 2
table[0, Column.NEXT_INPUT_SCALE] = 3
x, saved, history = torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.zeros(3, 1, 1, 2, 2)
output, model_input = torch.full((1, 1, 2, 2), 5.0), torch.zeros(1, 1, 2, 2)
index = torch.zeros(1, dtype=torch.int64)
sampler_step(x, saved, history, output, table, index, None, torch.ones(1), index, index - 1, model_input)
assert x.eq(10).all() and model_input.eq(30).all(), (x, model_input)
"""
    environ = {**os.environ, "LDMRT_NATIVE": "0"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
