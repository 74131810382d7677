"""fp32 against bf16 on a CPU, by the model's size: the table behind `--dtype auto` and `--train-dtype auto`.

*Sampling* is a prefill of 32 prompts of 64 tokens and 16 steps of 32 rows, with weights in fp32 or bf16; *training* is
an SFT step (forward, backward, AdamW) of 16 examples of 64 + 64 tokens, plain or under bf16 autocast. Weights and ids
are random. Numbers are tokens a second, medians of interleaved pairs; the last column of each is bf16's speed divided
by fp32's, the median over the pairs: above 1 bf16 is the faster one.

The result keeps a section for each kind of processor: a run replaces that of its own kind alone.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import RESULTS, command_line, instruction_set, machine_line, timed, write_result  # noqa: E402
from minidpost.cli import POSITIVE, Parser, run_command  # noqa: E402
from minidpost.models.llama import Llama, LlamaConfig  # noqa: E402
from minidpost.models.t5 import T5, T5Config  # noqa: E402
from minidpost.precision import DTYPES, autocast  # noqa: E402
from minidpost.selftraining.presets import n_parameters  # noqa: E402
from minidpost.storage import markdown_table, read_json, write_json  # noqa: E402
from minidpost.training.batching import TokenizedExample, collate  # noqa: E402
from minidpost.training.losses import log_probabilities, sft_loss  # noqa: E402
from minidpost.training.optim import Schedule, adamw, apply_step  # noqa: E402

N_ROWS, N_PROMPT, N_NEW = 32, 64, 16  # of sampling
N_EXAMPLES, N_SOURCE, N_TARGET = 16, 64, 64  # of a step of training
SHAPES = {
    "T5, width 64": T5Config(4_000, 64, 16, 256, 4, 4, 4, gated=True, tied=False),
    "T5, width 128": T5Config(32_128, 128, 32, 256, 4, 4, 4, gated=True, tied=False),
    "T5, width 256": T5Config(32_128, 256, 64, 512, 4, 6, 6, gated=True, tied=False),
    "flan-t5-small": T5Config(32_128, 512, 64, 1024, 6, 8, 8, gated=True, tied=False),
    "SmolLM2-135M": LlamaConfig(49_152, 576, 1536, 30, n_heads=9, n_kv_heads=3, d_head=64, tied=True),
    "flan-t5-base": T5Config(32_128, 768, 64, 2048, 12, 12, 12, gated=True, tied=False),
}


def main() -> None:
    options = parse_options()
    rows = []
    for name in options.shapes:
        row = measure(name, options.pairs)
        rows.append(row)
        print(name, row, file=sys.stderr)
    found: dict[str, Any] = read_json(options.output.with_suffix(".json")) if options.output.is_file() else {}
    kind = instruction_set()
    found[kind] = {"command": command_line(), "machine": machine_line(), "pairs": options.pairs, "rows": rows}
    write_json(options.output.with_suffix(".json"), found)
    sections = [section(kind, of_kind) for kind, of_kind in found.items()]
    write_result(options.output, "Precision on a CPU", [__doc__.split("\n\n", 1)[1].strip(), *sections])


def parse_options() -> argparse.Namespace:
    """What is measured, and where the result goes."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=[*SHAPES], metavar="NAME", help="default: all")
    parser.add_argument("--pairs", type=POSITIVE, default=5, help="of fp32 and bf16 (default: 5)")
    parser.add_argument("--output", type=Path, default=RESULTS / "precision.md", metavar="FILE")
    return parser.parse_args()


def measure(name: str, n_pairs: int) -> dict[str, Any]:
    """Tokens a second of a shape, a number for each pair, by work and precision; a first pair does not count."""
    found: dict[str, Any] = {"shape": name}
    for work, rate in (("sampling", sampling_rate), ("training", training_rate)):
        rates: dict[str, list[float]] = {dtype: [] for dtype in DTYPES}
        models = {dtype: build(name) for dtype in DTYPES}
        if work == "sampling":
            models["bf16"].bfloat16()
        for _ in range(n_pairs + 1):
            for dtype, model in models.items():
                rates[dtype].append(rate(model, DTYPES[dtype]))
        found["parameters"] = n_parameters(models["fp32"])
        found[work] = {dtype: values[1:] for dtype, values in rates.items()}
    return found


def build(name: str) -> T5 | Llama:
    """A shape with random weights."""
    torch.manual_seed(0)
    config = SHAPES[name]
    return T5(config).initialise() if isinstance(config, T5Config) else Llama(config).initialise()


def random_ids(n_rows: int, length: int, vocab_size: int) -> list[list[int]]:
    """Ids that are the same in every call."""
    return torch.randint(3, vocab_size, (n_rows, length), generator=torch.Generator().manual_seed(0)).tolist()


def sampling_rate(model: T5 | Llama, dtype: torch.dtype) -> float:
    """New tokens a second; the weights have the precision already."""
    cache: Any = model.new_cache(N_ROWS, N_PROMPT, N_NEW)
    prompts = random_ids(N_ROWS, N_PROMPT, model.config.vocab_size)
    ids_BT = torch.tensor(random_ids(N_ROWS, N_NEW, model.config.vocab_size))

    def work() -> None:
        model.prefill(cache, range(N_ROWS), prompts)
        for ids_B in ids_BT.T:
            model.decode(cache, ids_B).argmax(-1)

    with model.decoding():
        model.prefill(cache, [0], prompts[:1])  # the first products make copies of the matrices, once in a sampling
        model.decode(cache, ids_BT[:1, 0])
        return N_ROWS * N_NEW / timed(work)


def training_rate(model: T5 | Llama, dtype: torch.dtype) -> float:
    """Tokens a second of a training step whose forward pass has the precision."""
    schedule = Schedule(1e-4)
    optimizer = adamw(model.train(), schedule)
    rows = random_ids(N_EXAMPLES, N_SOURCE + N_TARGET, model.config.vocab_size)
    batch = collate(
        model.config, [TokenizedExample(tuple(row[:N_SOURCE]), tuple(row[N_SOURCE:])) for row in rows], "cpu"
    )

    def work() -> None:
        with autocast(torch.device("cpu"), dtype):
            loss = sft_loss(log_probabilities(model, batch), len(batch.position_N))
        loss.backward()
        apply_step(model, optimizer, schedule, step=0, n_steps=10)

    return N_EXAMPLES * (N_SOURCE + N_TARGET) / timed(work)


def section(kind: str, found: dict[str, Any]) -> str:
    """What was found on one kind of processor."""
    header = ["shape", "parameters"]
    for work in ("sampling", "training"):
        header += [f"{work}, fp32", f"{work}, bf16", "bf16 / fp32"]
    rows = []
    for row in found["rows"]:
        cells = [row["shape"], f"{row['parameters'] / 1e6:,.1f} M"]
        for work in ("sampling", "training"):
            fp32, bf16 = row[work]["fp32"], row[work]["bf16"]
            ratio = statistics.median(b / a for a, b in zip(fp32, bf16, strict=True))
            cells += [f"{statistics.median(fp32):,.0f}", f"{statistics.median(bf16):,.0f}", f"{ratio:.2f}"]
        rows.append(cells)
    where = f"`{found['command']}` · {found['machine']} · {found['pairs']} pairs"
    return "\n\n".join([f"## {kind}", where, markdown_table(header, rows)])


if __name__ == "__main__":
    run_command(main)
