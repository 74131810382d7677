"""Steps that begin before the host has read the one before: the same completions, and the host is never waited for."""

from collections.abc import Callable
from functools import partial
from itertools import zip_longest
from random import Random
from typing import ClassVar

import pytest
import torch
from test_cuda_graphs import RecordedModel, Recorder
from test_sampler import (
    CASES,
    END,
    TEXTS,
    Written,
    parse,
    ragged_requests,
    scripted,
    tiny_llama,
    tiny_t5,
    toy_calculator,
    without_results,
)
from torch import Tensor

from minidpost.models.kvcache import KVCache, T5Cache
from minidpost.models.llama import Llama
from minidpost.models.t5 import T5
from minidpost.sampling import cuda_graphs, sampler
from minidpost.sampling.sampler import Request, Row, SamplingSettings, sample


class Forcing:
    """Forces one to four ids after some tokens, by a rule of the row's own tokens; idle in between."""

    trigger_ids: ClassVar[frozenset[int]] = frozenset([7, 8, 9, 10, 11])
    n_forced = 0

    def __init__(self) -> None:
        self.seen: list[int] = []
        self.n_left = 0

    @property
    def is_idle(self) -> bool:
        return self.n_left == 0

    def push(self, token_id: int) -> list[int]:
        self.seen.append(token_id)
        if self.n_left:
            self.n_left -= 1
            return []
        if token_id not in self.trigger_ids:
            return []
        self.n_left = token_id - 7
        Forcing.n_forced += self.n_left
        # The end token among what is forced: it means nothing there.
        return [END, 3, 7, 4][: self.n_left]


def written(rows: list[Row]) -> list[Written]:
    in_order = sorted(rows, key=lambda row: row.request_index)
    return [Written(row.token_ids, row.forced, row.finish_reason) for row in in_order]


@pytest.mark.parametrize("make_model", [tiny_t5, tiny_llama])
@pytest.mark.parametrize(("slots", "temperature"), [(1, 0.8), (5, 0.0), (12, 0.8), (64, 0.0)])
def test_completions_are_the_same(make_model, slots, temperature, monkeypatch):
    """Over chunk borders, refills, forced runs, ends by token and by length, and rows that move at a chunk's end."""
    monkeypatch.setattr(sampler, "CHUNK", 25)
    monkeypatch.setattr(sampler, "PREFILL_BATCH", 3)
    model: T5 | Llama = make_model()
    requests = ragged_requests(14, 4)
    settings = SamplingSettings(temperature, max_new_tokens=17, slots=slots)

    Forcing.n_forced = 0
    plain = list(sample(model, requests, settings, END, new_override=Forcing, overlap=False))
    assert Forcing.n_forced > 20
    overlapped = list(sample(model, requests, settings, END, new_override=Forcing, overlap=True))
    assert written(overlapped) == written(plain)
    assert {row.finish_reason for row in plain} == {"stop", "length"}
    for first in range(0, len(requests), 25):  # every row of a chunk comes before any of the next
        indices = [row.request_index for row in overlapped[first : first + 25]]
        assert sorted(indices) == list(range(first, min(first + 25, len(requests))))


@pytest.mark.parametrize("make_model", [tiny_t5, tiny_llama])
def test_completions_of_recorded_steps_are_the_same(make_model, monkeypatch):
    monkeypatch.setattr(sampler, "CHUNK", 40)
    monkeypatch.setattr(cuda_graphs, "POSITIONS_MULTIPLE", 16)
    monkeypatch.setattr(cuda_graphs, "MIN_ROWS", 1)
    model, requests, recorder = make_model(), ragged_requests(16, 5), Recorder()
    settings = SamplingSettings(0.8, max_new_tokens=40, slots=12)
    plain = list(sample(model, requests, settings, END, new_override=Forcing, overlap=False))
    recorded = RecordedModel(model, recorder)
    overlapped = list(sample(recorded, requests, settings, END, new_override=Forcing, overlap=True))
    assert written(overlapped) == written(plain)
    assert 0 < recorder.n_recorded < recorder.n_replayed / 5


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 6, 11, 40])
@pytest.mark.parametrize("slots", [1, 3])
def test_the_calculators_results_come_in_time(slots, max_new_tokens):
    """Every case of the calculator's: what the model chooses where an id is forced is the end, and is thrown away."""
    expected = [parse(case) for case in CASES.values()]
    scripts = [[*without_results(*case, "END"), END] for case in expected]  # a row is decoded once more after its end
    settings = SamplingSettings(max_new_tokens=max_new_tokens, slots=slots)

    def run(overlap: bool) -> list[Written]:
        model, requests = scripted(scripts, len(TEXTS))
        return written(list(sample(model, requests, settings, END, new_override=toy_calculator(), overlap=overlap)))

    assert run(overlap=True) == run(overlap=False)


def test_a_step_begins_before_the_one_before_is_read(monkeypatch):
    """And each is read before the second one after it begins, as what it forces must be fed there."""
    events: list[str] = []
    model, requests = scripted([[2] * 6 + [END, 2]], 4)
    decode = model.decode
    monkeypatch.setattr(model, "decode", lambda cache, ids_B: events.append("step") or decode(cache, ids_B))
    read = sampler.Draw.read
    monkeypatch.setattr(sampler.Draw, "read", lambda draw: events.append("read") or read(draw))
    (row,) = sample(model, requests, SamplingSettings(max_new_tokens=20, slots=2), END, overlap=True)
    assert row.token_ids == [2] * 6 + [END]
    assert events == ["step", *["step", "read"] * 7]


def test_an_ended_row_is_decoded_once_more():
    """That is all that overlapping costs: one row-step for each completion, at most."""
    scripts = [[*[2] * (i * 7 % 9), END, 2] for i in range(30)]
    model, requests = scripted(scripts, 4)
    rows = list(sample(model, requests, SamplingSettings(max_new_tokens=20, slots=4), END, overlap=True))
    assert [w.token_ids for w in written(rows)] == [script[:-1] for script in scripts]
    n_tokens = sum(len(script) - 1 for script in scripts)
    assert n_tokens < sum(model.batches) <= n_tokens + len(scripts)


def test_random_work_is_the_same_work(monkeypatch):
    """Many small cases with random sizes."""
    numbers = Random(5)
    model = tiny_t5()
    for _ in range(25):
        monkeypatch.setattr(sampler, "CHUNK", numbers.randint(1, 20))
        monkeypatch.setattr(sampler, "PREFILL_BATCH", numbers.randint(1, 4))
        requests: list[Request] = ragged_requests(numbers.randint(1, 6), numbers.randint(1, 4))
        settings = SamplingSettings(
            temperature=numbers.choice([0.0, 0.7, 1.5]),
            max_new_tokens=numbers.randint(1, 12),
            slots=numbers.randint(1, 9),
            top_k=numbers.choice([0, 5]),
        )
        runs = [
            written(list(sample(model, requests, settings, END, new_override=Forcing, overlap=overlap)))
            for overlap in (False, True)
        ]
        assert runs[0] == runs[1], (settings, sampler.CHUNK, sampler.PREFILL_BATCH)


@pytest.fixture
def own_recorder(monkeypatch):
    """What is kept of a model is recorded without a GPU."""

    class OwnRecorder(cuda_graphs.CUDAGraphs):
        def __init__(self, model: T5 | Llama, cache: T5Cache | KVCache):
            super().__init__(model, cache, Recorder())

    monkeypatch.setattr(cuda_graphs, "CUDAGraphs", OwnRecorder)


@pytest.mark.usefixtures("own_recorder")
def test_a_models_cache_and_recorded_steps_are_kept():
    """While it has the room and the weights lie where they lay; and no longer than the model lives."""
    model = tiny_t5()
    steps = cuda_graphs.recorded_steps(model, 8, 30, 20)
    assert cuda_graphs.recorded_steps(model, 8, 30, 20) is steps
    assert cuda_graphs.recorded_steps(model, 4, 12, 20) is steps
    larger = cuda_graphs.recorded_steps(model, 6, 33, 20)
    assert larger is not steps
    assert cuda_graphs.recorded_steps(model, 8, 33, 20) is larger  # it has the room of both
    model.embedding.weight.data = model.embedding.weight.data.clone()
    assert cuda_graphs.recorded_steps(model, 4, 12, 20) is not larger
    assert model in cuda_graphs._kept
    n_kept = len(cuda_graphs._kept)
    del model
    assert len(cuda_graphs._kept) == n_kept - 1


@pytest.mark.usefixtures("own_recorder")
@pytest.mark.parametrize("make_model", [tiny_t5, tiny_llama])
def test_kept_steps_follow_weights_trained_in_place(make_model):
    """T5's position bias among them, of which a cache has a copy."""
    model: T5 | Llama = make_model()
    prompts = [[5, 6, 7], [8, 9, 3]]

    def logits(step: Callable[[Tensor], Tensor], cache: T5Cache | KVCache) -> list[Tensor]:
        cache.clear()
        model.prefill(cache, range(2), prompts)
        return [step(torch.tensor(ids)).clone() for ids in ([4, 5], [7, 3], [2, 9])]

    first = cuda_graphs.recorded_steps(model, 2, 3, 8)
    before = logits(first, first.cache)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.3)
    again = cuda_graphs.recorded_steps(model, 2, 3, 8)
    assert again is first
    plain = model.new_cache(2, 3, 8)
    expected = logits(partial(model.decode, plain), plain)
    torch.testing.assert_close(logits(again, again.cache), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(before[-1], expected[-1])


@pytest.mark.usefixtures("own_recorder")
def test_two_unfinished_samplings_of_a_model_share_nothing(monkeypatch):
    """The second gets a cache of its own; what is kept is free again when a sampling has ended or is given up."""
    model, settings = tiny_t5(), SamplingSettings(0.8, max_new_tokens=12, slots=4)
    both = ragged_requests(3, 4), ragged_requests(4, 3)[1:]
    expected = [written(list(sample(model, requests, settings, END))) for requests in both]
    job = sampler.Job

    def on_gpu(**values: object) -> sampler.Job:
        return job(**values | {"use_cuda_graphs": True})

    monkeypatch.setattr(sampler, "Job", on_gpu)
    first, second = (sample(model, requests, settings, END) for requests in both)
    rows: list[list[Row]] = [[next(first)], [next(second)]]
    for row_1, row_2 in zip_longest(first, second):  # in turns
        rows[0] += [row_1] if row_1 else []
        rows[1] += [row_2] if row_2 else []
    assert [written(rows_of_one) for rows_of_one in rows] == expected

    kept = cuda_graphs._kept[model].steps
    given_up = sample(model, both[0], settings, END)
    next(given_up)
    assert kept.is_in_use
    given_up.close()
    assert not kept.is_in_use


@pytest.mark.usefixtures("own_recorder")
@pytest.mark.parametrize("make_model", [tiny_t5, tiny_llama])
def test_recorded_masks_have_whole_lengths(make_model, monkeypatch):
    """Up to a cache's end."""
    monkeypatch.setattr(cuda_graphs, "POSITIONS_MULTIPLE", 16)
    model: T5 | Llama = make_model()
    steps, plain = cuda_graphs.recorded_steps(model, 2, 7, 19), model.new_cache(2, 7, 19)
    for cache in (steps.cache, plain):
        model.prefill(cache, range(2), [[5, 6, 7, 8, 9, 3, 4], [3, 4]])
    for _ in range(19):
        ids_B = torch.tensor([2, 3])
        torch.testing.assert_close(steps(ids_B), model.decode(plain, ids_B), rtol=0, atol=1e-12)
    for _, n_read, *of_prompts in steps.recorded:  # rows, positions; prompts, their columns and positions
        assert n_read % 8 == 0 and (not of_prompts or of_prompts[-1] % 8 == 0)
    assert max(n_read for _, n_read, *_ in steps.recorded) in (24, 32)
