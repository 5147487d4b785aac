"""Values of configs."""

from __future__ import annotations

import math

import pytest

from ldmrt.export.values import is_number, is_whole

HUGE = 10**400  # JSON may have it, and no float


@pytest.mark.parametrize(
    ("value", "whole", "number"),
    [
        (1, True, True),
        (0, False, True),
        (-3, False, True),
        (1.5, False, True),
        (HUGE, True, False),
        (-HUGE, False, False),
        (math.inf, False, False),
        (math.nan, False, False),
        (True, False, False),
        ("1", False, False),
        (None, False, False),
        ([1], False, False),
    ],
)
def test_what_is_a_number(value: object, whole: bool, number: bool) -> None:
    assert (is_whole(value), is_number(value)) == (whole, number)
