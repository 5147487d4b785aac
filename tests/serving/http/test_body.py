"""Bodies that are too large or too slow are refused, however they come."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import httpx2
import pytest

from ldmrt.serving.http import Limits

from .conftest import PROMPT, Served, Serving, refused

LIMITS = Limits(json_bytes=1000, form_bytes=20_000, body_seconds=0.3)
JSON = {"content-type": "application/json"}


@pytest.fixture
def served(serving: Serving) -> Served:
    return serving(limits=LIMITS)


def body(size: int) -> bytes:
    text = json.dumps({"prompt": PROMPT, "steps": 1}).encode()
    return text + b" " * (size - len(text))


def chunks(data: bytes, size: int) -> Iterator[bytes]:
    for start in range(0, len(data), size):
        yield data[start : start + size]


@pytest.mark.parametrize("chunk", [None, 1, 400])
def test_json_up_to_its_limit(served: Served, chunk: int | None) -> None:
    def sent(size: int) -> httpx2.Response:
        content = body(size) if chunk is None else chunks(body(size), chunk)
        return served.client.post("/v1/images/generations", content=content, headers=JSON)

    assert sent(1000).status_code == 200
    assert refused(sent(1001), 413)["code"] == "content_too_large"


def test_forms_have_a_limit_of_their_own(served: Served) -> None:
    refused(served.edit({"image": b"x" * 15_000}), 400, "image")
    refused(served.edit({"image": b"x" * 20_001}), 413)


def test_a_form_of_many_fields(served: Served) -> None:
    fields = {f"field{number}": "1" for number in range(60)}
    assert refused(served.edit({"image": b"x"}, **fields), 400)["code"] == "invalid_form"


@pytest.mark.parametrize(
    "content", [b"", b"--x\r\n", b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n", b"\0" * 100]
)
def test_a_form_that_is_none(served: Served, content: bytes) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = served.client.post("/v1/images/edits", content=content, headers=headers)
    assert answer.status_code == 400
    headers = {"content-type": "multipart/form-data"}
    assert served.client.post("/v1/images/edits", content=content, headers=headers).status_code == 400


def test_a_compressed_body_is_not_unpacked(served: Served) -> None:
    answer = served.client.post(
        "/v1/images/generations", content=b"\x1f\x8b" * 20, headers={**JSON, "content-encoding": "gzip"}
    )
    refused(answer, 400)


def raw(served: Served, head: str) -> bytes:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode())
        answer = b""
        while part := connection.recv(65536):
            answer += part
    return answer


def test_a_length_that_is_too_large_is_refused_before_the_body_comes(served: Served) -> None:
    head = f"POST /v1/images/generations HTTP/1.1\nHost: localhost\nContent-Length: {10**15}\n\n"
    assert raw(served, head).startswith(b"HTTP/1.1 413 ")


def test_a_body_that_does_not_come_is_given_up(served: Served) -> None:
    head = "POST /v1/images/generations HTTP/1.1\nHost: localhost\nContent-Length: 100\n\n{"
    assert raw(served, head).startswith(b"HTTP/1.1 408 ")
