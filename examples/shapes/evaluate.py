"""Measure how well a shapes model draws captions it never saw, and write the figures as JSON."""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL
from rich.console import Console
from torch import Tensor

import detector
import generator
import sampler

PACKAGES = ("torch", "diffusers", "transformers", "safetensors", "numpy", "pillow")
SCENES_SEED = 2026


@dataclass(frozen=True)
class Score:
    """A share of pictures: how many were right, out of how many."""

    right: int
    of: int

    @property
    def share(self) -> float:
        """The share, 0 to 1."""
        return self.right / max(self.of, 1)

    def report(self) -> dict[str, float]:
        """The score for JSON."""
        return {**asdict(self), "share": round(self.share, 4)}


def score(scenes: Sequence[generator.Scene], pictures: Sequence[generator.Picture]) -> dict[str, Score]:
    """Scores by what is judged: background, one object, both objects, relation, sizes."""
    verdicts = [
        (scene, detector.judge(scene, detector.look(picture))) for scene, picture in zip(scenes, pictures, strict=True)
    ]

    def count(right: Callable[[detector.Verdict], bool], holds: Callable[[generator.Scene], bool]) -> Score:
        chosen = [verdict for scene, verdict in verdicts if holds(scene)]
        return Score(sum(right(verdict) for verdict in chosen), len(chosen))

    return {
        "background": count(lambda v: v.background, lambda s: True),
        "one_object": count(lambda v: v.objects, lambda s: not s.relation),
        "both_objects": count(lambda v: v.objects, lambda s: bool(s.relation)),
        "relation": count(lambda v: v.relation, lambda s: bool(s.relation)),
        "sizes": count(lambda v: v.sizes, lambda s: any(thing.size for thing in s.things)),
    }


def unseen_scenes(count: int, *, left_out: bool) -> list[generator.Scene]:
    """Scenes with captions no training saw, one with two objects and one with one in turn."""
    rng = np.random.default_rng((SCENES_SEED, int(left_out)))
    two = generator.sample_unseen_scenes(rng, (count + 1) // 2, two=True, left_out=left_out)
    one = generator.sample_unseen_scenes(rng, count // 2, two=False, left_out=left_out)
    return [(two if index % 2 == 0 else one)[index // 2] for index in range(count)]


@torch.no_grad()
def reconstruction(vae: AutoencoderKL, count: int) -> dict[str, float]:
    """PSNR in dB of fresh pictures after the autoencoder, and what is recognised of them then."""
    rng = np.random.default_rng((SCENES_SEED, 2))
    errors: list[float] = []
    right = 0
    for index in range(count):
        scene = generator.sample_scene(rng, two=index % 2 == 0)
        picture = generator.draw(generator.sample_layout(scene, rng))
        wanted = torch.from_numpy(picture).to(vae.device).permute(2, 0, 1)[None].float()
        latent = vae.encode(wanted / 127.5 - 1).latent_dist.mode()
        made: Tensor = ((vae.decode(latent).sample + 1) * 127.5).clamp(0, 255)
        errors.append((made - wanted).square().mean().item())
        again = made.round().byte()[0].permute(1, 2, 0).cpu().numpy()
        verdict = detector.judge(scene, detector.look(again))
        right += verdict.background and verdict.relation
    decibels = 10 * np.log10(255**2 / np.array(errors))
    return {
        "pictures": count,
        "psnr_mean_db": round(float(decibels.mean()), 2),
        "psnr_of_mean_error_db": round(float(10 * np.log10(255**2 / np.mean(errors))), 2),
        "recognised_after": round(right / count, 4),
    }


def main(
    model: Annotated[Path, typer.Option(help="The pipeline's folder.")],
    output: Annotated[Path | None, typer.Option(help="The JSON file to write.")] = None,
    count: Annotated[int, typer.Option(help="Unseen captions, half with two objects.")] = 400,
    left_out: Annotated[int, typer.Option(help="Captions with left-out pairs.")] = 100,
    reconstructions: Annotated[int, typer.Option(help="Pictures for the PSNR.")] = 256,
    steps: Annotated[int, typer.Option(help="DDIM steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 5.0,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Draw unseen captions, recognise what came out, and report the shares that are right."""
    pipeline = sampler.load(model, device)
    results: dict[str, object] = {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).date().isoformat(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "settings": {"steps": steps, "guidance": guidance, "seeds": f"0-{max(count - 1, 0)}"},
    }
    for name, number, left in (("unseen", count, False), ("left_out_pairs", left_out, True)):
        if number:
            scenes = unseen_scenes(number, left_out=left)
            captions = [scene.caption for scene in scenes]
            pictures = sampler.sample(pipeline, captions, range(number), steps, guidance)
            scores = score(scenes, pictures)
            results[name] = {
                "captions": number,
                "distinct_captions": len(set(captions)),
                **{key: value.report() for key, value in scores.items()},
            }
    if reconstructions:
        results["autoencoder"] = reconstruction(pipeline.vae, reconstructions)
    text = json.dumps(results, indent=2)
    Console().print_json(text)
    if output is not None:
        output.write_text(text + "\n")


if __name__ == "__main__":
    typer.run(main)
