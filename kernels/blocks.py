"""Sizes of the blocks that a Triton program computes: powers of two, as Triton asks."""

from __future__ import annotations


def power_of_two(number: int) -> int:
    """The smallest that is not smaller."""
    return 1 << (number - 1).bit_length()


def columns_of(width: int) -> int:
    """A power of two up to 512 that divides a width, if one of at least 64 does, so that no column needs a mask."""
    divisor = min(512, width & -width)
    return divisor if divisor >= 64 else min(512, power_of_two(width))
