"""Arithmetic against fractions, the automaton against scripted token streams, and both against all of GSM8K."""

import json
import operator
import os
import sys
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st

from benchmarks import calculator_gsm8k as gsm8k
from minidpost.text.calculator import MAX_BITS, MAX_CHARACTERS, MAX_DEPTH, Automaton, evaluate_expression
from minidpost.text.templates import T5Template, template_for
from minidpost.text.tokenizer import load_tokenizer

# EXAMPLES=100000 for the long run whose figures stand in docs/hostile-input.md.
N_EXAMPLES = int(os.environ.get("EXAMPLES", 1000))
DETERMINISTIC = settings(derandomize=True, max_examples=N_EXAMPLES, deadline=None, database=None)


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("48/2", "24"),
        ("0.29*100", "29"),
        ("0.1+0.2", "0.3"),
        ("1/3", "0.33"),
        ("2/3", "0.67"),
        ("1/2", "0.5"),
        ("0.005", "0.01"),  # half up, though the binary double lies below
        ("1.005", "1.01"),
        ("-0.005", "-0.01"),
        ("0.004", "0"),
        ("-0.004", "0"),
        ("0-0", "0"),
        ("19.996", "20"),
        ("5.+.5", "5.5"),
        ("1,000*2", "2000"),
        ("12,345,678.5*2", "24691357"),
        ("20%", "0.2"),
        ("20%*50", "10"),
        ("(10+10)%*50", "10"),
        ("2+3*4", "14"),
        ("(2+3)*4", "20"),
        ("100/10/2", "5"),
        ("10-4-3", "3"),
        ("3*-2", "-6"),
        ("3--2", "5"),
        ("-(3+4)", "-7"),
        ("+8+30", "38"),
        ("3*+6", "18"),
        (" ( 48 +2 ) /  2 ", "25"),
        ("3 × 4 ÷ 2 − 1", "5"),
        ("3x4", "12"),
        ("3 X 4", "12"),
        ("99999999999*99999999999", "9999999999800000000001"),
    ],
)
def test_values(expression, result):
    assert evaluate_expression(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        *("", " ", "abc", "3+", "*3", "3 4", "1 000", "3(4)", "(3)(4)", "()", "(3", "3)", "2**3", "2^3", "7//2", "7%3"),
        *("20%%", "$5+3", "x", "3xx4", "3x", "1,00", "10,00", "0,500", "1,0000", "1,000,", "1.2.3", ".", "1e3", "1_0"),
        *("1e9", "1E9", "10^400", "10**400", "1" + "0" * 400, "(" * 100_000, "(" * 50_000 + "1" + ")" * 50_000),
        *("-" * 100_000 + "1", "1+" * 50_000 + "1", "9" * 100_000, "3–2", "3—2", "3⁄2", "3∕2", "3·2", "3⋅2", "3∗2"),
        *("3＋2", "3－2", "（3）", "3\u200b+2", "3\0+2", "\ud800", "٪", "3⁻2", "0/0", "1/(1/3-2/6)", "5%/0%"),
        *("3=3", "1/0", "1/(2-2)", "٣+1", "３+1", "½", "__import__('os')", "3;4", "0x1f", "inf", "nan", "\ufffd"),
    ],
)
def test_what_is_not_arithmetic_has_no_value(expression):
    assert evaluate_expression(expression) is None


def test_length_depth_and_magnitude_are_bounded():
    assert evaluate_expression("1+" * (MAX_CHARACTERS // 2 - 1) + "10") == str(MAX_CHARACTERS // 2 + 9)
    assert evaluate_expression("1+" * (MAX_CHARACTERS // 2) + "1") is None
    assert evaluate_expression("(" * MAX_DEPTH + "7" + ")" * MAX_DEPTH) == "7"
    assert evaluate_expression("(" * (MAX_DEPTH + 1) + "7" + ")" * (MAX_DEPTH + 1)) is None
    assert evaluate_expression("+".join(["(7)"] * (MAX_DEPTH + 1))) == str(7 * (MAX_DEPTH + 1))
    assert evaluate_expression("9" * 77) == "9" * 77
    assert evaluate_expression("9" * 78) is None
    assert evaluate_expression("*".join(["999999999999"] * 7) + "*0") is None
    assert evaluate_expression("." + "0" * 90 + "1") is None


numbers = st.one_of(
    st.integers(0, 9999).map(lambda n: (str(n), Fraction(n))),
    st.integers(0, 9999999).map(lambda n: (f"{n:,}", Fraction(n))),
    st.integers(0, 99999).map(lambda n: (f"{n // 100}.{n % 100:02d}", Fraction(n, 100))),
    st.integers(0, 99).map(lambda n: (f".{n:02d}", Fraction(n, 100))),
    st.integers(0, 99).map(lambda n: (f"{n}%", Fraction(n, 100))),
)
OPERATIONS = {
    **dict.fromkeys("+", operator.add),
    **dict.fromkeys("-−", operator.sub),
    **dict.fromkeys("*×xX", operator.mul),
    **dict.fromkeys("/÷", lambda a, b: a / b if b else None),
}


def chain(terms, operators):
    """`a + b - c` of (text, value) terms, from left to right; the value is None where any step has none."""

    def join(first, rest):
        text, value = first
        for operator_text, (term, operand) in rest:
            text += operator_text + term
            no_value = value is None or operand is None
            value = None if no_value else OPERATIONS[operator_text.strip()](value, operand)
            if value is not None and max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
                value = None
        return text, value

    spaced = st.builds("{}{}{}".format, st.sampled_from(["", " ", "\u00a0"]), operators, st.sampled_from(["", " "]))
    return st.builds(join, terms, st.lists(st.tuples(spaced, terms), max_size=3))


def compounds(terms):
    """Terms with minus signs before them, products of those, and sums of products in parentheses."""
    signed = terms | terms.map(lambda term: (f"-{term[0]}", None if term[1] is None else -term[1]))
    sums = chain(chain(signed, st.sampled_from("*×xX/÷")), st.sampled_from("+-−"))
    return sums.map(lambda term: (f"({term[0]})", term[1]))


def printed(value):
    """The result as text, from the digits of the value in thousandths and what is left below them."""
    whole_hundredths, rest = divmod(abs(value) * 100, 1)
    hundredths = int(whole_hundredths) + (rest >= Fraction(1, 2))
    text = str(hundredths // 100)
    if hundredths % 100:
        text += "." + str(100 + hundredths % 100)[1:].rstrip("0")
    return "-" + text if value < 0 and hundredths else text


@DETERMINISTIC
@given(st.recursive(numbers, compounds, max_leaves=8))
def test_values_equal_those_of_fractions(term):
    text, value = term
    event("longer than an annotation" if len(text) > MAX_CHARACTERS else "no value" if value is None else "value")
    assert evaluate_expression(text) == (None if value is None or len(text) > MAX_CHARACTERS else printed(value))


hostile = st.one_of(
    st.text(alphabet="0123456789.,+-*/()% x×", max_size=MAX_CHARACTERS + 5),
    st.text(alphabet="(-1", max_size=MAX_CHARACTERS),
    st.text(max_size=60),
    st.builds(
        lambda text, n: text * n, st.text(alphabet="019.,+-*/()%", min_size=1, max_size=5), st.integers(0, 10**5)
    ),
)
MAX_CALLS = 40 * MAX_CHARACTERS  # of Python's and C's functions; a millisecond or so


def n_calls(function, *arguments):
    """How many functions, Python's and C's, a call needs; unlike seconds, the same on every machine."""
    count = 0

    def profile(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function(*arguments)
    finally:
        sys.setprofile(None)
    return count


@DETERMINISTIC
@given(hostile)
def test_no_text_raises_and_the_work_is_bounded(text):
    result = evaluate_expression(text)
    assert result is None or evaluate_expression(result) == result
    assert n_calls(evaluate_expression, text) <= MAX_CALLS


@pytest.mark.parametrize(
    "text",
    [
        *("1+" * 99 + "1", "-" * 199 + "1", "(" * 20 + "1" + ")" * 20, "1%+" * 66 + "1", "(1)+" * 49 + "(1)"),
        *(".1/" * 66 + "1", "9*" * 99 + "9", "1/7+" * 49 + "1/7", "(" * 200, "9" * 200, " " * 200, "1 " * 100),
        *("(" * 100_000, "1+" * 50_000, "10^400", "1,000" * 20_000, "/".join(map(str, range(2, 60)))),
    ],
)
def test_the_work_is_bounded_at_the_worst(text):
    assert n_calls(evaluate_expression, text) <= MAX_CALLS


VOCABULARY = [
    *("", " [", " 48", " /", " 2", " =", " 24", "]", " 3", " 4", "=", "=<<", ")=", "=6", "<", "<<", ">", ">>", " *"),
    *("<<3*4=", "3", "*", " = ", "(3+4", "\ufffd", "[1+1=] [2+2=", " a", "][", " [[", "<<<", "1" * 40),
]
IDS = {text: token_id for token_id, text in enumerate(VOCABULARY)}
CLOSE = IDS["]"]


def bracket_result(result):
    """Ids for `24]`: one a digit, from 10,000 on, where no token has a text."""
    return [*(10_000 + int(digit) for digit in result), CLOSE]


def drive(tokens, open_mark="[", close_mark="]"):
    """Push tokens, given by text or id, and what they force; returns (token, forced ids) where anything was forced."""
    automaton = Automaton(VOCABULARY, bracket_result, open_mark, close_mark)
    events = []
    for token in tokens:
        forced = automaton.push(IDS[token] if isinstance(token, str) else token)
        if forced:
            events.append((token, forced))
        for token_id in forced:
            assert automaton.push(token_id) == []
    return events


@DETERMINISTIC
@given(st.lists(st.integers(-2, len(VOCABULARY) + 2), max_size=60), st.sampled_from([("[", "]"), ("<<", ">>")]))
def test_the_automaton_never_raises_and_remembers_one_annotation(tokens, marks):
    automaton = Automaton(VOCABULARY, bracket_result, *marks)
    for token_id in tokens:
        automaton.push(token_id)
        assert len(automaton._pending) <= len(marks[0]) + MAX_CHARACTERS


def test_a_result_of_several_tokens_is_forced_once():
    assert drive([" [", " 48", " /", " 2", " ="]) == [(" =", [10_002, 10_004, CLOSE])]


def test_a_second_annotation_is_forced_too():
    tokens = [" [", " 48", " /", " 2", " =", " 24", " a", " [", " 3", " *", " 4", " ="]
    assert [token for token, _ in drive(tokens)] == [" =", " ="]


@pytest.mark.parametrize("last", ["=", " =", " = "])
def test_any_token_that_ends_in_the_equals_sign_triggers(last):
    assert drive([" [", " 3", "*", " 4", last]) == [(last, [10_001, 10_002, CLOSE])]


def test_an_equals_sign_after_a_parenthesis_triggers():
    assert drive([" [", "(3+4", ")="]) == [(")=", [10_007, CLOSE])]


def test_an_equals_sign_inside_a_token_does_not_trigger():
    assert drive([" [", " 3", "*", " 4", "=6", "]"]) == []
    assert drive([" [", " 3", "=6", "="]) == []


@pytest.mark.parametrize("text", [" a", "", " 3 *", " 3\ufffd", " 3 /<", " 3 4", " 3 =6"])
def test_without_a_value_nothing_is_forced(text):
    texts = [*VOCABULARY, text]
    automaton = Automaton(texts, bracket_result, "[", "]")
    ids = [IDS[" ["], len(VOCABULARY), IDS[" ="], IDS[" 4"], CLOSE]
    assert [automaton.push(token_id) for token_id in ids] == [[]] * 5
    assert [automaton.push(IDS[token]) for token in (" [", " 4", " =")] == [[], [], [10_004, CLOSE]]


def test_outside_an_annotation_nothing_is_forced():
    assert drive([" 48", " /", " 2", " ="]) == []
    assert drive([" [", " 3", "]", " *", " 2", " ="]) == []


def test_the_last_opening_mark_counts():
    assert drive([" [", " 3", " *", " [", " 4", " ="]) == [(" =", [10_004, CLOSE])]
    assert drive([" [[", " 4", " ="]) == [(" =", [10_004, CLOSE])]
    assert drive([" [", " 3", "][", " 4", " ="]) == [(" =", [10_004, CLOSE])]


def test_only_the_end_of_a_token_with_several_marks_triggers():
    assert drive(["[1+1=] [2+2="]) == [("[1+1=] [2+2=", [10_004, CLOSE])]


def test_marks_may_straddle_tokens():
    forced = [10_001, 10_002, CLOSE]
    assert drive(["<", "<", "3", "*", " 4", "="], "<<", ">>") == [("=", forced)]
    assert drive(["<<<", "3", "*", " 4", "="], "<<", ">>") == [("=", forced)]
    assert drive(["<<", "<", "3", "*", " 4", "="], "<<", ">>") == [("=", forced)]
    assert drive([" 3", "=<<", "3", "*", " 4", "="], "<<", ">>") == [("=", forced)]
    assert drive(["<<3*4="], "<<", ">>") == [("<<3*4=", forced)]
    assert drive(["<", " a", "<", "3", "="], "<<", ">>") == []
    assert drive(["<<", "3", ">", ">", "*", " 4", "="], "<<", ">>") == []
    assert drive(["<<", "3", ">>", "<", "<", " 4", "="], "<<", ">>") == [("=", [10_004, CLOSE])]


def test_ids_without_text_change_nothing():
    end, beyond = 0, len(VOCABULARY)
    assert drive([" [", " 3", end, "*", beyond, " 4", -1, " ="]) == [(" =", [10_001, 10_002, CLOSE])]
    assert drive([" [", " 3", end, end]) == []


def test_an_endless_annotation_is_abandoned():
    assert drive([" [", " 3", *["1" * 40] * 10, " ="]) == []
    assert len(drive([" [", " 3", *["1" * 40] * 10, " [", " 4", " ="])) == 1


def test_rows_are_independent():
    first = Automaton(VOCABULARY, bracket_result, "[", "]")
    for token in (" [", " 3"):
        first.push(IDS[token])
    second = first.fresh()
    assert second.push(IDS[" ="]) == []
    assert first.push(IDS[" ="]) == [10_003, CLOSE]


@pytest.fixture(scope="module")
def t5_template(shared):
    return T5Template(load_tokenizer(shared / "tokenizers" / "t5"))


@pytest.fixture(scope="module", params=gsm8k.TOKENIZERS)
def each_template(shared, request):
    return template_for(gsm8k.TOKENIZERS[request.param], load_tokenizer(shared / "tokenizers" / request.param))


@pytest.mark.slow
def test_every_annotation_of_gsm8k_train(shared, each_template):
    rationales = gsm8k.read_rationales(shared / "data", "train")
    verdicts, walked, disagreements = gsm8k.measure(rationales, each_template)
    assert verdicts == Counter({gsm8k.SAME: 23_046, gsm8k.SPELT: 662, gsm8k.DECIMALS: 6, gsm8k.NO_VALUE: 2})
    differing = gsm8k.FORCED_OTHER + gsm8k.DECIMALS
    n_trivial = 339 if isinstance(each_template, T5Template) else 0  # T5's targets leave `5=5` out
    n_equal = 23_046 + 662 - n_trivial
    expected = {gsm8k.FORCED_EQUAL: n_equal, differing: 6, gsm8k.NOT_FORCED: 2, gsm8k.NOT_WRITTEN: n_trivial}
    assert walked == Counter(expected)  # Counters are equal where a count is 0 or absent
    assert len(disagreements) == 8


def test_every_annotation_of_gsm8k_test(shared, each_template):
    verdicts, walked, disagreements = gsm8k.measure(gsm8k.read_rationales(shared / "data", "test"), each_template)
    assert verdicts == Counter({gsm8k.SAME: 4_126, gsm8k.SPELT: 155, gsm8k.NO_NUMBER: 1})
    n_trivial = 71 if isinstance(each_template, T5Template) else 0
    n_equal = 4_126 + 155 - n_trivial
    differing = gsm8k.FORCED_OTHER + gsm8k.NO_NUMBER
    assert walked == Counter({gsm8k.FORCED_EQUAL: n_equal, differing: 1, gsm8k.NOT_WRITTEN: n_trivial})
    assert len(disagreements) == 1


def test_forced_ids_stand_in_the_target_where_the_human_agrees(shared, each_template):
    """The same walk, rationale by rationale and without the benchmark's own bookkeeping."""
    for line in (shared / "data" / "gsm8k" / "test.jsonl").open():
        rationale = json.loads(line)["answer"]
        written = gsm8k.annotations(rationale)
        if isinstance(each_template, T5Template):  # `5=5` is left out
            written = [pair for pair in written if not pair[0].isdigit()]
        agreeing = [gsm8k.verdict(*pair) in gsm8k.AGREE for pair in written]
        walked = [forced == standing for forced, standing in gsm8k.walk(each_template, rationale)]
        assert walked == agreeing


def test_a_sentence_that_a_model_writes_through_the_calculator(shared, t5_template):
    """The model proposes wrong digits; the row holds the calculator's instead, and reads as training text does."""
    tokenizer = load_tokenizer(shared / "tokenizers" / "t5")
    automaton, row = t5_template.new_calculator(), []
    for token_id in tokenizer.encode("She pays 3 * 4.25 = $ [ 3 * 4.25 ="):
        row.append(token_id)
        forced = automaton.push(token_id)
        for forced_id in forced:
            assert automaton.push(forced_id) == []
        row += forced
    row += tokenizer.encode("12.75.")
    assert row == tokenizer.encode("She pays 3 * 4.25 = $ [ 3 * 4.25 = 12.75] 12.75.")
    assert t5_template.decode(row) == "She pays 3 * 4.25 = $<<3*4.25=12.75>>12.75."
