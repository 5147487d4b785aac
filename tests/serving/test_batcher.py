"""Many requests at once: each as it would be alone, whatever happens to the others."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import ldmrt
from ldmrt.errors import (
    BadRequest,
    Cancelled,
    DeadlineExceeded,
    EngineMismatch,
    LdmrtError,
    NumericalError,
    Overloaded,
    Unavailable,
)
from ldmrt.pipeline import Pipeline, Result
from ldmrt.request import Request
from ldmrt.serving import Batcher, Handle, Progress
from ldmrt.serving.batch import Batch

# Sums in another order, in float32.
ROUNDING = 1e-5
# Past these steps and guidance the model of random weights makes NaN.
OVERFLOWING = 3e38
PATIENCE = 60.0


@pytest.fixture
def pipe(tiny_bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(tiny_bundle, "cpu")


def request(number: int = 0, **fields: Any) -> Request:
    """One of many: other prompts, seeds, samplers, steps and guidance."""
    ways: list[dict[str, Any]] = [
        {"prompt": "a red circle", "num_inference_steps": 3},
        {"prompt": "the blue square", "sampler": "euler a", "num_inference_steps": 7, "guidance_scale": 3.0},
        {"prompt": "a photo", "num_inference_steps": 5, "guidance_scale": 1.0},
        {"prompt": "green", "sampler": "heun", "num_inference_steps": 4, "negative_prompt": "white"},
        {"prompt": "big", "num_inference_steps": 6, "guidance_rescale": 0.7, "clip_skip": 1},
        {"prompt": "small", "sampler": "dpm++ 2m karras", "num_inference_steps": 2},
        {"prompt": "a (red:1.4) circle", "emphasis": True, "variation_seed": 9, "variation_strength": 0.3},
    ]
    return Request(**{**ways[number % len(ways)], "seed": 100 + number, **fields})


def arguments(one: Request) -> dict[str, Any]:
    """A request as a call is given it."""
    return {name: value for name, value in vars(one).items() if value is not None and not name.startswith("has_")}


class Gate:
    """Holds the batcher's thread at a step of its request until it is opened."""

    def __init__(self, batcher: Batcher, *, step: int = 0, **fields: Any) -> None:
        self.reached, self._open = threading.Event(), threading.Event()

        def wait(progress: Progress) -> None:
            if progress.step == step:
                self.reached.set()
                assert self._open.wait(PATIENCE)

        self.handle = batcher.submit(request(**{"num_inference_steps": 4, **fields}), on_progress=wait)
        assert self.reached.wait(PATIENCE)

    def open(self) -> None:
        self._open.set()


@contextmanager
def held(batcher: Batcher, **fields: Any) -> Iterator[Gate]:
    gate = Gate(batcher, **fields)
    try:
        yield gate
    finally:
        gate.open()


def finishing(handles: dict[str, Handle]) -> list[str]:
    """The names of requests in the order in which they end."""
    names = {handle.future: name for name, handle in handles.items()}
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    for future in list(names):
        future.add_done_callback(lambda future: ended.put(names[future]))
    return [ended.get(timeout=PATIENCE) for _ in handles]


def accounted(batcher: Batcher) -> bool:
    s = batcher.stats()
    return s.received == s.served + s.failed + s.rejected + s.cancelled + s.present


def close_to(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).norm() / other.norm() < ROUNDING)


# ---------------------------------------------------------------------------------------------------- the same picture


def test_a_picture_has_the_same_bits_alone_and_in_a_crowd(pipe: Pipeline) -> None:
    requests = [request(number, num_images_per_prompt=1 + number % 2) for number in range(12)]
    with Batcher(pipe, rows=4) as batcher:
        alone = [batcher.submit(one, output_type="np").result(PATIENCE) for one in requests]
        before = batcher.stats()
        with held(batcher):
            handles = [batcher.submit(one, output_type="np") for one in reversed(requests)]
        crowd = [handle.result(PATIENCE) for handle in reversed(handles)]
        after = batcher.stats()
    for one, other in zip(alone, crowd, strict=True):
        assert torch.equal(one.latents, other.latents)
        assert np.array_equal(one.images, other.images)
        assert one.job == other.job
    shared = (after.evaluations - before.evaluations) / (after.steps - before.steps)
    assert shared > 1.5  # of at most two with guidance, four without
    assert accounted(batcher)


def test_it_is_the_picture_of_a_call(pipe: Pipeline) -> None:
    """To the bit where the call runs on engines of as many rows; else sums may be taken in another order."""
    requests = [request(number) for number in range(7)]
    fields = [{**arguments(one), "output_type": "np"} for one in requests]
    expected = [pipe(**one) for one in fields]
    with Batcher(pipe, rows=2) as batcher:
        exact = [batcher.submit(one, output_type="np") for one in requests]
        for handle, want in zip(exact, expected, strict=True):
            found = handle.result(PATIENCE)
            if want.job.do_cfg:
                assert torch.equal(found.latents, want.latents)
                assert np.array_equal(found.images, want.images)
            else:
                assert close_to(found.latents, want.latents)
    with Batcher(pipe) as batcher:
        for handle, want in zip([batcher.submit(one, output_type="np") for one in requests], expected, strict=True):
            found = handle.result(PATIENCE)
            assert close_to(found.latents, want.latents)
            assert np.abs(found.images - want.images).max() < 1e-4
    assert torch.equal(pipe(**fields[0]).latents, expected[0].latents)  # the pipeline is free again


def test_images_join_and_leave_between_two_steps(pipe: Pipeline) -> None:
    """A short request that comes later is finished first; every step runs on the smallest engines."""
    with Batcher(pipe) as batcher:
        with held(batcher, num_inference_steps=12) as gate:
            late = batcher.submit(request(num_inference_steps=2, seed=5))
        assert finishing({"long": gate.handle, "late": late}) == ["late", "long"]
        stats = batcher.stats()
        (denoiser,) = pipe._denoisers._denoisers.values()
    assert (stats.steps, stats.evaluations) == (12, 14)
    assert denoiser.batches == [2, 4]
    assert (stats.served, stats.present, stats.running) == (2, 0, 0)
    assert stats.model_seconds > 0
    assert stats.own_seconds > 0


def test_texts_of_another_length_and_more_evaluations_than_there_is_room_for(pipe: Pipeline) -> None:
    """They wait until the batch has run empty, and nobody overtakes them into it for ever."""
    long_text = request(prompt="a b c " * 60, num_inference_steps=2)
    many = request(num_inference_steps=70, sampler="heun")
    with Batcher(pipe) as batcher, held(batcher):
        handles = [batcher.submit(one) for one in (request(1), long_text, request(2), many, request(3))]
    for handle, one in zip(handles, (request(1), long_text, request(2), many, request(3)), strict=True):
        assert close_to(handle.result(0).latents, pipe(**arguments(one), output_type="latent").latents)


def test_inpainting(tiny_bundle_inpainting: Path) -> None:
    pipe = Pipeline.from_bundle(tiny_bundle_inpainting, "cpu")
    picture = Image.effect_mandelbrot((64, 64), (-2, -2, 1, 1), 50).convert("RGB")
    mask = Image.linear_gradient("L")
    want = pipe("a", seed=3, num_inference_steps=3, image=picture, mask_image=mask)
    with Batcher(pipe, rows=2) as batcher:
        asked = request(prompt="a", seed=3, num_inference_steps=3)
        found = batcher.submit(asked, image=picture, mask_image=mask).result(PATIENCE)
        with pytest.raises(BadRequest, match="image is missing"):
            batcher.submit(asked)
    assert torch.equal(found.latents, want.latents)
    assert np.array_equal(np.asarray(found.images[0]), np.asarray(want.images[0]))


# ---------------------------------------------------------------------------------------------------- on the way


def test_progress_and_previews(pipe: Pipeline) -> None:
    found: list[Progress] = []
    with Batcher(pipe, rows=4) as batcher:
        asked = request(num_inference_steps=8, num_images_per_prompt=2)
        result = batcher.submit(asked, on_progress=found.append, previews=3).result(PATIENCE)
        plain = batcher.submit(asked).result(PATIENCE)
    assert torch.equal(plain.latents, result.latents)
    for image in (0, 1):
        mine = [progress for progress in found if progress.image == image]
        assert [progress.step for progress in mine] == list(range(8))
        assert {progress.steps for progress in mine} == {8}
        assert torch.equal(mine[-1].latents.cpu(), result.latents[image])
        previews = {progress.step: progress.preview for progress in mine if progress.preview is not None}
        assert list(previews) == [1, 3, 5]
        # They come nearer.
        final = np.asarray(result.images[image], dtype=float)
        away = [np.abs(np.asarray(preview, dtype=float) - final).mean() for preview in previews.values()]
        assert away[0] > away[-1]


def test_what_a_callback_gets_is_its_own(pipe: Pipeline) -> None:
    with Batcher(pipe, rows=2) as batcher:
        spoilt = batcher.submit(request(), on_progress=lambda progress: progress.latents.zero_()).result(PATIENCE)
        assert torch.equal(batcher.submit(request()).result(PATIENCE).latents, spoilt.latents)
        assert spoilt.latents.any()


def test_a_callback_that_raises_ends_its_request_alone(pipe: Pipeline) -> None:
    def refuse(progress: Progress) -> None:
        if progress.step == 1:
            raise ZeroDivisionError("mine")

    with Batcher(pipe) as batcher:
        with held(batcher) as gate:
            bad = batcher.submit(request(1), on_progress=refuse)
            good = batcher.submit(request(2))
        with pytest.raises(ZeroDivisionError, match="mine"):
            bad.result(PATIENCE)
        for handle in (gate.handle, good):
            assert handle.result(PATIENCE).latents.isfinite().all()
        assert accounted(batcher)
        assert batcher.stats().failed == 1


def test_a_coroutine_waits_and_withdraws(pipe: Pipeline) -> None:
    async def main() -> tuple[list[Result], Batcher]:
        async with Batcher(pipe) as batcher:
            gate = await asyncio.to_thread(Gate, batcher)
            doomed = asyncio.ensure_future(awaited(batcher.submit(request(1))))
            await asyncio.sleep(0)
            doomed.cancel()
            with pytest.raises(asyncio.CancelledError):
                await doomed
            handles = [batcher.submit(request(number)) for number in range(3)]
            gate.open()
            results = await asyncio.gather(*handles)
            assert (await gate.handle).seeds == (100,)
        return results, batcher

    async def awaited(handle: Handle) -> Result:
        return await handle

    results, batcher = asyncio.run(main())
    assert [result.seeds for result in results] == [(100,), (101,), (102,)]
    assert batcher.stats().cancelled == 1
    with pytest.raises(Unavailable, match="the batcher is closed"):
        batcher.submit(request())


# ---------------------------------------------------------------------------------------------------- load


def test_a_full_queue_refuses_at_once_and_says_when(pipe: Pipeline) -> None:
    with Batcher(pipe, max_waiting=2) as batcher:
        batcher.submit(request()).result(PATIENCE)  # the pace has been measured
        with held(batcher, num_images_per_prompt=2):
            accepted = [batcher.submit(request(number)) for number in (1, 3)]
            for number in range(10):
                with pytest.raises(
                    Overloaded, match="2 images wait, expected at most 2 with the 1 of this request"
                ) as e:
                    batcher.submit(request(number))
                assert 0 < e.value.retry_after < 10
            assert batcher.stats().waiting == 2
        for handle in accepted:
            handle.result(PATIENCE)
        with pytest.raises(BadRequest, match="the request is for 3 images, expected at most 2") as caught:
            batcher.submit(request(num_images_per_prompt=3))
        assert caught.value.param == "num_images_per_prompt"
        assert batcher.stats().rejected == 11
        assert accounted(batcher)


def test_the_wait_is_what_the_backlog_takes(pipe: Pipeline) -> None:
    """Twice the steps, twice the wait; before anything was measured, a second."""
    with Batcher(pipe, max_waiting=4) as batcher:
        waits = []
        with held(batcher, num_images_per_prompt=2):
            for steps in (10, 20):
                waiting = [batcher.submit(request(num_inference_steps=steps)) for _ in range(4)]
                with pytest.raises(Overloaded) as caught:
                    batcher.submit(request(num_inference_steps=steps))
                waits.append(caught.value.retry_after)
                for handle in waiting:
                    handle.cancel()
            batcher._register._pace = 0.25
            for steps in (10, 20):
                waiting = [batcher.submit(request(num_inference_steps=steps)) for _ in range(4)]
                with pytest.raises(Overloaded) as caught:
                    batcher.submit(request(num_inference_steps=steps, num_images_per_prompt=2))
                waits.append(caught.value.retry_after)
                for handle in waiting:
                    handle.cancel()
    assert waits == [1.0, 1.0, 5.0, 10.0]


def test_priorities(pipe: Pipeline) -> None:
    with Batcher(pipe, rows=2) as batcher:
        with held(batcher):
            handles = {
                "low": batcher.submit(request(seed=1), priority=-1),
                "usual": batcher.submit(request(seed=2)),
                "high": batcher.submit(request(seed=3, num_inference_steps=9), priority=5),
            }
        assert finishing(handles) == ["high", "usual", "low"]


def test_deadlines(pipe: Pipeline) -> None:
    """In the queue, and between two steps; the time that a test needs does not matter, the clock is its own."""
    with Batcher(pipe, rows=2) as batcher:
        now = [0.0]
        batcher._register.clock = lambda: now[0]
        gate = Gate(batcher, step=1)
        waiting = batcher.submit(request(1), timeout=5.0)
        patient = batcher.submit(request(2), timeout=100.0)
        now[0] = 6.0
        gate.open()
        with pytest.raises(DeadlineExceeded, match="not finished after 6 seconds"):
            waiting.result(PATIENCE)
        assert patient.result(PATIENCE).timings == {"wait": 6.0, "run": 0.0}

        def slow(progress: Progress) -> None:
            now[0] += 3.0
            steps.append(progress.step)

        steps: list[int] = []
        running = batcher.submit(request(num_inference_steps=9), timeout=8.0, on_progress=slow)
        with pytest.raises(DeadlineExceeded, match="not finished after 9 seconds"):
            running.result(PATIENCE)
        assert steps == [0, 1, 2]
        assert batcher.stats().failed == 2
        assert accounted(batcher)


def test_what_is_withdrawn_stops_and_hurts_nobody(pipe: Pipeline) -> None:
    expected = pipe("the blue square", seed=9, num_inference_steps=3, output_type="latent").latents
    with Batcher(pipe, rows=2) as batcher:
        steps: list[int] = []
        gate = Gate(batcher, num_inference_steps=40)
        queued = batcher.submit(request(1))
        assert queued.cancel()
        assert not queued.cancel()
        with pytest.raises(Cancelled):
            queued.result(0)  # at once: nobody waits for the model
        several = batcher.submit(
            request(num_images_per_prompt=3, num_inference_steps=9), on_progress=lambda p: steps.append(p.step)
        )
        assert gate.handle.cancel()
        assert not gate.handle.done()  # it runs, and stops after its step
        gate.open()
        with pytest.raises(Cancelled):
            gate.handle.result(PATIENCE)
        several.result(PATIENCE)
        assert not several.cancel()
        for _ in range(3):
            doomed = batcher.submit(request(num_inference_steps=60))
            doomed.cancel()
            after = batcher.submit(request(prompt="the blue square", seed=9, num_inference_steps=3))
            assert torch.equal(after.result(PATIENCE).latents, expected)
        assert batcher.stats().cancelled == 5
        assert accounted(batcher)


# ---------------------------------------------------------------------------------------------------- failures


def test_nan_is_an_error_and_never_a_picture(pipe: Pipeline) -> None:
    with Batcher(pipe) as batcher:
        with held(batcher) as gate:
            bad = batcher.submit(request(1, guidance_scale=OVERFLOWING))
            good = batcher.submit(request(2))
        with pytest.raises(NumericalError, match="the latents of image 0 hold NaN or infinite values"):
            bad.result(PATIENCE)
        for handle in (gate.handle, good):
            assert handle.result(PATIENCE).latents.isfinite().all()
        previewed: list[Progress] = []
        bad = batcher.submit(request(1, guidance_scale=OVERFLOWING), on_progress=previewed.append, previews=6)
        with pytest.raises(NumericalError):
            bad.result(PATIENCE)
        assert all(progress.preview is None for progress in previewed if progress.step > 1)


def test_an_engine_that_fails_costs_those_in_the_batch(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Batch.step
    failures = iter([True, False])

    def fail(batch: Batch) -> int:
        if next(failures, False):
            raise RuntimeError("out of\nluck")
        return step(batch)

    with Batcher(pipe, rows=2) as batcher:
        gate = Gate(batcher)
        later = batcher.submit(request(1))
        monkeypatch.setattr(Batch, "step", fail)
        gate.open()
        with pytest.raises(LdmrtError, match="the engine failed: RuntimeError: out of luck") as caught:
            gate.handle.result(PATIENCE)
        assert isinstance(caught.value.__cause__, RuntimeError)
        assert later.result(PATIENCE).latents.isfinite().all()
        assert accounted(batcher)


def test_an_engine_that_goes_on_failing_breaks_the_batcher(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everybody is told, nobody waits for ever, and the pipeline is free."""

    def fail(batch: Batch) -> int:
        raise RuntimeError("gone")

    with Batcher(pipe, rows=2) as batcher:
        gate = Gate(batcher)
        handles = [batcher.submit(request(number)) for number in range(4)]
        monkeypatch.setattr(Batch, "step", fail)
        gate.open()
        for handle in (gate.handle, *handles):
            with pytest.raises(LdmrtError, match="gone"):
                handle.result(PATIENCE)
        batcher._thread.join(PATIENCE)
        with pytest.raises(
            Unavailable, match=r"the batcher is broken \(RuntimeError: gone\): close it and make a new one"
        ):
            batcher.submit(request())
        with pytest.raises(Unavailable, match="broken"):
            batcher.call(lambda pipe: None)
        assert accounted(batcher)
    assert pipe("a", num_inference_steps=1, output_type="latent").latents.isfinite().all()


@pytest.mark.parametrize("stage", ["embed", "admit", "decode"])
def test_what_fails_for_one_request(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    work = getattr(Pipeline, stage)
    failing = iter([True])

    def fail(*arguments: Any, **options: Any) -> Any:
        if next(failing, False):
            raise RuntimeError("no memory")
        return work(*arguments, **options)

    with Batcher(pipe, rows=4) as batcher:
        with held(batcher, num_inference_steps=8) as gate:
            bad = batcher.submit(request(0))
            monkeypatch.setattr(Pipeline, stage, fail)
        with pytest.raises(LdmrtError, match="the engine failed: RuntimeError: no memory"):
            bad.result(PATIENCE)
        assert gate.handle.result(PATIENCE).latents.isfinite().all()
        assert batcher.submit(request(0)).result(PATIENCE).latents.isfinite().all()
        assert accounted(batcher)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"output_type": "jpg"}, "output_type"),
        ({"timeout": 0.0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"previews": 2}, "previews"),
        ({"previews": -1, "on_progress": print}, "previews"),
        ({"image": np.zeros((8, 8, 3))}, "image"),
    ],
)
def test_values_that_cannot_be_used(pipe: Pipeline, options: dict[str, Any], param: str) -> None:
    with Batcher(pipe) as batcher:
        with pytest.raises(BadRequest) as caught:
            batcher.submit(request(), **options)
        assert caught.value.param == param
        with pytest.raises(BadRequest, match="num_inference_steps"):
            batcher.submit(request(num_inference_steps=0))
        assert batcher.stats().rejected == 2
        assert accounted(batcher)


def test_batches_that_are_not_there(pipe: Pipeline) -> None:
    with pytest.raises(BadRequest, match="rows is 3, and the bundle has 1, 2, 4 for 64x64"):
        Batcher(pipe, rows=3)
    with pytest.raises(BadRequest, match="max_waiting is 0"):
        Batcher(pipe, max_waiting=0)
    with pytest.raises(BadRequest, match=r"a memory budget, and a batcher .* open the bundle without memory_budget"):
        Batcher(Pipeline.from_bundle(pipe.bundle.path, "cpu", memory_budget="1GB"))
    with Batcher(pipe, rows=1) as batcher:
        with pytest.raises(EngineMismatch, match="guidance takes 2 rows an image, and the batch has 1"):
            batcher.submit(request())
        assert batcher.submit(request(2)).result(PATIENCE).latents.isfinite().all()


# ---------------------------------------------------------------------------------------------------- who may do what


def test_the_pipeline_is_lent(
    pipe: Pipeline, tiny_model: Path, tmp_path: Path, write_lora: Callable[..., Path]
) -> None:
    lora = write_lora(tmp_path / "style.safetensors", tiny_model)
    asked = request(num_inference_steps=3)
    with Batcher(pipe, rows=2) as batcher:
        for forbidden in (lambda: pipe("a"), lambda: pipe.load_lora(lora), lambda: Batcher(pipe)):
            with pytest.raises(Unavailable, match="the pipeline is lent to a batcher"):
                forbidden()
        before = batcher.submit(asked).result(PATIENCE).latents
        batcher.call(lambda pipe: pipe.load_lora(lora)).result(PATIENCE)
        changed = batcher.submit(asked).result(PATIENCE).latents
        assert not close_to(changed, before)
        assert batcher.call(lambda pipe: pipe.loras).result(PATIENCE) == {"style": 1.0}
        with pytest.raises(Unavailable):
            batcher.call(lambda pipe: pipe("a")).result(PATIENCE)
        batcher.call(lambda pipe: pipe.unload_lora("style")).result(PATIENCE)
        assert torch.equal(batcher.submit(asked).result(PATIENCE).latents, before)
    assert torch.equal(pipe(**arguments(asked)).latents, before)


def test_submitting_from_many_threads(pipe: Pipeline) -> None:
    numbers = range(24)
    found: dict[int, Result] = {}
    with Batcher(pipe, rows=4) as batcher:

        def client(mine: range) -> None:
            for number in mine:
                found[number] = batcher.submit(request(number)).result(PATIENCE)

        threads = [threading.Thread(target=client, args=(range(first, len(numbers), 6),)) for first in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
        assert batcher.stats().served == len(numbers)
        alone = [batcher.submit(request(number)).result(PATIENCE) for number in numbers]
    for number, one in zip(numbers, alone, strict=True):
        assert torch.equal(found[number].latents, one.latents)


@pytest.mark.parametrize("drain", [True, False])
def test_closing(pipe: Pipeline, drain: bool) -> None:
    batcher = Batcher(pipe, rows=2)
    gate = Gate(batcher)
    waiting = batcher.submit(request(1))
    errand = batcher.call(lambda pipe: 7)
    closing = threading.Thread(target=batcher.close, kwargs={"drain": drain})
    closing.start()
    while True:
        try:
            batcher.submit(request(2)).cancel()
        except Unavailable:
            break
    gate.open()
    closing.join(PATIENCE)
    assert not batcher._thread.is_alive()
    assert errand.result(0) == 7
    for handle in (gate.handle, waiting):
        if drain:
            assert handle.result(0).latents.isfinite().all()
        else:
            with pytest.raises(Cancelled, match="the batcher was closed"):
                handle.result(0)
    batcher.close()
    assert accounted(batcher)
    assert batcher.stats().present == 0
    assert pipe("a", num_inference_steps=1, output_type="latent").latents.isfinite().all()


def test_errors_leave_without_waiting_for_what_was_accepted(pipe: Pipeline) -> None:
    handles = []

    def fail() -> None:
        with Batcher(pipe) as batcher:
            handles.append(batcher.submit(request(num_inference_steps=900)))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    with pytest.raises(Cancelled):
        handles[0].result(0)


def test_models_without_text(tiny_model_ldm: Path, tmp_path: Path) -> None:
    built = ldmrt.build_engines(tiny_model_ldm, tmp_path / "b", dtype="float32", batch_sizes=(2,))
    pipe = Pipeline.from_bundle(built.path, "cpu")
    want = pipe(seed=3, num_inference_steps=3, num_images_per_prompt=2)
    with Batcher(pipe) as batcher:
        asked = Request(prompt="", seed=3, num_inference_steps=3, num_images_per_prompt=2)
        assert close_to(batcher.submit(asked).result(PATIENCE).latents, want.latents)
        with pytest.raises(BadRequest, match="reads no text"):
            batcher.submit(request())
