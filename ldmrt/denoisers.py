"""The denoisers of a pipeline: one for each batch that is asked for, kept, since a captured step is bound to its buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ldmrt.components import CONTROLLED_STEP, STEP, controlnet, parts
from ldmrt.decoding import Decoding
from ldmrt.denoise import Denoiser
from ldmrt.engines.protocol import Engine
from ldmrt.errors import BadRequest, EngineMismatch
from ldmrt.loader import EngineLoader
from ldmrt.manifest import EngineRecord
from ldmrt.network import Parts
from ldmrt.request import Job

# Evaluations that the tables of a slot have room for at least.
_LEAST_EVALUATIONS = 64


@dataclass(frozen=True)
class _Key:
    """What a denoiser is made for. It runs engines of any batch size, and takes images of any sampler, guidance and step count."""

    size: tuple[int, int]
    tokens: int
    controls: tuple[str, ...]

    def shares_engines(self, other: _Key) -> bool:
        """Whether a step engine may be bound to both."""
        return self.size == other.size and bool(self.controls) == bool(other.controls)


def room_for(evaluations: int) -> int:
    """The evaluations that a denoiser is made for, where an image has so many: one of few different numbers."""
    return max(_LEAST_EVALUATIONS, 1 << (evaluations - 1).bit_length())


class Denoisers:
    """Makes denoisers over a bundle's engines, and keeps them.

    Args:
        loader: gives the engines.
        capture: what becomes one CUDA graph: see `ldmrt.pipeline.Pipeline.from_bundle`.
    """

    def __init__(self, loader: EngineLoader, capture: str) -> None:
        self._loader, self._capture = loader, capture
        self._denoisers: dict[_Key, Denoiser] = {}
        self._decodings: dict[tuple[Denoiser, int], Decoding] = {}

    def images_at_a_time(self, size: tuple[int, int], *, guidance: bool) -> int:
        """The largest batch that the step engines of a size run at once."""
        rows = max(self.steps(size, ()))
        return max(1, rows // (2 if guidance else 1))

    def row_counts(self, size: tuple[int, int]) -> list[int]:
        """The rows of the step engines of a size, fewest first."""
        return list(self.steps(size, ()))

    def groups(self, job: Job, tokens: Sequence[int], controls: Sequence[str] = ()) -> Iterator[list[int]]:
        """Image numbers that run together: as many as the largest step engine takes, with equally long text.

        Args:
            job: what was asked.
            tokens: for each image the length of its text embeddings.
            controls: the ControlNets in use.

        Raises:
            EngineMismatch: guidance takes two rows an image, and no step engine has two; or a ControlNet is not built for the size.
        """
        per_image = 2 if job.do_cfg else 1
        steps = self.steps((job.width, job.height), controls)
        available = sorted({rows // per_image for rows in steps} - {0})
        if not available:
            raise EngineMismatch(
                f"{self._loader.bundle.path} has no step engine of 2 rows, which guidance needs; "
                "build one with `ldmrt build-engines`"
            )
        by_tokens: dict[int, list[int]] = {}
        for number, length in enumerate(tokens):
            by_tokens.setdefault(length, []).append(number)
        for numbers in by_tokens.values():
            start = 0
            while start < len(numbers):
                count = max((n for n in available if n <= len(numbers) - start), default=available[0])
                yield numbers[start : start + count]
                start += count

    def get(
        self, size: tuple[int, int], rows: int, *, tokens: int, evaluations: int, controls: Sequence[str] = ()
    ) -> Denoiser:
        """The denoiser for a batch, with the smallest engines that run it. It is kept, and made anew only where it has not the room.

        Args:
            size: (width, height) in pixels.
            rows: of the model's batch, at most those of the largest engine.
            tokens: length of the text embeddings.
            evaluations: the most of one image.
            controls: the ControlNets in use, in order.

        Raises:
            BadRequest: the engines are made for prompts of another length.
            EngineMismatch: a ControlNet is not built for the size.
        """
        rows, records = next((r, steps) for r, steps in self.steps(size, controls).items() if r >= rows)
        check_tokens(self._loader.load(records[0]), tokens)
        key = _Key(size, tokens, tuple(controls))
        kept = self._denoisers.get(key)
        if kept is None or kept.rows < rows or kept.evaluations < evaluations:
            # Never fewer than before: who goes back and forth has nothing captured anew.
            evaluations = room_for(evaluations)
            most = (rows, evaluations) if kept is None else (max(rows, kept.rows), max(evaluations, kept.evaluations))
            # A step engine is bound to one set of buffers: whoever had it before gives it up.
            self._denoisers = {other: d for other, d in self._denoisers.items() if not key.shares_engines(other)}
            self._decodings = {of: d for of, d in self._decodings.items() if of[0] in self._denoisers.values()}
            if self._loader.plan is not None:  # which has room for one
                self.clear()
            kept = self._denoisers[key] = self._make(records, *most, tokens)
        if rows not in kept.batches:
            kept.add([self._loader.load(record) for record in records])
        return kept

    def clear(self) -> None:
        """Give up all denoisers, and with them the engines that they hold."""
        self._denoisers.clear()
        self._decodings.clear()

    def decoding(self, denoiser: Denoiser, size: tuple[int, int], images: int) -> Decoding | None:
        """The decoder behind the loop of a denoiser with so many images, if a whole image is one graph."""
        if self._loader.recorder is None or self._capture != "image":
            return None
        if (denoiser, images) not in self._decodings:
            records = self._loader.records("decoder", size)
            fitting = [r for r in records if (r.rows or 1) <= images]
            decoder = self._loader.load(max(fitting or records[:1], key=lambda r: r.rows or 1))
            self._decodings[denoiser, images] = Decoding(decoder, denoiser.slots.x[:images])
        return self._decodings[denoiser, images]

    def _make(self, records: Sequence[EngineRecord], rows: int, evaluations: int, tokens: int) -> Denoiser:
        unet, *controlnets = (self._parts(record) for record in records)
        return Denoiser(
            *unet,
            rows=rows,
            tokens=tokens,
            evaluations=evaluations,
            device=self._loader.device,
            recorder=self._loader.recorder,
            whole=self._loader.recorder is not None and self._capture in ("loop", "image"),
            generation=lambda: sum(self._loader.generation(record.component) for record in records),
            controlnets=controlnets,
        )

    def steps(self, size: tuple[int, int], controls: Sequence[str]) -> dict[int, list[EngineRecord]]:
        """By row count, fewest first, the step engines that run together: the U-Net's, then each ControlNet's.

        Raises:
            EngineMismatch: there is none.
        """
        components = [CONTROLLED_STEP if controls else STEP, *(f"{controlnet(name)}.step" for name in controls)]
        found = []
        for component in components:
            try:
                found.append({record.rows or 1: record for record in self._loader.records(component, size)})
            except EngineMismatch as error:
                if not controls:
                    raise
                raise EngineMismatch(
                    f"{error}, with --controlnet {' --controlnet '.join(controls)} --size {size[0]}x{size[1]}"
                ) from error
        common = [rows for rows in found[0] if all(rows in records for records in found)]
        if not common:
            raise EngineMismatch(
                f"{self._loader.bundle.path} has no batch size for all of {', '.join(components)}; build them together: "
                f"ldmrt build-engines MODEL --out DIR --controlnet {' --controlnet '.join(controls)}"
            )
        return {rows: [records[rows] for records in found] for rows in common}

    def _parts(self, step: EngineRecord) -> Parts:
        """The engines of the network that a step belongs to."""
        *once, _ = parts(step.component)
        context, schedule = (self._loader.load(self._loader.records(name, step.size)[0]) for name in once)
        return Parts(context, schedule, self._loader.load(step))


def check_tokens(step: Engine, tokens: int) -> None:
    """Check that a prompt's length is the engine's, if that is fixed: a dimension of a step's text inputs is free but in TensorRT plans.
    Without a prompt (0 tokens), what has the form of text is made of something else.

    Raises:
        BadRequest: it is another.
    """
    for spec in step.inputs.values():
        if tokens and len(spec.shape) == 3 and isinstance(spec.shape[1], int) and spec.shape[1] != tokens:
            raise BadRequest(
                f'the prompt takes {tokens} tokens, and this engine is made for {spec.shape[1]}: shorten it, use long_prompt="cut", '
                "or build with --engine torch",
                param="prompt",
            )
