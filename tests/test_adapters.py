"""LoRAs on the weights of a pipeline: added, scaled, taken off, beside weights of the user's own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldmrt.adapters import Adapters
from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BadRequest, EngineMismatch
from ldmrt.lora import Layer, Lora
from ldmrt.parameters import Parameters
from ldmrt.pipeline import Pipeline

PROMPT = "a red circle left of the blue square"
QUICK: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 5.0, "seed": 1, "output_type": "latent"}
CPU = torch.device("cpu")
Write = Callable[..., Path]
Fuse = Callable[..., Any]


@pytest.fixture
def loras(tiny_model: Path, tmp_path: Path, write_lora: Write) -> tuple[Path, Path]:
    one = write_lora(tmp_path / "one.safetensors", tiny_model, seed=1)
    return one, write_lora(tmp_path / "two.safetensors", tiny_model, seed=2, modules=("to_q", "to_k"))


def latents(pipe: Pipeline) -> torch.Tensor:
    return pipe(PROMPT, **QUICK).latents


def theirs(pipe: Any) -> torch.Tensor:
    """The latents of a pipeline of diffusers."""
    arguments = {name: value for name, value in QUICK.items() if name != "seed"}
    generator = torch.Generator().manual_seed(QUICK["seed"])
    return pipe(PROMPT, generator=generator, **arguments).images  # type: ignore[no-any-return]


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.covers("Stable Diffusion 1.x", "LoRA")
@pytest.mark.covers("Stable Diffusion XL", "LoRA")
@pytest.mark.parametrize("kind", ["", "_xl"])
def test_pictures_are_those_of_diffusers(
    kind: str, tmp_path: Path, write_lora: Write, fused_by_diffusers: Fuse, request: pytest.FixtureRequest
) -> None:
    model, bundle = (request.getfixturevalue(f"tiny_{what}{kind}") for what in ("model", "bundle"))
    path = write_lora(tmp_path / "lora.safetensors", model)
    pipe = Pipeline.from_bundle(bundle, device="cpu")
    before = latents(pipe)
    pipe.load_lora(path, 0.8)
    found = latents(pipe)
    # As without a LoRA (tests/test_parity.py): one seed in float32, sums in another order.
    assert relative(found, theirs(fused_by_diffusers(model, {path: 0.8}))) < 1e-5
    assert relative(found, before) > 0.01


def test_loaded_scaled_and_unloaded_in_any_order(
    tiny_bundle: Path, tiny_model: Path, loras: tuple[Path, Path], fused_by_diffusers: Fuse
) -> None:
    one, two = loras
    pipe = Pipeline.from_bundle(tiny_bundle, device="cpu")
    pipe.load_lora(one)  # before any engine has read a weight
    alone = latents(pipe)
    pipe.unload_lora("one")
    before = latents(pipe)
    assert torch.equal(before, latents(Pipeline.from_bundle(tiny_bundle, device="cpu")))
    pipe.load_lora(one)
    assert torch.equal(latents(pipe), alone)
    pipe.load_lora(two, 2.0, "second")
    assert pipe.loras == {"one": 1.0, "second": 2.0}
    pipe.set_lora_scale("one", -0.5)
    assert relative(latents(pipe), theirs(fused_by_diffusers(tiny_model, {one: -0.5, two: 2.0}))) < 1e-5
    pipe.set_lora_scale("second", 0.0)
    pipe.set_lora_scale("one", 1.0)
    assert torch.equal(latents(pipe), alone)
    pipe.unload_lora("one")
    assert torch.equal(latents(pipe), before)
    pipe.unload_lora("second")
    assert torch.equal(latents(pipe), before)
    assert pipe.loras == {}


def test_every_weight_comes_back_to_the_bit_at_its_address(tiny_bundle: Path, loras: tuple[Path, Path]) -> None:
    pipe = Pipeline.from_bundle(tiny_bundle, device="cpu")
    latents(pipe)

    def state() -> list[tuple[int, torch.Tensor]]:
        held = [pipe._weights(component) for component in ("unet", "text_encoder")]
        tensors = [t for p in held for t in (*p._held.values(), *(d.value for d in p._derived.values()))]
        return [(0, t.to_dense().clone()) if t.is_mkldnn else (t.data_ptr(), t.clone()) for t in tensors]

    before = state()
    for path in loras:
        pipe.load_lora(path, 0.7)
    during = state()
    for path in loras:
        pipe.unload_lora(path.stem)
    after = state()
    addresses = [[address for address, _ in found] for found in (before, during, after)]
    assert addresses[0] == addresses[1] == addresses[2]
    assert all(torch.equal(one, other) for (_, one), (_, other) in zip(before, after, strict=True))
    # Only what a LoRA changes, and what was made of it, was written.
    changed = sum(not torch.equal(one, other) for (_, one), (_, other) in zip(before, during, strict=True))
    assert 0 < changed < len(before) / 2


def test_beside_weights_of_the_users_own(tiny_bundle: Path, loras: tuple[Path, Path]) -> None:
    """A LoRA lies on the weights as `update_weights` left them, in whichever order the two came."""
    name = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q.weight"
    pipe = Pipeline.from_bundle(tiny_bundle, device="cpu")
    before = latents(pipe)
    file = load_file(tiny_bundle / pipe.bundle.manifest.weights["unet.float32"].file)
    changes = {name: 2.0 * file[name]}
    pipe.update_weights("unet", changes)
    updated = latents(pipe)
    pipe.load_lora(loras[0])
    both = latents(pipe)
    pipe.restore_weights("unet")
    only = latents(pipe)
    assert relative(both, updated) > 0.01
    assert relative(both, only) > 1e-4
    pipe.update_weights("unet", changes)
    assert torch.equal(latents(pipe), both)
    pipe.unload_lora("one")
    assert torch.equal(latents(pipe), updated)
    pipe.load_lora(loras[0])
    pipe.restore_weights("unet")
    assert torch.equal(latents(pipe), only)
    pipe.unload_lora("one")
    assert torch.equal(latents(pipe), before)


def test_an_engine_that_is_loaded_later_has_the_lora(tiny_bundle: Path, loras: tuple[Path, Path]) -> None:
    early, late = (Pipeline.from_bundle(tiny_bundle, device="cpu") for _ in range(2))
    batch = {**QUICK, "num_images_per_prompt": 2}
    early(PROMPT, **batch)
    latents(late)
    for pipe in (early, late):
        pipe.load_lora(loras[0])
    assert torch.equal(early(PROMPT, **batch).latents, late(PROMPT, **batch).latents)
    late.unload_lora("one")
    early.unload_lora("one")
    assert torch.equal(early(PROMPT, **batch).latents, late(PROMPT, **batch).latents)


def test_two_threads(tiny_bundle: Path, loras: tuple[Path, Path]) -> None:
    """A picture is drawn with a LoRA or without, never half."""
    pipe = Pipeline.from_bundle(tiny_bundle, device="cpu")
    without = latents(pipe)
    pipe.load_lora(loras[0])
    expected = [without, latents(pipe)]
    done = threading.Event()

    def switch() -> None:
        while not done.wait(0.01):
            pipe.set_lora_scale("one", 0.0)
            pipe.set_lora_scale("one", 1.0)

    thread = threading.Thread(target=switch)
    thread.start()
    try:
        found = [latents(pipe) for _ in range(10)]
    finally:
        done.set()
        thread.join()
    assert all(any(torch.equal(one, other) for other in expected) for one in found)


def test_names_and_scales_that_cannot_be(tiny_bundle: Path, loras: tuple[Path, Path]) -> None:
    pipe = Pipeline.from_bundle(tiny_bundle, device="cpu")
    with pytest.raises(BadRequest, match="name is 'one', and the LoRAs loaded are: none"):
        pipe.unload_lora("one")
    for path in loras:
        pipe.load_lora(path)
    with pytest.raises(BadRequest, match="name is 'three', and the LoRAs loaded are: one, two"):
        pipe.set_lora_scale("three", 1.0)
    with pytest.raises(BadRequest, match="name is 'one', and a LoRA of that name is loaded"):
        pipe.load_lora(loras[0])
    with pytest.raises(BadRequest, match="scale is nan, expected a finite number"):
        pipe.set_lora_scale("one", float("nan"))
    with pytest.raises(BadRequest, match="scale is inf"):
        pipe.load_lora(loras[0], float("inf"), "again")
    assert pipe.loras == {"one": 1.0, "two": 1.0}


def test_a_lora_for_another_architecture_changes_nothing(
    tiny_bundle: Path, tiny_model_xl: Path, tmp_path: Path, write_lora: Write
) -> None:
    path = write_lora(tmp_path / "xl.safetensors", tiny_model_xl)
    pipe = Pipeline.from_bundle(tiny_bundle, device="cpu")
    before = latents(pipe)
    with pytest.raises(
        BadRequest, match=r"another architecture: text_encoder_2\.\S+ is of no layer of this model \(and"
    ):
        pipe.load_lora(path)
    assert torch.equal(latents(pipe), before)
    assert pipe.loras == {}


def test_other_engine_kinds_say_what_to_do(tiny_bundle_onnx: Path, loras: tuple[Path, Path]) -> None:
    pipe = Pipeline.from_bundle(tiny_bundle_onnx, device="cpu", engine="onnxruntime")
    with pytest.raises(
        EngineMismatch, match=r"build again with `ldmrt build-engines .* --lora \S+one\.safetensors:0\.5`"
    ):
        pipe.load_lora(loras[0], 0.5)


def test_weights_are_rounded_once() -> None:
    """bfloat16 with several changes: the nearest value to the sum, not to sums of rounded ones."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(32, 16, generator=generator).bfloat16()
    parameters = Parameters.of({"w": weight.clone()}, CPU)
    spec = TensorSpec("w", (32, 16), torch.bfloat16)
    parameters.declare({"w": spec})
    held = parameters.tensor(spec)
    adapters = Adapters(lambda _component: parameters)
    exact = weight.double()
    for number, scale in enumerate((0.5, -1.5, 0.25)):
        down, up = (torch.randn(*shape, generator=generator) for shape in ((4, 16), (32, 4)))
        adapters.add(str(number), Lora(Path("x"), {"unet": {"w": Layer(down, up, None, 0.5)}}), scale)
        exact += 0.5 * scale * up.double() @ down.double()
    # A sum in float32 may fall on the other side of a border between two values, hardly ever.
    assert (held != exact.bfloat16()).sum() <= 1
