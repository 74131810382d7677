"""Training that can be stopped at any step and continued bit for bit; and how Ctrl-C and SIGTERM stop it.

A training state is one safetensors file: fp32 weights, AdamW's moments, the number of the next step and the log so far.
Weights are those that are trained; with LoRA that is the adapters, and the file is small.
A step's examples and dropout are random numbers seeded by (seed, stage, step), so nothing else needs to be saved: the
steps that follow equal those of a training that was never stopped. The file is written atomically (storage.py).
"""

import hashlib
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import torch
from safetensors.torch import save_file
from torch import nn

from minidpost.models.weights import open_tensors
from minidpost.storage import staged_file


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a command as Ctrl-C does, with another status."""


def interrupt(signal_number: int, _frame: FrameType | None = None) -> None:
    """A signal handler: raise what ends a command with status 130 (SIGINT) or 143 (SIGTERM)."""
    raise Terminated if signal_number == signal.SIGTERM else KeyboardInterrupt


class TrainingState:
    """Where one training is saved, how often, and whether it has been asked to stop.

    Without a path nothing is saved, and signals stop the training at once.
    """

    def __init__(self, path: Path | None = None, minutes: float = 5.0) -> None:
        self.path = path
        self.minutes = minutes  # between two saves
        self.next_step = 0  # the step that the training goes on with
        self.log = ""  # of the steps before it
        self.fingerprint = ""  # of what is being trained, with what
        self.saved_at = 0.0  # time.monotonic() of the last save, or of the start
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
        if self.path is None or not self.path.is_file():
            return

        with open_tensors(self.path) as file, torch.no_grad():
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != self.fingerprint:
                return
            # Names are "weight/NAME" for a parameter, "exp_avg/NAME" and so on for what AdamW keeps for it.
            for key in file.keys():
                kind, _, name = key.partition("/")
                weight = parameters[name]
                tensor = file.get_tensor(key)
                if kind == "weight":
                    weight.copy_(tensor)
                else:
                    optimizer.state[weight][kind] = tensor.to(weight.device, copy=True)
        self.log = metadata["log"]
        self.next_step = int(metadata["next_step"])

    def after_step(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, log_path: str | Path | None
    ) -> None:
        """Save if it is time to; if asked to stop, save and stop (KeyboardInterrupt or Terminated)."""
        if self.path is None:
            return
        is_due = time.monotonic() - self.saved_at >= 60 * self.minutes
        if self.stop_signal is None and not is_due:
            return

        tensors = {}
        for name, weight in trained_parameters(model).items():
            tensors[f"weight/{name}"] = weight.detach()
            for kind, value in optimizer.state[weight].items():
                tensors[f"{kind}/{name}"] = value
        log = Path(log_path).read_text(encoding="utf-8") if log_path else ""
        metadata = {"fingerprint": self.fingerprint, "next_step": str(step + 1), "log": log}
        with staged_file(self.path) as temporary:
            save_file(tensors, temporary, metadata)
        self.saved_at = time.monotonic()

        if self.stop_signal is not None:
            interrupt(self.stop_signal)

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


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model that are not frozen, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def fingerprint(*identity: object) -> str:
    """A hash of what stage, settings and data print as."""
    return hashlib.sha256(repr(identity).encode()).hexdigest()
