"""Embed several models in a program, on one device, each within its part of the memory.

python examples/embed_several.py pictures --model sd15=6GB --model sdxl=10GB

Budgets add up: what the pipelines take together is at most their sum, whichever of them draw at the same time. Where a part is too small for a model to stay
in memory whole, its text encoders and VAE come and go; where it is too small for that, it says how much is needed.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ldmrt

PROMPT = "a red circle on a white background"


def opened(model: str, device: str | None) -> ldmrt.Pipeline:
    """A pipeline of `FOLDER=BUDGET`."""
    folder, _, budget = model.rpartition("=")
    if not folder:
        raise SystemExit(f"--model is {model!r}, expected FOLDER=BUDGET, such as sd15=6GB")
    return ldmrt.Pipeline.from_bundle(folder, device, memory_budget=budget)


def told(pipe: ldmrt.Pipeline) -> str:
    """How a pipeline keeps within its part, in a line."""
    plan = pipe.memory_plan()
    if plan is None:
        return f"{pipe.bundle.path.name}: no budget"
    stays = "all stays in memory" if not plan.staged else f"{', '.join(plan.staged)} in memory only while they work"
    return f"{pipe.bundle.path.name}: {plan.needed / 1e6:.0f} of {plan.budget / 1e6:.0f} MB; {stays}"


def main() -> None:
    """Draw with each model, two pictures one after the other, all models side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for the pictures")
    parser.add_argument("--model", action="append", required=True, metavar="FOLDER=BUDGET", help="a bundle; repeatable")
    parser.add_argument("--device", default=None)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    pipes = [opened(model, arguments.device) for model in arguments.model]

    def draw(number: int, pipe: ldmrt.Pipeline) -> None:
        for seed in range(2):
            picture = pipe(PROMPT, seed=seed).images[0]
            picture.save(arguments.out / f"{number}-{pipe.bundle.path.name}-{seed}.png")

    for pipe in pipes:
        print(told(pipe))
    with ThreadPoolExecutor(len(pipes)) as threads:
        list(threads.map(draw, range(len(pipes)), pipes))
    total = sum(pipe.memory_budget or 0 for pipe in pipes)
    print(f"{len(pipes)} models within {total / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
