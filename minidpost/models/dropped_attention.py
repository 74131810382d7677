"""Attention whose weights are dropped, in training on a CPU.

No kernel of torch's does it there: its plain products keep every attention weight for the backward pass, what dropout
makes of it and the mask, of long rows several times what all else needs. Here a few rows are computed at a time, and
the backward pass computes their weights and mask again. On a GPU torch's fused kernels do as much.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from minidpost.models.dropout import fraction_that_stays, new_seed, stays, threshold_of

WEIGHTS_AT_ONCE = 2**20  # [ours] attention weights that are computed at a time: they stay in the processor's cache


def dropped_attention(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_BHTS: Tensor, *, dropout: float, scale: float
) -> Tensor:
    """dropout(softmax(q kᵀ · scale)) v, (B, H, T, K); each of G heads of keys and values is read by H / G of queries.

    The mask, of which any dimension may be 1, is True where a query may see a key. `dropout` is rounded to a multiple
    of 2⁻¹⁶; weights that stay are multiplied by 1 / (1 − dropout). Which ones are dropped depends on the state of
    torch's generator alone, which moves on by one number.
    """
    y_BHTK: Tensor = _DroppedAttention.apply(  # type: ignore[no-untyped-call]
        q_BHTK * scale, k_BGSK, v_BGSK, mask_BHTS, threshold_of(dropout), new_seed()
    )
    return y_BHTK


class _DroppedAttention(torch.autograd.Function):
    """With w = softmax(q kᵀ), and d what stays of it, over the fraction that stays: y = (w · d) v."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, mask_BHTS: Tensor, threshold: int, seed: int
    ) -> Tensor:
        """A few rows at a time."""
        ctx.save_for_backward(q_BHTK, k_BGSK, v_BGSK, mask_BHTS)
        ctx.threshold = threshold
        ctx.seed = seed
        y_BHTK = torch.empty_like(q_BHTK, memory_format=torch.contiguous_format)
        for rows in row_groups(q_BHTK, k_BGSK):
            weight_NHTS = weights(q_BHTK[rows], k_BGSK[rows], of_rows(mask_BHTS, rows))
            weight_NHTS.mul_(stays(weight_NHTS.shape, threshold, seed, rows.start))
            y_BHTK[rows] = by_keys(weight_NHTS.to(v_BGSK.dtype), v_BGSK[rows]) / fraction_that_stays(threshold)
        return y_BHTK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTK: Tensor) -> tuple[Tensor | None, ...]:
        """The same rows again."""
        q_BHTK, k_BGSK, v_BGSK, mask_BHTS = ctx.saved_tensors
        q_grad, k_grad, v_grad = (torch.empty_like(x) for x in (q_BHTK, k_BGSK, v_BGSK))
        for rows in row_groups(q_BHTK, k_BGSK):
            grad_NHTK = grad_BHTK[rows] / fraction_that_stays(ctx.threshold)
            weight_NHTS = weights(q_BHTK[rows], k_BGSK[rows], of_rows(mask_BHTS, rows))
            stays_NHTS = stays(weight_NHTS.shape, ctx.threshold, ctx.seed, rows.start)
            # 1) Gradients of the values, and of the weights.
            v_grad[rows] = to_keys((weight_NHTS * stays_NHTS).to(v_BGSK.dtype), grad_NHTK, v_BGSK.shape[1])
            weight_grad_NHTS = by_keys(grad_NHTK, v_BGSK[rows].mT).to(weight_NHTS.dtype).mul_(stays_NHTS)
            # 2) Through the softmax: of a score it is w · (w' − Σ w w').
            total_NHT1 = (weight_grad_NHTS * weight_NHTS).sum(-1, keepdim=True)
            score_grad_NHTS = weight_grad_NHTS.sub_(total_NHT1).mul_(weight_NHTS).to(q_BHTK.dtype)
            # 3) Of the queries and keys.
            q_grad[rows] = by_keys(score_grad_NHTS, k_BGSK[rows])
            k_grad[rows] = to_keys(score_grad_NHTS, q_BHTK[rows], k_BGSK.shape[1])
        return q_grad, k_grad, v_grad, None, None, None


def row_groups(q_BHTK: Tensor, k_BGSK: Tensor) -> Iterator[slice]:
    """The rows that are computed at a time: one or more."""
    n_rows, n_heads, n_queries, _ = q_BHTK.shape
    n_at_once = max(1, WEIGHTS_AT_ONCE // (n_heads * n_queries * k_BGSK.shape[2]))
    for start in range(0, n_rows, n_at_once):
        yield slice(start, min(start + n_at_once, n_rows))


def of_rows(mask_BHTS: Tensor, rows: slice) -> Tensor:
    """The mask of some rows, which may be one for all."""
    return mask_BHTS if mask_BHTS.shape[0] == 1 else mask_BHTS[rows]


def weights(q_NHTK: Tensor, k_NGSK: Tensor, mask_NHTS: Tensor) -> Tensor:
    """softmax(q kᵀ) where the mask is True, in at least fp32."""
    score_NHTS = by_keys(q_NHTK, k_NGSK.mT)
    score_NHTS = score_NHTS.to(torch.promote_types(score_NHTS.dtype, torch.float32))
    return score_NHTS.masked_fill_(~mask_NHTS, -torch.inf).softmax(-1)


def by_keys(x_NHTX: Tensor, y_NGXY: Tensor) -> Tensor:
    """x y, (N, H, T, Y), where each of the G heads of y is for H / G neighbouring ones of x; X and Y are any widths."""
    n_rows, n_heads, n_queries, _ = x_NHTX.shape
    product_NGRY = x_NHTX.reshape(n_rows, y_NGXY.shape[1], -1, x_NHTX.shape[-1]) @ y_NGXY
    return product_NGRY.view(n_rows, n_heads, n_queries, -1)


def to_keys(x_NHTS: Tensor, y_NHTK: Tensor, n_groups: int) -> Tensor:
    """xᵀ y, summed over the H / G heads that share keys, (N, G, S, K)."""
    x_NGRS = x_NHTS.reshape(len(x_NHTS), n_groups, -1, x_NHTS.shape[-1])
    return x_NGRS.mT @ y_NHTK.reshape(len(y_NHTK), n_groups, -1, y_NHTK.shape[-1])
