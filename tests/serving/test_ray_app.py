"""The Ray Serve application, on a cluster of two nodes that is made here, as a config file deploys it."""

from __future__ import annotations

import base64
import io
import itertools
import os
import random
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
import yaml
from PIL import Image
from starlette.responses import Response
from starlette.testclient import TestClient

from ldmrt.opening import builtin_bundle
from ldmrt.pipeline import Pipeline
from ldmrt.serving.engine import State

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "a red circle on a white background"
STEPS = 6
SEEDS = range(4)
PATIENCE = 300.0
KEY = "k" * 24
SMALL = {"max_waiting": 2}
# Of this machine alone, too; for 127.0.0.1 Ray takes an address that others reach.
LOCAL = "127.0.0.2"

pytestmark = pytest.mark.ray


@pytest.fixture(scope="session")
def pictures() -> dict[int, np.ndarray[Any, Any]]:
    """What each seed draws: the pipeline's own, in this process."""
    pipe = Pipeline.from_bundle(device="cpu")
    drawn = {seed: pipe(PROMPT, num_inference_steps=STEPS, seed=seed).images[0] for seed in SEEDS}
    return {seed: np.asarray(image, dtype=np.int16) for seed, image in drawn.items()}


def assert_same(made: str | None, picture: np.ndarray[Any, Any]) -> None:
    """A replica sums in another order, on other threads and in other batches: a level of 255, and a second one where that is rounded."""
    with Image.open(io.BytesIO(base64.b64decode(made or ""))) as image:
        assert np.abs(np.asarray(image, dtype=np.int16) - picture).max() <= 2


@dataclass
class Fleet:
    """A cluster, and the application on it.

    Attributes:
        cluster: a `ray.cluster_utils.Cluster`.
        port: of HTTP.
        nodes: those that are not its head.
        given: what the application was deployed with.
    """

    cluster: Any
    port: int
    nodes: list[Any] = field(default_factory=list)
    given: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, retries: int = 0) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=retries, timeout=PATIENCE)

    def post(self, **fields: Any) -> httpx2.Response:
        body = {"prompt": PROMPT, "steps": STEPS, **fields}
        headers = {"authorization": f"Bearer {KEY}"}
        return httpx2.post(f"{self.url}/v1/images/generations", json=body, headers=headers, timeout=PATIENCE)

    def metrics(self) -> str:
        return httpx2.get(f"{self.url}/metrics", headers={"authorization": f"Bearer {KEY}"}, timeout=PATIENCE).text

    def deploy(self, args: dict[str, Any], *, wait: bool = True, **options: Any) -> None:
        """As `serve deploy` does with a config file."""
        from ray.serve.context import _get_global_client
        from ray.serve.schema import ServeDeploySchema

        replica = {"name": "Replica", "ray_actor_options": {"num_cpus": 1}, "health_check_period_s": 1, **options}
        app = {"name": "ldmrt", "import_path": "ldmrt.serving.ray_app:build", "args": args, "deployments": [replica]}
        _get_global_client().deploy_apps(ServeDeploySchema.model_validate({"applications": [app]}))
        if wait:
            self.until(lambda: self.status() == "RUNNING")

    def status(self) -> str:
        from ray import serve

        found = serve.status().applications.get("ldmrt")
        return "none" if found is None else str(found.status.value)

    def running(self) -> int:
        """Replicas that serve."""
        from ray import serve

        deployment = serve.status().applications["ldmrt"].deployments["Replica"]
        return int(deployment.replica_states.get("RUNNING", 0))

    def replicas(self) -> dict[int, str]:
        """The processes of replicas that are alive, and the nodes on which they are."""
        from ray._private import state

        return {
            actor["Pid"]: actor["Address"]["NodeID"]
            for actor in state.actors().values()
            if actor["State"] == "ALIVE" and "Replica:" in actor["ActorClassName"]
        }

    def engines(self) -> list[int]:
        """The processes of their engines."""
        return [child for pid in self.replicas() for child in children(pid)]

    def until(self, condition: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, self.status()
            time.sleep(0.1)

    def delete(self) -> None:
        from ray import serve

        serve.delete("ldmrt")
        self.until(lambda: self.status() == "none" and not self.replicas())


def children(pid: int) -> list[int]:
    """The engines' processes that another one has started."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            command = status.with_name("cmdline").read_bytes()
        except (OSError, IndexError):  # it has ended meanwhile
            continue
        if parent == pid and b"ldmrt.serving.child" in command:
            found.append(int(status.parent.name))
    return found


def free_port() -> int:
    """Not one of those that the system gives to whoever asks for any, as Ray's processes do."""
    for port in random.sample(range(20_000, 30_000), 100):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port is free")


@pytest.fixture(scope="module")
def fleet() -> Iterator[Fleet]:
    """Two nodes of one CPU each. All that Ray writes is in a folder that is removed; it listens to this machine and reports nothing."""
    pytest.importorskip("ray.serve")
    folder = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))  # sockets lie in it, whose paths may have 107 characters
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", str(folder))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("LDMRT_API_KEYS", KEY)
        patch.setenv(
            "RAY_worker_niceness", "0"
        )  # where others have the processors too, replicas would hardly get to run
        import ray
        from ray import serve
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "node_ip_address": LOCAL, "include_log_monitor": False}
        cluster = Cluster()
        try:
            cluster.add_node(**node, no_monitor=True, include_dashboard=False)
            made = Fleet(cluster, free_port(), [cluster.add_node(**node)])
            ray.init(address=cluster.address, log_to_driver=False, logging_level="error")
            serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": made.port})
            yield made
            serve.shutdown()
        finally:
            ray.shutdown()
            cluster.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def deployed(fleet: Fleet) -> Callable[..., Fleet]:
    """Deploy the application, unless it is there as it was deployed at first."""

    def deploy(args: dict[str, Any], **options: Any) -> Fleet:
        if fleet.status() != "RUNNING" or fleet.given != (args, options):
            if fleet.status() != "none":
                fleet.delete()
            fleet.deploy(args, **options)
            fleet.given = args, options
        return fleet

    return deploy


# ---------------------------------------------------------------------------------------------------- without a cluster


def test_the_config_file_is_one_of_ours() -> None:
    schema = pytest.importorskip("ray.serve.schema")
    from ldmrt.serving.ray_app import Arguments, build

    given = yaml.safe_load((ROOT / "docs" / "deploy" / "ray" / "serve.yaml").read_text(encoding="utf-8"))
    (app,) = schema.ServeDeploySchema.model_validate(given).applications
    assert app.import_path == f"{build.__module__}:{build.__name__}"
    arguments = Arguments.model_validate(app.args)
    (replica,) = app.deployments
    assert replica.name == "Replica"
    # What was accepted has its whole time, and the answer some more.
    assert replica.graceful_shutdown_timeout_s == arguments.timeout + 15
    with pytest.raises(ValueError, match="max_wating"):
        Arguments.model_validate({"max_wating": 3})


@pytest.mark.parametrize(
    ("state", "away", "healthy"),
    [("ready", 0, True), ("loading", 10, True), ("loading", 400, False), ("broken", 0, False), ("closed", 0, False)],
)
def test_health_is_the_engine_s(state: str, away: float, healthy: bool) -> None:
    pytest.importorskip("ray.serve")
    from ldmrt.serving.ray_app import Arguments, Replica

    replica: Any = Replica.__new__(Replica)
    replica._arguments, replica._engine = Arguments(), SimpleNamespace(state=State(state), close=lambda drain: None)
    replica._ready = time.monotonic() - away
    if healthy:
        replica.check_health()
    else:
        with pytest.raises(RuntimeError, match=f"the engine is {state}"):
            replica.check_health()


@pytest.mark.parametrize(
    ("client", "keys", "status"),
    [
        ("127.0.0.1", False, 200),
        ("::1", False, 200),
        ("::1:7", False, 403),
        ("10.0.0.7", False, 403),
        ("10.0.0.7", True, 200),
    ],
)
def test_without_keys_other_machines_are_turned_away(client: str, keys: bool, status: int) -> None:
    """Whatever they say whom they mean: the proxies may listen to all."""
    pytest.importorskip("ray.serve")
    from ldmrt.serving.ray_app import _BehindProxy

    async def inner(scope: Any, receive: Any, send: Any) -> None:
        await Response("here", headers={"x-request-id": "mine"})(scope, receive, send)

    app = _BehindProxy(inner, open_to_all=keys)
    answer = TestClient(app, base_url="http://localhost", client=(client, 1)).get("/")
    assert answer.status_code == status
    assert "x-request-id" not in answer.headers


# ---------------------------------------------------------------------------------------------------- quick


def test_a_picture_is_the_pipeline_s(deployed: Callable[..., Fleet], pictures: dict[int, np.ndarray[Any, Any]]) -> None:
    fleet = deployed(SMALL)
    with fleet.client() as client:
        for seed, picture in pictures.items():
            made = client.images.generate(prompt=PROMPT, extra_body={"steps": STEPS, "seed": seed})
            assert made.data is not None
            assert_same(made.data[0].b64_json, picture)
        assert [one.id for one in client.models.list()] == ["shapes"]
        with pytest.raises(openai.BadRequestError, match="steps"):
            client.images.generate(prompt=PROMPT, extra_body={"steps": 1000})
        stream = client.images.generate(prompt=PROMPT, stream=True, partial_images=1, extra_body={"steps": STEPS})
        assert [event.type.rpartition(".")[2] for event in stream] == ["partial_image", "completed"]
    answer = httpx2.get(f"{fleet.url}/v1/models", headers={"x-request-id": "mine"})
    assert answer.status_code == 401
    assert answer.headers.get_list("x-request-id") == ["mine"]


def test_backpressure_is_the_replica_s_own(deployed: Callable[..., Fleet]) -> None:
    """One more than may run and wait is refused, at once, in the form of `ldmrt serve`; what was accepted is served."""
    fleet = deployed(SMALL)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda _: fleet.post(steps=30), range(12)))
    served = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert 2 < len(served) < 12
    for answer in refused:
        assert answer.status_code == 429, answer.text
        assert answer.json()["error"]["code"] == "rate_limit_exceeded"
        assert int(answer.headers["retry-after"]) >= 1
        assert answer.elapsed < min(one.elapsed for one in served)


def test_an_engine_that_dies_is_503_and_comes_back_within_its_replica(deployed: Callable[..., Fleet]) -> None:
    fleet = deployed(SMALL)
    (engine,), before = fleet.engines(), fleet.replicas()
    with ThreadPoolExecutor(1) as pool:
        lost = pool.submit(fleet.post, steps=150)
        fleet.until(lambda: "ldmrt_requests_present 1.0" in fleet.metrics())
        os.kill(engine, signal.SIGKILL)
        assert lost.result().status_code == 503
    assert fleet.post().status_code == 200
    assert fleet.replicas() == before
    assert fleet.engines() != [engine]


def test_the_end_finishes_what_was_accepted(deployed: Callable[..., Fleet]) -> None:
    fleet = deployed(SMALL)
    (engine,) = fleet.engines()
    with ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(fleet.post, steps=100)
        fleet.until(lambda: "ldmrt_requests_present 1.0" in fleet.metrics())
        fleet.delete()
        assert accepted.result().status_code == 200
    fleet.until(lambda: not Path(f"/proc/{engine}").exists())


# ---------------------------------------------------------------------------------------------------- under load


@dataclass
class Load:
    """Clients that ask again and again, and try again as OpenAI's client does.

    Attributes:
        fleet: whom they ask.
        pictures: what each seed should draw.
        served: answers that were right.
        errors: what went wrong for a client after all its tries.
    """

    fleet: Fleet
    pictures: dict[int, np.ndarray[Any, Any]]
    served: int = 0
    errors: list[BaseException] = field(default_factory=list)
    over: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self) -> None:
        with self.fleet.client(retries=30) as client:
            for seed in itertools.cycle(SEEDS):
                if self.over.is_set():
                    return
                try:
                    made = client.images.generate(prompt=PROMPT, extra_body={"steps": STEPS, "seed": seed})
                    assert made.data is not None
                    assert_same(made.data[0].b64_json, self.pictures[seed])
                except Exception as error:  # noqa: BLE001 - all of them are told at the end
                    self.errors.append(error)
                    return
                with self.lock:
                    self.served += 1

    def more(self, count: int) -> None:
        """Wait until as many more were served."""
        goal = self.served + count
        self.fleet.until(lambda: self.served >= goal or bool(self.errors))
        assert not self.errors


@contextmanager
def load(fleet: Fleet, pictures: dict[int, np.ndarray[Any, Any]], clients: int) -> Iterator[Load]:
    one = Load(fleet, pictures)
    threads = [threading.Thread(target=one.run) for _ in range(clients)]
    for thread in threads:
        thread.start()
    try:
        one.more(clients)
        yield one
        one.more(clients)
    finally:
        one.over.set()
        for thread in threads:
            thread.join(PATIENCE)
    assert not one.errors


@pytest.mark.slow
def test_a_replica_that_is_killed(deployed: Callable[..., Fleet], pictures: dict[int, np.ndarray[Any, Any]]) -> None:
    fleet = deployed({}, num_replicas=2)
    before = fleet.replicas()
    assert len(set(before.values())) == 2  # one on each node
    with load(fleet, pictures, 6) as clients:
        lost = next(iter(before))
        orphan = children(lost)
        os.kill(lost, signal.SIGKILL)
        clients.more(20)
        fleet.until(lambda: lost not in fleet.replicas() and len(fleet.replicas()) == 2 and fleet.running() == 2)
        clients.more(20)
    assert not any(Path(f"/proc/{pid}").exists() for pid in orphan)


@pytest.mark.slow
def test_a_node_that_is_killed_and_another_that_comes(
    deployed: Callable[..., Fleet], pictures: dict[int, np.ndarray[Any, Any]]
) -> None:
    fleet = deployed({}, num_replicas=2)
    (node,) = fleet.nodes
    with load(fleet, pictures, 6) as clients:
        fleet.cluster.remove_node(node, allow_graceful=False)
        clients.more(20)
        fleet.until(lambda: fleet.running() == 1)
        fleet.nodes[:] = [fleet.cluster.add_node(num_cpus=1, node_ip_address=LOCAL)]
        fleet.until(lambda: fleet.running() == 2)
        clients.more(20)
    assert len(set(fleet.replicas().values())) == 2


@pytest.mark.slow
def test_replicas_come_with_requests_and_go_without(
    deployed: Callable[..., Fleet], pictures: dict[int, np.ndarray[Any, Any]]
) -> None:
    """Autoscaling by requests that wait and run, on to the second node and back, each under load."""
    scaling = {"min_replicas": 1, "max_replicas": 2, "target_ongoing_requests": 2, "upscale_delay_s": 2}
    scaling |= {"downscale_delay_s": 4, "look_back_period_s": 12}
    fleet = deployed({}, autoscaling_config=scaling)
    assert fleet.running() == 1
    with load(fleet, pictures, 8) as many:
        fleet.until(lambda: fleet.running() == 2)
        assert len(set(fleet.replicas().values())) == 2
        many.more(20)
    with load(fleet, pictures, 1) as few:
        fleet.until(lambda: fleet.running() == 1 and len(fleet.replicas()) == 1)
        few.more(3)
    fleet.until(lambda: len(fleet.engines()) == 1)


@pytest.mark.slow
def test_another_bundle_by_config_and_back_from_one_that_cannot_start(
    deployed: Callable[..., Fleet], pictures: dict[int, np.ndarray[Any, Any]], tmp_path: Path
) -> None:
    second = shutil.copytree(builtin_bundle(), tmp_path / "second")
    fleet = deployed({}, num_replicas=2)

    def models() -> set[str]:
        with fleet.client(retries=30) as client:
            return {one.id for _ in range(8) for one in client.models.list()}

    with load(fleet, pictures, 6) as clients:
        fleet.deploy({"engines": str(second), "served_model_name": "second"}, num_replicas=2, wait=False)
        fleet.until(lambda: models() == {"second"} and fleet.running() == 2)
        clients.more(20)
        fleet.deploy({"engines": str(tmp_path / "nowhere")}, num_replicas=2, wait=False)
        fleet.until(lambda: fleet.status() == "DEPLOY_FAILED")
        assert fleet.running() == 1  # the other was stopped to make room
        assert models() == {"second"}
        fleet.deploy({}, num_replicas=2)
        fleet.until(lambda: models() == {"shapes"} and fleet.running() == 2)
        clients.more(20)
