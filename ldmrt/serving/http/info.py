"""What a server says of itself: models, health, metrics, in OpenAI's terms, KServe's and Prometheus's."""

from __future__ import annotations

from typing import Any, Literal

from fastapi import APIRouter, Request, Response
from starlette.responses import JSONResponse

import ldmrt
from ldmrt.samplers.registry import SAMPLERS
from ldmrt.serving.engine import State
from ldmrt.serving.http.answers import (
    Failure,
    Health,
    Model,
    ModelList,
    ModelMetadata,
    Readiness,
    ServerMetadata,
    Settings,
    Tensor,
)
from ldmrt.serving.http.house import House, house
from ldmrt.serving.http.metrics import CONTENT_TYPE

router = APIRouter()

_NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": Failure, "description": "No such model."}}
_NOT_READY: dict[int | str, dict[str, Any]] = {503: {"model": Health, "description": "Not now."}}


@router.get("/v1/models", tags=["models"])
async def models(request: Request) -> ModelList:
    """The model there is, and what it can be asked for."""
    return ModelList(data=[_model(house(request))])


@router.get("/v1/models/{model}", tags=["models"], responses=_NOT_FOUND)
async def model(request: Request, model: str) -> Model:
    """The same by its id."""
    here = house(request)
    here.check_model(model)
    return _model(here)


@router.get("/health/live", tags=["health"], response_model=Health, responses=_NOT_READY)
@router.get("/v2/health/live", tags=["health"], response_model=Health, responses=_NOT_READY)
async def live(request: Request) -> Response:
    """Whether the server can be left to itself: 503 if it must be started anew."""
    broken = house(request).engine.state is State.BROKEN
    return _health("broken" if broken else "live", well=not broken)


@router.get("/health/ready", tags=["health"], response_model=Health, responses=_NOT_READY)
@router.get("/v2/health/ready", tags=["health"], response_model=Health, responses=_NOT_READY)
async def ready(request: Request) -> Response:
    """Whether requests should be sent here."""
    here = house(request)
    return _health("draining" if here.draining else here.engine.state.value, well=here.ready)


@router.get("/v2", tags=["kserve"])
async def server_metadata() -> ServerMetadata:
    """The server, in KServe's terms."""
    return ServerMetadata(version=ldmrt.__version__)


@router.get("/v2/models/{model}", tags=["kserve"], responses=_NOT_FOUND)
async def model_metadata(request: Request, model: str) -> ModelMetadata:
    """The model, in KServe's terms."""
    house(request).check_model(model)
    return ModelMetadata(
        name=model,
        inputs=[Tensor(name="prompt", datatype="BYTES", shape=[1])],
        outputs=[Tensor(name="images", datatype="BYTES", shape=[-1])],
    )


@router.get(
    "/v2/models/{model}/ready",
    tags=["kserve"],
    response_model=Readiness,
    responses={**_NOT_FOUND, 503: {"model": Readiness, "description": "Not now."}},
)
async def model_ready(request: Request, model: str) -> Response:
    """Whether the model is ready, in KServe's terms."""
    here = house(request)
    here.check_model(model)
    return JSONResponse({"name": model, "ready": here.ready}, 200 if here.ready else 503)


@router.get("/metrics", tags=["metrics"], response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics(request: Request) -> Response:
    """What Prometheus reads."""
    return Response(house(request).metrics.text(), media_type=CONTENT_TYPE)


def _health(word: str, *, well: bool) -> Response:
    return JSONResponse({"status": word}, 200 if well else 503)


def _model(here: House) -> Model:
    facts = here.engine.facts
    defaults = facts.defaults
    image: Literal["none", "optional", "required"] = (
        "required" if facts.needs_image else "optional" if facts.begins else "none"
    )
    mask: Literal["none", "optional", "required"] = (
        "required" if facts.needs_mask else "optional" if facts.takes_mask and image != "none" else "none"
    )
    return Model(
        id=here.model,
        created=here.began,
        kind=facts.kind,
        sizes=[f"{width}x{height}" for width, height in defaults.sizes],
        samplers=list(SAMPLERS),
        defaults=Settings(
            steps=defaults.num_inference_steps,
            guidance_scale=defaults.guidance_scale,
            sampler=defaults.sampler,
            width=defaults.width,
            height=defaults.height,
        ),
        max_images=here.limits.images,
        max_steps=min(here.limits.steps, defaults.max_steps),
        image=image,
        mask=mask,
        bundled=here.bundled,
    )
