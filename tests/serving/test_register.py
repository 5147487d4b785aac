"""The register alone: each request comes in once and ends once, whoever says so."""

from __future__ import annotations

import random
import threading
from typing import cast

import pytest

from ldmrt.errors import BadRequest, Cancelled, DeadlineExceeded, Overloaded, Unavailable
from ldmrt.pipeline import Result
from ldmrt.serving.register import Register
from ldmrt.serving.ticket import Ticket
from tests.serving.test_ticket import ticket

RESULT = cast("Result", object())


def accounted(register: Register) -> bool:
    s = register.stats()
    return s.received == s.served + s.failed + s.rejected + s.cancelled + s.present


def test_a_request_ends_once_however_many_threads_say_so() -> None:
    register = Register(1000)
    tickets = [ticket(num_images_per_prompt=2) for _ in range(60)]
    endings: list[int] = []
    for number, one in enumerate(tickets):
        one.handle.future.add_done_callback(lambda _: endings.append(1))
        register.count(received=1)
        register.add(one)
        assert len(endings) == 0, number

    def caller(seed: int) -> None:
        drawn = random.Random(seed)
        for one in drawn.sample(tickets, 40):
            register.fail(one, drawn.choice((Cancelled("x"), ValueError("x"))))

    def worker() -> None:
        made: dict[Ticket, int] = {}
        while (image := register.start(lambda image: True)) is not None:
            register.left(image)
            made[image.ticket] = made.get(image.ticket, 0) + 1
            if image.ticket.error is None and made[image.ticket] == 2:
                register.serve(image.ticket, RESULT)

    threads = [threading.Thread(target=caller, args=(seed,)) for seed in range(4)] + [threading.Thread(target=worker)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(endings) == len(tickets)
    assert all(one.handle.done() for one in tickets)
    stats = register.stats()
    assert (stats.present, stats.waiting, stats.running) == (0, 0, 0)
    assert accounted(register)


def test_what_runs_ends_when_it_has_left() -> None:
    register = Register(4)
    one = ticket(num_images_per_prompt=3)
    register.add(one)
    first, second = (register.start(lambda image: True) for _ in range(2))
    assert first is not None
    assert second is not None
    assert register.fail(one, Cancelled("x"))
    assert not register.fail(one, ValueError("too late"))
    assert register.stats().waiting == 0
    register.left(first)
    assert not one.handle.done()
    register.left(second)
    with pytest.raises(Cancelled):
        one.handle.result(0)


def test_an_error_that_comes_before_the_pictures_wins() -> None:
    register = Register(4)
    one = ticket()
    register.add(one)
    image = register.start(lambda image: True)
    assert image is not None
    register.fail(one, Cancelled("x"))
    register.serve(one, RESULT)
    with pytest.raises(Cancelled):
        one.handle.result(0)


def test_expiry() -> None:
    register = Register(4)
    now = [10.0]
    register.clock = lambda: now[0]
    one, other = ticket(), ticket()
    one.due = 12.0
    for each in (one, other):
        register.add(each)
    register.expire()
    assert not one.handle.done()
    now[0] = 12.0
    register.expire()
    with pytest.raises(DeadlineExceeded, match="not finished after 12 seconds"):
        one.handle.result(0)
    assert not other.handle.done()


def test_the_queue_is_bounded() -> None:
    register = Register(2)
    register.add(ticket(num_images_per_prompt=2))
    with pytest.raises(Overloaded) as caught:
        register.add(ticket())
    assert caught.value.retry_after == 1.0  # nothing has been measured
    register.worked(10, seconds=5.0)
    with pytest.raises(Overloaded) as caught:
        register.add(ticket())
    assert caught.value.retry_after == 15 * 0.5  # Heun's 8 steps are 15 evaluations
    with pytest.raises(BadRequest, match="for 3 images, expected at most 2"):
        register.add(ticket(num_images_per_prompt=3))


def test_closed_it_takes_nothing_and_finishes_what_it_has() -> None:
    register = Register(4)
    register.add(ticket())
    register.close("the first reason")
    register.close("the second")
    for _ in range(2):
        with pytest.raises(Unavailable, match="the first reason"):
            register.add(ticket())
    assert register.wait() == []
    image = register.start(lambda image: True)
    assert image is not None
    register.left(image)
    register.serve(image.ticket, RESULT)
    assert register.wait() is None


def test_abandoned_everybody_is_told() -> None:
    register = Register(4)
    tickets = [ticket(), ticket()]
    for one in tickets:
        register.add(one)
    register.start(lambda image: True)
    register.abandon(lambda: RuntimeError("gone"), "broken")
    for one in tickets:
        with pytest.raises(RuntimeError, match="gone"):
            one.handle.result(0)
    with pytest.raises(Unavailable, match="broken"):
        register.add(ticket())
