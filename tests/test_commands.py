"""The three commands as a user meets them: what they write and show, and the one line they answer a mistake with.

Most calls run a command in this process, where imports cost nothing; what depends on a process of its own (pipes,
terminals, signals, exit statuses) runs in one.
"""

import io
import json
import os
import pty
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sample as sample_command
from minidpost import cli
from minidpost.cli import MAX_MESSAGE, one_line, run_command
from minidpost.data import datasets, toy
from minidpost.errors import UserError
from minidpost.models.hub import find_model
from minidpost.models.llama import Llama, LlamaConfig
from minidpost.models.t5 import T5, T5Config
from minidpost.models.weights import load_model, load_template, save_model, tokenizer_files
from minidpost.sampling.generate import Sample
from minidpost.selftraining import rehearsal
from minidpost.selftraining.presets import TINY_T5, Preset, preset_for
from minidpost.selftraining.report import results_table
from minidpost.text.templates import template_for
from minidpost.text.tokenizer import load_tokenizer
from minidpost.training import dpo
from minidpost.training.batching import TokenizedExample
from minidpost.training.optim import Schedule, read_log
from minidpost.training.sft import SFTSettings, train_sft

ROOT = Path(__file__).resolve().parents[1]
KNOWN = {
    "Tom has 3 apples and buys 4. How many?": "Tom has <<3+4=7>>7 apples.\n#### 7",
    "Mia has 9 pens and loses 5. How many?": "Mia keeps <<9-5=4>>4 pens.\n#### 4",
}
TOM, MIA = KNOWN
QUICK = ["--limit", "2", "--iterations", "1", "--max-new-tokens", "8", "--sft-epochs", "1", "--samples", "2"]


@dataclass
class Outcome:
    """A finished command."""

    status: int
    out: str
    err: str

    @property
    def complaints(self) -> list[str]:
        """What stands on standard error beside progress bars."""
        return [line for line in self.err.split("\n") if line.strip() and "%|" not in line]


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs a command's file in this process, in an empty directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # which a command replaces

    def run(command: str, *arguments: object, terminal: bool = False) -> Outcome:
        monkeypatch.setattr(sys, "argv", [f"{ROOT}/{command}", *map(str, arguments)])
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
        capsys.readouterr()
        try:
            runpy.run_path(str(ROOT / command), run_name="__main__")
            status = 0
        except SystemExit as end:
            status = end.code or 0
        return Outcome(status, *capsys.readouterr())

    return run


def start(command: str, *arguments: object, **options) -> subprocess.Popen:
    """Starts a command as a process of its own, one that Ctrl-C reaches."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **options.pop("env", {})}
    environment.pop("PYTHONUNBUFFERED", None)  # as most users have it
    pipes = {name: options.pop(name, subprocess.PIPE) for name in ("stdin", "stdout", "stderr")}
    return subprocess.Popen(
        [sys.executable, ROOT / command, *map(str, arguments)],
        env=environment,
        text=True,
        preexec_fn=options.pop("preexec_fn", lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)),
        **pipes,
        **options,
    )


def finished(process: subprocess.Popen, given: str | None = None) -> Outcome:
    out, err = process.communicate(given, timeout=120)
    return Outcome(process.returncode, out, err)


@pytest.fixture(scope="session")
def knowing_model_dir(tmp_path_factory, tiny_template) -> Path:
    """A tiny model that knows two answers by heart, calculator annotations included."""
    tokenizer = load_tokenizer(ROOT / "weights" / "tiny-t5")
    torch.manual_seed(0)
    model = T5(T5Config(tokenizer.vocab_size, 32, 16, 64, 2, 1, 1, dropout=0.0)).initialise()
    pairs = [
        TokenizedExample(tuple(tiny_template.prompt_ids(question)), tuple(tiny_template.target_ids(rationale)))
        for question, rationale in KNOWN.items()
    ]
    train_sft(model, pairs, SFTSettings(60, 2, Schedule(1e-2)))
    directory = tmp_path_factory.mktemp("models") / "knowing"
    save_model(model, directory, tokenizer.files)
    return directory


def write_lines(path: str | Path, *rows: dict | str) -> Path:
    path = Path(path)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def read_rows(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def snapshot(directory: Path) -> dict[str, tuple[int, bytes]]:
    files = [path for path in directory.rglob("*") if path.is_file()]
    return {str(path.relative_to(directory)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


# -- sample.py --------------------------------------------------------------------------------------------------------


def test_rows_in_the_order_of_questions_and_samples(call, knowing_model_dir, tiny_template):
    outcome = call("sample.py", TOM, MIA, "--checkpoint", knowing_model_dir, "--output", "rows.jsonl", "--slots", 1)
    assert (outcome.status, outcome.complaints) == (0, [])
    assert "2 completions of 2 questions: rows.jsonl" in outcome.out
    rows = read_rows("rows.jsonl")
    for index, (row, (question, rationale), answer) in enumerate(zip(rows, KNOWN.items(), "74", strict=True)):
        assert [*row] == "index sample question completion answer finish_reason token_ids forced".split()
        assert (row["index"], row["sample"], row["question"]) == (index, 0, question)
        assert (row["completion"], row["answer"], row["finish_reason"]) == (rationale, answer, "stop")
        assert row["token_ids"] == tiny_template.target_ids(rationale)
        forced = [i for i, flag in zip(row["token_ids"], row["forced"], strict=True) if flag]
        assert tiny_template.decode(forced).strip("[] ") == answer
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]


def test_samples_depend_on_the_seed_and_not_on_the_slots(call, knowing_model_dir):
    flags = ["--checkpoint", knowing_model_dir, "--samples", 3, "--temperature", 3, "--max-new-tokens", 9]
    seeds_and_slots = [(1, 64), (1, 2), (2, 64)]
    for name, (seed, slots) in zip("abc", seeds_and_slots, strict=True):
        assert call("sample.py", TOM, MIA, *flags, "--seed", seed, "--slots", slots, "--output", name).status == 0
    a, b, c = map(read_rows, "abc")
    assert [(row["index"], row["sample"]) for row in a] == [(i, k) for i in range(2) for k in range(3)]
    assert a == b != c
    assert len({row["completion"] for row in a}) == 6


@pytest.mark.parametrize("flags", [["--top-k", 1], ["--top-p", 1e-9]])
def test_the_likeliest_token_alone_is_greedy(call, knowing_model_dir, flags):
    call("sample.py", TOM, "--checkpoint", knowing_model_dir, "--temperature", 5, *flags, "--output", "rows.jsonl")
    assert read_rows("rows.jsonl")[0]["completion"] == KNOWN[TOM]


def test_without_calculator_nothing_is_forced(call, knowing_model_dir):
    call("sample.py", TOM, "--checkpoint", knowing_model_dir, "--no-calculator", "--output", "rows.jsonl")
    (row,) = read_rows("rows.jsonl")
    assert not any(row["forced"])
    assert row["completion"] == KNOWN[TOM]


def test_a_missing_answer_is_null_and_a_cut_is_told(call, knowing_model_dir):
    flags = ["--checkpoint", knowing_model_dir, "--max-new-tokens", 3]
    call("sample.py", TOM, *flags, "--output", "rows.jsonl")
    (row,) = read_rows("rows.jsonl")
    assert (row["answer"], row["finish_reason"], len(row["token_ids"])) == (None, "length", 3)
    assert "(cut after 3 tokens)" in call("sample.py", TOM, *flags).out


@pytest.mark.parametrize("name", ["questions.jsonl", "questions.txt"])
def test_questions_from_a_file(call, knowing_model_dir, name):
    rows = [{"question": TOM, "answer": "of no interest"}, "", {"question": f" {MIA} "}]
    if name.endswith(".txt"):
        rows = [TOM, "", f" {MIA} \r"]
    write_lines(Path(name), *rows)
    call("sample.py", "--input", name, "--checkpoint", knowing_model_dir, "--output", "rows.jsonl")
    assert [row["question"] for row in read_rows("rows.jsonl")] == [TOM, MIA]


@pytest.mark.parametrize("given", [json.dumps({"question": TOM}), f"\n{TOM}\r\n"])
def test_questions_from_standard_input(call, knowing_model_dir, monkeypatch, given):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    outcome = call("sample.py", "--input", "-", "--checkpoint", knowing_model_dir)
    assert (outcome.status, outcome.complaints) == (0, [])
    assert outcome.out == f"{TOM}\n    Tom has <<3+4=7>>7 apples.\n    #### 7\n"


def test_results_of_the_calculator_stand_out_on_a_terminal_only(call, knowing_model_dir, monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    flags = [TOM, "--checkpoint", knowing_model_dir]
    plain = call("sample.py", *flags).out
    assert "<<3+4=7>>7 apples" in plain
    bold = call("sample.py", *flags, terminal=True).out
    assert f"<<3+4={sample_command.BOLD}7{sample_command.PLAIN}>>7 apples" in bold
    assert call("sample.py", *flags, "--no-calculator", terminal=True).out == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert call("sample.py", *flags, terminal=True).out == plain


def test_from_a_pipe_to_a_terminal(knowing_model_dir, tmp_path):
    ours, theirs = pty.openpty()
    flags = ["--input", "-", "--checkpoint", knowing_model_dir]
    process = start("sample.py", *flags, stdin=subprocess.PIPE, stdout=theirs, cwd=tmp_path, env={"NO_COLOR": ""})
    outcome = finished(process, TOM)
    os.close(theirs)
    assert (outcome.status, outcome.complaints) == (0, [])
    assert f"={sample_command.BOLD}7{sample_command.PLAIN}>>" in os.read(ours, 10_000).decode()


def test_only_what_was_forced_is_highlighted():
    text = "A <<1+1=2>>2, b <<2*3=6>>6, c <<7>>7.\n#### 6"
    assert sample_command.highlighted(text, set()) == text
    assert sample_command.highlighted(text, {1, 2}) == text.replace("=6", "=\x1b[1;36m6\x1b[0m").replace(
        "<<7", "<<\x1b[1;36m7\x1b[0m"
    )


def sample_of(ids: list[tuple[int, bool]]) -> Sample:
    """A sample of these ids, each with whether it was forced."""
    token_ids, forced = map(list, zip(*ids, strict=True))
    return Sample(0, 0, "", None, "", None, token_ids, forced, "stop")


@pytest.mark.parametrize(
    ("pieces", "indices"),
    [
        ([("a [ 1 + 1 =", 0), (" 2]", 1), (" 2 b [ 2 * 3 = 6] 6 c [ 8 / 2 =", 0), (" 4]", 1), (" 4", 0)], {0, 2}),
        ([("a [ 1 + 1 = 2] 2 b [ 2 * 3 =", 0), (" 6]", 1)], {1}),
        ([("a [ 1 + 1 = 2] 2 b [ 90 * 3 =", 0), (" 2", 1)], set()),  # cut inside a forced result
        ([("a [ 1 + 1 = 2] 2", 0)], set()),
    ],
)
def test_which_annotations_were_forced(tiny_template, pieces, indices):
    tokenizer = load_tokenizer(ROOT / "weights" / "tiny-t5")
    ids = [(i, bool(forced)) for text, forced in pieces for i in tokenizer.encode(text)]
    assert sample_command.forced_annotations(sample_of(ids), tiny_template) == indices


@pytest.mark.parametrize("name", ["llama2", "llama3"])
def test_which_annotations_of_a_llama_were_forced(shared, name):
    tokenizer = load_tokenizer(shared / "tokenizers" / name)
    pieces = [("a <<1+1=", 0), ("2>>", 1), ("2\nb <<2*3=6>>6\n\nc (<<(8-30)=", 0), ("-22>>", 1), (").", 0)]
    ids = [(i, bool(forced)) for text, forced in pieces for i in tokenizer.encode(text, continued=True)]
    sample = sample_of(ids)
    template = template_for("llama", tokenizer)
    assert sample_command.forced_annotations(sample, template) == {0, 2}
    assert sample_command.highlighted(template.decode(sample.token_ids), {2}).endswith(
        "2\nb <<2*3=6>>6\nc (<<(8-30)=\x1b[1;36m-22\x1b[0m>>)."
    )


def test_control_characters_do_not_reach_a_terminal(tiny_template, capsys):
    sample = Sample(0, 0, "\x1bcHow?\x07", None, "½ – ü\n\x1b[2J", None, [1], [False], "stop")
    sample_command.show([sample], tiny_template)
    assert capsys.readouterr().out == "\ufffdcHow?\ufffd\n    ½ – ü\n    \ufffd[2J\n"


def test_without_argument_the_newest_runs_best_model_answers(call, tiny_model_dir, knowing_model_dir):
    """The best on dev, which is not the last; and it is said which one that is."""
    for name, source in (("a/iteration-2", tiny_model_dir), ("b/iteration-1", knowing_model_dir)):
        shutil.copytree(source, Path("runs", name, "sft"))
    shutil.copytree(tiny_model_dir, "runs/b/iteration-2/sft")
    entries = [{"checkpoint": f"iteration-{iteration}/sft"} for iteration in range(3)]
    for run, age, best in (("a", 50, 2), ("b", 10, 1), ("c", 5, None)):  # c is not finished
        content = {"best_iteration": best, "iterations": entries if best else []}
        Path("runs", run).mkdir(exist_ok=True)
        results = write_lines(Path("runs", run, "results.json"), content)
        os.utime(results, (time.time() - age,) * 2)
    outcome = call("sample.py", "--max-new-tokens", 30)
    assert (outcome.status, outcome.complaints) == (0, ["model: runs/b/iteration-1/sft"])
    assert [line for line in outcome.out.splitlines() if line and line[0] != " "] == [
        example.question for example in toy.examples("dev")[:5]
    ]
    assert outcome.out == call("sample.py", "--max-new-tokens", 30, "--checkpoint", "runs/b/iteration-1/sft").out


@pytest.mark.parametrize("base", ["hub", "directory", "unknown"])
def test_without_argument_the_base_answers_where_it_is_the_best(call, tiny_model_dir, monkeypatch, base):
    """A run without a warm-up may leave nothing better; the base is found as --model named it, a repository too."""
    weights = Path("weights").absolute()
    shutil.copytree(tiny_model_dir, weights / "me--mine")
    shutil.copytree(tiny_model_dir, "elsewhere/mine")
    monkeypatch.setattr(cli, "find_model", partial(find_model, weights_dir=weights))
    shutil.copytree(tiny_model_dir, weights / "tiny-t5-dpo-st")  # what answers without a run
    content = {"best_iteration": 0, "iterations": [{"checkpoint": None}]}
    named, found = {
        "hub": ({"model": "me--mine", "base": "me/mine"}, weights / "me--mine"),
        "directory": ({"model": "mine", "base": "elsewhere/mine"}, "elsewhere/mine"),
        "unknown": ({"model": "mine"}, weights / "tiny-t5-dpo-st"),  # a run of an older version
    }[base]
    Path("runs/a").mkdir(parents=True)
    write_lines("runs/a/results.json", content | named)
    outcome = call("sample.py", TOM, "--max-new-tokens", 2)
    assert (outcome.status, outcome.complaints) == (0, [f"model: {found}"])
    write_lines("runs/a/config.json", {"settings": {"template": "chat"}})
    if base != "unknown":  # asked as the run asked it
        assert cli.default_checkpoint() == (Path(found), "chat")


def test_a_runs_directory_as_model_names_the_model_in_it(call, tiny_model_dir):
    run = Path("runs/x")
    for folder in ("iteration-2/sft", "iteration-10/dpo"):
        shutil.copytree(tiny_model_dir, run / folder)
    write_lines(run / "config.json", {"settings": {"model": "tiny-t5"}})
    best = {"best_iteration": 0, "iterations": [{"checkpoint": "iteration-2/sft"}]}
    for command, flag in (("train.py", "--model"), ("sample.py", "--checkpoint"), ("eval.py", "--checkpoint")):
        for results, named, complaint in (
            (None, run, "a run's directory, not a model's; its last model is runs/x/iteration-10/dpo"),
            (best, run, "a run's directory, not a model's; its best model on dev is runs/x/iteration-2/sft"),
            (
                best,
                run / "iteration-2",
                "an iteration of a run, not a model's directory; its model is runs/x/iteration-2/sft",
            ),
        ):
            (run / "results.json").unlink(missing_ok=True)
            if results:
                write_lines(run / "results.json", results)
            outcome = call(command, flag, named)
            assert (outcome.status, outcome.complaints) == (2, [f"{command}: {named}: {complaint}"])
    shutil.rmtree(run / "iteration-2")
    shutil.rmtree(run / "iteration-10")
    assert "no model of it is here yet" in call("sample.py", "--checkpoint", run).err


# -- eval.py ----------------------------------------------------------------------------------------------------------


def test_the_toy_test_sets_with_and_without_calculator(call, tiny_model_dir):
    flags = ["--checkpoint", tiny_model_dir, "--limit", 3, "--max-new-tokens", 6]
    outcome = call("eval.py", *flags, "--pass-at", "2,1", "--maj-at", 3, "--output", "scores.json")
    assert (outcome.status, outcome.complaints) == (0, [])
    scores = json.loads(Path("scores.json").read_text())
    assert (scores["checkpoint"], scores["split"]) == (str(tiny_model_dir), "test")
    names = [f"toy/{split}" for split in ("test", "longer", "words", "distractors")]
    assert [(row["task"], row["calculator"]) for row in scores["results"]] == [
        (name, calculator) for name in names for calculator in (True, False)
    ]
    for row in scores["results"]:
        assert row["n"] == row["accuracy"]["n"] == 3
        assert row["accuracy"]["low"] <= row["accuracy"]["value"] <= row["accuracy"]["high"]
        assert (row["pass_at"].keys(), row["maj_at"].keys()) == ({"1", "2"}, {"3"})
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in outcome.out.splitlines() if "|" in line]
    assert lines[0] == ["task", "calculator", "questions", "accuracy", "pass@1", "pass@2", "maj@3"]
    assert lines[2] == ["toy/test", "on", "3", *["0.0% (0.0–56.2)"] * 4]
    assert [line[0] for line in lines[2::2]] == names


def test_a_model_that_knows_the_answers_is_right(call, knowing_model_dir, monkeypatch):
    known = [datasets.Example(TOM, "7"), datasets.Example(MIA, "5")]
    monkeypatch.setattr(datasets, "load", lambda name, split, data_dir: known)
    outcome = call("eval.py", "--checkpoint", knowing_model_dir, "--split", "dev", "--calculator", "on")
    assert "toy/dev | on         | 2         | 50.0% (9.5–90.5)" in outcome.out
    assert "off" not in outcome.out


def test_a_file_of_ones_own_is_measured(call, knowing_model_dir):
    write_lines("mine.jsonl", {"question": TOM, "answer": 7}, {"question": MIA, "answer": 5})
    flags = ["--checkpoint", knowing_model_dir, "--tasks", "mine.jsonl", "--calculator", "on"]
    assert "mine/test | on         | 2         | 50.0% (9.5–90.5)" in call("eval.py", *flags).out
    assert "mine/dev | on         | 1 " in call("eval.py", *flags, "--split", "dev").out
    outcome = call("eval.py", *flags[:3], "mine.jsonl,./mine.jsonl")
    complaint = "eval.py: --tasks ./mine.jsonl: another task has the name mine/test too; rename the file"
    assert (outcome.status, outcome.complaints) == (2, [complaint])


def test_real_sets(call, tiny_model_dir, shared):
    flags = ["--checkpoint", tiny_model_dir, "--limit", 2, "--max-new-tokens", 3, "--calculator", "off"]
    outcome = call("eval.py", "--tasks", "svamp, multiarith", "--data-dir", shared / "data", *flags)
    assert re.findall(r"^\| (\w+/\w+) +\| off", outcome.out, re.MULTILINE) == ["svamp/test", "multiarith/test"]


# -- train.py ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def my_data(tmp_path) -> Path:
    rows = [{"question": e.question, "answer": e.answer, "rationale": e.rationale} for e in toy.examples("train")[:6]]
    return write_lines(tmp_path / "mine.jsonl", *rows)


FILES = {
    "sft": ["sft"],
    "st": ["samples-sft.jsonl", "pseudo-labels.jsonl", "sft"],
    "rft": ["samples-sft.jsonl", "pseudo-labels.jsonl", "sft"],
    "dpo-st": [
        "samples-dpo.jsonl",
        "pairs.jsonl",
        "reference.safetensors",
        "dpo",
        "samples-sft.jsonl",
        "pseudo-labels.jsonl",
        "sft",
    ],
}


def test_a_whole_run_of_a_llama(call, my_data):
    tokenizer = load_tokenizer(ROOT / "weights" / "tiny-llama")
    torch.manual_seed(0)
    model = Llama(LlamaConfig(tokenizer.vocab_size, 16, 24, 2, n_heads=4, n_kv_heads=2, d_head=4)).initialise()
    save_model(model, "llama", tokenizer.files)
    outcome = call("train.py", "--model", "llama", "--data", my_data, "--run-dir", "run", *QUICK, "--limit", 6)
    assert (outcome.status, outcome.complaints) == (0, [])
    assert {path.name for path in Path("run/iteration-1").iterdir()} == {*FILES["dpo-st"], "evaluation.json"}
    settings = json.loads(Path("run/results.json").read_text())["settings"]["preset"]
    assert (settings["sft_examples_per_step"], settings["activation_checkpointing"]) == (16, False)
    for row in read_rows("run/iteration-1/pairs.jsonl"):
        assert tokenizer.decode(row["chosen_ids"]) == row["chosen"]
    assert call("sample.py", TOM, "--max-new-tokens", 4, "--checkpoint", "run/iteration-1/sft").out.startswith(TOM)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_a_whole_run_with_lora(call, tiny_model_dir, my_data, family):
    """Its models are models as any; its directory is named after the rank, and its config has everything."""
    base = tiny_model_dir
    if family == "llama":
        base = Path("llama").absolute()
        tokenizer = load_tokenizer(ROOT / "weights" / "tiny-llama")
        torch.manual_seed(0)
        model = Llama(LlamaConfig(tokenizer.vocab_size, 16, 24, 2, n_heads=4, n_kv_heads=2, d_head=4)).initialise()
        save_model(model, base, tokenizer.files)
    flags = ["--model", base, "--data", my_data, *QUICK, "--limit", 6]
    outcome = call("train.py", *flags, "--lora-rank", 4)
    assert (outcome.status, outcome.complaints) == (0, [])
    (run,) = Path("runs").iterdir()
    assert run.name.startswith(f"{base.name}-dpo-st-mine-42-limit=6-") and "-lora-rank=4-" in run.name
    assert "learning-rate" not in run.name  # they are the preset's for LoRA
    preset = json.loads((run / "config.json").read_text())["settings"]["preset"]
    assert (preset["lora_rank"], preset["lora_alpha"]) == (4, None)
    rates = (preset["sft_learning_rate"], preset["dpo_learning_rate"])
    assert rates == (6e-3, 10 * TINY_T5.dpo_learning_rate)

    for name in ("iteration-0/sft", "iteration-1/dpo", "iteration-1/sft"):
        directory = run / name
        merged = {*(path.name for path in base.iterdir()), "log.jsonl"}
        assert {path.name for path in directory.iterdir()} == merged | {"adapter"}
        assert {path.name for path in (directory / "adapter").iterdir()} == {
            "adapter_config.json",
            "adapter_model.safetensors",
        }
        adapter = json.loads((directory / "adapter" / "adapter_config.json").read_text())
        assert (adapter["r"], adapter["lora_alpha"]) == (4, 8.0)
        start = run / "iteration-0/sft" if name.endswith("dpo") else base
        assert adapter["base_model_name_or_path"] == str(start)
    assert call("sample.py", TOM, "--max-new-tokens", 4, "--checkpoint", run / "iteration-1/sft").out.startswith(TOM)

    # The adapter alone is no model; the run goes on, and takes nothing but its own settings.
    outcome = call("sample.py", TOM, "--checkpoint", run / "iteration-1/sft/adapter")
    assert (outcome.status, len(outcome.complaints)) == (2, 1) and "a LoRA adapter of" in outcome.complaints[0]
    before = snapshot(run / "iteration-1")
    assert call("train.py", *flags, "--config", run / "config.json", "--run-dir", run).status == 0
    assert snapshot(run / "iteration-1") == before
    outcome = call("train.py", *flags, "--run-dir", run)
    assert (outcome.status, len(outcome.complaints)) == (2, 1)
    assert "was begun with preset." in outcome.complaints[0] and "--fresh" in outcome.complaints[0]


def test_a_learning_rate_that_is_given_is_what_lora_has(call, tiny_model_dir, my_data):
    flags = ["--model", tiny_model_dir, "--data", my_data, *QUICK, "--method", "sft", "--lora-rank", 2]
    assert call("train.py", *flags, "--sft-learning-rate", 0.005, "--lora-alpha", 3).status == 0
    (run,) = Path("runs").iterdir()
    assert "sft-learning-rate=0.005-lora-rank=2-lora-alpha=3-" in run.name
    preset = json.loads((run / "config.json").read_text())["settings"]["preset"]
    assert (preset["sft_learning_rate"], preset["lora_alpha"]) == (0.005, 3.0)
    assert max(row["lr"] for row in read_rows(run / "iteration-0/sft/log.jsonl")) == pytest.approx(0.005)


def test_the_same_questions_are_held_out_whatever_the_seed(call, tiny_model_dir, tmp_path):
    rows = [{"question": e.question, "answer": e.answer, "rationale": e.rationale} for e in toy.examples("train")[:20]]
    path = write_lines(tmp_path / "mine.jsonl", *rows)
    dev = [example.question for example in datasets.load(str(path), "dev")]
    assert len(dev) == 2
    for seed in (1, 2):
        flags = ["--model", tiny_model_dir, "--data", path, "--method", "st", *QUICK[2:], "--seed", seed]
        assert call("train.py", *flags, "--run-dir", f"run-{seed}").status in (0, 2)
        pool = {row["question"] for row in read_rows(f"run-{seed}/iteration-1/samples-sft.jsonl")}
        assert pool == {row["question"] for row in rows} - {*dev}


def test_a_chat_format_is_trained_recorded_and_read_back(call, shared, my_data):
    """SmolLM2's vocabulary in a random Llama: --template chat in training; sample.py knows without being told."""
    tokenizer = load_tokenizer(shared / "tokenizers" / "smollm2")
    torch.manual_seed(0)
    config = LlamaConfig(tokenizer.vocab_size, 8, 8, 1, n_heads=1, n_kv_heads=1, d_head=8, tied=True, eos_id=0)
    save_model(Llama(config).initialise(), "llama", tokenizer.files)
    flags = ["--model", "llama", "--data", my_data, "--method", "sft", *QUICK, "--limit", 4]
    outcome = call("train.py", *flags, "--template", "chat")
    assert (outcome.status, outcome.complaints) == (0, [])
    (run,) = Path("runs").iterdir()
    assert "template=chat" in run.name
    assert json.loads((run / "config.json").read_text())["settings"]["template"] == "chat"
    trained = load_template(run / "iteration-0/sft")
    assert trained.prompt_ids(TOM) == load_template("llama", "chat").prompt_ids(TOM)
    assert trained.prompt_ids(TOM) != load_template("llama").prompt_ids(TOM)
    sampled = [
        call("sample.py", TOM, "--checkpoint", run / "iteration-0/sft", "--max-new-tokens", 6, *flags).out
        for flags in ([], ["--template", "chat"], ["--template", "alpaca"])
    ]
    assert sampled[0] == sampled[1] != sampled[2]
    end_of_turn = tokenizer.special_ids["<|im_end|>"]  # the base ends in <|endoftext|>, and has never seen a turn end
    assert json.loads((run / "iteration-0/sft/config.json").read_text())["eos_token_id"] == [0, end_of_turn]


@pytest.mark.parametrize("flags", [[], ["--activation-checkpointing"]])
def test_a_run_that_cannot_fit_is_refused(call, tiny_model_dir, my_data, monkeypatch, flags):
    from minidpost.selftraining import estimates

    monkeypatch.setattr(estimates, "available_bytes", lambda device: 10**6)
    outcome = call("train.py", "--model", tiny_model_dir, "--data", my_data, "--run-dir", "run", *flags)
    assert outcome.status == 2
    assert re.fullmatch(r"train\.py: memory: training .* GB, sampling .* MB needed .*", outcome.complaints[0])
    assert not Path("run").exists()


@pytest.mark.parametrize("method", FILES)
def test_a_whole_run_of_each_method(call, tiny_model_dir, my_data, method):
    flags = [*QUICK, "--limit", 6, "--method", method]
    outcome = call("train.py", "--model", tiny_model_dir, "--data", my_data, "--run-dir", "run", *flags)
    assert (outcome.status, outcome.complaints) == (0, [])
    run = Path("run")
    iterations = [0] if method == "sft" else [0, 1]
    for iteration in iterations:
        files = [*(FILES[method] if iteration else FILES["sft"]), "evaluation.json"]
        assert {path.name for path in (run / f"iteration-{iteration}").iterdir()} == set(files)
        for model in {"sft", "dpo"} & set(files):
            load_model(run / f"iteration-{iteration}" / model)
            names = {"config.json", "model.safetensors", "spiece.model", "log.jsonl"}
            assert {path.name for path in (run / f"iteration-{iteration}" / model).iterdir()} == names
    results = json.loads((run / "results.json").read_text())
    assert (results["model"], results["method"], results["seed"]) == (tiny_model_dir.name, method, 42)
    assert results["settings"]["preset"]["max_new_tokens"] == 8
    assert [entry["iteration"] for entry in results["iterations"]] == iterations
    for entry in results["iterations"]:
        assert {name: (score["value"], score["n"]) for name, score in entry["accuracy"].items()} == {"mine/dev": (0, 1)}
        assert entry["flops"] > 0
        assert isinstance(entry["seconds"], float) and entry["seconds"] >= 0
        assert [*entry["pass_at"]] == [str(k) for k in range(1, 11)]
        assert entry["pass_at"]["10"]["value"] == 0
        assert (entry["dpo"] is not None) == (method == "dpo-st" and entry["iteration"] == 1)
        assert (entry["pairs"] is not None) == (method == "dpo-st" and entry["iteration"] == 1)
        assert entry["pseudo_labels"] == (0 if entry["iteration"] else None)
    assert results_table(results) in outcome.out
    assert results_table(results) in (run / "report.md").read_text()
    figures = {"accuracy.png", "pass_at_k.png"} if method == "dpo-st" else {"accuracy.png"}
    assert {path.name for path in (run / "figures").iterdir()} == figures
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (run / "figures").iterdir())
    assert {path.name for path in run.iterdir()} == {
        *(f"iteration-{iteration}" for iteration in iterations),
        *(".lock", "config.json", "stages.jsonl", "log.txt", "results.json", "report.md", "figures"),
    }
    # Where the run stands as a whole: every stage has its number among all.
    begun = re.findall(r" (iteration-\S+) \(stage (\d+) of (\d+)", (run / "log.txt").read_text())
    stages = [row["stage"] for row in read_rows(run / "stages.jsonl")]
    assert begun == [(name, str(number), str(len(stages))) for number, name in enumerate(stages, start=1)]
    # From the end of the warm-up and its evaluation on, it is told how long the rest will take.
    left = re.findall(r" (iteration-\S+) \(stage .* left\)", (run / "log.txt").read_text())
    assert left == stages[2:]


def test_rest_em_without_a_correct_sample_is_one_line(call, tiny_model_dir, my_data):
    outcome = call("train.py", "--model", tiny_model_dir, "--method", "rest-em", "--data", my_data, *QUICK)
    assert outcome.status == 2
    assert outcome.complaints == [
        "train.py: iteration 1: not one sample was correct, so there is nothing to fine-tune on"
    ]


def test_the_toy_world_and_a_second_run(call, tiny_model_dir, tmp_path):
    flags = ["--model", tiny_model_dir, *QUICK]
    first = finished(start("train.py", *flags, cwd=tmp_path))
    assert (first.status, first.complaints) == (0, [])
    (run,) = (tmp_path / "runs").iterdir()
    assert run.name == "tiny-random-dpo-st-toy-42-limit=2-sft-epochs=1-samples=2-max-new-tokens=8"
    results = json.loads((run / "results.json").read_text())
    sets = {f"toy/{split}" for split in ("dev", "test", "longer", "words", "distractors")}
    assert [entry["accuracy"].keys() for entry in results["iterations"]] == [sets, sets]
    assert results["iterations"][1]["pairs"] > 0
    # Two labelled questions and two unlabelled ones were sampled for.
    assert len(read_rows(run / "iteration-1/samples-dpo.jsonl")) == 4 * 5

    before = snapshot(run)
    second = call("train.py", *flags)
    assert (second.status, second.complaints) == (0, [])
    shown = results_table(results)
    assert shown in first.out
    assert shown in second.out
    unchanged = {name for name, state in snapshot(run).items() if before[name] == state}
    assert {name for name in before if name.startswith("iteration-") or "json" in name} - {"results.json"} <= unchanged
    assert snapshot(run)["results.json"][1] == before["results.json"][1]


def test_a_run_of_other_settings_is_left_alone(call, tiny_model_dir, my_data):
    flags = ["--model", tiny_model_dir, "--data", my_data, "--run-dir", "run", "--method", "sft", *QUICK]
    assert call("train.py", *flags).status == 0
    before = snapshot(Path("run"))
    for change, complaint in (
        (["--seed", "7"], "run was begun with seed = 42, this command has 7"),
        (["--sft-epochs", "2"], "run was begun with preset.sft_epochs = 1, this command has 2"),
        (["--no-calculator"], "run was begun with no_calculator = False, this command has True"),
    ):
        outcome = call("train.py", *flags, *change)
        assert outcome.status == 2
        assert outcome.complaints == [f"train.py: {complaint}; choose another --run-dir, or --fresh"]
    assert snapshot(Path("run")) == before


def test_a_run_goes_on_with_less_memory(call, tiny_model_dir, my_data, monkeypatch, out_of_memory):
    """DPO runs out of memory; the message names its knob, and the same run goes on with smaller micro-batches."""
    flags = ["--model", tiny_model_dir, "--data", my_data, "--run-dir", "run", *QUICK, "--limit", 6]
    flags += ["--dpo-steps", 6, "--dpo-pairs-per-step", 1]
    gradients = dpo.dpo_gradients

    monkeypatch.setattr(dpo, "dpo_gradients", out_of_memory)
    outcome = call("train.py", *flags)
    assert outcome.status == 2
    assert outcome.complaints == [
        "train.py: not enough memory; in iteration-1/dpo smaller --micro-batch-tokens (now 2,048) or "
        "--activation-checkpointing need less; the same command with them continues here"
    ]
    before = snapshot(Path("run/iteration-0"))
    monkeypatch.setattr(dpo, "dpo_gradients", gradients)
    outcome = call(
        "train.py", *flags, "--micro-batch-tokens", 300, "--activation-checkpointing", "--slots", 17, "--iterations", 2
    )
    assert (outcome.status, outcome.complaints) == (0, [])
    log = Path("run/log.txt").read_text()
    for change in (
        "continued with preset.micro_batch_tokens = 300, which was 2048",
        "continued with preset.activation_checkpointing = True, which was False",
        "continued with preset.slots = 17, which was 256",
        "continued with preset.iterations = 2, which was 1",
    ):
        assert change in outcome.out and change in log
    assert snapshot(Path("run/iteration-0")) == before
    assert Path("run/iteration-2/sft/model.safetensors").is_file()
    settings = json.loads(Path("run/config.json").read_text())["settings"]["preset"]
    assert (settings["micro_batch_tokens"], settings["slots"], settings["iterations"]) == (300, 17, 2)
    again = call("train.py", *flags, "--config", "run/config.json", "--iterations", 2)
    assert (again.status, again.complaints) == (0, [])
    assert "continued with" not in again.out


def test_sampling_that_runs_out_of_memory_names_the_slots(call, tiny_model_dir, my_data, monkeypatch):
    def sampled(*arguments, **options):
        raise MemoryError

    monkeypatch.setattr("minidpost.selftraining.steps.generate", sampled)
    outcome = call("train.py", "--model", tiny_model_dir, "--data", my_data, "--run-dir", "run", *QUICK)
    assert outcome.status == 2
    assert outcome.complaints == [
        "train.py: not enough memory; in iteration-1/samples-dpo.jsonl fewer --slots (now 256) need less; the same "
        "command with them continues here"
    ]


def test_all_of_a_preset_from_a_file_and_flags_above_it(call, tiny_model_dir, my_data):
    flags = ["--model", tiny_model_dir, "--data", my_data, *QUICK, "--method", "st"]
    assert call("train.py", *flags, "--run-dir", "first", "--max-similarity", 0.3, "--dtype", "bf16").status == 0
    first = json.loads(Path("first/config.json").read_text())["settings"]
    assert (first["preset"]["max_similarity"], first["dtype"]) == (0.3, "bf16")
    assert first["preset"].keys() == {field.name for field in fields(Preset)}
    outcome = call(
        *("train.py", "--model", tiny_model_dir, "--data", my_data, "--limit", 2, "--method", "st"),
        *("--run-dir", "second", "--config", "first/config.json", "--samples", 1),
    )
    assert (outcome.status, outcome.complaints) == (0, [])
    second = json.loads(Path("second/config.json").read_text())["settings"]
    assert second["preset"] == first["preset"] | {"samples": 1}
    assert second["dtype"] == "fp32"


@pytest.mark.parametrize(
    ("theirs", "ours", "kept"),
    [
        ("dpo-st", "rft", "iterations 1, --label-percentile none"),
        ("rft", "st", "iterations 2, --label-percentile 90"),
        ("rft", "rft", None),
    ],
)
def test_another_methods_config_leaves_the_method_its_own(call, tiny_model_dir, my_data, theirs, ours, kept):
    preset = preset_for(tiny_model_dir, theirs)
    values = asdict(replace(preset, sft_epochs=1, max_new_tokens=4, pass_at=1, beta=0.5))
    Path("config.json").write_text(json.dumps({"settings": {"method": theirs, "preset": values}}))
    flags = ["--model", tiny_model_dir, "--data", my_data, "--limit", 2, "--run-dir", "run", "--samples", 2]
    with warnings.catch_warnings(record=True) as caught:
        assert call("train.py", *flags, "--method", ours, "--config", "config.json").status == 0
    warning = f"--config config.json: of a run by --method {theirs}; --method {ours} keeps --{kept}"
    assert [str(message.message) for message in caught] == ([] if kept is None else [warning])
    used = json.loads(Path("run/config.json").read_text())["settings"]["preset"]
    own = {name: vars(preset_for(tiny_model_dir, ours))[name] for name in ("iterations", "label_percentile")}
    assert used == {**values, **own, "samples": 2}


def test_runs_that_differ_have_directories_of_their_own(call, tiny_model_dir, my_data):
    flags = ["--model", tiny_model_dir, "--data", my_data, "--method", "sft", *QUICK]
    name = "tiny-random-sft-mine-42-limit=2-sft-epochs=1-samples=2-max-new-tokens=8"
    differing = (
        ([], name),
        (["--weight-decay", "0.3"], f"{name.replace('samples', 'weight-decay=0.3-samples')}"),
        (["--seed", "7"], name.replace("42", "7")),
        (["--no-calculator"], name.replace("limit=2", "limit=2-no-calculator")),
        (["--slots", "20", "--micro-batch-tokens", "500"], name),
    )
    for change, expected in differing:
        assert call("train.py", *flags, *change).status == 0
        assert (Path("runs") / expected).is_dir()
    assert len([*Path("runs").iterdir()]) == 4
    many = [
        "--sft-examples-per-step",
        "3",
        "--learning-rate-warmup",
        "0.2",
        "--weight-decay",
        "0.5",
        "--max-grad-norm",
        "2",
        "--top-k",
        "7",
    ]
    assert call("train.py", *flags, *many).status == 0
    (long,) = Path("runs").glob("tiny-random-sft-mine-42-9-changes-*")
    assert len(long.name) < 60


def test_dpo_flags_are_warned_of_without_dpo_and_make_no_other_run(call, tiny_model_dir, my_data):
    flags = ["--model", tiny_model_dir, "--data", my_data, "--method", "sft", *QUICK]
    assert call("train.py", *flags).status == 0
    (run,) = Path("runs").iterdir()
    trained = snapshot(run / "iteration-0")
    with pytest.warns(UserWarning, match="^--dpo-steps, --beta: no effect with --method sft, which has no DPO$"):
        outcome = call("train.py", *flags, "--beta", "0.3", "--dpo-steps", "7")
    assert outcome.status == 0
    assert (list(Path("runs").iterdir()), snapshot(run / "iteration-0")) == ([run], trained)
    preset = json.loads((run / "config.json").read_text())["settings"]["preset"]
    assert (preset["beta"], preset["dpo_steps"]) == (0.3, 7)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # what a file gives is no mistake
        assert call("train.py", *flags, "--config", run / "config.json").status == 0


def test_a_preset_belongs_to_the_model_and_not_to_its_path(call, my_data):
    shutil.copytree(ROOT / "weights" / "tiny-t5", "weights/other")
    for index, model in enumerate(("tiny-t5", ROOT / "weights" / "tiny-t5", "./weights/other")):
        flags = ["--data", my_data, "--method", "sft", "--sft-epochs", 1, "--limit", 2, "--run-dir", f"run-{index}"]
        assert call("train.py", "--model", model, *flags, "--max-new-tokens", 4).status == 0
    presets = [json.loads(Path(f"run-{index}/config.json").read_text())["settings"]["preset"] for index in range(3)]
    assert presets[0] == presets[1] == presets[2]
    assert presets[0]["sft_learning_rate"] == TINY_T5.sft_learning_rate


def test_without_a_warm_up_the_base_is_the_first_teacher(call, knowing_model_dir):
    """ReST-EM of a model that can already answer; the best model may be the base itself, which the report names."""
    write_lines(
        "mine.jsonl",
        *({"question": q, "answer": r.rpartition(" ")[2], "rationale": r} for q, r in [*KNOWN.items()] * 1),
        {"question": "Eva has 1 coin and finds 1. How many?", "answer": 2, "rationale": "#### 2"},
    )
    flags = ["--model", knowing_model_dir, "--data", "mine.jsonl", "--method", "rest-em", "--run-dir", "runs/run"]
    outcome = call("train.py", *flags, *QUICK, "--limit", 3, "--max-new-tokens", 40, "--no-warm-up")
    assert (outcome.status, outcome.complaints) == (0, [])
    assert not Path("runs/run/iteration-0/sft").exists()
    assert json.loads(Path("runs/run/results.json").read_text())["base"] == str(knowing_model_dir)
    assert Path("runs/run/iteration-1/sft/model.safetensors").is_file()
    assert call("sample.py", TOM, "--max-new-tokens", 4).status == 0


def test_unlabelled_questions_are_sampled_for(call, tiny_model_dir, my_data):
    more = write_lines(
        Path("more.jsonl"), {"question": "How many?", "answer": 5}, {"question": "And now?", "answer": "6"}
    )
    flags = ["--data", my_data, "--unlabelled", more, "--method", "st", "--run-dir", "run", *QUICK, "--limit", "3"]
    assert call("train.py", "--model", tiny_model_dir, *flags).status == 0
    rows = read_rows("run/iteration-1/samples-sft.jsonl")
    assert len({row["question"] for row in rows}) == 2 + 2  # of three labelled ones one is held out
    assert {"How many?", "And now?"} <= {row["question"] for row in rows}


@pytest.mark.parametrize("keep", ["best", pytest.param("last", marks=pytest.mark.slow)])
def test_only_the_models_stay_that_are_asked_for(call, tiny_model_dir, my_data, keep):
    """A run can be taken further, and a command that asks for less removes what an earlier one left."""
    run = Path("run")
    flags = ["--model", tiny_model_dir, "--data", my_data, *QUICK, "--dpo-steps", 1, "--run-dir", run]

    def weights() -> set[str]:
        return {str(path.parent.relative_to(run)) for path in run.rglob("model.safetensors")}

    assert call("train.py", *flags).status == 0
    assert weights() == {"iteration-0/sft", "iteration-1/dpo", "iteration-1/sft"}
    outcome = call("train.py", *flags, "--iterations", 2, "--keep", keep)
    assert outcome.status == 0
    results = json.loads((run / "results.json").read_text())
    best = f"iteration-{results['best_iteration']}/sft"
    assert weights() == {"iteration-2/sft", *([best] if keep == "best" else [])}
    assert {str(path.parent.relative_to(run)) for path in run.rglob("log.jsonl")} >= {"iteration-1/dpo", best}
    if keep == "last" and best != "iteration-2/sft":
        assert "weights were removed (--keep last); the last model is in iteration-2/sft" in outcome.out
    # Nothing is done again, and nothing is missed.
    before = snapshot(run / "iteration-2")
    assert call("train.py", *flags, "--iterations", 2, "--keep", keep).status == 0
    assert snapshot(run / "iteration-2") == before


def test_finished_models_are_saved_in_the_precision_asked_for(call, tiny_model_dir, my_data):
    flags = ["--model", tiny_model_dir, "--data", my_data, *QUICK, "--dpo-steps", 1, "--save-dtype", "bf16"]
    assert call("train.py", *flags, "--run-dir", "run").status == 0
    for stage in ("iteration-0/sft", "iteration-1/dpo", "iteration-1/sft"):
        tensors = load_file(Path("run", stage, "model.safetensors"))
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        assert json.loads(Path("run", stage, "config.json").read_text())["torch_dtype"] == "bfloat16"
    outcome = call("train.py", *flags[:-2], "--run-dir", "run")
    assert outcome.status == 2 and "save_dtype = bf16" in outcome.err
    assert call("train.py", *flags).status == 0
    assert [path.name for path in Path("runs").iterdir() if path.name.endswith("save-dtype=bf16-samples=2")] or [
        path.name for path in Path("runs").iterdir() if "save-dtype=bf16" in path.name or "changes" in path.name
    ]


def test_fresh_renames_the_old_run(call, tiny_model_dir, my_data):
    flags = ["--model", tiny_model_dir, "--data", my_data, "--run-dir", "run", "--method", "sft", *QUICK]
    assert call("train.py", *flags).status == 0
    before = snapshot(Path("run"))
    outcome = call("train.py", *flags, "--seed", 7, "--fresh")
    assert (outcome.status, outcome.complaints) == (0, [])
    assert snapshot(Path("run.1")) == before
    assert json.loads(Path("run/results.json").read_text())["seed"] == 7
    assert call("train.py", *flags, "--fresh", "--seed", "seven").status == 2
    assert not Path("run.2").exists()


def test_an_exchanged_base_model_is_noticed(call, tiny_model_dir, my_data):
    base = shutil.copytree(tiny_model_dir, "base")
    flags = ["--model", base, "--data", my_data, "--run-dir", "run", "--method", "sft", *QUICK]
    assert call("train.py", *flags).status == 0
    model = load_model(base)
    with torch.no_grad():
        model.embedding.weight[3, 0] += 1
    save_model(model, base, [])
    outcome = call("train.py", *flags)
    assert outcome.status == 2
    assert "run was begun with weights = " in outcome.complaints[0]


def results_of(run: Path) -> dict[str, bytes | list]:
    """What a run wrote that is the same in every run of its command."""
    logs = {path: [row | {"tokens_per_second": 0} for row in read_rows(path)] for path in run.rglob("log.jsonl")}
    files = {path: path.read_bytes() for path in run.glob("iteration-*/**/*") if path.is_file()} | logs
    return {str(path.relative_to(run)): content for path, content in files.items()}


LONG = ["--method", "sft", "--sft-epochs", 60, "--limit", 20, "--max-new-tokens", 8, "--checkpoint-minutes", 9]
LONG += ["--sft-examples-per-step", 96, "--pass-at", 1]
STEPS_BEFORE = 20  # of the 60 steps of LONG, before what stops it


@pytest.fixture(scope="module")
def undisturbed(tiny_model_dir, tmp_path_factory) -> dict[str, bytes | list]:
    """What LONG writes where nothing stops it."""
    folder = tmp_path_factory.mktemp("undisturbed")
    outcome = finished(start("train.py", "--model", tiny_model_dir, *LONG, "--run-dir", "whole", cwd=folder))
    assert outcome.status == 0, outcome.err
    return results_of(folder / "whole")


@pytest.mark.parametrize(
    ("number", "status"),
    [
        (signal.SIGKILL, -9),
        pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow),
        pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow),
    ],
)
def test_a_signal_during_training(call, tiny_model_dir, undisturbed, number, status):
    flags = ["--model", tiny_model_dir, *LONG, *(["--checkpoint-minutes", 0] if number == signal.SIGKILL else [])]
    process = start("train.py", *flags, "--run-dir", "run", cwd=Path.cwd())
    log = Path("run/iteration-0/sft.unfinished/log.jsonl")
    while not log.is_file() or log.read_bytes().count(b"\n") < STEPS_BEFORE:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    outcome = finished(process)
    assert outcome.status == status
    message = ["train.py: interrupted; the same command continues from here"]
    assert outcome.complaints == ([] if number == signal.SIGKILL else message)
    assert not Path("run/iteration-0/sft").exists()
    assert call("train.py", "--model", tiny_model_dir, *LONG, "--run-dir", "run").status == 0
    assert results_of(Path("run")) == undisturbed


@pytest.mark.slow
def test_sigterm_while_sampling_ends_at_once(tiny_model_dir, tmp_path):
    flags = ["--model", tiny_model_dir, "--limit", 200, "--sft-epochs", 1, "--run-dir", "run"]
    process = start("train.py", *flags, cwd=tmp_path)
    while not (tmp_path / "run/iteration-0/sft").is_dir():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    outcome = finished(process)
    assert (outcome.status, len(outcome.complaints)) == (143, 1)
    assert not (tmp_path / "run/iteration-0/evaluation.json").exists()


@pytest.mark.parametrize("error", [ValueError("no shape"), UserError("model.safetensors: broken")])
def test_sigterm_that_a_library_turns_into_another_error(monkeypatch, capsys, error):
    """C code that calls Python may answer the handler's exception with one of its own."""

    def main():
        with suppress(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        raise error

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as end:
        run_command(main)
    assert end.value.code == 143
    assert capsys.readouterr().err == "\ntrain.py: interrupted; nothing was written\n"


def test_a_second_process_on_a_run_is_refused(call, tiny_model_dir):
    flags = ["--model", tiny_model_dir, "--limit", 100, "--sft-epochs", 10_000, "--run-dir", "run"]
    process = start("train.py", *flags, cwd=Path.cwd())
    while not Path("run/iteration-0/sft.unfinished").is_dir():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    outcome = call("train.py", *flags)
    assert outcome.status == 2
    assert outcome.complaints == [
        "train.py: run: another process is at work here; wait for it, or choose another --run-dir"
    ]
    assert call("train.py", *flags, "--fresh").status == 2
    process.kill()
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("n_models", [0.5, 2])
def test_a_full_disk_is_one_line_then_continued(call, tiny_model_dir, undisturbed, n_models):
    """A training state has three models' size: without room for it training goes on; a finished model must be saved."""
    flags = ["--model", tiny_model_dir, *LONG]
    limit = int((tiny_model_dir / "model.safetensors").stat().st_size * n_models)

    def limited():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    at_each_step = ["--checkpoint-minutes", 0, "--run-dir", "run"]
    outcome = finished(start("train.py", *flags, *at_each_step, cwd=Path.cwd(), preexec_fn=limited))
    state = "run/iteration-0/sft.progress/state.safetensors"
    warning = f"train.py: warning: {state}: not saved (File too large); training goes on"
    if n_models < 1:
        reason = "train.py: cannot write (File too large); the same command continues from here"
        assert (outcome.status, outcome.complaints) == (2, [warning, reason])
    else:
        assert (outcome.status, outcome.complaints) == (0, [warning])
    assert call("train.py", *flags, "--run-dir", "run").status == 0
    assert results_of(Path("run")) == undisturbed


@contextmanager
def small_disk(kilobytes):
    """A file system of this size, mounted at `disk`."""
    Path("disk").mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", "disk"], capture_output=True
    ).returncode:
        pytest.skip("mounting a small tmpfs takes root")
    try:
        yield
    finally:
        # Lazily: a process that a failed test left behind must not hide why the test failed.
        subprocess.run(["umount", "--lazy", "disk"], check=True)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(call, tiny_model_dir):
    with small_disk(512):
        outcome = call("train.py", "--model", tiny_model_dir, *LONG, "--run-dir", "disk/run")
        assert outcome.status == 2
        (complaint,) = outcome.complaints
        assert re.fullmatch(r"train.py: disk: \d\.\d MB needed .* has 0\.5 MB free; choose a --run-dir .*", complaint)
        assert not list(Path("disk").iterdir())


@pytest.mark.parametrize("kilobytes", [*(pytest.param(n, marks=pytest.mark.slow) for n in (16, 64)), 512])
def test_a_file_system_that_others_fill(call, tiny_model_dir, kilobytes):
    flags = ["--model", tiny_model_dir, *LONG, "--sft-epochs", 40]
    with small_disk(32 * 1024):
        process = start("train.py", *flags, "--checkpoint-minutes", 0, "--run-dir", "disk/run", cwd=Path.cwd())
        while not Path("disk/run/config.json").is_file():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.send_signal(signal.SIGSTOP)  # what is free must not change before it is taken
        try:
            Path("disk/others").write_bytes(bytes(shutil.disk_usage("disk").free - kilobytes * 1024))
        finally:
            process.send_signal(signal.SIGCONT)
        outcome = finished(process)
        # A training state has three models' size, a model more than the two smaller rooms.
        state = "disk/run/iteration-0/sft.progress/state.safetensors"
        warning = f"train.py: warning: {state}: not saved (No space left on device); training goes on"
        if kilobytes == 512:
            assert (outcome.status, outcome.complaints) == (0, [warning])
            return
        reason = "train.py: cannot write (No space left on device); the same command continues from here"
        assert (outcome.status, outcome.complaints) == (2, [warning, reason])
        for path in Path("disk/run").rglob("*.json"):
            json.loads(path.read_bytes())
        shutil.copytree("disk/run", "run")
    assert call("train.py", *flags, "--run-dir", "run").status == 0


def test_ctrl_c_ends_quietly_and_leaves_no_half_stage(tiny_model_dir, tmp_path):
    flags = ["--model", tiny_model_dir, "--limit", 100, "--sft-epochs", 10_000, "--run-dir", "run"]
    process = start("train.py", *flags, cwd=tmp_path)
    stage = tmp_path / "run/iteration-0/sft"
    while not (stage.with_name("sft.unfinished") / "log.jsonl").is_file():
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    outcome = finished(process)
    assert outcome.status == 130
    assert outcome.complaints == ["train.py: interrupted; the same command continues from here"]
    assert not stage.exists()
    assert (stage.with_name("sft.progress") / "state.safetensors").is_file()


@pytest.mark.parametrize("flags, dtype", [((), torch.float32), (("--dtype", "bf16"), torch.bfloat16)])
def test_weights_have_the_precision_asked_for(call, knowing_model_dir, monkeypatch, flags, dtype):
    loaded, load = [], load_model

    def observed(*arguments):
        loaded.append(load(*arguments))
        return loaded[-1]

    monkeypatch.setattr(cli, "load_model", observed)
    for command in (["sample.py", TOM], ["eval.py", "--tasks", "toy", "--limit", 2, "--calculator", "on"]):
        outcome = call(*command, "--checkpoint", knowing_model_dir, "--max-new-tokens", 5, *flags)
        assert outcome.status == 0, outcome.err
    assert [next(model.parameters()).dtype for model in loaded] == [dtype, dtype]


# -- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["train.py", "sample.py", "eval.py"])
def test_help(call, command):
    outcome = call(command, "--help")
    assert (outcome.status, outcome.err) == (0, "")
    assert {"--seed", "--device", "--slots", "--max-new-tokens"} <= set(re.findall(r"--[\w-]+", outcome.out))
    assert f"    python {command} " in outcome.out  # examples
    assert re.search(r"--device DEVICE +cpu, cuda", outcome.out)


MISTAKES = [
    ("train.py --model flan-t5-bsae", "did you mean flan-t5-base?"),
    ("train.py --method dpost", "'dpo-st'"),
    ("train.py --data gsm9k", "--data gsm9k: toy, gsm8k or a file that ends in .jsonl is expected"),
    ("train.py --data none.jsonl", "none.jsonl: cannot be read (No such file or directory)"),
    ("train.py --data empty.jsonl", "empty.jsonl: holds no examples"),
    ("train.py --data broken.jsonl", "broken.jsonl, line 3: not a JSON object"),
    ("train.py --data words.jsonl", "words.jsonl, line 2: `answer` must be a number or the text of one, found 'seven'"),
    ("train.py --data unlabelled.jsonl", "unlabelled.jsonl, line 1: every row of a labelled set needs a `rationale`"),
    ("train.py --data one.jsonl", "one.jsonl: at least 2 examples are needed"),
    ("train.py --data long.jsonl --limit 2", "tokens; the limit is 1,024"),
    ("train.py --unlabelled broken.jsonl", "broken.jsonl, line 3"),
    ("train.py --model HALF", "model.safetensors"),
    ("train.py --model WIDE", "WIDE/model.safetensors: tensor lm_head.weight has shape"),
    ("train.py --model BARE", "BARE: no tokenizer here"),
    ("train.py --limit 0", "argument --limit: a whole number from 1 to 1,000,000 is expected, found '0'"),
    ("train.py --samples=-1", "argument --samples: a whole number from 1 to 1,000,000 is expected, found -1"),
    ("train.py --temperature nan", "argument --temperature: a number from 0.001 to 1,000.0 is expected, found nan"),
    ("train.py --dpo-steps many", "argument --dpo-steps: a whole number from 1 to 1,000,000 is expected, found 'many'"),
    ("train.py --samples 1000000000000", "a whole number from 1 to 1,000,000 is expected, found 1000000000000"),
    ("train.py --sft-learning-rate inf", "argument --sft-learning-rate: a number from 1e-09 to 1 is expected"),
    ("train.py --beta none", "argument --beta: a number from 1e-06 to 1,000.0 is expected, found None"),
    ("train.py --lora-rank 0", "--lora-rank: a whole number from 1 to 16,384, or none is expected, found 0"),
    ("train.py --lora-rank 17", "--lora-rank 17: at most 16 is expected, the smaller side of this model's largest"),
    ("train.py --lora-alpha 8", "--lora-alpha: has no effect without --lora-rank, which is expected too"),
    ("train.py --label-cap 0", "--label-cap: a whole number from 1 to 1,000,000, or none is expected, found 0"),
    ("train.py --template chat", "a t5 has just one, none can be chosen"),
    ("train.py --template vicuna", "argument --template: invalid choice: 'vicuna' (choose from"),
    ("train.py --dtype fp16", "argument --dtype: invalid choice: 'fp16' (choose from"),
    ("train.py --config none.json", "--config none.json: no such file"),
    ("train.py --config old.jsonl", "--config old.jsonl: not readable as JSON"),
    ("train.py --config HALF/config.json", "--config HALF/config.json: 'architectures' is no hyperparameter"),
    ("train.py --method sft --no-warm-up", "--no-warm-up: leaves nothing to do for --method sft"),
    ("train.py --run-dir old.jsonl", "old.jsonl exists and is no run directory"),
    ("train.py --run-dir folder", "folder exists and is no run directory"),
    ("train.py --run-dir old.jsonl/run", "Not a directory"),
    ("train.py --device abacus", "argument --device: 'abacus' cannot be used here"),
    ("train.py --colour", "unrecognized arguments: --colour"),
    ("sample.py How? --checkpoint tiny-t6", "did you mean tiny-t5?"),
    ("sample.py How? --checkpoint folder", "folder: this directory holds no config.json"),
    ("sample.py How? --checkpoint HALF", "model.safetensors"),
    ("sample.py How? --checkpoint BARE", "BARE: no tokenizer here"),
    ("sample.py How? --output old.jsonl", "--output old.jsonl: exists already"),
    ("sample.py How? --output old.jsonl/rows", "old.jsonl is no directory that can be written to"),
    ("sample.py --input none.txt", "none.txt: cannot be read (No such file or directory)"),
    ("sample.py --input empty.jsonl", "empty.jsonl: holds no questions"),
    ("sample.py --input broken.jsonl", "broken.jsonl, line 3: not a JSON object"),
    ("sample.py --input nothing.jsonl", "nothing.jsonl, line 2: `question` must be a text that is not empty"),
    ("sample.py --input notes.md", "notes.md: a file that ends in .jsonl or .txt is expected"),
    ("sample.py --input latin.txt", "latin.txt: not a text in UTF-8"),
    ("sample.py --input long.jsonl", "question 2 ('How How"),
    ("sample.py How? --input one.jsonl", "from the command line or from --input"),
    ("sample.py How? --samples 3", "--samples 3 needs a --temperature above 0"),
    ("sample.py How? --samples 0", "argument --samples: a whole number from 1 to 1,000,000 is expected, found '0'"),
    ("sample.py How? --dtype fp16", "argument --dtype: invalid choice: 'fp16' (choose from"),
    ("sample.py How? --slots 0", "argument --slots: a whole number from 1 to"),
    ("sample.py How? --slots 2.5", "argument --slots: a whole number from 1 to 1,000,000 is expected, found '2.5'"),
    ("sample.py How? --max-new-tokens 0", "argument --max-new-tokens: a whole number from 1 to"),
    ("sample.py How? --temperature=-1", "--temperature: 0 or a number from 0.001 to 1000 is expected, found '-1'"),
    ("sample.py How? --temperature nan", "argument --temperature: 0 or a number from 0.001"),
    ("sample.py How? --temperature inf", "argument --temperature: 0 or a number from 0.001"),
    ("sample.py How? --top-k=-3", "argument --top-k: a whole number from 0 to 1,000,000"),
    ("sample.py How? --top-p 0", "argument --top-p: a number above 0 and at most 1 is expected, found '0'"),
    ("sample.py How? --top-p 1.5", "argument --top-p: a number above 0 and at most 1"),
    ("sample.py How? --slots 1000001", "argument --slots: a whole number from 1 to 1,000,000 is expected"),
    ("sample.py How? --temperature 1e-9", "--temperature: 0 or a number from 0.001 to 1000 is expected, found '1e-9'"),
    ("sample.py How\udcff?", r"argument 'How\udcff?' is not UTF-8"),
    ("eval.py --checkpoint \udcff", r"argument '\udcff' is not UTF-8"),
    ("eval.py --checkpoint \x1b[31mred", "no model and no directory is called '\\x1b[31mred'"),
    ("eval.py --checkpoint flan-t5-lareg", "did you mean flan-t5-large?"),
    ("eval.py --tasks gsm9k", "there is no dataset 'gsm9k'; choose one of gsm8k, multiarith, asdiv, svamp, toy"),
    ("eval.py --tasks none.jsonl", "none.jsonl: cannot be read (No such file or directory)"),
    ("eval.py --tasks words.jsonl", "words.jsonl, line 2: `answer` must be a number or the text of one, found 'seven'"),
    ("eval.py --tasks words.jsonl --split words", "words.jsonl has no split 'words'; choose one of train, dev, test"),
    ("eval.py --tasks one.jsonl --split dev", "one.jsonl: at least 2 examples are needed"),
    ("eval.py --tasks gsm8k,svamp --split dev", "svamp has no split 'dev'; choose one of test"),
    ("eval.py --tasks toy,", "there is no dataset ''"),
    ("eval.py --pass-at 1,ten", "argument --pass-at: a whole number from 1 to 1,000,000 is expected, found 'ten'"),
    ("eval.py --pass-at 0", "argument --pass-at: a whole number from 1 to 1,000,000 is expected, found '0'"),
    ("eval.py --maj-at 8,", "argument --maj-at: a whole number from 1 to 1,000,000 is expected, found ''"),
    ("eval.py --pass-at 10 --temperature 0", "need a --temperature above 0"),
    ("eval.py --calculator maybe", "'both'"),
    ("eval.py --limit 0", "argument --limit: a whole number from 1 to"),
    ("eval.py --output old.jsonl", "--output old.jsonl: exists already"),
    ("eval.py --checkpoint HALF", "model.safetensors"),
]


@pytest.fixture
def mistaken_files(tmp_path, tiny_model_dir) -> Path:
    """A directory of files as users have them."""
    row = {"question": "How?", "answer": "1", "rationale": "So.\n#### 1"}
    write_lines(tmp_path / "empty.jsonl")
    write_lines(tmp_path / "broken.jsonl", row, "", '{"question": "How', row)
    write_lines(tmp_path / "words.jsonl", row, row | {"question": "Why?", "answer": "seven"})
    write_lines(tmp_path / "unlabelled.jsonl", {"question": "How?", "answer": 1})
    write_lines(tmp_path / "nothing.jsonl", row, {"answer": 1})
    write_lines(tmp_path / "one.jsonl", row)
    write_lines(tmp_path / "long.jsonl", row, row | {"question": "How " * 3000})
    write_lines(tmp_path / "old.jsonl", "old")
    write_lines(tmp_path / "notes.md", "How?")
    (tmp_path / "latin.txt").write_bytes("Wie für?".encode("latin-1"))
    (tmp_path / "folder").mkdir()
    write_lines(tmp_path / "folder" / "notes.txt", "mine")
    half = shutil.copytree(tiny_model_dir, tmp_path / "HALF")
    whole = (half / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    wide = shutil.copytree(tiny_model_dir, tmp_path / "WIDE")
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    bare = shutil.copytree(tiny_model_dir, tmp_path / "BARE")
    (bare / "spiece.model").unlink()
    return tmp_path


@pytest.mark.parametrize(
    ("line", "flags"),
    [
        ("sample.py How? --top-k 5 --top-p 0.9", ["--top-k", "--top-p"]),
        ("sample.py How? --chunk 8 --overwrite", ["--chunk", "--overwrite"]),
        ("sample.py How? --seed 1", []),
        ("eval.py --limit 1 --calculator on --temperature 0.5 --overwrite", ["--temperature", "--overwrite"]),
    ],
)
def test_flags_without_an_effect_are_warned_of(call, tiny_model_dir, line, flags):
    command, *arguments = line.split()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outcome = call(command, *arguments, "--checkpoint", tiny_model_dir, "--max-new-tokens", 2)
    assert outcome.status == 0
    warned = [str(warning.message) for warning in caught if "has no effect without" in str(warning.message)]
    assert [message.split(":")[0] for message in warned] == flags


@pytest.mark.parametrize(("line", "complaint"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_answered_in_one_line(call, mistaken_files, tiny_model_dir, line, complaint):
    command, *arguments = line.split()
    flag = "--model" if command == "train.py" else "--checkpoint"
    if flag not in arguments:
        arguments += [flag, tiny_model_dir]
    before = snapshot(mistaken_files)
    outcome = call(command, *arguments)
    assert outcome.status == 2
    assert len(outcome.complaints) == 1
    assert outcome.complaints[0].startswith(f"{command}: ")
    assert complaint in outcome.complaints[0]
    assert snapshot(mistaken_files) == before  # nothing is claimed: the mended command can go on
    assert not (mistaken_files / "runs").exists()


@pytest.mark.parametrize(
    "line",
    [
        "train.py --data none.jsonl",
        *(pytest.param(line, marks=pytest.mark.slow) for line in ("sample.py --samples 0", "eval.py --tasks nil")),
    ],
)
def test_a_mistake_in_a_process_of_its_own(tmp_path, tiny_model_dir, line):
    command, *arguments = line.split()
    model = ["--model" if command == "train.py" else "--checkpoint", tiny_model_dir]
    outcome = finished(start(command, *arguments, *model, cwd=tmp_path))
    assert (outcome.status, outcome.out) == (2, "")
    assert len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith(f"{command}: ")


def test_a_message_is_one_line_without_control_characters():
    assert one_line("a\n b\u2028c\x1b[31m\x9b\u202e") == "a b c\ufffd[31m\ufffd\ufffd"
    assert one_line("x" * MAX_MESSAGE) == "x" * MAX_MESSAGE
    assert one_line("x" * 10**6) == "x" * (MAX_MESSAGE - 1) + "…"


def test_a_lack_of_memory_is_answered_in_one_line(call, tiny_model_dir, monkeypatch):
    def sampled(*arguments, **options):
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried …")

    monkeypatch.setattr("minidpost.sampling.generate.generate", sampled)
    outcome = call("sample.py", TOM, "--checkpoint", tiny_model_dir)
    assert outcome.status == 2
    assert outcome.complaints == ["sample.py: not enough memory; fewer --slots or --max-new-tokens need less"]


def test_nan_weights_are_a_warning_on_one_line(tiny_model_dir, tmp_path):
    model = load_model(tiny_model_dir)
    with torch.no_grad():
        model.embedding.weight[3, 0] = float("nan")
    save_model(model, tmp_path / "nan", tokenizer_files(tiny_model_dir))
    process = start("sample.py", TOM, "--checkpoint", "nan", "--max-new-tokens=3", "--temperature=1", cwd=tmp_path)
    outcome = finished(process)
    assert outcome.status == 0
    warning = "sample.py: warning: nan/model.safetensors: tensor shared.weight holds NaN or infinity (1 such in all)"
    assert outcome.complaints == [warning]


def test_known_unlabelled_questions_are_left_out(call, tiny_model_dir):
    """Those of dev above all: their pseudo-labels would be trained on."""
    write_lines(
        "mine.jsonl", *({"question": f"Tom has {n}?", "answer": n, "rationale": f"#### {n}"} for n in range(1, 10))
    )
    write_lines("more.jsonl", *({"question": f"Tom has {n}?", "answer": 77} for n in range(1, 12)))
    files = ["--data", "mine.jsonl", "--unlabelled", "more.jsonl"]
    with pytest.warns(UserWarning, match="9 questions to sample for left out: the labelled set or dev has them"):
        outcome = call("train.py", "--model", tiny_model_dir, *files, "--method", "dpo-st", *QUICK[2:])
    assert outcome.status in (0, 2)  # a random model may have not one correct sample
    (samples,) = Path("runs").glob("*/iteration-1/samples-dpo.jsonl")
    answers = {row["question"]: row["answer"] for row in read_rows(samples)}
    assert len(answers) == 10
    assert {question for question, answer in answers.items() if answer == "77"} == {"Tom has 10?", "Tom has 11?"}


def test_a_reader_that_leaves_early_is_no_error(knowing_model_dir, tmp_path):
    process = start("sample.py", TOM, "--checkpoint", knowing_model_dir, cwd=tmp_path)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(timeout=120) == 1
    assert Outcome(1, "", err).complaints == []


# -- with the bundled models, as a newcomer types it -------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("command", "shown"), [("sample.py", "?"), ("eval.py", "toy/distractors")])
def test_without_run_or_argument_the_bundled_model_answers(tmp_path, command, shown):
    outcome = finished(start(command, cwd=tmp_path))
    assert outcome.status == 0
    assert [Path(line).name for line in outcome.complaints] == ["tiny-t5-dpo-st"]  # it is said which model
    assert shown in outcome.out and ("####" in outcome.out or command == "eval.py")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_train_without_argument_improves_the_bundled_model(tmp_path):
    process = start("train.py", cwd=tmp_path)
    out, _ = process.communicate(timeout=1800)
    assert process.returncode == 0
    results = json.loads((tmp_path / "runs/tiny-t5-dpo-st-toy-42/results.json").read_text())
    assert results_table(results) in out
    accuracies = [entry["accuracy"]["toy/dev"]["value"] for entry in results["iterations"]]
    assert max(accuracies) > accuracies[0] > 0
    assert "####" in finished(start("sample.py", cwd=tmp_path)).out


# -- before a run -----------------------------------------------------------------------------------------------------


def test_a_rehearsal_comes_before_the_directory_and_is_logged(
    call, tiny_model_dir, my_data, monkeypatch, out_of_memory
):
    """Where memory does not suffice nothing is claimed; where it does, its peaks stand beside the estimate."""
    flags = ["--model", tiny_model_dir, "--data", my_data, "--run-dir", "run", *QUICK, "--method", "sft"]
    flags += ["--micro-batch-tokens", 300, "--slots", 4]
    monkeypatch.setattr("minidpost.selftraining.rehearsal.is_worth_it", lambda plan, model: True)
    gradients = rehearsal.sft_gradients

    monkeypatch.setattr(rehearsal, "sft_gradients", out_of_memory)
    outcome = call("train.py", *flags)
    assert outcome.status == 2
    assert outcome.complaints == [
        "train.py: not enough memory; in the rehearsal of training smaller --micro-batch-tokens (now 300) or "
        "--activation-checkpointing need less, and so does --lora-rank"
    ]
    assert not Path("run").exists()
    monkeypatch.setattr(rehearsal, "sft_gradients", gradients)
    assert call("train.py", *flags).status == 0
    estimated, measured = Path("run/log.txt").read_text().splitlines()[:2]
    assert "memory: training" in estimated and "; disk: " in estimated
    assert "rehearsed: training" in measured
    rehearsed = Path("run/iteration-0/sft/model.safetensors").read_bytes()

    monkeypatch.setattr("minidpost.selftraining.rehearsal.is_worth_it", lambda plan, model: False)
    assert call("train.py", *flags, "--fresh").status == 0
    assert "rehearsed" not in Path("run/log.txt").read_text()
    assert Path("run/iteration-0/sft/model.safetensors").read_bytes() == rehearsed


def test_a_finished_run_is_not_rehearsed_again(call, tiny_model_dir, my_data, monkeypatch, out_of_memory):
    """Nor is memory or disk asked for, of which it needs none; a run that is taken further needs them."""
    flags = ["--model", tiny_model_dir, "--data", my_data, "--run-dir", "run", *QUICK, "--method", "st"]
    assert call("train.py", *flags).status == 0
    monkeypatch.setattr("minidpost.selftraining.rehearsal.is_worth_it", lambda plan, model: True)
    monkeypatch.setattr(rehearsal, "sft_gradients", out_of_memory)
    monkeypatch.setattr("minidpost.selftraining.estimates.available_bytes", lambda device: 1)
    monkeypatch.setattr("minidpost.selftraining.estimates.disk_bytes", lambda *_, **__: 10**18)
    before = snapshot(Path("run"))
    outcome = call("train.py", *flags)
    assert (outcome.status, outcome.complaints) == (0, [])
    assert "every stage is finished" in Path("run/log.txt").read_text()
    changed = {name for name, state in snapshot(Path("run")).items() if before.get(name) != state}
    assert not {name for name in changed if name.startswith("iteration-")}

    for more in (["--iterations", 2], ["--fresh"]):
        before = snapshot(Path("run"))
        outcome = call("train.py", *flags, *more)
        assert outcome.status == 2 and outcome.complaints[0].startswith("train.py: memory: training ")
        assert snapshot(Path("run")) == before
    outcome = call("train.py", *flags, "--seed", 7)  # of another run nothing is finished, and its directory says so
    assert outcome.complaints == [
        "train.py: run was begun with seed = 42, this command has 7; choose another --run-dir, or --fresh"
    ]


def test_a_run_that_patience_ended_is_not_rehearsed_again(call, tiny_model_dir, my_data, monkeypatch, out_of_memory):
    """Its later iterations are not to come. A command that asks for more of them needs memory, and a rehearsal."""
    flags = ["--model", tiny_model_dir, "--data", my_data, "--run-dir", "run", *QUICK, "--method", "st"]
    patient = [*flags, "--iterations", 3, "--patience", 1]
    assert call("train.py", *patient).status == 0
    assert json.loads(Path("run/stopped.json").read_text())["after"] == 1
    monkeypatch.setattr("minidpost.selftraining.rehearsal.is_worth_it", lambda plan, model: True)
    monkeypatch.setattr(rehearsal, "sft_gradients", out_of_memory)
    for n_repeated, same in enumerate((patient, [*flags, "--iterations", 2, "--patience", 1]), start=1):
        outcome = call("train.py", *same)
        assert (outcome.status, outcome.complaints) == (0, [])
        assert Path("run/log.txt").read_text().count("every stage is finished") == n_repeated
        assert not Path("run/iteration-2").exists()

    for more in (["--iterations", 4, "--patience", 1], ["--iterations", 3, "--patience", 2], ["--iterations", 3]):
        before = snapshot(Path("run"))
        outcome = call("train.py", *flags, *more)
        assert outcome.status == 2 and "in the rehearsal of training" in outcome.complaints[0]
        assert snapshot(Path("run")) == before
    shutil.move("run/iteration-1/evaluation.json", "evaluation.json")  # a stage that has to be made again
    assert "in the rehearsal of training" in call("train.py", *patient).complaints[0]
    Path("run/stopped.json").write_text("[1]")
    before = snapshot(Path("run"))
    assert call("train.py", *patient).complaints == [
        "train.py: run/stopped.json is not readable; restore it, or --fresh"
    ]
    assert snapshot(Path("run")) == before


def test_a_disk_without_room_is_refused_before_anything_is_written(call, tiny_model_dir, my_data, monkeypatch):
    monkeypatch.setattr("minidpost.selftraining.estimates.disk_bytes", lambda *_, **__: 10**18)
    outcome = call("train.py", "--model", tiny_model_dir, "--data", my_data, "--run-dir", "runs/new", *QUICK)
    assert outcome.status == 2 and len(outcome.complaints) == 1
    assert outcome.complaints[0].startswith("train.py: disk: 1000000000.0 GB needed")
    assert not Path("runs").exists()


def test_the_precision_of_training_belongs_to_the_run(call, tiny_model_dir, my_data):
    flags = ["--model", tiny_model_dir, "--data", my_data, *QUICK, "--method", "sft", "--device", "cpu"]
    assert call("train.py", *flags, "--run-dir", "auto").status == 0
    assert json.loads(Path("auto/config.json").read_text())["settings"]["train_dtype"] == "fp32"
    assert call("train.py", *flags, "--run-dir", "auto", "--train-dtype", "fp32").status == 0  # what auto is here
    outcome = call("train.py", *flags, "--run-dir", "auto", "--train-dtype", "bf16")
    assert outcome.complaints == [
        "train.py: auto was begun with train_dtype = fp32, this command has bf16; choose another --run-dir, or --fresh"
    ]
    assert call("train.py", *flags, "--train-dtype", "bf16").status == 0
    (in_bf16,) = Path("runs").iterdir()
    assert "train-dtype=bf16" in in_bf16.name
    losses = [next(read_log(run / "iteration-0/sft/log.jsonl"))["loss"] for run in (Path("auto"), in_bf16)]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=0.02)
