"""BERT's tokenizer, which the text encoder of the first latent diffusion models has: pieces of words from a fixed vocabulary.

It gives the ids of transformers' BertTokenizer without transformers (Devlin et al. 2018, arXiv 1810.04805): lower case without accents, a
split at spaces and punctuation, and of each word the longest pieces that the vocabulary has, from its beginning.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer as Backend, models, normalizers, pre_tokenizers

# What the file of settings calls them, what they are to `ldmrt.tokenizer.Tokenizer`, and what stands for them where it says nothing.
SPECIAL = {
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "mask_token": "[MASK]",
}


def is_wordpiece(folder: Path, whole: Mapping[str, Any]) -> bool:
    """Whether a folder holds such a tokenizer.

    Args:
        folder: the folder.
        whole: its `tokenizer.json`, or nothing.
    """
    model = whole.get("model")
    return (folder / "vocab.txt").is_file() or (isinstance(model, Mapping) and model.get("type") == "WordPiece")


def read(folder: Path, config: Mapping[str, Any], whole: Mapping[str, Any], special: Mapping[str, str]) -> Backend:
    """The tokenizer of a folder: `vocab.txt`, or else `tokenizer.json`.

    Args:
        folder: the folder.
        config: its `tokenizer_config.json`.
        whole: its `tokenizer.json`, or nothing.
        special: the special tokens, by their names in `SPECIAL`.

    Raises:
        ValueError: a special token is not in the vocabulary; a file is damaged (as are the errors of whatever reads it).
    """
    file = folder / "vocab.txt"
    if file.is_file():
        lines = file.read_text(encoding="utf-8").split("\n")
        vocabulary = {
            token.rstrip("\r"): number for number, token in enumerate(lines) if token or number < len(lines) - 1
        }
    else:
        vocabulary = dict(whole["model"]["vocab"])
    missing = [token for name, token in special.items() if name != "mask_token" and token not in vocabulary]
    if missing:
        raise ValueError(f"its vocabulary has no {missing[0]}")
    backend = Backend(models.WordPiece(vocabulary, unk_token=special["unk_token"]))
    backend.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=bool(config.get("tokenize_chinese_chars", True)),
        strip_accents=config.get("strip_accents"),
        lowercase=bool(config.get("do_lower_case", True)),
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # Written in a prompt, they are themselves.
    known = [token for token in special.values() if token in vocabulary]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in known])
    return backend
