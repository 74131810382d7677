"""Token log-probabilities and the two losses: supervised fine-tuning (paper, equation 2) and DPO (equation 5).

The logits of a whole batch never exist: with Llama-3's vocabulary of 128,256 tokens they would outweigh the model. The
output matrix is applied to a bounded number of positions at a time, only where there is a token to predict, and once
more in the backward pass.
"""

import torch.nn.functional as F
from torch import Tensor

from minidpost.models.hf_config import Model
from minidpost.training.batching import Batch

LOGITS_AT_ONCE = 2**26  # numbers: 256 MiB in fp32


def log_probabilities(model: Model, batch: Batch, logits_at_once: int = LOGITS_AT_ONCE) -> Tensor:
    """log f(y_t | x, y_<t) of every label of a batch in nats, (B, T), 0 where there is no label.

    At most `logits_at_once` logits exist at a time. But for that, the definition is

        log_BTV = model(*batch.inputs).log_softmax(-1)
        has_label_BT = batch.label_BT != IGNORED_LABEL
        label_BT1 = batch.label_BT.clamp(min=0)[..., None]
        result_BT = log_BTV.gather(-1, label_BT1)[..., 0]
        return result_BT * has_label_BT
    """
    result_N = model.label_log_probabilities(
        batch.inputs,
        label_N=batch.label_BT.flatten()[batch.position_N],
        position_N=batch.position_N,
        positions_at_once=max(1, logits_at_once // model.config.vocab_size),
    )
    # Back to where the labels stand: positions [0, 1, 4] of a (2, 3) batch give [[r0, r1, 0], [0, r2, 0]].
    result = result_N.new_zeros(batch.label_BT.numel()).index_copy(0, batch.position_N, result_N)
    return result.view(batch.label_BT.shape)


def sft_loss(log_probability_BT: Tensor, n_tokens: int) -> Tensor:
    """Equation 2's −Σ_t log f(y_t | x, y_<t), divided by `n_tokens`: the target tokens of the whole optimizer step.

    Summed over the micro-batches of a step, it is the step's mean loss in nats a token, however the step was cut.
    """
    return -log_probability_BT.sum() / n_tokens


def dpo_loss(policy_B2: Tensor, reference_B2: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """Equation 5, −log σ(r(y_w) − r(y_l)) with the reward r(y) = β (log π_θ(y|x) − log π_ref(y|x)), for each pair.

    `policy_B2` and `reference_B2` are log-probabilities of whole completions in nats: column 0 of the chosen ones
    (y_w), column 1 of the rejected ones (y_l). Returns (loss_B, margin_B), the margin being r(y_w) − r(y_l): how much
    more the reward is for the chosen completion. Before the first update all margins are 0 and all losses ln 2.
    """
    log_ratio_chosen_B, log_ratio_rejected_B = (policy_B2 - reference_B2).unbind(1)  # log π_θ/π_ref: rewards over β
    margin_B = beta * (log_ratio_chosen_B - log_ratio_rejected_B)
    return -F.logsigmoid(margin_B), margin_B
