"""Write a checkpoint of a real architecture with random weights, for the other scripts.

python benchmarks/random_checkpoint.py sd15 OUT [--dtype float16] [--seed 0]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ldmrt.export.random_checkpoint import ARCHITECTURES, write_checkpoint
from ldmrt.graph import dtype_of


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", choices=sorted(path.stem for path in ARCHITECTURES.glob("*.json")))
    parser.add_argument("out", type=Path)
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16", "float32"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    write_checkpoint(args.architecture, args.out, dtype=dtype_of(args.dtype), seed=args.seed)


if __name__ == "__main__":
    main()
