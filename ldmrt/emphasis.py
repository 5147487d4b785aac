"""Emphasis in prompts as users of AUTOMATIC1111's web UI write it: `(word)`, `((word))`, `[word]`, `(word:1.3)`.

A pair of round brackets multiplies what is in it by 1.1, or by the number behind the colon, a pair of square ones divides by 1.1; pairs nest.
A bracket behind a backslash is a character like others; one that is never closed counts to the end. The word `BREAK` begins a new window
of tokens (within brackets too, where the web UI takes it for a word). Nothing is an error.

The numbers multiply the text encoder's states of a token, which are then scaled to the mean that they had: so does `sd_emphasis.py` of
the web UI ("Original"), whose pictures users expect. It takes the mean over one window of one prompt, all channels together.
"""

from __future__ import annotations

import re
from typing import NamedTuple

import torch

_FACTORS = {"(": 1.1, "[": 1 / 1.1}
_PIECE = re.compile(
    r"""\\(?P<escaped>[()\[\]\\]?)                                     # a lone backslash says nothing
      | (?P<open>[(\[])
      | : \s* (?P<number>[+-]?(?:[0-9]{1,9}\.?[0-9]{0,9}|\.[0-9]{1,9})) \s* \)
      | (?P<close>[)\]])
      | (?P<text>[^\\()\[\]:]+ | :)""",
    re.VERBOSE,
)

_BREAK = re.compile(r"\s*\bBREAK\b\s*")


class Fragment(NamedTuple):
    """Part of a prompt, what its tokens' states are multiplied by, and whether it begins a new window of tokens."""

    text: str
    weight: float
    begins: bool = False


def parse(prompt: str) -> list[Fragment]:
    """Cut a prompt into fragments of one weight each, at least one; neighbours differ in weight, or the second begins a window. Brackets
    are gone, and `BREAK` with the whitespace around it.
    """
    texts: list[str] = []
    weights: list[float] = []
    begins: list[bool] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def multiply(start: int, factor: float) -> None:
        weights[start:] = [weight * factor for weight in weights[start:]]

    for piece in _PIECE.finditer(prompt):
        bracket, number = piece["open"] or {")": "(", "]": "["}.get(piece["close"], "("), piece["number"]
        if piece["open"]:
            opened[bracket].append(len(texts))
        elif (number or piece["close"]) and opened[bracket]:
            multiply(opened[bracket].pop(), float(number) if number else _FACTORS[bracket])
        else:
            parts = _BREAK.split(piece[0]) if piece["escaped"] is None else [piece["escaped"]]
            texts += parts
            weights += [1.0] * len(parts)
            begins += [number > 0 for number in range(len(parts))]
    for bracket, starts in opened.items():
        for start in starts:
            multiply(start, _FACTORS[bracket])
    fragments: list[Fragment] = []
    for text, weight, begin in zip(texts, weights, begins, strict=True):
        if begin and not fragments:
            fragments.append(Fragment("", 1.0))
        if fragments and fragments[-1].weight == weight and not begin:
            fragments[-1] = fragments[-1]._replace(text=fragments[-1].text + text)
        elif text or begin:
            fragments.append(Fragment(text, weight, begin))
    return fragments or [Fragment("", 1.0)]


def emphasized(states: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """States multiplied by their tokens' weights, each window scaled to the mean that it had.

    Args:
        states: (windows, tokens, width), any float dtype.
        weights: (windows, tokens) float32.

    Returns:
        As states; computed in float32. A window whose new mean is 0 is left unscaled.
    """
    before = states.float()
    after = before * weights[..., None]
    old, new = (each.mean(dim=(1, 2), keepdim=True) for each in (before, after))
    return (after * torch.where(new == 0, 1.0, old / new)).to(states.dtype)
