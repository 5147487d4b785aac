"""Pictures that are decoded while others go on."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmrt.errors import BadRequest, DeadlineExceeded, LdmrtError
from ldmrt.pipeline import Pipeline
from ldmrt.request import Request
from ldmrt.serving import Batcher, Progress, batcher as of_batcher
from ldmrt.serving.aside import AtOnce, Tensors, Work

PATIENCE = 60.0


class Late:
    """Does its work when it has been asked a few times, or when somebody waits: as late as a stream may.

    Attributes:
        waited: how often somebody did.
        most: of works that were begun and not done, the most at a time.
    """

    def __init__(self, asks: int) -> None:
        self._asks = asks
        self.waited = self.most = self.undone = 0

    def begin(self, work: Work) -> Delayed:
        self.undone += 1
        self.most = max(self.most, self.undone)
        return Delayed(self, work, self._asks)


class Delayed:
    def __init__(self, late: Late, work: Work, asks: int) -> None:
        self._late, self._work, self._asks = late, work, asks
        self._made: Tensors | None = None

    def ready(self) -> bool:
        self._asks -= 1
        return self._asks < 0

    def result(self) -> Tensors:
        if self._made is None:
            self._late.waited += self._asks >= 0
            self._late.undone -= 1
            self._made = self._work()
        return self._made


@pytest.fixture
def pipe(tiny_bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(tiny_bundle, "cpu")


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> Iterator[Late]:
    found = Late(3)
    monkeypatch.setattr(of_batcher, "AtOnce", lambda: found)
    yield found
    assert found.undone == 0


def requests() -> list[Request]:
    return [
        Request(prompt="a red circle", num_inference_steps=steps, seed=steps, num_images_per_prompt=1 + steps % 2)
        for steps in (2, 9, 3, 5, 4)
    ]


def test_work_that_is_done_at_once() -> None:
    pending = AtOnce().begin(lambda: (torch.ones(2), torch.zeros(1)))
    assert pending.ready()
    assert [tensor.tolist() for tensor in pending.result()] == [[1.0, 1.0], [0.0]]
    with pytest.raises(RuntimeError):
        AtOnce().begin(lambda: (torch.ones(2) @ torch.ones(3),))


def test_the_same_pictures_and_the_same_steps(pipe: Pipeline, late: Late, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are told in their order, each with what it shows, although others have gone on meanwhile."""
    told: dict[int, list[tuple[int, int, bool]]] = {}

    def pictures(batcher: Batcher) -> list[Any]:
        handles = []
        for number, one in enumerate(requests()):
            steps = told.setdefault(number, [])

            def progress(found: Progress, steps: list[tuple[int, int, bool]] = steps) -> None:
                steps.append((found.image, found.step, found.preview is not None))

            handles.append(batcher.submit(one, output_type="np", on_progress=progress, previews=1))
        return [handle.result(PATIENCE) for handle in handles]

    with Batcher(pipe, rows=4) as overlapping:
        found = pictures(overlapping)
    assert late.most > 1, "nothing was under way at the same time as another"
    late_told = dict(told)
    told.clear()
    monkeypatch.undo()
    with Batcher(pipe, rows=4) as at_once:
        expected = pictures(at_once)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert torch.equal(one.latents, other.latents)
        assert torch.equal(torch.from_numpy(one.images), torch.from_numpy(other.images))
        for image in range(one.job.num_images):
            steps = [(step, shown) for of, step, shown in late_told[number] if of == image]
            assert steps == [(step, shown) for of, step, shown in told[number] if of == image]
            assert [step for step, _ in steps] == list(range(one.job.num_inference_steps))
            assert sum(shown for _, shown in steps) == 1


def test_the_last_picture_is_waited_for(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    never = Late(10**9)
    monkeypatch.setattr(of_batcher, "AtOnce", lambda: never)
    with Batcher(pipe) as batcher:
        assert batcher.submit(Request(prompt="a", num_inference_steps=2, seed=1)).result(PATIENCE).images
        result = batcher.submit(Request(prompt="a", num_inference_steps=2, seed=1), output_type="latent")
        assert result.result(PATIENCE).latents.isfinite().all()
    assert never.waited == 2


def test_not_too_many_are_behind(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    never = Late(10**9)
    monkeypatch.setattr(of_batcher, "AtOnce", lambda: never)
    with Batcher(pipe, rows=4, max_waiting=100) as batcher:
        long = batcher.submit(Request(prompt="a", num_inference_steps=60, seed=1))
        short = [batcher.submit(Request(prompt="a", num_inference_steps=1, seed=i)) for i in range(40)]
        for handle in (long, *short):
            handle.result(PATIENCE)
    assert 1 < never.most <= 18  # _MOST_ASIDE, and the two of the newest step
    assert never.undone == 0


def test_who_is_withdrawn_or_late_meanwhile(pipe: Pipeline, late: Late) -> None:
    with Batcher(pipe, rows=4) as batcher:
        long = batcher.submit(Request(prompt="a", num_inference_steps=40, seed=1))
        handles = [batcher.submit(Request(prompt="a", num_inference_steps=1, seed=i)) for i in range(4)]
        handles[1].cancel()
        overdue = batcher.submit(Request(prompt="a", num_inference_steps=900, seed=2), timeout=0.2)
        with pytest.raises(DeadlineExceeded):
            overdue.result(PATIENCE)
        for handle in (long, handles[0], *handles[2:]):
            assert handle.result(PATIENCE).images
        s = batcher.stats()
        assert s.received == s.served + s.failed + s.cancelled


def test_a_picture_that_cannot_be_decoded_is_an_error_of_its_own(
    pipe: Pipeline, late: Late, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = Pipeline.decode
    failing = iter([True])

    def fail(self: Pipeline, latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        if next(failing, False):
            raise RuntimeError("no memory")
        return decode(self, latents, size)

    monkeypatch.setattr(Pipeline, "decode", fail)
    with Batcher(pipe, rows=4) as batcher:
        long = batcher.submit(Request(prompt="a", num_inference_steps=12, seed=1))
        short = batcher.submit(Request(prompt="a", num_inference_steps=2, seed=2))
        with pytest.raises(LdmrtError, match="the engine failed: RuntimeError: no memory"):
            short.result(PATIENCE)
        assert long.result(PATIENCE).images
        s = batcher.stats()
        assert (s.served, s.failed) == (1, 1)


def test_a_preview_with_nan_in_it_ends_its_request_alone(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder may overflow where the latents do not."""
    decode = Pipeline.decode
    spoilt = iter([True])

    def nan(self: Pipeline, latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        found = decode(self, latents, size)
        return found * float("nan") if next(spoilt, False) else found

    monkeypatch.setattr(Pipeline, "decode", nan)
    with Batcher(pipe, rows=4) as batcher:
        long = batcher.submit(Request(prompt="a", num_inference_steps=12, seed=1))
        bad = batcher.submit(
            Request(prompt="a", num_inference_steps=5, seed=2), on_progress=lambda progress: None, previews=1
        )
        with pytest.raises(LdmrtError, match="NaN"):
            bad.result(PATIENCE)
        assert long.result(PATIENCE).images


def test_it_needs_a_gpu(pipe: Pipeline) -> None:
    with pytest.raises(BadRequest, match="decoding overlaps with steps on a GPU, and this is cpu") as caught:
        Batcher(pipe, overlap=True)
    assert caught.value.param == "overlap"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_the_pictures_are_the_same(tiny_bundle: Path) -> None:
    """Not yet run on a GPU. The same kernels on the same numbers: the bits do not depend on the stream."""
    found: dict[bool, list[Any]] = {}
    for overlap in (False, True):
        pipe = Pipeline.from_bundle(tiny_bundle, "cuda")
        with Batcher(pipe, rows=4, overlap=overlap) as batcher:
            for _ in range(5):  # the first records its graphs
                handles = [batcher.submit(one, output_type="np") for one in requests()]
                found.setdefault(overlap, []).append([handle.result(PATIENCE) for handle in handles])
    for ours, theirs in zip(found[True], found[False], strict=True):
        for one, other in zip(ours, theirs, strict=True):
            assert torch.equal(one.latents, other.latents)
            assert torch.equal(torch.from_numpy(one.images), torch.from_numpy(other.images))
