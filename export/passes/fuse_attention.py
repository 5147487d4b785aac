"""Attention on tensors as projections make them, (rows, tokens, heads * size): no heads are split off, nothing is transposed."""

from __future__ import annotations

import torch

from ldmrt.export.passes.pattern import RESHAPES, Index, Pass, argument, replaced
from ldmrt.graph import Argument, Graph, Node, Ref, Size

OPERATOR = "ldmrt.attention.default"

_ATTENTION = "aten.scaled_dot_product_attention.default"
_SPLITS = (*RESHAPES, "aten.unflatten.int")
_COPIES = ("aten.contiguous.default", "aten.clone.default")


def fuse_attention(graph: Graph) -> Pass:
    """With every scaled dot product attention between split and joined heads as `ldmrt.attention`.

    What stands between the heads and the product, such as a cast to float32, would be another computation, and is left as it
    is; so are groups of heads that share keys, and attention written out as matrix products around a softmax. A mask that
    says no more than that a token sees none behind it becomes `causal`.
    Found: attention operators, and softmaxes.
    """
    index = Index(graph)
    changes: dict[str, tuple[Node, ...]] = {}
    found = [node for node in graph.nodes if node.op in (_ATTENTION, "aten.softmax.int")]
    for node in found:
        joined = _joined(index, node) if node.op == _ATTENTION else None
        arguments = _arguments(index, node) if joined is not None else None
        if joined is not None and arguments is not None:
            changes[joined.name] = (joined.replace(op=OPERATOR, args=arguments, kwargs={}),)
    return Pass(replaced(graph, changes), found=len(found), fused=len(changes))


def _arguments(index: Index, node: Node) -> tuple[Argument, ...] | None:
    """The operator's arguments, if queries, keys and values are (rows, tokens, heads * size) split into heads."""
    sources = [_source(index, value) for value in node.args[:3]]
    shapes = [index.shape(value) for value in node.args[:3]]
    query, key = shapes[0], shapes[1]
    if query is None or key is None or any(source is None for source in sources):
        return None
    heads, size = query[1], query[3]
    if any(shape is None or (shape[1], shape[3]) != (heads, size) for shape in shapes) or not isinstance(size, int):
        return None
    if argument(node, 4, "dropout_p", 0.0) or argument(node, 7, "enable_gqa", default=False):
        return None
    scale = argument(node, 6, "scale")
    mask, causal = argument(node, 3, "attn_mask"), bool(argument(node, 5, "is_causal", default=False))
    if mask is not None and query[2] == key[2] and _is_causal(index, mask):
        mask, causal = None, True
    found = (*sources, heads, float(size**-0.5 if scale is None else scale), causal, mask)
    return found if mask is not None else found[:-1] if causal else found[:-2]


def _source(index: Index, value: Argument) -> Ref | None:
    """The (rows, tokens, heads * size) tensor of which `value`, (rows, heads, tokens, size), is a view."""
    turned = index.maker(value, "aten.transpose.int", "aten.permute.default")
    if turned is None or not _swaps(turned):
        return None
    split = index.maker(turned.args[0], *_SPLITS)
    shape = index.shape(split.args[0]) if split is not None else None
    if split is None or shape is None or len(shape) != 3 or shape != _flat(split.shape):
        return None
    source: Ref = split.args[0]
    return source


def _joined(index: Index, node: Node) -> Node | None:
    """The node that makes (rows, tokens, heads * size) of an attention's result, if nothing else reads what lies between."""
    turned = index.sole_reader(node, "aten.transpose.int", "aten.permute.default")
    if turned is None or not _swaps(turned):
        return None
    last = turned
    while (copy := index.sole_reader(last, *_COPIES)) is not None:
        last = copy
    joined = index.sole_reader(last, *RESHAPES, "aten.flatten.using_ints")
    return joined if joined is not None and joined.shape == _flat(turned.shape) else None


def _swaps(node: Node) -> bool:
    """Whether a node swaps the two dimensions in the middle of four."""
    if len(node.shape) != 4:
        return False
    if node.op == "aten.permute.default":
        return tuple(axis % 4 for axis in node.args[1]) == (0, 2, 1, 3)
    return {axis % 4 for axis in node.args[1:3]} == {1, 2}


def _flat(shape: tuple[Size, ...]) -> tuple[Size, ...] | None:
    """(rows, tokens, heads * size) for (rows, tokens, heads, size)."""
    if len(shape) != 4 or not (isinstance(shape[2], int) and isinstance(shape[3], int)):
        return None
    return (*shape[:2], shape[2] * shape[3])


def _is_causal(index: Index, mask: Argument) -> bool:
    """Whether a mask is a constant that lets token i take part in 0 to i and shuts it out of all others."""
    while (wide := index.maker(mask, "aten.expand.default")) is not None:
        mask = wide.args[0]
    tensor = index.graph.constants.get(mask.name) if isinstance(mask, Ref) else None
    if tensor is None or tensor.dim() < 2 or tensor.shape[-1] != tensor.shape[-2]:
        return False
    lower = torch.ones(tensor.shape[-2:], dtype=torch.bool).tril().expand(tensor.shape)
    if tensor.dtype == torch.bool:
        return torch.equal(tensor, lower)
    # A number this low leaves nothing of a score: its exponential is 0 in every precision.
    return bool((tensor[lower] == 0).all() and (tensor[~lower] <= torch.finfo(tensor.dtype).min).all())
