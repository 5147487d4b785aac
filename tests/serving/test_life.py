"""A process, from its start to its end."""

from __future__ import annotations

import os
import select
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ldmrt.serving.channel import ChannelError
from ldmrt.serving.life import Life

from .stand_in import IMAGES, SIZE
from .test_order import order


@pytest.fixture
def life(standing_in: Path) -> Iterator[Life]:
    """One that is ready."""
    one = Life.begin({"path": str(standing_in)}, 5.0)
    assert one.channel.receive().header["kind"] == "ready"
    one.rows = {SIZE: IMAGES}
    yield one
    one.end(at_once=True)


def quiet(life: Life) -> bool:
    return not select.select([life.channel], [], [], 0.2)[0]


def test_what_it_is_given_it_makes_unless_that_is_withdrawn(life: Life) -> None:
    wanted, unwanted = order(num_inference_steps=3), order(num_inference_steps=900)
    for one in (wanted, unwanted):
        life.give(one.images()[0])
    unwanted.error = RuntimeError()
    life.withdraw()
    life.withdraw()  # which it is told once
    ended: list[tuple[str, int]] = []
    while len(ended) < 2:
        header = life.channel.receive().header
        if header["kind"] != "step":
            ended.append((header["kind"], header["id"]))
            life.release(header["id"])
    assert sorted(ended) == [("done", 1), ("error", 2)]
    assert (life.running, life.withdrawn) == ({}, set())
    assert quiet(life)


def test_it_has_room_for_two_batches(life: Life) -> None:
    one = order(num_images_per_prompt=8, guidance_scale=5.0, num_inference_steps=900)
    taken = []
    for image in one.images():
        if life.fits(image):
            life.give(image)
            taken.append(image)
    assert len(taken) == 2 * IMAGES // 2  # of two rows each


def test_it_ends_when_it_is_let_go(life: Life) -> None:
    assert life.end(at_once=False) == 0


def test_it_ends_at_once(life: Life) -> None:
    os.kill(life.process.pid, signal.SIGSTOP)
    began = time.monotonic()
    assert life.end(at_once=True) == -signal.SIGKILL
    assert time.monotonic() - began < 2.0


def test_one_that_ends_before_it_has_begun(standing_in: Path) -> None:
    (standing_in / "mood").write_text("die", encoding="utf-8")
    one = Life.begin({}, 5.0)
    with pytest.raises(ChannelError):
        one.channel.receive()
    assert one.end(at_once=False) == 3


def test_what_is_too_long(life: Life) -> None:
    life.heard = time.monotonic() - 2.0
    life.watch(1.0, 1.0)  # it has nothing to do
    life.running[1] = order().images()[0]
    life.watch(1.0, 3.0)
    with pytest.raises(ChannelError, match="no step for 2 seconds"):
        life.watch(3.0, 1.0)
    life.running.clear()
    life.rows = {}
    with pytest.raises(ChannelError, match="not ready after 2 seconds"):
        life.watch(1.0, 3.0)
