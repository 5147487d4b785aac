"""Other processes' share of the processors, from a kernel whose counters are written by hand."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from ldmrt.bench.others import Others


@pytest.fixture
def own(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What this process is said to have used, in seconds."""
    used = SimpleNamespace(seconds=5.0)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_CLK_TCK": 100}[name])
    monkeypatch.setattr(os, "times", lambda: (used.seconds, 0.0, 0.0, 0.0, 0.0))
    return used


def stat(user: int, idle: int, steal: int = 0) -> str:
    return f"cpu  {user} 0 0 {idle} 0 0 0 {steal} 999 0\ncpu0 1 1 1 1\n"


def test_what_is_busy_and_not_ours_is_others(tmp_path: Path, own: SimpleNamespace) -> None:
    path = tmp_path / "stat"
    path.write_text(stat(user=1000, idle=1000))
    others = Others(path)
    # 20 seconds of two cores: 24 s busy, 6 of them stolen by another machine; 16 were ours.
    path.write_text(stat(user=1000 + 1800, idle=1000 + 1600, steal=600))
    own.seconds = 21.0
    assert others.share() == pytest.approx((24 - 16) / 40)


def test_ticks_are_coarse_but_a_share_is_not_below_nothing(tmp_path: Path, own: SimpleNamespace) -> None:
    path = tmp_path / "stat"
    path.write_text(stat(user=0, idle=0))
    others = Others(path)
    path.write_text(stat(user=100, idle=100))
    own.seconds = 7.0
    assert others.share() == 0.0


@pytest.mark.usefixtures("own")
def test_a_system_that_does_not_tell(tmp_path: Path) -> None:
    assert Others(tmp_path / "none").share() is None
