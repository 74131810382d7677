"""The supervised loop: what a step's gradient and log are, what they do not depend on, and that it learns."""

import math
from dataclasses import replace
from itertools import chain
from random import Random

import pytest
import torch

from minidpost.models.t5 import T5, T5Config
from minidpost.training import sft
from minidpost.training.batching import TokenizedExample
from minidpost.training.optim import Schedule, apply_step, read_log
from minidpost.training.sft import SFTSettings, train_sft

torch.set_num_threads(1)

CONFIG = T5Config(30, 16, 8, 24, 2, 1, 2, dropout=0.0)
SETTINGS = SFTSettings(epochs=2, examples_per_step=4, schedule=Schedule(1e-2), micro_batch_tokens=30)


def tiny(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> T5:
    torch.manual_seed(0)
    return T5(replace(CONFIG, dropout=dropout)).initialise().to(dtype)


def examples(n: int, longest: int = 9) -> list[TokenizedExample]:
    """Ragged examples; ids include the padding id, targets end in the end id."""
    generator = Random(1)
    ids = [[generator.randrange(30) for _ in range(generator.randrange(1, longest))] for _ in range(2 * n)]
    return [TokenizedExample(tuple(prompt), (*target, 1)) for prompt, target in zip(ids[::2], ids[1::2], strict=True)]


def weights(model: T5) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def target_log_probability(model: T5, sequence: TokenizedExample) -> torch.Tensor:
    """log f(y | x), from one row without padding: the encoder reads the prompt, the decoder start id and target."""
    source_1S = torch.tensor([sequence.prompt_ids])
    input_1T = torch.tensor([[0, *sequence.target_ids[:-1]]])
    log_TV = model(source_1S, torch.ones_like(source_1S, dtype=torch.bool), input_1T)[0].log_softmax(-1)
    return sum(log_TV[t, label] for t, label in enumerate(sequence.target_ids))


@pytest.fixture
def trained_numbers(monkeypatch):
    """The example numbers of each step, as the loop draws them."""
    drawn = []
    original = sft.epoch_steps

    def recorded(*arguments):
        for numbers in original(*arguments):
            drawn.append(numbers)
            yield numbers

    monkeypatch.setattr(sft, "epoch_steps", recorded)
    return drawn


def test_every_step_descends_the_mean_over_all_its_target_tokens(monkeypatch, trained_numbers, tmp_path):
    model, sequences, checked = tiny(dtype=torch.float64), examples(10), []

    def checking(model, optimizer, schedule, step, n_steps):
        batch = [sequences[number] for number in trained_numbers[-1]]
        n_tokens = sum(len(sequence.target_ids) for sequence in batch)
        loss = -sum(target_log_probability(model, sequence) for sequence in batch) / n_tokens
        expected = torch.autograd.grad(loss, list(model.parameters()))
        for (name, weight), gradient in zip(model.named_parameters(), expected, strict=True):
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-9, atol=1e-12, msg=name)
        checked.append(loss.item())
        return apply_step(model, optimizer, schedule, step, n_steps)

    monkeypatch.setattr(sft, "apply_step", checking)
    train_sft(model, sequences, SETTINGS, tmp_path / "log.jsonl")
    assert [row["loss"] for row in read_log(tmp_path / "log.jsonl")] == pytest.approx(checked, abs=2e-6)
    assert [len(numbers) for numbers in trained_numbers] == [4, 4, 2, 4, 4, 2]
    assert sorted(chain(*trained_numbers[:3])) == sorted(chain(*trained_numbers[3:])) == list(range(10))


def test_micro_batches_change_nothing():
    results = []
    for micro_batch_tokens in (10**6, 1):  # one micro-batch a step, and one an example
        model = tiny(dtype=torch.float64)
        train_sft(model, examples(12), replace(SETTINGS, micro_batch_tokens=micro_batch_tokens))
        results.append(weights(model))
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=0, atol=1e-9)
    start = weights(tiny(dtype=torch.float64))
    assert all((weight - start[name]).abs().max() > 1e-3 for name, weight in results[0].items())


def test_activation_checkpointing_changes_nothing_dropout_included():
    results = []
    for saves_memory in (False, True):
        model = tiny(dropout=0.3, dtype=torch.float64)
        train_sft(model, examples(12), replace(SETTINGS, activation_checkpointing=saves_memory))
        results.append(weights(model))
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=0, atol=1e-12)


def test_micro_batches_are_as_large_as_they_may(monkeypatch):
    n_rows = []
    original = sft.collate
    monkeypatch.setattr(sft, "collate", lambda batch, *rest: n_rows.append(len(batch)) or original(batch, *rest))
    for micro_batch_tokens, expected in ((10**6, [4]), (1, [1] * 4)):
        train_sft(tiny(), examples(4), replace(SETTINGS, epochs=1, micro_batch_tokens=micro_batch_tokens))
        assert n_rows == expected
        n_rows.clear()


def test_the_log_has_every_step(tmp_path, trained_numbers):
    sequences = examples(10)
    schedule = Schedule(2e-3, warmup=0.3, floor=0.2)
    train_sft(tiny(), sequences, replace(SETTINGS, schedule=schedule), tmp_path / "log.jsonl")
    rows = list(read_log(tmp_path / "log.jsonl"))
    assert [row["step"] for row in rows] == list(range(6))
    names = {"step", "loss", "lr", "grad_norm", "n_tokens", "tokens_per_second"}
    assert all(row.keys() == names for row in rows)
    cosine = [2e-3 * (0.2 + 0.8 * (1 + math.cos(math.pi * k / 4)) / 2) for k in range(4)]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 2e-3, *cosine], rel=1e-6)
    counts = [
        sum(len(sequences[i].prompt_ids) + len(sequences[i].target_ids) for i in numbers) for numbers in trained_numbers
    ]
    assert [row["n_tokens"] for row in rows] == counts
    assert all(row["grad_norm"] > 0 and row["tokens_per_second"] > 0 for row in rows)


def test_it_learns_a_few_examples_by_heart(tmp_path):
    model = tiny()
    sequences = [
        TokenizedExample((i, *sequence.prompt_ids), sequence.target_ids) for i, sequence in enumerate(examples(8))
    ]
    train_sft(
        model,
        sequences,
        replace(SETTINGS, epochs=40, examples_per_step=8, schedule=Schedule(3e-2)),
        tmp_path / "log.jsonl",
    )
    losses = [row["loss"] for row in read_log(tmp_path / "log.jsonl")]
    assert losses[0] > 2
    assert losses[-1] < 0.1
    for sequence in sequences:
        assert target_log_probability(model, sequence) > -2


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_same_seed_same_weights_bit_for_bit(dropout):
    results = []
    for seed, stage in ((1, "sft"), (1, "sft"), (2, "sft"), (1, "iteration-1/sft")):
        model = tiny(dropout)
        torch.manual_seed(len(results))  # what was drawn before does not matter
        train_sft(model, examples(10), replace(SETTINGS, seed=seed), stage=stage)
        results.append(weights(model))
    same, other_seed, other_stage = (
        all(torch.equal(weight, result[name]) for name, weight in results[0].items()) for result in results[1:]
    )
    assert same
    assert not other_seed
    assert not other_stage


def test_dropout_is_on_while_training_and_off_afterwards(tmp_path):
    losses = []
    for dropout in (0.0, 0.5):
        model = tiny(dropout).eval()
        train_sft(model, examples(4), replace(SETTINGS, epochs=1), tmp_path / "log.jsonl")
        losses.append(next(read_log(tmp_path / "log.jsonl"))["loss"])
        assert not any(module.training for module in model.modules())
    assert abs(losses[0] - losses[1]) > 1e-2


def test_dropout_differs_from_step_to_step(tmp_path):
    settings = SFTSettings(3, 1, Schedule(0.0), seed=7)  # a rate of zero: only dropout can change the loss
    train_sft(tiny(dropout=0.5), examples(1), settings, tmp_path / "log.jsonl")
    assert len({row["loss"] for row in read_log(tmp_path / "log.jsonl")}) == 3
