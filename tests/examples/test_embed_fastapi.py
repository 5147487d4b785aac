"""The example of an application with pictures, served as a user would serve it."""

from __future__ import annotations

import io
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "embed_fastapi.py"


@pytest.fixture(scope="module")
def client() -> Iterator[TestClient]:
    app = runpy.run_path(str(SCRIPT))["app"]
    with TestClient(app, base_url="http://localhost") as one:
        yield one


def test_a_route_of_its_own_draws(client: TestClient) -> None:
    answer = client.get("/draw", params={"prompt": "a red circle on a white background", "steps": 2, "seed": 7})
    assert (answer.status_code, answer.headers["x-seed"]) == (200, "7")
    with Image.open(io.BytesIO(answer.content)) as picture:
        assert (picture.format, picture.size) == ("PNG", (128, 128))


def test_what_cannot_be_drawn_is_400(client: TestClient) -> None:
    answer = client.get("/draw", params={"prompt": "a", "seed": -1})
    assert answer.status_code == 400
    assert "seed is -1" in answer.json()["detail"]


def test_the_mounted_server_answers_beside_it(client: TestClient) -> None:
    assert client.get("/ldmrt/v1/models").json()["data"][0]["id"] == "shapes"
    assert client.get("/ldmrt/health/ready").status_code == 200
    body = {"prompt": "a blue square", "steps": 2}
    assert client.post("/ldmrt/v1/images/generations", json=body).status_code == 200
    assert client.get("/ldmrt/").headers["content-type"].startswith("text/html")
