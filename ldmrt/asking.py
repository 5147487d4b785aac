"""What can be asked of a model: requests checked against what it is, without any engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Unpack

import torch

from ldmrt.classes import ClassLabels
from ldmrt.errors import BadRequest
from ldmrt.manifest import ModelRecord
from ldmrt.material import Brought, Material, resolve as resolve_material
from ldmrt.request import Defaults, Job, Request, resolve
from ldmrt.text import Given


def checked(
    model: ModelRecord, defaults: Defaults, request: Request, **brought: Unpack[Brought]
) -> tuple[Job, Material]:
    """What is to be done for a request, checked without any engine: see `Pipeline.resolve`.

    Raises:
        BadRequest: a value cannot be used.
    """
    has_image, has_mask = (brought.get(key) is not None for key in ("image", "mask_image"))
    job = resolve(replace(request, has_image=has_image, has_mask=has_mask), defaults)
    check_text(model, job, Given())
    return job, resolve_material(model, job, **brought)


def check_text(model: ModelRecord, job: Job, given: Given) -> None:
    """Refuse words, or guidance by them, for a model that reads none.

    Args:
        model: which.
        job: what was asked.
        given: embeddings of text.

    Raises:
        BadRequest: the model reads no text, and some was given.
    """
    if not model.tokenizers:
        _check_unconditional(job, given, guided=model.null_class is not None)


def _check_unconditional(job: Job, given: Given, *, guided: bool) -> None:
    """Refuse what only a model that reads text takes.

    Args:
        job: what was asked.
        given: embeddings of text.
        guided: whether there is something else that guidance follows.

    Raises:
        BadRequest: there is a prompt, an embedding, or guidance.
    """
    if any((*job.prompts, *job.negative_prompts)) or given != Given():
        raise BadRequest(
            "this model reads no text, and draws what it was trained on; leave the prompt empty", param="prompt"
        )
    if job.do_cfg and not guided:
        raise BadRequest(
            f"guidance_scale is {job.guidance_scale:g}, and this model reads no text that it could follow; use 1",
            param="guidance_scale",
        )


def prompts_of(
    prompt: str | Sequence[str], prompt_embeds: torch.Tensor | None, class_labels: ClassLabels | None
) -> str | Sequence[str]:
    """The prompts, empty ones for what is given in their place."""
    if prompt == "" and prompt_embeds is not None:
        return [""] * len(prompt_embeds)
    return [""] * len(class_labels) if prompt == "" and isinstance(class_labels, list | tuple) else prompt


def default_strength(model: ModelRecord) -> float:
    """How much of a picture is drawn anew where nothing is said: as diffusers' pipelines have it, but that SDXL's for inpainting leaves
    out the first step.
    """
    if model.inpainting or model.upscaling is not None:
        return 1.0
    return 0.3 if model.kind.startswith("stable-diffusion-xl") else 0.8
