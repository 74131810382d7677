"""Answer word problems with a trained model: greedily, or with several samples a question.

    python sample.py                                    # five questions of the toy world, the newest model
    python sample.py "Tom has 3 apples and buys 4 more. How many apples does he have?"
    python sample.py --checkpoint runs/mine/iteration-3/sft --samples 8 --temperature 0.7 "How many …?"
    python sample.py --input questions.jsonl --output completions.jsonl

A completion is shown in GSM8K's form; on a terminal what the calculator wrote stands out. With --output every
completion is a row of JSONL: index, sample, question, completion, answer, finish_reason, token_ids, forced.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minidpost import cli
from minidpost.data import datasets
from minidpost.processes import on_rank_0, rank
from minidpost.sampling.generate import Sample, generate
from minidpost.sampling.sampler import SamplingSettings
from minidpost.storage import write_jsonl
from minidpost.text.grading import extract_answer
from minidpost.text.templates import Template

N_SHOWN = 5  # toy dev questions that are answered where none is given
BOLD, PLAIN = "\x1b[1;36m", "\x1b[0m"
ANNOTATION = re.compile(r"<<(?:[^<>]*=)?([^<>]*)>>")  # `<<48/2=24>>`, the group being its result


def main() -> None:
    """Read the questions, complete them, show or write the completions."""
    options = parse_options()
    on_rank_0(lambda: cli.check_output(options.output))
    questions = on_rank_0(lambda: read_questions(options))
    _, model, template = cli.open_model(options)
    settings = SamplingSettings(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        slots=options.slots,
        seed=options.seed,
    )
    calculator = not options.no_calculator
    samples = list(generate(model, template, questions, settings, n_samples=options.samples, calculator=calculator))
    if rank() > 0:
        return  # of several processes rank 0 gets the samples
    samples.sort(key=lambda sample: (sample.example_index, sample.sample_index))
    if options.output:
        write_jsonl(options.output, map(record, samples))
        print(f"{len(samples):,} completions of {len(questions):,} questions: {options.output}")
    else:
        show(samples, template)


def read_questions(options: argparse.Namespace) -> Sequence[str]:
    """The questions of the file, of the command line, or else a few of the toy world."""
    if options.input:
        return datasets.load_questions(options.input)
    return options.questions or [example.question for example in datasets.load("toy", "dev")[:N_SHOWN]]


def parse_options() -> argparse.Namespace:
    """The command line; UserError for flags that contradict each other."""
    parser = cli.model_parser(__doc__.splitlines()[0])
    parser.add_argument(
        "questions", nargs="*", metavar="QUESTION", help=f"what to answer (default: {N_SHOWN} of the toy dev set)"
    )
    parser.add_argument(
        "--input",
        metavar="FILE",
        help="questions to answer: JSONL with `question`, text with one a line, or - for either on standard input",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSONL file that completions are written to instead of being shown"
    )
    parser.add_argument(
        "--samples", type=cli.POSITIVE, default=1, metavar="N", help="completions of each question (default: 1)"
    )
    parser.add_argument(
        "--temperature",
        type=cli.TEMPERATURE,
        default=0.0,
        metavar="T",
        help="temperature of the choice of tokens (default: 0, always the most likely token)",
    )
    parser.add_argument(
        "--top-k",
        type=cli.NOT_NEGATIVE,
        default=0,
        metavar="K",
        help="choose among the K most likely tokens only (default: 0, among all)",
    )
    parser.add_argument(
        "--top-p",
        type=cli.FRACTION,
        default=1.0,
        metavar="P",
        help="choose among the fewest tokens that have probability P together (default: 1, among all)",
    )
    parser.add_argument("--no-calculator", action="store_true", help="let the model do its own arithmetic")
    options = parser.parse_args()
    if options.samples > 1 and not options.temperature:
        parser.error(f"--samples {options.samples} needs a --temperature above 0: greedy completions are all the same")
    if options.questions and options.input:
        parser.error("questions come from the command line or from --input, not from both")
    return options


def record(sample: Sample) -> dict[str, Any]:
    """One row of the output file."""
    answer = extract_answer(sample.completion)
    return {
        "index": sample.example_index,
        "sample": sample.sample_index,
        "question": sample.question,
        "completion": sample.completion,
        "answer": None if answer is None else f"{answer:f}",
        "finish_reason": sample.finish_reason,
        "token_ids": sample.token_ids,
        "forced": sample.forced,
    }


def show(samples: Sequence[Sample], template: Template) -> None:
    """Print every question and, indented, its completions; on a terminal calculator results stand out."""
    has_colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for sample in samples:
        if sample.sample_index == 0:
            blank_line = "\n" if sample.example_index else ""
            print(blank_line + printable(sample.question))
        text = printable(sample.completion)
        if has_colours:
            text = highlighted(text, forced_annotations(sample, template))
        print("    " + text.replace("\n", "\n    "))
        if sample.finish_reason == "length":
            print(f"    (cut after {len(sample.token_ids)} tokens)")


def forced_annotations(sample: Sample, template: Template) -> set[int]:
    """Which annotations of a completion, counted from 0, the calculator filled in."""
    indices = set()
    forced = [*sample.forced, False]
    for position in range(len(sample.token_ids)):
        # Where forced tokens end in a closing mark, the last annotation up to there is the calculator's.
        if forced[position] and not forced[position + 1]:
            text = template.decode(sample.token_ids[: position + 1])
            if text.endswith(">>"):
                indices.add(len(ANNOTATION.findall(text)) - 1)
    return indices


def highlighted(text: str, annotation_indices: set[int]) -> str:
    """The text with the results of these annotations in bold."""
    # From the last to the first, so that what is inserted moves no other annotation.
    for index, match in reversed([*enumerate(ANNOTATION.finditer(text))]):
        if index in annotation_indices:
            text = f"{text[: match.start(1)]}{BOLD}{match[1]}{PLAIN}{text[match.end(1) :]}"
    return text


def printable(text: str) -> str:
    """The text without control characters, which a terminal would obey; a model may emit any byte."""
    characters = [character if character.isprintable() or character == "\n" else "\ufffd" for character in text]
    return "".join(characters)


if __name__ == "__main__":
    cli.run_command(main)
