"""What a client is told of an error: a status, OpenAI's envelope, and whether to try again."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from ldmrt.errors import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    NumericalError,
    Overloaded,
    Quarantined,
    Unavailable,
)

# The Python interface's names of what a request of this API calls otherwise.
PARAMS = {
    "num_images_per_prompt": "n",
    "num_inference_steps": "steps",
    "width": "size",
    "height": "size",
    "mask_image": "mask",
}
_RETRY_SECONDS = 5.0
_FINAL = {"x-should-retry": "false"}  # a request that would fail again: OpenAI's clients repeat others twice


class HttpError(Exception):
    """An answer that is an error. Its message is read by clients: it holds nothing of the machine, of other requests, or of the prompt.

    Attributes:
        status: of HTTP.
        code: which error it is, for programs.
        message: the same for people.
        param: the field of the request, if it is one's fault.
        headers: more of the answer.
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.message, self.param = status, code, message, param
        self.headers = dict(headers or {})

    @property
    def envelope(self) -> dict[str, Any]:
        """The body, as OpenAI's clients read it."""
        kind = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> JSONResponse:
        """The whole answer."""
        return JSONResponse(self.envelope, self.status, self.headers)


def bad_request(message: str, param: str | None = None) -> HttpError:
    """A request that cannot be served as it is."""
    return HttpError(400, "invalid_value", message, param=param, headers=_FINAL)


def draining() -> HttpError:
    """The server is about to end."""
    return HttpError(503, "draining", "the server is about to end: try again", headers=_retry(_RETRY_SECONDS))


def of(error: BaseException) -> HttpError:
    """What a client is told of an error of the engine. What is not its own fault it is told in fixed words."""
    if isinstance(error, HttpError):
        return error
    if isinstance(error, BadRequest):
        param = PARAMS.get(error.param or "", error.param)
        text = str(error)
        if error.param and param and text.startswith(f"{error.param} "):
            text = param + text.removeprefix(error.param)
        return bad_request(text, param)
    if isinstance(error, Overloaded):
        return HttpError(
            429, "rate_limit_exceeded", "too many images wait: try again later", headers=_retry(error.retry_after)
        )
    if isinstance(error, DeadlineExceeded):
        message = "the request was not finished in time: ask for fewer steps or images, or allow more"
        return HttpError(504, "deadline_exceeded", message, headers=_FINAL)
    if isinstance(error, Unavailable | Cancelled):
        message = "the engine had to stop before the request was finished: try again"
        return HttpError(503, "engine_unavailable", message, headers=_retry(_RETRY_SECONDS))
    if isinstance(error, Quarantined):
        message = (
            "the engine stopped again and again while it made such a request, which is not tried again for a while"
        )
        return HttpError(500, "request_quarantined", message, headers=_FINAL)
    if isinstance(error, NumericalError):
        message = "the model made no finite picture of this request: use a smaller guidance_scale, or another sampler"
        return HttpError(500, "numerical_error", message, headers=_FINAL)
    return HttpError(500, "internal_error", "the request failed: the server's log says why, under its request id")


def _retry(seconds: float) -> dict[str, str]:
    """A header in whole seconds for everybody, and one in milliseconds for OpenAI's clients."""
    return {"retry-after": str(max(1, math.ceil(seconds))), "retry-after-ms": str(max(1, math.ceil(1000 * seconds)))}
