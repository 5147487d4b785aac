"""An engine in a process of its own: the queue stays here, so that a crash or a hang there costs what is in flight, and nothing else."""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from PIL import Image as Pictures

from ldmrt import errors
from ldmrt.bundle import Bundle
from ldmrt.conditioning import Picture
from ldmrt.errors import BadRequest, Cancelled, EngineMismatch, LdmrtError, Unavailable
from ldmrt.pipeline import Result, builtin_bundle, checked
from ldmrt.request import Defaults, Request
from ldmrt.samplers.make import sampler_table
from ldmrt.schedule import NoiseSchedule
from ldmrt.serving.channel import Channel, ChannelError, Message, packed, unpacked
from ldmrt.serving.engine import Facts, OnStep, State
from ldmrt.serving.handle import Handle
from ldmrt.serving.logs import FIELDS, log
from ldmrt.serving.register import Register, Stats
from ldmrt.serving.ticket import Image, Ticket

# Batches that are handed over at a time: one runs, and of the other what comes next is at hand when an image is finished.
_BATCHES = 2
_TICK = 0.05
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 30.0
_FAREWELL = 5.0


@dataclass(frozen=True)
class Made:
    """A step that was made: see `ldmrt.serving.engine.Step`."""

    image: int
    step: int
    steps: int
    preview: Pictures.Image | None


@dataclass(eq=False, kw_only=True)
class _Order(Ticket):
    """A request that is made elsewhere.

    Attributes:
        request: as it was given.
        brought: its pictures, in the size in which they are used; None for those that are not there.
        told: called with every step.
        images_made: what has come, by number.
    """

    request: Request
    brought: dict[str, Pictures.Image | None]
    told: OnStep | None
    images_made: dict[int, Pictures.Image] = field(default_factory=dict)


@dataclass(eq=False)
class _Child:
    """A process.

    Attributes:
        process: of the system.
        channel: to it.
        heard: when it has last said something, or been given something to do after having had nothing.
        rows: of its batches, by size; none until it is ready.
        running: the images that it has, by the number under which it knows them.
        withdrawn: those that it was told to give up.
    """

    process: subprocess.Popen[bytes]
    channel: Channel
    heard: float
    rows: dict[tuple[int, int], int] = field(default_factory=dict)
    running: dict[int, Image] = field(default_factory=dict)
    withdrawn: set[int] = field(default_factory=set)


class EngineProcess:
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
        step_seconds: float = 120.0,
        start_seconds: float = 900.0,
    ) -> None:
        if max_waiting < 1:
            raise BadRequest(f"max_waiting is {max_waiting}, expected 1 or more", param="max_waiting")
        folder = builtin_bundle() if path is None else Path(path).absolute()
        self._model = Bundle.open(folder).manifest.model
        self._schedule = NoiseSchedule.from_dict(self._model.schedule)
        self._given: dict[str, Any] = {
            "path": str(folder),
            "device": device,
            "engine": engine,
            "dtype": dtype,
            "threads": threads,
        }
        self._step_seconds, self._start_seconds = step_seconds, start_seconds
        self._register = Register(max_waiting)
        self._wakes, self._waking = socket.socketpair()
        for end in (self._wakes, self._waking):
            end.settimeout(0)
        self._numbers = 0
        self._dropped = False
        self._child: _Child | None = None
        self._next_start, self._pause = 0.0, 0.0
        self._state = State.LOADING
        self.restarts = 0
        self._begun: Future[tuple[Facts, dict[tuple[int, int], int]]] = Future()
        # The system ends the process with the thread that has started it, so that is one which stays.
        self._thread = threading.Thread(target=self._run, name="ldmrt-engine", daemon=True)
        self._thread.start()
        try:
            self.facts, self._most_rows = self._begun.result()
        except BaseException:
            self.close(drain=False)
            raise
        atexit.register(self.close, drain=False)

    @property
    def state(self) -> State:
        """Whether the process is ready; it is loading again after it was lost."""
        return self._state

    @property
    def pid(self) -> int | None:
        """The process's number; None between two."""
        child = self._child
        return None if child is None else child.process.pid

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
            Unavailable: it is closed.
        """
        self._register.count(received=1)
        try:
            if timeout is not None and not timeout > 0:
                raise BadRequest(f"timeout is {timeout}, expected seconds, more than 0", param="timeout")
            job, material = checked(self._model, self.facts.defaults, request, image=image, mask_image=mask_image)
            if job.do_cfg and self._most_rows[job.width, job.height] < 2:
                raise EngineMismatch("guidance takes 2 rows an image, and the batch has 1: build with --batch 2")
            now = self._register.clock()
            order: _Order
            order = _Order(
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
                due=None if timeout is None else now + timeout,
                request=request,
                brought={
                    name: None if picture is None else self._scaled(picture, (job.width, job.height))
                    for name, picture in (("image", image), ("mask_image", mask_image))
                },
                told=on_progress,
            )
            self._register.add(order)
        except LdmrtError:
            self._register.count(rejected=1)
            raise
        self._wake()
        return order.handle

    def stats(self) -> Stats:
        """What was done until now; `running` counts the images that the process has."""
        return self._register.stats()

    def close(self, *, drain: bool = True) -> None:
        """Accept nothing more, and end the process. Closing twice does nothing.

        Args:
            drain: finish what was accepted; else it ends with `Cancelled`.
        """
        dropped = None if drain else "the engine was closed before the request was finished"
        self._register.close("the engine is closed: make a new one", drop=dropped)
        self._dropped = self._dropped or not drain
        self._wake()
        if threading.current_thread() is not self._thread:
            self._thread.join()
        if self._state is not State.BROKEN:
            self._state = State.CLOSED
        atexit.unregister(self.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(drain=error is None)

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
        if self._child is None and time.monotonic() >= self._next_start:
            self._child = self._start()
        child = self._child
        heard = self._listen(child)
        self._register.expire()
        if child is None:
            return
        try:
            if heard:
                self._hear(child, child.channel.receive())
            self._watch(child)
            self._hand_out(child)
        except ChannelError as error:
            self._lose(child, str(error))
        except (LookupError, TypeError, ValueError) as error:  # a message that is none of ours
            self._lose(child, f"{type(error).__name__} in what it said")

    def _listen(self, child: _Child | None) -> bool:
        """Wait for the process, for whoever wakes this thread, or a little. Whether the process says something."""
        sources = select.poll()  # `select` knows no more than 1024 files, and a server may have as many clients
        sources.register(self._wakes, select.POLLIN)
        if child is not None:
            sources.register(child.channel, select.POLLIN)
        ready = {number for number, _ in sources.poll(1000 * _TICK)}
        if self._wakes.fileno() in ready:
            with contextlib.suppress(BlockingIOError):
                self._wakes.recv(4096)
        return child is not None and child.channel.fileno() in ready

    def _start(self) -> _Child:
        ours, theirs = socket.socketpair()
        ours.settimeout(self._step_seconds)
        command = [sys.executable, "-P", "-m", "ldmrt.serving.child", str(theirs.fileno()), str(os.getpid())]
        with theirs:
            # A session of its own: Ctrl-C is for this process, which then ends that one when it is time.
            process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )
        child = _Child(process, Channel(ours), time.monotonic())
        with contextlib.suppress(ChannelError):  # it has ended already, which the next turn sees
            child.channel.send("open", **self._given)
        return child

    def _watch(self, child: _Child) -> None:
        """Find a process that does nothing.

        Raises:
            ChannelError: it is one.
        """
        silent = time.monotonic() - child.heard
        if not child.rows and silent > self._start_seconds:
            raise ChannelError(f"it was not ready after {silent:.3g} seconds")
        if child.running and silent > self._step_seconds:
            raise ChannelError(f"it made no step for {silent:.3g} seconds")

    def _lose(self, child: _Child, reason: str) -> None:
        """Do without a process: what it had ends, and another is started."""
        child.process.kill()
        code = _ended(child.process)
        child.channel.close()
        self._child = None
        told = {"reason": reason, "exit_code": code, "images": len(child.running)}
        log.error("the engine was lost", extra={FIELDS: told})
        for image in child.running.values():
            self._register.fail(image.ticket, Unavailable("the engine was lost while it made this: ask again"))
            self._register.left(image)
        if not self._begun.done():
            self._begun.set_exception(
                LdmrtError(f"the engine's process ended with {code} before it was ready: {reason}")
            )
            self._dropped = True
            return
        self.restarts += 1
        self._state = State.LOADING
        self._pause = 0.0 if child.rows else min(_LONGEST_PAUSE, max(_FIRST_PAUSE, 2 * self._pause))
        self._next_start = time.monotonic() + self._pause

    def _end(self) -> None:
        """Let the process go, and everything that was left."""
        child, self._child = self._child, None
        if child is not None:
            child.channel.close()
            if self._dropped:
                child.process.kill()
            if _ended(child.process) is None:
                child.process.kill()
                _ended(child.process)
        self._register.abandon(lambda: Cancelled("the engine was closed"), "the engine is closed: make a new one")
        if not self._begun.done():
            self._begun.set_exception(Unavailable("the engine was closed before it was ready"))
        self._wakes.close()
        self._waking.close()

    # ------------------------------------------------------------------------------------------------ speaking with it

    def _hear(self, child: _Child, message: Message) -> None:
        """What the process says."""
        header = message.header
        child.heard = time.monotonic()
        self._count(header.get("work"))
        kind = header["kind"]
        if kind == "ready":
            self._ready(child, header)
        elif "id" not in header:
            self._refused(header)
        elif (image := child.running.get(header["id"])) is not None:
            if kind == "step":
                self._step(image, message)
                return
            if kind == "error":
                self._register.fail(image.ticket, _error(header))
            else:
                self._done(image, message)
            del child.running[header["id"]]  # not before it is understood: what is lost with the process must be there
            child.withdrawn.discard(header["id"])
            self._finish(image)

    def _ready(self, child: _Child, header: dict[str, Any]) -> None:
        child.rows = {(width, height): rows for width, height, rows in header["rows"]}
        self._state = State.READY
        log.info("the engine is ready", extra={FIELDS: {"pid": child.process.pid}})
        if not self._begun.done():
            self._begun.set_result((_facts(header["facts"]), child.rows))

    def _refused(self, header: dict[str, Any]) -> None:
        """The process cannot start. The first time whoever waits for it is told; later it is tried again."""
        if not self._begun.done():
            self._begun.set_exception(_error(header))
            self._dropped = True

    def _step(self, image: Image, message: Message) -> None:
        order, header = _order(image), message.header
        if order.told is None or order.error is not None:
            return
        preview = unpacked(message.blobs[0], header["preview"]) if message.blobs else None
        try:
            order.told(Made(image.number, header["step"], header["steps"], preview))
        except Exception as error:  # noqa: BLE001 - it is the caller's, who gets it back
            self._register.fail(order, error)

    def _done(self, image: Image, message: Message) -> None:
        order, (picture, latents) = _order(image), message.blobs
        order.images_made[image.number] = unpacked(picture, message.header["size"])
        values = np.frombuffer(latents, dtype=np.float32).reshape(message.header["latents"])
        order.latents[image.number] = torch.from_numpy(values.copy())

    def _finish(self, image: Image) -> None:
        """An image has left the process; with the last of its request that is served."""
        order = _order(image)
        self._register.left(image)
        if order.error is None and len(order.images_made) == order.job.num_images:
            numbers = range(order.job.num_images)
            now = self._register.clock()
            started = order.started or now
            timings = {"wait": started - order.submitted, "run": now - started}
            latents = torch.stack([order.latents[number] for number in numbers])
            images = [order.images_made[number] for number in numbers]
            self._register.serve(order, Result(images, latents, order.job.seeds, timings, order.job))

    def _hand_out(self, child: _Child) -> None:
        """Give the process what it has room for, and tell it what is not wanted any more."""
        if not child.rows:
            return
        for number, image in child.running.items():
            if image.ticket.error is not None and number not in child.withdrawn:
                child.withdrawn.add(number)
                child.channel.send("cancel", id=number)

        def fits(image: Image) -> bool:
            size = image.ticket.size
            rows = sum(one.ticket.rows for one in child.running.values() if one.ticket.size == size)
            return rows + image.ticket.rows <= _BATCHES * child.rows[size]

        while (following := self._register.start(fits)) is not None:
            self._numbers += 1
            if not child.running:
                child.heard = time.monotonic()
            child.running[self._numbers] = following
            self._send(child, self._numbers, following)

    def _send(self, child: _Child, number: int, image: Image) -> None:
        order, job = _order(image), image.job()
        request = replace(
            order.request,
            prompt=job.prompts[0],
            negative_prompt=job.negative_prompts[0],
            seed=job.seeds[0],
            num_images_per_prompt=1,
            variation_seed=job.variation_seeds[0] if job.variation_seeds else None,
        )
        child.channel.send(
            "submit",
            [packed(picture) for picture in order.brought.values() if picture is not None],
            id=number,
            request=asdict(request),
            previews=order.previews,
            **{name: None if picture is None else picture.size for name, picture in order.brought.items()},
        )

    def _scaled(self, picture: Picture, size: tuple[int, int]) -> Pictures.Image:
        """A picture as it will be used, which is all that need wait: in RGB, resized as `ldmrt.conditioning` does, which then finds nothing
        to do.
        """
        opened = Pictures.fromarray(picture) if isinstance(picture, np.ndarray) else picture
        factor = 1 if self._model.upscaling is None else self._model.downscale
        return opened.convert("RGB").resize((size[0] // factor, size[1] // factor), Pictures.Resampling.LANCZOS)

    def _count(self, work: dict[str, float] | None) -> None:
        if work is not None:
            self._register.count(**work)
            if work["evaluations"]:
                self._register.worked(int(work["evaluations"]), work["model_seconds"] + work["own_seconds"])

    def _withdraw(self, order: _Order) -> bool:
        withdrawn = self._register.fail(order, Cancelled("the request was withdrawn"))
        self._wake()
        return withdrawn

    def _wake(self) -> None:
        """Let the thread look at once."""
        with contextlib.suppress(OSError):  # it is about to look anyway, or has ended
            self._waking.send(b"\0")


def _ended(process: subprocess.Popen[bytes]) -> int | None:
    """The exit code of a process, waited for; None if it stays, as one does that hangs in the system."""
    try:
        return process.wait(_FAREWELL)
    except subprocess.TimeoutExpired:
        return None


def _order(image: Image) -> _Order:
    order = image.ticket
    assert isinstance(order, _Order)  # noqa: S101 - the register holds no others
    return order


def _facts(told: dict[str, Any]) -> Facts:
    defaults = told["defaults"]
    sizes = tuple((width, height) for width, height in defaults["sizes"])
    return Facts(**{**told, "defaults": Defaults(**{**defaults, "sizes": sizes})})


def _error(header: dict[str, Any]) -> LdmrtError:
    """An error as it was in the process."""
    kind = getattr(errors, header["type"], LdmrtError)
    if kind is BadRequest:
        return BadRequest(header["message"], param=header["param"])
    known = isinstance(kind, type) and issubclass(kind, LdmrtError) and kind is not errors.Overloaded
    return (kind if known else LdmrtError)(header["message"])
