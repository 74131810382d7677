"""Greedy accuracy, pass@k and maj@k, each with its 95 % interval."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import comb, sqrt

from torch import nn

from minidpost.data.example import Example
from minidpost.sampling.generate import generate
from minidpost.sampling.sampler import SamplingSettings
from minidpost.text.grading import extract_answer, is_correct
from minidpost.text.templates import Template


@dataclass(frozen=True)
class Score:
    """A mean over n questions, in [0, 1], and its 95 % interval."""

    value: float
    n: int
    low: float
    high: float


def greedy_accuracy(
    model: nn.Module,
    template: Template,
    examples: Sequence[Example],
    settings: SamplingSettings,
    calculator: bool = True,
    label: str = "greedy",
) -> Score:
    """The share of questions whose greedy completion ends in the right answer (Wilson interval)."""
    texts = completions_by_question(model, template, examples, replace(settings, temperature=0.0), 1, calculator, label)
    n_right = sum(is_correct(text, example.answer) for (text,), example in zip(texts, examples, strict=True))
    return wilson(n_right, len(examples))


def sampled_scores(
    model: nn.Module,
    template: Template,
    examples: Sequence[Example],
    settings: SamplingSettings,
    pass_at: Sequence[int] = (),
    maj_at: Sequence[int] = (),
    calculator: bool = True,
    label: str = "pass@k",
) -> tuple[dict[int, Score], dict[int, Score]]:
    """pass@k and maj@k for each k, from max(k) samples a question at the settings' temperature.

    pass@k is the unbiased estimate 1 − C(n−c, k)/C(n, k) (Chen et al. 2021); maj@k takes the commonest answer of the
    first k samples, the earliest one in a tie. Intervals are those of a mean over questions.
    """
    n_samples = max([*pass_at, *maj_at])
    texts = completions_by_question(model, template, examples, settings, n_samples, calculator, label)
    n_right = [sum(is_correct(text, e.answer) for text in row) for row, e in zip(texts, examples, strict=True)]
    passed = {k: mean_score([pass_at_k(n_samples, c, k) for c in n_right]) for k in pass_at}
    majority = {
        k: mean_score([float(majority_is_right(row[:k], e.answer)) for row, e in zip(texts, examples, strict=True)])
        for k in maj_at
    }
    return passed, majority


def completions_by_question(
    model: nn.Module,
    template: Template,
    examples: Sequence[Example],
    settings: SamplingSettings,
    n_samples: int,
    calculator: bool,
    label: str,
) -> list[list[str]]:
    """The completions' texts, a list of `n_samples` for each example."""
    texts = [[""] * n_samples for _ in examples]
    questions, answers = [e.question for e in examples], [e.answer for e in examples]
    for done in generate(model, template, questions, settings, n_samples, calculator, answers, label):
        texts[done.index][done.sample] = done.text
    return texts


def pass_at_k(n: int, n_right: int, k: int) -> float:
    """The chance that k of n samples, drawn without replacement, hold a right one."""
    return 1 - comb(n - n_right, k) / comb(n, k)


def majority_is_right(texts: Sequence[str], answer: str) -> bool:
    """Whether the commonest answer is the right one; completions without an answer do not vote."""
    votes = Counter(number for text in texts if (number := extract_answer(text)) is not None)
    return bool(votes) and is_correct(f"#### {votes.most_common(1)[0][0]:f}", answer)


def wilson(n_right: int, n: int) -> Score:
    """A share and its Wilson interval."""
    if not n:
        return Score(0.0, 0, 0.0, 1.0)
    share, z = n_right / n, 1.96
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Score(share, n, max(0.0, centre - half), min(1.0, centre + half))


def mean_score(values: Sequence[float]) -> Score:
    """A mean and its normal interval; Wilson's where the values are only 0 and 1, as that of all zeros is not empty."""
    n = len(values)
    if {*values} <= {0.0, 1.0}:
        return wilson(int(sum(values)), n)
    mean = sum(values) / n
    half = 1.96 * sqrt(sum((value - mean) ** 2 for value in values) / max(1, n - 1) / n)
    return Score(mean, n, max(0.0, mean - half), min(1.0, mean + half))
