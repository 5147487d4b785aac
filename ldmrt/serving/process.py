"""An engine in a process of its own: the queue stays here, so that a crash or a hang there costs what is in flight, and nothing else."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from pathlib import Path
from typing import Any

from ldmrt.asking import checked
from ldmrt.bundle import Bundle
from ldmrt.conditioning import Picture
from ldmrt.errors import Cancelled, EngineMismatch, LdmrtError, Unavailable
from ldmrt.opening import builtin_bundle
from ldmrt.request import Request
from ldmrt.samplers.make import sampler_table
from ldmrt.schedule import NoiseSchedule
from ldmrt.serving.channel import ChannelError, Message
from ldmrt.serving.engine import OnStep, State
from ldmrt.serving.handle import Handle
from ldmrt.serving.life import Life
from ldmrt.serving.logs import FIELDS, log
from ldmrt.serving.order import Order, scaled
from ldmrt.serving.quarantine import Quarantine
from ldmrt.serving.service import Service
from ldmrt.serving.ticket import Image
from ldmrt.serving.wire import error_of, facts_of

_TICK = 0.05
# Lives in a row of which nothing has come: after the second there is a pause before the next, and after the third nothing more is accepted.
_PAUSING, _REFUSING = 2, 3
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0


class EngineProcess(Service):
    """Makes pictures in another process, which is started again when it is lost. For everything else it is like a `Batcher`.

    The constructor waits until the process is ready. Requests wait here, in the order of fair shares; those that the process has when it
    ends, or makes no step for too long, end with `Unavailable`.

    Args:
        path: the bundle's folder; None for the built-in model.
        device: as of `Pipeline.from_bundle`, like the next.
        engine: see there.
        dtype: see there.
        threads: CPU threads for the model, 0 for torch's own choice.
        max_waiting: images that may wait.
        overlap: as of `Batcher`.
        step_seconds: in which a process that has something to do must make a step.
        start_seconds: in which it must be ready.

    Raises:
        LdmrtError: what the process says of why it cannot start.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        device: str | None = None,
        *,
        engine: str | None = None,
        dtype: str | None = None,
        threads: int = 0,
        max_waiting: int = 64,
        overlap: bool = False,
        step_seconds: float = 120.0,
        start_seconds: float = 900.0,
    ) -> None:
        super().__init__("engine", max_waiting)
        folder = builtin_bundle() if path is None else Path(path).absolute()
        self._model = Bundle.open(folder).manifest.model
        self._schedule = NoiseSchedule.from_dict(self._model.schedule)
        self._given: dict[str, Any] = {
            "path": str(folder),
            "device": device,
            "engine": engine,
            "dtype": dtype,
            "threads": threads,
            "overlap": overlap,
        }
        self._step_seconds, self._start_seconds = step_seconds, start_seconds
        self._wakes, self._waking = socket.socketpair()
        for end in (self._wakes, self._waking):
            end.settimeout(0)
        self._dropped = False
        self._life: Life | None = None
        self._quarantine = Quarantine(self._register.clock)
        self._fruitless = 0
        self._next_start, self._pause = 0.0, 0.0
        self.restarts = 0
        # The system ends the process with the thread that has started it, so that is one which stays.
        self.facts, self._most_rows = self._begin()

    @property
    def pid(self) -> int | None:
        """The process's number; None between two."""
        life = self._life
        return None if life is None else life.process.pid

    def submit(
        self,
        request: Request,
        *,
        image: Picture | None = None,
        mask_image: Picture | None = None,
        priority: int = 0,
        timeout: float | None = None,
        on_progress: OnStep | None = None,
        previews: int = 0,
    ) -> Handle:
        """Hand in a request: as of `Batcher.submit`. `on_progress` is called on the thread that speaks with the process.

        Raises:
            BadRequest: a value cannot be used; the error names it.
            EngineMismatch: the batches have no room for guidance.
            Overloaded: too many images wait; `retry_after` says for how long.
            Unavailable: it is closed, or cannot be started again.
            Quarantined: it was lost again and again while it made such a request.
        """
        with self._register.receiving():
            if self._state is State.DOWN:
                raise Unavailable("the engine cannot be started again, which is tried now and then: ask later")
            now, due = self._deadline(timeout)
            job, material = checked(self._model, self.facts.defaults, request, image=image, mask_image=mask_image)
            if job.do_cfg and self._most_rows[job.width, job.height] < 2:
                raise EngineMismatch("guidance takes 2 rows an image, and the batch has 1: build with --batch 2")
            factor = 1 if self._model.upscaling is None else self._model.downscale
            begins = (job.width // factor, job.height // factor)
            order: Order
            order = Order(
                handle=Handle(job, lambda: self._withdraw(order)),
                job=job,
                table=sampler_table(job.sampler, self._schedule, job.num_inference_steps, job.eta, job.span),
                windows=(),
                material=material,
                output_type="pil",
                previews=previews,
                on_progress=None,
                priority=priority,
                submitted=now,
                due=due,
                request=request,
                brought={
                    name: None if picture is None else scaled(picture, begins)
                    for name, picture in (("image", image), ("mask_image", mask_image))
                },
                told=on_progress,
            )
            self._quarantine.check(order)
            self._register.add(order)
        self._wake()
        return order.handle

    def close(self, *, drain: bool = True) -> None:
        """Accept nothing more, and end the process. Closing twice does nothing.

        Args:
            drain: finish what was accepted; else it ends with `Cancelled`.
        """
        self._dropped = self._dropped or not drain
        super().close(drain=drain)

    # ------------------------------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            while not (self._dropped or self._register.over()):
                self._turn()
        except Exception:  # noqa: BLE001 - a thread that ends must leave nobody waiting
            log.exception("the engine's thread has failed")
            self._state = State.BROKEN
        finally:
            self._end()

    def _turn(self) -> None:
        """Whatever is to be done now."""
        if self._life is None and time.monotonic() >= self._next_start:
            self._life = Life.begin(self._given, self._step_seconds)
        life = self._life
        heard = self._listen(life)
        self._register.expire()
        if life is None:
            return
        try:
            if heard:
                self._hear(life, life.channel.receive())
            life.watch(self._start_seconds, self._step_seconds)
            life.withdraw()
            while life.rows and (following := self._register.start(life.fits)) is not None:
                life.give(following)
        except ChannelError as error:
            self._lose(life, str(error))
        except (LookupError, TypeError, ValueError) as error:  # a message that is none of ours
            self._lose(life, f"{type(error).__name__} in what it said")

    def _listen(self, life: Life | None) -> bool:
        """Wait for the process, for whoever wakes this thread, or a little. Whether the process says something."""
        sources = select.poll()  # `select` knows no more than 1024 files, and a server may have as many clients
        sources.register(self._wakes, select.POLLIN)
        if life is not None:
            sources.register(life.channel, select.POLLIN)
        ready = {number for number, _ in sources.poll(1000 * _TICK)}
        if self._wakes.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self._wakes.recv(4096)
        return life is not None and life.channel.fileno() in ready

    def _hear(self, life: Life, message: Message) -> None:
        """What the process says."""
        header = message.header
        life.heard = time.monotonic()
        self._count(header.get("work"))
        kind = header["kind"]
        if kind == "ready":
            self._ready(life, header)
        elif "id" not in header:
            self._refused(header)
        elif (image := life.running.get(header["id"])) is not None:
            life.fruitful = True
            if kind == "step":
                self._step(image, message)
                return
            if kind == "error":
                self._register.fail(image.ticket, error_of(header))
            else:
                Order.of(image).bring(image.number, message)
            life.release(header["id"])  # not before it is understood: what is lost with the process must be there
            self._left(image)

    def _ready(self, life: Life, header: dict[str, Any]) -> None:
        life.rows = {(width, height): rows for width, height, rows in header["rows"]}
        self._state = State.READY
        log.info("the engine is ready", extra={FIELDS: {"pid": life.process.pid}})
        if not self._begun.done():
            self._begun.set_result((facts_of(header["facts"]), life.rows))

    def _refused(self, header: dict[str, Any]) -> None:
        """The process cannot start. The first time whoever waits for it is told; later it is tried again."""
        if not self._begun.done():
            self._begun.set_exception(error_of(header))
            self._dropped = True

    def _step(self, image: Image, message: Message) -> None:
        order, made = Order.of(image), Order.step(image.number, message)
        if order.told is None or order.error is not None:
            return
        try:
            order.told(made)
        except Exception as error:  # noqa: BLE001 - it is the caller's, who gets it back
            self._register.fail(order, error)

    def _left(self, image: Image) -> None:
        """An image has left the process; with the last of its request that is served."""
        order = Order.of(image)
        self._register.left(image)
        if order.error is None and (result := order.result(self._register.clock())) is not None:
            self._quarantine.served(order)
            self._register.serve(order, result)

    def _count(self, work: dict[str, float] | None) -> None:
        if work is not None:
            self._register.count(**work)
            if work["evaluations"]:
                self._register.worked(int(work["evaluations"]), work["model_seconds"] + work["own_seconds"])

    def _lose(self, life: Life, reason: str) -> None:
        """Do without a process: what it had ends, and another is started."""
        self._life = None
        lost = list(life.running.values())
        if self._begun.done():
            self.restarts += 1
            self._fruitless = 0 if life.fruitful else self._fruitless + 1
            self._pause = (
                min(_LONGEST_PAUSE, max(_FIRST_PAUSE, 2 * self._pause)) if self._fruitless >= _PAUSING else 0.0
            )
            self._state = State.DOWN if self._fruitless >= _REFUSING else State.LOADING
            self._next_start = time.monotonic() + self._pause
            self._quarantine.lost(map(Order.of, lost))
        for image in lost:  # before the process has ended, for which one that hangs in the system may take long
            self._register.fail(image.ticket, Unavailable("the engine was lost while it made this: ask again"))
            self._register.left(image)
        code = life.end(at_once=True)
        log.error("the engine was lost", extra={FIELDS: {"reason": reason, "exit_code": code, "images": len(lost)}})
        if not self._begun.done():
            self._begun.set_exception(
                LdmrtError(f"the engine's process ended with {code} before it was ready: {reason}")
            )
            self._dropped = True

    def _end(self) -> None:
        """Let the process go, and everything that was left."""
        life, self._life = self._life, None
        if life is not None:
            life.end(at_once=self._dropped)
        self._register.abandon(lambda: Cancelled("the engine was closed"), "the engine is closed: make a new one")
        if not self._begun.done():
            self._begun.set_exception(Unavailable("the engine was closed before it was ready"))
        self._wakes.close()
        self._waking.close()

    def _withdraw(self, order: Order) -> bool:
        withdrawn = self._register.fail(order, Cancelled("the request was withdrawn"))
        self._wake()
        return withdrawn

    def _wake(self) -> None:
        """Let the thread look at once."""
        with contextlib.suppress(OSError):  # it is about to look anyway, or has ended
            self._waking.send(b"\0")
