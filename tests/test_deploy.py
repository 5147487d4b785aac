"""docs/deploy held against the server: what the files name is there, and their times add up."""

from __future__ import annotations

import inspect
import json
import re
import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from ldmrt.cli import app as command_line
from ldmrt.serving import EngineProcess, Stats
from ldmrt.serving.engine import State
from ldmrt.serving.http import create_app, server
from ldmrt.serving.http.keys import OPEN
from ldmrt.serving.http.metrics import Metrics

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "docs" / "deploy"
README = (DEPLOY / "README.md").read_text(encoding="utf-8")
DOCKERFILE = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
MANIFESTS = sorted(path for path in (DEPLOY / "kubernetes" / "cpu").glob("*.yaml") if path.stem != "kustomization")
ENGINE: Any = SimpleNamespace(state=State.READY, restarts=0, stats=Stats)


def load(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    found: dict[str, Any] = load(DEPLOY / "kubernetes" / "cpu" / "deployment.yaml")["spec"]["template"]["spec"]
    return found


@pytest.fixture(scope="module")
def container(pod: dict[str, Any]) -> dict[str, Any]:
    (found,) = pod["containers"]
    return dict(found)


def options(args: list[str]) -> dict[str, Any]:
    """What `ldmrt serve` understands of its arguments."""
    name, *rest = args
    assert name == "serve"
    group = typer.main.get_command(command_line)
    command = group.commands[name]  # type: ignore[attr-defined]
    return dict(command.make_context(name, rest).params)


def exposed() -> dict[str, str]:
    """The metrics, and the type of each."""
    text = Metrics(ENGINE).text().decode()
    return dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))


# ---------------------------------------------------------------------------------------------------- Kubernetes


def test_the_kustomizations_name_what_is_there() -> None:
    assert sorted(load(DEPLOY / "kubernetes/cpu/kustomization.yaml")["resources"]) == [path.name for path in MANIFESTS]
    gpu = load(DEPLOY / "kubernetes/gpu/kustomization.yaml")
    assert (DEPLOY / "kubernetes/gpu" / gpu["patches"][0]["path"]).is_file()
    patched, base = (load(DEPLOY / "kubernetes" / kind / "deployment.yaml") for kind in ("gpu", "cpu"))
    (theirs,), (ours,) = (one["spec"]["template"]["spec"]["containers"] for one in (patched, base))
    assert theirs["name"] == ours["name"]
    assert gpu["images"][0]["name"] == ours["image"].partition(":")[0]


def test_the_end_of_a_pod_has_time_for_all_that_it_does(pod: dict[str, Any], container: dict[str, Any]) -> None:
    given = options(container["args"])
    command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    ready = container["readinessProbe"]
    # Who does not hear of the end otherwise is told by the probe.
    assert int(seconds) >= ready["periodSeconds"] * ready["failureThreshold"]
    assert given["drain_timeout"] >= given["timeout"]
    # The server looks for its end ten times a second, and has then this long for the last answers.
    needed = int(seconds) + given["drain_timeout"] + server._LAST_WORDS + 5
    assert pod["terminationGracePeriodSeconds"] >= needed
    for words in (f"{seconds} s in which", f"{given['drain_timeout']:.0f} s in which", f"{server._LAST_WORDS} s for"):
        assert words in README


def test_probes_ask_what_answers_without_a_key(container: dict[str, Any]) -> None:
    paths = set(create_app(ENGINE, model="any").openapi()["paths"])
    probes = [container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "readiness", "liveness")]
    (checked,) = re.findall(r"http://127\.0\.0\.1:8000(/[\w/]+)", DOCKERFILE)
    assert {*probes, checked} <= paths & OPEN
    assert container["ports"][0]["containerPort"] == options(container["args"])["port"]


def test_an_engine_has_time_to_start(container: dict[str, Any]) -> None:
    probe = container["startupProbe"]
    default = inspect.signature(EngineProcess).parameters["start_seconds"].default
    assert probe["periodSeconds"] * probe["failureThreshold"] >= default
    assert "--start-period=15m" in DOCKERFILE
    assert default <= 15 * 60


def test_what_the_server_is_told_is_mounted(pod: dict[str, Any], container: dict[str, Any]) -> None:
    given = options(container["args"])
    mounts = {Path(mount["mountPath"]): mount for mount in container["volumeMounts"]}
    assert {mount["name"] for mount in mounts.values()} == {volume["name"] for volume in pod["volumes"]}
    for path in (given["engines"], given["api_key_file"].parent):
        assert mounts[path]["readOnly"]
    environment = {variable["name"]: variable["value"] for variable in container["env"]}
    assert environment["LDMRT_THREADS"] == container["resources"]["limits"]["cpu"]
    assert not mounts[Path(environment["LDMRT_CACHE"]).parent].get("readOnly")
    assert f"USER {pod['securityContext']['runAsUser']}:{pod['securityContext']['runAsGroup']}" in DOCKERFILE


def test_all_speak_of_the_same_pods() -> None:
    found = {load(path)["kind"]: load(path)["spec"] for path in MANIFESTS}
    labels = found["Deployment"]["template"]["metadata"]["labels"]
    assert found["Deployment"]["selector"]["matchLabels"] == labels
    assert found["Service"]["selector"] == labels
    assert found["PodDisruptionBudget"]["selector"]["matchLabels"] == labels
    assert found["NetworkPolicy"]["podSelector"]["matchLabels"] == labels
    name = load(DEPLOY / "kubernetes/cpu/deployment.yaml")["metadata"]["name"]
    assert found["HorizontalPodAutoscaler"]["scaleTargetRef"]["name"] == name
    assert "replicas" not in found["Deployment"]  # which would undo what the autoscaler did


# ---------------------------------------------------------------------------------------------------- metrics


def test_alerts_and_autoscaler_read_what_the_server_tells() -> None:
    (group,) = load(DEPLOY / "alerts.yaml")["groups"]
    suffixes = {"histogram": ("_bucket", "_sum", "_count")}
    samples = {name + end for name, kind in exposed().items() for end in suffixes.get(kind, ("",))}
    for rule in group["rules"]:
        used = set(re.findall(r"\bldmrt_\w+", rule["expr"]))
        assert used
        assert used <= samples
        assert f"| `{rule['alert']}` |" in README
    assert len(group["rules"]) == len(re.findall(r"^\| `Ldmrt\w+` \|", README, re.MULTILINE))
    scaled = load(DEPLOY / "kubernetes/cpu/autoscaler.yaml")["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert scaled in samples


# ---------------------------------------------------------------------------------------------------- the image


def test_the_image_starts_a_command_that_there_is() -> None:
    (entry,) = re.findall(r"^ENTRYPOINT (.+)$", DOCKERFILE, re.MULTILINE)
    (command,) = re.findall(r"^CMD (\[.+\])$", DOCKERFILE, re.MULTILINE)
    assert json.loads(entry) == ["ldmrt"]
    assert options(json.loads(command))["host"] == "0.0.0.0"  # noqa: S104 - of a container


PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def locked(name: str) -> dict[str, str]:
    """Names and versions of a lock; each line is an exact version, and each version has its hashes."""
    text = (DEPLOY / "lock" / f"{name}.txt").read_text(encoding="utf-8")
    assert "://" not in text  # no index's address, nor what is fetched from one
    found: dict[str, str] = {}
    for entry in re.split(r"\n(?=\S)", re.sub(r"^\s*#.*\n", "", text, flags=re.MULTILINE)):
        line, *hashes = (part.strip(" \\\n") for part in entry.split("\\\n"))
        requirement = Requirement(line)
        (version,) = requirement.specifier
        assert version.operator == "=="
        assert hashes
        assert all(re.fullmatch(r"--hash=sha256:[0-9a-f]{64}", one) for one in hashes)
        found[canonicalize_name(requirement.name)] = version.version
    return found


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_a_lock_holds_what_the_server_needs(target: str) -> None:
    versions = locked(target)
    if target == "cpu":  # there the Dockerfile names it
        (versions["torch"],) = re.findall(r"^ARG TORCH_CPU=(\S+)$", DOCKERFILE, re.MULTILINE)
    needed = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["serve"]]
    for requirement in map(Requirement, needed):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)])
    assert (
        versions["torch"].partition("+")[0]
        == dict(re.findall(r"^(\w+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))["torch"]
    )


def test_the_lock_of_the_build_holds_what_builds() -> None:
    versions = locked("build")
    for requirement in map(Requirement, PROJECT["build-system"]["requires"]):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)])
    assert {"cmake", "ninja"} <= set(versions)
