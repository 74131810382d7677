"""Kills runs at random instants, lets each be continued, and compares all their files with those of a run never killed.

The run is a short one of train.py with everything in it: fine-tuning, sampling in several chunks, DPO, evaluation, the
report, and a training state saved after every step, so that many kills fall into the writing of one. SIGKILL goes to
the whole process group. Each run is forked from a process that has its imports done, and so begins at once. What
wall-clock time decides is left out of the comparison (seconds, minutes, tokens a second, log.txt), and that a stage's
seconds are those since the kill; nothing else.

    OMP_NUM_THREADS=1 python tests/fault_injection/kill.py --kills 100 --output benchmarks/results/kills.md
"""

import argparse
import os
import re
import signal
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from matplotlib import pyplot  # noqa: E402, F401  (here, so that no child imports it)

import train  # noqa: E402
from minidpost.cli import run_command  # noqa: E402
from minidpost.data import toy  # noqa: E402
from minidpost.sampling import sampler  # noqa: E402
from minidpost.storage import markdown_table, write_jsonl  # noqa: E402

N_EXAMPLES = 10  # of the toy world; one of them is held out as dev
CHUNK = 16  # requests in place of 1,024, so that the few samples make several chunks
RUN = """
    --model tiny-t5-dpo-st --data examples.jsonl --iterations 1 --sft-epochs 12 --dpo-steps 4 --dpo-learning-rate 7e-5
    --max-new-tokens 64 --slots 12 --micro-batch-tokens 1500 --checkpoint-minutes 0
""".split()
CLOCK = re.compile(
    rb'"(seconds|tokens_per_second)": [^,}\n]+(, "continued": true)?|"log\.jsonl": "[0-9a-f]+"'
)  # and the hash of such a log


def main() -> None:
    options = parse_options(__doc__, n_kills=100)
    output = options.output and options.output.absolute()
    torch.set_num_threads(1)
    random = Random(options.seed)
    started = time.monotonic()
    kills: list[Kill] = []
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        write_jsonl("examples.jsonl", [vars(example) for example in toy.examples("train")[:N_EXAMPLES]])
        whole = Path("whole")
        train_for(Path("warm-up"))  # what is slow only once, such as a first read of the weights
        length = train_for(whole)
        expected = contents(whole)
        print(f"uninterrupted: {length:.1f} s, {len(expected)} files")
        while len(kills) < options.kills and time.monotonic() - started < 60 * options.minutes:
            kill = kill_and_continue(
                Path(f"run-{len(kills)}"), instant=random.uniform(0, length), length=length, expected=expected
            )
            kills.append(kill)
            outcome = ", ".join(kill.differing) or "equal"
            print(f"{len(kills)}: at {kill.instant:.2f} s, {kill.stage}, {kill.lost:+.1f} s, {outcome}", flush=True)
    text = report(kills, length, len(expected))
    print(text)
    if output:
        output.write_text(text, encoding="utf-8")
    sys.exit(any(kill.differing for kill in kills))


@dataclass(frozen=True)
class Kill:
    """One run that was killed and continued: when (seconds), in which stage, what it cost, which files differ."""

    instant: float
    stage: str
    lost: float
    differing: list[str]


def kill_and_continue(path: Path, *, instant: float, length: float, expected: dict[str, bytes]) -> Kill:
    """Kill a run `instant` seconds after its start, continue it, and compare its files with those of a whole run."""
    seconds_before = train_for(path, instant)
    stage = stage_at_work(path)
    seconds_after = train_for(path)
    found = contents(path)
    differing = sorted(name for name in {**found, **expected} if found.get(name) != expected.get(name))
    return Kill(instant, stage, seconds_before + seconds_after - length, differing)


def train_for(path: Path, seconds: float | None = None) -> float:
    """Run train.py on a run directory, to its end or until it is killed after some seconds; how long it ran."""
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        os.setsid()
        with open(path.with_suffix(".out"), "ab") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        sys.argv = ["train.py", *RUN, "--run-dir", str(path)]
        sampler.CHUNK = CHUNK
        status = 1
        try:
            run_command(train.main)
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    status = status_of(child, started, seconds)
    if seconds is None and status != 0:
        sys.exit(f"kill.py: the run ended with status {status}:\n{path.with_suffix('.out').read_text()[-3000:]}")
    return time.monotonic() - started


def status_of(child: int, started: float, seconds: float | None) -> int:
    """The exit status of a forked process, killed with its group so many seconds after `started`; None: not killed."""
    if seconds is not None:
        time.sleep(max(0.0, started + seconds - time.monotonic()))
        try:
            os.killpg(child, signal.SIGKILL)
        except ProcessLookupError:  # not yet a group of its own
            os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return status


def parse_options(description: str, n_kills: int) -> argparse.Namespace:
    """The command line of a script that kills runs."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=n_kills, metavar="N", help=f"how many (default: {n_kills})")
    parser.add_argument("--minutes", type=float, default=1e9, metavar="M", help="begin no further kill after so many")
    parser.add_argument("--seed", type=int, default=1, help="of the instants")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the table here, as Markdown")
    return parser.parse_args()


def stage_at_work(path: Path) -> str:
    """What a killed run was doing: its last stage, if that is not finished."""
    log = path / "log.txt"
    stages = (
        re.findall(r"^\S+ (iteration-\S+)(?: \(stage .*)?$", log.read_text(encoding="utf-8"), re.MULTILINE)
        if log.exists()
        else []
    )
    if not stages:
        return "start"
    return f"after {stages[-1]}" if (path / stages[-1]).exists() else stages[-1]


def contents(path: Path) -> dict[str, bytes]:
    """All files of a run directory by name, without what the clock decides."""
    files = {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    del files["log.txt"]
    for name, content in files.items():
        if name.endswith((".json", ".jsonl")):
            files[name] = CLOCK.sub(b"", content)
        elif name == "report.md":
            lines = [line.split(b"|") for line in content.splitlines()]
            files[name] = b"\n".join(b"|".join([*cells[:-3], *cells[-2:]]) for cells in lines)  # without the minutes
    return files


def report(kills: list[Kill], length: float, n_files: int) -> str:
    """The table: a row for each kill, and their sums by stage."""
    by_stage: dict[str, list[Kill]] = defaultdict(list)
    for kill in kills:
        by_stage[kill.stage].append(kill)
    summary = []
    for stage, of_stage in sorted(by_stage.items()):
        n_stage_equal = sum(not kill.differing for kill in of_stage)
        mean_lost = sum(kill.lost for kill in of_stage) / len(of_stage)
        summary.append([stage, str(len(of_stage)), str(n_stage_equal), f"{mean_lost:+.1f}"])
    single = []
    for number, kill in enumerate(kills, start=1):
        equal = "no: " + ", ".join(kill.differing) if kill.differing else "yes"
        single.append([str(number), f"{kill.instant:.2f}", kill.stage, f"{kill.lost:+.1f}", equal])
    n_equal = sum(not kill.differing for kill in kills)
    return f"""# Kills

`tests/fault_injection/kill.py`: {len(kills)} runs, each killed once (SIGKILL to its process group) at a random instant
and continued by the same command. **{n_equal} of {len(kills)}** ended with the same {n_files} files, byte for byte, as
a run that was not killed ({length:.1f} s). Left out is what the clock decides: seconds, minutes, tokens a second,
log.txt. One thread, CPU, torch {torch.__version__}.

    train.py {" ".join(RUN)}

on {N_EXAMPLES} examples of the toy world, with a training state saved after every step, and in chunks of {CHUNK}
requests (otherwise 1,024), so that there are several.

"Seconds lost" is what both parts of a run took together, less what the uninterrupted run took. It holds what starting
again costs (reading weights and data, checking hashes; not Python's imports) and the noise of a machine that others use
too: the uninterrupted run was timed once, at the beginning. `start` is the time before the first stage; `after` a
stage, that its files were finished when the kill came.

{markdown_table(["stage hit", "kills", "equal", "mean seconds lost"], summary)}

{markdown_table(["kill", "instant (s)", "stage hit", "seconds lost", "equal"], single)}
"""


if __name__ == "__main__":
    main()
