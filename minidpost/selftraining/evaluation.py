"""Greedy accuracy, pass@k and maj@k, each with its 95 % interval, and differences over the same questions."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import comb, sqrt
from typing import Any

from minidpost.data.example import Example
from minidpost.processes import from_rank_0, on_rank_0, rank
from minidpost.sampling.generate import Sample, generate, shared_chunk_size
from minidpost.sampling.sampler import DecodingModel, SamplingSettings
from minidpost.selftraining.run_directory import Chunks
from minidpost.text.grading import extract_answer, is_correct
from minidpost.text.templates import Template

Z = 1.96  # standard deviations to either side that hold 95 % of a normal distribution


@dataclass(frozen=True)
class Score:
    """A mean over n questions and its 95 % interval; within [0, 1], or [−1, 1] for a difference."""

    value: float
    n: int
    low: float
    high: float


@dataclass(frozen=True)
class SampledScores:
    """pass@k and maj@k by k, and the outcomes of each question that they are means of.

    `n_correct` counts a question's correct samples, of `n_samples`; `majority` says whether the commonest answer of its
    first k samples is correct, as 1 or 0.
    """

    n_samples: int
    n_correct: list[int]
    majority: dict[int, list[int]]
    pass_at: dict[int, Score]
    maj_at: dict[int, Score]


def greedy_accuracy(
    model: DecodingModel,
    template: Template,
    examples: Sequence[Example],
    settings: SamplingSettings,
    *,
    calculator: bool = True,
    label: str = "greedy",
) -> Score:
    """The fraction of questions whose greedy completion ends in the correct answer (Wilson interval)."""
    return mean_score(greedy_outcomes(model, template, examples, settings, calculator=calculator, label=label))


def greedy_outcomes(
    model: DecodingModel,
    template: Template,
    examples: Sequence[Example],
    settings: SamplingSettings,
    *,
    calculator: bool = True,
    label: str = "greedy",
    chunks: Chunks | None = None,
) -> list[int]:
    """1 for each question whose greedy completion ends in the correct answer, 0 for each other.

    `chunks` are where the samples are saved, see `samples_by_question`.
    """
    greedy = replace(settings, temperature=0.0)
    samples = samples_by_question(
        model, template, examples, greedy, n_samples=1, calculator=calculator, label=label, chunks=chunks
    )
    return [int(bool(sample.is_correct)) for (sample,) in samples]


def sampled_scores(
    model: DecodingModel,
    template: Template,
    examples: Sequence[Example],
    settings: SamplingSettings,
    *,
    pass_at: Sequence[int] = (),
    maj_at: Sequence[int] = (),
    calculator: bool = True,
    label: str = "pass@k",
    chunks: Chunks | None = None,
) -> SampledScores:
    """pass@k and maj@k for each k, all from the same max(k) samples a question at the settings' temperature.

    pass@k is the unbiased estimate 1 − C(n−c, k)/C(n, k) (Chen et al. 2021); maj@k takes the commonest answer of the
    first k samples, the earliest one in a tie. Intervals are those of a mean over questions. `chunks` are where the
    samples are saved, see `samples_by_question`.
    """
    n_samples = max([*pass_at, *maj_at])
    samples = samples_by_question(
        model, template, examples, settings, n_samples=n_samples, calculator=calculator, label=label, chunks=chunks
    )
    n_correct = [sum(bool(sample.is_correct) for sample in row) for row in samples]
    majority = {}
    for k in maj_at:
        completions = [[sample.completion for sample in row[:k]] for row in samples]
        pairs = zip(completions, examples, strict=True)
        majority[k] = [int(majority_is_correct(texts, example.answer)) for texts, example in pairs]
    return SampledScores(
        n_samples=n_samples,
        n_correct=n_correct,
        majority=majority,
        pass_at={k: mean_score([pass_at_k(n_samples, c, k) for c in n_correct]) for k in pass_at},
        maj_at={k: mean_score(outcomes) for k, outcomes in majority.items()},
    )


def samples_by_question(
    model: DecodingModel,
    template: Template,
    examples: Sequence[Example],
    settings: SamplingSettings,
    *,
    n_samples: int,
    calculator: bool,
    label: str,
    chunks: Chunks | None = None,
) -> list[list[Sample]]:
    """The graded samples, a list of `n_samples` for each example, in order whatever the order in which they end.

    With `chunks`, which must be of these arguments alone, samples are saved as chunks end, and those that are there
    already are not sampled again. Several processes share the work, and all get all samples; rank 0's `chunks` count.
    """

    def begin() -> tuple[int, int | None]:
        """The first chunk to sample, and the size of chunks: None where they are not saved, the usual one."""
        if chunks is None:
            return 0, None
        return chunks.where_to_go_on(shared_chunk_size(model, settings.slots, len(examples) * n_samples))

    first_chunk, chunk_size = on_rank_0(begin)
    samples: Iterable[Sample] = generate(
        model,
        template,
        [example.question for example in examples],
        settings,
        answers=[example.answer for example in examples],
        n_samples=n_samples,
        calculator=calculator,
        label=label,
        first_chunk=first_chunk,
        chunk_size=chunk_size,
    )
    if chunks is not None and chunk_size is not None and rank() == 0:
        chunks.save((asdict(sample) for sample in samples), chunk_size)
        samples = [Sample(**record) for record in chunks.records()]
    in_order = sorted(from_rank_0([*samples]), key=lambda sample: (sample.example_index, sample.sample_index))
    return [in_order[start : start + n_samples] for start in range(0, len(in_order), n_samples)]


def pass_at_k(n: int, n_correct: int, k: int) -> float:
    """The chance that k of n samples, taken without replacement, hold a correct one."""
    return 1 - comb(n - n_correct, k) / comb(n, k)


def majority_is_correct(completions: Sequence[str], answer: str) -> bool:
    """Whether the commonest answer is the correct one; completions without an answer do not vote."""
    answers = [extract_answer(completion) for completion in completions]
    votes = Counter(found for found in answers if found is not None)
    if not votes:
        return False
    ((commonest, _),) = votes.most_common(1)  # of those with equally many votes the one that came first
    return is_correct(f"#### {commonest:f}", answer)


def wilson(n_correct: int, n: int) -> Score:
    """A fraction and its Wilson interval."""
    if not n:
        return Score(0.0, 0, 0.0, 1.0)
    fraction = n_correct / n
    centre = (fraction + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z * sqrt(fraction * (1 - fraction) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return Score(fraction, n, max(0.0, centre - half), min(1.0, centre + half))


def mean_score(values: Sequence[float]) -> Score:
    """A mean and its normal interval; Wilson's where the values are only 0 and 1, as that of all zeros is not empty."""
    n = len(values)
    if {*values} <= {0.0, 1.0}:
        return wilson(int(sum(values)), n)
    mean, half = mean_and_half_width(values)
    return Score(mean, n, max(0.0, mean - half), min(1.0, mean + half))


def paired_difference(before: Sequence[float], after: Sequence[float]) -> Score:
    """The mean of after − before over the same questions, in their order, and its normal interval.

    It is narrower than what the two scores' own intervals suggest, as questions that are easy or hard for both models
    drop out. Where all differences are equal it is empty.
    """
    differences = [b - a for a, b in zip(before, after, strict=True)]
    mean, half = mean_and_half_width(differences)
    return Score(mean, len(differences), max(-1.0, mean - half), min(1.0, mean + half))


def mean_and_half_width(values: Sequence[float]) -> tuple[float, float]:
    """The mean of at least one value, and half the width of its normal interval."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / max(1, n - 1)
    return mean, Z * sqrt(variance / n)


def percent(score: Mapping[str, Any]) -> str:
    """A score, given by its fields as in a JSON file, as tables show it: `46.4% (43.2–49.6)`."""
    return f"{score['value']:.1%} ({100 * score['low']:.1f}–{100 * score['high']:.1f})"
