"""The paper's exhibits: drawn from runs that hold their data, with the files' numbers; a command where they do not."""

import json
import shlex
from dataclasses import asdict, replace

import pytest
from page.made_runs import edit_config, make_run

from minidpost.errors import UserError
from minidpost.page import paper
from minidpost.page.document import read_runs
from minidpost.page.exhibits import all_exhibits, command, markdown_tables, pseudo_labels_before_and_after
from minidpost.page.runs import Files, read_run
from minidpost.selftraining.evaluation import paired_difference
from minidpost.selftraining.presets import T5
from minidpost.storage import read_jsonl, write_json, write_jsonl

GSM8K = {"gsm8k/dev": 10, "gsm8k/test": 12, "multiarith/test": 6, "asdiv/test": 7, "svamp/test": 8}


def exhibits(*paths, benchmark=None):
    """The exhibits by id."""
    files = Files()
    runs = [read_run(path, path.name, files) for path in paths]
    return {exhibit["id"]: exhibit for exhibit in all_exhibits(runs, benchmark=benchmark, files=files)}


def ours(part):
    return [row["cells"] for row in part["rows"] if row["origin"] == "ours"]


@pytest.fixture
def gsm8k(tmp_path):
    """DPO-ST, ST, and DPO-ST without the calculator, of one seed."""

    def begin(name, **options):
        return make_run(tmp_path / name, model="flan-t5-large", data="gsm8k", sets=GSM8K, **options)

    return begin("dpo"), begin("st", method="st", rates=(0.2, 0.3, 0.4)), begin("off", no_calculator=True)


def test_without_runs_every_exhibit_names_a_command():
    found = exhibits()
    assert [exhibit["kind"] for exhibit in found.values()] == ["missing"] * 8
    for exhibit in found.values():
        words = shlex.split(exhibit["command"])
        assert words[:2] in (["python", "train.py"], ["python", "benchmarks/sampling.py"])


def test_with_all_runs_every_exhibit_is_drawn(gsm8k, tmp_path):
    llama = make_run(tmp_path / "llama", model="llama-3-8b", data="gsm8k", sets=GSM8K)
    benchmark = tmp_path / "sampling.md"
    rows = "\n".join(f"| {n} | {n * 10:,} | – | {n * 5:,} (2.0×) | 9 |" for n in (1, 8, 16))
    heads = "| rows | ours | off | transformers, sorted | one at a time |\n| --- | --- | --- | --- | --- |"
    benchmark.write_text(f"# x\n\n## a model\n\n{heads}\n{rows}\n")
    found = exhibits(*gsm8k, llama, benchmark=benchmark)
    assert {exhibit["kind"] for exhibit in found.values()} == {"table", "lines", "bars"}
    (panel, theirs) = found["figure-4"]["panels"]
    lines = {line["name"]: [(p["x"], p["value"]) for p in line["points"]] for line in panel["series"]}
    assert lines["ours, with calculator"] == [(1, 10), (8, 80), (16, 160)]
    assert lines["transformers"] == [(1, 5), (8, 40), (16, 80)]
    assert {line["origin"] for line in theirs["series"]} == {"paper"}


def test_table_2_has_the_files_scores_and_paired_differences(gsm8k):
    table = exhibits(*gsm8k)["table-2"]
    scores, differences = table["parts"][:2]
    assert [row[0] for row in ours(scores)] == ["SFT", "ST", "DPO-ST"]
    stored = {
        path.name: json.loads((path / "iteration-2" / "evaluation.json").read_text())["sft"]["greedy"] for path in gsm8k
    }
    for row, name in ((ours(scores)[1], "st"), (ours(scores)[2], "dpo")):
        for cell, test in zip(row[2:], list(GSM8K)[1:], strict=True):
            assert {key: cell[key] for key in ("value", "n", "low", "high")} == {
                key: stored[name][test][key] for key in ("value", "n", "low", "high")
            }
    assert [row[0] for row in ours(differences)] == ["ST − SFT", "DPO-ST − SFT", "DPO-ST − ST"]
    expected = paired_difference(stored["st"]["gsm8k/test"]["correct"], stored["dpo"]["gsm8k/test"]["correct"])
    cell = ours(differences)[2][2]
    assert (cell["value"], cell["low"], cell["high"]) == (expected.value, expected.low, expected.high)
    paper_rows = table["parts"][-1]["rows"]
    assert {row["origin"] for row in paper_rows} == {"paper"} and len(paper_rows) == 6


def test_runs_that_differ_by_their_seed_are_one_row(tmp_path):
    paths = [make_run(tmp_path / f"{seed}", seed=seed, rates=(0.2, 0.4, rate)) for seed, rate in ((1, 0.5), (2, 0.7))]
    (row,) = [row for row in ours(exhibits(*paths)["table-2"]["parts"][0]) if row[0] == "DPO-ST"]
    assert row[1] == "seeds 1, 2, iterations 2, 2"
    assert row[2]["value"] == pytest.approx((0.5 + 0.7) / 2)
    assert row[2]["n"] == 30  # questions, not outcomes


def test_runs_of_other_hyperparameters_are_rows_of_their_own(tmp_path):
    few = make_run(tmp_path / "few", n_sft=2)
    many = make_run(tmp_path / "many", n_sft=3)
    found = exhibits(few, many)
    labels = [row[0] for row in ours(found["table-2"]["parts"][0])]
    assert labels == ["SFT", "DPO-ST (samples=2)", "DPO-ST (samples=3)"]
    assert [row[0] for row in ours(found["table-3"]["parts"][0])] == ["DPO-ST (K = 2)", "DPO-ST (K = 3)"]


def test_runs_on_other_data_are_not_compared(tmp_path, gsm8k):
    mine = make_run(tmp_path / "mine")
    titles = [part["title"] for part in exhibits(mine, gsm8k[0])["table-2"]["parts"]]
    assert "tiny-t5 on mine" in titles and "flan-t5-large on gsm8k" in titles


def test_figure_5_lays_the_papers_lines_beside_ours(gsm8k):
    figure = exhibits(*gsm8k)["figure-5"]
    panel = figure["panels"][0]
    by_origin = {origin: [s for s in panel["series"] if s["origin"] == origin] for origin in ("ours", "paper")}
    assert [line["name"] for line in by_origin["ours"]] == ["ST, seed 1", "DPO-ST, seed 1"]
    assert [p["value"] for p in by_origin["paper"][1]["points"]] == [0.308, 0.341, 0.356, 0.374]
    # The base model that no run has gets a panel of its own; that of the runs is not shown twice.
    assert [p["title"] for p in figure["panels"]][-1] == "The paper's: Flan-T5-Base"


def test_what_figure_5_lacks_is_named(tmp_path):
    path = make_run(tmp_path / "run", seed=3)
    figure = exhibits(path)["figure-5"]
    words = f"python train.py --data mine.jsonl --method st --seed 3 --config {path}/config.json"
    assert figure["notes"] == [f"ST is missing for tiny-t5 on mine: {words}"]


def test_figure_6_counts_the_labels_before_and_after_by_the_runs_rules(tmp_path):
    path = make_run(tmp_path / "run", n_iterations=1, n_dpo=3, n_sft=2)
    folder = path / "iteration-1"
    for kind in ("dpo", "sft"):
        records = [record for _, record in read_jsonl(folder / f"samples-{kind}.jsonl")]
        for record in records:  # all of one question unlike each other, so that each correct one is a label
            start = 100 * record["sample_index"] + 10
            record["token_ids"] = list(range(start, start + 5))
        write_jsonl(folder / f"samples-{kind}.jsonl", records)
    run = read_run(path, "run", Files())
    run.settings["preset"]["label_percentile"] = None  # no cap

    def n_correct(kind):
        records = [record for _, record in read_jsonl(folder / f"samples-{kind}.jsonl")]
        return sum(record["is_correct"] and record["sample_index"] < 2 for record in records)

    assert pseudo_labels_before_and_after(run, Files()) == (n_correct("dpo"), n_correct("sft"))
    (folder / "samples-dpo.jsonl").unlink()
    assert pseudo_labels_before_and_after(run, Files()) == (None, None)


def test_figure_7_pairs_runs_that_differ_in_the_calculator_alone(gsm8k):
    figure = exhibits(*gsm8k)["figure-7"]
    names = [line["name"] for line in figure["panels"][0]["series"]]
    assert names[:2] == ["with calculator", "without calculator"]
    assert exhibits(gsm8k[0])["figure-7"]["command"] == (
        f"python train.py --model flan-t5-large --data gsm8k --seed 1 --no-calculator --config {gsm8k[0]}/config.json"
    )


def test_figure_7_does_not_pair_runs_that_differ_in_more(tmp_path):
    runs = [make_run(tmp_path / "on", beta=0.2), make_run(tmp_path / "off", no_calculator=True)]
    assert exhibits(*runs)["figure-7"]["kind"] == "missing"


def change_settings(path, **changes):
    """Change settings of a run outside its preset."""
    edit_config(path, settings={**json.loads((path / "config.json").read_text())["settings"], **changes})
    return path


def test_runs_of_another_template_or_precision_are_not_one(tmp_path):
    runs = [make_run(tmp_path / name, model="SmolLM2") for name in ("a", "b", "c")]
    change_settings(runs[1], template="chat")
    change_settings(runs[2], train_dtype="bf16")
    labels = [row[0] for row in ours(exhibits(*runs)["table-2"]["parts"][0])]
    assert len(set(labels)) == len(labels) == 6
    assert "DPO-ST (template=chat, train_dtype=none)" in labels
    assert "SFT (template=none, train_dtype=bf16)" in labels


def test_runs_of_other_weights_of_one_name_are_not_compared(tmp_path):
    runs = [change_settings(make_run(tmp_path / name), weights=name) for name in ("a", "b")]
    assert len([part for part in exhibits(*runs)["table-2"]["parts"] if part["title"] == "tiny-t5 on mine"]) == 2


def test_lora_is_compared_with_its_own_warm_up(tmp_path):
    whole = make_run(tmp_path / "whole", rates=(0.2, 0.4, 0.5))
    adapters = make_run(tmp_path / "adapters", rates=(0.3, 0.4, 0.6), lora_rank=16)
    scores, differences = exhibits(whole, adapters)["table-2"]["parts"][:2]
    assert [row[0] for row in ours(scores)] == [
        "SFT (lora_rank=none)",
        "SFT (lora_rank=16)",
        "DPO-ST (lora_rank=none)",
        "DPO-ST (lora_rank=16)",
    ]
    found = {row[0]: round(row[2]["value"], 6) for row in ours(differences)}
    assert found == {
        "DPO-ST (lora_rank=none) − SFT (lora_rank=none)": 0.3,
        "DPO-ST (lora_rank=16) − SFT (lora_rank=16)": 0.3,
    }


def test_without_a_warm_up_iteration_0_is_the_base(tmp_path):
    labels = [row[0] for row in ours(exhibits(make_run(tmp_path / "run", warm_up=False))["table-2"]["parts"][0])]
    assert labels == ["base", "DPO-ST"]


def test_a_command_gives_a_model_of_the_hub_by_its_id(tmp_path):
    path = make_run(tmp_path / "run", model="OWNER--NAME@v1", data="gsm8k", sets=GSM8K)
    change_settings(path, template="chat", limit=100, preset=asdict(replace(T5, micro_batch_tokens=100)))
    assert command(read_run(path, "run", Files()), seed=7) == (
        "python train.py --model OWNER/NAME@v1 --data gsm8k --limit 100 --seed 7 --template chat"
    )


def test_a_decoder_only_model_is_known_by_what_the_run_made(tmp_path):
    path = make_run(tmp_path / "run", model="deepseek--math")
    assert exhibits(path)["table-4"]["kind"] == "missing"
    write_json(path / "iteration-0" / "sft" / "config.json", {"model_type": "llama"})
    assert exhibits(path)["table-4"]["kind"] == "table"
    write_json(path / "iteration-0" / "sft" / "config.json", {"model_type": "t5"})
    assert exhibits(path)["table-4"]["kind"] == "missing"


def test_commands_are_quoted(tmp_path):
    run = read_run(make_run(tmp_path / "run", data="my data; rm -rf.jsonl"), "run", Files())
    assert shlex.split(command(run))[3] == "my data; rm -rf.jsonl"


def test_every_number_of_the_papers_is_in_its_text(shared):
    text = (shared / "paper" / "2407.18248.txt").read_text(encoding="utf-8")
    for _, _, accuracies in paper.TABLE_2:
        assert " ".join(map(str, accuracies)) in text
    for row in (*paper.TABLE_3, *paper.TABLE_4):
        assert f"{row[-1]}" in text, row
    for lines in (*paper.FIGURE_5.values(), paper.FIGURE_7, paper.FIGURE_6, paper.FIGURE_4):
        for values in lines.values():
            assert all(f"{value}" in text for value in values), values


def test_a_file_that_is_no_benchmark_has_no_tables(tmp_path):
    path = tmp_path / "x.md"
    assert markdown_tables(path) == []
    path.write_bytes(b"\xff\xfe|")
    assert markdown_tables(path) == []


def eval_file(path, checkpoint, scores):
    """A file as `eval.py --output` writes it."""
    results = [
        {"task": task, "calculator": calculator, "n": 4, "accuracy": {"value": x, "n": 4, "low": 0.0, "high": 1.0}}
        for (task, calculator), x in scores.items()
    ]
    path.write_text(json.dumps({"checkpoint": str(checkpoint), "split": "dev", "results": results}))
    return path


def test_figure_7_is_drawn_from_files_of_eval_too(tmp_path):
    path = make_run(tmp_path / "run")
    scores = [
        eval_file(
            tmp_path / f"{i}.json",
            path / f"iteration-{i}" / "sft",
            {("mine/dev", True): 0.5 + i / 10, ("mine/dev", False): 0.1, ("mine/test", True): 0.9},
        )
        for i in (1, 0)
    ]
    files = Files()
    runs = read_runs([path], files, evaluations=scores)
    figure = {exhibit["id"]: exhibit for exhibit in all_exhibits(runs, benchmark=None, files=files)}["figure-7"]
    lines = {line["name"]: [(p["x"], p["value"]) for p in line["points"]] for line in figure["panels"][0]["series"]}
    assert lines == {"with calculator": [(0, 0.5), (1, 0.6)], "without calculator": [(0, 0.1), (1, 0.1)]}


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"checkpoint": 1, "results": []}', '{"checkpoint": "x", "results": []}']
)
def test_a_file_that_is_of_no_run_is_one_line(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(UserError, match=r"x\.json: (not what eval\.py|measures .* no model of these runs)"):
        read_runs([make_run(tmp_path / "run")], Files(), evaluations=[tmp_path / "x.json"])
