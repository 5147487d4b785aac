"""The runtime on a GPU against the same runtime on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ldmrt.kernels.sampler import WIDTH, Column, advance, sampler_step
from ldmrt.pipeline import Pipeline
from ldmrt.schedule import NoiseSchedule, ddim

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def test_pictures_are_those_of_the_cpu(tiny_bundle: Path) -> None:
    """Within 1e-3: a GPU sums in another order, and TF32 stays off by default in matrix products but not in cuDNN."""
    arguments: dict[str, Any] = {
        "num_inference_steps": 10,
        "guidance_scale": 5.0,
        "seed": 3,
        "num_images_per_prompt": 2,
    }
    torch.backends.cudnn.allow_tf32 = False
    on_cpu = Pipeline.from_bundle(tiny_bundle, device="cpu")("a test", **arguments)
    on_gpu = Pipeline.from_bundle(tiny_bundle, device="cuda")("a test", **arguments)
    assert relative_error(on_gpu.latents, on_cpu.latents) < 1e-3


def test_sampler_step_equals_the_cpu() -> None:
    """float32 arithmetic in the same order: only fused multiply-adds may differ."""
    table = ddim(NoiseSchedule(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012), 5, 0.5)
    coefficients = torch.from_numpy(table.coefficients).float()
    assert coefficients.shape[1] == WIDTH
    assert (coefficients[:, Column.NEXT_INPUT_SCALE] == 1).all()
    generator = torch.Generator("cpu").manual_seed(0)

    def state(device: str) -> list[torch.Tensor]:
        generator.manual_seed(0)
        shape = (4, 8, 8)
        x = torch.randn((2, *shape), generator=generator)
        output = torch.randn((4, *shape), generator=generator)
        noise = torch.randn((5, *shape), generator=generator)
        tensors = [
            x,
            torch.zeros_like(x),
            torch.zeros((3, *x.shape)),
            output,
            coefficients,
            torch.tensor([1, 3]),
            noise,
        ]
        tensors += [torch.tensor([5.0, 2.0]), torch.tensor([0, 2]), torch.tensor([1, -1]), torch.zeros_like(output)]
        return [tensor.to(device) for tensor in tensors]

    results = []
    for device in ("cpu", "cuda"):
        arguments = state(device)
        sampler_step(*arguments)
        advance(arguments[5], torch.full_like(arguments[5], 4))
        results.append((arguments[0].cpu(), arguments[10].cpu(), arguments[5].cpu()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-6)
    assert results[0][2].tolist() == results[1][2].tolist() == [2, 4]
