"""Rows in slices give what all of them at once give."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from ldmrt.rows import run_rows


@pytest.mark.parametrize("rows", [None, 1, 2, 3, 4, 7])
def test_slices_give_what_the_whole_gives(rows: int | None) -> None:
    seen = []

    def engine(inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(len(inputs["x"]))
        doubled = inputs["x"] * 2
        return {"y": doubled, "hidden_states": torch.stack([doubled, inputs["x"]])}

    x = torch.arange(10.0).view(5, 2)
    found = run_rows(engine, {"x": x}, rows)
    assert torch.equal(found["y"], 2 * x)
    assert torch.equal(found["hidden_states"], torch.stack([2 * x, x]))
    assert set(seen) == {rows or 5}


def test_a_slice_may_be_larger_than_what_there_is() -> None:
    found = run_rows(dict, {"x": torch.arange(2.0)}, 7)
    assert found["x"].tolist() == [0.0, 1.0]
