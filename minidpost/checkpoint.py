"""Hugging Face directories in and out: config.json and safetensors, whole or in shards.

One explicit table of names joins our parameters to theirs; every shape is checked, and tensors that are missing or not
expected are refused by name. Weights are read one tensor at a time straight into place, so a model is never held twice.
Pickles (*.bin) are not read: they can run code.
"""

import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from minidpost.files import UserError, read_json, write_json
from minidpost.t5 import T5, T5Config

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = ("spiece.model", "tokenizer.model", "tokenizer.json", "tokenizer_config.json")
READABLE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SHARD_BYTES = 5 * 10**9


def load_model(directory: str | Path, dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    """Read a Hugging Face directory into a model of ours, in eval mode.

    Tensors on disk may be fp32, bf16 or fp16 and are cast to `dtype`. UserError: a missing or broken file, a model
    type or setting we do not have, a tensor that is missing, unexpected, or of another shape. NaN or infinity among
    the weights is no error, but a warning that names the first such tensor.
    """
    directory = Path(directory)
    files = tensor_files(directory)
    config = read_config(directory)
    if not config.scaled and any("lm_head.weight" in names for names in files.values()):
        config = replace(config, tied=False)  # transformers 5 writes "tied" above a head that is not
    with torch.device("meta"):
        model = T5(config)
    parameters = dict(model.named_parameters())
    missing = {theirs: ours for ours, theirs in t5_names(model.config)}
    not_finite = []
    for path, names in files.items():
        with open_tensors(path) as tensors:
            for theirs in names:
                ours = missing.pop(theirs, None)
                if ours is None and not redundant(theirs, model.config):
                    raise UserError(f"{path}: unexpected tensor {theirs}")
                if ours is not None:
                    tensor = read_tensor(tensors, path, theirs, parameters[ours].shape)
                    if not is_finite(tensor):
                        not_finite.append(f"{path}: tensor {theirs}")
                    set_parameter(model, ours, nn.Parameter(tensor.to(device, dtype)))
    if missing:
        raise UserError(f"{directory}: missing tensor {min(missing)} ({len(missing)} missing in all)")
    if not_finite:
        warnings.warn(f"{not_finite[0]} holds NaN or infinity ({len(not_finite)} such in all)", stacklevel=2)
    model.tokenizer_files = [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]
    return model.eval()


def save_model(model: nn.Module, directory: str | Path) -> None:
    """Write config.json, safetensors (shards above 5 GB) and the tokenizer's files, as transformers reads them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    write_json(directory / "config.json", t5_config_to_hf(model.config, next(model.parameters()).dtype))
    parameters = dict(model.named_parameters())
    tensors = {theirs: parameters[ours].detach() for ours, theirs in t5_names(model.config)}
    write_tensors(tensors, directory, MAX_SHARD_BYTES)
    for path in getattr(model, "tokenizer_files", []):
        if path.parent.resolve() != directory.resolve():
            shutil.copyfile(path, directory / path.name)


def t5_names(config: T5Config) -> Iterator[tuple[str, str]]:
    """Every parameter of a T5 as (our name, Hugging Face's name)."""
    yield "embedding.weight", "shared.weight"
    for stack, n_layers in (("encoder", config.n_encoder_layers), ("decoder", config.n_decoder_layers)):
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield f"{stack}.relative_bias.weight", bias
        yield f"{stack}.norm.weight", f"{stack}.final_layer_norm.weight"
        attentions = {"encoder": ["attention"], "decoder": ["self_attention", "cross_attention"]}[stack]
        for i in range(n_layers):
            for j, attention in enumerate(attentions):
                theirs = f"{stack}.block.{i}.layer.{j}.{('SelfAttention', 'EncDecAttention')[j]}"
                for our, their in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
                    yield f"{stack}.layers.{i}.{attention}.{our}.weight", f"{theirs}.{their}.weight"
                norm = f"{stack}.block.{i}.layer.{j}.layer_norm.weight"
                yield f"{stack}.layers.{i}.{attention}_norm.weight", norm
            ours, theirs = f"{stack}.layers.{i}.feed_forward", f"{stack}.block.{i}.layer.{len(attentions)}"
            if config.gated:
                yield f"{ours}.gate.weight", f"{theirs}.DenseReluDense.wi_0.weight"
            yield f"{ours}.up.weight", f"{theirs}.DenseReluDense.{'wi_1' if config.gated else 'wi'}.weight"
            yield f"{ours}.down.weight", f"{theirs}.DenseReluDense.wo.weight"
            yield f"{ours}_norm.weight", f"{theirs}.layer_norm.weight"
    if not config.tied:
        yield "head.weight", "lm_head.weight"


def redundant(name: str, config: T5Config) -> bool:
    """Whether published T5 files carry this tensor beside the weights: a copy of the embedding, or an unused table."""
    return (
        name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
        or name == "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        or (name == "lm_head.weight" and config.tied)
    )


def read_config(directory: Path) -> T5Config:
    """The config.json of a directory (or that file itself) as our own settings; UserError names what is wrong in it."""
    path = directory if directory.is_file() else directory / "config.json"
    try:
        hf = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{directory}: no config.json here; a Hugging Face model directory is expected") from None
    except (OSError, ValueError):
        raise UserError(f"{path}: not readable as JSON") from None
    if not isinstance(hf, dict) or hf.get("model_type") != "t5":
        found = hf.get("model_type") if isinstance(hf, dict) else None
        raise UserError(f"{path}: model_type {found!r} is not known; known: 't5'")
    feed_forward = hf.get("feed_forward_proj", "relu")
    if feed_forward not in ("relu", "gated-gelu"):
        raise UserError(f"{path}: feed_forward_proj {feed_forward!r} is not known; known: relu, gated-gelu")
    hf = {key: value for key, value in hf.items() if value is not None}  # null stands for the default
    try:
        sizes = {our: number(hf, *theirs_low_high) for our, theirs_low_high in T5_SIZES.items()}
        tied, last_id = flag(hf, "tie_word_embeddings", True), sizes["vocab_size"] - 1
        return T5Config(
            gated=feed_forward == "gated-gelu",
            tied=tied,
            scaled=flag(hf, "scale_decoder_outputs", tied),
            norm_eps=number(hf, "layer_norm_epsilon", 0, 1, 1e-6),
            dropout=number(hf, "dropout_rate", 0, 1, 0.1),
            max_distance=number(hf, "relative_attention_max_distance", sizes["n_buckets"], 2**20, 128),
            n_decoder_layers=number(hf, "num_decoder_layers", 1, 2**10, sizes["n_encoder_layers"]),
            pad_id=number(hf, "pad_token_id", 0, last_id, 0),
            eos_id=number(hf, "eos_token_id", 0, last_id, 1),
            start_id=number(hf, "decoder_start_token_id", 0, last_id, 0),
            **sizes,
        )
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


T5_SIZES = {  # ours: theirs, and bounds that keep every product of sizes below 2**63
    "vocab_size": ("vocab_size", 2, 2**20),
    "d_model": ("d_model", 1, 2**20),
    "d_kv": ("d_kv", 1, 2**20),
    "d_ff": ("d_ff", 1, 2**20),
    "n_heads": ("num_heads", 1, 2**20),
    "n_encoder_layers": ("num_layers", 1, 2**10),
    "n_buckets": ("relative_attention_num_buckets", 4, 2**20),
}


def number(hf: dict, key: str, low: int, high: int, default: float | None = None) -> float:
    """A setting within its bounds (ends included), whole unless its default is not; ValueError names it."""
    value = hf[key] if default is None else hf.get(key, default)
    kinds = (int, float) if isinstance(default, float) else int
    if isinstance(value, bool) or not isinstance(value, kinds) or not low <= value <= high:
        raise ValueError(f"{key} is {value!r}, a number from {low} to {high} is expected")
    return value


def flag(hf: dict, key: str, default: bool) -> bool:
    """A setting that is true or false; ValueError names it."""
    value = hf.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}, true or false is expected")
    return value


def t5_config_to_hf(config: T5Config, dtype: torch.dtype) -> dict:
    """Our settings as transformers writes them."""
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        **{theirs: getattr(config, ours) for ours, (theirs, _, _) in T5_SIZES.items()},
        "num_decoder_layers": config.n_decoder_layers,
        "feed_forward_proj": "gated-gelu" if config.gated else "relu",
        "tie_word_embeddings": config.tied,
        "scale_decoder_outputs": config.scaled,
        "relative_attention_max_distance": config.max_distance,
        "layer_norm_epsilon": config.norm_eps,
        "dropout_rate": config.dropout,
        "pad_token_id": config.pad_id,
        "eos_token_id": config.eos_id,
        "decoder_start_token_id": config.start_id,
        "is_encoder_decoder": True,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }


def tensor_files(directory: Path) -> dict[Path, list[str]]:
    """The names of the tensors in each file, from the single file's header or the shards' index."""
    whole, index = directory / WEIGHTS, directory / INDEX
    if whole.is_file():
        with open_tensors(whole) as tensors:
            return {whole: list(tensors.keys())}
    if not index.is_file():
        pickles = sorted(path.name for path in directory.glob("*.bin"))
        if pickles:
            raise UserError(
                f"{directory}: {pickles[0]} is a pickle, which can run code and is not read; convert it once where "
                "transformers is installed: T5ForConditionalGeneration.from_pretrained(DIR).save_pretrained(NEW_DIR)"
            )
        raise UserError(f"{directory}: neither {WEIGHTS} nor {INDEX} is here")
    files: dict[Path, list[str]] = {}
    try:
        for name, shard in read_json(index)["weight_map"].items():
            if not is_plain_name(shard) or not shard.endswith(".safetensors"):
                raise UserError(f"{index}: shard {shard!r:.80} is no safetensors file of this directory")
            files.setdefault(directory / shard, []).append(name)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{index}: not readable as an index of shards") from None
    return files


def is_plain_name(name: str) -> bool:
    """Whether a name that a file gives is that of another file in its directory, on every system."""
    return name not in ("", ".", "..") and name.isprintable() and not set(name) & {"/", "\\", ":"}


def read_tensor(tensors: safe_open, path: Path, name: str, shape: torch.Size) -> Tensor:
    """One tensor of an open file, its shape checked before it is read."""
    try:
        stored = tuple(tensors.get_slice(name).get_shape())
        if stored != tuple(shape):
            raise UserError(f"{path}: tensor {name} has shape {stored}, {tuple(shape)} is expected")
        tensor = tensors.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{path}: tensor {name} cannot be read ({error})") from None
    if tensor.dtype not in READABLE_DTYPES:
        raise UserError(f"{path}: tensor {name} is {tensor.dtype}, fp32, bf16 or fp16 is expected")
    return tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite; both show in the least and the greatest value."""
    return all(bound.isfinite().item() for bound in tensor.aminmax())


def open_tensors(path: Path) -> safe_open:
    """A safetensors file, opened (mapped, nothing read yet)."""
    try:
        return safe_open(path, framework="pt")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from None


def set_parameter(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Put a parameter in the place of the one that has this dotted name."""
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, parameter)


def write_tensors(tensors: dict[str, Tensor], directory: Path, max_shard_bytes: int) -> None:
    """Write model.safetensors, or numbered shards and their index where one file would exceed `max_shard_bytes`."""
    shards, room = [{}], max_shard_bytes
    for name, tensor in tensors.items():
        if tensor.nbytes > room and shards[-1]:
            shards.append({})
            room = max_shard_bytes
        shards[-1][name] = tensor.contiguous()
        room -= tensor.nbytes
    if len(shards) == 1:
        save_file(shards[0], directory / WEIGHTS, metadata={"format": "pt"})
        return
    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file_name, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file_name))
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    (directory / WEIGHTS).unlink(missing_ok=True)  # an older one would be read before the shards
