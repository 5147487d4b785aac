"""Train the shapes model's companions: an upscaler, an inpainting model, a ControlNet for edges, a LoRA for outlines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL, UNet2DConditionModel, VQModel
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel

import architecture
import companions
import corpus
import generator
from degradation import add_noise, shrink
from denoising import Plan, train_denoiser
from edges import draw_edges
from emphasis import DETAIL, LAYOUT
from encoding import encode_all
from masks import sample_mask
from narrowing import narrow
from outlines import draw_outlined
from plain_attention import PlainAttention
from progress import Budget, Checkpoint, Record, set_rate
from shards import Batch, Losses, Shards
from train import CROP, Cores, Device, Minutes, Out, Seed, draw_pictures, picture_losses, psnr, to_tensor
from twin import Twin

Base = Annotated[Path, typer.Option(help="The shapes model's folder.")]

BASE = Path(__file__).resolve().parents[2] / "ldmrt" / "builtin" / "shapes"
BATCH = 32  # pictures encoded at a time
CELL = generator.SIDE // architecture.LATENT_SIDE  # pixels of a latent cell, each way

app = typer.Typer(add_completion=False, help=__doc__)


@app.callback()
def _main() -> None:
    """Train the shapes model's companions."""


@torch.no_grad()
def cluster(latents: Tensor, codes: int, rounds: int = 12) -> Tensor:
    """Means of k clusters (codes, C) of latents (N, C), by Lloyd's algorithm from random ones of them."""
    means = latents[torch.randperm(len(latents))[:codes]].clone()
    for _ in range(rounds):
        nearest = torch.cat([torch.cdist(part, means).argmin(1) for part in torch.split(latents, 8192)])
        counts = torch.bincount(nearest, minlength=codes)
        sums = torch.zeros_like(means).index_add_(0, nearest, latents)
        empty = counts == 0
        means = sums / counts.clamp(min=1)[:, None]
        means[empty] = latents[torch.randint(len(latents), (int(empty.sum()),))]
    return means


@torch.no_grad()
def start_quantizing(model: VQModel, pictures: Tensor) -> None:
    """Bring the latents to unit variance, and make the codebook of what the encoder makes of pictures."""
    latents = model.encode(pictures).latents
    scale = 1 / latents.std()
    model.quant_conv.weight.mul_(scale)
    model.quant_conv.bias.mul_(scale)
    model.post_quant_conv.weight.div_(scale)
    found = (latents * scale).permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
    codebook = model.quantize.embedding.weight
    codebook.copy_(cluster(found, len(codebook)))


@app.command()
def stage(
    out: Out = Path("runs/companions"),
    seed: Seed = 0,
    budget_minutes: Minutes = 10,
    device: Device = "cpu",
    cores: Cores = 2,
    batch: Annotated[int, typer.Option(help="Crops a step.")] = 12,
    peak: Annotated[float, typer.Option(help="Greatest learning rate.")] = 2e-3,
    unquantized: Annotated[float, typer.Option(help="First part without a codebook.")] = 0.5,
) -> None:
    """Train the upscaler's first stage: at first without its codebook, which is then made of the latents it has come to."""
    torch.manual_seed(seed)
    shards = Shards(device, cores)
    model = companions.build_first_stage().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), peak, betas=(0.9, 0.99), weight_decay=0.0)
    checkpoint = Checkpoint(out / "stage.safetensors")
    step, spent = checkpoint.load({"stage": model}, optimizer)
    rng = np.random.default_rng((seed, 10, step))
    held = draw_pictures(np.random.default_rng((seed, 11)), 16, generator.SIDE).to(device)
    budget = Budget(budget_minutes, spent)
    weights = list(model.parameters())
    quantized = budget.fraction >= unquantized

    def losses(part: Batch) -> Losses:
        wanted = part["pictures"]
        latents = model.encode(wanted).latents.float()
        if quantized:
            found = model.decode(latents)
            drift = found.commit_loss.float().mean()
        else:
            # Latents that lie this near to each other will have one code.
            near = latents + 0.05 * latents.detach().std() * torch.randn_like(latents)
            found = model.decode(near, force_not_quantize=True)
            drift = torch.zeros(())
        made = picture_losses(found.sample.float(), wanted)
        return {**made, "total": made["total"] + 0.25 * drift, "drift": drift}

    with Record(out / "stage.jsonl", "first stage", budget) as record:
        while budget.fraction < 1:
            if not quantized and budget.fraction >= unquantized:
                start_quantizing(model, draw_pictures(rng, 48, generator.SIDE).to(device))
                quantized = True
            set_rate(optimizer, budget.rate(peak, warmup=0.02))
            pictures = draw_pictures(rng, batch, CROP)
            record.add(shards.backward(weights, losses, {"pictures": pictures.to(device)}))
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            step += 1
            if step % 100 == 0:
                with torch.no_grad():
                    latents = model.encode(held).latents
                    quality = psnr(model.decode(latents, force_not_quantize=not quantized).sample, held)
                record.report(step, psnr=quality)
            if checkpoint.due():
                checkpoint.save({"stage": model}, optimizer, step, budget.spent)
    checkpoint.save({"stage": model}, optimizer, step, budget.spent)


@app.command()
def upscaler(
    out: Out = Path("runs/companions"),
    seed: Seed = 0,
    budget_minutes: Minutes = 20,
    device: Device = "cpu",
    cores: Cores = 2,
    batch: Annotated[int, typer.Option(help="Latents a step.")] = 32,
    peak: Annotated[float, typer.Option(help="Greatest learning rate.")] = 1.5e-3,
    pictures: Annotated[int, typer.Option(help="Pictures to learn from.")] = 12_000,
) -> None:
    """Train the upscaler's denoiser on small pictures with blur and noise."""
    torch.manual_seed(seed)
    data = cached(out / "upscaler-data.safetensors", lambda: upscaler_data(out, seed, device, cores, pictures))
    shards = Shards(device, cores, autocast=False)
    twin = Twin(companions.build_upscaler().to(device), peak)
    plan = Plan("upscaler", budget_minutes, batch, peak, (DETAIL,), velocity=True)

    def predict(noisy: Tensor, times: Tensor, part: Batch) -> Tensor:
        guess: Tensor = twin.worker(torch.cat([noisy, part["small"].bfloat16()], dim=1), times).sample
        return guess

    def pick(order: torch.Generator) -> dict[str, Tensor]:
        picked = torch.randint(len(data["latents"]), (batch,), generator=order)
        small = data["small"][picked].float() / 127.5 - 1
        part = {"latents": data["latents"][picked].float(), "small": add_noise(small, order)}
        return {name: value.to(device) for name, value in part.items()}

    train_denoiser(plan, twin, out, seed, shards, pick, predict)


def upscaler_data(out: Path, seed: int, device: str, cores: int, count: int) -> dict[str, Tensor]:
    """Latents of pictures, and the pictures a quarter as wide and high."""
    torch.set_num_threads(1)
    model = companions.build_first_stage().to(device)
    Checkpoint(out / "stage.safetensors").load({"stage": model})
    rng = np.random.default_rng((seed, 12))
    small: list[Tensor] = []

    def draw_batches() -> Iterator[Tensor]:
        for _ in track(range(count // BATCH), description="latents"):
            pictures = [generator.draw(layout) for layout in sample_layouts(rng, BATCH)]
            shrunk = np.stack([shrink(picture, rng) for picture in pictures])
            small.append(torch.from_numpy(shrunk).permute(0, 3, 1, 2))
            yield to_tensor(pictures)

    latents = encode_all(lambda part: model.encode(part).latents, draw_batches(), device, cores)
    return {"latents": latents.half(), "small": torch.cat(small).contiguous()}


@app.command()
def inpainting(
    out: Out = Path("runs/companions"),
    base: Base = BASE,
    seed: Seed = 0,
    budget_minutes: Minutes = 40,
    device: Device = "cpu",
    cores: Cores = 2,
    batch: Annotated[int, typer.Option(help="Latents a step.")] = 48,
    peak: Annotated[float, typer.Option(help="Greatest learning rate.")] = 1.2e-3,
    empty: Annotated[float, typer.Option(help="Share of empty captions.")] = 0.1,
    layout_part: Annotated[float, typer.Option(help="First part of the budget, spent on layout.")] = 0.4,
    pictures: Annotated[int, typer.Option(help="Pictures to learn from.")] = 20_000,
) -> None:
    """Train a U-Net that draws what the caption says into the masked part of a picture. It starts from the base's, narrowed."""
    torch.manual_seed(seed)
    data = cached(out / "inpainting-data.safetensors", lambda: inpainting_data(base, seed, device, cores, pictures))
    encoder = frozen(CLIPTextModel.from_pretrained(base / "text_encoder"), device)
    shards = Shards(device, cores, autocast=False)
    denoiser, wide = companions.build_inpainting(), UNet2DConditionModel.from_pretrained(base / "unet")
    widths = dict(zip(wide.config.block_out_channels, denoiser.config.block_out_channels, strict=True))
    denoiser.load_state_dict(narrow(wide.state_dict(), denoiser.state_dict(), widths))
    twin = Twin(denoiser.to(device), peak)
    twin.worker.set_attn_processor(PlainAttention())
    plan = Plan("inpainting", budget_minutes, batch, peak, (LAYOUT, DETAIL), (layout_part,))

    def predict(noisy: Tensor, times: Tensor, part: Batch) -> Tensor:
        with torch.no_grad():
            hidden = encoder(part["ids"]).last_hidden_state
        seen = torch.cat([noisy, part["mask"].bfloat16(), part["masked"].bfloat16()], dim=1)
        guess: Tensor = twin.worker(seen, times, hidden).sample
        return guess

    def pick(order: torch.Generator) -> dict[str, Tensor]:
        picked = torch.randint(len(data["ids"]), (batch,), generator=order)
        part = {name: data[name][picked].float() for name in ("latents", "masked", "mask")}
        part["ids"] = corpus.drop(data["ids"][picked], empty, order)
        return {name: value.to(device) for name, value in part.items()}

    train_denoiser(plan, twin, out, seed, shards, pick, predict)


def inpainting_data(base: Path, seed: int, device: str, cores: int, count: int) -> dict[str, Tensor]:
    """Latents of pictures and of what a mask leaves of them, that mask's corner of each latent cell, and captions."""
    rng = np.random.default_rng((seed, 13))
    ids: list[Tensor] = []
    masks: list[Tensor] = []
    half = BATCH // 2

    def draw_batches() -> Iterator[Tensor]:
        for _ in track(range(count // half), description="latents"):
            layouts = sample_layouts(rng, half)
            ids.append(corpus.encode_all([layout.scene.caption for layout in layouts]))
            pictures = to_tensor([generator.draw(layout) for layout in layouts])
            hidden = torch.from_numpy(np.stack([sample_mask(layout, rng) for layout in layouts]))[:, None]
            masks.append(hidden[:, :, ::CELL, ::CELL].clone())
            yield torch.cat([pictures, pictures.masked_fill(hidden, 0)])

    latents = base_latents(base, draw_batches(), device, cores)
    first = torch.arange(len(latents)) % BATCH < half
    return {
        "latents": latents[first].half(),
        "masked": latents[~first].half(),
        "mask": torch.cat(masks).to(torch.uint8),
        "ids": torch.cat(ids),
    }


@app.command()
def controlnet(
    out: Out = Path("runs/companions"),
    base: Base = BASE,
    seed: Seed = 0,
    budget_minutes: Minutes = 25,
    device: Device = "cpu",
    cores: Cores = 2,
    batch: Annotated[int, typer.Option(help="Latents a step.")] = 24,
    peak: Annotated[float, typer.Option(help="Greatest learning rate.")] = 1.5e-3,
    empty: Annotated[float, typer.Option(help="Share of empty captions.")] = 0.3,
    pictures: Annotated[int, typer.Option(help="Pictures to learn from.")] = 12_000,
) -> None:
    """Train a ControlNet by which the shapes model's objects follow edges. It starts from the encoder that it is to steer."""
    torch.manual_seed(seed)
    data = cached(out / "edges-data.safetensors", lambda: edges_data(base, seed, device, cores, pictures))
    encoder = frozen(CLIPTextModel.from_pretrained(base / "text_encoder"), device)
    steered = UNet2DConditionModel.from_pretrained(base / "unet", torch_dtype=torch.float32)
    shards = Shards(device, cores, autocast=False)
    network = companions.build_controlnet()
    own = network.state_dict()
    network.load_state_dict({**own, **{key: value for key, value in steered.state_dict().items() if key in own}})
    twin = Twin(network.to(device), peak)
    steered = frozen(steered, device)
    steered.set_attn_processor(PlainAttention())
    plan = Plan("controlnet", budget_minutes, batch, peak, (LAYOUT, DETAIL), (0.5,))

    def predict(noisy: Tensor, times: Tensor, part: Batch) -> Tensor:
        with torch.no_grad():
            hidden = encoder(part["ids"]).last_hidden_state
        picture = part["edges"].bfloat16().expand(-1, 3, -1, -1)
        down, middle = twin.worker(noisy, times, hidden, picture, return_dict=False)
        guess: Tensor = steered(
            noisy, times, hidden, down_block_additional_residuals=down, mid_block_additional_residual=middle
        ).sample
        return guess

    def pick(order: torch.Generator) -> dict[str, Tensor]:
        picked = torch.randint(len(data["ids"]), (batch,), generator=order)
        edges = torch.from_numpy(np.unpackbits(data["edges"][picked].numpy(), axis=-1))
        part = {"latents": data["latents"][picked].float(), "edges": edges[:, None]}
        part["ids"] = corpus.drop(data["ids"][picked], empty, order)
        return {name: value.to(device) for name, value in part.items()}

    train_denoiser(plan, twin, out, seed, shards, pick, predict)


def edges_data(base: Path, seed: int, device: str, cores: int, count: int) -> dict[str, Tensor]:
    """Latents of pictures, their edges as bits, and captions."""
    rng = np.random.default_rng((seed, 14))
    ids: list[Tensor] = []
    edges: list[Tensor] = []

    def draw_batches() -> Iterator[Tensor]:
        for _ in track(range(count // BATCH), description="latents"):
            layouts = sample_layouts(rng, BATCH)
            ids.append(corpus.encode_all([layout.scene.caption for layout in layouts]))
            found = np.stack([draw_edges(layout, rng) for layout in layouts])
            edges.append(torch.from_numpy(np.packbits(found, axis=-1)))
            yield to_tensor([generator.draw(layout) for layout in layouts])

    latents = base_latents(base, draw_batches(), device, cores)
    return {"latents": latents.half(), "edges": torch.cat(edges), "ids": torch.cat(ids)}


@app.command()
def lora(
    out: Out = Path("runs/companions"),
    base: Base = BASE,
    seed: Seed = 0,
    budget_minutes: Minutes = 10,
    device: Device = "cpu",
    cores: Cores = 2,
    batch: Annotated[int, typer.Option(help="Latents a step.")] = 32,
    peak: Annotated[float, typer.Option(help="Greatest learning rate.")] = 2e-3,
    empty: Annotated[float, typer.Option(help="Share of empty captions.")] = 0.1,
    rank: Annotated[int, typer.Option(help="Rank of each change.")] = companions.RANK,
    pictures: Annotated[int, typer.Option(help="Pictures to learn from.")] = 8_000,
) -> None:
    """Train a LoRA by which the shapes model outlines its objects instead of filling them."""
    torch.manual_seed(seed)
    data = cached(out / "outlines-data.safetensors", lambda: outlines_data(base, seed, device, cores, pictures))
    encoder = frozen(CLIPTextModel.from_pretrained(base / "text_encoder"), device)
    shards = Shards(device, cores, autocast=False)
    twin = Twin(companions.with_lora(base, rank).to(device), peak)
    twin.worker.set_attn_processor(PlainAttention())
    plan = Plan("lora", budget_minutes, batch, peak, (DETAIL,))

    def predict(noisy: Tensor, times: Tensor, part: Batch) -> Tensor:
        with torch.no_grad():
            hidden = encoder(part["ids"]).last_hidden_state
        guess: Tensor = twin.worker(noisy, times, hidden).sample
        return guess

    def pick(order: torch.Generator) -> dict[str, Tensor]:
        picked = torch.randint(len(data["ids"]), (batch,), generator=order)
        ids = corpus.drop(data["ids"][picked], empty, order)
        return {"latents": data["latents"][picked].float().to(device), "ids": ids.to(device)}

    train_denoiser(plan, twin, out, seed, shards, pick, predict)


def outlines_data(base: Path, seed: int, device: str, cores: int, count: int) -> dict[str, Tensor]:
    """Latents of outlined pictures, and captions that say nothing of the style."""
    rng = np.random.default_rng((seed, 15))
    ids: list[Tensor] = []

    def draw_batches() -> Iterator[Tensor]:
        for _ in track(range(count // BATCH), description="latents"):
            layouts = sample_layouts(rng, BATCH)
            ids.append(corpus.encode_all([layout.scene.caption for layout in layouts]))
            yield to_tensor([draw_outlined(layout) for layout in layouts])

    return {"latents": base_latents(base, draw_batches(), device, cores).half(), "ids": torch.cat(ids)}


@app.command()
def export(
    out: Out = Path("runs/companions"),
    base: Base = BASE,
    to: Annotated[
        Path | None, typer.Option(help="Where the companions go. Default: `companions` in the output.")
    ] = None,
) -> None:
    """Write the averaged weights of those that have been trained, as diffusers has them."""
    to = out / "companions" if to is None else to

    def load(name: str, network: Module) -> Module:
        Checkpoint(out / f"{name}.safetensors").load({f"average.{name}": network})
        return network

    done = {path.stem for path in out.glob("*.safetensors")}
    if "inpainting" in done:
        architecture.save_model(to / "inpainting", load("inpainting", companions.build_inpainting()))
    if "controlnet" in done:
        architecture.save_model(to / "edges", load("controlnet", companions.build_controlnet()))
    if "lora" in done:
        companions.save_lora(to / "outlines.safetensors", load("lora", companions.with_lora(base, companions.RANK)))
    if "upscaler" in done:
        stage = companions.build_first_stage()
        Checkpoint(out / "stage.safetensors").load({"stage": stage})
        companions.save_upscaler(to / "upscaler", stage, load("upscaler", companions.build_upscaler()))


def base_latents(base: Path, batches: Iterator[Tensor], device: str, cores: int) -> Tensor:
    """Latents of pictures as the shapes model denoises them."""
    torch.set_num_threads(1)
    vae = AutoencoderKL.from_pretrained(base / "vae", torch_dtype=torch.float32).to(device)
    factor: float = vae.config.scaling_factor
    return encode_all(lambda part: vae.encode(part).latent_dist.mode() * factor, batches, device, cores)


Module = TypeVar("Module", bound=nn.Module)


def frozen(model: Module, device: str) -> Module:
    """A model in bfloat16 that is not trained."""
    return model.to(device, torch.bfloat16).requires_grad_(requires_grad=False)


def sample_layouts(rng: np.random.Generator, count: int) -> list[generator.Layout]:
    """Layouts of scenes that may be trained on."""
    return [generator.sample_layout(generator.sample_training_scene(rng), rng) for _ in range(count)]


def cached(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a file holds, which is made first if it is not there."""
    if not path.exists():
        aside = path.with_suffix(".new")
        save_file(make(), aside)
        aside.replace(path)
    return load_file(path)


if __name__ == "__main__":
    app()
