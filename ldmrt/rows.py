"""Any number of rows through an engine of a fixed number."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

# Where rows are not the first dimension.
_AXIS = {"hidden_states": 1}


def axis(name: str) -> int:
    """The dimension of an output in which its rows lie."""
    return _AXIS.get(name, 0)


def run_rows(
    run: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]],
    inputs: Mapping[str, torch.Tensor],
    rows: int | None,
) -> dict[str, torch.Tensor]:
    """Run `inputs` in slices of `rows` rows, the last one filled up by repetition; all at once if `rows` is None."""
    if rows is None:
        return run(inputs)
    count = next(iter(inputs.values())).shape[0]
    parts: list[dict[str, torch.Tensor]] = []
    for start in range(0, count, rows):
        index = (torch.arange(start, start + rows) % count).to(next(iter(inputs.values())).device)
        result = run({name: tensor[index] for name, tensor in inputs.items()})
        left = min(rows, count - start)
        parts.append({name: tensor.narrow(axis(name), 0, left) for name, tensor in result.items()})
    return {name: torch.cat([part[name] for part in parts], axis(name)) for name in parts[0]}
