"""The supervised loop: what a step's gradient and log are, what they do not depend on, and that it learns."""

import math
from dataclasses import replace
from itertools import chain
from random import Random

import pytest
import torch

from minidpost.models.hf_config import Model
from minidpost.models.llama import Llama, LlamaConfig
from minidpost.models.t5 import T5, T5Config
from minidpost.models.weights import load_model, save_model
from minidpost.training import sft
from minidpost.training.batching import TokenizedExample, epoch_steps
from minidpost.training.optim import Schedule, adamw, apply_step, derived_seed, read_log
from minidpost.training.sft import SFTSettings, sft_gradients, train_sft

CONFIG = T5Config(30, 16, 8, 24, 2, 1, 2, dropout=0.0)
SETTINGS = SFTSettings(epochs=2, examples_per_step=4, schedule=Schedule(1e-2), micro_batch_tokens=30)


def tiny(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> T5:
    torch.manual_seed(0)
    return T5(replace(CONFIG, dropout=dropout)).initialise().to(dtype)


def tiny_llama(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> Llama:
    torch.manual_seed(0)
    config = LlamaConfig(30, 16, 24, 2, n_heads=4, n_kv_heads=2, d_head=4, dropout=dropout)
    return Llama(config).initialise().to(dtype)


each_family = pytest.mark.parametrize("make", [tiny, tiny_llama], ids=["t5", "llama"])


def examples(n: int, longest: int = 9) -> list[TokenizedExample]:
    """Ragged examples; ids include the padding id, targets end in EOS."""
    generator = Random(1)
    ids = [[generator.randrange(30) for _ in range(generator.randrange(1, longest))] for _ in range(2 * n)]
    return [TokenizedExample(tuple(prompt), (*target, 1)) for prompt, target in zip(ids[::2], ids[1::2], strict=True)]


def weights(model: Model) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def target_log_probability(model: T5, sequence: TokenizedExample) -> torch.Tensor:
    """log f(y | x), from one row without padding: the encoder reads the prompt, the decoder start id and target."""
    source_1S = torch.tensor([sequence.prompt_ids])
    input_1T = torch.tensor([[0, *sequence.target_ids[:-1]]])
    log_TV = model(source_1S, torch.ones_like(source_1S, dtype=torch.bool), input_1T)[0].log_softmax(-1)
    return sum(log_TV[t, label] for t, label in enumerate(sequence.target_ids))


def planned_steps(n_examples: int, settings: SFTSettings) -> list[list[int]]:
    """The example indices of each optimizer step of `train_sft`."""
    n_steps = settings.epochs * math.ceil(n_examples / settings.examples_per_step)
    order_seed = derived_seed(settings.seed, "sft", "order")
    return list(epoch_steps(n_examples, settings.examples_per_step, n_steps, order_seed))


def test_each_gradient_is_that_of_the_mean_token_loss(tmp_path):
    """A training written out step by step, each gradient against separate forward passes without padding."""
    model, sequences = tiny(dtype=torch.float64), examples(10)
    steps = planned_steps(len(sequences), SETTINGS)
    assert [len(indices) for indices in steps] == [4, 4, 2, 4, 4, 2]
    assert sorted(chain(*steps[:3])) == sorted(chain(*steps[3:])) == list(range(10))

    optimizer, losses = adamw(model, SETTINGS.schedule), []
    for step, indices in enumerate(steps):
        batch = [sequences[i] for i in indices]
        sft_gradients(model, batch, SETTINGS.micro_batch_tokens)

        n_tokens = sum(len(sequence.target_ids) for sequence in batch)
        loss = -sum(target_log_probability(model, sequence) for sequence in batch) / n_tokens
        expected = torch.autograd.grad(loss, list(model.parameters()))
        for (name, weight), gradient in zip(model.named_parameters(), expected, strict=True):
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-9, atol=1e-12, msg=name)
        losses.append(loss.item())
        apply_step(model, optimizer, SETTINGS.schedule, step=step, n_steps=len(steps))

    # train_sft takes these steps and no others, and logs these losses.
    trained = tiny(dtype=torch.float64)
    train_sft(trained, sequences, SETTINGS, log_path=tmp_path / "log.jsonl")
    assert all(torch.equal(weight, weights(trained)[name]) for name, weight in weights(model).items())
    assert [row["loss"] for row in read_log(tmp_path / "log.jsonl")] == pytest.approx(losses, abs=2e-6)


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


@each_family
def test_activation_checkpointing_changes_nothing_even_with_dropout(make):
    results = []
    for saves_memory in (False, True):
        model = make(dropout=0.3, dtype=torch.float64)
        train_sft(model, examples(12), replace(SETTINGS, activation_checkpointing=saves_memory))
        results.append(weights(model))
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=0, atol=1e-12)


def test_micro_batches_are_as_large_as_they_may(monkeypatch):
    n_rows = []
    original = sft.collate

    def counting(config, batch, device):
        n_rows.append(len(batch))
        return original(config, batch, device)

    monkeypatch.setattr(sft, "collate", counting)
    for micro_batch_tokens, expected in ((10**6, [4]), (1, [1] * 4)):
        train_sft(tiny(), examples(4), replace(SETTINGS, epochs=1, micro_batch_tokens=micro_batch_tokens))
        assert n_rows == expected
        n_rows.clear()


def test_the_log_has_every_step(tmp_path):
    sequences = examples(10)
    schedule = Schedule(2e-3, warmup=0.3, floor=0.2)
    train_sft(tiny(), sequences, replace(SETTINGS, schedule=schedule), log_path=tmp_path / "log.jsonl")
    rows = list(read_log(tmp_path / "log.jsonl"))
    assert [row["step"] for row in rows] == list(range(6))
    names = {"step", "loss", "lr", "grad_norm", "n_tokens", "tokens_per_second"}
    assert all(row.keys() == names for row in rows)
    cosine = [2e-3 * (0.2 + 0.8 * (1 + math.cos(math.pi * k / 4)) / 2) for k in range(4)]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 2e-3, *cosine], rel=1e-6)
    n_tokens = [len(sequence.prompt_ids) + len(sequence.target_ids) for sequence in sequences]
    expected = [sum(n_tokens[i] for i in indices) for indices in planned_steps(10, SETTINGS)]
    assert [row["n_tokens"] for row in rows] == expected
    assert all(row["grad_norm"] > 0 and isinstance(row["tokens_per_second"], float) for row in rows)


def test_it_learns_a_few_examples_by_heart(tmp_path):
    model = tiny()
    sequences = [
        TokenizedExample((i, *sequence.prompt_ids), sequence.target_ids) for i, sequence in enumerate(examples(8))
    ]
    settings = replace(SETTINGS, epochs=40, examples_per_step=8, schedule=Schedule(3e-2))
    train_sft(model, sequences, settings, log_path=tmp_path / "log.jsonl")
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
        torch.manual_seed(len(results))  # earlier random numbers do not matter
        train_sft(model, examples(10), replace(SETTINGS, seed=seed), stage=stage)
        results.append(weights(model))
    same, other_seed, other_stage = (
        all(torch.equal(weight, result[name]) for name, weight in results[0].items()) for result in results[1:]
    )
    assert same
    assert not other_seed
    assert not other_stage


@each_family
def test_dropout_is_on_while_training_and_off_afterwards(make, tmp_path):
    losses = []
    for dropout in (0.0, 0.5):
        model = make(dropout).eval()
        train_sft(model, examples(4), replace(SETTINGS, epochs=1), log_path=tmp_path / "log.jsonl")
        losses.append(next(read_log(tmp_path / "log.jsonl"))["loss"])
        assert not any(module.training for module in model.modules())
    assert abs(losses[0] - losses[1]) > 1e-2


@each_family
def test_the_settings_may_have_another_dropout_than_the_config(make, tmp_path):
    """It is that of one training: neither the config nor the next training has it."""
    replaced, expected, none = make(0.5), make(0.2), make(0.0)
    train_sft(replaced, examples(6), replace(SETTINGS, dropout=0.2))
    train_sft(expected, examples(6), SETTINGS)
    train_sft(none, examples(6), SETTINGS)
    assert all(torch.equal(weight, weights(replaced)[name]) for name, weight in weights(expected).items())
    assert not all(torch.equal(weight, weights(none)[name]) for name, weight in weights(expected).items())

    save_model(replaced, tmp_path, [])
    again = load_model(tmp_path)
    assert again.config == replaced.config == make(0.5).config
    for model in (replaced, again):
        train_sft(model, examples(6), SETTINGS)
    assert all(torch.equal(weight, weights(replaced)[name]) for name, weight in weights(again).items())


@each_family
def test_dropout_of_0_in_the_settings_is_none(make):
    models = [make(0.5), make(0.0)]
    for model in models:
        train_sft(model, examples(6), replace(SETTINGS, dropout=0.0))
    assert all(torch.equal(weight, weights(models[0])[name]) for name, weight in weights(models[1]).items())


@each_family
def test_dropout_differs_from_step_to_step(make, tmp_path):
    settings = SFTSettings(3, 1, Schedule(0.0), seed=7)  # a rate of zero: only dropout can change the loss
    train_sft(make(dropout=0.5), examples(1), settings, log_path=tmp_path / "log.jsonl")
    assert len({row["loss"] for row in read_log(tmp_path / "log.jsonl")}) == 3
