"""Pictures from more than one machine: a Ray Serve application, whose replicas are each the server of `ldmrt serve` over an engine of its own.

    serve run docs/deploy/ray/serve.yaml

docs/deploy/README.md says how it is run.
"""

# Without `from __future__ import annotations`: Ray Serve reads from the annotation of `build` of which class its arguments are.
import os
import re
import time
from pathlib import Path
from typing import Any

try:
    import ray
    from ray import serve
except ImportError as error:
    raise ImportError("ray is not installed: pip install 'ldmrt[ray]'", name="ray") from error

from pydantic import BaseModel, ConfigDict, Field
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ldmrt.config import share_cores
from ldmrt.serving.engine import State
from ldmrt.serving.http.app import create_app
from ldmrt.serving.http.errors import HttpError
from ldmrt.serving.http.keys import Keys
from ldmrt.serving.http.limits import Limits
from ldmrt.serving.logs import to_stderr
from ldmrt.serving.process import EngineProcess

_LOOPBACK = re.compile(r"::1|(::ffff:)?127(\.\d{1,3}){3}", re.ASCII)
# Requests that are neither waiting nor running: those that are told that there is no room, and probes.
_PASSING = 16
# From the last answer to the end of a replica that is given up.
_FAREWELL = 15.0


class Arguments(BaseModel):
    """What can be said of the application, `args` in a config file. The names are those of the options of `ldmrt serve`.

    Attributes:
        engines: the bundle's folder, there on every machine; None for the built-in model.
        served_model_name: what clients call the model; None for its own name.
        api_key_file: keys of clients, one a line, on every machine; None for those in LDMRT_API_KEYS.
        max_waiting: images that may wait at a replica.
        max_images: of one request.
        max_steps: of one image.
        timeout: seconds in which a request must be finished.
        step_timeout: seconds in which an engine that has work must make a step.
        restart_timeout: seconds in which an engine that was lost must be ready again; then the replica is replaced, wherever there is room.
        engine: which kind, None for the best.
        dtype: its precision, None for the best.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    engines: Path | None = None
    served_model_name: str | None = None
    api_key_file: Path | None = None
    max_waiting: int = Field(default=64, ge=1)
    max_images: int = Field(default=10, ge=1)
    max_steps: int = Field(default=150, ge=1)
    timeout: float = Field(default=300.0, ge=0.1)
    step_timeout: float = Field(default=120.0, ge=0.1)
    restart_timeout: float = Field(default=300.0, gt=0)
    engine: str | None = None
    dtype: str | None = None


class Replica:
    """One server, on the GPU that Ray has given it, or else on as many CPUs.

    Raises:
        LdmrtError: the engine cannot start.
    """

    def __init__(self, arguments: Arguments) -> None:
        to_stderr()
        share_cores(os.environ)
        context = ray.get_runtime_context()
        gpus = context.get_accelerator_ids().get("GPU", [])
        cpus = context.get_assigned_resources().get("CPU", 1.0)
        self._arguments = arguments
        self._keys = Keys.read(arguments.api_key_file, os.environ)
        self._engine = EngineProcess(
            arguments.engines,
            "cuda" if gpus else "cpu",
            engine=arguments.engine,
            dtype=arguments.dtype,
            threads=max(1, int(cpus)),
            max_waiting=arguments.max_waiting,
            step_seconds=arguments.step_timeout,
        )
        self._ready = time.monotonic()

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """The routes, fields and errors of `ldmrt serve`. Ray Serve calls it once."""
        given = self._arguments
        app = create_app(
            self._engine,
            keys=self._keys,
            limits=Limits(images=given.max_images, steps=given.max_steps, seconds=given.timeout),
            model=given.served_model_name,
            bundled=given.engines is None,
        )
        app.add_middleware(_BehindProxy, open_to_all=bool(self._keys))
        return app

    def check_health(self) -> None:
        """Ray Serve calls it again and again, and replaces a replica for which it raises.

        Raises:
            RuntimeError: the engine will not come back, or has not for too long.
        """
        state = self._engine.state
        if state is State.READY:
            self._ready = time.monotonic()
        away = time.monotonic() - self._ready
        if state in {State.BROKEN, State.CLOSED} or away > self._arguments.restart_timeout:
            raise RuntimeError(f"the engine is {state.value}, and was last ready {away:.3g} seconds ago")

    def __del__(self) -> None:
        """Ray Serve calls it when the last request has got its answer."""
        if hasattr(self, "_engine"):
            self._engine.close(drain=False)


class _BehindProxy:
    """Sees what has come through the proxies of Ray Serve, which may listen to other machines than this, and which name requests by themselves.

    Args:
        app: what serves it.
        open_to_all: whether there are keys, so that others than this machine may ask.
    """

    def __init__(self, app: ASGIApp, *, open_to_all: bool) -> None:
        self._app, self._open_to_all = app, open_to_all

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""

        async def unnamed(message: Message) -> None:
            if message["type"] == "http.response.start":
                # The proxy sends the same name, which it had given before.
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        if scope["type"] == "http" and not self._open_to_all:
            client = scope.get("client")
            if client is None or not _LOOPBACK.fullmatch(client[0]):
                message = "without keys this server answers to its own machine alone"
                await HttpError(403, "forbidden_host", message).response()(scope, receive, unnamed)
                return
        await self._app(scope, receive, unnamed)


def deployment(arguments: Arguments) -> Any:
    """A deployment of replicas: to be given other `options`, and bound to the same arguments.

    A replica takes all that its own queue may hold, so that this is what refuses, with 429 and the time that it has measured. A request
    that was accepted is finished within its own time, also when the replica is given up.

    Args:
        arguments: of each replica.

    Returns:
        a `ray.serve.Deployment`.
    """
    most = 2 * arguments.max_waiting + _PASSING
    return serve.deployment(
        serve.ingress()(Replica),
        name="Replica",
        max_ongoing_requests=most,
        # Those for which there is no replica now, and for a moment those of a burst, which are handed on one after the other.
        max_queued_requests=most,
        backpressure_config={"status_code": 503, "retry_after_s": 5},
        graceful_shutdown_wait_loop_s=1.0,
        graceful_shutdown_timeout_s=arguments.timeout + _FAREWELL,
        # One that cannot start does not try for ever: an upgrade to it fails, and what is left of the former goes on.
        max_constructor_retry_count=3,
    )


def build(arguments: Arguments) -> Any:
    """The application: `import_path` of a config file, whose `deployments` may say otherwise what `deployment` says.

    Args:
        arguments: of each replica.

    Returns:
        a `ray.serve.Application` of one deployment.
    """
    return deployment(arguments).bind(arguments)
