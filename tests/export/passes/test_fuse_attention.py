"""Attention, in the forms it is traced in, with the same numbers; and what would be another computation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldmrt.engines.protocol import TensorSpec
from ldmrt.export.passes.fuse_attention import OPERATOR, fuse_attention
from ldmrt.graph import Dim, Graph, Node, Ref

F64 = torch.float64
ROWS, TOKENS = Dim("rows"), Dim("tokens")
HEADS, SIZE = 3, 4
WIDTH = HEADS * SIZE
QUERIES = 7
LOWEST = torch.finfo(F64).min
Same = Callable[[Graph, Graph], None]


def node(name: str, op: str, *args: Any, shape: tuple[Any, ...], dtype: torch.dtype = F64, **kwargs: Any) -> Node:
    return Node(name, f"aten.{op}", args, kwargs, shape, dtype)


def heads(name: str, tokens: Any, view: str = "view", turn: str = "transpose") -> list[Node]:
    """The value `name`, (rows, tokens, width), as (rows, heads, tokens, size), under the name in capitals."""
    split = (ROWS, tokens, HEADS, SIZE)
    made = {
        "view": node(f"{name} split", "view.default", Ref(name), (ROWS, -1, HEADS, SIZE), shape=split),
        "unflatten": node(f"{name} split", "unflatten.int", Ref(name), 2, (HEADS, SIZE), shape=split),
    }[view]
    turned = (ROWS, HEADS, tokens, SIZE)
    transposes = {
        "transpose": node(name.upper(), "transpose.int", Ref(made.name), 1, 2, shape=turned),
        "backwards": node(name.upper(), "transpose.int", Ref(made.name), -2, 1, shape=turned),
        "permute": node(name.upper(), "permute.default", Ref(made.name), (0, 2, 1, 3), shape=turned),
    }
    return [made, transposes[turn]]


def product(*args: Any, **kwargs: Any) -> Node:
    shape = (ROWS, HEADS, QUERIES, SIZE)
    return node(
        "att", "scaled_dot_product_attention.default", Ref("Q"), Ref("K"), Ref("V"), *args, shape=shape, **kwargs
    )


def joined(*, copy: bool = False, turn: str = "transpose", join: str = "reshape.default") -> list[Node]:
    split, flat = (ROWS, QUERIES, HEADS, SIZE), (ROWS, QUERIES, WIDTH)
    by_permute = node("back", "permute.default", Ref("att"), (0, 2, 1, 3), shape=split)
    nodes = [by_permute if turn == "permute" else node("back", "transpose.int", Ref("att"), 1, 2, shape=split)]
    if copy:
        nodes.append(node("copy", "contiguous.default", Ref("back"), shape=split))
    arguments = (2, 3) if join == "flatten.using_ints" else ((ROWS, -1, WIDTH),)
    return [*nodes, node("out", join, Ref(nodes[-1].name), *arguments, shape=flat)]


def graph(*nodes: Node, key_tokens: Any = "tokens", constants: dict[str, torch.Tensor] | None = None) -> Graph:
    return Graph(
        name="part",
        inputs=(
            TensorSpec("q", ("rows", QUERIES, WIDTH), F64),
            *(TensorSpec(name, ("rows", key_tokens, WIDTH), F64) for name in "kv"),
            TensorSpec("mask", ("rows", 1, QUERIES, key_tokens), F64),
        ),
        weights={},
        constants=constants or {},
        nodes=nodes,
        outputs={"out": nodes[-1].name},
    )


CROSS = [*heads("q", QUERIES), *heads("k", TOKENS), *heads("v", TOKENS)]
SELF = [*heads("q", QUERIES), *heads("k", QUERIES), *heads("v", QUERIES)]


def only(assert_same: Same, part: Graph) -> tuple[Any, ...]:
    """The arguments of the one node that is left."""
    result = fuse_attention(part)
    assert [item.op for item in result.graph.nodes if item.op != "aten.expand.default"] == [OPERATOR]
    assert (result.found, result.fused) == (1, 1)
    assert_same(part, result.graph)
    arguments: tuple[Any, ...] = result.graph.nodes[-1].args
    assert arguments[:4] == (Ref("q"), Ref("k"), Ref("v"), HEADS)
    return arguments[4:]


def stays(assert_same: Same, part: Graph) -> None:
    result = fuse_attention(part)
    assert result.graph.nodes == part.nodes
    assert (result.found, result.fused) == (1, 0)
    assert_same(part, result.graph)


@pytest.mark.parametrize(
    "nodes",
    [
        [*CROSS, product(), *joined()],
        [*CROSS, product(), *joined(copy=True, join="view.default")],
        [*CROSS, product(None, 0.0, False), *joined(join="flatten.using_ints")],
        [
            *heads("q", QUERIES, "unflatten", "permute"),
            *heads("k", TOKENS, turn="backwards"),
            *heads("v", TOKENS, "unflatten"),
            product(),
            *joined(turn="permute"),
        ],
    ],
    ids=["diffusers", "transformers", "flatten", "other views"],
)
def test_forms(assert_same: Same, nodes: list[Node]) -> None:
    assert only(assert_same, graph(*nodes)) == (SIZE**-0.5,)


def test_a_scale(assert_same: Same) -> None:
    assert only(assert_same, graph(*CROSS, product(scale=0.3), *joined())) == (0.3,)


@pytest.mark.parametrize("product_", [product(None, 0.0, True), product(is_causal=True)])
def test_causal(assert_same: Same, product_: Node) -> None:
    assert only(assert_same, graph(*SELF, product_, *joined(), key_tokens=QUERIES)) == (SIZE**-0.5, True)


@pytest.mark.parametrize("product_", [product(Ref("mask")), product(attn_mask=Ref("mask"))])
def test_a_mask_that_is_an_input(assert_same: Same, product_: Node) -> None:
    assert only(assert_same, graph(*CROSS, product_, *joined())) == (SIZE**-0.5, False, Ref("mask"))


LOWER = torch.ones(1, 1, QUERIES, QUERIES, dtype=torch.bool).tril()


def masked(mask: torch.Tensor) -> Graph:
    wide = node("wide", "expand.default", Ref("triangle"), (ROWS, -1, QUERIES, QUERIES), dtype=mask.dtype, shape=())
    wide = wide.replace(shape=(ROWS, 1, QUERIES, QUERIES))
    constants = {"triangle": mask}
    return graph(*SELF, wide, product(Ref("wide")), *joined(), key_tokens=QUERIES, constants=constants)


@pytest.mark.parametrize(
    "mask",
    [
        LOWER,
        torch.zeros(LOWER.shape, dtype=F64).masked_fill(~LOWER, -torch.inf),
        torch.zeros(LOWER.shape, dtype=F64).masked_fill(~LOWER, LOWEST),
    ],
    ids=["bool", "infinite", "lowest"],
)
def test_a_triangle_is_causal(assert_same: Same, mask: torch.Tensor) -> None:
    """CLIP's mask: a constant, widened to the rows."""
    part = masked(mask)
    assert only(assert_same, part) == (SIZE**-0.5, True)
    assert not fuse_attention(part).graph.constants


@pytest.mark.parametrize(
    "mask",
    [
        LOWER.triu(-2),
        LOWER.transpose(2, 3).contiguous(),
        torch.zeros(LOWER.shape, dtype=F64).masked_fill(~LOWER, -9.0),
        torch.ones(LOWER.shape, dtype=F64).masked_fill(~LOWER, -torch.inf),
    ],
    ids=["a window", "the other way", "hardly", "raised"],
)
def test_other_masks_are_masks(assert_same: Same, mask: torch.Tensor) -> None:
    assert only(assert_same, masked(mask)) == (SIZE**-0.5, False, Ref("wide"))


def test_a_triangle_between_different_tokens_is_a_mask(assert_same: Same) -> None:
    """The corner is not the same: three keys before the first query."""
    keys = QUERIES + 3
    mask = torch.ones(QUERIES, keys, dtype=torch.bool).tril(3)
    nodes = [*heads("q", QUERIES), *heads("k", keys), *heads("v", keys), product(Ref("triangle")), *joined()]
    part = graph(*nodes, key_tokens=keys, constants={"triangle": mask})
    assert only(assert_same, part) == (SIZE**-0.5, False, Ref("triangle"))


def test_a_cast_between_the_heads_and_the_product_stays(assert_same: Same) -> None:
    """Upcast attention: the product in another precision is another computation."""
    cast = [
        node("Q", "to.dtype", Ref("half"), F64, shape=(ROWS, HEADS, QUERIES, SIZE)),
    ]
    first = [item.replace(name="half") if item.name == "Q" else item for item in CROSS[:2]]
    stays(assert_same, graph(*first, *cast, *CROSS[2:], product(), *joined()))


def test_an_attention_that_something_else_reads_stays(assert_same: Same) -> None:
    more = node("more", "neg.default", Ref("att"), shape=(ROWS, HEADS, QUERIES, SIZE))
    part = graph(*CROSS, product(), *joined(), more)
    stays(assert_same, part.replace(outputs={"out": "out", "more": "more"}))


def test_an_attention_without_heads_stays(assert_same: Same) -> None:
    """Straight from (rows, heads, tokens, size): there is no projection to read."""
    part = graph(*CROSS, product(), *joined())
    inputs = tuple(
        dataclasses.replace(spec, name=spec.name.upper(), shape=("rows", HEADS, spec.shape[1], SIZE))
        for spec in part.inputs[:3]
    )
    stays(assert_same, part.replace(inputs=inputs, nodes=part.nodes[6:]))


def test_heads_cut_from_another_dimension_stay(assert_same: Same) -> None:
    """A view that is (rows, tokens, heads, size) by chance: here tokens and width were one."""
    flat = (ROWS, QUERIES * WIDTH)
    nodes = [node("q one", "reshape.default", Ref("q"), flat, shape=flat), *CROSS]
    nodes[1] = nodes[1].replace(args=(Ref("q one"), *nodes[1].args[1:]))
    stays(assert_same, graph(*nodes, product(), *joined()))


def test_grouped_keys_stay() -> None:
    part = graph(*CROSS, product(enable_gqa=True), *joined())
    assert fuse_attention(part).graph.nodes == part.nodes


def test_dropout_stays() -> None:
    part = graph(*CROSS, product(None, 0.5), *joined())
    assert fuse_attention(part).graph.nodes == part.nodes


def test_attention_written_out_is_counted() -> None:
    scores = (ROWS, HEADS, QUERIES, TOKENS)
    part = graph(
        *CROSS,
        node("keys", "transpose.int", Ref("K"), 2, 3, shape=(ROWS, HEADS, SIZE, TOKENS)),
        node("scores", "matmul.default", Ref("Q"), Ref("keys"), shape=scores),
        node("weights", "softmax.int", Ref("scores"), -1, shape=scores),
        node("out", "matmul.default", Ref("weights"), Ref("V"), shape=(ROWS, HEADS, QUERIES, SIZE)),
    )
    result = fuse_attention(part)
    assert result.graph.nodes == part.nodes
    assert (result.found, result.fused) == (1, 0)
