"""Collation, padding, micro-batches of like length, and the order of optimizer steps."""

from functools import reduce
from itertools import chain, combinations, islice, pairwise
from random import Random

import pytest
import torch

from minidpost.models.llama import LlamaConfig
from minidpost.models.t5 import T5, T5Config
from minidpost.training.batching import (
    IGNORED_LABEL,
    PADDING_COST,
    DecoderOnlyInputs,
    EncoderDecoderInputs,
    PaddedShape,
    TokenizedExample,
    collate,
    counted,
    drop_too_long,
    epoch_steps,
    length_buckets,
    micro_batches,
    optimal_cuts,
    pad,
    padded_shape,
    token_counts,
)
from minidpost.training.dpo import PreferencePair

T5_CONFIG = T5Config(30, 16, 8, 24, 2, 2, 2, start_id=2)
LLAMA_CONFIG = LlamaConfig(30, 16, 24, 2, n_heads=4, n_kv_heads=2, d_head=4)


def test_pad_fills_to_the_longest_row():
    padded = pad([(3, 4, 5), (), (6,)], -7)
    assert padded.dtype == torch.long
    assert padded.tolist() == [[3, 4, 5], [-7, -7, -7], [6, -7, -7]]


def test_encoder_decoder_targets_shift_and_masks_follow_lengths():
    """Even where the text holds the id that pads."""
    examples = [TokenizedExample((5, 0, 6, 0), (0, 8, 1)), TokenizedExample((0,), (9, 0, 0, 4, 1))]
    batch = collate(T5_CONFIG, examples, "cpu")
    assert isinstance(batch.inputs, EncoderDecoderInputs)
    source_QS, mask_QS, target_BT, row_B, _ = batch.inputs
    assert source_QS.tolist() == [[5, 0, 6, 0], [0, 0, 0, 0]]
    assert mask_QS.dtype == torch.bool
    assert mask_QS.tolist() == [[True, True, True, True], [True, False, False, False]]
    assert target_BT.tolist() == [[2, 0, 8, 0, 0], [2, 9, 0, 0, 4]]
    assert row_B is None
    assert batch.label_BT.tolist() == [[0, 8, 1, IGNORED_LABEL, IGNORED_LABEL], [9, 0, 0, 4, 1]]
    assert batch.position_N.tolist() == [0, 1, 2, 5, 6, 7, 8, 9]
    assert IGNORED_LABEL == -100


def test_a_prompt_is_encoded_once_for_all_its_targets():
    examples = [TokenizedExample((5, 6), (7, 1)), TokenizedExample((4,), (8, 1)), TokenizedExample((5, 6), (9, 1))]
    inputs = collate(T5_CONFIG, examples, "cpu").inputs
    assert inputs.source_QS.tolist() == [[5, 6], [4, 0]]
    assert inputs.row_B.tolist() == [0, 1, 0]
    assert inputs.target_BT.tolist() == [[2, 7], [2, 8], [2, 9]]


def test_decoder_only_targets_alone_have_labels():
    sequences = [TokenizedExample((5, 0, 6), (0, 8, 2)), TokenizedExample((7,), (9, 2)), TokenizedExample((7, 4), (2,))]
    batch = collate(LLAMA_CONFIG, sequences, "cpu")
    assert isinstance(batch.inputs, DecoderOnlyInputs)
    ids_BT, _, _ = batch.inputs
    assert ids_BT.tolist() == [[5, 0, 6, 0, 8], [7, 9, 0, 0, 0], [7, 4, 0, 0, 0]]
    i = IGNORED_LABEL
    assert batch.label_BT.tolist() == [[i, i, 0, 8, 2], [9, 2, i, i, i], [i, 2, i, i, i]]
    assert batch.position_N.tolist() == [2, 3, 4, 5, 6, 11]


def test_a_padded_row_has_the_logits_it_has_alone():
    torch.manual_seed(0)
    model = T5(T5_CONFIG).initialise().double().eval()
    short, long = TokenizedExample((0, 7, 0), (0, 9, 1)), TokenizedExample(tuple(range(3, 23)), tuple(range(5, 29)))
    alone_1TV = model(*collate(model.config, [short], "cpu").inputs)
    together_BTV = model(*collate(model.config, [long, short], "cpu").inputs)
    torch.testing.assert_close(together_BTV[1, :3], alone_1TV[0], rtol=0, atol=1e-12)
    without_1TV = model(*collate(model.config, [TokenizedExample((0, 7), short.target_ids)], "cpu").inputs)
    assert (without_1TV - alone_1TV).abs().max() > 1e-3  # the padding id inside the text is read as text


def test_tokens_are_counted_of_examples_and_of_pairs():
    example = TokenizedExample((1, 2, 3), (4, 5))
    pair = PreferencePair(example, TokenizedExample((1, 2, 3), (4, 5, 6, 7)))
    assert example.n_tokens == 5
    assert pair.n_tokens == 12
    assert token_counts([example, example]) == (6, 4)
    assert token_counts([example, pair]) == (9, 8)


def test_too_long_items_are_dropped_whole():
    fits, long_source, long_target = (TokenizedExample((2,) * n, (3,) * m) for n, m in ((4, 6), (5, 1), (1, 7)))
    assert drop_too_long([long_source, fits, long_target, fits], max_source=4, max_target=6) == [fits, fits]
    pairs = [
        PreferencePair(fits, fits),
        PreferencePair(fits, long_target),
        PreferencePair(long_target, fits),
        PreferencePair(long_source, long_source),
    ]
    assert drop_too_long(pairs, max_source=4, max_target=6) == pairs[:1]


def rows(*lengths: int) -> tuple[list[PaddedShape], list[int]]:
    """What `length_buckets` takes of items that are a target each, without a source."""
    return [PaddedShape(length, 0, 1) for length in lengths], [*lengths]


@pytest.mark.parametrize("budget", [1, 40, 100, 10_000])
def test_length_buckets_cover_each_index_within_the_budget(budget):
    random = Random(budget)
    sizes = [random.randint(1, 60) for _ in range(200)]
    groups = length_buckets(*rows(*sizes), budget, 1.0)
    assert sorted(chain(*groups)) == list(range(200))
    assert all(len(group) == 1 or max(sizes[i] for i in group) * len(group) <= budget for group in groups)
    in_order = [sizes[i] for i in chain(*groups)]
    assert in_order == sorted(sizes, reverse=True)  # so that a group holds like sizes
    for group, after in pairwise(groups):  # and no group could have taken one more
        assert sizes[group[0]] * (len(group) + 1) > budget, (group, after)


def test_length_buckets_by_hand():
    assert length_buckets(*rows(3, 9, 3, 4), 12, 1.0) == [[1], [3, 0, 2]]
    assert length_buckets(*rows(50, 50), 10) == [[0], [1]]
    assert length_buckets([], [], 10) == []


@pytest.mark.parametrize("config", [T5_CONFIG, LLAMA_CONFIG])
def test_a_micro_batch_of_several_items_counts_no_more_than_allowed(config):
    random = Random(5)
    items = []
    for index in range(60):
        prompt = (index + 2,) * random.randint(5, 60)
        n_completions = random.choice([1, 2, 4, 6])
        items.append([TokenizedExample(prompt, (3,) * random.choice([40, 45, 50, 384])) for _ in range(n_completions)])
    n_several = 0
    for batch in micro_batches(config, items, 8192, "cpu"):
        batch_of_it = collate(config, [example for i in batch for example in items[i]], "cpu")
        if config.is_encoder_decoder:
            packings = batch_of_it.inputs.packings
        else:
            packings = (batch_of_it.inputs.packing,)
        n_tokens = sum(len(packing.position_N) for packing in packings)
        n_places = sum(len(packing.token_P) for packing in packings)
        n_several += len(batch) > 1
        assert len(batch) == 1 or n_tokens + PADDING_COST * (n_places - n_tokens) <= 8192
    assert n_several > 5


def test_padding_counts_as_a_fraction_of_a_token():
    three = PaddedShape(9, 0, 1).beside(PaddedShape(4, 0, 1)).beside(PaddedShape(3, 0, 1))
    assert counted(three, 16, 1.0) == 27
    assert counted(three, 16, 0.5) == 16 + 5.5
    assert length_buckets(*rows(3, 9, 3, 4), 20, 0.5) == [[1, 3], [0, 2]]  # 13 + 2.5; with another 3 it would be 21.5
    assert length_buckets(*rows(3, 9, 3, 4), 20, 1.0) == [[1, 3], [0, 2]]
    assert length_buckets(*rows(3, 9, 3, 4), 22, 0.5) == [[1, 3, 0], [2]]
    items = [[TokenizedExample((5,) * n, (6,) * n)] for n in (100, 10, 10, 10)]
    # 200 tokens and three times 20, padded to 800: with 540 places of padding at a quarter they are 395.
    assert len(micro_batches(T5_CONFIG, items, 400, "cpu")) == 1
    assert len(micro_batches(T5_CONFIG, items, 390, "cpu")) == 2


def test_optimal_cuts_by_hand():
    shapes = [PaddedShape(10, 0, 1), PaddedShape(9, 0, 1), PaddedShape(3, 0, 1), PaddedShape(3, 0, 1)]
    assert optimal_cuts(shapes, batch_cost=8) == [0, 2, 4]
    assert optimal_cuts(shapes, batch_cost=0) == [0, 1, 2, 4]
    assert optimal_cuts(shapes, batch_cost=100) == [0, 4]
    assert optimal_cuts([], batch_cost=8) == [0]


def test_no_other_cuts_cost_less():
    random = Random(3)
    shapes = [PaddedShape(random.randint(1, 40), random.randint(0, 30), random.randint(1, 4)) for _ in range(8)]

    def cost(cuts: tuple[int, ...]) -> int:
        total = 0
        for begin, end in pairwise(cuts):
            part = shapes[begin:end]
            total += max(s.target_length for s in part) * sum(s.n_targets for s in part)
            total += max(s.source_length for s in part) * len(part) + 60
        return total

    every_way = [(0, *inner, 8) for n in range(8) for inner in combinations(range(1, 8), n)]
    assert cost(tuple(optimal_cuts(shapes, batch_cost=60))) == min(map(cost, every_way))


@pytest.mark.parametrize("config", [T5_CONFIG, LLAMA_CONFIG])
def test_micro_batches_cover_each_item_once_within_the_budget(config):
    random = Random(4)
    lengths = [(random.randint(1, 20), random.randint(1, 20)) for _ in range(60)]
    items = [[TokenizedExample((3,) * n, (4,) * m)] * random.randint(1, 3) for n, m in lengths]
    batches = micro_batches(config, items, 100, "cpu")
    assert sorted(chain(*batches)) == list(range(60))
    for batch in batches:
        shape = reduce(PaddedShape.beside, (padded_shape(config, items[i]) for i in batch))
        n_tokens = sum(example.n_tokens for i in batch for example in items[i])
        assert len(batch) == 1 or counted(shape, n_tokens) <= 100


def test_epoch_steps_cover_each_epoch_and_end_short():
    steps = list(epoch_steps(n_examples=10, per_step=4, n_steps=8, seed=1))
    assert [len(step) for step in steps] == [4, 4, 2, 4, 4, 2, 4, 4]
    epochs = [list(chain(*steps[start : start + 3])) for start in (0, 3)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] != list(range(10))


def test_epoch_steps_depend_on_the_seed_alone():
    large = 2**63 - 1  # what derived_seed may give
    reference = list(epoch_steps(50, 8, 20, large))
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    assert list(epoch_steps(50, 8, 20, large)) == reference
    assert torch.equal(torch.random.get_rng_state(), state)
    assert list(islice(epoch_steps(50, 8, 1000, large), 20)) == reference
    assert list(epoch_steps(50, 8, 20, large - 1)) != reference


def test_epoch_steps_of_no_examples_end():
    assert list(epoch_steps(0, 8, 20, 1)) == []
