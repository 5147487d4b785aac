"""Damaged, hostile and impossible input: one line that says what is wrong and what cures it, and nothing left behind."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import ldmrt
from ldmrt.bundle import Bundle
from ldmrt.errors import BundleError, LdmrtError
from ldmrt.manifest import MANIFEST
from ldmrt.weights import WeightFile

# A message that cures says one of these.
CURE = re.compile(
    r"\b(again|build|choose|convert|copy|do not use|expected|give|install|known kinds|make room|remove|save|update|use|wait)\b"
)


def complaint(call: Callable[[], object], *words: str) -> str:
    """The message of the error that `call` raises: one line, with a cure, and with `words` in it."""
    with pytest.raises(LdmrtError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert len(text) < 500, text
    assert CURE.search(text), text
    for word in words:
        assert word in text, text
    return text


# ---------------------------------------------------------------------------------------------------- models


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    """A model to damage."""
    return shutil.copytree(tiny_model, tmp_path / "model")


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; None removes one."""
    data = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps({key: value for key, value in data.items() if value is not None}), encoding="utf-8")


def weights_of(model: Path, folder: str = "text_encoder") -> Path:
    return next((model / folder).glob("*.safetensors"))


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = safetensors.torch.load_file(path)
    change(tensors)
    safetensors.torch.save_file(tensors, path)


def header(path: Path, **entries: Any) -> None:
    """Make the header of a safetensors file lie."""
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    table = json.loads(data[8 : 8 + length])
    name = next(key for key in table if key != "__metadata__")
    table[name] |= entries
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


def a_file(model: Path) -> None:
    shutil.rmtree(model)
    model.write_text("x", encoding="utf-8")


def only_pickles(model: Path) -> None:
    path = weights_of(model)
    torch.save({"a": torch.zeros(1)}, path.with_name("pytorch_model.bin"))
    path.unlink()


class Planted:
    """What a planted pickle looks like; it must never be called."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return pytest.fail, ("the pickle was run",)


def zip_pickle(model: Path) -> None:
    torch.save({"a": Planted()}, weights_of(model))


def old_pickle(model: Path) -> None:
    weights_of(model).write_bytes(pickle.dumps({"a": Planted()}, protocol=2))


def shards(model: Path, names: object) -> None:
    path = weights_of(model)
    path.unlink()
    (path.parent / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}), encoding="utf-8")


BAD_MODELS: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no such folder": (shutil.rmtree, ("no such folder",)),
    "a file": (a_file, ("cut short",)),
    "not a model": (lambda m: (m / "model_index.json").unlink(), ("not a model folder", "model_index.json")),
    "unknown pipeline": (lambda m: edit(m / "model_index.json", _class_name="FluxPipeline"), ("FluxPipeline",)),
    "no pipeline": (lambda m: edit(m / "model_index.json", _class_name=None), ("does not name",)),
    "unknown network": (lambda m: edit(m / "model_index.json", unet=["diffusers", "Other"]), ("unet", "Other")),
    "index entries of another type": (lambda m: edit(m / "model_index.json", unet=7, vae="x"), ("unet",)),
    "index is a list": (lambda m: (m / "model_index.json").write_text("[]"), ("model_index.json",)),
    "config is not JSON": (lambda m: (m / "unet/config.json").write_text("{'a': 1}"), ("unet/config.json", "JSON")),
    "config is cut": (lambda m: (m / "unet/config.json").write_text('{"a": '), ("unet/config.json",)),
    "config is not UTF-8": (lambda m: (m / "unet/config.json").write_bytes(b"\xff\xfe{}"), ("unet/config.json",)),
    "config is nested too deeply": (lambda m: (m / "unet/config.json").write_text("[" * 10**5), ("unet/config.json",)),
    "config is missing": (lambda m: (m / "vae/config.json").unlink(), ("vae/config.json",)),
    "config of other types": (lambda m: edit(m / "vae/config.json", block_out_channels="abc"), ("vae",)),
    "config of no sense": (lambda m: edit(m / "unet/config.json", block_out_channels=[7, 9, 11]), ("unet",)),
    "no channels of latents": (
        lambda m: (m / "vae/config.json").write_text(
            (m / "vae/config.json").read_text().replace('"latent_channels": 4', '"latent_channels": null')
        ),
        ("vae", "latent_channels", "expected a whole number"),
    ),
    "more layers than there is time for": (
        lambda m: edit(m / "unet/config.json", layers_per_block=10**9),
        ("layers_per_block", "at most"),
    ),
    "config lacks a key": (lambda m: edit(m / "vae/config.json", block_out_channels=None), ("vae",)),
    "sample size is text": (lambda m: edit(m / "unet/config.json", sample_size="big"), ("sample_size",)),
    "activation unknown": (lambda m: edit(m / "text_encoder/config.json", hidden_act="no"), ("text_encoder",)),
    "schedule unknown": (lambda m: edit(m / "scheduler/scheduler_config.json", beta_schedule="no"), ("beta_schedule",)),
    "no tokenizer": (lambda m: shutil.rmtree(m / "tokenizer"), ("tokenizer",)),
    "tokenizer is not JSON": (lambda m: (m / "tokenizer/vocab.json").write_text("{"), ("tokenizer", "cannot be read")),
    "only pickles": (only_pickles, ("pytorch_model.bin", "pickle", "ldmrt convert")),
    "a zip pickle": (zip_pickle, ("pickle",)),
    "an old pickle": (old_pickle, ("pickle",)),
    "no weights": (lambda m: weights_of(m).unlink(), ("no weights",)),
    "cut short": (lambda m: weights_of(m).write_bytes(weights_of(m).read_bytes()[:-9]), ("cut short",)),
    "empty weights": (lambda m: weights_of(m).write_bytes(b""), ("cut short",)),
    "a lying dtype": (lambda m: header(weights_of(m), dtype="F99"), ("dtype",)),
    "a lying shape": (lambda m: header(weights_of(m), shape=[1 << 39, 1 << 39]), ("bytes",)),
    "a lying offset": (lambda m: header(weights_of(m), data_offsets=[1 << 60, (1 << 60) + 4]), ("bytes",)),
    "a key is missing": (lambda m: rewrite(weights_of(m), dict.popitem), ("lacks",)),
    "a key too many": (lambda m: rewrite(weights_of(m), lambda t: t.update(x=torch.ones(1))), ("does not know",)),
    "a wrong shape": (
        lambda m: rewrite(weights_of(m), lambda t: t.update({next(iter(t)): torch.ones(3)})),
        ("has the shape",),
    ),
    "shards outside": (lambda m: shards(m, {"a": "../../etc/passwd"}), ("index.json",)),
    "shards that are numbers": (lambda m: shards(m, {"a": 7, "b": [1]}), ("index.json",)),
    "shards that are a list": (lambda m: shards(m, ["a"]), ("index.json",)),
    "shards that are missing": (lambda m: shards(m, {"a": "model-00001.safetensors"}), ("model-00001",)),
}


@pytest.mark.parametrize("case", BAD_MODELS)
def test_models(model: Path, tmp_path: Path, case: str) -> None:
    damage, words = BAD_MODELS[case]
    damage(model)
    out = tmp_path / "deep" / "bundle"
    complaint(lambda: ldmrt.build_engines(model, out, dtype="float32"), *words)
    assert not out.parent.exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sizes": [(100, 64)]}, ("100x64", "96x64, the nearest")),
        ({"sizes": [(0, 64)]}, ("0x64",)),
        ({"sizes": [(-64, 64)]}, ("-64x64",)),
        ({"sizes": [(1 << 20, 1 << 20)]}, ("1048576x1048576",)),
        ({"sizes": []}, ("size",)),
        ({"batch_sizes": [0]}, ("from 1 to 31",)),
        ({"batch_sizes": [-1]}, ("from 1 to 31",)),
        ({"batch_sizes": [1000]}, ("from 1 to 31",)),
        ({"batch_sizes": []}, ("from 1 to 31",)),
        ({"engine": "tensorflow"}, ("tensorflow",)),
        ({"dtype": "int4"}, ("int4",)),
        ({"engine": "onnxruntime", "dtype": "bfloat16"}, ("float32",)),
    ],
)
def test_build_options(tiny_model: Path, tmp_path: Path, options: dict[str, Any], words: tuple[str, ...]) -> None:
    complaint(lambda: ldmrt.build_engines(tiny_model, tmp_path / "out", **options), *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_the_output_is_a_file(tiny_model: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("keep me")
    complaint(lambda: ldmrt.build_engines(tiny_model, tmp_path / place), "choose another --out")
    assert (tmp_path / "file").read_text() == "keep me"


def test_another_models_bundle_is_left_alone(tiny_model_v: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    before = snapshot(out)
    complaint(lambda: ldmrt.build_engines(tiny_model_v, out), "another model")
    assert snapshot(out) == before


# A header's length comes first in a safetensors file, and it may well begin as a pickle or a zip does.
@pytest.mark.parametrize("length", [0x280, 0x480, 0x4B50])
def test_a_header_length_is_not_a_pickle(tmp_path: Path, length: int) -> None:
    text = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode().ljust(length)
    path = tmp_path / "w.safetensors"
    path.write_bytes(struct.pack("<Q", length) + text + struct.pack("<f", 2.5))
    assert path.read_bytes()[:2] in (b"\x80\x02", b"\x80\x04", b"PK")
    assert float(WeightFile(path)["a"]) == float(safetensors.torch.load_file(path)["a"]) == 2.5


# ---------------------------------------------------------------------------------------------------- bundles


def snapshot(folder: Path) -> dict[str, str]:
    """Every file with the hash of its contents."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A bundle to damage."""
    return shutil.copytree(tiny_bundle, tmp_path / "bundle")


def draw(bundle: Path) -> object:
    """Open it and use all of it."""
    return ldmrt.Pipeline.from_bundle(bundle, "cpu")("a red circle", num_inference_steps=1, seed=0)


def manifest_of(bundle: Path) -> dict[str, Any]:
    return dict(json.loads((bundle / MANIFEST).read_text(encoding="utf-8")))


def change_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    data = manifest_of(bundle)
    change(data)
    (bundle / MANIFEST).write_text(json.dumps(data), encoding="utf-8")


def record_of(data: dict[str, Any], component: str) -> dict[str, Any]:
    """The engine that one picture with guidance is made by: the last of its component."""
    found = [
        engine for engine in data["engines"] if engine["component"] == component and engine["rows"] in (None, 1, 2)
    ]
    return dict(found[-1])


def flip(path: Path, position: int = -1) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def forge(bundle: Path, component: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a component's graphs, and write the new hashes into the manifest as an attacker would."""
    data = manifest_of(bundle)
    for engine in data["engines"]:
        if engine["component"] == component:
            record = engine["files"][0]
            path = bundle / record["file"]
            graph = json.loads(path.read_text(encoding="utf-8"))
            change(graph)
            path.write_text(json.dumps(graph), encoding="utf-8")
            record["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps(data), encoding="utf-8")


def overwritten(bundle: Path, component: str, content: bytes) -> None:
    """Put something else in the place of a component's graphs, with its hash in the manifest."""
    data = manifest_of(bundle)
    for engine in data["engines"]:
        if engine["component"] == component:
            (bundle / engine["files"][0]["file"]).write_bytes(content)
            engine["files"][0]["sha256"] = hashlib.sha256(content).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps(data), encoding="utf-8")


def names(data: dict[str, Any], file: str) -> None:
    """Have the manifest name another weight file."""
    next(iter(data["weights"].values()))["file"] = file


def linked(bundle: Path) -> None:
    """Move the weights out, and leave a link."""
    outside = bundle.parent / "outside"
    (bundle / "weights").rename(outside)
    (bundle / "weights").symlink_to(outside)


def looped(bundle: Path) -> None:
    shutil.rmtree(bundle / "weights")
    (bundle / "weights").symlink_to(bundle / "weights")


BAD_BUNDLES: dict[str, tuple[Callable[[Path], object], tuple[str, ...]]] = {
    "no such folder": (shutil.rmtree, ("no such folder", "build-engines")),
    "no manifest": (lambda b: (b / MANIFEST).unlink(), ("has no ldmrt.json",)),
    "manifest is cut": (lambda b: (b / MANIFEST).write_text('{"format": 1,'), ("ldmrt.json",)),
    "manifest is a list": (lambda b: (b / MANIFEST).write_text("[1]"), ("ldmrt.json",)),
    "manifest is empty": (lambda b: (b / MANIFEST).write_text(""), ("ldmrt.json",)),
    "manifest is binary": (lambda b: (b / MANIFEST).write_bytes(bytes(range(256))), ("ldmrt.json",)),
    "manifest is nested too deeply": (lambda b: (b / MANIFEST).write_text("[" * 10**5), ("ldmrt.json",)),
    "a newer format": (lambda b: change_manifest(b, lambda d: d.update(format=99)), ("99", "update ldmrt")),
    "no format": (lambda b: change_manifest(b, lambda d: d.pop("format")), ("format",)),
    "an unknown field": (lambda b: change_manifest(b, lambda d: d.update(surprise=1)), ("surprise",)),
    "a missing field": (lambda b: change_manifest(b, lambda d: d.pop("engines")), ("engines",)),
    "a field of another type": (lambda b: change_manifest(b, lambda d: d.update(weights=[])), ("weights",)),
    "an unknown engine kind": (
        lambda b: change_manifest(b, lambda d: d["engines"][0].update(kind="pickle")),
        ("kind",),
    ),
    "no files of an engine": (lambda b: change_manifest(b, lambda d: d["engines"][0].update(files=[])), ("files",)),
    "no engines": (lambda b: change_manifest(b, lambda d: d.update(engines=[])), ("engine",)),
    "no weights of that name": (lambda b: change_manifest(b, lambda d: d.update(weights={})), ("no weights",)),
    "a downscale of 0": (lambda b: change_manifest(b, lambda d: d["model"].update(downscale=0)), ("downscale",)),
    "a huge latent": (lambda b: change_manifest(b, lambda d: d["model"].update(latent_channels=10**12)), ("latent",)),
    "guidance that is NaN": (
        lambda b: change_manifest(b, lambda d: d["model"]["defaults"].update(guidance_scale=float("nan"))),
        ("guidance_scale",),
    ),
    "a schedule of another form": (
        lambda b: change_manifest(b, lambda d: d["model"].update(schedule={"surprise": 1})),
        ("schedule",),
    ),
    "weights flipped": (lambda b: flip(next(b.glob("weights/unet*"))), ("unet", "damaged")),
    "graph flipped": (lambda b: flip(next(b.glob("graphs/context*.json"))), ("context", "damaged")),
    "tokenizer flipped": (lambda b: flip(b / "tokenizer/merges.txt"), ("merges.txt", "damaged")),
    "weights missing": (lambda b: next(b.glob("weights/vae*")).unlink(), ("vae", "missing")),
    "tokenizer missing": (lambda b: shutil.rmtree(b / "tokenizer"), ("tokenizer", "missing")),
    "a tokenizer's file that nobody named": (
        lambda b: (b / "tokenizer/added_tokens.json").write_text("{}"),
        ("added_tokens.json", "does not name"),
    ),
    "a tokenizer's link that nobody named": (
        lambda b: (b / "tokenizer/vocab.txt").symlink_to("/etc/hostname"),
        ("vocab.txt", "does not name"),
    ),
    "a manifest of 20 MB": (lambda b: (b / MANIFEST).write_text("[" + "1," * (10 << 20)), ("ldmrt.json", "at most")),
    "a graph that is no text": (lambda b: overwritten(b, "step", b"\xff\xfe{"), ("step", "cannot be read")),
    "a graph of 20 MB": (lambda b: overwritten(b, "step", b" " * (20 << 20)), ("step", "at most")),
    "more timesteps than there is memory": (
        lambda b: change_manifest(b, lambda d: d["model"]["schedule"].update(train_steps=2**40)),
        ("num_train_timesteps", "expected 1 to"),
    ),
    "a path with ..": (lambda b: change_manifest(b, lambda d: names(d, "../x.safetensors")), ("outside",)),
    "an absolute path": (lambda b: change_manifest(b, lambda d: names(d, "/etc/passwd")), ("outside",)),
    "a path with a null": (lambda b: change_manifest(b, lambda d: names(d, "weights/\0")), ("ldmrt.json",)),
    "a path that is too long": (lambda b: change_manifest(b, lambda d: names(d, "x" * 5000)), ("ldmrt.json",)),
    "an empty path": (lambda b: change_manifest(b, lambda d: names(d, "")), ("missing",)),
    "a tokenizer outside": (
        lambda b: change_manifest(b, lambda d: d["model"].update(tokenizers={"text_encoder": "../../etc"})),
        ("outside",),
    ),
    "a link that leaves": (linked, ("outside",)),
    "a link to itself": (looped, ("ldmrt.json",)),
}


@pytest.mark.parametrize("case", BAD_BUNDLES)
def test_bundles(bundle: Path, case: str) -> None:
    damage, words = BAD_BUNDLES[case]
    damage(bundle)
    complaint(lambda: draw(bundle), *words)


def test_a_message_is_one_line_whatever_the_names_in_it(bundle: Path) -> None:
    """A terminal would obey some of them."""
    forge(bundle, "step", lambda graph: graph["outputs"].append(["a", "\x1b[2J\n\ud800" + "x" * 5000]))
    with pytest.raises(BundleError) as caught:
        draw(bundle)
    text = str(caught.value)
    assert text.isprintable()
    assert len(text) < 2500
    assert text.endswith("rebuild it with `ldmrt build-engines`")
    assert str(BundleError("a\tb\r\x9b31m\u202e")) == "a\\tb\\r\\x9b31m\\u202e"


def test_a_model_is_not_a_bundle(tiny_model: Path) -> None:
    complaint(lambda: Bundle.open(tiny_model), "is a model, not a bundle", "build-engines")


@pytest.mark.slow
def test_a_damaged_bundle_is_cured_by_building_again(tiny_model: Path, bundle: Path) -> None:
    """What the messages advise must work."""
    flip(next(bundle.glob("graphs/decoder*.json")))
    flip(bundle / "tokenizer" / "merges.txt")
    ldmrt.build_engines(tiny_model, bundle, dtype="float32")
    draw(bundle)
    (bundle / MANIFEST).write_text("{", encoding="utf-8")
    ldmrt.build_engines(tiny_model, bundle, dtype="float32")
    draw(bundle)


def test_a_newer_bundle_is_not_overwritten(tiny_model: Path, bundle: Path) -> None:
    change_manifest(bundle, lambda data: data.update(format=99))
    before = snapshot(bundle)
    complaint(lambda: ldmrt.build_engines(tiny_model, bundle, dtype="float32"), "99", "update ldmrt")
    assert snapshot(bundle) == before


# ---------------------------------------------------------------------------------------------------- graphs


@pytest.mark.parametrize(
    "op",
    [
        "aten.from_file.default",
        "aten.add_.Tensor",
        "aten.set_.source_Storage",
        "aten.as_strided.default",
        "os.system",
        "python.eval",
        "torch.load",
        "aten.linear",
        "aten.linear.out",
        "prims.device_put.default",
        "",
    ],
)
def test_operators_that_no_graph_may_call(bundle: Path, op: str) -> None:
    forge(bundle, "step", lambda graph: graph["nodes"][3].__setitem__(1, op))
    text = complaint(lambda: draw(bundle), "operator")
    assert "may call" in text


def node(graph: dict[str, Any], name: str, op: str, arguments: list[Any], shape: list[Any]) -> None:
    """Have the graph end in another node, which the first output then is."""
    graph["nodes"].append([name, op, arguments, {}, shape, "float32"])
    graph["outputs"][0][1] = name


def swap(graph: dict[str, Any]) -> None:
    """Let two nodes read each other."""
    first, second = graph["nodes"][0], graph["nodes"][1]
    first[2], second[2] = [{"ref": second[0]}], [{"ref": first[0]}]


BAD_GRAPHS: dict[str, Callable[[dict[str, Any]], object]] = {
    "not defined": lambda g: g["nodes"][0].__setitem__(2, [{"ref": "nobody"}]),
    "a cycle": swap,
    "itself": lambda g: g["nodes"][0].__setitem__(2, [{"ref": g["nodes"][0][0]}]),
    "an output of nothing": lambda g: g["outputs"][0].__setitem__(1, "nobody"),
    "no outputs": lambda g: g.update(outputs=[]),
    "no inputs": lambda g: g.update(inputs=[]),
    "an input of another name": lambda g: g["inputs"][0].__setitem__(0, g["nodes"][0][0] + "x"),
    "no nodes": lambda g: g.update(nodes=None),
    "too few arguments": lambda g: g["nodes"][-1].__setitem__(2, []),
    "too many arguments": lambda g: g["nodes"][-1].__setitem__(2, g["nodes"][-1][2] * 9),
    "an unknown keyword": lambda g: g["nodes"][-1].__setitem__(3, {"surprise": 1}),
    "arguments of another type": lambda g: g["nodes"][-1].__setitem__(2, ["a", "b"]),
    "arguments nested too deeply": lambda g: g["nodes"][-1].__setitem__(2, json.loads("[" * 400 + "]" * 400)),
    "a dtype that is none": lambda g: g["nodes"][-1].__setitem__(5, "load"),
    "a weight too many": lambda g: g["weights"].append(["nobody", [1], "float32"]),
    "a weight of another shape": lambda g: g["weights"][0].__setitem__(1, [1, 2, 3]),
    "a giant weight": lambda g: g["weights"][0].__setitem__(1, [1 << 40, 1 << 40]),
    "a giant tensor": lambda g: node(g, "giant", "aten.zeros.default", [[1 << 40]], [1 << 40]),
    "a giant number": lambda g: node(g, "giant", "aten.zeros.default", [[1 << 200]], [1]),
    "a giant tensor in disguise": lambda g: node(g, "giant", "aten.zeros.default", [[1 << 20, 1 << 25]], [1]),
    "a negative tensor": lambda g: node(g, "minus", "aten.zeros.default", [[-1]], [-1]),
    "an item that is not there": lambda g: node(g, "item", "python.getitem", [{"ref": g["inputs"][0][0]}, 10**9], [1]),
    "an output of another shape": lambda g: node(g, "small", "aten.zeros.default", [[1]], [1]),
    "an output that is no tensor": lambda g: node(
        g, "parts", "aten.chunk.default", [{"ref": g["inputs"][0][0]}, 1], []
    ),
}


@pytest.mark.parametrize("component", ["step", "text_encoder"])
@pytest.mark.parametrize("case", BAD_GRAPHS)
def test_graphs(bundle: Path, component: str, case: str) -> None:
    forge(bundle, component, BAD_GRAPHS[case])
    complaint(lambda: draw(bundle))


def test_a_forged_weight_file_needs_the_right_names(bundle: Path) -> None:
    data = manifest_of(bundle)
    record = next(iter(data["weights"].values()))
    safetensors.torch.save_file({"a": torch.ones(1)}, bundle / record["file"])
    record["sha256"] = hashlib.sha256((bundle / record["file"]).read_bytes()).hexdigest()
    (bundle / MANIFEST).write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(BundleError, match="has no tensor"):
        draw(bundle)
