"""From a model to a bundle: capture, passes, engines, verification, and a manifest put in place last."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from threading import Event
from typing import Any, TypeVar

import torch

import ldmrt
from ldmrt.bundle import Bundle
from ldmrt.components import CONTROLLED_STEP, CONTROLNET, STEP, runs_once
from ldmrt.engines.protocol import TensorSpec
from ldmrt.engines.tensorrt import LIBRARIES
from ldmrt.errors import BuildError
from ldmrt.export import architectures
from ldmrt.export.audit import audit, too_large
from ldmrt.export.certificates import certified
from ldmrt.export.compile import compile_component
from ldmrt.export.component import PREFIX, Component
from ldmrt.export.controlnets import with_controlnets
from ldmrt.export.cubins import architecture, compile_kernels
from ldmrt.export.folder import BundleFolder
from ldmrt.export.hub import is_id
from ldmrt.export.options import Options
from ldmrt.export.passes.widen import widen
from ldmrt.export.plugins import Layer, layers, plugins_of, register
from ldmrt.export.resolve import resolve
from ldmrt.export.source import LOW_RES_SCHEDULER, Checkpoint, Source
from ldmrt.export.verify import reference_outputs
from ldmrt.graph import Graph, dtype_of, rename_values, specialize, to_json
from ldmrt.kernels.aot import write as write_cubins
from ldmrt.manifest import (
    FORMAT,
    AuditRecord,
    Certificate,
    ControlNetRecord,
    Defaults,
    EngineRecord,
    FileRecord,
    LoraRecord,
    Manifest,
    ModelRecord,
    UpscalingRecord,
    engine_key,
)
from ldmrt.schedule import NoiseSchedule
from ldmrt.verify import Trial
from ldmrt.weights import WeightFile, sha256, write as write_weights

OnProgress = Callable[[str, int, int], None]
_Made = TypeVar("_Made")

# What diffusers gives a picture that is to be drawn larger.
NOISE_LEVEL = 20

_LIBRARIES = ("torch", "diffusers", "transformers", "onnx", "onnxscript", "onnxruntime")


def build_engines(
    model: str | Path,
    out: str | Path,
    *,
    engine: str = "auto",
    sizes: Sequence[tuple[int, int]] | None = None,
    batch_sizes: Sequence[int] = (1,),
    dtype: str = "auto",
    targets: Sequence[str] = (),
    optimization_level: int | None = None,
    workspace: int | None = None,
    refit: bool = False,
    weight_streaming: bool = False,
    plugins: bool = False,
    loras: Sequence[tuple[str | Path, float]] = (),
    base: str | Path | None = None,
    vae: str | Path | None = None,
    variant: str | None = None,
    revision: str | None = None,
    controlnets: Sequence[str | Path] = (),
    config: str | Path | None = None,
    tokenizer: str | Path | None = None,
    decoder_tile: int | None = None,
    on_progress: OnProgress | None = None,
) -> Bundle:
    """Compile a model into a bundle, or add engines to the bundle that is there.

    Args:
        model: folder of a model in the diffusers layout, safetensors file in the original one, or id on the Hub (see `export.resolve`).
        out: the bundle's folder. If it is the model's own, the weights are used where they lie and are not written again.
        engine: `auto` (torch), `torch`, `onnxruntime` (CPU, float32), `tensorrt` (for the GPU at hand) or `tensorrt-rtx` (for any of
            its GPUs, whether it is there or not). `context` and `schedule` are on the torch engine in any case.
        sizes: (width, height) in pixels; the model's own size if None.
        batch_sizes: images per call to make engines for.
        dtype: precision; `auto` is float16 with targets, else bfloat16 on a CPU that computes in it, else float32.
        targets: GPU architectures (`sm_89`) to compile TensorRT plans and the torch engine's kernels for. No GPU is needed, and on one
            of these neither Triton nor a compiler will be. Without targets plans are built for the GPU at hand, and the torch engine
            uses Triton, if it is installed, when it runs on a GPU.
        optimization_level: how long TensorRT searches for fast kernels, 0 to 5; its own default if None.
        workspace: the most memory in bytes that a layer of a TensorRT plan may use besides its tensors; no limit if None.
        refit: build TensorRT plans whose weights can be changed, with `Pipeline.load_lora` and `update_weights`. Needs the GPU; not yet
            run on one.
        weight_streaming: build TensorRT plans that can leave weights in the host's memory (`Pipeline.from_bundle(weight_budget=...)`).
            They are not captured in CUDA graphs. Not yet run on a GPU.
        plugins: have TensorRT plans run our kernels for attention and group norm (engine `tensorrt`). Needs the GPU; not yet run on one.
        loras: LoRA files to fuse into the weights, each with its scale. A bundle holds the weights of one set of LoRAs.
        base: the model that has what a file, or the folder of a U-Net, does not: folder, file or id on the Hub.
        vae: the VAE to take instead of the model's own: folder, file or id on the Hub.
        variant: which copy of the weights to take where there are several, such as `fp16`.
        revision: branch, tag or commit of an id on the Hub.
        controlnets: folders of ControlNets to make engines of, and a step of the U-Net that reads them. They are added to those that
            the bundle has.
        config: the YAML file of a model of the original code of latent diffusion, where the model is not a known one.
        tokenizer: the folder of its tokenizer, where it reads text.
        decoder_tile: side in pixels of the square tiles that larger pictures can be decoded in where memory is scarce
            (`Pipeline.from_bundle(memory_budget=...)`); a decoder of that size is made besides.
        on_progress: called with (what is being done, steps done, steps in all).

    Returns:
        The opened bundle.

    Raises:
        BuildError: the model cannot be built; nothing of the failed build is left behind.
        EngineMismatch: the engine's library is not installed, or is too old.
        BundleError: a weight file is damaged.
    """
    _require("diffusers", "transformers")
    report = on_progress or (lambda _what, _done, _total: None)
    if is_id(model):
        report(f"fetching {model} from the Hub", 0, 1)
    source = resolve(
        model,
        base=base,
        vae=vae,
        variant=variant,
        revision=revision,
        config=None if config is None else Path(config),
        tokenizer=None if tokenizer is None else Path(tokenizer),
    )
    if loras:
        source = source.with_loras(loras)
    source = with_controlnets(source, controlnets)
    options = Options.resolve(
        source,
        engine=engine,
        sizes=sizes,
        batch_sizes=batch_sizes,
        dtype=dtype,
        targets=targets,
        optimization_level=optimization_level,
        workspace=workspace,
        refit=refit,
        weight_streaming=weight_streaming,
        decoder_tile=decoder_tile,
        plugins=plugins,
    )
    if options.kernel_targets:
        _require("triton")
    if options.engine != "torch":
        _require("onnx", "onnxscript", "onnxruntime")
    return _Build(source, BundleFolder(Path(out)), options, report).run()


@dataclass(frozen=True)
class _Draft:
    """A graph that becomes an engine."""

    graph: Graph
    size: tuple[int, int] | None
    rows: int | None
    dtype: str

    @cached_property
    def text(self) -> str:
        return to_json(self.graph)


@dataclass
class _Build:
    source: Source
    folder: BundleFolder
    options: Options
    on_progress: OnProgress
    source_files: tuple[FileRecord, ...] = ()
    loras: tuple[LoraRecord, ...] = ()
    controlnets: tuple[ControlNetRecord, ...] = ()
    weights: dict[str, FileRecord] = field(default_factory=dict)
    engines: list[EngineRecord] = field(default_factory=list)
    kernels: tuple[FileRecord, ...] = ()
    passes: dict[str, dict[str, int]] = field(default_factory=dict)
    audits: list[AuditRecord] = field(default_factory=list)
    done: int = 0
    total: int = 0

    @property
    def in_place(self) -> bool:
        """Whether the bundle is the model's own folder."""
        return self.folder.path.resolve() == self.source.path.resolve() and not self.source.parts

    def run(self) -> Bundle:
        """Build all components."""
        with self.folder.open():
            components = list(architectures.components(self.source, self.options.sizes, self.options.decoder_tile))
            self.total = 2 * len(components) + (3 if self.options.kernel_targets else 2)
            self.progress("reading the model")
            if self.source.loras and self.in_place:
                raise BuildError(
                    f"{self.folder.path} is the model's own folder, whose weights are used where they lie and cannot hold a LoRA; "
                    "choose another --out"
                )
            self.folder.need(self.space())
            self.source_files = self.hash_source()
            old = self.folder.old
            if old is not None and old.source != self.source_files:
                raise BuildError(
                    f"{self.folder.path} holds a bundle of another model ({old.model.name}), or the model has changed since; "
                    "choose another --out, or remove it"
                )
            self.loras = tuple(
                LoraRecord(file=lora.path.name, sha256=sha256(lora.path), scale=scale)
                for lora, scale in self.source.loras
            )
            if old is not None and old.loras != self.loras:
                raise BuildError(
                    f"{self.folder.path} holds a bundle with {_named(old.loras)} fused, this build is with {_named(self.loras)}; "
                    "choose another --out, or remove it"
                )
            self.controlnets = self.known_controlnets()
            for size, component, trials in components:
                self.build_component(size, component, trials)
            self.compile_kernels()
            self.progress("writing the manifest")
            self.folder.commit(self.manifest(self.copy_tokenizer()))
        self.on_progress("done", self.total, self.total)
        return Bundle.open(self.folder.path)

    def progress(self, what: str) -> None:
        """Say what comes next."""
        self.on_progress(what, self.done, self.total)
        self.done += 1

    # ------------------------------------------------------------------------------------------------ one component

    def build_component(
        self, size: tuple[int, int] | None, component: Component, trials: Callable[[], list[Trial]]
    ) -> None:
        """Capture one component, make its engines, and compare them with the original."""
        label = component.name + (f" {size[0]}x{size[1]}" if size else "")
        self.progress(f"{label}: compiling")
        precision = self.precision(component.folder)
        checkpoint = Checkpoint(self.source, component.folder, component.original)
        weights = self.weights_for(component.folder, checkpoint)
        trials = cache(trials)
        compiled = compile_component(
            component,
            dtype_of(precision),
            fused=self.options.engine == "torch",
            plugins=self.options.plugins,
            prepare=lambda graph: _with_file_keys(_with_buffers(graph), checkpoint),
            fit=lambda graph: self.fit(_Draft(graph, size, None, precision), label, checkpoint, weights, trials),
        )
        self.passes[component.name] = dict(compiled.passes)
        if precision == "float16":
            self.passes[component.name]["widened"] = len(self.audits[-1].widened)
        drafts = [_Draft(*draft, precision) for draft in self.drafts(component, compiled.graphs, size)]
        keys = [self.key(draft, weights) for draft in drafts]
        reused = [self.made(draft) or self.reusable(key) for draft, key in zip(drafts, keys, strict=True)]
        if all(reused):
            self.keep([record for record in reused if record])
            self.progress(f"{label}: already built")
            return
        # What stands in for a plan that cannot run here is slow, and so is the original of a large model: an entry of real inputs must do.
        if self.options.for_absent_gpus:
            tried = [trial.first() for trial in trials() if trial.kind == "real"]
        else:
            tried = [trial for trial in trials() if trial.kind in ("random", "real")]
        with _beside(
            partial(reference_outputs, architectures.reference(component, checkpoint), tried, component.outputs)
        ) as expected:
            records = [
                record or self.write_engine(draft, key, weights)
                for draft, key, record in zip(drafts, keys, reused, strict=True)
            ]
            self.progress(f"{label}: verifying")
            bundle = Bundle(self.folder.path, self.manifest(()))
            self.keep(certified(self.folder, bundle, component, checkpoint, records, tried, expected()))

    def fit(
        self, draft: _Draft, label: str, checkpoint: Checkpoint, weights: str, trials: Callable[[], list[Trial]]
    ) -> Graph:
        """A component's graph with what an audit finds too large for float16 in float32; says and records what that is."""
        if draft.dtype != "float16":
            return draft.graph
        key = self.key(draft, weights)
        old = self.folder.old.audits if self.folder.old is not None else ()
        found = next((record for record in old if record.key == key), None)
        if found is None:
            modules = {key: module for module, (_, key) in checkpoint.keys.items()}
            # What random inputs reach, the extreme ones exceed; and of real ones an entry stands for the others.
            tried = [trial.first() if trial.kind == "real" else trial for trial in trials() if trial.kind != "random"]
            ranges = audit(draft.graph, lambda name: checkpoint.read(modules[name], torch.float32), tried)
            widened = {name: float(f"{largest:.3g}") for name, largest in too_large(ranges).items()}
            found = AuditRecord(
                component=draft.graph.name, kind=self.options.engine, size=draft.size, key=key, widened=widened
            )
        self.audits.append(found)
        if found.widened:
            count, largest = len(found.widened), max(found.widened.values())
            what = (
                f"{label}: {count} values of up to {largest:.3g} are too large for float16, computing them in float32"
            )
            self.on_progress(what, self.done - 1, self.total)
        return widen(draft.graph, found.widened)

    def precision(self, folder: str) -> str:
        """The precision of a component. Stable Diffusion XL's VAE overflows float16; its makers run it in float32."""
        narrow = self.options.dtype == "float16" and folder == "vae"
        upcast = narrow and self.source.kind.upcast_vae and self.source.configs["vae"].get("force_upcast", True)
        # What is rounded may fall to another code.
        quantized = folder == "vae" and self.source.is_quantized
        return "float32" if upcast or quantized else self.options.dtype

    def drafts(
        self, component: Component, graphs: Sequence[Graph], size: tuple[int, int] | None
    ) -> list[tuple[Graph, tuple[int, int] | None, int | None]]:
        """The graphs to make engines of, each with its size and row count."""
        text = component.folder in self.source.kind.tokenizers
        if text and not self.options.is_tensorrt:
            return [(graph, size, None) for graph in graphs]
        *whole, last = graphs
        if text:
            return [(specialize(last, {"rows": 1}), size, 1)]
        # With guidance an image takes two rows of the denoising network, without it one.
        reads_text = bool(component.kinds and self.source.kind.tokenizers)
        classes = bool(component.kinds) and self.source.null_class is not None
        guided = (reads_text or classes) and self.source.guidance_embedding is None
        factors = (1, 2) if guided else (1,)
        if guided and self.options.is_tensorrt:
            # Each plan holds the weights again: one for each batch size, for the guidance that the model is used with. One for guidance
            # also serves without, two images at a time.
            factors = (2,) if self.source.guidance_scale > 1 else (1,)
        rows = sorted({factor * batch for batch in self.options.batch_sizes for factor in factors})
        fixed = {"tokens": architectures.tokens(self.source)} if self.options.is_tensorrt and reads_text else {}
        sized = [(specialize(last, {"rows": count, **fixed}), size, count) for count in rows]
        # What runs once per request is for every size, unless it reads a picture.
        pictures = [any(len(spec.shape) == 4 for spec in graph.inputs) for graph in whole]
        once = [(graph, size if has else None, None) for graph, has in zip(whole, pictures, strict=True)]
        return [*once, *sized]

    def kind(self, component: str) -> str:
        """What runs once per request is on the torch engine, whatever runs the rest."""
        return "torch" if runs_once(component) else self.options.engine

    def versions(self, kind: str) -> dict[str, str]:
        """The libraries that have a say in an engine."""
        used = _LIBRARIES[:3] if kind == "torch" else _LIBRARIES
        versions = {"ldmrt": ldmrt.__version__} | {name: importlib.metadata.version(name) for name in used}
        return versions | ({kind: str(LIBRARIES[kind].load().__version__)} if kind in LIBRARIES else {})

    def key(self, draft: _Draft, weights: str) -> str:
        """The engine's key."""
        kind = self.kind(draft.graph.name)
        plugins = [plugin.name for plugin in plugins_of(self.layers(draft))]
        constants = hashlib.sha256()
        for name, tensor in sorted(draft.graph.constants.items()):
            constants.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        return engine_key(
            {
                "graph": hashlib.sha256(draft.text.encode()).hexdigest(),
                "constants": constants.hexdigest(),
                "weights": self.weights[weights].sha256,
                "kind": kind,
                "dtype": draft.dtype,
                "size": draft.size,
                "rows": draft.rows,
                "versions": self.versions(kind),
                **self.plan_options(kind),
                **({"plugins": plugins, "triton": importlib.metadata.version("triton")} if plugins else {}),
            }
        )

    def plan_options(self, kind: str) -> dict[str, Any]:
        """What shapes a plan besides its graph; nothing for engines of other kinds, whose keys stay what they were."""
        if kind not in LIBRARIES:
            return {}
        asked = {"refit": self.options.refit, "weight_streaming": self.options.weight_streaming}
        return {
            "targets": self.options.targets,
            "optimization_level": self.options.optimization_level,
            "workspace": self.options.workspace,
            **{name: value for name, value in asked.items() if value},
        }

    def layers(self, draft: _Draft) -> dict[str, tuple[Layer, ...]]:
        """The layers of a plan that are our kernels, by node; none before its rows are fixed."""
        if not self.options.plugins or draft.rows is None:
            return {}
        return layers(draft.graph, architecture(self.options.targets[0]))

    def made(self, draft: _Draft) -> EngineRecord | None:
        """The engine from this build that serves every size, if another size's component made it."""
        if draft.size is not None:
            return None
        return next((engine for engine in self.engines if engine.component == draft.graph.name), None)

    def keep(self, records: list[EngineRecord]) -> None:
        """Add engines, each once."""
        present = {_slot(record) for record in self.engines}
        self.engines += [record for record in records if _slot(record) not in present]

    def reusable(self, key: str) -> EngineRecord | None:
        """The engine that is there already, if it is the same and undamaged."""
        old = self.folder.old.engines if self.folder.old is not None else ()
        return next((e for e in old if e.key == key and all(map(self.folder.holds, e.all_files))), None)

    def write_engine(self, draft: _Draft, key: str, weights: str) -> EngineRecord:
        """Write an engine's files; the certificate is still to come."""
        graph, kind = draft.graph, self.kind(draft.graph.name)
        size = [f"{draft.size[0]}x{draft.size[1]}"] if draft.size else []
        rows = [f"r{draft.rows}"] if draft.rows else []
        stem = "-".join([graph.name, *size, *rows, draft.dtype, key[:8]])
        if kind == "torch":
            files = [self.folder.write_bytes(f"graphs/{stem}.json", draft.text.encode())]
            if graph.constants:
                specs = [TensorSpec(name, tuple(t.shape), t.dtype) for name, t in graph.constants.items()]
                load = graph.constants.__getitem__
                name = f"graphs/{stem}.safetensors"
                files.append(self.folder.write(name, lambda path: write_weights(path, specs, load)))
        else:
            from ldmrt.export.onnx import write_onnx

            file = WeightFile(self.folder.path / self.weights[weights].file)
            held = dict.fromkeys(graph.weights, file)
            ours = self.layers(draft)
            files = [self.folder.write(f"{stem}.onnx", lambda path: write_onnx(graph, held, path, ours))]
            if ours:
                register(LIBRARIES[kind], plugins_of(ours))
            if kind in LIBRARIES:
                files.insert(0, self.write_plan(kind, stem, graph.name))
        return EngineRecord(
            component=graph.name,
            kind=kind,
            dtype=draft.dtype,
            size=draft.size,
            rows=draft.rows,
            key=key,
            files=tuple(files),
            weights=weights,
            targets=self.options.targets if kind in LIBRARIES else (),
            refit=self.options.refit and kind in LIBRARIES,
            weight_streaming=self.options.weight_streaming and kind in LIBRARIES,
            versions=self.versions(kind),
            certificate=Certificate(status="unverified", reference="", relative_error={}, tolerance=0.0),
        )

    def write_plan(self, kind: str, stem: str, component: str) -> FileRecord:
        """Build the plan of the ONNX file that has been written."""
        from ldmrt.export.tensorrt import build_plan, give_memory_back

        def show(phase: str, done: int, total: int) -> None:
            self.on_progress(f"{component}: {kind}, {phase} {done}/{total}", self.done - 1, self.total)

        def write(path: Path) -> str:
            onnx = self.folder.path / f"{stem}.onnx"
            build_plan(LIBRARIES[kind], onnx, path, on_phase=show, **self.plan_options(kind))
            give_memory_back()
            return sha256(path)

        return self.folder.write(f"plans/{stem}.plan", write)

    def compile_kernels(self) -> None:
        """Compile the kernels of all the bundle's engines for the targets, and for those it has kernels for already."""
        old = self.folder.old
        self.kernels = old.kernels if old is not None else ()
        if not self.options.kernel_targets:
            return
        self.progress(f"kernels for {', '.join(self.options.kernel_targets)}: compiling")
        bundle = Bundle(self.folder.path, self.manifest(()))
        graphs = [bundle.graph(record) for record in bundle.manifest.engines if record.kind == "torch"]
        there = bundle.cubins()
        targets = {*self.options.kernel_targets, *(f"sm_{cubin.arch}" for cubin in there)}
        cubins = compile_kernels(graphs, sorted(targets, key=architecture), there, self.latents_of_plans())
        digest = hashlib.sha256("".join(sorted(cubin.file_name for cubin in cubins)).encode()).hexdigest()[:8]
        with tempfile.TemporaryDirectory() as folder:
            files = write_cubins(Path(folder), cubins)
            self.kernels = tuple(
                self.folder.write_bytes(f"kernels-{digest}/{path.name}", path.read_bytes()) for path in files
            )

    def latents_of_plans(self) -> list[TensorSpec]:
        """The latents of the steps that are plans."""
        channels = int(self.source.configs["vae"].get("latent_channels", 4))
        factor = architectures.downscale(self.source)
        return [
            TensorSpec("latents", (r.rows or 1, channels, r.size[1] // factor, r.size[0] // factor), dtype_of(r.dtype))
            for r in self.manifest(()).engines
            if r.component in (STEP, CONTROLLED_STEP) and r.kind in LIBRARIES and r.size is not None
        ]

    # ------------------------------------------------------------------------------------------------ files

    def space(self) -> int:
        """Bytes that the bundle will need."""
        copies = sum(
            entry.nbytes // entry.dtype.itemsize * dtype_of(self.precision(folder)).itemsize
            for folder in (*self.source.folders, *self.source.controlnets)
            for file in self.source.weights(folder)
            for entry in file.entries.values()
        )
        return (64 << 20) + (0 if self.in_place and self.options.engine == "torch" else copies)

    def hash_source(self) -> tuple[FileRecord, ...]:
        """The model's files and their hashes."""
        source, digest = self.source, cache(sha256)  # one file may hold several components
        files = {f"{name}/scheduler_config.json": source.config_file(name) for name in source.kind.schedulers}
        for folder in source.folders:
            where = source.kind.folders.get(folder, folder)
            files[f"{where}/config.json"] = source.config_file(folder)
            files |= {f"{where}/{file.path.name}": file.path for file in source.weights(folder)}
        files |= self.tokenizer_paths()
        return tuple(FileRecord(file=name, sha256=digest(path)) for name, path in files.items())

    def known_controlnets(self) -> tuple[ControlNetRecord, ...]:
        """The bundle's ControlNets and this build's, each with the hashes of its files.

        Raises:
            BuildError: the bundle has another ControlNet of the same name.
        """
        old = self.folder.old
        known = {record.name: record for record in (old.controlnets if old is not None else ())}
        for folder, root in self.source.controlnets.items():
            name = folder.removeprefix(CONTROLNET)
            paths = [root / "config.json", *(weights.path for weights in self.source.weights(folder))]
            record = ControlNetRecord(
                name=name, files=tuple(FileRecord(file=path.name, sha256=sha256(path)) for path in paths)
            )
            if known.setdefault(name, record) != record:
                raise BuildError(
                    f"{self.folder.path} holds another ControlNet called {name}; rename the folder {root}, or choose another --out"
                )
        return tuple(known.values())

    def tokenizer_paths(self) -> dict[str, Path]:
        """The tokenizers' files in the model, by their names in the bundle."""
        return {
            f"{folder}/{path.name}": path
            for encoder, folder in self.source.kind.tokenizers.items()
            for path in sorted(self.source.tokenizer_folder(encoder).iterdir())
            if path.suffix in (".json", ".txt") and path.is_file()
        }

    def weights_for(self, folder: str, checkpoint: Checkpoint) -> str:
        """The weight file that a component's engines read, written if need be. Returns its name in the manifest."""
        mapped = self.in_place and folder in self.source.folders and self.options.engine == "torch"
        if mapped and len(checkpoint.files) == 1:
            name = checkpoint.files[0].path.relative_to(self.source.path).as_posix()
            self.weights[folder] = next(record for record in self.source_files if record.file == name)
            return folder
        precision = self.precision(folder)
        name = f"{folder}.{precision}"
        old = self.folder.old.weights.get(name) if self.folder.old is not None else None
        if name not in self.weights and old is not None and self.folder.holds(old):
            self.weights[name] = old
        if name not in self.weights:
            modules_name = {key: module_name for module_name, (_, key) in checkpoint.keys.items()}
            dtype = dtype_of(precision)
            specs = [TensorSpec(key, file.entries[key].shape, dtype) for file, key in checkpoint.keys.values()]

            def load(key: str) -> torch.Tensor:
                return checkpoint.read(modules_name[key], dtype)

            path = f"weights/{name}.safetensors"
            self.weights[name] = self.folder.write(path, lambda path: write_weights(path, specs, load))
        return name

    def upscaling(self) -> UpscalingRecord | None:
        """What the model takes besides a picture that it draws larger."""
        source = self.source
        if not source.kind.upscaling or not source.is_noised:
            return UpscalingRecord() if source.kind.upscaling else None
        schedule = NoiseSchedule.from_config(source.configs[LOW_RES_SCHEDULER]).to_dict()
        level = min(NOISE_LEVEL, source.max_noise_level)
        return UpscalingRecord(schedule=schedule, noise_level=level, max_noise_level=source.max_noise_level)

    def copy_tokenizer(self) -> tuple[FileRecord, ...]:
        """The tokenizers' files, in the bundle."""
        files = []
        for name, path in self.tokenizer_paths().items():
            if self.in_place:
                files.append(FileRecord(file=name, sha256=sha256(path)))
            else:
                files.append(self.folder.write_bytes(name, path.read_bytes()))
        return tuple(files)

    def manifest(self, tokenizer_files: tuple[FileRecord, ...]) -> Manifest:
        """The manifest: the new engines, and the old ones that none of them replaces."""
        old = self.folder.old
        replaced = {_slot(engine) for engine in self.engines}
        audited = {(audit.component, audit.kind, audit.size) for audit in self.audits}
        kept = [engine for engine in (old.engines if old else ()) if _slot(engine) not in replaced]
        width, height = self.options.sizes[0]
        if old is not None:
            width, height = old.model.defaults.width, old.model.defaults.height
        return Manifest(
            format=FORMAT,
            ldmrt=ldmrt.__version__,
            model=ModelRecord(
                kind=self.source.kind.name,
                name=self.source.name,
                latent_channels=int(self.source.configs["vae"].get("latent_channels", 4)),
                downscale=architectures.downscale(self.source),
                tokenizers=dict(self.source.kind.tokenizers),
                zero_empty_negative=self.source.zero_empty_negative,
                inpainting=self.source.kind.inpainting,
                requires_aesthetics_score=self.source.kind.requires_aesthetics_score,
                masked_pixel=self.source.kind.masked_pixel,
                upscaling=self.upscaling(),
                classes=None if self.source.is_noised else self.source.labels,
                null_class=self.source.null_class,
                segments=self.source.segments,
                layout=self.source.layout,
                guidance_embedding=self.source.guidance_embedding,
                scaling_factor=architectures.scaling(self.source)[0],
                shift_factor=architectures.scaling(self.source)[1],
                schedule=NoiseSchedule.from_config(self.source.configs["scheduler"]).to_dict(),
                defaults=Defaults(
                    width=width,
                    height=height,
                    num_inference_steps=self.source.num_inference_steps,
                    guidance_scale=self.source.guidance_scale,
                    sampler=self.source.sampler,
                ),
            ),
            source=self.source_files,
            loras=self.loras,
            controlnets=self.controlnets,
            tokenizer_files=tokenizer_files,
            weights={**(old.weights if old else {}), **self.weights},
            engines=(*kept, *self.engines),
            kernels=self.kernels,
            passes={**(old.passes if old else {}), **self.passes},
            audits=(
                *(a for a in (old.audits if old else ()) if (a.component, a.kind, a.size) not in audited),
                *self.audits,
            ),
        )


@contextmanager
def _beside(work: Callable[[Event], _Made]) -> Iterator[Callable[[], _Made]]:
    """Run `work(stop)` on a thread of its own while the caller writes engines, which keeps one core busy.

    Gives what waits for its result. `stop` is set if the caller fails.
    """
    stop = Event()
    with ThreadPoolExecutor(1, "ldmrt-reference") as pool:
        try:
            yield pool.submit(work, stop).result
        except BaseException:
            stop.set()
            raise


def _slot(record: EngineRecord) -> tuple[Any, ...]:
    return record.component, record.kind, record.dtype, record.size, record.rows


def _named(loras: tuple[LoraRecord, ...]) -> str:
    """How to call a set of LoRAs in a message."""
    return ", ".join(f"{lora.file}:{lora.scale:g}" for lora in loras) or "no LoRA"


def _with_buffers(graph: Graph) -> Graph:
    """With the buffers that no file holds as constants: CLIP's position ids, 0 to n - 1."""
    found = {name: spec for name, spec in graph.weights.items() if name.endswith("position_ids")}
    shapes = {name: [int(size) for size in spec.shape] for name, spec in found.items()}
    return graph.replace(
        weights={name: spec for name, spec in graph.weights.items() if name not in found},
        constants={**graph.constants, **{n: torch.arange(shape[-1]).reshape(shape) for n, shape in shapes.items()}},
    )


def _with_file_keys(graph: Graph, checkpoint: Checkpoint) -> Graph:
    """With every weight under the name that it has in the weight file."""
    return rename_values(graph, {name: checkpoint.keys[name.removeprefix(PREFIX)][1] for name in graph.weights})


def _require(*packages: str) -> None:
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        extra = missing[0] if missing in (["onnxruntime"], ["triton"]) else "export"
        raise BuildError(f"building these engines needs {', '.join(missing)}: pip install 'ldmrt[{extra}]'")
