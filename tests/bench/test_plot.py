"""Pictures of reports: that they are made, hold what the report has, and load nothing."""

from __future__ import annotations

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldmrt.bench.plot import check_plot, draw, write_plot
from ldmrt.errors import BadRequest
from tests.bench.reports import PEER, case, report

pytest.importorskip("matplotlib", reason="matplotlib is in the extra `bench`")


def titles(**changes: Any) -> list[str]:
    return [axes.get_title(loc="left").split(":")[0] for axes in draw(report(**changes)).axes]


def test_there_is_a_panel_for_all_that_was_measured() -> None:
    everything = [
        "Stages",
        "Latency by batch and size",
        "Other programs",
        "Roofline of the loop, by this machine's own rates",
    ]
    assert titles(against=(PEER,)) == everything
    assert titles() == [everything[0], everything[1], everything[3]]
    assert titles(cases=(case(work=None),)) == everything[:2]


def test_stages_begin_where_the_last_one_ended() -> None:
    first, second = case(), case(engine="onnxruntime", work=None)
    axes = draw(report(cases=(first, second))).axes[0]
    bars = [(bar.get_x(), bar.get_width()) for container in axes.containers for bar in container]
    assert len(bars) == 2 * len(first.stage_seconds)
    for (start, width), (following, _) in pairwise(bars[:7]):
        assert following == pytest.approx(start + width)
    assert sum(width for _, width in bars[:7]) == pytest.approx(
        1e3 * sum(s.median for s in first.stage_seconds.values())
    )


def test_a_ratio_has_its_interval() -> None:
    axes = draw(report(against=(PEER,))).axes[2]
    [segment] = list(axes.collections[0].get_segments())  # type: ignore[attr-defined]
    assert sorted(segment[:, 0]) == pytest.approx([1.4, 1.7])


def test_a_png(tmp_path: Path) -> None:
    write_plot(report(), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > 1000
    assert [each.name for each in tmp_path.iterdir()] == ["a.png"]


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    made = report(against=(PEER,), warnings=("a <b> & c",))
    write_plot(made, tmp_path / "a.html")
    text = (tmp_path / "a.html").read_text()
    assert not re.search(r"(src|href)=.https?://|<link|@import|url\(https?:", text)
    assert "another &lt;program&gt;" in text
    assert "a &lt;b&gt; &amp; c" in text
    assert "<program>" not in text
    [document] = re.findall(r'id="report">(.*)</script>', text)
    assert json.loads(document) == made.document()


def test_other_endings_are_refused() -> None:
    with pytest.raises(BadRequest, match=r"\.png or \.html"):
        check_plot(Path("a.pdf"))


def test_without_matplotlib_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadRequest, match=r"ldmrt\[bench\]"):
        check_plot(Path("a.png"))
