"""What `ldmrt generate` is given besides words, as the pipeline's arguments."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Any

from ldmrt.errors import BadRequest


class ControlKind(StrEnum):
    """What a picture for a ControlNet is."""

    map = "map"
    edges = "edges"


def picture_arguments(image: Path | None, mask: Path | None, segmentation: Path | None) -> dict[str, Any]:
    """The pipeline's arguments for models that take pictures.

    Raises:
        BadRequest: a file is no picture.
    """
    from ldmrt.conditioning import open_picture

    paths = {"image": image, "mask_image": mask, "segmentation": segmentation}
    return {name: open_picture(path, param=name) for name, path in paths.items() if path is not None}


def edge_arguments(mask_blur: float | None, apply_overlay: bool, refiner: Path | None) -> dict[str, Any]:
    """The pipeline's arguments for where what is drawn meets what is kept.

    Raises:
        BadRequest: a refiner would draw over what is given back.
    """
    if apply_overlay and refiner is not None:
        raise BadRequest(
            "--apply-overlay gives pixels back as they were, and --refiner changes all of them; leave one of them out",
            param="apply_overlay",
        )
    given = {"mask_blur": mask_blur, "apply_overlay": apply_overlay or None}
    return {name: value for name, value in given.items() if value is not None}


def number_arguments(noise_level: int | None, class_label: int | None) -> dict[str, Any]:
    """The pipeline's arguments for an upscaling model, and for a class-conditional one."""
    numbers = {"noise_level": noise_level, "class_labels": class_label}
    return {name: value for name, value in numbers.items() if value is not None}


def control_arguments(
    images: list[Path] | None, scales: list[float] | None, starts: list[float] | None, ends: list[float] | None
) -> dict[str, Any]:
    """The pipeline's arguments for ControlNets; one number stands for all of them.

    Raises:
        BadRequest: a file is no picture, or numbers are given without pictures.
    """
    from ldmrt.conditioning import open_picture

    given = {"controlnet_scale": scales, "control_start": starts, "control_end": ends}
    numbers: dict[str, Any] = {
        name: values[0] if len(values) == 1 else values for name, values in given.items() if values
    }
    if not images:
        if numbers:
            raise BadRequest(
                f"{next(iter(numbers))} says nothing without a picture to follow; give --control-image",
                param="control_image",
            )
        return {}
    return {"control_image": [open_picture(path, param="control_image") for path in images], **numbers}


def control_maps(images: list[Any] | None, kinds: list[ControlKind] | None, size: tuple[int, int]) -> dict[str, Any]:
    """Maps for ControlNets: the pictures, or their edges.

    Args:
        images: the pictures; None without.
        kinds: one for all of them, or one for each; None for maps.
        size: (width, height) of what is drawn, in which edges are looked for.

    Raises:
        BadRequest: there are more or fewer kinds than pictures.
    """
    from PIL import Image

    from ldmrt.conditioning import read
    from ldmrt.edges import canny

    if not kinds:
        return {}
    found = images or []
    each = kinds * len(found) if len(kinds) == 1 else kinds
    if not found or len(each) != len(found):
        raise BadRequest(
            f"--control is given {len(kinds)} times for {len(found)} pictures, expected once, or once for each --control-image",
            param="control",
        )
    maps = [
        canny(read(image, param="control_image").resize(size, Image.Resampling.LANCZOS))
        if kind is ControlKind.edges
        else image
        for image, kind in zip(found, each, strict=True)
    ]
    return {"control_image": maps}
