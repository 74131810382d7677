"""find_model in a process that has not imported huggingface_hub yet, as in a command; torch is imported only once.

The processes are forked from one that has imported all else (multiprocessing's forkserver), as torch alone takes two
seconds of each.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from minidpost.errors import UserError
from minidpost.models import hub

PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["minidpost.models.hub"])


def find_models(environment: Mapping[str, str], folder: Path, names: Sequence[str]) -> subprocess.CompletedProcess:
    """Call find_model for each name: a line on one of the streams for each, and status 1 where one fails."""
    with tempfile.TemporaryDirectory() as streams:
        paths = [Path(streams, name) for name in ("out", "err")]
        process = PROCESSES.Process(target=_find, args=(dict(environment), folder, list(names), paths))
        process.start()
        process.join(300)
        if process.exitcode is None:
            process.kill()
        texts = [path.read_text(encoding="utf-8") if path.exists() else "" for path in paths]
        return subprocess.CompletedProcess(names, process.exitcode, *texts)


def _find(environment: dict[str, str], folder: Path, names: list[str], streams: list[Path]) -> None:
    """What the process does."""
    os.environ.clear()
    os.environ.update(environment)
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    assert "huggingface_hub" not in sys.modules
    has_failed = False
    for name in names:
        try:
            print(hub.find_model(name, folder), flush=True)
        except UserError as error:
            print(f"UserError: {error}", file=sys.stderr, flush=True)
            has_failed = True
    sys.exit(has_failed)
