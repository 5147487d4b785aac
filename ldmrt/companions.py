"""The built-in model's companions: small models that come with ldmrt, each for a task of its own."""

from __future__ import annotations

from pathlib import Path

from ldmrt.errors import BadRequest

_FOLDER = Path(__file__).parent / "builtin" / "companions"


def companion(name: str) -> Path:
    """Where a companion of the built-in shapes model lies, for `build_engines` or `Pipeline.load_lora`.

    Args:
        name: `edges` (the folder of a ControlNet), `inpainting` (of a U-Net, whose base is the built-in model), `outlines` (the file
            of a LoRA), or `upscaler` (the folder of a model that draws pictures four times as wide and high, without their noise).

    Raises:
        BadRequest: there is none of that name.
    """
    found = {path.stem: path for path in sorted(_FOLDER.iterdir())}
    if name not in found:
        raise BadRequest(f"name is {name!r}, and the companions are {', '.join(found)}", param="name")
    return found[name]
