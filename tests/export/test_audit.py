"""The range audit: what it measures, and builds of a VAE that float16 does not hold."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from typer.testing import CliRunner

import ldmrt
from ldmrt.bundle import Bundle
from ldmrt.cli import app
from ldmrt.engines.protocol import TensorSpec
from ldmrt.engines.torch import TorchEngine
from ldmrt.errors import BuildError
from ldmrt.export import architectures
from ldmrt.export.audit import LARGEST, MARGIN, audit, too_large
from ldmrt.export.compile import compile_component
from ldmrt.export.component import Component
from ldmrt.export.onnx import write_onnx
from ldmrt.export.passes.widen import widen
from ldmrt.export.source import Checkpoint, Source
from ldmrt.graph import Dim, Graph, Node, Ref, specialize
from ldmrt.manifest import MANIFEST
from ldmrt.verify import Trial, relative_error
from ldmrt.weights import WeightFile, sha256, write

F16, F32 = torch.float16, torch.float32
SIZE = (64, 64)
ROWS = Dim("rows")

# ---------------------------------------------------------------------------------------------------- a few nodes


def graph(*nodes: Node) -> Graph:
    return Graph(
        name="part",
        inputs=(TensorSpec("x", ("rows", 2, 5, 4), F16),),
        weights={"w": TensorSpec("w", (4, 4), F16)},
        constants={"mask": torch.tensor([0.0, -math.inf], dtype=F16), "lowest": torch.tensor([[-LARGEST]], dtype=F16)},
        nodes=nodes,
        outputs={"out": nodes[-1].name},
    )


def node(name: str, op: str, *args: object, shape: tuple[int | Dim, ...] = (ROWS, 2, 5, 4)) -> Node:
    return Node(name, f"aten.{op}", args, {}, shape, F16)


X, W = Ref("x"), Ref("w")
ONES = {"w": torch.ones(4, 4)}


def trial(*values: float) -> Trial:
    return Trial("some", {"x": torch.tensor(values).reshape(-1, 1, 1, 1).expand(-1, 2, 5, 4).contiguous()})


def test_the_largest_magnitude_of_all_trials() -> None:
    found = audit(
        graph(node("scaled", "mul.Tensor", X, -3.0), node("layer", "linear.default", Ref("scaled"), W)),
        ONES.__getitem__,
        # Of one row and of two; beyond float16 on the way.
        [trial(1.0), trial(-1e5, 10.0)],
    )
    # Within bfloat16's rounding, which the audit may run in.
    assert found == {"scaled": pytest.approx(3e5, rel=1e-2), "layer": pytest.approx(1.2e6, rel=1e-2)}
    assert too_large(found) == found


def test_what_comes_near_the_end_is_too_large() -> None:
    limit = 65504 / 2
    assert (LARGEST, MARGIN) == (65504, 2)
    assert too_large({"below": limit, "above": limit + 1}) == {"above": limit + 1}


def test_masks_are_not_values_that_overflow() -> None:
    found = audit(
        graph(
            node("hidden", "expand.default", Ref("lowest"), (ROWS, 2, 5, 4)),
            node("wide", "expand.default", Ref("mask"), (ROWS, 2, 5, 2), shape=(ROWS, 2, 5, 2)),
            node("half", "slice.Tensor", X, 3, 0, 2, shape=(ROWS, 2, 5, 2)),
            node("masked", "add.Tensor", Ref("half"), Ref("wide"), shape=(ROWS, 2, 5, 2)),
            node("last", "cat.default", (X, Ref("hidden")), 0, shape=(Dim("rows", 2), 2, 5, 4)),
            node("out", "cat.default", (Ref("masked"), Ref("masked")), -1),
        ).replace(outputs={"out": "out", "last": "last"}),
        ONES.__getitem__,
        [trial(7.0)],
    )
    assert "hidden" not in found
    assert found["masked"] == 7.0, "infinity is no overflow where the model put it"


def test_scores_of_an_attention_that_is_not_fused_count() -> None:
    attention = node("out", "scaled_dot_product_attention.default", X, X, X)
    inputs = {"x": 300 * torch.randn(2, 2, 5, 4, generator=torch.Generator().manual_seed(0))}
    found = audit(graph(attention), ONES.__getitem__, [Trial("random", inputs)])["out"]
    scores = (inputs["x"] @ inputs["x"].transpose(-1, -2)).abs().max() * 4**-0.5
    assert scores > LARGEST > F.scaled_dot_product_attention(inputs["x"], inputs["x"], inputs["x"]).abs().max()
    # Of equal queries and keys the longest meets itself.
    assert found == pytest.approx(float(scores), rel=1e-2)  # in bfloat16, where that is quicker


@pytest.mark.parametrize("bad", [7e4, math.inf, math.nan])
def test_a_weight_that_float16_does_not_hold_is_refused(bad: float) -> None:
    weight = torch.ones(4, 4)
    weight[1, 2] = bad
    with pytest.raises(BuildError, match=r"^part: the weight w reaches .* --dtype bfloat16 or float32") as caught:
        audit(graph(node("out", "linear.default", X, W)), lambda _: weight, [trial(1.0)])
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------- a VAE

FACTOR = 2.0**17  # what is about 1 is then beyond float16, the weights are not


def scale(folder: Path) -> None:
    """Make the residual stream of a VAE's decoder `FACTOR` times as large: group norms take it out again, so pictures stay.

    The stream is fed by the first convolution, the second one of every residual block, and attention's projection; the layers
    that read and write it see their biases alone scaled.
    """
    path = folder / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    feeds = re.compile(
        r"decoder\.(conv_in|.*\.conv2|.*\.to_out\.0)\.|decoder\..*(conv_shortcut|upsamplers\.0\.conv)\.bias"
    )
    for name in filter(feeds.match, tensors):
        tensors[name] *= FACTOR
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.fixture(scope="module")
def large_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_model`, its decoder's residual stream beyond float16."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("models") / "large"))
    scale(folder)
    return folder


def decoder(model: Path) -> tuple[Component, Checkpoint, list[Trial]]:
    source = Source.open(model)
    plans = architectures.components(source, [SIZE])
    component, trials = next((item, trials) for _, item, trials in plans if item.name == "decoder")
    return component, Checkpoint(source, "vae", component.original), trials()


def compiled(model: Path, *, fused: bool, audited: bool = True) -> tuple[Graph, dict[str, float]]:
    """The decoder in float16 for one row, its weights under the module's names, and what the audit found."""
    component, checkpoint, trials = decoder(model)
    found: dict[str, float] = {}

    def fit(captured: Graph) -> Graph:
        ranges = audit(captured, lambda name: checkpoint.load(name.removeprefix("module.")).float(), trials)
        found.update(too_large(ranges))
        return widen(captured, found)

    (whole,) = compile_component(component, F16, fused=fused, fit=fit if audited else lambda graph: graph).graphs
    return specialize(whole, {"rows": 1}), found


def weights(model: Path, whole: Graph) -> dict[str, torch.Tensor]:
    _, checkpoint, _ = decoder(model)
    return {name: checkpoint.load(name.removeprefix("module.")).to(F16) for name in whole.weights}


def expected(model: Path) -> list[torch.Tensor]:
    """What diffusers makes of the trials in float32."""
    component, checkpoint, trials = decoder(model)
    original = architectures.reference(component, checkpoint)
    with torch.inference_mode():
        return [original(*item.inputs.values())[0] for item in trials]


def test_the_two_decoders_draw_the_same_pictures(tiny_model: Path, large_model: Path) -> None:
    for plain, large in zip(expected(tiny_model), expected(large_model), strict=True):
        # All that differs is what a group norm adds to a variance, 1e-6.
        assert relative_error(large, plain) < 1e-4


@pytest.mark.parametrize("fused", [False, True])
def test_what_overflows_is_widened_and_the_picture_is_whole(large_model: Path, fused: bool) -> None:
    narrow, _ = compiled(large_model, fused=fused, audited=False)
    whole, found = compiled(large_model, fused=fused)
    assert len(found) > 10
    # Between the norms of a residual block values fit: they and their convolutions stay as they were.
    halves = [node for node in whole.nodes if "conv2d" in node.op and node.dtype == F16]
    assert len(halves) >= 5
    held = weights(large_model, whole)
    _, _, trials = decoder(large_model)
    for item, picture in zip(trials, expected(large_model), strict=True):
        inputs = {name: value.to(F16) for name, value in item.inputs.items()}
        before, after = (
            TorchEngine(g, held, torch.device("cpu")).run(inputs)["image"].float() for g in (narrow, whole)
        )
        assert not before.isfinite().all()
        assert relative_error(after, picture) < 1e-2


@pytest.mark.parametrize("fused", [False, True])
def test_a_decoder_that_fits_is_left_as_it_is(tiny_model: Path, fused: bool) -> None:
    whole, found = compiled(tiny_model, fused=fused)
    assert not found
    assert whole == compiled(tiny_model, fused=fused, audited=False)[0]


def as_onnx(model: Path, folder: Path) -> Path:
    """The widened decoder, unfused, as ONNX."""
    whole, found = compiled(model, fused=False)
    assert found
    file, path = folder / "w.safetensors", folder / "decoder.onnx"
    write(file, list(whole.weights.values()), weights(model, whole).__getitem__)
    write_onnx(whole, dict.fromkeys(whole.weights, WeightFile(file)), path)
    return path


def test_the_widened_decoder_as_onnx(
    large_model: Path, tmp_path: Path, assert_strictly_typed: Callable[[Path], None]
) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    path = as_onnx(large_model, tmp_path)
    assert_strictly_typed(path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for item, picture in zip(decoder(large_model)[2], expected(large_model), strict=True):
        (image,) = session.run(None, {name: value.to(F16).numpy() for name, value in item.inputs.items()})
        assert image.dtype == np.float16
        assert relative_error(torch.from_numpy(image).float(), picture) < 1e-2


@pytest.mark.rtx
def test_tensorrt_for_rtx_reads_the_widened_decoder(large_model: Path, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    logger = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(logger).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    read = parser.parse_from_file(str(as_onnx(large_model, tmp_path)))
    assert read, [parser.get_error(number).desc() for number in range(parser.num_errors)]
    assert network.get_output(0).dtype == trt.float16


# ---------------------------------------------------------------------------------------------------- builds


def test_a_build_says_and_records_what_it_widened(large_model: Path, tmp_path: Path) -> None:
    said: list[str] = []
    out = tmp_path / "bundle"
    build = partial(
        ldmrt.build_engines,
        large_model,
        out,
        dtype="float16",
        on_progress=lambda what, _done, _total: said.append(what),
    )
    manifest = build().manifest
    audits = {record.component: record for record in manifest.audits}
    assert set(audits) == {"text_encoder", "unet", "decoder", "encoder"}
    assert [name for name, record in audits.items() if record.widened] == ["decoder"]
    widened = audits["decoder"].widened
    assert min(widened.values()) > LARGEST / MARGIN
    assert manifest.passes["decoder"]["widened"] == len(widened)
    (line,) = [what for what in said if "float16" in what]
    assert line.startswith(f"decoder 64x64: {len(widened)} values of up to ")
    errors = {engine.component: engine.certificate.relative_error for engine in manifest.engines}
    assert max(errors["decoder"].values()) < 1e-2
    shown = CliRunner().invoke(app, ["inspect", str(out)])
    assert all(name in shown.stdout for name in widened)
    assert json.loads(CliRunner().invoke(app, ["inspect", str(out), "--json"]).stdout)["audits"]

    said.clear()
    digest = sha256(out / MANIFEST)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldmrt.export.build.audit", None)  # what is known is not computed again
        build()
    assert sha256(out / MANIFEST) == digest
    assert sum("already built" in what for what in said) == 4


def test_a_bundle_from_before_the_audits_opens(tiny_bundle: Path, tmp_path: Path) -> None:
    manifest = json.loads((tiny_bundle / MANIFEST).read_text())
    assert manifest.pop("audits") == []
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (bundle / MANIFEST).write_text(json.dumps(manifest))
    assert Bundle.open(bundle).manifest == Bundle.open(tiny_bundle).manifest


@pytest.mark.parametrize("bad", [1e5, math.inf])
def test_a_vae_whose_weights_do_not_fit_is_refused(tiny_model: Path, tmp_path: Path, bad: float) -> None:
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    path = model / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_out.weight"][0, 0, 0, 0] = bad
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(BuildError, match=r"^decoder: the weight decoder\.conv_out\.weight reaches") as caught:
        ldmrt.build_engines(model, tmp_path / "out", dtype="float16")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()
