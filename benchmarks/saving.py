"""Saving a training state: for how long training stands still, and how much slower the steps beside the writing are.

A Llama with random weights is trained in fp32, few tokens a step, so that steps are short and the state is large. In
turns a state is saved at once, as where memory has no room for a copy, and while training goes on: then training stands
still for the copy alone. Steps are timed alone, before each save, and beside the writing, as far as they began before
it was done: of one that outlasted it only a part was beside it. Saved is to the disk of the temporary directory, and
waited for until it is there (fsync); the state that was saved before is removed.

    python -m benchmarks.saving
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch

from benchmarks.common import RESULTS, instruction_set, machine_line, write_result
from minidpost.models.llama import Llama, LlamaConfig
from minidpost.selftraining.presets import n_parameters
from minidpost.storage import markdown_table
from minidpost.training import saving
from minidpost.training.batching import TokenizedExample
from minidpost.training.optim import Schedule, adamw, apply_step
from minidpost.training.sft import sft_gradients
from minidpost.training.state import TrainingState

CONFIG = LlamaConfig(8000, 768, 2048, 8, n_heads=12, n_kv_heads=12, d_head=64)
N_EXAMPLES = 4  # a step
N_TOKENS = 16  # of an example, source and target each
STEPS_ALONE = 3  # that are timed before each save
ROUNDS = 3


class Training:
    """A training whose steps are timed, and that is saved when it is told to."""

    def __init__(self, path: Path):
        torch.manual_seed(0)
        self.model = Llama(CONFIG).initialise().train()
        self.schedule = Schedule(1e-4)
        self.optimizer = adamw(self.model, self.schedule)
        ids = torch.randint(3, CONFIG.vocab_size, (N_EXAMPLES, 2, N_TOKENS)).tolist()
        self.batch = [TokenizedExample(tuple(source), tuple(target)) for source, target in ids]
        self.state = TrainingState(path, minutes=1e9)
        self.step = 0

    def seconds_of_step(self) -> float:
        """Make one step, the save after it not counted."""
        started = time.perf_counter()
        sft_gradients(self.model, self.batch, 10**6)
        apply_step(self.model, self.optimizer, self.schedule, step=self.step, n_steps=1000)
        self.step += 1
        return time.perf_counter() - started

    def after_step(self, minutes: float) -> None:
        """What the training loops do after a step: save if `minutes` is 0, end what was begun if it is written."""
        self.state.minutes = minutes
        self.state.after_step(self.step - 1, self.model, self.optimizer, None)
        self.state.minutes = 1e9


def at_once(training: Training) -> dict[str, float]:
    """The seconds that training stands still for a save without a copy."""
    with patch.object(saving, "available_memory", lambda: 0):
        training.after_step(0)
    return {"at once": training.state.save_seconds}


def in_background(training: Training) -> dict[str, float]:
    """The seconds of the copy, of the writing, and of a step beside it; how many steps these were."""
    training.after_step(0)
    copy_seconds = training.state.save_seconds
    started = time.perf_counter()
    beside: list[float] = []
    while training.state.save is not None:
        is_beside = not training.state.save.is_written
        seconds = training.seconds_of_step()
        if is_beside:
            beside.append(seconds)
        training.after_step(1e9)
    return {
        "copy": copy_seconds,
        "stands still": training.state.save_seconds,
        "until saved": time.perf_counter() - started,
        "steps beside": len(beside),
        "step beside": median(beside),
    }


def measured(n_threads: int, n_rounds: int, path: Path) -> dict[str, float]:
    """Medians over the rounds, both ways of saving in turns."""
    torch.set_num_threads(n_threads)
    training = Training(path)
    found: dict[str, list[float]] = {}
    ways: list[Callable[[Training], dict[str, float]]] = [at_once, in_background]
    for number in range(n_rounds + 1):
        for way in ways if number % 2 else ways[::-1]:
            alone = [training.seconds_of_step() for _ in range(STEPS_ALONE)]
            for name, value in {"step alone": median(alone), **way(training)}.items():
                if number > 0:  # the first round warms up
                    found.setdefault(name, []).append(value)
    return {name: median(values) for name, values in found.items()}


def busy_seconds() -> float:
    """The processor time that other processes of this machine have taken so far, over all cores (Linux tells it)."""
    fields = [int(field) for field in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:8]]
    idle = fields[3] + fields[4]  # with what waits for a disk
    own = os.times()
    return (sum(fields) - idle) / os.sysconf("SC_CLK_TCK") - own.user - own.system


def main() -> None:
    """Measure and write saving.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"(default: {ROUNDS})")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "saving.md", help="(default: benchmarks/results/saving.md)"
    )
    options = parser.parse_args()
    machine = machine_line()
    rows = []
    n_bytes = 0
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "state.safetensors")
        for n_threads in sorted({1, os.cpu_count() or 1}):
            started, others = time.perf_counter(), busy_seconds()
            seconds = measured(n_threads, options.rounds, path)
            others = (busy_seconds() - others) / (time.perf_counter() - started)
            n_bytes = path.stat().st_size
            slower = seconds["step beside"] / seconds["step alone"]
            row = [seconds[name] for name in ("at once", "stands still", "copy", "until saved")]
            rows.append(
                [
                    str(n_threads),
                    *(f"{value:.2f}" for value in row),
                    f"{seconds['steps beside']:.0f}",
                    f"{seconds['step alone']:.3f}",
                    f"{seconds['step beside']:.3f} ({slower:.2f} times)",
                    f"{others:.2f}",
                ]
            )
    heads = [
        "threads",
        "at once: stands still, s",
        "in the background: stands still, s",
        "of these the copy, s",
        "saved after, s",
        "steps meanwhile",
        "a step alone, s",
        "a step beside, s",
        "cores that others took",
    ]
    size = f"{n_parameters(Llama(CONFIG)) / 1e6:.0f} million parameters, a state of {n_bytes / 1e6:,.0f} MB"
    text = [
        f"`python -m benchmarks.saving` · {machine}, {instruction_set()}",
        *(__doc__ or "").strip().split("\n\n")[1:2],
        f"{size}; {N_EXAMPLES} examples of {2 * N_TOKENS} tokens a step; medians of {options.rounds} rounds. The last "
        "column is what other processes of the machine had of its cores meanwhile, the system's writing among it.",
        markdown_table(heads, rows),
    ]
    write_result(options.output, "Saving a training state", text)


if __name__ == "__main__":
    main()
