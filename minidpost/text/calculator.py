"""The calculator: one annotation's arithmetic, and the automaton that watches one sequence and says what to force.

GSM8K annotates its rationales (`<<48/2=24>>24`). A model that has learnt to write annotations leaves the arithmetic to
the calculator: after `<<48/2=` the next tokens are forced to `24>>` (Cobbe et al. 2021; paper, section 3.2).

Departures from the published code: exact rational arithmetic by a parser of our own instead of `eval` on model output;
at most two decimals, rounded half up, where it printed floats (0.29*100 is 29, not 29.0); the automaton keeps only
the text of the open annotation, where the whole sequence was read again at every step.
"""

import re
from collections.abc import Callable, Sequence
from copy import copy
from fractions import Fraction
from functools import lru_cache

MAX_CHARACTERS = 200  # in an expression
MAX_DEPTH = 20  # of nested parentheses
MAX_BITS = 256  # of the numerator and of the denominator of any intermediate

_NUMBER = r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])(?:\.[0-9]*)?|[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
_SYMBOL = re.compile(rf"\s*({_NUMBER}|[-+*/()%×÷−xX])\s*")
_OPERATORS = {"×": "*", "x": "*", "X": "*", "÷": "/", "−": "-"}


class _Malformed(Exception):
    """The expression is not arithmetic, divides by zero or grows beyond the bounds."""


@lru_cache(maxsize=2**14)  # samples of one question compute the same things
def evaluate_expression(expression: str) -> str | None:
    """The value of an arithmetic expression, as GSM8K prints it; None if it has none or exceeds the bounds.

    Knows + - * / and parentheses, leading + and -, decimals (`.5`, `5.`), thousands commas, percent (`20%` is 0.2), and
    × ÷ − x as operators. No power, no implied multiplication, no currency, no exponent (`1e9`), no digits but ASCII's
    and no other look-alikes (– ⁄ · ∗ and full-width characters): GSM8K's annotations have none. The result is an
    integer where the value is one, else has at most two decimals, half rounded away from zero. Never raises; at most
    MAX_CHARACTERS symbols and as many operations on numbers of MAX_BITS, whatever the text.
    """
    if len(expression) > MAX_CHARACTERS:
        return None
    try:
        return _print(_Parser(_split(expression)).value())
    except _Malformed:
        return None


def _split(expression: str) -> list[str]:
    """The expression's numbers and operators, in ASCII and without thousands commas."""
    symbols = []
    position = 0
    while position < len(expression):
        match = _SYMBOL.match(expression, position)
        if match is None:
            raise _Malformed
        symbols.append(_OPERATORS.get(match[1], match[1]).replace(",", ""))
        position = match.end()
    return symbols


def _print(value: Fraction) -> str:
    """At most two decimals: 24 as "24", 1/3 as "0.33", 1/2 as "0.5", 1/200 as "0.01"."""
    hundredths = (abs(value) * 200 + 1) // 2  # half up, away from zero
    whole, cents = divmod(hundredths, 100)
    sign = "-" if value < 0 and hundredths else ""
    return sign + (f"{whole}.{cents:02d}".rstrip("0") if cents else f"{whole}")


class _Parser:
    """Recursive descent, one method a precedence level: sum > product > signed > percentage > number or parenthesis."""

    def __init__(self, symbols: list[str]):
        self._symbols = [*symbols, ""]  # "" marks the end
        self._position = 0
        self._depth = 0

    def value(self) -> Fraction:
        """The value of all symbols."""
        value = self._sum()
        if self._peek():
            raise _Malformed
        return value

    def _peek(self) -> str:
        return self._symbols[self._position]

    def _take(self) -> str:
        self._position += 1
        return self._symbols[self._position - 1]

    def _sum(self) -> Fraction:
        value = self._product()
        while self._peek() in ("+", "-"):
            if self._take() == "+":
                value = _bounded(value + self._product())
            else:
                value = _bounded(value - self._product())
        return value

    def _product(self) -> Fraction:
        value = self._signed()
        while self._peek() in ("*", "/"):
            operator = self._take()
            operand = self._signed()
            if operator == "/" and not operand:
                raise _Malformed
            value = _bounded(value * operand if operator == "*" else value / operand)
        return value

    def _signed(self) -> Fraction:
        sign = 1
        while self._peek() in ("+", "-"):
            if self._take() == "-":
                sign = -sign
        return sign * self._percentage()

    def _percentage(self) -> Fraction:
        value = self._operand()
        if self._peek() == "%":
            self._take()
            value = _bounded(value / 100)
        return value

    def _operand(self) -> Fraction:
        symbol = self._take()
        if symbol != "(":
            if not symbol or symbol[0] not in ".0123456789":
                raise _Malformed
            return _bounded(Fraction(symbol))
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _Malformed
        value = self._sum()
        if self._take() != ")":
            raise _Malformed
        self._depth -= 1
        return value


def _bounded(value: Fraction) -> Fraction:
    """The value, unless its numerator or denominator has become too long."""
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise _Malformed
    return value


class Automaton:
    """Watches one row's tokens by their text and says which ids must follow: an annotation's result and closing mark.

    An annotation is what follows the last opening mark. Once its text ends in `=`, the only one in it, and what stands
    before has a value, the result is forced. Annotations longer than `MAX_CHARACTERS` are ignored.
    """

    def __init__(
        self,
        token_texts: Sequence[str],
        encode_result: Callable[[str], list[int]],
        open_mark: str,
        close_mark: str,
    ):
        """Bind the automaton to a vocabulary.

        `token_texts` holds every id's text, "" where an id has none (ids beyond its end have none either);
        `encode_result` gives the ids of a result and the closing mark, exactly as they stand in the training text.
        """
        self._token_texts = token_texts
        self._encode_result = encode_result
        self._open_mark = open_mark
        self._close_mark = close_mark
        self.trigger_ids = frozenset(i for i, text in enumerate(token_texts) if open_mark[0] in text)
        self._pending = ""  # from the last opening mark on, or a beginning of one that the next token may complete

    def fresh(self) -> "Automaton":
        """An automaton for another row, which shares the tables of this one."""
        automaton = copy(self)
        automaton._pending = ""
        return automaton

    @property
    def is_idle(self) -> bool:
        """Whether no annotation is open, so that only ids in `trigger_ids`, which may open one, can matter."""
        return not self._pending

    def push(self, token_id: int) -> list[int]:
        """Take the row's next token, forced ones too; returns the ids to force right after it, nearly always none."""
        # 1) Nothing is open and this token opens nothing: by far the most frequent case.
        if not self._pending and token_id not in self.trigger_ids:
            return []
        # 2) What follows the last opening mark is the annotation, unless it has been closed or is too long.
        text = self._pending + (self._token_texts[token_id] if 0 <= token_id < len(self._token_texts) else "")
        _, mark, annotation = text.rpartition(self._open_mark)
        if not mark or self._close_mark in annotation or len(annotation) > MAX_CHARACTERS:
            self._pending = self._unfinished_mark(text)
            return []
        self._pending = mark + annotation
        # 3) `48/2=` is complete: one `=`, at the end. `48/2` and `48/2=2` are not.
        expression, equals, rest = annotation.partition("=")
        if not equals or rest.strip():
            return []
        # 4) With a value, the result and the closing mark are forced.
        result = evaluate_expression(expression)
        if result is None:
            return []
        # Forcing ends the annotation. Forgetting it now keeps the forced tokens from triggering again.
        self._pending = ""
        return self._encode_result(result)

    def _unfinished_mark(self, text: str) -> str:
        """The longest end of `text` that is a proper beginning of the opening mark."""
        for length in range(len(self._open_mark) - 1, 0, -1):
            beginning = self._open_mark[:length]
            if text.endswith(beginning):
                return beginning
        return ""
