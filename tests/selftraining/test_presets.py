"""The presets hold the paper's numbers, say of every number where it is from, and are found by the model itself."""

import re
import shutil
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest
import torch

from minidpost.errors import UserError
from minidpost.models.llama import LlamaConfig
from minidpost.selftraining import presets
from minidpost.selftraining.methods import METHODS
from minidpost.selftraining.presets import (
    LLAMA,
    MEDIUM_LLAMA,
    SMALL_LLAMA,
    SMALLEST_LLAMA,
    T5,
    TINY_LLAMA,
    TINY_T5,
    Preset,
    for_lora,
    preset_for,
    preset_of,
)

WEIGHTS = Path(__file__).resolve().parents[2] / "weights"

PAPER = {  # table 5, sections 4 and 5 of arXiv 2407.18248; where they are silent, the published code
    "sft_examples_per_step": 96,
    "sft_epochs": 8,
    "sft_learning_rate": 3e-4,
    "dpo_pairs_per_step": 96,
    "dpo_steps": 150,
    "dpo_learning_rate": 7e-7,
    "beta": 0.1,
    "learning_rate_warmup": 0.1,
    "learning_rate_floor": 0.1,
    "weight_decay": 0.01,
    "max_grad_norm": 1.0,
    "max_source": 200,
    "max_target": 300,
    "samples": 3,
    "dpo_samples": 5,
    "temperature": 0.7,
    "top_k": 0,
    "max_new_tokens": 300,
    "top_p": 1.0,
    "sft_dropout": None,
    "max_similarity": 0.7,
    "pairs_per_question": 3,
    "label_percentile": 90,
    "label_cap": None,
    "iterations": 3,
    "patience": None,
    "warm_up": True,
    "pass_at": 10,
    "pass_questions": None,
    "test_questions": None,
}
OURS = {"dpo_max_epochs", "lora_rank", "lora_alpha", "micro_batch_tokens", "activation_checkpointing", "slots"}
PAPER_LLAMA = PAPER | {  # the same table's columns for Llama, and K of its main results
    "sft_examples_per_step": 128,
    "sft_epochs": 2,
    "sft_learning_rate": 2e-5,
    "dpo_pairs_per_step": 128,
    "dpo_steps": 100,
    "dpo_learning_rate": 3e-7,
    "learning_rate_warmup": 0.03,
    "max_source": 256,
    "max_target": 384,
    "samples": 10,
    "sft_dropout": 0.1,
}


def test_the_default_is_the_papers_recipe():
    assert {name: value for name, value in asdict(T5).items() if name not in OURS} == PAPER
    assert {name: value for name, value in asdict(LLAMA).items() if name not in OURS} == PAPER_LLAMA


def test_every_number_is_tagged():
    tags = {}
    for line in Path(presets.__file__).read_text(encoding="utf-8").splitlines():
        if match := re.match(r"    (\w+): .* = .*?# \[(paper|code|ours)\]", line):
            tags[match[1]] = match[2]
    assert tags.keys() == {field.name for field in fields(Preset)}
    assert {name for name, tag in tags.items() if tag == "ours"} == OURS


@pytest.mark.parametrize("model", ["flan-t5-small", "flan-t5-base", "flan-t5-large", "t5-large"])
def test_t5_has_the_papers_recipe(shared, model):
    directory = shared / "configs" / model
    assert preset_for(directory, "dpo-st") == preset_for(directory, "st") == T5


@pytest.mark.parametrize("model", ["llama-7b", "Llama-2-7b-hf", "Meta-Llama-3-8B"])
def test_llama_has_the_papers_recipe(shared, model):
    assert preset_for(shared / "configs" / model, "dpo-st") == LLAMA


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("smollm2-135m", SMALLEST_LLAMA),
        ("smollm2-360m", SMALL_LLAMA),
        ("tinyllama-1.1b", MEDIUM_LLAMA),
        ("Llama-3.2-1B", MEDIUM_LLAMA),
        ("smollm2-1.7b", MEDIUM_LLAMA),
        ("qwen2.5-0.5b", SMALL_LLAMA),
        ("qwen3-0.6b", SMALL_LLAMA),
        ("qwen2.5-1.5b", MEDIUM_LLAMA),
    ],
)
def test_smaller_decoder_only_models_have_presets_by_size(shared, model, expected):
    assert preset_for(shared / "configs" / model, "dpo-st") == expected


def test_a_shape_between_has_its_preset_by_size():
    """Llama-3.2-3B, whose config.json is not at hand."""
    shape = LlamaConfig(128256, 3072, 8192, 28, n_heads=24, n_kv_heads=8, d_head=128, tied=True)
    assert preset_of(shape, "dpo-st") == MEDIUM_LLAMA


def test_smaller_models_learn_in_larger_and_more_steps():
    by_size = [SMALLEST_LLAMA, SMALL_LLAMA, MEDIUM_LLAMA, LLAMA]
    for name in ("sft_learning_rate", "dpo_learning_rate"):
        rates = [vars(preset)[name] for preset in by_size]
        assert rates == sorted(rates, reverse=True) and rates[2] > rates[3]
    for name in ("sft_examples_per_step", "dpo_pairs_per_step"):
        sizes = [vars(preset)[name] for preset in by_size]
        assert sizes == sorted(sizes) and sizes[2] < sizes[3]
    assert [preset.activation_checkpointing for preset in by_size] == [False, False, True, True]


def test_models_of_less_than_a_million_weights_have_presets_of_their_own():
    assert preset_for(WEIGHTS / "tiny-t5", "dpo-st") == TINY_T5 != T5
    assert preset_for(WEIGHTS / "tiny-llama", "dpo-st") == TINY_LLAMA != LLAMA


def test_the_largest_t5_differs_in_memory_alone(shared):
    assert preset_for(shared / "configs" / "flan-t5-xl", "st") == replace(T5, activation_checkpointing=True)


def test_a_preset_does_not_depend_on_the_models_name(tmp_path, shared, monkeypatch):
    monkeypatch.chdir(WEIGHTS.parent)
    for path in ("weights/tiny-t5", "./weights/tiny-t5", "weights/../weights/tiny-t5/", WEIGHTS / "tiny-t5-sft"):
        assert preset_for(path, "dpo-st") == TINY_T5
    shutil.copytree(WEIGHTS / "tiny-t5", tmp_path / "flan-t5-xl")  # whose own preset differs
    assert preset_for(tmp_path / "flan-t5-xl", "dpo-st") == TINY_T5
    shutil.copytree(shared / "configs" / "flan-t5-xl", tmp_path / "tiny-t5")
    assert preset_for(tmp_path / "tiny-t5", "dpo-st").activation_checkpointing


def test_a_directory_without_a_model_is_a_users_error(tmp_path):
    with pytest.raises(UserError, match=r"no config\.json here"):
        preset_for(tmp_path, "dpo-st")
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}', encoding="utf-8")
    with pytest.raises(UserError, match="model_type 'mamba' is not known"):
        preset_for(tmp_path, "dpo-st")


def test_methods_change_what_their_papers_say(shared):
    model = shared / "configs" / "flan-t5-base"
    assert [*METHODS] == ["sft", "st", "dpo-st", "rft", "rest-em"]
    assert preset_for(model, "sft") == preset_for(model, "st") == preset_for(model, "dpo-st") == T5
    assert preset_for(model, "rft") == replace(T5, iterations=1, samples=100, label_percentile=None)
    rest_em = replace(T5, samples=32, top_k=40, label_cap=10, label_percentile=None)
    assert preset_for(model, "rest-em") == rest_em
    assert (rest_em.temperature, rest_em.iterations) == (0.7, 3)


def test_methods_differ_by_their_rules_alone():
    assert {name for name, method in METHODS.items() if not method.iterates} == {"sft"}
    assert {name for name, method in METHODS.items() if method.has_dpo} == {"dpo-st"}
    assert replace(METHODS["dpo-st"], has_dpo=False) == replace(METHODS["sft"], iterates=True) == METHODS["st"]
    assert {name for name, method in METHODS.items() if not method.has_gold} == {"rest-em"}
    assert {name for name, method in METHODS.items() if not method.merges_iterations} == {"rest-em"}
    assert {name for name, method in METHODS.items() if method.checks_calculations} == {"rft"}
    assert [METHODS[name].duplicates for name in ("st", "rft", "rest-em")] == ["similarity", "equations", "tokens"]


def test_lora_has_ten_times_the_learning_rates_within_a_bound():
    for preset in (T5, LLAMA, MEDIUM_LLAMA, SMALL_LLAMA, SMALLEST_LLAMA, TINY_T5, TINY_LLAMA):
        sft_rate = 6e-3 if preset.sft_learning_rate >= 1e-3 else 10 * preset.sft_learning_rate
        rates = {"sft_learning_rate": sft_rate, "dpo_learning_rate": 10 * preset.dpo_learning_rate}
        assert for_lora(preset) == replace(preset, **rates)
        assert (preset.lora_rank, preset.lora_alpha) == (None, None)


def test_frozen_weights_have_the_precision_of_forward_passes():
    frozen = replace(T5, lora_rank=4)
    for dtype in (torch.float32, torch.bfloat16):
        assert frozen.weights_dtype("cuda", dtype) == frozen.weights_dtype("cpu", dtype) == dtype
        assert T5.weights_dtype("cuda", dtype) == torch.float32  # they are trained
    assert frozen.weights_dtype("cpu") == torch.float32


def test_the_precision_of_training_reaches_both_trainings():
    assert T5.sft(1).dtype is None and T5.dpo(10, 1).dtype is None
    assert T5.sft(1, torch.bfloat16).dtype == T5.dpo(10, 1, torch.bfloat16).dtype == torch.bfloat16
