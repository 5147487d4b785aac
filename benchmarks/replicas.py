"""Throughput against the number of replicas, as far as the cores of one machine show it, on the built-in shapes model.

    python benchmarks/replicas.py [--images 60] [--rounds 3] [--steps 20]

Closed loop: for each replica eight requests are under way at any time, until all pictures are there. `engines` are engine processes that this process
hands its requests to in turn; `ray serve` is the whole way, over HTTP, Serve's proxy and its replicas, with the clients' share of the same cores. Each is
measured with one replica and with two, of one thread each, and with one replica of two threads, in turn, so many rounds; every round begins with pictures
that are not counted.

The rows go to results/replicas.jsonl.
"""

from __future__ import annotations

import argparse
import http.client
import itertools
import json
import os
import queue
import shutil
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from ldmrt.bench.ledger import append
from ldmrt.request import Request
from ldmrt.serving import EngineProcess

LEDGER = Path(__file__).resolve().parent / "results" / "replicas.jsonl"
PROMPT = "a red circle on a white background"
UNDER_WAY = 8  # requests for each replica
SHAPES = ((1, 1), (2, 1), (1, 2))  # replicas, threads of each

Draw = Callable[[int], None]


@contextmanager
def engines(replicas: int, threads: int, steps: int) -> Iterator[Draw]:
    """Engine processes, each with its own queue here."""
    with ExitStack() as stack:
        made = [stack.enter_context(EngineProcess(device="cpu", threads=threads)) for _ in range(replicas)]

        def draw(number: int) -> None:
            request = Request(prompt=PROMPT, seed=number, num_inference_steps=steps)
            made[number % replicas].submit(request).result()

        yield draw


@contextmanager
def ray_serve(replicas: int, threads: int, steps: int) -> Iterator[Draw]:
    """The application for Ray Serve on one node; what Ray writes is removed."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0"}
    import ray
    from ray import serve

    from ldmrt.serving.ray_app import Arguments, deployment

    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    own = threading.local()
    port = free_port()

    def draw(number: int) -> None:
        if not hasattr(own, "connection"):
            own.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        body = json.dumps({"prompt": PROMPT, "seed": number, "steps": steps})
        own.connection.request("POST", "/v1/images/generations", body, {"content-type": "application/json"})
        answer = own.connection.getresponse()
        assert answer.status == 200, answer.read()
        answer.read()

    ray.init(
        num_cpus=replicas * threads,
        include_dashboard=False,
        log_to_driver=False,
        _node_ip_address="127.0.0.2",  # of this machine alone; for 127.0.0.1 Ray takes an address that others reach
        _temp_dir=folder,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        given = Arguments()
        options = {"num_replicas": replicas, "ray_actor_options": {"num_cpus": threads}}
        serve.run(deployment(given).options(**options).bind(given))
        yield draw
        serve.shutdown()
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def free_port() -> int:
    """One that nobody listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def images_per_second(draw: Draw, images: int, under_way: int) -> float:
    """Of so many images, as many at a time."""
    left: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(images):
        left.put(number)

    def client() -> None:
        while True:
            try:
                number = left.get_nowait()
            except queue.Empty:
                return
            draw(number)

    threads = [threading.Thread(target=client) for _ in range(under_way)]
    began = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return images / (time.perf_counter() - began)


def main() -> None:
    """Measure and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    ways = {"engines": engines, "ray serve": ray_serve}
    rates: dict[tuple[str, int, int], list[float]] = {
        (way, *shape): [] for way, shape in itertools.product(ways, SHAPES)
    }
    for _ in range(args.rounds):
        for (way, replicas, threads), found in rates.items():
            with ways[way](replicas, threads, args.steps) as draw:
                images_per_second(draw, UNDER_WAY * replicas, UNDER_WAY * replicas)
                found.append(images_per_second(draw, args.images, UNDER_WAY * replicas))
            sys.stdout.write(f"{way}, {replicas} of {threads} threads: {found[-1]:.3f} images/s\n")
    for (way, replicas, threads), found in rates.items():
        figures = {
            "replicas": replicas,
            "threads": threads,
            "images_per_second": round(statistics.median(found), 3),
            "rounds": [round(rate, 3) for rate in found],
            "times_one": round(statistics.median(found) / statistics.median(rates[way, 1, 1]), 3),
            "images": args.images,
            "steps": args.steps,
            "under_way": UNDER_WAY * replicas,
        }
        if not args.no_record:
            append(LEDGER, f"replicas: {way}", figures)
        sys.stdout.write(f"{way}: {figures}\n")


if __name__ == "__main__":
    main()
