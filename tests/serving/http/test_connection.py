"""Clients that say nothing, say it slowly, or do not listen, cost the others nothing."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack

import httpx2
import pytest

from ldmrt.pipeline import Pipeline
from ldmrt.serving import Batcher
from ldmrt.serving.http import connection

from .conftest import PROMPT, Served, listening

HEAD_SECONDS, ANSWER_SECONDS = 0.4, 0.4
MOST = 20
BODY = b'{"prompt": "a", "steps": 1}'
POST = (
    b"POST /v1/images/generations HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    + f"Content-Length: {len(BODY)}\r\n\r\n".encode()
    + BODY
)
HEAD = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def module_served() -> Iterator[Served]:
    with Batcher(Pipeline.from_bundle(device="cpu")) as batcher, listening(batcher, connections=MOST) as served:
        yield served


@pytest.fixture
def served(module_served: Served, monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """A server that has none of the test's connections before it, nor after."""
    monkeypatch.setattr(connection, "HEAD_SECONDS", HEAD_SECONDS)
    monkeypatch.setattr(connection, "ANSWER_SECONDS", ANSWER_SECONDS)
    yield module_served
    module_served.client.close()
    module_served.client = httpx2.Client(base_url=module_served.url)
    module_served.until(lambda: not module_served.server.server_state.connections)


def connect(served: Served, receives: int | None = None) -> socket.socket:
    host, port = served.url.removeprefix("http://").split(":")
    made = socket.socket()
    if receives is not None:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receives)
    made.connect((host, int(port)))
    made.settimeout(10)
    return made


def seconds_until_closed(made: socket.socket) -> float:
    began = time.monotonic()
    with contextlib.suppress(ConnectionResetError):
        while made.recv(65536):
            pass
    return time.monotonic() - began


@pytest.mark.parametrize(("before", "said"), [(b"", b""), (b"", b"G"), (b"", HEAD[:-2]), (HEAD, b"G")])
def test_the_head_of_a_request_must_come(served: Served, before: bytes, said: bytes) -> None:
    with connect(served) as made:
        if before:
            made.sendall(before)
            assert made.recv(15) == b"HTTP/1.1 200 OK"
            time.sleep(0.1)
        made.sendall(said)
        assert 0.5 * HEAD_SECONDS < seconds_until_closed(made) < HEAD_SECONDS + 2.0


def test_a_head_that_comes_byte_by_byte_is_no_excuse(served: Served) -> None:
    with connect(served) as made, contextlib.suppress(ConnectionError):
        began = time.monotonic()
        for byte in HEAD * 3:
            made.sendall(bytes([byte]))
            time.sleep(0.05)
        pytest.fail("all was read")
    assert time.monotonic() - began < HEAD_SECONDS + 2.0


def test_between_two_requests_there_is_more_time(served: Served) -> None:
    assert served.client.get("/health/live").status_code == 200
    (kept,) = served.server.server_state.connections
    time.sleep(HEAD_SECONDS + 0.3)
    assert served.client.get("/health/live").status_code == 200
    assert served.server.server_state.connections == {kept}


def test_a_body_that_comes_slowly_has_its_own_time(served: Served) -> None:
    with connect(served) as made:
        made.sendall(POST.removesuffix(BODY))
        time.sleep(HEAD_SECONDS + 0.3)
        made.sendall(BODY)
        assert made.recv(100).startswith(b"HTTP/1.1 200 ")


@pytest.mark.parametrize("said", [b"", HEAD], ids=["silent", "between two requests"])
def test_the_idle_make_room_for_others(
    module_served: Served, served: Served, said: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HEAD_SECONDS", 60.0)
    with ExitStack() as stack:
        idle = [stack.enter_context(connect(served)) for _ in range(MOST)]
        for made in idle:
            made.sendall(said)
        for _ in range(3):  # more than there is room for, one after the other
            with httpx2.Client(base_url=served.url) as client:
                answer = client.post("/v1/images/generations", json={"prompt": PROMPT, "steps": 1})
                assert answer.status_code == 200
        # The first to come were the first to go.
        assert seconds_until_closed(idle[0]) < 1.0


def test_those_who_are_served_make_no_room(served: Served) -> None:
    with served.held(), ExitStack() as stack:
        busy = [stack.enter_context(connect(served)) for _ in range(MOST - 1)]
        for made in busy:
            made.sendall(POST)
        served.until(lambda: served.batcher.stats().present == MOST - 1)
        assert served.client.get("/health/live").status_code == 503
        served.client.close()
        for made in busy:
            made.settimeout(0.0)
            with pytest.raises(BlockingIOError):  # neither answered nor closed
                made.recv(1)


def test_who_takes_nothing_of_an_answer_is_gone(served: Served) -> None:
    with connect(served, receives=4096) as made:
        made.sendall(HEAD * 400)  # of which more comes than sockets hold
        served.until(lambda: bool(served.server.server_state.connections))
        began = time.monotonic()
        served.until(lambda: not served.server.server_state.connections)
        assert time.monotonic() - began < ANSWER_SECONDS * 2 + 5.0


def test_who_takes_it_slowly_gets_all(served: Served) -> None:
    size = len(served.client.get("/openapi.json").content)
    for listening_socket in served.server.servers[0].sockets:
        listening_socket.setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, 4096
        )  # else the system holds more than there is
    with connect(served, receives=4096) as made:
        made.sendall(HEAD * 8)
        got, began = 0, time.monotonic()
        while got < 8 * size:
            part = made.recv(8192)
            assert part
            got += len(part)
            time.sleep(0.05)
        assert time.monotonic() - began > ANSWER_SECONDS


CHUNKED = b"POST /v1/images/generations HTTP/1.1\r\nHost: %s\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    ("said", "statuses"),
    [
        (CHUNKED % b"localhost" + b"what\r\n", [b"400"]),
        (CHUNKED % b"elsewhere" + b"what\r\n", [b"400"]),
        (POST[:-5] + b"\0", []),  # the client goes
        (POST + b"\0what\r\n\r\n", [b"200", b"400"]),
    ],
    ids=["chunk", "chunk of what is refused", "half a body", "second request"],
)
def test_what_is_no_http_ends_what_was_asked_before_and_nothing_else(
    served: Served, caplog: pytest.LogCaptureFixture, said: bytes, statuses: list[bytes]
) -> None:
    """Not with an exception, of which each would be lines in the log."""
    heard = b""
    with connect(served) as made, contextlib.suppress(ConnectionResetError):
        made.sendall(said)
        if not statuses:
            made.shutdown(socket.SHUT_WR)
        while more := made.recv(65536):
            heard += more
    assert [part[:3] for part in heard.split(b"HTTP/1.1 ")[1:]] == statuses
    served.until(lambda: not served.engine.stats().present)
    assert served.client.get("/health/ready").status_code == 200
    assert [record for record in caplog.records if record.exc_info] == []
