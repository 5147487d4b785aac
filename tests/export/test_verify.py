"""Verification: what is measured, and that a wrong engine does not pass."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldmrt
from ldmrt.errors import BuildError
from ldmrt.export.verify import sample_picture
from ldmrt.verify import TOLERANCE, Trial, certify, relative_error, tolerance


def test_relative_error() -> None:
    expected = torch.tensor([3.0, 4.0])
    assert relative_error(expected, expected) == 0.0
    assert relative_error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    # In float64: float32 would lose the difference.
    assert relative_error(torch.tensor([1.0 + 1e-12], dtype=torch.float64), torch.ones(1)) == pytest.approx(
        1e-12, rel=1e-3
    )
    assert relative_error(torch.tensor([0.5]), torch.zeros(1)) == 0.5


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_an_infinite_error(bad: float) -> None:
    good, broken = torch.ones(3), torch.tensor([1.0, bad, 1.0])
    assert relative_error(broken, good) == math.inf
    assert relative_error(good, broken) == math.inf
    assert relative_error(broken, broken) == math.inf


def outputs(value: float, **more: float) -> list[dict[str, torch.Tensor]]:
    return [{name: torch.full((4,), v) for name, v in {"a": value, **more}.items()}]


TRIAL = [Trial("random", {})]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_limit_is_the_dtypes(dtype: str) -> None:
    limit = TOLERANCE[dtype]
    certificate = certify("decoder", "torch", dtype, TRIAL, outputs(1 + 0.9 * limit), outputs(1.0), "somebody")
    assert certificate.status == "verified"
    assert certificate.reference == "somebody"
    assert certificate.tolerance == limit
    assert certificate.relative_error["random"] == pytest.approx(0.9 * limit, rel=0.01)
    with pytest.raises(BuildError, match=f"decoder does not agree .* on random inputs, .* in {dtype}"):
        certify("decoder", "torch", dtype, TRIAL, outputs(1 + 1.1 * limit), outputs(1.0), "somebody")


def test_the_worst_output_of_the_worst_trial_counts() -> None:
    trials = [Trial("random", {}), Trial("random", {}), Trial("real", {})]
    found = outputs(1.0, b=1.0) + outputs(1.0, b=1.00005) + outputs(1.0, b=1.0)
    certificate = certify("x", "torch", "float32", trials, found, 3 * outputs(1.0, b=1.0), "")
    assert certificate.relative_error == {"random": pytest.approx(5e-5, rel=0.01), "real": 0.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("dtype", "cure"), [("float16", "bfloat16 or float32"), ("bfloat16", "float32"), ("float32", "float32")]
)
def test_nan_and_infinity_do_not_pass(bad: float, dtype: str, cure: str) -> None:
    with pytest.raises(BuildError, match=f"^x gives NaN or infinity on random inputs, .* --dtype {cure}$"):
        certify("x", "torch", dtype, TRIAL, outputs(bad), outputs(1.0), "")


def test_an_original_of_nan_certifies_nothing() -> None:
    with pytest.raises(BuildError, match=r"the original model itself gives NaN or infinity .* copy the model again"):
        certify("x", "torch", "float32", TRIAL, outputs(math.nan), outputs(math.nan), "")


def test_the_sample_picture_is_a_picture() -> None:
    picture = sample_picture(24, 16)
    assert picture.shape == (1, 3, 16, 24)
    assert -1 <= picture.min() < -0.5 < 0.5 < picture.max() <= 1


# ---------------------------------------------------------------------------------------------------- in the build


@pytest.mark.parametrize(
    ("folder", "key", "label"),
    [
        ("text_encoder", "final_layer_norm.bias", "text_encoder"),
        ("unet", "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight", "step"),
        ("unet", "time_embedding.linear_2.bias", "step"),
        ("vae", "decoder.conv_out.bias", "decoder"),
        pytest.param("vae", "encoder.conv_in.weight", "encoder", marks=pytest.mark.slow),
    ],
)
def test_one_wrong_weight_is_found_and_its_component_named(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str, key: str, label: str
) -> None:
    """The bundle's weights are damaged between writing and verifying."""
    from ldmrt.export import build
    from ldmrt.weights import write as written

    def damaged(path: Path, specs: Any, load: Any) -> str:
        def wrong(name: str) -> torch.Tensor:
            tensor: torch.Tensor = load(name)
            return tensor + 0.05 if name.removeprefix("text_model.") == key else tensor

        return written(path, specs, wrong if path.name.startswith(folder) else load)

    monkeypatch.setattr(build, "write_weights", damaged)
    with pytest.raises(BuildError, match=rf"^{label} \(torch, float32.*does not agree with the original model"):
        ldmrt.build_engines(tiny_model, tmp_path / "out", engine="torch", dtype="float32")
    assert not (tmp_path / "out").exists()


def test_a_model_that_makes_nan_is_not_built(tiny_model: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny_model, tmp_path / "model")
    path = model / "text_encoder/model.safetensors"
    tensors = load_file(path)
    next(tensor for name, tensor in tensors.items() if "final_layer_norm.weight" in name)[0] = math.nan
    save_file(tensors, path)
    with pytest.raises(BuildError, match=r"text_encoder .* original model itself gives NaN"):
        ldmrt.build_engines(model, tmp_path / "out", engine="torch", dtype="float32")


def test_tolerances_are_ordered_by_precision() -> None:
    assert TOLERANCE["float32"] < TOLERANCE["float16"] < TOLERANCE["bfloat16"] <= 3e-2


def test_float32_of_an_engine_kind_is_as_exact_as_it_can_be() -> None:
    """What adds up in single numbers, or multiplies in ten bits, is not held to what torch's float32 gives."""
    assert tolerance("torch", "float32") < tolerance("onnxruntime", "float32") < tolerance("tensorrt", "float32")
    for kind in ("onnxruntime", "tensorrt", "tensorrt-rtx"):
        assert tolerance(kind, "bfloat16") == TOLERANCE["bfloat16"]
        limit = tolerance(kind, "float32")
        assert certify("x", kind, "float32", TRIAL, outputs(1 + 0.9 * limit), outputs(1.0), "").tolerance == limit
        with pytest.raises(BuildError, match="report this"):
            certify("x", kind, "float32", TRIAL, outputs(1 + 1.1 * limit), outputs(1.0), "")
