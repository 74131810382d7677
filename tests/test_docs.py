"""README and docs: links lead somewhere, code links stand at their line, the walkthrough's numbers are true."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from minidpost.data import toy
from minidpost.data.datasets import load
from minidpost.models.hub import find_model
from minidpost.models.weights import load_model, load_template
from minidpost.sampling.generate import Sample, generate
from minidpost.sampling.sampler import SamplingSettings
from minidpost.selftraining.methods import METHODS
from minidpost.selftraining.presets import TINY_T5
from minidpost.selftraining.selection import Candidates, jaccard, preference_pairs, pseudo_labels
from minidpost.storage import read_json
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
