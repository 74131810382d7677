"""Examples as padded tensors: collation, micro-batches of similar length, and the order of optimizer steps.

An optimizer step takes its examples in a seeded random order (so that a step is what the paper's is) and then splits
them by length into micro-batches, of bounded size and with little padding (gradient accumulation), which attention
alone computes (models/packing.py). The loss is normalised over the whole step, so the split changes nothing.
Completions of one prompt stay together, as an encoder reads the prompt once for all of them.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from random import Random
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from minidpost.models.hf_config import Config
from minidpost.models.packing import Packing, packing_of
from minidpost.precision import to_device

IGNORED_LABEL = -100  # a label that carries no loss
PADDING_ID = 0  # any id would do: padding is recognised by the rows' lengths, never by its id

# What a micro-batch costs besides its tokens (starting kernels, adding up gradients), in tokens. On an H200 the kernels
# of a micro-batch take 80 ms to start, in which SmolLM2-135M and Flan-T5-Large compute more than ten thousand tokens.
CPU_BATCH_COST = 256
GPU_BATCH_COST = 16384
# Tokens are packed (models/packing.py): padding is computed in attention alone, and there not by our kernels. What a
# place of it takes at most, in memory and in time, as a fraction of what a token takes.
PADDING_COST = 0.25
GPU_LENGTH_MULTIPLE = 16  # lengths are padded to multiples of this on a GPU: fewer shapes, and aligned ones


@dataclass(frozen=True)
class TokenizedExample:
    """The ids of one prompt and of its target; the target ends in EOS unless it was cut."""

    prompt_ids: tuple[int, ...]
    target_ids: tuple[int, ...]

    @cached_property
    def distinct_target_ids(self) -> frozenset[int]:
        """The target as a set, by which rationales are compared."""
        return frozenset(self.target_ids)

    @property
    def n_tokens(self) -> int:
        """Prompt and target tokens."""
        return len(self.prompt_ids) + len(self.target_ids)

    @property
    def sequences(self) -> tuple["TokenizedExample", ...]:
        """Itself alone; a preference pair has two."""
        return (self,)


class TrainingItem(Protocol):
    """What one row of training data is: an example, or a preference pair (two sequences of one prompt)."""

    @property
    def sequences(self) -> tuple[TokenizedExample, ...]: ...


Item = TypeVar("Item", bound=TrainingItem)


class EncoderDecoderInputs(NamedTuple):
    """What T5's forward pass takes.

    The encoder reads Q distinct prompts of up to S tokens, the decoder B targets of up to T tokens. `row_B` says which
    row of the encoder each target reads; None where each has its own, Q = B. `packings` are those of sources and
    targets, where padding is not computed.
    """

    source_QS: Tensor
    source_mask_QS: Tensor
    target_BT: Tensor
    row_B: Tensor | None
    packings: tuple[Packing, Packing] | None = None


class DecoderOnlyInputs(NamedTuple):
    """What Llama's forward pass takes: prompt and target as one sequence, padded on the right.

    There is no mask; `packing` is that of the rows, where padding is not computed.
    """

    ids_BT: Tensor
    mask_BT: None = None
    packing: Packing | None = None


@dataclass(frozen=True)
class Batch:
    """What `model(*inputs)` takes, and what its logits should predict.

    `label_BT` has an id where there is a target token to predict and IGNORED_LABEL elsewhere; `position_N` are the N
    indices into the flattened (B·T) that have a label.
    """

    inputs: EncoderDecoderInputs | DecoderOnlyInputs
    label_BT: Tensor
    position_N: Tensor


# -- from ids to tensors ----------------------------------------------------------------------------------------------


def collate(
    config: Config, examples: Sequence[TokenizedExample], device: torch.device | str, is_packed: bool = True
) -> Batch:
    """Right-pad examples to the longest of the batch, in the form that the model's family takes.

    Attention is masked by length, never by id, so that it does not matter which id pads. With `is_packed` the model
    computes no padding outside attention.
    """
    if config.is_encoder_decoder:
        return collate_encoder_decoder(examples, config.start_id, device, is_packed)
    return collate_decoder_only(examples, device, is_packed)


def collate_encoder_decoder(
    examples: Sequence[TokenizedExample], start_id: int, device: torch.device | str, is_packed: bool = True
) -> Batch:
    """A batch in which each distinct prompt is encoded once, however many targets it has.

    The decoder's input is the target shifted right by one, so that each position predicts the next token:

        target ids      8  9  EOS
        decoder input   s  8  9        (s = start_id)
        labels          8  9  EOS

    Three examples of the prompts a, b, a give the sources [a, b] and row_B = [0, 1, 0].
    """
    prompts = list(dict.fromkeys(example.prompt_ids for example in examples))
    multiple = length_multiple(device)
    source_QS = pad(prompts, PADDING_ID, multiple)
    source_mask_QS = pad([[1] * len(prompt) for prompt in prompts], 0, multiple).bool()
    target_BT = pad([(start_id, *example.target_ids[:-1]) for example in examples], PADDING_ID, multiple)
    label_BT = pad([example.target_ids for example in examples], IGNORED_LABEL, multiple)
    position_N = labelled_positions(label_BT)

    row_B = None
    if len(prompts) < len(examples):
        row_of_prompt = {prompt: row for row, prompt in enumerate(prompts)}
        row_B = to_device(torch.tensor([row_of_prompt[example.prompt_ids] for example in examples]), device)
    packings = None
    if is_packed:  # every token of a target has a label
        packings = packing_of(source_mask_QS).to(device), packing_of(label_BT != IGNORED_LABEL).to(device)
    inputs = EncoderDecoderInputs(
        to_device(source_QS, device), to_device(source_mask_QS, device), to_device(target_BT, device), row_B, packings
    )
    return Batch(inputs, to_device(label_BT, device), to_device(position_N, device))


def collate_decoder_only(
    examples: Sequence[TokenizedExample], device: torch.device | str, is_packed: bool = True
) -> Batch:
    """A batch of prompt and target as one sequence, of which the target alone has labels.

    Each position predicts the next token, and the last token has none to predict:

        prompt ids 4 5 6, target ids 8 9 EOS
        input     4  5  6  8  9
        labels    –  –  8  9  EOS      (– = IGNORED_LABEL: len(prompt) − 1 of them)
    """
    multiple = length_multiple(device)
    ids_BT = pad([(*example.prompt_ids, *example.target_ids[:-1]) for example in examples], PADDING_ID, multiple)
    labels = [[IGNORED_LABEL] * (len(example.prompt_ids) - 1) + list(example.target_ids) for example in examples]
    label_BT = pad(labels, IGNORED_LABEL, multiple)
    position_N = labelled_positions(label_BT)
    packing = None
    if is_packed:
        length_B = torch.tensor([example.n_tokens - 1 for example in examples])
        packing = packing_of(torch.arange(ids_BT.shape[1]) < length_B[:, None]).to(device)
    inputs = DecoderOnlyInputs(to_device(ids_BT, device), packing=packing)
    return Batch(inputs, to_device(label_BT, device), to_device(position_N, device))


def labelled_positions(label_BT: Tensor) -> Tensor:
    """Indices into the flattened (B·T) that have a label. To be called on the CPU: a GPU would wait for the count."""
    return (label_BT != IGNORED_LABEL).flatten().nonzero()[:, 0]


def length_multiple(device: torch.device | str) -> int:
    """What the lengths of micro-batches are rounded up to a multiple of."""
    return GPU_LENGTH_MULTIPLE if torch.device(device).type == "cuda" else 1


def pad(rows: Sequence[Sequence[int]], value: int, multiple: int = 1) -> Tensor:
    """Rows of different lengths as one (B, longest) tensor of ids, padded on the right to a multiple of `multiple`."""
    longest = max(len(row) for row in rows)
    longest = -(-longest // multiple) * multiple
    return torch.tensor([[*row, *[value] * (longest - len(row))] for row in rows], dtype=torch.long)


# -- which examples ---------------------------------------------------------------------------------------------------


def drop_too_long(items: Sequence[Item], max_source: int, max_target: int) -> list[Item]:
    """The examples or pairs of which no sequence is longer than the limits, in tokens. None is ever cut."""

    def fits(example: TokenizedExample) -> bool:
        return len(example.prompt_ids) <= max_source and len(example.target_ids) <= max_target

    return [item for item in items if all(fits(example) for example in item.sequences)]


def token_counts(items: Sequence[TrainingItem]) -> tuple[int, int]:
    """Source and target tokens of all examples or pairs."""
    sequences = [example for item in items for example in item.sequences]
    n_source = sum(len(example.prompt_ids) for example in sequences)
    n_target = sum(len(example.target_ids) for example in sequences)
    return n_source, n_target


def epoch_steps(n_examples: int, per_step: int, n_steps: int, seed: int) -> Iterator[list[int]]:
    """The example indices of each optimizer step: epochs in seeded random order, a short step at the end of each.

    With 10 examples, 4 a step, the steps have 4, 4, 2, 4, 4, 2, … examples.
    """
    n_given = 0
    epoch = 0
    while n_given < n_steps and n_examples:
        order = Random(f"{seed} {epoch}").sample(range(n_examples), n_examples)
        for start in range(0, n_examples, per_step):
            if n_given == n_steps:
                return
            yield order[start : start + per_step]
            n_given += 1
        epoch += 1


# -- micro-batches ----------------------------------------------------------------------------------------------------


class PaddedShape(NamedTuple):
    """What prompts and their targets occupy when collated: targets of so many tokens, sources of so many tokens."""

    target_length: int
    source_length: int
    n_targets: int

    @property
    def n_places(self) -> int:
        """Tokens and padding. A source counts once for each of its targets, though it is encoded once for all."""
        return (self.target_length + self.source_length) * self.n_targets

    def beside(self, other: "PaddedShape") -> "PaddedShape":
        """The shape of both in one micro-batch."""
        return PaddedShape(
            max(self.target_length, other.target_length),
            max(self.source_length, other.source_length),
            self.n_targets + other.n_targets,
        )


def micro_batches(
    config: Config,
    items: Sequence[Sequence[TokenizedExample]],
    max_tokens: int,
    device: torch.device | str,
) -> list[list[int]]:
    """Split items 0 … n−1 into micro-batches: first within `max_tokens` padded tokens, then so as to pad little.

    Each item is the sequences of one prompt, which stay together; one that is larger than `max_tokens` gets a
    micro-batch of its own. Padding counts as a fraction of a token (PADDING_COST).
    """
    batch_cost = CPU_BATCH_COST if torch.device(device).type == "cpu" else GPU_BATCH_COST
    shapes = [padded_shape(config, item) for item in items]
    n_tokens = [sum(example.n_tokens for example in item) for item in items]

    batches: list[list[int]] = []
    for bucket in length_buckets(shapes, n_tokens, max_tokens):
        # Neighbours in this order have like target lengths, then like source lengths, so cutting it saves padding.
        order = sorted(bucket, key=lambda i: shapes[i], reverse=True)
        cuts = optimal_cuts([shapes[i] for i in order], batch_cost / PADDING_COST)
        batches += [order[begin:end] for begin, end in pairwise(cuts)]
    return batches


def length_buckets(
    shapes: Sequence[PaddedShape], n_tokens: Sequence[int], max_tokens: int, padding: float = PADDING_COST
) -> list[list[int]]:
    """Split items 0 … n−1 into buckets of like size, each of one or more, that count `max_tokens` at most (`counted`).

    `shapes` and `n_tokens` are those of each item. Targets of 3, 9, 3 and 4 tokens without sources, with 12 tokens a
    bucket and padding that counts as tokens do, give [[1], [3, 0, 2]]: 9 alone, as two rows of 9 would be 18; then 3
    rows of 4.
    """
    largest_first = sorted(range(len(shapes)), key=lambda i: shapes[i].n_places, reverse=True)
    buckets: list[list[int]] = []
    bucket_shape, bucket_tokens = PaddedShape(0, 0, 0), 0
    for index in largest_first:
        shape, tokens = bucket_shape.beside(shapes[index]), bucket_tokens + n_tokens[index]
        if not buckets or counted(shape, tokens, padding) > max_tokens:
            buckets.append([])
            shape, tokens = shapes[index], n_tokens[index]
        buckets[-1].append(index)
        bucket_shape, bucket_tokens = shape, tokens
    return buckets


def counted(shape: PaddedShape, n_tokens: int, padding: float = PADDING_COST) -> float:
    """What a micro-batch of so many tokens counts: them, and a fraction of the padding.

    Rows of 9, 4 and 3 tokens have 11 places of padding: they count 27 with a fraction of 1, and 16 + 5.5 with a half.
    """
    return n_tokens + padding * (shape.n_places - n_tokens)


def padded_shape(config: Config, item: Sequence[TokenizedExample]) -> PaddedShape:
    """The shape of one prompt's sequences, as `collate` would pad them."""
    if config.is_encoder_decoder:  # the prompt is encoded once
        return PaddedShape(max(len(example.target_ids) for example in item), len(item[0].prompt_ids), len(item))
    return PaddedShape(max(example.n_tokens for example in item), 0, len(item))  # the prompt is part of each sequence


def optimal_cuts(shapes: Sequence[PaddedShape], batch_cost: float) -> list[int]:
    """Where to cut a list of shapes into micro-batches so that padded tokens plus `batch_cost` a batch are fewest.

    The cuts include both ends. Four targets of 10, 9, 3 and 3 tokens without sources, at a cost of 8 tokens a batch:

        [0, 4]          one batch           4 · 10 + 8                   = 48
        [0, 2, 4]       two batches         (2 · 10 + 8) + (2 · 3 + 8)   = 42   ← least
        [0, 1, 2, 4]    three batches       18 + 17 + 14                 = 49

    Dynamic programming, as lines of a paragraph are broken: the best cuts of the first `end` shapes are the best cuts
    of the first `begin` and one more batch [begin, end), for the best `begin`.
    """
    # Of the first 0, 1, 2, … shapes: the least cost, and where their last batch begins.
    best: list[tuple[float, int]] = [(0, 0)]
    for end in range(1, len(shapes) + 1):
        longest_target = 0
        longest_source = 0
        n_targets = 0
        candidates = []
        for begin in reversed(range(end)):  # the last batch grows to the left
            shape = shapes[begin]
            longest_target = max(longest_target, shape.target_length)
            longest_source = max(longest_source, shape.source_length)
            n_targets += shape.n_targets
            n_sources = end - begin
            padded_tokens = longest_target * n_targets + longest_source * n_sources
            candidates.append((best[begin][0] + padded_tokens + batch_cost, begin))
        best.append(min(candidates))

    # Walk back from the end: 4, where its last batch begins (2), where the last batch of the first 2 begins (0).
    cuts = [len(shapes)]
    while cuts[-1]:
        cuts.append(best[cuts[-1]][1])
    return cuts[::-1]
