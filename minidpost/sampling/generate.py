"""Questions in, completions out: the sampler joined to a format, with a progress bar."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn
from tqdm import tqdm

from minidpost.errors import UserError
from minidpost.sampling import sampler
from minidpost.sampling.sampler import Completion, Request, SamplingSettings, sample
from minidpost.text.grading import is_correct
from minidpost.text.templates import Template

MAX_PROMPT_TOKENS = 1024  # a question longer than this is refused, never cut


@dataclass(frozen=True)
class Generated:
    """One completion of one question: which question, which of its samples, the ids, and the text in GSM8K's form."""

    index: int
    sample: int
    completion: Completion
    text: str


def generate(
    model: nn.Module,
    template: Template,
    questions: Sequence[str],
    settings: SamplingSettings,
    n_samples: int = 1,
    calculator: bool = True,
    answers: Sequence[str] | None = None,
    label: str = "sampling",
    first_chunk: int = 0,
) -> Iterator[Generated]:
    """Yield `n_samples` completions of every question as they finish, beginning with the sampler's chunk `first_chunk`.

    With the questions' `answers`, the progress bar shows the accuracy so far. UserError: an empty question, or one that
    is longer than MAX_PROMPT_TOKENS.
    """
    prompts = [tuple(template.prompt_ids(question)) for question in questions]
    check_prompts(questions, prompts)
    requests = [
        Request(prompt, question, number)
        for question, prompt in zip(questions, prompts, strict=True)
        for number in range(n_samples)
    ]
    new_override = template.new_calculator if calculator else None
    n_tokens, n_done, n_right, started = 0, 0, 0, time.perf_counter()
    initial = min(first_chunk * sampler.CHUNK, len(requests))
    completions = sample(model, requests, settings, template.eos_id, new_override, first_chunk)
    with tqdm(total=len(requests), initial=initial, desc=label, unit="row") as progress:
        for position, completion in completions:
            index, number = divmod(position, n_samples)
            text = template.decode(completion.token_ids)
            n_tokens, n_done = n_tokens + len(completion.token_ids), n_done + 1
            shown = {"tok_s": f"{n_tokens / (time.perf_counter() - started):.0f}"}
            if answers is not None:
                n_right += is_correct(text, answers[index])
                shown["right"] = f"{n_right / n_done:.1%}"
            progress.set_postfix(shown, refresh=False)
            progress.update()
            yield Generated(index, number, completion, text)


@dataclass(frozen=True)
class Sample:
    """One completion of one question, graded where the answer is known: a row of samples-*.jsonl."""

    example_index: int
    sample_index: int
    question: str
    answer: str | None
    completion: str
    is_correct: bool | None
    token_ids: list[int]
    forced: list[bool]
    finish_reason: str


def generate_samples(
    model: nn.Module,
    template: Template,
    questions: Sequence[str],
    settings: SamplingSettings,
    *,
    answers: Sequence[str] | None = None,
    n_samples: int = 1,
    calculator: bool = True,
    label: str = "sampling",
    first_chunk: int = 0,
) -> Iterator[Sample]:
    """`generate` with the signature and the record that are agreed on; to be dropped when `generate` has them."""
    for done in generate(model, template, questions, settings, n_samples, calculator, answers, label, first_chunk):
        answer = None if answers is None else answers[done.index]
        yield Sample(
            example_index=done.index,
            sample_index=done.sample,
            question=questions[done.index],
            answer=answer,
            completion=done.text,
            is_correct=None if answer is None else is_correct(done.text, answer),
            token_ids=done.completion.token_ids,
            forced=done.completion.forced,
            finish_reason=done.completion.finish_reason,
        )


def check_prompts(questions: Sequence[str], prompts: Sequence[tuple[int, ...]]) -> None:
    """Refuse questions that are empty or too long, naming the first."""
    for number, (question, prompt) in enumerate(zip(questions, prompts, strict=True), start=1):
        if not question.strip():
            raise UserError(f"question {number} is empty")
        if len(prompt) > MAX_PROMPT_TOKENS:
            raise UserError(
                f"question {number} ({question.strip()[:40]!r}…) has {len(prompt):,} tokens; "
                f"the limit is {MAX_PROMPT_TOKENS:,}"
            )
