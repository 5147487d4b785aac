"""OpenAI's own client works against the server."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator

import openai
import pytest
from PIL import Image

from ldmrt.serving.http import Limits

from .conftest import PROMPT, Served, Serving, picture, png

KEY = "k" * 24


def client_of(served: Served, key: str = KEY) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)


@pytest.fixture
def served(serving: Serving) -> Served:
    return serving(keys=(KEY,))


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with client_of(served) as one:
        yield one


def upload(alpha: int = 255) -> io.BytesIO:
    out = io.BytesIO(png(Image.new("RGBA", (128, 128), (200, 0, 0, alpha))))
    out.name = "picture.png"
    return out


def test_generate(client: openai.OpenAI) -> None:
    extra = {"steps": 2, "seed": 4, "guidance_scale": 3.5, "negative_prompt": "blue", "sampler": "Euler a"}
    answer = client.images.generate(prompt=PROMPT, model="shapes", n=2, size="128x128", extra_body=extra)
    assert answer.data is not None
    assert [one.seed for one in answer.data] == [4, 5]  # type: ignore[attr-defined]
    for one in answer.data:
        assert one.url is None
        assert picture(one.b64_json or "").size == (128, 128)
    assert (answer.output_format, answer.size, answer.background) == ("png", "128x128", "opaque")


def test_edit(client: openai.OpenAI) -> None:
    answer = client.images.edit(image=upload(), prompt=PROMPT, n=1, extra_body={"steps": 2, "strength": 0.5})
    assert answer.data is not None
    assert picture(answer.data[0].b64_json or "").size == (128, 128)


def test_an_edit_of_a_list_of_one(client: openai.OpenAI) -> None:
    answer = client.images.edit(image=[upload()], prompt=PROMPT, extra_body={"steps": 2})
    assert answer.data is not None


def test_generate_in_a_stream(client: openai.OpenAI) -> None:
    stream = client.images.generate(
        prompt=PROMPT, stream=True, partial_images=2, output_format="webp", extra_body={"steps": 5, "seed": 3}
    )
    events = list(stream)
    assert [one.type for one in events] == [
        "image_generation.partial_image",
        "image_generation.partial_image",
        "image_generation.completed",
    ]
    assert [one.partial_image_index for one in events if one.type == "image_generation.partial_image"] == [0, 1]
    for one in events:
        assert picture(one.b64_json).format == "WEBP"
        assert (one.output_format, one.size, one.quality, one.background) == ("webp", "128x128", "auto", "opaque")
        assert one.created_at > 0
    whole = client.images.generate(prompt=PROMPT, output_format="webp", extra_body={"steps": 5, "seed": 3})
    assert whole.data is not None
    assert events[-1].b64_json == whole.data[0].b64_json


def test_edit_in_a_stream(client: openai.OpenAI) -> None:
    stream = client.images.edit(
        image=upload(), prompt=PROMPT, stream=True, partial_images=1, extra_body={"steps": 4, "strength": 1.0}
    )
    assert [one.type for one in stream] == ["image_edit.partial_image", "image_edit.completed"]


def test_several_in_a_stream(client: openai.OpenAI) -> None:
    stream = client.images.generate(
        prompt=PROMPT, n=2, stream=True, partial_images=1, extra_body={"steps": 4, "seed": 1}
    )
    events = list(stream)
    kinds = [(one.type.rpartition(".")[2], one.image_index) for one in events]  # type: ignore[union-attr]
    assert sorted(kinds) == [("completed", 0), ("completed", 1), ("partial_image", 0), ("partial_image", 1)]
    assert [one.seed for one in events if one.type.endswith("completed")] == [1, 2]  # type: ignore[union-attr]


def test_models(client: openai.OpenAI) -> None:
    assert [one.id for one in client.models.list()] == ["shapes"]
    assert client.models.retrieve("shapes").owned_by == "ldmrt"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_errors_are_the_client_s_own(client: openai.OpenAI, served: Served) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt=PROMPT, size="64x64")
    assert (caught.value.param, caught.value.code, caught.value.type) == (
        "size",
        "invalid_value",
        "invalid_request_error",
    )
    assert caught.value.request_id
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt=PROMPT, model="dall-e-3")
    with client_of(served, "wrong") as stranger, pytest.raises(openai.AuthenticationError):
        stranger.models.list()


def test_a_full_queue_is_a_rate_limit(serving: Serving) -> None:
    served = serving(keys=(KEY,), max_waiting=1)
    with client_of(served) as client, pytest.raises(openai.BadRequestError) as caught:
        client.images.generate(prompt=PROMPT, n=2)  # more than may ever wait
    assert caught.value.param == "n"


def test_an_error_in_a_stream(serving: Serving) -> None:
    served = serving(keys=(KEY,), limits=Limits(seconds=0.2))
    with client_of(served) as client:
        stream = client.images.generate(prompt=PROMPT, stream=True, extra_body={"steps": 100})
        with pytest.raises(openai.APIError, match="not finished in time"):
            list(stream)


def test_an_error_before_a_stream_is_a_status(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError):
        client.images.generate(prompt=PROMPT, stream=True, extra_body={"steps": 0})


def test_steps_are_told_in_comments(served: Served) -> None:
    body = {"prompt": PROMPT, "steps": 3, "stream": True}
    with served.client.stream("POST", "/v1/images/generations", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line.startswith(":")]
    assert lines == [f': {{"image": 0, "step": {step}, "steps": 3}}' for step in (1, 2, 3)]


async def _async_generate(url: str) -> bytes:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
        answer = await client.images.generate(prompt=PROMPT, extra_body={"steps": 2})
    assert answer.data is not None
    return base64.b64decode(answer.data[0].b64_json or "")


def test_the_client_of_coroutines(served: Served) -> None:
    import asyncio

    assert asyncio.run(_async_generate(served.url)).startswith(b"\x89PNG")
