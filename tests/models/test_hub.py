"""Finding models: directories, names, and fetching a published one from a server on this machine that plays the hub."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from minidpost.errors import UserError
from minidpost.models import hub
from minidpost.models.weights import load_template
from minidpost.text.templates import LlamaTemplate, T5Template

REPOSITORY = "google/flan-t5-xl"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
SHARDS = {"encoder": "model-00001-of-00002.safetensors", "decoder": "model-00002-of-00002.safetensors"}
WANTED = {
    "config.json": b'{"model_type": "t5"}',
    "spiece.model": b"pieces" * 100,
    "model.safetensors.index.json": json.dumps({"weight_map": SHARDS}).encode(),
    SHARDS["encoder"]: bytes(range(256)) * 64,
    SHARDS["decoder"]: b"decoder" * 4096,
}
PUBLISHED = WANTED | {"pytorch_model.bin": b"a pickle", "README.md": b"card", "tokenizer.json": b"{}"}


def sha1(content: bytes) -> str:
    """git's name for a file, which the hub gives as the ETag of small ones."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """The four requests of a snapshot: the commit of main, its files, and each file's headers and body."""

    def do_HEAD(self):
        self._file(with_body=False)

    def do_GET(self):
        if self.path == f"/api/models/{REPOSITORY}/revision/main":
            self._answer(json.dumps({"id": REPOSITORY, "sha": COMMIT}).encode())
        elif self.path.startswith(f"/api/models/{REPOSITORY}/tree/{COMMIT}"):
            sizes = {name: len(body) for name, body in self.server.files.items()}
            rows = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
            self._answer(json.dumps(rows).encode())
        else:
            self._file(with_body=True)

    def _file(self, with_body: bool):
        name = self.path.removeprefix(f"/{REPOSITORY}/resolve/{COMMIT}/")
        if name not in self.server.files:
            return self.send_error(404)
        body = self.server.files[name]
        if with_body:
            self.server.served.append(name)
        if with_body and name == self.server.broken:
            if self.server.served.count(name) > 1:  # the client tries to go on at once: the line stays dead
                return self.send_error(500)
            return self._answer(body, cut=len(body) // 2, etag=hashlib.sha256(body).hexdigest())
        etag = sha1(body) if name.endswith(".json") else hashlib.sha256(body).hexdigest()
        sent = self.server.instead.get(name, body)
        self._answer(sent if with_body else b"", length=len(sent), etag=etag)

    def _answer(self, body: bytes, length: int | None = None, cut: int | None = None, etag: str = "unknown"):
        self.send_response(200)
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{etag}"')
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        self.wfile.write(body[:cut])

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.files, server.served, server.broken, server.instead = dict(PUBLISHED), [], None, {}
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def find_in_new_process(endpoint: str, folder: Path, name: str = "flan-t5-xl") -> subprocess.CompletedProcess:
    """Call find_model where huggingface_hub has not been imported yet, as a command does."""
    program = """
import sys
from minidpost import storage
from minidpost.models import hub
assert "huggingface_hub" not in sys.modules
try:
    print(hub.find_model(sys.argv[1], hub.Path(sys.argv[2])))
except storage.UserError as error:
    sys.exit(f"UserError: {error}")
"""
    foreign = re.compile(r"HF_|TQDM_|.*proxy", re.IGNORECASE)
    inherited = {key: value for key, value in os.environ.items() if not foreign.match(key)}
    hub_settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0", "NO_PROXY": "*"}
    return subprocess.run(
        [sys.executable, "-c", program, name, str(folder / "weights")],
        cwd=Path(hub.__file__).parents[2],
        env=inherited | hub_settings,
        capture_output=True,
        text=True,
        timeout=120,
    )


def address(server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def user_error(result: subprocess.CompletedProcess) -> str:
    """The one line a command would print; there is no traceback anywhere."""
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    (line,) = re.findall(r"^UserError: (.*)\Z", result.stderr.strip(), flags=re.MULTILINE)
    return line


def test_published_model_is_fetched_whole(server, tmp_path):
    result = find_in_new_process(address(server), tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{tmp_path}/weights/flan-t5-xl\n"
    assert contents(tmp_path / "weights") == {f"flan-t5-xl/{name}": body for name, body in WANTED.items()}
    assert "100%" in result.stderr  # progress was shown

    server.served.clear()
    assert find_in_new_process(address(server), tmp_path).stdout == result.stdout
    assert server.served == []


def test_a_cut_connection_is_completed_by_the_next_call(server, tmp_path):
    server.broken = SHARDS["decoder"]
    line = user_error(find_in_new_process(address(server), tmp_path))
    assert "flan-t5-xl could not be fetched" in line
    assert [path.name for path in (tmp_path / "weights").iterdir()] == ["flan-t5-xl.unfinished"]

    # With the hub away and its cache empty, huggingface_hub takes the half that is here for the whole.
    shutil.rmtree(tmp_path / "home")
    line = user_error(find_in_new_process("http://127.0.0.1:9", tmp_path))
    assert f"{SHARDS['decoder']} did not arrive" in line
    assert not (tmp_path / "weights/flan-t5-xl").exists()

    server.broken = None
    server.served.clear()
    assert find_in_new_process(address(server), tmp_path).returncode == 0
    assert SHARDS["decoder"] in server.served and SHARDS["encoder"] not in server.served
    assert contents(tmp_path / "weights") == {f"flan-t5-xl/{name}": body for name, body in WANTED.items()}


PAGE = b"<!DOCTYPE html><html><body>Please log in.</body></html>"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", PAGE),
        ("spiece.model", PAGE),
        (SHARDS["encoder"], PAGE),
        (SHARDS["encoder"], WANTED[SHARDS["encoder"]][::-1]),
        (SHARDS["decoder"], WANTED[SHARDS["decoder"]] + b"more"),
    ],
)
def test_altered_files_are_fetched_again(server, tmp_path, name, content):
    server.instead[name] = content
    line = user_error(find_in_new_process(address(server), tmp_path))
    assert f"{name} arrived altered, its hash is not " in line and "run the command again" in line
    assert not (tmp_path / "weights/flan-t5-xl").exists()

    server.instead.clear()
    server.served.clear()
    result = find_in_new_process(address(server), tmp_path)
    assert result.returncode == 0, result.stderr
    assert server.served == [name]
    assert contents(tmp_path / "weights") == {f"flan-t5-xl/{name}": body for name, body in WANTED.items()}


def test_no_server(tmp_path):
    line = user_error(find_in_new_process("http://127.0.0.1:9", tmp_path))
    assert f"http://127.0.0.1:9/{REPOSITORY}" in line
    assert "download config.json, spiece.model, *.safetensors" in line
    assert line.endswith(f"put them in {tmp_path}/weights/flan-t5-xl")
    assert not (tmp_path / "weights/flan-t5-xl").exists()


def test_repository_without_safetensors_is_no_model(server, tmp_path):
    server.files = {name: body for name, body in PUBLISHED.items() if "safetensors" not in name}
    assert "model.safetensors did not arrive" in user_error(find_in_new_process(address(server), tmp_path))
    assert "pytorch_model.bin" not in server.served
    assert not (tmp_path / "weights/flan-t5-xl").exists()


def test_repository_that_is_not_there(server, tmp_path):
    line = user_error(find_in_new_process(address(server), tmp_path, name="flan-t5-small"))
    assert "google/flan-t5-small" in line and "404" in line


def make_model(directory: Path, *files: str) -> Path:
    directory.mkdir(parents=True)
    for file in files:
        (directory / file).write_text("{}")
    return directory


def test_directories_and_names(tmp_path):
    mine = make_model(tmp_path / "mine", "config.json")
    assert hub.find_model(str(mine), tmp_path) == mine
    tiny = make_model(tmp_path / "tiny-t5", "config.json", "spiece.model", "model.safetensors")
    assert hub.find_model("tiny-t5", tmp_path) == tiny
    (tiny / "model.safetensors").rename(tiny / SHARDS["encoder"])
    (tiny / hub.SHARDS).write_text(json.dumps({"weight_map": {"a": SHARDS["encoder"], "b": SHARDS["encoder"]}}))
    assert hub.find_model("tiny-t5", tmp_path) == tiny


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (
            "flan-t5-larg",
            r"'flan-t5-larg' \(did you mean flan-t5-large\?\); known models: tiny-t5, tiny-t5-sft, tiny-t5-dpo-st, "
            "tiny-llama, ",
        ),
        ("google/flan-t5-base", r"'google/flan-t5-base' \(did you mean flan-t5-base\?\)"),
        ("zzz", r"'zzz'; known models: "),
        ("{tmp}/empty", r"empty: this directory holds no config\.json"),
        ("tiny-t5", r"tiny-t5 is missing, though it is part of the repository"),
        ("t5-large", r"t5-large: lacks spiece\.model, model\.safetensors; put it there"),
        ("flan-t5-base", r"flan-t5-base: lacks model-00002-of-00002\.safetensors;"),
        ("flan-t5-xl", r"flan-t5-xl: lacks a readable model\.safetensors\.index\.json;"),
        ("flan-t5-large", r"flan-t5-large: lacks a readable model\.safetensors\.index\.json;"),
        ("flan-t5-small", r"flan-t5-small: lacks a readable model\.safetensors\.index\.json;"),
    ],
)
def test_what_is_no_model(tmp_path, name, complaint):
    make_model(tmp_path / "empty")
    make_model(tmp_path / "t5-large", "config.json")
    half = make_model(tmp_path / "flan-t5-base", "config.json", "spiece.model", SHARDS["encoder"])
    (half / hub.SHARDS).write_text(json.dumps({"weight_map": SHARDS}))
    make_model(tmp_path / "flan-t5-small", "config.json", "spiece.model", hub.SHARDS)
    for other, text in (("flan-t5-xl", "[" * 10**5), ("flan-t5-large", '{"weight_map": {"a": 3}}')):
        (make_model(tmp_path / other, "config.json", "spiece.model") / hub.SHARDS).write_text(text)
    with pytest.raises(UserError, match=complaint) as raised:
        hub.find_model(name.format(tmp=tmp_path), tmp_path)
    assert "\n" not in str(raised.value)


def test_any_readable_tokenizer_file_will_do(tmp_path):
    make_model(tmp_path / "llama-3-8b" / "original", "tokenizer.model")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "llama-3-8b" / name).write_text("{}")
    assert hub.find_model("llama-3-8b", tmp_path) == tmp_path / "llama-3-8b"
    (tmp_path / "llama-3-8b/original/tokenizer.model").rename(tmp_path / "llama-3-8b/tokenizer.json")
    assert hub.find_model("llama-3-8b", tmp_path) == tmp_path / "llama-3-8b"
    (tmp_path / "llama-3-8b/tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"lacks original/tokenizer\.model; put it there"):
        hub.find_model("llama-3-8b", tmp_path)


def test_a_repository_with_a_licence_says_so(server, tmp_path):
    line = user_error(find_in_new_process(address(server), tmp_path, name="llama-3.2-1b"))
    assert "accept its licence there and set HF_TOKEN, then run the command again" in line
    assert "download config.json, original/tokenizer.model, *.safetensors" in line


def test_weights_lie_in_the_repository():
    assert Path(hub.__file__).parents[2] / "weights" == hub.WEIGHTS_DIR


@pytest.mark.parametrize("name", hub.BUNDLED)
def test_bundled_models_are_there_and_small(name):
    files = list(hub.find_model(name).iterdir())
    assert sum(file.stat().st_size for file in files) < 6 * 10**6
    assert isinstance(load_template(hub.find_model(name)), LlamaTemplate if "llama" in name else T5Template)
