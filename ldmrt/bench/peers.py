"""Other programs on the same weights: compared first, then timed in turn with ours."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO, cast

import numpy as np
import torch

from ldmrt.bench.intervals import median_of_ratios
from ldmrt.bench.peer import SD_CPP
from ldmrt.bench.report import Peer, Series
from ldmrt.errors import BadRequest, LdmrtError
from ldmrt.pipeline import Pipeline
from ldmrt.samplers.make import sampler_table
from ldmrt.samplers.table import SamplerTable

# Each with the packages that it needs, and how to install them.
PEERS = {
    "diffusers": (("diffusers", "transformers"), "'ldmrt[export]'"),
    "torch.compile": (("diffusers", "transformers"), "'ldmrt[export]'"),
    "onnxruntime": (("diffusers", "transformers", "onnxscript", "onnxruntime"), "'ldmrt[export,onnxruntime]'"),
    "openvino": (("diffusers", "transformers", "onnxscript", "openvino"), "'ldmrt[export]' openvino"),
    SD_CPP: (("stable_diffusion_cpp",), "stable-diffusion-cpp-python"),
}
_ON_CPU_ALONE = ("onnxruntime", "openvino", SD_CPP)
# Samplers that are Euler's method in the noise levels, which is all that a list of them can say.
_OF_LEVELS = ("ddim", "euler")
# Pictures less alike than this, in dB, are of different computations. Half precisions part further over the steps of a loop.
_ALIKE = {"float32": 40.0, "bfloat16": 20.0, "float16": 20.0}


def check_peers(
    names: Sequence[str], model: Path | None, pipe: Pipeline, *, sampler: str, controlled: bool = False
) -> None:
    """Check that other programs can draw what a pipeline draws.

    Args:
        names: of `PEERS`.
        model: the folder that the bundle was built from, if that is known.
        pipe: ours.
        sampler: of the case, by its name in `ldmrt.samplers.registry`.
        controlled: whether a ControlNet steers it.

    Raises:
        BadRequest: one cannot.
    """
    record = pipe.bundle.manifest.model
    for name in names:
        if name not in PEERS:
            raise BadRequest(f"--against is {name!r}, expected {', '.join(PEERS)}", param="against")
        packages, install = PEERS[name]
        missing = [package for package in packages if importlib.util.find_spec(package) is None]
        if missing:
            raise BadRequest(
                f"--against {name} needs {', '.join(missing)}, which is not installed: pip install {install}",
                param="against",
            )
        if name in _ON_CPU_ALONE and pipe.device.type != "cpu":
            raise BadRequest(
                f"--against {name} is compared on a CPU, not on {pipe.device}: use --device cpu", param="against"
            )
        if controlled and name in _ON_CPU_ALONE:
            raise BadRequest(
                f"--against {name} is compared without ControlNets: choose diffusers or torch.compile", param="against"
            )
        if name == SD_CPP and sampler not in _OF_LEVELS:
            raise BadRequest(
                f"--against {name} is compared with the samplers {' and '.join(_OF_LEVELS)}, and this is {sampler}: add --sampler ddim",
                param="against",
            )
        if name == SD_CPP and (tuple(record.tokenizers) != ("text_encoder",) or record.kind != "stable-diffusion"):
            raise BadRequest(
                f"--against {name} is for Stable Diffusion 1.x, and this is {record.kind}", param="against"
            )
        if not record.tokenizers:
            raise BadRequest(f"--against {name} is for models that read a text, and this one does not", param="against")
        if model is None:
            raise BadRequest(
                f"--against {name} needs the model that {pipe.bundle.path} was built from, in the diffusers layout: "
                "give its folder as --engines",
                param="against",
            )


def beside(
    name: str,
    model: Path,
    pipe: Pipeline,
    request: dict[str, Any],
    label: str,
    *,
    runs: int,
    controlnet: Path | None = None,
) -> Peer:
    """Time another program, in a process of its own, and ours in turn: from a prompt to pixels in memory.

    Args:
        name: one of `PEERS`.
        model: the folder in the diffusers layout that the bundle was built from.
        pipe: ours.
        request: our arguments.
        label: of the case.
        runs: of each.
        controlnet: the folder of the ControlNet that steers both.

    Raises:
        LdmrtError: it failed, or the pictures are not the same, so that their times mean nothing.
    """
    start = _start(name, pipe, request)

    def ours() -> Any:
        return pipe(**request, latents=start, output_type="np").images

    with (
        tempfile.TemporaryDirectory() as folder,
        process(name, model, pipe, request, Path(folder), controlnet=controlnet) as peer,
    ):
        theirs = Path(folder) / "theirs.npy"
        peer.ask(f"write {theirs}")
        alike = psnr(ours(), np.load(theirs))
        if not alike >= _ALIKE[pipe.dtype]:
            raise LdmrtError(
                f"the pictures of ldmrt and {name} differ: PSNR {alike:.1f} dB, expected {_ALIKE[pipe.dtype]:.0f} or more in "
                f"{pipe.dtype}; their times are not compared: use --dtype float32, or the folder that the bundle was built from"
            )
        seconds = in_turn(lambda: _seconds(ours), lambda: peer.ask("draw"), runs=runs)
        return Peer(
            name=name,
            label=label,
            dtype=_precision(name, pipe.dtype),
            psnr=round(alike, 2),
            setup_seconds=peer.setup_seconds,
            # Those that are exported first would answer with the memory of that.
            peak_resident_bytes=None if name in _ON_CPU_ALONE else peer.peak_resident_bytes,
            ours_seconds=Series(samples=seconds[0]),
            theirs_seconds=Series(samples=seconds[1]),
            times_faster=median_of_ratios(seconds[1], seconds[0]),
        )


def _precision(name: str, dtype: str) -> str:
    """What another program computes in, where ours does in `dtype`."""
    if name == SD_CPP:
        return "float32" if dtype == "float32" else "float16"
    return "float32" if name == "onnxruntime" else dtype


def _table(pipe: Pipeline, request: dict[str, Any]) -> SamplerTable:
    return sampler_table(request["sampler"], pipe.schedule, request["num_inference_steps"])


def _levels(pipe: Pipeline, request: dict[str, Any]) -> tuple[float, ...]:
    """The noise at the beginning of every step over the picture in it, and at the end of the last, where DDIM may leave some."""
    *levels, last = (float(noise / picture) for picture, noise in _table(pipe, request).levels)
    end = (1 / pipe.schedule.final_alpha_cumprod - 1) ** 0.5 if request["sampler"] == "ddim" else last
    return (*levels, end)


def _start(name: str, pipe: Pipeline, request: dict[str, Any]) -> torch.Tensor | None:
    """What ours is to begin from so that both begin alike, (n, C, h, w); None where they do so by themselves. stable-diffusion.cpp begins
    with noise of the first level's deviation, diffusers and we with that of all there is at that level.
    """
    if name != SD_CPP:
        return None
    table = _table(pipe, request)
    scale = float(table.levels[0, 1]) / table.initial_noise_scale
    seeds = range(request["seed"], request["seed"] + request["num_images_per_prompt"])
    shape = latent_shape(pipe, request)
    return torch.cat([scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])


def latent_shape(pipe: Pipeline, request: dict[str, Any]) -> tuple[int, int, int, int]:
    """(1, C, h, w) of one image."""
    model = pipe.bundle.manifest.model
    return 1, model.latent_channels, request["height"] // model.downscale, request["width"] // model.downscale


def in_turn(
    ours: Callable[[], float], theirs: Callable[[], float], *, runs: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds of both, one run of each in a round, the order reversed in every other; a round before those that count.

    Args:
        ours: runs once, and gives its seconds.
        theirs: the same.
        runs: rounds that count.
    """
    found: tuple[list[float], list[float]] = ([], [])
    for number in range(-1, runs):
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            seconds = (ours, theirs)[which]()
            if number >= 0:
                found[which].append(seconds)
    return tuple(found[0]), tuple(found[1])


def psnr(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> float:
    """Peak signal-to-noise ratio in dB of the picture that differs most, at most 120.

    Args:
        found: (n, H, W, 3) in [0, 1].
        expected: the same.
    """
    squares = ((found.astype(np.float64) - expected) ** 2).mean(axis=(1, 2, 3)).max()
    return float(-10 * np.log10(max(squares, 1e-12)))


class Process:
    """A program that draws on demand (`ldmrt.bench.peer`).

    Attributes:
        setup_seconds: from its start until it had drawn once.
        peak_resident_bytes: the most memory it has had.
    """

    def __init__(self, name: str, child: subprocess.Popen[str], log: Path, task: str) -> None:
        self._name, self._child, self._log = name, child, log
        self._commands, self._replies = cast("TextIO", child.stdin), cast("TextIO", child.stdout)
        start = time.perf_counter()
        self.peak_resident_bytes = 0
        self.ask(task)
        self.setup_seconds = time.perf_counter() - start

    def ask(self, command: str) -> float:
        """Send a command, and wait for the seconds that it took.

        Raises:
            LdmrtError: the process has ended.
        """
        try:
            self._commands.write(command + "\n")
            self._commands.flush()
            line = self._replies.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            last = [each for each in self._log.read_text(errors="replace").splitlines() if each.strip()][-1:]
            raise LdmrtError(f"{self._name} stopped with exit code {self._child.wait()}: {' '.join(last)[:300]}")
        answer: dict[str, Any] = json.loads(line)
        self.peak_resident_bytes = int(answer["peak_resident_bytes"])
        return float(answer["seconds"])


@contextmanager
def process(
    name: str, model: Path, pipe: Pipeline, request: dict[str, Any], folder: Path, *, controlnet: Path | None = None
) -> Iterator[Process]:
    """Another program, loaded, until the end of the block.

    Raises:
        LdmrtError: it failed.
    """
    task = {
        **{key: value for key, value in request.items() if key != "control_image"},  # a peer draws it again
        "name": name,
        "model": str(model),
        "controlnet": None if controlnet is None else str(controlnet),
        "device": str(pipe.device),
        "dtype": pipe.dtype,
        "threads": torch.get_num_threads(),
        "latent_shape": latent_shape(pipe, request),
        "sigmas": _levels(pipe, request) if name == SD_CPP else (),
    }
    log = folder / "log"
    with log.open("w") as errors:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "ldmrt.bench.peer"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    with child:
        try:
            yield Process(name, child, log, json.dumps(task))
        finally:
            child.kill()


def _seconds(draw: Callable[[], object]) -> float:
    start = time.perf_counter()
    draw()
    return time.perf_counter() - start
