"""Samples, pairs and labels as the page has them: steps, forced results, departures, blocks that come back whole."""

import base64
import gzip
import json
import os
from collections import Counter

import pytest
from page.made_runs import make_run, question_text, sample_record

from minidpost.page import questions as q
from minidpost.page.questions import Question, evaluation_sets, how_forced, read_questions, steps_of
from minidpost.page.runs import Files, attach_measured, read_run
from minidpost.storage import read_jsonl, write_jsonl

RIGHT = "Mia has <<48/2=24>>24 pens, then <<24+48=72>>72.\n#### 72"


def unpacked(text):
    return json.loads(gzip.decompress(base64.b64decode(text)))


def kinds(rationale):
    return [step.kind for step in steps_of(rationale)]


@pytest.mark.parametrize(
    "rationale, expected",
    [
        (RIGHT, [q.OK, q.OK]),
        ("<<2+2=5>>5", [q.WRONG]),
        ("<<2+2=4>>5 pens", [q.COPIED]),
        ("<<2+2=4>> and 5 more", [q.OK]),
        ("$<<1500*2=3,000>>3,000", [q.OK]),
        ("<<2+=4>>4", [q.WRONG]),
        ("<<7>>7", [q.WRONG]),
        ("no step at all", []),
    ],
)
def test_steps_are_judged_by_their_own_numbers(rationale, expected):
    assert kinds(rationale) == expected


def test_a_wrong_step_names_the_right_result():
    (step,) = steps_of("x <<2+2=5>>5")
    assert step.value == "4"
    assert "x <<2+2=5>>5"[step.start : step.end] == "<<2+2=5>>"
    assert "x <<2+2=5>>5"[step.result_start : step.end] == "5>>"


def test_forced_results_are_all_none_or_some():
    steps = steps_of(RIGHT)
    assert how_forced([False, True, True, False, True, False], steps, False) == q.ALL_FORCED
    assert how_forced([False] * 6, steps, False) == q.NONE_FORCED
    assert how_forced([False, True, True, False, False], steps, False) == q.SOME_FORCED
    # The third forced result of a completion that was cut has no closing mark, and so is no step.
    three = [True, False, True, False, True]
    assert how_forced(three, steps, True) == q.ALL_FORCED
    assert how_forced(three, steps, False) == q.SOME_FORCED


def test_the_first_result_that_no_right_rationale_has_is_marked():
    question = Question("?", "72")
    question.rounds[0] = {
        (question.place(RIGHT), q.CORRECT, q.ALL_FORCED): [0],
        (question.place("<<48/2=24>>24 then <<48-2=46>>46 and <<46+1=47>>47\n#### 47"), q.INCORRECT, q.ALL_FORCED): [1],
    }
    texts = question.block_entry()["texts"]
    assert [step[3] for step in texts[0][1]] == [q.OK, q.OK]
    assert [step[3] for step in texts[1][1]] == [q.OK, q.DEPARTS, q.OK]


def test_without_a_right_rationale_nothing_is_marked_as_departing():
    question = Question("?", "72")
    question.rounds[0] = {(question.place("<<1+1=2>>2"), q.INCORRECT, q.ALL_FORCED): [0]}
    assert question.block_entry()["texts"][0][1][0][3] == q.OK


def test_blocks_and_index_hold_exactly_the_files(tmp_path):
    path = make_run(tmp_path / "run", n_questions=120, n_dpo=5, n_sft=3)
    run = read_run(path, "run", Files())
    read = read_questions(run)
    index = read.index()
    entries = [entry for block in read.blocks() for entry in unpacked(block)]
    assert read.n_blocks == 3 and len(entries) == 120 == len(index["questions"])
    assert [about["stage"] for about in index["rounds"]] == [
        f"iteration-{i}/samples-{kind}.jsonl" for i in (1, 2) for kind in ("dpo", "sft")
    ]
    for number, about in enumerate(index["rounds"]):
        records = [record for _, record in read_jsonl(path / about["stage"])]
        assert sum(about["samples"]) == len(records)
        assert sum(about["correct"]) == sum(record["is_correct"] for record in records)
        assert sum(about["no_answer"]) == sum("####" not in record["completion"] for record in records)
        rebuilt = Counter()
        for question, entry in enumerate(entries):
            for place, grade, _, samples in entry["rounds"][str(number)]:
                for sample in samples:
                    rebuilt[question, sample, entry["texts"][place][0], grade == q.CORRECT] += 1
        assert rebuilt == Counter(
            (record["example_index"], record["sample_index"], record["completion"], record["is_correct"])
            for record in records
        )
    for place, iteration in enumerate(index["iterations"]):
        folder = path / f"iteration-{iteration}"
        pairs = [record for _, record in read_jsonl(folder / "pairs.jsonl")]
        labels = [record for _, record in read_jsonl(folder / "pseudo-labels.jsonl")]
        assert sum(index["pairs"][place]) == len(pairs)
        assert sum(index["labels"][place]) == sum(label["source"] == "sample" for label in labels)
        of_pairs = [
            (index["questions"][number], entry["texts"][chosen][0], entry["texts"][rejected][0], similarity)
            for number, entry in enumerate(entries)
            for i, chosen, rejected, similarity in entry["pairs"]
            if i == iteration
        ]
        assert of_pairs == [(p["question"], p["chosen"], p["rejected"], p["similarity"]) for p in pairs]
    gold = {record["question"]: record["rationale"] for record in labels if record["source"] == "gold"}
    assert gold == {
        index["questions"][n]: entry["texts"][entry["gold"]][0]
        for n, entry in enumerate(entries)
        if entry["gold"] is not None
    }
    assert run.notes == []


def test_samples_that_are_being_written_are_shown(tmp_path):
    path = make_run(tmp_path / "run", n_iterations=1)
    progress = path / "iteration-2" / "samples-dpo.jsonl.progress"
    write_jsonl(progress / "aa-000000.jsonl", [sample_record(3, 0, "right"), sample_record(1, 2, "wrong")])
    write_jsonl(progress / "aa-000001.jsonl", [sample_record(3, 1, "none")])
    about = read_questions(read_run(path, "run", Files())).index()["rounds"][-1]
    assert about["is_finished"] is False and "being sampled" in about["name"]
    assert about["samples"][:5] == [0, 1, 0, 2, 0]
    assert about["correct"][:5] == [0, 0, 0, 1, 0]
    # What another sampling left there, before settings were changed, is not counted too.
    write_jsonl(progress / "00-000000.jsonl", [sample_record(3, 0, "right")])
    os.utime(progress / "00-000000.jsonl", (1, 1))
    assert read_questions(read_run(path, "run", Files())).index()["rounds"][-1] == about


@pytest.mark.parametrize(
    "damage",
    [
        {"example_index": -1},
        {"example_index": "0"},
        {"completion": None},
        {"forced": "yes"},
        {"forced": [2**70]},
        {"question": ["?"]},
    ],
)
def test_a_broken_sample_is_noted_and_what_was_before_stays(tmp_path, damage):
    path = make_run(tmp_path / "run", n_iterations=1)
    file = path / "iteration-1" / "samples-sft.jsonl"
    write_jsonl(file, [sample_record(100, 0, "right"), {**sample_record(101, 1, "right"), **damage}])
    run = read_run(path, "run", Files())
    read = read_questions(run)
    assert any(note.startswith("iteration-1/samples-sft.jsonl, line 2:") for note in run.notes)
    assert question_text(100) in read.index()["questions"]


def test_huge_indices_need_no_memory(tmp_path):
    path = make_run(tmp_path / "run", n_iterations=1)
    write_jsonl(path / "iteration-1" / "samples-sft.jsonl", [sample_record(10**12, 10**12, "right")])
    read = read_questions(read_run(path, "run", Files()))
    assert len(read.questions) == 13


def test_evaluations_have_every_models_outcomes(tmp_path):
    path = make_run(tmp_path / "run")
    run = read_run(path, "run", Files())
    sets = {entry["name"]: entry for entry in evaluation_sets(run, tmp_path)}
    assert [model["name"] for model in sets["mine/dev"]["models"]] == ["0/sft", "1/dpo", "1/sft", "2/dpo", "2/sft"]
    assert sets["mine/test"]["questions"] is None  # a user's own data
    for iteration in range(3):
        stored = json.loads((path / f"iteration-{iteration}" / "evaluation.json").read_text())["sft"]
        found = {model["name"]: model for model in sets["mine/dev"]["models"]}[f"{iteration}/sft"]
        assert found["correct"] == stored["greedy"]["mine/dev"]["correct"]
        assert found["n_correct"] == stored["sampled"]["n_correct"]


def test_a_users_file_that_is_called_like_a_dataset_gets_no_questions(tmp_path):
    run = read_run(make_run(tmp_path / "run", data="toy.jsonl", sets={"toy/dev": 5, "toy/test": 5}), "run", Files())
    assert {entry["questions"] for entry in evaluation_sets(run, tmp_path)} == {None}


def test_toy_questions_are_shown_only_for_the_toy_world_of_this_code(tmp_path):
    run = read_run(make_run(tmp_path / "run", data="toy", sets={"toy/dev": 5, "toy/test": 5}), "run", Files())
    assert {entry["questions"] for entry in evaluation_sets(run, tmp_path)} == {None}  # its pool is another


def completion_record(task, index, calculator=True, kind="greedy", **changes):
    """A line as `eval.py --save-completions` writes it."""
    sample = sample_record(index, 0, "right" if calculator else "wrong", **changes)
    return {"task": task, "calculator": calculator, "kind": kind, **sample}


def test_greedy_answers_come_from_files_of_eval(tmp_path):
    path = make_run(tmp_path / "run", sets={"mine/dev": 4, "mine/test": 6})
    score = {"value": 1.0, "n": 4, "low": 0.0, "high": 1.0}
    result = {"task": "mine/dev", "calculator": True, "accuracy": score}
    scores = {"checkpoint": str(path / "iteration-1" / "sft"), "results": [result]}
    (tmp_path / "scores.json").write_text(json.dumps(scores))
    records = [completion_record("mine/dev", index, calculator) for index in range(4) for calculator in (False, True)]
    records += [completion_record("other/test", index) for index in range(3)]
    records += [completion_record("mine/test", index) for index in range(5)]  # not the six of the run's evaluation
    records += [completion_record("mine/dev", 0, kind="sampled", completion="sampled")]
    write_jsonl(tmp_path / "scores.jsonl", records)
    files = Files()
    run = read_run(path, "run", files)
    attach_measured([run], [tmp_path / "scores.json"], files)
    sets = {entry["name"]: entry for entry in evaluation_sets(run, tmp_path)}
    (model,) = [model for model in sets["mine/dev"]["models"] if "completions" in model]
    assert model["name"] == "1/sft"
    assert [text for text, _ in model["completions"]] == [
        completion_record("mine/dev", index)["completion"] for index in range(4)
    ]
    assert sets["mine/dev"]["questions"] == [question_text(index) for index in range(4)]
    assert not any("completions" in model for model in sets["mine/test"]["models"])
    assert sets["other/test"]["n"] == 3 and sets["other/test"]["models"][0]["correct"] == [1, 1, 1]
    (tmp_path / "scores.jsonl").write_text('{"kind": "greedy"}\n')
    assert evaluation_sets(run, tmp_path) and "save-completions" in run.notes[0]
