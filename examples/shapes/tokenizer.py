"""The vocabulary and merges of a CLIP byte-pair tokenizer for the captions.

Every byte has a token, bare and at a word's end, so that any text can be tokenised; the merges
make one token of each word of the captions.
"""

from __future__ import annotations

import json
from pathlib import Path

import generator

START = "<|startoftext|>"
END = "<|endoftext|>"
WORD_END = "</w>"


def caption_words() -> list[str]:
    """The words of the captions, in a fixed order."""
    words = ["a", "an", "on", "background", *(size for size in generator.SIZES if size)]
    words += [*generator.COLORS, *generator.SHAPES]
    words += [word for relation in generator.RELATIONS for word in relation.split()]
    return list(dict.fromkeys(words))


def byte_alphabet() -> list[str]:
    """The printable stand-ins of the 256 bytes, in the order of the byte-pair convention."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + rank) for rank in range(len(others))]


def build_merges() -> list[tuple[str, str]]:
    """The pairs to merge, first to last, so that each word of the captions ends as one token.

    Words are built from their last letter backwards.  As each pair then ends in a suffix that
    closes a word, no word's merges can take letters from within another.
    """
    merges: dict[tuple[str, str], None] = {}
    for word in sorted(caption_words(), key=len):
        suffix = word[-1] + WORD_END
        for letter in reversed(word[:-1]):
            merges[letter, suffix] = None
            suffix = letter + suffix
    return sorted(merges, key=lambda pair: len(pair[1]))


def build_vocabulary() -> dict[str, int]:
    """Token to id: bytes, bytes at a word's end, merged tokens, then start and end of text."""
    alphabet = byte_alphabet()
    tokens = [*alphabet, *(token + WORD_END for token in alphabet)]
    tokens += ["".join(pair) for pair in build_merges()]
    return {token: rank for rank, token in enumerate([*tokens, START, END])}


def save_tokenizer(folder: Path, length: int) -> None:
    """Write the files of a ``transformers`` CLIPTokenizer.

    Args:
        folder: Where to write, made if missing.
        length: Tokens in a padded text, start and end included.
    """
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": START, "eos_token": END, "pad_token": END, "unk_token": END}
    config = {
        **special,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": length,
        "tokenizer_class": "CLIPTokenizer",
    }
    merges = "".join(f"{left} {right}\n" for left, right in build_merges())
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges, encoding="utf-8")
    for name, value in (
        ("vocab.json", build_vocabulary()),
        ("special_tokens_map.json", special),
        ("tokenizer_config.json", config),
    ):
        text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
        (folder / name).write_text(text, encoding="utf-8")
