import pytest

from ldmrt.kernels.blocks import columns_of, power_of_two


@pytest.mark.parametrize(("number", "expected"), [(1, 1), (2, 2), (3, 4), (64, 64), (65, 128)])
def test_the_smallest_power_of_two_that_is_not_smaller(number: int, expected: int) -> None:
    assert power_of_two(number) == expected


@pytest.mark.parametrize(("width", "expected"), [(1280, 256), (5120, 512), (320, 64), (96, 128), (1000, 512), (1, 1)])
def test_columns_divide_a_width_where_64_of_them_do(width: int, expected: int) -> None:
    assert columns_of(width) == expected
