"""What is said of requests: their ids to clients, and to the log nothing that clients sent."""

from __future__ import annotations

import json
import logging

import pytest

from ldmrt.serving.logs import FIELDS, JsonFormatter

from .conftest import Served

CANARY = "canary-prompt"


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [json.loads(JsonFormatter().format(record)) for record in caplog.records if hasattr(record, FIELDS)]


def test_a_client_s_id_comes_back(served: Served) -> None:
    answer = served.client.get("/v1/models", headers={"x-request-id": "trace-1.A_b"})
    assert answer.headers["x-request-id"] == "trace-1.A_b"


@pytest.mark.parametrize("given", ["", "a b", "x" * 65, '"}', "é"])
def test_what_is_no_id_is_replaced(served: Served, given: str) -> None:
    found = served.client.get("/nowhere", headers={b"x-request-id": given.encode()}).headers["x-request-id"]
    assert found.startswith("req_")
    assert found != served.client.get("/nowhere").headers["x-request-id"]


def test_a_line_for_each_request_without_prompts(served: Served, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    served.generate(prompt=CANARY, negative_prompt=CANARY, user=CANARY, n=2)
    served.generate(prompt=CANARY, sampler=CANARY)
    served.client.get(f"/{CANARY}?{CANARY}")
    served.generate(prompt=CANARY, guidance_scale=3e38)
    served.until(lambda: len([line for line in lines(caplog) if line["message"] == "request"]) == 4)
    told = [line for line in lines(caplog) if line["message"] == "request"]
    assert [line["status"] for line in told] == [200, 400, 404, 500]
    assert told[0]["images"] == 2
    assert told[0]["prompt_characters"] == len(CANARY)
    assert {"request_id", "route", "seconds", "wait", "run", "size", "steps"} <= set(told[0])
    assert told[3]["end"] == "numerical_error"
    assert CANARY not in "".join(map(json.dumps, lines(caplog)))


def test_an_error_of_ours_is_told_by_its_type_alone(
    served: Served, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError(CANARY)

    monkeypatch.setattr(served.house, "check_open", fail)
    answer = served.generate()
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    served.until(lambda: any("error" in line for line in lines(caplog)))
    (line,) = [line for line in lines(caplog) if "error" in line]
    assert line["request_id"] == answer.headers["x-request-id"]
    assert "RuntimeError at " in str(line["error"])
    assert CANARY not in answer.text + json.dumps(line)
