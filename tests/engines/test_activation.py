"""Activation memory: shared, and never taken from who has it."""

from __future__ import annotations

from ldmrt.engines.activation import ActivationMemory
from tests.engines.tensorrt_gpu import FakeGpu


def test_nothing_is_allocated_before_it_is_needed_then_one_block_for_all() -> None:
    gpu = FakeGpu()
    memory = ActivationMemory(gpu)
    for size in (100, 300, 200):
        memory.reserve(size)
    assert gpu.blocks == []
    assert memory.block() is memory.block()
    assert gpu.blocks == [300]


def test_who_needs_more_later_gets_another_block_and_the_first_stays_where_it_is() -> None:
    gpu = FakeGpu()
    memory = ActivationMemory(gpu)
    memory.reserve(100)
    first = memory.block()
    address = first.data_ptr()
    first.fill_(7)
    memory.reserve(50)
    assert memory.block() is first
    memory.reserve(400)
    second = memory.block()
    second.fill_(9)
    assert gpu.blocks == [100, 400]
    assert first.data_ptr() == address
    assert (first == 7).all()
    assert memory.block() is second


def test_an_engine_that_needs_none_gets_an_address() -> None:
    memory = ActivationMemory(FakeGpu())
    memory.reserve(0)
    assert memory.block().data_ptr() != 0
