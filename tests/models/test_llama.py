"""Llama and its like against transformers with random weights, and cached decoding against the full forward pass."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from llama_oracle import LLAMA_SHAPES, hf_llama, left_padded, ragged, random_llama

from minidpost.models.hf_config import llama_names, read_config
from minidpost.models.llama import CausalAttention, Llama, LlamaConfig
from minidpost.models.weights import empty_model
from minidpost.sampling.sampler import Request, SamplingSettings, sample
from minidpost.training.batching import TokenizedExample, collate, pad
from minidpost.training.losses import log_probabilities, sft_loss
from minidpost.training.optim import enable_activation_checkpointing

every_shape = pytest.mark.parametrize("shape", LLAMA_SHAPES)


def assert_close(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    """Equal up to rounding, relative to the expected values' scale."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@every_shape
@torch.no_grad()
def test_logits_equal_transformers(shape):
    model = random_llama(LLAMA_SHAPES[shape])
    ids_BT = torch.tensor(ragged([150, 150, 150], model.config.vocab_size))
    assert_close(model(ids_BT), hf_llama(model)(ids_BT).logits)


@pytest.mark.parametrize("shape", ["plain", "llama3-rope"])
@torch.no_grad()
def test_positions_up_to_4096(shape):
    model = random_llama(replace(LLAMA_SHAPES[shape], n_layers=1))
    ids_1T = torch.tensor(ragged([4096], model.config.vocab_size))
    ours, theirs = model(ids_1T), hf_llama(model)(ids_1T).logits
    assert_close(ours[:, -64:], theirs[:, -64:])
    assert_close(ours, theirs)


@every_shape
@torch.no_grad()
def test_left_padded_rows_equal_rows_alone(shape):
    model = random_llama(LLAMA_SHAPES[shape])
    rows = ragged([1, 17, 30, 5], model.config.vocab_size)
    ids_BT, mask_BT = left_padded(rows)
    position_BT = (mask_BT.long().cumsum(1) - 1).clamp(min=0)
    theirs = hf_llama(model)(ids_BT, attention_mask=mask_BT.long(), position_ids=position_BT).logits
    ours = model(ids_BT, mask_BT)
    for b, row in enumerate(rows):
        alone_1TV = model(torch.tensor([row]))
        assert_close(alone_1TV[0], theirs[b, -len(row) :])
        assert_close(ours[b, -len(row) :], alone_1TV[0])
    assert ours.isfinite().all()


@every_shape
@torch.no_grad()
def test_right_padding_does_not_affect_logits(shape):
    model = random_llama(LLAMA_SHAPES[shape]).double()
    rows = ragged([4, 21, 1], model.config.vocab_size)
    ids_BT, mask_BT = pad(rows, 0), pad([[1] * len(row) for row in rows], 0).bool()
    without, with_mask = model(ids_BT), model(ids_BT, mask_BT)
    for b, row in enumerate(rows):
        alone_1TV = model(torch.tensor([row]))
        torch.testing.assert_close(without[b, : len(row)], alone_1TV[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(with_mask[b, : len(row)], alone_1TV[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("saves_memory", [False, True])
@every_shape
def test_loss_and_every_gradient_equal_transformers(shape, saves_memory):
    """The loss of target tokens: a prompt carries none."""
    model = random_llama(LLAMA_SHAPES[shape])
    twin = hf_llama(model)
    prompts, targets = ragged([3, 9, 6], model.config.vocab_size), ragged([7, 2, 12], model.config.vocab_size, seed=2)
    examples = [TokenizedExample(tuple(p), tuple(t)) for p, t in zip(prompts, targets, strict=True)]
    batch = collate(model.config, examples, "cpu")
    whole = [[*prompt, *target] for prompt, target in zip(prompts, targets, strict=True)]
    labels = [[*[-100] * len(prompt), *target] for prompt, target in zip(prompts, targets, strict=True)]
    expected = twin(pad(whole, 0), attention_mask=pad([[1] * len(row) for row in whole], 0), labels=pad(labels, -100))
    if saves_memory:
        enable_activation_checkpointing(model)
    at_once = 5 * model.config.vocab_size if saves_memory else 10**9
    loss = sft_loss(log_probabilities(model, batch, at_once), sum(map(len, targets)))
    assert loss.item() == pytest.approx(expected.loss.item(), abs=2e-6)
    loss.backward()
    expected.loss.backward()
    gradients, twin_weights = dict(model.named_parameters()), dict(twin.named_parameters())
    for ours, theirs in llama_names(model.config):
        assert_close(gradients[ours].grad, twin_weights[theirs].grad)


def test_log_probabilities_sum_over_the_completion():
    model = random_llama(LLAMA_SHAPES["grouped"]).double()
    prompt, target = (4, 5, 6, 7), (8, 9, 2)
    logits_1TV = model(torch.tensor([[*prompt, *target]]))
    expected = sum(logits_1TV[0, len(prompt) - 1 + t].log_softmax(-1)[label] for t, label in enumerate(target))
    found = log_probabilities(
        model, collate(model.config, [TokenizedExample(prompt, target), TokenizedExample((3,), (2,))], "cpu")
    )
    assert found[0].sum().item() == pytest.approx(expected.item(), abs=1e-10)


@every_shape
@torch.no_grad()
def test_cached_decoding_of_ragged_prompts_equals_the_full_forward(shape):
    model = random_llama(LLAMA_SHAPES[shape]).double()
    rows = ragged([12, 1, 30, 2], model.config.vocab_size)
    prompts = [row[: max(1, len(row) // 2)] for row in rows]
    cache = model.new_cache(n_rows=7, max_prompt=20, max_new=20)
    first = model.prefill(cache, [3, 0, 2, 1], [prompts[i] for i in (3, 0, 2, 1)])
    assert first == [prompts[i][-1] for i in (3, 0, 2, 1)]
    fed = [list(prompt) for prompt in prompts]
    continuations = ragged([9] * 4, model.config.vocab_size, seed=3)
    next_ids = [prompt[-1] for prompt in prompts]
    for step in range(10):
        logits_BV = model.decode(cache, torch.tensor(next_ids))
        for b in range(4):
            expected = model(torch.tensor([fed[b]]))[0, -1]
            torch.testing.assert_close(logits_BV[b], expected, rtol=0, atol=1e-10)
        if step < 9:
            next_ids = [row[step] for row in continuations]
            fed = [[*row, token_id] for row, token_id in zip(fed, next_ids, strict=True)]


@every_shape
def test_greedy_completions_equal_transformers_generate(shape):
    model = random_llama(LLAMA_SHAPES[shape])
    prompts = ragged([9, 1, 30, 2, 17, 5, 12, 3], model.config.vocab_size)
    ids_BT, mask_BT = left_padded(prompts)
    settings = {"do_sample": False, "num_beams": 1, "pad_token_id": 0, "eos_token_id": model.config.vocab_size}
    twin = hf_llama(model)
    generated = twin.generate(ids_BT, attention_mask=mask_BT.long(), max_new_tokens=20, **settings)
    rows = generated[:, ids_BT.shape[1] :].tolist()
    # What ends a row is the id that stands in most of them, so that some end early and some at the limit or late.
    eos_id = Counter(token_id for row in rows for token_id in set(row)).most_common(1)[0][0]
    expected = [row[: row.index(eos_id) + 1] if eos_id in row else row for row in rows]
    assert len({len(row) for row in expected}) > 1
    requests = [Request(tuple(prompt), str(i)) for i, prompt in enumerate(prompts)]
    ours = sample(model, requests, SamplingSettings(max_new_tokens=20, slots=3), eos_id)
    assert {row.request_index: row.token_ids for row in ours} == dict(enumerate(expected))


@torch.no_grad()
def test_samples_continue_copies_of_one_prefill():
    model = random_llama(LLAMA_SHAPES["grouped"]).double()
    prompt = ragged([11], model.config.vocab_size)[0]
    cache = model.new_cache(n_rows=4, max_prompt=11, max_new=3)
    (first,) = model.prefill(cache, [3], [prompt])
    cache.copy_rows([3, 3], [0, 1])
    model.decode(cache, torch.tensor([first, first]))
    logits_BV = model.decode(cache, torch.tensor([5, 6]))
    for b, token_id in enumerate((5, 6)):
        expected = model(torch.tensor([[*prompt, token_id]]))[0, -1]
        torch.testing.assert_close(logits_BV[b], expected, rtol=0, atol=1e-10)


@torch.no_grad()
def test_prefill_multiplies_no_padding(monkeypatch):
    model = random_llama(LLAMA_SHAPES["plain"])
    seen = []
    for layer in model.stack.layers:
        layer.feed_forward.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape[:-1].numel()))
    prompts = ragged([40, 3, 11], model.config.vocab_size)
    model.prefill(model.new_cache(3, 40, 1), range(3), prompts)
    assert seen == [39 + 2 + 10] * 2


def test_parameter_counts_of_the_published_shapes(shared):
    counts = json.loads((shared / "configs" / "parameter_counts.json").read_text())
    counts |= json.loads((shared / "configs" / "more_parameter_counts.json").read_text())
    names = [name for name in counts if "t5" not in name]
    assert len(names) == 4 + 7
    for name in names:
        model = empty_model(read_config(shared / "configs" / name))
        assert isinstance(model, Llama)
        assert sum(parameter.numel() for parameter in model.parameters()) == counts[name]


def test_bf16_logits_are_near_and_finite():
    model = random_llama(LLAMA_SHAPES["plain"])
    ids_BT = torch.tensor(ragged([40, 40], model.config.vocab_size))
    exact = model(ids_BT)
    rounded = model.bfloat16()(ids_BT)
    assert rounded.dtype == torch.bfloat16
    assert (rounded.float() - exact).abs().max() < 0.1 * exact.abs().max()


def test_dropout_only_in_training():
    model = random_llama(replace(LLAMA_SHAPES["grouped"], dropout=0.2))
    ids_BT = torch.tensor(ragged([15, 15], model.config.vocab_size))
    with torch.no_grad():
        quiet_BTV = model(ids_BT)
        assert torch.equal(model(ids_BT), quiet_BTV)
        model.train()
        torch.manual_seed(3)
        noisy_BTV = model(ids_BT)
        assert (noisy_BTV - quiet_BTV).abs().max() > 0.01
        assert not torch.equal(model(ids_BT), noisy_BTV)
        torch.manual_seed(3)
        assert torch.equal(model(ids_BT), noisy_BTV)
        assert torch.equal(model.eval()(ids_BT), quiet_BTV)


@pytest.mark.parametrize("shape", ["plain", "grouped"])
def test_dropout_of_0_equals_none_bit_for_bit(shape):
    ids_BT = torch.tensor(ragged([15, 15], 80))
    mask_BT = torch.arange(15) >= torch.tensor([0, 4])[:, None]
    for mask in (None, mask_BT):
        gradients = []
        for is_training in (False, True):
            model = random_llama(LLAMA_SHAPES[shape]).train(is_training)
            model(ids_BT, mask).square().mean().backward()
            gradients.append({name: weight.grad for name, weight in model.named_parameters()})
        assert all(torch.equal(gradient, gradients[1][name]) for name, gradient in gradients[0].items())


@pytest.mark.parametrize("is_trained", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
def test_dropped_attention_is_undropped_attention_on_average(with_mask, is_trained):
    """Each number within six standard errors of the mean of 2,000 passes; the softmax weights tell the error."""
    rate, n_passes = 0.25, 2000
    generator = torch.Generator().manual_seed(0)
    q_BTHK, k_BTGK, v_BTGK = (
        torch.randn(2, 5, heads, 6, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    )
    mask_B1TT = torch.ones(5, 5, dtype=torch.bool).tril().expand(2, 1, 5, 5) if with_mask else None
    expected_BTHK = CausalAttention(mask_B1TT).attend(q_BTHK, k_BTGK, v_BTGK)

    torch.manual_seed(1)
    total_BTHK = torch.zeros_like(expected_BTHK)
    for _ in range(n_passes):
        q_given = q_BTHK.clone().requires_grad_(is_trained)
        total_BTHK += CausalAttention(mask_B1TT, rate).attend(q_given, k_BTGK, v_BTGK).detach()

    # A weight w is 0 with probability p, else w / (1 − p): its variance is w² p / (1 − p).
    k_BTHK, v_BTHK = k_BTGK.repeat_interleave(2, 2), v_BTGK.repeat_interleave(2, 2)
    score_BHTT = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BTHK) / 6**0.5
    later_TT = torch.ones(5, 5, dtype=torch.bool).triu(1)
    weight_BHTT = score_BHTT.masked_fill(later_TT, -torch.inf).softmax(-1)
    variance_BTHK = torch.einsum("bhts,bshk->bthk", weight_BHTT**2, v_BTHK**2) * rate / (1 - rate)
    error_BTHK = (variance_BTHK / n_passes).sqrt()
    assert ((total_BTHK / n_passes - expected_BTHK).abs() <= 6 * error_BTHK).all()
    assert error_BTHK.min() > 0


def test_prefill_and_decoding_have_no_dropout():
    model = random_llama(replace(LLAMA_SHAPES["grouped"], dropout=0.5)).train()
    cache = model.new_cache(1, 6, 2)
    (first,) = model.prefill(cache, [0], [[5, 6, 7, 8, 9, 3]])
    logits_1V = model.decode(cache, torch.tensor([first]))
    expected_V = random_llama(LLAMA_SHAPES["grouped"])(torch.tensor([[5, 6, 7, 8, 9, 3]]))[0, -1]
    assert_close(logits_1V[0], expected_V)


def test_dropout_is_where_transformers_has_it(dropped):
    """The attention weights of every layer, and nothing else."""
    model = random_llama(replace(LLAMA_SHAPES["grouped"], dropout=0.2)).train()
    twin = hf_llama(model).train()
    ids_BT = torch.tensor(ragged([9, 9], model.config.vocab_size))
    model(ids_BT)
    ours = sorted(dropped)
    dropped.clear()
    twin(ids_BT)
    assert ours == sorted(dropped) == [((2, 6, 9, 9), 0.2)] * model.config.n_layers


def test_a_llama_has_no_start_id():
    config = LlamaConfig(10, 4, 4, 1, 1, 1, 4)
    assert not config.is_encoder_decoder
    assert "start_id" not in vars(config)
