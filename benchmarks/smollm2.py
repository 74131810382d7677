"""The recipe on a real pretrained model: SmolLM2-135M-Instruct on GSM8K, base model, SFT, ST and DPO-ST.

    python -m benchmarks.smollm2 base      --model FILE.gguf    what the model can before: zero-shot, and with examples
    python -m benchmarks.smollm2 train     --model FILE.gguf    train.py with --method st and --method dpo-st
    python -m benchmarks.smollm2 sft-rates --model FILE.gguf    SFT with several learning rates, on dev
    python -m benchmarks.smollm2 rates     --model FILE.gguf    DPO with several learning rates, on dev
    python -m benchmarks.smollm2 grade     --model FILE.gguf    its models' greedy answers to the test questions
    python -m benchmarks.smollm2 report                         its page, smollm2-SCALE.md; smollm2.md for whole
    python -m benchmarks.smollm2 all       --model FILE.gguf    base, train and grade side by side, for a GPU

Every part goes on where it was stopped; what it finds lies in benchmarks/results/smollm2/ as JSON. `--scale whole` is
the paper's recipe (6,705 labelled questions, K = 3, three iterations, all of GSM8K's test questions), for a GPU;
`--scale part` is a part of which two cores do the warm-up and `rates` in some hours, `--scale few` one that they finish
in about five hours; the page says so. `sft-rates` needs no run: it is the warm-up's SFT with each rate, on a GPU a
process each side by side. `--scale try` shows that everything works. Nothing is chosen by a test question.

A seed's ST and DPO-ST runs have the same warm-up, bit for bit, so that it is trained once and copied: the difference
between them is the DPO step's alone.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.common import RESULTS, instruction_set, machine_line
from benchmarks.effect import bits, pass_at, percent, points
from minidpost.cli import NOT_NEGATIVE, POSITIVE, Parser, checked, device, run_command
from minidpost.data import datasets
from minidpost.data.example import Example
from minidpost.models.hf_config import Model, read_config
from minidpost.models.hub import find_model
from minidpost.models.weights import (
    empty_model,
    in_memory,
    load_model,
    load_template,
    open_tensors,
    write_safetensors,
)
from minidpost.precision import default_device, sampling_dtype, training_dtype
from minidpost.sampling.generate import Sample
from minidpost.sampling.sampler import SamplingSettings
from minidpost.selftraining.estimates import micro_batch_tokens_for
from minidpost.selftraining.evaluation import samples_by_question
from minidpost.selftraining.flags import add_hyperparameters, given, reader
from minidpost.selftraining.presets import Preset, n_parameters, preset_for
from minidpost.selftraining.run import Data, tokenize
from minidpost.selftraining.selection import Candidates, preference_pairs
from minidpost.selftraining.steps import free_models
from minidpost.storage import markdown_table, read_json, read_jsonl, write_json, write_jsonl
from minidpost.text.grading import is_correct
from minidpost.text.templates import LlamaTemplate, Template, Tokenizer
from minidpost.text.tokenizer import load_tokenizer
from minidpost.training.batching import TokenizedExample, drop_too_long
from minidpost.training.dpo import PreferencePair, reference_log_probabilities, train_dpo
from minidpost.training.optim import read_log
from minidpost.training.sft import train_sft
from minidpost.training.state import TrainingState

ROOT = Path(__file__).resolve().parents[1]
FOUND = RESULTS / "smollm2"
COMMAND = (sys.executable, "-m", "benchmarks.smollm2")  # in ROOT
TESTS = ("gsm8k", "multiarith", "asdiv", "svamp")
METHODS = ("st", "dpo-st")
N_SHOTS = 3
N_PARAMETERS = 134_515_008  # of SmolLM2-135M
N_SAMPLES = 10  # a question, for pass@1 … pass@10
RATES = (3e-6, 1e-6)  # of the first DPO step, for `rates`
SFT_RATES = (1e-4, 3e-4, 6e-4, 1e-3)  # for `sft-rates`
COMPARED_SFT_RATE = 3e-4  # the runs' own, with which the others are compared
N_LAST_STEPS = 10  # of SFT, whose mean loss the report shows: a single step's is its own few examples'


@dataclass(frozen=True)
class Scale:
    """How much of the recipe is run: train.py's flags, and how many questions are graded (None: all)."""

    flags: tuple[str, ...]
    iterations: int
    n_test: int | None  # of GSM8K
    n_other_test: int | None  # of each of the other sets
    n_dev: int | None
    n_base: int | None = None  # of each test set, for the base model
    n_rate_questions: int | None = None  # of the labelled ones, for `rates`
    rate_epochs: int = 4  # of DPO, for `rates`
    max_new_tokens: int = 300


SCALES = {
    "whole": Scale(
        flags=(
            *("--template", "chat", "--samples", "3", "--sft-examples-per-step", "64", "--sft-learning-rate", "3e-4"),
            *("--dpo-pairs-per-step", "64", "--pass-questions", "200"),
        ),
        iterations=3,
        n_test=None,
        n_other_test=None,
        n_dev=200,
        n_base=300,
    ),
    "part": Scale(
        flags=(
            # Many questions once rather than few of them three times; what is seen once needs no dropout.
            *("--template", "chat", "--limit", "2400", "--sft-epochs", "1", "--sft-examples-per-step", "16"),
            *("--sft-dropout", "0"),
            # A fifth of the paper's steps: with as many times its 7e-7 the weights move as far in all.
            *("--dpo-samples", "3", "--dpo-pairs-per-step", "16", "--dpo-max-epochs", "2"),
            *("--dpo-learning-rate", "3e-6", "--samples", "3"),
            *("--micro-batch-tokens", "4096", "--pass-questions", "100"),
        ),
        iterations=1,
        n_test=200,
        n_other_test=200,
        n_dev=100,
        n_base=200,
        n_rate_questions=150,
        rate_epochs=1,
    ),
    "few": Scale(
        flags=(
            *("--template", "chat", "--limit", "1000", "--sft-epochs", "2", "--sft-examples-per-step", "16"),
            *("--sft-dropout", "0"),
            *("--dpo-samples", "1", "--dpo-pairs-per-step", "16", "--dpo-max-epochs", "1"),
            *("--dpo-learning-rate", "3e-6", "--samples", "3"),
            *("--micro-batch-tokens", "4096", "--pass-questions", "50"),
        ),
        iterations=1,
        n_test=200,
        n_other_test=200,
        n_dev=100,
        n_base=100,
    ),
    "try": Scale(
        flags=(
            *("--template", "chat", "--limit", "6", "--sft-epochs", "1", "--sft-examples-per-step", "4"),
            *("--samples", "2", "--dpo-samples", "2", "--micro-batch-tokens", "2048", "--pass-questions", "2"),
            *("--pass-at", "2", "--max-new-tokens", "40"),
        ),
        iterations=1,
        n_test=2,
        n_other_test=2,
        n_dev=2,
        n_base=2,
        n_rate_questions=4,
        max_new_tokens=40,
    ),
}


def main() -> None:
    """Run one of the parts."""
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=("base", "train", "sft-rates", "rates", "grade", "report", "all"))
    parser.add_argument("--model", help="the GGUF file of SmolLM2-135M-Instruct, or the directory made from it")
    parser.add_argument("--scale", choices=SCALES, default="part", help="how much of the recipe (default: part)")
    parser.add_argument("--seeds", type=seeds_of, default=(1,), help="of the runs (default: 1)")
    rates = ",".join(map(rate_name, SFT_RATES))
    parser.add_argument("--learning-rates", type=sft_rates, default=SFT_RATES, help=f"of sft-rates (default: {rates})")
    parser.add_argument("--methods", type=methods_of, default=METHODS, help=f"(default: {','.join(METHODS)})")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where the datasets lie (default: data)")
    parser.add_argument("--runs", type=Path, default=Path("runs/smollm2"), help="(default: runs/smollm2)")
    parser.add_argument("--device", type=device, default=default_device(), help="(default: cuda if any)")
    parser.add_argument("--iterations", type=POSITIVE, help="of the runs (default: the scale's)")
    parser.add_argument("--slots", type=POSITIVE, default=64, help="rows that are decoded at once (default: 64)")
    options = parser.parse_args()
    if options.part == "report":
        report(options.scale)
        return
    if options.model is None:
        parser.error("--model is missing")
    FOUND.mkdir(parents=True, exist_ok=True)
    base = find_model(options.model)
    if options.part == "base":
        measure_base(base, options)
        return
    seeds = options.seeds
    if options.part == "sft-rates":
        measure_sft_rates(base, seeds, options)
        return
    if options.part == "rates":
        measure_rates(seeds[0], options)
        return
    if options.part == "all":
        run_all(base, seeds, options)
        return
    for seed in seeds:
        for method in options.methods:
            if options.part == "train":
                train(base, method, seed, options)
            else:
                grade(method, seed, options)


def seeds_of(text: str) -> tuple[int, ...]:
    """The seeds of --seeds."""
    return tuple(map(NOT_NEGATIVE, text.split(",")))


def methods_of(text: str) -> tuple[str, ...]:
    """The methods of --methods."""
    read = checked(str, METHODS.__contains__, " or ".join(METHODS))
    return tuple(map(read, text.split(",")))


def questions(name: str, split: str, options: argparse.Namespace, n: int | None) -> list[Example]:
    """The first n questions of a dataset's split, all for None."""
    return datasets.load(name, split, options.data_dir)[:n]


# -- the base model ---------------------------------------------------------------------------------------------------


class FewShotTemplate(LlamaTemplate):
    """The Alpaca-style frame, answered examples before it, each of which ends as a fine-tuned model ends."""

    def __init__(self, tokenizer: Tokenizer, shots: Sequence[Example]):
        """Put `shots` before every question."""
        super().__init__(tokenizer)
        self._shot_ids: list[int] = []
        for shot in shots:
            self._shot_ids += [*super().prompt_ids(shot.question), *self.target_ids(shot.rationale or "")]

    def prompt_ids(self, question: str) -> list[int]:
        """The ids in front of a completion."""
        return [*self._shot_ids, *super().prompt_ids(question)]


def shortest_shots(base: Path, labelled: Iterable[Example]) -> list[Example]:
    """Of the first hundred labelled questions those with the shortest prompts and rationales of two steps or more.

    Prompts are at most 1,024 tokens, and a question must fit in behind them.
    """
    tokenizer = load_tokenizer(base)
    candidates = [example for example in labelled if (example.rationale or "").count("<<") >= 2][:100]
    by_length = sorted(candidates, key=lambda e: len(tokenizer.encode(f"{e.question}{e.rationale}")))
    return by_length[:N_SHOTS]


def measure_base(base: Path, options: argparse.Namespace) -> None:
    """Greedy answers of the base model: in its chat format without examples, and after examples in GSM8K's form."""
    scale = SCALES[options.scale]
    path = FOUND / f"{options.scale}-base.json"
    found: dict[str, Any] = read_json(path) if path.is_file() else machine()
    model = load_model(base, sampling_dtype("auto", options.device, N_PARAMETERS), options.device)
    shots = shortest_shots(base, questions("gsm8k", "train", options, None))
    templates: dict[str, Template] = {
        "zero-shot": load_template(base, "chat"),
        f"{N_SHOTS}-shot": FewShotTemplate(load_tokenizer(base), shots),
    }
    for prompt, template in templates.items():
        for test in TESTS:
            for calculator in (True, False) if prompt != "zero-shot" else (False,):
                key = f"{prompt}/{test}/{'on' if calculator else 'off'}"
                if key in found:
                    continue
                examples = questions(test, "test", options, scale.n_base)
                completions = greedy_completions(model, template, examples, options, calculator=calculator, label=key)
                found[key] = {
                    "strict": outcomes(completions, examples),
                    "last number": outcomes(map(with_last_number, completions), examples),
                    "first completions": completions[:3],
                }
                write_json(path, found)


def settings(options: argparse.Namespace, temperature: float, seed: int = 0) -> SamplingSettings:
    """Those of a grading."""
    max_new_tokens = SCALES[options.scale].max_new_tokens
    return SamplingSettings(temperature=temperature, max_new_tokens=max_new_tokens, slots=options.slots, seed=seed)


def greedy_completions(
    model: Model,
    template: Template,
    examples: Sequence[Example],
    options: argparse.Namespace,
    *,
    calculator: bool,
    label: str,
) -> list[str]:
    """What a model answers to each question."""
    greedy = settings(options, temperature=0.0)
    rows = samples_by_question(model, template, examples, greedy, n_samples=1, calculator=calculator, label=label)
    return [sample.completion for (sample,) in rows]


def outcomes(completions: Iterable[str], examples: Sequence[Example]) -> str:
    """A character for each question: 1 where the completion's final answer is correct, else 0."""
    pairs = zip(completions, examples, strict=True)
    return "".join(str(int(is_correct(completion, example.answer))) for completion, example in pairs)


def with_last_number(completion: str) -> str:
    """A completion whose last number, whatever stands around it, is its final answer.

    Not what the paper grades by: a model that was never told to end in `#### 18` is judged too harshly by that.
    """
    words = [word.strip(".,:;!?()*$%") for word in completion.replace("$", " ").split()]
    numbers = [word for word in words if word.replace(",", "").replace(".", "", 1).lstrip("-").isdigit()]
    return f"#### {numbers[-1]}" if numbers else ""


# -- training ---------------------------------------------------------------------------------------------------------


def run_directory(method: str, seed: int, options: argparse.Namespace) -> Path:
    """Where a run lies."""
    return Path(options.runs) / f"{options.scale}-{method}-{seed}"


def train(base: Path, method: str, seed: int, options: argparse.Namespace) -> None:
    """Run train.py, after taking over the other method's warm-up where that is there."""
    scale = SCALES[options.scale]
    directory = run_directory(method, seed, options)
    flags = ["--model", str(base), "--data", "gsm8k", "--data-dir", str(options.data_dir), "--method", method]
    flags += ["--seed", str(seed), "--run-dir", str(directory), "--device", options.device]
    flags += ["--iterations", str(options.iterations or scale.iterations)]
    flags += ["--slots", str(options.slots), "--test-questions", "0"]
    flags += scale.flags
    warmed_up = run_directory(METHODS[0], seed, options)
    if method != METHODS[0] and not directory.exists():
        while not has_warmed_up(warmed_up):  # which another process may be at
            time.sleep(1)
        take_over_warm_up(warmed_up, directory, method)
    status = subprocess.run([sys.executable, str(ROOT / "train.py"), *flags], check=False).returncode
    if status:  # it has said why; below 0 it is a signal's number
        sys.exit(status if status > 0 else 128 - status)


def run_all(base: Path, seeds: Sequence[int], options: argparse.Namespace) -> None:
    """Train all runs at once, each in a process, beside the base model's answers, and grade models as they come.

    A small model's training and sampling leave a GPU idle half of the time, in which others can use it.
    """
    flags = common_flags(base, options)
    if options.iterations:
        flags += ["--iterations", str(options.iterations)]
    of_base = ["--slots", str(max(1, options.slots // 2))]  # its prompts are long
    others = [subprocess.Popen([*COMMAND, "base", *flags, *of_base], cwd=ROOT)]
    for seed in seeds:
        for method in METHODS:
            of_run = ["--seeds", str(seed), "--methods", method]
            others.append(subprocess.Popen([*COMMAND, "train", *flags, *of_run], cwd=ROOT))
    try:
        is_over = False
        while not is_over:
            is_over = all(other.poll() is not None for other in others)  # one that has failed too
            for seed in seeds:
                for method in METHODS:
                    if has_warmed_up(run_directory(method, seed, options)):
                        grade(method, seed, options)
            time.sleep(1)
    finally:
        for other in others:
            other.terminate()


def common_flags(base: Path, options: argparse.Namespace) -> list[str]:
    """This command's flags that every process of it has from the one that starts it."""
    flags = ["--model", str(base), "--scale", options.scale, "--data-dir", str(options.data_dir)]
    return [*flags, "--runs", str(options.runs), "--device", options.device, "--slots", str(options.slots)]


def has_warmed_up(directory: Path) -> bool:
    """Whether a run has all of iteration 0."""
    path = directory / "stages.jsonl"
    return path.is_file() and '"iteration-0/evaluation.json"' in path.read_text(encoding="utf-8")


def take_over_warm_up(done: Path, new: Path, method: str) -> None:
    """Make a run directory that has all of iteration 0, as the run of another method with the same seed left it."""
    unfinished = new.with_name(f"{new.name}.copying")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    shutil.copytree(done / "iteration-0", unfinished / "iteration-0")
    config = read_json(done / "config.json")
    config["settings"]["method"] = method
    write_json(unfinished / "config.json", config)
    lines = (done / "stages.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    of_warm_up = [line for line in lines if json.loads(line)["stage"].startswith("iteration-0/")]
    (unfinished / "stages.jsonl").write_text("".join(of_warm_up), encoding="utf-8")
    os.replace(unfinished, new)


# -- the learning rate of SFT -----------------------------------------------------------------------------------------


def sft_rates(text: str) -> tuple[float, ...]:
    """The learning rates of --learning-rates, each once, read and checked as train.py's --sft-learning-rate is."""
    read = reader("sft_learning_rate")
    return tuple(dict.fromkeys(map(read, text.split(","))))


def rate_name(rate: float) -> str:
    """A learning rate as files and tables have it: 0.0003."""
    return f"{rate:g}"


def sft_rate_path(rate: float, seed: int, options: argparse.Namespace) -> Path:
    """Where what was found of a learning rate of SFT lies, a file each, so that processes do not write to the same."""
    return FOUND / f"{options.scale}-sft-rate-{rate_name(rate)}-{seed}.json"


def measure_sft_rates(base: Path, seeds: Sequence[int], options: argparse.Namespace) -> None:
    """SFT with each learning rate that has not been measured yet: on a GPU all at once, each in a process."""
    rates = [
        rate
        for rate in options.learning_rates
        if not all(sft_rate_path(rate, seed, options).is_file() for seed in seeds)
    ]
    if len(rates) <= 1 or torch.device(options.device).type != "cuda":
        for rate in rates:
            for seed in seeds:
                measure_sft_rate(base, rate, seed, options)
        return
    flags = [*common_flags(base, options), "--seeds", ",".join(map(str, seeds))]
    processes = {}
    try:
        for rate in rates:
            of_rate = ["--learning-rates", rate_name(rate)]
            processes[rate] = subprocess.Popen([*COMMAND, "sft-rates", *flags, *of_rate], cwd=ROOT)
        failed = [rate_name(rate) for rate, process in processes.items() if process.wait() != 0]
    finally:
        for process in processes.values():
            process.terminate()
    if failed:
        sys.exit(f"not measured: {', '.join(failed)}; the same command measures what is missing")


def measure_sft_rate(base: Path, rate: float, seed: int, options: argparse.Namespace) -> None:
    """A run's warm-up with another learning rate, graded on dev alone; with the run's own rate it is that warm-up.

    All rates have the same order of examples, the same seeds of dropout and the same random numbers of samples, so that
    less of the difference between two is chance.
    """
    path = sft_rate_path(rate, seed, options)
    if path.is_file():
        return
    key = rate_name(rate)
    name = f"SFT, rate {key}, seed {seed}"

    # 1) What train.py makes of the scale's flags, and of the labelled set by them.
    flags = scale_flags(options.scale)
    weightless = empty_model(read_config(base))
    training_precision = training_dtype("auto", options.device, n_parameters(weightless))
    sampling_precision = sampling_dtype("auto", options.device, n_parameters(weightless))
    replaced = {**given(flags), "sft_learning_rate": rate}
    preset = replace(preset_for(base, "sft"), **replaced)
    tokens_of_device = micro_batch_tokens_for(weightless, preset, training_precision, options.device, has_dpo=False)
    preset = replace(preset, **{"micro_batch_tokens": tokens_of_device, **replaced})
    template = load_template(base, flags.template)
    labelled = questions("gsm8k", "train", options, flags.limit)
    dev = questions("gsm8k", "dev", options, flags.limit)
    training_data = Data(labelled, pool=[], dev=[], tests={}, name="gsm8k")  # nothing is sampled for
    tokens = tokenize(training_data, template, base)
    examples = drop_too_long(list(tokens.gold.values()), preset.max_source, preset.max_target)

    # 2) SFT from the base model. The stage is the warm-up's: order and dropout are seeded by its name.
    scratch = Path(options.runs) / f"{options.scale}-sft-rate-{key}-{seed}"
    scratch.mkdir(parents=True, exist_ok=True)
    model = load_model(base, torch.float32, options.device)
    log = scratch / "log.jsonl"
    print(f"{name}: {len(examples)} examples", flush=True)
    train_sft(
        model,
        examples,
        preset.sft(seed, training_precision),
        log_path=log,
        stage="0/sft",
        state=TrainingState(scratch / "state.safetensors"),
    )
    steps = [*read_log(log)]
    free_models()  # others may sample on this GPU already

    # 3) Its answers to dev's questions.
    model = model.to(sampling_precision)
    completions = greedy_completions(model, template, dev, options, calculator=True, label=f"{name}, greedy")
    found = {
        **machine(),
        "device": torch.cuda.get_device_name() if torch.device(options.device).type == "cuda" else "cpu",
        "learning_rate": rate,
        "seed": seed,
        "preset": asdict(preset),
        "examples": len(examples),
        "steps": len(steps),
        "seconds": round(sum(step["n_tokens"] / step["tokens_per_second"] for step in steps), 1),
        "last_losses": [step["loss"] for step in steps[-N_LAST_STEPS:]],
        "greedy": outcomes(completions, dev),
        "n_correct": correct_samples(model, template, options, label=name),
    }
    write_json(path, found)
    shutil.rmtree(scratch)


def scale_flags(scale: str) -> argparse.Namespace:
    """A scale's flags as train.py reads them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--template")
    parser.add_argument("--limit", type=int)
    add_hyperparameters(parser)
    return parser.parse_args(SCALES[scale].flags)


# -- the learning rate of DPO -----------------------------------------------------------------------------------------


def measure_rates(seed: int, options: argparse.Namespace) -> None:
    """DPO of a run's warm-up on preference pairs of its first questions, with each of RATES, graded on dev's questions.

    What there is without it, the warm-up's own samples, stands beside. Samples, reference and grades are kept.
    """
    scale = SCALES[options.scale]
    path = FOUND / f"{options.scale}-rates-{seed}.json"
    found: dict[str, Any] = read_json(path) if path.is_file() else machine()
    warmed_up = [run_directory(method, seed, options) for method in METHODS]
    directory = next((run for run in warmed_up if has_warmed_up(run)), warmed_up[0])
    preset = Preset(**read_json(directory / "config.json")["settings"]["preset"])
    warm_up = directory / "iteration-0" / "sft"
    template = load_template(warm_up)
    scratch = directory.with_name(f"{options.scale}-rates-{seed}")
    scratch.mkdir(exist_ok=True)
    sampling_precision = sampling_dtype("auto", options.device, N_PARAMETERS)
    training_precision = training_dtype("auto", options.device, N_PARAMETERS)

    # 1) What all rates share: the pairs, and what the reference says of them.
    pairs = pairs_of(warm_up, template, preset, scratch / "samples.jsonl", options)
    found["pairs"] = len(pairs)
    reference = scratch / "reference.safetensors"
    if not reference.exists():
        policy = load_model(warm_up, torch.float32, options.device)
        reference_P2 = reference_log_probabilities(
            policy, pairs, micro_batch_tokens=preset.micro_batch_tokens, dtype=training_precision
        )
        write_safetensors(in_memory({"reference_P2": reference_P2}), reference)
    with open_tensors(reference) as file:
        reference_P2 = file.get_tensor("reference_P2")
    if "0" not in found:
        model = load_model(warm_up, sampling_precision, options.device)
        found["0"] = {"n_correct": correct_samples(model, template, options, label="without DPO")}
        write_json(path, found)

    # 2) DPO with each, from the warm-up.
    for rate in RATES:
        key = f"{rate:g}"
        if key in found:
            continue
        policy = load_model(warm_up, torch.float32, options.device)
        settings = replace(preset, dpo_learning_rate=rate, dpo_max_epochs=scale.rate_epochs)
        log = scratch / f"log-{key}.jsonl"
        train_dpo(
            policy,
            pairs,
            reference_P2,
            settings.dpo(len(pairs), seed, training_precision),
            log_path=log,
            stage=f"DPO, rate {key}",
            state=TrainingState(scratch / "state.safetensors"),
        )
        steps = [*read_log(log)]
        found[key] = {
            "steps": len(steps),
            **{name: [steps[0][name], steps[-1][name]] for name in ("loss", "accuracy", "chosen_logp")},
            "n_correct": correct_samples(policy.to(sampling_precision), template, options, label=f"rate {key}"),
        }
        write_json(path, found)
        (scratch / "state.safetensors").unlink(missing_ok=True)
    shutil.rmtree(scratch)


def pairs_of(
    warm_up: Path, template: Template, preset: Preset, path: Path, options: argparse.Namespace
) -> list[PreferencePair]:
    """Preference pairs (equation 4) of the first labelled questions, by a model's samples, which are kept at `path`."""
    scale = SCALES[options.scale]
    examples = questions("gsm8k", "train", options, scale.n_rate_questions)
    if not path.exists():
        model = load_model(warm_up, sampling_dtype("auto", options.device, N_PARAMETERS), options.device)
        random = settings(options, temperature=preset.temperature, seed=778)
        n_samples = preset.dpo_samples
        rows = samples_by_question(
            model, template, examples, random, n_samples=n_samples, calculator=True, label="samples for DPO"
        )
        write_jsonl(path, [asdict(sample) for row in rows for sample in row])
    known = []
    for example in examples:
        prompt_ids = tuple(template.prompt_ids(example.question))
        gold = TokenizedExample(prompt_ids, tuple(template.target_ids(example.rationale or "")))
        known.append(Candidates(prompt_ids, gold))
    for _, record in read_jsonl(path):
        sample = Sample(**record)
        known[sample.example_index].add(sample)
    limits = {"max_similarity": preset.max_similarity, "pairs_per_question": preset.pairs_per_question}
    pairs = [pair for of_question in known for pair in preference_pairs(of_question, **limits)]
    return drop_too_long(pairs, preset.max_source, preset.max_target)


def grade(method: str, seed: int, options: argparse.Namespace) -> None:
    """Greedy answers of a run's models to the test questions, with and without calculator; pass@k on dev."""
    scale = SCALES[options.scale]
    directory = run_directory(method, seed, options)
    path = FOUND / f"{options.scale}-{seed}.json"
    found: dict[str, Any] = read_json(path) if path.is_file() else machine()
    found["settings"] = read_json(directory / "config.json")["settings"]["preset"]
    write_json(path, found)
    for iteration in range(scale.iterations + 1):
        model_dir = directory / f"iteration-{iteration}" / "sft"
        key = f"{method}/{iteration}" if iteration else "sft"
        if not model_dir.is_dir():
            continue
        entry: dict[str, Any] = found.setdefault(key, {})
        with_calculator, without = ([f"{test}/{calculator}" for test in TESTS] for calculator in ("on", "off"))
        missing = [name for name in (*with_calculator, "dev", *without) if name not in entry]
        if not missing:
            continue
        model = load_model(model_dir, sampling_dtype("auto", options.device, N_PARAMETERS), options.device)
        template = load_template(model_dir)
        for name in missing:
            label = f"seed {seed}, {key}, {name}"
            if name == "dev":
                entry[name] = correct_samples(model, template, options, label=label)
            else:
                test, _, calculator = name.partition("/")
                n = scale.n_test if test == "gsm8k" else scale.n_other_test
                examples = questions(test, "test", options, n)
                is_on = calculator == "on"
                completions = greedy_completions(model, template, examples, options, calculator=is_on, label=label)
                entry[name] = outcomes(completions, examples)
            write_json(path, found)


def correct_samples(model: Model, template: Template, options: argparse.Namespace, *, label: str) -> list[int]:
    """How many of each dev question's samples are correct."""
    examples = questions("gsm8k", "dev", options, SCALES[options.scale].n_dev)
    random = settings(options, temperature=0.7, seed=777)
    rows = samples_by_question(
        model, template, examples, random, n_samples=N_SAMPLES, calculator=True, label=f"{label}, {N_SAMPLES} samples"
    )
    return [sum(bool(sample.is_correct) for sample in row) for row in rows]


def machine() -> dict[str, Any]:
    """Where something was measured."""
    return {"machine": f"{machine_line()}, {instruction_set()}"}


# -- report -----------------------------------------------------------------------------------------------------------


def report(scale: str) -> None:
    """Write a scale's page, smollm2-SCALE.md (the whole's is smollm2.md), from what has been found at it."""
    paths = sorted(FOUND.glob(f"{scale}-[0-9]*.json"))
    found = [read_json(path) for path in paths]
    seeds = [path.stem.rpartition("-")[2] for path in paths]
    of_sft_rates = [read_json(path) for path in sorted(FOUND.glob(f"{scale}-sft-rate-*.json"))]
    path_of_base = FOUND / f"{scale}-base.json"  # which need not have been measured at this scale
    if not found and not of_sft_rates and not path_of_base.is_file():
        sys.exit(f"nothing has been measured at --scale {scale} yet")
    base = read_json(path_of_base) if path_of_base.is_file() else {"machine": [*found, *of_sft_rates][0]["machine"]}
    seeds = seeds or sorted({str(rate["seed"]) for rate in of_sft_rates})
    flags = " ".join(SCALES[scale].flags)
    iterations = found[0]["settings"]["iterations"] if found else SCALES[scale].iterations
    lines = [
        "# SmolLM2-135M-Instruct on GSM8K",
        "",
        f"`python -m benchmarks.smollm2` (base, train, grade, report) `--scale {scale} --seeds {','.join(seeds)}` · "
        f"{base['machine']}",
        "",
        f"train.py's flags: `{flags} --iterations {iterations}`. Greedy accuracy in percent, with the "
        "half-width of its 95 % interval over the questions; all models are the last iteration's named in their row.",
        "",
    ]
    findings = FOUND / f"{scale}-findings.md"
    if findings.is_file():
        lines += [findings.read_text(encoding="utf-8").strip(), ""]
    if found or path_of_base.is_file():
        lines += [accuracy_table(base, found), ""]
    if found:
        lines += [difference_table(found), "", pass_at_table(found), ""]
    if of_sft_rates:
        lines += [sft_rates_text(of_sft_rates), "", sft_rates_table(of_sft_rates), ""]
    for path in sorted(FOUND.glob(f"{scale}-rates-[0-9]*.json")):
        lines += [rates_table(read_json(path)), ""]
    if "zero-shot/gsm8k/off" in base:
        lines += completions_of(base)
    page = "\n".join(lines)
    name = "smollm2" if scale == "whole" else f"smollm2-{scale}"
    (RESULTS / f"{name}.md").write_text(page, encoding="utf-8")
    print(page)


def accuracy_table(base: dict[str, Any], found: Sequence[dict[str, Any]]) -> str:
    """Rows of models, columns of test sets with and without calculator."""
    rows = []
    for prompt in ("zero-shot", f"{N_SHOTS}-shot"):
        for grading in ("strict", "last number"):
            if not any(key.startswith(f"{prompt}/") for key in base):
                continue
            cells = [f"base, {prompt}, {'####' if grading == 'strict' else grading}", "–"]
            for test in TESTS:
                for calculator in ("on", "off"):
                    entry = base.get(f"{prompt}/{test}/{calculator}")
                    cells.append(percent(bits(entry[grading])[None]) if entry else "–")
            rows.append(cells)
    for key in models_of(found):
        of_seeds = [of_seed[key] for of_seed in found if key in of_seed]
        cells = [key, str(len(of_seeds))]
        for test in TESTS:
            for calculator in ("on", "off"):
                graded = [bits(entry[name]) for entry in of_seeds if (name := f"{test}/{calculator}") in entry]
                cells.append(percent(np.stack(graded)) if graded else "–")
        rows.append(cells)
    heads = ["model", "seeds"]
    for test in TESTS:
        heads += [test, f"{test}, calculator off"]
    return markdown_table(heads, rows)


def models_of(found: Sequence[dict[str, Any]]) -> list[str]:
    """The graded models, each once, in the order in which they were made."""
    keys = {key: None for of_seed in found for key in of_seed if key == "sft" or "/" in key}
    return [*keys]


def difference_table(found: Sequence[dict[str, Any]]) -> str:
    """Differences over the same questions and seeds, with calculator."""
    keys = models_of(found)
    compared = [(f"dpo-st/{i}", f"st/{i}") for i in range(1, 10)] + [(key, "sft") for key in keys]
    rows = []
    for after, before in compared:
        both = [of_seed for of_seed in found if after in of_seed and before in of_seed]
        if not both or after == before:
            continue
        of_tests = []
        for test in TESTS:
            name = f"{test}/on"
            graded = [of_seed for of_seed in both if name in of_seed[after] and name in of_seed[before]]
            if not graded:
                continue
            values = np.stack([bits(of_seed[after][name]) - bits(of_seed[before][name]) for of_seed in graded])
            of_tests.append(values)
            rows.append([f"{after} − {before}", test, str(len(graded)), *points(values)])
        if len(of_tests) == len(TESTS) and len({len(values) for values in of_tests}) == 1:  # the same seeds in each
            values = np.concatenate(of_tests, axis=1)
            rows.append([f"{after} − {before}", f"all {values.shape[1]:,}", str(len(values)), *points(values)])
    return markdown_table(
        ["difference", "questions", "seeds", "points", "95 % over questions", "95 % over seeds too"], rows
    )


def pass_at_table(found: Sequence[dict[str, Any]]) -> str:
    """pass@k on dev."""
    ks = (1, 5, N_SAMPLES)
    rows = []
    for key in models_of(found):
        of_seeds = [of_seed[key]["dev"] for of_seed in found if "dev" in of_seed.get(key, {})]
        if not of_seeds:
            continue
        rows.append([key, *(percent(np.stack([pass_at(n_correct, k) for n_correct in of_seeds])) for k in ks)])
    if not rows:
        return ""
    n = len(found[0]["sft"]["dev"])
    return markdown_table([f"gsm8k/dev, n {n:,}", *(f"pass@{k}" for k in ks)], rows)


def sft_rates_text(found: Sequence[dict[str, Any]]) -> str:
    """What the table of SFT's learning rates is of."""
    first = found[0]
    devices = ", ".join(sorted({rate["device"] for rate in found}))
    return (
        f"SFT with other learning rates (`sft-rates`, {devices}): {first['examples']:,} examples, "
        f"{first['preset']['sft_epochs']} epochs, all else as in the runs; the loss is the mean of the last "
        f"{len(first['last_losses'])} steps. Graded on dev alone with calculator: greedily {len(first['greedy']):,} "
        f"questions, pass@k by {N_SAMPLES} samples for each of {len(first['n_correct']):,}. Differences are of the "
        f"greedy answers to the same questions, from the rate {rate_name(COMPARED_SFT_RATE)}."
    )


def sft_rates_table(found: Sequence[dict[str, Any]]) -> str:
    """Rows of learning rates of SFT, each with all of its seeds; differences over the seeds that both rates have."""
    by_rate: dict[float, dict[int, dict[str, Any]]] = {}
    for entry in sorted(found, key=lambda entry: (entry["learning_rate"], entry["seed"])):
        by_rate.setdefault(entry["learning_rate"], {})[entry["seed"]] = entry
    compared = by_rate.get(COMPARED_SFT_RATE, {})
    rows = []
    for rate, of_seeds in by_rate.items():
        entries = [*of_seeds.values()]
        loss = np.mean([entry["last_losses"] for entry in entries])
        common = [seed for seed in of_seeds if seed in compared]
        difference = ["–", "–", "–"]
        if common and rate != COMPARED_SFT_RATE:
            values = [bits(of_seeds[seed]["greedy"]) - bits(compared[seed]["greedy"]) for seed in common]
            difference = points(np.stack(values))
        samples = [percent(np.stack([pass_at(entry["n_correct"], k) for entry in entries])) for k in (1, N_SAMPLES)]
        greedy = percent(np.stack([bits(entry["greedy"]) for entry in entries]))
        first_cells = [rate_name(rate), str(len(entries)), str(entries[0]["steps"]), f"{loss:.3f}"]
        rows.append([*first_cells, greedy, *difference, *samples])
    heads = ["SFT's learning rate", "seeds", "steps", "loss", "greedy, dev", "difference"]
    return markdown_table([*heads, "95 % over questions", "95 % over seeds too", "pass@1", f"pass@{N_SAMPLES}"], rows)


def rates_table(found: dict[str, Any]) -> str:
    """Rows of learning rates of the first DPO step; the first is the model before it."""
    rows = []
    before = pass_at(found["0"]["n_correct"], 1)
    for key, entry in found.items():
        if not isinstance(entry, dict):  # the machine, the number of pairs
            continue
        after = pass_at(entry["n_correct"], 1)
        difference = ["–", "–", "–"] if key == "0" else points((after - before)[None])
        steps = [str(entry.get(name, "–")) for name in ("steps", "loss", "accuracy", "chosen_logp")]
        rows.append(
            [key, *steps, percent(after[None]), percent(pass_at(entry["n_correct"], N_SAMPLES)[None]), *difference]
        )
    heads = [
        "DPO's learning rate",
        "steps",
        "loss",
        "accuracy of pairs",
        "log π of chosen",
        "pass@1",
        f"pass@{N_SAMPLES}",
    ]
    return markdown_table([*heads, "difference of pass@1", "95 % over questions", "95 % over seeds too"], rows)


def completions_of(base: dict[str, Any]) -> list[str]:
    """What the base model writes, for a reader to see."""
    lines = ["The base model's first completion of each prompt:", ""]
    for prompt in ("zero-shot", f"{N_SHOTS}-shot"):
        entry = base.get(f"{prompt}/gsm8k/off")
        if entry:
            lines += [f"{prompt}:", "", "```", entry["first completions"][0], "```", ""]
    return lines


if __name__ == "__main__":
    run_command(main, "the same command goes on from here")
