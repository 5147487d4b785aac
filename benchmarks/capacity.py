"""How many replicas a rate of requests needs, from what a step takes: the batcher's own register and worker for each of them, on a clock
that only the model moves.

    python benchmarks/capacity.py --step 1=20.5,2=26,4=40 --steps 4,8,20,30,50 --rate 10 --p95 8

Requests arrive as a Poisson process, each of one image with one of the numbers of steps. Each goes to the less busy of two replicas drawn at random, as Ray Serve
and load balancers with "power of two choices" send it. Tried are as many replicas as can keep up, and one more each time, until 95 of 100 requests are
finished in time. What is measured is the queue: the model's times are given (docs/deploy/capacity.md).
"""

from __future__ import annotations

import argparse
import math
import random
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from ldmrt import material
from ldmrt.bundle import Bundle
from ldmrt.material import Material
from ldmrt.opening import builtin_bundle
from ldmrt.request import Defaults, Job, Request, resolve
from ldmrt.samplers.make import sampler_table
from ldmrt.samplers.table import SamplerTable
from ldmrt.schedule import NoiseSchedule
from ldmrt.serving.aside import AtOnce
from ldmrt.serving.handle import Handle
from ldmrt.serving.register import Register
from ldmrt.serving.ticket import Image, Ticket
from ldmrt.serving.worker import Worker
from ldmrt.tokenizer import TokenWindows

SIZE = (64, 64)  # of pictures that nobody draws
MOST_REPLICAS = 1000


class Model:
    """Stands in for the pipeline of one replica, and for its batch: only time passes.

    Args:
        cost: seconds of a step, by the most images that it takes.
        image: seconds of an image besides its steps.
    """

    device = torch.device("cpu")

    def __init__(self, cost: Mapping[int, float], image: float) -> None:
        self.now, self._cost, self._image = 0.0, dict(sorted(cost.items())), image
        self._made: dict[Image, int] = {}

    @property
    def images(self) -> list[Image]:
        """Those of the batch."""
        return list(self._made)

    def fits(self, image: Image, joining: Sequence[Image]) -> bool:  # noqa: ARG002 - as of `ldmrt.serving.batch.Batch`, like all of these
        """Whether there is room."""
        return len(self._made) + len(joining) < max(self._cost)

    def reserve(self, images: Sequence[Image]) -> None:
        """Nothing is needed."""

    def embed(self, images: Sequence[Any], *, together: bool) -> list[None]:  # noqa: ARG002
        """No text."""
        return [None] * len(images)

    def admit(self, image: Image, text: None) -> None:  # noqa: ARG002
        """An image joins."""
        self._made[image] = 0

    def step(self) -> int:
        """A step of all; how many they are."""
        self.now += next(seconds for most, seconds in self._cost.items() if most >= len(self._made))
        self._made = {image: made + 1 for image, made in self._made.items()}
        return len(self._made)

    def made(self, image: Image) -> int:
        """Steps that it has made."""
        return self._made[image]

    def latents(self, image: Image) -> torch.Tensor:  # noqa: ARG002
        """No latents."""
        return torch.zeros(1)

    def release(self, image: Image) -> None:
        """An image leaves, and is decoded."""
        self.now += self._image
        del self._made[image]


class Replica:
    """One batcher on a clock of its own.

    Args:
        cost: as of `Model`, like the next.
        image: see there.
    """

    def __init__(self, cost: Mapping[int, float], image: float) -> None:
        self.model, self.register = Model(cost, image), Register(sys.maxsize)
        self.register.clock = lambda: self.model.now
        self._worker = Worker(self.model, self.register, {SIZE: self.model}, AtOnce(), alone=False)  # type: ignore[arg-type,dict-item]

    @property
    def present(self) -> int:
        """Requests that wait or run."""
        return self.register.stats().present

    def work(self, until: float) -> None:
        """Let time pass; a step that has begun is finished."""
        while self.present and self.model.now < until:
            self._worker.turn([])
        if until < math.inf:
            self.model.now = max(self.model.now, until)


class Tickets:
    """Makes requests; those of one number of steps share what they are made of."""

    def __init__(self) -> None:
        self._record = Bundle.open(builtin_bundle()).manifest.model
        self._schedule = NoiseSchedule.from_dict(self._record.schedule)
        window = TokenWindows(np.zeros((1, 77), np.int64), np.ones((1, 77), np.float32), "")
        self._windows = [((window,), (window,))]
        self._made: dict[int, tuple[Job, SamplerTable, Material]] = {}

    def make(self, steps: int) -> Ticket:
        """A request of one image."""
        if steps not in self._made:
            defaults = Defaults(
                width=SIZE[0], height=SIZE[1], num_inference_steps=steps, guidance_scale=1.0, sizes=(SIZE,)
            )
            resolved = resolve(Request(prompt="a", seed=0, sampler="ddim"), defaults)
            table = sampler_table(resolved.sampler, self._schedule, steps)
            self._made[steps] = resolved, table, material.resolve(self._record, resolved)
        job, table, brought = self._made[steps]
        return Ticket(
            handle=Handle(job, lambda: False),
            job=job,
            table=table,
            windows=self._windows,
            material=brought,
            output_type="latent",
            previews=0,
            on_progress=None,
            priority=0,
            submitted=0.0,
            due=None,
        )


def arrivals(count: int, rate: float, steps: Sequence[int], seed: int = 7) -> list[tuple[float, int]]:
    """Times and steps of requests, a Poisson process."""
    drawn, at, made = random.Random(seed), 0.0, []
    for _ in range(count):
        at += drawn.expovariate(rate)
        made.append((at, drawn.choice(steps)))
    return made


def latencies(
    requests: Sequence[tuple[float, int]], cost: Mapping[int, float], replicas: int, image: float = 0.0
) -> list[float]:
    """Seconds from each request to its picture, in the order of the pictures."""
    fleet, tickets, drawn = [Replica(cost, image) for _ in range(replicas)], Tickets(), random.Random(11)
    found: list[float] = []

    def send(at: float, steps: int, to: Replica) -> None:
        ticket = tickets.make(steps)
        ticket.handle.future.add_done_callback(lambda _: found.append(to.model.now - at))
        to.register.add(ticket)

    for at, steps in requests:
        for replica in fleet:
            replica.work(at)
        send(at, steps, min(drawn.sample(fleet, min(2, replicas)), key=lambda one: one.present))
    for replica in fleet:
        replica.work(math.inf)
    return found


def capacity(cost: Mapping[int, float], steps: Sequence[int], image: float = 0.0) -> float:
    """Images a second of one replica that has always enough of them."""
    mean = sum(steps) / len(steps)
    return max(images / (mean * seconds + images * image) for images, seconds in cost.items())


def parse_cost(text: str) -> dict[int, float]:
    """`1=20.5,2=26` in milliseconds, as seconds."""
    return {int(images): float(ms) / 1e3 for images, ms in (part.split("=") for part in text.split(","))}


def main() -> None:
    """Print what each number of replicas gives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", required=True, type=parse_cost, help="milliseconds of a step by images: 1=20.5,2=26")
    parser.add_argument("--image", type=float, default=0.0, help="milliseconds of an image besides: text and decoding")
    parser.add_argument("--steps", default="20", help="steps of a request; of several one is drawn each time: 4,8,20")
    parser.add_argument("--rate", required=True, type=float, help="requests a second")
    parser.add_argument("--p95", required=True, type=float, help="seconds in which 95 of 100 shall be finished")
    parser.add_argument("--requests", type=int, default=2000)
    args = parser.parse_args()
    steps, image = [int(part) for part in args.steps.split(",")], args.image / 1e3
    each = capacity(args.step, steps, image)
    sys.stdout.write(f"a replica makes {each:.3g} images/s at most\n\n| replicas | utilisation | p50 | p95 | p99 |\n")
    sys.stdout.write("|---|---|---|---|---|\n")
    requests = arrivals(args.requests, args.rate, steps)
    for replicas in range(math.floor(args.rate / each) + 1, MOST_REPLICAS):
        p50, p95, p99 = np.percentile(latencies(requests, args.step, replicas, image), [50, 95, 99])
        utilisation = args.rate / (replicas * each)
        sys.stdout.write(f"| {replicas} | {utilisation:.0%} | {p50:.3g} s | {p95:.3g} s | {p99:.3g} s |\n")
        if p95 <= args.p95:
            return
        if utilisation < 0.05:
            raise SystemExit("more replicas do not help: a request takes that long by itself")


if __name__ == "__main__":
    main()
