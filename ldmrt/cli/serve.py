"""`ldmrt serve`: pictures over HTTP."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import Annotated

import typer

from ldmrt.cli.options import Device, Dtype, DtypeOption, EngineChoice, EngineOption, Verbose
from ldmrt.errors import BadRequest

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    engines: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A bundle made by build-engines. Default: the built-in model.")
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Where to listen; keys are needed for others than this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(metavar="N", min=0, max=65535, help="0: one that is free.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Keys of clients, one a line. Default: those in LDMRT_API_KEYS, with commas between."
        ),
    ] = None,
    served_model_name: Annotated[
        str | None, typer.Option(metavar="NAME", help="What clients call the model. Default: its own name.")
    ] = None,
    max_waiting: Annotated[int, typer.Option(metavar="N", min=1, help="Images that may wait; beyond them: 429.")] = 64,
    max_images: Annotated[int, typer.Option(metavar="N", min=1, help="Images of one request.")] = 10,
    max_steps: Annotated[int, typer.Option(metavar="N", min=1, help="Steps of an image.")] = 150,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.1, help="In which a request must be finished; else: 504.")
    ] = 300.0,
    drain_timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0, help="In which, after SIGTERM, what was accepted may be finished."),
    ] = 60.0,
    step_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            min=0.1,
            help="In which an engine that has work must make a step; else it is started anew.",
        ),
    ] = 120.0,
    overlap: Annotated[
        bool,
        typer.Option(
            "--overlap",
            help="On a GPU: decode pictures beside the next steps of others, which takes more memory. Not yet run on a GPU.",
        ),
    ] = False,
    engine: EngineOption = EngineChoice.auto,
    dtype: DtypeOption = Dtype.auto,
    device: Device = None,
    _verbose: Verbose = False,
) -> None:
    """Serve pictures over HTTP: OpenAI's Images API, metrics, and a page to try it."""
    missing = [name for name in ("fastapi", "uvicorn", "prometheus_client") if importlib.util.find_spec(name) is None]
    if missing:
        raise BadRequest(f"{', '.join(missing)} is not installed: pip install 'ldmrt[serve]'")

    from ldmrt.config import from_env
    from ldmrt.serving import http

    config = from_env(os.environ)
    keys = http.Keys.read(api_key_file, os.environ)
    if not keys and host not in _LOOPBACK:
        raise BadRequest(
            f"at {host} others than this machine could ask, and there are no keys: give --api-key-file, or listen at 127.0.0.1"
        )
    with http.listen(host, port) as listening:  # before what takes time
        from ldmrt.serving import EngineProcess
        from ldmrt.serving.logs import to_stderr

        to_stderr()
        process = EngineProcess(
            engines,
            device or config.device,
            engine=None if engine is EngineChoice.auto else engine.value,
            dtype=None if dtype is Dtype.auto else dtype.value,
            threads=config.threads,
            max_waiting=max_waiting,
            overlap=overlap,
            step_seconds=step_timeout,
        )
        app = http.create_app(
            process,
            keys=keys,
            limits=http.Limits(images=max_images, steps=max_steps, seconds=timeout),
            model=served_model_name,
            bundled=engines is None,
        )
        http.serve(app, listening, drain_seconds=drain_timeout)
