"""The data rules on cases small enough to be worked out by hand; ids stand for tokenizer pieces."""

from itertools import product

import pytest

from minidpost.selftraining.selection import (
    Candidates,
    jaccard,
    preference_pairs,
    pseudo_labels,
    without_near_duplicates,
)


def unlike(n: int, start: int = 0) -> list[tuple[int, ...]]:
    """Completions that have no piece in common."""
    return [(start + i,) for i in range(n)]


def test_jaccard_of_sets_of_pieces():
    assert jaccard(frozenset({1, 2, 3}), frozenset({2, 3, 4, 5})) == pytest.approx(2 / 5)
    assert jaccard(frozenset({1}), frozenset({1})) == 1
    assert jaccard(frozenset({1}), frozenset({2})) == 0
    assert jaccard(frozenset(), frozenset()) == 1


def test_near_duplicates_overlap_by_more_than_seven_tenths():
    ten = tuple(range(10))
    assert without_near_duplicates([ten, ten[:7]]) == [ten, ten[:7]]  # exactly 0.7: kept
    assert without_near_duplicates([tuple(range(11)), ten[:8]]) == [tuple(range(11))]  # 8 / 11
    assert without_near_duplicates([ten[:8], ten]) == [ten[:8]]  # the earlier one stays


def test_neither_order_nor_number_of_pieces_makes_a_difference():
    assert without_near_duplicates([(1, 2, 3), (3, 2, 1), (1, 1, 2, 3, 3), (1, 2, 3)]) == [(1, 2, 3)]


def test_what_was_dropped_drops_nothing():
    a, b, c = tuple(range(10)), tuple(range(2, 10)), tuple(range(4, 11))  # b is near a, c near b, c not near a
    assert jaccard(frozenset(b), frozenset(c)) < 0.7 < jaccard(frozenset(a), frozenset(b))
    c = tuple(range(3, 10))
    assert jaccard(frozenset(b), frozenset(c)) > 0.7 >= jaccard(frozenset(a), frozenset(c))
    assert without_near_duplicates([a, b, c]) == [a, c]


def test_the_three_least_similar_pairs():
    gold, right, wrong = (1, 2, 3, 4), (1, 5, 6, 7), [(1, 2, 3, 8), (5, 6, 9, 10), (2, 11, 12)]
    pairs = preference_pairs(Candidates(gold, [right], wrong))
    expected = {
        (right, wrong[2]): 0,
        (gold, wrong[1]): 0,
        (right, wrong[0]): 1 / 7,
        (gold, wrong[2]): 1 / 6,
        (right, wrong[1]): 2 / 6,
        (gold, wrong[0]): 3 / 5,
    }
    assert expected.keys() == set(product([gold, right], wrong))
    assert {(winner, loser) for winner, loser, _ in pairs} == set([*expected][:3])
    assert [similarity for _, _, similarity in pairs] == pytest.approx([0, 0, 1 / 7])


def test_fewer_than_three_pairs_are_all_taken():
    assert preference_pairs(Candidates((1,), [], [(2,), (3,)])) == [((1,), (2,), 0), ((1,), (3,), 0)]


def test_no_pair_without_a_loser_or_a_winner():
    assert preference_pairs(Candidates((1,), [(2,)], [])) == []
    assert preference_pairs(Candidates(None, [], [(2,)])) == []


def test_the_gold_rationale_always_wins():
    gold, near = tuple(range(10)), tuple(range(9))
    candidates = Candidates(gold, [near, (50,)], [(60,)])
    assert candidates.winners() == [gold, (50,)]
    assert {winner for winner, _, _ in preference_pairs(candidates)} == {gold, (50,)}


def test_losers_are_without_near_duplicates_and_may_resemble_winners():
    ten = tuple(range(10))
    assert preference_pairs(Candidates(ten, [], [ten[:9], ten[:8]])) == [(ten, ten[:9], 0.9)]


def test_equally_similar_pairs_keep_the_order_of_the_samples():
    pairs = preference_pairs(Candidates(None, unlike(2), unlike(4, start=10)))
    assert [(winner, loser) for winner, loser, _ in pairs] == [((0,), (10,)), ((0,), (11,)), ((0,), (12,))]


def test_labels_are_gold_first_then_right_samples_unlike_those_before():
    ten = tuple(range(10))
    questions = [Candidates(ten, [ten[:9], (50,), (50, 50)], [(60,)]), Candidates(None, [(1,)], []), Candidates()]
    assert pseudo_labels(questions, cap=10) == [[ten, (50,)], [(1,)], []]


def test_labels_are_capped_at_the_ninetieth_percentile_of_the_counts():
    questions = [Candidates(None, unlike(n)) for n in range(1, 11)]  # counts 1 … 10: the percentile is 9.1
    assert [len(labels) for labels in pseudo_labels(questions)] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    assert pseudo_labels(questions)[-1] == unlike(9)  # the first ones stay


def test_questions_without_a_label_do_not_lower_the_cap():
    questions = [Candidates(None, unlike(n)) for n in (0, 0, 0, 0, 0, 0, 4, 9)]  # 8.5 of 4 and 9
    assert [len(labels) for labels in pseudo_labels(questions)] == [0, 0, 0, 0, 0, 0, 4, 8]
    assert pseudo_labels([Candidates(), Candidates()]) == [[], []]


def test_gold_counts_towards_the_cap():
    assert pseudo_labels([Candidates((99,), unlike(5))], cap=3) == [[(99,), (0,), (1,)]]


def test_without_gold_human_rationales_neither_enter_nor_exclude():
    gold = tuple(range(10))
    questions = [Candidates(gold, [gold[:9], gold[:8], (50,)]), Candidates(gold, [gold]), Candidates(gold, [])]
    assert pseudo_labels(questions, cap=10, with_gold=False) == [[gold[:9], (50,)], [gold], []]
