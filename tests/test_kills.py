"""A few runs that are killed at random moments, and that the comparison would notice a file that differs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILL_TEST = Path(__file__).resolve().parent / "fault_injection" / "kill.py"


@pytest.mark.slow
def test_five_runs_that_are_killed_end_as_one_that_is_not(tmp_path):
    command = [sys.executable, KILL_TEST, "--kills", "5", "--seed", "7", "--output", tmp_path / "kills.md"]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "**5 of 5** ended with the same" in (tmp_path / "kills.md").read_text(encoding="utf-8")


def test_which_differences_between_runs_count(tmp_path):
    from fault_injection import kill

    step, stage = {"step": 0, "loss": 2.5, "tokens_per_second": 1.5}, {"stage": "a", "flops": 1.5, "seconds": 0.25}
    hashes = {"log.jsonl": "0f" * 32, "model.safetensors": "1e" * 32}
    table = "| method | iteration | minutes | FLOPs |\n| sft | 0 | {} | 8e+09 |\n"

    def files(step: dict, stage: dict, hashes: dict, minutes: str = "0.1") -> dict[str, bytes]:
        (tmp_path / "log.jsonl").write_text(json.dumps(step) + "\n")
        (tmp_path / "stages.jsonl").write_text(json.dumps(stage | {"sha256": hashes}) + "\n")
        (tmp_path / "report.md").write_text(table.format(minutes))
        (tmp_path / "log.txt").write_text(str(step))
        return kill.contents(tmp_path)

    first = files(step, stage, hashes)
    later = files(
        step | {"tokens_per_second": 9e3},
        stage | {"seconds": 71.0, "continued": True},
        hashes | {"log.jsonl": "2d" * 32},
        "7.5",
    )
    assert first == later
    assert first.keys() == {"log.jsonl", "stages.jsonl", "report.md"}
    for changed in (
        (step | {"loss": 2.6}, stage, hashes),
        (step, stage | {"flops": 2.5}, hashes),
        (step, stage, hashes | {"model.safetensors": "2d" * 32}),
    ):
        assert files(*changed) != first
    (tmp_path / "sft.unfinished").write_text("")
    assert files(step, stage, hashes).keys() - first.keys() == {"sft.unfinished"}


@pytest.mark.slow
def test_jobs_that_are_killed_end_as_ones_that_are_not():
    command = [sys.executable, KILL_TEST.with_name("kill_jobs.py"), "--kills", "2", "--seed", "3"]
    outcome = subprocess.run(command, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert "4 of 4 ended with the same files" in outcome.stdout
