"""Which body computes an attention, and with which tiles: a table per architecture.

Chosen by reading what Triton 3.7 makes of the kernel, and on 9.0 by a GPU's clock. The first candidate is the default. It spills no
register for the head sizes of Stable Diffusion to an image or to 77 tokens of text, and fits into the shared memory of a
program: 99 KiB on 8.6, 8.9 and 12.0, 163 KiB on 8.0, 227 KiB on 9.0 and 10.0. What is fastest, only the machine can tell:
kernels/tuning.py is how a measurement counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch

from ldmrt.kernels.tuning import Operator

Body = Literal["triton", "sdpa"]

FEW_KEYS = 256  # up to here the keys are a text, or an image so small that the number of programs matters more


@dataclass(frozen=True, slots=True)
class Problem:
    """What an attention is tuned by. The rows of the batch are left out: one choice serves all of them."""

    head_size: int
    heads: int
    query_tokens: int
    key_tokens: int
    dtype: torch.dtype


class Tiles(NamedTuple):
    """How a program of a Triton kernel is cut.

    Attributes:
        block_m: queries of a program.
        block_n: keys of a step of its loop.
        num_warps: warps of a program.
        num_stages: blocks of keys under way at once.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Choice(NamedTuple):
    """A body, `triton` or `sdpa` (torch's scaled_dot_product_attention), and the tiles if it is the first."""

    body: Body
    tiles: Tiles


class _Row(NamedTuple):
    """The entry for a class of head sizes: the body for many keys, then the tiles for many and for few keys."""

    body: Body
    many: tuple[Tiles, ...]
    few: tuple[Tiles, ...]


def _tiles(*tiles: tuple[int, int, int, int]) -> tuple[Tiles, ...]:
    return tuple(Tiles(*each) for each in tiles)


# A class of head sizes is named by its largest. Stable Diffusion has 40, 64, 80, 128, 160 and, in the VAE, 512.
# Few keys are a matter of memory: small steps, for 77 tokens leave half of a block of 64 empty.
_FEW = _tiles((128, 32, 8, 2), (64, 32, 4, 2), (128, 64, 8, 2))
# With head parts of 8 and 16, four warps copy 16 bytes per thread where eight would copy 8.
_FEW_PARTS = _tiles((64, 32, 4, 2), (128, 32, 8, 2), (64, 64, 4, 2))
_FEW_PARTS_90 = _tiles((128, 32, 8, 2), (64, 32, 4, 2), (64, 64, 4, 2))
_FEW_64_90 = _tiles((64, 32, 4, 2), (128, 32, 8, 2), (128, 64, 8, 2))
_FEW_192_90 = _tiles((64, 64, 4, 2), (64, 32, 4, 2), (128, 32, 8, 2))
_FEW_192 = _tiles((64, 32, 4, 2), (64, 64, 4, 2), (128, 32, 8, 2))

# Ampere and Ada multiply with mma.sync. 8.6 and 8.9 have 99 KiB of shared memory.
_MMA: dict[int, _Row] = {
    48: _Row("triton", _tiles((128, 64, 4, 2), (64, 64, 4, 2), (128, 64, 8, 2), (128, 32, 4, 3)), _FEW_PARTS),
    64: _Row("triton", _tiles((128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 3)), _FEW),
    96: _Row("triton", _tiles((128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 3)), _FEW_PARTS),
    128: _Row("triton", _tiles((128, 64, 8, 2), (64, 64, 4, 2), (128, 32, 8, 3)), _FEW),
    192: _Row("triton", _tiles((128, 32, 8, 3), (64, 64, 4, 2), (64, 32, 4, 2)), _FEW_192),
    256: _Row("triton", _tiles((32, 32, 4, 2), (64, 32, 8, 2)), _tiles((32, 32, 4, 2), (64, 32, 8, 2))),
    512: _Row("triton", _tiles((32, 32, 8, 2), (32, 32, 4, 1)), _tiles((32, 32, 8, 2), (32, 16, 4, 2))),
}
_TABLE: dict[int, dict[int, _Row]] = {
    80: {
        **_MMA,
        # FlashAttention was written for this one.
        64: _Row("sdpa", _tiles((128, 64, 4, 2), (128, 64, 8, 2), (64, 64, 4, 2)), _FEW),
        128: _MMA[128]._replace(body="sdpa"),
        # 163 KiB hold 64 queries of the wide head, and the keys and values of two steps.
        512: _Row("triton", _tiles((64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2)), _MMA[512].few),
    },
    86: _MMA,
    89: _MMA,
    # Hopper multiplies from shared memory (wgmma), 64 queries per four warps, and has 227 KiB of it. Measured on an H100
    # (benchmarks/results/gpu.jsonl): to an image cuDNN's is the faster one up to heads of 128.
    90: {
        48: _Row("sdpa", _tiles((128, 64, 8, 3), (64, 64, 4, 3), (128, 128, 8, 2)), _FEW_PARTS_90),
        64: _Row("sdpa", _tiles((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)), _FEW_64_90),
        96: _Row("sdpa", _tiles((64, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 2)), _FEW_PARTS),
        128: _Row("sdpa", _tiles((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)), _FEW),
        192: _Row("triton", _tiles((64, 64, 4, 2), (64, 32, 4, 3), (128, 64, 8, 2)), _FEW_192_90),
        256: _Row("triton", _tiles((128, 64, 8, 2), (64, 32, 4, 2)), _tiles((64, 32, 4, 2), (128, 64, 8, 2))),
        512: _Row("triton", _tiles((64, 32, 8, 2), (32, 32, 8, 2)), _tiles((64, 32, 8, 2), (32, 32, 8, 2))),
    },
    # Data-centre Blackwell sums in a memory of its own (tcgen05).
    100: {
        48: _Row("triton", _tiles((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)), _FEW_PARTS),
        64: _Row(
            "sdpa", _tiles((128, 128, 8, 2), (128, 64, 8, 2), (64, 64, 4, 3)), _tiles((128, 32, 8, 2), (64, 64, 4, 3))
        ),
        96: _Row("triton", _tiles((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)), _FEW_PARTS),
        128: _Row("sdpa", _tiles((128, 64, 8, 3), (128, 128, 8, 2), (64, 64, 4, 3)), _FEW),
        192: _Row("triton", _tiles((128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3)), _FEW_192),
        256: _Row("triton", _tiles((64, 32, 4, 2), (128, 64, 8, 2)), _tiles((64, 32, 4, 2), (128, 64, 8, 2))),
        512: _Row("triton", _tiles((64, 32, 8, 2), (32, 32, 8, 2)), _tiles((32, 32, 8, 2), (64, 32, 8, 2))),
    },
    # Consumer Blackwell multiplies as Ada does, but its compiler needs more registers.
    120: {
        **_MMA,
        192: _Row("triton", _tiles((128, 32, 8, 2), (64, 16, 4, 2)), _tiles((64, 16, 4, 2), (64, 32, 4, 2))),
        512: _Row("triton", _tiles((32, 32, 8, 2), (32, 16, 4, 2)), _tiles((32, 32, 8, 2), (32, 16, 4, 2))),
    },
}

# float32 is multiplied without tensor cores, number by number, so a dot product must be small to fit into registers.
# torch's own kernels do it better on every GPU; these tiles are for what the interpreter checks and for overrides.
_FLOAT32: dict[int, _Row] = {
    **dict.fromkeys((48, 64, 96), _Row("sdpa", _tiles((32, 32, 4, 1)), _tiles((32, 32, 4, 1)))),
    **dict.fromkeys((128, 192, 256, 512), _Row("sdpa", _tiles((16, 16, 8, 1)), _tiles((16, 16, 8, 1)))),
}

ARCHITECTURES = tuple(_TABLE)


@cache
def candidates(kernel: str, arch: int, problem: Problem) -> tuple[Choice, ...]:
    """What a measurement should try for a problem, the default first. Both bodies are among them.

    An architecture that the table does not have is given the row of the newest that is not newer. Before 8.0 the default
    is torch.

    Raises:
        ValueError: the table has no such kernel, or the head size is above 512.
    """
    if kernel != "attention":
        raise ValueError(f"configurations: no kernel is called {kernel!r}, expected 'attention'")
    row = _row(arch, problem)
    few = problem.key_tokens <= FEW_KEYS
    # A program of more queries than there are would compute rows of padding.
    needed = max(64, problem.query_tokens)
    tiles = sorted(row.few if few else row.many, key=lambda each: each.block_m > needed)
    triton: list[Choice] = [Choice("triton", each) for each in tiles]
    sdpa = Choice("sdpa", tiles[0])
    sdpa_first = arch < min(ARCHITECTURES) or problem.dtype == torch.float32 or (row.body == "sdpa" and not few)
    return (sdpa, *triton) if sdpa_first else (*triton, sdpa)


def _row(arch: int, problem: Problem) -> _Row:
    nearest = max((known for known in ARCHITECTURES if known <= arch), default=86)
    table = _FLOAT32 if problem.dtype == torch.float32 else _TABLE[nearest]
    bounds = [bound for bound in table if problem.head_size <= bound]
    if not bounds:
        raise ValueError(f"configurations: head size {problem.head_size}, expected at most {max(table)}")
    return table[min(bounds)]


ATTENTION: Operator[Problem, Choice] = Operator(
    "attention",
    Problem,
    lambda arch, problem: candidates("attention", arch, problem),
    source="attention.forward",
    launches=lambda choice: choice.body == "triton",
)
