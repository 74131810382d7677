"""The choice of an id: the same in either memory order, and exact at the borders of blocks."""

import pytest
import torch

from minidpost.sampling.token_choice import BLOCK, draw, most_likely, nucleus

torch.set_num_threads(1)
SIZES = [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 1665, 5000, 32_128]


def id_by_id(logits_BV: torch.Tensor) -> torch.Tensor:
    """The same numbers, the rows side by side in memory."""
    return logits_BV.T.contiguous().T


@pytest.mark.parametrize("size", SIZES)
def test_the_most_likely_id_is_the_first_of_those_that_are_equal(size):
    torch.manual_seed(0)
    logits_BV = torch.randint(0, 40, (6, size)).float()
    logits_BV[4], logits_BV[5] = -torch.inf, 0.0
    expected = [row.index(max(row)) for row in logits_BV.tolist()]
    for mapping in (logits_BV, id_by_id(logits_BV), logits_BV.double(), logits_BV.bfloat16()):
        assert most_likely(mapping).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_a_draw_is_where_the_number_falls_in_the_cumulated_probabilities(size, dtype):
    torch.manual_seed(size)
    scores_BV, uniform_B = 3 * torch.randn(400, size, dtype=torch.float64), torch.rand(400, dtype=torch.float64)
    cumulated_BV = scores_BV.softmax(-1).cumsum(-1)
    expected_B = torch.searchsorted(cumulated_BV, uniform_B[:, None], right=True)[:, 0].clamp(max=size - 1)
    gap_B = (cumulated_BV - uniform_B[:, None]).abs().amin(-1)  # draws at a border are decided by rounding
    is_clear_B = gap_B > (1e-12 if dtype == torch.float64 else 1e-5)
    assert is_clear_B.float().mean() > 0.8
    for mapping in (scores_BV.to(dtype), id_by_id(scores_BV.to(dtype))):
        assert torch.equal(draw(mapping, uniform_B)[is_clear_B], expected_B[is_clear_B])


@pytest.mark.parametrize("size", [256, 8192])
def test_even_probabilities_are_cut_exactly_at_the_borders(size):
    """They add up without rounding: a number on a border belongs to the id behind it."""
    ids = [*range(0, size, size // 256), BLOCK - 1, BLOCK, BLOCK + 1, size - 1]
    uniform_B = torch.tensor(ids, dtype=torch.float64) / size
    assert draw(torch.zeros(len(ids), size), uniform_B).tolist() == ids
    assert draw(torch.zeros(len(ids), size), uniform_B + 2**-20).tolist() == ids


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_large_rows_of_no_numbers_still_give_an_id(value):
    logits_BV = id_by_id(torch.zeros(3, 5000))
    logits_BV[0], logits_BV[1, 2] = value, value
    for chosen_B in (draw(logits_BV, torch.full((3,), 0.999, dtype=torch.float64)), most_likely(logits_BV)):
        assert chosen_B.min() >= 0 and chosen_B.max() < 5000


def test_a_nucleus_keeps_scores_and_order():
    scores_BN = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.97, 0.01, 0.01, 0.01]]).log()
    kept = nucleus(scores_BN, 0.76) > -torch.inf
    assert kept.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert torch.equal(nucleus(scores_BN, 0.76)[kept], scores_BN[kept])
