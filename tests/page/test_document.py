"""The page: every number in it is one of the files, it is self-contained, and what models wrote stays text."""

import base64
import gzip
import json
import re

import pytest
from page.made_runs import make_run, sample_record

from minidpost.errors import UserError
from minidpost.page.document import check_page, page_data, parts_of, read_runs, write_page
from minidpost.page.export import export, table_latex, table_markdown
from minidpost.page.runs import Files
from minidpost.storage import read_json, read_jsonl, write_json, write_jsonl

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "\u202egnp.exe\u202c and \u2066x\u2069",
    "\x1b[31mred\x1b[0m\x07",
    "{{ script }} {{ data }} {{ questions }}",
    "&lt;b&gt; ${x} `y` 'z' \"w\" \\u003c",
    "\U0001f600 𝔘 e\u0301 ﷽",
]


def page_of(path, *paths, has_samples=True):
    """The page of some runs: its text, and its parts by name."""
    files = Files()
    runs = read_runs(paths, files)
    write_page(path, runs, benchmark=None, data_dir=path.parent, has_samples=has_samples, files=files)
    text = path.read_text(encoding="utf-8")
    return text, dict(parts_of(text))


def unpacked(part):
    return json.loads(gzip.decompress(base64.b64decode(part)))


def test_every_number_of_the_page_is_one_of_the_files(tmp_path):
    path = make_run(tmp_path / "run", n_questions=60)
    _, parts = page_of(tmp_path / "page.html", path)
    (run,) = parts["page"]["runs"]
    # 1) Scores: those of evaluation.json, value by value.
    for entry in run["results"]["iterations"]:
        stored = read_json(path / f"iteration-{entry['iteration']}" / "evaluation.json")
        for name, score in entry["accuracy"].items():
            assert score == {key: stored["sft"]["greedy"][name][key] for key in score}
        assert entry["pass_at"] == stored["sft"]["sampled"]["pass_at"]
        if entry["dpo"]:
            assert entry["dpo"]["maj_at"] == stored["dpo"]["sampled"]["maj_at"]
    # 2) Trainings: log.jsonl, column by column.
    for training in run["trainings"]:
        records = [record for _, record in read_jsonl(path / training["stage"] / "log.jsonl")]
        for name, column in training["columns"].items():
            assert column == [record[name] for record in records]
    # 3) Stages, without their hashes.
    stages = [record for _, record in read_jsonl(path / "stages.jsonl")]
    assert run["stages"] == [{key: stage[key] for key in stage if key != "sha256"} for stage in stages]
    # 4) Samples: how often each question was right.
    index = unpacked(parts["questions/0"])
    records = [record for _, record in read_jsonl(path / "iteration-2" / "samples-sft.jsonl")]
    for question in range(60):
        of_question = [record for record in records if record["example_index"] == question]
        assert index["rounds"][3]["correct"][question] == sum(record["is_correct"] for record in of_question)
        assert index["questions"][question] == of_question[0]["question"]
    assert [name for name in parts if name.startswith("block/")] == ["block/0/0", "block/0/1"]
    assert len(unpacked(parts["block/0/0"])) == 50 and len(unpacked(parts["block/0/1"])) == 10


def test_the_page_names_no_address_outside_itself(tmp_path):
    text, _ = page_of(tmp_path / "page.html", make_run(tmp_path / "run"))
    text = text.replace("http://www.w3.org/2000/svg", "")  # a name, which is not asked for
    code = re.sub(r'<script type="application/json".*?</script>', "", text)
    assert not re.search(r"https?:|//[a-z]|@import|url\(|\bsrc=|<link(?! rel=\"icon\" href=\"data:,\")", code)
    assert not re.search(r"https?:", text)
    assert "default-src 'none'" in text and "connect-src 'none'" in text


def test_the_script_writes_no_markup():
    from minidpost.page.document import SCRIPTS, resource

    script = "".join(resource(name) for name in SCRIPTS)
    for name in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "Function(", "DOMParser"):
        assert name not in script


def test_hostile_texts_stay_inside_their_parts(tmp_path):
    path = make_run(tmp_path / "run", n_iterations=1)
    samples = path / "iteration-1" / "samples-sft.jsonl"
    records = [
        sample_record(index, 0, "none", question=f"{index} {text}", completion=text, answer=text)
        for index, text in enumerate(HOSTILE, start=50)
    ]
    write_jsonl(samples, records)
    (path / "log.txt").write_text("\n".join(HOSTILE), encoding="utf-8")
    config = read_json(path / "config.json")
    config["settings"]["model"] = HOSTILE[1]
    config["versions"][HOSTILE[0]] = HOSTILE[3]
    write_json(path / "config.json", config)
    text, parts = page_of(tmp_path / "page.html", path)
    harmless, _ = page_of(tmp_path / "other.html", make_run(tmp_path / "plain"))
    n_blocks = sum(name.startswith("block/") for name in parts)
    n_others = sum(name.startswith("block/") for name, _ in parts_of(harmless))
    assert text.count("<script") - n_blocks == harmless.count("<script") - n_others
    assert text.count("<!--") == 0 and "<img" not in text
    (run,) = parts["page"]["runs"]
    assert run["model"] == HOSTILE[1]
    index = unpacked(parts["questions/0"])
    found = [entry for name in parts if name.startswith("block/") for entry in unpacked(parts[name])]
    assert [entry["texts"][0][0] for entry in found[-len(HOSTILE) :]] == HOSTILE
    assert index["answers"][-len(HOSTILE) :] == HOSTILE
    # Tables for papers have no such characters at all.
    table = next(exhibit for exhibit in parts["page"]["exhibits"] if exhibit["id"] == "table-2")
    assert "<" not in table["markdown"].replace("\\<", "") and "\u202e" not in table["markdown"]


def test_a_table_means_itself_in_latex_and_markdown():
    cells = ["50% & more_#1 $x^2$ {\\a}", {"value": 0.5, "text": "50.0% (40.0–60.0)"}, "−1 | \u202ex"]
    part = {"title": "", "heads": ["a", "b", "c"], "rows": [{"origin": "ours", "cells": cells}]}
    exhibit = {"title": "T", "caption": "C", "parts": [part]}
    (line,) = [line for line in table_latex(exhibit).splitlines() if "50" in line]
    expected = r"ours & 50\% \& more\_\#1 \$x\textasciicircum{}2\$ \{\textbackslash{}a\} & 50.0\% (40.0--60.0) & "
    assert line == expected + "$-$1 \\textbar{} \ufffdx \\\\"
    (line,) = [line for line in table_markdown(exhibit).splitlines() if "50%" in line]
    assert r"− 1" not in line and r"−1 \| " in line and r"more\_\#1" in line


def test_figures_and_tables_are_written_for_papers(tmp_path):
    files = Files()
    runs = read_runs([make_run(tmp_path / "a$b_{x"), make_run(tmp_path / "st", method="st")], files)
    data = page_data(runs, benchmark=None, files=files, is_watched=False)
    names = export(data["exhibits"], tmp_path / "out")
    assert names == [
        f"{exhibit}.{suffix}"
        for exhibit, suffixes in [
            ("figure-1", "png svg"), ("table-2", "md tex"), ("figure-5", "png svg"),
            ("table-3", "md tex"), ("figure-6", "png svg"),
        ]
        for suffix in suffixes.split()
    ]  # fmt: skip
    assert {path.name for path in (tmp_path / "out").iterdir()} == set(names)
    assert (tmp_path / "out" / "figure-5.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / "out" / "figure-5.svg").read_text()


def test_the_same_runs_give_the_same_page(tmp_path):
    path = make_run(tmp_path / "run")
    first, _ = page_of(tmp_path / "1.html", path)
    second, _ = page_of(tmp_path / "2.html", path)
    made = re.compile(r'"made":"[^"]*"')
    assert made.sub("", first) == made.sub("", second)


def test_without_samples_the_page_has_no_blocks(tmp_path):
    _, parts = page_of(tmp_path / "page.html", make_run(tmp_path / "run"), has_samples=False)
    assert sorted(parts) == ["page", "questions/0"]
    assert unpacked(parts["questions/0"])["questions"] == []
    assert unpacked(parts["questions/0"])["sets"]


def test_broken_runs_are_said_on_the_page(tmp_path):
    good = make_run(tmp_path / "good")
    broken = make_run(tmp_path / "broken")
    (broken / "iteration-1" / "samples-dpo.jsonl").write_text('{"example_index": 0}\n')
    (broken / "iteration-1" / "evaluation.json").write_text("{")
    (tmp_path / "foreign").mkdir()
    _, parts = page_of(tmp_path / "page.html", good, broken, tmp_path / "foreign")
    notes = [run["notes"] for run in parts["page"]["runs"]]
    assert notes[0] == []
    assert any("evaluation.json" in note for note in notes[1]) and "not a run directory" in notes[2][0]
    assert any("samples-dpo.jsonl, line 1" in note for note in unpacked(parts["questions/1"])["notes"])
    assert unpacked(parts["questions/2"])["questions"] == []


def test_iterations_of_different_sets_are_no_exception(tmp_path):
    path = make_run(tmp_path / "run")
    evaluation = read_json(path / "iteration-2" / "evaluation.json")
    del evaluation["sft"]["greedy"]["mine/test"]
    write_json(path / "iteration-2" / "evaluation.json", evaluation)
    _, parts = page_of(tmp_path / "page.html", path)
    assert parts["page"]["runs"][0]["results"]


def test_only_pages_of_ours_are_overwritten(tmp_path):
    page = tmp_path / "page.html"
    check_page(page)
    page_of(page, make_run(tmp_path / "run"))
    check_page(page)
    page.write_text("<!doctype html> somebody's own")
    with pytest.raises(UserError, match=r"no page of report\.py"):
        check_page(page)
    with pytest.raises(UserError, match="a file in a directory that exists"):
        check_page(tmp_path / "absent" / "page.html")
