"""The batcher's thread: what happens between two steps of the model, and the steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from ldmrt.errors import LdmrtError, NumericalError
from ldmrt.pipeline import Pipeline, Result, delivered
from ldmrt.serving.batch import Batch
from ldmrt.serving.handle import Progress
from ldmrt.serving.register import Errand, Register
from ldmrt.serving.ticket import Image, Ticket


class _Stepped(NamedTuple):
    """An image after a step, if anybody wants to know of it.

    Attributes:
        image: the image.
        step: which step it has made.
        latents: (C, h, w) float32 on the device, a copy.
        done: whether it has made the last one, and left.
        wanted: what is to be decoded, if anything.
    """

    image: Image
    step: int
    latents: torch.Tensor
    done: bool
    wanted: torch.Tensor | None


class Worker:
    """Serves the requests of a register. All of it runs on one thread, to which the pipeline's engines are lent.

    Args:
        pipeline: what makes the pictures.
        register: where requests come in, and are ended.
        batches: by size.
        alone: whether prompts and pictures go through the model one by one, so that they are the same in every crowd.
    """

    def __init__(
        self, pipeline: Pipeline, register: Register, batches: Mapping[tuple[int, int], Batch], *, alone: bool
    ) -> None:
        self._pipeline, self._register, self._batches, self._alone = pipeline, register, batches, alone
        self._model_seconds = 0.0
        self._sound = True  # whether a step has succeeded since the last failure
        self._pending: list[torch.cuda.Event] = []

    def turn(self, errands: list[Errand]) -> None:
        """All that happens between two steps, and the next step of every batch.

        Raises:
            Exception: the engines have failed twice, and nothing succeeded in between.
        """
        began, self._model_seconds = time.perf_counter(), 0.0
        for errand in errands:
            errand.run()
        self._register.expire()
        self._leave()
        self._join()
        made = sum(self._step(batch) for batch in self._batches.values() if batch.images)
        seconds = time.perf_counter() - began
        if made:
            self._register.worked(made, seconds)
        self._register.count(model_seconds=self._model_seconds, own_seconds=seconds - self._model_seconds)

    def stop(self) -> None:
        """Leave the slots free for others."""
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
            stepped = self._look(batch)
            pictures = self._decoded(stepped)
        for one in stepped:
            self._tell(one, pictures.get(one.image))
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

    def _decoded(self, stepped: list[_Stepped]) -> dict[Image, torch.Tensor]:
        """Pictures (3, H, W) on the CPU of those that are wanted, by image. A request whose pictures cannot be made has got an error."""
        wanted = [one for one in stepped if one.wanted is not None and bool(one.wanted.isfinite().all())]
        pictures: dict[Image, torch.Tensor] = {}
        for group in [[one] for one in wanted] if self._alone else [wanted] if wanted else []:
            latents = torch.stack([one.wanted for one in group if one.wanted is not None])
            try:
                decoded = self._pipeline.decode(latents, group[0].image.ticket.size).cpu()
            except Exception as error:  # noqa: BLE001 - an engine may raise anything
                for one in group:
                    self._register.fail(one.image.ticket, known(error))
            else:
                pictures |= {one.image: picture for one, picture in zip(group, decoded, strict=True)}
        return pictures

    def _tell(self, one: _Stepped, picture: torch.Tensor | None) -> None:
        """What a step means for its request."""
        image, ticket = one.image, one.image.ticket
        if ticket.on_progress is not None and ticket.error is None and one.step >= 0:
            preview = None
            if picture is not None and one.step in ticket.preview_steps:
                (preview,) = delivered(picture[None], "pil")
            latents = one.latents.clone() if one.done else one.latents  # a caller may write over its copy
            try:
                ticket.on_progress(Progress(image.number, one.step, ticket.job.num_inference_steps, latents, preview))
            except Exception as error:  # noqa: BLE001 - it is the caller's, who gets it back
                self._register.fail(ticket, error)
        if one.done:
            self._finish(one, picture)

    def _finish(self, one: _Stepped, picture: torch.Tensor | None) -> None:
        """Keep an image that is done; with the last of its request that is served."""
        image, ticket = one.image, one.image.ticket
        if one.latents.isfinite().all():
            # A tensor made in inference mode could not be used in a caller's own computation.
            with torch.inference_mode(mode=False):
                ticket.latents[image.number] = torch.empty(one.latents.shape).copy_(one.latents)
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
