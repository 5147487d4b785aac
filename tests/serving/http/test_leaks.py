"""What a server keeps to itself: addresses, paths, keys and prompts; and that it asks nobody for anything, and writes nothing."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest
from PIL import Image

from ldmrt.serving.http.fields import Edit, Generation
from ldmrt.serving.logs import JsonFormatter

from .conftest import Served, Serving, png

KEY = "a-key-that-nobody-should-see"
CANARY = "canary-in-the-prompt"
LEAKS = re.compile(rf"0x[0-9a-f]{{6}}|Traceback|site-packages|\.py\b|/root|/home|{KEY}|{CANARY}")
JSON = {"content-type": "application/json"}
PNG = png(Image.new("RGB", (64, 64)))

# Told what events of the interpreter happen on other threads than the test's; an audit hook can never be taken away again.
_listener: list[list[tuple[str, str]]] = []


def _hear(event: str, given: tuple[Any, ...]) -> None:
    if _listener and event in (
        "open",
        "socket.connect",
        "socket.getaddrinfo",
        "socket.sendto",
        "subprocess.Popen",
        "os.mkdir",
        "os.rename",
    ):
        writes = event != "open" or bool((given[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and threading.current_thread() is not threading.main_thread():
            _listener[0].append((event, str(given[:2])))


@pytest.fixture(scope="module", autouse=True)
def _hook() -> None:
    sys.addaudithook(_hear)


@contextmanager
def heard() -> Iterator[list[tuple[str, str]]]:
    """Files that are written, connections and programs, on the server's threads."""
    found: list[tuple[str, str]] = []
    _listener.append(found)
    try:
        yield found
    finally:
        _listener.pop()


def bad_requests(served: Served) -> Iterator[httpx2.Response]:
    """Answers to requests that are wrong in many ways, each with the canary where a prompt can be."""
    post = served.client.post
    good = {"prompt": CANARY, "steps": 1}
    for name in (*Generation.model_fields, "surprise"):
        private = CANARY if name in ("prompt", "negative_prompt", "user", "safety_identifier") else "a word"
        for value in ([private], {"a": private}, -1, 1e308, f"{private}\0", True):
            yield post("/v1/images/generations", json={**good, name: value})
    for text in (
        f'{{"prompt": "{CANARY}", ',
        f'"{CANARY}"',
        f'{{"{CANARY[:-1]}": 1}}',
        f'{{"prompt": "{CANARY}\\ud800"}}',
        "\xff",
    ):
        yield post("/v1/images/generations", content=text.encode("latin-1"), headers=JSON)
    for image in (b"", PNG[:40], b"GIF89a", PNG[:-30]):
        yield post("/v1/images/edits", files={"image": (f"/root/{CANARY}.png", image)}, data={"prompt": CANARY})
    for fields in ({"n": CANARY}, {"prompt": f"{CANARY}\0"}, {"strength": "2"}, {"mask": "a word"}):
        yield post("/v1/images/edits", files={"image": PNG}, data={"prompt": CANARY, **fields})
    for path in ("/nowhere", "/v1/models/..%2f..%2fetc%2fpasswd", "/v1/models/%00", "/v2/models/x/ready"):
        yield served.client.get(path)
        yield served.client.get(path, headers={"authorization": f"Bearer {KEY}x"})
    yield served.generate(prompt=CANARY, guidance_scale=3e38)


def test_no_answer_log_line_or_metric_tells_what_is_not_for_it(
    serving: Serving, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.DEBUG)
    served = serving(keys=(KEY,))
    statuses = set()
    for answer in bad_requests(served):
        statuses.add(answer.status_code)
        assert LEAKS.search(answer.text + str(answer.headers)) is None, answer.text
        assert answer.status_code == 200 or set(answer.json()) == {"error"}
    assert {400, 401, 404, 500} <= statuses
    assert served.generate(prompt=CANARY, negative_prompt=CANARY, user=CANARY).status_code == 200

    def fail() -> None:
        raise RuntimeError(f"{CANARY} {KEY}")

    monkeypatch.setattr(served.house, "check_open", fail)
    assert served.generate(prompt=CANARY).status_code == 500
    assert LEAKS.search(served.client.get("/metrics").text) is None
    assert LEAKS.search(json.dumps(served.client.get("/openapi.json").json())) is None
    served.until(lambda: any(record.exc_info for record in caplog.records))
    said = [JsonFormatter().format(record) for record in caplog.records]
    assert any('"status": 500' in line for line in said)
    assert not [line for line in said if CANARY in line or KEY in line]


def test_a_url_is_text_and_nobody_is_asked_for_anything(serving: Serving) -> None:
    served = serving()
    with socket.create_server(("127.0.0.1", 0)) as trap, heard() as found:
        trap.settimeout(0.2)
        url = f"http://127.0.0.1:{trap.getsockname()[1]}/a.png"
        for name in (*Generation.model_fields, "image", "mask", "image_url", "url"):
            served.generate(**{name: url})
            served.generate(**{name: {"url": url}})
        for name in (*Edit.model_fields, "image", "mask", "image_url", "url"):
            served.edit(
                {"image": PNG} if name != "image" else {}, **{name: url, "steps": "3"} if name != "steps" else {}
            )
        assert served.generate(prompt=url).status_code == 200
        with pytest.raises(TimeoutError):
            trap.accept()
    assert found == []


def test_what_is_uploaded_is_written_nowhere(served: Served) -> None:
    noisy = png(Image.effect_noise((900, 900), 90).convert("RGB"))
    assert len(noisy) > 1 << 20  # the size from which starlette would have put it into a file
    with heard() as found:
        for name in ("../../../../tmp/out.png", "/etc/passwd", "C:\\a.png", "a\0b", ".", "x" * 3000):
            answer = served.client.post("/v1/images/edits", files={"image": (name, noisy)}, data={"steps": "3"})
            assert answer.status_code == 200
            assert "out.png" not in answer.text
    assert found == []


@pytest.mark.parametrize(
    "model",
    [
        "../shapes",
        "/etc/passwd",
        "shapes\0",
        "..%2fshapes",
        "SHAPES",
        "shapes/",
        "shapes ",
        "",
        ".",
        "\ud800",
        "x" * 5000,
    ],
)
def test_a_model_s_name_is_compared_and_never_looked_for(served: Served, model: str) -> None:
    with heard() as found:
        content = json.dumps({"prompt": "a", "model": model})
        answer = served.client.post("/v1/images/generations", content=content, headers=JSON)
        assert answer.status_code in (400, 404)
        quoted = urllib.parse.quote(model.encode("utf-8", "surrogatepass"), safe="")
        for path in (f"/v1/models/x{quoted}", f"/v2/models/x{quoted}", f"/v2/models/x{quoted}/ready"):
            assert served.client.get(path, follow_redirects=True).status_code == 404
    assert found == []
