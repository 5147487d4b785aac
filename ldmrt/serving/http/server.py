"""The server process: from the first connection to the end of the last request."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from ldmrt.errors import BadRequest
from ldmrt.serving.http.connection import Connection
from ldmrt.serving.http.house import House
from ldmrt.serving.logs import FIELDS, log

_MOST_CONNECTIONS = 800  # each is an open file, of which a process may have 1024 where nobody has said otherwise
_IDLE_SECONDS = 30
# Time for answers to be sent once everything that they wait for has ended.
_LAST_WORDS = 5


class _Server(uvicorn.Server):
    """Drains at the first signal: nothing more is accepted, and what was is finished, as far as there is time for it. The second signal
    ends it at once.
    """

    def __init__(self, config: uvicorn.Config, house: House, drain_seconds: float) -> None:
        super().__init__(config)
        self._house, self._drain_seconds = house, drain_seconds
        self._until: float | None = None
        self._closing: asyncio.Task[None] | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 - uvicorn's signature
        """A signal has come."""
        if self._until is not None:
            self._until = 0.0
            return
        self._house.draining = True
        self._until = time.monotonic() + self._drain_seconds
        log.info("draining", extra={FIELDS: {"signal": signal.Signals(sig).name, "seconds": self._drain_seconds}})

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to end."""
        if self._until is not None and self._closing is None:
            over = time.monotonic() >= self._until
            if over or not self._house.engine.stats().present:
                self._closing = asyncio.create_task(asyncio.to_thread(self._house.engine.close, drain=not over))
        if self._closing is not None and self._closing.done():
            self.should_exit = True
        return await super().on_tick(counter)


def listen(host: str, port: int) -> socket.socket:
    """Take an address, before anything that takes time.

    Args:
        host: the address to listen at.
        port: 0 for one that is free, which the log tells.

    Raises:
        BadRequest: it is taken, or not this machine's.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family, backlog=_MOST_CONNECTIONS)
    except OSError as error:
        raise BadRequest(f"cannot listen at {host}, port {port} ({error.strerror or error}): choose another") from error
    # Else the body of an answer, written behind its head, waits until the client has acknowledged that, which may take 40 ms. asyncio says so
    # only of sockets whose protocol is told by number; those that are accepted here have it from this one.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def serve(app: FastAPI, listening: socket.socket, *, drain_seconds: float = 60.0) -> None:
    """Serve until SIGTERM or SIGINT, then drain. Closes the engine.

    Args:
        app: made by `create_app`.
        listening: made by `listen`.
        drain_seconds: in which what was accepted may be finished.
    """
    house: House = app.state.house
    config = uvicorn.Config(
        app,
        http=Connection,
        log_config=None,
        log_level="warning",
        access_log=False,
        server_header=False,
        limit_concurrency=_MOST_CONNECTIONS,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=_LAST_WORDS,
        ws="none",
    )
    host, port = listening.getsockname()[:2]
    log.info("listening", extra={FIELDS: {"url": f"http://{f'[{host}]' if ':' in host else host}:{port}"}})
    try:
        with contextlib.suppress(KeyboardInterrupt):
            _Server(config, house, drain_seconds).run(sockets=[listening])
    finally:
        house.engine.close(drain=False)
