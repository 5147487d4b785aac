"""Mixed traffic against `ldmrt serve` of the built-in model, for a long time, with faults: is every picture right, and does anything leak?

    python benchmarks/soak.py [--seconds 600] [--faults] [--clients 8] [--device cpu] [--threads 1] [--no-record]

Clients ask without a pause, each for one thing at a time: pictures, streams with previews, edits with masks and without, of several steps, seeds, samplers and
guidance scales, from a catalogue whose pictures a `Pipeline` has made before. Every so often one goes in the midst of an answer, or asks for what
cannot be, while some hundred connections only take room. A picture is right if it is the pipeline's within 50 dB: batches of other sizes take sums in another order (docs/embedding.md), which moves
some pixels by one level, while another seed or step is below 40 dB. With --faults the engine's process is killed, or stopped as if it hung, during the first
half of the time; the slope of the processes' memory is that of the last two fifths. At the end every request must be accounted for.

The exit code is 1 if anything is wrong. Rows go to results/soak.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
from rich.console import Console
from rich.table import Table

from catalogue import BAD, GENERATIONS, Item, Pixels, catalogue, decibels, decoded
from ldmrt.bench.ledger import append, summary
from ldmrt.pipeline import Pipeline
from served import Served, account, conclude, resident

LEDGER = Path(__file__).resolve().parent / "results" / "soak.jsonl"
RIGHT_DECIBELS = 50.0
STEP_SECONDS = 5.0
MOST_FAULT_SECONDS = 15.0
WAITING = 64


@dataclass
class Tally:
    """What clients have seen."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    counts: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    decibels: float = float("inf")
    seconds: list[float] = field(default_factory=list)
    unavailable: list[float] = field(default_factory=list)  # when a 503 came

    def count(self, name: str, more: int = 1) -> None:
        """Something has happened."""
        with self.lock:
            self.counts[name] += more

    def blame(self, text: str) -> None:
        """Something is wrong."""
        with self.lock:
            self.wrong.append(text)

    def compare(self, item: Item, found: Sequence[Pixels]) -> None:
        """Pictures have come."""
        worst = min(decibels(one, other) for one, other in zip(found, item.wanted, strict=True))
        same = sum(np.array_equal(one, other) for one, other in zip(found, item.wanted, strict=True))
        with self.lock:
            self.counts.update(completed=1, images=len(found), same_bits=same)
            self.decibels = min(self.decibels, worst)
        if worst < RIGHT_DECIBELS:
            self.blame(f"{item.fields} came with {worst:.1f} dB")

    def failed(self, code: str, *, faults: bool) -> None:
        """An error has come where a picture should."""
        with self.lock:
            self.errors[code] += 1
            if code == "engine_unavailable":
                self.unavailable.append(time.monotonic())
        if not faults or code not in ("engine_unavailable", "request_quarantined"):
            self.blame(f"the error {code}")


@dataclass
class Client:
    """One of those who ask.

    Attributes:
        served: whom.
        items: for what.
        tally: where it is written down.
        faults: whether the engine is being killed, so that some errors are no surprise.
        drawn: what decides.
    """

    served: Served
    items: Sequence[Item]
    tally: Tally
    faults: bool
    drawn: random.Random

    def until(self, end: float) -> None:
        """Ask for one thing after the other."""
        while time.monotonic() < end:
            kind = self.drawn.choices((self._whole, self._stream, self._go, self._bad), (60, 20, 12, 8))[0]
            try:
                kind(self.drawn.choice(self.items))
            except Exception as error:  # noqa: BLE001 - whatever a client meets is to be told
                self.tally.blame(f"{kind.__name__}: {type(error).__name__}: {error}")

    def _whole(self, item: Item) -> None:
        self.tally.count("asked")
        began = time.perf_counter()
        answer = self.served.client.post(**item.asked())
        if answer.status_code == 200:
            self.tally.seconds.append(time.perf_counter() - began)
            self.tally.compare(item, [decoded(one["b64_json"]) for one in answer.json()["data"]])
        else:
            self._failed(answer.json())

    def _stream(self, item: Item) -> None:
        self.tally.count("asked")
        found: dict[int, Pixels] = {}
        with self.served.client.stream("POST", **item.asked(stream=True, partial_images=2)) as answer:
            if answer.status_code != 200:
                answer.read()
                self._failed(answer.json())
                return
            for line in answer.iter_lines():
                if not line.startswith("data: "):
                    continue
                data = json.loads(line.removeprefix("data: "))
                if data["type"] == "error":
                    self._failed(data)
                    return
                if data["type"].endswith(".completed"):
                    found[data["image_index"]] = decoded(data["b64_json"])
                else:
                    self.tally.count("previews")
        self.tally.compare(item, [found[index] for index in range(len(item.wanted))])

    def _failed(self, body: dict[str, Any]) -> None:
        self.tally.failed(body["error"]["code"], faults=self.faults)
        time.sleep(0.2)

    def _go(self, item: Item) -> None:
        """Ask, and go before the answer is there."""
        self.tally.count("gone")
        patience = httpx2.Timeout(60.0, read=self.drawn.uniform(0.05, 1.0))
        with httpx2.Client(base_url=self.served.url, timeout=patience) as client:
            try:
                with client.stream("POST", **item.asked(stream=self.drawn.random() < 0.5)) as answer:
                    for _ in answer.iter_raw():
                        if self.drawn.random() < 0.2:
                            return
            except httpx2.ReadTimeout:
                return

    def _bad(self, _item: Item) -> None:
        self.tally.count("bad")
        path, body, status = self.drawn.choice(BAD)
        try:
            answer = self.served.client.post(path, **body)
        except httpx2.TransportError:
            if status != 413:  # whose answer may be lost, where the server closes while the body is still being sent
                raise
            return
        allowed = {status, 503} if self.faults else {status}
        if answer.status_code not in allowed or "error" not in answer.json():
            self.tally.blame(f"{path} gave {answer.status_code}, expected {status}: {answer.text[:200]}")


@dataclass
class Faults:
    """What is done to the engine's process, and how long it takes to be forgotten.

    Attributes:
        served: whose.
        killed: when it was.
        stopped: when it was.
        recovered: seconds until the server was ready again.
    """

    served: Served
    killed: list[float] = field(default_factory=list)
    stopped: list[float] = field(default_factory=list)
    recovered: list[float] = field(default_factory=list)

    def until(self, end: float) -> None:
        """One after the other: four are killed, then one hangs."""
        drawn = random.Random(5)
        most = min(MOST_FAULT_SECONDS, (end - time.monotonic()) / 3)
        while time.monotonic() + most < end:
            time.sleep(drawn.uniform(0.2, 1.0) * most)
            if not self.served.ready() or (pid := self.served.engine_pid) is None:
                continue
            hangs = len(self.recovered) % 5 == 4
            began = time.monotonic()
            (self.stopped if hangs else self.killed).append(began)
            os.kill(pid, signal.SIGSTOP if hangs else signal.SIGKILL)
            while self.served.engine_pid == pid or not self.served.ready():
                time.sleep(0.02)
            self.recovered.append(time.monotonic() - began)

    def until_told(self, unavailable: Sequence[float]) -> float:
        """The longest from a kill to the last of the answers that it has cost, of those that come in the two seconds after it."""
        return max((at - kill for kill in self.killed for at in unavailable if 0 <= at - kill < 2.0), default=0.0)


@dataclass
class Idlers:
    """Connections on which nothing is said, or a request begins that never ends; who is turned out comes again.

    Attributes:
        served: whom they keep waiting.
        count: of them at any time.
        turned_out: how often the server has closed one.
    """

    served: Served
    count: int
    turned_out: int = 0

    def until(self, end: float) -> None:
        """Hold them open."""
        head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        said = (b"", head.encode(), f"{head}Content-Length: 100\r\n\r\n{{".encode())
        host, _, port = self.served.url.removeprefix("http://").rpartition(":")
        held: list[socket.socket] = []
        while time.monotonic() < end:
            for made in held[:]:
                try:
                    gone = not made.recv(65536)
                except BlockingIOError:
                    continue
                except OSError:
                    gone = True
                if gone:  # else it was told that it is too slow
                    made.close()
                    held.remove(made)
                    self.turned_out += 1
            while len(held) < self.count:
                made = socket.create_connection((host, int(port)))
                made.sendall(said[len(held) % len(said)])
                made.settimeout(0.0)
                held.append(made)
            time.sleep(1.0)
        for made in held:
            made.close()


@dataclass
class Memory:
    """What processes have in memory, every second."""

    served: Served
    samples: list[tuple[float, int, int]] = field(default_factory=list)

    def until(self, end: float) -> None:
        """Look."""
        while time.monotonic() < end:
            pid = self.served.engine_pid
            self.samples.append((time.monotonic(), resident(self.served.pid), 0 if pid is None else resident(pid)))
            time.sleep(1.0)

    def figures(self, since: float, requests: int) -> dict[str, float]:
        """Of the server and the engine: where they are at the end, in MiB, and how much they gain with every hundred requests."""
        late = np.array([sample for sample in self.samples if sample[0] >= since], dtype=np.float64)
        found = {}
        for name, column in (("server", 1), ("engine", 2)):
            mib = late[:, column] / 2**20
            slope = float(np.polyfit(late[:, 0] - since, mib, 1)[0])
            gained = slope * (late[-1, 0] - late[0, 0])
            found[f"{name}_mib"] = round(float(mib[-1]), 1)
            found[f"{name}_mib_per_100_requests"] = round(100 * gained / max(1, requests), 3)
        return found


def together(*work: Callable[[], object]) -> None:
    """Each on a thread of its own, to the end."""
    threads = [threading.Thread(target=one) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def soak(served: Served, items: Sequence[Item], args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    """Let it run; the figures, and what is wrong."""
    tally, faults, memory, idlers = Tally(), Faults(served), Memory(served), Idlers(served, args.idle)
    before = served.metrics()
    began = time.monotonic()
    half, end = began + args.seconds / 2, began + args.seconds
    calm = began + 0.6 * args.seconds  # the engine that was started last has come to rest
    clients = [Client(served, items, tally, args.faults, random.Random(number)) for number in range(args.clients)]
    middle: list[float] = []

    def in_the_calm() -> None:
        time.sleep(calm - began)
        middle.append(served.metrics()["ldmrt_requests_received_total"])

    together(
        *[lambda client=client: client.until(end) for client in clients],
        lambda: memory.until(end),
        lambda: idlers.until(end),
        in_the_calm,
        *([lambda: faults.until(half)] if args.faults else []),
    )
    deadline = time.monotonic() + 30.0
    while (after := served.metrics())["ldmrt_requests_present"] and time.monotonic() < deadline:
        time.sleep(0.1)
    ends = account(before, after)
    if ends["received"] != ends["served"] + ends["failed"] + ends["rejected"] + ends["cancelled"] or ends["present"]:
        tally.blame(f"the account is not even: {ends}")
    if not tally.counts["completed"] <= ends["served"] <= tally.counts["completed"] + tally.counts["gone"]:
        tally.blame(f"{ends['served']} served, and clients have {tally.counts['completed']}")
    # Alone, after all that: nobody's withdrawal and no loss has left anything behind.
    for item in items:
        answer = served.client.post(**item.asked()).json()
        if "error" in answer:
            tally.failed(answer["error"]["code"], faults=args.faults)
        else:
            tally.compare(item, [decoded(one["b64_json"]) for one in answer["data"]])
    pid = served.engine_pid
    code = served.stop()
    if code != 0 or pid is None or Path(f"/proc/{pid}").exists():
        tally.blame(f"the server ended with {code}, and its engine is {'still there' if pid else 'not there'}")
    figures: dict[str, Any] = {
        "seconds": args.seconds,
        "clients": args.clients,
        "requests": ends,
        **{name: tally.counts[name] for name in ("completed", "images", "same_bits", "previews", "gone", "bad")},
        "idle_connections": args.idle,
        "turned_out": idlers.turned_out,
        "wrong": len(tally.wrong),
        "least_decibels": round(tally.decibels, 1),
        "errors": dict(tally.errors),
        "latency_seconds": summary(tally.seconds),
        "memory": memory.figures(calm, int(after["ldmrt_requests_received_total"] - middle[0])),
    }
    if args.faults:
        figures["faults"] = {
            "killed": len(faults.killed),
            "stopped": len(faults.stopped),
            "most_seconds_until_503": round(faults.until_told(tally.unavailable), 3),
            "seconds_until_ready": {
                "p50": round(statistics.median(faults.recovered), 2) if faults.recovered else None,
                "most": round(max(faults.recovered, default=0.0), 2),
            },
        }
    return figures, tally.wrong


# ---------------------------------------------------------------------------------------------------- the command


def table(figures: dict[str, Any]) -> Table:
    """Figures, a row each."""
    found = Table(show_header=False)
    for name, value in figures.items():
        found.add_row(name.replace("_", " "), json.dumps(value))
    return found


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--faults", action="store_true")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--idle", type=int, default=300, help="connections that only take room")
    parser.add_argument("--items", type=int, default=16, help="of the catalogue")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the engine; clients need processors too")
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    options = ["--device", args.device, "--max-waiting", str(WAITING), "--step-timeout", str(STEP_SECONDS)]
    items = catalogue(Pipeline.from_bundle(device=args.device), args.items)
    with Served(*options, threads=args.threads) as served:
        figures, wrong = soak(served, items, args)
    name = "soak with faults" if args.faults else "soak"
    Console(width=160).print(name, table(figures))
    if not args.no_record:
        append(LEDGER, name, {**figures, "device": args.device, "threads": args.threads})
    conclude(wrong)


if __name__ == "__main__":
    main()
