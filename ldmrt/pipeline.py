"""Prompts to pictures: the whole path, over an opened bundle."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ldmrt import choices, control, image as pixels
from ldmrt.adapters import Adapters
from ldmrt.bundle import Bundle, EngineRecord
from ldmrt.capture import Recorder
from ldmrt.components import CONTROLNET, STEP, parts
from ldmrt.conditioning import Picture
from ldmrt.config import parse_device
from ldmrt.decoding import Decoding, decode
from ldmrt.denoise import Denoiser
from ldmrt.denoisers import Denoisers
from ldmrt.errors import BadRequest, EngineMismatch, NumericalError
from ldmrt.guidance import embedding
from ldmrt.inpainting import resolve as resolve_inpainting
from ldmrt.loader import EngineLoader
from ldmrt.lora import Lora
from ldmrt.memory_plan import MemoryPlan, Stage, parse_bytes
from ldmrt.needs import Workload
from ldmrt.noise import Generators, draw
from ldmrt.parameters import Parameters
from ldmrt.request import Defaults, Job, LongPrompt, Request, resolve
from ldmrt.residency import Residency
from ldmrt.samplers.make import sampler_table
from ldmrt.samplers.table import SamplerTable
from ldmrt.schedule import NoiseSchedule
from ldmrt.text import Embedding, Given, PromptEncoder, TextModel
from ldmrt.tokenizer import Tokenizer

OutputType = Literal["pil", "np", "latent"]
Capture = Literal["step", "loop", "image", "off"]
OnStep = Callable[[int, torch.Tensor], None]
Text = tuple[Embedding, Embedding | None]

# When a part of the VAE works.
_STAGES: dict[str, Stage] = {"encoder": "picture", "decoder": "decode"}


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

    def __init__(self, loader: EngineLoader, *, capture: Capture = "step", memory_budget: int | None = None) -> None:
        self._loader = loader
        self.bundle, self.device = loader.bundle, loader.device
        model = self.bundle.manifest.model
        self.schedule = NoiseSchedule.from_dict(model.schedule)
        sizes = tuple(dict.fromkeys(record.size for record in loader.records("step") if record.size))
        size = (model.defaults.width, model.defaults.height)
        width, height = size if size in sizes else sizes[0]
        self._denoisers = Denoisers(loader, capture)
        guided = bool(model.tokenizers) and model.guidance_embedding is None and model.defaults.guidance_scale > 1
        self._residency = Residency(loader, self._denoisers, memory_budget, least_rows=2 if guided else 1)
        self._residency.begin(Workload((width, height), picture=model.inpainting))
        texts = [
            TextModel(Tokenizer.from_folder(folder), loader.only(encoder))
            for encoder, folder in self.bundle.check_tokenizers().items()
        ]
        self.tokenizer = texts[0].tokenizer if texts else None
        self._prompts = PromptEncoder(texts, self.device, zero_empty_negative=model.zero_empty_negative)
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
            guidance_embedded=model.guidance_embedding is not None,
        )
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
        memory_budget: int | str | None = None,
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
            memory_budget: the most memory to take, in bytes or as `6GB` (10^9 bytes each) or `6GiB` (2^30): on a GPU all of it, on a CPU
                that of weights and tensors. Engines then come and go as far as they must, and pictures too large for that are decoded
                in tiles (`memory_plan` tells). Originals of weights that a LoRA changes come on top. Only for torch engines.

        Raises:
            BadRequest: `capture` is none of these, the device is not there, or the model does not run within the budget.
            BundleError: there is no bundle, or it is damaged.
            EngineMismatch: it has no engine for this device, kind or precision.
        """
        if capture not in ("step", "loop", "image", "off"):
            raise BadRequest(f"capture is {capture!r}, expected step, loop, image or off", param="capture")
        budget = None if memory_budget is None else parse_bytes(memory_budget, param="memory_budget")
        if budget is not None and capture == "image":
            raise BadRequest(
                'capture is "image", which keeps the decoder in memory; with memory_budget use step', param="capture"
            )
        bundle = Bundle.open(builtin_bundle() if path is None else path)
        place = _device(device)
        if place.type == "cuda":
            choices.apply(place)
        recorder = Recorder(place) if place.type == "cuda" and capture != "off" else None
        loader = EngineLoader(bundle, place, engine, dtype, recorder, staged=budget is not None)
        return cls(loader, capture=capture, memory_budget=budget)

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
        guidance_rescale: float = 0.0,
        generator: Generators | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        clip_skip: int | None = None,
        long_prompt: LongPrompt = "chunk",
        emphasis: bool = False,
        variation_seed: int | None = None,
        variation_strength: float = 0.0,
        image: Picture | None = None,
        mask_image: Picture | None = None,
        control_image: Picture | Sequence[Picture | None] | None = None,
        controlnet_scale: float | Sequence[float] = 1.0,
        control_start: float | Sequence[float] = 0.0,
        control_end: float | Sequence[float] = 1.0,
        output_type: OutputType = "pil",
        on_step: OnStep | None = None,
    ) -> Result:
        """Make pictures. What is not given comes from the model's defaults (`self.defaults`).

        Args:
            prompt: one prompt or several; not needed with `prompt_embeds`.
            negative_prompt: what not to show; one for all prompts or one each.
            num_inference_steps: denoising steps.
            guidance_scale: classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598); at most 1 is without. To a model that was
                distilled with guidance (LCM) it is an input, without a negative prompt.
            sampler: such as `ddim`, `Euler a` or `dpm++ 2m karras`; docs/samplers.md lists them.
            eta: the noise of `ddim` and `tcd`, 0 to 1.
            seed: of the first image; image i has seed + i. Drawn, and reported in the result, if not given.
            num_images_per_prompt: images for each prompt.
            width: in pixels, a size that the bundle has engines for.
            height: in pixels.
            guidance_rescale: brings the deviation of the guided output back to that of the unguided one, from 0, not at all, to 1
                (Lin et al. 2023, arXiv 2305.08891, section 3.4); against pictures that are too bright.
            generator: a `torch.Generator` on the CPU for all images, or one for each; instead of `seed`.
            latents: (n, C, h, w) float32, standard normal, instead of noise from a seed.
            prompt_embeds: (1 or n, tokens, width), instead of encoding the prompt.
            negative_prompt_embeds: the same for the negative prompt.
            pooled_prompt_embeds: (1 or n, projection), with prompt_embeds where the model has pooled embeddings (SDXL).
            negative_pooled_prompt_embeds: the same for the negative prompt.
            clip_skip: how many of the text encoder's last layers to leave out.
            long_prompt: `chunk` encodes a prompt longer than the text encoder's window in several windows, as AUTOMATIC1111 does;
                `cut` drops the rest, with a warning.
            emphasis: whether `(word)`, `(word:1.3)` and `[word]` in prompts weigh the word, as in AUTOMATIC1111's web UI (`ldmrt.emphasis`).
            variation_seed: of another noise, towards which the images' own is turned; all images then have the same seed, and image i has this
                plus i. Drawn, and reported in the result's job, if not given.
            variation_strength: how far, from 0, the picture of `seed`, to 1, that of `variation_seed`.
            image: for an inpainting model, the picture to draw into, a PIL image or an array of uint8 (H, W, 3); it is resized.
            mask_image: the same, white where it is to be drawn anew.
            control_image: for each ControlNet of the bundle (`bundle.manifest.controlnets`, in order) the picture that it follows, or
                None to leave it out; a picture alone for a single one. All images of the call follow it. A PIL image or an array of
                uint8 (H, W, 3); it is resized.
            controlnet_scale: how much of each ControlNet, one number for all or one for each.
            control_start: the share of the steps after which each begins, 0 to 1, likewise.
            control_end: the share of the steps after which each ends.
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
                guidance_rescale=guidance_rescale,
                sampler=sampler,
                eta=eta,
                seed=seed,
                num_images_per_prompt=num_images_per_prompt,
                width=width,
                height=height,
                clip_skip=clip_skip,
                long_prompt=long_prompt,
                emphasis=emphasis,
                variation_seed=variation_seed,
                variation_strength=variation_strength,
            ),
            self.defaults,
        )
        if output_type not in ("pil", "np", "latent"):
            raise BadRequest(f"output_type is {output_type!r}, expected pil, np or latent", param="output_type")
        controls = control.resolve(
            [record.name for record in self.bundle.manifest.controlnets],
            (job.width, job.height),
            pictures=control_image,
            scale=controlnet_scale,
            start=control_start,
            end=control_end,
        )
        names = [one.name for one in controls]
        inpainting = resolve_inpainting(self.bundle.manifest.model, (job.width, job.height), image, mask_image)
        given = Given(prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds)
        if not self.bundle.manifest.model.tokenizers:
            _check_unconditional(job, given)
        clock = _Clock()
        with self._lock, torch.inference_mode():
            self._residency.begin(Workload((job.width, job.height), tuple(names), inpainting is not None))
            with clock("tokenize"):
                windows = self._prompts.tokenize(job)
            with clock("encode"):
                self._residency.enter("encode")
                texts = self._prompts.embed(job, windows, given)
            with clock("prepare"):
                table = sampler_table(job.sampler, self.schedule, job.num_inference_steps, job.eta)
                starts, noises, encoding = draw(
                    job.seeds,
                    self._latent_shape(job),
                    table,
                    generator=generator,
                    latents=latents,
                    encoding=inpainting is not None,
                    variations=job.variation_seeds,
                    strength=job.variation_strength,
                )
                own: list[dict[str, torch.Tensor]] = [self._guidance(job)] * len(starts)
                if inpainting is not None and encoding is not None:
                    self._residency.enter("picture")
                    encoder = self._loader.load(self._loader.records("encoder", (job.width, job.height))[0])
                    masked = inpainting.conditionings(encoder, self.bundle.manifest.model, encoding, self.device)
                    own = [one | more for one, more in zip(own, masked, strict=True)]
            finals = torch.empty_like(starts)
            decoded: dict[int, torch.Tensor] = {}
            with clock("prepare"):
                self._residency.enter("denoise")
            for group in self._denoisers.groups(job, [len(cond.states) for cond, _ in texts], names):
                with clock("prepare"):
                    denoiser = self._denoisers.get(job, table, len(group), len(texts[group[0]][0].states), names)
                try:
                    with clock("prepare"):
                        for slot, number in enumerate(group):
                            cond, uncond = texts[number]
                            denoiser.admit(
                                slot,
                                latents=starts[number],
                                table=table,
                                guidance_scale=job.guidance_scale,
                                cond=conditioning(cond, job) | own[number],
                                uncond=None if uncond is None else conditioning(uncond, job) | own[number],
                                noise=None if noises is None else noises[number],
                                guidance_rescale=job.guidance_rescale,
                                controls=[one.conditioning(table.evaluations, self.device) for one in controls],
                            )
                    with clock("denoise"):
                        wanted = on_step is None and output_type != "latent"
                        decoding = self._denoisers.decoding(denoiser) if wanted else None
                        self._denoise(denoiser, table, len(group), on_step, decoding)
                        finals[group] = denoiser.slots.x[: len(group)].cpu()
                        if decoding is not None:
                            decoded |= dict(zip(group, decoding.images.clone(), strict=False))
                finally:
                    for slot in range(len(group)):
                        denoiser.release(slot)
                    del denoiser  # whose engines may be unloaded next
            if not finals.isfinite().all():
                raise NumericalError(
                    f"the latents hold {int((~finals.isfinite()).sum())} NaN or infinite values out of {finals.numel()}:"
                    " use a wider dtype (float32), or a smaller guidance scale"
                )
            with clock("decode"):
                self._residency.enter("decode")
                if output_type == "latent":
                    images = None
                elif decoded:
                    images = _delivered(torch.stack([decoded[number] for number in range(len(finals))]), output_type)
                else:
                    images = _delivered(decode(self._loader, finals, (job.width, job.height)), output_type)
        # A tensor made in inference mode could not be used in a caller's own computation.
        finals = finals.clone()
        images = finals if output_type == "latent" else images
        return Result(images=images, latents=finals, seeds=job.seeds, timings=clock.seconds, job=job)

    def update_weights(self, component: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Change weights in place, as for another checkpoint of the same architecture. Nothing is compiled anew.

        LoRAs stay on the weights. The first values of those that change are kept, where they are used, for `restore_weights`.

        Args:
            component: `unet`, `controlnet.NAME`, `text_encoder`, `text_encoder_2`, `decoder` or `encoder`. The last two share their
                file, not their weights.
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
        if self.kind != "torch":
            raise EngineMismatch(
                f"{self.kind} engines hold weights of their own, which no LoRA can be added to: build again with "
                f"`ldmrt build-engines ... --lora {os.fspath(path)}:{scale:g}`, or use the torch engine"
            )
        with self._lock:
            components = ("unet", *self.bundle.manifest.model.tokenizers)
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
        needed = parts(_step(component)) if _is_network(component) else (component,)
        known = {record.component for record in self.bundle.manifest.engines}
        if component in parts(STEP) or not known.issuperset(needed):
            raise BadRequest(
                f"component is {component!r}, expected unet, text_encoder, decoder, encoder or controlnet.NAME",
                param="component",
            )
        if self.kind != "torch":
            raise EngineMismatch(
                f"{self.kind} engines hold weights of their own, which cannot be changed in place: use the torch engine"
            )
        self._residency.enter("denoise" if _is_network(component) else _STAGES.get(component, "encode"))
        for part in needed:
            self._loader.load(self._loader.records(part)[0])
        return self._weights(component)

    def _record(self, component: str) -> EngineRecord:
        """An engine that reads a component's weights."""
        return self._loader.records(_step(component) if _is_network(component) else component)[0]

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

    def memory_plan(self, width: int | None = None, height: int | None = None) -> MemoryPlan | None:
        """How pictures of a size are made within the memory budget, by default of the default size; None without a budget.

        Raises:
            BadRequest: the budget does not hold that size.
            EngineMismatch: the bundle has no engine for it.
        """
        if self._residency.budget is None:
            return None
        size = width or self.defaults.width, height or self.defaults.height
        with self._lock:
            return self._residency.begin(Workload(size, picture=self.bundle.manifest.model.inpainting))

    def images_at_a_time(self, width: int, height: int, *, guidance: bool) -> int:
        """The largest batch that the bundle's step engines run at once, as far as there is room for it."""
        self.memory_plan(width, height)
        return self._denoisers.images_at_a_time((width, height), guidance=guidance)

    # ------------------------------------------------------------------------------------------------ stages

    def _latent_shape(self, job: Job) -> tuple[int, int, int]:
        model = self.bundle.manifest.model
        return model.latent_channels, job.height // model.downscale, job.width // model.downscale

    def _guidance(self, job: Job) -> dict[str, torch.Tensor]:
        """What a model that takes the guidance scale as an input reads of it; nothing for others."""
        width = self.bundle.manifest.model.guidance_embedding
        return {} if width is None else {"timestep_cond": embedding(job.guidance_scale, width).to(self.device)}

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


def _is_network(component: str) -> bool:
    """Whether a component's engines are the parts of a denoising network."""
    return component == "unet" or component.startswith(CONTROLNET)


def _step(network: str) -> str:
    return STEP if network == "unet" else f"{network}.step"


def _check_unconditional(job: Job, given: Given) -> None:
    """Refuse what only a model that reads text takes.

    Raises:
        BadRequest: there is a prompt, an embedding, or guidance.
    """
    if any((*job.prompts, *job.negative_prompts)) or given != Given():
        raise BadRequest(
            "this model reads no text, and draws what it was trained on; leave the prompt empty", param="prompt"
        )
    if job.do_cfg:
        raise BadRequest(
            f"guidance_scale is {job.guidance_scale:g}, and this model reads no text that it could follow; use 1",
            param="guidance_scale",
        )


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
