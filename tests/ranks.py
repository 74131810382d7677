"""Work done by several processes, forked from the test's own, which holds the store that they meet at, as torchrun."""

import multiprocessing
import os
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

from minidpost.processes import process_group


def on_ranks(n_ranks: int, work: Callable[..., Any], *arguments: Any, are_joined: bool = True) -> list[Any]:
    """What a function gives on each of some processes; an error of one is raised here, and ends the others.

    `work` may end with SystemExit, whose status is what it gives then. A command joins the other processes itself:
    then they are not joined here.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
    fork = multiprocessing.get_context("fork")
    readers = []
    processes = []
    for number in range(n_ranks):
        reader, writer = fork.Pipe(duplex=False)
        readers.append(reader)
        process = fork.Process(target=_rank, args=(number, n_ranks, store.port, writer, are_joined, work, arguments))
        processes.append(process)
        process.start()
        writer.close()
    try:
        results = []
        for reader in readers:
            result, error = reader.recv()
            if error is not None:
                raise error
            results.append(result)
        return results
    finally:
        for process in processes:
            process.join(20)
            process.kill()
            process.join()


def _rank(
    number: int,
    n_ranks: int,
    port: int,
    writer: Connection,
    are_joined: bool,
    work: Callable[..., Any],
    arguments: Any,
) -> None:
    """The life of one process."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(n_ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(n_ranks)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    try:
        with process_group() if are_joined else nullcontext():
            result = work(*arguments)
    except SystemExit as end:
        writer.send((end.code or 0, None))
    except BaseException as error:
        writer.send((None, error))
    else:
        writer.send((result, None))
