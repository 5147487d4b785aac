"""Faults, as clients see them: the server over an engine's process that is killed, hangs, does not start, or is asked for too much.

The process is `tests/serving/stand_in.py`, which starts at once; the real one has the same done to it in tests/serving/test_process.py,
test_server.py and benchmarks/soak.py.
"""

from __future__ import annotations

import base64
import io
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from PIL import Image

from ldmrt.serving import EngineProcess, life, process
from ldmrt.serving.engine import State
from ldmrt.serving.http import Limits
from tests.serving.stand_in import IMAGES, SIZE, colour

from .conftest import PATIENCE, Served, listening, refused

STEP_SECONDS = 0.6
IN_FLIGHT = 2 * IMAGES
LONG = 900


class Site:
    """A server, its engine, and what clients have asked of it."""

    def __init__(self, served: Served, engine: EngineProcess, folder: Path) -> None:
        self.served, self.engine, self.folder = served, engine, folder
        self.asked: list[int] = []  # seeds: threads append to it
        self._pool = ThreadPoolExecutor(40)

    def ask(self, seed: int = 0, steps: int = 2, **fields: Any) -> httpx2.Response:
        self.asked.append(seed)
        body = {"prompt": "a", "seed": seed, "steps": steps, "guidance_scale": 1, **fields}
        return self.served.client.post("/v1/images/generations", json=body)

    def later(self, *args: Any, **fields: Any) -> Future[tuple[httpx2.Response, float]]:
        """An answer, and when it came."""
        return self._pool.submit(lambda: (self.ask(*args, **fields), time.monotonic()))

    def kill(self) -> float:
        """The engine's process; when."""
        assert self.engine.pid is not None
        os.kill(self.engine.pid, signal.SIGKILL)
        return time.monotonic()

    def mood(self, word: str) -> None:
        (self.folder / "mood").write_text(word, encoding="utf-8")

    def health(self) -> tuple[int, int, str]:
        live, ready = (self.served.client.get(f"/health/{name}") for name in ("live", "ready"))
        return live.status_code, ready.status_code, ready.json()["status"]

    def until(self, condition: Callable[[], bool]) -> None:
        self.served.until(condition)

    def settled(self) -> None:
        """Nothing is left of anything, and everything is accounted for, here and in the metrics."""
        self._pool.shutdown()
        self.until(lambda: self.engine.stats().present == 0)
        stats = self.engine.stats()
        assert stats.received == stats.served + stats.failed + stats.rejected + stats.cancelled
        assert (stats.waiting, stats.running) == (0, 0)
        text = self.served.client.get("/metrics").text
        told = {line.split()[0]: float(line.split()[1]) for line in text.splitlines() if line[0] != "#"}
        ends = [told[f'ldmrt_requests_total{{end="{end}"}}'] for end in ("served", "failed", "rejected", "cancelled")]
        assert told["ldmrt_requests_received_total"] == sum(ends) == len(self.asked)
        assert told["ldmrt_requests_present"] == 0


@pytest.fixture
def site(standing_in: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setattr(process, "_FIRST_PAUSE", 0.05)
    monkeypatch.setattr(process, "_LONGEST_PAUSE", 0.2)
    with (
        EngineProcess(max_waiting=24, step_seconds=STEP_SECONDS) as engine,
        listening(engine, limits=Limits(steps=LONG)) as served,
    ):
        one = Site(served, engine, standing_in)
        try:
            yield one
        finally:
            one.mood("")
        one.settled()


def right(answer: httpx2.Response, seed: int, steps: int) -> bool:
    (one,) = answer.json()["data"]
    image = Image.open(io.BytesIO(base64.b64decode(one["b64_json"])))
    return image.tobytes() == colour(seed, steps) * (SIZE[0] * SIZE[1])


# ---------------------------------------------------------------------------------------------------- lost


def test_killed_in_the_midst_of_steps_twenty_times(site: Site) -> None:
    for turn in range(20):
        running = [site.later(turn, LONG) for _ in range(IN_FLIGHT)]
        site.until(lambda: site.engine.stats().running == IN_FLIGHT)
        waiting = [site.later(turn + number, 3) for number in range(4)]
        site.until(lambda: site.engine.stats().waiting == 4)
        killed = site.kill()
        for future in running:
            answer, at = future.result(PATIENCE)
            assert refused(answer, 503)["code"] == "engine_unavailable"
            assert int(answer.headers["retry-after"]) >= 1
            assert at - killed < 1.0
        for number, future in enumerate(waiting):
            assert right(future.result(PATIENCE)[0], turn + number, 3)
        assert site.health() == (200, 200, "ready")
        assert site.engine.restarts == turn + 1


def test_a_step_that_hangs_is_cut_off(site: Site) -> None:
    began = time.monotonic()
    hanging = site.later(prompt="hang")
    site.until(lambda: site.engine.stats().running == 1)
    waiting = site.later(5)
    answer, at = hanging.result(PATIENCE)
    assert refused(answer, 503)["code"] == "engine_unavailable"
    assert STEP_SECONDS < at - began < STEP_SECONDS + 2.0
    # It had the other as well, in the same batch: who asks again is served.
    assert waiting.result(PATIENCE)[0].status_code == 503
    assert right(site.ask(5), 5, 2)


def test_what_takes_the_engine_down_twice_is_not_tried_a_third_time(site: Site) -> None:
    for _ in range(2):
        assert site.ask(prompt="die").status_code == 503
    answer = site.ask(prompt="die")
    assert refused(answer, 500)["code"] == "request_quarantined"
    assert answer.headers["x-should-retry"] == "false"
    assert site.engine.restarts == 2
    assert right(site.ask(3), 3, 2)


def test_an_engine_that_cannot_start_again_is_told_and_tried_again(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[float] = []
    begin = life.Life.begin

    def noted(given: dict[str, Any], patience: float) -> life.Life:
        starts.append(time.monotonic())
        return begin(given, patience)

    monkeypatch.setattr(life.Life, "begin", noted)
    assert site.health() == (200, 200, "ready")
    site.mood("die")
    running = site.later(1, LONG)
    site.until(lambda: site.engine.stats().running == 1)
    site.kill()
    waiting = site.later(2)
    assert running.result(PATIENCE)[0].status_code == 503
    site.until(lambda: site.engine.state is State.DOWN)
    assert site.health() == (200, 503, "down")
    began = time.monotonic()
    assert refused(site.ask(), 503)["code"] == "engine_unavailable"
    assert time.monotonic() - began < 1.0
    site.mood("refuse")  # it says why it does not start
    site.until(lambda: len(starts) >= 6)
    assert site.health() == (200, 503, "down")
    # At once after the loss and after the first that was in vain, then with pauses: 0.05, 0.1, 0.2 and never more.
    pauses = [after - before for before, after in itertools.pairwise(starts)]
    for pause, least in zip(pauses, (0.0, 0.05, 0.1, 0.2, 0.2), strict=False):
        assert least <= pause < least + 1.0
    site.mood("")
    answer, _ = waiting.result(PATIENCE)
    assert right(answer, 2, 2)
    assert site.health() == (200, 200, "ready")


def test_one_that_is_ready_but_makes_nothing_is_no_better(site: Site) -> None:
    for number in range(3):  # each another, so that none is refused for its own sake
        assert site.ask(number, prompt="die").status_code == 503
    assert site.health()[1:] in {(503, "down"), (200, "ready")}  # it has been started again already
    assert site.engine._pause > 0
    site.until(lambda: site.engine.state is State.READY)
    assert right(site.ask(3), 3, 2)


def test_deadlines_hold_where_nothing_can_be_started(
    standing_in: Path, site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(site.served.house, "limits", Limits(steps=LONG, seconds=0.3))
    (standing_in / "mood").write_text("hang", encoding="utf-8")
    site.kill()
    site.until(lambda: site.engine.state is State.LOADING)
    assert refused(site.ask(), 504)["code"] == "deadline_exceeded"
    site.mood("")
    site.kill()
    site.until(lambda: site.engine.state is State.READY)


# ---------------------------------------------------------------------------------------------------- clients, clocks


def test_clients_that_go_leave_the_others_their_pictures(site: Site) -> None:
    drawn = random.Random(3)

    def go(number: int) -> None:
        body = {"prompt": "a", "seed": number, "steps": LONG, "stream": number % 2 == 0}
        with (
            suppress(httpx2.ReadTimeout),
            httpx2.Client(timeout=httpx2.Timeout(PATIENCE, read=drawn.uniform(0.1, 0.5))) as client,
        ):
            url = f"{site.served.url}/v1/images/generations"
            with client.stream("POST", url, json=body) as answer:
                for _ in answer.iter_raw():
                    if drawn.random() < 0.1:
                        break

    going = [threading.Thread(target=go, args=(number,)) for number in range(16)]
    for thread in going:
        thread.start()
    staying = [(number, site.later(number, 5)) for number in range(8)]
    for thread in going:
        thread.join()
    for number, future in staying:
        assert right(future.result(PATIENCE)[0], number, 5)
    site.until(lambda: site.engine.stats().present == 0)
    stats = site.engine.stats()
    assert stats.served == 8
    assert 8 < stats.cancelled <= 16  # who is gone before the server has read what was asked is not counted
    site.asked += range(stats.cancelled)
    assert site.engine.restarts == 0


def test_nan_is_an_error_in_streams_too(site: Site) -> None:
    assert refused(site.ask(prompt="nan"), 500)["code"] == "numerical_error"
    text = site.ask(prompt="nan", stream=True).text
    assert "event: error" in text
    assert "numerical_error" in text
    assert ".completed" not in text


@pytest.mark.parametrize("hours", [-30, 30])
def test_a_clock_that_is_set_moves_no_deadline(site: Site, hours: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(site.served.house, "limits", Limits(steps=LONG, seconds=0.5))
    now, calls = time.time, 0

    def stepping() -> float:
        nonlocal calls
        calls += 1
        return now() + 3600 * hours * calls

    monkeypatch.setattr(time, "time", stepping)
    assert right(site.ask(1, 20), 1, 20)
    began = time.monotonic()
    assert refused(site.ask(2, LONG), 504)["code"] == "deadline_exceeded"
    assert 0.4 < time.monotonic() - began < 2.0
    assert calls > 0
    assert site.engine.restarts == 0


# ---------------------------------------------------------------------------------------------------- too much


def test_a_full_house_turns_away_at_once_and_serves_whom_it_has_let_in(site: Site) -> None:
    inside = [site.later(number, 200) for number in range(IN_FLIGHT)]
    site.until(lambda: site.engine.stats().running == IN_FLIGHT)
    inside += [site.later(IN_FLIGHT + number, 3) for number in range(24)]
    site.until(lambda: site.engine.stats().waiting == 24)
    for _ in range(10):
        began = time.monotonic()
        answer = site.ask()
        assert refused(answer, 429)["code"] == "rate_limit_exceeded"
        assert int(answer.headers["retry-after"]) >= 1
        assert time.monotonic() - began < 0.5
    for number, future in enumerate(inside):
        assert right(future.result(PATIENCE)[0], number, 200 if number < IN_FLIGHT else 3)
