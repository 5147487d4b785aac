"""OpenAI's Images API: /v1/images/generations and /v1/images/edits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from PIL import Image
from starlette.responses import JSONResponse, Response

from ldmrt.errors import Cancelled, EngineMismatch, LdmrtError
from ldmrt.pipeline import Result
from ldmrt.serving.handle import Handle
from ldmrt.serving.http.account import account
from ldmrt.serving.http.answers import Failure, Images, Picture, Settings
from ldmrt.serving.http.errors import HttpError, bad_request, of
from ldmrt.serving.http.fields import Edit, Fields, Generation, parse_form
from ldmrt.serving.http.house import House, house
from ldmrt.serving.http.pictures import encoded
from ldmrt.serving.http.stream import EventStream, Progress, comment, event, picture_event
from ldmrt.serving.http.uploads import mask_of, open_picture, read_form
from ldmrt.serving.logs import FIELDS, log

router = APIRouter(tags=["images"])

_FAILURES: dict[int | str, dict[str, Any]] = {
    code: {"model": Failure, "description": text}
    for code, text in (
        (400, "A value cannot be used; `param` names its field."),
        (401, "No key."),
        (403, "Without keys: another host's name, or another site's page."),
        (404, "No such model."),
        (408, "The body came too slowly."),
        (413, "The body is too large."),
        (429, "Too many images wait; see Retry-After."),
        (500, "The engine failed."),
        (503, "The server is about to end, or the engine had to stop."),
        (504, "Not finished in time."),
    )
}
_STREAM: dict[str, Any] = {"text/event-stream": {"schema": {"type": "string"}}}
_ANSWERS: dict[int | str, dict[str, Any]] = {200: {"model": Images, "content": _STREAM}, **_FAILURES}


@router.post("/v1/images/generations", responses=_ANSWERS, response_model=None)
async def generations(request: Request, fields: Generation) -> Response:
    """Draw pictures from words. With `stream` the answer is a stream of events."""
    return await _answer(request, fields, "image_generation")


_EDIT_SCHEMA = Edit.model_json_schema()
_FILE = {"type": "string", "format": "binary"}
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    **_EDIT_SCHEMA,
                    "properties": {**_EDIT_SCHEMA["properties"], "image": _FILE, "mask": _FILE},
                    "required": ["image"],
                }
            }
        },
    }
}


@router.post(
    "/v1/images/edits",
    responses={**_ANSWERS, 415: {"model": Failure, "description": "No form."}},
    response_model=None,
    openapi_extra=_FORM,
)
async def edits(request: Request) -> Response:
    """Draw a picture anew, or into a picture where the mask is transparent. With `stream` the answer is a stream of events."""
    here = house(request)
    here.check_open()
    form = await read_form(request, here.limits)
    fields = parse_form(Edit, form.values)
    if "image" not in form.files:
        raise bad_request("image is missing", "image")
    opened = {
        name: await here.aside(partial(open_picture, data, here.limits, param=name))
        for name, data in form.files.items()
    }
    image, mask = opened["image"], opened.get("mask")
    if mask is not None and mask.size != image.size:
        raise bad_request(f"mask has {_size(mask.size)} pixels, expected the image's {_size(image.size)}", "mask")
    if mask is None and here.engine.facts.takes_mask and image.has_transparency_data:
        mask = image
    pictures = {"image": image}
    if mask is not None:
        pictures["mask_image"] = await here.aside(partial(mask_of, mask))
    return await _answer(request, fields, "image_edit", **pictures)


async def _answer(request: Request, fields: Fields, kind: str, **pictures: Image.Image) -> Response:
    here = house(request)
    here.check_open()
    here.check_model(fields.model)
    here.limits.check(fields, here.engine.facts.defaults)
    progress = Progress() if fields.stream else None
    try:
        handle = await here.aside(
            partial(
                here.engine.submit,
                fields.request(),
                timeout=here.limits.seconds,
                on_progress=None if progress is None else progress.made,
                previews=fields.partial_images or 0,
                **pictures,
            )
        )
    except EngineMismatch as error:
        raise bad_request(
            "the engines have no room for guidance: use a guidance_scale of at most 1", "guidance_scale"
        ) from error
    except LdmrtError as error:
        raise of(error) from error
    job = handle.job
    account(request.scope).told.update(
        images=job.num_images,
        steps=job.num_inference_steps,
        size=_size((job.width, job.height)),
        stream=progress is not None,
        prompt_characters=len(fields.prompt),
    )
    if progress is not None:
        handle.future.add_done_callback(progress.ended)
        return EventStream(_events(request, here, fields, handle, progress, kind), partial(_withdraw, request, handle))
    try:
        result = await _unless_gone(request, handle)
        files = await _files(here, fields, result)
    except LdmrtError as error:
        raise _known(request, error) from error
    finally:
        handle.cancel()
    data = [Picture(b64_json=file, seed=seed) for file, seed in zip(files, result.seeds, strict=True)]
    _tell(request, here, result)
    answer = Images(created=int(time.time()), data=data, settings=_settings(handle), **_common(fields, handle))
    return JSONResponse(answer.model_dump())


async def _events(
    request: Request, here: House, fields: Fields, handle: Handle, progress: Progress, kind: str
) -> AsyncIterator[bytes]:
    """The events of a request, an error the last of them."""
    common = {"background": "opaque", "quality": "auto", **_common(fields, handle)}
    sent = dict.fromkeys(range(handle.job.num_images), 0)
    try:
        while True:
            try:
                step = await progress.next()
            except TimeoutError:
                yield comment(None)
                continue
            if step is None:
                break
            yield comment(step)
            if step.preview is not None:
                file = await here.aside(partial(_file, fields, step.preview))
                more = {"partial_image_index": sent[step.image], "image_index": step.image}
                sent[step.image] += 1
                yield picture_event(f"{kind}.partial_image", file, common, **more)
        result = await handle
        files = await _files(here, fields, result)
        settings = _settings(handle).model_dump()
        for index, (file, seed) in enumerate(zip(files, result.seeds, strict=True)):
            yield picture_event(
                f"{kind}.completed", file, common, usage=None, image_index=index, seed=seed, settings=settings
            )
        _tell(request, here, result)
    except LdmrtError as error:
        yield event("error", {"type": "error", **_known(request, error).envelope})


async def _unless_gone(request: Request, handle: Handle) -> Result:
    """The result, unless the client goes first; then the request is withdrawn.

    Raises:
        Cancelled: the client has gone.
    """
    waits = asyncio.wrap_future(handle.future)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((waits, gone), return_when=asyncio.FIRST_COMPLETED)
        if not waits.done():
            handle.cancel()
            account(request.scope).told["status"] = 499
        return await waits
    finally:
        gone.cancel()


def _withdraw(request: Request, handle: Handle) -> None:
    """End a request at the end of its stream, if it has none: then the client has gone."""
    if handle.cancel():
        account(request.scope).told["end"] = "cancelled"


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _known(request: Request, error: LdmrtError) -> HttpError:
    """What the client is told; what it is not told goes into the log."""
    answer = of(error)
    told = account(request.scope).told
    told["end"] = "cancelled" if isinstance(error, Cancelled) else answer.code
    if answer.status == 500:
        log.error("the engine failed", exc_info=error, extra={FIELDS: {"request_id": account(request.scope).id}})
    return answer


def _tell(request: Request, here: House, result: Result) -> None:
    here.metrics.made(result)
    timings = {name: round(seconds, 4) for name, seconds in result.timings.items()}
    account(request.scope).told.update(end="served", **timings)


async def _files(here: House, fields: Fields, result: Result) -> list[str]:
    return list(await asyncio.gather(*(here.aside(partial(_file, fields, image)) for image in result.images)))


def _file(fields: Fields, picture: Image.Image) -> str:
    return encoded(picture, fields.picture_format, fields.output_compression)


def _common(fields: Fields, handle: Handle) -> dict[str, Any]:
    return {"output_format": fields.picture_format, "size": _size((handle.job.width, handle.job.height))}


def _settings(handle: Handle) -> Settings:
    job = handle.job
    return Settings(
        steps=job.num_inference_steps,
        guidance_scale=job.guidance_scale,
        sampler=job.sampler,
        width=job.width,
        height=job.height,
    )


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
