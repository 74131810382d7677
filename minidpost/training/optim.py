"""What the two training loops share: AdamW and its schedule, seeds, activation checkpointing, the log of steps."""

import hashlib
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minidpost.models.hf_config import Model
from minidpost.processes import whole


@dataclass(frozen=True)
class Schedule:
    """The optimizer's hyperparameters: linear warm-up over a fraction of the steps, then a cosine down to a floor."""

    learning_rate: float  # at its peak
    warmup: float = 0.1  # fraction of the steps
    floor: float = 0.1  # fraction of the peak
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0

    def at(self, step: int, n_steps: int) -> float:
        """The learning rate of step 0 … n_steps − 1."""
        n_warmup = math.ceil(self.warmup * n_steps)
        if step < n_warmup:
            # [ours] Hugging Face's schedule, the published code's, has step / n_warmup: a rate of 0 in the first step,
            # which then changes nothing.
            return self.learning_rate * (step + 1) / n_warmup
        progress = (step - n_warmup) / max(1, n_steps - n_warmup)
        cosine = (1 + math.cos(math.pi * progress)) / 2  # from 1 down to 0
        return self.learning_rate * (self.floor + (1 - self.floor) * cosine)


def adamw(model: nn.Module, schedule: Schedule) -> torch.optim.AdamW:
    """AdamW over all parameters that are not frozen; vectors (the norms' weights, biases) do not decay."""
    trained = trained_parameters(model).values()
    matrices = [weight for weight in trained if weight.dim() > 1]
    vectors = [weight for weight in trained if weight.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": schedule.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=schedule.learning_rate, fused=True)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model that are not frozen, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def apply_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, schedule: Schedule, *, step: int, n_steps: int
) -> dict[str, float]:
    """Clip the gradients, update the weights, clear the gradients.

    Returns the learning rate and the gradient norm before clipping, for the log.
    """
    learning_rate = schedule.at(step, n_steps)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    grad_norm = whole(nn.utils.clip_grad_norm_(model.parameters(), schedule.max_grad_norm))  # over all ranks
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return {"lr": learning_rate, "grad_norm": grad_norm.item()}


def derived_seed(*names: object) -> int:
    """A seed for one purpose, from names such as (seed, stage, step): 63 bits, the same on every machine."""
    digest = hashlib.blake2b("\0".join(map(str, names)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def enable_activation_checkpointing(model: Model) -> None:
    """From now on keep only each layer's input for the backward pass, and compute the rest again."""
    for stack in model.stacks:
        stack.checkpoint_activations = True


def tokens_per_second(n_tokens: int, started: float) -> float:
    """The speed since `started`, a value of `time.perf_counter`; finite even if the clock has not moved."""
    return n_tokens / max(time.perf_counter() - started, 1e-9)


class StepLog:
    """The metrics of a training: one JSON object a step, flushed as it is written. Without a path nothing is written.

    `earlier` is the log of the steps that were done before the training was stopped.
    """

    def __init__(self, path: str | Path | None, earlier: str = "") -> None:
        self.stream = open(path, "w", encoding="utf-8") if path else None
        if self.stream:
            self.stream.write(earlier)
            self.stream.flush()

    def write(self, **values: float) -> None:
        """Append one step."""
        if self.stream:
            self.stream.write(json.dumps({name: rounded(value) for name, value in values.items()}) + "\n")
            self.stream.flush()

    def __enter__(self) -> "StepLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self.stream:
            self.stream.close()


def rounded(value: float) -> float:
    """Seven significant digits: enough to compare runs by, short enough to read."""
    return float(f"{value:.7g}") if isinstance(value, float) else value


def read_log(path: str | Path) -> Iterator[dict[str, Any]]:
    """The steps of a log, in order."""
    with open(path, encoding="utf-8") as stream:
        yield from map(json.loads, stream)
