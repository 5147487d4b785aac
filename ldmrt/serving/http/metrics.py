"""What Prometheus reads: requests by route and status, pictures by size, and the engine's own counts."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

import ldmrt
from ldmrt.pipeline import Result
from ldmrt.serving.engine import Engine, State

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)


class Metrics:
    """The metrics of a server. Labels are routes, statuses and sizes: nothing that a client made up.

    Args:
        engine: what makes the pictures.
    """

    def __init__(self, engine: Engine) -> None:
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "ldmrt_http_requests_total", "Requests answered.", ["route", "method", "code"], registry=registry
        )
        self._duration = Histogram(
            "ldmrt_http_request_duration_seconds",
            "From a request to the end of its answer.",
            ["route"],
            registry=registry,
            buckets=_SECONDS,
        )
        self._images = Counter("ldmrt_images_total", "Pictures made.", ["size"], registry=registry)
        self._wait = Histogram(
            "ldmrt_queue_duration_seconds", "From a request to its first step.", registry=registry, buckets=_SECONDS
        )
        self._run = Histogram(
            "ldmrt_run_duration_seconds",
            "From the first step to the last picture.",
            registry=registry,
            buckets=_SECONDS,
        )
        registry.register(_OfEngine(engine))

    def answered(self, route: str, method: str, code: int, seconds: float) -> None:
        """A request has got its answer."""
        self._requests.labels(route, method, code).inc()
        self._duration.labels(route).observe(seconds)

    def made(self, result: Result) -> None:
        """Pictures were made."""
        job = result.job
        self._images.labels(f"{job.width}x{job.height}").inc(job.num_images)
        self._wait.observe(result.timings["wait"])
        self._run.observe(result.timings["run"])

    def text(self) -> bytes:
        """All of them, in Prometheus's text format."""
        text: bytes = generate_latest(self._registry)
        return text


class _OfEngine(Collector):
    """What an engine counts itself, read when it is asked for."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """One family after the other."""
        stats, state = self._engine.stats(), self._engine.state
        build = GaugeMetricFamily("ldmrt_build_info", "The version.", labels=["version"])
        build.add_metric([ldmrt.__version__], 1)
        yield build
        yield GaugeMetricFamily("ldmrt_engine_ready", "Whether the engine is ready.", state is State.READY)
        yield CounterMetricFamily("ldmrt_engine_restarts", "Times that it was started again.", self._engine.restarts)
        yield GaugeMetricFamily("ldmrt_images_waiting", "Images that wait.", stats.waiting)
        yield GaugeMetricFamily("ldmrt_images_running", "Images in batches.", stats.running)
        yield CounterMetricFamily("ldmrt_requests_received", "Requests that came to the engine.", stats.received)
        ends = CounterMetricFamily("ldmrt_requests", "Requests of the engine, by their end.", labels=["end"])
        for end in ("served", "failed", "rejected", "cancelled"):
            ends.add_metric([end], getattr(stats, end))
        yield ends
        yield GaugeMetricFamily("ldmrt_requests_present", "Requests that wait or run.", stats.present)
        yield CounterMetricFamily("ldmrt_steps", "Evaluations of the model, of a whole batch each.", stats.steps)
        yield CounterMetricFamily("ldmrt_image_steps", "The same, counted by image.", stats.evaluations)
        yield CounterMetricFamily("ldmrt_model_seconds", "Seconds in the model.", stats.model_seconds)
        yield CounterMetricFamily("ldmrt_own_seconds", "Seconds in the batcher's own code.", stats.own_seconds)
