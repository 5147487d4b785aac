"""Type promotion: a cast wherever torch would make one, and none elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.export import architectures
from ldmrt.export.compile import compile_component
from ldmrt.export.onnx import write_onnx
from ldmrt.export.passes.pattern import Index
from ldmrt.export.passes.promote import CAST, promote
from ldmrt.export.source import Source
from ldmrt.graph import Graph, Node, Ref, specialize
from ldmrt.weights import WeightFile, write

F16, F32, BF16 = torch.float16, torch.float32, torch.bfloat16


def graph(node: Node) -> Graph:
    return Graph(
        name="mixed",
        inputs=(
            TensorSpec("half", (2, 3), F16),
            TensorSpec("brain", (2, 3), BF16),
            TensorSpec("float", (2, 3), F32),
            TensorSpec("one", (), F32),
            TensorSpec("whole", (2, 3), torch.int64),
        ),
        weights={},
        constants={},
        nodes=(node,),
        outputs={"out": node.name},
    )


H, B, F, ONE, WHOLE = map(Ref, ("half", "brain", "float", "one", "whole"))


@pytest.mark.parametrize(
    ("op", "args", "shape", "dtype", "casts"),
    [
        ("aten.cat.default", ((H, F, H), 0), (6, 3), F32, {"half": F32}),
        ("aten.stack.default", ((H, B),), (2, 2, 3), F32, {"half": F32, "brain": F32}),
        ("aten.add.Tensor", (F, H), (2, 3), F32, {"half": F32}),
        # A tensor without dimensions gives way to those that have some.
        ("aten.mul.Tensor", (H, ONE), (2, 3), F16, {"one": F16}),
        ("aten.gt.Tensor", (H, F), (2, 3), torch.bool, {"half": F32}),
        ("aten.add.Tensor", (H, WHOLE), (2, 3), F16, {}),
        ("aten.add.Tensor", (H, H), (2, 3), F16, {}),
        ("aten.type_as.default", (F, H), (2, 3), F16, {}),
    ],
)
def test_what_torch_would_cast_is_cast(
    interpret: Callable[..., dict[str, torch.Tensor]],
    op: str,
    args: tuple[object, ...],
    shape: tuple[int, ...],
    dtype: torch.dtype,
    casts: dict[str, torch.dtype],
) -> None:
    before = graph(Node("y", op, args, {}, shape, dtype))
    after = promote(before)
    made = [node for node in after.nodes if node.op == CAST]
    assert {node.args[0].name: node.dtype for node in made} == casts
    assert len(made) == len(casts)
    if not casts:
        assert after == before
    generator = torch.Generator().manual_seed(0)
    inputs = {
        spec.name: (10 * torch.randn([int(n) for n in spec.shape], generator=generator)).to(spec.dtype)
        for spec in before.inputs
    }
    # The interpreter holds every node to the dtype that it declares.
    found, expected = (interpret(g, inputs, {})["out"] for g in (after, before))
    # torch multiplies by a tensor without dimensions before it is rounded; all else is the same sums.
    torch.testing.assert_close(found, expected, rtol=2**-10 if "one" in casts else 0.0, atol=0.0)


@pytest.mark.parametrize("fused", [False, True])
def test_the_added_embeddings_of_xl_are_of_one_type(tiny_model_xl: Path, fused: bool) -> None:
    component = architectures.unet(Source.open(tiny_model_xl), (64, 64))
    _, schedule, _ = compile_component(component, F16, fused=fused).graphs
    index = Index(schedule)
    joined = [node for node in schedule.nodes if node.op == "aten.cat.default"]
    assert all(len({index.dtype(Ref(name)) for name in node.refs()}) == 1 for node in joined)
    # They are joined in float32: the time ids come as such.
    (pooled,) = [node for node in schedule.nodes if "text_embeds" in node.refs()]
    assert (pooled.op, pooled.dtype) == (CAST, F32)
    assert any(pooled.name in node.refs() for node in joined)


@pytest.mark.slow
def test_the_onnx_of_xl_in_float16_is_strictly_typed(
    tiny_model_xl: Path, tmp_path: Path, assert_strictly_typed: Callable[[Path], None]
) -> None:
    for path in written(tiny_model_xl, tmp_path):
        assert_strictly_typed(path)


@pytest.mark.rtx
def test_tensorrt_for_rtx_reads_the_onnx_of_xl_in_float16(tiny_model_xl: Path, tmp_path: Path) -> None:
    trt = pytest.importorskip("tensorrt_rtx_bindings")
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    for path in written(tiny_model_xl, tmp_path):
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        read = parser.parse_from_file(str(path))
        assert read, [parser.get_error(number).desc() for number in range(parser.num_errors)]
        assert {network.get_output(i).dtype for i in range(network.num_outputs)} == {trt.float16}


def written(model: Path, folder: Path) -> list[Path]:
    """The three parts of the U-Net as ONNX for two rows, with weights of zeros."""
    paths = []
    component = architectures.unet(Source.open(model), (64, 64))
    for part in compile_component(component, F16, fused=False).graphs:
        held = {}
        if part.weights:
            file = folder / f"{part.name}.safetensors"
            write(file, list(part.weights.values()), lambda name: zeros(part.weights[name]))  # noqa: B023
            held = dict.fromkeys(part.weights, WeightFile(file))
        paths.append(folder / f"{part.name}.onnx")
        write_onnx(specialize(part, {"rows": 2, "tokens": 77}), held, paths[-1])
    return paths


def zeros(spec: TensorSpec) -> torch.Tensor:
    return torch.zeros([int(size) for size in spec.shape], dtype=spec.dtype)
