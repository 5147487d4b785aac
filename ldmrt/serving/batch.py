"""The images of one size that are under way together."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ldmrt.denoise import Denoiser
from ldmrt.errors import BadRequest, EngineMismatch
from ldmrt.pipeline import Pipeline, Text
from ldmrt.samplers.estimate import estimate
from ldmrt.serving.ticket import Image, Ticket


class Batch:
    """Images of any prompts, samplers, guidance and step counts share a denoiser, as long as their texts are equally long.

    Args:
        pipeline: what makes the pictures.
        size: (width, height) in pixels.
        rows: of the model's batch at every step; None for the smallest that holds the images at hand.

    Raises:
        BadRequest: the bundle has no such batch.
    """

    def __init__(self, pipeline: Pipeline, size: tuple[int, int], rows: int | None) -> None:
        known = pipeline.row_counts(size)
        if rows is not None and rows not in known:
            raise BadRequest(
                f"rows is {rows}, and the bundle has {', '.join(map(str, known))} for {size[0]}x{size[1]}", param="rows"
            )
        self._pipeline, self._size = pipeline, size
        self._least = rows or 0
        self._rows = rows or known[-1]
        self._slots: dict[Image, int] = {}
        self._tokens = 0
        self._denoiser: Denoiser | None = None
        self._ready: set[int] = set()  # row counts for which the denoiser has its smallest engines

    @property
    def images(self) -> list[Image]:
        """Those that are under way."""
        return list(self._slots)

    def check(self, ticket: Ticket) -> None:
        """Refuse a request that no batch is large enough for.

        Raises:
            EngineMismatch: guidance takes two rows.
        """
        if ticket.rows > self._rows:
            raise EngineMismatch(
                f"guidance takes 2 rows an image, and the batch has {self._rows}: use a guidance scale of at most 1,"
                " or build with --batch 2"
            )

    def fits(self, image: Image, joining: Sequence[Image]) -> bool:
        """Whether an image can join, besides those that are about to."""
        others = [*self._slots, *joining]
        if not others:
            return True
        if self._slots and image.evaluations > self._running().evaluations:
            return False  # a denoiser with more room can only be made when nobody is under way
        rows = sum(other.ticket.rows for other in others)
        return rows + image.ticket.rows <= self._rows and image.tokens == others[0].tokens

    def reserve(self, images: Sequence[Image]) -> None:
        """Make ready for images that `fits` has let in.

        Raises:
            BadRequest: the engines are made for prompts of another length.
        """
        if not self._slots:
            self._tokens = images[0].tokens
            evaluations = max(image.evaluations for image in images)
            denoiser = self._denoiser_for(self._rows, evaluations)
            if denoiser is not self._denoiser:
                self._denoiser, self._ready = denoiser, set()

    def admit(self, image: Image, text: Text) -> None:
        """Put an image into the room that was reserved."""
        denoiser, ticket = self._running(), image.ticket
        slot = denoiser.slots.free[0]
        self._pipeline.admit(denoiser, slot, image.job(), ticket.table, text, ticket.material.of(image.number))
        self._slots[image] = slot

    def step(self) -> int:
        """One evaluation of the model for every image.

        Returns:
            For how many.
        """
        rows = max(self._least, sum(image.ticket.rows for image in self._slots))
        if rows not in self._ready:
            self._denoiser_for(rows, 1)
            self._ready.add(rows)
        self._running().step(self._least)
        return len(self._slots)

    def made(self, image: Image) -> int:
        """Evaluations made for an image."""
        return self._running().slots.made(self._slots[image])

    def latents(self, image: Image) -> torch.Tensor:
        """(C, h, w) float32, a copy on the device."""
        return self._running().latents(self._slots[image]).clone()

    def estimate(self, image: Image) -> torch.Tensor:
        """(C, h, w) float32: what the latents are going to be, as far as the model has said at the last step."""
        factors = estimate(image.ticket.table, self._pipeline.schedule, self.made(image))
        return self._running().combined(self._slots[image], *factors)

    def release(self, image: Image) -> None:
        """Give an image up."""
        self._running().release(self._slots.pop(image))

    def clear(self) -> None:
        """Give all images up."""
        for image in self.images:
            self.release(image)

    def _denoiser_for(self, rows: int, evaluations: int) -> Denoiser:
        """The one in use, with the smallest engines for so many rows."""
        return self._pipeline.denoiser(self._size, rows, tokens=self._tokens, evaluations=evaluations)

    def _running(self) -> Denoiser:
        if self._denoiser is None:
            raise EngineMismatch("no room was reserved in this batch: call reserve first")
        return self._denoiser
