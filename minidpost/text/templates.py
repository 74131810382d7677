"""How a model family writes a question and a rationale, and the way back.

Between the stages a rationale is kept in GSM8K's own form, called canonical here: lines, `<<48/2=24>>24` annotations
and `#### 72` at the end. T5's vocabulary has no `<`, no newline and few mathematical signs, so that its targets are one
line, as in the published code:

    Natalia sold 48 / 2 = [ 48 / 2 = 24] 24 clips in May. Natalia sold 48 + 24 = [ 48 + 24 = 72] 72 clips. #### 72

Llama's vocabularies have all of it, so that its targets are GSM8K's own form, behind an Alpaca-style prompt.

Departures from the published code: operators are spaced evenly (there `a+b+c` became `a + b+c`); what has been
formatted once stays as it is (there `#### 9` became `#### 9.` from the second round on); an annotation's result is
written as the calculator writes it, so that forced ids are the training text's; signs outside the vocabulary are
folded, not lost. Llama's begin id stands in front of every prompt, in training as elsewhere.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from decimal import Decimal
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from minidpost.errors import UserError
from minidpost.text.calculator import Automaton, evaluate_expression
from minidpost.text.grading import parse_number


class Tokenizer(Protocol):
    """What a format needs of a tokenizer (see tokenizer.py)."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    token_texts: Sequence[str]
    files: Sequence[Path]

    def encode(self, text: str, continued: bool = False) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class Template(Protocol):
    """What a format is to the rest of the code: canonical texts on one side, a model's texts and ids on the other."""

    eos_id: int

    def prompt(self, question: str) -> str: ...

    def target(self, rationale: str) -> str: ...

    def canonical(self, text: str) -> str: ...

    def prompt_ids(self, question: str) -> list[int]: ...

    def target_ids(self, rationale: str) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...

    def new_calculator(self) -> Automaton: ...

    def round_trips(self, text: str) -> bool: ...


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


class T5Template:
    """T5's way: the bare question for the encoder, a one-line rationale with `[ 48 / 2 = 24] 24` for the decoder."""

    def __init__(self, tokenizer: Tokenizer):
        """Bind the format to a vocabulary, which decides what has to be folded."""
        self._tokenizer = tokenizer
        self._is_lossy = cache(lambda sign: sign != " " and not self.round_trips(sign))
        self._folds = [(re.compile(pattern), new) for sign, pattern, new in _FOLDS if self._is_lossy(sign)]
        self.eos_id = tokenizer.eos_id
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

    def decode(self, ids: Iterable[int]) -> str:
        """The canonical rationale that a completion's ids stand for."""
        return self.canonical(self._tokenizer.decode(ids))

    def new_calculator(self) -> Automaton:
        """A new row's calculator; all rows share one set of tables."""
        return self._automaton.fresh()

    def round_trips(self, text: str) -> bool:
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


LLAMA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Response:\n"
)
# Behind both groups there may be a seam between forced and other ids.
_CALCULATED = re.compile(r"(<<[^<>=]*=)([^<>]*>>)")


class LlamaTemplate:
    """Llama's way: an Alpaca-style prompt, and the canonical rationale as it is.

    The prompt ends in a line break. It belongs to the prompt, and the completion is tokenised as what continues it, so
    that the completion's first piece is the same in training, in sampling and in the whole text tokenised at once: none
    of their tokenizers makes pieces that go on behind a line break.

    The calculator forces `24>>` behind `<<48/2=`, whatever follows. Other pieces may reach across these places (`=-`,
    `>>.`), so training text is tokenised in segments that end there, and forced ids are always those of training.
    """

    def __init__(self, tokenizer: Tokenizer):
        """Bind the format to a vocabulary; UserError if it is none of Llama's kind."""
        self._tokenizer = tokenizer
        if None in (tokenizer.bos_id, tokenizer.eos_id) or not self.round_trips("<<\n>>"):
            raise UserError(f"{tokenizer.files[0]}: Llama's format needs begin and end ids, <<, >> and line breaks")
        self.eos_id = tokenizer.eos_id
        self._automaton = Automaton(tokenizer.token_texts, self._result_ids, "<<", ">>")

    def prompt(self, question: str) -> str:
        """The question in its Alpaca-style frame."""
        return LLAMA_PROMPT.format(question=_tidy(question))

    def target(self, rationale: str) -> str:
        """The training text of a canonical rationale; `target(canonical(t)) == t` for every target t."""
        return _ANNOTATION.sub(lambda match: f"<<{_with_printed_result(match[1])}>>", _tidy(rationale))

    def canonical(self, text: str) -> str:
        """The way back: Llama's text, tidied."""
        return _tidy(text)

    def prompt_ids(self, question: str) -> list[int]:
        """The ids in front of a completion, the begin id first."""
        return [self._tokenizer.bos_id, *self._tokenizer.encode(self.prompt(question))]

    def target_ids(self, rationale: str) -> list[int]:
        """The completion's ids for a canonical rationale, the end id included."""
        return [*self._segmented_ids(self.target(rationale)), self.eos_id]

    def decode(self, ids: Iterable[int]) -> str:
        """The canonical rationale that a completion's ids stand for."""
        return self.canonical(self._tokenizer.decode(ids))

    def new_calculator(self) -> Automaton:
        """A new row's calculator; all rows share one set of tables."""
        return self._automaton.fresh()

    def round_trips(self, text: str) -> bool:
        """Whether the vocabulary can write `text`: encoded and decoded, it is the same."""
        return self._tokenizer.decode(self._segmented_ids(text)) == text

    def _segmented_ids(self, text: str) -> list[int]:
        seams = [end for match in _CALCULATED.finditer(text) for end in (match.end(1), match.end(2))]
        segments = [text[start:end] for start, end in pairwise([0, *seams, len(text)])]
        return [token_id for segment in segments for token_id in self._tokenizer.encode(segment, continued=True)]

    def _result_ids(self, result: str) -> list[int]:
        return self._tokenizer.encode(f"{result}>>", continued=True)


_FORMATS = {"t5": T5Template, "llama": LlamaTemplate}


def template_for(model_type: str, tokenizer: Tokenizer) -> Template:
    """The format of a model family, named as in Hugging Face's config.json; UserError if the family is unknown."""
    if model_type not in _FORMATS:
        raise UserError(f"model_type {model_type!r}: only {' and '.join(map(repr, _FORMATS))} are supported")
    return _FORMATS[model_type](tokenizer)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _tidy(text: str) -> str:
    """Lines with single spaces inside and none around; blank lines and unusual kinds of breaks and spaces go."""
    return "\n".join(line for line in map(_one_line, text.splitlines()) if line)


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
    printed, number = evaluate_expression(expression), parse_number(result)
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
