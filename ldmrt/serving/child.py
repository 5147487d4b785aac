"""The engine's process: a pipeline and a batcher, which do what their parent says, and end when it ends."""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
import threading
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import torch
from PIL import Image

from ldmrt.errors import BadRequest, LdmrtError
from ldmrt.pipeline import Pipeline, Result
from ldmrt.request import Request
from ldmrt.serving.batcher import Batcher
from ldmrt.serving.channel import Channel, ChannelError, Message
from ldmrt.serving.engine import Facts
from ldmrt.serving.handle import Handle, Progress
from ldmrt.serving.logs import log, to_stderr
from ldmrt.serving.register import Stats
from ldmrt.serving.wire import error_fields, facts_fields, packed, unpacked

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
# The parent keeps the queue; what it hands over is to be begun soon.
_ROOM = 1024


class Child:
    """Serves the requests of a parent.

    Args:
        channel: to the parent.
        batcher: what makes the pictures.
    """

    def __init__(self, channel: Channel, batcher: Batcher) -> None:
        self._channel, self._batcher = channel, batcher
        self._handles: dict[int, Handle] = {}
        self._told = Stats()
        self._telling = threading.Lock()

    def serve(self) -> None:
        """Until the parent closes the channel.

        Raises:
            ChannelError: it has.
        """
        while True:
            message = self._channel.receive()
            if message.header["kind"] == "submit":
                self._submit(message)
            elif handle := self._handles.get(message.header["id"]):
                handle.cancel()

    def _submit(self, message: Message) -> None:
        header, number = message.header, int(message.header["id"])
        blobs = iter(message.blobs)
        pictures: dict[str, Any] = {
            name: unpacked(next(blobs), header[name]) for name in ("image", "mask_image") if header[name] is not None
        }
        try:
            handle = self._batcher.submit(
                Request(**header["request"]),
                on_progress=lambda progress: self._step(number, progress),
                previews=header["previews"],
                **pictures,
            )
        except LdmrtError as error:
            self._failed(number, error)
            return
        self._handles[number] = handle
        handle.future.add_done_callback(lambda future: self._ended(number, future))

    def _step(self, number: int, progress: Progress) -> None:
        preview = progress.preview
        self._send(
            "step",
            [] if preview is None else [packed(preview)],
            id=number,
            step=progress.step,
            steps=progress.steps,
            preview=None if preview is None else preview.size,
        )

    def _ended(self, number: int, future: Future[Result]) -> None:
        self._handles.pop(number, None)
        error = future.exception()
        if error is not None:
            self._failed(number, error)
            return
        result = future.result()
        (picture,), latents = result.images, result.latents[0].contiguous()
        blobs = [packed(picture), latents.numpy().tobytes()]
        self._send("done", blobs, id=number, size=picture.size, latents=list(latents.shape))

    def _failed(self, number: int, error: BaseException) -> None:
        if type(error) is LdmrtError:  # an engine's own error, which only the log may tell
            log.error("the engine failed", exc_info=error)
        self._send("error", id=number, **error_fields(error))

    def _send(self, kind: str, blobs: list[bytes] | None = None, **fields: Any) -> None:
        """A message, with what was done since the last one."""
        with self._telling:
            now, before = self._batcher.stats(), self._told
            self._told = now
        work = {
            name: getattr(now, name) - getattr(before, name)
            for name in ("steps", "evaluations", "model_seconds", "own_seconds")
        }
        with suppress(ChannelError):  # of a parent that has gone: `serve` sees it too
            self._channel.send(kind, blobs or [], work=work, **fields)


def main() -> None:
    """The process. Its arguments are the number of its socket, and that of the parent's process."""
    descriptor, parent = map(int, sys.argv[1:])
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended before it could be noticed
        return
    to_stderr()
    channel = Channel(socket.socket(fileno=descriptor))
    try:
        _serve(channel)
    except ChannelError:
        # Nobody is there whom anything could be told, and threads in the model cannot be stopped.
        os._exit(0)


def _serve(channel: Channel) -> None:
    given = channel.receive().header
    try:
        if given["threads"]:
            torch.set_num_threads(given["threads"])
        pipe = Pipeline.from_bundle(given["path"], given["device"], engine=given["engine"], dtype=given["dtype"])
        _warm(pipe)
        batcher = Batcher(pipe, max_waiting=_ROOM, overlap=given["overlap"])
    except Exception as error:  # noqa: BLE001 - the parent is told, whatever it is
        if not isinstance(error, LdmrtError):
            log.error("the engine cannot start", exc_info=error)
        channel.send("error", **error_fields(error))
        return
    rows = [[*size, pipe.row_counts(size)[-1]] for size in pipe.defaults.sizes]
    channel.send("ready", facts=facts_fields(batcher.facts), rows=rows)
    Child(channel, batcher).serve()


def _warm(pipe: Pipeline) -> None:
    """Make a picture, so that the first request finds everything loaded. Of a model that wants more than a picture nothing is made."""
    facts = Facts.of(pipe)
    size = (pipe.defaults.width, pipe.defaults.height)
    given: dict[str, Any] = {"image": Image.new("RGB", size)} if facts.needs_image else {}
    if facts.needs_mask:
        given["mask_image"] = Image.new("L", size, 255)
    with suppress(BadRequest):
        pipe("", num_inference_steps=2, seed=0, **given)


if __name__ == "__main__":
    main()
