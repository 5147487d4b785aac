"""`ldmrt serve` as a process: what it says, and how it ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx2
import pytest

from ldmrt.cli import app
from ldmrt.opening import builtin_bundle
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

    def until_metrics(self, line: str) -> None:
        """The metrics say so."""
        end = time.monotonic() + PATIENCE
        with httpx2.Client(base_url=self.url) as client:
            while line not in client.get("/metrics").text.splitlines():
                assert time.monotonic() < end
                time.sleep(0.01)

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


def running(pid: int) -> bool:
    """Whether a process is there, and no zombie that its new parent has not asked after yet."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        return False


def in_background(one: Process, steps: int) -> tuple[threading.Thread, list[int]]:
    statuses: list[int] = []
    thread = threading.Thread(target=lambda: statuses.append(one.generate(steps).status_code))
    thread.start()
    one.until_metrics("ldmrt_requests_present 1.0")
    return thread, statuses


def test_answers_are_sent_at_once() -> None:
    """Else every other one comes 40 ms later: Nagle's algorithm and the client's delayed acknowledgement wait for each other."""
    with listen("127.0.0.1", 0) as listening, socket.create_connection(listening.getsockname()):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_sigterm_loses_nothing_that_was_accepted() -> None:
    with process() as one, ThreadPoolExecutor(12) as pool, httpx2.Client(base_url=one.url, timeout=PATIENCE) as client:

        def ask(number: int) -> int:
            body = {"prompt": PROMPT, "steps": 8 + number, "stream": number % 3 == 0}
            answer = client.post("/v1/images/generations", json=body)
            assert not body["stream"] or "image_generation.completed" in answer.text
            return answer.status_code

        accepted = [pool.submit(ask, number) for number in range(12)]
        one.until_metrics("ldmrt_requests_received_total 12.0")
        one.popen.send_signal(signal.SIGTERM)
        one.logged("draining")
        answer = one.generate(1)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "draining")
        assert int(answer.headers["retry-after"]) >= 1
        assert httpx2.get(f"{one.url}/health/ready").status_code == 503
        assert httpx2.get(f"{one.url}/health/live").status_code == 200
        assert one.popen.wait(PATIENCE) == 0
        assert [future.result(PATIENCE) for future in accepted] == [200] * 12
    told = [json.loads(line) for line in one.lines]  # all of it is JSON
    routes = [line["status"] for line in told if line.get("route") == "/v1/images/generations"]
    assert sorted(routes) == [200] * 12 + [503]


def test_an_engine_that_dies_is_503_and_comes_back_and_ends_with_its_server() -> None:
    with process() as one:
        thread, statuses = in_background(one, 150)
        pid = int(json.loads(one.logged("the engine is ready"))["pid"])
        os.kill(pid, signal.SIGKILL)
        thread.join()
        assert statuses == [503]
        assert one.generate(1).status_code == 200  # it waits for the next one
        assert httpx2.get(f"{one.url}/health/ready").status_code == 200
        assert "ldmrt_engine_restarts_total 1.0" in httpx2.get(f"{one.url}/metrics").text
        pids = [json.loads(line)["pid"] for line in one.lines if "the engine is ready" in line]
        assert len(set(pids)) == 2
        one.popen.kill()
        end = time.monotonic() + 5.0
        while any(running(pid) for pid in pids):
            assert time.monotonic() < end
            time.sleep(0.01)


def test_what_the_drain_has_no_time_for_is_503() -> None:
    with process("--drain-timeout", "0.2", "--max-steps", "900") as one:
        thread, statuses = in_background(one, 900)
        one.popen.send_signal(signal.SIGTERM)
        assert one.popen.wait(PATIENCE) == 0
        thread.join()
    assert statuses == [503]


def test_a_log_that_cannot_be_written_stops_nothing() -> None:
    with listen("127.0.0.1", 0) as found:
        port = found.getsockname()[1]
    command = [sys.executable, "-P", "-m", "ldmrt", "serve", "--port", str(port), "--device", "cpu"]
    url = f"http://127.0.0.1:{port}"
    with (
        Path("/dev/full").open("w", encoding="utf-8") as full,
        subprocess.Popen(command, stdout=full, stderr=full) as popen,
    ):
        try:
            end = time.monotonic() + PATIENCE
            while popen.poll() is None and time.monotonic() < end:
                with suppress(httpx2.TransportError):
                    httpx2.get(f"{url}/health/ready")
                    break
                time.sleep(0.05)
            answer = httpx2.post(f"{url}/v1/images/generations", json={"prompt": PROMPT, "steps": 1}, timeout=PATIENCE)
            assert answer.status_code == 200
            popen.send_signal(signal.SIGTERM)
            assert popen.wait(PATIENCE) in (0, 120)  # 120: Python's own, where its last words cannot be written
        finally:
            popen.kill()


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with one bit of its weights turned."""
    folder = tmp_path_factory.mktemp("bundle") / "damaged"
    shutil.copytree(builtin_bundle(), folder)
    weights = max(folder.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    data = bytearray(weights.read_bytes())
    data[-1000] ^= 1
    weights.write_bytes(data)
    return folder


def children() -> list[str]:
    return [pid for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--host", "0.0.0.0"], "there are no keys"),  # noqa: S104 - which is refused
        (["--api-key-file", "/nowhere"], "cannot be read"),
        (["--engines", "/nowhere"], "/nowhere"),
        (["--engines", "DAMAGED"], "SHA-256"),
        (["--device", "cuda:77"], "cuda:77"),
        (["--api-key-file", "SHORT"], "key"),
        (["--port", "TAKEN"], "cannot listen at"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(
    args: list[str],
    words: str,
    damaged: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setattr("ldmrt.serving.logs.to_stderr", lambda: None)  # which is for the whole process
    short = tmp_path / "short"
    short.write_text("1234\n", encoding="utf-8")
    before = children()
    with listen("127.0.0.1", 0) as taken:
        known = {"DAMAGED": str(damaged), "SHORT": str(short), "TAKEN": str(taken.getsockname()[1])}
        args = [known.get(word, word) for word in args]
        with pytest.raises(SystemExit) as caught:
            app(["serve", "--port", "0", *args], prog_name="ldmrt")
    said = capsys.readouterr().err
    assert children() == before
    assert caught.value.code == 1
    assert said.count("\n") == 1
    assert said.startswith("ldmrt: ")
    assert words in said
