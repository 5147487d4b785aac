"""What a caller holds of a request that is under way."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from ldmrt.pipeline import Result
from ldmrt.request import Job


@dataclass(frozen=True, eq=False)
class Progress:
    """A step that was made.

    Attributes:
        image: which image of the request, from 0.
        step: which step of it, from 0.
        steps: how many there are.
        latents: (C, h, w) float32 on the model's device, a copy.
        preview: what the image is going to be, as far as the model has said; at the steps for which previews were asked.
    """

    image: int
    step: int
    steps: int
    latents: torch.Tensor
    preview: Image.Image | None = None


OnProgress = Callable[[Progress], object]


class Handle:
    """A request that was accepted. It may be used from any thread, and awaited in any event loop.

    Attributes:
        job: what was asked, with everything filled in.
        future: of the result; it is set on the batcher's thread, or on the one that cancels.

    Args:
        job: what was asked.
        cancel: withdraws the request.
    """

    def __init__(self, job: Job, cancel: Callable[[], bool]) -> None:
        self.job = job
        self.future: Future[Result] = Future()
        # A future that runs cannot be cancelled behind the batcher's back, as asyncio would.
        self.future.set_running_or_notify_cancel()
        self._cancel = cancel

    def result(self, timeout: float | None = None) -> Result:
        """Wait for the pictures.

        Args:
            timeout: seconds to wait; the request goes on after them.

        Raises:
            TimeoutError: they are not ready yet.
            Cancelled: the request was withdrawn, or the batcher was closed.
            DeadlineExceeded: it took longer than it was given.
            NumericalError: the model made NaN or infinity.
            LdmrtError: the engine failed. What `on_progress` raises comes as it is.
        """
        return self.future.result(timeout)

    def done(self) -> bool:
        """Whether there is a result or an error."""
        return self.future.done()

    def cancel(self) -> bool:
        """Withdraw the request: what waits is gone at once, what runs stops after its present step. `result` raises `Cancelled`.

        Returns:
            Whether it came in time.
        """
        return self._cancel()

    def __await__(self) -> Generator[Any, None, Result]:
        """The result; a task that is cancelled while it waits withdraws the request."""
        return self._wait().__await__()

    async def _wait(self) -> Result:
        try:
            return await asyncio.wrap_future(self.future)
        except asyncio.CancelledError:
            self.cancel()
            raise
