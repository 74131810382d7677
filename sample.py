"""Answer word problems with a trained model: greedily, or with several samples a question."""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from minidpost import cli
from minidpost.data import datasets
from minidpost.sampling.generate import Generated, generate
from minidpost.sampling.sampler import SamplingSettings
from minidpost.storage import write_jsonl
from minidpost.text.grading import extract_answer
from minidpost.text.templates import Template

N_SHOWN = 5  # toy dev questions that are answered where none is given
BOLD, PLAIN = "\x1b[1;36m", "\x1b[0m"
ANNOTATION = re.compile(r"<<(?:[^<>]*=)?([^<>]*)>>")  # `<<48/2=24>>`, the group being its result


def main() -> None:
    options = parse_options()
    cli.check_output(options.output)
    if options.input:
        questions = datasets.load_questions(options.input)
    else:
        questions = options.questions or [example.question for example in datasets.load("toy", "dev")[:N_SHOWN]]
    _, model, template = cli.open_model(options.checkpoint, options.device, options.dtype)
    settings = SamplingSettings(
        options.temperature, options.top_k, options.top_p, options.max_new_tokens, options.slots, options.seed
    )
    calculator = not options.no_calculator
    completions = list(generate(model, template, questions, settings, options.samples, calculator))
    completions.sort(key=lambda done: (done.index, done.sample))
    if options.output:
        write_jsonl(options.output, (row(questions[done.index], done) for done in completions))
        print(f"{len(completions):,} completions of {len(questions):,} questions: {options.output}")
    else:
        show(questions, completions, template)


def parse_options() -> argparse.Namespace:
    parser = cli.model_parser(__doc__)
    parser.add_argument("questions", nargs="*", metavar="QUESTION", help=f"default: {N_SHOWN} of the toy dev set")
    parser.add_argument("--input", metavar="FILE", help="JSONL with `question`, text with one a line, or - for either")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSONL to write instead of showing completions")
    parser.add_argument("--samples", type=cli.POSITIVE, default=1, metavar="N", help="completions a question")
    parser.add_argument("--temperature", type=cli.TEMPERATURE, default=0.0, metavar="T", help="default: 0, greedy")
    parser.add_argument("--top-k", type=cli.NOT_NEGATIVE, default=0, metavar="K", help="default: 0, all tokens")
    parser.add_argument("--top-p", type=cli.FRACTION, default=1.0, metavar="P", help="default: 1, all tokens")
    parser.add_argument("--no-calculator", action="store_true", help="let the model do its own arithmetic")
    options = parser.parse_args()
    if options.samples > 1 and not options.temperature:
        parser.error(f"--samples {options.samples} needs a --temperature above 0: greedy completions are all the same")
    if options.questions and options.input:
        parser.error("questions come from the command line or from --input, not from both")
    return options


def row(question: str, done: Generated) -> dict:
    """One row of the output file."""
    answer = extract_answer(done.text)
    return {
        "index": done.index,
        "sample": done.sample,
        "question": question,
        "completion": done.text,
        "answer": None if answer is None else f"{answer:f}",
        "finish_reason": done.completion.finish_reason,
        "token_ids": done.completion.token_ids,
        "forced": done.completion.forced,
    }


def show(questions: Sequence[str], completions: Sequence[Generated], template: Template) -> None:
    """Print every question and, indented, its completions; on a terminal calculator results stand out."""
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for done in completions:
        if done.sample == 0:
            print(f"\n{printable(questions[done.index])}" if done.index else printable(questions[0]))
        text = printable(done.text)
        if colours:
            text = highlighted(text, forced_annotations(done, template))
        print("    " + text.replace("\n", "\n    "))
        if done.completion.finish_reason == "length":
            print(f"    (cut after {len(done.completion.token_ids)} tokens)")


def forced_annotations(done: Generated, template: Template) -> set[int]:
    """Which annotations of a completion, counted from 0, the calculator filled in."""
    ids, forced = done.completion.token_ids, [*done.completion.forced, False]
    ends = [i + 1 for i in range(len(ids)) if forced[i] and not forced[i + 1]]
    texts = [template.decode(ids[:end]) for end in ends]
    return {len(ANNOTATION.findall(text)) - 1 for text in texts if text.endswith(">>")}


def highlighted(text: str, numbers: set[int]) -> str:
    """The text with the results of these annotations in bold."""
    for number, match in reversed([*enumerate(ANNOTATION.finditer(text))]):
        if number in numbers:
            text = f"{text[: match.start(1)]}{BOLD}{match[1]}{PLAIN}{text[match.end(1) :]}"
    return text


def printable(text: str) -> str:
    """The text without signs that would command a terminal; a model may emit any byte."""
    return "".join(sign if sign.isprintable() or sign == "\n" else "\ufffd" for sign in text)


if __name__ == "__main__":
    cli.run_command(main)
