"""The results of a run: results.json, report.md and two figures, as the paper's figures 5 and 6.

Every accuracy stands with its 95 % interval and the number of questions n. In results.json it is an object of `value`,
`n`, `low` and `high`; in tables it is `46.4% (43.2–49.6)`, and n is in the column's head. "Before" a DPO is the model
that it starts from, f_θ' of the iteration before; "after" is what it makes of it, f_θd.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from minidpost.selftraining.evaluation import paired_difference, pass_at_k, percent
from minidpost.selftraining.run import Run
from minidpost.storage import markdown_table, read_json, staged_file, write_json

PANELS_IN_A_ROW = 3  # of the figure of pass@k, which has a panel for each DPO


# -- results.json -----------------------------------------------------------------------------------------------------


def write_report(run: Run, model: str, base: str | None = None) -> str:
    """Write results.json, report.md and figures/ of the finished iterations; returns what a terminal shows of them.

    `model` is the base model's name, `base` where it is found again: what `find_model` was given.
    """
    directory = run.directory.path
    results = collect_results(run, model, base)
    write_json(directory / "results.json", results)
    with staged_file(directory / "report.md") as temporary:
        temporary.write_text(report_page(results), encoding="utf-8")
    plot_accuracy(results, directory / "figures" / "accuracy.png")
    if can_plot_pass_at_k(results):
        plot_pass_at_k(results, directory / "figures" / "pass_at_k.png")
    return f"{results_table(results)}\n\n{recommendation(results)}"


def collect_results(run: Run, model: str, base: str | None = None) -> dict[str, Any]:
    """The content of results.json: the run's settings, what was measured in each finished iteration, and the best one.

    `base` is as in `write_report`, and stands there where it is known. `dev` and `test` name the set by which an
    iteration is chosen, and the test set of the same data, which may not be among those that were measured.
    """
    evaluations: list[Any] = []
    while (path := run.path(len(evaluations)) / "evaluation.json").is_file():
        evaluations.append(read_json(path))
    results = assemble_results(
        model=model,
        method=run.method,
        seed=run.seed,
        settings=run.directory.settings,
        data_name=run.data.name,
        has_warm_up=run.preset.warm_up,
        stages=run.directory.stages,
        evaluations=evaluations,
    )
    return results if base is None else {**results, "base": base}


def assemble_results(
    *,
    model: str,
    method: str,
    seed: int,
    settings: Mapping[str, Any],
    data_name: str,
    has_warm_up: bool,
    stages: Mapping[str, Mapping[str, Any]],
    evaluations: Sequence[Any],
) -> dict[str, Any]:
    """The content of results.json from a run's files alone: its settings, stages.jsonl and each evaluation.json.

    `stages` has the metadata of the finished stages by name; `evaluations` are the contents of evaluation.json by
    iteration.
    """
    results = {
        "model": model,
        "method": method,
        "seed": seed,
        "settings": settings,
        "dev": f"{data_name}/dev",
        "test": f"{data_name}/test",
        "iterations": [
            iteration_result(
                iteration, evaluations, stages=stages, dev_name=f"{data_name}/dev", has_warm_up=has_warm_up
            )
            for iteration in range(len(evaluations))
        ],
    }
    results["best_iteration"] = best_iteration(results)
    return results


def best_iteration(results: dict[str, Any]) -> int:
    """The iteration with the best greedy accuracy on dev, the earliest in a tie, from the content of results.json."""
    accuracies = [entry["accuracy"][results["dev"]]["value"] for entry in results["iterations"]]
    return accuracies.index(max(accuracies))


def iteration_result(
    iteration: int,
    evaluations: Sequence[Any],
    *,
    stages: Mapping[str, Mapping[str, Any]],
    dev_name: str,
    has_warm_up: bool,
) -> dict[str, Any]:
    """One entry of results.json, with the FLOPs of sampling and training (evaluation is not counted).

    `evaluations` are the contents of evaluation.json by iteration. `dpo` is None in an iteration without DPO, `pairs`
    and `pseudo_labels` are None where the method has none; `checkpoint` is the directory of f_θ' within the run's, or
    None where that is the base itself; `removed` is there where its weights are not.
    """
    prefix = f"iteration-{iteration}/"
    of_iteration = {name: metadata for name, metadata in stages.items() if name.startswith(prefix)}
    evaluation = evaluations[iteration]
    is_base = iteration == 0 and not has_warm_up
    result = {
        "iteration": iteration,
        "checkpoint": None if is_base else f"{prefix}sft",
        **model_scores(evaluation["sft"]),
        "dpo": None,
        "pairs": of_iteration.get(f"{prefix}pairs.jsonl", {}).get("pairs"),
        "pseudo_labels": of_iteration.get(f"{prefix}pseudo-labels.jsonl", {}).get("pseudo_labels"),
        "seconds": round(sum(metadata["seconds"] for metadata in of_iteration.values()), 1),
        "flops": sum(metadata.get("flops", 0.0) for metadata in of_iteration.values()),
    }
    if "removed" in stages.get(f"{prefix}sft", {}):
        result["removed"] = True  # the weights of the checkpoint (--keep)
    if "dpo" in evaluation:
        before = evaluations[iteration - 1]["sft"]
        after = evaluation["dpo"]
        result["dpo"] = {
            "checkpoint": f"{prefix}dpo",
            **model_scores(after),
            "difference": differences(before, after, dev_name),
        }
    return result


def model_scores(scores: Any) -> dict[str, Any]:
    """The scores of one model in an evaluation.json, without the outcomes of each question."""
    sampled = scores["sampled"] or {"pass_at": {}, "maj_at": {}}
    return {
        "accuracy": {
            name: {field: score[field] for field in ("value", "n", "low", "high")}
            for name, score in scores["greedy"].items()
        },
        "pass_at": sampled["pass_at"],
        "maj_at": sampled["maj_at"],
    }


def differences(before: Any, after: Any, dev_name: str) -> dict[str, Any]:
    """What DPO changed on dev: after − before of each score, with intervals from the differences of each question.

    `before` and `after` are the scores of two models in evaluation.json.
    """
    greedy = paired_difference(before["greedy"][dev_name]["correct"], after["greedy"][dev_name]["correct"])
    result: dict[str, Any] = {"accuracy": {dev_name: asdict(greedy)}, "pass_at": {}, "maj_at": {}}
    if after["sampled"] is None:
        return result
    n_samples = after["sampled"]["n_samples"]
    for k in after["sampled"]["pass_at"]:
        passed_before, passed_after = (
            [pass_at_k(n_samples, n_correct, int(k)) for n_correct in scores["sampled"]["n_correct"]]
            for scores in (before, after)
        )
        result["pass_at"][k] = asdict(paired_difference(passed_before, passed_after))
    for k in after["sampled"]["maj_at"]:
        majority_before, majority_after = (scores["sampled"]["majority"][k] for scores in (before, after))
        result["maj_at"][k] = asdict(paired_difference(majority_before, majority_after))
    return result


# -- tables -----------------------------------------------------------------------------------------------------------


def report_page(results: dict[str, Any]) -> str:
    """The content of report.md."""
    parts = [
        f"# {results['method']} · {results['model']} · seed {results['seed']}",
        "Greedy accuracy on each set, and pass@k: the chance that at least one of k samples of a question is correct. "
        "In brackets the 95 % interval; n is the number of questions.",
        results_table(results),
        recommendation(results),
        "![accuracy by iteration](figures/accuracy.png)",
    ]
    if dpo_entries(results):
        parts += [
            "## Before and after DPO",
            f"On {results['dev']}: the model that a DPO starts from, which is the one fine-tuned in the iteration "
            "before, and the model that it makes of it. The difference, after minus before, is in points; its interval "
            "compares them question by question, and so is narrower than the two beside it suggest. pass@k, and maj@k "
            "(whether the commonest answer of k samples is correct), are of sampled completions.",
            before_and_after_table(results),
        ]
    if can_plot_pass_at_k(results):
        parts.append("![pass@k before and after each DPO](figures/pass_at_k.png)")
    return "\n\n".join(parts) + "\n"


def results_table(results: dict[str, Any]) -> str:
    """The results as Markdown, a row for each iteration: dev, the test set and pass@k; then the other test sets."""
    return "\n\n".join(markdown_table(heads, rows) for heads, rows in results_rows(results))


def results_rows(results: dict[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """The heads and rows of the tables of `results_table`."""
    entries = results["iterations"]
    names = list(entries[0]["accuracy"])
    main = [name for name in names if name in (results["dev"], results["test"])]
    heads = ["model", *(head(name, entries[0]["accuracy"][name]) for name in main)]
    largest_k = list(entries[0]["pass_at"])[-1:]  # none where nothing was sampled
    heads += [head(f"pass@{k}", entries[0]["pass_at"][k]) for k in largest_k]
    heads += ["pairs", "pseudo-labels", "minutes", "FLOPs"]
    rows = []
    for entry in entries:
        rows.append(
            [
                row_name(results, entry),
                *(percent(entry["accuracy"][name]) for name in main),
                *(percent(entry["pass_at"][k]) for k in largest_k),
                *("–" if entry[name] is None else f"{entry[name]:,}" for name in ("pairs", "pseudo_labels")),
                f"{entry['seconds'] / 60:.1f}",
                f"{entry['flops']:.2g}",
            ]
        )
    tables = [(heads, rows)]

    others = [name for name in names if name not in main]
    if others:
        heads = ["model", *(head(name, entries[0]["accuracy"][name]) for name in others)]
        rows = [[row_name(results, entry), *(percent(entry["accuracy"][name]) for name in others)] for entry in entries]
        tables.append((heads, rows))
    return tables


def head(name: str, score: dict[str, Any]) -> str:
    """The head of a column of scores: `toy/test (n 500)`."""
    return f"{name} (n {score['n']})"


def row_name(results: dict[str, Any], entry: dict[str, Any]) -> str:
    """A fine-tuned model in a table: `dpo-st 2`; that of iteration 0 is the same for all methods, `sft 0`."""
    if entry["checkpoint"] is None:
        return "base"
    return f"{results['method'] if entry['iteration'] else 'sft'} {entry['iteration']}"


def recommendation(results: dict[str, Any]) -> str:
    """Which model to use, in words: the best on dev, and its directory within the run's."""
    entry = results["iterations"][results["best_iteration"]]
    score = entry["accuracy"][results["dev"]]
    measured = f"{percent(score)}, n {score['n']}"
    if entry["checkpoint"] is None:
        return f"Best on {results['dev']}, and the model to use: the base itself, {results['model']}, {measured}."
    best = f"Best on {results['dev']}: iteration {entry['iteration']}, {measured}."
    if "removed" in entry:
        last = results["iterations"][-1]
        return f"{best} Its weights were removed (--keep last); the last model is in {last['checkpoint']}."
    return f"{best} The model to use is in {entry['checkpoint']}."


def dpo_entries(results: dict[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Of each iteration with a DPO: the entry of the iteration before, and its own."""
    entries = results["iterations"]
    return [(before, entry) for before, entry in pairwise(entries) if entry["dpo"] is not None]


def before_and_after_table(results: dict[str, Any]) -> str:
    """Greedy accuracy, pass@1, pass@k and maj@k on dev before and after each DPO, as Markdown."""
    return markdown_table(*before_and_after_rows(results))


def before_and_after_rows(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """The heads and rows of `before_and_after_table`."""
    rows = []
    for before, entry in dpo_entries(results):
        after = entry["dpo"]
        measures = [("accuracy", results["dev"], "greedy accuracy")]
        pass_at = list(after["pass_at"])
        measures += [("pass_at", k, f"pass@{k}") for k in (*pass_at[:1], *pass_at[-1:])]
        measures += [("maj_at", k, f"maj@{k}") for k in after["maj_at"]]
        for kind, key, name in measures:
            change = after["difference"][kind][key]
            cells = [percent(scores[kind][key]) for scores in (before, after)]
            rows.append([str(entry["iteration"]), name, str(change["n"]), *cells, points(change)])
    return ["iteration", "", "n", "before DPO", "after DPO", "difference"], rows


def points(difference: dict[str, Any]) -> str:
    """A difference and its interval, in points: `+1.9 (−0.6 to +4.4)`."""
    value, low, high = (f"{100 * difference[field]:+.1f}".replace("-", "−") for field in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


# -- figures ----------------------------------------------------------------------------------------------------------


def plot_accuracy(results: dict[str, Any], path: Path) -> None:
    """Write a PNG of greedy accuracy by iteration, a line for each set, with 95 % intervals (the paper's figure 5)."""
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(7.6, 4.2), layout="constrained")
    entries = results["iterations"]
    iterations = [entry["iteration"] for entry in entries]
    for name, first_score in entries[0]["accuracy"].items():
        scores = [entry["accuracy"][name] for entry in entries]
        line = "--" if name == results["dev"] else "-"
        axes.errorbar(
            iterations,
            [100 * score["value"] for score in scores],
            yerr=error_bars(scores),
            fmt="o" + line,
            capsize=3,
            markersize=4,
            label=head(name, first_score),
        )
    names = ["base" if entry["checkpoint"] is None else str(entry["iteration"]) for entry in entries]
    axes.set_xticks(iterations, ["SFT" if name == "0" else name for name in names])
    axes.set_xlabel("iteration")
    axes.set_ylabel("greedy accuracy (%), 95 % intervals")
    axes.set_title(f"{results['method']} · {results['model']} · seed {results['seed']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    save(figure, path)


def can_plot_pass_at_k(results: dict[str, Any]) -> bool:
    """Whether there was a DPO, and dev was sampled before and after it."""
    return any(entry["dpo"]["pass_at"] for _, entry in dpo_entries(results))


def plot_pass_at_k(results: dict[str, Any], path: Path) -> None:
    """Write a PNG of pass@k by k before and after each DPO, with 95 % intervals (the paper's figure 6).

    Dashed lines are greedy accuracy on dev, their intervals at the right.
    """
    pyplot = import_pyplot()
    from matplotlib.ticker import MaxNLocator

    panels = dpo_entries(results)
    n_columns = min(len(panels), PANELS_IN_A_ROW)
    n_rows = -(-len(panels) // n_columns)  # rounded up
    figure, grid = pyplot.subplots(
        n_rows,
        n_columns,
        figsize=(max(5.2, 3.4 * n_columns), 3.3 * n_rows + 0.9),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (before, entry) in zip(grid.flat, panels, strict=False):
        for scores, name, colour, shift in (
            (before, "before DPO", "tab:blue", 0.6),
            (entry["dpo"], "after DPO", "tab:orange", 0.9),
        ):
            k = [int(key) for key in scores["pass_at"]]
            passed = [scores["pass_at"][key] for key in scores["pass_at"]]
            axes.fill_between(
                k,
                [100 * score["low"] for score in passed],
                [100 * score["high"] for score in passed],
                color=colour,
                alpha=0.15,
                linewidth=0,
            )
            values = [100 * score["value"] for score in passed]
            axes.plot(k, values, "o-", color=colour, markersize=3.5, label=f"pass@k {name}")
            # Greedy accuracy has no k: a line across, with its interval at the right end.
            greedy = scores["accuracy"][results["dev"]]
            axes.axhline(100 * greedy["value"], color=colour, linestyle="--", linewidth=1.2, label=f"greedy {name}")
            axes.errorbar(
                [max(k) + shift],
                [100 * greedy["value"]],
                yerr=error_bars([greedy]),
                color=colour,
                fmt="none",
                capsize=2,
            )
        axes.set_title(f"iteration {entry['iteration']}", fontsize=10)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("k")
        axes.grid(alpha=0.3)
    handles, labels = grid.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4 if n_columns > 1 else 2, fontsize=8)
    entry = panels[0][1]["dpo"]
    n_sampled = next(iter(entry["pass_at"].values()))["n"]
    n_greedy = entry["accuracy"][results["dev"]]["n"]
    figure.suptitle(f"{results['method']} · {results['model']} · seed {results['seed']}", fontsize=11)
    numbers = f"n {n_sampled}" if n_sampled == n_greedy else f"pass@k n {n_sampled}, greedy n {n_greedy}"
    figure.supylabel(f"{results['dev']} (%), {numbers}, 95 % intervals", fontsize=10)
    save(figure, path)


def import_pyplot() -> Any:
    """matplotlib.pyplot, set to write files; imported late, as it is slow and only a finished iteration needs it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def error_bars(scores: list[dict[str, Any]]) -> list[list[float]]:
    """How far the intervals of scores reach below and above them, in percent."""
    below = [100 * (score["value"] - score["low"]) for score in scores]
    above = [100 * (score["high"] - score["value"]) for score in scores]
    return [below, above]


def save(figure: Any, path: Path) -> None:
    """Write a figure as PNG, atomically, and close it."""
    with staged_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    import_pyplot().close(figure)
