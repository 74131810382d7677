"""From graded samples to training data: near-duplicates, preference pairs (equation 4), pseudo-labels (S_α).

The rules are the paper's where its text gives them and the published code's where only that does: near-duplicates are
completions whose sets of token ids overlap by more than 0.7 (Jaccard); a question's preference pairs are the 3 least
similar (chosen, rejected); a question's pseudo-labels are capped at the 90th percentile of the counts. Departures: gold
rationales and samples are compared and stored as token ids, so nothing is formatted twice; where the published code
shuffled before it chose, the order here is that of the samples, so a choice can be repeated.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from minidpost.sampling.generate import Sample
from minidpost.training.batching import TokenizedExample

MAX_SIMILARITY = 0.7
PAIRS_PER_QUESTION = 3
PERCENTILE = 90

TokenIds = tuple[int, ...]


@dataclass
class Candidates:
    """All rationales of one question, as token ids: the human one and the samples, by whether their answer is correct.

    A sample that was cut by the length limit has no EOS to learn from, so it can be rejected but never chosen.
    """

    gold: TokenIds | None = None
    correct: list[TokenIds] = field(default_factory=list)
    incorrect: list[TokenIds] = field(default_factory=list)

    def add(self, sample: Sample) -> None:
        """Sort a graded sample in; a correct one that was cut is neither correct nor incorrect."""
        token_ids = tuple(sample.token_ids)
        if not sample.is_correct:
            self.incorrect.append(token_ids)
        elif sample.finish_reason == "stop":
            self.correct.append(token_ids)

    def chosen(self) -> list[TokenIds]:
        """What may be preferred: the gold rationale and the correct samples, without near-duplicates."""
        gold = [self.gold] if self.gold is not None else []
        return without_near_duplicates([*gold, *self.correct])

    def rejected(self) -> list[TokenIds]:
        """What may be dispreferred: the incorrect samples, without near-duplicates."""
        return without_near_duplicates(self.incorrect)


class ScoredPair(NamedTuple):
    """y_w and y_l of one question as token ids, and their Jaccard similarity."""

    chosen: TokenIds
    rejected: TokenIds
    similarity: float


def candidates_by_question(gold: Sequence[TokenizedExample | None], samples: Iterable[Sample]) -> list[Candidates]:
    """The candidates of every question, in the order of `gold`, which has None where there is no human rationale.

    A sample's `example_index` is its question's index; samples keep the order in which they come.
    """
    questions = [Candidates(gold=None if example is None else example.target_ids) for example in gold]
    for sample in samples:
        questions[sample.example_index].add(sample)
    return questions


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    """Size of the intersection over size of the union."""
    return len(a & b) / len(a | b) if a or b else 1.0


def without_near_duplicates(completions: Iterable[TokenIds]) -> list[TokenIds]:
    """Each completion that is not too similar to one that remained before it."""
    remaining: dict[TokenIds, frozenset[int]] = {}
    for token_ids in dict.fromkeys(completions):
        distinct_ids = frozenset(token_ids)
        if all(jaccard(distinct_ids, earlier) <= MAX_SIMILARITY for earlier in remaining.values()):
            remaining[token_ids] = distinct_ids
    return list(remaining)


def preference_pairs(candidates: Candidates) -> list[ScoredPair]:
    """The least similar pairs of one question, at most PAIRS_PER_QUESTION; none without a rejected completion."""
    all_rejected = [(rejected, frozenset(rejected)) for rejected in candidates.rejected()]
    pairs = []
    for chosen in candidates.chosen():
        chosen_ids = frozenset(chosen)
        for rejected, rejected_ids in all_rejected:
            pairs.append(ScoredPair(chosen, rejected, jaccard(chosen_ids, rejected_ids)))
    pairs.sort(key=lambda pair: pair.similarity)  # stable: of equally similar pairs the earlier samples' come first
    return pairs[:PAIRS_PER_QUESTION]


def pseudo_labels(
    questions: Sequence[Candidates], cap: int | None = None, with_gold: bool = True
) -> list[list[TokenIds]]:
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
