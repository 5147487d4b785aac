"""The operators as torch sees them: schemas, what is written to, shapes without values, and graphs that hold them."""

from __future__ import annotations

import inspect
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmrt.kernels import ops
from ldmrt.kernels.sampler import WIDTH

NAMES = sorted(ops._SCHEMAS)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def sampler_arguments(dtype: torch.dtype, *, noise: bool) -> tuple[Any, ...]:
    index, latents = torch.tensor([1, 0]), (2, 4, 3, 5)
    return (
        normal(*latents),
        normal(*latents),
        normal(3, *latents),
        normal(3, 4, 3, 5, dtype=dtype),
        normal(2, WIDTH),
        index,
        normal(2, 4, 3, 5) if noise else None,
        normal(2),
        index.clone(),
        torch.tensor([2, -1]),
        normal(3, 4, 3, 5, dtype=dtype),
    )


def last(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A picture with the channels of a pixel side by side."""
    return normal(*shape, dtype=dtype).to(memory_format=torch.channels_last)


CALLS: list[tuple[str, tuple[Any, ...]]] = [
    ("group_norm_silu", (normal(2, 8, 3, 5), normal(8), normal(8), 4, 1e-5, True)),
    ("group_norm_silu", (normal(2, 8, 3, 5, dtype=torch.bfloat16), None, None, 2, 1e-6, False)),
    (
        "group_norm_silu",
        (
            normal(2, 8, 4, 4).to(memory_format=torch.channels_last),
            normal(8),
            None,
            4,
            1e-5,
            True,
            normal(2, 16)[:, 8:],
            normal(8),
        ),
    ),
    ("add_group_norm_silu", (last(2, 8, 3, 5), last(2, 8, 3, 5), None, normal(8), normal(8), 4, 1e-5, True)),
    # The results lie as x does, whatever the others are.
    ("add_group_norm_silu", (last(2, 8, 3, 5), normal(2, 8, 3, 5), normal(2, 4, 3, 5), None, None, 4, 1e-5, True)),
    ("add_group_norm_silu", (normal(2, 8, 3, 5), None, last(2, 4, 3, 5), None, None, 3, 1e-6, False, normal(8))),
    ("add_group_norm_silu", (normal(2, 7, 8).mT, None, normal(2, 4, 7), None, None, 3, 1e-6, False)),
    ("add_group_norm_silu", (normal(2, 8, 3, 5, dtype=torch.float16).mT, None, None, None, None, 4, 1e-5, True)),
    ("add_upsample", (last(2, 8, 3, 5), last(2, 8, 3, 5), normal(8), 2)),
    ("add_upsample", (normal(2, 8, 3, 5, dtype=torch.bfloat16), None, None, 1)),
    ("attention", (normal(2, 5, 16), normal(2, 7, 16), normal(2, 7, 16), 2, 0.3)),
    ("attention", (*normal(2, 5, 48, dtype=torch.float16).chunk(3, dim=-1), 4, 0.5, True)),
    ("attention", (normal(1, 5, 8), normal(1, 3, 8), normal(1, 3, 8), 1, 0.3, False, normal(5, 3))),
    ("conv2d", (last(2, 8, 5, 7), last(6, 8, 3, 3), 2, 1)),
    ("geglu", (normal(2, 3, 10),)),
    ("geglu", (normal(2, 3, 10, dtype=torch.float16), normal(10))),
    ("add_layer_norm", (normal(2, 3, 8), normal(2, 3, 8), normal(8), normal(8), 1e-5)),
    ("add_layer_norm", (normal(3, 2, 8).transpose(0, 1), normal(2, 3, 8), None, None, 1e-5)),
    ("add_layer_norm", (normal(3, 2, 8).transpose(0, 1), None, normal(8), None, 1e-5, normal(8))),
    ("add_layer_norm", (normal(2, 3, 8), None, None, None, 1e-5)),
    ("linear", (normal(2, 3, 8), normal(10, 8), normal(10))),
    ("linear", (normal(2, 3, 8, dtype=torch.bfloat16), normal(10, 8, dtype=torch.bfloat16))),
    ("linear_geglu", (normal(2, 3, 8), normal(10, 8), normal(10))),
    ("linear_geglu", (normal(2, 3, 8, dtype=torch.bfloat16), normal(10, 8, dtype=torch.bfloat16))),
    ("sampler_step", sampler_arguments(torch.float32, noise=True)),
    ("sampler_step", sampler_arguments(torch.float16, noise=False)),
    ("advance", (torch.tensor([0, 3, 4]), torch.tensor([4, 4, 4]))),
]


def operator(name: str) -> Any:
    return getattr(torch.ops.ldmrt, name).default


@pytest.mark.parametrize(("name", "arguments"), CALLS)
def test_torch_finds_schema_fake_and_mutation_right(name: str, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(operator(name), arguments)


def test_every_operator_is_checked() -> None:
    assert {name for name, _ in CALLS} == set(NAMES)


@pytest.mark.parametrize(("name", "arguments"), [call for call in CALLS if f"ldmrt.{call[0]}.default" in ops.OPERATORS])
def test_through_torch_and_directly_it_is_the_same(name: str, arguments: tuple[Any, ...]) -> None:
    direct, through = ops.OPERATORS[f"ldmrt.{name}.default"](*arguments), operator(name)(*arguments)
    torch.testing.assert_close(through, direct, rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_has_the_functions_arguments(name: str) -> None:
    body, _ = ops._SCHEMAS[name]
    expected = list(inspect.signature(body).parameters.values())
    found = operator(name)._schema.arguments
    assert [argument.name for argument in found] == [parameter.name for parameter in expected]
    for argument, parameter in zip(found, expected, strict=True):
        assert argument.has_default_value() == (parameter.default is not inspect.Parameter.empty)
        if argument.has_default_value():
            assert argument.default_value == parameter.default


def test_what_a_graph_may_call_is_what_gives_a_result() -> None:
    assert {f"ldmrt.{name}.default" for name in NAMES if operator(name)._schema.returns} == set(ops.OPERATORS)


def block(x: Tensor, time: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A little of everything, as a U-Net strings it together."""
    normed = torch.ops.ldmrt.group_norm_silu(x, weight, bias, 4, 1e-5, True, time, bias)
    tokens = normed.permute(0, 2, 3, 1).flatten(1, 2)
    mixed = torch.ops.ldmrt.attention(tokens, tokens, tokens, 2, 0.5)
    total, after = torch.ops.ldmrt.add_layer_norm(mixed, tokens, weight, bias, 1e-5, bias)
    joined, _ = torch.ops.ldmrt.add_group_norm_silu(normed, x, x, None, None, 4, 1e-5, True, bias)
    return total, torch.ops.ldmrt.geglu(after, weight), torch.ops.ldmrt.add_upsample(joined, joined, None, 2)


def test_torch_compile_takes_it_whole() -> None:
    from torch._dynamo.testing import EagerAndRecordGraphs

    x = normal(2, 8, 3, 5).to(memory_format=torch.channels_last)
    arguments = x, normal(2, 8), normal(8), normal(8)
    recorder = EagerAndRecordGraphs()
    compiled: Callable[..., Any] = torch.compile(block, fullgraph=True, backend=recorder)
    torch.testing.assert_close(compiled(*arguments), block(*arguments), rtol=0, atol=0)
    called = {
        str(node.target) for graph in recorder.graphs for node in graph.graph.nodes if "ldmrt" in str(node.target)
    }
    assert {name.removesuffix(".default") for name in called} == {
        f"ldmrt.{name}"
        for name in ("group_norm_silu", "attention", "add_layer_norm", "add_group_norm_silu", "geglu", "add_upsample")
    }


def test_torch_compile_keeps_what_is_written_in_place() -> None:
    def step(*arguments: Any) -> Any:
        torch.ops.ldmrt.sampler_step(*arguments)
        torch.ops.ldmrt.advance(arguments[5], arguments[5] + 7)
        return arguments[0] * 2

    def fresh() -> list[Any]:
        return list(sampler_arguments(torch.float32, noise=True))

    expected, found = fresh(), fresh()
    result = step(*expected)
    compiled: Callable[..., Any] = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*found), result, rtol=0, atol=0)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert not torch.equal(found[0], fresh()[0])


def test_importing_them_imports_neither_triton_nor_the_compiler() -> None:
    code = (
        "import sys, torch; before = set(sys.modules); import ldmrt.kernels.ops; new = set(sys.modules) - before\n"
        "print([name for name in new if name.split('.')[0] == 'triton' or name.startswith(('torch._inductor', 'torch._dynamo'))])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stderr
