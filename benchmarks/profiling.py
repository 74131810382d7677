"""Where the time of sampling goes, part by part.

The work is that of `sampling.py`: GSM8K's questions, every row says a gold rationale, calculator on, greedy. The parts
are clocked as they call each other, each without what it calls; the clocks themselves take a microsecond a call. Of a
small model one process with one thread is clocked, as it works beside others of its kind, alone; larger ones have all
threads. *Products* are what the model's matrices take; *attention* is what keys and values take, of the row's own
tokens and of its prompt; the rest is what a step costs besides.
"""

import argparse
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import mean
from unittest.mock import patch

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import RESULTS, command_line, instruction_set, machine_line, write_result  # noqa: E402
from benchmarks.scripted import Work, model_names, open_shape, sampled, scripted_work  # noqa: E402
from minidpost.cli import POSITIVE, Parser, run_command  # noqa: E402
from minidpost.models import kvcache, layers, llama, t5  # noqa: E402
from minidpost.precision import DTYPES  # noqa: E402
from minidpost.sampling import sampler  # noqa: E402
from minidpost.sampling.workers import MAX_PARAMETERS_FOR_WORKERS  # noqa: E402
from minidpost.storage import markdown_table  # noqa: E402
from minidpost.text.calculator import Automaton  # noqa: E402

N_THREADS = torch.get_num_threads()
PREFILL, REST, STEP = "prefill: the prompts", "everything else", "sums, calls between the parts"
PARTS = [  # what is clocked: owner, attribute, part
    (t5.T5, "prefill", PREFILL),
    (llama.Llama, "prefill", PREFILL),
    (t5.FeedForward, "forward", "products: feed-forward"),
    (llama.FeedForward, "forward", "products: feed-forward"),
    (t5.SelfAttention, "forward", "products: queries, keys, values, outputs"),
    (t5.CrossAttention, "forward", "products: queries, keys, values, outputs"),
    (llama.Attention, "forward", "products: queries, keys, values, outputs"),
    (t5.T5, "logits", "products: output matrix"),
    (llama.Llama, "logits", "products: output matrix"),
    (kvcache.CachedTokens, "attend", "attention: own tokens"),
    (kvcache.CachedPrompts, "attend", "attention: prompts"),
    (kvcache.SharedPromptCache, "plan", "which rows share a prompt"),
    (kvcache.PromptPlan, "by_prompt", "which rows share a prompt"),
    (kvcache.PromptPlan, "by_row", "which rows share a prompt"),
    (kvcache.KVCache, "append", "writing keys and values"),
    (layers.RMSNorm, "forward", "norms"),
    (kvcache.T5Cache, "bias", "positions and mask"),
    (kvcache.KVCache, "bias", "positions and mask"),
    (llama.Llama, "rotation", "positions and mask"),
    (llama, "rotate", "positions and mask"),
    (sampler, "choose", "choice of ids"),
    (Automaton, "push", "calculator"),
    (kvcache.T5Cache, "copy_rows", "rows that come and go"),
    (kvcache.KVCache, "copy_rows", "rows that come and go"),
    (t5.T5, "decode", STEP),
    (llama.Llama, "decode", STEP),
]


class Clock:
    """Seconds of each part, without those of the parts that it calls."""

    def __init__(self):
        self.seconds: dict[str, float] = defaultdict(float)
        self.n_calls: Counter[str] = Counter()
        self.n_tokens = 0
        self.open: list[tuple[str, float]] = []  # parts that are at work, and what others in them have taken so far

    def around(self, function: Callable, part: str) -> Callable:
        """The function, clocked; within the prefill nothing is told apart."""

        def clocked(*arguments, **options):
            if self.open and self.open[-1][0] == PREFILL:
                return function(*arguments, **options)
            self.n_calls[part] += 1
            self.open.append((part, 0.0))
            started = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                spent = time.perf_counter() - started
                self.seconds[part] += spent - self.open.pop()[1]
                if self.open:
                    self.open[-1] = self.open[-1][0], self.open[-1][1] + spent

        return clocked

    @property
    def n_steps(self) -> int:
        """How often the model decoded."""
        return self.n_calls[STEP]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, all parts are clocked, and what belongs to none is everything else."""
        with ExitStack() as stack:
            for owner, name, part in PARTS:
                stack.enter_context(patch.object(owner, name, self.around(getattr(owner, name), part)))
            started = time.perf_counter()
            yield
            self.seconds[REST] = time.perf_counter() - started - sum(self.seconds.values())


def main() -> None:
    options = parse()
    where = f"{machine_line()}, {instruction_set()}, {options.dtype}"
    text = [f"`{command_line()}` · {where}", *__doc__.strip().split("\n\n")[1:]]
    for name in options.model:
        model, template = open_shape(name, DTYPES[options.dtype], "cpu")
        is_small = sum(weight.numel() for weight in model.parameters()) < MAX_PARAMETERS_FOR_WORKERS
        torch.set_num_threads(1 if is_small else N_THREADS)
        work = scripted_work(template, options.questions or 3 * options.rows)
        clock = profile(model, work, options.rows)
        print(f"{name}: {clock.n_tokens:,} tokens", file=sys.stderr, flush=True)
        text += [f"## {name}, {options.rows} rows", table(clock), summary(clock, work)]
    write_result(options.output, "Where the time of a decoding step goes", text)


def parse() -> argparse.Namespace:
    """The command line; UserError for what is wrong with it."""
    parser = Parser(description=__doc__.splitlines()[0])
    models = ["tiny-t5", "flan-t5-small", "flan-t5-base", "smollm2-135m"]
    parser.add_argument(
        "--model", type=model_names, default=models, metavar="NAMES", help=f"default: {','.join(models)}"
    )
    parser.add_argument("--rows", type=POSITIVE, default=32, metavar="N", help="slots of the process (default: 32)")
    parser.add_argument("--questions", type=POSITIVE, metavar="N", help="default: 3 a row")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the weights (default: fp32)")
    parser.add_argument("--output", type=Path, default=RESULTS / "profiling.md")
    options = parser.parse_args()
    if not options.output.absolute().parent.is_dir():
        parser.error(f"--output {options.output}: its directory does not exist")
    return options


def profile(model: torch.nn.Module, work: Work, rows: int) -> Clock:
    """Complete all questions, the first few of them twice: once before the clock runs."""
    clock = Clock()
    sampled(model, work.part(rows // 2, max_new_tokens=8), rows)
    with clock.running():
        clock.n_tokens = sum(map(len, sampled(model, work, rows)))
    return clock


def table(clock: Clock) -> str:
    """A line a part, in the order of a step: milliseconds a step, fraction of the whole."""
    whole = sum(clock.seconds.values())
    lines = []
    for part in dict.fromkeys([*(part for _, _, part in PARTS), REST]):
        if part not in clock.seconds:
            continue  # of the other family
        seconds = clock.seconds[part]
        lines.append([part, f"{1000 * seconds / clock.n_steps:.2f}", f"{seconds / whole:.0%}"])
    lines.append(["together", f"{1000 * whole / clock.n_steps:.2f}", ""])
    return markdown_table(["part", "ms a step", "fraction"], lines)


def summary(clock: Clock, work: Work) -> str:
    """What was done."""
    n_rows, rate = clock.n_tokens / clock.n_steps, clock.n_tokens / sum(clock.seconds.values())
    prompt, script = (mean(map(len, texts)) for texts in (work.prompts, work.scripts))
    return (
        f"{len(work.prompts)} completions, {clock.n_tokens:,} tokens in {clock.n_steps:,} steps, on average "
        f"{n_rows:.1f} rows, prompts of {prompt:.0f} and completions of {script:.0f} tokens; {rate:,.0f} tokens/s."
    )


if __name__ == "__main__":
    run_command(main)
