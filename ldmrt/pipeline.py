"""Prompts to pictures: the whole path, over an opened bundle."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch

from ldmrt import choices, image as pixels
from ldmrt.adapters import Adapters
from ldmrt.bundle import Bundle, EngineRecord
from ldmrt.capture import Recorder
from ldmrt.config import parse_device
from ldmrt.decoding import Decoding
from ldmrt.denoise import Denoiser
from ldmrt.engines.protocol import Engine
from ldmrt.errors import BadRequest, EngineMismatch, NumericalError
from ldmrt.loader import EngineLoader, kinds_of
from ldmrt.lora import Lora
from ldmrt.noise import Generators, draw
from ldmrt.parameters import Parameters
from ldmrt.request import Defaults, Job, LongPrompt, Request, resolve
from ldmrt.schedule import NoiseSchedule, SamplerTable, sampler_table
from ldmrt.text import Embedding, Given, PromptEncoder, TextModel
from ldmrt.tokenizer import Tokenizer

OutputType = Literal["pil", "np", "latent"]
Capture = Literal["step", "loop", "image", "off"]
OnStep = Callable[[int, torch.Tensor], None]
Text = tuple[Embedding, Embedding | None]


@dataclass(frozen=True)
class Result:
    """What a call made.

    Attributes:
        images: PIL images, or float32 (n, H, W, 3) in [0, 1], or the latents, by `output_type`.
        latents: (n, C, h, w) float32, the final latents.
        seeds: the seed of each image.
        timings: seconds by stage: tokenize, encode, prepare, denoise, decode.
        job: what was asked, with everything filled in.
    """

    images: Any
    latents: torch.Tensor
    seeds: tuple[int, ...]
    timings: dict[str, float]
    job: Job


class Pipeline:
    """A model ready to make pictures. Calls from several threads wait for each other.

    Attributes:
        bundle: the opened bundle.
        device: where it runs.
        defaults: what a request gets where it says nothing, and its bounds.
    """

    def __init__(self, loader: EngineLoader, *, capture: Capture = "step") -> None:
        self._loader = loader
        self.bundle, self.device = loader.bundle, loader.device
        model = self.bundle.manifest.model
        self.schedule = NoiseSchedule.from_dict(model.schedule)
        texts = [
            TextModel(Tokenizer.from_folder(folder), loader.only(encoder))
            for encoder, folder in self.bundle.check_tokenizers().items()
        ]
        self.tokenizer = texts[0].tokenizer
        self._prompts = PromptEncoder(texts, self.device, zero_empty_negative=model.zero_empty_negative)
        sizes = tuple(dict.fromkeys(record.size for record in loader.records("step") if record.size))
        size = (model.defaults.width, model.defaults.height)
        width, height = size if size in sizes else sizes[0]
        self.defaults = Defaults(
            width=width,
            height=height,
            num_inference_steps=model.defaults.num_inference_steps,
            guidance_scale=model.defaults.guidance_scale,
            sampler=model.defaults.sampler,
            sizes=sizes,
            size_multiple=model.downscale,
            max_steps=self.schedule.train_steps,
            max_clip_skip=self._prompts.layers - 1,
        )
        self._denoisers: dict[tuple[int, ...], Denoiser] = {}
        self._decodings: dict[Denoiser, Decoding] = {}
        self._capture = capture
        self._adapters = Adapters(self._weights)
        self._lock = threading.Lock()

    @classmethod
    def from_bundle(
        cls,
        path: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        *,
        engine: str | None = None,
        dtype: str | None = None,
        capture: Capture = "step",
        fallback: bool = False,
        weight_budget: int | None = None,
    ) -> Pipeline:
        """Open a bundle and load its engines.

        Args:
            path: the bundle's folder; None for the built-in shapes model.
            device: `cpu`, `cuda` or `cuda:N`; None for a GPU if there is one.
            engine: the engine kind to use where the bundle has several; None for `torch` if it is there.
            dtype: the precision to use where the bundle has several; None for the best one on the device.
            capture: what becomes one CUDA graph on a GPU: a `step`, the whole `loop`, the whole `image` (loop and decoder), or nothing
                (`off`). A loop or an image is recorded anew for each number of steps, and calls with `on_step` still go step by step.
                Without meaning on a CPU.
            fallback: whether another engine kind of the bundle may run where this one cannot, in the order tensorrt, tensorrt-rtx, torch,
                onnxruntime, with a warning that says which failed and why. Without `engine` the first of them is tried first. It is decided
                here: engines of the default size are loaded at once.
            weight_budget: for TensorRT plans that were built with weight streaming: the most memory in bytes that the weights of each may
                take on the GPU; None for what TensorRT proposes. Not yet run on a GPU.

        Raises:
            BadRequest: `capture` is none of these, or the device is not there.
            BundleError: there is no bundle, or it is damaged.
            EngineMismatch: it has no engine for this device, kind or precision.
        """
        if capture not in ("step", "loop", "image", "off"):
            raise BadRequest(f"capture is {capture!r}, expected step, loop, image or off", param="capture")
        bundle = Bundle.open(builtin_bundle() if path is None else path)
        place = _device(device)
        if place.type == "cuda":
            choices.apply(place)
        recorder = Recorder(place) if place.type == "cuda" and capture != "off" else None

        def load(kind: str | None) -> Pipeline:
            return cls(EngineLoader(bundle, place, kind, dtype, recorder, weight_budget), capture=capture)

        return _first_that_loads(load, bundle, engine) if fallback else load(engine)

    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        sampler: str | None = None,
        eta: float = 0.0,
        seed: int | None = None,
        num_images_per_prompt: int = 1,
        width: int | None = None,
        height: int | None = None,
        *,
        generator: Generators | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        clip_skip: int | None = None,
        long_prompt: LongPrompt = "chunk",
        output_type: OutputType = "pil",
        on_step: OnStep | None = None,
    ) -> Result:
        """Make pictures. What is not given comes from the model's defaults (`self.defaults`).

        Args:
            prompt: one prompt or several; not needed with `prompt_embeds`.
            negative_prompt: what not to show; one for all prompts or one each.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598); at most 1 is without.
            sampler: `ddim`.
            eta: DDIM's noise, 0 to 1.
            seed: of the first image; image i has seed + i. Drawn, and reported in the result, if not given.
            num_images_per_prompt: images for each prompt.
            width: in pixels, a size that the bundle has engines for.
            height: in pixels.
            generator: a `torch.Generator` on the CPU for all images, or one for each; instead of `seed`.
            latents: (n, C, h, w) float32, standard normal, instead of noise from a seed.
            prompt_embeds: (1 or n, tokens, width), instead of encoding the prompt.
            negative_prompt_embeds: the same for the negative prompt.
            pooled_prompt_embeds: (1 or n, projection), with prompt_embeds where the model has pooled embeddings (SDXL).
            negative_pooled_prompt_embeds: the same for the negative prompt.
            clip_skip: how many of the text encoder's last layers to leave out.
            long_prompt: `chunk` encodes a prompt longer than the text encoder's window in several windows, as AUTOMATIC1111 does;
                `cut` drops the rest, with a warning.
            output_type: `pil`, `np` or `latent`.
            on_step: called after every step with its index and the latents (images at a time, C, h, w) float32. It may raise, for
                instance `ldmrt.Cancelled`, to stop.

        Raises:
            BadRequest: a value cannot be used; the error names it.
            NumericalError: the model made NaN or infinity.
        """
        prompts: str | Sequence[str] = prompt
        if prompt_embeds is not None and prompt == "":
            prompts = [""] * len(prompt_embeds)
        job = resolve(
            Request(
                prompt=prompts,
                negative_prompt=negative_prompt,
                num_inference_steps=num_inference_steps,
                guidance_scale=guidance_scale,
                sampler=sampler,
                eta=eta,
                seed=seed,
                num_images_per_prompt=num_images_per_prompt,
                width=width,
                height=height,
                clip_skip=clip_skip,
                long_prompt=long_prompt,
            ),
            self.defaults,
        )
        if output_type not in ("pil", "np", "latent"):
            raise BadRequest(f"output_type is {output_type!r}, expected pil, np or latent", param="output_type")
        given = Given(prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds)
        clock = _Clock()
        with self._lock, torch.inference_mode():
            with clock("tokenize"):
                windows = self._prompts.tokenize(job)
            with clock("encode"):
                texts = self._prompts.embed(job, windows, given)
            with clock("prepare"):
                table = sampler_table(job.sampler, self.schedule, job.num_inference_steps, job.eta)
                starts, noises = draw(job.seeds, self._latent_shape(job), table, generator=generator, latents=latents)
            finals = torch.empty_like(starts)
            decoded: dict[int, torch.Tensor] = {}
            for group in self._groups(job, texts):
                with clock("prepare"):
                    denoiser = self._denoiser(job, table, len(group), len(texts[group[0]][0].states))
                try:
                    with clock("prepare"):
                        for slot, number in enumerate(group):
                            cond, uncond = texts[number]
                            denoiser.admit(
                                slot,
                                latents=starts[number],
                                table=table,
                                guidance_scale=job.guidance_scale,
                                cond=conditioning(cond, job),
                                uncond=None if uncond is None else conditioning(uncond, job),
                                noise=None if noises is None else noises[number],
                            )
                    with clock("denoise"):
                        decoding = (
                            self._decodings.get(denoiser) if on_step is None and output_type != "latent" else None
                        )
                        self._denoise(denoiser, table, len(group), on_step, decoding)
                        finals[group] = denoiser.slots.x[: len(group)].cpu()
                        if decoding is not None:
                            decoded |= dict(zip(group, decoding.images.clone(), strict=False))
                finally:
                    for slot in range(len(group)):
                        denoiser.release(slot)
            if not finals.isfinite().all():
                raise NumericalError(
                    f"the latents hold {int((~finals.isfinite()).sum())} NaN or infinite values out of {finals.numel()}:"
                    " use a wider dtype (float32), or a smaller guidance scale"
                )
            with clock("decode"):
                if output_type == "latent":
                    images = None
                elif decoded:
                    images = _delivered(torch.stack([decoded[number] for number in range(len(finals))]), output_type)
                else:
                    images = _delivered(self._decode(job, finals), output_type)
        # A tensor made in inference mode could not be used in a caller's own computation.
        finals = finals.clone()
        images = finals if output_type == "latent" else images
        return Result(images=images, latents=finals, seeds=job.seeds, timings=clock.seconds, job=job)

    def update_weights(self, component: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Change weights in place, as for another checkpoint of the same architecture. Nothing is compiled anew.

        LoRAs stay on the weights. The first values of those that change are kept, where they are used, for `restore_weights`.

        Args:
            component: `unet`, `text_encoder`, `text_encoder_2`, `decoder` or `encoder`. The last two share their file, not their
                weights.
            tensors: new values by the names of the model's weight file; the other weights stay as they are.

        Raises:
            BadRequest: there is no such component.
            EngineMismatch: a name or shape is not the model's (nothing is changed then), or the engine kind embeds its weights.
        """
        with self._lock:
            self._parameters(component).update(tensors)

    def restore_weights(self, component: str) -> None:
        """Give a component the weights of the bundle back, to the bit. LoRAs that are loaded stay on them.

        Raises:
            BadRequest: there is no such component.
            EngineMismatch: the engine kind embeds its weights.
        """
        with self._lock:
            self._parameters(component).restore()

    def load_lora(self, path: str | os.PathLike[str], scale: float = 1.0, name: str | None = None) -> None:
        """Add a LoRA to the weights, in place: nothing is compiled or captured anew. Several add up.

        Args:
            path: a safetensors file in the format of diffusers, peft or kohya, for the U-Net, the text encoders, or both.
            scale: how much of it.
            name: what to call it from now on; None for the file's name without its ending.

        Raises:
            BadRequest: the file is no LoRA, or one for another architecture; the name is taken; the scale is not finite.
            EngineMismatch: the engine kind embeds its weights.
        """
        components = ("unet", *self.bundle.manifest.model.tokenizers)
        if not all(self._record(component).takes_weights for component in components):
            raise EngineMismatch(
                f"{self.kind} engines hold weights of their own, which no LoRA can be added to: build again with "
                f"`ldmrt build-engines ... --lora {os.fspath(path)}:{scale:g}`, or use the torch engine"
            )
        with self._lock:
            shapes = {component: self.bundle.shapes(self._record(component).weights) for component in components}
            lora = Lora.read(Path(path), shapes)
            self._adapters.add(name or lora.path.stem, lora, scale)

    def set_lora_scale(self, name: str, scale: float) -> None:
        """Change how much of a LoRA is added; at 0 the weights are as without it.

        Raises:
            BadRequest: no LoRA of that name is loaded, or the scale is not finite.
        """
        with self._lock:
            self._adapters.set_scale(name, scale)

    def unload_lora(self, name: str) -> None:
        """Take a LoRA off the weights. Without any they are what they were, to the bit.

        Raises:
            BadRequest: no LoRA of that name is loaded.
        """
        with self._lock:
            self._adapters.remove(name)

    @property
    def loras(self) -> dict[str, float]:
        """The loaded LoRAs: name -> scale."""
        return self._adapters.scales

    def _parameters(self, component: str) -> Parameters:
        """A component's weights, all of its engines loaded, so that their names are known."""
        parts = ("context", "schedule", "step") if component == "unet" else (component,)
        known = {record.component for record in self.bundle.manifest.engines}
        if component in ("context", "schedule", "step") or not known.issuperset(parts):
            raise BadRequest(
                f"component is {component!r}, expected unet, text_encoder, decoder or encoder", param="component"
            )
        if not self._record(component).takes_weights:
            raise EngineMismatch(
                f"{self.kind} engines hold weights of their own, which cannot be changed in place: use the torch engine"
            )
        for part in parts:
            self._loader.load(self._loader.records(part)[0])
        return self._weights(component)

    def _record(self, component: str) -> EngineRecord:
        """An engine that reads a component's weights."""
        return self._loader.records("step" if component == "unet" else component)[0]

    def _weights(self, component: str) -> Parameters:
        return self.bundle.parameters(self._record(component).weights, self.device)

    @property
    def kind(self) -> str:
        """The engine kind in use."""
        return self._loader.kind

    @property
    def dtype(self) -> str:
        """The precision in use."""
        return self._loader.records("step")[0].dtype

    def images_at_a_time(self, width: int, height: int, *, guidance: bool) -> int:
        """The largest batch that the bundle's step engines run at once."""
        rows = max(record.rows or 1 for record in self._loader.records("step", (width, height)))
        return max(1, rows // (2 if guidance else 1))

    # ------------------------------------------------------------------------------------------------ stages

    def _latent_shape(self, job: Job) -> tuple[int, int, int]:
        model = self.bundle.manifest.model
        return model.latent_channels, job.height // model.downscale, job.width // model.downscale

    def _groups(self, job: Job, texts: list[Text]) -> Iterator[list[int]]:
        """Image numbers that run together: as many as the largest step engine takes, with equally long text."""
        per_image = 2 if job.do_cfg else 1
        records = self._loader.records("step", (job.width, job.height))
        available = sorted({(record.rows or 1) // per_image for record in records} - {0})
        if not available:
            raise EngineMismatch(
                f"{self.bundle.path} has no step engine of 2 rows, which guidance needs; "
                "build one with `ldmrt build-engines`"
            )
        by_tokens: dict[int, list[int]] = {}
        for number, (cond, _) in enumerate(texts):
            by_tokens.setdefault(len(cond.states), []).append(number)
        for numbers in by_tokens.values():
            start = 0
            while start < len(numbers):
                size = max((n for n in available if n <= len(numbers) - start), default=available[0])
                yield numbers[start : start + size]
                start += size

    def _denoiser(self, job: Job, table: SamplerTable, images: int, tokens: int) -> Denoiser:
        """The denoiser for a batch; kept, since its buffers are what a captured step is bound to."""
        per_image = 2 if job.do_cfg else 1
        records = [
            r for r in self._loader.records("step", (job.width, job.height)) if (r.rows or 1) // per_image >= images
        ]
        record = records[0]
        _check_tokens(self._loader.load(record), tokens)
        capacity = (record.rows or 1) // per_image
        evaluations = max(64, 1 << (table.evaluations - 1).bit_length())
        key = (job.width, job.height, record.rows or 1, capacity, tokens, evaluations, table.uses_noise)
        if key not in self._denoisers:
            # A step engine is bound to one set of buffers: whoever had it before gives it up.
            self._denoisers = {k: v for k, v in self._denoisers.items() if k[:3] != key[:3]}
            self._denoisers[key] = Denoiser(
                self._loader.only("context"),
                self._loader.only("schedule"),
                self._loader.load(record),
                capacity=capacity,
                tokens=tokens,
                evaluations=evaluations,
                with_noise=table.uses_noise,
                device=self.device,
                recorder=self._loader.recorder,
                generation=lambda: self._loader.generation("step"),
            )
            self._decodings = {d: decoding for d, decoding in self._decodings.items() if d in self._denoisers.values()}
        denoiser = self._denoisers[key]
        if self._loader.recorder is not None and self._capture == "loop":
            denoiser.capture(table.evaluations)
        elif self._loader.recorder is not None and self._capture == "image":
            if denoiser not in self._decodings:
                records = self._loader.records("decoder", (job.width, job.height))
                fitting = [r for r in records if (r.rows or 1) <= capacity]
                decoder = self._loader.load(max(fitting or records[:1], key=lambda r: r.rows or 1))
                self._decodings[denoiser] = Decoding(decoder, denoiser.slots.x)
            denoiser.capture(table.evaluations, self._decodings[denoiser].work)
        return denoiser

    def _denoise(
        self,
        denoiser: Denoiser,
        table: SamplerTable,
        images: int,
        on_step: OnStep | None,
        decoding: Decoding | None,
    ) -> None:
        if on_step is None:
            denoiser.steps(table.evaluations, None if decoding is None else decoding.work)
        else:
            for step in table.steps.tolist():
                denoiser.step()
                if step >= 0:
                    on_step(step, denoiser.slots.x[:images].clone())
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _decode(self, job: Job, latents: torch.Tensor) -> torch.Tensor:
        """Latents (n, C, h, w) to pictures (n, 3, H, W)."""
        records = self._loader.records("decoder", (job.width, job.height))
        decoded = []
        done = 0
        while done < len(latents):
            left = len(latents) - done
            record = max((r for r in records if (r.rows or 1) <= left), key=lambda r: r.rows or 1, default=records[0])
            rows = record.rows or 1
            engine = self._loader.load(record)
            spec = engine.inputs["latents"]
            batch = torch.zeros((rows, *latents.shape[1:]), dtype=spec.dtype, device=self.device)
            batch[: min(rows, left)].copy_(latents[done : done + rows])
            images = engine.run({"latents": batch})["image"][: min(rows, left)]
            decoded.append(images)
            done += rows
        return torch.cat(decoded)


def _first_that_loads(load: Callable[[str | None], Pipeline], bundle: Bundle, engine: str | None) -> Pipeline:
    """The pipeline on the engine kind that was asked for, or on one that may take its place; says so.

    Raises:
        EngineMismatch: none of them can run here; the last one's.
    """
    kinds = kinds_of(bundle)
    order = kinds if engine is None else [engine, *kinds[kinds.index(engine) + 1 if engine in kinds else 0 :]]
    for kind, following in pairwise([*order, None]):
        try:
            pipe = load(kind)
            pipe._loader.load_all((pipe.defaults.width, pipe.defaults.height))
        except EngineMismatch as error:
            if following is None:
                raise
            warnings.warn(f"{following} runs instead of {kind}, which cannot: {error}", stacklevel=3)
        else:
            return pipe
    return load(engine)  # there is none, and this says so


def _delivered(images: torch.Tensor, output_type: OutputType) -> Any:
    """Pictures as they were asked for."""
    return pixels.to_float(images) if output_type == "np" else pixels.to_pil(pixels.to_uint8(images))


def conditioning(embedding: Embedding, job: Job) -> dict[str, torch.Tensor]:
    """A denoising network's request inputs, without the dimension of rows; each network takes those that it knows.

    `time_ids` says that nothing was scaled or cropped (Podell et al. 2023, arXiv 2307.01952, section 2.2): original height and
    width, top and left of the crop, target height and width.
    """
    inputs = {"encoder_hidden_states": embedding.states}
    if embedding.pooled is not None:
        inputs["text_embeds"] = embedding.pooled
        sizes = (job.height, job.width, 0, 0, job.height, job.width)
        inputs["time_ids"] = torch.tensor(sizes, dtype=torch.float32, device=embedding.states.device)
    return inputs


def _check_tokens(step: Engine, tokens: int) -> None:
    """Check that a prompt's length is the engine's, if that is fixed: a dimension of a step's text inputs is free but in TensorRT plans."""
    for spec in step.inputs.values():
        if len(spec.shape) == 3 and isinstance(spec.shape[1], int) and spec.shape[1] != tokens:
            raise BadRequest(
                f'the prompt takes {tokens} tokens, and this engine is made for {spec.shape[1]}: shorten it, use long_prompt="cut", '
                "or build with --engine torch",
                param="prompt",
            )


class _Clock:
    """Seconds by stage, added up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


def builtin_bundle() -> Path:
    """The folder of the built-in shapes model, which is a diffusers model and a bundle at once."""
    return Path(__file__).parent / "builtin" / "shapes"


def _device(device: str | torch.device | None) -> torch.device:
    """The device to run on.

    Raises:
        BadRequest: it is not one that ldmrt runs on, or it is not there.
    """
    name = parse_device("auto" if device is None else str(device))
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = torch.device(name)
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise BadRequest(
            f"device {name!r} was asked for, and torch {torch.__version__} sees {torch.cuda.device_count()} GPUs here; use cpu",
            param="device",
        )
    return found
