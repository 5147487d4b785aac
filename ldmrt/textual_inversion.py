"""Textual inversion (Gal et al. 2022, arXiv 2208.01618): files of learnt vectors that stand for a new word of a prompt.

The vectors are put into the text encoder's table of embeddings in the place of tokens that no text has (`Tokenizer.spare_ids`), so that
graphs and addresses stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from ldmrt.errors import BadRequest, BundleError
from ldmrt.parameters import Parameters
from ldmrt.tokenizer import Tokenizer
from ldmrt.weights import WeightFile

# What the vectors of Stable Diffusion XL's text encoders are called in a file.
_NAMES = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
# What AUTOMATIC1111 calls those of an only one; other programs call them as the word that they stand for.
_UNNAMED = "emb_params"


@dataclass(frozen=True, eq=False)
class TextualInversion:
    """A learnt word that fits a model.

    Attributes:
        path: its file.
        token: the word.
        vectors: for each text encoder (n, width) float32, in the order in which they stand in the prompt.
    """

    path: Path
    token: str
    vectors: Mapping[str, torch.Tensor]

    @property
    def count(self) -> int:
        """How many tokens of the prompt it takes."""
        return len(next(iter(self.vectors.values())))

    @classmethod
    def read(cls, path: Path, token: str | None, widths: Mapping[str, int]) -> TextualInversion:
        """Read a file in the forms of AUTOMATIC1111, diffusers, or of Stable Diffusion XL.

        Args:
            path: a safetensors file.
            token: the word that is to stand for it; None for the one that the file names, or the file's own name.
            widths: width of each of the model's text encoders.

        Raises:
            BadRequest: there is no such file, it is damaged or a pickle, it holds no learnt word, or one for another model.
        """
        if path.suffix != ".safetensors":
            raise BadRequest(
                f"{path} is not a .safetensors file: other embeddings are pickles, which can run any code, so it is not read; convert it "
                f"first: ldmrt convert {path} {path.with_suffix('.safetensors')}",
                param="path",
            )
        if not path.is_file():
            raise BadRequest(f"no such embedding: {path}; give the path of a .safetensors file", param="path")
        if not widths:
            raise BadRequest("this model reads no text, and has no use for an embedding; leave it out", param="path")
        try:
            file = WeightFile(path)
        except BundleError as error:
            raise BadRequest(str(error), param="path") from error
        keys = _keys(file, widths)
        vectors = {encoder: _vectors(file, key, widths[encoder]) for encoder, key in keys.items()}
        counts = {len(held) for held in vectors.values()}
        if len(counts) > 1:
            raise BadRequest(
                f"{path} has {' and '.join(map(str, counts))} vectors, expected as many of each", param="path"
            )
        named = next(iter(keys.values()))
        stem = path.stem if named in (_UNNAMED, *_NAMES.values()) else named
        word = stem if token is None else token
        if not word.strip():
            raise BadRequest(f"token is {word!r}, expected a word, such as <{path.stem}>", param="token")
        return cls(path, word, vectors)


def _keys(file: WeightFile, widths: Mapping[str, int]) -> dict[str, str]:
    """For each of a model's text encoders the name of its vectors in a file.

    Raises:
        BadRequest: they are not there.
    """
    found = list(file)
    several = {encoder: _NAMES[encoder] for encoder in widths}
    if set(_NAMES.values()) <= set(found) and "text_encoder_2" in widths:
        return several
    if len(found) == 1 and list(widths) == ["text_encoder"]:
        return {"text_encoder": found[0]}
    sizes = ", ".join(f"{name} {file.entries[name].shape}" for name in found[:3]) or "nothing"
    expected = (
        " and ".join(f"{several[encoder]} (vectors, {width})" for encoder, width in widths.items())
        if "text_encoder_2" in widths
        else f"one tensor (vectors, {widths['text_encoder']})"
    )
    raise BadRequest(
        f"{file.path} holds {sizes}, expected {expected}: take the embedding that was made for this kind of model",
        param="path",
    )


def _vectors(file: WeightFile, key: str, width: int) -> torch.Tensor:
    """The vectors of one text encoder, (n, width) float32."""
    entry = file.entries[key]
    if (
        len(entry.shape) not in (1, 2)
        or entry.shape[-1] != width
        or not entry.nbytes
        or not entry.dtype.is_floating_point
    ):
        raise BadRequest(
            f"{file.path}: {key} is {entry.shape} {str(entry.dtype).removeprefix('torch.')}, expected ({width},) or (vectors, {width}) of floats: "
            "it is made for another text encoder; take the one that was made for this kind of model",
            param="path",
        )
    vectors = file[key].reshape(-1, width).to(torch.float32, copy=True)
    if not vectors.isfinite().all():
        raise BadRequest(f"{file.path}: {key} holds NaN or infinite values; copy it again", param="path")
    return vectors


class Words:
    """The learnt words of a model.

    Args:
        tokenizers: those of the text encoders.
        parameters: gives a text encoder's weights.
        weight: gives the name of a text encoder's table of embeddings.
    """

    def __init__(
        self,
        tokenizers: Mapping[str, Tokenizer],
        parameters: Callable[[str], Parameters],
        weight: Callable[[str], str],
    ) -> None:
        self._tokenizers, self._parameters, self._weight = tokenizers, parameters, weight
        self._loaded: dict[str, TextualInversion] = {}

    @property
    def tokens(self) -> tuple[str, ...]:
        """Those that are loaded, in the order in which they were added."""
        return tuple(self._loaded)

    def add(self, inversion: TextualInversion) -> None:
        """Make one known.

        Raises:
            BadRequest: the word is taken, or there is no room for so many vectors.
        """
        if inversion.token.casefold() in map(str.casefold, self._loaded):
            raise BadRequest(
                f"token is {inversion.token!r}, and an embedding of that name is loaded: unload it, or give another name",
                param="token",
            )
        taken = sum(other.count for other in self._loaded.values())
        room = min(len(tokenizer.spare_ids) for tokenizer in self._tokenizers.values())
        if taken + inversion.count > room:
            raise BadRequest(
                f"{inversion.path} has {inversion.count} vectors, and there is room for {room - taken} more of {room}: unload others first",
                param="path",
            )
        self._loaded[inversion.token] = inversion
        self._apply()

    def remove(self, token: str) -> None:
        """Forget one; its tokens are then what they were, to the bit.

        Raises:
            BadRequest: there is none of that name.
        """
        if token not in self._loaded:
            raise BadRequest(
                f"token is {token!r}, and the embeddings loaded are: {', '.join(self._loaded) or 'none'}", param="token"
            )
        del self._loaded[token]
        self._apply()

    def _apply(self) -> None:
        """Write all vectors into the tables, and tell the tokenizers which ids they have."""
        for encoder, tokenizer in self._tokenizers.items():
            spare = iter(tokenizer.spare_ids)
            words = {token: [next(spare) for _ in range(one.count)] for token, one in self._loaded.items()}
            tokenizer.words = words
            rows = [row for ids in words.values() for row in ids]
            vectors = [one.vectors[encoder] for one in self._loaded.values()]
            change = partial(_with_rows, rows=rows, vectors=torch.cat(vectors)) if vectors else None
            self._parameters(encoder).adjust({self._weight(encoder): change})


def _with_rows(table: torch.Tensor, rows: list[int], vectors: torch.Tensor) -> torch.Tensor:
    """A copy of a table of embeddings with vectors in the place of some rows."""
    changed = table.clone()
    changed[torch.tensor(rows, device=table.device)] = vectors.to(table)
    return changed
