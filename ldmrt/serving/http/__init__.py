"""The HTTP server over an engine: OpenAI's Images API, health, metrics and a page. Needs the packages of `ldmrt[serve]`."""

from ldmrt.serving.http.app import create_app
from ldmrt.serving.http.keys import Keys
from ldmrt.serving.http.limits import Limits
from ldmrt.serving.http.server import listen, serve

__all__ = ["Keys", "Limits", "create_app", "listen", "serve"]
