"""The application: routes behind the middleware that every request passes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

import ldmrt
from ldmrt.serving.engine import Engine
from ldmrt.serving.http import images, info, page
from ldmrt.serving.http.account import Accounts
from ldmrt.serving.http.body import Body
from ldmrt.serving.http.errors import HttpError
from ldmrt.serving.http.fields import explained
from ldmrt.serving.http.house import House
from ldmrt.serving.http.keys import Guard, Keys
from ldmrt.serving.http.limits import Limits

_CODES = {404: ("not_found", "there is no such path"), 405: ("method_not_allowed", "the path has no such method")}


def create_app(
    engine: Engine,
    *,
    keys: Keys | None = None,
    limits: Limits | None = None,
    model: str | None = None,
    bundled: bool = False,
) -> FastAPI:
    """The server of an engine, which stays the caller's to close. It may be mounted in another application.

    Args:
        engine: what makes the pictures.
        keys: those of clients; without any, everybody on this machine may ask.
        limits: of a request; None for safe ones.
        model: the id under which the model is known; None for its own name.
        bundled: whether it is the model that comes with the package.
    """
    here = House(engine, model or engine.facts.name, limits or Limits(), bundled=bundled)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        yield
        here.end()

    app = FastAPI(title="ldmrt", version=ldmrt.__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.house = here
    app.include_router(images.router)
    app.include_router(info.router)
    app.include_router(page.router)
    app.add_exception_handler(HttpError, _answered)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    # The last added is the first to see a request.
    app.add_middleware(Body, limits=here.limits)
    app.add_middleware(Guard, keys=keys or Keys())
    app.add_middleware(Accounts, metrics=here.metrics)
    return app


def _answered(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HttpError)  # noqa: S101 - starlette calls it for these alone
    return error.response()


def _invalid(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101 - likewise
    return explained(error.errors()).response()


def _refused(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - likewise
    code, message = _CODES.get(error.status_code, ("invalid_request", "the request cannot be read"))
    return HttpError(error.status_code, code, message, headers=error.headers).response()
