"""A small server that shows runs as they grow: GET of a few known addresses, never of a path in the file system.

    /                            the page, without questions
    /part/page                   its data; with the ETag of what the page has: 304 where nothing has changed
    /part/questions/0            the index of run 0's questions
    /part/block/0/3/VERSION      a block of them, of the version that the index names

It answers 127.0.0.1 alone unless another host is asked for, and there only requests that name it so: a foreign page
whose name was pointed at this machine gets nothing. It writes nothing and takes no lock.
"""

import hashlib
import re
import sys
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from minidpost.errors import UserError
from minidpost.page.document import page_data, plain_json, questions_data, read_runs, shell
from minidpost.page.questions import Questions, packed, read_questions
from minidpost.page.runs import Files, RunFiles, iterations_of

LOOPBACK = ("127.0.0.1", "localhost", "::1")
KEPT_VERSIONS = 2  # of a run's questions: the page may still ask for blocks of the one before
ROUTE = re.compile(r"/part/(?:(page)|questions/([0-9]{1,4})|block/([0-9]{1,4})/([0-9]{1,6})/([0-9a-f]{16}))")
QUESTION_FILES = (
    "samples-*.jsonl",
    "samples-*.jsonl.progress/*",
    "pairs.jsonl",
    "pseudo-labels.jsonl",
    "evaluation.json",
)


class Watched:
    """The runs that are watched, read anew where their files have changed."""

    def __init__(
        self,
        find: Callable[[], Sequence[Path]],
        *,
        benchmark: Path | None,
        data_dir: Path,
        evaluations: Sequence[Path] = (),
    ) -> None:
        """`find` gives the run directories; it is asked again and again, as runs may begin meanwhile.

        `evaluations` are files of eval.py.
        """
        self.find = find
        self.evaluations = evaluations
        self.benchmark = benchmark
        self.data_dir = data_dir
        self.files = Files()
        self.lock = threading.Lock()
        self._questions: dict[Path, dict[str, tuple[Questions, str]]] = {}  # by run and version, with the index

    def runs(self) -> list[RunFiles]:
        """All runs, each as far as it can be read."""
        return read_runs(self.find(), self.files, evaluations=self.evaluations)

    def data(self) -> dict[str, Any]:
        """The page's data as of now."""
        with self.lock:
            return page_data(self.runs(), benchmark=self.benchmark, files=self.files, is_watched=True)

    def page(self) -> str:
        """The page itself."""
        return "".join(shell(self.data()))

    def part(self, path: str) -> tuple[str, str] | None:
        """A part's JSON and its version, by its address; None where there is no such part."""
        match = ROUTE.fullmatch(path)
        if match is None:
            return None
        if match[1]:
            data = self.data()
            version = short_hash(plain_json({**data, "made": ""}))
            return plain_json(data), version
        with self.lock:
            runs = self.runs()
            index = int(match[2] or match[3])
            if index >= len(runs):
                return None
            if match[2]:
                version = self.questions(runs[index])
                return plain_json(self._questions[runs[index].path][version][1]), version
            known = self._questions.get(runs[index].path, {}).get(match[5])
            block = int(match[4])
            if known is None or block >= known[0].n_blocks:
                return None
            return plain_json(known[0].block(block)), f"{match[5]}-{block}"

    def questions(self, run: RunFiles) -> str:
        """Read a run's questions, unless none of their files has changed; returns their version."""
        version = short_hash(repr(versions_of_files(run)))
        known = self._questions.setdefault(run.path, {})
        if version not in known:
            n_notes = len(run.notes)
            questions = read_questions(run)
            content = questions_data(run, questions, self.data_dir)
            content |= {"version": version, "notes": run.notes[n_notes:]}
            while len(known) >= KEPT_VERSIONS:
                del known[next(iter(known))]
            known[version] = (questions, packed(content))
        return version


def versions_of_files(run: RunFiles) -> list[tuple[str, int, int]]:
    """Name, size and time of change of every file that a run's questions are read from."""
    paths = [measured.completions for measured in run.measured if measured.completions is not None]
    for directory in iterations_of(run.path):
        for pattern in QUESTION_FILES:
            paths += sorted(directory.glob(pattern))
    status = {path: path.stat() for path in paths}
    return [(str(path), status[path].st_size, status[path].st_mtime_ns) for path in paths]


def short_hash(text: str) -> str:
    """A short hash that tells one content from another."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def new_server(watched: Watched, host: str, port: int) -> ThreadingHTTPServer:
    """A server that listens already, on any free port for 0; UserError where it cannot."""

    class Handler(BaseHTTPRequestHandler):
        """Answers GET; every other method gets 501 from the base class."""

        server_version = "minidpost"
        sys_version = ""
        timeout = 30  # seconds that a client may be silent

        def do_GET(self) -> None:
            """The page, or a part of it."""
            if host in LOOPBACK and not self.names_this_machine():
                self.answer(403, "text/plain", "only requests to this machine's own name are answered\n")
                return
            path = self.path.partition("?")[0]
            try:
                if path == "/":
                    self.answer(200, "text/html", watched.page())
                    return
                part = watched.part(path)
            except (OSError, UserError) as error:  # a run was moved away at this moment
                self.answer(503, "text/plain", f"{error}\n")
                return
            if part is None:
                self.answer(404, "text/plain", "there is nothing here\n")
            elif self.headers.get("If-None-Match") == f'"{part[1]}"':
                self.answer(304, "application/json", "", version=part[1])
            else:
                self.answer(200, "application/json", part[0], version=part[1])

        def names_this_machine(self) -> bool:
            """Whether the request was sent to a name of this machine itself."""
            name = self.headers.get("Host", "").rpartition(":")[0] or self.headers.get("Host", "")
            return name.strip("[]") in LOOPBACK

        def answer(self, status: int, kind: str, content: str, version: str | None = None) -> None:
            """Send a whole answer."""
            body = content.encode("utf-8", "backslashreplace")
            self.send_response(status)
            self.send_header("Content-Type", f"{kind}; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.send_header("X-Content-Type-Options", "nosniff")
            self.send_header("X-Frame-Options", "DENY")
            self.send_header("Referrer-Policy", "no-referrer")
            if version is not None:
                self.send_header("ETag", f'"{version}"')
            self.end_headers()
            if status != 304:
                self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing: the terminal is for what goes wrong."""

    class Server(ThreadingHTTPServer):
        """Says what goes wrong in one line."""

        def handle_error(self, request: Any, client_address: Any) -> None:
            """Nothing where a client went away before it had its answer, which is usual; else the error."""
            error = sys.exc_info()[1]
            if not isinstance(error, ConnectionError | TimeoutError):
                print(f"report.py: {repr(error)[:200]}", file=sys.stderr)

    try:
        return Server((host, port), Handler)
    except OSError as error:
        raise UserError(f"--watch {port}: cannot listen on {host} ({error.strerror}); choose another port") from None
