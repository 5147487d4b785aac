"""Draw 36 captions and lay the pictures out in one PNG, each over its caption."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from PIL import Image, ImageDraw, ImageFont

import generator
import sampler

COLUMNS = 6
PADDING = 12  # pixels around a picture
LINES = 3
WRAP = 26  # characters a line
LINE_HEIGHT = 13
FONT_SIZE = 10


def captions(seed: int) -> list[str]:
    """36 captions no training saw: twelve with one object, 24 with two."""
    rng = np.random.default_rng((seed, 7))
    one = generator.sample_unseen_scenes(rng, 12, two=False)
    two = generator.sample_unseen_scenes(rng, 24, two=True)
    rows = [one[2 * row : 2 * row + 2] + two[4 * row : 4 * row + 4] for row in range(COLUMNS)]
    return [scene.caption for row in rows for scene in row]


def lay_out(pictures: list[generator.Picture], words: list[str]) -> Image.Image:
    """A grid of pictures, each with its caption under it."""
    width = generator.SIDE + 2 * PADDING
    height = generator.SIDE + 2 * PADDING + LINES * LINE_HEIGHT
    rows = -(-len(pictures) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * width, rows * height), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(FONT_SIZE)
    for index, (picture, caption) in enumerate(zip(pictures, words, strict=True)):
        left = index % COLUMNS * width + PADDING
        top = index // COLUMNS * height + PADDING
        edge = (left - 1, top - 1, left + generator.SIDE, top + generator.SIDE)
        draw.rectangle(edge, outline=(200, 200, 200))
        sheet.paste(Image.fromarray(picture), (left, top))
        for line, text in enumerate(textwrap.wrap(caption, WRAP)[:LINES]):
            place = (left, top + generator.SIDE + 3 + line * LINE_HEIGHT)
            draw.text(place, text, fill=(40, 40, 40), font=font)
    return sheet


def main(
    model: Annotated[Path, typer.Option(help="The pipeline's folder.")],
    output: Annotated[Path, typer.Option(help="The PNG to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the captions and of the noise.")] = 0,
    steps: Annotated[int, typer.Option(help="DDIM steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 5.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Write a contact sheet of 36 captions."""
    words = captions(seed)
    seeds = range(seed, seed + len(words))
    pictures = sampler.sample(sampler.load(model, device), words, seeds, steps, guidance)
    lay_out(pictures, words).save(output, optimize=True)


if __name__ == "__main__":
    typer.run(main)
