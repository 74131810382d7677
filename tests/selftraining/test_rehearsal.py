"""The rehearsal of a run: the largest batches of every stage, nothing changed, and its own message without memory."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from minidpost.data import toy
from minidpost.errors import UserError
from minidpost.models.hf_config import read_config
from minidpost.models.kvcache import KVCache
from minidpost.models.layers import LanguageModel
from minidpost.models.llama import Llama, LlamaConfig
from minidpost.models.lora import adapted_layers, adapters
from minidpost.models.weights import empty_model, load_model, load_template, save_model
from minidpost.sampling import sampler
from minidpost.selftraining import rehearsal
from minidpost.selftraining.estimates import Plan
from minidpost.selftraining.presets import TINY_T5
from minidpost.selftraining.rehearsal import (
    is_worth_it,
    largest_pairs,
    largest_pairs_of_reference,
    largest_sft_batches,
    longest_lengths,
    pairs_of,
    rehearse,
)
from minidpost.selftraining.run import Data, tokenize
from minidpost.text.tokenizer import load_tokenizer
from minidpost.training import dpo, parallel, sft
from minidpost.training.batching import micro_batches
from minidpost.training.dpo import distinct_completions, own_pair_micro_batches

ROOT = Path(__file__).resolve().parents[2]
PRESET = replace(TINY_T5, micro_batch_tokens=400, slots=5, max_source=100, max_target=90, max_new_tokens=70)


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory) -> Path:
    """A checkpoint of random weights, one layer of width 16, with the bundled vocabulary."""
    tokenizer = load_tokenizer(ROOT / "weights" / "tiny-llama")
    config = LlamaConfig(tokenizer.vocab_size, 16, 24, 1, n_heads=2, n_kv_heads=1, d_head=8, dropout=0.1)
    directory = tmp_path_factory.mktemp("models") / "tiny-random-llama"
    save_model(Llama(config).initialise(), directory, tokenizer.files)
    return directory


@pytest.fixture(params=["t5", "llama"])
def plan(request, tiny_model_dir, tiny_llama_dir) -> Plan:
    base = tiny_model_dir if request.param == "t5" else tiny_llama_dir
    template = load_template(base)
    labelled = list(toy.examples("train"))[:12]
    data = Data(labelled, labelled, list(toy.examples("dev"))[:4], {}, "toy")
    return Plan(
        base=base,
        method="dpo-st",
        preset=PRESET,
        data=data,
        template=template,
        tokens=tokenize(data, template, base),
        dtype=torch.float32,
        training_dtype=torch.float32,
        device="cpu",
    )


@pytest.fixture
def always(monkeypatch):
    """The rehearsal is made, however small the model is."""
    monkeypatch.setattr(rehearsal, "is_worth_it", lambda plan, model: True)


def shape_of(plan: Plan):
    return empty_model(read_config(plan.base))


def files_of(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_rehearsal_changes_nothing(plan, always, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    files = files_of(plan.base)
    line = rehearse(plan, shape_of(plan))
    assert line is not None and line.startswith("rehearsed: training ") and "GB" in line
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    assert files_of(plan.base) == files and list(tmp_path.iterdir()) == []


def test_every_stage_is_rehearsed_with_adamws_moments(plan, always, monkeypatch, capsys):
    """What the trainings' functions are called with; before the large batches gradients and moments are there."""
    calls = []
    optimizers = []
    adamw = rehearsal.adamw

    def made(*arguments):
        optimizers.append(adamw(*arguments))
        return optimizers[-1]

    def recorded(name, function):
        def call(model, batch, *arguments, **options):
            has_gradients = all(weight.grad is not None for weight in model.parameters())
            has_moments = bool(optimizers) and len(optimizers[0].state) == len(list(model.parameters()))
            calls.append((name, len(batch), has_gradients and has_moments, model.training))
            return function(model, batch, *arguments, **options)

        return call

    monkeypatch.setattr(rehearsal, "adamw", made)
    monkeypatch.setattr(rehearsal, "sft_gradients", recorded("sft", sft.sft_gradients))
    monkeypatch.setattr(rehearsal, "dpo_gradients", recorded("dpo", dpo.dpo_gradients))
    monkeypatch.setattr(
        rehearsal, "reference_log_probabilities", recorded("reference", dpo.reference_log_probabilities)
    )
    rehearse(plan, shape_of(plan))
    large = [(name, is_training) for name, _, is_complete, is_training in calls if is_complete]
    assert large == [("sft", True), ("sft", True), ("dpo", False)]  # labelled, pseudo-labels, pairs
    assert [name for name, *_ in calls].count("reference") == 1
    assert "rehearsal: 100%| 6/6" in capsys.readouterr().err

    calls.clear()
    optimizers.clear()
    rehearse(replace(plan, method="sft"), shape_of(plan))
    assert [name for name, _, is_complete, _ in calls if is_complete] == ["sft"]
    assert "rehearsal: 100%| 3/3" in capsys.readouterr().err


def test_large_batches_are_rehearsed_beside_gradients_that_are_not_summed_yet(plan, always, monkeypatch):
    """Of several processes each holds all gradients before the last micro-batch of a step: so must the rehearsal."""
    summed = []
    monkeypatch.setattr(parallel, "sums_gradients", lambda model, now: summed.append(now))
    rehearse(plan, shape_of(plan))
    # DPO's reference and a first step; labelled, pseudo-labels, pairs: each a small micro-batch before the large one.
    assert summed == [True, True, *[False, True] * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_lora_is_rehearsed_as_it_trains(plan, always, monkeypatch, dtype):
    """Frozen weights in the precision of forward passes; gradients and moments of the adapters alone."""
    calls = []

    def gradients(model, batch, *arguments, **options):
        result = dpo.dpo_gradients(model, batch, *arguments, **options)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        frozen = [weight for weight in model.parameters() if not weight.requires_grad]
        assert all(weight.grad is not None and weight.dtype == torch.float32 for weight in trained)
        assert all(weight.grad is None and weight.dtype == dtype for weight in frozen)
        calls.append((len(trained), len(frozen)))
        return result

    def reference(model, pairs, **options):
        assert not adapters(model) and {weight.dtype for weight in model.parameters()} == {dtype}
        return dpo.reference_log_probabilities(model, pairs, **options)

    monkeypatch.setattr(rehearsal, "dpo_gradients", gradients)
    monkeypatch.setattr(rehearsal, "reference_log_probabilities", reference)
    changed = replace(plan, preset=replace(PRESET, lora_rank=3), training_dtype=dtype)
    line = rehearse(changed, shape_of(plan))
    assert line is not None and line.startswith("rehearsed: training ")
    n_layers = len(adapted_layers(shape_of(plan)))
    assert calls == [(2 * n_layers, len([*shape_of(plan).parameters()]))]


def test_without_memory_lora_is_named_where_it_may_still_be_chosen(plan, always, monkeypatch, out_of_memory):
    monkeypatch.setattr(rehearsal, "sft_gradients", out_of_memory)
    with pytest.raises(UserError, match=r"need less, and so does --lora-rank$"):
        rehearse(plan, shape_of(plan))
    with pytest.raises(UserError, match=r"--activation-checkpointing need less$"):
        rehearse(replace(plan, preset=replace(PRESET, lora_rank=3)), shape_of(plan))


def test_the_largest_batches_are_one_micro_batch_within_its_tokens(plan):
    model = shape_of(plan)
    n_source, n_target = longest_lengths(plan)
    assert n_source == max(len(prompt) for prompt in plan.tokens.prompt_ids.values() if len(prompt) <= 100)
    assert n_target == max([70, *(len(example.target_ids) for example in plan.labelled)])
    labelled, pseudo_labels = largest_sft_batches(plan, model)
    assert set(labelled) <= set(plan.labelled)
    for batch in (labelled, pseudo_labels):
        assert len(micro_batches(model.config, [[e] for e in batch], 400, "cpu")) == 1
    assert len(pseudo_labels) == 400 // (n_source + n_target)
    # No micro-batch that the first epoch has is larger than the one that is rehearsed.
    assert sum(e.n_tokens for e in labelled) >= max(e.n_tokens for e in plan.labelled)


@pytest.mark.parametrize(("n_tokens", "n_pairs", "n_prompts"), [(10_000, None, None), (400, 3, 1)])
def test_the_largest_pairs_are_one_micro_batch(plan, n_tokens, n_pairs, n_prompts):
    """Each of its own question; where all of one question exceed a micro-batch, these alone."""
    pairs = pairs_of(plan, n_tokens, n_most=32)
    pair_tokens = 2 * sum(longest_lengths(plan))
    n_pairs = n_pairs or min(32, n_tokens // pair_tokens)
    assert len(pairs) == n_pairs
    assert len({pair.chosen.prompt_ids for pair in pairs}) == (n_prompts or n_pairs)
    assert len(distinct_completions(pairs)) == 2 * n_pairs
    assert len([*own_pair_micro_batches(Llama(LlamaConfig(50, 8, 8, 1, 1, 1, 8)), pairs, n_tokens)]) == 1
    assert {len(pair.rejected.target_ids) for pair in pairs} == {longest_lengths(plan)[1]}


def test_the_reference_is_bounded_by_no_step(plan):
    """It has all pairs of the run at once: as many as its micro-batches hold, however few a step has."""
    pair_tokens = 2 * sum(longest_lengths(plan))
    small = replace(PRESET, dpo_pairs_per_step=2, micro_batch_tokens=10 * pair_tokens)
    assert len(largest_pairs(replace(plan, preset=small))) == 2
    assert len(largest_pairs_of_reference(replace(plan, preset=small))) == 10
    n_most = len(plan.data.pool) * PRESET.pairs_per_question
    large = replace(small, micro_batch_tokens=2 * n_most * pair_tokens)
    assert len(largest_pairs_of_reference(replace(plan, preset=large))) == n_most


def test_of_several_processes_each_rehearses_its_share_of_a_step(plan, monkeypatch):
    model = shape_of(plan)
    preset = replace(PRESET, micro_batch_tokens=10**6, sft_examples_per_step=8, dpo_pairs_per_step=8)
    plan = replace(plan, preset=preset)
    alone = [len(batch) for batch in largest_sft_batches(plan, model)]
    assert alone[1] == 8 and len(largest_pairs(plan)) == 8
    monkeypatch.setattr(rehearsal, "world_size", lambda: 2)
    batches = largest_sft_batches(plan, model)
    assert len(batches[0]) <= 4 and len(batches[1]) == 4
    for batch in batches:
        copies = rehearsal.once_for_every_rank(batch)
        for own in parallel.deal([[example] for example in copies], 2):
            # All of it, as different prompts: an encoder reads equal ones once.
            assert sorted(copies[i].prompt_ids for i in own) == sorted(example.prompt_ids for example in batch)
    pairs = largest_pairs(plan)
    assert len(pairs) == 2 * 6  # a rank may get two questions of three pairs
    assert len({pair.chosen.prompt_ids for pair in pairs}) == 12


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("sft_gradients", "in the rehearsal of training smaller --micro-batch-tokens .now 400. or --activation-checkp"),
        ("dpo_gradients", "in the rehearsal of training smaller --micro-batch-tokens .now 400. or --activation-checkp"),
        ("choose", "in the rehearsal of sampling fewer --slots .now 5. need less"),
    ],
)
def test_without_memory_the_knob_of_the_stage_is_named(plan, always, monkeypatch, out_of_memory, function, message):
    monkeypatch.setattr(rehearsal, function, out_of_memory)
    state = torch.get_rng_state()
    with pytest.raises(UserError, match=f"^not enough memory; {message}"):
        rehearse(plan, shape_of(plan))
    assert torch.equal(torch.get_rng_state(), state)


def test_a_decoding_step_is_made_with_all_slots_at_the_last_position(plan, monkeypatch):
    seen = []
    choose = rehearsal.choose

    def recorded(logits_BV, uniform_B, settings):
        seen.append(logits_BV.shape[0])
        assert logits_BV.isfinite().all()
        return choose(logits_BV, uniform_B, settings)

    monkeypatch.setattr(rehearsal, "choose", recorded)
    written = []
    set_lengths = KVCache.set_lengths

    def recorded_lengths(cache, row_ids, lengths):
        written.append((cache.keys_LBGSK.shape[3], list(row_ids), list(lengths)))
        set_lengths(cache, row_ids, lengths)

    monkeypatch.setattr(KVCache, "set_lengths", recorded_lengths)
    rehearsal.rehearse_sampling(plan)
    assert seen == [5]
    max_tokens, row_ids, lengths = written[-1]
    assert row_ids == [0, 1, 2, 3, 4] and lengths == [max_tokens - 1] * 5


@pytest.mark.parametrize("overlap", [False, True])
def test_the_rehearsed_cache_is_the_samplers(plan, monkeypatch, overlap):
    """With overlapping steps, as on a GPU, it has a token more."""
    shapes = []
    model = load_model(plan.base)
    new_cache = type(model).new_cache

    def recorded(model, n_rows, max_prompt, max_new):
        shapes.append((n_rows, max_prompt, max_new))
        return new_cache(model, n_rows, max_prompt, max_new)

    monkeypatch.setattr(type(model), "new_cache", recorded)
    monkeypatch.setattr(rehearsal, "overlaps", lambda device: overlap)
    rehearsal.rehearse_sampling(plan)
    evaluated = [tuple(plan.template.prompt_ids(example.question)) for example in plan.data.dev]
    requests = [sampler.Request(ids, "") for ids in [*plan.tokens.prompt_ids.values(), *evaluated]]
    settings = plan.preset.sampling(seed=0)
    next(sampler.sample(model, requests, settings, plan.template.stop_ids, overlap=overlap))
    rehearsed, sampled = shapes
    assert rehearsed == sampled
    assert rehearsed[2] == PRESET.max_new_tokens + overlap


def test_the_rehearsal_decodes_as_the_sampler_does(plan, monkeypatch):
    """With the copies of matrices that a CPU has, which are as large as the weights."""
    opened = []
    decoding = LanguageModel.decoding

    def recorded(model):
        opened.append(model)
        return decoding(model)

    monkeypatch.setattr(LanguageModel, "decoding", recorded)
    rehearsal.rehearse_sampling(plan)
    assert len(opened) == 1


def test_tiny_models_on_a_cpu_are_not_rehearsed(plan, monkeypatch):
    model = shape_of(plan)
    assert not is_worth_it(plan, model)
    assert rehearse(plan, model) is None
    assert is_worth_it(replace(plan, device="cuda"), model)  # nothing is put there
    monkeypatch.setattr(rehearsal, "MIN_PARAMETERS", 1)
    short = replace(plan, method="sft", preset=replace(PRESET, sft_epochs=1, pass_at=1))
    assert not is_worth_it(short, model)  # an epoch of twelve examples: a rehearsal would be a large part of it
    assert is_worth_it(replace(plan, preset=replace(PRESET, sft_epochs=1000)), model)


def test_a_labelled_set_that_is_too_long_is_left_to_the_first_stage(plan):
    too_long = replace(plan, preset=replace(PRESET, max_target=1), device="cuda")
    assert rehearse(too_long, shape_of(plan)) is None
