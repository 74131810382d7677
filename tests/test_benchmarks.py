"""The benchmarks that need nothing but time: scripted rows say their scripts, peers say what we say, scripts run."""

import random
import shutil
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from math import log
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from llama_oracle import LLAMA_SHAPES, random_llama
from t5_oracle import SHAPES, random_t5

from benchmarks import (
    blocked_weights,
    default_run,
    estimates,
    gpu,
    host,
    large_model,
    logprob_gap,
    peers,
    profiling,
    sampling,
    scaling,
    smollm2,
)
from benchmarks.profiling import profile
from benchmarks.scaling import Clocked, Limits, Rates, least_seconds, recipe_seconds
from benchmarks.scripted import ScriptedModel, Work, natural_work, scripted_work
from minidpost.data import datasets
from minidpost.errors import UserError
from minidpost.models.llama import Llama, LlamaConfig
from minidpost.models.t5 import T5
from minidpost.models.weights import load_model, save_model, tokenizer_files
from minidpost.sampling import sampler
from minidpost.sampling.cuda_graphs import CUDAGraphs, Recorded
from minidpost.sampling.sampler import Request, SamplingSettings, sample
from minidpost.selftraining.presets import T5 as T5_PRESET
from minidpost.storage import read_json, read_jsonl, write_json, write_jsonl
from minidpost.training.optim import read_log

ROOT = Path(__file__).resolve().parents[1]
END = 1
MODELS = {"t5": lambda: random_t5(SHAPES["gated-untied"]), "llama": lambda: random_llama(LLAMA_SHAPES["grouped"])}


class Interrupting:
    """Forces the two ids that the script has after each id 7."""

    trigger_ids = frozenset()
    is_idle = False

    def __init__(self):
        self.n_forced = 0

    def push(self, token_id: int) -> list[int]:
        forced = [8, 9] if token_id == 7 and not self.n_forced else []
        self.n_forced = len(forced) or max(0, self.n_forced - 1)
        return forced


def scripts_with_forced_ids(n: int) -> list[list[int]]:
    numbers = random.Random(0)
    scripts = []
    for _ in range(n):
        parts = numbers.choices([[7, 8, 9], [2], [3, 4], [5, 6, 5]], k=numbers.randint(0, 12))
        scripts.append([*(token_id for part in parts for token_id in part), END])
    return scripts


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("name", MODELS)
def test_scripted_rows_say_exactly_their_scripts(name, temperature, monkeypatch):
    """Forced ids too, over several slots, refills, prefills and chunks; neighbours of one prompt as well."""
    monkeypatch.setattr(sampler, "CHUNK", 30)
    monkeypatch.setattr(sampler, "PREFILL_BATCH", 3)
    scripts = scripts_with_forced_ids(20)
    prompts = [tuple(random.Random(i).choices(range(2, 80), k=1 + i % 7)) for i in range(20)]
    assert len(set(prompts)) == 20
    model = ScriptedModel(MODELS[name](), prompts, scripts)
    requests = [Request(prompt, str(i), k) for i, prompt in enumerate(prompts) for k in range(2)]
    settings = SamplingSettings(temperature, max_new_tokens=50, slots=4)
    rows = sorted(sample(model, requests, settings, END, new_override=Interrupting), key=lambda row: row.request_index)
    assert [row.token_ids for row in rows] == [script for script in scripts for _ in range(2)]
    assert [row.forced for row in rows] == [[t in (8, 9) for t in s] for s in scripts for _ in range(2)]
    assert sum(sum(row.forced) for row in rows) > 50


def test_samples_of_a_question_say_its_scripts_in_turn(tiny_template, tmp_path):
    """The gold rationale and others of like length; ours and transformers' do, at the method's temperature."""
    work = scripted_work(tiny_template, 3, tmp_path, n_samples=4)
    assert len(work.prompts) == len(work.scripts) == 12 and len(set(work.prompts)) == 3 and work.temperature == 0.7
    assert work.scripts[::4] == scripted_work(tiny_template, 3, tmp_path).scripts
    assert all(0.3 < len(script) / len(work.scripts[i // 4 * 4]) < 3 for i, script in enumerate(work.scripts))
    assert len({len(script) for script in work.scripts}) > 5
    assert work.part(5).scripts == work.scripts[:8]
    model = load_model(ROOT / "weights" / "tiny-t5-dpo-st")
    assert sampling.sampled(model, work, 3) == work.scripts
    for n_rows in (8, 6):  # prompts encoded once and as often as they stand there
        assert peers.generate(peers.twin(model), work, n_rows) == work.scripts


def test_scripts_are_gold_rationales_that_the_calculator_agrees_with(tiny_template, tmp_path):
    """Without the shared folder they are the toy world's."""
    work = scripted_work(tiny_template, 5, tmp_path)
    assert len(work.prompts) == len(set(work.prompts)) == 5
    assert all(script[-1] == tiny_template.eos_id and "<<" in tiny_template.decode(script) for script in work.scripts)
    assert work.max_new_tokens == max(map(len, work.scripts))


def test_scripts_from_gsm8k(shared, tiny_template):
    rationale = tiny_template.decode(scripted_work(tiny_template, 1, shared).scripts[0])
    assert rationale.endswith("#### 18")  # the first test question's answer


@pytest.mark.parametrize("is_natural", [True, False])
def test_transformers_says_what_we_say(tiny_template, is_natural):
    """In batches and a question at a time, with the keys and values of before the calculator's stops."""
    model = load_model(ROOT / "weights" / "tiny-t5-dpo-st")
    work = natural_work(tiny_template, 6, 60) if is_natural else scripted_work(tiny_template, 6, ROOT / "nowhere")
    scripted = model if is_natural else ScriptedModel(model, work.prompts, work.scripts)
    requests = [Request(prompt, str(i)) for i, prompt in enumerate(work.prompts)]
    settings = SamplingSettings(max_new_tokens=work.max_new_tokens, slots=4)
    new_override = tiny_template.new_calculator
    rows = sorted(
        sample(scripted, requests, settings, tiny_template.eos_id, new_override=new_override),
        key=lambda row: row.request_index,
    )
    assert sum(sum(row.forced) for row in rows) > 10
    ours, peer = [row.token_ids for row in rows], peers.twin(model)
    assert peers.generate(peer, work, 4) == ours
    assert peers.generate(peer, work, 4, is_sorted=False) == ours
    assert peers.one_at_a_time(peer, work.part(3)) == ours[:3]


def test_llamas_twin_is_padded_in_front(tiny_template):
    model, scripts = MODELS["llama"](), [[3, 4, END], [5, END], [6, 7, 8, 9, END]]
    prompts = [(2, 3, 4, 5), (3,), (4, 4)]
    peer = peers.twin(model)
    ids_BT, mask_BT = torch.tensor([[0, 0, 5, 6]]), torch.tensor([[0, 0, 1, 1]])
    with torch.inference_mode():
        padded = peer(ids_BT, attention_mask=mask_BT, position_ids=torch.tensor([[0, 0, 0, 1]])).logits[0, -1]
        torch.testing.assert_close(padded, model(torch.tensor([[5, 6]]))[0, -1], rtol=1e-4, atol=1e-5)
    work = Work(tiny_template, prompts, scripts, 8)
    assert peers.generate(peer, work, 2) == scripts
    assert peers.one_at_a_time(peer, work) == scripts


def test_steps_are_clocked_in_every_cache():
    model, prompts = MODELS["t5"](), [(2, 3), (3, 4, 5)]
    clocked = Clocked(model, prompts, [[4] * 12, [5] * 12])
    list(sample(clocked, [Request(p, str(p)) for p in prompts], SamplingSettings(max_new_tokens=12, slots=2), END))
    assert clocked.n_caches.value == 1 and clocked.n_rows_C[0] == 2
    assert (clocked.began_CT[0][1:] > clocked.began_CT[0][:-1]).all()
    clocked.began_CT[0], clocked.began_CT[1] = range(12), [2 * i for i in range(12)]
    clocked.n_rows_C[1], clocked.n_caches.value = 6, 2  # as of another process: 6 rows in 2 s beside 2 rows in 1 s
    assert clocked.step_seconds(3, 4) == pytest.approx(8 / (2 / 1 + 6 / 2))


def test_the_least_time_of_a_step_is_by_hand():
    """gated-untied: D 24, H 3, K 5, F 40, V 97, 3 decoder layers."""
    layer = 4 * 24 * 15 + 2 * 24 * 15 + 3 * 24 * 40 + 3 * 24  # own attention, queries and output to the prompt, …
    n_weights = 3 * layer + 24 + 32 * 3 + 97 * 24
    n_attended = 2 * 3 * (10 + 4 + 1)
    memory, peak = least_seconds(MODELS["t5"](), rows=2, n_prompt=10, position=4, limits=Limits(100.0, 1000.0))
    assert memory == pytest.approx(4 * (n_weights + 2 * 15 * n_attended) / 100)
    assert peak == pytest.approx((2 * 2 * n_weights + 4 * 15 * n_attended) / 1000)


def test_the_recipes_time_adds_up():
    stages = recipe_seconds(Rates(sampling=1000.0, sft=500.0, dpo=250.0), T5_PRESET)
    assert stages["SFT, warm-up"] == pytest.approx(8 * 6705 * (61 + 106) / 500)
    assert stages["samples for DPO"] == pytest.approx(3 * 5 * 6705 * 106 / 1000)
    assert stages["DPO, steps"] == pytest.approx(3 * 150 * 96 * 2 * (61 + 106) / 250)
    assert stages["DPO, reference"] == pytest.approx(stages["DPO, steps"] / 3)
    measured = recipe_seconds(Rates(sampling=1000.0, sft=500.0, dpo=250.0, reference=1000.0), T5_PRESET)
    assert measured["DPO, reference"] == pytest.approx(stages["DPO, steps"] / 4)
    # Dev and the tests four times, dev after DPO three times, ten samples of dev seven times.
    n_answers = 4 * (768 + 5015) + 3 * 768 + 7 * 10 * 768
    assert stages["evaluation"] == pytest.approx(n_answers * 106 / 1000)
    assert stages["all"] == pytest.approx(sum(seconds for stage, seconds in stages.items() if stage != "all"))


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs a script's main with these arguments; what it printed."""

    def run_main(script, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [script.__file__, *map(str, arguments)])
        script.main()
        return capsys.readouterr().out

    return run_main


@pytest.mark.parametrize("script", [sampling, scaling])
def test_help_and_refusals(script, run, tmp_path):
    with pytest.raises(SystemExit, match="0"):
        run(script, "--help")
    for wrong in (
        ["--model", "nonsense"],
        ["--rows", "0"],
        ["--device", "nonsense"],
        ["--output", tmp_path / "a/b.md"],
    ):
        with pytest.raises(UserError, match=wrong[0]):
            run(script, *wrong)


@pytest.mark.parametrize("script", [sampling, scaling])
def test_a_refusal_is_one_line_and_status_2(script):
    command = [sys.executable, script.__file__, "--dtype", "fp16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    name = Path(script.__file__).name
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and done.stderr.startswith(f"{name}: "), done.stderr


@pytest.mark.slow
def test_sampling_writes_a_table(run, tiny_model_dir, tmp_path):
    output = tmp_path / "sampling.md"
    flags = [
        "--rows",
        2,
        "--questions",
        4,
        "--samples",
        "1,2",
        "--rounds",
        1,
        "--contenders",
        "off,transformers,one",
        "--output",
        output,
    ]
    printed = run(sampling, "--model", tiny_model_dir, "--dtype", "fp32", *flags)
    text = output.read_text(encoding="utf-8")
    assert "| rows | completions | tokens | rounds | ours" in text and "| 2    | 4           |" in text
    assert "2 samples a question" in text and "| 2    | 8           |" in text
    assert "GPU rows" in text and "not measured" in text and text in printed


def test_scaling_writes_tables_and_a_figure(run, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setitem(scaling.PROBES, "cpu", (2**16, 64))
    output = tmp_path / "scaling.md"
    flags = ["--rows", "1,2", "--prompts", 4, "--length", 8, "--examples", 2, "--steps", 1, "--output", output]
    printed = run(scaling, "--model", tiny_model_dir, *flags)
    text = output.read_text(encoding="utf-8")
    assert all(words in text for words in ("GB/s", "of the limit", "SFT, 2 examples", "DPO, 2 pairs", "Not measured."))
    assert text in printed and output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("family", "not_there"), [("t5", set()), ("llama", {"attention: prompts", "which rows share a prompt"})]
)
def test_a_profile_tells_all_of_the_time_once(run, tiny_model_dir, tmp_path, monkeypatch, family, not_there):
    clocks, decode = [], T5.decode
    monkeypatch.setattr(profiling, "profile", lambda *arguments: clocks.append(profile(*arguments)) or clocks[-1])
    output = tmp_path / "profiling.md"
    model = tiny_model_dir if family == "t5" else "tiny-llama"
    dtype = "fp32" if family == "t5" else "bf16"
    printed = run(profiling, "--model", model, "--rows", 4, "--questions", 6, "--dtype", dtype, "--output", output)
    assert f"bf16 instructions, {dtype}\n" in printed
    assert T5.decode is decode, "a clock is left behind"
    seconds = clocks[0].seconds
    assert set(seconds) == {part for _, _, part in profiling.PARTS} - not_there | {profiling.REST}
    assert all(spent > 0 for spent in seconds.values())
    assert "| norms " in output.read_text(encoding="utf-8") and output.read_text(encoding="utf-8") in printed


def test_clocks_leave_out_what_is_clocked_inside(monkeypatch):
    now = [0.0]

    def spend(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = profiling.Clock()
    inner = clock.around(partial(spend, 5), "inner")
    outer = clock.around(lambda: (inner(), spend(2), inner()), "outer")
    clock.around(lambda: (outer(), spend(1)), profiling.PREFILL)()
    assert clock.seconds == {profiling.PREFILL: 13}
    outer()
    assert clock.seconds == {profiling.PREFILL: 13, "inner": 10, "outer": 2}


def test_targets_are_held_against_the_best_of_the_peers(tiny_template):
    measured = sampling.Measured(64, Work(tiny_template, [(1,)], [[1]], 1))
    measured.rates = {"ours": [90.0, 100.0, 110.0], "off": [90.0, 100.5, 120.0]}
    measured.rates |= {
        "transformers": [15.0],
        "transformers, sorted": [18.0, 20.0, 27.5],
        "CTranslate2": [45.0, 50.0, 55.0],
    }
    part = sampling.Part("tiny-t5", False, (64,))
    rows = list(sampling.target_rows({part: ([measured], [])}, sampling.TARGETS["cpu"]))
    assert [row[1:] for row in rows] == [
        ["≥ 5×", "5.00×", "reached"],
        ["≥ 1×", "2.00×", "reached"],
        ["≤ 1%", "+0.5%", "reached"],
    ]


@pytest.mark.parametrize("name", MODELS)
def test_noted_log_probabilities_are_those_of_the_tokens_drawn(name):
    """With refills, rows that end early and several samples of a prompt: each token's number is its own."""
    model = MODELS[name]()
    numbers = random.Random(0)
    prompts = [tuple(numbers.randrange(3, 80) for _ in range(numbers.randint(1, 12))) for _ in range(6)]
    requests = [Request(prompt, str(i), k) for i, prompt in enumerate(prompts) for k in range(2)]
    settings = SamplingSettings(temperature=0.7, max_new_tokens=12, slots=5)
    task = logprob_gap.Task(name, model, requests, settings, eos_id=-1)
    unending, _ = logprob_gap.sample_noted(task, model)
    task = replace(task, eos_id=unending[0].token_ids[4])  # so that a row ends there
    rows, drawn = logprob_gap.sample_noted(task, model)
    assert sorted(row.request_index for row in rows) == list(range(12))
    assert len({len(row.token_ids) for row in rows}) > 1
    trained = logprob_gap.trained_log_probabilities(model, rows, is_bf16=False)
    for row, drawn_T, trained_T in zip(rows, drawn, trained, strict=True):
        assert len(row.token_ids) == len(drawn_T)
        torch.testing.assert_close(drawn_T, trained_T, rtol=0, atol=1e-4)
    exact, rounded = (logprob_gap.measure(task, *precisions) for precisions in logprob_gap.PRECISIONS[:2])
    assert float(exact[3]) < 1e-4 < float(rounded[3])


def test_another_methods_run_takes_over_the_warm_up(tmp_path):
    """All files of iteration 0 and their records, the new method in the configuration, nothing of iteration 1."""
    done, new = tmp_path / "st-1", tmp_path / "dpo-st-1"
    for name in ("iteration-0/sft/model.safetensors", "iteration-1/pairs.jsonl"):
        (done / name).parent.mkdir(parents=True)
        (done / name).write_text(name)
    write_json(done / "config.json", {"format": 5, "settings": {"method": "st", "seed": 1}})
    records = [{"stage": "iteration-0/sft", "flops": 1.0}, {"stage": "iteration-1/pairs.jsonl"}]
    write_jsonl(done / "stages.jsonl", records)
    smollm2.take_over_warm_up(done, new, "dpo-st")
    assert {str(path.relative_to(new)) for path in new.rglob("*") if path.is_file()} == {
        "config.json",
        "stages.jsonl",
        "iteration-0/sft/model.safetensors",
    }
    assert read_json(new / "config.json") == {"format": 5, "settings": {"method": "dpo-st", "seed": 1}}
    assert [record for _, record in read_jsonl(new / "stages.jsonl")] == records[:1]


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("She makes 9 * 2 = $18.", "#### 18"),
        ("It costs $1,250.50 in all.", "#### 1,250.50"),
        ("**42**", "#### 42"),
        ("The answer is -3!", "#### -3"),
        ("No idea.", ""),
    ],
)
def test_the_last_number_of_a_model_that_was_never_told_how_to_end(completion, expected):
    assert smollm2.with_last_number(completion) == expected


def test_a_run_has_warmed_up_when_iteration_0_is_evaluated(tmp_path):
    assert not smollm2.has_warmed_up(tmp_path)
    write_jsonl(tmp_path / "stages.jsonl", [{"stage": "iteration-0/sft"}])
    assert not smollm2.has_warmed_up(tmp_path)
    write_jsonl(tmp_path / "stages.jsonl", [{"stage": "iteration-0/sft"}, {"stage": "iteration-0/evaluation.json"}])
    assert smollm2.has_warmed_up(tmp_path)


@pytest.mark.parametrize(("returned", "status"), [(2, 2), (-9, 137)], ids=["an error", "killed"])
def test_a_run_that_fails_ends_the_benchmark_with_its_status(tmp_path, monkeypatch, returned, status):
    """Without a traceback: train.py has said what was wrong."""
    done = subprocess.CompletedProcess([], returned)
    monkeypatch.setattr(smollm2.subprocess, "run", lambda command, **options: done)
    names = {"scale": "few", "runs": tmp_path, "data_dir": tmp_path, "device": "cpu", "iterations": None, "slots": 8}
    with pytest.raises(SystemExit) as error:
        smollm2.train(tmp_path, "st", 1, SimpleNamespace(**names))
    assert error.value.code == status


@pytest.mark.slow
def test_learning_rates_of_the_first_dpo_step(tmp_path, tiny_model_dir, monkeypatch):
    """Each rate's model is graded beside the warm-up; what is there already is not measured again."""
    options = SimpleNamespace(scale="try", runs=tmp_path, device="cpu", slots=8)
    directory = smollm2.run_directory("dpo-st", 1, options)
    flags = ["--model", str(tiny_model_dir), "--iterations", "1", "--limit", "4", "--sft-epochs", "1"]
    flags += ["--samples", "1", "--dpo-samples", "2", "--dpo-steps", "2", "--max-new-tokens", "20"]
    flags += ["--pass-at", "1", "--test-questions", "0", "--run-dir", str(directory)]
    subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, check=True, capture_output=True)
    monkeypatch.setattr(smollm2, "FOUND", tmp_path)
    monkeypatch.setattr(smollm2, "RATES", (1e-7, 1e-3))
    monkeypatch.setattr(smollm2, "training_dtype", lambda *_: torch.float32)  # as where the loss at first is exact
    monkeypatch.setattr(smollm2, "questions", lambda name, split, options, n: datasets.load("toy", "dev")[:n])
    smollm2.measure_rates(1, options)
    found = read_json(tmp_path / "try-rates-1.json")
    assert found["pairs"] >= 2 and [len(found[key]["n_correct"]) for key in ("0", "1e-07", "0.001")] == [2, 2, 2]
    assert found["1e-07"]["steps"] == found["0.001"]["steps"] == 2
    assert found["0.001"]["loss"][0] == pytest.approx(log(2), abs=1e-4)  # the step begins at the reference
    assert found["0.001"]["loss"][1] < found["1e-07"]["loss"][1]
    monkeypatch.setattr(smollm2, "train_dpo", None)
    monkeypatch.setattr(smollm2, "correct_samples", None)
    smollm2.measure_rates(1, options)
    assert "0.001" in smollm2.rates_table(found)


@pytest.fixture
def sft_rate_options(tmp_path, monkeypatch) -> SimpleNamespace:
    """Options of `sft-rates` at the smallest scale, which finds what it finds in a folder of its own."""
    monkeypatch.setattr(smollm2, "FOUND", tmp_path / "found")
    (tmp_path / "found").mkdir()
    options = {"learning_rates": (3e-4, 1e-2), "scale": "try", "slots": 8, "device": "cpu", "data_dir": tmp_path}
    return SimpleNamespace(**options, runs=tmp_path / "runs")


@pytest.mark.slow
def test_learning_rates_of_sft(tmp_path, shared, sft_rate_options, monkeypatch):
    """The runs' own rate trains as their warm-up did, another one does not; what is there is not measured again."""
    options = sft_rate_options
    options.data_dir = shared / "data"
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    shutil.copy(shared / "tokenizers" / "smollm2" / "tokenizer.json", tokenizer)
    im_end = "<|im_end|>"  # ChatML's, as in the real checkpoint
    chatml = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    chatml += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    write_json(tokenizer / "tokenizer_config.json", {"chat_template": chatml, "eos_token": im_end})
    base = tmp_path / "tiny"
    torch.manual_seed(0)
    model = Llama(LlamaConfig(49_152, 16, 16, 1, n_heads=2, n_kv_heads=1, d_head=8, dropout=0.1, eos_id=2)).initialise()
    save_model(model, base, tokenizer_files(tokenizer))

    # 1) A run's warm-up, by train.py itself.
    run_dir = tmp_path / "run"
    command = [sys.executable, "train.py", "--model", str(base), "--data", "gsm8k", "--data-dir", str(options.data_dir)]
    command += ["--method", "sft", "--seed", "3", "--run-dir", str(run_dir), "--test-questions", "0", "--device", "cpu"]
    command += [*smollm2.SCALES["try"].flags, "--sft-learning-rate", "3e-4"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    log = [*read_log(run_dir / "iteration-0" / "sft" / "log.jsonl")]
    evaluation = read_json(run_dir / "iteration-0" / "evaluation.json")["sft"]

    # 2) The same by sft-rates, and another rate.
    smollm2.measure_sft_rates(base, [3], options)
    own, other = (
        read_json(options.runs.parent / "found" / f"try-sft-rate-{rate}-3.json") for rate in ("0.0003", "0.01")
    )
    assert own["last_losses"] == [step["loss"] for step in log] and own["steps"] == len(log) == 2
    assert own["greedy"] == "".join(map(str, evaluation["greedy"]["gsm8k/dev"]["correct"]))
    assert (
        other["last_losses"][0] == own["last_losses"][0]
    )  # before the first update: the same examples, the same dropout
    assert other["last_losses"][1] != own["last_losses"][1]
    assert (other["examples"], len(other["greedy"]), len(other["n_correct"])) == (6, 6, 2)
    assert not [*options.runs.iterdir()]  # nothing is left of the trainings

    # 3) What is there is not measured again.
    monkeypatch.setattr(smollm2, "train_sft", None)
    smollm2.measure_sft_rates(base, [3], options)


def test_on_a_gpu_learning_rates_of_sft_are_tried_at_once(sft_rate_options, monkeypatch):
    """A process for each rate that has not been measured; one that fails is named when all have ended."""
    options = sft_rate_options
    options.device = "cuda"
    options.learning_rates = (1e-4, 3e-4, 6e-4)
    write_json(smollm2.sft_rate_path(3e-4, 1, options), {})
    started = []
    ended = []

    class Process:
        def __init__(self, command: list[str], cwd: Path):
            started.append(command)
            self.rate = command[command.index("--learning-rates") + 1]

        def wait(self) -> int:
            assert len(started) == 2  # both run by now
            ended.append(self.rate)
            return 1 if self.rate == "0.0001" else 0

        def terminate(self) -> None:
            pass

    monkeypatch.setattr(smollm2.subprocess, "Popen", Process)
    monkeypatch.setattr(smollm2, "measure_sft_rate", None)
    with pytest.raises(SystemExit, match=r"not measured: 0\.0001; the same command"):
        smollm2.measure_sft_rates(Path("base"), [1], options)
    assert ended == ["0.0001", "0.0006"]
    assert all("sft-rates" in command and command[command.index("--seeds") + 1] == "1" for command in started)


def test_the_table_of_sfts_learning_rates(sft_rate_options, tmp_path, monkeypatch, capsys):
    """Differences are over the questions and seeds that both rates have; the report needs nothing else."""

    def entry(rate: float, seed: int, greedy: str) -> None:
        found = {"machine": "a machine", "device": "a GPU", "learning_rate": rate, "seed": seed, "examples": 6703}
        found |= {"preset": {"sft_epochs": 3}, "steps": 315, "last_losses": [0.4, 0.6]}
        write_json(
            smollm2.sft_rate_path(rate, seed, sft_rate_options),
            {**found, "greedy": greedy, "n_correct": [0, 1, 5, 10]},
        )

    entry(1e-3, 1, "1111")
    entry(3e-4, 1, "0101")
    entry(3e-4, 2, "0000")
    entry(1e-4, 3, "0000")  # a seed that 3e-4 has not
    monkeypatch.setattr(smollm2, "RESULTS", tmp_path)
    smollm2.report("try")
    page = (tmp_path / "smollm2-try.md").read_text(encoding="utf-8")
    assert page.strip() == capsys.readouterr().out.strip()
    assert "(`sft-rates`, a GPU): 6,703 examples" in page and "| model" not in page
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| 0")
    ]
    assert [row[:4] for row in rows] == [
        ["0.0001", "1", "315", "0.500"],
        ["0.0003", "2", "315", "0.500"],
        ["0.001", "1", "315", "0.500"],
    ]
    assert [row[4].split()[0] for row in rows] == ["0.0", "25.0", "100.0"]  # greedy, in percent
    assert [row[5] for row in rows] == ["–", "–", "+50.00"]  # 2 of 4 questions more, of seed 1
    assert rows[2][6] == "[-6.58, +106.58]"
    assert rows[2][8].startswith("40.0 ±") and rows[2][9].startswith("75.0 ±")  # pass@1, pass@10


@pytest.mark.parametrize(
    "wrong",
    [
        ["--learning-rates", "1e-4,x"],
        ["--model", "nonsense"],
        ["--device", "nonsense"],
        ["--seeds", "1,nonsense"],
        ["--methods", "st,nonsense"],
        ["--slots", "0"],
        ["--iterations", "0"],
    ],
)
def test_a_mistake_in_smollm2s_flags_is_one_line(wrong):
    command = [sys.executable, "-m", "benchmarks.smollm2", "sft-rates", "--model", "weights/tiny-llama", *wrong]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and wrong[1].split(",")[-1] in done.stderr, done.stderr


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("has_calculator", [False, True])
def test_the_hosts_part_is_of_the_steps_that_write_the_scripts(tiny_template, tmp_path, overlap, has_calculator):
    """Scripts are followed to the token; as many steps as the longest row needs at least, and few more."""
    work = scripted_work(tiny_template, 12, tmp_path)
    seconds, n_steps = host.host_seconds(work, 4, has_calculator=has_calculator, overlap=overlap)
    n_tokens = sum(map(len, work.scripts))
    assert seconds > 0
    assert n_tokens / 4 <= n_steps <= n_tokens / 4 + max(map(len, work.scripts)) + len(work.scripts)


def test_the_gpus_page_stands_beside_what_was_before():
    """Every measurement is a row; what failed is named; shares are of what the card itself reached."""
    found = {
        "machine": {"gpu": "a GPU", "line": "torch"},
        "ceilings/bandwidth": {"gb_s": 2000.0},
        "ceilings/product": {"tflop_s": 500.0},
        "sampling/m/32": {"tokens_s": 800.0, "tokens_s_without_calculator": 820.0, "first_token_ms": 40.0}
        | {"peak_gb": 3.0},
        "step/m/32": {"step_ms": 2.0, "step_gb": 1.0, "read_gb": 1.6},
        "sampling/m/64": {"tokens_s": 900.0, "tokens_s_without_calculator": 920.0, "peak_gb": 4.0},
        "step/m/64": {"error": "OutOfMemoryError: 80 GB"},
        "peer/m/32": {"tokens_s": 100.0},
        "sft/m": {"tokens_s": 1e5, "step_ms": 10.0, "tokens_a_step": 1000.0, "flops_a_token": 1e9, "peak_gb": 5.0},
        "attention/m/32": {"products": 10.0, "efficient": 20.0, "cudnn": "no such kernel", "bytes": 10_000_000},
        "attention/m/64": {"ours": 5.0, "products": 10.0, "bytes": 10_000_000, "ours, bytes": 7_500_000},
        "rows/m": {"tokens_s": 7e4},
        "trainer-sft/m/16": {"tokens_s": 4e4},
        "trainer-sft/m/64": {"tokens_s": 5e4},
        "trainer-sft/m2/64": {"tokens_s": 9e4},
        "trainer-dpo/m/64": {"error": "ImportError: trl"},
        "dpo/m": {"error": "OutOfMemoryError: 80 GB"},
    }
    page = gpu.page(found, {"sampling/m/32": {"tokens_s": 400.0}}, "It is **fast**.")
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    step = ["2.00", "16,000", "25%", "40%"]
    assert ["m", "32", "800", "400", "820", "40", *step, "3.0", "100 (8.0×)"] in rows
    assert ["m", "64", "900", "–", "920", "–", *["–"] * 4, "4.0", "–"] in rows
    assert ["sft, m", "100,000", "–", "70,000", "10", "1,000", "20%", "5.0", "–", "50,000 (2.0×)"] in rows
    assert ["m", "32", "1,000", "–", "20", "–", "10"] in rows
    assert ["m", "64", "1,500", "5", "–", "–", "10"] in rows
    assert "- dpo/m: OutOfMemoryError: 80 GB" in page
    assert "- step/m/64: OutOfMemoryError: 80 GB" in page
    assert "It is **fast**." in page
    assert "SFT, warm-up" not in page


def test_the_gpus_page_adds_up_the_recipe():
    """By the fastest of each part."""
    found = {
        "machine": {"gpu": "a GPU", "line": "torch"},
        "sampling/flan-t5-large/32": {"error": "broken"},
        "sampling/flan-t5-large/64": {"tokens_s": 1000.0, "tokens_s_without_calculator": 1000.0, "peak_gb": 3.0},
        "dpo/flan-t5-large/16384": {"tokens_s": 250.0, "step_ms": 10.0, "tokens_a_step": 1000.0, "peak_gb": 5.0}
        | {"reference_tokens_s": 1000.0},
    }
    for tokens, tokens_s in ((16384, 500.0), (32768, 400.0)):
        training = {"tokens_s": tokens_s, "step_ms": 10.0, "tokens_a_step": 1000.0, "peak_gb": 5.0}
        found[f"sft/flan-t5-large/{tokens}"] = training
    stages = recipe_seconds(Rates(sampling=1000.0, sft=500.0, dpo=250.0, reference=1000.0), T5_PRESET)
    page = gpu.page(found)
    assert "by sampling/flan-t5-large/64, sft/flan-t5-large/16384, dpo/flan-t5-large/16384;" in page
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("|")]
    assert ["all", f"{stages['all'] / 60:.1f}"] in rows


def test_another_machines_measurements_are_not_gone_on_with(tmp_path, monkeypatch):
    """A share of the bandwidth would be one of another card's."""
    write_json(tmp_path / "gpu.json", {"machine": {"gpu": "another", "line": "torch 2.6"}})
    command = ["gpu.py", "--device", "cpu", "--parts", "ceilings", "--output", str(tmp_path / "gpu.md")]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit, match=r"is of another, torch 2\.6; this is no GPU, .* choose another --output"):
        gpu.main()
    assert not (tmp_path / "gpu.md").exists()


@pytest.mark.parametrize("name", ["tiny-t5", "tiny-llama"])
def test_a_gpus_step_is_one_that_is_recorded(name, monkeypatch):
    """As on a GPU, but with a recorder of ours: it needs what a plain step needs, and reads more."""

    def record(step, ids_B: torch.Tensor) -> Recorded:
        logits_BV = step(ids_B)
        return Recorded(ids_B, lambda: step(ids_B), logits_BV)

    def recorded_steps(model, *sizes: int) -> CUDAGraphs:
        return CUDAGraphs(model, model.new_cache(*sizes), record)

    monkeypatch.setattr(gpu, "recorded_steps", recorded_steps)
    options = SimpleNamespace(device="cpu", shared=Path("nowhere"))
    subject = gpu.Subject(name, gpu.Bench(options, gpu.SCALES["try"], {}))
    plain = gpu.device_step(20, subject)
    monkeypatch.setattr(gpu, "is_recorded", lambda device: True)
    recorded = gpu.device_step(20, subject)
    assert recorded["step_gb"] == plain["step_gb"] < plain["read_gb"] < recorded["read_gb"]


def test_plain_steps_are_not_measured_for_recorded_ones(tmp_path):
    """And what was measured before an error stays."""

    def plain() -> dict[str, float]:
        warnings.warn("no CUDA graphs, decoding will be slower (a reason)", stacklevel=1)
        return {"tokens_s": 1.0}

    options = SimpleNamespace(output=tmp_path / "gpu.md")
    bench = gpu.Bench(options, gpu.SCALES["try"], {"machine": {"gpu": "a GPU", "line": "torch"}})
    bench.measure("peer/m/32", lambda: {"tokens_s": 2.0})
    bench.measure("peer/m/64", plain)
    found = read_json(tmp_path / "gpu.json")
    assert found["peer/m/32"] == {"tokens_s": 2.0}
    assert "no CUDA graphs" in found["peer/m/64"]["error"]


@pytest.mark.slow
def test_the_gpus_benchmark_runs_on_a_cpu(tmp_path):
    """So that the first minute on a GPU is not spent on its faults; a second call measures nothing again."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--scale", "try", "--device", "cpu"]
    command += ["--models", "tiny-t5", "--output", str(tmp_path / "gpu.md")]
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, timeout=1200)
    found = read_json(tmp_path / "gpu.json")
    parts = {name.split("/")[0] for name in found}
    measured = ("ceilings", "tests", "attention", "sampling", "step", "sft", "dpo", "rows", "peer", "profile")
    assert parts == {"machine", *measured, "trainer-sft", "trainer-dpo"}
    missing = set() if find_spec("trl") else {"trainer-dpo"}  # it has an environment of its own, benchmarks/training.py
    assert {name.split("/")[0] for name, value in found.items() if "error" in value} == missing
    again = subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    measured_again = {line.split("] ")[1].split("/")[0] for line in again.stderr.splitlines() if " s] " in line}
    assert measured_again == missing
    assert read_json(tmp_path / "gpu.json") == found


def test_the_page_of_copies_keeps_a_section_for_each_processor(tmp_path, monkeypatch, capsys):
    """A run replaces that of its own kind; the ratio is the median of the rounds' ratios."""
    monkeypatch.setattr(blocked_weights, "open_shape", lambda *_: (random_llama(LLAMA_SHAPES["plain"]), None))
    output = tmp_path / "page.md"
    command = ["blocked_weights.py", "--model", "flan-t5-small", "--dtype", "fp32", "--rounds", "2", "--rows", "1,3"]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(output)])
    for kind in ("one", "another", "one"):
        monkeypatch.setattr(blocked_weights, "instruction_set", lambda kind=kind: kind)
        blocked_weights.main()
    found = read_json(output.with_suffix(".json"))
    assert [*found] == ["one", "another"]
    for row, n_rows in zip(found["one"]["rows"], (1, 3), strict=True):
        assert (row["model"], row["rows"], len(row["without"]), len(row["with"])) == ("flan-t5-small", n_rows, 2, 2)
    rows = [{"model": "m", "dtype": "bf16", "rows": 8, "without": [10.0, 20.0, 30.0], "with": [9.0, 10.0, 27.0]}]
    page = blocked_weights.section("one", {"command": "c", "machine": "m", "rows": rows})
    cells = [cell.strip() for cell in page.splitlines()[-1].strip("|").split("|")]
    assert cells == ["m", "bf16", "8", "20.0", "10.0", "0.90"]
    assert capsys.readouterr().out.count("## one") == 3


def test_the_default_runs_page_has_medians_ratios_and_what_differs(tmp_path, capsys):
    """Stages by what they are; ratios within a round; a row of accuracies for each result that a command has had."""
    names = {
        "iteration-0/sft": "fine-tuning (SFT)",
        "iteration-1/dpo": "DPO",
        "iteration-1/pairs.jsonl": default_run.OTHER,
    }
    names |= {"iteration-1/samples-dpo.jsonl": "sampling for pairs", "iteration-0/evaluation.json": "evaluation"}
    assert {stage: default_run.stage_kind(stage) for stage in names} == names

    def run(number: int, contender: str, seconds: float, accuracy: float = 0.5) -> dict[str, object]:
        stages = dict.fromkeys([*default_run.STAGES.values(), default_run.OTHER], seconds / 10)
        measured = {"seconds": seconds, "peak_bytes": 5e8, "stages": stages, "accuracy": {"toy/dev": accuracy}}
        return {"round": number, "contender": contender, **measured}

    runs = [run(0, "before", 200), run(0, "now", 100), run(1, "before", 300), run(1, "now", 240), run(2, "before", 100)]
    runs += [run(2, "now", 90), run(2, "now, torchrun", 180, 0.25)]
    found = {"machine": "a machine", "before": "1234567", "flags": ["--seed", "1"], "runs": runs}
    default_run.write_page(tmp_path / "page.md", found, is_whole=True)
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert page in capsys.readouterr().out
    assert "| now           | 3    | 100             | 90 to 240 " in page
    assert "now / before: median **0.80** (round by round 0.50, 0.80, 0.90)" in page
    assert "now, torchrun / now: median **2.00** (round by round 2.00)" in page
    assert "| DPO                                     | 20.0   | 10.0 | 18.0          |" in page
    accuracies = page[page.index("toy/dev") :]
    rows = [line for line in accuracies.splitlines()[2:] if line.startswith("|")]
    assert [row.split()[-2] for row in rows] == ["50.0", "50.0", "25.0"]
    assert page.endswith(f"{default_run.TOGETHER_TEXT}\n")


def test_memory_estimates_are_read_from_what_a_run_says():
    line = "12:00:00 memory: training 8.4 GB, sampling 26.0 MB (estimated) of 24.3 GB free on cpu; disk: 4.3 GB"
    assert estimates.sizes(line) == (8.4e9, 26e6)
    case = estimates.Case("smollm2-135m", ("--lora-rank", "16"), n_processes=2)
    row = estimates.row_of(case, (8.4e9, 26e6), (8.3e9, 1e9), rest=300_000_000)
    assert row == ["smollm2-135m", "--lora-rank 16", "2", "8.4", "8.0", "1.05"]


# -- a large model ----------------------------------------------------------------------------------------------------


def test_memory_is_held_against_what_is_in_flight():
    found = {"own": 2 * 10**9, "made": 10**9, "peak": 3.2 * 10**9, "of files": 0}
    assert large_model.memory_row("model-fp32", 2, found) == [
        "finished model, fp32", "2", "2.000", "1.000", "3.200", "0.000", "1.07", "yes",
    ]  # fmt: skip
    assert large_model.memory_row("model-fp32", 2, found | {"peak": 3.4 * 10**9})[-2:] == ["1.13", "**no**"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux tells the memory of a process")
def test_what_a_process_has_to_itself_is_watched():
    """The largest that there was, although it is gone at the end."""
    with large_model.watched() as peak:
        large = torch.ones(2**24)
        time.sleep(0.1)
        del large
    assert 2**26 <= peak.own < 1.5 * 2**26


@pytest.mark.slow
def test_a_large_model_is_measured_on_one_and_two_processes(tmp_path, monkeypatch):
    """Small here, with two layers of which the upper one is trained; one command writes both tables."""
    page = tmp_path / "page.md"
    flags = ["--width", "128", "--layers", "2", "--vocabulary", "4000", "--directory", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["large_model", *flags, "--output", str(page)])
    large_model.main()
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]
    rows = [line.split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    heads = [number for number, row in enumerate(rows) if row[0].strip("| ") == "what"]
    memory = rows[heads[0] + 2 : heads[1]]
    times = rows[heads[1] + 2 :]
    assert [row[1].strip() for row in memory] == ["1"] * 8 + ["2"] * 8
    assert [row[1].strip() for row in times] == ["1"] * 4 + ["2"] * 4
    of_one, of_two = ([float(row[2]) for row in memory[start : start + 8]] for start in (0, 8))
    assert of_two == pytest.approx([size / 2 for size in of_one], abs=0.002)  # slices
    half, whole = of_one[6], of_one[4]
    assert half == pytest.approx(whole / 2, abs=0.002)  # one layer of two and the head, without the embedding
