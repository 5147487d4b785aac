"""`ldmrt convert`: a pickle made a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from .conftest import Run


def test_convert(run: Run, tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(3)}}, tmp_path / "a.ckpt")
    ended = run("convert", tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert ended.out.startswith(f"1 tensor, 12 B, in {tmp_path / 'a.safetensors'}. Next:\n  ldmrt build-engines "), (
        ended.out
    )
    ended = run("convert", tmp_path / "a.ckpt", tmp_path / "b.safetensors", "--no-ema", "--json")
    document = json.loads(ended.out)
    assert document == {
        "file": str(tmp_path / "b.safetensors"),
        "tensors": 1,
        "nbytes": 12,
        "averaged": 0,
        "left_out": 0,
    }
    assert torch.equal(load_file(tmp_path / "b.safetensors")["a"], torch.ones(3))
