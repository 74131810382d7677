"""Attention of a decoding step on a GPU, as a Triton kernel: few queries, and of each row only the positions it has.

Source: the online softmax of Milakov and Gimelshein (arXiv 1805.02867), over blocks of positions as FlashAttention
(arXiv 2205.14135) has it. Departures, as a step has 1 to 16 queries where training has hundreds: one program computes
all queries that share a head's keys, so that each key and value is read once; and it reads no position after a row's
own length, where torch's kernels read as many positions of every row as the longest one has.

Triton comes with torch's CUDA builds alone, so that layers.attention imports this file where it is first needed.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# A program's queries. Tensor cores multiply 16 rows at a time: fewer queries are filled up, more are split.
QUERIES_AT_ONCE = 16
# [ours] Bytes of keys, and as many of values, that a program reads at a time: 64 positions of width 64 in bf16. Three
# blocks of both are 48 KiB of shared memory, so that several programs fit on a multiprocessor (228 KiB on an H100, 100
# on Ampere's smaller GPUs): together they keep more bytes on their way than the memory needs to be busy.
BLOCK_BYTES = 2**13
MIN_POSITIONS_AT_ONCE, MAX_POSITIONS_AT_ONCE = 16, 128
N_STAGES = 3  # blocks that are on their way or at work
N_WARPS = 4


def decode_attention(
    q_BGRK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias_BG1S: Tensor, n_valid_B: Tensor, scale: float
) -> Tensor:
    """softmax(q kᵀ · scale + bias) v over the first n_valid positions of each row, (B, G, R, K), as layers.attention.

    n_valid_B (int64, contiguous) lies on the device and is read there: a CUDA graph of this call may be replayed with
    other lengths. More than S is S. A row with none gives zeros, and so does a query whose bias is −inf everywhere. K
    is a power of two from 16 on. The queries that share keys share a bias, of which rows and heads may be 1. Scores,
    softmax and sums are fp32, weights are rounded to the precision of the values.
    """
    n_rows, n_heads, n_queries, width = q_BGRK.shape
    n_positions = k_BGSK.shape[2]
    bias_BG1S = bias_BG1S.expand(n_rows, n_heads, 1, n_positions)
    y_BGRK = torch.empty_like(q_BGRK)
    n_programs = n_rows * n_heads * triton.cdiv(n_queries, QUERIES_AT_ONCE)
    with torch.cuda.device_of(q_BGRK):  # Triton launches on the current device, whichever the tensors are on
        _decode_attention[(n_programs,)](
            *(q_BGRK, k_BGSK, v_BGSK, bias_BG1S, n_valid_B, y_BGRK),
            *q_BGRK.stride(),
            *k_BGSK.stride(),
            *v_BGSK.stride(),
            *(bias_BG1S.stride(0), bias_BG1S.stride(1), bias_BG1S.stride(3)),
            *y_BGRK.stride(),
            n_heads=n_heads,
            n_queries=n_queries,
            n_positions=n_positions,
            scale=scale,
            WIDTH=width,
            BLOCK_R=QUERIES_AT_ONCE,
            BLOCK_S=positions_at_once(width, k_BGSK.dtype),
            num_warps=N_WARPS,
            num_stages=N_STAGES,
        )
    return y_BGRK


def positions_at_once(width: int, dtype: torch.dtype) -> int:
    """How many positions of one head are a block: a power of two, as the width is one."""
    return min(max(BLOCK_BYTES // (width * dtype.itemsize), MIN_POSITIONS_AT_ONCE), MAX_POSITIONS_AT_ONCE)


# Numbers in `do_not_specialize` need no version of the kernel of their own where they are 1 or a multiple of 16.
@triton.jit(do_not_specialize=["n_heads", "n_queries", "n_positions"])  # type: ignore[untyped-decorator]
def _decode_attention(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    n_valid_ptr,
    y_ptr,
    # Strides in numbers: of rows, heads, queries or positions, and columns.
    q_stride_b,
    q_stride_g,
    q_stride_r,
    q_stride_k,
    k_stride_b,
    k_stride_g,
    k_stride_s,
    k_stride_k,
    v_stride_b,
    v_stride_g,
    v_stride_s,
    v_stride_k,
    bias_stride_b,
    bias_stride_g,
    bias_stride_s,
    y_stride_b,
    y_stride_g,
    y_stride_r,
    y_stride_k,
    n_heads,
    n_queries,
    n_positions,
    scale,
    WIDTH: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program: a block of the queries of one row and head. Letters as in layers.py."""
    # 1) Which queries? Programs that read the same keys are neighbours, so that the second finds them in the cache.
    n_blocks = tl.cdiv(n_queries, BLOCK_R)
    block = tl.program_id(0) % n_blocks
    row_and_head = tl.program_id(0) // n_blocks
    head = row_and_head % n_heads
    row = (row_and_head // n_heads).to(tl.int64)  # times a stride it may be more than 2³¹
    r = block * BLOCK_R + tl.arange(0, BLOCK_R)
    k_column = tl.arange(0, WIDTH)
    is_query_R = r < n_queries
    q_ptr += row * q_stride_b + head * q_stride_g
    k_ptr += row * k_stride_b + head * k_stride_g
    v_ptr += row * v_stride_b + head * v_stride_g
    bias_ptr += row * bias_stride_b + head * bias_stride_g
    y_ptr += row * y_stride_b + head * y_stride_g
    q_RK = tl.load(
        q_ptr + r[:, None] * q_stride_r + k_column[None, :] * q_stride_k, mask=is_query_R[:, None], other=0.0
    )
    q_RK = q_RK.to(k_ptr.dtype.element_ty)
    n_valid = tl.minimum(tl.load(n_valid_ptr + row), n_positions).to(tl.int32)

    # 2) The online softmax. A softmax needs its greatest score first, exp(score − highest) / Σ exp(score − highest),
    # but keys are to be read once. So after each block the sums are those of the positions so far, with the greatest
    # score so far taken off:
    #     total = Σ exp(score − highest)        y = Σ exp(score − highest) · v
    # Where a block raises the highest score, both sums are multiplied by exp(old highest − new highest) first.
    highest_R = tl.full([BLOCK_R], -float("inf"), tl.float32)
    total_R = tl.zeros([BLOCK_R], tl.float32)
    y_RK = tl.zeros([BLOCK_R, WIDTH], tl.float32)
    # The compiler has the next blocks' keys and values fetched while one is at work, but not the bias: too few bytes a
    # thread. So it is loaded here, a block ahead.
    s = tl.arange(0, BLOCK_S)
    next_bias_S = tl.load(bias_ptr + s * bias_stride_s, mask=s < n_valid, other=-float("inf"))
    for start in range(0, n_valid, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        is_valid_S = s < n_valid
        k_KS = tl.load(
            k_ptr + s[None, :] * k_stride_s + k_column[:, None] * k_stride_k, mask=is_valid_S[None, :], other=0.0
        )
        v_SK = tl.load(
            v_ptr + s[:, None] * v_stride_s + k_column[None, :] * v_stride_k, mask=is_valid_S[:, None], other=0.0
        )
        bias_S = next_bias_S
        next_s = s + BLOCK_S
        next_bias_S = tl.load(bias_ptr + next_s * bias_stride_s, mask=next_s < n_valid, other=-float("inf"))
        score_RS = tl.dot(q_RK, k_KS, input_precision="ieee") * scale + bias_S.to(tl.float32)[None, :]

        new_highest_R = tl.maximum(highest_R, tl.max(score_RS, 1))
        # Where all scores so far are −inf, 0 is taken off instead: −inf − (−inf) is no number, exp(−inf − 0) is 0.
        offset_R = tl.where(new_highest_R == -float("inf"), 0.0, new_highest_R)
        weight_RS = tl.exp(score_RS - offset_R[:, None])
        shrink_R = tl.exp(highest_R - offset_R)
        total_R = total_R * shrink_R + tl.sum(weight_RS, 1)
        y_RK = y_RK * shrink_R[:, None] + tl.dot(weight_RS.to(v_SK.dtype), v_SK, input_precision="ieee")
        highest_R = new_highest_R

    # 3) Divide by the sum of the weights, which is 0 where nothing was read.
    y_RK = y_RK / tl.where(total_R == 0.0, 1.0, total_R)[:, None]
    y_ptrs = y_ptr + r[:, None] * y_stride_r + k_column[None, :] * y_stride_k
    tl.store(y_ptrs, y_RK.to(y_ptr.dtype.element_ty), mask=is_query_R[:, None])
