"""A word problem."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A word problem; `answer` is as the dataset writes it, `rationale` in GSM8K's form where there is one."""

    question: str
    answer: str
    rationale: str | None = None
