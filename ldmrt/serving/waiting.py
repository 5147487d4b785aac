"""Who starts next: weighted fair queueing (Demers, Keshav & Shenker 1989, https://doi.org/10.1145/75246.75248) over model evaluations.

Imagine that all requests that are here were served at once, each getting an equal share of the model. A virtual clock counts the
evaluations that each would have got. An image's virtual finish is the reading at which it would be done; of equal priority, the one whose
virtual finish is earliest starts first. So a short request overtakes long ones, but only those that would have finished after it in that
imagined house, and neither a flood of long requests nor one of short ones keeps the other kind waiting for ever. The images of one request
are served one after the other there: a request of a hundred images has the share of one request.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ldmrt.serving.ticket import Image, Ticket


@dataclass(frozen=True, order=True)
class _Place:
    """Where an image stands in line; `arrival` decides where the rest is equal."""

    precedence: int
    finish: float
    arrival: int
    image: Image = field(compare=False)


class Waiting:
    """Images that wait, in the order in which they are to start."""

    def __init__(self) -> None:
        self._line: list[_Place] = []
        self._clock = 0.0
        self._arrivals = 0

    def __len__(self) -> int:
        return len(self._line)

    def __iter__(self) -> Iterator[Image]:
        return (place.image for place in self._line)

    def add(self, ticket: Ticket) -> None:
        """All images of a request."""
        for image in ticket.images():
            finish = self._clock + (image.number + 1) * image.evaluations
            bisect.insort(self._line, _Place(-ticket.priority, finish, self._arrivals, image))
            self._arrivals += 1

    def take(self, fits: Callable[[Image], bool]) -> Image | None:
        """The first for which there is a place; None if there is none. One whose size has no place holds back those of its size behind
        it, else a batch that it does not fit into would never run empty.
        """
        held: set[tuple[int, int]] = set()
        for index, place in enumerate(self._line):
            image = place.image
            if image.ticket.size in held:
                continue
            if fits(image):
                del self._line[index]
                return image
            held.add(image.ticket.size)
        return None

    def remove(self, ticket: Ticket) -> None:
        """The images of a request that wait no more."""
        self._line = [place for place in self._line if place.image.ticket is not ticket]

    def worked(self, evaluations: int, requests: int) -> None:
        """Move the virtual clock: so many evaluations were made while so many requests were here, waiting or running."""
        self._clock += evaluations / max(1, requests)
