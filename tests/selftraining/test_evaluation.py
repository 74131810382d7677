"""Scores against brute force and published values, and what is sampled to get them."""

import statistics
from dataclasses import asdict
from itertools import combinations

import pytest

from minidpost.data.example import Example
from minidpost.sampling.generate import Sample
from minidpost.sampling.sampler import SamplingSettings
from minidpost.selftraining import evaluation
from minidpost.selftraining.evaluation import (
    Score,
    greedy_accuracy,
    greedy_outcomes,
    majority_is_correct,
    mean_score,
    paired_difference,
    pass_at_k,
    percent,
    sampled_scores,
    wilson,
)
from minidpost.text.grading import is_correct

EXAMPLES = [Example("first", "1"), Example("second", "2"), Example("third", "3")]
SETTINGS = SamplingSettings(temperature=0.7, top_k=5, seed=9)


@pytest.fixture
def script(monkeypatch):
    """Replaces the model: every question's samples are those of a dictionary; returns the arguments of the calls."""

    def install(completions: dict[str, list[str]]) -> list[dict]:
        calls = []

        def generate(
            model, template, questions, settings, *, answers, n_samples, calculator, label, first_chunk, chunk_size
        ):
            assert (first_chunk, chunk_size) == (0, None)
            calls.append({"settings": settings, "n_samples": n_samples, "calculator": calculator, "label": label})
            assert answers == [example.answer for example in EXAMPLES if example.question in questions]
            for k in reversed(range(n_samples)):  # in whatever order they end
                for i, question in enumerate(questions):
                    text = completions[question][k]
                    yield Sample(i, k, question, answers[i], text, is_correct(text, answers[i]), [], [], "stop")

        monkeypatch.setattr(evaluation, "generate", generate)
        return calls

    return install


@pytest.mark.parametrize("n", [1, 2, 5, 6])
def test_pass_at_k_is_the_fraction_of_subsets_with_a_correct_sample(n):
    for n_correct in range(n + 1):
        for k in range(1, n + 1):
            subsets = list(combinations(range(n), k))
            fraction = sum(min(subset) < n_correct for subset in subsets) / len(subsets)
            assert pass_at_k(n, n_correct, k) == pytest.approx(fraction, abs=1e-12)


@pytest.mark.parametrize(
    ("completions", "expected"),
    [
        (["#### 5"], True),
        (["#### 4", "#### 5", "#### 5"], True),
        (["#### 5", "#### 4", "#### 4"], False),
        (["#### 5", "#### 4"], True),  # a tie goes to the earliest answer
        (["#### 4", "#### 5"], False),
        (["#### 4", "#### 5", "#### 5", "#### 4"], False),
        (["none", "none", "none", "#### 5"], True),  # what has no answer does not vote
        (["none", "none"], False),
        ([], False),
        (["#### 5.0", "#### 4", "#### $5.00"], True),  # equal numbers are one answer, however they are written
        (["#### 4", "#### 4", "#### 5,000"], False),
    ],
)
def test_majority(completions, expected):
    assert majority_is_correct(completions, "5") is expected


def test_majority_of_large_numbers():
    assert majority_is_correct(["#### 1,000,000,000,000,000,000,000,000"], "1" + 24 * "0")


@pytest.mark.parametrize(
    ("n_correct", "n", "low", "high"),
    [  # Newcombe 1998, table I, method 3
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
        (20, 20, 0.8389, 1.0),
    ],
)
def test_wilson_interval(n_correct, n, low, high):
    score = wilson(n_correct, n)
    assert (score.value, score.n) == (n_correct / n, n)
    assert (score.low, score.high) == pytest.approx((low, high), abs=5e-5)


def test_nothing_is_known_of_no_questions():
    assert wilson(0, 0) == mean_score([]) == Score(0.0, 0, 0.0, 1.0)


def test_mean_and_its_interval():
    score = mean_score([0.2, 0.4, 0.6, 1.0])  # variance 0.35 / 3
    half = 1.96 * (0.35 / 3 / 4) ** 0.5
    assert (score.value, score.n) == (pytest.approx(0.55), 4)
    assert (score.low, score.high) == pytest.approx((0.55 - half, 0.55 + half))
    assert mean_score([0.5, 0.5]) == Score(0.5, 2, 0.5, 0.5)
    assert mean_score([0.9, 1.0, 1.0, 0.2]).high == 1.0


def test_fractions_have_wilsons_interval():
    assert mean_score([1.0, 0.0, 1.0, 1.0]) == wilson(3, 4)
    assert mean_score([0.0] * 20).high == pytest.approx(0.1611, abs=5e-5)


def test_accuracy_is_greedy_whatever_the_settings(script):
    calls = script({"first": ["#### 1"], "second": ["#### 3"], "third": ["3"]})
    assert greedy_accuracy(None, None, EXAMPLES, SETTINGS, calculator=False, label="dev") == wilson(1, 3)
    (call,) = calls
    assert call["settings"] == SamplingSettings(temperature=0.0, top_k=5, seed=9)
    assert (call["n_samples"], call["calculator"], call["label"]) == (1, False, "dev")


def test_greedy_outcomes_stand_in_the_order_of_questions(script):
    calls = script({"first": ["#### 1"], "second": ["#### 3"], "third": ["#### 3"]})
    assert greedy_outcomes(None, None, EXAMPLES, SETTINGS) == [1, 0, 1]
    assert calls[0]["settings"].temperature == 0


def test_pass_and_majority_come_from_the_same_samples(script):
    calls = script(
        {
            "first": ["#### 1", "#### 9", "#### 9", "#### 1"],
            "second": ["#### 9", "#### 9", "#### 9", "#### 2"],
            "third": ["#### 9", "", "#### 3", "#### 3"],
        }
    )
    scores = sampled_scores(None, None, EXAMPLES, SETTINGS, pass_at=(1, 2, 4), maj_at=(1, 3, 4))
    assert len(calls) == 1
    assert (calls[0]["settings"], calls[0]["n_samples"], calls[0]["calculator"]) == (SETTINGS, 4, True)
    assert {k: score.value for k, score in scores.pass_at.items()} == pytest.approx(
        {1: (2 / 4 + 1 / 4 + 2 / 4) / 3, 2: (5 / 6 + 3 / 6 + 5 / 6) / 3, 4: 1.0}
    )
    assert {k: score.value for k, score in scores.maj_at.items()} == pytest.approx({1: 1 / 3, 3: 0.0, 4: 2 / 3})
    assert scores.maj_at[4] == wilson(2, 3)
    assert scores.pass_at[4] == wilson(3, 3)
    # What they are means of, by question.
    assert (scores.n_samples, scores.n_correct) == (4, [2, 1, 2])
    assert scores.majority == {1: [1, 0, 0], 3: [0, 0, 0], 4: [1, 0, 1]}


@pytest.mark.parametrize(("pass_at", "maj_at"), [((1,), (3,)), ((3,), (1,))])
def test_as_many_are_sampled_as_the_largest_k_needs(script, pass_at, maj_at):
    calls = script({"first": ["#### 1"] * 3})
    sampled_scores(None, None, EXAMPLES[:1], SETTINGS, pass_at=pass_at, maj_at=maj_at)
    assert calls[0]["n_samples"] == 3


def test_only_what_is_asked_for_is_scored(script):
    calls = script({"first": ["#### 1"] * 8})
    scores = sampled_scores(None, None, EXAMPLES[:1], SETTINGS, maj_at=(8,))
    assert scores.pass_at == {}
    assert scores.maj_at.keys() == scores.majority.keys() == {8}
    assert calls[0]["n_samples"] == 8


def test_a_difference_is_of_the_same_questions_in_pairs():
    """Questions that are hard or easy for both models add nothing to its interval, unlike to those of the scores."""
    before = [0.0, 0.1, 0.9, 1.0] * 25
    after = [0.2, 0.3, 1.0, 1.0] * 25
    difference = paired_difference(before, after)
    differences = [b - a for a, b in zip(before, after, strict=True)]
    half = 1.96 * statistics.stdev(differences) / 100**0.5
    assert (difference.value, difference.n) == (pytest.approx(0.125), 100)
    assert (difference.low, difference.high) == pytest.approx((0.125 - half, 0.125 + half))
    assert difference.low > 0
    assert mean_score(after).low < mean_score(before).high  # the scores' own intervals overlap


def test_a_difference_may_be_negative_or_nothing():
    worse = paired_difference([1, 1, 0, 1], [0, 1, 0, 0])
    assert (worse.value, worse.n) == (-0.5, 4)
    assert -1.0 <= worse.low < -0.5 < worse.high
    assert paired_difference([0.3, 0.7], [0.3, 0.7]) == Score(0.0, 2, 0.0, 0.0)
    with pytest.raises(ValueError):
        paired_difference([0.3, 0.7], [0.3])


def test_a_score_is_shown_with_its_interval():
    assert percent(asdict(wilson(81, 263))) == "30.8% (25.5–36.6)"
