"""The LoRAs on a model's weights: added, scaled and taken off in place."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from ldmrt.errors import BadRequest
from ldmrt.lora import Lora, check_scale, fused
from ldmrt.parameters import Adjust, Parameters


class Adapters:
    """The LoRAs on a model's weights, by name.

    Args:
        parameters: gives a component's weights.
    """

    def __init__(self, parameters: Callable[[str], Parameters]) -> None:
        self._parameters = parameters
        self._loaded: dict[str, tuple[Lora, float]] = {}

    @property
    def scales(self) -> dict[str, float]:
        """The scale of each, in the order in which they were added."""
        return {name: scale for name, (_, scale) in self._loaded.items()}

    def add(self, name: str, lora: Lora, scale: float) -> None:
        """Add the changes of one more.

        Raises:
            BadRequest: the name is taken, or the scale is not a finite number.
        """
        if name in self._loaded:
            raise BadRequest(
                f"name is {name!r}, and a LoRA of that name is loaded: unload it, or give another name", param="name"
            )
        check_scale(scale)
        placed = {
            component: {weight: layer.on(self._parameters(component).device) for weight, layer in layers.items()}
            for component, layers in lora.layers.items()
        }
        self._loaded[name] = Lora(lora.path, placed), scale
        self._apply(lora)

    def set_scale(self, name: str, scale: float) -> None:
        """Give one another scale.

        Raises:
            BadRequest: there is none of that name, or the scale is not a finite number.
        """
        lora = self._named(name)
        check_scale(scale)
        self._loaded[name] = lora, scale
        self._apply(lora)

    def remove(self, name: str) -> None:
        """Take the changes of one back.

        Raises:
            BadRequest: there is none of that name.
        """
        lora = self._named(name)
        del self._loaded[name]
        self._apply(lora)

    def _named(self, name: str) -> Lora:
        if name not in self._loaded:
            raise BadRequest(
                f"name is {name!r}, and the LoRAs loaded are: {', '.join(self._loaded) or 'none'}", param="name"
            )
        return self._loaded[name][0]

    def _apply(self, lora: Lora) -> None:
        """Make the weights anew that a LoRA changes: the originals with the changes of all that are loaded."""
        for component, layers in lora.layers.items():
            self._parameters(component).adjust({weight: self._adjustment(component, weight) for weight in layers})

    def _adjustment(self, component: str, weight: str) -> Adjust | None:
        changes = [
            (lora.layers[component][weight], scale)
            for lora, scale in self._loaded.values()
            if scale and weight in lora.layers.get(component, {})
        ]
        return partial(fused, changes=changes) if changes else None
