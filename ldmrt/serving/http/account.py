"""What is known of a request while it is served: its id, and what is told of it in the log and the metrics."""

from __future__ import annotations

import logging
import re
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ldmrt.serving.http.errors import of
from ldmrt.serving.http.metrics import Metrics
from ldmrt.serving.logs import FIELDS, log

KEY = "ldmrt.account"  # where it stands in the scope
_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_CLIENT_GONE = 499  # as nginx calls it; nobody gets to read it


@dataclass
class Account:
    """A request.

    Attributes:
        id: its id, the client's own if that is one.
        told: fields of its line in the log: numbers, and names that this server gave.
    """

    id: str
    told: dict[str, Any] = field(default_factory=dict)


def account(scope: Scope) -> Account:
    """That of a request."""
    found: Account = scope[KEY]
    return found


class Accounts:
    """Keeps the account of every request, and answers those of which nothing else has made an answer."""

    def __init__(self, app: ASGIApp, *, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        kept = Account(given if _ID.fullmatch(given) else f"req_{secrets.token_hex(12)}")
        scope[KEY] = kept
        status, began = None, time.perf_counter()

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = kept.id
                headers.setdefault("x-content-type-options", "nosniff")
                headers.setdefault("cache-control", "no-store")
            await send(message)

        try:
            await self._app(scope, receive, note)
        except Exception as error:
            log.exception("a request failed", extra={FIELDS: {"request_id": kept.id}})
            if status is not None:
                raise  # the connection is cut, so that the client sees that the answer is not whole
            await of(error).response()(scope, receive, note)
        finally:
            seconds = time.perf_counter() - began
            route = getattr(scope.get("route"), "path", None) or "none"
            method = scope["method"] if scope["method"] in _METHODS else "other"
            code = kept.told.pop("status", None) or status or _CLIENT_GONE
            self._metrics.answered(route, method, code, seconds)
            fields = {"request_id": kept.id, "method": method, "route": route, "status": code}
            quiet = route.endswith(("/live", "/ready")) or route == "/metrics"
            told = {**fields, "seconds": round(seconds, 4), **kept.told}
            log.log(logging.DEBUG if quiet else logging.INFO, "request", extra={FIELDS: told})
