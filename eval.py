"""Measure a model: greedy accuracy, and where asked pass@k and maj@k, with and without the calculator.

    python eval.py                                      # the best model of the newest run, toy test sets
    python eval.py --checkpoint tiny-t5-dpo-st --pass-at 1,10 --maj-at 10 --limit 100
    python eval.py --checkpoint runs/mine/iteration-3/sft --tasks gsm8k,svamp --calculator on
    python eval.py --tasks mine.jsonl                   # your own questions and answers
    python eval.py --tasks gsm8k --output scores.json --save-completions completions.jsonl
    python eval.py --tasks gsm8k --baseline scores.json         # the difference to an earlier evaluation, or to a run

Every score is printed with its 95 % interval: Wilson's for fractions, a mean's for pass@k and maj@k. With --output or
--save-completions, finished tasks and chunks of samples are saved, and after a kill the same command goes on.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from minidpost import cli
from minidpost.data import datasets, toy
from minidpost.data.example import Example
from minidpost.errors import UserError, when_memory_runs_out
from minidpost.models.hf_config import Model
from minidpost.processes import from_rank_0, on_rank_0, rank
from minidpost.sampling.generate import check_prompts
from minidpost.sampling.sampler import DecodingModel, SamplingSettings
from minidpost.selftraining.comparison import (
    Baseline,
    check_baseline,
    differences,
    questions_hash,
    read_baseline,
)
from minidpost.selftraining.evaluation import greedy_outcomes, mean_score, percent, sampled_scores
from minidpost.selftraining.job import Job, progress_directory
from minidpost.selftraining.report import points
from minidpost.selftraining.run_directory import Chunks, json_object, model_hash, versions
from minidpost.storage import markdown_table, write_json, write_jsonl
from minidpost.text.templates import Template

TEMPERATURE = 0.7
CALCULATORS = {"on": (True,), "off": (False,), "both": (True, False)}


def main() -> None:
    """Load the test sets and the model, measure, print a table."""
    # 1) Everything that can be wrong is found before anything is written.
    options = parse_options()
    outputs = [path for path in (options.output, options.save_completions) if path is not None]
    for flag, path in (("--output", options.output), ("--save-completions", options.save_completions)):
        progress = progress_directory(outputs[0]) if outputs else None
        on_rank_0(partial(cli.check_output, flag, path, overwrite=options.overwrite, progress=progress))
    sets = on_rank_0(lambda: load_sets(options))
    baseline: Baseline = {}
    if options.baseline:
        baseline = read_baseline(options.baseline)
        calculators = CALCULATORS[options.calculator]
        measured = {(name, calculator): sets[name] for name in sets for calculator in calculators}
        check_baseline(options.baseline, baseline, measured)
    directory, model, template = cli.open_model(options)
    for examples in sets.values():
        questions = [example.question for example in examples]
        check_prompts(questions, [template.prompt_ids(question) for question in questions])

    # 2) Measure; and where a file is asked for, save what is done: of several processes rank 0 does.
    advice = f"fewer --slots (now {options.slots:,}) need less; the same command with them continues here"
    if outputs and rank() > 0:
        with when_memory_runs_out(advice):
            is_finished = from_rank_0(False)
            if not is_finished:
                measure_all(options, sets, job=None, model=model, template=template)
        return
    if outputs:
        identity = identity_of(options, sets, directory, model)
        with Job(outputs, identity, overwrite=options.overwrite) as job, when_memory_runs_out(advice):
            if from_rank_0(job.is_finished and options.output is not None):
                results = json_object(options.output)["results"]
                job.remove()
            else:
                results = measure_all(options, sets, job=job, model=model, template=template)
                compare(results, baseline)
                evaluation = {
                    "checkpoint": str(directory),
                    "split": options.split,
                    "results": results,
                    "settings": identity,
                    "versions": versions(),
                }
                writers: dict[Path, Callable[[Path], None]] = {}
                if options.save_completions:
                    writers[options.save_completions] = lambda path: write_jsonl(path, completions(options, sets, job))
                if options.output:
                    writers[options.output] = lambda path: write_json(path, evaluation)
                job.finish(writers)
    else:
        results = measure_all(options, sets, job=None, model=model, template=template)
    if rank() > 0:
        return
    compare(results, baseline)

    # 3) Show.
    print(f"{directory}\n\n{table(results)}")
    if baseline:
        print(f"\nMinus {options.baseline}, in points, question by question:\n\n{difference_table(results)}")


def parse_options() -> argparse.Namespace:
    """The command line; UserError for flags that contradict each other."""
    parser = cli.model_parser(__doc__)
    tasks = ", ".join(datasets.SPLITS)
    parser.add_argument(
        "--tasks",
        type=names,
        default=["toy"],
        metavar="NAME,…",
        help=f"datasets, of {tasks}, or JSONL files of question and answer (default: toy)",
    )
    parser.add_argument(
        "--split",
        default="test",
        help="split of every dataset (default: test, of which toy has four kinds, and which is all of a file; dev is "
        "the tenth of a file that train.py holds out, train the rest)",
    )
    parser.add_argument(
        "--calculator", choices=CALCULATORS, default="both", help="measure with it, without it, or both (default: both)"
    )
    parser.add_argument(
        "--pass-at", type=counts, default=(), metavar="K,…", help="measure pass@k for each K (default: none)"
    )
    parser.add_argument(
        "--maj-at", type=counts, default=(), metavar="K,…", help="measure maj@k for each K (default: none)"
    )
    parser.add_argument(
        "--limit", type=cli.POSITIVE, metavar="N", help="only the first N questions of every set (default: all)"
    )
    cli.add_output(parser, "JSON file of scores, outcomes of each question, settings and versions, besides the table")
    parser.add_argument(
        "--save-completions", type=Path, metavar="FILE", help="JSONL file that all completions are written to, graded"
    )
    parser.add_argument(
        "--baseline",
        type=Path,
        metavar="PATH",
        help="show paired differences to an earlier evaluation: a JSON file of --output, or a directory of train.py, "
        "of whose best model there is greedy accuracy alone",
    )
    cli.add_data_dir(parser)
    parser.add_argument(
        "--temperature",
        type=cli.TEMPERATURE,
        metavar="T",
        help=f"temperature of the samples for pass@k and maj@k (default: {TEMPERATURE})",
    )
    options = parser.parse_args()
    if not options.pass_at and not options.maj_at:
        parser.warn_without(options, ("temperature",), "--pass-at or --maj-at")
    if not options.output and not options.save_completions:
        parser.warn_without(options, ("overwrite",), "--output or --save-completions")
    if options.temperature is None:
        options.temperature = TEMPERATURE
    if not options.temperature and max([1, *options.pass_at, *options.maj_at]) > 1:
        parser.error("pass@k and maj@k need a --temperature above 0: greedy completions are all the same")
    if options.output is not None and options.output == options.save_completions:
        parser.error("--output and --save-completions must be two files")
    return options


def names(text: str) -> list[str]:
    """A flag's type: names between commas."""
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def counts(text: str) -> list[int]:
    """A flag's type: values of k between commas."""
    return sorted({int(cli.POSITIVE(k)) for k in text.split(",")})


def load_sets(options: argparse.Namespace) -> dict[str, list[Example]]:
    """The questions of every task's split, by task/split; names are checked before anything is fetched."""
    for task in options.tasks:
        datasets.check_split(task, options.split)
    sets = {}
    for task in options.tasks:
        is_toy_test = task == "toy" and options.split == "test"
        for split in toy.TEST_SPLITS if is_toy_test else [options.split]:
            name = f"{Path(task).stem if datasets.is_own(task) else task}/{split}"
            if name in sets:
                raise UserError(f"--tasks {task}: another task has the name {name} too; rename the file")
            sets[name] = datasets.load(task, split, options.data_dir)[: options.limit]
    return sets


def identity_of(
    options: argparse.Namespace, sets: dict[str, list[Example]], directory: Path, model: Model
) -> dict[str, Any]:
    """Everything that the results depend on: the settings of the job, which the results are written with."""
    weight = next(model.parameters())
    names = "tasks split calculator pass_at maj_at limit template temperature max_new_tokens slots seed".split()
    return {
        "command": "eval.py",
        "weights": model_hash(directory),
        "questions": questions_hash([example for examples in sets.values() for example in examples]),
        **{name: vars(options)[name] for name in names},
        "dtype": str(weight.dtype),
        "device": weight.device.type,
    }


def measure_all(
    options: argparse.Namespace,
    sets: dict[str, list[Example]],
    *,
    job: Job | None,
    model: Model,
    template: Template,
) -> list[dict[str, Any]]:
    """The results: an entry for each set, with calculator, without, or both."""
    return [
        measure(model, template, name, examples, calculator=calculator, options=options, job=job)
        for name, examples in sets.items()
        for calculator in CALCULATORS[options.calculator]
    ]


def compare(results: Sequence[dict[str, Any]], baseline: Baseline) -> None:
    """Give each entry its "difference" to the baseline's, where that has one."""
    for result in results:
        before = baseline.get((result["task"], result["calculator"]))
        if before is not None:
            result["difference"] = differences(result, before)


def measure(
    model: DecodingModel,
    template: Template,
    name: str,
    examples: Sequence[Example],
    *,
    calculator: bool,
    options: argparse.Namespace,
    job: Job | None = None,
) -> dict[str, Any]:
    """One entry of the results: a set of questions, with or without calculator.

    Besides the scores it has what they are means of: "correct", 1 or 0 for each question, and where several samples
    were taken "n_correct", of "n_samples", and "majority" by k.
    """
    settings = SamplingSettings(
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
        slots=options.slots,
        seed=options.seed,
    )
    label = f"{name}, calculator {'on' if calculator else 'off'}"
    correct = greedy_outcomes(
        model,
        template,
        examples,
        settings,
        calculator=calculator,
        label=label,
        chunks=part(job, name, calculator, "greedy"),
    )
    result: dict[str, Any] = {
        "task": name,
        "calculator": calculator,
        "n": len(examples),
        "questions": questions_hash(examples),
        "accuracy": asdict(mean_score(correct)),
        "correct": correct,
    }
    if options.pass_at or options.maj_at:
        sampled = sampled_scores(
            model,
            template,
            examples,
            settings,
            pass_at=options.pass_at,
            maj_at=options.maj_at,
            calculator=calculator,
            label=f"{label}, sampled",
            chunks=part(job, name, calculator, "sampled"),
        )
        result["pass_at"] = {str(k): asdict(score) for k, score in sampled.pass_at.items()}
        result["maj_at"] = {str(k): asdict(score) for k, score in sampled.maj_at.items()}
        result["n_samples"] = sampled.n_samples
        result["n_correct"] = sampled.n_correct
        result["majority"] = {str(k): outcomes for k, outcomes in sampled.majority.items()}
    return result


def part(job: Job | None, name: str, calculator: bool, kind: str) -> Chunks | None:
    """Where a job saves the samples of one set, with or without calculator; `kind` is greedy or sampled."""
    return None if job is None else job.chunks(name, calculator, kind)


def completions(options: argparse.Namespace, sets: dict[str, list[Example]], job: Job) -> Iterator[dict[str, Any]]:
    """Every completion as a row: set, calculator, kind (greedy or sampled), then the fields of a Sample."""
    kinds = ("greedy", "sampled") if options.pass_at or options.maj_at else ("greedy",)
    for name in sets:
        for calculator in CALCULATORS[options.calculator]:
            for kind in kinds:
                records = list(job.chunks(name, calculator, kind).records())
                records.sort(key=lambda record: (record["example_index"], record["sample_index"]))
                for record in records:
                    yield {"task": name, "calculator": calculator, "kind": kind, **record}


def table(results: Sequence[dict[str, Any]]) -> str:
    """The results as a Markdown table, every score with its 95 % interval."""
    sampled = [(kind, k) for kind in ("pass_at", "maj_at") for k in results[0].get(kind, ())]
    heads = ["task", "calculator", "questions", "accuracy", *(f"{kind[:-3]}@{k}" for kind, k in sampled)]
    lines = []
    for result in results:
        scores = [result["accuracy"], *(result[kind][k] for kind, k in sampled)]
        n_questions = f"{result['n']:,}"
        lines.append(
            [
                result["task"],
                "on" if result["calculator"] else "off",
                n_questions,
                *(percent(score) for score in scores),
            ]
        )
    return markdown_table(heads, lines)


def difference_table(results: Sequence[dict[str, Any]]) -> str:
    """The differences to the baseline as a Markdown table; a dash where the baseline lacks a score."""
    compared = [result for result in results if "difference" in result]
    sampled = [(kind, k) for kind in ("pass_at", "maj_at") for k in compared[0].get(kind, ())]
    heads = ["task", "calculator", "questions", "accuracy", *(f"{kind[:-3]}@{k}" for kind, k in sampled)]
    lines = []
    for result in compared:
        difference = result["difference"]
        scores = [difference["accuracy"], *(difference.get(kind, {}).get(k) for kind, k in sampled)]
        cells = ["–" if score is None else points(score) for score in scores]
        calculator = "on" if result["calculator"] else "off"
        lines.append([result["task"], calculator, f"{difference['accuracy']['n']:,}", *cells])
    return markdown_table(heads, lines)


if __name__ == "__main__":
    cli.run_command(main)
