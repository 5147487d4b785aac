"""What the stages of a request take, counted from the graphs of a bundle's engines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ldmrt.components import parts
from ldmrt.denoisers import Denoisers, room_for
from ldmrt.engines.torch import packing
from ldmrt.footprint import Footprint, footprint
from ldmrt.kernels.sampler import HISTORY
from ldmrt.loader import EngineLoader
from ldmrt.manifest import EngineRecord
from ldmrt.memory_plan import Need, Size, Stage
from ldmrt.rehearsal import weightless
from ldmrt.tiling import Tiling

# A prompt in one window of CLIP's; a step's keys and values of it are a small part of what the step works with.
_TOKENS = 77


@dataclass(frozen=True)
class Workload:
    """What decides on how much memory a request takes.

    Attributes:
        size: width and height in pixels.
        controls: the ControlNets in use.
        picture: whether a picture is encoded first.
        evaluations: for which the tables of a denoiser have room (`ldmrt.denoisers.room_for`).
    """

    size: Size
    controls: tuple[str, ...] = ()
    picture: bool = False
    evaluations: int = room_for(1)


class Needs:
    """Counts what torch engines need.

    Args:
        loader: says which engines are used; its plan is to be None, so that all of them are seen.
        denoisers: says which step engines run together.
    """

    def __init__(self, loader: EngineLoader, denoisers: Denoisers) -> None:
        self._loader, self._denoisers = loader, denoisers

    def stages(self, workload: Workload) -> dict[Stage, Need]:
        """What each stage of a request takes, in order; pictures are decoded whole.

        Raises:
            EngineMismatch: the bundle lacks an engine for it.
        """
        size, records = workload.size, self._loader.records
        needs: dict[Stage, Need] = {}
        if texts := self._loader.bundle.manifest.model.tokenizers:
            needs["encode"] = self._one_by_one([records(text)[0] for text in texts])
        if workload.picture:
            needs["picture"] = self._one_by_one(records("encoder", size)[:1])
        needs["denoise"] = self._denoising(workload)
        needs["decode"] = self._decoding(size)
        return needs

    def tiles(self, size: Size) -> list[tuple[Size, Need]]:
        """The sizes of decoders that are smaller than a picture, the largest first, and what decoding it in such tiles takes."""
        found = {record.size for record in self._loader.records("decoder") if record.size is not None}
        smaller = [tile for tile in found if tile != size and tile[0] <= size[0] and tile[1] <= size[1]]
        return [(tile, self._decoding(tile, of=size)) for tile in sorted(smaller, key=math.prod, reverse=True)]

    def _one_by_one(self, records: Sequence[EngineRecord]) -> Need:
        """Engines that run one after the other, on one row."""
        weights, working = {}, 0
        for record in records:
            (run,), weights[record.weights] = self._count([(record, record.rows or 1)])
            working = max(working, run.activations)
        return Need(weights, {1: working})

    def _decoding(self, size: Size, of: Size | None = None) -> Need:
        """Decoders of a size, for pictures of that size or, in tiles, of a larger one."""
        records = self._loader.records("decoder", size)
        runs, nbytes = self._count([(record, record.rows or 1) for record in records])
        tiles = 0 if of is None else len(Tiling(of, size))
        picture = 0 if of is None else 2 * 3 * math.prod(of) * torch.float32.itemsize
        working = {
            record.rows or 1: run.activations + picture + tiles * run.outputs // (record.rows or 1)
            for record, run in zip(records, runs, strict=True)
        }
        return Need({records[0].weights: nbytes}, working)

    def _denoising(self, workload: Workload) -> Need:
        """The networks of a step, which take turns; what they hand over stays where it is."""
        weights: dict[str, int] = {}
        working: dict[int, int] = {}
        entries = workload.evaluations + 1  # the last is where a finished slot rests
        model = self._loader.bundle.manifest.model
        latents = model.latent_channels * math.prod(side // model.downscale for side in workload.size)
        # Of a slot, for each row: the latents, those that are kept, a picture, its noise and a mask, and noise for every entry (`ldmrt.slots`).
        mask = latents // model.latent_channels
        slot = ((4 + HISTORY + entries) * latents + mask) * torch.float32.itemsize
        for rows, steps in self._denoisers.steps(workload.size, workload.controls).items():
            buffers, most = rows * slot, 0
            for step in steps:
                before = [self._loader.records(name, workload.size)[0] for name in parts(step.component)[:2]]
                counts = [rows, entries, rows]
                runs, weights[step.weights] = self._count(list(zip((*before, step), counts, strict=True)))
                context, schedule, one = runs
                buffers += context.outputs + rows * schedule.outputs + one.outputs
                most = max(most, *(run.activations for run in runs))
            working[rows] = buffers + most
        return Need(weights, working)

    def _count(self, runs: Sequence[tuple[EngineRecord, int]]) -> tuple[list[Footprint], int]:
        """What runs of engines of one weight file take, each with a number of rows; and bytes of the weights."""
        device, weights = self._loader.device, weightless()
        graphs = [(self._loader.bundle.graph(record), rows) for record, rows in runs]
        found = [footprint(graph, {"rows": rows, "tokens": _TOKENS}, weights, device) for graph, rows in graphs]
        packed = max(packing(graph) for graph, _ in graphs) if device.type == "cpu" else 0
        return found, weights.nbytes + packed
