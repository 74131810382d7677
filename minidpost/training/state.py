"""Training that can be stopped at any step and continued bit for bit; and how Ctrl-C and SIGTERM stop it.

A training state is a safetensors file: fp32 weights, AdamW's moments, the number of the next step and the log so far;
of several processes a directory with a file of each. Weights are those that are trained; with LoRA that is the
adapters, and the file is small.
A step's examples and dropout are random numbers seeded by (seed, stage, step), so nothing else needs to be saved: the
steps that follow equal those of a training that was never stopped. States are written while training goes on
(saving.py), and get their names when they are whole, so that a kill leaves the last one or the one before.
"""

import hashlib
import signal
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from minidpost.errors import UserError
from minidpost.models.weights import open_tensors
from minidpost.processes import from_rank_0, is_lost_connection, is_of_backend, max_over_ranks, world_size
from minidpost.storage import no_room, read_json
from minidpost.training.optim import trained_parameters
from minidpost.training.parallel import is_spread, local_part, own_rows
from minidpost.training.saving import METADATA, Save, saved_states


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
        self.save: Save | None = None  # that is being written while training goes on; there is never more than one
        self.ended: Save | None = None  # the last one, which may still be removing what was saved before
        self.saved_at = 0.0  # time.monotonic() of the end of the last save, or of the start
        self.save_seconds = 0.0  # for which training stood still for the last save
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
        for saved in from_rank_0(saved_states(self.path) if self.path else []):
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
        """Save if it is time to, while training goes on; if asked to stop, save and then stop.

        Training stands still for saves at most a twentieth of the time. A save for which there is no room is given up
        with a warning; any other error in the writing of an earlier one is raised here. So is KeyboardInterrupt or
        Terminated, if training was asked to stop.
        """
        if self.path is None:
            return
        stop_signal, is_due, is_writing = max_over_ranks(
            self.stop_signal or 0, self._is_due(), self.save is not None and not self.save.is_written
        )
        # A save is ended when all processes have written, and at the latest when another one is to begin.
        if stop_signal or is_due or not is_writing:
            self._end_save()
        if stop_signal or is_due:
            log = Path(log_path).read_text(encoding="utf-8") if log_path else ""
            metadata = {"fingerprint": self.fingerprint, "next_step": str(step + 1), "log": log}
            tensors = state_tensors(trained_parameters(model), optimizer)
            self._begin_save(tensors, metadata, in_background=not stop_signal)
        if stop_signal:
            interrupt(stop_signal)

    def _is_due(self) -> bool:
        """Whether it is time to save: after every step, or when the last save was long enough ago."""
        if not self.minutes:
            return True
        pause = max(60 * self.minutes, 19 * self.save_seconds)
        return self.save is None and time.monotonic() - self.saved_at >= pause

    def _begin_save(self, tensors: dict[str, Tensor], metadata: dict[str, str], *, in_background: bool) -> None:
        """Begin to save; if that was not done in the background, end it too."""
        assert self.path is not None
        self.save_seconds = 0.0
        with self._standing_still():
            if self.ended is not None:
                self.ended.wait()
            self.save = Save(self.path, tensors, metadata, in_background=in_background)
        if self.save is not None and not self.save.is_in_background:
            self._end_save()

    def _end_save(self) -> None:
        """End the save that has been begun, if there is one: wait for it, and give it its name."""
        if self.save is None:
            return
        with self._standing_still():
            try:
                self.save.end()
            finally:
                self.ended = self.save
                self.save = None

    @contextmanager
    def _standing_still(self) -> Iterator[None]:
        """Count the seconds of the block, a part of a save, as such; lack of room in it is but a warning."""
        started = time.monotonic()
        try:
            yield
        except OSError as error:
            reason = no_room(error)
            if reason is None:
                raise
            warnings.warn(f"{self.path}: not saved ({reason}); training goes on", stacklevel=1)
        self.saved_at = time.monotonic()
        self.save_seconds += self.saved_at - started

    @contextmanager
    def around_steps(self) -> Iterator[None]:
        """Around the loop over a training's steps: signals wait for a step's end, and no thread outlasts the block."""
        with self._stops_between_steps():
            try:
                yield
                self._end_save()
            except BaseException as error:
                self._end_save_after(error)
                raise
            finally:
                if self.ended is not None:
                    self.ended.wait()

    def _end_save_after(self, error: BaseException) -> None:
        """End the save that was being written when an error ended the steps; it is the error that is to be raised."""
        if self.save is None:
            return
        if isinstance(error, Exception) and world_size() == 1:
            with suppress(Exception):
                self._end_save()
        else:  # somebody is in a hurry, or other processes may be elsewhere; the state that was saved before is there
            self.save.give_up()
            self.save = None

    @contextmanager
    def _stops_between_steps(self) -> Iterator[None]:
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
        missing = {"fingerprint", "next_step", "log"} - content.keys()
        if missing:
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
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
    """Read what several processes saved, by whatever number of ranks it was written and is read."""
    # Here, as it is slow to import, and one process alone hardly ever needs it.
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader = HuggingFaceStorageReader(str(directory))
    try:
        reader.read_metadata()  # `load` does so too, but where it cannot it first shows a traceback
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # that is what `no_dist` asks for
            load({**tensors}, storage_reader=reader, no_dist=world_size() == 1)
    except (Exception, CheckpointException) as error:  # of many kinds, from the planner, safetensors, the other ranks
        # What was raised on any rank comes as this, which is no Exception, and may have been Ctrl-C.
        reason: BaseException = error
        if isinstance(error, CheckpointException):
            reason = next(iter(error.failures.values()))[0]
        if not isinstance(reason, Exception) or is_lost_connection(reason) or is_of_backend(reason):
            raise reason from None
        raise UserError(f"{directory}: not a whole training state ({reason!r:.200}); remove it") from None


def fingerprint(*identity: object) -> str:
    """A hash of what stage, settings and data print as."""
    return hashlib.sha256(repr(identity).encode()).hexdigest()
