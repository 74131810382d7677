"""What copies of matrices in oneDNN's blocks gain in decoding on a CPU (minidpost/models/blocked_weights.py).

A step of so many rows, each with a prompt of 64 tokens and 64 tokens of its own, without copies and with them: medians
of interleaved rounds of four steps, in milliseconds, and the median of the rounds' ratios. Weights and ids are random,
at the models' true shapes.

The result keeps a section for each kind of processor: a run replaces that of its own kind alone.

    python -m benchmarks.blocked_weights
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.common import RESULTS, instruction_set, machine_line, timed, write_result
from benchmarks.scripted import SHAPES, SHARED, open_shape, row_counts
from minidpost.cli import POSITIVE, Parser, run_command
from minidpost.models.hf_config import Model
from minidpost.precision import DTYPES
from minidpost.storage import markdown_table, read_json, write_json

N_PROMPT, N_NEW = 64, 64  # tokens of a row, of which the new ones have been decoded
N_STEPS = 4  # of a round
WAYS = ("without", "with")


def main() -> None:
    options = parse_options()
    output: Path = options.output
    found: dict[str, Any] = read_json(output.with_suffix(".json")) if output.is_file() else {}
    rows = []
    for name in options.model:
        for dtype in options.dtype:
            model = open_shape(name, DTYPES[dtype], "cpu", options.shared)[0]
            for n_rows in options.rows:
                row = {"model": name, "dtype": dtype, "rows": n_rows, **step_times(model, n_rows, options.rounds)}
                print(row, file=sys.stderr, flush=True)
                rows.append(row)
    kind = instruction_set()
    command = " ".join([*limits(), "python -m benchmarks.blocked_weights", *sys.argv[1:]])
    found[" · ".join([kind, *limits()])] = {"command": command, "machine": machine_line(), "rows": rows}
    write_json(output.with_suffix(".json"), found)
    sections = [section(kind, of_kind) for kind, of_kind in found.items()]
    write_result(output, "Matrices in oneDNN's blocks", [*(__doc__ or "").strip().split("\n\n")[1:3], *sections])


def parse_options() -> argparse.Namespace:
    """What is measured, and where the result goes."""
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    models = ["flan-t5-small", "smollm2-135m"]
    parser.add_argument("--model", nargs="+", choices=SHAPES, default=models, metavar="NAME", help="default: two")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=[*DTYPES], help="of weights (default: both)")
    parser.add_argument("--rows", type=row_counts, default=(1, 4, 16, 32, 64, 128), help="default: 1 to 128")
    parser.add_argument("--rounds", type=POSITIVE, default=9, help="default: 9")
    parser.add_argument("--shared", type=Path, default=SHARED, help="where configs and tokenizers lie")
    parser.add_argument("--output", type=Path, default=RESULTS / "blocked-weights.md", metavar="FILE")
    return parser.parse_args()


def limits() -> list[str]:
    """By which variables the libraries were kept from some of the processor's instructions."""
    names = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
    return [f"{name}={os.environ[name]}" for name in names if name in os.environ]


@torch.inference_mode()
def step_times(model: Model, n_rows: int, n_rounds: int) -> dict[str, Sequence[float]]:
    """Milliseconds of a step in each round, without copies and with them; a first round does not count."""
    generator = torch.Generator().manual_seed(0)
    ids_TB = torch.randint(3, model.config.vocab_size, (N_NEW, n_rows), generator=generator)
    prompts = torch.randint(3, model.config.vocab_size, (n_rows, N_PROMPT), generator=generator).tolist()
    cache: Any = model.new_cache(n_rows, N_PROMPT, N_NEW + 1)
    model.prefill(cache, range(n_rows), prompts)
    for ids_B in ids_TB:
        model.decode(cache, ids_B)
    plan = cache.plan(n_rows)

    def steps() -> None:
        for _ in range(N_STEPS):
            model.step(cache, plan, ids_TB[0])  # to the same position each time: rows do not grow

    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(n_rounds + 1):
        for way in WAYS:
            with model.decoding() if way == "with" else nullcontext():
                model.step(cache, plan, ids_TB[0])  # copies are made in the first step
                times[way].append(1000 * timed(steps) / N_STEPS)
    return {way: values[1:] for way, values in times.items()}


def section(kind: str, found: dict[str, Any]) -> str:
    """What was found on one kind of processor."""
    lines = []
    for row in found["rows"]:
        without, copied = (row[way] for way in WAYS)
        ratio = median(after / before for before, after in zip(without, copied, strict=True))
        milliseconds = [f"{median(without):.1f}", f"{median(copied):.1f}"]
        lines.append([row["model"], row["dtype"], str(row["rows"]), *milliseconds, f"{ratio:.2f}"])
    header = ["model", "weights", "rows", "without copies, ms", "with copies, ms", "with / without"]
    return "\n\n".join([f"## {kind}", f"`{found['command']}` · {found['machine']}", markdown_table(header, lines)])


if __name__ == "__main__":
    run_command(main)
