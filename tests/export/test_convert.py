"""Pickled checkpoints become safetensors; a planted one runs nothing and writes nothing."""

from __future__ import annotations

import io
import os
import pickle
import subprocess
import sys
import types
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ldmrt.errors import BuildError
from ldmrt.export import convert as module
from ldmrt.export.convert import Converted, convert

TENSORS = {
    "model.diffusion_model.a.weight": torch.arange(12.0).reshape(3, 4),
    "model.diffusion_model.b": torch.ones(2, dtype=torch.float16),
    "first_stage_model.c": torch.zeros(0, dtype=torch.bfloat16),
}


def here(source: Path, target: Path, *, averaged: bool = True) -> Converted:
    """`convert` without the process of its own, which takes two seconds to start."""
    return module._convert(source, target, averaged=averaged)


def same(path: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(path)
    assert set(found) == set(expected)
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in expected.items()
    )


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "nest",
    [
        lambda tensors: tensors,
        lambda tensors: {
            "state_dict": tensors,
            "epoch": 3,
            "global_step": 7,
            "hyper_parameters": {"lr": [1, 2.0, None]},
        },
        lambda tensors: {"model": {"state_dict": tensors}},
    ],
    ids=["bare", "lightning", "twice"],
)
def test_tensors_come_over(nest: Callable[[Any], Any], legacy: bool, tmp_path: Path) -> None:
    torch.save(nest(TENSORS), tmp_path / "a.ckpt", _use_new_zipfile_serialization=not legacy)
    made = here(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    same(tmp_path / "a.safetensors", TENSORS)
    assert (made.tensors, made.averaged, made.nbytes) == (3, 0, 52)


def test_the_file_alone_is_left(tmp_path: Path) -> None:
    torch.save({"state_dict": TENSORS, "epoch": 1}, tmp_path / "a.ckpt")
    assert convert(tmp_path / "a.ckpt", tmp_path / "a.safetensors") == Converted(3, 52, 0, 0)
    same(tmp_path / "a.safetensors", TENSORS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "a.safetensors"]


def test_tied_and_strided_tensors_are_written_out(tmp_path: Path) -> None:
    tensor = torch.arange(6.0).reshape(2, 3)
    tensors = {"a": tensor, "b": tensor.T, "c": tensor[:, 1], "d": torch.nn.Parameter(tensor)}
    torch.save(tensors, tmp_path / "a.pt")
    here(tmp_path / "a.pt", tmp_path / "a.safetensors")
    same(tmp_path / "a.safetensors", tensors)


def averages() -> dict[str, torch.Tensor]:
    """As the original code keeps them: of the network alone, their names without dots."""
    names = {name for name in TENSORS if name.startswith("model.")}
    return {f"model_ema.{name.removeprefix('model.').replace('.', '')}": TENSORS[name] + 1 for name in names}


def test_averages_take_the_place_of_the_last_values(tmp_path: Path) -> None:
    torch.save({"state_dict": {**TENSORS, **averages(), "model_ema.decay": torch.ones(1)}}, tmp_path / "a.ckpt")
    made = here(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert (made.tensors, made.averaged, made.left_out) == (3, 2, 3)
    same(tmp_path / "a.safetensors", {n: t + 1 if n.startswith("model.") else t for n, t in TENSORS.items()})
    assert here(tmp_path / "a.ckpt", tmp_path / "b.safetensors", averaged=False).averaged == 0
    same(tmp_path / "b.safetensors", TENSORS)


def test_averages_that_are_not_complete_are_left_out(tmp_path: Path) -> None:
    torch.save({**TENSORS, **dict(list(averages().items())[:1])}, tmp_path / "a.ckpt")
    assert here(tmp_path / "a.ckpt", tmp_path / "a.safetensors").averaged == 0
    same(tmp_path / "a.safetensors", TENSORS)


def test_a_class_of_lightning_may_be_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its first versions wrote the class of a callback; it is a name to us, and nothing is imported."""
    name = "pytorch_lightning.callbacks.model_checkpoint"
    cls = type("ModelCheckpoint", (), {"__module__": name})
    for end in range(1, 4):
        part = ".".join(name.split(".")[:end])
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    monkeypatch.setattr(sys.modules[name], "ModelCheckpoint", cls, raising=False)
    torch.save({"callbacks": {cls: {"best": 0.5}}, "state_dict": TENSORS}, tmp_path / "a.ckpt")
    here(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    same(tmp_path / "a.safetensors", TENSORS)


# ---------------------------------------------------------------------------------------------------- payloads


class Planted:
    """Whoever unpickles it makes a file."""

    def __init__(self, mark: Path, how: str) -> None:
        self.mark, self.how = mark, how

    def __reduce__(self) -> tuple[Any, ...]:
        calls: dict[str, tuple[Any, ...]] = {
            "system": (os.system, (f"touch {self.mark}",)),
            "eval": (eval, (f"__import__('pathlib').Path({str(self.mark)!r}).touch()",)),
            "path": (Path.touch, (self.mark,)),
        }
        return calls[self.how]


def bare_pickle(path: Path, held: Any) -> None:
    path.write_bytes(pickle.dumps(held, protocol=2))


def legacy(path: Path, held: Any) -> None:
    torch.save(held, path, _use_new_zipfile_serialization=False)


def foreign_zip(path: Path, held: Any) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(held, protocol=2))
        archive.writestr("archive/version", "3")


@pytest.mark.parametrize("how", ["system", "eval", "path"])
@pytest.mark.parametrize("save", [lambda path, held: torch.save(held, path), legacy, bare_pickle, foreign_zip])
def test_a_payload_is_refused_and_never_run(save: Callable[[Path, Any], None], how: str, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    save(
        tmp_path / "a.ckpt",
        {"state_dict": {"a": torch.ones(1) if save is not bare_pickle else 1, "b": Planted(mark, how)}},
    )
    # It is one: an ordinary unpickler would run it.
    pickle.loads(pickle.dumps(Planted(mark, how)))  # noqa: S301
    assert mark.exists()
    mark.unlink()
    with pytest.raises(BuildError, match=r"refused, and none of it was run|no checkpoint that torch reads") as caught:
        here(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_what_was_asked_for_is_named(tmp_path: Path) -> None:
    torch.save({"a": Planted(tmp_path / "mark", "system")}, tmp_path / "a.ckpt")
    (tmp_path / "a.safetensors").write_text("as it was")
    with pytest.raises(BuildError, match=r"asks for posix\.system, which is more than tensors: refused"):
        convert(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.ckpt", "a.safetensors"]
    assert (tmp_path / "a.safetensors").read_text() == "as it was"


def cut(path: Path) -> None:
    stream = io.BytesIO()
    torch.save(TENSORS, stream)
    path.write_bytes(stream.getvalue()[:-300])


def expanded(path: Path) -> None:
    """A tensor of 4 bytes that claims 4 TB."""
    torch.save({"a": torch.ones(1).expand(1 << 40)}, path)


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "empty": (lambda path: path.touch(), "no checkpoint that torch reads"),
    "noise": (lambda path: path.write_bytes(b"\x00\x01" * 999), "no checkpoint that torch reads|refused"),
    "no tensors": (lambda path: torch.save({"epoch": 1}, path), r"holds no tensors by name \(found: epoch\)"),
    "a list": (lambda path: torch.save([torch.ones(1)], path), "holds no tensors by name"),
    "complex": (
        lambda path: torch.save({"a": torch.ones(1, dtype=torch.complex64)}, path),
        "a is torch.strided torch.complex64",
    ),
    "more than it is": (expanded, r"its tensors claim \d+"),
    "cut short": (cut, "no checkpoint that torch reads|refused"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case: str, tmp_path: Path) -> None:
    write, message = BAD[case]
    write(tmp_path / "a.ckpt")
    (tmp_path / "a.safetensors").write_text("as it was")
    with pytest.raises(BuildError, match=message) as caught:
        here(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert "\n" not in str(caught.value)
    assert (tmp_path / "a.safetensors").read_text() == "as it was"


def test_names_that_do_not_fit(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "a.ckpt")
    with pytest.raises(BuildError, match=r"is to hold safetensors; name it \S+b\.safetensors"):
        convert(tmp_path / "a.ckpt", tmp_path / "b.ckpt")
    with pytest.raises(BuildError, match=r"cannot write .*none.*choose another place"):
        convert(tmp_path / "a.ckpt", tmp_path / "none" / "b.safetensors")
    with pytest.raises(BuildError, match="no such file"):
        convert(tmp_path / "none.ckpt", tmp_path / "b.safetensors")
    (tmp_path / "c.safetensors").touch()
    with pytest.raises(BuildError, match="is safetensors already"):
        convert(tmp_path / "c.safetensors", tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("m._MEMORY = 1 << 28", "memory|cannot be read"),
        ("m._SECONDS = 1; m._read = lambda path: [0 for _ in iter(int, 1)]", "for too long"),
        (
            "import torch; m._tensors = lambda source, held: {'a': torch.ones(1 << 25)}",
            "cannot be converted: File too large",
        ),
    ],
    ids=["memory", "time", "size"],
)
def test_the_limits_hold(change: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each ends the process that reads, and is told in one line."""
    torch.save({"a": torch.ones(1 << 16)}, tmp_path / "a.ckpt")
    code = f"import sys; from pathlib import Path; from ldmrt.export import convert as m; {change}; "
    code += "m._main(Path(sys.argv[1]), Path(sys.argv[2]), averaged=True)"
    run = subprocess.run

    def changed(command: list[str], **options: Any) -> Any:
        return run([command[0], "-P", "-c", code, *command[4:]], **options)

    monkeypatch.setattr("subprocess.run", changed)
    with pytest.raises(BuildError, match=message):
        convert(tmp_path / "a.ckpt", tmp_path / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]
