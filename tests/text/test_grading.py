"""The cases that other scorers got wrong, and the edges of what is a number."""

import json
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minidpost.text.grading import extract_answer, is_correct, parse_number


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("18", "18"),
        ("$29.00", "29"),
        ("1,000", "1000"),
        ("12,345,678.5", "12345678.5"),
        ("18.", "18"),
        (".5", "0.5"),
        ("-3", "-3"),
        ("−3", "-3"),
        ("-$3", "-3"),
        ("$-3", "-3"),
        ("5%", "5"),
        (" 7\n", "7"),
        ("007", "7"),
        ("9" * 40, "9" * 40),
    ],
)
def test_whole_numbers_are_read(text, value):
    assert parse_number(text) == Decimal(value)


@pytest.mark.parametrize(
    "text",
    [
        *("", " ", "abc", "NaN", "Infinity", "-inf", "1e999", "1e3", "0x10", "1_000", "1/2", "1,00", "1,0000", "1.2.3"),
        *("inf", "1E9", "1e-5", "½", "3 1/2", "１,000", "۱۸", "Ⅻ", "𝟏𝟖", "1\u066b5", "\ud800", "1\x00"),
        *("$", "-", ".", "%", "--3", "3 4", "18 clips", "٣", "१८", "１８", "²", "1" * 41, "0." + "1" * 40),
    ],
)
def test_anything_else_is_no_number(text):
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("He has 3.\n#### 18", "18"),
        ("... 24 clips. #### 72", "72"),
        ("#### #### 18", "18"),
        ("#### 18 ####", "18"),
        ("#### $29.00", "29"),
        ("#### -$3", "-3"),
        ("#### 1,000", "1000"),
        ("#### 1,000, that is", "1000"),
        ("#### 18.", "18"),
        ("#### 18.\n", "18"),
        ("#### 18 clips in all.", "18"),
        ("#### 18clips", "18"),
        ("#### 18: the answer", "18"),
        ("####18", "18"),
        ("#### .5", "0.5"),
        ("#### 5%", "5"),
        ("#### 5\n#### 6", "6"),
        ("#### 5 #### unknown", "5"),
    ],
)
def test_the_last_marked_number_is_the_answer(text, value):
    assert extract_answer(text) == Decimal(value)


@pytest.mark.parametrize(
    "text",
    [
        *("", "18", "### 18", "####", "#### eighteen", "#### 1/2", "#### 1 / 2", "#### 2*3", "#### 1e999"),
        *("#### NaN", "#### Infinity", "#### -inf", "#### 1e9", "#### １８", "#### ½", "#### 10^400", "#### 1/0"),
        *("#### 1,0000", "#### 3:30", "#### 1.2.3", "#### 1_000", "#### ١٨", "#### " + "1" * 41, "#### 5 #### 1/2"),
    ],
)
def test_without_a_plain_number_there_is_no_answer(text):
    assert extract_answer(text) is None


@pytest.mark.parametrize(
    ("completion", "answer", "correct"),
    [
        ("#### 29", "$29.00", True),
        ("#### $29.00", "29", True),
        ("#### 1000", "1,000", True),
        ("#### 18.0001", "18", True),
        ("#### 18.00010001", "18", False),
        ("#### 17.9999", "18", True),
        ("#### 17.9998", "18", False),
        ("#### 5", "-5", False),
        ("18", "18", False),
        ("#### 18", "eighteen", False),
        ("#### " + "9" * 40, "9" * 39 + "8", False),
        ("#### ." + "0" * 39, "0", True),
        ("#### ." + "0" * 39 + "1", "0", False),  # equal, but longer than a number may be
    ],
)
def test_equality_is_exact_up_to_the_tolerance(completion, answer, correct):
    assert is_correct(completion, answer) is correct


@settings(derandomize=True, max_examples=1000, deadline=None, database=None)
@given(st.text(alphabet="#0123456789.,-−$%eE/ \n١aN", max_size=60) | st.text(max_size=40))
def test_no_text_raises(text):
    for value in (parse_number(text), extract_answer(text)):
        assert value is None or value.is_finite()
    assert is_correct(text, text) in (True, False)


numbers = st.builds(
    lambda sign, whole, cents: f"{sign}{whole}{cents}",
    st.sampled_from(["", "-"]),
    st.integers(0, 10**24),
    st.one_of(st.just(""), st.integers(0, 9999).map(lambda n: f".{n:04d}")),
)
prose = st.text(alphabet="Tom has 18 #.,$%/e\n١", max_size=40)


@settings(derandomize=True, max_examples=1000, deadline=None, database=None)
@given(numbers, prose, st.sampled_from(["", ".", " clips", "\n", "%"]))
def test_a_number_written_is_read_back_however_it_is_spelt(number, before, after):
    value = Decimal(number)
    sign, digits = ("-", number[1:]) if number[0] == "-" else ("", number)
    whole, point, cents = digits.partition(".")
    spellings = [number, f"{sign}${digits}", f"{sign}{int(whole):,}{point}{cents}", f"{sign.replace('-', '−')}{digits}"]
    for spelling in spellings:
        assert parse_number(spelling) == parse_number(f" {spelling}%\n") == value
        assert extract_answer(f"{before} #### {spelling}{after}") == value
        assert is_correct(f"{before}\n####{spelling}{after}", number)
    assert not is_correct(f"#### {number}", format(value + 1, "f"))


@pytest.mark.parametrize(
    "piece",
    [
        "#",
        "#### ",
        "####1 ",
        "#### 1",
        "9",
        "1,",
        ",111",
        " ",
        "1 ",
        "1.",
        "####1 /",
        "$",
        "-",
        "####$",
        "#### \n",
        "é",
    ],
)
@pytest.mark.timeout(120)
def test_long_texts_are_read_in_linear_time(piece):
    """A search that is quadratic in any of these would take hours, not the second that all of them take."""
    for text in (piece * (10**6 // len(piece)), "#### 1" + piece * (10**6 // len(piece)) + "x"):
        parse_number(text)
        extract_answer(text)
        is_correct(text, text[:50])


def test_every_answer_of_gsm8k_is_read(shared):
    for split, rows in (("train", 7473), ("test", 1319)):
        rationales = [json.loads(line)["answer"] for line in (shared / "data" / "gsm8k" / f"{split}.jsonl").open()]
        assert len(rationales) == rows
        assert all(is_correct(rationale, rationale.rsplit("####")[-1]) for rationale in rationales)
