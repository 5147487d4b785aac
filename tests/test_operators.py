"""The operators that a graph may call: all there, and none that writes."""

from __future__ import annotations

import pytest
import torch

from ldmrt.errors import BundleError
from ldmrt.kernels.ops import OPERATORS
from ldmrt.operators import ALLOWED, VIEWS, resolve

OVERLOADS = sorted(op for op in ALLOWED if not op.startswith("python."))


def test_there_are_operators() -> None:
    assert len(OVERLOADS) > 50
    assert VIEWS <= ALLOWED
    assert set(OPERATORS) == {op for op in ALLOWED if op.startswith("ldmrt.")}


@pytest.mark.parametrize("op", OVERLOADS)
def test_each_is_there_and_pure(op: str) -> None:
    function = resolve(op)
    if op in OPERATORS:
        function = getattr(torch.ops.ldmrt, op.split(".")[1]).default  # the same function, as torch knows it
    assert isinstance(function, torch._ops.OpOverload)
    schema = function._schema
    assert not schema.is_mutable, f"{op} writes into its arguments"
    assert not any(argument.alias_info is not None and argument.alias_info.is_write for argument in schema.arguments)
    # Files are named by strings; the strings that these take are modes of rounding and padding.
    strings = {argument.name for argument in schema.arguments if "str" in str(argument.type)}
    assert strings <= {"rounding_mode", "approximate", "mode", "padding", "indexing"}, strings
    # Attention draws numbers for dropout alone, which no graph asks for.
    draws = torch.Tag.nondeterministic_seeded in function.tags and "scaled_dot_product_attention" not in op
    assert not draws, f"{op} draws random numbers"


@pytest.mark.parametrize("op", sorted(VIEWS))
def test_views_share_memory(op: str) -> None:
    schema = resolve(op)._schema  # type: ignore[attr-defined]
    # flatten and its like copy where they must, so that their schema promises nothing.
    assert op == "aten.flatten.using_ints" or any(value.alias_info is not None for value in schema.returns)


@pytest.mark.parametrize(
    "op",
    [
        "aten.from_file.default",
        "aten.add_.Tensor",
        "aten.add.out",
        "aten.randn.default",
        "aten.conv2d",
        "prims.add.default",
        "python.eval",
        "os.system",
        "",
        "aten.__class__.default",
    ],
)
def test_others_are_refused(op: str) -> None:
    with pytest.raises(BundleError, match="not one that a graph may call"):
        resolve(op)


def test_an_operator_this_torch_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldmrt.operators.ALLOWED", frozenset({"aten.not_yet.default"}))
    with pytest.raises(BundleError, match=r"has no operator aten\.not_yet\.default"):
        resolve("aten.not_yet.default")
