"""Decoding steps as CUDA graphs: recorded once for each shape, then launched as a whole.

One step of a large model is a thousand kernels of a few microseconds each, and Python cannot launch them as fast as a
GPU completes them. A recorded step is always the same operations on the same memory. So that few shapes occur, the
sizes of a step's plan (see kvcache) are rounded up; so that a recording stays valid, the plan's tensors are copied to
tensors that stay in place. What lies after the true sizes is masked, or belongs to rows that nobody looks at. None of
this is used on a CPU, which launches nothing.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from minidpost.models.kvcache import KVCache, PromptPlan, StepPlan, T5Cache, T5Plan, whole_length

POSITIONS_MULTIPLE = 64  # positions that a step reads are rounded up to a multiple of this
MIN_ROWS = 16  # rows are rounded up to a power of two, and to this: below it a step takes no less time
TOLERANCE = 0.05  # of the greatest logit: by how much a replayed step may differ from the plain one (bf16)


class SteppedModel(Protocol):
    """A model whose `decode` is `cache.plan`, its own `step`, and `cache.advance`; see T5 and Llama."""

    def parameters(self) -> Iterator[Tensor]: ...
    def new_cache(self, n_rows: int, max_prompt: int, max_new: int, /) -> Any: ...
    def refresh(self, cache: Any, /) -> None: ...
    def decode(self, cache: Any, ids_B: Tensor) -> Tensor: ...
    def step(self, cache: Any, plan: Any, ids_B: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class PlannedStep:
    """A step of a model whose plan is settled: a function of the ids alone."""

    model: SteppedModel
    cache: KVCache | T5Cache
    plan: StepPlan | T5Plan

    def __call__(self, ids_B: Tensor) -> Tensor:
        return self.model.step(self.cache, self.plan, ids_B)


@dataclass(frozen=True)
class Recorded:
    """A step that can be repeated: its ids are read from ids_B, its logits appear in logits_BV."""

    ids_B: Tensor
    replay: Callable[[], None]
    logits_BV: Tensor


class Recorder(Protocol):
    """Runs a step for the given ids and gives what can be repeated; RuntimeError where that cannot be."""

    def __call__(self, step: PlannedStep, ids_B: Tensor) -> Recorded: ...


class CUDAGraphs:
    """Called like `model.decode` of one cache, `step(ids_B) -> logits_BV`, but replays recorded steps.

    Where recording fails, steps are plain from then on, with a warning; a lack of memory is the caller's to mend. The
    logits are overwritten by the next step.
    """

    def __init__(self, model: SteppedModel, cache: KVCache | T5Cache, record: Recorder | None = None):
        """`record` is CUDA's own unless another is given."""
        # The model is not kept alive by what is kept for it, see `recorded_steps`.
        self._model = weakref.ref(model)
        self.cache = cache
        self.padding = Padding(cache)
        self.record = CUDARecorder(self.padding.tokens.length_B.device) if record is None else record
        self.recorded: dict[tuple[int, ...], Recorded] = {}
        self.has_failed = False
        self.is_in_use = False

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Within this block nobody else is given these steps and their cache, see `recorded_steps`."""
        self.is_in_use = True
        try:
            yield
        finally:
            self.is_in_use = False

    @property
    def model(self) -> SteppedModel:
        """The model whose steps these are."""
        model = self._model()
        assert model is not None
        return model

    def __call__(self, ids_B: Tensor) -> Tensor:
        """Feed one token to each of the cache's first B rows; logits_BV of what follows."""
        if self.has_failed:
            return self.model.decode(self.cache, ids_B)
        with torch.inference_mode():
            plan = self.cache.plan(len(ids_B))
            logits_BV = self._step(plan, ids_B)
            self.cache.advance(len(ids_B))
        return logits_BV

    def _step(self, plan: StepPlan | T5Plan, ids_B: Tensor) -> Tensor:
        """What `model.step` gives for the plan, (B, V)."""
        n_rows = len(ids_B)
        # 1) Round the sizes of the plan up.
        padded = self.padding.pad(plan)
        sizes = sizes_of(padded)
        # 2) Record a step of these sizes, if it is the first.
        if sizes not in self.recorded:
            padded_ids_B = torch.zeros(sizes[0], dtype=ids_B.dtype, device=ids_B.device)
            padded_ids_B[:n_rows] = ids_B
            try:
                self.recorded[sizes] = self.record(PlannedStep(self.model, self.cache, padded), padded_ids_B)
            except torch.OutOfMemoryError:  # a RuntimeError, but with fewer rows there will be graphs
                raise
            except RuntimeError as error:
                warnings.warn(f"no CUDA graphs, decoding will be slower ({error})", stacklevel=3)
                self.has_failed = True
                return self.model.step(self.cache, plan, ids_B)
        # 3) Repeat it with the ids of now.
        recorded = self.recorded[sizes]
        recorded.ids_B[:n_rows] = ids_B
        recorded.replay()
        return recorded.logits_BV[:n_rows]


@dataclass(frozen=True)
class Kept:
    """A model's latest cache, its sizes, the steps that were recorded with it, and where the weights lay then."""

    sizes: tuple[int, ...]
    steps: CUDAGraphs
    addresses: tuple[int, ...]


# The latest of each model. Recording takes a second or two, and a model is sampled from several times: its greedy
# answers to each set of questions, its samples.
_kept: weakref.WeakKeyDictionary[SteppedModel, Kept] = weakref.WeakKeyDictionary()


def recorded_steps(model: SteppedModel, n_rows: int, max_prompt: int, max_new: int) -> CUDAGraphs:
    """Steps of a model, and their `cache` with room for so much: those of its latest call where they have the room.

    Both lengths are rounded up (`whole_length`), so that what is read of a cache has such a length even at its end.
    What is kept lives as long as the model. Where its weights have moved since, all is recorded anew; where they have
    changed in their place, what was recorded reads the new ones. Steps that are in use are left to whom they belong.
    """
    sizes = (n_rows, whole_length(max_prompt), whole_length(max_new))
    addresses = tuple(weight.data_ptr() for weight in model.parameters())
    kept = _kept.get(model)
    if kept is not None and kept.steps.is_in_use:
        kept = None
    if kept is not None and kept.addresses == addresses:
        if all(there >= asked for there, asked in zip(kept.sizes, sizes, strict=True)):
            model.refresh(kept.steps.cache)
            return kept.steps
    if kept is not None:
        # Its memory is free before more is taken, and what is asked for next may be as much as was there.
        n_rows, max_prompt, max_new = map(max, kept.sizes, sizes)
        sizes = (n_rows, max_prompt, max_new)
        del _kept[model], kept
    steps = CUDAGraphs(model, model.new_cache(*sizes))
    _kept[model] = Kept(sizes, steps, addresses)
    return steps


def sizes_of(plan: StepPlan | T5Plan) -> tuple[int, ...]:
    """Rows and positions that are read; of T5 also prompts, rows a prompt, and positions of prompts."""
    if isinstance(plan, StepPlan):
        return len(plan.position_B), plan.n_read
    return *sizes_of(plan.own), *plan.prompts.table_QR.shape, plan.prompts.bias_Q11S.shape[-1]


class Padding:
    """Rounds the sizes of one cache's plans up, and puts them into tensors that stay where they are."""

    def __init__(self, cache: KVCache | T5Cache):
        self.cache = cache
        self.tokens = cache.own if isinstance(cache, T5Cache) else cache
        with torch.inference_mode():
            self.position_B = torch.zeros_like(self.tokens.length_B)  # of all rows; a plan has the first ones
        # Prompts: the tensors of each size, and the last plan that was padded, with what became of it.
        self.prompts: dict[tuple[int, ...], PromptPlan] = {}
        self.n_columns = 1
        self.latest: tuple[PromptPlan, PromptPlan] | None = None

    def pad(self, plan: StepPlan | T5Plan) -> StepPlan | T5Plan:
        """The same step with its sizes rounded up, and more rows, whose logits mean nothing."""
        if isinstance(plan, StepPlan):
            return self.pad_tokens(plan)
        own = self.pad_tokens(plan.own)
        return T5Plan(own, self.pad_prompts(plan.prompts, len(own.position_B)))

    def pad_tokens(self, plan: StepPlan) -> StepPlan:
        """Rows are rounded up to a power of two, positions to a multiple.

        The additional rows are the cache's next ones. They write where their own next token would go, after all that
        is valid of them; such a row may be full, and is then one that has ended.
        """
        _, n_cache_rows, _, max_tokens, _ = self.tokens.keys_LBGSK.shape
        n_padded = min(max(power_of_two(len(plan.position_B)), MIN_ROWS), n_cache_rows)
        position_B = self.position_B[:n_padded]
        torch.clamp(self.tokens.length_B[:n_padded], max=max_tokens - 1, out=position_B)
        return StepPlan(self.tokens.row_B[:n_padded], position_B, rounded_up(plan.n_read, max_tokens))

    def pad_prompts(self, plan: PromptPlan, n_padded: int) -> PromptPlan:
        """Prompts and rows a prompt are rounded up to powers of two, positions to a multiple."""
        assert isinstance(self.cache, T5Cache)
        if self.latest is not None and self.latest[0] is plan:  # no row has changed its prompt since
            return self.latest[1]
        n_rows = len(plan.cell_of_row_B)
        n_prompts, n_columns = plan.table_QR.shape
        n_read = plan.bias_Q11S.shape[-1]
        _, max_prompts, _, max_tokens, _ = self.cache.prompt.store.keys_LBGSK.shape
        # Columns never become fewer: a prompt whose samples end one by one is no new shape each time.
        self.n_columns = max(self.n_columns, power_of_two(n_columns))
        n_padded_prompts = min(power_of_two(n_prompts), max_prompts)
        padded = self._prompts_of(n_padded, n_padded_prompts, self.n_columns, rounded_up(n_read, max_tokens))

        # The table has more lines, and each line more columns; what is added asks for row 0, as other fillers do.
        padded.table_QR.zero_()
        padded.table_QR[:n_prompts, :n_columns] = plan.table_QR
        # Cells are counted line by line: with lines of 4 instead of 3, the cell of line 1 and column 0 is 4, not 3.
        line_B = plan.cell_of_row_B // n_columns
        column_B = plan.cell_of_row_B % n_columns
        padded.cell_of_row_B.zero_()
        padded.cell_of_row_B[:n_rows] = line_B * self.n_columns + column_B
        # After a prompt's tokens there is nothing to read. A prompt that is none has no tokens; for attention that is
        # told of no lengths, as torch's, everything is let through there, so that no sum is 0.
        padded.length_Q.zero_()
        padded.length_Q[:n_prompts] = plan.length_Q
        padded.bias_Q11S.zero_()
        padded.bias_Q11S[:n_prompts].fill_(-torch.inf)
        padded.bias_Q11S[:n_prompts, ..., :n_read] = plan.bias_Q11S
        self.latest = (plan, padded)
        return padded

    def _prompts_of(self, n_rows: int, n_prompts: int, n_columns: int, n_read: int) -> PromptPlan:
        """The tensors that a padded plan of these sizes has."""
        sizes = (n_rows, n_prompts, n_columns, n_read)
        if sizes not in self.prompts:
            row_B = self.tokens.row_B  # for its device and type
            self.prompts[sizes] = PromptPlan(
                table_QR=row_B.new_zeros(n_prompts, n_columns),
                cell_of_row_B=row_B.new_zeros(n_rows),
                length_Q=row_B.new_zeros(n_prompts),
                bias_Q11S=self.tokens.keys_LBGSK.new_zeros(n_prompts, 1, 1, n_read),
            )
        return self.prompts[sizes]


def rounded_up(n_positions: int, most: int) -> int:
    """Up to a multiple of POSITIONS_MULTIPLE, but not above `most`."""
    return min(-(-n_positions // POSITIONS_MULTIPLE) * POSITIONS_MULTIPLE, most)


def power_of_two(size: int) -> int:
    """The least power of two that is not below the size."""
    return 1 << (size - 1).bit_length()


class CUDARecorder:
    """Records steps on one device; they share a pool of memory, as they never run at once."""

    def __init__(self, device: torch.device):
        self.device = device
        with torch.cuda.device(device):
            self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: PlannedStep, ids_B: Tensor) -> Recorded:
        """Record a step, replay it, and compare with the plain one; RuntimeError where its logits are others."""
        with torch.cuda.device(self.device):
            # 1) Run the step as it is, on a stream of its own, so that libraries are set up outside the graph.
            current = torch.cuda.current_stream()
            other = torch.cuda.Stream()
            other.wait_stream(current)
            with torch.cuda.stream(other):
                expected_BV = step(ids_B)
            current.wait_stream(other)
            # 2) Record it. Where that fails torch may stay on the stream that was recorded.
            graph = torch.cuda.CUDAGraph()
            try:
                with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
                    logits_BV = step(ids_B)
            finally:
                torch.cuda.set_stream(current)
            # 3) Compare.
            graph.replay()
            limit = TOLERANCE * expected_BV.abs().max().item()
            if not torch.allclose(logits_BV, expected_BV, rtol=0, atol=limit, equal_nan=True):
                raise RuntimeError("a recorded step gave other logits than the plain one")
            return Recorded(ids_B, graph.replay, logits_BV)
