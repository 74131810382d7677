"""The presets hold the paper's numbers, and say of every number where it is from."""

import re
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from minidpost import presets
from minidpost.presets import METHOD_SETTINGS, METHODS, T5, TINY_T5, Preset, preset_for

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
OURS = {"dpo_max_epochs", "micro_batch_tokens", "slots"}


def test_the_default_is_the_papers_recipe():
    assert {name: value for name, value in asdict(T5).items() if name not in OURS} == PAPER


def test_every_number_says_where_it_is_from():
    tags = {}
    for line in Path(presets.__file__).read_text(encoding="utf-8").splitlines():
        if match := re.match(r"    (\w+): .* = .*?# \[(paper|code|ours)\]", line):
            tags[match[1]] = match[2]
    assert tags.keys() == {field.name for field in fields(Preset)}
    assert {name for name, tag in tags.items() if tag == "ours"} == OURS


@pytest.mark.parametrize("model", ["flan-t5-small", "flan-t5-base", "flan-t5-large", "t5-large", "some/directory"])
def test_any_other_t5_gets_the_papers_recipe(model):
    assert preset_for(model, "dpo-st") == preset_for(model, "st") == T5


def test_the_embedded_model_has_a_preset_of_its_own():
    assert preset_for("tiny-t5", "dpo-st") == TINY_T5 != T5


def test_methods_change_what_their_papers_say():
    assert METHODS == ("sft", "st", "dpo-st", "rft", "rest-em")
    assert preset_for("flan-t5-base", "sft").iterations == 0
    rft = preset_for("flan-t5-base", "rft")
    assert (rft.iterations, rft.samples, rft.temperature, rft.label_cap) == (1, 100, 0.7, None)
    rest_em = preset_for("flan-t5-base", "rest-em")
    assert (rest_em.samples, rest_em.temperature, rest_em.top_k, rest_em.label_cap) == (32, 0.7, 40, 10)
    assert METHOD_SETTINGS["st"] == METHOD_SETTINGS["dpo-st"] == {}
