"""Models, health and metrics say what is."""

from __future__ import annotations

import re

import pytest

from ldmrt.serving.engine import State

from .conftest import Served, refused


def test_models(served: Served) -> None:
    (model,) = served.client.get("/v1/models").json()["data"]
    assert model == served.client.get("/v1/models/shapes").json()
    assert (model["id"], model["object"], model["sizes"], model["image"]) == (
        "shapes",
        "model",
        ["128x128"],
        "optional",
    )
    assert model["defaults"] == {"steps": 20, "guidance_scale": 5.0, "sampler": "ddim", "width": 128, "height": 128}
    assert refused(served.client.get("/v1/models/other"), 404, "model")["code"] == "model_not_found"


@pytest.mark.parametrize(
    ("state", "draining", "live", "ready", "word"),
    [
        (State.READY, False, 200, 200, "ready"),
        (State.READY, True, 200, 503, "draining"),
        (State.LOADING, False, 200, 503, "loading"),
        (State.DOWN, False, 200, 503, "down"),
        (State.DOWN, True, 200, 503, "draining"),
        (State.BROKEN, False, 503, 503, "broken"),
        (State.CLOSED, True, 200, 503, "draining"),
    ],
)
def test_health(
    served: Served, state: State, draining: bool, live: int, ready: int, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served.batcher, "_state", state)
    served.house.draining = draining
    for prefix in ("/health", "/v2/health"):
        assert served.client.get(f"{prefix}/live").status_code == live
        answer = served.client.get(f"{prefix}/ready")
        assert (answer.status_code, answer.json()) == (ready, {"status": word})
    assert served.client.get("/v2/models/shapes/ready").status_code == ready


def test_the_batcher_tells_its_state(served: Served) -> None:
    states = [served.batcher.state]
    served.batcher.close()
    assert [*states, served.batcher.state] == [State.READY, State.CLOSED]
    assert refused(served.generate(), 503)["code"] == "engine_unavailable"


def test_kserve(served: Served) -> None:
    assert served.client.get("/v2").json()["name"] == "ldmrt"
    assert served.client.get("/v2/models/shapes").json()["name"] == "shapes"
    assert served.client.get("/v2/models/shapes/ready").json() == {"name": "shapes", "ready": True}
    refused(served.client.get("/v2/models/other"), 404, "model")
    refused(served.client.get("/v2/models/other/ready"), 404, "model")


def value(text: str, name: str) -> float:
    found = re.findall(rf"^{re.escape(name)} ([0-9.e+-]+)$", text, re.MULTILINE)
    assert len(found) == 1, (name, found)
    return float(found[0])


def test_metrics(served: Served) -> None:
    served.generate(n=2, steps=3)
    served.generate(steps=0)
    served.client.get("/no/such/path/canary")
    text = served.client.get("/metrics").text
    stats = served.batcher.stats()
    route = "/v1/images/generations"
    assert value(text, f'ldmrt_http_requests_total{{code="200",method="POST",route="{route}"}}') == 1
    assert value(text, f'ldmrt_http_requests_total{{code="400",method="POST",route="{route}"}}') == 1
    assert value(text, 'ldmrt_http_requests_total{code="404",method="GET",route="none"}') == 1
    assert value(text, 'ldmrt_images_total{size="128x128"}') == 2
    assert value(text, "ldmrt_image_steps_total") == stats.evaluations == 6
    assert value(text, 'ldmrt_requests_total{end="served"}') == 1
    assert value(text, "ldmrt_engine_ready") == 1
    assert value(text, "ldmrt_queue_duration_seconds_count") == 1
    assert "canary" not in text


def test_openapi_describes_both_bodies(served: Served) -> None:
    described = served.client.get("/openapi.json").json()
    paths = described["paths"]
    assert {
        "/v1/images/generations",
        "/v1/images/edits",
        "/v1/models",
        "/health/live",
        "/v2/health/ready",
        "/metrics",
    } <= set(paths)
    schema = described["components"]["schemas"]["Generation"]["properties"]
    assert {"prompt", "n", "size", "negative_prompt", "steps", "guidance_scale", "seed", "sampler"} <= set(schema)
    (form,) = paths["/v1/images/edits"]["post"]["requestBody"]["content"].values()
    assert {"image", "mask", "prompt", "strength"} <= set(form["schema"]["properties"])
