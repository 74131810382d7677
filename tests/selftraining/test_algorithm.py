"""The methods step by step: what is sampled from, selected, trained on and repeated, with a model of one layer.

Where the data rules are at stake the samples are scripted and dev accuracies given; where files are compared everything
is real.
"""

import json
import math
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from minidpost.data.example import Example
from minidpost.errors import UserError
from minidpost.models.llama import Llama, LlamaConfig
from minidpost.models.weights import load_model, load_template, save_model
from minidpost.sampling import sampler
from minidpost.sampling.generate import Sample
from minidpost.selftraining import evaluation as evaluation_module
from minidpost.selftraining import steps
from minidpost.selftraining.algorithm import self_train
from minidpost.selftraining.estimates import forward_flops, model_size, training_flops
from minidpost.selftraining.evaluation import SampledScores, wilson
from minidpost.selftraining.methods import METHODS
from minidpost.selftraining.presets import Preset
from minidpost.selftraining.report import collect_results, write_report
from minidpost.selftraining.run import Data, Run, tokenize
from minidpost.selftraining.run_directory import RunDirectory
from minidpost.selftraining.selection import Candidates
from minidpost.storage import read_jsonl
from minidpost.text.grading import is_correct
from minidpost.text.templates import T5Template
from minidpost.training import dpo, sft
from minidpost.training.batching import TokenizedExample
from minidpost.training.optim import apply_step, read_log

TOM, MIA, BEN = (
    Example("Tom has 3 apples and buys 4. How many?", "7", "Tom has <<3+4=7>>7 apples.\n#### 7"),
    Example("Mia has 9 pens and loses 5. How many?", "4", "Mia keeps <<9-5=4>>4 pens.\n#### 4"),
    Example("Ben fills 2 bags with 6 eggs. How many?", "12"),
)
DEV = [Example("Eva has 1 coin and finds 1. How many?", "2"), Example("Max has 5 cards. How many?", "5")]
DATA = Data([TOM, MIA], [TOM, MIA, BEN], DEV, {"toy/test": DEV[:1]}, "toy")
PRESET = Preset(
    sft_epochs=1,
    sft_examples_per_step=2,
    sft_learning_rate=1e-2,
    dpo_steps=2,
    dpo_pairs_per_step=4,
    dpo_learning_rate=1e-3,
    max_new_tokens=12,
    samples=2,
    dpo_samples=3,
    slots=40,
    iterations=1,
)


@pytest.fixture
def new_run(tmp_path, tiny_model_dir, tiny_template) -> Callable[..., Run]:
    """Begins, or continues, a run in a directory of this name."""

    def begin(method="dpo-st", name="run", data=DATA, seed=1, **changes) -> Run:
        return Run(
            directory=RunDirectory(tmp_path / name, {"method": method, "seed": seed}),
            base=tiny_model_dir,
            method=method,
            preset=replace(PRESET, **{**METHODS[method].settings, "samples": 2, "iterations": 1, **changes}),
            data=data,
            template=tiny_template,
            tokens=tokenize(data, tiny_template, tiny_model_dir),
            seed=seed,
        )

    return begin


@pytest.fixture
def script(monkeypatch) -> Callable:
    """Scripts the samples, by (stage, question), each a rationale or (rationale, "length"); the last one is repeated.

    Questions without a script answer `What?`. Evaluation takes the given dev accuracies, one an iteration.
    """

    def install(samples: dict[tuple[str, Example], list], accuracies=(0.1, 0.2, 0.3, 0.4)) -> None:
        by_question = {(stage, example.question): texts for (stage, example), texts in samples.items()}

        def generate(
            model,
            template,
            questions,
            settings,
            *,
            answers,
            n_samples=1,
            calculator=True,
            label="",
            first_chunk=0,
            chunk_size=None,
        ):
            for sample_index in reversed(range(n_samples)):
                for example_index, (question, answer) in enumerate(zip(questions, answers, strict=True)):
                    texts = by_question.get((label, question), ["What?"])
                    given = texts[min(sample_index, len(texts) - 1)]
                    text, finish_reason = given if isinstance(given, tuple) else (given, "stop")
                    token_ids = template.target_ids(text)
                    if finish_reason == "length":
                        token_ids = token_ids[:-1]
                    yield Sample(
                        example_index=example_index,
                        sample_index=sample_index,
                        question=question,
                        answer=answer,
                        completion=text,
                        is_correct=is_correct(text, answer),
                        token_ids=token_ids,
                        forced=[False] * len(token_ids),
                        finish_reason=finish_reason,
                    )

        def greedy_outcomes(model, template, examples, settings, *, calculator=True, label="greedy", chunks=None):
            return [accuracies[int(label.split("/")[0])]] * len(examples)

        def sampled_scores(
            model, template, examples, settings, *, pass_at=(), maj_at=(), calculator=True, label="", chunks=None
        ):
            return SampledScores(10, [1] * len(examples), {}, {k: wilson(k, 20) for k in pass_at}, {})

        monkeypatch.setattr(steps, "generate", generate)
        monkeypatch.setattr(steps, "greedy_outcomes", greedy_outcomes)
        monkeypatch.setattr(steps, "sampled_scores", sampled_scores)

    return install


def records(run: Run, name: str) -> list[dict]:
    return [record for _, record in read_jsonl(run.directory.path / name)]


def files_of(run: Run) -> dict[str, bytes]:
    """All that a run's stages wrote; steps' logs without their speed."""
    files = {}
    for path in sorted(run.directory.path.glob("iteration-*/**/*")):
        if path.name == "log.jsonl":
            steps = [{name: value for name, value in row.items() if "second" not in name} for row in read_log(path)]
            files[str(path.relative_to(run.directory.path))] = json.dumps(steps).encode()
        elif path.is_file():
            files[str(path.relative_to(run.directory.path))] = path.read_bytes()
    return files


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(directory).named_parameters())


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


# -- the stages of each method ----------------------------------------------------------------------------------------

SFT = {"sft/config.json", "sft/model.safetensors", "sft/spiece.model", "sft/log.jsonl", "evaluation.json"}
SELF_TRAINED = SFT | {"samples-sft.jsonl", "pseudo-labels.jsonl"}
DPO = {
    "dpo/config.json",
    "dpo/model.safetensors",
    "dpo/spiece.model",
    "dpo/log.jsonl",
    "samples-dpo.jsonl",
    "pairs.jsonl",
    "reference.safetensors",
}


@pytest.mark.parametrize(
    ("method", "later"),
    [
        ("sft", set()),
        ("st", SELF_TRAINED),
        ("rft", SELF_TRAINED),
        ("dpo-st", SELF_TRAINED | DPO),
        ("rest-em", SELF_TRAINED),
    ],
)
def test_the_files_of_a_method(new_run, script, method, later):
    script({("1/samples-sft", BEN): ["Ben has 12.\n#### 12"]})
    run = new_run(method, iterations=1)
    assert list(self_train(run)) == [0, *([1] if later else [])]
    expected = {f"iteration-0/{name}" for name in SFT} | {f"iteration-1/{name}" for name in later}
    assert files_of(run).keys() == expected


@pytest.mark.parametrize(
    ("method", "loaded"),
    [
        ("st", "base 0/sft  0/sft base 1/sft  1/sft base 2/sft"),
        ("dpo-st", "base 0/sft  0/sft 0/sft 0/sft 1/dpo base 1/sft 1/dpo  1/sft 1/sft 1/sft 2/dpo base 2/sft 2/dpo"),
    ],
)
def test_which_model_samples_and_which_is_trained(new_run, script, monkeypatch, tiny_model_dir, method, loaded):
    """Every fine-tuning begins at the base; the last model, or what DPO made of it, samples."""
    script({})
    calls, original = [], steps.load_model

    def load(directory, *rest, **options):
        calls.append("base" if directory == tiny_model_dir else f"{directory.parent.name[-1]}/{directory.name}")
        return original(directory, *rest, **options)

    monkeypatch.setattr(steps, "load_model", load)
    list(self_train(new_run(method, iterations=2)))
    assert calls == loaded.split()


def test_a_record_of_samples(new_run, tiny_template):
    run = new_run("st")
    list(self_train(run))
    samples = list(steps.read_samples(run.path(1) / "samples-sft.jsonl"))
    assert [(done.example_index, done.sample_index) for done in samples] == [(i, k) for i in range(3) for k in range(2)]
    for done in samples:
        example = DATA.pool[done.example_index]
        assert (done.question, done.answer) == (example.question, example.answer)
        assert done.completion == tiny_template.decode(done.token_ids)
        assert done.is_correct is is_correct(done.completion, example.answer)
        assert len(done.forced) == len(done.token_ids) <= 12
        assert done.finish_reason == ("stop" if done.token_ids[-1] == tiny_template.eos_id else "length")
    names = "example_index sample_index question answer completion is_correct token_ids forced finish_reason"
    assert [[*record] for record in records(run, "iteration-1/samples-sft.jsonl")] == [names.split()] * 6
    metadata = run.directory.stages["iteration-1/samples-sft.jsonl"]
    assert metadata["n_samples"] == 6
    assert metadata["n_correct"] == sum(done.is_correct for done in samples)


# -- preference pairs -------------------------------------------------------------------------------------------------


def test_pairs_are_gold_or_correct_against_incorrect(new_run, script, tiny_template):
    incorrect = ["Seven pens.\n#### 1", "No idea", "Mia keeps <<9-5=4>>4 pens.\n#### 5"]
    script(
        {
            ("1/samples-dpo", MIA): incorrect,
            ("1/samples-dpo", TOM): [TOM.rationale],
            ("1/samples-dpo", BEN): incorrect[:1],
        }
    )
    run = new_run()
    list(self_train(run))
    pairs = records(run, "iteration-1/pairs.jsonl")
    # Tom's samples are all correct, so none is rejected; Ben's are all incorrect, and he has no gold: none is chosen.
    assert {row["question"] for row in pairs} == {MIA.question}
    assert {row["chosen"] for row in pairs} == {tiny_template.canonical(tiny_template.target(MIA.rationale))}
    assert [row["similarity"] for row in pairs] == sorted(row["similarity"] for row in pairs)
    for row in pairs:
        assert row["answer"] == "4"
        for kind in ("chosen", "rejected"):
            assert row[kind] == tiny_template.decode(row[f"{kind}_ids"])
            assert row[f"{kind}_ids"][-1] == tiny_template.eos_id
    assert run.directory.stages["iteration-1/pairs.jsonl"]["pairs"] == len(pairs) == 3


def test_a_cut_completion_is_rejected_never_chosen(new_run, script, tiny_template):
    cut_correct, cut_incorrect = ("A cut one.\n#### 12", "length"), ("Another.\n#### 3", "length")
    whole = "Ben has 2 bags, 12 eggs.\n#### 12"
    samples = {
        ("1/samples-dpo", BEN): [cut_correct, cut_incorrect, whole],
        ("1/samples-sft", BEN): [cut_correct, whole],
    }
    script(samples)
    run = new_run()
    list(self_train(run))
    (known,) = steps.candidates(run, 1, "samples-dpo")[2:]
    prompt_ids = tuple(tiny_template.prompt_ids(BEN.question))
    correct = TokenizedExample(prompt_ids, tuple(tiny_template.target_ids(whole)))
    incorrect = TokenizedExample(prompt_ids, tuple(tiny_template.target_ids(cut_incorrect[0])[:-1]))
    assert known == Candidates(prompt_ids, None, [correct], [incorrect])
    ben = [row for row in records(run, "iteration-1/pairs.jsonl") if row["question"] == BEN.question]
    assert [(row["chosen"], row["rejected"]) for row in ben] == [(whole, cut_incorrect[0])]
    labels = [
        row["rationale"] for row in records(run, "iteration-1/pseudo-labels.jsonl") if row["question"] == BEN.question
    ]
    assert labels == [whole]


def test_dpo_has_few_epochs_on_few_pairs(new_run, script):
    script({})  # one incorrect sample a question, two gold rationales: two pairs
    run = new_run(dpo_steps=50, dpo_pairs_per_step=1, dpo_max_epochs=4)
    list(self_train(run))
    assert len(records(run, "iteration-1/pairs.jsonl")) == 2
    assert len(list(read_log(run.path(1) / "dpo/log.jsonl"))) == 8
    short = new_run(name="short", dpo_steps=3, dpo_pairs_per_step=96)
    list(self_train(short))
    assert len(list(read_log(short.path(1) / "dpo/log.jsonl"))) == 3


def test_dpo_without_pairs_changes_nothing(new_run, script, capsys):
    script({("1/samples-dpo", e): [f"#### {e.answer}"] for e in DATA.pool})
    run = new_run()
    list(self_train(run))
    assert records(run, "iteration-1/pairs.jsonl") == []
    assert equal(weights(run.path(1) / "dpo"), weights(run.path(0) / "sft"))
    assert "no preference pairs" in capsys.readouterr().out
    assert run.directory.stages["iteration-1/dpo"]["flops"] == 0


# -- pseudo-labels ----------------------------------------------------------------------------------------------------


def test_pseudo_labels_are_gold_and_correct_samples(new_run, script, tiny_template):
    correct = "Ben: 2 bags of 6.\n#### 12"
    script({("1/samples-sft", BEN): [correct, "#### 13"], ("1/samples-sft", TOM): [TOM.rationale]})
    run = new_run("st")
    list(self_train(run))
    labels = records(run, "iteration-1/pseudo-labels.jsonl")
    assert [(row["question"], row["source"]) for row in labels] == [
        (TOM.question, "gold"),
        (MIA.question, "gold"),
        (BEN.question, "sample"),
    ]
    assert labels[2]["rationale"] == tiny_template.decode(labels[2]["token_ids"]) == correct
    assert all(row["token_ids"][-1] == tiny_template.eos_id for row in labels)
    metadata = run.directory.stages["iteration-1/pseudo-labels.jsonl"]
    assert (metadata["pseudo_labels"], metadata["examples"]) == (1, 3)


def test_fine_tuning_takes_the_labels_and_nothing_else(new_run, script, monkeypatch):
    trained, original = [], steps.train_sft

    def train(model, sequences, *rest, **more):
        trained.append([(sequence.prompt_ids, sequence.target_ids) for sequence in sequences])
        original(model, sequences, *rest, **more)

    monkeypatch.setattr(steps, "train_sft", train)
    script({("1/samples-sft", BEN): ["Ben: 2 bags of 6.\n#### 12"]})
    run = new_run("st")
    list(self_train(run))
    prompt, target = run.template.prompt_ids, run.template.target_ids
    assert trained[0] == [(tuple(prompt(e.question)), tuple(target(e.rationale))) for e in (TOM, MIA)]
    labels = records(run, "iteration-1/pseudo-labels.jsonl")
    assert trained[1] == [(tuple(prompt(row["question"])), tuple(row["token_ids"])) for row in labels]


def test_earlier_samples_are_merged_newest_first(new_run, script, tiny_template):
    old, new = ["Old words here.\n#### 12", "Oh, no.\n#### 1"], ["Some other text.\n#### 12", "Unsure.\n#### 0"]
    script({("1/samples-sft", BEN): old, ("2/samples-sft", BEN): new})
    run = new_run("st", iterations=2)
    list(self_train(run))
    prompt_ids = tuple(tiny_template.prompt_ids(BEN.question))
    of = {text: TokenizedExample(prompt_ids, tuple(tiny_template.target_ids(text))) for text in old + new}
    known = steps.candidates(run, 2, "samples-sft")[2]
    assert known == Candidates(prompt_ids, None, [of[new[0]], of[old[0]]], [of[new[1]], of[old[1]]])
    assert steps.candidates(run, 1, "samples-sft")[2] == Candidates(prompt_ids, None, [of[old[0]]], [of[old[1]]])
    gold = [candidates.gold for candidates in steps.candidates(run, 2, "samples-sft")]
    assert [example and example.target_ids for example in gold] == [
        *(tuple(tiny_template.target_ids(e.rationale)) for e in (TOM, MIA)),
        None,
    ]
    labels = [row["rationale"] for row in records(run, "iteration-2/pseudo-labels.jsonl") if row["answer"] == "12"]
    assert labels == [new[0]]  # capped at the 90th percentile of 1, 1 and 2


def test_earlier_pairs_are_merged(new_run, script):
    script({("1/samples-dpo", MIA): ["Early.\n#### 1"], ("2/samples-dpo", MIA): ["Zzz.\n#### 2"]})
    run = new_run(iterations=2)
    list(self_train(run))
    rejected = [row["rejected"] for row in records(run, "iteration-2/pairs.jsonl") if row["question"] == MIA.question]
    assert sorted(rejected) == ["Early.\n#### 1", "Zzz.\n#### 2"]


def test_rest_em_learns_from_samples_alone(new_run, script, tiny_template):
    """A sample that equals the human rationale counts as a sample."""
    script({("1/samples-sft", TOM): [TOM.rationale, "3 and 4.\n#### 7"], ("1/samples-sft", BEN): ["#### 13"]})
    run = new_run("rest-em")
    list(self_train(run))
    labels = records(run, "iteration-1/pseudo-labels.jsonl")
    assert [(row["question"], row["source"]) for row in labels] == [(TOM.question, "sample")] * 2
    assert labels[0]["token_ids"] == tiny_template.target_ids(TOM.rationale)
    assert run.directory.stages["iteration-1/pseudo-labels.jsonl"]["pseudo_labels"] == 2


def test_rest_em_takes_a_seeded_part_of_the_samples(new_run, script):
    texts = [f"{i} and {j}.\n#### 7" for i in range(5) for j in range(6)]  # all of them near-duplicates
    script({("1/samples-sft", TOM): texts, ("1/samples-sft", BEN): ["Ben has 12.\n#### 12"]})
    drawn = []
    for name, seed in (("first", 1), ("second", 1), ("other", 2)):
        run = new_run("rest-em", name=name, seed=seed, samples=30)
        list(self_train(run))
        labels = records(run, "iteration-1/pseudo-labels.jsonl")
        drawn.append([row["rationale"] for row in labels if row["question"] == TOM.question])
    first, second, other = drawn
    assert len(first) == len(other) == 10
    assert first == [text for text in texts if text in first] != texts[:10]
    assert first == second != other


def test_rest_em_learns_from_its_last_iteration_alone(new_run, script):
    old = ["First words, long ago.\n#### 12"]
    new = ["Ben: 12 eggs.\n#### 12", "Ben: 12 eggs!\n#### 12", "Ben: 12 eggs.\n#### 12"]
    script(
        {
            ("1/samples-sft", BEN): old,
            ("2/samples-sft", BEN): new,
            ("1/samples-sft", TOM): ["Tom has 7.\n#### 7"],
        }
    )
    run = new_run("rest-em", iterations=2, samples=3)
    list(self_train(run))
    first, second = (records(run, f"iteration-{i}/pseudo-labels.jsonl") for i in (1, 2))
    assert [row["rationale"] for row in first] == ["Tom has 7.\n#### 7", *old]
    assert [row["rationale"] for row in second] == new[:2]  # near-duplicates stay, what is equal goes
    assert {row["source"] for row in (*first, *second)} == {"sample"}


def test_rest_em_without_a_correct_sample_is_one_line(new_run, script):
    script({})
    run = new_run("rest-em")
    with pytest.raises(UserError, match="iteration 1: not one sample was correct"):
        list(self_train(run))
    assert not list(run.path(1).glob("*pseudo-labels*"))


def test_rft_has_each_list_of_equations_once(new_run, script):
    texts = [
        "Ben has <<2*6=12>>12 eggs.\n#### 12",
        "Two bags, six in each of them, so that makes <<2*6=12>>12.\n#### 12",  # other words, equal equations
        "Ben has <<6*2=12>>12 eggs.\n#### 12",  # the same words, other equations
        "Ben has <<2*6=13>>12 eggs.\n#### 12",  # a wrong calculation
        *(f"Ben has <<{i}+{12 - i}=12>>12 eggs.\n#### 12" for i in range(10)),
    ]
    script({("1/samples-sft", BEN): texts, ("1/samples-sft", TOM): [TOM.rationale]})
    run = new_run("rft", samples=len(texts))
    list(self_train(run))
    labels = records(run, "iteration-1/pseudo-labels.jsonl")
    ben = [row for row in labels if row["question"] == BEN.question]
    assert [row["rationale"] for row in ben] == [texts[0], texts[2], *texts[4:]]
    # L's rationale joins the samples without being compared with them, even with one that is equal.
    tom = [row for row in labels if row["question"] == TOM.question]
    assert [row["source"] for row in tom] == ["gold", "sample"]
    assert tom[0]["token_ids"] == tom[1]["token_ids"]
    assert run.directory.stages["iteration-1/pseudo-labels.jsonl"]["pseudo_labels"] == 12 + 1


# -- evaluation -------------------------------------------------------------------------------------------------------


def evaluation(run: Run, iteration: int) -> dict:
    return json.loads((run.path(iteration) / "evaluation.json").read_text())


@pytest.fixture
def noted(monkeypatch) -> list[tuple]:
    """What evaluation samples: (model's place, questions, temperature, samples, seed), a row a call."""
    calls, loaded = [], []
    load, original = steps.load_for_sampling, evaluation_module.generate

    def load_for_sampling(run, directory):
        loaded.append(f"{directory.parent.name[-1]}/{directory.name}")
        return load(run, directory)

    def generate(model, template, questions, settings, *, n_samples, **rest):
        calls.append((loaded[-1], list(questions), settings.temperature, n_samples, settings.seed))
        return original(model, template, questions, settings, n_samples=n_samples, **rest)

    monkeypatch.setattr(steps, "load_for_sampling", load_for_sampling)
    monkeypatch.setattr(evaluation_module, "generate", generate)
    return calls


def test_dev_is_evaluated_before_and_after_dpo(new_run, noted):
    """Both models greedily and sampled, over all of dev; test sets for f_θ' alone, in the same call; nothing twice."""
    run = new_run()
    list(self_train(run))
    dev = [example.question for example in DEV]
    with_tests = [*dev, DEV[0].question]
    assert [call[:4] for call in noted] == [
        ("0/sft", with_tests, 0.0, 1),
        ("0/sft", dev, 0.7, 10),
        ("1/sft", with_tests, 0.0, 1),
        ("1/sft", dev, 0.7, 10),
        ("1/dpo", dev, 0.0, 1),
        ("1/dpo", dev, 0.7, 10),
    ]
    content = evaluation(run, 1)
    assert {model: [*content[model]["greedy"]] for model in content} == {
        "sft": ["toy/dev", "toy/test"],
        "dpo": ["toy/dev"],
    }
    for model in ("sft", "dpo"):
        score = content[model]["greedy"]["toy/dev"]
        assert (score["n"], len(score["correct"])) == (2, 2)
        sampled = content[model]["sampled"]
        assert [*sampled["pass_at"]] == [str(k) for k in range(1, 11)]
        assert [*sampled["maj_at"]] == [*sampled["majority"]] == ["10"]
        assert (sampled["n_samples"], len(sampled["n_correct"]), len(sampled["majority"]["10"])) == (10, 2, 2)
        assert {score["n"] for score in sampled["pass_at"].values()} == {2}
    assert evaluation(run, 0).keys() == {"sft"}


def test_greedy_outcomes_go_to_their_sets(new_run, script, monkeypatch):
    script({})
    monkeypatch.setattr(steps, "greedy_outcomes", lambda model, template, examples, *rest, **more: [0, 1, 1, 0, 1])
    tests = {"toy/test": [*DEV, TOM][:2], "other/test": [TOM]}
    run = new_run("sft", data=replace(DATA, tests=tests))
    assert list(self_train(run)) == [0]
    greedy = evaluation(run, 0)["sft"]["greedy"]
    assert {name: score["correct"] for name, score in greedy.items()} == {
        "toy/dev": [0, 1],
        "toy/test": [1, 0],
        "other/test": [1],
    }
    assert [(score["value"], score["n"]) for score in greedy.values()] == [(0.5, 2), (0.5, 2), (1.0, 1)]
    assert steps.evaluate(run, 0) == 0.5


def test_models_are_compared_under_the_same_random_numbers(new_run, noted):
    """A DPO without pairs changes nothing, and then nothing in the scores either."""
    run = new_run(data=replace(DATA, labelled=[TOM], pool=[BEN, TOM]), dpo_learning_rate=0.0)
    list(self_train(run))
    assert len({call[4] for call in noted if call[2] > 0}) == 1
    assert evaluation(run, 1)["dpo"]["sampled"] == evaluation(run, 0)["sft"]["sampled"]


@pytest.mark.parametrize(("limit", "sets"), [(0, {"toy/dev": 2}), (1, {"toy/dev": 2, "toy/test": 1}), (None, None)])
def test_questions_of_each_test_set_can_be_fewer(new_run, noted, limit, sets):
    run = new_run("sft", data=replace(DATA, tests={"toy/test": DEV}), test_questions=limit)
    list(self_train(run))
    greedy = evaluation(run, 0)["sft"]["greedy"]
    assert {name: score["n"] for name, score in greedy.items()} == (sets or {"toy/dev": 2, "toy/test": 2})
    assert len(noted[0][1]) == sum(score["n"] for score in greedy.values())


def test_dev_questions_that_are_sampled_can_be_fewer(new_run, noted):
    """And the samples of each; greedy accuracy is of all of dev nevertheless."""
    run = new_run("sft", pass_questions=1, pass_at=3)
    list(self_train(run))
    assert [(len(call[1]), call[3]) for call in noted] == [(3, 1), (1, 3)]
    content = evaluation(run, 0)["sft"]
    assert content["greedy"]["toy/dev"]["n"] == 2
    assert [*content["sampled"]["pass_at"]] == ["1", "2", "3"]


def test_pass_at_1_is_greedy_accuracy_alone(new_run, noted):
    run = new_run(pass_at=1)
    list(self_train(run))
    assert {call[2] for call in noted} == {0.0}
    assert evaluation(run, 1)["dpo"]["sampled"] is None
    results = collect_results(run, "tiny")
    assert results["iterations"][1]["dpo"]["difference"]["accuracy"].keys() == {"toy/dev"}
    write_report(run, "tiny")


# -- the end of a run, and its continuation ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracies", "patience", "done"),
    [
        ((0.2, 0.1, 0.1, 0.1), None, [0, 1, 2, 3]),  # as published: every iteration
        ((0.2, 0.3, 0.4, 0.5), 1, [0, 1, 2, 3]),
        ((0.2, 0.3, 0.3, 0.9), 1, [0, 1, 2]),
        ((0.2, 0.1, 0.5, 0.6), 1, [0, 1]),
        ((0.0, 0.0, 0.5, 0.6), 1, [0, 1]),
        ((0.2, 0.1, 0.5, 0.6), 2, [0, 1, 2, 3]),
        ((0.2, 0.1, 0.2, 0.6), 2, [0, 1, 2]),
    ],
)
def test_a_run_makes_its_iterations_or_has_patience(new_run, script, capsys, accuracies, patience, done):
    script({}, accuracies)
    assert list(self_train(new_run("st", iterations=3, patience=patience))) == done
    assert ("stopped after iteration" in capsys.readouterr().out) == (len(done) < 4)


def test_a_run_is_taken_further_by_more_iterations(new_run, script):
    accuracies = (0.2, 0.1, 0.1, 0.1, 0.5, 0.4, 0.3)
    script({}, accuracies)

    def made(**changes) -> list[int]:
        return list(self_train(new_run("st", **changes)))

    assert made(iterations=1) == [0, 1]
    assert made(iterations=2) == [0, 1, 2]  # a finished one
    assert made(iterations=3, patience=3) == [0, 1, 2, 3]  # stopped here, as it would have ended
    assert made(iterations=3, patience=3) == [0, 1, 2, 3]
    assert made(iterations=6, patience=2) == [0, 1, 2, 3, 4, 5, 6]  # and a stopped one: it counts from there
    assert made(iterations=6, patience=2) == [0, 1, 2, 3, 4, 5, 6]
    assert made(iterations=6) == [0, 1, 2, 3, 4, 5, 6]


def test_a_stop_holds_for_the_same_command_alone(new_run, script):
    script({}, (0.3, 0.2, 0.4, 0.5))
    for _ in range(2):
        assert list(self_train(new_run("st", iterations=3, patience=1))) == [0, 1]
    assert list(self_train(new_run("st", iterations=3, patience=2))) == [0, 1, 2, 3]
    assert list(self_train(new_run("st", iterations=3))) == [0, 1, 2, 3]


def test_without_a_warm_up_the_base_is_sampled_from(new_run, script, monkeypatch, tiny_model_dir):
    script({("1/samples-sft", TOM): ["Tom has 7.\n#### 7"]})
    loaded = []
    monkeypatch.setattr(steps, "load_model", lambda path, *rest, **more: loaded.append(path) or load_model(path))
    run = new_run("rest-em", warm_up=False)
    assert list(self_train(run)) == [0, 1]
    assert loaded == [tiny_model_dir] * 3 + [run.path(1) / "sft"]
    assert not (run.path(0) / "sft").exists()


def test_samples_of_another_model_are_not_continued(new_run, monkeypatch, tiny_model_dir):
    monkeypatch.setattr(sampler, "CHUNK", 2)
    original = steps.generate

    def killed(*arguments, **options):
        for n_done, done in enumerate(original(*arguments, **options)):
            if options["label"] == "1/samples-sft" and n_done == 5:
                raise KeyboardInterrupt
            yield done

    monkeypatch.setattr(steps, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        list(self_train(new_run()))
    first_chunks = []

    def noting(*arguments, **options):
        first_chunks.append(options["first_chunk"])
        return original(*arguments, **options)

    monkeypatch.setattr(steps, "generate", noting)
    run = new_run()
    assert len(list(run.directory.progress("iteration-1/samples-sft.jsonl").iterdir())) == 2
    # Made again, the DPO model may differ (on a GPU it does): here it is another one on purpose.
    shutil.rmtree(run.path(1) / "dpo")
    list(self_train(new_run(dpo_learning_rate=1e-2)))
    assert first_chunks == [0]


def test_fewer_epochs_of_dpo_than_steps_are_said(new_run, script, capsys):
    script({})  # two pairs, as above
    list(self_train(new_run(dpo_steps=50, dpo_pairs_per_step=1, dpo_max_epochs=4)))
    assert "1/dpo: 8 steps instead of 50, because 2 pairs are used in 4 epochs at most" in capsys.readouterr().out
    list(self_train(new_run(name="short", dpo_steps=3, dpo_pairs_per_step=96)))
    assert "instead of" not in capsys.readouterr().out


def test_a_finished_run_does_nothing_again(new_run, monkeypatch):
    run = new_run()
    done = list(self_train(run))
    before, stages = files_of(run), run.directory.stages

    def never(*arguments, **options):
        raise AssertionError("this stage was finished")

    functions = "train_sft reference_log_probabilities train_dpo generate greedy_outcomes sampled_scores load_model"
    for name in functions.split():
        monkeypatch.setattr(steps, name, never)
    again = new_run()
    assert list(self_train(again)) == done
    assert files_of(again) == before
    assert again.directory.stages == stages


@pytest.mark.parametrize(
    "lost",
    [
        ["1/sft"],
        ["1/dpo", "1/samples-sft.jsonl"],
        ["1/reference.safetensors"],
        ["1/samples-dpo.jsonl", "1/pairs.jsonl"],
    ],
)
def test_a_lost_stage_is_redone_identically(new_run, lost):
    run = new_run()
    list(self_train(run))
    before = files_of(run)
    for name in lost:
        path = run.directory.path / f"iteration-{name}"
        path.rename(path.with_name("lost-" + path.name))
    for path in run.directory.path.glob("iteration-1/lost-*"):
        path.rename(run.directory.path / path.name)
    unchanged = (run.path(0) / "sft/model.safetensors").stat().st_mtime_ns
    again = new_run()
    list(self_train(again))
    assert files_of(again) == before
    assert (run.path(0) / "sft/model.safetensors").stat().st_mtime_ns == unchanged


@pytest.mark.parametrize("method", ["dpo-st", "st"])
def test_same_seed_same_files_bit_for_bit(new_run, method):
    runs = [new_run(method, name=f"run-{i}", seed=seed) for i, seed in enumerate((1, 1, 2))]
    for run in runs:
        list(self_train(run))
    first, second, other = map(files_of, runs)
    assert first == second
    differing = {name for name in first if first[name] != other[name]}
    assert {"iteration-0/sft/model.safetensors", "iteration-1/samples-sft.jsonl"} <= differing


def test_an_interrupted_run_equals_an_uninterrupted_one(new_run, monkeypatch):
    whole = new_run(name="whole")
    list(self_train(whole))

    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    for name in ("train_sft", "greedy_outcomes", "reference_log_probabilities", "train_dpo", "sampled_scores"):
        with monkeypatch.context() as patch:
            patch.setattr(steps, name, interrupted)
            with pytest.raises(KeyboardInterrupt):
                list(self_train(new_run(name="broken")))
    broken = new_run(name="broken")
    list(self_train(broken))
    assert files_of(broken) == files_of(whole)


@pytest.mark.parametrize("stage", ["1/samples-dpo", "1/samples-sft"])
def test_killed_sampling_continues_at_the_missing_chunk(new_run, monkeypatch, stage):
    whole = new_run(name="whole")
    list(self_train(whole))
    monkeypatch.setattr(sampler, "CHUNK", 2)
    chunked = new_run(name="chunked")
    list(self_train(chunked))
    original, begun = steps.generate, []

    def killed(*arguments, **options):
        for n_done, done in enumerate(original(*arguments, **options)):
            if options["label"] == stage and n_done == 5:
                raise KeyboardInterrupt
            yield done

    def noting(*arguments, **options):
        begun.append((options["label"], options["first_chunk"]))
        return original(*arguments, **options)

    monkeypatch.setattr(steps, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        list(self_train(new_run(name="broken")))
    monkeypatch.setattr(steps, "generate", noting)
    broken = new_run(name="broken")
    assert len(list(broken.directory.progress(f"iteration-{stage}.jsonl").iterdir())) == 2
    list(self_train(broken))
    assert begun[0] == (stage, 2)
    assert files_of(broken) == files_of(chunked)
    assert files_of(chunked).keys() == files_of(whole).keys()


def test_chunks_of_a_large_model_are_small_in_a_run(new_run, monkeypatch):
    """Of sampling and of evaluation alike: the model's size counts, not only the device."""
    monkeypatch.setattr(sampler, "MIN_PARAMETERS_FOR_SMALL_CHUNKS", 1)
    monkeypatch.setattr(sampler, "CPU_CHUNK_PER_SLOT", 3)
    sizes = []
    for module in (steps, evaluation_module):

        def noting(*arguments, original=module.generate, **options):
            sizes.append(options["chunk_size"])
            return original(*arguments, **options)

        monkeypatch.setattr(module, "generate", noting)
    run = new_run(slots=2)
    list(self_train(run))
    assert sizes and {*sizes} == {6}


def test_a_killed_evaluation_continues_at_the_missing_chunk(new_run, monkeypatch):
    monkeypatch.setattr(sampler, "CHUNK", 2)
    whole = new_run(name="whole")
    list(self_train(whole))
    original, begun = evaluation_module.generate, []

    def killed(*arguments, **options):
        for n_done, done in enumerate(original(*arguments, **options)):
            if options["label"].startswith("1/sft, pass@") and n_done == 3:
                raise KeyboardInterrupt
            yield done

    def noting(model, template, questions, *arguments, **options):
        n_chunks = -(-len(questions) * options["n_samples"] // 2)
        begun.append((options["label"].split(",")[0], options["n_samples"] > 1, options["first_chunk"], n_chunks))
        return original(model, template, questions, *arguments, **options)

    monkeypatch.setattr(evaluation_module, "generate", killed)
    with pytest.raises(KeyboardInterrupt):
        list(self_train(new_run(name="broken")))
    monkeypatch.setattr(evaluation_module, "generate", noting)
    broken = new_run(name="broken")
    list(self_train(broken))
    # The greedy answers of f_θ' are all there, of its samples a chunk; nothing of f_θd.
    greedy, sampled, *rest = begun
    assert greedy == ("1/sft", False, greedy[3], greedy[3]) and greedy[3] > 0
    assert sampled[:3] == ("1/sft", True, 1) and sampled[3] > 1
    assert rest and all(first_chunk == 0 for _, _, first_chunk, _ in rest)
    assert files_of(broken) == files_of(whole)


def test_the_reference_outlives_a_kill_of_dpo(new_run, script, monkeypatch):
    script({("1/samples-dpo", TOM): ["Tom has 7.\n#### 7", "Tom has 8.\n#### 8"]})
    whole = new_run(name="whole")
    list(self_train(whole))
    with monkeypatch.context() as patch:
        patch.setattr(dpo, "dpo_loss", None)  # TypeError
        with pytest.raises(TypeError):
            list(self_train(new_run(name="broken")))
    monkeypatch.setattr(steps, "reference_log_probabilities", None)
    broken = new_run(name="broken")
    assert (broken.path(1) / "reference.safetensors").is_file()
    list(self_train(broken))
    assert files_of(broken) == files_of(whole)


# -- what goes in -----------------------------------------------------------------------------------------------------


def test_each_sampling_has_its_own_seed(new_run):
    run = new_run()
    purposes = ("1/samples-dpo", "1/samples-sft", "2/samples-dpo", "evaluation")
    assert len({run.sampling_settings(purpose).seed for purpose in purposes}) == 4
    assert run.sampling_settings("1/samples-dpo") == new_run(name="other").sampling_settings("1/samples-dpo")
    assert run.sampling_settings("1/samples-dpo") != new_run(name="another", seed=2).sampling_settings("1/samples-dpo")
    settings = new_run("rest-em", name="third").sampling_settings("1/samples-sft")
    assert (settings.temperature, settings.top_k, settings.max_new_tokens, settings.slots) == (0.7, 40, 12, 40)


def test_too_long_examples_are_left_out_and_counted(new_run, capsys):
    long = Example("Ana waits. " * 30 + "How long?", "1", "Ana waits.\n#### 1")
    data = replace(DATA, labelled=[TOM, long])
    run = new_run("sft", data=data, max_source=100)
    list(self_train(run))
    assert "0/sft: 1 of 2 left out, being longer than 100 source or 300 target tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match="all 2 examples are longer than the limits"):
        list(self_train(new_run("sft", name="short", data=data, max_target=3)))


def test_unwritable_rationales_are_left_out_and_counted(new_run, monkeypatch, capsys):
    round_trips = T5Template.round_trips
    monkeypatch.setattr(T5Template, "round_trips", lambda self, text: "Mia" not in text and round_trips(self, text))
    run = new_run()
    assert run.tokens.gold.keys() == {TOM.question}
    steps.fine_tune(run, 0)
    assert "1 of 2 rationales left out" in capsys.readouterr().out
    monkeypatch.setattr(T5Template, "round_trips", lambda self, text: len(text) == 1)
    with pytest.raises(UserError, match="toy: no labelled rationale can be written with the tokenizer"):
        new_run(name="none")


@pytest.mark.parametrize("part", ["pool", "dev", "tests"])
def test_a_too_long_question_is_refused_at_once(new_run, part):
    long = Example("How " * 2000 + "?", "1")
    changed = {"pool": [TOM, MIA, long], "dev": [long], "tests": {"toy/test": [long]}}[part]
    with pytest.raises(UserError, match="tokens; the limit is 1,024"):
        new_run(data=replace(DATA, **{part: changed}))


def test_flops_of_training(new_run, script, tiny_model_dir):
    script({})
    run = new_run(sft_epochs=3, dpo_steps=5)
    list(self_train(run))
    size = model_size(load_model(tiny_model_dir))
    n_source = sum(len(example.prompt_ids) for example in run.tokens.gold.values())
    n_target = sum(len(example.target_ids) for example in run.tokens.gold.values())
    flops = {name: metadata.get("flops") for name, metadata in run.directory.stages.items()}
    assert flops["iteration-0/sft"] == pytest.approx(3 * training_flops(size, n_source, n_target))
    pairs = records(run, "iteration-1/pairs.jsonl")
    n_source = sum(2 * len(run.template.prompt_ids(row["question"])) for row in pairs)
    n_target = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in pairs)
    # Four passes over the pairs, as dpo_max_epochs allows, and one of the reference.
    assert flops["iteration-1/dpo"] == pytest.approx(4 * training_flops(size, n_source, n_target))
    assert flops["iteration-1/reference.safetensors"] == pytest.approx(forward_flops(size, n_source, n_target))


def test_a_question_is_tokenized_once(new_run, script, monkeypatch):
    """Once for all steps but the sampler's own."""
    script({("1/samples-dpo", TOM): ["Tom has 8.\n#### 8"]})
    run = new_run()
    monkeypatch.setattr(T5Template, "prompt_ids", None)
    assert list(self_train(run)) == [0, 1]


# -- LoRA -------------------------------------------------------------------------------------------------------------

ADAPTER = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}


def rank_of_difference(after: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> dict[str, int]:
    """By how large a rank matrices differ; 0 where they are equal."""
    return {
        name: int(torch.linalg.matrix_rank(after[name].double() - before[name].double(), rtol=1e-4))
        for name in after
        if after[name].dim() == 2
    }


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_training_has_fresh_adapters_and_leaves_a_merged_model(
    new_run, script, monkeypatch, tiny_model_dir, dtype
):
    """Each SFT adds a matrix of the rank to the base, DPO one to the model that its reference is of."""
    script({("1/samples-dpo", TOM): ["Tom has 8.\n#### 8"], ("1/samples-dpo", MIA): ["No idea"]})
    seeds = []
    original = steps.add_adapters

    def noted(model, **options):
        seeds.append(options["seed"])
        assert (options["rank"], options["alpha"]) == (2, 4.0)
        assert {weight.dtype for weight in model.parameters()} == {dtype or torch.float32}
        original(model, **options)

    monkeypatch.setattr(steps, "add_adapters", noted)
    run = replace(new_run(lora_rank=2), training_dtype=dtype)
    assert list(self_train(run)) == [0, 1]
    assert len({*seeds}) == 3  # 0/sft, 1/dpo, 1/sft

    base, warm = weights(tiny_model_dir), weights(run.path(0) / "sft")
    tuned, last = weights(run.path(1) / "dpo"), weights(run.path(1) / "sft")
    linear = {name for name in base if "layers" in name and "norm" not in name}
    for after, before in ((warm, base), (tuned, warm), (last, base)):
        ranks = rank_of_difference(after, before)
        assert {name for name, rank in ranks.items() if rank} == linear
        assert max(ranks.values()) == 2
        assert all(torch.equal(after[name], before[name]) for name in base if name not in linear)
    assert max(rank_of_difference(tuned, base).values()) == 4

    # The reference is of the model that the stage starts from, in the precision in which it is frozen.
    pairs = steps.read_pairs(run, 1)
    start = load_model(run.path(0) / "sft", dtype or torch.float32)
    expected_P2 = dpo.reference_log_probabilities(start, pairs, micro_batch_tokens=16384, dtype=dtype)
    found_P2 = load_file(run.path(1) / "reference.safetensors")["reference_P2"]
    assert len(pairs) > 1 and torch.equal(found_P2, expected_P2)
    first, *_ = read_log(run.path(1) / "dpo" / "log.jsonl")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-5 if dtype is None else 0.02)

    names = {f"{model}/{name}" for model in ("sft", "dpo") for name in ADAPTER}
    extra = {f"iteration-{i}/{name}" for i in (0, 1) for name in names} - {
        f"iteration-0/dpo/{name}" for name in ADAPTER
    }
    expected = {f"iteration-0/{name}" for name in SFT} | {f"iteration-1/{name}" for name in SELF_TRAINED | DPO} | extra
    assert files_of(run).keys() == expected


def test_flops_of_lora_are_those_without_gradients_of_weights(new_run, script, tiny_model_dir):
    script({})
    flops = []
    for name, rank in (("full", None), ("lora", 1)):
        run = new_run("sft", name=name, lora_rank=rank)
        list(self_train(run))
        flops.append(run.directory.stages["iteration-0/sft"]["flops"])
    assert 2 / 3 < flops[1] / flops[0] < 0.75  # and the adapters' own


def test_an_interrupted_lora_run_equals_an_uninterrupted_one(new_run, script, monkeypatch, tmp_path):
    """Stopped within the warm-up, DPO and the SFT after it; saved states hold adapters alone."""
    script({("1/samples-dpo", TOM): ["Tom has 8.\n#### 8"]})
    settings = {"lora_rank": 2, "sft_epochs": 3}
    whole = new_run(**settings)
    list(self_train(whole))
    expected = files_of(whole)
    whole.directory.path.rename(tmp_path / "whole")  # an adapter names the directory that it is for

    def stopped_in_its_first_step(model, optimizer, schedule, *, step, n_steps):
        if step == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return apply_step(model, optimizer, schedule, step=step, n_steps=n_steps)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    sizes = []
    try:
        for module, name in ((sft, "iteration-0/sft"), (dpo, "iteration-1/dpo"), (sft, "iteration-1/sft")):
            with monkeypatch.context() as patch:
                patch.setattr(module, "apply_step", stopped_in_its_first_step)
                with pytest.raises(KeyboardInterrupt):
                    list(self_train(new_run(**settings)))
            (state,) = (tmp_path / "run" / f"{name}.progress").iterdir()
            assert all("lora_" in key for key in load_file(state))
            sizes.append(state.stat().st_size)
    finally:
        signal.signal(signal.SIGINT, handler)
    again = new_run(**settings)
    list(self_train(again))
    assert files_of(again) == expected
    assert max(sizes) < (tmp_path / "run" / "iteration-0" / "sft" / "model.safetensors").stat().st_size


# -- where a trained model ends -------------------------------------------------------------------------------------

ENDOFTEXT, IM_END = 0, 2  # in SmolLM2's vocabulary
INSTRUCT = {"eos_token": "<|im_end|>"}


@pytest.mark.parametrize(
    ("config_eos", "generation", "tokenizer_config", "template", "lora_rank", "end", "written"),
    [
        (IM_END, {"eos_token_id": IM_END}, INSTRUCT, None, None, IM_END, IM_END),
        (ENDOFTEXT, {"eos_token_id": ENDOFTEXT}, None, "chat", None, IM_END, [ENDOFTEXT, IM_END]),
        (ENDOFTEXT, None, None, "chat", 2, IM_END, [ENDOFTEXT, IM_END]),
        (ENDOFTEXT, {"eos_token_id": ENDOFTEXT}, INSTRUCT, None, None, IM_END, [ENDOFTEXT, IM_END]),
        (IM_END, {"max_length": 9}, None, None, None, IM_END, IM_END),
        (None, None, None, None, None, ENDOFTEXT, ENDOFTEXT),
    ],
    ids=["instruct", "base, chat", "base, chat, lora", "files that differ", "no end for generate", "no end at all"],
)
def test_transformers_ends_where_training_did(
    shared, tmp_path, config_eos, generation, tokenizer_config, template, lora_rank, end, written
):
    """Whatever the base's files say, and ours ends there too; a training that goes on from there changes nothing."""
    base, trained, later = tmp_path / "base", tmp_path / "trained", tmp_path / "later"
    config = LlamaConfig(49152, 8, 8, 1, n_heads=1, n_kv_heads=1, d_head=8, tied=True, eos_id=config_eos)
    save_model(Llama(config).initialise(), base, [shared / "tokenizers/smollm2/tokenizer.json"])
    for name, content in (("generation_config", generation), ("tokenizer_config", tokenizer_config)):
        if content is not None:
            (base / f"{name}.json").write_text(json.dumps(content))
    rules = load_template(base, template)
    assert rules.eos_id == end

    def train(start: Path, directory: Path, record: str | None) -> None:
        preset = replace(PRESET, lora_rank=lora_rank)
        model = steps.load_for_training(start, preset, dtype=None, device="cpu", seed=0)
        steps.save_trained(model, directory, start=start, template=record, eos_id=rules.eos_id)

    train(base, trained, template)
    train(trained, later, None)
    for name in ("config.json", "generation_config.json"):
        assert (trained / name).is_file() == (base / name).is_file() == (later / name).is_file()
        if (trained / name).is_file():
            assert json.loads((trained / name).read_text()) == json.loads((later / name).read_text())
    assert json.loads((trained / "config.json").read_text())["eos_token_id"] == written
    found = load_template(later)
    assert found.eos_id == end and end in found.stop_ids

    # Every position's likeliest token is made the end that was trained.
    theirs = transformers.AutoModelForCausalLM.from_pretrained(later)
    always = transformers.SequenceBiasLogitsProcessor({(end,): 1e4})
    ids = theirs.generate(
        torch.tensor([rules.prompt_ids(TOM.question)]),
        max_new_tokens=5,
        do_sample=False,
        pad_token_id=5,
        logits_processor=transformers.LogitsProcessorList([always]),
    )
    assert ids[0, -1] == end and len(ids[0]) == len(rules.prompt_ids(TOM.question)) + 1
