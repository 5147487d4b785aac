"""Whole networks with random weights: the denoising loop, the decoder, and a picture from beginning to end."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from gpu_suite.floors import floor_of
from gpu_suite.models import TOKENS, Model
from gpu_suite.results import Figures
from gpu_suite.session import Session, nvidia_smi
from gpu_suite.timing import loop_times
from ldmrt.bench.ledger import summary
from ldmrt.denoise import Denoiser
from ldmrt.export.component import Decoder, UNet
from ldmrt.graph import dtype_name
from ldmrt.image import to_uint8
from ldmrt.verify import TOLERANCE, relative_error, run_denoiser

BATCHES = {"sd15": (1, 4, 8), "sdxl": (1,)}


def denoise(session: Session, unit: str, name: str) -> None:
    """A model's loop: is it right, how fast is it captured and not, at each batch size, and with everything around it."""
    model = session.only_model(name)
    part = session.results.part
    with part(unit, "build") as figures:
        start = time.time()
        figures.update({"nodes": {key: len(graph.nodes) for key, graph in model.unet.items()}})
        figures["capture_seconds"] = round(time.time() - start, 1)
        model.engine("step", 2)
        session.synchronize()
        figures["with_weights_seconds"] = round(time.time() - start, 1)
    with part(unit, "right") as figures:
        check_unet(session, model, figures)
    for batch in BATCHES[name][: 1 if session.brief else None]:
        with part(unit, f"batch {batch}") as figures:
            _loop(session, model, batch, figures)
        if session.brief:
            continue
        with part(unit, f"batch {batch}, cudnn.benchmark") as figures, cudnn_benchmark():
            _loop(session, model, batch, figures)
        if batch == 1:
            with part(unit, "batch 1, whole loop captured") as figures:
                _loop(session, model, 1, figures, whole=True)
            with part(unit, "batch 1, not captured") as figures:
                _loop(session, model, 1, figures, captured=False)
    with part(unit, "captured as not captured") as figures:
        _check_capture(session, model, figures)
    with part(unit, "end to end") as figures:
        _end_to_end(session, model, figures)


def decode(session: Session, unit: str, name: str) -> None:
    """A model's decoder at one row, captured and not."""
    model = session.only_model(name)
    with session.results.part(unit, "right") as figures:
        latents = model.noise(1, *model.latent_shape, seed=1)
        scaling = float(model.configs["vae"].get("scaling_factor", 0.18215))
        expected = _in_float32(lambda: Decoder(model.original("vae", torch.float32), scaling, 0.0)(latents)[0])
        found = model.engine("decoder", 1).run({"latents": latents.to(model.dtype)})["image"]
        _compare(figures, found, expected, model.dtype)
    with session.results.part(unit, "captured") as figures:
        _decoding(session, model, figures)
    if session.brief:
        return
    with session.results.part(unit, "captured, cudnn.benchmark") as figures, cudnn_benchmark():
        _decoding(session, model, figures)
    with session.results.part(unit, "not captured") as figures:
        _decoding(session, model, figures, captured=False)


# ---------------------------------------------------------------------------------------------------- right?


def check_unet(session: Session, model: Model, figures: Figures) -> None:
    """One evaluation of the compiled network against diffusers' module in float32, with the tolerance of a bundle's certificate."""
    inputs = unet_inputs(model)
    expected = _in_float32(lambda: UNet(model.original("unet", torch.float32), tuple(inputs))(*inputs.values())[0])
    with torch.inference_mode():
        engines = (model.engine("context"), model.engine("schedule"), model.engine("step", 2))
        found = run_denoiser(*engines, inputs, model.device)["model_output"].to(model.device)
    session.synchronize()
    _compare(figures, found, expected, model.dtype)


def unet_inputs(model: Model) -> dict[str, Tensor]:
    """Two rows of a network's inputs, float32."""
    texts = [model.conditioning(3), model.conditioning(8)]
    return {
        "latents": model.noise(2, *model.latent_shape, seed=2),
        "timesteps": torch.tensor([999.0, 261.0], device=model.device),
        **{name: torch.stack([text[name] for text in texts]) for name in texts[0]},
    }


def _in_float32(run: Callable[[], Tensor]) -> Tensor:
    """Run without TF32, which has fewer digits than what is to be judged."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.inference_mode():
            return run().float()
    finally:
        torch.backends.cudnn.allow_tf32 = before


def _compare(figures: Figures, found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error, limit = relative_error(found, expected), TOLERANCE[dtype_name(dtype)]
    figures.update({"relative_error": float(f"{error:.3g}"), "tolerance": limit, "right": error <= limit})
    figures["output_deviation"] = float(f"{float(expected.std()):.4g}")


def _check_capture(session: Session, model: Model, figures: Figures) -> None:
    """The latents after the last step, captured and not: the same kernels, so nearly the same numbers."""
    found = []
    for recorder in (session.recorder(), None):
        denoiser = model.denoiser(1, recorder)
        model.admit(denoiser)
        denoiser.steps(model.steps)
        found.append(denoiser.latents(0).clone())
    session.synchronize()
    error = relative_error(found[0], found[1])
    # Libraries may choose other algorithms while recording; a loop adds up what that changes.
    figures.update({"relative_error": float(f"{error:.3g}"), "tolerance": 5e-2, "right": error <= 5e-2})


# ---------------------------------------------------------------------------------------------------- times


@contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """Convolutions chosen by measuring, as torch.backends.cudnn.benchmark has it; the runtime itself does not ask for it."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def _loop(
    session: Session, model: Model, batch: int, figures: Figures, *, captured: bool = True, whole: bool = False
) -> None:
    denoiser = model.denoiser(batch, session.recorder() if captured else None, whole=whole)
    model.admit(denoiser)
    # A slot that has arrived is stepped on all the same: the network's work does not depend on it.
    times = loop_times(session, {"loop": lambda: denoiser.steps(model.steps)}, seconds=3 if captured else 4)["loop"]
    figures.update(step_figures(session, model, batch, times))
    figures["finite"] = bool(denoiser.slots.x.isfinite().all())
    if session.cuda:
        figures["peak_gpu_bytes"] = torch.cuda.max_memory_allocated()
        figures["clocks_power_temperature"] = nvidia_smi("clocks.sm,clocks.mem,power.draw,temperature.gpu")


def step_figures(session: Session, model: Model, batch: int, times: list[float]) -> Figures:
    """Times of a loop as figures of a step."""
    floor = floor_of(model.unet["step"], 2 * batch, session.rates)
    seconds = summary([loop / model.steps for loop in times])
    return {
        "pixels": model.side,
        "steps": model.steps,
        "guidance": True,
        "batch": batch,
        "dtype": dtype_name(model.dtype),
        "step_seconds": seconds,
        "steps_per_second": round(1 / seconds["p50"], 1),
        "images_per_second_of_loop": round(batch / (seconds["p50"] * model.steps), 3),
        "share_of_flop_floor": round(floor["flop_seconds"] / seconds["p50"], 3),
    }


def _decoding(session: Session, model: Model, figures: Figures, *, captured: bool = True) -> None:
    engine = model.captured("decoder", session.recorder() if captured else None, 1)
    inputs = {"latents": model.noise(1, *model.latent_shape, seed=1).to(model.dtype)}
    seconds = summary(loop_times(session, {"decode": lambda: engine.run(inputs)}, seconds=3)["decode"])
    floor = floor_of(model.decoder_graph, 1, session.rates)
    figures.update({"pixels": model.side, "batch": 1, "dtype": dtype_name(model.dtype), "seconds": seconds})
    figures["share_of_flop_floor"] = round(floor["flop_seconds"] / seconds["p50"], 3)


def _end_to_end(session: Session, model: Model, figures: Figures) -> None:
    """From token ids to bytes of pixels on the host: text encoders, context and schedule, the loop, the decoder."""
    recorder = session.recorder()
    texts = [model.captured(folder, recorder) for folder in model.text_graphs]
    figures["text_encoder"] = bool(texts) or "not measured: transformers is not installed"
    denoiser, decoder = model.denoiser(1, recorder), model.captured("decoder", recorder, 1)
    ids = torch.randint(0, 1000, (2, TOKENS), generator=torch.Generator().manual_seed(0)).to(session.device)
    spent: dict[str, list[float]] = {}

    def picture() -> None:
        with torch.inference_mode():
            _picture(session, model, texts, ids, denoiser, decoder, spent)

    times = loop_times(session, {"picture": picture}, seconds=6, wall=True)["picture"]
    figures.update({"pixels": model.side, "steps": model.steps, "batch": 1, "seconds": summary(times)})
    figures["stages_seconds_p50"] = {name: summary(values[2:])["p50"] for name, values in spent.items()}


def _picture(
    session: Session,
    model: Model,
    texts: list[Any],
    ids: Tensor,
    denoiser: Denoiser,
    decoder: Any,
    spent: dict[str, list[float]],
) -> None:
    marks = [time.perf_counter()]

    def mark(name: str) -> None:
        session.synchronize()
        marks.append(time.perf_counter())
        spent.setdefault(name, []).append(marks[-1] - marks[-2])

    for engine in texts:
        engine.run({"input_ids": ids})
    mark("text")
    # The denoiser gets random text, whatever the encoder makes of random ids: the work is the same.
    model.admit(denoiser)
    mark("context and schedule")
    denoiser.steps(model.steps)
    mark("loop")
    image = decoder.run({"latents": denoiser.latents(0)[None].to(model.dtype)})["image"]
    mark("decode")
    to_uint8(image.nan_to_num())
    mark("pixels")
