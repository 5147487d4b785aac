"""The operators that a graph may call.

A bundle can come from anywhere, so a graph names operators and this list decides. It is an explicit list, not the whole of
`aten`: that namespace holds operators that read and write files (`aten.from_file`) or write in place.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch

from ldmrt.errors import BundleError

_ATEN = """
_unsafe_view.default abs.default add.Scalar add.Tensor addmm.default amax.default amin.default any.dim arange.default
arange.start arange.start_step argmax.default avg_pool2d.default baddbmm.default bitwise_and.Tensor bitwise_not.default bmm.default
cat.default chunk.default clamp.default clamp_min.default clone.default constant_pad_nd.default contiguous.default
conv2d.default conv1d.default cos.default cumsum.default detach.default div.Scalar div.Tensor div.Tensor_mode
embedding.default eq.Scalar eq.Tensor exp.default expand.default expand_as.default fill.Scalar flatten.using_ints
full.default full_like.default gather.default ge.Scalar ge.Tensor gelu.default group_norm.default gt.Scalar gt.Tensor
index.Tensor index_select.default instance_norm.default layer_norm.default le.Scalar le.Tensor linear.default log.default
logical_and.default logical_not.default logical_or.default lt.Scalar lt.Tensor masked_fill.Scalar matmul.default
maximum.default mean.dim minimum.default mm.default mul.Scalar mul.Tensor narrow.default ne.Scalar neg.default
new_full.default new_ones.default new_zeros.default ones.default ones_like.default pad.default permute.default
pow.Tensor_Scalar reciprocal.default relu.default reshape.default rsqrt.default rsub.Scalar
scaled_dot_product_attention.default scalar_tensor.default select.int sigmoid.default silu.default sin.default
slice.Tensor softmax.int split.Tensor split_with_sizes.default sqrt.default squeeze.dim squeeze.dims stack.default
sub.Scalar sub.Tensor sum.dim_IntList t.default tanh.default to.dtype transpose.int tril.default triu.default
type_as.default unbind.int unflatten.int unsqueeze.default upsample_nearest2d.default upsample_nearest2d.vec
upsample_bilinear2d.vec view.default view_as.default where.self where.ScalarOther zeros.default zeros_like.default
"""

# Operators that make tensors of nothing: they must be told where.
CREATING: frozenset[str] = frozenset(
    f"aten.{name}"
    for name in [
        "arange.default",
        "arange.start",
        "arange.start_step",
        "full.default",
        "ones.default",
        "scalar_tensor.default",
        "zeros.default",
    ]
)

# Our own fused operators; ldmrt.kernels.ops has the functions.
_FUSED = "add_group_norm_silu add_layer_norm add_upsample attention conv2d geglu group_norm_silu linear linear_geglu"

_PYTHON: dict[str, Callable[..., Any]] = {"python.getitem": operator.getitem}

ALLOWED: frozenset[str] = frozenset(
    {f"aten.{name}" for name in _ATEN.split()} | {f"ldmrt.{name}.default" for name in _FUSED.split()} | set(_PYTHON)
)

# Operators that give another view of the same elements: free to run, and safe to move across a boundary between graphs.
VIEWS: frozenset[str] = frozenset(
    f"aten.{name}"
    for name in [
        "view.default",
        "unsqueeze.default",
        "squeeze.dim",
        "squeeze.dims",
        "transpose.int",
        "permute.default",
        "expand.default",
        "slice.Tensor",
        "t.default",
        "unflatten.int",
        "flatten.using_ints",
    ]
)


def resolve(op: str) -> Callable[..., Any]:
    """The function behind an operator's name.

    Raises:
        BundleError: the operator is not on the list, or this torch does not have it.
    """
    if op not in ALLOWED:
        raise BundleError(
            f"operator {op[:80]!r} is not one that a graph may call: the bundle is damaged, hostile, or of a newer ldmrt; "
            "build it again with `ldmrt build-engines`"
        )
    if op in _PYTHON:
        return _PYTHON[op]
    namespace, name, overload = op.split(".")
    if namespace == "ldmrt":
        # Called directly: the dispatcher would cost more than some of them take.
        from ldmrt.kernels.ops import OPERATORS

        return OPERATORS[op]
    packet = getattr(getattr(torch.ops, namespace), name, None)
    function = getattr(packet, overload, None) if packet is not None else None
    if function is None:
        raise BundleError(f"torch {torch.__version__} has no operator {op}: install torch 2.11 or newer")
    return function  # type: ignore[no-any-return]
