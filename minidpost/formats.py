"""How a model family writes a question and a rationale, and the way back.

Between the stages a rationale is kept in GSM8K's own form, called canonical here: lines, `<<48/2=24>>24` annotations
and `#### 72` at the end. T5's vocabulary has no `<`, no newline and few mathematical signs, so that its targets are one
line, as in the published code:

    Natalia sold 48 / 2 = [ 48 / 2 = 24] 24 clips in May. Natalia sold 48 + 24 = [ 48 + 24 = 72] 72 clips. #### 72

Departures from the published code: operators are spaced evenly (there `a+b+c` became `a + b+c`); what has been
formatted once stays as it is (there `#### 9` became `#### 9.` from the second round on); an annotation's result is
written as the calculator writes it, so that forced ids are the training text's; signs outside the vocabulary are
folded, not lost.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from decimal import Decimal
from functools import cache
from typing import Protocol

from minidpost.answers import parse_number
from minidpost.calculator import Automaton, evaluate
from minidpost.files import UserError


class Tokenizer(Protocol):
    """What a format needs of a tokenizer (see tokenizer.py)."""

    vocab_size: int
    eos_id: int | None
    token_texts: Sequence[str]

    def encode(self, text: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


_ANNOTATION = re.compile(r"<<([^<>]*)>>")
_BRACKETS = re.compile(r"\[([^\[\]<>]*)\]\s*")
_ANSWER_MARK = re.compile(r"\s?####[\s#]*")  # one space, not all: a search that begins at each of many is slow
_SENTENCE_MARKS = (".", "!", "?", ":", ";", ",")

# A binary operator stands between these two; any other sign (`= -5`, `30-minute`) stays as it is.
_LEFT, _RIGHT = r"(?<=[0-9)%])\s*", r"\s*(?=[-+]?[$€£]?\s?[-+]?\.?[0-9(\[])"
_SPACING = [
    (re.compile(rf"{_LEFT}([-+*/]){_RIGHT}"), r" \1 "),
    (re.compile(r"\s*(?<![<>=!])=(?![=>])\s*"), " = "),
    (re.compile(r"\["), " [ "),
    (re.compile(r"\s*\]"), "] "),
    (re.compile(r"\(\s+"), "("),
    (re.compile(r"\s+\)"), ")"),
]

# What replaces a sign that the vocabulary lacks, in this order: a replacement may hold a sign replaced further on.
_FOLDS = [
    ("×", rf"{_LEFT}×{_RIGHT}", "*"),
    ("×", "×", "x"),
    ("÷", "÷", "/"),
    ("−", "−", "-"),
    ("½", r"(?<=[0-9])(?=[¼-¾⅐-⅞])", " "),  # 10½ is 10 1/2, not 101/2
    ("¢", r"¢\s?((?:\[[^\]]*\]\s?)?[0-9.,]*[0-9])", r"\1 cents"),
    ("¢", "¢", " cents"),
    ("²", "²", "^2"),
    ("³", "³", "^3"),
    ("^", r"\^", "**"),
    ("√", "√", " square root of "),
    ("≤", "≤", "<="),
    ("≥", "≥", ">="),
    ("<", "<=", " at most "),
    ("<", "<", " less than "),
    ("{", r"\{", "("),
    ("}", r"\}", ")"),
    ("`", "`", "'"),
    ("‘", "‘", "'"),
    ("’", "’", "'"),
    ("“", "“", '"'),
    ("”", "”", '"'),
    ("–", "–", "-"),
    ("—", "—", "-"),
]


class T5Format:
    """T5's way: the bare question for the encoder, a one-line rationale with `[ 48 / 2 = 24] 24` for the decoder."""

    def __init__(self, tokenizer: Tokenizer):
        """Bind the format to a vocabulary, which decides what has to be folded."""
        self._tokenizer = tokenizer
        self._is_lossy = cache(lambda sign: sign != " " and not self.survives(sign))
        self._folds = [(re.compile(pattern), new) for sign, pattern, new in _FOLDS if self._is_lossy(sign)]
        self.end_id = tokenizer.eos_id
        self._automaton = Automaton(tokenizer.token_texts, self._result_ids, "[", "]")

    def prompt(self, question: str) -> str:
        """The question on one line, signs outside the vocabulary folded."""
        return self._fold(question)

    def target(self, rationale: str) -> str:
        """The training text of a canonical rationale; `target(canonical(t)) == t` for every target t."""
        prose, *answers = _ANSWER_MARK.split(rationale)
        sentences = [_sentence(self._fold(_bracketed(line))) for line in prose.split("\n") if line.strip()]
        answers = [self._fold(_bracketed(answer)).rstrip(" .") for answer in answers]
        text = " ".join(sentences + [f"#### {answer}" for answer in answers if answer])
        for pattern, replacement in _SPACING:
            text = pattern.sub(replacement, text)
        return _one_line(text)

    def canonical(self, text: str) -> str:
        """The way back from T5's text to GSM8K's form; line breaks before the answer's are gone for good."""
        text = _BRACKETS.sub(lambda match: f"<<{_unspaced(match[1])}>>", _one_line(text))
        text = re.sub(r"(?<=[$€£])\s(?=<<)", "", text)
        return _ANSWER_MARK.sub("\n#### ", text).strip()

    def prompt_ids(self, question: str) -> list[int]:
        """The encoder's ids for a question, the end id included."""
        return [*self._tokenizer.encode(self.prompt(question)), self._tokenizer.eos_id]

    def target_ids(self, rationale: str) -> list[int]:
        """The decoder's ids for a canonical rationale, the end id included."""
        return [*self._tokenizer.encode(self.target(rationale)), self._tokenizer.eos_id]

    def text(self, ids: Iterable[int]) -> str:
        """The canonical rationale that a completion's ids stand for."""
        return self.canonical(self._tokenizer.decode(ids))

    def calculator(self) -> Automaton:
        """A new row's calculator; all rows share one set of tables."""
        return self._automaton.fresh()

    def survives(self, text: str) -> bool:
        """Whether the vocabulary can write `text`: encoded and decoded, it is the same."""
        return self._tokenizer.decode(self._tokenizer.encode(text)) == text

    def _result_ids(self, result: str) -> list[int]:
        # No piece of T5's vocabulary reaches across a space, so these are the ids of ` 24]` wherever a target holds it.
        return self._tokenizer.encode(f" {result}]")

    def _fold(self, text: str) -> str:
        """The text on one line, signs that the vocabulary lacks replaced by what comes nearest, if anything does."""
        text = _one_line(unicodedata.normalize("NFC", text))
        if any(map(self._is_lossy, set(text))):
            for pattern, replacement in self._folds:
                text = pattern.sub(replacement, text)
            text = _one_line("".join(_likeness(sign) if self._is_lossy(sign) else sign for sign in text))
        return text


def format_for(model_type: str, tokenizer: Tokenizer) -> T5Format:
    """The format of a model family, named as in Hugging Face's config.json; UserError if the family is unknown."""
    if model_type != "t5":
        raise UserError(f"model_type {model_type!r}: only 't5' is supported")
    return T5Format(tokenizer)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _sentence(line: str) -> str:
    """The line with a full stop, unless it has a mark of its own or nothing at all."""
    return line if not line or line.rstrip(" )\"'”’").endswith(_SENTENCE_MARKS) else line + "."


def _bracketed(text: str) -> str:
    """Annotations in brackets instead of `<<` `>>`; other brackets become parentheses."""
    text = text.replace("[", "(").replace("]", ")")
    return _ANNOTATION.sub(lambda match: f"[{_with_printed_result(match[1])}]", text)


def _with_printed_result(annotation: str) -> str:
    """`1500*2=3,000.00` as `1500*2=3000`: the calculator's print where the human's result equals it."""
    expression, equals, result = annotation.partition("=")
    printed, number = evaluate(expression), parse_number(result)
    if printed is None or number is None or number != Decimal(printed):
        return annotation
    return expression + equals + printed


def _unspaced(annotation: str) -> str:
    return re.sub(r"\s*([-+*/=])\s*", r"\1", annotation.strip())


def _likeness(sign: str) -> str:
    """A sign's plain spelling: letters without accents, fractions with a slash, invisible signs not at all."""
    if unicodedata.category(sign) == "Cf":
        return ""
    spelling = unicodedata.normalize("NFKD", sign).replace("⁄", "/")
    return "".join(c for c in spelling if not unicodedata.combining(c)) if sign.isalpha() else spelling
