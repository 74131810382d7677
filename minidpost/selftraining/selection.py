"""From graded samples to training data: near-duplicates, preference pairs, pseudo-labels.

The rules are the paper's where its text gives them and the published code's where only that does: near-duplicates are
completions whose sets of tokenizer pieces overlap by more than 0.7 (Jaccard); a question's preference pairs are the 3
least similar (winner, loser); a question's pseudo-labels are capped at the 90th percentile of the counts. Departures:
gold rationales and samples are compared and kept as token ids, so nothing is formatted twice; where the published code
shuffled before it chose, the order here is that of the samples, so a choice can be repeated.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

MAX_SIMILARITY = 0.7
PAIRS_A_QUESTION = 3
PERCENTILE = 90

Ids = tuple[int, ...]


@dataclass
class Candidates:
    """All that is known of one question's rationales, as token ids: the human one first among the right ones."""

    gold: Ids | None = None
    right: list[Ids] = field(default_factory=list)
    wrong: list[Ids] = field(default_factory=list)

    def winners(self) -> list[Ids]:
        """The gold rationale and the right samples, without near-duplicates."""
        return without_near_duplicates([*([self.gold] if self.gold else []), *self.right])

    def losers(self) -> list[Ids]:
        """The wrong samples, without near-duplicates."""
        return without_near_duplicates(self.wrong)


def jaccard(a: frozenset[int], b: frozenset[int]) -> float:
    """Size of the intersection over size of the union."""
    return len(a & b) / len(a | b) if a or b else 1.0


def without_near_duplicates(completions: Iterable[Ids]) -> list[Ids]:
    """Keep each completion that is not too similar to one kept before it."""
    kept: list[tuple[Ids, frozenset[int]]] = []
    for ids in dict.fromkeys(completions):
        pieces = frozenset(ids)
        if all(jaccard(pieces, other) <= MAX_SIMILARITY for _, other in kept):
            kept.append((ids, pieces))
    return [ids for ids, _ in kept]


def preference_pairs(candidates: Candidates) -> list[tuple[Ids, Ids, float]]:
    """The least similar (winner, loser, Jaccard) of one question, at most PAIRS_A_QUESTION; none without a loser."""
    losers = [(ids, frozenset(ids)) for ids in candidates.losers()]
    pairs = [
        (winner, loser, jaccard(frozenset(winner), pieces))
        for winner in candidates.winners()
        for loser, pieces in losers
    ]
    return sorted(pairs, key=lambda pair: pair[2])[:PAIRS_A_QUESTION]


def pseudo_labels(questions: Sequence[Candidates], cap: int | None = None, with_gold: bool = True) -> list[list[Ids]]:
    """The rationales to fine-tune on, a list for each question: gold first, then right samples unlike those before.

    `cap` bounds the number a question; None takes the 90th percentile of the counts. Without gold (ReST-EM), human
    rationales neither enter nor count.
    """
    kept = [question.winners() if with_gold else without_near_duplicates(question.right) for question in questions]
    counts = [len(labels) for labels in kept if labels]
    if cap is None and counts:
        cap = int(np.percentile(counts, PERCENTILE))
    return [labels[:cap] for labels in kept]
