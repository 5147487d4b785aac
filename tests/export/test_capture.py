"""Capturing modules: the graph against the module itself, weights never touched, dimensions left free."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ldmrt.engines.protocol import TensorSpec
from ldmrt.engines.torch import TorchEngine
from ldmrt.errors import BuildError
from ldmrt.export.capture import capture
from ldmrt.export.passes.clean import clean
from ldmrt.graph import Dim, Graph, Ref, from_json, specialize, to_json

F32 = torch.float32
CPU = torch.device("cpu")


class Block(nn.Module):
    """Attention between rows of tokens and a picture, with what traces differently: shapes as numbers, constants, casts."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.q = nn.Linear(8, 8)
        self.kv = nn.Linear(6, 16, bias=False)
        self.drop = nn.Dropout(0.5)
        self.register_buffer("scale", torch.tensor(0.5))

    def forward(self, picture: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = F.silu(self.norm(self.conv(picture)))
        rows, channels, height, width = hidden.shape
        q = self.q(hidden.flatten(2).transpose(1, 2)).view(rows, height * width, 2, channels // 2).transpose(1, 2)
        k, v = self.kv(text).chunk(2, dim=-1)
        k, v = (part.reshape(rows, -1, 2, channels // 2).transpose(1, 2) for part in (k, v))
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(rows, -1, channels)
        positions = torch.arange(height * width, device=picture.device, dtype=torch.float32)
        out = self.drop(out + torch.sin(positions)[None, :, None])
        out = out.transpose(1, 2).reshape(rows, channels, height, width) * self.scale
        return (out.to(picture.dtype), k.mean(dim=(1, 2)))


INPUTS = (TensorSpec("picture", ("rows", 4, 6, 5), F32), TensorSpec("text", ("rows", "tokens", 6), F32))


def block(device: str = "cpu") -> Block:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Block().eval().to(device)


@pytest.fixture(scope="module")
def captured() -> Graph:
    return capture("block", block("meta"), INPUTS, ("hidden", "keys"))


def weights(module: nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def example(rows: int, tokens: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(rows)
    return {
        "picture": torch.randn(rows, 4, 6, 5, generator=generator),
        "text": torch.randn(rows, tokens, 6, generator=generator),
    }


def assert_equal(found: Mapping[str, torch.Tensor], expected: tuple[torch.Tensor, ...]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(found.values(), expected, strict=True))


@pytest.mark.parametrize(("rows", "tokens"), [(1, 1), (1, 7), (2, 77), (5, 154)])
def test_one_capture_serves_every_row_count_and_length(captured: Graph, rows: int, tokens: int) -> None:
    module = block()
    found = TorchEngine(clean(captured), weights(module), CPU).run(example(rows, tokens))
    with torch.no_grad():
        assert_equal(found, module(**example(rows, tokens)))


def test_clean_leaves_nothing_that_the_runtime_would_not_run(captured: Graph) -> None:
    assert any(node.op == "aten.dropout.default" for node in captured.nodes)
    cleaned = clean(captured)
    assert not {node.op for node in cleaned.nodes} & {"aten.dropout.default", "aten.arange.start", "aten.sin.default"}
    assert [tensor.shape for tensor in cleaned.constants.values()] == [(1, 30, 1)]


def test_fixed_rows_and_the_way_through_json(captured: Graph) -> None:
    graph = specialize(clean(captured), {"rows": 2, "tokens": 9})
    graph = from_json(to_json(graph), graph.constants)
    assert "Dim" not in repr(graph)
    module = block()
    with torch.no_grad():
        assert_equal(TorchEngine(graph, weights(module), CPU).run(example(2, 9)), module(**example(2, 9)))


def test_what_it_says_of_itself(captured: Graph) -> None:
    assert captured.inputs == INPUTS
    assert set(captured.weights) == {
        "conv.weight",
        "conv.bias",
        "norm.weight",
        "norm.bias",
        "q.weight",
        "q.bias",
        "kv.weight",
        "scale",
    }
    assert captured.weights["kv.weight"] == TensorSpec("kv.weight", (16, 6), F32)
    assert captured.output_specs() == {
        "hidden": TensorSpec("hidden", ("rows", 8, 6, 5), F32),
        "keys": TensorSpec("keys", ("rows", 4), F32),
    }
    assert "device" not in to_json(captured)


def test_the_dtype_of_the_module_is_the_dtype_of_the_graph() -> None:
    specs = [TensorSpec(spec.name, spec.shape, torch.bfloat16) for spec in INPUTS]
    graph = capture("block", block("meta").to(torch.bfloat16), specs, ("hidden", "keys"))
    assert {spec.dtype for spec in graph.weights.values()} == {torch.bfloat16}
    assert graph.output_specs()["hidden"].dtype == torch.bfloat16


class Variadic(nn.Module):
    def forward(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (tensors[0] + tensors[1],)


def test_a_module_of_any_number_of_inputs() -> None:
    specs = [TensorSpec(name, ("rows", 3), F32) for name in ("a", "b")]
    graph = capture("sum", Variadic(), specs, ("sum",))
    assert graph.nodes[0].args == (Ref("a"), Ref("b"))
    assert graph.nodes[0].shape == (Dim("rows"), 3)


class DependsOnValues(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x if x.sum() > 0 else -x,)


class SumOfSizes(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.cat([x, y]),)


@pytest.mark.parametrize(
    ("module", "sizes", "message"),
    [
        (DependsOnValues(), ["rows"], "odd: the model cannot be traced"),
        (SumOfSizes(), ["rows", "tokens"], "is not a multiple of one free dimension"),
    ],
)
def test_what_cannot_be_captured_is_named(module: Any, sizes: list[str], message: str) -> None:
    specs = [TensorSpec(name, (size, 3), F32) for name, size in zip("xy", sizes, strict=False)]
    with pytest.raises(BuildError, match=message) as caught:
        capture("odd", module, specs, ("result",))
    assert "\n" not in str(caught.value)


class Copying(nn.Module):
    """Copies before it doubles more than 2^31 elements, as diffusers' upsampling does."""

    def forward(self, picture: torch.Tensor) -> torch.Tensor:
        if picture.numel() * 2 > 2**31:
            picture = picture.contiguous()
        return torch.cat([picture, picture], 1)


@pytest.mark.parametrize("most", [40, 20, 6])
def test_a_large_size_with_another_path_for_many_rows(most: int) -> None:
    """The SD2.1 decoder at 768 x 768 is one: its own bound is 28 rows. The path for few rows is what is captured."""
    elements = 2**30 // (4 * most)
    graph = clean(capture("copying", Copying(), [TensorSpec("picture", ("rows", 4, elements), F32)], ("twice",)))
    assert [node.op for node in graph.nodes] == ["aten.cat.default"]
    assert graph.nodes[0].shape == (Dim("rows"), 8, elements)
