"""An engine in another process: the pictures are the same, and when it dies or hangs the queue does not."""

from __future__ import annotations

import itertools
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldmrt.errors import (
    BadRequest,
    BundleError,
    Cancelled,
    DeadlineExceeded,
    LdmrtError,
    NumericalError,
    Overloaded,
    Unavailable,
)
from ldmrt.pipeline import Pipeline
from ldmrt.request import Request
from ldmrt.serving import EngineProcess, Handle
from ldmrt.serving.channel import Channel, Message
from ldmrt.serving.engine import Facts, State, Step

PATIENCE = 60.0
PROMPT = "a red circle on a white background"
STEP_SECONDS = 5.0


def until(condition: Callable[[], bool], seconds: float = PATIENCE) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has asked after yet is a zombie."""
    try:
        return "\nState:\tZ" in Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except FileNotFoundError:
        return True


def request(**fields: Any) -> Request:
    return Request(**{"prompt": PROMPT, "num_inference_steps": 3, "seed": 1, **fields})


SEEDS = itertools.count(100)


def long_request(**fields: Any) -> Request:
    """No two alike, for what is lost twice is refused."""
    return request(num_inference_steps=900, seed=next(SEEDS), **fields)


@pytest.fixture(scope="module")
def shared() -> Iterator[EngineProcess]:
    with EngineProcess(device="cpu", max_waiting=64, step_seconds=STEP_SECONDS) as one:
        yield one


@pytest.fixture
def engine(shared: EngineProcess) -> Iterator[EngineProcess]:
    """An engine that is ready, and is left so, with every request accounted for."""
    until(lambda: shared.state is State.READY)
    yield shared
    until(lambda: shared.stats().present == 0)
    s = shared.stats()
    assert s.received == s.served + s.failed + s.rejected + s.cancelled
    assert (s.waiting, s.running) == (0, 0)


@pytest.fixture(scope="module")
def shapes() -> Pipeline:
    return Pipeline.from_bundle(device="cpu")


class Running:
    """A request that has made a step, and is far from the last."""

    def __init__(self, engine: EngineProcess, **fields: Any) -> None:
        begun = threading.Event()
        self.handle = engine.submit(long_request(**fields), on_progress=lambda _: begun.set())
        assert begun.wait(PATIENCE)


# ---------------------------------------------------------------------------------------------------- the same pictures


@pytest.mark.parametrize("image", [None, Image.effect_mandelbrot((100, 140), (-2, -1.5, 1, 1.5), 20)])
def test_pictures_are_those_of_the_pipeline(engine: EngineProcess, shapes: Pipeline, image: Image.Image | None) -> None:
    fields: dict[str, Any] = {
        "negative_prompt": "blue",
        "sampler": "euler a",
        "guidance_scale": 3.0,
        "num_images_per_prompt": 3,
        **({} if image is None else {"strength": 0.7}),
    }
    made = engine.submit(request(**fields), image=image).result(PATIENCE)
    wanted = shapes(PROMPT, num_inference_steps=3, seed=1, image=image, **fields)
    assert made.seeds == wanted.seeds == (1, 2, 3)
    # Sums in another order, in float32: batches have other sizes.
    assert float((made.latents - wanted.latents).norm() / wanted.latents.norm()) < 1e-5
    for one, other in zip(made.images, wanted.images, strict=True):
        assert abs(np.asarray(one, dtype=np.int16) - np.asarray(other, dtype=np.int16)).max() <= 1


def test_variations_and_several_prompts(engine: EngineProcess, shapes: Pipeline) -> None:
    prompts = [PROMPT, "a blue square"]
    varied: dict[str, Any] = {"variation_seed": 9, "variation_strength": 0.4, "num_images_per_prompt": 2}
    made = engine.submit(request(prompt=prompts, **varied)).result(PATIENCE)
    wanted = shapes(prompts, num_inference_steps=3, seed=1, **varied)
    assert float((made.latents - wanted.latents).norm() / wanted.latents.norm()) < 1e-5


def test_facts_are_those_of_the_bundle(engine: EngineProcess, shapes: Pipeline) -> None:
    assert engine.facts == Facts.of(shapes)


def test_steps_and_previews(engine: EngineProcess) -> None:
    steps: queue.SimpleQueue[Step] = queue.SimpleQueue()
    engine.submit(request(num_inference_steps=4, num_images_per_prompt=2), on_progress=steps.put, previews=1).result(
        PATIENCE
    )
    told = [steps.get_nowait() for _ in range(8)]
    assert sorted((one.image, one.step, one.steps) for one in told) == [(i, s, 4) for i in range(2) for s in range(4)]
    assert [one.preview.size for one in told if one.preview is not None] == [(128, 128)] * 2
    assert [one.step for one in told if one.preview is not None] == [1, 1]


def test_work_is_counted(engine: EngineProcess) -> None:
    before = engine.stats()
    engine.submit(request(num_images_per_prompt=2)).result(PATIENCE)
    after = engine.stats()
    assert after.evaluations - before.evaluations == 6
    assert after.model_seconds > before.model_seconds


# ---------------------------------------------------------------------------------------------------- refused, withdrawn


@pytest.mark.parametrize(
    ("fields", "given", "param"),
    [
        ({"num_inference_steps": 0}, {}, "num_inference_steps"),
        ({"width": 64, "height": 64}, {}, "width"),
        ({"sampler": "magic"}, {}, "sampler"),
        ({"strength": 0.5}, {}, "strength"),
        ({}, {"mask_image": Image.new("L", (8, 8))}, "image"),
        ({}, {"timeout": 0.0}, "timeout"),
        ({"num_images_per_prompt": 65}, {}, "num_images_per_prompt"),
    ],
)
def test_what_cannot_be_is_refused_at_once(
    engine: EngineProcess, fields: dict[str, Any], given: dict[str, Any], param: str
) -> None:
    with pytest.raises(BadRequest) as caught:
        engine.submit(request(**fields), **given)
    assert caught.value.param == param


def test_the_queue_is_bounded(engine: EngineProcess) -> None:
    handles = [Running(engine).handle]
    with pytest.raises(Overloaded) as caught:
        handles.extend(engine.submit(request(num_inference_steps=900)) for _ in range(200))
    assert caught.value.retry_after > 0
    for handle in handles:
        handle.cancel()
    for handle in handles:
        with pytest.raises(Cancelled):
            handle.result(PATIENCE)


def test_an_error_of_the_model_comes_as_it_was(engine: EngineProcess) -> None:
    other = engine.submit(request(num_inference_steps=8))
    with pytest.raises(NumericalError):
        engine.submit(request(guidance_scale=3e38)).result(PATIENCE)
    assert other.result(PATIENCE).images


def test_a_deadline_ends_what_runs(engine: EngineProcess) -> None:
    with pytest.raises(DeadlineExceeded):
        engine.submit(request(num_inference_steps=900), timeout=0.3).result(PATIENCE)
    until(lambda: engine.stats().running == 0, 2.0)


def test_what_a_callback_raises_ends_its_request_alone(engine: EngineProcess) -> None:
    def fail(_: Step) -> None:
        raise ZeroDivisionError

    other = engine.submit(request(num_inference_steps=8))
    with pytest.raises(ZeroDivisionError):
        engine.submit(request(num_inference_steps=900), on_progress=fail).result(PATIENCE)
    assert other.result(PATIENCE).images


# ---------------------------------------------------------------------------------------------------- lost


def crowd(engine: EngineProcess) -> tuple[list[Handle], list[Handle]]:
    """Requests that the process has, and such as still wait here."""
    running = [Running(engine).handle]
    until(lambda: engine.stats().waiting == 0)
    while engine.stats().waiting == 0:
        running.append(engine.submit(long_request()))
        time.sleep(0.1)
    waiting = [running.pop(), *(engine.submit(request(seed=seed)) for seed in range(3))]
    assert engine.stats().waiting == 4
    return running, waiting


def kill(engine: EngineProcess, _: pytest.MonkeyPatch) -> float:
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    return 2.0


def hang(engine: EngineProcess, _: pytest.MonkeyPatch) -> float:
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGSTOP)
    return STEP_SECONDS + 2.0


def babble(engine: EngineProcess, monkeypatch: pytest.MonkeyPatch) -> float:
    receive, told = Channel.receive, threading.Event()

    def garbled(channel: Channel) -> Message:
        message = receive(channel)
        if told.is_set():
            return message
        told.set()
        return message._replace(header={"kind": "done", "id": message.header["id"]})

    monkeypatch.setattr(Channel, "receive", garbled)
    return 2.0


@pytest.mark.parametrize("lose", [kill, hang, babble])
def test_a_lost_process_costs_what_it_had_and_not_the_queue(
    engine: EngineProcess, lose: Callable[[EngineProcess, pytest.MonkeyPatch], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, pid = engine.restarts, engine.pid
    assert pid is not None
    running, waiting = crowd(engine)
    patience = lose(engine, monkeypatch)
    began = time.monotonic()
    for handle in running:
        with pytest.raises(Unavailable, match="the engine was lost"):
            handle.result(patience)
    assert time.monotonic() - began < patience
    assert engine.state is State.LOADING
    until(lambda: gone(pid), 2.0)
    waiting.pop(0).cancel()
    for handle in waiting:
        assert handle.result(PATIENCE).images
    assert (engine.restarts, engine.state) == (before + 1, State.READY)
    assert engine.pid != pid


def test_a_process_that_has_nothing_to_do_may_be_silent(engine: EngineProcess) -> None:
    before = engine.restarts
    time.sleep(STEP_SECONDS + 0.5)
    assert engine.submit(request()).result(PATIENCE).images
    assert engine.restarts == before


def test_deadlines_hold_while_there_is_no_process(engine: EngineProcess) -> None:
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    until(lambda: engine.state is State.LOADING)
    with pytest.raises(DeadlineExceeded):
        engine.submit(request(), timeout=0.1).result(2.0)


# ---------------------------------------------------------------------------------------------------- the end


def test_closing_finishes_or_drops_and_leaves_no_process() -> None:
    with EngineProcess(device="cpu") as one:
        pid = one.pid
        handle = one.submit(request())
    assert handle.result(0).images
    assert pid is not None
    assert gone(pid)
    assert one.state is State.CLOSED
    with pytest.raises(Unavailable):
        one.submit(request())
    one.close()


def test_a_drop_does_not_wait(shared: EngineProcess) -> None:
    until(lambda: shared.state is State.READY)
    handle = Running(shared).handle
    pid = shared.pid
    assert pid is not None
    began = time.monotonic()
    shared.close(drain=False)
    assert time.monotonic() - began < 2.0
    with pytest.raises(Cancelled):
        handle.result(0)
    assert gone(pid)


def test_a_thread_that_fails_leaves_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    with EngineProcess(device="cpu") as one:
        pid, handle = one.pid, Running(one).handle

        def fail(_: object) -> None:
            raise RuntimeError

        monkeypatch.setattr(one, "_listen", fail)
        with pytest.raises(Cancelled):
            handle.result(PATIENCE)
        until(lambda: one.state is State.BROKEN)
        with pytest.raises(Unavailable):
            one.submit(request())
    assert pid is not None
    assert gone(pid)


def test_the_process_ends_with_its_parent() -> None:
    code = """
from ldmrt.serving import EngineProcess
from ldmrt.request import Request
engine = EngineProcess(device="cpu")
engine.submit(Request(prompt="a", num_inference_steps=900, num_images_per_prompt=8))
print(engine.pid, flush=True)
engine._thread.join()
"""
    with subprocess.Popen(
        [sys.executable, "-P", "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        assert not gone(pid)
        parent.kill()
        until(lambda: gone(pid), 5.0)


def test_what_cannot_start_says_why(tmp_path: Path) -> None:
    with pytest.raises(BundleError):
        EngineProcess(tmp_path)
    with pytest.raises(BadRequest, match="device"):
        EngineProcess(device="cuda:77")
    with pytest.raises(LdmrtError, match="ready"):
        EngineProcess(device="cpu", start_seconds=0.2)
