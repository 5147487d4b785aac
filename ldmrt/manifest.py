"""The manifest of a bundle, `ldmrt.json`: the model, every file with its SHA-256, every engine with its key and certificate."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from ldmrt.components import CONTROLNET_NAME
from ldmrt.files import write_atomically

FORMAT = 1
MANIFEST = "ldmrt.json"
# The kind of a model that finishes what another has begun.
REFINER = "stable-diffusion-xl-refiner"

# Of float32, in which numbers reach the device.
LARGEST = float(np.finfo(np.float32).max)
Pixels = Annotated[int, Field(ge=1, le=1 << 16)]


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
    guidance_scale: float = Field(ge=0, le=LARGEST)
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
    guidance_embedding: int | None = Field(default=None, ge=4, le=1 << 16)
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


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the manifest in place at once: a reader sees the old one or the new one."""
    write_atomically(folder / MANIFEST, manifest.to_json().encode())


def engine_key(parts: Mapping[str, Any]) -> str:
    """The hash that names an engine: equal parts, equal key. `parts` is JSON-safe."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]
