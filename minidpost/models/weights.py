"""Hugging Face directories in and out: config.json and safetensors, whole or in shards.

Every shape is checked, and tensors that are missing or not expected (hf_config.py has their names) are refused by name,
all before the first of them is read. Weights are read one tensor at a time straight into place, so a model is never
held twice. Pickles (*.bin) are not read: they can run code.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minidpost.errors import UserError
from minidpost.models.hf_config import Config, Model, config_json, mapping_for, read_config
from minidpost.models.t5 import T5Config
from minidpost.processes import rank, whole
from minidpost.storage import read_json, write_json
from minidpost.text.chat import CHAT_FILES, ChatTemplate, chat_format_of
from minidpost.text.templates import Template, Tokenizer, template_for
from minidpost.text.tokenizer import ADDED_TOKENS, FILE_NAMES, load_tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER_CONFIG = "adapter_config.json"  # peft's
RECORD = "minidpost.json"  # how the model of a directory writes: {"template": "chat"}
TOKENIZER_FILES = (*FILE_NAMES, *CHAT_FILES, ADDED_TOKENS, "generation_config.json", RECORD)
TEMPLATES = ("alpaca", "chat")  # of decoder-only models
READABLE_DTYPES = ("F32", "BF16", "F16")  # in the words of safetensors
SAFETENSORS_DTYPES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
TRAINING_STATE = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")  # the Trainer's other pickles
MAX_SHARD_BYTES = 5 * 10**9


def load_model(directory: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Model:
    """Read a Hugging Face directory into a model of ours, in eval mode.

    Tensors on disk may be fp32, bf16 or fp16 and are cast to `dtype`. UserError: a missing or broken file, a model
    type or setting we do not have, a tensor that is missing, unexpected, or of another shape. NaN or infinity among
    the weights is no error, but a warning that names the first such tensor.
    """
    # 1) All that can be wrong but the values: names, shapes and types, of which the headers of the files know.
    model, files = checked_files(Path(directory))

    # 2) One tensor at a time from the disk to its place: read, cast, set.
    not_finite = []
    for stored in stored_tensors(files):
        if not is_finite(stored.tensor):
            not_finite.append(f"{stored.path}: tensor {stored.theirs}")
        set_parameter(model, stored.ours, nn.Parameter(stored.tensor.to(device, dtype)))
    if not_finite:
        warnings.warn(f"{not_finite[0]} holds NaN or infinity ({len(not_finite)} such in all)", stacklevel=2)
    return model.eval()


def check_weights(directory: str | Path) -> None:
    """Refuse, before anything begins, a directory that `load_model` would refuse.

    UserError as `load_model`'s, for config.json, the index, the files' headers and lengths, and the names, shapes and
    types of the tensors. What is left to find when they are read is NaN, a warning, and a disk that fails.
    """
    checked_files(Path(directory))


def checked_files(directory: Path) -> tuple[Model, dict[Path, dict[str, str]]]:
    """A model without memory for a directory's weights, and for each file the tensors to read: their name, our name.

    Only config.json, the index and the headers of the files are read, and a second copy of the embedding where there is
    one. UserError where one of them is missing or broken, or where a tensor is missing, unexpected, or of another shape
    or type.
    """
    # 1) Which tensors lie in which file, and what the model looks like.
    names_of_file = tensor_files(directory)
    config = read_config(directory)
    has_head = any("lm_head.weight" in names for names in names_of_file.values())
    if isinstance(config, T5Config) and not config.scaled and has_head:
        config = replace(config, tied=False)  # transformers 5 writes "tied" for every T5; the head on disk is the truth

    # 2) A model with shapes but no memory, and what each tensor on disk is called here.
    mapping = mapping_for(config)
    model = empty_model(config)
    parameters = dict(model.named_parameters())
    missing = {theirs: ours for ours, theirs in mapping.names(config)}

    # 3) Each tensor must have a place, and fit there.
    files: dict[Path, dict[str, str]] = {}
    head_path = None  # where a tied model has an output matrix all the same
    for path, names in names_of_file.items():
        files[path] = {}
        with open_tensors(path) as tensors:
            for theirs in names:
                ours = missing.pop(theirs, None)
                if ours is not None:
                    check_tensor(tensors, path, theirs, parameters[ours].shape)
                    files[path][theirs] = ours
                elif not mapping.is_redundant(theirs, config):
                    raise UserError(f"{path}: unexpected tensor {theirs}")
                elif theirs == "lm_head.weight":
                    head_path = path

    # 4) And each place a tensor.
    if missing:
        raise UserError(f"{directory}: missing tensor {min(missing)} ({len(missing)} missing in all)")
    if head_path is not None:
        check_tied_head(head_path, files)
    return model, files


def check_tied_head(path: Path, files: dict[Path, dict[str, str]]) -> None:
    """UserError where a file has an output matrix that is not the embedding, though config.json says that it is."""
    theirs_at = {ours: (file, theirs) for file, names in files.items() for theirs, ours in names.items()}
    embedding_path, embedding_name = theirs_at["embedding.weight"]
    with open_tensors(path) as tensors, open_tensors(embedding_path) as others:
        head_VD = read_tensor(tensors, path, "lm_head.weight")
        embedding_VD = read_tensor(others, embedding_path, embedding_name)
    if not torch.equal(head_VD.to(embedding_VD.dtype), embedding_VD):
        raise UserError(
            f"{path}: lm_head.weight is not the embedding, though tie_word_embeddings in config.json says so; "
            "set it to false there"
        )


class StoredTensor(NamedTuple):
    """A tensor as it is stored: the file it is in, its name there, our name, its values."""

    path: Path
    theirs: str
    ours: str
    tensor: Tensor


def stored_tensors(files: dict[Path, dict[str, str]]) -> Iterator[StoredTensor]:
    """The tensors that `checked_files` found, one at a time; UserError where a file is not what it was then."""
    for path, our_names in files.items():
        with open_tensors(path) as tensors:
            for theirs, ours in our_names.items():
                yield StoredTensor(path, theirs, ours, read_tensor(tensors, path, theirs))


def empty_model(config: Config) -> Model:
    """A model that has shapes but no memory (on torch's meta device)."""
    with torch.device("meta"), WithoutInitialisation():
        model: Model = mapping_for(config).model(config)
    return model


class WithoutInitialisation(TorchFunctionMode):
    """Within it, modules are made without giving their weights any values.

    On the meta device those would be lost, and yet torch imports its compiler to fill them, which takes two seconds.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call torch's function, unless it initialises embeddings or linear layers, which do not use its result."""
        if func in (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_):
            return None
        return func(*args, **(kwargs or {}))


def load_template(directory: str | Path, template: str | None = None) -> Template:
    """The template of a directory's model.

    `template` is "alpaca" or "chat", the checkpoint's own chat format; None: what the directory records, else "alpaca".
    T5 has just one, so that only None will do. UserError: no tokenizer there, or one that does not fit the model; a
    template that there is not; a chat format that we do not know.
    """
    directory = Path(directory)
    config = read_config(directory)
    family = config.family
    if template is not None and (family == "t5" or template not in TEMPLATES):
        known = "a t5 has just one, none can be chosen" if family == "t5" else f"known are {' and '.join(TEMPLATES)}"
        raise UserError(f"{directory}: no template {template!r:.40}; {known}")
    tokenizer = load_tokenizer(directory)
    check_vocabulary(tokenizer, config.vocab_size, directory)
    if family != "t5" and (template or recorded_template(directory)) == "chat":
        chat = ChatTemplate(tokenizer, chat_format_of(directory, tokenizer))
        largest_id = max(*chat.prompt_ids(""), chat.eos_id)
        if largest_id >= config.vocab_size:
            raise UserError(
                f"{directory}: the chat format has a special token of id {largest_id:,}, the model "
                f"{config.vocab_size:,} embeddings; they do not belong together"
            )
        return chat
    return template_for(family, tokenizer)


def recorded_template(directory: str | Path) -> str:
    """The template that a directory's record names, "alpaca" where it has none; UserError where it is broken."""
    path = Path(directory) / RECORD
    if not path.is_file():
        return TEMPLATES[0]
    try:
        content: Any = read_json(path)
        template: str = content["template"]
        if template not in TEMPLATES:
            raise ValueError
    except (OSError, ValueError, LookupError, TypeError):
        names = " or ".join(f'"{name}"' for name in TEMPLATES)
        raise UserError(f'{path}: {{"template": {names}}} is expected') from None
    return template


def check_vocabulary(tokenizer: Tokenizer, n_embeddings: int, directory: Path) -> None:
    """UserError where a model lacks embeddings that its tokenizer needs, or the tokenizer an id that ends a text."""
    if tokenizer.n_embeddings_needed > n_embeddings:
        raise UserError(
            f"{directory}: the tokenizer has {tokenizer.vocab_size:,} pieces, the model {n_embeddings:,} embeddings; "
            "they do not belong together"
        )
    if tokenizer.eos_id is None:
        raise UserError(f"{directory}: the tokenizer has no end token, which the model is trained to stop with")


def tokenizer_files(directory: str | Path) -> list[Path]:
    """The tokenizer's files in a model directory, those that are there."""
    paths = [Path(directory) / name for name in TOKENIZER_FILES]
    return [path for path in paths if path.is_file()]


def save_model(
    model: Model,
    directory: str | Path,
    tokenizer_files: Sequence[Path],
    template: str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write config.json, safetensors (shards above 5 GB) and the tokenizer's files, as transformers reads them.

    `tokenizer_files` are those of the model this one was made from (see the function of that name); an empty sequence
    gives a directory without a tokenizer. `template`, "alpaca" or "chat", is recorded for `load_template`; with None a
    record among `tokenizer_files` stays. Weights are written in `dtype`, None: as they are. Of several processes that
    have slices of the model rank 0 writes; it never has more than one whole tensor. ValueError where the model has
    adapters, for which these files have no place: lora.save_merged writes such a one.
    """
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    their_names = dict(mapping_for(model.config).names(model.config))
    without_place = parameters.keys() - their_names.keys()
    if without_place:
        raise ValueError(f"{min(without_place)} has no name in a Hugging Face directory; are there adapters to merge?")
    if dtype is None:
        dtype = next(model.parameters()).dtype

    def to_write(ours: str, theirs: str) -> WritableTensor:
        weight = parameters[ours]
        return WritableTensor(theirs, tuple(weight.shape), dtype, lambda: whole(weight.to(dtype)))

    write_directory(
        Path(directory),
        model.config,
        [to_write(ours, theirs) for ours, theirs in their_names.items()],
        dtype=dtype,
        tokenizer_files=tokenizer_files,
        template=template,
    )


class WritableTensor(NamedTuple):
    """A tensor that is to be written: how it is called and what it looks like, and a function that gives its values.

    The function is called when it is the tensor's turn, on all ranks, as values may have to be gathered from them.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    values: Callable[[], Tensor]

    @property
    def n_bytes(self) -> int:
        """What it takes on the disk."""
        return prod(self.shape) * self.dtype.itemsize


def write_directory(
    directory: Path,
    config: Config,
    tensors: Sequence[WritableTensor],
    *,
    dtype: torch.dtype,
    tokenizer_files: Sequence[Path],
    template: str | None,
) -> None:
    """`save_model` of tensors with their names; `dtype` is what config.json says of them."""
    if rank() == 0:
        directory.mkdir(parents=True, exist_ok=True)
        write_json(directory / "config.json", config_json(config, dtype))
    write_tensors(tensors, directory, MAX_SHARD_BYTES)
    if rank() > 0:
        return
    # All go to the root, `original/tokenizer.model` too; of two files with one name the first is taken.
    copied: set[str] = set()
    for path in tokenizer_files:
        if path.name in copied:
            continue
        copied.add(path.name)
        target = directory / path.name
        if path.resolve() != target.resolve():
            shutil.copyfile(path, target)
    if template is not None:
        write_json(directory / RECORD, {"template": template})


def tensor_files(directory: Path) -> dict[Path, list[str]]:
    """The names of the tensors in each file, from the single file's header or from the index of the shards.

    UserError: no weights in the directory, weights as a pickle alone, a broken header or index.
    """
    single = directory / WEIGHTS
    index = directory / INDEX
    if single.is_file():
        with open_tensors(single) as tensors:
            return {single: list(tensors.keys())}
    if not index.is_file():
        raise UserError(_explain_no_weights(directory))
    return tensors_of_shards(index)


def tensors_of_shards(index: Path) -> dict[Path, list[str]]:
    """The names of the tensors in each shard, from an index; the shards themselves need not be there.

    UserError: a broken index, a shard that is no safetensors file of the same directory.
    """
    files: dict[Path, list[str]] = {}
    try:
        for name, shard in shards_of(index).items():
            if not is_plain_name(shard) or not shard.endswith(".safetensors"):
                raise UserError(f"{index}: shard {shard!r:.80} is no safetensors file of this directory")
            files.setdefault(index.with_name(shard), []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: not readable as an index of shards") from None
    return files


def _explain_no_weights(directory: Path) -> str:
    """Say what a directory has in place of the weights that are read."""
    if (directory / ADAPTER_CONFIG).is_file():
        return explain_adapter(os.fspath(directory), directory / ADAPTER_CONFIG)
    names = sorted(path.name for path in directory.glob("*") if path.is_file())
    others = [name for name in names if name.endswith(".safetensors")]
    if others:
        return (
            f"{directory}: neither {WEIGHTS} nor {INDEX} is here, but {others[0]} is; rename it to {WEIGHTS} if it "
            "holds the whole model"
        )
    pickles = pickled_weights(names)
    if pickles:
        return (
            f"{directory}: {pickles[0]} is a pickle, which can run code and is not read; convert it once where "
            "transformers is installed, with T5ForConditionalGeneration (or LlamaForCausalLM): "
            ".from_pretrained(DIR).save_pretrained(NEW_DIR)"
        )
    return f"{directory}: neither {WEIGHTS} nor {INDEX} is here"


def explain_adapter(where: str, file: Path) -> str:
    """Say that an adapter is no model, and which model it belongs to."""
    try:
        content: Any = read_json(file)
        base = f"{content['base_model_name_or_path']:.200}"
    except (OSError, ValueError, KeyError, TypeError):
        base = "a model that it does not name"
    return (
        f"{where}: a LoRA adapter of {base}, and adapters are not merged here; merge it where peft is installed "
        "(merge_and_unload, then save_pretrained) and give the new directory, or give the base model alone"
    )


def pickled_weights(names: Iterable[str]) -> list[str]:
    """Those files of a directory or a repository that hold weights as a pickle, sorted."""
    return sorted(
        name for name in names if name.endswith(PICKLES) and not name.rpartition("/")[2].startswith(TRAINING_STATE)
    )


def shards_of(index: Path) -> dict[str, str]:
    """The shard of each tensor, by name, from an index of shards as it stands there: nothing in it is checked.

    Any of OSError, ValueError, KeyError, TypeError, AttributeError (here or where it is used) says that it is broken.
    """
    content: Any = read_json(index)
    shards: dict[str, str] = content["weight_map"]
    return shards


def is_plain_name(name: str) -> bool:
    """Whether a name is that of a file in the same directory, on every system: no path, no drive, nothing invisible."""
    return name not in ("", ".", "..") and name.isprintable() and not set(name) & {"/", "\\", ":"}


def check_tensor(tensors: safe_open, path: Path, name: str, shape: torch.Size) -> None:
    """UserError where a tensor of an open file has another shape, or a type that is not read; it is not read here."""
    try:
        entry = tensors.get_slice(name)
        stored = tuple(entry.get_shape())
        if stored != tuple(shape):
            raise UserError(f"{path}: tensor {name} has shape {stored}, {tuple(shape)} is expected")
        if entry.get_dtype() not in READABLE_DTYPES:
            dtype = entry[:0].dtype  # in torch's words
            raise UserError(f"{path}: tensor {name} is {dtype}, fp32, bf16 or fp16 is expected")
    except SafetensorError as error:
        raise UserError(f"{path}: tensor {name} cannot be read ({error})") from None


def read_tensor(tensors: safe_open, path: Path, name: str) -> Tensor:
    """One tensor of an open file, as it is stored; UserError where the file is not what it was when it was checked."""
    try:
        tensor: Tensor = tensors.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path}: tensor {name} cannot be read ({error})") from None
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite: either would show in the smallest or the largest value."""
    return all(bound.isfinite().item() for bound in tensor.aminmax())


def open_tensors(path: Path) -> safe_open:
    """A safetensors file, opened: mapped into memory, nothing read yet; UserError where it is broken."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter in the place of the one that has this dotted name."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, parameter)


def in_memory(tensors: Mapping[str, Tensor]) -> list[WritableTensor]:
    """Tensors that are there, by name, as they are to be written."""

    def to_write(name: str, tensor: Tensor) -> WritableTensor:
        return WritableTensor(name, tuple(tensor.shape), tensor.dtype, lambda: tensor)

    return [to_write(name, tensor) for name, tensor in tensors.items()]


def write_tensors(tensors: Sequence[WritableTensor], directory: Path, max_shard_bytes: int) -> None:
    """Write model.safetensors, or numbered shards and their index where one file would exceed `max_shard_bytes`."""
    # 1) One file needs no index; several are named model-00001-of-00003.safetensors and so on.
    shards = in_shards(tensors, max_shard_bytes)
    names = [WEIGHTS]
    if len(shards) > 1:
        names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    # 2) The files. An older one of a name stays whole until the new one is: the model may be reading it.
    for shard, name in zip(shards, names, strict=True):
        unfinished = directory / f"{name}.unfinished"
        write_safetensors(shard, unfinished)
        if rank() == 0:
            os.replace(unfinished, directory / name)
    # 3) The index says where each tensor lies.
    if len(shards) > 1 and rank() == 0:
        weight_map = {tensor.name: name for shard, name in zip(shards, names, strict=True) for tensor in shard}
        n_bytes = sum(tensor.n_bytes for tensor in tensors)
        write_json(directory / INDEX, {"metadata": {"total_size": n_bytes}, "weight_map": weight_map})
        (directory / WEIGHTS).unlink(missing_ok=True)  # an older one would be read before the shards


def in_shards(tensors: Sequence[WritableTensor], max_shard_bytes: int) -> list[list[WritableTensor]]:
    """Tensors in their order, as many together as `max_shard_bytes` allow; a larger one has a shard of its own."""
    shards: list[list[WritableTensor]] = [[]]
    room = max_shard_bytes
    for tensor in tensors:
        if tensor.n_bytes > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= tensor.n_bytes
    return shards


def write_safetensors(tensors: Sequence[WritableTensor], path: Path) -> None:
    """Write one safetensors file; of several processes rank 0 does.

    The others help to gather what each has a slice of.
    """
    if rank() > 0:
        for tensor in in_file_order(tensors):
            tensor.values()
        return
    write_own_safetensors(tensors, path, {})


def write_own_safetensors(tensors: Sequence[WritableTensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, whichever process this is, tensor by tensor: no more than one is held.

    (The library takes all at once, makes a copy of them, and lets no other thread run meanwhile.) The format: eight
    bytes that say how long the header is, the header, which is JSON, then the values.
    """
    ordered = in_file_order(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    begin = 0
    for tensor in ordered:
        end = begin + tensor.n_bytes
        header[tensor.name] = {
            "dtype": SAFETENSORS_DTYPES[tensor.dtype],
            "shape": tensor.shape,
            "data_offsets": (begin, end),
        }
        begin = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little"))
        stream.write(text)
        for tensor in ordered:
            values = tensor.values().detach().to("cpu", tensor.dtype).contiguous()
            stream.write(values.flatten().view(torch.uint8).numpy().data)
            del values  # before the next one is made


def in_file_order(tensors: Sequence[WritableTensor]) -> list[WritableTensor]:
    """The wider types first, so that every value lies at a multiple of its size; as the library does it."""
    return sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))
