"""Hundreds of broken and hostile inputs through train.py, sample.py and eval.py: what does each command do?

Every input is one that somebody could hand over: a model directory, a tokenizer, a config.json, a shard index, a file
of questions, a flag. A command runs in a forked child with bounded memory and time, in a directory of its own, whose
files are compared before and after. It must do one of two things.

refused    status 2, and on standard error exactly one line that is neither a progress bar nor a warning; it begins with
           the command's name. Nothing is printed, no file is changed or made, train.py's new run directory aside.
harmless   status 0 and the very output (completions, scores, weights) of the same command with the intact input;
           for weights that are NaN or infinite: status 0 and one warning that names the tensor.

A traceback, an end by a signal or the time limit, another status, a second line or another result is a failure.
"""

import argparse
import hashlib
import json
import os
import platform
import random
import re
import resource
import runpy
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from minidpost import cli  # noqa: E402, F401  (here, so that no child imports them)
from minidpost.data import datasets  # noqa: E402, F401  (here, so that no child imports them)
from minidpost.models.t5 import T5, T5Config  # noqa: E402
from minidpost.models.weights import in_memory, save_model, write_tensors  # noqa: E402
from minidpost.selftraining import algorithm, report  # noqa: E402, F401  (here, so that no child imports them)
from minidpost.text.tokenizer import load_tokenizer  # noqa: E402

MODEL, WEIGHTS, INDEX = "model", "model.safetensors", "model.safetensors.index.json"
MAX_BYTES = 2**32  # of address space beyond what the parent has
SECONDS = 60

QUESTIONS = ["Tom has 3 apples and buys 4. How many?", "Mia has 9 pens and loses 5. How many?"]
ROWS = [
    {"question": f"Tom has {n} apples and buys 4. How many?", "answer": n + 4, "rationale": f"<<{n}+4={n + 4}>>{n + 4}"}
    for n in range(12)
]
SAMPLE = ["sample.py", "--input", "questions.jsonl", "--checkpoint", MODEL, "--max-new-tokens", "6"]
EVAL = ["eval.py", "--checkpoint", MODEL, "--split", "dev", "--limit", "2", "--max-new-tokens", "4", "--slots", "2"]
TRAIN = ["train.py", "--model", MODEL, "--data", "rows.jsonl", "--run-dir", "run", "--method", "sft"]
TRAIN += ["--sft-epochs", "1", "--max-new-tokens", "4"]
BY_MODEL = {"train.py": TRAIN, "sample.py": SAMPLE, "eval.py": EVAL}


@dataclass(frozen=True)
class Case:
    """One corrupted input: what is corrupted, how, the command line, and what the command should do."""

    kind: str
    name: str
    line: list[str]
    corrupt: Callable[[Path], None] = lambda directory: None
    expected: str = "refused"  # or "harmless", or what a warning must say


@dataclass(frozen=True)
class Outcome:
    """What a command did."""

    status: int
    out: str
    err: str
    changed: tuple[str, ...]  # files outside the run directory
    result: str  # the hash of the weights it trained, or else what it printed


# -- the inputs -------------------------------------------------------------------------------------------------------


def make_inputs(directory: Path) -> None:
    """The intact inputs: a tiny random model, questions, labelled rows."""
    tokenizer = load_tokenizer(ROOT / "weights" / "tiny-t5")
    torch.manual_seed(0)
    model = T5(T5Config(tokenizer.vocab_size, 16, 8, 24, 2, 2, 1, dropout=0.1)).initialise()
    save_model(model, directory / MODEL, tokenizer.files)
    write_rows(directory / "questions.jsonl", [{"question": question} for question in QUESTIONS])
    write_rows(directory / "rows.jsonl", ROWS)
    (directory / "questions.txt").write_text("\n".join(QUESTIONS), encoding="utf-8")
    (directory / "note").write_text("mine", encoding="utf-8")


def write_rows(path: Path, rows: list) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def cases(seed: int) -> Iterator[Case]:
    """All of them, in a fixed order."""
    for command, line in BY_MODEL.items():
        for kind, name, corrupt, expected in [*model_files(), *configs(), *tensors(seed), *shards(), *tokenizers()]:
            yield Case(kind, f"{command}: {name}", line, corrupt, expected)
    for content, name, expected in jsonl_contents():
        corrupt = replaced("rows.jsonl", content)
        yield Case("JSONL", f"train.py --data: {name}", TRAIN, corrupt, expected)
        toy = [*TRAIN[:3], "--data", "toy", "--limit", "20", *TRAIN[5:], "--unlabelled", "rows.jsonl"]
        if expected == "refused" and name not in NEEDS_RATIONALE:
            yield Case("JSONL", f"train.py --unlabelled: {name}", toy, corrupt)
    for content, name, expected in question_contents():
        yield Case("questions", f"sample.py --input: {name}", SAMPLE, replaced("questions.jsonl", content), expected)
    for content, name, expected in text_contents():
        line = [word.replace(".jsonl", ".txt") for word in SAMPLE]
        yield Case("questions", f"sample.py --input: {name}", line, replaced("questions.txt", content), expected)
    for line in bad_flags():
        yield Case("flags", " ".join(word if len(word) < 40 else word[:40] + "…" for word in line), line)
    for corrupt, name in run_directories():
        yield Case("run directory", f"train.py --run-dir: {name}", TRAIN, corrupt)
    for corrupt, name in data_directories():
        yield Case("datasets", f"eval.py: {name}", [*EVAL, "--tasks", "multiarith", "--split", "test"], corrupt)


def replaced(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda directory: (directory / name).write_bytes(content) and None


def edited(name: str, edit: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def corrupt(directory: Path) -> None:
        path = directory / MODEL / name
        path.write_bytes(edit(path.read_bytes()))

    return corrupt


def config_with(**changes: object) -> Callable[[Path], None]:
    def edit(content: bytes) -> bytes:
        return json.dumps({k: v for k, v in (json.loads(content) | changes).items() if v != "absent"}).encode()

    return edited("config.json", edit)


def model_files() -> Iterator[tuple]:
    """Whole files that are absent, empty, cut, something else."""
    for name in ("config.json", WEIGHTS, "spiece.model"):
        yield "model files", f"{name} absent", lambda d, name=name: (d / MODEL / name).unlink(), "refused"
        for what, content in {
            "empty": b"",
            "a web page": b"<!DOCTYPE html><html>log in</html>",
            "a Git LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3309496\n",
            "NULs": bytes(10_000),
            "0xff": b"\xff" * 10_000,
            "a pickle": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00touch hacked\x85R.",
            "nested": b"[" * 100_000,
        }.items():
            yield "model files", f"{name}: {what}", edited(name, lambda _, c=content: c), "refused"

    def to_directory(directory: Path, name: str) -> None:
        (directory / MODEL / name).unlink()
        (directory / MODEL / name).mkdir()

    def to_pickle(directory: Path) -> None:
        (directory / MODEL / WEIGHTS).rename(directory / MODEL / "pytorch_model.bin")

    for name in ("config.json", WEIGHTS, "spiece.model"):
        yield "model files", f"{name}: a directory", lambda d, name=name: to_directory(d, name), "refused"
    yield "model files", "a pickle alone", to_pickle, "refused"


def configs() -> Iterator[tuple]:
    """Values of config.json."""
    sizes = ("vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers")
    for key in sizes:
        for value in (10**12, -1, 0, 2.5, "16", None, [16], True, float("nan")):
            if not (key == "num_decoder_layers" and value is None):  # there null stands for num_layers
                yield "config.json", f"{key} = {value}", config_with(**{key: value}), "refused"
        yield "config.json", f"{key} another", config_with(**{key: 17}), "refused"
    for key in ("vocab_size", "num_heads"):
        yield "config.json", f"{key} absent", config_with(**{key: "absent"}), "refused"
    for key, values in {
        "model_type": ("gpt2", None, ["t5"], "absent"),
        "feed_forward_proj": ("gelu", 3, "relu"),
        "relative_attention_num_buckets": (1, 10**12, 33),
        "relative_attention_max_distance": (0, 10**12, "128"),
        "dropout_rate": (2, -0.5, "0"),
        "layer_norm_epsilon": (float("nan"), float("inf"), -1),
        "pad_token_id": (-1, 10**6, "0"),
        "eos_token_id": ([1], 10**12),
        "decoder_start_token_id": (-5, 10**9),
        "tie_word_embeddings": ("no", 1),
    }.items():
        for value in values:
            yield "config.json", f"{key} = {value}", config_with(**{key: value}), "refused"
    for key, value in {"architectures": ["Other"], "torch_dtype": "float8", "extra": {"a": [1]}, "_name": "x"}.items():
        yield "config.json", f"{key} = {value}", config_with(**{key: value}), "harmless"
    for what, edit in {
        "cut": lambda c: c[: len(c) // 2],
        "a comma missing": lambda c: c.replace(b",", b"", 1),
        "a byte of 0xff": lambda c: c.replace(b"T5", b"T\xff", 1),
        "an integer of 5,000 digits": lambda c: c.replace(b"{", b'{"x": ' + b"9" * 5000 + b",", 1),
        "100 MB": lambda c: c + b" " * 10**8,
    }.items():
        yield "config.json", what, edited("config.json", edit), "refused"
    yield "config.json", "CRLF", edited("config.json", lambda c: c.replace(b"\n", b"\r\n")), "harmless"


def with_header(edit: Callable[[dict], None]) -> Callable[[Path], None]:
    """Change the header of the weights as JSON, the data left as it is."""

    def change(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        edit(header)
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + content[8 + length :]

    return edited(WEIGHTS, change)


def with_value(name: str, value: float) -> Callable[[Path], None]:
    """Put a value into a tensor."""

    def change(content: bytes) -> bytes:
        length = int.from_bytes(content[:8], "little")
        begin = 8 + length + json.loads(content[8 : 8 + length])[name]["data_offsets"][0]
        return content[:begin] + torch.tensor(value).numpy().tobytes() + content[begin + 4 :]

    return edited(WEIGHTS, change)


def tensors(seed: int) -> Iterator[tuple]:
    """The weights' header and length, and values that are no numbers."""
    query, norm = "encoder.block.0.layer.0.SelfAttention.q.weight", "decoder.final_layer_norm.weight"

    def second(header: dict) -> list:
        return header[query]["data_offsets"]

    headers = {
        "10^12 rows": lambda h: h[query].update(shape=[10**12, 16]),
        "10^12 rows and bytes": lambda h: h[query].update(shape=[10**12, 1], data_offsets=[0, 4 * 10**12]),
        "10^12 rows of nothing": lambda h: h[query].update(shape=[10**12, 0], data_offsets=[second(h)[0]] * 2),
        "2^62 × 2^62": lambda h: h[query].update(shape=[2**62, 2**62]),
        "a negative size": lambda h: h[query].update(shape=[-16, 16]),
        "transposed flat": lambda h: h[query].update(shape=[256]),
        "offsets overlap": lambda h: h[query].update(data_offsets=h[norm]["data_offsets"]),
        "offsets beyond": lambda h: h[query].update(data_offsets=[x + 10**6 for x in second(h)]),
        "offsets reversed": lambda h: h[query].update(data_offsets=second(h)[::-1]),
        "offsets are text": lambda h: h[query].update(data_offsets=["0", "8"]),
        "int32": lambda h: h[query].update(dtype="I32"),
        "fp64 of half the rows": lambda h: h[query].update(dtype="F64", shape=[8, 16]),
        "unknown dtype": lambda h: h[query].update(dtype="F99"),
        "an entry null": lambda h: h.update({query: None}),
        "one renamed": lambda h: h.update({"x\n\x1b[31m" * 9: h.pop(query)}),
        "one missing": lambda h: h.pop(norm),
        "one more": lambda h: h.update(extra={"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}),
        "a long name": lambda h: h.update({"x" * 10**6: h.pop(query)}),
        "no header": lambda h: h.clear(),
    }
    for name, edit in headers.items():
        yield "safetensors", f"header: {name}", with_header(edit), "refused"
    yield "safetensors", "header: other metadata", with_header(lambda h: h.update(__metadata__={"a": "b"})), "harmless"
    for length in (0, 10**6, 2**40, 2**63, 2**64 - 1):
        content = length.to_bytes(8, "little")
        yield "safetensors", f"header of {length} bytes", edited(WEIGHTS, lambda c, n=content: n + c[8:]), "refused"
    chance = random.Random(seed)
    for _ in range(6):
        fraction = chance.random()
        edit = edited(WEIGHTS, lambda c, f=fraction: c[: int(len(c) * f)])
        yield "safetensors", f"cut at {fraction:.0%}", edit, "refused"
    yield "safetensors", "a byte missing", edited(WEIGHTS, lambda c: c[:-1]), "refused"
    yield "safetensors", "a byte more", edited(WEIGHTS, lambda c: c + b"\0"), "refused"
    for value in (float("nan"), float("inf"), float("-inf")):
        yield "NaN and Inf", f"{value} in a weight", with_value(query, value), f"tensor {query} holds NaN or infinity"


def shards() -> Iterator[tuple]:
    """Weights in shards: their index, their names."""

    def sharded(edit: Callable[[Path, dict], None]) -> Callable[[Path], None]:
        def corrupt(directory: Path) -> None:
            from safetensors.torch import load_file

            model = directory / MODEL
            write_tensors(in_memory(load_file(model / WEIGHTS)), model, max_shard_bytes=60_000)
            index = json.loads((model / INDEX).read_text())
            for place in (directory, directory / "elsewhere"):  # whole files that must not be opened
                place.mkdir(exist_ok=True)
                shutil.copyfile(next(model.glob("model-00001*")), place / "x.safetensors")
            edit(model, index)
            if (model / INDEX).exists():
                (model / INDEX).write_text(json.dumps(index))

        return corrupt

    def renamed(name: object) -> Callable[[Path, dict], None]:
        return lambda model, index: index["weight_map"].update({"shared.weight": name})

    names = ["../x.safetensors", "/etc/passwd", "/x.safetensors", "..", ".", "", "..\\x.safetensors", "a\0.safetensors"]
    names += ["C:\\x.safetensors", "../elsewhere/x.safetensors", "x.bin", "none.safetensors", "x" * 5000, 3, None, []]
    for name in names:
        yield "shards", f"a shard called {name!r:.40}", sharded(renamed(name)), "refused"
    for what, edit in {
        "a tensor left out": lambda m, i: i["weight_map"].pop("shared.weight"),
        "a tensor more": lambda m, i: i["weight_map"].update(extra=i["weight_map"]["shared.weight"]),
        "no map": lambda m, i: i.pop("weight_map"),
        "a map that is a list": lambda m, i: i.update(weight_map=[]),
        "a shard absent": lambda m, i: next(m.glob("model-00002*")).unlink(),
        "a shard cut": lambda m, i: os.truncate(next(m.glob("model-00002*")), 1000),
    }.items():
        yield "shards", what, sharded(edit), "refused"
    yield "shards", "intact", sharded(lambda m, i: None), "harmless"


def tokenizers() -> Iterator[tuple]:
    """SentencePiece models: cut, of another model."""
    for fraction in (0.1, 0.3, 0.5, 0.7, 0.9):
        edit = edited("spiece.model", lambda c, f=fraction: c[: int(len(c) * f)])
        yield "tokenizer", f"cut at {fraction:.0%}", edit, "refused"

    yield "tokenizer", "more pieces than embeddings", edited("spiece.model", more_pieces), "refused"
    for text in (b"\xe2\x96\x81", b"<pad>", b"<unk>"):
        edit = edited("spiece.model", lambda c, old=text: c.replace(old, b"\xff" * len(old), 1))
        yield "tokenizer", f"broken UTF-8 for {text.decode()}", edit, "refused"
    yield "tokenizer", "noise in front", edited("spiece.model", lambda c: b"\xff\xff\xff" + c), "refused"
    for what, content in tokenizer_jsons().items():
        yield "tokenizer.json", what, as_tokenizer_json(content), "refused"
    config_name = "tokenizer_config.json"
    for what, content in {
        "cut": b'{"eos_token": "</',
        "a list": b"[]",
        "nested": b"[" * 100_000,
        "an unknown token": b'{"eos_token": "<\\u001b[31m\\n>"}',
        "a token that is a number": b'{"bos_token": 5}',
        "BOS that is a text": b'{"add_bos_token": "yes"}',
        "BOS without a name": b'{"add_bos_token": true}',
    }.items():
        yield config_name, what, replaced(f"{MODEL}/{config_name}", content), "refused"
    for what, content in {"of another": b'{"x": 1}', "of T5": b'{"eos_token": "</s>", "bos_token": null}'}.items():
        yield config_name, what, replaced(f"{MODEL}/{config_name}", content), "harmless"
    for what, content in {"a list": b"[2]", "an end that is a text": b'{"eos_token_id": "1"}', "0xff": b"\xff"}.items():
        yield "generation_config.json", what, replaced(f"{MODEL}/generation_config.json", content), "refused"


def tokenizer_jsons() -> dict[str, object]:
    """Contents of a tokenizer.json: bytes as they are, anything else as JSON."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    vocabulary = {chr(code): code for code in range(0x21, 0x7F)}
    whole = {
        "version": "1.0",
        "added_tokens": [{"id": 1, "content": "</s>", "special": True}],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    replace = {"type": "Replace", "pattern": {"Regex": ""}, "content": "b"}
    return {
        "empty": b"",
        "a web page": b"<!DOCTYPE html><html>log in</html>",
        "NULs": bytes(10_000),
        "nested": b"[" * 100_000,
        "cut": json.dumps(whole).encode()[:500],
        "an empty object": {},
        "no pieces": whole | {"model": whole["model"] | {"vocab": {}}},
        "an id of 2^40": whole | {"model": whole["model"] | {"vocab": vocabulary | {"x": 2**40}}},
        "a merge of unknown pieces": whole | {"model": whole["model"] | {"merges": ["qq zz"]}},
        "no end": whole | {"added_tokens": []},
        "an expression at which the library panics": whole | {"normalizer": replace},
        "an expression that is none": whole | {"normalizer": replace | {"pattern": {"Regex": "("}}},
        "line breaks and colours in a kind": whole | {"decoder": {"type": "\x1b[31m\n\n"}},
    }


def as_tokenizer_json(content: object) -> Callable[[Path], None]:
    """Put a tokenizer.json in the place of the SentencePiece model."""

    def corrupt(directory: Path) -> None:
        (directory / MODEL / "spiece.model").unlink()
        text = content if isinstance(content, bytes) else json.dumps(content).encode()
        (directory / MODEL / "tokenizer.json").write_bytes(text)

    return corrupt


def more_pieces(content: bytes) -> bytes:
    """A SentencePiece model with two pieces more in front, as protobuf has them: field 1 of {1: text, 2: score}."""
    return b"".join(b"\x0a\x0b\x0a\x04" + text + b"\x15" + bytes(4) for text in (b"qqzz", b"zzqq")) + content


NEEDS_RATIONALE = ("a rationale absent", "a rationale of another answer", "a rationale that is a list", "one row")


def jsonl_contents() -> Iterator[tuple[bytes, str, str]]:
    """Labelled rows, corrupted."""
    good = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    first = ROWS[0]

    def with_row(**changes: object) -> bytes:
        row = {key: value for key, value in {**first, **changes}.items() if value != "absent"}
        return good + json.dumps(row | {"question": row.get("question", "Other?") or ""}).encode() + b"\n"

    yield from broken_lines(good)
    other = {"question": "Other?"}
    for name, changes in {
        "a question that is a list": {"question": ["How?"]},
        "a question that is an object": {"question": {"text": "How?"}},
        "a question that is a number": {"question": 3},
        "a question of NUL": {"question": "How\0?"},
        "a question of 10^5 characters": {"question": "How? " * 20_000},
        "a question of 10^4 words": {"question": "How? " * 3_500},
        "an answer absent": other | {"answer": "absent"},
        "an answer null": other | {"answer": None},
        "an answer that is a list": other | {"answer": [4]},
        "an answer that is an object": other | {"answer": {"n": 4}},
        "an answer true": other | {"answer": True},
        "an answer NaN": other | {"answer": float("nan")},
        "an answer Infinity": other | {"answer": float("inf")},
        "an answer 1e999": other | {"answer": "1e999"},
        "an answer 1e9": other | {"answer": "1e9"},
        "an answer 1/2": other | {"answer": "1/2"},
        "an answer in Arabic digits": other | {"answer": "٤"},
        "an answer in full-width digits": other | {"answer": "４"},
        "an answer of 4,000 digits": other | {"answer": 10**3999},
        "an answer of words": other | {"answer": "four"},
        "an answer unlike the first": {"answer": 5, "rationale": "#### 5"},
        "a rationale that is a list": other | {"rationale": ["so"]},
        "a rationale absent": other | {"rationale": "absent"},
        "a rationale of another answer": other | {"rationale": "#### 5"},
    }.items():
        yield with_row(**changes), name, "refused"
    yield json.dumps(first).encode(), "one row", "refused"
    yield good.replace(b"\n", b"\r\n"), "CRLF", "harmless"
    yield b"\xef\xbb\xbf" + good, "a byte order mark", "harmless"
    yield good.replace(b"\n", b"\n\n \n"), "blank lines", "harmless"
    yield good.replace(b'{"question"', b'{"extra": {"a": [[[1]]]}, "question"'), "further fields", "harmless"
    yield good + json.dumps(first).encode(), "a row twice", "1 rows left out, their questions stand above already"


def broken_lines(good: bytes) -> Iterator[tuple[bytes, str, str]]:
    """Files that are no JSON Lines in UTF-8."""
    for name, content in {
        "empty": b"",
        "blank lines alone": b"\n \n",
        "broken UTF-8": good + b'{"question": "\xff\xfe", "answer": 1}\n',
        "UTF-16": good.decode().encode("utf-16"),
        "NULs": bytes(1000),
        "NULs at the end": good + bytes(1000),
        "a NUL in a text": good + b'{"question": "a\0b", "answer": 1}\n',
        "half a surrogate pair": good + b'{"question": "\\ud83c", "answer": 1, "rationale": "#### 1"}\n',
        "a list": good + b"[1]\n",
        "null": good + b"null\n",
        "a cut row": good[:-20],
        "two rows on a line": good.replace(b"\n", b" "),
        "a JSON array": b"[" + good.replace(b"\n", b",\n").rstrip(b",\n") + b"]",
        "nested 10^5 deep": good + b'{"question": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n",
        "an integer of 5,000 digits": good + b'{"question": "?", "answer": ' + b"9" * 5000 + b"}\n",
        "a line of 100 MB": good + b'{"question": "' + b"x" * 10**8 + b'", "answer": 1}\n',
        "a web page": b"<!DOCTYPE html>\n<html></html>\n",
        "single quotes": b"{'question': 'How?', 'answer': 1}\n",
        "a pickle": b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00touch hacked\x85R.",
    }.items():
        yield content, name, "refused"


def question_contents() -> Iterator[tuple[bytes, str, str]]:
    """Questions as JSONL, corrupted."""
    good = "".join(json.dumps({"question": question}) + "\n" for question in QUESTIONS).encode()
    yield from broken_lines(good)
    for value in (None, 3, True, "", " ", ["How?"], {"text": "How?"}, "a\0b", "How? " * 20_000, "How? " * 3_500):
        content = good + json.dumps({"question": value}).encode()
        yield content, f"a question {value!r:.30}", "refused"
    yield good + b'{"answer": 3}\n', "a question absent", "refused"
    yield b"\xef\xbb\xbf" + good.replace(b"\n", b"\r\n\r\n"), "byte order mark, CRLF, blank lines", "harmless"


def text_contents() -> Iterator[tuple[bytes, str, str]]:
    """Questions as lines of text, corrupted."""
    good = "\n".join(QUESTIONS).encode()
    for name, content in {
        "empty text": b"",
        "text in Latin-1": good + b"\nf\xfcr",
        "text in UTF-16": good.decode().encode("utf-16"),
        "text in UTF-16 without a mark": good.decode().encode("utf-16-le"),
        "text with a NUL": good + b"\n\0",
        "text in one line of 100 MB": b"How? " * (2 * 10**7),
        "text in one line of 10^5 characters": b"How? " * (2 * 10**4),
        "text in one line of 10^4 words": b"How? " * 3_500,
    }.items():
        yield content, name, "refused"
    yield b"\xef\xbb\xbf" + good.replace(b"\n", b"\r\n\n"), "text with byte order mark and CRLF", "harmless"


def bad_flags() -> Iterator[list[str]]:
    """Flags that do not exist, and values that a flag cannot have."""
    numbers = ("x", "-1", "1.5", "1e9", "nan", "10000000000000", "9" * 5000, "١x", "", "0x10")
    for command, line, names in [
        ("sample.py", SAMPLE, ("--samples", "--slots", "--max-new-tokens", "--top-k", "--temperature", "--top-p")),
        ("eval.py", EVAL, ("--limit", "--slots", "--max-new-tokens", "--pass-at", "--maj-at")),
        ("train.py", TRAIN, ("--iterations", "--samples", "--dpo-steps", "--sft-epochs", "--slots", "--limit")),
        ("train.py", TRAIN, ("--micro-batch-tokens", "--dpo-samples", "--sft-learning-rate", "--dpo-learning-rate")),
    ]:
        for name in names:
            real = name in ("--temperature", "--top-p", "--sft-learning-rate", "--dpo-learning-rate")
            for value in numbers:
                if not (real and value in ("1.5", "0x10")):
                    yield [*line, f"{name}={value}"]
        yield [*line, "--seed", "x"]
        yield [*line, "--device", "abacus"]
        yield [*line, "--device", "cuda:99"]
        yield [*line, "--device", "meta"]
        yield [*line, "--nonsense"]
        yield [*line, "\udcff"]
        yield [*line, "--checkpoint" if command != "train.py" else "--model", "x" * 5000]
        yield [*line, "--checkpoint" if command != "train.py" else "--model", "a\nb\x1b[31m"]
        yield [*line, "--checkpoint" if command != "train.py" else "--model", "\udcff"]
        yield [*line, "--checkpoint" if command != "train.py" else "--model", ""]
        yield [*line, "--checkpoint" if command != "train.py" else "--model", "note"]
    for command, line in (("sample.py", SAMPLE), ("eval.py", EVAL)):
        for path in ("note", "note/rows", MODEL, "", "/proc/nothing/rows", "x" * 300):
            if (command, path) != ("eval.py", ""):
                yield [*line, "--output", path]
    for path in ("note", "none", MODEL, "x" * 5000, "/proc/self/mem.txt", "../none.jsonl"):
        yield [*SAMPLE, "--input", path]
    for path in ("note", MODEL, "note/run", "\udcff", "/proc/nothing/run", "x" * 300):
        yield [*TRAIN, "--run-dir", path]
    for path in ("note", "none.jsonl", MODEL, "", "../none.jsonl"):
        yield [*TRAIN, "--data", path]
    for task, split in (("nil", "test"), ("toy", "nil"), ("", "test"), ("toy,", "test"), ("../toy", "test")):
        yield [*EVAL, "--tasks", task, "--split", split]


def run_directories() -> Iterator[tuple[Callable[[Path], None], str]]:
    """A run directory that is not this run's, or was edited."""

    def with_config(content: bytes) -> Callable[[Path], None]:
        def corrupt(directory: Path) -> None:
            (directory / "run").mkdir()
            (directory / "run" / "config.json").write_bytes(content)

        return corrupt

    for name, content in {
        "config.json empty": b"",
        "config.json of NULs": bytes(100),
        "config.json a list": b"[]",
        "config.json without settings": b"{}",
        "config.json nested": b"[" * 100_000,
        "config.json of settings that are a list": b'{"settings": [1]}',
        "config.json of another run": b'{"settings": {"model": "other"}}',
    }.items():
        yield with_config(content), name

    def foreign(directory: Path) -> None:
        (directory / "run").mkdir()
        (directory / "run" / "thesis.txt").write_text("mine")

    yield foreign, "a directory of other files"
    yield lambda directory: (directory / "run").write_text("mine") and None, "a file"


def data_directories() -> Iterator[tuple[Callable[[Path], None], str]]:
    """A dataset that is not the pinned one."""
    for name, content in {"empty": b"", "a web page": b"<html>", "a list": b"[]", "nested": b"[" * 10**5}.items():

        def corrupt(directory: Path, content: bytes = content) -> None:
            (directory / "data/multiarith").mkdir(parents=True)
            (directory / "data/multiarith/MultiArith.json").write_bytes(content)

        yield corrupt, name

    yield lambda directory: (directory / "data").write_text("mine") and None, "data is a file"
    yield lambda directory: (directory / "data/multiarith/MultiArith.json").mkdir(parents=True), "a directory"


# -- running them -----------------------------------------------------------------------------------------------------


def run(line: list[str], directory: Path) -> Outcome:
    """A command in a forked child, in `directory`, with bounded memory and time."""
    before = contents(directory)
    streams = [tempfile.TemporaryFile() for _ in range(2)]
    child = os.fork()
    if not child:
        become(line, directory, streams)
    _, state = os.waitpid(child, 0)
    for stream in streams:
        stream.seek(0)
    out, err = (stream.read().decode("utf-8", "replace") for stream in streams)
    after = contents(directory)
    changed = {name for name in {*before, *after} if before.get(name) != after.get(name)}
    if line[0] == "train.py" and not any(name.split("/")[0] == "run" for name in before):
        changed = {name for name in changed if name.split("/")[0] != "run"}
    trained = [value for name, value in sorted(after.items()) if name.endswith("sft/" + WEIGHTS)]
    return Outcome(os.waitstatus_to_exitcode(state), out, err, tuple(sorted(changed)), " ".join(trained) or out)


def become(line: list[str], directory: Path, streams: list) -> None:
    """Be the command and never return."""
    status = 70
    try:
        for descriptor, stream in enumerate(streams, start=1):
            os.dup2(stream.fileno(), descriptor)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MAX_BYTES, used + MAX_BYTES))
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(SECONDS)
        os.chdir(directory)
        sys.argv = [str(ROOT / line[0]), *line[1:]]
        runpy.run_path(str(ROOT / line[0]), run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def contents(directory: Path) -> dict[str, str]:
    """Every file and directory below, by name, with a hash of what is in it."""
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "directory"
        for path in directory.rglob("*")
    }


def verdict(case: Case, outcome: Outcome, intact: Outcome) -> tuple[str, str]:
    """("refused", "harmless" or "warned", "") where the command did what it should, else ("failure", why)."""
    lines = [line for line in re.split(r"[\n\r]", outcome.err) if line.strip()]
    lines = [line for line in lines if "%|" not in line]  # progress bars
    mark = f"{case.line[0]}: warning: "
    warned = [line for line in lines if line.startswith(mark)]
    complaints = [line for line in lines if not line.startswith(mark)]
    if outcome.changed:
        return "failure", f"changed {', '.join(outcome.changed)}"
    if any(not character.isprintable() for line in lines for character in line):
        return "failure", f"control characters: {lines!r:.300}"
    if case.expected == "refused":
        if outcome.status != 2 or len(complaints) != 1 or not complaints[0].startswith(f"{case.line[0]}: "):
            return (
                "failure",
                f"status {outcome.status}, {len(complaints)} lines: {outcome.err[-500:]!r} {outcome.out[-200:]!r}",
            )
        return ("refused", "") if not (outcome.out.strip() and case.line[0] != "train.py") else ("failure", outcome.out)
    if outcome.status or complaints:
        return "failure", f"status {outcome.status}: {outcome.err[-500:]!r}"
    if case.kind != "NaN and Inf" and outcome.result != intact.result:
        return "failure", f"another result: {outcome.result[-300:]!r} for {intact.result[-300:]!r}"
    if case.expected == "harmless":
        return ("harmless", "") if not warned else ("failure", f"warned: {warned}")
    if not warned or case.expected not in warned[0]:  # a model trained from NaN gets a warning of its own, after it
        return "failure", f"{case.expected!r} is not the first warning: {warned}"
    return "warned", ""


def run_cases(selected: list[Case], log: Callable[[str], None] = print) -> tuple[Counter, list[str]]:
    """Run the cases; counts by (kind, verdict), and a line for each failure."""
    torch.set_num_threads(1)
    counts: Counter = Counter()
    failures: list[str] = []
    intact: dict[tuple[str, ...], Outcome] = {}  # by command line: what it does with the intact inputs
    with tempfile.TemporaryDirectory() as folder:
        clean = Path(folder, "clean")
        clean.mkdir()
        make_inputs(clean)
        for case_index, case in enumerate(selected):
            key = tuple(case.line)
            if case.expected != "refused" and key not in intact:
                intact[key] = run(case.line, shutil.copytree(clean, Path(folder, "intact", str(case_index))))
                assert intact[key].status == 0, intact[key].err
            directory = shutil.copytree(clean, Path(folder, "corrupted"))
            case.corrupt(directory)
            result, why = verdict(case, run(case.line, directory), intact.get(key))
            shutil.rmtree(directory)
            counts[case.kind, result] += 1
            if why:
                failures.append(f"{case.kind}: {case.name}: {why}")
                log(failures[-1])
    return counts, failures


def table(counts: Counter, seconds: float, seed: int) -> str:
    """The counts as Markdown, for benchmarks/results/corruption.md."""
    results = ("refused", "harmless", "warned", "failure")
    kinds = list(dict.fromkeys(kind for kind, _ in counts))
    rows = [[kind, *(counts[kind, result] for result in results)] for kind in kinds]
    rows.append(["**all**", *(sum(row[n] for row in rows) for n in range(1, 5))])
    lines = [f"| {' | '.join(map(str, [row[0], sum(row[1:]), *row[1:]]))} |" for row in rows]
    versions = f"Python {platform.python_version()}, PyTorch {version('torch')}, safetensors {version('safetensors')}, "
    versions += f"sentencepiece {version('sentencepiece')}, tokenizers {version('tokenizers')}"
    return "\n".join(
        [
            "# Corrupted inputs",
            "",
            f"`python tests/fault_injection/corrupt.py --seed {seed} --output benchmarks/results/corruption.md`",
            "",
            f"{versions}; {sum(counts.values())} inputs in {seconds:.0f} s.",
            "",
            "Each input goes through a command that reads it. *Refused*: status 2, exactly one line on standard error,",
            "no file changed outside the new run directory. *Harmless*: status 0 and the result of the intact input,",
            "byte for byte. *Warned*: status 0 and the warning that belongs to it (weights that are NaN or infinite, a",
            "row that stands there twice).",
            "",
            "| kind | inputs | refused | harmless | warned | failures |",
            "|---|---:|---:|---:|---:|---:|",
            *lines,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of the places where files are cut (default: 0)")
    parser.add_argument("--fraction", type=float, default=1.0, help="of the inputs, taken at random (default: 1, all)")
    parser.add_argument("--only", default="", metavar="TEXT", help="only inputs that have this in their kind or name")
    parser.add_argument("--output", type=Path, metavar="FILE", help="Markdown table to write (default: shown)")
    options = parser.parse_args()
    selected = [case for case in cases(options.seed) if options.only in f"{case.kind}: {case.name}"]
    selected = random.Random(options.seed).sample(selected, round(options.fraction * len(selected)))
    started = time.perf_counter()
    counts, failures = run_cases(sorted(selected, key=lambda case: case.kind))
    text = table(counts, time.perf_counter() - started, options.seed)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    print(text)
    sys.exit(1 if failures else 0)


if __name__ == "__main__":
    main()
