"""The choice of a token: against transformers, in either memory order, exact at the borders of blocks."""

import numpy as np
import pytest
import torch

from minidpost.sampling.token_choice import (
    BLOCK,
    SamplingSettings,
    choose,
    inverse_cdf,
    most_likely,
    nucleus,
    row_uniforms,
)

LARGEST = 1 - 2**-53  # the largest number below 1 that a generator gives
SIZES = [1, 7, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK, 1665, 5000, 32_128]


def id_by_id(logits_BV: torch.Tensor) -> torch.Tensor:
    """The same numbers, the rows side by side in memory."""
    return logits_BV.T.contiguous().T


@pytest.mark.parametrize("size", SIZES)
def test_most_likely_is_the_first_of_equal_ones(size):
    torch.manual_seed(0)
    logits_BV = torch.randint(0, 40, (6, size)).float()
    logits_BV[4], logits_BV[5] = -torch.inf, 0.0
    expected = [row.index(max(row)) for row in logits_BV.tolist()]
    for mapping in (logits_BV, id_by_id(logits_BV), logits_BV.double(), logits_BV.bfloat16()):
        assert most_likely(mapping).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("size", SIZES)
def test_inverse_cdf_is_a_search_in_cumulated_probabilities(size, dtype):
    torch.manual_seed(size)
    scores_BV, uniform_B = 3 * torch.randn(400, size, dtype=torch.float64), torch.rand(400, dtype=torch.float64)
    cumulated_BV = scores_BV.softmax(-1).cumsum(-1)
    expected_B = torch.searchsorted(cumulated_BV, uniform_B[:, None], right=True)[:, 0].clamp(max=size - 1)
    gap_B = (cumulated_BV - uniform_B[:, None]).abs().amin(-1)  # a choice at a border is decided by rounding
    is_clear_B = gap_B > (1e-12 if dtype == torch.float64 else 1e-5)
    assert is_clear_B.float().mean() > 0.8
    for mapping in (scores_BV.to(dtype), id_by_id(scores_BV.to(dtype))):
        assert torch.equal(inverse_cdf(mapping, uniform_B)[is_clear_B], expected_B[is_clear_B])


@pytest.mark.parametrize("size", [256, 8192])
def test_even_probabilities_have_exact_borders(size):
    """They add up without rounding: a number on a border belongs to the id after it."""
    ids = [*range(0, size, size // 256), BLOCK - 1, BLOCK, BLOCK + 1, size - 1]
    uniform_B = torch.tensor(ids, dtype=torch.float64) / size
    assert inverse_cdf(torch.zeros(len(ids), size), uniform_B).tolist() == ids
    assert inverse_cdf(torch.zeros(len(ids), size), uniform_B + 2**-20).tolist() == ids


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_large_rows_of_no_numbers_still_give_an_id(value):
    logits_BV = id_by_id(torch.zeros(3, 5000))
    logits_BV[0], logits_BV[1, 2] = value, value
    for chosen_B in (inverse_cdf(logits_BV, torch.full((3,), 0.999, dtype=torch.float64)), most_likely(logits_BV)):
        assert chosen_B.min() >= 0 and chosen_B.max() < 5000


def test_a_nucleus_leaves_scores_and_order():
    scores_BN = torch.tensor([[0.5, 0.25, 0.125, 0.125], [0.97, 0.01, 0.01, 0.01]]).log()
    is_inside_BN = nucleus(scores_BN, 0.76) > -torch.inf
    assert is_inside_BN.tolist() == [[True, True, True, False], [True, False, False, False]]
    assert torch.equal(nucleus(scores_BN, 0.76)[is_inside_BN], scores_BN[is_inside_BN])


def test_row_uniforms_are_uniform_and_independent():
    settings = SamplingSettings(max_new_tokens=300, seed=42)
    rows = np.array([row_uniforms(settings, f"q{i // 4}", i % 4) for i in range(400)])
    assert rows.min() >= 0
    assert rows.max() < 1
    counts, _ = np.histogram(rows, bins=100, range=(0, 1))
    assert ((counts - 1200) ** 2 / 1200).sum() < 160  # chi-square of 99 degrees of freedom: 1 in 10,000
    assert abs(np.corrcoef(rows)[np.triu_indices(400, 1)]).max() < 0.35
    # The same on every machine.
    assert row_uniforms(settings, "q", 0)[:2].tolist() == [0.9736291598947793, 0.8977817992361041]


def test_without_uniform_numbers_the_choice_is_greedy():
    logits_BV = torch.tensor([[0.0, 3.0, 1.0], [-5.0, -6.0, -4.0]])
    assert choose(logits_BV, None, SamplingSettings()).tolist() == [1, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (50, 1.0), (1, 1.0), (0, 0.6), (0, 0.95), (4, 0.7)])
def test_choose_follows_the_distribution_of_transformers(top_k, top_p, dtype):
    """Uniform numbers on a fine grid: the fraction of them that chooses a token is its probability."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    n, logits_BV = 20_000, torch.randn(4, 9, dtype=torch.float64) * 2
    logits_BV[2, 4] = -torch.inf
    warped_BV = transformers.TemperatureLogitsWarper(0.7)(None, logits_BV)
    if top_k:
        warped_BV = transformers.TopKLogitsWarper(top_k)(None, warped_BV)
    if top_p < 1:
        warped_BV = transformers.TopPLogitsWarper(top_p)(None, warped_BV)
    grid_N = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    for logits_V, expected_V in zip(logits_BV.to(dtype), warped_BV.softmax(-1), strict=True):
        chosen_N = choose(logits_V.expand(n, -1), grid_N, SamplingSettings(0.7, top_k, top_p))
        fraction_V = torch.bincount(chosen_N, minlength=9) / n
        torch.testing.assert_close(fraction_V.double(), expected_V, rtol=0, atol=2 / n)
        assert fraction_V[expected_V == 0].sum() == 0


def test_top_p_leaves_the_fewest_tokens_that_reach_it():
    grid_N = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    probability_NV = torch.tensor([[0.125, 0.5, 0.25, 0.125]], dtype=torch.float64).expand(1000, -1)
    possible = {
        top_p: set(choose(probability_NV.log(), grid_N, SamplingSettings(1.0, 0, top_p)).tolist())
        for top_p in (0.01, 0.49, 0.51, 0.74, 0.76, 0.87, 0.88)
    }
    assert possible == {
        0.01: {1},
        0.49: {1},
        0.51: {1, 2},
        0.74: {1, 2},
        0.76: {0, 1, 2},  # of two that are equal the first
        0.87: {0, 1, 2},
        0.88: {0, 1, 2, 3},
    }


def test_top_p_stops_at_the_token_that_reaches_it_exactly():
    grid_N = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    even_NV = torch.zeros(1000, 4, dtype=torch.float64)
    for top_p, n_possible in ((0.25, 1), (0.5, 2), (0.75, 3)):
        assert set(choose(even_NV, grid_N, SamplingSettings(1.0, 0, top_p)).tolist()) == set(range(n_possible))


def test_fp64_logits_are_chosen_from_in_fp64():
    """Uniform numbers nearer to the border between two tokens than fp32 can tell."""
    uniform_B = torch.tensor([0.5 - 1e-12, 0.5 + 1e-12], dtype=torch.float64)
    assert choose(torch.zeros(2, 2, dtype=torch.float64), uniform_B, SamplingSettings(1.0)).tolist() == [0, 1]


def test_temperature_divides_the_logits():
    grid_N = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    logits_NV = torch.tensor([[0.0, 1.0]], dtype=torch.float64).expand(10_000, -1)
    for temperature in (0.2, 1.0, 5.0):
        fraction = choose(logits_NV, grid_N, SamplingSettings(temperature)).double().mean().item()
        assert fraction == pytest.approx(1 / (1 + np.exp(-1 / temperature)), abs=2e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (6, 1.0), (0, 0.999999), (6, 0.9)])
def test_no_number_chooses_a_token_of_no_probability(top_k, top_p, dtype):
    """Impossible tokens first, last and between, by an infinite logit or by underflow, at several sizes."""
    torch.manual_seed(0)
    settings = SamplingSettings(0.7, top_k, top_p)
    for size in (4, 33, 1000, 32_128):
        logits_BV = torch.randn(5, size).to(dtype) * 2
        logits_BV[0, [0, -1]] = -torch.inf
        logits_BV[1, [0, 1, -2, -1]] = -1e5
        logits_BV[2, 1:] = -torch.inf
        logits_BV[3, :-1] = -torch.inf
        logits_BV[4, size // 2 :] = -1e5
        probability_BV = (logits_BV.double() / 0.7).softmax(-1)
        for uniform in (0.0, 2**-53, 0.5, 1 - 2**-24, LARGEST):
            chosen_B = choose(logits_BV, torch.full((5,), uniform, dtype=torch.float64), settings)
            assert probability_BV.gather(1, chosen_B[:, None]).min() > 0, (size, uniform)


@pytest.mark.parametrize(
    "settings",
    [SamplingSettings(1.0), SamplingSettings(1.0, top_k=3), SamplingSettings(1.0, top_p=0.5), SamplingSettings()],
)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_still_give_an_id(settings, value):
    logits_BV = torch.zeros(3, 7)
    logits_BV[0], logits_BV[1, 2] = value, value
    uniform_B = torch.tensor([0.999, 0.999, 0.999], dtype=torch.float64) if settings.temperature else None
    assert all(0 <= token_id < 7 for token_id in choose(logits_BV, uniform_B, settings).tolist())
