"""README and docs: links lead somewhere, code links stand at their line, the walkthrough's numbers are true."""

import re
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from minidpost.data import toy
from minidpost.data.datasets import load
from minidpost.errors import UserError
from minidpost.models.hub import find_model
from minidpost.models.weights import load_model, load_template
from minidpost.sampling.generate import Sample, generate
from minidpost.sampling.sampler import SamplingSettings
from minidpost.selftraining.methods import METHODS
from minidpost.selftraining.presets import TINY_T5
from minidpost.selftraining.selection import Candidates, jaccard, preference_pairs, pseudo_labels
from minidpost.storage import read_json, write_json, write_jsonl
from tools import make_walkthrough, update_links

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\]\(([^)\s]+)[^)]*\)")
each_page = pytest.mark.parametrize("page", update_links.PAGES, ids=lambda page: page.name)


@each_page
def test_links_lead_to_files(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if not link.startswith(("http", "#")):
            assert (page.parent / link.partition("#")[0]).exists(), link


@each_page
def test_code_links_stand_at_their_line(page):
    assert update_links.updated(page) == page.read_text(encoding="utf-8"), "run python tools/update_links.py"


def test_the_readme_names_every_module():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for path in (ROOT / "minidpost").rglob("*.py"):
        if path.name != "__init__.py":
            assert path.name in text, path


def test_the_readmes_lines_of_python_run(capsys):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(compile(code, "README.md", "exec"), {})
    printed = capsys.readouterr().out
    assert re.findall(r"^\d (True|False) ", printed, re.MULTILINE)
    assert len(re.findall(r"####", printed)) <= 6  # three questions, two samples each


# -- the walkthrough ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def record():
    return read_json(make_walkthrough.RECORD)


def test_every_number_of_the_walkthrough_is_computed(record):
    assert make_walkthrough.PAGE.read_text(encoding="utf-8") == make_walkthrough.render(record)


def test_the_walkthroughs_question_is_the_pools(record):
    pool = [*load("toy", "train"), *load("toy", "unlabelled")]
    example = pool[record["example_index"]]
    assert (example.question, example.answer) == (record["question"], record["answer"])
    assert record["example_index"] >= toy.SIZES["train"] == record["n_gold"]


@pytest.fixture
def made_run(tmp_path, record) -> Path:
    """A run's files around the record's rows, which are those of question 1,020 here; question 1,010 has two pairs."""
    run, sft = tmp_path / "run", find_model(make_walkthrough.TEACHER)
    for name in ("iteration-0/sft", "iteration-1/dpo", "iteration-1/sft"):
        shutil.copytree(sft, run / name)
    preset = asdict(replace(TINY_T5, iterations=1))
    settings = {**make_walkthrough.SETTINGS, "seed": 3, "preset": preset}
    write_json(run / "config.json", {"settings": settings})
    write_jsonl(run / "iteration-1/dpo/log.jsonl", [{}] * 45)
    for iteration in range(2):
        scores = {"sft": {"greedy": {"toy/dev": record["dev_before"]}}}
        write_json(run / f"iteration-{iteration}/evaluation.json", scores)
    for name, key in (("samples-dpo", "samples_dpo"), ("samples-sft", "samples_sft")):
        rows = [row | {"example_index": 1020} for row in record[key]]
        others = [row | {"example_index": 1010, "question": "Another?"} for row in record[key]]
        write_jsonl(run / f"iteration-1/{name}.jsonl", [*others, *rows])
    for name, key, n in (("pairs", "pairs", 2), ("pseudo-labels", "pseudo_labels", 1)):
        others = [row | {"question": "Another?"} for row in record[key]] * n
        write_jsonl(run / f"iteration-1/{name}.jsonl", [*others, *record[key]])
    return run


def test_the_walkthrough_takes_a_question_that_it_can_follow(monkeypatch, tmp_path, made_run, record):
    monkeypatch.setattr(make_walkthrough, "RECORD", tmp_path / "record.json")
    monkeypatch.setattr(make_walkthrough, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(sys, "argv", ["make_walkthrough.py", str(made_run)])
    make_walkthrough.main()
    made = read_json(tmp_path / "record.json")
    assert (made["command"], made["example_index"]) == ("python train.py --seed 3 --iterations 1", 1020)
    assert made["question"] == record["question"]
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page == make_walkthrough.render(made)

    # Where there is none, one line says so, and what was there stays.
    monkeypatch.setattr(sys, "argv", ["make_walkthrough.py", str(made_run), "--example", "1010"])
    with pytest.raises(UserError, match="--example 1010: no unlabelled question with one pair"):
        make_walkthrough.main()
    write_jsonl(made_run / "iteration-1/pairs.jsonl", [])
    monkeypatch.setattr(sys, "argv", ["make_walkthrough.py", str(made_run)])
    with pytest.raises(UserError, match="run: no unlabelled question has one pair"):
        make_walkthrough.main()
    assert read_json(tmp_path / "record.json") == made


def test_the_walkthrough_points_at_a_step_that_slipped():
    slipped = "He has <<2*3=6>>6 and <<6+1=7>>8 pens.\n#### 8"
    assert make_walkthrough.slip(slipped) == "Look closely: step 2 computes 7 and then writes 8. "
    assert make_walkthrough.slip(slipped.replace("8", "7")) == ""


def test_the_walkthroughs_selection_is_the_methods(record):
    before, after = Candidates(()), Candidates(())
    for sample in record["samples_dpo"]:
        before.add(Sample(**sample))
    for sample in record["samples_sft"]:
        after.add(Sample(**sample))
    limits = {"max_similarity": TINY_T5.max_similarity, "pairs_per_question": TINY_T5.pairs_per_question}
    (pair,) = preference_pairs(before, **limits)
    (line,) = record["pairs"]
    assert (list(pair.chosen.target_ids), list(pair.rejected.target_ids)) == (line["chosen_ids"], line["rejected_ids"])
    assert line["similarity"] == round(jaccard(pair.chosen, pair.rejected), 4)
    ((label,),) = pseudo_labels([after], METHODS["dpo-st"], TINY_T5)
    assert [list(label.target_ids)] == [row["token_ids"] for row in record["pseudo_labels"]]


def test_the_walkthroughs_log_probabilities_are_the_models(record):
    directory = find_model(make_walkthrough.TEACHER)
    pair = make_walkthrough.preference_pair(load_template(directory), record["pairs"][0])
    assert make_walkthrough.log_probabilities(directory, pair) == pytest.approx(record["reference"], abs=2e-3)


def test_the_walkthroughs_greedy_answer_is_the_models(record):
    directory = find_model(make_walkthrough.TEACHER)
    settings = SamplingSettings(max_new_tokens=160)
    (sample,) = generate(load_model(directory), load_template(directory), [record["question"]], settings)
    assert sample.completion == record["greedy_before"]


# -- the example -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_example_runs_and_self_training_helps():
    done = subprocess.run(
        [sys.executable, "examples/dpo_st.py"], cwd=ROOT, capture_output=True, text=True, timeout=1500, check=True
    )
    accuracies = [float(percent) for percent in re.findall(r"([\d.]+)% of dev", done.stdout)]
    assert len(accuracies) == 2
    assert accuracies[-1] > accuracies[0]
