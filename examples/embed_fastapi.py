"""Pictures in an application of one's own: a batcher that lives as long as the application, a route that awaits it, and ldmrt's own
server mounted beside it.

    pip install -c constraints.txt '.[serve]'
    uvicorn --app-dir examples embed_fastapi:app
    curl 'localhost:8000/draw?prompt=a+red+circle+on+a+white+background&seed=1' --output circle.png
    curl localhost:8000/ldmrt/v1/models
"""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import FastAPI, HTTPException, Query, Response

import ldmrt
from ldmrt.request import Request
from ldmrt.serving import Batcher
from ldmrt.serving.http import create_app


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the model when the application starts; finish what was accepted when it ends."""
    pipe = ldmrt.Pipeline.from_bundle()
    async with Batcher(pipe, max_waiting=32) as batcher:
        app.state.batcher = batcher
        app.mount("/ldmrt", create_app(batcher, bundled=True))
        yield


app = FastAPI(title="Pictures", lifespan=lifespan)


@app.get("/draw", response_class=Response)
async def draw(
    prompt: Annotated[str, Query(max_length=1000)],
    steps: Annotated[int, Query(ge=1, le=50)] = 20,
    seed: int | None = None,
) -> Response:
    """One picture. A client that goes before it is there withdraws it: the task that awaits is cancelled."""
    try:
        result = await app.state.batcher.submit(
            Request(prompt=prompt, num_inference_steps=steps, seed=seed), timeout=60.0
        )
    except ldmrt.BadRequest as error:
        raise HTTPException(400, str(error)) from error
    except ldmrt.Overloaded as error:
        raise HTTPException(429, "try again later", {"retry-after": str(round(error.retry_after) + 1)}) from error
    except ldmrt.DeadlineExceeded as error:
        raise HTTPException(504, "not finished in time") from error
    out = io.BytesIO()
    result.images[0].save(out, format="PNG")
    return Response(out.getvalue(), media_type="image/png", headers={"x-seed": str(result.seeds[0])})
