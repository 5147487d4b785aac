"""`ldmrt serve` as a process: what it says, and how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx2
import pytest

from ldmrt.cli import app
from ldmrt.errors import BadRequest
from ldmrt.serving.http import listen
from ldmrt.serving.http.keys import VARIABLE

from .conftest import PATIENCE, PROMPT


@dataclass
class Process:
    """A running `ldmrt serve`, and what it logs."""

    popen: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)

    def read(self) -> None:
        assert self.popen.stderr is not None
        self.lines.extend(iter(self.popen.stderr.readline, ""))

    def logged(self, word: str) -> str:
        """The first line with a word, waited for."""
        end = time.monotonic() + PATIENCE
        while True:
            for line in list(self.lines):
                if word in line:
                    return line
            assert time.monotonic() < end
            assert self.popen.poll() is None, self.lines
            time.sleep(0.01)

    @property
    def url(self) -> str:
        url: str = json.loads(self.logged('"listening"'))["url"]
        return url

    def generate(self, steps: int) -> httpx2.Response:
        return httpx2.post(
            f"{self.url}/v1/images/generations", json={"prompt": PROMPT, "steps": steps}, timeout=PATIENCE
        )


@contextmanager
def process(*args: str) -> Iterator[Process]:
    command = [sys.executable, "-P", "-m", "ldmrt", "serve", "--port", "0", "--device", "cpu", *args]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as popen:
        one = Process(popen)
        reader = threading.Thread(target=one.read)
        reader.start()
        try:
            yield one
        finally:
            popen.kill()
            reader.join()


def in_background(one: Process, steps: int) -> tuple[threading.Thread, list[int]]:
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(one.generate(steps).status_code))
    thread.start()
    client = httpx2.Client(base_url=one.url)
    end = time.monotonic() + PATIENCE
    while "ldmrt_requests_present 1.0" not in client.get("/metrics").text:
        assert time.monotonic() < end
    client.close()
    return thread, statuses


def test_sigterm_finishes_what_was_accepted_and_refuses_the_rest() -> None:
    with process() as one:
        thread, statuses = in_background(one, 40)
        one.popen.send_signal(signal.SIGTERM)
        one.logged("draining")
        answer = one.generate(1)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert int(answer.headers["retry-after"]) >= 1
        assert httpx2.get(f"{one.url}/health/ready").status_code == 503
        assert httpx2.get(f"{one.url}/health/live").status_code == 200
        assert one.popen.wait(PATIENCE) == 0
        thread.join()
    assert statuses == [200]
    told = [json.loads(line) for line in one.lines]  # all of it is JSON
    assert sorted(line["status"] for line in told if line.get("route") == "/v1/images/generations") == [200, 503]


def test_an_engine_that_dies_is_503_and_comes_back() -> None:
    with process() as one:
        thread, statuses = in_background(one, 150)
        pid = int(json.loads(one.logged("the engine is ready"))["pid"])
        os.kill(pid, signal.SIGKILL)
        thread.join()
        assert statuses == [503]
        assert one.generate(1).status_code == 200  # it waits for the next one
        assert httpx2.get(f"{one.url}/health/ready").status_code == 200
        assert "ldmrt_engine_restarts_total 1.0" in httpx2.get(f"{one.url}/metrics").text


def test_what_the_drain_has_no_time_for_is_503() -> None:
    with process("--drain-timeout", "0.2", "--max-steps", "900") as one:
        thread, statuses = in_background(one, 900)
        one.popen.send_signal(signal.SIGTERM)
        assert one.popen.wait(PATIENCE) == 0
        thread.join()
    assert statuses == [503]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--host", "0.0.0.0"], "there are no keys"),  # noqa: S104 - which is refused
        (["--api-key-file", "/nowhere"], "cannot be read"),
        (["--engines", "/nowhere"], "/nowhere"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("ldmrt.serving.logs.to_stderr", lambda: None)  # which is for the whole process
    with pytest.raises(SystemExit) as caught:
        app(["serve", "--port", "0", *args], prog_name="ldmrt")
    said = capsys.readouterr().err
    assert caught.value.code == 1
    assert said.count("\n") == 1
    assert said.startswith("ldmrt: ")
    assert words in said


def test_a_port_that_is_taken() -> None:
    with listen("127.0.0.1", 0) as taken, pytest.raises(BadRequest, match="cannot listen at"):
        listen("127.0.0.1", taken.getsockname()[1])
