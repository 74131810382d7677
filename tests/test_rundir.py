"""A run's directory: who may continue it, and that a stage is whole or absent."""

import json
from pathlib import Path

import pytest

from minidpost.files import UserError
from minidpost.rundir import RunDirectory

SETTINGS = {"model": "tiny-t5", "seed": 42, "limit": None, "preset": {"samples": 3, "beta": 0.1}}


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def write_number(path: Path) -> dict:
    path.write_text("7")
    return {"n": 7}


def test_a_new_run_notes_settings_and_versions(tmp_path):
    RunDirectory(tmp_path / "run", SETTINGS | {"data": Path("my.jsonl")})
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"] == SETTINGS | {"data": "my.jsonl"}
    assert config["versions"].keys() == {"minidpost", "python", "torch"}


def test_an_empty_directory_may_become_a_run(tmp_path):
    RunDirectory(tmp_path, SETTINGS)
    assert (tmp_path / "config.json").is_file()


def test_the_same_settings_continue_a_run_and_change_nothing(tmp_path):
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


def test_what_is_no_run_directory_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(UserError, match="is no run directory; choose another --run-dir"):
            RunDirectory(path, SETTINGS)
    assert files_of(tmp_path) == {"notes.txt": b"mine"}


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"settings": []}', '{"settings": 1}', "\udcff", "[" * 10**5])
def test_an_unreadable_config_is_one_line(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"config\.json is not readable"):
        RunDirectory(tmp_path, SETTINGS)


@pytest.mark.parametrize("name", ["iteration-1/pairs.jsonl", "iteration-1/sft"])
def test_a_stage_is_done_once(tmp_path, name):
    def work(path: Path) -> dict:
        calls.append(path)
        return write_number(path if name.endswith(".jsonl") else path / "weights")

    calls, directory = [], RunDirectory(tmp_path, SETTINGS)
    final = directory.stage(name, work)
    assert final == tmp_path / name
    assert (final if final.is_file() else final / "weights").read_text() == "7"
    assert directory.facts[name]["n"] == 7
    assert directory.facts[name]["seconds"] >= 0
    assert calls[0] != final
    assert not calls[0].exists()

    continued = RunDirectory(tmp_path, SETTINGS)
    assert continued.stage(name, work) == final
    assert len(calls) == 1
    assert continued.facts == directory.facts


def test_a_stage_that_was_removed_is_done_again_and_its_last_facts_count(tmp_path):
    RunDirectory(tmp_path, SETTINGS).stage("a.json", write_number)
    (tmp_path / "a.json").unlink()
    RunDirectory(tmp_path, SETTINGS).stage("a.json", lambda path: write_number(path) | {"n": 8})
    assert RunDirectory(tmp_path, SETTINGS).facts["a.json"]["n"] == 8


@pytest.mark.parametrize("name", ["a.json", "a"])
@pytest.mark.parametrize("end", [UserError, KeyboardInterrupt])
def test_a_stage_that_fails_has_neither_name_nor_facts(tmp_path, name, end):
    def work(path: Path) -> dict:
        write_number(path if name == "a.json" else path / "weights")
        raise end("half-way")

    directory = RunDirectory(tmp_path, SETTINGS)
    with pytest.raises(end):
        directory.stage(name, work)
    assert not (tmp_path / name).exists()
    assert RunDirectory(tmp_path, SETTINGS).facts == directory.facts == {}
    if name == "a":  # the next attempt begins with an empty directory
        (tmp_path / "a.unfinished" / "older").write_text("")
        directory.stage("a", lambda path: write_number(path / "weights"))
        assert [path.name for path in (tmp_path / "a").iterdir()] == ["weights"]


def test_what_is_said_is_logged(tmp_path, capsys):
    directory = RunDirectory(tmp_path, SETTINGS)
    directory.say("first")
    directory.say("second")
    assert capsys.readouterr().out == (tmp_path / "log.txt").read_text()
    assert [line.split(" ", 1)[1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["first", "second"]
