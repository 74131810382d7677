"""Questions to graded completions: what the sampler is asked, and what becomes of its rows."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minidpost.errors import UserError
from minidpost.models.hf_config import read_config
from minidpost.models.weights import check_vocabulary, empty_model, load_model
from minidpost.sampling import generate as generation
from minidpost.sampling.generate import MAX_PROMPT_TOKENS, Sample, check_prompts, generate, shared_chunk_size
from minidpost.sampling.sampler import Request, Row, SamplingSettings

QUESTIONS = ["Tom has 3 apples. How many?", "Mia buys 2 bags of 5 pens each. How many pens does she have now?", "How?"]
SAMPLED = SamplingSettings(temperature=1.0, max_new_tokens=12, slots=4, seed=3)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    return load_model(tiny_model_dir)


def test_every_sample_comes_once_with_its_text(model, tiny_template):
    samples = list(generate(model, tiny_template, QUESTIONS, SAMPLED, n_samples=3))
    assert sorted((s.example_index, s.sample_index) for s in samples) == [(i, k) for i in range(3) for k in range(3)]
    for sample in samples:
        assert sample.completion == tiny_template.decode(sample.token_ids)
        assert len(sample.forced) == len(sample.token_ids) <= 12
    assert len({tuple(sample.token_ids) for sample in samples}) == 9


def test_a_completion_belongs_to_its_question_and_sample_alone(model, tiny_template):
    def completions(questions, **changes):
        settings = SamplingSettings(1.0, max_new_tokens=12, **changes)
        samples = generate(model, tiny_template, questions, settings, n_samples=2)
        return {(questions[s.example_index], s.sample_index): s.token_ids for s in samples}

    together = completions(QUESTIONS, slots=5, seed=3)
    assert completions(QUESTIONS[::-1], slots=1, seed=3) == together
    alone = completions(QUESTIONS[1:2], slots=64, seed=3)
    assert alone == {key: together[key] for key in alone}
    assert completions(QUESTIONS, slots=5, seed=4) != together


@pytest.fixture
def requested(monkeypatch):
    """Replaces the sampler: takes down what it is asked, and answers every request with `#### <its index>`."""
    asked = {}

    def sample(
        model,
        requests,
        settings,
        eos_id,
        *,
        new_override=None,
        first_chunk=0,
        chunk_size=None,
        chunk_indices=None,
        on_token=None,
    ):
        assert chunk_indices is None  # one process works off all chunks
        asked.update(model=model, requests=requests, settings=settings, eos_id=eos_id, new_override=new_override)
        asked.update(first_chunk=first_chunk)
        for index in reversed(range(len(requests))):
            ids = asked["template"].target_ids(f"#### {index}")
            yield Row(index, requests[index], ids, [False] * len(ids), "stop")

    monkeypatch.setattr(generation, "sample", sample)
    return asked


def test_what_the_sampler_is_asked(requested, model, tiny_template):
    requested["template"] = tiny_template
    samples = list(generate(model, tiny_template, QUESTIONS[:2], SAMPLED, n_samples=2))
    prompts = [tuple(tiny_template.prompt_ids(question)) for question in QUESTIONS[:2]]
    assert requested["requests"] == [Request(prompts[i], QUESTIONS[i], k) for i in range(2) for k in range(2)]
    assert (requested["model"], requested["settings"]) == (model, SAMPLED)
    assert requested["eos_id"] == {tiny_template.eos_id} == {prompts[0][-1]}
    assert [(sample.example_index, sample.sample_index, sample.completion) for sample in samples] == [
        (1, 1, "#### 3"),
        (1, 0, "#### 2"),
        (0, 1, "#### 1"),
        (0, 0, "#### 0"),
    ]


def test_the_calculator_can_be_left_out(requested, model, tiny_template):
    requested["template"] = tiny_template
    list(generate(model, tiny_template, QUESTIONS, SAMPLED))
    assert requested["new_override"] == tiny_template.new_calculator
    list(generate(model, tiny_template, QUESTIONS, SAMPLED, calculator=False))
    assert requested["new_override"] is None


def test_progress_shows_speed_and_accuracy(requested, model, tiny_template, capsys):
    requested["template"] = tiny_template
    list(generate(model, tiny_template, QUESTIONS, SAMPLED, answers=["0", "1", "7"], label="dev"))
    shown = capsys.readouterr().err
    assert "dev: 100%" in shown
    assert "3/3" in shown
    assert "tok_s=" in shown
    assert "right=66.7%" in shown
    list(generate(model, tiny_template, QUESTIONS, SAMPLED))
    assert "right=" not in capsys.readouterr().err


def test_a_sample_is_graded_where_answers_are_given(requested, model, tiny_template):
    requested["template"] = tiny_template
    correct, wrong = sorted(
        generate(model, tiny_template, QUESTIONS[:2], SAMPLED, answers=["0", "7"]), key=lambda s: s.example_index
    )
    ids = tiny_template.target_ids("#### 0")
    assert correct == Sample(0, 0, QUESTIONS[0], "0", "#### 0", True, ids, [False] * len(ids), "stop")
    assert (wrong.answer, wrong.completion, wrong.is_correct) == ("7", "#### 1", False)
    ungraded = next(generate(model, tiny_template, QUESTIONS[:1], SAMPLED))
    assert (ungraded.answer, ungraded.is_correct) == (None, None)


class Parameters:
    """A model of which nothing but its size and its device is known."""

    def __init__(self, n_parameters: int, device: str):
        self.weight = SimpleNamespace(numel=lambda: n_parameters, device=torch.device(device))

    def parameters(self) -> Iterator[SimpleNamespace]:
        yield self.weight


def test_several_gpus_have_equally_many_chunks(monkeypatch):
    def chunks(n_requests: int, n_processes: int, n_slots: int = 256, device: str = "cuda") -> tuple[int, int]:
        monkeypatch.setattr(generation, "world_size", lambda: n_processes)
        size = shared_chunk_size(Parameters(10**6, device), n_slots, n_requests)
        return size, -(-n_requests // size)

    assert chunks(1319, 1) == (4096, 1)
    assert chunks(1319, 4) == (330, 4)
    assert chunks(1319, 8) == (256, 6)  # no fewer than there are slots
    assert chunks(67_050, 8) == (2794, 24)  # not 17 of up to 4,096, of which one would come alone
    assert chunks(0, 8) == (256, 0)
    for n_processes in (1, 2, 4):
        assert chunks(1319, n_processes, device="cpu") == (1024, 2)


@pytest.mark.parametrize(("n_slots", "size"), [(1, 8), (32, 256), (64, 512), (128, 1024), (512, 1024)])
def test_on_a_cpu_a_kill_loses_little_of_a_large_model(tiny_model_dir, monkeypatch, n_slots, size):
    """And as little with any number of processes, so that samples are the same bytes."""
    config = read_config(tiny_model_dir)
    large = empty_model(replace(config, vocab_size=20_000_000 // config.d_model))  # on the meta device
    for n_processes in (1, 3):
        monkeypatch.setattr(generation, "world_size", lambda n=n_processes: n)
        assert shared_chunk_size(large, n_slots, 10_000) == size
        assert shared_chunk_size(Parameters(20_000_000, "cpu"), n_slots, 10_000) == size
        for small in (empty_model(config), Parameters(19_999_999, "cpu")):
            assert shared_chunk_size(small, n_slots, 10_000) == 1024


@pytest.mark.parametrize("n_parameters", [10**6, 10**9])
def test_on_a_gpu_chunks_grow_with_slots_whatever_the_model(n_parameters):
    sizes = {n_slots: shared_chunk_size(Parameters(n_parameters, "cuda"), n_slots, 10**6) for n_slots in (1, 64, 256)}
    assert sizes == {1: 1024, 64: 1024, 256: 4096}


def test_no_questions_no_completions(model, tiny_template):
    assert list(generate(model, tiny_template, [], SAMPLED)) == []


def test_empty_questions_are_named(model, tiny_template):
    with pytest.raises(UserError, match="question 2 is empty"):
        list(generate(model, tiny_template, ["How?", " \n"], SAMPLED))


def test_a_question_may_be_as_long_as_the_limit_and_no_longer():
    check_prompts(["How?"], [(0,) * MAX_PROMPT_TOKENS])
    with pytest.raises(UserError) as error:
        check_prompts(["How?", "And how then? " * 9], [(0,), (0,) * (MAX_PROMPT_TOKENS + 1)])
    assert "question 2 ('And how then?" in str(error.value)
    assert "has 1,025 tokens; the limit is 1,024" in str(error.value)
    assert len(str(error.value)) < 150


@pytest.mark.parametrize(
    ("n_pieces", "eos_id", "complaint"),
    [(101, 1, "the tokenizer has 101 pieces, the model 100 embeddings"), (99, None, "the tokenizer has no end token")],
)
def test_a_tokenizer_that_does_not_fit_is_refused(n_pieces, eos_id, complaint):
    def tokenizer(n_pieces, eos_id):
        return SimpleNamespace(vocab_size=n_pieces, n_embeddings_needed=n_pieces, eos_id=eos_id)

    check_vocabulary(tokenizer(100, 1), 100, Path("model"))
    with pytest.raises(UserError, match=f"model: {complaint}"):
        check_vocabulary(tokenizer(n_pieces, eos_id), 100, Path("model"))
