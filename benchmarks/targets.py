"""T5's training targets against the published code's, letter by letter, on the 6,705 training rationales of GSM8K.

    python -m benchmarks.targets --data-dir ../shared/data --tokenizer ../shared/tokenizers/t5

Writes benchmarks/results/targets.md. Where a target differs from the published text, every difference must belong to a
departure that the head of minidpost/text/templates.py lists. `formatted` is the published formatting with a switch for
each departure: with all of them it must give our target, and a difference belongs to those whose switch, put back
alone, gives another text. Fails, and writes nothing, if a target is explained by none.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Collection
from decimal import Decimal
from difflib import SequenceMatcher
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from minidpost.data.datasets import load
from minidpost.errors import UserError
from minidpost.storage import markdown_table, staged_file
from minidpost.text.calculator import evaluate_expression
from minidpost.text.grading import parse_number
from minidpost.text.templates import T5Template
from minidpost.text.tokenizer import load_tokenizer

MAX_SHOWN = 5  # differences that nothing explains
RESULTS = Path(__file__).parent / "results" / "targets.md"

EVERY_OPERATOR = "operators and annotations are spaced evenly"
OPERANDS_ONLY = "what is no operator stays as it is: hyphens, slashes between words, `>=`"
PRINTED = "an annotation's result is written as the calculator writes it"
CHARACTERS = "characters outside T5's vocabulary are replaced"
SENTENCES = "no full stop after another mark at a line's end"
BRACKETS = "brackets of the prose become parentheses"
WHITESPACE = "single spaces, none inside parentheses, no blank lines"
ANSWER = "no full stop after the final answer"
DEPARTURES = (EVERY_OPERATOR, OPERANDS_ONLY, PRINTED, CHARACTERS, SENTENCES, BRACKETS, WHITESPACE, ANSWER)

# What the rationales have that T5's vocabulary has not; `<` is left to the annotations' marks.
REPLACEMENTS = [
    (r"(?<=[0-9]) ?× ?(?=[0-9$])", " * "),
    ("×", "x"),
    ("÷", "/"),
    ("−", "-"),
    ("²", "^2"),
    ("³", "^3"),
    (r"\^", "**"),
    ("√", " square root of "),
    (r"¢(<<[^<>]*>>|)([0-9]+)", r"\1\2 cents"),
    (r"(?<!<)<(?![<=])", " less than "),
    ("¼", "1/4"),
    ("½", "1/2"),
    ("¾", "3/4"),
    ("`", "'"),
    ("ñ", "n"),
]
OPERAND = r"[-+]?[$€£]? ?[-+]?\.?[0-9(\[]"


def formatted(rationale: str, departures: Collection[str] = ()) -> str:
    """A canonical rationale as the published code writes it for T5, but for the departures given.

    The published rules, one after another: annotations of a bare number (`<<5=5>>`) are left out; a colon between
    something else than a digit and a digit is followed by a space; `<<` becomes `[ ` and `>>` becomes `] `; a `$` is
    parted from what follows; `+`, `-`, `*`, `/` and `=`, in this order, get spaces where neither side has one; matches
    do not overlap, so that of `a+b+c` with operands of one character the second stays. Then each line ends in a full
    stop, but for those that begin with `##`, and the lines are joined with spaces.
    """
    text = rationale
    if BRACKETS in departures:
        text = text.replace("[", "(").replace("]", ")")
    if CHARACTERS in departures:
        for pattern, replacement in REPLACEMENTS:
            text = re.sub(pattern, replacement, text)
    if PRINTED in departures:
        text = re.sub(r"<<([^<>=]*)=([^<>]*)>>", as_printed, text)
    text = re.sub(r"<<[0-9]+=[0-9]+>>", "", text)
    text = re.sub(r"([^0-9]):([0-9])", r"\1: \2", text)
    text = text.replace("<<", "[ ").replace(">>", "] ")
    text = re.sub(r"\$([^$\s])" if EVERY_OPERATOR in departures else r"\$(\S)", r"$ \1", text)
    text = spaced(text, EVERY_OPERATOR in departures, OPERANDS_ONLY in departures)
    if EVERY_OPERATOR in departures:
        text = re.sub(r"(?<=[^\s(])\[", " [", text)  # `€[ 4` too
    lines = text.split("\n")
    if WHITESPACE in departures:
        lines = [" ".join(line.split()) for line in lines if line.strip()]
        lines = [re.sub(r"(?<=\() | (?=\))", "", line) for line in lines]
    if ANSWER in departures:
        lines = [line.rstrip(". ") if line.startswith("##") else line for line in lines]
    marks = ".!?:;," if SENTENCES in departures else "."
    closing = " )\"'”’" if SENTENCES in departures else ""
    for number, line in enumerate(lines):
        if not line.startswith("##") and not line.rstrip(closing).endswith(tuple(marks)):
            lines[number] = line + "."
    return " ".join(lines)


def as_printed(annotation: re.Match[str]) -> str:
    """An annotation with its result as the calculator writes it, where it is the same number."""
    value, printed = parse_number(annotation[2]), evaluate_expression(annotation[1])
    if value is None or printed is None or value != Decimal(printed):
        return annotation[0]
    return f"<<{annotation[1]}={printed}>>"


def spaced(text: str, every_operator: bool, operands_only: bool) -> str:
    """Spaces around operators: the published rules, or every operator, or those between operands alone, or both."""
    for operator in "+-*/=":
        before, after = (r"\S", r"\S")
        if operands_only:
            before, after = (r"[^<>]", r"[^<>]") if operator == "=" else (r"[0-9)%]", OPERAND)
        if every_operator:
            text = re.sub(rf"(?<={before}) *{re.escape(operator)} *(?={after})", f" {operator} ", text)
        else:
            pattern = rf"(?!\s)({before}){re.escape(operator)}(?={after})(\S)"
            text = re.sub(pattern, rf"\1 {operator} \2", text)
    return text


class Comparison(NamedTuple):
    """One rationale: our target, the published text, and the departures that make the difference."""

    target: str
    published: str
    departures: list[str]
    is_explained: bool


def compare(rationale: str, target: str) -> Comparison:
    """Which departures a target's differences from the published text belong to, by putting back one at a time."""
    published = formatted(rationale)
    if target == published:
        return Comparison(target, published, [], True)
    needed = [departure for departure in DEPARTURES if without(departure, rationale) != target]
    is_explained = formatted(rationale, DEPARTURES) == target and bool(needed)
    return Comparison(target, published, needed, is_explained)


def without(departure: str, rationale: str) -> str:
    """The rationale with all departures but one."""
    return formatted(rationale, [other for other in DEPARTURES if other != departure])


def differing_words(theirs: str, ours: str) -> list[tuple[str, str]]:
    """Each place where two texts differ: the words there, with one on either side, in one and in the other."""
    their_words, our_words = theirs.split(" "), ours.split(" ")
    matcher = SequenceMatcher(None, their_words, our_words, autojunk=False)
    return [
        (" ".join(their_words[max(0, i - 1) : j + 1]), " ".join(our_words[max(0, k - 1) : m + 1]))
        for tag, i, j, k, m in matcher.get_opcodes()
        if tag != "equal"
    ]


def explain(rationales: list[str], comparisons: list[Comparison]) -> str:
    """A Markdown table of the departures: rationales, those that differ by it alone, places, the first place."""
    rows = []
    for departure in DEPARTURES:
        places = []
        for rationale, comparison in zip(rationales, comparisons, strict=True):
            if departure in comparison.departures:
                places.append(differing_words(without(departure, rationale), comparison.target))
        alone = Counter(comparison.departures == [departure] for comparison in comparisons)[True]
        theirs, ours = places[0][0] if places else ("–", "–")
        n_places = sum(map(len, places))
        rows.append([departure, f"{len(places):,}", f"{alone:,}", f"{n_places:,}", f"`{theirs}`", f"`{ours}`"])
    return markdown_table(["departure", "rationales", "by it alone", "places", "published", "ours"], rows)


def measure(data_dir: Path, tokenizer: Path) -> tuple[list[str], list[Comparison]]:
    """The training rationales of GSM8K and how their targets compare."""
    rationales = [example.rationale or "" for example in load("gsm8k", "train", data_dir)]
    template = T5Template(load_tokenizer(tokenizer))
    return rationales, [compare(rationale, template.target(rationale)) for rationale in rationales]


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="holds gsm8k/train.jsonl (default: data)")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a directory with T5's spiece.model")
    arguments = parser.parse_args()
    try:
        rationales, comparisons = measure(arguments.data_dir, arguments.tokenizer)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    unexplained = [comparison for comparison in comparisons if not comparison.is_explained]
    for comparison in unexplained[:MAX_SHOWN]:
        print(f"no listed departure explains\n  ours      {comparison.target}\n  published {comparison.published}")
    if unexplained:
        sys.exit(f"{len(unexplained):,} targets differ from the published text by what no departure explains")
    n_equal = sum(comparison.target == comparison.published for comparison in comparisons)
    report = f"""# T5's training targets and the published ones

`python -m benchmarks.targets --data-dir {arguments.data_dir} --tokenizer {arguments.tokenizer}`
(sentencepiece {version("sentencepiece")})

Of {len(comparisons):,} training rationales {n_equal:,} targets equal the published code's text letter by letter.
In the other {len(comparisons) - n_equal:,} every difference belongs to a departure that stands at the head of
`minidpost/text/templates.py`: the published formatting with all these departures gives our targets, and a departure is
counted where putting it back alone gives another text. The last one shows only from the second round on.

{explain(rationales, comparisons)}
"""
    with staged_file(RESULTS) as temporary:
        temporary.write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
