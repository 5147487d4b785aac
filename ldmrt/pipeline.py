"""Prompts to pictures: the whole path, over an opened bundle."""

from __future__ import annotations

import os
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from ldmrt import image as pixels
from ldmrt.bundle import Bundle, EngineRecord
from ldmrt.config import parse_device
from ldmrt.denoise import Denoiser
from ldmrt.engines.protocol import Engine
from ldmrt.errors import BadRequest, EngineMismatch
from ldmrt.request import Defaults, Job, LongPrompt, Request, resolve
from ldmrt.schedule import NoiseSchedule, SamplerTable, sampler_table
from ldmrt.tokenizer import Tokenizer

OutputType = Literal["pil", "np", "latent"]
OnStep = Callable[[int, torch.Tensor], None]
Generators = torch.Generator | Sequence[torch.Generator]

# float16 is last on a CPU: it is emulated there.
_PREFERRED = {"cpu": ("float32", "float16"), "cuda": ("float16", "bfloat16", "float32")}


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

    def __init__(self, bundle: Bundle, device: torch.device, kind: str, dtype: str | None) -> None:
        self.bundle, self.device = bundle, device
        self._kind, self._dtype = kind, dtype
        model = bundle.manifest.model
        self.tokenizer = Tokenizer.from_folder(bundle.check_tokenizer())
        self.schedule = NoiseSchedule.from_dict(model.schedule)
        steps = self._records("step")
        sizes = tuple(dict.fromkeys(record.size for record in steps if record.size))
        size = (model.defaults.width, model.defaults.height)
        self._text_encoder = self._load(self._records("text_encoder")[0])
        self.defaults = Defaults(
            width=(size if size in sizes else sizes[0])[0],
            height=(size if size in sizes else sizes[0])[1],
            num_inference_steps=model.defaults.num_inference_steps,
            guidance_scale=model.defaults.guidance_scale,
            sampler=model.defaults.sampler,
            sizes=sizes,
            size_multiple=model.downscale,
            max_steps=self.schedule.train_steps,
            max_clip_skip=int(self._text_encoder.outputs["hidden_states"].shape[0]) - 1,
        )
        self._engines: dict[str, Engine] = {}
        self._denoisers: dict[tuple[int, ...], Denoiser] = {}
        self._lock = threading.Lock()

    @classmethod
    def from_bundle(
        cls,
        path: str | os.PathLike[str] | None = None,
        device: str | torch.device | None = None,
        *,
        engine: str | None = None,
        dtype: str | None = None,
    ) -> Pipeline:
        """Open a bundle and load its engines.

        Args:
            path: the bundle's folder; None for the built-in shapes model.
            device: `cpu`, `cuda` or `cuda:N`; None for a GPU if there is one.
            engine: the engine kind to use where the bundle has several; None for `torch` if it is there.
            dtype: the precision to use where the bundle has several; None for the best one on the device.

        Raises:
            BundleError: there is no bundle, or it is damaged.
            EngineMismatch: it has no engine for this device, kind or precision.
        """
        bundle = Bundle.open(builtin_bundle() if path is None else path)
        where = _device(device)
        kinds = {record.kind for record in bundle.manifest.engines if record.component == "step"}
        kind = engine or ("torch" if "torch" in kinds else next(iter(sorted(kinds)), "torch"))
        if kind not in kinds:
            raise EngineMismatch(
                f"{bundle.path} has no {kind} engine, it has {', '.join(sorted(kinds)) or 'none'}; "
                f"build one with `ldmrt build-engines MODEL --out {bundle.path} --engine {kind}`"
            )
        return cls(bundle, where, kind, dtype)

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
        clock = _Clock()
        with self._lock, torch.inference_mode():
            with clock("tokenize"):
                windows = self._tokenize(job)
            with clock("encode"):
                conds, unconds = self._embeddings(job, windows, prompt_embeds, negative_prompt_embeds)
            with clock("prepare"):
                table = sampler_table(job.sampler, self.schedule, job.num_inference_steps, job.eta)
                start, noise = self._noise(job, table, generator, latents)
            finals = torch.empty_like(start)
            for group in self._groups(job, conds):
                with clock("prepare"):
                    denoiser = self._prepare(job, table, group, start, noise, conds, unconds)
                with clock("denoise"):
                    self._denoise(denoiser, table, len(group), on_step)
                    for slot, number in enumerate(group):
                        finals[number] = denoiser.latents(slot).cpu()
                        denoiser.release(slot)
            with clock("decode"):
                images = None if output_type == "latent" else self._decode(job, finals, output_type)
        # A tensor made in inference mode could not be used in a caller's own computation.
        finals = finals.clone()
        images = finals if output_type == "latent" else images
        return Result(images=images, latents=finals, seeds=job.seeds, timings=clock.seconds, job=job)

    @property
    def kind(self) -> str:
        """The engine kind in use."""
        return self._kind

    @property
    def dtype(self) -> str:
        """The precision in use."""
        return self._records("step")[0].dtype

    def images_at_a_time(self, width: int, height: int, *, guidance: bool) -> int:
        """The largest batch that the bundle's step engines run at once."""
        rows = max(record.rows or 1 for record in self._records("step", (width, height)))
        return max(1, rows // (2 if guidance else 1))

    # ------------------------------------------------------------------------------------------------ stages

    def _tokenize(self, job: Job) -> list[tuple[np.ndarray, np.ndarray]]:
        """For each prompt its windows and those of its negative prompt, as many of the one as of the other."""
        most = 1 if job.long_prompt == "cut" else None
        pairs = []
        for prompt, negative in zip(job.prompts, job.negative_prompts, strict=True):
            ours = self.tokenizer.windows(prompt, most)
            theirs = self.tokenizer.windows(negative, most)
            for what, windows in (("prompt", ours), ("negative prompt", theirs)):
                if windows.dropped:
                    warnings.warn(
                        f"the {what} is longer than the text encoder's {self.tokenizer.model_max_length} tokens; "
                        f"dropped: {windows.dropped[:80]!r}",
                        stacklevel=3,
                    )
            count = max(len(ours.ids), len(theirs.ids))
            pairs.append(
                (
                    self.tokenizer.windows(prompt, most, min_windows=count).ids,
                    self.tokenizer.windows(negative, most, min_windows=count).ids,
                )
            )
        return pairs

    def _embeddings(
        self,
        job: Job,
        windows: list[tuple[np.ndarray, np.ndarray]],
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Text embeddings (tokens, width) for each image, and those of its negative prompt if there is guidance."""

        def encode(ids: np.ndarray) -> torch.Tensor:
            states = self._text_encoder.run({"input_ids": torch.from_numpy(ids).to(self.device)})["hidden_states"]
            return states[job.clip_skip].flatten(0, 1)

        def given(embeds: torch.Tensor, name: str) -> list[torch.Tensor]:
            width = self._text_encoder.outputs["hidden_states"].shape[-1]
            if embeds.dim() != 3 or embeds.shape[0] not in (1, len(job.prompts)) or embeds.shape[2] != width:
                raise BadRequest(
                    f"{name} has the shape {tuple(embeds.shape)}, expected (1 or {len(job.prompts)}, tokens, {width})",
                    param=name,
                )
            return [embeds[i % len(embeds)].to(self.device) for i in range(len(job.prompts))]

        known: dict[bytes, torch.Tensor] = {}

        def cached(ids: np.ndarray) -> torch.Tensor:
            return known.setdefault(ids.tobytes(), known[ids.tobytes()] if ids.tobytes() in known else encode(ids))

        conds = [cached(ids) for ids, _ in windows] if prompt_embeds is None else given(prompt_embeds, "prompt_embeds")
        unconds = None
        if job.do_cfg:
            if negative_prompt_embeds is not None:
                unconds = given(negative_prompt_embeds, "negative_prompt_embeds")
            else:
                unconds = [cached(ids) for _, ids in windows]
            for cond, uncond in zip(conds, unconds, strict=True):
                if cond.shape != uncond.shape:
                    raise BadRequest(
                        f"prompt_embeds has {len(cond)} tokens and the negative prompt {len(uncond)}: give negative_prompt_embeds "
                        "of the same length",
                        param="negative_prompt_embeds",
                    )
        repeat = job.num_images_per_prompt
        return [c for c in conds for _ in range(repeat)], None if unconds is None else [
            u for u in unconds for _ in range(repeat)
        ]

    def _noise(
        self, job: Job, table: SamplerTable, generator: Generators | None, latents: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Initial latents (n, C, h, w), and noise (n, evaluations, C, h, w) for samplers that draw it, float32 on the CPU.

        Drawn in diffusers' order: the latents first, then each step's noise, per generator.
        """
        count, model = len(job.seeds), self.bundle.manifest.model
        shape = (model.latent_channels, job.height // model.downscale, job.width // model.downscale)
        draws = table.draws_noise.tolist()
        if isinstance(generator, torch.Generator):
            generators, block = [generator], count
        else:
            generators = (
                list(generator) if generator is not None else [torch.Generator("cpu").manual_seed(s) for s in job.seeds]
            )
            block = 1
        if len(generators) * block != count:
            raise BadRequest(f"{len(generators)} generators were given for {count} images", param="generator")
        if any(g.device.type != "cpu" for g in generators):
            raise BadRequest(
                "the generator is on a GPU, expected torch.Generator('cpu'): noise is drawn on the CPU",
                param="generator",
            )
        if latents is not None and tuple(latents.shape) != (count, *shape):
            raise BadRequest(
                f"latents has the shape {tuple(latents.shape)}, expected {(count, *shape)}", param="latents"
            )
        starts, noises = [], []
        for one in generators:
            starts.append(torch.randn((block, *shape), generator=one) if latents is None else torch.empty(0))
            if table.uses_noise:
                zeros = torch.zeros(block, *shape)
                noises.append(
                    torch.stack(
                        [torch.randn((block, *shape), generator=one) if draw else zeros for draw in draws], dim=1
                    )
                )
        start = torch.cat(starts) if latents is None else latents.detach().to("cpu", torch.float32)
        return start, torch.cat(noises) if noises else None

    def _groups(self, job: Job, conds: list[torch.Tensor]) -> Iterator[list[int]]:
        """Image numbers that run together: as many as the largest fitting step engine takes, all with equally long text."""
        per_image = 2 if job.do_cfg else 1
        available = sorted(
            {(record.rows or 1) // per_image for record in self._records("step", (job.width, job.height))} - {0}
        )
        if not available:
            raise EngineMismatch(
                f"{self.bundle.path} has no step engine of 2 rows, which guidance needs; build one with `ldmrt build-engines`"
            )
        by_tokens: dict[int, list[int]] = {}
        for number, cond in enumerate(conds):
            by_tokens.setdefault(len(cond), []).append(number)
        for numbers in by_tokens.values():
            start = 0
            while start < len(numbers):
                size = max((n for n in available if n <= len(numbers) - start), default=available[0])
                yield numbers[start : start + size]
                start += size

    def _prepare(
        self,
        job: Job,
        table: SamplerTable,
        group: list[int],
        start: torch.Tensor,
        noise: torch.Tensor | None,
        conds: list[torch.Tensor],
        unconds: list[torch.Tensor] | None,
    ) -> Denoiser:
        """A denoiser with the group's images in its slots."""
        denoiser = self._denoiser(job, table, len(group), len(conds[group[0]]))
        for slot, number in enumerate(group):
            denoiser.admit(
                slot,
                latents=start[number],
                table=table,
                guidance_scale=job.guidance_scale,
                cond=conds[number],
                uncond=None if unconds is None else unconds[number],
                noise=None if noise is None else noise[number],
            )
        return denoiser

    def _denoiser(self, job: Job, table: SamplerTable, images: int, tokens: int) -> Denoiser:
        """The denoiser for a batch; kept, since its buffers are what a captured step is bound to."""
        per_image = 2 if job.do_cfg else 1
        records = [r for r in self._records("step", (job.width, job.height)) if (r.rows or 1) // per_image >= images]
        record = records[0]
        capacity = (record.rows or 1) // per_image
        evaluations = max(64, 1 << (table.evaluations - 1).bit_length())
        key = (job.width, job.height, record.rows or 1, capacity, tokens, evaluations, table.uses_noise)
        if key not in self._denoisers:
            # A step engine is bound to one set of buffers: whoever had it before gives it up.
            self._denoisers = {k: v for k, v in self._denoisers.items() if k[:3] != key[:3]}
            self._denoisers[key] = Denoiser(
                self._engine(self._records("context")[0]),
                self._engine(self._records("schedule")[0]),
                self._engine(record),
                capacity=capacity,
                tokens=tokens,
                evaluations=evaluations,
                with_noise=table.uses_noise,
                device=self.device,
            )
        return self._denoisers[key]

    def _denoise(self, denoiser: Denoiser, table: SamplerTable, images: int, on_step: OnStep | None) -> None:
        try:
            for step in table.steps.tolist():
                denoiser.step()
                if on_step is not None and step >= 0:
                    on_step(step, denoiser.slots.x[:images].clone())
        except BaseException:
            for slot in range(images):
                denoiser.release(slot)
            raise
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _decode(self, job: Job, latents: torch.Tensor, output_type: OutputType) -> Any:
        """Latents (n, C, h, w) to pictures."""
        records = self._records("decoder", (job.width, job.height))
        decoded = []
        done = 0
        while done < len(latents):
            left = len(latents) - done
            record = max((r for r in records if (r.rows or 1) <= left), key=lambda r: r.rows or 1, default=records[0])
            rows = record.rows or 1
            engine = self._engine(record)
            spec = engine.inputs["latents"]
            batch = torch.zeros((rows, *latents.shape[1:]), dtype=spec.dtype, device=self.device)
            batch[: min(rows, left)].copy_(latents[done : done + rows])
            images = engine.run({"latents": batch})["image"][: min(rows, left)]
            decoded.append(images)
            done += rows
        images = torch.cat(decoded)
        return pixels.to_float(images) if output_type == "np" else pixels.to_pil(pixels.to_uint8(images))

    # ------------------------------------------------------------------------------------------------ engines

    def _records(self, component: str, size: tuple[int, int] | None = None) -> list[EngineRecord]:
        """The engines of a component in the kind and the precision that are in use, by row count."""
        kind = "torch" if component in ("context", "schedule") else self._kind
        found = self.bundle.find(component, kind=kind, dtype=self._dtype, size=size)
        if not found:
            raise EngineMismatch(
                f"{self.bundle.path} has no {component} engine ({kind}{', ' + self._dtype if self._dtype else ''}); "
                "build the bundle again with `ldmrt build-engines`"
            )
        present = {record.dtype for record in found}
        chosen = next((dtype for dtype in _preferred(self.device) if dtype in present), found[0].dtype)
        return [record for record in found if record.dtype == chosen]

    def _engine(self, record: EngineRecord) -> Engine:
        if record.key not in self._engines:
            self._engines[record.key] = self._load(record)
        return self._engines[record.key]

    def _load(self, record: EngineRecord) -> Engine:
        return self.bundle.load(record, self.device)


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
    return Path(str(resources.files("ldmrt"))) / "builtin" / "shapes"


def _preferred(device: torch.device) -> tuple[str, ...]:
    order = _PREFERRED[device.type]
    if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported():
        return ("bfloat16", *order)
    return (*order, "bfloat16")


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
