"""Output that survives a kill: what sample.py and eval.py have done so far, beside the file that they will write.

A job is a command with --output. While it is at work, and after a kill, there is a directory beside the output:

    answers.jsonl.progress/
      .lock                            held by the process at work
      job.json                         format, settings, versions, threads; in the end the hashes of the outputs
      0123…-000000-4567….jsonl …       finished chunks (run_directory.Chunks)

The same command goes on after the last finished chunk. The output gets its name when it is whole, and the directory
is removed then. A command with other settings is refused, unless it is to overwrite.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from minidpost.errors import UserError
from minidpost.selftraining.run_directory import (
    LOCK,
    Chunks,
    differing_names,
    flat,
    json_object,
    lock_directory,
    sha256_or_none,
    versions,
)
from minidpost.storage import remove_unfinished, sha256_of, to_disk, write_json

FORMAT = 1  # of a progress directory; raised when a job begun by older code could not be continued exactly
MAY_CHANGE = ("slots",)  # settings that results depend on by rounding at most
GOES_ON = "the same command continues from here"


class Job:
    """The unfinished `outputs` of one command, locked by this process until the process ends.

    `is_finished` says that the outputs are there already, all whole, as a kill between their naming and the end of the
    command leaves them. As a context, a job says of Ctrl-C and errors that the same command continues from here.
    """

    def __init__(self, outputs: Sequence[Path], settings: Mapping[str, Any], *, overwrite: bool = False) -> None:
        """Begin a job, or continue the one that was begun with the same settings; its progress is beside `outputs[0]`.

        With `overwrite`, an unfinished job of other settings is dropped, and outputs that are there are replaced when
        their successors are whole. UserError: an output is there already, another process is at work, the settings
        differ.
        """
        self.outputs = list(outputs)
        self.settings = json.loads(json.dumps(settings, default=str))  # as they will be read back
        self.path = progress_directory(self.outputs[0])
        self._config = self.path / "job.json"
        if self.path.exists() and not self._is_progress():
            raise UserError(f"{self.path} exists and is no job's progress; move it away, or choose another --output")

        # 1) The progress is this process's own. What is not of this job goes, or the command is refused.
        lock_directory(self.path, "--output")
        begun = self._begun_job(overwrite)
        finished = {} if begun is None else begun.get("outputs", {})
        foreign = [path for path in self.outputs if path.exists() and not _is_finished(path, finished)]
        if foreign and not overwrite:
            if begun is None:
                self.remove()
            raise UserError(f"{foreign[0]}: exists already; --overwrite replaces it")
        self.is_finished = begun is not None and not foreign and all(path.exists() for path in self.outputs)

        # 2) What a killed process was writing is of no use.
        remove_unfinished(self.path)
        for path in self.outputs:
            _remove_staged(path)
        if begun is None:
            self._write_config()

    def __enter__(self) -> "Job":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Note how to go on, for whoever reports the error (cli.run_command)."""
        if error is not None:
            error.add_note(GOES_ON)

    def chunks(self, *identity: object) -> Chunks:
        """The chunks of one part of the job."""
        return Chunks(self.path, *identity)

    def finish(self, writers: Mapping[Path, Callable[[Path], None]]) -> None:
        """Write each output, by a function of its temporary path; give all their names; remove the progress."""
        hashes = {}
        try:
            for path, write in writers.items():
                path.parent.mkdir(parents=True, exist_ok=True)
                write(_staged(path))
                to_disk(_staged(path))
                hashes[_key(path)] = sha256_of(_staged(path))
            self._write_config(outputs=hashes)  # so that after a kill the files are known to be this job's
            for path in writers:
                os.replace(_staged(path), path)
                to_disk(path.parent)
        finally:
            for path in writers:
                _remove_staged(path)
        self.remove()

    def remove(self) -> None:
        """Remove the progress, the lock last."""
        for path in [*self.path.glob("*.jsonl"), self._config, self.path / LOCK]:
            path.unlink(missing_ok=True)
        shutil.rmtree(self.path, ignore_errors=True)

    # -- beginning and continuing -------------------------------------------------------------------------------------

    def _is_progress(self) -> bool:
        """Whether this is a job's progress, or a directory that is empty but for what a job leaves that was killed."""
        if not self.path.is_dir():
            return False
        names = {path.name for path in self.path.iterdir() if not path.name.endswith(".unfinished")}
        return "job.json" in names or names <= {LOCK}

    def _begun_job(self, overwrite: bool) -> dict[str, Any] | None:
        """What job.json holds; None where nothing was begun, or what was begun has just been dropped.

        UserError where it is broken, or of another format or other settings, and not to be overwritten.
        """
        if not self._config.is_file():
            return None
        try:
            content = json_object(self._config)
            self._check(content)
        except UserError:
            if not overwrite:
                raise
        except (OSError, ValueError, LookupError, TypeError, AttributeError):
            if not overwrite:
                raise UserError(f"{self._config} is not readable; --overwrite begins anew") from None
        else:
            return content
        for path in [*self.path.glob("*.jsonl"), self._config]:
            path.unlink(missing_ok=True)
        return None

    def _check(self, content: dict[str, Any]) -> None:
        """UserError where a job was begun by another format or with other settings; what may differ is a warning."""
        if content["format"] != FORMAT:
            raise UserError(
                f"{self.path} is of format {content['format']}, this code writes format {FORMAT}; "
                "--overwrite begins anew"
            )
        old_settings = flat(content["settings"])
        new_settings = flat(self.settings)
        for name in differing_names(old_settings, new_settings):
            change = f"was begun with {name} = {old_settings.get(name)}, this command has {new_settings.get(name)}"
            if name not in MAY_CHANGE:
                raise UserError(f"{self.path} {change}; --overwrite begins anew")
            warnings.warn(f"{self.path} {change}: rounding may differ", stacklevel=2)
        for name, old, new in [
            ("torch", content["versions"]["torch"], versions()["torch"]),
            ("threads", content["threads"], torch.get_num_threads()),
        ]:
            if old != new:
                warnings.warn(
                    f"{self.path} was begun with {name} = {old}, now {new}: rounding may differ", stacklevel=2
                )

    def _write_config(self, outputs: Mapping[str, str] | None = None) -> None:
        content = {
            "format": FORMAT,
            "settings": self.settings,
            "versions": versions(),
            "threads": torch.get_num_threads(),  # on a CPU also how many processes sample side by side
        }
        write_json(self._config, content if outputs is None else {**content, "outputs": outputs})


def progress_directory(output: Path) -> Path:
    """Where the progress of a job lies whose first output this is."""
    return output.with_name(output.name + ".progress")


def begun_setting(output: Path, name: str, others: Mapping[str, Any]) -> Any:
    """A setting of the unfinished job whose first output this is.

    None where there is none, it cannot be read, or its settings but for this one are not `others` (those that may
    change aside): such a job is not continued.
    """
    try:
        begun = json_object(progress_directory(output) / "job.json")["settings"]
        differing = differing_names(flat(begun), flat(json.loads(json.dumps(others))))
        return begun[name] if {*differing} <= {name, *MAY_CHANGE} else None
    except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return None


def _staged(path: Path) -> Path:
    """The temporary name of an output. The job's lock keeps others away from it."""
    return path.with_name(f".{path.name}.unfinished")


def _remove_staged(path: Path) -> None:
    """Remove what was written for an output, also by a function that stages again, under a name beside that one."""
    staged = _staged(path)
    for leftover in [*path.parent.iterdir()] if path.parent.is_dir() else []:
        if leftover.name.startswith((staged.name, f".{staged.name}.")):
            leftover.unlink(missing_ok=True)


def _key(path: Path) -> str:
    """An output's name in job.json."""
    return str(path.absolute())


def _is_finished(path: Path, hashes: Mapping[str, str]) -> bool:
    """Whether an output is the one that the job with these hashes gave its name."""
    return _key(path) in hashes and sha256_or_none(path) == hashes[_key(path)]
