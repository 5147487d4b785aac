"""Pictures on their way, as server-sent events: OpenAI's `partial_image` and `completed`, and comments that other clients pass over."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from ldmrt.serving.engine import Step

# How long nothing is said before a comment shows both sides that the other is there.
_SILENCE = 10.0


class Progress:
    """Hands the steps of a request from the engine's thread to the event loop."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._steps: asyncio.Queue[Step | None] = asyncio.Queue()

    def made(self, step: Step) -> None:
        """A step; called on the engine's thread, which it does not hold up."""
        self._put(step)

    def ended(self, _future: object) -> None:
        """There will be no more steps; called on any thread."""
        self._put(None)

    async def next(self) -> Step | None:
        """The next step, None when there are no more.

        Raises:
            TimeoutError: there was none for long.
        """
        async with asyncio.timeout(_SILENCE):
            return await self._steps.get()

    def _put(self, step: Step | None) -> None:
        try:
            self._loop.call_soon_threadsafe(self._steps.put_nowait, step)
        except RuntimeError:  # the loop has ended, and with it whoever would have read this
            return


class EventStream(StreamingResponse):
    """An answer of events.

    Args:
        events: each as it is sent.
        over: called at the end, however that comes: all sent, or the client gone.
    """

    def __init__(self, events: AsyncIterator[bytes], over: Callable[[], object]) -> None:
        super().__init__(
            events, media_type="text/event-stream", headers={"cache-control": "no-store", "x-accel-buffering": "no"}
        )
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()


def event(kind: str, data: dict[str, Any]) -> bytes:
    """An event."""
    return f"event: {kind}\ndata: {json.dumps(data)}\n\n".encode()


def picture_event(kind: str, picture: str, common: dict[str, Any], **more: Any) -> bytes:
    """An event with a picture."""
    return event(kind, {"type": kind, "b64_json": picture, "created_at": int(time.time()), **common, **more})


def comment(step: Step | None) -> bytes:
    """A comment: which step of an image was made, or nothing."""
    if step is None:
        return b":\n\n"
    return f": {json.dumps({'image': step.image, 'step': step.step + 1, 'steps': step.steps})}\n\n".encode()
