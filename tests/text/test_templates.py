"""T5's template: spacing, replaced characters, the way back; Llama's: prompt, segments; both on all of GSM8K."""

import json
import re
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import targets
from minidpost.data.datasets import MAX_TEXT
from minidpost.errors import UserError
from minidpost.text.calculator import evaluate_expression
from minidpost.text.grading import extract_answer
from minidpost.text.templates import LlamaTemplate, T5Template, template_for
from minidpost.text.tokenizer import load_tokenizer

CHARACTERS = SimpleNamespace(  # a vocabulary of all Unicode characters: nothing has to be replaced
    eos_id=0,
    stop_ids=frozenset({0}),
    token_texts=["", " [", " ="],
    encode=lambda text: [ord(c) for c in text],
    decode=lambda ids: "".join(chr(i) for i in ids if i),
)


@pytest.fixture(scope="module")
def t5(shared):
    return T5Template(load_tokenizer(shared / "tokenizers" / "t5"))


@pytest.fixture(scope="module")
def anything():
    return T5Template(CHARACTERS)


@pytest.fixture(scope="module")
def gsm8k(shared):
    paths = [shared / "data" / "gsm8k" / f"{split}.jsonl" for split in ("train", "test")]
    return [json.loads(line) for path in paths for line in path.open()]


@pytest.mark.parametrize(
    ("rationale", "target"),
    [
        (
            "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nIn all 48+24 = <<48+24=72>>72 clips.\n#### 72",
            "Natalia sold 48 / 2 = [ 48 / 2 = 24] 24 clips in May. In all 48 + 24 = [ 48 + 24 = 72] 72 clips. #### 72",
        ),
        ("5+6+7=<<5+6+7=18>>18", "5 + 6 + 7 = [ 5 + 6 + 7 = 18] 18."),
        ("<<(3+4)*2=14>>14", "[ (3 + 4) * 2 = 14] 14."),
        ("( 3+4 )*2", "(3 + 4) * 2."),
        ("It costs $<<4*5=20>>20", "It costs $ [ 4 * 5 = 20] 20."),
        ("$5+$3=$<<5+3=8>>8", "$ 5 + $ 3 = $ [ 5 + 3 = 8] 8."),
        ("$.5 of $1,000-$ 155, -$3 and $-3", "$ .5 of $ 1,000 - $ 155, -$ 3 and $ -3."),
        ("He has 97$, 5$.\nA $5-bill for $(3+4)", "He has 97$, 5$. A $ 5-bill for $ (3 + 4)."),
        ("€5 and £<<2+3=5>>5", "€5 and £ [ 2 + 3 = 5] 5."),
        ("$<<5=5>>5 on Monday:<<6=6>>6$ and<<7=7>> 7", "$ 5 on Monday: 6$ and 7."),
        ("<<5.5=5.5>>5.5 and <<05=5>>5 and << 8 = 8.00 >>8", "[ 5.5 = 5.5] 5.5 and 5 and 8."),
        ("No more <<0=0>>\n#### 0", "No more. #### 0"),
        ("#<<5=5>>### 9", "#### 9"),
        ("Total:13+26 at 12:30, ratio 2:1", "Total: 13 + 26 at 12:30, ratio 2:1."),
        ("20%*50=<<20%*50=10>>10", "20% * 50 = [ 20% * 50 = 10] 10."),
        ("<<3-8=-5>>-5 degrees", "[ 3 - 8 = -5] -5 degrees."),
        ("<<3*-2=-6>>-6 or 3--2 or -1", "[ 3 * -2 = -6] -6 or 3 - -2 or -1."),
        ("a 30-minute and/or x=5 break", "a 30-minute and/or x = 5 break."),
        ("x >= 5 and y<=6 and z==7", "x >= 5 and y<=6 and z==7."),
        ("two\tspaces  and\xa0more", "two spaces and more."),
    ],
)
def test_targets(anything, rationale, target):
    assert anything.target(rationale) == target


@pytest.mark.parametrize("amount", ["$110", "$.5", "$1,000.50", "-$3", "$-3", "$<<3*4=12>>12", "€<<3*4=12>>12"])
def test_amounts_are_read_back_as_a_human_writes_them(t5, amount):
    for rationale in (f"It costs {amount}.\n#### {amount}", f"{amount}+{amount}.", amount):
        target = t5.target(rationale)
        assert t5.canonical(target).removesuffix(".") == rationale.replace("+", " + ").removesuffix(".")
        assert t5.target(t5.canonical(target)) == target


def test_a_number_after_a_dollar_is_the_same_piece_as_elsewhere(t5, shared):
    texts = load_tokenizer(shared / "tokenizers" / "t5").token_texts
    written = [texts[i] for i in t5.target_ids("$110=$<<100+10=110>>110")]
    assert written == [" $", " 110", " =", " $", " [", " 100", " +", " 10", " =", " 110", "]", " 110", ".", ""]


def test_an_amount_behind_its_number_stays_apart_from_the_next(anything):
    assert anything.canonical("He pays 5$ 3 times and $ 4") == "He pays 5$ 3 times and $4"


def test_an_amount_of_the_model_is_graded_with_and_without_a_space(t5):
    for answer in ("#### $ 29.00", "#### $29.00", "#### $ 29", "#### 29"):
        assert extract_answer(t5.canonical(f"It is $ 29. {answer}")) == 29


@pytest.mark.parametrize(
    ("annotation", "written"),
    [
        ("1000*2=2,000", "1000 * 2 = 2000"),
        ("12*2=24.0", "12 * 2 = 24"),
        ("10/2=5.00", "10 / 2 = 5"),
        ("5/10=.5", "5 / 10 = 0.5"),
        ("1/8=0.125", "1 / 8 = 0.125"),  # another number than the calculator's 0.13 stays the human's
        ("2+2=5", "2 + 2 = 5"),
        ("3/4=3/4", "3 / 4 = 3 / 4"),
        ("1/0=0", "1 / 0 = 0"),
    ],
)
def test_results_are_written_as_the_calculator_writes_them(anything, annotation, written):
    assert anything.target(f"<<{annotation}>>2,000.00 left") == f"[ {written}] 2,000.00 left."


def test_lines_end_in_a_sentence_mark_and_the_answer_in_none(anything):
    assert anything.target("So\nIs it?\nYes!\nThen:\n(done.)\n\n#### 9.") == "So. Is it? Yes! Then: (done.) #### 9"
    assert anything.target("He has 9. #### 9") == "He has 9. #### 9"
    assert anything.target("Nine\n#### #### 9\n") == "Nine. #### 9"
    assert anything.target("No answer") == "No answer."
    assert anything.target("") == ""


def test_brackets_in_prose_become_parentheses(anything):
    assert anything.target("[1 + (30/60)] hours = <<[1+2]*2=6>>6") == "(1 + (30 / 60)) hours = [ (1 + 2) * 2 = 6] 6."


@pytest.mark.parametrize(
    ("text", "replaced"),
    [
        ("3 × $4", "3 * $ 4."),
        ("W × W", "W x W."),
        ("6÷2", "6 / 2."),
        ("6−2", "6 - 2."),
        ("½ of 10½", "1 / 2 of 10 1 / 2."),
        ("5² m^2 cm³", "5**2 m**2 cm**3."),
        ("√25=5", "square root of 25 = 5."),
        ("4<5 and 4 ≤ 5", "4 less than 5 and 4 at most 5."),
        ("a jalapeño, a café", "a jalapeno, a café."),
        ("{2} `.5", "(2) '.5."),
        ("¢25 and 75¢", "25 cents and 75 cents."),
        ("¢<<25*3=75>>75", "[ 25 * 3 = 75] 75 cents."),
        ("wait… \u200bhere", "wait... here."),
        ("Janice’s “–”—", "Janice’s “–”—."),  # all in T5's vocabulary
    ],
)
def test_characters_outside_the_vocabulary_are_replaced(t5, text, replaced):
    assert t5.target(text) == replaced
    assert t5.round_trips(replaced)
    assert t5.target(t5.canonical(replaced)) == replaced


def test_characters_of_the_vocabulary_stay(anything):
    text = "3 × 4 ÷ 2 − ½ ¢ ² ^ √ ≤ ñ { ` ’ …"
    assert anything.prompt(text) == text
    assert anything.target(text) == text + "."


def test_what_cannot_be_replaced_stays_and_is_detected(t5):
    assert t5.prompt("three  猫\ncats") == "three 猫 cats"
    assert not t5.round_trips("three 猫 cats")
    assert t5.round_trips("three cats")
    assert not t5.round_trips("three  cats")


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("48 / 2 = [ 48 / 2 = 24] 24 clips. #### 24", "48 / 2 = <<48/2=24>>24 clips.\n#### 24"),
        ("$ [ (3 + 4) * -2 = -14] -14", "$<<(3+4)*-2=-14>>-14"),
        ("[48/2 =  24]24 #### #### 24", "<<48/2=24>>24\n#### 24"),
        ("$ 5 - $ .5 = $ [ 5 - .5 = 4.5] 4.5. #### $ 4.5", "$5 - $.5 = $<<5-.5=4.5>>4.5.\n#### $4.5"),
        ("[ 3 apples = ] [ 3 + 4", "<<3 apples=>>[ 3 + 4"),
        ("#### 5", "#### 5"),
        ("", ""),
    ],
)
def test_the_way_back(anything, text, canonical):
    assert anything.canonical(text) == canonical


def test_ids_and_text(t5, shared):
    tokenizer = load_tokenizer(shared / "tokenizers" / "t5")
    rationale = "Half is <<48/2=24>>24.\n#### 24"
    assert t5.prompt_ids(" How \n many? ") == [*tokenizer.encode("How many?"), 1]
    assert t5.target_ids(rationale) == [*tokenizer.encode("Half is [ 48 / 2 = 24] 24. #### 24"), 1]
    assert t5.decode([*t5.target_ids(rationale), 0, 0]) == rationale


def test_each_row_gets_a_calculator_of_its_own(t5):
    ids = t5.target_ids("<<48/2=24>>24")
    first, second = t5.new_calculator(), t5.new_calculator()
    position = 5
    assert [first.push(token_id) for token_id in ids[:position]] == [[]] * position
    assert second.push(ids[position]) == []
    assert first.push(ids[position]) == ids[position + 1 : position + 3]


def test_every_target_of_gsm8k_survives_and_is_a_fixed_point(t5, gsm8k):
    assert len(gsm8k) == 8792
    targets = [t5.target(row["answer"]) for row in gsm8k]
    assert [target for target in targets if not t5.round_trips(target)] == []
    assert [target for target in targets if t5.target(t5.canonical(target)) != target] == []


def test_targets_of_gsm8k_are_the_published_ones_but_for_listed_departures(shared):
    _, comparisons = targets.measure(shared / "data", shared / "tokenizers" / "t5")
    assert len(comparisons) == 6_705
    assert [comparison for comparison in comparisons if not comparison.is_explained] == []
    n_equal = sum(comparison.target == comparison.published for comparison in comparisons)
    assert n_equal == 4_410  # with the rule for `$` alone they were 4,258, without it 3,499


@pytest.mark.parametrize(
    ("rationale", "published"),
    [
        ("a+b+c=$5 - <<5=5>>5\nTotal:6", "a + b+c = $ 5 - 5. Total: 6."),
        ("It is 4/2=$<<4/2=2>>2.\nIs it?\n#### 2", "It is 4 / 2 = $ [ 4 / 2 = 2] 2. Is it?. #### 2"),
        ("pull-ups at 12:30 for 97$,", "pull - ups at 12:30 for 97$ ,."),
    ],
)
def test_the_published_formatting_of_the_benchmark(rationale, published):
    assert targets.formatted(rationale) == published


def test_a_difference_that_no_departure_explains_is_noticed():
    for target in ("It is a 5 + 6+7.", "It is 5+6+7.", "It is 5 + 6 + 7"):
        assert not targets.compare("It is 5+6+7", target).is_explained
    assert targets.compare("It is 5+6+7", "It is 5 + 6+7.").departures == []
    assert targets.compare("It is 5+6+7", "It is 5 + 6 + 7.").departures == [targets.EVERY_OPERATOR]


def test_every_question_of_gsm8k_survives_but_one(t5, gsm8k):
    lost = [row["question"] for row in gsm8k if not t5.round_trips(t5.prompt(row["question"]))]
    assert [question[:8] for question in lost] == ["А Senior"]  # a Cyrillic А


fragments = st.sampled_from([*"0159.,:+-*/=()[]<>#$€% \n×½¢^a", "<<3*4=12>>", "<<5=5>>", "<<5=5.0>>", "####"])


@settings(derandomize=True, max_examples=400, deadline=None, database=None)
@given(rationale=st.lists(fragments, max_size=14).map("".join))
def test_formatting_twice_changes_nothing(t5, rationale):
    target = t5.target(rationale)
    assert t5.target(t5.canonical(target)) == target


@pytest.fixture(scope="module", params=["llama2", "llama3", "smollm2", "qwen3"])
def llama(request, shared):
    """A tokenizer of Llama's kind and its template."""
    tokenizer = load_tokenizer(shared / "tokenizers" / request.param)
    return tokenizer, template_for("qwen3" if request.param == "qwen3" else "llama", tokenizer)


def bos_ids(tokenizer):
    """What stands in front of a prompt: SmolLM2 and Qwen have nothing there."""
    return [] if tokenizer.bos_id is None else [tokenizer.bos_id]


def pieces(tokenizer, ids):
    return [tokenizer.token_texts[i] for i in ids]


def test_the_prompt_of_a_llama(llama):
    tokenizer, llama_template = llama
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nTom has {2}\u00a0pens.\nHow many?\n\n### Response:\n"
    )
    question = " Tom has {2}\u00a0pens.  \r\n\n How  many?\n"
    assert llama_template.prompt(question) == prompt.replace("\u00a0", " ")
    ids = llama_template.prompt_ids(question)
    assert ids == [*bos_ids(tokenizer), *tokenizer.encode(prompt.replace("\u00a0", " "))]
    assert ids.count(tokenizer.bos_id) == len(bos_ids(tokenizer)) == (tokenizer.vocab_size in (32_000, 128_256))


@pytest.mark.parametrize(
    ("rationale", "target"),
    [
        ("48/2 = <<48/2=24>>24 clips.\nIn all 72\n#### 72", "48/2 = <<48/2=24>>24 clips.\nIn all 72\n#### 72"),
        ("<<1500*2=3,000.00>>3,000", "<<1500*2=3000>>3,000"),
        ("<<5/10= .5>>.5; <<3-8=-5>>-5", "<<5/10=0.5>>.5; <<3-8=-5>>-5"),
        ("<<2+2=5>> <<3/4=3/4>> <<1/0=0>> <<x=>>", "<<2+2=5>> <<3/4=3/4>> <<1/0=0>> <<x=>>"),
        ("Day:5 costs $110, $<<5=5>>5", "Day:5 costs $110, $<<5=5>>5"),  # as published: GSM8K's own text
        (" two\tspaces  and\u00a0more \r\n\n \n  #### 9\n", "two spaces and more\n#### 9"),
        ("a <b> [c] {d} ½ – é 猫", "a <b> [c] {d} ½ – é 猫"),
        ("", ""),
    ],
)
def test_targets_of_a_llama(llama, rationale, target):
    tokenizer, llama_template = llama
    assert llama_template.target(rationale) == target
    assert llama_template.canonical(target) == target
    assert llama_template.target_ids(rationale)[-1] == tokenizer.eos_id == llama_template.eos_id
    assert llama_template.decode(llama_template.target_ids(rationale)) == target
    assert llama_template.round_trips(target)


def test_ids_are_cut_where_forcing_begins_and_ends(llama):
    tokenizer, llama_template = llama
    five = ["<<", "3", "-", "8", "="], ["-", "5", ">>"]
    assert pieces(tokenizer, llama_template.target_ids("<<3-8=-5>>"))[:-1] == five[0] + five[1]
    assert "=-" in pieces(tokenizer, tokenizer.encode("<<3-8=-5>>", continued=True))  # without the cut
    for following in (".", ").", "\n", "\n\n", "%", ">", " ", "24", "<<3+4=7>>"):
        text = "a (<<(2+10)*2=24>>" + following + "b"
        ids = llama_template.target_ids(text)
        forced = tokenizer.encode("24>>", continued=True)
        standing = next(i for i, piece in enumerate(pieces(tokenizer, ids)) if piece.endswith("=")) + 1
        assert ids[standing : standing + len(forced)] == forced
        assert llama_template.decode(ids) == llama_template.target(text)


def test_forced_ids_are_the_training_ids(llama):
    _, llama_template = llama
    ids = llama_template.target_ids("It is $<<(2+10)*1.5=18>>18-30=<<18-30=-12>>.\n#### <<100*200=20000>>20000")
    calculator, row, n_results = llama_template.new_calculator(), [], 0
    while len(row) < len(ids):
        row.append(ids[len(row)])
        forced = calculator.push(row[-1])
        assert [calculator.push(token_id) for token_id in forced] == [[]] * len(forced)
        row += forced
        n_results += bool(forced)
    assert row == ids
    assert n_results == 3


def test_a_parenthesis_and_the_equals_sign_may_be_one_piece(llama):
    tokenizer, llama_template = llama
    ids = tokenizer.encode("<<(3+4)=", continued=True)
    assert tokenizer.token_texts[ids[-1]] == ")="
    calculator = llama_template.new_calculator()
    assert [calculator.push(i) for i in ids] == [[]] * (len(ids) - 1) + [tokenizer.encode("7>>", continued=True)]


def test_special_ids_are_nothing_to_a_llamas_calculator(llama):
    tokenizer, llama_template = llama
    calculator, result = llama_template.new_calculator(), tokenizer.encode("24>>", continued=True)
    specials = [*bos_ids(tokenizer), tokenizer.eos_id, tokenizer.vocab_size - 1 + 64, -1]
    ids = tokenizer.encode("<<48/2", continued=True)
    for token_id in [id_ for pair in zip(ids, specials * 2, strict=False) for id_ in pair]:
        assert calculator.push(token_id) == []
    (equals,) = tokenizer.encode("=", continued=True)
    assert calculator.push(equals) == result


@pytest.mark.slow
def test_every_rationale_of_gsm8k_through_a_llama(llama, gsm8k):
    """Fixed points; decoded ids are the target; where texts are cut, and which of the cuts change ids.

    Between prompt and completion none does, in any of the vocabularies. After `=` the cut does where a minus or a point
    follows (`=-`, `=.` are pieces), after `>>` never.
    """
    tokenizer, llama_template = llama
    n_changed = 0
    for row in gsm8k:
        target, ids = llama_template.target(row["answer"]), llama_template.target_ids(row["answer"])
        assert llama_template.target(llama_template.canonical(target)) == target
        assert tokenizer.decode(ids) == llama_template.decode(ids) == target
        plain = tokenizer.encode(target, continued=True)
        whole = tokenizer.encode(llama_template.prompt(row["question"]) + target)
        assert [*llama_template.prompt_ids(row["question"]), *plain] == [*bos_ids(tokenizer), *whole]
        n_changed += ids != [*plain, tokenizer.eos_id]
        cut_after_equals = cut_ids(tokenizer, target, r"<<[^<>=]*=")
        assert cut_ids(tokenizer, target, r">>") == plain
        assert [*cut_after_equals, tokenizer.eos_id] == ids
        assert (cut_after_equals != plain) == (re.search(r"<<[^<>=]*=[-.][^<>]*>>", target) is not None)
    assert n_changed == 12


def cut_ids(tokenizer, text, mark):
    """The ids of a text that is tokenised in parts, each of which ends in a match of `mark` but the last."""
    ends = [match.end() for match in re.finditer(mark, text)]
    parts = [text[start:end] for start, end in pairwise([0, *ends, len(text)])]
    return [token_id for part in parts for token_id in tokenizer.encode(part, continued=True)]


@settings(derandomize=True, max_examples=300, deadline=None, database=None)
@given(rationale=st.lists(fragments, max_size=14).map("".join))
def test_llama_targets_are_fixed_points_and_survive(llama, rationale):
    tokenizer, llama_template = llama
    target, ids = llama_template.target(rationale), llama_template.target_ids(rationale)
    assert llama_template.target(llama_template.canonical(target)) == target
    assert tokenizer.decode(ids) == target
    assert ids[-1] == llama_template.eos_id and llama_template.eos_id in llama_template.stop_ids


def test_t5s_vocabulary_is_none_of_a_llamas(shared):
    with pytest.raises(UserError, match=r"spiece\.model: Llama's template needs an end id, <<"):
        LlamaTemplate(load_tokenizer(shared / "tokenizers" / "t5"))


numbers = st.integers(0, 99_999).map(str) | st.integers(0, 99_999).map(
    lambda n: f"{n / 100:.2f}".rstrip("0").rstrip(".")
)
annotations = st.builds("{}{}{}".format, numbers, st.sampled_from("+-*/"), numbers.filter(lambda n: n != "0"))
words = st.sampled_from(["Tom has", "so there are", "apples", "in all", "dollars, or", "(at most)", "that is"])


@st.composite
def rationales(draw):
    """Canonical ones, as T5Template gives them back: one line of prose with annotations, and the answer."""
    parts = [draw(words)]
    for expression in draw(st.lists(annotations, max_size=4)):
        result = evaluate_expression(expression)
        parts += [f"<<{expression}={result}>>{result}", draw(words)]
    return f"{' '.join(parts)}.\n#### {draw(numbers)}"


@settings(derandomize=True, max_examples=400, deadline=None, database=None)
@given(rationale=rationales())
def test_what_is_written_is_read_back(t5, rationale):
    """Through the text, through the ids, and the answer stays."""
    assert t5.canonical(t5.target(rationale)) == rationale
    assert t5.round_trips(t5.target(rationale))
    assert t5.decode(t5.target_ids(rationale)) == rationale
    assert extract_answer(t5.decode(t5.target_ids(rationale))) == extract_answer(rationale)


@settings(derandomize=True, max_examples=400, deadline=None, database=None)
@given(text=st.text(max_size=60))
def test_any_text_can_be_a_question_or_a_rationale(tiny_template, text):
    for ids in (tiny_template.prompt_ids(text), tiny_template.target_ids(text)):
        assert ids[-1] == tiny_template.eos_id
        assert "\n" not in tiny_template.decode(ids).partition("\n#### ")[0]


@pytest.mark.parametrize(
    "piece",
    [
        *(" ", "\n", "#", "[", "]", "<<", "<<1=", "¢[", "¢,", "1+", "( ", "½", "####", "= ", "a\u0301\u0323"),
        *("$", "$ ", "$1", "a:1", "<<1=1>>", "<<1=", "[1", "[1=1"),
    ],
)
@pytest.mark.timeout(120)
def test_a_text_of_the_greatest_length_is_written_at_once(tiny_template, piece):
    text = piece * (MAX_TEXT // len(piece))
    tiny_template.prompt(text)
    tiny_template.canonical(tiny_template.target(text))


def test_families_are_picked_by_model_type(t5):
    assert isinstance(template_for("t5", CHARACTERS), T5Template)
    known = "'t5', 'llama', 'qwen2', 'qwen3', 'mistral'"
    with pytest.raises(UserError, match=f"model_type 'gpt2': only {known} are supported"):
        template_for("gpt2", CHARACTERS)
