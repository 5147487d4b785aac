"""Hostile files: bundles, graphs, weights, tokenizers, LoRAs and models that are almost what they should be, each opened in a process of its own.

What is opened ends well, or with one of the project's own errors, in one line. Whatever else is a finding: another exception, a crash, more memory or time than it
was given, a file outside of its folder that is read or written, a program that is run, a connection. A case is made of its kind and a number.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image

import hostile_graphs
import ldmrt
from damage import changed, damaged, tensors, text
from fuzz_http import PICTURES
from ldmrt.bundle import Bundle
from ldmrt.conditioning import open_picture, read as read_picture
from ldmrt.engines.torch import TorchEngine
from ldmrt.errors import LdmrtError
from ldmrt.export import architectures, original_config
from ldmrt.export.source import Checkpoint, Source
from ldmrt.graph import MAX_ELEMENTS
from ldmrt.image import read_parameters
from ldmrt.kernels import aot
from ldmrt.kernels.variant import Variant
from ldmrt.lora import Lora
from ldmrt.manifest import MANIFEST, FileRecord
from ldmrt.opening import builtin_bundle
from ldmrt.pipeline import Pipeline
from ldmrt.schedule import NoiseSchedule
from ldmrt.textual_inversion import TextualInversion
from ldmrt.tokenizer import Tokenizer
from ldmrt.verify import read_trials
from ldmrt.weights import WeightFile, sha256

MEMORY = 1 << 30  # bytes beyond what the process has when it begins
SECONDS = 20
_CPU = torch.device("cpu")
_LONGEST = 2500  # characters of an error
_TOGETHER = 20  # cases of a process: making one takes longer than most cases


class Finding(NamedTuple):
    """Something that should not have happened: the case, and what it was."""

    kind: str
    seed: int
    what: str


@dataclass(frozen=True)
class Kind:
    """Something hostile.

    Attributes:
        make: writes it into an empty folder.
        use: opens it, and uses what it holds.
        builds: whether that is the compiler's, which may import what the runtime must not.
    """

    make: Callable[[random.Random, Path], object]
    use: Callable[[Path], object]
    builds: bool = False


# ---------------------------------------------------------------------------------------------------- bundles

# A copy, whose files the cases share by links.
_WORK = Path(tempfile.mkdtemp(prefix="ldmrt-fuzz-"))
atexit.register(shutil.rmtree, _WORK, ignore_errors=True)
_BUNDLE = Path(shutil.copytree(builtin_bundle(), _WORK / "shapes"))
_MANIFEST: dict[str, Any] = json.loads((_BUNDLE / MANIFEST).read_text(encoding="utf-8"))
_OUTLINES = Path(str(ldmrt.companion("outlines")))


def _copy(folder: Path, source: Path = _BUNDLE) -> None:
    """A folder as another one, over the same bytes."""
    for path in source.rglob("*"):
        target = folder / path.relative_to(source)
        if path.is_dir():
            target.mkdir(parents=True, exist_ok=True)
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)


def _replace(path: Path, data: bytes) -> None:
    path.unlink(missing_ok=True)
    path.write_bytes(data)


def _forged(folder: Path, manifest: dict[str, Any], file: str, data: bytes) -> None:
    """Put other bytes in the place of a file, and their hash into the manifest."""
    _replace(folder / file, data)
    digest = hashlib.sha256(data).hexdigest()

    def visit(value: Any) -> None:
        if isinstance(value, dict):
            if value.get("file") == file:
                value["sha256"] = digest
            for item in value.values():
                visit(item)
        elif isinstance(value, list):
            for item in value:
                visit(item)

    visit(manifest)
    _replace(folder / MANIFEST, json.dumps(manifest).encode())


def _manifest(draw: random.Random, folder: Path) -> None:
    _copy(folder)
    data = (_BUNDLE / MANIFEST).read_bytes()
    _replace(folder / MANIFEST, damaged(draw, data) if draw.random() < 0.1 else text(draw, changed(draw, _MANIFEST)))


def _model(draw: random.Random, folder: Path) -> None:
    """The manifest's description of the model, of which little may be wrong before it is refused."""
    _copy(folder)
    manifest = json.loads(json.dumps(_MANIFEST))
    manifest["model"] = changed(draw, manifest["model"], times=1)
    _replace(folder / MANIFEST, json.dumps(manifest).encode())


def _records(component: str | None = None) -> list[dict[str, Any]]:
    return [one for one in _MANIFEST["engines"] if component in (None, one["component"])]


def _graph(draw: random.Random, folder: Path) -> None:
    """One engine's graph; its name is left where the case is used."""
    record = draw.choice(_records())
    file = record["files"][0]["file"]
    data = (_BUNDLE / file).read_bytes()
    graph = json.loads(data)
    if draw.random() < 0.05:
        data = damaged(draw, data)
    else:
        hostile_graphs.damage(draw, graph)
        data = text(draw, changed(draw, graph, times=1) if draw.random() < 0.2 else graph)
    _engine(folder, record, data)


def _kernel(draw: random.Random, folder: Path) -> None:
    """A graph of a few operators, whose shapes and arguments fit together almost: what reaches the native bodies."""
    _engine(folder, draw.choice(_records()), json.dumps(hostile_graphs.drawn(draw)).encode())


def _engine(folder: Path, record: dict[str, Any], data: bytes) -> None:
    _copy(folder)
    _forged(folder, json.loads(json.dumps(_MANIFEST)), record["files"][0]["file"], data)
    (folder.parent / f"{folder.name}.engine").write_text(str(_MANIFEST["engines"].index(record)), encoding="utf-8")


def _weights(draw: random.Random, folder: Path) -> None:
    """One weight file, or an engine's constants."""
    files = [record["file"] for record in _MANIFEST["weights"].values()]
    files += [extra["file"] for engine in _MANIFEST["engines"] for extra in engine["files"][1:]]
    file = draw.choice(files)
    _copy(folder)
    _forged(folder, json.loads(json.dumps(_MANIFEST)), file, tensors(draw, (_BUNDLE / file).read_bytes()))


def _tokenizer(draw: random.Random, folder: Path) -> None:
    _copy(folder, _BUNDLE / "tokenizer")
    settings = {
        "tokenizer_config.json": {"model_max_length": 77, "bos_token": "<|startoftext|>", "added_tokens_decoder": {"3": {"content": "a", "special": True}}},
        "special_tokens_map.json": {"bos_token": {"content": "<|startoftext|>"}, "unk_token": "<|endoftext|>"},
        "added_tokens.json": {"<|startoftext|>": 0},
        "tokenizer.json": {"model": {"type": draw.choice(("BPE", "WordPiece")), "vocab": {"a": 0, "b</w>": 1, "ab</w>": 2, "<|startoftext|>": 3, "<|endoftext|>": 4}, "merges": ["a b</w>"]}, "added_tokens": [{"id": 1, "content": "x"}]},
    }  # fmt: skip
    for name, value in settings.items():
        if draw.random() < 0.3:
            _replace(folder / name, text(draw, changed(draw, value)))
    if draw.random() < 0.15:
        (folder / "vocab.txt").write_bytes(damaged(draw, b"[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na\nb\n##c\n"))
    present = [path for path in sorted(folder.iterdir()) if path.is_file()]
    for path in draw.sample(present, draw.choice((0, 1, 1, 2))):
        data = path.read_bytes()
        if path.suffix == ".json" and draw.random() < 0.7:
            data = text(draw, changed(draw, json.loads(data))) if _is_json(data) else data
        else:
            data = damaged(draw, data)
        _replace(path, data)
    if draw.random() < 0.1:
        (folder / "vocab.json").unlink(missing_ok=True)


def _is_json(data: bytes) -> bool:
    try:
        json.loads(data)
    except ValueError:
        return False
    return True


def _lora(draw: random.Random, folder: Path) -> None:
    (folder / "a.safetensors").write_bytes(tensors(draw, _OUTLINES.read_bytes()))


def _adapter(draw: random.Random, folder: Path) -> None:
    """A small LoRA with everything that such a file may have."""
    name = "unet.down_blocks.0.resnets.0.conv1"
    entries = {
        f"{name}.lora_A.weight": [2, 64, 1, 1],
        f"{name}.lora_B.weight": [64, 2, 1, 1],
        f"{name}.lora_mid.weight": [2, 2, 3, 3],
        f"{name}.alpha": [1],
    }
    metadata = {
        "lora_adapter_metadata": json.dumps(
            changed(draw, {"unet.lora_alpha": 4, "unet.use_rslora": True, "unet.alpha_pattern": {"^a": 2}})
        )
    }
    _written(folder / "a.safetensors", draw, entries, metadata)


def _inversion(draw: random.Random, folder: Path) -> None:
    _written(folder / "a.safetensors", draw, {draw.choice(("emb_params", "<word>", "clip_l", "\n", "")): [2, 64]}, {})


def _written(path: Path, draw: random.Random, shapes: dict[str, list[int]], metadata: dict[str, str]) -> None:
    """A safetensors file of small random tensors, changed."""
    table: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, sides in shapes.items():
        dtype = draw.choice(("F32",) * 12 + ("F16", "BF16", "I64", "BOOL"))
        shape = list(sides)
        if draw.random() < 0.3:
            shape = [draw.choice((side, side, 0, 1, side + 1)) for side in sides][: draw.choice((4, 4, 1, 0))]
        size = {"F32": 4, "F16": 2, "BF16": 2, "I64": 8, "BOOL": 1}[dtype]
        for side in shape:
            size *= side
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    header = json.dumps(table).encode()
    data = len(header).to_bytes(8, "little") + header + draw.randbytes(at)
    path.write_bytes(tensors(draw, data) if draw.random() < 0.5 else data)


def _kernels(draw: random.Random, folder: Path) -> None:
    """Compiled kernels as `ldmrt build-engines --target` writes them, of code that is none."""
    variant = Variant(
        "geglu.forward",
        ("*fp32", "*fp32", "i32"),
        (True, True, False),
        (("ROWS", 4), ("WIDTH", 8)),
        4,
        1,
        fp_fusion=True,
    )
    cubin = aot.Cubin(variant, 90, "3.7.1", "0" * 64, "forward", 128, 0, (8, 8, 4, 8), 32, 0, b"\x7fELF" + bytes(60))
    aot.write(folder, [cubin])
    for path in draw.sample(sorted(folder.iterdir()), draw.choice((1, 1, 2))):
        data = path.read_bytes()
        _replace(
            path,
            text(draw, changed(draw, json.loads(data)))
            if path.suffix == ".json" and draw.random() < 0.8
            else damaged(draw, data),
        )


def _read_kernels(folder: Path) -> None:
    files = [FileRecord(file=path.name, sha256=sha256(path)) for path in folder.iterdir()]
    Bundle(folder, Bundle.open(_BUNDLE).manifest.model_copy(update={"kernels": tuple(files)})).cubins()


def _trials(draw: random.Random, folder: Path) -> None:
    _written(
        folder / "a.safetensors",
        draw,
        {"random.inputs.x": [2], "random.outputs.y": [2], draw.choice(("real.inputs", "x", "a.inputs.\n")): [1]},
        {},
    )


def _schedule(draw: random.Random, folder: Path) -> None:
    (folder / "schedule.json").write_text(
        json.dumps(changed(draw, {"kind": draw.choice(("config", "dict")), "values": _MANIFEST["model"]["schedule"]})),
        encoding="utf-8",
    )


def _diffusers(draw: random.Random, folder: Path) -> None:
    """A model's folder, of which configs and indices lie."""
    _copy(folder)
    files = [
        "model_index.json",
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "ldmrt-defaults.json",
    ]
    for file in draw.sample(files, draw.choice((1, 1, 2))):
        data = (_BUNDLE / file).read_bytes()
        _replace(
            folder / file, damaged(draw, data) if draw.random() < 0.1 else text(draw, changed(draw, json.loads(data)))
        )


def _original(draw: random.Random, folder: Path) -> None:
    """A YAML file of the original code."""
    plain = "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n    linear_start: 0.001\n    timesteps: 1000\n    unet_config:\n      target: x\n      params: {a: [1, 2]}\n"
    bomb = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{chr(98 + i)}: &{chr(98 + i)} [{','.join([f'*{chr(97 + i)}'] * 9)}]\n" for i in range(9)
    )
    odd = (
        "model: !!python/object/apply:os.system [id]\n",
        bomb,
        "model: &m {params: *m}\n",
        "? [a]\n: b\n",
        "model: 2001-99-99\n",
        "model:\n  params: {1: 2}\n",
    )
    (folder / "a.yaml").write_bytes(damaged(draw, draw.choice((plain, plain, *odd)).encode()))


def _picture(draw: random.Random, folder: Path) -> None:
    data = draw.choice(PICTURES)
    (folder / "a.png").write_bytes(damaged(draw, data) if data else data)


# ---------------------------------------------------------------------------------------------------- using


def _draw(folder: Path) -> None:
    Pipeline.from_bundle(folder, "cpu")("a red circle", num_inference_steps=1, seed=0)


def _run(folder: Path) -> None:
    """Load the engine that was changed, and run it on inputs of its own shapes."""
    bundle = Bundle.open(folder)
    number = int((folder.parent / f"{folder.name}.engine").read_text(encoding="utf-8"))
    record = bundle.manifest.engines[number]
    # `Bundle.load` refuses an engine without the inputs of its kind; here it is what runs that counts.
    engine = TorchEngine(bundle.graph(record), bundle.parameters(record.weights, _CPU), _CPU)
    inputs = {}
    for name, spec in engine.inputs.items():
        shape = [size if isinstance(size, int) else 2 for size in spec.shape]
        count = 1
        for size in shape:
            count *= size
        if count > MAX_ELEMENTS >> 12:
            return
        inputs[name] = torch.ones(shape, dtype=spec.dtype)
    engine.run(inputs)


def _read_weights(folder: Path) -> None:
    bundle = Bundle.open(folder)
    for record in (
        *bundle.manifest.weights.values(),
        *(extra for engine in bundle.manifest.engines for extra in engine.files[1:]),
    ):
        for tensor in WeightFile(bundle.checked(record)).values():
            tensor.float().sum()


def _tokenize(folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(folder)
    tokenizer.words = {"<word>": (1, 2)}
    tokenizer.windows("a red circle, (left) of <word> ﬃ 💥" * 20, 3)


def _shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    bundle = Bundle.open(_BUNDLE)
    return {name.partition(".")[0]: bundle.shapes(name) for name in bundle.manifest.weights}


_SHAPES = _shapes()


def _add_lora(folder: Path) -> None:
    for component, layers in Lora.read(folder / "a.safetensors", _SHAPES).layers.items():
        for name, layer in layers.items():
            layer.on(_CPU).add_to(torch.zeros(_SHAPES[component][name]), 0.5)


def _make_schedule(folder: Path) -> None:
    data = json.loads((folder / "schedule.json").read_text(encoding="utf-8"))
    kind, values = (data.get("kind"), data.get("values")) if isinstance(data, dict) else (None, None)
    if isinstance(values, dict):
        _ = (NoiseSchedule.from_config if kind == "config" else NoiseSchedule.from_dict)(values).sigmas


def _match(folder: Path) -> None:
    """What a build does before it computes: the configs become modules, and the weights are matched with them."""
    source = Source.open(folder)
    for component in source.folders:
        Checkpoint(source, component, architectures.instantiate(source, component))
    NoiseSchedule.from_config(source.configs["scheduler"])
    _ = source.sampler, source.guidance_scale, source.num_inference_steps


def _open_picture(folder: Path) -> None:
    read_picture(open_picture(folder / "a.png", param="image"), param="image")
    read_parameters(folder / "a.png")


KINDS: dict[str, Kind] = {
    "manifest": Kind(_manifest, _draw),
    "model": Kind(_model, _draw),
    "graph": Kind(_graph, _run),
    "kernel": Kind(_kernel, _run),
    "weights": Kind(_weights, _read_weights),
    "tokenizer": Kind(_tokenizer, _tokenize),
    "lora": Kind(_lora, _add_lora),
    "adapter": Kind(_adapter, _add_lora),
    "inversion": Kind(
        _inversion, lambda folder: TextualInversion.read(folder / "a.safetensors", None, {"text_encoder": 64})
    ),
    "kernels": Kind(_kernels, _read_kernels),
    "trials": Kind(_trials, lambda folder: read_trials(folder / "a.safetensors")),
    "schedule": Kind(_schedule, _make_schedule),
    "diffusers": Kind(_diffusers, _match, builds=True),
    "original": Kind(_original, lambda folder: original_config.read(folder / "a.yaml"), builds=True),
    "picture": Kind(_picture, _open_picture),
}


# ---------------------------------------------------------------------------------------------------- cases

_READABLE = (
    sys.prefix,
    sys.base_prefix,
    *(str(Path(folder).resolve()) for folder in sys.path if folder),
    str(Path(ldmrt.__file__).resolve().parents[1]),
    "/proc",
    "/sys",
    "/dev/null",
    "/etc/nsswitch.conf",
    "/etc/localtime",
)
# What opening a file never needs.
_NEVER = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.spawn",
    "subprocess.Popen",
    "socket.connect",
    "socket.bind",
    "socket.getaddrinfo",
    "pickle.find_class",
)
_CHANGES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
)
_BUILDERS = {"diffusers", "transformers", "onnx", "tensorrt"}


def prepare(kinds: Sequence[str]) -> None:
    """Import here, once, what is imported when a case is opened."""
    _draw(_BUNDLE)
    Image.init()
    if any(KINDS[kind].builds for kind in kinds):
        _match(_BUNDLE)


def run(
    kinds: Sequence[str], seeds: Iterator[int], over: Callable[[], bool]
) -> tuple[dict[str, dict[str, int]], list[Finding]]:
    """Attempt cases of these kinds in turn until it is over; of each kind how many ended well and with an error of ours, and what was found."""
    ends = {kind: {"fine": 0, "refused": 0} for kind in kinds}
    findings = []
    turns = cycle(kinds)
    while True:
        for case, end in attempts([(next(turns), next(seeds)) for _ in range(_TOGETHER)]):
            if end in ("fine", "refused"):
                ends[case[0]][end] += 1
            else:
                findings.append(Finding(*case, end))
        if over():
            return ends, findings


def attempts(cases: Sequence[tuple[str, int]]) -> Iterator[tuple[tuple[str, int], str]]:
    """Make cases and open them, in a process; those that are left when it dies in another. How each ended: `fine`, `refused`, or what is wrong."""
    left = list(cases)
    while left:
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            _child(left, write)
        os.close(write)
        said, late = b"", False
        while True:
            late = not select.select([read], [], [], SECONDS)[0]
            part = b"" if late else os.read(read, 1 << 16)
            if not part:
                break
            *lines, said = (said + part).split(b"\0")
            for line in lines:
                yield left.pop(0), line.decode()
        if late:
            os.kill(child, signal.SIGKILL)
        os.close(read)
        _, status = os.waitpid(child, 0)
        if left:
            died = f"it died of {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) else "it ended"
            yield left.pop(0), f"it takes more than {SECONDS} seconds" if late else died


def _child(cases: Sequence[tuple[str, int]], write: int) -> None:
    """Open one case after the other, tell how each ended, and end."""
    try:
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        warnings.simplefilter("ignore")
        watched = _Watched()
        sys.addaudithook(watched)
        for kind, seed in cases:
            folder = _WORK / f"{kind}-{seed}"
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            KINDS[kind].make(random.Random(f"{kind} {seed}"), folder)
            watched.kind = KINDS[kind]
            end = _opened(KINDS[kind], folder, watched.said)
            watched.kind = None
            os.write(write, end[:4000].encode("utf-8", "backslashreplace").replace(b"\0", b"?") + b"\0")
            watched.said.clear()
            shutil.rmtree(folder)
            folder.with_name(f"{folder.name}.engine").unlink(missing_ok=True)
    finally:
        os._exit(0)


def _opened(kind: Kind, folder: Path, said: list[str]) -> str:
    end = "fine"
    try:
        kind.use(folder)
    except LdmrtError as error:
        told, end = str(error), "refused"
        if not told.isprintable() or len(told) > _LONGEST:
            said.append(f"{type(error).__name__} is not one line: {told[:300]!r}")
    except BaseException as error:  # noqa: BLE001 - each of them is a finding
        at = traceback.extract_tb(error.__traceback__)[-1]
        said.append(f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}: {str(error)[:300]!r}")
    return " | ".join(said) or end


class _Watched:
    """An audit hook (PEP 578): notes what opening a file should never do, while something is opened.

    Attributes:
        kind: what is opened now.
        said: what was noted.
    """

    def __init__(self) -> None:
        self.kind: Kind | None = None
        self.said: list[str] = []

    def __call__(self, event: str, given: tuple[Any, ...]) -> None:
        """An event of the interpreter."""
        if self.kind is not None:
            _watch(self.kind, event, given, self.said)


def _watch(kind: Kind, event: str, given: tuple[Any, ...], said: list[str]) -> None:
    if event in _NEVER:
        said.append(f"{event} {str(given)[:100]}")
    elif event == "import" and not kind.builds and str(given[0]).partition(".")[0] in _BUILDERS:
        said.append(f"imports {given[0]}")
    elif event in _CHANGES or event == "open":
        path = given[0]
        if isinstance(path, int):
            return
        place = os.path.realpath(os.fsdecode(path))
        writes = event != "open" or bool(given[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        within = place.startswith(str(_WORK.resolve()))
        if not within and (writes or not place.startswith(_READABLE)):
            said.append(f"{'changes' if writes else 'reads'} {place!r}")
