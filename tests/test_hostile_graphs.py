"""Graphs whose operators do not fit each other, or what they say of themselves: refused before a native body reads a pointer.

Found by reading, and by `benchmarks/fuzz.py artefacts --kinds graph,kernel`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
import torch

from ldmrt.engines.torch import TorchEngine
from ldmrt.errors import BundleError, EngineMismatch, LdmrtError
from ldmrt.graph import from_json
from ldmrt.kernels import native

F32, BF16 = "float32", "bfloat16"
CPU = torch.device("cpu")


def run(nodes: list[list[Any]], weights: Mapping[str, torch.Tensor] | None = None) -> None:
    """Load and run a graph without inputs, whose last node is its output."""
    held = weights or {}
    specs = [[name, list(tensor.shape), str(tensor.dtype).removeprefix("torch.")] for name, tensor in held.items()]
    outputs = [["out", nodes[-1][0]]]
    data = {
        "format": 1,
        "name": "g",
        "inputs": [],
        "outputs": outputs,
        "weights": specs,
        "constants": [],
        "nodes": nodes,
    }
    TorchEngine(from_json(json.dumps(data), {}), held, CPU).run({})


def full(name: str, *shape: int, dtype: str = F32) -> list[Any]:
    """A node that makes a tensor."""
    return [name, "aten.full.default", [list(shape), 0.5], {"dtype": {"dtype": dtype}}, list(shape), dtype]


def fused(op: str, *arguments: Any, dtype: str = F32, shape: tuple[int, ...] = (1,), **keywords: Any) -> list[Any]:
    """The node in question; values by their names, numbers as they are."""
    given = [{"ref": one} if isinstance(one, str) else one for one in arguments]
    return ["out", f"ldmrt.{op}.default", given, keywords, list(shape), dtype]


def of_bf16(*shapes: tuple[int, ...]) -> list[list[Any]]:
    return [full(name, *shape, dtype=BF16) for name, shape in zip("xwb", shapes, strict=False)]


# What looks as if the runtime had packed it: the body would read as much as its shape promises.
PACKED: dict[str, list[list[Any]]] = {
    "one number": [*of_bf16((4, 32), (1, 1, 1, 1, 1, 1)), fused("linear", "x", "w")],
    "no panels": [*of_bf16((4, 32), (9, 1, 2, 16, 1, 2)), fused("linear", "x", "w")],
    "one value for all": [
        *of_bf16((4, 32), (1, 1, 1, 1, 1, 1)),
        ["v", "aten.expand.default", [{"ref": "w"}, [1, 1, 2, 16, 16, 2]], {}, [1, 1, 2, 16, 16, 2], BF16],
        fused("linear", "x", "v"),
    ],
    "of floats": [full("x", 4, 32), full("w", 1, 1, 2, 16, 16, 2), fused("linear", "x", "w")],
    "a short bias": [*of_bf16((4, 32), (1, 1, 2, 16, 16, 2), (1,)), fused("linear", "x", "w", "b")],
    "a short bias of a gate": [*of_bf16((4, 32), (1, 1, 2, 16, 16, 2), (16,)), fused("linear_geglu", "x", "w", "b")],
    "nowhere": [
        *of_bf16((4, 32), (1, 1, 2, 16, 16, 2)),
        ["m", "aten.new_ones.default", [{"ref": "x"}, [4, 32]], {"device": "meta"}, [4, 32], BF16],
        fused("linear", "m", "w"),
    ],
    # 9 x 32 terms are 4 x 72 too, which the body takes 32 at a time.
    "channels that are no steps": [*of_bf16((1, 72, 40, 40), (1, 9, 2, 16, 16, 2)), fused("conv2d", "x", "w", 1, 1)],
    "no channels": [*of_bf16((1, 0, 8, 8), (1, 9, 2, 16, 16, 2)), fused("conv2d", "x", "w", 1, 1)],
    "no filter": [*of_bf16((1, 32, 8, 8), (1, 0, 2, 16, 16, 2)), fused("conv2d", "x", "w", 1, 1)],
    **{
        f"stride {stride}, padding {padding}": [
            *of_bf16((1, 32, 20, 20), (1, 9, 2, 16, 16, 2)), fused("conv2d", "x", "w", stride, padding)
        ]
        for stride, padding in ((0, 1), (-1, 1), (1, -1), (1, -9), (1, 2**62), (2**70, 1), (1.5, 1), (None, 1))
    },
    "points of no tile": [full("x", 1, 1, 8, 8), full("w", 3, 3, 1, 1, 1), fused("conv2d", "x", "w", 1, 1)],
    "points of one channel": [full("x", 1, 1, 8, 8), full("w", 6, 6, 1, 1, 16), fused("conv2d", "x", "w", 1, 1)],
    "points of bfloat16": [*of_bf16((1, 16, 8, 8), (6, 6, 1, 16, 16)), fused("conv2d", "x", "w", 1, 1)],
    "points of other channels": [full("x", 1, 32, 8, 8), full("w", 6, 6, 1, 16, 16), fused("conv2d", "x", "w", 1, 1)],
}  # fmt: skip


@pytest.mark.parametrize("case", PACKED)
def test_what_looks_packed(case: str) -> None:
    with pytest.raises(BundleError, match=r"^g: operator .* failed"):
        run(PACKED[case])


OTHERS: dict[str, list[list[Any]]] = {
    "group norm of no groups": [full("x", 1, 32, 8, 8), fused("group_norm_silu", "x", None, None, 0, 1e-5, True)],
    "of groups that are a float": [full("x", 1, 32, 8), fused("group_norm_silu", "x", None, None, 4.0, 1e-5, True)],
    "an epsilon beyond floats": [full("x", 1, 32, 8), fused("group_norm_silu", "x", None, None, 4, 10**400, True)],
    "a shift of few rows": [full("x", 2, 32, 8), full("s", 1, 32), fused("group_norm_silu", "x", None, None, 4, 0.1, True, "s")],
    "a sum of other rows": [full("x", 2, 32, 8), full("j", 1, 8, 8), fused("add_group_norm_silu", "x", None, "j", None, None, 8, 0.1, True)],
    "heads that do not divide": [full("x", 1, 300, 32), fused("attention", "x", "x", "x", 3, 0.5)],
    "values of fewer tokens": [full("x", 1, 300, 32), full("v", 1, 2, 32), fused("attention", "x", "x", "v", 2, 0.5)],
    "heads that are a float": [full("x", 1, 300, 32), fused("attention", "x", "x", "x", 2.0, 0.5)],
    "upsampling by a float": [full("x", 1, 4, 8, 8), fused("add_upsample", "x", None, None, 1.5)],
    "a gate of odd width": [full("x", 4, 33), fused("geglu", "x")],
    "a convolution of no weight": [full("x", 1, 4, 8, 8), fused("conv2d", "x")],
    "a number for a tensor": [fused("geglu", 3)],
}  # fmt: skip


@pytest.mark.parametrize("case", OTHERS)
def test_arguments_that_do_not_fit(case: str) -> None:
    with pytest.raises(BundleError, match=r"^g: "):
        run(OTHERS[case])


def test_an_operator_of_weights_whose_arguments_have_names() -> None:
    with pytest.raises(BundleError, match=r"^g: it cannot be laid out"):
        run([full("x", 1, 4, 8, 8), fused("conv2d", "x", "w", stride=1, padding=1)], {"w": torch.ones(4, 4, 3, 3)})


WEIGHTS = {"w": torch.ones(1, 1, 3, 3), "h": torch.ones(16, 16, 3, 3, dtype=torch.bfloat16)}


@pytest.mark.parametrize(
    ("weight", "declared", "dtype"),
    [("w", [64, 64, 3, 3], F32), ("h", [16, 64, 3, 3], F32), ("w", [3], F32), ("h", [16, 16, 3, 3], F32)],
)
@pytest.mark.parametrize("stride", [1, 0, -1])
def test_packed_weights_that_lie_about_their_shape(weight: str, declared: list[int], dtype: str, stride: int) -> None:
    """What is made of weights alone is packed when the engine is loaded, for the shape that the graph says it has."""
    nodes = [
        full("x", 1, declared[0], 64, 64),
        ["p", "aten.mul.Scalar", [{"ref": weight}, 1.0], {}, declared, dtype],
        fused("conv2d", "x", "p", stride, 1, shape=(1, declared[0], 64, 64)),
    ]
    with pytest.raises(BundleError, match=r"^g: "):
        run(nodes, WEIGHTS)


@pytest.mark.skipif(not native.available(), reason="the body that packs tokens is not there")
@pytest.mark.parametrize("tokens", [2**34, 2**56])
def test_tokens_that_are_one_and_the_same_are_not_as_many_as_they_say(tokens: int) -> None:
    nodes = [
        full("x", 1, 300, 32),
        full("k", 1, 1, 32),
        ["v", "aten.expand.default", [{"ref": "k"}, [1, tokens, 32]], {}, [1, 1, 32], F32],
        fused("attention", "x", "v", "v", 1, 0.5),
    ]
    with pytest.raises(LdmrtError):
        run(nodes)


def test_want_of_memory_is_told_as_such() -> None:
    with pytest.raises(EngineMismatch, match="there is not enough memory"):
        run([full("x", 2**18, 2**18), fused("geglu", "x")])
    with pytest.raises(EngineMismatch, match="there is not enough memory"):
        run(
            [
                full("x", 2**9, 2**9),
                ["y", "aten.expand.default", [{"ref": "x"}, [2**21, 2**9, 2**9]], {}, [1], F32],
                fused("geglu", "y"),
            ]
        )
