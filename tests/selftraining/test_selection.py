"""The data rules on cases small enough to be worked out by hand; small numbers stand for token ids."""

from collections.abc import Iterable, Sequence
from itertools import product

import pytest

from minidpost.sampling.generate import Sample
from minidpost.selftraining.selection import (
    Candidates,
    jaccard,
    preference_pairs,
    pseudo_labels,
    without_near_duplicates,
)
from minidpost.training.batching import TokenizedExample

PROMPT = (7, 8)  # of every question here
Ids = tuple[int, ...]


def rationale(ids: Iterable[int]) -> TokenizedExample:
    return TokenizedExample(PROMPT, tuple(ids))


def candidates(gold: Ids | None = None, correct: Sequence[Ids] = (), incorrect: Sequence[Ids] = ()) -> Candidates:
    """The candidates of a question, by the ids of their rationales."""
    labelled = None if gold is None else rationale(gold)
    return Candidates(PROMPT, labelled, [*map(rationale, correct)], [*map(rationale, incorrect)])


def pairs_of(known: Candidates) -> list[tuple[Ids, Ids, float]]:
    """Preference pairs as ids, with their similarity; their prompt is the question's."""
    pairs = preference_pairs(known)
    assert {side.prompt_ids for pair in pairs for side in pair.sequences} <= {PROMPT}
    return [(pair.chosen.target_ids, pair.rejected.target_ids, jaccard(pair.chosen, pair.rejected)) for pair in pairs]


def labels_of(questions: Sequence[Candidates], cap: int | None = None, with_gold: bool = True) -> list[list[Ids]]:
    """Pseudo-labels as ids."""
    return [[label.target_ids for label in labels] for labels in pseudo_labels(questions, cap, with_gold)]


def remaining(rationales: Iterable[Ids]) -> list[Ids]:
    """What is no near-duplicate, as ids."""
    return [example.target_ids for example in without_near_duplicates(map(rationale, rationales))]


def similarity(a: Iterable[int], b: Iterable[int]) -> float:
    return jaccard(rationale(a), rationale(b))


def sample(token_ids: list[int], is_correct: bool, finish_reason: str = "stop") -> Sample:
    return Sample(0, 0, "How?", "1", "So.", is_correct, token_ids, [False], finish_reason)


def unlike(n: int, start: int = 0) -> list[Ids]:
    """Completions that have no id in common."""
    return [(start + i,) for i in range(n)]


def test_candidates_are_the_samples_by_grade():
    known = candidates((2, 9))
    known.add(sample([4, 9], True))
    known.add(sample([5, 9], False))
    known.add(sample([6, 9], True))
    known.add(sample([7], True, "length"))  # cut, though correct: neither chosen nor rejected
    known.add(sample([8], False, "length"))
    assert known == candidates((2, 9), [(4, 9), (6, 9)], [(5, 9), (8,)])


def test_jaccard_of_sets_of_ids():
    assert similarity({1, 2, 3}, {2, 3, 4, 5}) == pytest.approx(2 / 5)
    assert similarity({1}, {1}) == 1
    assert similarity({1}, {2}) == 0
    assert similarity((), ()) == 1


def test_near_duplicates_overlap_by_more_than_0_7():
    ten = tuple(range(10))
    assert remaining([ten, ten[:7]]) == [ten, ten[:7]]  # exactly 0.7: both remain
    assert remaining([tuple(range(11)), ten[:8]]) == [tuple(range(11))]  # 8 / 11
    assert remaining([ten[:8], ten]) == [ten[:8]]  # the earlier one stays


def test_order_and_number_of_ids_make_no_difference():
    assert remaining([(1, 2, 3), (3, 2, 1), (1, 1, 2, 3, 3), (1, 2, 3)]) == [(1, 2, 3)]


def test_a_dropped_completion_drops_no_other():
    a, b, c = tuple(range(10)), tuple(range(2, 10)), tuple(range(4, 11))  # b is near a, c near b, c not near a
    assert similarity(b, c) < 0.7 < similarity(a, b)
    c = tuple(range(3, 10))
    assert similarity(b, c) > 0.7 >= similarity(a, c)
    assert remaining([a, b, c]) == [a, c]


def test_the_three_least_similar_pairs():
    gold, correct = (1, 2, 3, 4), (1, 5, 6, 7)
    incorrect = [(1, 2, 3, 8), (5, 6, 9, 10), (2, 11, 12)]
    pairs = pairs_of(candidates(gold, [correct], incorrect))
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
    assert pairs_of(candidates((1,), [], [(2,), (3,)])) == [((1,), (2,), 0), ((1,), (3,), 0)]


def test_a_pair_needs_chosen_and_rejected():
    assert pairs_of(candidates((1,), [(2,)], [])) == []
    assert pairs_of(candidates(None, [], [(2,)])) == []


def test_the_gold_rationale_is_always_chosen():
    gold, near = tuple(range(10)), tuple(range(9))
    known = candidates(gold, [near, (50,)], [(60,)])
    assert [rationale.target_ids for rationale in known.chosen()] == [gold, (50,)]
    assert {chosen for chosen, _, _ in pairs_of(known)} == {gold, (50,)}


def test_rejected_have_no_near_duplicates_but_may_resemble_chosen():
    ten = tuple(range(10))
    assert pairs_of(candidates(ten, [], [ten[:9], ten[:8]])) == [(ten, ten[:9], 0.9)]


def test_equally_similar_pairs_are_in_sample_order():
    pairs = pairs_of(candidates(None, unlike(2), unlike(4, start=10)))
    assert [(chosen, rejected) for chosen, rejected, _ in pairs] == [((0,), (10,)), ((0,), (11,)), ((0,), (12,))]


def test_labels_are_gold_then_unlike_correct_samples():
    ten = tuple(range(10))
    questions = [candidates(ten, [ten[:9], (50,), (50, 50)], [(60,)]), candidates(None, [(1,)], []), candidates()]
    assert labels_of(questions, cap=10) == [[ten, (50,)], [(1,)], []]


def test_labels_are_capped_at_the_90th_percentile():
    questions = [candidates(None, unlike(n)) for n in range(1, 11)]  # counts 1 … 10: the percentile is 9.1
    assert [len(labels) for labels in labels_of(questions)] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    assert labels_of(questions)[-1] == unlike(9)  # the first ones stay


def test_questions_without_labels_do_not_lower_the_cap():
    questions = [candidates(None, unlike(n)) for n in (0, 0, 0, 0, 0, 0, 4, 9)]  # 8.5 of 4 and 9
    assert [len(labels) for labels in labels_of(questions)] == [0, 0, 0, 0, 0, 0, 4, 8]
    assert labels_of([candidates(), candidates()]) == [[], []]


def test_gold_counts_towards_the_cap():
    assert labels_of([candidates((99,), unlike(5))], cap=3) == [[(99,), (0,), (1,)]]


def test_without_gold_human_rationales_have_no_effect():
    gold = tuple(range(10))
    questions = [candidates(gold, [gold[:9], gold[:8], (50,)]), candidates(gold, [gold]), candidates(gold, [])]
    assert labels_of(questions, cap=10, with_gold=False) == [[gold[:9], (50,)], [gold], []]
