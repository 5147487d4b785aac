"""Draw the page docs/gallery.md: what the built-in model and its companions do, each task on real pictures."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image

import generator
import ldmrt
from edges import draw_edges
from evaluate_companions import (
    KINDS,
    NOISE,
    as_edges,
    as_mask,
    build,
    drawn,
    inpaintings,
    smaller,
    solid_scenes,
    to_bytes,
    unseen_layouts,
)
from ldmrt.companions import companion
from ldmrt.opening import builtin_bundle

COLUMNS = 6
GAP = 4  # white pixels between pictures
DOCS = Path(__file__).resolve().parents[2] / "docs"

TITLE = """# Gallery

The built-in shapes model and its companions (`ldmrt.companion`), each drawing captions that no training saw, with the first seeds: nothing is
picked. `python gallery.py` in examples/shapes makes this page and its pictures.
"""


@dataclass(frozen=True)
class Exhibit:
    """A part of the page.

    Attributes:
        name: of its picture's file.
        title: its heading.
        text: what is to be seen.
        code: how it is done.
        rows: of pictures, all of one size.
    """

    name: str
    title: str
    text: str
    code: str
    rows: list[list[generator.Picture]]

    def sheet(self) -> Image.Image:
        """The pictures in rows, with gaps."""
        padded = [
            [np.pad(picture, ((0, GAP), (0, GAP), (0, 0)), constant_values=255) for picture in row] for row in self.rows
        ]
        return Image.fromarray(np.concatenate([np.concatenate(row, axis=1) for row in padded])[:-GAP, :-GAP])

    def page(self) -> str:
        """Its part of the page."""
        return f"\n## {self.title}\n\n{self.text}\n\n```python\n{self.code}\n```\n\n![{self.title}](images/gallery-{self.name}.png)\n"


def words(pipe: ldmrt.Pipeline) -> Exhibit:
    """From captions alone."""
    scenes = [layout.scene for two in (False, True) for layout in unseen_layouts(COLUMNS, two=two)]
    pictures = [drawn(pipe, scene, seed) for seed, scene in enumerate(scenes)]
    captions = "; ".join(scene.caption for scene in scenes)
    return Exhibit(
        "words", "Words", f"Row by row: {captions}.",
        'pipe = ldmrt.Pipeline.from_bundle()\npipe("a red circle on a white background").images[0]',
        [pictures[:COLUMNS], pictures[COLUMNS:]],
    )  # fmt: skip


def beginnings(pipe: ldmrt.Pipeline) -> Exhibit:
    """From pictures, at two strengths."""
    scene = generator.parse("a large blue square on a white background")
    circle = generator.parse("a large red circle on a white background")
    rng = np.random.default_rng(2)
    starts = [generator.draw(generator.sample_layout(circle, rng)) for _ in range(COLUMNS)]
    rows = [
        [drawn(pipe, scene, seed, image=start, strength=strength) for seed, start in enumerate(starts)]
        for strength in (0.3, 0.9)
    ]
    return Exhibit(
        "strength", "A picture to begin from",
        f"Above the pictures to begin from; below what becomes of them by `{scene.caption}` at strength 0.3, which keeps the layout, and 0.9.",
        'pipe("a large blue square on a white background", image=picture, strength=0.3).images[0]',
        [starts, *rows],
    )  # fmt: skip


def controls(folder: Path) -> Exhibit:
    """By edges."""
    pipe = build(folder, "edges", companion("edges").parent)
    rng = np.random.default_rng(5)
    layouts = [layout for two in (False, True) for layout in unseen_layouts(COLUMNS // 2, two=two)]
    edges = [as_edges(draw_edges(layout, rng)) for layout in layouts]
    pictures = [
        drawn(pipe, layout.scene, seed, control_image=edge)
        for seed, (layout, edge) in enumerate(zip(layouts, edges, strict=True))
    ]
    code = (
        'ldmrt.build_engines(builtin_bundle(), "steered", controlnets=[ldmrt.companion("edges")])   # takes seconds, once\n'
        'pipe = ldmrt.Pipeline.from_bundle("steered")\npipe(caption, control_image=edges).images[0]'
    )
    captions = "; ".join(layout.scene.caption for layout in layouts)
    return Exhibit(
        "edges", "Edges", f"A ControlNet; above the edges, below what is drawn along them: {captions}.", code,
        [[np.asarray(edge) for edge in edges], pictures],
    )  # fmt: skip


def fillings(folder: Path) -> Exhibit:
    """Into pictures, and beyond their sides."""
    pipe = build(folder, "inpainting", companion("inpainting").parent)
    cases = [case for kind in KINDS for case in inpaintings(kind, COLUMNS // len(KINDS))]
    masked = [np.where(case.mask[..., None], np.uint8(127), case.picture) for case in cases]
    pictures = [
        drawn(pipe, case.scene, seed, image=case.picture, mask_image=as_mask(case.mask))
        for seed, case in enumerate(cases)
    ]
    code = (
        'ldmrt.build_engines(ldmrt.companion("inpainting"), "inpainting", base=builtin_bundle())   # takes seconds, once\n'
        'pipe = ldmrt.Pipeline.from_bundle("inpainting")\npipe(caption, image=picture, mask_image=mask).images[0]'
    )
    captions = "; ".join(case.scene.caption for case in cases)
    return Exhibit(
        "inpainting", "Inpainting and outpainting",
        f"An inpainting model; above the pictures with their masks in gray, below what is drawn there: {captions}.", code, [masked, pictures],
    )  # fmt: skip


def enlargements(folder: Path) -> Exhibit:
    """From small pictures, clean and noisy."""
    pipe = build(folder, "upscaler", companion("upscaler").parent)
    rng = np.random.default_rng(6)
    rows: list[list[generator.Picture]] = [[], [], [], []]
    for seed, layout in enumerate(unseen_layouts(COLUMNS, two=True)):
        truth = generator.draw(layout)
        small, smooth = smaller(truth, NOISE if seed >= COLUMNS // 2 else 0, rng)
        made = pipe(image=small, seed=seed, output_type="np").images[0]
        seen = np.asarray(small.resize((truth.shape[1], truth.shape[0]), Image.Resampling.NEAREST))
        for row, picture in zip(rows, (seen, smooth, to_bytes(made), truth), strict=True):
            row.append(picture)
    code = (
        'ldmrt.build_engines(ldmrt.companion("upscaler"), "larger")   # takes seconds, once\n'
        'pipe = ldmrt.Pipeline.from_bundle("larger")\npipe(image=small).images[0]'
    )
    return Exhibit(
        "larger", "Larger, and without noise",
        "A model for super-resolution; from above: pictures of 32 x 32, the right half of them with noise; as a bicubic filter enlarges them; as the "
        "model draws them, four times as wide and high; and what they were made of.", code, rows,
    )  # fmt: skip


def styles(pipe: ldmrt.Pipeline) -> Exhibit:
    """In another style, and back."""
    scenes = solid_scenes(COLUMNS)

    def row() -> list[generator.Picture]:
        return [drawn(pipe, scene, seed) for seed, scene in enumerate(scenes)]

    before = row()
    pipe.load_lora(companion("outlines"))
    outlined = row()
    pipe.unload_lora("outlines")
    return Exhibit(
        "outlines", "Another style", "A LoRA by which shapes are outlined; without it, with it, and after it has been unloaded.",
        'pipe.load_lora(ldmrt.companion("outlines"))\npipe(caption).images[0]\npipe.unload_lora("outlines")',
        [before, outlined, row()],
    )  # fmt: skip


def exhibits(work: Path) -> Iterator[Exhibit]:
    """All parts of the page."""
    pipe = ldmrt.Pipeline.from_bundle(builtin_bundle(), "cpu")
    yield words(pipe)
    yield beginnings(pipe)
    yield controls(work / "edges")
    yield fillings(work / "inpainting")
    yield enlargements(work / "upscaler")
    yield styles(pipe)


def main(
    docs: Annotated[Path, typer.Option(help="The folder of the page; its pictures go to `images` there.")] = DOCS,
) -> None:
    """Draw the page and its pictures."""
    parts = [TITLE]
    with tempfile.TemporaryDirectory() as work:
        for exhibit in exhibits(Path(work)):
            exhibit.sheet().save(docs / "images" / f"gallery-{exhibit.name}.png", optimize=True)
            parts.append(exhibit.page())
    (docs / "gallery.md").write_text("".join(parts))


if __name__ == "__main__":
    typer.run(main)
