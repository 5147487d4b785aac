"""Engines that come and go: what is in memory when, and that pictures do not change by it."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ldmrt.bundle import Bundle
from ldmrt.denoisers import Denoisers
from ldmrt.engines.torch import TorchEngine
from ldmrt.errors import BadRequest, EngineMismatch
from ldmrt.loader import EngineLoader
from ldmrt.memory_plan import MemoryPlan, plan
from ldmrt.needs import Needs, Workload
from ldmrt.pipeline import Pipeline

SIZE = (64, 64)
PROMPT = "a red circle on white background"
ARGUMENTS: dict[str, Any] = {"num_inference_steps": 3, "seed": 5, "num_images_per_prompt": 3, "output_type": "np"}


def smallest(path: Path, wanted: Callable[[MemoryPlan], bool], workload: Workload) -> int:
    """The smallest budget whose plan is as wanted; a larger one's then is too."""
    bundle = Bundle.open(path)
    loader = EngineLoader(bundle, torch.device("cpu"), None, None)
    needs = Needs(loader, Denoisers(loader, "step"))
    stages, tiles = needs.stages(workload), needs.tiles(workload.size)
    low, high = 0, 10**9
    while high - low > 1:
        middle = (low + high) // 2
        try:
            fits = wanted(plan(middle, stages, reserve=0, least_rows=2, size=workload.size, tiles=tiles))
        except BadRequest:
            fits = False
        low, high = (low, middle) if fits else (middle, high)
    return high


def budgets(path: Path, *, picture: bool = False) -> dict[str, int]:
    """By what stays in memory, the smallest budget that leads there."""
    workload = Workload(SIZE, picture=picture)
    return {
        "everything": smallest(path, lambda plan: not plan.staged, workload),
        "the network": smallest(path, lambda plan: bool(plan.resident), workload),
        "nothing": smallest(path, lambda plan: plan.tile is None, workload),
    }


def planned(pipe: Pipeline, **workload: Any) -> MemoryPlan:
    """The plan that a pipeline has for a request."""
    plan = pipe._residency.begin(Workload(SIZE, **workload))
    assert plan is not None
    return plan


class Watch:
    """At every run of an engine of a bundle, by the engine's name: the bytes of weights that are held, by file, and the engines that
    something still refers to.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: dict[str, dict[str, int]] = {}
        self.alive: dict[str, set[str]] = {}
        self.engines: weakref.WeakSet[TorchEngine] = weakref.WeakSet()
        self.bundle: Bundle | None = None
        execute = TorchEngine._execute

        def watched(engine: TorchEngine, inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            parameters = {} if self.bundle is None else self.bundle._parameters
            files = {name: entry[0].nbytes for (name, _), entry in parameters.items() if entry[0].nbytes}
            known = self.held.setdefault(engine.graph.name, {})
            known |= {name: max(nbytes, known.get(name, 0)) for name, nbytes in files.items()}
            self.engines.add(engine)
            ours = [entry[0] for entry in parameters.values()]
            alive = {other.graph.name for other in self.engines if any(other.parameters is one for one in ours)}
            self.alive.setdefault(engine.graph.name, set()).update(alive)
            return execute(engine, inputs)

        monkeypatch.setattr(TorchEngine, "_execute", watched)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    return Watch(monkeypatch)


@pytest.mark.parametrize("name", ["tiny_bundle", "tiny_bundle_xl"])
def test_pictures_are_the_same_whatever_stays_in_memory(
    name: str, request: pytest.FixtureRequest, watch: Watch
) -> None:
    path = request.getfixturevalue(name)
    plain = Pipeline.from_bundle(path)
    watch.bundle = plain.bundle
    expected = [plain(PROMPT, **ARGUMENTS), plain("a blue square", **{**ARGUMENTS, "seed": 9})]
    texts = {record.weights for record in plain.bundle.manifest.engines if record.component.startswith("text")}
    found = budgets(path)
    assert found["everything"] > found["the network"] > found["nothing"]
    for kept, budget in found.items():
        pipe = Pipeline.from_bundle(path, memory_budget=budget)
        watch.bundle, watch.held, watch.alive = pipe.bundle, {}, {}
        for result, seed, prompt in zip(expected, (5, 9), (PROMPT, "a blue square"), strict=True):
            again = pipe(prompt, **{**ARGUMENTS, "seed": seed})
            assert torch.equal(again.latents, result.latents)
            assert (again.images == result.images).all()
        plan = planned(pipe)
        assert plan.needed <= budget
        stages = {"text_encoder": "encode", "text_encoder_2": "encode", "step": "denoise", "decoder": "decode"}
        for engine, held in watch.held.items():
            if stage := stages.get(engine):
                # What else is in use at that time is what the plan has room for besides.
                assert sum(held.values()) <= plan.stages[stage]  # type: ignore[index]
        if kept == "everything":
            assert set(watch.held["decoder"]) == {*texts, "unet.float32", "vae.float32"}
        elif kept == "the network":
            assert set(watch.held["step"]) == {"unet.float32"}
            assert set(watch.held["decoder"]) == {"unet.float32", "vae.float32"}
        else:
            assert set(watch.held["text_encoder"]) <= texts
            assert set(watch.held["step"]) == {"unet.float32"}
            assert watch.alive["step"] == {"context", "schedule", "step"}
            assert set(watch.held["decoder"]) == {"vae.float32"}
            assert watch.alive["decoder"] == {"decoder"}


def test_changes_of_weights_outlive_them(
    tiny_model: Path, tiny_bundle: Path, tmp_path: Path, write_lora: Callable[..., Path]
) -> None:
    lora = write_lora(tmp_path / "style.safetensors", tiny_model)
    plain = Pipeline.from_bundle(tiny_bundle)
    tight = Pipeline.from_bundle(tiny_bundle, memory_budget=budgets(tiny_bundle)["nothing"])
    bias = {"conv_out.bias": torch.full((4,), 0.5)}

    def made() -> list[torch.Tensor]:
        return [pipe(PROMPT, **ARGUMENTS).latents for pipe in (plain, tight)]

    first = made()
    assert torch.equal(*first)
    changes: list[Callable[[Pipeline], None]] = [
        lambda pipe: pipe.load_lora(lora),
        lambda pipe: pipe.set_lora_scale("style", 0.5),
        lambda pipe: pipe.update_weights("unet", bias),
        lambda pipe: pipe.unload_lora("style"),
    ]
    for change in changes:
        before = made()
        for pipe in (plain, tight):
            change(pipe)
        after = made()
        assert torch.equal(*after)
        assert not torch.equal(after[0], before[0])
    tight.restore_weights("unet")
    assert torch.equal(made()[1], first[0])


def test_a_controlnet_is_in_memory_only_for_requests_with_it(tiny_bundle_controlled: Path, watch: Watch) -> None:
    plain = Pipeline.from_bundle(tiny_bundle_controlled)
    pictures = [torch.rand(64, 64, 3).mul(255).byte().numpy(), None]
    controlled: dict[str, Any] = {**ARGUMENTS, "control_image": pictures}
    watch.bundle = plain.bundle
    expected = [plain(PROMPT, **controlled).latents, plain(PROMPT, **ARGUMENTS).latents]
    pipe = Pipeline.from_bundle(tiny_bundle_controlled, memory_budget="1GB")
    watch.bundle = pipe.bundle
    for _ in range(2):
        watch.held = {}
        assert torch.equal(pipe(PROMPT, **controlled).latents, expected[0])
        assert "controlnet.edges.float32" in watch.held["controlled.step"]
        assert "controlnet.depth.float32" not in watch.held["controlled.step"]
        assert torch.equal(pipe(PROMPT, **ARGUMENTS).latents, expected[1])
        assert "controlnet.edges.float32" not in watch.held["step"]
    assert planned(pipe, controls=("edges",)).needed > planned(pipe).needed


def test_a_learnt_word_outlives_its_encoder(tiny_bundle: Path, tmp_path: Path) -> None:
    word = tmp_path / "w.safetensors"
    save_file({"emb_params": 3 * torch.ones(2, 32)}, word)
    plain = Pipeline.from_bundle(tiny_bundle)
    tight = Pipeline.from_bundle(tiny_bundle, memory_budget=budgets(tiny_bundle)["nothing"])
    first = plain(PROMPT, **ARGUMENTS).latents
    for pipe in (plain, tight):
        pipe.load_textual_inversion(word, "circle")
    for _ in range(2):
        learnt = plain(PROMPT, **ARGUMENTS).latents
        assert torch.equal(tight(PROMPT, **ARGUMENTS).latents, learnt)
        assert not torch.equal(learnt, first)
    tight.unload_textual_inversion("circle")
    assert torch.equal(tight(PROMPT, **ARGUMENTS).latents, first)


def test_a_picture_to_begin_from_is_encoded_within_the_budget(tiny_bundle: Path, watch: Watch) -> None:
    plain = Pipeline.from_bundle(tiny_bundle)
    begun: dict[str, Any] = {**ARGUMENTS, "image": torch.rand(64, 64, 3).mul(255).byte().numpy(), "strength": 0.7}
    watch.bundle = plain.bundle
    expected = [plain(PROMPT, **begun).latents, plain(PROMPT, **ARGUMENTS).latents]
    tight = Pipeline.from_bundle(tiny_bundle, memory_budget=budgets(tiny_bundle, picture=True)["nothing"])
    watch.bundle, watch.held, watch.alive = tight.bundle, {}, {}
    for _ in range(2):
        assert torch.equal(tight(PROMPT, **begun).latents, expected[0])
        assert torch.equal(tight(PROMPT, **ARGUMENTS).latents, expected[1])
    assert watch.alive["encoder"] == {"encoder"}
    assert watch.alive["step"] == {"context", "schedule", "step"}
    plan = tight.memory_plan(picture=True)
    assert plan is not None
    assert list(plan.stages) == ["encode", "picture", "denoise", "decode"]


def test_room_for_more_evaluations_is_counted(tiny_bundle: Path) -> None:
    roomy = Pipeline.from_bundle(tiny_bundle, memory_budget="1GB")
    few, many = (planned(roomy, evaluations=evaluations) for evaluations in (64, 128))
    rows = few.rows
    # Of each row at least the noise, (4, 8, 8) float32, and the sampler's coefficients for every further evaluation.
    assert many.stages["denoise"] - few.stages["denoise"] >= rows * 64 * 4 * 8 * 8 * 4
    plain = Pipeline.from_bundle(tiny_bundle)
    arguments = {**ARGUMENTS, "num_inference_steps": 70}
    least = smallest(tiny_bundle, lambda plan: plan.tile is None, Workload(SIZE))
    tight = Pipeline.from_bundle(tiny_bundle, memory_budget=least)
    assert planned(tight).stages["denoise"] == least
    with pytest.raises(BadRequest, match="the stage denoise alone needs"):
        tight(PROMPT, **arguments)
    assert torch.equal(roomy(PROMPT, **arguments).latents, plain(PROMPT, **arguments).latents)


def test_a_fallback_stays_within_the_budget(tiny_bundle: Path, tiny_bundle_onnx: Path) -> None:
    pipe = Pipeline.from_bundle(tiny_bundle, fallback=True, memory_budget=budgets(tiny_bundle)["nothing"])
    assert not pipe.bundle.parameters("vae.float32", pipe.device).nbytes
    with pytest.raises(EngineMismatch, match="onnxruntime ones were chosen"):
        Pipeline.from_bundle(tiny_bundle_onnx, engine="onnxruntime", fallback=True, memory_budget="1GB")


def test_an_inpainting_model_counts_its_encoder(tiny_bundle_inpainting: Path) -> None:
    plain = Pipeline.from_bundle(tiny_bundle_inpainting)
    least = budgets(tiny_bundle_inpainting, picture=True)
    tight = Pipeline.from_bundle(tiny_bundle_inpainting, memory_budget=least["nothing"])
    assert list(planned(tight, picture=True).stages) == ["encode", "picture", "denoise", "decode"]
    picture = torch.rand(64, 64, 3).mul(255).byte().numpy()
    arguments: dict[str, Any] = {**ARGUMENTS, "image": picture, "mask_image": picture}
    assert torch.equal(tight(PROMPT, **arguments).latents, plain(PROMPT, **arguments).latents)


def test_fewer_images_at_a_time_where_there_is_no_room_for_more(tiny_bundle: Path) -> None:
    assert Pipeline.from_bundle(tiny_bundle, memory_budget="1GB").images_at_a_time(64, 64, guidance=True) == 2
    tight = Pipeline.from_bundle(tiny_bundle, memory_budget=budgets(tiny_bundle)["nothing"])
    assert planned(tight).rows == 2
    assert tight.images_at_a_time(64, 64, guidance=True) == 1


def test_without_a_budget_there_is_no_plan(tiny_bundle: Path) -> None:
    assert Pipeline.from_bundle(tiny_bundle).memory_plan() is None


def test_refusals(tiny_bundle: Path, tiny_bundle_onnx: Path) -> None:
    least = r"memory_budget is 0\.0 MB, and the stage denoise alone needs 2\.\d MB at 64x64; raise it, or build"
    with pytest.raises(BadRequest, match=least):
        Pipeline.from_bundle(tiny_bundle, memory_budget=1000)
    with pytest.raises(BadRequest, match="expected an amount of memory"):
        Pipeline.from_bundle(tiny_bundle, memory_budget="much")
    with pytest.raises(BadRequest, match="with memory_budget use step"):
        Pipeline.from_bundle(tiny_bundle, memory_budget="1GB", capture="image")
    with pytest.raises(EngineMismatch, match="onnxruntime ones were chosen"):
        Pipeline.from_bundle(tiny_bundle_onnx, engine="onnxruntime", memory_budget="1GB")
    pipe = Pipeline.from_bundle(tiny_bundle, memory_budget="1GB")
    with pytest.raises(EngineMismatch, match="has no"):
        pipe.memory_plan(8, 8)
    assert pipe(PROMPT, **ARGUMENTS).latents.isfinite().all()
