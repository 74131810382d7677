"""Files that are whole or absent: JSONL in and out, and stages that take their final name only when finished.

What is read may be anything: a line and a JSON file have a greatest length, beyond which nothing more is read.
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
from typing import BinaryIO

from minidpost.errors import UserError

MAX_LINE_BYTES = 2**22  # of a line of JSONL or of a text of questions; GSM8K's longest has two thousand
MAX_JSON_BYTES = 2**26  # of a file that is one JSON value; the longest we know, a vocabulary, has nine million


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict]]:
    """Yield (line number from 1, object) for each non-blank line; UserError names the file and the broken line."""
    try:
        stream = open(path, "rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    with stream:
        yield from parse_jsonl(bounded_lines(stream, str(path)), str(path))


def bounded_lines(stream: BinaryIO, name: str) -> Iterator[bytes]:
    """The lines of a stream, without a byte order mark; UserError at one above MAX_LINE_BYTES, never held whole."""
    number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise UserError(f"{name}, line {number}: longer than the {MAX_LINE_BYTES:,} bytes that a line may have")
        yield line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def parse_jsonl(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, dict]]:
    """`read_jsonl` of lines that are open already; `name` begins every complaint.

    Refused: broken UTF-8, half a surrogate pair, brackets nested beyond Python's recursion limit, integers of more than
    4,300 digits. Of two values of one key the last counts; NaN and Infinity are numbers, as Python writes them.
    """
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line.decode("utf-8"))
            if b"\\ud" in line.lower():  # half a surrogate pair is valid JSON, but no text that could be written again
                json.dumps(row, ensure_ascii=False).encode("utf-8")
        except (ValueError, RecursionError) as error:
            reason = str(error).partition(";")[0]
            raise UserError(f"{name}, line {number}: not a JSON object in UTF-8 ({reason:.100})") from None
        if not isinstance(row, dict):
            raise UserError(f"{name}, line {number}: a JSON object is expected, found {type(row).__name__}")
        yield number, row


def read_json(path: Path) -> object:
    """The value in a JSON file; OSError if it cannot be read, ValueError if it is broken or above MAX_JSON_BYTES."""
    with open(path, "rb") as stream:
        content = stream.read(MAX_JSON_BYTES + 1)
    if len(content) > MAX_JSON_BYTES:
        raise ValueError(f"longer than {MAX_JSON_BYTES:,} bytes")
    try:
        return json.loads(content.decode("utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def write_jsonl(path: str | Path, rows: Iterable[dict]) -> None:
    """Write one object a line, under a temporary name until the file is whole."""
    with staged_file(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def write_json(path: str | Path, value: object) -> None:
    """Write indented JSON, under a temporary name until the file is whole."""
    with staged_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def staged_file(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`; it takes the final name when the block ends without an error.

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
    """Give an empty directory `path.unfinished`; it takes the final name when the block ends without an error."""
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
    """Remove the temporary names that killed processes left anywhere in a directory, where nobody may be at work."""
    for rest in list(directory.rglob("*.unfinished")):
        if rest.is_dir():
            shutil.rmtree(rest, ignore_errors=True)
        else:
            rest.unlink(missing_ok=True)


def to_disk(path: Path) -> None:
    """Wait until a file's content, or the names in a directory, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with open(path, "rb", buffering=0) as stream:
        while size := stream.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def no_room(error: Exception) -> str | None:
    """What the system said where the disk, a quota or a size limit has no room left; None for any other error.

    safetensors passes the system's error on as a text of its own.
    """
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    return os.strerror(number) if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else None


def markdown_table(heads: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose columns line up in a terminal too."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)) + " |"

    return "\n".join([line(heads), line(["-" * width for width in widths]), *map(line, rows)])
