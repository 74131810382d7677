"""Directories of Llama and its like, there and back between transformers and us, and what is refused."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from llama_oracle import HF_CLASSES, LLAMA_SHAPES, hf_llama, ragged, random_llama
from safetensors.torch import load_file, save_file
from t5_oracle import SHAPES, assert_same_model, random_t5

from minidpost.errors import UserError
from minidpost.models import weights
from minidpost.models.hf_config import HF_MAPPINGS, llama_names, model_type, read_config
from minidpost.models.llama import Llama, LlamaConfig, RopeScaling
from minidpost.models.weights import WEIGHTS, check_weights, load_model, load_template, save_model, tokenizer_files


@pytest.fixture
def saved(tmp_path) -> Path:
    """A small Llama in one file."""
    save_model(random_llama(LLAMA_SHAPES["llama3-rope"]), tmp_path / "model", [])
    return tmp_path / "model"


def rewrite_json(path: Path, **changes) -> None:
    hf = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in hf.items() if value != "absent"}))


def rewrite(directory: Path, change) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / WEIGHTS)


def assert_refused(directory: Path, *words: str) -> None:
    """load_model and check_weights answer with the same line, which has all the words in it."""
    lines = []
    for refusing in (check_weights, load_model):
        with pytest.raises(UserError) as refusal:
            refusing(directory)
        lines.append(str(refusal.value))
    line = lines[0]
    assert lines == [line, line]
    assert "\n" not in line and len(line) < 500
    for word in words:
        assert word in line, f"{word!r} not in {line!r}"


@pytest.mark.parametrize("max_shard_bytes", [weights.MAX_SHARD_BYTES, 20_000], ids=["whole", "shards"])
@pytest.mark.parametrize("shape", LLAMA_SHAPES)
@torch.no_grad()
def test_transformers_loads_what_we_save(shape, max_shard_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", max_shard_bytes)
    model = random_llama(LLAMA_SHAPES[shape])
    save_model(model, tmp_path, [])
    assert (len(list(tmp_path.glob("*.safetensors"))) == 1) == (max_shard_bytes > 20_000)
    twin, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(twin) is HF_CLASSES[model.config.family]
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    ids_BT = torch.tensor(ragged([90, 90], model.config.vocab_size))
    expected = twin.eval()(ids_BT).logits
    assert (model(ids_BT) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert_same_model(load_model(tmp_path), model)


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"], ids=["whole", "shards"])
@pytest.mark.parametrize("shape", LLAMA_SHAPES)
def test_we_load_what_transformers_saves(shape, max_shard_size, tmp_path):
    model = random_llama(LLAMA_SHAPES[shape])
    hf_llama(model).save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / WEIGHTS).exists() == (max_shard_size == "1GB")
    assert_same_model(load_model(tmp_path), model)


@pytest.mark.parametrize("shape", ["grouped", "plain"])
def test_redundant_tensors_of_old_exports_are_accepted(shape, tmp_path):
    model = random_llama(LLAMA_SHAPES[shape])
    save_model(model, tmp_path, [])

    def add(tensors):
        for i in range(model.config.n_layers):
            tensors[f"model.layers.{i}.self_attn.rotary_emb.inv_freq"] = torch.ones(model.config.d_head // 2)
        tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])

    rewrite(tmp_path, add)
    assert_same_model(load_model(tmp_path), model)


@pytest.mark.parametrize("name", ["llama-7b", "Llama-2-7b-hf", "Meta-Llama-3-8B", "Llama-3.2-1B"])
def test_published_configs_are_understood(shared, name):
    path = shared / "configs" / name
    config, theirs = read_config(path), transformers.AutoConfig.from_pretrained(path)
    assert model_type(path) == "llama"
    assert (config.n_heads, config.n_kv_heads) == (theirs.num_attention_heads, theirs.num_key_value_heads)
    assert config.d_head == theirs.head_dim
    assert (config.norm_eps, config.max_positions) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert (config.tied, config.bos_id, config.eos_id) == (
        theirs.tie_word_embeddings,
        theirs.bos_token_id,
        theirs.eos_token_id,
    )
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    expected = RopeScaling("llama3", 32.0, 1.0, 4.0, 8192) if name == "Llama-3.2-1B" else None
    assert config.rope_scaling == expected


@pytest.mark.parametrize(
    ("name", "family"),
    [
        *((f"smollm2-{size}", "llama") for size in ("135m", "360m", "1.7b")),
        ("tinyllama-1.1b", "llama"),
        *((f"qwen2.5-{size}", "qwen2") for size in ("0.5b", "1.5b")),
        ("qwen3-0.6b", "qwen3"),
    ],
)
def test_published_configs_of_the_like_are_understood(shared, name, family):
    path = shared / "configs" / name
    config, theirs = read_config(path), transformers.AutoConfig.from_pretrained(path)
    assert model_type(path) == config.family == theirs.model_type == family
    with torch.device("meta"):
        twin = transformers.AutoModelForCausalLM.from_config(theirs)
    expected = {name: tuple(weight.shape) for name, weight in twin.named_parameters()}
    ours = {name: tuple(weight.shape) for name, weight in weights.empty_model(config).named_parameters()}
    assert {theirs: ours[name] for name, theirs in llama_names(config)} == expected
    assert (config.norm_eps, config.max_positions) == (theirs.rms_norm_eps, theirs.max_position_embeddings)
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (config.bos_id, config.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert config.rope_scaling is None
    assert (config.tied, config.dropout) == (theirs.tie_word_embeddings, theirs.attention_dropout)


SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_absent_settings_have_the_defaults_of_the_family(tmp_path, family):
    hf = {"model_type": family, **SIZES} | ({"sliding_window": None} if family == "mistral" else {})
    (tmp_path / "config.json").write_text(json.dumps(hf))
    ours, theirs = read_config(tmp_path), transformers.AutoConfig.for_model(**hf)
    assert (ours.n_kv_heads, ours.max_positions) == (theirs.num_key_value_heads, theirs.max_position_embeddings)
    assert ours.d_head == theirs.to_dict().get("head_dim", 2)
    assert (ours.norm_eps, ours.rope_theta) == (theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"])
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert (ours.qkv_bias, ours.output_bias, ours.qk_norm) == (family == "qwen2", False, family == "qwen3")
    assert (ours.tied, ours.dropout) == (theirs.tie_word_embeddings, theirs.attention_dropout)


@pytest.mark.parametrize(
    ("family", "settings", "words"),
    [
        ("mistral", {"sliding_window": 0}, ("sliding_window is 0",)),
        ("mistral", {"sliding_window": "4096"}, ("sliding_window is '4096'",)),
        ("qwen2", {"use_sliding_window": True}, ("use_sliding_window",)),
        ("qwen3", {"use_sliding_window": True, "max_window_layers": 28}, ("use_sliding_window",)),
        ("qwen2", {"use_sliding_window": "no"}, ("use_sliding_window", "'no'")),
        ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, ("layer_types", "sliding_attention")),
        ("qwen3", {"layer_types": "full_attention"}, ("layer_types",)),
    ],
)
def test_sliding_windows_are_refused(tmp_path, family, settings, words):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **SIZES, **settings}))
    with pytest.raises(UserError) as refusal:
        read_config(tmp_path)
    for word in (str(tmp_path / "config.json"), *words):
        assert word in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_window_bounds_the_lengths_that_are_computed(tmp_path):
    """Mistral 0.1's: within it attention is full, as transformers' is there; it comes back in config.json."""
    hf = {"model_type": "mistral", **SIZES, "max_position_embeddings": 64, "sliding_window": 8}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    model = Llama(read_config(tmp_path)).initialise().eval()
    save_model(model, tmp_path / "saved", [])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    assert theirs.config.sliding_window == 8
    ids_BT = torch.randint(0, SIZES["vocab_size"], (2, 8))
    with torch.no_grad():
        torch.testing.assert_close(model(ids_BT), theirs(ids_BT).logits, rtol=1e-4, atol=1e-5)
        with pytest.raises(UserError, match=r"9 tokens are longer than this model's sliding window of 8; .*--max-new"):
            model(torch.zeros(1, 9, dtype=torch.long))
    model.new_cache(1, 3, 5)
    with pytest.raises(UserError, match="sliding window of 8"):
        model.new_cache(1, 4, 5)


def test_a_tied_head_of_its_own_on_the_disk_is_refused(tmp_path):
    save_model(random_llama(replace(LLAMA_SHAPES["llama3-rope"], tied=True)), tmp_path, [])
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"]}))
    load_model(tmp_path)  # a copy of the embedding
    rewrite(tmp_path, lambda tensors: tensors["lm_head.weight"][0].add_(1))
    with pytest.raises(UserError, match=r"lm_head\.weight is not the embedding, though tie_word_embeddings"):
        load_model(tmp_path)
    assert_refused(tmp_path, "lm_head.weight is not the embedding")  # before anything begins, too


def test_quantised_weights_are_refused_by_their_config(tmp_path):
    hf = {"model_type": "llama", **SIZES, "max_position_embeddings": 64, "quantization_config": {"quant_method": "awq"}}
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(UserError, match=r"quantization_config: quantised weights are not read; .* a GGUF file"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {"sliding_window": None}),
        ("mistral", {"max_position_embeddings": 4096, "sliding_window": 4096}),
        ("mistral", {"max_position_embeddings": 2048}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 16, "max_window_layers": 1}),
        ("qwen3", {"sliding_window": 16, "layer_types": ["full_attention"] * 2}),
        ("llama", {"sliding_window": 16}),
    ],
)
def test_windows_that_hide_nothing_are_accepted(tmp_path, family, settings):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **SIZES, **settings}))
    config = read_config(tmp_path)
    assert isinstance(config, LlamaConfig) and config.family == family


@pytest.mark.parametrize("shape", ["qwen2", "qwen3", "mistral"])
def test_biases_and_norms_of_another_family_are_refused(shape, tmp_path):
    """Each family's tensors are its own: the same directory under another name does not load."""
    save_model(random_llama(LLAMA_SHAPES[shape]), tmp_path / "model", [])
    for other in ("llama", "qwen2", "qwen3"):
        if other != shape and not (shape == "mistral" and other == "llama"):
            rewrite_json(tmp_path / "model" / "config.json", model_type=other)
            assert_refused(tmp_path / "model", "tensor")


def test_absent_and_null_settings_have_transformers_defaults(saved):
    needed = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    hf = {key: value for key, value in json.loads((saved / "config.json").read_text()).items() if key in needed}
    hf |= {"num_attention_heads": 4, "rope_scaling": None}
    (saved / "config.json").write_text(json.dumps(hf))
    ours, theirs = read_config(saved), transformers.LlamaConfig(**hf)
    assert ours.n_kv_heads == theirs.num_key_value_heads == 4
    assert ours.d_head == theirs.head_dim == 8
    assert (ours.norm_eps, ours.rope_theta) == (theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"])
    assert (ours.tied, ours.qkv_bias, ours.output_bias) == (False, theirs.attention_bias, theirs.attention_bias)
    assert (ours.mlp_bias, ours.qk_norm) == (theirs.mlp_bias, False)
    assert ours.dropout == theirs.attention_dropout == 0
    assert (ours.max_positions, ours.bos_id, ours.eos_id) == (theirs.max_position_embeddings, 1, 2)


def test_both_ways_of_writing_rope_settings_are_read(saved):
    expected = read_config(saved)
    scaling = json.loads((saved / "config.json").read_text())["rope_scaling"]
    old = {key: value for key, value in scaling.items() if key not in ("rope_type", "rope_theta")}
    rewrite_json(saved / "config.json", rope_scaling=old | {"type": "llama3"})
    assert read_config(saved) == expected
    new = scaling | {"rope_theta": expected.rope_theta}
    rewrite_json(saved / "config.json", rope_scaling="absent", rope_theta="absent", rope_parameters=new)
    assert read_config(saved) == expected


def test_of_two_rope_settings_the_one_counts_that_transformers_takes(saved):
    """Files of transformers 5, to which somebody has added what older ones have."""
    new = {"rope_type": "default", "rope_theta": 3e4}
    rewrite_json(
        saved / "config.json", rope_theta=5e5, rope_scaling={"type": "linear", "factor": 2}, rope_parameters=new
    )
    ours, theirs = read_config(saved), transformers.AutoConfig.from_pretrained(saved).rope_parameters
    assert (theirs["rope_type"], theirs["factor"]) == ("linear", 2)
    assert (ours.rope_scaling, ours.rope_theta) == (RopeScaling("linear", 2.0), theirs["rope_theta"])
    rewrite_json(saved / "config.json", rope_scaling=None)
    ours, theirs = read_config(saved), transformers.AutoConfig.from_pretrained(saved).rope_parameters
    assert (ours.rope_scaling, ours.rope_theta) == (None, theirs["rope_theta"]) == (None, 3e4)


@pytest.mark.parametrize("settings", [{"partial_rotary_factor": 0.5}, {"rope_scaling": {"partial_rotary_factor": 0.5}}])
def test_heads_that_are_turned_in_part_are_refused(saved, settings):
    rewrite_json(saved / "config.json", **settings)
    assert_refused(saved, "partial_rotary_factor is 0.5; only 1 is known")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral"])
def test_models_that_see_what_follows_are_refused(tmp_path, family):
    """Embedding models made of language models: transformers 5 gives their attention no causal mask."""
    for is_causal in (True, None):
        hf = {"model_type": family, **SIZES, "is_causal": is_causal}
        (tmp_path / "config.json").write_text(json.dumps(hf))
        assert read_config(tmp_path).family == family
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **SIZES, "is_causal": False}))
    with pytest.raises(UserError, match=r"config\.json: is_causal is False; only true is known$"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(
            (key, value)
            for key in ("vocab_size", "hidden_size", "intermediate_size")
            for value in (10**12, 0, 2.5, "8")
        ),
        *((key, value) for key in ("num_hidden_layers", "num_attention_heads") for value in (10**12, -1, True, None)),
        ("num_key_value_heads", 3),
        ("num_key_value_heads", 5),
        ("head_dim", 15),
        ("head_dim", 10**9),
        ("hidden_act", "gelu"),
        ("rms_norm_eps", float("nan")),
        ("rope_theta", 0),
        ("rope_theta", float("inf")),
        ("rope_scaling", 8.0),
        ("eos_token_id", [2, 97]),
        ("eos_token_id", "</s>"),
        ("bos_token_id", -1),
        ("attention_bias", "yes"),
        ("max_position_embeddings", 10**12),
        ("attention_dropout", 1.5),
        ("attention_dropout", -0.1),
        ("attention_dropout", "0.1"),
    ],
)
@pytest.mark.timeout(120)
def test_absurd_settings_are_refused_by_name(saved, key, value):
    rewrite_json(saved / "config.json", **{key: value})
    assert_refused(saved, str(saved / "config.json"), key)


@pytest.mark.parametrize(
    ("scaling", "word"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "'yarn'"),
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic'"),
        ({"rope_type": "linear", "factor": 0.5}, "factor"),
        ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}, "low_freq_factor"),
        ({"rope_type": "llama3", "factor": "8"}, "factor"),
    ],
)
def test_unknown_rope_scaling_is_refused_by_name(saved, scaling, word):
    rewrite_json(saved / "config.json", rope_scaling=scaling)
    assert_refused(saved, word)


def test_tensors_that_are_missing_unexpected_or_of_another_shape(saved):
    name = "model.layers.1.self_attn.k_proj.weight"
    corruptions = {
        "missing tensor": lambda tensors: tensors.pop(name),
        "unexpected tensor": lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.ones(1)}),
        "shape": lambda tensors: tensors.update({name: tensors[name][:-1]}),
    }
    for words, corrupt in corruptions.items():
        corrupted = shutil.copytree(saved, saved.with_name(words.replace(" ", "-")))
        rewrite(corrupted, corrupt)
        assert_refused(corrupted, words)


def test_families_are_known_by_their_model_type(saved, tmp_path):
    save_model(random_t5(SHAPES["gated-untied"]), tmp_path / "t5", [])
    assert (model_type(saved), model_type(tmp_path / "t5")) == ("llama", "t5")
    assert set(HF_MAPPINGS) == {"t5", "llama", "qwen2", "qwen3", "mistral"}
    rewrite_json(saved / "config.json", model_type="gemma2")
    known = "'t5', 'llama', 'qwen2', 'qwen3', 'mistral'"
    with pytest.raises(UserError, match=rf"model_type 'gemma2' is not known; known: {known}"):
        model_type(saved)


def test_original_tokenizer_goes_to_the_root(saved, shared, tmp_path):
    (saved / "original").mkdir()
    shutil.copy(shared / "tokenizers" / "llama3" / "tokenizer.model", saved / "original")
    save_model(load_model(saved), tmp_path / "copy", tokenizer_files(saved))
    assert (tmp_path / "copy/tokenizer.model").read_bytes() == (saved / "original/tokenizer.model").read_bytes()
    with pytest.raises(UserError, match="128,256 pieces, the model 97 embeddings"):
        load_template(tmp_path / "copy")


def test_settings_beyond_the_shape_are_saved(tmp_path):
    config = replace(
        LLAMA_SHAPES["plain"],
        norm_eps=1e-3,
        rope_theta=12345.0,
        bos_id=7,
        eos_id=(4, 5),
        max_positions=99,
        dropout=0.25,
    )
    save_model(random_llama(config), tmp_path, [])
    assert load_model(tmp_path).config == config
    assert transformers.AutoConfig.from_pretrained(tmp_path).attention_dropout == 0.25
    assert isinstance(config, LlamaConfig)
