"""The preference loop: ln 2 and no margin at first, the gradient of the equation afterwards, and that it learns."""

import math
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
import torch

from minidpost.models.llama import Llama, LlamaConfig
from minidpost.models.t5 import T5, T5Config
from minidpost.training import dpo
from minidpost.training.batching import TokenizedExample
from minidpost.training.dpo import (
    DPOSettings,
    PreferencePair,
    pair_log_probabilities,
    reference_log_probabilities,
    train_dpo,
)
from minidpost.training.optim import Schedule, apply_step, read_log

torch.set_num_threads(1)

LN2 = math.log(2)
CONFIG = T5Config(30, 16, 8, 24, 2, 1, 2, dropout=0.0)
SETTINGS = DPOSettings(steps=5, pairs_per_step=4, schedule=Schedule(1e-2, floor=0.5), micro_batch_tokens=60)


def tiny(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> T5:
    torch.manual_seed(0)
    return T5(replace(CONFIG, dropout=dropout)).initialise().to(dtype)


def pairs(n: int, longest: int = 10) -> list[PreferencePair]:
    """Ragged pairs; ids include the padding id, completions end in the end id."""
    generator = Random(1)
    ids = [tuple(generator.randrange(30) for _ in range(generator.randrange(1, longest))) for _ in range(3 * n)]
    triples = zip(ids[::3], ids[1::3], ids[2::3], strict=True)
    return [
        PreferencePair(TokenizedExample(prompt, (*chosen, 1)), TokenizedExample(prompt, (*rejected, 1)))
        for prompt, chosen, rejected in triples
    ]


def weights(model: T5) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def tiny_llama() -> Llama:
    torch.manual_seed(0)
    return Llama(LlamaConfig(30, 16, 24, 2, n_heads=4, n_kv_heads=2, d_head=4)).initialise().double()


def log_probability(model: T5 | Llama, sequence: TokenizedExample) -> torch.Tensor:
    """log π(y | x), from one row without padding: T5's decoder reads the start id and the completion alone."""
    if isinstance(model, Llama):
        n_prompt, ids_1T = len(sequence.prompt_ids), torch.tensor([[*sequence.prompt_ids, *sequence.target_ids]])
        log_TV = model(ids_1T)[0, n_prompt - 1 :].log_softmax(-1)
        return sum(log_TV[t, label] for t, label in enumerate(sequence.target_ids))
    source_1S = torch.tensor([sequence.prompt_ids])
    input_1T = torch.tensor([[0, *sequence.target_ids[:-1]]])
    log_TV = model(source_1S, torch.ones_like(source_1S, dtype=torch.bool), input_1T)[0].log_softmax(-1)
    return sum(log_TV[t, label] for t, label in enumerate(sequence.target_ids))


def margin(policy: T5, reference: T5, pair: PreferencePair, beta: float) -> torch.Tensor:
    """r(y_w) − r(y_l) with r(y) = β log (π(y | x) / π_ref(y | x)), every log π from a forward pass of its own."""
    with torch.no_grad():
        chosen, rejected = log_probability(reference, pair.chosen), log_probability(reference, pair.rejected)
    ratio_chosen = log_probability(policy, pair.chosen) - chosen
    return beta * ratio_chosen - beta * (log_probability(policy, pair.rejected) - rejected)


@pytest.fixture
def trained_numbers(monkeypatch):
    """The pair numbers of each step, as the loop draws them."""
    drawn = []
    original = dpo.epoch_steps

    def recorded(*arguments):
        for numbers in original(*arguments):
            drawn.append(numbers)
            yield numbers

    monkeypatch.setattr(dpo, "epoch_steps", recorded)
    return drawn


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_before_the_first_update_the_loss_is_ln_2_and_every_margin_0(family, tmp_path, monkeypatch):
    margins = []
    original = dpo.dpo_loss

    def recorded(*arguments):
        loss_B, margin_B = original(*arguments)
        margins.extend(margin_B.tolist())
        return loss_B, margin_B

    monkeypatch.setattr(dpo, "dpo_loss", recorded)
    settings = replace(SETTINGS, schedule=Schedule(0.0))  # a rate of zero: every step is the first
    model = tiny(dropout=0.5).train() if family == "t5" else tiny_llama()
    train_dpo(model, pairs(20), settings, tmp_path / "log.jsonl")
    rows = list(read_log(tmp_path / "log.jsonl"))
    assert [row["loss"] for row in rows] == pytest.approx([LN2] * 5, abs=1e-6)
    assert [row["margin"] for row in rows] == pytest.approx([0] * 5, abs=1e-6)
    assert len(margins) == 20
    assert max(map(abs, margins)) <= 2e-6  # rounding: steps are padded otherwise than the reference's batches


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_every_gradient_is_that_of_equation_5(family, monkeypatch, trained_numbers, tmp_path):
    """Against separate forward passes without padding, the reference being the weights from before the first step."""
    model = tiny(dtype=torch.float64) if family == "t5" else tiny_llama()
    data, logged = pairs(10), []
    reference = deepcopy(model).eval()

    def checking(model, optimizer, schedule, step, n_steps):
        batch = [data[number] for number in trained_numbers[-1]]
        margins = [margin(model, reference, pair, beta=0.3) for pair in batch]
        loss = sum(-torch.log(1 / (1 + torch.exp(-m))) for m in margins) / len(batch)
        expected = torch.autograd.grad(loss, list(model.parameters()))
        for (name, weight), gradient in zip(model.named_parameters(), expected, strict=True):
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-5, atol=1e-7, msg=name)
        chosen, rejected = (
            sum(log_probability(model, sequence).item() for sequence in sequences) / len(batch)
            for sequences in ([pair.chosen for pair in batch], [pair.rejected for pair in batch])
        )
        accuracy = sum(m.item() > 0 for m in margins) / len(batch)
        mean = sum(m.item() for m in margins) / len(batch)
        logged.append((loss.item(), mean, accuracy, chosen, rejected))
        return apply_step(model, optimizer, schedule, step, n_steps)

    monkeypatch.setattr(dpo, "apply_step", checking)
    train_dpo(model, data, replace(SETTINGS, beta=0.3), tmp_path / "log.jsonl")
    rows = list(read_log(tmp_path / "log.jsonl"))
    names = ("loss", "margin", "accuracy", "chosen_logp", "rejected_logp")
    for row, expected in list(zip(rows, logged, strict=True))[1:]:  # at step 0 the sign of a margin is chance
        assert [row[name] for name in names] == pytest.approx(expected, rel=1e-5, abs=1e-5)
    assert [len(numbers) for numbers in trained_numbers] == [4, 4, 2, 4, 4]
    assert abs(logged[-1][1]) > 0.1  # the margins had left 0, so the sigmoid was at work


def test_log_probabilities_of_pairs_are_those_of_rows_alone_whatever_pads_them():
    model, data = tiny(dtype=torch.float64).eval(), pairs(6)
    long = PreferencePair(TokenizedExample((4,) * 40, (5,) * 50), TokenizedExample((4,) * 40, (6,) * 30))
    expected_P2 = torch.stack([torch.stack([log_probability(model, s) for s in (p.chosen, p.rejected)]) for p in data])
    for batch in (data, [*data, long], [long, *data]):
        result_P2 = pair_log_probabilities(model, batch)
        kept_P2 = result_P2[[number for number, pair in enumerate(batch) if pair is not long]]
        torch.testing.assert_close(kept_P2, expected_P2, rtol=0, atol=1e-10)


def test_reference_log_probabilities_stand_in_the_order_of_the_pairs():
    model, data = tiny().eval(), pairs(9)
    reference_P2 = reference_log_probabilities(model, data, 60, "dpo")
    assert not reference_P2.requires_grad
    for number, pair in enumerate(data):
        expected = [log_probability(model, sequence).item() for sequence in (pair.chosen, pair.rejected)]
        assert reference_P2[number].tolist() == pytest.approx(expected, abs=1e-4)


@pytest.fixture
def computed(monkeypatch) -> list[int]:
    """How many pairs each computation of a reference was of."""
    counts, original = [], dpo.reference_log_probabilities
    monkeypatch.setattr(
        dpo,
        "reference_log_probabilities",
        lambda model, data, *rest: counts.append(len(data)) or original(model, data, *rest),
    )
    return counts


def trained(
    data: list[PreferencePair], path: Path | None, settings: DPOSettings = SETTINGS, scale: float = 1.0
) -> dict:
    """The weights after DPO from the tiny model, all of whose weights may be scaled before."""
    model = tiny()
    with torch.no_grad():
        model.embedding.weight.mul_(scale)
    train_dpo(model, data, settings, reference_path=path)
    return weights(model)


def assert_equal(found: dict, expected: dict) -> None:
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_kept_reference_is_used_again(tmp_path, computed):
    """By a training with another β too; the bits are those of a training that keeps nothing."""
    data, path = pairs(9), tmp_path / "reference.json"
    others = replace(SETTINGS, beta=0.7)
    expected = [trained(data, None), trained(data, None, others)]
    computed.clear()
    assert_equal(trained(data, path), expected[0])
    assert_equal(trained(data, path), expected[0])
    assert_equal(trained(data, path, others), expected[1])
    assert computed == [9]


def test_a_reference_of_other_weights_or_pairs_is_not_used(tmp_path, computed):
    path, data = tmp_path / "reference.json", pairs(9)
    others = [*data[:-1], replace(data[-1], rejected=replace(data[-1].rejected, target_ids=(3, 1)))]
    expected = {1.0: trained(others, None), 0.9: trained(data, None, scale=0.9)}
    trained(data, path)
    computed.clear()
    assert_equal(trained(data, path, scale=0.9), expected[0.9])
    assert_equal(trained(others, path), expected[1.0])
    assert computed == [9, 9]


@pytest.mark.parametrize("harm", ["cut", "emptied", "a digit", "a list", "not JSON"])
def test_a_broken_reference_is_computed_again(harm, tmp_path, computed):
    path, data = tmp_path / "reference.json", pairs(9)
    expected = trained(data, path)
    whole = path.read_text()
    digit = next(i for i in range(whole.index("[") + 20, len(whole)) if whole[i] in "1234567")
    broken = {
        **{"cut": whole[: len(whole) // 2], "emptied": "", "a list": "[[1, 2]]", "not JSON": whole.replace(":", "")},
        "a digit": whole[:digit] + str(int(whole[digit]) + 1) + whole[digit + 1 :],
    }
    path.write_text(broken[harm])
    computed.clear()
    assert_equal(trained(data, path), expected)
    assert computed == [9] and path.read_text() == whole


def test_micro_batches_change_nothing():
    results = []
    for micro_batch_tokens in (10**6, 1):  # one micro-batch a step, and one a pair
        model = tiny(dtype=torch.float64)
        train_dpo(model, pairs(8), replace(SETTINGS, micro_batch_tokens=micro_batch_tokens))
        results.append(weights(model))
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=0, atol=1e-6)
    start = weights(tiny(dtype=torch.float64))
    assert all((weight - start[name]).abs().max() > 1e-3 for name, weight in results[0].items())


def test_micro_batches_are_as_large_as_they_may(monkeypatch):
    n_rows = []
    original = dpo.collate
    monkeypatch.setattr(dpo, "collate", lambda rows, *rest: n_rows.append(len(rows)) or original(rows, *rest))
    for micro_batch_tokens, expected in ((10**6, [8, 8]), (1, [2] * 8)):  # the reference's, then the step's
        train_dpo(tiny(), pairs(4), replace(SETTINGS, steps=1, micro_batch_tokens=micro_batch_tokens))
        assert n_rows == expected
        n_rows.clear()


def test_the_log_has_every_step(tmp_path, trained_numbers):
    data = pairs(10)
    train_dpo(tiny(), data, replace(SETTINGS, schedule=Schedule(2e-3, 0.4, 0.2)), tmp_path / "log.jsonl")
    rows = list(read_log(tmp_path / "log.jsonl"))
    assert [row["step"] for row in rows] == list(range(5))
    names = {"step", "loss", "lr", "grad_norm", "n_tokens", "tokens_per_second"}
    names |= {"chosen_logp", "rejected_logp", "margin", "accuracy"}
    assert all(row.keys() == names for row in rows)
    cosine = [2e-3 * (0.2 + 0.8 * (1 + math.cos(math.pi * k / 3)) / 2) for k in range(3)]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 2e-3, *cosine], rel=1e-6)
    n_tokens = [2 * len(p.chosen.prompt_ids) + len(p.chosen.target_ids) + len(p.rejected.target_ids) for p in data]
    assert [row["n_tokens"] for row in rows] == [sum(n_tokens[i] for i in numbers) for numbers in trained_numbers]
    assert all(row["grad_norm"] > 0 and row["tokens_per_second"] > 0 for row in rows)


def test_it_learns_to_prefer_what_was_chosen(tmp_path):
    model, data = tiny(), pairs(8)
    reference = deepcopy(model).eval()
    train_dpo(model, data, replace(SETTINGS, steps=30, pairs_per_step=8), tmp_path / "log.jsonl")
    rows = list(read_log(tmp_path / "log.jsonl"))
    assert rows[-1]["loss"] < 0.2 < 0.69 < rows[0]["loss"]
    assert rows[-1]["margin"] > 2
    assert rows[-1]["accuracy"] == 1
    assert all(margin(model, reference, pair, 0.1) > 0 for pair in data)
    assert rows[-1]["chosen_logp"] > rows[-1]["rejected_logp"]


def test_same_seed_same_weights_bit_for_bit():
    results = []
    for seed, stage in ((1, "dpo"), (1, "dpo"), (2, "dpo"), (1, "iteration-2/dpo")):
        model = tiny()
        torch.manual_seed(len(results))  # what was drawn before does not matter
        train_dpo(model, pairs(10), replace(SETTINGS, seed=seed), stage=stage)
        results.append(weights(model))
    same, other_seed, other_stage = (
        all(torch.equal(weight, result[name]) for name, weight in results[0].items()) for result in results[1:]
    )
    assert same
    assert not other_seed
    assert not other_stage


def test_there_is_no_dropout_even_if_the_model_was_in_training_mode():
    results = []
    for dropout, training in ((0.0, False), (0.5, True), (0.5, False)):
        model = tiny(dropout).train(training)
        train_dpo(model, pairs(8), SETTINGS)
        assert not any(module.training for module in model.modules())
        results.append(weights(model))
    assert all(torch.equal(weight, result[name]) for result in results[1:] for name, weight in results[0].items())
