"""Hostile input for as long as is asked for: requests to a server, or files.

    python benchmarks/fuzz.py http [--requests 100000] [--seed 0] [--no-record]
    python benchmarks/fuzz.py artefacts [--seconds 600] [--seed 0] [--kinds graph,kernel] [--no-record]

`http` asks servers of the built-in model in a process of their own, behind which a stand-in makes grey pictures, with half a dozen connections at a time:
fields of every value, forms, pictures, heads and bodies that are none, and bytes that were damaged on their way (fuzz_http.py). Then the server must be as it was: ready, nobody
in it, with as many open files and threads, and its memory must not have grown by more than `--growth` MiB.

`artefacts` opens damaged bundles, graphs, weights, tokenizers, LoRAs and models, each in a process of its own with limits and under watch (fuzz_artefacts.py).

Each finding is printed with the number that makes it again. The rows go to results/fuzz.jsonl; the exit code is 1 if anything was found.
"""

from __future__ import annotations

import argparse
import collections
import itertools
import multiprocessing
import re
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

import torch

import fuzz_http
from ldmrt.bench.ledger import append
from ldmrt.pipeline import Pipeline

LEDGER = Path(__file__).resolve().parent / "results" / "fuzz.jsonl"
_CLIENTS = 6


def serve(told: Connection) -> None:
    """The process of the servers: tells their ports, and ends when it is told to."""
    torch.set_num_threads(1)
    with fuzz_http.listening(*fuzz_http.apps(Pipeline.from_bundle(device="cpu"))) as ports:
        told.send(ports)
        told.recv()


def holds(process: int) -> dict[str, int]:
    """What a process holds: bytes of memory, open files, threads."""
    folder = Path(f"/proc/{process}")
    status = dict(line.split(":", 1) for line in (folder / "status").read_text(encoding="ascii").splitlines())
    return {
        "rss_bytes": int(status["VmRSS"].split()[0]) << 10,
        "files": len(list((folder / "fd").iterdir())),
        "threads": int(status["Threads"]),
    }


def http(requests: int, seed: int, growth: int, *, record: bool) -> int:
    """Ask the servers; how many findings there were."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=serve, args=(theirs,))
    process.start()
    assert process.pid is not None
    ports: list[int] = ours.recv()
    statuses: collections.Counter[str] = collections.Counter()
    findings: list[str] = []

    def ask(number: int) -> None:
        closed = number % 5 == 0
        sent = fuzz_http.request(number)
        try:
            answers = fuzz_http.exchange(ports[closed], sent)
        except (OSError, ValueError) as error:
            findings.append(f"{number}: {type(error).__name__}: {error}")
            return
        statuses.update(str(answer.status) for answer in answers) if answers else statuses.update(["none"])
        for answer in answers:
            wrong = fuzz_http.complaint(sent, answer, closed=closed)
            if wrong is not None:
                findings.append(f"{number}: {wrong}: {sent[:200]!r} -> {answer.headers[:80]!r} {answer.body[:200]!r}")

    warm_up = min(requests // 10, 5000)
    with ThreadPoolExecutor(_CLIENTS) as clients:
        for _ in clients.map(ask, range(seed, seed + warm_up)):
            pass
        before, began = holds(process.pid), time.perf_counter()
        for _ in clients.map(ask, range(seed + warm_up, seed + requests)):
            pass
    seconds = time.perf_counter() - began
    time.sleep(1.5)  # in which the last bodies are given up
    after = holds(process.pid)
    rest = fuzz_http.exchange(
        ports[0], b"GET /metrics HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", idle=10
    )
    text = rest[0].body.decode() if rest else ""
    if "ldmrt_engine_ready 1.0" not in text or fuzz_http.CANARY in text:
        findings.append(f"metrics: {text[:200]!r}")
    if (
        after["rss_bytes"] - before["rss_bytes"] > growth << 20
        or after["files"] > before["files"]
        or after["threads"] > before["threads"] + 8  # pools grow to four each
    ):
        findings.append(f"it holds {after}, before {before}")
    ours.send(None)
    process.join(60)
    if process.exitcode != 0:
        findings.append(f"the server ended with {process.exitcode}")
    figures = {
        "requests": requests,
        "seed": seed,
        "seconds": round(seconds, 1),
        "requests_per_second": round((requests - warm_up) / seconds, 1),
        "answers": dict(sorted(statuses.items())),
        "findings": len(findings),
        "before": before,
        "after": after,
    }
    _tell("http", figures, findings, record=record)
    return len(findings)


def artefacts(seconds: float, seed: int, kinds: list[str] | None, *, record: bool) -> int:
    """Open damaged files; how many findings there were."""
    torch.set_num_threads(1)  # a process that is forked has but one
    import fuzz_artefacts

    chosen = kinds or list(fuzz_artefacts.KINDS)
    fuzz_artefacts.prepare(chosen)
    ends, findings = fuzz_artefacts.run(chosen, itertools.count(seed), deadline(seconds))
    cases = sum(sum(one.values()) for one in ends.values()) + len(findings)
    figures = {"cases": cases, "seed": seed, "seconds": seconds, "of": ends, "findings": len(findings)}
    _tell("artefacts", figures, [f"{one.kind} {one.seed}: {one.what}" for one in findings], record=record)
    return len(findings)


def deadline(seconds: float) -> Callable[[], bool]:
    """Whether so many seconds have passed since now."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def _tell(name: str, figures: dict[str, object], findings: list[str], *, record: bool) -> None:
    alike: collections.Counter[str] = collections.Counter()
    for finding in findings:
        kind = re.sub(r"\d+|'.*", "", finding)[:100]
        alike[kind] += 1
        if alike[kind] <= 3:
            print(finding[:600])
    print(figures)
    if record:
        append(LEDGER, name, figures)


def main() -> int:
    """Run one of the two."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("http", "artefacts"))
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--growth", type=int, default=32, help="MiB")
    parser.add_argument("--kinds", type=lambda text: text.split(","))
    parser.add_argument("--no-record", dest="record", action="store_false")
    given = parser.parse_args()
    if given.what == "http":
        return int(http(given.requests, given.seed, given.growth, record=given.record) > 0)
    return int(artefacts(given.seconds, given.seed, given.kinds, record=given.record) > 0)


if __name__ == "__main__":
    sys.exit(main())
