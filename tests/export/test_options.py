"""What to build: defaults of the model and of the machine, and refusals."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from ldmrt.errors import BuildError
from ldmrt.export import options
from ldmrt.export.options import Options
from ldmrt.export.source import Source


@pytest.fixture
def source(tiny_model: Path) -> Source:
    return Source.open(tiny_model)


def resolve(source: Source, **changes: Any) -> Options:
    asked: dict[str, Any] = {"engine": "auto", "sizes": None, "batch_sizes": (1,), "dtype": "float32", **changes}
    return Options.resolve(source, **asked)


def test_what_is_not_said_is_the_models_own(source: Source) -> None:
    assert resolve(source) == Options("torch", "float32", ((64, 64),), (1,))
    recommended = dataclasses.replace(source, defaults={"width": 128, "height": 72})
    assert resolve(recommended).sizes == ((128, 72),)


@pytest.mark.parametrize(("native", "dtype"), [(True, "bfloat16"), (False, "float32")])
def test_auto_is_what_the_processor_computes_in(
    source: Source, monkeypatch: pytest.MonkeyPatch, native: bool, dtype: str
) -> None:
    monkeypatch.setattr(options, "has_native_bfloat16", lambda: native)
    assert resolve(source, dtype="auto").dtype == dtype
    assert resolve(source, dtype="auto", engine="onnxruntime").dtype == "float32"


def test_repetitions_go_and_order_is_kept(source: Source) -> None:
    found = resolve(source, sizes=[(64, 64), (128, 64), (64, 64)], batch_sizes=[4, 1, 4])
    assert found.sizes == ((64, 64), (128, 64))
    assert found.batch_sizes == (1, 4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "pytorch"}, "engine 'pytorch' is not known; choose one of auto, torch, onnxruntime"),
        ({"dtype": "fp16"}, "dtype 'fp16' is not known; choose one of auto, float32"),
        ({"engine": "onnxruntime", "dtype": "bfloat16"}, "float32 only, bfloat16 was asked for; use --dtype float32"),
        ({"sizes": [(100, 64)]}, "size 100x64 is not a multiple of 8 pixels each way; use 96x64"),
        ({"sizes": [(4, 64)]}, "use 8x64"),
        ({"sizes": []}, "at least one"),
        ({"batch_sizes": [0]}, r"batch sizes are \[0\], expected at least one, from 1 to 31"),
        ({"batch_sizes": [32]}, "from 1 to 31"),
        ({"batch_sizes": []}, "at least one"),
    ],
)
def test_refusals_say_the_cure(source: Source, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BuildError, match=message):
        resolve(source, **changes)


RTX = {"engine": "tensorrt-rtx", "dtype": "float16"}


@pytest.mark.rtx
@pytest.mark.parametrize(
    ("here", "targets"), [(None, ("sm_89",)), ("sm_86", ("sm_89",)), ("sm_89", ("sm_86", "sm_89"))]
)
def test_weights_that_change_need_their_gpu(
    source: Source, monkeypatch: pytest.MonkeyPatch, here: str | None, targets: tuple[str, ...]
) -> None:
    monkeypatch.setattr(options, "gpu_at_hand", lambda: here)
    with pytest.raises(
        BuildError, match=r"are built on their GPU, for that one alone; .*: build there, or leave --refit"
    ):
        resolve(source, targets=targets, refit=True, **RTX)


@pytest.mark.rtx
def test_weights_that_change_or_stream(source: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "gpu_at_hand", lambda: "sm_89")
    assert resolve(source, refit=True, **RTX).refit
    assert resolve(source, targets=("sm_86", "sm_89"), weight_streaming=True, **RTX).weight_streaming


@pytest.mark.parametrize("what", ["refit", "weight_streaming"])
def test_only_plans_take_their_options(source: Source, what: str) -> None:
    with pytest.raises(BuildError, match=r"are TensorRT's, engine torch has none of them; use --engine tensorrt or"):
        resolve(source, **{what: True})
