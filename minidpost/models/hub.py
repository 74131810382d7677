"""From a model's name to its directory: our own weights lie in the repository, published ones are fetched on demand.

A fetched model has the files that weights.py and tokenizer.py read (config.json, safetensors, the vocabulary), never
a pickle. It lies under `NAME.unfinished` until it is complete; a fetch that was broken off goes on with the files that
had arrived whole.
"""

import difflib
import hashlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

from minidpost.errors import UserError
from minidpost.storage import read_json
from minidpost.text.tokenizer import FILE_NAMES

WEIGHTS_DIR = Path(__file__).resolve().parents[2] / "weights"
BUNDLED = ("tiny-t5", "tiny-t5-dpo-st", "tiny-llama")  # base models, and what the method makes of one
PUBLISHED: dict[str, tuple[str, str]] = {  # name: repository, and its tokenizer file of those we read
    "flan-t5-small": ("google/flan-t5-small", "spiece.model"),
    "flan-t5-base": ("google/flan-t5-base", "spiece.model"),
    "flan-t5-large": ("google/flan-t5-large", "spiece.model"),
    "flan-t5-xl": ("google/flan-t5-xl", "spiece.model"),
    "t5-large": ("google-t5/t5-large", "spiece.model"),
    "llama-7b": ("huggyllama/llama-7b", "tokenizer.model"),
    "llama-2-7b": ("meta-llama/Llama-2-7b-hf", "tokenizer.model"),
    "llama-3-8b": ("meta-llama/Meta-Llama-3-8B", "original/tokenizer.model"),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B", "original/tokenizer.model"),
}
SHARDS = "model.safetensors.index.json"


def find_model(name_or_directory: str, weights_dir: Path = WEIGHTS_DIR) -> Path:
    """Return the directory of a model given by directory or by name, after fetching it if it is a published one.

    UserError: a directory without config.json, an unknown name, an incomplete model, a fetch that fails.
    """
    directory = Path(name_or_directory)
    if (directory / "config.json").is_file():
        return directory
    name = name_or_directory
    if name not in (*BUNDLED, *PUBLISHED):
        raise UserError(_explain_unknown(name))
    found = Path(weights_dir) / name
    if not found.exists():
        if name in BUNDLED:
            raise UserError(f"{found} is missing, though it is part of the repository; restore it with git checkout")
        repository, tokenizer_file = PUBLISHED[name]
        _fetch(repository, tokenizer_file, found)
    tokenizer_file = PUBLISHED[name][1] if name in PUBLISHED else FILE_NAMES[0]
    missing = _missing_files(found, tokenizer_file)
    if missing:
        raise UserError(f"{found}: lacks {', '.join(missing)}; put it there, or remove the directory and start again")
    return found


def _explain_unknown(name: str) -> str:
    """Say what is wrong with a name that is no model's, nor a directory with one."""
    if Path(name).is_dir():
        return f"{name}: this directory holds no config.json, so it is no model in Hugging Face's format"
    known = (*BUNDLED, *PUBLISHED)
    closest = difflib.get_close_matches(name.rpartition("/")[2].lower(), known, n=1)
    hint = f" (did you mean {closest[0]}?)" if closest else ""
    return f"no model and no directory is called {name!r}{hint}; known models: {', '.join(known)}"


def _missing_files(directory: Path, tokenizer_file: str) -> list[str]:
    """Name the files that a model still lacks; shards are those that its index names, any tokenizer file will do."""
    weights = ["model.safetensors"]
    index = directory / SHARDS
    if index.is_file():
        try:
            content: Any = read_json(index)
            weights = sorted(map(os.fspath, set(content["weight_map"].values())))
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            weights = [f"a readable {SHARDS}"]
    has_tokenizer = any((directory / name).is_file() for name in FILE_NAMES)
    tokenizer = [] if has_tokenizer else [tokenizer_file]
    return [file for file in ("config.json", *tokenizer, *weights) if not (directory / file).is_file()]


def _fetch(repository: str, tokenizer_file: str, directory: Path) -> None:
    """Download the files of a repository that are read; `directory` appears only when nothing is missing."""
    from huggingface_hub import constants, snapshot_download  # here: reads HF_ENDPOINT now, and is slow to import

    unfinished = directory.with_name(f"{directory.name}.unfinished")
    files = ("config.json", tokenizer_file)
    try:
        snapshot_download(repository, local_dir=unfinished, allow_patterns=[*files, "*.safetensors", SHARDS])
        # Offline, snapshot_download is content with whatever an earlier call left here.
        missing = _missing_files(unfinished, tokenizer_file)
        if missing:
            raise FileNotFoundError(f"{', '.join(missing)} did not arrive")
        _check_arrived(unfinished)
        shutil.rmtree(unfinished / ".cache", ignore_errors=True)  # its records of the download
        os.replace(unfinished, directory)
    except Exception as error:  # huggingface_hub's errors, its HTTP client's and its Rust part's share no other base
        reason = str(error).partition("\n")[0] or type(error).__name__
        licence = "accept its licence there and set HF_TOKEN, then " if repository.startswith("meta-llama/") else ""
        raise UserError(
            f"{directory.name} could not be fetched from {constants.ENDPOINT}/{repository} ({reason:.200}); {licence}"
            f"run the command again, or download {', '.join(files)}, *.safetensors (and {SHARDS}, if there) and put "
            f"them in {directory}"
        ) from None


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
