"""Work that is done side by side in forked processes, each with one thread.

A decoding step of a small model is many short operations; threads inside them, or beside each other under one
interpreter's lock, gain little, processes nearly the number of cores. A fork shares the model's memory and costs
milliseconds. Only on Linux, and not for models on a GPU.
"""

import ctypes
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait

import torch

PR_SET_PDEATHSIG = 1  # of prctl(2)


def side_by_side(jobs: Sequence[Callable[[], Iterator]]) -> Iterator:
    """Run each job in a process of its own and yield what the jobs yield, as it comes; all end with this generator.

    A job's error is raised here. MemoryError where a process was killed: the system does that when memory runs out.
    """
    fork = multiprocessing.get_context("fork")
    readers: list[Connection] = []
    processes = []
    try:
        for job in jobs:
            reader, writer = fork.Pipe(duplex=False)
            readers.append(reader)
            processes.append(fork.Process(target=_work, args=(job, writer, list(readers), os.getpid()), daemon=True))
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
        for reader in readers:
            reader.close()


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


def _work(job: Callable[[], Iterator], writer: Connection, readers: Sequence[Connection], parent: int) -> None:
    """The life of a process: it ends with its job or with its parent, which alone answers Ctrl-C."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it died before it could be watched
        return
    for reader in readers:
        reader.close()
    torch.set_num_threads(1)
    try:
        for item in job():
            writer.send(("item", item))
        writer.send(("end", None))
    except BrokenPipeError:
        pass
    except Exception as error:
        writer.send(("error", error))
