"""How every denoiser is trained: to tell the noise on latents, the more so at some noise levels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import architecture
from emphasis import Emphasis, noise_weights
from progress import Budget, Checkpoint, Record, set_rate
from shards import Batch, Losses, Shards
from twin import Network, Twin

# From noisy latents (n, C, h, w) in bfloat16, time steps (n,) and the rest of a batch to the guess of the noise, or the velocity.
Predict = Callable[[Tensor, Tensor, Batch], Tensor]
# A batch: `latents` (n, C, h, w) float32, and what `Predict` takes.
Pick = Callable[[torch.Generator], dict[str, Tensor]]


@dataclass(frozen=True)
class Plan:
    """How long and on what a denoiser is trained.

    Attributes:
        name: of its checkpoint and record.
        minutes: wall-clock budget.
        batch: latents a step.
        peak: greatest learning rate.
        emphases: which noise levels are trained on the most, one after the other.
        parts: the parts of the budget at which the second emphasis and those after it begin.
        report: steps between two lines of the record.
        velocity: whether it is to tell sqrt(a) noise - sqrt(1 - a) latents (Salimans & Ho 2022, arXiv 2202.00512) rather than the noise: where
            much is known of the picture, noise alone says too little of it. All noise levels then count the same.
    """

    name: str
    minutes: float
    batch: int
    peak: float
    emphases: Sequence[Emphasis]
    parts: Sequence[float] = ()
    report: int = 50
    velocity: bool = False


def train_denoiser(
    plan: Plan,
    twin: Twin[Network],
    out: Path,
    seed: int,
    shards: Shards,
    pick: Pick,
    predict: Predict,
    saved: Callable[[], None] = lambda: None,
) -> None:
    """Train a denoiser until its budget is spent.

    Args:
        plan: see there.
        twin: the denoiser; `predict` calls its worker.
        out: where its checkpoint and its record go.
        seed: of what is picked, and of the noise.
        shards: parts of a batch.
        pick: gives a batch.
        predict: guesses the noise.
        saved: called after every checkpoint.
    """
    models: dict[str, nn.Module] = {plan.name: twin.model, f"average.{plan.name}": twin.average}
    checkpoint = Checkpoint(out / f"{plan.name}.safetensors")
    twin.step, spent = checkpoint.load(models, twin.optimizer)
    twin.refresh()
    alphas = architecture.build_scheduler().alphas_cumprod
    weightings = [noise_weights(alphas, emphasis.power) for emphasis in plan.emphases]
    order = torch.Generator().manual_seed(seed * 1_000_003 + twin.step)
    budget = Budget(plan.minutes, spent)

    def losses(part: Batch) -> Losses:
        times, noise = part["times"], part["noise"]
        alpha = part["alphas"].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * part["latents"] + (1 - alpha).sqrt() * noise
        told = alpha.sqrt() * noise - (1 - alpha).sqrt() * part["latents"] if plan.velocity else noise
        error = (predict(noisy.bfloat16(), times, part).float() - told).square().mean(dim=(1, 2, 3))
        denoise = error.mean() if plan.velocity else (part["weights"] * error).mean()
        high = times >= 500
        error_high = (error * high).sum() / high.sum().clamp(min=1)
        error_low = (error * ~high).sum() / (~high).sum().clamp(min=1)
        return {"total": denoise, "denoise": denoise, "high": error_high, "low": error_low}

    with Record(out / f"{plan.name}.jsonl", plan.name, budget) as record:
        while budget.fraction < 1:
            set_rate(twin.optimizer, budget.rate(plan.peak, warmup=0.03))
            stage = sum(budget.fraction >= part for part in plan.parts)
            batch = pick(order)
            latents = batch["latents"]
            times = torch.randint(1000, (plan.batch,), generator=order)
            above = torch.randint(plan.emphases[stage].start, 1000, (plan.batch,), generator=order)
            times = torch.where(torch.rand(plan.batch, generator=order) < 0.5, above, times)
            noise = torch.randn(latents.shape, generator=order)
            told = {"times": times, "alphas": alphas[times], "weights": weightings[stage][times], "noise": noise}
            batch |= {name: value.to(latents.device) for name, value in told.items()}
            record.add(shards.backward(twin.weights, losses, batch))
            twin.learn()
            if twin.step % plan.report == 0:
                record.report(twin.step)
            if checkpoint.due():
                checkpoint.save(models, twin.optimizer, twin.step, budget.spent)
                saved()
    checkpoint.save(models, twin.optimizer, twin.step, budget.spent)
    saved()
