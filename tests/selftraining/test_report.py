"""results.json, the table and the figure of a run, from files written by hand."""

import json
from types import SimpleNamespace

import pytest

from minidpost.selftraining.report import collect_results, plot_accuracy, results_table, write_report
from minidpost.selftraining.run_directory import RunDirectory
from minidpost.storage import markdown_table

SETTINGS = {"model": "tiny-t5", "seed": 3}


def score(value: float) -> dict:
    return {"value": value, "n": 100, "low": value - 0.05, "high": value + 0.05}


def sampled(one: float, ten: float) -> dict:
    return {"pass_at_1": score(one), "pass_at_10": score(ten)}


@pytest.fixture
def run(tmp_path):
    """A dpo-st run of two iterations, the second of which has its DPO, but no evaluation yet."""
    directory = RunDirectory(tmp_path / "run", SETTINGS)

    def finish(name: str, value: object = None, **metadata: float) -> None:
        with directory.stage(name) as stage:
            stage.path.write_text(json.dumps(value))
            stage.metadata.update(metadata)
        directory.stages[name]["seconds"] = 30.0

    finish("iteration-0/sft.json", flops=1e9)
    greedy = {"toy/dev": score(0.3), "toy/test": score(0.25)}
    finish("iteration-0/evaluation.json", {"greedy": greedy, "sampled": {"sft": sampled(0.2, 0.5)}})
    finish("iteration-1/samples-dpo.jsonl", flops=2e9, n_samples=5000)
    finish("iteration-1/pairs.jsonl", pairs=1234)
    finish("iteration-1/dpo.json", flops=3e9)
    finish("iteration-1/pseudo-labels.jsonl", pseudo_labels=0, examples=400)
    greedy = {"toy/dev": score(0.4), "toy/test": score(0.35)}
    both = {"sft": sampled(0.3, 0.6), "dpo": sampled(0.25, 0.55)}
    finish("iteration-1/evaluation.json", {"greedy": greedy, "sampled": both})
    finish("iteration-2/samples-dpo.jsonl", flops=5e9)
    return SimpleNamespace(
        directory=directory,
        method="dpo-st",
        seed=3,
        path=lambda iteration: directory.path / f"iteration-{iteration}",
    )


def test_results_of_every_finished_iteration(run):
    results = collect_results(run, "tiny-t5")
    assert {name: results[name] for name in ("model", "method", "seed", "settings")} == {
        "model": "tiny-t5",
        "method": "dpo-st",
        "seed": 3,
        "settings": SETTINGS,
    }
    first, second = results["iterations"]
    assert first == {
        "iteration": 0,
        "accuracy": {"toy/dev": 0.3, "toy/test": 0.25},
        "interval": {"toy/dev": pytest.approx([0.25, 0.35]), "toy/test": pytest.approx([0.2, 0.3])},
        "pass_at_1": 0.2,
        "pass_at_10": 0.5,
        "pairs": None,
        "pseudo_labels": None,
        "seconds": 60.0,
        "flops": 1e9,
    }
    assert second["accuracy"] == {"toy/dev": 0.4, "toy/test": 0.35}
    assert (second["pairs"], second["pseudo_labels"], second["seconds"], second["flops"]) == (1234, 0, 150.0, 5e9)
    assert (second["pass_at_1"], second["pass_at_10"]) == (0.3, 0.6)
    assert second["dpo"] == {"pass_at_1": 0.25, "pass_at_10": 0.55}


def test_iterations_1_and_10_are_told_apart(run):
    run.directory.stages["iteration-10/sft.json"] = {"seconds": 1e6, "flops": 1e20}
    assert collect_results(run, "tiny-t5")["iterations"][1]["flops"] == 5e9


def test_the_table_has_a_row_for_each_iteration(run):
    lines = results_table(collect_results(run, "tiny-t5")).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == [
        "method",
        "iteration",
        "toy/dev",
        "toy/test",
        "pass@10",
        "pairs",
        "pseudo-labels",
        "minutes",
        "FLOPs",
    ]
    assert cells[2:] == [
        ["sft", "0", "30.0%", "25.0%", "50.0%", "–", "–", "1.0", "1e+09"],
        ["dpo-st", "1", "40.0%", "35.0%", "60.0%", "1,234", "0", "2.5", "5e+09"],
    ]


def test_markdown_lines_up():
    assert markdown_table(["a", "long head"], [["long cell", "1"]]).splitlines() == [
        "| a         | long head |",
        "| --------- | --------- |",
        "| long cell | 1         |",
    ]


def test_a_report_replaces_the_last_one(run):
    path = run.directory.path
    (path / "report.md").write_text("of iteration 0")
    text = write_report(run, "tiny-t5")
    assert text == results_table(collect_results(run, "tiny-t5"))
    assert json.loads((path / "results.json").read_text()) == collect_results(run, "tiny-t5")
    report = (path / "report.md").read_text()
    assert report.startswith("# dpo-st · tiny-t5 · seed 3\n")
    assert text in report
    assert "(figures/accuracy.png)" in report
    assert not list(path.rglob("*.unfinished"))


def test_the_figure_shows_every_set(run, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    plotted = {}
    original = Axes.errorbar

    def errorbar(self, x, y, yerr, label, **rest):
        plotted[label] = (x, y, yerr)
        return original(self, x, y, yerr=yerr, label=label, **rest)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    plot_accuracy(collect_results(run, "tiny-t5"), tmp_path / "figures" / "a.png")
    assert (tmp_path / "figures" / "a.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert plotted.keys() == {"toy/dev", "toy/test"}
    iterations, values, around = plotted["toy/test"]
    assert iterations == [0, 1]
    assert values == pytest.approx([25, 35])
    assert around == [pytest.approx([5, 5]), pytest.approx([5, 5])]
