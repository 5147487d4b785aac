"""Build a model of real size and make a picture from it: seconds and peak memory, as rows of the ledger.

    python benchmarks/real_size.py [--architecture sd15] [--dtype bfloat16] [--steps 4] [--work DIR] [--no-record]
    python benchmarks/real_size.py --engine tensorrt-rtx --target sm_86 --target sm_89 --target sm_120

The second form builds plans for GPUs that need not be there, and draws no picture.
Uses `ldmrt` as installed, through its commands, each in a process of its own. Needs about 5 GB of disk for SD1.5.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ldmrt.bench.ledger import append

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "real_size.jsonl"


def timed(*command: str) -> dict[str, float]:
    """Run a command: its seconds and its peak resident memory in bytes, files mapped by it included."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{' '.join(command)} failed with exit code {process.returncode}")
    return {"seconds": round(time.perf_counter() - start, 1), "peak_rss_bytes": usage.ru_maxrss * 1024}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="sd15")
    parser.add_argument("--engine", default="torch", choices=("torch", "tensorrt", "tensorrt-rtx"))
    parser.add_argument("--target", action="append", default=[], help="such as sm_89; repeatable")
    parser.add_argument("--dtype", default=None, help="default: bfloat16, for plans float16")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--work", type=Path, default=None, help="where to put the checkpoint and the bundle; kept")
    parser.add_argument("--no-record", action="store_true", help="print the rows only")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = args.work or Path(temporary)
        plans = args.engine != "torch"
        args.dtype = args.dtype or ("float16" if plans else "bfloat16")
        model, bundle, picture = work / args.architecture, work / f"bundle-{args.engine}", work / "picture.png"
        if not model.is_dir():
            # Not in this process, which would keep some of the memory while the build needs all there is.
            timed(sys.executable, str(HERE / "random_checkpoint.py"), args.architecture, str(model))
        shutil.rmtree(bundle, ignore_errors=True)  # what is there already is not built again
        ldmrt = [sys.executable, "-P", "-m", "ldmrt"]
        build = [
            *ldmrt,
            "build-engines",
            str(model),
            "--out",
            str(bundle),
            "--dtype",
            args.dtype,
            "--engine",
            args.engine,
        ]
        rows = {"build-engines": timed(*build, *(part for target in args.target for part in ("--target", target)))}
        if not plans:
            draw = [
                *ldmrt,
                "generate",
                "a photograph",
                "--engines",
                str(bundle),
                "--steps",
                str(args.steps),
                "--seed",
                "0",
            ]
            rows["generate"] = timed(*draw, "--out", str(picture))
        for name, figures in rows.items():
            facts = {
                "architecture": args.architecture,
                "engine": args.engine,
                "dtype": args.dtype,
                "targets": args.target,
            }
            facts |= {"threads": os.cpu_count(), **figures}
            if name == "generate":
                facts["steps"] = args.steps
            if args.no_record:
                sys.stdout.write(json.dumps({"name": name, **facts}) + "\n")
            else:
                sys.stdout.write(json.dumps(append(RESULTS, name, facts)) + "\n")


if __name__ == "__main__":
    main()
