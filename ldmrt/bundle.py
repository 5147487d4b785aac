"""A bundle: the folder that passes from build to run.

`ldmrt.json`, the manifest, says what the folder holds; nothing else is trusted. Every file is named in it with its SHA-256, every
name stays inside the folder, and the manifest is replaced last and at once, so that a bundle is always whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ldmrt import tokenizer
from ldmrt.components import CLASS_LABELS, CONTROLLED_STEP, CONTROLNET_NAME, LAYOUT, SEGMENTATION, STEP
from ldmrt.engines.activation import ActivationMemory
from ldmrt.engines.protocol import Engine, TensorSpec
from ldmrt.engines.tensorrt import LIBRARIES, check
from ldmrt.errors import BundleError
from ldmrt.files import replacing
from ldmrt.graph import Graph, dtype_of, from_json
from ldmrt.kernels import aot, launch
from ldmrt.parameters import Parameters
from ldmrt.weights import WeightFile, read_header, sha256

FORMAT = 1
MANIFEST = "ldmrt.json"
# Bytes of the manifest, and of a graph: ten times what the largest have.
_LARGEST_JSON = 16 << 20
# The kind of a model that finishes what another has begun.
REFINER = "stable-diffusion-xl-refiner"

Pixels = Annotated[int, Field(ge=1, le=1 << 16)]

# The inputs and outputs that the runtime relies on, and how many dimensions they have.
_INTERFACES: dict[str, dict[str, int]] = {
    "text_encoder": {"input_ids": 2, "hidden_states": 4},
    "context": {"encoder_hidden_states": 3},
    "schedule": {"timesteps": 1},
    STEP: {"latents": 4},
    CONTROLLED_STEP: {"latents": 4},
    "decoder": {"latents": 4, "image": 4},
    "encoder": {"image": 4, "latent_mean": 4, "latent_logvar": 4},
}


# What a model without text may be told in its place.
_TOLD = {CLASS_LABELS: 1, "mask": 4, SEGMENTATION: 4, LAYOUT: 2}


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FileRecord(_Record):
    """A file of the bundle: its name, relative to the bundle with forward slashes, and its SHA-256."""

    file: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class LoraRecord(FileRecord):
    """A LoRA that was fused into the weights: its file's name and SHA-256 (the file is not in the bundle), and its scale."""

    scale: float


class ControlNetRecord(_Record):
    """A ControlNet whose engines are in the bundle.

    Attributes:
        name: its folder's name, part of the names of its components.
        files: what it was made from, relative to its folder; not in the bundle.
    """

    name: str = Field(pattern=f"^{CONTROLNET_NAME}$")
    files: tuple[FileRecord, ...] = Field(min_length=1)


class Certificate(_Record):
    """What is known of an engine's correctness.

    Attributes:
        status: `verified`, or `unverified` and why, and what was verified in its stead.
        reference: what it was compared with.
        relative_error: relative L2 error of the outputs, by kind of input (`random`, `real`).
        tolerance: the largest error that the build accepts.
    """

    status: str
    reference: str
    relative_error: dict[str, float]
    tolerance: float


class EngineRecord(_Record):
    """One compiled component.

    Attributes:
        component: `text_encoder`, `text_encoder_2`, `decoder`, `encoder`, or a part of a denoising network (`ldmrt.components`).
        kind: which engine runs it.
        dtype: the precision it computes in.
        size: width and height in pixels that it was made for, or None if it does not depend on them.
        rows: its batch size, or None if free.
        key: hash of graph, weights, shapes, precision, library versions and options.
        files: the engine's own files; the first is the one to open.
        weights: which of the manifest's weight files it reads.
        targets: the GPU architectures it was compiled for; empty where that says nothing.
        refit: whether the weights of a plan can be changed.
        weight_streaming: whether a plan can leave weights in the host's memory.
        versions: the libraries that made it.
        certificate: how it was verified.
        trials: inputs, and what the original module made of them, for an engine that is still to be verified on its target.
    """

    component: str
    kind: str = Field(pattern="^(torch|onnxruntime|tensorrt|tensorrt-rtx)$")
    dtype: str = Field(pattern="^(float32|bfloat16|float16)$")
    size: tuple[Pixels, Pixels] | None
    rows: int | None = Field(ge=1)
    key: str
    files: tuple[FileRecord, ...] = Field(min_length=1)
    weights: str
    targets: tuple[str, ...] = ()
    refit: bool = False
    weight_streaming: bool = False
    versions: dict[str, str]
    certificate: Certificate
    trials: FileRecord | None = None

    @property
    def all_files(self) -> tuple[FileRecord, ...]:
        """The engine's files, its trials included."""
        return self.files if self.trials is None else (*self.files, self.trials)

    @property
    def can_be_captured(self) -> bool:
        """Whether a CUDA graph can hold its runs: not what allocates while it runs, nor what moves when its weights are changed."""
        return self.kind != "onnxruntime" and not self.refit and not self.weight_streaming

    @property
    def takes_weights(self) -> bool:
        """Whether its weights can be changed in place."""
        return self.kind == "torch" or self.refit

    @property
    def label(self) -> str:
        """How to call it in a message: `step (torch, float32, 512x512, 2 rows)`."""
        parts: list[str] = [self.kind, self.dtype]
        parts += [f"{self.size[0]}x{self.size[1]}"] if self.size else []
        parts += [f"{self.rows} rows"] if self.rows else []
        return f"{self.component} ({', '.join(parts)})"


class AuditRecord(_Record):
    """What a component's float16 engines compute in float32, because float16 does not hold it (`ldmrt.export.audit`).

    Attributes:
        component: `text_encoder`, `text_encoder_2`, `unet`, `controlled_unet`, `controlnet.NAME`, `decoder` or `encoder`.
        kind: the kind of the engines.
        size: width and height in pixels, or None if the component does not depend on them.
        key: hash of what was audited.
        widened: the largest magnitude of each value that float16 does not hold, by name.
    """

    component: str
    kind: str
    size: tuple[Pixels, Pixels] | None
    key: str
    widened: dict[str, float]


class Defaults(_Record):
    """What a request gets where it says nothing: this model's own habits."""

    width: int = Field(ge=1)
    height: int = Field(ge=1)
    num_inference_steps: int = Field(ge=1)
    guidance_scale: float = Field(ge=0)
    sampler: str = "ddim"


class UpscalingRecord(_Record):
    """What a model that draws a small picture larger takes besides the picture.

    Attributes:
        schedule: the noise schedule by which the picture is given noise (`ldmrt.schedule.NoiseSchedule.from_dict`); None for none.
        noise_level: at which of its timesteps, where a request says nothing.
        max_noise_level: the last that the model knows.
    """

    schedule: dict[str, Any] | None = None
    noise_level: int = Field(default=0, ge=0)
    max_noise_level: int = Field(default=0, ge=0)


class LayoutRecord(_Record):
    """For a model of layouts.

    Attributes:
        objects: the most that a layout has.
        tokens: how many there are, of classes and of corners; the last stands for nothing.
    """

    objects: int = Field(ge=1, le=1 << 16)
    tokens: int = Field(ge=4, le=1 << 24)


class ModelRecord(_Record):
    """What the runtime must know of the model.

    Attributes:
        kind: the family member, such as `stable-diffusion`.
        name: the source's name, for people.
        latent_channels: channels of the latents.
        downscale: pixels per latent cell, each way.
        tokenizers: folder of the tokenizer of each text encoder, in the order in which their outputs are joined; none for a model that
            reads no text.
        zero_empty_negative: whether an empty negative prompt means embeddings of zeros.
        inpainting: whether it draws into the masked part of a picture, and nothing else.
        requires_aesthetics_score: whether it takes an aesthetic score beside the picture's size.
        masked_pixel: what a pixel under the mask is encoded as, -1 (black) to 1.
        upscaling: for a model that draws a small picture larger; the picture is one pixel for each latent cell.
        classes: how many classes it draws, by number; None if it is not told any.
        null_class: which of them stands for none, as guidance compares with; None if there is none.
        segments: how many classes its semantic maps have; None if it takes none.
        layout: what its layouts may have; None if it takes none.
        guidance_embedding: width of the embedding of the guidance scale that the U-Net takes in the place of classifier-free guidance;
            None if it takes none.
        scaling_factor: the latents that are denoised are (encoded - shift_factor) * scaling_factor.
        shift_factor: see there.
        schedule: the noise schedule (`ldmrt.schedule.NoiseSchedule.from_dict`).
        defaults: see `Defaults`.
    """

    kind: str = Field(pattern="^(stable-diffusion(-xl(-refiner)?)?|latent-diffusion)$")
    name: str
    latent_channels: int = Field(ge=1, le=1024)
    downscale: int = Field(ge=1, le=1024)
    tokenizers: dict[str, str]
    zero_empty_negative: bool = False
    inpainting: bool = False
    requires_aesthetics_score: bool = False
    masked_pixel: float = Field(default=0.0, ge=-1, le=1)
    upscaling: UpscalingRecord | None = None
    classes: int | None = Field(default=None, ge=1)
    null_class: int | None = Field(default=None, ge=0)
    segments: int | None = Field(default=None, ge=1)
    layout: LayoutRecord | None = None
    guidance_embedding: int | None = Field(default=None, ge=4)
    scaling_factor: float = Field(default=0.18215, gt=0)
    shift_factor: float = 0.0
    schedule: dict[str, Any]
    defaults: Defaults


class Manifest(_Record):
    """`ldmrt.json`.

    Attributes:
        format: version of the bundle format.
        ldmrt: version of ldmrt that wrote it.
        model: see `ModelRecord`.
        source: files that the bundle was made from, with their hashes.
        loras: LoRAs that were fused into the weights.
        controlnets: the ControlNets there are engines of, in the order in which a request names their pictures.
        tokenizer_files: files of the tokenizer.
        weights: weight files by name (`unet.bfloat16`).
        engines: the compiled components.
        kernels: compiled kernels of the torch engines for GPUs, with their index, `kernels.json`; all in one folder.
        passes: per component, what the compiler found and did (for `ldmrt inspect`).
        audits: of the components built in float16, which of their values are in float32.
    """

    format: int
    ldmrt: str
    model: ModelRecord
    source: tuple[FileRecord, ...]
    loras: tuple[LoraRecord, ...] = ()
    controlnets: tuple[ControlNetRecord, ...] = ()
    tokenizer_files: tuple[FileRecord, ...]
    weights: dict[str, FileRecord]
    engines: tuple[EngineRecord, ...]
    kernels: tuple[FileRecord, ...] = ()
    passes: dict[str, dict[str, int]] = {}
    audits: tuple[AuditRecord, ...] = ()

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(self.model_dump(mode="json"), indent=1) + "\n"


class Bundle:
    """An opened bundle. Files are checked against the manifest when they are first used.

    Attributes:
        path: the folder.
        manifest: what it holds.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._checked: set[str] = set()
        self._registered = False
        self._parameters: dict[tuple[str, torch.device], tuple[Parameters, WeightFile]] = {}
        self._memories: dict[torch.device, ActivationMemory] = {}

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Open a bundle.

        Raises:
            BundleError: there is none at `path`, it is damaged, or of a newer format.
        """
        folder = Path(path)
        file = folder / MANIFEST
        if not folder.is_dir():
            raise BundleError(
                f"no such folder: {folder}; build a bundle with `ldmrt build-engines MODEL --out {folder}`"
            )
        if not file.is_file():
            hint = "is a model, not a bundle: " if (folder / "model_index.json").is_file() else "is not a bundle: "
            raise BundleError(
                f"{folder} {hint}it has no {MANIFEST}; build one with `ldmrt build-engines MODEL --out DIR`"
            )
        try:
            data = json.loads(_text(file))
            found = data["format"] if isinstance(data, dict) else None
            if found != FORMAT:
                raise BundleError(
                    f"{file} has bundle format {found!r}, this ldmrt reads {FORMAT}: update ldmrt, or build the bundle again"
                )
            manifest = Manifest.model_validate(data)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise BundleError(f"{file} is damaged ({where}: {first['msg']}); build the bundle again") from error
        except (OSError, ValueError, KeyError, RecursionError) as error:
            raise BundleError(f"{file} cannot be read ({str(error)[:120]}); build the bundle again") from error
        bundle = cls(folder, manifest)
        for record in bundle.records():
            bundle.locate(record.file)
        for name in manifest.model.tokenizers.values():
            bundle.locate(name)
        return bundle

    def records(self) -> Iterable[FileRecord]:
        """Every file that the manifest names."""
        yield from self.manifest.tokenizer_files
        yield from self.manifest.weights.values()
        yield from self.manifest.kernels
        for engine in self.manifest.engines:
            yield from engine.all_files

    def locate(self, name: str) -> Path:
        """The path of a file of the bundle.

        Raises:
            BundleError: the name leads outside the folder.
        """
        pure = PurePosixPath(name)
        path = self.path / pure
        try:
            inside = path.resolve().is_relative_to(self.path.resolve())
            path.exists()
        except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a null
            raise BundleError(
                f"{self.path / MANIFEST} names {name[:80]!r}, which is no file ({str(error)[:40]}); build the bundle again"
            ) from error
        if pure.is_absolute() or ".." in pure.parts or not inside:
            raise BundleError(
                f"{self.path / MANIFEST} names {name!r}, which lies outside the bundle: do not use this bundle"
            )
        return path

    def checked(self, record: FileRecord) -> Path:
        """The path of a file whose contents are what the manifest says (hashed once per opened bundle).

        Raises:
            BundleError: it is missing or has changed.
        """
        path = self.locate(record.file)
        if record.file not in self._checked:
            if not path.is_file():
                raise BundleError(f"{path} is missing from the bundle; build it again with `ldmrt build-engines`")
            found = sha256(path)
            if found != record.sha256:
                raise BundleError(
                    f"{path} is damaged: its SHA-256 is {found[:12]}..., the manifest says {record.sha256[:12]}...; "
                    "build it again with `ldmrt build-engines`"
                )
            self._checked.add(record.file)
        return path

    def check_tokenizers(self) -> dict[str, Path]:
        """The folder of each text encoder's tokenizer, all files checked.

        Raises:
            BundleError: a file is missing or damaged, or there is one that the manifest does not name.
        """
        named = {self.checked(record) for record in self.manifest.tokenizer_files}
        folders = {encoder: self.locate(name) for encoder, name in self.manifest.model.tokenizers.items()}
        for path in (folder / name for folder in folders.values() for name in tokenizer.FILES):
            if path not in named and path.exists():
                raise BundleError(
                    f"{path} would be read, and {self.path / MANIFEST} does not name it: remove it, or build the bundle again"
                )
        return folders

    def find(
        self,
        component: str,
        *,
        kind: str | None = None,
        dtype: str | None = None,
        size: tuple[int, int] | None = None,
    ) -> list[EngineRecord]:
        """The engines of a component that fit, smallest row count first. `size` only sorts out those that depend on it."""
        found = [
            engine
            for engine in self.manifest.engines
            if engine.component == component
            and kind in (None, engine.kind)
            and dtype in (None, engine.dtype)
            and (size is None or engine.size in (None, size))
        ]
        return sorted(found, key=lambda engine: engine.rows or 0)

    def graph(self, record: EngineRecord) -> Graph:
        """The graph of a `torch` engine.

        Raises:
            BundleError: a file is missing or damaged, or is no graph.
        """
        path = self.checked(record.files[0])
        try:
            text = _text(path)
        except (OSError, ValueError) as error:
            raise BundleError(f"{path} cannot be read ({str(error)[:120]}); build the bundle again") from error
        constants = {
            name: tensor for extra in record.files[1:] for name, tensor in WeightFile(self.checked(extra)).items()
        }
        return from_json(text, constants, where=str(path))

    def load(self, record: EngineRecord, device: torch.device, *, weight_budget: int | None = None) -> Engine:
        """Load an engine onto a device. Weights are shared between the engines of one opened bundle.

        Args:
            record: which.
            device: where it is to run.
            weight_budget: see `ldmrt.engines.plan.TensorRtEngine`.

        Raises:
            BundleError: a file is damaged, or the graph is not allowed.
            EngineMismatch: the engine cannot run on the device.
        """
        if record.kind == "torch":
            from ldmrt.engines.torch import TorchEngine

            if device.type == "cuda":
                self._register_kernels()
            return _as_agreed(record, TorchEngine(self.graph(record), self.parameters(record.weights, device), device))
        if record.kind in LIBRARIES:
            return _as_agreed(record, self._plan(record, device, weight_budget))
        from ldmrt.engines.onnxruntime import OnnxRuntimeEngine

        self.checked(self._weights_record(record.weights))
        path = self.checked(record.files[0])
        engine = OnnxRuntimeEngine(path, threads=torch.get_num_threads(), device=device)
        return _as_agreed(record, engine)

    def _plan(self, record: EngineRecord, device: torch.device, weight_budget: int | None) -> Engine:
        from ldmrt.engines import runtime_cache
        from ldmrt.engines.gpu import Gpu
        from ldmrt.engines.plan import TensorRtEngine

        library = LIBRARIES[record.kind]
        here = Gpu(device).architecture if device.type == "cuda" else None
        check(record.label, library, record.targets, record.versions, here)
        gpu = Gpu(device)
        if gpu.device not in self._memories:
            self._memories[gpu.device] = ActivationMemory(gpu)
        engine = TensorRtEngine(
            self.checked(record.files[0]),
            library,
            self._memories[gpu.device],
            label=record.label,
            cache=runtime_cache.folder(os.environ),
            weight_budget=weight_budget,
        )
        if record.refit:
            shapes, dtype = self.shapes(record.weights), dtype_of(record.dtype)
            specs = {name: TensorSpec(name, shape, dtype) for name, shape in shapes.items()}
            engine.follow(self.parameters(record.weights, gpu.device), specs)
        return engine

    def _weights_record(self, weights: str) -> FileRecord:
        if weights not in self.manifest.weights:
            raise BundleError(f"{self.path / MANIFEST} has no weights {weights!r}; build the bundle again")
        return self.manifest.weights[weights]

    def cubins(self) -> list[aot.Cubin]:
        """The compiled kernels.

        Raises:
            BundleError: a file is missing or damaged.
        """
        folder = self._kernel_folder()
        try:
            return aot.read(folder) if folder is not None else []
        except (OSError, ValueError) as error:
            raise BundleError(f"{error}; build the bundle again with `ldmrt build-engines`") from error

    def _register_kernels(self) -> None:
        """Make the compiled kernels known to the launcher, once."""
        folder = self._kernel_folder()
        if folder is not None and not self._registered:
            try:
                launch.register(folder)
            except (OSError, ValueError) as error:
                raise BundleError(f"{error}; build the bundle again with `ldmrt build-engines`") from error
        self._registered = True

    def _kernel_folder(self) -> Path | None:
        """The folder of the compiled kernels, each file checked."""
        folders = {self.checked(record).parent for record in self.manifest.kernels}
        if len(folders) > 1:
            raise BundleError(f"{self.path / MANIFEST} names kernels in several folders; build the bundle again")
        return next(iter(folders), None)

    def shapes(self, weights: str) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor of a weight file of the manifest, by name.

        Raises:
            BundleError: the file is missing or damaged.
        """
        entries, _ = read_header(self.checked(self._weights_record(weights)))
        return {name: entry.shape for name, entry in entries.items()}

    def parameters(self, weights: str, device: torch.device) -> Parameters:
        """The weights of a file of the manifest, on a device: one `Parameters` for all engines that read them.

        Raises:
            BundleError: the file is missing or damaged.
        """
        key = weights, device
        if key not in self._parameters:
            file = WeightFile(self.checked(self._weights_record(weights)))

            def load(spec: TensorSpec) -> torch.Tensor:
                if spec.name not in file:
                    raise BundleError(
                        f"{file.path} has no tensor {spec.name!r}, which an engine needs; build the bundle again"
                    )
                return file[spec.name].to(device=device, dtype=spec.dtype)

            self._parameters[key] = Parameters(load, device, lambda spec: file.release(spec.name)), file
        return self._parameters[key][0]

    def unload(self, weights: str, device: torch.device) -> None:
        """Let go of the weights of a file on a device, which no engine uses any more. Changes of them stay."""
        parameters, file = self._parameters.get((weights, device), (None, None))
        if parameters is not None and file is not None:
            parameters.unload()
            file.unmap()


def _text(path: Path) -> str:
    """A JSON file as text.

    Raises:
        OSError: it cannot be read.
        ValueError: it is too large, or is no text.
    """
    size = path.stat().st_size
    if size > _LARGEST_JSON:
        raise ValueError(f"it has {size} bytes, expected {_LARGEST_JSON} at most")
    return path.read_text(encoding="utf-8")


def _as_agreed(record: EngineRecord, engine: Engine) -> Engine:
    """The engine, if it has the inputs and outputs of its component.

    Raises:
        BundleError: one is missing or has another form.
    """
    found = {**engine.inputs, **engine.outputs}
    if record.component == "context" and not found:  # a model that is told nothing
        return engine
    agreed = _INTERFACES.get(record.component, {})
    if record.component == "context":
        agreed = next(({name: _TOLD[name]} for name in _TOLD if name in found), agreed)
    fits = all(name in found and len(found[name].shape) == dimensions for name, dimensions in agreed.items())
    if fits and record.component in (STEP, CONTROLLED_STEP):
        latents = engine.inputs.get("latents")
        fits = latents is not None and [spec.shape for spec in engine.outputs.values()] == [latents.shape]
    if not fits:
        raise BundleError(
            f"{record.label} does not have the inputs and outputs of its kind: the bundle is damaged, "
            "build it again with `ldmrt build-engines`"
        )
    return engine


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the manifest in place at once: a reader sees the old one or the new one."""
    write_atomically(folder / MANIFEST, manifest.to_json().encode())


def write_atomically(path: Path, data: bytes) -> str:
    """Write a file to a temporary name, then rename it. Returns its SHA-256."""
    with replacing(path) as file:
        file.write(data)
    return hashlib.sha256(data).hexdigest()


def engine_key(parts: Mapping[str, Any]) -> str:
    """The hash that names an engine: equal parts, equal key. `parts` is JSON-safe."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
