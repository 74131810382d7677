"""report.py as a new user meets it: no run, one, several; mistakes are one line."""

import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from page.made_runs import make_run

import report
from minidpost.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs report.py in an empty directory; returns what it prints on both streams."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
        report.main()
        return capsys.readouterr()

    return call


def test_without_a_run_one_line_says_how_to_make_one(command, tmp_path):
    for _ in range(2):
        with pytest.raises(UserError, match=r"no run here yet; python train\.py makes one"):
            command()
        (tmp_path / "runs").mkdir(exist_ok=True)
    assert not (tmp_path / "report.html").exists()


def test_all_runs_are_shown_without_an_argument(command, tmp_path):
    make_run(tmp_path / "runs" / "a")
    make_run(tmp_path / "runs" / "b", method="st")
    (tmp_path / "runs" / "not-a-run").mkdir()
    printed = command()
    assert printed.out == "report.html: 2 runs\n" and printed.err == ""
    assert command().out == "report.html: 2 runs\n"  # over its own page


def test_runs_are_named_one_by_one(command, tmp_path):
    path = make_run(tmp_path / "elsewhere")
    printed = command(path, "--output", "x.html", "--export", "figures")
    assert "figure-5.png" in printed.out and (tmp_path / "figures" / "table-2.tex").is_file()
    assert (tmp_path / "x.html").is_file()


def test_figures_have_room_for_long_names(command, tmp_path):
    """Where they had none, matplotlib warned of axes without any height or width."""
    name = "tiny-t5-dpo-st-toy-42-limit=24-sft-epochs=2-lora-rank=4-samples=2-max-new-tokens=60"
    path = make_run(tmp_path / "runs" / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        command(path, "--export", "figures")


def test_what_cannot_be_read_is_said_beside_the_page(command, tmp_path):
    good = make_run(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    printed = command(good, tmp_path / "empty")
    assert printed.err.count("\n") == 1 and "empty: not a run directory" in printed.err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["absent"], "absent: no such directory"),
        (["folder"], "folder: not a run directory"),
        (["--watch", "70000"], "a port from 0"),
        (["--watch", "0", "--export", "x"], "--export: has no effect without a written page, and --watch writes none"),
        (["--watch", "0", "--output", "x.html"], "--output: has no effect without a written page"),
        (["--watch", "0", "--no-samples"], "--no-samples: has no effect without a written page"),
        (["--host", "0.0.0.0"], "--host: has no effect without --watch"),
        (["--output", "folder"], "a file in a directory that exists is expected"),
    ],
)
def test_mistakes_are_one_line(command, tmp_path, arguments, message):
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match=message):
        command(*arguments)


def test_help_and_a_broken_run_end_without_a_traceback(tmp_path):
    (tmp_path / "runs" / "x").mkdir(parents=True)
    (tmp_path / "runs" / "x" / "config.json").write_text("{")
    (tmp_path / "runs" / "x" / "log.txt").write_text("")
    done = subprocess.run(
        [sys.executable, ROOT / "report.py"], cwd=tmp_path, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("report.py: runs/x: config.json:")
