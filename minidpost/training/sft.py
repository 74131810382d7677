"""Supervised fine-tuning on rationales (paper, equation 2): the warm-up, and the end of every iteration."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from minidpost.precision import autocast
from minidpost.training.batching import TokenizedExample, collate, epoch_steps, micro_batches
from minidpost.training.losses import log_probabilities, sft_loss
from minidpost.training.optim import Schedule, StepLog, adamw, apply_step, derived_seed, enable_activation_checkpointing
from minidpost.training.state import Checkpoint


@dataclass(frozen=True)
class SFTSettings:
    """Epochs over the data, examples an optimizer step, and how memory is saved: padded tokens a micro-batch at most
    (which changes results by rounding and by which units dropout hits), activations computed twice."""

    epochs: int
    examples_per_step: int
    schedule: Schedule
    micro_batch_tokens: int = 16384
    activation_checkpointing: bool = False
    seed: int = 42


def train_sft(
    model: nn.Module,
    sequences: Sequence[TokenizedExample],
    settings: SFTSettings,
    log_path: Path | None = None,
    stage: str = "sft",
    checkpoint: Checkpoint | None = None,
) -> None:
    """Fine-tune `model` in place. Each step's loss is the mean over all target tokens of the step, in nats a token.

    Dropout is on, and seeded by (seed, stage, step). The log has loss, lr, grad_norm and tokens_per_second a step. With
    a checkpoint, the training begins where an earlier one of the same stage, settings and data was stopped.
    """
    device, start_id = next(model.parameters()).device, model.config.start_id
    n_steps = settings.epochs * -(-len(sequences) // settings.examples_per_step)
    optimizer = adamw(model, settings.schedule)
    order = epoch_steps(
        len(sequences), settings.examples_per_step, n_steps, derived_seed(settings.seed, stage, "order")
    )
    checkpoint = checkpoint or Checkpoint()
    first = checkpoint.restore(model, optimizer, stage, settings, sequences)
    model.train()
    if settings.activation_checkpointing:
        enable_activation_checkpointing(model)
    progress = tqdm(total=n_steps, initial=first, desc=stage, unit="step")
    with StepLog(log_path, checkpoint.log) as log, progress, checkpoint.stops_between_steps():
        for step, numbers in islice(enumerate(order), first, None):
            started = time.perf_counter()
            torch.manual_seed(derived_seed(settings.seed, stage, step))
            batch = [sequences[number] for number in numbers]
            n_targets = sum(len(sequence.target_ids) for sequence in batch)
            loss = torch.zeros((), device=device)
            for group in micro_batches([[s] for s in batch], settings.micro_batch_tokens, start_id, device):
                micro = collate([batch[i] for i in group], start_id, device)
                with autocast(device):
                    log_probability_BT = log_probabilities(model, micro)
                micro_loss = sft_loss(log_probability_BT, n_targets)
                micro_loss.backward()
                loss += micro_loss.detach()
            update = apply_step(model, optimizer, settings.schedule, step, n_steps)
            n_tokens = sum(sequence.n_tokens for sequence in batch)
            speed = n_tokens / (time.perf_counter() - started)
            log.write(step=step, loss=loss.item(), **update, n_tokens=n_tokens, tokens_per_second=speed)
            progress.set_postfix(loss=f"{loss.item():.3f}", tok_s=f"{speed:.0f}", refresh=False)
            progress.update()
            checkpoint.after(step, model, optimizer, log_path)
    model.eval()
