"""The operators as torch's: `torch.ops.ldmrt.NAME`, so that torch.compile, torch.export and others see one call each.

Importing this file registers them. A graph of ours calls the functions themselves, by `OPERATORS`: torch's dispatcher would cost
more than some of them take.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ldmrt.kernels.add_group_norm import add_group_norm_silu, add_group_norm_silu_reference, empty
from ldmrt.kernels.attention import attention, attention_reference
from ldmrt.kernels.convolution import conv2d, conv2d_reference
from ldmrt.kernels.geglu import geglu, geglu_reference
from ldmrt.kernels.group_norm import group_norm_silu, group_norm_silu_reference
from ldmrt.kernels.layer_norm import add_layer_norm, add_layer_norm_reference
from ldmrt.kernels.linear import linear, linear_reference
from ldmrt.kernels.linear_geglu import linear_geglu, linear_geglu_reference
from ldmrt.kernels.sampler import advance, sampler_step
from ldmrt.kernels.upsample import add_upsample, add_upsample_reference

# By their names in a graph.
OPERATORS: dict[str, Callable[..., Any]] = {
    "ldmrt.add_group_norm_silu.default": add_group_norm_silu,
    "ldmrt.add_layer_norm.default": add_layer_norm,
    "ldmrt.add_upsample.default": add_upsample,
    "ldmrt.attention.default": attention,
    "ldmrt.conv2d.default": conv2d,
    "ldmrt.geglu.default": geglu,
    "ldmrt.group_norm_silu.default": group_norm_silu,
    "ldmrt.linear.default": linear,
    "ldmrt.linear_geglu.default": linear_geglu,
}

# The same in plain torch, by the operators' names.
REFERENCES: dict[str, Callable[..., Any]] = {
    "add_group_norm_silu": add_group_norm_silu_reference,
    "add_layer_norm": add_layer_norm_reference,
    "add_upsample": add_upsample_reference,
    "attention": attention_reference,
    "conv2d": conv2d_reference,
    "geglu": geglu_reference,
    "group_norm_silu": group_norm_silu_reference,
    "linear": linear_reference,
    "linear_geglu": linear_geglu_reference,
}

# A letter and an exclamation mark stand for what is written to.
_SCHEMAS: dict[str, tuple[Callable[..., Any], str]] = {
    "add_group_norm_silu": (
        add_group_norm_silu,
        (
            "(Tensor x, Tensor? residual, Tensor? joined, Tensor? weight, Tensor? bias, int groups, float eps, bool silu, "
            "Tensor? x_bias=None) -> (Tensor, Tensor)"
        ),
    ),
    "add_layer_norm": (
        add_layer_norm,
        (
            "(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, float eps, Tensor? x_bias=None) "
            "-> (Tensor, Tensor)"
        ),
    ),
    "add_upsample": (add_upsample, "(Tensor x, Tensor? residual, Tensor? x_bias, int factor) -> Tensor"),
    "attention": (
        attention,
        "(Tensor query, Tensor key, Tensor value, int heads, float scale, bool causal=False, Tensor? mask=None) -> Tensor",
    ),
    "conv2d": (conv2d, "(Tensor x, Tensor weight, int stride, int padding) -> Tensor"),
    "linear": (linear, "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor"),
    "linear_geglu": (linear_geglu, "(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor"),
    "geglu": (geglu, "(Tensor x, Tensor? x_bias=None) -> Tensor"),
    "group_norm_silu": (
        group_norm_silu,
        (
            "(Tensor x, Tensor? weight, Tensor? bias, int groups, float eps, bool silu, Tensor? shift=None, "
            "Tensor? x_bias=None) -> Tensor"
        ),
    ),
    "sampler_step": (
        sampler_step,
        (
            "(Tensor(a!) x, Tensor(b!) saved, Tensor(c!) history, Tensor model_output, Tensor table, Tensor row, "
            "Tensor? noise, Tensor guidance_scale, Tensor cond_row, Tensor uncond_row, Tensor(d!) model_input) -> ()"
        ),
    ),
    "advance": (advance, "(Tensor(a!) row, Tensor last_row) -> ()"),
}


def _fake_add_group_norm_silu(
    x: Tensor,
    residual: Tensor | None,  # noqa: ARG001
    joined: Tensor | None,
    *_others: Any,
    **_options: Any,
) -> tuple[Tensor, Tensor]:
    channels = x.shape[1] + (0 if joined is None else joined.shape[1])
    return empty(x, channels), empty(x, channels)


def _fake_add_layer_norm(x: Tensor, *_others: Any, **_options: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_add_upsample(x: Tensor, residual: Tensor | None, x_bias: Tensor | None, factor: int) -> Tensor:  # noqa: ARG001
    rows, channels, height, width = x.shape
    return x.new_empty((rows, factor * height, factor * width, channels)).movedim(-1, 1)


def _fake_attention(query: Tensor, *_others: Any, **_options: Any) -> Tensor:
    return query.new_empty(query.shape)


def _fake_conv2d(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    side = weight.shape[2]
    height, width = ((size + 2 * padding - side) // stride + 1 for size in x.shape[2:])
    return x.new_empty((x.shape[0], height, width, weight.shape[0])).movedim(-1, 1)


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: ARG001
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_linear_geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: ARG001
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


def _fake_geglu(x: Tensor, x_bias: Tensor | None = None) -> Tensor:  # noqa: ARG001
    return x.new_empty((*x.shape[:-1], x.shape[-1] // 2))


def _fake_group_norm_silu(x: Tensor, *_others: Any, **_options: Any) -> Tensor:
    return torch.empty_like(x)


def _fake_in_place(*_arguments: Any, **_options: Any) -> None:
    """Nothing is returned, and no shape changes."""


# What each gives, without computing it.
_FAKES: dict[str, Callable[..., Any]] = {
    "add_group_norm_silu": _fake_add_group_norm_silu,
    "add_layer_norm": _fake_add_layer_norm,
    "add_upsample": _fake_add_upsample,
    "attention": _fake_attention,
    "conv2d": _fake_conv2d,
    "geglu": _fake_geglu,
    "linear": _fake_linear,
    "linear_geglu": _fake_linear_geglu,
    "group_norm_silu": _fake_group_norm_silu,
    "sampler_step": _fake_in_place,
    "advance": _fake_in_place,
}

for _name, (_body, _schema) in _SCHEMAS.items():
    torch.library.define(f"ldmrt::{_name}", _schema, tags=[torch.Tag.pt2_compliant_tag])
    torch.library.impl(f"ldmrt::{_name}", "default", _body)
    torch.library.register_fake(f"ldmrt::{_name}", _FAKES[_name])
