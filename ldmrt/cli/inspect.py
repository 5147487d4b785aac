"""`ldmrt inspect`: what a bundle holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldmrt.cli.options import Json, Verbose
from ldmrt.cli.output import bytes_text, print_json, size_text, table
from ldmrt.errors import BundleError

if TYPE_CHECKING:
    from ldmrt.bundle import Bundle
    from ldmrt.manifest import AuditRecord, EngineRecord, FileRecord


def inspect(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A bundle made by build-engines.")],
    check: Annotated[bool, typer.Option("--check", help="Also compare every file with its SHA-256.")] = False,
    json: Json = False,
    _verbose: Verbose = False,
) -> None:
    """Show what a bundle holds, and what of it runs here."""
    from ldmrt.bundle import Bundle

    bundle = Bundle.open(folder)
    document = describe(bundle)
    problems = damage(bundle) if check else []
    if check:
        document["check"] = {"files": len({record.file for record in bundle.records()}), "problems": problems}
    if json:
        print_json(document)
    else:
        _print(bundle, document)
        if check and not problems:
            typer.echo(f"\n{document['check']['files']} files checked: all are as they were built")
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise BundleError(problems[0] + more)


def describe(bundle: Bundle) -> dict[str, Any]:
    """The contents of a bundle as one JSON-safe document."""
    from ldmrt.doctor import engine_kinds
    from ldmrt.engines.tensorrt import gpu_at_hand, gpu_here

    manifest, missing = bundle.manifest, engine_kinds()

    def file(record: FileRecord) -> dict[str, Any]:
        path = bundle.locate(record.file)
        return {**record.model_dump(), "bytes": path.stat().st_size if path.is_file() else None}

    def engine(record: EngineRecord) -> dict[str, Any]:
        lacking = missing[record.kind]
        if lacking is None and record.targets and gpu_at_hand() not in record.targets:
            lacking = f"{record.label} is for {', '.join(record.targets)}, and {gpu_here(gpu_at_hand())}"
        return {
            **record.model_dump(mode="json"),
            "files": [file(item) for item in record.files],
            "runs_here": lacking is None,
            "missing_here": lacking,
        }

    weights = {name: file(record) for name, record in manifest.weights.items()}
    engines = [engine(record) for record in manifest.engines]
    sizes = {item["file"]: item["bytes"] or 0 for item in weights.values()}
    sizes |= {item["file"]: item["bytes"] or 0 for record in engines for item in record["files"]}
    return {
        "path": str(bundle.path.resolve()),
        "format": manifest.format,
        "ldmrt": manifest.ldmrt,
        "model": manifest.model.model_dump(mode="json"),
        "loras": [record.model_dump() for record in manifest.loras],
        "controlnets": [record.model_dump() for record in manifest.controlnets],
        "bytes": sum(sizes.values()),
        "weights": weights,
        "engines": engines,
        "passes": manifest.passes,
        "audits": [record.model_dump(mode="json") for record in manifest.audits],
        "kernels": _kernels(bundle),
    }


def _kernels(bundle: Bundle) -> list[dict[str, Any]]:
    """The compiled kernels, with what each takes of a multiprocessor; none if a file is damaged, which `damage` reports."""
    try:
        cubins = bundle.cubins()
    except BundleError:
        return []
    return [
        {
            "kernel": cubin.variant.kernel,
            "target": f"sm_{cubin.arch}",
            "types": list(cubin.variant.types),
            "constants": dict(cubin.variant.constants),
            "threads": cubin.threads,
            "registers": cubin.registers,
            "shared_bytes": cubin.shared,
            "stack_bytes": cubin.stack,
            "bytes": len(cubin.code),
            "triton": cubin.triton,
        }
        for cubin in cubins
    ]


def damage(bundle: Bundle) -> list[str]:
    """What is wrong with the files, one line each."""
    problems = []
    for record in bundle.records():
        try:
            bundle.checked(record)
        except BundleError as error:
            problems.append(str(error))
    return list(dict.fromkeys(problems))


def _print(bundle: Bundle, document: dict[str, Any]) -> None:
    manifest = bundle.manifest
    model, defaults = manifest.model, manifest.model.defaults
    typer.echo(f"{model.name} ({model.kind}), built by ldmrt {manifest.ldmrt}, {bytes_text(document['bytes'])}")
    typer.echo(
        f"defaults: {defaults.width}x{defaults.height}, {defaults.num_inference_steps} steps, guidance "
        f"{defaults.guidance_scale:g}, {defaults.sampler}"
    )
    for lora in manifest.loras:
        typer.echo(f"fused: {lora.file}, scale {lora.scale:g} (SHA-256 {lora.sha256[:12]}...)")
    if manifest.controlnets:
        typer.echo(f"ControlNets: {', '.join(record.name for record in manifest.controlnets)}")
    typer.echo()
    rows = [
        [
            record["component"],
            record["kind"],
            record["dtype"],
            size_text(record["size"]),
            str(record["rows"] or "any"),
            ", ".join(record["targets"]) or "any",
            record["key"][:8],
            _size_of(record["files"]),
            record["weights"],
            _certificate(record["certificate"]),
            "yes" if record["runs_here"] else "no",
        ]
        for record in document["engines"]
    ]
    if rows:
        table(
            rows,
            ["component", "engine", "dtype", "size", "rows", "targets", "key", "file", "weights", "error", "runs here"],
        )
    for reason in dict.fromkeys(record["missing_here"] for record in document["engines"] if record["missing_here"]):
        typer.echo(reason)
    if document["weights"]:
        typer.echo()
        table(
            [[name, item["file"], _size_of([item])] for name, item in document["weights"].items()],
            ["weights", "file", "size"],
        )
    _print_passes(manifest.passes)
    _print_audits(manifest.audits)
    _print_kernels(document["kernels"])


def _print_passes(passes: Mapping[str, Mapping[str, int]]) -> None:
    """What the compiler did to each component: nodes, and of each pattern how many places were found and fused."""
    if not passes:
        return
    typer.echo()
    table(
        [
            [component, ", ".join(f"{count} {what}" for what, count in counts.items() if "." not in what)]
            for component, counts in passes.items()
        ],
        ["compiled", "nodes"],
    )
    names = dict.fromkeys(what.split(".")[0] for counts in passes.values() for what in counts if "." in what)
    if names:
        typer.echo()
        rows = [
            [component, *(f"{counts.get(f'{name}.fused', 0)} of {counts.get(f'{name}.found', 0)}" for name in names)]
            for component, counts in passes.items()
        ]
        table(rows, ["fused of found", *names])


def _print_audits(audits: Sequence[AuditRecord]) -> None:
    """Which values of float16 engines are computed in float32, and how large they are."""
    rows = [
        [record.component, record.kind, size_text(record.size), name, f"{largest:.3g}"]
        for record in audits
        for name, largest in record.widened.items()
    ]
    if rows:
        typer.echo()
        table(rows, ["component", "engine", "size", "float32 instead of float16", "up to"])


def _print_kernels(kernels: list[dict[str, Any]]) -> None:
    """By kernel and target: how many variants, and the most that any of them takes."""
    if not kernels:
        return
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for kernel in kernels:
        groups.setdefault((kernel["kernel"], kernel["target"]), []).append(kernel)
    typer.echo()
    rows = [
        [
            name,
            target,
            str(len(members)),
            *(str(max(member[what] for member in members)) for what in ("registers", "shared_bytes", "stack_bytes")),
            bytes_text(sum(member["bytes"] for member in members)),
        ]
        for (name, target), members in sorted(groups.items())
    ]
    table(rows, ["kernel", "target", "variants", "registers", "shared", "stack", "size"])


def _size_of(files: list[dict[str, Any]]) -> str:
    if any(item["bytes"] is None for item in files):
        return "missing"
    return bytes_text(sum(item["bytes"] for item in files))


def _certificate(certificate: dict[str, Any]) -> str:
    errors = certificate["relative_error"].values()
    if certificate["status"] != "verified" or not errors:
        return str(certificate["status"]).split(":")[0]
    return f"{max(errors):.1e} of {certificate['tolerance']:.0e}"
