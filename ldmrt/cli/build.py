"""`ldmrt build-engines`: from a model to a bundle."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ldmrt.cli.options import Dtype, EngineChoice, Json, LoraChoice, Size, Verbose, lora_option, parse_size
from ldmrt.cli.output import print_json, progress_bar, size_text, table

if TYPE_CHECKING:
    from ldmrt.manifest import ModelRecord


def build_engines(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL",
            help="Folder of a model in the diffusers layout, .safetensors file in the original one, or owner/name on the Hugging Face Hub.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder of the bundle. Engines are added to one that is there.")
    ],
    engine: Annotated[EngineChoice, typer.Option(help="What runs the model. auto: torch.")] = EngineChoice.auto,
    size: Annotated[
        list[Size] | None,
        typer.Option(
            metavar="WxH", parser=parse_size, help="Width and height in pixels; repeatable. Default: the model's own."
        ),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(metavar="N", help="Images at a time; repeatable. Default: 1.")
    ] = None,
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="Precision. auto: float16 with --target, bfloat16 on a CPU that computes in it, else float32."
        ),
    ] = Dtype.auto,
    target: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SM",
            help="GPU architecture to compile kernels and TensorRT plans for, such as sm_89; repeatable. Needs Triton here, but no GPU.",
        ),
    ] = None,
    optimization_level: Annotated[
        int | None, typer.Option(metavar="N", help="How long TensorRT searches for fast kernels, 0 to 5.")
    ] = None,
    workspace: Annotated[
        int | None, typer.Option(metavar="MIB", help="The most memory that a layer of a TensorRT plan may use, in MiB.")
    ] = None,
    refit: Annotated[
        bool,
        typer.Option("--refit", help="TensorRT plans whose weights can be changed, by a LoRA too. Needs the GPU here."),
    ] = False,
    weight_streaming: Annotated[
        bool,
        typer.Option("--weight-streaming", help="TensorRT plans that can leave weights in the host's memory; slower."),
    ] = False,
    plugins: Annotated[
        bool,
        typer.Option(
            "--plugins", help="TensorRT plans with our own kernels in them. Needs the GPU here; not yet tried on one."
        ),
    ] = False,
    lora: Annotated[list[LoraChoice] | None, lora_option("LoRA to fuse into the weights")] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="MODEL",
            help="The model that has what the file (or folder of a U-Net) MODEL has not, such as the VAE.",
        ),
    ] = None,
    vae: Annotated[
        Path | None, typer.Option(metavar="PATH", help="VAE instead of the model's own: folder, file or owner/name.")
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Which copy of the weights, where there are several, such as fp16."),
    ] = None,
    revision: Annotated[
        str | None, typer.Option(metavar="REV", help="Branch, tag or commit of a model on the Hub.")
    ] = None,
    controlnet: Annotated[
        list[Path] | None,
        typer.Option(metavar="DIR", help="Folder of a ControlNet for this model, to be used with it; repeatable."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="YAML file of a model of the original latent diffusion code, for MODEL's file."
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of BERT's vocabulary, for such a model that reads text.")
    ] = None,
    decoder_tile: Annotated[
        int | None,
        typer.Option(
            metavar="PIXELS",
            help="Make a decoder of PIXELS x PIXELS too, for larger pictures where memory is scarce (generate --memory-budget).",
        ),
    ] = None,
    json: Json = False,
    _verbose: Verbose = False,
) -> None:
    """Compile a model into a bundle of verified engines."""
    started = time.perf_counter()
    import ldmrt

    build = ldmrt.build_engines  # here, so that a missing package is reported before the bar appears
    with progress_bar("starting") as update:
        bundle = build(
            model,
            out,
            engine=engine.value,
            sizes=size or None,
            batch_sizes=batch or (1,),
            dtype=dtype.value,
            targets=target or (),
            optimization_level=optimization_level,
            workspace=None if workspace is None else workspace << 20,
            refit=refit,
            weight_streaming=weight_streaming,
            plugins=plugins,
            loras=lora or (),
            base=base,
            vae=vae,
            variant=variant,
            revision=revision,
            controlnets=controlnet or (),
            config=config,
            tokenizer=tokenizer,
            decoder_tile=decoder_tile,
            on_progress=lambda what, done, total: update(description=what, completed=done, total=total),
        )
    seconds = time.perf_counter() - started
    engines = bundle.manifest.engines
    if json:
        document: dict[str, Any] = {
            "bundle": str(bundle.path.resolve()),
            "model": bundle.manifest.model.name,
            "engines": [record.model_dump(mode="json") for record in engines],
            "seconds": round(seconds, 3),
        }
        print_json(document)
        return
    rows = [
        [
            record.component,
            record.kind,
            record.dtype,
            size_text(record.size),
            str(record.rows or "any"),
            f"{max(record.certificate.relative_error.values(), default=float('nan')):.1e}",
            f"{record.certificate.tolerance:.0e}",
            record.certificate.status,
        ]
        for record in engines
    ]
    table(rows, ["component", "engine", "dtype", "size", "rows", "error", "allowed", "status"])
    typer.echo(f"\n{len(engines)} engines in {out} after {seconds:.1f} s. Next:")
    if any(record.trials is not None and record.certificate.status != "verified" for record in engines):
        typer.echo(f"  ldmrt verify {shlex.quote(str(out))}   (on a machine with the GPU)")
    typer.echo(f"  ldmrt generate {next_words(bundle.manifest.model)}--engines {shlex.quote(str(out))}")


def next_words(model: ModelRecord) -> str:
    """What a model draws from."""
    brings = model.inpainting or model.upscaling is not None
    words = {'"a prompt" ': bool(model.tokenizers), "--image FILE ": brings, "--mask FILE ": model.inpainting}
    return "".join(word for word, wanted in words.items() if wanted)
