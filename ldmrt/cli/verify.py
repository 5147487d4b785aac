"""`ldmrt verify`: complete the certificates of engines that were built for this machine's GPU on another machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ldmrt.cli.options import Json, Verbose
from ldmrt.cli.output import print_json, progress_bar, table
from ldmrt.errors import EngineMismatch


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A bundle made by build-engines.")],
    json: Json = False,
    _verbose: Verbose = False,
) -> None:
    """Run what could not be run where it was built, and compare it with what the original model made."""
    import torch

    from ldmrt.bundle import Bundle
    from ldmrt.engines.tensorrt import gpu_at_hand, gpu_here
    from ldmrt.verify import complete, waiting

    bundle = Bundle.open(folder)
    before, here = waiting(bundle), gpu_at_hand()
    targets = sorted({target for record, _ in before for target in record.targets})
    if before and here not in targets:
        raise EngineMismatch(
            f"{len(before)} engines of {folder} are still to be verified on {' or '.join(targets)}, and {gpu_here(here)}; "
            "run `ldmrt verify` on a machine that has one"
        )
    done = []
    if before:
        with progress_bar("starting") as update:
            done = complete(
                bundle,
                torch.device("cuda"),
                here,
                lambda what, finished, total: update(description=what, completed=finished, total=total),
            )
    left = len(waiting(Bundle.open(folder)))
    if json:
        print_json({"verified": [record.model_dump(mode="json") for record in done], "unverified": left})
        return
    if done:
        rows = [
            [
                record.label,
                f"{max(record.certificate.relative_error.values()):.1e}",
                f"{record.certificate.tolerance:.0e}",
            ]
            for record in done
        ]
        table(rows, ["verified", "error", "allowed"])
    typer.echo(f"{left} engines are left to verify on other GPUs" if left else f"all engines of {folder} are verified")
