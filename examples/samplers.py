"""A sheet of the built-in model's pictures by every sampler: one prompt, one seed. It makes docs/images/samplers.png.

python examples/samplers.py docs/images/samplers.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

from PIL import Image, ImageDraw

import ldmrt
from ldmrt.samplers.registry import SAMPLERS, resolve

PROMPT = "a blue star left of a red circle on a yellow background"
NAMES = [
    name for sampler in SAMPLERS.values() for name in (sampler.name, f"{sampler.name} karras")[: 1 + sampler.sigmas]
]
# They extrapolate their last four evaluations, and overshoot where steps are few.
PATIENT = ("pndm", "lms")
COLUMNS, GAP, LABEL = 5, 8, 18


def sheet(pictures: dict[str, Image.Image]) -> Image.Image:
    """The pictures in rows, each with its name below."""
    width, height = next(iter(pictures.values())).size
    across, down = width + GAP, height + LABEL + GAP
    rows = -(-len(pictures) // COLUMNS)
    page = Image.new("RGB", (COLUMNS * across + GAP, rows * down + GAP), "white")
    draw = ImageDraw.Draw(page)
    for number, (name, picture) in enumerate(pictures.items()):
        left, top = GAP + number % COLUMNS * across, GAP + number // COLUMNS * down
        page.paste(picture, (left, top))
        draw.text((left, top + height + 3), name, fill="black")
    return page


def main() -> None:
    """Draw, and write the sheet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the file, such as samplers.png")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=4)
    arguments = parser.parse_args()
    pipe = ldmrt.Pipeline.from_bundle(device="cpu")
    pictures = {}
    for name in NAMES:
        choice = resolve(name)
        patient = choice.sampler.name in PATIENT
        steps = 2 * arguments.steps if patient else arguments.steps
        result = pipe(arguments.prompt, num_inference_steps=steps, seed=arguments.seed, sampler=name)
        pictures[f"{choice.title}, {steps} steps" if patient else choice.title] = result.images[0]
    sheet(pictures).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
