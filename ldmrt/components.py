"""What a bundle's components are called.

A denoising network is three of them, cut apart by `ldmrt.export.passes.hoist`: the U-Net is `context`, `schedule` and `step`, a
ControlNet `controlnet.NAME.context` and so on. The U-Net has a second step, which reads the residuals of ControlNets.
"""

from __future__ import annotations

STEP = "step"
CONTROLLED_STEP = "controlled.step"
CONTROLNET = "controlnet."
# The input of a denoising network that is the number of a class, or of a noise level.
CLASS_LABELS = "class_labels"
# The number of a class for every pixel.
SEGMENTATION = "segmentation"
# Objects and their boxes, as tokens.
LAYOUT = "layout"
# What a ControlNet may be called: its name becomes part of file names. A regular expression.
CONTROLNET_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,127}"


def is_step(component: str) -> bool:
    """Whether it is the part of a denoising network that runs at every step."""
    return component.rpartition(".")[2] == "step"


def runs_once(component: str) -> bool:
    """Whether it is a part of a denoising network that runs once per request, on the torch engine whatever runs the rest."""
    return component.rpartition(".")[2] in ("context", "schedule")


def in_network(component: str) -> bool:
    """Whether it is a part of a denoising network."""
    return is_step(component) or runs_once(component)


def parts(step: str) -> tuple[str, str, str]:
    """The components of the network that a step belongs to: context, schedule, and the step itself."""
    owner = step.removesuffix("step")
    prefix = owner if owner.startswith(CONTROLNET) else ""
    return f"{prefix}context", f"{prefix}schedule", step


def controlnet(name: str) -> str:
    """What the ControlNet of that name is called as a whole: the folder of its weights."""
    return f"{CONTROLNET}{name}"
