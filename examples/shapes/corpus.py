"""Captions and scenes as tensors: token ids, and what each caption says of each place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

import generator
import tokenizer
from architecture import TOKENS

ROLES: tuple[str, ...] = ("only", "left", "right", "top", "bottom")
_VOCABULARY = tokenizer.build_vocabulary()
_END = _VOCABULARY[tokenizer.END]


def encode(caption: str) -> list[int]:
    """A caption's 20 token ids, one a word between start and end, padded with the end token."""
    words = [_VOCABULARY[word + tokenizer.WORD_END] for word in caption.split()]
    ids = [_VOCABULARY[tokenizer.START], *words, _END]
    return ids + [_END] * (TOKENS - len(ids))


def encode_all(captions: Sequence[str]) -> Tensor:
    """Captions' token ids: int64, (N, 20)."""
    return torch.tensor([encode(caption) for caption in captions])


def drop(ids: Tensor, share: float, order: torch.Generator) -> Tensor:
    """Token ids (N, 20) with a share of the captions empty, as guidance needs them."""
    dropped = (torch.rand(len(ids), generator=order) < share).to(ids.device)
    return torch.where(dropped[:, None], torch.tensor(encode(""), device=ids.device), ids)


def describe(scene: generator.Scene) -> list[int]:
    """The background's index, then for each role its colour, shape and size, 0 if absent."""
    labels = [generator.COLORS.index(scene.background)]
    for role in ROLES:
        thing = scene.roles.get(role)
        if thing is None:
            labels += [0, 0, 0]
        else:
            labels += [
                1 + generator.COLORS.index(thing.color),
                1 + generator.SHAPES.index(thing.shape),
                1 + generator.SIZES.index(thing.size),
            ]
    return labels


def describe_all(scenes: Sequence[generator.Scene]) -> Tensor:
    """Scenes' labels: int64, (N, 16)."""
    return torch.tensor([describe(scene) for scene in scenes])


def sample_captions(rng: np.random.Generator, count: int) -> tuple[Tensor, Tensor]:
    """Random training captions: token ids (count, 20) and labels (count, 16)."""
    scenes = [generator.sample_training_scene(rng) for _ in range(count)]
    return encode_all([scene.caption for scene in scenes]), describe_all(scenes)
