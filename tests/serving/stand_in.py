"""Stands in for `ldmrt.serving.child`, in a process that starts at once: it speaks the same messages, and fails as it is told.

    python stand_in.py FOLDER SOCKET PARENT

In FOLDER lies `facts.json`, which it gives when it is ready, and perhaps `mood`, in which it starts: `refuse` says why it does not start,
`die` ends, `hang` says nothing. The prompts `die` and `hang` do the same in a step, `nan` ends with an error. A picture of seed s has the one
colour (s % 256, steps % 256, 7). It imports nothing of ldmrt, for that would import torch.
"""

from __future__ import annotations

import json
import os
import select
import socket
import struct
import sys
import time
from pathlib import Path
from typing import Any

STEP_SECONDS = 0.005
IMAGES = 4  # of a batch, without guidance
SIZE = (128, 128)
LATENTS = (4, 16, 16)


def colour(seed: int, steps: int) -> bytes:
    return bytes((seed % 256, steps % 256, 7))


def send(connection: socket.socket, *blobs: bytes, **header: Any) -> None:
    text = json.dumps(header).encode()
    parts = [struct.pack("!IB", len(text), len(blobs)), text]
    for blob in blobs:
        parts += [struct.pack("!Q", len(blob)), blob]
    connection.sendall(b"".join(parts))


def receive(connection: socket.socket) -> dict[str, Any]:
    def exactly(size: int) -> bytes:
        data = connection.recv(size, socket.MSG_WAITALL)
        if len(data) < size:
            sys.exit()
        return data

    size, blobs = struct.unpack("!IB", exactly(5))
    header: dict[str, Any] = json.loads(exactly(size))
    for _ in range(blobs):
        exactly(*struct.unpack("!Q", exactly(8)))
    return header


def fail(how: str) -> None:
    if how == "die":
        os._exit(3)
    if how == "hang":
        time.sleep(1000)


def step(connection: socket.socket, image: dict[str, Any]) -> bool:
    """One step of an image; whether it was the last."""
    number, request = image["id"], image["request"]
    fail(request["prompt"])
    image["made"] = image.get("made", 0) + 1
    steps = request["num_inference_steps"]
    work = {"steps": 1, "evaluations": 1, "model_seconds": STEP_SECONDS, "own_seconds": 0.0}
    if request["prompt"] == "nan":
        send(connection, kind="error", id=number, type="NumericalError", message="nan", param=None)
        return True
    send(connection, kind="step", id=number, step=image["made"] - 1, steps=steps, preview=None, work=work)
    if image["made"] < steps:
        return False
    pixels = colour(request["seed"], steps) * (SIZE[0] * SIZE[1])
    latents = bytes(4 * LATENTS[0] * LATENTS[1] * LATENTS[2])
    send(connection, pixels, latents, kind="done", id=number, size=SIZE, latents=LATENTS)
    return True


def main() -> None:
    folder, connection = Path(sys.argv[1]), socket.socket(fileno=int(sys.argv[2]))
    receive(connection)
    mood = (folder / "mood").read_text(encoding="utf-8") if (folder / "mood").exists() else ""
    fail(mood)
    if mood == "refuse":
        send(connection, kind="error", type="BundleError", message="there is nothing", param=None)
        return
    facts = json.loads((folder / "facts.json").read_text(encoding="utf-8"))
    send(connection, kind="ready", facts=facts, rows=[[*SIZE, IMAGES]])
    images: list[dict[str, Any]] = []
    while True:
        while select.select([connection], [], [], STEP_SECONDS if images else None)[0]:
            message = receive(connection)
            if message["kind"] == "submit":
                images.append(message)
                continue
            for image in [one for one in images if one["id"] == message["id"]]:
                images.remove(image)
                send(connection, kind="error", id=image["id"], type="Cancelled", message="withdrawn", param=None)
        images[:IMAGES] = [image for image in images[:IMAGES] if not step(connection, image)]


if __name__ == "__main__":
    main()
