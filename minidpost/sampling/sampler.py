"""Batched decoding: a fixed number of slots, refilled as rows end; forced tokens; draws that belong to their row.

Knows nothing of text or arithmetic. A row's `override` sees its tokens and may answer with ids that must follow (the
calculator does so); the sampler's own draw at those positions is discarded. Every row draws its uniform numbers from a
counter-based generator keyed by (seed, question, sample), one a position, so that a completion depends neither on its
neighbours nor on the number of slots nor on the order of work. Requests are worked off in chunks that begin with empty
slots. All samples of one question share one prefill. One device-to-host transfer a step: the ids.

With a small model on a CPU the slots are divided into lanes, one process each, to which a chunk's questions are dealt.
On a GPU steps are launched as a whole (see graphs); a cache that can be cleared serves all chunks.
What all rows share in a step is done for all at once; only rows whose token can matter are looked at one by one.
"""

import hashlib
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from minidpost.sampling.cuda_graphs import CUDAGraphs
from minidpost.sampling.token_choice import draw, most_likely, nucleus
from minidpost.sampling.workers import run_in_workers

CHUNK = 1024  # requests that begin with empty slots; part of what a run's results depend on (in fp32, by rounding)
PREFILL_BATCH = 16  # prompts prefilled together and kept beside the slots until all their samples have started
MIN_SLOTS_PER_WORKER = 16  # slots and questions at least, for which a process of their own pays
MAX_PARAMETERS_FOR_WORKERS = (
    5_000_000  # parameters; threads inside the products of larger models gain as much as processes
)


class DecodingModel(Protocol):
    """What the sampler asks of a model; see T5."""

    def new_cache(self, rows: int, max_prompt: int, max_new: int): ...
    def prefill(self, cache, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[int]: ...
    def decode(self, cache, ids_B: Tensor) -> Tensor: ...


class Override(Protocol):
    """Watches one row: `push` takes each of its tokens in order and returns the ids that must come right after it.

    One that has `trigger_ids`, a container of ids, is not shown any others while its `is_idle` is true.
    """

    def push(self, token_id: int) -> list[int]: ...


@dataclass(frozen=True)
class SamplingSettings:
    """How tokens are chosen. Temperature 0 is greedy; top_k 0 and top_p 1 keep the whole vocabulary."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 300
    slots: int = 64
    seed: int = 42


@dataclass(frozen=True)
class Request:
    """One completion to be sampled: the prompt's ids, the name of its question, and which sample of it this is."""

    prompt_ids: tuple[int, ...]
    question: str
    sample: int = 0


@dataclass
class Completion:
    """The ids a row emitted (the end token too), which of them were forced, and why it ended: "stop" or "length"."""

    token_ids: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    finish_reason: str = "length"


def sample(
    model: DecodingModel,
    requests: Sequence[Request],
    settings: SamplingSettings,
    eos_id: int,
    new_override: Callable[[], Override] | None = None,
    first_chunk: int = 0,
    use_cuda_graphs: bool = True,
) -> Iterator[tuple[int, Completion]]:
    """Yield (index into requests, completion) as rows end, each request once; those before `first_chunk` not at all.

    All of a chunk are yielded before any of the next. `new_override` makes the watcher of one row. Samples of one
    question should stand together in `requests`: those of one chunk share a prefill. Prompts must not be empty.
    On a GPU steps are CUDA graphs unless `use_cuda_graphs` is False.
    """
    chunks = [
        by_prompt(list(enumerate(requests[start : start + CHUNK], start=start)))
        for start in range(first_chunk * CHUNK, len(requests), CHUNK)
    ]
    longest = max(
        (len(request.prompt_ids) for request in requests), default=0
    )  # of all, done or not: caches stay alike
    n_workers = n_workers_for(model, settings, chunks)
    if n_workers == 1:
        for _, done in _sample_chunks(model, chunks, settings, eos_id, new_override, longest, use_cuda_graphs):
            yield done
        return

    def lane(number: int) -> Iterator[tuple[int, tuple[int, Completion]]]:
        share = replace(settings, slots=-(-settings.slots // n_workers))
        shares = [chunk[number::n_workers] for chunk in chunks]
        yield from _sample_chunks(model, shares, share, eos_id, new_override, longest, use_cuda_graphs)

    yield from _in_order(
        run_in_workers([partial(lane, number) for number in range(n_workers)]),
        [sum(len(group) for group in chunk) for chunk in chunks],
    )


def by_prompt(chunk: Sequence[tuple[int, Request]]) -> list[list[tuple[int, Request]]]:
    """Numbered requests in groups of the same prompt, the longest prompts first."""
    groups: dict[tuple[int, ...], list[tuple[int, Request]]] = {}
    for index, request in chunk:
        groups.setdefault(request.prompt_ids, []).append((index, request))
    return [groups[prompt] for prompt in sorted(groups, key=len, reverse=True)]


def n_workers_for(model: DecodingModel, settings: SamplingSettings, chunks: Sequence) -> int:
    """How many processes share the work: with a small model on a CPU as many as torch has threads, if it is enough."""
    is_small = sum(weight.numel() for weight in model.parameters()) < MAX_PARAMETERS_FOR_WORKERS
    if not (chunks and is_small and sys.platform == "linux" and next(model.parameters()).device.type == "cpu"):
        return 1
    return max(
        1, min(torch.get_num_threads(), settings.slots // MIN_SLOTS_PER_WORKER, len(chunks[0]) // MIN_SLOTS_PER_WORKER)
    )


def _in_order(done: Iterator[tuple[int, tuple[int, Completion]]], sizes: Sequence[int]) -> Iterator:
    """Of (chunk, item) as they come, the items: chunk by chunk, each as soon as all before its chunk are there."""
    waiting: list[list] = [[] for _ in sizes]
    missing, current = list(sizes), 0
    for chunk, item in done:
        waiting[chunk].append(item)
        missing[chunk] -= 1
        while current < len(sizes):
            yield from waiting[current]
            waiting[current].clear()
            if missing[current]:
                break
            current += 1


def _sample_chunks(
    model, chunks, settings, eos_id, new_override, longest, use_cuda_graphs
) -> Iterator[tuple[int, Any]]:
    """(the chunk's number, what is done of it), with one cache for all where the model's can be cleared."""
    most = max((sum(len(group) for group in chunk) for chunk in chunks), default=0)
    cache, n_slots = None, min(settings.slots, most)
    for number, chunk in enumerate(chunks):
        if hasattr(cache, "clear"):
            cache.clear()
        else:
            cache = model.new_cache(n_slots + PREFILL_BATCH, longest, settings.max_new_tokens)
            is_on_gpu = next(model.parameters()).device.type == "cuda"
            decode = CUDAGraphs(model, cache) if use_cuda_graphs and is_on_gpu else partial(model.decode, cache)
        for done in _sample_chunk(model, cache, decode, chunk, settings, eos_id, new_override):
            yield number, done


def _sample_chunk(model, cache, decode, chunk, settings, eos_id, new_override) -> Iterator[tuple[int, Completion]]:
    """Work off the groups of one chunk, beginning with empty slots."""
    n_slots = min(settings.slots, sum(len(group) for group in chunk))
    waiting = _prefilled(model, cache, n_slots, chunk)
    slots = Slots(n_slots, settings, eos_id, new_override)
    for _ in range(n_slots):
        slots.start(slots.n_rows, next(waiting), cache)
    while slots.n_rows:
        ended = _step(model, decode, slots)
        yield from [slots.completed(slot) for slot in ended]
        for slot in reversed(ended):
            if (entry := next(waiting, None)) is not None:
                slots.start(slot, entry, cache)
            else:
                slots.close(slot, cache)


def _prefilled(model, cache, n_slots, chunk) -> Iterator[tuple[int, Request, int, int]]:
    """The chunk's requests, each as (index, request, shelf row of its prompt, first id).

    The next PREFILL_BATCH prompts are prefilled when the first of their samples is asked for, by when every sample of
    the previous ones has been copied from the shelf into a slot.
    """
    groups = iter(chunk)
    while batch := list(islice(groups, PREFILL_BATCH)):
        shelf = range(n_slots, n_slots + len(batch))
        first_ids = model.prefill(cache, shelf, [group[0][1].prompt_ids for group in batch])
        for group, row, first_id in zip(batch, shelf, first_ids, strict=True):
            yield from ((index, request, row, first_id) for index, request in group)


def _step(model, decode, slots) -> list[int]:
    """Emit one token in every row; the slots of those that ended."""
    device = next(model.parameters()).device
    logits_BV = decode(torch.from_numpy(slots.feed_B[: slots.n_rows]).to(device))
    uniform_B = torch.from_numpy(slots.uniforms()).to(device) if slots.settings.temperature else None
    return slots.emit(np.array(choose(logits_BV, uniform_B, slots.settings).tolist()))


class Slots:
    """The rows at work, of which arrays hold what is the same for all; the first `n_rows` slots are taken."""

    def __init__(
        self, n_slots: int, settings: SamplingSettings, eos_id: int, new_override: Callable[[], Override] | None
    ):
        self.settings, self.eos_id, self.new_override, self.n_rows = settings, eos_id, new_override, 0
        shape = (n_slots, settings.max_new_tokens)
        self.index_B = np.zeros(n_slots, dtype=np.int64)
        self.feed_B = np.zeros(n_slots, dtype=np.int64)  # the id decoded next
        self.length_B = np.zeros(n_slots, dtype=np.int64)  # tokens emitted
        self.watched_B = np.zeros(n_slots, dtype=bool)  # whose next token matters, whatever it is
        self.token_BT = np.zeros(shape, dtype=np.int64)
        self.forced_BT = np.zeros(shape, dtype=bool)
        self.uniform_BT = np.zeros(shape if settings.temperature else (n_slots, 0))
        self.overrides: list[Override | None] = [None] * n_slots
        self.pending: list[deque[int]] = [deque() for _ in range(n_slots)]  # forced ids still to be emitted
        self.columns = [self.index_B, self.feed_B, self.length_B, self.watched_B, self.token_BT, self.forced_BT]
        self.columns += [self.uniform_BT, self.overrides, self.pending]
        self.wakes_V = np.zeros(1, dtype=bool)  # ids shown to dormant overrides; the last entry stands for all behind

    def start(self, slot: int, entry: tuple[int, Request, int, int], cache) -> None:
        """Begin a row in a slot: the first that is not taken, or that of a row that has ended."""
        self.index_B[slot], request, shelf_row, self.feed_B[slot] = entry
        cache.copy_rows([shelf_row], [slot])
        self.n_rows = max(self.n_rows, slot + 1)
        self.length_B[slot], self.forced_BT[slot], self.pending[slot] = 0, False, deque()
        if self.new_override:
            self.overrides[slot] = self.new_override()
            trigger_ids = getattr(self.overrides[slot], "trigger_ids", ())
            if trigger_ids and len(self.wakes_V) == 1:  # those of one run share it
                self.wakes_V = np.zeros(max(trigger_ids) + 2, dtype=bool)
                self.wakes_V[list(trigger_ids)] = True
        self.watched_B[slot] = self._is_alert(slot)
        if self.settings.temperature:
            self.uniform_BT[slot] = row_uniforms(self.settings, request)

    def uniforms(self) -> np.ndarray:
        """Each row's own number for the position that it draws next."""
        return self.uniform_BT[np.arange(self.n_rows), self.length_B[: self.n_rows]]

    def emit(self, id_B: np.ndarray) -> list[int]:
        """Emit in every row its pending forced id or else the drawn one; the slots of the rows that have ended."""
        row_B, position_B = np.arange(self.n_rows), self.length_B[: self.n_rows].copy()
        for slot in np.flatnonzero(self.watched_B[: self.n_rows]):
            if self.pending[slot]:
                id_B[slot] = self.pending[slot].popleft()
                self.forced_BT[slot, position_B[slot]] = True
        self.token_BT[row_B, position_B] = self.feed_B[: self.n_rows] = id_B
        self.length_B[: self.n_rows] += 1
        stopped_B = (id_B == self.eos_id) & ~self.forced_BT[row_B, position_B]
        for slot in np.flatnonzero((self.watched_B[: self.n_rows] | self._rouses(id_B)) & ~stopped_B):
            self.pending[slot].extend(self.overrides[slot].push(int(id_B[slot])))
            self.watched_B[slot] = self._is_alert(slot)
        return np.flatnonzero(stopped_B | (position_B + 1 >= self.settings.max_new_tokens)).tolist()

    def completed(self, slot: int) -> tuple[int, Completion]:
        """The request's index and the completion of a row that has ended."""
        tokens = self.token_BT[slot, : self.length_B[slot]].tolist()
        forced = self.forced_BT[slot, : len(tokens)].tolist()
        reason = "stop" if tokens[-1] == self.eos_id and not forced[-1] else "length"
        return int(self.index_B[slot]), Completion(tokens, forced, reason)

    def close(self, slot: int, cache) -> None:
        """Give up a slot: the last row moves into it, so that the rows at work are always the cache's first."""
        self.n_rows -= 1
        if slot < self.n_rows:
            cache.copy_rows([self.n_rows], [slot])
            for column in self.columns:
                column[slot] = column[self.n_rows]

    def _is_alert(self, slot: int) -> bool:
        """Whether the row's next token matters whatever it is."""
        override = self.overrides[slot]
        return bool(self.pending[slot]) or (override is not None and not getattr(override, "is_idle", False))

    def _rouses(self, id_B: np.ndarray) -> np.ndarray:
        """Which ids a dormant override must see."""
        return self.wakes_V[np.minimum(id_B, len(self.wakes_V) - 1)]


def row_uniforms(settings: SamplingSettings, request: Request) -> np.ndarray:
    """A row's numbers in [0, 1), one for each token it may emit, from Philox keyed by (seed, question, sample)."""
    name = f"{settings.seed}\0{request.question}\0{request.sample}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).random(settings.max_new_tokens)


def choose(logits_BV: Tensor, uniform_B: Tensor | None, settings: SamplingSettings) -> Tensor:
    """One id a row, (B,): the most likely one, or where the row's uniform number falls in the cumulated probabilities.

    The order is that of others' samplers: temperature, then top-k, then top-p (the fewest tokens that reach it).
    """
    if uniform_B is None:
        return most_likely(logits_BV)
    logits_BV = logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()
    if not settings.top_k and settings.top_p == 1:
        return draw(logits_BV, uniform_B, settings.temperature)
    if settings.top_k:
        logits_BN, order_BN = logits_BV.topk(min(settings.top_k, logits_BV.shape[-1]), dim=-1)
    else:
        logits_BN, order_BN = logits_BV.sort(dim=-1, descending=True, stable=True)
    scores_BN = logits_BN / settings.temperature
    chosen_B = draw(nucleus(scores_BN, settings.top_p) if settings.top_p < 1 else scores_BN, uniform_B)
    return order_BN.gather(-1, chosen_B[:, None])[:, 0]
