"""More requests than `ldmrt serve` can serve: whether it goes on serving what it can, and refuses the rest at once.

    python benchmarks/overload.py [--factors 2,5,10] [--seconds 40]

The same request again and again, in a Poisson process, at so many times the rate that can be served, whether others are finished or not. What can be
served is measured before and after, with 32 requests under way at any time. The exit code is 1 if anything is wrong. Rows go to results/soak.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx2

from catalogue import GENERATIONS, PROMPTS
from ldmrt.bench.ledger import append, summary
from served import Served, account, conclude, cpu_seconds, resident

LEDGER = Path(__file__).resolve().parent / "results" / "soak.jsonl"
WAITING = 64
# All alike, so that a rate means one thing; long enough that clients, on the same machine, take little of it.
LOAD = {"prompt": PROMPTS[0], "steps": 20, "guidance_scale": 5.0, "sampler": "ddim"}


async def burst(
    client: httpx2.AsyncClient, rate: float | None, seconds: float, seen: list[tuple[int, float, bool]]
) -> None:
    """Requests as a Poisson process, or 32 of them under way at any time; the status, seconds and Retry-After of each answer."""
    drawn, tasks = random.Random(7), set[asyncio.Task[None]]()

    async def ask() -> None:
        began = time.perf_counter()
        answer = await client.post(GENERATIONS, json=LOAD)
        seen.append((answer.status_code, time.perf_counter() - began, "retry-after" in answer.headers))

    began = time.monotonic()
    due = 0.0
    while due < seconds:
        if rate is None:
            while len(tasks) >= 32:
                await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            due = time.monotonic() - began
        else:
            due += drawn.expovariate(rate)
            await asyncio.sleep(began + due - time.monotonic())
        task = asyncio.create_task(ask())
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def overload(served: Served, args: argparse.Namespace) -> tuple[list[dict[str, Any]], list[str]]:
    """Goodput at each factor, beside what can be served; the rows, and what is wrong."""
    rows: list[dict[str, Any]] = []
    wrong: list[str] = []

    async def run(rate: float | None) -> dict[str, Any]:
        seen: list[tuple[int, float, bool]] = []
        waiting: list[float] = []
        limits = httpx2.Limits(max_connections=None)
        async with httpx2.AsyncClient(base_url=served.url, timeout=300.0, limits=limits) as client:
            load = asyncio.create_task(burst(client, rate, 10.0 + args.seconds, seen))
            await asyncio.sleep(10.0)  # until as many wait as may
            first, before, began = len(seen), await asyncio.to_thread(served.metrics), time.monotonic()
            memory, spent = resident(served.pid), spending(served)
            while not load.done() and time.monotonic() < began + args.seconds - 1.0:
                await asyncio.sleep(0.5)
                waiting.append((await asyncio.to_thread(served.metrics))["ldmrt_images_waiting"])
            after, ended = await asyncio.to_thread(served.metrics), time.monotonic()
            grown = resident(served.pid) - memory
            busy = {name: (now - spent[name]) / (ended - began) for name, now in spending(served).items()}
            answers = seen[first:]
            await load
        rejected = [seconds for status, seconds, _ in answers if status == 429]
        ends = account(before, after)
        if others := Counter(status for status, _, _ in seen if status not in (200, 429)):
            wrong.append(f"answers that are neither: {dict(others)}")
        if not all(told for status, _, told in seen if status == 429):
            wrong.append("a 429 without Retry-After")
        if max(waiting) > WAITING:
            wrong.append(f"{max(waiting)} images wait, expected at most {WAITING}")
        return {
            "images_per_second": round(ends["served"] / (ended - began), 3),
            "asked_per_second": round(ends["received"] / (ended - began), 2),
            "rejected": len(rejected),
            **({"seconds_until_rejected": summary(rejected)} if rejected else {}),
            "most_waiting": int(max(waiting)),
            "server_mib_gained": round(grown / 2**20, 2),
            "cores": {name: round(share, 3) for name, share in busy.items()},
        }

    # A shared machine changes its speed within minutes: what can be served is measured before and after each load.
    peaks = [asyncio.run(run(None))]
    for factor in args.factors:
        settle(served)
        found = asyncio.run(run(factor * peaks[-1]["images_per_second"]))
        settle(served)
        peaks.append(asyncio.run(run(None)))
        around = [peak["images_per_second"] for peak in peaks[-2:]]
        share = round(found["images_per_second"] / statistics.mean(around), 3)
        rows.append({"factor": factor, "seconds": args.seconds, "peaks": around, "goodput": share, **found})
    settle(served)
    ends = account(dict.fromkeys(after := served.metrics(), 0.0), after)
    if ends["received"] != ends["served"] + ends["failed"] + ends["rejected"] + ends["cancelled"]:
        wrong.append(f"the account is not even: {ends}")
    if served.stop() != 0:
        wrong.append("the server did not end well")
    return rows, wrong


def spending(served: Served) -> dict[str, float]:
    """Seconds of processor time that each side has taken so far."""
    engine = served.engine_pid
    return {
        "server": cpu_seconds(served.pid),
        "engine": 0.0 if engine is None else cpu_seconds(engine),
        "clients": time.process_time(),
    }


def settle(served: Served) -> None:
    """Until nobody is there."""
    while served.metrics()["ldmrt_requests_present"]:
        time.sleep(0.1)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--factors", type=lambda text: [float(part) for part in text.split(",")], default=[2.0, 5.0, 10.0]
    )
    parser.add_argument("--seconds", type=float, default=40.0, help="of each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="of the engine; clients need processors too")
    parser.add_argument("--no-record", action="store_true", help="print only")
    args = parser.parse_args()
    options = ["--device", args.device, "--max-waiting", str(WAITING)]
    with Served(*options, threads=args.threads) as served:
        rows, wrong = overload(served, args)
    for row in rows:
        name = f"overload: {row['factor']:g} times"
        sys.stdout.write(f"{name}: {json.dumps(row)}\n")
        if not args.no_record:
            append(LEDGER, name, {**row, "device": args.device, "threads": args.threads})
    conclude(wrong)


if __name__ == "__main__":
    main()
