"""What a launch needs, and the key that it is found by."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmrt.kernels import variant as module
from ldmrt.kernels.variant import TYPES, Argument, Variant, source_hash

VARIANT = Variant.of("sampler.advance", [torch.zeros(4), torch.zeros(4), 4], {"BLOCK": 128}, 1, 1)


def test_types_and_alignment() -> None:
    row = torch.empty(3, 8, dtype=torch.float16)
    arguments: list[Argument] = [row, row[:, 1:], row[1:], 32, 33, 2**31, -(2**31), 16.0, 1]
    found = Variant.of("file.kernel", arguments, {"B": 2, "A": True}, 4, 3, fp_fusion=False)
    assert found.types == ("*fp16", "*fp16", "*fp16", "i32", "i32", "i64", "i32", "fp32", "i32")
    assert found.aligned == (True, False, True, True, False, True, True, False, False)
    assert found.constants == (("A", True), ("B", 2))
    assert (found.num_warps, found.num_stages, found.fp_fusion) == (4, 3, False)


@pytest.mark.parametrize("dtype", list(TYPES))
def test_meta_tensors_need_what_real_ones_do(dtype: torch.dtype) -> None:
    def slices(device: str) -> list[Tensor]:
        whole = torch.zeros(64, dtype=dtype, device=device)
        return [whole[first:] for first in (0, 1, 2, 4, 8, 16, 32)]

    assert Variant.of("file.kernel", slices("meta"), {}, 4, 2) == Variant.of("file.kernel", slices("cpu"), {}, 4, 2)


@pytest.mark.parametrize(
    "change",
    [
        {"kernel": "sampler.step"},
        {"types": ("*fp32", "*fp32", "i64")},
        {"aligned": (True, False, False)},
        {"constants": (("BLOCK", 256),)},
        {"constants": (("block", 128),)},
        {"num_warps": 2},
        {"num_stages": 2},
        {"fp_fusion": False},
    ],
)
def test_every_field_is_in_the_key(change: dict[str, Any]) -> None:
    assert replace(VARIANT, **change).key() != VARIANT.key()


def test_the_source_is_in_the_key() -> None:
    assert VARIANT.key("0" * 64) != VARIANT.key("1" * 64)
    assert VARIANT.key(source_hash("sampler.advance")) == VARIANT.key()


def test_the_hash_covers_the_file_and_what_it_imports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "gpu"
    folder.mkdir()
    monkeypatch.setattr(module, "files", lambda _package: tmp_path)
    texts = {
        "a": "import triton\nfrom ldmrt.kernels.gpu import b\n",
        "b": "from ldmrt.kernels.gpu.c import helper\nimport ldmrt.kernels.gpu.a\n",
        "c": "import triton.language as tl\n",
        "d": "import math\n",
    }

    def hashes() -> tuple[str, ...]:
        module._hash.cache_clear()
        return tuple(source_hash(f"{name}.kernel") for name in texts)

    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    try:
        before = hashes()
        assert len(set(before)) == 3  # a and b import each other, so they are of the same three files
        (folder / "c.py").write_text(texts["c"] + "\n")
        after = hashes()
    finally:
        module._hash.cache_clear()
    assert [old != new for old, new in zip(before, after, strict=True)] == [True, True, True, False]


@pytest.mark.parametrize(
    "kernel", ["sampler", "../launch.run", "sampler.step.more", "Sampler.step", "", "a/b.c", "sampler.é"]
)
def test_a_name_that_is_none_is_refused(kernel: str) -> None:
    with pytest.raises(ValueError, match=r"is not a name like file\.function"):
        source_hash(kernel)


def test_a_kernel_of_another_version_is_named() -> None:
    with pytest.raises(ValueError, match=r"there is no kernels/gpu/nothing\.py in this version"):
        source_hash("nothing.kernel")


def test_the_key_needs_no_triton() -> None:
    # torch imports triton by itself where it is installed; None in sys.modules makes that fail as if it were not.
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from ldmrt.kernels.variant import Variant\n"
        "print(Variant.of('sampler.advance', [torch.zeros(4), torch.zeros(4), 4], {'BLOCK': 128}, 1, 1).key())"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == VARIANT.key(), done.stderr
