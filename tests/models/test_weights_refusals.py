"""What load_model and check_weights refuse, each in one line that names the file and what is wrong in it."""

import json
import os
import shutil
import tracemalloc
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from t5_oracle import SHAPES, random_t5

from minidpost.errors import UserError
from minidpost.models import weights
from minidpost.models.hf_config import config_json, llama_names
from minidpost.models.llama import LlamaConfig
from minidpost.models.weights import (
    INDEX,
    WEIGHTS,
    check_weights,
    empty_model,
    in_memory,
    load_model,
    save_model,
    write_tensors,
)
from minidpost.storage import write_json

SHAPE = "gated-untied"


def rewrite(directory: Path, change) -> None:
    """Let `change` edit the directory's one file of tensors, given as a dictionary."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / WEIGHTS)


def rewrite_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def saved(tmp_path) -> Path:
    """A whole and valid directory to be corrupted."""
    save_model(random_t5(SHAPES[SHAPE]), tmp_path / "model", [])
    return tmp_path / "model"


@pytest.fixture
def sharded(saved) -> Path:
    """The same in several shards."""
    write_tensors(in_memory(load_file(saved / WEIGHTS)), saved, max_shard_bytes=20_000)
    assert not (saved / WEIGHTS).exists()
    return saved


def assert_refused(directory: Path, *words: str) -> None:
    """load_model and check_weights answer with the same line, which has all the words in it.

    Of two tensors that lie, safetensors names now one, now the other, so its own words are not compared.
    """
    lines = []
    for refusing in (check_weights, load_model):
        with pytest.raises(UserError) as refusal:
            refusing(directory)
        lines.append(str(refusal.value))
    line = lines[0]
    ours = [line.partition(" (Error while deserializing")[0] for line in lines]
    assert ours == [ours[0], ours[0]]
    assert "\n" not in line and len(line) < 500
    for word in words:
        assert word in line, f"{word!r} not in {line!r}"


def test_pickle_is_refused_with_the_way_out(saved):
    (saved / WEIGHTS).rename(saved / "pytorch_model.bin")
    assert_refused(saved, str(saved), "pytorch_model.bin", "pickle", "save_pretrained")


@pytest.mark.parametrize("pickle", ["training_args.bin", "optimizer.bin", "scheduler.bin", "rng_state_0.pth"])
def test_a_trainings_other_pickles_are_not_taken_for_weights(saved, pickle):
    (saved / WEIGHTS).rename(saved / "model.fp16.safetensors")
    (saved / pickle).write_bytes(b"pickle")
    line = f"{saved}: neither {WEIGHTS} nor {INDEX} is here"
    assert_refused(saved, f"{line}, but model.fp16.safetensors is; rename it to {WEIGHTS} if it holds the whole model")
    (saved / "model.fp16.safetensors").rename(saved / "pytorch_model.pt")
    assert_refused(saved, f"{saved}: pytorch_model.pt is a pickle", "save_pretrained")
    (saved / "pytorch_model.pt").unlink()
    (saved / WEIGHTS).mkdir()
    with pytest.raises(UserError) as raised:
        check_weights(saved)
    assert str(raised.value) == line


def test_an_adapter_beside_a_config_says_what_it_is(saved):
    """Some libraries write the base model's config.json and tokenizer beside it."""
    (saved / WEIGHTS).rename(saved / "adapter_model.safetensors")
    (saved / "adapter_config.json").write_text('{"base_model_name_or_path": "a/base"}')
    (saved / "training_args.bin").write_bytes(b"pickle")
    assert_refused(saved, f"{saved}: a LoRA adapter of a/base", "merge_and_unload")


def test_empty_or_absent_directory(tmp_path):
    assert_refused(tmp_path, str(tmp_path), WEIGHTS)
    assert_refused(tmp_path / "nowhere", "nowhere")


def test_missing_config(saved):
    (saved / "config.json").unlink()
    assert_refused(saved, str(saved), "no config.json")


@pytest.mark.parametrize(
    "text", ['{"model_type": "t5",', "", "\xff\xfe", "[" * 100_000], ids=["cut", "empty", "bytes", "deep"]
)
def test_config_that_is_no_json(saved, text):
    (saved / "config.json").write_bytes(text.encode("latin-1"))
    assert_refused(saved, str(saved / "config.json"), "JSON")


@pytest.mark.parametrize("text", ["[]", "3", "null", "{}", '{"model_type": "bert"}', '{"model_type": ["t5"]}'])
def test_config_of_another_model(saved, text):
    (saved / "config.json").write_text(text)
    assert_refused(saved, str(saved / "config.json"), "model_type", "'t5'")


def test_an_activation_of_its_own_is_refused(saved):
    """transformers takes dense_act_fn where it differs from what feed_forward_proj says."""
    activation = {"relu": "relu", "gated-gelu": "gelu_new"}[
        json.loads((saved / "config.json").read_text())["feed_forward_proj"]
    ]
    rewrite_json(saved / "config.json", dense_act_fn=activation)
    load_model(saved)
    rewrite_json(saved / "config.json", dense_act_fn="silu")
    assert_refused(saved, "dense_act_fn is 'silu', which with ", activation)


def test_a_decoder_that_sees_what_follows_is_refused(saved):
    rewrite_json(saved / "config.json", is_causal=True)
    load_model(saved)
    rewrite_json(saved / "config.json", is_causal=False)
    assert_refused(saved, "is_causal is False; only true is known")


@pytest.mark.parametrize("value", ["gated-silu", "gelu", 3, ["relu"]])
def test_unknown_feed_forward(saved, value):
    rewrite_json(saved / "config.json", feed_forward_proj=value)
    assert_refused(saved, "feed_forward_proj", repr(value), "gated-gelu")


SIZES = ["vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers", "num_decoder_layers"]
SIZES += ["relative_attention_num_buckets", "relative_attention_max_distance"]


@pytest.mark.parametrize(
    "value", [10**12, 10**30, -1, 0, 2.5, "512", True, [8], {}, float("nan"), float("inf")], ids=str
)
@pytest.mark.parametrize("key", SIZES)
@pytest.mark.timeout(120)
def test_absurd_sizes(saved, key, value):
    rewrite_json(saved / "config.json", **{key: value})
    assert_refused(saved, str(saved / "config.json"), key)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_layers", 10**6),
        ("dropout_rate", 1.5),
        ("dropout_rate", "0.1"),
        ("layer_norm_epsilon", float("nan")),
        ("layer_norm_epsilon", -1e-6),
        ("pad_token_id", -1),
        ("eos_token_id", [1, 2]),
        ("decoder_start_token_id", 97),
        ("tie_word_embeddings", "false"),
        ("scale_decoder_outputs", 0),
        ("relative_attention_num_buckets", 2),
        ("relative_attention_max_distance", 16),
    ],
)
@pytest.mark.timeout(120)
def test_impossible_settings(saved, key, value):
    rewrite_json(saved / "config.json", **{key: value})
    assert_refused(saved, str(saved / "config.json"), key, repr(value))


@pytest.mark.parametrize("key", ["vocab_size", "num_heads", "num_layers"])
def test_missing_size(saved, key):
    hf = json.loads((saved / "config.json").read_text())
    del hf[key]
    (saved / "config.json").write_text(json.dumps(hf))
    assert_refused(saved, str(saved / "config.json"), f"{key} is missing")


@pytest.mark.parametrize(
    "name", ["shared.weight", "lm_head.weight", "decoder.block.2.layer.1.EncDecAttention.k.weight"]
)
def test_missing_tensor(saved, name):
    rewrite(saved, lambda tensors: tensors.pop(name))
    assert_refused(saved, str(saved), "missing tensor", name)


@pytest.mark.parametrize(
    "name", ["decoder.block.3.layer.0.SelfAttention.q.weight", "encoder.block.0.layer.0.SelfAttention.q.bias", "extra"]
)
def test_unexpected_tensor(saved, name):
    rewrite(saved, lambda tensors: tensors.update({name: torch.zeros(2, 2)}))
    assert_refused(saved, str(saved / WEIGHTS), "unexpected tensor", name)


def test_untied_config_needs_a_head(tmp_path):
    save_model(random_t5(SHAPES["relu-tied-scaled"]), tmp_path, [])
    rewrite_json(tmp_path / "config.json", tie_word_embeddings=False)
    assert_refused(tmp_path, "missing tensor lm_head.weight")


@pytest.mark.parametrize("name", ["shared.weight", "encoder.final_layer_norm.weight"])
@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x[None], lambda x: x.flatten()[:0]])
def test_wrong_shape(saved, name, change):
    rewrite(saved, lambda tensors: tensors.update({name: change(tensors[name])}))
    expected = tuple(load_file(saved / WEIGHTS)[name].shape)
    assert_refused(saved, str(saved / WEIGHTS), name, str(expected), "expected")


def test_config_of_another_size_than_the_tensors(saved):
    rewrite_json(saved / "config.json", d_ff=2**20)
    assert_refused(saved, "DenseReluDense", "(40, 24)", "(1048576, 24)")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float64, torch.bool])
def test_tensor_of_another_type(saved, dtype):
    name = "decoder.block.0.layer.0.SelfAttention.q.weight"
    rewrite(saved, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    assert_refused(saved, str(saved / WEIGHTS), name, str(dtype), "fp32, bf16 or fp16")


@pytest.mark.parametrize("keep", [0, 4, 100, -1, -1000])
def test_truncated_file(saved, keep):
    path = saved / WEIGHTS
    path.write_bytes(path.read_bytes()[:keep])
    assert_refused(saved, str(path), "safetensors")


@pytest.mark.parametrize("header", [b"\xff" * 8, b"\x08" + bytes(7) + b"not json", b"<!DOCTYPE html><html>"])
def test_file_that_is_no_safetensors(saved, header):
    (saved / WEIGHTS).write_bytes(header + bytes(100))
    assert_refused(saved, str(saved / WEIGHTS), "safetensors")


def test_truncated_or_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-10])
    assert_refused(sharded, str(shard), "safetensors")
    shard.unlink()
    assert_refused(sharded, str(shard), "safetensors")


@pytest.mark.parametrize(
    "shard",
    ["../x.safetensors", "{parent}/x.safetensors", "deeper/x.safetensors", "..", "weights.bin", ""],
)
def test_shard_names_that_leave_the_directory(sharded, shard):
    """Refused although the file is there and whole."""
    index = json.loads((sharded / INDEX).read_text())
    name, original = next(iter(index["weight_map"].items()))
    (sharded / "deeper").mkdir()
    for copy in (sharded.parent, sharded / "deeper"):
        shutil.copyfile(sharded / original, copy / "x.safetensors")
    index["weight_map"][name] = shard.format(parent=sharded.parent)
    (sharded / INDEX).write_text(json.dumps(index))
    assert_refused(sharded, INDEX, "shard")


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 3}}', "{}", "[" * 100_000])
def test_broken_index(sharded, text):
    (sharded / INDEX).write_text(text)
    assert_refused(sharded, str(sharded / INDEX))


def test_index_that_names_a_tensor_the_shard_lacks(sharded):
    index = json.loads((sharded / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    name = next(name for name, shard in index["weight_map"].items() if shard == shards[0])
    index["weight_map"][name] = shards[1]
    (sharded / INDEX).write_text(json.dumps(index))
    assert_refused(sharded, shards[1], name)


def test_index_that_leaves_out_a_tensor(sharded):
    index = json.loads((sharded / INDEX).read_text())
    del index["weight_map"]["encoder.block.1.layer.0.SelfAttention.v.weight"]
    (sharded / INDEX).write_text(json.dumps(index))
    assert_refused(sharded, "missing tensor encoder.block.1.layer.0.SelfAttention.v.weight")


def hostile_file(path: Path, header: dict | bytes, n_bytes: int = 8) -> None:
    """A file with this header and as many bytes of data, as safetensors lays it out."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(n_bytes))


def entry(shape: list, begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    "header",
    [
        {"shared.weight": entry([10**12, 24], 0, 96 * 10**12)},
        {"shared.weight": entry([10**12, 24], 0, 8)},
        {"shared.weight": entry([10**12, 0], 0, 0)},
        {"shared.weight": entry([2**62, 2**62], 0, 8)},
        {"shared.weight": entry([10**30], 0, 8)},
        {"shared.weight": entry([-2], 0, 8)},
        {"shared.weight": entry([2], 8, 0)},
        {"shared.weight": entry([2], 0, 8, "F31")},
        {"shared.weight": entry([2], 0, 8), "extra": entry([2], 4, 12)},
        {"shared.weight": entry([2], 0, 8), "extra": entry([2], 0, 8)},
        {"shared.weight": entry([1], 0, 4), "extra": entry([1], 8, 12)},
        {"shared.weight": {"dtype": "F32", "shape": [2]}},
        {"shared.weight": None},
        b"[" * 100_000,
        b"\xff" * 100,
        b"{}" + b" " * 1000 + b"x",
    ],
    ids=lambda header: str(header)[:60],
)
@pytest.mark.timeout(120)
def test_headers_that_lie(saved, header):
    """Refused before anything of the size they claim is allocated."""
    hostile_file(saved / WEIGHTS, header)
    tracemalloc.start()
    assert_refused(saved, str(saved / WEIGHTS))
    assert tracemalloc.get_traced_memory()[1] < 10**7
    tracemalloc.stop()


@pytest.mark.parametrize("length", [10**6, 2**40, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file(saved, length):
    path = saved / WEIGHTS
    path.write_bytes(length.to_bytes(8, "little") + path.read_bytes()[8:])
    assert_refused(saved, str(path), "safetensors")


@pytest.mark.parametrize(
    "shard",
    [
        *(r"..\x.safetensors", r"deeper\x.safetensors", "C:x.safetensors", "/x.safetensors", "./x.safetensors"),
        *("a\0.safetensors", "a\n.safetensors", "..safetensors/../x.safetensors", ".", "x.bin", "x.safetensors.bin"),
    ],
)
def test_shard_names_stay_in_the_directory_on_any_system(sharded, shard):
    index = json.loads((sharded / INDEX).read_text())
    index["weight_map"]["shared.weight"] = shard
    (sharded / INDEX).write_text(json.dumps(index))
    assert_refused(sharded, INDEX, "is no safetensors file of this directory")


def test_a_shard_may_be_a_link(sharded, tmp_path):
    """As they are in Hugging Face's own cache; what a name may not do, the user's own links may."""
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.rename(tmp_path / "blob")
    shard.symlink_to(tmp_path / "blob")
    load_model(sharded)


@pytest.mark.parametrize("directory", ["saved", "sharded"])
def test_checking_reads_no_tensor(request, monkeypatch, directory):
    path = request.getfixturevalue(directory)

    def read(*_):
        raise AssertionError

    monkeypatch.setattr(weights, "read_tensor", read)
    check_weights(path)
    with pytest.raises(AssertionError):
        load_model(path)


def test_a_model_of_many_gigabytes_is_checked(tmp_path):
    """A file whose header is true and whose tensors are a hole of 13 GB, which takes no room on the disk."""
    config = LlamaConfig(32000, 4096, 11008, 32, n_heads=32, n_kv_heads=32, d_head=128)
    write_json(tmp_path / "config.json", config_json(config, torch.float16))
    parameters = dict(empty_model(config).named_parameters())
    header = {}
    n_bytes = 0
    for ours, theirs in llama_names(config):
        begin, n_bytes = n_bytes, n_bytes + 2 * parameters[ours].numel()
        header[theirs] = entry(list(parameters[ours].shape), begin, n_bytes, "F16")
    path = tmp_path / WEIGHTS
    hostile_file(path, header, n_bytes=0)
    n_header = path.stat().st_size
    os.truncate(path, n_header + n_bytes)
    assert n_bytes > 13e9
    check_weights(tmp_path)
    os.truncate(path, n_header + n_bytes - 1)
    assert_refused(tmp_path, str(path), "not a whole safetensors file")


def test_a_finite_model_is_loaded_without_a_warning(saved):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(saved)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_that_are_nan_are_named_and_loaded(saved, value, dtype):
    names = ["encoder.block.1.layer.0.SelfAttention.k.weight", "decoder.final_layer_norm.weight"]

    def corrupt(tensors):
        for name in names:
            tensors[name] = tensors[name].to(dtype)
            tensors[name].view(-1)[-1] = value

    rewrite(saved, corrupt)
    with pytest.warns(UserWarning) as caught:
        load_model(saved)
    (warning,) = caught
    first = min(names)  # the file has them in this order
    assert str(warning.message) == f"{saved / WEIGHTS}: tensor {first} holds NaN or infinity (2 such in all)"
