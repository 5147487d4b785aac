"""Certificates that are completed on the target."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from ldmrt.bundle import Bundle
from ldmrt.cli import app
from ldmrt.errors import BuildError, BundleError
from ldmrt.manifest import FileRecord, write_manifest
from ldmrt.verify import Trial, complete, read_trials, run_trials, waiting, write_trials

CPU = torch.device("cpu")


@pytest.fixture
def foreign(tiny_bundle: Path, tmp_path: Path) -> Bundle:
    """A bundle two of whose engines wait to be verified on sm_89, one of them part of a whole network."""
    bundle = Bundle.open(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    (bundle.path / "trials").mkdir()
    engines = []
    for engine in bundle.manifest.engines:
        record = engine
        if record.component in ("step", "decoder") and record.rows == 1:
            latents = {"latents": torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1))}
            more = {"timesteps": torch.tensor([999.0, 20.0]), "encoder_hidden_states": torch.randn(2, 77, 32)}
            trials = [Trial("real", latents | (more if record.component == "step" else {}))]

            def load(component: str, record: object = record) -> object:
                return bundle.load(bundle.find(component, size=None)[0], CPU)

            made = run_trials(record, trials, load)  # type: ignore[arg-type]
            name = f"trials/{record.component}-00000000.safetensors"
            kept = FileRecord(file=name, sha256=write_trials(bundle.path / name, trials, made))
            certificate = record.certificate.model_copy(
                update={"status": "unverified: target absent", "relative_error": {}}
            )
            changes = {"targets": ("sm_89",), "trials": kept, "certificate": certificate}
            record = record.model_copy(update=changes)
        engines.append(record)
    write_manifest(bundle.path, bundle.manifest.model_copy(update={"engines": tuple(engines)}))
    return Bundle.open(bundle.path)


def test_trials_come_back(tmp_path: Path) -> None:
    trials = [Trial("random", {"input_ids": torch.arange(6).view(2, 3)}), Trial("real", {"x.y": torch.randn(2, 2)})]
    expected = [{"hidden_states": torch.randn(1, 2)}, {"image": torch.randn(3)}]
    write_trials(tmp_path / "t.safetensors", trials, expected)
    found, made = read_trials(tmp_path / "t.safetensors")
    assert [trial.kind for trial in found] == ["random", "real"]
    ours_all, theirs_all = [*(t.inputs for t in found), *made], [*(t.inputs for t in trials), *expected]
    for ours, theirs in zip(ours_all, theirs_all, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_file_that_holds_no_trials(tmp_path: Path) -> None:
    write_trials(tmp_path / "t.safetensors", [Trial("real", {"x": torch.ones(1)})], [{}])
    with pytest.raises(BundleError, match="holds no whole trials; build the bundle again"):
        read_trials(tmp_path / "t.safetensors")


def test_what_agrees_is_verified_and_kept(foreign: Bundle) -> None:
    assert {record.component for record, _ in waiting(foreign)} == {"step", "decoder"}
    seen: list[str] = []
    done = complete(foreign, CPU, "sm_89", lambda what, _done, _total: seen.append(what))
    assert {record.component for record in done} == {"step", "decoder"}
    assert len(seen) == 2
    again = Bundle.open(foreign.path)
    assert not waiting(again)
    for record in again.manifest.engines:
        assert record.certificate.status == "verified"
        if record.trials is not None:
            assert record.certificate.reference.endswith(", on sm_89")
            assert 0 <= record.certificate.relative_error["real"] < record.certificate.tolerance


def test_engines_for_other_gpus_are_left_alone(foreign: Bundle) -> None:
    before = (foreign.path / "ldmrt.json").read_bytes()
    assert complete(foreign, CPU, "sm_120") == []
    assert (foreign.path / "ldmrt.json").read_bytes() == before


def test_what_does_not_agree_stays_unverified(foreign: Bundle) -> None:
    record, kept = next(pair for pair in waiting(foreign) if pair[0].component == "decoder")
    trials, made = read_trials(foreign.locate(kept.file))
    wrong = [{name: tensor * 1.01 for name, tensor in outputs.items()} for outputs in made]
    changed = FileRecord(file=kept.file, sha256=write_trials(foreign.locate(kept.file), trials, wrong))
    engines = tuple(
        e.model_copy(update={"trials": changed}) if e.key == record.key else e for e in foreign.manifest.engines
    )
    write_manifest(foreign.path, foreign.manifest.model_copy(update={"engines": engines}))
    before = (foreign.path / "ldmrt.json").read_bytes()
    with pytest.raises(BuildError, match=r"decoder .*relative error 9\.9"):
        complete(Bundle.open(foreign.path), CPU, "sm_89")
    assert (foreign.path / "ldmrt.json").read_bytes() == before


def test_damaged_trials_are_found(foreign: Bundle) -> None:
    _, kept = waiting(foreign)[0]
    path = foreign.locate(kept.file)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    with pytest.raises(BundleError, match="is damaged: its SHA-256"):
        complete(foreign, CPU, "sm_89")


def test_the_command_without_the_target(foreign: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ldmrt.engines.tensorrt.gpu_at_hand", lambda: None)
    result = CliRunner().invoke(app, ["verify", str(foreign.path)])
    assert result.exit_code == 1
    assert "2 engines of" in result.stderr
    assert (
        "are still to be verified on sm_89, and there is no GPU here; run `ldmrt verify` on a machine that has one"
        in result.stderr
    )


def test_the_command_with_nothing_left(tiny_bundle: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(tiny_bundle)])
    assert (result.exit_code, result.stdout) == (0, f"all engines of {tiny_bundle} are verified\n")
