"""Log-probabilities and the two losses against their equations, and the SFT loss against transformers'."""

import math

import pytest
import torch
from torch import nn

from minidpost.batches import IGNORED, Encoded, collate
from minidpost.checkpoint import load_model
from minidpost.objectives import dpo_loss, sequence_log_probabilities, sft_loss, token_log_probabilities
from minidpost.t5 import T5, T5Config

torch.set_num_threads(1)

LN2 = math.log(2)


def random_sequences(n: int, vocab_size: int) -> list[Encoded]:
    """Ragged prompts and targets whose ids include the padding id 0."""
    ids = [tuple(torch.randint(vocab_size, (length,)).tolist()) for length in torch.randint(1, 12, (2 * n,)).tolist()]
    return [Encoded(prompt, target) for prompt, target in zip(ids[:n], ids[n:], strict=True)]


def test_token_log_probabilities_are_the_log_softmax_of_the_labels():
    torch.manual_seed(0)
    logits_BTV = torch.randn(3, 5, 11, dtype=torch.float64) * 3
    label_BT = torch.randint(11, (3, 5))
    label_BT[1, 3:] = label_BT[2, :] = IGNORED
    result_BT = token_log_probabilities(logits_BTV, label_BT)
    assert result_BT.dtype == torch.float64
    for b in range(3):
        for t in range(5):
            scores = [math.exp(x) for x in logits_BTV[b, t].tolist()]
            label = label_BT[b, t].item()
            expected = 0.0 if label == IGNORED else math.log(scores[label] / sum(scores))
            assert result_BT[b, t].item() == pytest.approx(expected, abs=1e-12)
    assert torch.equal(sequence_log_probabilities(logits_BTV, label_BT), result_BT.sum(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_normalised_in_fp32(dtype):
    torch.manual_seed(0)
    logits_BTV = (torch.randn(2, 6, 2000) * 4).to(dtype)
    label_BT = torch.randint(2000, (2, 6))
    result_BT = token_log_probabilities(logits_BTV, label_BT)
    exact_BT = logits_BTV.double().log_softmax(-1).gather(-1, label_BT[..., None])[..., 0]
    assert result_BT.dtype == torch.float32
    torch.testing.assert_close(result_BT.double(), exact_BT, rtol=1e-6, atol=1e-6)


def test_ignored_positions_have_no_loss_and_no_gradient():
    torch.manual_seed(0)
    logits_BTV = torch.randn(2, 4, 7, requires_grad=True)
    label_BT = torch.tensor([[3, 0, IGNORED, IGNORED], [1, 2, 0, 6]])
    sft_loss(logits_BTV, label_BT, 6).backward()
    gradient_BT = logits_BTV.grad.abs().sum(-1)
    assert torch.equal(gradient_BT == 0, label_BT == IGNORED)


def test_sft_loss_is_the_mean_over_the_tokens_of_the_step_however_it_is_cut():
    torch.manual_seed(0)
    logits_BTV = torch.randn(4, 5, 9, dtype=torch.float64)
    label_BT = torch.randint(9, (4, 5))
    label_BT[0, 1:] = label_BT[3, 4:] = IGNORED
    n_tokens = 1 + 5 + 5 + 4
    whole = sft_loss(logits_BTV, label_BT, n_tokens)
    mean = nn.CrossEntropyLoss(ignore_index=IGNORED)(logits_BTV.flatten(0, 1), label_BT.flatten())
    parts = sum(sft_loss(logits_BTV[rows], label_BT[rows], n_tokens) for rows in (slice(0, 1), slice(1, 4)))
    assert whole.item() == pytest.approx(mean.item(), abs=1e-12)
    assert parts.item() == pytest.approx(whole.item(), abs=1e-12)


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
    batch = collate(sequences, ours.config.start_id, "cpu")
    source_BS, mask_BS, _ = batch.inputs
    n_tokens = sum(len(sequence.target) for sequence in sequences)
    expected = theirs(input_ids=source_BS, attention_mask=mask_BS.long(), labels=batch.label_BT).loss
    loss = sft_loss(ours(*batch.inputs), batch.label_BT, n_tokens)
    assert loss.item() == pytest.approx(expected.item(), abs=2e-6)


def test_the_prompt_carries_no_loss():
    """The labels of a batch are those of the targets, so the loss sees a prompt only through the model."""
    torch.manual_seed(0)
    model = T5(T5Config(30, 16, 8, 24, 2, 1, 1)).initialise().eval()
    sequence = Encoded((4, 5, 6, 7), (8, 9, 1))
    batch = collate([sequence], 0, "cpu")
    logits_1TV = model(*batch.inputs)
    assert logits_1TV.shape[1] == len(sequence.target)
    expected = sum(logits_1TV[0, t].log_softmax(-1)[label] for t, label in enumerate(sequence.target))
    log_probability = sequence_log_probabilities(logits_1TV, batch.label_BT)
    assert log_probability.item() == pytest.approx(expected.item(), abs=1e-5)


def test_dpo_loss_is_the_equation():
    chosen, rejected, reference_chosen, reference_rejected = (
        torch.tensor(column, dtype=torch.float64) for column in ([-5.0, -40], [-9.0, -30], [-6.0, -20], [-8.0, -35])
    )
    loss_B, margin_B = dpo_loss(chosen, rejected, reference_chosen, reference_rejected, beta=0.1)
    assert margin_B.tolist() == pytest.approx([0.2, -2.5])  # 0.1 · ((−5+6) − (−9+8)) and 0.1 · ((−40+20) − (−30+35))
    assert loss_B.tolist() == pytest.approx([-math.log(1 / (1 + math.exp(-m))) for m in (0.2, -2.5)])


def test_dpo_loss_of_the_reference_itself_is_ln_2():
    chosen_B, rejected_B = -torch.rand(2, 8) * 100
    loss_B, margin_B = dpo_loss(chosen_B, rejected_B, chosen_B, rejected_B, beta=0.1)
    assert margin_B.abs().max() == 0
    torch.testing.assert_close(loss_B, torch.full((8,), LN2), rtol=0, atol=1e-6)


def test_dpo_gradient_pushes_as_the_margin_asks():
    """dL/dlog π(y_w) = −β σ(−margin), and the opposite for y_l (Rafailov et al. 2023, section 4)."""
    chosen_B = torch.tensor([-5.0, -40.0, -3.0], dtype=torch.float64, requires_grad=True)
    rejected_B = torch.tensor([-9.0, -30.0, -300.0], dtype=torch.float64, requires_grad=True)
    reference_B = torch.tensor([-7.0, -20.0, -3.0], dtype=torch.float64)
    loss_B, margin_B = dpo_loss(chosen_B, rejected_B, reference_B, reference_B, beta=0.3)
    loss_B.sum().backward()
    expected_B = -0.3 * torch.sigmoid(-margin_B.detach())
    torch.testing.assert_close(chosen_B.grad, expected_B)
    torch.testing.assert_close(rejected_B.grad, -expected_B)


def test_dpo_loss_is_finite_at_extreme_margins():
    loss_B, margin_B = dpo_loss(torch.tensor([-1e4, 0.0]), torch.tensor([0.0, -1e4]), *torch.zeros(2, 2), beta=1.0)
    assert margin_B.tolist() == [-1e4, 1e4]
    assert loss_B.tolist() == [1e4, 0.0]
