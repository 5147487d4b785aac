"""What a server answers."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel


class Picture(BaseModel):
    """A picture: `b64_json` is its file; `seed` makes it again."""

    b64_json: str
    seed: int


class Settings(BaseModel):
    """What a request became, with everything filled in."""

    steps: int
    guidance_scale: float
    sampler: str
    width: int
    height: int


class Images(BaseModel):
    """The answer with pictures."""

    created: int
    data: list[Picture]
    background: Literal["opaque"] = "opaque"
    output_format: str
    size: str
    settings: Settings


class Problem(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str


class Failure(BaseModel):
    """The answer that is an error."""

    error: Problem


class Model(BaseModel):
    """A model: OpenAI's fields, then what it can be asked for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["ldmrt"] = "ldmrt"
    kind: str
    sizes: list[str]
    samplers: list[str]
    defaults: Settings
    max_images: int
    max_steps: int
    image: Literal["none", "optional", "required"]
    mask: Literal["none", "optional", "required"]
    bundled: bool


class ModelList(BaseModel):
    """All models: there is one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Health(BaseModel):
    """One word of how the server is."""

    status: str


class Tensor(BaseModel):
    """An input or output in KServe's terms."""

    name: str
    datatype: str
    shape: list[int]


class ServerMetadata(BaseModel):
    """KServe's description of a server."""

    name: Literal["ldmrt"] = "ldmrt"
    version: str
    extensions: list[str] = []


class ModelMetadata(BaseModel):
    """KServe's description of a model."""

    name: str
    versions: list[str] = []
    platform: Literal["ldmrt"] = "ldmrt"
    inputs: list[Tensor]
    outputs: list[Tensor]


class Readiness(BaseModel):
    """Whether a model is ready, in KServe's terms."""

    name: str
    ready: bool
