"""Packed batches against padded ones: the same log-probabilities and gradients, without computing padding."""

import pytest
import torch

from minidpost.models.hf_config import Model
from minidpost.models.llama import Llama, LlamaConfig
from minidpost.models.packing import packing_of
from minidpost.models.t5 import T5, T5Config
from minidpost.training.batching import TokenizedExample, collate
from minidpost.training.losses import log_probabilities, sft_loss
from minidpost.training.optim import enable_activation_checkpointing

VOCAB_SIZE = 50
LENGTHS = [(3, 9), (1, 1), (12, 2), (3, 5), (7, 12)]  # of prompts and targets


def t5() -> T5:
    torch.manual_seed(0)
    return T5(T5Config(VOCAB_SIZE, 16, 8, 24, 2, n_encoder_layers=2, n_decoder_layers=3)).initialise().double().eval()


def llama() -> Llama:
    torch.manual_seed(0)
    config = LlamaConfig(VOCAB_SIZE, 24, 40, 3, n_heads=4, n_kv_heads=2, d_head=8, qk_norm=True, tied=True)
    return Llama(config).initialise().double().eval()


def examples(*, shared_prompts: bool = False) -> list[TokenizedExample]:
    torch.manual_seed(1)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(VOCAB_SIZE, (n,)).tolist())

    found = [TokenizedExample(ids(n_prompt), ids(n_target)) for n_prompt, n_target in LENGTHS]
    if shared_prompts:
        found += [TokenizedExample(found[2].prompt_ids, ids(4)), TokenizedExample(found[0].prompt_ids, ids(1))]
    return found


def results(model: Model, batch: list[TokenizedExample], *, is_packed: bool) -> tuple[torch.Tensor, dict]:
    """Log-probabilities of the labels, and each parameter's gradient."""
    model.zero_grad()
    log_probability_BT = log_probabilities(model, collate(model.config, batch, "cpu", is_packed))
    weight_BT = torch.linspace(0.5, 2, log_probability_BT.numel()).view(log_probability_BT.shape)
    (log_probability_BT * weight_BT).sum().backward()
    return log_probability_BT.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["all kept", "activation checkpointing"])
@pytest.mark.parametrize("shared_prompts", [False, True], ids=["prompts of their own", "shared prompts"])
@pytest.mark.parametrize("make", [t5, llama])
def test_log_probabilities_and_gradients_are_those_of_padded_rows(make, shared_prompts, checkpointing):
    model = make()
    if checkpointing:
        enable_activation_checkpointing(model)
    batch = examples(shared_prompts=shared_prompts)
    expected_BT, expected_gradients = results(model, batch, is_packed=False)
    packed_BT, gradients = results(model, batch, is_packed=True)
    torch.testing.assert_close(packed_BT, expected_BT, rtol=1e-10, atol=1e-10)
    assert (expected_BT != 0).sum() == sum(n_target for _, n_target in LENGTHS) + 5 * shared_prompts
    for name, expected in expected_gradients.items():
        assert expected.abs().max() > 0
        torch.testing.assert_close(gradients[name], expected, rtol=1e-9, atol=1e-10, msg=name)


@pytest.mark.parametrize("make", [t5, llama])
def test_feed_forward_layers_see_tokens_alone(make):
    model = make()
    batch = examples(shared_prompts=True)
    seen = []
    for name, module in model.named_modules():
        if name.endswith("feed_forward"):
            module.register_forward_hook(lambda _, inputs, output: seen.append(tuple(output.shape)))
    sft_loss(log_probabilities(model, collate(model.config, batch, "cpu", is_packed=True)), 1)
    width = model.config.d_model
    if isinstance(model, T5):
        n_source = sum(n_prompt for n_prompt, _ in LENGTHS)  # a shared prompt once
        n_target = sum(len(example.target_ids) for example in batch)
        assert seen == [(1, n_source, width)] * 2 + [(1, n_target, width)] * 3
    else:  # the last token of a row predicts nothing
        n_tokens = sum(example.n_tokens - 1 for example in batch)
        assert seen == [(1, n_tokens, width)] * 3


@pytest.mark.parametrize("make", [t5, llama])
def test_with_dropout_training_takes_another_course_but_learns(make):
    """Dropout hits tokens alone; the mean over many masks is what padded rows give."""
    model = make().train()
    model.dropout = 0.2
    batch = collate(model.config, examples(), "cpu", is_packed=True)
    with torch.no_grad():
        torch.manual_seed(0)
        of_packed = torch.stack([log_probabilities(model, batch) for _ in range(200)])
        padded_batch = collate(model.config, examples(), "cpu", is_packed=False)
        of_padded = torch.stack([log_probabilities(model, padded_batch) for _ in range(200)])
    assert of_packed.std(0).max() > 0
    error = (of_packed.std(0) ** 2 + of_padded.std(0) ** 2).div(200).sqrt().clamp(min=1e-12)
    assert ((of_packed.mean(0) - of_padded.mean(0)).abs() / error).max() < 5


def test_packing_and_unpacking():
    mask_BT = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]).bool()
    packing = packing_of(mask_BT)
    assert packing.position_N.tolist() == [0, 1, 2, 4, 8, 9, 10, 11]
    assert packing.column_1N.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    x_BTD = torch.randn(3, 4, 5, dtype=torch.float64, requires_grad=True)
    packed_1ND = packing.pack(x_BTD)
    assert torch.equal(packed_1ND[0], x_BTD[mask_BT])
    assert torch.equal(packing.unpack(packed_1ND)[mask_BT], x_BTD[mask_BT])
    weight_1ND = torch.randn_like(packed_1ND)
    (packed_1ND * weight_1ND).sum().backward()
    assert torch.equal(x_BTD.grad[mask_BT], weight_1ND[0])
    assert not x_BTD.grad[~mask_BT].any()
    tokens_1ND = packed_1ND.detach().requires_grad_()
    # What a loss says of padding is no token's business.
    packing.unpack(tokens_1ND).sum().backward()
    assert torch.equal(tokens_1ND.grad, torch.ones_like(tokens_1ND))
