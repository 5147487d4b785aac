"""Serving under load: the batcher against one request at a time and against static batching, on the built-in shapes model.

    python benchmarks/serving.py [--requests 200] [--load 0.8] [--of batcher] [--http] [--device cpu] [--threads 1]

Open loop: requests of 4 to 50 steps arrive as a Poisson process, whether the others are finished or not, the same ones at the same times for
each way to serve them. First each way's capacity is measured, all requests being there at once; the rate is a share of one of them. A latency counts from the
planned arrival to the picture. Every request wants one preview on its way. Static batching takes up to as many requests as its batch holds, in the order of their
arrival, and gives all of them back when the last has made its steps; one at a time is the same with a batch of one. With --http the batcher is compared with
`ldmrt serve`, asked over HTTP for streams by threads of this process: what the server itself costs.

The rows go to results/serving.jsonl.
"""

from __future__ import annotations

import argparse
import queue
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, Self

import torch

from ldmrt.bench.ledger import append, summary
from ldmrt.delivery import delivered
from ldmrt.pipeline import Pipeline
from ldmrt.request import Request
from ldmrt.samplers.estimate import estimate
from ldmrt.serving import Batcher, Progress, Stats
from served import Served, cpu_seconds

LEDGER = Path(__file__).resolve().parent / "results" / "serving.jsonl"
STEPS = (4, 8, 20, 30, 50)
PROMPTS = (
    "a red circle on a white background",
    "a blue square",
    "a green star left of a yellow circle",
    "a purple triangle on a black background",
)


@dataclass
class Visit:
    """A request, and when what happened to it; seconds of the clock.

    Attributes:
        request: what is asked.
        arrival: when it is planned to arrive, from the beginning.
        preview: when its preview was there.
        done: when its picture was there.
    """

    request: Request
    arrival: float
    preview: float = 0.0
    done: float = 0.0
    over: threading.Event = field(default_factory=threading.Event)

    def finish(self) -> None:
        """The picture is there."""
        self.done = time.perf_counter()
        self.over.set()


class Server(Protocol):
    """A way to serve requests."""

    def __enter__(self) -> Self: ...
    def __exit__(self, *error: object) -> None: ...
    def submit(self, visit: Visit) -> None:
        """Take a request; `visit.finish` is called when its picture is there."""


class StepLevel:
    """The batcher."""

    def __init__(self, pipe: Pipeline) -> None:
        self._batcher = Batcher(pipe, max_waiting=100_000)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._batcher.close()

    def submit(self, visit: Visit) -> None:
        def progress(found: Progress) -> None:
            if found.preview is not None:
                visit.preview = time.perf_counter()

        handle = self._batcher.submit(visit.request, on_progress=progress, previews=1)
        handle.future.add_done_callback(lambda future: visit.finish())

    def stats(self) -> Stats:
        """The batcher's own account."""
        return self._batcher.stats()


class OverHttp:
    """`ldmrt serve`, asked by a thread for each request.

    Args:
        device: of its engine, like the next.
        threads: see there.
    """

    def __init__(self, device: str, threads: int) -> None:
        self._options = ("--device", device, "--max-waiting", "10000"), threads

    def __enter__(self) -> Self:
        options, threads = self._options
        self._served = Served(*options, threads=threads)
        self._pool = ThreadPoolExecutor(256)
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown()
        self._served.__exit__(*error)

    def submit(self, visit: Visit) -> None:
        self._pool.submit(self._ask, visit)

    def _ask(self, visit: Visit) -> None:
        request = visit.request
        body = {
            "prompt": request.prompt,
            "steps": request.num_inference_steps,
            "seed": request.seed,
            "sampler": request.sampler,
            "stream": True,
            "partial_images": 1,
        }
        with self._served.client.stream("POST", "/v1/images/generations", json=body) as answer:
            for line in answer.iter_lines():
                if line == "event: image_generation.partial_image":
                    visit.preview = time.perf_counter()
                elif line == "event: error":
                    raise RuntimeError(line)
        visit.finish()

    def cpu_seconds(self) -> float:
        """Processor time of the process that speaks with clients."""
        return cpu_seconds(self._served.pid)


class Static:
    """Batches that are filled when they start, and end together.

    Args:
        pipe: what makes the pictures.
        images: the most of a batch.
    """

    def __init__(self, pipe: Pipeline, images: int) -> None:
        self._pipe, self._images = pipe, images
        self._waiting: queue.Queue[Visit | None] = queue.Queue()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._waiting.put(None)
        self._thread.join()

    def submit(self, visit: Visit) -> None:
        self._waiting.put(visit)

    def _run(self) -> None:
        with self._pipe.lend(), torch.inference_mode():
            while (first := self._waiting.get()) is not None:
                visits = [first]
                while len(visits) < self._images and not self._waiting.empty():
                    another = self._waiting.get()
                    if another is None:
                        self._waiting.put(None)
                        break
                    visits.append(another)
                self._serve(visits)

    def _serve(self, visits: list[Visit]) -> None:
        pipe = self._pipe
        jobs, materials = zip(*(pipe.resolve(visit.request) for visit in visits), strict=True)
        tables = [pipe.table(job) for job in jobs]
        texts = pipe.embed([(job, pipe.tokenize(job)[0]) for job in jobs], together=True)
        size = jobs[0].width, jobs[0].height
        most = max(table.evaluations for table in tables)
        tokens = len(texts[0][0].states)
        denoiser = pipe.denoiser(size, 2 * len(visits), tokens=tokens, evaluations=most)
        for slot, (job, table, text, material) in enumerate(zip(jobs, tables, texts, materials, strict=True)):
            pipe.admit(denoiser, slot, job, table, text, material)
        for made in range(1, most + 1):
            denoiser.step()
            for slot, (visit, table) in enumerate(zip(visits, tables, strict=True)):
                if made == round(table.evaluations / 2):
                    latents = denoiser.combined(slot, *estimate(table, pipe.schedule, made))
                    delivered(pipe.decode(latents[None], size), "pil")
                    visit.preview = time.perf_counter()
        pictures = pipe.decode(torch.stack([denoiser.latents(slot) for slot in range(len(visits))]), size)
        delivered(pictures, "pil")
        for slot, visit in enumerate(visits):
            denoiser.release(slot)
            visit.finish()


def visits(count: int, rate: float | None) -> list[Visit]:
    """The same requests every time; all at once without a rate (requests a second)."""
    drawn = random.Random(7)
    at, made = 0.0, []
    for number in range(count):
        at += drawn.expovariate(rate) if rate else 0.0
        request = Request(
            prompt=drawn.choice(PROMPTS), num_inference_steps=drawn.choice(STEPS), seed=number, sampler="ddim"
        )
        made.append(Visit(request, at))
    return made


def serve(server: Server, planned: list[Visit]) -> float:
    """Let requests arrive as planned; the seconds until all are served."""
    start = time.perf_counter()
    for visit in planned:
        time.sleep(max(0.0, start + visit.arrival - time.perf_counter()))
        server.submit(visit)
    for visit in planned:
        visit.over.wait()
    for visit in planned:  # from now on from its arrival
        visit.preview -= start + visit.arrival
        visit.done -= start + visit.arrival
    return time.perf_counter() - start


def figures(planned: list[Visit], seconds: float) -> dict[str, Any]:
    """What clients saw."""
    short = [visit.done for visit in planned if visit.request.num_inference_steps == STEPS[0]]
    long = [visit.done for visit in planned if visit.request.num_inference_steps == STEPS[-1]]
    latencies = [visit.done for visit in planned]
    p95 = statistics.quantiles(latencies, n=20)[-1]
    return {
        "requests": len(planned),
        "images_per_second": round(len(planned) / seconds, 3),
        "latency_seconds": {**summary(latencies), "p95": float(f"{p95:.4g}")},
        "preview_seconds": summary([visit.preview for visit in planned]),
        "latency_seconds_of_shortest": summary(short),
        "latency_seconds_of_longest": summary(long),
    }


def own_cost(before: Stats, after: Stats) -> dict[str, float]:
    """What the batcher itself takes, callbacks and pictures made of pixels included."""
    steps = after.steps - before.steps
    own, model = after.own_seconds - before.own_seconds, after.model_seconds - before.model_seconds
    return {
        "steps": steps,
        "images_per_step": round((after.evaluations - before.evaluations) / steps, 2),
        "own_milliseconds_per_step": round(1e3 * own / steps, 4),
        "own_share_of_model": round(own / model, 5),
    }


def main() -> None:
    """Measure capacities, then latencies, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--burst", type=int, default=40, help="requests that a capacity is measured with")
    parser.add_argument("--load", type=float, default=0.8, help="the rate, as a share of a capacity")
    parser.add_argument("--of", choices=("batcher", "static batching", "one at a time"), default="batcher")
    parser.add_argument("--http", action="store_true", help="the batcher and `ldmrt serve`, and no others")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--threads", type=int, default=None, help="of the engines; on a shared machine several wait long for each other"
    )
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    if args.http and args.of != "batcher":
        parser.error("--http compares with the batcher alone: leave --of out")
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    pipe = Pipeline.from_bundle(device=args.device)
    most = pipe.images_at_a_time(pipe.defaults.width, pipe.defaults.height, guidance=True)
    ways: dict[str, Callable[[], Server]] = {"batcher": lambda: StepLevel(pipe)}
    if args.http:
        ways["over HTTP"] = lambda: OverHttp(args.device, args.threads or 0)
    else:
        ways |= {"static batching": lambda: Static(pipe, most), "one at a time": lambda: Static(pipe, 1)}
    capacities = {}
    for name, make in ways.items():
        with make() as server:
            serve(server, visits(2 * most, None))  # engines are loaded, weights packed, steps captured
            capacities[name] = args.burst / serve(server, visits(args.burst, None))
        sys.stdout.write(f"{name}: {capacities[name]:.3f} images/s when all are there at once\n")
    rate = args.load * capacities[args.of]
    for name, make in ways.items():
        planned = visits(args.requests, rate)
        with make() as server:
            before = server.stats() if isinstance(server, StepLevel) else None
            cpu = server.cpu_seconds() if isinstance(server, OverHttp) else 0.0
            found = figures(planned, serve(server, planned))
            if isinstance(server, StepLevel) and before is not None:
                found |= own_cost(before, server.stats())
            if isinstance(server, OverHttp):
                spent = (server.cpu_seconds() - cpu) / len(planned)
                found["server_cpu_milliseconds_per_request"] = round(1e3 * spent, 2)
        found |= {
            "rate": round(rate, 3),
            "load": args.load,
            "of": args.of,
            "capacities": {way: round(capacity, 3) for way, capacity in capacities.items()},
            "steps_asked": STEPS,
            "batch": most,
            "device": str(pipe.device),
            "dtype": pipe.dtype,
            "threads": torch.get_num_threads(),
        }
        if not args.no_record:
            append(LEDGER, f"{'serving over HTTP' if args.http else 'serving'}: {name}", found)
        sys.stdout.write(f"{name}: {found}\n")


if __name__ == "__main__":
    main()
