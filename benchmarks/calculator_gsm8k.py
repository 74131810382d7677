"""The calculator against every annotation of GSM8K, and its automaton along every target in five vocabularies.

    python -m benchmarks.calculator_gsm8k --data-dir ../shared/data --tokenizers ../shared/tokenizers

Writes benchmarks/results/calculator.md. The first table compares `evaluate_expression` with the result a human wrote
into each annotation. The others, one a tokenizer, walk the automaton over the ids of each rationale's training text and
compare what it would force with what stands there.
"""

import argparse
import json
import sys
from collections import Counter
from decimal import Decimal
from importlib.metadata import version
from pathlib import Path

from minidpost.errors import UserError
from minidpost.storage import staged_file
from minidpost.text.calculator import evaluate_expression
from minidpost.text.grading import parse_number
from minidpost.text.templates import ANNOTATION, Template, Tokenizer, template_for
from minidpost.text.tokenizer import load_tokenizer

SPLITS = ("train", "test")
# directory: model type
TOKENIZERS = {"t5": "t5", "llama2": "llama", "llama3": "llama", "smollm2": "llama", "qwen3": "qwen3"}
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
FORCED_OTHER = "forced ids differ: "  # + a verdict
NOT_FORCED = f"nothing forced: {NO_VALUE}"
NOT_WRITTEN = "not in the target: nothing is calculated (`5=5`)"
FORCED_OTHERS = tuple(FORCED_OTHER + reason for reason in VERDICTS if reason != NO_VALUE)
OUTCOMES = (FORCED_EQUAL, *FORCED_OTHERS, NOT_FORCED, NOT_WRITTEN)


def annotations(rationale: str) -> list[tuple[str, str]]:
    """The (expression, human's result) of each annotation of a rationale."""
    return [tuple(text.split("=", 1)) for text in ANNOTATION.findall(rationale)]


def verdict(expression: str, human: str) -> str:
    """How the calculator's result compares with the human's: one of `VERDICTS`."""
    printed = evaluate_expression(expression)
    value = parse_number(human)
    if printed is None:
        return NO_VALUE
    if printed == human:
        return SAME
    if value is None:
        return NO_NUMBER
    if value == Decimal(printed):
        return SPELT
    return DECIMALS if value.as_tuple().exponent < -2 else OTHER


def walk(template: Template, rationale: str) -> list[tuple[list[int], list[int]]]:
    """The automaton along a rationale's target: at each trigger, the forced ids and as many that stand there."""
    ids = template.target_ids(rationale)
    automaton = template.new_calculator()
    forced_at = [(position, automaton.push(token_id)) for position, token_id in enumerate(ids, start=1)]
    return [(forced, ids[position : position + len(forced)]) for position, forced in forced_at if forced]


def measure(rationales: list[str], template: Template) -> tuple[Counter[str], Counter[str], list[str]]:
    """Counts of verdicts, counts of what the automaton did at each annotation, and a line for every disagreement."""
    verdicts: Counter[str] = Counter()
    walked: Counter[str] = Counter()
    disagreements: list[str] = []
    for rationale in rationales:
        triggers = iter(walk(template, rationale))
        for expression, human in annotations(rationale):
            found = verdict(expression, human)
            verdicts[found] += 1
            if found not in AGREE:
                disagreements.append(f"`{expression}={human}`: {evaluate_expression(expression)} ({found})")
            if not template.target(f"<<{expression}={human}>>"):
                walked[NOT_WRITTEN] += 1
            elif found == NO_VALUE:
                walked[NOT_FORCED] += 1
            else:
                forced, standing = next(triggers)
                walked[FORCED_EQUAL if forced == standing else FORCED_OTHER + found] += 1
        if next(triggers, None) is not None:
            raise AssertionError(f"the automaton forced more results than there are annotations in {rationale!r}")
    return verdicts, walked, disagreements


def read_rationales(data_dir: Path, split: str) -> list[str]:
    """The rationales of one GSM8K file."""
    path = data_dir / "gsm8k" / f"{split}.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: not here, --data-dir must hold gsm8k/train.jsonl and gsm8k/test.jsonl")
    return [json.loads(line)["answer"] for line in path.open(encoding="utf-8")]


def n_seams(rationales: list[str], template: Template, tokenizer: Tokenizer) -> int:
    """How many rationales have other ids than their target tokenised at once, after a line break."""
    return sum(
        template.target_ids(rationale)[:-1] != tokenizer.encode(template.target(rationale), continued=True)
        for rationale in rationales
    )


def table(title: str, rows: tuple[str, ...], counts: list[Counter[str]]) -> str:
    """A Markdown table: one column a split and their sum."""
    lines = [f"| {title} | " + " | ".join(SPLITS) + " | both |", "|---|" + "---:|" * (len(SPLITS) + 1)]
    for row in rows:
        numbers = [count[row] for count in counts]
        lines.append(f"| {row} | " + " | ".join(f"{n:,}" for n in [*numbers, sum(numbers)]) + " |")
    totals = [count.total() for count in counts]
    lines.append("| **all annotations** | " + " | ".join(f"{n:,}" for n in [*totals, sum(totals)]) + " |")
    return "\n".join(lines)


def section(name: str, tokenizer: Tokenizer, rationales: dict[str, list[str]]) -> str:
    """What the automaton does along the targets of one tokenizer."""
    template = template_for(TOKENIZERS[name], tokenizer)
    walked = [measure(rationales[split], template)[1] for split in SPLITS]
    counts = sum(walked, Counter())
    n_triggered, n_equal = counts.total() - counts[NOT_FORCED] - counts[NOT_WRITTEN], counts[FORCED_EQUAL]
    lines = [
        f"## {name}\n",
        f"Triggered by {n_triggered:,} of {counts.total():,} annotations; equal {n_equal:,} times.",
    ]
    if TOKENIZERS[name] != "t5":
        everything = [rationale for split in SPLITS for rationale in rationales[split]]
        differing = n_seams(everything, template, tokenizer)
        n_all = f"{len(everything):,} rationales"
        lines.append(f"Seams between forced and other ids: {differing:,} of {n_all} have other ids than without seams.")
    outcomes = tuple(outcome for outcome in OUTCOMES if counts[outcome])
    return "\n".join([*lines, "", table("annotations", outcomes, walked)])


def main() -> None:
    """Measure and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="holds gsm8k/*.jsonl (default: data)")
    parser.add_argument("--tokenizers", type=Path, required=True, help=f"holds {', '.join(TOKENIZERS)}")
    arguments = parser.parse_args()
    try:
        rationales = {split: read_rationales(arguments.data_dir, split) for split in SPLITS}
        tokenizers = {name: load_tokenizer(arguments.tokenizers / name) for name in TOKENIZERS}
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
    t5_template = template_for("t5", tokenizers["t5"])
    verdicts, _, disagreements = zip(*(measure(rationales[split], t5_template) for split in SPLITS), strict=True)
    sections = [section(name, tokenizer, rationales) for name, tokenizer in tokenizers.items()]
    report = f"""# The calculator on GSM8K

`python -m benchmarks.calculator_gsm8k --data-dir {arguments.data_dir} --tokenizers {arguments.tokenizers}`
(sentencepiece {version("sentencepiece")}, tokenizers {version("tokenizers")})

What `evaluate_expression` makes of each annotation's left side, against the result the human wrote:

{table("annotations", VERDICTS, list(verdicts))}

Every disagreement, as `annotation`: the calculator's result (reason):

{chr(10).join("- " + line for lines in disagreements for line in lines)}

The automaton along the ids of each rationale's training text, a table for each tokenizer. Training text writes a result
as the calculator does where the two are the same number, so that only the disagreements above may differ or force
nothing.

{(chr(10) * 2).join(sections)}
"""
    with staged_file(RESULTS) as temporary:
        temporary.write_text(report, encoding="utf-8")
    print(report)


if __name__ == "__main__":
    main()
