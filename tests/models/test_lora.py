"""Adapters against peft: logits, gradients, merged weights, files; and what an adapted model is before and after."""

import json
import math
from dataclasses import replace
from pathlib import Path
from random import Random

import peft
import pytest
import torch
import transformers
from llama_oracle import LLAMA_SHAPES, hf_llama, ragged, random_llama
from safetensors.torch import load_file
from t5_oracle import SHAPES, hf_logits, hf_twin, random_batch, random_t5
from torch import Tensor, nn

from minidpost.models import weights
from minidpost.models.hf_config import Model
from minidpost.models.llama import Llama, LlamaConfig
from minidpost.models.lora import (
    LoRALinear,
    adapted_layers,
    adapters,
    add_adapters,
    n_adapter_parameters,
    save_adapters,
    save_merged,
)
from minidpost.models.t5 import T5, T5Config
from minidpost.models.weights import empty_model, load_model, save_model, tokenizer_files
from minidpost.selftraining.presets import n_parameters
from minidpost.training.batching import TokenizedExample
from minidpost.training.dpo import DPOSettings, PreferencePair, reference_log_probabilities, train_dpo
from minidpost.training.optim import Schedule, enable_activation_checkpointing, read_log
from minidpost.training.sft import SFTSettings, sft_gradients, train_sft

NAMES = ["gated-untied", "relu-tied-scaled", "grouped", "one-kv-head-biases", "qwen3"]
RANK, ALPHA = 3, 5.0


def plain(name: str) -> Model:
    return random_t5(SHAPES[name]) if name in SHAPES else random_llama(LLAMA_SHAPES[name])


def adapted(name: str) -> Model:
    """A model whose adapters are not zero, as after a training."""
    model = plain(name)
    add_adapters(model, rank=RANK, alpha=ALPHA, seed=4)
    with torch.no_grad():
        for layer in adapters(model).values():
            layer.lora_B.normal_(std=0.1)
    return model


def twin_of(model: Model) -> transformers.PreTrainedModel:
    """transformers' model with the frozen weights of ours."""
    frozen = plain_copy(model)
    return hf_twin(frozen) if isinstance(frozen, T5) else hf_llama(frozen)


def plain_copy(model: Model) -> Model:
    """The model that ours was before it was adapted."""
    copy = type(model)(model.config).eval()
    found = dict(model.named_parameters())
    copy.load_state_dict({name: found[name].detach() for name in copy.state_dict()})
    return copy


def batch_of(model: Model) -> tuple[Tensor, ...]:
    if isinstance(model, T5):
        return random_batch(model.config, [7, 3, 12], 6)
    return (torch.tensor(ragged([9, 9, 9], model.config.vocab_size)),)


def their_logits(twin, model: Model) -> Tensor:
    if isinstance(model, T5):
        return hf_logits(twin, *batch_of(model))
    return twin(input_ids=batch_of(model)[0]).logits


def close(found: Tensor, expected: Tensor) -> bool:
    return bool((found - expected).abs().max() <= 1e-5 * expected.abs().max())


# -- peft -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_peft_reads_our_adapters_and_has_our_logits_and_gradients(name, tmp_path):
    ours = adapted(name)
    save_adapters(ours, tmp_path, Path("somewhere"))
    theirs = peft.PeftModel.from_pretrained(twin_of(ours), tmp_path, is_trainable=True).eval()

    logits, their = ours(*batch_of(ours)), their_logits(theirs, ours)
    assert close(logits, their)
    assert not close(plain_copy(ours)(*batch_of(ours)), their)  # the adapters make a difference
    logits.square().mean().backward()
    their.square().mean().backward()
    names = dict(weights.mapping_for(ours.config).names(ours.config))
    their_parameters = dict(theirs.named_parameters())
    assert len(adapters(ours)) == sum("lora_A" in key for key in their_parameters)
    for layer_name, layer in adapters(ours).items():
        theirs_name = f"base_model.model.{names[f'{layer_name}.weight'].removesuffix('.weight')}"
        for part, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B)):
            twin_parameter = their_parameters[f"{theirs_name}.{part}.default.weight"]
            assert torch.equal(parameter, twin_parameter)
            assert close(parameter.grad, twin_parameter.grad), (layer_name, part)
    assert all(weight.grad is None for key, weight in ours.named_parameters() if "lora" not in key)


@pytest.mark.parametrize("name", NAMES)
def test_merged_weights_are_pefts(name, tmp_path):
    ours = adapted(name)
    save_model(plain_copy(ours), tmp_path / "start", [])
    save_adapters(ours, tmp_path / "merged" / "adapter", tmp_path / "start")
    save_merged(ours, tmp_path / "merged", start=tmp_path / "start", tokenizer_files=[])

    merged = load_model(tmp_path / "merged")
    theirs = peft.PeftModel.from_pretrained(twin_of(ours), tmp_path / "merged" / "adapter").merge_and_unload()
    their_weights = dict(theirs.named_parameters())
    for our_name, their_name in weights.mapping_for(ours.config).names(ours.config):
        assert close(merged.get_parameter(our_name), their_weights[their_name]), our_name
    assert close(merged(*batch_of(ours)), ours(*batch_of(ours)))
    assert {type(module) for module in merged.modules()} == {type(module) for module in plain(name).modules()}

    # transformers, with peft installed, takes the directory for the merged model and not for an adapter.
    auto = transformers.AutoModelForCausalLM if isinstance(ours, Llama) else transformers.AutoModelForSeq2SeqLM
    read = auto.from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
    assert not isinstance(read, peft.PeftModel) and not any("lora" in key for key, _ in read.named_parameters())
    assert close(merged(*batch_of(ours)), their_logits(read, ours))


@pytest.mark.parametrize("name", NAMES)
def test_peft_writes_the_files_that_we_write(name, tmp_path):
    ours = adapted(name)
    save_adapters(ours, tmp_path / "ours", Path("somewhere"))
    content = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    config = peft.LoraConfig(
        task_type=content["task_type"], r=RANK, lora_alpha=ALPHA, target_modules=content["target_modules"]
    )
    theirs = peft.get_peft_model(twin_of(ours), config)
    theirs.save_pretrained(tmp_path / "theirs")
    expected = load_file(tmp_path / "theirs" / "adapter_model.safetensors")
    found = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    assert {key: (value.shape, value.dtype) for key, value in found.items()} == {
        key: (value.shape, value.dtype) for key, value in expected.items()
    }
    their_content = json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())
    for key, value in content.items():
        if key != "base_model_name_or_path":
            their_value = their_content[key]
            assert value == (sorted(their_value) if isinstance(their_value, list) else their_value), key
    # A is drawn from the same distribution: both lie within ±1/√D, and come near its ends.
    for key in (key for key in found if "lora_A" in key):
        for a_MD in (found[key], expected[key]):
            assert 0.7 < a_MD.abs().max() * a_MD.shape[1] ** 0.5 <= 1


# -- before a training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_fresh_adapters_change_nothing_bit_for_bit(name):
    model = plain(name)
    before = model(*batch_of(model))
    random_state = torch.get_rng_state()
    add_adapters(model, rank=RANK, alpha=ALPHA, seed=4)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(model(*batch_of(model)), before)
    assert not model.training


@pytest.mark.parametrize("name", NAMES)
def test_all_linear_layers_but_the_head_have_an_adapter(name):
    model = adapted(name)
    linear = {key for key, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert {*adapters(model)} == linear - {"head"}
    trained = {key: weight for key, weight in model.named_parameters() if weight.requires_grad}
    assert {key.rpartition(".")[2] for key in trained} == {"lora_A", "lora_B"}
    n_trained = sum(weight.numel() for weight in trained.values())
    assert n_trained == n_adapter_parameters(plain(name), RANK) == n_adapter_parameters(model, RANK)
    assert n_parameters(model) == n_parameters(plain(name)) + n_trained


def test_adapters_depend_on_their_seed_alone():
    def matrices(seed: int) -> list[Tensor]:
        model = plain("grouped")
        torch.manual_seed(seed + 100)
        add_adapters(model, rank=RANK, alpha=ALPHA, seed=7 if seed < 2 else 8)
        assert all(not layer.lora_B.any() for layer in adapters(model).values())
        return [layer.lora_A.detach() for layer in adapters(model).values()]

    first, again, other = matrices(0), matrices(1), matrices(2)
    assert all(map(torch.equal, first, again)) and not any(map(torch.equal, first, other))
    same_shape = [a_MD for a_MD in first if a_MD.shape == first[0].shape]
    assert len(same_shape) > 2 and not any(torch.equal(same_shape[0], a_MD) for a_MD in same_shape[1:])


def test_a_model_without_memory_takes_adapters():
    model = empty_model(LLAMA_SHAPES["grouped"])
    add_adapters(model, rank=RANK, alpha=ALPHA, seed=0)
    assert {weight.device.type for weight in model.parameters()} == {"meta"}


def test_a_second_set_of_adapters_is_refused():
    with pytest.raises(ValueError, match=r"encoder\.layers\.0\.attention\.query has an adapter already"):
        add_adapters(adapted("gated-untied"), rank=RANK, alpha=ALPHA, seed=0)


def test_an_adapted_model_is_not_saved_without_its_adapters(tmp_path):
    with pytest.raises(ValueError, match=r"key\.lora_A has no name in a Hugging Face directory"):
        save_model(adapted("grouped"), tmp_path / "new", [])
    assert not (tmp_path / "new").exists()


# -- training ---------------------------------------------------------------------------------------------------------


def tiny(family: str) -> Model:
    torch.manual_seed(0)
    if family == "t5":
        return T5(T5Config(30, 16, 8, 24, 2, 1, 1, dropout=0.0)).initialise()
    return Llama(LlamaConfig(30, 16, 24, 1, n_heads=4, n_kv_heads=2, d_head=4)).initialise()


def examples(n: int = 6, seed: int = 1) -> list[TokenizedExample]:
    generator = Random(seed)
    rows = [[generator.randrange(2, 30) for _ in range(8)] for _ in range(n)]
    return [TokenizedExample(tuple(row[:3]), (*row[3:], 1)) for row in rows]


def pairs() -> list[PreferencePair]:
    return [
        PreferencePair(chosen, replace(rejected, prompt_ids=chosen.prompt_ids))
        for chosen, rejected in zip(examples(), examples(seed=2), strict=True)
    ]


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_adapters_of_full_rank_learn_what_full_fine_tuning_learns(family):
    """Fine-tuning of the same matrices as they are; adapters of rank 1 do not get there."""
    data = examples()
    settings = SFTSettings(30, 6, Schedule(2e-2, warmup=0.0, weight_decay=0.0))

    def loss_after(rank: int | None) -> float:
        model = tiny(family)
        if rank is None:
            model.requires_grad_(False)
            for _, layer in adapted_layers(model):
                layer.weight.requires_grad_(True)
        else:
            add_adapters(model, rank=rank, alpha=2.0 * rank, seed=0)
        train_sft(model, data, settings)
        return loss_of(model, data)

    full, of_full_rank, of_rank_one = loss_after(None), loss_after(24), loss_after(1)
    assert of_full_rank < 1.05 * full < 1.1
    assert of_rank_one > 2 * full


def loss_of(model: Model, data: list[TokenizedExample]) -> float:
    loss = sft_gradients(model, data, 1000).item()
    model.zero_grad()
    return loss


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family", ["t5", "llama"])
def test_dpo_begins_at_ln_2_against_the_model_without_adapters(family, dtype, tmp_path):
    weights_dtype = torch.float32 if dtype is None else dtype
    model = tiny(family).to(weights_dtype)
    reference_P2 = reference_log_probabilities(model, pairs(), micro_batch_tokens=200, dtype=dtype)
    add_adapters(model, rank=RANK, alpha=ALPHA, seed=0)
    assert torch.equal(reference_log_probabilities(model, pairs(), micro_batch_tokens=200, dtype=dtype), reference_P2)
    settings = DPOSettings(5, 6, Schedule(1e-2), beta=0.5, micro_batch_tokens=200, dtype=dtype)
    train_dpo(model, pairs(), reference_P2, settings, log_path=tmp_path / "log.jsonl")
    steps = list(read_log(tmp_path / "log.jsonl"))
    # T5's attention on a CPU is computed in another way where there are gradients (t5.FullAttention).
    rounding = 1e-6 if dtype is None else 0.01
    assert steps[0]["loss"] == pytest.approx(math.log(2), abs=rounding)
    assert steps[0]["margin"] == pytest.approx(0, abs=2 * rounding)
    assert steps[-1]["loss"] < 0.9 * math.log(2) and steps[-1]["accuracy"] == 1


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_frozen_bf16_weights_stay_and_adapters_are_fp32(family):
    model = tiny(family).to(torch.bfloat16)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    add_adapters(model, rank=RANK, alpha=ALPHA, seed=0)
    train_sft(model, examples(), SFTSettings(20, 6, Schedule(1e-2), dtype=torch.bfloat16))
    after = dict(model.named_parameters())
    assert all(
        torch.equal(after[name], weight) and after[name].dtype == torch.bfloat16 for name, weight in before.items()
    )
    learnt = [layer.lora_B for layer in adapters(model).values()]
    assert all(b_OM.dtype == torch.float32 and b_OM.any() for b_OM in learnt)
    # fp32 of its own: numbers that bf16 does not have.
    assert any(not torch.equal(b_OM, b_OM.bfloat16().float()) for b_OM in learnt)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["gated-untied", "grouped"])
def test_activation_checkpointing_gives_the_same_gradients(name, dtype):
    """Although the first layer's input has no gradient, the embedding being frozen."""

    def gradients(is_checkpointed: bool) -> list[Tensor]:
        model = adapted(name)
        if is_checkpointed:
            enable_activation_checkpointing(model)
        model.train()
        sft_gradients(model, examples(), 1000, dtype=dtype)
        return [parameter.grad for layer in adapters(model).values() for parameter in (layer.lora_A, layer.lora_B)]

    for found, expected in zip(gradients(True), gradients(False), strict=True):
        assert expected.any() and torch.equal(found, expected)


# -- merging ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("frozen_dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_added_to_the_weights_on_the_disk_in_fp32(frozen_dtype, tmp_path, tiny_model_dir):
    """Next to a weight rounded to bf16, so small a change would be lost."""
    start = load_model(tiny_model_dir)
    model = load_model(tiny_model_dir, frozen_dtype)
    add_adapters(model, rank=RANK, alpha=ALPHA, seed=0)
    for layer in adapters(model).values():
        layer.lora_B.data.normal_(std=1e-5)
    save_merged(model, tmp_path, start=tiny_model_dir, tokenizer_files=tokenizer_files(tiny_model_dir))
    merged = dict(load_model(tmp_path).named_parameters())
    layers = adapters(model)
    for name, weight in start.named_parameters():
        layer = layers.get(name.removesuffix(".weight"))
        delta = 0.0 if layer is None else layer.delta()
        assert torch.equal(merged[name], weight + delta)
        if layer is not None:
            assert isinstance(layer, LoRALinear) and not torch.equal(merged[name], weight)
            expected = ALPHA / RANK * layer.lora_B.double() @ layer.lora_A.double()
            assert close(layer.delta().double(), expected)
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in tiny_model_dir.iterdir()}


def test_a_model_in_shards_is_merged_shard_by_shard(tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD_BYTES", 10_000)
    model = adapted("grouped")
    save_model(plain_copy(model).bfloat16(), tmp_path / "start", [])
    save_merged(model, tmp_path / "merged", start=tmp_path / "start", tokenizer_files=[])
    assert len([*(tmp_path / "merged").glob("*.safetensors")]) > len([*(tmp_path / "start").glob("*.safetensors")]) > 1
    merged, start = load_model(tmp_path / "merged"), load_model(tmp_path / "start")
    layer = adapters(model)["stack.layers.1.feed_forward.down"]
    name = "stack.layers.1.feed_forward.down.weight"
    assert torch.equal(merged.get_parameter(name), start.get_parameter(name) + layer.delta())
