"""Answer word problems with a trained model: greedily, or with several samples a question.

    python sample.py                                    # five toy questions, the best model of the newest run
    python sample.py "Tom has 3 apples and buys 4 more. How many apples does he have?"
    python sample.py --checkpoint runs/mine/iteration-3/sft --samples 8 --temperature 0.7 "How many …?"
    python sample.py --input questions.jsonl --output completions.jsonl
    python sample.py --interactive                      # asks for one question after another

A single completion is written to a terminal as the model writes it, several in order, each when it has ended.
A completion is shown in GSM8K's form; on a terminal what the calculator wrote stands out. With --output every
completion is a row of JSONL: index, sample, the fields of the question's own row, question, completion, answer,
finish_reason, token_ids, forced. Rows are saved a chunk at a time, and after a kill the same command goes on.
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from minidpost import cli
from minidpost.data import datasets
from minidpost.data.datasets import QuestionFile
from minidpost.errors import UserError, when_memory_runs_out
from minidpost.models.hf_config import Model
from minidpost.processes import from_rank_0, on_rank_0, rank, started_by_torchrun
from minidpost.progress import Progress
from minidpost.sampling import sampler
from minidpost.sampling.generate import Sample, check_prompt, generate, shared_chunk_size
from minidpost.sampling.sampler import Row, SamplingSettings
from minidpost.selftraining.job import Job, begun_setting, progress_directory
from minidpost.selftraining.run_directory import Chunks, model_hash
from minidpost.text.grading import extract_answer
from minidpost.text.templates import Template
from minidpost.training.state import fingerprint

N_SHOWN = 5  # toy dev questions that are answered where none is given
BLOCK = 16  # chunks whose questions are in memory together
BOLD, PLAIN = "\x1b[1;36m", "\x1b[0m"
ANNOTATION = re.compile(r"<<(?:[^<>]*=)?([^<>]*)>>")  # `<<48/2=24>>`, the group being its result


def main() -> None:
    """Read the questions, complete them, show or write the completions."""
    options = parse_options()
    if options.output:
        progress = progress_directory(options.output)
        on_rank_0(lambda: cli.check_output("--output", options.output, overwrite=options.overwrite, progress=progress))
    if options.interactive:
        _, model, template = cli.open_model(options)
        converse(options, model, template)
        return
    questions = Questions(options)
    directory, model, template = cli.open_model(options)
    questions.check(template)
    if options.output:
        identity = on_rank_0(lambda: settings_of_job(options, questions, directory=directory, model=model))
        if options.chunk is None:
            options.chunk = on_rank_0(lambda: default_chunk(options, questions, model, identity))
        write(options, questions, identity | {"chunk": options.chunk}, model=model, template=template)
    else:
        answer(options, [row["question"] for row in questions.rows()], model=model, template=template)


class Questions:
    """What is to be answered: rows of a file, or questions of the command line; `n` counts them."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Read and check all rows once; UserError where one is broken."""
        self.file: QuestionFile | None = datasets.open_questions(options.input) if options.input else None
        self.texts: list[str] = options.questions
        if not self.file and not self.texts:
            self.texts = [example.question for example in datasets.load("toy", "dev")[:N_SHOWN]]
        self.n = sum(1 for _ in self.rows())

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows, each with its `question` and the user's own fields."""
        return self.file.rows() if self.file else iter({"question": text} for text in self.texts)

    def check(self, template: Template) -> None:
        """UserError where a question is empty, or longer than a prompt may be."""
        for number, row in enumerate(self.rows(), start=1):
            check_prompt(number, row["question"], template.prompt_ids(row["question"]))

    def check_unchanged(self) -> None:
        """UserError where the file of the questions was written to."""
        if self.file:
            self.file.check_unchanged()

    def sha256(self) -> str:
        """What tells these questions from others."""
        return self.file.sha256() if self.file else fingerprint(self.texts)


def parse_options() -> argparse.Namespace:
    """The command line; UserError for flags that contradict each other."""
    parser = cli.model_parser(__doc__)
    parser.add_argument(
        "questions", nargs="*", metavar="QUESTION", help=f"what to answer (default: {N_SHOWN} of the toy dev set)"
    )
    parser.add_argument(
        "--input",
        metavar="FILE",
        help="questions to answer: JSONL with `question`, text with one a line, or - for either on standard input",
    )
    cli.add_output(parser, "JSONL file that completions are written to instead of being shown")
    parser.add_argument(
        "--chunk",
        type=cli.POSITIVE,
        metavar="N",
        help=f"rows of --output that are saved together: of fewer, a kill costs less, and sampling is a little slower "
        f"(default: {sampler.CHUNK}; of a large model on a CPU {sampler.CPU_CHUNK_PER_SLOT} a slot; on a GPU "
        f"{sampler.GPU_CHUNK_PER_SLOT} a slot, of several GPUs fewer)",
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
        metavar="K",
        help="choose among the K most likely tokens only (default: 0, among all)",
    )
    parser.add_argument(
        "--top-p",
        type=cli.FRACTION,
        metavar="P",
        help="choose among the fewest tokens that have probability P together (default: 1, among all)",
    )
    parser.add_argument(
        "--interactive",
        action="store_true",
        help="ask for one question after another, on the terminal; an empty line or Ctrl-D ends",
    )
    parser.add_argument("--no-calculator", action="store_true", help="let the model do its own arithmetic")
    options = parser.parse_args()
    if options.samples > 1 and not options.temperature:
        parser.error(f"--samples {options.samples} needs a --temperature above 0: greedy completions are all the same")
    if not options.temperature:
        parser.warn_without(options, ("top_k", "top_p"), "a --temperature above 0")
    if not options.output:
        parser.warn_without(options, ("chunk", "overwrite"), "--output")
    if options.questions and options.input:
        parser.error("questions come from the command line or from --input, not from both")
    if options.interactive and (options.input or options.output):
        parser.error("--interactive asks and answers on the terminal, without --input and --output")
    if started_by_torchrun() and (options.interactive or options.input == "-"):
        parser.error("of several processes none has the terminal: --interactive and --input - are for one")
    for name, default in (("top_k", 0), ("top_p", 1.0)):
        if vars(options)[name] is None:
            vars(options)[name] = default
    return options


def settings_of_job(
    options: argparse.Namespace, questions: Questions, *, directory: Path, model: Model
) -> dict[str, Any]:
    """What makes a command the same one, so that it goes on where it was stopped; all but the size of a chunk."""
    weight = next(model.parameters())
    names = "template samples temperature top_k top_p max_new_tokens slots seed no_calculator".split()
    return {
        "command": "sample.py",
        "weights": model_hash(directory),
        "questions": questions.sha256(),
        **{name: vars(options)[name] for name in names},
        "dtype": str(weight.dtype),
        "device": weight.device.type,
    }


def default_chunk(options: argparse.Namespace, questions: Questions, model: Model, identity: Mapping[str, Any]) -> int:
    """The rows that are saved together where --chunk is not given: as many as when the job was begun."""
    begun = begun_setting(options.output, "chunk", identity)
    if isinstance(begun, int) and begun > 0:
        return begun
    return shared_chunk_size(model, options.slots, questions.n * options.samples)


def sampling_settings(options: argparse.Namespace) -> SamplingSettings:
    """The settings that the flags ask for."""
    return SamplingSettings(
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        max_new_tokens=options.max_new_tokens,
        slots=options.slots,
        seed=options.seed,
    )


# -- rows for a file --------------------------------------------------------------------------------------------------


def write(
    options: argparse.Namespace,
    questions: Questions,
    identity: Mapping[str, Any],
    *,
    model: Model,
    template: Template,
) -> None:
    """Write a row for each completion to --output, going on where a command of the same `identity` was stopped.

    Of several processes rank 0 writes.
    """
    advice = f"fewer --slots (now {options.slots:,}) need less; the same command with them continues here"
    if rank() > 0:
        with when_memory_runs_out(advice):
            is_finished = from_rank_0(False)
            if not is_finished:
                sample_chunks(options, questions, None, model=model, template=template)
        return
    with Job([options.output], identity, overwrite=options.overwrite) as job, when_memory_runs_out(advice):
        if from_rank_0(job.is_finished):
            job.remove()
        else:
            chunks = job.chunks("rows")
            sample_chunks(options, questions, chunks, model=model, template=template)
            job.finish({options.output: lambda path: concatenate(chunks.files(), path)})
    print(f"{questions.n * options.samples:,} completions of {questions.n:,} questions: {options.output}")


def sample_chunks(
    options: argparse.Namespace,
    questions: Questions,
    chunks: Chunks | None,
    *,
    model: Model,
    template: Template,
) -> None:
    """Sample and save the chunks that are missing; in memory are the questions of one block of chunks.

    A chunk's rows depend on its block alone, and blocks are the same wherever a job was stopped. With --chunk 4 and
    --samples 3 a block has 16 * 4 // 3 = 21 questions, whose 63 rows make 15 chunks of 4 and one of 3. Of several
    processes rank 0 has the `chunks`.
    """
    questions_per_block = max(1, BLOCK * options.chunk // options.samples)
    chunks_per_block = -(-questions_per_block * options.samples // options.chunk)  # rounded up
    rows = questions.rows()
    n_rows = questions.n * options.samples
    n_before = 0 if chunks is None else chunks.n_records
    with Progress(total=n_rows, initial=n_before, desc="sampling", unit="row", disable=rank() > 0) as progress:
        for block_index in range(-(-questions.n // questions_per_block)):
            block = list(islice(rows, questions_per_block))
            n_finished = on_rank_0(lambda: 0 if chunks is None else chunks.n_finished())
            n_finished -= block_index * chunks_per_block  # chunks of this block and later ones
            if n_finished >= chunks_per_block:
                continue
            questions.check_unchanged()
            samples = generate(
                model,
                template,
                [row["question"] for row in block],
                sampling_settings(options),
                n_samples=options.samples,
                calculator=not options.no_calculator,
                first_chunk=n_finished,
                chunk_size=options.chunk,
                progress=progress,
            )
            # Rows end in any order. A chunk's are those of successive questions, so that sorted chunks make a sorted
            # file.
            while chunk := list(islice(samples, options.chunk)):
                assert chunks is not None  # other ranks than 0 get no samples
                chunk.sort(key=place)
                first_index = block_index * questions_per_block
                records = [record(sample, block[sample.example_index], first_index) for sample in chunk]
                chunks.commit(chunks.n_finished(), records)


def place(sample: Sample) -> tuple[int, int]:
    """Where a completion stands among all: by question, then by sample."""
    return sample.example_index, sample.sample_index


def concatenate(sources: Sequence[Path], target: Path) -> None:
    """Write the content of all sources, one after another."""
    with open(target, "wb") as output:
        for source in sources:
            with open(source, "rb") as stream:
                shutil.copyfileobj(stream, output)


def record(sample: Sample, row: dict[str, Any], first_index: int) -> dict[str, Any]:
    """One row of the output file: what is ours, and the fields of the question's own `row`.

    `first_index` is that of the first question of the sample's block. A field that has the name of one of ours is
    called input_NAME.
    """
    answer = extract_answer(sample.completion)
    ours = {
        "question": sample.question,
        "completion": sample.completion,
        "answer": None if answer is None else f"{answer:f}",
        "finish_reason": sample.finish_reason,
        "token_ids": sample.token_ids,
        "forced": sample.forced,
    }
    result: dict[str, Any] = {"index": first_index + sample.example_index, "sample": sample.sample_index}
    for name, value in row.items():
        if name == "question":
            continue
        while name in result or name in ours:
            name = f"input_{name}"
        result[name] = value
    return result | ours


# -- completions on a terminal ----------------------------------------------------------------------------------------


def converse(options: argparse.Namespace, model: Model, template: Template) -> None:
    """Answer the command line's questions, then one after another that is typed; an empty line or the end ends."""
    if options.questions:
        answer(options, options.questions, model=model, template=template)
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401  (gives `input` its history and its keys)
    prompt = "? " if sys.stdin.isatty() else ""
    while True:
        try:
            question = input(prompt).strip()
            if not question:
                return
            answer(options, [question], model=model, template=template, with_questions=False)
        except EOFError:
            print()
            return
        except (UserError, UnicodeDecodeError) as error:  # too long, or no text: the next one may be better
            print(f"sample.py: {cli.one_line(error)}", file=sys.stderr)


def answer(
    options: argparse.Namespace,
    questions: Sequence[str],
    *,
    model: Model,
    template: Template,
    with_questions: bool = True,
) -> None:
    """Show the completions of questions, in order; on a terminal a single one as it is written."""
    is_single = len(questions) * options.samples == 1
    is_streamed = sys.stdout.isatty() and is_single and not started_by_torchrun()
    stream = Stream(template)
    samples = generate(
        model,
        template,
        questions,
        sampling_settings(options),
        n_samples=options.samples,
        calculator=not options.no_calculator,
        progress=Progress(disable=True) if is_streamed else None,  # a bar would stand in the way
        on_token=stream.write if is_streamed else None,
    )
    if is_streamed:
        if with_questions:
            print(printable(questions[0]), flush=True)
        for sample in samples:
            stream.end(sample)
        return
    for sample in in_order(samples, options.samples):
        with Progress.external_write_mode(file=sys.stdout):
            show([sample], template, with_questions=with_questions)


def in_order(samples: Iterable[Sample], n_samples: int) -> Iterator[Sample]:
    """Samples by question and number, each as soon as all before it have ended."""
    waiting: dict[tuple[int, int], Sample] = {}
    n_shown = 0
    for sample in samples:
        waiting[place(sample)] = sample
        while divmod(n_shown, n_samples) in waiting:
            yield waiting.pop(divmod(n_shown, n_samples))
            n_shown += 1


def show(samples: Sequence[Sample], template: Template, *, with_questions: bool = True) -> None:
    """Print every question and, indented, its completions; on a terminal calculator results stand out."""
    for sample in samples:
        if sample.sample_index == 0 and with_questions:
            blank_line = "\n" if sample.example_index else ""
            print(blank_line + printable(sample.question))
        print(shown(sample.completion, forced_annotations(sample, template)))
        print_cut(sample)


def shown(text: str, annotation_indices: set[int]) -> str:
    """A completion as it is printed: indented, and on a terminal with these annotations' results in bold."""
    text = printable(text)
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        text = highlighted(text, annotation_indices)
    return "    " + text.replace("\n", "\n    ")


def print_cut(sample: Sample) -> None:
    """Say that a completion was cut, if it was."""
    if sample.finish_reason == "length":
        print(f"    (cut after {len(sample.token_ids)} tokens)")


class Stream:
    """A completion on the terminal while it is written: what can no longer change is printed.

    What is written is not yet canonical: an annotation gets its form when it is closed, the answer's mark when the line
    goes on. In the end, all that was printed is what `show` prints.
    """

    def __init__(self, template: Template) -> None:
        self.template = template
        self.printed = ""

    def write(self, row: Row) -> None:
        """Print what a row's latest token has settled."""
        text = self.template.decode(row.token_ids)
        annotations = forced_annotations(row, self.template)
        self._print(shown(text[: n_settled(text)], annotations))

    def end(self, sample: Sample) -> None:
        """Print the rest."""
        text = shown(sample.completion, forced_annotations(sample, self.template))
        self._print(text)
        if not text.startswith(self.printed):  # a template did what n_settled does not know
            print("\n" + text, end="")
        print()
        print_cut(sample)

    def _print(self, text: str) -> None:
        """Print by how much a text is longer than what was printed."""
        if text.startswith(self.printed):
            print(text[len(self.printed) :], end="", flush=True)
            self.printed = text


def n_settled(text: str) -> int:
    """How many characters at the beginning of an unfinished canonical completion stay, whatever is written next.

    Not so: an annotation that is still open, be it `<<48/2=` or T5's `[ 48 / 2 =`; and at the end spaces, marks that
    may become `####` or `<<`, half a character, and `$ -`, which becomes `$-5`.
    """
    settled = len(text.rstrip(" \n#<\ufffd$€£-+."))
    for opening, closing in (("<<", ">>"), ("[", "]")):
        opened = text.rfind(opening)
        if opened >= 0 and closing not in text[opened:]:
            settled = min(settled, len(text[:opened].rstrip()))
    return settled


def forced_annotations(sample: Sample | Row, template: Template) -> set[int]:
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
