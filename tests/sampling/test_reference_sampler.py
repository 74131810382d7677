"""The fast sampler equals the one of docs/walkthrough.md: one row, no cache, the whole decoder for each token."""

from dataclasses import replace

import pytest
from sampling.reference_sampler import sample_one

from minidpost.data.datasets import load
from minidpost.models.hub import find_model
from minidpost.models.weights import load_model, load_template
from minidpost.sampling.generate import generate
from minidpost.sampling.token_choice import SamplingSettings

N_QUESTIONS = 4


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_fast_sampler_equals_the_plain_one(temperature):
    directory = find_model("tiny-t5-sft")
    model, template = load_model(directory).double(), load_template(directory)
    questions = [example.question for example in load("toy", "dev")[:N_QUESTIONS]]
    settings = SamplingSettings(temperature, max_new_tokens=60, slots=3, seed=5)
    n_samples = 2 if temperature else 1
    forced_anywhere = False
    for sample in generate(model, template, questions, settings, n_samples=n_samples):
        question = questions[sample.example_index]
        token_ids, forced = sample_one(model, template, question, replace(settings, slots=1), sample.sample_index)
        assert (sample.token_ids, sample.forced) == (token_ids, forced)
        forced_anywhere |= any(forced)
    assert forced_anywhere
