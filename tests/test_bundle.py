"""Bundles: opened, searched, loaded, and every file held against the manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldmrt.bundle import Bundle
from ldmrt.errors import BundleError, EngineMismatch
from ldmrt.graph import from_json
from ldmrt.manifest import FORMAT, MANIFEST
from ldmrt.weights import sha256

CPU = torch.device("cpu")


@pytest.fixture
def folder(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    data = json.loads((folder / MANIFEST).read_text())
    change(data)
    (folder / MANIFEST).write_text(json.dumps(data))


def test_find(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    assert [record.rows for record in bundle.find("step")] == [1, 2, 4]
    assert [record.rows for record in bundle.find("decoder", size=(64, 64), kind="torch", dtype="float32")] == [1, 2]
    assert bundle.find("context", size=(1, 1))  # serves every size
    assert not bundle.find("step", size=(128, 64))
    assert not bundle.find("step", kind="onnxruntime")
    assert not bundle.find("step", dtype="float16")
    assert not bundle.find("upscaler")


def test_engines_of_one_bundle_share_their_weights(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    addresses = []
    for record in bundle.find("step"):
        graph = bundle.graph(record)
        bundle.load(record, CPU)
        addresses.append(bundle.parameters(record.weights, CPU).tensor(graph.weights["conv_in.bias"]).data_ptr())
    assert len(set(addresses)) == 1


def test_graphs_are_portable_text(tiny_bundle: Path) -> None:
    bundle = Bundle.open(tiny_bundle)
    record = bundle.find("context")[0]
    graph = from_json((tiny_bundle / record.files[0].file).read_text(), {})
    assert graph.name == "context"
    assert str(tiny_bundle) not in (tiny_bundle / MANIFEST).read_text()


def test_loading_onto_a_device_that_the_library_has_no_provider_for(tiny_bundle_onnx: Path) -> None:
    bundle = Bundle.open(tiny_bundle_onnx)
    with pytest.raises(EngineMismatch, match="is for the CPU alone, the device is cuda:0"):
        bundle.load(bundle.find("decoder", kind="onnxruntime")[0], torch.device("cuda:0"))


# ---------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.update(format=FORMAT + 1), f"bundle format {FORMAT + 1}, this ldmrt reads {FORMAT}"),
        (lambda data: data.pop("format"), "cannot be read"),
        (lambda data: data.pop("engines"), "damaged .engines: "),
        (lambda data: data.update(surprise=1), "damaged .surprise: "),
        (lambda data: data["engines"][0].update(rows="many"), r"damaged .engines\.0\.rows: "),
        (lambda data: data["engines"][0].update(files=[]), r"damaged .engines\.0\.files: "),
        (lambda data: data["engines"][0].update(kind="pickle"), r"damaged .engines\.0\.kind: "),
        (lambda data: data["engines"][0]["files"][0].update(sha256="0"), r"damaged .engines\.0\.files\.0\.sha256: "),
        (lambda data: data["engines"][0]["files"][0].update(file="../x"), "'../x', which lies outside the bundle"),
        (lambda data: data["tokenizer_files"][0].update(file="/etc/passwd"), "lies outside the bundle"),
        (lambda data: data["model"].update(tokenizers={"text_encoder": ".."}), "lies outside the bundle"),
    ],
)
def test_a_damaged_manifest(folder: Path, change: Callable[[dict[str, Any]], Any], message: str) -> None:
    edit(folder, change)
    with pytest.raises(BundleError, match=message) as caught:
        Bundle.open(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", b"[" * 100_000])
def test_a_manifest_that_is_none(folder: Path, content: bytes) -> None:
    (folder / MANIFEST).write_bytes(content)
    with pytest.raises(BundleError, match=r"ldmrt\.json"):
        Bundle.open(folder)


def test_a_link_that_leads_outside(folder: Path, tmp_path: Path) -> None:
    record = Bundle.open(folder).find("step")[0].files[0]
    (folder / record.file).rename(tmp_path / "elsewhere.json")
    (folder / record.file).symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(BundleError, match="lies outside the bundle"):
        Bundle.open(folder)


@pytest.mark.parametrize("what", ["graph", "weights"])
def test_a_file_that_has_changed(folder: Path, what: str) -> None:
    bundle = Bundle.open(folder)
    record = bundle.find("step")[0]
    path = folder / (record.files[0] if what == "graph" else bundle.manifest.weights[record.weights]).file
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleError, match="is damaged: its SHA-256 is"):
        bundle.load(record, CPU)
    path.unlink()
    with pytest.raises(BundleError, match="is missing from the bundle"):
        Bundle.open(folder).load(record, CPU)


def test_a_tokenizer_that_has_changed(folder: Path) -> None:
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(BundleError, match=r"merges\.txt is damaged"):
        Bundle.open(folder).check_tokenizers()


def test_a_tensor_that_is_not_there(folder: Path) -> None:
    """The hash is right, the contents are not: weights and graph of different builds."""
    bundle = Bundle.open(folder)
    record = bundle.find("step")[0]
    path = folder / record.files[0].file
    path.write_text(path.read_text().replace("conv_out.bias", "conv_out.sigh"))
    files = (record.files[0].model_copy(update={"sha256": sha256(path)}),)
    with pytest.raises(BundleError, match=r"has no tensor 'conv_out\.sigh'"):
        Bundle.open(folder).load(record.model_copy(update={"files": files}), CPU)


def test_each_file_is_hashed_once(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []

    def counted(path: Path) -> str:
        hashed.append(path.name)
        return sha256(path)

    monkeypatch.setattr("ldmrt.bundle.sha256", counted)
    bundle = Bundle.open(tiny_bundle)
    for record in bundle.manifest.engines:
        bundle.load(record, CPU)
        bundle.load(record, CPU)
    assert len(hashed) == len(set(hashed)) > 3


# ---------------------------------------------------------------------------------------------------- writing
