"""Continuous batching: a fixed number of slots, each refilled as soon as its row ends; with tokens that can be forced.

Three slots at work on the requests a, b, c and d, a step a line: · a token that was chosen by the model's logits, ! one
that was forced, E the end of a row.

    step    slot 0   slot 1   slot 2
      1      a ·      b ·      c ·
      2      a ·      b !      c E       c ends, and d, which has been waiting, starts in its slot
      3      a ·      b !      d ·
      4      a E      b ·      d ·       a ends, and nothing waits: the last row moves into the slot that is free
      5      d ·      b E                so that the rows at work are always the cache's first
      6      d E

The sampler knows nothing of text or arithmetic. An *override* watches each row and may answer a token with ids that
must follow it (the calculator does so); what the model would have chosen at those positions is discarded. Each row has
its own uniform numbers, one a position (see token_choice), so that a completion depends neither on its neighbours nor
on the number of slots nor on the order of work, but for rounding.

Requests are worked off in chunks that begin with empty slots, so that even by rounding a chunk's completions depend on
the chunk alone. Prompts are prefilled several at a time, into rows of the cache after the slots, and copied into a slot
for each of their samples: all samples of one question in one chunk share one prefill. A step has one transfer from the
device, its ids. With a small model on a CPU the work is divided among processes (see workers); on a GPU steps are CUDA
graphs (see cuda_graphs).

On a GPU the host's work is hidden behind the device's: step t + 1 begins, on the device, with the ids that step t drew,
before the host has read them. Nothing comes too late by that: ids that must follow a token of step t take the place of
step t + 1's choice, and are known before step t + 2 begins. Only a row that ended in step t is decoded once more, and
what is drawn for it is thrown away.

    device    step t       step t + 1       step t + 2 …
    host      reads t − 1, reads t,         reads t + 1 …
              forces, ends forces, ends
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from minidpost.precision import to_device
from minidpost.sampling.cuda_graphs import recorded_steps
from minidpost.sampling.token_choice import SamplingSettings, choose, row_uniforms
from minidpost.sampling.workers import Parametrised, n_workers_for, sample_in_workers

__all__ = [
    "CHUNK",
    "PREFILL_BATCH",
    "DecodingModel",
    "Override",
    "Request",
    "Row",
    "SamplingSettings",
    "cached_tokens",
    "default_chunk_size",
    "overlaps",
    "prefill_batch",
    "sample",
]

# Requests that begin with empty slots; part of what a run's results depend on (in fp32, by rounding). At the end of a
# chunk slots are empty, so that on a GPU, where there may be many, chunks grow with them. But the chunk at work is also
# what a kill loses, and on a CPU 1,024 completions of a large model take long: there such a model's have eight requests
# a slot. With 64 slots and completions as long as GSM8K's rationales that makes 6 to 8 % more steps, all of few rows.
CHUNK = 1024
GPU_CHUNK_PER_SLOT = 16
CPU_CHUNK_PER_SLOT = 8  # [ours] of models of MIN_PARAMETERS_FOR_SMALL_CHUNKS and more
MIN_PARAMETERS_FOR_SMALL_CHUNKS = 20_000_000
# Prompts that are prefilled together. On a GPU starting a prefill's kernels takes as long as several steps, and the
# more slots there are, the more prompts are needed in each.
PREFILL_BATCH = 16
GPU_SLOTS_PER_PREFILLED = 8


class Cache(Protocol):
    """What a model remembers of its rows, as far as the sampler handles it; see kvcache."""

    def clear(self) -> None: ...
    def copy_rows(self, source_ids: Sequence[int], target_ids: Sequence[int], /) -> None: ...


class DecodingModel(Protocol):
    """What the sampler asks of a model; see T5 and Llama."""

    def parameters(self) -> Iterator[Tensor]: ...
    def decoding(self) -> AbstractContextManager[None]: ...  # while it decodes and its weights do not change
    def new_cache(self, n_rows: int, max_prompt: int, max_new: int, /) -> Cache: ...
    def prefill(self, cache: Any, row_ids: Sequence[int], prompts: Sequence[Sequence[int]], /) -> list[int]: ...
    def decode(self, cache: Any, ids_B: Tensor, /) -> Tensor: ...
    # For CUDA graphs alone:
    def step(self, cache: Any, plan: Any, ids_B: Tensor, /) -> Tensor: ...
    def refresh(self, cache: Any, /) -> None: ...


class Override(Protocol):
    """Watches one row: `push` takes its tokens in order and returns the ids that must come right after the last one.

    While `is_idle` is true, only the ids in `trigger_ids` matter to it, and it is not shown any others.
    """

    trigger_ids: frozenset[int]

    @property
    def is_idle(self) -> bool: ...
    def push(self, token_id: int) -> list[int]: ...


@dataclass(frozen=True)
class Request:
    """One completion to be sampled: the prompt's ids, the text of its question, and which sample of it this is."""

    prompt_ids: tuple[int, ...]
    question: str
    sample_index: int = 0


@dataclass
class Row:
    """A completion while it is written, and when it has ended."""

    request_index: int  # which of the requests this is
    request: Request
    token_ids: list[int] = field(default_factory=list)  # the tokens so far; in the end with the end token, if it came
    forced: list[bool] = field(default_factory=list)  # which of them the override forced
    finish_reason: str = ""  # "stop": the model chose the end token; "length": the row has max_new_tokens

    # Needed while the row is written, and dropped at its end.
    prefilled_row: int = -1  # the row of the cache that holds its prompt until it gets a slot
    slot: int = -1  # where it is at work
    next_id: int = -1  # the token that the model is fed next, unless there is one that has not been read
    is_unread: bool = False  # whether a token has been drawn for it that has not been read when the next step begins
    drawn_at: int = 0  # the slot that it had in the latest step
    uniforms: Sequence[float] = ()  # its uniform number of each position; none where sampling is greedy
    override: Override | None = None
    pending: deque[int] = field(default_factory=deque)  # forced ids that are still to be emitted

    def end(self, finish_reason: str) -> None:
        """Note why the row ends, and drop what is not needed any more: a row of another process is sent here."""
        self.finish_reason = finish_reason
        self.uniforms = ()
        self.override = None
        self.pending = deque()


Group = list[tuple[int, Request]]  # the requests of a chunk that have the same prompt, each as (request_index, request)
Chunk = list[Group]


@dataclass(frozen=True)
class Job:
    """What all chunks of one call of `sample` have in common."""

    model: DecodingModel
    settings: SamplingSettings
    eos_ids: frozenset[int]
    new_override: Callable[[], Override] | None
    use_cuda_graphs: bool
    overlap: bool  # whether a step begins before the host has read the one before
    max_prompt: int  # tokens of the longest prompt
    max_rows: int  # requests of the largest chunk
    device: torch.device  # where the model lies
    on_token: Callable[[Row], None] | None = None  # is shown every row after each of its tokens


def sample(
    model: DecodingModel,
    requests: Sequence[Request],
    settings: SamplingSettings,
    eos_id: int | Collection[int],
    *,
    new_override: Callable[[], Override] | None = None,
    first_chunk: int = 0,
    chunk_size: int | None = None,
    chunk_indices: Iterable[int] | None = None,
    use_cuda_graphs: bool = True,
    overlap: bool | None = None,
    on_token: Callable[[Row], None] | None = None,
) -> Iterator[Row]:
    """Yield the rows of all requests as they end, each request's once; those before `first_chunk` not at all.

    A row ends at the end token `eos_id`, or at any of several. All rows of a chunk, of `chunk_size` requests (None:
    `default_chunk_size`), are yielded before any of the next. `new_override` makes the override of one row. Samples of
    one question should stand together in `requests`: those of one chunk share a prefill. Prompts must not be empty.
    With `overlap` a step begins before the host has read what the one before drew (None: on a GPU); the completions are
    the same. `on_token` is called with a row after each of its tokens, while it is written; all rows are then written
    in this process. With `chunk_indices` these chunks are worked off, in this order, each number asked for when it is
    its turn.
    """
    device = next(model.parameters()).device
    if chunk_size is None:
        chunk_size = default_chunk_size(model, settings.slots)
    chunks = chunked(requests, chunk_size)
    if overlap is None:
        overlap = overlaps(device)
    # The longest of all prompts, worked off or not, so that a run that continues has caches of the same shape.
    max_prompt = max((len(request.prompt_ids) for request in requests), default=0)
    eos_ids = frozenset([eos_id] if isinstance(eos_id, int) else eos_id)
    job = Job(
        model=model,
        settings=settings,
        eos_ids=eos_ids,
        new_override=new_override,
        use_cuda_graphs=use_cuda_graphs and device.type == "cuda",
        overlap=overlap,
        max_prompt=max_prompt,
        max_rows=min(len(requests), chunk_size),
        device=device,
        on_token=on_token,
    )
    # Likewise of all chunks: how the questions of a chunk are dealt to workers decides which rows share a step.
    n_workers = n_workers_for(model, settings.slots, chunks) if on_token is None else 1
    work = partial(sample_chunks, job)
    if chunk_indices is None:
        remaining = chunks[first_chunk:]
        if n_workers > 1:
            return sample_in_workers(work, remaining, settings.slots, n_workers)
        return work(remaining, settings.slots)
    given = (chunks[index] for index in chunk_indices)
    if n_workers > 1:
        of_chunks = (sample_in_workers(work, [chunk], settings.slots, n_workers) for chunk in given)
        return chain.from_iterable(of_chunks)
    return work(given, settings.slots)


def default_chunk_size(model: Parametrised, n_slots: int) -> int:
    """The requests of a chunk where nothing else is asked for: by the device and, on a CPU, the model's size.

    1,024 on a CPU, or of a large model 8 a slot and at most 1,024; on a GPU 16 a slot and at least 1,024. The model may
    be without memory, on the meta device, where that of a CPU counts.
    """
    if next(model.parameters()).device.type == "cuda":
        return max(CHUNK, GPU_CHUNK_PER_SLOT * n_slots)
    if sum(weight.numel() for weight in model.parameters()) >= MIN_PARAMETERS_FOR_SMALL_CHUNKS:
        return min(CHUNK, CPU_CHUNK_PER_SLOT * n_slots)
    return CHUNK


def prefill_batch(n_slots: int, device: torch.device | str) -> int:
    """The prompts that are prefilled together."""
    if torch.device(device).type == "cuda":
        return max(PREFILL_BATCH, n_slots // GPU_SLOTS_PER_PREFILLED)
    return PREFILL_BATCH


def overlaps(device: torch.device | str) -> bool:
    """Whether a step begins before the host has read what the one before drew, where nothing else is asked for."""
    return torch.device(device).type == "cuda"


def cached_tokens(max_new_tokens: int, overlap: bool) -> int:
    """The tokens of a completion that a cache must have room for.

    A row that has ended is decoded once more where steps overlap, and T5 has no room for that but at the end.
    """
    return max_new_tokens + int(overlap)


def chunked(requests: Sequence[Request], chunk_size: int) -> list[Chunk]:
    """The requests, `chunk_size` at a time, in groups of the same prompt, the longest prompts first."""
    chunks = []
    for start in range(0, len(requests), chunk_size):
        groups: dict[tuple[int, ...], Group] = {}
        for request_index, request in enumerate(requests[start : start + chunk_size], start=start):
            groups.setdefault(request.prompt_ids, []).append((request_index, request))
        chunks.append([groups[prompt] for prompt in sorted(groups, key=len, reverse=True)])
    return chunks


def sample_chunks(job: Job, chunks: Iterable[Chunk], n_slots: int) -> Iterator[Row]:
    """Work off chunk after chunk in this process, with one cache for all of them."""
    remaining = iter(chunks)
    chunk = next(remaining, None)
    if chunk is None:
        return
    n_cache_rows = min(n_slots, job.max_rows) + prefill_batch(n_slots, job.device)
    max_new_tokens = cached_tokens(job.settings.max_new_tokens, job.overlap)
    cache: Any
    step: Callable[[Tensor], Tensor]
    in_use: AbstractContextManager[None] = nullcontext()
    if job.use_cuda_graphs:
        step = recorded_steps(job.model, n_cache_rows, job.max_prompt, max_new_tokens)
        cache = step.cache
        in_use = step.in_use()
    else:
        cache = job.model.new_cache(n_cache_rows, job.max_prompt, max_new_tokens)
        step = partial(job.model.decode, cache)
    with in_use, job.model.decoding():
        while chunk is not None:
            cache.clear()
            n_requests = sum(map(len, chunk))
            yield from sample_chunk(job, chunk, min(n_slots, n_requests), cache=cache, step=step)
            chunk = next(remaining, None)


def sample_chunk(
    job: Job, chunk: Chunk, n_slots: int, *, cache: Cache, step: Callable[[Tensor], Tensor]
) -> Iterator[Row]:
    """Work off one chunk: the loop of continuous batching. `step` feeds ids_B to the cache's first rows; logits_BV."""
    # The rows at work: row i has slot i, which is row i of the cache.
    rows: list[Row] = []
    waiting = prefilled_rows(job, chunk, n_slots, cache)
    for slot in range(n_slots):
        row = next(waiting)
        cache.copy_rows([row.prefilled_row], [slot])
        row.slot = slot
        rows.append(row)

    unread: deque[Draw] = deque()  # steps that the host has not read, the earliest first
    latest: Draw | None = None
    while rows:
        # 1) Begin a step: a token for every row. Where steps overlap, the one before is read while this one runs.
        latest = begin_step(job, rows, latest, step)
        unread.append(latest)
        if job.overlap and len(unread) == 1:
            continue

        # 2) Read what was drawn, force and emit.
        ended = emit(job, unread.popleft())
        yield from ended

        # 3) Refill the slots that are free, the last one first, so that none of the free ones is moved into another.
        for slot in sorted((row.slot for row in ended), reverse=True):
            new_row = next(waiting, None)
            if new_row is not None:
                cache.copy_rows([new_row.prefilled_row], [slot])
                new_row.slot = slot
                rows[slot] = new_row
                continue
            # Nothing waits. Rows 0 … n − 1 of the cache must be those at work: the last one moves here.
            last_row = rows.pop()
            if slot < len(rows):
                cache.copy_rows([len(rows)], [slot])
                last_row.slot = slot
                rows[slot] = last_row


class Draw:
    """The tokens that one step drew, a row each; on their way from the device to the host."""

    def __init__(self, rows: Sequence[Row], ids_B: Tensor):
        self.rows = list(rows)  # as they stood in the slots
        self.ids_B = ids_B
        self.copied: torch.cuda.Event | None = None
        self.on_host_B = ids_B
        if ids_B.is_cuda:
            self.on_host_B = torch.empty(ids_B.shape, dtype=ids_B.dtype, pin_memory=True)
            self.on_host_B.copy_(ids_B, non_blocking=True)
            self.copied = torch.cuda.Event()
            self.copied.record()

    def read(self) -> list[int]:
        """The ids, as soon as they are there: a step's one transfer from the device."""
        if self.copied is not None:
            self.copied.synchronize()
        ids: list[int] = self.on_host_B.tolist()
        return ids


def begin_step(job: Job, rows: Sequence[Row], latest: Draw | None, step: Callable[[Tensor], Tensor]) -> Draw:
    """Feed the latest token of every row to the model, at the row's own position, and choose the next one."""
    uniform_B = None
    if job.settings.temperature > 0:
        # What is drawn for a row that has all its tokens already, one of them unread, is thrown away.
        last = job.settings.max_new_tokens - 1
        uniforms = [row.uniforms[min(len(row.token_ids) + row.is_unread, last)] for row in rows]
        uniform_B = numbers_to_device(uniforms, torch.float64, job.device)
    ids_B = next_ids(job, rows, latest)
    chosen_B = choose(step(ids_B), uniform_B, job.settings)
    return Draw(rows, chosen_B)


def next_ids(job: Job, rows: Sequence[Row], latest: Draw | None) -> Tensor:
    """What each row is fed, (B,): ids that the host knows, or those of the latest step, which are on the device."""
    if not job.overlap:
        return numbers_to_device([row.next_id for row in rows], torch.long, job.device)
    known = []  # −1 where the host does not know it
    drawn_at = []  # the slot of the latest step: a row may have moved to another since
    for slot, row in enumerate(rows):
        drawn_at.append(row.drawn_at)
        row.drawn_at = slot
        if not row.is_unread:  # its first one
            known.append(row.next_id)
            row.is_unread = True
        elif row.pending:  # what was drawn will be replaced by this
            known.append(row.pending[0])
        else:
            known.append(-1)
    known_B = numbers_to_device(known, torch.long, job.device)
    if latest is None:
        return known_B
    drawn_B = latest.ids_B.index_select(0, numbers_to_device(drawn_at, torch.long, job.device))
    return torch.where(known_B >= 0, known_B, drawn_B)


def emit(job: Job, draw: Draw) -> list[Row]:
    """Give the rows of a step their tokens, forced or drawn; those that end by it, in the order of their slots."""
    eos_ids = job.eos_ids
    max_new_tokens = job.settings.max_new_tokens
    ended = []
    for row, drawn_id in zip(draw.rows, draw.read(), strict=True):
        if row.finish_reason:  # it ended in the step before, when this one had begun
            continue
        # 1) Force: where ids are pending, the first of them takes the place of what was drawn.
        token_id = drawn_id
        is_forced = False
        if row.pending:
            token_id = row.pending.popleft()
            is_forced = True

        # 2) Emit the token. The override, unless the token cannot matter to it, may answer with ids to force.
        row.token_ids.append(token_id)
        row.forced.append(is_forced)
        row.next_id = token_id
        is_end = token_id in eos_ids and not is_forced
        override = row.override
        if override is not None and not is_end:
            if is_forced or token_id in override.trigger_ids or not override.is_idle:
                row.pending.extend(override.push(token_id))
        if job.on_token is not None:
            job.on_token(row)

        # 3) End the row at an end token that the model chose (a forced one means nothing), or at its last position.
        if is_end:
            row.end("stop")
            ended.append(row)
        elif len(row.token_ids) == max_new_tokens:
            row.end("length")
            ended.append(row)
    return ended


def numbers_to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of the values, in memory that a GPU can read without the host's help."""
    return to_device(torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda"), device)


def prefilled_rows(job: Job, chunk: Chunk, n_slots: int, cache: Cache) -> Iterator[Row]:
    """The rows of a chunk before their first token, their prompts in the cache's rows after the slots.

    The next prompts are prefilled when the first of their rows is asked for. By then every row of the previous ones has
    been copied into a slot.
    """
    settings = job.settings
    n_together = prefill_batch(settings.slots, job.device)
    for start in range(0, len(chunk), n_together):
        groups = chunk[start : start + n_together]
        row_ids = range(n_slots, n_slots + len(groups))
        prompts = [group[0][1].prompt_ids for group in groups]
        first_ids = job.model.prefill(cache, row_ids, prompts)
        for group, row_id, first_id in zip(groups, row_ids, first_ids, strict=True):
            for request_index, request in group:
                row = Row(request_index, request, prefilled_row=row_id, next_id=first_id)
                if settings.temperature > 0:
                    row.uniforms = row_uniforms(settings, request.question, request.sample_index).tolist()
                if job.new_override is not None:
                    row.override = job.new_override()
                yield row
