"""GSM8K, MultiArith, ASDiv, SVAMP, toy and a user's own JSONL, all as lists of `Example`: fetched, verified, split.

The sets are those of the paper's table 1: GSM8K train 6,705 / dev 768 / test 1,319, MultiArith 600, ASDiv 2,096, SVAMP
1,000. Every upstream file is pinned to a commit and checked against its sha256 on each load, before anything parses it.
The published dev split is 768 rows of GSM8K's train file, listed in `gsm8k_dev_indices.json` beside this module. The
paper prints no rules for ASDiv and SVAMP: ours stand at `_asdiv`, whose count is the paper's, and at `_svamp`.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator, Sequence
from decimal import Decimal
from http.client import HTTPException
from pathlib import Path
from random import Random
from typing import Any, BinaryIO, NamedTuple
from urllib.request import urlopen

from minidpost.data import toy
from minidpost.data.example import Example
from minidpost.errors import UserError
from minidpost.progress import Progress
from minidpost.storage import bounded_lines, no_room, parse_jsonl, read_jsonl, staged_file
from minidpost.text.grading import extract_answer, is_correct, parse_number

SPLITS: dict[str, tuple[str, ...]] = {
    "gsm8k": ("train", "dev", "test"),
    "multiarith": ("test",),
    "asdiv": ("test",),
    "svamp": ("test",),
    "toy": tuple(toy.SPLITS),
}

MAX_TEXT = 20_000  # characters in a question or a rationale: ten times GSM8K's longest
MAX_DOWNLOAD = 2**26  # bytes after which no more is taken from a server; the largest file has 4 million
CHUNK = 2**16  # bytes read at once, from a server or to be hashed
OWN_SPLITS = ("train", "dev", "test")  # of a user's own file
OWN_SPLIT_SEED = 42  # of which questions of a user's file are dev: the same ones whatever --seed is


class Source(NamedTuple):
    """Where an upstream file lies, at a pinned commit, and the sha256 of its bytes."""

    url: str
    sha256: str


_GITHUB = "https://raw.githubusercontent.com"
_GSM8K = f"{_GITHUB}/openai/grade-school-math/3101c7d5072418e28b9008a6636bde82a006892c/grade_school_math/data"
_ZERO_SHOT_COT = f"{_GITHUB}/kojima-takeshi188/zero_shot_cot/5ef330fcdeec0cd26aee27943504f91f8ec1c33c"

SOURCES: dict[str, Source] = {  # by the file's place in data_dir
    "gsm8k/train.jsonl": Source(
        f"{_GSM8K}/train.jsonl", "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465"
    ),
    "gsm8k/test.jsonl": Source(
        f"{_GSM8K}/test.jsonl", "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14"
    ),
    "multiarith/MultiArith.json": Source(
        f"{_ZERO_SHOT_COT}/dataset/MultiArith/MultiArith.json",
        "dc9db1b6cc68b1ecc2dec830d15aaf8c9a0932aa31d5ffce88ef3628179d36f4",
    ),
    "asdiv/ASDiv.xml": Source(
        f"{_GITHUB}/chaochun/nlu-asdiv-dataset/883f90a9a65bf00304ba8f37423910fe743abc47/dataset/ASDiv.xml",
        "ef8904068482919ac48c8eeaaf6df344b8a308ba66d048c2d4d87eab82dc4929",
    ),
    "svamp/SVAMP.json": Source(
        f"{_GITHUB}/arkilpatel/SVAMP/689d7ccac74b9983a2ac7cc3b264f441b99e7c53/SVAMP.json",
        "5be77703a6d891ae476d7c082787ad361392aa02453b132516cdd5f4e7934e3e",
    ),
}


def load(name: str, split: str, data_dir: str | Path = "data") -> list[Example]:
    """Return one split of one dataset, in file order; a file that `data_dir` lacks is fetched into it first.

    A name that ends in .jsonl is a user's own file: "test" is all of it, "train" and "dev" are what `split_own` makes
    of it. Rationales come with GSM8K (the whole annotated solution, `#### n` included) and toy. UserError: an unknown
    name or split, a file in `data_dir` that is not the pinned one, a fetch that fails.
    """
    check_split(name, split)
    if is_own(name):
        return _own(name, split)
    if name == "toy":
        return toy.examples(split)
    if name == "gsm8k":
        return _gsm8k(split, data_dir)
    if name == "multiarith":
        return _multiarith(_read_verified("multiarith/MultiArith.json", data_dir))
    if name == "asdiv":
        return _asdiv(_read_verified("asdiv/ASDiv.xml", data_dir))
    return _svamp(_read_verified("svamp/SVAMP.json", data_dir))


def check_split(name: str, split: str) -> None:
    """Raise UserError where a dataset or its split is unknown."""
    if is_own(name):
        known: tuple[str, ...] = OWN_SPLITS
    elif name in SPLITS:
        known = SPLITS[name]
    else:
        raise UserError(
            f"there is no dataset {name!r}; choose one of {', '.join(SPLITS)}, or a file that ends in .jsonl"
        )
    if split not in known:
        raise UserError(f"{name} has no split {split!r}; choose one of {', '.join(known)}")


def load_jsonl(path: str | Path, labelled: bool) -> list[Example]:
    """Return a user's own examples; with `labelled`, every row must carry a rationale.

    A row holds `question`, `answer` (a number or the text of one) and, if there is one, `rationale`; or it has GSM8K's
    own shape, the whole solution with its `#### n` in `answer`. A rationale without `####` gets the line `#### answer`.
    Of rows with the same question the first is taken, and a warning says how many were not. UserError names file and
    line.
    """
    first: dict[str, tuple[int, Example]] = {}  # by question: the first row that has it, and its line
    n_repeated = 0
    for line_number, row in read_jsonl(path):
        example = _example(row, f"{path}, line {line_number}")
        if labelled and example.rationale is None:
            raise UserError(f"{path}, line {line_number}: every row of a labelled set needs a `rationale`")
        if example.question not in first:
            first[example.question] = (line_number, example)
            continue
        earlier_line, earlier = first[example.question]
        if earlier.answer != example.answer:
            raise UserError(
                f"{path}, line {line_number}: the answer is {example.answer}, but line {earlier_line} answers the same "
                f"question with {earlier.answer}; remove one of them"
            )
        n_repeated += 1
    if not first:
        raise UserError(f"{path}: holds no examples")
    if n_repeated:
        warnings.warn(f"{path}: {n_repeated} rows left out, their questions stand above already", stacklevel=2)
    return [example for _, example in first.values()]


def is_own(name: str) -> bool:
    """Whether a dataset's name is the path of a user's own file."""
    return name.endswith(".jsonl")


def split_own(examples: Sequence[Example], name: str) -> tuple[list[Example], list[Example]]:
    """A user's own examples as train and dev: a tenth of them, but at least one, is held out at random.

    Which ones depends on the examples alone. UserError, which begins with the file's `name`, where there is only one.
    """
    if len(examples) < 2:
        raise UserError(f"{name}: at least 2 examples are needed, a tenth being held out as dev")
    shuffled = list(examples)
    Random(OWN_SPLIT_SEED).shuffle(shuffled)
    n_dev = max(1, len(shuffled) // 10)
    return shuffled[n_dev:], shuffled[:n_dev]


class QuestionFile:
    """Questions without answers, read whenever they are asked for, so that a million of them take no memory.

    JSONL with `question` and whatever other fields the user keeps, or text with one question a line. A question that
    stands there twice is answered twice.
    """

    def __init__(self, stream: BinaryIO, name: str, *, is_jsonl: bool | None) -> None:
        """Take an open file that can be read again from its beginning; `name` begins messages.

        Where it is not known whether it `is_jsonl`, a first line that begins with { says so.
        """
        self.name = name
        self._stream = stream
        self._begun_as = _file_state(stream)
        self._is_jsonl = self._begins_with_brace() if is_jsonl is None else is_jsonl

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield each row, its `question` checked and without spaces around it.

        UserError names the file, and the line that is broken or holds no question; or says that there is none at all.
        """
        self._stream.seek(0)
        lines = bounded_lines(self._stream, self.name)
        n_rows = 0
        for line_number, row in parse_jsonl(lines, self.name) if self._is_jsonl else _text_rows(lines, self.name):
            n_rows += 1
            yield row | {"question": _text(row.get("question"), "question", f"{self.name}, line {line_number}")}
        if not n_rows:
            raise UserError(f"{self.name}: holds no questions")

    def sha256(self) -> str:
        """A hash of the file's content."""
        self._stream.seek(0)
        digest = hashlib.sha256()
        while content := self._stream.read(CHUNK):
            digest.update(content)
        return digest.hexdigest()

    def check_unchanged(self) -> None:
        """UserError where the file was written to since it was opened, as its rows would not be those of before."""
        if _file_state(self._stream) != self._begun_as:
            raise UserError(f"{self.name} was changed while its questions were answered; restore it and go on")

    def _begins_with_brace(self) -> bool:
        self._stream.seek(0)
        first_line = next((line for line in bounded_lines(self._stream, self.name) if line.strip()), b"")
        return first_line.strip().startswith(b"{")


def open_questions(source: str) -> QuestionFile:
    """A user's questions: JSONL or text by the file's suffix, or either from standard input (`-`).

    What can be read only once, such as standard input, is copied to a temporary file that has no name. UserError: no
    such file, or another suffix.
    """
    is_standard_input = source == "-"
    name = "standard input" if is_standard_input else source
    suffix = "" if is_standard_input else Path(source).suffix
    if not is_standard_input and suffix not in (".jsonl", ".txt"):
        raise UserError(f"{source}: a file that ends in .jsonl or .txt is expected, or - for standard input")
    try:
        stream: BinaryIO = sys.stdin.buffer if is_standard_input else open(source, "rb")
        if is_standard_input or not stream.seekable():
            copy: Any = tempfile.TemporaryFile()
            shutil.copyfileobj(stream, copy)
            stream = copy
    except OSError as error:
        if no_room(error) is not None:
            raise
        raise UserError(f"{name}: cannot be read ({error.strerror})") from None
    return QuestionFile(stream, name, is_jsonl=None if is_standard_input else suffix == ".jsonl")


def _file_state(stream: BinaryIO) -> tuple[int, int]:
    """The size and the time of the last change of an open file."""
    status = os.fstat(stream.fileno())
    return status.st_size, status.st_mtime_ns


def _text_rows(lines: Iterator[bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The line number and the text of each line that is not blank, as a row; UserError where one is not UTF-8."""
    for line_number, line in enumerate(lines, start=1):
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{name}: not a text in UTF-8") from None
        if text.strip():
            yield line_number, {"question": text}


def _text(value: object, key: str, where: str) -> str:
    """A row's text, without the spaces around it; UserError where it is none, empty, too long or has a NUL in it."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: `{key}` must be a text that is not empty")
    if "\0" in value or len(value) > MAX_TEXT:
        found = "one with NUL in it" if "\0" in value else f"one of {len(value):,}"
        raise UserError(f"{where}: `{key}` must be a text of at most {MAX_TEXT:,} characters, found {found}")
    return value.strip()


def _example(row: dict[str, Any], where: str) -> Example:
    """Check one row of a user's file; `where` begins every message."""
    for key in ("question", "answer"):
        if key not in row:
            raise UserError(f"{where}: `{key}` is missing")
    question = _text(row["question"], "question", where)
    given = row["answer"]
    rationale: str | None = None
    if row.get("rationale") is not None:
        rationale = _text(row["rationale"], "rationale", where)

    # 1) The answer: a number, the text of one, or GSM8K's whole solution.
    if rationale is None and isinstance(given, str) and "####" in given:
        value = extract_answer(given)
        rationale = _text(given, "answer", where)
    else:
        value = _number(given)
    if value is None:
        found = f"a {type(given).__name__}" if isinstance(given, (list, dict)) else f"{given!r:.80}"
        raise UserError(f"{where}: `answer` must be a number or the text of one, found {found}")
    answer = _plain(value)

    # 2) The rationale ends in the same answer.
    if rationale is not None:
        if "####" not in rationale:
            rationale += f"\n#### {answer}"
        elif not is_correct(rationale, answer):
            raise UserError(f"{where}: the last #### of `rationale` must give {answer}, as `answer` does")
    return Example(question, answer, rationale)


def _number(value: object) -> Decimal | None:
    """Read a JSON value as a number; None: it is none (true, NaN, a list, a text that holds something else).

    JSON's own 1e9 is the number that it is, where the text "1e9" is none (see grading.py).
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = format(Decimal(str(value)), "f")  # 1e-05 -> 0.00001
    return parse_number(value) if isinstance(value, str) else None


def _plain(value: Decimal) -> str:
    """Write a number in digits alone: no exponent, no commas, no zeros after the last decimal that counts."""
    digits = format(value, "f")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def _own(path: str, split: str) -> list[Example]:
    """One of the splits of a user's own file, whose rows need no rationale."""
    examples = load_jsonl(path, labelled=False)
    if split == "test":
        return examples
    train, dev = split_own(examples, path)
    return train if split == "train" else dev


def _gsm8k(split: str, data_dir: str | Path) -> list[Example]:
    """One of GSM8K's splits; dev is the rows of the upstream train file that `gsm8k_dev_indices.json` lists."""
    file = "gsm8k/test.jsonl" if split == "test" else "gsm8k/train.jsonl"
    examples = []
    for line in _read_verified(file, data_dir).splitlines():
        row = json.loads(line)
        answer = extract_answer(row["answer"])
        assert answer is not None, row  # the file is the pinned one
        examples.append(Example(row["question"], _plain(answer), row["answer"]))
    if split == "test":
        return examples
    dev_indices = json.loads(Path(__file__).with_name("gsm8k_dev_indices.json").read_text(encoding="utf-8"))
    if split == "dev":
        return [examples[index] for index in dev_indices]
    held_out = set(dev_indices)
    return [example for index, example in enumerate(examples) if index not in held_out]


def _multiarith(data: bytes) -> list[Example]:
    """MultiArith's problems, whose answers are written as floats."""
    return [Example(row["sQuestion"].strip(), _plain(Decimal(row["lSolutions"][0]))) for row in json.loads(data)]


def _asdiv(data: bytes) -> list[Example]:
    """Take the 2,096 of 2,305 problems whose answer is a whole number, with or without a unit: `9 (apples)`."""
    examples = []
    for problem in ElementTree.fromstring(data).iter("Problem"):
        answer = re.fullmatch(r"(\d+)( \(.*\))?", problem.findtext("Answer", ""))
        if answer is not None:
            body = problem.findtext("Body", "").strip()
            question = problem.findtext("Question", "").strip()
            examples.append(Example(f"{body} {question}", answer[1]))
    return examples


def _svamp(data: bytes) -> list[Example]:
    """Join body and question; of the bodies that stop without a mark, an open `If …` gets a comma, the rest a stop."""
    examples = []
    for row in json.loads(data):
        body = row["Body"].strip()
        question = row["Question"].strip()
        if body[-1] not in ".,?!":
            last_sentence = re.split(r"[.?!] +", body)[-1]
            body += "," if last_sentence.startswith("If ") else "."
        examples.append(Example(f"{body} {question}", _plain(Decimal(row["Answer"]))))
    return examples


def _read_verified(file: str, data_dir: str | Path) -> bytes:
    """Return the bytes of one upstream file, known to be the pinned ones."""
    path = Path(data_dir, file)
    source = SOURCES[file]
    if not path.exists():
        _fetch(source, path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    if hashlib.sha256(data).hexdigest() != source.sha256:
        raise UserError(
            f"{path}: cut short or altered, its sha256 is not {source.sha256}; remove it to have it fetched anew"
        )
    return data


def _fetch(source: Source, path: Path) -> None:
    """Download `source` to `path`, which appears only when it is whole and verified."""
    try:
        with staged_file(path) as temporary:
            with urlopen(source.url, timeout=30) as response, open(temporary, "wb") as file:
                with Progress.wrapattr(file, "write", total=response.length, desc=f"fetching {path.name}") as sink:
                    while file.tell() <= MAX_DOWNLOAD and (chunk := response.read(CHUNK)):
                        sink.write(chunk)
            data = temporary.read_bytes()
            if data[:CHUNK].lstrip().lower().startswith((b"<!doctype html", b"<html")):
                raise UserError(
                    f"{source.url}: a web page came instead of the file (a login of the network, or a proxy's?); try "
                    f"again, or put the right file at {path}"
                )
            if hashlib.sha256(data).hexdigest() != source.sha256:
                raise UserError(
                    f"{source.url}: cut short or altered, the sha256 of the {len(data)} bytes received is not "
                    f"{source.sha256}; try again, or put the right file at {path}"
                )
    except (OSError, HTTPException) as error:
        raise UserError(f"{path}: could not be fetched ({error}); download {source.url} and put it there") from None
