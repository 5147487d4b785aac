"""Make pictures from captions with the stock diffusers pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from rich.progress import track

import generator

BATCH = 20


def load(folder: Path, device: str) -> StableDiffusionPipeline:
    """Load a pipeline folder in float32."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def sample(
    pipeline: StableDiffusionPipeline,
    captions: Sequence[str],
    seeds: Sequence[int],
    steps: int = 20,
    guidance: float = 5.0,
) -> list[generator.Picture]:
    """One picture for each caption and seed: uint8 RGB (128, 128, 3).

    The noise of a picture comes from its seed alone, on the CPU, whatever the device and batch.
    """
    pictures: list[generator.Picture] = []
    for start in track(range(0, len(captions), BATCH), description="pictures"):
        chosen = slice(start, start + BATCH)
        made = pipeline(
            prompt=list(captions[chosen]),
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds[chosen]],
            output_type="np",
        ).images
        pictures += list(np.rint(made * 255).astype(np.uint8))
    return pictures
