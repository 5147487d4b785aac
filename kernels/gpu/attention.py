"""Flash attention (Dao et al. 2023, arXiv 2307.08691), forward only.

A program computes a block of queries of one head against all keys: scores and sums in float32, the softmax with a running
maximum, in base 2. Triton's blocks are powers of two, so a head is held in one or two parts (40 = 32 + 8, 160 = 128 + 32):
one block would waste up to half of the tensor cores' work on padding.

Whole blocks of keys pay for no mask; the last one, or those on the diagonal of a causal attention, have a loop of their own.
"""

import triton
import triton.language as tl

from ldmrt.kernels.gpu.dependent import wait

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load(base, rows, stride, columns, row_end, column_end, CHECK_ROWS: tl.constexpr, CHECK_COLUMNS: tl.constexpr):
    """A block of a matrix whose rows are `stride` apart, with zeros beyond the ends that are to be checked."""
    pointers = base + rows[:, None] * stride + columns[None, :]
    if CHECK_ROWS and CHECK_COLUMNS:
        block = tl.load(pointers, mask=(rows < row_end)[:, None] & (columns < column_end)[None, :], other=0.0)
    elif CHECK_ROWS:
        block = tl.load(pointers, mask=(rows < row_end)[:, None], other=0.0)
    elif CHECK_COLUMNS:
        block = tl.load(pointers, mask=(columns < column_end)[None, :], other=0.0)
    else:
        block = tl.load(pointers)
    return block


@triton.jit
def _store(base, rows, stride, columns, row_end, column_end, block, CHECK_COLUMNS: tl.constexpr):
    pointers = base + rows[:, None] * stride + columns[None, :]
    present = (rows < row_end)[:, None]
    if CHECK_COLUMNS:
        present = present & (columns < column_end)[None, :]
    tl.store(pointers, block.to(base.dtype.element_ty), mask=present)


@triton.jit
def _masked_scores(
    scores,
    scale,
    mask,
    mask_query_stride,
    mask_key_stride,
    queries,
    keys,
    query_tokens,
    key_tokens,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    BOUNDED: tl.constexpr,
):
    """Scores with what the masks do to them. A float mask is added to scaled scores, so those come back scaled."""
    if MASK != "none":
        offsets = queries[:, None] * mask_query_stride + keys[None, :] * mask_key_stride
        inside = (queries < query_tokens)[:, None] & (keys < key_tokens)[None, :]
        given = tl.load(mask + offsets, mask=inside, other=0)
        scores = tl.where(given, scores, float("-inf")) if MASK == "bool" else scores * scale + given.to(tl.float32)
    if BOUNDED:
        if CAUSAL:
            seen = (keys[None, :] <= queries[:, None]) & (keys < key_tokens)[None, :]
        else:
            seen = (keys < key_tokens)[None, :]
        scores = tl.where(seen, scores, float("-inf"))
    return scores


@triton.jit
def _softmax_step(scores, scale, top, total, MASK: tl.constexpr):
    """Weights of a block of keys relative to the new maximum, the factor for what was summed before, new maximum and sum.

    The maximum is kept as the exponent sees it: times scale * log2(e), so that a weight costs one fused multiply-add and
    one exp2. With a float mask it stays in natural units, because the lowest finite masks would overflow in base 2.
    """
    if MASK == "float":
        new_top = tl.maximum(top, tl.max(scores, 1))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2((scores - shift[:, None]) * LOG2_E)
        factor = tl.exp2((top - shift) * LOG2_E)
    else:
        new_top = tl.maximum(top, tl.max(scores, 1) * (scale * LOG2_E))
        shift = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * (scale * LOG2_E) - shift[:, None])
        factor = tl.exp2(top - shift)
    return weights, factor, new_top, total * factor + tl.sum(weights, 1)


@triton.jit
def _inverse(total, MASK: tl.constexpr):
    """1 / total. A row whose keys are all masked gives zeros, as torch's does; without a mask only NaN can be the reason."""
    if MASK != "none":
        total = tl.where(total == 0.0, 1.0, total)
    return 1.0 / total


@triton.jit
def forward(
    query,
    key,
    value,
    mask,
    output,
    query_row_stride,
    query_token_stride,
    key_row_stride,
    key_token_stride,
    value_row_stride,
    value_token_stride,
    mask_row_stride,
    mask_head_stride,
    mask_query_stride,
    mask_key_stride,
    query_tokens,
    key_tokens,
    scale,
    HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    PART_1: tl.constexpr,
    PART_2: tl.constexpr,
    VALUE_PART_2: tl.constexpr,
    MASK: tl.constexpr,
    CAUSAL: tl.constexpr,
    TAIL: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One block of queries of one head of up to 256. Grid: (blocks of queries, heads, rows).

    PART_1 and PART_2 cover HEAD_SIZE; PART_2 is 0 if there is one part. VALUE_PART_2 may be smaller than PART_2: a dot
    product sums over 16 at least, but can have 8 columns. TAIL: some blocks of keys are not whole.
    """
    wait(DEPENDENT)
    first = tl.program_id(0) * BLOCK_M
    head = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    query += row * query_row_stride + head * HEAD_SIZE
    key += row * key_row_stride + head * HEAD_SIZE
    value += row * value_row_stride + head * HEAD_SIZE
    output += row * query_tokens * (HEADS * HEAD_SIZE) + head * HEAD_SIZE
    if MASK != "none":
        mask += row * mask_row_stride + head * mask_head_stride

    cut_1: tl.constexpr = PART_1 > HEAD_SIZE
    cut_2: tl.constexpr = PART_1 + PART_2 > HEAD_SIZE
    value_cut_2: tl.constexpr = PART_1 + VALUE_PART_2 > HEAD_SIZE
    queries = first + tl.arange(0, BLOCK_M)
    columns_1 = tl.arange(0, PART_1)
    query_1 = _load(
        query, queries, query_token_stride, columns_1, query_tokens, HEAD_SIZE, CHECK_ROWS=True, CHECK_COLUMNS=cut_1
    )
    sum_1 = tl.zeros([BLOCK_M, PART_1], tl.float32)
    if PART_2 > 0:
        columns_2 = PART_1 + tl.arange(0, PART_2)
        value_columns_2 = PART_1 + tl.arange(0, VALUE_PART_2)
        query_2 = _load(
            query, queries, query_token_stride, columns_2, query_tokens, HEAD_SIZE, CHECK_ROWS=True, CHECK_COLUMNS=cut_2
        )
        sum_2 = tl.zeros([BLOCK_M, VALUE_PART_2], tl.float32)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)

    end = key_tokens
    whole_end = key_tokens
    if CAUSAL:
        end = tl.minimum(end, first + BLOCK_M)
        whole_end = tl.minimum(whole_end, first + 1)
    whole_end = whole_end // BLOCK_N * BLOCK_N

    for bounded in tl.static_range(2 if TAIL else 1):
        for start in tl.range(whole_end if bounded else 0, end if bounded else whole_end, BLOCK_N):
            keys = start + tl.arange(0, BLOCK_N)
            key_1 = _load(key, keys, key_token_stride, columns_1, key_tokens, HEAD_SIZE, bounded, cut_1)
            scores = tl.dot(query_1, tl.trans(key_1), input_precision=PRECISION)
            if PART_2 > 0:
                key_2 = _load(key, keys, key_token_stride, columns_2, key_tokens, HEAD_SIZE, bounded, cut_2)
                scores = tl.dot(query_2, tl.trans(key_2), scores, input_precision=PRECISION)
            scores = _masked_scores(
                scores,
                scale,
                mask,
                mask_query_stride,
                mask_key_stride,
                queries,
                keys,
                query_tokens,
                key_tokens,
                MASK,
                CAUSAL,
                bounded,
            )
            weights, factor, top, total = _softmax_step(scores, scale, top, total, MASK)
            weights = weights.to(value.dtype.element_ty)
            value_1 = _load(value, keys, value_token_stride, columns_1, key_tokens, HEAD_SIZE, bounded, cut_1)
            sum_1 = tl.dot(weights, value_1, sum_1 * factor[:, None], input_precision=PRECISION)
            if PART_2 > 0:
                value_2 = _load(
                    value, keys, value_token_stride, value_columns_2, key_tokens, HEAD_SIZE, bounded, value_cut_2
                )
                sum_2 = tl.dot(weights, value_2, sum_2 * factor[:, None], input_precision=PRECISION)

    inverse = _inverse(total, MASK)[:, None]
    stride: tl.constexpr = HEADS * HEAD_SIZE
    _store(output, queries, stride, columns_1, query_tokens, HEAD_SIZE, sum_1 * inverse, cut_1)
    if PART_2 > 0:
        _store(output, queries, stride, value_columns_2, query_tokens, HEAD_SIZE, sum_2 * inverse, value_cut_2)
