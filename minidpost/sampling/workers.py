"""Sampling in several processes, each with one thread; and the order in which their rows come out.

A decoding step of a small model is many short operations, in which threads gain little: on two cores two processes
took 0.8 of the time of two threads. So the slots are divided among worker processes, and the questions of each chunk
are dealt to them like cards. A fork shares the model's memory and costs milliseconds. Only on Linux, and not for models
on a GPU.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

MIN_SLOTS_PER_WORKER = 16  # slots, and questions, that a worker must have at least to be worth its process
MAX_PARAMETERS_FOR_WORKERS = 5_000_000  # in the products of larger models threads gain as much as processes


class Parametrised(Protocol):
    """A model, as far as the number of workers and the size of chunks depend on it: on its size and its device."""

    def parameters(self) -> Iterator[Tensor]: ...


class NumberedRow(Protocol):
    """A completion that knows which request it belongs to."""

    request_index: int


ItemT = TypeVar("ItemT")
RowT = TypeVar("RowT", bound=NumberedRow)
Group = Sequence[tuple[int, Any]]  # the requests of one prompt, each as (request_index, request)
Chunk = Sequence[Group]


def n_workers_for(model: Parametrised, n_slots: int, chunks: Sequence[Chunk]) -> int:
    """How many processes share the work: with a small model on a CPU as many as torch has threads, if it is enough."""
    is_small = sum(weight.numel() for weight in model.parameters()) < MAX_PARAMETERS_FOR_WORKERS
    is_on_cpu = next(model.parameters()).device.type == "cpu"
    if not (chunks and is_small and is_on_cpu and sys.platform == "linux"):
        return 1
    most = min(n_slots, len(chunks[0])) // MIN_SLOTS_PER_WORKER
    return max(1, min(torch.get_num_threads(), most))


def sample_in_workers(
    sample_chunks: Callable[[Sequence[Chunk], int], Iterator[RowT]],
    chunks: Sequence[Chunk],
    n_slots: int,
    n_workers: int,
) -> Iterator[RowT]:
    """Yield what `sample_chunks(chunks, n_slots)` yields, its work divided among processes.

    All rows of a chunk are yielded before any of the next, in whatever order they end.
    """
    slots_each = -(-n_slots // n_workers)
    jobs = []
    for worker in range(n_workers):
        # Of two workers the first takes questions 0, 2, 4 … of every chunk, the second 1, 3, 5 …
        dealt = [chunk[worker::n_workers] for chunk in chunks]
        jobs.append(partial(sample_chunks, dealt, slots_each))
    return in_chunk_order(run_in_workers(jobs), chunks)


def in_chunk_order(rows: Iterator[RowT], chunks: Sequence[Chunk]) -> Iterator[RowT]:
    """Rows as they come, but a worker that is ahead has its rows held back until all earlier chunks are complete."""
    chunk_of: dict[int, int] = {}  # by request_index
    n_missing = [0] * len(chunks)
    for chunk_index, chunk in enumerate(chunks):
        for group in chunk:
            n_missing[chunk_index] += len(group)
            chunk_of.update({request_index: chunk_index for request_index, _ in group})

    held_back: list[list[RowT]] = [[] for _ in chunks]
    current = 0
    for row in rows:
        chunk_index = chunk_of[row.request_index]
        held_back[chunk_index].append(row)
        n_missing[chunk_index] -= 1
        # Give out what there is of the current chunk; once it is complete, of the next as well.
        while current < len(chunks):
            yield from held_back[current]
            held_back[current].clear()
            if n_missing[current]:
                break
            current += 1


def run_in_workers(jobs: Sequence[Callable[[], Iterator[ItemT]]]) -> Iterator[ItemT]:
    """Run each job in a process of its own and yield what the jobs yield, as it comes; all end with this generator.

    A job's error is raised here. MemoryError where a process was killed: the system does that when memory runs out.
    """
    fork = multiprocessing.get_context("fork")
    readers: list[Connection] = []
    processes = []
    lifeline = fork.Pipe(duplex=False)  # nothing is written to it: it ends when this process does
    try:
        # 1) Start the processes, each with a pipe to here.
        for job in jobs:
            reader, writer = fork.Pipe(duplex=False)
            readers.append(reader)
            process = fork.Process(target=_run_job, args=(job, writer, *lifeline), daemon=True)
            processes.append(process)
            process.start()
            writer.close()
        # 2) Give out what they write, until all have ended.
        while readers:
            for ready in wait(readers):
                assert isinstance(ready, Connection)
                yield from _received(ready, readers)
    finally:
        # 3) Leave none behind, whether all is done, or an error was raised, or nobody wants the rest.
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
        for end in (*readers, *lifeline):
            end.close()


def _received(reader: Connection, readers: list[Connection]) -> Iterator[Any]:
    """The next item of a process, or none if this was its end."""
    try:
        kind, value = reader.recv()
    except EOFError:
        raise MemoryError("a process was killed, as happens when memory runs out") from None
    if kind == "error":
        raise value
    if kind == "item":
        yield value
    else:
        readers.remove(reader)
        reader.close()


def _run_job(
    job: Callable[[], Iterator[Any]], writer: Connection, lifeline: Connection, parents_end: Connection
) -> None:
    """The life of a process: it ends with its job or with its parent, which alone answers Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parents_end.close()
    threading.Thread(target=_end_with_parent, args=(lifeline,), daemon=True).start()
    torch.set_num_threads(1)
    try:
        for item in job():
            writer.send(("item", item))
        writer.send(("end", None))
    except Exception as error:
        writer.send(("error", error))


def _end_with_parent(lifeline: Connection) -> None:
    """Wait for the parent's end of the pipe to close, which it does however the parent ends."""
    lifeline.poll(None)
    os._exit(1)
