"""Measure what the shapes model's companions draw, and write the figures as JSON."""

from __future__ import annotations

import json
import platform
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console

import detector
import generator
import ldmrt
from degradation import FACTOR
from edges import draw_edges
from evaluate import PACKAGES, Score
from ldmrt.opening import builtin_bundle

KINDS = ("add", "replace", "outpaint")
STEPS, GUIDANCE = 20, 5.0
NOISE = 20.0  # standard deviation of a small picture's noise, of 255
MARGIN = 6  # pixels of a mask beyond the object that is to be drawn
SEED = 2027


@dataclass(frozen=True)
class Inpainting:
    """A picture to draw into.

    Attributes:
        picture: uint8 (128, 128, 3).
        mask: bool (128, 128), true where it is to be drawn anew.
        scene: what is then to be seen.
        truth: such a picture.
    """

    picture: generator.Picture
    mask: NDArray[np.bool_]
    scene: generator.Scene
    truth: generator.Picture


def inpaintings(kind: str, count: int) -> Iterator[Inpainting]:
    """Pictures with something to be drawn into them, none of whose captions was trained on.

    Args:
        kind: `add`, an object to a background or to another object; `replace`, one by another; `outpaint`, the sides of the picture.
        count: how many.
    """
    rng = np.random.default_rng((SEED, KINDS.index(kind)))
    for index in range(count):
        scene = generator.sample_unseen_scenes(rng, 1, two=index % 2 == 1)[0]
        layout = generator.sample_layout(scene, rng)
        truth, box = generator.draw(layout), layout.boxes[0]
        mask = np.zeros(truth.shape[:2], dtype=np.bool_)
        mask[
            max(0, box.top - MARGIN) : box.top + box.side + MARGIN,
            max(0, box.left - MARGIN) : box.left + box.side + MARGIN,
        ] = True
        picture = truth.copy()
        if kind == "outpaint":
            mask[:] = True
            mask[16:112, 16:112] = False
        elif kind == "add":
            picture[mask] = generator.PALETTE[scene.background]
        else:
            other = generator.sample_scene(rng, two=False).things[0]
            coverage = generator.shape_mask(other.shape, box.side)[..., None]
            background = np.array(generator.PALETTE[scene.background], dtype=np.float32)
            color = np.array(generator.PALETTE[other.color], dtype=np.float32)
            region = picture[box.top : box.top + box.side, box.left : box.left + box.side]
            region[:] = np.rint(background + coverage * (color - background))
        yield Inpainting(picture, mask, scene, truth)


def as_mask(mask: NDArray[np.bool_]) -> Image.Image:
    """A mask as a picture, white where it holds."""
    return Image.fromarray(mask.astype(np.uint8) * 255)


def as_edges(edges: NDArray[np.bool_]) -> Image.Image:
    """Edges as a picture, white on black."""
    return as_mask(edges).convert("RGB")


def psnr(made: generator.Picture, truth: generator.Picture) -> float:
    """Peak signal-to-noise ratio in dB of uint8 pictures."""
    return float(10 * np.log10(255**2 / np.square(made.astype(np.float32) - truth).mean()))


def follows(layout: generator.Layout, sight: detector.Sight) -> bool:
    """Whether each thing of a layout is seen where its box is, and nothing else."""
    found = {(item.color, item.shape): item for item in sight.objects}
    for thing, box in zip(layout.scene.things, layout.boxes, strict=True):
        item = found.get((thing.color, thing.shape))
        if item is None or not overlaps(box, item.box):
            return False
    return len(sight.objects) == len(layout.scene.things)


def overlaps(box: generator.Box, second: detector.IntBox) -> bool:
    """Whether two boxes' shared over their joint area is 0.7 or more."""
    first = (box.left, box.top, box.left + box.side, box.top + box.side)
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(0, width) * max(0, height)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (first, second))
    return shared / (areas - shared) >= 0.7


def is_outlined(picture: generator.Picture, scene: generator.Scene) -> bool:
    """Whether a picture's one object is an outline: the background shows in its middle, around it the object's colour."""
    names = np.array(generator.COLORS)[detector.nearest_colors(picture.astype(np.float32))]
    rows, columns = np.nonzero(names == scene.things[0].color)
    if len(rows) < detector.LEAST_AREA:
        return False
    middle = names[(rows.min() + rows.max()) // 2 - 1 :, (columns.min() + columns.max()) // 2 - 1 :][:3, :3]
    return bool((middle == scene.background).all())


def to_bytes(picture: NDArray[np.float32]) -> generator.Picture:
    """A picture in [0, 1] as uint8."""
    made: generator.Picture = np.rint(picture * 255).astype(np.uint8)
    return made


def drawn(pipe: ldmrt.Pipeline, scene: generator.Scene, seed: int, **given: Any) -> generator.Picture:
    """What a pipeline draws of a scene, uint8 (H, W, 3)."""
    asked: dict[str, Any] = {
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
        "seed": seed,
        "output_type": "np",
        **given,
    }
    return to_bytes(pipe(scene.caption, **asked).images[0])


def score_inpainting(pipe: ldmrt.Pipeline, kind: str, count: int) -> dict[str, object]:
    """How often all is seen that is to be seen, and how much what is outside the mask has changed (root mean square, of 255)."""
    right, changes = 0, []
    for seed, case in enumerate(inpaintings(kind, count)):
        made = drawn(pipe, case.scene, seed, image=case.picture, mask_image=as_mask(case.mask))
        verdict = detector.judge(case.scene, detector.look(made))
        right += verdict.background and verdict.relation
        outside = made[~case.mask].astype(np.float32) - case.picture[~case.mask]
        changes.append(float(np.sqrt(np.square(outside).mean())))
    return {**Score(right, count).report(), "change_outside": round(float(np.mean(changes)), 2)}


def unseen_layouts(count: int, *, two: bool) -> list[generator.Layout]:
    """Layouts of captions that no training saw."""
    rng = np.random.default_rng((SEED, 3, int(two)))
    return [generator.sample_layout(scene, rng) for scene in generator.sample_unseen_scenes(rng, count, two=two)]


def score_control(pipe: ldmrt.Pipeline, count: int, *, two: bool, scale: float) -> dict[str, float]:
    """How often every object lies where its edges are, and is what the caption says."""
    rng = np.random.default_rng((SEED, 4))
    right = 0
    for seed, layout in enumerate(unseen_layouts(count, two=two)):
        edges = as_edges(draw_edges(layout, rng))
        made = drawn(pipe, layout.scene, seed, control_image=edges, controlnet_scale=scale)
        right += follows(layout, detector.look(made))
    return Score(right, count).report()


def score_upscaler(pipe: ldmrt.Pipeline, count: int, noise: float) -> dict[str, float]:
    """PSNR in dB and sharpness, on average, of small pictures drawn larger and enlarged by a bicubic filter."""
    rng = np.random.default_rng((SEED, 5))
    found = []
    for seed, layout in enumerate(unseen_layouts(count, two=True)):
        truth = generator.draw(layout)
        small, plain = smaller(truth, noise, rng)
        made = to_bytes(pipe(image=small, seed=seed, output_type="np").images[0])
        found.append([measure(picture, truth) for measure in (psnr, sharpness) for picture in (made, plain)])
    names = ("psnr_db", "bicubic_psnr_db", "sharpness", "bicubic_sharpness")
    means = np.mean(found, axis=0)
    return {"noise": noise} | {name: round(float(mean), 2) for name, mean in zip(names, means, strict=True)}


def sharpness(made: generator.Picture, truth: generator.Picture) -> float:
    """How steep a picture's steepest edges are beside the truth's: the hundredth part with the greatest differences of neighbours."""

    def steepest(picture: generator.Picture) -> float:
        steps = np.abs(np.diff(picture.astype(np.float32), axis=1)).max(axis=2)
        return float(np.sort(steps, axis=None)[-steps.size // 100 :].mean())

    return steepest(made) / steepest(truth)


def smaller(truth: generator.Picture, noise: float, rng: np.random.Generator) -> tuple[Image.Image, generator.Picture]:
    """A picture a quarter as wide and high with noise, and that enlarged by a bicubic filter."""
    size = (truth.shape[1] // FACTOR, truth.shape[0] // FACTOR)
    clean = np.asarray(Image.fromarray(truth).resize(size, Image.Resampling.BICUBIC), dtype=np.float32)
    noisy = np.rint(clean + rng.normal(0, noise, clean.shape)).clip(0, 255).astype(np.uint8)
    small = Image.fromarray(noisy)
    return small, np.asarray(small.resize((truth.shape[1], truth.shape[0]), Image.Resampling.BICUBIC))


def solid_scenes(count: int) -> list[generator.Scene]:
    """Scenes with one large object that is not hollow, none of whose captions was trained on."""
    rng = np.random.default_rng((SEED, 6))
    scenes = generator.sample_unseen_scenes(rng, 400, two=False)
    solid = [
        scene for scene in scenes if scene.things[0].shape not in ("ring", "star") and scene.things[0].size == "large"
    ]
    return solid[:count]


def score_outlines(pipe: ldmrt.Pipeline, count: int) -> dict[str, float]:
    """How often the one object is an outline of its colour."""
    scenes = solid_scenes(count)
    right = sum(is_outlined(drawn(pipe, scene, seed), scene) for seed, scene in enumerate(scenes))
    return Score(right, len(scenes)).report()


def build(folder: Path, name: str, given: Path) -> ldmrt.Pipeline:
    """A companion's pipeline, compiled into a folder."""
    shapes = builtin_bundle()
    if name == "inpainting":
        ldmrt.build_engines(given / name, folder, base=shapes, dtype="float32")
    elif name == "edges":
        ldmrt.build_engines(shapes, folder, dtype="float32", controlnets=[given / name])
    else:
        ldmrt.build_engines(given / name, folder, dtype="float32")
    return ldmrt.Pipeline.from_bundle(folder, "cpu")


def main(
    companions: Annotated[Path, typer.Option(help="Folder of the companions.")],
    output: Annotated[Path | None, typer.Option(help="The JSON file to write.")] = None,
    count: Annotated[int, typer.Option(help="Pictures for each figure.")] = 100,
) -> None:
    """Draw with every companion in the folder, recognise what came out, and report the shares that are right."""
    found: dict[str, object] = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "settings": {"steps": STEPS, "guidance": GUIDANCE, "pictures": count},
    }
    with tempfile.TemporaryDirectory() as work:
        if (companions / "inpainting").exists():
            pipe = build(Path(work) / "inpainting", "inpainting", companions)
            found["inpainting"] = {kind: score_inpainting(pipe, kind, count) for kind in KINDS}
        if (companions / "edges").exists():
            pipe = build(Path(work) / "edges", "edges", companions)
            found["edges"] = {
                f"{'two objects' if two else 'one object'}, scale {scale:g}": score_control(
                    pipe, count, two=two, scale=scale
                )
                for two in (False, True)
                for scale in (0.0, 1.0)
            }
        if (companions / "upscaler").exists():
            pipe = build(Path(work) / "upscaler", "upscaler", companions)
            found["upscaler"] = [score_upscaler(pipe, count, noise) for noise in (0.0, NOISE)]
    if (companions / "outlines.safetensors").exists():
        pipe = ldmrt.Pipeline.from_bundle(device="cpu")
        before = score_outlines(pipe, count)
        pipe.load_lora(companions / "outlines.safetensors")
        found["outlines"] = {"without": before, "with": score_outlines(pipe, count)}
    text = json.dumps(found, indent=2)
    Console().print_json(text)
    if output is not None:
        output.write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
