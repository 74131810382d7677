"""Decoding steps as CUDA graphs: recorded once for each shape, then launched as a whole.

One step of a large model is a thousand kernels of a few microseconds, which Python cannot launch as fast as a GPU works
them off. A recorded step is the plain one, with the memory and the sizes that it had: so the cache rounds sizes up
(`fix`), that few shapes occur, and keeps in place whatever a step reads. Whatever lies behind the true sizes is masked,
or belongs to rows that nobody looks at. Not used on a CPU, which needs no launches.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

TOLERANCE = 0.05  # of the greatest logit: by how much a replayed step may differ from the plain one (bf16)


class FixedCache(Protocol):
    """A cache whose steps can be recorded; see kvcache.decoding_step."""

    runner: "Graphs | None"

    def fix(self, n_rows: int) -> tuple[int, ...]: ...  # the next step's shape, the number of rows first
    def release(self) -> None: ...  # steps have their true sizes again


@dataclass(frozen=True)
class Recorded:
    """A step that can be repeated: its ids are read from feed_B, its logits appear in logits_BV."""

    feed_B: Tensor
    replay: Callable[[], None]
    logits_BV: Tensor


class Graphs:
    """The recorded steps of one cache; where recording fails, steps are plain from then on, with a warning."""

    def __init__(self, record: Callable[[Callable[[Tensor], Tensor], Tensor], Recorded]):
        """`record` runs a step for the given ids and gives what can be repeated; RuntimeError where it cannot be."""
        self.record = record
        self.recorded: dict[tuple[int, ...], Recorded] = {}

    def run(self, step: Callable[[FixedCache, Tensor], Tensor], cache: FixedCache, ids_B: Tensor) -> Tensor:
        """What `step(cache, ids_B)` gives, logits_BV; they are overwritten by the next step."""
        n_rows, shape = len(ids_B), cache.fix(len(ids_B))
        if shape not in self.recorded:
            feed_B = torch.zeros(shape[0], dtype=ids_B.dtype, device=ids_B.device)
            feed_B[:n_rows] = ids_B
            try:
                self.recorded[shape] = self.record(partial(step, cache), feed_B)
            except RuntimeError as error:
                warnings.warn(f"no CUDA graphs, decoding will be slower ({error})", stacklevel=2)
                cache.runner = None
                cache.release()
                return step(cache, ids_B)
        recorded = self.recorded[shape]
        recorded.feed_B[:n_rows] = ids_B
        recorded.replay()
        return recorded.logits_BV[:n_rows]


class CUDARecorder:
    """Records steps on one device; they share a pool of memory, as they never run at once."""

    def __init__(self, device: torch.device):
        self.device = device
        with torch.cuda.device(device):
            self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[Tensor], Tensor], feed_B: Tensor) -> Recorded:
        """Run the step twice as it is, so that libraries are set up outside the graph; record it; compare the two."""
        with torch.cuda.device(self.device):
            return self._record(step, feed_B)

    def _record(self, step: Callable[[Tensor], Tensor], feed_B: Tensor) -> Recorded:
        here, aside = torch.cuda.current_stream(), torch.cuda.Stream()
        aside.wait_stream(here)
        with torch.cuda.stream(aside):
            for _ in range(2):
                expected_BV = step(feed_B)
        here.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            logits_BV = step(feed_B)
        graph.replay()
        limit = TOLERANCE * expected_BV.abs().max().item()
        if not torch.allclose(logits_BV, expected_BV, rtol=0, atol=limit, equal_nan=True):
            raise RuntimeError("a recorded step gave other logits than the plain one")
        return Recorded(feed_B, graph.replay, logits_BV)


_is_wanted = True


def use_graphs(cache: FixedCache, device: torch.device) -> None:
    """Have the steps of a new cache recorded, if it is on a GPU."""
    if _is_wanted and device.type == "cuda":
        cache.runner = Graphs(CUDARecorder(device))


@contextmanager
def plain_steps() -> Iterator[None]:
    """Samplings that begin inside use no graphs: to compare, or to look for a fault."""
    global _is_wanted
    before, _is_wanted = _is_wanted, False
    try:
        yield
    finally:
        _is_wanted = before
