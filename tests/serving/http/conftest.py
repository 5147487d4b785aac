"""Servers of the built-in model, each in this process, on a port of its own."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
import uvicorn
from PIL import Image

from ldmrt.pipeline import Pipeline
from ldmrt.serving import Batcher
from ldmrt.serving.engine import Engine
from ldmrt.serving.http import Keys, Limits, create_app
from ldmrt.serving.http.connection import Connection
from ldmrt.serving.http.house import House

PROMPT = "a red circle on a white background"
PATIENCE = 60.0


@dataclass
class Served:
    """A running server."""

    url: str
    engine: Engine
    house: House
    client: httpx2.Client
    server: uvicorn.Server

    @property
    def batcher(self) -> Batcher:
        assert isinstance(self.engine, Batcher)
        return self.engine

    def generate(self, **fields: Any) -> httpx2.Response:
        return self.client.post("/v1/images/generations", json={"prompt": PROMPT, "steps": 2, **fields})

    def edit(self, files: dict[str, bytes] | None = None, **fields: Any) -> httpx2.Response:
        parts = {name: ("../../name", data) for name, data in (files or {}).items()}
        return self.client.post("/v1/images/edits", files=parts or None, data={"steps": "2", **fields})

    @contextmanager
    def held(self) -> Iterator[None]:
        """No step is made meanwhile."""
        reached, gate = threading.Event(), threading.Event()

        def hold(_pipe: Pipeline) -> None:
            reached.set()
            gate.wait(PATIENCE)

        self.batcher.call(hold)
        assert reached.wait(PATIENCE)
        try:
            yield
        finally:
            gate.set()

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait for what happens on other threads."""
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.005)


Serving = Callable[..., Served]


@pytest.fixture(scope="session")
def shapes() -> Pipeline:
    return Pipeline.from_bundle(device="cpu")


@contextmanager
def listening(
    engine: Engine, keys: tuple[str, ...] = (), limits: Limits | None = None, connections: int = 800
) -> Iterator[Served]:
    """A server over an engine that stays the caller's."""
    app = create_app(engine, keys=Keys(keys), limits=limits, bundled=True)
    config = uvicorn.Config(
        app, port=0, http=Connection, log_config=None, access_log=False, limit_concurrency=connections
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        port = server.servers[0].sockets[0].getsockname()[1]
        url = f"http://127.0.0.1:{port}"
        headers = {"authorization": f"Bearer {keys[0]}"} if keys else {}
        with httpx2.Client(base_url=url, headers=headers, timeout=PATIENCE) as client:
            yield Served(url, engine, app.state.house, client, server)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive()


@contextmanager
def running(shapes: Pipeline, keys: tuple[str, ...], limits: Limits, **options: Any) -> Iterator[Served]:
    with Batcher(shapes, **options) as batcher, listening(batcher, keys, limits) as served:
        yield served


@pytest.fixture
def serving(shapes: Pipeline) -> Iterator[Serving]:
    """Start a server with options of its own."""
    with ExitStack() as stack:
        yield lambda *, keys=(), limits=None, **options: stack.enter_context(
            running(shapes, keys, limits or Limits(), **options)
        )


@pytest.fixture
def served(serving: Serving) -> Served:
    """A server as it is without options."""
    return serving()


def picture(base64_json: str) -> Image.Image:
    image = Image.open(io.BytesIO(base64.b64decode(base64_json)))
    image.load()
    return image


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, format="PNG")
    return out.getvalue()


def refused(response: httpx2.Response, status: int, param: str | None = None) -> dict[str, Any]:
    """It is an error in OpenAI's form; returns what is in it."""
    assert response.status_code == status, response.text
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert error["message"]
    return dict(error)
