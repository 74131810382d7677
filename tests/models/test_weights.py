"""Checkpoints there and back between transformers and us, and how much memory loading takes."""

import hashlib
import json
import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from t5_oracle import SHAPES, assert_same_model, hf_logits, hf_twin, random_batch, random_t5

from minidpost.models import weights
from minidpost.models.hf_config import read_config, t5_names
from minidpost.models.t5 import T5, T5Config
from minidpost.models.weights import (
    INDEX,
    WEIGHTS,
    WritableTensor,
    in_memory,
    load_model,
    save_model,
    tokenizer_files,
    write_safetensors,
    write_tensors,
)

ROOT = Path(__file__).resolve().parents[2]
SHAPE = "gated-untied"
BATCH_LENGTHS, N_TARGETS = [7, 3, 12], 6


def batch_of(model: T5):
    return random_batch(model.config, BATCH_LENGTHS, N_TARGETS)


def assert_same_logits(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def load_in_transformers(directory: Path) -> transformers.T5ForConditionalGeneration:
    twin, report = transformers.T5ForConditionalGeneration.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return twin.eval()


def rewrite(directory: Path, change) -> None:
    """Let `change` edit the directory's one file of tensors, given as a dictionary."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, directory / WEIGHTS)


def rewrite_json(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture
def saved(tmp_path) -> Path:
    """A small model in one file."""
    save_model(random_t5(SHAPES[SHAPE]), tmp_path / "model", [])
    return tmp_path / "model"


@pytest.mark.parametrize("max_shard_bytes", [weights.MAX_SHARD_BYTES, 20_000], ids=["whole", "shards"])
@pytest.mark.parametrize("shape", SHAPES)
def test_transformers_loads_what_we_save(shape, max_shard_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", max_shard_bytes)
    model = random_t5(SHAPES[shape])
    save_model(model, tmp_path, [])
    n_files = len(list(tmp_path.glob("*.safetensors")))
    assert n_files == 1 if max_shard_bytes > 20_000 else n_files > 2
    for path in tmp_path.glob("*.safetensors"):
        with safe_open(path, framework="pt") as tensors:
            assert tensors.metadata() == {"format": "pt"}  # without which transformers 4 refuses the file
    twin = load_in_transformers(tmp_path)
    assert (twin.lm_head.weight is twin.shared.weight) == model.config.tied
    with torch.no_grad():
        assert_same_logits(hf_logits(twin, *batch_of(model)), model(*batch_of(model)))
    assert_same_model(load_model(tmp_path), model)


@pytest.mark.parametrize("max_shard_size", ["1GB", "20KB"], ids=["whole", "shards"])
@pytest.mark.parametrize("shape", SHAPES)
def test_we_load_what_transformers_saves(shape, max_shard_size, tmp_path):
    twin = hf_twin(random_t5(SHAPES[shape]))
    twin.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert (tmp_path / WEIGHTS).exists() == (max_shard_size == "1GB")
    model = load_model(tmp_path)
    assert not model.training
    with torch.no_grad():
        assert_same_logits(model(*batch_of(model)), hf_logits(twin, *batch_of(model)))
    assert_same_model(model, random_t5(SHAPES[shape]))


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16])
def test_tensors_on_disk_are_cast(stored, wanted, tmp_path):
    twin = hf_twin(random_t5(SHAPES[SHAPE])).to(stored)
    twin.save_pretrained(tmp_path)
    model = load_model(tmp_path, dtype=wanted)
    names = dict(t5_names(model.config))
    twin_weights = twin.state_dict()
    for name, weight in model.named_parameters():
        assert weight.dtype == wanted and torch.equal(weight, twin_weights[names[name]].to(wanted)), name


def test_bf16_model_is_saved_as_bf16(tmp_path):
    model = random_t5(SHAPES[SHAPE]).bfloat16()
    save_model(model, tmp_path, [])
    assert {tensor.dtype for tensor in load_file(tmp_path / WEIGHTS).values()} == {torch.bfloat16}
    twin = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    assert twin.dtype == torch.bfloat16
    assert_same_model(load_model(tmp_path, torch.bfloat16), model)


@pytest.mark.parametrize("shape", SHAPES)
def test_redundant_tensors_of_old_exports_are_accepted(shape, tmp_path):
    model = random_t5(SHAPES[shape])
    save_model(model, tmp_path, [])

    def add(tensors):
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            tensors[name] = tensors["shared.weight"]
        unused = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
        tensors[unused] = torch.zeros(model.config.n_buckets, model.config.n_heads)
        tensors.setdefault("lm_head.weight", tensors["shared.weight"])

    rewrite(tmp_path, add)
    loaded = load_model(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(*batch_of(model)), model(*batch_of(model)))
    if model.config.scaled or not model.config.tied:  # else the copy counts as a head of its own
        assert_same_model(loaded, model)


def test_head_on_disk_outweighs_a_tied_config(saved):
    """transformers 5 writes "tied" into the config of every T5, Flan's untied head notwithstanding."""
    rewrite_json(saved / "config.json", tie_word_embeddings=True, scale_decoder_outputs=False)
    assert_same_model(load_model(saved), random_t5(SHAPES[SHAPE]))


def test_settings_beyond_the_shape_are_saved(tmp_path):
    config = replace(SHAPES[SHAPE], dropout=0.25, norm_eps=1e-3, max_distance=77, pad_id=3, eos_id=4, start_id=5)
    save_model(T5(config).initialise(), tmp_path, [])
    assert load_model(tmp_path).config == config
    hf = transformers.AutoConfig.from_pretrained(tmp_path)
    assert (hf.dropout_rate, hf.layer_norm_epsilon, hf.relative_attention_max_distance) == (0.25, 1e-3, 77)
    assert (hf.pad_token_id, hf.eos_token_id, hf.decoder_start_token_id) == (3, 4, 5)


@pytest.mark.parametrize("name", ["flan-t5-small", "t5-large"])
def test_published_configs_are_understood(shared, name):
    config = read_config(shared / "configs" / name)
    flan = name.startswith("flan")
    assert (config.gated, config.tied, config.scaled) == (flan, not flan, not flan)
    assert config == read_config(shared / "configs" / name / "config.json")


def test_absent_and_null_settings_have_transformers_defaults(saved):
    path = saved / "config.json"
    needed = ("model_type", "vocab_size", "d_model", "d_kv", "d_ff", "num_heads", "num_layers")
    hf = {key: value for key, value in json.loads(path.read_text()).items() if key in needed}
    path.write_text(json.dumps(hf | {"relative_attention_num_buckets": 32, "num_decoder_layers": None}))
    theirs, ours = transformers.T5Config(**hf), read_config(saved)
    assert ours.n_decoder_layers == theirs.num_decoder_layers == ours.n_encoder_layers
    assert (ours.gated, ours.tied, ours.scaled) == (theirs.is_gated_act, True, theirs.scale_decoder_outputs)
    assert (ours.norm_eps, ours.dropout) == (theirs.layer_norm_epsilon, theirs.dropout_rate)
    assert (ours.max_distance, ours.pad_id, ours.eos_id) == (
        theirs.relative_attention_max_distance,
        theirs.pad_token_id,
        theirs.eos_token_id,
    )


def test_tokenizer_files_are_copied_along(saved, tmp_path):
    (saved / "spiece.model").write_bytes(b"pieces")
    (saved / "tokenizer_config.json").write_bytes(b"{}")
    (saved / "optimizer.pt").write_bytes(b"no part of it")
    save_model(load_model(saved), tmp_path / "copy", tokenizer_files(saved))
    found = {path.name for path in (tmp_path / "copy").iterdir()}
    assert found == {"config.json", WEIGHTS, "spiece.model", "tokenizer_config.json"}
    assert (tmp_path / "copy/spiece.model").read_bytes() == b"pieces"


def test_saving_replaces_another_tokenizer(saved, tmp_path):
    (saved / "spiece.model").write_bytes(b"pieces")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy/spiece.model").write_bytes(b"another model's")
    save_model(load_model(saved), tmp_path / "copy", tokenizer_files(saved))
    assert (tmp_path / "copy/spiece.model").read_bytes() == b"pieces"


def test_saving_into_the_directory_loaded_from(saved):
    """The loaded weights may be the file's own pages: writing must not pull it from under them."""
    (saved / "spiece.model").write_bytes(b"pieces")
    model = load_model(saved)
    with torch.no_grad():
        model.embedding.weight.add_(1.0)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    for _ in range(2):
        save_model(model, saved, tokenizer_files(saved))
        again = load_model(saved).state_dict()
        for name, weight in expected.items():
            assert torch.equal(model.state_dict()[name], weight) and torch.equal(again[name], weight), name
    assert (saved / "spiece.model").read_bytes() == b"pieces"


def test_training_a_loaded_model_leaves_its_file_alone(saved):
    before = hashlib.sha256((saved / WEIGHTS).read_bytes()).digest()
    model = load_model(saved)
    assert all(weight.requires_grad and weight.is_leaf for weight in model.parameters())
    model(*batch_of(model)).square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert not torch.equal(model.embedding.weight, load_model(saved).embedding.weight)
    assert hashlib.sha256((saved / WEIGHTS).read_bytes()).digest() == before


def test_new_shards_hide_no_older_whole_file(saved):
    model = random_t5(SHAPES[SHAPE], seed=5)
    names = dict(t5_names(model.config))
    tensors = {names[name]: weight.detach() for name, weight in model.named_parameters()}
    write_tensors(in_memory(tensors), saved, max_shard_bytes=20_000)
    assert_same_model(load_model(saved), model)


def test_shards_hold_every_tensor_once_within_their_size(saved):
    write_tensors(in_memory(load_file(saved / WEIGHTS)), saved, max_shard_bytes=20_000)
    index = json.loads((saved / INDEX).read_text())
    shards = {path.name: load_file(path) for path in saved.glob("*.safetensors")}
    assert index["weight_map"] == {name: shard for shard, tensors in shards.items() for name in tensors}
    sizes = [sum(tensor.nbytes for tensor in tensors.values()) for tensors in shards.values()]
    assert index["metadata"]["total_size"] == sum(sizes) > 100_000
    assert max(sizes) <= 20_000 and len(sizes) < 2 * sum(sizes) / 20_000
    assert sorted(shards)[0] == f"model-00001-of-{len(shards):05d}.safetensors"


@pytest.mark.parametrize("max_shard_bytes", [10**6, 16_000], ids=["one file", "shards of four"])
def test_at_most_a_tensor_is_held_while_tensors_are_written(saved, max_shard_bytes):
    """They are made when it is their turn, and freed as soon as they are on the disk."""
    alive: set[str] = set()
    most = 0

    def to_write(index: int) -> WritableTensor:
        def values() -> torch.Tensor:
            nonlocal most
            tensor = torch.full((1000,), float(index))
            alive.add(f"tensor {index}")
            weakref.finalize(tensor, alive.discard, f"tensor {index}")
            most = max(most, len(alive))
            return tensor

        return WritableTensor(f"tensor {index}", (1000,), torch.float32, values)

    write_tensors([to_write(index) for index in range(20)], saved, max_shard_bytes=max_shard_bytes)
    assert most <= 2  # the one that was written last has its name until the next one is made
    if max_shard_bytes == 16_000:
        index = json.loads((saved / INDEX).read_text())
        assert len({*index["weight_map"].values()}) == 5 and index["metadata"]["total_size"] == 80_000
        where = index["weight_map"]
    else:
        where = {f"tensor {index}": WEIGHTS for index in range(20)}
    assert not [*saved.glob("*unfinished*")]
    for name, shard in where.items():
        assert load_file(saved / shard)[name].eq(float(name.split()[1])).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_files_are_those_that_the_library_writes(tmp_path, dtype):
    tensors = {
        "b": torch.randn(3, 4).to(dtype),
        "a": torch.randn(5, 7).to(dtype).T,  # not contiguous
        'ñ "': torch.tensor(1.5),
        "empty": torch.empty(0, 3, dtype=dtype),
    }
    write_safetensors(in_memory(tensors), tmp_path / "ours")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "theirs", {"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


# Memory

MEASURE = """
import re, sys, torch
from minidpost.models.weights import load_model

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) * 1024

with torch.no_grad():
    load_model(sys.argv[1]).embedding.weight.sum()  # so that what is loaded on first use is there
    assert "torch._dynamo" not in sys.modules  # torch's compiler, which takes two seconds to import
    before = peak()
    model = load_model(sys.argv[2])
    touched = sum(weight.sum() for weight in model.parameters())
print((peak() - before) / sum(weight.nbytes for weight in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc/self/status")
def test_loading_never_holds_two_copies(saved, tmp_path):
    """Peak resident memory grows by the weights once (two copies would be 2); mapped pages count."""
    config = T5Config(100, 512, 64, 2048, 8, n_encoder_layers=5, n_decoder_layers=4)
    with torch.device("meta"):
        model = T5(config)
    save_model(model.to_empty(device="cpu"), tmp_path / "big", [])
    assert (tmp_path / "big" / WEIGHTS).stat().st_size > 150e6
    command = [sys.executable, "-c", MEASURE, str(saved), str(tmp_path / "big")]
    growth = float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout)
    assert 0.9 < growth < 1.4


def test_stored_tensors_are_freed_one_by_one(saved, monkeypatch):
    """Where they must be cast: when the next is read, at most the last one is still there."""
    rewrite(saved, lambda tensors: tensors.update({name: x.half() for name, x in tensors.items()}))
    read, alive_at_most, refs = weights.read_tensor, [], []

    def counting_read(*arguments):
        alive_at_most.append(sum(ref() is not None for ref in refs))
        tensor = read(*arguments)
        refs.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(weights, "read_tensor", counting_read)
    model = load_model(saved)
    assert len(refs) == len(list(model.parameters())) and max(alive_at_most) == 1


def test_weights_are_as_readable_as_other_files(tiny_model_dir, tmp_path):
    model = load_model(tiny_model_dir)
    save_model(model, tmp_path, [])
    modes = {path.stat().st_mode for path in (tmp_path / "config.json", tmp_path / WEIGHTS)}
    assert len(modes) == 1
