"""A run's directory: claimed by one configuration, filled stage by stage, continued where it stopped.

A stage works under a temporary name and takes its own when it is whole; what has its final name is finished.
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

from minidpost import __version__
from minidpost.files import UserError, read_json, read_jsonl, staged_directory, staged_file, write_json, write_jsonl


class RunDirectory:
    """`config.json` (settings, versions), `stages.jsonl` (what each took and found), `log.txt`, the stages' files."""

    def __init__(self, path: Path, settings: dict):
        """Begin a run, or continue the one that was begun with the same settings; UserError names what differs."""
        self.path, self.settings = Path(path), json.loads(json.dumps(settings, default=str))
        config = self.path / "config.json"
        if config.is_file():
            self._check_same(config)
        elif self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            raise UserError(f"{path} exists and is no run directory; choose another --run-dir")
        else:
            versions = {"minidpost": __version__, "python": platform.python_version(), "torch": version("torch")}
            write_json(config, {"settings": self.settings, "versions": versions})
        stages = self.path / "stages.jsonl"
        self.facts = {row.pop("stage"): row for _, row in read_jsonl(stages)} if stages.is_file() else {}

    def _check_same(self, config: Path) -> None:
        try:
            begun, wanted = flat(read_json(config)["settings"]), flat(self.settings)
            differing = [name for name in {**wanted, **begun} if begun.get(name) != wanted.get(name)]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{config} is not readable; choose another --run-dir") from None
        if differing:
            name = differing[0]
            raise UserError(
                f"{self.path} was begun with {name} = {begun.get(name)}, this command has {wanted.get(name)}; "
                "choose another --run-dir"
            )

    def stage(self, name: str, work: Callable[[Path], dict]) -> Path:
        """Do `work` on a temporary path that becomes the stage's when whole, and note facts and seconds; or skip it."""
        path = self.path / name
        if path.exists():
            return path
        self.say(name)
        started = time.perf_counter()
        with staged_file(path) if path.suffix else staged_directory(path) as temporary:
            facts = work(temporary) | {"seconds": round(time.perf_counter() - started, 2)}
            self.facts[name] = facts
            rows = ({"stage": stage, **facts} for stage, facts in self.facts.items())
            write_jsonl(self.path / "stages.jsonl", rows)  # before the stage takes its name: what is finished has facts
        return path

    def say(self, text: str) -> None:
        """One line on the terminal, between progress bars, and in log.txt."""
        line = f"{time.strftime('%H:%M:%S')} {text}"
        tqdm.write(line)
        sys.stdout.flush()  # a pipe would hold it back until the end
        with open(self.path / "log.txt", "a", encoding="utf-8") as stream:
            stream.write(line + "\n")


def flat(settings: dict) -> dict:
    """Settings with those of inner groups under dotted names, so that a complaint can name the one that differs."""
    pairs = {}
    for name, value in settings.items():
        pairs |= {f"{name}.{inner}": v for inner, v in value.items()} if isinstance(value, dict) else {name: value}
    return pairs
