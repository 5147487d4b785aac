"""Messages between two processes arrive as they were sent, and nothing else does."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings, strategies

import ldmrt.serving
from ldmrt.serving.channel import Channel, ChannelError

Pair = tuple[Channel, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    """The receiving end of a channel, and the socket on its other side."""
    ours, theirs = socket.socketpair()
    ours.settimeout(5)
    with ours, theirs:
        yield Channel(ours), theirs


def message(header: bytes, *blobs: bytes) -> bytes:
    text = struct.pack("!IB", len(header), len(blobs)) + header
    return text + b"".join(struct.pack("!Q", len(blob)) + blob for blob in blobs)


@settings(max_examples=30)
@given(
    strategies.dictionaries(strategies.text(), strategies.text() | strategies.integers() | strategies.none()),
    strategies.lists(strategies.binary(max_size=100), max_size=4),
)
def test_what_is_sent_arrives(fields: dict[str, object], blobs: list[bytes]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        Channel(theirs).send("some", blobs, fields=fields)
        assert Channel(ours).receive() == ({"kind": "some", "fields": fields}, blobs)


def test_messages_of_several_threads_do_not_mix() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender, receiver = Channel(theirs), Channel(ours)
        blobs = [bytes([number]) * 300_000 for number in range(8)]  # more than the socket's buffer
        threads = [threading.Thread(target=sender.send, args=("some", [blob])) for blob in blobs]
        for thread in threads:
            thread.start()
        received = sorted(receiver.receive().blobs[0] for _ in blobs)
        for thread in threads:
            thread.join()
    assert received == blobs


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"\0\0",
        message(b'{"kind": "a"}')[:-1],
        message(b'{"kind": "a"}', b"abc")[:-1],
        message(b"{"),
        message(b"[]"),
        message(b"{}"),
        message(b'{"kind": 1}'),
        message(b"\xff"),
        struct.pack("!IB", (1 << 20) + 1, 0),
        struct.pack("!IB", 2, 5),
        struct.pack("!IB", 13, 1) + b'{"kind": "a"}' + struct.pack("!Q", 1 << 60),
    ],
)
def test_what_is_no_message(pair: Pair, sent: bytes) -> None:
    channel, other = pair
    other.sendall(sent)
    other.shutdown(socket.SHUT_WR)
    with pytest.raises(ChannelError):
        channel.receive()


def test_a_message_that_stops_half_way_is_given_up(pair: Pair) -> None:
    channel, other = pair
    channel._socket.settimeout(0.05)
    other.sendall(message(json.dumps({"kind": "a"}).encode())[:-1])
    with pytest.raises(ChannelError, match="timed out"):
        channel.receive()


def test_sending_to_nobody(pair: Pair) -> None:
    channel, other = pair
    other.close()
    with pytest.raises(ChannelError):
        channel.send("some", [b"x" * 1_000_000])


def test_nothing_is_pickled() -> None:
    sources = Path(ldmrt.serving.__file__).parent.rglob("*.py")
    text = "".join(path.read_text(encoding="utf-8") for path in sources)
    assert "Channel" in text
    assert not [word for word in ("pickle", "marshal", "multiprocessing", "torch.load", "AF_INET)") if word in text]
