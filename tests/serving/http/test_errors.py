"""What a client is told of each error: its own mistakes by name, of everything else fixed words."""

from __future__ import annotations

import pytest

from ldmrt import errors
from ldmrt.serving.http.errors import HttpError, draining, of

CANARY = "at 0x7f5e in /root/secret.py: canary"


@pytest.mark.parametrize(
    ("error", "status", "code", "retries"),
    [
        (errors.Overloaded(CANARY, retry_after=2.5), 429, "rate_limit_exceeded", True),
        (errors.Unavailable(CANARY), 503, "engine_unavailable", True),
        (errors.Cancelled(CANARY), 503, "engine_unavailable", True),
        (errors.DeadlineExceeded(CANARY), 504, "deadline_exceeded", False),
        (errors.Quarantined(CANARY), 500, "request_quarantined", False),
        (errors.NumericalError(CANARY), 500, "numerical_error", False),
        (errors.EngineMismatch(CANARY), 500, "internal_error", True),
        (errors.LdmrtError(CANARY), 500, "internal_error", True),
        (RuntimeError(CANARY), 500, "internal_error", True),
    ],
)
def test_what_is_not_the_client_s_fault_is_told_in_fixed_words(
    error: Exception, status: int, code: str, retries: bool
) -> None:
    answer = of(error)
    assert (answer.status, answer.code, answer.param) == (status, code, None)
    assert answer.headers.get("x-should-retry") == (None if retries else "false")
    assert not [word for word in ("0x", "/root", "canary") if word in str(answer.envelope)]


def test_the_time_to_wait_is_told_in_two_ways() -> None:
    headers = of(errors.Overloaded("full", retry_after=2.5)).headers
    assert (headers["retry-after"], headers["retry-after-ms"]) == ("3", "2500")
    assert of(errors.Overloaded("full", retry_after=0.0)).headers["retry-after"] == "1"
    assert int(draining().headers["retry-after"]) >= 1


@pytest.mark.parametrize(
    ("param", "message", "told"),
    [
        ("num_inference_steps", "num_inference_steps is 0, expected 1", "steps is 0, expected 1"),
        ("num_images_per_prompt", "the request is for 9 images", "the request is for 9 images"),
        ("mask_image", "mask_image was given", "mask was given"),
        ("height", "there is no engine for 64x64", "there is no engine for 64x64"),
        ("sampler", "sampler is 'x'", "sampler is 'x'"),
        (None, "no", "no"),
    ],
)
def test_a_mistake_is_told_by_the_name_that_the_client_gave(param: str | None, message: str, told: str) -> None:
    answer = of(errors.BadRequest(message, param=param))
    names = {"num_inference_steps": "steps", "num_images_per_prompt": "n", "mask_image": "mask", "height": "size"}
    assert (answer.status, answer.message, answer.param) == (400, told, names.get(param or "", param))


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "invalid_request_error"),
        (429, "rate_limit_error"),
        (503, "server_error"),
    ],
)
def test_types_are_those_of_openai(status: int, kind: str) -> None:
    assert HttpError(status, "code", "message").envelope["error"]["type"] == kind
