"""Prompts to text embeddings: windows of tokens, the text encoder, and what a caller gives instead."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ldmrt.engines.protocol import Engine
from ldmrt.errors import BadRequest
from ldmrt.request import Job
from ldmrt.tokenizer import Tokenizer

Ids = NDArray[np.int64]


class PromptEncoder:
    """A tokenizer and a text encoder.

    Args:
        tokenizer: the model's.
        engine: `input_ids` (rows, tokens) to `hidden_states` (layers, rows, tokens, width), the last layer first.
        device: where the engine runs.
    """

    def __init__(self, tokenizer: Tokenizer, engine: Engine, device: torch.device) -> None:
        self.tokenizer = tokenizer
        self._engine = engine
        self._device = device
        layers, *_, width = engine.outputs["hidden_states"].shape
        self.layers, self.width = int(layers), int(width)

    def tokenize(self, job: Job) -> list[tuple[Ids, Ids]]:
        """For each prompt its windows, int64 (windows, tokens), and those of its negative prompt: as many of the one as of
        the other, since guidance compares the two. Warns of what `long_prompt="cut"` drops.
        """
        most = 1 if job.long_prompt == "cut" else None
        pairs = []
        for texts in zip(job.prompts, job.negative_prompts, strict=True):
            windows = [self.tokenizer.windows(text, most) for text in texts]
            for what, one in zip(("prompt", "negative prompt"), windows, strict=True):
                if one.dropped:
                    warnings.warn(
                        f"the {what} is longer than the text encoder's {self.tokenizer.model_max_length} tokens; "
                        f"dropped: {one.dropped[:80]!r}",
                        stacklevel=4,
                    )
            count = max(len(one.ids) for one in windows)
            ours, theirs = (self.tokenizer.windows(text, most, min_windows=count).ids for text in texts)
            pairs.append((ours, theirs))
        return pairs

    def embed(
        self,
        job: Job,
        windows: list[tuple[Ids, Ids]],
        prompt_embeds: torch.Tensor | None,
        negative_prompt_embeds: torch.Tensor | None,
    ) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """For each image the prompt's embeddings (tokens, width), and with guidance the negative prompt's.

        Raises:
            BadRequest: embeddings that were given do not fit the model, the prompts, or each other.
        """
        known: dict[bytes, torch.Tensor] = {}

        def encode(ids: Ids) -> torch.Tensor:
            key = ids.tobytes()
            if key not in known:
                states = self._engine.run({"input_ids": torch.from_numpy(ids).to(self._device)})["hidden_states"]
                known[key] = states[job.clip_skip].flatten(0, 1)
            return known[key]

        def given(embeds: torch.Tensor, name: str) -> list[torch.Tensor]:
            prompts = len(job.prompts)
            if embeds.dim() != 3 or embeds.shape[0] not in (1, prompts) or embeds.shape[2] != self.width:
                raise BadRequest(
                    f"{name} has the shape {tuple(embeds.shape)}, expected (1 or {prompts}, tokens, {self.width})",
                    param=name,
                )
            return [embeds[i % len(embeds)].to(self._device) for i in range(prompts)]

        conds: list[Any] = (
            [encode(ids) for ids, _ in windows] if prompt_embeds is None else given(prompt_embeds, "prompt_embeds")
        )
        unconds: list[Any] = [None] * len(conds)
        if job.do_cfg and negative_prompt_embeds is not None:
            unconds = given(negative_prompt_embeds, "negative_prompt_embeds")
        elif job.do_cfg:
            unconds = [encode(ids) for _, ids in windows]
        for cond, uncond in zip(conds, unconds, strict=True):
            if uncond is not None and cond.shape != uncond.shape:
                raise BadRequest(
                    f"the prompt's embeddings have {len(cond)} tokens and the negative prompt's {len(uncond)}: "
                    "give both, of the same length",
                    param="negative_prompt_embeds",
                )
        return [pair for pair in zip(conds, unconds, strict=True) for _ in range(job.num_images_per_prompt)]
