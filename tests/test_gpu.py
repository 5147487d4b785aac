"""The runtime on a GPU against the same runtime on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import ldmrt
from ldmrt.kernels.sampler import WIDTH, Column, advance, sampler_step
from ldmrt.pipeline import Pipeline
from ldmrt.samplers.ddim import ddim
from ldmrt.schedule import NoiseSchedule

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


ARGUMENTS: dict[str, Any] = {
    "num_inference_steps": 6,
    "guidance_scale": 5.0,
    "seed": 3,
    "num_images_per_prompt": 2,
    "output_type": "latent",
}


def test_captured_or_not_the_same_bits(tiny_bundle: Path) -> None:
    """A step as one graph, all steps as one graph, decoder and all, kernel by kernel: the same kernels in the same order."""
    found = [
        Pipeline.from_bundle(tiny_bundle, device="cuda", capture=capture)("a test", **ARGUMENTS).latents
        for capture in ("step", "loop", "off")
    ]
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[2])


def test_a_whole_image_captured_is_the_same_picture(tiny_bundle: Path) -> None:
    arguments = {**ARGUMENTS, "output_type": "np"}
    one, other = (Pipeline.from_bundle(tiny_bundle, device="cuda", capture=way) for way in ("image", "step"))
    for change in ({}, {"num_images_per_prompt": 1, "seed": 8}, {"num_inference_steps": 4}):
        found, expected = (pipe("a test", **{**arguments, **change}) for pipe in (one, other))
        assert torch.equal(found.latents, expected.latents)
        assert (found.images == expected.images).all()


def test_captured_calls_do_not_touch_each_other(tiny_bundle: Path) -> None:
    """Several batch sizes and prompt lengths share one memory pool, and each call gives what it gives alone."""
    pipe = Pipeline.from_bundle(tiny_bundle, device="cuda")
    cases: list[dict[str, Any]] = [
        {"num_images_per_prompt": 1},
        {"guidance_scale": 1.0},
        {},
        {"prompt": "a red circle " * 40},
        {"sampler": "dpm++ 2m sde karras", "guidance_rescale": 0.7},
        {"sampler": "heun"},
    ]
    alone = [
        Pipeline.from_bundle(tiny_bundle, device="cuda")(**{"prompt": "a", **ARGUMENTS, **c}).latents for c in cases
    ]
    for _ in range(2):
        for case, expected in zip(cases, alone, strict=True):
            assert torch.equal(pipe(**{"prompt": "a", **ARGUMENTS, **case}).latents, expected)


# torch warns whenever the mode is set.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype feature:UserWarning")
def test_steps_neither_allocate_nor_wait(tiny_bundle: Path) -> None:
    """Between the first and the last step: no allocation from the GPU's memory, and no call that waits for the GPU."""
    pipe = Pipeline.from_bundle(tiny_bundle, device="cuda")
    pipe("a test", **ARGUMENTS)
    denoiser = next(iter(pipe._denoisers._denoisers.values()))
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    try:
        torch.cuda.set_sync_debug_mode("error")
        denoiser.steps(5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def test_weights_changed_under_a_captured_step(tiny_bundle: Path) -> None:
    changed = Pipeline.from_bundle(tiny_bundle, device="cuda")
    before = changed("a test", **ARGUMENTS).latents
    records = changed.bundle.find("step")
    names = [name for name in changed.bundle.graph(records[0]).weights if name.endswith("conv_in.weight")]
    shape = changed.bundle.graph(records[0]).weights[names[0]].shape
    value = torch.randn([int(size) for size in shape], generator=torch.Generator().manual_seed(1))
    changed.update_weights("unet", {names[0]: value})
    fresh = Pipeline.from_bundle(tiny_bundle, device="cuda")
    fresh.update_weights("unet", {names[0]: value})
    assert torch.equal(changed("a test", **ARGUMENTS).latents, fresh("a test", **ARGUMENTS).latents)
    changed.restore_weights("unet")
    assert torch.equal(changed("a test", **ARGUMENTS).latents, before)


def test_a_lora_under_a_captured_step(
    tiny_bundle: Path, tiny_model: Path, tmp_path: Path, write_lora: Callable[..., Path]
) -> None:
    path = write_lora(tmp_path / "lora.safetensors", tiny_model)
    changed, fresh = (Pipeline.from_bundle(tiny_bundle, device="cuda") for _ in range(2))
    before = changed("a test", **ARGUMENTS).latents
    changed.load_lora(path, 0.8)
    fresh.load_lora(path, 0.8)  # before anything is captured
    assert torch.equal(changed("a test", **ARGUMENTS).latents, fresh("a test", **ARGUMENTS).latents)
    changed.unload_lora("lora")
    assert torch.equal(changed("a test", **ARGUMENTS).latents, before)


def test_kernels_from_the_bundle(tiny_model: Path, tmp_path: Path) -> None:
    """Verified on this GPU; then cubins alone, as where Triton is not installed: they are what Triton would compile here, to the bit."""
    major, minor = torch.cuda.get_device_capability()
    target = f"sm_{major}{minor}"
    bundle = ldmrt.build_engines(tiny_model, tmp_path / "bundle", dtype="float16", targets=[target])
    assert all(engine.certificate.reference.endswith(f", on {target}") for engine in bundle.manifest.engines)
    script = (
        "import sys, torch, ldmrt\n"
        "latents = ldmrt.Pipeline.from_bundle(sys.argv[1], device='cuda')('a test', num_inference_steps=4, seed=1,"
        " output_type='latent').latents\n"
        "assert 'triton' not in sys.modules or sys.argv[3] != 'cubin'\n"
        "torch.save(latents, sys.argv[2])\n"
    )
    found = {}
    for way in ("cubin", "triton", "reference"):
        path = tmp_path / f"{way}.pt"
        command = [sys.executable, "-P", "-c", script, str(tmp_path / "bundle"), str(path), way]
        subprocess.run(command, env={**os.environ, "LDMRT_KERNELS": way}, check=True, timeout=300)
        found[way] = torch.load(path, weights_only=True)
    assert torch.equal(found["cubin"], found["triton"])
    # float16 keeps 11 bits; the kernels sum in float32 in another order, and guidance amplifies what differs.
    assert relative_error(found["cubin"], found["reference"]) < 2e-2
