"""What several tests of kernels share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from tests.interpreted import VARIABLE, pytest_configure, pytest_pyfunc_call, pytest_runtest_logreport

__all__ = ["pytest_configure", "pytest_pyfunc_call", "pytest_runtest_logreport"]


@pytest.fixture
def bfloat16_in_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Triton's interpreter keeps bfloat16 as uint16, and its dot product multiplies those integers: here it is given floats."""
    if os.environ.get(VARIABLE) != "1":
        yield
        return
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(operand: Any) -> Any:
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return create_dot(self, widened(a), widened(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", dot)
    yield
