"""The calculator against every annotation of GSM8K, and its automaton along every T5 target.

    python -m benchmarks.calculator_gsm8k --data-dir ../shared/data --tokenizer ../shared/tokenizers/t5

Writes benchmarks/results/calculator.md. The first table compares `evaluate` with the result a human wrote into each
annotation. The second walks the automaton over the tokens of each rationale's training text and compares what it would
force with what stands there.
"""

import argparse
import json
import re
import sys
from collections import Counter
from decimal import Decimal
from pathlib import Path

from minidpost.answers import parse_number
from minidpost.calculator import evaluate
from minidpost.files import UserError, staged_file
from minidpost.formats import T5Format
from minidpost.tokenizer import load_tokenizer

SPLITS = ("train", "test")
RESULTS = Path(__file__).parent / "results" / "calculator.md"

SAME = "same characters"
SPELT = "same number, spelt differently (`5.00`, `.5`)"
DECIMALS = "human keeps more than two decimals"
NO_NUMBER = "human's result is no plain number"
OTHER = "another number"
NO_VALUE = "the expression has no value"
VERDICTS = (SAME, SPELT, DECIMALS, NO_NUMBER, OTHER, NO_VALUE)
AGREE = (SAME, SPELT)

FORCED_EQUAL = "forced ids are the ids that stand there"
FORCED_OTHER = "forced ids differ"
NOT_FORCED = "nothing forced"


def annotations(rationale: str) -> list[tuple[str, str]]:
    """The (expression, human's result) of each annotation of a rationale."""
    return [tuple(text.split("=", 1)) for text in re.findall(r"<<([^<>]*)>>", rationale)]


def verdict(expression: str, human: str) -> str:
    """How the calculator's result compares with the human's: one of `VERDICTS`."""
    printed, number = evaluate(expression), parse_number(human)
    if printed is None:
        return NO_VALUE
    if printed == human:
        return SAME
    if number is None:
        return NO_NUMBER
    if number == Decimal(printed):
        return SPELT
    return DECIMALS if number.as_tuple().exponent < -2 else OTHER


def walk(t5_format: T5Format, rationale: str) -> list[tuple[list[int], list[int]]]:
    """The automaton along a rationale's target: at each trigger, the forced ids and as many that stand there."""
    ids = t5_format.target_ids(rationale)
    automaton = t5_format.calculator()
    forced_at = [(position, automaton.push(token_id)) for position, token_id in enumerate(ids, start=1)]
    return [(forced, ids[position : position + len(forced)]) for position, forced in forced_at if forced]


def measure(rationales: list[str], t5_format: T5Format) -> tuple[Counter, Counter, list[str]]:
    """Counts of verdicts, counts of what the automaton did at each annotation, and a line for every disagreement."""
    verdicts, walked, disagreements = Counter(), Counter(), []
    for rationale in rationales:
        triggers = iter(walk(t5_format, rationale))
        for expression, human in annotations(rationale):
            found = verdict(expression, human)
            verdicts[found] += 1
            if found not in AGREE:
                disagreements.append(f"`{expression}={human}`: {evaluate(expression)} ({found})")
            if found == NO_VALUE:
                walked[NOT_FORCED] += 1
            else:
                forced, standing = next(triggers)
                walked[FORCED_EQUAL if forced == standing else FORCED_OTHER] += 1
        if next(triggers, None) is not None:
            raise AssertionError(f"the automaton forced more results than there are annotations in {rationale!r}")
    return verdicts, walked, disagreements


def read_rationales(data_dir: Path, split: str) -> list[str]:
    """The rationales of one GSM8K file."""
    path = data_dir / "gsm8k" / f"{split}.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: not here, --data-dir must hold gsm8k/train.jsonl and gsm8k/test.jsonl")
    return [json.loads(line)["answer"] for line in path.open(encoding="utf-8")]


def table(title: str, rows: tuple[str, ...], counts: list[Counter]) -> str:
    """A Markdown table: one column a split and their sum."""
    lines = [f"| {title} | " + " | ".join(SPLITS) + " | both |", "|---|" + "---:|" * (len(SPLITS) + 1)]
    for row in rows:
        numbers = [count[row] for count in counts]
        lines.append(f"| {row} | " + " | ".join(f"{n:,}" for n in [*numbers, sum(numbers)]) + " |")
    totals = [count.total() for count in counts]
    lines.append("| **all annotations** | " + " | ".join(f"{n:,}" for n in [*totals, sum(totals)]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="holds gsm8k/*.jsonl (default: data)")
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of T5's spiece.model")
    arguments = parser.parse_args()
    try:
        t5_format = T5Format(load_tokenizer(arguments.tokenizer))
        measured = [measure(read_rationales(arguments.data_dir, split), t5_format) for split in SPLITS]
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    verdicts, walked, disagreements = zip(*measured, strict=True)
    report = f"""# The calculator on GSM8K

`python -m benchmarks.calculator_gsm8k --data-dir {arguments.data_dir} --tokenizer {arguments.tokenizer}`

What `evaluate` makes of each annotation's left side, against the result the human wrote:

{table("annotations", VERDICTS, list(verdicts))}

Every disagreement, as `annotation`: the calculator's result (reason):

{chr(10).join("- " + line for lines in disagreements for line in lines)}

The automaton along the T5 tokens of each rationale's training text. Training text writes a result as the calculator
does where the two are the same number, so that only the disagreements above may differ or force nothing:

{table("annotations", (FORCED_EQUAL, FORCED_OTHER, NOT_FORCED), list(walked))}
"""
    with staged_file(RESULTS) as temporary:
        temporary.write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
