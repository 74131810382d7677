"""Worker processes: what they yield, how they end, and that completions do not depend on them."""

import os
import signal
import sys
import time
from itertools import count

import pytest
import torch

from minidpost.models.t5 import T5, T5Config
from minidpost.sampling import sampler, workers
from minidpost.sampling.sampler import Request, Row, SamplingSettings, sample
from minidpost.sampling.workers import n_workers_for, run_in_workers

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_each_job_has_a_process_and_its_items_keep_their_order():
    items = list(run_in_workers([lambda name=name: ((name, os.getpid(), i) for i in range(50)) for name in "abc"]))
    assert len({pid for _, pid, _ in items} | {os.getpid()}) == 4
    for name in "abc":
        assert [i for other, _, i in items if other == name] == list(range(50))


def test_an_error_of_a_job_is_raised_here():
    def failing():
        yield 1
        raise ValueError("no such row")

    with pytest.raises(ValueError, match="no such row"):
        list(run_in_workers([failing, lambda: iter(count())]))


def test_a_killed_process_is_taken_for_one_without_memory():
    def killed():
        yield os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(MemoryError, match="killed"):
        list(run_in_workers([killed]))


def test_processes_end_with_the_generator():
    stream = run_in_workers([lambda: ((os.getpid(), i) for i in count())] * 2)
    pids = {pid for (pid, _), _ in zip(stream, range(2000), strict=False)}
    assert all(map(is_alive, pids))
    stream.close()
    assert not any(map(is_alive, pids))


def idle():
    yield os.getpid()
    time.sleep(60)


def test_processes_end_with_a_killed_parent():
    reader, writer = os.pipe()
    parent = os.fork()
    if not parent:
        stream = run_in_workers([idle])
        os.write(writer, str(next(stream)).encode())
        time.sleep(60)
        os._exit(1)
    pid = int(os.read(reader, 20))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 10
    while is_alive(pid) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(pid)


@pytest.fixture
def two_threads(monkeypatch):
    """As far as the sampler can see."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)


def content(row: Row) -> tuple[int, list[int], list[bool], str]:
    return row.request_index, row.token_ids, row.forced, row.finish_reason


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_rows_are_those_of_one_process_chunk_by_chunk(temperature, two_threads, monkeypatch):
    torch.manual_seed(3)
    model = T5(T5Config(40, 16, 8, 24, 2, 2, 2)).initialise().double().eval()
    requests = [Request((2 + i, 3 + i % 7, 5), f"q{i}", k) for i in range(35) for k in range(2)]
    settings = SamplingSettings(temperature, max_new_tokens=12, slots=8)
    monkeypatch.setattr(sampler, "CHUNK", 30)
    expected = list(sample(model, requests, settings, 1))
    monkeypatch.setattr(workers, "MIN_SLOTS_PER_WORKER", 4)
    assert n_workers_for(model, settings.slots, [[()] * 15]) == 2
    got = list(sample(model, requests, settings, 1))
    assert sorted(map(content, got)) == sorted(map(content, expected))
    chunks = [row.request_index // 30 for row in got]
    assert [{*chunks[start : start + 30]} for start in (0, 30, 60)] == [{0}, {1}, {2}]
    late = list(sample(model, requests, settings, 1, first_chunk=2))
    assert sorted(row.request_index for row in late) == list(range(60, 70))


def test_the_number_of_workers_does_not_depend_on_where_a_run_goes_on(two_threads, monkeypatch):
    """The last chunk alone has too few questions for two, but is divided as it is in the whole."""
    monkeypatch.setattr(workers, "MIN_SLOTS_PER_WORKER", 4)
    numbers = []
    monkeypatch.setattr(sampler, "sample_in_workers", lambda work, chunks, slots, n: numbers.append((len(chunks), n)))
    model = T5(T5Config(40, 16, 8, 24, 2, 2, 2)).initialise().eval()
    requests = [Request((2 + i, 5), f"q{i}") for i in range(17)]
    for first_chunk in range(3):
        sample(model, requests, SamplingSettings(slots=8), 1, first_chunk=first_chunk, chunk_size=8)
    assert numbers == [(3, 2), (2, 2), (1, 2)]


def test_a_chunk_may_have_fewer_questions_than_workers(two_threads, monkeypatch):
    """65 questions in chunks of 64, say: one is left for two workers."""
    monkeypatch.setattr(sampler, "CHUNK", 8)
    monkeypatch.setattr(workers, "MIN_SLOTS_PER_WORKER", 4)
    torch.manual_seed(3)
    model = T5(T5Config(40, 16, 8, 24, 2, 2, 2)).initialise().eval()
    requests = [Request((2 + i, 5), f"q{i}") for i in range(9)]
    rows = list(sample(model, requests, SamplingSettings(max_new_tokens=3, slots=8), 1))
    assert sorted(row.request_index for row in rows) == list(range(9))


def test_large_models_and_little_work_stay_in_one_process(two_threads, monkeypatch):
    """And so does the work of a single thread."""
    model = T5(T5Config(40, 16, 8, 24, 2, 2, 2))
    least, chunks = workers.MIN_SLOTS_PER_WORKER, [[()] * 64]
    assert n_workers_for(model, 64, chunks) == 2
    assert n_workers_for(model, least, chunks) == 1
    assert n_workers_for(model, 64, [[()] * least]) == 1
    assert n_workers_for(model, 64, []) == 1
    monkeypatch.setattr(workers, "MAX_PARAMETERS_FOR_WORKERS", 100)
    assert n_workers_for(model, 64, chunks) == 1
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert n_workers_for(model, 64, chunks) == 1
