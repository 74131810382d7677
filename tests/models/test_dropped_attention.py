"""Attention with dropped weights: torch's own where none is dropped, its gradients, and which weights are dropped."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from minidpost.models import dropped_attention as module
from minidpost.models.dropout import stays
from minidpost.models.dropped_attention import dropped_attention

SCALE = 0.3


@pytest.fixture(params=[1, 300, 10**6], ids=["row by row", "three rows", "all rows"])
def weights_at_once(request, monkeypatch):
    monkeypatch.setattr(module, "WEIGHTS_AT_ONCE", request.param)


def tensors(n_queries: int = 5, n_keys: int = 5, n_rows: int = 4) -> list[Tensor]:
    """Queries of four heads that share keys and values of two."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(n_rows, 4, n_queries, 3), (n_rows, 2, n_keys, 3), (n_rows, 2, n_keys, 3)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def causal(n: int = 5) -> Tensor:
    return torch.ones(1, 1, n, n, dtype=torch.bool).tril()


@pytest.mark.parametrize("is_causal", [True, False])
def test_without_dropout_it_is_torchs(weights_at_once, is_causal):
    """Values and gradients, with a mask for all rows, and with one of each row's own."""
    inputs = tensors() if is_causal else tensors(n_keys=7)
    mask = causal() if is_causal else torch.arange(7) < torch.tensor([7, 3, 1, 6])[:, None, None, None]
    ours = dropped_attention(*inputs, mask, dropout=0.0, scale=SCALE)
    theirs = F.scaled_dot_product_attention(*inputs, mask, scale=SCALE, enable_gqa=True)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(y.square().sum(), inputs) for y in (ours, theirs)]
    torch.testing.assert_close(*gradients)


def test_gradients_with_dropout(monkeypatch):
    monkeypatch.setattr(module, "WEIGHTS_AT_ONCE", 50)  # a row at a time

    def attend(*inputs: Tensor) -> Tensor:
        torch.manual_seed(1)
        return dropped_attention(*inputs, causal(), dropout=0.4, scale=SCALE)

    assert torch.autograd.gradcheck(attend, tensors(n_rows=2))


def test_what_stays_is_scaled(monkeypatch):
    """By hand, with the mask that the call makes."""
    drawn = []

    def noted(*arguments: object) -> Tensor:
        drawn.append(stays(*arguments))
        return drawn[-1]

    monkeypatch.setattr(module, "stays", noted)
    q, k, v = tensors()
    y = dropped_attention(q, k, v, causal(), dropout=0.25, scale=SCALE)
    (mask,) = drawn
    assert mask.shape == (4, 4, 5, 5) and not mask.all()
    scores = (q @ k.repeat_interleave(2, 1).mT * SCALE).masked_fill(~causal(), -torch.inf)
    torch.testing.assert_close(y, scores.softmax(-1) * mask / 0.75 @ v.repeat_interleave(2, 1))
    y.sum().backward()
    assert torch.equal(drawn[1], mask)  # the backward pass made it again


def test_torchs_generator_alone_decides():
    """The same state drops the same weights, the next call others; a checkpoint's second pass is the first again."""
    inputs = tensors()

    def attend(*inputs: Tensor) -> Tensor:
        return dropped_attention(*inputs, causal(), dropout=0.5, scale=SCALE)

    torch.manual_seed(5)
    first, second = attend(*inputs), attend(*inputs)
    torch.manual_seed(5)
    assert torch.equal(attend(*inputs), first) and not torch.equal(first, second)
    gradients = []
    for run in (attend, lambda *x: checkpoint(attend, *x, use_reentrant=False)):
        torch.manual_seed(6)
        gradients.append(torch.autograd.grad(run(*inputs).square().sum(), inputs))
    torch.testing.assert_close(*gradients, rtol=0, atol=0)


def test_bf16_is_attended_to_in_fp32():
    """Under autocast, as a layer calls it: near what fp32 gives, gradients in bf16."""
    exact = [tensor.detach().float().requires_grad_() for tensor in tensors()]
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in tensors()]
    with torch.autocast("cpu", torch.bfloat16):
        y = dropped_attention(*rounded, causal(), dropout=0.0, scale=SCALE)
    y.float().square().sum().backward()
    reference = dropped_attention(*exact, causal(), dropout=0.0, scale=SCALE)
    reference.square().sum().backward()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), reference, rtol=0.02, atol=0.02)
    for ours, theirs in zip(rounded, exact, strict=True):
        torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=0.05, atol=0.05)
