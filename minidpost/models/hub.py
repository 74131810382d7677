"""From a model's name to its directory: our own weights lie in the repository, others are fetched or converted once.

A fetched model has the files that weights.py and tokenizer.py read (config.json, safetensors, the vocabulary), never
a pickle. It lies under `NAME.unfinished` until it is complete; a fetch that was broken off goes on with the files that
had arrived whole. What a repository holds, whether its config.json is of a family that we have, and whether its
tokenizer and its index of shards can be used, is looked at before the first weight is fetched.
"""

import difflib
import fcntl
import glob
import hashlib
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from minidpost.errors import UserError
from minidpost.models.gguf import MAGIC, convert_gguf, source_of
from minidpost.models.hf_config import read_config
from minidpost.models.weights import (
    ADAPTER_CONFIG,
    INDEX,
    RECORD,
    WEIGHTS,
    explain_adapter,
    load_template,
    pickled_weights,
    shards_of,
    tensors_of_shards,
)
from minidpost.storage import sha256_of
from minidpost.text.chat import CHAT_FILES
from minidpost.text.tokenizer import ADDED_TOKENS, FILE_NAMES

WEIGHTS_DIR = Path(__file__).resolve().parents[2] / "weights"
BUNDLED = ("tiny-t5", "tiny-t5-sft", "tiny-t5-dpo-st", "tiny-llama")  # base models, and what SFT and DPO-ST make of one
PUBLISHED: dict[str, tuple[str, str]] = {  # name: repository, and its tokenizer file of those we read
    "flan-t5-small": ("google/flan-t5-small", "spiece.model"),
    "flan-t5-base": ("google/flan-t5-base", "spiece.model"),
    "flan-t5-large": ("google/flan-t5-large", "spiece.model"),
    "flan-t5-xl": ("google/flan-t5-xl", "spiece.model"),
    "t5-large": ("google-t5/t5-large", "spiece.model"),
    "llama-7b": ("huggyllama/llama-7b", "tokenizer.model"),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", "tokenizer.model"),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", "tokenizer.json"),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", "tokenizer.json"),
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", "tokenizer.json"),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", "tokenizer.json"),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "tokenizer.json"),
    "tinyllama-1.1b": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "tokenizer.model"),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B", "tokenizer.json"),
    "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B", "tokenizer.json"),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B-Base", "tokenizer.json"),
    "mistral-7b": ("mistralai/Mistral-7B-v0.3", "tokenizer.model"),  # of the three, the one without sliding window
}
BROKEN_INDEX = (OSError, ValueError, KeyError, AttributeError, TypeError)  # what reading one may raise
SETTINGS = (*CHAT_FILES, ADDED_TOKENS, "generation_config.json", RECORD)  # fetched where they are there

_PART = r"[A-Za-z0-9](?:[\w.-]*\w)?"  # of a repository's id: neither `.` nor `-` at its ends
_HUB_ID = re.compile(rf"({_PART}/{_PART})(?:@(.+))?", re.ASCII)


@dataclass(frozen=True)
class _Source:
    """Where a model is fetched from, and the directory it gets; `tokenizer_file` None: whichever the repository has."""

    repository: str
    revision: str
    tokenizer_file: str | None
    directory: Path


def find_model(name_or_path: str, weights_dir: Path = WEIGHTS_DIR) -> Path:
    """Return the directory of a model, after fetching or converting it where that has not been done yet.

    `name_or_path` is the first of these that it can be:

    1. a directory with a config.json, in Hugging Face's layout. An existing relative directory `a/b` wins over a
       repository of that name (so does a file, which is refused), and one called `tiny-t5` over the bundled model;
    2. a `.gguf` file: converted into `weights_dir/NAME` the first time; later calls know by its sha256 that it is the
       same file. Where NAME is another model's, the directory's name ends in the first digits of the sha256;
    3. the name of a bundled or a published model;
    4. a repository of the Hugging Face hub, as `OWNER/NAME` or `OWNER/NAME@REVISION` (a branch, a tag or a commit):
       fetched into `weights_dir/OWNER--NAME[@REVISION]`, once: where a branch moves on, the directory stays as it is.
       A published model's repository without a revision is that model.

    UserError: nothing of the kind, a broken or an incomplete model, one that cannot be read here (pickles alone, an
    adapter, GGUF files alone, another family), a fetch that fails.
    """
    path = Path(name_or_path)
    weights_dir = Path(weights_dir)
    if (path / "config.json").is_file():
        return path.resolve() if path.name in ("", "..") else path  # so that it has a name, as runs are named by it
    if path.suffix.lower() == ".gguf" and not path.is_dir():
        return _converted(path, weights_dir)
    if name_or_path in BUNDLED:
        found = weights_dir / name_or_path
        if not found.exists():
            raise UserError(f"{found} is missing, though it is part of the repository; restore it with git checkout")
        _check_complete(found, FILE_NAMES[0])
        return found
    source = _source_of(name_or_path, weights_dir)
    if source is None:
        raise UserError(_explain_unknown(name_or_path))
    if not source.directory.exists():
        with _alone_in(weights_dir):
            if not source.directory.exists():  # another process may have fetched it while this one waited
                _fetch(source)
    _check_complete(source.directory, source.tokenizer_file)
    return source.directory


def _source_of(name: str, weights_dir: Path) -> _Source | None:
    """What a published name or a repository's id stands for; None where it is neither, or what exists here."""
    if name in PUBLISHED:
        repository, tokenizer_file = PUBLISHED[name]
        return _Source(repository, "main", tokenizer_file, weights_dir / name)
    hub_id = _HUB_ID.fullmatch(name)
    if hub_id is None or Path(name).exists() or "--" in hub_id[1] or ".." in hub_id[1]:
        return None
    repository, revision = hub_id.groups()
    for published_name, (published_repository, _) in PUBLISHED.items():
        if repository == published_repository and revision is None:
            return _source_of(published_name, weights_dir)
    # No repository has `--` in its id, so that no two of them share a directory.
    directory = repository.replace("/", "--") + (f"@{quote(revision, safe='')}" if revision else "")
    return _Source(repository, revision or "main", None, weights_dir / directory)


def _explain_unknown(name: str) -> str:
    """Say what is wrong with a name that is no model's, nor a directory with one."""
    path = Path(name)
    if path.is_file():
        return _explain_file(path)
    if path.is_dir():
        if (path / ADAPTER_CONFIG).is_file():
            return explain_adapter(name, path / ADAPTER_CONFIG)
        files = sorted(path.glob("*.gguf"))
        if files:
            return f"{name}: this directory holds GGUF files and no config.json; give the path of one, as {files[0]}"
        return f"{name}: this directory holds no config.json, so it is no model in Hugging Face's format"
    known = (*BUNDLED, *PUBLISHED)
    closest = difflib.get_close_matches(name.rpartition("/")[2].lower(), known, n=1)
    hint = f" (did you mean {closest[0]}?)" if closest else ""
    return (
        f"no model and no directory is called {name!r}{hint}; known models: {', '.join(known)}; any other is given as "
        "a directory, a .gguf file, or OWNER/NAME on the hub"
    )


def _explain_file(path: Path) -> str:
    """Say what to give instead of a file; those whose name ends in .gguf do not come here."""
    try:
        with path.open("rb") as stream:
            is_gguf = stream.read(len(MAGIC)) == MAGIC
    except OSError:
        is_gguf = False
    if is_gguf:
        return f"{path}: a GGUF file, but its name does not end in .gguf; rename it to {path.name}.gguf"
    directory = path.absolute().parent
    example = f", as {directory}" if (directory / "config.json").is_file() else ""
    return f"{path}: a file; a model is given as a directory in Hugging Face's format{example}, or as a .gguf file"


def _missing_files(directory: Path, tokenizer_file: str | None) -> list[str]:
    """Name the files that a model still lacks; shards are those that its index names, any tokenizer file will do."""
    weights = [WEIGHTS]
    index = directory / INDEX
    if index.is_file():
        try:
            weights = sorted(map(os.fspath, set(shards_of(index).values())))
        except BROKEN_INDEX:
            weights = [f"a readable {INDEX}"]
    has_tokenizer = any((directory / name).is_file() for name in FILE_NAMES)
    tokenizer = [] if has_tokenizer else [tokenizer_file or "tokenizer.json"]
    return [file for file in ("config.json", *tokenizer, *weights) if not (directory / file).is_file()]


def _check_complete(directory: Path, tokenizer_file: str | None) -> None:
    """UserError where a directory under weights/ lacks files that a model needs."""
    missing = _missing_files(directory, tokenizer_file)
    if missing:
        raise UserError(
            f"{directory}: lacks {', '.join(missing)}; put it there, or remove the directory and start again"
        )


@contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Wait until no other process fetches or converts a model into a directory, and have others wait meanwhile.

    The processes of a training on several GPUs all ask for its model: the first one fetches it.
    """
    directory.mkdir(parents=True, exist_ok=True)
    handle = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process that fetches or converts a model into {directory}", file=sys.stderr)
            fcntl.flock(handle, fcntl.LOCK_EX)
        except OSError:  # a file system without locks: as if this process were alone
            pass
        yield
    finally:
        os.close(handle)  # which unlocks


# -- GGUF files --------------------------------------------------------------------------------------------------------


def _converted(path: Path, weights_dir: Path) -> Path:
    """The directory that a GGUF file was converted into, now or before; UserError where it cannot be."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; a GGUF file is given by its path")
    sha256 = sha256_of(path)
    with _alone_in(weights_dir):
        directory, exists = gguf_directory(path, sha256, weights_dir)
        if not exists:
            convert_gguf(path, directory, sha256=sha256)
    return directory


def gguf_directory(path: Path, sha256: str, weights_dir: Path = WEIGHTS_DIR) -> tuple[Path, bool]:
    """Which directory under weights/ is a GGUF file's, and whether it exists, made from a file of this sha256.

    It has the file's name without `.gguf`; where another model has that name, or may get it, the first digits of the
    sha256 follow.
    """
    name = path.stem
    is_reserved = name in (*BUNDLED, *PUBLISHED) or "--" in name or name.endswith(".unfinished")
    candidates = [weights_dir / f"{name}-{sha256[:12]}"]
    if not is_reserved:
        candidates.insert(0, weights_dir / name)
    for directory in candidates:
        if source_of(directory) == sha256:
            return directory, True
    for directory in candidates:
        if not directory.exists():
            return directory, False
    raise UserError(f"{candidates[-1]}: was not made from {path}, though its name says so; remove it and start again")


# -- the hub -----------------------------------------------------------------------------------------------------------


def _fetch(source: _Source) -> None:
    """Download the files of a repository that are read; the directory appears only when nothing is missing.

    UserError: the repository is not there or may not be read, it holds no model that can be read here, a broken line.
    """
    from huggingface_hub import snapshot_download  # here: reads HF_ENDPOINT now, and is slow to import

    unfinished = source.directory.with_name(f"{source.directory.name}.unfinished")

    def download(names: list[str]) -> None:
        patterns = [glob.escape(name) for name in names]
        snapshot_download(source.repository, revision=commit, local_dir=unfinished, allow_patterns=patterns)
        # A broken line may leave it content with less.
        missing = [name for name in names if not (unfinished / name).is_file()]
        if missing:
            raise FileNotFoundError(f"{', '.join(missing)} did not arrive")
        _check_arrived(unfinished)

    try:
        # 1) What is there? Later requests name the commit, so that all files are of one.
        commit, files = _list_files(source)
        _check_readable(files, commit, source)

        # 2) The small files, and whether a command would take the model that they describe.
        tokenizer_files: tuple[str, ...] = FILE_NAMES
        if source.tokenizer_file == "tokenizer.model":  # which does not say how a text after a special token begins
            tokenizer_files = ("tokenizer.model", "tokenizer.json")
        elif source.tokenizer_file is not None:
            tokenizer_files = (source.tokenizer_file,)
        index = [] if WEIGHTS in files else [INDEX]
        download([name for name in ("config.json", *tokenizer_files, *SETTINGS, *index) if name in files])
        _check_small_files(unfinished, files, source)

        # 3) The weights: one file, or the shards of the index. Repositories may hold them twice, in other formats.
        download([WEIGHTS] if WEIGHTS in files else [path.name for path in tensors_of_shards(unfinished / INDEX)])
        shutil.rmtree(unfinished / ".cache", ignore_errors=True)  # its records of the download
        os.replace(unfinished, source.directory)
    except UserError:
        raise
    except Exception as error:  # huggingface_hub's errors, its HTTP client's and its Rust part's share no other base
        raise UserError(_explain_failure(error, source)) from None


def _list_files(source: _Source) -> tuple[str, set[str]]:
    """The commit that a revision stands for now, and the names of its files.

    Raises huggingface_hub's error for what the hub refuses, ConnectionError where no hub answers.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info = HfApi().model_info(source.repository, revision=source.revision)
        return str(info.sha), {file.rfilename for file in info.siblings or []}
    except HfHubHTTPError:
        raise
    except Exception as error:  # no network, HF_HUB_OFFLINE, or an answer that is no hub's
        raise ConnectionError(f"no hub answers: {error}") from None


def _check_readable(files: set[str], commit: str, source: _Source) -> None:
    """UserError where the files of a repository are no model that can be read here, with what to do instead."""
    from huggingface_hub import constants, snapshot_download

    where = f"{constants.ENDPOINT}/{source.repository}"
    if WEIGHTS in files or INDEX in files:
        tokenizer_files = {source.tokenizer_file} if source.tokenizer_file else set(FILE_NAMES)
        missing = ["config.json"] if "config.json" not in files else []
        if not files & tokenizer_files:
            missing.append(" or ".join(sorted(tokenizer_files)))
        if missing:
            raise UserError(f"{where}: lacks {' and '.join(missing)}, so its model cannot be used here")
        return
    if ADAPTER_CONFIG in files:
        with tempfile.TemporaryDirectory() as folder:
            snapshot_download(source.repository, revision=commit, local_dir=folder, allow_patterns=[ADAPTER_CONFIG])
            raise UserError(explain_adapter(where, Path(folder) / ADAPTER_CONFIG))
    gguf_files = sorted(name for name in files if name.endswith(".gguf"))
    if gguf_files:
        url = f"{where}/resolve/{quote(source.revision, safe='')}/{gguf_files[0]}"
        raise UserError(f"{where}: holds GGUF files alone; download one, as {url}, and give the path of the file")
    pickles = pickled_weights(files)
    if pickles:
        raise UserError(
            f"{where}: holds its weights as a pickle alone ({pickles[0]}), which can run code and is not read; give a "
            f"revision that has safetensors ({source.repository}@refs/pr/N: see its pull requests), or convert it once "
            "where transformers is installed: AutoModel….from_pretrained(NAME).save_pretrained(DIR)"
        )
    raise UserError(f"{where}: holds neither {WEIGHTS} nor {INDEX}, so it is no model that can be read here")


def _check_small_files(unfinished: Path, files: set[str], source: _Source) -> None:
    """UserError where a model cannot be used, as far as can be told without its weights; then nothing is left.

    That is config.json of another family, a tokenizer that is broken or another model's, an index that names shards
    that are not there or lie elsewhere. Nothing is asked of a chat template: the model can do without.
    """
    from huggingface_hub import constants

    index = unfinished / INDEX
    try:
        family = read_config(unfinished).family
        load_template(unfinished, None if family == "t5" else "alpaca")
        shards = [] if WEIGHTS in files else [path.name for path in tensors_of_shards(index)]
        missing = [name for name in shards if name not in files]
        if missing:
            raise UserError(f"{index}: names {missing[0]}, which is not there")
    except UserError as error:
        shutil.rmtree(unfinished)
        reason = str(error).replace(os.fspath(unfinished), f"{constants.ENDPOINT}/{source.repository}")
        raise UserError(reason) from None


def _explain_failure(error: Exception, source: _Source) -> str:
    """Say in one line why a fetch failed and what to do about it."""
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    address = f"{constants.ENDPOINT}/{source.repository}"
    if isinstance(error, RevisionNotFoundError):
        return (
            f"{address} has no revision {source.revision!r:.200}; its branches and tags are listed there, and without "
            "@REVISION its main branch is taken"
        )
    is_gated = isinstance(error, GatedRepoError) or source.repository.startswith("meta-llama/")
    if isinstance(error, RepositoryNotFoundError) and not is_gated:
        known = {repository.lower(): repository for repository, _ in PUBLISHED.values()}
        closest = difflib.get_close_matches(source.repository.lower(), known, n=1)
        hint = f" (did you mean {known[closest[0]]}?)" if closest else ""
        return (
            f"there is no repository {address}{hint}, and no directory {source.repository} here; if the repository is "
            "private, set HF_TOKEN and run the command again"
        )
    reason = str(error).partition("\n")[0] or type(error).__name__
    licence = "accept its licence there and set HF_TOKEN, then " if is_gated else ""
    is_by_id = source.tokenizer_file is None
    no_directory = f"no directory {source.repository} is here, and " if is_by_id else ""
    return (
        f"{no_directory}{source.directory.name} could not be fetched from {address} ({reason:.200}); {licence}"
        f"run the command again, or download config.json, {source.tokenizer_file or 'tokenizer.json'}, *.safetensors "
        f"(and {INDEX}, if there) and put them in {source.directory}"
    )


def _check_arrived(unfinished: Path) -> None:
    """Compare every downloaded file with the hash that the hub gave for it; ValueError after removing one that differs.

    huggingface_hub checks lengths alone, and a proxy's web page has the length that its own header says. It notes the
    hub's ETag on the second line of a record beside the file: a sha256, or for small files git's sha1.
    """
    records = unfinished / ".cache" / "huggingface" / "download"
    for record in sorted(records.rglob("*.metadata")):
        file = unfinished / record.relative_to(records).with_suffix("")
        etag = record.read_text(encoding="utf-8").splitlines()[1]
        if not file.is_file() or not re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", etag):
            continue
        digest = hashlib.sha256() if len(etag) == 64 else hashlib.sha1(b"blob %d\0" % file.stat().st_size)
        with file.open("rb") as stream:
            while chunk := stream.read(2**20):
                digest.update(chunk)
        if digest.hexdigest() != etag:
            file.unlink()
            record.unlink()
            raise ValueError(f"{file.name} arrived altered, its hash is not {etag}")
