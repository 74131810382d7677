"""What a run found: results.json, a table, and the figure of accuracy by iteration (in the manner of the paper's 5)."""

import json
from pathlib import Path

from minidpost.selftraining.algorithm import Run
from minidpost.storage import markdown_table, staged_file, write_json


def collect(run: Run, model: str) -> dict:
    """results.json of a run so far: settings, and for each finished iteration what was measured."""
    iterations = []
    while (path := run.path(len(iterations)) / "evaluation.json").is_file():
        iterations.append(iteration_result(run, len(iterations), json.loads(path.read_text(encoding="utf-8"))))
    settings = run.directory.settings
    return {"model": model, "method": run.method, "seed": run.seed, "settings": settings, "iterations": iterations}


def iteration_result(run: Run, number: int, evaluation: dict) -> dict:
    """One entry of results.json; accuracies in [0, 1], FLOPs of sampling and training (evaluation not counted)."""
    stages = {name: facts for name, facts in run.directory.facts.items() if name.startswith(f"iteration-{number}/")}

    def fact(stage: str, name: str) -> int | None:
        return stages.get(f"iteration-{number}/{stage}", {}).get(name)

    sampled = evaluation["sampled"]
    result = {
        "iteration": number,
        "accuracy": {name: score["value"] for name, score in evaluation["greedy"].items()},
        "interval": {name: [score["low"], score["high"]] for name, score in evaluation["greedy"].items()},
        "pass_at_1": sampled["sft"]["pass_at_1"]["value"],
        "pass_at_10": sampled["sft"]["pass_at_10"]["value"],
        "pairs": fact("pairs.jsonl", "pairs"),
        "pseudo_labels": fact("pseudo-labels.jsonl", "pseudo_labels"),
        "seconds": round(sum(facts["seconds"] for facts in stages.values()), 1),
        "flops": sum(facts.get("flops", 0.0) for facts in stages.values()),
    }
    if "dpo" in sampled:
        result["dpo"] = {name: score["value"] for name, score in sampled["dpo"].items()}
    return result


def table(results: dict) -> str:
    """The results as a Markdown table, a row an iteration."""
    names = list(results["iterations"][0]["accuracy"])
    heads = ["method", "iteration", *names, "pass@10", "pairs", "pseudo-labels", "minutes", "FLOPs"]
    rows = []
    for entry in results["iterations"]:
        method = results["method"] if entry["iteration"] else "sft"
        shown = [f"{entry['accuracy'][name]:.1%}" for name in names]
        counts = ["–" if entry[name] is None else f"{entry[name]:,}" for name in ("pairs", "pseudo_labels")]
        time_and_work = [f"{entry['seconds'] / 60:.1f}", f"{entry['flops']:.2g}"]
        rows.append([method, str(entry["iteration"]), *shown, f"{entry['pass_at_10']:.1%}", *counts, *time_and_work])
    return markdown_table(heads, rows)


def draw_accuracy(results: dict, path: Path) -> None:
    """Accuracy by iteration, a line for each set, with 95 % intervals."""
    import matplotlib  # here: slow to import, and only a finished iteration needs it

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    iterations = results["iterations"]
    numbers = [entry["iteration"] for entry in iterations]
    for name in iterations[0]["accuracy"]:
        values = [100 * entry["accuracy"][name] for entry in iterations]
        below = [value - 100 * entry["interval"][name][0] for value, entry in zip(values, iterations, strict=True)]
        above = [100 * entry["interval"][name][1] - value for value, entry in zip(values, iterations, strict=True)]
        style = "--" if name.endswith("/dev") else "-"
        axes.errorbar(numbers, values, yerr=[below, above], fmt="o" + style, capsize=3, markersize=4, label=name)
    axes.set_xticks(numbers, ["SFT" if number == 0 else f"{number}" for number in numbers])
    axes.set_xlabel("iteration")
    axes.set_ylabel("greedy accuracy (%)")
    axes.set_title(f"{results['method']} · {results['model']} · seed {results['seed']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    with staged_file(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
    pyplot.close(figure)


def write_report(run: Run, model: str) -> str:
    """Write results.json, report.md and figures/accuracy.png of what is finished; returns the table."""
    results = collect(run, model)
    write_json(run.directory.path / "results.json", results)
    text = table(results)
    with staged_file(run.directory.path / "report.md") as temporary:
        heading = f"# {results['method']} · {model} · seed {results['seed']}"
        temporary.write_text(
            f"{heading}\n\n{text}\n\n![accuracy by iteration](figures/accuracy.png)\n", encoding="utf-8"
        )
    draw_accuracy(results, run.directory.path / "figures" / "accuracy.png")
    return text
