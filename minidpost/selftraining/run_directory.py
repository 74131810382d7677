"""A run's directory: claimed by one process and one configuration, filled stage by stage, continued where it stopped.

A stage writes under a temporary name and takes its own when it is whole (storage.py). What has its final name is
finished, and is listed with its files' hashes in stages.jsonl. What an unfinished stage is continued from lies beside
it in NAME.progress:

    config.json                           format, settings, versions
    stages.jsonl                          {"stage": "iteration-1/pairs.jsonl", "pairs": 9, "seconds": 0.4, "sha256": …}
    log.txt                               what the terminal showed between progress bars
    iteration-1/pairs.jsonl               a finished stage: a file, or a directory such as iteration-1/dpo
    iteration-1/dpo.unfinished/           a stage at work, under its temporary name
    iteration-1/dpo.progress/             what that stage is continued from
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import sys
import time
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from minidpost.errors import UserError
from minidpost.models.weights import tokenizer_files
from minidpost.processes import from_rank_0, on_rank_0, rank, world_size
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

FORMAT = 5  # of everything in a run directory; raised when a run begun by older code could not be continued exactly
LOCK = ".lock"


@dataclass
class Stage:
    """A stage at work: the temporary path that it writes (a file or an empty directory), and what it reports."""

    path: Path
    metadata: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedStage:
    """What a stage will cost: its floating-point operations (estimated), and the sort of work that they are.

    Each sort has its own number of operations a second. None: a stage that only sorts what others have made.
    """

    work: Literal["training", "inference"] | None = None  # inference: sampling and evaluation
    flops: float = 0.0


class RunDirectory:
    """The directory of one run, locked by this process until the process ends; of several processes by rank 0.

    All of them call the same methods at the same points. Rank 0 looks, decides and writes; the others wait for it.

    `settings` are what makes a run the same run; `stages` has the metadata of every finished stage by name: what the
    stage reported, its `seconds`, and `sha256`, the hash of each of its files, of which some may be `removed`. Of a
    stage that was taken up after a kill the seconds are those since then, and it is marked as `continued`.
    `planned` are all stages of the run by name, in order, where they are known: they say where the run stands.
    """

    def __init__(
        self,
        path: Path,
        settings: Mapping[str, Any],
        fresh: bool = False,
        *,
        may_change: Collection[str] = (),
        device: str = "cpu",
    ) -> None:
        """Begin a run, or continue the one that was begun with the same settings; `fresh` renames that one first.

        Settings in `may_change` (dotted names, such as "preset.slots") may differ when a run is continued, and so may
        the kind of `device`: it is logged, and config.json has the new ones from then on. To continue reads all
        finished files, to compare their hashes: about a second a gigabyte and core.
        UserError: another process works here, the settings or the format differ, a finished file was changed.
        """
        self.path = Path(path)
        self.planned: Mapping[str, PlannedStage] = {}
        self.device = torch.device(device).type
        self.settings = json.loads(json.dumps(settings, default=str))  # as they will be read back
        self.stages = on_rank_0(lambda: self._claim(fresh, may_change))

    # -- stages -------------------------------------------------------------------------------------------------------

    def is_finished(self, name: str) -> bool:
        """Whether a stage has its final name; UserError where something has that name which no stage wrote."""
        return on_rank_0(lambda: self._is_finished(name))

    def _is_finished(self, name: str) -> bool:
        path = self.path / name
        if path.exists() and name not in self.stages:
            raise UserError(f"{path} is there, but stages.jsonl does not know of it; move it away, or --fresh")
        return path.exists()

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Give a stage a temporary path, which takes the stage's name when the block ends without an error.

        A name with a suffix is that of a file, any other that of a directory. What rank 0 reports of the stage is what
        counts.
        """
        if rank() == 0:
            with self._stage(name) as stage:
                from_rank_0(stage.path)
                yield stage
        else:
            stage = Stage(from_rank_0(Path()))
            yield stage
        self.stages[name] = from_rank_0(stage.metadata)

    @contextmanager
    def _stage(self, name: str) -> Iterator[Stage]:
        path = self.path / name
        self.log(f"{name}{self._standing(name)}")
        is_continued = self.progress(name).exists()
        started = time.perf_counter()
        with staged_file(path) if path.suffix else staged_directory(path) as temporary:
            stage = Stage(temporary)
            yield stage
            metadata = stage.metadata
            metadata["seconds"] = round(time.perf_counter() - started, 2)
            if is_continued:
                metadata["continued"] = True
            metadata["sha256"] = file_hashes(temporary)
            # The metadata is written before the stage takes its name, so that whatever is finished has some.
            self.stages[name] = metadata
            self._write_stages()
        shutil.rmtree(self.progress(name), ignore_errors=True)

    def remove_weights(self, name: str) -> None:
        """Remove the weights of a finished stage that is a model's directory; it stays finished."""
        files = [file for file in self.stages[name]["sha256"] if is_weights(file)]
        if self.stages[name].get("removed") == files:
            return
        self.stages[name]["removed"] = files
        if rank() == 0:
            self._write_stages()  # first, so that after a kill the files are known to be missing rightly
            for file in files:
                (self.path / name / file).unlink()
            self.log(f"removed the weights of {name}")

    def _write_stages(self) -> None:
        write_jsonl(self.path / "stages.jsonl", [{"stage": key, **value} for key, value in self.stages.items()])

    def progress(self, name: str) -> Path:
        """The directory of what an unfinished stage can be continued from; it is removed when the stage is finished."""
        return self.path / f"{name}.progress"

    def _standing(self, name: str) -> str:
        """Where the run stands when a stage begins: ` (stage 7 of 10, 12 min so far, about 5 min left)`.

        While what is left cannot be estimated (`seconds_left`), it is not told.
        """
        if name not in self.planned:
            return ""
        parts = [f"stage {list(self.planned).index(name) + 1} of {len(self.planned)}"]
        if self.stages:
            parts.append(f"{duration(sum(metadata['seconds'] for metadata in self.stages.values()))} so far")
        left = seconds_left(self.planned, self.stages)
        if left is not None:
            parts.append(f"about {duration(left)} left")
        return f" ({', '.join(parts)})"

    def log(self, text: str) -> None:
        """Write one line to the terminal, between progress bars, and to log.txt."""
        if rank() > 0:
            return
        line = f"{time.strftime('%H:%M:%S')} {text}"
        tqdm.write(line)
        sys.stdout.flush()  # a pipe would hold it back until the end
        with open(self.path / "log.txt", "a", encoding="utf-8") as stream:
            stream.write(line + "\n")

    # -- beginning and continuing -------------------------------------------------------------------------------------

    def _claim(self, fresh: bool, may_change: Collection[str]) -> dict[str, dict[str, Any]]:
        """Lock the directory, and begin or continue its run; gives the metadata of the finished stages."""
        config = self.path / "config.json"
        if self.path.exists() and not self._is_run_directory():
            raise UserError(f"{self.path} exists and is no run directory; choose another --run-dir")

        lock_directory(self.path)
        if fresh and config.is_file():
            old_run = self._rename_old_run()
            self._write_config(config)
            self.log(f"the run that was here is now {old_run}")
        elif config.is_file():
            self._check_config(config, may_change)
        else:
            self._write_config(config)

        stages = self._finished_stages()
        remove_unfinished(self.path)
        for progress in list(self.path.rglob("*.progress")):
            if progress.with_suffix("").exists():  # a kill came between the stage's end and the removal
                shutil.rmtree(progress, ignore_errors=True)
        return stages

    def _is_run_directory(self) -> bool:
        """Whether this is a run directory, or one that is empty but for what a run leaves that was killed at once."""
        if not self.path.is_dir():
            return False
        names = {path.name for path in self.path.iterdir() if not path.name.endswith(".unfinished")}
        if "config.json" not in names:
            return names <= {LOCK}
        try:  # a model's directory has a config.json too
            return "log.txt" in names or "settings" in json_object(self.path / "config.json")
        except (OSError, ValueError, TypeError):
            return False

    def _rename_old_run(self) -> Path:
        """Rename the run that is here to the first of NAME.1, NAME.2, … that is free, and claim the directory anew."""
        index = 1
        while self.path.with_name(f"{self.path.name}.{index}").exists():
            index += 1
        new_path = self.path.with_name(f"{self.path.name}.{index}")
        os.rename(self.path, new_path)
        lock_directory(self.path)
        return new_path

    def _write_config(self, config: Path) -> None:
        content = {
            "format": FORMAT,
            "settings": self.settings,
            "versions": versions(),
            "threads": torch.get_num_threads(),  # on a CPU also how many processes sample side by side
            "processes": world_size(),
            "device": self.device,
        }
        write_json(config, content)

    def _check_config(self, config: Path, may_change: Collection[str]) -> None:
        """UserError where the run that is here was begun by another format or with other settings.

        Those that may change are logged and written.
        """
        try:
            content = json_object(config)
            old_format = content.get("format", 1)  # the first format was not numbered
            old_torch = content.get("versions", {}).get("torch")
            old_threads = content.get("threads")
            old_processes = content.get("processes", 1)
            old_device = content.get("device", self.device)  # earlier runs did not record it
            old_settings = flat(content["settings"])
            new_settings = flat(self.settings)
            differing = differing_names(old_settings, new_settings)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{config} is not readable; choose another --run-dir, or --fresh") from None
        if old_format != FORMAT:
            raise UserError(
                f"{self.path} is a run directory of format {old_format}, this code writes format {FORMAT}; "
                "choose another --run-dir, or --fresh"
            )
        for name in differing:
            if name not in may_change:
                raise UserError(
                    f"{self.path} was begun with {name} = {old_settings.get(name)}, "
                    f"this command has {new_settings.get(name)}; choose another --run-dir, or --fresh"
                )
        for name in differing:
            self.log(f"continued with {name} = {new_settings[name]}, which was {old_settings.get(name)}")
        if old_device != self.device:
            self.log(f"continued on {self.device}, which was {old_device}: rounding and dropout may differ")
        if differing or old_device != self.device:
            content["settings"] = self.settings
            content["device"] = self.device
            write_json(config, content)
        if old_torch != version("torch"):
            self.log(f"begun with torch {old_torch}, continued with {version('torch')}: rounding may differ")
        if old_threads != torch.get_num_threads():
            self.log(f"begun with {old_threads} threads, continued with {torch.get_num_threads()}: rounding may differ")
        if old_processes != world_size():
            self.log(
                f"begun with {old_processes} processes, continued with {world_size()}: rounding and dropout differ"
            )

    def _finished_stages(self) -> dict[str, dict[str, Any]]:
        """The metadata of every stage that has its final name; UserError where a file of one was changed."""
        path = self.path / "stages.jsonl"
        stages: dict[str, dict[str, Any]] = {}
        expected_sha256: dict[Path, str] = {}
        try:
            for _, metadata in read_jsonl(path) if path.is_file() else ():
                name = metadata.pop("stage")
                if (self.path / name).exists():  # a kill between the writing of the metadata and the renaming
                    stages[name] = metadata
            for name, metadata in stages.items():
                removed = metadata.get("removed", ())
                for file, sha256 in metadata["sha256"].items():
                    if file not in removed:
                        expected_sha256[self.path / name / file] = sha256
                for file in removed:
                    if is_weights(file):
                        (self.path / name / file).unlink(missing_ok=True)  # a kill came before that
        except (KeyError, TypeError, ValueError, AttributeError, OSError):
            raise UserError(f"{path} was changed since it was written; restore it, or --fresh") from None

        with ThreadPoolExecutor(os.cpu_count()) as pool:  # hashing lets other threads run
            all_actual_sha256 = pool.map(sha256_or_none, expected_sha256)
            for (file, expected), actual in zip(expected_sha256.items(), all_actual_sha256, strict=True):
                if actual != expected:
                    change = "is missing" if actual is None else "was changed"
                    raise UserError(f"{file} {change} since its stage was finished; restore it, or --fresh")
        return stages


def finished_names(path: Path) -> set[str]:
    """The names of the stages that a run has finished, without claiming its directory.

    Empty where no run is, or one that cannot be read: RunDirectory says what is wrong. Hashes are not compared here.
    """
    try:
        names = [record["stage"] for _, record in read_jsonl(path / "stages.jsonl")]
        return {name for name in names if (path / name).exists()}
    except (UserError, TypeError, KeyError, AttributeError):
        return set()


def kind_of(stage: str) -> str:
    """What a stage is in every iteration: `sft` for iteration-2/sft."""
    return stage.partition("/")[2] or stage


def seconds_left(planned: Mapping[str, PlannedStage], finished: Mapping[str, Mapping[str, Any]]) -> float | None:
    """How long the planned stages that are not finished will take, by those that are; None where nothing says it.

    `finished` is the metadata of finished stages by name. A stage takes as long as the latest of its kind, such as
    iteration-1/sft for iteration-2/sft, in proportion to their operations. Before there is one, its operations are
    taken to need the time that those of all finished stages of the same sort of work needed, and stages that are no
    such work to need none. A stage that was continued after a kill does not count, as only a part of its time is known;
    nor, but for its own kind, one that had nothing to do (DPO without pairs).
    """
    latest: dict[str, str] = {}  # finished stage by kind
    seconds: dict[str | None, float] = {}  # by the sort of work
    flops: dict[str | None, float] = {}
    for name, stage in planned.items():
        if name not in finished or finished[name].get("continued"):
            continue
        latest[kind_of(name)] = name
        if stage.flops and finished[name].get("flops") != 0:
            seconds[stage.work] = seconds.get(stage.work, 0.0) + finished[name]["seconds"]
            flops[stage.work] = flops.get(stage.work, 0.0) + stage.flops

    left = 0.0
    for name, stage in planned.items():
        if name in finished:
            continue
        earlier = latest.get(kind_of(name))
        if earlier is not None:
            # What has no operations takes as long as it did.
            ratio = stage.flops / planned[earlier].flops if planned[earlier].flops else 1.0
            left += ratio * finished[earlier]["seconds"]
        elif stage.work in flops:
            left += stage.flops * seconds[stage.work] / flops[stage.work]
        elif stage.work is not None:
            return None
    return left


def duration(seconds: float) -> str:
    """A time as a person says it: 40 s, 12 min, 3.4 h."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


def is_weights(file: str) -> bool:
    """Whether a file of a model's directory, by relative name, has weights of the model; adapters are no such."""
    return file.endswith(".safetensors") and "/" not in file


def file_hashes(path: Path) -> dict[str, str]:
    """The SHA-256 of each file of a directory by relative name; of a file alone, under the name "."."""
    files = [file for file in sorted([path, *path.rglob("*")]) if file.is_file()]
    return {str(file.relative_to(path)): sha256_of(file) for file in files}


def sha256_or_none(path: Path) -> str | None:
    """The SHA-256 of a file, or None where there is no such file."""
    return sha256_of(path) if path.is_file() else None


def json_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; TypeError where it holds another value, OSError and ValueError as `read_json`."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise TypeError(f"{path}: a JSON object is expected")
    return content


def lock_directory(path: Path, flag: str = "--run-dir") -> None:
    """Make a directory this process's own until the process ends, however it ends; UserError where another has it.

    The message names the `flag` that the directory comes from. The lock file is never closed, nor opened again: this
    kind of lock would end with the first of its files closed.
    """
    path.mkdir(parents=True, exist_ok=True)
    handle = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"{path}: another process is at work here; wait for it, or choose another {flag}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be locked ({error.strerror}); choose a {flag} on another disk") from None
    if not (path / LOCK).exists() or not os.path.samestat(os.fstat(handle), os.stat(path / LOCK)):
        raise UserError(f"{path} was renamed by another process at this moment; run the command again")


def model_hash(directory: Path) -> str:
    """A short hash that identifies a model: of its configuration, weights and tokenizer."""
    paths = [directory / "config.json", *directory.glob("*.safetensors"), *tokenizer_files(directory)]
    names_and_hashes = [(str(path.relative_to(directory)), sha256_of(path)) for path in sorted(paths)]
    return hashlib.sha256(repr(names_and_hashes).encode()).hexdigest()[:16]


def versions() -> dict[str, str]:
    """The versions of everything that results may depend on."""
    return {"minidpost": __version__, "python": platform.python_version(), "torch": version("torch")}


def differing_names(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The names of the settings, already flat, that two commands do not have in common."""
    return [name for name in {**new, **old} if old.get(name) != new.get(name)]


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with those of inner groups under dotted names, so that an error can name the one that differs.

    {"seed": 1, "preset": {"beta": 0.1}} gives {"seed": 1, "preset.beta": 0.1}.
    """
    result: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, dict):
            for inner_name, inner_value in value.items():
                result[f"{name}.{inner_name}"] = inner_value
        else:
            result[name] = value
    return result


class Chunks:
    """Records saved a chunk at a time, each chunk a JSONL file of one directory.

    `identity` is what the records depend on (stage, settings, …): chunks of another identity have other names, and are
    neither read nor overwritten. A chunk's name ends in a hash of its content. A chunk that is not what was written
    counts as missing, which is a warning.
    """

    def __init__(self, directory: Path, *identity: object) -> None:
        """Find the chunks that are there, and read them all to compare their hashes: about a second a gigabyte."""
        self.directory = directory
        self.prefix = fingerprint(*identity)[:16]
        self.n_records = 0  # in the finished chunks
        self._paths: dict[int, Path] = {}  # of the finished chunks, by index
        for path in sorted(directory.glob(f"{self.prefix}-*.jsonl")):
            content = path.read_bytes()
            chunk_index = self._index_of(path, content)
            if chunk_index is None:
                warnings.warn(f"{path} was changed since it was written; its part is done again", stacklevel=2)
                path.unlink(missing_ok=True)  # several processes may see it
            elif chunk_index == len(self._paths):  # none is missing before it
                self._paths[chunk_index] = path
                self.n_records += content.count(b"\n")

    def n_finished(self) -> int:
        """How many chunks there are, counted from the first without a gap."""
        return len(self._paths)

    def chunk_size(self, default: int) -> int:
        """The records of a chunk: what the first finished one has, so that the others continue it, else the default."""
        return self._paths[0].read_bytes().count(b"\n") if self._paths else default

    def where_to_go_on(self, default_size: int) -> tuple[int, int]:
        """The first chunk that is missing, and the records of a chunk."""
        return self.n_finished(), self.chunk_size(default_size)

    def commit(self, chunk_index: int, records: Sequence[dict[str, Any]]) -> None:
        """Write a finished chunk, which replaces another of this index and all later ones: they are to come anew."""
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        content = "".join(lines).encode("utf-8")
        for old_path in self.directory.glob(f"{self.prefix}-*.jsonl"):
            if int(old_path.name.split("-")[1]) >= chunk_index:
                old_path.unlink()
        path = self.directory / f"{self.prefix}-{chunk_index:06d}-{content_hash(content)}.jsonl"
        with staged_file(path) as temporary:
            temporary.write_bytes(content)
        if chunk_index == len(self._paths):
            self._paths[chunk_index] = path
            self.n_records += len(lines)

    def save(self, records: Iterable[dict[str, Any]], chunk_size: int) -> None:
        """Write the records that come after the finished chunks, `chunk_size` of them a chunk, as they come."""
        remaining = iter(records)
        while chunk := list(islice(remaining, chunk_size)):
            self.commit(self.n_finished(), chunk)

    def files(self) -> list[Path]:
        """The files of all finished chunks, in order."""
        return [self._paths[chunk_index] for chunk_index in range(self.n_finished())]

    def records(self) -> Iterator[dict[str, Any]]:
        """The records of all finished chunks, in order."""
        for path in self.files():
            for _, record in read_jsonl(path):
                yield record

    def _index_of(self, path: Path, content: bytes) -> int | None:
        """The index of a chunk by its file's name; None where the name's hash is not that of the content."""
        match = re.fullmatch(rf"{self.prefix}-(\d+)-([0-9a-f]+)\.jsonl", path.name)
        if match is None or match[2] != content_hash(content):
            return None
        return int(match[1])


def content_hash(content: bytes) -> str:
    """A short hash of what a chunk holds, which is a part of its file's name."""
    return hashlib.sha256(content).hexdigest()[:16]
