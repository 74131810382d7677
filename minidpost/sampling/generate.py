"""Questions in, graded completions out: a model's template, the sampler and the grading, with a progress bar."""

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass

from minidpost.errors import UserError
from minidpost.processes import Counts, SharedWork, rank, world_size
from minidpost.progress import Progress
from minidpost.sampling import sampler
from minidpost.sampling.sampler import DecodingModel, Request, Row, SamplingSettings, sample
from minidpost.sampling.workers import Parametrised
from minidpost.text import grading
from minidpost.text.templates import Template

MAX_PROMPT_TOKENS = 1024  # a question longer than this is refused, never cut
SECONDS_BETWEEN_LOOKS = 0.05  # at whether another rank is done


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
    `on_token` is called with a row after each of its tokens, while it is written. Several processes, which must all
    call this with the same arguments, share the work: rank 0 gets all samples, chunk after chunk, and the others none.
    UserError: an empty question, or one that is longer than MAX_PROMPT_TOKENS.
    """
    prompts = [tuple(template.prompt_ids(question)) for question in questions]
    check_prompts(questions, prompts)
    requests = [
        Request(prompt, question, sample_index)
        for question, prompt in zip(questions, prompts, strict=True)
        for sample_index in range(n_samples)
    ]
    if chunk_size is None:
        chunk_size = shared_chunk_size(model, settings.slots, len(requests))
    # Of several processes each takes whole chunks, another one whenever it is free.
    work: SharedWork | None = None
    if world_size() > 1:
        work = SharedWork(range(first_chunk, -(-len(requests) // chunk_size)))
    rows = sample(
        model,
        requests,
        settings,
        template.stop_ids,
        new_override=template.new_calculator if calculator else None,
        first_chunk=first_chunk,
        chunk_size=chunk_size,
        chunk_indices=None if work is None else work.take(),
        on_token=on_token,
    )
    n_before = min(first_chunk * chunk_size, len(requests))
    shared = None if progress is None else nullcontext(progress)  # not closed here
    with shared or Progress(total=len(requests), initial=n_before, desc=label, unit="row", disable=rank() > 0) as bar:
        counts = SharedProgress(bar, has_answers=answers is not None)
        samples = graded(rows, template, answers, n_samples)
        if work is None:
            for one in samples:
                counts.count(one)
                yield one
        else:
            yield from of_all_ranks(
                samples, work, counts, n_requests=len(requests), n_samples=n_samples, chunk_size=chunk_size
            )


def shared_chunk_size(model: Parametrised, n_slots: int, n_requests: int) -> int:
    """The requests of a chunk where nothing else is asked for, so that all processes have work.

    On GPUs a chunk is large (sampler.default_chunk_size), and a test set often a single one, which one process would
    work off while the others wait. Several processes with GPUs therefore get equally many chunks each, of at least a
    request a slot. On a CPU chunks are the same for any number of processes, so that samples are the same bytes.
    """
    largest = sampler.default_chunk_size(model, n_slots)
    n_processes = world_size()
    if n_processes == 1 or next(model.parameters()).device.type != "cuda":
        return largest
    n_rounds = -(-n_requests // (n_processes * largest))  # rounded up, as below
    return max(n_slots, -(-n_requests // (n_processes * max(1, n_rounds))))


def graded(rows: Iterable[Row], template: Template, answers: Sequence[str] | None, n_samples: int) -> Iterator[Sample]:
    """Rows as samples, of which the completions of questions with answers are graded."""
    for row in rows:
        # Requests stand question by question: with 4 samples each, request 9 is sample 1 of question 2.
        example_index, sample_index = divmod(row.request_index, n_samples)
        answer = None if answers is None else answers[example_index]
        completion = template.decode(row.token_ids)
        yield Sample(
            example_index=example_index,
            sample_index=sample_index,
            question=row.request.question,
            answer=answer,
            completion=completion,
            is_correct=None if answer is None else grading.is_correct(completion, answer),
            token_ids=row.token_ids,
            forced=row.forced,
            finish_reason=row.finish_reason,
        )


class SharedProgress:
    """What a progress bar shows of a sampling: rows, tokens a second and accuracy, of all ranks together."""

    def __init__(self, bar: Progress, *, has_answers: bool) -> None:
        self.bar = bar
        self.has_answers = has_answers
        self.counts = Counts(3)  # samples, correct ones, tokens
        self.n_shown = 0
        self.started = time.perf_counter()

    def count(self, sample: Sample) -> None:
        """Note a sample of this rank, and show what is known of all."""
        self._show(*self.counts.add(1, int(sample.is_correct is True), len(sample.token_ids)))

    def tell(self) -> None:
        """Tell the other ranks of this one's samples, and show what is known of all."""
        self.counts.tell()
        self._show(*self.counts.add(0, 0, 0))

    def _show(self, n_done: int, n_correct: int, n_tokens: int) -> None:
        shown = {"tok_s": f"{n_tokens / (time.perf_counter() - self.started):.0f}"}
        if self.has_answers and n_done:
            shown["right"] = f"{n_correct / n_done:.1%}"
        self.bar.set_postfix(shown, refresh=False)
        self.bar.update(n_done - self.n_shown)
        self.n_shown = n_done


def of_all_ranks(
    samples: Iterable[Sample],
    work: SharedWork,
    progress: SharedProgress,
    *,
    n_requests: int,
    n_samples: int,
    chunk_size: int,
) -> Iterator[Sample]:
    """The samples of all ranks on rank 0, chunk after chunk. The other ranks hand theirs in, and get none.

    `samples` are those of this rank, whole chunks of them.
    """
    own = own_chunks(samples, progress, n_requests=n_requests, n_samples=n_samples, chunk_size=chunk_size)
    if rank() > 0:
        for chunk_index, chunk in own:
            progress.tell()
            work.hand_in(chunk_index, [asdict(sample) for sample in chunk])
        return

    done: dict[int, list[Sample]] = {}
    for chunk_index in work.numbers:
        while chunk_index not in done:
            # 1) Another rank may have this chunk ready.
            records = work.handed_in(chunk_index)
            if records is not None:
                done[chunk_index] = [Sample(**record) for record in records]
                continue
            # 2) If not, work off one more, be it this one or a later one.
            own_chunk = next(own, None)
            if own_chunk is not None:
                done[own_chunk[0]] = own_chunk[1]
                continue
            # 3) None is left: another rank is at this one.
            time.sleep(SECONDS_BETWEEN_LOOKS)
            progress.tell()
        yield from done.pop(chunk_index)
    progress.tell()


def own_chunks(
    samples: Iterable[Sample], progress: SharedProgress, *, n_requests: int, n_samples: int, chunk_size: int
) -> Iterator[tuple[int, list[Sample]]]:
    """This rank's samples by chunk: its number, and its samples in the order in which they ended."""
    chunk: list[Sample] = []
    for one in samples:
        progress.count(one)
        chunk.append(one)
        chunk_index = (one.example_index * n_samples + one.sample_index) // chunk_size
        if len(chunk) == min(chunk_size, n_requests - chunk_index * chunk_size):
            yield chunk_index, chunk
            chunk = []


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
