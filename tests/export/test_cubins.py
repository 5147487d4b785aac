"""Kernels in a bundle: which an engine needs is known without a GPU, and building puts them there compiled."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch

import ldmrt
from ldmrt.bundle import Bundle
from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BuildError, BundleError
from ldmrt.export import cubins
from ldmrt.graph import Graph, Node, Ref
from ldmrt.kernels import launch
from ldmrt.kernels.variant import Variant

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
F16 = torch.float16


def graph(*nodes: Node, output: str) -> Graph:
    shape = nodes[-1].shape
    assert all(isinstance(size, int) for size in shape)
    return Graph(
        name="part",
        inputs=(TensorSpec("x", (2, 64, 16, 16), F16),),
        weights={"w": TensorSpec("w", (64, 64, 3, 3), F16), "g": TensorSpec("g", (64,), F16)},
        constants={},
        nodes=nodes,
        outputs={"y": output},
    )


def norm(source: str) -> Node:
    return Node(
        "y",
        "ldmrt.group_norm_silu.default",
        (Ref(source), Ref("g"), Ref("g"), 32, 1e-5, True),
        {},
        (2, 64, 16, 16),
        F16,
    )


def conv(source: str) -> Node:
    args = (Ref(source), Ref("w"), None, (1, 1), (1, 1))
    return Node("conv", "aten.conv2d.default", args, {}, (2, 64, 16, 16), F16)


def ordered() -> Node:
    kwargs = {"memory_format": torch.channels_last}
    return Node("ordered", "aten.contiguous.default", (Ref("x"),), kwargs, (2, 64, 16, 16), F16)


def constants(found: list[Variant]) -> dict[str, object]:
    (variant,) = found
    return dict(variant.constants)


def test_what_an_engine_launches() -> None:
    (variant,) = cubins.variants([graph(norm("x"), output="y")], 89)
    assert variant.kernel.startswith("group_norm.")
    assert variant.types[0] == "*fp16"


def test_nothing_is_launched_without_fused_operators() -> None:
    assert cubins.variants([graph(conv("x"), output="conv")], 89) == []


def test_convolutions_keep_the_order_of_their_input_as_on_a_gpu() -> None:
    plain = constants(cubins.variants([graph(conv("x"), norm("conv"), output="y")], 89))
    last = constants(cubins.variants([graph(ordered(), conv("ordered"), norm("conv"), output="y")], 89))
    assert (plain["CHANNELS_LAST"], last["CHANNELS_LAST"]) == (False, True)


def test_each_variant_once() -> None:
    part = graph(norm("x"), output="y")
    assert len(cubins.variants([part, part, part], 89)) == 1


def test_a_step_brings_the_samplers_update(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    found = {variant.kernel for variant in cubins.variants([bundle.graph(bundle.find("step")[0])], 90)}
    assert {"sampler.step", "sampler.advance", "layer_norm.forward", "geglu.forward"} <= found


@pytest.mark.parametrize("target", ["sm_75", "89", "sm_89a", ""])
def test_targets_that_are_not_known(target: str) -> None:
    with pytest.raises(BuildError, match="choose among sm_80, "):
        cubins.architecture(target)


def test_targets_are_for_the_torch_engine(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="not on sm_89; use --engine torch"):
        ldmrt.build_engines(tiny_model, tmp_path / "out", engine="onnxruntime", targets=["sm_89"])


@pytest.fixture(scope="module")
def built(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For one target in float32, then another size of batch for one target more."""
    out = tmp_path_factory.mktemp("bundles") / "kernels"
    ldmrt.build_engines(tiny_model, out, dtype="float32", targets=["sm_86"])
    first = {path.name for path in out.glob("kernels-*/*.cubin")}
    ldmrt.build_engines(tiny_model, out, dtype="float32", batch_sizes=(1, 3), targets=["sm_90"])
    assert first <= {path.name for path in out.glob("kernels-*/*.cubin")}
    return out


@needs_triton
@pytest.mark.slow
def test_a_bundle_has_what_its_engines_launch(built: Path) -> None:
    """For both targets, all engines; in one folder, with nothing of the first build's left beside it."""
    bundle = Bundle.open(built)
    there = {(cubin.variant, cubin.arch) for cubin in bundle.cubins()}
    graphs = [bundle.graph(record) for record in bundle.manifest.engines]
    for arch in (86, 90):
        wanted = cubins.variants(graphs, arch)
        assert len(wanted) > 5
        assert {(variant, arch) for variant in wanted} == {item for item in there if item[1] == arch}
    (folder,) = built.glob("kernels-*")
    assert {path.relative_to(built).as_posix() for path in folder.iterdir()} == {
        record.file for record in bundle.manifest.kernels
    }
    assert launch.register(folder) == len({cubin.key for cubin in bundle.cubins()})


@needs_triton
@pytest.mark.slow
def test_damaged_kernels_are_refused(built: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(built, copy)
    cubin = next(copy.glob("kernels-*/*.cubin"))
    cubin.write_bytes(cubin.read_bytes()[:-1] + b"x")
    with pytest.raises(BundleError, match=r"damaged: its SHA-256"):
        Bundle.open(copy).cubins()
    index = next(copy.glob("kernels-*/kernels.json"))
    data = json.loads((copy / "ldmrt.json").read_text())
    data["kernels"] = [item for item in data["kernels"] if item["file"].endswith("kernels.json")]
    (copy / "ldmrt.json").write_text(json.dumps(data))
    with pytest.raises(BundleError, match="another SHA-256 than expected"):
        Bundle.open(copy).cubins()
    index.unlink()
    with pytest.raises(BundleError, match="missing"):
        Bundle.open(copy).cubins()
