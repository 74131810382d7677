"""Work that is done side by side in forked processes, each with one thread.

A decoding step of a small model is many short operations, in which threads gain little: on two cores two processes
took 0.8 of the time of two threads. A fork shares the model's memory and costs milliseconds. Only on Linux, and not for
models on a GPU.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait

import torch


def run_in_workers(jobs: Sequence[Callable[[], Iterator]]) -> Iterator:
    """Run each job in a process of its own and yield what the jobs yield, as it comes; all end with this generator.

    A job's error is raised here. MemoryError where a process was killed: the system does that when memory runs out.
    """
    fork = multiprocessing.get_context("fork")
    readers: list[Connection] = []
    processes = []
    lifeline = fork.Pipe(duplex=False)  # nothing is written to it: it ends when this process does
    try:
        for job in jobs:
            reader, writer = fork.Pipe(duplex=False)
            readers.append(reader)
            processes.append(fork.Process(target=_work, args=(job, writer, *lifeline), daemon=True))
            processes[-1].start()
            writer.close()
        while readers:
            for reader in wait(readers):
                yield from _received(reader, readers)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
        for end in (*readers, *lifeline):
            end.close()


def _received(reader: Connection, readers: list[Connection]) -> Iterator:
    """The next item of a process, or its end."""
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


def _work(job: Callable[[], Iterator], writer: Connection, lifeline: Connection, parents_end: Connection) -> None:
    """The life of a process: it ends with its job or with its parent, which alone answers Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parents_end.close()
    threading.Thread(target=lambda: lifeline.poll(None) and os._exit(1), daemon=True).start()
    torch.set_num_threads(1)
    try:
        for item in job():
            writer.send(("item", item))
        writer.send(("end", None))
    except Exception as error:
        writer.send(("error", error))
