"""Hostile HTTP: servers behind which pictures cost nothing, requests that are wrong in every way, and what an answer must never be.

A request is made of a number alone, so that a finding is made again by it. There are two servers: one lets everybody on this machine in, to
the other nobody who asks has a key.
"""

from __future__ import annotations

import errno
import io
import json
import random
import re
import select
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from PIL import Image

from damage import damaged
from ldmrt.conditioning import Picture
from ldmrt.pipeline import Pipeline, Result
from ldmrt.request import Request
from ldmrt.serving.engine import Facts, OnStep, State
from ldmrt.serving.handle import Handle, Progress
from ldmrt.serving.http import Keys, Limits, create_app
from ldmrt.serving.http.keys import OPEN
from ldmrt.serving.register import Stats

CANARY = "canary-in-the-prompt"
# What a request may cost here: those that are refused are the point.
LIMITS = Limits(images=4, steps=20, form_bytes=4 << 20, upload_pixels=1 << 20, body_seconds=1.0)
_PATIENCE = 20.0  # seconds; an answer that takes longer counts as none
_IDLE = 0.1  # after so many seconds without a word a server is told that nothing more will come


class StandIn:
    """An engine (`ldmrt.serving.engine.Engine`) that checks and tokenizes requests as the batcher does, and then gives grey pictures."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self.facts = Facts.of(pipeline)
        self.state = State.READY
        self.restarts = 0
        self._received = 0
        self._latents = torch.zeros(1)

    def submit(
        self,
        request: Request,
        *,
        image: Picture | None = None,
        mask_image: Picture | None = None,
        timeout: float | None = None,  # noqa: ARG002 - it is never late
        on_progress: OnStep | None = None,
        previews: int = 0,
    ) -> Handle:
        """Answer a request at once."""
        self._received += 1
        job, _ = self._pipeline.resolve(request, image=image, mask_image=mask_image)
        table = self._pipeline.table(job)
        self._pipeline.tokenize(job)
        grey = Image.new("RGB", (job.width, job.height), "grey")
        if on_progress is not None:
            for number in range(job.num_images):
                preview = grey if previews else None
                on_progress(Progress(number, 0, table.num_steps, self._latents, preview))
        handle = Handle(job, lambda: False)
        timings = {"wait": 0.0, "run": 0.0}
        handle.future.set_result(Result([grey] * job.num_images, self._latents, job.seeds, timings, job))
        return handle

    def stats(self) -> Stats:
        """How many requests came."""
        return Stats(received=self._received, served=self._received)

    def close(self, *, drain: bool = True) -> None:  # noqa: ARG002 - nothing waits
        """Nothing is held."""
        self.state = State.CLOSED


def apps(pipeline: Pipeline, limits: Limits = LIMITS) -> tuple[FastAPI, FastAPI]:
    """The open server and the closed one."""
    key = "no request has this key"
    return create_app(StandIn(pipeline), limits=limits), create_app(StandIn(pipeline), keys=Keys([key]), limits=limits)


@contextmanager
def listening(*served: FastAPI) -> Iterator[list[int]]:
    """Serve applications on threads of this process; gives their ports."""
    servers = [
        uvicorn.Server(uvicorn.Config(app, port=0, log_config=None, access_log=False, ws="none")) for app in served
    ]
    threads = [threading.Thread(target=server.run) for server in servers]
    for thread in threads:
        thread.start()
    try:
        while not all(server.started for server in servers):
            time.sleep(0.01)
        yield [server.servers[0].sockets[0].getsockname()[1] for server in servers]
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.should_exit = True
            thread.join()


# ---------------------------------------------------------------------------------------------------- requests

_ROUTES = (
    "/v1/images/generations", "/v1/images/edits", "/v1/models", "/v1/models/shapes", "/v2", "/v2/models/shapes",
    "/v2/models/shapes/ready", "/metrics", "/openapi.json", *sorted(OPEN),
)  # fmt: skip
_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PRI", "get", "P\tST", "é")
_ODD_PATHS = (
    "*", "", "/" * 3000, "/../../etc/passwd", "/%2e%2e/%2e%2e/etc/passwd", "/v1/models/%00", "/v1/models/..%2f..%2fkeys", "/v1/models/%ff%fe",
    "/v1//models", "//evil.example/v1/models", "http://evil.example/v1/models", "/health/live/../../metrics", "/health/live%2f..%2fmetrics",
    "/HEALTH/LIVE", "/health/live;/metrics", "/metrics?x=/health/live", "/metrics#/health/live", "/%2f", "/docs", "/v1/models/" + "x" * 2000,
    "/v1/models/{model}", "/\\metrics", "/metrics%20", "/metrics%0d%0aX: y",
)  # fmt: skip
_NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 2**31, 2**53, 2**63 - 1, 2**63, 2**64, 10**30, 1e308, -0.0, 0.5, 5e-324, float("nan"), float("inf"), True, False, None, "1",
    "１", "5_12", " 1", "+1", "1e3", "0x10", "", [1], {}, [[]], "NaN", "x" * 200,
)  # fmt: skip
_TEXTS = (
    "", " ", "a" * 4000, "a" * 4001, "a\0b", "\ud800", "\udfff\ud800", "\u202e", "😀" * 900, "%s%n{0}", "<|endoftext|>" * 40, "../../etc/passwd",
    "http://127.0.0.1:9/x.png", "file:///etc/passwd", "data:image/png;base64,AAAA", "((((" * 500, '"}\n', "\r\nX-Injected: y", "\x1b[2J", "((a:1e999))",
    "\u0301" * 2000, "﷽" * 500, "ﬃ" * 2000,
)  # fmt: skip
_SIZES = (
    "auto", "128x128", "0x0", "-1x8", "5_12x512", "５１２x512", "1e9x1e9", "512x512x512", "99999x99999", "128X128", "128 x 128", "128x128\n", "x", "",
)  # fmt: skip
_FIELDS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        ("n", "num_images_per_prompt", "steps", "num_inference_steps", "seed", "width", "height"), _NUMBERS
    ),
    **dict.fromkeys(("guidance_scale", "strength", "output_compression", "partial_images"), _NUMBERS),
    **dict.fromkeys(
        ("negative_prompt", "user", "safety_identifier", "sampler", "model", "quality", "background"), _TEXTS
    ),
    **dict.fromkeys(
        ("moderation", "style", "response_format", "input_fidelity", "surprise", "\ud800", "__class__", "a\0"), _TEXTS
    ),
    "prompt": (*_TEXTS, *_NUMBERS),
    "size": (*_SIZES, *_NUMBERS),
    "output_format": ("png", "jpeg", "webp", "gif", "PNG", *_NUMBERS),
    "stream": (True, False, "yes", 1),
    "image": _TEXTS,
    "mask": _TEXTS,
}
_BODIES = (
    b"", b"null", b"[]", b"7", b'"a"', b"{", b"{'a': 1}", b'{"prompt": "a", "guidance_scale": NaN}', b'{"prompt": "a", "guidance_scale": 1e999}',
    b'{"prompt": "\\ud800"}', b"[" * 100_000, b'{"a":' * 20_000, b"\xff\xfe{", b"\xef\xbb\xbf{}", '{"prompt": "a"}'.encode("utf-16"),
    b'{"prompt": "a", "prompt": "b", "n": 1, "n": 99}', b'{"prompt": ' + b"9" * 5000 + b"}", b'{"prompt": "a", "steps": 1}' + b" " * 300_000,
    b'{"prompt": "a", "steps": 1' + b"0" * 4400 + b"}", b'{"\\u0070rompt": "a", "steps": 1}', b'{"prompt": "a", "steps": 1} {}',
)  # fmt: skip
_HEADERS = (
    "Content-Length: 5", "Content-Length: -1", "Content-Length: 1e3", "Content-Length: 99999999999999999999", "Content-Length: 5, 6", "Transfer-Encoding: chunked",
    "Transfer-Encoding: gzip, chunked", "Transfer-Encoding: identity", "Expect: 100-continue", "Upgrade: websocket\r\nConnection: Upgrade", "Upgrade: h2c",
    "Host: evil.example", "Host:", "Host: 127.0.0.1\r\nHost: evil.example", "X-Request-Id: a b", "X-Request-Id: " + "x" * 5000, "Origin: null", "Origin: http://localhost",
    "Content-Encoding: gzip", "Content-Type: text/plain", "Content-Type: multipart/form-data", "Content-Type: application/json; charset=utf-7", "Range: bytes=0-,0-,0-",
    "Authorization: Bearer x", "Authorization: Bearer " + "é" * 20, "Authorization: Basic Og==", "Cookie: a=b", "X-Forwarded-For: 127.0.0.1", " folded: y", "No colon", "\0: y",
    "X-Http-Method-Override: DELETE", "Accept-Encoding: gzip", "Forwarded: for=127.0.0.1", "Last-Event-ID: 1", "If-None-Match: *", "TE: trailers", "A: b" * 3000,
)  # fmt: skip
_CHARSETS = (
    "utf-8",
    "utf-7",
    "utf-16",
    "idna",
    "punycode",
    "unicode_escape",
    "raw_unicode_escape",
    "hex",
    "zip",
    "no-such",
    "undefined",
)
_BOUNDARY = b"----fuzz"


def request(seed: int, *, mutated: bool | None = None) -> bytes:
    """A request, hostile in a way that the seed chooses; `mutated` says whether its bytes are also to be damaged, else the seed does."""
    draw = random.Random(seed)
    method = draw.choice(("GET", "POST", "POST", "POST", draw.choice(_METHODS)))
    path = draw.choice(_ROUTES[:2] if method == "POST" and draw.random() < 0.85 else (*_ROUTES, *_ODD_PATHS))
    lines = ["Host: localhost", "Connection: close"]
    body = b""
    if method not in ("GET", "HEAD") or draw.random() < 0.1:
        if path.endswith("edits") or draw.random() < 0.05:
            kind, body = _form(draw)
        else:
            kind, body = "application/json", _json(draw)
        lines.append(f"Content-Type: {kind}")
    chunked = bool(body) and draw.random() < 0.2
    if chunked:
        lines.append("Transfer-Encoding: chunked")
        body = _chunks(draw, body)
    elif body or method == "POST":
        lines.append(f"Content-Length: {len(body)}")
    for _ in range(draw.choice((0, 0, 0, 1, 2))):
        lines.insert(draw.randrange(len(lines) + 1), draw.choice(_HEADERS))
    version = draw.choice(("HTTP/1.1",) * 12 + ("HTTP/1.0", "HTTP/2.0", "HTTP/0.9", "http/1.1", ""))
    head = "\r\n".join((f"{method} {path} {version}", *lines, "", ""))
    whole = head.encode("utf-8", "surrogatepass") + body
    if draw.random() < 0.3 if mutated is None else mutated:
        whole = damaged(draw, whole, first=400)  # the head is short, and the more interesting part
    return whole


def _json(draw: random.Random) -> bytes:
    if draw.random() < 0.15:
        return draw.choice(_BODIES)
    values: dict[str, Any] = {"prompt": CANARY, "steps": 1}
    for _ in range(draw.choice((0, 1, 1, 2, 3))):
        name = draw.choice(list(_FIELDS))
        values[name] = draw.choice(_FIELDS[name])
    return json.dumps(values).encode()


def _form(draw: random.Random) -> tuple[str, bytes]:
    """The type of a form, and the form."""
    boundary = draw.choice((_BOUNDARY,) * 9 + (b"x" * 300, b"\xff", b'"'))
    parts = [_part("image", picture(draw), draw)] if draw.random() < 0.95 else []
    if draw.random() < 0.3:
        parts.append(_part("mask", picture(draw), draw))
    for _ in range(draw.choice((0, 1, 1, 2, 3, 60 if draw.random() < 0.1 else 2))):
        name = draw.choice(list(_FIELDS))
        parts.append(
            _part(
                name, str(draw.choice(_FIELDS[name])).encode("utf-8", "surrogatepass"), draw, file=draw.random() < 0.1
            )
        )
    draw.shuffle(parts)
    body = b"".join(b"--" + boundary + b"\r\n" + part + b"\r\n" for part in parts)
    body += draw.choice((b"--" + boundary + b"--\r\n",) * 9 + (b"", b"--", b"--" + boundary))
    charset = f"; charset={draw.choice(_CHARSETS)}" if draw.random() < 0.15 else ""
    return f"multipart/form-data; boundary={boundary.decode('latin-1')}{charset}", body


def _part(name: str, data: bytes, draw: random.Random, *, file: bool | None = None) -> bytes:
    is_file = name in ("image", "mask") if file is None else file
    called = draw.choice(("a.png", "../../../../tmp/out", "/etc/passwd", "a\0b", "", "x" * 3000, "C:\\x", "a\r\nX: y"))
    head = f'Content-Disposition: form-data; name="{name}"' + (f'; filename="{called}"' if is_file else "")
    if draw.random() < 0.1:
        head += "\r\n" + draw.choice(
            (
                "Content-Type: image/svg+xml",
                "Content-Transfer-Encoding: base64",
                "Content-Encoding: gzip",
                "X: " + "y" * 9000,
            )
        )
    return head.encode("utf-8", "surrogatepass") + b"\r\n\r\n" + data


def _chunks(draw: random.Random, body: bytes) -> bytes:
    size = draw.choice((1, 7, 1000, 1 << 20)) if len(body) < 20_000 else 1 << 16
    text = b"".join(
        b"%x\r\n%b\r\n" % (len(part), part) for part in (body[at : at + size] for at in range(0, len(body), size))
    )
    return text + draw.choice(
        (b"0\r\n\r\n",) * 6
        + (b"0\r\nX: y\r\n\r\n", b"", b"-1\r\n\r\n", b"ffffffffffffffff\r\n", b"0;" + b"x" * 9000 + b"\r\n\r\n")
    )


# ---------------------------------------------------------------------------------------------------- pictures


def png(width: int, height: int, data: bytes, *more: bytes, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG of what it claims to be, its compressed pixels and further chunks, whatever they are."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def written(form: str, mode: str = "RGB", **options: Any) -> bytes:
    """A small picture in a format, with a pattern in it."""
    out = io.BytesIO()
    Image.linear_gradient("L").resize((24, 16)).convert(mode).save(out, format=form, **options)
    return out.getvalue()


def _turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif.tobytes()


def _pictures() -> tuple[bytes, ...]:
    frames = [Image.new("RGB", (24, 16), colour) for colour in ("red", "green", "blue")]
    animated = {"save_all": True, "append_images": frames[1:]}
    out = [written("PNG", mode) for mode in ("RGB", "RGBA", "L", "LA", "P", "1", "I;16")]
    out += [written("JPEG", mode) for mode in ("RGB", "L", "CMYK")] + [
        written("JPEG", exif=_turned(way)) for way in (1, 6, 8, 99)
    ]
    out += [written("WEBP"), written("WEBP", "RGBA", lossless=True), written("GIF"), written("TIFF"), written("BMP")]
    for form in ("PNG", "WEBP", "GIF"):
        file = io.BytesIO()
        frames[0].save(file, format=form, **animated)
        out.append(file.getvalue())
    bomb = zlib.compress(bytes(3 * 4000 * 4000 + 4000), 9)
    out += [
        png(9000, 9000, b""),
        png(2**31 - 1, 2**31 - 1, b""),
        png(4000, 4000, bomb),
        png(1, 2**24, zlib.compress(bytes(100))),
    ]
    out.append(png(8, 8, zlib.compress(bytes(200)), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(8 << 20)))))
    out.append(png(8, 8, zlib.compress(bytes(200)), chunk(b"eXIf", b"II*\0" + b"\xff" * 60)))
    out += [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"GIF89a",
        b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"SIMPLE  =  T",
        b"%PDF-1.4",
    ]
    return tuple(out)


PICTURES = _pictures()


def picture(draw: random.Random) -> bytes:
    """A picture that is none, is another one than it says, or is one."""
    data = draw.choice(PICTURES)
    return damaged(draw, data) if data and draw.random() < 0.5 else data


# ---------------------------------------------------------------------------------------------------- answers

# An engine that fails would be 500; here none can, and nothing else may. 503 is that of connections beyond the limit.
_SERVER_ERRORS = {503}
_LEAKS = re.compile(rb"0x[0-9a-f]{6}|Traceback|site-packages|\.py\b|/root|/home|BytesIO|no request has this key")


@dataclass(frozen=True)
class Answer:
    """One answer: its status, its headers, and its body as far as it came."""

    status: int
    headers: bytes
    body: bytes


def exchange(port: int, sent: bytes, *, idle: float = _IDLE) -> list[Answer]:
    """What a server says to bytes until it closes the connection; after `idle` seconds of silence the client closes its side.

    Raises:
        TimeoutError: it does not close it.
    """
    with socket.create_connection(("127.0.0.1", port), timeout=_PATIENCE) as connection:
        received = bytearray()
        try:
            connection.sendall(sent)
            if not select.select([connection], [], [], idle)[0]:
                connection.shutdown(socket.SHUT_WR)
            while part := connection.recv(1 << 16):
                received += part
                if not select.select([connection], [], [], idle)[0]:
                    connection.shutdown(socket.SHUT_WR)
        except ConnectionError:  # it has closed without reading all: what it has said before that may be lost
            pass
        except OSError as error:
            if error.errno != errno.ENOTCONN:  # closed in the meantime
                raise
    return answers(bytes(received))


def answers(received: bytes) -> list[Answer]:
    """The answers in what a server said."""
    found = []
    while received:
        head, _, rest = received.partition(b"\r\n\r\n")
        status = re.match(rb"HTTP/1\.1 (\d{3}) ?[^\r\n]*", head)
        if status is None:
            raise ValueError(f"no answer begins with {received[:40]!r}")
        length = re.search(rb"\r\ncontent-length: (\d+)", head, re.IGNORECASE)
        size = int(length[1]) if length else len(rest)
        if rest.startswith(b"HTTP/1.1 "):  # that to HEAD had no body
            size = 0
        found.append(Answer(int(status[1]), head, rest[:size]))
        received = rest[size:]
    return found


def complaint(sent: bytes, answer: Answer, *, closed: bool) -> str | None:
    """What is wrong with an answer, or None.

    Args:
        sent: the request's bytes.
        answer: what came.
        closed: whether it is of the server that lets nobody in.
    """
    if answer.status >= 500 and answer.status not in _SERVER_ERRORS:
        return f"status {answer.status}"
    said = answer.headers + answer.body
    leak = _LEAKS.search(said) if b"b64_json" not in answer.body else None
    if leak is not None and leak[0] not in sent and not answer.body.startswith((b"<!doctype", b'{"openapi"')):
        return f"it says {leak[0]!r}"
    if CANARY.encode() in said:
        return "it repeats the prompt"
    # uvicorn's own, of what is no HTTP; to HEAD it has no body.
    plain = answer.status == 400 and b"text/plain" in answer.headers
    if answer.status >= 400 and not plain and answer.body and not _is_envelope(answer.body):
        return "an error in another form"
    if answer.status >= 400 and not plain and b"x-request-id" not in answer.headers.lower():
        return "no request id"
    if closed and answer.status < 400 and not answer.body.startswith((b"<!doctype", b'{"status":')) and answer.body:
        return "it answered without a key"
    return None


def _is_envelope(body: bytes) -> bool:
    try:
        data = json.loads(body)
    except ValueError:
        return False
    return isinstance(data, dict) and (
        (data.keys() == {"error"} and data["error"].keys() == {"message", "type", "param", "code"})
        or data.keys() in ({"status"}, {"name", "ready"})
    )
