"""Pickled checkpoints (`.ckpt`, `.pt`, `.pth`, `.bin`) to safetensors: the one place that reads a pickle.

Reading happens in a process of its own, with limits on its memory, time and the size of what it writes, and with torch's restricted
unpickler, which makes tensors and plain containers and refuses whatever else a file asks for, before any of it runs.
"""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ldmrt.errors import BuildError

if TYPE_CHECKING:
    import torch

# Limits of the process that reads, beside what the file's own size adds.
_MEMORY = 16 << 30  # addresses, not pages: torch's libraries alone take several GiB of them
_SECONDS = 120
_NESTED = ("state_dict", "model", "module", "params")
# Averaged weights (EMA) of the original code: the names of the others without their dots.
_NETWORK, _AVERAGED = "model.", "model_ema."


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        tensors: how many.
        nbytes: their size.
        averaged: how many are moving averages (EMA), in the place of the last values.
        left_out: names of what is no tensor, or was replaced by an average.
    """

    tensors: int
    nbytes: int
    averaged: int
    left_out: int


def convert(source: str | Path, target: str | Path, *, averaged: bool = True) -> Converted:
    """Write the tensors of a pickled checkpoint as safetensors.

    Args:
        source: the file that torch.save, or PyTorch Lightning, wrote. Tensors nested in `state_dict` are taken.
        target: the safetensors file to write, whole or not at all.
        averaged: take the moving averages (EMA) of a network's weights where the file has them, in the place of the last values.

    Raises:
        BuildError: the file is missing, asks for more than tensors, holds none, or is damaged; nothing is written then.
    """
    source, target = Path(source), Path(target)
    if target.suffix != ".safetensors":
        raise BuildError(f"{target} is to hold safetensors; name it {target.with_suffix('.safetensors')}")
    if not source.is_file():
        raise BuildError(f"no such file: {source}; give a checkpoint (.ckpt, .pt, .pth or .bin)")
    if source.suffix == ".safetensors":
        raise BuildError(f"{source} is safetensors already; build from it: ldmrt build-engines {source} --out DIR")
    try:
        with tempfile.TemporaryDirectory(prefix=".ldmrt-", dir=target.parent) as folder:
            written = Path(folder) / target.name
            answer = _in_a_process_of_its_own(source, written, averaged=averaged)
            written.replace(target)
    except OSError as error:
        raise BuildError(
            f"cannot write {target}: {error.strerror or error}; make room, or choose another place"
        ) from error
    return Converted(**answer)


def _in_a_process_of_its_own(source: Path, written: Path, *, averaged: bool) -> dict[str, int]:
    """What the process answers.

    Raises:
        BuildError: it refused, or it ended otherwise.
    """
    # -P: a folder with a torch.py in it is no reason to import that.
    command = [sys.executable, "-P", "-m", "ldmrt.export.convert", str(source), str(written), str(int(averaged))]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    lines = done.stdout.splitlines()
    answer: dict[str, Any] = json.loads(lines[-1]) if lines and lines[-1].startswith("{") else {}
    if done.returncode == 0 and "tensors" in answer:
        return {name: int(answer[name]) for name in ("tensors", "nbytes", "averaged", "left_out")}
    if "error" in answer:
        raise BuildError(str(answer["error"]))
    if done.returncode < 0:
        ended = signal.Signals(-done.returncode).name
        raise BuildError(
            f"{source} was being read for too long, or took too much memory, and that was stopped ({ended}); nothing was written: take its "
            "safetensors version"
        )
    reason = " ".join(done.stderr.split())[-200:] or f"exit code {done.returncode}"
    raise BuildError(f"{source} cannot be read ({reason}); copy it again, or take its safetensors version")


# ---------------------------------------------------------------------------------------------------- in the process


class ModelCheckpoint:
    """Stands for the class of PyTorch Lightning whose name is a key in checkpoints of its first versions; nothing is made of it."""


class ParameterDict:
    """Stands for torch's class of that name, which the first textual inversions are in; its contents are taken from what it was made of."""


def _main(source: Path, written: Path, *, averaged: bool) -> None:
    """Read, write, and print an answer as one line of JSON."""
    _limit(source.stat().st_size)
    try:
        answer = vars(_convert(source, written, averaged=averaged))
    except BuildError as error:
        answer = {"error": str(error)}
    except MemoryError:
        answer = {"error": f"{source} needs more memory than is allowed for reading it; take its safetensors version"}
    sys.stdout.write(json.dumps(answer) + "\n")


def _limit(size: int) -> None:
    """Limit this process for reading a file of a size in bytes."""
    limits = {
        resource.RLIMIT_AS: _MEMORY + 4 * size,
        resource.RLIMIT_CPU: _SECONDS + size // (50 << 20),
        resource.RLIMIT_FSIZE: size + (64 << 20),
        resource.RLIMIT_CORE: 0,
    }
    for what, most in limits.items():
        _, hard = resource.getrlimit(what)
        limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (limit, limit))
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # an error to be told, not the end of the process


def _convert(source: Path, written: Path, *, averaged: bool) -> Converted:
    from ldmrt.engines.protocol import TensorSpec
    from ldmrt.weights import write

    held = _embedding(_nested(_read(source)))
    tensors = _tensors(source, held)
    averages = _averages(tensors) if averaged else {}
    kept = {name: averages.get(name, tensor) for name, tensor in tensors.items() if not name.startswith(_AVERAGED)}
    specs = [TensorSpec(name, tuple(tensor.shape), tensor.dtype) for name, tensor in kept.items()]
    nbytes = sum(tensor.nbytes for tensor in kept.values())
    try:
        write(written, specs, kept.__getitem__)
    except OSError as error:
        raise BuildError(
            f"{source} cannot be converted: {error.strerror or error} after {nbytes} bytes were asked for; make room, or take its "
            "safetensors version"
        ) from error
    return Converted(len(kept), nbytes, len(averages), len(held) - len(kept))


def _read(source: Path) -> Any:
    """What the file holds.

    Raises:
        BuildError: it asks for more than tensors and plain containers, or is damaged.
    """
    import pickle
    import zipfile

    import torch

    torch.serialization.add_safe_globals(
        [
            (ModelCheckpoint, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
            (ParameterDict, "torch.nn.modules.container.ParameterDict"),
        ]
    )
    try:
        # Only files of torch 1.6 and later are archives, which can be mapped.
        return torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
    except pickle.UnpicklingError as error:
        asked = _asked_for(str(error))
        raise BuildError(
            f"{source} {asked}: refused, and none of it was run; ask its author for safetensors, or for the tensors alone"
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # whatever torch makes of a file that is none of its own
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise BuildError(f"{source} is no checkpoint that torch reads ({reason}); copy it again") from error


def _asked_for(message: str) -> str:
    """What torch refused, in few words."""
    import re

    found = re.search(r"Unsupported (?:global: GLOBAL|class) ([\w.]+)|(?:instantiate|call|GLOBAL) ([\w.]+)", message)
    if found is None:
        return "holds more than tensors"
    return f"asks for {found[1] or found[2]}, which is more than tensors"


def _nested(held: Any) -> Any:
    """The innermost of the dictionaries that programs put around the tensors."""
    while isinstance(held, Mapping):
        inner = next((held[name] for name in _NESTED if isinstance(held.get(name), Mapping)), None)
        if inner is None:
            break
        held = inner
    return held


def _embedding(held: Any) -> Any:
    """A textual inversion of AUTOMATIC1111's as its safetensors files have it; anything else as it is."""
    inner = held.get("string_to_param") if isinstance(held, Mapping) else None
    if isinstance(inner, ParameterDict):
        inner = vars(inner).get("_parameters")
    return {"emb_params": inner["*"]} if isinstance(inner, Mapping) and "*" in inner else held


def _tensors(source: Path, held: Any) -> dict[str, torch.Tensor]:
    """The tensors by name.

    Raises:
        BuildError: there are none, or some that safetensors does not hold, or that claim to be larger than the file.
    """
    import torch

    from ldmrt.weights import DTYPES

    named = held.items() if isinstance(held, Mapping) else ()
    found = {str(name): tensor.detach() for name, tensor in named if isinstance(tensor, torch.Tensor)}
    if not found:
        some = ", ".join(map(str, held))[:80] if isinstance(held, Mapping) else type(held).__name__
        raise BuildError(f"{source} holds no tensors by name (found: {some}); give the checkpoint of a model")
    for name, tensor in found.items():
        if tensor.layout is not torch.strided or tensor.is_quantized or tensor.dtype not in DTYPES.values():
            raise BuildError(
                f"{source}: {name} is {tensor.layout} {tensor.dtype}, expected one of {', '.join(DTYPES)}; take its float16 or float32 version"
            )
    claimed, size = sum(tensor.nbytes for tensor in found.values()), source.stat().st_size
    if claimed > size + (64 << 20):
        raise BuildError(
            f"{source} has {size} bytes, its tensors claim {claimed}; it is no ordinary checkpoint: take its safetensors version"
        )
    return found


def _averages(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The averages of a network's weights by the weights' names; none unless every weight has one."""
    names = {
        name: _AVERAGED + name.removeprefix(_NETWORK).replace(".", "") for name in tensors if name.startswith(_NETWORK)
    }
    averages = {name: tensors[average] for name, average in names.items() if average in tensors}
    complete = set(averages) == set(names) and all(averages[n].shape == tensors[n].shape for n in averages)
    return averages if complete else {}


if __name__ == "__main__":
    _main(Path(sys.argv[1]), Path(sys.argv[2]), averaged=sys.argv[3] == "1")
