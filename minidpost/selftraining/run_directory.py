"""A run's directory: claimed by one process and one configuration, filled stage by stage, continued where it stopped.

A stage works under a temporary name and takes its own when it is whole; what has its final name is finished, and is
noted with its hashes in stages.jsonl. What a stage in progress may be continued from lies beside it in NAME.progress.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import count
from pathlib import Path

from tqdm import tqdm

from minidpost.errors import UserError
from minidpost.storage import (
    read_json,
    read_jsonl,
    remove_unfinished,
    sha256_of,
    staged_directory,
    staged_file,
    write_json,
    write_jsonl,
)
from minidpost.training.state import fingerprint
from minidpost.version import __version__

FORMAT = 2  # of everything in a run directory; raised when a run begun by older code could not be continued exactly
LOCK = ".lock"


class RunDirectory:
    """`config.json` (format, settings, versions), `stages.jsonl` (what each took and found, its files' hashes),
    `log.txt`, the stages' files."""

    def __init__(self, path: Path, settings: dict, fresh: bool = False):
        """Begin a run, or continue the one that was begun with the same settings; `fresh` sets that one aside first.

        To continue reads all finished files, to compare their hashes: about a second a gigabyte and core.
        UserError: another process works here, the settings or the format differ, a finished file was changed.
        """
        self.path, self.settings = Path(path), json.loads(json.dumps(settings, default=str))
        config = self.path / "config.json"
        if self.path.exists() and not self._is_ours():
            raise UserError(f"{path} exists and is no run directory; choose another --run-dir")
        lock_directory(self.path)
        aside = self._set_aside() if fresh and config.is_file() else None
        if config.is_file():
            self._check_same(config)
        else:
            versions = {"minidpost": __version__, "python": platform.python_version(), "torch": version("torch")}
            write_json(config, {"format": FORMAT, "settings": self.settings, "versions": versions})
        if aside:
            self.say(f"the run that was here is now {aside}")
        self.facts = self._finished_stages()
        remove_unfinished(self.path)
        for rest in list(self.path.rglob("*.progress")):
            if rest.with_suffix("").exists():  # a kill came between the stage's end and this
                shutil.rmtree(rest, ignore_errors=True)

    def _is_ours(self) -> bool:
        """Whether this is a run directory, or one that is empty but for what a run leaves that was killed at once."""
        if not self.path.is_dir():
            return False
        names = {path.name for path in self.path.iterdir() if not path.name.endswith(".unfinished")}
        if "config.json" not in names:
            return names <= {LOCK}
        try:  # a model's directory has a config.json too
            return "log.txt" in names or "settings" in read_json(self.path / "config.json")
        except (OSError, ValueError, TypeError):
            return False

    def _set_aside(self) -> Path:
        aside = next(p for n in count(1) if not (p := self.path.with_name(f"{self.path.name}.{n}")).exists())
        os.rename(self.path, aside)
        lock_directory(self.path)
        return aside

    def _check_same(self, config: Path) -> None:
        try:
            begun = read_json(config)
            begun_format, torch_then = begun.get("format", 1), begun.get("versions", {}).get("torch")
            begun, wanted = flat(begun["settings"]), flat(self.settings)
            differing = [name for name in {**wanted, **begun} if begun.get(name) != wanted.get(name)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{config} is not readable; choose another --run-dir, or --fresh") from None
        if begun_format != FORMAT:
            raise UserError(
                f"{self.path} is a run directory of format {begun_format}, this code writes format {FORMAT}; "
                "choose another --run-dir, or --fresh"
            )
        if differing:
            name = differing[0]
            raise UserError(
                f"{self.path} was begun with {name} = {begun.get(name)}, this command has {wanted.get(name)}; "
                "choose another --run-dir, or --fresh"
            )
        if torch_then != version("torch"):
            self.say(f"begun with torch {torch_then}, continued with {version('torch')}: rounding may differ")

    def _finished_stages(self) -> dict[str, dict]:
        """The facts of every stage that has its name, its files being those that it made."""
        path, found = self.path / "stages.jsonl", {}
        try:
            for _, row in read_jsonl(path) if path.is_file() else ():
                name = row.pop("stage")
                if (self.path / name).exists():  # noted before it has its name, a stage can lack it after a kill
                    found[name] = row
            made = {self.path / name / file: was for name, row in found.items() for file, was in row["sha256"].items()}
        except (KeyError, TypeError, ValueError, AttributeError, OSError):
            raise UserError(f"{path} was changed since it was written; restore it, or --fresh") from None
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets other threads run
            hashes = pool.map(lambda file: sha256_of(file) if file.is_file() else "missing", made)
            for (file, was), now in zip(made.items(), hashes, strict=True):
                if was != now:
                    change = "is missing" if now == "missing" else "was changed"
                    raise UserError(f"{file} {change} since its stage was finished; restore it, or --fresh")
        return found

    def stage(self, name: str, work: Callable[[Path], dict]) -> Path:
        """Do `work` on a temporary path that becomes the stage's when whole, and note facts and seconds; or skip it."""
        path = self.path / name
        if name in self.facts and path.exists():
            return path
        if path.exists():
            raise UserError(f"{path} is there, but stages.jsonl does not know of it; move it away, or --fresh")
        self.say(name)
        started = time.perf_counter()
        with staged_file(path) if path.suffix else staged_directory(path) as temporary:
            facts = work(temporary) | {"seconds": round(time.perf_counter() - started, 2)}
            files = [file for file in sorted([temporary, *temporary.rglob("*")]) if file.is_file()]
            facts["sha256"] = {str(file.relative_to(temporary)): sha256_of(file) for file in files}  # "." if it is one
            self.facts[name] = facts
            rows = ({"stage": stage, **facts} for stage, facts in self.facts.items())
            write_jsonl(self.path / "stages.jsonl", rows)  # before the stage takes its name: what is finished has facts
        shutil.rmtree(self.progress(name), ignore_errors=True)
        return path

    def progress(self, name: str) -> Path:
        """Where a stage keeps what it can be continued from: a directory, gone when the stage is finished."""
        return self.path / f"{name}.progress"

    def say(self, text: str) -> None:
        """One line on the terminal, between progress bars, and in log.txt."""
        line = f"{time.strftime('%H:%M:%S')} {text}"
        tqdm.write(line)
        sys.stdout.flush()  # a pipe would hold it back until the end
        with open(self.path / "log.txt", "a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def lock_directory(path: Path) -> None:
    """Make a directory this process's own until the process ends, however it ends; UserError where another has it.

    The lock file is never closed, nor opened again: this kind of lock would end with the first of its files closed.
    """
    path.mkdir(parents=True, exist_ok=True)
    handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{path}: another process is at work here; wait for it, or choose another --run-dir") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be locked ({error.strerror}); choose a --run-dir on another disk") from None
    if not (path / LOCK).exists() or not os.path.samestat(os.fstat(handle), os.stat(path / LOCK)):
        raise UserError(f"{path} was set aside by another process at this moment; run the command again")


def model_hash(directory: Path) -> str:
    """A short hash of a model's configuration, weights and vocabulary, by which a run knows its base again."""
    files = sorted(
        path for pattern in ("config.json", "*.safetensors", "**/*.model") for path in directory.glob(pattern)
    )
    names_and_hashes = [(str(path.relative_to(directory)), sha256_of(path)) for path in files]
    return hashlib.sha256(repr(names_and_hashes).encode()).hexdigest()[:16]


def flat(settings: dict) -> dict:
    """Settings with those of inner groups under dotted names, so that a complaint can name the one that differs."""
    pairs = {}
    for name, value in settings.items():
        pairs |= {f"{name}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {name: value}
    return pairs


class Chunks:
    """Rows committed a chunk at a time, each chunk a JSONL file in a directory; other settings have other files."""

    def __init__(self, directory: Path, *identity: object):
        self.directory, self.prefix = directory, fingerprint(*identity)[:16]

    def path(self, number: int) -> Path:
        return self.directory / f"{self.prefix}-{number:06d}.jsonl"

    def n_finished(self) -> int:
        """How many chunks there are, from the first."""
        return next(number for number in count() if not self.path(number).is_file())

    def commit(self, number: int, rows: Sequence[dict]) -> None:
        """Write a finished chunk."""
        write_jsonl(self.path(number), rows)

    def rows(self) -> Iterator[dict]:
        """The rows of all chunks."""
        for number in range(self.n_finished()):
            yield from (row for _, row in read_jsonl(self.path(number)))
