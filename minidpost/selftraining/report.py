"""The results of a run: results.json, a Markdown table, and accuracy by iteration as in the paper's figure 5."""

from pathlib import Path
from typing import Any

from minidpost.selftraining.run import Run
from minidpost.storage import markdown_table, read_json, staged_file, write_json


def write_report(run: Run, model: str) -> str:
    """Write results.json, report.md and figures/accuracy.png of the finished iterations; returns the table.

    `model` is the base model's name.
    """
    directory = run.directory.path
    results = collect_results(run, model)
    write_json(directory / "results.json", results)
    table = results_table(results)
    heading = f"# {results['method']} · {model} · seed {results['seed']}"
    with staged_file(directory / "report.md") as temporary:
        temporary.write_text(
            f"{heading}\n\n{table}\n\n![accuracy by iteration](figures/accuracy.png)\n", encoding="utf-8"
        )
    plot_accuracy(results, directory / "figures" / "accuracy.png")
    return table


def collect_results(run: Run, model: str) -> dict[str, Any]:
    """The content of results.json: the run's settings, and what was measured in each finished iteration."""
    iterations: list[dict[str, Any]] = []
    while (path := run.path(len(iterations)) / "evaluation.json").is_file():
        iterations.append(iteration_result(run, len(iterations), read_json(path)))
    return {
        "model": model,
        "method": run.method,
        "seed": run.seed,
        "settings": run.directory.settings,
        "iterations": iterations,
    }


def iteration_result(run: Run, iteration: int, evaluation: Any) -> dict[str, Any]:
    """One entry of results.json; accuracies in [0, 1], FLOPs of sampling and training (evaluation not counted).

    `evaluation` is the content of the iteration's evaluation.json. `pairs` and `pseudo_labels` are None where the
    method has none.
    """
    prefix = f"iteration-{iteration}/"
    stages = {name: metadata for name, metadata in run.directory.stages.items() if name.startswith(prefix)}
    greedy = evaluation["greedy"]
    sampled = evaluation["sampled"]
    result = {
        "iteration": iteration,
        "accuracy": {name: score["value"] for name, score in greedy.items()},
        "interval": {name: [score["low"], score["high"]] for name, score in greedy.items()},
        "pass_at_1": sampled["sft"]["pass_at_1"]["value"],
        "pass_at_10": sampled["sft"]["pass_at_10"]["value"],
        "pairs": stages.get(f"{prefix}pairs.jsonl", {}).get("pairs"),
        "pseudo_labels": stages.get(f"{prefix}pseudo-labels.jsonl", {}).get("pseudo_labels"),
        "seconds": round(sum(metadata["seconds"] for metadata in stages.values()), 1),
        "flops": sum(metadata.get("flops", 0.0) for metadata in stages.values()),
    }
    if "dpo" in sampled:
        result["dpo"] = {name: score["value"] for name, score in sampled["dpo"].items()}
    return result


def results_table(results: dict[str, Any]) -> str:
    """The results as a Markdown table, a row for each iteration."""
    set_names = list(results["iterations"][0]["accuracy"])
    heads = ["method", "iteration", *set_names, "pass@10", "pairs", "pseudo-labels", "minutes", "FLOPs"]
    rows = []
    for entry in results["iterations"]:
        rows.append(
            [
                results["method"] if entry["iteration"] else "sft",
                str(entry["iteration"]),
                *(f"{entry['accuracy'][name]:.1%}" for name in set_names),
                f"{entry['pass_at_10']:.1%}",
                *("–" if entry[name] is None else f"{entry[name]:,}" for name in ("pairs", "pseudo_labels")),
                f"{entry['seconds'] / 60:.1f}",
                f"{entry['flops']:.2g}",
            ]
        )
    return markdown_table(heads, rows)


def plot_accuracy(results: dict[str, Any], path: Path) -> None:
    """Write a PNG of accuracy by iteration, a line for each set, with 95 % intervals."""
    import matplotlib  # here: slow to import, and only a finished iteration needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    entries = results["iterations"]
    iterations = [entry["iteration"] for entry in entries]
    for name in entries[0]["accuracy"]:
        values = [100 * entry["accuracy"][name] for entry in entries]
        below = [100 * (entry["accuracy"][name] - entry["interval"][name][0]) for entry in entries]
        above = [100 * (entry["interval"][name][1] - entry["accuracy"][name]) for entry in entries]
        line = "--" if name.endswith("/dev") else "-"
        axes.errorbar(iterations, values, yerr=[below, above], fmt="o" + line, capsize=3, markersize=4, label=name)
    axes.set_xticks(iterations, ["SFT" if iteration == 0 else str(iteration) for iteration in iterations])
    axes.set_xlabel("iteration")
    axes.set_ylabel("greedy accuracy (%)")
    axes.set_title(f"{results['method']} · {results['model']} · seed {results['seed']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    with staged_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)
