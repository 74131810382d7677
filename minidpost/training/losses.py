"""Token log-probabilities and the two losses (paper, equations 2 and 5).

The logits of a whole batch never exist: with Llama-3's 128,256 pieces they would outweigh the model. The output matrix
is applied to a bounded number of positions at a time, only where there is a token to predict, and once more in the
backward pass.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minidpost.training.batching import Batch

LOGITS_AT_ONCE = 2**25  # numbers: 128 MiB in fp32


def token_log_probabilities(logits_NV: Tensor, label_N: Tensor) -> Tensor:
    """log f(y_t | x, y_<t) of each label in nats, (N,), computed in at least fp32."""
    return -F.cross_entropy(logits_NV.float() if logits_NV.itemsize < 4 else logits_NV, label_N, reduction="none")


def log_probabilities(model: nn.Module, batch: Batch, logits_at_once: int = LOGITS_AT_ONCE) -> Tensor:
    """log f(y_t | x, y_<t) of every label of a batch in nats, (B, T), 0 where there is none."""

    def of_positions(hidden_ND: Tensor, label_N: Tensor) -> Tensor:
        return token_log_probabilities(model.logits(hidden_ND), label_N)

    hidden_ND = model.hidden(*batch.inputs).flatten(0, 1)[batch.position_N]
    label_N = batch.label_BT.flatten()[batch.position_N]
    at_once = max(1, logits_at_once // model.config.vocab_size)
    if len(label_N) <= at_once:
        result_N = of_positions(hidden_ND, label_N)
    else:
        chunks = zip(hidden_ND.split(at_once), label_N.split(at_once), strict=True)
        result_N = torch.cat([checkpoint(of_positions, *chunk, use_reentrant=False) for chunk in chunks])
    result = result_N.new_zeros(batch.label_BT.numel()).index_copy(0, batch.position_N, result_N)
    return result.view(batch.label_BT.shape)


def sft_loss(log_probability_BT: Tensor, n_tokens: int) -> Tensor:
    """Equation 2, −Σ_t log f(y_t | x, y_<t), divided by `n_tokens`: the target tokens of the whole optimizer step.

    The micro-batches of a step add up to its mean loss a token, however they were cut.
    """
    return -log_probability_BT.sum() / n_tokens


def dpo_loss(
    chosen_B: Tensor, rejected_B: Tensor, reference_chosen_B: Tensor, reference_rejected_B: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Equation 5, −log σ(r(y_w) − r(y_l)) with r(y) = β (log π(y|x) − log π_ref(y|x)), a pair each.

    Arguments are log-probabilities of whole completions in nats, (B,). Returns (loss_B, margin_B), the margin being
    r(y_w) − r(y_l); before the first step margins are 0 and losses ln 2.
    """
    margin_B = beta * ((chosen_B - reference_chosen_B) - (rejected_B - reference_rejected_B))
    return -F.logsigmoid(margin_B), margin_B
