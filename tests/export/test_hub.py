"""Models from the Hub, of a server on this machine that speaks as much of its protocol as huggingface_hub asks for. No network."""

from __future__ import annotations

import hashlib
import http.server
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import huggingface_hub
import pytest
from safetensors.torch import load_file, save_file

from ldmrt.errors import BuildError
from ldmrt.export import hub
from ldmrt.export.architectures import instantiate
from ldmrt.export.resolve import resolve
from ldmrt.export.source import Checkpoint

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = "someone/a-model"


@dataclass
class Hub:
    """What the server has, and what it was asked for.

    Attributes:
        folder: the files of its one model.
        asked: the paths of the files that were fetched.
        gated: whether it keeps them to itself.
    """

    folder: Path
    url: str = ""
    asked: list[str] = field(default_factory=list)
    gated: bool = False


class _Handler(http.server.BaseHTTPRequestHandler):
    hub: ClassVar[Hub]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        files = {p.relative_to(self.hub.folder).as_posix(): p for p in self.hub.folder.rglob("*") if p.is_file()}
        resolved = f"/{MODEL}/resolve/"
        if path.startswith(f"/api/models/{MODEL}") and self.hub.gated:
            self.answer(403, b"{}", {"X-Error-Code": "GatedRepo"})
        elif path in (f"/api/models/{MODEL}", f"/api/models/{MODEL}/revision/main", f"/api/models/{MODEL}/revision/v1"):
            siblings = [{"rfilename": name} for name in files]
            self.answer(200, json.dumps({"id": MODEL, "sha": COMMIT, "siblings": siblings}).encode())
        elif path.startswith(f"/api/models/{MODEL}/revision/"):
            self.answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"/api/models/{MODEL}/tree/"):
            tree = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": etag(p)} for n, p in files.items()]
            self.answer(200, json.dumps(tree).encode())
        elif path.startswith(resolved) and path.removeprefix(resolved).partition("/")[2] in files:
            name = path.removeprefix(resolved).partition("/")[2]
            if self.command == "GET":
                self.hub.asked.append(name)
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{etag(files[name])}"'}
            self.answer(200, files[name].read_bytes(), headers)
        else:
            self.answer(404, b"{}", {"X-Error-Code": "EntryNotFound" if path.startswith(resolved) else "RepoNotFound"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()


@pytest.fixture
def served(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub with one model, whose files may be changed, and a cache of its own."""
    there = Hub(Path(shutil.copytree(tiny_model, tmp_path / "there")))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": there}))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    there.url = f"http://127.0.0.1:{server.server_port}"
    real = huggingface_hub.snapshot_download

    def here(*args: Any, **kwargs: Any) -> Any:
        return real(*args, **kwargs, endpoint=there.url, cache_dir=tmp_path / "cache", token=False)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", here)
    monkeypatch.chdir(tmp_path)
    yield there
    server.shutdown()
    thread.join()
    server.server_close()


def variant_of(folder: Path, stem: str, name: str, *, alone: bool) -> None:
    """Write the half precision copy of a component's weights, and take away the other."""
    plain = folder / f"{stem}.safetensors"
    save_file({key: tensor.half() for key, tensor in load_file(plain).items()}, folder / f"{stem}.{name}.safetensors")
    if alone:
        plain.unlink()


def test_what_is_an_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    assert hub.is_id("owner/name-1.5")
    assert hub.is_id(Path("owner/name"))
    for path in (
        "here/model",
        "model",
        "a/b/c",
        "./model",
        "../model",
        "/abs/model",
        "owner/name.safetensors",
        "o/n.ckpt",
    ):
        assert not hub.is_id(path), path


def test_only_what_is_needed_is_fetched(served: Hub, tiny_model: Path) -> None:
    """Not the pickles, nor the other copies, nor what other pipelines use."""
    for stem, folder in (("diffusion_pytorch_model", "unet"), ("model", "text_encoder")):
        variant_of(served.folder / folder, stem, "fp16", alone=False)
        variant_of(served.folder / folder, stem, "non_ema", alone=False)
    for name in (
        "model.ckpt",
        "whole.safetensors",
        "unet/diffusion_pytorch_model.bin",
        "safety_checker/model.safetensors",
    ):
        (served.folder / name).parent.mkdir(exist_ok=True)
        (served.folder / name).write_bytes(b"x")
    source = resolve(MODEL)
    assert source.name == MODEL
    unet = Checkpoint(source, "unet", instantiate(source, "unet"))
    expected = load_file(tiny_model / "unet" / "diffusion_pytorch_model.safetensors")
    assert all((unet.load(name) == expected[name]).all() for name in unet.keys)
    assert sorted(served.asked) == sorted(
        path.relative_to(tiny_model).as_posix() for path in tiny_model.rglob("*") if path.is_file()
    )
    served.asked.clear()
    resolve(MODEL)
    assert served.asked == []


@pytest.mark.parametrize("alone", [True, False])
def test_half_precision(alone: bool, served: Hub) -> None:
    """Asked for where there are both, or taken where there is no other; a component without it is taken as it is."""
    variant_of(served.folder / "unet", "diffusion_pytorch_model", "fp16", alone=alone)
    source = resolve(MODEL, variant=None if alone else "fp16")
    assert [file.path.name for file in source.weights("unet")] == ["diffusion_pytorch_model.fp16.safetensors"]
    assert [file.path.name for file in source.weights("vae")] == ["diffusion_pytorch_model.safetensors"]
    assert "unet/diffusion_pytorch_model.safetensors" not in served.asked


def test_shards(served: Hub) -> None:
    folder = served.folder / "unet"
    whole = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(whole)
    halves = {f"diffusion_pytorch_model-0000{i + 1}-of-00002.safetensors": sorted(tensors)[i::2] for i in range(2)}
    for name, keys in halves.items():
        save_file({key: tensors[key] for key in keys}, folder / name)
    index = {"weight_map": {key: name for name, keys in halves.items() for key in keys}}
    (folder / f"{whole.name}.index.json").write_text(json.dumps(index))
    whole.unlink()
    source = resolve(MODEL)
    assert [file.path.name for file in source.weights("unet")] == sorted(halves)
    assert len(Checkpoint(source, "unet", instantiate(source, "unet")).keys) == len(tensors)


def test_a_revision(served: Hub) -> None:
    assert resolve(MODEL, revision="v1").path.name == COMMIT
    with pytest.raises(BuildError, match="has no revision 'v2'; leave out --revision"):
        resolve(MODEL, revision="v2")


@pytest.mark.parametrize("whole", [True, False])
def test_a_vae(whole: bool, served: Hub, tiny_model: Path) -> None:
    """Of a repository that is a VAE, or of a model's."""
    if not whole:
        for path in (served.folder / "vae").iterdir():
            path.rename(served.folder / path.name)
        shutil.rmtree(served.folder / "unet")
    source = resolve(tiny_model, vae=MODEL)
    assert COMMIT in source.weights("vae")[0].path.parts
    folder = "vae/" if whole else ""
    assert set(served.asked) - {"model_index.json"} == {
        f"{folder}config.json",
        f"{folder}diffusion_pytorch_model.safetensors",
    }


def test_offline(served: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        BuildError, match=r"no such folder: someone/a-model;.*not in the cache, and HF_HUB_OFFLINE is set"
    ):
        resolve(MODEL)
    assert served.asked == []
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    resolve(MODEL)
    served.asked.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert resolve(MODEL).name == MODEL
    assert served.asked == []


def test_the_hub_cannot_be_reached(served: Hub) -> None:
    served.url = "http://127.0.0.1:9"
    with pytest.raises(BuildError, match=r"no such folder: someone/a-model;.*the Hub cannot be reached; go online"):
        resolve(MODEL)


REFUSALS: dict[str, tuple[Callable[[Hub], object], str]] = {
    "gated": (lambda there: setattr(there, "gated", True), "is gated: accept its terms on its page, and set HF_TOKEN"),
    "no index": (
        lambda there: (there.folder / "model_index.json").unlink(),
        r"has no model_index\.json: it is not in the diffusers layout",
    ),
    "unknown kind": (
        lambda there: (there.folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}'),
        "someone/a-model is a FluxPipeline, which ldmrt does not build yet; known kinds: StableDiffusionPipeline",
    ),
    "only pickles": (
        lambda there: (there.folder / "unet/diffusion_pytorch_model.safetensors").rename(there.folder / "unet/x.bin"),
        "has no safetensors weights of its unet; .*ldmrt convert",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_refusals(case: str, served: Hub) -> None:
    change, message = REFUSALS[case]
    change(served)
    with pytest.raises(BuildError, match=message) as caught:
        resolve(MODEL)
    assert "\n" not in str(caught.value)
    assert not [name for name in served.asked if name.startswith("unet") and name.endswith(".safetensors")]


def test_what_is_not_there(served: Hub) -> None:
    with pytest.raises(
        BuildError, match="no such folder: someone/else; and as an id on the Hub it is not there, or private"
    ):
        resolve("someone/else")
