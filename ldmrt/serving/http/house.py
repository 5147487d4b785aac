"""What the routes of a server share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from starlette.requests import Request

from ldmrt.serving.engine import Engine, State
from ldmrt.serving.http.errors import HttpError, draining
from ldmrt.serving.http.limits import Limits
from ldmrt.serving.http.metrics import Metrics

T = TypeVar("T")
_THREADS = 4  # for reading and writing pictures, and for tokens: the model has threads of its own


class House:
    """One server.

    Attributes:
        engine: what makes the pictures.
        model: the id under which it is known.
        bundled: whether the model is the one that comes with the package.
        limits: of a request.
        metrics: what is counted.
        began: when, in seconds of the epoch.
        draining: whether nothing more is accepted.
    """

    def __init__(self, engine: Engine, model: str, limits: Limits, *, bundled: bool) -> None:
        self.engine, self.model, self.limits, self.bundled = engine, model, limits, bundled
        self.metrics = Metrics(engine)
        self.began = int(time.time())
        self.draining = False
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="ldmrt-http")

    @property
    def ready(self) -> bool:
        """Whether a request would be served now."""
        return not self.draining and self.engine.state is State.READY

    def check_open(self) -> None:
        """Refuse what comes when the server is about to end.

        Raises:
            HttpError: 503.
        """
        if self.draining:
            raise draining()

    def check_model(self, name: str | None) -> None:
        """Refuse another model's name.

        Raises:
            HttpError: 404.
        """
        if name is not None and name != self.model:
            message = "there is no such model: GET /v1/models lists those there are"
            raise HttpError(404, "model_not_found", message, param="model", headers={"x-should-retry": "false"})

    async def aside(self, work: Callable[[], T]) -> T:
        """Do what takes its time on another thread."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def end(self) -> None:
        """Give the threads back."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def house(request: Request) -> House:
    """The server that a request has come to."""
    found: House = request.app.state.house
    return found
