"""Supervised fine-tuning on rationales (paper, equation 2): the warm-up, and the end of every iteration.

Departure. Equation 2 is an expectation over examples of −Σ_t log f(y_t | x, y_<t), the sum over a rationale's tokens.
Ours is the mean over all target tokens of the optimizer step: the same sum, divided by the step's number of tokens
instead of its number of examples. So the size of a gradient does not depend on how long the rationales are, which
clipping its norm takes for granted; and it is what transformers' models return as their loss. [ours] The published code
trains with Hugging Face's Trainer [code]: there each device takes the mean over its own target tokens, and the step the
mean of these means, so that a token weighs more where its device's rationales are short. On one device, and without
gradient accumulation, both are the same.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from minidpost.models.hf_config import Model
from minidpost.precision import autocast
from minidpost.processes import other_rank, rank, sum_over_ranks
from minidpost.progress import Progress
from minidpost.training.batching import TokenizedExample, collate, epoch_steps
from minidpost.training.losses import log_probabilities, sft_loss
from minidpost.training.optim import (
    Schedule,
    StepLog,
    adamw,
    apply_step,
    derived_seed,
    enable_activation_checkpointing,
    tokens_per_second,
)
from minidpost.training.parallel import own_micro_batches
from minidpost.training.state import TrainingState


@dataclass(frozen=True)
class SFTSettings:
    """The hyperparameters of SFT, and two ways to save memory.

    `dropout` is the model's in this training, a probability; None: the one in its config (T5's dropout_rate, Llama's
    attention_dropout). `micro_batch_tokens` bounds a micro-batch (batching.counted); it changes results by rounding,
    and by which units dropout hits. `activation_checkpointing` computes activations twice instead of keeping them.
    `dtype` is the precision of forward passes (precision.autocast); None: bf16 on a CUDA device that multiplies it.
    """

    epochs: int
    examples_per_step: int
    schedule: Schedule
    dropout: float | None = None
    micro_batch_tokens: int = 16384
    activation_checkpointing: bool = False
    seed: int = 42
    dtype: torch.dtype | None = None


def train_sft(
    model: Model,
    examples: Sequence[TokenizedExample],
    settings: SFTSettings,
    *,
    log_path: str | Path | None = None,
    stage: str = "sft",
    state: TrainingState | None = None,
) -> None:
    """Fine-tune `model` in place; it is in eval mode afterwards.

    Dropout is on. The order of the examples and dropout are seeded by (seed, stage, step), on several processes dropout
    by the rank as well. The log at `log_path` has, for each optimizer step, loss (nats a target token), lr, grad_norm
    (before clipping), n_tokens and tokens_per_second (source and target). With a `state`, the training goes on where an
    earlier one of the same stage, settings (but for those that save memory) and examples was stopped. UserError where
    the state's file is broken.
    """
    # A plan of all optimizer steps; the last step of an epoch may be a short one.
    steps_per_epoch = -(-len(examples) // settings.examples_per_step)
    n_steps = settings.epochs * steps_per_epoch
    order_seed = derived_seed(settings.seed, stage, "order")
    steps = epoch_steps(len(examples), settings.examples_per_step, n_steps, order_seed)

    # Weights and AdamW's moments are those of a training that was stopped, if there was one.
    optimizer = adamw(model, settings.schedule)
    state = state or TrainingState()
    # A training that ran out of memory may go on with less: what saves memory is no part of which training it is.
    identity = replace(settings, micro_batch_tokens=0, activation_checkpointing=False)
    state.restore(model, optimizer, stage, identity, examples)

    begin_sft(model, settings)
    progress = Progress(total=n_steps, initial=state.next_step, desc=stage, unit="step", disable=rank() > 0)
    with StepLog(log_path, state.log) as log, progress, state.around_steps():
        for step, example_indices in enumerate(steps):
            if step < state.next_step:
                continue  # done before the training was stopped
            started = time.perf_counter()
            batch = [examples[i] for i in example_indices]

            # Every step has random numbers of its own, so that it is the same one after a restart.
            torch.manual_seed(derived_seed(settings.seed, stage, step, *other_rank()))
            loss = sft_gradients(model, batch, settings.micro_batch_tokens, dtype=settings.dtype)
            update = apply_step(model, optimizer, settings.schedule, step=step, n_steps=n_steps)

            # Only now is the loss read, as reading it makes the CPU wait for the GPU.
            n_tokens = sum(example.n_tokens for example in batch)
            speed = tokens_per_second(n_tokens, started)
            log.write(step=step, loss=loss.item(), **update, n_tokens=n_tokens, tokens_per_second=speed)
            progress.set_postfix(loss=f"{loss.item():.3f}", tok_s=f"{speed:.0f}", refresh=False)
            progress.update()
            state.after_step(step, model, optimizer, log_path)
    model.eval()


def begin_sft(model: Model, settings: SFTSettings) -> None:
    """Make a model ready for SFT's steps: dropout on, activations kept or not."""
    model.train()
    model.dropout = model.config.dropout if settings.dropout is None else settings.dropout
    if settings.activation_checkpointing:
        enable_activation_checkpointing(model)


def sft_gradients(
    model: Model,
    batch: Sequence[TokenizedExample],
    micro_batch_tokens: int,
    *,
    dtype: torch.dtype | None = None,
    ends_step: bool = True,
) -> Tensor:
    """Forward and backward pass of one optimizer step, whose examples are `batch`.

    Adds to each parameter's `.grad` the gradient of the mean loss over all target tokens of the batch; returns that
    loss (nats a token, without gradient, on the model's device). `dtype` is the precision of the forward pass, see
    SFTSettings. On several processes each computes a part of the batch, and all return the same; without `ends_step`
    the gradients are not summed over them yet, as more of the step is to follow.
    """
    device = next(model.parameters()).device
    n_target_tokens = sum(len(example.target_ids) for example in batch)
    loss = torch.zeros((), device=device)

    # Gradient accumulation. Each micro-batch's loss is divided by the target tokens of the whole step, not by its own
    # (dividing by its own would give the tokens of small micro-batches more weight), so that the parts add up to
    # the mean and the gradients to its gradient.
    items = [[example] for example in batch]
    for indices, weight in own_micro_batches(model, items, micro_batch_tokens, device, ends_step=ends_step):
        micro_batch = collate(model.config, [batch[i] for i in indices], device)
        with autocast(device, dtype):
            log_probability_BT = log_probabilities(model, micro_batch)
        micro_loss = weight * sft_loss(log_probability_BT, n_target_tokens)  # equation 2
        micro_loss.backward()
        loss += micro_loss.detach()
    return sum_over_ranks(loss)
