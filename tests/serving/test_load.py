"""The batcher under load, on a clock of its own: the real register and worker over a model that takes a given time for a step."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from ldmrt.serving.aside import AtOnce
from ldmrt.serving.register import Register
from ldmrt.serving.ticket import Image, Ticket
from ldmrt.serving.worker import Worker
from tests.serving.test_ticket import ticket

# Seconds of a step by images in the batch: those of the built-in model on two cores (benchmarks/results/shapes.jsonl).
SECONDS = {1: 0.0205, 2: 0.026, 4: 0.040}
# A model for which a batch is no faster than its images one by one.
PROPORTIONAL = {1: 0.02, 2: 0.04, 4: 0.08}
STEPS = (4, 8, 20, 30, 50)
SIZE = (64, 64)

Way = Callable[[Sequence[tuple[float, int]], dict[int, float]], list[tuple[float, int]]]


def seconds(of: dict[int, float], images: int) -> float:
    return next(cost for most, cost in of.items() if most >= images)


class Model:
    """Stands in for a `Batch` and a `Pipeline`: only time passes."""

    device = torch.device("cpu")

    def __init__(self, cost: dict[int, float]) -> None:
        self.now, self._cost = 0.0, cost
        self._made: dict[Image, int] = {}

    @property
    def images(self) -> list[Image]:
        return list(self._made)

    def fits(self, image: Image, joining: Sequence[Image]) -> bool:
        return len(self._made) + len(joining) < max(self._cost)

    def reserve(self, images: Sequence[Image]) -> None:
        pass

    def embed(self, images: Sequence[Any], *, together: bool) -> list[None]:
        return [None] * len(images)

    def admit(self, image: Image, text: None) -> None:
        self._made[image] = 0

    def step(self) -> int:
        self.now += seconds(self._cost, len(self._made))
        self._made = {image: made + 1 for image, made in self._made.items()}
        return len(self._made)

    def made(self, image: Image) -> int:
        return self._made[image]

    def latents(self, image: Image) -> torch.Tensor:
        return torch.zeros(1)

    def release(self, image: Image) -> None:
        del self._made[image]


def arrivals(count: int, rate: float | None, seed: int = 7) -> list[tuple[float, int]]:
    """Times and steps of requests: a Poisson process, or all at once."""
    drawn, at = random.Random(seed), 0.0
    made = []
    for _ in range(count):
        at += drawn.expovariate(rate) if rate else 0.0
        made.append((at, drawn.choice(STEPS)))
    return made


def batcher(requests: Sequence[tuple[float, int]], cost: dict[int, float]) -> list[tuple[float, int]]:
    """The latency and the steps of every request."""
    model, register = Model(cost), Register(len(requests))
    register.clock = lambda: model.now
    worker = Worker(model, register, {SIZE: model}, AtOnce(), alone=False)  # type: ignore[arg-type,dict-item]
    latencies: list[tuple[float, int]] = []

    def arrive(at: float, steps: int) -> Ticket:
        made = ticket(num_inference_steps=steps, sampler="ddim")
        made.output_type = "latent"
        made.handle.future.add_done_callback(lambda _: latencies.append((model.now - at, steps)))
        return made

    coming = list(requests)[::-1]
    while len(latencies) < len(requests):
        if coming and not register.stats().present:
            model.now = max(model.now, coming[-1][0])
        while coming and coming[-1][0] <= model.now:
            register.add(arrive(*coming.pop()))
        worker.turn([])
    return latencies


def static(requests: Sequence[tuple[float, int]], cost: dict[int, float]) -> list[tuple[float, int]]:
    """The same with batches that are filled when they start, and end together."""
    now, done, latencies = 0.0, 0, []
    while done < len(requests):
        now = max(now, requests[done][0])
        batch = [request for request in requests[done : done + max(cost)] if request[0] <= now]
        now += seconds(cost, len(batch)) * max(steps for _, steps in batch)
        latencies += [(now - at, steps) for at, steps in batch]
        done += len(batch)
    return latencies


def p99(latencies: Sequence[tuple[float, int]]) -> float:
    return float(np.percentile([latency for latency, _ in latencies], 99))


def capacity(way: Way, cost: dict[int, float], count: int = 200) -> float:
    return count / max(latency for latency, _ in way(arrivals(count, None), cost))


@pytest.mark.parametrize("cost", [SECONDS, PROPORTIONAL], ids=["batches are faster", "batches are no faster"])
def test_at_four_fifths_of_capacity_the_slowest_wait_half_as_long_as_with_static_batching(
    cost: dict[int, float],
) -> None:
    assert capacity(batcher, cost) > 1.4 * capacity(static, cost)
    busy, calm = (arrivals(600, 0.8 * capacity(of, cost)) for of in (batcher, static))
    for requests in (busy, calm):
        assert 2 * p99(batcher(requests, cost)) < p99(static(requests, cost))
    # Where static batching is not overloaded, the shortest gain too.
    shortest = [[latency for latency, steps in way(calm, cost) if steps == STEPS[0]] for way in (batcher, static)]
    assert 2 * np.median(shortest[0]) < np.median(shortest[1])


def test_everybody_is_served_in_overload() -> None:
    """Twice what can be done: the long wait, since the short go first, but not behind all the short that come later."""
    requests = arrivals(400, 2 * capacity(batcher, SECONDS))
    latencies = batcher(requests, SECONDS)
    assert len(latencies) == len(requests)
    longest = [latency for latency, steps in latencies if steps == STEPS[-1]]
    shortest = [latency for latency, steps in latencies if steps == STEPS[0]]
    assert np.median(shortest) < 0.2 * np.median(longest)
    last = max(at for at, _ in requests)
    first_long = next(at for at, steps in requests if steps == STEPS[-1])
    assert min(longest) + first_long < last
