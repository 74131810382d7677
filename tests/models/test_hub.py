"""Finding models: directories, names, and fetching a published one from a server on this machine that plays the hub."""

import fcntl
import hashlib
import json
import os
import re
import subprocess
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote

import pytest
from fetching import find_models

from minidpost.errors import UserError
from minidpost.models import hub
from minidpost.models.weights import load_template
from minidpost.text.templates import LlamaTemplate, T5Template

REPOSITORY = "google/flan-t5-xl"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
PULL_REQUEST = "89abcdef0123456789abcdef0123456789abcdef"  # another commit
SHARDS = {"encoder": "model-00001-of-00002.safetensors", "decoder": "model-00002-of-00002.safetensors"}
T5, LLAMA = hub.WEIGHTS_DIR / "tiny-t5", hub.WEIGHTS_DIR / "tiny-llama"
WANTED = {
    "config.json": (T5 / "config.json").read_bytes(),
    "spiece.model": (T5 / "spiece.model").read_bytes(),
    "model.safetensors.index.json": json.dumps({"weight_map": SHARDS}).encode(),
    SHARDS["encoder"]: bytes(range(256)) * 64,
    SHARDS["decoder"]: b"decoder" * 4096,
}
PUBLISHED = WANTED | {"pytorch_model.bin": b"a pickle", "README.md": b"card", "tokenizer.json": b"{}"}
LLAMA_CONFIG = (LLAMA / "config.json").read_bytes()
OTHER = "some.one/a_Model-1"  # not among the published ones
OTHER_WANTED = {
    "config.json": LLAMA_CONFIG,
    "generation_config.json": b'{"eos_token_id": [1, 2]}',
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b'{"add_bos_token": false}',
    "added_tokens.json": b"{}",
    "chat_template.jinja": b"{{ bos_token }}",
    "minidpost.json": b'{"template": "chat"}',  # of a model that was trained here
    "tokenizer.model": (LLAMA / "tokenizer.model").read_bytes(),
    "model.safetensors": b"weights" * 1000,
}
OTHER_FILES = OTHER_WANTED | {
    "consolidated.safetensors": b"the same again",
    "onnx/model.safetensors": b"the same for another library",
    "model.safetensors.index.json": b"of shards that are not there",
    "training_args.bin": b"a pickle",
    "vocab.json": b"{}",
    "special_tokens_map.json": b"{}",
}


def sha1(content: bytes) -> str:
    """git's name for a file, which the hub gives as the ETag of small ones."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Hub(BaseHTTPRequestHandler):
    """The four requests of a fetch: a revision's commit and files, its tree, and each file's headers and body."""

    def do_HEAD(self):
        self._file(with_body=False)

    def do_GET(self):
        asked = re.fullmatch(r"/api/models/([^/]+/[^/]+)/(revision|tree)/([^/?]+)(\?.*)?", self.path)
        if asked is None:
            return self._file(with_body=True)
        repository, kind, revision, _ = asked.groups()
        if not self._has(repository):
            return None
        commit = self.server.revisions.get(unquote(revision))
        if commit is None:
            return self._refuse(404, "RevisionNotFound")
        sizes = {name: len(body) for name, body in self._files(repository, commit).items()}
        if kind == "revision":
            names = [{"rfilename": name} for name in sizes]
            return self._answer(json.dumps({"id": repository, "sha": commit, "siblings": names}).encode())
        rows = [{"type": "file", "path": name, "size": size, "oid": name} for name, size in sizes.items()]
        return self._answer(json.dumps(rows).encode())

    def _files(self, repository: str, commit: str) -> dict[str, bytes]:
        """A repository's files; the pull request has the same with other weights."""
        files = self.server.files if repository == REPOSITORY else self.server.repositories[repository]
        return files | {"model.safetensors": b"converted"} if commit == PULL_REQUEST else files

    def _has(self, repository: str) -> bool:
        """Whether there is such a repository; if not, that has been answered."""
        if repository == REPOSITORY or repository in self.server.repositories:
            return True
        self._refuse(401, "RepoNotFound")  # as the hub does without a token, for what may be private
        return False

    def _refuse(self, status: int, code: str):
        self.send_response(status)
        if self.server.gives_reasons:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _file(self, with_body: bool):
        asked = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if asked is None or not self._has(asked[1]):
            return self.send_error(404) if asked is None else None
        repository, commit, name = asked.groups()
        if repository in self.server.gated:
            return self._refuse(401, "GatedRepo")
        files = self._files(repository, commit)
        if name not in files:
            return self.send_error(404)
        body = files[name]
        if with_body:
            self.server.served.append(name)
        if with_body and name == self.server.broken:
            if self.server.served.count(name) > 1:  # the client tries to go on at once: the line stays dead
                return self.send_error(500)
            return self._answer(body, cut=len(body) // 2, etag=hashlib.sha256(body).hexdigest())
        etag = sha1(body) if name.endswith(".json") else hashlib.sha256(body).hexdigest()
        sent = self.server.instead.get(name, body)
        return self._answer(sent if with_body else b"", length=len(sent), etag=etag, commit=commit)

    def _answer(
        self,
        body: bytes,
        length: int | None = None,
        cut: int | None = None,
        etag: str = "unknown",
        commit: str = COMMIT,
    ):
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
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
    server.repositories = {OTHER: dict(OTHER_FILES)}
    server.revisions = {"main": COMMIT, COMMIT: COMMIT, "refs/pr/1": PULL_REQUEST, PULL_REQUEST: PULL_REQUEST}
    server.gated = set()
    server.gives_reasons = True
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def find_in_new_process(endpoint: str, folder: Path, *names: str, offline: bool = False) -> subprocess.CompletedProcess:
    """Call find_model where huggingface_hub has not been imported yet, as a command does; a line for each name."""
    foreign = re.compile(r"HF_|TQDM_|.*proxy", re.IGNORECASE)
    inherited = {key: value for key, value in os.environ.items() if not foreign.match(key)}
    hub_settings = {"HF_ENDPOINT": endpoint, "HF_HOME": str(folder / "home"), "NO_PROXY": "*"}
    environment = inherited | hub_settings | {"HF_HUB_OFFLINE": str(int(offline))}
    return find_models(environment, folder / "weights", names or ("flan-t5-xl",))


def address(server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def contents(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def user_error(result: subprocess.CompletedProcess) -> str:
    """The one line a command would print."""
    (line,) = user_errors(result)
    assert result.stderr.strip().endswith(line)
    return line


def user_errors(result: subprocess.CompletedProcess) -> list[str]:
    """The lines for several names; there is no traceback anywhere."""
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    return re.findall(r"^UserError: (.*)$", result.stderr, flags=re.MULTILINE)


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

    # With the hub away, the half that is here is not taken for the whole.
    line = user_error(find_in_new_process("http://127.0.0.1:9", tmp_path))
    assert "could not be fetched from http://127.0.0.1:9/google/flan-t5-xl (no hub answers: " in line
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
    # Small files are compared with their hashes before the weights are asked for.
    weights = [] if name in SHARDS.values() else [*SHARDS.values()]
    assert sorted(server.served) == sorted([name, *weights])
    assert contents(tmp_path / "weights") == {f"flan-t5-xl/{name}": body for name, body in WANTED.items()}


def test_no_server(tmp_path):
    line = user_error(find_in_new_process("http://127.0.0.1:9", tmp_path))
    assert f"http://127.0.0.1:9/{REPOSITORY}" in line
    assert "download config.json, spiece.model, *.safetensors" in line
    assert line.endswith(f"put them in {tmp_path}/weights/flan-t5-xl")
    assert not (tmp_path / "weights/flan-t5-xl").exists()


def test_a_shard_that_the_repository_lacks_is_named(server, tmp_path):
    del server.files[SHARDS["decoder"]]
    line = user_error(find_in_new_process(address(server), tmp_path))
    assert line.endswith(f"flan-t5-xl/model.safetensors.index.json: names {SHARDS['decoder']}, which is not there")
    assert SHARDS["encoder"] not in server.served
    assert not [*(tmp_path / "weights").iterdir()]


def test_repository_without_safetensors_is_no_model(server, tmp_path):
    server.files = {name: body for name, body in PUBLISHED.items() if "safetensors" not in name}
    line = user_error(find_in_new_process(address(server), tmp_path))
    assert "flan-t5-xl: holds its weights as a pickle alone (pytorch_model.bin), which can run code and is not" in line
    assert "google/flan-t5-xl@refs/pr/N" in line and ".save_pretrained(DIR)" in line
    assert server.served == []
    assert not [*(tmp_path / "weights").iterdir()]


def test_repository_that_is_not_there(server, tmp_path):
    server.gives_reasons = False  # a mirror
    line = user_error(find_in_new_process(address(server), tmp_path, "google/no-such@main"))
    assert "google/no-such" in line and "401" in line
    assert "google--no-such@main could not be fetched from" in line


# -- repositories by their id ------------------------------------------------------------------------------------------


def test_any_repository_is_fetched_with_its_tokenizer_files(server, tmp_path):
    directory = tmp_path / "weights/some.one--a_Model-1"
    result = find_in_new_process(address(server), tmp_path, OTHER, OTHER)
    assert result.stdout == f"{directory}\n" * 2, result.stderr
    assert contents(directory) == OTHER_WANTED
    assert sorted(server.served) == sorted(OTHER_WANTED)  # nothing twice, and no weights of other formats
    assert [*(tmp_path / "weights").iterdir()] == [directory]


def test_beside_a_published_tokenizer_model_lies_its_tokenizer_json(server, tmp_path):
    server.repositories["TinyLlama/TinyLlama-1.1B-Chat-v1.0"] = OTHER_FILES
    result = find_in_new_process(address(server), tmp_path, "tinyllama-1.1b")
    assert result.returncode == 0, result.stderr
    assert contents(tmp_path / "weights/tinyllama-1.1b") == OTHER_WANTED


def test_revisions_have_directories_of_their_own(server, tmp_path):
    names = [f"{OTHER}@refs/pr/1", f"{OTHER}@{COMMIT}", f"{OTHER}@no/such"]
    result = find_in_new_process(address(server), tmp_path, *names)
    weights = tmp_path / "weights"
    directories = [weights / "some.one--a_Model-1@refs%2Fpr%2F1", weights / f"some.one--a_Model-1@{COMMIT}"]
    assert result.stdout.split() == list(map(str, directories)), result.stderr
    converted, main = map(contents, directories)
    assert main == OTHER_WANTED
    assert converted == OTHER_WANTED | {"model.safetensors": b"converted"}
    assert user_error(result) == (
        f"{address(server)}/{OTHER} has no revision 'no/such'; its branches and tags are listed there, and without "
        "@REVISION its main branch is taken"
    )


def test_a_published_repository_is_the_published_model(server, tmp_path):
    result = find_in_new_process(address(server), tmp_path, REPOSITORY, "flan-t5-xl")
    assert result.stdout == f"{tmp_path}/weights/flan-t5-xl\n" * 2, result.stderr
    assert contents(tmp_path / "weights") == {f"flan-t5-xl/{name}": body for name, body in WANTED.items()}


def test_what_a_repository_lacks_is_said_before_anything_is_fetched(server, tmp_path):
    adapter = {"adapter_config.json": b'{"base_model_name_or_path": "a/base"}', "adapter_model.safetensors": b"A, B"}
    server.repositories |= {
        "o/pickle": {
            "config.json": LLAMA_CONFIG,
            "tokenizer.json": b"{}",
            "pytorch_model-00001-of-00002.bin": b"pickle",
        },
        "o/adapter": adapter | {"tokenizer.json": b"{}"},
        "o/broken-adapter": {"adapter_config.json": b"[]", "adapter_model.bin": b"A, B"},
        "o/m-GGUF": {"config.json": b"{}", "m.Q8_0.gguf": b"GGUF", "m.Q4_K_M.gguf": b"GGUF"},
        "o/no-tokenizer": {
            "config.json": LLAMA_CONFIG,
            "vocab.json": b"{}",
            "model.safetensors": b"weights",
        },
        "o/no-config": {"tokenizer.json": b"{}", "model.safetensors": b"weights"},
        "o/data": {"README.md": b"a data set", "training_args.bin": b"pickle", "old/optimizer.pt": b"pickle"},
        "o/gpt": {"config.json": b'{"model_type": "gpt2"}', "tokenizer.json": b"{}", "model.safetensors": b"weights"},
    }
    names = [*server.repositories][1:]
    result = find_in_new_process(address(server), tmp_path, *names, "o/missing", "huggingfacetb/smollm-135m-instruct")
    pickle, adapter, broken, ggufs, no_tokenizer, no_config, data, gpt, missing, misspelt = user_errors(result)
    where = f"{address(server)}/o"
    assert pickle.startswith(f"{where}/pickle: holds its weights as a pickle alone (pytorch_model-00001-of-00002.bin)")
    assert adapter.startswith(f"{where}/adapter: a LoRA adapter of a/base, and adapters are not merged here; merge it ")
    assert broken.startswith(f"{where}/broken-adapter: a LoRA adapter of a model that it does not name, and ")
    assert ggufs == (
        f"{where}/m-GGUF: holds GGUF files alone; download one, as {where}/m-GGUF/resolve/main/m.Q4_K_M.gguf, and give "
        "the path of the file"
    )
    assert no_tokenizer == (
        f"{where}/no-tokenizer: lacks original/tokenizer.model or spiece.model or tokenizer.json or tokenizer.model, "
        "so its model cannot be used here"
    )
    assert no_config == f"{where}/no-config: lacks config.json, so its model cannot be used here"
    assert data.startswith(f"{where}/data: holds neither model.safetensors nor model.safetensors.index.json")
    assert gpt.startswith(f"{where}/gpt/config.json: model_type 'gpt2' is not known; known: 't5', 'llama'")
    assert missing == (
        f"there is no repository {where}/missing, and no directory o/missing here; if the repository is private, set "
        "HF_TOKEN and run the command again"
    )
    assert "(did you mean HuggingFaceTB/SmolLM2-135M-Instruct?)" in misspelt
    assert not {"model.safetensors", "adapter_model.safetensors", "m.Q8_0.gguf"} & {*server.served}
    assert not [*(tmp_path / "weights").iterdir()]


def test_what_no_command_would_take_is_refused_before_the_weights(server, tmp_path):
    def sharded(index: str) -> dict[str, bytes]:
        small = {name: body for name, body in OTHER_WANTED.items() if name != "model.safetensors"}
        return small | {"model.safetensors.index.json": index.encode(), "sub/1.safetensors": b"weights"}

    few = json.loads(LLAMA_CONFIG) | {"vocab_size": 5}
    lines = {
        "o/tokenizer": ("/tokenizer.model: not a SentencePiece model, ", OTHER_WANTED | {"tokenizer.model": b"pieces"}),
        "o/other": (": the tokenizer has ", OTHER_WANTED | {"config.json": json.dumps(few).encode()}),
        "o/shards": (
            "/model.safetensors.index.json: shard 'sub/1.safetensors' is no safetensors file of this directory",
            sharded('{"weight_map": {"a": "sub/1.safetensors"}}'),
        ),
        "o/index": ("/model.safetensors.index.json: not readable as an index", sharded('{"weight_map": 5}')),
    }
    server.repositories |= {name: files for name, (_, files) in lines.items()}
    result = find_in_new_process(address(server), tmp_path, *lines)
    for line, (name, (expected, _)) in zip(user_errors(result), lines.items(), strict=True):
        assert line.startswith(f"{address(server)}/{name}{expected}")
    assert not {"model.safetensors", "sub/1.safetensors"} & {*server.served}
    assert not [*(tmp_path / "weights").iterdir()]


def test_a_gated_repository_says_how_to_get_in(server, tmp_path):
    server.gated = {OTHER}
    line = user_error(find_in_new_process(address(server), tmp_path, OTHER))
    assert line.startswith(f"no directory {OTHER} is here, and some.one--a_Model-1 could not be fetched from ")
    assert f"{address(server)}/{OTHER} (401 Client Error" in line
    assert "accept its licence there and set HF_TOKEN, then run the command again" in line
    assert "download config.json, tokenizer.json, *.safetensors" in line
    assert server.served == []


def test_offline_says_that_no_hub_answers(server, tmp_path):
    line = user_error(find_in_new_process(address(server), tmp_path, OTHER, offline=True))
    assert "(no hub answers: Cannot reach" in line and "HF_HUB_OFFLINE" in line
    assert server.served == []


def test_one_process_fetches_while_others_wait(server, tmp_path):
    weights = tmp_path / "weights"
    weights.mkdir()
    handle = os.open(weights, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    results = []
    waiting = Thread(target=lambda: results.append(find_in_new_process(address(server), tmp_path, OTHER)))
    waiting.start()
    make_model(weights / "some.one--a_Model-1", "config.json", "tokenizer.json", "model.safetensors")
    os.close(handle)
    waiting.join()
    assert results[0].stdout == f"{weights}/some.one--a_Model-1\n", results[0].stderr
    assert server.served == []


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
    (tiny / hub.INDEX).write_text(json.dumps({"weight_map": {"a": SHARDS["encoder"], "b": SHARDS["encoder"]}}))
    assert hub.find_model("tiny-t5", tmp_path) == tiny


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        (
            "flan-t5-larg",
            r"'flan-t5-larg' \(did you mean flan-t5-large\?\); known models: tiny-t5, tiny-t5-sft, tiny-t5-dpo-st, "
            "tiny-llama, ",
        ),
        ("google/flan-t5-base", r"flan-t5-base: lacks model-00002-of-00002\.safetensors;"),
        ("google/flan/t5-base", r"'google/flan/t5-base' \(did you mean flan-t5-base\?\)"),
        ("../flan-t5-base", r"'\.\./flan-t5-base' \(did you mean flan-t5-base\?\); known models: "),
        ("owner/two--dashes", r"'owner/two--dashes'; known models: "),
        ("owner/-dash", r"'owner/-dash'; known models: .* a \.gguf file, or OWNER/NAME on the hub$"),
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
    (half / hub.INDEX).write_text(json.dumps({"weight_map": SHARDS}))
    make_model(tmp_path / "flan-t5-small", "config.json", "spiece.model", hub.INDEX)
    for other, text in (("flan-t5-xl", "[" * 10**5), ("flan-t5-large", '{"weight_map": {"a": 3}}')):
        (make_model(tmp_path / other, "config.json", "spiece.model") / hub.INDEX).write_text(text)
    with pytest.raises(UserError, match=complaint) as raised:
        hub.find_model(name.format(tmp=tmp_path), tmp_path)
    assert "\n" not in str(raised.value)


def test_existing_directories_win_over_repositories(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_model(tmp_path / "owner/model", "config.json")
    make_model(tmp_path / "owner/empty")
    make_model(tmp_path / "tiny-t5", "config.json")
    assert hub.find_model("owner/model", tmp_path / "weights") == Path("owner/model")
    assert hub.find_model("tiny-t5", tmp_path / "weights") == Path("tiny-t5")
    with pytest.raises(UserError, match=r"^owner/empty: this directory holds no config\.json"):
        hub.find_model("owner/empty", tmp_path / "weights")


@pytest.mark.parametrize("name", [".", "..", "sub/.."])
def test_a_model_given_by_dots_is_found_by_its_own_name(tmp_path, monkeypatch, name):
    """A run's directory is named by the model's, and would begin with a dash."""
    mine = make_model(tmp_path / "mine", "config.json")
    make_model(mine / "sub")
    monkeypatch.chdir(mine / "sub" if name == ".." else mine)
    assert hub.find_model(name, tmp_path / "weights") == mine.resolve()


def test_a_file_is_not_looked_for_on_a_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_fetch", lambda source: pytest.fail(f"asks for {source.repository}"))
    make_model(tmp_path / "mine", "config.json", "model.safetensors")
    make_model(tmp_path / "files", "notes")
    (tmp_path / "files/llama-Q4").write_bytes(b"GGUF" + bytes(20))
    (tmp_path / "tiny-t5").write_text("a file of that name")
    format_ = "a file; a model is given as a directory in Hugging Face's format"
    for name, line in {
        "files/llama-Q4": "a GGUF file, but its name does not end in .gguf; rename it to llama-Q4.gguf",
        "files/notes": f"{format_}, or as a .gguf file",
        "mine/config.json": f"{format_}, as {tmp_path}/mine, or as a .gguf file",
        "mine/model.safetensors": f"{format_}, as {tmp_path}/mine, or as a .gguf file",
    }.items():
        with pytest.raises(UserError) as raised:
            hub.find_model(name, tmp_path / "weights")
        assert str(raised.value) == f"{name}: {line}"
    assert hub.find_model("tiny-t5") == hub.WEIGHTS_DIR / "tiny-t5"
    assert not (tmp_path / "weights").exists()


def test_directories_of_adapters_and_gguf_files_say_what_to_give(tmp_path):
    adapter = make_model(tmp_path / "adapter", "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "meta-llama/Llama-3.2-1B"}')
    with pytest.raises(UserError, match=r"adapter: a LoRA adapter of meta-llama/Llama-3\.2-1B, and adapters are not"):
        hub.find_model(str(adapter), tmp_path)
    files = make_model(tmp_path / "files", "b.gguf", "a.gguf")
    with pytest.raises(UserError, match=r"files: this directory holds GGUF files .* path of one, as .*files/a\.gguf$"):
        hub.find_model(str(files), tmp_path)


def test_any_readable_tokenizer_file_will_do(tmp_path):
    make_model(tmp_path / "llama-3-8b" / "original", "tokenizer.model")
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "llama-3-8b" / name).write_text("{}")
    assert hub.find_model("llama-3-8b", tmp_path) == tmp_path / "llama-3-8b"
    (tmp_path / "llama-3-8b/original/tokenizer.model").rename(tmp_path / "llama-3-8b/tokenizer.json")
    assert hub.find_model("llama-3-8b", tmp_path) == tmp_path / "llama-3-8b"
    (tmp_path / "llama-3-8b/tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"lacks tokenizer\.json; put it there"):
        hub.find_model("llama-3-8b", tmp_path)


def test_a_repository_with_a_licence_says_so(server, tmp_path):
    line = user_error(find_in_new_process(address(server), tmp_path, "llama-3.2-1b"))
    assert "accept its licence there and set HF_TOKEN, then run the command again" in line
    assert "download config.json, tokenizer.json, *.safetensors" in line


def test_weights_lie_in_the_repository():
    assert Path(hub.__file__).parents[2] / "weights" == hub.WEIGHTS_DIR


@pytest.mark.parametrize("name", hub.BUNDLED)
def test_bundled_models_are_there_and_small(name):
    files = list(hub.find_model(name).iterdir())
    assert sum(file.stat().st_size for file in files) < 6 * 10**6
    assert isinstance(load_template(hub.find_model(name)), LlamaTemplate if "llama" in name else T5Template)
