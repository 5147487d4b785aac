"""`ldmrt doctor`: what it says of the machine."""

from __future__ import annotations

import json

import torch

from .conftest import Run


def test_doctor(run: Run) -> None:
    ended = run("doctor")
    assert (ended.code, ended.err) == (0, "")
    assert torch.__version__ in ended.out
    assert json.loads(run("doctor", "--json").out)["torch"]["version"] == torch.__version__
