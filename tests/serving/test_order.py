"""A request whose images another process makes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldmrt import material
from ldmrt.request import Request, resolve
from ldmrt.samplers.make import sampler_table
from ldmrt.serving.channel import ChannelError, Message
from ldmrt.serving.handle import Handle
from ldmrt.serving.order import Order, scaled
from ldmrt.serving.wire import unpacked

from .conftest import FACTS
from .test_ticket import SCHEDULE, shapes

PIXELS = bytes(range(256)) * 192  # 128 x 128 x 3


def order(image: Image.Image | None = None, **fields: Any) -> Order:
    request = Request(**{"prompt": "a", "seed": 1, "num_inference_steps": 2, **fields})
    job = resolve(request, FACTS.defaults)
    return Order(
        handle=Handle(job, lambda: False),
        job=job,
        table=sampler_table(job.sampler, SCHEDULE, job.num_inference_steps),
        windows=(),
        material=material.resolve(shapes(), job),
        output_type="pil",
        previews=1,
        on_progress=None,
        priority=0,
        submitted=10.0,
        due=None,
        request=request,
        brought={"image": image, "mask_image": None},
        told=None,
    )


def test_a_parcel_is_what_one_image_needs() -> None:
    picture = Image.effect_mandelbrot((128, 128), (-2, -1.5, 1, 1.5), 20).convert("RGB")
    whole = order(picture, prompt=["a", "b"], negative_prompt=["c", "d"], num_images_per_prompt=2)
    fields, (pixels,) = whole.parcel(whole.images()[3])
    one = fields["request"]
    assert (one["prompt"], one["negative_prompt"], one["seed"], one["num_images_per_prompt"]) == ("b", "d", 4, 1)
    assert (fields["image"], fields["mask_image"], fields["previews"]) == ((128, 128), None, 1)
    assert unpacked(pixels, fields["image"]).tobytes() == picture.tobytes()


def test_the_result_is_there_when_all_images_are() -> None:
    whole = order(num_images_per_prompt=2)
    whole.started = 11.0
    latents = np.arange(4, dtype=np.float32)
    for number in (1, 0):
        assert whole.result(13.0) is None
        header = {"kind": "done", "size": (128, 128), "latents": (1, 2, 2)}
        whole.bring(number, Message(header, [PIXELS, (latents + number).tobytes()]))
    result = whole.result(13.0)
    assert result is not None
    assert result.seeds == (1, 2)
    assert result.timings == {"wait": 1.0, "run": 2.0}
    assert torch.equal(
        result.latents, torch.tensor(latents.reshape(1, 1, 2, 2)) + torch.tensor([0.0, 1]).view(2, 1, 1, 1)
    )
    assert [image.tobytes() for image in result.images] == [PIXELS, PIXELS]


def test_a_step_and_its_preview() -> None:
    made = Order.step(3, Message({"step": 4, "steps": 9, "preview": (128, 128)}, [PIXELS]))
    assert (made.image, made.step, made.steps) == (3, 4, 9)
    assert made.preview is not None
    assert made.preview.tobytes() == PIXELS
    assert Order.step(3, Message({"step": 4, "steps": 9, "preview": None}, [])).preview is None


@pytest.mark.parametrize(
    ("size", "latents", "error"), [((128, 127), (1, 2, 2), ChannelError), ((128, 128), (1, 2, 3), ValueError)]
)
def test_what_is_no_picture(size: tuple[int, int], latents: tuple[int, ...], error: type[Exception]) -> None:
    with pytest.raises(error):
        order().bring(0, Message({"size": size, "latents": latents}, [PIXELS, bytes(16)]))


def test_a_fingerprint_is_of_what_is_asked() -> None:
    red = Image.new("RGB", (128, 128), "red")
    same = [order(seed=None), order(seed=None)]  # whose seeds were drawn
    assert same[0].fingerprint == same[1].fingerprint
    marks = {
        one.fingerprint for one in (*same, order(), order(red), order(Image.new("RGB", (128, 128))), order(eta=0.5))
    }
    assert len(marks) == 5


def test_pictures_are_kept_as_they_are_used() -> None:
    wide = Image.new("RGBA", (200, 100), (255, 0, 0, 255))
    assert (scaled(wide, (128, 64)).size, scaled(wide, (128, 64)).mode) == ((128, 64), "RGB")
    assert scaled(np.zeros((10, 20, 3), np.uint8), (128, 64)).size == (128, 64)
    deep = Image.fromarray(np.full((10, 20), 128 * 257, np.uint16))
    assert np.unique(np.asarray(scaled(deep, (128, 64)))).tolist() == [128]
