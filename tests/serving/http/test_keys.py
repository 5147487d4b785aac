"""Every path is closed to those without a key."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.applications import Starlette
from starlette.routing import Mount
from starlette.testclient import TestClient

from ldmrt.errors import BadRequest
from ldmrt.pipeline import Pipeline
from ldmrt.serving.http import Limits, create_app
from ldmrt.serving.http.keys import OPEN, VARIABLE, Keys

from .conftest import Served, Serving, refused, running

KEY, OTHER = "k" * 24, "o" * 24
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


@pytest.fixture(scope="module")
def closed() -> Iterator[Served]:
    """One server, and so one pipeline, for all who have no key."""
    with running(Pipeline.from_bundle(device="cpu"), (KEY,), Limits()) as one:
        yield one


def routes(app: object) -> set[str]:
    """Every path that the application answers at, with something in the place of its parameters."""
    found = set()
    for route in app.routes:  # type: ignore[attr-defined]
        for one in getattr(getattr(route, "original_router", None), "routes", [route]):
            found.add(one.path.replace("{model}", "shapes"))
    return found


def test_every_route_is_closed_but_those_that_say_nothing(serving: Serving) -> None:
    served = serving(keys=(KEY, OTHER))
    paths = routes(create_app(served.batcher))
    assert {"/v1/images/generations", "/v1/images/edits", "/metrics", "/openapi.json"} <= paths
    beside = {f"{path}/" for path in paths - {"/"}} | {path.upper() for path in paths} | {"/nowhere", "/health", "/v1"}
    assert paths >= OPEN
    for path in sorted((paths | beside) - OPEN):
        for method in METHODS:
            answer = served.client.request(method, path, headers={"authorization": ""})
            assert answer.status_code == 401, (method, path)
            if method != "HEAD":
                assert refused(answer, 401)["code"] == "invalid_api_key"
    for path in OPEN:
        assert served.client.get(path, headers={"authorization": ""}).status_code == 200
    assert served.batcher.stats().received == 0


@pytest.mark.parametrize(
    "target",
    [
        "/metrics/", "//metrics", "/./metrics", "/%6detrics", "/metrics%2f", "/%2fmetrics", "/health/live/../../metrics", "/health/live/..%2f..%2fmetrics",
        "/health/live%2f..%2f..%2fmetrics", "/health/live;/metrics", "/metrics;/health/live", "/metrics?/health/live", "/health//live", "/HEALTH/LIVE", "/health/live/",
        "/health/live%00", "/health/live%20", "/\\metrics", "http://localhost/metrics", "http://localhost/v1/models", "/v1/models/%2e%2e", "/v1//models", "*", "/%",
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS", "get", "PROPFIND"])
def test_no_spelling_of_a_path_opens_it(closed: Served, method: str, target: str) -> None:
    host, port = closed.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(f"{method} {target} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n".encode())
        answer = b""
        while part := connection.recv(65536):
            answer += part
    assert re.match(rb"HTTP/1\.1 40[01] ", answer), answer
    assert b"ldmrt_" not in answer
    assert b"shapes" not in answer


@pytest.mark.parametrize("method", [method for method in METHODS if method not in ("GET", "HEAD")])
def test_an_open_path_is_open_for_reading_alone(closed: Served, method: str) -> None:
    for path in sorted(OPEN):
        answer = closed.client.request(method, path, headers={"authorization": ""})
        assert answer.status_code == 405, (method, path)


def test_who_has_one_of_the_keys_is_served(serving: Serving) -> None:
    served = serving(keys=(KEY, OTHER))
    for key in (KEY, OTHER):
        assert served.client.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200


@pytest.mark.parametrize(
    "header", ["", KEY, f"Basic {KEY}", "Bearer", "Bearer ", f"Bearer {KEY[:-1]}", f"Bearer {KEY.upper()}", "Bearer é", f"Bearer {KEY} {KEY}"]
)  # fmt: skip
def test_what_is_no_key(header: str) -> None:
    assert not Keys([KEY]).admits(header)


def test_a_body_is_not_read_for_those_without_a_key(serving: Serving) -> None:
    served = serving(keys=(KEY,))
    answer = served.client.post("/v1/images/generations", content=b"{" * 200_000, headers={"authorization": "Bearer x"})
    assert answer.status_code == 401


def test_keys_of_a_file_and_of_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# a comment\n{KEY}\n\n  {OTHER}  \n")
    assert all(Keys.read(file, {}).admits(f"Bearer {key}") for key in (KEY, OTHER))
    assert all(Keys.read(None, {VARIABLE: f"{KEY}, {OTHER}"}).admits(f"Bearer {key}") for key in (KEY, OTHER))
    assert not Keys.read(None, {})
    assert Keys.read(file, {VARIABLE: "e" * 24}).admits(f"Bearer {KEY}")  # a flag wins over the environment


@pytest.mark.parametrize("text", [None, "", "# nothing\n", "short\n"])
def test_a_file_without_good_keys_is_refused(tmp_path: Path, text: str | None) -> None:
    file = tmp_path / "keys"
    if text is not None:
        file.write_text(text)
    with pytest.raises(BadRequest) as caught:
        Keys.read(file, {})
    assert "short" not in str(caught.value)


def test_a_key_is_never_shown() -> None:
    keys = Keys([KEY])
    assert KEY not in repr(keys) + repr(vars(keys))


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"host": "evil.example"}, "forbidden_host"),
        ({"host": "evil.example:8000"}, "forbidden_host"),
        ({"origin": "http://evil.example"}, "forbidden_origin"),
        ({"origin": "null"}, "forbidden_origin"),
    ],
)
def test_without_keys_other_sites_are_turned_away(serving: Serving, headers: dict[str, str], code: str) -> None:
    served = serving()
    assert refused(served.client.get("/v1/models", headers=headers), 403)["code"] == code


def test_without_keys_the_own_page_is_served(serving: Serving) -> None:
    served = serving()
    assert served.client.get("/v1/models", headers={"origin": served.url}).status_code == 200
    port = served.url.rpartition(":")[2]
    assert served.client.get("/v1/models", headers={"host": f"localhost:{port}"}).status_code == 200


def test_a_mounted_server_is_closed_in_the_same_way(serving: Serving) -> None:
    app = Starlette(routes=[Mount("/pictures", create_app(serving().batcher, keys=Keys([KEY])))])
    with TestClient(app) as client:
        assert client.get("/pictures/health/live").status_code == 200
        assert client.get("/pictures/").status_code == 200
        assert client.get("/pictures/v1/models").status_code == 401
        assert client.get("/pictures/v1/models", headers={"authorization": f"Bearer {KEY}"}).status_code == 200
