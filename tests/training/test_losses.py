"""Log-probabilities and the two losses against their equations, and the SFT loss against transformers'."""

import math

import pytest
import torch
from torch import nn

from minidpost.models import layers
from minidpost.models.layers import token_log_probabilities
from minidpost.models.t5 import T5, T5Config
from minidpost.models.weights import load_model
from minidpost.training.batching import IGNORED_LABEL, TokenizedExample, collate
from minidpost.training.losses import dpo_loss, log_probabilities, sft_loss

LN2 = math.log(2)


def random_sequences(n: int, vocab_size: int) -> list[TokenizedExample]:
    """Ragged prompts and targets whose ids include the padding id 0."""
    ids = [tuple(torch.randint(vocab_size, (length,)).tolist()) for length in torch.randint(1, 12, (2 * n,)).tolist()]
    return [TokenizedExample(prompt, target) for prompt, target in zip(ids[:n], ids[n:], strict=True)]


def test_token_log_probabilities_are_log_softmax_of_labels():
    torch.manual_seed(0)
    logits_NV = torch.randn(6, 11, dtype=torch.float64) * 3
    label_N = torch.randint(11, (6,))
    result_N = token_log_probabilities(logits_NV, label_N)
    assert result_N.dtype == torch.float64
    for n, label in enumerate(label_N.tolist()):
        scores = [math.exp(x) for x in logits_NV[n].tolist()]
        assert result_N[n].item() == pytest.approx(math.log(scores[label] / sum(scores)), abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_normalised_in_fp32(dtype):
    torch.manual_seed(0)
    logits_NV = (torch.randn(12, 2000) * 4).to(dtype)
    label_N = torch.randint(2000, (12,))
    result_N = token_log_probabilities(logits_NV, label_N)
    exact_N = logits_NV.double().log_softmax(-1).gather(-1, label_N[:, None])[:, 0]
    assert result_N.dtype == torch.float32
    torch.testing.assert_close(result_N.double(), exact_N, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("logits_in_cache", [1, 25, 2**19], ids=["a position", "two positions", "all positions"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 5e-3)]
)
def test_token_log_probabilities_and_gradients_equal_cross_entropys(monkeypatch, logits_in_cache, dtype, tolerance):
    monkeypatch.setattr(layers, "LOGITS_IN_CACHE", logits_in_cache)
    torch.manual_seed(0)
    exact_NV = (torch.randn(7, 11, dtype=torch.float64) * 30).to(dtype)  # some probabilities are as good as 0 or 1
    weight_N = torch.randn(7, dtype=torch.float64)
    label_N = torch.randint(11, (7,))
    ours_NV, theirs_NV = exact_NV.clone().requires_grad_(), exact_NV.double().requires_grad_()
    ours_N = token_log_probabilities(ours_NV, label_N)
    theirs_N = -nn.functional.cross_entropy(theirs_NV, label_N, reduction="none")
    torch.testing.assert_close(ours_N.double(), theirs_N, rtol=min(tolerance, 1e-6), atol=1e-6)
    (ours_N * weight_N).sum().backward()
    (theirs_N * weight_N).sum().backward()
    assert ours_NV.grad.dtype == dtype
    torch.testing.assert_close(ours_NV.grad.double(), theirs_NV.grad, rtol=tolerance, atol=tolerance)


def small_t5(vocab_size: int = 30) -> T5:
    torch.manual_seed(0)
    return T5(T5Config(vocab_size, 16, 8, 24, 2, 1, 1)).initialise().double().eval()


def test_log_probabilities_are_0_where_no_label_is():
    model = small_t5()
    sequences = [TokenizedExample((4, 5, 6, 7), (8, 9, 1)), TokenizedExample((2,), (3,))]
    batch = collate(model.config, sequences, "cpu")
    result_BT = log_probabilities(model, batch)
    logits_BTV = model(*batch.inputs)
    for b, sequence in enumerate(sequences):
        for t in range(3):
            is_target = t < len(sequence.target_ids)
            expected = logits_BTV[b, t].log_softmax(-1)[sequence.target_ids[t]].item() if is_target else 0.0
            assert result_BT[b, t].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("at_once", [1, 4, 1000])
def test_chunks_of_logits_change_neither_values_nor_gradients(at_once):
    model = small_t5()
    batch = collate(model.config, random_sequences(7, 30), "cpu")

    def values_and_gradients(logits_at_once: int) -> list[torch.Tensor]:
        model.zero_grad()
        result_BT = log_probabilities(model, batch, logits_at_once)
        (result_BT * torch.arange(result_BT.numel()).view(result_BT.shape)).sum().backward()
        return [result_BT.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    for whole, cut in zip(values_and_gradients(10**9), values_and_gradients(30 * at_once), strict=True):
        torch.testing.assert_close(cut, whole, rtol=1e-12, atol=1e-12)


def test_logits_exist_for_a_bounded_number_of_positions(monkeypatch):
    model = small_t5()
    sizes = []
    original = model.logits
    monkeypatch.setattr(model, "logits", lambda hidden_ND: sizes.append(len(hidden_ND)) or original(hidden_ND))
    examples = [TokenizedExample((4, 5), tuple(range(2, 13))), TokenizedExample((4,), (3, 1))]
    batch = collate(model.config, examples, "cpu")
    log_probabilities(model, batch, logits_at_once=4 * 30 + 29).sum().backward()
    assert sizes == [4, 4, 4, 1, 1, 4, 4, 4]  # 13 labels of 22 positions, forwards and again backwards


def test_sft_loss_is_the_token_mean_however_it_is_cut():
    model = small_t5()
    sequences = random_sequences(5, 30)
    n_tokens = sum(len(sequence.target_ids) for sequence in sequences)

    def loss_of(part: list[TokenizedExample]) -> float:
        return sft_loss(log_probabilities(model, collate(model.config, part, "cpu")), n_tokens).item()

    batch = collate(model.config, sequences, "cpu")
    mean = nn.CrossEntropyLoss(ignore_index=IGNORED_LABEL)(model(*batch.inputs).flatten(0, 1), batch.label_BT.flatten())
    assert loss_of(sequences) == pytest.approx(mean.item(), abs=1e-12)
    assert loss_of(sequences[:1]) + loss_of(sequences[1:]) == pytest.approx(mean.item(), abs=1e-12)


def test_sft_loss_equals_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=50,
        d_model=24,
        d_kv=8,
        d_ff=40,
        num_heads=2,
        num_layers=2,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=0,
        tie_word_embeddings=False,
    )
    theirs = transformers.T5ForConditionalGeneration(config).eval()
    theirs.lm_head.weight = nn.Parameter(torch.randn(50, 24) / 4)  # transformers 5 ties it whatever the config says
    theirs.save_pretrained(tmp_path)
    ours = load_model(tmp_path)
    sequences = random_sequences(7, 50)
    batch = collate(ours.config, sequences, "cpu")
    source_BS, mask_BS, *_ = batch.inputs
    n_tokens = sum(len(sequence.target_ids) for sequence in sequences)
    expected = theirs(input_ids=source_BS, attention_mask=mask_BS.long(), labels=batch.label_BT).loss
    loss = sft_loss(log_probabilities(ours, batch), n_tokens)
    assert loss.item() == pytest.approx(expected.item(), abs=2e-6)


def test_dpo_loss_is_the_equation():
    policy_B2 = torch.tensor([[-5.0, -9.0], [-40.0, -30.0]], dtype=torch.float64)  # chosen, rejected
    reference_B2 = torch.tensor([[-6.0, -8.0], [-20.0, -35.0]], dtype=torch.float64)
    loss_B, margin_B = dpo_loss(policy_B2, reference_B2, beta=0.1)
    assert margin_B.tolist() == pytest.approx([0.2, -2.5])  # 0.1 · ((−5+6) − (−9+8)) and 0.1 · ((−40+20) − (−30+35))
    assert loss_B.tolist() == pytest.approx([-math.log(1 / (1 + math.exp(-m))) for m in (0.2, -2.5)])


def test_dpo_loss_of_the_reference_itself_is_ln_2():
    policy_B2 = -torch.rand(8, 2) * 100
    loss_B, margin_B = dpo_loss(policy_B2, policy_B2, beta=0.1)
    assert margin_B.abs().max() == 0
    torch.testing.assert_close(loss_B, torch.full((8,), LN2), rtol=0, atol=1e-6)


def test_dpo_gradient_is_weighted_by_the_margin():
    """dL/dlog π(y_w) = −β σ(−margin), and the opposite for y_l (Rafailov et al. 2023, section 4)."""
    chosen_B = torch.tensor([-5.0, -40.0, -3.0], dtype=torch.float64, requires_grad=True)
    rejected_B = torch.tensor([-9.0, -30.0, -300.0], dtype=torch.float64, requires_grad=True)
    reference_B = torch.tensor([-7.0, -20.0, -3.0], dtype=torch.float64)
    policy_B2, reference_B2 = torch.stack([chosen_B, rejected_B], 1), torch.stack([reference_B, reference_B], 1)
    loss_B, margin_B = dpo_loss(policy_B2, reference_B2, beta=0.3)
    loss_B.sum().backward()
    expected_B = -0.3 * torch.sigmoid(-margin_B.detach())
    torch.testing.assert_close(chosen_B.grad, expected_B)
    torch.testing.assert_close(rejected_B.grad, -expected_B)


def test_dpo_loss_is_finite_at_extreme_margins():
    loss_B, margin_B = dpo_loss(torch.tensor([[-1e4, 0.0], [0.0, -1e4]]), torch.zeros(2, 2), beta=1.0)
    assert margin_B.tolist() == [-1e4, 1e4]
    assert loss_B.tolist() == [1e4, 0.0]
