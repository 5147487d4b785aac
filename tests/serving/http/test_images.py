"""Pictures over HTTP are those of the pipeline, and what cannot be made is refused by the name of its field."""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import pytest
from hypothesis import given, settings, strategies
from PIL import Image

from ldmrt.pipeline import Pipeline
from ldmrt.serving.http import Limits
from ldmrt.serving.http.fields import Generation
from ldmrt.serving.logs import FIELDS

from .conftest import PROMPT, Served, Serving, picture, png, refused, running


def pixels(image: Image.Image) -> np.ndarray[Any, Any]:
    return np.asarray(image.convert("RGB"), dtype=np.int16)


def test_a_picture_is_the_one_that_the_pipeline_makes(served: Served, shapes: Pipeline) -> None:
    answer = served.generate(
        seed=7, n=2, steps=3, guidance_scale=4, sampler="euler", negative_prompt="blue", size="128x128"
    ).json()
    served.batcher.close()
    wanted = shapes(
        PROMPT,
        negative_prompt="blue",
        num_inference_steps=3,
        guidance_scale=4.0,
        sampler="euler",
        seed=7,
        num_images_per_prompt=2,
    )
    assert [one["seed"] for one in answer["data"]] == [7, 8]
    for one, image in zip(answer["data"], wanted.images, strict=True):
        # Batches of other sizes take sums in another order, which may turn a rounding.
        assert abs(pixels(picture(one["b64_json"])) - pixels(image)).max() <= 1
    assert answer["settings"] == {"steps": 3, "guidance_scale": 4.0, "sampler": "euler", "width": 128, "height": 128}
    assert (answer["size"], answer["output_format"], answer["background"]) == ("128x128", "png", "opaque")


def test_the_spellings_of_diffusers_say_the_same(served: Served) -> None:
    ours = served.generate(steps=2, n=2, seed=3, size="128x128").json()
    body = {
        "prompt": PROMPT,
        "num_inference_steps": 2,
        "num_images_per_prompt": 2,
        "seed": 3,
        "width": 128,
        "height": 128,
    }
    theirs = served.client.post("/v1/images/generations", json=body).json()
    assert ours["data"] == theirs["data"]


def test_a_seed_that_was_drawn_makes_the_picture_again(served: Served) -> None:
    first = served.generate().json()["data"][0]
    assert served.generate(seed=first["seed"]).json()["data"][0] == first


@pytest.mark.parametrize(("form", "name"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(served: Served, form: str, name: str) -> None:
    answer = served.generate(output_format=form).json()
    assert answer["output_format"] == form
    image = picture(answer["data"][0]["b64_json"])
    assert (image.format, image.size) == (name, (128, 128))
    assert not {"parameters", "exif"} & set(image.info)  # how it was made is the client's own affair


def test_compression_makes_files_smaller(served: Served) -> None:
    sizes = [
        len(served.generate(seed=1, output_format="jpeg", output_compression=quality).json()["data"][0]["b64_json"])
        for quality in (100, 10)
    ]
    assert sizes[1] < sizes[0]


def test_values_that_say_nothing_are_taken(served: Served) -> None:
    answer = served.generate(
        model="shapes", size="auto", quality="auto", background="opaque", moderation="auto", style="vivid",
        response_format="b64_json", user="u", stream=False, partial_images=0, output_compression=100, n=None, seed=None,
    )  # fmt: skip
    assert answer.status_code == 200


LONG = "x" * 4001
NOT_TAKEN: list[tuple[str, Any]] = [
    *[("n", value) for value in (0, -1, 11, 10**9, True, 1.5, "1", [1])],
    *[
        ("size", value)
        for value in ("0x0", "-1x8", "5_12x512", "５１２x512", "1e9x1e9", "512x512x512", "512", " 128x128 ", 128)
    ],
    *[("size", value) for value in ("136x128", "64x64", "128X128")],
    *[("seed", value) for value in (-1, 2**63, 2**64, 1.0, "7")],
    *[("steps", value) for value in (0, 151, 10**30, "3", 2.5)],
    *[("guidance_scale", value) for value in (-1, "5", [1], 1e39)],
    ("sampler", "magic"),
    ("sampler", 3),
    ("prompt", LONG),
    ("prompt", "a\0b"),
    ("prompt", ["a", "b"]),
    ("prompt", None),
    ("negative_prompt", LONG),
    ("response_format", "url"),
    ("quality", "hd"),
    ("background", "transparent"),
    ("moderation", "low"),
    ("style", "natural"),
    ("output_format", "gif"),
    ("output_compression", 50),
    ("partial_images", 2),
    ("stream", "yes"),
    ("width", 100),
    ("frame_count", 3),
    ("strength", 0.5),
]


@pytest.fixture(scope="module")
def bad() -> Iterator[Served]:
    """One server, and so one pipeline, for all that is refused."""
    with running(Pipeline.from_bundle(device="cpu"), (), Limits()) as one:
        yield one


def _short(value: object) -> str:
    return ascii(value)[:20]


@pytest.mark.parametrize(("field", "value"), NOT_TAKEN, ids=_short)
def test_what_cannot_be_used_is_named(bad: Served, field: str, value: Any) -> None:
    error = refused(bad.generate(**{field: value}), 400, "size" if field == "width" else field)
    assert error["type"] == "invalid_request_error"
    assert "xxxx" not in error["message"]


@pytest.mark.parametrize(
    "body",
    ["", "[]", "7", '"a"', "{", "{'a': 1}", '{"prompt": "a", "guidance_scale": NaN}', '{"prompt": "a", "guidance_scale": 1e999}',
     '{"prompt": "\\ud800"}', "[" * 100_000, '{"a":' * 20_000, "\xff"],
    ids=_short,
)  # fmt: skip
def test_a_body_that_is_no_request(bad: Served, body: str) -> None:
    headers = {"content-type": "application/json"}
    answer = bad.client.post("/v1/images/generations", content=body.encode("latin-1"), headers=headers)
    assert answer.status_code == 400, answer.text
    assert set(answer.json()) == {"error"}


JSON = strategies.recursive(
    strategies.none() | strategies.booleans() | strategies.integers() | strategies.floats() | strategies.text(),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=60, deadline=None)
@given(strategies.dictionaries(strategies.sampled_from([*Generation.model_fields, "surprise"]), JSON, max_size=3))
def test_whatever_the_values_are_nothing_breaks(bad: Served, values: dict[str, Any]) -> None:
    body = json.dumps({"prompt": PROMPT, **values, "steps": 1, "n": 1, "stream": False})
    headers = {"content-type": "application/json"}
    answer = bad.client.post("/v1/images/generations", content=body, headers=headers)
    assert answer.status_code in (200, 400, 404), answer.text
    assert answer.status_code == 200 or set(answer.json()) == {"error"}


def test_another_model_is_not_found(bad: Served) -> None:
    assert refused(bad.generate(model="../shapes"), 404, "model")["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("limits", "fields", "param"),
    [
        (Limits(images=1), {"n": 2}, "n"),
        (Limits(steps=3), {"steps": 4}, "steps"),
        (Limits(pixels=128 * 127), {}, "size"),
        (Limits(pixel_steps=3 * 2 * 128 * 128 - 1), {"n": 3, "steps": 2}, "n"),
        (Limits(prompt=5), {}, "prompt"),
    ],
)
def test_limits(serving: Serving, limits: Limits, fields: dict[str, Any], param: str) -> None:
    served = serving(limits=limits)
    refused(served.generate(**fields), 400, param)
    assert served.batcher.stats().received == 0


def test_a_full_queue_is_429_at_once(serving: Serving) -> None:
    served = serving(max_waiting=1)
    with served.held():
        waiting = threading.Thread(target=served.generate)
        waiting.start()
        served.until(lambda: served.batcher.stats().present == 1)
        answer = served.generate()
        assert refused(answer, 429)["code"] == "rate_limit_exceeded"
        assert int(answer.headers["retry-after"]) >= 1
    waiting.join()
    stats = served.batcher.stats()
    assert (stats.served, stats.rejected) == (1, 1)


def test_what_takes_too_long_is_504(serving: Serving) -> None:
    served = serving(limits=Limits(seconds=0.05))
    answer = served.generate(steps=100)
    assert refused(answer, 504)["code"] == "deadline_exceeded"
    assert answer.headers["x-should-retry"] == "false"


def test_a_server_that_drains_is_503(served: Served) -> None:
    served.house.draining = True
    assert refused(served.generate(), 503)["code"] == "draining"
    assert refused(served.edit({"image": b""}), 503)["code"] == "draining"


def test_no_finite_picture_is_500_and_not_black(served: Served) -> None:
    answer = served.generate(guidance_scale=3e38)
    assert refused(answer, 500)["code"] == "numerical_error"


def test_an_engine_that_fails_says_nothing_of_itself(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from ldmrt.serving.batch import Batch

    def fail(*_: object) -> int:
        raise RuntimeError("at 0xdeadbeef in /root/secret")

    monkeypatch.setattr(Batch, "step", fail)
    error = refused(served.generate(), 500)
    assert error["code"] == "internal_error"
    assert not {"0x", "/root", "Runtime"} & {word for word in ("0x", "/root", "Runtime") if word in error["message"]}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_withdraws_its_request(
    served: Served, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    body = {"prompt": PROMPT, "steps": 100, "stream": stream}
    with served.held():
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{served.url}/v1/images/generations", json=body, timeout=0.2)
        served.until(lambda: served.batcher.stats().cancelled == 1)
    assert served.batcher.stats().running == 0
    assert served.generate().status_code == 200  # and nobody else's
    ends = ["cancelled", "served"]
    served.until(lambda: [one["end"] for line in caplog.records if "end" in (one := getattr(line, FIELDS, {}))] == ends)


# ---------------------------------------------------------------------------------------------------- edits


def test_an_edit_is_the_pipeline_s_image_to_image(served: Served, shapes: Pipeline) -> None:
    begin = Image.effect_mandelbrot((100, 140), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    answer = served.edit({"image": png(begin)}, prompt=PROMPT, seed="5", steps="4", strength="0.5").json()
    served.batcher.close()
    wanted = shapes(PROMPT, image=begin, strength=0.5, seed=5, num_inference_steps=4)
    assert abs(pixels(picture(answer["data"][0]["b64_json"])) - pixels(wanted.images[0])).max() <= 1


def test_greys_of_16_bits_are_those_of_8(served: Served) -> None:
    """Pillow alone would make white of nearly all of them."""
    grey = np.asarray(Image.effect_mandelbrot((64, 64), (-2, -1.5, 1, 1.5), 20))
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    assert deep.mode == "I;16"
    one, other = (
        served.edit({"image": png(begin)}, prompt=PROMPT, seed="5", strength="0.5").json()
        for begin in (Image.fromarray(grey), deep)
    )
    assert one["data"] == other["data"]


@pytest.mark.parametrize("own", [True, False], ids=["transparent picture", "mask"])
def test_an_edit_draws_where_it_is_transparent(served: Served, shapes: Pipeline, own: bool) -> None:
    begin = Image.effect_mandelbrot((128, 128), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    hole = np.zeros((128, 128), dtype=np.uint8)
    hole[:, 64:] = 255
    clear = begin.copy()
    clear.putalpha(Image.fromarray(255 - hole))
    files = {"image": png(clear)} if own else {"image": png(begin), "mask": png(clear)}
    answer = served.edit(files, prompt=PROMPT, seed="5", steps="4").json()
    served.batcher.close()
    wanted = shapes(PROMPT, image=begin, mask_image=Image.fromarray(hole), seed=5, num_inference_steps=4)
    found = pixels(picture(answer["data"][0]["b64_json"]))
    assert abs(found - pixels(wanted.images[0])).max() <= 1
    kept, drawn = abs(found - pixels(begin)).mean(axis=(0, 2)).reshape(2, 64)[:, 8:-8].mean(axis=1)
    assert kept < drawn / 2


@pytest.mark.parametrize(
    ("files", "fields", "param"),
    [
        ({}, {}, "image"),
        ({"image": b"GIF89a"}, {}, "image"),
        ({"image": b""}, {}, "image"),
        ({"image": "a", "mask": b"x"}, {}, "mask"),
        ({"image": "a", "mask": "b"}, {}, "mask"),
        ({"image": "a", "other": "a"}, {}, None),
        ({"image": "a"}, {"n": "many"}, "n"),
        ({"image": "a"}, {"surprise": "1"}, "surprise"),
        ({"image": "a"}, {"strength": "1.5"}, "strength"),
        ({"image": "a"}, {"input_fidelity": "high"}, "input_fidelity"),
        ({"image": "a"}, {"image": "http://127.0.0.1/a.png"}, "image"),
    ],
)
def test_edits_that_cannot_be(bad: Served, files: dict[str, Any], fields: dict[str, str], param: str | None) -> None:
    known = {"a": png(Image.new("RGB", (64, 64))), "b": png(Image.new("RGBA", (32, 64)))}
    sent: dict[str, bytes] = {name: known[data] if isinstance(data, str) else data for name, data in files.items()}
    answer = bad.edit(sent, **fields)
    assert answer.status_code in (400, 415), answer.text
    if files and "other" not in files:
        refused(answer, 400, param)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("n", value) for value in ("1_0", "+2", " 2 ", "２", "0x2", "", "2,0", "true", "\ud800")],
        *[("strength", value) for value in ("1_0", " .5", "+0.5", "０.５", "NaN", "1e999", ".5", "0_0.5")],
        *[("stream", value) for value in ("2", "ja", "")],
        ("seed", "9" * 5000),
        ("prompt", "a\0b"),
        ("size", "５１２x512"),
    ],
    ids=_short,
)
def test_a_form_s_values_are_no_more_than_they_say(bad: Served, field: str, value: str) -> None:
    image = png(Image.new("RGB", (64, 64)))
    sent = value.encode("utf-8", "surrogatepass")
    answer = bad.client.post("/v1/images/edits", files={"image": image}, data={"steps": "3", field: sent})
    refused(answer, 400, field)


def test_an_edit_of_json_is_415(bad: Served) -> None:
    answer = bad.client.post("/v1/images/edits", json={"prompt": "a"})
    assert refused(answer, 415)["code"] == "unsupported_media_type"
