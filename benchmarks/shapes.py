"""Pictures of the built-in shapes model from end to end, against diffusers on the same weights, in one process, in turn.

    python benchmarks/shapes.py [--runs 9] [--steps 20]

The latents are compared first. The row goes to results/shapes.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import torch

from ldmrt.bench.ledger import append, summary
from ldmrt.bench.measure import alternate
from ldmrt.kernels import native
from ldmrt.opening import builtin_bundle
from ldmrt.pipeline import Pipeline
from ldmrt.verify import relative_error

LEDGER = Path(__file__).resolve().parent / "results" / "shapes.jsonl"
PROMPT = "a red circle on a white background"


def diffusers_pipeline() -> Any:
    """The same model, opened by diffusers."""
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(builtin_bundle(), safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main() -> None:
    """Compare, time, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    ours, theirs = Pipeline.from_bundle(device="cpu"), diffusers_pipeline()
    scale = ours.defaults.guidance_scale
    for images in (1, 4):

        def run_ours(output: Any = "np", images: int = images) -> Any:
            return ours(
                PROMPT, num_inference_steps=args.steps, seed=2, num_images_per_prompt=images, output_type=output
            )

        def run_theirs(output: str = "np", images: int = images) -> Any:
            generators = [torch.Generator().manual_seed(2 + number) for number in range(images)]
            return theirs(
                PROMPT,
                num_inference_steps=args.steps,
                guidance_scale=scale,
                num_images_per_prompt=images,
                generator=generators,
                output_type=output,
            )

        found, expected = run_ours("latent").latents, run_theirs("latent").images
        difference = relative_error(found, expected)
        assert difference < 1e-3, f"latents differ by {difference:.2e}"
        times = alternate({"ldmrt": run_ours, "diffusers": run_theirs}, runs=args.runs, warmup=1)
        ratio = statistics.median(b / a for a, b in zip(times["ldmrt"], times["diffusers"], strict=True))
        figures = {
            "images": images,
            "steps": args.steps,
            "pixels": 128,
            "dtype": "float32",
            "threads": torch.get_num_threads(),
            "native": native.why_not() or "loaded",
            "seconds": {case: summary(seconds) for case, seconds in times.items()},
            "stages_seconds": {stage: round(value, 4) for stage, value in run_ours().timings.items()},
            "times_faster": round(ratio, 2),
            "relative_difference_of_latents": float(f"{difference:.2e}"),
        }
        append(LEDGER, f"shapes: {images} images from prompt to pixels", figures)
        print(
            f"{images} images: ldmrt {statistics.median(times['ldmrt']):.3f} s, diffusers "
            f"{statistics.median(times['diffusers']):.3f} s, {ratio:.2f} times; latents differ by {difference:.1e}"
        )


if __name__ == "__main__":
    main()
