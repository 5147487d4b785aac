"""What stays in memory and what comes and goes, so that a model runs within a budget.

The means are taken in this order: everything stays; text encoders and VAE are in memory only while they work; so is the denoising
network. None of them changes a picture. Only where they do not suffice are pictures decoded in tiles (`ldmrt.tiling`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from ldmrt.components import is_step
from ldmrt.errors import BadRequest
from ldmrt.manifest import EngineRecord

Stage = Literal["encode", "picture", "denoise", "decode"]
Size = tuple[int, int]

_BYTES = {
    "B": 1,
    **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)},
    **{f"{p}IB": 1024**n for n, p in enumerate("KMGT", 1)},
}


def parse_bytes(value: int | str, *, param: str) -> int:
    """Read `6GB` (10^9 bytes each), `5.5 GiB` (2^30), `800MB`, or a number of bytes.

    Raises:
        BadRequest: it is none of these, or not above 0.
    """
    found = re.fullmatch(r"([0-9]{1,20}(?:\.[0-9]{1,20})?) *([a-zA-Z]{0,3})", str(value).strip(), re.ASCII)
    factor = _BYTES.get((found[2] or "B").upper()) if found else None
    count = 0 if found is None or factor is None else int(float(found[1]) * factor)
    if count < 1:
        raise BadRequest(
            f"{param} is {str(value)[:40]!r}, expected an amount of memory, such as 6GB or 800MB", param=param
        )
    return count


@dataclass(frozen=True)
class Need:
    """What a stage of the way from prompt to picture takes.

    Attributes:
        weights: bytes by weight file of the bundle.
        working: bytes besides, by the rows that its engine takes at once, fewest first.
    """

    weights: Mapping[str, int]
    working: Mapping[int, int]


@dataclass(frozen=True)
class MemoryPlan:
    """How a request of one kind keeps within a budget.

    Attributes:
        budget: bytes allowed.
        stages: bytes in use at each stage, in order.
        files: the weight files that each stage reads.
        resident: weight files that stay in memory.
        staged: those that are in memory only for their stage.
        rows: the most rows of a step engine.
        decoder_rows: the most rows of a decoder.
        tile: width and height in pixels of the tiles that pictures are decoded in; None for whole pictures.
    """

    budget: int
    stages: Mapping[Stage, int]
    files: Mapping[Stage, tuple[str, ...]]
    resident: tuple[str, ...]
    staged: tuple[str, ...]
    rows: int
    decoder_rows: int
    tile: Size | None = None

    @property
    def needed(self) -> int:
        """Bytes in use at the stage that takes the most."""
        return max(self.stages.values())

    def allows(self, record: EngineRecord) -> bool:
        """Whether there is room for an engine of so many rows."""
        most = self.rows if is_step(record.component) else self.decoder_rows if record.component == "decoder" else None
        return most is None or (record.rows or 1) <= most

    def __str__(self) -> str:
        """In one line, for people."""
        parts = [f"{_text(self.needed)} of {_text(self.budget)}"]
        parts += [f"only while they work: {', '.join(self.staged)}" if self.staged else "everything stays in memory"]
        parts += [f"decoded in tiles of {self.tile[0]}x{self.tile[1]}"] if self.tile else []
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """In terms of JSON, in bytes."""
        return {
            "budget": self.budget,
            "needed": self.needed,
            "stages": dict(self.stages),
            "resident": list(self.resident),
            "staged": list(self.staged),
            "rows": self.rows,
            "decoder_rows": self.decoder_rows,
            "tile": None if self.tile is None else list(self.tile),
        }


def plan(
    budget: int,
    needs: Mapping[Stage, Need],
    *,
    reserve: int,
    least_rows: int,
    size: Size,
    tiles: Sequence[tuple[Size, Need]] = (),
) -> MemoryPlan:
    """The first of the means that keeps within a budget, with the largest batches that it then has room for.

    While a network is in memory, what its step works with is too: buffers and a captured graph keep their addresses.

    Args:
        budget: bytes.
        needs: of every stage, in order; `denoise` and `decode` are among them.
        reserve: bytes taken at every stage by what is not counted.
        least_rows: rows of a step that one image takes.
        size: width and height of the picture.
        tiles: smaller decoders and what `decode` takes with them, largest first.

    Raises:
        BadRequest: there is no way.
    """
    step_rows = [rows for rows in needs["denoise"].working if rows >= least_rows] or list(needs["denoise"].working)[-1:]

    def stages(needs: Mapping[Stage, Need], resident: set[str], rows: int, decoder_rows: int) -> dict[Stage, int]:
        found: dict[Stage, int] = {}
        weights = {name: nbytes for need in needs.values() for name, nbytes in need.weights.items()}
        # One file may serve two stages, each of which reads its own part.
        whole = {name: sum(need.weights.get(name, 0) for need in needs.values()) for name in weights}
        standing = needs["denoise"].working[rows]
        network = needs["denoise"].weights.keys()
        for stage, need in needs.items():
            held = sum(whole[name] for name in resident) + sum(
                nbytes for name, nbytes in need.weights.items() if name not in resident
            )
            working = need.working[{"denoise": rows, "decode": decoder_rows}.get(stage, min(need.working))]
            keeps_step = stage != "denoise" and network <= resident
            found[stage] = reserve + held + working + (standing if keeps_step else 0)
        return found

    def largest(needs: Mapping[Stage, Need], resident: set[str]) -> tuple[int, int, dict[Stage, int]] | None:
        for rows, decoder_rows in product(reversed(step_rows), sorted(needs["decode"].working, reverse=True)):
            used = stages(needs, resident, rows, decoder_rows)
            if max(used.values()) <= budget:
                return rows, decoder_rows, used
        return None

    for tile, decode in [(None, needs["decode"]), *tiles]:
        needs = {**needs, "decode": decode}
        files = tuple(dict.fromkeys(name for need in needs.values() for name in need.weights))
        for resident in (set(files), set(needs["denoise"].weights), set()):
            found = largest(needs, resident)
            if found is not None:
                rows, decoder_rows, used = found
                kept = tuple(name for name in files if name in resident)
                staged = tuple(name for name in files if name not in resident)
                read = {stage: tuple(need.weights) for stage, need in needs.items()}
                return MemoryPlan(budget, used, read, kept, staged, rows, decoder_rows, tile)
    least = stages(needs, set(), step_rows[0], min(needs["decode"].working))
    raise _refusal(budget, least, size, tiles[-1][0] if tiles else size)


def _refusal(budget: int, least: Mapping[Stage, int], size: Size, decoder: Size) -> BadRequest:
    """What to say where nothing helps: the stage that takes the most, and the cure for that."""
    stage = max(least, key=lambda name: least[name])
    smaller = f"a smaller size than {size[0]}x{size[1]}"
    cure = {
        "decode": f"build a decoder for smaller tiles: ldmrt build-engines MODEL --out DIR --decoder-tile {_half(decoder)}",
        "denoise": f"build engines for {smaller}, for fewer images at a time, or of a smaller --dtype",
        "picture": f"build engines for {smaller}",
        "encode": "build engines of a smaller --dtype",
    }[stage]
    return BadRequest(
        f"memory_budget is {_text(budget)}, and the stage {stage} alone needs {_text(least[stage])} at {size[0]}x{size[1]}; "
        f"raise it, or {cure}",
        param="memory_budget",
    )


def _half(size: Size) -> int:
    """The largest power of two below the shorter side."""
    return 1 << (min(size) - 1).bit_length() - 1


def _text(nbytes: int) -> str:
    """`5.12 GB`, or in MB below 1 GB."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 10**9 else f"{nbytes / 1e6:.1f} MB"
