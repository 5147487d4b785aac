"""The operators in float64, on the device, of inputs as they were rounded; and how far a result may be from that.

The bounds are those of tests/kernels: what float32 arithmetic may lose, then one rounding to the dtype. There it says why.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ldmrt.kernels.sampler import Basis, Column

Body = Callable[..., Any]

# Half a unit in the last place, relative; and half the distance of two subnormals.
HALF_UNIT = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
_SUBNORMAL = {torch.float32: 2.0**-150, torch.bfloat16: 2.0**-134, torch.float16: 2.0**-25}
# Queries at a time: scores in float64 of 16,384 keys are half a gigabyte.
_QUERIES = 4096


@dataclass(frozen=True)
class Verdict:
    """How a result compares with its oracle.

    Attributes:
        of_bound: the largest difference of an element as a share of what it may be; above 1, or NaN, is wrong.
        relative_error: the L2 norm of the difference over that of the oracle.
    """

    of_bound: float
    relative_error: float

    @property
    def right(self) -> bool:
        """Whether every element is within its bound."""
        return self.of_bound <= 1

    @staticmethod
    def worst(verdicts: Sequence[Verdict]) -> Verdict:
        """Of several results of one call; NaN stays NaN."""
        shares = torch.tensor([[verdict.of_bound, verdict.relative_error] for verdict in verdicts], dtype=torch.float64)
        of_bound, relative_error = shares.amax(0).tolist()
        return Verdict(of_bound, relative_error)


def compare(found: Tensor, expected: Tensor, error: Tensor | float) -> Verdict:
    """Against the expected float64, off by at most `error` before it was rounded to the dtype of `found`.

    Raises:
        ValueError: the shape is another.
    """
    if found.shape != expected.shape:
        raise ValueError(f"found has shape {tuple(found.shape)}, expected {tuple(expected.shape)}")
    dtype = found.dtype
    bound = (HALF_UNIT[dtype] * (expected.abs() + error)).clamp(min=_SUBNORMAL[dtype]) + error
    difference = found.double() - expected
    share = float((difference.abs() / bound).max())
    return Verdict(share, float(difference.norm() / expected.norm()))


def check_attention(body: Body, arguments: Sequence[Any]) -> Verdict:
    """`attention` without masks."""
    query, key, value, heads, scale = arguments
    found = body(*arguments)
    size = query.shape[2] // heads
    verdicts = []
    for row in range(query.shape[0]):
        for head in range(heads):
            columns = slice(head * size, (head + 1) * size)
            k, v = (tensor[row, :, columns].double() for tensor in (key, value))
            for first in range(0, query.shape[1], _QUERIES):
                part = slice(first, first + _QUERIES)
                scores = scale * query[row, part, columns].double() @ k.mT
                # float32 rounds a score relative to its size; half precisions round the weights too.
                relative = HALF_UNIT[torch.float32] * (32 + 8 * scores.abs().amax())
                if query.dtype != torch.float32:
                    relative += 2 * HALF_UNIT[query.dtype]
                weights = scores.softmax(-1)
                verdicts.append(compare(found[row, part, columns], weights @ v, weights @ v.abs() * relative))
    return Verdict.worst(verdicts)


def check_group_norm_silu(body: Body, arguments: Sequence[Any]) -> Verdict:
    """`group_norm_silu` of pictures, with weight and bias."""
    found = body(*arguments)
    x, weight, bias, groups, eps, silu, shift, x_bias = arguments
    value = x.double()
    for added in (shift, x_bias):
        value = value if added is None else value + added.double()[..., None, None]
    return _compare_norm(found, value, weight, bias, groups, eps, silu=silu)


def check_add_group_norm_silu(body: Body, arguments: Sequence[Any]) -> Verdict:
    """`add_group_norm_silu` of pictures, with weight and bias: the total, and the norm of the total as it was stored."""
    total, normed = body(*arguments)
    x, residual, joined, weight, bias, groups, eps, silu, x_bias = arguments
    added = None if x_bias is None else x_bias[:, None, None]
    verdicts = [_compare_sum(total[:, : x.shape[1]], x, residual, added)]
    if joined is not None:
        verdicts.append(compare(total[:, x.shape[1] :], joined.double(), 0.0))
    verdicts.append(_compare_norm(normed, total.double(), weight, bias, groups, eps, silu=silu))
    return Verdict.worst(verdicts)


def check_add_upsample(body: Body, arguments: Sequence[Any]) -> Verdict:
    """`add_upsample`: each of a pixel's copies."""
    found = body(*arguments)
    x, residual, x_bias, factor = arguments
    rows, channels, height, width = x.shape
    if found.shape != (rows, channels, factor * height, factor * width):
        raise ValueError(f"found has shape {tuple(found.shape)}, expected {factor} times the sides of {tuple(x.shape)}")
    added = None if x_bias is None else x_bias[:, None, None]
    places = [(down, right) for down in range(factor) for right in range(factor)]
    return Verdict.worst(
        [_compare_sum(found[:, :, down::factor, right::factor], x, residual, added) for down, right in places]
    )


def _compare_sum(found: Tensor, x: Tensor, residual: Tensor | None, x_bias: Tensor | None) -> Verdict:
    """With sums in float32, each rounded relative to terms that may cancel, and then one rounding; x_bias as it is broadcast."""
    terms = [x, residual, x_bias]
    exact = [term.double() for term in terms if term is not None]
    sizes = sum((term.abs() for term in exact[1:]), exact[0].abs())
    return compare(found, sum(exact[1:], exact[0]), (len(exact) - 1) * HALF_UNIT[torch.float32] * sizes)


def _compare_norm(
    found: Tensor, value: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool
) -> Verdict:
    """With the group norm of a picture in float64."""
    grouped = value.reshape(value.shape[0], groups, -1)
    grouped = grouped - grouped.mean(-1, keepdim=True)
    norm = (grouped / (grouped.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(value.shape)
    weight, bias = weight.double().view(-1, 1, 1), bias.double().view(-1, 1, 1)
    result = norm * weight + bias
    error = 4e-6 * ((norm.abs() + 1) * weight.abs() + bias.abs())
    return compare(found, result * result.sigmoid() if silu else result, error)


def check_geglu(body: Body, arguments: Sequence[Any]) -> Verdict:
    """`geglu` with the bias of the layer before."""
    found = body(*arguments)
    x, x_bias = (value.double() for value in arguments)
    value, gate = (x + x_bias).chunk(2, dim=-1)
    value_size, gate_size = (x.abs() + x_bias.abs()).chunk(2, dim=-1)
    expected = value * 0.5 * gate * (1 + torch.special.erf(gate / math.sqrt(2)))
    summed = 1.2 * HALF_UNIT[torch.float32] * (value_size * gate.abs() + value.abs() * gate_size)
    return compare(found, expected, 1e-6 * value.abs() * (gate.abs() + 1) + summed)


def check_add_layer_norm(body: Body, arguments: Sequence[Any]) -> Verdict:
    """`add_layer_norm` with weight and bias: the sum, and the norm of the sum as it was stored."""
    total, normed = body(*arguments)
    x, residual, weight, bias, eps, x_bias = arguments
    sums = _compare_sum(total, x, residual, x_bias)
    weight, bias = weight.double(), bias.double()
    stored = total.double()
    centred = stored - stored.mean(-1, keepdim=True)
    norm = centred / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    error = 4e-6 * ((norm.abs() + 1) * weight.abs() + bias.abs())
    return Verdict.worst([sums, compare(normed, norm * weight + bias, error)])


def check_sampler_step(body: Body, arguments: Sequence[Any]) -> Verdict:
    """`sampler_step`, which writes in place, on copies of the state; also of rows that nobody owns, which must stay."""
    state = [value.clone() for value in arguments]
    body(*state)
    x, saved, history, output, table, row, noise, scale, cond, uncond, model_input = (v.double() for v in arguments)
    expected = {"x": x.clone(), "saved": saved.clone(), "history": history.clone(), "model_input": model_input.clone()}
    errors = {name: torch.zeros_like(value) for name, value in expected.items()}
    for slot, (at, first, second) in enumerate(zip(row.tolist(), cond.tolist(), uncond.tolist(), strict=True)):
        if first < 0:
            continue
        c = table[int(at)]
        m, m_size = output[int(first)], output[int(first)].abs()
        if second >= 0:
            other = output[int(second)]
            m_size = other.abs() + scale[slot].abs() * (m.abs() + other.abs())
            m = other + scale[slot] * (m - other)
        h = history[:, slot]
        clip = c[Column.CLIP]
        d = (c[Column.DENOISED_X] * x[slot] + c[Column.DENOISED_M] * m).clamp(-clip, clip)
        d_size = (c[Column.DENOISED_X] * x[slot]).abs() + c[Column.DENOISED_M].abs() * m_size
        basis = [x[slot], m, d, saved[slot], *h, noise[int(at)]]
        sizes = [value.abs() for value in basis]
        sizes[Basis.M], sizes[Basis.D] = m_size, d_size

        def combined(column: int, terms: list[Tensor], c: Tensor) -> Tensor:
            return torch.stack([c[column + k] * term for k, term in enumerate(terms)]).sum(0)

        def magnitude(column: int, c: Tensor, sizes: list[Tensor] = sizes) -> Tensor:
            return 1e-6 * combined(column, sizes, c.abs())

        expected["x"][slot] = combined(Column.NEXT_X, basis, c)
        expected["saved"][slot] = combined(Column.NEXT_SAVED, basis, c)
        errors["x"][slot], errors["saved"][slot] = magnitude(Column.NEXT_X, c), magnitude(Column.NEXT_SAVED, c)
        if c[Column.PUSH] != 0:
            expected["history"][:, slot] = torch.stack([combined(Column.PUSHED, basis, c), h[0], h[1]])
            errors["history"][0, slot] = magnitude(Column.PUSHED, c)
        for model_row in (int(first), int(second)):
            if model_row >= 0:
                expected["model_input"][model_row] = expected["x"][slot] * c[Column.NEXT_INPUT_SCALE]
                errors["model_input"][model_row] = errors["x"][slot] * c[Column.NEXT_INPUT_SCALE].abs()
    found = {"x": state[0], "saved": state[1], "history": state[2], "model_input": state[10]}
    return Verdict.worst([compare(found[name], expected[name], errors[name]) for name in expected])
