"""What was lost twice is not tried again for a while."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image

from ldmrt.errors import Quarantined
from ldmrt.serving.quarantine import Quarantine

from .test_order import order


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_lost_twice_is_refused_for_a_while() -> None:
    clock = Clock()
    quarantine = Quarantine(clock)
    for _ in range(2):
        quarantine.check(order())
        quarantine.lost([order(), order()])  # twice the same at once count once
    for refused in (60.0, 120.0, 240.0):
        began = clock.now
        with pytest.raises(Quarantined, match=rf"for {refused:.0f} seconds"):
            quarantine.check(order())
        clock.now = began + refused - 1.0
        with pytest.raises(Quarantined):
            quarantine.check(order())
        clock.now = began + refused + 1.0
        quarantine.check(order())
        quarantine.lost([order()])


def test_what_is_served_after_all_is_free() -> None:
    quarantine = Quarantine(Clock())
    for _ in range(2):
        quarantine.lost([order()])
    quarantine.served(order())
    quarantine.check(order())


def test_losses_long_past_do_not_count() -> None:
    clock = Clock()
    quarantine = Quarantine(clock)
    quarantine.lost([order()])
    clock.now = 3601.0
    quarantine.lost([order()])
    quarantine.check(order())


@pytest.mark.parametrize(
    "other",
    [{"seed": 2}, {"prompt": "b"}, {"num_images_per_prompt": 2}, {"image": Image.new("RGB", (128, 128), "red")}],
)
def test_others_are_not_concerned(other: dict[str, Any]) -> None:
    quarantine = Quarantine(Clock())
    for _ in range(2):
        quarantine.lost([order()])
    quarantine.check(order(**other))
