"""Files of prompts, and folders that pictures of them are put into."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ldmrt.bulk import METADATA, Album, Order, read_orders
from ldmrt.errors import BadRequest

SETTINGS = {"num_inference_steps": 2, "sampler": "ddim"}


def written(folder: Path, text: str) -> Path:
    path = folder / "prompts.jsonl"
    path.write_bytes(text.encode())
    return path


def test_lines_become_pictures(tmp_path: Path) -> None:
    path = written(tmp_path, '{"prompt": "a", "seed": 5}\r\n\n{"prompt": "b\u2028c", "negative_prompt": ""}')
    assert read_orders(path, negative_prompt="n", seed=10, per_prompt=2) == [
        Order("000001-0.png", "a", "n", 5, seed_was_drawn=False),
        Order("000001-1.png", "a", "n", 6, seed_was_drawn=False),
        Order("000003-0.png", "b\u2028c", "", 12, seed_was_drawn=False),
        Order("000003-1.png", "b\u2028c", "", 13, seed_was_drawn=False),
    ]


def test_seeds_that_nobody_says_are_drawn_for_each_line(tmp_path: Path) -> None:
    path = written(tmp_path, '{"prompt": "a"}\n' * 20)
    orders = read_orders(path, negative_prompt="", seed=None, per_prompt=2)
    assert all(order.seed_was_drawn for order in orders)
    assert len({order.seed for order in orders}) == 40
    assert all(second.seed == first.seed + 1 for first, second in zip(orders[::2], orders[1::2], strict=True))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is empty, expected lines such as"),
        ("\n\n", "is empty"),
        ("a red circle", "line 1 is not JSON; expected an object such as"),
        ("[" * 100_000, "line 1 is not JSON"),
        ('{"prompt": "a"}\n"b"', 'line 2 is "b", expected an object'),
        ('{"text": "a"}', "line 1 is"),
        ('{"prompt": 3}', "line 1 is"),
        ('{"prompt": "a", "steps": 3}', "line 1 is"),
        ('{"prompt": "a", "negative_prompt": null}', "line 1 is"),
        ('{"prompt": "a", "seed": "1"}', "line 1 is"),
        ('{"prompt": "a", "seed": true}', "line 1 is"),
        ('{"prompt": "a", "seed": -1}', "line 1: seed is -1, expected 0 to"),
        ('{"prompt": "a", "seed": 9223372036854775808}', "line 1: seed is 9223372036854775808, expected 0 to"),
    ],
)
def test_what_is_no_file_of_prompts(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(BadRequest) as caught:
        read_orders(written(tmp_path, text), negative_prompt="", seed=None, per_prompt=1)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b"\xe4")
    for path, says in ((tmp_path / "none", "No such file"), (tmp_path / "latin", "not UTF-8"), (tmp_path, "directory")):
        with pytest.raises(BadRequest, match=says):
            read_orders(path, negative_prompt="", seed=None, per_prompt=1)


def orders(count: int, *, drawn: bool = False, seed: int = 0) -> list[Order]:
    return [Order(f"{n:06d}-0.png", f"prompt {n}", "", seed + n, drawn) for n in range(1, count + 1)]


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    album = Album(tmp_path / "new" / "folder", SETTINGS)
    asked = orders(4)
    assert album.missing(asked) == asked
    for order in asked[:3]:
        (album.folder / order.file_name).touch()
        album.add(order, "0" * 64)
    assert album.missing(asked) == asked[3:]
    (album.folder / asked[1].file_name).unlink()
    again = Album(album.folder, SETTINGS)
    assert again.missing(asked) == [asked[1], asked[3]]
    # Written twice, the later line counts.
    (album.folder / asked[1].file_name).touch()
    again.add(asked[1], "1" * 64)
    assert Album(album.folder, SETTINGS).missing(asked) == asked[3:]
    lines = (album.folder / METADATA).read_text().splitlines()
    assert [json.loads(line)["seed"] for line in lines] == [1, 2, 3, 2]
    assert json.loads(lines[0])["sampler"] == "ddim"


def test_a_line_that_was_being_written_is_dropped(tmp_path: Path) -> None:
    album = Album(tmp_path, SETTINGS)
    asked = orders(2)
    for order in asked:
        (tmp_path / order.file_name).touch()
        album.add(order, "0" * 64)
    file = tmp_path / METADATA
    whole = file.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        file.write_bytes(whole[:end])
        assert Album(tmp_path, SETTINGS).missing(asked) == asked[1:]
        assert file.read_bytes() == whole[:first]


def test_another_request_is_refused(tmp_path: Path) -> None:
    album = Album(tmp_path, SETTINGS)
    (order,) = orders(1)
    (tmp_path / order.file_name).touch()
    album.add(order, "0" * 64)
    with pytest.raises(BadRequest, match=r"000001-0.png was made with seed '1', now it is '6'; choose another --out"):
        album.missing(orders(1, seed=5))
    assert album.missing(orders(1, seed=5, drawn=True)) == []
    with pytest.raises(BadRequest, match="num_inference_steps '2', now it is '3'"):
        Album(tmp_path, {**SETTINGS, "num_inference_steps": 3}).missing([order])
    with pytest.raises(BadRequest, match="sampler 'ddim', now it is 'None'"):
        Album(tmp_path, {"num_inference_steps": 2}).missing([order])


@pytest.mark.parametrize("text", ["nonsense\n", "[]\n", "3\n", "{}\n"])
def test_metadata_of_something_else(tmp_path: Path, text: str) -> None:
    (tmp_path / METADATA).write_text(text)
    with pytest.raises(BadRequest, match="is not what ldmrt wrote; choose another --out"):
        Album(tmp_path, SETTINGS)


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadRequest, match="choose another --out"):
        Album(tmp_path / "file", SETTINGS)
