"""The captions' vocabulary, merges and token ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import generator
import tokenizer

LENGTH = 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_tokenizer(path, LENGTH)
    return path


@pytest.fixture(scope="module")
def stock(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.CLIPTokenizer.from_pretrained(folder)


def test_the_vocabulary_holds_every_byte_and_word() -> None:
    vocabulary = tokenizer.build_vocabulary()
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    alphabet = tokenizer.byte_alphabet()
    assert len(set(alphabet)) == 256
    for symbol in alphabet:
        assert symbol in vocabulary
        assert symbol + tokenizer.WORD_END in vocabulary
    for word in tokenizer.caption_words():
        assert word + tokenizer.WORD_END in vocabulary


def test_merges_make_tokens_of_the_vocabulary() -> None:
    vocabulary = tokenizer.build_vocabulary()
    merges = tokenizer.build_merges()
    assert len(set(merges)) == len(merges)
    for left, right in merges:
        assert {left, right, left + right} <= vocabulary.keys()


def test_files_are_written_the_same_again(folder: Path, tmp_path: Path) -> None:
    tokenizer.save_tokenizer(tmp_path, LENGTH)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in tmp_path.iterdir())
    for name in names:
        assert (folder / name).read_bytes() == (tmp_path / name).read_bytes()
    config = json.loads((folder / "tokenizer_config.json").read_text())
    assert config["model_max_length"] == LENGTH


def test_captions_are_one_token_a_word(stock: Any) -> None:
    rng = np.random.default_rng(21)
    for index in range(100):
        caption = generator.sample_scene(rng, two=index % 2 == 0).caption
        tokens = stock.tokenize(caption)
        assert tokens == [word + tokenizer.WORD_END for word in caption.split()]
        ids = stock(caption).input_ids
        assert len(ids) == len(caption.split()) + 2 <= LENGTH
        assert stock.decode(ids, skip_special_tokens=True).strip() == caption


def test_training_ids_are_the_stock_tokenizers(stock: Any) -> None:
    corpus = pytest.importorskip("corpus")
    rng = np.random.default_rng(22)
    captions = [generator.sample_scene(rng, two=index % 2 == 0).caption for index in range(50)]
    wanted = stock([*captions, ""], padding="max_length", max_length=LENGTH).input_ids
    assert corpus.encode_all([*captions, ""]).tolist() == wanted


@pytest.mark.parametrize("text", ["a Zebra, at 12:30!", "été", "猫 and 犬", "🙂", "\x00\x7f"])
def test_any_text_has_tokens(stock: Any, text: str) -> None:
    vocabulary = tokenizer.build_vocabulary()
    assert all(token in vocabulary for token in stock.tokenize(text))
