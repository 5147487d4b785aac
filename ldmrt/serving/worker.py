"""The batcher's thread: what happens between two steps of the model, and the steps."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ldmrt.delivery import delivered
from ldmrt.errors import LdmrtError, NumericalError
from ldmrt.pipeline import Pipeline, Result
from ldmrt.serving.aside import Aside, Pending, Tensors
from ldmrt.serving.batch import Batch
from ldmrt.serving.handle import Progress
from ldmrt.serving.register import Errand, Register
from ldmrt.serving.ticket import Image, Ticket

# Images that may be decoded while others go on; each takes memory.
_MOST_ASIDE = 16


class _Stepped(NamedTuple):
    """An image after a step, if anybody wants to know of it.

    Attributes:
        image: the image.
        step: which step it has made.
        latents: (C, h, w) float32 on the device, a copy.
        done: whether it has made the last one, and left.
        wanted: (C, h, w), what is to be decoded, if anything.
    """

    image: Image
    step: int
    latents: torch.Tensor
    done: bool
    wanted: torch.Tensor | None


class _Shown(NamedTuple):
    """A step that is to be told of, when what it shows is there.

    Attributes:
        stepped: the step.
        pending: latents of several images and, if they are wanted, their pictures; None if nothing is shown.
        row: which of them is this image's.
    """

    stepped: _Stepped
    pending: Pending | None = None
    row: int = 0


class Worker:
    """Serves the requests of a register. All of it runs on one thread, to which the pipeline's engines are lent.

    Args:
        pipeline: what makes the pictures.
        register: where requests come in, and are ended.
        batches: by size.
        aside: decodes.
        alone: whether prompts and pictures go through the model one by one, so that they are the same in every crowd.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        register: Register,
        batches: Mapping[tuple[int, int], Batch],
        aside: Aside,
        *,
        alone: bool,
    ) -> None:
        self._pipeline, self._register, self._batches, self._alone = pipeline, register, batches, alone
        self._aside = aside
        self._showing: deque[_Shown] = deque()
        self._model_seconds = 0.0
        self._sound = True  # whether a step has succeeded since the last failure
        self._pending: list[torch.cuda.Event] = []

    def turn(self, errands: list[Errand]) -> None:
        """All that happens between two steps, and the next step of every batch.

        Raises:
            Exception: the engines have failed twice, and nothing succeeded in between.
        """
        began, self._model_seconds = time.perf_counter(), 0.0
        if errands:  # which may change the weights
            self._tell_all(wait=True)
        for errand in errands:
            errand.run()
        self._register.expire()
        self._leave()
        self._join()
        made = sum(self._step(batch) for batch in self._batches.values() if batch.images)
        self._tell_all(wait=not made)
        seconds = time.perf_counter() - began
        if made:
            self._register.worked(made, seconds)
        self._register.count(model_seconds=self._model_seconds, own_seconds=seconds - self._model_seconds)

    def stop(self) -> None:
        """Leave the slots free for others."""
        self._showing.clear()
        for batch in self._batches.values():
            batch.clear()

    # ------------------------------------------------------------------------------------------------ joining and leaving

    def _leave(self) -> None:
        """Take images out of the batches whose request has got an error."""
        for batch in self._batches.values():
            for image in batch.images:
                if image.ticket.error is not None:
                    batch.release(image)
                    self._register.left(image)

    def _join(self) -> None:
        """Let waiting images into the batches, as many as there is room for."""
        joining: dict[tuple[int, int], list[Image]] = {size: [] for size in self._batches}

        def fits(image: Image) -> bool:
            return self._batches[image.ticket.size].fits(image, joining[image.ticket.size])

        while (image := self._register.start(fits)) is not None:
            joining[image.ticket.size].append(image)
        for size, images in joining.items():
            if images:
                with self._model():
                    self._admit(self._batches[size], images)

    def _admit(self, batch: Batch, images: list[Image]) -> None:
        try:
            batch.reserve(images)
            texts = self._pipeline.embed([(image.job(), image.windows) for image in images], together=not self._alone)
        except Exception as error:  # noqa: BLE001 - an engine may raise anything
            self._fail(images, error)
            return
        for image, text in zip(images, texts, strict=True):
            try:
                batch.admit(image, text)
            except Exception as error:  # noqa: BLE001 - the others are not concerned
                self._fail([image], error)

    def _fail(self, images: list[Image], error: BaseException) -> None:
        for image in images:
            self._register.fail(image.ticket, known(error))
            self._register.left(image)

    # ------------------------------------------------------------------------------------------------ steps

    def _step(self, batch: Batch) -> int:
        """A step of a batch; how many images made it."""
        try:
            with self._model():
                made = batch.step()
                self._keep_pace()
        except Exception as error:
            # It may have spoilt any image of the batch.
            lost = batch.images
            batch.clear()
            self._fail(lost, error)
            if not self._sound:
                raise
            self._sound = False
            return 0
        self._sound = True
        self._register.count(steps=1, evaluations=made)
        with self._model():
            self._showing += self._shown(self._look(batch))
        return made

    def _keep_pace(self) -> None:
        """Let the GPU be at most one step behind, so that what is decided between two steps is decided in time."""
        if self._pipeline.device.type == "cuda":
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(self._pipeline.device))
            self._pending.append(event)
            if len(self._pending) > 1:
                self._pending.pop(0).synchronize()

    def _look(self, batch: Batch) -> list[_Stepped]:
        """What is to be told or decoded of a step. Images that are done leave the batch."""
        found = []
        for image in batch.images:
            ticket, made = image.ticket, batch.made(image)
            step, done = int(ticket.table.steps[made - 1]), made == image.evaluations
            if not done and (step < 0 or ticket.on_progress is None):
                continue
            latents, wanted = batch.latents(image), None
            if step in ticket.preview_steps and ticket.on_progress is not None:
                wanted = batch.estimate(image)
            if done:
                wanted = None if ticket.output_type == "latent" else latents
                batch.release(image)
            found.append(_Stepped(image, step, latents, done, wanted))
        return found

    # ------------------------------------------------------------------------------------------------ what comes of a step

    def _shown(self, stepped: Sequence[_Stepped]) -> list[_Shown]:
        """Steps with what they show, which is begun: pictures of those that are wanted, and the latents of those that are done."""
        decoded = [one for one in stepped if one.wanted is not None]
        kept = [one for one in stepped if one.done and one.wanted is None]
        groups = [[one] for one in decoded] if self._alone else [decoded] if decoded else []
        shown: dict[Image, _Shown] = {}
        for group in [*groups, *([kept] if kept else [])]:
            pending = self._begun(group)
            shown |= {one.image: _Shown(one, pending, row) for row, one in enumerate(group)}
        return [shown.get(one.image, _Shown(one)) for one in stepped]

    def _begun(self, group: Sequence[_Stepped]) -> Pending | None:
        """The latents of some steps, and pictures of those that are to be decoded. None if it fails, with which their requests end."""

        def work() -> Tensors:
            latents = torch.stack([one.latents if one.wanted is None else one.wanted for one in group])
            if group[0].wanted is None:
                return (latents,)
            return latents, self._pipeline.decode(latents, group[0].image.ticket.size)

        try:
            return self._aside.begin(work)
        except Exception as error:  # noqa: BLE001 - an engine may raise anything
            self._spoilt(group, error)
            return None

    def _spoilt(self, group: Sequence[_Stepped], error: Exception) -> None:
        for one in group:
            self._register.fail(one.image.ticket, known(error))

    def _tell_all(self, *, wait: bool) -> None:
        """Tell of steps, in the order in which they were made.

        Args:
            wait: for what they show, instead of leaving it to a later turn.
        """
        while self._showing:
            first = self._showing[0]
            if not (wait or first.pending is None or first.pending.ready() or self._behind() > _MOST_ASIDE):
                return
            self._showing.popleft()
            tensors: Tensors = ()
            if first.pending is not None:
                try:
                    with self._model():
                        tensors = first.pending.result()
                except Exception as error:  # noqa: BLE001 - an engine may raise anything
                    self._spoilt([first.stepped], error)
            self._tell(first.stepped, *(tensor[first.row] for tensor in tensors))

    def _behind(self) -> int:
        """How many images are being decoded, or are to be told of."""
        return sum(one.pending is not None for one in self._showing)

    def _tell(self, one: _Stepped, latents: torch.Tensor | None = None, picture: torch.Tensor | None = None) -> None:
        """What a step means for its request.

        Args:
            one: the step.
            latents: what is shown, (C, h, w) on the CPU.
            picture: of it, (3, H, W).
        """
        image, ticket = one.image, one.image.ticket
        if ticket.on_progress is not None and ticket.error is None and one.step >= 0:
            preview = None
            finite = latents is not None and bool(latents.isfinite().all())
            own = one.latents.clone() if one.done else one.latents  # a caller may write over its copy
            try:
                if picture is not None and finite and one.step in ticket.preview_steps:
                    (preview,) = delivered(picture[None], "pil")
                ticket.on_progress(Progress(image.number, one.step, ticket.job.num_inference_steps, own, preview))
            except Exception as error:  # noqa: BLE001 - it is the caller's, who gets it back; or there is NaN in the picture
                self._register.fail(ticket, error)
        if one.done:
            self._finish(image, latents, picture)

    def _finish(self, image: Image, latents: torch.Tensor | None, picture: torch.Tensor | None) -> None:
        """Keep an image that is done; with the last of its request that is served."""
        ticket = image.ticket
        if latents is None:  # which could not be had: the request has an error
            pass
        elif latents.isfinite().all():
            # A tensor made in inference mode could not be used in a caller's own computation.
            with torch.inference_mode(mode=False):
                ticket.latents[image.number] = torch.empty(latents.shape).copy_(latents)
            if picture is not None:
                ticket.pictures[image.number] = picture
        else:
            message = f"the latents of image {image.number} hold NaN or infinite values"
            advice = "use a wider dtype (float32), or a smaller guidance scale"
            self._register.fail(ticket, NumericalError(f"{message}: {advice}"))
        self._register.left(image)
        if ticket.error is None and len(ticket.latents) == ticket.job.num_images:
            self._serve(ticket)

    def _serve(self, ticket: Ticket) -> None:
        numbers = range(ticket.job.num_images)
        try:
            with torch.inference_mode(mode=False):
                latents = torch.stack([ticket.latents[number] for number in numbers])
            pictures = [ticket.pictures[number] for number in numbers if ticket.output_type != "latent"]
            images = latents
            if pictures:
                images = delivered(ticket.material.finished(torch.stack(pictures)), ticket.output_type)
        except LdmrtError as error:  # NaN in a picture
            self._register.fail(ticket, error)
            return
        now = self._register.clock()
        started = ticket.started or now
        timings = {"wait": started - ticket.submitted, "run": now - started}
        self._register.serve(ticket, Result(images, latents, ticket.job.seeds, timings, ticket.job))

    @contextmanager
    def _model(self) -> Iterator[None]:
        """Counts the time inside as the model's."""
        began = time.perf_counter()
        yield
        self._model_seconds += time.perf_counter() - began


def known(error: BaseException) -> LdmrtError:
    """An error of an engine as one of ours, one for each who gets it."""
    if isinstance(error, LdmrtError):
        return error
    failure = LdmrtError(f"the engine failed: {one_line(error)}")
    failure.__cause__ = error
    return failure


def one_line(error: BaseException) -> str:
    """An error's type and message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
