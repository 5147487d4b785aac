"""Prompts to text embeddings: windows of tokens, the text encoders, and what a caller gives instead."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ldmrt.emphasis import emphasized, parse
from ldmrt.engines.protocol import Engine
from ldmrt.errors import BadRequest
from ldmrt.request import Job
from ldmrt.rows import run_rows
from ldmrt.tokenizer import Tokenizer, TokenWindows

# Of a prompt and of its negative prompt, for each text encoder.
Windows = tuple[tuple[TokenWindows, ...], tuple[TokenWindows, ...]]
# What is embedded: windows of tokens for each text encoder, and how many of its last layers are left out.
_Asked = tuple[tuple[TokenWindows, ...], int]
# What tells one prompt's windows from another's.
_Key = tuple[bytes, ...]

# Windows that go through an encoder at once, at most: few different numbers, since each is captured by itself.
_MOST_WINDOWS = 8


@dataclass(frozen=True, eq=False)
class Embedding:
    """What the denoiser reads of a prompt.

    Attributes:
        states: (tokens, width), the text encoders' hidden states side by side.
        pooled: (projection,), one vector for the whole prompt, where the model has one.
    """

    states: torch.Tensor
    pooled: torch.Tensor | None = None


@dataclass(frozen=True)
class Given:
    """Embeddings that the caller gives instead of prompts: (1 or prompts, tokens, width), pooled (1 or prompts, projection)."""

    prompt_embeds: torch.Tensor | None = None
    negative_prompt_embeds: torch.Tensor | None = None
    pooled_prompt_embeds: torch.Tensor | None = None
    negative_pooled_prompt_embeds: torch.Tensor | None = None


@dataclass(frozen=True)
class TextModel:
    """A tokenizer and its text encoder: `input_ids` (rows, tokens) to `hidden_states` (layers, rows, tokens, width), the layer
    that is used by default first, and perhaps to `text_embeds` (rows, projection).
    """

    tokenizer: Tokenizer
    engine: Engine

    @classmethod
    def open(cls, folder: Path, engine: Engine) -> TextModel:
        """The tokenizer of a folder with its encoder, which says how long a window is.

        Raises:
            BundleError: there is no tokenizer, or it is damaged.
        """
        length = engine.inputs["input_ids"].shape[1]
        return cls(Tokenizer.from_folder(folder, model_max_length=int(length)), engine)

    @property
    def layers(self) -> int:
        """How many layers `clip_skip` may choose from."""
        return int(self.engine.outputs["hidden_states"].shape[0])

    @property
    def width(self) -> int:
        """Width of the hidden states."""
        return int(self.engine.outputs["hidden_states"].shape[-1])

    @property
    def pooled_width(self) -> int | None:
        """Width of the pooled embedding, or None."""
        spec = self.engine.outputs.get("text_embeds")
        return None if spec is None else int(spec.shape[-1])


class PromptEncoder:
    """All text encoders of a model; with none of them, a prompt's embedding is empty.

    Args:
        models: in the order in which their states are joined.
        device: where the engines run.
        zero_empty_negative: whether an empty negative prompt means embeddings of zeros, as Stable Diffusion XL was trained.
    """

    def __init__(self, models: Sequence[TextModel], device: torch.device, *, zero_empty_negative: bool = False) -> None:
        self._models = tuple(models)
        self._device = device
        self._zero = zero_empty_negative
        self.layers = min((model.layers for model in models), default=1)
        self.width = sum(model.width for model in models)
        self.pooled_width = next((model.pooled_width for model in models if model.pooled_width), None)

    def tokenize(self, job: Job) -> list[Windows]:
        """For each prompt its windows for each text encoder, and those of its negative prompt: as many
        of the one as of the other, since guidance compares the two. Warns of what `long_prompt="cut"` drops.
        """
        most = 1 if job.long_prompt == "cut" else None
        pairs = []
        for texts in zip(job.prompts, job.negative_prompts, strict=True):
            count = 1
            fragments = [parse(text) if job.emphasis else text for text in texts]
            for model in self._models:
                for what, text in zip(("prompt", "negative prompt"), fragments, strict=True):
                    windows = model.tokenizer.windows(text, most)
                    count = max(count, len(windows.ids))
                    if windows.dropped and model is self._models[0]:
                        warnings.warn(
                            f"the {what} is longer than the text encoder's {model.tokenizer.model_max_length} tokens; "
                            f"dropped: {windows.dropped[:80]!r}",
                            stacklevel=4,
                        )
            ours, theirs = (
                tuple(model.tokenizer.windows(text, most, min_windows=count) for model in self._models)
                for text in fragments
            )
            pairs.append((ours, theirs))
        return pairs

    def embed(self, job: Job, windows: Sequence[Windows], given: Given) -> list[tuple[Embedding, Embedding | None]]:
        """For each image the prompt's embedding, and with guidance the negative prompt's.

        Raises:
            BadRequest: embeddings that were given do not fit the model, the prompts, or each other.
        """
        known: dict[_Key, Embedding] = {}

        def encode(ours: tuple[TokenWindows, ...]) -> Embedding:
            key = _key(ours)
            if key not in known:
                known[key] = self._encode(ours, job.clip_skip)
            return known[key]

        prompts = len(job.prompts)
        if given.prompt_embeds is None:
            conds = [encode(ours) for ours, _ in windows]
        else:
            conds = self._given(given.prompt_embeds, given.pooled_prompt_embeds, "", prompts)
        unconds: Sequence[Embedding | None] = [None] * prompts
        if job.do_cfg and given.negative_prompt_embeds is not None:
            pooled = given.negative_pooled_prompt_embeds
            unconds = self._given(given.negative_prompt_embeds, pooled, "negative_", prompts)
        elif job.do_cfg:
            unconds = [
                _zeros(cond) if self._zero and not text else encode(theirs)
                for cond, text, (_, theirs) in zip(conds, job.negative_prompts, windows, strict=True)
            ]
        for cond, uncond in zip(conds, unconds, strict=True):
            if uncond is not None and cond.states.shape != uncond.states.shape:
                raise BadRequest(
                    f"the prompt's embeddings have {len(cond.states)} tokens and the negative prompt's "
                    f"{len(uncond.states)}: give both, of the same length",
                    param="negative_prompt_embeds",
                )
        return [pair for pair in zip(conds, unconds, strict=True) for _ in range(job.num_images_per_prompt)]

    def embed_together(self, images: Sequence[tuple[Job, Windows]]) -> list[tuple[Embedding, Embedding | None]]:
        """What `embed` gives for images of different requests, encoded together: sums may be taken in another order.

        Args:
            images: for each image a job of one prompt, and its windows.
        """
        asked: dict[tuple[_Key, int], _Asked] = {}

        def key(windows: tuple[TokenWindows, ...], clip_skip: int) -> tuple[_Key, int]:
            found = _key(windows), clip_skip
            asked.setdefault(found, (windows, clip_skip))
            return found

        keys = []
        for job, (ours, theirs) in images:
            zero = self._zero and not job.negative_prompts[0]
            keys.append((key(ours, job.clip_skip), key(theirs, job.clip_skip) if job.do_cfg and not zero else None))
        known = dict(zip(asked, self._encode_together(list(asked.values())), strict=True))
        texts: list[tuple[Embedding, Embedding | None]] = []
        for (job, _), (cond, uncond) in zip(images, keys, strict=True):
            negative = known[uncond] if uncond is not None else _zeros(known[cond]) if job.do_cfg else None
            texts.append((known[cond], negative))
        return texts

    def _encode_together(self, asked: Sequence[_Asked]) -> list[Embedding]:
        """Windows of several prompts through each encoder."""
        counts = [len(windows[0].ids) if windows else 0 for windows, _ in asked]
        states: list[list[torch.Tensor]] = [[] for _ in asked]
        pooled: list[torch.Tensor | None] = [None] * len(asked)
        if not self._models:
            return [self._encode(windows, clip_skip) for windows, clip_skip in asked]
        for index, model in enumerate(self._models):
            ids = torch.from_numpy(np.concatenate([windows[index].ids for windows, _ in asked])).to(self._device)
            rows = model.engine.inputs["input_ids"].shape[0]
            together = min(_MOST_WINDOWS, 1 << (len(ids) - 1).bit_length())
            found = run_rows(model.engine.run, {"input_ids": ids}, rows if isinstance(rows, int) else together)
            first = 0
            for number, ((windows, clip_skip), count) in enumerate(zip(asked, counts, strict=True)):
                one = found["hidden_states"][clip_skip, first : first + count]
                states[number].append(self._weighted(one, windows[index]))
                if "text_embeds" in found:
                    pooled[number] = found["text_embeds"][first]
                first += count
        return [Embedding(torch.cat(one, dim=-1), vector) for one, vector in zip(states, pooled, strict=True)]

    def _encode(self, ours: tuple[TokenWindows, ...], clip_skip: int) -> Embedding:
        """Windows through each encoder; the pooled embedding is the first window's."""
        states, pooled = [], None
        if not self._models:
            return Embedding(torch.zeros((0, 0), device=self._device))
        for model, windows in zip(self._models, ours, strict=True):
            inputs = {"input_ids": torch.from_numpy(windows.ids).to(self._device)}
            rows = model.engine.inputs["input_ids"].shape[0]
            found = run_rows(model.engine.run, inputs, rows if isinstance(rows, int) else None)
            states.append(self._weighted(found["hidden_states"][clip_skip], windows))
            if "text_embeds" in found:
                pooled = found["text_embeds"][0]
        return Embedding(torch.cat(states, dim=-1), pooled)

    def _weighted(self, states: torch.Tensor, windows: TokenWindows) -> torch.Tensor:
        """States (windows, tokens, width) with the weights of their tokens, one window after the other: (windows * tokens, width)."""
        if (windows.weights != 1).any():
            states = emphasized(states, torch.from_numpy(windows.weights).to(self._device))
        return states.flatten(0, 1)

    def _given(self, states: torch.Tensor, pooled: torch.Tensor | None, prefix: str, prompts: int) -> list[Embedding]:
        """Embeddings as given, one for each prompt."""

        def check(name: str, tensor: torch.Tensor, shape: tuple[int | str, ...]) -> None:
            fits = tensor.dim() == len(shape) and tensor.shape[0] in (1, prompts) and tensor.shape[-1] == shape[-1]
            if not fits:
                raise BadRequest(
                    f"{name} has the shape {tuple(tensor.shape)}, expected ({', '.join(map(str, shape))})", param=name
                )

        first = "1" if prompts == 1 else f"1 or {prompts}"
        check(f"{prefix}prompt_embeds", states, (first, "tokens", self.width))
        if self.pooled_width is not None:
            name = f"{prefix}pooled_prompt_embeds"
            if pooled is None:
                raise BadRequest(f"{prefix}prompt_embeds needs {name} with this model; give both", param=name)
            check(name, pooled, (first, self.pooled_width))
        return [
            Embedding(
                states[i % len(states)].to(self._device),
                None if self.pooled_width is None or pooled is None else pooled[i % len(pooled)].to(self._device),
            )
            for i in range(prompts)
        ]


def _key(windows: tuple[TokenWindows, ...]) -> _Key:
    return tuple(each.tobytes() for one in windows for each in (one.ids, one.weights))


def _zeros(like: Embedding) -> Embedding:
    return Embedding(torch.zeros_like(like.states), None if like.pooled is None else torch.zeros_like(like.pooled))
