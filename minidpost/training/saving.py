"""Training states on their way to the disk, while training goes on.

After a step the tensors of a state are copied into the host's memory, for which training stands still, and a thread
writes the copies while the next steps change the tensors themselves. Where there is no room in memory for copies, the
tensors are written at once, one after the other, and training stands still until they are.

Every process writes a file of its own, and no thread speaks to another process: beginning and ending a save, which all
must do together, is for the threads that train. One process makes the file `state.safetensors`. Several make a
directory `state-0000042` (the next step) with a file of each, in the safetensors format of torch.distributed.checkpoint
(its HuggingFaceStorageReader reads them), and state.json. Its own format has a pickle, which could run code when it is
read; its writer of safetensors would hold every tensor three times, and let no step go on while it does so.
"""

import errno
import json
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from threading import Thread

import torch
from torch import Tensor

from minidpost.errors import is_out_of_memory
from minidpost.models.weights import WritableTensor, write_own_safetensors
from minidpost.processes import (
    available_memory,
    max_over_ranks,
    processes_of_machine,
    rank,
    world_size,
    write_on_rank_0,
)
from minidpost.storage import no_room, to_disk, write_json
from minidpost.training.parallel import is_spread, local_part, own_rows

METADATA = "state.json"  # of a state that several processes saved
ROOM = 1.2  # [ours] times the size of the copies must be free in memory


class Save:
    """One training state that is being saved: begun after a step, ended after a later one, or given up.

    All processes make one together. Each writes its part by itself, in a thread where every process has room in memory
    for a copy of its part (then `is_in_background`), else before this returns.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, in_background: bool
    ) -> None:
        """Begin to save `tensors` as they are now; `path` is TrainingState's, `metadata` has the next step.

        Without `in_background` they are written at once, whatever room there is. OSError, on all processes, where the
        disk has no room even to begin.
        """
        self.path = path
        self.metadata = metadata
        self.target = path
        if world_size() > 1:
            self.target = path.with_name(f"{path.stem}-{int(metadata['next_step']):07d}")
        self.unfinished = self.target.with_name(f"{self.target.name}.unfinished")
        self.error: Exception | None = None  # that ended the writing
        self.is_given_up = False
        self.thread: Thread | None = None

        write_on_rank_0(lambda: self._prepare(sum(tensor.nbytes for tensor in tensors.values())))
        parts = own_parts(tensors)
        header = metadata if world_size() == 1 else sharding_info(tensors, parts)
        copies = host_copies(parts) if in_background else None
        (is_short,) = max_over_ranks(copies is None)
        if copies is not None and not is_short:
            self.thread = Thread(target=self._write, args=(copies, header), name="saving")
            self.thread.start()
            return
        try:
            self._write(parts, header)
        except BaseException:  # a second Ctrl-C
            self._remove_half()
            raise

    @property
    def is_in_background(self) -> bool:
        """Whether steps may go on before the state is written."""
        return self.thread is not None

    @property
    def is_written(self) -> bool:
        """Whether this process has written its part, or failed to."""
        return self.thread is None or not self.thread.is_alive()

    def end(self) -> None:
        """Wait until all have written; the state then has its name, and those that were saved before are removed.

        Removing may take a while yet: until `wait` is called once more. OSError on all processes where one had no room:
        nothing is left of this state, the others are still there. Any other error of the writing is raised on its
        process alone.
        """
        self.wait()
        code = 0
        if isinstance(self.error, OSError) and no_room(self.error) is not None:
            code = self.error.errno or 0
        if self.error is not None and code == 0:
            self._remove_half()
            raise self.error
        try:
            (code,) = max_over_ranks(code)
            if code:
                raise OSError(code, os.strerror(code))
            if world_size() > 1:
                write_on_rank_0(self._finish)
        except OSError:
            if rank() == 0:
                remove(self.unfinished)
            raise

    def wait(self) -> None:
        """Wait until this process's thread is done; an interruption gives the save up."""
        if self.thread is None:
            return
        try:
            self.thread.join()
        except BaseException:  # a second Ctrl-C
            self.give_up()
            raise

    def give_up(self) -> None:
        """Stop writing before the next tensor, and wait until that is so."""
        self.is_given_up = True
        if self.thread is not None:
            self.thread.join()
        self._remove_half()

    def _prepare(self, n_bytes: int) -> None:
        """Remove what a kill left of an earlier save, and make the directory that processes write into.

        OSError where the disk has no room for the state: half of it would leave none for the log of the steps that go
        on beside it.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for left in self.path.parent.glob(f"{self.path.stem}*.unfinished"):
            remove(left)
        if shutil.disk_usage(self.path.parent).free < n_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if world_size() > 1:
            self.unfinished.mkdir()

    def _write(self, tensors: dict[str, Tensor], header: Mapping[str, str]) -> None:
        """Write this process's part, and let go of each tensor when it is written. Errors are kept for `end`.

        A single process gives the state its name at once; several agree on it, in `end`.
        """

        def values(name: str) -> Tensor:
            if self.is_given_up:
                raise InterruptedError(f"{self.path}: the save was given up")
            return tensors.pop(name)

        path = self.unfinished if world_size() == 1 else self.unfinished / f"rank-{rank():05d}.safetensors"
        writable = [
            WritableTensor(name, tuple(tensor.shape), tensor.dtype, partial(values, name))
            for name, tensor in tensors.items()
        ]
        try:
            write_own_safetensors(writable, path, header)
            to_disk(path)
            if world_size() == 1:
                self._finish()
        except Exception as error:
            self.error = error

    def _finish(self) -> None:
        """Give a state that all have written its name, and remove the others, for which no step waits."""
        if self.unfinished.is_dir():
            write_json(self.unfinished / METADATA, self.metadata)
            to_disk(self.unfinished)
        older = [path for path in saved_states(self.path) if path != self.target]
        if self.target.is_dir():  # of another training; a directory with files cannot be replaced
            shutil.rmtree(self.target)
        os.replace(self.unfinished, self.target)
        to_disk(self.target.parent)
        # To free the blocks of large files takes time.
        if world_size() == 1:  # and this is the thread that has written
            remove(*older)
        else:
            self.thread = Thread(target=remove, args=older, name="saving")
            self.thread.start()

    def _remove_half(self) -> None:
        """Remove what has been written; where other processes may be writing still, the next save does that."""
        if world_size() == 1:
            remove(self.unfinished)


def saved_states(path: Path) -> list[Path]:
    """What has been saved, and has its name: the file of one process, directories of several, the newest first."""
    directories = sorted(path.parent.glob(f"{path.stem}-*/{METADATA}"), reverse=True)
    whole = [metadata.parent for metadata in directories if metadata.parent.suffix != ".unfinished"]
    return [*([path] if path.is_file() else []), *whole]


def remove(*paths: Path) -> None:
    """Remove files and directories, those that are there; what cannot be removed is left for the next time."""
    for path in paths:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


# -- a process's part -------------------------------------------------------------------------------------------------


def own_parts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What this process writes: its slices of those tensors that are spread; of those that all have, rank 0's."""
    parts = {}
    for name, tensor in tensors.items():
        if not is_spread(tensor):
            if rank() == 0:
                parts[name] = tensor
        elif len(local_part(tensor)) > 0:
            parts[name] = local_part(tensor)
    return parts


def sharding_info(tensors: Mapping[str, Tensor], parts: Mapping[str, Tensor]) -> dict[str, str]:
    """What torch.distributed.checkpoint writes beside the parts: at which index of the tensor each of them begins."""
    info = {}
    for name, part in parts.items():
        offsets = [0] * part.dim()
        if is_spread(tensors[name]):
            offsets[0] = own_rows(len(tensors[name])).start
        info[name] = {"saved_offsets": offsets}
    return {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(info)}


def host_copies(tensors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """Copies of tensors in the host's memory, whole when this returns; None where there is no room for them."""
    n_bytes = sum(size_of_copy(tensor) for tensor in tensors.values())
    if available_memory() / processes_of_machine() < ROOM * n_bytes:
        return None
    try:
        copies = {name: host_copy(tensor) for name, tensor in tensors.items()}
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None
    for device in {tensor.device for tensor in tensors.values() if tensor.is_cuda}:
        torch.cuda.synchronize(device)  # all copies have been asked for; now they are waited for
    return copies


def host_copy(tensor: Tensor) -> Tensor:
    """A copy of a tensor in the host's memory; of a GPU's in pinned memory, not to be read before the GPU is done."""
    if not tensor.is_cuda:
        return tensor.clone(memory_format=torch.contiguous_format)
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def size_of_copy(tensor: Tensor) -> int:
    """The bytes that `host_copy` takes: torch pins memory in powers of two."""
    if not tensor.is_cuda:
        return tensor.nbytes
    # When a copy is let go of, torch keeps its pinned memory for the next one, which the system counts as taken: where
    # there was room for one copy but not for two, the next state is written without one.
    return 1 << max(0, tensor.nbytes - 1).bit_length()
