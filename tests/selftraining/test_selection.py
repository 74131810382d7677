"""The data rules on cases small enough to be worked out by hand; small numbers stand for token ids."""

from itertools import product

import pytest

from minidpost.sampling.generate import Sample
from minidpost.selftraining.selection import (
    Candidates,
    candidates_by_question,
    jaccard,
    preference_pairs,
    pseudo_labels,
    without_near_duplicates,
)
from minidpost.training.batching import TokenizedExample


def sample(example_index: int, token_ids: list[int], is_correct: bool, finish_reason: str = "stop") -> Sample:
    return Sample(example_index, 0, "How?", "1", "So.", is_correct, token_ids, [False], finish_reason)


def unlike(n: int, start: int = 0) -> list[tuple[int, ...]]:
    """Completions that have no id in common."""
    return [(start + i,) for i in range(n)]


def test_candidates_are_the_samples_by_question_and_grade():
    samples = [
        sample(1, [4, 9], True),
        sample(0, [5, 9], False),
        sample(1, [6, 9], True),
        sample(1, [7], True, "length"),  # cut, though correct: neither chosen nor rejected
        sample(0, [8], False, "length"),
    ]
    assert candidates_by_question([None, TokenizedExample((1,), (2, 9))], samples) == [
        Candidates(None, [], [(5, 9), (8,)]),
        Candidates((2, 9), [(4, 9), (6, 9)], []),
    ]


def test_jaccard_of_sets_of_ids():
    assert jaccard(frozenset({1, 2, 3}), frozenset({2, 3, 4, 5})) == pytest.approx(2 / 5)
    assert jaccard(frozenset({1}), frozenset({1})) == 1
    assert jaccard(frozenset({1}), frozenset({2})) == 0
    assert jaccard(frozenset(), frozenset()) == 1


def test_near_duplicates_overlap_by_more_than_0_7():
    ten = tuple(range(10))
    assert without_near_duplicates([ten, ten[:7]]) == [ten, ten[:7]]  # exactly 0.7: both remain
    assert without_near_duplicates([tuple(range(11)), ten[:8]]) == [tuple(range(11))]  # 8 / 11
    assert without_near_duplicates([ten[:8], ten]) == [ten[:8]]  # the earlier one stays


def test_order_and_number_of_ids_make_no_difference():
    assert without_near_duplicates([(1, 2, 3), (3, 2, 1), (1, 1, 2, 3, 3), (1, 2, 3)]) == [(1, 2, 3)]


def test_a_dropped_completion_drops_no_other():
    a, b, c = tuple(range(10)), tuple(range(2, 10)), tuple(range(4, 11))  # b is near a, c near b, c not near a
    assert jaccard(frozenset(b), frozenset(c)) < 0.7 < jaccard(frozenset(a), frozenset(b))
    c = tuple(range(3, 10))
    assert jaccard(frozenset(b), frozenset(c)) > 0.7 >= jaccard(frozenset(a), frozenset(c))
    assert without_near_duplicates([a, b, c]) == [a, c]


def test_the_three_least_similar_pairs():
    gold, correct = (1, 2, 3, 4), (1, 5, 6, 7)
    incorrect = [(1, 2, 3, 8), (5, 6, 9, 10), (2, 11, 12)]
    pairs = preference_pairs(Candidates(gold, [correct], incorrect))
    expected = {
        (correct, incorrect[2]): 0,
        (gold, incorrect[1]): 0,
        (correct, incorrect[0]): 1 / 7,
        (gold, incorrect[2]): 1 / 6,
        (correct, incorrect[1]): 2 / 6,
        (gold, incorrect[0]): 3 / 5,
    }
    assert expected.keys() == set(product([gold, correct], incorrect))
    assert {(chosen, rejected) for chosen, rejected, _ in pairs} == set([*expected][:3])
    assert [similarity for _, _, similarity in pairs] == pytest.approx([0, 0, 1 / 7])


def test_fewer_than_three_pairs_are_all_taken():
    assert preference_pairs(Candidates((1,), [], [(2,), (3,)])) == [((1,), (2,), 0), ((1,), (3,), 0)]


def test_a_pair_needs_chosen_and_rejected():
    assert preference_pairs(Candidates((1,), [(2,)], [])) == []
    assert preference_pairs(Candidates(None, [], [(2,)])) == []


def test_the_gold_rationale_is_always_chosen():
    gold, near = tuple(range(10)), tuple(range(9))
    candidates = Candidates(gold, [near, (50,)], [(60,)])
    assert candidates.chosen() == [gold, (50,)]
    assert {chosen for chosen, _, _ in preference_pairs(candidates)} == {gold, (50,)}


def test_rejected_have_no_near_duplicates_but_may_resemble_chosen():
    ten = tuple(range(10))
    assert preference_pairs(Candidates(ten, [], [ten[:9], ten[:8]])) == [(ten, ten[:9], 0.9)]


def test_equally_similar_pairs_are_in_sample_order():
    pairs = preference_pairs(Candidates(None, unlike(2), unlike(4, start=10)))
    assert [(chosen, rejected) for chosen, rejected, _ in pairs] == [((0,), (10,)), ((0,), (11,)), ((0,), (12,))]


def test_labels_are_gold_then_unlike_correct_samples():
    ten = tuple(range(10))
    questions = [Candidates(ten, [ten[:9], (50,), (50, 50)], [(60,)]), Candidates(None, [(1,)], []), Candidates()]
    assert pseudo_labels(questions, cap=10) == [[ten, (50,)], [(1,)], []]


def test_labels_are_capped_at_the_90th_percentile():
    questions = [Candidates(None, unlike(n)) for n in range(1, 11)]  # counts 1 … 10: the percentile is 9.1
    assert [len(labels) for labels in pseudo_labels(questions)] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    assert pseudo_labels(questions)[-1] == unlike(9)  # the first ones stay


def test_questions_without_labels_do_not_lower_the_cap():
    questions = [Candidates(None, unlike(n)) for n in (0, 0, 0, 0, 0, 0, 4, 9)]  # 8.5 of 4 and 9
    assert [len(labels) for labels in pseudo_labels(questions)] == [0, 0, 0, 0, 0, 0, 4, 8]
    assert pseudo_labels([Candidates(), Candidates()]) == [[], []]


def test_gold_counts_towards_the_cap():
    assert pseudo_labels([Candidates((99,), unlike(5))], cap=3) == [[(99,), (0,), (1,)]]


def test_without_gold_human_rationales_have_no_effect():
    gold = tuple(range(10))
    questions = [Candidates(gold, [gold[:9], gold[:8], (50,)]), Candidates(gold, [gold]), Candidates(gold, [])]
    assert pseudo_labels(questions, cap=10, with_gold=False) == [[gold[:9], (50,)], [gold], []]
