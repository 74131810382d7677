"""Token log-probabilities and the two losses, as pure functions (paper, equations 2 and 5)."""

import torch.nn.functional as F
from torch import Tensor

from minidpost.batches import IGNORED


def token_log_probabilities(logits_BTV: Tensor, label_BT: Tensor) -> Tensor:
    """log f(y_t | x, y_<t) of each label in nats, computed in at least fp32, 0 where it is IGNORED. Result (B, T)."""
    logits_BVT = logits_BTV.float().transpose(1, 2) if logits_BTV.itemsize < 4 else logits_BTV.transpose(1, 2)
    return -F.cross_entropy(logits_BVT, label_BT, ignore_index=IGNORED, reduction="none")


def sequence_log_probabilities(logits_BTV: Tensor, label_BT: Tensor) -> Tensor:
    """log f(y | x) of each row, summed over its tokens, in nats. Result (B,)."""
    return token_log_probabilities(logits_BTV, label_BT).sum(-1)


def sft_loss(logits_BTV: Tensor, label_BT: Tensor, n_tokens: int) -> Tensor:
    """Equation 2, −Σ_t log f(y_t | x, y_<t), divided by `n_tokens`: the target tokens of the whole optimizer step.

    The micro-batches of a step add up to its mean loss a token, however they were cut.
    """
    return -token_log_probabilities(logits_BTV, label_BT).sum() / n_tokens


def dpo_loss(
    chosen_B: Tensor, rejected_B: Tensor, reference_chosen_B: Tensor, reference_rejected_B: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Equation 5, −log σ(r(y_w) − r(y_l)) with r(y) = β (log π(y|x) − log π_ref(y|x)), a pair each.

    Arguments are log-probabilities of whole completions in nats, (B,). Returns (loss_B, margin_B), the margin being
    r(y_w) − r(y_l); before the first step margins are 0 and losses ln 2.
    """
    margin_B = beta * ((chosen_B - reference_chosen_B) - (rejected_B - reference_rejected_B))
    return -F.logsigmoid(margin_B), margin_B
