"""Recorded steps against plain ones, without a GPU: a tape that repeats, as a CUDA graph does, the very operations.

What a step computes in Python or takes from memory that is later elsewhere, a repetition does not see: it would give
other logits here as it would there.
"""

from collections.abc import Callable
from itertools import count

import pytest
import torch
from test_sampler import END, ragged_requests, tiny_llama, tiny_t5
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minidpost.models import kvcache
from minidpost.sampling import cuda_graphs, sampler
from minidpost.sampling.cuda_graphs import Graphs, Recorded, plain_steps, use_graphs
from minidpost.sampling.sampler import SamplingSettings, sample

torch.set_num_threads(1)
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique")  # no graph can hold what the host waits for


def tensors(tree: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def place(tensor: Tensor) -> int:
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
            given = set(map(place, tensors((args, kwargs))))
            again = operation(*args, **kwargs)
            for old, new in zip(tensors(result), tensors(again), strict=True):
                if place(old) not in given:
                    old.copy_(new)


class Recorder:
    """Counts what it records and what of that is repeated."""

    def __init__(self):
        self.n_recorded = self.n_replayed = 0

    def __call__(self, step: Callable[[Tensor], Tensor], feed_B: Tensor) -> Recorded:
        with torch.inference_mode(), Tape() as tape:
            logits_BV = step(feed_B)
        self.n_recorded += 1

        def replay() -> None:
            self.n_replayed += 1
            logits_BV.fill_(torch.nan)
            tape.replay()

        return Recorded(feed_B, torch.inference_mode()(replay), logits_BV)


@pytest.fixture
def recorder(monkeypatch) -> Recorder:
    """With it, samplings that begin record their steps."""
    recorder = Recorder()
    monkeypatch.setattr(sampler, "use_graphs", lambda cache, device: setattr(cache, "runner", Graphs(recorder)))
    return recorder


@pytest.mark.parametrize("make_model", [tiny_t5, tiny_llama])
@pytest.mark.parametrize("slots", [5, 12])
def test_recorded_steps_give_the_completions_of_plain_ones(recorder, make_model, slots, monkeypatch):
    """Over chunks, refills, samples of one prompt and the end of each chunk, where ever fewer rows are at work."""
    monkeypatch.setattr(sampler, "CHUNK", 40)
    monkeypatch.setattr(kvcache, "POSITIONS", 16)
    model, requests = make_model(), ragged_requests(16, 5)
    settings = SamplingSettings(0.8, max_new_tokens=40, slots=slots)
    got = list(sample(model, requests, settings, END))
    monkeypatch.setattr(sampler, "use_graphs", use_graphs)
    assert got == list(sample(model, requests, settings, END))
    assert 0 < recorder.n_recorded < recorder.n_replayed / 10


@pytest.mark.parametrize("make_model", [tiny_t5, tiny_llama])
def test_recorded_logits_are_the_plain_ones(make_model):
    """Row by row to the last bits, while rows come, go and grow past the sizes that were rounded up."""
    model, numbers, recorder = make_model(), torch.Generator().manual_seed(0), Recorder()
    recorded, plain = (model.new_cache(9, max_prompt=80, max_new=100) for _ in range(2))
    recorded.runner = Graphs(recorder)

    def draw(*shape: int) -> Tensor:
        return torch.randint(2, 40, shape, generator=numbers)

    ages = [0] * 6
    for step in range(150):
        restarted = [row for row in range(6) if step == 0 or ages[row] == 97 or draw(1) == 7]
        for row in restarted:
            prompt = draw(int(draw(1)) * 2).tolist()
            for cache in (recorded, plain):
                model.prefill(cache, [7], [prompt])
                cache.copy_rows([7], [row])
            ages[row] = 0
        n_rows = int(draw(1)) % 6 + 1
        ids_B = draw(n_rows)
        with torch.no_grad():
            torch.testing.assert_close(model.decode(recorded, ids_B), model.decode(plain, ids_B), rtol=0, atol=1e-12)
        ages[:n_rows] = [age + 1 for age in ages[:n_rows]]
    assert recorder.n_replayed == 150


def test_where_recording_fails_steps_are_plain_and_a_warning_says_so(monkeypatch):
    attempts = count()

    def fail(step: Callable[[Tensor], Tensor], feed_B: Tensor) -> Recorded:
        if next(attempts) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return Recorder()(step, feed_B)

    monkeypatch.setattr(sampler, "use_graphs", lambda cache, device: setattr(cache, "runner", Graphs(fail)))
    model, requests, settings = tiny_t5(), ragged_requests(12, 3), SamplingSettings(0.8, max_new_tokens=20, slots=8)
    with pytest.warns(UserWarning, match="no CUDA graphs.*capturing"):
        got = list(sample(model, requests, settings, END))
    assert next(attempts) == 3
    monkeypatch.setattr(sampler, "use_graphs", use_graphs)
    assert got == list(sample(model, requests, settings, END))


def test_graphs_are_for_gpus(monkeypatch):
    monkeypatch.setattr(cuda_graphs, "CUDARecorder", lambda device: Recorder())
    cache = tiny_t5().new_cache(1, 1, 1)
    use_graphs(cache, torch.device("cpu"))
    assert cache.runner is None
    with plain_steps():
        use_graphs(cache, torch.device("cuda"))
    assert cache.runner is None
    use_graphs(cache, torch.device("cuda"))
    assert isinstance(cache.runner, Graphs)
