"""The built-in model's networks and pictures under pytest-benchmark, beside diffusers' and transformers' own.

    pytest benchmarks/test_components.py [--benchmark-save=NAME] [--benchmark-compare=NAME]

Groups are components. Results are compared before anything is timed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from cpu_operators import differ
from quick import Pair, engines, pictures

if TYPE_CHECKING:
    from pytest_benchmark.fixture import BenchmarkFixture

COMPONENTS = ("unet", "decoder", "text_encoder", "picture of 4 steps")


@pytest.fixture(scope="module")
def pairs() -> Iterator[dict[str, Pair]]:
    """The built-in model by ldmrt and by diffusers, by component."""
    with tempfile.TemporaryDirectory() as work:
        yield {pair.name.removeprefix("built-in model: "): pair for pair in (*engines(Path(work)), pictures())}


@pytest.mark.parametrize("whose", ["ldmrt", "diffusers"])
@pytest.mark.parametrize("component", COMPONENTS)
def test_component(benchmark: BenchmarkFixture, pairs: dict[str, Pair], component: str, whose: str) -> None:
    pair = pairs[component]
    benchmark.group = component
    with torch.inference_mode():
        assert differ(pair.ours(), pair.other()) < pair.agree
        benchmark(pair.ours if whose == "ldmrt" else pair.other)
