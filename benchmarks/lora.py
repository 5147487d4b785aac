"""How long a LoRA takes to be loaded, scaled and unloaded in place.

    python benchmarks/lora.py BUNDLE [--rank 16] [--runs 7] [--device cpu] [--no-record]

The LoRA is random, on all projections of the U-Net's attentions, in float16. Its file is in the page cache. A bundle of real size
is made by random_checkpoint.py and `ldmrt build-engines`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import save_file

from ldmrt.bench.ledger import append, summary
from ldmrt.pipeline import Pipeline

RESULTS = Path(__file__).parent / "results" / "lora.jsonl"
PROJECTION = re.compile(r"attn\d\.to_(q|k|v|out\.0)\.weight$")


def write_lora(path: Path, shapes: dict[str, tuple[int, ...]], rank: int) -> dict[str, int]:
    """Write a random LoRA for the attentions among these weights; what it changes, in numbers."""
    generator = torch.Generator().manual_seed(0)
    tensors, changed = {}, 0
    for name, (out, *inner) in shapes.items():
        if PROJECTION.search(name):
            stem = f"unet.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, *inner, generator=generator).half()
            tensors[f"{stem}.lora_B.weight"] = torch.randn(out, rank, generator=generator).half() * 1e-3
            changed += out * inner[0]
    save_file(tensors, path)
    return {"layers": len(tensors) // 2, "rank": rank, "values_changed": changed, "file_bytes": path.stat().st_size}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-record", action="store_true", help="print the row only")
    args = parser.parse_args()
    pipe = Pipeline.from_bundle(args.bundle, args.device)

    def timed(work: Callable[[], None]) -> float:
        start = time.perf_counter()
        work()
        if pipe.device.type == "cuda":
            torch.cuda.synchronize(pipe.device)
        return time.perf_counter() - start

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "random.safetensors"
        record = pipe.bundle.find("step", dtype=pipe.dtype)[0]
        lora = write_lora(path, pipe.bundle.shapes(record.weights), args.rank)
        # One step of one picture, and of one with guidance, loads the engines and packs their weights.
        for scale in (1.0, 5.0):
            pipe(num_inference_steps=1, guidance_scale=scale, seed=0, output_type="latent")
        before = pipe(num_inference_steps=1, seed=0, output_type="latent").latents
        seconds: dict[str, list[float]] = {"load": [], "set scale": [], "unload": []}
        for number in range(args.runs + 1):
            times = {
                "load": timed(lambda: pipe.load_lora(path, 0.8)),
                "set scale": timed(lambda: pipe.set_lora_scale("random", 0.5)),
                "unload": timed(lambda: pipe.unload_lora("random")),
            }
            if number:  # the first fills caches
                for name, value in times.items():
                    seconds[name].append(value)
        assert torch.equal(pipe(num_inference_steps=1, seed=0, output_type="latent").latents, before)
    figures = {
        "model": pipe.bundle.manifest.model.name,
        "device": torch.cuda.get_device_name(pipe.device) if pipe.device.type == "cuda" else "cpu",
        "dtype": pipe.dtype,
        "threads": torch.get_num_threads(),
        "lora": lora,
        "seconds": {name: summary(values) for name, values in seconds.items()},
    }
    row = {"name": "lora", **figures} if args.no_record else append(RESULTS, "lora", figures)
    sys.stdout.write(json.dumps(row, indent=1) + "\n")


if __name__ == "__main__":
    main()
