"""A linear layer, by the library, or by a body whose weights are packed once: bfloat16 on a processor with AMX."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ldmrt.kernels import memory, native

# A panel of weights is so many columns of the result, packed in steps of so many terms, as kernels/cpu/matmul_amx.cpp reads them:
# two tiles of 16 columns, of pairs of terms.
PANEL, STEP = 32, 32
_PACKED = (2, 16, 16, 2)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer: x weight^T + bias.

    Args:
        x: (..., K), any float dtype.
        weight: (O, K) of x's dtype; or what `arranged_linear` made of it.
        bias: (O,) of x's dtype, or None.

    Returns:
        (..., O) of x's dtype.

    Raises:
        RuntimeError: shapes or dtypes do not fit together.
    """
    if is_packed(weight):
        return linear_native(x, weight, bias)
    return linear_reference(x, weight, bias)


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`linear` by torch."""
    return F.linear(x, weight, bias)


def linear_native(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, gated: bool = False) -> Tensor:
    """`linear` by kernels/cpu/matmul_amx.cpp.

    Args:
        x: (..., K), bfloat16.
        weight: packed, of (O, K).
        bias: (O,), any float dtype, or None.
        gated: weight was packed so; the result is then that of `ldmrt.kernels.linear_geglu`, (..., O / 2).
    """
    inner, out = weight.shape[1] * STEP, weight.shape[0] * PANEL
    if x.shape[-1] != inner or x.dtype != weight.dtype or x.device != weight.device:
        raise RuntimeError(f"linear: x is {tuple(x.shape)} {x.dtype}, expected (..., {inner}) {weight.dtype} as weight")
    if bias is not None and (bias.shape != (out,) or bias.device != weight.device):
        raise RuntimeError(f"linear: bias has shape {tuple(bias.shape)}, expected ({out},)")
    lines = x.reshape(-1, inner)
    if lines.stride(1) != 1:
        lines = lines.contiguous()
    if bias is not None:
        bias = native.vector(_gated(bias) if gated else bias)
    width = out // 2 if gated else out
    result = memory.new_empty(x, (*x.shape[:-1], width))
    if result.numel() > 0:
        rows = lines.shape[0]
        native.run("ldmrt_linear", lines, weight, bias, result, rows, inner, out, lines.stride(0), int(gated))
    return result


def arranged_linear(weight: Tensor) -> Tensor:
    """Weights (O, K) in the order in which the native body reads them, if there is one for them here; else as they are."""
    return pack(weight) if takes_packed(weight, weight.shape[1]) else weight


def arranged_gated(weight: Tensor) -> Tensor:
    """The same for the weights (2 I, K) of `ldmrt.kernels.linear_geglu`."""
    return pack(_gated(weight)) if takes_packed(weight, weight.shape[1]) else weight


def takes_packed(weight: Tensor, inner: int) -> bool:
    """Whether the native body can read a weight, terms of which lie side by side in runs of `inner`, once it is packed."""
    return (
        weight.dtype == torch.bfloat16
        and weight.device.type == "cpu"
        and weight.shape[0] % PANEL == 0
        and inner % STEP == 0
        and native.takes_packed()
    )


def pack(weight: Tensor) -> Tensor:
    """From (O, K), numbers of 2 bytes on the CPU, to (panels, steps, 2 tiles, 16 pairs, 16 columns, 2 terms)."""
    out, inner = weight.shape
    packed = weight.new_empty(out // PANEL, inner // STEP, *_PACKED)
    native.run("ldmrt_pack", weight.contiguous(), packed, out, inner)
    return packed


def is_packed(weight: Tensor) -> bool:
    """Whether a weight is as `pack` makes it. The body reads it unchecked, and a graph may give any tensor as a weight."""
    return (
        weight.dim() == 2 + len(_PACKED)
        and weight.shape[2:] == _PACKED
        and weight.dtype == torch.bfloat16
        and weight.is_contiguous()
        and weight.device.type == "cpu"
        and native.takes_packed()
    )


def _gated(values: Tensor) -> Tensor:
    """(2 I, ...) with 16 values and their 16 gates in turn, so that both come out of one panel."""
    return values.reshape(2, -1, 16, *values.shape[1:]).transpose(0, 1).reshape(values.shape)
