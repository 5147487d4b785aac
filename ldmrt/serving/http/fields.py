"""What a request may say: OpenAI's fields, and ours. Of the values of a field of theirs that we have no use for, its default is taken."""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, AliasChoices, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ldmrt.errors import BadRequest
from ldmrt.request import Request
from ldmrt.serving.http.errors import HttpError, bad_request, of

F = TypeVar("F", bound="Fields")
Format = Literal["png", "jpeg", "webp"]


def _text(value: str) -> str:
    if "\0" in value:
        raise ValueError("it holds a NUL character")
    return value


# In a form numbers are text, of which pydantic would take `5_12`, `+5` and ` 5 ` too.
_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?", re.ASCII)
Text = Annotated[str, AfterValidator(_text)]


def _also(name: str, *others: str) -> AliasChoices:
    """Other spellings of a field."""
    return AliasChoices(name, *others)


class Fields(BaseModel):
    """What both kinds of request may say.

    `size` is `auto` or WIDTHxHEIGHT; diffusers' `width` and `height` stand for it too. What is left out, or null, is the model's default.
    """

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    prompt: Text
    model: str | None = Field(default=None, description="An id of /v1/models.")
    n: int | None = Field(default=None, ge=1, validation_alias=_also("n", "num_images_per_prompt"))
    size: str | None = Field(default=None, examples=["auto", "512x512"])
    width: int | None = Field(default=None, ge=1)
    height: int | None = Field(default=None, ge=1)
    negative_prompt: Text | None = None
    steps: int | None = Field(default=None, ge=1, validation_alias=_also("steps", "num_inference_steps"))
    guidance_scale: float | None = Field(default=None, ge=0)
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="Of the first image; image i has seed + i.")
    sampler: str | None = Field(default=None, max_length=100)
    output_format: Format | None = None
    output_compression: int | None = Field(default=None, ge=0, le=100, description="Quality of JPEG and WebP.")
    stream: bool | None = None
    partial_images: int | None = Field(default=None, ge=0, le=3)
    response_format: Literal["b64_json"] | None = None
    quality: Literal["auto", "standard"] | None = None
    background: Literal["auto", "opaque"] | None = None
    user: str | None = Field(default=None, max_length=512, description="Not used, not kept.")
    safety_identifier: str | None = Field(default=None, max_length=512, description="Not used, not kept.")

    @model_validator(mode="after")
    def _together(self) -> Fields:
        if self.partial_images and not self.stream:
            raise BadRequest("partial_images goes with stream", param="partial_images")
        if self.output_compression not in (None, 100) and self.picture_format == "png":
            raise BadRequest(
                "output_compression goes with jpeg and webp: png loses nothing", param="output_compression"
            )
        if self.size is not None and (self.width, self.height) != (None, None):
            raise BadRequest("size and width or height say the same: give one of them", param="size")
        self.pixels()
        return self

    @property
    def picture_format(self) -> Format:
        """How pictures are delivered."""
        return self.output_format or "png"

    def pixels(self) -> tuple[int | None, int | None]:
        """Width and height, None for the model's.

        Raises:
            BadRequest: the size is none.
        """
        if self.size in (None, "auto"):
            return self.width, self.height
        found = re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", self.size or "")
        if found is None:
            raise BadRequest("size is neither auto nor WIDTHxHEIGHT in pixels, such as 512x512", param="size")
        return int(found[1]), int(found[2])

    def request(self) -> Request:
        """The same for an engine."""
        width, height = self.pixels()
        return Request(
            prompt=self.prompt,
            negative_prompt=self.negative_prompt,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            sampler=self.sampler,
            seed=self.seed,
            num_images_per_prompt=self.n or 1,
            width=width,
            height=height,
        )


class Generation(Fields):
    """The body of /v1/images/generations."""

    moderation: Literal["auto"] | None = None
    style: Literal["vivid"] | None = None


class Edit(Fields):
    """The fields of /v1/images/edits, besides its pictures `image` and `mask`."""

    prompt: Text = ""
    input_fidelity: Literal["low"] | None = None
    strength: float | None = Field(default=None, ge=0, le=1, description="How much of the picture is drawn anew.")

    def request(self) -> Request:
        """The same for an engine."""
        values = vars(super().request())
        return Request(**{**values, "strength": self.strength})


def parse_form(kind: type[F], values: dict[str, str]) -> F:
    """Fields of a form, all of which are text.

    Raises:
        HttpError: 400.
    """
    for name in _numbers(kind) & values.keys():
        if not _NUMBER.fullmatch(values[name]):
            raise bad_request(f"{name} is no number, expected one such as 7", name)
    try:
        return kind.model_validate_strings(values)
    except ValidationError as error:
        raise explained(error.errors(include_input=False, include_url=False)) from None


@cache
def _numbers(kind: type[Fields]) -> frozenset[str]:
    """What the fields of numbers may be called."""
    fields = {
        name: field for name, field in kind.model_fields.items() if field.annotation in (int | None, float | None)
    }
    others = [field.validation_alias for field in fields.values()]
    return frozenset(fields) | {str(name) for one in others if isinstance(one, AliasChoices) for name in one.choices}


def explained(errors: Any) -> HttpError:
    """The first error that pydantic found, in our words: never with the value, which may be the prompt."""
    first = errors[0]
    own = first.get("ctx", {}).get("error")
    if isinstance(own, BadRequest):
        return of(own)
    path = [str(part) for part in first["loc"] if part != "body"]
    if first["type"] == "json_invalid":
        return HttpError(400, "invalid_json", "the body is no JSON", headers={"x-should-retry": "false"})
    if not path:
        return bad_request("the body is no JSON object: send one, as application/json")
    # What follows a field's name are branches of its type.
    if first["type"] == "extra_forbidden":
        return bad_request(f"there is no field {path[0][:64]!r}", path[0][:64])
    if first["type"] == "missing":
        return bad_request(f"{path[0]} is missing", path[0])
    return bad_request(f"{path[0]}: {first['msg']}", path[0])
