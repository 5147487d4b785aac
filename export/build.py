"""From a model to a bundle: capture, passes, engines, verification, and a manifest put in place last."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import ldmrt
from ldmrt.bundle import (
    FORMAT,
    MANIFEST,
    Bundle,
    Certificate,
    Defaults,
    EngineRecord,
    FileRecord,
    Manifest,
    ModelRecord,
    engine_key,
    write_atomically,
    write_manifest,
)
from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BuildError, LdmrtError
from ldmrt.export import architectures
from ldmrt.export.capture import capture
from ldmrt.export.component import PREFIX, Component
from ldmrt.export.passes.clean import clean
from ldmrt.export.passes.hoist import hoist
from ldmrt.export.source import Checkpoint, Source
from ldmrt.export.verify import Trial, certify, reference_outputs, run_denoiser, run_engine
from ldmrt.graph import Graph, dtype_of, rename_values, specialize, to_json
from ldmrt.schedule import NoiseSchedule
from ldmrt.weights import WeightFile, sha256
from ldmrt.weights import write as write_weights

ENGINES = ("auto", "torch", "onnxruntime")
DTYPES = ("auto", "float32", "bfloat16", "float16")
OnProgress = Callable[[str, int, int], None]

_LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Options:
    """What to build, with nothing left open."""

    engine: str
    dtype: str
    sizes: tuple[tuple[int, int], ...]
    batch_sizes: tuple[int, ...]


def build_engines(
    model: str | Path,
    out: str | Path,
    *,
    engine: str = "auto",
    sizes: Sequence[tuple[int, int]] | None = None,
    batch_sizes: Sequence[int] = (1,),
    dtype: str = "auto",
    on_progress: OnProgress | None = None,
) -> Bundle:
    """Compile a model into a bundle, or add engines to the bundle that is there.

    Args:
        model: folder of a model in the diffusers layout.
        out: the bundle's folder. If it is the model's own, the weights are used where they lie and are not written again.
        engine: `auto` (torch), `torch` or `onnxruntime` (CPU, float32).
        sizes: (width, height) in pixels; the model's own size if None.
        batch_sizes: images per call to make engines for.
        dtype: precision; `auto` is bfloat16 on a CPU that computes in it, else float32.
        on_progress: called with (what is being done, steps done, steps in all).

    Returns:
        The opened bundle.

    Raises:
        BuildError: the model cannot be built; nothing of the failed build is left behind.
        BundleError: a weight file is damaged.
    """
    source = Source.open(Path(model))
    options = resolve_options(source, engine, sizes, batch_sizes, dtype)
    return _Build(source, Path(out), options, on_progress or (lambda what, done, total: None)).run()


def resolve_options(
    source: Source, engine: str, sizes: Sequence[tuple[int, int]] | None, batch_sizes: Sequence[int], dtype: str
) -> Options:
    """Check what was asked and fill in what was not.

    Raises:
        BuildError: a value cannot be used.
    """
    if engine not in ENGINES:
        raise BuildError(f"engine {engine!r} is not known; choose one of {', '.join(ENGINES)}")
    if dtype not in DTYPES:
        raise BuildError(f"dtype {dtype!r} is not known; choose one of {', '.join(DTYPES)}")
    engine = "torch" if engine == "auto" else engine
    if engine == "onnxruntime":
        if dtype not in ("auto", "float32"):
            raise BuildError(f"engine onnxruntime runs on the CPU in float32 only, {dtype} was asked for; use --dtype float32")
        dtype = "float32"
    if dtype == "auto":
        dtype = "bfloat16" if has_native_bfloat16() else "float32"
    downscale = architectures.downscale(source)
    if sizes is None:
        side = int(source.configs["unet"].get("sample_size") or 64) * downscale
        sizes = [(int(source.defaults.get("width", side)), int(source.defaults.get("height", side)))]
    for width, height in sizes:
        if width < downscale or height < downscale or width % downscale or height % downscale:
            near = f"{max(1, round(width / downscale)) * downscale}x{max(1, round(height / downscale)) * downscale}"
            raise BuildError(f"size {width}x{height} is not a multiple of {downscale} each way; the nearest is {near}")
    if not sizes or not batch_sizes or any(batch < 1 or batch > 31 for batch in batch_sizes):
        raise BuildError(f"batch sizes must lie between 1 and 31, and there must be one; found {list(batch_sizes)}")
    return Options(engine, dtype, tuple(dict.fromkeys(sizes)), tuple(sorted(set(batch_sizes))))


def has_native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware (AVX512-BF16 or AMX)."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


@dataclass
class _Build:
    source: Source
    out: Path
    options: Options
    on_progress: OnProgress
    written: list[Path] = field(default_factory=list)
    weights: dict[str, FileRecord] = field(default_factory=dict)
    engines: list[EngineRecord] = field(default_factory=list)
    passes: dict[str, dict[str, int]] = field(default_factory=dict)
    done: int = 0
    total: int = 0

    # ------------------------------------------------------------------------------------------------ the whole

    def run(self) -> Bundle:
        """Build all components."""
        created = not self.out.exists()
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BuildError(f"cannot make the folder {self.out}: {error.strerror}; choose another --out") from error
        try:
            with self.locked():
                self.old = self.previous()
                self.check_space()
                self.build()
                bundle = self.finish()
        except BaseException as error:
            for path in self.written:
                path.unlink(missing_ok=True)
            if created:
                shutil.rmtree(self.out, ignore_errors=True)
            if isinstance(error, OSError) and not isinstance(error, LdmrtError):
                raise BuildError(f"cannot write the bundle {self.out}: {error.strerror or error}; free some space or choose another --out") from error
            raise
        return bundle

    def build(self) -> None:
        components = list(architectures.components(self.source, self.options.sizes))
        self.total = 2 * len(components) + 2
        self.progress("reading the model")
        self.source_files = tuple(self.hash_source())
        if self.old is not None and self.old.source != self.source_files:
            raise BuildError(
                f"{self.out} holds a bundle of another model ({self.old.model.name}), or of other weights; choose another --out, or remove it"
            )
        for size, component, trials in components:
            self.build_component(size, component, trials)

    def build_component(self, size: tuple[int, int] | None, component: Component, trials: Callable[[], list[Trial]]) -> None:
        """Capture one component, make its engines, and compare them with the original."""
        label = component.name + (f" {size[0]}x{size[1]}" if size else "")
        self.progress(f"{label}: compiling")
        dtype = dtype_of(self.options.dtype)
        checkpoint = Checkpoint(self.source, component.folder, component.module.module)  # type: ignore[arg-type]
        module = component.module.to(dtype)
        graph = capture(component.name, module, _cast(component.inputs, dtype), component.outputs)
        captured = len(graph.nodes)
        graph = clean(_with_file_keys(_with_buffers(graph), checkpoint))
        self.passes[component.name] = {"captured": captured, "clean": len(graph.nodes)}
        drafts = self.drafts(component, graph, size)
        weights = self.weights_for(component.folder, checkpoint)
        keys = [self.key(draft, weights) for draft in drafts]
        reused = [self.reusable(draft, key) for draft, key in zip(drafts, keys, strict=True)]
        if all(reused):
            self.engines += [record for record in reused if record]
            self.progress(f"{label}: already built")
            return
        records = [
            record or self.write_engine(draft, key, weights)
            for draft, key, record in zip(drafts, keys, reused, strict=True)
        ]
        self.progress(f"{label}: verifying")
        self.engines += self.verify(component, checkpoint, records, trials())

    def finish(self) -> Bundle:
        """Copy the tokenizer, write the manifest, remove what the old one alone named."""
        self.progress("writing the manifest")
        keep = [] if self.old is None else [old for old in self.old.engines if _slot(old) not in {_slot(new) for new in self.engines}]
        tokenizer = "tokenizer"
        files = []
        (self.out / tokenizer).mkdir(exist_ok=True)
        for path in sorted((self.source.path / "tokenizer").iterdir()):
            if path.suffix in (".json", ".txt") and path.is_file():
                name = f"{tokenizer}/{path.name}"
                digest = sha256(path) if self.in_place else self.write(name, path.read_bytes())
                files.append(FileRecord(file=name, sha256=digest))
        manifest = Manifest(
            format=FORMAT,
            ldmrt=ldmrt.__version__,
            model=self.model_record(tokenizer),
            source=self.source_files,
            tokenizer_files=tuple(files),
            weights={**({} if self.old is None else self.old.weights), **self.weights},
            engines=tuple([*keep, *self.engines]),
            passes={**({} if self.old is None else self.old.passes), **self.passes},
        )
        write_manifest(self.out, manifest)
        self.written.clear()
        named = {record.file for record in Bundle(self.out, manifest).records()}
        if self.old is not None:
            for record in Bundle(self.out, self.old).records():
                if record.file not in named:
                    (self.out / record.file).unlink(missing_ok=True)
        for pattern in ("*.tmp", "graphs/.*.tmp", "weights/.*.tmp", ".*.tmp"):  # left by a build that was killed
            for path in self.out.glob(pattern):
                path.unlink(missing_ok=True)
        self.done = self.total
        self.on_progress("done", self.total, self.total)
        return Bundle.open(self.out)

    # ------------------------------------------------------------------------------------------------ one component

    def drafts(self, component: Component, graph: Graph, size: tuple[int, int] | None) -> list[_Draft]:
        """The graphs to make engines of."""
        if component.name != "unet":
            if component.name == "text_encoder":
                return [_Draft(graph, size, None)]
            return [_Draft(specialize(graph, {"rows": rows}), size, rows) for rows in self.options.batch_sizes]
        hoisted = hoist(graph, component.kinds)
        self.passes["unet"] |= {kind: count for kind, count in hoisted.counts.items() if count}
        # With guidance an image takes two rows, without it one.
        rows = sorted({rows for batch in self.options.batch_sizes for rows in (batch, 2 * batch)})
        steps = [_Draft(specialize(hoisted.step, {"rows": count}), size, count) for count in rows]
        return [_Draft(hoisted.context, None, None), _Draft(hoisted.schedule, None, None), *steps]

    def key(self, draft: _Draft, weights: str) -> str:
        """The engine's key."""
        constants = hashlib.sha256()
        for name, tensor in sorted(draft.graph.constants.items()):
            constants.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return engine_key(
            {
                "graph": draft.text_hash,
                "constants": constants.hexdigest(),
                "weights": self.weights[weights].sha256,
                "kind": self.kind(draft),
                "dtype": self.options.dtype,
                "size": draft.size,
                "rows": draft.rows,
                "versions": self.versions(draft),
            }
        )

    def kind(self, draft: _Draft) -> str:
        """`context` and `schedule` run once per request, on the torch engine whatever runs the rest."""
        return "torch" if draft.graph.name in ("context", "schedule") else self.options.engine

    def versions(self, draft: _Draft) -> dict[str, str]:
        """The libraries that have a say in the engine."""
        used = _LIBRARIES if self.kind(draft) == "onnxruntime" else _LIBRARIES[:3]
        return {"ldmrt": ldmrt.__version__} | {name: importlib.metadata.version(name) for name in used if _installed(name)}

    def reusable(self, draft: _Draft, key: str) -> EngineRecord | None:
        """The engine that is there already, if it is the same and undamaged."""
        if self.old is None:
            return None
        for record in self.old.engines:
            if record.key == key and all(
                (self.out / item.file).is_file() and sha256(self.out / item.file) == item.sha256 for item in record.files
            ):
                return record
        return None

    def write_engine(self, draft: _Draft, key: str, weights: str) -> EngineRecord:
        """Write an engine's files; the certificate is still to come."""
        graph, kind = draft.graph, self.kind(draft)
        parts = [graph.name, *([f"{draft.size[0]}x{draft.size[1]}"] if draft.size else []), *([f"r{draft.rows}"] if draft.rows else [])]
        stem = "-".join([*parts, self.options.dtype, key[:8]])
        files = []
        if kind == "torch":
            (self.out / "graphs").mkdir(exist_ok=True)
            files.append(FileRecord(file=f"graphs/{stem}.json", sha256=self.write(f"graphs/{stem}.json", draft.text.encode())))
            if graph.constants:
                name = f"graphs/{stem}.safetensors"
                specs = [TensorSpec(key, tuple(t.shape), t.dtype) for key, t in graph.constants.items()]
                self.written.append(self.out / name)
                files.append(FileRecord(file=name, sha256=write_weights(self.out / name, specs, graph.constants.__getitem__)))
        else:
            from ldmrt.export.onnx import write_onnx

            file = WeightFile(self.out / self.weights[weights].file)
            self.written.append(self.out / f"{stem}.onnx")
            digest = write_onnx(graph, {name: file for name in graph.weights}, self.out / f"{stem}.onnx")
            files.append(FileRecord(file=f"{stem}.onnx", sha256=digest))
        return EngineRecord(
            component=graph.name,
            kind=kind,  # type: ignore[arg-type]
            dtype=self.options.dtype,  # type: ignore[arg-type]
            size=draft.size,
            rows=draft.rows,
            key=key,
            files=tuple(files),
            weights=weights,
            versions=self.versions(draft),
            certificate=Certificate(status="unverified", reference="", relative_error={}, tolerance=0.0),
        )

    def verify(
        self, component: Component, checkpoint: Checkpoint, records: list[EngineRecord], trials: list[Trial]
    ) -> list[EngineRecord]:
        """Run the engines as the runtime would and compare them with the original module."""
        bundle = Bundle(self.out, self.draft_manifest())
        engines = {id(record): bundle.load(record, torch.device("cpu")) for record in records}
        found: dict[int, list[dict[str, torch.Tensor]]] = {}
        by_name = {record.component: engines[id(record)] for record in records}
        for record in records:
            engine = engines[id(record)]
            if record.component == "step":
                context, schedule = by_name["context"], by_name["schedule"]
                found[id(record)] = [_by_rows(trial, record.rows, lambda inputs, e=engine: run_denoiser(context, schedule, e, inputs)) for trial in trials]
            elif record.component not in ("context", "schedule"):
                found[id(record)] = [_by_rows(trial, record.rows, lambda inputs, e=engine: run_engine(e, inputs)) for trial in trials]
        del engines, by_name, bundle
        reference = architectures.reference(component, checkpoint)
        expected = reference_outputs(reference, trials, component.outputs)
        original = type(reference.module).__name__
        library = "transformers" if component.folder == "text_encoder" else "diffusers"
        note = f"{library} {importlib.metadata.version(library)} {original}, float32"
        certificates: dict[int, Certificate] = {}
        for record in records:
            if id(record) in found:
                certificates[id(record)] = certify(record.label, record.dtype, trials, found[id(record)], expected, note)
        # The parts of a network that run once per request are verified within the whole network.
        whole = next(iter(certificates.values()))
        return [record.model_copy(update={"certificate": certificates.get(id(record), whole)}) for record in records]

    # ------------------------------------------------------------------------------------------------ weights

    @property
    def in_place(self) -> bool:
        """Whether the bundle is the model's own folder."""
        return self.out.resolve() == self.source.path.resolve()

    def weights_for(self, folder: str, checkpoint: Checkpoint) -> str:
        """The weight file that a component's engines read, written if it is not there. Returns its name in the manifest."""
        dtype = dtype_of(self.options.dtype)
        if self.in_place and len(checkpoint.files) == 1 and self.options.engine == "torch":
            path = checkpoint.files[0].path
            self.weights[folder] = FileRecord(file=path.relative_to(self.source.path).as_posix(), sha256=self.source_hash(path))
            return folder
        name = f"{folder}.{self.options.dtype}"
        if name in self.weights:
            return name
        file = f"weights/{name}.safetensors"
        path = self.out / file
        if self.old is not None and name in self.old.weights and path.is_file() and sha256(path) == self.old.weights[name].sha256:
            self.weights[name] = self.old.weights[name]
            return name
        path.parent.mkdir(exist_ok=True)
        keys = {key: module_name for module_name, (_, key) in checkpoint.keys.items()}
        specs = [
            TensorSpec(key, file_.entries[key].shape, dtype if file_.entries[key].dtype.is_floating_point else file_.entries[key].dtype)
            for file_, key in checkpoint.keys.values()
        ]
        types = {spec.name: spec.dtype for spec in specs}
        self.written.append(path)
        digest = write_weights(path, specs, lambda key: checkpoint.load(keys[key]).to(types[key]))
        self.weights[name] = FileRecord(file=file, sha256=digest)
        return name

    def hash_source(self) -> Iterator[FileRecord]:
        """Hashes of the model's files."""
        root = self.source.path
        paths = [root / "scheduler" / "scheduler_config.json"]
        for folder in ("text_encoder", "unet", "vae"):
            paths += [root / folder / "config.json", *self.source.weight_files(folder)]
        for path in paths:
            yield FileRecord(file=path.relative_to(root).as_posix(), sha256=sha256(path))

    def source_hash(self, path: Path) -> str:
        """The hash of one of the model's files."""
        name = path.relative_to(self.source.path).as_posix()
        return next(record.sha256 for record in self.source_files if record.file == name)

    # ------------------------------------------------------------------------------------------------ the folder

    def write(self, name: str, data: bytes) -> str:
        """Write a file of the bundle; it is removed again if the build fails."""
        path = self.out / name
        if not path.exists():
            self.written.append(path)
        return write_atomically(path, data)

    def previous(self) -> Manifest | None:
        """The manifest that is there, if this version can read it."""
        if not (self.out / MANIFEST).is_file():
            return None
        return Bundle.open(self.out).manifest

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second build out of the folder."""
        path = self.out / ".lock"
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BuildError(f"another build is writing to {self.out}; wait for it, or choose another --out") from error
            try:
                yield
            finally:
                path.unlink(missing_ok=True)

    def check_space(self) -> None:
        """Refuse to start what the disk cannot hold."""
        itemsize = dtype_of(self.options.dtype).itemsize
        needed = 64 << 20
        if not (self.in_place and self.options.engine == "torch"):
            for folder in ("text_encoder", "unet", "vae"):
                for path in self.source.weight_files(folder):
                    needed += sum(e.nbytes // e.dtype.itemsize * itemsize for e in WeightFile(path).entries.values())
        free = shutil.disk_usage(self.out).free
        if free < needed:
            raise BuildError(f"{self.out} needs {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free; make room or choose another --out")

    def model_record(self, tokenizer: str) -> ModelRecord:
        """What the runtime must know."""
        width, height = self.options.sizes[0]
        if self.old is not None:
            width, height = self.old.model.defaults.width, self.old.model.defaults.height
        given = self.source.defaults
        return ModelRecord(
            kind="stable-diffusion",
            name=self.source.name,
            latent_channels=int(self.source.configs["vae"].get("latent_channels", 4)),
            downscale=architectures.downscale(self.source),
            tokenizer=tokenizer,
            schedule=NoiseSchedule.from_config(self.source.configs["scheduler"]).to_dict(),
            defaults=Defaults(
                width=width,
                height=height,
                num_inference_steps=int(given.get("num_inference_steps", 50)),
                guidance_scale=float(given.get("guidance_scale", 7.5)),
            ),
        )

    def draft_manifest(self) -> Manifest:
        """Enough of a manifest to load engines that are not yet certified."""
        return Manifest(
            format=FORMAT,
            ldmrt=ldmrt.__version__,
            model=self.model_record("tokenizer"),
            source=(),
            tokenizer_files=(),
            weights=self.weights,
            engines=(),
        )

    def progress(self, what: str) -> None:
        """Say what comes next."""
        self.on_progress(what, self.done, self.total)
        self.done += 1


@dataclass(frozen=True)
class _Draft:
    """A graph that becomes an engine."""

    graph: Graph
    size: tuple[int, int] | None
    rows: int | None

    @property
    def text(self) -> str:
        return to_json(self.graph)

    @property
    def text_hash(self) -> str:
        return hashlib.sha256(self.text.encode()).hexdigest()


def _slot(record: EngineRecord) -> tuple[Any, ...]:
    return record.component, record.kind, record.dtype, record.size, record.rows


def _by_rows(trial: Trial, rows: int | None, run: Callable[[Mapping[str, torch.Tensor]], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Run a trial through an engine of `rows` rows: in slices, the last one filled up by repetition."""
    count = next(iter(trial.inputs.values())).shape[0]
    if rows is None:
        return run(trial.inputs)
    parts: list[dict[str, torch.Tensor]] = []
    for start in range(0, count, rows):
        index = torch.arange(start, start + rows) % count
        result = run({name: tensor[index] for name, tensor in trial.inputs.items()})
        parts.append({name: tensor[: count - start] for name, tensor in result.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def _cast(inputs: Sequence[TensorSpec], dtype: torch.dtype) -> list[TensorSpec]:
    """Network inputs in the engine's precision; ids and timesteps keep theirs."""
    return [
        TensorSpec(spec.name, spec.shape, dtype if spec.dtype.is_floating_point and spec.name != "timesteps" else spec.dtype)
        for spec in inputs
    ]


def _with_buffers(graph: Graph) -> Graph:
    """With the buffers that no file holds as constants: CLIP's position ids, 0 to n - 1."""
    found = {name: spec for name, spec in graph.weights.items() if name.endswith("position_ids")}
    constants = {name: torch.arange(int(spec.shape[-1])).reshape([int(size) for size in spec.shape]) for name, spec in found.items()}
    return graph.replace(
        weights={name: spec for name, spec in graph.weights.items() if name not in found},
        constants={**graph.constants, **constants},
    )


def _with_file_keys(graph: Graph, checkpoint: Checkpoint) -> Graph:
    """With every weight under the name that it has in the weight file."""
    names = {name: checkpoint.keys[name.removeprefix(PREFIX)][1] for name in graph.weights}
    return rename_values(graph, names)


def _installed(name: str) -> bool:
    try:
        importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True

