"""A run's directory: who may continue it, and that a stage is whole or absent."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minidpost.errors import UserError
from minidpost.selftraining import run_directory
from minidpost.selftraining.run_directory import (
    FORMAT,
    PlannedStage,
    RunDirectory,
    duration,
    finished_names,
    seconds_left,
)

ROOT = Path(__file__).resolve().parents[2]

SETTINGS = {"model": "tiny-t5", "seed": 42, "limit": None, "preset": {"samples": 3, "beta": 0.1}}


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def write_number(path: Path) -> dict:
    path.write_text("7")
    return {"n": 7}


def do_stage(directory: RunDirectory, name: str, work: Callable[[Path], dict]) -> Path:
    """Finish a stage as the steps of self-training do: `work` writes its path and returns metadata."""
    if not directory.is_finished(name):
        with directory.stage(name) as stage:
            stage.metadata.update(work(stage.path))
    return directory.path / name


def test_config_has_settings_and_versions(tmp_path):
    RunDirectory(tmp_path / "run", SETTINGS | {"data": Path("my.jsonl")})
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"] == SETTINGS | {"data": "my.jsonl"}
    assert config["format"] == FORMAT
    assert config["versions"].keys() == {"minidpost", "python", "torch"}
    assert config["threads"] == torch.get_num_threads()


def test_an_empty_directory_becomes_a_run(tmp_path):
    RunDirectory(tmp_path, SETTINGS)
    assert (tmp_path / "config.json").is_file()


def test_same_settings_continue_a_run(tmp_path):
    RunDirectory(tmp_path / "run", SETTINGS)
    before = files_of(tmp_path)
    RunDirectory(tmp_path / "run", SETTINGS)
    assert files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"seed": 7}, "seed = 42, this command has 7"),
        ({"limit": 64}, "limit = None, this command has 64"),
        ({"preset": {"samples": 10, "beta": 0.1}}, "preset.samples = 3, this command has 10"),
        ({"new": True}, "new = None, this command has True"),
    ],
)
def test_other_settings_are_refused_by_name(tmp_path, change, complaint):
    RunDirectory(tmp_path / "run", SETTINGS)
    before = files_of(tmp_path)
    with pytest.raises(UserError) as error:
        RunDirectory(tmp_path / "run", SETTINGS | change)
    assert complaint in str(error.value)
    assert str(tmp_path / "run") in str(error.value)
    assert "--run-dir" in str(error.value)
    assert "\n" not in str(error.value)
    assert files_of(tmp_path) == before


def test_another_kind_of_device_is_logged_and_written(tmp_path, capsys):
    def config() -> dict:
        return json.loads((tmp_path / "config.json").read_text())

    RunDirectory(tmp_path, SETTINGS)
    assert config()["device"] == "cpu"
    RunDirectory(tmp_path, SETTINGS, device="cpu:0")
    assert "which was" not in capsys.readouterr().out
    for _ in range(2):
        RunDirectory(tmp_path, SETTINGS, device="cuda:1")
    assert capsys.readouterr().out.count("continued on cuda, which was cpu: rounding and dropout may differ") == 1
    assert config()["device"] == "cuda"
    content = config()
    del content["device"]  # as earlier versions wrote it
    (tmp_path / "config.json").write_text(json.dumps(content))
    RunDirectory(tmp_path, SETTINGS)
    assert "which was" not in capsys.readouterr().out


def test_settings_that_may_change_are_logged_and_written(tmp_path, capsys):
    may_change = ["preset.slots"]
    RunDirectory(tmp_path, {"seed": 1, "preset": {"slots": 64, "beta": 0.1}}, may_change=may_change)
    RunDirectory(tmp_path, {"seed": 1, "preset": {"slots": 8, "beta": 0.1}}, may_change=may_change)
    assert "continued with preset.slots = 8, which was 64" in capsys.readouterr().out
    assert "preset.slots = 8" in (tmp_path / "log.txt").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["settings"]["preset"]["slots"] == 8
    before = (tmp_path / "config.json").read_bytes()
    for changed in ({"slots": 4, "beta": 0.2}, {"slots": 4}):  # with another difference nothing is written
        with pytest.raises(UserError, match=r"preset\.beta = 0\.1"):
            RunDirectory(tmp_path, {"seed": 1, "preset": changed}, may_change=may_change)
    assert (tmp_path / "config.json").read_bytes() == before
    RunDirectory(tmp_path, {"seed": 1, "preset": {"slots": 8, "beta": 0.1}}, may_change=may_change)
    assert "continued" not in capsys.readouterr().out


def test_other_directories_are_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="is no run directory; choose another --run-dir"):
            RunDirectory(path, SETTINGS)
    assert files_of(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"settings": []}', '{"settings": 1}', "\udcff", "[" * 10**5])
def test_an_unreadable_config_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    (tmp_path / "log.txt").write_text("a run was here")
    with pytest.raises(UserError, match=r"config\.json is not readable"):
        RunDirectory(tmp_path, SETTINGS)


@pytest.mark.parametrize("fresh", [False, True])
def test_a_model_directory_is_no_run(tmp_path, tiny_model_dir, fresh):
    before = files_of(tiny_model_dir)
    with pytest.raises(UserError, match="is no run directory"):
        RunDirectory(tiny_model_dir, SETTINGS, fresh)
    assert files_of(tiny_model_dir) == before


@pytest.mark.parametrize("name", ["iteration-1/pairs.jsonl", "iteration-1/sft"])
def test_a_stage_is_done_once(tmp_path, name):
    def work(path: Path) -> dict:
        calls.append(path)
        return write_number(path if name.endswith(".jsonl") else path / "weights")

    calls, directory = [], RunDirectory(tmp_path, SETTINGS)
    final = do_stage(directory, name, work)
    assert final == tmp_path / name
    assert (final if final.is_file() else final / "weights").read_text() == "7"
    assert directory.stages[name]["n"] == 7
    assert directory.stages[name]["seconds"] >= 0
    assert calls[0] != final
    assert not calls[0].exists()

    continued = RunDirectory(tmp_path, SETTINGS)
    assert do_stage(continued, name, work) == final
    assert len(calls) == 1
    assert continued.stages == directory.stages


def test_a_removed_stage_is_done_again(tmp_path):
    do_stage(RunDirectory(tmp_path, SETTINGS), "a.json", write_number)
    (tmp_path / "a.json").unlink()
    do_stage(RunDirectory(tmp_path, SETTINGS), "a.json", lambda path: write_number(path) | {"n": 8})
    assert RunDirectory(tmp_path, SETTINGS).stages["a.json"]["n"] == 8


@pytest.mark.parametrize("name", ["a.json", "a"])
@pytest.mark.parametrize("end", [UserError, KeyboardInterrupt])
def test_a_failed_stage_has_neither_name_nor_metadata(tmp_path, name, end):
    def work(path: Path) -> dict:
        write_number(path if name == "a.json" else path / "weights")
        raise end("half-way")

    directory = RunDirectory(tmp_path, SETTINGS)
    with pytest.raises(end):
        do_stage(directory, name, work)
    assert not (tmp_path / name).exists()
    assert RunDirectory(tmp_path, SETTINGS).stages == directory.stages == {}
    if name == "a":  # the next attempt begins with an empty directory
        (tmp_path / "a.unfinished").mkdir()
        (tmp_path / "a.unfinished" / "older").write_text("")
        do_stage(directory, "a", lambda path: write_number(path / "weights"))
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["weights"]


def test_log_writes_to_terminal_and_file(tmp_path, capsys):
    directory = RunDirectory(tmp_path, SETTINGS)
    directory.log("first")
    directory.log("second")
    assert capsys.readouterr().out == (tmp_path / "log.txt").read_text()
    assert [line.split(" ", 1)[1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["first", "second"]


# -- what a kill leaves, and what others do to a run's files -----------------------------------------------------------


@pytest.fixture
def other_process():
    """Starts a process that opens a run directory and stays at work on it."""
    started = []

    def begin(path: Path) -> subprocess.Popen:
        opened = f"RunDirectory({str(path)!r}, {SETTINGS!r})"
        code = f"from minidpost.selftraining.run_directory import *; {opened}; print(1, flush=True); input()"
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        started.append(subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes))
        assert started[-1].stdout.readline() == b"1\n"
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("fresh", [False, True])
def test_a_run_has_one_process(tmp_path, other_process, fresh):
    process = other_process(tmp_path / "run")
    before = files_of(tmp_path)
    for _ in range(2):
        with pytest.raises(UserError, match="run: another process is at work here"):
            RunDirectory(tmp_path / "run", SETTINGS, fresh)
    assert files_of(tmp_path) == before
    process.kill()
    process.wait()
    RunDirectory(tmp_path / "run", SETTINGS, fresh)


@pytest.mark.parametrize("found", [1, 2, 4, 6, "5"])
def test_another_format_is_refused(tmp_path, found):
    RunDirectory(tmp_path, SETTINGS)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"format": found} if found != 1 else {}
    if found == 1:  # before formats had numbers
        del config["format"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"run directory of format {found}, this code writes format {FORMAT}"):
        RunDirectory(tmp_path, SETTINGS)


def test_another_torch_is_logged(tmp_path, monkeypatch, capsys):
    RunDirectory(tmp_path, SETTINGS)
    RunDirectory(tmp_path, SETTINGS)
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(run_directory, "version", lambda name: "9.9")
    RunDirectory(tmp_path, SETTINGS)
    assert "continued with 9.9: rounding may differ" in capsys.readouterr().out


def test_another_number_of_threads_is_logged(tmp_path, monkeypatch, capsys):
    RunDirectory(tmp_path, SETTINGS)
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    RunDirectory(tmp_path, SETTINGS)
    expected = f"begun with {threads} threads, continued with {threads + 1}: rounding may differ"
    assert expected in capsys.readouterr().out


def finished_run(path: Path) -> RunDirectory:
    directory = RunDirectory(path, SETTINGS)
    do_stage(directory, "iteration-1/pairs.jsonl", write_number)
    do_stage(
        directory, "iteration-1/dpo", lambda stage: write_number(stage / "weights") | write_number(stage / "config")
    )
    return directory


@pytest.mark.parametrize("name", ["iteration-1/pairs.jsonl", "iteration-1/dpo/weights", "iteration-1/dpo/config"])
def test_changed_and_missing_files_are_named(tmp_path, name):
    finished_run(tmp_path)
    (tmp_path / name).write_text("8")
    with pytest.raises(UserError, match=f"{name} was changed since its stage was finished"):
        RunDirectory(tmp_path, SETTINGS)
    if "dpo" in name:
        (tmp_path / name).unlink()
        with pytest.raises(UserError, match=f"{name} is missing"):
            RunDirectory(tmp_path, SETTINGS)
    (tmp_path / name).write_text("7")
    assert len(RunDirectory(tmp_path, SETTINGS).stages) == 2


def test_a_file_that_no_stage_wrote_is_refused(tmp_path):
    directory = finished_run(tmp_path)
    (tmp_path / "iteration-1/labels.jsonl").write_text("mine")
    with pytest.raises(UserError, match=r"labels\.jsonl is there, but stages\.jsonl does not know of it"):
        do_stage(directory, "iteration-1/labels.jsonl", write_number)
    assert (tmp_path / "iteration-1/labels.jsonl").read_text() == "mine"


@pytest.mark.parametrize("row", [{}, {"stage": "config.json"}, {"stage": 1}, {"stage": "x" * 9999}])
@pytest.mark.parametrize("sha256", [{}, {"sha256": 1}, {"sha256": ["."]}])
def test_an_edited_stages_file_is_refused(tmp_path, row, sha256):
    finished_run(tmp_path)
    with open(tmp_path / "stages.jsonl", "a") as stream:
        stream.write(json.dumps(row | sha256) + "\n")
    with pytest.raises(UserError, match=r"stages\.jsonl was changed since it was written"):
        RunDirectory(tmp_path, SETTINGS)


@pytest.mark.parametrize("name", ["iteration-1/labels.jsonl", "iteration-1/sft"])
def test_a_kill_between_metadata_and_renaming(tmp_path, monkeypatch, name):
    """… leaves metadata without a stage; the same command does the stage again."""

    class Killed(BaseException):
        pass

    def work(path: Path) -> dict:
        (path if "labels" in name else path / "weights").write_text("7")
        return {"n": 7}

    directory, replace = finished_run(tmp_path), os.replace

    def killed(source: Path, target: Path) -> None:
        if target == tmp_path / name:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(Killed):
            do_stage(directory, name, work)
    assert name in (tmp_path / "stages.jsonl").read_text()
    assert not (tmp_path / name).exists()
    again = RunDirectory(tmp_path, SETTINGS)
    assert name not in again.stages
    do_stage(again, name, work)
    assert [*RunDirectory(tmp_path, SETTINGS).stages] == ["iteration-1/pairs.jsonl", "iteration-1/dpo", name]


def test_leftovers_of_killed_processes_are_removed(tmp_path):
    directory = finished_run(tmp_path)
    before = files_of(tmp_path)
    (tmp_path / "iteration-1/sft.unfinished").mkdir()
    for name in (".config.json.7.unfinished", "iteration-1/.a.jsonl.99.unfinished", "iteration-1/sft.unfinished/x"):
        (tmp_path / name).write_text("half")
    directory.progress("iteration-1/dpo").mkdir()
    (directory.progress("iteration-1/dpo") / "state.safetensors").write_text("of a finished stage")
    RunDirectory(tmp_path, SETTINGS)
    assert files_of(tmp_path) == before
    directory.progress("iteration-1/sft").mkdir()
    RunDirectory(tmp_path, SETTINGS)
    assert directory.progress("iteration-1/sft").is_dir()  # a stage in progress goes on from this
    do_stage(directory, "iteration-1/sft", lambda path: {})
    assert not directory.progress("iteration-1/sft").exists()


def test_a_kill_before_there_is_a_config(tmp_path):
    (tmp_path / ".lock").write_text("")
    (tmp_path / ".config.json.7.unfinished").write_text("{")
    RunDirectory(tmp_path, SETTINGS)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "config.json"}


def test_fresh_renames_a_run_and_deletes_nothing(tmp_path):
    RunDirectory(tmp_path / "run", SETTINGS, fresh=True)
    for index, seed in ((1, 7), (2, 8)):
        finished_run_files = files_of(tmp_path / "run")
        directory = RunDirectory(tmp_path / "run", SETTINGS | {"seed": seed}, fresh=True)
        assert files_of(tmp_path / f"run.{index}") == finished_run_files
        assert directory.stages == {}
        do_stage(directory, "a.json", write_number)
    assert {path.name for path in tmp_path.iterdir()} == {"run", "run.1", "run.2"}
    assert "is now" in (tmp_path / "run/log.txt").read_text()
    with pytest.raises(UserError, match="is no run directory"):
        RunDirectory(tmp_path, SETTINGS, fresh=True)


def test_a_directory_that_cannot_be_locked(tmp_path, monkeypatch):
    def refuse(handle: int, how: int) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(run_directory.fcntl, "lockf", refuse)
    with pytest.raises(UserError, match="cannot be locked"):
        RunDirectory(tmp_path / "run", SETTINGS)


def test_a_run_says_where_it_stands(tmp_path):
    """Stages take as long as the latest of their kind did, in proportion to their operations."""
    directory = RunDirectory(tmp_path / "run", SETTINGS)
    names = ["iteration-0/sft", "iteration-1/pairs.jsonl", "iteration-1/sft", "iteration-2/pairs.jsonl"]
    directory.planned = {
        "iteration-0/sft": PlannedStage("training", 3e12),
        "iteration-1/pairs.jsonl": PlannedStage(),
        "iteration-1/sft": PlannedStage("training", 3e12),
        "iteration-2/pairs.jsonl": PlannedStage(),
        "iteration-2/sft": PlannedStage("training", 4e12),
    }
    for name, seconds in zip(names, [60.0, 2.0, 300.0, 4.0], strict=True):
        do_stage(directory, name, lambda path: {} if path.is_dir() else write_number(path))
        directory.stages[name]["seconds"] = seconds
    do_stage(directory, "iteration-2/sft", lambda path: {})
    do_stage(directory, "elsewhere.json", write_number)
    log = (tmp_path / "run" / "log.txt").read_text()
    assert [line.split(" ", 1)[1] for line in log.splitlines()] == [
        "iteration-0/sft (stage 1 of 5)",
        "iteration-1/pairs.jsonl (stage 2 of 5, 60 s so far, about 2 min left)",
        "iteration-1/sft (stage 3 of 5, 62 s so far, about 2 min left)",
        "iteration-2/pairs.jsonl (stage 4 of 5, 6 min so far, about 7 min left)",
        "iteration-2/sft (stage 5 of 5, 6 min so far, about 7 min left)",
        "elsewhere.json",
    ]
    assert (duration(5399), duration(7200)) == ("90 min", "2.0 h")


PLANNED = {
    "iteration-0/sft": PlannedStage("training", 10.0),
    "iteration-0/evaluation.json": PlannedStage("inference", 5.0),
    "iteration-1/samples-dpo.jsonl": PlannedStage("inference", 50.0),
    "iteration-1/pairs.jsonl": PlannedStage(),
    "iteration-1/dpo": PlannedStage("training", 40.0),
    "iteration-1/sft": PlannedStage("training", 15.0),
    "iteration-1/evaluation.json": PlannedStage("inference", 6.0),
}
WARMED_UP = {"iteration-0/sft": {"seconds": 100.0}, "iteration-0/evaluation.json": {"seconds": 10.0}}


def test_after_the_warm_up_operations_tell_what_is_left():
    """A training takes 10 s an operation here, sampling and evaluation 2 s; pairs take nothing."""
    assert seconds_left(PLANNED, {}) is None
    assert seconds_left(PLANNED, {"iteration-0/sft": {"seconds": 100.0}}) is None  # nothing was sampled yet
    assert seconds_left(PLANNED, WARMED_UP) == 2 * 50 + 10 * 40 + 10 * 15 + 2 * 6


def test_a_stage_of_the_same_kind_counts_more_than_operations():
    finished = WARMED_UP | {
        "iteration-1/samples-dpo.jsonl": {"seconds": 540.0, "flops": 1e9},  # slow, though the evaluation was not
        "iteration-1/pairs.jsonl": {"seconds": 7.0},
        "iteration-1/dpo": {"seconds": 200.0},
    }
    assert seconds_left(PLANNED, finished) == 100 * 15 / 10 + 10 * 6 / 5
    more = PLANNED | {
        "iteration-2/samples-dpo.jsonl": PlannedStage("inference", 50.0),
        "iteration-2/samples-sft.jsonl": PlannedStage("inference", 11.0),  # the first of its kind
        "iteration-2/pairs.jsonl": PlannedStage(),
        "iteration-2/reference.safetensors": PlannedStage("training", 5.0),  # likewise
    }
    of_more = 540 + 11 * (10 + 540) / (5 + 50) + 7 + 5 * (100 + 200) / (10 + 40)
    assert seconds_left(more, finished) == pytest.approx(150 + 12 + of_more)


def test_what_was_continued_or_had_nothing_to_do_is_no_measure():
    continued = WARMED_UP | {"iteration-0/sft": {"seconds": 3.0, "continued": True}}
    assert seconds_left(PLANNED, continued) is None
    without_pairs = WARMED_UP | {"iteration-1/dpo": {"seconds": 1.0, "flops": 0.0}}
    of_a_kind = 2 * 50 + 100 * 15 / 10 + 2 * 6
    assert seconds_left(PLANNED, without_pairs) == of_a_kind
    reference = PLANNED | {"iteration-1/reference.safetensors": PlannedStage("training", 2.0)}
    assert seconds_left(reference, without_pairs) == of_a_kind + 2 * 10
    assert seconds_left(PLANNED, {name: {"seconds": 1.0} for name in PLANNED}) == 0


def test_a_stage_that_goes_on_after_a_kill_is_marked(tmp_path):
    """Its seconds are those of the last process alone."""
    directory = RunDirectory(tmp_path / "run", SETTINGS)
    for name in ("iteration-0/sft", "iteration-1/sft"):
        with pytest.raises(KeyboardInterrupt), directory.stage(name):
            if name == "iteration-1/sft":
                directory.progress(name).mkdir(parents=True)  # something was saved
            raise KeyboardInterrupt
        do_stage(directory, name, lambda path: {})
    assert "continued" not in directory.stages["iteration-0/sft"]
    assert directory.stages["iteration-1/sft"]["continued"] is True
    again = RunDirectory(tmp_path / "run", SETTINGS)
    assert again.stages["iteration-1/sft"]["continued"] is True


def test_what_a_run_has_finished_is_read_without_claiming_it(tmp_path):
    assert finished_names(tmp_path / "run") == set()
    assert not (tmp_path / "run").exists()
    directory = RunDirectory(tmp_path / "run", SETTINGS)
    for name in ("iteration-0/sft", "iteration-1/pairs.jsonl"):
        do_stage(directory, name, lambda path: {} if path.is_dir() else write_number(path))
    assert finished_names(tmp_path / "run") == {"iteration-0/sft", "iteration-1/pairs.jsonl"}
    (tmp_path / "run" / "iteration-1" / "pairs.jsonl").unlink()
    before = files_of(tmp_path)
    assert finished_names(tmp_path / "run") == {"iteration-0/sft"}
    assert files_of(tmp_path) == before
    for broken in (b"[]\n", b"{}\n", b'{"stage": 1}\n', b"\xff\n"):
        (tmp_path / "run" / "stages.jsonl").write_bytes(broken)
        assert finished_names(tmp_path / "run") == set()
