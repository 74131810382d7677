"""The page's own script, run by node where there is one: what its filters choose is what the files hold."""

import json
import shutil
import subprocess

import pytest
from page.made_runs import make_run

from minidpost.page.document import SCRIPTS, questions_data, resource
from minidpost.page.questions import read_questions
from minidpost.page.runs import Files, read_run
from minidpost.storage import read_jsonl

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")


def node(expression, **values):
    """The value of a JavaScript expression, with the page's script and some values at hand."""
    script = "".join(resource(name) for name in SCRIPTS)
    given = "".join(f"const {name} = {json.dumps(value)};\n" for name, value in values.items())
    source = f"{script}\n{given}\nconsole.log(JSON.stringify({expression}));"
    done = subprocess.run([NODE, "-"], input=source, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = make_run(tmp_path_factory.mktemp("runs") / "run", n_questions=80, n_dpo=5, n_sft=3)
    files = read_run(path, "run", Files())
    return path, questions_data(files, read_questions(files), path)


def by_question(path, stages):
    """The records of some rounds by question."""
    found = {}
    for stage in stages:
        for _, record in read_jsonl(path / stage):
            found.setdefault(record["example_index"], []).append(record)
    return found


ALL_ROUNDS = [f"iteration-{i}/samples-{kind}.jsonl" for i in (1, 2) for kind in ("dpo", "sft")]


def fraction(records):
    return sum(record["is_correct"] for record in records) / len(records)


@pytest.mark.parametrize("round_index", [-1, 0, 3])
@pytest.mark.parametrize(
    "name", ["all", "right", "mixed", "wrong", "changed", "rose", "fell", "no_answer", "pairs", "labels"]
)
def test_filters_choose_what_the_files_hold(run, name, round_index):
    path, index = run
    records = by_question(path, ALL_ROUNDS if round_index < 0 else [ALL_ROUNDS[round_index]])
    first = {question: fraction(of) for question, of in by_question(path, ALL_ROUNDS[:1]).items()}
    last = {question: fraction(of) for question, of in by_question(path, ALL_ROUNDS[-1:]).items()}
    in_file = {
        kind: {
            record["question"]
            for i in (1, 2)
            for _, record in read_jsonl(path / f"iteration-{i}" / file)
            if record.get("source") != "gold"
        }
        for kind, file in (("pairs", "pairs.jsonl"), ("labels", "pseudo-labels.jsonl"))
    }
    rules = {
        "all": lambda q, of: True,
        "right": lambda q, of: fraction(of) == 1,
        "mixed": lambda q, of: 0 < fraction(of) < 1,
        "wrong": lambda q, of: fraction(of) == 0,
        "changed": lambda q, of: first[q] != last[q],
        "rose": lambda q, of: first[q] < last[q],
        "fell": lambda q, of: first[q] > last[q],
        "no_answer": lambda q, of: any("####" not in record["completion"] for record in of),
        "pairs": lambda q, of: of[0]["question"] in in_file["pairs"],
        "labels": lambda q, of: of[0]["question"] in in_file["labels"],
    }
    choice = {"set": -1, "filter": name, "round": round_index, "sort": "number", "search": ""}
    expected = [question for question, of in sorted(records.items()) if rules[name](question, of)]
    assert node("chosenQuestions(index, choice)", index=index, choice=choice) == expected


def test_search_and_sort(run):
    path, index = run
    choice = {"set": -1, "filter": "all", "round": -1, "sort": "rarest", "search": "HAS 1"}
    found = node("chosenQuestions(index, choice)", index=index, choice=choice)
    records = by_question(path, ALL_ROUNDS)
    expected = [q for q, of in records.items() if "has 1" in of[0]["question"].lower()]
    assert found == sorted(expected, key=lambda question: (fraction(records[question]), question))


def test_evaluated_questions_that_changed(run):
    _, index = run
    (place,) = [place for place, entry in enumerate(index["sets"]) if entry["name"] == "mine/test"]
    models = [model["correct"] for model in index["sets"][place]["models"] if model["name"].endswith("/sft")]
    choice = {"set": place, "filter": "gained", "round": -1, "sort": "number", "search": ""}
    expected = [question for question in range(30) if models[0][question] < models[-1][question]]
    assert expected and node("chosenQuestions(index, choice)", index=index, choice=choice) == expected


def test_unseen_characters_are_named():
    text = "a\u202eb\x1b[0m\n\tc\u200b\U0001f600\ud7ff"
    assert node("visible(text)", text=text) == "aU+202EbU+001B[0m\n\tcU+200B\U0001f600\ud7ff"


def test_differences_leave_both_texts_whole():
    left, right = "Mia has <<1+2=3>>3 pens.\n#### 3", "Mia has <<1+4=5>>5 red pens.\n#### 5"
    pieces = node("differences(left, right)", left=left, right=right)
    assert ["".join(text for text, _ in side) for side in pieces] == [left, right]
    own = ["".join(text for text, is_own in side if is_own) for side in pieces]
    assert own[0].replace(" ", "") == "2333" and own[1].replace(" ", "") == "455red5"


def test_numbers_are_short():
    numbers = [0, 5e-5, 0.00105, 1.5, 12345, 944115926400, -0.25]
    expected = ["0", "5e−5", "0.00105", "1.5", "12,345", "9.44e11", "−0.25"]
    assert node("numbers.map(short)", numbers=numbers) == expected


@pytest.mark.parametrize(
    "low, high, axis",
    [
        (0, 1, {}),
        (0.1, 13.2, {"is_log": True}),
        (0, 3, {"is_whole": True}),
        (1e11, 1e13, {"is_log": True}),
        (-68, -9, {}),
    ],
)
def test_ticks_are_few_and_inside(low, high, axis):
    ticks = node("ticksOf(low, high, axis, 6)", low=low, high=high, axis=axis)
    assert 2 <= len(ticks) <= 8
    assert all(low * (0.998 if low > 0 else 1.002) <= tick <= high * (1.002 if high > 0 else 0.998) for tick in ticks)
    assert ticks == sorted(set(ticks))
