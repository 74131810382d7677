"""GGUF files, which llama.cpp runs, as Hugging Face directories: config.json, model.safetensors, tokenizer.json.

A GGUF file has everything: a header of metadata and of a description of each tensor, then the tensors, most of them
quantised in blocks of 32 or 256 values. The format and its names are those of ggml's docs/gguf.md. The header is read
here, every count checked against the file's length before anything is made of it; the blocks are turned into numbers by
the `gguf` package of llama.cpp's authors, an optional requirement.

Departures from the files that llama.cpp reads: architectures llama (which Mistral's files say, too), qwen2 and qwen3
only; of byte-level BPE vocabularies, those whose split into words is known here; no files in parts, no mixtures of
experts, no adapters.

Weights are written in fp32 unless asked otherwise. A block's values are an fp16 scale times a small integer, often plus
an fp16 minimum, and every reader computes them in fp32: a directory in fp32 has exactly these, so that logits can be
compared with other readers'; bf16, with its 8 bits, would quantise a second time. For 135 million parameters fp32 takes
270 MB more.
"""

import json
import math
import mmap
import re
import shutil
import struct
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from minidpost.errors import UserError
from minidpost.models.gguf_tokenizer import read_vocabulary, tokenizer_from
from minidpost.models.hf_config import (
    LLAMA_FAMILIES,
    llama_names,
    read_bool,
    read_float,
    read_int,
    read_llama,
    read_text,
)
from minidpost.models.llama import RopeScaling, scaled_frequencies
from minidpost.models.weights import empty_model
from minidpost.progress import Progress
from minidpost.storage import read_json, staged_directory, write_json

Bytes = npt.NDArray[np.uint8]
RowIndices = npt.NDArray[np.int64]
Values = npt.NDArray[np.float32]

RECORD = "gguf.json"  # in a converted directory: of which file it was made

# -- the header --------------------------------------------------------------------------------------------------------

MAGIC = b"GGUF"
VERSIONS = (2, 3)  # the first had counts of 32 bits
NUMBER_FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
UINT32, FLOAT32, STRING, ARRAY, UINT64 = 4, 6, 8, 9, 10
MAX_HEADER_BYTES = 2**26  # the longest we know, of a vocabulary of 150,000 with its merges, has ten million
MAX_ITEMS = 2**22  # in an array of metadata
MAX_ENTRIES = 2**16  # of metadata, and tensors
MAX_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a GGUF file: its shape (rows first, as torch has it), ggml's number of its kind, where it lies."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int  # bytes from the beginning of the file
    bytes_per_row: int  # of a vector: per value

    @property
    def n_bytes(self) -> int:
        """The length of what is stored."""
        return self.shape[0] * self.bytes_per_row


class HeaderReader:
    """Reads numbers, strings and arrays one after the other; ValueError where the file ends, or is longer than sane."""

    def __init__(self, content: mmap.mmap):
        """Begin at the first byte of a file that is mapped into memory."""
        self.content = content
        self.position = 0

    def take(self, n_bytes: int) -> bytes:
        """The next bytes."""
        end = self.position + n_bytes
        if end > len(self.content):
            raise ValueError(f"ends within its header, at {len(self.content):,} bytes; it was cut off, or is broken")
        if end > MAX_HEADER_BYTES:
            raise ValueError(f"its header is longer than {MAX_HEADER_BYTES:,} bytes; it is broken")
        taken = self.content[self.position : end]
        self.position = end
        return taken

    def numbers(self, kind: int, count: int) -> list[Any]:
        """The next `count` numbers of one of the kinds in NUMBER_FORMATS."""
        layout = f"<{count}{NUMBER_FORMATS[kind]}"
        return list(struct.unpack(layout, self.take(struct.calcsize(layout))))

    def integer(self, kind: int) -> int:
        """The next number, a whole one."""
        number: int = self.numbers(kind, 1)[0]
        return number

    def text(self) -> str:
        """The next string."""
        try:
            return self.take(self.integer(UINT64)).decode("utf-8")
        except UnicodeDecodeError:
            raise ValueError("a string in its header is not UTF-8; it is broken") from None

    def value(self, kind: int) -> Any:
        """The next value of any kind: a number, true or false, a string, or a list of one kind of these."""
        if kind == STRING:
            return self.text()
        if kind == FLOAT32:
            # The shortest decimal that is this number: 1e-05, not 9.999999747378752e-06.
            return float(str(np.float32(self.numbers(kind, 1)[0])))
        if kind in NUMBER_FORMATS:
            return self.numbers(kind, 1)[0]
        if kind != ARRAY:
            raise ValueError(f"its header has a value of unknown kind {kind}; it is broken")
        item_kind = self.integer(UINT32)
        count = self.integer(UINT64)
        if count > MAX_ITEMS:
            raise ValueError(f"its header has an array of {count:,} items, more than {MAX_ITEMS:,}; it is broken")
        if item_kind == STRING:
            return [self.text() for _ in range(count)]
        if item_kind not in NUMBER_FORMATS:
            raise ValueError(f"its header has an array of unknown kind {item_kind}; it is broken")
        return self.numbers(item_kind, count)


def read_header(path: Path) -> tuple[dict[str, Any], dict[str, StoredTensor]]:
    """The metadata and the tensors of a GGUF file, both by name; nothing of the tensors themselves is read.

    UserError: the gguf package is missing. ValueError: no GGUF file, one that is cut off or broken, another version.
    """
    library = gguf_package()
    with path.open("rb") as stream:
        if stream.read(len(MAGIC)) != MAGIC:  # an empty file, too, which could not be mapped
            raise ValueError("not a GGUF file (it does not begin with GGUF)")
        with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
            reader = HeaderReader(content)
            reader.take(len(MAGIC))
            version = reader.integer(UINT32)
            if version not in VERSIONS:
                is_swapped = int.from_bytes(version.to_bytes(4, "big"), "little") in VERSIONS
                found = "big-endian" if is_swapped else f"of version {version}"
                raise ValueError(f"a GGUF file that is {found}; little-endian ones of versions 2 and 3 are read")
            n_tensors, n_entries = reader.numbers(UINT64, 2)
            if max(n_tensors, n_entries) > MAX_ENTRIES:
                raise ValueError(f"claims to hold {n_tensors:,} tensors and {n_entries:,} metadata; it is broken")

            metadata: dict[str, Any] = {}
            for _ in range(n_entries):
                key = reader.text()
                if key in metadata:
                    raise ValueError(f"has metadata {key} twice; it is broken")
                metadata[key] = reader.value(reader.integer(UINT32))

            # Where a tensor begins is known only behind the last description.
            described = [_read_description(reader) for _ in range(n_tensors)]
            alignment = read_int(metadata, "general.alignment", 1, 2**20, DEFAULT_ALIGNMENT)
            data_start = math.ceil(reader.position / alignment) * alignment
            tensors: dict[str, StoredTensor] = {}
            for name, shape, kind, offset in described:
                if name in tensors:
                    raise ValueError(f"has tensor {name} twice; it is broken")
                bytes_per_row = _bytes_per_row(library, name, shape, kind)
                tensors[name] = StoredTensor(name, shape, kind, data_start + offset, bytes_per_row)
                end = tensors[name].offset + tensors[name].n_bytes
                if end > len(content):
                    raise ValueError(
                        f"tensor {name} should end at {end:,} bytes, the file has {len(content):,}; it was cut off"
                    )
    return metadata, tensors


def _read_description(reader: HeaderReader) -> tuple[str, tuple[int, ...], int, int]:
    """One tensor's name, shape (rows first), kind, and its offset from where the tensors begin."""
    name = reader.text()
    n_dimensions = reader.integer(UINT32)
    if not 1 <= n_dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"tensor {name:.80} has {n_dimensions:,} dimensions; it is broken")
    columns_first = reader.numbers(UINT64, n_dimensions)
    kind = reader.integer(UINT32)
    offset = reader.integer(UINT64)
    return name, tuple(reversed(columns_first)), kind, offset


def _bytes_per_row(library: Any, name: str, shape: tuple[int, ...], kind: int) -> int:
    """The bytes that a row takes, of a vector each value; ValueError for a kind or a shape that cannot be read."""
    try:
        known_kind = library.GGMLQuantizationType(kind)
    except ValueError:
        raise ValueError(f"tensor {name:.80} is of kind {kind}, unknown to the installed gguf package") from None
    values_per_block, bytes_per_block = library.GGML_QUANT_SIZES[known_kind]
    try:
        library.dequantize(np.zeros((1, bytes_per_block), np.uint8), known_kind)
    except NotImplementedError:
        raise ValueError(f"tensor {name:.80} is {known_kind.name}, which the gguf package cannot dequantise") from None
    width = math.prod(shape[1:])
    if width % values_per_block:
        raise ValueError(
            f"tensor {name:.80} has shape {shape}; rows of {known_kind.name} are multiples of {values_per_block} values"
        )
    n_bytes: int = width // values_per_block * bytes_per_block
    return n_bytes


def gguf_package() -> Any:
    """The optional package that knows the kinds of blocks; UserError where it is not installed."""
    try:
        import gguf  # here: optional, and only needed where a GGUF file is read
    except ImportError:
        raise UserError("reading GGUF files needs the gguf package: pip install gguf") from None
    return gguf


# -- config.json -------------------------------------------------------------------------------------------------------

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # of Llama's families, those of which we know GGUF files
MAX_SIZE = 2**20  # as hf_config.py has it
MAX_LAYERS = 2**10
UNKNOWN_SETTINGS = (  # of other architectures, with which a model of these three would compute something else
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "embedding_scale",
    "residual_scale",
    "logit_scale",
    "final_logit_softcapping",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
)


def config_from(metadata: dict[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The content of config.json, from the metadata and the names of the tensors.

    KeyError: metadata that is missing. ValueError: a value that is out of bounds, or a model that we do not have.
    """
    # 1) What would be another kind of model, and where nothing further down would notice.
    n_parts = read_int(metadata, "split.count", 0, 2**16, 1)
    if n_parts > 1:  # said first, as only the first part has any other metadata
        raise ValueError(
            f"one of {n_parts} parts; join them with llama.cpp's llama-gguf-split --merge "
            f"NAME-00001-of-{n_parts:05d}.gguf NAME.gguf"
        )
    architecture = read_text(metadata, "general.architecture")
    if architecture not in ARCHITECTURES:
        raise ValueError(f"architecture {architecture!r:.80} is not known; known: {', '.join(ARCHITECTURES)}")
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise ValueError(f"general.type is {kind!r:.80}, a model is expected (adapters are not merged here)")
    prefix = f"{architecture}."
    values = {key: _of_all_layers(key, value) for key, value in metadata.items() if key.startswith(prefix)}
    for key in UNKNOWN_SETTINGS:
        if prefix + key in values:
            raise ValueError(f"metadata {prefix}{key} is not known here; the model would compute something else")
    if not read_bool(values, f"{prefix}attention.causal", True):
        raise ValueError(f"{prefix}attention.causal is false; only causal attention is known")
    if read_int(values, f"{prefix}expert_count", 0, MAX_SIZE, 0):
        raise ValueError("a mixture of experts; only dense models are known")

    # 2) The sizes of a layer.
    d_model = read_int(values, f"{prefix}embedding_length", 1, MAX_SIZE)
    n_heads = read_int(values, f"{prefix}attention.head_count", 1, MAX_SIZE)
    n_kv_heads = read_int(values, f"{prefix}attention.head_count_kv", 1, n_heads, n_heads)
    if n_heads % n_kv_heads:
        raise ValueError(f"{prefix}attention.head_count {n_heads} is no multiple of head_count_kv {n_kv_heads}")
    d_head = read_int(values, f"{prefix}attention.key_length", 1, MAX_SIZE, max(1, d_model // n_heads))
    if d_head % 2:
        raise ValueError(f"a head has {d_head} dimensions; rotary positions need pairs")
    for key in ("attention.value_length", "rope.dimension_count"):
        if read_int(values, prefix + key, 1, MAX_SIZE, d_head) != d_head:
            raise ValueError(f"{prefix}{key} is {values[prefix + key]}; other than a head's {d_head} is not known")

    # 3) Positions.
    context_length = read_int(values, f"{prefix}context_length", 1, 2**30)
    window = read_int(values, f"{prefix}attention.sliding_window", 0, 2**30, 0)
    names = set(names)
    has_biases = "blk.0.attn_q.bias" in names or "blk.0.ffn_gate.bias" in names
    family = architecture
    if 0 < window < context_length:
        # Mistral, for which GGUF has no name of its own: sequences must fit in the window, as check_length says.
        if architecture != "llama" or has_biases:
            raise ValueError(
                f"{prefix}attention.sliding_window is {window}; a window is known of Mistral alone, which is of "
                "architecture llama and has no biases"
            )
        family = "mistral"

    # 4) The rest, under Hugging Face's names.
    vocabulary = read_vocabulary(metadata)
    eos_ids = vocabulary.eos_ids
    epsilon = f"{prefix}attention.layer_norm_rms_epsilon"
    config = {
        "architectures": [LLAMA_FAMILIES[family].architecture],
        "model_type": family,
        "vocab_size": len(vocabulary.tokens),
        "hidden_size": d_model,
        "intermediate_size": read_int(values, f"{prefix}feed_forward_length", 1, MAX_SIZE),
        "num_hidden_layers": read_int(values, f"{prefix}block_count", 1, MAX_LAYERS),
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "head_dim": d_head,
        "hidden_act": "silu",
        "rms_norm_eps": read_float({epsilon: values[epsilon]}, epsilon, 0, 1, 0.0),
        "rope_theta": float(read_float(values, f"{prefix}rope.freq_base", 1, 2**60, 10000.0)),
        "rope_scaling": _linear_scaling(values, prefix),
        "max_position_embeddings": context_length,
        "tie_word_embeddings": "output.weight" not in names,
        "eos_token_id": eos_ids if len(eos_ids) > 1 else eos_ids[0],
    }
    for role in ("bos", "pad"):
        if role in vocabulary.named_ids:
            config[f"{role}_token_id"] = vocabulary.named_ids[role]

    # 5) What a family has of its own: biases of a Llama show in its tensors, those of Qwen follow from its name.
    if family == "mistral":
        config["sliding_window"] = window
    elif architecture == "llama":
        config["attention_bias"] = "blk.0.attn_q.bias" in names
        config["mlp_bias"] = "blk.0.ffn_gate.bias" in names
    else:
        config["use_sliding_window"] = False
    if architecture == "qwen3":
        config["attention_bias"] = False
    return config


def _of_all_layers(key: str, value: Any) -> Any:
    """A setting that may be given for each layer apart, where all are equal; ValueError where they are not."""
    if not isinstance(value, list):
        return value
    if len(set(value)) != 1:
        raise ValueError(f"{key} differs from layer to layer; only equal layers are known")
    return value[0]


def _linear_scaling(values: dict[str, Any], prefix: str) -> dict[str, Any] | None:
    """The object that config.json has for linearly scaled rotary frequencies; None where they are not scaled.

    A factor without a kind scales linearly, as in llama.cpp.
    """
    kind = values.get(f"{prefix}rope.scaling.type", "linear")
    if kind not in ("none", "linear"):
        raise ValueError(f"{prefix}rope.scaling.type {kind!r:.80} is not known; known: none, linear")
    factor = read_float(values, f"{prefix}rope.scaling.factor", 1, 2**20, 1.0)
    if kind == "none" or factor == 1:
        return None
    return {"rope_type": "linear", "factor": float(factor)}


def llama3_scaling(factors: Values, rope_theta: float) -> dict[str, Any]:
    """The object that config.json has for Llama-3's scaled rotary frequencies; ValueError for any other scaling.

    A GGUF file holds only what each frequency is divided by. Llama-3.1 to 3.3 agree in all but the largest of these, so
    that it is enough to see that the others follow from it.
    """
    scaling = RopeScaling("llama3", float(factors.max()))
    unscaled = rope_theta ** -(torch.arange(0, 2 * len(factors), 2).double() / (2 * len(factors)))
    expected = unscaled / scaled_frequencies(unscaled, scaling)
    if not 1 <= scaling.factor <= 2**20 or not np.allclose(factors, expected, rtol=1e-4):
        raise ValueError("rope_freqs.weight is not Llama-3's scaling of rotary frequencies, the only one known")
    return {
        "rope_type": scaling.kind,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_frequency_factor,
        "high_freq_factor": scaling.high_frequency_factor,
        "original_max_position_embeddings": scaling.original_max_positions,
    }


# -- tensors -----------------------------------------------------------------------------------------------------------

ROPE_FACTORS = "rope_freqs.weight"
VALUES_AT_ONCE = 2**22  # of a tensor in memory: 16 MB in fp32


@dataclass(frozen=True)
class Target:
    """What a tensor becomes: Hugging Face's name, the shape it must have, and the heads whose rows are interleaved."""

    name: str
    shape: tuple[int, ...]
    n_interleaved_heads: int = 0


LAYER_PART = re.compile(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)")
LAYER_PARTS = {  # name in Hugging Face: in GGUF
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OTHER_PARTS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def targets(config: dict[str, Any]) -> dict[str, Target]:
    """Every tensor that a model of this config.json has, by its name in GGUF."""
    ours = read_llama(config)
    parameters = dict(empty_model(ours).named_parameters())
    # llama.cpp rotates Qwen's heads as Hugging Face does, in two halves; a Mistral is a Llama to it.
    is_interleaved = ours.family in ("llama", "mistral")
    n_interleaved = {"attn_q": ours.n_heads, "attn_k": ours.n_kv_heads} if is_interleaved else {}

    found = {}
    for our_name, name in llama_names(ours):
        shape = tuple(parameters[our_name].shape)
        in_layer = LAYER_PART.fullmatch(name)
        if in_layer is None:
            found[OTHER_PARTS[name]] = Target(name, shape)
        else:
            index, part, kind = in_layer.groups()
            part = LAYER_PARTS[part]
            found[f"blk.{index}.{part}.{kind}"] = Target(name, shape, n_interleaved.get(part, 0))
    return found


def check_tensors(tensors: dict[str, StoredTensor], expected: dict[str, Target]) -> None:
    """ValueError where a tensor is missing, unknown, or of another shape than it must have."""
    missing = [name for name in expected if name not in tensors]
    if missing:
        raise ValueError(f"missing tensor {missing[0]} ({len(missing)} missing in all)")
    for name, tensor in tensors.items():
        if name not in expected:
            raise ValueError(f"unknown tensor {name:.80}")
        if tensor.shape != expected[name].shape:
            raise ValueError(f"tensor {name} has shape {tensor.shape}, {expected[name].shape} is expected")


def half_split_order(n_rows: int, n_heads: int) -> RowIndices:
    """Where each row of a query or key projection lies in a GGUF file; 0 heads: where it lies here.

    Rotation turns pairs of rows (x, y). Hugging Face has a head's xs in its first half and its ys in its second; Meta's
    first Llama, and GGUF after it, has each pair together. A head of four rows is x₀ x₁ y₀ y₁ here and x₀ y₀ x₁ y₁
    there: its rows are 0, 2, 1, 3 of theirs.
    """
    if n_heads == 0:
        return np.arange(n_rows)
    return np.arange(n_rows).reshape(n_heads, -1, 2).swapaxes(1, 2).ravel()


def read_values(content: Bytes, tensor: StoredTensor, order: RowIndices) -> Iterator[Values]:
    """Dequantise a tensor some rows at a time, in the given order of rows; fp32 arrays.

    `content` is the bytes of the file. Rows can be put in order before they are dequantised, as no block reaches from
    one row to the next. ValueError: NaN or infinity.
    """
    library = gguf_package()
    kind = library.GGMLQuantizationType(tensor.kind)
    rows = content[tensor.offset : tensor.offset + tensor.n_bytes].reshape(tensor.shape[0], tensor.bytes_per_row)
    rows_at_once = max(1, VALUES_AT_ONCE // math.prod(tensor.shape[1:]))
    for start in range(0, len(order), rows_at_once):
        with np.errstate(all="ignore"):  # what overflows is found below
            values: Values = library.dequantize(rows[order[start : start + rows_at_once]], kind)
        if not np.isfinite(values).all():
            raise ValueError(f"tensor {tensor.name} holds NaN or infinity; it is broken")
        yield values


def write_safetensors(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, chunks: Iterable[Values]
) -> None:
    """Write a safetensors file of which only a chunk is in memory at a time.

    `chunks` are the values of all tensors in the order of `shapes`, in fp32. The format: the length of a JSON header in
    eight bytes, the header, which says where each tensor lies, then the tensors.
    """
    dtype_name = {torch.float32: "F32", torch.bfloat16: "BF16"}[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin = end
        end += math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": dtype_name, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        for values in chunks:
            tensor = torch.from_numpy(values).to(dtype).contiguous()
            stream.write(tensor.view(torch.uint8).numpy().data)


# -- the conversion ----------------------------------------------------------------------------------------------------


def convert_gguf(path: Path, directory: Path, *, sha256: str, dtype: torch.dtype = torch.float32) -> None:
    """Write a GGUF file's model as a Hugging Face directory, atomically and with a progress bar.

    `sha256` is the file's, which gguf.json in the directory records; `dtype` is fp32 or bf16. Some rows of one tensor
    are in memory at a time. UserError: the directory exists, the gguf package is missing, the file is broken or holds a
    model or a tokenizer that we do not have. After an error, or Ctrl-C, nothing is left.
    """
    if directory.exists():
        raise UserError(f"{directory}: exists already; remove it or choose another name")
    try:
        # 1) Everything but the values of the tensors is read and checked before anything is written.
        metadata, tensors = read_header(path)
        config = config_from(metadata, tensors)
        tokenizer, tokenizer_config = tokenizer_from(metadata)
        content = np.memmap(path, np.uint8, mode="r")
        factors = tensors.pop(ROPE_FACTORS, None)
        expected = targets(config)
        check_tensors(tensors, expected)
        if factors is not None:
            config["rope_scaling"] = _scaling_from(content, factors, config)

        # 2) The small files, then the tensors.
        config["torch_dtype"] = str(dtype).removeprefix("torch.")
        kinds = Counter(gguf_package().GGMLQuantizationType(tensor.kind).name for tensor in tensors.values())
        try:
            with staged_directory(directory) as unfinished:
                write_json(unfinished / RECORD, {"file": path.name, "sha256": sha256, "tensors": dict(kinds)})
                write_json(unfinished / "config.json", config)
                write_json(unfinished / "tokenizer.json", tokenizer)
                write_json(unfinished / "tokenizer_config.json", tokenizer_config)
                shapes = {target.name: target.shape for target in expected.values()}
                values = _all_values(content, tensors, expected, f"converting {path.name}")
                write_safetensors(unfinished / "model.safetensors", shapes, dtype, values)
        except BaseException:  # Ctrl-C, too: gigabytes that nobody would look for
            shutil.rmtree(directory.with_name(f"{directory.name}.unfinished"), ignore_errors=True)
            raise
    except KeyError as error:
        raise UserError(f"{path}: metadata {error.args[0]} is missing") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def _scaling_from(content: Bytes, factors: StoredTensor, config: dict[str, Any]) -> dict[str, Any]:
    """What config.json says of the rotary frequencies, from the tensor of what they are divided by."""
    n_factors = config["head_dim"] // 2
    if config["model_type"] not in ("llama", "mistral") or factors.shape != (n_factors,):
        raise ValueError(f"unknown tensor {ROPE_FACTORS} of shape {factors.shape}")
    if config["rope_scaling"] is not None:
        raise ValueError(f"{ROPE_FACTORS} beside rope.scaling.factor; rotary frequencies are scaled once here")
    values = np.concatenate([*read_values(content, factors, np.arange(n_factors))])
    return llama3_scaling(values.ravel(), config["rope_theta"])


def _all_values(
    content: Bytes, tensors: dict[str, StoredTensor], expected: dict[str, Target], title: str
) -> Iterator[Values]:
    """The values of all tensors that are expected, in that order, under a progress bar of bytes read."""
    n_bytes = sum(tensors[name].n_bytes for name in expected)
    with Progress(total=n_bytes, desc=title, unit="B", unit_scale=True) as progress:
        for name, target in expected.items():
            tensor = tensors[name]
            order = half_split_order(tensor.shape[0], target.n_interleaved_heads)
            for values in read_values(content, tensor, order):
                yield values
                progress.update(len(values) * tensor.bytes_per_row)


def source_of(directory: Path) -> str | None:
    """The sha256 of the GGUF file that a directory was made from; None where it was made from none, or does not say."""
    try:
        record: Any = read_json(directory / RECORD)
        sha256 = record["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return sha256 if isinstance(sha256, str) else None
