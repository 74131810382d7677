"""Kills sample.py and eval.py at random instants, lets each go on, and compares its files.

The files are compared with those of a command that was never killed. Each is a short one of several chunks. SIGKILL
goes to the whole process group, at an instant after the job's progress has begun; then the same command is run until it
ends, unless the output had its name when the kill came: what has its name is finished. Each command is forked from a
process that has its imports done.

    OMP_NUM_THREADS=1 python tests/fault_injection/kill_jobs.py --kills 20
"""

import argparse
import os
import runpy
import sys
import tempfile
import time
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch  # noqa: E402
from fault_injection.kill import status_of  # noqa: E402

import eval as eval_command  # noqa: E402, F401  (so that a child finds all modules imported)
import sample as sample_command  # noqa: E402, F401
from minidpost.data import toy  # noqa: E402
from minidpost.sampling import sampler  # noqa: E402
from minidpost.storage import write_jsonl  # noqa: E402

CHUNK = 8  # requests in place of 1,024, so that there are several chunks
COMMANDS = {
    "sample.py": "--checkpoint tiny-t5 --input q.jsonl --samples 2 --temperature 1 --max-new-tokens 60 --chunk 8",
    "eval.py": "--checkpoint tiny-t5 --limit 9 --pass-at 2 --max-new-tokens 40 --calculator on",
}
OUTPUTS = {
    "sample.py": {"--output": "rows.jsonl"},
    "eval.py": {"--output": "scores.json", "--save-completions": "completions.jsonl"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="how many of each command (default: 20)")
    parser.add_argument("--seed", type=int, default=1, help="of the instants")
    options = parser.parse_args()
    torch.set_num_threads(1)
    random = Random(options.seed)
    n_equal = 0
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        examples = toy.examples("train")[:20]
        write_jsonl("q.jsonl", ({"question": example.question, "id": i} for i, example in enumerate(examples)))
        for command in COMMANDS:
            run(command, Path("warm-up"))  # what is slow only once, such as a first read of the weights
            length = run(command, Path("whole"))
            expected = contents(Path("whole"), command)
            print(f"{command}, uninterrupted: {length:.1f} s")
            for number in range(options.kills):
                directory = Path(f"{command}-{number}")
                instant = random.uniform(0, length)  # after the beginning of the job's progress
                run(command, directory, instant)
                n_chunks = len(list(directory.glob("*.progress/*.jsonl")))
                if not all((directory / output).exists() for output in OUTPUTS[command].values()):
                    run(command, directory)
                is_equal = contents(directory, command) == expected
                n_equal += is_equal
                outcome = "equal" if is_equal else "DIFFERENT"
                print(f"{number + 1}: at {instant:.2f} s, {n_chunks} chunks, {outcome}", flush=True)
            os.rename("warm-up", f"{command}-warm-up")
            os.rename("whole", f"{command}-whole")
    n_kills = options.kills * len(COMMANDS)
    print(f"{n_equal} of {n_kills} ended with the same files as a command that was not killed")
    sys.exit(n_equal < n_kills)


def run(command: str, directory: Path, seconds: float | None = None) -> float:
    """Run a command in a directory to its end, or until it is killed after some seconds; how long it ran.

    Time begins where the job does.
    """
    directory.mkdir(exist_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        with open(f"{directory}.out", "ab") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        outputs = [word for flag, name in OUTPUTS[command].items() for word in (flag, f"{directory}/{name}")]
        sys.argv = [command, *COMMANDS[command].split(), *outputs]
        sampler.CHUNK = CHUNK
        status = 1
        try:
            runpy.run_path(str(ROOT / command), run_name="__main__")
            status = 0
        finally:
            sys.stdout.flush()
            os._exit(status)
    while not list(directory.glob("*.progress")) and not list(directory.glob("*.json*")):
        time.sleep(0.001)
        if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            break
    started = time.monotonic()
    status = status_of(child, started, seconds)
    if seconds is None and status != 0:
        sys.exit(f"kill_jobs.py: {command} ended with status {status}:\n{Path(f'{directory}.out').read_text()[-3000:]}")
    return time.monotonic() - started


def contents(directory: Path, command: str) -> dict[str, bytes]:
    """All files of a directory by name; a progress that was killed while it was being removed may be there."""
    files = {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}
    first_output = next(iter(OUTPUTS[command].values()))
    return {name: content for name, content in files.items() if not name.startswith(f"{first_output}.progress/")}


if __name__ == "__main__":
    main()
