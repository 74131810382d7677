"""Attention whose weights are dropped, in training on a CPU.

No kernel of torch's does it there: its plain products keep every attention weight for the backward pass, what dropout
makes of it and the mask, and most of the time goes into drawing the mask. Here a few rows are computed at a time, the
backward pass computes their weights again, and the mask's random bits are drawn sixteen a number. On a GPU torch's
fused kernels do as much.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

WEIGHTS_AT_ONCE = 2**20  # [ours] attention weights of the rows that are computed at a time: they stay in the cache
BITS = 16  # random bits that decide about a weight


def dropped_attention(
    q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias_BHTS: Tensor, *, dropout: float, scale: float
) -> Tensor:
    """dropout(softmax(q kᵀ · scale + bias)) v, (B, H, T, K); each of G heads of keys is read by H / G of queries.

    The bias is of four dimensions of which the first two may be 1, −inf where a query must not look. `dropout` is
    rounded to a multiple of 2⁻¹⁶, and weights that stay are multiplied by 1 / (1 − dropout). Which ones are dropped
    depends on the state of torch's generator alone, which is moved on.
    """
    threshold = round(dropout * 2**BITS)
    seed = int(torch.randint(2**63 - 1, ()))
    attended: Tensor = _DroppedAttention.apply(q_BHTK * scale, k_BGSK, v_BGSK, bias_BHTS, threshold, seed)
    return attended


class _DroppedAttention(torch.autograd.Function):
    """softmax(q kᵀ + bias), weights dropped, times v."""

    @staticmethod
    def forward(
        ctx: Any, q_BHTK: Tensor, k_BGSK: Tensor, v_BGSK: Tensor, bias_BHTS: Tensor, threshold: int, seed: int
    ) -> Tensor:
        """A few rows at a time."""
        ctx.save_for_backward(q_BHTK, k_BGSK, v_BGSK, bias_BHTS)
        ctx.threshold = threshold
        ctx.seed = seed
        y_BHTK = torch.empty_like(q_BHTK, memory_format=torch.contiguous_format)
        kept = 1 - threshold / 2**BITS
        for rows in row_groups(q_BHTK, k_BGSK):
            weight_NHTS = weights(q_BHTK[rows], k_BGSK[rows], of_rows(bias_BHTS, rows))
            weight_NHTS.mul_(stays(weight_NHTS, threshold, seed, rows.start))
            y_BHTK[rows] = by_keys(weight_NHTS.to(v_BGSK.dtype), v_BGSK[rows]).div_(kept)
        return y_BHTK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHTK: Tensor) -> tuple[Tensor | None, ...]:
        """The same rows again; with w the weights and d the mask over its kept fraction, y = (w · d) v."""
        q_BHTK, k_BGSK, v_BGSK, bias_BHTS = ctx.saved_tensors
        kept = 1 - ctx.threshold / 2**BITS
        q_grad = torch.empty_like(q_BHTK)
        k_grad = torch.empty_like(k_BGSK)
        v_grad = torch.empty_like(v_BGSK)
        bias_grad = torch.zeros_like(bias_BHTS) if ctx.needs_input_grad[3] else None
        for rows in row_groups(q_BHTK, k_BGSK):
            grad_NHTK = grad_BHTK[rows] / kept
            weight_NHTS = weights(q_BHTK[rows], k_BGSK[rows], of_rows(bias_BHTS, rows))
            mask_NHTS = stays(weight_NHTS, ctx.threshold, ctx.seed, rows.start)
            # 1) Of the values, and of the weights.
            kept_NHTS = (weight_NHTS * mask_NHTS).to(v_BGSK.dtype)
            v_grad[rows] = to_keys(kept_NHTS, grad_NHTK, v_BGSK.shape[1])
            weight_grad_NHTS = by_keys(grad_NHTK, v_BGSK[rows].mT).to(weight_NHTS.dtype)
            weight_grad_NHTS.mul_(mask_NHTS)
            # 2) Through the softmax: s' = w · (w' − Σ w w').
            score_grad_NHTS = torch._softmax_backward_data(weight_grad_NHTS, weight_NHTS, -1, weight_NHTS.dtype)
            if bias_grad is not None:
                of_rows(bias_grad, rows).add_(score_grad_NHTS.sum_to_size(of_rows(bias_grad, rows).shape))
            # 3) Of the queries and keys.
            score_grad_NHTS = score_grad_NHTS.to(q_BHTK.dtype)
            q_grad[rows] = by_keys(score_grad_NHTS, k_BGSK[rows])
            k_grad[rows] = to_keys(score_grad_NHTS, q_BHTK[rows], k_BGSK.shape[1])
        return q_grad, k_grad, v_grad, bias_grad, None, None


def row_groups(q_BHTK: Tensor, k_BGSK: Tensor) -> list[slice]:
    """The rows that are computed at a time."""
    n_rows, n_heads, n_queries, _ = q_BHTK.shape
    n_at_once = max(1, WEIGHTS_AT_ONCE // (n_heads * n_queries * k_BGSK.shape[2]))
    return [slice(start, min(start + n_at_once, n_rows)) for start in range(0, n_rows, n_at_once)]


def of_rows(bias_BHTS: Tensor, rows: slice) -> Tensor:
    """The bias of some rows, which may be one for all."""
    return bias_BHTS if bias_BHTS.shape[0] == 1 else bias_BHTS[rows]


def weights(q_NHTK: Tensor, k_NGSK: Tensor, bias_NHTS: Tensor) -> Tensor:
    """softmax(q kᵀ + bias) in at least fp32."""
    score_NHTS = by_keys(q_NHTK, k_NGSK.mT)
    score_NHTS = score_NHTS.to(torch.promote_types(score_NHTS.dtype, torch.float32)).add_(bias_NHTS)
    return torch.softmax(score_NHTS, -1)


def by_keys(x_NHTX: Tensor, y_NGXY: Tensor) -> Tensor:
    """x y, (N, H, T, Y), where the heads of y are each for H / G neighbouring heads of x."""
    n_rows, n_heads, n_queries, _ = x_NHTX.shape
    product_NGRY = x_NHTX.reshape(n_rows, y_NGXY.shape[1], -1, x_NHTX.shape[-1]) @ y_NGXY
    return product_NGRY.view(n_rows, n_heads, n_queries, -1)


def to_keys(x_NHTS: Tensor, y_NHTK: Tensor, n_groups: int) -> Tensor:
    """xᵀ y summed over the heads that share keys, (N, G, S, K)."""
    n_rows = len(x_NHTS)
    x_NGRS = x_NHTS.reshape(n_rows, n_groups, -1, x_NHTS.shape[-1])
    return x_NGRS.mT @ y_NHTK.reshape(n_rows, n_groups, -1, y_NHTK.shape[-1])


def stays(weight_NHTS: Tensor, threshold: int, seed: int, first_row: int) -> Tensor:
    """False for each weight with a probability of threshold / 2¹⁶; for the rows from `first_row` on always the same."""
    n_words = -(-weight_NHTS.numel() * BITS // 64)
    words = np.random.SFC64([seed, first_row]).random_raw(n_words)
    bits = torch.from_numpy(words.view(np.int16))[: weight_NHTS.numel()].view(weight_NHTS.shape)
    return bits >= threshold - 2 ** (BITS - 1)
