"""The record that every dataset is read into and every stage hands on: one word problem."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """A word problem.

    `answer` is the text of a number ("72"); `rationale`, where the dataset has one, is in GSM8K's form: lines of
    prose with annotations (`<<48/2=24>>24`), and `#### 72` at the end.
    """

    question: str
    answer: str
    rationale: str | None = None
