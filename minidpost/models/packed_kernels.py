"""Attention of packed tokens in training on a GPU, as Triton kernels: no padding, T5's position bias, dropout.

    y_t = Σ_s w_ts v_s,    w_t = dropout(softmax_s(q_t · k_s · scale + bias(s − t)))    over the tokens s that t may see

Source: FlashAttention-2 (arXiv 2307.08691): the forward pass keeps of each query only log Σ exp(score), and the
backward pass computes the weights again, once a block of queries for their gradient, once a block of keys for theirs.
Ours in it: rows of different lengths lie one behind the other (packing.py); T5's bias is read by its distance, and the
gradient of its table of a few learnt numbers is summed up here, first along the diagonals of a block of scores and
then by the table's entries, where torch's kernels are given a bias for each pair of tokens and write a gradient as
large; a prompt that several targets read is there once; and random bits are a function of seed, head, query and key,
so that the backward pass finds again what was dropped.

A small model's step waits for Python to launch kernels, not for the GPU. Each argument costs Triton time at each
launch: tensors must therefore be contiguous, so that no stride need be passed, and what a model has but one of (heads,
width) is compiled into its kernels.

Triton comes with torch's CUDA builds alone, so that packed_attention.py imports this file where it is first needed.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from minidpost.models.dropout import new_seed
from minidpost.models.packing import PositionBias, Rows

# Queries and keys that a program multiplies at once. A product of 64 × 64 is what a warp group's tensor cores take.
BLOCK = 64
N_STAGES = 2  # [ours] blocks that are on their way or at work
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
    seed: int | None = None,
) -> Tensor:
    """What each of N queries reads of its row's keys and values, (N, H, K), with gradients of all four tensors.

    Each of the G heads of keys and values is read by H / G heads of queries. With `is_causal` a query sees keys up to
    its own place; rows of queries and keys are then the same. `dropout` is the probability with which a weight is
    dropped, decided by `seed` (31 bits; None: one of torch's generator). K is a power of two from 16 on. Queries, keys
    and values have one precision. Scores, softmax and sums are fp32; weights, and gradients of scores, are rounded to
    that precision. Every token must be in a row.
    """
    if seed is None:
        seed = new_seed() % 2**31 if dropout else 0
    y_NHK: Tensor = _PackedAttention.apply(  # type: ignore[no-untyped-call]
        *(q_NHK.contiguous(), k_MGK.contiguous(), v_MGK.contiguous(), None if bias is None else bias.table_EH),
        *(rows, bias, _Options(scale, is_causal, dropout, seed)),
    )
    return y_NHK


class _Options(NamedTuple):
    """How tokens attend; as `packed_attention` has it."""

    scale: float
    is_causal: bool
    dropout: float
    seed: int


class _PackedAttention(torch.autograd.Function):
    """`packed_attention` and its gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        q_NHK: Tensor,
        k_MGK: Tensor,
        v_MGK: Tensor,
        table_EH: Tensor | None,
        rows: Rows,
        bias: PositionBias | None,
        options: _Options,
    ) -> Tensor:
        bias_HX, entry_X, zero = (bias.bias_HX, bias.entry_X, bias.zero) if bias else (None, None, 0)
        y_NHK, log_total_HN = _run_forward(q_NHK, k_MGK, v_MGK, bias_HX, zero, rows, options)
        ctx.save_for_backward(q_NHK, k_MGK, v_MGK, bias_HX, entry_X, y_NHK, log_total_HN)
        ctx.zero = zero
        ctx.rows = rows
        ctx.options = options
        if table_EH is not None:
            ctx.n_entries = table_EH.shape[0]
            ctx.table_dtype = table_EH.dtype
        return y_NHK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_NHK: Tensor) -> tuple[Tensor | None, ...]:
        n_entries = ctx.n_entries if ctx.needs_input_grad[3] else 0
        q_NHK, k_MGK, v_MGK, bias_HX, entry_X, y_NHK, log_total_HN = ctx.saved_tensors
        grad_q_NHK, grad_k_MGK, grad_v_MGK, grad_table_EH = _run_backward(
            *(grad_y_NHK, q_NHK, k_MGK, v_MGK, bias_HX, entry_X, y_NHK, log_total_HN),
            *(n_entries, ctx.zero, ctx.rows, ctx.options),
        )
        if grad_table_EH is not None:
            grad_table_EH = grad_table_EH.to(ctx.table_dtype)
        return grad_q_NHK, grad_k_MGK, grad_v_MGK, grad_table_EH, None, None, None


# -- launching the kernels --------------------------------------------------------------------------------------------


def _run_forward(
    q_NHK: Tensor, k_MGK: Tensor, v_MGK: Tensor, bias_HX: Tensor | None, zero: int, rows: Rows, options: _Options
) -> tuple[Tensor, Tensor]:
    """What each query reads, and log Σ exp(score) of each head's query, (H, N)."""
    n_queries, n_heads, width = q_NHK.shape
    y_NHK = torch.empty_like(q_NHK)
    log_total_HN = torch.empty(n_heads, n_queries, dtype=torch.float32, device=q_NHK.device)
    grid = (_n_blocks(rows.longest[0]), n_heads, rows.key_row_B.shape[0])
    with _device_of(q_NHK):
        _forward[grid](
            *(q_NHK, k_MGK, v_MGK, bias_HX, y_NHK, log_total_HN),
            *(rows.query_start_B, rows.key_start_Q, rows.key_row_B),
            *_common_arguments(q_NHK, k_MGK, zero, options),
            num_warps=_n_warps(width),
            num_stages=N_STAGES,
        )
    return y_NHK, log_total_HN


def _run_backward(
    grad_y_NHK: Tensor,
    q_NHK: Tensor,
    k_MGK: Tensor,
    v_MGK: Tensor,
    bias_HX: Tensor | None,
    entry_X: Tensor | None,
    y_NHK: Tensor,
    log_total_HN: Tensor,
    n_entries: int,
    zero: int,
    rows: Rows,
    options: _Options,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of queries, keys, values, and of a table of n_entries (0: it has none), (E, H)."""
    n_heads, n_key_heads, width = q_NHK.shape[1], k_MGK.shape[1], q_NHK.shape[2]
    n_rows, n_key_rows = rows.key_row_B.shape[0], rows.key_start_Q.shape[0] - 1
    n_query_blocks, n_key_blocks = _n_blocks(rows.longest[0]), _n_blocks(rows.longest[1])
    arguments = _common_arguments(q_NHK, k_MGK, zero, options)
    grad_y_NHK = grad_y_NHK.contiguous()
    grad_q_NHK = torch.empty_like(q_NHK)
    grad_k_MGK = torch.empty_like(k_MGK)
    grad_v_MGK = torch.empty_like(v_MGK)
    delta_HN = torch.empty_like(log_total_HN)
    # Each program has a line of its own for its part of the table's gradient: added up in a fixed order. E is here the
    # next power of two.
    n_entries_padded = 1 << max(n_entries - 1, 0).bit_length()
    grad_table_PHE = None
    if n_entries:
        n_programs = n_rows * n_query_blocks
        grad_table_PHE = torch.empty(n_programs, n_heads, n_entries_padded, dtype=torch.float32, device=q_NHK.device)
    with _device_of(q_NHK):
        _backward_of_queries[(n_query_blocks, n_heads, n_rows)](
            *(q_NHK, k_MGK, v_MGK, bias_HX, entry_X, y_NHK, log_total_HN),
            *(grad_y_NHK, grad_q_NHK, delta_HN, grad_table_PHE),
            *(rows.query_start_B, rows.key_start_Q, rows.key_row_B),
            *arguments,
            n_entries_padded,
            num_warps=_n_warps(width),
            num_stages=N_STAGES,
        )
        _backward_of_keys[(n_key_blocks, n_key_heads, n_key_rows)](
            *(q_NHK, k_MGK, v_MGK, bias_HX, log_total_HN, grad_y_NHK, delta_HN, grad_k_MGK, grad_v_MGK),
            *(rows.query_start_B, rows.key_start_Q, rows.reader_B, rows.first_reader_Q),
            *arguments,
            num_warps=_n_warps(width),
            num_stages=N_STAGES,
        )
    grad_table_EH = None if grad_table_PHE is None else grad_table_PHE.sum(0).T[:n_entries]
    return grad_q_NHK, grad_k_MGK, grad_v_MGK, grad_table_EH


def _common_arguments(q_NHK: Tensor, k_MGK: Tensor, zero: int, options: _Options) -> tuple[Any, ...]:
    """What the arguments of all kernels end with; the kernels name them."""
    n_queries, n_heads, width = q_NHK.shape
    scale, is_causal, dropout, seed = options
    drops_below = min(round(dropout * N_RANDOM), N_RANDOM - 1)
    kept = 1.0 / (1.0 - dropout) if dropout < 1 else 0.0
    numbers = (zero, seed, drops_below, n_queries, scale, kept)
    return (*numbers, n_heads, k_MGK.shape[1], width, is_causal, dropout > 0, BLOCK)


def _n_warps(width: int) -> int:
    return 4 if width <= 64 else 8


def _n_blocks(n_tokens: int) -> int:
    return -(-n_tokens // BLOCK)  # rounded up


def _device_of(x: Tensor) -> AbstractContextManager[object]:
    """Makes the device of x the current one, on which Triton launches, whichever the tensors are on."""
    is_current = not x.is_cuda or x.get_device() == torch.cuda.current_device()
    return nullcontext() if is_current else torch.cuda.device_of(x)


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
_NUMBERS = ["zero", "seed", "drops_below", "n_queries"]


@triton.jit(do_not_specialize=_NUMBERS)  # type: ignore[untyped-decorator]
def _forward(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    y_ptr,
    log_total_ptr,
    query_start_ptr,
    key_start_ptr,
    key_row_ptr,
    zero,
    seed,
    drops_below,
    n_queries,
    scale,
    kept,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: a block of the queries of one row and head."""
    # 1) Which queries, and which keys do they see?
    row = tl.program_id(2)
    head = tl.program_id(1)
    first_t = tl.program_id(0) * BLOCK
    first_query = tl.load(query_start_ptr + row)
    row_length = tl.load(query_start_ptr + row + 1) - first_query
    if first_t >= row_length:
        return
    key_row = tl.load(key_row_ptr + row)
    first_key = tl.load(key_start_ptr + key_row)
    n_keys = tl.load(key_start_ptr + key_row + 1) - first_key
    if IS_CAUSAL:
        n_keys = tl.minimum(n_keys, first_t + BLOCK)
    t = first_t + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    is_query_T = t < row_length
    query_T = (first_query + t).to(tl.int64)
    place_TK = query_T[:, None] * (HEADS * WIDTH) + head * WIDTH + column[None, :]
    q_TK = tl.load(q_ptr + place_TK, mask=is_query_T[:, None], other=0.0)
    place_of_keys = first_key.to(tl.int64) * (KEY_HEADS * WIDTH) + head // (HEADS // KEY_HEADS) * WIDTH
    k_ptr += place_of_keys
    v_ptr += place_of_keys
    if bias_ptr is not None:
        bias_ptr += head * (2 * zero + 1) + zero  # where the head's distance of 0 is
    start_T = _random_start(seed, head, query_T)

    # 2) The online softmax, as decode_attention.py explains it.
    highest_T = tl.full([BLOCK], -float("inf"), tl.float32)
    total_T = tl.zeros([BLOCK], tl.float32)
    y_TK = tl.zeros([BLOCK, WIDTH], tl.float32)
    for first_s in range(0, n_keys, BLOCK):
        s = first_s + tl.arange(0, BLOCK)
        is_key_S = s < n_keys
        k_KS = tl.load(k_ptr + s[None, :] * (KEY_HEADS * WIDTH) + column[:, None], mask=is_key_S[None, :], other=0.0)
        v_SK = tl.load(v_ptr + s[:, None] * (KEY_HEADS * WIDTH) + column[None, :], mask=is_key_S[:, None], other=0.0)
        score_TS = tl.dot(q_TK, k_KS, input_precision="ieee") * scale
        if bias_ptr is not None:
            is_pair_TS = is_key_S[None, :] & is_query_T[:, None]
            distance_TS = s.to(tl.int64)[None, :] - t.to(tl.int64)[:, None]  # as wide as addresses: fewer registers
            score_TS += tl.load(bias_ptr + distance_TS, mask=is_pair_TS, other=0.0)
        is_seen_TS = is_key_S[None, :]
        if IS_CAUSAL:
            is_seen_TS = is_seen_TS & (s[None, :] <= t[:, None])
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
    tl.store(y_ptr + place_TK, y_TK.to(y_ptr.dtype.element_ty), mask=is_query_T[:, None])
    tl.store(log_total_ptr + head.to(tl.int64) * n_queries + query_T, highest_T + tl.log(total_T), mask=is_query_T)


# -- the backward pass ------------------------------------------------------------------------------------------------


@triton.jit  # type: ignore[untyped-decorator]
def _sums_of_diagonals(x_TS, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """The sums of a block over its diagonals: those with s − t = x and those with s − t = x − BLOCK, for each x.

    Line t is turned by t places to the left, so that column x has two diagonals, of which one is x above the block's
    main diagonal and the other BLOCK − x below:

        a b c        a b c        the columns' sums above are  a + e + i,  b + f,  c
        d e f   →    e f d        and below                    0,          g,      d + h
        g h i        i g h
    """
    t = tl.arange(0, BLOCK)[:, None]
    column = t + tl.arange(0, BLOCK)[None, :]
    turned_TX = tl.gather(x_TS, column % BLOCK, 1)
    above_X = tl.sum(tl.where(column < BLOCK, turned_TX, 0.0), 0)
    below_X = tl.sum(tl.where(column < BLOCK, 0.0, turned_TX), 0)
    return above_X, below_X


@triton.jit  # type: ignore[untyped-decorator]
def _at_entry(x_X, distance_X, entry_ptr, zero, ENTRIES: tl.constexpr):  # type: ignore[no-untyped-def]
    """The number of each distance, in the column of its entry of the table; 0 in the others. (BLOCK, ENTRIES)."""
    is_in_row_X = (distance_X >= -zero) & (distance_X <= zero)  # there is no other distance, its number is 0
    entry_X = tl.load(entry_ptr + distance_X + zero, mask=is_in_row_X, other=0)
    return tl.where(entry_X[:, None] == tl.arange(0, ENTRIES)[None, :], x_X[:, None], 0.0)


@triton.jit(do_not_specialize=_NUMBERS)  # type: ignore[untyped-decorator]
def _backward_of_queries(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    entry_ptr,
    y_ptr,
    log_total_ptr,
    grad_y_ptr,
    grad_q_ptr,
    delta_ptr,
    grad_table_ptr,
    query_start_ptr,
    key_start_ptr,
    key_row_ptr,
    zero,
    seed,
    drops_below,
    n_queries,
    scale,
    kept,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """One program: the gradient of a block of the queries of one row and head, and its part of the table's.

    With w the weights before dropout and m what dropout multiplies them by, the gradient of a score is
    w · (m · (dy · v) − Σ_s w m (dy · v)), and the sum is dy · y: `delta`, which is kept for `_backward_of_keys`.
    """
    row = tl.program_id(2)
    head = tl.program_id(1)
    first_t = tl.program_id(0) * BLOCK
    first_query = tl.load(query_start_ptr + row)
    row_length = tl.load(query_start_ptr + row + 1) - first_query
    entry = tl.arange(0, ENTRIES)
    grad_entry_E = tl.zeros([ENTRIES], tl.float32)
    line = ((row * tl.num_programs(0) + tl.program_id(0)) * HEADS + head).to(tl.int64)
    if first_t >= row_length:
        if grad_table_ptr is not None:
            tl.store(grad_table_ptr + line * ENTRIES + entry, grad_entry_E)
        return
    key_row = tl.load(key_row_ptr + row)
    first_key = tl.load(key_start_ptr + key_row)
    n_keys = tl.load(key_start_ptr + key_row + 1) - first_key
    if IS_CAUSAL:
        n_keys = tl.minimum(n_keys, first_t + BLOCK)
    t = first_t + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    is_query_T = t < row_length
    query_T = (first_query + t).to(tl.int64)
    place_TK = query_T[:, None] * (HEADS * WIDTH) + head * WIDTH + column[None, :]
    q_TK = tl.load(q_ptr + place_TK, mask=is_query_T[:, None], other=0.0)
    y_TK = tl.load(y_ptr + place_TK, mask=is_query_T[:, None], other=0.0)
    grad_y_TK = tl.load(grad_y_ptr + place_TK, mask=is_query_T[:, None], other=0.0)
    delta_T = tl.sum(y_TK.to(tl.float32) * grad_y_TK.to(tl.float32), 1)
    place_T = head.to(tl.int64) * n_queries + query_T
    tl.store(delta_ptr + place_T, delta_T, mask=is_query_T)
    # The weights of a query that is not there are exp(… − ∞) = 0.
    log_total_T = tl.load(log_total_ptr + place_T, mask=is_query_T, other=float("inf"))
    place_of_keys = first_key.to(tl.int64) * (KEY_HEADS * WIDTH) + head // (HEADS // KEY_HEADS) * WIDTH
    k_ptr += place_of_keys
    v_ptr += place_of_keys
    if bias_ptr is not None:
        bias_ptr += head * (2 * zero + 1) + zero  # where the head's distance of 0 is
    start_T = _random_start(seed, head, query_T)

    grad_q_TK = tl.zeros([BLOCK, WIDTH], tl.float32)
    for first_s in range(0, n_keys, BLOCK):
        s = first_s + tl.arange(0, BLOCK)
        is_key_S = s < n_keys
        k_SK = tl.load(k_ptr + s[:, None] * (KEY_HEADS * WIDTH) + column[None, :], mask=is_key_S[:, None], other=0.0)
        v_SK = tl.load(v_ptr + s[:, None] * (KEY_HEADS * WIDTH) + column[None, :], mask=is_key_S[:, None], other=0.0)
        score_TS = tl.dot(q_TK, tl.trans(k_SK), input_precision="ieee") * scale
        if bias_ptr is not None:
            is_pair_TS = is_key_S[None, :] & is_query_T[:, None]
            distance_TS = s.to(tl.int64)[None, :] - t.to(tl.int64)[:, None]  # as wide as addresses: fewer registers
            score_TS += tl.load(bias_ptr + distance_TS, mask=is_pair_TS, other=0.0)
        is_seen_TS = is_key_S[None, :]
        if IS_CAUSAL:
            is_seen_TS = is_seen_TS & (s[None, :] <= t[:, None])
        weight_TS = tl.where(is_seen_TS, tl.exp(score_TS - log_total_T[:, None]), 0.0)
        grad_weight_TS = tl.dot(grad_y_TK, tl.trans(v_SK), input_precision="ieee")
        if HAS_DROPOUT:
            stays_TS = _stays(start_T[:, None], s[None, :], drops_below)
            grad_weight_TS = tl.where(stays_TS, grad_weight_TS * kept, 0.0)
        grad_score_TS = weight_TS * (grad_weight_TS - delta_T[:, None])
        grad_q_TK += tl.dot(grad_score_TS.to(k_SK.dtype), k_SK, input_precision="ieee")
        if grad_table_ptr is not None:
            above_X, below_X = _sums_of_diagonals(grad_score_TS, BLOCK)
            distance_X = first_s - first_t + tl.arange(0, BLOCK)
            above_XE = _at_entry(above_X, distance_X, entry_ptr, zero, ENTRIES)
            below_XE = _at_entry(below_X, distance_X - BLOCK, entry_ptr, zero, ENTRIES)
            grad_entry_E += tl.sum(above_XE + below_XE, 0)
    tl.store(grad_q_ptr + place_TK, (grad_q_TK * scale).to(grad_q_ptr.dtype.element_ty), mask=is_query_T[:, None])
    if grad_table_ptr is not None:
        tl.store(grad_table_ptr + line * ENTRIES + entry, grad_entry_E)


@triton.jit(do_not_specialize=_NUMBERS)  # type: ignore[untyped-decorator]
def _backward_of_keys(  # type: ignore[no-untyped-def]
    q_ptr,
    k_ptr,
    v_ptr,
    bias_ptr,
    log_total_ptr,
    grad_y_ptr,
    delta_ptr,
    grad_k_ptr,
    grad_v_ptr,
    query_start_ptr,
    key_start_ptr,
    reader_ptr,
    first_reader_ptr,
    zero,
    seed,
    drops_below,
    n_queries,
    scale,
    kept,
    HEADS: tl.constexpr,
    KEY_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_CAUSAL: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: the gradients of a block of the keys and values of one row and head, from all that read them.

    Scores stand here with a line for each key, so that no product needs its factors turned.
    """
    key_row = tl.program_id(2)
    key_head = tl.program_id(1)
    first_s = tl.program_id(0) * BLOCK
    first_key = tl.load(key_start_ptr + key_row)
    n_keys = tl.load(key_start_ptr + key_row + 1) - first_key
    if first_s >= n_keys:
        return
    s = first_s + tl.arange(0, BLOCK)
    column = tl.arange(0, WIDTH)
    is_key_S = s < n_keys
    key_S = (first_key + s).to(tl.int64)
    place_SK = key_S[:, None] * (KEY_HEADS * WIDTH) + key_head * WIDTH + column[None, :]
    k_SK = tl.load(k_ptr + place_SK, mask=is_key_S[:, None], other=0.0)
    v_SK = tl.load(v_ptr + place_SK, mask=is_key_S[:, None], other=0.0)

    grad_k_SK = tl.zeros([BLOCK, WIDTH], tl.float32)
    grad_v_SK = tl.zeros([BLOCK, WIDTH], tl.float32)
    for i in range(tl.load(first_reader_ptr + key_row), tl.load(first_reader_ptr + key_row + 1)):
        row = tl.load(reader_ptr + i)
        first_query = tl.load(query_start_ptr + row)
        row_length = tl.load(query_start_ptr + row + 1) - first_query
        begin = 0
        if IS_CAUSAL:
            begin = first_s  # earlier queries see none of these keys
        for head in range(key_head * (HEADS // KEY_HEADS), (key_head + 1) * (HEADS // KEY_HEADS)):
            for first_t in range(begin, row_length, BLOCK):
                t = first_t + tl.arange(0, BLOCK)
                is_query_T = t < row_length
                query_T = (first_query + t).to(tl.int64)
                place_TK = query_T[:, None] * (HEADS * WIDTH) + head * WIDTH + column[None, :]
                q_TK = tl.load(q_ptr + place_TK, mask=is_query_T[:, None], other=0.0)
                grad_y_TK = tl.load(grad_y_ptr + place_TK, mask=is_query_T[:, None], other=0.0)
                place_T = tl.cast(head, tl.int64) * n_queries + query_T
                # The weights of a query that is not there are exp(… − ∞) = 0.
                log_total_T = tl.load(log_total_ptr + place_T, mask=is_query_T, other=float("inf"))
                delta_T = tl.load(delta_ptr + place_T, mask=is_query_T, other=0.0)
                score_ST = tl.dot(k_SK, tl.trans(q_TK), input_precision="ieee") * scale
                if bias_ptr is not None:
                    is_pair_ST = is_key_S[:, None] & is_query_T[None, :]
                    distance_ST = s.to(tl.int64)[:, None] - t.to(tl.int64)[None, :]
                    of_head_ptr = bias_ptr + head * (2 * zero + 1) + zero
                    score_ST += tl.load(of_head_ptr + distance_ST, mask=is_pair_ST, other=0.0)
                weight_ST = tl.exp(score_ST - log_total_T[None, :])
                if IS_CAUSAL:
                    weight_ST = tl.where(s[:, None] <= t[None, :], weight_ST, 0.0)
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
    tl.store(grad_k_ptr + place_SK, (grad_k_SK * scale).to(grad_k_ptr.dtype.element_ty), mask=is_key_S[:, None])
    tl.store(grad_v_ptr + place_SK, grad_v_SK.to(grad_v_ptr.dtype.element_ty), mask=is_key_S[:, None])
