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
the chunk alone. Prompts are prefilled PREFILL_BATCH at a time, into rows of the cache after the slots, and copied into
a slot for each of their samples: all samples of one question in one chunk share one prefill. A step has one transfer
from the device, its ids. With a small model on a CPU the work is divided among processes (see workers); on a GPU steps
are CUDA graphs (see cuda_graphs).
"""

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

from minidpost.sampling.cuda_graphs import CUDAGraphs
from minidpost.sampling.token_choice import SamplingSettings, choose, row_uniforms
from minidpost.sampling.workers import n_workers_for, sample_in_workers

__all__ = ["CHUNK", "PREFILL_BATCH", "DecodingModel", "Override", "Request", "Row", "SamplingSettings", "sample"]

CHUNK = 1024  # requests that begin with empty slots; part of what a run's results depend on (in fp32, by rounding)
PREFILL_BATCH = 16  # prompts that are prefilled together


class Cache(Protocol):
    """What a model remembers of its rows, as far as the sampler handles it; see kvcache."""

    def clear(self) -> None: ...
    def copy_rows(self, source_ids: Sequence[int], target_ids: Sequence[int], /) -> None: ...


class DecodingModel(Protocol):
    """What the sampler asks of a model; see T5 and Llama."""

    def parameters(self) -> Iterator[Tensor]: ...
    def new_cache(self, n_rows: int, max_prompt: int, max_new: int, /) -> Cache: ...
    def prefill(self, cache: Any, row_ids: Sequence[int], prompts: Sequence[Sequence[int]], /) -> list[int]: ...
    def decode(self, cache: Any, ids_B: Tensor, /) -> Tensor: ...
    def step(self, cache: Any, plan: Any, ids_B: Tensor, /) -> Tensor: ...  # for CUDA graphs alone


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
    next_id: int = -1  # the token that the model is fed next
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
    max_prompt: int  # tokens of the longest prompt
    max_rows: int  # requests of the largest chunk

    @property
    def device(self) -> torch.device:
        """Where the model lies."""
        return next(self.model.parameters()).device


def sample(
    model: DecodingModel,
    requests: Sequence[Request],
    settings: SamplingSettings,
    eos_id: int | Collection[int],
    *,
    new_override: Callable[[], Override] | None = None,
    first_chunk: int = 0,
    chunk_indices: Iterable[int] | None = None,
    use_cuda_graphs: bool = True,
) -> Iterator[Row]:
    """Yield the rows of all requests as they end, each request's once; those before `first_chunk` not at all.

    A row ends at the end token `eos_id`, or at any of several. All rows of a chunk are yielded before any of the next.
    `new_override` makes the override of one row. Samples of one question should stand together in `requests`: those of
    one chunk share a prefill. Prompts must not be empty. With `chunk_indices` these chunks are worked off, in this
    order, each number asked for when it is its turn.
    """
    chunks = chunked(requests)
    # The longest of all prompts, worked off or not, so that a run that continues has caches of the same shape.
    max_prompt = max((len(request.prompt_ids) for request in requests), default=0)
    eos_ids = frozenset([eos_id] if isinstance(eos_id, int) else eos_id)
    job = Job(model, settings, eos_ids, new_override, use_cuda_graphs, max_prompt, min(len(requests), CHUNK))
    # Likewise of all chunks: how the questions of a chunk are dealt to workers decides which rows share a step.
    n_workers = n_workers_for(model, settings.slots, chunks)
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


def chunked(requests: Sequence[Request]) -> list[Chunk]:
    """The requests, CHUNK at a time, in groups of the same prompt, the longest prompts first."""
    chunks = []
    for start in range(0, len(requests), CHUNK):
        groups: dict[tuple[int, ...], Group] = {}
        for request_index, request in enumerate(requests[start : start + CHUNK], start=start):
            groups.setdefault(request.prompt_ids, []).append((request_index, request))
        chunks.append([groups[prompt] for prompt in sorted(groups, key=len, reverse=True)])
    return chunks


def sample_chunks(job: Job, chunks: Iterable[Chunk], n_slots: int) -> Iterator[Row]:
    """Work off chunk after chunk in this process, with one cache for all of them."""
    remaining = iter(chunks)
    chunk = next(remaining, None)
    if chunk is None:
        return
    n_cache_rows = min(n_slots, job.max_rows) + PREFILL_BATCH
    cache: Any = job.model.new_cache(n_cache_rows, job.max_prompt, job.settings.max_new_tokens)
    step: Callable[[Tensor], Tensor]
    if job.use_cuda_graphs and job.device.type == "cuda":
        step = CUDAGraphs(job.model, cache)
    else:
        step = partial(job.model.decode, cache)
    while chunk is not None:
        cache.clear()
        n_requests = sum(map(len, chunk))
        yield from sample_chunk(job, chunk, min(n_slots, n_requests), cache=cache, step=step)
        chunk = next(remaining, None)


def sample_chunk(
    job: Job, chunk: Chunk, n_slots: int, *, cache: Cache, step: Callable[[Tensor], Tensor]
) -> Iterator[Row]:
    """Work off one chunk: the loop of continuous batching. `step` feeds ids_B to the cache's first rows; logits_BV."""
    device = job.device
    is_greedy = job.settings.temperature == 0
    eos_ids = job.eos_ids
    max_new_tokens = job.settings.max_new_tokens

    # The rows at work: row i has slot i, which is row i of the cache.
    rows: list[Row] = []
    waiting = prefilled_rows(job, chunk, n_slots, cache)
    for slot in range(n_slots):
        row = next(waiting)
        cache.copy_rows([row.prefilled_row], [slot])
        rows.append(row)

    while rows:
        # 1) Feed the latest token of every row to the model, at the row's own position.
        logits_BV = step(torch.tensor([row.next_id for row in rows]).to(device))

        # 2) Choose a token for every row. Its ids are the step's one transfer from the device.
        uniform_B = None
        if not is_greedy:
            uniforms = [row.uniforms[len(row.token_ids)] for row in rows]
            uniform_B = torch.tensor(uniforms, dtype=torch.float64).to(device)
        chosen_ids: list[int] = choose(logits_BV, uniform_B, job.settings).tolist()

        ended = []  # slots
        for slot, row in enumerate(rows):
            # 3) Force: where ids are pending, the first of them takes the place of what was chosen.
            is_forced = bool(row.pending)
            token_id = row.pending.popleft() if is_forced else chosen_ids[slot]

            # 4) Emit the token. The override, unless the token cannot matter to it, may answer with ids to force.
            row.token_ids.append(token_id)
            row.forced.append(is_forced)
            row.next_id = token_id
            is_end = token_id in eos_ids and not is_forced
            override = row.override
            if override is not None and not is_end:
                if is_forced or not override.is_idle or token_id in override.trigger_ids:
                    row.pending.extend(override.push(token_id))

            # 5) End the row at an end token that the model chose (a forced one means nothing), or at its last position.
            if is_end:
                row.end("stop")
                ended.append(slot)
            elif len(row.token_ids) == max_new_tokens:
                row.end("length")
                ended.append(slot)
        yield from [rows[slot] for slot in ended]

        # 6) Refill the slots that are free, the last one first, so that none of the free ones is moved into another.
        for slot in reversed(ended):
            new_row = next(waiting, None)
            if new_row is not None:
                cache.copy_rows([new_row.prefilled_row], [slot])
                rows[slot] = new_row
                continue
            # Nothing waits. Rows 0 … n − 1 of the cache must be those at work: the last one moves here.
            last_row = rows.pop()
            if slot < len(rows):
                cache.copy_rows([len(rows)], [slot])
                rows[slot] = last_row


def prefilled_rows(job: Job, chunk: Chunk, n_slots: int, cache: Cache) -> Iterator[Row]:
    """The rows of a chunk before their first token, their prompts in the cache's rows after the slots.

    The next PREFILL_BATCH prompts are prefilled when the first of their rows is asked for. By then every row of the
    previous ones has been copied into a slot.
    """
    settings = job.settings
    for start in range(0, len(chunk), PREFILL_BATCH):
        groups = chunk[start : start + PREFILL_BATCH]
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
