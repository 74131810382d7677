"""The default run's first iteration: today's minutes against an earlier revision's, one process against two.

    python -m benchmarks.default_run --before 5812089

Whole commands, `python train.py --iterations N`, in turn: the earlier revision, the files that lie here, and (in the
last rounds) the same under torchrun with a process for each core. The earlier revision is checked out beside the
temporary directory's runs. A command's seconds are a clock's, from its start to its end; a stage's seconds are the
run's own, from its stages.jsonl. What has been measured is kept as JSON: the same command goes on with the rounds that
are missing.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, instruction_set, machine_line, train_command, write_result
from minidpost.storage import markdown_table, read_json, read_jsonl, write_json

ROOT = Path(__file__).resolve().parents[1]
PAGE = RESULTS / "default-run.md"
BEFORE, NOW, TOGETHER = "before", "now", "now, torchrun"
STAGES = {  # the end of a stage's name: what the table calls it
    "/sft": "fine-tuning (SFT)",
    "/dpo": "DPO",
    "/samples-dpo.jsonl": "sampling for pairs",
    "/samples-sft.jsonl": "sampling for pseudo-labels",
    "/evaluation.json": "evaluation",
}
TITLE = "The default run's first iteration, before and now"
OTHER = "all else: reading, pairs, pseudo-labels"
TOGETHER_TEXT = (
    "By torchrun the same seed trains another model: each process has dropout of its own, so that other units are "
    "dropped, and sums over processes round differently. From the warm-up on weights differ, and with them samples, "
    "pairs and pseudo-labels; with the same weights they are the same ([scale.md](../../docs/scale.md))."
)


def main() -> None:
    """Measure what is missing, and write the page after each command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--before", metavar="REVISION", required=True, help="the revision that today's is compared to")
    parser.add_argument("--iterations", type=int, default=1, help="of each run, after the warm-up (default: 1)")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of commands (default: 5)")
    parser.add_argument(
        "--torchrun-rounds", type=int, default=2, help="the last so many with torchrun too (default: 2)"
    )
    parser.add_argument("--output", type=Path, default=PAGE, help="the page, beside it the JSON (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="examples of every set, to try the benchmark (default: all)")
    options = parser.parse_args()
    flags = ["--seed", "1", "--iterations", str(options.iterations)]
    flags += ["--limit", str(options.limit)] if options.limit else []
    record = options.output.with_suffix(".json")
    where = f"{machine_line()}, {instruction_set()}"
    found: dict[str, Any] = {"machine": where, "before": options.before, "flags": flags, "runs": []}
    if record.is_file():
        found = read_json(record)
        if (found["before"], found["flags"]) != (options.before, flags):
            parser.error(f"{record} is of {found['before']} and train.py {' '.join(found['flags'])}: remove it")
    with tempfile.TemporaryDirectory() as directory:
        earlier = Path(directory) / "before"
        checkout(options.before, earlier)
        for round_index in range(options.rounds):
            for contender in (BEFORE, NOW, TOGETHER):
                is_done = any(run["round"] == round_index and run["contender"] == contender for run in found["runs"])
                if is_done or (contender == TOGETHER and round_index < options.rounds - options.torchrun_rounds):
                    continue
                run_directory = Path(directory) / f"{contender.replace(', ', '-')}-{round_index}"
                code = earlier if contender == BEFORE else ROOT
                measured = measure(code, run_directory, flags, is_together=contender == TOGETHER)
                found["runs"].append({"round": round_index, "contender": contender, **measured})
                write_json(record, found)
                write_page(options.output, found, is_whole=False)
    write_page(options.output, found, is_whole=True)


def checkout(revision: str, directory: Path) -> None:
    """Write a revision's files."""
    directory.mkdir()
    archive = subprocess.run(["git", "archive", revision], cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout
    subprocess.run(["tar", "-x", "-C", str(directory)], input=archive, check=True)


def measure(code: Path, run_directory: Path, flags: Sequence[str], *, is_together: bool) -> dict[str, Any]:
    """Run train.py of the directory `code`: seconds, the largest process's peak memory, seconds by stage, accuracy."""
    command, environment = train_command((os.cpu_count() or 1) if is_together else 1)
    command += [*flags, "--run-dir", str(run_directory)]
    started = time.perf_counter()
    with open(run_directory.with_suffix(".log"), "wb") as log:
        process = subprocess.Popen(command, cwd=code, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if status:
        raise SystemExit(run_directory.with_suffix(".log").read_text(encoding="utf-8", errors="replace")[-2000:])
    stages = dict.fromkeys([*STAGES.values(), OTHER], 0.0)
    for _, line in read_jsonl(run_directory / "stages.jsonl"):
        stages[stage_kind(line["stage"])] += line["seconds"]
    stages[OTHER] += seconds - sum(stages.values())
    last = read_json(run_directory / "results.json")["iterations"][-1]["accuracy"]
    accuracy = {name: score["value"] for name, score in last.items()}
    return {"seconds": seconds, "peak_bytes": usage.ru_maxrss * 1024, "stages": stages, "accuracy": accuracy}


def stage_kind(stage: str) -> str:
    """What the table calls a stage."""
    return next((kind for end, kind in STAGES.items() if stage.endswith(end)), OTHER)


def write_page(page: Path, found: dict[str, Any], *, is_whole: bool) -> None:
    """Write what has been found as Markdown; it is printed if it is whole."""
    seconds: dict[str, dict[int, float]] = {
        contender: {run["round"]: run["seconds"] for run in of_contender(found, contender)}
        for contender in (BEFORE, NOW, TOGETHER)
    }
    if not seconds[BEFORE] or not seconds[NOW]:
        return
    flags = " ".join(found["flags"])
    paragraphs = [
        f"`python -m benchmarks.default_run --before {found['before']}` · {found['machine']}",
        f"Whole commands in turn, `python train.py {flags}`: revision {found['before']} (before), the present one "
        "(now), and the present one by torchrun with a process of one thread for each core. Memory is that of the "
        "largest process.",
        markdown_table(
            ["command", "runs", "seconds, median", "least to most", "peak memory, MB"],
            [command_row(found, contender) for contender in seconds if seconds[contender]],
        ),
        ratio_text(seconds, NOW, BEFORE),
        ratio_text(seconds, TOGETHER, NOW) if seconds[TOGETHER] else "",
        "Where the seconds go, medians over the runs:",
        stage_table(found),
        "Greedy accuracy in percent after the last iteration, which is the same in every run of a row:",
        accuracy_table(found),
        TOGETHER_TEXT if seconds[TOGETHER] else "",
    ]
    write_result(page, TITLE, [text for text in paragraphs if text], is_whole)


def of_contender(found: dict[str, Any], contender: str) -> list[dict[str, Any]]:
    """Its runs, in the order in which they were made."""
    return [run for run in found["runs"] if run["contender"] == contender]


def command_row(found: dict[str, Any], contender: str) -> list[str]:
    """A row of the first table."""
    runs = of_contender(found, contender)
    seconds = [run["seconds"] for run in runs]
    spread = f"{min(seconds):.0f} to {max(seconds):.0f}"
    peak = statistics.median(run["peak_bytes"] for run in runs) / 1e6
    return [contender, str(len(runs)), f"{statistics.median(seconds):.0f}", spread, f"{peak:.0f}"]


def ratio_text(seconds: dict[str, dict[int, float]], contender: str, peer: str) -> str:
    """One command's seconds over another's, round by round."""
    rounds = sorted(seconds[contender].keys() & seconds[peer].keys())
    ratios = [seconds[contender][i] / seconds[peer][i] for i in rounds]
    if not ratios:
        return ""
    listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return f"Seconds, {contender} / {peer}: median **{statistics.median(ratios):.2f}** (round by round {listed})."


def stage_table(found: dict[str, Any]) -> str:
    """Rows of kinds of stages, columns of contenders."""
    contenders = [contender for contender in (BEFORE, NOW, TOGETHER) if of_contender(found, contender)]
    rows = []
    for kind in (*STAGES.values(), OTHER):
        rows.append([kind, *(f"{median_stage(of_contender(found, contender), kind):.1f}" for contender in contenders)])
    return markdown_table(["seconds", *contenders], rows)


def median_stage(runs: Sequence[dict[str, Any]], kind: str) -> float:
    """The seconds of a kind of stage."""
    seconds: list[float] = [run["stages"][kind] for run in runs]
    return statistics.median(seconds)


def accuracy_table(found: dict[str, Any]) -> str:
    """A row for each accuracy that a contender's runs have had; more than one, if its runs differ."""
    rows: list[list[str]] = []
    for run in found["runs"]:
        row = [run["contender"], *(f"{100 * value:.1f}" for value in run["accuracy"].values())]
        if row not in rows:
            rows.append(row)
    return markdown_table(["command", *found["runs"][0]["accuracy"]], rows)


if __name__ == "__main__":
    main()
