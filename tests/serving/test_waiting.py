"""Who starts next: a simulation of one model, against what fair shares promise."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from ldmrt.serving.waiting import Waiting


def ticket(evaluations: int, *, images: int = 1, priority: int = 0, size: tuple[int, int] = (64, 64)) -> Any:
    """As much of a `Ticket` as the line looks at."""
    made = SimpleNamespace(priority=priority, size=size)
    listed = [SimpleNamespace(ticket=made, number=number, evaluations=evaluations) for number in range(images)]
    made.images = lambda: listed
    return made


def starts(waiting: Waiting) -> list[Any]:
    """The tickets of all that wait, in the order in which they start."""
    order = []
    while (image := waiting.take(lambda image: True)) is not None:
        order.append(image.ticket)
    return order


def test_the_short_one_first_and_of_equals_the_first() -> None:
    waiting = Waiting()
    long, short, second = ticket(50), ticket(4), ticket(50)
    for one in (long, short, second):
        waiting.add(one)
    assert len(waiting) == 3
    assert starts(waiting) == [short, long, second]


def test_priority_goes_before_everything() -> None:
    waiting = Waiting()
    tickets = [ticket(4, priority=-1), ticket(50, priority=2), ticket(4)]
    for one in tickets:
        waiting.add(one)
    assert starts(waiting) == [tickets[1], tickets[2], tickets[0]]


def test_the_images_of_a_request_have_the_share_of_one() -> None:
    waiting = Waiting()
    many, single = ticket(10, images=3), ticket(15)
    waiting.add(many)
    waiting.add(single)
    assert starts(waiting) == [many, single, many, many]


@pytest.mark.parametrize(("flood", "rare"), [(4, 50), (50, 4)])
def test_a_flood_does_not_keep_the_others_waiting_for_ever(flood: int, rare: int) -> None:
    """One model, fully busy with a flood of one kind; requests of the other kind start within the wait that their share allows."""
    waiting = Waiting()
    backlog = 20
    for _ in range(backlog):
        waiting.add(ticket(flood))
    special = ticket(rare)
    waiting.add(special)
    spent = 0
    while True:
        image = waiting.take(lambda image: True)
        assert image is not None
        if image.ticket is special:
            break
        present = len(waiting) + 1
        spent += flood
        waiting.worked(flood, present)
        waiting.add(ticket(flood))  # the flood goes on
    # Its fair share is one of all that are here: it may have to wait until each has had as many evaluations as it needs.
    assert spent <= rare * (backlog + 2)


def test_what_does_not_fit_holds_back_its_own_size_alone() -> None:
    waiting = Waiting()
    first, behind, other = ticket(4), ticket(5), ticket(6, size=(32, 32))
    for one in (first, behind, other):
        waiting.add(one)
    taken = waiting.take(lambda image: image.ticket is not first)
    assert taken is not None
    assert taken.ticket is other
    assert waiting.take(lambda image: image.ticket is behind) is None
    assert [image.ticket for image in waiting] == [first, behind]


def test_what_is_withdrawn_is_gone() -> None:
    waiting = Waiting()
    gone, stays = ticket(4, images=2), ticket(50)
    waiting.add(gone)
    waiting.add(stays)
    waiting.remove(gone)
    assert starts(waiting) == [stays]
