"""The paper's tables and figures from our runs, as plain data that a page, matplotlib and a table writer can show.

Each exhibit is a dict of `id`, `title`, `caption`, `notes` and

    kind "table":    `parts` of `title`, `heads` and `rows`; a row has `origin` ("ours", "paper") and `cells`, each a
                     text or a score with its `text`
    kind "lines":    `panels` of `title`, `x`, `y` and `series` of `name`, `origin`, `colour` and `points`
    kind "bars":     `panels` of `title`, `y`, `groups` and `series`, whose `points` are by group, None where there is
                     none
    kind "missing":  `needs`, what the runs at hand lack, and `command`, which would make it

Scores are fractions, as in the files; the paper's too. The model of a method is that of the iteration with the best
accuracy on dev. Runs that differ by their seed alone are one row: each question's outcome is averaged over the seeds,
and the interval is that of the mean over questions. Differences are paired by question.
"""

import json
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from minidpost.page import paper
from minidpost.page.runs import BROKEN, Files, RunFiles
from minidpost.sampling.generate import Sample
from minidpost.selftraining.evaluation import mean_score, paired_difference, percent
from minidpost.selftraining.flags import written
from minidpost.selftraining.methods import METHODS
from minidpost.selftraining.presets import PRESETS, Preset
from minidpost.selftraining.report import points, row_name
from minidpost.selftraining.selection import Candidates, pseudo_labels
from minidpost.storage import read_jsonl
from minidpost.training.batching import TokenizedExample

# Hyperparameters that change results only by rounding and by which units dropout hits, or that say how far a run goes.
NOT_A_VARIANT = {"slots", "micro_batch_tokens", "activation_checkpointing", "iterations", "patience"}
# Settings outside the preset that results depend on.
VARIANT_SETTINGS = ("template", "dtype", "train_dtype")
# How the names begin of what SFT and its evaluation depend on; other settings do not change the warm-up.
OF_WARM_UP = (
    "warm_up",
    "sft_",
    "lora_",
    "learning_rate",
    "weight_decay",
    "max_grad_norm",
    "max_source",
    "max_target",
    "max_new_tokens",
    *VARIANT_SETTINGS,
)
METHOD_NAMES = {"sft": "SFT", "st": "ST", "dpo-st": "DPO-ST", "rft": "RFT", "rest-em": "ReST-EM"}
METHOD_ORDER = ["sft", "st", "rft", "rest-em", "dpo-st"]
N_CELL = re.compile(r"([0-9][0-9,]*(?:\.[0-9]+)?)")


def all_exhibits(runs: Sequence[RunFiles], *, benchmark: Path | None, files: Files) -> list[dict[str, Any]]:
    """Every exhibit of the paper, in its order; `benchmark` is the file that benchmarks/sampling.py wrote."""
    measured = [run for run in runs if run.results is not None]
    makers: list[tuple[str, Callable[[], dict[str, Any]]]] = [
        ("figure-1", lambda: figure_1(measured)),
        ("table-2", lambda: table_2(measured)),
        ("figure-4", lambda: figure_4(benchmark)),
        ("figure-5", lambda: figure_5(measured)),
        ("table-3", lambda: table_3(measured)),
        ("table-4", lambda: table_4(measured)),
        ("figure-6", lambda: figure_6(measured, files)),
        ("figure-7", lambda: figure_7(measured)),
    ]
    found = []
    for name, make in makers:
        try:
            found.append(make())
        except BROKEN as error:  # each file is as it should be, but they do not fit together
            title = name.replace("-", " ").capitalize()
            needs = f"runs whose files fit together ({error!s:.100})"
            found.append(missing(name, title, needs=needs, making=command(None)))
    return found


# -- which runs belong together ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One model of a method: that of the best iteration of each run, the runs differing by their seed alone."""

    method: str
    runs: tuple[RunFiles, ...]
    iterations: tuple[int, ...]
    variant: str = ""

    @property
    def label(self) -> str:
        """The method as a table shows it; without a warm-up the model of iteration 0 is the base itself."""
        is_base = self.method == "sft" and self.runs[0].setting("warm_up") is False
        name = "base" if is_base else METHOD_NAMES.get(self.method, self.method)
        return f"{name} ({self.variant})" if self.variant else name

    @property
    def seeds(self) -> str:
        """The seeds and the iterations that were taken: `seed 42, iteration 2`."""
        return f"{listed('seed', [run.seed for run in self.runs])}, {listed('iteration', self.iterations)}"

    def outcomes(self, set_name: str, seeds: Iterable[object] | None = None) -> list[float] | None:
        """Each question's outcome, averaged over the runs, or those of some seeds; None where they do not match."""
        wanted = None if seeds is None else set(seeds)
        lists = [
            run.correct(iteration, set_name)
            for run, iteration in zip(self.runs, self.iterations, strict=True)
            if wanted is None or run.seed in wanted
        ]
        known = [correct for correct in lists if correct]
        if not known or len(known) < len(lists) or len({len(correct) for correct in known}) > 1:
            return None
        return [sum(of_question) / len(known) for of_question in zip(*known, strict=True)]

    def score(self, set_name: str) -> dict[str, Any] | None:
        """The accuracy on a set: of one run as its file has it, of several over their averaged outcomes."""
        if len(self.runs) == 1:
            return result_of(self.runs[0], self.iterations[0], set_name)
        outcomes = self.outcomes(set_name)
        return None if outcomes is None else asdict(mean_score(outcomes))


def listed(word: str, values: Sequence[object]) -> str:
    """`seed 42`, `seeds 1, 2`."""
    return f"{word}{'s' if len(values) > 1 else ''} {', '.join(map(str, values))}"


def result_of(run: RunFiles, iteration: int, set_name: str) -> dict[str, Any] | None:
    """An accuracy of results.json."""
    entries = run.results["iterations"] if run.results else []
    score: dict[str, Any] | None = entries[iteration]["accuracy"].get(set_name) if iteration < len(entries) else None
    return score


def family(run: RunFiles) -> tuple[str, ...]:
    """What two runs must share to be compared: base model, data, calculator."""
    names = ("weights", "examples")
    has_no_calculator = bool(run.setting("no_calculator"))
    return (run.model, run.data_name, *(str(run.setting(name)) for name in names), str(has_no_calculator))


def families(runs: Sequence[RunFiles]) -> list[list[RunFiles]]:
    """The runs that can be compared with each other, in their order."""
    groups: dict[tuple[str, ...], list[RunFiles]] = {}
    for run in runs:
        groups.setdefault(family(run), []).append(run)
    return list(groups.values())


def family_title(runs: Sequence[RunFiles]) -> str:
    """A family in words: `tiny-t5 on toy`."""
    run = runs[0]
    return f"{run.model} on {run.data_name}" + (", no calculator" if run.setting("no_calculator") else "")


def variant_of(run: RunFiles) -> dict[str, Any]:
    """The settings by which a run's results may differ from another's of the same family, method and seed."""
    preset = run.settings.get("preset")
    hyperparameters = preset if isinstance(preset, dict) else {}
    variant = {name: value for name, value in hyperparameters.items() if name not in NOT_A_VARIANT}
    return variant | {name: run.settings.get(name) for name in VARIANT_SETTINGS}


def warm_up_of(run: RunFiles) -> dict[str, Any]:
    """The settings that the model of iteration 0 depends on, whatever the method."""
    return {name: value for name, value in variant_of(run).items() if name.startswith(OF_WARM_UP)}


def key_of(variant: Mapping[str, Any]) -> str:
    """Settings as a key by which runs are grouped."""
    return json.dumps(variant, sort_keys=True, default=str)


def rows_of(runs: Sequence[RunFiles]) -> list[Row]:
    """The rows of one family: the warm-up's SFT, then each method and choice of hyperparameters, over its seeds."""
    groups: dict[tuple[str, str], dict[str, RunFiles]] = {}
    for run in runs:
        key = (run.method, key_of(variant_of(run)))
        groups.setdefault(key, {}).setdefault(str(run.seed), run)  # a second run of the same seed says nothing new
    rows = []
    for (method, _), by_seed in groups.items():
        members = tuple(by_seed.values())
        if method != "sft":
            others = [variant_of(run) for run in runs if run.method == method]
            best = tuple(run.results["best_iteration"] if run.results else 0 for run in members)
            rows.append(Row(method, members, best, variant_text(variant_of(members[0]), others)))
    rows.sort(key=lambda row: METHOD_ORDER.index(row.method) if row.method in METHOD_ORDER else len(METHOD_ORDER))
    return [*warm_up_rows(runs), *rows]


def variant_text(variant: Mapping[str, Any], others: Sequence[Mapping[str, Any]]) -> str:
    """The settings of a variant that tell it from the others: `samples=10`."""
    differing = [name for name in variant if len({str(other.get(name)) for other in others}) > 1]
    return ", ".join(f"{name}={written(variant[name])}" for name in differing)[:120]


def warm_up_rows(runs: Sequence[RunFiles]) -> list[Row]:
    """The models of iteration 0: all methods of one seed and one setting of SFT have the same one."""
    groups: dict[str, dict[str, RunFiles]] = {}
    for run in runs:
        groups.setdefault(key_of(warm_up_of(run)), {}).setdefault(str(run.seed), run)
    others = [warm_up_of(run) for run in runs]
    return [
        Row("sft", members, (0,) * len(members), variant_text(warm_up_of(members[0]), others))
        for members in (tuple(by_seed.values()) for by_seed in groups.values())
    ]


def command(run: RunFiles | None, **changes: Any) -> str:
    """The command of train.py for a run like this one, with other settings; without a run, for the default one."""
    defaults: dict[str, Any] = {
        "model": "tiny-t5",
        "data": "toy",
        "unlabelled": None,
        "limit": None,
        "method": "dpo-st",
        "seed": 42,
        "no_calculator": False,
        "template": None,
        "dtype": "fp32",
    }
    settings = dict(defaults)
    if run is not None:
        settings |= {name: run.settings[name] for name in settings if name in run.settings}
        settings["model"] = as_asked_for(run.model)
        if not has_own_preset(run):
            settings["config"] = run.path / "config.json"  # has all hyperparameters
    words = ["python", "train.py"]
    for name, value in {**settings, **changes}.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not None and value is not False and value != defaults.get(name):
            words += [flag, str(value)]
    return shlex.join(words)


def as_asked_for(model: str) -> str:
    """What --model takes for a run's model: OWNER/NAME of the hub for a directory OWNER--NAME, see hub.find_model."""
    return model.replace("--", "/", 1)


def has_own_preset(run: RunFiles) -> bool:
    """Whether a run's hyperparameters are those of one of our presets with its method, as without any flag."""
    if run.method not in METHODS:
        return False
    variant = variant_of(run)
    for of_family in PRESETS.values():
        for _, preset in of_family:
            own = asdict(replace(preset, **METHODS[run.method].settings))
            if all(variant.get(name) == value for name, value in own.items() if name not in NOT_A_VARIANT):
                return True
    return False


# -- parts of exhibits ------------------------------------------------------------------------------------------------


def cell(score: Mapping[str, Any] | None) -> Any:
    """A score as a cell of a table; a dash where there is none."""
    return "–" if score is None else {**score, "text": percent(score)}


def point(x: float, score: Mapping[str, Any]) -> dict[str, Any]:
    """A score as a point of a line."""
    return {"x": x, **{name: score[name] for name in ("value", "low", "high", "n")}}


def paper_points(percents: Sequence[float]) -> list[dict[str, Any]]:
    """The paper's accuracies by iteration."""
    return [{"x": x, "value": as_fraction(value)} for x, value in enumerate(percents)]


def as_fraction(percents: float) -> float:
    """A printed percentage as a fraction."""
    return round(percents / 100, 6)


def series(name: str, origin: str, colour: int, found: list[Any]) -> dict[str, Any]:
    """One line, or one bar of each group; `colour` is a place in the page's palette."""
    return {"name": name, "origin": origin, "colour": colour, "points": found}


def missing(exhibit_id: str, title: str, *, needs: str, making: str) -> dict[str, Any]:
    """An exhibit that the runs at hand hold no data for."""
    return {"id": exhibit_id, "title": title, "kind": "missing", "caption": "", "needs": needs, "command": making}


def test_sets(runs: Sequence[RunFiles]) -> list[str]:
    """The sets that every run of a family was measured on, but for dev."""
    names = [list(run.results["iterations"][0]["accuracy"]) if run.results else [] for run in runs]
    return [name for name in names[0] if name != runs[0].dev and all(name in others for others in names)]


def on_paper_data(runs: Sequence[RunFiles]) -> bool:
    """Whether runs were made on the paper's data."""
    return runs[0].settings.get("data") == "gsm8k"


def paper_base(runs: Sequence[RunFiles]) -> str | None:
    """The paper's name of a family's base model, where it has numbers for it on these data."""
    return paper.BASES.get(runs[0].model) if on_paper_data(runs) and not runs[0].setting("no_calculator") else None


# -- tables -----------------------------------------------------------------------------------------------------------


def table_2(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Methods by test sets, and their differences."""
    title = "Table 2: methods by test sets"
    parts = [part for group in families(runs) if test_sets(group) for part in table_2_parts(group)]
    if not parts:
        needs = "a run that was measured on a test set"
        return missing("table-2", title, needs=needs, making=command(None))
    rows = [
        {"origin": "paper", "cells": [method, base, *({"value": as_fraction(x), "text": f"{x}%"} for x in accuracies)]}
        for method, base, accuracies in paper.TABLE_2
    ]
    parts.append({"title": "The paper's numbers", "heads": ["method", "base model", *paper.SETS], "rows": rows})
    return {
        "id": "table-2",
        "title": title,
        "kind": "table",
        "caption": "Greedy accuracy, in brackets the 95 % interval. A method's model is that of the iteration that was "
        "best on dev; SFT is iteration 0. Differences are in points, paired by question.",
        "parts": parts,
        "notes": [],
    }


def table_2_parts(runs: list[RunFiles]) -> list[dict[str, Any]]:
    """The scores of one family, and the differences of its methods."""
    sets = test_sets(runs)
    rows = rows_of(runs)
    n = {name: (result_of(runs[0], 0, name) or {"n": 0})["n"] for name in sets}
    scores = {
        "title": family_title(runs),
        "heads": ["method", "runs", *(f"{name} (n {n[name]})" for name in sets)],
        "rows": [
            {"origin": "ours", "cells": [row.label, row.seeds, *(cell(row.score(name)) for name in sets)]}
            for row in rows
        ],
    }
    compared = [row for pair in comparisons(rows) if (row := difference_row(*pair, sets))]
    if not compared:
        return [scores]
    heads = ["difference", "over", *(f"{name}, points" for name in sets)]
    return [scores, {"title": f"{family_title(runs)}: differences", "heads": heads, "rows": compared}]


def comparisons(rows: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Which rows are compared, as (before, after): every method with its own warm-up, and DPO-ST with ST."""
    pairs = [
        (before, row)
        for row in rows
        for before in rows
        if before.method == "sft" != row.method and warm_up_of(before.runs[0]) == warm_up_of(row.runs[0])
    ]
    pairs += [(st, dpo) for st in rows if st.method == "st" for dpo in rows if dpo.method == "dpo-st"]
    return pairs


def difference_row(before: Row, after: Row, sets: Sequence[str]) -> dict[str, Any] | None:
    """The differences of two rows on every set, over the seeds that both have; None where they share none."""
    seeds = [run.seed for run in after.runs if run.seed in {other.seed for other in before.runs}]
    if not seeds:
        return None
    cells: list[Any] = [f"{after.label} − {before.label}", listed("seed", seeds)]
    for name in sets:
        of_before = before.outcomes(name, seeds)
        of_after = after.outcomes(name, seeds)
        if of_before is None or of_after is None or len(of_before) != len(of_after):
            cells.append("–")
        else:
            difference = asdict(paired_difference(of_before, of_after))
            cells.append({**difference, "text": points(difference)})
    return {"origin": "ours", "cells": cells}


def table_3(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Our runs by the number of samples K, beside other methods of this size."""
    title = "Table 3: with more samples a question, and beside existing methods"
    heads = ["method", "base model", "annotations", "annotator", "calculator", "accuracy", "on"]
    found = []
    for group in families(runs):
        test = group[0].test
        for row in rows_of(group):
            score = row.score(test)
            if row.method == "dpo-st" and score is not None:
                run = row.runs[0]
                calculator = "no" if run.setting("no_calculator") else "yes"
                method = f"DPO-ST (K = {run.setting('samples', '?')})"
                cells = [
                    method,
                    run.model,
                    n_annotations(run),
                    "human",
                    calculator,
                    cell(score),
                    f"{test}, {row.seeds}",
                ]
                found.append({"origin": "ours", "cells": cells})
    if not found:
        needs = "a run of dpo-st; the paper's are of Flan-T5-Large on GSM8K with K = 3, 5 and 10"
        return missing(
            "table-3", title, needs=needs, making=command(None, model="flan-t5-large", data="gsm8k", samples=10)
        )
    rows = [
        {
            "origin": "paper",
            "cells": [method, base, n, annotator, "yes" if tools else "no", paper_cell(accuracy), "gsm8k/test"],
        }
        for method, base, n, annotator, tools, accuracy in paper.TABLE_3
    ]
    return {
        "id": "table-3",
        "title": title,
        "kind": "table",
        "caption": "Greedy accuracy on the test set of the data that a run was made on; only what is on the same set "
        "can be compared. Annotations are the human rationales that were trained on.",
        "parts": [{"title": "", "heads": heads, "rows": [*found, *rows]}],
        "notes": [],
    }


def n_annotations(run: RunFiles) -> str:
    """How many human rationales a run was trained on, as its pseudo-labels' stage says."""
    for stage in run.stages:
        if stage["stage"].endswith("/pseudo-labels.jsonl") and "examples" in stage:
            return f"{int(stage['examples'] - stage.get('pseudo_labels', 0)):,}"
    return "–"


def paper_cell(percents: float) -> dict[str, Any]:
    """One of the paper's accuracies as a cell."""
    return {"value": as_fraction(percents), "text": f"{percents}%"}


def table_4(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Decoder-only models beside the paper's table."""
    title = "Table 4: decoder-only models"
    heads = ["method", "base model", "calculator", "accuracy", "on"]
    kinds = {"closed": "closed-source", "distilled": "open-source, with knowledge distillation", "open": "open-source"}
    found = []
    for group in families([run for run in runs if run.is_decoder_only]):
        for row in rows_of(group):
            score = row.score(group[0].test)
            if score is not None:
                calculator = "no" if group[0].setting("no_calculator") else "yes"
                label = row.label if row.method == "sft" else f"{row.label}, K = {row.runs[0].setting('samples', '?')}"
                on = f"{group[0].test}, {row.seeds}"
                found.append({"origin": "ours", "cells": [label, group[0].model, calculator, cell(score), on]})
    if not found:
        needs = "a run of a decoder-only model"
        return missing(
            "table-4", title, needs=needs, making=command(None, model="llama-3-8b", data="gsm8k", samples=10)
        )
    parts = [{"title": "Our runs", "heads": heads, "rows": found}]
    for kind, name in kinds.items():
        rows = [
            {"origin": "paper", "cells": [method, base, "yes" if tools else "no", paper_cell(accuracy), "gsm8k/test"]}
            for row_kind, method, base, tools, accuracy in paper.TABLE_4
            if row_kind == kind
        ]
        parts.append({"title": f"The paper's numbers: {name}", "heads": heads, "rows": rows})
    return {
        "id": "table-4",
        "title": title,
        "kind": "table",
        "caption": "Greedy accuracy. For the paper's models the column calculator says whether any tool was used.",
        "parts": parts,
        "notes": [],
    }


# -- figures ----------------------------------------------------------------------------------------------------------


def figure_1(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Accuracy on the test set against the FLOPs spent so far, a point for each iteration."""
    title = "Figure 1: accuracy against compute"
    panels = []
    for group in same_data(runs):
        lines: list[dict[str, Any]] = []
        for run in group:
            spent = 0.0
            found = []
            for entry in run.results["iterations"] if run.results else []:
                spent += entry["flops"]
                score = entry["accuracy"].get(run.test)
                if score is not None and spent > 0:
                    found.append({**point(spent, score), "label": row_name(run.results, entry) if run.results else ""})
            if found:
                lines.append(series(run.name, "ours", len(lines), found))
        if lines:
            x = {"label": "FLOPs of sampling and training, so far", "is_log": True}
            panels.append({"title": group[0].test, "x": x, "y": accuracy_axis(group[0].test), "series": lines})
    if not panels:
        needs = "a run that was measured on the test set of its data"
        return missing("figure-1", title, needs=needs, making=command(None))
    return {
        "id": "figure-1",
        "title": title,
        "kind": "lines",
        "caption": "Greedy accuracy with 95 % intervals after each iteration, against all floating-point operations of "
        "sampling and training up to it; evaluations are not counted.",
        "panels": panels,
        "notes": [
            "Of its figure 1 the paper prints no FLOPs; its best accuracy there is 37.4% (Flan-T5-Large, GSM8K)."
        ],
    }


def same_data(runs: Sequence[RunFiles]) -> list[list[RunFiles]]:
    """The runs by the test questions that they were measured on."""
    groups: dict[tuple[str, str], list[RunFiles]] = {}
    for run in runs:
        groups.setdefault((run.data_name, str(run.setting("examples"))), []).append(run)
    return list(groups.values())


def accuracy_axis(set_name: str) -> dict[str, Any]:
    """The axis of an accuracy."""
    return {"label": f"greedy accuracy on {set_name} (%)", "is_percent": True}


def figure_4(benchmark: Path | None) -> dict[str, Any]:
    """Tokens a second by the number of rows decoded at once, with the calculator and without."""
    title = "Figure 4: sampling speed by batch size"
    panels = [] if benchmark is None else speed_panels(benchmark)
    if not panels:
        needs = "the results of the benchmark of sampling (--benchmark names the file)"
        return missing("figure-4", title, needs=needs, making="python benchmarks/sampling.py")
    batches = paper.FIGURE_4_BATCHES
    lines = [
        series(name, "paper", place, [{"x": x, "value": y} for x, y in zip(batches, speedups, strict=True)])
        for place, (name, speedups) in enumerate(paper.FIGURE_4.items())
    ]
    x = {"label": "rows decoded at once", "is_log": True}
    panels.append(
        {
            "title": "The paper's: Flan-T5-Large, one A40",
            "x": x,
            "y": {"label": "times as fast as one question at a time"},
            "series": lines,
        }
    )
    return {
        "id": "figure-4",
        "title": title,
        "kind": "lines",
        "caption": "Tokens a second, as the file of the benchmark has them. The paper prints times the speed of a tool "
        "user that decodes one question at a time.",
        "panels": panels,
        "notes": [],
    }


def speed_panels(path: Path) -> list[dict[str, Any]]:
    """A panel for each model in the Markdown file that benchmarks/sampling.py wrote."""
    names = {
        "ours": "ours, with calculator",
        "off": "ours, without calculator",
        "transformers, sorted": "transformers",
        "one at a time": "one question at a time",
    }
    panels = []
    for title, heads, rows in markdown_tables(path):
        if heads[:1] != ["rows"] or "ours" not in heads:
            continue
        lines = []
        for colour, (head, name) in enumerate(names.items()):
            found = []
            for row in rows:
                cells = dict(zip(heads, row, strict=False))
                x = N_CELL.match(cells.get("rows", ""))
                y = N_CELL.match(cells.get(head, ""))
                if x and y:
                    found.append({"x": plain(x[1]), "value": plain(y[1])})
            if found:
                lines.append(series(name, "ours", colour, found))
        if sum(len(line["points"]) for line in lines) > 4:  # a table of one row is no curve
            x_axis = {"label": "rows decoded at once", "is_log": True}
            panels.append({"title": title, "x": x_axis, "y": {"label": "tokens a second"}, "series": lines})
    return panels


def plain(number: str) -> float:
    """A number as it is printed, as a number."""
    return float(number.replace(",", ""))


def markdown_tables(path: Path) -> list[tuple[str, list[str], list[list[str]]]]:
    """The tables of a Markdown file: the heading above, the heads, the rows. None where it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8")[: 2**20].splitlines()
    except (OSError, ValueError):
        return []
    tables: list[tuple[str, list[str], list[list[str]]]] = []
    heading = ""
    in_table = False
    for line in lines:
        if line.startswith("## "):
            heading = line.removeprefix("## ")
        cells = [part.strip() for part in line.strip().strip("|").split("|")] if line.startswith("|") else []
        if cells and not in_table:
            tables.append((heading, cells, []))
        elif cells and not set("".join(cells)) <= {"-", ":"}:
            tables[-1][2].append(cells)
        in_table = bool(cells)
    return tables


def figure_5(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Accuracy by iteration, self-training against DPO-ST."""
    title = "Figure 5: accuracy by iteration"
    panels = []
    notes = []
    for group in families(runs):
        test = group[0].test
        lines: list[dict[str, Any]] = []
        for row in rows_of(group):
            found = [] if row.method == "sft" else line_of(row, test)
            if len(found) > 1:
                lines.append(series(f"{row.label}, {seeds_text(row)}", "ours", len(lines), found))
        if not lines:
            continue
        base = paper_base(group)
        if base is not None:
            for place, (name, percents) in enumerate(paper.FIGURE_5[base].items()):
                lines.append(series(f"the paper's {name}", "paper", place, paper_points(percents)))
        panels.append(by_iteration(family_title(group), test, lines))
        like = next((run for run in group if run.method in ("st", "dpo-st")), group[0])
        for method in ("st", "dpo-st"):
            if not any(run.method == method for run in group):
                notes.append(
                    f"{METHOD_NAMES[method]} is missing for {family_title(group)}: {command(like, method=method)}"
                )
    if not panels:
        needs = "runs of st and of dpo-st that were measured on the test set of their data"
        return missing("figure-5", title, needs=needs, making=command(None, method="st"))
    shown = {panel["title"].partition(" on ")[0] for panel in panels}
    for base, methods in paper.FIGURE_5.items():
        if not shown & {name for name, theirs in paper.BASES.items() if theirs == base}:
            lines = [
                series(f"the paper's {name}", "paper", place, paper_points(percents))
                for place, (name, percents) in enumerate(methods.items())
            ]
            panels.append(by_iteration(f"The paper's: {base}", "gsm8k/test", lines))
    return {
        "id": "figure-5",
        "title": title,
        "kind": "lines",
        "caption": "Greedy accuracy with 95 % intervals on the test set of the data that a run was made on. Iteration "
        "0 is SFT.",
        "panels": panels,
        "notes": notes,
    }


def seeds_text(row: Row) -> str:
    """The seeds of a row: `seed 42`."""
    return listed("seed", [run.seed for run in row.runs])


def line_of(row: Row, set_name: str) -> list[dict[str, Any]]:
    """A row's accuracy after each iteration that all its runs have."""
    n_iterations = min(len(run.results["iterations"]) if run.results else 0 for run in row.runs)
    found = []
    for iteration in range(n_iterations):
        score = Row(row.method, row.runs, (iteration,) * len(row.runs)).score(set_name)
        if score is None:
            break
        found.append(point(iteration, score))
    return found


def by_iteration(title: str, set_name: str, lines: list[dict[str, Any]]) -> dict[str, Any]:
    """A panel of accuracies by iteration."""
    x = {"label": "iteration", "is_whole": True}
    return {"title": title, "x": x, "y": accuracy_axis(set_name), "series": lines}


def figure_6(runs: Sequence[RunFiles], files: Files) -> dict[str, Any]:
    """What the DPO of the first iteration changes: pass@1, pass@k, pseudo-labels."""
    title = "Figure 6: before and after the first DPO"
    made = [
        run
        for run in runs
        if run.results and len(run.results["iterations"]) > 1 and run.results["iterations"][1]["dpo"]
    ]
    if not made:
        needs = "a run of dpo-st with a finished first iteration"
        return missing("figure-6", title, needs=needs, making=command(None))
    groups = [*(run.name for run in made), "the paper's Flan-T5-Large on GSM8K"]
    ks = [max((int(k) for k in dpo_of(run)["pass_at"]), default=0) for run in made]
    largest = max(ks)
    theirs = {name: [plain_score(x) for x in pair] for name, pair in paper.FIGURE_6.items() if name != "pseudo-labels"}
    passed = [
        (run.results["iterations"][0]["pass_at"].get(str(largest)), dpo_of(run)["pass_at"].get(str(largest)))
        if run.results
        else (None, None)
        for run in made
    ]
    greedy = [(result_of(run, 0, run.dev), dpo_of(run)["accuracy"].get(run.dev)) for run in made]
    n_labels = [pseudo_labels_before_and_after(run, files) for run in made]
    percent_axis = {"label": "accuracy on dev (%)", "is_percent": True}
    panels = [bars("pass@1 (greedy)", percent_axis, groups, [*greedy, tuple(theirs["pass@1"])])]
    if largest:
        theirs_at_k = tuple(theirs[f"pass@{largest}"]) if f"pass@{largest}" in theirs else (None, None)
        axis = {"label": f"pass@{largest} on dev (%)", "is_percent": True}
        panels.append(bars(f"pass@{largest}", axis, groups, [*passed, theirs_at_k]))
    counts = [tuple(None if n is None else {"value": n} for n in pair) for pair in n_labels]
    paper_counts = tuple({"value": n} for n in paper.FIGURE_6["pseudo-labels"])
    panels.append(bars("pseudo-labels of one sampling", {"label": "pseudo-labels"}, groups, [*counts, paper_counts]))
    notes = [
        f"{run.name}: pseudo-labels before DPO cannot be counted, as there are fewer samples a question for pairs than "
        "for labels, or files are missing."
        for run, pair in zip(made, n_labels, strict=True)
        if pair[0] is None
    ]
    return {
        "id": "figure-6",
        "title": title,
        "kind": "bars",
        "caption": "The first iteration's model before its DPO (SFT) and after, on dev, with 95 % intervals. Right: "
        "how many pseudo-labels are selected from the samples of each of the two models, the first K of each "
        "question.",
        "panels": panels,
        "notes": notes,
    }


def dpo_of(run: RunFiles) -> dict[str, Any]:
    """What results.json says of the model that the first DPO made."""
    entry: dict[str, Any] = run.results["iterations"][1]["dpo"] if run.results else {}
    return entry


def plain_score(percents: float) -> dict[str, Any]:
    """One of the paper's accuracies, without interval."""
    return {"value": as_fraction(percents)}


def bars(title: str, y: dict[str, Any], groups: list[str], pairs: Sequence[tuple[Any, ...]]) -> dict[str, Any]:
    """A panel of two bars a group: before and after DPO; the last group is the paper's, where it has the numbers."""
    keep = ("value", "low", "high", "n")
    has_paper = any(pairs[-1])
    n_groups = len(groups) if has_paper else len(groups) - 1

    def found(side: int) -> list[Any]:
        return [
            None if pair[side] is None else {name: pair[side][name] for name in keep if name in pair[side]}
            for pair in pairs[:n_groups]
        ]

    return {
        "title": title,
        "y": y,
        "groups": groups[:n_groups],
        "origins": ["ours"] * (len(groups) - 1) + ["paper"] * has_paper,
        "series": [series("before DPO", "ours", 0, found(0)), series("after DPO", "ours", 1, found(1))],
    }


def pseudo_labels_before_and_after(run: RunFiles, files: Files) -> tuple[int | None, int | None]:
    """How many pseudo-labels the first iteration's samples give, those of f_θ' and those of f_θd.

    Both are selected by the run's own rules from the first K samples of each question; f_θ' wrote its samples for the
    preference pairs. None where files are missing, or where fewer samples were taken for pairs than for labels.
    """
    folder = run.path / "iteration-1"
    paths = [folder / f"samples-{kind}.jsonl" for kind in ("dpo", "sft")]
    n_samples = run.setting("samples")
    n_for_pairs = run.setting("dpo_samples")
    if (
        type(n_samples) is not int
        or type(n_for_pairs) is not int
        or n_for_pairs < n_samples
        or run.method not in METHODS
    ):
        return None, None
    try:
        known = {field.name for field in fields(Preset)}
        preset = Preset(**{name: value for name, value in run.settings["preset"].items() if name in known})

        def n_selected(path: Path) -> int:
            gold = {record["question"]: record["token_ids"] for record in gold_records(folder / "pseudo-labels.jsonl")}
            candidates: dict[int, Candidates] = {}
            for _, record in read_jsonl(path):
                sample = Sample(**record)
                if sample.example_index not in candidates:
                    ids = gold.get(sample.question)
                    rationale = None if ids is None else TokenizedExample((), tuple(ids))
                    candidates[sample.example_index] = Candidates((), rationale)
                if sample.sample_index < n_samples:
                    candidates[sample.example_index].add(sample)
            of_questions = list(candidates.values())
            labels = pseudo_labels(of_questions, METHODS[run.method], preset)
            return sum(
                label is not of_question.gold
                for of_question, selected in zip(of_questions, labels, strict=True)
                for label in selected
            )

        before, after = (files.read(path, n_selected) for path in paths)
        return before, after
    except BROKEN:
        return None, None


def gold_records(path: Path) -> list[dict[str, Any]]:
    """The human rationales in a file of pseudo-labels."""
    return [record for _, record in read_jsonl(path) if record["source"] == "gold"]


def figure_7(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """Accuracy on dev by iteration, with the calculator and without."""
    title = "Figure 7: with and without the calculator"
    groups: dict[tuple[str, ...], dict[bool, list[RunFiles]]] = {}
    for run in runs:
        key = (*family(run)[:-1], run.method, str(run.seed), key_of(variant_of(run)))  # all but the calculator
        groups.setdefault(key, {}).setdefault(bool(run.setting("no_calculator")), []).append(run)
    panels = [panel for run in runs if (panel := at_inference_alone(run))]
    for of_group in groups.values():
        if len(of_group) < 2:
            continue
        lines = []
        for colour, is_off in enumerate((False, True)):
            run = of_group[is_off][0]
            found = line_of(Row(run.method, (run,), (0,)), run.dev)
            lines.append(series("without calculator" if is_off else "with calculator", "ours", colour, found))
        run = of_group[False][0]
        if paper_base([run]) == "Flan-T5-Large":
            for colour, (name, percents) in enumerate(paper.FIGURE_7.items()):
                lines.append(series(f"the paper's, {name}", "paper", colour, paper_points(percents)))
        method = METHOD_NAMES.get(run.method, run.method)
        panels.append(by_iteration(f"{run.model} on {run.data_name}, {method}, seed {run.seed}", run.dev, lines))
    if not panels:
        some = next((run for run in runs if not run.setting("no_calculator")), None)
        needs = "two runs that differ in --no-calculator alone, or files of eval.py --split dev --calculator both"
        return missing("figure-7", title, needs=needs, making=command(some, no_calculator=True))
    if not any(line["origin"] == "paper" for panel in panels for line in panel["series"]):
        lines = [
            series(name, "paper", colour, paper_points(percents))
            for colour, (name, percents) in enumerate(paper.FIGURE_7.items())
        ]
        panels.append(by_iteration("The paper's: Flan-T5-Large", "gsm8k/dev", lines))
    return {
        "id": "figure-7",
        "title": title,
        "kind": "lines",
        "caption": "Greedy accuracy on dev with 95 % intervals: of two runs that sampled, were trained and were "
        "measured with the calculator and without; or, at inference alone, of the same models measured with it and "
        "without by eval.py.",
        "panels": panels,
        "notes": [],
    }


def at_inference_alone(run: RunFiles) -> dict[str, Any] | None:
    """A panel of the accuracies that eval.py measured with and without the calculator, where files of it say both."""
    lines = []
    for colour, (name, has_calculator) in enumerate((("with calculator", True), ("without calculator", False))):
        scores = {
            int(measured.model.partition("/")[0]): measured.scores[run.dev, has_calculator]
            for measured in run.measured
            if measured.model.endswith("/sft") and (run.dev, has_calculator) in measured.scores
        }
        found = [point(iteration, score) for iteration, score in sorted(scores.items())]
        if found:
            lines.append(series(name, "ours", colour, found))
    return by_iteration(f"{run.name}, at inference alone", run.dev, lines) if len(lines) == 2 else None
