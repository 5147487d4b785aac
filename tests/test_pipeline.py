"""The pipeline's own promises: seeds, batches, callbacks, outputs, refusals. Numbers against diffusers: test_parity.py."""

from __future__ import annotations

import shutil
import threading
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ldmrt
from ldmrt.bundle import Bundle
from ldmrt.errors import BadRequest, BundleError, Cancelled, EngineMismatch, NumericalError
from ldmrt.manifest import write_manifest
from ldmrt.pipeline import Pipeline
from ldmrt.weights import WeightFile

PROMPT = "a red circle on white background"
QUICK: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 5.0, "output_type": "latent"}


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Pipeline:
    return Pipeline.from_bundle(tiny_bundle)


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm())


# ---------------------------------------------------------------------------------------------------- seeds


def test_a_seed_gives_the_same_picture_again(pipe: Pipeline) -> None:
    first, second = (pipe(PROMPT, seed=7, **QUICK).latents for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, pipe(PROMPT, seed=8, **QUICK).latents)


@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_image_i_has_seed_plus_i_alone_and_in_a_batch(pipe: Pipeline, eta: float) -> None:
    together = pipe(PROMPT, seed=20, num_images_per_prompt=5, eta=eta, **QUICK)
    assert together.seeds == (20, 21, 22, 23, 24)
    for seed, latents in zip(together.seeds, together.latents, strict=True):
        alone = pipe(PROMPT, seed=seed, eta=eta, **QUICK)
        # Batches of another size may take sums in another order.
        assert relative(alone.latents[0], latents) < 1e-5


def test_several_prompts_count_on(pipe: Pipeline) -> None:
    prompts = [PROMPT, "the blue square"]
    result = pipe(prompts, seed=5, num_images_per_prompt=2, **QUICK)
    assert result.seeds == (5, 6, 7, 8)
    for number in range(4):
        alone = pipe(prompts[number // 2], seed=5 + number, **QUICK)
        assert relative(alone.latents[0], result.latents[number]) < 1e-5


def test_a_seed_that_was_drawn_is_reported(pipe: Pipeline) -> None:
    first, second = (pipe(PROMPT, **QUICK) for _ in range(2))
    assert first.job.seed_was_drawn
    assert first.seeds != second.seeds
    assert torch.equal(pipe(PROMPT, seed=first.seeds[0], **QUICK).latents, first.latents)


def test_a_variation_goes_from_one_seeds_picture_to_anothers(pipe: Pipeline) -> None:
    here, there = (pipe(PROMPT, seed=seed, **QUICK).latents for seed in (5, 9))
    varied = pipe(PROMPT, seed=5, variation_seed=9, variation_strength=0.1, num_images_per_prompt=3, **QUICK)
    assert (varied.seeds, varied.job.variation_seeds) == ((5, 5, 5), (9, 10, 11))
    assert torch.equal(pipe(PROMPT, seed=5, variation_seed=9, variation_strength=1.0, **QUICK).latents, there)
    alone = pipe(PROMPT, seed=5, variation_seed=11, variation_strength=0.1, **QUICK)
    assert relative(alone.latents[0], varied.latents[2]) < 1e-5
    assert all(0 < relative(one, here[0]) < relative(there[0], here[0]) for one in varied.latents)


def test_the_callers_random_state_is_left_alone(pipe: Pipeline) -> None:
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    pipe(PROMPT, seed=1, eta=0.5, **QUICK)
    assert torch.equal(torch.rand(3), expected)


# ---------------------------------------------------------------------------------------------------- outputs


def test_output_types(pipe: Pipeline) -> None:
    arguments = {**QUICK, "seed": 1, "num_images_per_prompt": 3}
    arrays = pipe(PROMPT, **{**arguments, "output_type": "np"})
    pictures = pipe(PROMPT, **{**arguments, "output_type": "pil"})
    latents = pipe(PROMPT, **arguments)
    assert arrays.images.shape == (3, 64, 64, 3)
    assert arrays.images.dtype == np.float32
    assert 0 <= arrays.images.min() < arrays.images.max() <= 1
    assert [picture.size for picture in pictures.images] == [(64, 64)] * 3
    for picture, array in zip(pictures.images, arrays.images, strict=True):
        assert np.array_equal(np.asarray(picture), (array * 255).round().astype(np.uint8))
    assert torch.equal(latents.images, arrays.latents)
    assert torch.equal(latents.latents, arrays.latents)
    assert latents.latents.shape == (3, 4, 8, 8)
    assert latents.latents.dtype == torch.float32


def test_what_is_returned_can_be_used_in_training(pipe: Pipeline) -> None:
    latents = pipe(PROMPT, seed=1, **QUICK).latents
    weight = torch.ones(1, requires_grad=True)
    (gradient,) = torch.autograd.grad((latents * weight).sum(), weight)
    assert gradient.isfinite()


def test_timings(pipe: Pipeline) -> None:
    timings = pipe(PROMPT, seed=1, num_inference_steps=2).timings
    assert list(timings) == ["tokenize", "encode", "prepare", "denoise", "decode", "copy"]
    assert all(seconds >= 0 for seconds in timings.values())
    assert timings["denoise"] > 0


def test_defaults_come_from_the_model(pipe: Pipeline) -> None:
    job = pipe(PROMPT, seed=0, num_inference_steps=1, output_type="latent").job
    assert (job.width, job.height, job.guidance_scale, job.sampler) == (64, 64, 7.5, "ddim")
    assert pipe.defaults.num_inference_steps == 50
    assert pipe.defaults.max_clip_skip == 2


def test_images_at_a_time(pipe: Pipeline) -> None:
    assert pipe.images_at_a_time(64, 64, guidance=True) == 2
    assert pipe.images_at_a_time(64, 64, guidance=False) == 4


# ---------------------------------------------------------------------------------------------------- steps


def test_on_step_is_called_after_every_step_in_order(pipe: Pipeline) -> None:
    calls: list[tuple[int, torch.Tensor]] = []
    arguments = {**QUICK, "num_inference_steps": 4}
    result = pipe(PROMPT, seed=1, on_step=lambda index, latents: calls.append((index, latents)), **arguments)
    assert [index for index, _ in calls] == [0, 1, 2, 3]
    assert torch.equal(calls[-1][1], result.latents)
    assert not torch.equal(calls[0][1], calls[1][1])


def test_on_step_may_change_its_copy(pipe: Pipeline) -> None:
    def overwrite(_index: int, latents: torch.Tensor) -> None:
        latents.zero_()

    expected = pipe(PROMPT, seed=1, **QUICK).latents
    assert torch.equal(pipe(PROMPT, seed=1, on_step=overwrite, **QUICK).latents, expected)


@pytest.mark.parametrize("error", [Cancelled, KeyboardInterrupt, ValueError])
def test_raising_in_on_step_stops_and_the_pipeline_goes_on_working(pipe: Pipeline, error: type[BaseException]) -> None:
    arguments = {**QUICK, "num_images_per_prompt": 3, "eta": 0.5}
    expected = pipe(PROMPT, seed=1, **arguments).latents
    calls: list[int] = []

    def stop(index: int, _latents: torch.Tensor) -> None:
        calls.append(index)
        if len(calls) == 5:  # in the second group of images
            raise error("enough")

    with pytest.raises(error, match="enough"):
        pipe(PROMPT, seed=2, on_step=stop, **arguments)
    assert calls == [0, 1, 2, 0, 1]
    assert torch.equal(pipe(PROMPT, seed=1, **arguments).latents, expected)


def test_a_failure_before_the_first_step_does_not_stay(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldmrt.denoise import Denoiser

    pipe = Pipeline.from_bundle(tiny_bundle)
    arguments = {**QUICK, "num_images_per_prompt": 2}
    expected = pipe(PROMPT, seed=1, **arguments).latents
    admit = Denoiser.admit

    def fail_on_the_second(self: Denoiser, slot: int, **arguments: Any) -> None:
        if slot == 1:
            raise KeyboardInterrupt
        admit(self, slot, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Denoiser, "admit", fail_on_the_second)
        with pytest.raises(KeyboardInterrupt):
            pipe(PROMPT, seed=1, **arguments)
    assert torch.equal(pipe(PROMPT, seed=1, **arguments).latents, expected)


def test_requests_of_every_kind_one_after_the_other(pipe: Pipeline) -> None:
    """Buffers are shared between calls: what one leaves there must not show in the next."""
    long = "a red circle on white background and " * 12
    requests: list[dict[str, Any]] = [
        {},
        {"guidance_scale": 1.0},
        {"num_images_per_prompt": 2},
        {"guidance_scale": 1.0, "num_images_per_prompt": 4},
        {"eta": 0.9},
        {"prompt": long},
        {"num_inference_steps": 70},
        {"negative_prompt": long, "num_images_per_prompt": 3, "eta": 0.3},
        {"clip_skip": 2},
    ]
    fresh = [
        Pipeline.from_bundle(pipe.bundle.path)(**{"prompt": PROMPT, "seed": 3, **QUICK, **r}).latents for r in requests
    ]
    for order in (range(len(requests)), reversed(range(len(requests)))):
        for number in order:
            again = pipe(**{"prompt": PROMPT, "seed": 3, **QUICK, **requests[number]}).latents
            assert torch.equal(again, fresh[number]), requests[number]


def test_two_threads(pipe: Pipeline) -> None:
    expected = {seed: pipe(PROMPT, seed=seed, num_images_per_prompt=2, **QUICK).latents for seed in range(6)}
    found: dict[int, torch.Tensor] = {}
    errors: list[BaseException] = []

    def work(seeds: range) -> None:
        try:
            for seed in seeds:
                found[seed] = pipe(PROMPT, seed=seed, num_images_per_prompt=2, **QUICK).latents
        except BaseException as error:  # noqa: BLE001  # to be shown by the main thread
            errors.append(error)

    threads = [threading.Thread(target=work, args=(range(start, 6, 2),)) for start in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not errors
    assert all(torch.equal(found[seed], latents) for seed, latents in expected.items())


# ---------------------------------------------------------------------------------------------------- long prompts


def test_a_prompt_that_is_cut_is_warned_of_and_no_other(pipe: Pipeline) -> None:
    long = "a red circle " * 60
    with pytest.warns(UserWarning, match=r"the negative prompt is longer .* dropped: 'a red circle a"):
        pipe(PROMPT, negative_prompt=long, seed=1, long_prompt="cut", **QUICK)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe(long, seed=1, **QUICK)
        pipe(PROMPT, seed=1, long_prompt="cut", **QUICK)


def test_windows_of_the_pair_are_as_many(pipe: Pipeline) -> None:
    long = "the red circle left of the blue square " * 12
    # Neither fails for want of a window, and each pair gets its own count.
    result = pipe([long, PROMPT], negative_prompt=["", long], seed=1, **QUICK)
    for number, (prompt, negative) in enumerate(((long, ""), (PROMPT, long))):
        alone = pipe(prompt, negative_prompt=negative, seed=1 + number, **QUICK)
        assert relative(alone.latents[0], result.latents[number]) < 1e-5


# ---------------------------------------------------------------------------------------------------- engines


def test_both_kinds_of_engine(tiny_bundle_onnx: Path) -> None:
    by_kind = {kind: Pipeline.from_bundle(tiny_bundle_onnx, engine=kind) for kind in ("torch", "onnxruntime")}
    assert Pipeline.from_bundle(tiny_bundle_onnx).kind == "torch"
    torch_made, onnx_made = (p(PROMPT, seed=1, num_images_per_prompt=2, **QUICK) for p in by_kind.values())
    assert by_kind["onnxruntime"].kind == "onnxruntime"
    # Sums in another order, multiplied by three steps of guidance.
    assert 0 < relative(onnx_made.latents, torch_made.latents) < 1e-5


def test_an_engine_or_a_precision_that_is_not_there(tiny_bundle: Path) -> None:
    with pytest.raises(EngineMismatch, match="has no onnxruntime engine, it has torch; build one with"):
        Pipeline.from_bundle(tiny_bundle, engine="onnxruntime")
    with pytest.raises(EngineMismatch, match="float16"):
        Pipeline.from_bundle(tiny_bundle, dtype="float16")


@pytest.fixture
def bundle_of_three(tiny_bundle_onnx: Path, tmp_path: Path) -> Path:
    """`tiny_bundle_onnx`, its manifest naming plans for a GPU too."""
    folder = Path(shutil.copytree(tiny_bundle_onnx, tmp_path / "three"))
    manifest = Bundle.open(folder).manifest
    plans = [
        engine.model_copy(update={"kind": "tensorrt-rtx", "targets": ("sm_86",), "key": f"p{engine.key[1:]}"})
        for engine in manifest.engines
        if engine.kind == "onnxruntime"
    ]
    write_manifest(folder, manifest.model_copy(update={"engines": (*manifest.engines, *plans)}))
    return folder


def test_another_engine_runs_if_that_is_allowed_and_it_is_said(
    bundle_of_three: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = partial(Pipeline.from_bundle, bundle_of_three, "cpu")
    with pytest.raises(EngineMismatch, match=r"was built for GPUs \(sm_86\), the device is a CPU"):
        load(engine="tensorrt-rtx")
    words = (
        r"^torch runs instead of tensorrt-rtx, which cannot: text_encoder \(tensorrt-rtx, float32\) was built for GPUs"
    )
    with pytest.warns(UserWarning, match=words) as told:
        pipe = load(engine="tensorrt-rtx", fallback=True)
    assert pipe.kind == "torch"
    assert [warning.filename for warning in told] == [__file__]
    # The bundle's first kind is tried where none is named; one that is not in the bundle fails like one that cannot run.
    with pytest.warns(UserWarning, match=words):
        assert load(fallback=True).kind == "torch"
    with warnings.catch_warnings(record=True) as all_told:
        warnings.simplefilter("always")
        assert load(engine="tensorrt", fallback=True).kind == "torch"
    absent, unfit = (str(warning.message) for warning in all_told)
    assert absent.startswith("tensorrt-rtx runs instead of tensorrt, which cannot: ")
    assert "has no tensorrt engine" in absent
    assert unfit.startswith("torch runs instead of tensorrt-rtx, which cannot: ")
    # What can run does, and nothing is said: warnings are errors here.
    assert load(engine="torch", fallback=True).kind == "torch"
    assert load(engine="onnxruntime", fallback=True).kind == "onnxruntime"

    def refuse(*_: object) -> None:
        raise EngineMismatch("torch is out of order")

    monkeypatch.setattr("ldmrt.engines.torch.TorchEngine.__init__", refuse)
    with (
        pytest.warns(UserWarning, match=r"^onnxruntime runs instead of torch"),
        pytest.raises(EngineMismatch, match="torch is out of order"),
    ):
        load(engine="torch", fallback=True)  # `context` is on the torch engine in any case


def test_a_damaged_bundle_is_no_reason_for_another_engine(bundle_of_three: Path) -> None:
    graph = next((bundle_of_three / "graphs").glob("step*.json"))
    graph.write_text("{}")
    with pytest.raises(BundleError, match="is damaged"):
        Pipeline.from_bundle(bundle_of_three, "cpu", engine="torch", fallback=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_is_not_there(tiny_bundle: Path) -> None:
    with pytest.raises(BadRequest, match="cuda"):
        Pipeline.from_bundle(tiny_bundle, device="cuda")
    with pytest.raises(BadRequest, match="expected auto, cpu, cuda or cuda:N"):
        Pipeline.from_bundle(tiny_bundle, device="tpu")


def test_a_folder_without_a_bundle(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such folder"):
        Pipeline.from_bundle(tmp_path / "none")
    with pytest.raises(BundleError, match="is a model, not a bundle"):
        Pipeline.from_bundle(tiny_model)


def test_a_model_that_makes_nan(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: WeightFile, name: str) -> torch.Tensor:
        tensor = loaded(self, name)
        return tensor * torch.nan if name == "decoder.conv_out.bias" else tensor

    loaded = WeightFile.__getitem__
    monkeypatch.setattr(WeightFile, "__getitem__", broken)
    pipe = Pipeline.from_bundle(tiny_bundle)
    for output_type in ("pil", "np"):
        with pytest.raises(NumericalError):
            pipe(PROMPT, seed=1, **{**QUICK, "output_type": output_type})


def test_nan_in_the_latents_is_no_result_either(pipe: Pipeline) -> None:
    latents = torch.zeros(1, 4, 8, 8)
    latents[0, 0, 0, 0] = torch.nan
    with pytest.raises(NumericalError):
        pipe(PROMPT, latents=latents, **QUICK)


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "param"),
    [
        ({"output_type": "jpeg"}, "output_type"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"width": 128}, "width"),
        ({"eta": 2.0}, "eta"),
        ({"sampler": "magic"}, "sampler"),
        ({"guidance_rescale": -0.1}, "guidance_rescale"),
        ({"clip_skip": 3}, "clip_skip"),
        ({"generator": [torch.Generator()] * 2}, "generator"),
        ({"latents": torch.zeros(1, 4, 8, 9)}, "latents"),
        ({"latents": torch.zeros(2, 4, 8, 8)}, "latents"),
        ({"prompt_embeds": torch.zeros(77, 32)}, "prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 77, 31)}, "prompt_embeds"),
        ({"prompt_embeds": torch.zeros(3, 77, 32), "prompt": [PROMPT] * 2}, "prompt_embeds"),
        ({"prompt_embeds": torch.zeros(1, 154, 32)}, "negative_prompt_embeds"),
        ({"negative_prompt_embeds": torch.zeros(1, 154, 32)}, "negative_prompt_embeds"),
    ],
)
def test_values_that_cannot_be_used_are_named(pipe: Pipeline, arguments: dict[str, Any], param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        pipe(**{"prompt": PROMPT, **QUICK, **arguments})
    assert caught.value.param == param
    assert "\n" not in str(caught.value)


def test_embeddings_of_any_count_of_tokens(pipe: Pipeline) -> None:
    embeds = torch.randn(1, 10, 32, generator=torch.Generator().manual_seed(0))
    result = pipe(prompt_embeds=embeds, negative_prompt_embeds=-embeds, seed=1, num_images_per_prompt=2, **QUICK)
    assert result.latents.isfinite().all()
    one = pipe(prompt_embeds=embeds, negative_prompt_embeds=-embeds, seed=2, **QUICK)
    assert relative(one.latents[0], result.latents[1]) < 1e-5


def test_a_bundle_for_two_images_only(tiny_model: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    """One image runs in a batch of two, the other place left empty."""
    from ldmrt.bundle import Bundle
    from ldmrt.manifest import write_manifest

    path = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    manifest = Bundle.open(path).manifest
    engines = tuple(engine for engine in manifest.engines if engine.rows in (None, 2, 4))
    kept = tuple(e for e in engines if e.component != "step" or e.rows == 4)
    write_manifest(path, manifest.model_copy(update={"engines": kept}))
    narrow, wide = Pipeline.from_bundle(tiny_bundle), Pipeline.from_bundle(path)
    for count in (1, 3):
        arguments = {**QUICK, "seed": 1, "num_images_per_prompt": count, "output_type": "np"}
        ours, theirs = wide(PROMPT, **arguments), narrow(PROMPT, **arguments)
        assert relative(ours.latents, theirs.latents) < 1e-5
        assert abs(ours.images - theirs.images).max() < 1e-5


def test_the_public_name() -> None:
    assert ldmrt.Pipeline is Pipeline


# ---------------------------------------------------------------------------------------------------- changed weights


def test_weights_come_back_to_the_bit(tiny_bundle: Path) -> None:
    pipe = Pipeline.from_bundle(tiny_bundle, device="cpu")
    before = pipe(PROMPT, seed=1, **QUICK).latents
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    file = WeightFile(tiny_bundle / pipe.bundle.manifest.weights["unet.float32"].file)
    for factor in (2.0, -1.0):
        pipe.update_weights("unet", {name: factor * file[name]})
        assert not torch.equal(pipe(PROMPT, seed=1, **QUICK).latents, before)
    pipe.restore_weights("unet")
    assert torch.equal(pipe(PROMPT, seed=1, **QUICK).latents, before)


def test_weights_that_cannot_be_changed(tiny_bundle: Path) -> None:
    pipe = Pipeline.from_bundle(tiny_bundle, device="cpu")
    with pytest.raises(BadRequest, match="component is 'step'"):
        pipe.update_weights("step", {})
    with pytest.raises(EngineMismatch, match="no weight 'nothing'"):
        pipe.update_weights("unet", {"nothing": torch.zeros(1)})


def test_capture_has_three_values(tiny_bundle: Path) -> None:
    with pytest.raises(BadRequest, match="capture is 'all'"):
        Pipeline.from_bundle(tiny_bundle, capture="all")  # type: ignore[arg-type]
