"""The data rules on cases small enough to be worked out by hand; small numbers stand for token ids."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product

import pytest

from minidpost.sampling.generate import Sample
from minidpost.selftraining.methods import METHODS, Method
from minidpost.selftraining.presets import T5, Preset
from minidpost.selftraining.selection import (
    Candidates,
    equations,
    has_right_calculations,
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


def written(*texts: str, gold: Ids | None = None) -> Candidates:
    """The candidates of a question with correct samples of these texts, of which equal ones have equal ids."""
    known = candidates(gold)
    for text in texts:
        known.add(sample([*map(ord, text)], True, completion=text))
    return known


def pairs_of(
    known: Candidates, max_similarity: float = T5.max_similarity, pairs_per_question: int = T5.pairs_per_question
) -> list[tuple[Ids, Ids, float]]:
    """Preference pairs as ids, with their similarity; their prompt is the question's."""
    pairs = preference_pairs(known, max_similarity=max_similarity, pairs_per_question=pairs_per_question)
    assert {side.prompt_ids for pair in pairs for side in pair.sequences} <= {PROMPT}
    return [(pair.chosen.target_ids, pair.rejected.target_ids, jaccard(pair.chosen, pair.rejected)) for pair in pairs]


def settings(method: str, **changes) -> Preset:
    """T5's preset as a method changes it."""
    return replace(T5, **{**METHODS[method].settings, **changes})


def labels_of(questions: Sequence[Candidates], method: str = "st", seed: int = 0, **changes) -> list[list[Ids]]:
    """Pseudo-labels as ids, by a method's rules and numbers but for those that are given."""
    labels = pseudo_labels(questions, METHODS[method], settings(method, **changes), seed=seed)
    return [[label.target_ids for label in of_question] for of_question in labels]


def texts_of(known: Candidates, method: str) -> list[str]:
    """The texts of one question's pseudo-labels, as `written` made them."""
    (ids,) = labels_of([known], method)
    return ["".join(map(chr, label)) for label in ids]


def remaining(rationales: Iterable[Ids], max_similarity: float = T5.max_similarity) -> list[Ids]:
    """What is no near-duplicate, as ids."""
    return [example.target_ids for example in without_near_duplicates(map(rationale, rationales), max_similarity)]


def similarity(a: Iterable[int], b: Iterable[int]) -> float:
    return jaccard(rationale(a), rationale(b))


def sample(token_ids: list[int], is_correct: bool, finish_reason: str = "stop", *, completion: str = "So.") -> Sample:
    return Sample(0, 0, "How?", "1", completion, is_correct, token_ids, [False], finish_reason)


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
    assert known.completions == dict.fromkeys(known.correct, "So.")


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


def test_the_near_duplicate_limit_is_a_setting():
    ten = tuple(range(10))
    assert remaining([ten, ten[:9], ten[:6]], max_similarity=0.95) == [ten, ten[:9], ten[:6]]
    assert remaining([ten, ten[:9], ten[:6]], max_similarity=0.5) == [ten]
    assert remaining([ten, (50,), (50,)], max_similarity=1) == [ten, (50,)]  # equal ones go in any case
    assert pairs_of(candidates(ten, [], [(60,), (60, 61)]), max_similarity=0.4) == [(ten, (60,), 0)]
    known = [candidates(ten, [ten[:9]])]
    assert labels_of(known, max_similarity=0.95) == [[ten, ten[:9]]]


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


def test_the_number_of_pairs_is_a_setting():
    known = candidates((1,), [], unlike(9, start=10))
    assert [len(pairs_of(known, pairs_per_question=n)) for n in (1, 5, 100)] == [1, 5, 9]


def test_a_pair_needs_chosen_and_rejected():
    assert pairs_of(candidates((1,), [(2,)], [])) == []
    assert pairs_of(candidates(None, [], [(2,)])) == []


def test_the_gold_rationale_is_always_chosen():
    gold, near = tuple(range(10)), tuple(range(9))
    known = candidates(gold, [near, (50,)], [(60,)])
    assert [rationale.target_ids for rationale in known.gold_and_correct()] == [gold, near, (50,)]
    assert {chosen for chosen, _, _ in pairs_of(known)} == {gold, (50,)}


def test_rejected_have_no_near_duplicates_but_may_resemble_chosen():
    ten = tuple(range(10))
    assert pairs_of(candidates(ten, [], [ten[:9], ten[:8]])) == [(ten, ten[:9], 0.9)]


def test_equally_similar_pairs_are_in_sample_order():
    pairs = pairs_of(candidates(None, unlike(2), unlike(4, start=10)))
    assert [(chosen, rejected) for chosen, rejected, _ in pairs] == [((0,), (10,)), ((0,), (11,)), ((0,), (12,))]


# -- st and dpo-st ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["st", "dpo-st"])
def test_labels_are_gold_then_unlike_correct_samples(method):
    ten = tuple(range(10))
    questions = [candidates(ten, [ten[:9], (50,), (50, 50)], [(60,)]), candidates(None, [(1,)], []), candidates()]
    assert labels_of(questions, method, label_percentile=None) == [[ten, (50,)], [(1,)], []]


def test_labels_are_capped_at_the_90th_percentile():
    questions = [candidates(None, unlike(n)) for n in range(1, 11)]  # counts 1 … 10: the percentile is 9.1
    assert [len(labels) for labels in labels_of(questions)] == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9]
    assert labels_of(questions)[-1] == unlike(9)  # the first ones stay
    assert [len(labels) for labels in labels_of(questions, label_percentile=50)] == [1, 2, 3, 4, *[5] * 6]  # of 5.5
    assert [len(labels) for labels in labels_of(questions, label_percentile=None)] == [*range(1, 11)]


def test_of_two_caps_the_smaller_counts():
    questions = [candidates(None, unlike(n)) for n in range(1, 11)]
    assert max(len(labels) for labels in labels_of(questions, label_cap=4)) == 4
    assert max(len(labels) for labels in labels_of(questions, label_cap=20)) == 9
    assert max(len(labels) for labels in labels_of(questions, label_cap=20, label_percentile=None)) == 10


def test_questions_without_labels_do_not_lower_the_cap():
    questions = [candidates(None, unlike(n)) for n in (0, 0, 0, 0, 0, 0, 4, 9)]  # 8.5 of 4 and 9
    assert [len(labels) for labels in labels_of(questions)] == [0, 0, 0, 0, 0, 0, 4, 8]
    assert labels_of([candidates(), candidates()]) == [[], []]


def test_gold_counts_towards_the_cap():
    assert labels_of([candidates((99,), unlike(5))], label_cap=3) == [[(99,), (0,), (1,)]]


# -- rft --------------------------------------------------------------------------------------------------------------


def test_equations_are_the_annotations_without_spaces():
    assert equations("He has <<48/2=24>>24, <<48 + 24 = 72>>72.\n#### 72") == ("48/2=24", "48+24=72")
    assert equations("He has 48/2 = 24.\n#### 24") == ()


@pytest.mark.parametrize(
    ("completion", "is_right"),
    [
        ("No equation.\n#### 3", True),
        ("<<1+2=3>>3 and <<3*4=12>>12", True),
        ("<<1+2=3>>3 and <<3*4=13>>13", False),
        ("<<10/3=3.33>>3.33", True),  # as the calculator prints it
        ("<<10/3=3.3333>>3.3333", True),  # the same to two decimals
        ("<<10/3=3.3>>3.3", False),
        ("<<1,000*2=2,000.00>>2000", True),
        ("<<2x+1=3>>3", False),  # no arithmetic
        ("<<1/0=0>>0", False),
        ("<<3>>3", False),
        ("<<1+2=>>", False),
    ],
)
def test_calculations_are_done_again(completion, is_right):
    assert has_right_calculations(completion) is is_right


def test_rft_has_each_list_of_equations_once():
    first, rephrased = "Tom: <<3+4=7>>7", "In all it is < 3 + 4 = 7 > 7".replace("<", "<<").replace(">", ">>")
    exchanged = "Tom: <<4+3=7>>7"  # the same letters in another order: a near-duplicate
    two, reversed_two = "Tom: <<3+4=7>>7 <<7+0=7>>7", "Tom: <<7+0=7>>7 <<3+4=7>>7"
    known = written(first, rephrased, exchanged, two, reversed_two, first)
    assert texts_of(known, "rft") == [first, exchanged, two, reversed_two]
    assert texts_of(known, "st") == [first, rephrased]


def test_rft_leaves_out_wrong_calculations():
    right, wrong = "Tom: <<3+4=7>>7", "So <<5+5=11>>11, so <<3+4=7>>7"
    assert texts_of(written(wrong, right), "rft") == [right]
    assert wrong in texts_of(written(wrong, right), "rest-em")


def test_rft_has_no_cap():
    questions = [written(*(f"<<1+{i}={1 + i}>>" for i in range(n))) for n in [1] * 20 + [12]]
    assert [len(labels) for labels in labels_of(questions, "rft")] == [1] * 20 + [12]


def test_rft_adds_gold_whatever_its_equations():
    text = "Tom: <<3+4=7>>7"
    gold = tuple(map(ord, text))
    known = written(text, "Tom: <<3+4=7>>7!", gold=gold)
    labels = pseudo_labels([known], METHODS["rft"], settings("rft"))[0]
    assert [label.target_ids for label in labels] == [gold, gold]
    assert labels[0] is known.gold is not labels[1]  # which is a sample that happens to be equal


# -- rest-em ----------------------------------------------------------------------------------------------------------


def test_without_gold_human_rationales_have_no_effect():
    gold = tuple(range(10))
    questions = [candidates(gold, [gold[:9], gold[:8], (50,)]), candidates(gold, [gold]), candidates(gold, [])]
    assert labels_of(questions, "rest-em") == [[gold[:9], gold[:8], (50,)], [gold], []]


def test_rest_em_has_near_duplicates_but_no_duplicates():
    ten = tuple(range(10))
    known = candidates(None, [ten, ten[:9], ten, ten[::-1], ten[:9]])
    assert labels_of([known], "rest-em") == [[ten, ten[:9], ten[::-1]]]


def test_rest_em_takes_ten_of_a_question():
    thirty = unlike(30)
    questions = [candidates(None, thirty), candidates(None, thirty), candidates(None, thirty[:10])]
    first, second, few = labels_of(questions, "rest-em", seed=1)
    assert len(first) == len(second) == 10
    assert first == sorted(first) != thirty[:10]  # as sampled, but not simply the first ten
    assert first != second  # each question has random numbers of its own
    assert few == thirty[:10]
    assert labels_of(questions, "rest-em", seed=1) == [first, second, few]
    assert labels_of(questions, "rest-em", seed=2)[0] not in (first, second)


def test_what_is_drawn_does_not_depend_on_other_questions():
    thirty = candidates(None, unlike(30))
    alone = labels_of([candidates(), thirty], "rest-em", seed=1)[1]
    assert labels_of([candidates(None, unlike(99)), thirty, thirty], "rest-em", seed=1)[1] == alone


def test_each_sample_is_drawn_as_often():
    known = [candidates(None, unlike(30))] * 300
    counts = [0] * 30
    for of_question in labels_of(known, "rest-em"):
        for (index,) in of_question:
            counts[index] += 1
    assert 70 <= min(counts) and max(counts) <= 130  # 100 expected, with a standard deviation of 8


# -- the table --------------------------------------------------------------------------------------------------------


def test_the_rules_of_a_method_are_data():
    """A method that nobody has named yet: st's labels, but no human rationales, and drawn at random."""
    method = Method(has_gold=False, is_cap_random=True)
    known = candidates((99,), [*unlike(30), *unlike(30)])
    (labels,) = pseudo_labels([known], method, replace(T5, label_cap=5))
    assert len({label.target_ids for label in labels}) == 5
    assert (99,) not in {label.target_ids for label in labels}
