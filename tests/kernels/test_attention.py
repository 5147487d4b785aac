"""attention against softmax(scale q k^T + mask) v in float64, of the inputs as they were rounded."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from ldmrt.kernels import configurations, launch, native, tuning
from ldmrt.kernels.attention import attention, attention_native, attention_reference, attention_triton
from ldmrt.kernels.configurations import Choice, Problem, Tiles
from tests.kernels.levels import at_levels
from tests.kernels.oracle import DTYPES, HALF_UNIT, assert_rounded

BODIES = [
    pytest.param(attention_reference, id="reference"),
    pytest.param(attention_triton, id="triton", marks=pytest.mark.interpreted),
]
# Those that know no masks as well.
UNMASKED = [*BODIES, *at_levels(attention_native)]
HALF_DTYPES = [torch.bfloat16, torch.float16]
Body = Callable[..., Tensor]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


pytestmark = pytest.mark.usefixtures("bfloat16_in_the_interpreter")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def inputs(
    rows: int,
    query_tokens: int,
    key_tokens: int,
    heads: int,
    head_size: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    tokens = (query_tokens, key_tokens, key_tokens)
    query, key, value = (
        random(rows, count, heads * head_size, dtype=dtype, seed=seed, device=device)
        for seed, count in enumerate(tokens)
    )
    return query, key, value


def oracle(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: int,
    scale: float,
    causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The result in float64, and how far from it a body may be before it rounds the result."""
    result = torch.empty(query.shape, dtype=torch.float64, device=query.device)
    error = torch.empty_like(result)
    if mask is not None:
        mask = mask.expand(query.shape[0], heads, query.shape[1], key.shape[1])
    size = query.shape[2] // heads
    for row in range(query.shape[0]):
        for head in range(heads):
            columns = slice(head * size, (head + 1) * size)
            q, k, v = (tensor[row, :, columns].double() for tensor in (query, key, value))
            scores = scale * q @ k.mT
            # Float32 rounds the addition of a mask too.
            largest = scores.abs().nan_to_num(0, 0).max()
            if mask is not None and mask.dtype == torch.bool:
                scores = scores.masked_fill(~mask[row, head], -math.inf)
            elif mask is not None:
                scores = scores + mask[row, head]
            if causal:
                scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
            weights = scores.softmax(-1)
            if mask is not None:
                weights = weights.masked_fill((scores == -math.inf).all(-1, keepdim=True), 0)
            result[row, :, columns] = weights @ v
            error[row, :, columns] = weights @ v.abs() * _relative(query.dtype, float(largest))
    return result, error


def _relative(dtype: torch.dtype, largest: float) -> float:
    """How much the weights may be off, relative to them.

    float32 rounds a score relative to its size (and to the products summed in it, several times that), which the exponential
    turns into a relative error of the weight. Sums of hundreds of terms add a few more units. Half precisions round the
    weights to 11 or 8 bits; torch's body on the CPU rounds the scores' and the results' parts in its own places.
    """
    unit = HALF_UNIT[torch.float32]
    return unit * (32 + 8 * largest) + (2 * HALF_UNIT[dtype] if dtype in HALF_DTYPES else 0)


def assert_right(body: Body, *arguments: Any, **options: Any) -> None:
    found = body(*arguments, **options)
    assert found.dtype == arguments[0].dtype
    assert found.is_contiguous()
    assert_rounded(found, *oracle(*arguments, **options))


# --- Sizes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_size", [5, 8, 16, 40, 64, 80, 128, 160, 512])
@pytest.mark.parametrize("body", UNMASKED)
def test_head_sizes(body: Body, head_size: int, dtype: torch.dtype) -> None:
    heads = 1 if head_size == 512 else 3
    assert_right(body, *inputs(2, 33, 70, heads, head_size, dtype), heads, head_size**-0.5)


@pytest.mark.parametrize(
    ("query_tokens", "key_tokens"),
    [(1, 1), (1, 77), (7, 64), (64, 7), (64, 64), (77, 1), (77, 77), (77, 154), (9 * 15, 9 * 15), (11 * 5, 17 * 17)],
)
@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("body", UNMASKED)
def test_token_counts(body: Body, query_tokens: int, key_tokens: int, dtype: torch.dtype) -> None:
    assert_right(body, *inputs(1, query_tokens, key_tokens, 2, 16, dtype), 2, 0.25)


@pytest.mark.parametrize("rows", [1, 3, 16])
@pytest.mark.parametrize("body", UNMASKED)
def test_rows(body: Body, rows: int) -> None:
    assert_right(body, *inputs(rows, 20, 24, 2, 40, torch.float16), 2, 40**-0.5)


@pytest.mark.interpreted
@pytest.mark.parametrize("tiles", [(16, 32, 4, 1), (32, 64, 4, 2), (128, 128, 8, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_every_tiling_computes_the_same(tiles: tuple[int, int, int, int], causal: bool) -> None:
    arguments = (*inputs(1, 100, 128, 2, 40, torch.float16), 2, 40**-0.5, causal)
    assert_rounded(attention_triton(*arguments, tiles=Tiles(*tiles)), *oracle(*arguments))


@pytest.mark.interpreted
@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("head_size", [40, 72])
def test_every_architecture_s_parts_compute_the_same(arch: int, head_size: int) -> None:
    arguments = (*inputs(1, 40, 40, 2, head_size, torch.float16), 2, 0.2)
    with launch.recording(arch):
        assert_rounded(attention_triton(*arguments), *oracle(*arguments))


# --- Causal and masks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("query_tokens", "key_tokens"), [(77, 77), (64, 64), (7, 77), (77, 7), (130, 130)])
@pytest.mark.parametrize("body", BODIES)
def test_causal(body: Body, query_tokens: int, key_tokens: int) -> None:
    assert_right(body, *inputs(2, query_tokens, key_tokens, 2, 64, torch.float16), 2, 0.125, causal=True)


MASK_SHAPES = [
    (35,),
    (1,),
    (20, 35),
    (20, 1),
    (1, 1, 1, 35),
    (2, 1, 1, 35),
    (3, 20, 35),
    (1, 3, 1, 1),
    (2, 1, 20, 1),
    (2, 3, 20, 35),
]


def drawn_mask(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
    draw = random(*shape, seed=5)
    return draw > -0.5 if kind == torch.bool else torch.where(draw > -1, draw, -math.inf).to(kind)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("body", BODIES)
def test_masks(body: Body, shape: tuple[int, ...], kind: torch.dtype) -> None:
    assert_right(body, *inputs(2, 20, 35, 3, 16, torch.float16), 3, 0.25, mask=drawn_mask(shape, kind))


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("shape", [(35,), (2, 1, 20, 35)], ids=str)
@pytest.mark.parametrize("body", BODIES)
def test_a_mask_beside_the_causal_one(body: Body, shape: tuple[int, ...], kind: torch.dtype) -> None:
    """The first queries may be left without any key."""
    mask = drawn_mask(shape, kind)
    assert_right(body, *inputs(2, 20, 35, 3, 16, torch.float16), 3, 0.25, causal=True, mask=mask)


@pytest.mark.parametrize("body", BODIES)
def test_a_mask_that_is_a_view(body: Body) -> None:
    mask = (random(35, 20, 2, 3) > 0).permute(2, 3, 1, 0)
    assert_right(body, *inputs(2, 20, 35, 3, 16), 3, 0.25, mask=mask)


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
@pytest.mark.parametrize("body", BODIES)
def test_a_query_without_keys_gives_zeros(body: Body, kind: torch.dtype) -> None:
    mask = torch.ones(20, 35, dtype=torch.bool)
    mask[7] = False
    if kind == torch.float32:
        mask = torch.zeros(20, 35).masked_fill(~mask, -math.inf)
    found = body(*inputs(1, 20, 35, 2, 16), 2, 0.25, mask=mask)
    assert (found[:, 7] == 0).all()
    assert (found[:, 8] != 0).any()


@pytest.mark.parametrize("body", BODIES)
def test_the_lowest_finite_mask_on_every_key_is_a_mean(body: Body) -> None:
    """float32 loses the scores beside it, so all keys weigh the same."""
    query, key, value = inputs(1, 20, 35, 2, 16)
    found = body(query, key, value, 2, 0.25, mask=torch.full((20, 35), torch.finfo(torch.float32).min))
    torch.testing.assert_close(found, value.mean(1, keepdim=True).expand_as(found), rtol=1e-5, atol=1e-6)


# --- Strides -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_size", [40, 64])
@pytest.mark.parametrize("body", UNMASKED)
def test_slices_of_a_merged_projection(body: Body, head_size: int) -> None:
    query, key, value = random(2, 40, 3 * 2 * head_size, dtype=torch.float16).chunk(3, -1)
    assert_right(body, query, key, value, 2, head_size**-0.5)


@pytest.mark.parametrize("body", UNMASKED)
def test_slices_of_merged_keys_and_values(body: Body) -> None:
    """With rows and tokens further apart than in one allocation, the queries' tokens before their rows, and an odd offset."""
    merged = random(4, 2 * 50, 2 * 32 + 1, dtype=torch.float16)[::2, ::2, 1:]
    query = random(30, 2, 32, dtype=torch.float16).transpose(0, 1)
    assert_right(body, query, merged[..., :32], merged[..., 32:], 2, 0.25)


@pytest.mark.parametrize("body", UNMASKED)
def test_keys_and_values_from_different_allocations(body: Body) -> None:
    query = random(2, 20, 32, dtype=torch.float16)
    key = random(2, 3 * 50, 32, dtype=torch.float16, seed=1)[:, ::3]
    value = random(5, 50, 40, dtype=torch.float16, seed=2)[1:4:2, :, 8:]
    assert_right(body, query, key, value, 2, 0.25)


@pytest.mark.parametrize("body", UNMASKED)
def test_one_text_for_all_rows(body: Body) -> None:
    query, key, value = inputs(3, 20, 11, 2, 16)
    assert_right(body, query, key[:1].expand(3, -1, -1), value[:1].expand(3, -1, -1), 2, 0.25)


# --- Numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [-100.0, 100.0])
@pytest.mark.parametrize("body", UNMASKED)
def test_scores_far_from_zero(body: Body, offset: float) -> None:
    """Scores of thousands, which an exponential without the maximum taken off would turn into infinity or zero."""
    query, key, value = inputs(1, 20, 70, 2, 64)
    assert_right(body, query.abs(), key + offset, value, 2, 0.5)


@pytest.mark.parametrize("body", UNMASKED)
def test_the_maximum_may_come_last(body: Body) -> None:
    """Each key outweighs all before it, so that every block rescales what was summed."""
    query, key, value = inputs(1, 20, 200, 2, 16)
    assert_right(body, query.abs() + 0.1, key + torch.arange(200.0)[:, None], value, 2, 0.25)


# The interpreter computes with numpy, which warns of what a GPU does silently.
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("body", UNMASKED)
def test_what_is_not_finite_stays_in_its_row(body: Body, where: str, bad: float) -> None:
    tensors = dict(zip(("query", "key", "value"), inputs(3, 20, 40, 2, 40, torch.float16), strict=True))
    expected = body(**tensors, heads=2, scale=0.25)
    tensors[where][1, 4, 43] = bad  # of head 1, beside what head 0 is padded with
    found = body(**tensors, heads=2, scale=0.25)
    torch.testing.assert_close(found[::2], expected[::2], rtol=0, atol=0)
    torch.testing.assert_close(found[1, :, :40], expected[1, :, :40], rtol=0, atol=0)
    reached = found[1, 4, 43] if where == "query" else found[1, :, 43]
    # An infinite key takes all of the weight of a query, or none of it.
    assert not reached.isfinite().any() or (where == "key" and math.isinf(bad))
    if where == "query":
        assert found[1, :4].isfinite().all()


# --- The operator --------------------------------------------------------------------------------------------------------


def test_on_the_cpu_it_is_the_native_body() -> None:
    if not native.available():
        pytest.skip(str(native.why_not()))
    arguments = (*inputs(2, 600, 130, 2, 16), 2, 0.25)
    assert torch.equal(attention(*arguments), attention_native(*arguments))


def test_of_few_scores_on_the_cpu_it_is_the_reference() -> None:
    arguments = (*inputs(2, 20, 35, 2, 16), 2, 0.25)
    assert torch.equal(attention(*arguments), attention_reference(*arguments))


@pytest.mark.parametrize("causal", [False, True])
def test_masks_on_the_cpu_are_the_reference_s(causal: bool) -> None:
    arguments = (
        *inputs(2, 20, 35, 2, 16),
        2,
        0.25,
        causal,
        None if causal else torch.ones(20, 35, dtype=torch.bool).triu(),
    )
    assert torch.equal(attention(*arguments), attention_reference(*arguments))


def test_any_float_dtype_has_a_reference() -> None:
    arguments = (*inputs(1, 5, 6, 2, 16, torch.float64), 2, 0.25)
    torch.testing.assert_close(attention(*arguments), oracle(*arguments)[0])


@pytest.fixture
def _no_overrides() -> Iterator[None]:
    yield
    tuning.clear()


@pytest.mark.usefixtures("_no_overrides")
def test_a_recording_knows_the_kernel_that_would_run() -> None:
    query, key, value = (tensor.to("meta") for tensor in inputs(2, 4096, 4096, 8, 40, torch.float16))
    with launch.recording(89) as variants:
        result = attention(query, key, value, 8, 40**-0.5)
    assert (result.shape, result.dtype) == (query.shape, torch.float16)
    [variant] = variants
    assert variant.kernel == "attention.forward"
    constants = dict(variant.constants)
    assert (constants["PART_1"], constants["PART_2"], constants["VALUE_PART_2"]) == (32, 16, 8)
    assert not constants["TAIL"]
    assert variant.types[:5] == ("*fp16",) * 5
    assert all(variant.aligned[:11])

    problem = Problem(40, 8, 4096, 4096, torch.float16)
    tuning.override("attention", 89, problem, Choice("triton", Tiles(64, 32, 4, 3)))
    with launch.recording(89) as variants:
        attention(query, key, value, 8, 40**-0.5)
    [variant] = variants
    assert (variant.num_warps, variant.num_stages, dict(variant.constants)["BLOCK_M"]) == (4, 3, 64)

    tuning.override("attention", 89, problem, Choice("sdpa", Tiles(64, 32, 4, 3)))
    with launch.recording(89) as variants:
        result = attention(query, key, value, 8, 40**-0.5)
    assert not variants
    assert result.shape == query.shape


@pytest.mark.parametrize(
    ("query", "key", "heads"),
    [
        pytest.param((1, 4, 1040), (1, 4, 1040), 2, id="head size above 512"),
        pytest.param((1, 2**16, 32), (1, 2**15, 32), 2, id="more than 2**31 scores"),
    ],
)
def test_what_the_kernel_cannot_do_is_computed_by_torch(
    query: tuple[int, ...], key: tuple[int, ...], heads: int
) -> None:
    q, k = (torch.empty(shape, dtype=torch.float16, device="meta") for shape in (query, key))
    with launch.recording(89) as variants:
        assert attention(q, k, k, heads, 0.25).shape == query
    assert not variants


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"query": torch.zeros(2, 20)}, ValueError, r"query has shape \(2, 20\)"),
        ({"heads": 5}, ValueError, "expected .N, tokens, 5 heads"),
        ({"heads": 0}, ValueError, "expected .N, tokens, 0 heads"),
        (
            {"query": torch.zeros(2, 20, 32, dtype=torch.int64)},
            TypeError,
            "query is torch.int64, expected a float dtype",
        ),
        ({"key": torch.zeros(2, 0, 32)}, ValueError, "at least 1 token"),
        ({"key": torch.zeros(2, 34, 32)}, ValueError, r"value has shape \(2, 35, 32\), expected \(2, 34, 32\)"),
        ({"key": torch.zeros(1, 35, 32)}, ValueError, r"key has shape \(1, 35, 32\), expected \(2, 35, 32\)"),
        ({"value": torch.zeros(2, 35, 32).half()}, TypeError, "value is torch.float16, expected torch.float32"),
        ({"value": torch.zeros(2, 35, 32, device="meta")}, ValueError, "value is on meta, expected cpu"),
        ({"value": torch.zeros(2, 32, 35).mT}, ValueError, "value has stride 35 in its last dimension, expected 1"),
        ({"scale": 0.0}, ValueError, "scale is 0.0"),
        ({"scale": math.nan}, ValueError, "scale is nan"),
        ({"mask": torch.zeros(20, 34)}, ValueError, r"mask has shape \(20, 34\)"),
        ({"mask": torch.zeros(1, 1, 1, 20, 35)}, ValueError, "one that broadcasts to"),
        ({"mask": torch.zeros(20, 35).half()}, TypeError, "mask is torch.float16, expected bool, float32"),
        ({"mask": torch.zeros(20, 35, device="meta")}, ValueError, "mask is on meta"),
    ],
)
def test_bad_input(change: dict[str, Any], error: type[Exception], message: str) -> None:
    query, key, value = inputs(2, 20, 35, 2, 16)
    arguments: dict[str, Any] = {"query": query, "key": key, "value": value, "heads": 2, "scale": 0.25}
    with pytest.raises(error, match=message):
        attention(**arguments | change)


# --- On a GPU ------------------------------------------------------------------------------------------------------------

# (rows, query tokens, key tokens, heads, head size): some of each kind; benchmarks/gpu.py checks them all.
REAL_SIZES = [
    # SD1.5 at 512 x 512, to the image and to the text, 77 or 154 tokens; a picture that is no square.
    ((2, 4096, 4096, 8, 40), torch.float16),
    ((2, 1024, 1024, 8, 80), torch.bfloat16),
    ((2, 64, 64, 8, 160), torch.float16),
    ((2, 4096, 77, 8, 40), torch.bfloat16),
    ((1, 96 * 64, 154, 8, 40), torch.float16),
    # SD2.1 at 768 x 768, SDXL at 1024 x 1024.
    ((2, 24 * 24, 24 * 24, 20, 64), torch.float16),
    ((2, 64 * 64, 77, 10, 64), torch.float16),
    # The VAE at 512 pixels.
    ((1, 64 * 64, 64 * 64, 1, 512), torch.bfloat16),
]


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("size", "dtype"), REAL_SIZES, ids=str)
@pytest.mark.parametrize("body", [attention, attention_triton])
def test_real_sizes(body: Body, size: tuple[int, int, int, int, int], dtype: torch.dtype) -> None:
    assert_right(body, *inputs(*size, dtype=dtype, device="cuda"), size[3], size[4] ** -0.5)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(
    ("head_size", "key_tokens"),
    [(8, 300), (40, 77), (40, 300), (64, 512), (80, 300), (96, 77), (128, 300), (160, 77), (256, 300), (512, 77)],
)
def test_every_candidate_of_this_gpu(head_size: int, key_tokens: int) -> None:
    arguments = (*inputs(2, 300, key_tokens, 2, head_size, torch.float16, "cuda"), 2, head_size**-0.5)
    expected = oracle(*arguments)
    problem = Problem(head_size, 2, 300, key_tokens, torch.float16)
    for choice in configurations.candidates("attention", launch.architecture(torch.device("cuda")), problem):
        if choice.body == "triton":
            assert_rounded(attention_triton(*arguments, tiles=choice.tiles), *expected)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("body", [attention_reference, attention_triton])
def test_masks_and_causal_on_a_gpu(body: Body) -> None:
    arguments = (*inputs(2, 77, 77, 12, 64, torch.float16, "cuda"), 12, 0.125)
    bits = random(2, 1, 77, 77, device="cuda")
    assert_right(body, *arguments, causal=True)
    assert_right(body, *arguments, mask=bits > 0)
    # In the precision of the queries, without which torch has no fused kernel and rounds the scores.
    assert_right(body, *arguments, causal=True, mask=torch.where(bits > 0, bits, -math.inf).half())


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("body", [attention_reference, attention_triton])
def test_a_cuda_graph_holds_it(body: Body) -> None:
    arguments = (*inputs(2, 1024, 77, 8, 80, torch.float16, "cuda"), 8, 80**-0.5)
    query = arguments[0]
    expected = body(*arguments)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = body(*arguments)
    query.mul_(2)
    graph.replay()
    torch.testing.assert_close(found, body(*arguments), rtol=0, atol=0)
    assert not torch.equal(found, expected)
