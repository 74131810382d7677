"""The presets hold the paper's numbers, and say of every number where it is from."""

import re
from dataclasses import asdict, fields, replace
from pathlib import Path

import pytest

from minidpost.selftraining import presets
from minidpost.selftraining.presets import LLAMA, METHOD_SETTINGS, METHODS, T5, TINY_LLAMA, TINY_T5, Preset, preset_for

PAPER = {  # table 5 and section 4 of arXiv 2407.18248; the floor is the published code's
    "sft_examples_per_step": 96,
    "sft_epochs": 8,
    "sft_learning_rate": 3e-4,
    "dpo_pairs_per_step": 96,
    "dpo_steps": 150,
    "dpo_learning_rate": 7e-7,
    "beta": 0.1,
    "warmup": 0.1,
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
    "label_cap": None,
    "iterations": 3,
}
OURS = {"dpo_max_epochs", "micro_batch_tokens", "activation_checkpointing", "slots"}
PAPER_LLAMA = PAPER | {  # the same table's columns for Llama, and K of its main results
    "sft_examples_per_step": 128,
    "sft_epochs": 2,
    "sft_learning_rate": 2e-5,
    "dpo_pairs_per_step": 128,
    "dpo_steps": 100,
    "dpo_learning_rate": 3e-7,
    "warmup": 0.03,
    "max_source": 256,
    "max_target": 384,
    "samples": 10,
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


@pytest.mark.parametrize("model", ["flan-t5-small", "flan-t5-base", "flan-t5-large", "t5-large", "some/directory"])
def test_other_models_get_their_familys_recipe(model):
    assert preset_for(model, "t5", "dpo-st") == preset_for(model, "t5", "st") == T5
    assert preset_for(model, "llama", "dpo-st") == LLAMA


def test_bundled_models_have_presets_of_their_own():
    assert preset_for("tiny-t5", "t5", "dpo-st") == TINY_T5 != T5
    assert preset_for("tiny-llama", "llama", "dpo-st") == TINY_LLAMA != LLAMA


def test_the_largest_t5_differs_in_memory_alone():
    assert preset_for("flan-t5-xl", "t5", "st") == replace(T5, activation_checkpointing=True)


def test_methods_change_what_their_papers_say():
    assert METHODS == ("sft", "st", "dpo-st", "rft", "rest-em")
    assert preset_for("flan-t5-base", "t5", "sft").iterations == 0
    rft = preset_for("flan-t5-base", "t5", "rft")
    assert (rft.iterations, rft.samples, rft.temperature, rft.label_cap) == (1, 100, 0.7, None)
    rest_em = preset_for("flan-t5-base", "t5", "rest-em")
    assert (rest_em.samples, rest_em.temperature, rest_em.top_k, rest_em.label_cap) == (32, 0.7, 40, 10)
    assert METHOD_SETTINGS["st"] == METHOD_SETTINGS["dpo-st"] == {}
