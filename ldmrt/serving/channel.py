"""Messages between two processes over a socket: a header of JSON and some bytes. Nothing in them is code, and their sizes are bounded."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

_LENGTHS = struct.Struct("!IB")  # of the header in bytes, and how many blobs follow it
_BLOB = struct.Struct("!Q")
_MOST_HEADER = 1 << 20
_MOST_BLOBS = 4
_MOST_BLOB = 1 << 28


class ChannelError(Exception):
    """The other side is gone, silent, or says what it should not."""


class Message(NamedTuple):
    """A message.

    Attributes:
        header: its fields, `kind` among them.
        blobs: pictures and latents, whose shapes the header tells.
    """

    header: dict[str, Any]
    blobs: list[bytes]


class Channel:
    """One end of a connected socket. Any thread may send; one thread receives.

    Args:
        connected: the socket; its timeout bounds how long a message may take once it has begun.
    """

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._sending = threading.Lock()

    def fileno(self) -> int:
        """For `select`: readable when a message has begun to come."""
        return self._socket.fileno()

    def send(self, kind: str, blobs: Sequence[bytes] = (), **fields: Any) -> None:
        """Send a message.

        Raises:
            ChannelError: it cannot be sent.
        """
        header = json.dumps({"kind": kind, **fields}).encode("ascii")
        parts = [_LENGTHS.pack(len(header), len(blobs)), header]
        for blob in blobs:
            parts += [_BLOB.pack(len(blob)), blob]
        try:
            with self._sending:
                for part in parts:
                    self._socket.sendall(part)
        except OSError as error:
            raise ChannelError(f"nothing can be sent: {error}") from error

    def receive(self) -> Message:
        """Wait for a message.

        Raises:
            ChannelError: there will be none, or it is none.
        """
        size, count = _LENGTHS.unpack(self._exactly(_LENGTHS.size))
        if size > _MOST_HEADER or count > _MOST_BLOBS:
            raise ChannelError(f"a header of {size} bytes with {count} blobs is none of ours")
        try:
            header = json.loads(self._exactly(size))
        except ValueError as error:
            raise ChannelError("a header is no JSON") from error
        if not isinstance(header, dict) or not isinstance(header.get("kind"), str):
            raise ChannelError("a header says nothing")
        blobs = []
        for _ in range(count):
            (length,) = _BLOB.unpack(self._exactly(_BLOB.size))
            if length > _MOST_BLOB:
                raise ChannelError(f"a blob of {length} bytes is none of ours")
            blobs.append(self._exactly(length))
        return Message(header, blobs)

    def close(self) -> None:
        """Let the other side see the end."""
        self._socket.close()

    def _exactly(self, size: int) -> bytes:
        data = bytearray(size)
        view, got = memoryview(data), 0
        while got < size:
            try:
                part = self._socket.recv_into(view[got:])
            except OSError as error:
                raise ChannelError(f"nothing can be received: {error}") from error
            if not part:
                raise ChannelError("the other side is gone")
            got += part
        return bytes(data)
