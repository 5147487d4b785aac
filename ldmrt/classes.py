"""What a request for a class-conditional model brings: the number of a class for each image."""

from __future__ import annotations

import numbers
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ldmrt.components import CLASS_LABELS
from ldmrt.errors import BadRequest
from ldmrt.manifest import ModelRecord
from ldmrt.request import Job

ClassLabels = int | Sequence[int]


@dataclass(frozen=True)
class Classes:
    """The classes to draw.

    Attributes:
        labels: one for each image; none for a model that is told no classes.
        null: the label that stands for no class, with guidance.
    """

    labels: tuple[int, ...] = ()
    null: int | None = None

    def of(self, image: int) -> Classes:
        """The part that concerns one image, which counts from 0."""
        return replace(self, labels=self.labels[image : image + 1])

    def conditionings(
        self, image: int, device: torch.device
    ) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """The U-Net's inputs for an image and, to guide it, for none: `class_labels`, an int64; empty for a model that takes none.

        Args:
            image: its number in the call.
            device: where the engines run.
        """
        if not self.labels:
            return {}, {}
        label = {CLASS_LABELS: torch.tensor(self.labels[image], device=device)}
        return label, label if self.null is None else {CLASS_LABELS: torch.tensor(self.null, device=device)}


def resolve(model: ModelRecord, job: Job, class_labels: ClassLabels | None) -> Classes:
    """The classes of a request.

    Args:
        model: which classes it knows.
        job: how many images there are; one label stands for all of them, or there is one for each of its prompts.
        class_labels: the request's.

    Raises:
        BadRequest: the model needs them and they are not there, or it has no use for them, or knows no such class, or guidance is asked
            for and there is nothing to compare with.
    """
    if model.classes is None:
        if class_labels is not None:
            raise BadRequest(
                f"class_labels was given, and {model.name} draws no classes; leave it out", param="class_labels"
            )
        return Classes()
    if class_labels is None:
        raise BadRequest(
            f"class_labels is missing: {model.name} draws one of {model.classes} classes; give a number, 0 to"
            f" {model.classes - 1}",
            param="class_labels",
        )
    given: list[object] = list(class_labels) if isinstance(class_labels, list | tuple) else [class_labels]
    labels = [-1 if isinstance(x, bool) or not isinstance(x, numbers.Integral) else operator.index(x) for x in given]
    for label, value in zip(labels, given, strict=True):
        if not 0 <= label < model.classes:
            raise BadRequest(
                f"class_labels has {value!r}, expected a whole number, 0 to {model.classes - 1}", param="class_labels"
            )
    if len(labels) not in (1, len(job.prompts)):
        raise BadRequest(
            f"there are {len(labels)} class_labels for {len(job.prompts)} prompts, expected one, or one for each",
            param="class_labels",
        )
    if job.do_cfg and model.null_class is None:
        raise BadRequest(
            f"guidance_scale is {job.guidance_scale:g}, and {model.name} has no class that stands for none; use 1",
            param="guidance_scale",
        )
    each = labels * (len(job.prompts) // len(labels))
    return Classes(
        tuple(label for label in each for _ in range(job.num_images_per_prompt)),
        model.null_class if job.do_cfg else None,
    )
