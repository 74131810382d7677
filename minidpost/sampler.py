"""Batched decoding: a fixed number of slots, refilled as rows end; forced tokens; draws that belong to their row.

Knows nothing of text or arithmetic. A row's `override` sees each of its tokens and may answer with ids that must follow
(the calculator does so); the sampler's own draw at those positions is discarded. Every row draws its uniform numbers
from a counter-based generator keyed by (seed, question, sample), one a position, so that a completion depends neither
on its neighbours nor on the number of slots nor on the order of work. Requests are worked off in chunks that begin with
empty slots. All samples of one question share one prefill. One device-to-host transfer a step: the ids.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

CHUNK = 1024  # requests that begin with empty slots; part of what a run's results depend on (in fp32, by rounding)
SHELF = 16  # prompts prefilled together and kept beside the slots until all their samples have started


class DecodingModel(Protocol):
    """What the sampler asks of a model; see T5."""

    def new_cache(self, rows: int, max_prompt: int, max_new: int): ...
    def prefill(self, cache, rows: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[int]: ...
    def decode(self, cache, ids_B: Tensor) -> Tensor: ...


class Override(Protocol):
    """Watches one row: `push` takes each of its tokens in order and returns the ids that must come right after it."""

    def push(self, token_id: int) -> list[int]: ...


@dataclass(frozen=True)
class Sampling:
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

    prompt: tuple[int, ...]
    question: str
    sample: int = 0


@dataclass
class Completion:
    """The ids a row emitted (the end token too), which of them were forced, and why it ended: "stop" or "length"."""

    token_ids: list[int] = field(default_factory=list)
    forced: list[bool] = field(default_factory=list)
    finish_reason: str = "length"


@dataclass
class Row:
    """A request at work in a slot."""

    index: int
    uniforms: np.ndarray | None
    feed: int  # the id decoded next
    override: Override | None
    pending: deque[int] = field(default_factory=deque)  # forced ids still to be emitted
    completion: Completion = field(default_factory=Completion)

    def take(self, drawn_id: int, end_id: int, max_new_tokens: int) -> bool:
        """Emit the pending forced id or else the drawn one; whether the row has ended."""
        forced = bool(self.pending)
        self.feed = self.pending.popleft() if forced else drawn_id
        self.completion.token_ids.append(self.feed)
        self.completion.forced.append(forced)
        if self.feed == end_id and not forced:
            self.completion.finish_reason = "stop"
            return True
        if self.override is not None:
            self.pending.extend(self.override.push(self.feed))
        return len(self.completion.token_ids) >= max_new_tokens


def sample(
    model: DecodingModel,
    requests: Sequence[Request],
    settings: Sampling,
    end_id: int,
    new_override: Callable[[], Override] | None = None,
    first_chunk: int = 0,
) -> Iterator[tuple[int, Completion]]:
    """Yield (index into requests, completion) as rows end, each request once; those before `first_chunk` not at all.

    All of a chunk are yielded before any of the next. `new_override` makes the watcher of one row. Samples of one
    question should stand together in `requests`: those of one chunk share a prefill. Prompts must not be empty.
    """
    for start in range(first_chunk * CHUNK, len(requests), CHUNK):
        chunk = list(enumerate(requests[start : start + CHUNK], start=start))
        yield from _sample_chunk(model, chunk, settings, end_id, new_override)


def _sample_chunk(model, chunk, settings, end_id, new_override) -> Iterator[tuple[int, Completion]]:
    slots = min(settings.slots, len(chunk))
    longest = max(len(request.prompt) for _, request in chunk)
    cache = model.new_cache(slots + SHELF, longest, settings.max_new_tokens)
    waiting = _prefilled(model, cache, slots, chunk)
    rows: list[Row] = []

    def start(slot: int, index: int, request: Request, shelf_row: int, first_id: int) -> None:
        cache.copy_rows([shelf_row], [slot])
        uniforms = row_uniforms(settings, request) if settings.temperature else None
        rows[slot : slot + 1] = [Row(index, uniforms, first_id, new_override() if new_override else None)]

    for entry in islice(waiting, slots):
        start(len(rows), *entry)
    while rows:
        ended = _step(model, cache, rows, settings, end_id)
        yield from [(rows[slot].index, rows[slot].completion) for slot in ended]
        for slot in reversed(ended):
            if (entry := next(waiting, None)) is not None:
                start(slot, *entry)
            else:
                _close_gap(cache, rows, slot)


def _prefilled(model, cache, slots, chunk) -> Iterator[tuple[int, Request, int, int]]:
    """The chunk's requests, longest prompts first, each as (index, request, shelf row of its prompt, first id).

    The next SHELF prompts are prefilled when the first of their samples is asked for, by when every sample of the
    previous ones has been copied from the shelf into a slot.
    """
    groups: dict[tuple[int, ...], list[tuple[int, Request]]] = {}
    for index, request in chunk:
        groups.setdefault(request.prompt, []).append((index, request))
    prompts = iter(sorted(groups, key=len, reverse=True))
    while batch := list(islice(prompts, SHELF)):
        shelf = range(slots, slots + len(batch))
        first_ids = model.prefill(cache, shelf, batch)
        for prompt, row, first_id in zip(batch, shelf, first_ids, strict=True):
            yield from ((index, request, row, first_id) for index, request in groups[prompt])


def _step(model, cache, rows, settings, end_id) -> list[int]:
    """Emit one token in every row; the slots of those that ended."""
    device = next(model.parameters()).device
    logits_BV = model.decode(cache, torch.tensor([row.feed for row in rows], device=device))
    uniform_B = None
    if settings.temperature:
        drawn = [row.uniforms[len(row.completion.token_ids)] for row in rows]
        uniform_B = torch.tensor(drawn, dtype=torch.float64, device=device)
    ids = choose(logits_BV, uniform_B, settings).tolist()
    return [slot for slot, row in enumerate(rows) if row.take(ids[slot], end_id, settings.max_new_tokens)]


def _close_gap(cache, rows, slot) -> None:
    """Move the last row into a freed slot, so that the rows at work are always the cache's first."""
    last = rows.pop()
    if slot < len(rows):
        cache.copy_rows([len(rows)], [slot])
        rows[slot] = last


def row_uniforms(settings: Sampling, request: Request) -> np.ndarray:
    """A row's numbers in [0, 1), one for each token it may emit, from Philox keyed by (seed, question, sample)."""
    name = f"{settings.seed}\0{request.question}\0{request.sample}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).random(settings.max_new_tokens)


def choose(logits_BV: Tensor, uniform_B: Tensor | None, settings: Sampling) -> Tensor:
    """One id a row, (B,): the most likely one, or where the row's uniform number falls in the cumulated probabilities.

    The order is that of others' samplers: temperature, then top-k, then top-p (the fewest tokens that reach it).
    """
    if uniform_B is None:
        return logits_BV.argmax(-1)
    scores_BV = (logits_BV if logits_BV.dtype == torch.float64 else logits_BV.float()) / settings.temperature
    order_BV = None
    if settings.top_k:
        scores_BV, order_BV = scores_BV.topk(min(settings.top_k, scores_BV.shape[-1]), dim=-1)
    elif settings.top_p < 1:
        scores_BV, order_BV = scores_BV.sort(dim=-1, descending=True, stable=True)
    cumulated_BV = scores_BV.softmax(-1).cumsum(-1)
    reach_B1 = cumulated_BV[:, -1:]
    if settings.top_p < 1:
        last_B1 = torch.searchsorted(cumulated_BV, reach_B1 * settings.top_p).clamp(max=cumulated_BV.shape[-1] - 1)
        reach_B1 = cumulated_BV.gather(-1, last_B1)
    # Strictly below the reach, so that rounding never lets a draw fall behind the last token that has a probability.
    below_B1 = torch.nextafter(reach_B1, torch.zeros_like(reach_B1))
    target_B1 = torch.minimum(uniform_B[:, None].to(reach_B1.dtype) * reach_B1, below_B1)
    chosen_B1 = torch.searchsorted(cumulated_BV, target_B1, right=True)
    chosen_B1 = chosen_B1.clamp(max=scores_BV.shape[-1] - 1)  # where logits are NaN, the search ends behind the last
    return (chosen_B1 if order_BV is None else order_BV.gather(-1, chosen_B1))[:, 0]
