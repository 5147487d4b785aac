"""ControlNets at build time: which are taken, what they become, and what is left as it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import ldmrt
from ldmrt.bundle import Bundle
from ldmrt.errors import BuildError
from ldmrt.export import architectures
from ldmrt.export.capture import capture
from ldmrt.export.controlnets import with_controlnets
from ldmrt.export.passes.clean import clean
from ldmrt.export.passes.hoist import hoist
from ldmrt.export.source import Source

SIZE = (64, 64)
STEPS = {"controlled.step", "controlnet.edges.step", "controlnet.depth.step"}


def test_engines_are_added_to_those_that_are_there(tiny_bundle: Path, tiny_bundle_controlled: Path) -> None:
    before, after = (Bundle.open(path).manifest for path in (tiny_bundle, tiny_bundle_controlled))
    assert [record.name for record in after.controlnets] == ["edges", "depth"]
    assert [file.file for file in after.controlnets[0].files] == ["config.json", "diffusion_pytorch_model.safetensors"]
    keys = {record.key for record in before.engines}
    assert keys < {record.key for record in after.engines}  # the U-Net's own context and schedule serve both its steps
    added = [record for record in after.engines if record.key not in keys]
    nets = [f"controlnet.{name}.{part}" for name in ("edges", "depth") for part in ("context", "schedule", "step")]
    assert {record.component for record in added} == {"controlled.step", *nets}
    for record in added:
        part = record.component.rpartition(".")[2]
        assert record.size == (None if part == "schedule" else SIZE), record.label  # the context reads a picture
        assert max(record.certificate.relative_error.values()) < 1e-5
    assert {record.rows for record in added if record.component in STEPS} == {1, 2, 4}
    step = next(record for record in added if record.component == "controlled.step")
    assert step.weights == "unet.float32"  # one copy for both steps


def test_what_a_control_image_alone_decides_runs_once(tiny_model: Path, tiny_controlnets: list[Path]) -> None:
    source = with_controlnets(Source.open(tiny_model), tiny_controlnets)
    component = architectures.controlnet(source, "controlnet.edges", SIZE)
    graph = clean(capture(component.name, component.module, component.inputs, component.outputs))
    parts = hoist(graph, component.kinds)
    assert {spec.name for spec in parts.context.inputs} == {"controlnet_cond", "encoder_hidden_states"}
    assert {spec.name for spec in parts.step.inputs} == {
        "latents", "conditioning_scale", *parts.context.outputs, *parts.schedule.outputs,
    }  # fmt: skip
    # A convolution in, two for each width, one out.
    convolutions = [sum(node.op == "aten.conv2d.default" for node in part.nodes) for part in (parts.context, graph)]
    assert convolutions[0] == 2 + 2 * 3
    assert "controlnet_cond_embedding.conv_out" in str(parts.context.outputs)


@pytest.mark.slow
def test_a_second_build_keeps_the_first_ones_controlnets(
    tiny_model: Path, tiny_controlnets: list[Path], tiny_bundle_controlled: Path, tmp_path: Path
) -> None:
    path = Path(shutil.copytree(tiny_bundle_controlled, tmp_path / "bundle"))
    before = Bundle.open(path).manifest
    again = ldmrt.build_engines(tiny_model, path, dtype="float32", batch_sizes=(1, 2), controlnets=tiny_controlnets[1:])
    assert again.manifest.controlnets == before.controlnets
    assert {record.key for record in again.manifest.engines} == {record.key for record in before.engines}
    other = shutil.copytree(tiny_controlnets[0], tmp_path / "depth")
    with pytest.raises(BuildError, match="holds another ControlNet called depth; rename the folder"):
        ldmrt.build_engines(tiny_model, path, dtype="float32", controlnets=[other])
    assert Bundle.open(path).manifest == again.manifest


def changed(controlnet: Path, folder: Path, changes: dict[str, Any]) -> Path:
    shutil.copytree(controlnet, folder)
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "ControlNetUnionModel"}, "is a ControlNetUnionModel, expected a ControlNetModel"),
        ({"global_pool_conditions": True}, "guess mode"),
        ({"conditioning_channels": 1}, "takes pictures of 1 channels"),
        (
            {"addition_embed_type": "text_time"},
            "for another architecture than tiny .*its addition_embed_type is text_time",
        ),
    ],
)
def test_what_is_not_built(
    tiny_model: Path, tiny_controlnets: list[Path], tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = changed(tiny_controlnets[0], tmp_path / "net", changes)
    with pytest.raises(BuildError, match=message):
        with_controlnets(Source.open(tiny_model), [path])


def test_a_controlnet_for_another_architecture_names_both(tiny_model: Path, tiny_controlnet_xl: Path) -> None:
    with pytest.raises(
        BuildError, match=r"canny-xl is a ControlNet for another architecture than tiny \(stable-diffusion\)"
    ) as caught:
        with_controlnets(Source.open(tiny_model), [tiny_controlnet_xl])
    assert "\n" not in str(caught.value)


def test_names(tiny_model: Path, tiny_controlnets: list[Path], tmp_path: Path) -> None:
    source = Source.open(tiny_model)
    with pytest.raises(BuildError, match="no ControlNet: expected a folder"):
        with_controlnets(source, [tmp_path / "none"])
    with pytest.raises(BuildError, match="are both called edges; rename one"):
        with_controlnets(source, [tiny_controlnets[0], shutil.copytree(tiny_controlnets[1], tmp_path / "edges")])
    with pytest.raises(BuildError, match="called like its folder, expected letters"):
        with_controlnets(source, [shutil.copytree(tiny_controlnets[1], tmp_path / "two words")])


@pytest.mark.slow
@pytest.mark.rtx
def test_plans(tiny_model: Path, tiny_controlnets: list[Path], tmp_path: Path) -> None:
    """TensorRT plans of the parts that run at every step, in float16; what runs once per request is on the torch engine."""
    pytest.importorskip("tensorrt_rtx_bindings", reason="pip install 'ldmrt[tensorrt-rtx]'", exc_type=ImportError)
    options: dict[str, Any] = {"engine": "tensorrt-rtx", "targets": ["sm_89"], "controlnets": tiny_controlnets[:1]}
    bundle = ldmrt.build_engines(tiny_model, tmp_path / "rtx", **options)
    found = {r.component: r for r in bundle.manifest.engines if "control" in r.component}
    kinds = {component: (record.kind, record.rows) for component, record in found.items()}
    assert kinds == {
        "controlled.step": ("tensorrt-rtx", 2),
        "controlnet.edges.context": ("torch", None),
        "controlnet.edges.schedule": ("torch", None),
        "controlnet.edges.step": ("tensorrt-rtx", 2),
    }
    for component in ("controlled.step", "controlnet.edges.step"):
        record = found[component]
        assert record.dtype == "float16"
        assert record.certificate.status.startswith("unverified: target absent (its ONNX agrees")
        assert record.trials is not None
