"""Train the shapes model from scratch: autoencoder, text encoder, latents, denoiser."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import matplotlib.pyplot as plt
import numpy as np
import torch
import typer
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

import architecture
import corpus
import generator
from denoising import Plan, train_denoiser
from emphasis import DETAIL, LAYOUT
from encoding import encode_all
from plain_attention import PlainAttention
from progress import Budget, Checkpoint, Record, read_record, set_rate
from reader import Reader
from shards import Batch, Losses, Shards
from twin import Twin

app = typer.Typer(add_completion=False, help=__doc__)

Out = Annotated[Path, typer.Option(help="Where checkpoints, latents and the model go.")]
Seed = Annotated[int, typer.Option(help="Seed of every source of randomness.")]
Device = Annotated[str, typer.Option(help="cpu or cuda.")]
Cores = Annotated[int, typer.Option(help="Parts of a batch computed side by side on the CPU.")]
Minutes = Annotated[float, typer.Option("--budget-minutes", help="Wall-clock budget.")]

CROP = 64


@app.callback()
def _main() -> None:
    """Train the shapes model from scratch."""


def to_tensor(pictures: list[generator.Picture]) -> Tensor:
    """uint8 pictures (H, W, 3) to one float32 tensor (N, 3, H, W) in [-1, 1]."""
    batch = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return batch.float().div_(127.5).sub_(1.0)


def draw_pictures(rng: np.random.Generator, count: int, crop: int) -> Tensor:
    """Fresh training pictures, or random crops of them: (count, 3, crop, crop) in [-1, 1]."""
    pictures = []
    for _ in range(count):
        scene = generator.sample_training_scene(rng)
        picture = generator.draw(generator.sample_layout(scene, rng))
        top, left = rng.integers(0, generator.SIDE - crop + 1, size=2)
        pictures.append(picture[top : top + crop, left : left + crop])
    return to_tensor(pictures)


def edge_loss(made: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute difference of the pictures' horizontal and vertical finite differences."""
    difference = made - wanted
    return difference.diff(dim=-1).abs().mean() + difference.diff(dim=-2).abs().mean()


def psnr(made: Tensor, wanted: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1], over all pixels together."""
    error = (made.clamp(-1, 1) - wanted).square().mean().item()
    return float(10 * np.log10(4 / error))


@app.command()
def vae(
    out: Out = Path("runs/shapes"),
    seed: Seed = 0,
    budget_minutes: Minutes = 32,
    device: Device = "cpu",
    cores: Cores = 2,
    batch: Annotated[int, typer.Option(help="Crops a step.")] = 12,
    peak: Annotated[float, typer.Option(help="Greatest learning rate.")] = 1.5e-3,
    whole: Annotated[float, typer.Option(help="Last part on whole pictures.")] = 0.34,
) -> None:
    """Train the autoencoder on random crops, then on whole pictures."""
    torch.manual_seed(seed)
    shards = Shards(device, cores)
    model = architecture.build_vae().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), peak, betas=(0.9, 0.99), weight_decay=0.01)
    checkpoint = Checkpoint(out / "vae.safetensors")
    step, spent = checkpoint.load({"vae": model}, optimizer)
    rng = np.random.default_rng((seed, 1, step))
    held = draw_pictures(np.random.default_rng((seed, 2)), 16, generator.SIDE).to(device)
    budget = Budget(budget_minutes, spent)
    weights = list(model.parameters())

    def losses(part: Batch) -> Losses:
        wanted = part["pictures"]
        posterior = model.encode(wanted).latent_dist
        found = picture_losses(model.decode(posterior.sample()).sample.float(), wanted)
        kl = posterior.kl().float().mean() / posterior.mean[0].numel()
        return {**found, "total": found["total"] + 2e-4 * kl, "kl": kl}

    with Record(out / "vae.jsonl", "vae", budget) as record:
        while budget.fraction < 1:
            set_rate(optimizer, budget.rate(peak, warmup=0.01))
            if budget.fraction < 1 - whole:
                pictures = draw_pictures(rng, batch, CROP)
            else:
                pictures = draw_pictures(rng, batch // 3, generator.SIDE)
            record.add(shards.backward(weights, losses, {"pictures": pictures.to(device)}))
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            step += 1
            if step % 250 == 0:
                with torch.no_grad():
                    quality = psnr(model(held).sample, held)
                record.report(step, psnr=quality)
            if checkpoint.due():
                checkpoint.save({"vae": model}, optimizer, step, budget.spent)
    checkpoint.save({"vae": model}, optimizer, step, budget.spent)


def picture_losses(made: Tensor, wanted: Tensor) -> Losses:
    """The losses of reconstructed pictures; the squared error is weighted for the edges' sake."""
    absolute, square = F.l1_loss(made, wanted), F.mse_loss(made, wanted)
    edge = edge_loss(made, wanted)
    total = absolute + 10 * square + 0.5 * edge
    return {"total": total, "l1": absolute, "mse": square, "edge": edge}


@app.command()
def decoder(
    out: Out = Path("runs/shapes"),
    seed: Seed = 0,
    budget_minutes: Minutes = 5,
    device: Device = "cpu",
    cores: Cores = 2,
    batch: Annotated[int, typer.Option(help="Pictures a step.")] = 4,
    peak: Annotated[float, typer.Option(help="Greatest learning rate.")] = 6e-4,
) -> None:
    """Train the decoder alone a while longer: the latents stay what the denoiser has learnt."""
    torch.manual_seed(seed)
    shards = Shards(device, cores)
    model = architecture.build_vae().to(device)
    Checkpoint(out / "vae.safetensors").load({"vae": model})
    weights = [*model.decoder.parameters(), *model.post_quant_conv.parameters()]
    optimizer = torch.optim.AdamW(weights, peak, betas=(0.9, 0.99), weight_decay=0.01)
    checkpoint = Checkpoint(out / "decoder.safetensors")
    step, spent = checkpoint.load({"vae": model}, optimizer)
    rng = np.random.default_rng((seed, 6, step))
    held = draw_pictures(np.random.default_rng((seed, 2)), 16, generator.SIDE).to(device)
    budget = Budget(budget_minutes, spent)

    def losses(part: Batch) -> Losses:
        with torch.no_grad():
            latent = model.encode(part["pictures"]).latent_dist.sample()
        return picture_losses(model.decode(latent).sample.float(), part["pictures"])

    with Record(out / "decoder.jsonl", "decoder", budget) as record:
        while budget.fraction < 1:
            set_rate(optimizer, budget.rate(peak, warmup=0.02))
            pictures = draw_pictures(rng, batch, generator.SIDE).to(device)
            record.add(shards.backward(weights, losses, {"pictures": pictures}))
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            step += 1
            if step % 250 == 0:
                with torch.no_grad():
                    quality = psnr(model(held).sample, held)
                record.report(step, psnr=quality)
            if checkpoint.due():
                checkpoint.save({"vae": model}, optimizer, step, budget.spent)
    checkpoint.save({"vae": model}, optimizer, step, budget.spent)


@app.command()
def text(
    out: Out = Path("runs/shapes"),
    seed: Seed = 0,
    budget_minutes: Minutes = 2,
    device: Device = "cpu",
    cores: Cores = 2,
    batch: Annotated[int, typer.Option(help="Captions a step.")] = 128,
    peak: Annotated[float, typer.Option(help="Greatest learning rate.")] = 1.5e-3,
) -> None:
    """Train the text encoder, with a head to be thrown away, to say what lies where."""
    torch.manual_seed(seed)
    shards = Shards(device, cores)
    encoder, reader = architecture.build_text_encoder().to(device).train(), Reader().to(device)
    models = {"text": encoder, "reader": reader}
    weights = [*encoder.parameters(), *reader.parameters()]
    optimizer = torch.optim.AdamW(weights, peak, betas=(0.9, 0.99), weight_decay=0.01)
    checkpoint = Checkpoint(out / "text.safetensors")
    step, spent = checkpoint.load(models, optimizer)
    rng = np.random.default_rng((seed, 3, step))
    held = held_captions(seed, 512)
    budget = Budget(budget_minutes, spent)

    def losses(part: Batch) -> Losses:
        hidden = encoder(part["ids"]).last_hidden_state
        return {"total": reader.loss(hidden, part["labels"])}

    with Record(out / "text.jsonl", "text", budget) as record:
        while budget.fraction < 1:
            set_rate(optimizer, budget.rate(peak, warmup=0.05))
            ids, labels = corpus.sample_captions(rng, batch)
            found = shards.backward(weights, losses, {"ids": ids.to(device), "labels": labels.to(device)})
            record.add(found)
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            step += 1
            if step % 100 == 0:
                with torch.no_grad():
                    hidden = encoder(held[0].to(device)).last_hidden_state
                    accuracy = reader.accuracy(hidden, held[1].to(device))
                record.report(step, accuracy=accuracy)
            if checkpoint.due():
                checkpoint.save(models, optimizer, step, budget.spent)
    checkpoint.save(models, optimizer, step, budget.spent)


def held_captions(seed: int, count: int) -> tuple[Tensor, Tensor]:
    """Token ids and labels of captions held out of training, half of them with two objects."""
    rng = np.random.default_rng((seed, 4))
    scenes = generator.sample_unseen_scenes(rng, count // 2, two=True)
    scenes += generator.sample_unseen_scenes(rng, count // 2, two=False)
    ids = corpus.encode_all([scene.caption for scene in scenes])
    return ids, corpus.describe_all(scenes)


@app.command()
def latents(
    out: Out = Path("runs/shapes"),
    seed: Seed = 0,
    device: Device = "cpu",
    cores: Cores = 2,
    pictures: Annotated[int, typer.Option(help="Pictures to encode.")] = 60_000,
    two_objects: Annotated[float, typer.Option(help="Share with two objects.")] = 0.65,
    scaling: Annotated[float | None, typer.Option(help="Scaling factor. Default: to unit variance.")] = None,
) -> None:
    """Draw the training pictures and encode them once, with their captions."""
    path = out / "latents.safetensors"
    if path.exists():
        return
    torch.set_num_threads(1)
    model = architecture.build_vae().to(device)
    Checkpoint(out / "vae.safetensors").load({"vae": model})
    rng = np.random.default_rng((seed, 5))
    size = 32
    ids: list[Tensor] = []

    def draw_batches() -> Iterator[Tensor]:
        for _ in track(range(pictures // size), description="latents"):
            scenes = [generator.sample_training_scene(rng, two_objects) for _ in range(size)]
            ids.append(corpus.encode_all([scene.caption for scene in scenes]))
            layouts = [generator.sample_layout(scene, rng) for scene in scenes]
            yield to_tensor([generator.draw(layout) for layout in layouts])

    found = encode_all(lambda part: model.encode(part).latent_dist.mode(), draw_batches(), device, cores)
    factor = 1 / found.std() if scaling is None else torch.tensor(scaling)
    tensors = {"latents": (found * factor).half(), "ids": torch.cat(ids), "scaling": factor}
    aside = path.with_suffix(".new")
    save_file(tensors, aside)
    aside.replace(path)


@app.command()
def unet(
    out: Out = Path("runs/shapes"),
    seed: Seed = 0,
    budget_minutes: Minutes = 68,
    device: Device = "cpu",
    cores: Cores = 2,
    batch: Annotated[int, typer.Option(help="Latents a step.")] = 48,
    peak: Annotated[float, typer.Option(help="Greatest learning rate.")] = 1.3e-3,
    empty: Annotated[float, typer.Option(help="Share of empty captions.")] = 0.1,
    layout_part: Annotated[float, typer.Option(help="First part of the budget, spent on layout.")] = 0.5,
    start: Annotated[Path | None, typer.Option(help="A model folder whose denoiser to start from.")] = None,
) -> None:
    """Train the denoiser on what the text encoder makes of the captions."""
    torch.manual_seed(seed)
    shards = Shards(device, cores, autocast=False)
    data = load_file(out / "latents.safetensors")
    data = {key: value.to(device) for key, value in data.items()}
    encoder = architecture.build_text_encoder()
    Checkpoint(out / "text.safetensors").load({"text": encoder})
    encoder.to(device, torch.bfloat16).requires_grad_(requires_grad=False)
    denoiser = architecture.build_unet()
    if start is None:
        architecture.start_from_identity(denoiser)
    else:
        denoiser.load_state_dict(load_file(start / "unet" / "diffusion_pytorch_model.safetensors"))
    twin = Twin(denoiser.to(device), peak)
    twin.worker.set_attn_processor(PlainAttention())
    plan = Plan("unet", budget_minutes, batch, peak, (LAYOUT, DETAIL), (layout_part,))

    def predict(noisy: Tensor, times: Tensor, part: Batch) -> Tensor:
        with torch.no_grad():
            hidden = encoder(part["ids"]).last_hidden_state
        guess: Tensor = twin.worker(noisy, times, hidden).sample
        return guess

    def pick(order: torch.Generator) -> dict[str, Tensor]:
        picked = torch.randint(len(data["latents"]), (batch,), generator=order).to(device)
        ids = corpus.drop(data["ids"][picked], empty, order)
        return {"latents": data["latents"][picked].float(), "ids": ids}

    train_denoiser(plan, twin, out, seed, shards, pick, predict, lambda: export(out))


@app.command()
def adopt(
    model: Annotated[Path, typer.Argument(help="A model folder.")],
    out: Out = Path("runs/shapes"),
) -> None:
    """Take a model's autoencoder and text encoder as trained, to go on with its denoiser.

    Then: `latents --scaling` with the model's scaling factor, and `unet --start` with its folder.
    """
    autoencoder, encoder = architecture.build_vae(), architecture.build_text_encoder()
    autoencoder.load_state_dict(load_file(model / "vae" / "diffusion_pytorch_model.safetensors"))
    encoder.load_state_dict(load_file(model / "text_encoder" / "model.safetensors"))
    out.mkdir(parents=True, exist_ok=True)
    done = float("inf")  # seconds spent: no budget is left
    Checkpoint(out / "vae.safetensors").save({"vae": autoencoder.float()}, None, 0, done)
    Checkpoint(out / "text.safetensors").save({"text": encoder.float(), "reader": Reader()}, None, 0, done)


@app.command()
def export(out: Out = Path("runs/shapes")) -> None:
    """Write the averaged weights as a diffusers pipeline folder, ``model`` in the output."""
    autoencoder = architecture.build_vae()
    finished = out / "decoder.safetensors"
    Checkpoint(finished if finished.exists() else out / "vae.safetensors").load({"vae": autoencoder})
    with safe_open(out / "latents.safetensors", framework="pt") as file:
        scaling = file.get_tensor("scaling").item()
    autoencoder.register_to_config(scaling_factor=round(scaling, 5))
    encoder, denoiser = architecture.build_text_encoder(), architecture.build_unet()
    Checkpoint(out / "text.safetensors").load({"text": encoder})
    Checkpoint(out / "unet.safetensors").load({"average.unet": denoiser})
    architecture.save_pipeline(out / "model", autoencoder, encoder, denoiser)


@app.command()
def plot(
    out: Out = Path("runs/shapes"),
    picture: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("training.png"),
) -> None:
    """Draw the losses over the minutes of each phase that has a record."""
    phases = (
        ("vae", "autoencoder: PSNR, dB", ("psnr",), False),
        ("text", "text encoder: loss, share all right", ("total", "accuracy"), False),
        ("unet", "denoiser: loss, noise error by half", ("denoise", "high", "low"), True),
    )
    shown = [phase for phase in phases if (out / f"{phase[0]}.jsonl").exists()]
    figure, axes = plt.subplots(1, len(shown), figsize=(4.3 * len(shown), 3.6), layout="constrained", squeeze=False)
    for axis, (phase, title, names, logarithmic) in zip(axes[0], shown, strict=True):
        lines = read_record(out / f"{phase}.jsonl")
        for name in names:
            points = [(line["seconds"] / 60, line[name]) for line in lines if name in line]
            axis.plot(*zip(*points, strict=True), label=name)
        axis.set(title=title, xlabel="minutes")
        if logarithmic:
            axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(picture, dpi=90)


@app.command(name="all")
def everything(
    out: Out = Path("runs/shapes"),
    seed: Seed = 0,
    device: Device = "cpu",
    cores: Cores = 2,
    vae_minutes: Annotated[float, typer.Option(help="The autoencoder's budget.")] = 32,
    text_minutes: Annotated[float, typer.Option(help="The text encoder's budget.")] = 2,
    unet_minutes: Annotated[float, typer.Option(help="The denoiser's budget.")] = 68,
    decoder_minutes: Annotated[float, typer.Option(help="The decoder's budget.")] = 5,
) -> None:
    """Run the phases one after the other; what is done already is not done again."""
    out.mkdir(parents=True, exist_ok=True)
    vae(out, seed, vae_minutes, device, cores)
    text(out, seed, text_minutes, device, cores)
    latents(out, seed, device, cores)
    unet(out, seed, unet_minutes, device, cores)
    decoder(out, seed, decoder_minutes, device, cores)
    export(out)
    plot(out, out / "training.png")


if __name__ == "__main__":
    app()
