"""Tiles: where they lie, how they are put together, and how far that is from a picture decoded whole."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, strategies as st

import ldmrt
from ldmrt import residency
from ldmrt.errors import BuildError
from ldmrt.memory_plan import MemoryPlan, Need, Stage, plan
from ldmrt.opening import builtin_bundle
from ldmrt.pipeline import Pipeline
from ldmrt.tiling import Tiling

PROMPTS = (
    "a red circle on a white background",
    "a green triangle left of a yellow circle",
    "a blue square",
    "a red square above a blue circle",
)
sides = st.tuples(st.integers(1, 40), st.integers(1, 40)).map(sorted)


@given(sides, sides)
def test_tiles_cover_the_latents_and_overlap_by_a_quarter(across: list[int], down: list[int]) -> None:
    tiling = Tiling((across[1], down[1]), (across[0], down[0]))
    assert len(tiling) == len(list(tiling)) == len(tiling.starts[0]) * len(tiling.starts[1])
    for starts, (part, whole) in zip(tiling.starts, (across, down), strict=True):
        assert (starts[0], starts[-1]) == (0, whole - part)
        strides = [second - first for first, second in pairwise(starts)]
        assert all(0 < stride <= max(1, part - part // 4) for stride in strides)
        # Spread evenly, and no more of them than it takes.
        assert max(strides, default=0) - min(strides, default=0) <= 1
        assert len(starts) == 1 or whole > part + (len(starts) - 2) * max(1, part - max(1, part // 4))


@given(sides, sides, st.integers(1, 4))
def test_a_decoder_that_looks_at_nothing_but_a_cell_gives_the_picture_itself(
    across: list[int], down: list[int], cell: int
) -> None:
    """Without norms, attention and edges nothing differs between tiles: what is left is how they are put together."""
    tiling = Tiling((across[1], down[1]), (across[0], down[0]))
    latents = torch.randn(3, down[1], across[1], generator=torch.Generator().manual_seed(1))

    def decode(cells: torch.Tensor) -> torch.Tensor:
        return cells.repeat_interleave(cell, -1).repeat_interleave(cell, -2)

    # The shares of a pixel, of four tiles at most each way, add up to 1 but for their rounding.
    assert torch.allclose(tiling.blend(decode(tiling.cut(latents))), decode(latents), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_picture_has_the_decoders_precision(dtype: torch.dtype) -> None:
    tiling = Tiling((6, 5), (4, 4))
    assert tiling.blend(torch.ones(len(tiling), 3, 32, 32, dtype=dtype)).dtype == dtype


@pytest.fixture(scope="module")
def latents() -> torch.Tensor:
    """Of pictures with large shapes, which a tile sees parts of."""
    pipe = Pipeline.from_bundle()
    return pipe(PROMPTS, seed=1, num_inference_steps=8, num_images_per_prompt=2, output_type="latent").latents


def test_against_a_picture_decoded_whole_and_diffusers_tiles(latents: torch.Tensor) -> None:
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL.from_pretrained(builtin_bundle() / "vae").eval()
    side = latents.shape[-1] // 2
    tiling = Tiling((latents.shape[-1], latents.shape[-2]), (side, side))
    latents = latents / vae.config.scaling_factor
    with torch.inference_mode():
        whole = vae.decode(latents).sample
        ours = torch.stack([tiling.blend(vae.decode(tiling.cut(one)).sample) for one in latents])
        vae.enable_tiling()
        vae.tile_latent_min_size, vae.tile_sample_min_size = side, vae.config.sample_size // 2
        theirs = vae.decode(latents).sample
    # Tiles of 64 x 64 of a flat picture have other statistics than the whole of it: the group norms make the difference, and
    # blending spreads it. diffusers' own tiles, as large and as many, say how much of it has to be borne.
    error, peer = (float((tiled - whole).norm() / whole.norm()) for tiled in (ours, theirs))
    assert 0 < error < peer < 0.2

    # No seam: along the edges of tiles, where one of them comes in, neighbouring pixels differ from those of the whole picture no more than
    # elsewhere, but for chance. Of tiles put side by side they do.
    cell = whole.shape[-1] // latents.shape[-1]
    edges = [cell * start - 1 for start in tiling.starts[0][1:]]
    edges += [cell * (start + side) - 1 for start in tiling.starts[0][:-1]]

    def roughness(picture: torch.Tensor) -> float:
        steps = ((picture - whole).diff(dim=-1)).abs().mean(dim=(0, 1, 2))
        return float(steps[sorted(set(edges))].mean() / steps.mean())

    hard = torch.stack([_put_side_by_side(vae, one, side) for one in latents])
    assert roughness(ours) < 1.2
    assert roughness(hard) > 3


@torch.inference_mode()
def _put_side_by_side(vae: Any, latents: torch.Tensor, side: int) -> torch.Tensor:
    vae.disable_tiling()
    rows = [
        vae.decode(torch.stack(torch.split(row, side, dim=-1))).sample for row in torch.split(latents, side, dim=-2)
    ]
    return torch.cat([torch.cat(list(row), dim=-1) for row in rows], dim=-2)


# ---------------------------------------------------------------------------------------------------- in a pipeline


@pytest.fixture(scope="module")
def tiled_bundle(tiny_model: Path, tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tiny_bundle` and a decoder of 32 x 32."""
    out = shutil.copytree(tiny_bundle, tmp_path_factory.mktemp("bundles") / "tiled")
    options: dict[str, Any] = {"dtype": "float32", "batch_sizes": (1, 2), "decoder_tile": 32}
    return ldmrt.build_engines(tiny_model, out, **options).path


def test_a_decoder_for_tiles_is_built_and_verified(tiled_bundle: Path, tiny_bundle: Path) -> None:
    before, after = (ldmrt.Bundle.open(path).manifest.engines for path in (tiny_bundle, tiled_bundle))
    added = [record for record in after if record not in before]
    assert [(record.component, record.size, record.rows) for record in added] == [
        ("decoder", (32, 32), 1),
        ("decoder", (32, 32), 2),
    ]
    assert all(record.certificate.status == "verified" for record in added)
    assert Pipeline.from_bundle(tiled_bundle).defaults.sizes == ((64, 64),)


def test_a_budget_too_small_for_the_decoder_leads_to_tiles(tiled_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments: dict[str, Any] = {"num_inference_steps": 3, "seed": 1, "num_images_per_prompt": 3, "output_type": "np"}
    whole = Pipeline.from_bundle(tiled_bundle)("a red circle", **arguments)

    def with_a_greedy_decoder(budget: int, needs: dict[Stage, Need], **options: Any) -> MemoryPlan:
        """As of a large picture; that of a tiny model takes less than its step."""
        decode = needs["decode"]
        working = {rows: 100 * nbytes for rows, nbytes in decode.working.items()}
        return plan(budget, {**needs, "decode": Need(decode.weights, working)}, **options)

    monkeypatch.setattr(residency, "plan", with_a_greedy_decoder)
    made = Pipeline.from_bundle(tiled_bundle, memory_budget="1GB").memory_plan()
    assert made is not None
    assert made.tile is None
    tight = Pipeline.from_bundle(tiled_bundle, memory_budget="20MB")
    made = tight.memory_plan()
    assert made is not None
    assert (made.tile, made.staged) == ((32, 32), ())
    tiled = tight("a red circle", **arguments)
    assert torch.equal(tiled.latents, whole.latents)
    assert tiled.images.shape == whole.images.shape
    # Random weights: the picture is noise, of which tiles keep what is local.
    assert 0 < abs(tiled.images - whole.images).mean() < 0.1


@pytest.mark.parametrize(
    ("tile", "message"),
    [
        (0, "is 0 pixels, expected a multiple of 8; use 8"),
        (30, "is 30 pixels, expected a multiple of 8; use 32"),
        (64, r"is 64 pixels, and no size is larger \(64x64\); use a smaller tile"),
    ],
)
def test_a_tile_that_is_of_no_use(tiny_model: Path, tmp_path: Path, tile: int, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        ldmrt.build_engines(tiny_model, tmp_path / "bundle", decoder_tile=tile)
