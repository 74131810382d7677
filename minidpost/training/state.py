"""What a stage in progress is continued from: checkpoints of a training, chunks of a sampling. And how both stop.

A checkpoint is one safetensors file: weights, AdamW's moments, the number of the next step, the log so far, and what
else the loop would have to compute again. A step's examples and dropout are drawn from (seed, stage, step), so that the
steps after it equal those of a training that was never stopped, bit for bit. The sampler begins each chunk with empty
slots, so that a chunk's completions depend on the chunk alone. Both are whole or absent (files.py).
"""

import hashlib
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from minidpost.models.weights import open_tensors
from minidpost.storage import staged_file


class Terminated(KeyboardInterrupt):
    """SIGTERM: ends a command as Ctrl-C does, with another status."""


def interrupt(number: int, _frame: object = None) -> None:
    """A signal handler: raise what ends a command with status 130 (SIGINT) or 143 (SIGTERM)."""
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


class Checkpoint:
    """Where one training keeps its state, and when it is asked to stop.

    `kept` are further tensors that are saved with it. Without a path nothing is saved, and signals do as always.
    """

    def __init__(self, path: Path | None = None, minutes: float = 5.0):
        self.path, self.minutes = path, minutes
        self.kept: dict[str, Tensor] = {}
        self.log = ""  # of the steps that are done
        self.stop: int | None = None  # the signal that asked for it

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, *identity: object) -> int:
        """Take up the state that was saved for the same `identity` (stage, settings, data); the step to go on with.

        That is 0, and nothing changes, where there is none. UserError where the file is broken.
        """
        self.fingerprint, self.saved = fingerprint(*identity), time.monotonic()
        if self.path is None or not self.path.is_file():
            return 0
        with open_tensors(self.path) as file, torch.no_grad():
            metadata = file.metadata() or {}
            if metadata.get("fingerprint") != self.fingerprint:
                return 0
            parameters = dict(model.named_parameters())
            for name in file.keys():
                kind, _, rest = name.partition("/")
                tensor = file.get_tensor(name)
                if kind == "weight":
                    parameters[rest].copy_(tensor)
                elif kind == "kept":
                    self.kept[rest] = tensor.to(next(model.parameters()).device)
                else:
                    weight = parameters[rest]
                    optimizer.state[weight][kind] = tensor.to(weight.device, copy=True)
        self.log = metadata["log"]
        return int(metadata["next_step"])

    def after(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, log_path: Path | None) -> None:
        """Save if it is time to; if asked to stop, save and do so."""
        if self.path is None or (self.stop is None and time.monotonic() - self.saved < 60 * self.minutes):
            return
        parameters = dict(model.named_parameters())
        tensors = {f"weight/{name}": weight.detach() for name, weight in parameters.items()}
        for name, weight in parameters.items():
            tensors |= {f"{kind}/{name}": value for kind, value in optimizer.state[weight].items()}
        tensors |= {f"kept/{name}": tensor for name, tensor in self.kept.items()}
        log = log_path.read_text(encoding="utf-8") if log_path else ""
        metadata = {"fingerprint": self.fingerprint, "next_step": str(step + 1), "log": log}
        with staged_file(self.path) as temporary:
            save_file(tensors, temporary, metadata)
        self.saved = time.monotonic()
        if self.stop is not None:
            interrupt(self.stop)

    @contextmanager
    def stops_between_steps(self) -> Iterator[None]:
        """Ctrl-C and SIGTERM wait for the end of the step, once; a second one does as always."""
        if self.path is None:
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        before = {number: handler for number, handler in before.items() if handler != signal.SIG_IGN}  # nohup

        def note(number: int, _frame: object) -> None:
            self.stop = number
            for other, handler in before.items():
                signal.signal(other, handler)

        try:
            for number in before:
                signal.signal(number, note)
            yield
            if self.stop is not None:  # asked for behind the last step
                interrupt(self.stop)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def fingerprint(*identity: object) -> str:
    """A hash of what stage, settings and data print as."""
    return hashlib.sha256(repr(identity).encode()).hexdigest()


def weights_fingerprint(model: nn.Module) -> str:
    """A hash of a model's parameters: names, precision and values."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {weight.dtype} {list(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
