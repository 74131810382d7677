"""The choice of one id a row from few rows of many logits, which may lie in memory row by row or id by id.

On a CPU the output matrix gives them id by id (see kvcache.linear), where reductions that keep the rows side by side
are an order of magnitude faster than an argmax or a cumulated sum along a row.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # ids whose probabilities are summed before they are looked at one by one


def most_likely(logits_BV: Tensor) -> Tensor:
    """The id of each row's greatest logit, of several that are equal the first; (B,)."""
    if logits_BV.device.type != "cpu" or logits_BV.dtype == torch.bfloat16:
        return logits_BV.argmax(-1)
    if logits_BV.is_contiguous():
        return torch.from_numpy(logits_BV.numpy().argmax(-1))  # a tenth of torch's time
    id_N, row_N = (logits_BV.T == logits_BV.amax(-1)).numpy().nonzero()
    chosen_B = np.zeros(len(logits_BV), dtype=np.int64)
    chosen_B[row_N[::-1]] = id_N[::-1]  # of several that are written the last counts, which is the first
    return torch.from_numpy(chosen_B)


def nucleus(scores_BN: Tensor, top_p: float) -> Tensor:
    """Scores in falling order, −inf behind the fewest that have `top_p` of the probability."""
    cumulated_BN = scores_BN.softmax(-1).cumsum(-1)
    last_B1 = torch.searchsorted(cumulated_BN, cumulated_BN[:, -1:] * top_p)
    behind_BN = torch.arange(scores_BN.shape[-1], device=scores_BN.device) > last_B1
    return scores_BN.masked_fill(behind_BN, -torch.inf)


def draw(scores_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Where each row's uniform number falls in the cumulated probabilities, (B,): first which block, then which id."""
    n_ids, n_blocks = scores_BV.shape[-1], -(-scores_BV.shape[-1] // BLOCK)
    weight_BV = (scores_BV - scores_BV.amax(-1, keepdim=True)).exp_()
    weight_BNK = F.pad(weight_BV, (0, n_blocks * BLOCK - n_ids)).unflatten(-1, (n_blocks, BLOCK))
    cumulated_BN = weight_BNK.sum(-1).cumsum(-1)
    target_B1 = below(cumulated_BN, uniform_B[:, None].to(cumulated_BN.dtype) * cumulated_BN[:, -1:])
    block_B1 = place(cumulated_BN, target_B1)
    before_B1 = F.pad(cumulated_BN, (1, 0)).gather(-1, block_B1)
    inside_BK = weight_BNK[torch.arange(len(block_B1), device=block_B1.device), block_B1[:, 0]].cumsum(-1)
    id_B1 = block_B1 * BLOCK + place(inside_BK, below(inside_BK, target_B1 - before_B1))
    return id_B1[:, 0].clamp(max=n_ids - 1)  # where logits are NaN, the search ends behind the last


def below(cumulated_BN: Tensor, target_B1: Tensor) -> Tensor:
    """The targets, but strictly below the sum, so that rounding never puts one behind the last that has a weight."""
    sum_B1 = cumulated_BN[:, -1:]
    return torch.minimum(target_B1, torch.nextafter(sum_B1, torch.zeros_like(sum_B1)))


def place(cumulated_BN: Tensor, target_B1: Tensor) -> Tensor:
    """The first place whose cumulated sum is above the target."""
    return torch.searchsorted(cumulated_BN, target_B1, right=True).clamp(max=cumulated_BN.shape[-1] - 1)
