"""The requests that are here, waiting or running: each comes in once, and ends once. Any thread may ask."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ldmrt.errors import BadRequest, Cancelled, DeadlineExceeded, Overloaded, Unavailable
from ldmrt.pipeline import Result
from ldmrt.serving.ticket import Image, Ticket
from ldmrt.serving.waiting import Waiting

# How much the newest turn counts in the measured pace: about the last ten are remembered.
_NEWEST = 0.1
# Until the first turn has been measured.
_UNMEASURED_SECONDS = 1.0


@dataclass(frozen=True)
class Stats:
    """What a batcher has done. received = served + failed + rejected + cancelled + present.

    Attributes:
        received: calls of `submit`.
        served: requests that ended with pictures.
        failed: that ended with an error, a deadline among them.
        rejected: that `submit` refused.
        cancelled: that were withdrawn, or dropped when the batcher was closed.
        present: that are waiting or running.
        waiting: images that wait.
        running: images in batches.
        steps: evaluations of the model, of a whole batch each.
        evaluations: the same counted by image.
        model_seconds: in text encoders, denoising networks and decoders.
        own_seconds: in the batcher's own code between them, callbacks included, waiting for requests excluded.
    """

    received: int = 0
    served: int = 0
    failed: int = 0
    rejected: int = 0
    cancelled: int = 0
    present: int = 0
    waiting: int = 0
    running: int = 0
    steps: int = 0
    evaluations: int = 0
    model_seconds: float = 0.0
    own_seconds: float = 0.0


@dataclass(frozen=True, eq=False)
class Errand:
    """Something to be done between two steps.

    Attributes:
        run: does it, and gives its result to the future.
        future: what the caller waits for.
    """

    run: Callable[[], None]
    future: Future[Any]


class Register:
    """Requests from their arrival to their end.

    Args:
        max_waiting: images that may wait.
    """

    def __init__(self, max_waiting: int) -> None:
        self._max_waiting = max_waiting
        self.clock: Callable[[], float] = time.monotonic
        # Guards all that follows; the batcher's thread waits on it when there is nothing to do.
        self._changed = threading.Condition()
        self._waiting = Waiting()
        self._present: set[Ticket] = set()
        self._errands: list[Errand] = []
        self._stats = Stats()
        self._pace: float | None = None  # seconds that an evaluation of one image takes
        self._closed: str | None = None

    def stats(self) -> Stats:
        """What was done until now."""
        with self._changed:
            running = sum(ticket.running for ticket in self._present)
            return replace(self._stats, present=len(self._present), waiting=len(self._waiting), running=running)

    def count(self, **more: float) -> None:
        """Add to the stats."""
        with self._changed:
            self._stats = replace(self._stats, **{name: getattr(self._stats, name) + n for name, n in more.items()})

    @property
    def closed(self) -> bool:
        """Whether nothing more is accepted."""
        return self._closed is not None

    # ------------------------------------------------------------------------------------------------ coming in

    @contextmanager
    def receiving(self) -> Iterator[None]:
        """Count a call of `submit`, and its refusal if it ends with an error, whichever that is."""
        self.count(received=1)
        try:
            yield
        except BaseException:
            self.count(rejected=1)
            raise

    def add(self, ticket: Ticket) -> None:
        """Let a request wait.

        Raises:
            BadRequest: it is for more images than may ever wait.
            Overloaded: too many images wait.
            Unavailable: the register is closed.
        """
        images = ticket.job.num_images
        if images > self._max_waiting:
            raise BadRequest(
                f"the request is for {images} images, expected at most {self._max_waiting}: ask for fewer at a time",
                param="num_images_per_prompt",
            )
        with self._changed:
            self._check_open()
            if len(self._waiting) + images > self._max_waiting:
                seconds = self._seconds_until_started(len(self._waiting) + images - self._max_waiting)
                raise Overloaded(
                    f"{len(self._waiting)} images wait, expected at most {self._max_waiting} with the {images} of this"
                    f" request: try again in {seconds:.3g} seconds",
                    retry_after=seconds,
                )
            self._waiting.add(ticket)
            self._present.add(ticket)
            self._changed.notify()

    def add_errand(self, errand: Errand) -> None:
        """Let the batcher's thread do something between two steps.

        Raises:
            Unavailable: the register is closed.
        """
        with self._changed:
            self._check_open()
            self._errands.append(errand)
            self._changed.notify()

    def close(self, reason: str, *, drop: str | None = None) -> None:
        """Accept nothing more; the first reason stays.

        Args:
            reason: what `Unavailable` says from now on.
            drop: what `Cancelled` says, with which the requests that are here end; None to finish them.
        """
        with self._changed:
            self._closed = self._closed or reason
            dropped = [] if drop is None else list(self._present)
            self._changed.notify()
        for ticket in dropped:
            self.fail(ticket, Cancelled(drop))

    def _check_open(self) -> None:
        if self._closed is not None:
            raise Unavailable(self._closed)

    def _seconds_until_started(self, images: int) -> float:
        """As many must have finished, at the measured pace and the average length of those that wait."""
        if self._pace is None:
            return _UNMEASURED_SECONDS
        evaluations = [image.evaluations for image in self._waiting]
        return max(self._pace, images * self._pace * sum(evaluations) / max(1, len(evaluations)))

    # ------------------------------------------------------------------------------------------------ being served

    def wait(self) -> list[Errand] | None:
        """Until there is something to do; the errands that came in, or None if there will never be anything to do."""
        with self._changed:
            while not (self._present or self._errands):
                if self._closed is not None:
                    return None
                self._changed.wait()
            errands, self._errands = self._errands, []
            return errands

    def over(self) -> bool:
        """Whether there will never be anything to do: it is closed, and nothing is left."""
        with self._changed:
            return self._closed is not None and not self._present and not self._errands

    def start(self, fits: Callable[[Image], bool]) -> Image | None:
        """The next image for which there is a place; it counts as running."""
        with self._changed:
            image = self._waiting.take(fits)
            if image is not None:
                image.ticket.running += 1
                image.ticket.started = image.ticket.started or self.clock()
            return image

    def worked(self, evaluations: int, seconds: float) -> None:
        """Tell what a turn has done: the shares of the model, and its pace."""
        with self._changed:
            self._waiting.worked(evaluations, len(self._present))
            pace = seconds / evaluations
            self._pace = pace if self._pace is None else self._pace + _NEWEST * (pace - self._pace)

    # ------------------------------------------------------------------------------------------------ ending

    def expire(self) -> None:
        """End requests whose time is over."""
        now = self.clock()
        with self._changed:
            late = [ticket for ticket in self._present if ticket.due is not None and now >= ticket.due]
        for ticket in late:
            seconds = now - ticket.submitted
            self.fail(ticket, DeadlineExceeded(f"the request was not finished after {seconds:.3g} seconds: allow more"))

    def fail(self, ticket: Ticket, error: BaseException) -> bool:
        """End a request with an error: now, or when none of its images runs. False if it has an end already."""
        with self._changed:
            if ticket.ended or ticket.error is not None:
                return False
            ticket.error = error
            self._waiting.remove(ticket)
            if ticket.running:
                return True
        self._end(ticket)
        return True

    def left(self, image: Image) -> None:
        """An image runs no more; with the last of a request that has an error, the request ends."""
        with self._changed:
            image.ticket.running -= 1
            over = image.ticket.error is not None and not image.ticket.running
        if over:
            self._end(image.ticket)

    def serve(self, ticket: Ticket, result: Result) -> None:
        """End a request with its pictures, unless it has got an error meanwhile."""
        self._end(ticket, result)

    def abandon(self, error: Callable[[], BaseException], reason: str) -> None:
        """Nobody serves any more: end everything.

        Args:
            error: makes what each request ends with.
            reason: what `Unavailable` says from now on.
        """
        self.close(reason)
        with self._changed:
            lost, errands, self._errands = list(self._present), self._errands, []
        for ticket in lost:
            ticket.running = 0
            self.fail(ticket, error())
            self._end(ticket)
        for errand in errands:
            errand.future.set_exception(Unavailable(reason))

    def _end(self, ticket: Ticket, result: Result | None = None) -> None:
        """Tell the caller, once. What was counted can be read by who is told."""
        with self._changed:
            if ticket.ended:
                return
            ticket.ended = True
            self._present.discard(ticket)
            kind = "cancelled" if isinstance(ticket.error, Cancelled) else "failed" if ticket.error else "served"
            self.count(**{kind: 1})
        if ticket.error is not None:
            ticket.handle.future.set_exception(ticket.error)
        elif result is not None:
            ticket.handle.future.set_result(result)
