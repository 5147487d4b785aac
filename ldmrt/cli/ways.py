"""The ways in which `ldmrt generate` makes pictures: by the model alone, with a refiner, or put together of several parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ldmrt.errors import BadRequest
from ldmrt.extension import Extension

if TYPE_CHECKING:
    from ldmrt.composition import Composition
    from ldmrt.pipeline import Pipeline, Result
    from ldmrt.refining import Refining
    from ldmrt.request import Job


class Way(Protocol):
    """How pictures are made.

    Attributes:
        settings: what `--json` tells of it.
        titles: what the pictures' own text tells of it.
    """

    @property
    def settings(self) -> dict[str, Any]: ...

    @property
    def titles(self) -> dict[str, object]: ...

    def plan(self, pipe: Pipeline, job: Job) -> int:
        """The steps of each picture."""
        ...

    def draw(
        self, pipe: Pipeline, seeds: Sequence[int], own: Mapping[str, Any], **arguments: Any
    ) -> Result | Composition:
        """Make pictures.

        Args:
            pipe: the model.
            seeds: one for each image.
            own: arguments for it alone.
            arguments: for a refiner too.
        """
        ...


@dataclass(frozen=True)
class Alone:
    """The model makes them."""

    settings: dict[str, Any]
    titles: dict[str, object]

    def plan(self, pipe: Pipeline, job: Job) -> int:
        """See `Way`, as for the next."""
        return pipe.table(job).num_steps

    def draw(self, pipe: Pipeline, seeds: Sequence[int], own: Mapping[str, Any], **arguments: Any) -> Result:
        """See `Way`."""
        return pipe(**arguments, **own, **_seeded(seeds, arguments))


@dataclass(frozen=True)
class Refined:
    """A refiner finishes them."""

    refining: Refining

    @property
    def settings(self) -> dict[str, Any]:
        """See `Way`, as for the others."""
        return {"refiner": str(self.refining.refiner.bundle.path.resolve()), "refiner_start": self.refining.start}

    @property
    def titles(self) -> dict[str, object]:
        """See `Way`."""
        name = self.refining.refiner.bundle.manifest.model.name
        return {"Refiner": name, "Refiner switch at": f"{self.refining.start:g}"}

    def plan(self, pipe: Pipeline, job: Job) -> int:
        """See `Way`."""
        return self.refining.plan(pipe, job)

    def draw(self, pipe: Pipeline, seeds: Sequence[int], own: Mapping[str, Any], **arguments: Any) -> Result:
        """See `Way`."""
        return self.refining.draw(pipe, seeds, own, **arguments)


@dataclass(frozen=True)
class Extended:
    """A picture is continued beyond its edges.

    Attributes:
        size: (width, height) of the picture in pixels.
        extension: by how much.
    """

    size: tuple[int, int]
    extension: Extension

    @property
    def settings(self) -> dict[str, Any]:
        """See `Way`, as for the others."""
        return {"extend": list(self.extension)}

    @property
    def titles(self) -> dict[str, object]:
        """See `Way`."""
        return {"Extend": ", ".join(map(str, self.extension))}

    def plan(self, pipe: Pipeline, job: Job) -> int:
        """See `Way`."""
        from ldmrt.outpainting import windows

        plan = windows(pipe, self.size, self.extension, job.width, job.height)
        return len(plan.windows) * pipe.table(job).num_steps

    def draw(self, pipe: Pipeline, seeds: Sequence[int], own: Mapping[str, Any], **arguments: Any) -> Composition:
        """See `Way`."""
        from ldmrt.outpainting import outpaint

        return outpaint(pipe, extend=self.extension, **arguments, **own, **_seeded(seeds, arguments))


@dataclass(frozen=True)
class Enlarged:
    """A picture is drawn larger.

    Attributes:
        size: (width, height) of the picture in pixels.
    """

    size: tuple[int, int]
    settings: dict[str, Any]
    titles: dict[str, object]

    def plan(self, pipe: Pipeline, job: Job) -> int:
        """See `Way`, as for the next."""
        from ldmrt.enlarging import tiles

        return len(tiles(pipe, self.size, job.width, job.height)) * pipe.table(job).num_steps

    def draw(self, pipe: Pipeline, seeds: Sequence[int], own: Mapping[str, Any], **arguments: Any) -> Composition:
        """See `Way`."""
        from ldmrt.enlarging import enlarge

        return enlarge(pipe, **arguments, **own, **_seeded(seeds, arguments))


def way_of(pipe: Pipeline, refining: Refining | None, extend: Extension | None, given: Mapping[str, Any]) -> Way:
    """How pictures are made.

    Args:
        pipe: the model.
        refining: the refiner, if there is one.
        extend: by how much a picture is to be continued, if it is.
        given: the pipeline's arguments, pictures among them.

    Raises:
        BadRequest: there is no picture to continue, or a refiner would draw over it.
    """
    image = given.get("image")
    if extend is not None:
        if image is None:
            raise BadRequest("--extend continues a picture, and there is none; give --image FILE", param="extend")
        if refining is not None:
            raise BadRequest(
                "--extend keeps every pixel of a picture, and --refiner changes all of them; leave one of them out",
                param="extend",
            )
        return Extended(image.size, extend)
    if refining is not None:
        return Refined(refining)
    if pipe.bundle.manifest.model.upscaling is not None and image is not None:
        return Enlarged(image.size, {}, {})
    return Alone({}, {})


def open_refiner(
    open_bundle: Callable[[Path], Pipeline], refiner: Path | None, start: float | None, memory_budget: str | None
) -> Refining | None:
    """The refiner that finishes the pictures, if there is one.

    Raises:
        BadRequest: there is none, and a start was given; there is one, and a memory budget.
        LdmrtError: its bundle cannot be used.
    """
    from ldmrt.refining import START, Refining

    if refiner is None:
        if start is not None:
            raise BadRequest(
                "--refiner-start says nothing without --refiner; give --refiner DIR", param="refiner_start"
            )
        return None
    if memory_budget is not None:
        raise BadRequest(
            "--memory-budget is kept by one model, and --refiner brings another; leave one of them out", param="refiner"
        )
    return Refining(open_bundle(refiner), START if start is None else start)


def _seeded(seeds: Sequence[int], arguments: Mapping[str, Any]) -> dict[str, Any]:
    """A generator for each image, and how many of them each prompt has."""
    import torch

    prompt = arguments["prompt"]
    each = len(seeds) // (1 if isinstance(prompt, str) else len(prompt))
    return {"generator": [torch.Generator("cpu").manual_seed(seed) for seed in seeds], "num_images_per_prompt": each}
