"""Run directories in every state are read without an exception, and what is wrong is said."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest
from page.made_runs import edit_config, make_run

from minidpost.errors import UserError
from minidpost.page.runs import LOCKS, Files, find_runs, is_locked, read_run, run_names
from minidpost.selftraining.run_directory import FORMAT, RunDirectory
from minidpost.storage import read_jsonl, write_json, write_jsonl


def read(path):
    return read_run(path, path.name, Files())


def test_a_finished_run_has_no_notes(tmp_path):
    run = read(make_run(tmp_path / "run"))
    assert (run.state, run.notes, len(run.evaluations)) == ("finished", [], 3)
    assert [training.stage for training in run.trainings] == [
        "iteration-0/sft", "iteration-1/dpo", "iteration-1/sft", "iteration-2/dpo", "iteration-2/sft",
    ]  # fmt: skip
    assert run.results is not None and run.results["best_iteration"] == 2


def test_a_stage_that_was_continued_or_lost_its_weights_is_read(tmp_path):
    path = make_run(tmp_path / "run")
    stages = [record for _, record in read_jsonl(path / "stages.jsonl")]
    stages[0] |= {"continued": True, "removed": ["model.safetensors"]}
    write_jsonl(path / "stages.jsonl", stages)
    run = read(path)
    assert run.notes == []
    assert [stage["stage"] for stage in run.stages] == [stage["stage"] for stage in stages]


def test_results_are_those_that_the_run_writes(tmp_path):
    """What is put together from the evaluations is what results.json has; without evaluations it is taken as it is."""
    path = make_run(tmp_path / "run")
    results = read(path).results
    write_json(path / "results.json", results)
    for evaluation in path.glob("*/evaluation.json"):
        evaluation.unlink()
    assert read(path).results == results


def test_a_stopped_run_says_what_was_at_work(tmp_path):
    path = make_run(tmp_path / "run", n_iterations=1)
    edit_config(path, settings={**read(path).settings, "preset": {"iterations": 3}})
    (path / "iteration-2" / "dpo.unfinished").mkdir(parents=True)
    (path / "iteration-2" / "dpo.unfinished" / "log.jsonl").write_text('{"step": 0, "loss": 0.69}\n{"step": 1, "lo')
    (path / "iteration-2" / "dpo.progress").mkdir()
    (path / "iteration-2" / ".pairs.jsonl.123.unfinished").write_text("")
    (path / "log.txt").write_text("10:00:00 iteration-1/sft\n10:00:01 iteration-2/samples-sft.jsonl\n10:00:02 a word\n")
    run = read(path)
    assert run.state in ("stopped", "unfinished")
    assert run.at_work == ["iteration-2/dpo", "iteration-2/pairs.jsonl", "iteration-2/samples-sft.jsonl"]
    assert run.trainings[-1].columns["loss"] == [0.69]  # the line that is being written is no mistake
    assert run.notes == []


def test_a_run_of_fewer_iterations_is_finished_when_it_has_converged(tmp_path):
    path = make_run(tmp_path / "run", n_iterations=1)
    edit_config(path, settings={**read(path).settings, "preset": {"iterations": 3}})
    assert read(path).state != "finished"
    write_json(path / "stopped.json", {"after": 1, "iterations": 3, "patience": 1})
    assert read(path).state == "finished"


@pytest.mark.skipif(not LOCKS.is_file(), reason="the system does not list its locks")
def test_a_running_run_is_known_by_its_lock_which_stays(tmp_path):
    path = make_run(tmp_path / "run")
    lock = path / ".lock"
    lock.touch()
    assert is_locked(lock) is False
    code = (
        "import fcntl, os, sys; f = os.open(sys.argv[1], os.O_RDWR); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print(1, flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout.readline() == b"1\n"
        assert read(path).state == "running"
        handle = os.open(lock, os.O_RDWR)
        with pytest.raises(OSError):  # still the other process's
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)
        process.stdin.close()
        process.wait()
    assert read(path).state == "finished"


def test_reading_takes_no_lock_and_writes_nothing(tmp_path):
    path = make_run(tmp_path / "run")
    before = {file: file.stat().st_mtime_ns for file in path.rglob("*")}
    read(path)
    assert {file: file.stat().st_mtime_ns for file in path.rglob("*")} == before
    RunDirectory(tmp_path / "other", {})  # and one that is locked by this very process stays so
    read(tmp_path / "other")


def test_an_older_format_is_shown_and_said(tmp_path):
    path = make_run(tmp_path / "run")
    edit_config(path, format=FORMAT - 1)
    run = read(path)
    assert run.results is not None
    assert run.notes == [f"of format {FORMAT - 1}; this code writes {FORMAT}. Shown as far as it can be read"]


GARBAGE = [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe", b'{"a": NaN}', b"[" * 100_000, b"\0" * 100, b"1e999"]
FILES = [
    "config.json",
    "stages.jsonl",
    "iteration-0/evaluation.json",
    "iteration-1/evaluation.json",
    "iteration-1/dpo/log.jsonl",
    "iteration-0/sft/log.jsonl",
]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("garbage", GARBAGE, ids=range(len(GARBAGE)))
def test_garbage_in_a_file_is_no_exception(tmp_path, name, garbage):
    path = make_run(tmp_path / "run")
    (path / name).write_bytes(garbage)
    run = read(path)
    assert run.name == "run"
    is_empty_jsonl = name.endswith(".jsonl") and not garbage
    nan_is_a_value = name.endswith(".jsonl") and garbage.startswith(b'{"a"') and name != "stages.jsonl"
    if not is_empty_jsonl and not nan_is_a_value:
        assert run.notes


def evaluation_of(**score):
    """An evaluation whose only score is a good one but for these fields."""
    good = {"value": 1, "n": 1, "low": 0, "high": 1, "correct": [1]}
    return {"sft": {"greedy": {"mine/dev": {**good, **score}}, "sampled": None}}


@pytest.mark.parametrize(
    "change",
    [
        {"sft": None},
        {"sft": {"greedy": {}, "sampled": None}},
        evaluation_of(value="1"),
        evaluation_of(value=1e400),
        evaluation_of(correct=["<b>"]),
        evaluation_of(correct=[2]),
        evaluation_of(n=-1),
    ],
)
def test_an_evaluation_of_another_shape_is_noted(tmp_path, change):
    path = make_run(tmp_path / "run")
    write_json(path / "iteration-1" / "evaluation.json", change)
    run = read(path)
    assert run.notes and (run.results is None or len(run.results["iterations"]) == 1)


def test_a_loss_that_became_nan_is_a_gap(tmp_path):
    path = make_run(tmp_path / "run")
    (path / "iteration-0" / "sft" / "log.jsonl").write_text('{"step": 0, "loss": NaN}\n{"step": 1, "loss": Infinity}\n')
    assert read(path).trainings[0].columns["loss"] == [None, None]


def test_foreign_directories_are_said(tmp_path):
    (tmp_path / "model").mkdir()
    write_json(tmp_path / "model" / "config.json", {"model_type": "t5"})
    for path in (tmp_path / "model", tmp_path, tmp_path / "absent"):
        assert read(path).notes and read(path).results is None
    (tmp_path / "model" / "log.txt").write_text("")
    assert "settings" in read(tmp_path / "model").notes[0]


def test_runs_are_found_inside_directories_and_named_apart(tmp_path):
    first = make_run(tmp_path / "a" / "run")
    second = make_run(tmp_path / "b" / "run")
    third = make_run(tmp_path / "b" / "other")
    assert find_runs([tmp_path / "b", first]) == [third, second, first]
    assert run_names([third, second, first]) == ["other", str(second), str(first)]
    with pytest.raises(UserError, match="no such directory"):
        find_runs([tmp_path / "c"])


def test_an_unchanged_file_is_read_once(tmp_path):
    calls = []

    def parse(path: Path) -> int:
        calls.append(path)
        return len(calls)

    files, path = Files(), tmp_path / "file"
    path.write_text("a")
    assert [files.read(path, parse) for _ in range(3)] == [1, 1, 1]
    path.write_text("ab")
    assert files.read(path, parse) == 2
