"""Who may ask: every path is closed to those without a key, but for a few that say nothing."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from ldmrt.errors import BadRequest
from ldmrt.serving.http.errors import HttpError

VARIABLE = "LDMRT_API_KEYS"
# Probes say one word; the page asks for a key itself and has nothing of its own to hide.
OPEN = frozenset({"/", "/health/live", "/health/ready", "/v2/health/live", "/v2/health/ready"})
_SHORTEST = 16
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})


class Keys:
    """Keys that clients have. They are kept as hashes, so that none is ever shown, and compared in constant time.

    Args:
        keys: the keys; none lets everybody in.

    Raises:
        BadRequest: one is too short to be a secret.
    """

    def __init__(self, keys: Iterable[str] = ()) -> None:
        found = list(keys)
        if any(len(key) < _SHORTEST for key in found):
            raise BadRequest(
                f"a key has fewer than {_SHORTEST} characters: make one with `openssl rand -hex 24`", param="keys"
            )
        self._hashes = [_hash(key) for key in found]

    @classmethod
    def read(cls, path: Path | None, environ: Mapping[str, str]) -> Keys:
        """Keys of a file, one a line (`#` begins a comment), or of the environment, with commas between them.

        Raises:
            BadRequest: the file cannot be read, or has none.
        """
        if path is None:
            return cls(key.strip() for key in environ.get(VARIABLE, "").split(",") if key.strip())
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise BadRequest(f"the keys in {path} cannot be read: {type(error).__name__}", param="keys") from error
        keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise BadRequest(f"there is no key in {path}: write one a line", param="keys")
        return cls(keys)

    def __bool__(self) -> bool:
        """Whether a key is needed."""
        return bool(self._hashes)

    def admits(self, authorization: str) -> bool:
        """Whether a header is that of somebody who has a key. How long this takes depends on no key."""
        scheme, _, key = authorization.partition(" ")
        given = _hash(key.strip())
        known = [hmac.compare_digest(given, one) for one in self._hashes]
        return scheme.lower() == "bearer" and any(known)


class Guard:
    """Turns those away who have no key, before anything of what they send is read; where no key is needed, pages of other sites, which
    a browser on this machine might carry here.
    """

    def __init__(self, app: ASGIApp, *, keys: Keys) -> None:
        self._app, self._keys = app, keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] == "http" and scope["path"].removeprefix(scope.get("root_path", "")) not in OPEN:
            refusal = self._refusal(Headers(scope=scope))
            if refusal is not None:
                await refusal.response()(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, headers: Headers) -> HttpError | None:
        if self._keys:
            if self._keys.admits(headers.get("authorization", "")):
                return None
            message = "there is no such key: send Authorization: Bearer KEY"
            return HttpError(401, "invalid_api_key", message, headers={"www-authenticate": "Bearer"})
        host, origin = headers.get("host", ""), headers.get("origin")
        if host.rpartition(":")[0] not in _LOOPBACK and host not in _LOOPBACK:
            return HttpError(403, "forbidden_host", "without keys this server answers to localhost alone")
        if origin is not None and origin.partition("://")[2] != host:
            return HttpError(403, "forbidden_origin", "without keys this server answers to no other site's pages")
        return None


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()
