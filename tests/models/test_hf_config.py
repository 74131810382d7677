"""Llama's directories there and back between transformers and us, and what is refused. T5's: test_weights."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from llama_oracle import LLAMA_SHAPES, hf_llama, ragged, random_llama
from safetensors.torch import load_file, save_file
from t5_oracle import SHAPES, assert_same_model, random_t5

from minidpost.errors import UserError
from minidpost.models import weights
from minidpost.models.hf_config import HF_MAPPINGS, model_type, read_config
from minidpost.models.llama import LlamaConfig, RopeScaling
from minidpost.models.weights import WEIGHTS, check_weights, load_model, load_template, save_model, tokenizer_files

torch.set_num_threads(1)


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
    twin, report = transformers.LlamaForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
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


def test_absent_and_null_settings_have_transformers_defaults(saved):
    needed = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    hf = {key: value for key, value in json.loads((saved / "config.json").read_text()).items() if key in needed}
    hf |= {"num_attention_heads": 4, "rope_scaling": None}
    (saved / "config.json").write_text(json.dumps(hf))
    ours, theirs = read_config(saved), transformers.LlamaConfig(**hf)
    assert ours.n_kv_heads == theirs.num_key_value_heads == 4
    assert ours.d_head == theirs.head_dim == 8
    assert (ours.norm_eps, ours.rope_theta) == (theirs.rms_norm_eps, theirs.rope_parameters["rope_theta"])
    assert (ours.tied, ours.attention_bias, ours.mlp_bias) == (False, theirs.attention_bias, theirs.mlp_bias)
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
    assert set(HF_MAPPINGS) == {"t5", "llama"}
    rewrite_json(saved / "config.json", model_type="mistral")
    with pytest.raises(UserError, match=r"model_type 'mistral' is not known; known: 't5', 'llama'"):
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
