"""Hostile requests, some of them here and as many as are wanted by `benchmarks/fuzz.py http`; and that what is wrong would be seen."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import positive_data_acceptance

import fuzz_http
from fuzz_http import CANARY, Answer, complaint
from ldmrt.pipeline import Pipeline

READY = b"GET /health/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"


@pytest.fixture(scope="module")
def ports() -> Iterator[list[int]]:
    """Of the server that lets everybody in, and the one that lets nobody in."""
    with fuzz_http.listening(*fuzz_http.apps(Pipeline.from_bundle(device="cpu"))) as found:
        yield found


def test_whatever_is_sent_nothing_breaks(ports: list[int], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    statuses = set()
    for seed in range(700):
        sent = fuzz_http.request(seed)
        for answer in fuzz_http.exchange(ports[seed % 5 == 0], sent, idle=0.02):
            statuses.add(answer.status)
            assert complaint(sent, answer, closed=seed % 5 == 0) is None, (seed, sent[:500], answer)
    assert {200, 400, 401, 404, 405} <= statuses
    for port in ports:
        (ready,) = fuzz_http.exchange(port, READY, idle=10)
        assert ready.status == 200
    said = "".join(str(vars(record)) for record in caplog.records)
    assert "request" in said
    assert CANARY not in said


def test_a_request_is_made_again_by_its_number() -> None:
    assert fuzz_http.request(3) == fuzz_http.request(3)
    assert len({fuzz_http.request(seed) for seed in range(50)}) > 45


@pytest.mark.parametrize(
    ("status", "body", "closed", "word"),
    [
        (500, b'{"error": {"message": "m", "type": "t", "param": null, "code": "c"}}', False, "status 500"),
        (502, b"", False, "status 502"),
        (400, b"at 0x7f5e001122", False, "0x7f5e00"),
        (400, b"Traceback (most recent call last)", False, "Traceback"),
        (400, CANARY.encode(), False, "prompt"),
        (404, b'{"detail": "Not Found"}', False, "another form"),
        (200, b'{"data": []}', True, "without a key"),
    ],
)
def test_what_is_wrong_with_an_answer_is_seen(status: int, body: bytes, closed: bool, word: str) -> None:
    found = complaint(b"", Answer(status, b"HTTP/1.1\r\nx-request-id: a", body), closed=closed)
    assert found is not None
    assert word in found


def test_answers_are_told_apart() -> None:
    head, more = b"HTTP/1.1 404 Not Found\r\ncontent-length: 9", b"HTTP/1.1 400 Bad Request\r\nconnection: close"
    both = head + b"\r\n\r\n" + more + b"\r\n\r\nbody"  # to HEAD, which has no body, and to what is none
    assert fuzz_http.answers(both) == [Answer(404, head, b""), Answer(400, more, b"body")]
    assert fuzz_http.answers(head + b"\r\n\r\ncut") == [Answer(404, head, b"cut")]
    with pytest.raises(ValueError, match="no answer begins with"):
        fuzz_http.answers(b"nonsense")


def test_an_answer_without_an_id_is_seen() -> None:
    body = b'{"error": {"message": "m", "type": "t", "param": null, "code": "c"}}'
    assert complaint(b"", Answer(400, b"HTTP/1.1", body), closed=False) == "no request id"
    assert complaint(b"", Answer(400, b"HTTP/1.1\r\nx-request-id: a", body), closed=False) is None


# ---------------------------------------------------------------------------------------------------- by the schema


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_requests_made_of_the_document_get_the_answers_that_it_promises(ports: list[int], mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(f"http://127.0.0.1:{ports[0]}/openapi.json")
    tried = []
    for found in schema.get_all_operations():
        assert isinstance(found, Ok)
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and not operation.body:
            continue

        @settings(
            max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def attempt(case: schemathesis.Case[Any]) -> None:
            # What the document allows may be refused by the model's sizes, or the limits.
            case.call_and_validate(excluded_checks=[positive_data_acceptance])

        attempt()
        tried.append(operation.path)
    assert {"/v1/images/generations", "/v1/images/edits"} <= set(tried)
    assert len(tried) == (12 if mode is GenerationMode.POSITIVE else 2)
