"""Bodies that are too large or too slow are refused, however they come."""

from __future__ import annotations

import gzip
import json
import socket
import time
import zlib
from collections.abc import Callable, Iterator

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
    files = [(f"file{number}", b"") for number in range(3)]
    assert refused(served.client.post("/v1/images/edits", files=files), 400)["code"] == "invalid_form"


@pytest.mark.parametrize(
    "part",
    [
        b'Content-Disposition: form-data; name="a"\r\n\r\n',
        b"X: y\r\n" * 2000,
        b"X: " + b"y" * 20_000,
        b"\r\n--",
    ],
    ids=["parts", "headers", "a header", "almost boundaries"],
)
def test_a_form_that_is_costly_to_take_apart(serving: Serving, part: bytes) -> None:
    served = serving(limits=Limits(form_bytes=4 << 20))
    content = (b"--x\r\n" + part + b"\r\n") * ((4 << 20) // (len(part) + 7))
    headers = {"content-type": "multipart/form-data; boundary=x"}
    began = time.monotonic()
    answer = served.client.post("/v1/images/edits", content=content, headers=headers)
    assert refused(answer, 400)["code"] == "invalid_form"
    assert time.monotonic() - began < 5  # a hundredth of that here


@pytest.mark.parametrize(
    "content", [b"", b"--x\r\n", b"--x\r\nContent-Disposition: form-data\r\n\r\n1\r\n--x--\r\n", b"\0" * 100]
)
def test_a_form_that_is_none(served: Served, content: bytes) -> None:
    headers = {"content-type": "multipart/form-data; boundary=x"}
    answer = served.client.post("/v1/images/edits", content=content, headers=headers)
    assert answer.status_code == 400
    headers = {"content-type": "multipart/form-data"}
    assert served.client.post("/v1/images/edits", content=content, headers=headers).status_code == 400


def test_many_chunks_are_one_body(serving: Serving) -> None:
    served = serving(limits=Limits(json_bytes=70_000))
    for size, status in ((70_000, b"200"), (70_001, b"413")):  # more than the 65,536 that others count
        chunked = b"".join(b"1\r\n%c\r\n" % byte for byte in body(size)) + b"0\r\n\r\n"
        head = "POST /v1/images/generations HTTP/1.1\nHost: localhost\nContent-Type: application/json\n"
        answer = raw(served, f"{head}Transfer-Encoding: chunked\nConnection: close\n\n", chunked)
        assert answer.startswith(b"HTTP/1.1 " + status)


# 100 MB in 100 kB, and what would be a good request if it were unpacked.
BOMB = bytes(100 << 20)


@pytest.mark.parametrize("content", [BOMB, body(200)], ids=["bomb", "request"])
@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_compressed_body_is_not_unpacked(
    serving: Serving, content: bytes, encoding: str, pack: Callable[[bytes], bytes]
) -> None:
    served, headers = serving(), {**JSON, "content-encoding": encoding}
    answer = served.client.post("/v1/images/generations", content=pack(content), headers=headers)
    assert refused(answer, 400)["code"] in ("invalid_json", "invalid_request")
    part = ("a.png", pack(content), "image/png", {"content-encoding": encoding})
    refused(served.client.post("/v1/images/edits", files={"image": part}), 400, "image")


def test_of_a_key_that_is_there_twice_the_last_counts_for_the_limits_too(served: Served) -> None:
    for text, status in (
        ('"n": 11, "n": 1', 200),
        ('"n": 1, "n": 11', 400),
        ('"n": 1, "num_images_per_prompt": 1', 400),
    ):
        content = f'{{"prompt": "a", "steps": 1, {text}}}'
        assert served.client.post("/v1/images/generations", content=content, headers=JSON).status_code == status
    twice = served.client.post("/v1/images/edits", files=[("image", b"x"), ("image[]", b"x")])
    refused(twice, 400, "image")


def raw(served: Served, head: str, content: bytes = b"") -> bytes:
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(head.replace("\n", "\r\n").encode() + content)
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
