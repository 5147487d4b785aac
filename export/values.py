"""Values that configs hold, which may be anything that JSON or YAML can write."""

from __future__ import annotations

import sys


def is_whole(value: object) -> bool:
    """Whether it is a whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: object) -> bool:
    """Whether it is a number that a float holds, and a finite one: of whole numbers there are larger ones."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= sys.float_info.max
