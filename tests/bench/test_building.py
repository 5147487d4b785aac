"""Builds in another process: what they raise arrives here, and so does their end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ldmrt.bench.building import build_apart
from ldmrt.errors import BuildError


@pytest.mark.parametrize("options", [{}, {"sizes": ((64, 64),), "batch_sizes": (1, 2), "dtype": "float32"}])
def test_an_error_of_the_build_is_raised_here(tmp_path: Path, options: dict[str, Any]) -> None:
    seen: list[tuple[object, ...]] = []
    with pytest.raises(BuildError, match=str(tmp_path / "none")):
        build_apart(tmp_path / "none", tmp_path / "bundle", options, lambda *now: seen.append(now))
    assert not (tmp_path / "bundle").exists()


def test_a_process_that_ends_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ending = tmp_path / "ending"
    ending.write_text("#!/bin/sh\nexit 3\n")
    ending.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(ending))
    with pytest.raises(
        BuildError, match=r"stopped with exit code 3; try it alone: ldmrt build-engines .*model --out DIR"
    ):
        build_apart(tmp_path / "model", tmp_path / "bundle", {}, lambda *_: None)
