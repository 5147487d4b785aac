"""What takes requests from any thread, and serves them on one of its own: its beginning and its end."""

from __future__ import annotations

import asyncio
import atexit
import threading
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from ldmrt.errors import BadRequest
from ldmrt.serving.engine import State
from ldmrt.serving.register import Register, Stats


class Service:
    """A register of requests, and the thread that serves it. Those who derive from it say what is made, in `_run`.

    Args:
        what: it is, for threads and errors.
        max_waiting: images that may wait.

    Raises:
        BadRequest: `max_waiting` is less than 1.
    """

    def __init__(self, what: str, max_waiting: int) -> None:
        if max_waiting < 1:
            raise BadRequest(f"max_waiting is {max_waiting}, expected 1 or more", param="max_waiting")
        self._what = what
        self._register = Register(max_waiting)
        self._state = State.LOADING
        self._begun: Future[Any] = Future()
        self._thread = threading.Thread(target=self._run, name=f"ldmrt-{what}", daemon=True)

    def _run(self) -> None:
        """The thread: sets `_begun` when it is ready, or cannot be, and ends when the register is closed and nothing is left."""
        raise NotImplementedError

    def _begin(self) -> Any:
        """Start the thread, and wait for what it begins with."""
        self._thread.start()
        try:
            begun = self._begun.result()
        except BaseException:
            self.close(drain=False)
            raise
        # At the end of the interpreter, before torch is taken down under the thread.
        atexit.register(self.close, drain=False)
        return begun

    def _deadline(self, timeout: float | None) -> tuple[float, float | None]:
        """Now, and when a request must be finished that has so many seconds from now, by the register's clock."""
        if timeout is not None and not timeout > 0:
            raise BadRequest(f"timeout is {timeout}, expected seconds, more than 0", param="timeout")
        now = self._register.clock()
        return now, None if timeout is None else now + timeout

    def _wake(self) -> None:
        """Let the thread see what has changed, where the register's own notice does not."""

    @property
    def state(self) -> State:
        """Whether it takes requests."""
        return State.CLOSED if self._register.closed and self._state is not State.BROKEN else self._state

    def stats(self) -> Stats:
        """What was done until now."""
        return self._register.stats()

    def close(self, *, drain: bool = True) -> None:
        """Accept nothing more, and end. Closing twice does nothing.

        Args:
            drain: finish what was accepted; else it ends with `Cancelled`.
        """
        dropped = None if drain else f"the {self._what} was closed before the request was finished"
        self._register.close(f"the {self._what} is closed: make a new one", drop=dropped)
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes without holding up the event loop."""
        await asyncio.to_thread(self.close, drain=error is None)
