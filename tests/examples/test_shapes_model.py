"""The shipped shapes model: its files, that stock diffusers loads it, and that it draws."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "ldmrt" / "builtin" / "shapes"
MOST_BYTES = 24_000_000

pytestmark = pytest.mark.skipif(not (FOLDER / "model_index.json").exists(), reason="the model is not in this tree")


def test_the_weights_are_small_and_half() -> None:
    safetensors = pytest.importorskip("safetensors")
    files = [file for name in ("text_encoder", "unet", "vae") for file in (FOLDER / name).glob("*.safetensors")]
    assert len(files) == 3
    assert sum(file.stat().st_size for file in files) <= MOST_BYTES
    for file in files:
        with safetensors.safe_open(file, framework="np") as weights:
            kinds = {weights.get_slice(name).get_dtype() for name in weights.keys()}  # noqa: SIM118
        assert kinds == {"F16"}


def test_the_configurations_speak_of_nothing_else() -> None:
    names = ("scheduler", "text_encoder", "tokenizer", "unet", "vae")
    for file in [FOLDER / "model_index.json", *(file for name in names for file in (FOLDER / name).glob("*.json"))]:
        text = file.read_text()
        json.loads(text)
        assert "_name_or_path" not in text
        if file.name != "vocab.json":
            assert not re.search(r"/(home|work|tmp|root|usr)\b|20\d\d-\d\d", text)


def test_the_tokenizer_is_the_examples_own(tmp_path: Path) -> None:
    tokenizer = pytest.importorskip("tokenizer")
    tokenizer.save_tokenizer(tmp_path, 20)
    for file in sorted(tmp_path.iterdir()):
        assert file.read_bytes() == (FOLDER / "tokenizer" / file.name).read_bytes()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_stock_diffusers_draws_what_captions_say() -> None:
    pytest.importorskip("diffusers")
    pytest.importorskip("transformers")
    sampler = pytest.importorskip("sampler")
    evaluate = pytest.importorskip("evaluate")
    pipeline = sampler.load(FOLDER, "cpu")
    scenes = evaluate.unseen_scenes(8, left_out=False)
    pictures = sampler.sample(pipeline, [scene.caption for scene in scenes], range(8))
    assert [picture.shape for picture in pictures] == [(128, 128, 3)] * 8
    scores = evaluate.score(scenes, pictures)
    assert scores["background"].right >= 7
    assert scores["one_object"].right >= 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_evaluate_writes_its_figures(tmp_path: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    typer = pytest.importorskip("typer")
    pytest.importorskip("diffusers")
    evaluate = pytest.importorskip("evaluate")
    app = typer.Typer()
    app.command()(evaluate.main)
    output = tmp_path / "results.json"
    arguments = ["--model", str(FOLDER), "--output", str(output)]
    arguments += ["--count", "4", "--left-out", "2", "--reconstructions", "4"]
    result = testing.CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    results = json.loads(output.read_text())
    assert results["unseen"]["background"]["of"] == 4
    assert results["autoencoder"]["psnr_mean_db"] > 30
