"""The batcher: one thread that runs the model, and requests from any thread that share its batches."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import TypeVar, Unpack

import torch

from ldmrt.delivery import OutputType, check_output_type
from ldmrt.errors import BadRequest, Cancelled
from ldmrt.material import Brought
from ldmrt.pipeline import Pipeline
from ldmrt.request import Request
from ldmrt.serving.aside import AtOnce, OwnStream
from ldmrt.serving.batch import Batch
from ldmrt.serving.engine import Facts, State
from ldmrt.serving.handle import Handle, OnProgress
from ldmrt.serving.register import Errand
from ldmrt.serving.service import Service
from ldmrt.serving.ticket import Ticket
from ldmrt.serving.worker import Worker, known, one_line

T = TypeVar("T")


class Batcher(Service):
    """Runs a pipeline for many at once. Images of different requests share a batch and join and leave it between two steps.

    The pipeline is lent to the batcher until that is closed. docs/embedding.md says what may be called from where.

    Attributes:
        facts: what its model draws.
        restarts: 0: a batcher that is broken stays so.

    Args:
        pipeline: what makes the pictures.
        max_waiting: images that may wait; beyond them `submit` raises `Overloaded`.
        rows: of the model's batch at every step, so that a picture has the same bits alone and in a crowd (an image takes one row, with
            guidance two); None for the smallest of the bundle's batches that holds the images at hand, which is faster when there are few
            and changes a picture by rounding.
        overlap: decode pictures beside the next steps of others, on a stream of their own, instead of between two steps: who is under way
            does not wait for it. On a GPU and with the torch engine only; takes the memory of a decoder's tensors besides. Not yet run on a
            GPU.

    Raises:
        BadRequest: the bundle has no such batch, `max_waiting` is less than 1, the pipeline has a memory budget, or decoding cannot overlap
            here.
        Unavailable: the pipeline is lent already.
    """

    restarts = 0

    def __init__(
        self, pipeline: Pipeline, *, max_waiting: int = 64, rows: int | None = None, overlap: bool = False
    ) -> None:
        super().__init__("batcher", max_waiting)
        if pipeline.memory_budget is not None:
            raise BadRequest(
                "the pipeline has a memory budget, and a batcher encodes, denoises and decodes side by side, with all engines in memory: "
                "open the bundle without memory_budget, or call the pipeline itself",
                param="memory_budget",
            )
        self._pipeline = pipeline
        self.facts = Facts.of(pipeline)
        self._batches = {size: Batch(pipeline, size, rows) for size in pipeline.defaults.sizes}
        if overlap:
            pipeline.set_decoder_apart()
        aside = OwnStream(pipeline.device) if overlap else AtOnce()
        self._worker = Worker(pipeline, self._register, self._batches, aside, alone=rows is not None)
        self._begin()

    def submit(
        self,
        request: Request,
        *,
        priority: int = 0,
        timeout: float | None = None,
        output_type: OutputType = "pil",
        on_progress: OnProgress | None = None,
        previews: int = 0,
        **brought: Unpack[Brought],
    ) -> Handle:
        """Hand in a request. It is checked and tokenized here, on the caller's thread, and never waits for the model.

        Args:
            request: what is wanted.
            priority: the greater starts first, however long the others have waited.
            timeout: seconds from now in which all its pictures must be finished.
            output_type: `pil`, `np` or `latent`, as of `Pipeline.__call__`.
            on_progress: called on the batcher's thread after every step of every image, and should be quick; what it raises ends this
                request alone.
            previews: pictures of each image on its way that `on_progress` gets, evenly spaced.
            brought: pictures, classes and the like, as of `Pipeline.__call__`.

        Raises:
            BadRequest: a value cannot be used; the error names it.
            EngineMismatch: the batches have no room for guidance.
            Overloaded: too many images wait; `retry_after` says for how long.
            Unavailable: the batcher is closed, or broken.
        """
        with self._register.receiving():
            check_output_type(output_type)
            if previews < 0 or (previews and on_progress is None):
                raise BadRequest(
                    f"previews is {previews}, expected 0 or more, with on_progress to get them", param="previews"
                )
            now, due = self._deadline(timeout)
            job, material = self._pipeline.resolve(request, **brought)
            ticket: Ticket
            ticket = Ticket(
                handle=Handle(job, lambda: self._register.fail(ticket, Cancelled("the request was withdrawn"))),
                job=job,
                table=self._pipeline.table(job),
                windows=self._pipeline.tokenize(job),
                material=material,
                output_type=output_type,
                previews=previews,
                on_progress=on_progress,
                priority=priority,
                submitted=now,
                due=due,
            )
            self._batches[ticket.size].check(ticket)
            self._register.add(ticket)
        return ticket.handle

    def call(self, work: Callable[[Pipeline], T]) -> Future[T]:
        """Do something to the pipeline between two steps, such as loading a LoRA. Images under way go on with what it left.

        Args:
            work: called on the batcher's thread; it may not make pictures.

        Raises:
            Unavailable: the batcher is closed, or broken.
        """
        future: Future[T] = Future()
        future.set_running_or_notify_cancel()

        def run() -> None:
            try:
                future.set_result(work(self._pipeline))
            except Exception as error:  # noqa: BLE001 - it belongs to the caller, whatever it is
                future.set_exception(error)

        self._register.add_errand(Errand(run, future))
        return future

    def _run(self) -> None:
        try:
            with self._pipeline.lend(), torch.inference_mode():
                self._state = State.READY
                self._begun.set_result(None)
                while (errands := self._register.wait()) is not None:
                    self._worker.turn(errands)
        except Exception as error:  # noqa: BLE001 - a thread that ends must leave nobody waiting
            if not self._begun.done():
                self._begun.set_exception(error)
                return
            with contextlib.suppress(RuntimeError):  # of a GPU that answers no more
                self._worker.stop()
            self._state = State.BROKEN
            broken = f"the batcher is broken ({one_line(error)}): close it and make a new one"
            self._register.abandon(partial(known, error), broken)
