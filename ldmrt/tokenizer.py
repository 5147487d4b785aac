"""CLIP's byte-pair tokenizer (or BERT's, from `ldmrt.wordpiece`), and prompts cut into windows of the length that the text encoder takes.

It gives the ids of transformers' CLIPTokenizer without transformers: NFC, whitespace runs to one space, lower case, a
split into letters, single digits and the rest, then byte-level pairs with `</w>` at the end of a word. Weights such as
`(word:1.2)` have no meaning here: `ldmrt.emphasis` takes them out of a prompt first, where that is asked for.
"""

from __future__ import annotations

import json
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import AddedToken, Regex, Tokenizer as Backend, models, normalizers, pre_tokenizers

from ldmrt import wordpiece
from ldmrt.emphasis import Fragment
from ldmrt.errors import BadRequest, BundleError

_PATTERN = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
# The order matters: where two of these are the same token, the flags of the last one hold.
_SPECIAL = {
    "bos_token": "<|startoftext|>",
    "eos_token": "<|endoftext|>",
    "unk_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}
_DEFAULT_LENGTH = 77
# What is read of a folder.
FILES = (
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)
# Where no limit is known, transformers writes int(1e30).
_LONGEST = 1 << 20
# Text is in lower case, and UTF-8 has no such bytes.
_UNSEEN = [*map(chr, range(ord("A"), ord("Z") + 1)), *map(chr, (0xC0, 0xC1, *range(0xF5, 0x100)))]
# How many tokens a window gives up to end at a comma, as in AUTOMATIC1111's web UI.
_COMMA_BACKTRACK = 20


@dataclass(frozen=True, eq=False)
class TokenWindows:
    """A prompt as input of the text encoder.

    Attributes:
        ids: int64 (windows, model_max_length), each row bos, up to model_max_length - 2 tokens, eos, then padding.
        weights: float32 (windows, model_max_length), what the states of each token are multiplied by; 1 but for emphasis.
        dropped: the end of the prompt that found no room, as the user wrote it; empty when everything is in `ids`.
    """

    ids: NDArray[np.int64]
    weights: NDArray[np.float32]
    dropped: str


class Tokenizer:
    """A tokenizer read from a folder in the layout of transformers.

    Attributes:
        model_max_length: tokens in a window, bos and eos included.
        bos_id: id of the token that begins a window.
        eos_id: id of the token that ends its text.
        pad_id: id that fills the rest: eos again in Stable Diffusion 1, 0 in Stable Diffusion 2 and SDXL's second encoder.
        spare_ids: ids that no text is given, free for words that were learnt later.
    """

    def __init__(self, backend: Backend, *, model_max_length: int, bos_id: int, eos_id: int, pad_id: int) -> None:
        self._backend = backend
        comma = backend.token_to_id(",</w>")
        self._comma_id = backend.token_to_id(",") if comma is None else comma
        self.model_max_length = model_max_length
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = pad_id
        found = (backend.token_to_id(letter + end) for letter in _UNSEEN for end in ("", "</w>"))
        self.spare_ids = tuple(one for one in found if one is not None and one not in (bos_id, eos_id, pad_id))
        self.words = {}

    @property
    def words(self) -> Mapping[str, Sequence[int]]:
        """Words that stand for ids of their own, as learnt by textual inversion. Case does not matter; a word that begins or ends with a
        letter or a digit is not found within others.
        """
        return self._words

    @words.setter
    def words(self, words: Mapping[str, Sequence[int]]) -> None:
        self._words = {word.casefold(): tuple(ids) for word, ids in words.items()}
        longest_first = sorted(words, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(_whole_word, longest_first)), re.IGNORECASE) if words else None

    @classmethod
    def from_folder(cls, path: str | Path, *, model_max_length: int | None = None) -> Tokenizer:
        """Read `vocab.json` and `merges.txt`, or `vocab.txt`, or else `tokenizer.json`, with the settings beside them.

        Args:
            path: the folder.
            model_max_length: overrides the folder's; 77 where the folder names none either.

        Raises:
            BundleError: a file is missing or damaged, or the files contradict each other.
        """
        folder = Path(path)
        config = _read_json(folder / "tokenizer_config.json")
        whole = _read_json(folder / "tokenizer.json")
        if wordpiece.is_wordpiece(folder, whole):
            return cls._bert(folder, config, whole, model_max_length)
        special = {key: value for key in _SPECIAL if (value := config.get(key)) is not None}
        if "added_tokens_decoder" not in config:
            listed = _read_json(folder / "special_tokens_map.json")
            special |= {key: value for key in _SPECIAL if (value := listed.get(key)) is not None}
        special = _SPECIAL | special
        with _reading(folder):
            backend = Backend(_model(folder, whole, unk_token=_content(special["unk_token"])))
            backend.normalizer = normalizers.Sequence(
                [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
            )
            backend.pre_tokenizer = pre_tokenizers.Sequence(
                [
                    pre_tokenizers.Split(Regex(_PATTERN), behavior="removed", invert=True),
                    pre_tokenizers.ByteLevel(add_prefix_space=False),
                ]
            )
            added = _added_tokens(folder, config, whole, special)
            known = backend.get_vocab_size(with_added_tokens=False)
            backend.add_tokens([_added_token(value) for value in [*added.values(), *special.values()]])
        for token_id, value in added.items():
            found = backend.token_to_id(_content(value))
            if found != token_id:
                raise BundleError(
                    f"the tokenizer in {folder} gives {_content(value)!r} the id {found}, expected {token_id}; copy or build it again"
                )

        def id_of(key: str) -> int:
            token_id = backend.token_to_id(_content(special[key]))
            if token_id is None or (token_id >= known and token_id not in added):
                # A token the vocabulary lacks got a new id, for which the text encoder has no embedding.
                raise BundleError(
                    f"the vocabulary in {folder} has no {key} {_content(special[key])!r}; copy or build it again"
                )
            return token_id

        return cls(
            backend,
            model_max_length=_max_length(folder, config) if model_max_length is None else model_max_length,
            bos_id=id_of("bos_token"),
            eos_id=id_of("eos_token"),
            pad_id=id_of("pad_token"),
        )

    @classmethod
    def _bert(
        cls, folder: Path, config: dict[str, Any], whole: dict[str, Any], model_max_length: int | None
    ) -> Tokenizer:
        """BERT's (`ldmrt.wordpiece`), whose windows begin with [CLS] and end with [SEP]."""
        with _reading(folder):
            special = {key: _content(config.get(key) or token) for key, token in wordpiece.SPECIAL.items()}
            backend = wordpiece.read(folder, config, whole, special)
        vocabulary = backend.get_vocab()
        return cls(
            backend,
            model_max_length=_max_length(folder, config) if model_max_length is None else model_max_length,
            bos_id=vocabulary[special["cls_token"]],
            eos_id=vocabulary[special["sep_token"]],
            pad_id=vocabulary[special["pad_token"]],
        )

    def encode(self, prompt: str) -> list[int]:
        """The ids of a text of any length, without bos and eos.

        Raises:
            BadRequest: the text holds half a surrogate pair, which is no text.
        """
        return self._encode(prompt)[0]

    def windows(
        self, prompt: str | Sequence[Fragment], max_windows: int | None = None, *, min_windows: int = 1
    ) -> TokenWindows:
        """Cut a prompt into windows of model_max_length - 2 tokens, between bos and eos each.

        A window that overflows ends at its last comma instead, if that is among its last 20 tokens, so that what a comma
        closes stays together; AUTOMATIC1111's web UI cuts like this by default. A learnt word (`words`) is not cut either. The last of `max_windows` is filled to
        the brim instead, as nothing follows it: `max_windows=1` cuts where diffusers does. A fragment may begin a window of its own; one that
        stays empty at the end is left out.

        Args:
            prompt: the text, empty is one empty window; or its fragments, each made into tokens by itself, with the weight of those.
            max_windows: at most this many windows; what does not fit is in `dropped`. None for all that are needed.
            min_windows: at least this many, the last ones empty: a negative prompt needs as many as its prompt.

        Raises:
            BadRequest: see `encode`; or max_windows is below 1.
        """
        if max_windows is not None and max_windows < 1:
            raise BadRequest(f"max_windows is {max_windows}, expected 1 or more", param="max_windows")
        fragments = [Fragment(prompt, 1.0)] if isinstance(prompt, str) else prompt
        ids: list[int] = []
        starts: list[int] = []
        scales: list[float] = []
        begins = [0]
        text = ""
        for fragment in fragments:
            begins += [len(ids)] if fragment.begins else []
            more, places = self._encode(fragment.text)
            ids += more
            starts += [len(text) + place for place in places]
            scales += [fragment.weight] * len(more)
            text += fragment.text
        room = self.model_max_length - 2
        own = set(self.spare_ids)
        within = {i for i in range(1, len(ids)) if ids[i] in own and starts[i] == starts[i - 1]}
        if len(begins) > 1 and begins[-1] == len(ids):
            begins.pop()
        ends: list[int] = []
        for begin, end in pairwise([*begins, len(ids)]):
            inner = {index - begin for index in within}
            ends += [begin + one for one in window_ends(ids[begin:end], room, self._comma_id, inner)]
        dropped = ""
        if max_windows is not None and len(ends) > max_windows:
            begin = ends[max_windows - 2] if max_windows > 1 else 0
            end = min([begin + room, *(one for one in begins[1:] if one >= ends[max_windows - 1])])
            ends = [*ends[: max_windows - 1], end]
            dropped = text[starts[end] :] if end < len(ids) else ""
        rows = np.full((max(len(ends), min_windows), self.model_max_length), self.pad_id, dtype=np.int64)
        rows[:, 0] = self.bos_id
        rows[len(ends) :, 1] = self.eos_id
        weights = np.ones(rows.shape, dtype=np.float32)
        begin = 0
        for row, scale, end in zip(rows, weights, ends, strict=False):
            row[1 : end - begin + 1] = ids[begin:end]
            scale[1 : end - begin + 1] = scales[begin:end]
            row[end - begin + 1] = self.eos_id
            begin = end
        return TokenWindows(rows, weights, dropped)

    def _encode(self, prompt: str) -> tuple[list[int], list[int]]:
        """The ids, and for each the index in `prompt` of the character it begins in."""
        ids: list[int] = []
        starts: list[int] = []
        end = 0
        for match in self._pattern.finditer(prompt) if self._pattern is not None else ():
            self._encode_part(prompt, end, match.start(), ids, starts)
            own = self._words[match[0].casefold()]
            ids += own
            starts += [match.start()] * len(own)
            end = match.end()
        self._encode_part(prompt, end, len(prompt), ids, starts)
        return ids, starts

    def _encode_part(self, prompt: str, begin: int, end: int, ids: list[int], starts: list[int]) -> None:
        """Add the ids of a part of a prompt, and where they begin."""
        try:
            encoding = self._backend.encode(prompt[begin:end], add_special_tokens=False)
        except (TypeError, UnicodeError) as error:
            raise BadRequest(
                "the prompt is not valid Unicode text (it holds a lone surrogate)", param="prompt"
            ) from error
        ids += encoding.ids
        starts += [begin + start for start, _ in encoding.offsets]


def _whole_word(word: str) -> str:
    """A regular expression that finds a word, but not within others."""
    before = r"(?<!\w)" if re.match(r"\w", word) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", word) else ""
    return before + re.escape(word) + after


def window_ends(ids: list[int], room: int, comma_id: int | None, within: Container[int] = ()) -> list[int]:
    """Where each window of at most `room` ids ends; at least one window. See `Tokenizer.windows` for the rule. `within` are the places
    inside of words that are not to be cut.
    """
    ends = []
    begin = 0
    while len(ids) - begin > room:
        end = begin + room
        # A comma that overflows belongs to the text before it, but moving that would free no room for it.
        if ids[end] != comma_id:
            nearby = range(end - 1, max(begin, end - _COMMA_BACKTRACK) - 1, -1)
            end = next((index + 1 for index in nearby if ids[index] == comma_id), end)
        # A word that is longer than a window is cut all the same.
        end = next((index for index in range(end, begin, -1) if index not in within), end)
        ends.append(end)
        begin = end
    return [*ends, len(ids)]


@contextmanager
def _reading(folder: Path) -> Iterator[None]:
    """Whatever damaged files come to is one error. The tokenizers library raises plain exceptions, and where it panics what is none."""
    try:
        yield
    except (BundleError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        raise BundleError(
            f"the tokenizer in {folder} cannot be read ({' '.join(str(error).split())[:200]}); copy or build it again"
        ) from error


def _model(folder: Path, whole: dict[str, Any], *, unk_token: str) -> models.BPE:
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    settings: dict[str, Any] = {
        "unk_token": unk_token,
        "continuing_subword_prefix": "",
        "end_of_word_suffix": "</w>",
        "fuse_unk": False,
    }
    if vocab.exists() and merges.exists():
        return models.BPE.from_file(str(vocab), str(merges), **settings)
    if not whole:
        raise BundleError(f"there is no tokenizer in {folder}: expected vocab.json and merges.txt, or tokenizer.json")
    model = whole["model"]
    pairs: list[Any] = [tuple(pair.split(" ")) if isinstance(pair, str) else tuple(pair) for pair in model["merges"]]
    return models.BPE(vocab=model["vocab"], merges=pairs, **settings)


def _added_tokens(
    folder: Path, config: dict[str, Any], whole: dict[str, Any], special: dict[str, Any]
) -> dict[int, str | dict[str, Any]]:
    """Tokens matched in the text as they stand, by id; three generations of transformers wrote them to three places."""
    if "added_tokens_decoder" in config:
        added = {int(token_id): token for token_id, token in config["added_tokens_decoder"].items()}
    else:
        names = {_content(value) for value in special.values()}
        listed = _read_json(folder / "added_tokens.json")
        added = {
            int(token_id): {"content": text, "special": text in names, "normalized": text not in names}
            for text, token_id in listed.items()
        }
        added |= {int(token["id"]): token for token in whole.get("added_tokens", [])}
    contents = {_content(token) for token in added.values()}
    for key, value in list(special.items()):
        if _content(value) in contents:
            # Listed with flags of its own already, which hold.
            special[key] = next(token for token in added.values() if _content(token) == _content(value))
    return dict(sorted(added.items()))


def _added_token(value: str | dict[str, Any]) -> AddedToken:
    if isinstance(value, str):
        return AddedToken(value, special=True)
    flags = {key: bool(value[key]) for key in ("lstrip", "rstrip", "single_word", "normalized") if key in value}
    return AddedToken(value["content"], special=bool(value.get("special", True)), **flags)


def _content(value: str | dict[str, Any]) -> str:
    return value if isinstance(value, str) else str(value["content"])


def _max_length(folder: Path, config: dict[str, Any]) -> int:
    length = config.get("model_max_length", _DEFAULT_LENGTH)
    if not isinstance(length, int | float) or length < 3:
        raise BundleError(f"the tokenizer in {folder} has model_max_length {length!r}, expected 3 or more")
    return int(length) if length <= _LONGEST else _DEFAULT_LENGTH


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty when the file is not there."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(
            f"{path} cannot be read ({' '.join(str(error).split())[:200]}); copy or build it again"
        ) from error
    if not isinstance(value, dict):
        raise BundleError(f"{path} holds a {type(value).__name__}, expected an object; copy or build it again")
    return value
