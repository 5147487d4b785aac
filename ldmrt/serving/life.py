"""One life of the engine's process: from its start, over what it is given, to its loss."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from typing import Any, Self

from ldmrt.serving.channel import Channel, ChannelError
from ldmrt.serving.order import Order
from ldmrt.serving.ticket import Image

# Batches that are handed over at a time: one runs, and of the other what comes next is at hand when an image is finished.
_BATCHES = 2
_FAREWELL = 5.0
COMMAND = (sys.executable, "-P", "-m", "ldmrt.serving.child")


@dataclass(eq=False)
class Life:
    """A process.

    Attributes:
        process: of the system.
        channel: to it.
        heard: when it has last said something, or been given something to do after having had nothing.
        rows: of its batches, by size; none until it is ready.
        running: the images that it has, by the number under which it knows them.
        withdrawn: those that it was told to give up.
        fruitful: whether anything has come of what it was given.
    """

    process: subprocess.Popen[bytes]
    channel: Channel
    heard: float
    rows: dict[tuple[int, int], int] = field(default_factory=dict)
    running: dict[int, Image] = field(default_factory=dict)
    withdrawn: set[int] = field(default_factory=set)
    fruitful: bool = False
    _numbers: int = 0

    @classmethod
    def begin(cls, given: dict[str, Any], patience: float) -> Self:
        """Start one.

        Args:
            given: what it is to open.
            patience: seconds that a message may take once it has begun.
        """
        ours, theirs = socket.socketpair()
        ours.settimeout(patience)
        command = [*COMMAND, str(theirs.fileno()), str(os.getpid())]
        with theirs:
            # A session of its own: Ctrl-C is for this process, which then ends that one when it is time.
            process = subprocess.Popen(
                command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, start_new_session=True
            )
        life = cls(process, Channel(ours), time.monotonic())
        with contextlib.suppress(ChannelError):  # it has ended already, which is noticed where it is listened to
            life.channel.send("open", **given)
        return life

    def watch(self, start_seconds: float, step_seconds: float) -> None:
        """Find out whether it does nothing.

        Args:
            start_seconds: in which it must be ready.
            step_seconds: in which it must make a step, if it has something to do.

        Raises:
            ChannelError: it does nothing.
        """
        silent = time.monotonic() - self.heard
        if not self.rows and silent > start_seconds:
            raise ChannelError(f"it was not ready after {silent:.3g} seconds")
        if self.running and silent > step_seconds:
            raise ChannelError(f"it made no step for {silent:.3g} seconds")

    def fits(self, image: Image) -> bool:
        """Whether it has room for an image."""
        size = image.ticket.size
        rows = sum(one.ticket.rows for one in self.running.values() if one.ticket.size == size)
        return rows + image.ticket.rows <= _BATCHES * self.rows[size]

    def give(self, image: Image) -> None:
        """Let it make an image.

        Raises:
            ChannelError: it cannot be told.
        """
        if not self.running:
            self.heard = time.monotonic()
        self._numbers += 1
        self.running[self._numbers] = image
        fields, pictures = Order.of(image).parcel(image)
        self.channel.send("submit", pictures, id=self._numbers, **fields)

    def withdraw(self) -> None:
        """Tell it which images are not wanted any more.

        Raises:
            ChannelError: it cannot be told.
        """
        for number, image in self.running.items():
            if image.ticket.error is not None and number not in self.withdrawn:
                self.withdrawn.add(number)
                self.channel.send("cancel", id=number)

    def release(self, number: int) -> None:
        """It has an image no more."""
        del self.running[number]
        self.withdrawn.discard(number)

    def end(self, *, at_once: bool) -> int | None:
        """Let it end, and wait for that.

        Args:
            at_once: not even the present step is finished.

        Returns:
            Its exit code; None if it stays, as one does that hangs in the system.
        """
        if at_once:
            self.process.kill()
        self.channel.close()  # at whose end it ends
        code = self._ended()
        if code is None:
            self.process.kill()
            code = self._ended()
        return code

    def _ended(self) -> int | None:
        try:
            return self.process.wait(_FAREWELL)
        except subprocess.TimeoutExpired:
            return None
