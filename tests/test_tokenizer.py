"""The tokenizer against transformers' CLIPTokenizer, on a vocabulary learnt here; and the cutting into windows."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, strategies

from ldmrt.emphasis import parse
from ldmrt.errors import BadRequest, BundleError
from ldmrt.tokenizer import Tokenizer, window_ends

START, END = "<|startoftext|>", "<|endoftext|>"
CORPUS = """
a photograph of an astronaut riding a horse, highly detailed, 4k, trending on artstation. the quick brown fox jumps over
the lazy dog; it's what we've got, don't you'll see they're fine and i'd say i'm here. a red circle left of a blue square
on a white background, watercolor painting, masterpiece, best quality, sharp focus, studio light, oil on canvas, portrait
of the old man by the sea, dramatic lighting, cinematic, digital art, concept art, landscape with mountains and a river
"""

HAND_WRITTEN = [
    "",
    " ",
    "\n\t \r\n",
    "a",
    "A Photograph of an ASTRONAUT riding a Horse",
    "a photo of a cat, highly detailed, 4k, (masterpiece:1.2), [blurry]",
    "it's we've they're I'm you'll he'd don't CAN'T IT'S rock'n'roll 's 't ''s",
    "multiple   spaces\t\ttabs\n\nnew\r\nlines \x0b\x0c end ",
    "non\u00a0breaking\u2003em\u3000ideographic\u200bzero\u200dwidth\ufeffmark",
    "\x00null\x01one\x1bescape\x7fdelete\x85next",
    "na\u00efve caf\u00e9 \u00fcber \u00c5ngstr\u00f6m \u0130stanbul \u1e9e stra\u00dfe \ufb01ne",
    "decomposed: cafe\u0301 n\u0303 u\u0308 A\u030a o\u0302\u0301",
    "\u732b\u306e\u5199\u771f\u3001\u9ad8\u753b\u8cea",
    "\uace0\uc591\uc774 \uc0ac\uc9c4",
    "\u4e00\u53ea\u732b\u5750\u5728\u5899\u4e0a\u3002",
    "\u043a\u043e\u0442 \u041d\u0410 \u041a\u0420\u042b\u0428\u0415",
    "\u0642\u0637\u0629 \u0639\u0644\u0649 \u0627\u0644\u0633\u0637\u062d",
    "\u05d7\u05ea\u05d5\u05dc \u05e2\u05dc \u05d4\u05d2\u05d2",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0926\u0941\u0928\u093f\u092f\u093e",
    "\u0e41\u0e21\u0e27\u0e19\u0e49\u0e2d\u0e22",
    "\U0001f600 \U0001f680\U0001f319 \u2764\ufe0f",
    "family \U0001f468\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 flag \U0001f1e9\U0001f1ea skin \U0001f44d\U0001f3fd",
    "\U0001d54f\U0001d557 \U00020000 \U0010ffff",
    "1234567890 3.14 1,000,000 2nd \u00bd \u00b2 \u2167 \u0663",
    "!!! ??? ... ,,, ;;; ::: --- ___ === +++ *** ### @@@ $$$ %%% ^^^ &&& ~~~",
    "(((nested))) [[brackets]] {{braces}} <<angles>> \"quotes\" 'single' `ticks` \\slash\\ /path/",
    "hello! world!!! !a! !",
    f"{START}a{END}",
    f"text {END} more {START}{START} {END}{END}!",
    "<|STARTOFTEXT|> <|EndOfText|> <|endoftext|",
    "<|endoftext|>x<|startoftext|>",
    "e\u0301\u0301\u0301 \u0300alone",
    "word," * 100,
    "verylongword" * 200,
    "a " * 500,
    "a" * 5000,
    "\U0001f600" * 300,
    "https://example.org/a?b=c&d=e#f",
    "C++ C# F# .NET a.b.c x_y_z CamelCase snake_case kebab-case",
    "\u2018curly\u2019 \u201cdouble\u201d \u2014 em \u2013 en \u2026 \u00ab\u00bb",
    "it\u2019s \u02bcs \uff07s",
    "\uff21\uff22\uff23 \uff11\uff12\uff13 \u2460 \u212b \u2126",
    "\ue000private\uf8ff \ufffd\ufffe",
]


def random_texts(count: int) -> list[str]:
    """Texts that mix words with code points of many scripts, without surrogates."""
    rng = random.Random(0)
    ranges = [(0x20, 0x7F), (0x20, 0x7F), (0, 0x20), (0x80, 0x250), (0x300, 0x370), (0x370, 0x1000), (0x1F300, 0x1FA00)]
    ranges += [(0x2000, 0x3100), (0x4E00, 0x9FFF), (0xE000, 0xFFFF), (0x10000, 0x10FFFF)]
    words = [*CORPUS.split(), END, START, " ", "\n", "!", ",", "'s"]
    return [
        "".join(
            rng.choice(words) if rng.random() < 0.3 else chr(rng.randrange(*rng.choice(ranges)))
            for _ in range(rng.randrange(1, 40))
        )
        for _ in range(count)
    ]


TEXTS = HAND_WRITTEN + random_texts(200)


def learn(text: str, count: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A vocabulary of the 256 bytes, bare and at a word's end, and of the `count` most frequent pairs of a text."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(byte) for byte in printable] + [chr(256 + rank) for rank in range(256 - len(printable))]
    words = Counter((*word[:-1], word[-1] + "</w>") for word in text.lower().replace(",", " , ").split())
    merges: list[tuple[str, str]] = []
    for _ in range(count):
        pairs: Counter[tuple[str, str]] = Counter()
        for word, frequency in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += frequency
        if not pairs:
            break
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        merges.append(best)
        merged: Counter[tuple[str, ...]] = Counter()
        for word, frequency in words.items():
            parts = list(word)
            for index in range(len(parts) - 1, 0, -1):
                if (parts[index - 1], parts[index]) == best:
                    parts[index - 1 : index + 1] = ["".join(best)]
            merged[tuple(parts)] += frequency
        words = merged
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges), START, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def rich(content: str) -> dict[str, Any]:
    """A special token as the files of Stable Diffusion have it."""
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def write(folder: Path, *, pad: str, generation: str) -> Path:
    """Write the files of a tokenizer as `generation` of transformers wrote them."""
    folder.mkdir()
    vocab, merges = learn(CORPUS, 200)
    assert len(merges) == 200
    named = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    config: dict[str, Any] = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "do_lower_case": True}
    added = [
        {"id": index, "special": True, **rich(token), "normalized": index > 2}
        for index, token in sorted((vocab[token], token) for token in {START, END, pad})
    ]
    if generation == "json":
        model = {
            "type": "BPE",
            "dropout": None,
            "unk_token": END,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "</w>",
            "fuse_unk": False,
            "vocab": vocab,
            "merges": [" ".join(pair) for pair in merges],
        }
        whole = {"version": "1.0", "added_tokens": added, "model": model, "normalizer": None, "pre_tokenizer": None}
        whole |= {"post_processor": None, "decoder": None, "truncation": None, "padding": None}
        (folder / "tokenizer.json").write_text(json.dumps(whole))
        config |= named
    else:
        (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if generation == "first":
        # As in Stable Diffusion 2: the two files disagree on the padding, and special_tokens_map.json is right.
        config |= {key: {"__type": "AddedToken", **rich(value)} for key, value in named.items() if key != "pad_token"}
        config["pad_token"] = END
        special: dict[str, Any] = {key: rich(value) for key, value in named.items()} | {"pad_token": pad}
        (folder / "special_tokens_map.json").write_text(json.dumps(special))
    elif generation == "decoder":
        config |= named
        config["added_tokens_decoder"] = {
            str(token["id"]): {key: token[key] for key in token if key != "id"} for token in added
        }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("tokenizer") / "sd1", pad=END, generation="first")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(folder)


def test_what_the_library_panics_at_is_an_error_of_ours(tmp_path: Path) -> None:
    """A merge whose result is not in the vocabulary; what it raises then is no `Exception`."""
    model = {"type": "BPE", "vocab": {"a": 0, "b</w>": 1}, "merges": ["a b</w>"]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    with pytest.raises(BundleError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer_config.json", "[" * 100_000),
        ("vocab.txt", "[PAD]"),
    ],
)
def test_settings_of_another_form(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    if name == "vocab.txt":
        (tmp_path / "tokenizer_config.json").write_text('{"cls_token": ["a"]}')
    with pytest.raises(BundleError, match="cannot be read"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("pad", [END, "!"], ids=["sd1", "sd2"])
@pytest.mark.parametrize("generation", ["first", "decoder", "json"])
def test_ids_are_those_of_transformers(tmp_path: Path, pad: str, generation: str) -> None:
    transformers = pytest.importorskip("transformers")
    path = write(tmp_path / "tokenizer", pad=pad, generation=generation)
    oracle = transformers.CLIPTokenizer.from_pretrained(path)
    ours = Tokenizer.from_folder(path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id) == (oracle.bos_token_id, oracle.eos_token_id, oracle.pad_token_id)
    assert ours.model_max_length == oracle.model_max_length == 77
    for text in TEXTS:
        assert ours.encode(text) == oracle(text, add_special_tokens=False)["input_ids"], repr(text)
        window = oracle(text, padding="max_length", max_length=77, truncation=True)["input_ids"]
        assert ours.windows(text, max_windows=1).ids.tolist() == [window], repr(text)
    assert len(TEXTS) > 200


def test_one_window(tokenizer: Tokenizer) -> None:
    windows = tokenizer.windows("a red circle")
    assert windows.ids.shape == (1, 77)
    assert windows.ids.dtype == np.int64
    assert windows.dropped == ""
    ids = tokenizer.encode("a red circle")
    assert windows.ids[0, : len(ids) + 2].tolist() == [tokenizer.bos_id, *ids, tokenizer.eos_id]
    assert (windows.ids[0, len(ids) + 2 :] == tokenizer.pad_id).all()


def test_empty_prompt_is_one_window(tokenizer: Tokenizer) -> None:
    assert tokenizer.windows("").ids[0, :2].tolist() == [tokenizer.bos_id, tokenizer.eos_id]


def test_windows_beyond_the_prompt_are_empty(tokenizer: Tokenizer) -> None:
    windows = tokenizer.windows("a red circle", min_windows=3)
    assert windows.ids.shape == (3, 77)
    for row in windows.ids[1:]:
        assert np.array_equal(row, tokenizer.windows("").ids[0])


def test_a_cut_prompt_names_what_was_dropped(tokenizer: Tokenizer) -> None:
    kept, dropped = "a, the " * 25, "On a WHITE caf\u00e9 background"
    assert len(tokenizer.encode(kept)) == 75
    assert tokenizer.windows(kept, max_windows=1).dropped == ""
    windows = tokenizer.windows(kept + dropped, max_windows=1)
    assert windows.ids.shape == (1, 77)
    assert windows.dropped == dropped
    with pytest.raises(BadRequest, match="max_windows is 0"):
        tokenizer.windows("a", max_windows=0)


def test_the_last_window_is_filled_to_the_brim(tokenizer: Tokenizer) -> None:
    prompt = "a the a " * 23 + "the, " + "a the a " * 30
    assert tokenizer.windows(prompt).ids.shape[0] == 3
    first, second = tokenizer.windows(prompt, max_windows=2).ids
    assert np.array_equal(first, tokenizer.windows(prompt).ids[0])
    assert (first == tokenizer.eos_id).sum() > 1  # it ended at its comma
    assert second[76] == tokenizer.eos_id
    assert (second[1:76] != tokenizer.eos_id).all()
    assert (tokenizer.windows(prompt, max_windows=1).ids[0, 1:76] != tokenizer.eos_id).all()


def test_all_tokens_are_in_the_windows(tokenizer: Tokenizer) -> None:
    prompt = "a horse, the old man by the sea; " * 40
    rows = tokenizer.windows(prompt).ids
    kept = [token for row in rows for token in row[1:].tolist() if token != tokenizer.eos_id]
    assert kept == tokenizer.encode(prompt)


def chunked_token_by_token(ids: list[int], room: int, comma: int | None) -> list[int]:
    """The rule of AUTOMATIC1111's web UI told as it happens: tokens arrive one at a time."""
    chunks: list[list[int]] = []
    chunk: list[int] = []
    last_comma = -1
    for token in ids:
        if len(chunk) == room:
            keep = room
            if token != comma and last_comma >= 0 and room - last_comma <= 20:
                keep = last_comma + 1
            chunks.append(chunk[:keep])
            chunk = chunk[keep:]
            last_comma = -1
        if token == comma:
            last_comma = len(chunk)
        chunk.append(token)
    chunks.append(chunk)
    return list(itertools.accumulate(len(chunk) for chunk in chunks))


@pytest.mark.parametrize("commas", [0.0, 0.01, 0.05, 0.3, 1.0])
@pytest.mark.parametrize("room", [75, 18])
def test_windows_end_at_commas(commas: float, room: int) -> None:
    rng = random.Random(1)
    for length in [*range(60, 100), *range(140, 240), 1000]:
        ids = [0 if rng.random() < commas else rng.randrange(1, 9) for _ in range(length)]
        ends = window_ends(ids, room, 0)
        assert ends == chunked_token_by_token(ids, room, 0)
        assert window_ends(ids, room, None) == chunked_token_by_token(ids, room, None)
        assert ends[-1] == length


def windows_of_the_web_ui(tokenizer: Tokenizer, prompt: str) -> list[list[int]]:
    """Told as it happens there: a break closes the window at hand, whatever is in it; at the end only one with tokens is closed."""
    room = tokenizer.model_max_length - 2
    comma = tokenizer.encode(",")[0]
    closed: list[list[int]] = []
    for number, part in enumerate(re.split(r"\s*\bBREAK\b\s*", prompt)):
        if number > 0:
            closed.append([])
        ids = tokenizer.encode(part)
        begin = 0
        windows = []
        for end in chunked_token_by_token(ids, room, comma):
            windows.append(ids[begin:end])
            begin = end
        closed[-1:] = windows
    return closed if closed[-1] or len(closed) == 1 else closed[:-1]


@given(
    strategies.lists(
        strategies.sampled_from(["a red circle", ",", "BREAK", "on white", "BREAK,", "x " * 90]), max_size=9
    )
)
def test_breaks_begin_windows(tokenizer: Tokenizer, parts: list[str]) -> None:
    prompt = " ".join(parts)
    expected = windows_of_the_web_ui(tokenizer, prompt)
    found = tokenizer.windows(parse(prompt)).ids
    length = tokenizer.model_max_length
    rows = [[tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in expected]
    assert found.tolist() == [row + [tokenizer.pad_id] * (length - len(row)) for row in rows]


def test_without_emphasis_a_break_is_a_word(tokenizer: Tokenizer) -> None:
    ids = [*tokenizer.encode("a"), *tokenizer.encode("break"), *tokenizer.encode("b")]
    (row,) = tokenizer.windows("a BREAK b").ids
    assert row[1 : len(ids) + 1].tolist() == ids


@pytest.mark.parametrize(
    ("prompt", "most", "dropped"),
    [
        ("a red circle BREAK on white", 1, "on white"),
        ("a red circle BREAK BREAK on white", 2, "on white"),
        ("a BREAK " + "x " * 90 + "BREAK on white", 2, None),
        ("a red circle BREAK BREAK", 1, ""),
        ("a red circle BREAK on white", 2, ""),
    ],
)
def test_a_cut_at_a_break(tokenizer: Tokenizer, prompt: str, most: int, dropped: str | None) -> None:
    found = tokenizer.windows(parse(prompt), most)
    assert len(found.ids) <= most
    if dropped is None:
        assert (found.ids[-1] != tokenizer.pad_id).sum() >= tokenizer.model_max_length - 1
        assert found.dropped.endswith("on white")
    else:
        assert found.dropped == dropped


def test_a_comma_counts_within_the_last_20_tokens() -> None:
    def first_end(comma_at: int) -> int:
        ids = [1] * 100
        ids[comma_at] = 0
        return window_ends(ids, 75, 0)[0]

    assert [first_end(at) for at in (54, 55, 74, 75)] == [75, 56, 75, 75]


def test_length_from_the_caller_or_the_default(tmp_path: Path) -> None:
    path = write(tmp_path / "tokenizer", pad=END, generation="decoder")
    assert Tokenizer.from_folder(path, model_max_length=20).windows("a red circle").ids.shape == (1, 20)
    config = json.loads((path / "tokenizer_config.json").read_text())
    for length, expected in ((int(1e30), 77), (40, 40)):
        (path / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": length}))
        assert Tokenizer.from_folder(path).model_max_length == expected
    (path / "tokenizer_config.json").unlink()
    assert Tokenizer.from_folder(path).model_max_length == 77


def test_added_tokens_of_the_older_file(tmp_path: Path) -> None:
    path = write(tmp_path / "tokenizer", pad=END, generation="first")
    size = len(json.loads((path / "vocab.json").read_text()))
    (path / "added_tokens.json").write_text(json.dumps({"<my-cat>": size}))
    assert size in Tokenizer.from_folder(path).encode("a <my-cat> toy")


def test_half_a_surrogate_pair_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(BadRequest, match="lone surrogate") as caught:
        tokenizer.encode("a \ud83d")
    assert caught.value.param == "prompt"


def spoil_nothing_there(path: Path) -> None:
    for file in path.iterdir():
        file.unlink()


def spoil_vocab_json(path: Path) -> None:
    (path / "vocab.json").write_text("{not json")


def spoil_merges(path: Path) -> None:
    (path / "merges.txt").write_text("#version: 0.2\nnot-in the-vocabulary\n")


def spoil_merge_line(path: Path) -> None:
    (path / "merges.txt").write_text("#version: 0.2\na\n")


def spoil_config(path: Path) -> None:
    (path / "tokenizer_config.json").write_text("[1]")


def spoil_config_json(path: Path) -> None:
    (path / "tokenizer_config.json").write_text("{")


def spoil_length(path: Path) -> None:
    (path / "tokenizer_config.json").write_text('{"model_max_length": 2}')


def spoil_pad(path: Path) -> None:
    (path / "special_tokens_map.json").write_text('{"pad_token": "<pad>"}')


def spoil_special(path: Path) -> None:
    (path / "special_tokens_map.json").write_text('{"pad_token": {"text": "<pad>"}}')


def spoil_added_id(path: Path) -> None:
    (path / "added_tokens.json").write_text('{"<my-cat>": 5}')


def spoil_tokenizer_json(path: Path) -> None:
    (path / "vocab.json").unlink()
    (path / "tokenizer.json").write_text('{"model": {"type": "BPE"}}')


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (spoil_nothing_there, "there is no tokenizer in"),
        (spoil_vocab_json, "cannot be read"),
        (spoil_merges, "cannot be read"),
        (spoil_merge_line, "cannot be read"),
        (spoil_config, "holds a list, expected an object"),
        (spoil_config_json, "cannot be read"),
        (spoil_length, "model_max_length 2, expected 3 or more"),
        (spoil_pad, "has no pad_token '<pad>'"),
        (spoil_special, "cannot be read"),
        (spoil_added_id, "'<my-cat>' the id"),
        (spoil_tokenizer_json, "cannot be read"),
    ],
)
def test_damaged_files(tmp_path: Path, spoil: Any, says: str) -> None:
    path = write(tmp_path / "tokenizer", pad=END, generation="first")
    spoil(path)
    with pytest.raises(BundleError) as caught:
        Tokenizer.from_folder(path)
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
