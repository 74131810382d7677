"""A run's estimate of its memory against what its rehearsal measures, on this machine's CPU.

    python -m benchmarks.estimates

Starts train.py on GSM8K with random weights of published shapes, in fp32 and bf16, with and without activation
checkpointing and LoRA, alone and under torchrun, and stops it when it has said both: what it estimated, and the peak
of the largest batches, rehearsed. What has been measured is kept as JSON, and not measured again. The peak is a whole
process's; what a process has that has done no more than import the package is taken off it, as an estimate knows
nothing of libraries.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import RESULTS, instruction_set, machine_line, train_command, write_result
from benchmarks.scripted import SHAPES, SHARED, open_shape
from minidpost.models.weights import save_model, tokenizer_files
from minidpost.storage import markdown_table, read_json, write_json

ROOT = Path(__file__).resolve().parents[1]
PAGE = RESULTS / "estimates.md"
MICRO_BATCH_TOKENS = "4096"


@dataclass(frozen=True)
class Case:
    """A run: the model's shape, train.py's flags, and the number of processes."""

    shape: str
    flags: tuple[str, ...] = ()
    n_processes: int = 1


CASES = (
    Case("flan-t5-small"),
    Case("flan-t5-small", n_processes=2),
    Case("flan-t5-base"),
    Case("flan-t5-base", ("--activation-checkpointing",)),
    Case("flan-t5-base", n_processes=2),
    Case("smollm2-135m"),
    Case("smollm2-135m", n_processes=2),
    Case("smollm2-135m", ("--activation-checkpointing",)),
    Case("smollm2-135m", ("--lora-rank", "16")),
    Case("smollm2-135m", ("--train-dtype", "bf16")),  # which most processors only emulate, slowly
)
SIZES = re.compile(r"training ([\d.]+) (GB|MB), sampling ([\d.]+) (GB|MB)")


def main() -> None:
    """Measure every case, and write the page after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--shapes", default=",".join({case.shape: None for case in CASES}), help="(default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, default=PAGE, help="(default: %(default)s)")
    options = parser.parse_args()
    shapes = options.shapes.split(",")
    rest = bytes_at_rest()
    record = options.output.with_suffix(".json")
    rows: dict[str, list[str]] = read_json(record) if record.is_file() else {}
    with tempfile.TemporaryDirectory() as directory:
        for case in CASES:
            if case.shape not in shapes or str(case) in rows:
                continue
            weights = Path(directory) / case.shape
            if not weights.exists():
                write_random_weights(case.shape, weights)
            estimated, measured = training_and_sampling(case, weights, Path(directory) / "run")
            rows[str(case)] = row_of(case, estimated, measured, rest)
            write_json(record, rows)
            write_page(options.output, rows, rest)
    write_page(options.output, rows, rest, is_whole=True)


def write_random_weights(shape: str, directory: Path) -> None:
    """A published model's shape as a Hugging Face directory."""
    model, _ = open_shape(shape, torch.float32, "cpu")
    save_model(model, directory, tokenizer_files(SHARED / "tokenizers" / SHAPES[shape][1]))


def bytes_at_rest() -> int:
    """The memory of a process that has imported the package."""
    script = "import minidpost, resource; print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    return int(subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)


def training_and_sampling(
    case: Case, weights: Path, run_directory: Path
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Bytes that a run estimates for training and sampling, and those that its rehearsal measured."""
    command, environment = train_command(case.n_processes)
    command += ["--model", str(weights), "--data", "gsm8k", "--data-dir", str(SHARED / "data")]
    command += ["--micro-batch-tokens", MICRO_BATCH_TOKENS, "--run-dir", str(run_directory), "--fresh", *case.flags]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    estimated = measured = None
    said: list[str] = []
    try:
        for line in process.stdout:
            said.append(line)
            if "(estimated)" in line and estimated is None:
                estimated = sizes(line)
            if "rehearsed:" in line:
                measured = sizes(line)
                break
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if estimated is None or measured is None:
        raise SystemExit("".join(said)[-2000:])
    return estimated, measured


def sizes(line: str) -> tuple[float, float]:
    """The bytes of training and of sampling in a line of train.py's."""
    match = SIZES.search(line)
    if match is None:
        raise SystemExit(f"no sizes in {line!r}")
    units = {"GB": 1e9, "MB": 1e6}
    return float(match[1]) * units[match[2]], float(match[3]) * units[match[4]]


def row_of(case: Case, estimated: tuple[float, float], measured: tuple[float, float], rest: int) -> list[str]:
    """A row of the table."""
    peak = measured[0] - rest
    return [
        case.shape,
        " ".join(case.flags) or "–",
        str(case.n_processes),
        f"{estimated[0] / 1e9:.1f}",
        f"{peak / 1e9:.1f}",
        f"{estimated[0] / peak:.2f}",
    ]


def write_page(page: Path, rows: dict[str, list[str]], rest: int, *, is_whole: bool = False) -> None:
    """The table so far."""
    heads = ["shape", "flags", "processes", "training, estimated, GB", "measured, GB", "estimated / measured"]
    paragraphs = [
        f"`python -m benchmarks.estimates` · {machine_line()}, {instruction_set()}",
        f"`train.py --model SHAPE --data gsm8k --micro-batch-tokens {MICRO_BATCH_TOKENS}`, random weights: the line of "
        f"memory that a run begins with, against the peak of its rehearsal, of which {rest / 1e6:.0f} MB are taken off "
        "that a process has at rest. Of several processes the numbers are those of each.",
        markdown_table(heads, [rows[str(case)] for case in CASES if str(case) in rows]),
    ]
    write_result(page, "Memory: what a run estimates and what it takes, on a CPU", paragraphs, is_whole)


if __name__ == "__main__":
    main()
