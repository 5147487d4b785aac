"""The ONNX Runtime engine against the torch engine on the same graph, and its refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch

from ldmrt.engines.onnxruntime import OnnxRuntimeEngine
from ldmrt.engines.protocol import TensorSpec
from ldmrt.engines.torch import TorchEngine
from ldmrt.errors import BundleError, EngineMismatch
from ldmrt.export.onnx import write_onnx
from ldmrt.graph import Dim, Graph, Node, Ref
from ldmrt.weights import WeightFile, write

onnxruntime = pytest.importorskip("onnxruntime")

F32 = torch.float32
ROWS = Dim("rows")


def layer(rows: int | str = "rows") -> Graph:
    size = rows if isinstance(rows, int) else ROWS
    return Graph(
        name="layer",
        inputs=(TensorSpec("x", (rows, 4), F32), TensorSpec("ids", (rows,), torch.int64)),
        weights={"w": TensorSpec("w", (6, 4), F32), "table": TensorSpec("table", (9, 6), F32)},
        constants={},
        nodes=(
            Node("linear", "aten.linear.default", (Ref("x"), Ref("w")), {}, (size, 6), F32),
            Node("rows_of", "aten.embedding.default", (Ref("table"), Ref("ids")), {}, (size, 6), F32),
            Node("sum", "aten.add.Tensor", (Ref("linear"), Ref("rows_of")), {}, (size, 6), F32),
        ),
        outputs={"result": "sum"},
    )


def values(rows: int, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(rows, 4, generator=generator), "ids": torch.randint(0, 9, (rows,), generator=generator)}


def written(folder: Path, rows: int | str) -> tuple[OnnxRuntimeEngine, TorchEngine]:
    graph = layer(rows)
    generator = torch.Generator().manual_seed(7)
    weights = {
        name: torch.randn(6 if name == "w" else 9, 4 if name == "w" else 6, generator=generator)
        for name in graph.weights
    }
    write(folder / "weights.safetensors", graph.weights.values(), weights.__getitem__)
    file = WeightFile(folder / "weights.safetensors")
    write_onnx(graph, dict.fromkeys(graph.weights, file), folder / "layer.onnx")
    return OnnxRuntimeEngine(folder / "layer.onnx", threads=1), TorchEngine(graph, weights, torch.device("cpu"))


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[OnnxRuntimeEngine, TorchEngine]:
    return written(tmp_path_factory.mktemp("fixed"), 3)


def test_the_same_names_and_numbers(fixed: tuple[OnnxRuntimeEngine, TorchEngine]) -> None:
    ours, reference = fixed
    assert dict(ours.inputs) == dict(reference.inputs)
    assert dict(ours.outputs) == dict(reference.outputs)
    # Four products a sum, in an order of its own: a few units in the last place of numbers around 3.
    torch.testing.assert_close(ours.run(values(3)), reference.run(values(3)), rtol=0, atol=2e-6)


def test_free_rows(tmp_path: Path) -> None:
    ours, reference = written(tmp_path, "rows")
    assert ours.inputs["x"].shape == ("rows", 4)
    for rows in (1, 2, 5):
        torch.testing.assert_close(ours.run(values(rows)), reference.run(values(rows)), rtol=0, atol=2e-6)


def test_bind_then_enqueue(fixed: tuple[OnnxRuntimeEngine, TorchEngine]) -> None:
    ours, reference = fixed
    buffers = {**values(3), "result": torch.zeros(3, 6)}
    address = buffers["result"].data_ptr()
    ours.bind(buffers)
    for seed in (1, 2):
        for name, value in values(3, seed).items():
            buffers[name].copy_(value)
        ours.enqueue()
        expected = reference.run(values(3, seed))["result"]
        torch.testing.assert_close(buffers["result"], expected, rtol=0, atol=2e-6)
    assert buffers["result"].data_ptr() == address


def test_enqueue_before_bind(tmp_path: Path) -> None:
    ours, _ = written(tmp_path, 2)
    with pytest.raises(EngineMismatch, match="enqueue before bind"):
        ours.enqueue()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": None}, "'ids' is missing"),
        ({"x": torch.zeros(2, 4)}, r"'x' is \(2, 4\) float32"),
        ({"x": torch.zeros(3, 4, dtype=torch.bfloat16)}, "bfloat16"),
        ({"x": torch.zeros(4, 3).T}, "expected a contiguous"),
        ({"x": torch.zeros(3, 4, device="meta")}, "on meta"),
    ],
)
def test_what_does_not_fit(fixed: tuple[OnnxRuntimeEngine, TorchEngine], change: dict[str, Any], message: str) -> None:
    given = {name: value for name, value in {**values(3), **change}.items() if value is not None}
    with pytest.raises(EngineMismatch, match=message):
        fixed[0].run(given)
    with pytest.raises(EngineMismatch, match=message):
        fixed[0].bind({**given, "result": torch.zeros(3, 6)})


def test_a_file_that_is_not_onnx(tmp_path: Path) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"not a protobuf at all")
    with pytest.raises(BundleError, match="ONNX Runtime cannot open") as caught:
        OnnxRuntimeEngine(path, threads=1)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("way", ["a path that leaves", "a full path", "a link that leaves", "a folder that leaves"])
def test_weights_are_read_from_the_model_s_own_folder_alone(tmp_path: Path, way: str) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    written(folder, 3)
    weights = (folder / "weights.safetensors").rename(tmp_path / "weights.safetensors")
    place = {
        "a path that leaves": "../weights.safetensors",
        "a full path": str(weights),
        "a folder that leaves": "up/weights.safetensors",
    }.get(way, "weights.safetensors")
    if way == "a link that leaves":
        (folder / place).symlink_to(weights)
    (folder / "up").symlink_to(tmp_path)
    model = onnx.load(folder / "layer.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            entry.value = place if entry.key == "location" else entry.value
    (folder / "layer.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(BundleError, match="ONNX Runtime cannot open"):
        OnnxRuntimeEngine(folder / "layer.onnx", threads=1)


def test_without_onnxruntime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineMismatch, match=r"pip install 'ldmrt\[onnxruntime\]'"):
        OnnxRuntimeEngine(tmp_path / "any.onnx", threads=1)


# ---------------------------------------------------------------------------------------------------- on a GPU

CUDA = "CUDAExecutionProvider"


def test_without_the_cuda_provider(tmp_path: Path) -> None:
    if CUDA in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is installed")
    with pytest.raises(EngineMismatch, match=r"for the CPU alone, the device is cuda:0: `pip install 'ldmrt\[onnx"):
        OnnxRuntimeEngine(tmp_path / "any.onnx", threads=1, device=torch.device("cuda:0"))


def test_what_the_cuda_provider_is_told_and_that_it_must_not_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The session that is really made runs on the CPU, as one whose provider cannot be loaded."""
    written(tmp_path, 3)
    asked: list[Any] = []
    session = onnxruntime.InferenceSession

    def made(path: str, options: Any, providers: list[Any]) -> Any:
        asked.extend(providers)
        return session(path, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", made)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=1234))
    with pytest.raises(EngineMismatch, match="fell back to the CPU, expected cuda:1"):
        OnnxRuntimeEngine(tmp_path / "layer.onnx", threads=1, device=torch.device("cuda:1"))
    assert asked == [(CUDA, {"device_id": "1", "user_compute_stream": "1234"}), "CPUExecutionProvider"]


@pytest.mark.gpu
def test_on_the_gpu(tmp_path: Path) -> None:
    if CUDA not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    _, reference = written(tmp_path, "rows")
    engine = OnnxRuntimeEngine(tmp_path / "layer.onnx", threads=1, device=torch.device("cuda"))
    for rows in (3, 5):
        given = {name: value.cuda() for name, value in values(rows).items()}
        expected = reference.run(values(rows))["result"]
        # Four products a sum, perhaps rounded to TF32's 10 bits.
        torch.testing.assert_close(engine.run(given)["result"].cpu(), expected, rtol=0, atol=2e-2)
        buffers = {**given, "result": torch.zeros(rows, 6, device="cuda")}
        engine.bind(buffers)
        engine.enqueue()
        torch.testing.assert_close(buffers["result"].cpu(), expected, rtol=0, atol=2e-2)
