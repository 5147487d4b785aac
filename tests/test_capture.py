"""The traps of capture, with a recorder that replays operators on the CPU as a CUDA graph replays kernels.

Each test is of one way in which a captured step could go on computing with what no longer holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import ldmrt.engines.torch
import ldmrt.slots
from ldmrt.bundle import Bundle
from ldmrt.decoding import Decoding
from ldmrt.denoise import Denoiser
from ldmrt.errors import EngineMismatch
from ldmrt.kernels import native
from ldmrt.kernels.sampler import sampler_step_reference
from ldmrt.loader import EngineLoader
from ldmrt.parameters import Parameters
from ldmrt.pipeline import Pipeline
from ldmrt.samplers.ddim import ddim
from ldmrt.samplers.make import sampler_table
from ldmrt.samplers.registry import SAMPLERS
from ldmrt.samplers.table import SamplerTable
from ldmrt.schedule import NoiseSchedule
from ldmrt.slots import Blend
from tests.replay import HostSyncError, Recorder

CPU = torch.device("cpu")
TOKENS, WIDTH = 77, 32


@pytest.fixture(autouse=True)
def _operators_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The recorder sees torch's operators, not the native library's."""
    monkeypatch.setattr(ldmrt.slots, "sampler_step", sampler_step_reference)
    monkeypatch.setattr(native, "serves", lambda x: False)
    # Nor weights in an order of the CPU's own, which a GPU has no use for either.
    monkeypatch.setattr(ldmrt.engines.torch, "_ARRANGEMENTS", {})


@pytest.fixture
def bundle(tiny_bundle: Path) -> Bundle:
    """Opened anew for each test: some change its weights."""
    return Bundle.open(tiny_bundle)


@pytest.fixture
def schedule(bundle: Bundle) -> NoiseSchedule:
    return NoiseSchedule.from_dict(bundle.manifest.model.schedule)


def parameters(bundle: Bundle) -> Parameters:
    return bundle.parameters(bundle.find("step")[0].weights, CPU)


def denoiser(
    bundle: Bundle, recorder: Recorder | None, *, rows: int = 4, tokens: int = TOKENS, whole: bool = False
) -> Denoiser:
    record = next(record for record in bundle.find("step") if record.rows == rows)
    return Denoiser(
        bundle.load(bundle.find("context")[0], CPU),
        bundle.load(bundle.find("schedule")[0], CPU),
        bundle.load(record, CPU),
        rows=rows,
        tokens=tokens,
        evaluations=16,
        device=CPU,
        recorder=recorder,  # type: ignore[arg-type]
        whole=whole,
        generation=lambda: parameters(bundle).generation,
    )


def admit(
    loop: Denoiser,
    slot: int,
    table: SamplerTable,
    *,
    seed: int,
    guidance: float = 7.5,
    tokens: int = TOKENS,
    rescale: float = 0.0,
    keeps: bool = False,
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    loop.admit(
        slot,
        latents=draw(4, 8, 8),
        table=table,
        guidance_scale=guidance,
        cond={"encoder_hidden_states": draw(tokens, WIDTH)},
        uncond={"encoder_hidden_states": draw(tokens, WIDTH)} if guidance > 1 else None,
        noise=draw(table.evaluations, 4, 8, 8),
        guidance_rescale=rescale,
        blend=Blend(draw(4, 8, 8), draw(4, 8, 8), draw(1, 8, 8).sigmoid()) if keeps else None,
    )


@contextmanager
def both(bundle: Bundle, *, whole: bool = False) -> Iterator[tuple[Denoiser, Denoiser, Callable[[int], None]]]:
    """A captured loop and one that is not, over engines of their own, and a check that their slots agree to the bit."""
    captured, plain = denoiser(bundle, Recorder(), whole=whole), denoiser(Bundle.open(bundle.path), None)

    def agree(slot: int) -> None:
        assert torch.equal(captured.latents(slot), plain.latents(slot))

    yield captured, plain, agree


def test_what_is_captured_is_what_is_run(bundle: Bundle, schedule: NoiseSchedule) -> None:
    with both(bundle) as (captured, plain, agree):
        for loop in (captured, plain):
            admit(loop, 0, ddim(schedule, 3, 0.5), seed=1)
        for _ in range(3):
            captured.step()
            plain.step()
            agree(0)


def test_capture_leaves_no_trace_in_the_buffers(bundle: Bundle) -> None:
    with both(bundle) as (captured, plain, _):
        for name in ("x", "saved", "history", "row", "last_row", "cond_row", "uncond_row", "model_input"):
            assert torch.equal(getattr(captured.slots, name), getattr(plain.slots, name)), name


def test_python_numbers_are_not_frozen(bundle: Bundle, schedule: NoiseSchedule) -> None:
    """Guidance, sampler, step count and slot come from buffers: the second image of a slot is not made like the first."""
    with both(bundle) as (captured, plain, agree):
        for seed, (steps, eta, guidance) in enumerate([(3, 0.0, 7.5), (5, 1.0, 2.0), (2, 0.0, 1.0)]):
            for loop in (captured, plain):
                admit(loop, seed % 2, ddim(schedule, steps, eta), seed=seed, guidance=guidance)
            for _ in range(steps):
                captured.step()
                plain.step()
            agree(seed % 2)
            for loop in (captured, plain):
                loop.release(seed % 2)


def test_an_image_that_joins_or_leaves_between_two_replays(bundle: Bundle, schedule: NoiseSchedule) -> None:
    with both(bundle) as (captured, plain, agree):
        for loop in (captured, plain):
            admit(loop, 0, ddim(schedule, 6), seed=1)
            loop.step()
            admit(loop, 1, ddim(schedule, 2, 1.0), seed=2)
            loop.step()
            loop.step()
            loop.release(1)
            loop.step()
        agree(0)
        agree(1)


def test_every_sampler_runs_in_the_same_graph(bundle: Bundle, schedule: NoiseSchedule) -> None:
    """Side by side with another one that is at another step, one rescaled, one thresholded, one that keeps a picture, each as it is alone and uncaptured."""
    thresholding = replace(schedule, thresholding=True, dynamic_thresholding_ratio=0.9)
    tables = [
        sampler_table(name, one, 5)
        for name in (*SAMPLERS, "dpm++ 2m karras")
        for one in ((thresholding, schedule) if name in ("ddim", "dpm++ 2m") else (schedule,))
    ]
    assert sum(table.thresholds for table in tables) == 2
    recorder = Recorder()
    captured = denoiser(bundle, recorder)
    under_way: dict[int, tuple[int, list[torch.Tensor]]] = {}
    waiting = iter(enumerate(tables))
    finished = 0
    while finished < len(tables):
        for slot in captured.slots.free[: len(captured.slots.free_rows) // 2]:
            seed, table = next(waiting, (0, None))
            if table is None:
                continue
            rescale, keeps = 0.7 * (seed % 2), seed % 3 == 1
            # Alone, only those adjustments are launched that it asks for.
            plain = denoiser(bundle, None)
            for loop in (captured, plain):
                admit(loop, slot, table, seed=seed, rescale=rescale, keeps=keeps)
            expected = []
            for _ in range(table.evaluations):
                plain.step()
                expected.append(plain.latents(slot).clone())
            under_way[slot] = (0, expected)
        captured.step()
        for slot, (made, expected) in list(under_way.items()):
            assert torch.equal(captured.latents(slot), expected[made])
            under_way[slot] = (made + 1, expected)
            if captured.slots.done(slot):
                captured.release(slot)
                del under_way[slot]
                finished += 1
    # With and without each adjustment, the first ahead, the others when they were asked for, over images under way.
    assert len(recorder.calls) <= 8


def test_several_steps_in_one_graph(bundle: Bundle, schedule: NoiseSchedule) -> None:
    with both(bundle, whole=True) as (captured, plain, agree):
        for loop in (captured, plain):
            admit(loop, 0, ddim(schedule, 4, 0.3), seed=1)
            loop.steps(4)
            assert loop.slots.done(0)
        agree(0)


def test_loop_and_decoder_in_one_graph(bundle: Bundle, schedule: NoiseSchedule) -> None:
    """Also where the decoder takes fewer rows than there are slots, and for a second image after the first."""
    record = min(bundle.find("decoder"), key=lambda record: record.rows or 1)
    assert record.rows == 1
    with both(bundle, whole=True) as (captured, plain, agree):
        decoding = Decoding(bundle.load(record, CPU), captured.slots.x[:2])
        decoder = Bundle.open(bundle.path).load(record, CPU)
        for seed in (1, 4):
            for loop in (captured, plain):
                for slot in (0, 1):
                    admit(loop, slot, ddim(schedule, 3), seed=seed + slot)
            captured.steps(3, decoding.work)
            plain.steps(3)
            for slot in (0, 1):
                agree(slot)
                expected = decoder.run({"latents": plain.latents(slot)[None]})["image"]
                assert torch.equal(decoding.images[slot : slot + 1], expected)
                for loop in (captured, plain):
                    loop.release(slot)


def test_a_pipeline_gives_the_same_pictures_however_much_is_one_graph(tiny_bundle: Path) -> None:
    found = []
    for way in ("step", "loop", "image"):
        loader = EngineLoader(Bundle.open(tiny_bundle), CPU, None, "float32", Recorder())  # type: ignore[arg-type]
        pipe = Pipeline(loader, capture=way)
        found.append(
            [pipe("a", num_inference_steps=3, num_images_per_prompt=n, seed=n, output_type="np") for n in (3, 1)]
        )
        stepped = pipe("a", num_inference_steps=3, seed=1, output_type="np", on_step=lambda step, latents: None)
        assert (stepped.images == found[-1][1].images).all()
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert torch.equal(one.latents, other.latents)
            assert (one.images == other.images).all()


def test_going_back_and_forth_captures_nothing_anew(tiny_bundle: Path) -> None:
    """Samplers, guidance, step counts and batch sizes share one denoiser, and give what each gives in a pipeline of its own."""
    ways: list[dict[str, Any]] = [
        {},
        {"sampler": "euler a"},
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.7},
        {"num_images_per_prompt": 2, "eta": 0.5},
        {"sampler": "heun", "num_inference_steps": 34},
    ]
    arguments = {"num_inference_steps": 3, "seed": 7, "output_type": "latent"}
    recorder = Recorder()
    loader = EngineLoader(Bundle.open(tiny_bundle), CPU, None, "float32", recorder)  # type: ignore[arg-type]
    pipe = Pipeline(loader)
    expected = [Pipeline.from_bundle(tiny_bundle, "cpu")("a", **{**arguments, **way}).latents for way in ways]
    for _ in range(2):  # the second round gives the denoiser its smaller batches back
        found = [pipe("a", **{**arguments, **way}).latents for way in ways]
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    recorded = len(recorder.calls)
    (denoiser,) = pipe._denoisers._denoisers.values()
    assert denoiser.batches == [1, 2, 4]
    for way in reversed(ways):
        pipe("a", **{**arguments, **way})
    assert list(pipe._denoisers._denoisers.values()) == [denoiser]
    assert len(recorder.calls) == recorded


def test_a_decoder_of_another_size_is_refused(bundle: Bundle) -> None:
    with pytest.raises(EngineMismatch, match="the decoder takes latents of"):
        Decoding(bundle.load(bundle.find("decoder")[0], CPU), torch.zeros(2, 4, 9, 8))


def test_capturing_does_not_move_images_under_way(bundle: Bundle, schedule: NoiseSchedule) -> None:
    """One that rescales joins one that does not: a step with the adjustment is captured then."""
    recorder = Recorder()
    captured, plain = denoiser(bundle, recorder), denoiser(Bundle.open(bundle.path), None)
    for loop in (captured, plain):
        admit(loop, 0, ddim(schedule, 5, 0.5), seed=1)
        loop.step()
        admit(loop, 1, ddim(schedule, 3), seed=2, rescale=0.7)
        loop.steps(3)
    assert len(recorder.calls) == 2
    for slot in (0, 1):
        assert torch.equal(captured.latents(slot), plain.latents(slot))


def test_a_decoder_that_others_have_bound(bundle: Bundle, schedule: NoiseSchedule) -> None:
    """What a graph holds of it are the buffers of whom it was captured for."""
    loop = denoiser(bundle, Recorder(), whole=True)
    engine = bundle.load(min(bundle.find("decoder"), key=lambda record: record.rows or 1), CPU)
    ours = Decoding(engine, loop.slots.x[:1])
    Decoding(engine, torch.zeros(1, 4, 8, 8)).work()
    admit(loop, 0, ddim(schedule, 2), seed=1)
    loop.steps(2, ours.work)
    assert torch.equal(ours.images, engine.run({"latents": loop.latents(0)[None]})["image"])


def test_weights_changed_in_place_are_used(bundle: Bundle, schedule: NoiseSchedule) -> None:
    """The captured graph, and the keys and values that were computed before, for an image under way."""
    with both(bundle) as (captured, plain, agree):
        table = ddim(schedule, 4)
        for loop in (captured, plain):
            admit(loop, 0, table, seed=1)
            loop.steps(2)
        before = captured.latents(0).clone()
        spec = next(s for name, s in bundle.graph(bundle.find("context")[0]).weights.items() if "to_k" in name)
        noise = torch.randn([int(size) for size in spec.shape], generator=torch.Generator().manual_seed(5))
        for loop, opened in ((captured, bundle), (plain, None)):
            if opened is not None:
                parameters(opened).update({spec.name: noise})
                loop.steps(2)
        plain.steps(2)
        assert not torch.equal(captured.latents(0), plain.latents(0))

        # What it should be: a loop that has had the new weights from the start, put where the first one was.
        changed = Bundle.open(bundle.path)
        expected = denoiser(changed, None)
        parameters(changed).update({spec.name: noise})
        admit(expected, 0, table, seed=1)
        state = denoiser(Bundle.open(bundle.path), None)
        admit(state, 0, table, seed=1)
        state.steps(2)
        assert torch.equal(state.latents(0), before)
        for name in ("x", "saved", "history", "row", "model_input"):
            getattr(expected.slots, name).copy_(getattr(state.slots, name))
        expected.steps(2)
        assert torch.equal(captured.latents(0), expected.latents(0))

        parameters(bundle).restore()
        captured.release(0)
        plain.release(0)
        for loop in (captured, plain):
            admit(loop, 0, table, seed=1)
            loop.steps(4)
        agree(0)


def test_nothing_waits_for_the_device_and_every_step_is_the_same(bundle: Bundle) -> None:
    recorder = Recorder()
    loop = denoiser(bundle, recorder, whole=True)
    loop.steps(1)
    loop.steps(2)
    one, two = recorder.calls
    assert two == one + one


def test_the_recorder_refuses_what_a_capture_refuses() -> None:
    value = torch.ones(3)

    def work() -> None:
        value.sum().item()

    with pytest.raises(HostSyncError):
        Recorder().record(work)


def test_the_recorder_replays_on_the_same_memory() -> None:
    source, target = torch.ones(2), torch.zeros(2)

    def work() -> None:
        target.copy_((source * 2).view(2) + 1)

    replay = Recorder().record(work)
    source.fill_(5)
    replay()
    assert target.tolist() == [11, 11]
