"""How each family stands in a Hugging Face directory: its config.json and the names of its tensors.

One explicit mapping of names joins our parameters to theirs. Every number in config.json is checked against bounds
before anything is made from it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from minidpost.errors import UserError
from minidpost.models.llama import Llama, LlamaConfig, RopeScaling
from minidpost.models.t5 import T5, T5Config
from minidpost.storage import read_json

Config = T5Config | LlamaConfig
Model = T5 | Llama
ConfigT = TypeVar("ConfigT", T5Config, LlamaConfig)


@dataclass(frozen=True)
class HFMapping(Generic[ConfigT]):
    """How a family is read from a Hugging Face directory and written into one (weights.py uses it).

    `read` and `write` turn the content of config.json into our settings and back (`read` raises KeyError or ValueError
    where something is missing or wrong); `names` gives every parameter as (our name, their name); `is_redundant` says
    whether a tensor that is not among them may lie beside the weights, as it does in published files.
    """

    model: Callable[[ConfigT], Model]
    read: Callable[[dict[str, Any]], ConfigT]
    write: Callable[[ConfigT], dict[str, Any]]
    names: Callable[[ConfigT], Iterator[tuple[str, str]]]
    is_redundant: Callable[[str, ConfigT], bool]


def mapping_for(config: Config) -> HFMapping[Any]:
    """The mapping of a model's settings."""
    return HF_MAPPINGS[config.family]


def model_type(directory: str | Path) -> str:
    """The family of a directory, as config.json's model_type names it; UserError where we have no such family."""
    _, hf = config_file(Path(directory))
    family: str = hf["model_type"]
    return family


def read_config(directory: str | Path) -> Config:
    """The config.json of a directory (or that file itself) as our own settings; UserError names what is wrong in it."""
    path, hf = config_file(Path(directory))
    mapping = HF_MAPPINGS[hf["model_type"]]
    try:
        check_usual(hf)
        config: Config = mapping.read(hf)
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    return config


def config_file(directory: Path) -> tuple[Path, dict[str, Any]]:
    """The path and the content of a config.json of a family we have; UserError where there is none."""
    path = directory if directory.is_file() else directory / "config.json"
    try:
        hf = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{directory}: no config.json here; a Hugging Face model directory is expected") from None
    except (OSError, ValueError):
        raise UserError(f"{path}: not readable as JSON") from None
    found = hf.get("model_type") if isinstance(hf, dict) else None
    if not isinstance(hf, dict) or not isinstance(found, str) or found not in HF_MAPPINGS:
        raise UserError(f"{path}: model_type {found!r} is not known; known: {', '.join(map(repr, HF_MAPPINGS))}")
    if hf.get("quantization_config") is not None:
        raise UserError(
            f"{path}: quantization_config: quantised weights are not read; take the model that they were made of, or "
            "a GGUF file"
        )
    return path, hf


def config_json(config: Config, dtype: torch.dtype) -> dict[str, Any]:
    """Our settings as the content of a config.json that transformers reads."""
    content = mapping_for(config).write(config)
    return {**content, "torch_dtype": str(dtype).removeprefix("torch.")}


# Settings that transformers has for many models, and their only value here: with another the model would compute
# something else.
USUAL: dict[str, bool | int] = {"is_causal": True, "partial_rotary_factor": 1}


def check_usual(hf: dict[str, Any]) -> None:
    """ValueError where a setting that no family here is built for has another value than the usual one."""
    for key, usual in USUAL.items():
        if hf.get(key, usual) not in (usual, None):
            raise ValueError(f"{key} is {hf[key]!r:.40}; only {str(usual).lower()} is known")


# -- single settings ---------------------------------------------------------------------------------------------------


def without_nulls(hf: dict[str, Any]) -> dict[str, Any]:
    """The settings that have a value: null is as good as absent."""
    return {key: value for key, value in hf.items() if value is not None}


def read_int(hf: dict[str, Any], key: str, low: int, high: int, default: int | None = None) -> int:
    """A whole number within its bounds (ends included); ValueError names it, KeyError where it has no default."""
    value = hf[key] if default is None else hf.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{key} is {value!r}, a number from {low} to {high} is expected")
    return value


def read_float(hf: dict[str, Any], key: str, low: int, high: int, default: float) -> float:
    """A number within its bounds (ends included), whole or not; ValueError names it."""
    value = hf.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{key} is {value!r}, a number from {low} to {high} is expected")
    return value


def read_bool(hf: dict[str, Any], key: str, default: bool) -> bool:
    """A setting that is true or false; ValueError names it."""
    value = hf.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {value!r}, true or false is expected")
    return value


def read_text(hf: dict[str, Any], key: str) -> str:
    """A string; ValueError where something else is there, KeyError where it is missing."""
    text = hf[key]
    if not isinstance(text, str):
        raise ValueError(f"{key} is {text!r:.80}, a string is expected")
    return text


def read_sizes(hf: dict[str, Any], table: dict[str, tuple[str, int, int]]) -> dict[str, int]:
    """The sizes of a table, by our names; a row of it is our name: (their name, lowest, highest)."""
    return {ours: read_int(hf, theirs, low, high) for ours, (theirs, low, high) in table.items()}


# -- T5 ----------------------------------------------------------------------------------------------------------------

T5_SIZES = {  # our name: theirs, and bounds that keep every product of sizes below 2**63
    "vocab_size": ("vocab_size", 2, 2**20),
    "d_model": ("d_model", 1, 2**20),
    "d_kv": ("d_kv", 1, 2**20),
    "d_ff": ("d_ff", 1, 2**20),
    "n_heads": ("num_heads", 1, 2**20),
    "n_encoder_layers": ("num_layers", 1, 2**10),
    "n_buckets": ("relative_attention_num_buckets", 4, 2**20),
}

T5_ACTIVATIONS = {"relu": "relu", "gated-gelu": "gelu_new"}  # feed_forward_proj: dense_act_fn


def read_t5(hf: dict[str, Any]) -> T5Config:
    """T5's settings from the content of config.json, what is absent as transformers fills it in.

    KeyError: a size is missing. ValueError: a value that is out of bounds or that we do not have.
    """
    hf = without_nulls(hf)
    feed_forward = hf.get("feed_forward_proj", "relu")
    if feed_forward not in [*T5_ACTIVATIONS]:  # a list, as what stands there may be anything
        raise ValueError(f"feed_forward_proj {feed_forward!r} is not known; known: {', '.join(T5_ACTIVATIONS)}")
    activation = T5_ACTIVATIONS[feed_forward]
    if hf.get("dense_act_fn", activation) != activation:  # transformers takes this one where both are there
        raise ValueError(f"dense_act_fn is {hf['dense_act_fn']!r:.40}, which with {feed_forward} is {activation}")
    sizes = read_sizes(hf, T5_SIZES)
    last_id = sizes["vocab_size"] - 1
    tied = read_bool(hf, "tie_word_embeddings", True)
    return T5Config(
        vocab_size=sizes["vocab_size"],
        d_model=sizes["d_model"],
        d_kv=sizes["d_kv"],
        d_ff=sizes["d_ff"],
        n_heads=sizes["n_heads"],
        n_encoder_layers=sizes["n_encoder_layers"],
        n_buckets=sizes["n_buckets"],
        gated=feed_forward == "gated-gelu",
        tied=tied,
        scaled=read_bool(hf, "scale_decoder_outputs", tied),
        norm_eps=read_float(hf, "layer_norm_epsilon", 0, 1, 1e-6),
        dropout=read_float(hf, "dropout_rate", 0, 1, 0.1),
        max_distance=read_int(hf, "relative_attention_max_distance", sizes["n_buckets"], 2**20, 128),
        n_decoder_layers=read_int(hf, "num_decoder_layers", 1, 2**10, sizes["n_encoder_layers"]),
        pad_id=read_int(hf, "pad_token_id", 0, last_id, 0),
        eos_id=read_int(hf, "eos_token_id", 0, last_id, 1),
        start_id=read_int(hf, "decoder_start_token_id", 0, last_id, 0),
    )


def write_t5(config: T5Config) -> dict[str, Any]:
    """T5's settings as the content of config.json; `read_t5` of it gives them back."""
    sizes = {theirs: vars(config)[ours] for ours, (theirs, _, _) in T5_SIZES.items()}
    return {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        **sizes,
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
    }


def t5_names(config: T5Config) -> Iterator[tuple[str, str]]:
    """Every parameter of a T5 as (our name, their name).

    Theirs count the parts of a block: layer.0 is self-attention, a decoder's layer.1 cross-attention, the last one the
    feed-forward. `decoder.layers.2.cross_attention.key.weight` is `decoder.block.2.layer.1.EncDecAttention.k.weight`.
    """
    attentions = {
        "encoder": [("attention", "SelfAttention")],
        "decoder": [("self_attention", "SelfAttention"), ("cross_attention", "EncDecAttention")],
    }
    yield "embedding.weight", "shared.weight"
    for stack, n_layers in (("encoder", config.n_encoder_layers), ("decoder", config.n_decoder_layers)):
        bias = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        yield f"{stack}.relative_bias.weight", bias
        yield f"{stack}.norm.weight", f"{stack}.final_layer_norm.weight"
        for i in range(n_layers):
            ours = f"{stack}.layers.{i}"
            theirs = f"{stack}.block.{i}"
            for j, (our_attention, their_attention) in enumerate(attentions[stack]):
                for our_part, their_part in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
                    yield (
                        f"{ours}.{our_attention}.{our_part}.weight",
                        f"{theirs}.layer.{j}.{their_attention}.{their_part}.weight",
                    )
                yield f"{ours}.{our_attention}_norm.weight", f"{theirs}.layer.{j}.layer_norm.weight"
            feed_forward = f"{theirs}.layer.{len(attentions[stack])}"
            if config.gated:
                yield f"{ours}.feed_forward.gate.weight", f"{feed_forward}.DenseReluDense.wi_0.weight"
            up = "wi_1" if config.gated else "wi"
            yield f"{ours}.feed_forward.up.weight", f"{feed_forward}.DenseReluDense.{up}.weight"
            yield f"{ours}.feed_forward.down.weight", f"{feed_forward}.DenseReluDense.wo.weight"
            yield f"{ours}.feed_forward_norm.weight", f"{feed_forward}.layer_norm.weight"
    if not config.tied:
        yield "head.weight", "lm_head.weight"


def is_redundant_in_t5(name: str, config: T5Config) -> bool:
    """Whether a tensor is a copy of the embedding, or the bias of cross-attention that T5 never uses."""
    return (
        name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
        or name == "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        or (name == "lm_head.weight" and config.tied)
    )


# -- Llama and its like ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LlamaFamily:
    """In what a family of Llama's kind differs from the others.

    `defaults` are the settings that config.json may leave out, as transformers fills them in; where it says null,
    there is no such thing (sliding windows), or one that follows from others (the size of a head).
    """

    architecture: str  # transformers' class
    defaults: dict[str, int]
    has_bias_settings: bool = False  # `attention_bias` decides about all four projections of the attention
    has_mlp_bias_setting: bool = False  # `mlp_bias` decides about those of the feed-forward
    has_qkv_bias: bool = False  # always, and no bias elsewhere
    has_qk_norm: bool = False
    has_sliding_window: bool = False  # `sliding_window`, unless it is null
    may_have_sliding_window: bool = False  # where `use_sliding_window` says so


LLAMA_FAMILIES = {  # by config.json's model_type
    "llama": LlamaFamily(
        "LlamaForCausalLM",
        {"max_position_embeddings": 2048, "bos_token_id": 1, "eos_token_id": 2},
        has_bias_settings=True,
        has_mlp_bias_setting=True,
    ),
    "qwen2": LlamaFamily(
        "Qwen2ForCausalLM",
        {"num_key_value_heads": 32, "max_position_embeddings": 32768},
        has_qkv_bias=True,
        may_have_sliding_window=True,
    ),
    "qwen3": LlamaFamily(
        "Qwen3ForCausalLM",
        {"num_key_value_heads": 32, "head_dim": 128, "max_position_embeddings": 32768},
        has_bias_settings=True,
        has_qk_norm=True,
        may_have_sliding_window=True,
    ),
    "mistral": LlamaFamily(
        "MistralForCausalLM",
        {
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        has_sliding_window=True,
    ),
}

LLAMA_SIZES = {  # as T5_SIZES
    "vocab_size": ("vocab_size", 2, 2**20),
    "d_model": ("hidden_size", 1, 2**20),
    "d_ff": ("intermediate_size", 1, 2**20),
    "n_layers": ("num_hidden_layers", 1, 2**10),
    "n_heads": ("num_attention_heads", 1, 2**20),
}


def read_llama(hf: dict[str, Any]) -> LlamaConfig:
    """The settings of a Llama or its like from the content of config.json, what is absent as transformers fills it in.

    KeyError: a size is missing. ValueError: a value that is out of bounds or that we do not have.
    """
    family = LLAMA_FAMILIES[hf["model_type"]]
    hf = without_nulls(family.defaults | hf)
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {hf['hidden_act']!r} is not known; known: silu")
    sizes = read_sizes(hf, LLAMA_SIZES)
    last_id = sizes["vocab_size"] - 1
    n_kv_heads = read_int(hf, "num_key_value_heads", 1, sizes["n_heads"], sizes["n_heads"])
    if sizes["n_heads"] % n_kv_heads:
        raise ValueError(f"num_attention_heads {sizes['n_heads']} is no multiple of num_key_value_heads {n_kv_heads}")
    d_head = read_int(hf, "head_dim", 1, 2**20, max(1, sizes["d_model"] // sizes["n_heads"]))
    if d_head % 2:
        raise ValueError(f"head_dim {d_head} is odd; rotary positions need pairs")
    # transformers 5 writes all of it into rope_parameters, but reads rope_scaling first where both are there, and
    # rope_theta in either of them before that beside them.
    rope = hf.get("rope_scaling", {})
    if rope == {}:
        rope = hf.get("rope_parameters", {})
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling is {rope!r}, an object is expected")
    rope_theta = read_float(rope, "rope_theta", 1, 2**60, read_float(hf, "rope_theta", 1, 2**60, 10000.0))
    max_positions = read_int(hf, "max_position_embeddings", 1, 2**30)
    attention_bias = family.has_bias_settings and read_bool(hf, "attention_bias", False)
    return LlamaConfig(
        vocab_size=sizes["vocab_size"],
        d_model=sizes["d_model"],
        d_ff=sizes["d_ff"],
        n_layers=sizes["n_layers"],
        n_heads=sizes["n_heads"],
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        norm_eps=read_float(hf, "rms_norm_eps", 0, 1, 1e-6),
        rope_theta=float(rope_theta),
        rope_scaling=read_rope_scaling(rope),
        max_positions=max_positions,
        window=read_window(hf, family, max_positions),
        qkv_bias=family.has_qkv_bias or attention_bias,
        output_bias=attention_bias,
        qk_norm=family.has_qk_norm,
        mlp_bias=family.has_mlp_bias_setting and read_bool(hf, "mlp_bias", False),
        dropout=read_float(hf, "attention_dropout", 0, 1, 0.0),
        tied=read_bool(hf, "tie_word_embeddings", False),
        bos_id=read_int(hf, "bos_token_id", 0, last_id) if "bos_token_id" in hf else None,
        eos_id=read_eos_id(hf, last_id),
        family=hf["model_type"],
    )


def read_eos_id(hf: dict[str, Any], last_id: int) -> int | tuple[int, ...] | None:
    """The id that ends a text, several (Llama-3.1 has a list of them) or none; ValueError: no id of the vocabulary."""
    if "eos_token_id" not in hf:
        return None
    given = hf["eos_token_id"]
    ids = given if isinstance(given, list) and given else [given]
    eos_ids = tuple(read_int({"eos_token_id": eos_id}, "eos_token_id", 0, last_id) for eos_id in ids)
    return eos_ids if len(eos_ids) > 1 else eos_ids[0]


def read_window(hf: dict[str, Any], family: LlamaFamily, max_positions: int) -> int | None:
    """Up to how many positions each sees all before it, None for any number; ValueError where only some layers do so.

    A window that slides along is not built. One as long as the longest sequence is none.
    """
    if family.may_have_sliding_window:
        if read_bool(hf, "use_sliding_window", False):
            raise ValueError("use_sliding_window is true: sliding windows are not supported, false is expected")
        layer_types = hf.get("layer_types", [])  # transformers 5 says it layer by layer
        if not isinstance(layer_types, list) or any(kind != "full_attention" for kind in layer_types):
            raise ValueError(f"layer_types is {layer_types!r:.80}, a list of 'full_attention' is expected")
    if family.has_sliding_window and "sliding_window" in hf:
        window = read_int(hf, "sliding_window", 1, 2**30)
        return window if window < max_positions else None
    return None


def read_rope_scaling(rope: dict[str, Any]) -> RopeScaling | None:
    """How rotary frequencies are scaled, from the object that config.json has for it; None: not at all.

    ValueError: a kind that we do not have, or numbers that are out of bounds.
    """
    check_usual(rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ValueError(f"rope_type {kind!r} is not known; known: default, linear, llama3")
    factor = float(read_float(rope, "factor", 1, 2**20, 1.0))
    if kind == "linear":
        return RopeScaling(kind, factor)
    scaling = RopeScaling(
        kind,
        factor,
        low_frequency_factor=read_float(rope, "low_freq_factor", 0, 2**20, 1.0),
        high_frequency_factor=read_float(rope, "high_freq_factor", 0, 2**20, 4.0),
        original_max_positions=read_int(rope, "original_max_position_embeddings", 1, 2**30, 8192),
    )
    if scaling.low_frequency_factor >= scaling.high_frequency_factor:
        raise ValueError("rope_scaling: low_freq_factor is not below high_freq_factor")
    return scaling


def write_rope_scaling(config: LlamaConfig) -> dict[str, Any] | None:
    """The object that config.json has for scaled rotary frequencies; None where they are not scaled."""
    scaling = config.rope_scaling
    if scaling is None:
        return None
    rope = {"rope_type": scaling.kind, "factor": scaling.factor, "rope_theta": config.rope_theta}
    if scaling.kind == "llama3":
        rope["low_freq_factor"] = scaling.low_frequency_factor
        rope["high_freq_factor"] = scaling.high_frequency_factor
        rope["original_max_position_embeddings"] = scaling.original_max_positions
    return rope


def write_llama(config: LlamaConfig) -> dict[str, Any]:
    """The settings of a Llama or its like as the content of config.json; `read_llama` of it gives them back."""
    family = LLAMA_FAMILIES[config.family]
    content = {
        "architectures": [family.architecture],
        "model_type": config.family,
        **{theirs: vars(config)[ours] for ours, (theirs, _, _) in LLAMA_SIZES.items()},
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": write_rope_scaling(config),
        "max_position_embeddings": config.max_positions,
        "attention_dropout": config.dropout,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_id) if isinstance(config.eos_id, tuple) else config.eos_id,
    }
    if family.has_bias_settings:
        content["attention_bias"] = config.output_bias
    if family.has_mlp_bias_setting:
        content["mlp_bias"] = config.mlp_bias
    if family.has_sliding_window:
        content["sliding_window"] = config.window
    if family.may_have_sliding_window:
        content["use_sliding_window"] = False
    return content


def llama_names(config: LlamaConfig) -> Iterator[tuple[str, str]]:
    """Every parameter of a Llama or its like as (our name, their name)."""
    qkv_parts = ["weight", "bias"] if config.qkv_bias else ["weight"]
    output_parts = ["weight", "bias"] if config.output_bias else ["weight"]
    projections = (("query", "q", qkv_parts), ("key", "k", qkv_parts), ("value", "v", qkv_parts))
    feed_forward_parts = ["weight", "bias"] if config.mlp_bias else ["weight"]
    yield "embedding.weight", "model.embed_tokens.weight"
    for i in range(config.n_layers):
        ours = f"stack.layers.{i}"
        theirs = f"model.layers.{i}"
        for our_name, their_name, parts in (*projections, ("output", "o", output_parts)):
            for part in parts:
                yield f"{ours}.attention.{our_name}.{part}", f"{theirs}.self_attn.{their_name}_proj.{part}"
        if config.qk_norm:
            yield f"{ours}.attention.query_norm.weight", f"{theirs}.self_attn.q_norm.weight"
            yield f"{ours}.attention.key_norm.weight", f"{theirs}.self_attn.k_norm.weight"
        for name in ("gate", "up", "down"):
            for part in feed_forward_parts:
                yield f"{ours}.feed_forward.{name}.{part}", f"{theirs}.mlp.{name}_proj.{part}"
        yield f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight"
        yield f"{ours}.feed_forward_norm.weight", f"{theirs}.post_attention_layernorm.weight"
    yield "stack.norm.weight", "model.norm.weight"
    if not config.tied:
        yield "head.weight", "lm_head.weight"


def is_redundant_in_llama(name: str, config: LlamaConfig) -> bool:
    """Whether a tensor is the rotary frequencies, which old files have, or a copy of the embedding."""
    return name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tied)


LLAMA_MAPPING = HFMapping(Llama, read_llama, write_llama, llama_names, is_redundant_in_llama)

HF_MAPPINGS: dict[str, HFMapping[Any]] = {  # by config.json's model_type
    "t5": HFMapping(T5, read_t5, write_t5, t5_names, is_redundant_in_t5),
    **dict.fromkeys(LLAMA_FAMILIES, LLAMA_MAPPING),
}
