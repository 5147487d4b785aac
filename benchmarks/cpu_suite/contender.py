"""One contender of `cpu_unet.py` in a process of its own: loads a network once, then runs it whenever it is told to.

    python -P benchmarks/cpu_suite/contender.py NAME NETWORK WORK --dtype bfloat16 --batch 1

WORK has `model`, a checkpoint in the diffusers layout, `bundle-DTYPE` of it, and `inputs-BATCH.safetensors`. A line on standard input is a
command, `run`, or `write FILE.npy` for the output of another run; each is answered by a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from ldmrt.bench.memory import peak_resident
from ldmrt.graph import dtype_name, dtype_of

Inputs = Mapping[str, Tensor]
Run = Callable[[], Any]

# The folder of each network's module.
FOLDERS = {"unet": "unet", "decoder": "vae", "text_encoder": "text_encoder"}


class Forward(torch.nn.Module):
    """A module of diffusers or transformers as a function from tensors to a tensor, the inputs in the order of `NAMES`, of which a
    U-Net has the last two only in SDXL.
    """

    NAMES: Mapping[str, tuple[str, ...]] = {
        "unet": ("latents", "timesteps", "encoder_hidden_states", "text_embeds", "time_ids"),
        "decoder": ("latents",),
        "text_encoder": ("input_ids",),
    }

    def __init__(self, module: torch.nn.Module, network: str) -> None:
        super().__init__()
        self.module, self.network = module, network

    def forward(self, *inputs: Tensor) -> Tensor:
        """The network's output."""
        module: Any = self.module
        if self.network == "unet":
            added = dict(zip(self.NAMES["unet"][3:], inputs[3:], strict=False)) or None
            result = module(*inputs[:3], added_cond_kwargs=added, return_dict=False)
        elif self.network == "decoder":
            # What the sampler hands over, as diffusers' pipelines do.
            result = module.decode(inputs[0] / module.config.scaling_factor, return_dict=False)
        else:
            result = module(inputs[0], return_dict=False)
        return result[0]  # type: ignore[no-any-return]


def forward(network: str, work: Path, dtype: torch.dtype) -> Forward:
    """The module of the checkpoint, in a precision, as its users run it on a CPU: channels last."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextModel

    classes: dict[str, Any] = {"unet": UNet2DConditionModel, "decoder": AutoencoderKL, "text_encoder": CLIPTextModel}
    # The text encoder's default attention is torch's own, as the other modules' is.
    module = classes[network].from_pretrained(work / "model" / FOLDERS[network], torch_dtype=dtype)
    return Forward(module.eval().to(memory_format=torch.channels_last), network).eval()


def _typed(network: str, inputs: Inputs, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The inputs in their order, activations in a precision."""
    exact = ("timesteps", "time_ids", "input_ids")
    names = (name for name in Forward.NAMES[network] if name in inputs)
    return tuple(inputs[name] if name in exact else inputs[name].to(dtype) for name in names)


def ldmrt(network: str, work: Path, dtype: torch.dtype, inputs: Inputs) -> Run:
    """The bundle's engines. Of a U-Net all three parts run each time, although two of them need to run once per request only."""
    return _ldmrt(network, work, dtype, inputs, ("context", "schedule", "step"))


def ldmrt_step(network: str, work: Path, dtype: torch.dtype, inputs: Inputs) -> Run:
    """What runs in every step of a request."""
    return _ldmrt(network, work, dtype, inputs, ("step",))


def _ldmrt(network: str, work: Path, dtype: torch.dtype, inputs: Inputs, parts: tuple[str, ...]) -> Run:
    from ldmrt.bundle import Bundle
    from ldmrt.engines.protocol import Engine

    bundle = Bundle.open(work / f"bundle-{dtype_name(dtype)}")
    batch = next(iter(inputs.values())).shape[0]

    def load(component: str) -> Engine:
        # A decoder of one row is what a bundle has, as a picture is decoded at a time.
        records = [r for r in bundle.find(component, kind="torch", dtype=None) if r.rows in (None, batch)]
        return bundle.load(records[0], torch.device("cpu"))

    if network == "unet":
        engines = {name: load(name) for name in ("context", "schedule", "step")}
        values = dict(inputs)
        for name in ("context", "schedule"):
            values |= engines[name].run(_for(engines[name], values))

        def run() -> Tensor:
            found = dict(values)
            for name in parts:
                found |= engines[name].run(_for(engines[name], found))
            return found["model_output"]

        return run
    engine = load(network)
    given = _for(engine, inputs)
    [name] = engine.outputs
    if network == "text_encoder":
        return lambda: engine.run(given)[name][0]  # of the hidden states of all layers the last one's
    return lambda: engine.run(given)[name]


def _for(engine: Any, values: Inputs) -> dict[str, Tensor]:
    """The inputs of an engine, in its precision."""
    return {name: values[name].to(spec.dtype) for name, spec in engine.inputs.items()}


def eager(network: str, work: Path, dtype: torch.dtype, inputs: Inputs) -> Run:
    """torch, operator by operator."""
    module, given = forward(network, work, dtype), _typed(network, inputs, dtype)
    return lambda: module(*given)


def compiled(network: str, work: Path, dtype: torch.dtype, inputs: Inputs) -> Run:
    """torch.compile, with the weights frozen into the program."""
    import torch._inductor.config

    torch._inductor.config.freezing = True
    module = torch.compile(forward(network, work, dtype), fullgraph=True, dynamic=False)
    given = _typed(network, inputs, dtype)
    return lambda: module(*given)


def openvino(network: str, work: Path, dtype: torch.dtype, inputs: Inputs) -> Run:
    """OpenVINO's CPU plugin on the ONNX of the module in float32, computing in the precision asked for."""
    core = import_module("openvino").Core()  # not there where nobody compares
    given = _typed(network, inputs, torch.float32)
    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    model = core.compile_model(core.read_model(_onnx(network, work, given)), "CPU", options)
    request, arrays = model.create_infer_request(), [tensor.numpy() for tensor in given]
    return lambda: request.infer(arrays)[0]


def onnxruntime(network: str, work: Path, dtype: torch.dtype, inputs: Inputs) -> Run:
    """ONNX Runtime's CPU provider, which has no bfloat16."""
    import onnxruntime as ort

    del dtype
    given = _typed(network, inputs, torch.float32)
    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the others' turns are theirs
    session = ort.InferenceSession(_onnx(network, work, given), options, providers=["CPUExecutionProvider"])
    arrays = {each.name: tensor.numpy() for each, tensor in zip(session.get_inputs(), given, strict=True)}
    return lambda: session.run(None, arrays)[0]


def _onnx(network: str, work: Path, given: tuple[Tensor, ...]) -> Path:
    """The module in float32 as ONNX, exported once for a batch size."""
    folder = work / f"onnx-{network}-{given[0].shape[0]}"
    path = folder / "model.onnx"
    if not path.is_file():
        folder.mkdir(exist_ok=True)
        module: Any = forward(network, work, torch.float32)
        module = module.to(memory_format=torch.contiguous_format)
        torch.onnx.export(module, given, folder / "unfinished.onnx", dynamo=True, external_data=True, opset_version=21)
        (folder / "unfinished.onnx").rename(path)
    return path


class StableDiffusionCpp:
    """A step of stable-diffusion.cpp, which makes whole images only: one goes on for as long as it is asked to.

    float16 weights, as it has no kernels of bfloat16 for a CPU; its own text, noise and sampler, so its output is not compared.
    """

    _STEPS = 200

    def __init__(self, work: Path) -> None:
        self._go, self._done, self._over = threading.Semaphore(0), threading.Semaphore(0), False
        self._model = import_module("stable_diffusion_cpp").StableDiffusion(
            model_path=str(work / "original.safetensors"),
            n_threads=torch.get_num_threads(),
            wtype="f16",
            diffusion_flash_attn=True,
            vae_decode_only=True,
        )
        threading.Thread(target=self._generate, daemon=True).start()
        self._wait()  # it reports the beginning as a step

    def __call__(self) -> None:
        """One step."""
        self._go.release()
        self._wait()

    def _wait(self) -> None:
        self._done.acquire()
        if self._over:
            raise RuntimeError("stable-diffusion.cpp stopped; its log says why")

    def _generate(self) -> None:
        options = {"width": 512, "height": 512, "cfg_scale": 1.0, "sample_method": "euler"}
        try:
            self._model.generate_image(
                prompt="a photograph", sample_steps=self._STEPS, progress_callback=self._step, **options
            )
        finally:
            self._over = True
            self._done.release()

    def _step(self, *_progress: object) -> None:
        self._done.release()
        self._go.acquire()


def stable_diffusion_cpp(network: str, work: Path, dtype: torch.dtype, inputs: Inputs) -> Run:
    """stable-diffusion.cpp: the U-Net of one row, with a sampler's step."""
    del dtype
    if network != "unet" or next(iter(inputs.values())).shape[0] != 1:
        raise NotImplementedError("it makes whole images: only a step of one image is timed")
    return StableDiffusionCpp(work)


CONTENDERS: Mapping[str, Callable[[str, Path, torch.dtype, Inputs], Run]] = {
    "ldmrt": ldmrt,
    "ldmrt step": ldmrt_step,
    "torch eager": eager,
    "torch.compile": compiled,
    "OpenVINO": openvino,
    "ONNX Runtime": onnxruntime,
    "stable-diffusion.cpp": stable_diffusion_cpp,
}
# Their outputs cannot be had.
UNCOMPARED = frozenset({"stable-diffusion.cpp"})


def serve(run: Run, replies: TextIO, start: Mapping[str, Any]) -> None:
    """Answer the commands until there are no more."""

    def reply(**figures: Any) -> None:
        replies.write(json.dumps(figures) + "\n")
        replies.flush()

    reply(**start)
    for line in sys.stdin:
        command, _, argument = line.strip().partition(" ")
        begin = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - begin
        if command == "write":
            found = result.float().numpy() if isinstance(result, Tensor) else np.asarray(result, np.float32)
            np.save(argument, found)
        reply(seconds=seconds, peak_resident_bytes=peak_resident())


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(CONTENDERS))
    parser.add_argument("network", choices=sorted(FOLDERS))
    parser.add_argument("work", type=Path)
    parser.add_argument("--dtype", required=True)
    parser.add_argument("--batch", type=int, required=True)
    args = parser.parse_args()
    # Libraries print: what is ours to answer on is put aside, and standard output goes where errors go.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    inputs = load_file(args.work / f"inputs-{args.network}-{args.batch}.safetensors")
    begin = time.perf_counter()
    with torch.inference_mode():
        run = CONTENDERS[args.name](args.network, args.work, dtype_of(args.dtype), inputs)
        run()
        serve(run, replies, {"load_seconds": round(time.perf_counter() - begin, 2)})


if __name__ == "__main__":
    main()
