"""Examples as padded tensors, rows of like length together.

A training step takes its examples in a seeded random order (so that a step is what the paper's is) and then splits them
by length into micro-batches of bounded size; the loss is normalised over the whole step, so the split changes nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor

IGNORED = -100  # a label that carries no loss


@dataclass(frozen=True)
class Encoded:
    """The ids of one prompt and of its target; the target ends in the end token unless it was cut."""

    prompt: tuple[int, ...]
    target: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        return len(self.prompt) + len(self.target)

    @property
    def sequences(self) -> tuple["Encoded", ...]:
        """Itself alone; a preference pair has two."""
        return (self,)


@dataclass(frozen=True)
class Batch:
    """What `model(*inputs)` takes, and what its logits should predict.

    `label_BT` has an id where there is a target token to predict and IGNORED elsewhere; `position_N` are the places in
    the flattened (B·T) that have one.
    """

    inputs: tuple[Tensor, ...]
    label_BT: Tensor
    position_N: Tensor


def collate(sequences: Sequence[Encoded], start_id: int | None, device: torch.device | str) -> Batch:
    """Pad behind the rows, to the longest of the batch.

    For an encoder-decoder, which has a start id: inputs (source_BS, source_mask_BS, target_BT). For a decoder-only
    model, which has none: inputs (ids_BT,), prompt and target as one sequence, of which the target alone has labels.
    Rows are masked by length, never by id, so that it does not matter which id pads.
    """
    if start_id is None:
        inputs = [pad([(*sequence.prompt, *sequence.target[:-1]) for sequence in sequences], 0)]
        label_BT = pad([(*[IGNORED] * (len(s.prompt) - 1), *s.target) for s in sequences], IGNORED)
    else:
        mask_BS = pad([[1] * len(sequence.prompt) for sequence in sequences], 0).bool()
        target_BT = pad([(start_id, *sequence.target[:-1]) for sequence in sequences], 0)
        inputs = [pad([sequence.prompt for sequence in sequences], 0), mask_BS, target_BT]
        label_BT = pad([sequence.target for sequence in sequences], IGNORED)
    position_N = (label_BT != IGNORED).flatten().nonzero()[:, 0]  # here, as counting them on a GPU would wait for it
    return Batch(tuple(tensor.to(device) for tensor in inputs), label_BT.to(device), position_N.to(device))


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different lengths as one (B, longest) tensor of ids."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.long)


def within_limits(items: Sequence, max_source: int, max_target: int) -> list:
    """The examples or pairs of which no sequence is longer than the limits, in tokens. None is ever cut."""

    def fits(sequence: Encoded) -> bool:
        return len(sequence.prompt) <= max_source and len(sequence.target) <= max_target

    return [item for item in items if all(map(fits, item.sequences))]


def token_counts(items: Sequence) -> tuple[int, int]:
    """Source and target tokens of all examples or pairs."""
    sequences = [sequence for item in items for sequence in item.sequences]
    return sum(len(s.prompt) for s in sequences), sum(len(s.target) for s in sequences)


def by_length(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split 0 … n−1 into groups of like size, each of one or more, whose padded total stays within `max_tokens`."""
    groups: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if not groups or sizes[groups[-1][0]] * (len(groups[-1]) + 1) > max_tokens:
            groups.append([])
        groups[-1].append(index)
    return groups


def shuffled_steps(n_examples: int, per_step: int, n_steps: int, seed: int) -> Iterator[list[int]]:
    """The example numbers of each step: epochs in seeded random order, a short step at the end of each."""
    done, epoch = 0, 0
    while done < n_steps and n_examples:
        order = Random(f"{seed} {epoch}").sample(range(n_examples), n_examples)
        for start in range(0, n_examples, per_step):
            if done == n_steps:
                return
            yield order[start : start + per_step]
            done += 1
        epoch += 1
