"""What the benchmarks have in common: a timer, the lines that say how and where, and the file that holds the result."""

import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch

from minidpost.precision import cpu_multiplies_bf16

RESULTS = Path(__file__).resolve().parent / "results"


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def command_line() -> str:
    """The command that is running, as it is typed in the repository's root."""
    return "python benchmarks/" + " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def train_command(n_processes: int = 1) -> tuple[list[str], dict[str, str]]:
    """train.py as it is begun in a repository's root, without its flags, and the environment: several by torchrun."""
    if n_processes == 1:
        return [sys.executable, "train.py"], dict(os.environ)
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(n_processes)]
    return [sys.executable, *torchrun, "train.py"], {**os.environ, "OMP_NUM_THREADS": "1"}


def machine_line(*packages: str) -> str:
    """Processor, cores, torch with its threads, and the versions of `packages`."""
    installed = [f"{name} {version(name)}" for name in packages]
    threads = f"torch {torch.__version__} ({torch.get_num_threads()} threads)"
    return ", ".join([f"{processor()}, {os.cpu_count()} cores", threads, *installed])


def processor() -> str:
    """The processor's name where Linux tells it, its architecture elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def instruction_set() -> str:
    """What torch uses on this processor, such as "AVX2, without bf16 instructions"."""
    bf16 = "with" if cpu_multiplies_bf16() else "without"
    return f"{torch.backends.cpu.get_cpu_capability()}, {bf16} bf16 instructions"


def write_result(path: Path, title: str, paragraphs: list[str], is_whole: bool = True) -> None:
    """Write a result as Markdown, and print it if it is whole."""
    text = "\n\n".join([f"# {title}", *paragraphs]) + "\n"
    path.write_text(text, encoding="utf-8")
    if is_whole:
        print(text)


def status_bytes(*fields: str) -> int:
    """The sum of some sizes in this process's status, in bytes (Linux)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return sum(1024 * int(lines[name].split()[0]) for name in fields)
