"""The choice of a token: one id a row out of the logits of the whole vocabulary.

Greedy, or random by *inverse CDF*: a row's uniform number u in [0, 1) chooses the first id at which the cumulated
probability is above u. With these probabilities and u = 0.7 that is id 2:

    id                    0     1     2     3
    probability         0.1   0.5   0.3   0.1
    cumulated           0.1   0.6   0.9   1.0
                                    ^ the first above 0.7

So the whole randomness of a row is a list of numbers, one a position (`row_uniforms`), which depends on nothing but
seed, question and sample: not on other rows, not on the device, not on the order of work.

A large vocabulary is cumulated in two levels: the sums of blocks of 64 ids say which block u falls into, and only that
block is looked at id by id. Logits may lie in memory row by row or id by id, as a CPU's product for few rows gives them
(see layers.linear): there reductions that keep the rows side by side are an order of magnitude faster than an argmax or
a cumulated sum along a row.
"""

import hashlib
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 64  # ids whose probabilities are summed before they are looked at one by one
SMALL_VOCABULARY = 4096  # ids; up to so many one level is as fast as two


@dataclass(frozen=True)
class SamplingSettings:
    """How completions are sampled. Temperature 0 is greedy; top_k 0 and top_p 1 leave the whole vocabulary.

    `slots` is the number of rows decoded at once; it changes the speed, not the completions.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 300
    slots: int = 64
    seed: int = 42


def row_uniforms(settings: SamplingSettings, question: str, sample_index: int) -> NDArray[np.float64]:
    """A row's numbers in [0, 1), one for each token it may emit, from Philox keyed by (seed, question, sample).

    Philox is a counter-based generator: number i is a hash of (key, i), the same on every machine.
    """
    name = f"{settings.seed}\0{question}\0{sample_index}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).random(settings.max_new_tokens)


def choose(logits_BV: Tensor, uniform_B: Tensor | None, settings: SamplingSettings) -> Tensor:
    """One id a row, (B,): the most likely one (uniform_B None), or that on which the row's uniform number falls.

    The order is that of others' samplers: temperature, then top-k, then top-p (the fewest tokens that reach it).
    """
    if uniform_B is None:
        return most_likely(logits_BV)
    # At least fp32: bf16 cannot tell cumulated probabilities apart.
    logits_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    if not settings.top_k and settings.top_p == 1:
        return inverse_cdf(logits_BV, uniform_B, settings.temperature)

    # Candidates in falling order; N of the V ids where top-k says so.
    if settings.top_k:
        n_candidates = min(settings.top_k, logits_BV.shape[-1])
        logits_BN, candidate_ids_BN = logits_BV.topk(n_candidates, dim=-1)
    else:
        logits_BN, candidate_ids_BN = logits_BV.sort(dim=-1, descending=True, stable=True)
    scores_BN = logits_BN / settings.temperature
    if settings.top_p < 1:
        scores_BN = nucleus(scores_BN, settings.top_p)

    # What is chosen is a place among the candidates; back to an id of the vocabulary.
    place_B = inverse_cdf(scores_BN, uniform_B)
    return candidate_ids_BN.gather(-1, place_B[:, None])[:, 0]


def most_likely(logits_BV: Tensor) -> Tensor:
    """The id of each row's greatest logit, of several that are equal the first; (B,)."""
    if logits_BV.device.type != "cpu":
        return logits_BV.argmax(-1)
    if logits_BV.dtype == torch.bfloat16:
        logits_BV = logits_BV.float()  # numpy has no bf16, and torch's argmax takes ten times as long
    if logits_BV.is_contiguous() or logits_BV.shape[-1] <= SMALL_VOCABULARY:
        return torch.from_numpy(logits_BV.numpy().argmax(-1))  # a tenth of torch's time
    # The first block that has the greatest logit, then the first id in it.
    logits_BV = pad_to_blocks(logits_BV, -torch.inf)
    block_B = most_likely(reduce_blocks(torch.amax, logits_BV).contiguous())
    return block_B * BLOCK + most_likely(gather_block(logits_BV, block_B))


def nucleus(scores_BN: Tensor, top_p: float) -> Tensor:
    """Top-p: scores in falling order, −inf after the fewest that have `top_p` of the probability."""
    cumulated_BN = scores_BN.softmax(-1).cumsum(-1)
    last_B1 = torch.searchsorted(cumulated_BN, cumulated_BN[:, -1:] * top_p)
    is_after_last_BN = torch.arange(scores_BN.shape[-1], device=scores_BN.device) > last_B1
    return scores_BN.masked_fill(is_after_last_BN, -torch.inf)


def inverse_cdf(scores_BV: Tensor, uniform_B: Tensor, temperature: float = 1.0) -> Tensor:
    """The first id at which softmax(scores / temperature), cumulated, is above the row's uniform number; (B,).

    Probabilities are not divided by their sum; u is multiplied by it instead. With blocks of 2 ids, the example above:

        weights             0.1   0.5 | 0.3   0.1
        sums of blocks            0.6 | 0.4          cumulated 0.6, 1.0: the first above 0.7 is block 1
        within block 1                  0.3   0.1    cumulated 0.3, 0.4: the first above 0.7 − 0.6 is its id 0
        id = block · 2 + 0 = 2
    """
    # exp(x) as 2^(x log₂e): where the result is so small that it underflows, as most of a vocabulary's do under a sure
    # model, torch's exp takes twenty times as long on a CPU. In place, so that there is one large tensor and not three.
    weight_BV = (scores_BV - scores_BV.amax(-1, keepdim=True)).mul_(math.log2(math.e) / temperature).exp2_()
    uniform_B = uniform_B.to(weight_BV.dtype)
    if weight_BV.shape[-1] <= SMALL_VOCABULARY:
        cumulated_BV = weight_BV.cumsum(-1)
        return first_above(cumulated_BV, uniform_B * cumulated_BV[:, -1])

    # 1) Which block.
    weight_BV = pad_to_blocks(weight_BV, 0.0)
    cumulated_BN = reduce_blocks(torch.sum, weight_BV).cumsum(-1)  # N blocks
    target_B = uniform_B * cumulated_BN[:, -1]
    block_B = first_above(cumulated_BN, target_B)

    # 2) Which id of the block, by what is left of the target.
    before_block_B = F.pad(cumulated_BN, (1, 0)).gather(-1, block_B[:, None])[:, 0]
    block_weight_BN = gather_block(weight_BV, block_B)  # N = BLOCK ids
    id_B = block_B * BLOCK + first_above(block_weight_BN.cumsum(-1), target_B - before_block_B)
    return id_B.clamp(max=scores_BV.shape[-1] - 1)  # where logits are NaN, the search ends after the last id


def first_above(cumulated_BN: Tensor, target_B: Tensor) -> Tensor:
    """The first place at which the cumulated sum is above the target, (B,).

    A target is held strictly below the whole sum, so that rounding never puts it after the last place with a weight.
    """
    sum_B1 = cumulated_BN[:, -1:]
    target_B1 = torch.minimum(target_B[:, None], torch.nextafter(sum_B1, torch.zeros_like(sum_B1)))
    place_B1 = torch.searchsorted(cumulated_BN, target_B1, right=True)
    return place_B1[:, 0].clamp(max=cumulated_BN.shape[-1] - 1)


def pad_to_blocks(x_BV: Tensor, value: float) -> Tensor:
    """The rows, filled up with `value` to a multiple of BLOCK."""
    n_missing = -x_BV.shape[-1] % BLOCK
    return F.pad(x_BV, (0, n_missing), value=value) if n_missing else x_BV


def reduce_blocks(reduce: Callable[..., Tensor], x_BV: Tensor) -> Tensor:
    """`reduce` (torch.sum, torch.amax) of each of the N blocks, (B, N), along the order in memory."""
    if x_BV.stride(0) < x_BV.stride(1):  # id by id
        return reduce(torch.unflatten(x_BV.T, 0, (-1, BLOCK)), dim=1).T
    return reduce(torch.unflatten(x_BV, -1, (-1, BLOCK)), dim=-1)


def gather_block(x_BV: Tensor, block_B: Tensor) -> Tensor:
    """One block of each row, (B, BLOCK)."""
    row_B = torch.arange(len(block_B), device=block_B.device)
    return torch.unflatten(x_BV, -1, (-1, BLOCK))[row_B, block_B].contiguous()
