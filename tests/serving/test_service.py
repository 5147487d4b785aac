"""A register and its thread: how they begin and end."""

from __future__ import annotations

import asyncio
import threading

import pytest

from ldmrt.errors import BadRequest, LdmrtError, Unavailable
from ldmrt.serving.engine import State
from ldmrt.serving.register import Errand
from ldmrt.serving.service import Service


class Worker(Service):
    """Does errands."""

    def __init__(self, max_waiting: int = 1, error: Exception | None = None) -> None:
        super().__init__("worker", max_waiting)
        self.error = error
        self.begun = self._begin()

    def _run(self) -> None:
        if self.error is not None:
            self._begun.set_exception(self.error)
            return
        self._state = State.READY
        self._begun.set_result(7)
        while (errands := self._register.wait()) is not None:
            for errand in errands:
                errand.run()

    def do(self, errand: Errand) -> None:
        self._register.add_errand(errand)

    def submit(self, timeout: float | None) -> float | None:
        with self._register.receiving():
            now, due = self._deadline(timeout)
            return None if due is None else due - now


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_it_begins_when_its_thread_says_so_and_ends_with_it() -> None:
    one = Worker()
    assert (one.begun, one.state) == (7, State.READY)
    assert "ldmrt-worker" in threads()
    one.close()
    one.close()
    assert one.state is State.CLOSED
    assert "ldmrt-worker" not in threads()
    with pytest.raises(Unavailable, match="the worker is closed"):
        one.do(Errand(lambda: None, one._begun))


def test_what_keeps_it_from_beginning_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        Worker(error=ZeroDivisionError())
    assert "ldmrt-worker" not in threads()
    with pytest.raises(BadRequest, match="max_waiting is 0"):
        Worker(0)


def test_it_may_be_closed_from_its_own_thread() -> None:
    with Worker() as one:
        one.do(Errand(one.close, one._begun))
        one._thread.join(5.0)
        assert not one._thread.is_alive()


def test_its_end_does_not_hold_up_an_event_loop() -> None:
    gate = threading.Event()

    def wait() -> None:
        gate.wait(5.0)

    async def use() -> None:
        async with Worker() as one:
            one.do(Errand(wait, one._begun))
            asyncio.get_running_loop().call_later(0.05, gate.set)  # while it is being closed
        assert gate.is_set()

    asyncio.run(use())


def test_every_call_is_counted_whatever_becomes_of_it() -> None:
    with Worker() as one:
        assert one.submit(2.5) == pytest.approx(2.5)
        assert one.submit(None) is None
        for timeout in (0.0, -1.0, float("nan")):
            with pytest.raises(LdmrtError):
                one.submit(timeout)
        with pytest.raises(TypeError):  # no error of ours
            one.submit("soon")  # type: ignore[arg-type]
        stats = one.stats()
        assert (stats.received, stats.rejected) == (6, 4)
