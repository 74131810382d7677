"""Recorded steps against plain ones, without a GPU: a tape that repeats, as a CUDA graph does, the very operations.

What a step computes in Python or takes from memory that is later elsewhere, a repetition does not see: it would give
other logits here as it would there.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from test_sampler import END, ragged_requests, tiny_llama, tiny_t5
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minidpost.models.kvcache import KVCache, T5Cache
from minidpost.models.llama import Llama
from minidpost.models.t5 import T5
from minidpost.sampling import cuda_graphs, sampler
from minidpost.sampling.cuda_graphs import CUDAGraphs, Recorded
from minidpost.sampling.sampler import SamplingSettings, sample

WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique")  # no graph can hold what the host waits for


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def address(tensor: Tensor) -> int:
    """Where in memory a tensor lies, the same for all its views."""
    return tensor.untyped_storage().data_ptr()


class Tape(TorchDispatchMode):
    """The operations of a step with the tensors that they had."""

    def __init__(self):
        super().__init__()
        self.entries = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert not any(name in operation.name() for name in WAITING), operation
        result = operation(*args, **(kwargs or {}))
        self.entries.append((operation, args, kwargs or {}, result))
        return result

    def replay(self) -> None:
        """Do all again; a new tensor is written to that of then, views and changes in place are there already."""
        for operation, args, kwargs, result in self.entries:
            given = set(map(address, tensors((args, kwargs))))
            again = operation(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again), strict=True):
                if address(old) not in given:
                    old.copy_(new)


class Recorder:
    """Counts what it records and what of that is repeated."""

    def __init__(self):
        self.n_recorded = self.n_replayed = 0

    def __call__(self, step: Callable[[Tensor], Tensor], ids_B: Tensor) -> Recorded:
        with torch.inference_mode(), Tape() as tape:
            logits_BV = step(ids_B)
        self.n_recorded += 1

        def replay() -> None:
            self.n_replayed += 1
            logits_BV.fill_(torch.nan)
            tape.replay()

        return Recorded(ids_B, torch.inference_mode()(replay), logits_BV)


class RecordedModel:
    """A model for `sample` that takes its steps as the sampler does on a GPU, but with a recorder of ours."""

    def __init__(self, model: T5 | Llama, record: Callable):
        self.model = model
        self.record = record

    def parameters(self) -> Iterator[Tensor]:
        return self.model.parameters()

    def decoding(self) -> AbstractContextManager[None]:
        return self.model.decoding()

    def new_cache(self, n_rows: int, max_prompt: int, max_new: int) -> T5Cache | KVCache:
        cache = self.model.new_cache(n_rows, max_prompt, max_new)
        self.step = CUDAGraphs(self.model, cache, self.record)
        return cache

    def prefill(self, cache, row_ids: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[int]:
        return self.model.prefill(cache, row_ids, prompts)

    def decode(self, cache, ids_B: Tensor) -> Tensor:
        assert cache is self.step.cache
        return self.step(ids_B)


@pytest.mark.parametrize("make_model", [tiny_t5, tiny_llama])
@pytest.mark.parametrize("slots", [5, 12])
def test_recorded_steps_give_the_completions_of_plain_ones(make_model, slots, monkeypatch):
    """Over chunks, refills, samples of one prompt and the end of each chunk, where ever fewer rows are at work."""
    monkeypatch.setattr(sampler, "CHUNK", 40)
    monkeypatch.setattr(cuda_graphs, "POSITIONS_MULTIPLE", 16)
    model, requests, recorder = make_model(), ragged_requests(16, 5), Recorder()
    settings = SamplingSettings(0.8, max_new_tokens=40, slots=slots)
    got = list(sample(RecordedModel(model, recorder), requests, settings, END))
    assert got == list(sample(model, requests, settings, END))
    assert 0 < recorder.n_recorded < recorder.n_replayed / 10


@pytest.mark.parametrize("make_model", [tiny_t5, tiny_llama])
def test_recorded_logits_are_the_plain_ones(make_model):
    """Row by row to the last bits, while rows come, go and grow past the sizes that were rounded up."""
    model, numbers, recorder = make_model(), torch.Generator().manual_seed(0), Recorder()
    recorded, plain = (model.new_cache(9, max_prompt=80, max_new=100) for _ in range(2))
    step = CUDAGraphs(model, recorded, recorder)

    def random_ids(*shape: int) -> Tensor:
        return torch.randint(2, 40, shape, generator=numbers)

    ages = [0] * 6
    for i in range(150):
        restarted = [row for row in range(6) if i == 0 or ages[row] == 97 or random_ids(1) == 7]
        for row in restarted:
            prompt = random_ids(int(random_ids(1)) * 2).tolist()
            for cache in (recorded, plain):
                model.prefill(cache, [7], [prompt])
                cache.copy_rows([7], [row])
            ages[row] = 0
        n_rows = int(random_ids(1)) % 6 + 1
        ids_B = random_ids(n_rows)
        torch.testing.assert_close(step(ids_B), model.decode(plain, ids_B), rtol=0, atol=1e-12)
        ages[:n_rows] = [age + 1 for age in ages[:n_rows]]
    assert recorder.n_replayed == 150


@pytest.mark.parametrize("make_model", [tiny_t5, tiny_llama])
def test_rows_at_work_stand_beside_full_ones(make_model):
    """A row that ended at the greatest length stays in the cache; a step of others is rounded up to it."""
    model = make_model()
    recorded, plain = (model.new_cache(4, max_prompt=5, max_new=3) for _ in range(2))
    step = CUDAGraphs(model, recorded, Recorder())
    for cache in (recorded, plain):
        model.prefill(cache, range(4), [[5, 6, 7, 8, 9], [3, 4], [6, 5, 3], [9]])
    tokens = recorded.own if isinstance(recorded, T5Cache) else recorded
    for _ in range(tokens.keys_LBGSK.shape[3] - tokens.longest(4)):
        ids_B = torch.tensor([2, 3, 4, 5])
        torch.testing.assert_close(step(ids_B), model.decode(plain, ids_B), rtol=0, atol=1e-12)
    for cache in (recorded, plain):  # row 0 is full, and moves to where no row is at work
        cache.copy_rows([0], [3])
        for row in (0, 1, 2):
            model.prefill(cache, [row], [[7, row + 2, 4]])
    assert tokens.lengths[3] == tokens.keys_LBGSK.shape[3]
    for _ in range(3):
        ids_B = torch.tensor([2, 3, 4])
        torch.testing.assert_close(step(ids_B), model.decode(plain, ids_B), rtol=0, atol=1e-12)


def test_where_recording_fails_a_warning_says_so():
    """From then on steps are plain, and nothing is recorded any more."""
    attempts = count()

    def fail(step: Callable[[Tensor], Tensor], ids_B: Tensor) -> Recorded:
        if next(attempts) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return Recorder()(step, ids_B)

    model, requests, settings = tiny_t5(), ragged_requests(12, 3), SamplingSettings(0.8, max_new_tokens=20, slots=8)
    with pytest.warns(UserWarning, match="no CUDA graphs.*capturing"):
        got = list(sample(RecordedModel(model, fail), requests, settings, END))
    assert next(attempts) == 3
    assert got == list(sample(model, requests, settings, END))


def test_a_lack_of_memory_in_recording_is_an_error():
    """Plain steps would be slow for good, where fewer slots would do."""

    def fail(step: Callable[[Tensor], Tensor], ids_B: Tensor) -> Recorded:
        raise torch.OutOfMemoryError("CUDA out of memory")

    recorded = RecordedModel(tiny_t5(), fail)
    with pytest.raises(torch.OutOfMemoryError):
        list(sample(recorded, ragged_requests(2, 3), SamplingSettings(max_new_tokens=5, slots=2), END))
    assert not recorded.step.has_failed


class ModelOf(RecordedModel):
    """A model that says it lies on some device."""

    def __init__(self, device: str):
        super().__init__(tiny_t5(), Recorder())
        self.device = torch.device(device)

    def parameters(self) -> Iterator[SimpleNamespace]:
        yield SimpleNamespace(device=self.device, numel=lambda: 10**9)


def test_graphs_are_for_gpus(monkeypatch):
    """And there only where they are wanted."""
    made = []

    def recorded_steps(model: ModelOf, n_rows: int, max_prompt: int, max_new: int) -> CUDAGraphs:
        made.append(model.device.type)
        return CUDAGraphs(model.model, model.model.new_cache(n_rows, max_prompt, max_new), Recorder())

    monkeypatch.setattr(sampler, "recorded_steps", recorded_steps)
    monkeypatch.setattr(sampler, "numbers_to_device", lambda values, dtype, _: torch.tensor(values, dtype=dtype))
    settings = SamplingSettings(max_new_tokens=3, slots=2)
    for device, use_cuda_graphs, expected in (("cpu", True, []), ("cuda", False, []), ("cuda", True, ["cuda"])):
        list(sample(ModelOf(device), ragged_requests(2, 1), settings, END, use_cuda_graphs=use_cuda_graphs))
        assert made == expected
