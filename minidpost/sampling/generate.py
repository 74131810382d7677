"""Questions in, graded completions out: a model's template, the sampler and the grading, with a progress bar."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

from minidpost.errors import UserError
from minidpost.progress import Progress
from minidpost.sampling import sampler
from minidpost.sampling.sampler import DecodingModel, Request, Row, SamplingSettings, sample
from minidpost.text import grading
from minidpost.text.templates import Template

MAX_PROMPT_TOKENS = 1024  # a question longer than this is refused, never cut


@dataclass(frozen=True)
class Sample:
    """One completion of one question, graded: the record from here to `samples-*.jsonl` and to selection."""

    example_index: int  # which of the questions
    sample_index: int  # which of its completions
    question: str
    answer: str | None  # the dataset's, where one was given
    completion: str  # in GSM8K's form, whatever the model's family
    is_correct: bool | None  # whether the completion's final answer is the dataset's; None without one
    token_ids: list[int]  # the completion as the model wrote it, the end token included
    forced: list[bool]  # which of its tokens the calculator wrote
    finish_reason: str  # "stop", or "length" where it was cut


def generate(
    model: DecodingModel,
    template: Template,
    questions: Sequence[str],
    settings: SamplingSettings,
    *,
    answers: Sequence[str] | None = None,
    n_samples: int = 1,
    calculator: bool = True,
    label: str = "sampling",
    first_chunk: int = 0,
    chunk_size: int | None = None,
    progress: Progress | None = None,
    on_token: Callable[[Row], None] | None = None,
) -> Iterator[Sample]:
    """Yield `n_samples` completions of every question as they end, beginning with the sampler's chunk `first_chunk`.

    With the questions' `answers` completions are graded, and the progress bar, which is headed by `label`, shows the
    accuracy so far. A `progress` of the caller's, which several calls may share, is used instead of one of this call's.
    `on_token` is called with a row after each of its tokens, while it is written.
    UserError: an empty question, or one that is longer than MAX_PROMPT_TOKENS.
    """
    prompts = [tuple(template.prompt_ids(question)) for question in questions]
    check_prompts(questions, prompts)
    requests = [
        Request(prompt, question, sample_index)
        for question, prompt in zip(questions, prompts, strict=True)
        for sample_index in range(n_samples)
    ]
    rows = sample(
        model,
        requests,
        settings,
        template.stop_ids,
        new_override=template.new_calculator if calculator else None,
        first_chunk=first_chunk,
        chunk_size=chunk_size,
        on_token=on_token,
    )

    n_done = n_correct = n_tokens = 0
    started = time.perf_counter()
    n_before = 0
    if first_chunk:
        device = next(model.parameters()).device
        size = sampler.default_chunk_size(settings.slots, device) if chunk_size is None else chunk_size
        n_before = min(first_chunk * size, len(requests))
    shared = None if progress is None else nullcontext(progress)  # not closed here
    with shared or Progress(total=len(requests), initial=n_before, desc=label, unit="row") as bar:
        for row in rows:
            # Requests stand question by question: with 4 samples each, request 9 is sample 1 of question 2.
            example_index, sample_index = divmod(row.request_index, n_samples)
            answer = None if answers is None else answers[example_index]
            completion = template.decode(row.token_ids)
            is_correct = None if answer is None else grading.is_correct(completion, answer)

            n_done += 1
            n_tokens += len(row.token_ids)
            shown = {"tok_s": f"{n_tokens / (time.perf_counter() - started):.0f}"}
            if answers is not None:
                n_correct += bool(is_correct)
                shown["right"] = f"{n_correct / n_done:.1%}"
            bar.set_postfix(shown, refresh=False)
            bar.update()
            yield Sample(
                example_index=example_index,
                sample_index=sample_index,
                question=row.request.question,
                answer=answer,
                completion=completion,
                is_correct=is_correct,
                token_ids=row.token_ids,
                forced=row.forced,
                finish_reason=row.finish_reason,
            )


def check_prompts(questions: Sequence[str], prompts: Sequence[Sequence[int]]) -> None:
    """Refuse questions that are empty or too long, naming the first."""
    for number, (question, prompt) in enumerate(zip(questions, prompts, strict=True), start=1):
        check_prompt(number, question, prompt)


def check_prompt(number: int, question: str, prompt: Sequence[int]) -> None:
    """Refuse a question, the `number`-th, that is empty or longer than MAX_PROMPT_TOKENS."""
    if not question.strip():
        raise UserError(f"question {number} is empty")
    if len(prompt) > MAX_PROMPT_TOKENS:
        raise UserError(
            f"question {number} ({question.strip()[:40]!r}…) has {len(prompt):,} tokens; "
            f"the limit is {MAX_PROMPT_TOKENS:,}"
        )
