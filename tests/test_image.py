"""Pixels against diffusers' VaeImageProcessor; files, what they say about themselves, and what a failure leaves behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldmrt.errors import BadRequest, NumericalError
from ldmrt.image import (
    FORMATS,
    Parameters,
    parameters_text,
    parse_parameters,
    read_parameters,
    save,
    to_float,
    to_pil,
    to_uint8,
)


@pytest.fixture
def images() -> torch.Tensor:
    """Values at, between and beyond all 256 levels and the halves between them."""
    levels = torch.linspace(-1.2, 1.2, 3 * 2 * 40 * 64)
    return levels[torch.randperm(len(levels), generator=torch.Generator().manual_seed(0))].view(2, 3, 40, 64)


def test_pixels_are_those_of_diffusers(images: torch.Tensor) -> None:
    processor = pytest.importorskip("diffusers.image_processor").VaeImageProcessor()
    halves = (torch.arange(-2, 514) / 510 * 2 - 1).repeat(3).view(1, 3, 12, 43)
    for batch in (images, halves):
        theirs = np.stack([np.asarray(picture) for picture in processor.postprocess(batch, output_type="pil")])
        ours = to_uint8(batch)
        assert ours.dtype == np.uint8
        assert ours.flags.c_contiguous
        assert np.array_equal(ours, theirs)
        assert np.array_equal(to_float(batch), processor.postprocess(batch, output_type="np"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_computed_in_float32(images: torch.Tensor, dtype: torch.dtype) -> None:
    assert np.array_equal(to_uint8(images.to(dtype)), to_uint8(images.to(dtype).float()))
    assert to_float(images.to(dtype)).dtype == np.float32


def test_channels_last_and_pil(images: torch.Tensor) -> None:
    pixels = to_uint8(images.contiguous(memory_format=torch.channels_last))
    assert np.array_equal(pixels, to_uint8(images))
    pictures = to_pil(pixels)
    assert [(picture.mode, picture.size) for picture in pictures] == [("RGB", (64, 40))] * 2
    assert np.array_equal(np.asarray(pictures[1]), pixels[1])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_not_a_number(images: torch.Tensor, bad: float) -> None:
    images[1, 2, 3, 4] = bad
    for convert in (to_uint8, to_float):
        with pytest.raises(NumericalError, match="hold 1 NaN or infinite values out of 15360"):
            convert(images)


def text(**changes: object) -> str:
    values: dict[str, object] = {"prompt": "a cat", "steps": 20, "sampler": "DDIM", "guidance_scale": 7.5, "seed": 1}
    values |= {"width": 512, "height": 768} | changes
    return parameters_text(**values)  # type: ignore[arg-type]


def test_parameters_are_written_as_the_web_ui_writes_them() -> None:
    assert text(negative_prompt="blurry", model="v1-5") == (
        "a cat\nNegative prompt: blurry\nSteps: 20, Sampler: DDIM, CFG scale: 7.5, Seed: 1, Size: 512x768, Model: v1-5"
    )
    assert text(guidance_scale=7.0, extra={"Clip skip": 2, "Note": 'one, "two": three'}) == (
        "a cat\nSteps: 20, Sampler: DDIM, CFG scale: 7, Seed: 1, Size: 512x768, Clip skip: 2,"
        ' Note: "one, \\"two\\": three"'
    )


@pytest.mark.parametrize(
    "prompt", ["", "a cat", "two\nlines: here", "a, b: c", "caf\u00e9 \u732b \U0001f600", 'q"uo"te \\']
)
@pytest.mark.parametrize("negative", ["", "blurry", "bad: x, y: z, w: v\nworse", "\u732b"])
@pytest.mark.parametrize("model", ["", "v1-5", "a, b", 'C:\\models\\"x"', " padded ", "line\nbreak", "\u732b"])
def test_parameters_come_back(prompt: str, negative: str, model: str) -> None:
    found = parse_parameters(text(prompt=prompt, negative_prompt=negative, model=model))
    settings = {"Steps": "20", "Sampler": "DDIM", "CFG scale": "7.5", "Seed": "1", "Size": "512x768"}
    assert found == Parameters(prompt, negative, settings | ({"Model": model} if model else {}))


def test_texts_of_others_are_read() -> None:
    assert parse_parameters("") == Parameters()
    assert parse_parameters("only a prompt") == Parameters("only a prompt")
    assert parse_parameters("ratio: 2, no settings") == Parameters("ratio: 2, no settings")
    found = parse_parameters(
        "masterpiece, <lora:x:0.8>\nNegative prompt: (bad:1.2),\nugly\nSteps: 28, Sampler: Euler a, CFG scale: 7, Seed: 9,"
        ' Size: 512x512, Model hash: 6ce0161689, Lora hashes: "x: 0a1b, y: 2c3d", Broken: "\\x", Version: v1.10.1'
    )
    assert found.prompt == "masterpiece, <lora:x:0.8>"
    assert found.negative_prompt == "(bad:1.2),\nugly"
    assert found.settings["Lora hashes"] == "x: 0a1b, y: 2c3d"
    assert found.settings["Broken"] == '"\\x"'
    assert found.settings["Version"] == "v1.10.1"


@pytest.mark.parametrize("suffix", [*FORMATS, ".PNG"])
@pytest.mark.parametrize("parameters", [None, "a cat\nSteps: 20", "caf\u00e9", "\u732b \U0001f600, " * 500])
def test_files_keep_pixels_and_parameters(tmp_path: Path, suffix: str, parameters: str | None) -> None:
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:, 8:] = (250, 40, 10)
    path = tmp_path / f"picture{suffix}"
    path.write_bytes(b"an older picture")
    save(pixels, path, parameters=parameters)
    assert read_parameters(path) == parameters
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with Image.open(path) as image:
        assert image.format == FORMATS[suffix.lower()][0]
        found = np.asarray(image.convert("RGB")).astype(int)
    assert found.shape == (16, 24, 3)
    assert np.abs(found - pixels)[:, [0, 1, 22, 23]].max() <= (0 if suffix.lower() == ".png" else 6)


def test_a_pil_image_with_alpha_is_kept_in_png(tmp_path: Path) -> None:
    save(Image.new("RGBA", (4, 4), (1, 2, 3, 4)), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode == "RGBA"


def test_a_mode_that_the_format_lacks(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="cannot write mode RGBA as JPEG"):
        save(Image.new("RGBA", (4, 4)), tmp_path / "a.jpg")


def test_png_chunk_is_called_parameters(tmp_path: Path) -> None:
    save(Image.new("RGB", (4, 4)), tmp_path / "a.png", parameters="a cat")
    assert b"tEXtparameters\0a cat" in (tmp_path / "a.png").read_bytes()


def test_parameters_of_files_without_any(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.gif")
    assert read_parameters(tmp_path / "a.gif") is None
    (tmp_path / "b.png").write_text("no picture")
    for name in ("b.png", "missing.png"):
        with pytest.raises(BadRequest, match="cannot be read as a picture"):
            read_parameters(tmp_path / name)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    before = sorted(tmp_path.iterdir())
    for name, says in (
        ("a.tiff", "unknown picture format '.tiff', expected one of: .png, .jpg, .jpeg, .webp"),
        ("a", "unknown picture format ''"),
        ("file/a.png", "file is a file: create it or choose another"),
        ("missing/a.png", "missing does not exist"),
        ("folder.png", "is a folder"),
    ):
        with pytest.raises(BadRequest) as caught:
            save(np.zeros((4, 4, 3), np.uint8), tmp_path / name)
        assert says in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.param == "out"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(("name", "parameters"), [("a.jpg", "x" * 70_000), ("a.png", "\ud800"), ("a.webp", "\ud800")])
def test_parameters_that_do_not_fit(tmp_path: Path, name: str, parameters: str) -> None:
    (tmp_path / name).write_bytes(b"before")
    with pytest.raises(BadRequest, match=r"do not fit (JPEG|PNG|WEBP)"):
        save(np.zeros((4, 4, 3), np.uint8), tmp_path / name, parameters=parameters)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [(name, b"before")]


def test_a_full_disk_leaves_the_old_picture(tmp_path: Path) -> None:
    program = """
import resource, sys
import numpy as np
from ldmrt.errors import BadRequest, LdmrtError
from ldmrt.image import save
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
for suffix in ("png", "jpg", "webp"):
    try:
        save(noise, f"{sys.argv[1]}/a.{suffix}")
    except LdmrtError as error:
        assert not isinstance(error, BadRequest)
        print(error)
"""
    for suffix in ("png", "jpg", "webp"):
        (tmp_path / f"a.{suffix}").write_bytes(b"before")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert all("cannot be written (File too large): make room or choose another place" in line for line in lines)
    assert sorted((file.name, file.read_bytes()) for file in tmp_path.iterdir()) == [
        (f"a.{suffix}", b"before") for suffix in ("jpg", "png", "webp")
    ]
