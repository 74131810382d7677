"""Training that can be stopped at any step and continued bit for bit; and how Ctrl-C and SIGTERM stop it.

A training state is a safetensors file: fp32 weights, AdamW's moments, the number of the next step and the log so far;
of several processes a directory with a file of each. Weights are those that are trained; with LoRA that is the
adapters, and the file is small.
A step's examples and dropout are random numbers seeded by (seed, stage, step), so nothing else needs to be saved: the
steps that follow equal those of a training that was never stopped. The file is written atomically (storage.py).
"""

import hashlib
import os
import shutil
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from minidpost.errors import UserError
from minidpost.models.weights import open_tensors
from minidpost.processes import from_rank_0, is_lost_connection, max_over_ranks, rank, world_size, write_on_rank_0
from minidpost.storage import no_room, read_json, staged_file, to_disk, write_json
from minidpost.training.optim import trained_parameters
from minidpost.training.parallel import is_spread, local_part, own_rows

METADATA = "state.json"  # of a state that several processes saved


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a command as Ctrl-C does, with another status."""


def interrupt(signal_number: int, _frame: FrameType | None = None) -> None:
    """A signal handler: raise what ends a command with status 130 (SIGINT) or 143 (SIGTERM)."""
    raise Terminated if signal_number == signal.SIGTERM else KeyboardInterrupt


class TrainingState:
    """Where one training is saved, how often, and whether it has been asked to stop.

    Without a path nothing is saved, and signals stop the training at once. One process saves to the file `path`,
    several to a directory `path` with the step in its name, each its own slices; either is taken up by any number of
    processes.
    """

    def __init__(self, path: Path | None = None, minutes: float = 5.0) -> None:
        self.path = path
        self.minutes = minutes  # between two saves; 0: after every step
        self.next_step = 0  # the step that the training goes on with
        self.log = ""  # of the steps before it
        self.fingerprint = ""  # of what is being trained, with what
        self.saved_at = 0.0  # time.monotonic() of the end of the last save, or of the start
        self.save_seconds = 0.0  # that the last save took
        self.stop_signal: int | None = None  # the signal that asked to stop

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, *identity: object) -> None:
        """Take up the state that was saved for the same `identity` (stage, settings, data): sets `next_step`, `log`.

        Where there is none, or it is of something else or of other parameters, nothing changes: the training begins at
        step 0. UserError where the file is broken.
        """
        parameters = trained_parameters(model)
        shapes = [(name, tuple(weight.shape)) for name, weight in parameters.items()]
        self.fingerprint = fingerprint(*identity, shapes)
        self.saved_at = time.monotonic()
        for saved in self._saved():
            metadata = read_metadata(saved)
            if metadata.get("fingerprint") == self.fingerprint:
                for weight in parameters.values():  # moments have no memory before AdamW's first step
                    moments = {kind: torch.zeros_like(weight) for kind in ("exp_avg", "exp_avg_sq")}
                    optimizer.state[weight] = {"step": torch.zeros((), device=weight.device), **moments}
                fill(state_tensors(parameters, optimizer), saved)
                self.log = metadata["log"]
                self.next_step = int(metadata["next_step"])
                return

    def after_step(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, log_path: str | Path | None
    ) -> None:
        """Save if it is time to; if asked to stop, save and stop (KeyboardInterrupt or Terminated).

        Saves take at most a twentieth of the time. A save for which there is no room is given up with a warning.
        """
        if self.path is None:
            return
        pause = max(60 * self.minutes, 19 * self.save_seconds) if self.minutes else 0.0
        started = time.monotonic()
        stop_signal, is_due = max_over_ranks(self.stop_signal or 0, started - self.saved_at >= pause)
        if not stop_signal and not is_due:
            return

        log = Path(log_path).read_text(encoding="utf-8") if log_path else ""
        metadata = {"fingerprint": self.fingerprint, "next_step": str(step + 1), "log": log}
        try:
            self._save(state_tensors(trained_parameters(model), optimizer), metadata)
        except Exception as error:
            reason = no_room(error)
            if reason is None:
                raise
            warnings.warn(f"{self.path}: not saved ({reason}); training goes on", stacklevel=2)
        self.saved_at = time.monotonic()
        self.save_seconds = self.saved_at - started

        if stop_signal:
            interrupt(stop_signal)

    def _saved(self) -> list[Path]:
        """What has been saved, as rank 0 sees it: the file of one process, directories of several, the newest first."""
        if self.path is None:
            return []
        directories = sorted(self.path.parent.glob(f"{self.path.stem}-*/{METADATA}"), reverse=True)
        return from_rank_0([*([self.path] if self.path.is_file() else []), *(path.parent for path in directories)])

    def _save(self, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Save, and remove what was saved before."""
        assert self.path is not None
        older = self._saved()
        if world_size() == 1:
            with staged_file(self.path) as temporary:
                save_file(tensors, temporary, metadata)
            older = [path for path in older if path != self.path]
        else:
            directory = self.path.with_name(f"{self.path.stem}-{int(metadata['next_step']):07d}")
            save_slices(tensors, metadata, directory)
        if rank() == 0:
            for path in older:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink()

    @contextmanager
    def stops_between_steps(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM wait for the end of the step, so that it can be saved; a second one does not wait."""
        if self.path is None:
            yield
            return

        handlers = {}
        for number in (signal.SIGINT, signal.SIGTERM):
            handler = signal.getsignal(number)
            if handler != signal.SIG_IGN:  # nohup: what is ignored stays ignored
                handlers[number] = handler

        def restore_handlers() -> None:
            for number, handler in handlers.items():
                signal.signal(number, handler)

        def stop_after_step(number: int, _frame: FrameType | None = None) -> None:
            self.stop_signal = number
            restore_handlers()

        try:
            for number in handlers:
                signal.signal(number, stop_after_step)
            yield
            if self.stop_signal is not None:  # asked for after the last step was saved
                interrupt(self.stop_signal)
        finally:
            restore_handlers()


def state_tensors(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """What a training state holds: "weight/NAME" for a parameter, "exp_avg/NAME" and so on for AdamW's part of it."""
    tensors = {}
    for name, weight in parameters.items():
        tensors[f"weight/{name}"] = weight.detach()
        for kind, value in optimizer.state[weight].items():
            tensors[f"{kind}/{name}"] = value
    return tensors


def read_metadata(saved: Path) -> dict[str, str]:
    """Fingerprint, next step and log of a saved state; UserError where it is broken."""
    if saved.is_file():
        with open_tensors(saved) as file:
            return file.metadata() or {}
    try:
        content = read_json(saved / METADATA)
        if not isinstance(content, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise UserError(f"{saved / METADATA}: cannot be read ({error}); remove {saved}") from None
    return content


@torch.no_grad()
def fill(tensors: Mapping[str, Tensor], saved: Path) -> None:
    """Read a saved state into tensors of the same names, each rank its own slices; UserError where it is broken."""
    if saved.is_dir():
        load_slices(tensors, saved)
        return
    try:
        with open_tensors(saved) as file:
            for name, tensor in tensors.items():
                if is_spread(tensor):
                    local_part(tensor).copy_(file.get_slice(name)[own_rows(len(tensor))])
                else:
                    tensor.copy_(file.get_tensor(name))
    except (SafetensorError, RuntimeError) as error:
        raise UserError(f"{saved}: not a whole training state ({error}); remove it") from None


def load_slices(tensors: Mapping[str, Tensor], directory: Path) -> None:
    """Read what `save_slices` wrote, by whatever number of ranks it was written and is read."""
    # Here, as it is slow to import, and one process alone hardly ever needs it.
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(directory))
    try:
        load({**tensors}, storage_reader=reader, no_dist=world_size() == 1)
    except Exception as error:  # of many kinds, from the planner, safetensors and the other ranks
        if is_lost_connection(error):
            raise
        raise UserError(f"{directory}: not a whole training state ({error!r:.200}); remove it") from None


def save_slices(tensors: dict[str, Tensor], metadata: dict[str, str], directory: Path) -> None:
    """Every rank writes its slices into a directory, which has its name when it is whole.

    By torch.distributed.checkpoint, but as safetensors: its own format has a pickle, which could run code when it is
    read.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    unfinished = directory.with_name(f"{directory.name}.unfinished")
    writer = HuggingFaceStorageWriter(str(unfinished), save_distributed=True)

    def begin() -> None:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)

    def end() -> None:
        write_json(unfinished / METADATA, metadata)
        for path in (*unfinished.iterdir(), unfinished):
            to_disk(path)
        os.replace(unfinished, directory)
        to_disk(directory.parent)

    # Whichever rank fails, its error is raised on all of them.
    try:
        write_on_rank_0(begin)
        save({**tensors}, storage_writer=writer)
        write_on_rank_0(end)
    except (CheckpointException, OSError) as error:
        if rank() == 0:
            shutil.rmtree(unfinished, ignore_errors=True)
        if isinstance(error, CheckpointException):
            raise next(iter(error.failures.values()))[0] from None
        raise


def fingerprint(*identity: object) -> str:
    """A hash of what stage, settings and data print as."""
    return hashlib.sha256(repr(identity).encode()).hexdigest()
