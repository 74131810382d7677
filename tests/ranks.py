"""Work done by several processes, which meet at a store that the test holds, as under torchrun."""

import faulthandler
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from functools import cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from minidpost.processes import process_group, world_size

PATIENCE = 240  # seconds until processes that have not ended are taken for stuck

# Processes are forked, but from a server that has imported what is slow to import and has done nothing else. Those that
# are forked from the test itself inherit its sockets, and its locks without the threads that would open them: about one
# test in a hundred hangs.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    ["llama_oracle", "t5_oracle", "torch.distributed.checkpoint", "torch.distributed.fsdp", "torch.distributed.tensor"]
)


@cache
def start_server() -> None:
    """Start what processes are forked from; it is told by PYTHONPATH alone where modules lie."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
        forkserver.ensure_running()


def on_ranks(n_ranks: int, work: Callable[..., Any], *arguments: Any, are_joined: bool = True) -> list[Any]:
    """What a function gives on each of some processes; an error of one is raised here, and ends the others.

    `work` is a function of a module, and may end with SystemExit or os._exit, whose status is what it gives then. A
    command joins the other processes itself: then they are not joined here. Processes that are stuck raise
    TimeoutError, which tells where each of them is.
    """
    start_server()
    store = dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=60), wait_for_workers=False)
    readers = []
    processes = []
    with tempfile.TemporaryDirectory() as stacks:
        for number in range(n_ranks):
            reader, writer = CONTEXT.Pipe(duplex=False)
            readers.append(reader)
            where = (number, n_ranks, store.port, writer, are_joined, Path(stacks, f"{number}"))
            processes.append(CONTEXT.Process(target=_rank, args=(*where, work, arguments)))
            processes[-1].start()
            writer.close()
        try:
            results: dict[Connection, Any] = {}
            while len(results) < n_ranks:
                ready = wait([reader for reader in readers if reader not in results], PATIENCE + 30)
                if not ready:
                    shown = [f"rank {path.name}: {path.read_text()}" for path in sorted(Path(stacks).iterdir())]
                    raise TimeoutError("processes are stuck:\n" + "\n".join(shown))
                for reader in ready:
                    try:
                        results[reader], error = reader.recv()
                    except EOFError:  # it has ended without a word
                        process = processes[readers.index(reader)]
                        process.join()
                        results[reader], error = process.exitcode, None
                        if process.exitcode < 0:
                            raise ChildProcessError(f"a process ended with {process.exitcode}") from None
                    if error is not None:
                        raise error
            return [results[reader] for reader in readers]
        finally:
            for process in processes:
                process.join(20 if len(results) == n_ranks else 0)
                process.kill()
                process.join()


def wait_for_all() -> None:
    """Go on when every rank is here."""
    if world_size() > 1:
        dist.barrier()


def _rank(
    number: int,
    n_ranks: int,
    port: int,
    writer: Connection,
    are_joined: bool,
    stack: Path,
    work: Callable[..., Any],
    arguments: tuple,
) -> None:
    """The life of one process."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(n_ranks)}
    os.environ |= {"LOCAL_WORLD_SIZE": str(n_ranks)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    with stack.open("w") as file:
        faulthandler.dump_traceback_later(PATIENCE, file=file)
        try:
            with process_group() if are_joined else nullcontext():
                result = work(*arguments)
        except SystemExit as end:
            writer.send((end.code or 0, None))
        except BaseException as error:
            writer.send((None, error))
        else:
            writer.send((result, None))
        faulthandler.cancel_dump_traceback_later()
