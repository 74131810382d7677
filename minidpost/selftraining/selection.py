"""From graded samples to training data: near-duplicates, preference pairs (equation 4), pseudo-labels (S_α).

The rules are the paper's where its text gives them and the published code's where only that does: near-duplicates are
completions whose sets of token ids overlap by more than 0.7 (Jaccard); a question's preference pairs are the 3 least
similar (chosen, rejected); a question's pseudo-labels are capped at the 90th percentile of the counts. Departures: gold
rationales and samples are compared and stored as token ids, so nothing is formatted twice; where the published code
shuffled before it chose, the order here is gold, then the samples as they were added (the newest iteration's first), so
a choice can be repeated.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from minidpost.sampling.generate import Sample
from minidpost.training.batching import TokenizedExample
from minidpost.training.dpo import PreferencePair

MAX_SIMILARITY = 0.7  # [paper] section 4.2
PAIRS_PER_QUESTION = 3  # [code]
PERCENTILE = 90  # [code]


@dataclass
class Candidates:
    """All rationales of one question: the human one and the samples, by whether their answer is correct.

    A sample that was cut by the length limit has no EOS to learn from, so it can be rejected but never chosen.
    """

    prompt_ids: tuple[int, ...]
    gold: TokenizedExample | None = None
    correct: list[TokenizedExample] = field(default_factory=list)
    incorrect: list[TokenizedExample] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        """Sort a graded sample in; a correct one that was cut is neither correct nor incorrect."""
        example = TokenizedExample(self.prompt_ids, tuple(sample.token_ids))
        if not sample.is_correct:
            self.incorrect.append(example)
        elif sample.finish_reason == "stop":
            self.correct.append(example)

    def chosen(self) -> list[TokenizedExample]:
        """What may be preferred: the gold rationale and the correct samples, without near-duplicates."""
        gold = [self.gold] if self.gold is not None else []
        return without_near_duplicates([*gold, *self.correct])

    def rejected(self) -> list[TokenizedExample]:
        """What may be dispreferred: the incorrect samples, without near-duplicates."""
        return without_near_duplicates(self.incorrect)


def jaccard(a: TokenizedExample, b: TokenizedExample) -> float:
    """The similarity of two rationales as sets of token ids: size of the intersection over size of the union."""
    a_ids = a.distinct_target_ids
    b_ids = b.distinct_target_ids
    return len(a_ids & b_ids) / len(a_ids | b_ids) if a_ids or b_ids else 1.0


def without_near_duplicates(rationales: Iterable[TokenizedExample]) -> list[TokenizedExample]:
    """Each rationale that is not too similar to one that remained before it."""
    remaining: list[TokenizedExample] = []
    for rationale in dict.fromkeys(rationales):
        if all(jaccard(rationale, earlier) <= MAX_SIMILARITY for earlier in remaining):
            remaining.append(rationale)
    return remaining


def preference_pairs(candidates: Candidates) -> list[PreferencePair]:
    """The least similar pairs of one question (equation 4), at most PAIRS_PER_QUESTION; none without a rejected one."""
    pairs = [PreferencePair(chosen, rejected) for chosen in candidates.chosen() for rejected in candidates.rejected()]
    pairs.sort(key=lambda pair: jaccard(pair.chosen, pair.rejected))  # stable: of equal ones those added first
    return pairs[:PAIRS_PER_QUESTION]


def pseudo_labels(
    questions: Sequence[Candidates], cap: int | None = None, with_gold: bool = True
) -> list[list[TokenizedExample]]:
    """The rationales to fine-tune on, a list for each question: gold first, then correct samples unlike those before.

    `cap` is the most a question can have; None takes the 90th percentile of the counts. Without gold (ReST-EM), human
    rationales neither enter nor count.
    """
    labels = []
    for candidates in questions:
        labels.append(candidates.chosen() if with_gold else without_near_duplicates(candidates.correct))
    counts = [len(of_question) for of_question in labels if of_question]
    if cap is None and counts:
        cap = int(np.percentile(counts, PERCENTILE))
    return [of_question[:cap] for of_question in labels]
