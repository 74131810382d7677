"""The page: one HTML file with its style, its script and all data inside, which asks nothing of any address.

The parts of a page have names; the script asks for a part by its name, wherever it comes from:

    page                  runs, trainings, exhibits: JSON, in the page from the beginning
    questions/0           the index of run 0's questions: JSON, compressed (questions.py)
    block/0/3             its fourth block of questions, likewise

In a file every part stands in a <script type="application/json">; with --watch the server (watch.py) gives the parts.
Whatever a model or a dataset wrote is in these parts, and reaches the page's tree as text alone.
"""

import base64
import hashlib
import json
import re
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files as resources
from pathlib import Path
from typing import Any, TextIO

from minidpost.errors import UserError
from minidpost.page.exhibits import all_exhibits
from minidpost.page.export import table_latex, table_markdown
from minidpost.page.questions import Questions, evaluation_sets, packed, read_questions, rounds_of
from minidpost.page.runs import Files, RunFiles, attach_measured, read_run, run_names
from minidpost.selftraining.evaluation import percent
from minidpost.selftraining.report import before_and_after_rows, dpo_entries, recommendation, results_rows
from minidpost.storage import staged_file
from minidpost.version import __version__

GENERATOR = '<meta name="generator" content="minidpost report.py">'
SCRIPTS = ("page.js", "charts.js", "questions.js")


# -- the data ---------------------------------------------------------------------------------------------------------


def read_runs(paths: Sequence[Path], files: Files, *, evaluations: Sequence[Path] = ()) -> list[RunFiles]:
    """The runs that were asked for, each as far as it can be read, with what files of eval.py say of their models."""
    runs = [read_run(path, name, files) for path, name in zip(paths, run_names(list(paths)), strict=True)]
    attach_measured(runs, evaluations, files)
    return runs


def page_data(runs: Sequence[RunFiles], *, benchmark: Path | None, files: Files, is_watched: bool) -> dict[str, Any]:
    """Everything of the page but the questions."""
    exhibits = all_exhibits(runs, benchmark=benchmark, files=files)
    for exhibit in exhibits:
        if exhibit["kind"] == "table":
            exhibit["markdown"] = table_markdown(exhibit)
            exhibit["latex"] = table_latex(exhibit)
    return {
        "made": time.strftime("%Y-%m-%d %H:%M"),
        "version": __version__,
        "is_watched": is_watched,
        "runs": [run_data(run) for run in runs],
        "exhibits": exhibits,
    }


def run_data(run: RunFiles) -> dict[str, Any]:
    """One run: what it is, how far it is, its scores and its trainings."""
    results = run.results
    return {
        "name": run.name,
        "path": str(run.path),
        "model": run.model,
        "method": run.method,
        "data": str(run.settings.get("data", "?")),
        "seed": str(run.seed),
        "state": run.state,
        "written_at": time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(run.written_at)) if run.written_at else "",
        "n_iterations": run.n_iterations,
        "n_finished": len(results["iterations"]) if results else 0,
        "at_work": run.at_work,
        "notes": run.notes,
        "settings": [[name, written_setting(value)] for name, value in flat_settings(run)],
        "versions": run.versions,
        "stages": run.stages,
        "log": run.log,
        "results": results,
        "tables": run_tables(results),
        "best": recommendation(results) if results else None,
        "best_score": percent(results["iterations"][results["best_iteration"]]["accuracy"][results["dev"]])
        if results
        else None,
        "trainings": [
            {"stage": training.stage, "is_finished": training.is_finished, "columns": training.columns}
            for training in run.trainings
        ],
        "has_samples": bool(rounds_of_or_none(run)),
    }


def rounds_of_or_none(run: RunFiles) -> list[Any]:
    """The rounds of sampling of a run; none where its directory cannot be read."""
    try:
        return list(rounds_of(run))
    except OSError:
        return []


def run_tables(results: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The tables of report.md: the results, and what each DPO changed."""
    if results is None:
        return []
    try:
        tables = [{"title": "", "heads": heads, "rows": rows} for heads, rows in results_rows(results)]
        if dpo_entries(results):
            heads, rows = before_and_after_rows(results)
            tables.append({"title": f"Before and after each DPO, on {results['dev']}", "heads": heads, "rows": rows})
    except LookupError:  # iterations that were measured on different sets have no table
        return []
    return tables


def flat_settings(run: RunFiles) -> list[tuple[str, Any]]:
    """The settings of a run, those of its preset after the others."""
    own = [(name, value) for name, value in run.settings.items() if name != "preset"]
    preset = run.settings.get("preset")
    return own + (list(preset.items()) if isinstance(preset, dict) else [])


def written_setting(value: Any) -> str:
    """A setting as JSON has it, shortened."""
    return json.dumps(value, ensure_ascii=False)[:200]


def questions_data(run: RunFiles, questions: Questions, data_dir: Path) -> dict[str, Any]:
    """The index of a run's questions, with those of its evaluations."""
    return {**questions.index(), "sets": evaluation_sets(run, data_dir), "notes": run.notes, "version": ""}


# -- the file ---------------------------------------------------------------------------------------------------------


def write_page(
    path: Path, runs: Sequence[RunFiles], *, benchmark: Path | None, data_dir: Path, has_samples: bool, files: Files
) -> None:
    """Write the page of some runs, atomically. The questions are read and written a run at a time."""
    with staged_file(path) as temporary, open(temporary, "w", encoding="utf-8") as stream:
        data = page_data(runs, benchmark=benchmark, files=files, is_watched=False)
        before, after = shell(data)
        stream.write(before)
        for index, run in enumerate(runs):
            write_questions(stream, index, run, data_dir=data_dir, has_samples=has_samples)
        stream.write(after)


def write_questions(stream: TextIO, index: int, run: RunFiles, *, data_dir: Path, has_samples: bool) -> None:
    """The parts of one run's questions."""
    n_notes = len(run.notes)
    questions = read_questions(run) if has_samples else Questions([], [], [])
    content = questions_data(run, questions, data_dir)
    content["notes"] = run.notes[n_notes:]  # those before are on the page already
    stream.write(part(f"questions/{index}", packed(content)))
    for number, block in enumerate(questions.blocks()):
        stream.write(part(f"block/{index}/{number}", block))


def part(name: str, value: object) -> str:
    """A part of the page as the script finds it."""
    return f'<script type="application/json" id="{name}">{plain_json(value)}</script>\n'


def shell(data: dict[str, Any]) -> tuple[str, str]:
    """The page before and after the parts of its questions. Only this style and this script may run in it."""
    style = resource("style.css")
    script = "".join(resource(name) for name in SCRIPTS)
    connections = "'self'" if data["is_watched"] else "'none'"
    policy = (
        f"default-src 'none'; style-src '{fingerprint(style)}'; script-src '{fingerprint(script)}'; img-src data:; "
        f"connect-src {connections}; base-uri 'none'; form-action 'none'"
    )
    values = {
        "generator": GENERATOR,
        "policy": policy,
        "style": style,
        "data": part("page", data),
        "script": script,
    }
    # Each piece is filled in one go: a value may hold what looks like another value's place.
    before, _, after = resource("template.html").partition("{{ questions }}")
    filled = [re.sub(r"\{\{ (\w+) \}\}", lambda match: values[match[1]], piece) for piece in (before, after)]
    return filled[0], filled[1]


def resource(name: str) -> str:
    """One of the files that lie beside this module."""
    return resources("minidpost.page").joinpath(name).read_text(encoding="utf-8")


def fingerprint(source: str) -> str:
    """A style's or a script's hash, as a content security policy names it."""
    return f"sha256-{base64.b64encode(hashlib.sha256(source.encode('utf-8')).digest()).decode('ascii')}"


def plain_json(value: object) -> str:
    """A value as JSON that may stand within a <script>: ASCII, without `<`, `>` and `&`."""
    written = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return written.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def check_page(path: Path) -> None:
    """UserError where the page cannot be written, or would overwrite what is no page of ours."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--output {path}: a file in a directory that exists is expected")
    if path.exists():
        with open(path, "rb") as stream:
            beginning = stream.read(1000)
        if GENERATOR.encode() not in beginning:
            raise UserError(f"--output {path}: exists and is no page of report.py; remove it or choose another name")


def parts_of(page: str) -> Iterator[tuple[str, Any]]:
    """The names and values of the parts of a page: what the script reads, for those who want the numbers back."""
    for piece in page.split('<script type="application/json" id="')[1:]:
        name, _, rest = piece.partition('">')
        yield name, json.loads(rest.partition("</script>")[0])
