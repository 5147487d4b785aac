"""No table of figures in a document but what the ledger, or a test that it names, says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

import tables

FIGURES = re.compile(r"<!-- figures of (?P<test>\S+) -->\n(?P<body>.*?)<!-- end of table -->", re.DOTALL)


@pytest.mark.parametrize("path", tables.DOCUMENTS, ids=lambda path: path.name)
def test_tables_are_as_the_ledger_says(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert tables.written(text) == text, "python benchmarks/tables.py writes it anew"


def test_no_table_of_performance_stands_outside() -> None:
    text = (tables.ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    marked = re.sub(r"<!-- (table:|figures of) .*?<!-- end of table -->", "", text, flags=re.DOTALL)
    assert [line for line in marked.splitlines() if line.startswith("|")] == []
    for block in FIGURES.finditer(text):
        assert (tables.ROOT / block["test"]).is_file()


def test_every_table_is_used() -> None:
    shown = "".join(path.read_text(encoding="utf-8") for path in tables.DOCUMENTS)
    assert [name for name in tables.TABLES if f"<!-- table: {name} -->" not in shown] == []


def test_a_figure_that_the_ledger_has_not_is_noticed() -> None:
    good = tables.written("<!-- table: shapes -->\n<!-- end of table -->\n")
    figure = re.findall(r"\d\.\d\d", good)[-1]
    bad = good.replace(figure, "9.99")
    assert bad != good
    assert tables.written(bad) == good


def test_the_last_row_of_its_kind_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"name": "a", "n": 1, "x": 1}, {"name": "a", "n": 2, "x": 2}, {"name": "a", "n": 1, "x": 3}, {"name": "b"}]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.find("some", "a")["x"] == 3
    assert tables.find("some", "a", n=2)["x"] == 2
    with pytest.raises(LookupError, match=r"some.jsonl has no row 'a' with \{'n': 7\}"):
        tables.find("some", "a", n=7)


def test_a_table_of_no_such_name_is_an_error() -> None:
    with pytest.raises(LookupError, match="no table is called 'speeed'; there are speed, "):
        tables.written("<!-- table: speeed -->\n<!-- end of table -->\n")
