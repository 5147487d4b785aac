"""A bundle: the folder that passes from build to run.

`ldmrt.json`, the manifest (`ldmrt.manifest`), says what the folder holds; nothing else is trusted. Every file is named in it with its SHA-256, every
name stays inside the folder, and the manifest is replaced last and at once, so that a bundle is always whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

import torch
from pydantic import ValidationError

from ldmrt import tokenizer
from ldmrt.components import CLASS_LABELS, CONTROLLED_STEP, LAYOUT, SEGMENTATION, STEP
from ldmrt.engines.activation import ActivationMemory
from ldmrt.engines.protocol import Engine, TensorSpec
from ldmrt.engines.tensorrt import LIBRARIES, check
from ldmrt.errors import BundleError
from ldmrt.graph import Graph, dtype_of, from_json
from ldmrt.kernels import aot, launch
from ldmrt.manifest import FORMAT, MANIFEST, EngineRecord, FileRecord, Manifest
from ldmrt.parameters import Parameters
from ldmrt.weights import WeightFile, read_header, sha256

# Bytes of the manifest, and of a graph: ten times what the largest have.
_LARGEST_JSON = 16 << 20
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
