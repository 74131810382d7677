"""A model of a billion random parameters: the memory of loading and saving it, and the steps beside a save.

Each measurement is a process of its own, or two that torchrun starts (gloo). What a process has to itself (RssAnon and
RssShmem) is looked at every two milliseconds; pages of files that are mapped are counted apart, as the system takes
them back when it needs memory. In flight is what is written or read, as far as it must be in memory at one time: the
process's own part of it, and what is made for the writing, which is the copies of a training state, or of a finished
model that lies in slices the largest tensor, whole. Saving a training state beside the steps is held against the same
steps alone.

AdamW's states of a billion parameters and copies of them do not fit into 24 GiB: with all weights trained the state is
written without copies there, and training stands still. With the upper half of the layers and the head trained, the
others frozen, there is room for copies, and the steps go on.

    python -m benchmarks.large_model
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from threading import Event, Thread
from typing import Any

import torch

from benchmarks.common import RESULTS, instruction_set, machine_line, status_bytes, write_result
from minidpost.cli import run_command
from minidpost.models.hf_config import Model, mapping_for
from minidpost.models.llama import LlamaConfig
from minidpost.models.weights import WritableTensor, empty_model, load_model, write_directory
from minidpost.processes import rank, world_size
from minidpost.selftraining.presets import n_parameters
from minidpost.selftraining.steps import save_trained
from minidpost.storage import markdown_table
from minidpost.training.batching import TokenizedExample
from minidpost.training.optim import Schedule, adamw, apply_step, trained_parameters
from minidpost.training.parallel import load_spread, local_part
from minidpost.training.saving import own_parts, remove, saved_states
from minidpost.training.sft import sft_gradients
from minidpost.training.state import TrainingState, state_tensors

ROOT = Path(__file__).resolve().parents[1]
MARGIN = 0.1  # by which a peak may exceed what is in flight
SECONDS_BETWEEN_LOOKS = 0.002
STEPS_ALONE = 3
BATCH = [TokenizedExample((3, 4, 5, 6, 7, 8), (9, 10)), TokenizedExample((4, 5, 6), (7, 8, 9, 10, 11))]
SCHEDULE = Schedule(1e-5)
NEVER = 1e9  # minutes
STATE = "state.safetensors"

MEASUREMENTS = {  # the name of each: what it is
    "load-fp32": "load, fp32 of an fp32 file",
    "load-bf16": "load, fp32 of a bf16 file",
    "model-fp32": "finished model, fp32",
    "model-bf16": "finished model, bf16",
    "state-all": "training state, all trained",
    "restore-all": "taking that state up",
    "state-half": "training state, half trained",
    "restore-half": "taking that state up",
}


def shape(width: int, n_layers: int, vocab_size: int) -> LlamaConfig:
    """A Llama with heads of 64, and a head that is not tied."""
    n_heads = width // 64
    return LlamaConfig(vocab_size, width, 4 * width, n_layers, n_heads=n_heads, n_kv_heads=n_heads, d_head=64)


# -- what a process has to itself -------------------------------------------------------------------------------------


@dataclass
class Peak:
    """The most memory that was seen within `watched`, over what there was before."""

    own: int = 0
    of_files: int = 0
    before: int = field(default_factory=lambda: status_bytes("RssAnon", "RssShmem"))
    files_before: int = field(default_factory=lambda: status_bytes("RssFile"))

    def look(self) -> None:
        """Compare with what there is now."""
        self.own = max(self.own, status_bytes("RssAnon", "RssShmem") - self.before)
        self.of_files = max(self.of_files, status_bytes("RssFile") - self.files_before)


@contextmanager
def watched() -> Iterator[Peak]:
    """Look at the memory all the time that the block takes."""
    peak = Peak()
    is_over = Event()

    def watch() -> None:
        while not is_over.wait(SECONDS_BETWEEN_LOOKS):
            peak.look()

    thread = Thread(target=watch, name="watching")
    thread.start()
    try:
        yield peak
    finally:
        is_over.set()
        thread.join()
        peak.look()


# -- the measurements, in a process of their own ----------------------------------------------------------------------


def write_random_model(config: LlamaConfig, directory: Path, dtype: torch.dtype) -> None:
    """A directory of random weights, of which one tensor at a time is in memory."""
    generator = torch.Generator().manual_seed(0)
    parameters = dict(empty_model(config).named_parameters())

    def to_write(ours: str, theirs: str) -> WritableTensor:
        weight = parameters[ours]

        def values() -> torch.Tensor:
            if weight.dim() == 1:
                return torch.ones(weight.shape, dtype=dtype)
            return torch.randn(weight.shape, generator=generator).mul_(0.02).to(dtype)

        return WritableTensor(theirs, tuple(weight.shape), dtype, values)

    tensors = [to_write(ours, theirs) for ours, theirs in mapping_for(config).names(config)]
    write_directory(directory, config, tensors, dtype=dtype, tokenizer_files=[], template=None)


def loaded(directory: Path, *, is_half_trained: bool = False) -> Model:
    """The model, whole or this rank's slices of it, as training loads it."""

    def freeze(model: Model) -> None:
        if is_half_trained:
            model.requires_grad_(False)
            layers = model.stacks[1].layers
            for trained in (*layers[(len(layers) + 1) // 2 :], model.head):
                assert trained is not None
                trained.requires_grad_(True)

    if world_size() > 1:
        return load_spread(directory, add=freeze)
    model = load_model(directory)
    freeze(model)
    return model


def own_bytes(model: Model) -> int:
    """The weights that this process has."""
    return sum(weight.nbytes for weight in own_parts(dict(model.named_parameters())).values())


def measure_load(directory: Path) -> dict[str, Any]:
    """Read a model; nothing but its weights may be in memory."""
    with watched() as peak:
        model = loaded(directory)
    # A whole model of the precision of its file is the file's pages, until its weights change.
    is_mapped = world_size() == 1 and directory.name == "fp32"
    n_bytes = peak.own + peak.of_files if is_mapped else peak.own
    return {"own": own_bytes(model), "made": 0, "peak": n_bytes, "of files": peak.of_files}


def measure_model(base: Path, work: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Write a finished model, as a stage does."""
    model = loaded(base)
    parameters = list(model.parameters())
    for weight in parameters:  # weights that were trained are no pages of the file
        weight.data.add_(0.0)
    largest = max(parameters, key=lambda weight: weight.numel())
    # The largest tensor is gathered as it is written, and before that, or without it, made in the other precision.
    made = largest.numel() * dtype.itemsize if world_size() > 1 else 0
    if dtype != torch.float32:
        made += local_part(largest).numel() * dtype.itemsize
    started = time.perf_counter()
    with watched() as peak:
        save_trained(model, work / "model", start=base, dtype=dtype)
    seconds = time.perf_counter() - started
    return {
        "own": own_bytes(model),
        "made": made,
        "peak": own_bytes(model) + peak.own,
        "of files": peak.of_files,
        "stands still": seconds,
    }


class Training:
    """A training whose steps are timed."""

    def __init__(self, base: Path, work: Path, *, is_half_trained: bool):
        self.model = loaded(base, is_half_trained=is_half_trained).train()
        self.optimizer = adamw(self.model, SCHEDULE)
        self.state = TrainingState(work / STATE, minutes=NEVER)
        self.step = 0

    def seconds_of_step(self) -> float:
        """Make one step."""
        started = time.perf_counter()
        sft_gradients(self.model, BATCH, 10**6, dtype=torch.float32)
        apply_step(self.model, self.optimizer, SCHEDULE, step=self.step, n_steps=1000)
        self.step += 1
        return time.perf_counter() - started

    def after_step(self, minutes: float) -> None:
        """What training loops do after a step: save if `minutes` is 0, end what was begun if all have written."""
        self.state.minutes = minutes
        self.state.after_step(self.step - 1, self.model, self.optimizer, None)
        self.state.minutes = NEVER


def measure_state(base: Path, work: Path, *, is_half_trained: bool) -> dict[str, Any]:
    """Save a training state after a step, and go on until it is written."""
    training = Training(base, work, is_half_trained=is_half_trained)
    training.state.restore(training.model, training.optimizer, "large model")  # there is none
    training.seconds_of_step()  # AdamW gets its moments
    with watched() as alone:
        seconds_alone = [training.seconds_of_step() for _ in range(STEPS_ALONE)]
    parts = own_parts(state_tensors(trained_parameters(training.model), training.optimizer))
    n_bytes = sum(part.nbytes for part in parts.values())
    del parts

    # 1) The copies, or where there is no room for them, all of it.
    with watched() as begun:
        training.after_step(0)
    is_in_background = training.state.save is not None
    copy_seconds = training.state.save_seconds
    extra = begun.own

    # 2) The steps beside the writing. They need memory too: what a save takes is what there is more than without it.
    started = time.perf_counter()
    beside: list[float] = []
    with watched() as peak:
        while training.state.save is not None:
            is_beside = not training.state.save.is_written
            seconds = training.seconds_of_step()
            if is_beside:
                beside.append(seconds)
            training.after_step(NEVER)
        saved_after = time.perf_counter() - started
        if training.state.ended is not None:
            training.state.ended.wait()
    if is_in_background:
        extra = max(extra, peak.before + peak.own - (alone.before + alone.own))
    return {
        "own": n_bytes,
        "made": n_bytes if is_in_background else 0,
        "peak": n_bytes + extra,
        "of files": max(begun.of_files, peak.of_files),
        "stands still": training.state.save_seconds,
        "copy": copy_seconds if is_in_background else None,
        "saved after": saved_after if is_in_background else None,
        "steps beside": len(beside),
        "step alone": median(seconds_alone),
        "step beside": median(beside) if beside else None,
    }


def measure_restore(base: Path, work: Path, *, is_half_trained: bool) -> dict[str, Any]:
    """Take up what `measure_state` has saved: weights that are there get values, and AdamW its moments."""
    training = Training(base, work, is_half_trained=is_half_trained)
    weights = own_parts(trained_parameters(training.model))
    for weight in weights.values():
        weight.data.add_(0.0)  # no pages of a file
    n_bytes = sum(weight.nbytes for weight in weights.values())
    with watched() as peak:
        training.state.restore(training.model, training.optimizer, "large model")
    if training.state.next_step == 0:
        raise SystemExit("no state was taken up")
    return {"own": 3 * n_bytes, "made": 0, "peak": n_bytes + peak.own, "of files": peak.of_files}


def measure(name: str, directory: Path) -> dict[str, Any]:
    """One of MEASUREMENTS, on this rank."""
    if world_size() > 1:  # libraries are no weights
        from torch.distributed import fsdp, tensor  # noqa: F401

    kind, _, which = name.partition("-")
    base = directory / "fp32"
    if kind == "load":
        return measure_load(directory / which)
    if kind == "model":
        return measure_model(base, directory, torch.float32 if which == "fp32" else torch.bfloat16)
    measured = measure_state if kind == "state" else measure_restore
    return measured(base, directory, is_half_trained=which == "half")


def write_measured(name: str, directory: Path) -> None:
    """Make one of MEASUREMENTS and leave what came out for the process that has asked for it."""
    found = measure(name, directory)
    result_path(directory, rank()).write_text(json.dumps(found), encoding="utf-8")


def result_path(directory: Path, number: int) -> Path:
    """Where a rank leaves what it has measured."""
    return directory / f"rank-{number}.json"


# -- all of them ------------------------------------------------------------------------------------------------------


def by_processes(name: str, n_processes: int, directory: Path) -> dict[str, Any]:
    """One of MEASUREMENTS by so many processes; of each number the largest that one of them has."""
    command = [sys.executable]
    environment = dict(os.environ)
    if n_processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(n_processes)]
        environment["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // n_processes))
    command += ["-m", "benchmarks.large_model", "--measure", name, "--directory", str(directory)]
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    found: dict[str, Any] = {}
    for number in range(n_processes):
        path = result_path(directory, number)
        for key, value in json.loads(path.read_text(encoding="utf-8")).items():
            known = found.get(key)
            found[key] = value if known is None or (value is not None and value > known) else known
        path.unlink()
    return found


def memory_row(name: str, n_processes: int, found: dict[str, Any]) -> list[str]:
    """A row of the first table."""
    in_flight = found["own"] + found["made"]
    ratio = found["peak"] / in_flight
    numbers = [found["own"], found["made"], found["peak"], found["of files"]]
    verdict = "yes" if ratio <= 1 + MARGIN else "**no**"
    return [
        MEASUREMENTS[name],
        str(n_processes),
        *(f"{number / 1e9:.3f}" for number in numbers),
        f"{ratio:.2f}",
        verdict,
    ]


def time_row(name: str, n_processes: int, found: dict[str, Any]) -> list[str]:
    """A row of the second table."""

    def seconds(key: str) -> str:
        return "–" if found.get(key) is None else f"{found[key]:.1f}"

    keys = ("stands still", "copy", "saved after")
    steps = str(found["steps beside"]) if found.get("saved after") is not None else "–"
    row = [MEASUREMENTS[name], str(n_processes), *map(seconds, keys), steps, seconds("step alone")]
    return [*row, seconds("step beside")]


def write_page(
    page: Path, config: LlamaConfig, found: dict[tuple[str, int], dict[str, Any]], *, is_whole: bool
) -> None:
    """Both tables so far."""
    memory_heads = [
        "what", "processes", "own part, GB", "made for it, GB", "peak, GB", "pages of files, GB", "peak / in flight",
        f"at most {1 + MARGIN:.2f}",
    ]  # fmt: skip
    time_heads = [
        "what", "processes", "stands still, s", "of these the copy, s", "written after, s", "steps meanwhile",
        "a step alone, s", "a step beside, s",
    ]  # fmt: skip
    timed = {key: value for key, value in found.items() if "stands still" in value}
    size = f"{n_parameters(empty_model(config)) / 1e6:,.0f} million parameters"
    paragraphs = [
        f"`{' '.join(['python -m benchmarks.large_model', *sys.argv[1:]])}` · {machine_line()}, {instruction_set()}",
        *(__doc__ or "").strip().split("\n\n")[1:-1],
        f"{size}, fp32, {config.n_layers} layers of width {config.d_model}; steps of {len(BATCH)} short examples. "
        "Of two processes each number is the larger one's.",
        markdown_table(memory_heads, [memory_row(*key, value) for key, value in found.items()]),
        markdown_table(time_heads, [time_row(*key, value) for key, value in timed.items()]),
    ]
    write_result(page, "A model of a billion parameters: loading and saving", paragraphs, is_whole)


def main() -> None:
    """Measure all, and write the page after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--width", type=int, default=2048, help="a multiple of 64 (default: %(default)s)")
    parser.add_argument("--layers", type=int, default=13, help="(default: %(default)s)")
    parser.add_argument("--vocabulary", type=int, default=32000, help="(default: %(default)s)")
    parser.add_argument("--processes", default="1,2", help="(default: %(default)s)")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "large-model.md", help="(default: benchmarks/results/large-model.md)"
    )
    parser.add_argument(
        "--directory", type=Path, help="for 30 GB of files, removed afterwards (default: a temporary one)"
    )
    parser.add_argument("--measure", choices=MEASUREMENTS, help="make one measurement alone, within --directory")
    options = parser.parse_args()
    if options.measure is not None:
        run_command(lambda: write_measured(options.measure, options.directory))
        return
    config = shape(options.width, options.layers, options.vocabulary)
    results: dict[tuple[str, int], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(dir=options.directory) as temporary:
        directory = Path(temporary)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            write_random_model(config, directory / name, dtype)
        for n_processes in map(int, options.processes.split(",")):
            for name in MEASUREMENTS:
                results[name, n_processes] = by_processes(name, n_processes, directory)
                write_page(options.output, config, results, is_whole=False)
                if not name.startswith("state"):  # which is taken up next
                    remove(directory / "model", *saved_states(directory / STATE))
    write_page(options.output, config, results, is_whole=True)


if __name__ == "__main__":
    main()
