"""JSONL in and out, and files that are whole or absent."""

import json
import os
import tracemalloc
from pathlib import Path

import pytest

from minidpost.errors import UserError
from minidpost.storage import (
    MAX_LINE_BYTES,
    read_json,
    read_jsonl,
    staged_directory,
    staged_file,
    write_json,
    write_jsonl,
)


def test_jsonl_round_trip_with_line_numbers(tmp_path):
    rows = [{"text": "zwölf ½ \u2028 \n 🍎"}, {"n": [1, 2.5, None]}]
    write_jsonl(tmp_path / "new" / "a.jsonl", iter(rows))
    assert list(read_jsonl(tmp_path / "new" / "a.jsonl")) == [(1, rows[0]), (2, rows[1])]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.jsonl"]


def test_blank_lines_are_skipped_but_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"a": 1}\r\n  \n{"a": 2}')
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [(2, {"a": 1}), (4, {"a": 2})]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b"{", "not a JSON object"),
        (b'{"a": 1} 2', "not a JSON object"),
        (b'{"a": "\xff"}', "not a JSON object in UTF-8"),
        (b'{"a": "\\ud83c"}', "not a JSON object in UTF-8"),
        (b'{"a": "\\uDF4e"}', "not a JSON object in UTF-8"),
        (b'{"a": "\0"}', "not a JSON object in UTF-8 (Invalid control character"),
        (bytes(100), "not a JSON object in UTF-8"),
        ('{"a": 1}'.encode("utf-16"), "not a JSON object in UTF-8"),
        (b'\xef\xbb\xbf{"a": 1}', "not a JSON object in UTF-8 (Unexpected UTF-8 BOM"),  # only a file begins with one
        (b'{"a": ' + b"9" * 5000 + b"}", "not a JSON object in UTF-8 (Exceeds the limit (4300 digits)"),
        (b'{"a": ' + b"[" * 100_000, "not a JSON object"),
        (b'{"a":' * 100_000, "not a JSON object"),
        (b"[" * 100_000, "not a JSON object"),
        (b"[1]", "a JSON object is expected, found list"),
        (b"null", "a JSON object is expected, found NoneType"),
    ],
)
def test_a_broken_line_is_named_by_number(tmp_path, line, complaint):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": 1}\n\n' + line + b"\n")
    with pytest.raises(UserError) as error:
        list(read_jsonl(tmp_path / "a.jsonl"))
    assert str(error.value).startswith(f"{tmp_path / 'a.jsonl'}, line 3: {complaint}")
    assert len(str(error.value)) < 250 + len(str(tmp_path))


def test_a_whole_surrogate_pair_is_a_character(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"a": "\\ud83c\\udf4e"}')
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [(1, {"a": "🍎"})]


@pytest.mark.parametrize("n_before", [0, 2])
def test_a_line_is_refused_before_it_is_held_whole(tmp_path, n_before):
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as stream:
        stream.write(b'{"a": 1}\n' * n_before + b'{"a": "')
        stream.truncate(10**8)  # sparse, and without a line's end
    tracemalloc.start()
    with pytest.raises(UserError, match=f"line {n_before + 1}: longer than the 4,194,304 bytes that a line may have"):
        list(read_jsonl(path))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 4 * MAX_LINE_BYTES


def test_the_longest_line(tmp_path):
    text = "x" * (MAX_LINE_BYTES - len('{"a": ""}\n'))
    write_jsonl(tmp_path / "a.jsonl", [{"a": text}, {"a": text + "x"}])
    rows = read_jsonl(tmp_path / "a.jsonl")
    assert next(rows) == (1, {"a": text})
    with pytest.raises(UserError, match="line 2: longer than"):
        next(rows)


def test_byte_order_mark_and_crlf_are_no_text(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\r\n{"a": 2, "a": 3}\r\n')
    assert list(read_jsonl(tmp_path / "a.jsonl")) == [(1, {"a": 1}), (3, {"a": 3})]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5000])
def test_json_that_is_broken_is_one_kind_of_error(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError):
        read_json(tmp_path / "a.json")


def test_json_files_are_bounded(tmp_path):
    write_json(tmp_path / "a.json", {"a": ["½"]})
    assert read_json(tmp_path / "a.json") == {"a": ["½"]}
    os.truncate(tmp_path / "a.json", 10**11)
    with pytest.raises(ValueError, match="longer than 67,108,864 bytes"):
        read_json(tmp_path / "a.json")
    with pytest.raises(OSError):
        read_json(tmp_path / "none.json")


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    for path, reason in ((tmp_path / "none.jsonl", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=reason) as error:
            list(read_jsonl(path))
        assert str(path) in str(error.value)


def test_json_is_indented_and_not_escaped(tmp_path):
    write_json(tmp_path / "a.json", {"text": "ü"})
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == '{\n  "text": "ü"\n}\n'


def test_a_list_of_numbers_is_one_line_of_json(tmp_path):
    value = {"a": [1, -2.5, 1e-7], "b": [], "c": ["[\n 1 ]", 1], "d": [[1], [2, 3]], "e": "[ 1 ]\n[\n1\n]"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    lines = (tmp_path / "a.json").read_text(encoding="utf-8").splitlines()
    assert '  "a": [1, -2.5, 1e-07],' in lines
    assert "    [2, 3]" in lines


def test_a_failed_write_leaves_the_old_file(tmp_path):
    def rows():
        yield {"a": 1}
        raise RuntimeError

    write_jsonl(tmp_path / "a.jsonl", [{"a": 0}])
    with pytest.raises(RuntimeError):
        write_jsonl(tmp_path / "a.jsonl", rows())
    assert json.loads((tmp_path / "a.jsonl").read_text()) == {"a": 0}
    assert len(list(tmp_path.iterdir())) == 1


def test_nothing_has_the_final_name_before_the_end(tmp_path):
    with staged_file(tmp_path / "a") as temporary:
        temporary.write_text("x")
        assert not (tmp_path / "a").exists()
    assert (tmp_path / "a").read_text() == "x"
    with staged_directory(tmp_path / "d" / "e") as temporary:
        Path(temporary, "x").write_text("x")
        assert not (tmp_path / "d" / "e").exists()
    assert [path.name for path in (tmp_path / "d").rglob("*")] == ["e", "x"]


def test_a_failed_directory_is_emptied_next_time(tmp_path):
    with pytest.raises(RuntimeError), staged_directory(tmp_path / "d") as temporary:
        Path(temporary, "half").write_text("")
        raise RuntimeError
    assert [path.name for path in tmp_path.iterdir()] == ["d.unfinished"]
    with staged_directory(tmp_path / "d") as temporary:
        assert not any(temporary.iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["d"]
