"""Examples as padded tensors, rows of like length together.

A training step takes its examples in a seeded random order (so that a step is what the paper's is) and then splits them
by length into micro-batches, of bounded size and where little is padded; the loss is normalised over the whole step, so
the split changes nothing. Completions of one prompt stay together, as an encoder reads it for all of them once.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import torch
from torch import Tensor

IGNORED_LABEL = -100  # a label that carries no loss
# What a micro-batch costs besides its tokens (starting kernels, adding up gradients), in tokens.
CPU_BATCH_COST, GPU_BATCH_COST = 128, 2048


@dataclass(frozen=True)
class TokenizedExample:
    """The ids of one prompt and of its target; the target ends in the end token unless it was cut."""

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]

    @property
    def n_tokens(self) -> int:
        return len(self.prompt_ids) + len(self.target_ids)

    @property
    def sequences(self) -> tuple["TokenizedExample", ...]:
        """Itself alone; a preference pair has two."""
        return (self,)


@dataclass(frozen=True)
class Batch:
    """What `model(*inputs)` takes, and what its logits should predict.

    `label_BT` has an id where there is a target token to predict and IGNORED_LABEL elsewhere; `position_N` are the
    places in the flattened (B·T) that have one.
    """

    inputs: tuple[Tensor, ...]
    label_BT: Tensor
    position_N: Tensor


def collate(sequences: Sequence[TokenizedExample], start_id: int | None, device: torch.device | str) -> Batch:
    """Pad behind the rows, to the longest of the batch.

    For an encoder-decoder, which has a start id: inputs (source_QS, source_mask_QS, target_BT) and, where prompts are
    shared, row_B: the source row of each target row. For a decoder-only model, which has none: inputs (ids_BT,), prompt
    and target as one sequence, of which the target alone has labels. Rows are masked by length, never by id, so that it
    does not matter which id pads.
    """
    if start_id is None:
        inputs = [pad([(*sequence.prompt_ids, *sequence.target_ids[:-1]) for sequence in sequences], 0)]
        label_BT = pad([(*[IGNORED_LABEL] * (len(s.prompt_ids) - 1), *s.target_ids) for s in sequences], IGNORED_LABEL)
    else:
        rows = {prompt: row for row, prompt in enumerate(dict.fromkeys(sequence.prompt_ids for sequence in sequences))}
        mask_QS = pad([[1] * len(prompt) for prompt in rows], 0).bool()
        target_BT = pad([(start_id, *sequence.target_ids[:-1]) for sequence in sequences], 0)
        inputs = [pad(list(rows), 0), mask_QS, target_BT]
        if len(rows) < len(sequences):
            inputs.append(torch.tensor([rows[sequence.prompt_ids] for sequence in sequences]))
        label_BT = pad([sequence.target_ids for sequence in sequences], IGNORED_LABEL)
    position_N = (
        (label_BT != IGNORED_LABEL).flatten().nonzero()[:, 0]
    )  # here, as counting them on a GPU would wait for it
    # Without blocking, as a copy would otherwise wait until a GPU has done with the micro-batch before.
    *inputs, label_BT, position_N = (x.to(device, non_blocking=True) for x in (*inputs, label_BT, position_N))
    return Batch(tuple(inputs), label_BT, position_N)


def pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different lengths as one (B, longest) tensor of ids."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.long)


def drop_too_long(items: Sequence, max_source: int, max_target: int) -> list:
    """The examples or pairs of which no sequence is longer than the limits, in tokens. None is ever cut."""

    def fits(sequence: TokenizedExample) -> bool:
        return len(sequence.prompt_ids) <= max_source and len(sequence.target_ids) <= max_target

    return [item for item in items if all(map(fits, item.sequences))]


def token_counts(items: Sequence) -> tuple[int, int]:
    """Source and target tokens of all examples or pairs."""
    sequences = [sequence for item in items for sequence in item.sequences]
    return sum(len(s.prompt_ids) for s in sequences), sum(len(s.target_ids) for s in sequences)


def length_buckets(sizes: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Split 0 … n−1 into groups of like size, each of one or more, whose padded total stays within `max_tokens`."""
    groups: list[list[int]] = []
    for index in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        if not groups or sizes[groups[-1][0]] * (len(groups[-1]) + 1) > max_tokens:
            groups.append([])
        groups[-1].append(index)
    return groups


def micro_batches(
    items: Sequence[Sequence[TokenizedExample]], max_tokens: int, start_id: int | None, device: torch.device | str
) -> list[list[int]]:
    """Split 0 … n−1 into groups within `max_tokens`, and further where that saves more padding than a batch costs.

    Each item is sequences of one prompt, which are kept together.
    """
    batch_cost, groups = CPU_BATCH_COST if torch.device(device).type == "cpu" else GPU_BATCH_COST, []
    for group in length_buckets([sum(sequence.n_tokens for sequence in item) for item in items], max_tokens):
        shapes = {i: padded_shape(items[i], start_id) for i in group}
        order = sorted(group, key=shapes.get, reverse=True)
        cuts = optimal_micro_batches([shapes[i] for i in order], batch_cost)
        groups += [order[begin:end] for begin, end in pairwise(cuts)]
    return groups


def padded_shape(item: Sequence[TokenizedExample], start_id: int | None) -> tuple[int, int, int]:
    """The target length, source length and target rows of one prompt's sequences, as `collate` would pad them."""
    if start_id is None:
        return max(sequence.n_tokens for sequence in item), 0, len(item)
    return max(len(sequence.target_ids) for sequence in item), len(item[0].prompt_ids), len(item)


def optimal_micro_batches(shapes: Sequence[tuple[int, int, int]], batch_cost: int) -> list[int]:
    """Where to cut a list of (target length, source length, target rows) so that padded tokens and batches cost least.

    The cuts include both ends. Best ways to cut the first 1, 2, … shapes are built on those of fewer (as lines of a
    paragraph are broken).
    """
    best = [(0, 0)]  # the cost of the first so many, and where the last of their batches begins
    for end in range(1, len(shapes) + 1):
        longest_target = longest_source = n_rows = 0
        ways = []
        for begin in reversed(range(end)):
            target, source, rows = shapes[begin]
            longest_target, longest_source = max(longest_target, target), max(longest_source, source)
            n_rows += rows
            padded = longest_target * n_rows + longest_source * (end - begin)
            ways.append((best[begin][0] + padded + batch_cost, begin))
        best.append(min(ways))
    cuts = [len(shapes)]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][1])
    return cuts[::-1]


def epoch_steps(n_examples: int, per_step: int, n_steps: int, seed: int) -> Iterator[list[int]]:
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
