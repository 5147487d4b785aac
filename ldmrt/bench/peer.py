"""Another program in a process of its own: it loads a model once, then draws whenever it is told to, and sleeps meanwhile.

    python -P -m ldmrt.bench.peer

The first line on standard input is a `Task` as JSON. Each line after it is a command, `draw`, or `write FILE.npy` to keep the pictures
of another drawing; each is answered by a line of JSON, and so is the task, once the program has drawn for the first time.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from pydantic import BaseModel

from ldmrt.bench.memory import peak_resident
from ldmrt.bench.onnx_networks import Open, exchange, open_onnxruntime, open_openvino
from ldmrt.bench.original_layout import write_original_layout
from ldmrt.bench.pictures import control_picture
from ldmrt.bench.replies import open_replies
from ldmrt.graph import dtype_of
from ldmrt.samplers.registry import default_sampler, resolve

Draw = Callable[[], Any]
SD_CPP = "stable-diffusion.cpp"


class Task(BaseModel):
    """What to draw, and by whom.

    Attributes:
        name: a key of `PROGRAMS`.
        model: a folder in the diffusers layout.
        controlnet: the folder of a ControlNet that is to steer it, by `ldmrt.bench.pictures.control_picture`.
        device: torch's name of it.
        dtype: precision.
        threads: torch's.
        latent_shape: (1, C, h, w), of one image.
        prompt: see `ldmrt.pipeline.Pipeline.__call__`, as for the others.
        negative_prompt: empty for none.
        seed: of the first image.
        num_inference_steps: steps.
        guidance_scale: 1 for none.
        sampler: its name in `ldmrt.samplers.registry`.
        width: in pixels.
        height: in pixels.
        num_images_per_prompt: images of a drawing.
        sigmas: for stable-diffusion.cpp, the noise level of every step, over that of the picture, and the last one's end.
    """

    name: str
    model: Path
    controlnet: Path | None = None
    device: str
    dtype: str
    threads: int
    latent_shape: tuple[int, int, int, int]
    prompt: str
    negative_prompt: str = ""
    seed: int
    num_inference_steps: int
    guidance_scale: float
    sampler: str
    width: int
    height: int
    num_images_per_prompt: int
    sigmas: tuple[float, ...] = ()


def diffusers(task: Task, _stack: ExitStack) -> Draw:
    """The pipeline of diffusers as its users run it: channels last."""
    return _drawing(_opened(task), task)


def compiled(task: Task, _stack: ExitStack) -> Draw:
    """The same with U-Net and decoder compiled by torch.compile: on a GPU with CUDA graphs, on a CPU with frozen weights."""
    import torch._inductor.config

    pipe = _opened(task)
    cuda = task.device.startswith("cuda")
    if not cuda:
        torch._inductor.config.freezing = True
    mode = "reduce-overhead" if cuda else None
    pipe.unet = torch.compile(pipe.unet, mode=mode, fullgraph=True, dynamic=False)
    pipe.vae.decode = torch.compile(pipe.vae.decode, mode=mode, fullgraph=True, dynamic=False)
    if task.controlnet is not None:
        pipe.controlnet = torch.compile(pipe.controlnet, mode=mode, fullgraph=True, dynamic=False)
    return _drawing(pipe, task)


def onnxruntime(task: Task, stack: ExitStack) -> Draw:
    """The same with U-Net and decoder on ONNX Runtime's CPU provider, which has no half precision."""
    return _exchanged(task, stack, open_onnxruntime)


def openvino(task: Task, stack: ExitStack) -> Draw:
    """The same with U-Net and decoder on OpenVINO's CPU plugin, which computes in the precision asked for."""
    dtype = dtype_of(task.dtype)
    return _exchanged(task, stack, lambda path: open_openvino(path, dtype))


def stable_diffusion_cpp(task: Task, stack: ExitStack) -> Draw:
    """stable-diffusion.cpp's own pipeline on a CPU, from one file of the original layout, whose names it knows: float16 weights where ours
    have a half precision, since it has no kernels of bfloat16 there. Its `cpu` random numbers are torch's; given the noise levels, its Euler's method visits those of ours.
    """
    checkpoint = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model.safetensors"
    write_original_layout(task.model, checkpoint)
    model = import_module("stable_diffusion_cpp").StableDiffusion(  # not there where nobody compares
        model_path=str(checkpoint),
        n_threads=task.threads,
        wtype="f32" if task.dtype == "float32" else "f16",
        rng_type="cpu",
        sampler_rng_type="cpu",
        diffusion_flash_attn=True,
        vae_decode_only=True,
        verbose=False,
    )

    def draw() -> Any:
        images = model.generate_image(
            prompt=task.prompt,
            negative_prompt=task.negative_prompt,
            width=task.width,
            height=task.height,
            cfg_scale=task.guidance_scale,
            sample_method="euler",
            sample_steps=task.num_inference_steps,
            sigmas=",".join(map(repr, task.sigmas)),
            seed=task.seed,
            batch_count=task.num_images_per_prompt,
        )
        return np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in images])

    return draw


def _exchanged(task: Task, stack: ExitStack, open_: Open) -> Draw:
    exact = task.model_copy(update={"dtype": "float32"})
    pipe = _opened(exact)
    exchange(pipe, open_, Path(stack.enter_context(tempfile.TemporaryDirectory())))
    return _drawing(pipe, exact)


PROGRAMS: Mapping[str, Callable[[Task, ExitStack], Draw]] = {
    "diffusers": diffusers,
    "torch.compile": compiled,
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    SD_CPP: stable_diffusion_cpp,
}


def _opened(task: Task) -> Any:
    """The model, opened by diffusers, with the scheduler whose numbers our sampler gives."""
    import diffusers
    from diffusers.utils import logging
    from transformers.utils import logging as of_transformers

    for each in (logging, of_transformers):
        each.set_verbosity_error()
        each.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other programs, about themselves
        options = {"torch_dtype": dtype_of(task.dtype), "local_files_only": True}
        if task.controlnet is None:
            pipe = diffusers.DiffusionPipeline.from_pretrained(str(task.model), **options)
        else:
            controlnet = diffusers.ControlNetModel.from_pretrained(str(task.controlnet), **options)
            pipe = diffusers.AutoPipelineForText2Image.from_pretrained(
                str(task.model), controlnet=controlnet, **options
            )
    pipe = pipe.to(task.device)
    pipe.set_progress_bar_config(disable=True)
    if default_sampler(pipe.scheduler.config) != task.sampler:
        pipe.scheduler = getattr(diffusers, resolve(task.sampler).sampler.scheduler).from_config(pipe.scheduler.config)
    for network in (pipe.unet, pipe.vae, *(() if task.controlnet is None else (pipe.controlnet,))):
        network.to(memory_format=torch.channels_last)
    return pipe


def _drawing(pipe: Any, task: Task) -> Draw:
    """A call of diffusers' pipeline."""
    control = {} if task.controlnet is None else {"image": control_picture(task.width, task.height)}

    def draw() -> Any:
        # Ours are drawn in float32; diffusers would draw other numbers in a half precision.
        generators = [torch.Generator().manual_seed(task.seed + i) for i in range(task.num_images_per_prompt)]
        latents = torch.cat([torch.randn(task.latent_shape, generator=generator) for generator in generators])
        return pipe(
            task.prompt,
            negative_prompt=task.negative_prompt or None,
            num_inference_steps=task.num_inference_steps,
            guidance_scale=task.guidance_scale,
            num_images_per_prompt=task.num_images_per_prompt,
            width=task.width,
            height=task.height,
            generator=generators,
            latents=latents.to(task.device, dtype_of(task.dtype)),
            output_type="np",
            **control,
        ).images

    return draw


def serve(draw: Draw, commands: TextIO, replies: TextIO) -> None:
    """Answer the commands until there are no more."""

    def reply(seconds: float) -> None:
        replies.write(json.dumps({"seconds": seconds, "peak_resident_bytes": peak_resident()}) + "\n")
        replies.flush()

    reply(0.0)
    for line in commands:
        command, _, argument = line.strip().partition(" ")
        begin = time.perf_counter()
        images = draw()
        seconds = time.perf_counter() - begin
        if command == "write":
            np.save(argument, images)
        reply(seconds)


def main() -> None:
    """The process."""
    replies = open_replies()
    warnings.simplefilter("ignore")
    task = Task.model_validate_json(sys.stdin.readline())
    torch.set_num_threads(task.threads)
    with ExitStack() as stack:
        draw = PROGRAMS[task.name](task, stack)
        draw()
        serve(draw, sys.stdin, replies)


if __name__ == "__main__":
    main()
