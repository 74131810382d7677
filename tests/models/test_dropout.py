"""Dropout on a CPU: as many numbers as asked for, scaled, and decided by the state of torch's generator alone."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from minidpost.models.dropout import drop, fraction_that_stays, stays, threshold_of


@pytest.mark.parametrize("dropout", [0.1, 0.5, 0.99])
def test_as_many_are_dropped_as_asked_for(dropout):
    shape = torch.Size((7, 3, 101, 103))  # not a whole number of words
    masks = [stays(shape, threshold_of(dropout), *seed) for seed in ((1, 0), (1, 7), (2, 0))]
    n, sigma = shape.numel(), (dropout * (1 - dropout) / shape.numel()) ** 0.5
    for mask in masks:
        assert mask.shape == shape
        assert abs(1 - mask.sum().item() / n - dropout) < 5 * sigma
    # Independent of each other: both stay as often as the product says.
    for other in masks[1:]:
        both = (masks[0] & other).sum().item() / n
        assert abs(both - (1 - dropout) ** 2) < 5 * ((1 - dropout) ** 2 / n) ** 0.5


def test_neighbours_are_dropped_independently():
    """Words of 64 bits are cut into four: none of the four may tell of another."""
    mask = stays(torch.Size((2**20,)), threshold_of(0.5), 3)
    for distance in (1, 2, 3, 4):
        both = (mask[:-distance] & mask[distance:]).double().mean().item()
        assert abs(both - 0.25) < 5 * (0.25 * 0.75 / 2**20) ** 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.1, 0.75, 0.9999])
def test_what_stays_is_scaled_and_so_is_its_gradient(dtype, dropout):
    torch.manual_seed(0)
    x = torch.randn(50, 40).to(dtype).requires_grad_()
    y = drop(x, dropout)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    scale = 1 / fraction_that_stays(threshold_of(dropout))
    assert scale == pytest.approx(1 / (1 - dropout), rel=0.2 if dropout == 0.9999 else 1e-4)
    assert y.dtype == gradient.dtype == dtype and 0 < (y == 0).sum()
    expected = torch.where(y == 0, 0, scale).to(dtype)
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(y, x * expected)


def test_none_and_all():
    x = torch.randn(3, 4)
    assert drop(x, 0.0) is x or torch.equal(drop(x, 0.0), x)
    assert torch.equal(drop(x, 1.0), torch.zeros(3, 4))
    assert 0 < threshold_of(1 - 1e-9) < 2**16  # something could stay, so that nothing is divided by 0
    assert drop(torch.zeros(0, 4), 0.5).shape == (0, 4)


def test_torchs_generator_alone_decides():
    """The same state drops the same numbers, the next call others; a checkpoint's second pass is the first again."""
    x = torch.ones(1000, requires_grad=True)
    torch.manual_seed(5)
    first, second = drop(x, 0.5), drop(x, 0.5)
    torch.manual_seed(5)
    assert torch.equal(drop(x, 0.5), first) and not torch.equal(first, second)
    torch.manual_seed(5)
    (gradient,) = torch.autograd.grad(checkpoint(lambda x: drop(x, 0.5), x, use_reentrant=False).sum(), x)
    assert torch.equal(gradient, first)
