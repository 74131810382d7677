"""Kills one of several processes of a run at random instants: all must end, and the same command must continue.

The run is kill.py's, by two processes. They are forked from one that has its imports done, which then does what
torchrun does: it holds the store that they meet at, and ends the others when one has ended. After a kill the same
command goes on, with two processes or with one. Where it is two again, all files are compared, byte for byte, with
those of a run that was never killed. Where it is one, the files must be there, and say the same but for rounding (which
units dropout hits is another matter, so that there is none here).

    OMP_NUM_THREADS=1 python tests/fault_injection/kill_ranks.py --kills 30 --output benchmarks/results/kills-ranks.md
"""

import json
import os
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from fault_injection import kill  # noqa: E402

import train  # noqa: E402
from minidpost.cli import run_command  # noqa: E402
from minidpost.data import toy  # noqa: E402
from minidpost.sampling import sampler  # noqa: E402
from minidpost.storage import markdown_table, write_jsonl  # noqa: E402
from minidpost.training.optim import read_log  # noqa: E402

N_RANKS = 2
RUN = [*kill.RUN, "--sft-dropout", "0"]
PATIENCE = 30.0  # seconds until torchrun kills a process that was asked to end
TOLERANCE = 2e-3  # of a loss, between one process and two


def main() -> None:
    options = kill.parse_options(__doc__, n_kills=30)
    output = options.output and options.output.absolute()
    torch.set_num_threads(1)
    random = Random(options.seed)
    started = time.monotonic()
    kills: list[Kill] = []
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        write_jsonl("examples.jsonl", [vars(example) for example in toy.examples("train")[: kill.N_EXAMPLES]])
        whole = Path("whole")
        run(Path("warm-up"), N_RANKS)  # what is slow only once
        length = run(whole, N_RANKS).seconds
        print(f"uninterrupted: {length:.1f} s, {len(kill.contents(whole))} files", flush=True)
        while len(kills) < options.kills and time.monotonic() - started < 60 * options.minutes:
            kills.append(
                kill_and_continue(
                    Path(f"run-{len(kills)}"),
                    instant=random.uniform(0, length),
                    victim=random.randrange(N_RANKS),
                    n_after=1 + len(kills) % N_RANKS,
                    whole=whole,
                )
            )
            print(f"{len(kills)}: {kills[-1]}", flush=True)
    text = report(kills, length)
    print(text)
    if output:
        output.write_text(text, encoding="utf-8")
    sys.exit(any(one.wrong for one in kills))


@dataclass(frozen=True)
class Kill:
    """A rank that was killed: when and for how long the others lived on (seconds), who continued, what was wrong."""

    instant: float
    victim: int
    stage: str
    others_lived: float
    n_after: int
    wrong: str


@dataclass(frozen=True)
class Outcome:
    """A run that has ended: how long it took, and how long the others outlived the first that ended."""

    seconds: float
    others_lived: float
    statuses: list[int]


def kill_and_continue(path: Path, *, instant: float, victim: int, n_after: int, whole: Path) -> Kill:
    """Kill one rank `instant` seconds after the start, continue the run, and compare its files with a whole run's."""
    killed = run(path, N_RANKS, instant, victim)
    stage = kill.stage_at_work(path)
    wrong = ""
    if any(status == -signal.SIGKILL for number, status in enumerate(killed.statuses) if number != victim):
        wrong = f"had to be killed too; {path.with_suffix('.out').read_text()[-2000:]}"
    run(path, n_after)
    wrong += differences(path, whole, exactly=n_after == N_RANKS)
    return Kill(instant, victim, stage, killed.others_lived, n_after, wrong)


def differences(path: Path, whole: Path, *, exactly: bool) -> str:
    """What is different in two finished run directories; of losses more than rounding, unless all must be the same."""
    found = kill.contents(path)
    expected = kill.contents(whole)
    if exactly:
        return ", ".join(sorted(name for name in {**found, **expected} if found.get(name) != expected.get(name)))
    if found.keys() != expected.keys():
        return f"other files: {sorted(found.keys() ^ expected.keys())}"
    wrong = []
    for name in expected:
        if name.endswith("log.jsonl"):
            losses = [[step["loss"] for step in read_log(directory / name)] for directory in (path, whole)]
            if len(losses[0]) != len(losses[1]):
                wrong.append(f"{name}: other steps")
        elif name.endswith(".json"):
            json.loads((path / name).read_text(encoding="utf-8"))
    # The first training has had the same data, whatever rounding did to the samples.
    name = "iteration-0/sft/log.jsonl"
    for one, other in zip(read_log(path / name), read_log(whole / name), strict=True):
        if abs(one["loss"] - other["loss"]) > TOLERANCE * other["loss"]:
            wrong.append(f"{name}: loss {one['loss']} in step {one['step']}, {other['loss']} expected")
    return ", ".join(wrong)


def run(path: Path, n_ranks: int, instant: float | None = None, victim: int = 0) -> Outcome:
    """Run train.py by some processes, to its end or until one of them is killed and the others have ended."""
    started = time.monotonic()
    store = dist.TCPStore("localhost", 0, is_master=True, timeout=timedelta(seconds=300), wait_for_workers=False)
    children = [start(path, number, n_ranks, store.port) for number in range(n_ranks)]
    if instant is not None:
        time.sleep(max(0.0, started + instant - time.monotonic()))
        os.kill(children[victim], signal.SIGKILL)

    # As torchrun's agent: look often, end all when one has failed, and do not wait for ever.
    statuses: dict[int, int] = {}
    first_failure: float | None = None
    asked = False
    while len(statuses) < n_ranks:
        for child in children:
            if child not in statuses:
                pid, status = os.waitpid(child, os.WNOHANG)
                if pid:
                    statuses[child] = os.waitstatus_to_exitcode(status)
        if first_failure is None and any(statuses.values()):
            first_failure = time.monotonic()
        if first_failure is not None:
            waited = time.monotonic() - first_failure
            for child in children:
                if child not in statuses and (not asked or waited > PATIENCE):
                    os.kill(child, signal.SIGTERM if not asked else signal.SIGKILL)
            asked = True
        time.sleep(0.1)
    ended = time.monotonic()
    if instant is None and any(statuses.values()):
        sys.exit(f"kill_ranks.py: ended with {statuses}:\n{path.with_suffix('.out').read_text()[-3000:]}")
    others_lived = 0.0 if first_failure is None else ended - first_failure
    return Outcome(ended - started, others_lived, [statuses[child] for child in children])


def start(path: Path, number: int, n_ranks: int, port: int) -> int:
    """Fork one of the processes; gives its id."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    with open(path.with_suffix(".out"), "ab") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number)}
    os.environ |= {"WORLD_SIZE": str(n_ranks), "LOCAL_WORLD_SIZE": str(n_ranks)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    sys.argv = ["train.py", *RUN, "--run-dir", str(path)]
    sampler.CHUNK = kill.CHUNK
    status = 1
    try:
        run_command(train.main)
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def report(kills: list[Kill], length: float) -> str:
    """The table: a row for each kill."""
    rows = []
    for number, one in enumerate(kills, start=1):
        rows.append(
            [
                str(number),
                f"{one.instant:.2f}",
                str(one.victim),
                one.stage,
                f"{one.others_lived:.1f}",
                str(one.n_after),
                one.wrong or "nothing",
            ]
        )
    n_right = sum(not one.wrong for one in kills)
    heads = ["kill", "instant (s)", "rank", "stage hit", "the other lived on (s)", "continued by", "wrong"]
    return f"""# Kills of one process of two

`tests/fault_injection/kill_ranks.py`: {len(kills)} runs by {N_RANKS} processes, of which one, chosen at random, was
killed (SIGKILL) at a random instant; the other ended by itself, and the same command continued, in turn with one
process and with two. **{n_right} of {len(kills)}** ended as they should: continued by two, with the same files, byte
for byte, as a run that was not killed ({length:.1f} s); continued by one, with all files, and the losses of the first
SFT but for rounding (other samples may follow from it). One thread a process, CPU, gloo, torch {torch.__version__}.

    train.py {" ".join(RUN)}

{markdown_table(heads, rows)}
"""


if __name__ == "__main__":
    main()
