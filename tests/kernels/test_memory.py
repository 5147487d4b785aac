from __future__ import annotations

import gc
import random
import threading
from typing import Any

import pytest
import torch

from ldmrt.kernels import memory
from ldmrt.kernels.memory import LARGE, Pool

MB = 1 << 20


def test_a_block_comes_back_when_nothing_refers_to_it() -> None:
    pool = Pool()
    first = pool.lend(8 * MB)
    first[:] = 1
    assert (pool.lent, pool.free) == (8 * MB, 0)
    address = first.ctypes.data
    del first
    assert pool.lend(8 * MB).ctypes.data == address


def test_a_view_of_a_tensor_keeps_its_block() -> None:
    pool = Pool()
    view = torch.from_numpy(pool.lend(8 * MB)).view(torch.float32)[5:10]
    view.fill_(3.0)
    others = [pool.lend(8 * MB) for _ in range(3)]
    for other in others:
        other[:] = 255
    assert view.tolist() == [3.0] * 5
    assert pool.lent == 32 * MB


def test_a_block_serves_smaller_needs_unless_half_of_it_would_lie_idle() -> None:
    pool = Pool()
    large, _ = pool.lend(16 * MB), pool.lend(8 * MB)
    address = large.ctypes.data
    del large, _
    assert pool.lend(6 * MB).ctypes.data != address
    assert pool.lend(10 * MB).ctypes.data == address


def test_together_the_blocks_never_exceed_the_most_that_was_lent() -> None:
    pool, most = Pool(), 0
    draw = random.Random(1)
    held: list[Any] = []
    for _ in range(500):
        if held and draw.random() < 0.5:
            held.pop(draw.randrange(len(held)))
        else:
            held.append(pool.lend(draw.randrange(1, 20 * MB)))
            # A loan is a block that may be twice as large as what was asked for.
            most = max(most, pool.lent)
            assert pool.lent >= sum(len(block) for block in held)
        assert pool.lent + pool.free <= most
    assert pool.free > 0
    held.clear()
    pool.lend(1)
    assert pool.lent <= 4 * MB
    assert pool.lent + pool.free <= most


def test_threads_never_share_a_block() -> None:
    pool = Pool()
    wrong = []

    def work(number: int) -> None:
        for _ in range(50):
            block = pool.lend(4 * MB)
            block[:] = number
            if (block != number).any():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pool.lent + pool.free <= 2 * 4 * 4 * MB  # the block before is there until the next has been lent


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_new_empty_is_an_ordinary_tensor(dtype: torch.dtype) -> None:
    x = torch.zeros(1, dtype=dtype)
    for shape in ((2, 3, LARGE // 8, 1), (7, 5), (0, 4)):
        made = memory.new_empty(x, shape)
        assert made.shape == shape
        assert made.dtype == dtype
        assert made.is_contiguous()
        made.fill_(1.5)
        assert made.double().sum() == 1.5 * made.numel()
    gc.collect()


def test_empty_like_keeps_the_order_in_memory() -> None:
    x = torch.zeros(1, 32, 256, 256)
    for like in (x, x.contiguous(memory_format=torch.channels_last), x.transpose(2, 3)):
        made = memory.empty_like(like)
        assert made.shape == like.shape
        assert made.stride() == like.stride()
