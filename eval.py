"""Measure a model: greedy accuracy, and where asked pass@k and maj@k, with and without the calculator.

    python eval.py                                      # the newest model on the toy test sets
    python eval.py --checkpoint tiny-t5-dpo-st --pass-at 1,10 --maj-at 10 --limit 100
    python eval.py --checkpoint runs/mine/iteration-3/sft --tasks gsm8k,svamp --calculator on
    python eval.py --tasks gsm8k --output scores.json

Every score is printed with its 95 % interval: Wilson's for fractions, a mean's for pass@k and maj@k.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minidpost import cli
from minidpost.data import datasets, toy
from minidpost.data.example import Example
from minidpost.processes import on_rank_0, rank
from minidpost.sampling.sampler import DecodingModel, SamplingSettings
from minidpost.selftraining.evaluation import greedy_accuracy, percent, sampled_scores
from minidpost.storage import markdown_table, write_json
from minidpost.text.templates import Template

CALCULATORS = {"on": (True,), "off": (False,), "both": (True, False)}


def main() -> None:
    """Load the test sets and the model, measure, print a table."""
    options = parse_options()
    on_rank_0(lambda: cli.check_output(options.output))
    sets = on_rank_0(lambda: load_sets(options))
    directory, model, template = cli.open_model(options)
    results = [
        measure(model, template, name, examples, calculator=calculator, options=options)
        for name, examples in sets.items()
        for calculator in CALCULATORS[options.calculator]
    ]
    if rank() > 0:
        return
    if options.output:
        write_json(options.output, {"checkpoint": str(directory), "split": options.split, "results": results})
    print(f"{directory}\n\n{table(results)}")


def parse_options() -> argparse.Namespace:
    """The command line; UserError for flags that contradict each other."""
    parser = cli.model_parser(__doc__.splitlines()[0])
    tasks = ", ".join(datasets.SPLITS)
    parser.add_argument(
        "--tasks", type=names, default=["toy"], metavar="NAME,…", help=f"datasets, of {tasks} (default: toy)"
    )
    parser.add_argument(
        "--split", default="test", help="split of every dataset (default: test, of which toy has four kinds)"
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
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON file that the scores are written to besides the table"
    )
    cli.add_data_dir(parser)
    parser.add_argument(
        "--temperature",
        type=cli.TEMPERATURE,
        default=0.7,
        metavar="T",
        help="temperature of the samples for pass@k and maj@k (default: 0.7)",
    )
    options = parser.parse_args()
    if not options.temperature and max([1, *options.pass_at, *options.maj_at]) > 1:
        parser.error("pass@k and maj@k need a --temperature above 0: greedy completions are all the same")
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
            sets[f"{task}/{split}"] = datasets.load(task, split, options.data_dir)[: options.limit]
    return sets


def measure(
    model: DecodingModel,
    template: Template,
    name: str,
    examples: Sequence[Example],
    *,
    calculator: bool,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """One entry of the results: a set of questions, with or without calculator."""
    settings = SamplingSettings(
        temperature=options.temperature,
        max_new_tokens=options.max_new_tokens,
        slots=options.slots,
        seed=options.seed,
    )
    label = f"{name}, calculator {'on' if calculator else 'off'}"
    accuracy = greedy_accuracy(model, template, examples, settings, calculator=calculator, label=label)
    result: dict[str, Any] = {"task": name, "calculator": calculator, "n": len(examples), "accuracy": asdict(accuracy)}
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
        )
        result["pass_at"] = {str(k): asdict(score) for k, score in sampled.pass_at.items()}
        result["maj_at"] = {str(k): asdict(score) for k, score in sampled.maj_at.items()}
    return result


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


if __name__ == "__main__":
    cli.run_command(main)
