"""diffusers on the same weights, inputs and steps, in the same process, alternating: eager, and compiled by torch.compile."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gpu_suite.models import GUIDANCE, Model
from gpu_suite.networks import cudnn_benchmark, step_figures, unet_inputs
from gpu_suite.results import Figures
from gpu_suite.session import Session
from gpu_suite.timing import loop_times
from ldmrt.denoise import Denoiser
from ldmrt.verify import relative_error, run_denoiser

# Seconds without which compiling in each mode is not worth beginning with, and with a cache in any.
_MODES = {"reduce-overhead": 60.0, "max-autotune": 100.0}
_LEAST_WITH_CACHE = 40.0
_ARTIFACTS = "artifacts.bin"


class Loop:
    """diffusers' denoising loop with guidance for one image, as its pipelines have it, in the model's precision.

    The timestep is there on the host and on the device, which spares diffusers a wait for the device in every step.
    """

    def __init__(self, model: Model, unet: Callable[..., Any]) -> None:
        from diffusers import DDIMScheduler

        self.unet, self.model = unet, model
        self.scheduler = DDIMScheduler.from_config(model.configs["scheduler"])
        self.scheduler.set_timesteps(model.steps)
        self.timesteps = [(t, t.to(model.device)) for t in self.scheduler.timesteps]
        # As `Model.admit` has it for slot 0; diffusers puts the negative prompt first.
        pair = [model.conditioning(5), model.conditioning(0)]
        stacked = {name: torch.stack([one[name] for one in pair]).to(model.dtype) for name in pair[0]}
        self.states = stacked.pop("encoder_hidden_states")
        self.added = {"added_cond_kwargs": stacked} if stacked else {}
        self.start = model.noise(*model.latent_shape, seed=100)[None].to(model.dtype)

    @torch.no_grad()
    def __call__(self) -> Tensor:
        """The latents after the last step."""
        latents: Tensor = self.start
        for on_host, on_device in self.timesteps:
            torch.compiler.cudagraph_mark_step_begin()  # type: ignore[no-untyped-call]
            both = self.scheduler.scale_model_input(torch.cat([latents] * 2), on_host)
            output = self.unet(both, on_device, encoder_hidden_states=self.states, return_dict=False, **self.added)[0]
            negative, positive = output.chunk(2)
            output = negative + GUIDANCE * (positive - negative)
            latents = self.scheduler.step(output, on_host, latents, return_dict=False)[0]
        return latents

    @torch.no_grad()
    def once(self, inputs: dict[str, Tensor]) -> Tensor:
        """One evaluation of given inputs (`unet_inputs`), whose timesteps are the first of the loop: one for all rows, as there."""
        values = {name: tensor.to(self.model.dtype) for name, tensor in inputs.items() if name != "timesteps"}
        latents, states = values.pop("latents"), values.pop("encoder_hidden_states")
        added = {"added_cond_kwargs": values} if values else {}
        output = self.unet(latents, self.timesteps[0][1], encoder_hidden_states=states, return_dict=False, **added)
        found: Tensor = output[0]
        return found.float().clone()


def peers(session: Session, unit: str, name: str) -> None:
    """A model's loop at batch 1 against diffusers eager, then against diffusers compiled."""
    model = session.only_model(name)
    ours = model.denoiser(1, session.recorder())
    model.admit(ours)
    # In favour of diffusers: ours is recorded by now, with the convolutions that the runtime chooses without measuring.
    with cudnn_benchmark():
        _peers(session, unit, model, ours)


def _peers(session: Session, unit: str, model: Model, ours: Denoiser) -> None:
    loops: dict[str, Loop] = {}
    with session.results.part(unit, "diffusers eager") as figures:
        loops["diffusers eager"] = Loop(model, _module(session, model))
        _against(session, model, ours, loops, figures)
    cached = _load_cache(session)
    for mode, least in _MODES.items():
        name = f"diffusers torch.compile {mode}"
        with session.results.part(unit, name) as figures:
            figures["from_cache"] = cached
            needed = 0.0 if session.tiny else _LEAST_WITH_CACHE if cached else least
            if session.left() < needed:
                figures["skipped"] = f"{session.left():.0f} s are left, compiling needs {needed:.0f} s at least"
                return
            start = time.time()
            loops[name] = Loop(model, _compiled(session, model, mode, figures))
            loops[name]()
            session.synchronize()
            figures["compile_seconds"] = round(time.time() - start, 1)
            _save_cache(session)
            _against(session, model, ours, loops, figures)


def _module(session: Session, model: Model) -> Any:
    module = model.original("unet", model.dtype)
    return module.to(memory_format=torch.channels_last) if session.cuda else module


def _compiled(session: Session, model: Model, mode: str, figures: Figures) -> Any:
    module = _module(session, model)
    try:
        module.fuse_qkv_projections()
        figures["fuse_qkv_projections"] = True
    except (AttributeError, ValueError) as error:
        figures["fuse_qkv_projections"] = f"{type(error).__name__}: {error}"
    if not session.cuda:
        return torch.compile(module, backend="eager")
    return torch.compile(module, mode=mode, fullgraph=True, dynamic=False)


def _against(session: Session, model: Model, ours: Denoiser, loops: dict[str, Loop], figures: Figures) -> None:
    """Outputs first, then times of all, alternating."""
    newest = list(loops)[-1]
    inputs = unet_inputs(model)
    inputs["timesteps"] = torch.full_like(inputs["timesteps"], float(loops[newest].timesteps[0][0]))
    with torch.inference_mode():
        engines = (model.engine("context"), model.engine("schedule"), model.engine("step", 2))
        found = run_denoiser(*engines, inputs, model.device)["model_output"].to(model.device)
    model.admit(ours)
    ours.steps(model.steps)
    errors = {
        "evaluation": relative_error(loops[newest].once(inputs), found),
        "final_latents": relative_error(loops[newest]()[0], ours.latents(0)),
    }
    figures["relative_difference"] = {name: float(f"{error:.3g}") for name, error in errors.items()}
    cases: dict[str, Callable[[], object]] = {"ldmrt": lambda: ours.steps(model.steps), **loops}
    times = loop_times(session, cases, seconds=20, most=10)
    figures.update({case: step_figures(session, model, 1, seconds) for case, seconds in times.items()})
    figures["times_faster"] = {
        case: round(statistics.median(theirs / own for theirs, own in zip(times[case], times["ldmrt"], strict=True)), 3)
        for case in loops
    }


# ---------------------------------------------------------------------------------------------------- torch.compile's cache


def _load_cache(session: Session) -> bool:
    """Whether there is a cache from an earlier run, now loaded. It is torch's own format: use only files that you wrote."""
    path = _cache(session)
    if path is None or not path.is_file():
        return False
    return torch.compiler.load_cache_artifacts(path.read_bytes()) is not None


def _save_cache(session: Session) -> None:
    path = _cache(session)
    if path is None:
        return
    artifacts = torch.compiler.save_cache_artifacts()
    if artifacts is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(artifacts[0])
        temporary.replace(path)


def _cache(session: Session) -> Path | None:
    return None if session.inductor_cache is None else session.inductor_cache / _ARTIFACTS
