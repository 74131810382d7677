"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290; paper, equations 4 and 5).

The model is trained to prefer the chosen completion of a question over the rejected one. Its reward for a completion is
implicit, r(y) = β (log π_θ(y|x) − log π_ref(y|x)): how much likelier the completion has become than it was under the
reference, the model as it was before the first step. The loss of a pair is −log σ(r(y_w) − r(y_l)).

Three choices, none of which changes the equation.

- No second model is held. π_ref never changes, so its log-probabilities are computed once, before the first step, by
  the very model that is about to be trained (`reference_log_probabilities`), and handed to `train_dpo`.
- T5's decoder is given the rationale alone, as its encoder has read the question. (Code made for decoder-only models
  gives the decoder the question too: then an encoder-decoder diverges.)
- A step encodes each question once and scores each completion once, in however many of its pairs they are.

There is no dropout, neither in the reference nor in training: it would make log π_θ − log π_ref noise at the start.
"""

import hashlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from minidpost.models.hf_config import Model
from minidpost.precision import at_least_fp32, autocast, to_device
from minidpost.processes import rank, sum_over_ranks
from minidpost.progress import Progress
from minidpost.training.batching import TokenizedExample, collate, epoch_steps
from minidpost.training.losses import dpo_loss, log_probabilities
from minidpost.training.optim import (
    Schedule,
    StepLog,
    adamw,
    apply_step,
    derived_seed,
    enable_activation_checkpointing,
    tokens_per_second,
)
from minidpost.training.parallel import let_go_of_weights, own_micro_batches
from minidpost.training.state import TrainingState

# Without gradients no activations are stored, so a GPU has room for larger batches when it computes the reference.
GPU_REFERENCE_BATCH_FACTOR = 4
GPU_REFERENCE_BATCH_TOKENS = 32768  # [ours] but not for any that are larger than this


@dataclass(frozen=True)
class DPOSettings:
    """The hyperparameters of DPO, and two ways to save memory.

    `micro_batch_tokens` bounds a micro-batch (batching.counted); it changes results by rounding.
    `activation_checkpointing` computes activations twice instead of keeping them.
    `dtype` is the precision of forward passes (precision.autocast), and should be the reference's; None: bf16 on a CUDA
    device that multiplies it.
    """

    steps: int
    pairs_per_step: int
    schedule: Schedule
    beta: float = 0.1
    micro_batch_tokens: int = 16384
    activation_checkpointing: bool = False
    seed: int = 42
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class PreferencePair:
    """A chosen (y_w) and a rejected (y_l) completion of one prompt x: an element of equation 4's data set."""

    chosen: TokenizedExample
    rejected: TokenizedExample

    @property
    def n_tokens(self) -> int:
        """The tokens of both sequences, the prompt counted twice."""
        return self.chosen.n_tokens + self.rejected.n_tokens

    @property
    def sequences(self) -> tuple[TokenizedExample, TokenizedExample]:
        """Both, in the order of the columns of every (…, 2) tensor in this file."""
        return (self.chosen, self.rejected)


def train_dpo(
    model: Model,
    pairs: Sequence[PreferencePair],
    reference_P2: Tensor,
    settings: DPOSettings,
    *,
    log_path: str | Path | None = None,
    stage: str = "dpo",
    state: TrainingState | None = None,
) -> None:
    """Train `model` in place, in eval mode.

    `reference_P2` is what `reference_log_probabilities` gave for these pairs and the model as it was before the first
    step: log π_ref in nats, (P, 2), columns chosen and rejected, on the CPU. ValueError where its shape is another.

    The order of the pairs is seeded by (seed, stage). The log at `log_path` has for each optimizer step the means over
    its pairs of loss (equation 5), chosen_logp and rejected_logp (log π_θ of the completions, nats), margin
    (r(y_w) − r(y_l)) and accuracy (the fraction of pairs whose margin is positive), then lr, grad_norm (before
    clipping), n_tokens and tokens_per_second. With a `state`, the training goes on where an earlier one of the same
    stage, settings (but for those that save memory), pairs and reference was stopped. UserError where the state's file
    is broken.
    """
    if reference_P2.shape != (len(pairs), 2):
        raise ValueError(f"{len(pairs)} pairs, but reference log-probabilities of shape {tuple(reference_P2.shape)}")
    order_seed = derived_seed(settings.seed, stage, "order")
    steps = epoch_steps(len(pairs), settings.pairs_per_step, settings.steps, order_seed)

    # Weights and AdamW's moments are those of a training that was stopped, if there was one.
    optimizer = adamw(model, settings.schedule)
    state = state or TrainingState()
    # A training that ran out of memory may go on with less: what saves memory is no part of which training it is.
    identity = replace(settings, micro_batch_tokens=0, activation_checkpointing=False)
    state.restore(model, optimizer, stage, identity, pairs, tensor_sha256(reference_P2))

    model.eval()  # no dropout
    if settings.activation_checkpointing:
        enable_activation_checkpointing(model)
    progress = Progress(total=settings.steps, initial=state.next_step, desc=stage, unit="step", disable=rank() > 0)
    with StepLog(log_path, state.log) as log, progress, state.around_steps():
        for step, pair_indices in enumerate(steps):
            if step < state.next_step:
                continue  # done before the training was stopped
            started = time.perf_counter()
            batch = [pairs[i] for i in pair_indices]
            metrics = dpo_gradients(
                model,
                batch,
                reference_P2[pair_indices],
                beta=settings.beta,
                micro_batch_tokens=settings.micro_batch_tokens,
                dtype=settings.dtype,
            )
            update = apply_step(model, optimizer, settings.schedule, step=step, n_steps=settings.steps)

            # Only now are the metrics read, as reading them makes the CPU wait for the GPU.
            means = {name: value.item() for name, value in metrics.items()}
            n_tokens = sum(pair.n_tokens for pair in batch)
            speed = tokens_per_second(n_tokens, started)
            log.write(step=step, **means, **update, n_tokens=n_tokens, tokens_per_second=speed)
            progress.set_postfix(loss=f"{means['loss']:.3f}", accuracy=f"{means['accuracy']:.0%}", refresh=False)
            progress.update()
            state.after_step(step, model, optimizer, log_path)


def dpo_gradients(
    model: Model,
    batch: Sequence[PreferencePair],
    reference_P2: Tensor,
    *,
    beta: float,
    micro_batch_tokens: int,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """Forward and backward pass of one optimizer step, whose pairs are `batch` and whose log π_ref is `reference_P2`.

    Adds to each parameter's `.grad` the gradient of equation 5's mean over the batch; returns the batch's means of
    loss, chosen_logp, rejected_logp, margin and accuracy (scalars without gradient, on the model's device). `dtype` is
    the precision of the forward pass, see DPOSettings. On several processes each computes a part of the batch, and all
    return the same.
    """
    device = next(model.parameters()).device
    names = ("loss", "chosen_logp", "rejected_logp", "margin", "accuracy")
    metrics = {name: torch.zeros((), device=device) for name in names}

    # Gradient accumulation: every part is divided by the pairs of the whole step, so that the parts add up to its mean.
    for indices, weight in own_pair_micro_batches(model, batch, micro_batch_tokens):
        policy_B2 = pair_log_probabilities(model, [batch[i] for i in indices], dtype)  # log π_θ, with gradient
        reference_B2 = to_device(reference_P2[indices], device)  # log π_ref, constants
        loss_B, margin_B = dpo_loss(policy_B2, reference_B2, beta)  # equation 5
        (weight * loss_B.sum() / len(batch)).backward()

        chosen_B, rejected_B = policy_B2.detach().unbind(1)
        is_preferred_B = (margin_B > 0).to(chosen_B.dtype)
        for name, value_B in zip(names, (loss_B, chosen_B, rejected_B, margin_B, is_preferred_B), strict=True):
            metrics[name] += weight * value_B.detach().sum() / len(batch)
    return {name: sum_over_ranks(value) for name, value in metrics.items()}


@torch.no_grad()
def reference_log_probabilities(
    model: Model,
    pairs: Sequence[PreferencePair],
    *,
    micro_batch_tokens: int,
    stage: str = "dpo",
    dtype: torch.dtype | None = None,
) -> Tensor:
    """log π_ref of every pair's completions in nats, (P, 2), columns chosen and rejected, on the CPU.

    `model` is the policy before its first step; it is put into eval mode. `stage` is for the progress bar alone.
    `dtype` is the precision of the forward passes, as DPOSettings has it.
    """
    model.eval()  # no dropout
    weight = next(model.parameters())
    max_tokens = reference_batch_tokens(micro_batch_tokens, weight.device)

    # Each rank fills in its own pairs, and leaves the others' at 0, so that the sum has all.
    reference_P2 = torch.zeros(len(pairs), 2, dtype=at_least_fp32(weight.dtype))
    batches = [*own_pair_micro_batches(model, pairs, max_tokens)]
    for indices, is_own in Progress(batches, desc=f"{stage} reference", unit="batch", leave=False, disable=rank() > 0):
        logp_B2 = pair_log_probabilities(model, [pairs[i] for i in indices], dtype).cpu()
        if is_own:
            reference_P2[indices] = logp_B2
    let_go_of_weights(model)
    return sum_over_ranks(reference_P2)


def reference_batch_tokens(micro_batch_tokens: int, device: torch.device | str) -> int:
    """What bounds the reference's micro-batches where `micro_batch_tokens` bounds training's."""
    if torch.device(device).type == "cpu":
        return micro_batch_tokens
    return max(micro_batch_tokens, min(GPU_REFERENCE_BATCH_FACTOR * micro_batch_tokens, GPU_REFERENCE_BATCH_TOKENS))


def pair_log_probabilities(model: Model, pairs: Sequence[PreferencePair], dtype: torch.dtype | None = None) -> Tensor:
    """log π(y|x) of the completions of each pair in nats, (B, 2), columns chosen and rejected.

    One forward pass scores every distinct completion once. Pairs a ≻ b and a ≻ c have three:

        completions         a     b     c
        log π             [-5,   -9,   -7]
        index_B2          [[0, 1], [0, 2]]         a and b, a and c
        result            [[-5, -9], [-5, -7]]
    """
    device = next(model.parameters()).device
    completions = distinct_completions(pairs)
    with autocast(device, dtype):
        log_probability_C = log_probabilities(model, collate(model.config, completions, device)).sum(-1)

    index_of = {completion: index for index, completion in enumerate(completions)}
    index_B2 = torch.tensor([[index_of[pair.chosen], index_of[pair.rejected]] for pair in pairs])
    return log_probability_C[to_device(index_B2, device)]


def own_pair_micro_batches(
    model: Model, pairs: Sequence[PreferencePair], max_tokens: int
) -> Iterator[tuple[list[int], float]]:
    """This rank's micro-batches of pairs 0 … n−1 and their weights, see parallel.own_micro_batches.

    All pairs of a question are together: pairs of the questions x, y, x, z may give [[0, 2], [1, 3]], where x has a
    micro-batch of its own, y and z share one.
    """
    pairs_of_question: dict[tuple[int, ...], list[int]] = {}
    for index, pair in enumerate(pairs):
        pairs_of_question.setdefault(pair.chosen.prompt_ids, []).append(index)

    questions = list(pairs_of_question.values())
    items = [distinct_completions([pairs[i] for i in indices]) for indices in questions]
    device = next(model.parameters()).device
    for batch, weight in own_micro_batches(model, items, max_tokens, device):
        yield [index for question in batch for index in questions[question]], weight


def distinct_completions(pairs: Sequence[PreferencePair]) -> list[TokenizedExample]:
    """The completions of some pairs (with their prompts), each once, in order of appearance."""
    return list(dict.fromkeys(completion for pair in pairs for completion in pair.sequences))


def tensor_sha256(tensor: Tensor) -> str:
    """A hash of a tensor's values, bit for bit."""
    return hashlib.sha256(tensor.detach().cpu().numpy().tobytes()).hexdigest()
