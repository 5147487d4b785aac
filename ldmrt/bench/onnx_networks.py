"""The U-Net and the decoder of a diffusers pipeline, run by a library that reads ONNX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[Any]
# Opens an ONNX file: a function from the inputs in order to the output.
Open = Callable[[Path], Callable[[Sequence[Array]], Array]]


class _UNet(torch.nn.Module):
    """A U-Net as a function of tensors alone."""

    def __init__(self, unet: torch.nn.Module, added: Sequence[str]) -> None:
        super().__init__()
        self.unet, self.added = unet, tuple(added)

    def forward(self, latents: Tensor, timestep: Tensor, states: Tensor, *added: Tensor) -> Tensor:
        given = dict(zip(self.added, added, strict=True)) or None
        return self.unet(latents, timestep, states, added_cond_kwargs=given, return_dict=False)[0]  # type: ignore[no-any-return]


class _Decoder(torch.nn.Module):
    """A VAE's decoder as a function of tensors alone."""

    def __init__(self, vae: torch.nn.Module) -> None:
        super().__init__()
        self.vae: Any = vae

    def forward(self, latents: Tensor) -> Tensor:
        return self.vae.decode(latents, return_dict=False)[0]  # type: ignore[no-any-return]


class _Elsewhere:
    """Modules that a library runs, exported and opened when tensors of a shape first come."""

    def __init__(self, open_: Open, folder: Path) -> None:
        self._open, self._folder = open_, folder
        self._opened: dict[tuple[torch.Size, ...], Callable[[Sequence[Array]], Array]] = {}

    def __call__(self, module: torch.nn.Module, *tensors: Tensor) -> Tensor:
        shapes = tuple(tensor.shape for tensor in tensors)
        if shapes not in self._opened:
            path = self._folder / str(len(self._opened)) / "model.onnx"
            path.parent.mkdir(parents=True)
            torch.onnx.export(
                module.eval(), tensors, path, dynamo=True, external_data=True, opset_version=21, verbose=False
            )
            self._opened[shapes] = self._open(path)
        return torch.from_numpy(self._opened[shapes]([tensor.numpy() for tensor in tensors]))


class _Shim:
    """Stands where a pipeline has a module: what is not exchanged is the module's."""

    def __init__(self, module: Any, run: _Elsewhere) -> None:
        self._module, self._run = module, run

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class _UNetShim(_Shim):
    def __call__(
        self, latents: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, added_cond_kwargs: Any = None, **_: Any
    ) -> tuple[Tensor]:
        added = added_cond_kwargs or {}
        module = _UNet(self._module, [*added])
        return (self._run(module, latents, timestep, encoder_hidden_states, *added.values()),)


class _VaeShim(_Shim):
    def decode(self, latents: Tensor, **_: Any) -> tuple[Tensor]:
        return (self._run(_Decoder(self._module), latents),)


def exchange(pipe: Any, open_: Open, folder: Path) -> None:
    """Let a library run the two networks of a pipeline in float32 on the CPU.

    Args:
        pipe: of diffusers.
        open_: opens an ONNX file.
        folder: for the ONNX files, which must stay as long as the pipeline draws.
    """
    pipe.unet = _UNetShim(pipe.unet, _Elsewhere(open_, folder / "unet"))
    pipe.vae = _VaeShim(pipe.vae, _Elsewhere(open_, folder / "decoder"))


def open_onnxruntime(path: Path) -> Callable[[Sequence[Array]], Array]:
    """ONNX Runtime's CPU provider."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # the others' turns are theirs
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    return lambda arrays: session.run(None, dict(zip(names, arrays, strict=True)))[0]


def open_openvino(path: Path, dtype: torch.dtype) -> Callable[[Sequence[Array]], Array]:
    """OpenVINO's CPU plugin, computing in a precision."""
    core = import_module("openvino").Core()  # not there where nobody compares
    options = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = core.compile_model(core.read_model(path), "CPU", options).create_infer_request()
    return lambda arrays: request.infer(list(arrays))[0].copy()
