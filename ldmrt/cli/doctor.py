"""`ldmrt doctor`: what this machine can run."""

from __future__ import annotations

import typer

from ldmrt.cli.options import Json, Verbose
from ldmrt.cli.output import bytes_text, print_json, table


def doctor(json: Json = False, _verbose: Verbose = False) -> None:
    """Show what this machine can run, and what is missing."""
    from ldmrt.doctor import examine

    found = examine()
    if json:
        print_json(found)
        return
    cpu, memory, torch, gpu = found["cpu"], found["memory"], found["torch"], found["cuda"]
    features = ", ".join(name for name, there in cpu["features"].items() if there) or "none that matter"
    table(
        [
            ["ldmrt", found["ldmrt"]],
            ["Python", f"{found['python']} ({found['executable']})"],
            ["system", found["platform"]],
            ["CPU", f"{cpu['name']}, {cpu['cores']} cores for this process"],
            ["CPU features", features],
            ["memory", f"{bytes_text(memory['available'])} free of {bytes_text(memory['total'])}"],
            ["disk here", f"{bytes_text(found['disk']['free'])} free of {bytes_text(found['disk']['total'])}"],
            ["torch", f"{torch['version']}, {torch['threads']} threads" if torch["version"] else torch["missing"]],
            ["CUDA", gpu["missing"] or f"{gpu['version']}"],
            *[
                ["", f"cuda:{i}: {g['name']}, {bytes_text(g['bytes'])}, {g['capability']}"]
                for i, g in enumerate(gpu["gpus"])
            ],
            ["native CPU library", found["native"]["missing"] or "loaded"],
        ]
    )
    typer.echo()
    table([[kind, missing or "runs here"] for kind, missing in found["engines"].items()], ["engine", ""])
    typer.echo()
    rows = []
    for name, packages in found["extras"].items():
        present = ", ".join(f"{package} {version}" for package, version in packages["present"].items())
        missing = f"missing {', '.join(packages['missing'])}: {packages['install']}" if packages["missing"] else ""
        rows.append([name, "; ".join(part for part in (present, missing) if part)])
    table(rows, ["extra", ""])
