"""What the user names becomes a source: the folder of a U-Net, with a base model that has the rest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

import ldmrt
from ldmrt.errors import BuildError
from ldmrt.export.resolve import resolve
from ldmrt.pipeline import Pipeline
from tests.test_inpainting import QUICK, half, picture


@pytest.mark.slow
def test_the_folder_of_a_unet(tiny_model: Path, tiny_model_inpainting: Path, tmp_path: Path) -> None:
    """It makes the pictures of a model whose folder has that U-Net among the base model's components."""
    unet = tiny_model_inpainting / "unet"
    source = resolve(unet, base=tiny_model)
    assert source.kind.inpainting
    assert source.name == "unet"
    assert [weights.path.parent for weights in source.weights("unet")] == [unet]
    whole = shutil.copytree(tiny_model, tmp_path / "whole", ignore=shutil.ignore_patterns("unet"))
    shutil.copytree(unet, whole / "unet")
    index = json.loads((whole / "model_index.json").read_text())
    (whole / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionInpaintPipeline"}))
    latents = []
    for number, (model, base) in enumerate(((unet, tiny_model), (whole, None))):
        built = ldmrt.build_engines(model, tmp_path / str(number), base=base, dtype="float32")
        made = Pipeline.from_bundle(built.path, "cpu")("a circle", image=picture(1), mask_image=half(), **QUICK)
        latents.append(made.latents)
    assert torch.equal(*latents)


def test_a_folder_that_is_no_unet(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"is no U-Net: expected a folder with a config\.json"):
        resolve(tmp_path, base=tiny_model)
    with pytest.raises(BuildError, match="is not a model folder"):
        resolve(tiny_model / "unet")
    with pytest.raises(BuildError, match=r"is of AutoencoderKL, expected UNet2DConditionModel"):
        resolve(tiny_model / "vae", base=tiny_model)
    other = shutil.copytree(tiny_model / "unet", tmp_path / "unet")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "cross_attention_dim": 48}))
    with pytest.raises(BuildError, match="reads text of width 48, its text encoders make 32"):
        resolve(other, base=tiny_model)
