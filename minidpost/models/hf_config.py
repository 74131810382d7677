"""How each family stands in a Hugging Face directory: its config.json and the names of its tensors.

One explicit table of names joins our parameters to theirs. Every number in config.json is checked against bounds before
anything is made from it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from minidpost.errors import UserError
from minidpost.models.llama import Llama, LlamaConfig, RopeScaling
from minidpost.models.t5 import T5, T5Config
from minidpost.storage import read_json

Config = T5Config | LlamaConfig


@dataclass(frozen=True)
class HFMapping:
    """What checkpoint.py asks of a family.

    `read` and `write` turn config.json's content into our settings and back (KeyError, ValueError: what is missing or
    wrong); `names` gives every parameter as (our name, theirs); `is_redundant` says whether published files carry a
    tensor beside the weights.
    """

    model: type[nn.Module]
    config: type
    read: Callable[[dict], Config]
    write: Callable[[Config], dict]
    names: Callable[[Config], Iterator[tuple[str, str]]]
    is_redundant: Callable[[str, Config], bool]


def mapping_for(config: Config) -> HFMapping:
    """The mapping of a model's settings."""
    return next(mapping for mapping in HF_MAPPINGS.values() if mapping.config is type(config))


def model_type(directory: str | Path) -> str:
    """The family of a directory, as config.json's model_type names it; UserError where we have no such family."""
    return config_file(Path(directory))[1]["model_type"]


def read_config(directory: str | Path) -> Config:
    """The config.json of a directory (or that file itself) as our own settings; UserError names what is wrong in it."""
    path, hf = config_file(Path(directory))
    try:
        return HF_MAPPINGS[hf["model_type"]].read({key: value for key, value in hf.items() if value is not None})
    except KeyError as error:
        raise UserError(f"{path}: {error.args[0]} is missing") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


def config_file(directory: Path) -> tuple[Path, dict]:
    """The path and the content of a config.json of a family we know."""
    path = directory if directory.is_file() else directory / "config.json"
    try:
        hf = read_json(path)
    except FileNotFoundError:
        raise UserError(f"{directory}: no config.json here; a Hugging Face model directory is expected") from None
    except (OSError, ValueError):
        raise UserError(f"{path}: not readable as JSON") from None
    found = hf.get("model_type") if isinstance(hf, dict) else None
    if not isinstance(found, str) or found not in HF_MAPPINGS:
        raise UserError(f"{path}: model_type {found!r} is not known; known: {', '.join(map(repr, HF_MAPPINGS))}")
    return path, hf


def config_json(config: Config, dtype: torch.dtype) -> dict:
    """Our settings as transformers writes them."""
    return {**mapping_for(config).write(config), "torch_dtype": str(dtype).removeprefix("torch.")}


# -- numbers and switches ----------------------------------------------------------------------------------------------


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


def sizes_of(hf: dict, table: dict) -> dict[str, int]:
    """The sizes that a table names as ours: (theirs, lowest, highest)."""
    return {ours: number(hf, *theirs_low_high) for ours, theirs_low_high in table.items()}


# -- T5 ----------------------------------------------------------------------------------------------------------------

T5_SIZES = {  # ours: theirs, and bounds that keep every product of sizes below 2**63
    "vocab_size": ("vocab_size", 2, 2**20),
    "d_model": ("d_model", 1, 2**20),
    "d_kv": ("d_kv", 1, 2**20),
    "d_ff": ("d_ff", 1, 2**20),
    "n_heads": ("num_heads", 1, 2**20),
    "n_encoder_layers": ("num_layers", 1, 2**10),
    "n_buckets": ("relative_attention_num_buckets", 4, 2**20),
}


def read_t5(hf: dict) -> T5Config:
    feed_forward = hf.get("feed_forward_proj", "relu")
    if feed_forward not in ("relu", "gated-gelu"):
        raise ValueError(f"feed_forward_proj {feed_forward!r} is not known; known: relu, gated-gelu")
    sizes = sizes_of(hf, T5_SIZES)
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


def write_t5(config: T5Config) -> dict:
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
    }


def t5_names(config: T5Config) -> Iterator[tuple[str, str]]:
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


def is_redundant_in_t5(name: str, config: T5Config) -> bool:
    """A copy of the embedding, or an unused table."""
    return (
        name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
        or name == "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        or (name == "lm_head.weight" and config.tied)
    )


# -- Llama -------------------------------------------------------------------------------------------------------------

LLAMA_SIZES = {  # as T5_SIZES
    "vocab_size": ("vocab_size", 2, 2**20),
    "d_model": ("hidden_size", 1, 2**20),
    "d_ff": ("intermediate_size", 1, 2**20),
    "n_layers": ("num_hidden_layers", 1, 2**10),
    "n_heads": ("num_attention_heads", 1, 2**20),
}
LLAMA3_SCALING = {  # ours: theirs, and bounds
    "low_frequency_factor": ("low_freq_factor", 0, 2**20, 1.0),
    "high_frequency_factor": ("high_freq_factor", 0, 2**20, 4.0),
    "original_max_positions": ("original_max_position_embeddings", 1, 2**30, 8192),
}


def read_llama(hf: dict) -> LlamaConfig:
    if hf.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {hf['hidden_act']!r} is not known; known: silu")
    sizes = sizes_of(hf, LLAMA_SIZES)
    n_kv_heads = number(hf, "num_key_value_heads", 1, sizes["n_heads"], sizes["n_heads"])
    if sizes["n_heads"] % n_kv_heads:
        raise ValueError(f"num_attention_heads {sizes['n_heads']} is no multiple of num_key_value_heads {n_kv_heads}")
    d_head = number(hf, "head_dim", 1, 2**20, max(1, sizes["d_model"] // sizes["n_heads"]))
    if d_head % 2:
        raise ValueError(f"head_dim {d_head} is odd; rotary positions need pairs")
    rope = hf.get("rope_parameters", hf.get("rope_scaling", {}))  # transformers 5 has all in the former
    if not isinstance(rope, dict):
        raise ValueError(f"rope_scaling is {rope!r}, an object is expected")
    last_id = sizes["vocab_size"] - 1
    ends = hf["eos_token_id"] if isinstance(hf.get("eos_token_id"), list) else [hf.get("eos_token_id", 2)]
    ends = tuple(number({"eos_token_id": end}, "eos_token_id", 0, last_id) for end in ends)
    return LlamaConfig(
        n_kv_heads=n_kv_heads,
        d_head=d_head,
        norm_eps=number(hf, "rms_norm_eps", 0, 1, 1e-6),
        rope_theta=float(number(hf if "rope_theta" in hf else rope, "rope_theta", 1, 2**60, 10000.0)),
        rope_scaling=read_rope_scaling(rope),
        max_positions=number(hf, "max_position_embeddings", 1, 2**30, 2048),
        attention_bias=flag(hf, "attention_bias", False),
        mlp_bias=flag(hf, "mlp_bias", False),
        tied=flag(hf, "tie_word_embeddings", False),
        bos_id=number(hf, "bos_token_id", 0, last_id, 1),
        eos_id=ends if len(ends) > 1 else ends[0],
        **sizes,
    )


def read_rope_scaling(rope: dict) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise ValueError(f"rope_type {kind!r} is not known; known: default, linear, llama3")
    factor = float(number({"factor": 1.0, **rope}, "factor", 1, 2**20, 1.0))
    if kind == "linear":
        return RopeScaling(kind, factor)
    scaling = RopeScaling(kind, factor, **{ours: number(rope, *row) for ours, row in LLAMA3_SCALING.items()})
    if scaling.low_frequency_factor >= scaling.high_frequency_factor:
        raise ValueError("rope_scaling: low_freq_factor is not below high_freq_factor")
    return scaling


def write_llama(config: LlamaConfig) -> dict:
    scaling, rope = config.rope_scaling, None
    if scaling is not None:
        rope = {"rope_type": scaling.kind, "factor": scaling.factor, "rope_theta": config.rope_theta}
        if scaling.kind == "llama3":
            rope |= {theirs: getattr(scaling, ours) for ours, (theirs, *_) in LLAMA3_SCALING.items()}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        **{theirs: getattr(config, ours) for ours, (theirs, _, _) in LLAMA_SIZES.items()},
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope,
        "max_position_embeddings": config.max_positions,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "tie_word_embeddings": config.tied,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_id) if isinstance(config.eos_id, tuple) else config.eos_id,
    }


def llama_names(config: LlamaConfig) -> Iterator[tuple[str, str]]:
    yield "embedding.weight", "model.embed_tokens.weight"
    parts = ["weight", "bias"]
    for i in range(config.n_layers):
        ours, theirs = f"stack.layers.{i}", f"model.layers.{i}"
        for our, their in (("query", "q"), ("key", "k"), ("value", "v"), ("output", "o")):
            for part in parts[: 1 + config.attention_bias]:
                yield f"{ours}.attention.{our}.{part}", f"{theirs}.self_attn.{their}_proj.{part}"
        for name in ("gate", "up", "down"):
            for part in parts[: 1 + config.mlp_bias]:
                yield f"{ours}.feed_forward.{name}.{part}", f"{theirs}.mlp.{name}_proj.{part}"
        yield f"{ours}.attention_norm.weight", f"{theirs}.input_layernorm.weight"
        yield f"{ours}.feed_forward_norm.weight", f"{theirs}.post_attention_layernorm.weight"
    yield "stack.norm.weight", "model.norm.weight"
    if not config.tied:
        yield "head.weight", "lm_head.weight"


def is_redundant_in_llama(name: str, config: LlamaConfig) -> bool:
    """The frequencies that old files carry, or a copy of the embedding."""
    return name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tied)


HF_MAPPINGS = {
    "t5": HFMapping(T5, T5Config, read_t5, write_t5, t5_names, is_redundant_in_t5),
    "llama": HFMapping(Llama, LlamaConfig, read_llama, write_llama, llama_names, is_redundant_in_llama),
}
