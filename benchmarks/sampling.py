"""Sampling with the calculator: ours against transformers, against a question at a time, and against CTranslate2.

The same weights, the same questions: one greedy completion of each, as in an evaluation, or eight samples at
temperature 0.7 from the whole vocabulary, as the method makes its labels. Every row writes the gold rationale of its
GSM8K question (most shapes have random weights, so a script decides what is said: one scatter a step for us and for
transformers alike), so that lengths and annotations are real and the calculator forces what it would force; further
samples of a question say other rationales, whose lengths scatter around the gold one's (log-normal, 0.25). Every
completion that is timed is compared with its script. In the part "its own completions" a trained model says what it
will, to toy questions.

*ours* has the calculator on, *off* is the same without, and *costs* is what the calculator adds to the time of a token
(in brackets the least and the most of all rounds); on a GPU *plain* is ours without CUDA graphs. *transformers* is
`generate` with a logits processor that keeps an automaton a row (ours), reads the last tokens in one transfer and
touches only rows that are being forced, in batches of the questions as they come and of questions sorted by length;
samples are `num_return_sequences` of one prompt. *One at a time* is what a library with a tool stop does: `generate`
for one question, a stopping criterion at an annotation's `=`, the result put after it, and on, with the same keys and
values; it is slow, so that a few questions stand for all.
*CTranslate2* has no calculator; a callback stops each row where its script ends, whatever it has written. It runs as
one worker of all threads and as workers of one thread each, which share the `rows` that are at work at once, in batches
of so many completions and of as many tokens as their questions have on average; as it was fastest in a trial of the
whole work it is measured. int8 changes what a model writes.

Numbers are tokens a second, medians of interleaved rounds; in parentheses ours divided by theirs, the median over the
rounds. Systems that no target is set for (batches as they come, one at a time, int8) take part in fewer of them.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
import transformers
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import peers  # noqa: E402
from benchmarks.common import RESULTS, command_line, machine_line, timed, write_result  # noqa: E402
from benchmarks.scripted import (  # noqa: E402
    MODELS,
    Work,
    model_names,
    natural_work,
    open_shape,
    row_counts,
    sampled,
    scripted_work,
    weights_directory,
)
from minidpost.cli import POSITIVE, Parser, device, run_command  # noqa: E402
from minidpost.models.t5 import T5  # noqa: E402
from minidpost.precision import DTYPES, default_device  # noqa: E402
from minidpost.selftraining.presets import TINY_T5  # noqa: E402
from minidpost.storage import markdown_table  # noqa: E402
from minidpost.text.templates import Template  # noqa: E402

OURS, OFF, PLAIN, PEER, PEER_SORTED = "ours", "off", "plain", "transformers", "transformers, sorted"
ONE, CT2, CT2_INT8 = "one at a time", "CTranslate2", "CTranslate2, int8"
SYSTEMS = {  # names for --contenders
    **{"ours": (OURS,), "off": (OFF,), "plain": (PLAIN,), "transformers": (PEER, PEER_SORTED)},
    **{"one": (ONE,), "ctranslate2": (CT2, CT2_INT8)},
}
EVERYWHERE = (OURS, PEER_SORTED, CT2)  # measured at every number of rows
NO_TARGETS = (PLAIN, PEER, ONE, CT2_INT8)  # measured in fewer rounds
ROWS = {"cpu": (1, 8, 16, 32, 64, 128), "cuda": (1, 8, 16, 32, 64, 128, 256)}


class Target(NamedTuple):
    """Times transformers at its best, with one completion of a question and with several."""

    one: float
    several: float


TARGETS = {
    "cpu": {
        ("tiny-t5", 64): Target(5.0, 5.0),
        ("flan-t5-small", 32): Target(2.0, 2.5),
        ("smollm2-135m", 32): Target(2.0, 2.5),
        ("flan-t5-base", 32): Target(2.0, 2.5),
    },
    "cuda": {(name, 32): Target(10.0, 10.0) for name in ("flan-t5-large", "llama-3.2-1b", "llama-3-8b")},
}
CT2_TARGET, CALCULATOR_TARGET = 1.0, 0.01  # times CTranslate2 at its best; fraction of a token's time
EARLIER_TARGETS = "Targets were higher before version 0.4.0, and most were missed: see [speed.md](../../docs/speed.md)."
N_ONE_AT_A_TIME = 4  # questions
SLOW, SLOW_ROWS = ("flan-t5-base", "smollm2-135m"), (8, 32, 128)  # models that take long on a CPU, and rows for them
COMPLETIONS_A_ROW = {"tiny-t5": 6, "smollm2-135m": 2}  # more where they take little time, fewer where long
PROBE_TOKENS, MAX_PROBE_ROWS = 8, 16  # where precisions are compared
N_THREADS = torch.get_num_threads()

Completions = list[list[int]]
Run = Callable[[Work], tuple[float, Completions]]  # the seconds that the work takes, and what comes of it


@dataclass(frozen=True)
class Part:
    """A section of the report: a model, whether it writes what it will, and numbers of rows, its target's first."""

    model: str
    is_natural: bool
    counts: tuple[int, ...]
    n_samples: int = 1

    @property
    def title(self) -> str:
        samples = f", {self.n_samples} samples a question" if self.n_samples > 1 else ""
        return self.model + (", its own completions" if self.is_natural else samples)


@dataclass(frozen=True)
class Implementations:
    """One model in each system: ours and transformers' in the precision that is faster there."""

    template: Template
    model: nn.Module
    peer: transformers.PreTrainedModel
    converted: peers.CTranslate2 | None


@dataclass
class Measured:
    """What was found at one number of rows: tokens a second of each round, and what is remarked."""

    rows: int
    work: Work
    n_tokens: int = 0
    variants: dict[str, str] = field(default_factory=dict)  # the fastest of each system
    rates: dict[str, list[float]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def times_slower(self, name: str) -> float:
        """Our tokens a second divided by theirs."""
        return median(ours / theirs for ours, theirs in zip(self.rates[OURS], self.rates[name], strict=False))

    def calculator_costs(self) -> list[float]:
        """By what fraction the calculator makes a token slower, in each round."""
        return [off / on - 1 for on, off in zip(self.rates[OURS], self.rates[OFF], strict=True)]


def main() -> None:
    options = parse()
    wanted, found = parts(options), {}
    for part in wanted:
        found[part] = measure_part(part, options)
        report(options, found, [other for other in wanted if other not in found])


def report(options: argparse.Namespace, found: dict[Part, tuple[list[Measured], list[str]]], rest: list[Part]) -> None:
    """Write what has been measured, and what has not."""
    text = [f"`{command_line()}` · {machine(options)}", *__doc__.strip().split("\n\n")[1:]]
    if rest:
        text.append(f"Not measured: {'; '.join(part.title for part in rest)}.")
    if options.device == "cpu":
        text.append("GPU rows (flan-t5-large, Llama-3.2-1B, Llama-3-8B): not measured; no GPU was at hand.")
        if peers.ctranslate2 is None:
            text.append("CTranslate2: not measured; it is not installed here (`pip install ctranslate2`).")
    if targets := [*target_rows(found, TARGETS[torch.device(options.device).type])]:
        text += ["## Targets", EARLIER_TARGETS, markdown_table(["", "target", "measured", ""], targets)]
    for part, (measured, remarks) in found.items():
        text += [f"## {part.title}", table(measured), "\n".join(f"- {remark}" for remark in remarks)]
    write_result(options.output, "Sampling: ours, transformers, CTranslate2", text, is_whole=not rest)


def parse() -> argparse.Namespace:
    """The command line; UserError for what is wrong with it."""
    parser = Parser(
        description=f"{__doc__.splitlines()[0]} CTranslate2 takes part where it is installed: pip install ctranslate2."
    )
    models = f"of {', '.join(MODELS)}, or directories; default: those of the targets"
    parser.add_argument("--model", type=model_names, metavar="NAMES", help=models)
    parser.add_argument("--natural", action="store_true", help="their own completions to toy questions, no scripts")
    parser.add_argument(
        "--rows", type=row_counts, metavar="NUMBERS", help="rows at once; default: from 1 to 128, or 256"
    )
    samples = "of a question: one is greedy, several are random as in the method; default: 1,8"
    parser.add_argument("--samples", type=row_counts, default=[1, 8], metavar="NUMBERS", help=samples)
    parser.add_argument("--questions", type=POSITIVE, metavar="N", help="default: some a row, 8 without scripts")
    parser.add_argument(
        "--rounds", type=POSITIVE, default=5, metavar="N", help="at the rows that have a target; default: 5"
    )
    others = "at other rows, and of systems that no target is set for; default: 1"
    parser.add_argument("--other-rounds", type=POSITIVE, default=1, metavar="N", help=others)
    parser.add_argument("--contenders", type=names, metavar="NAMES", help=f"of {', '.join(SYSTEMS)}; default: all")
    precisions = "fp32, bf16 or both: each system in its faster one; default: both, bf16 on CUDA"
    parser.add_argument("--dtype", type=names, metavar="NAMES", help=precisions)
    parser.add_argument("--device", type=device, default=default_device())
    parser.add_argument("--output", type=Path, help="default: sampling.md, or sampling-cuda.md, in benchmarks/results")
    options = parser.parse_args()
    kind = torch.device(options.device).type
    if kind not in TARGETS:
        parser.error(f"--device {options.device}: cpu or cuda is expected")
    options.dtype = options.dtype or (["bf16"] if kind == "cuda" else ["fp32", "bf16"])
    chosen = options.contenders or [*SYSTEMS]
    for flag, values, known in (("dtype", options.dtype, DTYPES), ("contenders", chosen, SYSTEMS)):
        if unknown := [value for value in values if value not in known]:
            parser.error(f"--{flag} {unknown[0]}: one of {', '.join(known)} is expected")
    if options.contenders and "ctranslate2" in chosen and (peers.ctranslate2 is None or kind != "cpu"):
        parser.error("--contenders ctranslate2: it is measured on CPU, and where it is installed (pip)")
    options.systems = [name for key, group in SYSTEMS.items() if key in ("ours", *chosen) for name in group]
    options.output = options.output or RESULTS / ("sampling.md" if kind == "cpu" else "sampling-cuda.md")
    if not options.output.absolute().parent.is_dir():
        parser.error(f"--output {options.output}: its directory does not exist")
    return options


def names(text: str) -> list[str]:
    return text.split(",")


def machine(options: argparse.Namespace) -> str:
    """Where this runs."""
    packages = ["transformers", *(["ctranslate2"] if peers.ctranslate2 and options.device == "cpu" else [])]
    gpu = [] if options.device == "cpu" else [torch.cuda.get_device_name(options.device)]
    return ", ".join([machine_line(*packages), *gpu])


def parts(options: argparse.Namespace) -> list[Part]:
    """What is to be measured. By default tiny-t5 also writes what it will, at the rows of its target.

    At those alone, too, all have more samples a question than in the first of their parts.
    """
    kind = torch.device(options.device).type
    targets = TARGETS[kind]

    def counts(name: str) -> tuple[int, ...]:
        known = SLOW_ROWS if name in SLOW else ROWS[kind]
        return tuple(sorted(options.rows or known, key=lambda rows: ((name, rows) not in targets, rows)))

    if options.model is not None or options.natural:
        models, several = options.model or [name for name, _ in targets], () if options.natural else options.samples
        return [Part(name, options.natural, counts(name), n) for n in several or (1,) for name in models]
    own = [Part(name, True, (rows,)) for name, rows in targets if name == "tiny-t5"]
    one, *more = options.samples
    scripted = [
        Part(name, False, (rows,) if n in more else counts(name), n) for name, rows in targets for n in (one, *more)
    ]
    return own + scripted


def measure_part(part: Part, options: argparse.Namespace) -> tuple[list[Measured], list[str]]:
    """Every number of rows of one part, and what else is to be said of it."""
    found: list[Measured] = []
    with TemporaryDirectory() as directory:
        opened, remarks = open_implementations(part, options, Path(directory))
        for rows in part.counts:
            work = work_for(part, opened.template, rows, options)
            print(f"{part.title}: {rows} rows, {len(work.prompts)} completions", file=sys.stderr, flush=True)
            runs = {name: variants for name, variants in runs_of(opened, rows) if name in options.systems}
            if found:  # the rest has been said at the first number of rows
                known = {name: found[0].variants[name] for name in runs if name in EVERYWHERE}
                runs = {name: {variant: runs[name][variant]} for name, variant in known.items()}
            is_target = (part.model, rows) in TARGETS[torch.device(options.device).type]
            n_rounds = options.rounds if is_target else options.other_rounds
            found.append(measure(rows, work, runs, n_rounds, options.other_rounds))
        first = found[0]
        if opened.converted is not None:
            if not part.is_natural:
                part_of_work = first.work.part(2 * first.rows)
                fraction = opened.converted.callback_fraction(part_of_work, (N_THREADS, 1), first.rows)
                remarks.append(f"CTranslate2's callback takes {fraction:.1%} of its time (all rows cut at 32 tokens).")
            opened.converted.close()
    prompts, completions = mean(map(len, first.work.prompts)), first.n_tokens / len(first.work.prompts)
    remarks.append(
        f"{first.rows} rows: on average prompts of {prompts:.0f} and completions of {completions:.0f} tokens."
    )
    return found, remarks + [remark for measured in found for remark in measured.remarks]


def work_for(part: Part, template: Template, rows: int, options: argparse.Namespace) -> Work:
    """Questions enough for rows to be refilled; fewer where the number of rows is not the telling one."""
    a_row = 8 if part.is_natural else COMPLETIONS_A_ROW.get(part.model, 3)
    n_completions = max(8, a_row * rows if rows == part.counts[0] else rows)
    n_questions = options.questions or -(-n_completions // part.n_samples)
    if part.is_natural:
        return natural_work(template, n_questions, TINY_T5.max_new_tokens)
    return scripted_work(template, n_questions, n_samples=part.n_samples)


def open_implementations(part: Part, options: argparse.Namespace, directory: Path) -> tuple[Implementations, list[str]]:
    """The model in all systems, and what was found of precisions where there are two to choose from."""
    models = {}
    for dtype in options.dtype:
        models[dtype], template = open_shape(part.model, DTYPES[dtype], options.device)
    twins = {dtype: peers.twin(model) for dtype, model in models.items()}
    converted = None
    remarks = ["Weights: random." if weights_directory(part.model) is None else "Weights: the model's own."]
    if CT2 in options.systems and peers.ctranslate2 and "fp32" in models and options.device == "cpu":
        converted = peers.CTranslate2(twins["fp32"], directory) if isinstance(models["fp32"], T5) else None
    rows = part.counts[0]
    probe = scripted_work(template, min(rows, MAX_PROBE_ROWS)).part(rows, PROBE_TOKENS)
    chosen = []
    for system, runs in (
        ("ours", {dtype: clocked(sampled, model, rows) for dtype, model in models.items()}),
        ("transformers", {dtype: clocked(peers.generate, twin, rows) for dtype, twin in twins.items()}),
    ):
        run_once = {dtype: run(probe.part(1))[0] for dtype, run in runs.items()}  # to warm up
        seconds = {dtype: runs[dtype](probe)[0] for dtype in run_once}
        chosen.append(min(seconds, key=seconds.get))
        if len(seconds) > 1:
            found = ", ".join(f"{dtype} {second:.2f} s" for dtype, second in seconds.items())
            remarks.append(
                f"Precision, {system}: {chosen[-1]} "
                f"({found}; {len(probe.prompts)} prompts, {PROBE_TOKENS} tokens each)."
            )
    return Implementations(template, models[chosen[0]], twins[chosen[1]], converted), remarks


def clocked(function: Callable[..., Completions], model: nn.Module, *arguments, **settings) -> Run:
    """A run from a function of a model, work and more."""

    def run(work: Work) -> tuple[float, Completions]:
        torch.set_num_threads(N_THREADS)  # should another run have changed it
        completions: Completions = []
        seconds = timed(lambda: completions.extend(function(model, work, *arguments, **settings)))
        return seconds, completions

    return run


def runs_of(opened: Implementations, rows: int) -> Iterator[tuple[str, dict[str, Run]]]:
    """Each system's variants to complete all questions, of which the fastest is to be found where there are several."""
    yield OURS, {"": clocked(sampled, opened.model, rows)}
    yield OFF, {"": clocked(sampled, opened.model, rows, has_calculator=False)}
    if next(opened.model.parameters()).is_cuda:
        yield PLAIN, {"": clocked(sampled, opened.model, rows, use_cuda_graphs=False)}
    yield PEER, {"": clocked(peers.generate, opened.peer, rows, is_sorted=False)}
    yield PEER_SORTED, {"": clocked(peers.generate, opened.peer, rows)}
    yield ONE, {"": clocked(one_at_a_time, opened.peer)}
    if opened.converted is not None:
        yield CT2, translations(opened.converted, rows, {"float32", "bfloat16"})
        yield CT2_INT8, translations(opened.converted, rows, {"int8"})


def one_at_a_time(peer: transformers.PreTrainedModel, work: Work) -> Completions:
    """A few questions, each by itself."""
    return peers.one_at_a_time(peer, work.part(N_ONE_AT_A_TIME))


def translations(converted: peers.CTranslate2, rows: int, compute_types: set[str]) -> dict[str, Run]:
    """CTranslate2's variants: precision, workers times threads, what a batch is."""
    variants = {}
    for compute_type in sorted(compute_types & converted.compute_types):
        for threads in dict.fromkeys([(1, N_THREADS), (N_THREADS, 1)]):
            for batch_type, unit in (("examples", "questions"), ("tokens", "tokens")):
                name = f"{compute_type}, {threads[0]} × {threads[1]} workers and threads, batches by {unit}"
                variant = {
                    "threads": threads,
                    "compute_type": compute_type,
                    "batch_size": max(1, rows // threads[0]),
                    "batch_type": batch_type,
                }
                variants[name] = partial(converted.translate, **variant)
    return variants


def measure(rows: int, work: Work, runs: dict[str, dict[str, Run]], n_rounds: int, n_other: int) -> Measured:
    """Choose each system's variant, then time all in turn, back and forth; what they wrote is compared every time.

    Those that no target is set for take part in the first `n_other` rounds.
    """
    measured = Measured(rows, work)
    for name, variants in runs.items():
        # Variants are compared by all of the work: what is fastest for short completions is not for whole ones.
        trial = work if len(variants) > 1 else work.part(2 * rows, PROBE_TOKENS)  # or to warm up
        seconds = {variant: run(trial)[0] for variant, run in variants.items()}
        measured.variants[name] = min(seconds, key=seconds.get)
        if len(variants) > 1:
            measured.remarks.append(f"{name}: {measured.variants[name]}.")
    written: dict[str, Completions] = {}
    for round_index in range(n_rounds):
        order = [name for name in runs if round_index < n_other or name not in NO_TARGETS]
        order = order if round_index % 2 == 0 else order[::-1]
        for name in order:
            seconds, written[name] = runs[name][measured.variants[name]](work)
            measured.rates.setdefault(name, []).append(sum(map(len, written[name])) / seconds)
            print(f"  round {round_index + 1}, {name}: {seconds:.1f} s", file=sys.stderr, flush=True)
        measured.n_tokens = sum(map(len, written[OURS]))
        remarks = compare(work, written)
    measured.remarks += [f"{rows} rows: {remark}" for remark in remarks]
    return measured


def compare(work: Work, written: dict[str, Completions]) -> list[str]:
    """How many completions are as they should be, in words; RuntimeError where a script was not followed."""
    remarks = []
    for name, completions in written.items():
        if work.scripts is None:
            expected = written.get(OFF if name in (CT2, CT2_INT8) else OURS)
            n_same = sum(found == ours for found, ours in zip(completions, expected or [], strict=False))
            if expected is not None and name not in (OURS, OFF):
                remarks.append(f"{name}: {n_same} of {len(completions)} completions are ours, token for token.")
        elif name in (CT2, CT2_INT8):
            if sorted(map(len, completions)) != sorted(map(len, work.scripts)):
                raise RuntimeError(f"{name}: a completion has not its script's length")
        elif completions != work.scripts[: len(completions)]:
            raise RuntimeError(f"{name}: a completion is not its script")
    return remarks


def table(found: list[Measured]) -> str:
    """A line for each number of rows, a column for each system."""
    columns = [*dict.fromkeys(name for measured in found for name in measured.rates)]
    heads = ["rows", "completions", "tokens", "rounds", *columns]
    if OFF in columns:
        heads.insert(heads.index(OFF) + 1, "costs")
    lines = []
    for measured in sorted(found, key=lambda measured: measured.rows):
        counts = [measured.rows, len(measured.work.prompts), measured.n_tokens, len(measured.rates[OURS])]
        line = [f"{count:,}" for count in counts]
        for name in columns:
            is_there = name in measured.rates
            rate = f"{median(measured.rates[name]):,.0f}" if is_there else "–"
            is_peer = is_there and name not in (OURS, OFF)
            line.append(f"{rate} ({measured.times_slower(name):.1f}×)" if is_peer else rate)
            if name == OFF:
                costs = measured.calculator_costs() if is_there else []
                line.append(f"{median(costs):+.1%} [{min(costs):+.1%}, {max(costs):+.1%}]" if costs else "–")
        lines.append(line)
    return markdown_table(heads, lines)


def target_rows(found: dict[Part, tuple[list[Measured], list[str]]], targets: dict) -> Iterator[list[str]]:
    """Every target that was measured: what it is of, what it is, what was found, and whether that is enough."""
    for part, (all_measured, _) in found.items():
        for measured in all_measured:
            target = targets.get((part.model, measured.rows))
            if target is None:
                continue
            of_peer = target.one if part.n_samples == 1 else target.several
            for group, least in (((PEER, PEER_SORTED), of_peer), ((CT2,), CT2_TARGET)):
                if times := [measured.times_slower(name) for name in group if name in measured.rates]:
                    title = f"{part.title}, {measured.rows} rows, times {group[0]} at its best"
                    yield [title, f"≥ {least:g}×", f"{min(times):.2f}×", "reached" if min(times) >= least else "missed"]
            if OFF in measured.rates:
                cost = median(measured.calculator_costs())
                reached = "reached" if cost <= CALCULATOR_TARGET else "missed"
                title = f"{part.title}, {measured.rows} rows, what the calculator costs"
                yield [title, f"≤ {CALCULATOR_TARGET:.0%}", f"{cost:+.1%}", reached]


if __name__ == "__main__":
    run_command(main)
