"""The choice of one id a row from few rows of many logits, which may lie in memory row by row or id by id.

On a CPU the output matrix gives them id by id (see kvcache.linear), where reductions that keep the rows side by side
are an order of magnitude faster than an argmax or a cumulated sum along a row.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 64  # ids whose probabilities are summed before they are looked at one by one
FEW = 4096  # ids of which it does not pay


def most_likely(logits_BV: Tensor) -> Tensor:
    """The id of each row's greatest logit, of several that are equal the first; (B,)."""
    if logits_BV.device.type != "cpu" or logits_BV.dtype == torch.bfloat16:
        return logits_BV.argmax(-1)
    if logits_BV.is_contiguous() or logits_BV.shape[-1] <= FEW:
        return torch.from_numpy(logits_BV.numpy().argmax(-1))  # a tenth of torch's time
    logits_BV = whole_blocks(logits_BV, -torch.inf)
    block_B = most_likely(of_blocks(torch.amax, logits_BV).contiguous())
    return block_B * BLOCK + most_likely(block(logits_BV, block_B))


def nucleus(scores_BN: Tensor, top_p: float) -> Tensor:
    """Scores in falling order, −inf behind the fewest that have `top_p` of the probability."""
    cumulated_BN = scores_BN.softmax(-1).cumsum(-1)
    last_B1 = torch.searchsorted(cumulated_BN, cumulated_BN[:, -1:] * top_p)
    behind_BN = torch.arange(scores_BN.shape[-1], device=scores_BN.device) > last_B1
    return scores_BN.masked_fill(behind_BN, -torch.inf)


def draw(scores_BV: Tensor, uniform_B: Tensor, temperature: float = 1.0) -> Tensor:
    """Where each row's uniform number falls in the cumulated probabilities, (B,): first which block, then which id."""
    weight_BV = (scores_BV - scores_BV.amax(-1, keepdim=True)).div_(temperature).exp_()  # one large tensor, not three
    uniform_B = uniform_B.to(weight_BV.dtype)
    if weight_BV.shape[-1] <= FEW:
        cumulated_BV = weight_BV.cumsum(-1)
        return place(cumulated_BV, uniform_B * cumulated_BV[:, -1])
    weight_BV = whole_blocks(weight_BV, 0.0)
    cumulated_BN = of_blocks(torch.sum, weight_BV).cumsum(-1)
    target_B = uniform_B * cumulated_BN[:, -1]
    block_B = place(cumulated_BN, target_B)
    before_B = F.pad(cumulated_BN, (1, 0)).gather(-1, block_B[:, None])[:, 0]
    id_B = block_B * BLOCK + place(block(weight_BV, block_B).cumsum(-1), target_B - before_B)
    return id_B.clamp(max=scores_BV.shape[-1] - 1)  # where logits are NaN, the search ends behind the last


def place(cumulated_BN: Tensor, target_B: Tensor) -> Tensor:
    """The first place whose cumulated sum is above the target, (B,).

    Targets are kept strictly below the whole sum, so that rounding never puts one behind the last that has a weight.
    """
    sum_B1 = cumulated_BN[:, -1:]
    target_B1 = torch.minimum(target_B[:, None], torch.nextafter(sum_B1, torch.zeros_like(sum_B1)))
    found_B1 = torch.searchsorted(cumulated_BN, target_B1, right=True)
    return found_B1[:, 0].clamp(max=cumulated_BN.shape[-1] - 1)


def whole_blocks(x_BV: Tensor, value: float) -> Tensor:
    """The rows, filled up to a multiple of BLOCK."""
    gap = -x_BV.shape[-1] % BLOCK
    return F.pad(x_BV, (0, gap), value=value) if gap else x_BV


def of_blocks(reduce: Callable[..., Tensor], x_BV: Tensor) -> Tensor:
    """What `reduce` makes of each block, (B, N), along the order in memory."""
    if x_BV.stride(0) < x_BV.stride(1):
        return reduce(x_BV.T.unflatten(0, (-1, BLOCK)), dim=1).T
    return reduce(x_BV.unflatten(-1, (-1, BLOCK)), dim=-1)


def block(x_BV: Tensor, block_B: Tensor) -> Tensor:
    """One block of each row, (B, BLOCK)."""
    row_B = torch.arange(len(block_B), device=block_B.device)
    return x_BV.unflatten(-1, (-1, BLOCK))[row_B, block_B].contiguous()
