"""The final answer of a rationale, and when two answers are equal.

GSM8K's convention: a rationale ends in `#### number`. The last one counts, and answers are equal within 1e-4, as in the
published code. Departures: arithmetic is exact, and an answer that only begins like a number (`1/2`, `1e9`, `3:30`) is
none, where a search for leading digits reads 1, 1 and 3.

A number is plain ASCII digits, at most MAX_DIGITS of them with point and commas. NaN, Infinity, exponents, fractions
and the digits of other scripts (`١٨`, `１８`), which Python's own `float` and `Decimal` would take, are none: the model
never saw them in training, so they say that something went wrong. No text raises, and all are read in time linear in
their length.
"""

import re
from decimal import Context, Decimal

TOLERANCE = Decimal("1e-4")
MAX_DIGITS = 40
_EXACT = Context(prec=2 * MAX_DIGITS + 1)  # holds the difference of any two accepted numbers without rounding

_NUMBER = r"(?P<sign>\$?[-−]?)\$?(?P<digits>(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+)"
_WHOLE = re.compile(rf"\s*{_NUMBER}%?\s*")
# What follows the digits where they are not the whole number: `1/2`, `1e9`, `3:30`.
_MORE = r"[0-9]|[.,:_][0-9]|[eE][-+]?[0-9]|\s*[*/^×÷]\s*[0-9]"
_FINAL = re.compile(rf"####\s*{_NUMBER}(?P<more>{_MORE})?")


def parse_number(text: str) -> Decimal | None:
    """A dataset's whole answer as a number: "18", "$29.00", "1,000", "18.", "-3", "5%" (5); None for anything else."""
    match = _WHOLE.fullmatch(text)
    return _value(match) if match else None


def extract_answer(text: str) -> Decimal | None:
    """The number after the last `#### number` of a rationale, whatever text follows it; None if there is none."""
    matches = [*_FINAL.finditer(text)]
    if not matches or matches[-1]["more"]:
        return None
    return _value(matches[-1])


def is_correct(completion: str, answer: str) -> bool:
    """Whether a completion's final answer equals the dataset's within 1e-4; False if either has no number."""
    found = extract_answer(completion)
    expected = parse_number(answer)
    if found is None or expected is None:
        return False
    return _EXACT.subtract(found, expected).copy_abs() <= TOLERANCE


def _value(match: re.Match[str]) -> Decimal | None:
    """The exact value of a match of `_NUMBER`; None if it is longer than answers are."""
    if len(match["digits"]) > MAX_DIGITS:
        return None
    value = Decimal(match["digits"].replace(",", ""))
    return value.copy_negate() if match["sign"].endswith(("-", "−")) else value
