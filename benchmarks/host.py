"""The host's part of a decoding step: what sampling costs beside the model and the choice of tokens.

The model here returns at once, and the tokens that it "chooses" are those of GSM8K's rationales, ready in a table; the
calculator watches and forces as ever. What is left of a step is bookkeeping: feeding, forcing, ending, refilling. On a
GPU that is hidden behind the device's work as long as it takes less time.

    python -m benchmarks.host
"""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import RESULTS, instruction_set, machine_line, write_result
from benchmarks.scripted import SHARED, Work, scripted_work
from minidpost.sampling import sampler
from minidpost.sampling.sampler import Request, SamplingSettings, sample
from minidpost.storage import markdown_table
from minidpost.text.templates import template_for
from minidpost.text.tokenizer import load_tokenizer

ROWS = (32, 64, 256, 512)
WAVES = 4  # completions for each row
ROUNDS = 5
LENGTH_MARGIN = 2  # a row may be decoded once more after its end


@dataclass
class ReadyCache:
    """Of each row which script it writes, and how far it is."""

    script_B: np.ndarray
    position_B: np.ndarray

    def clear(self) -> None:
        """Nothing is kept."""

    def copy_rows(self, source_ids: Sequence[int], target_ids: Sequence[int]) -> None:
        """Make each target row a copy of its source row."""
        self.script_B[list(target_ids)] = self.script_B[list(source_ids)]
        self.position_B[list(target_ids)] = self.position_B[list(source_ids)]


class ReadyModel:
    """A model for `sample` whose tokens are ready in a table; it counts the seconds that it takes itself."""

    def __init__(self, work: Work):
        assert work.scripts is not None
        longest = max(map(len, work.scripts)) + LENGTH_MARGIN
        self.ids_NT = np.zeros((len(work.scripts), longest), dtype=np.int64)
        for index, script in enumerate(work.scripts):
            self.ids_NT[index, : len(script)] = script
        self.index_of = {prompt: index for index, prompt in enumerate(work.prompts)}
        self.weight = torch.empty(10**7)
        self.seconds = 0.0
        self.n_steps = 0

    def parameters(self) -> Iterator[Tensor]:
        """One, so that it is seen to lie on the CPU, and to be too large for worker processes."""
        yield self.weight

    def decoding(self) -> AbstractContextManager[None]:
        """Nothing: no product is made."""
        return nullcontext()

    def new_cache(self, n_rows: int, max_prompt: int, max_new: int) -> ReadyCache:
        """Room for rows."""
        return ReadyCache(np.zeros(n_rows, dtype=np.int64), np.zeros(n_rows, dtype=np.int64))

    def prefill(self, cache: ReadyCache, row_ids: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[int]:
        """Rows begin at the first id of their prompts' scripts."""
        cache.script_B[list(row_ids)] = [self.index_of[tuple(prompt)] for prompt in prompts]
        cache.position_B[list(row_ids)] = 0
        return [0] * len(prompts)

    def decode(self, cache: ReadyCache, ids_B: Tensor) -> Tensor:
        """The next ids themselves, in place of logits."""
        started = time.perf_counter()
        n_rows = len(ids_B)
        chosen_B = torch.from_numpy(self.ids_NT[cache.script_B[:n_rows], cache.position_B[:n_rows]])
        cache.position_B[:n_rows] += 1
        np.minimum(cache.position_B, self.ids_NT.shape[1] - 1, out=cache.position_B)
        self.n_steps += 1
        self.seconds += time.perf_counter() - started
        return chosen_B


def host_seconds(work: Work, rows: int, *, has_calculator: bool, overlap: bool | None) -> tuple[float, int]:
    """The seconds of all steps without the model's own, and how many steps they are."""
    model = ReadyModel(work)
    assert work.scripts is not None
    requests = [Request(prompt, str(index)) for index, prompt in enumerate(work.prompts)]
    settings = SamplingSettings(temperature=0.0, max_new_tokens=work.max_new_tokens, slots=rows)
    new_override: Callable[[], Any] | None = work.template.new_calculator if has_calculator else None
    options: dict[str, Any] = {} if overlap is None else {"overlap": overlap}
    with patch.object(sampler, "choose", lambda ids_B, *_: ids_B):
        started = time.perf_counter()
        found = list(sample(model, requests, settings, work.template.eos_id, new_override=new_override, **options))
        seconds = time.perf_counter() - started - model.seconds
    if has_calculator and sorted(row.token_ids for row in found) != sorted(map(list, work.scripts)):
        raise RuntimeError("a completion is not its script")
    return seconds, model.n_steps


def main() -> None:
    """Measure and write host.md."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, default=SHARED / "tokenizers" / "t5", help="T5's (default: shared)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"(default: {ROUNDS})")
    parser.add_argument("--plain", action="store_true", help="only steps that do not overlap")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "host.md", help="(default: benchmarks/results/host.md)"
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    template = template_for("t5", load_tokenizer(options.tokenizer))
    kinds: dict[str, Callable[..., tuple[float, int]]] = {
        "calculator": partial(host_seconds, has_calculator=True, overlap=None),
        "without": partial(host_seconds, has_calculator=False, overlap=None),
    }
    if not options.plain:
        kinds |= {
            "overlapped, calculator": partial(host_seconds, has_calculator=True, overlap=True),
            "overlapped, without": partial(host_seconds, has_calculator=False, overlap=True),
        }
    table = []
    for rows in ROWS:
        work = scripted_work(template, WAVES * rows)
        found: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(options.rounds):
            for kind, run in kinds.items():
                seconds, n_steps = run(work, rows)
                found[kind].append(1e6 * seconds / n_steps)
        middle = [median(values) for values in found.values()]
        table.append([str(rows), *(f"{value:,.0f} ({value / rows:.2f})" for value in middle)])
    heads = ["rows", *(f"{kind}, µs a step (a row)" for kind in kinds)]
    command = f"`python -m benchmarks.host` · {machine_line()}, {instruction_set()}, one thread"
    text = [command, *(__doc__ or "").strip().split("\n\n")[1:2], markdown_table(heads, table)]
    write_result(options.output, "The host's part of a decoding step", text)


if __name__ == "__main__":
    main()
