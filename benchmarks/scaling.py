"""How the time of a token grows with rows, length and model size, and how near it comes to what the machine allows.

Decoding is clocked inside `sampler.sample`, from one call of the model to the next, so that all that a step costs is in
it: model, choice of a token, transfer, Python. Every row has a prompt of its own; with rows the prompts have 64 tokens
and the mean is over positions 32 to 63, where GSM8K's rationales are on average. The least time a step can take is that
of reading, once, every weight that decoding needs and all keys and values in use, at the memory bandwidth, or that of
its multiplications, at the peak of the processor, whichever is longer; *of the limit* is that time divided by the time
taken (a model that fits into the processor's caches may exceed the bandwidth). Training: FLOPs as in flops.py, which
leave attention scores out, divided by the time of an optimizer step and by the peak; DPO's count each distinct prompt
once. Bandwidth and peak are measured here: the better of a triad and a sum over arrays far larger than any cache, and a
product of large square matrices in the same precision.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from statistics import median
from tempfile import TemporaryDirectory

if __name__ == "__main__":  # a program that imports this one keeps its own
    os.environ.setdefault("TQDM_DISABLE", "1")  # read when tqdm is imported

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.common import RESULTS, command_line, machine_line, timed, write_result  # noqa: E402
from benchmarks.scripted import (  # noqa: E402
    MODELS,
    ScriptedCache,
    ScriptedModel,
    model_names,
    open_shape,
    row_counts,
    scripted_work,
)
from minidpost.cli import NOT_NEGATIVE, POSITIVE, Parser, device, run_command  # noqa: E402
from minidpost.models.t5 import T5  # noqa: E402
from minidpost.precision import DTYPES, default_device  # noqa: E402
from minidpost.sampling.sampler import Request, SamplingSettings, sample  # noqa: E402
from minidpost.selftraining.estimates import (  # noqa: E402
    available_bytes,
    model_size,
    training_bytes,
    training_flops,
)
from minidpost.selftraining.presets import T5 as T5_PRESET  # noqa: E402
from minidpost.selftraining.presets import Preset, n_parameters, preset_of  # noqa: E402
from minidpost.storage import markdown_table, staged_file  # noqa: E402
from minidpost.training.batching import TokenizedExample  # noqa: E402
from minidpost.training.dpo import PreferencePair, reference_log_probabilities, train_dpo  # noqa: E402
from minidpost.training.optim import read_log  # noqa: E402
from minidpost.training.sft import train_sft  # noqa: E402

DEFAULT_MODELS = {
    "cpu": ["tiny-t5", "flan-t5-small", "flan-t5-base"],
    "cuda": ["flan-t5-small", "flan-t5-base", "flan-t5-large", "llama-3.2-1b", "llama-3-8b"],
}
PROBES = {"cpu": (2**26, 2048), "cuda": (2**28, 8192)}  # entries of an array, width of a matrix
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256]
PROMPTS = [16, 64, 128, 256, 512]
AT_PROMPT, AT_ROWS = 64, 32  # where something else varies
WINDOW = 32  # steps over which a mean is taken
MAX_CACHES = 1024  # that work side by side
RECIPE_MODEL = "flan-t5-large"
N_QUESTIONS = 6705  # [paper] GSM8K's training questions without the dev set
N_PROMPT, N_TARGET = 61, 106  # mean lengths in T5's tokens
N_DEV, N_TESTS = 768, 5015  # questions of dev, and of all four test sets


class Clocked(ScriptedModel):
    """A scripted model that notes when each step of each of its caches began."""

    def __init__(self, model: nn.Module, prompts: Sequence[tuple[int, ...]], scripts: Sequence[Sequence[int]]):
        """All scripts of one length, so that rows are never refilled."""
        super().__init__(model, prompts, scripts)
        # Shared, as the sampler may decode in processes of its own.
        self.began_CT = torch.zeros(MAX_CACHES, len(scripts[0]), dtype=torch.float64).share_memory_().numpy()
        self.n_rows_C = torch.zeros(MAX_CACHES, dtype=torch.long).share_memory_().numpy()
        self.n_caches = multiprocessing.Value("i", 0)

    def new_cache(self, n_rows: int, max_prompt: int, max_new: int) -> ScriptedCache:
        """The scripted model's, counted."""
        cache = super().new_cache(n_rows, max_prompt, max_new)
        with self.n_caches.get_lock():
            self.cache_index = self.n_caches.value  # of this process, which has one cache
            self.n_caches.value += 1
        self.n_steps = 0
        return cache

    def decode(self, cache: ScriptedCache, ids_B: Tensor) -> Tensor:
        """The scripted model's, its beginning noted."""
        self.began_CT[self.cache_index, self.n_steps] = time.perf_counter()
        self.n_rows_C[self.cache_index] = len(ids_B)
        self.n_steps += 1
        return super().decode(cache, ids_B)

    def step_seconds(self, first: int, n_steps: int) -> float:
        """The mean time of a step of all rows from position `first` on, however many caches work side by side."""
        n = self.n_caches.value
        seconds_C = (self.began_CT[:n, first + n_steps] - self.began_CT[:n, first]) / n_steps
        return float(self.n_rows_C[:n].sum() / (self.n_rows_C[:n] / seconds_C).sum())


@dataclass(frozen=True)
class Limits:
    """What the machine can do: bytes and floating-point operations a second."""

    bandwidth: float
    peak: float


@dataclass(frozen=True)
class Point:
    """The time of a step at so many rows, prompt tokens and tokens of their own, and the least it could take."""

    rows: int
    n_prompt: int
    position: int
    seconds: float
    memory_seconds: float
    peak_seconds: float

    @property
    def limit(self) -> float:
        return max(self.memory_seconds, self.peak_seconds)


@dataclass
class Scaling:
    """What was found of one model."""

    name: str
    by_rows: list[Point] = field(default_factory=list)
    by_position: list[Point] = field(default_factory=list)
    by_prompt: list[Point] = field(default_factory=list)
    training: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Rates:
    """Tokens a second: of completions when sampling; of prompts and targets in SFT, in DPO and for DPO's reference."""

    sampling: float
    sft: float
    dpo: float
    reference: float | None = None  # None: three times DPO's


def main() -> None:
    options = parse()
    limits = measure_limits(options.device, options.dtype)
    found, recipe = [Scaling(name) for name in options.model], None
    for scaling in found:
        measure_decoding(scaling, limits, options)
        rates = measure_training(scaling, limits, options) if options.examples else None
        if scaling.name == RECIPE_MODEL and options.device != "cpu" and rates:
            recipe = recipe_seconds(Rates(sampling_rate(options), *rates), T5_PRESET)
    draw(found, options.output.with_suffix(".png"), options)
    write_result(options.output, "How time grows with rows, length and size", report(found, limits, recipe, options))


def parse() -> argparse.Namespace:
    """The command line; UserError for what is wrong with it."""
    parser = Parser(description=__doc__.splitlines()[0])
    models = f"of {', '.join(MODELS)}, or directories"
    parser.add_argument("--model", type=model_names, metavar="NAMES", help=models)
    parser.add_argument("--rows", type=row_counts, default=ROWS, metavar="NUMBERS", help="default: from 1 to 256")
    parser.add_argument(
        "--prompts", type=row_counts, default=PROMPTS, metavar="NUMBERS", help="tokens; default: 16 to 512"
    )
    parser.add_argument("--length", type=POSITIVE, default=300, metavar="N", help="the last position; default: 300")
    parser.add_argument(
        "--examples", type=NOT_NEGATIVE, metavar="N", help="a training step; 0: no training; default: 8, on CUDA 96"
    )
    parser.add_argument("--steps", type=POSITIVE, default=5, metavar="N", help="of training, timed; default: 5")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp32, on CUDA bf16")
    parser.add_argument("--device", type=device, default=default_device())
    parser.add_argument(
        "--output", type=Path, help="a .md file; default: scaling.md, or scaling-cuda.md, in benchmarks/results"
    )
    options = parser.parse_args()
    kind = torch.device(options.device).type
    if kind not in DEFAULT_MODELS:
        parser.error(f"--device {options.device}: cpu or cuda is expected")
    options.model = options.model or DEFAULT_MODELS[kind]
    options.dtype = options.dtype or ("bf16" if kind == "cuda" else "fp32")
    options.examples = (96 if kind == "cuda" else 8) if options.examples is None else options.examples
    options.output = options.output or RESULTS / ("scaling.md" if kind == "cpu" else "scaling-cuda.md")
    if not options.output.absolute().parent.is_dir() or options.output.suffix != ".md":
        parser.error(f"--output {options.output}: a .md file in a directory that exists is expected")
    return options


# What the machine can do


def measure_limits(device: str, dtype_name: str, n_rounds: int = 5) -> Limits:
    """Memory bandwidth and peak, the best of several rounds."""
    dtype, (n, width) = DTYPES[dtype_name], PROBES[torch.device(device).type]
    a_N, b_N, c_N = (torch.ones(n, device=device) for _ in range(3))
    left, right = (torch.randn(width, width, device=device).to(dtype) for _ in range(2))

    def best(work) -> float:
        return min(timed(lambda: (work(), synchronize(device))) for _ in range(1 + n_rounds))

    triad = 3 * a_N.nbytes / best(lambda: torch.add(b_N, c_N, alpha=3.0, out=a_N))
    reading = a_N.nbytes / best(lambda: a_N.sum())
    return Limits(max(triad, reading), 2 * width**3 / best(lambda: left @ right))


def synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def least_seconds(model: nn.Module, rows: int, n_prompt: int, position: int, limits: Limits) -> tuple[float, float]:
    """The least time of a decoding step by memory and by multiplications."""
    config, itemsize = model.config, next(model.parameters()).itemsize
    if isinstance(model, T5):
        crossing = [layer.cross_attention for layer in model.decoder.layers]
        unread = sum(
            n_parameters(attention.key) + n_parameters(attention.value) for attention in crossing
        )  # the prompt's, cached
        n_layers, n_heads, n_kv_heads, d_head = config.n_decoder_layers, config.n_heads, config.n_heads, config.d_kv
    else:
        unread, n_layers, d_head = 0, config.n_layers, config.d_head
        n_heads, n_kv_heads = config.n_heads, config.n_kv_heads
    n_weights = model_size(model).n_target - unread
    n_attended = rows * n_layers * (n_prompt + position + 1)
    n_bytes = itemsize * (n_weights + 2 * n_kv_heads * d_head * n_attended)
    return n_bytes / limits.bandwidth, (2 * rows * n_weights + 4 * n_heads * d_head * n_attended) / limits.peak


# Decoding


def measure_decoding(scaling: Scaling, limits: Limits, options: argparse.Namespace) -> None:
    """Clock the steps of one model over rows, over positions and over prompt lengths."""
    model, template = open_shape(scaling.name, DTYPES[options.dtype], options.device)
    eos_id, at_rows = template.eos_id, min(AT_ROWS, options.rows[-1])

    def points(rows: int, n_prompt: int, firsts: Sequence[int]) -> list[Point]:
        print(f"{scaling.name}: {rows} rows, prompts of {n_prompt}, to {firsts[-1]}", file=sys.stderr, flush=True)
        n_steps = min(WINDOW, options.length)
        clocked = clocked_sampling(model, eos_id, rows, n_prompt, firsts[-1] + n_steps + 1)
        found = []
        for first in firsts:
            middle = first + n_steps // 2
            least = least_seconds(model, rows, n_prompt, middle, limits)
            found.append(Point(rows, n_prompt, middle, clocked.step_seconds(first, n_steps), *least))
        return found

    points(at_rows, AT_PROMPT, [0])  # to warm up
    usual = min(WINDOW, options.length)
    scaling.by_rows = [point for rows in options.rows for point in points(rows, AT_PROMPT, [usual])]
    firsts = dict.fromkeys((options.length - usual) * sixth // 6 for sixth in range(7))
    scaling.by_position = points(at_rows, AT_PROMPT, [*firsts])
    scaling.by_prompt = [point for n_prompt in options.prompts for point in points(at_rows, n_prompt, [usual])]


def clocked_sampling(model: nn.Module, eos_id: int, rows: int, n_prompt: int, n_new: int) -> Clocked:
    """A clocked model after the decoding of so many rows, all of one length."""
    random, n_ids = Random(0), model.config.vocab_size
    ids = [token_id for token_id in range(n_ids) if token_id != eos_id]
    prompts = [tuple(random.choices(ids, k=n_prompt)) for _ in range(rows)]
    clocked = Clocked(model, prompts, [random.choices(ids, k=n_new) for _ in range(rows)])
    requests = [Request(prompt, str(index)) for index, prompt in enumerate(prompts)]
    settings = SamplingSettings(max_new_tokens=n_new, slots=rows)
    for _ in sample(clocked, requests, settings, eos_id, use_cuda_graphs=False):  # the scripted model's own are used
        pass
    return clocked


# Training


def measure_training(scaling: Scaling, limits: Limits, options: argparse.Namespace) -> tuple[float, float] | None:
    """Steps of SFT and DPO on GSM8K's rationales; tokens a second of both, None where memory does not suffice."""
    model, template = open_shape(scaling.name, torch.float32, options.device)
    preset = preset_of(model.config, "dpo-st")
    free = available_bytes(options.device)
    if free is not None and training_bytes(model, preset) > free:
        scaling.training.append([scaling.name, "does not fit into memory", *["–"] * 4])
        return None
    n, n_steps = options.examples, options.steps + 1  # the first is to warm up
    work = scripted_work(template, n)
    sequences = [
        TokenizedExample(prompt, tuple(script)) for prompt, script in zip(work.prompts, work.scripts, strict=True)
    ]
    pairs = [
        PreferencePair(s, TokenizedExample(s.prompt_ids, sequences[index - 1].target_ids))
        for index, s in enumerate(sequences)
    ]
    sft = replace(preset.sft(0), epochs=n_steps, examples_per_step=len(sequences))
    dpo = replace(preset.dpo(len(pairs), 0), steps=n_steps, pairs_per_step=len(pairs))
    n_source = sum(len(sequence.prompt_ids) for sequence in sequences)
    rates = []
    for name, items in (("SFT", sequences), ("DPO", pairs)):
        print(f"{scaling.name}: {name}", file=sys.stderr, flush=True)
        with TemporaryDirectory() as directory:
            log = Path(directory) / "log.jsonl"
            if name == "SFT":
                train_sft(model, sequences, sft, log_path=log)
            else:
                reference_P2 = reference_log_probabilities(model, pairs, micro_batch_tokens=dpo.micro_batch_tokens)
                train_dpo(model, pairs, reference_P2, dpo, log_path=log)
            steps = list(read_log(log))[1:]
        seconds = median(step["n_tokens"] / step["tokens_per_second"] for step in steps)
        n_target = sum(len(sequence.target_ids) for item in items for sequence in item.sequences)
        flops = training_flops(model_size(model), n_source, n_target)
        rates.append(steps[0]["n_tokens"] / seconds)
        step = f"{name}, {len(items)} {'examples' if name == 'SFT' else 'pairs'}"
        fraction = flops / seconds / limits.peak
        scaling.training.append([scaling.name, step, *cells(seconds, rates[-1], flops / 1e12), f"{fraction:.0%}"])
    return rates[0], rates[1]


# The paper's recipe


def sampling_rate(options: argparse.Namespace, n_questions: int = 256) -> float:
    """Tokens a second when sampling as the recipe does: several a question, at its temperature, with calculator."""
    model, template = open_shape(RECIPE_MODEL, DTYPES[options.dtype], options.device)
    work = scripted_work(template, n_questions)
    scripted = ScriptedModel(model, work.prompts, work.scripts)
    requests = [Request(p, str(i), k) for i, p in enumerate(work.prompts) for k in range(T5_PRESET.dpo_samples)]
    started = time.perf_counter()
    settings = T5_PRESET.sampling(0)
    new_override = template.new_calculator
    rows = sample(scripted, requests, settings, template.eos_id, new_override=new_override, use_cuda_graphs=False)
    n_tokens = sum(len(row.token_ids) for row in rows)
    return n_tokens / (time.perf_counter() - started)


def recipe_seconds(rates: Rates, preset: Preset) -> dict[str, float]:
    """The time of the paper's whole recipe from the speed of its parts, a stage each.

    An upper bound in two respects: every sample becomes a pseudo-label, and the reference scores every pair that DPO's
    steps take as if none came twice. Answers of evaluation are taken to be as long as gold rationales.
    """
    n_tokens, n_pairs = N_PROMPT + N_TARGET, preset.dpo_steps * preset.dpo_pairs_per_step
    epoch, scored = N_QUESTIONS * n_tokens / rates.sft, n_pairs * 2 * n_tokens
    # All sets after the warm-up and after every iteration, dev after DPO too; dev's pass@k each time.
    of_dev = N_DEV * (1 + preset.pass_at)
    n_answers = (1 + preset.iterations) * (N_TESTS + of_dev) + preset.iterations * of_dev
    stages = {
        "SFT, warm-up": preset.sft_epochs * epoch,
        "samples for DPO": preset.iterations * N_QUESTIONS * preset.dpo_samples * N_TARGET / rates.sampling,
        "DPO, reference": preset.iterations * scored / (rates.reference or 3 * rates.dpo),
        "DPO, steps": preset.iterations * scored / rates.dpo,
        "samples for SFT": preset.iterations * N_QUESTIONS * preset.samples * N_TARGET / rates.sampling,
        "SFT, every iteration": preset.iterations * preset.sft_epochs * (1 + preset.samples) * epoch,
        "evaluation": n_answers * N_TARGET / rates.sampling,
    }
    return {**stages, "all": sum(stages.values())}


# What is written


def cells(*values: float) -> list[str]:
    """Numbers with three significant digits, or none after the point where they are large."""
    return [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values]


def report(
    found: list[Scaling], limits: Limits, recipe: dict[str, float] | None, options: argparse.Namespace
) -> list[str]:
    """The paragraphs after the title."""
    gpu = "" if options.device == "cpu" else f", {torch.cuda.get_device_name(options.device)}"
    measured = f"Measured here, {options.dtype}: {limits.bandwidth / 1e9:.1f} GB/s, {limits.peak / 1e12:.3g} TFLOP/s."
    text = [f"`{command_line()}` · {machine_line()}{gpu}", *__doc__.strip().split("\n\n")[1:], measured]
    text.append(f"![time by rows, position and prompt]({options.output.with_suffix('.png').name})")
    text += ["## Rows", table([(s.name, s.by_rows) for s in found], "rows", lambda point: point.rows)]
    at_rows = f"{min(AT_ROWS, options.rows[-1])} rows"
    text.append(f"## Position, {at_rows}, prompts of {AT_PROMPT} tokens")
    text.append(table([(s.name, s.by_position) for s in found], "position", lambda point: point.position))
    text.append(f"## Prompt, {at_rows}")
    text.append(table([(s.name, s.by_prompt) for s in found], "prompt", lambda point: point.n_prompt))
    if training := [line for scaling in found for line in scaling.training]:
        heads = ["", "step", "seconds", "tokens/s", "TFLOP", "fraction of peak"]
        text += ["## Training", markdown_table(heads, training)]
    text.append(f"## The paper's recipe, {RECIPE_MODEL}, one GPU")
    if recipe is None:
        text.append("Not measured.")
    else:
        text += [
            " ".join(recipe_seconds.__doc__.split()),
            markdown_table(["stage", "hours"], [[stage, f"{seconds / 3600:.2f}"] for stage, seconds in recipe.items()]),
        ]
    if options.device == "cpu":
        text.append("GPU rows (flan-t5-large, Llama-3.2-1B, Llama-3-8B): not measured; no GPU was at hand.")
    return text


def table(points_of_models: list[tuple[str, list[Point]]], head: str, varied: Callable[[Point], int]) -> str:
    """Points as a Markdown table, the models below each other; `varied` gives what differs between points."""
    heads = ["", head, "ms a step", "tokens/s", "of the bandwidth", "of the peak", "of the limit"]
    lines = []
    for name, points in points_of_models:
        for point in points:
            least = [point.memory_seconds, point.peak_seconds, point.limit]
            line = [name, str(varied(point)), *cells(1000 * point.seconds, point.rows / point.seconds)]
            lines.append(line + [f"{seconds / point.seconds:.0%}" for seconds in least])
    return markdown_table(heads, lines)


def draw(found: list[Scaling], path: Path, options: argparse.Namespace) -> None:
    """Three panels: tokens a second by rows with the limits, time of a step by position and by prompt."""
    import matplotlib  # here: slow to import

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(13, 4.6), layout="constrained")
    at_rows = min(AT_ROWS, options.rows[-1])
    for index, scaling in enumerate(found):
        style = {"color": f"C{index}", "marker": "o", "markersize": 4, "label": scaling.name}
        rows = [point.rows for point in scaling.by_rows]
        left.plot(rows, [point.rows / point.seconds for point in scaling.by_rows], **style)
        left.plot(rows, [point.rows / point.limit for point in scaling.by_rows], "--", color=f"C{index}", alpha=0.6)
        positions = [point.position for point in scaling.by_position]
        prompts = [point.n_prompt for point in scaling.by_prompt]
        for axes, points, values in ((middle, scaling.by_position, positions), (right, scaling.by_prompt, prompts)):
            axes.plot(values, [1000 * point.seconds for point in points], **style)
            axes.plot(values, [1000 * point.limit for point in points], "--", color=f"C{index}", alpha=0.6)
    left.set(xscale="log", yscale="log", xlabel="rows decoded at once", ylabel="tokens a second", title="more rows")
    left.set_xticks(options.rows, [str(rows) for rows in options.rows])
    left.minorticks_off()
    for axes, what in ((middle, "position of the token"), (right, "tokens of the prompt")):
        title = f"{'longer completions' if axes is middle else 'longer prompts'}, {at_rows} rows"
        axes.set(yscale="log", xlabel=what, ylabel="milliseconds a step", title=title)
        axes.set_xlim(left=0)
    for axes in (left, middle, right):
        axes.grid(alpha=0.3)
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
    handles, labels = left.get_legend_handles_labels()
    handles.append(Line2D([], [], color="grey", linestyle="--", label="the limit"))
    figure.legend(handles, [*labels, "limit: bandwidth or peak"], loc="outside lower center", ncols=len(handles))
    with staged_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)


if __name__ == "__main__":
    run_command(main)
