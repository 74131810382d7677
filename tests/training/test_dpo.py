"""The preference loop: ln 2 and no margin at first, the gradient of the equation afterwards, and that it learns."""

import math
from copy import deepcopy
from dataclasses import replace
from random import Random

import pytest
import torch

from minidpost.models.llama import Llama, LlamaConfig
from minidpost.models.t5 import T5, T5Config
from minidpost.training import dpo
from minidpost.training.batching import TokenizedExample, epoch_steps
from minidpost.training.dpo import (
    DPOSettings,
    PreferencePair,
    dpo_gradients,
    own_pair_micro_batches,
    pair_log_probabilities,
    reference_log_probabilities,
    train_dpo,
)
from minidpost.training.optim import Schedule, adamw, apply_step, derived_seed, read_log

LN2 = math.log(2)
CONFIG = T5Config(30, 16, 8, 24, 2, 1, 2, dropout=0.0)
SETTINGS = DPOSettings(steps=5, pairs_per_step=4, schedule=Schedule(1e-2, floor=0.5), micro_batch_tokens=60)


def tiny(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> T5:
    torch.manual_seed(0)
    return T5(replace(CONFIG, dropout=dropout)).initialise().to(dtype)


def pairs(n: int, longest: int = 10) -> list[PreferencePair]:
    """Ragged pairs; ids include the padding id, completions end in EOS."""
    generator = Random(1)
    ids = [tuple(generator.randrange(30) for _ in range(generator.randrange(1, longest))) for _ in range(3 * n)]
    triples = zip(ids[::3], ids[1::3], ids[2::3], strict=True)
    return [
        PreferencePair(TokenizedExample(prompt, (*chosen, 1)), TokenizedExample(prompt, (*rejected, 1)))
        for prompt, chosen, rejected in triples
    ]


def weights(model: T5) -> dict[str, torch.Tensor]:
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_equal(found: dict, expected: dict) -> None:
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def tiny_llama(dropout: float = 0.0) -> Llama:
    torch.manual_seed(0)
    config = LlamaConfig(30, 16, 24, 2, n_heads=4, n_kv_heads=2, d_head=4, dropout=dropout)
    return Llama(config).initialise().double()


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


def train(model: T5 | Llama, data: list[PreferencePair], settings: DPOSettings, **more) -> None:
    """DPO of a model against itself as it is now."""
    reference_P2 = reference_log_probabilities(model, data, micro_batch_tokens=settings.micro_batch_tokens)
    train_dpo(model, data, reference_P2, settings, **more)


def planned_steps(n_pairs: int, settings: DPOSettings) -> list[list[int]]:
    """The pair indices of each optimizer step of `train_dpo`."""
    order_seed = derived_seed(settings.seed, "dpo", "order")
    return list(epoch_steps(n_pairs, settings.pairs_per_step, settings.steps, order_seed))


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_at_first_losses_are_ln_2_and_margins_0(family, tmp_path, monkeypatch):
    margins = []
    original = dpo.dpo_loss

    def recorded(*arguments):
        loss_B, margin_B = original(*arguments)
        margins.extend(margin_B.tolist())
        return loss_B, margin_B

    monkeypatch.setattr(dpo, "dpo_loss", recorded)
    settings = replace(SETTINGS, schedule=Schedule(0.0))  # a rate of zero: every step is the first
    model = (tiny(dropout=0.5) if family == "t5" else tiny_llama(dropout=0.5)).train()
    train(model, pairs(20), settings, log_path=tmp_path / "log.jsonl")
    rows = list(read_log(tmp_path / "log.jsonl"))
    assert [row["loss"] for row in rows] == pytest.approx([LN2] * 5, abs=1e-6)
    assert [row["margin"] for row in rows] == pytest.approx([0] * 5, abs=1e-6)
    assert len(margins) == 20
    assert max(map(abs, margins)) <= 2e-6  # rounding: steps are padded otherwise than the reference's batches


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_every_gradient_is_that_of_equation_5(family, tmp_path):
    """A training written out step by step, each gradient against separate forward passes without padding."""
    model = tiny(dtype=torch.float64) if family == "t5" else tiny_llama()
    start, data, settings = deepcopy(model), pairs(10), replace(SETTINGS, beta=0.3)
    reference_P2 = reference_log_probabilities(model, data, micro_batch_tokens=settings.micro_batch_tokens)
    steps = planned_steps(len(data), settings)
    assert [len(indices) for indices in steps] == [4, 4, 2, 4, 4]

    optimizer, logged = adamw(model, settings.schedule), []
    for step, indices in enumerate(steps):
        batch = [data[i] for i in indices]
        dpo_gradients(model, batch, reference_P2[indices], beta=0.3, micro_batch_tokens=settings.micro_batch_tokens)

        margins = [margin(model, start, pair, beta=0.3) for pair in batch]
        loss = sum(-torch.log(1 / (1 + torch.exp(-m))) for m in margins) / len(batch)
        expected = torch.autograd.grad(loss, list(model.parameters()))
        for (name, weight), gradient in zip(model.named_parameters(), expected, strict=True):
            torch.testing.assert_close(weight.grad, gradient, rtol=1e-5, atol=1e-7, msg=name)

        chosen = sum(log_probability(model, pair.chosen).item() for pair in batch) / len(batch)
        rejected = sum(log_probability(model, pair.rejected).item() for pair in batch) / len(batch)
        mean_margin = sum(m.item() for m in margins) / len(batch)
        accuracy = sum(m.item() > 0 for m in margins) / len(batch)
        logged.append((loss.item(), mean_margin, accuracy, chosen, rejected))
        apply_step(model, optimizer, settings.schedule, step=step, n_steps=len(steps))
    assert abs(logged[-1][1]) > 0.1  # the margins had left 0, so the sigmoid was at work

    # train_dpo takes these steps and no others, and logs these means.
    trained = deepcopy(start)
    train_dpo(trained, data, reference_P2, settings, log_path=tmp_path / "log.jsonl")
    assert_equal(weights(trained), weights(model))
    rows = list(read_log(tmp_path / "log.jsonl"))
    names = ("loss", "margin", "accuracy", "chosen_logp", "rejected_logp")
    for row, expected in list(zip(rows, logged, strict=True))[1:]:  # at step 0 a margin is 0 but for rounding
        assert [row[name] for name in names] == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_pair_log_probabilities_do_not_depend_on_padding():
    model, data = tiny(dtype=torch.float64).eval(), pairs(6)
    long = PreferencePair(TokenizedExample((4,) * 40, (5,) * 50), TokenizedExample((4,) * 40, (6,) * 30))
    expected_P2 = torch.stack([torch.stack([log_probability(model, s) for s in (p.chosen, p.rejected)]) for p in data])
    for batch in (data, [*data, long], [long, *data]):
        result_P2 = pair_log_probabilities(model, batch)
        without_long_P2 = result_P2[[i for i, pair in enumerate(batch) if pair is not long]]
        torch.testing.assert_close(without_long_P2, expected_P2, rtol=0, atol=1e-10)


def test_completions_shared_by_pairs_are_scored_once(monkeypatch):
    """Pairs a ≻ b and a ≻ c of one question: three completions, and each pair has its own two."""
    model, prompt = tiny(dtype=torch.float64).eval(), (4, 5)
    a, b, c = (TokenizedExample(prompt, target) for target in ((7, 1), (8, 9, 1), (6, 6, 6, 1)))
    scored = []
    original = dpo.collate

    def recording(config, examples, device):
        scored.extend(examples)
        return original(config, examples, device)

    monkeypatch.setattr(dpo, "collate", recording)
    result_P2 = pair_log_probabilities(model, [PreferencePair(a, b), PreferencePair(a, c)])
    assert scored == [a, b, c]
    expected = [[log_probability(model, x).item() for x in pair] for pair in ((a, b), (a, c))]
    torch.testing.assert_close(result_P2, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)


@pytest.mark.parametrize("max_tokens", [1, 60, 10**6])
def test_pairs_of_a_question_share_a_micro_batch(max_tokens):
    data = pairs(6)
    data += [PreferencePair(pair.chosen, replace(pair.rejected, target_ids=(9, 1))) for pair in data]
    batches = [indices for indices, _ in own_pair_micro_batches(tiny(), data, max_tokens)]
    assert sorted(index for batch in batches for index in batch) == list(range(12))
    assert all((index + 6) % 12 in batch for batch in batches for index in batch)


def test_reference_log_probabilities_are_in_the_order_of_pairs():
    model, data = tiny().eval(), pairs(9)
    reference_P2 = reference_log_probabilities(model, data, micro_batch_tokens=60)
    assert not reference_P2.requires_grad
    for index, pair in enumerate(data):
        expected = [log_probability(model, sequence).item() for sequence in (pair.chosen, pair.rejected)]
        assert reference_P2[index].tolist() == pytest.approx(expected, abs=1e-4)


def test_a_reference_of_other_pairs_is_refused():
    reference_P2 = reference_log_probabilities(tiny(), pairs(9), micro_batch_tokens=60)
    with pytest.raises(ValueError, match=r"8 pairs, but reference log-probabilities of shape \(9, 2\)"):
        train_dpo(tiny(), pairs(8), reference_P2, SETTINGS)


def test_one_reference_serves_trainings_with_different_beta():
    """Its bits are those of a reference computed for that training."""
    data = pairs(9)
    reference_P2 = reference_log_probabilities(tiny(), data, micro_batch_tokens=60)
    for settings in (SETTINGS, replace(SETTINGS, beta=0.7)):
        expected, found = tiny(), tiny()
        train(expected, data, settings)
        train_dpo(found, data, reference_P2, settings)
        assert_equal(weights(found), weights(expected))


def test_the_reference_that_is_given_is_the_one_used():
    """Not one of the model's own: each loss follows from the log-probabilities that were handed in."""
    model, data = tiny(), pairs(6)
    policy_P2 = reference_log_probabilities(model, data, micro_batch_tokens=10**6)
    reference_P2 = policy_P2 - torch.tensor([5.0, 2.0])  # each chosen one is 3 nats likelier than it was
    metrics = dpo_gradients(model, data, reference_P2, beta=0.1, micro_batch_tokens=10**6)
    assert metrics["margin"].item() == pytest.approx(0.3, abs=1e-5)
    assert metrics["loss"].item() == pytest.approx(math.log(1 + math.exp(-0.3)), abs=1e-5)
    assert metrics["accuracy"].item() == 1


def test_micro_batches_change_nothing():
    results = []
    for micro_batch_tokens in (10**6, 1):  # one micro-batch a step, and one a pair
        model = tiny(dtype=torch.float64)
        train(model, pairs(8), replace(SETTINGS, micro_batch_tokens=micro_batch_tokens))
        results.append(weights(model))
    for name, weight in results[0].items():
        torch.testing.assert_close(results[1][name], weight, rtol=0, atol=1e-6)
    start = weights(tiny(dtype=torch.float64))
    assert all((weight - start[name]).abs().max() > 1e-3 for name, weight in results[0].items())


def test_micro_batches_are_as_large_as_they_may(monkeypatch):
    n_rows = []
    original = dpo.collate

    def counting(config, completions, device):
        n_rows.append(len(completions))
        return original(config, completions, device)

    monkeypatch.setattr(dpo, "collate", counting)
    for micro_batch_tokens, expected in ((10**6, [8, 8]), (1, [2] * 8)):  # the reference's, then the step's
        train(tiny(), pairs(4), replace(SETTINGS, steps=1, micro_batch_tokens=micro_batch_tokens))
        assert n_rows == expected
        n_rows.clear()


def test_the_log_has_every_step(tmp_path):
    data = pairs(10)
    train(tiny(), data, replace(SETTINGS, schedule=Schedule(2e-3, 0.4, 0.2)), log_path=tmp_path / "log.jsonl")
    rows = list(read_log(tmp_path / "log.jsonl"))
    assert [row["step"] for row in rows] == list(range(5))
    names = {"step", "loss", "lr", "grad_norm", "n_tokens", "tokens_per_second"}
    names |= {"chosen_logp", "rejected_logp", "margin", "accuracy"}
    assert all(row.keys() == names for row in rows)
    cosine = [2e-3 * (0.2 + 0.8 * (1 + math.cos(math.pi * k / 3)) / 2) for k in range(3)]
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 2e-3, *cosine], rel=1e-6)
    n_tokens = [2 * len(p.chosen.prompt_ids) + len(p.chosen.target_ids) + len(p.rejected.target_ids) for p in data]
    expected = [sum(n_tokens[i] for i in indices) for indices in planned_steps(10, SETTINGS)]
    assert [row["n_tokens"] for row in rows] == expected
    assert all(row["grad_norm"] > 0 and isinstance(row["tokens_per_second"], float) for row in rows)


def test_it_learns_to_prefer_what_was_chosen(tmp_path):
    model, data = tiny(), pairs(8)
    reference = deepcopy(model).eval()
    train(model, data, replace(SETTINGS, steps=30, pairs_per_step=8), log_path=tmp_path / "log.jsonl")
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
        torch.manual_seed(len(results))  # earlier random numbers do not matter
        train(model, pairs(10), replace(SETTINGS, seed=seed), stage=stage)
        results.append(weights(model))
    same, other_seed, other_stage = (
        all(torch.equal(weight, result[name]) for name, weight in results[0].items()) for result in results[1:]
    )
    assert same
    assert not other_seed
    assert not other_stage


@pytest.mark.parametrize("make", [tiny, tiny_llama], ids=["t5", "llama"])
def test_there_is_no_dropout_whatever_mode_the_model_was_in(make):
    results = []
    for dropout, training in ((0.0, False), (0.5, True), (0.5, False)):
        model = make(dropout).train(training)
        reference_P2 = reference_log_probabilities(model, pairs(8), micro_batch_tokens=60)
        model.train(training)
        train_dpo(model, pairs(8), reference_P2, SETTINGS)
        assert not any(module.training for module in model.modules())
        results.append(weights(model))
    assert all(torch.equal(weight, result[name]) for result in results[1:] for name, weight in results[0].items())


def test_reference_and_policy_are_computed_in_the_precision_asked_for():
    model, data = tiny(), pairs(6)
    by_dtype = {}
    for dtype in (None, torch.float32, torch.bfloat16):
        reference_P2 = reference_log_probabilities(model, data, micro_batch_tokens=10**6, dtype=dtype)
        metrics = dpo_gradients(model, data, reference_P2, beta=0.1, micro_batch_tokens=10**6, dtype=dtype)
        assert reference_P2.dtype == torch.float32
        by_dtype[dtype] = torch.tensor([*reference_P2.flatten(), metrics["chosen_logp"], metrics["rejected_logp"]])
    assert torch.equal(by_dtype[None], by_dtype[torch.float32])  # on a CPU
    differences = (by_dtype[torch.bfloat16] - by_dtype[torch.float32]).abs()
    assert (differences > 0).all() and torch.allclose(by_dtype[torch.bfloat16], by_dtype[torch.float32], rtol=0.02)
    assert all(weight.grad is not None and weight.grad.dtype == torch.float32 for weight in model.parameters())
