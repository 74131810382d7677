"""Atomic writes (a file or directory is whole or absent), JSON and JSONL in and out, Markdown tables.

What is read may be anything, so that a line and a JSON file have a greatest length, beyond which nothing more is read.
"""

import codecs
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from minidpost.errors import UserError

MAX_LINE_BYTES = 2**22  # in a line of JSONL or of a text of questions; GSM8K's longest has two thousand
MAX_JSON_BYTES = 2**26  # in a file that is one JSON value; the longest we know, a vocabulary, has nine million


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number from 1, object) for each non-blank line; UserError names the file and the broken line."""
    try:
        stream = open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    with stream:
        yield from parse_jsonl(bounded_lines(stream, str(path)), str(path))


def bounded_lines(stream: BinaryIO, name: str) -> Iterator[bytes]:
    """Yield the lines of a stream, without a byte order mark.

    UserError at a line longer than MAX_LINE_BYTES, which is never held whole; `name` begins the message.
    """
    line_number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        line_number += 1
        if len(line) > MAX_LINE_BYTES:
            raise UserError(
                f"{name}, line {line_number}: longer than the {MAX_LINE_BYTES:,} bytes that a line may have"
            )
        yield line.removeprefix(codecs.BOM_UTF8) if line_number == 1 else line


def parse_jsonl(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """`read_jsonl` of lines that have been read already; `name` begins every message.

    Refused: broken UTF-8, half a surrogate pair, brackets nested beyond Python's recursion limit, integers of more than
    4,300 digits. Of two values of one key the last counts; NaN and Infinity are numbers, as Python writes them.
    """
    for line_number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line.decode("utf-8"))
            if b"\\ud" in line.lower():  # half a surrogate pair is valid JSON, but no text that could be written again
                json.dumps(record, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as error:
            reason = str(error).partition(";")[0]
            raise UserError(f"{name}, line {line_number}: not a JSON object in UTF-8 ({reason:.100})") from None
        if not isinstance(record, dict):
            raise UserError(f"{name}, line {line_number}: a JSON object is expected, found {type(record).__name__}")
        yield line_number, record


def read_json(path: Path) -> object:
    """The value in a JSON file; OSError if it cannot be read, ValueError if it is broken or above MAX_JSON_BYTES."""
    with open(path, "rb") as stream:
        content = stream.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"longer than {MAX_JSON_BYTES:,} bytes")
    try:
        value: object = json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return value


def write_jsonl(path: str | Path, records: Iterable[dict[str, Any]]) -> None:
    """Write one object a line, atomically."""
    with staged_file(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for record in records:
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def write_json(path: str | Path, value: object) -> None:
    """Write indented JSON, atomically; a list of numbers is one line, however long."""
    indented = json.dumps(value, indent=2, ensure_ascii=False)
    # A string holds no line break as such, so that only lists of numbers match.
    compact = re.sub(r"\[\n([-+.,\s\deE]+)\n *\]", lambda match: f"[{' '.join(match[1].split())}]", indented)
    with staged_file(path) as temporary:
        temporary.write_text(compact + "\n", encoding="utf-8")


@contextmanager
def staged_file(path: str | Path) -> Iterator[Path]:
    """Write a file atomically: give a temporary path beside `path`, renamed to it when the block ends without an error.

    The content is on the disk before the name is, so that even a power cut leaves the old file or the new one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        yield temporary
        to_disk(temporary)
        os.replace(temporary, path)
        to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def staged_directory(path: str | Path) -> Iterator[Path]:
    """Fill a directory atomically: give an empty `path.unfinished`, renamed when the block ends without an error.

    After an error it keeps its temporary name; the next call empties it.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    yield temporary
    for inner in (*temporary.rglob("*"), temporary):
        to_disk(inner)
    os.replace(temporary, path)
    to_disk(path.parent)


def remove_unfinished(directory: Path) -> None:
    """Remove the temporary files and directories that killed processes left below a directory.

    No other process may be writing there.
    """
    for path in list(directory.rglob("*.unfinished")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a directory, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(2**20))
    with open(path, "rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def no_room(error: Exception) -> str | None:
    """The system's message where an error says that no space is left, on a disk or in a limit; None for others."""
    code = error.errno if isinstance(error, OSError) else None
    if code is None:
        found = re.search(r"\(os error (\d+)\)", str(error))  # safetensors puts the system's error into a text
        code = int(found[1]) if found else None
    if code not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return None
    return os.strerror(code)


def markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(heads), line(["-" * width for width in widths]), *map(line, rows)])
