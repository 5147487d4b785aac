"""ONNX files: valid, small, their weights read from the bundle's own files by offset."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from onnx import TensorProto

from ldmrt.bundle import Bundle
from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BuildError
from ldmrt.export.onnx import OPSET, write_onnx
from ldmrt.graph import Graph, Node, Ref
from ldmrt.weights import WeightFile, write

F32 = torch.float32


@pytest.fixture(scope="module")
def bundle(tiny_bundle_onnx: Path) -> Bundle:
    return Bundle.open(tiny_bundle_onnx)


def files(bundle: Bundle) -> Iterator[tuple[str, Path]]:
    for record in bundle.manifest.engines:
        if record.kind == "onnxruntime":
            yield record.weights, bundle.path / record.files[0].file


def test_each_is_valid_and_of_one_opset(bundle: Bundle) -> None:
    paths = [path for _, path in files(bundle)]
    assert len(paths) == 5  # text encoder, decoder, encoder, and the step for one and two rows
    for path in paths:
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(str(path), load_external_data=False)
        assert {(item.domain, item.version) for item in model.opset_import} >= {("", OPSET)}
        assert {item.domain for item in model.opset_import} == {""}
        assert path.parent == bundle.path


def test_weights_are_external_and_not_repeated(bundle: Bundle) -> None:
    for weights, path in files(bundle):
        model = onnx.load(str(path), load_external_data=False)
        held = WeightFile(bundle.path / bundle.manifest.weights[weights].file)
        ranges = {(entry.offset, entry.nbytes): tuple(entry.shape) for entry in held.entries.values()}
        external = 0
        for tensor in model.graph.initializer:
            if tensor.data_location != TensorProto.EXTERNAL:
                # What lies inside is literals and the causal mask: no weight has found its way in.
                assert tensor.data_type == TensorProto.BOOL or len(tensor.raw_data) <= 4096, tensor.name
                continue
            place = {item.key: item.value for item in tensor.external_data}
            assert place["location"] == bundle.manifest.weights[weights].file
            assert ranges[int(place["offset"]), int(place["length"])] == tuple(tensor.dims)
            external += 1
        assert external > 10
        inside = path.stat().st_size
        assert inside < 0.5e6
        assert not any(item.suffix == ".data" for item in bundle.path.iterdir())


def test_every_weight_of_the_graph_is_there(bundle: Bundle) -> None:
    """All weights of the VAE are in its decoder or its encoder."""
    used = set()
    for weights, path in files(bundle):
        if weights == "vae.float32":
            for tensor in onnx.load(str(path), load_external_data=False).graph.initializer:
                if tensor.data_location == TensorProto.EXTERNAL:
                    used.add(next(int(item.value) for item in tensor.external_data if item.key == "offset"))
    held = WeightFile(bundle.path / bundle.manifest.weights["vae.float32"].file)
    assert used == {entry.offset for entry in held.entries.values()}


def linear(op: str = "aten.linear.default") -> Graph:
    return Graph(
        name="layer",
        inputs=(TensorSpec("x", (2, 4), F32),),
        weights={"w": TensorSpec("w", (6, 4), F32)},
        constants={"c": torch.arange(6.0)},
        nodes=(
            Node("y", op, (Ref("x"), Ref("w")), {}, (2, 6), F32),
            Node("z", "aten.add.Tensor", (Ref("y"), Ref("c")), {}, (2, 6), F32),
        ),
        outputs={"out": "z"},
    )


@pytest.fixture
def held(tmp_path: Path) -> dict[str, WeightFile]:
    (tmp_path / "weights").mkdir()
    path = tmp_path / "weights" / "w.safetensors"
    write(path, [TensorSpec("w", (6, 4), F32)], lambda _: torch.arange(24.0).reshape(6, 4))
    return {"w": WeightFile(path)}


def test_names_and_a_location_below(held: dict[str, WeightFile], tmp_path: Path) -> None:
    digest = write_onnx(linear(), held, tmp_path / "layer.onnx")
    assert len(digest) == 64
    model = onnx.load(str(tmp_path / "layer.onnx"))
    assert [value.name for value in model.graph.input] == ["x"]
    assert [value.name for value in model.graph.output] == ["out"]
    arrays = {tuple(t.dims): onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    assert (arrays[6, 4] == torch.arange(24.0).reshape(6, 4).numpy()).all()
    assert (arrays[6,] == torch.arange(6.0).numpy()).all()


def test_the_same_graph_the_same_bytes(held: dict[str, WeightFile], tmp_path: Path) -> None:
    first, second = (write_onnx(linear(), held, tmp_path / f"{name}.onnx") for name in "ab")
    assert first == second


def test_what_cannot_be_written_is_named(held: dict[str, WeightFile], tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"^layer: cannot be written as ONNX .*use --engine torch") as caught:
        write_onnx(linear("aten.mm.default"), held, tmp_path / "layer.onnx")  # (2, 4) x (6, 4)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "layer.onnx").exists()
