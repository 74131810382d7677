"""How a model family writes a question and a rationale, and the way back; a checkpoint's chat format is in chat.py.

Between the stages a rationale is in GSM8K's own form, called canonical here: lines, `<<48/2=24>>24` annotations
and `#### 72` at the end. T5's vocabulary has no `<`, no newline and few mathematical symbols, so that its targets are
one line, as in the published code:

    Natalia sold 48 / 2 = [ 48 / 2 = 24] 24 clips in May. Natalia sold 48 + 24 = [ 48 + 24 = 72] 72 clips. #### 72

As there, `$ 110` is written apart, so that `▁110` is the piece that it is everywhere else, a space follows the colon of
`Total:5`, and annotations that calculate nothing (`<<5=5>>`) are left out. Llama's vocabularies have all characters, so
that its targets are GSM8K's own form, annotations that calculate nothing included, after an Alpaca-style prompt.

Departures from the published code, for T5 (benchmarks/results/targets.md counts them on GSM8K):

- operators and annotations are spaced evenly: `a + b + c`, `= [`, `x = 5` (there `a + b+c`, `=[`, `x= 5`);
- what is no operator stays as it is: `pull-ups`, `miles/hour`, `>=` (there `pull - ups`, `miles / hour`, `> =`);
- `$` is parted from amounts and annotations (there from whatever follows: `97$,` became `97$ ,`);
- an annotation's result is written as the calculator writes it, so that forced ids are the training text's, in Llama's
  targets too; `<<28=28.00>>` then calculates nothing and is left out;
- characters outside the vocabulary, those of questions too, are replaced by what comes nearest, not lost;
- brackets of the prose become parentheses, since `[` opens an annotation;
- a line that ends in another mark gets no full stop (there `Is it?.`, `gumballs,.`);
- single spaces, none inside parentheses, no blank lines;
- what has been formatted once stays as it is (there `#### 9` became `#### 9.` from the second round on).

For Llama: lines are tidied; BOS stands in front of every prompt (there in training, not in evaluation); a completion
is tokenised apart from its prompt, and in segments where the calculator's ids begin and end (see `LlamaTemplate`).
"""

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from typing import Protocol

from minidpost.errors import UserError
from minidpost.text.calculator import Automaton, evaluate_expression
from minidpost.text.grading import parse_number


class Tokenizer(Protocol):
    """What a template needs of a tokenizer (see tokenizer.py)."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def n_embeddings_needed(self) -> int:
        """How many embeddings a model must have for the ids of pieces, BOS and `stop_ids`."""

    @property
    def bos_id(self) -> int | None: ...

    @property
    def eos_id(self) -> int | None: ...

    @property
    def stop_ids(self) -> frozenset[int]:
        """The ids of which any ends a completion, `eos_id` included."""

    @property
    def special_ids(self) -> Mapping[str, int]:
        """The ids of special tokens by their names."""

    @property
    def begins_anew_after_marks(self) -> bool:
        """Whether a text after a special token begins as one at the very beginning, with a space put in front."""

    @property
    def token_texts(self) -> Sequence[str]:
        """What each id adds to a text."""

    @property
    def files(self) -> Sequence[Path]:
        """The files that a model directory needs for this tokenizer."""

    def encode(self, text: str, continued: bool = False) -> list[int]: ...

    def decode(self, ids: Iterable[int]) -> str: ...


class Template(Protocol):
    """What a template is to the rest of the code: canonical texts on one side, a model's texts and ids on the other."""

    eos_id: int  # what a target ends in
    stop_ids: frozenset[int]  # what ends a completion: any of them

    def prompt(self, question: str) -> str:
        """The text that the model is given for a question."""

    def target(self, rationale: str) -> str:
        """The text that the model is trained to write for a canonical rationale."""

    def canonical(self, text: str) -> str:
        """The way back: the canonical rationale of a text that the model wrote."""

    def prompt_ids(self, question: str) -> list[int]:
        """The ids of a question's prompt."""

    def target_ids(self, rationale: str) -> list[int]:
        """The ids of a rationale's target, EOS included."""

    def decode(self, ids: Iterable[int]) -> str:
        """The canonical rationale that a completion's ids stand for."""

    def new_calculator(self) -> Automaton:
        """A calculator for one row of the sampler."""

    def round_trips(self, text: str) -> bool:
        """Whether the vocabulary can write a text: encoded and decoded, it is the same."""


ANNOTATION = re.compile(r"<<([^<>]*)>>")
_BRACKETED = re.compile(r"\[([^\[\]]*)\]")
_TRIVIAL = re.compile(r"\[\s*[0-9]+\s*=\s*[0-9]+\s*\]")  # nothing is calculated: `<<5=5>>`
_BRACKETS = re.compile(r"\[([^\[\]<>]*)\]\s*")
_ANSWER_MARK = re.compile(r"\s?####[\s#]*")  # one space, not all: a search that begins at each of many is slow
_SENTENCE_MARKS = (".", "!", "?", ":", ";", ",")

# A binary operator stands between these two; any other one (`= -5`, `30-minute`) stays as it is.
_LEFT = r"(?<=[0-9)%])\s*"
_RIGHT = r"\s*(?=[-+]?[$€£]?\s?[-+]?\.?[0-9(\[])"
_SPACING = [
    (re.compile(r"\$\s*(?=[-+]?\.?[0-9(])"), "$ "),  # `▁110` is one piece everywhere; `$110` would be `▁$1`, `10`
    (re.compile(r"(?<=[^0-9]):(?=[0-9])"), ": "),
    (re.compile(rf"{_LEFT}([-+*/]){_RIGHT}"), r" \1 "),
    (re.compile(r"\s*(?<![<>=!])=(?![=>])\s*"), " = "),
    (re.compile(r"\["), " [ "),
    (re.compile(r"\s*\]"), "] "),
    (re.compile(r"\(\s+"), "("),
    (re.compile(r"\s+\)"), ")"),
]
# The way back: `$ 110` is `$110`, and of any currency `€ <<2*3=6>>6` is `€<<2*3=6>>6`; `5$ 3 times` stays.
_SPACE_AFTER_CURRENCY = re.compile(r"(?<=\$)(?<![0-9]\$)\s(?=[-+]?\.?[0-9])|(?<=[$€£])\s(?=<<)")

# What replaces a character that the vocabulary lacks, as (character, pattern, replacement). They are applied in this
# order: a replacement may hold a character that is replaced further down.
_REPLACEMENTS = [
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
        """Bind the template to a vocabulary, which decides what has to be replaced; UserError if it has no EOS."""
        if tokenizer.eos_id is None:
            raise UserError(f"{tokenizer.files[0]}: T5's template needs an end id")
        self.eos_id = tokenizer.eos_id
        self.stop_ids = tokenizer.stop_ids
        self._tokenizer = tokenizer
        self._is_unknown: dict[str, bool] = {}  # by character, filled as they come
        self._replacements = [
            (re.compile(pattern), replacement)
            for character, pattern, replacement in _REPLACEMENTS
            if self._lacks(character)
        ]
        self._automaton = Automaton(tokenizer.token_texts, self._result_ids, "[", "]")

    def prompt(self, question: str) -> str:
        """The question on one line, characters outside the vocabulary replaced."""
        return self._replace_unknown_characters(question)

    def target(self, rationale: str) -> str:
        """The training text of a canonical rationale; `target(canonical(t)) == t` for every target t."""
        # 1) Annotations in brackets, characters of the vocabulary; the answer's mark begins a line.
        lines = _ANSWER_MARK.sub("\n#### ", rationale).split("\n")
        text = "\n".join(self._plain_line(line) for line in lines)
        # 2) Each line becomes a sentence, the answer goes to the end.
        prose, *answers = _ANSWER_MARK.split(text)
        sentences = [_sentence(line) for line in prose.split("\n") if line]
        final = [f"#### {answer}" for answer in (_one_line(answer).rstrip(" .") for answer in answers) if answer]
        text = " ".join([*sentences, *final])
        # 3) Spaces around operators, brackets and currency, as T5's pieces want them.
        for pattern, replacement in _SPACING:
            text = pattern.sub(replacement, text)
        return _one_line(text)

    def canonical(self, text: str) -> str:
        """The way back from T5's text to GSM8K's form; line breaks before the answer's are gone for good."""
        text = _BRACKETS.sub(lambda match: f"<<{_unspaced(match[1])}>>", _one_line(text))
        text = _SPACE_AFTER_CURRENCY.sub("", text)
        return _ANSWER_MARK.sub("\n#### ", text).strip()

    def prompt_ids(self, question: str) -> list[int]:
        """The encoder's ids for a question, EOS included."""
        return [*self._tokenizer.encode(self.prompt(question)), self.eos_id]

    def target_ids(self, rationale: str) -> list[int]:
        """The decoder's ids for a canonical rationale, EOS included."""
        return [*self._tokenizer.encode(self.target(rationale)), self.eos_id]

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

    def _plain_line(self, line: str) -> str:
        """One line of a rationale with its annotations in brackets and nothing outside the vocabulary."""
        line = ANNOTATION.sub(r"[\1]", line.replace("[", "(").replace("]", ")"))
        line = self._replace_unknown_characters(line)
        line = _BRACKETED.sub(lambda match: f"[{_with_printed_result(match[1])}]", line)
        return _one_line(_TRIVIAL.sub("", line))

    def _lacks(self, character: str) -> bool:
        """Whether the vocabulary cannot write a character."""
        if character not in self._is_unknown:
            self._is_unknown[character] = character != " " and not self.round_trips(character)
        return self._is_unknown[character]

    def _replace_unknown_characters(self, text: str) -> str:
        """The text on one line, each character that the vocabulary lacks as what comes nearest, if anything does."""
        text = _one_line(unicodedata.normalize("NFC", text))
        if not any(self._lacks(character) for character in set(text)):
            return text
        for pattern, replacement in self._replacements:
            text = pattern.sub(replacement, text)
        characters = [_plain_spelling(character) if self._lacks(character) else character for character in text]
        return _one_line("".join(characters))


LLAMA_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{question}\n\n### Response:\n"
)
# Where the calculator's forced ids begin (after group 1) and end (after group 2).
_CALCULATED = re.compile(r"(<<[^<>=]*=)([^<>]*>>)")


class LlamaTemplate:
    """The way of Llama, Qwen and Mistral: an Alpaca-style prompt, and the canonical rationale as it is.

    The prompt ends in a line break. It belongs to the prompt, and the completion is tokenised as what continues it, so
    that the completion's first piece is the same in training, in sampling and in the whole text tokenised at once: none
    of their tokenizers makes pieces that go on after a line break.

    The calculator forces `24>>` after `<<48/2=`, whatever follows. Other pieces may reach across these places (`=-`,
    `>>.`), so training text is tokenised in segments that end there, and forced ids are always those of training.
    """

    def __init__(self, tokenizer: Tokenizer, eos_id: int | None = None):
        """Bind the template to a vocabulary; UserError if it is none of Llama's kind.

        Targets end in `eos_id`, or else in the tokenizer's own; a completion ends at either.
        """
        self._tokenizer = tokenizer
        own_or_given = tokenizer.eos_id if eos_id is None else eos_id
        if own_or_given is None or not self.round_trips("<<\n>>"):
            raise UserError(f"{tokenizer.files[0]}: Llama's template needs an end id, <<, >> and line breaks")
        self.eos_id = own_or_given
        self.stop_ids = tokenizer.stop_ids | {own_or_given}
        self._bos_ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
        self._automaton = Automaton(tokenizer.token_texts, self._result_ids, "<<", ">>")

    def prompt(self, question: str) -> str:
        """The question in its Alpaca-style frame."""
        return LLAMA_PROMPT.format(question=tidy(question))

    def target(self, rationale: str) -> str:
        """The training text of a canonical rationale; `target(canonical(t)) == t` for every target t."""
        return ANNOTATION.sub(lambda match: f"<<{_with_printed_result(match[1])}>>", tidy(rationale))

    def canonical(self, text: str) -> str:
        """The way back: Llama's text, tidied."""
        return tidy(text)

    def prompt_ids(self, question: str) -> list[int]:
        """The ids in front of a completion, BOS first where the checkpoint has one."""
        return [*self._bos_ids, *self._tokenizer.encode(self.prompt(question))]

    def target_ids(self, rationale: str) -> list[int]:
        """The completion's ids for a canonical rationale, EOS included."""
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
        """The ids of a text, tokenised apart where forced ids would begin and end.

        `It is <<48/2=24>>24.` is tokenised as `It is <<48/2=`, `24>>`, `24.`
        """
        ends = []
        for match in _CALCULATED.finditer(text):
            ends += [match.end(1), match.end(2)]
        ids: list[int] = []
        for start, end in pairwise([0, *ends, len(text)]):
            ids += self._tokenizer.encode(text[start:end], continued=True)
        return ids

    def _result_ids(self, result: str) -> list[int]:
        return self._tokenizer.encode(f"{result}>>", continued=True)


_TEMPLATES: dict[str, Callable[[Tokenizer], Template]] = {
    "t5": T5Template,
    **dict.fromkeys(("llama", "qwen2", "qwen3", "mistral"), LlamaTemplate),
}


def template_for(model_type: str, tokenizer: Tokenizer) -> Template:
    """The template of a model family, named as in Hugging Face's config.json; UserError if the family is unknown."""
    if model_type not in _TEMPLATES:
        raise UserError(f"model_type {model_type!r}: only {', '.join(map(repr, _TEMPLATES))} are supported")
    return _TEMPLATES[model_type](tokenizer)


def _one_line(text: str) -> str:
    """The text with single spaces in place of every kind and number of spaces and line breaks."""
    return " ".join(text.split())


def tidy(text: str) -> str:
    """Lines with single spaces inside and none around; blank lines and unusual kinds of breaks and spaces go."""
    return "\n".join(line for line in map(_one_line, text.splitlines()) if line)


def _sentence(line: str) -> str:
    """The line with a full stop, unless it has a mark of its own or nothing at all."""
    return line if not line or line.rstrip(" )\"'”’").endswith(_SENTENCE_MARKS) else line + "."


def _with_printed_result(annotation: str) -> str:
    """`1500*2=3,000.00` as `1500*2=3000`: the calculator's writing where the human's result equals it."""
    expression, equals, result = annotation.partition("=")
    printed = evaluate_expression(expression)
    value = parse_number(result)
    if printed is None or value is None or value != Decimal(printed):
        return annotation
    return expression + equals + printed


def _unspaced(annotation: str) -> str:
    """` 48 / 2 = 24` as `48/2=24`."""
    return re.sub(r"\s*([-+*/=])\s*", r"\1", annotation.strip())


def _plain_spelling(character: str) -> str:
    """A character spelt plainly: letters without accents, fractions with a slash, invisible characters not at all."""
    if unicodedata.category(character) == "Cf":
        return ""
    spelling = unicodedata.normalize("NFKD", character).replace("⁄", "/")
    if not character.isalpha():
        return spelling
    return "".join(part for part in spelling if not unicodedata.combining(part))
