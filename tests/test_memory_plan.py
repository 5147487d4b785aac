"""Budgets: how they are read, and which means they lead to."""

from __future__ import annotations

import pytest

from ldmrt.errors import BadRequest
from ldmrt.memory_plan import Need, Stage, parse_bytes, plan

SIZE = (1024, 1024)
# Units of a byte, as round as a model of Stable Diffusion XL in float16 in megabytes.
NEEDS: dict[Stage, Need] = {
    "encode": Need({"text": 250, "text_2": 1400}, {1: 20}),
    "denoise": Need({"unet": 5100}, {1: 300, 2: 600, 4: 1200}),
    "decode": Need({"vae": 100}, {1: 2500, 2: 5000}),
}
TILES = [((512, 512), Need({"vae": 100}, {1: 700})), ((256, 256), Need({"vae": 100}, {1: 200}))]
ALL = 250 + 1400 + 5100 + 100


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6GB", 6 * 10**9),
        ("6 gb", 6 * 10**9),
        ("5.5GiB", 11 << 29),
        ("800MB", 800 * 10**6),
        ("1KiB", 1024),
        ("4G", None),
        ("123", 123),
        ("7B", 7),
        (4096, 4096),
        ("", None),
        ("-1GB", None),
        ("0GB", None),
        ("0", None),
        (0, None),
        ("GB", None),
        ("1e9", None),
        ("nan", None),
        ("6GBB", None),
        ("9" * 400, None),
        ("٦GB", None),
    ],
)
def test_amounts_of_memory(text: int | str, expected: int | None) -> None:
    if expected is not None:
        assert parse_bytes(text, param="memory_budget") == expected
        return
    with pytest.raises(BadRequest, match=r"memory_budget is .* expected an amount of memory, such as 6GB") as caught:
        parse_bytes(text, param="memory_budget")
    assert caught.value.param == "memory_budget"


@pytest.mark.parametrize(
    ("budget", "resident", "rows", "decoder_rows", "tile"),
    [
        # What a stage works with, and the step's beside it, which stays.
        (ALL + 5000 + 1200, "text text_2 unet vae", 4, 2, None),
        (ALL + 5000 + 1200 - 1, "text text_2 unet vae", 4, 1, None),
        (ALL + 2500 + 600, "text text_2 unet vae", 2, 1, None),
        (ALL + 2500 + 600 - 1, "unet", 4, 1, None),
        (5100 + 100 + 2500 + 600, "unet", 2, 1, None),
        (5100 + 100 + 2500 + 600 - 1, "", 4, 2, None),
        (5100 + 1200, "", 4, 2, None),
        (5100 + 600, "", 2, 2, None),
    ],
)
def test_each_means_is_taken_as_soon_as_those_before_do_not_suffice(
    budget: int, resident: str, rows: int, decoder_rows: int, tile: tuple[int, int] | None
) -> None:
    made = plan(budget, NEEDS, reserve=0, least_rows=2, size=SIZE, tiles=TILES)
    assert made.resident == tuple(resident.split())
    assert set(made.staged) == {"text", "text_2", "unet", "vae"} - set(made.resident)
    assert (made.rows, made.decoder_rows, made.tile) == (rows, decoder_rows, tile)
    assert made.needed <= budget
    assert list(made.stages) == ["encode", "denoise", "decode"]
    assert str(made).startswith(f"{made.needed / 1e6:.1f} MB of {budget / 1e6:.1f} MB; ")


def test_tiles_are_taken_last_and_the_largest_that_fit() -> None:
    small: dict[Stage, Need] = {**NEEDS, "denoise": Need({"unet": 500}, {2: 60})}
    for budget, tile in ((2600, None), (2599, (512, 512)), (1700, (512, 512))):
        assert plan(budget, small, reserve=0, least_rows=2, size=SIZE, tiles=TILES).tile == tile
    without_text: dict[Stage, Need] = {"denoise": small["denoise"], "decode": small["decode"]}
    for budget, tile in ((800, (512, 512)), (799, (256, 256)), (560, (256, 256))):
        assert plan(budget, without_text, reserve=0, least_rows=2, size=SIZE, tiles=TILES).tile == tile


def test_what_is_not_counted_is_kept_free() -> None:
    assert plan(ALL + 5000 + 1200, NEEDS, reserve=1, least_rows=2, size=SIZE).decoder_rows == 1


def test_a_file_of_two_stages_is_resident_as_a_whole() -> None:
    needs: dict[Stage, Need] = {
        "picture": Need({"vae": 40}, {1: 1}),
        "denoise": Need({"unet": 100}, {1: 1}),
        "decode": Need({"vae": 60}, {1: 1}),
    }
    assert plan(202, needs, reserve=0, least_rows=1, size=SIZE).resident == ("vae", "unet")
    apart = plan(201, needs, reserve=0, least_rows=1, size=SIZE)
    assert (apart.resident, apart.stages) == (("unet",), {"picture": 142, "denoise": 101, "decode": 162})


@pytest.mark.parametrize(
    ("budget", "needs", "tiles", "message"),
    [
        (5699, NEEDS, TILES, r"is 0\.0 MB, and the stage denoise alone needs 0\.0 MB at 1024x1024; .* smaller size"),
        (2599, {**NEEDS, "denoise": Need({"unet": 5}, {2: 1})}, (), "stage decode alone .* --decoder-tile 512"),
        (299, {"denoise": Need({"unet": 5}, {2: 1}), "decode": NEEDS["decode"]}, TILES, "--decoder-tile 128"),
        (1669, {**NEEDS, "denoise": Need({"unet": 5}, {2: 1})}, TILES, "stage encode alone .* smaller --dtype"),
    ],
)
def test_what_cannot_be_held_is_named_with_the_cure(
    budget: int, needs: dict[Stage, Need], tiles: list[tuple[tuple[int, int], Need]], message: str
) -> None:
    with pytest.raises(BadRequest, match=message) as caught:
        plan(budget, needs, reserve=0, least_rows=2, size=SIZE, tiles=tiles)
    assert caught.value.param == "memory_budget"
    assert "\n" not in str(caught.value)
