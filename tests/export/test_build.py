"""Whole builds: what is reused, what is kept, what is left after a failure, and models stored in other ways."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import ldmrt
from ldmrt.bundle import Bundle
from ldmrt.engines.protocol import TensorSpec
from ldmrt.errors import BuildError
from ldmrt.export.build import _Build, _Draft
from ldmrt.export.folder import BundleFolder
from ldmrt.export.options import Options
from ldmrt.export.source import Source
from ldmrt.graph import Graph, Node, Ref
from ldmrt.manifest import MANIFEST, EngineRecord, FileRecord
from ldmrt.pipeline import Pipeline, Result


@pytest.fixture
def bundle(tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy to be built into; `copytree` keeps the times."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


def contents(folder: Path) -> dict[str, tuple[int, str]]:
    """Every file and folder, with its time and its hash."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        if path.is_file()
        else (0, "folder")
        for path in sorted(folder.rglob("*"))
    }


def slot(record: EngineRecord) -> tuple[Any, ...]:
    return record.component, record.kind, record.dtype, record.size, record.rows


def draw(path: Path, **arguments: Any) -> Result:
    pipe = Pipeline.from_bundle(path, **arguments)
    return pipe("a red circle", num_inference_steps=3, guidance_scale=5.0, seed=0, output_type="np")


# ---------------------------------------------------------------------------------------------------- a bundle


def test_what_a_bundle_holds(tiny_bundle: Path, tiny_model: Path) -> None:
    found = Bundle.open(tiny_bundle)
    step: list[tuple[Any, ...]] = [("step", "torch", "float32", (64, 64), rows) for rows in (1, 2, 4)]
    coders = [(name, "torch", "float32", (64, 64), rows) for name in ("decoder", "encoder") for rows in (1, 2)]
    free = [(name, "torch", "float32", None, None) for name in ("text_encoder", "context", "schedule")]
    assert sorted(map(slot, found.manifest.engines), key=str) == sorted(step + coders + free, key=str)
    assert set(found.manifest.weights) == {"text_encoder.float32", "unet.float32", "vae.float32"}
    model = found.manifest.model
    assert (model.name, model.latent_channels, model.downscale) == ("tiny", 4, 8)
    assert (model.defaults.width, model.defaults.num_inference_steps, model.defaults.guidance_scale) == (64, 50, 7.5)
    assert {record.file.partition("/")[0] for record in found.manifest.source} == {
        "text_encoder",
        "unet",
        "vae",
        "scheduler",
        "tokenizer",
    }
    for engine in found.manifest.engines:
        assert engine.certificate.status == "verified"
        assert set(engine.certificate.relative_error) == {"random", "real"}
        # Each is the original's sums in the original's order, so that far less than the limit is expected.
        assert max(engine.certificate.relative_error.values()) < 1e-5
        assert engine.versions["ldmrt"] == ldmrt.__version__
    named = {record.file for record in found.records()} | {MANIFEST}
    assert {str(path.relative_to(tiny_bundle)) for path in tiny_bundle.rglob("*") if path.is_file()} == named
    assert found.manifest.passes["unet"]["request"] > 0


def test_the_same_build_again_writes_no_engine(bundle: Path, tiny_model: Path) -> None:
    before = contents(bundle)
    said: list[str] = []
    ldmrt.build_engines(
        tiny_model,
        bundle,
        dtype="float32",
        batch_sizes=(1, 2),
        on_progress=lambda what, _done, _total: said.append(what),
    )
    after = contents(bundle)
    changed = {name for name in before | after if before.get(name) != after.get(name)}
    # The manifest and the tokenizer's files are put in place again, with the same bytes.
    assert {name.partition("/")[0] for name in changed} <= {MANIFEST, "tokenizer"}
    assert {name: digest for name, (_, digest) in after.items()} == {name: d for name, (_, d) in before.items()}
    assert sum("already built" in what for what in said) == 4
    assert not any("verifying" in what for what in said)


@pytest.mark.slow
def test_adding_a_size_and_a_batch_keeps_the_rest(bundle: Path, tiny_model: Path) -> None:
    before = {slot(record): record for record in Bundle.open(bundle).manifest.engines}
    files = contents(bundle)
    steps: list[tuple[int, int]] = []
    ldmrt.build_engines(
        tiny_model,
        bundle,
        sizes=[(64, 64), (80, 48)],
        batch_sizes=(3,),
        dtype="float32",
        on_progress=lambda _what, done, total: steps.append((done, total)),
    )
    engines = Bundle.open(bundle).manifest.engines
    slots = [slot(record) for record in engines]
    assert len(slots) == len(set(slots))
    after = {slot(record): record for record in engines}
    assert set(before) < set(after)
    assert {key[3:] for key in set(after) - set(before)} == {
        (size, rows) for size in ((64, 64), (80, 48)) for rows in (3, 6)
    }
    for key, record in before.items():
        assert after[key].files == record.files
        assert after[key].key == record.key
    graphs = {name: state for name, state in files.items() if name.startswith(("graphs/", "weights/"))}
    assert graphs.items() <= contents(bundle).items()
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert len({total for _, total in steps}) == 1
    assert steps[-1][0] == steps[-1][1]
    assert Pipeline.from_bundle(bundle).defaults.width == 64
    pipe = Pipeline.from_bundle(bundle)
    images = pipe(
        "a red circle", width=80, height=48, num_inference_steps=2, num_images_per_prompt=2, output_type="np"
    ).images
    assert images.shape == (2, 48, 80, 3)


def test_adding_onnxruntime_keeps_the_torch_engines(tiny_bundle: Path, tiny_bundle_onnx: Path) -> None:
    before = {slot(record): record for record in Bundle.open(tiny_bundle).manifest.engines}
    engines = Bundle.open(tiny_bundle_onnx).manifest.engines
    assert len(engines) == len({slot(record) for record in engines})
    after = {slot(record): record for record in engines}
    assert all(after[key].files == record.files for key, record in before.items())
    added = set(after) - set(before)
    assert {key[1] for key in added} == {"onnxruntime"}
    assert {key[0] for key in added} == {"text_encoder", "step", "decoder", "encoder"}
    assert all(record.certificate.status == "verified" for record in engines)


class Stop(Exception):
    """Raised by a test."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_failure_leaves_the_old_bundle_as_it_was(
    bundle: Path, tiny_model: Path, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(bundle)

    def progress(what: str, _done: int, _total: int) -> None:
        if what.startswith("decoder"):
            assert set(contents(bundle)) > set(before)
            raise error("here")

    with pytest.raises(BuildError if error is OSError else error, match="here"):
        ldmrt.build_engines(tiny_model, bundle, dtype="float32", batch_sizes=(3,), on_progress=progress)
    assert contents(bundle) == before
    Bundle.open(bundle)


def test_a_failure_in_a_new_folder_leaves_nothing(tiny_model: Path, tmp_path: Path) -> None:
    def progress(what: str, _done: int, _total: int) -> None:
        if what.startswith("unet"):
            raise Stop

    with pytest.raises(Stop):
        ldmrt.build_engines(tiny_model, tmp_path / "new", dtype="float32", on_progress=progress)
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(Stop):
        ldmrt.build_engines(tiny_model, empty, dtype="float32", on_progress=progress)
    assert contents(tmp_path) == {"empty": (0, "folder")}


def test_another_model_into_the_same_folder_is_refused(bundle: Path, tiny_model_v: Path) -> None:
    before = contents(bundle)
    with pytest.raises(BuildError, match=r"holds a bundle of another model \(tiny\)"):
        ldmrt.build_engines(tiny_model_v, bundle, dtype="float32")
    assert contents(bundle) == before


def test_two_builds_at_once_are_refused(bundle: Path, tiny_model: Path) -> None:
    with (bundle / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(BuildError, match="another build is writing"):
            ldmrt.build_engines(tiny_model, bundle, dtype="float32")
    Bundle.open(bundle)


def test_a_full_disk_is_noticed_before_work(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1 << 20))
    with pytest.raises(BuildError, match=r"the disk has 0\.0 GB free"):
        ldmrt.build_engines(tiny_model, tmp_path / "out", dtype="float32")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BuildError, match="cannot make the folder"):
        ldmrt.build_engines(tiny_model, tmp_path / "file" / "out", dtype="float32")


# ---------------------------------------------------------------------------------------------------- LoRAs


@pytest.mark.slow
def test_a_bundle_with_a_lora(
    tiny_model: Path,
    tiny_bundle: Path,
    tmp_path: Path,
    write_lora: Callable[..., Path],
    fused_by_diffusers: Callable[..., Any],
) -> None:
    path = write_lora(tmp_path / "style.safetensors", tiny_model)
    made = ldmrt.build_engines(tiny_model, tmp_path / "out", dtype="float32", loras=[(path, 0.8)])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert [record.model_dump() for record in made.manifest.loras] == [
        {"file": "style.safetensors", "sha256": digest, "scale": 0.8}
    ]
    old = {slot(record): record for record in Bundle.open(tiny_bundle).manifest.engines}
    for record in made.manifest.engines:
        fused = record.component not in ("decoder", "encoder")
        assert (record.key != old[slot(record)].key) == fused
        assert record.certificate.reference.endswith("float32, LoRAs fused" if fused else "float32")
        assert max(record.certificate.relative_error.values()) < 1e-5
    prompt: dict[str, Any] = {"prompt": "a red circle", "num_inference_steps": 3, "guidance_scale": 5.0}
    ours = Pipeline.from_bundle(made.path, device="cpu")(**prompt, seed=0, output_type="latent").latents
    generator = torch.Generator().manual_seed(0)
    theirs = fused_by_diffusers(tiny_model, {path: 0.8})(**prompt, generator=generator, output_type="latent").images
    assert (ours - theirs).norm() / theirs.norm() < 1e-5  # as in tests/test_parity.py
    # The same weights as those that a LoRA is added to in place.
    pipe = Pipeline.from_bundle(tiny_bundle, device="cpu")
    pipe.load_lora(path, 0.8)
    assert torch.equal(pipe(**prompt, seed=0, output_type="latent").latents, ours)

    before = contents(made.path)
    for loras, message in (
        ([], r"with style\.safetensors:0\.8 fused, this build is with no LoRA"),
        ([(path, 0.5)], r"with style\.safetensors:0\.8 fused, this build is with style\.safetensors:0\.5"),
    ):
        with pytest.raises(BuildError, match=message):
            ldmrt.build_engines(tiny_model, made.path, dtype="float32", loras=loras)
    assert contents(made.path) == before


def test_the_audit_sees_fused_weights(tiny_model: Path, tmp_path: Path, write_lora: Any) -> None:
    path = write_lora(tmp_path / "style.safetensors", tiny_model)
    with pytest.raises(BuildError, match=r"the weight .* reaches .*, float16 holds at most 65504"):
        ldmrt.build_engines(tiny_model, tmp_path / "out", dtype="float16", loras=[(path, 1e9)])
    assert not (tmp_path / "out").exists()


def test_a_lora_in_the_models_own_folder_is_refused(tiny_model: Path, tmp_path: Path, write_lora: Any) -> None:
    path = write_lora(tmp_path / "style.safetensors", tiny_model)
    before = contents(tiny_model)
    with pytest.raises(BuildError, match="cannot hold a LoRA; choose another --out"):
        ldmrt.build_engines(tiny_model, tiny_model, dtype="float32", loras=[(path, 1.0)])
    assert contents(tiny_model) == before


# ---------------------------------------------------------------------------------------------------- keys


def small_graph(value: float = 1.0, constant: float = 0.5) -> Graph:
    f32 = torch.float32
    return Graph(
        name="decoder",
        inputs=(TensorSpec("x", (2, 3), f32),),
        weights={},
        constants={"c": torch.full((3,), constant)},
        nodes=(
            Node("n", "aten.mul.Tensor", (Ref("x"), value), {}, (2, 3), f32),
            Node("m", "aten.add.Tensor", (Ref("n"), Ref("c")), {}, (2, 3), f32),
        ),
        outputs={"y": "m"},
    )


def test_the_key_changes_with_each_part(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def key(
        graph: Graph | None = None,
        size: tuple[int, int] | None = (64, 64),
        rows: int | None = 2,
        digest: str = "0",
        dtype: str = "float32",
        engine: str = "torch",
    ) -> str:
        options = Options(engine, dtype, ((64, 64),), (1,))
        build = _Build(Source.open(tiny_model), BundleFolder(tmp_path), options, lambda _what, _done, _total: None)
        build.weights = {"vae": FileRecord(file="weights/vae", sha256=digest * 64)}
        return build.key(_Draft(graph or small_graph(), size, rows, dtype), "vae")

    version = importlib.metadata.version
    keys = {
        "as it is": key(),
        "graph": key(small_graph(value=2.0)),
        "type of an argument": key(small_graph(value=1)),
        "constant": key(small_graph(constant=0.25)),
        "size": key(size=(64, 72)),
        "size turned": key(size=(72, 64)),
        "rows": key(rows=1),
        "free rows": key(rows=None),
        "weights": key(digest="1"),
        "dtype": key(dtype="bfloat16"),
        "engine": key(engine="onnxruntime"),
    }
    assert keys["as it is"] == key()
    for library in ("torch", "diffusers", "transformers"):
        with monkeypatch.context() as patch:
            patch.setattr(
                importlib.metadata, "version", lambda name, library=library: version(name) + "+1" * (name == library)
            )
            keys[library] = key()
    with monkeypatch.context() as patch:
        patch.setattr(ldmrt, "__version__", "99")
        keys["ldmrt"] = key()
    assert len(set(keys.values())) == len(keys), keys


@pytest.mark.slow
def test_a_damaged_engine_is_built_again(bundle: Path, tiny_model: Path) -> None:
    record = Bundle.open(bundle).find("decoder")[0]
    good = (bundle / record.files[0].file).read_bytes()
    (bundle / record.files[0].file).write_text("{}")
    ldmrt.build_engines(tiny_model, bundle, dtype="float32", batch_sizes=(1, 2))
    assert (bundle / record.files[0].file).read_bytes() == good


# ---------------------------------------------------------------------------------------------------- other models


def half(path: Path) -> None:
    save_file({name: tensor.half() for name, tensor in load_file(path).items()}, path)


@pytest.mark.slow
def test_in_place_from_half_precision(tiny_model: Path, tmp_path: Path) -> None:
    """The model's own folder becomes the bundle: its weights are used as they lie, here in float16, and computed in float32."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    for path in model.rglob("*.safetensors"):
        half(path)
    before = contents(model)
    bundle = ldmrt.build_engines(model, model, dtype="float32")
    after = contents(model)
    assert before.items() <= after.items()
    assert {name.partition("/")[0] for name in set(after) - set(before)} == {MANIFEST, "graphs"}
    assert {name: record.file for name, record in bundle.manifest.weights.items()} == {
        "text_encoder": "text_encoder/model.safetensors",
        "unet": "unet/diffusion_pytorch_model.safetensors",
        "vae": "vae/diffusion_pytorch_model.safetensors",
    }
    new = sum((model / name).stat().st_size for name in set(after) - set(before))
    assert new < sum(path.stat().st_size for path in model.rglob("*.safetensors") if path.parent.name != "graphs")
    # float32 sums of the same rounded weights, on both sides: the limit of float32 holds.
    assert max(max(engine.certificate.relative_error.values()) for engine in bundle.manifest.engines) < 1e-5
    assert draw(model).images.std() > 0.01
    again = ldmrt.build_engines(model, model, dtype="float32")
    assert again.manifest == bundle.manifest
    assert Source.open(model).name == "model"


def test_a_model_stored_in_other_ways_gives_the_same_pictures(
    tiny_model: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Old names in the VAE, the text encoder's prefix there or not, the U-Net in shards."""
    model = Path(shutil.copytree(tiny_model, tmp_path / "model"))
    vae, text, unet = (
        model / name
        for name in (
            "vae/diffusion_pytorch_model.safetensors",
            "text_encoder/model.safetensors",
            "unet/diffusion_pytorch_model.safetensors",
        )
    )
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    tensors = load_file(vae)
    for new_name, old_name in old.items():
        tensors = {name.replace(new_name, old_name): tensor for name, tensor in tensors.items()}
    save_file(tensors, vae)
    tensors = load_file(text)
    prefixed = any(name.startswith("text_model.") for name in tensors)
    save_file({n.removeprefix("text_model.") if prefixed else f"text_model.{n}": t for n, t in tensors.items()}, text)
    tensors = load_file(unet)
    parts = {f"diffusion_pytorch_model-0000{i + 1}-of-00003.safetensors": sorted(tensors)[i::3] for i in range(3)}
    for name, held in parts.items():
        save_file({key: tensors[key] for key in held}, unet.with_name(name))
    index = {"weight_map": {key: name for name, held in parts.items() for key in held}}
    unet.with_name("diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    unet.unlink()

    bundle = ldmrt.build_engines(model, tmp_path / "out", dtype="float32")
    ours, theirs = draw(bundle.path), draw(tiny_bundle)
    assert torch.equal(ours.latents, theirs.latents)
    assert (ours.images == theirs.images).all()


def test_bfloat16_beside_float32(bundle: Path, tiny_model: Path) -> None:
    before = contents(bundle)
    ldmrt.build_engines(tiny_model, bundle, dtype="bfloat16")
    engines = Bundle.open(bundle).manifest.engines
    ours = [engine for engine in engines if engine.dtype == "bfloat16"]
    assert {engine.component for engine in ours} == {engine.component for engine in engines}
    assert all(0 < max(engine.certificate.relative_error.values()) <= 3e-2 for engine in ours)
    assert {
        name: state for name, state in before.items() if name.startswith(("graphs/", "weights/"))
    }.items() <= contents(bundle).items()
    single, brain = draw(bundle, dtype="float32"), draw(bundle, dtype="bfloat16")
    # 8 bits of precision, over three steps and with guidance 5, which amplifies them.
    error = (single.latents - brain.latents).norm() / single.latents.norm()
    assert 1e-4 < error < 0.1


def test_sizes_that_latents_cannot_have(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="size 60x64 is not a multiple of 8 pixels each way"):
        ldmrt.build_engines(tiny_model, tmp_path / "out", sizes=[(60, 64)], dtype="float32")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engine": "tensorflow"}, "engine 'tensorflow' is not known"),
        ({"dtype": "int4"}, "dtype 'int4' is not known"),
        ({"engine": "onnxruntime", "dtype": "bfloat16"}, "float32 only, bfloat16 was asked for"),
        ({"batch_sizes": ()}, "batch sizes are"),
        ({"batch_sizes": (0,)}, "batch sizes are"),
        ({"batch_sizes": (32,)}, "from 1 to 31"),
        ({"sizes": []}, "size"),
        ({"sizes": [(0, 64)]}, "not a multiple of 8"),
    ],
)
def test_options_that_cannot_be(tiny_model: Path, tmp_path: Path, arguments: Any, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        ldmrt.build_engines(tiny_model, tmp_path / "out", **arguments)
    assert not (tmp_path / "out").exists()
