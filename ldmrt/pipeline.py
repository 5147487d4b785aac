"""Prompts to pictures: the whole path, over an opened bundle."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

import torch

from ldmrt import choices, control
from ldmrt.adapters import Adapters
from ldmrt.asking import check_text, checked, default_strength, prompts_of
from ldmrt.bundle import Bundle
from ldmrt.capture import Recorder
from ldmrt.classes import ClassLabels
from ldmrt.components import CONTROLNET, STEP, parts
from ldmrt.conditioning import Picture, encode
from ldmrt.decoding import Decoding, decode
from ldmrt.delivery import OutputType, check_output_type, delivered
from ldmrt.denoise import Denoiser
from ldmrt.denoisers import Denoisers, room_for
from ldmrt.errors import BadRequest, EngineMismatch, NumericalError, Unavailable
from ldmrt.guidance import embedding
from ldmrt.layout import Layout
from ldmrt.loader import EngineLoader
from ldmrt.lora import Lora
from ldmrt.manifest import REFINER, EngineRecord
from ldmrt.material import Brought, Material, Start, resolve as resolve_material
from ldmrt.memory_plan import MemoryPlan, Stage, parse_bytes
from ldmrt.needs import Workload
from ldmrt.noise import Generators, Noise
from ldmrt.opening import builtin_bundle, device_of, first_that_loads
from ldmrt.parameters import Parameters
from ldmrt.request import Defaults, Job, LongPrompt, Request, resolve
from ldmrt.residency import Residency
from ldmrt.samplers.make import sampler_table
from ldmrt.samplers.table import SamplerTable
from ldmrt.schedule import NoiseSchedule
from ldmrt.segmentation import SemanticMap
from ldmrt.text import Embedding, Given, PromptEncoder, TextModel, Windows
from ldmrt.textual_inversion import TextualInversion, Words

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
        timings: seconds by stage: tokenize, encode, prepare, denoise, decode, copy. On a GPU what one stage has launched may end in a
            later one, but for `Pipeline.exact_timings`.
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
        exact_timings: wait for the GPU after every stage, so that `Result.timings` holds what each takes; calls are slower by it.
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
        guided = bool(model.tokenizers) or model.null_class is not None
        guided = guided and model.guidance_embedding is None and model.defaults.guidance_scale > 1
        self._residency = Residency(loader, self._denoisers, memory_budget, least_rows=2 if guided else 1)
        self._residency.begin(Workload((width, height), picture=model.inpainting))
        texts = {
            encoder: TextModel.open(folder, loader.only(encoder))
            for encoder, folder in self.bundle.check_tokenizers().items()
        }
        self.tokenizer = next((text.tokenizer for text in texts.values()), None)
        self._prompts = PromptEncoder(list(texts.values()), self.device, zero_empty_negative=model.zero_empty_negative)
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
            strength=default_strength(model),
            refines=model.kind == REFINER,
            takes_aesthetic_scores=model.requires_aesthetics_score,
        )
        self._adapters = Adapters(self._weights)
        self._words = Words({e: text.tokenizer for e, text in texts.items()}, self._weights, self._token_table)
        self.exact_timings = False
        self._lock = threading.Lock()
        self._borrower: int | None = None

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
            fallback: whether another engine kind of the bundle may run where this one cannot, in the order tensorrt, tensorrt-rtx, torch,
                onnxruntime, with a warning that says which failed and why. Without `engine` the first of them is tried first. It is decided
                here: engines of the default size are loaded at once, but for those of a memory budget.
            weight_budget: for TensorRT plans that were built with weight streaming: the most memory in bytes that the weights of each may
                take on the GPU; None for what TensorRT proposes. Not yet run on a GPU.
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
        place = device_of(device)
        if place.type == "cuda":
            choices.apply(place)
        recorder = Recorder(place) if place.type == "cuda" and capture != "off" else None

        def load(kind: str | None) -> Pipeline:
            loader = EngineLoader(bundle, place, kind, dtype, recorder, weight_budget, staged=budget is not None)
            pipe = cls(loader, capture=capture, memory_budget=budget)
            if fallback and budget is None:  # within which engines come and go, and are torch's, which run everywhere
                loader.load_all((pipe.defaults.width, pipe.defaults.height))
            return pipe

        return first_that_loads(load, bundle, engine) if fallback else load(engine)

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
        noise: Noise | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        clip_skip: int | None = None,
        long_prompt: LongPrompt = "chunk",
        emphasis: bool = False,
        variation_seed: int | None = None,
        variation_strength: float = 0.0,
        image: Picture | torch.Tensor | None = None,
        strength: float | None = None,
        mask_image: Picture | None = None,
        mask_blur: float | None = None,
        apply_overlay: bool = False,
        denoising_start: float | None = None,
        denoising_end: float | None = None,
        aesthetic_score: float | None = None,
        negative_aesthetic_score: float | None = None,
        noise_level: int | None = None,
        class_labels: ClassLabels | None = None,
        segmentation: SemanticMap | None = None,
        layout: Layout | None = None,
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
            noise: all noise of the call, instead of drawing any: parts of that of a larger picture, as `ldmrt.enlarging` cuts them.
            prompt_embeds: (1 or n, tokens, width), instead of encoding the prompt.
            negative_prompt_embeds: the same for the negative prompt.
            pooled_prompt_embeds: (1 or n, projection), with prompt_embeds where the model has pooled embeddings (SDXL).
            negative_pooled_prompt_embeds: the same for the negative prompt.
            clip_skip: how many of the text encoder's last layers to leave out.
            long_prompt: `chunk` encodes a prompt longer than the text encoder's window in several windows, as AUTOMATIC1111 does;
                `cut` drops the rest, with a warning.
            emphasis: whether `(word)`, `(word:1.3)` and `[word]` in prompts weigh the word, and `BREAK` begins a new window of tokens, as in
                AUTOMATIC1111's web UI (`ldmrt.emphasis`).
            variation_seed: of another noise, towards which the images' own is turned; all images then have the same seed, and image i has this
                plus i. Drawn, and reported in the result's job, if not given.
            variation_strength: how far, from 0, the picture of `seed`, to 1, that of `variation_seed`.
            image: the picture to begin from, a PIL image or an array of uint8 (H, W, 3), which is resized, or its latents (1 or n, C, h, w);
                for an inpainting model the picture to draw into, for an upscaling model the one to draw larger: a pixel of it for each latent
                cell.
            strength: how much of the picture is drawn anew, 0 to 1: that share of the steps is made, the last ones. Without it 0.8, 0.3
                for SDXL, and with a mask 1, which leaves nothing of what that covers.
            mask_image: a picture that is white where the other is to be drawn anew. An inpainting model is shown it; with another one
                the latents of the rest are put back after every step.
            mask_blur: the radius in pixels by which the mask's edges are softened, 0 to keep its greys as they are. Without it grey counts
                as black or white, as in diffusers; so it does to inpainting models, for which this is the edge of the overlay.
            apply_overlay: give every pixel that the mask leaves out back as it was.
            denoising_start: the share of the schedule that another model has made, whose latents are `image`; nothing is added to them.
            denoising_end: the share of the schedule after which the latents are left to another model; see `ldmrt.refining`.
            aesthetic_score: of the prompt's pictures, for a model that takes one (the refiner of SDXL); 6 without.
            negative_aesthetic_score: of the negative prompt's; 2.5 without.
            noise_level: how much noise an upscaling model is to find on the picture: more leaves it more freedom.
            class_labels: for a class-conditional model the number of the class, or one for each of several.
            segmentation: for a model of semantic maps the number of a class for each pixel, as an array (H, W), or an image of one channel or
                of a palette; it is resized.
            layout: for a model of layouts the objects, `{"class": N, "box": [left, top, width, height]}`, in shares of the picture.
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
        job = resolve(
            Request(
                prompt=prompts_of(prompt, prompt_embeds, class_labels),
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
                has_image=image is not None,
                has_mask=mask_image is not None,
                mask_blur=mask_blur,
                apply_overlay=apply_overlay,
                strength=strength,
                denoising_start=denoising_start,
                denoising_end=denoising_end,
                aesthetic_score=aesthetic_score,
                negative_aesthetic_score=negative_aesthetic_score,
            ),
            self.defaults,
        )
        model, size = self.bundle.manifest.model, (job.width, job.height)
        check_output_type(output_type)
        controls = control.resolve(
            [record.name for record in self.bundle.manifest.controlnets],
            size,
            pictures=control_image,
            scale=controlnet_scale,
            start=control_start,
            end=control_end,
        )
        names = [one.name for one in controls]
        material = resolve_material(
            model,
            job,
            image=image,
            mask_image=mask_image,
            latents=latents,
            noise_level=noise_level,
            class_labels=class_labels,
            segmentation=segmentation,
            layout=layout,
        )
        table = self.table(job)
        given = Given(prompt_embeds, negative_prompt_embeds, pooled_prompt_embeds, negative_pooled_prompt_embeds)
        check_text(self.bundle.manifest.model, job, given)
        clock = _Clock(self._synchronize if self.exact_timings else lambda: None)
        workload = Workload(size, tuple(names), material.is_encoded, room_for(table.evaluations))
        with self._engines(for_pictures=True), torch.inference_mode():
            self._residency.begin(workload)
            with clock("tokenize"):
                windows = self._prompts.tokenize(job)
            with clock("encode"):
                self._residency.enter("encode")
                texts = self._prompts.embed(job, windows, given)
            with clock("prepare"):
                starts = material.starts(job, table, partial(self._encoded, size), self.device, generator, noise)
            finals = torch.stack([start.latents for start in starts])
            decoded: dict[int, torch.Tensor] = {}
            with clock("prepare"):
                self._residency.enter("denoise")
            for group in self._denoisers.groups(job, [len(cond.states) for cond, _ in texts], names):
                with clock("prepare"):
                    denoiser = self._denoisers.get(
                        (job.width, job.height),
                        len(group) * (2 if job.do_cfg else 1),
                        tokens=len(texts[group[0]][0].states),
                        evaluations=table.evaluations,
                        controls=names,
                    )
                try:
                    with clock("prepare"):
                        for slot, number in enumerate(group):
                            self._admit(denoiser, slot, job, texts[number], starts[number], controls)
                    with clock("denoise"):
                        wanted = on_step is None and output_type != "latent"
                        decoding = (
                            self._denoisers.decoding(denoiser, (job.width, job.height), len(group)) if wanted else None
                        )
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
                    tensors = None
                elif decoded:
                    tensors = torch.stack([decoded[number] for number in range(len(finals))])
                else:
                    tensors = decode(self._loader, finals, size)
            with clock("copy"):
                images = None if tensors is None else delivered(material.finished(tensors), output_type)
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
        with self._engines():
            self._parameters(component).update(tensors)

    def restore_weights(self, component: str) -> None:
        """Give a component the weights of the bundle back, to the bit. LoRAs that are loaded stay on them.

        Raises:
            BadRequest: there is no such component.
            EngineMismatch: the engine kind embeds its weights.
        """
        with self._engines():
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
        with self._engines():
            shapes = {component: self.bundle.shapes(self._record(component).weights) for component in components}
            lora = Lora.read(Path(path), shapes)
            self._adapters.add(name or lora.path.stem, lora, scale)

    def set_lora_scale(self, name: str, scale: float) -> None:
        """Change how much of a LoRA is added; at 0 the weights are as without it.

        Raises:
            BadRequest: no LoRA of that name is loaded, or the scale is not finite.
        """
        with self._engines():
            self._adapters.set_scale(name, scale)

    def unload_lora(self, name: str) -> None:
        """Take a LoRA off the weights. Without any they are what they were, to the bit.

        Raises:
            BadRequest: no LoRA of that name is loaded.
        """
        with self._engines():
            self._adapters.remove(name)

    @property
    def loras(self) -> dict[str, float]:
        """The loaded LoRAs: name -> scale."""
        return self._adapters.scales

    def load_textual_inversion(self, path: str | os.PathLike[str], token: str | None = None) -> str:
        """Make a learnt word known (Gal et al. 2022, arXiv 2208.01618), in place: nothing is compiled or captured anew.

        Args:
            path: a safetensors file in the form of AUTOMATIC1111, diffusers, or of Stable Diffusion XL (`clip_l` and `clip_g`).
            token: what to write in a prompt for it; None for the word that the file names, or the file's name without its ending.

        Returns:
            The word.

        Raises:
            BadRequest: the file is none, or for another kind of model; the word is taken; there is no room for more vectors.
            EngineMismatch: the engine kind embeds its weights.
        """
        encoders = tuple(self.bundle.manifest.model.tokenizers)
        if not all(self._record(encoder).takes_weights for encoder in encoders):
            raise EngineMismatch(
                f"{self.kind} engines hold weights of their own, which no embedding can be added to: use the torch engine"
            )
        with self._lock:
            shapes = {encoder: self.bundle.shapes(self._record(encoder).weights) for encoder in encoders}
            widths = {encoder: held[self._token_table(encoder)][-1] for encoder, held in shapes.items()}
            inversion = TextualInversion.read(Path(path), token, widths)
            self._words.add(inversion)
            return inversion.token

    def unload_textual_inversion(self, token: str) -> None:
        """Forget a learnt word. Without any the weights are what they were, to the bit.

        Raises:
            BadRequest: no embedding of that name is loaded.
        """
        with self._lock:
            self._words.remove(token)

    @property
    def textual_inversions(self) -> tuple[str, ...]:
        """The learnt words that are loaded."""
        return self._words.tokens

    def _token_table(self, encoder: str) -> str:
        """The name of a text encoder's table of embeddings."""
        names = self.bundle.shapes(self._record(encoder).weights)
        return next(name for name in names if name.endswith("token_embedding.weight"))

    def _parameters(self, component: str) -> Parameters:
        """A component's weights, all of its engines loaded, so that their names are known."""
        needed = parts(_step(component)) if _is_network(component) else (component,)
        known = {record.component for record in self.bundle.manifest.engines}
        if component in parts(STEP) or not known.issuperset(needed):
            raise BadRequest(
                f"component is {component!r}, expected unet, text_encoder, decoder, encoder or controlnet.NAME",
                param="component",
            )
        if not self._record(component).takes_weights:
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

    def engines(self, component: str, size: tuple[int, int] | None = None) -> list[EngineRecord]:
        """A component's engines in the kind and precision in use, by row count.

        Raises:
            EngineMismatch: there is none.
        """
        return self._loader.records(component, size)

    @property
    def memory_budget(self) -> int | None:
        """The most memory to take, in bytes; None without a budget."""
        return self._residency.budget

    def memory_plan(
        self, width: int | None = None, height: int | None = None, *, picture: bool = False
    ) -> MemoryPlan | None:
        """How pictures of a size are made within the memory budget; None without one.

        Args:
            width: in pixels, by default the model's.
            height: likewise.
            picture: whether they begin from a picture, which is encoded, as an inpainting model's is.

        Raises:
            BadRequest: the budget does not hold that size.
            EngineMismatch: the bundle has no engine for it.
        """
        if self.memory_budget is None:
            return None
        model = self.bundle.manifest.model
        size = width or self.defaults.width, height or self.defaults.height
        workload = Workload(size, picture=model.inpainting or (picture and model.upscaling is None))
        with self._engines(for_pictures=True):
            return self._residency.begin(workload)

    def images_at_a_time(self, width: int, height: int, *, guidance: bool) -> int:
        """The largest batch that the bundle's step engines run at once, as far as there is room for it."""
        self.memory_plan(width, height)
        return self._denoisers.images_at_a_time((width, height), guidance=guidance)

    # ------------------------------------------------------------------------------------------------ for ldmrt.serving

    @contextmanager
    def lend(self) -> Iterator[None]:
        """Give the engines to this thread until the end of the block; a call that is under way is waited for. Meanwhile nobody else makes
        pictures, and only this thread can change weights.

        Raises:
            Unavailable: they are lent already.
        """
        with self._engines(for_pictures=True):
            self._borrower = threading.get_ident()
        try:
            yield
        finally:
            self._borrower = None

    def resolve(
        self,
        request: Request,
        **brought: Unpack[Brought],
    ) -> tuple[Job, Material]:
        """What is to be done for a request, checked. Any thread may call it.

        Args:
            request: what is wanted.
            brought: as of `__call__`.

        Raises:
            BadRequest: a value cannot be used.
        """
        return checked(self.bundle.manifest.model, self.defaults, request, **brought)

    def tokenize(self, job: Job) -> list[Windows]:
        """For each prompt its windows of tokens: see `ldmrt.text.PromptEncoder.tokenize`. Any thread may call it."""
        return self._prompts.tokenize(job)

    def table(self, job: Job) -> SamplerTable:
        """The sampler. Any thread may call it.

        Raises:
            BadRequest: the sampler does not go with the model or the steps.
        """
        return sampler_table(job.sampler, self.schedule, job.num_inference_steps, job.eta, job.span)

    def row_counts(self, size: tuple[int, int]) -> list[int]:
        """The rows of the model's batches that the bundle has engines for, fewest first. An image takes one, with guidance two."""
        return self._denoisers.row_counts(size)

    def denoiser(self, size: tuple[int, int], rows: int, *, tokens: int, evaluations: int) -> Denoiser:
        """See `ldmrt.denoisers.Denoisers.get`. For the thread that has the engines, as are the next ones."""
        return self._denoisers.get(size, rows, tokens=tokens, evaluations=evaluations)

    def embed(self, images: Sequence[tuple[Job, Windows]], *, together: bool) -> list[Text]:
        """For each image, a job of one prompt and its windows, what the model reads of the prompt and, with guidance, of the negative one."""
        if together:
            return self._prompts.embed_together(images)
        return [self._prompts.embed(job, [windows], Given())[0] for job, windows in images]

    def admit(
        self, denoiser: Denoiser, slot: int, job: Job, table: SamplerTable, text: Text, material: Material
    ) -> None:
        """Put the image of a job of one image into a slot."""
        (start,) = material.starts(job, table, partial(self._encoded, (job.width, job.height)), self.device)
        self._admit(denoiser, slot, job, text, start)

    def decode(self, latents: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Latents (n, C, h, w) to pixels (n, 3, H, W) in [-1, 1]."""
        return decode(self._loader, latents, size)

    def set_decoder_apart(self) -> None:
        """Let the decoder be used on one stream while the denoising network is on another.

        Raises:
            BadRequest: there are no streams, or the engines share the memory that they compute in.
        """
        if self.device.type != "cuda":
            raise BadRequest(f"decoding overlaps with steps on a GPU, and this is {self.device}", param="overlap")
        try:
            self._loader.set_apart("decoder")
        except EngineMismatch as error:
            raise BadRequest(str(error), param="overlap") from error

    # ------------------------------------------------------------------------------------------------ stages

    @contextmanager
    def _engines(self, *, for_pictures: bool = False) -> Iterator[None]:
        """The engines for this thread alone.

        Args:
            for_pictures: whether slots are needed too, which a borrower has in use.

        Raises:
            Unavailable: they are lent to another.
        """
        with self._lock:
            if self._borrower is not None and (for_pictures or self._borrower != threading.get_ident()):
                raise _lent()
            yield

    def _admit(
        self,
        denoiser: Denoiser,
        slot: int,
        job: Job,
        text: Text,
        start: Start,
        controls: Sequence[control.Control] = (),
    ) -> None:
        cond, uncond = text
        guidance = self._guidance(job)
        denoiser.admit(
            slot,
            latents=start.latents,
            table=start.table,
            guidance_scale=job.guidance_scale,
            cond={**self._conditioning(cond, job), **guidance, **start.cond},
            uncond=None
            if uncond is None
            else {**self._conditioning(uncond, job, negative=True), **guidance, **start.uncond},
            noise=start.noise,
            guidance_rescale=job.guidance_rescale,
            controls=[one.conditioning(start.table.evaluations, self.device) for one in controls],
            blend=start.blend,
        )

    def _encoded(self, size: tuple[int, int], picture: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """A picture's latents: see `ldmrt.conditioning.encode`."""
        self._residency.enter("picture")
        encoder = self._loader.load(self._loader.records("encoder", size)[0])
        return encode(encoder, self.bundle.manifest.model, picture, noise, self.device)

    def _conditioning(self, embedding: Embedding, job: Job, *, negative: bool = False) -> dict[str, torch.Tensor]:
        """See `conditioning`."""
        scored = self.bundle.manifest.model.requires_aesthetics_score
        score = job.negative_aesthetic_score if negative else job.aesthetic_score
        return conditioning(embedding, job, score if scored else None)

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
        self._synchronize()

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def _lent() -> Unavailable:
    return Unavailable("the pipeline is lent to a batcher: submit to that (`ldmrt.serving.Batcher`), or close it first")


def _is_network(component: str) -> bool:
    """Whether a component's engines are the parts of a denoising network."""
    return component == "unet" or component.startswith(CONTROLNET)


def _step(network: str) -> str:
    return STEP if network == "unet" else f"{network}.step"


def conditioning(embedding: Embedding, job: Job, score: float | None = None) -> dict[str, torch.Tensor]:
    """A denoising network's request inputs, without the dimension of rows; each network takes those that it knows.

    `time_ids` says that nothing was scaled or cropped (Podell et al. 2023, arXiv 2307.01952, section 2.2): original height and
    width, top and left of the crop, target height and width; in a refiner, which has an aesthetic score, that in the place of the last two.
    """
    inputs = {"encoder_hidden_states": embedding.states}
    if embedding.pooled is not None:
        inputs["text_embeds"] = embedding.pooled
        target = (job.height, job.width) if score is None else (score,)
        ids = (job.height, job.width, 0, 0, *target)
        inputs["time_ids"] = torch.tensor(ids, dtype=torch.float32, device=embedding.states.device)
    return inputs


class _Clock:
    """Seconds by stage, added up; each ends with `settle`."""

    def __init__(self, settle: Callable[[], None]) -> None:
        self.seconds: dict[str, float] = {}
        self._settle = settle

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._settle()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start
