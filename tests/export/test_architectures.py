"""How models are taken apart."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from threading import Event

import pytest
import torch

from ldmrt.export import architectures
from ldmrt.export.capture import capture
from ldmrt.export.passes.clean import clean
from ldmrt.export.passes.hoist import hoist
from ldmrt.export.source import Checkpoint, Source
from ldmrt.export.verify import reference_outputs
from ldmrt.verify import relative_error

SIZE = (64, 64)


def test_components_of_stable_diffusion(tiny_model: Path) -> None:
    source = Source.open(tiny_model)
    found = {component.name: size for size, component, _ in architectures.components(source, [SIZE, (128, 64)])}
    assert set(found) == {"text_encoder", "unet", "decoder", "encoder"}
    assert found["text_encoder"] is None
    assert found["unet"] == (128, 64)  # the last of the two
    assert architectures.downscale(source) == 8


def test_components_of_stable_diffusion_xl(tiny_model_xl: Path) -> None:
    source = Source.open(tiny_model_xl)
    components = {component.name: component for _, component, _ in architectures.components(source, [SIZE])}
    assert set(components) == {"text_encoder", "text_encoder_2", "unet", "decoder", "encoder"}
    assert components["text_encoder"].outputs == ("hidden_states",)
    assert components["text_encoder_2"].outputs == ("hidden_states", "text_embeds")
    assert components["unet"].kinds == {
        "latents": "step",
        "timesteps": "schedule",
        "encoder_hidden_states": "request",
        "text_embeds": "request",
        "time_ids": "request",
    }


def test_the_time_path_of_xl_reads_the_request(tiny_model_xl: Path) -> None:
    """Its time embedding also takes the pooled text and the sizes: `schedule` does, `context` and `step` do not."""
    component = architectures.unet(Source.open(tiny_model_xl), SIZE)
    graph = clean(capture(component.name, component.module, component.inputs, component.outputs))
    parts = hoist(graph, component.kinds)
    inputs = [{spec.name for spec in part.inputs} for part in (parts.context, parts.schedule)]
    assert inputs == [{"encoder_hidden_states"}, {"timesteps", "text_embeds", "time_ids"}]
    step = {spec.name for spec in parts.step.inputs}
    assert not step & {"encoder_hidden_states", "timesteps", "text_embeds", "time_ids"}
    assert {spec.name for spec in parts.step.inputs} == {"latents", *parts.context.outputs, *parts.schedule.outputs}


@pytest.mark.parametrize("model", ["tiny_model", "tiny_model_xl"])
def test_trials_fit_their_components(request: pytest.FixtureRequest, model: str) -> None:
    for _, component, trials in architectures.components(Source.open(request.getfixturevalue(model)), [SIZE]):
        found = trials()
        assert [trial.kind for trial in found] == ["random", "real", "extreme"]
        first, second, _ = (trial.inputs for trial in found)
        assert relative_error(first[component.inputs[0].name], second[component.inputs[0].name]) > 0.1
        for trial in found:
            assert list(trial.inputs) == [spec.name for spec in component.inputs]
            for spec in component.inputs:
                tensor = trial.inputs[spec.name]
                assert tensor.dtype == spec.dtype
                fixed = [
                    (size, want) for size, want in zip(tensor.shape, spec.shape, strict=True) if isinstance(want, int)
                ]
                assert all(size == want for size, want in fixed), spec
                assert tensor.isfinite().all()


def test_decoders_are_tried_on_latents_of_unit_variance(tiny_model: Path) -> None:
    plans = architectures.components(Source.open(tiny_model), [SIZE])
    trials = next(trials for _, component, trials in plans if component.name == "decoder")
    for trial in trials():
        expected = architectures.OVERSHOOT if trial.kind == "extreme" else 1.0
        assert trial.inputs["latents"].std() == pytest.approx(expected, rel=0.1)


def test_extremes_are_the_ends_of_what_people_ask_for(tiny_model: Path) -> None:
    plans = {
        component.name: trials for _, component, trials in architectures.components(Source.open(tiny_model), [SIZE])
    }
    extremes = {name: trials()[-1].inputs for name, trials in plans.items()}
    ids = extremes["text_encoder"]["input_ids"]
    end = ids[0, 1]
    assert (ids[0, 1:] == end).all(), "the first prompt is empty"
    assert (ids[1, 1:-1] != end).all(), "the second one fills the window"
    assert extremes["unet"]["timesteps"].tolist() == [999.0, 0.0]
    assert extremes["encoder"]["image"].abs().eq(1).all()


@pytest.mark.parametrize("model", ["tiny_model", "tiny_model_xl"])
def test_the_original_holds_a_weight_only_while_its_layer_runs(request: pytest.FixtureRequest, model: str) -> None:
    """And makes what it makes with all of its weights in memory."""
    source = Source.open(request.getfixturevalue(model))
    for (_, component, trials), (_, whole, _) in zip(
        architectures.components(source, [SIZE]), architectures.components(source, [SIZE]), strict=True
    ):
        checkpoint = Checkpoint(source, component.folder, component.original)
        original = architectures.reference(component, checkpoint)
        # Of the buffers it makes only what is not in the files.
        architectures.reference(whole, checkpoint)
        for layer in whole.module.modules():
            layer._forward_pre_hooks.clear()
            layer._forward_hooks.clear()
        weights = {name: checkpoint.load(name).float() for name in checkpoint.keys}
        whole.original.load_state_dict(weights, strict=True, assign=True)
        tried = trials()
        # What is known already was made so, too.
        tried = [*tried, *(replace(trial, expected=None) for trial in tried if trial.expected)]
        names = component.outputs
        expected = [dict(zip(names, whole.module(*trial.inputs.values()), strict=True)) for trial in tried]
        for ours, theirs in zip(reference_outputs(original, tried, names), expected, strict=True):
            assert all(torch.equal(ours[name], theirs[name]) for name in names)
        assert all(weight.is_meta for weight in component.original.parameters())


def test_the_original_stops_when_it_is_told_to(tiny_model: Path) -> None:
    source = Source.open(tiny_model)
    _, component, trials = next(architectures.components(source, [SIZE]))
    original = architectures.reference(component, Checkpoint(source, component.folder, component.original))
    stop = Event()
    stop.set()
    with pytest.raises(InterruptedError):
        reference_outputs(original, trials(), component.outputs, stop)
