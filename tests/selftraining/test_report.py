"""results.json, the tables and the figures of a run, from files written by hand."""

import json
from types import SimpleNamespace

import pytest

from minidpost.selftraining.evaluation import Score, mean_score, paired_difference, pass_at_k
from minidpost.selftraining.presets import Preset
from minidpost.selftraining.report import (
    before_and_after_table,
    best_iteration,
    collect_results,
    plot_accuracy,
    plot_pass_at_k,
    recommendation,
    results_table,
    write_report,
)
from minidpost.selftraining.run_directory import RunDirectory
from minidpost.storage import markdown_table

SETTINGS = {"model": "tiny-t5", "seed": 3}


def score(outcomes: list) -> dict:
    """A score as in a JSON file."""
    return vars(mean_score(outcomes))


def greedy(**n_correct: int) -> dict:
    """evaluation.json's greedy scores of sets of 20 questions, of which the first so many are right."""
    outcomes = {name.replace("_", "/"): [1] * n + [0] * (20 - n) for name, n in n_correct.items()}
    return {name: {**score(correct), "correct": correct} for name, correct in outcomes.items()}


def sampled(n_correct: list[int], n_samples: int = 4) -> dict:
    """evaluation.json's sampled scores of 20 questions; the majority is right where half of the samples are."""
    majority = [int(2 * n >= n_samples) for n in n_correct]
    return {
        "n_samples": n_samples,
        "n_correct": n_correct,
        "majority": {str(n_samples): majority},
        "pass_at": {str(k): score([pass_at_k(n_samples, n, k) for n in n_correct]) for k in range(1, n_samples + 1)},
        "maj_at": {str(n_samples): score(majority)},
    }


BEFORE = [0, 1, 2, 4] * 5
AFTER = [1, 1, 3, 4] * 5
LATER = [2, 2, 3, 4] * 5
EVALUATIONS = [
    {"sft": {"greedy": greedy(toy_dev=6, toy_test=5, svamp_test=1), "sampled": sampled(BEFORE)}},
    {
        "sft": {"greedy": greedy(toy_dev=8, toy_test=7, svamp_test=2), "sampled": sampled(LATER)},
        "dpo": {"greedy": greedy(toy_dev=7), "sampled": sampled(AFTER)},
    },
]


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


@pytest.fixture
def new_run(tmp_path):
    """A run of these evaluations, an iteration each; the next one has begun. By default dpo-st with two of them."""

    def begin(evaluations=EVALUATIONS, method="dpo-st", **changes) -> SimpleNamespace:
        directory = RunDirectory(tmp_path / "run", SETTINGS)

        def finish(name: str, value: object = None, **metadata: float) -> None:
            with directory.stage(name) as stage:
                stage.path.write_text(json.dumps(value))
                stage.metadata.update(metadata)
            directory.stages[name]["seconds"] = 30.0

        for iteration, evaluation in enumerate(evaluations):
            prefix = f"iteration-{iteration}"
            if iteration == 0:
                finish(f"{prefix}/sft.json", flops=1e9)
            if "dpo" in evaluation:
                finish(f"{prefix}/samples-dpo.jsonl", flops=2e9, n_samples=5000)
                finish(f"{prefix}/pairs.jsonl", pairs=1234)
                finish(f"{prefix}/dpo.json", flops=3e9)
            if iteration:
                finish(f"{prefix}/pseudo-labels.jsonl", pseudo_labels=0, examples=400)
            finish(f"{prefix}/evaluation.json", evaluation)
        finish(f"iteration-{len(evaluations)}/samples-dpo.jsonl", flops=5e9)
        return SimpleNamespace(
            directory=directory,
            method=method,
            preset=Preset(**changes),
            data=SimpleNamespace(name="toy", dev_name="toy/dev"),
            seed=3,
            path=lambda iteration: directory.path / f"iteration-{iteration}",
        )

    return begin


def without_dpo(evaluation: dict) -> dict:
    return {"sft": evaluation["sft"]}


def without(evaluation: dict, *sets: str, sampling: bool = True) -> dict:
    """An evaluation in which these sets, or the sampling, were left out."""
    return {
        model: {
            "greedy": {name: score for name, score in scores["greedy"].items() if name not in sets},
            "sampled": scores["sampled"] if sampling else None,
        }
        for model, scores in evaluation.items()
    }


# -- results.json -----------------------------------------------------------------------------------------------------


def test_results_of_every_finished_iteration(new_run):
    results = collect_results(new_run(), "tiny-t5")
    assert {name: results[name] for name in results if name not in ("iterations", "best_iteration")} == {
        "model": "tiny-t5",
        "method": "dpo-st",
        "seed": 3,
        "settings": SETTINGS,
        "dev": "toy/dev",
        "test": "toy/test",
    }
    assert collect_results(new_run(), "tiny-t5", "me/mine") == results | {"base": "me/mine"}
    first, second = results["iterations"]
    assert first == {
        "iteration": 0,
        "checkpoint": "iteration-0/sft",
        "accuracy": {
            "toy/dev": {
                "value": 0.3,
                "n": 20,
                "low": pytest.approx(0.1455, abs=1e-4),
                "high": pytest.approx(0.519, abs=1e-4),
            },
            "toy/test": score([1] * 5 + [0] * 15),
            "svamp/test": score([1] + [0] * 19),
        },
        "pass_at": EVALUATIONS[0]["sft"]["sampled"]["pass_at"],
        "maj_at": EVALUATIONS[0]["sft"]["sampled"]["maj_at"],
        "dpo": None,
        "pairs": None,
        "pseudo_labels": None,
        "seconds": 60.0,
        "flops": 1e9,
    }
    assert second["accuracy"]["toy/dev"]["value"] == 0.4
    assert (second["pairs"], second["pseudo_labels"], second["seconds"], second["flops"]) == (1234, 0, 150.0, 5e9)
    assert second["pass_at"] == EVALUATIONS[1]["sft"]["sampled"]["pass_at"]


def test_dpo_is_compared_with_the_iteration_before(new_run):
    """Not with the model that was fine-tuned after it."""
    dpo = collect_results(new_run(), "tiny-t5")["iterations"][1]["dpo"]
    assert dpo["checkpoint"] == "iteration-1/dpo"
    assert dpo["accuracy"] == {"toy/dev": score([1] * 7 + [0] * 13)}
    assert dpo["pass_at"] == EVALUATIONS[1]["dpo"]["sampled"]["pass_at"]
    change = dpo["difference"]
    assert Score(**change["accuracy"]["toy/dev"]) == paired_difference([1] * 6 + [0] * 14, [1] * 7 + [0] * 13)
    assert [*change["pass_at"]] == ["1", "2", "3", "4"]
    # A quarter of the questions went from 0 correct samples of 4 to 1, a quarter from 2 to 3.
    assert Score(**change["pass_at"]["1"]) == paired_difference([0, 0.25, 0.5, 1] * 5, [0.25, 0.25, 0.75, 1] * 5)
    assert change["pass_at"]["1"]["value"] == pytest.approx(1 / 8)
    assert change["pass_at"]["4"]["value"] == pytest.approx(1 / 4)
    assert change["maj_at"]["4"]["value"] == 0.0


def test_every_score_has_its_n_and_interval(new_run):
    """Wherever results.json has a score, however deep."""

    def scores(value: object) -> list[dict]:
        if not isinstance(value, dict):
            return [score for inner in value for score in scores(inner)] if isinstance(value, list) else []
        return [value] if "value" in value else [score for inner in value.values() for score in scores(inner)]

    results = collect_results(new_run(), "tiny-t5")
    found = scores(results)
    assert len(found) == 3 + 3 + 1 + 1 + 3 * (4 + 1) + 4 + 1
    for each in found:
        assert each.keys() == {"value", "n", "low", "high"}
        assert each["n"] == 20
        assert each["low"] <= each["value"] <= each["high"]


def test_iterations_1_and_10_are_told_apart(new_run):
    run = new_run()
    run.directory.stages["iteration-10/sft.json"] = {"seconds": 1e6, "flops": 1e20}
    assert collect_results(run, "tiny-t5")["iterations"][1]["flops"] == 5e9


@pytest.mark.parametrize(
    ("n_correct", "best"), [([6], 0), ([6, 8], 1), ([6, 8, 7], 1), ([6, 8, 8], 1), ([6, 6], 0), ([9, 8, 7], 0)]
)
def test_the_best_iteration_is_chosen_on_dev(new_run, n_correct, best):
    """The earliest in a tie, and whatever the test sets say."""
    run = new_run(
        [{"sft": {"greedy": greedy(toy_test=i, toy_dev=n), "sampled": None}} for i, n in enumerate(n_correct)], "st"
    )
    results = collect_results(run, "tiny-t5")
    assert results["best_iteration"] == best_iteration(results) == best
    assert f"Best on toy/dev: iteration {best}, " in recommendation(results)
    assert f"The model to use is in iteration-{best}/sft." in recommendation(results)


# -- tables -----------------------------------------------------------------------------------------------------------


def test_the_tables_have_a_row_for_each_iteration(new_run):
    first, second = map(cells, results_table(collect_results(new_run(), "tiny-t5")).split("\n\n"))
    assert first == [
        ["model", "toy/dev (n 20)", "toy/test (n 20)", "pass@4 (n 20)", "pairs", "pseudo-labels", "minutes", "FLOPs"],
        first[1],
        ["sft 0", "30.0% (14.5–51.9)", "25.0% (11.2–46.9)", "75.0% (53.1–88.8)", "–", "–", "1.0", "1e+09"],
        ["dpo-st 1", "40.0% (21.9–61.3)", "35.0% (18.1–56.7)", "100.0% (83.9–100.0)", "1,234", "0", "2.5", "5e+09"],
    ]
    assert second == [
        ["model", "svamp/test (n 20)"],
        second[1],
        ["sft 0", "5.0% (0.9–23.6)"],
        ["dpo-st 1", "10.0% (2.8–30.1)"],
    ]


def test_the_tables_fit_a_terminal(new_run):
    sets = {"toy_dev": 6, "toy_test": 5, "toy_longer": 1, "toy_words": 2, "toy_distractors": 3}
    table = results_table(
        collect_results(new_run([{"sft": {"greedy": greedy(**sets), "sampled": sampled(BEFORE)}}]), "t")
    )
    assert max(map(len, table.splitlines())) <= 120


def test_before_and_after_dpo(new_run):
    table = cells(before_and_after_table(collect_results(new_run(), "tiny-t5")))
    assert table == [
        ["iteration", "", "n", "before DPO", "after DPO", "difference"],
        table[1],
        ["1", "greedy accuracy", "20", "30.0% (14.5–51.9)", "35.0% (18.1–56.7)", "+5.0 (−4.8 to +14.8)"],
        ["1", "pass@1", "20", "43.8% (27.1–60.4)", "56.2% (41.6–70.9)", "+12.5 (+6.9 to +18.1)"],
        ["1", "pass@4", "20", "75.0% (53.1–88.8)", "100.0% (83.9–100.0)", "+25.0 (+5.5 to +44.5)"],
        ["1", "maj@4", "20", "50.0% (29.9–70.1)", "50.0% (29.9–70.1)", "+0.0 (+0.0 to +0.0)"],
    ]


def test_markdown_lines_up():
    assert markdown_table(["a", "long head"], [["long cell", "1"]]).splitlines() == [
        "| a         | long head |",
        "| --------- | --------- |",
        "| long cell | 1         |",
    ]


# -- report.md and the figures ----------------------------------------------------------------------------------------


def test_a_report_replaces_the_last_one(new_run):
    run = new_run()
    path = run.directory.path
    (path / "report.md").write_text("of iteration 0")
    text = write_report(run, "tiny-t5")
    results = collect_results(run, "tiny-t5")
    assert text == f"{results_table(results)}\n\n{recommendation(results)}"
    assert json.loads((path / "results.json").read_text()) == results
    report = (path / "report.md").read_text()
    assert report.startswith("# dpo-st · tiny-t5 · seed 3\n")
    assert text in report
    sentences = "Best on toy/dev: iteration 1, 40.0% (21.9–61.3), n 20. The model to use is in iteration-1/sft."
    assert f"\n\n{sentences}\n\n" in report
    assert "\n## Before and after DPO\n" in report
    assert before_and_after_table(results) in report
    for figure in ("accuracy.png", "pass_at_k.png"):
        assert f"(figures/{figure})" in report
        assert (path / "figures" / figure).read_bytes().startswith(b"\x89PNG\r\n")
    assert not list(path.rglob("*.unfinished"))


@pytest.mark.parametrize(
    ("evaluations", "method"), [(EVALUATIONS[:1], "dpo-st"), ([*map(without_dpo, EVALUATIONS)], "st")]
)
def test_without_dpo_there_is_no_comparison(new_run, evaluations, method):
    """Iteration 0 alone, or a method that has none."""
    run = new_run(evaluations, method)
    text = write_report(run, "tiny-t5")
    report = (run.directory.path / "report.md").read_text()
    assert text in report
    assert "DPO" not in report
    assert [path.name for path in (run.directory.path / "figures").iterdir()] == ["accuracy.png"]
    assert all(entry["dpo"] is None for entry in collect_results(run, "tiny-t5")["iterations"])


def test_without_samples_greedy_accuracy_is_compared(new_run):
    run = new_run([without(evaluation, sampling=False) for evaluation in EVALUATIONS], pass_at=1)
    write_report(run, "tiny-t5")
    results = collect_results(run, "tiny-t5")
    assert [row[1] for row in cells(before_and_after_table(results))[2:]] == ["greedy accuracy"]
    heads = cells(results_table(results))[0]
    assert heads == ["model", "toy/dev (n 20)", "toy/test (n 20)", "pairs", "pseudo-labels", "minutes", "FLOPs"]
    report = (run.directory.path / "report.md").read_text()
    assert "## Before and after DPO" in report
    assert "pass_at_k.png" not in report


def test_without_test_sets_there_is_one_table(new_run):
    run = new_run([without(evaluation, "toy/test", "svamp/test") for evaluation in EVALUATIONS], test_questions=0)
    write_report(run, "tiny-t5")
    table = cells(results_table(collect_results(run, "tiny-t5")))
    assert table[0] == ["model", "toy/dev (n 20)", "pass@4 (n 20)", "pairs", "pseudo-labels", "minutes", "FLOPs"]
    assert len(table) == 4


def test_without_a_warm_up_iteration_0_is_the_base(new_run):
    worse = [EVALUATIONS[1] | {"sft": EVALUATIONS[0]["sft"]}, EVALUATIONS[0]]
    run = new_run([without_dpo(worse[0]), worse[1]], "st", warm_up=False)
    write_report(run, "tiny-t5")
    results = collect_results(run, "tiny-t5")
    assert [entry["checkpoint"] for entry in results["iterations"]] == [None, "iteration-1/sft"]
    assert [row[0] for row in cells(results_table(results).split("\n\n")[0])[2:]] == ["base", "st 1"]
    assert "the model to use: the base itself, tiny-t5, 30.0% (14.5–51.9), n 20." in recommendation(results)


def test_the_figure_of_accuracy_shows_every_set(new_run, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    plotted = {}
    original = Axes.errorbar

    def errorbar(self, x, y, yerr, label, **rest):
        plotted[label] = (x, y, yerr)
        return original(self, x, y, yerr=yerr, label=label, **rest)

    monkeypatch.setattr(Axes, "errorbar", errorbar)
    plot_accuracy(collect_results(new_run(), "tiny-t5"), tmp_path / "figures" / "a.png")
    assert (tmp_path / "figures" / "a.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert plotted.keys() == {"toy/dev (n 20)", "toy/test (n 20)", "svamp/test (n 20)"}
    iterations, values, around = plotted["toy/test (n 20)"]
    assert iterations == [0, 1]
    assert values == pytest.approx([25, 35])
    scores = [evaluation["sft"]["greedy"]["toy/test"] for evaluation in EVALUATIONS]
    assert around == [
        pytest.approx([100 * (score["value"] - score["low"]) for score in scores]),
        pytest.approx([100 * (score["high"] - score["value"]) for score in scores]),
    ]


def test_the_figure_of_pass_at_k_shows_before_and_after(new_run, tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    lines, bands, across, bars = [], [], [], []

    def noting(name, note):
        original = vars(Axes)[name]

        def plot(self, *arguments, **options):
            note(*arguments, **options)
            return original(self, *arguments, **options)

        monkeypatch.setattr(Axes, name, plot)

    noting("plot", lambda k, values, *rest, label, **more: lines.append((label, k, values)))
    noting("fill_between", lambda k, low, high, **more: bands.append((k, low, high)))
    noting("axhline", lambda y, *, linestyle, label, **more: across.append((label, linestyle, y)))
    noting("errorbar", lambda x, y, *, yerr, **more: bars.append((y, yerr)))
    plot_pass_at_k(collect_results(new_run(), "tiny-t5"), tmp_path / "p.png")

    before, after = EVALUATIONS[0]["sft"], EVALUATIONS[1]["dpo"]
    for (label, k, values), (_, low, high), scores, name in zip(
        lines, bands, (before, after), ("before DPO", "after DPO"), strict=True
    ):
        passed = scores["sampled"]["pass_at"].values()
        assert (label, k) == (f"pass@k {name}", [1, 2, 3, 4])
        assert values == pytest.approx([100 * score["value"] for score in passed])
        assert low == pytest.approx([100 * score["low"] for score in passed])
        assert high == pytest.approx([100 * score["high"] for score in passed])
    assert across == [("greedy before DPO", "--", pytest.approx(30)), ("greedy after DPO", "--", pytest.approx(35))]
    assert [values for values, _ in bars] == [[pytest.approx(30)], [pytest.approx(35)]]
    assert bars[0][1] == [[pytest.approx(30 - 14.55, abs=0.1)], [pytest.approx(51.9 - 30, abs=0.1)]]


@pytest.mark.parametrize("n_iterations", [2, 4, 5])
def test_the_figure_of_pass_at_k_has_a_panel_for_each_dpo(new_run, tmp_path, monkeypatch, n_iterations):
    from matplotlib.figure import Figure

    titles = []
    original = Figure.savefig

    def savefig(self, *arguments, **options):
        titles.extend(axes.get_title() for axes in self.axes if axes.get_visible())
        return original(self, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    run = new_run([EVALUATIONS[0], *[EVALUATIONS[1]] * (n_iterations - 1)])
    plot_pass_at_k(collect_results(run, "tiny-t5"), tmp_path / "p.png")
    assert titles == [f"iteration {iteration}" for iteration in range(1, n_iterations)]
