"""The table of attention configurations."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from ldmrt.kernels import configurations
from ldmrt.kernels.configurations import ARCHITECTURES, ATTENTION, Problem, candidates

PROBLEM = Problem(head_size=40, heads=8, query_tokens=4096, key_tokens=4096, dtype=torch.float16)
HEAD_SIZES = [1, 8, 40, 48, 64, 80, 128, 160, 256, 512]
# What one program may take of an SM's shared memory (CUDA C++ Programming Guide, technical specifications).
SHARED_MEMORY = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


def test_the_architectures_are_those_we_know_the_memory_of() -> None:
    assert set(ARCHITECTURES) == set(SHARED_MEMORY)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("key_tokens", [77, 4096])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_problem_has_tiles_that_triton_can_compile(
    arch: int, head_size: int, key_tokens: int, dtype: torch.dtype
) -> None:
    problem = Problem(head_size, 8, 4096, key_tokens, dtype)
    found = candidates("attention", arch, problem)
    assert {choice.body for choice in found} == {"triton", "sdpa"}
    assert len(set(found)) == len(found)
    for _, tiles in found:
        for size in (tiles.block_m, tiles.block_n):
            assert size >= 16
            assert size.bit_count() == 1
        assert tiles.num_warps in {4, 8}
        # Queries, and in every stage keys and values, lie in shared memory if there is more than one stage.
        elements = head_size * (tiles.block_m + 2 * tiles.block_n * (tiles.num_stages - 1))
        assert elements * dtype.itemsize <= SHARED_MEMORY[arch]


def test_the_default_is_the_first_candidate() -> None:
    assert ATTENTION.choose(89, PROBLEM) == candidates("attention", 89, PROBLEM)[0]
    assert ATTENTION.choose(89, PROBLEM).body == "triton"


@pytest.mark.parametrize(
    ("arch", "problem", "body"),
    [
        (90, replace(PROBLEM, head_size=64), "sdpa"),
        (90, replace(PROBLEM, head_size=64, key_tokens=77), "triton"),
        (89, replace(PROBLEM, head_size=64), "triton"),
        (89, replace(PROBLEM, dtype=torch.float32), "sdpa"),
        (90, replace(PROBLEM, head_size=512, heads=1), "triton"),
        (75, PROBLEM, "sdpa"),
    ],
)
def test_where_torch_is_the_default(arch: int, problem: Problem, body: str) -> None:
    assert ATTENTION.choose(arch, problem).body == body


@pytest.mark.parametrize(("arch", "row"), [(87, 86), (103, 100), (121, 120), (130, 120)])
def test_an_architecture_that_is_not_in_the_table_is_given_an_older_one_s_row(arch: int, row: int) -> None:
    problem = replace(PROBLEM, head_size=160)
    assert candidates("attention", arch, problem) == candidates("attention", row, problem)


@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_few_queries_are_not_given_large_blocks(arch: int, head_size: int) -> None:
    """CLIP's 77 tokens would fill 60 % of a block of 128."""
    for tokens in (64, 77):
        found = candidates("attention", arch, Problem(head_size, 8, tokens, tokens, torch.float16))
        assert found[0].tiles.block_m <= 64


def test_an_unknown_kernel_or_head_size_is_named() -> None:
    with pytest.raises(ValueError, match="no kernel is called 'attentoin', expected 'attention'"):
        configurations.candidates("attentoin", 89, PROBLEM)
    with pytest.raises(ValueError, match="head size 513, expected at most 512"):
        candidates("attention", 89, replace(PROBLEM, head_size=513))
