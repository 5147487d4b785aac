"""Bodies are read whole before anything looks at them, as far as they may go."""

from __future__ import annotations

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ldmrt.serving.http.errors import HttpError
from ldmrt.serving.http.limits import Limits


class Body:
    """Refuses a body that is too large, by what it says of itself or by what has come of it, or too slow."""

    def __init__(self, app: ASGIApp, *, limits: Limits) -> None:
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(Headers(scope=scope), receive)
        except HttpError as error:
            await error.response()(scope, receive, send)
            return
        if body is None:  # the client has gone
            return
        unread: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return unread.pop() if unread else await receive()

        await self._app(scope, replay, send)

    async def _read(self, headers: Headers, receive: Receive) -> bytes | None:
        form = headers.get("content-type", "").startswith("multipart/form-data")
        limit = self._limits.form_bytes if form else self._limits.json_bytes
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > limit:
            raise _too_large(limit)
        parts = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    parts += message.get("body", b"")
                    if len(parts) > limit:
                        raise _too_large(limit)
                    if not message.get("more_body", False):
                        return bytes(parts)
        except TimeoutError:
            headers_ = {"connection": "close"}
            raise HttpError(408, "request_timeout", "the body did not come in time", headers=headers_) from None


def _too_large(limit: int) -> HttpError:
    # What is left of the body is not read: the connection cannot be used again.
    headers = {"connection": "close", "x-should-retry": "false"}
    return HttpError(413, "content_too_large", f"the body has more than {limit} bytes", headers=headers)
