"""The questions of a run with everything that was sampled for them, in compressed blocks that a page opens one by one.

A run of 7,000 questions and 30 samples of each has some fifty megabytes of rationales. Each distinct text of a question
is kept once; a block of BLOCK questions is JSON, compressed with gzip, in base64. Beside the blocks there is one index
of counts, by which the page filters, searches and sorts without opening any.

Of each rationale its steps are marked: a step is an annotation (`<<48/2=24>>`) with

    OK          the result is that of its left side, and the number after it is the result
    WRONG       the left side has another value, which is given, or none
    COPIED      the result is right, but the number that follows the annotation is another
    DEPARTS     the first step of an incorrect rationale whose result no correct rationale of its question has; that
                is a hint where it went wrong, not a proof, as another way may be right so far
"""

import base64
import gzip
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from minidpost.data import datasets, toy
from minidpost.data.example import Example
from minidpost.errors import UserError
from minidpost.page.runs import BROKEN, Measured, RunFiles, count, iterations_of, number, text
from minidpost.storage import read_jsonl
from minidpost.text.calculator import evaluate_expression
from minidpost.text.grading import extract_answer, parse_number
from minidpost.text.templates import ANNOTATION

BLOCK = 50  # questions
MAX_TEXT = 20_000  # characters of a text that are shown

OK, WRONG, COPIED, DEPARTS = range(4)  # of a step
INCORRECT, CORRECT, NO_ANSWER, UNGRADED = range(4)  # of a sample
CUT = 4  # added to the grade of a sample that the length limit ended
ALL_FORCED = 1  # of a sample: the results of all its right calculations were the calculator's
NONE_FORCED = 0
SOME_FORCED = 2  # some were, and the files do not say which

_NUMBER_AFTER = re.compile(r"\s?[$€£]?(-?[0-9][0-9,]*(?:\.[0-9]+)?)")


@dataclass(frozen=True)
class Step:
    """One annotation of a rationale: where it stands, where its result begins, and what is to be said of it.

    Positions count characters (code points). `value` is the right result where the one written is wrong.
    """

    start: int
    result_start: int
    end: int
    kind: int
    value: str | None = None


def steps_of(rationale: str) -> list[Step]:
    """The steps of a rationale, each OK, WRONG or COPIED."""
    steps = []
    for match in ANNOTATION.finditer(rationale):
        expression, equals, result = match[1].partition("=")
        value = evaluate_expression(expression)
        following = _NUMBER_AFTER.match(rationale, match.end())
        kind = OK
        if not equals or value is None or not same_number(value, result):
            kind = WRONG
        elif following is not None and not same_number(following[1], result):
            kind = COPIED
        result_start = match.start(1) + len(expression) + len(equals)
        steps.append(Step(match.start(), result_start, match.end(), kind, value if kind == WRONG else None))
    return steps


def same_number(a: str, b: str) -> bool:
    """Whether two texts are one number."""
    value = known_number(a)
    return value is not None and value == known_number(b)


@lru_cache(maxsize=2**14)  # samples of one question have the same results
def known_number(text_of_number: str) -> Decimal | None:
    """`parse_number`, remembered."""
    return parse_number(text_of_number)


def results_of(rationale: str, steps: list[Step]) -> list[str]:
    """The result of each step, as a number's shortest writing."""
    results = []
    for step in steps:
        value = known_number(rationale[step.result_start : step.end - 2])
        results.append("" if value is None else f"{value.normalize():f}")
    return results


def n_forced_results(forced: list[bool]) -> int:
    """How many results the calculator wrote: runs of forced tokens."""
    return bytes([False, *forced]).count(b"\0\1")


def how_forced(forced: list[bool], steps: list[Step], is_cut: bool) -> int:
    """Which results of a completion the calculator wrote: all of the right ones, none, or some of them.

    Whatever is forced ends a right calculation, so that all are forced where there are as many of both. The last one
    of a completion that was cut may be unfinished, and so no step.
    """
    n_forced = n_forced_results(forced)
    n_right = sum(step.kind != WRONG for step in steps)
    if n_forced == 0:
        return NONE_FORCED
    return ALL_FORCED if n_forced == n_right or (is_cut and n_forced == n_right + 1) else SOME_FORCED


# -- one question -----------------------------------------------------------------------------------------------------


@dataclass
class Question:
    """A question of the pool and everything that a run has made of it; a text is named by its place in `texts`.

    `rounds` has, for each round of sampling, the samples that are alike in (text, grade, how forced), with their
    indices. `pairs` are (iteration, chosen, rejected, similarity), `labels` (iteration, text, source).
    """

    question: str
    answer: str | None
    texts: dict[str, int] = field(default_factory=dict)
    steps: list[list[Step]] = field(default_factory=list)  # of each text
    gold: int | None = None
    rounds: dict[int, dict[tuple[int, int, int], list[int]]] = field(default_factory=dict)
    pairs: list[tuple[int, int, int, float]] = field(default_factory=list)
    labels: list[tuple[int, int, str]] = field(default_factory=list)

    def place(self, rationale: str) -> int:
        """The place of a text, which it gets now, and its steps, unless it has one."""
        shown = rationale[:MAX_TEXT]
        if shown not in self.texts:
            self.texts[shown] = len(self.texts)
            self.steps.append(steps_of(shown))
        return self.texts[shown]

    def block_entry(self) -> dict[str, Any]:
        """The question as a block has it, with the steps of every text."""
        texts = list(self.texts)
        steps = list(self.steps)
        correct = {place for alike in self.rounds.values() for place, grade, _ in alike if grade % CUT == CORRECT}
        correct |= {place for _, place, _ in self.labels} | ({self.gold} if self.gold is not None else set())
        known = {result for place in correct for result in results_of(texts[place], steps[place])}
        for place, rationale in enumerate(texts):
            if place not in correct and known:
                steps[place] = with_departure(rationale, steps[place], known)
        return {
            "texts": [
                [rationale, [step_entry(step) for step in of]] for rationale, of in zip(texts, steps, strict=True)
            ],
            "gold": self.gold,
            "rounds": {
                index: [[place, grade, forced, samples] for (place, grade, forced), samples in alike.items()]
                for index, alike in sorted(self.rounds.items())
            },
            "pairs": self.pairs,
            "labels": self.labels,
        }


def step_entry(step: Step) -> list[Any]:
    """A step as a block has it: start, start of the result, end, kind, and the right result where it is another."""
    entry: list[Any] = [step.start, step.result_start, step.end, step.kind]
    return entry if step.value is None else [*entry, step.value]


def with_departure(rationale: str, steps: list[Step], known: set[str]) -> list[Step]:
    """The steps with the first one marked whose result no correct rationale has."""
    for index, (step, result) in enumerate(zip(steps, results_of(rationale, steps), strict=True)):
        if result not in known:
            if step.kind == OK:
                marked = Step(step.start, step.result_start, step.end, DEPARTS)
                return [*steps[:index], marked, *steps[index + 1 :]]
            return steps
    return steps


# -- all questions of a run -------------------------------------------------------------------------------------------


@dataclass
class Round:
    """One sampling of all questions: a file of samples, or the chunks of one that is being written."""

    name: str
    stage: str
    is_finished: bool
    paths: list[Path]


@dataclass
class Questions:
    """All questions of a run, in order of their indices, and the rounds that were sampled for them."""

    rounds: list[Round]
    questions: list[Question]
    iterations: list[int]

    @property
    def n_blocks(self) -> int:
        """The number of blocks."""
        return -(-len(self.questions) // BLOCK)

    def block(self, index: int) -> str:
        """One block, packed."""
        return packed([question.block_entry() for question in self.questions[BLOCK * index : BLOCK * (index + 1)]])

    def blocks(self) -> Iterator[str]:
        """All blocks, packed one at a time."""
        for index in range(self.n_blocks):
            yield self.block(index)

    def index(self) -> dict[str, Any]:
        """The counts of each question, as columns."""
        rounds = []
        for index, of_round in enumerate(self.rounds):
            grades = [grades_of(question, index) for question in self.questions]
            rounds.append(
                {
                    "name": of_round.name,
                    "stage": of_round.stage,
                    "is_finished": of_round.is_finished,
                    "samples": [len(of_question) for of_question in grades],
                    "correct": [sum(grade % CUT == CORRECT for grade in of_question) for of_question in grades],
                    "no_answer": [sum(grade % CUT == NO_ANSWER for grade in of_question) for of_question in grades],
                    "cut": [sum(grade >= CUT for grade in of_question) for of_question in grades],
                }
            )
        return {
            "block": BLOCK,
            "questions": [question.question for question in self.questions],
            "answers": [question.answer for question in self.questions],
            "has_gold": [int(question.gold is not None) for question in self.questions],
            "rounds": rounds,
            "iterations": self.iterations,
            "pairs": [
                [sum(pair[0] == iteration for pair in question.pairs) for question in self.questions]
                for iteration in self.iterations
            ],
            "labels": [
                [
                    sum(label[0] == iteration and label[2] == "sample" for label in question.labels)
                    for question in self.questions
                ]
                for iteration in self.iterations
            ],
        }


def grades_of(question: Question, round_index: int) -> list[int]:
    """The grade of each of a question's samples of a round."""
    alike = question.rounds.get(round_index, {})
    return [grade for (_, grade, _), samples in alike.items() for _ in samples]


def packed(value: object) -> str:
    """A value as JSON, compressed with gzip, in base64: text that may stand anywhere in a page."""
    written = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(gzip.compress(written.encode("utf-8"), compresslevel=6, mtime=0)).decode("ascii")


def rounds_of(run: RunFiles) -> list[Round]:
    """The samplings of a run in their order, the one at work among them."""
    rounds = []
    for iteration in iterations_of(run.path):
        number_of = iteration.name.removeprefix("iteration-")
        for kind, purpose in (("dpo", "for pairs"), ("sft", "for labels")):
            path = iteration / f"samples-{kind}.jsonl"
            name = f"iteration {number_of}, {purpose}"
            if path.is_file():
                rounds.append(Round(name, f"{iteration.name}/{path.name}", True, [path]))
            elif chunks := chunks_in(iteration / f"{path.name}.progress"):
                rounds.append(Round(f"{name} (being sampled)", f"{iteration.name}/{path.name}", False, chunks))
    return rounds


def chunks_in(progress: Path) -> list[Path]:
    """The chunks of a sampling at work, in order; none of those that another one left, see run_directory.Chunks."""
    prefixes: dict[str, list[Path]] = {}
    for path in sorted(progress.glob("*.jsonl")):
        prefixes.setdefault(path.name.partition("-")[0], []).append(path)
    return max(prefixes.values(), key=lambda paths: max(path.stat().st_mtime for path in paths), default=[])


def read_questions(run: RunFiles) -> Questions:
    """Everything a run has sampled, made pairs of and made labels of; what cannot be read is noted."""
    rounds = rounds_of(run)
    by_index: dict[int, Question] = {}
    for round_index, of_round in enumerate(rounds):
        for path in of_round.paths:
            for_each_record(run, path, partial(add_sample, by_index, round_index))
    by_text = {question.question: question for question in by_index.values()}
    iterations = []
    for directory in iterations_of(run.path):
        iteration = int(directory.name.removeprefix("iteration-"))
        takers = {"pairs.jsonl": add_pair, "pseudo-labels.jsonl": add_label}
        found = {name: add for name, add in takers.items() if (directory / name).is_file()}
        if found:
            iterations.append(iteration)
        for name, add in found.items():
            for_each_record(run, directory / name, partial(add, by_text, iteration))
    return Questions(rounds, [by_index[index] for index in sorted(by_index)], iterations)


def for_each_record(run: RunFiles, path: Path, take: Callable[[dict[str, Any]], None]) -> None:
    """Give each record of a JSONL file to `take`; the first that cannot be read ends it, with a note."""
    name = path.relative_to(run.path)
    try:
        for line_number, record in read_jsonl(path):
            try:
                take(record)
            except BROKEN as error:
                run.note(f"{name}, line {line_number}: not what train.py writes ({error!s:.80})")
                return
    except (UserError, OSError) as error:
        run.note(f"{name}: {str(error).removeprefix(f'{path}, ')}")


def add_sample(by_index: dict[int, Question], round_index: int, record: dict[str, Any]) -> None:
    """Sort a line of a file of samples in."""
    example_index = count(record["example_index"])
    sample_index = count(record["sample_index"])
    answer = record["answer"]
    completion = text(record["completion"])
    forced = record["forced"]
    if not isinstance(forced, list):
        raise ValueError("forced is no list")
    if example_index not in by_index:
        by_index[example_index] = Question(text(record["question"]), None if answer is None else text(answer))
    question = by_index[example_index]
    place = question.place(completion)
    is_cut = record["finish_reason"] != "stop"
    grade = grade_of(record["is_correct"], completion) + CUT * is_cut
    key = (place, grade, how_forced(forced, question.steps[place], is_cut))
    question.rounds.setdefault(round_index, {}).setdefault(key, []).append(sample_index)


def grade_of(is_correct: object, completion: str) -> int:
    """A sample's grade, from the file's own; whether an incorrect one has an answer at all is looked up."""
    if is_correct is None:
        return UNGRADED
    if is_correct is True:
        return CORRECT
    return NO_ANSWER if extract_answer(completion) is None else INCORRECT


def add_pair(by_text: dict[str, Question], iteration: int, record: dict[str, Any]) -> None:
    """Sort a line of pairs.jsonl in."""
    question = by_text.get(text(record["question"]))
    if question is not None:
        chosen = question.place(text(record["chosen"]))
        rejected = question.place(text(record["rejected"]))
        question.pairs.append((iteration, chosen, rejected, number(record["similarity"])))


def add_label(by_text: dict[str, Question], iteration: int, record: dict[str, Any]) -> None:
    """Sort a line of pseudo-labels.jsonl in; the human rationale is known by its source."""
    question = by_text.get(text(record["question"]))
    if question is not None:
        place = question.place(text(record["rationale"]))
        source = "gold" if record["source"] == "gold" else "sample"
        question.labels.append((iteration, place, source))
        if source == "gold":
            question.gold = place


# -- the questions of evaluations -------------------------------------------------------------------------------------


def evaluation_sets(run: RunFiles, data_dir: Path) -> list[dict[str, Any]]:
    """For each set that was evaluated its questions' outcomes by model: greedy, and how many samples were correct.

    A run does not keep the questions of its evaluations, nor the answers; `questions` are those of the dataset where
    that is at hand, or of a file of completions, else None.
    """
    sets: dict[str, dict[str, Any]] = {}
    for iteration, evaluation in enumerate(run.evaluations):
        for model in ("dpo", "sft"):
            scores = evaluation.get(model)
            if scores is None:
                continue
            for name, score in scores["greedy"].items():
                n = len(score["correct"])
                entry = sets.setdefault(name, new_set(name, n))
                if n != entry["n"]:
                    run.note(f"iteration-{iteration}/evaluation.json: {name} has {n} questions, it had {entry['n']}")
                    continue
                outcomes: dict[str, Any] = {"name": f"{iteration}/{model}", "correct": score["correct"]}
                if name == run.dev and scores["sampled"] is not None:
                    outcomes["n_samples"] = scores["sampled"]["n_samples"]
                    outcomes["n_correct"] = scores["sampled"]["n_correct"]
                entry["models"].append(outcomes)
    for measured in run.measured:
        add_completions(run, measured, sets)
    for name, entry in sets.items():
        examples = dataset_questions(run, name, data_dir)
        is_known = examples is not None and len(examples) >= entry["n"]
        known = examples[: entry["n"]] if examples is not None and is_known else None
        if known is not None:
            entry["questions"] = [example.question for example in known]
            entry["answers"] = [example.answer for example in known]
        entry["gold"] = None if known is None else [example.rationale for example in known]
    return list(sets.values())


def new_set(name: str, n: int) -> dict[str, Any]:
    """A set of `n` questions that nothing is known of yet."""
    return {"name": name, "n": n, "models": [], "questions": None, "answers": None}


def add_completions(run: RunFiles, measured: Measured, sets: dict[str, dict[str, Any]]) -> None:
    """Add the greedy completions of a model, with its steps, and the questions, which are in their file too.

    Those with the calculator are taken where there are both. A set that the run was not measured on is added.
    """
    if measured.completions is None:
        return
    by_set: dict[tuple[bool, str], dict[int, dict[str, Any]]] = {}
    try:
        for _, record in read_jsonl(measured.completions):
            if record["kind"] == "greedy":
                key = (record["calculator"] is not True, text(record["task"]))
                by_set.setdefault(key, {})[count(record["example_index"])] = {
                    "question": text(record["question"]),
                    "answer": text(record["answer"]),
                    "completion": text(record["completion"])[:MAX_TEXT],
                    "is_correct": int(record["is_correct"] is True),
                }
    except BROKEN as error:
        run.note(f"{measured.completions}: not what eval.py --save-completions writes ({error!s:.80})")
        return
    done = set()
    for (_, name), records in sorted(by_set.items()):
        entry = sets.setdefault(name, new_set(name, len(records)))
        if name in done or sorted(records) != list(range(entry["n"])):
            continue  # of other questions than the run's own evaluation
        done.add(name)
        in_order = [records[index] for index in range(entry["n"])]
        entry["questions"] = [record["question"] for record in in_order]
        entry["answers"] = [record["answer"] for record in in_order]
        model = next((known for known in entry["models"] if known["name"] == measured.model), None)
        if model is None:
            model = {"name": measured.model, "correct": [record["is_correct"] for record in in_order]}
            entry["models"] = sorted([*entry["models"], model], key=lambda known: iteration_and_kind(known["name"]))
        model["completions"] = [
            [record["completion"], [step_entry(step) for step in steps_of(record["completion"])]] for record in in_order
        ]


def iteration_and_kind(model: str) -> tuple[int, str]:
    """What the models of a run are ordered by: "2/sft" is of iteration 2."""
    iteration, _, kind = model.partition("/")
    return int(iteration), kind


def dataset_questions(run: RunFiles, name: str, data_dir: Path) -> list[Example] | None:
    """The questions of a set such as gsm8k/test, in order, where its files are here; nothing is fetched.

    The toy world's are made by this code: they are a run's only if this code made its training questions too.
    """
    dataset, _, split = name.partition("/")
    if run.data_name != run.settings.get("data") or split not in datasets.SPLITS.get(dataset, ()):
        return None  # a file of the user's own that is called like a dataset
    if dataset != "toy" and not all((data_dir / path).is_file() for path in files_of(dataset)):
        return None
    try:
        if dataset == "toy" and not is_our_toy_world(run):
            return None
        return datasets.load(dataset, split, data_dir)
    except (*BROKEN, RecursionError):
        return None


def files_of(dataset: str) -> list[str]:
    """The files of a dataset within the data directory."""
    return [path for path in datasets.SOURCES if path.startswith(f"{dataset}/")]


def is_our_toy_world(run: RunFiles) -> bool:
    """Whether the first question that a run sampled for is the first of the toy world as this code makes it."""
    for of_round in rounds_of(run):
        for path in of_round.paths[:1]:
            for _, record in read_jsonl(path):
                first: bool = record.get("question") == toy.examples("train")[record.get("example_index", 0)].question
                return first
    return False
