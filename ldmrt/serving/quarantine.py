"""Requests that were under way when the engine was lost, again: who asks the same once more is refused, so that it costs nobody else."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable

from ldmrt.errors import Quarantined
from ldmrt.serving.order import Order

# From so many losses on a request is refused: for a minute, since two may be chance, and for twice as long with every further one.
_LOSSES = 2
_REFUSED_SECONDS, _REMEMBERED_SECONDS = 60.0, 3600.0


class Quarantine:
    """Remembers what was lost, by its fingerprint. Any thread may ask.

    Args:
        clock: seconds.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._lost: dict[bytes, tuple[int, float]] = {}  # how often, and when last

    def lost(self, orders: Iterable[Order]) -> None:
        """The engine was lost while it made these."""
        now = self._clock()
        with self._lock:
            self._lost = {mark: entry for mark, entry in self._lost.items() if now < entry[1] + _REMEMBERED_SECONDS}
            for mark in {order.fingerprint for order in orders}:
                times, _ = self._lost.get(mark, (0, 0.0))
                self._lost[mark] = (times + 1, now)

    def served(self, order: Order) -> None:
        """It can be made after all."""
        with self._lock:
            if self._lost:  # else nothing need be hashed
                self._lost.pop(order.fingerprint, None)

    def check(self, order: Order) -> None:
        """Refuse what is not to be tried again yet.

        Raises:
            Quarantined: it was lost twice.
        """
        with self._lock:
            if not self._lost:
                return
            times, last = self._lost.get(order.fingerprint, (0, 0.0))
        if times < _LOSSES:
            return
        seconds = last + min(_REMEMBERED_SECONDS, _REFUSED_SECONDS * 2 ** (times - _LOSSES)) - self._clock()
        if seconds > 0:
            raise Quarantined(
                f"the engine was lost {times} times while it made such a request: it is not tried again for {seconds:.0f} seconds"
            )
