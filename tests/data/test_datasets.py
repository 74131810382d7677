"""The paper's sets with the paper's counts, fetching from a server on this machine, complaints about users' files."""

import contextlib
import hashlib
import io
import json
import re
import warnings
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from minidpost.data import datasets, toy
from minidpost.data.example import Example
from minidpost.errors import UserError
from minidpost.text.grading import is_correct, parse_number

COUNTS = {
    ("gsm8k", "train"): 6705,
    ("gsm8k", "dev"): 768,
    ("gsm8k", "test"): 1319,
    ("multiarith", "test"): 600,
    ("asdiv", "test"): 2096,
    ("svamp", "test"): 1000,
}


@pytest.mark.parametrize(("name", "split"), COUNTS)
def test_counts_and_answers_of_the_paper(shared, name, split):
    examples = datasets.load(name, split, shared / "data")
    assert len(examples) == COUNTS[name, split]
    for example in examples:
        assert re.fullmatch(r"-?\d+(\.\d*[1-9])?", example.answer), example
        assert parse_number(example.answer) is not None
        assert example.question == example.question.strip() != ""
        assert (example.rationale is not None) == (name == "gsm8k")
        assert name != "gsm8k" or is_correct(example.rationale, example.answer)


def test_sources_are_the_published_addresses(shared):
    published = json.loads((shared / "data/SOURCES.json").read_text())
    assert datasets.SOURCES == {file: (entry["url"], entry["sha256"]) for file, entry in published.items()}


def test_gsm8k_splits_partition_the_upstream_files(shared):
    rows = [json.loads(line) for line in (shared / "data/gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()]
    listed = json.loads((shared / "data/gsm8k/dev_indices.json").read_text())
    dev = datasets.load("gsm8k", "dev", shared / "data")
    train = datasets.load("gsm8k", "train", shared / "data")
    test = datasets.load("gsm8k", "test", shared / "data")
    assert [example.rationale for example in dev] == [rows[index]["answer"] for index in listed]
    rest = [row["question"] for index, row in enumerate(rows) if index not in listed]
    assert [example.question for example in train] == rest
    assert not {example.question for example in train + dev} & {example.question for example in test}
    assert train[0].answer == "72" and train[0].rationale.endswith("in April and May.\n#### 72")
    assert "1080" in {example.answer for example in dev + train}  # written 1,080 upstream


def test_questions_of_the_other_sets(shared):
    asdiv = datasets.load("asdiv", "test", shared / "data")
    svamp = datasets.load("svamp", "test", shared / "data")
    multiarith = datasets.load("multiarith", "test", shared / "data")
    assert asdiv[0] == Example(
        "Seven red apples and two green apples are in the basket. How many apples are in the basket?", "9"
    )
    assert multiarith[0].answer == "39" and multiarith[0].question.startswith("For Halloween Debby")
    questions = [example.question for example in svamp]
    assert svamp[0].answer == "51"
    assert questions[0].endswith("a discount of 25 dollars on each pack, How much do you have to pay to buy each pack?")
    assert questions[2].endswith("and 9 salty cookies. How many salty cookies did Paco have left?")
    assert any("27 packs of grocery. How many packs of cake" in question for question in questions)


def test_toy_is_one_of_the_sets():
    for split in datasets.SPLITS["toy"]:
        assert datasets.load("toy", split) == toy.examples(split)


@pytest.mark.parametrize(
    ("name", "split", "complaint"),
    [
        ("gsm", "test", "there is no dataset 'gsm'; choose one of gsm8k, multiarith, asdiv, svamp, toy"),
        ("gsm8k", "valid", "gsm8k has no split 'valid'; choose one of train, dev, test"),
        ("svamp", "train", "svamp has no split 'train'; choose one of test"),
    ],
)
def test_unknown_names(tmp_path, name, split, complaint):
    with pytest.raises(UserError, match=re.escape(complaint)):
        datasets.load(name, split, tmp_path)


UPSTREAM = b'[{"sQuestion": " 1 and 2? ", "lSolutions": [3.0]}, {"sQuestion": "Half?", "lSolutions": [0.5]}]'

PAGE = b"\n<!DOCTYPE html><html><body>Please log in.</body></html>"


class Upstream(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        if self.path == "/missing":
            return self.send_error(404)
        bodies = {"/whole": UPSTREAM, "/altered": UPSTREAM[::-1], "/cut": UPSTREAM[:-5], "/page": PAGE}
        self.send_response(200)
        if self.path != "/endless":
            self.send_header("Content-Length", str(len(PAGE if self.path == "/page" else UPSTREAM)))
        self.end_headers()
        if self.path != "/endless":
            self.wfile.write(bodies[self.path])
        else:
            with contextlib.suppress(ConnectionError):
                while True:
                    self.wfile.write(bytes(2**16))

    def log_message(self, *args):
        pass


@pytest.fixture
def upstream(monkeypatch):
    """A server; its `serve(path)` makes that path the address of MultiArith."""
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    server = HTTPServer(("127.0.0.1", 0), Upstream)
    server.requests = 0

    def serve(path: str) -> str:
        url = f"http://127.0.0.1:{server.server_port}{path}"
        source = datasets.Source(url, hashlib.sha256(UPSTREAM).hexdigest())
        monkeypatch.setitem(datasets.SOURCES, "multiarith/MultiArith.json", source)
        return url

    server.serve = serve
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_missing_file_is_fetched_once(upstream, tmp_path, capsys):
    upstream.serve("/whole")
    expected = [Example("1 and 2?", "3"), Example("Half?", "0.5")]
    assert datasets.load("multiarith", "test", tmp_path / "data") == expected
    assert "fetching MultiArith.json" in capsys.readouterr().err
    assert datasets.load("multiarith", "test", tmp_path / "data") == expected
    assert upstream.requests == 1
    assert [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()] == [UPSTREAM]


@pytest.mark.parametrize(
    ("path", "complaint"),
    [
        ("/altered", rf"{{url}}: cut short or altered, the sha256 of the {len(UPSTREAM)} bytes received is not"),
        ("/cut", rf"{{url}}: cut short or altered, the sha256 of the {len(UPSTREAM) - 5} bytes received is not"),
        ("/page", r"{url}: a web page came instead of the file"),
        ("/endless", r"{url}: cut short or altered, the sha256 of the 67\d{{6}} bytes received is not"),
        ("/missing", r"could not be fetched \(HTTP Error 404: Not Found\); download {url} and put it there"),
    ],
)
def test_failed_fetch_leaves_nothing(upstream, tmp_path, path, complaint):
    url = upstream.serve(path)
    with pytest.raises(UserError, match=complaint.format(url=url)) as raised:
        datasets.load("multiarith", "test", tmp_path)
    assert str(tmp_path / "multiarith/MultiArith.json") in str(raised.value)
    assert "\n" not in str(raised.value)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    upstream.serve("/whole")
    assert len(datasets.load("multiarith", "test", tmp_path)) == 2


def test_offline_says_what_to_put_where(upstream, tmp_path):
    url = upstream.serve("/whole")
    upstream.shutdown()
    upstream.server_close()
    with pytest.raises(UserError, match=rf"MultiArith.json: could not be fetched \(.*refused.*\); download {url} and"):
        datasets.load("multiarith", "test", tmp_path)


@pytest.mark.parametrize("content", [UPSTREAM[:-5], UPSTREAM.replace(b"1", b"7"), b""], ids=["cut", "edited", "empty"])
def test_wrong_file_is_named_and_left_alone(upstream, tmp_path, content):
    upstream.serve("/whole")
    path = tmp_path / "multiarith/MultiArith.json"
    path.parent.mkdir()
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"{path}: cut short or altered"):
        datasets.load("multiarith", "test", tmp_path)
    assert path.read_bytes() == content
    assert upstream.requests == 0


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def test_own_jsonl(tmp_path):
    path = write(
        tmp_path / "mine.jsonl",
        {"question": " How many? ", "answer": 3, "rationale": "1+2=<<1+2=3>>3\n#### 3"},
        {"question": "How much?", "answer": "$1,000.50", "rationale": "It costs that.\n"},
        "",
        {"question": "GSM8K's own shape?", "answer": "<<6*7=42>>42\n#### 42"},
        {"question": "A float?", "answer": 39.0, "rationale": "39\n#### 39.00"},
        {"question": "Small?", "answer": 1e-05, "rationale": "x"},
        '{"question": "Large?", "answer": 1e9, "rationale": "x"}',
    )
    assert datasets.load_jsonl(path, labelled=True) == [
        Example("How many?", "3", "1+2=<<1+2=3>>3\n#### 3"),
        Example("How much?", "1000.5", "It costs that.\n#### 1000.5"),
        Example("GSM8K's own shape?", "42", "<<6*7=42>>42\n#### 42"),
        Example("A float?", "39", "39\n#### 39.00"),
        Example("Small?", "0.00001", "x\n#### 0.00001"),
        Example("Large?", "1000000000", "x\n#### 1000000000"),
    ]


def test_unlabelled_rows_need_no_rationale(tmp_path):
    path = write(tmp_path / "mine.jsonl", {"question": "How many?", "answer": "-7", "rationale": None})
    assert datasets.load_jsonl(path, labelled=False) == [Example("How many?", "-7", None)]


def test_gsm8k_file_reads_as_the_dataset_does(shared):
    path = shared / "data/gsm8k/test.jsonl"
    assert datasets.load_jsonl(path, labelled=True) == datasets.load("gsm8k", "test", shared / "data")


GOOD = {"question": "How many?", "answer": 3, "rationale": "#### 3"}


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ("{", "not a JSON object"),
        ({"answer": 3}, "`question` is missing"),
        ({"question": "?"}, "`answer` is missing"),
        (GOOD | {"question": " "}, "`question` must be a text"),
        (GOOD | {"question": ["?"]}, "`question` must be a text"),
        (GOOD | {"rationale": ""}, "`rationale` must be a text"),
        (GOOD | {"rationale": 3}, "`rationale` must be a text"),
        (GOOD | {"rationale": None}, "every row of a labelled set needs a `rationale`"),
        (GOOD | {"answer": "three"}, "`answer` must be a number or the text of one, found 'three'"),
        (GOOD | {"answer": True}, "`answer` must be a number"),
        (GOOD | {"answer": None}, "`answer` must be a number"),
        (GOOD | {"answer": [3]}, "`answer` must be a number or the text of one, found a list"),
        (GOOD | {"answer": {"value": 3}}, "`answer` must be a number or the text of one, found a dict"),
        (GOOD | {"question": {"text": "?"}}, "`question` must be a text"),
        (GOOD | {"rationale": [["3"]]}, "`rationale` must be a text"),
        (
            GOOD | {"question": "How\0many?"},
            "`question` must be a text of at most 20,000 characters, found one with NUL",
        ),
        (
            GOOD | {"rationale": "#### 3\0"},
            "`rationale` must be a text of at most 20,000 characters, found one with NUL",
        ),
        (
            GOOD | {"question": "?" * 20_001},
            "`question` must be a text of at most 20,000 characters, found one of 20,001",
        ),
        (GOOD | {"rationale": "so " * 9_000}, "`rationale` must be a text of at most 20,000 characters"),
        ({"question": "?", "answer": "so " * 9_000 + "#### 3"}, "`answer` must be a text of at most 20,000 characters"),
        (GOOD | {"answer": 10**4000}, "`answer` must be a number"),
        (GOOD | {"answer": -(10**40)}, "`answer` must be a number"),
        ('{"question": "?", "answer": 1e999}', "`answer` must be a number"),
        ('{"question": "?", "answer": "1e999"}', "`answer` must be a number"),
        ('{"question": "?", "answer": "1e9"}', "`answer` must be a number or the text of one, found '1e9'"),
        ('{"question": "?", "answer": "1/2"}', "`answer` must be a number or the text of one, found '1/2'"),
        ('{"question": "?", "answer": "١٨"}', "`answer` must be a number"),
        ('{"question": "?", "answer": "１８"}', "`answer` must be a number"),
        ('{"question": "?", "answer": ' + "9" * 5000 + "}", "not a JSON object in UTF-8 (Exceeds the limit"),
        ('{"question": "?", "answer": ' + "[" * 500 + "]" * 500 + "}", "`answer` must be a number or the text of"),
        (GOOD | {"answer": float("nan")}, "`answer` must be a number"),
        (GOOD | {"answer": float("inf")}, "`answer` must be a number"),
        (GOOD | {"answer": 1e300}, "`answer` must be a number"),
        ({"question": "?", "answer": "It is\n#### three"}, "`answer` must be a number"),
        (GOOD | {"answer": 4}, "the last #### of `rationale` must give 4, as `answer` does"),
        (GOOD | {"rationale": "#### three"}, "the last #### of `rationale` must give 3, as `answer` does"),
        (GOOD | {"question": "First?", "answer": 3}, "the answer is 3, but line 1 answers the same question with 5"),
    ],
)
def test_mistakes_are_named_by_file_and_line(tmp_path, row, complaint):
    path = write(tmp_path / "mine.jsonl", {"question": "First?", "answer": 5, "rationale": "5"}, "", row)
    with pytest.raises(UserError, match=re.escape(f"{path}, line 3: {complaint}")) as raised:
        datasets.load_jsonl(path, labelled=True)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file(tmp_path, text):
    with pytest.raises(UserError, match=r"mine\.jsonl: holds no examples"):
        datasets.load_jsonl(write(tmp_path / "mine.jsonl", text), labelled=False)


def test_absent_file(tmp_path):
    with pytest.raises(UserError, match=r"mine\.jsonl: cannot be read"):
        datasets.load_jsonl(tmp_path / "mine.jsonl", labelled=False)


def test_repeated_questions_are_counted(tmp_path):
    rows = [GOOD, GOOD | {"question": "Other?"}, GOOD | {"rationale": "so\n#### 3.0"}, GOOD]
    path = write(tmp_path / "mine.jsonl", *rows)
    with pytest.warns(UserWarning, match=r"mine\.jsonl: 2 rows left out"):
        examples = datasets.load_jsonl(path, labelled=True)
    assert examples == [Example("How many?", "3", "#### 3"), Example("Other?", "3", "#### 3")]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        datasets.load_jsonl(write(path, GOOD), labelled=True)


@pytest.mark.parametrize(
    ("name", "content", "questions"),
    [
        ("a.txt", "How?\r\n\n  Why? \n", ["How?", "Why?"]),
        ("a.txt", '{"question": "How?"}', ['{"question": "How?"}']),
        ("a.jsonl", '\n{"question": " How? ", "answer": null}\n{"question": "Why?"}', ["How?", "Why?"]),
        ("-", '\n {"question": "How?"}\n', ["How?"]),
        ("-", "How?\nWhy?", ["How?", "Why?"]),
        ("a.txt", "\ufeffHow?\nWhy?\nHow?", ["How?", "Why?", "How?"]),
        ("a.jsonl", '\ufeff{"question": "How?"}\r\n', ["How?"]),
        ("-", '\ufeff\n{"question": "How?"}\r\n', ["How?"]),
    ],
)
def test_questions_alone(tmp_path, monkeypatch, name, content, questions):
    (tmp_path / "a.txt").write_text(content)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content.encode())))
    source = name if name == "-" else str((tmp_path / "a.txt").rename(tmp_path / name))
    assert [row["question"] for row in datasets.open_questions(source).rows()] == questions


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", b" \n", "a.txt: holds no questions"),
        ("a.txt", b"\xff", "a.txt: not a text in UTF-8"),
        ("a.jsonl", b"", "a.jsonl: holds no questions"),
        ("a.jsonl", b"How?", "a.jsonl, line 1: not a JSON object"),
        ("a.jsonl", b'{"question": "How?"}\n{"question": 3}', "a.jsonl, line 2: `question` must be a text"),
        ("a.csv", b"How?", "a.csv: a file that ends in .jsonl or .txt is expected"),
        ("a", b"How?", "a: a file that ends in .jsonl or .txt is expected"),
        ("-", b'{"question": ""}', "standard input, line 1: `question` must be a text that is not empty"),
        ("-", b"", "standard input: holds no questions"),
        (
            "-",
            b"How?\nWhy\0?",
            "standard input, line 2: `question` must be a text of at most 20,000 characters, found one with",
        ),
        ("a.txt", "How?".encode("utf-16"), "a.txt: not a text in UTF-8"),
        (
            "a.txt",
            "How?".encode("utf-16-le"),
            "a.txt, line 1: `question` must be a text of at most 20,000 characters, found one",
        ),
        ("a.txt", b"How? " * 2**20, "a.txt, line 1: longer than the 4,194,304 bytes that a line may have"),
        (
            "a.txt",
            b"How? " * 2**13,
            "a.txt, line 1: `question` must be a text of at most 20,000 characters, found one of 40,960",
        ),
        ("none.txt", None, "none.txt: cannot be read (No such file or directory)"),
    ],
)
def test_mistakes_in_questions(tmp_path, monkeypatch, name, content, complaint):
    if content is not None:
        (tmp_path / name).write_bytes(content)
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content)))
    with pytest.raises(UserError) as raised:
        list(datasets.open_questions(name if name == "-" else str(tmp_path / name)).rows())
    assert complaint in str(raised.value)
