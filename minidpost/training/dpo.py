"""Direct preference optimization from a frozen copy of the starting weights (Rafailov et al. 2023; paper, equation 5).

The encoder reads the question and the decoder the rationale alone: feeding the prompt to the decoder makes an
encoder-decoder diverge. A step encodes each question once and scores each completion once, in however many of its pairs
they are. The reference's log-probabilities are computed once, before the first step, by the very model that is about to
be trained, so no second model is held; a file may keep them for other trainings from the same weights on the same
pairs. There is no dropout, here or there.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from minidpost.precision import autocast
from minidpost.storage import read_json, write_json
from minidpost.training.batching import TokenizedExample, collate, epoch_steps, micro_batches
from minidpost.training.losses import dpo_loss, log_probabilities
from minidpost.training.optim import Schedule, StepLog, adamw, apply_step, derived_seed, enable_activation_checkpointing
from minidpost.training.state import Checkpoint, fingerprint, weights_fingerprint

BIGGER = 4  # times the tokens of a micro-batch that is trained on: the reference's on a GPU


@dataclass(frozen=True)
class DPOSettings:
    """Optimizer steps, pairs a step, β, and how memory is saved: padded tokens a micro-batch (which changes results by
    rounding), activations computed twice."""

    steps: int
    pairs_per_step: int
    schedule: Schedule
    beta: float = 0.1
    micro_batch_tokens: int = 16384
    activation_checkpointing: bool = False
    seed: int = 42


@dataclass(frozen=True)
class PreferencePair:
    """A preferred and a dispreferred completion of one prompt."""

    chosen: TokenizedExample
    rejected: TokenizedExample

    @property
    def n_tokens(self) -> int:
        return self.chosen.n_tokens + self.rejected.n_tokens

    @property
    def sequences(self) -> tuple[TokenizedExample, TokenizedExample]:
        return (self.chosen, self.rejected)


def train_dpo(
    model: nn.Module,
    pairs: Sequence[PreferencePair],
    settings: DPOSettings,
    log_path: Path | None = None,
    stage: str = "dpo",
    checkpoint: Checkpoint | None = None,
    reference_path: Path | None = None,
) -> None:
    """Train `model` in place, against itself as it is now. Each step's loss is the mean over the pairs of the step.

    The log has loss, lr, grad_norm, tokens_per_second, the mean log-probabilities of chosen and rejected completions
    (nats), the mean margin, and the share of pairs whose margin is positive. With a checkpoint, the training begins
    where an earlier one of the same stage, settings and pairs was stopped. The file at `reference_path` keeps what the
    reference gives, for other trainings from the same weights on the same pairs.
    """
    device = next(model.parameters()).device
    optimizer = adamw(model, settings.schedule)
    model.eval()
    if settings.activation_checkpointing:
        enable_activation_checkpointing(model)
    checkpoint = checkpoint or Checkpoint()
    first = checkpoint.restore(model, optimizer, stage, settings, pairs)
    if not first:  # later the model is no longer the reference
        reference_P2 = kept_reference(model, pairs, settings.micro_batch_tokens, stage, reference_path)
        checkpoint.kept["reference_P2"] = reference_P2
    reference_P2 = checkpoint.kept["reference_P2"]
    seed = derived_seed(settings.seed, stage, "order")
    order = epoch_steps(len(pairs), settings.pairs_per_step, settings.steps, seed)
    progress = tqdm(total=settings.steps, initial=first, desc=stage, unit="step")
    with StepLog(log_path, checkpoint.log) as log, progress, checkpoint.stops_between_steps():
        for step, numbers in islice(enumerate(order), first, None):
            started = time.perf_counter()
            totals = torch.zeros(5, device=device)
            for group in groups_of_questions(model, pairs, numbers, settings.micro_batch_tokens):
                policy_B2 = pair_log_probabilities(model, [pairs[number] for number in group])
                reference_B2 = reference_P2[group].to(device, non_blocking=True)
                loss_B, margin_B = dpo_loss(*policy_B2.unbind(1), *reference_B2.unbind(1), settings.beta)
                (loss_B.sum() / len(numbers)).backward()
                totals += measures(loss_B, margin_B, policy_B2) / len(numbers)
            update = apply_step(model, optimizer, settings.schedule, step, settings.steps)
            n_tokens = sum(pairs[number].n_tokens for number in numbers)
            names = ("loss", "chosen_logp", "rejected_logp", "margin", "accuracy")
            values = dict(zip(names, totals.tolist(), strict=True))
            speed = n_tokens / (time.perf_counter() - started)
            log.write(step=step, **values, **update, n_tokens=n_tokens, tokens_per_second=speed)
            progress.set_postfix(loss=f"{values['loss']:.3f}", prefers=f"{values['accuracy']:.0%}", refresh=False)
            progress.update()
            checkpoint.after(step, model, optimizer, log_path)


def groups_of_questions(
    model: nn.Module, pairs: Sequence[PreferencePair], numbers: Sequence[int], max_tokens: int
) -> Iterator[list[int]]:
    """Split pair numbers into those of each micro-batch, in which all pairs of a question are."""
    questions: dict[tuple[int, ...], list[int]] = {}
    for number in numbers:
        questions.setdefault(pairs[number].chosen.prompt_ids, []).append(number)
    members = list(questions.values())
    items = [distinct_sequences([pairs[number] for number in question]) for question in members]
    device = next(model.parameters()).device
    for group in micro_batches(items, max_tokens, model.config.start_id, device):
        yield [number for i in group for number in members[i]]


def distinct_sequences(pairs: Sequence[PreferencePair]) -> list[TokenizedExample]:
    """The completions of some pairs, each once."""
    return list(dict.fromkeys(sequence for pair in pairs for sequence in pair.sequences))


def pair_log_probabilities(model: nn.Module, pairs: Sequence[PreferencePair]) -> Tensor:
    """log π of (chosen, rejected), (B, 2), in one forward pass over all distinct completions."""
    device, sequences = next(model.parameters()).device, distinct_sequences(pairs)
    batch = collate(sequences, model.config.start_id, device)
    with autocast(device):
        log_probability_B = log_probabilities(model, batch).sum(-1)
    place = {sequence: i for i, sequence in enumerate(sequences)}
    place_B2 = torch.tensor([[place[sequence] for sequence in pair.sequences] for pair in pairs])
    return log_probability_B[place_B2.to(device, non_blocking=True)]


def kept_reference(
    model: nn.Module, pairs: Sequence[PreferencePair], max_tokens: int, stage: str, path: Path | None
) -> Tensor:
    """`reference_log_probabilities`, from the file at `path` if it is whole and of these weights and pairs."""
    if path is None:
        return reference_log_probabilities(model, pairs, max_tokens, stage)
    key = fingerprint(weights_fingerprint(model), max_tokens, pairs)
    rows = _read_reference(path, key)
    if rows is None:
        rows = reference_log_probabilities(model, pairs, max_tokens, stage).tolist()
        write_json(path, {"key": key, "checksum": fingerprint(rows), "log_probabilities": rows})
    return torch.tensor(rows, dtype=_at_least_fp32(model)).view(-1, 2)


def _read_reference(path: Path, key: str) -> list | None:
    """A pair of numbers for each pair, or None where the file is not there, is broken or is of something else."""
    try:
        content = read_json(path)
        rows = content["log_probabilities"]
        return rows if (content["key"], content["checksum"]) == (key, fingerprint(rows)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


@torch.no_grad()
def reference_log_probabilities(
    model: nn.Module, pairs: Sequence[PreferencePair], max_tokens: int, stage: str
) -> Tensor:
    """log π_ref of every pair's (chosen, rejected), (P, 2), on the CPU."""
    reference_P2 = torch.empty(len(pairs), 2, dtype=_at_least_fp32(model))
    if next(model.parameters()).device.type != "cpu":  # where nothing is kept for gradients there is room for more
        max_tokens *= BIGGER
    groups = list(groups_of_questions(model, pairs, range(len(pairs)), max_tokens))
    for group in tqdm(groups, desc=f"{stage} reference", unit="batch", leave=False):
        reference_P2[group] = pair_log_probabilities(model, [pairs[number] for number in group]).cpu()
    return reference_P2


def _at_least_fp32(model: nn.Module) -> torch.dtype:
    """The precision of log-probabilities."""
    return torch.promote_types(next(model.parameters()).dtype, torch.float32)


def measures(loss_B: Tensor, margin_B: Tensor, policy_B2: Tensor) -> Tensor:
    """Sums over the pairs: loss, chosen and rejected log-probability, margin, pairs preferred rightly."""
    chosen_B, rejected_B = policy_B2.detach().unbind(1)
    columns = (loss_B.detach(), chosen_B, rejected_B, margin_B.detach(), (margin_B > 0).to(chosen_B.dtype))
    return torch.stack([column.sum() for column in columns])
