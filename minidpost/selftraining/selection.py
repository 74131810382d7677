"""From graded samples to training data: near-duplicates, preference pairs (equation 4), pseudo-labels (S_α).

The rules are the paper's where its text gives them and the published code's where only that does: near-duplicates are
completions whose sets of token ids overlap by more than 0.7 (Jaccard); a question's preference pairs are the 3 least
similar (chosen, rejected); a question's pseudo-labels are capped at the 90th percentile of the counts. The numbers are
in presets.py, what other methods do instead in methods.py.

Departures from the published code, all [ours]:

- Gold rationales and samples are compared and stored as token ids, so nothing is formatted twice.
- These ids include EOS, which the published sets of pieces lack: 28 of 40 pieces in common, 0.700, are 29 of 41 here,
  0.707, which is above the limit. The default run has 2 to 3 % fewer preference pairs by that, and the same
  pseudo-labels.
- Of near-duplicates the first one stays, and under the cap the first ones. First is gold in both. Then the published
  code goes through the texts of all iterations in alphabetical order, and breaks ties between pairs by a seeded
  shuffle; here it is the samples as they were added, the newest iteration's first. Which pairs and labels are taken
  differs by that, how many hardly does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from random import Random

import numpy as np

from minidpost.sampling.generate import Sample
from minidpost.selftraining.methods import Method
from minidpost.selftraining.presets import Preset
from minidpost.text.calculator import evaluate_expression
from minidpost.text.templates import ANNOTATION
from minidpost.training.batching import TokenizedExample
from minidpost.training.dpo import PreferencePair
from minidpost.training.optim import derived_seed


@dataclass
class Candidates:
    """All rationales of one question: the human one and the samples, by whether their answer is correct.

    A sample that was cut by the length limit has no EOS to learn from, so it can be rejected but never chosen.
    """

    prompt_ids: tuple[int, ...]
    gold: TokenizedExample | None = None
    correct: list[TokenizedExample] = field(default_factory=list)
    incorrect: list[TokenizedExample] = field(default_factory=list)
    # The text of each correct sample, in GSM8K's form: the same ids always stand for the same text.
    completions: dict[TokenizedExample, str] = field(default_factory=dict, repr=False, compare=False)

    def add(self, sample: Sample) -> None:
        """Sort a graded sample in; a correct one that was cut is neither correct nor incorrect."""
        example = TokenizedExample(self.prompt_ids, tuple(sample.token_ids))
        if not sample.is_correct:
            self.incorrect.append(example)
        elif sample.finish_reason == "stop":
            self.correct.append(example)
            self.completions[example] = sample.completion

    def gold_and_correct(self) -> list[TokenizedExample]:
        """The human rationale, where there is one, and the correct samples."""
        return self.correct if self.gold is None else [self.gold, *self.correct]


# -- duplicates -------------------------------------------------------------------------------------------------------


def jaccard(a: TokenizedExample, b: TokenizedExample) -> float:
    """The similarity of two rationales as sets of token ids: size of the intersection over size of the union."""
    a_ids = a.distinct_target_ids
    b_ids = b.distinct_target_ids
    return len(a_ids & b_ids) / len(a_ids | b_ids) if a_ids or b_ids else 1.0


def without_near_duplicates(rationales: Iterable[TokenizedExample], max_similarity: float) -> list[TokenizedExample]:
    """Each rationale that is not more similar than `max_similarity` to one that remained before it (DPO-ST, 4.2)."""
    remaining: list[TokenizedExample] = []
    for rationale in dict.fromkeys(rationales):
        if all(jaccard(rationale, earlier) <= max_similarity for earlier in remaining):
            remaining.append(rationale)
    return remaining


def equations(completion: str) -> tuple[str, ...]:
    """The calculator annotations of a rationale in their order, without spaces: ("48/2=24", "48+24=72").

    By such lists RFT tells rationales apart, whatever words surround them; `3+4=7` and `4+3=7` are two equations, and
    another order is another list (Yuan et al. 2023, section 3.3).
    """
    return tuple("".join(annotation.split()) for annotation in ANNOTATION.findall(completion))


def has_right_calculations(completion: str) -> bool:
    """Whether both sides of each equation of a rationale have one value, to two decimals, as the calculator prints it.

    What the calculator cannot evaluate counts as wrong, an annotation without `=` included, as in RFT's code.
    """
    for equation in equations(completion):
        left, _, right = equation.partition("=")
        value = evaluate_expression(left)
        if value is None or value != evaluate_expression(right):
            return False
    return True


# -- preference pairs -------------------------------------------------------------------------------------------------


def preference_pairs(candidates: Candidates, *, max_similarity: float, pairs_per_question: int) -> list[PreferencePair]:
    """The least similar pairs of one question (equation 4), at most `pairs_per_question`; none without a rejected one.

    Chosen are the human rationale and correct samples, rejected the incorrect ones, each without near-duplicates.
    """
    all_chosen = without_near_duplicates(candidates.gold_and_correct(), max_similarity)
    all_rejected = without_near_duplicates(candidates.incorrect, max_similarity)
    pairs = [PreferencePair(chosen, rejected) for chosen in all_chosen for rejected in all_rejected]
    pairs.sort(key=lambda pair: jaccard(pair.chosen, pair.rejected))  # stable: of equal ones those added first
    return pairs[:pairs_per_question]


# -- pseudo-labels ----------------------------------------------------------------------------------------------------


def pseudo_labels(
    questions: Sequence[Candidates], method: Method, preset: Preset, *, seed: int = 0
) -> list[list[TokenizedExample]]:
    """The rationales to fine-tune on, a list for each question, by a method's rules and with a preset's numbers.

    They are in the order of the candidates: gold, which counts towards the cap, then correct samples. Where the method
    chooses at random under the cap, the choice depends on `seed`, the question's index and its own rationales alone.
    """
    labels = [distinct_rationales(candidates, method, preset.max_similarity) for candidates in questions]
    cap = cap_of_question([len(of_question) for of_question in labels], preset)
    if method.is_cap_random:
        return [random_part(of_question, cap, derived_seed(seed, index)) for index, of_question in enumerate(labels)]
    return [of_question[:cap] for of_question in labels]


def distinct_rationales(candidates: Candidates, method: Method, max_similarity: float) -> list[TokenizedExample]:
    """What a method may fine-tune on of one question: gold, if it has it, and the correct samples, without duplicates.

    methods.py says what the rules are.
    """
    gold = [candidates.gold] if method.has_gold and candidates.gold is not None else []
    samples = candidates.correct
    if method.checks_calculations:
        samples = [sample for sample in samples if has_right_calculations(candidates.completions[sample])]

    if method.duplicates == "similarity":
        return without_near_duplicates([*gold, *samples], max_similarity)
    if method.duplicates == "equations":
        first_with: dict[tuple[str, ...], TokenizedExample] = {}
        for sample in samples:
            first_with.setdefault(equations(candidates.completions[sample]), sample)
        return [*gold, *first_with.values()]
    return [*dict.fromkeys([*gold, *samples])]  # equal token ids


def cap_of_question(counts: Sequence[int], preset: Preset) -> int | None:
    """How many pseudo-labels a question may have: the smaller of the preset's two limits; None: as many as it has.

    `counts` are the questions' own; those without any do not lower the percentile.
    """
    caps = [] if preset.label_cap is None else [preset.label_cap]
    counts = [count for count in counts if count]
    if counts and preset.label_percentile is not None:
        caps.append(int(np.percentile(counts, preset.label_percentile)))
    return min(caps, default=None)


def random_part(rationales: list[TokenizedExample], n: int | None, seed: int) -> list[TokenizedExample]:
    """`n` of the rationales, drawn at random, in the order they had; all where they are no more, or n is None."""
    if n is None or len(rationales) <= n:
        return rationales
    chosen = Random(seed).sample(range(len(rationales)), n)
    return [rationales[index] for index in sorted(chosen)]
