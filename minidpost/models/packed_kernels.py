"""Attention of packed tokens in training on a GPU, as Triton kernels: no padding, T5's position bias, dropout.

    y_t = Σ_s w_ts v_s,    w_t = dropout(softmax_s(q_t · k_s · scale + bias(s − t)))    over the tokens s that t may see

Source: FlashAttention-2 (arXiv 2307.08691): the forward pass keeps of each query only log Σ exp(score), and the
backward pass computes the weights again, once a block of queries for their gradient, once a block of keys for theirs.
Ours in it: rows of different lengths lie one behind the other (packing.py); T5's bias is looked up by the distance in
a table of a few learnt numbers, and its gradient is summed up here, where torch's kernels are given a bias for each
pair of tokens and write a gradient as large; a prompt that several targets read is there once; and random bits are a
function of seed, head, query and key, so that the backward pass finds again what was dropped.

Triton comes with torch's CUDA builds alone, so that packed_attention.py imports this file where it is first needed.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minidpost.models.packing import PositionBias, Rows

# Queries and keys that a program multiplies at once. A product of 64 × 64 is what a warp group's tensor cores take.
BLOCK = 64
# [ours] Blocks that are on their way or at work. With two the keys' gradients need more registers than there are.
N_STAGES = 2
N_STAGES_OF_KEYS = 1
N_RANDOM = 2**31  # values of a random number that decides whether a weight is dropped


def packed_attention(
    q_NHK: Tensor,
    k_MGK: Tensor,
    v_MGK: Tensor,
    rows: Rows,
    bias: PositionBias | None = None,
    *,
    scale: float,
    is_causal: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """What each of N queries reads of its row's keys and values, (N, H, K), with gradients of all four tensors.

    Each of the G heads of keys and values is read by H / G heads of queries. With `is_causal` a query sees keys up to
    its own place; rows of queries and keys are then the same. `dropout` is the probability with which a weight is
    dropped, decided by `seed` (31 bits). K is a power of two from 16 on, columns are neighbours in memory. Scores,
    softmax and sums are fp32; weights, and gradients of scores, are rounded to the precision of the values. Every
    token must be in a row.
    """
    table_EH, entry_X, zero = bias or PositionBias(q_NHK.new_zeros(1, 1), rows.query_start_B, 0)
    call = _Call(rows, entry_X, zero, bias is not None, scale, is_causal, dropout, seed)
    y_NHK: Tensor = _PackedAttention.apply(q_NHK, k_MGK, v_MGK, table_EH, call)  # type: ignore[no-untyped-call]
    return y_NHK


class _Call(NamedTuple):
    """All arguments of one call that have no gradient."""

    rows: Rows
    entry_X: Tensor
    zero: int
    has_bias: bool
    scale: float
    is_causal: bool
    dropout: float
    seed: int

    def arguments(self, q_NHK: Tensor, k_MGK: Tensor, v_MGK: Tensor) -> dict[str, Any]:
        """Those that all kernels have."""
        rows = self.rows
        width = q_NHK.shape[2]
        return {
            "query_start_ptr": rows.query_start_B,
            "key_start_ptr": rows.key_start_Q,
            "entry_ptr": self.entry_X,
            "zero": self.zero,
            "seed": self.seed,
            "drops_below": min(round(self.dropout * N_RANDOM), N_RANDOM - 1),
            "n_queries": q_NHK.shape[0],
            "n_heads": q_NHK.shape[1],
            "q_stride_n": q_NHK.stride(0),
            "q_stride_h": q_NHK.stride(1),
            "k_stride_m": k_MGK.stride(0),
            "k_stride_g": k_MGK.stride(1),
            "v_stride_m": v_MGK.stride(0),
            "v_stride_g": v_MGK.stride(1),
            "scale": self.scale,
            "kept": 1.0 / (1.0 - self.dropout) if self.dropout < 1 else 0.0,
            "HEADS_A_KEY": q_NHK.shape[1] // k_MGK.shape[1],
            "HAS_BIAS": self.has_bias,
            "IS_CAUSAL": self.is_causal,
            "HAS_DROPOUT": self.dropout > 0,
            "WIDTH": width,
            "BLOCK_T": BLOCK,
            "BLOCK_S": BLOCK,
            "num_warps": 4 if width <= 64 else 8,
        }


class _PackedAttention(torch.autograd.Function):
    """`packed_attention` and its gradient."""

    @staticmethod
    def forward(ctx: Any, q_NHK: Tensor, k_MGK: Tensor, v_MGK: Tensor, table_EH: Tensor, call: _Call) -> Tensor:
        n_queries, n_heads, _ = q_NHK.shape
        n_rows = len(call.rows.key_row_B)
        y_NHK = q_NHK.new_empty(q_NHK.shape)  # contiguous
        log_total_HN = torch.empty(n_heads, n_queries, dtype=torch.float32, device=q_NHK.device)
        grid = (triton.cdiv(call.rows.longest[0], BLOCK), n_heads, n_rows)
        with torch.cuda.device_of(q_NHK):  # Triton launches on the current device, whichever the tensors are on
            _forward[grid](
                q_NHK,
                k_MGK,
                v_MGK,
                table_EH,
                y_NHK,
                log_total_HN,
                call.rows.key_row_B,
                num_stages=N_STAGES,
                **call.arguments(q_NHK, k_MGK, v_MGK),
            )
        ctx.save_for_backward(q_NHK, k_MGK, v_MGK, table_EH, y_NHK, log_total_HN)
        ctx.call = call
        return y_NHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_NHK: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None]:
        q_NHK, k_MGK, v_MGK, table_EH, y_NHK, log_total_HN = ctx.saved_tensors
        call: _Call = ctx.call
        rows = call.rows
        grad_y_NHK = grad_y_NHK.contiguous()
        n_entries, n_heads = table_EH.shape if call.has_bias else (1, q_NHK.shape[1])
        n_rows, n_key_rows = len(rows.key_row_B), len(rows.key_start_Q) - 1
        n_query_blocks, n_key_blocks = (triton.cdiv(longest, BLOCK) for longest in rows.longest)
        arguments = call.arguments(q_NHK, k_MGK, v_MGK)
        grad_q_NHK = q_NHK.new_empty(q_NHK.shape)
        grad_k_MGK = k_MGK.new_empty(k_MGK.shape)
        grad_v_MGK = v_MGK.new_empty(v_MGK.shape)
        delta_HN = torch.empty_like(log_total_HN)
        # Each program has a line of its own for its part of the table's gradient: added up in a fixed order.
        n_programs = n_rows * n_query_blocks if call.has_bias else 0
        grad_table_PHE = torch.empty(n_programs, n_heads, n_entries, dtype=torch.float32, device=q_NHK.device)
        with torch.cuda.device_of(q_NHK):
            _backward_of_queries[(n_query_blocks, n_heads, n_rows)](
                q_NHK,
                k_MGK,
                v_MGK,
                table_EH,
                y_NHK,
                log_total_HN,
                rows.key_row_B,
                grad_y_NHK,
                grad_q_NHK,
                delta_HN,
                grad_table_PHE,
                n_entries=n_entries,
                ENTRIES=triton.next_power_of_2(n_entries),
                num_stages=N_STAGES,
                **arguments,
            )
            _backward_of_keys[(n_key_blocks, k_MGK.shape[1], n_key_rows)](
                q_NHK,
                k_MGK,
                v_MGK,
                table_EH,
                log_total_HN,
                rows.reader_B,
                rows.first_reader_Q,
                grad_y_NHK,
                delta_HN,
                grad_k_MGK,
                grad_v_MGK,
                num_stages=N_STAGES_OF_KEYS,
                **arguments,
            )
        grad_table_EH = grad_table_PHE.sum(0).T.to(table_EH.dtype) if call.has_bias else None
        return grad_q_NHK, grad_k_MGK, grad_v_MGK, grad_table_EH, None


# -- what the kernels share -------------------------------------------------------------------------------------------


@triton.jit
def _mixed(x):  # type: ignore[no-untyped-def]
    """32 bits that each depend on all of x (uint32): the last step of MurmurHash3, a one-to-one function."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@triton.jit
def _random_start(seed, head, query):  # type: ignore[no-untyped-def]
    """Where the sequence of a head's query begins, from which `_stays` takes a number for each key."""
    of_head = _mixed(_mixed(tl.cast(seed, tl.uint32)) + tl.cast(head, tl.uint32))
    return _mixed(query.to(tl.uint32) ^ of_head)


@triton.jit
def _stays(start, key, drops_below):  # type: ignore[no-untyped-def]
    """Whether the weight of a key is not dropped.

    A sequence of random numbers as SplitMix (Steele, Lea and Flood 2014) makes it: equidistant numbers, mixed.
    """
    return (_mixed(start + key.to(tl.uint32) * 0x9E3779B9) >> 1).to(tl.int32) >= drops_below


# -- the forward pass -------------------------------------------------------------------------------------------------

# Numbers in `do_not_specialize` need no version of the kernel of their own where they are 1 or a multiple of 16.
_NUMBERS = ["zero", "seed", "drops_below", "n_queries", "n_entries"]


@triton.jit(do_not_specialize=_NUMBERS[:-1])  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    y_ptr,
    log_total_ptr,
    key_row_ptr,
    query_start_ptr,
    key_start_ptr,
    entry_ptr,
    zero,
    seed,
    drops_below,
    n_queries,
    n_heads,
    # Strides in numbers: of tokens and heads. y is contiguous.
    q_stride_n,
    q_stride_h,
    k_stride_m,
    k_stride_g,
    v_stride_m,
    v_stride_g,
    scale,
    kept,
    HEADS_A_KEY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program: a block of the queries of one row and head."""
    # 1) Which queries, and which keys do they see?
    row = tl.program_id(2)
    head = tl.program_id(1)
    first_t = tl.program_id(0) * BLOCK_T
    first_query = tl.load(query_start_ptr + row)
    row_length = tl.load(query_start_ptr + row + 1) - first_query
    if first_t >= row_length:
        return
    key_row = tl.load(key_row_ptr + row)
    first_key = tl.load(key_start_ptr + key_row)
    n_keys = tl.load(key_start_ptr + key_row + 1) - first_key
    if IS_CAUSAL:
        n_keys = tl.minimum(n_keys, first_t + BLOCK_T)
    t = first_t + tl.arange(0, BLOCK_T)
    column = tl.arange(0, WIDTH)
    is_query_T = t < row_length
    query_T = (first_query + t).to(tl.int64)
    q_TK = tl.load(
        q_ptr + query_T[:, None] * q_stride_n + head * q_stride_h + column[None, :],
        mask=is_query_T[:, None],
        other=0.0,
    )
    k_ptr += first_key.to(tl.int64) * k_stride_m + (head // HEADS_A_KEY) * k_stride_g
    v_ptr += first_key.to(tl.int64) * v_stride_m + (head // HEADS_A_KEY) * v_stride_g
    start_T = _random_start(seed, head, query_T)

    # 2) The online softmax, as decode_attention.py explains it.
    highest_T = tl.full([BLOCK_T], -float("inf"), tl.float32)
    total_T = tl.zeros([BLOCK_T], tl.float32)
    y_TK = tl.zeros([BLOCK_T, WIDTH], tl.float32)
    for first_s in range(0, n_keys, BLOCK_S):
        s = first_s + tl.arange(0, BLOCK_S)
        is_key_S = s < n_keys
        k_KS = tl.load(k_ptr + s[None, :] * k_stride_m + column[:, None], mask=is_key_S[None, :], other=0.0)
        v_SK = tl.load(v_ptr + s[:, None] * v_stride_m + column[None, :], mask=is_key_S[:, None], other=0.0)
        score_TS = tl.dot(q_TK, k_KS, input_precision="ieee") * scale
        is_seen_TS = is_key_S[None, :] & is_query_T[:, None]
        if IS_CAUSAL:
            is_seen_TS = is_seen_TS & (s[None, :] <= t[:, None])
        if HAS_BIAS:
            entry_TS = tl.load(entry_ptr + (s[None, :] - t[:, None] + zero), mask=is_seen_TS, other=0)
            score_TS += tl.load(table_ptr + entry_TS * n_heads + head).to(tl.float32)
        score_TS = tl.where(is_seen_TS, score_TS, -float("inf"))

        new_highest_T = tl.maximum(highest_T, tl.max(score_TS, 1))
        offset_T = tl.where(new_highest_T == -float("inf"), 0.0, new_highest_T)
        weight_TS = tl.exp(score_TS - offset_T[:, None])
        shrink_T = tl.exp(highest_T - offset_T)
        total_T = total_T * shrink_T + tl.sum(weight_TS, 1)
        if HAS_DROPOUT:
            weight_TS = tl.where(_stays(start_T[:, None], s[None, :], drops_below), weight_TS * kept, 0.0)
        y_TK = y_TK * shrink_T[:, None] + tl.dot(weight_TS.to(v_SK.dtype), v_SK, input_precision="ieee")
        highest_T = new_highest_T

    # 3) What was read, and log Σ exp(score), of which the backward pass makes the weights again.
    total_T = tl.where(total_T == 0.0, 1.0, total_T)
    highest_T = tl.where(highest_T == -float("inf"), 0.0, highest_T)
    y_TK = y_TK / total_T[:, None]
    y_ptrs = y_ptr + query_T[:, None] * (n_heads * WIDTH) + head * WIDTH + column[None, :]
    tl.store(y_ptrs, y_TK.to(y_ptr.dtype.element_ty), mask=is_query_T[:, None])
    tl.store(log_total_ptr + head.to(tl.int64) * n_queries + query_T, highest_T + tl.log(total_T), mask=is_query_T)


# -- the backward pass ------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=_NUMBERS)  # type: ignore[untyped-decorator]
def _backward_of_queries(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    y_ptr,
    log_total_ptr,
    key_row_ptr,
    grad_y_ptr,
    grad_q_ptr,
    delta_ptr,
    grad_table_ptr,
    query_start_ptr,
    key_start_ptr,
    entry_ptr,
    zero,
    seed,
    drops_below,
    n_queries,
    n_heads,
    n_entries,
    q_stride_n,
    q_stride_h,
    k_stride_m,
    k_stride_g,
    v_stride_m,
    v_stride_g,
    scale,
    kept,
    HEADS_A_KEY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """One program: the gradient of a block of the queries of one row and head, and its part of the table's.

    With w the weights before dropout and m what dropout multiplies them by, the gradient of a score is
    w · (m · (dy · v) − Σ_s w m (dy · v)), and the sum is dy · y: `delta`, which is kept for `_backward_of_keys`.
    """
    row = tl.program_id(2)
    head = tl.program_id(1)
    first_t = tl.program_id(0) * BLOCK_T
    first_query = tl.load(query_start_ptr + row)
    row_length = tl.load(query_start_ptr + row + 1) - first_query
    entry = tl.arange(0, ENTRIES)
    grad_entry_E = tl.zeros([ENTRIES], tl.float32)
    line = ((row * tl.num_programs(0) + tl.program_id(0)) * n_heads + head).to(tl.int64)
    if first_t >= row_length:
        if HAS_BIAS:
            tl.store(grad_table_ptr + line * n_entries + entry, grad_entry_E, mask=entry < n_entries)
        return
    key_row = tl.load(key_row_ptr + row)
    first_key = tl.load(key_start_ptr + key_row)
    n_keys = tl.load(key_start_ptr + key_row + 1) - first_key
    if IS_CAUSAL:
        n_keys = tl.minimum(n_keys, first_t + BLOCK_T)
    t = first_t + tl.arange(0, BLOCK_T)
    column = tl.arange(0, WIDTH)
    is_query_T = t < row_length
    query_T = (first_query + t).to(tl.int64)
    q_TK = tl.load(
        q_ptr + query_T[:, None] * q_stride_n + head * q_stride_h + column[None, :],
        mask=is_query_T[:, None],
        other=0.0,
    )
    place_TK = query_T[:, None] * (n_heads * WIDTH) + head * WIDTH + column[None, :]
    y_TK = tl.load(y_ptr + place_TK, mask=is_query_T[:, None], other=0.0)
    grad_y_TK = tl.load(grad_y_ptr + place_TK, mask=is_query_T[:, None], other=0.0)
    delta_T = tl.sum(y_TK.to(tl.float32) * grad_y_TK.to(tl.float32), 1)
    tl.store(delta_ptr + head.to(tl.int64) * n_queries + query_T, delta_T, mask=is_query_T)
    log_total_T = tl.load(log_total_ptr + head.to(tl.int64) * n_queries + query_T, mask=is_query_T, other=0.0)
    k_ptr += first_key.to(tl.int64) * k_stride_m + (head // HEADS_A_KEY) * k_stride_g
    v_ptr += first_key.to(tl.int64) * v_stride_m + (head // HEADS_A_KEY) * v_stride_g
    start_T = _random_start(seed, head, query_T)

    grad_q_TK = tl.zeros([BLOCK_T, WIDTH], tl.float32)
    for first_s in range(0, n_keys, BLOCK_S):
        s = first_s + tl.arange(0, BLOCK_S)
        is_key_S = s < n_keys
        k_SK = tl.load(k_ptr + s[:, None] * k_stride_m + column[None, :], mask=is_key_S[:, None], other=0.0)
        v_SK = tl.load(v_ptr + s[:, None] * v_stride_m + column[None, :], mask=is_key_S[:, None], other=0.0)
        score_TS = tl.dot(q_TK, tl.trans(k_SK), input_precision="ieee") * scale
        is_seen_TS = is_key_S[None, :] & is_query_T[:, None]
        if IS_CAUSAL:
            is_seen_TS = is_seen_TS & (s[None, :] <= t[:, None])
        entry_TS = tl.zeros([BLOCK_T, BLOCK_S], tl.int32)
        if HAS_BIAS:
            entry_TS = tl.load(entry_ptr + (s[None, :] - t[:, None] + zero), mask=is_seen_TS, other=0)
            score_TS += tl.load(table_ptr + entry_TS * n_heads + head).to(tl.float32)
        weight_TS = tl.where(is_seen_TS, tl.exp(score_TS - log_total_T[:, None]), 0.0)
        grad_weight_TS = tl.dot(grad_y_TK, tl.trans(v_SK), input_precision="ieee")
        if HAS_DROPOUT:
            stays_TS = _stays(start_T[:, None], s[None, :], drops_below)
            grad_weight_TS = tl.where(stays_TS, grad_weight_TS * kept, 0.0)
        grad_score_TS = weight_TS * (grad_weight_TS - delta_T[:, None])
        grad_q_TK += tl.dot(grad_score_TS.to(k_SK.dtype), k_SK, input_precision="ieee")
        if HAS_BIAS:
            # A block's distances share few entries of the table, unless it lies at the diagonal.
            lowest = tl.min(tl.min(tl.where(is_seen_TS, entry_TS, n_entries), 1), 0)
            highest = tl.max(tl.max(tl.where(is_seen_TS, entry_TS, -1), 1), 0)
            for e in range(lowest, highest + 1):
                of_entry = tl.sum(tl.sum(tl.where(entry_TS == e, grad_score_TS, 0.0), 1), 0)
                grad_entry_E += tl.where(entry == e, of_entry, 0.0)
    tl.store(grad_q_ptr + place_TK, (grad_q_TK * scale).to(grad_q_ptr.dtype.element_ty), mask=is_query_T[:, None])
    if HAS_BIAS:
        tl.store(grad_table_ptr + line * n_entries + entry, grad_entry_E, mask=entry < n_entries)


@triton.jit(do_not_specialize=_NUMBERS[:-1])  # type: ignore[untyped-decorator]
def _backward_of_keys(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    table_ptr,
    log_total_ptr,
    reader_ptr,
    first_reader_ptr,
    grad_y_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    query_start_ptr,
    key_start_ptr,
    entry_ptr,
    zero,
    seed,
    drops_below,
    n_queries,
    n_heads,
    q_stride_n,
    q_stride_h,
    k_stride_m,
    k_stride_g,
    v_stride_m,
    v_stride_g,
    scale,
    kept,
    HEADS_A_KEY: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """One program: the gradients of a block of the keys and values of one row and head, from all that read them.

    Scores stand here with a line for each key, so that no product needs its factors turned.
    """
    key_row = tl.program_id(2)
    key_head = tl.program_id(1)
    first_s = tl.program_id(0) * BLOCK_S
    first_key = tl.load(key_start_ptr + key_row)
    n_keys = tl.load(key_start_ptr + key_row + 1) - first_key
    if first_s >= n_keys:
        return
    s = first_s + tl.arange(0, BLOCK_S)
    column = tl.arange(0, WIDTH)
    is_key_S = s < n_keys
    key_S = (first_key + s).to(tl.int64)
    k_ptrs = k_ptr + key_S[:, None] * k_stride_m + key_head * k_stride_g + column[None, :]
    v_ptrs = v_ptr + key_S[:, None] * v_stride_m + key_head * v_stride_g + column[None, :]
    k_SK = tl.load(k_ptrs, mask=is_key_S[:, None], other=0.0)
    v_SK = tl.load(v_ptrs, mask=is_key_S[:, None], other=0.0)

    grad_k_SK = tl.zeros([BLOCK_S, WIDTH], tl.float32)
    grad_v_SK = tl.zeros([BLOCK_S, WIDTH], tl.float32)
    for i in range(tl.load(first_reader_ptr + key_row), tl.load(first_reader_ptr + key_row + 1)):
        row = tl.load(reader_ptr + i)
        first_query = tl.load(query_start_ptr + row)
        row_length = tl.load(query_start_ptr + row + 1) - first_query
        begin = 0
        if IS_CAUSAL:
            begin = first_s // BLOCK_T * BLOCK_T  # earlier queries see none of these keys
        for head in range(key_head * HEADS_A_KEY, (key_head + 1) * HEADS_A_KEY):
            for first_t in range(begin, row_length, BLOCK_T):
                t = first_t + tl.arange(0, BLOCK_T)
                is_query_T = t < row_length
                query_T = (first_query + t).to(tl.int64)
                q_TK = tl.load(
                    q_ptr + query_T[:, None] * q_stride_n + head * q_stride_h + column[None, :],
                    mask=is_query_T[:, None],
                    other=0.0,
                )
                grad_y_TK = tl.load(
                    grad_y_ptr + query_T[:, None] * (n_heads * WIDTH) + head * WIDTH + column[None, :],
                    mask=is_query_T[:, None],
                    other=0.0,
                )
                of_head_T = tl.cast(head, tl.int64) * n_queries + query_T
                log_total_T = tl.load(log_total_ptr + of_head_T, mask=is_query_T, other=0.0)
                delta_T = tl.load(delta_ptr + of_head_T, mask=is_query_T, other=0.0)
                score_ST = tl.dot(k_SK, tl.trans(q_TK), input_precision="ieee") * scale
                is_seen_ST = is_key_S[:, None] & is_query_T[None, :]
                if IS_CAUSAL:
                    is_seen_ST = is_seen_ST & (s[:, None] <= t[None, :])
                if HAS_BIAS:
                    entry_ST = tl.load(entry_ptr + (s[:, None] - t[None, :] + zero), mask=is_seen_ST, other=0)
                    score_ST += tl.load(table_ptr + entry_ST * n_heads + head).to(tl.float32)
                weight_ST = tl.where(is_seen_ST, tl.exp(score_ST - log_total_T[None, :]), 0.0)
                grad_weight_ST = tl.dot(v_SK, tl.trans(grad_y_TK), input_precision="ieee")
                dropped_ST = weight_ST
                if HAS_DROPOUT:
                    start_T = _random_start(seed, head, query_T)
                    stays_ST = _stays(start_T[None, :], s[:, None], drops_below)
                    dropped_ST = tl.where(stays_ST, weight_ST * kept, 0.0)
                    grad_weight_ST = tl.where(stays_ST, grad_weight_ST * kept, 0.0)
                grad_v_SK += tl.dot(dropped_ST.to(grad_y_TK.dtype), grad_y_TK, input_precision="ieee")
                grad_score_ST = weight_ST * (grad_weight_ST - delta_T[None, :])
                grad_k_SK += tl.dot(grad_score_ST.to(q_TK.dtype), q_TK, input_precision="ieee")
    n_key_heads = n_heads // HEADS_A_KEY
    place_SK = key_S[:, None] * (n_key_heads * WIDTH) + key_head * WIDTH + column[None, :]
    tl.store(grad_k_ptr + place_SK, (grad_k_SK * scale).to(grad_k_ptr.dtype.element_ty), mask=is_key_S[:, None])
    tl.store(grad_v_ptr + place_SK, grad_v_SK.to(grad_v_ptr.dtype.element_ty), mask=is_key_S[:, None])
