"""A connection, from its first byte to its last: clients that say nothing, or take nothing, are let go."""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0
ANSWER_SECONDS = 30.0


class Connection(H11Protocol):
    """uvicorn's, whose patience with clients that have yet to say what they want has no end.

    The head of a request must have come `HEAD_SECONDS` after the connection, or after its own first byte. A client that takes nothing of an answer
    for `ANSWER_SECONDS` is gone. Where there are as many connections as there may be, that which has been idle longest makes room for another.
    """

    _head: asyncio.TimerHandle | None = None
    _answer: asyncio.TimerHandle | None = None
    _untaken = 0  # bytes of the answer
    _idle_since = 0.0

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come."""
        super().connection_made(transport)
        self._idle_since = self.loop.time()
        self._head = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)
        if self.limit_concurrency is not None and len(self.connections) >= self.limit_concurrency:
            idle = [one for one in self.connections if isinstance(one, Connection) and one is not self and one._idle]
            if idle:
                min(idle, key=lambda one: one._idle_since).transport.abort()

    def data_received(self, data: bytes) -> None:
        """A part of a request, or more than one."""
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            _cancel(self._head)
            self._head = None
        elif self._head is None:
            self._head = self.loop.call_later(HEAD_SECONDS, self.timeout_keep_alive_handler)

    def send_400_response(self, msg: str) -> None:
        """What the client has said last is no HTTP. Whoever answers what it had said before has nobody left to answer."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
        super().send_400_response(msg)

    def on_response_complete(self) -> None:
        """A request has been answered."""
        self._idle_since = self.loop.time()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client takes less than there is for it."""
        super().pause_writing()
        self._untaken = self.transport.get_write_buffer_size()
        self._answer = self.loop.call_later(ANSWER_SECONDS, self._look)

    def resume_writing(self) -> None:
        """It has taken nearly all."""
        _cancel(self._answer)
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """It is over."""
        _cancel(self._head)
        _cancel(self._answer)
        super().connection_lost(exc)

    @property
    def _idle(self) -> bool:
        return self.conn.their_state is h11.IDLE and not self.transport.is_closing()

    def _look(self) -> None:
        """Whether the client has taken anything."""
        before, self._untaken = self._untaken, self.transport.get_write_buffer_size()
        if self._untaken >= before:
            self.transport.abort()
        else:
            self._answer = self.loop.call_later(ANSWER_SECONDS, self._look)


def _cancel(timer: asyncio.TimerHandle | None) -> None:
    if timer is not None:
        timer.cancel()
