"""The method on the toy world: SFT, ST and DPO-ST over several seeds, with intervals.

Each run is `python train.py --method M --seed S`. A method's model is that of the iteration with the best accuracy on
dev; every number in the tables is from the test sets, which chose nothing. Intervals (95 %) are bootstraps over test
questions, each question's outcome averaged over the seeds, so that a difference is a paired one.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minidpost.data import toy  # noqa: E402
from minidpost.models.weights import load_model, load_template  # noqa: E402
from minidpost.sampling.sampler import SamplingSettings  # noqa: E402
from minidpost.selftraining.evaluation import completions_by_question, pass_at_k  # noqa: E402
from minidpost.selftraining.presets import TINY_T5  # noqa: E402
from minidpost.storage import markdown_table  # noqa: E402
from minidpost.text.grading import is_correct  # noqa: E402

METHODS = ("st", "dpo-st")
SAMPLES = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("tiny-t5", "tiny-llama"), default="tiny-t5")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--iterations", type=int, default=3, help="of each run, at most")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--runs", type=Path, help="where the runs lie, continued (default: runs/toy-benchmark…)")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/toy.md, or toy-llama.md")
    options = parser.parse_args()
    suffix = options.model.removeprefix("tiny").removesuffix("-t5")
    runs = options.runs or Path(f"runs/toy-benchmark{suffix}")
    output = options.output or ROOT / "benchmarks" / "results" / f"toy{suffix}.md"
    seeds = [int(seed) for seed in options.seeds.split(",")]
    directories = {(m, s): runs / f"{m}-{s}" for m in METHODS for s in seeds}
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(lambda name: train(options.model, *name, options.iterations, directories[name]), directories))
    torch.set_num_threads(1)
    command = f"--model {options.model} --seeds {options.seeds} --iterations {options.iterations}"
    output.write_text(report(directories, seeds, options.model, command), encoding="utf-8")
    print(output.read_text(encoding="utf-8"))


def train(model: str, method: str, seed: int, iterations: int, directory: Path) -> None:
    """One run of train.py, its output beside it."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "train.py"), "--run-dir", str(directory)]
    command += ["--model", model, "--method", method, "--seed", str(seed), "--iterations", str(iterations)]
    with open(directory.with_suffix(".out"), "a", encoding="utf-8") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=output, stderr=output, env=environment)


def report(directories: dict, seeds: list[int], model: str, command: str) -> str:
    """The Markdown page."""
    chosen = {name: best_iteration(directory) for name, directory in directories.items()}
    models = {("sft", seed): directories["st", seed] / "iteration-0" / "sft" for seed in seeds}
    models |= {name: directories[name] / f"iteration-{chosen[name]}" / "sft" for name in directories}
    right = {}  # (method, split, calculator) -> outcomes, seeds × questions
    for method in ("sft", *METHODS):
        for split in toy.TEST_SPLITS:
            for calculator in (True, False) if split == "test" else (True,):
                outcomes = [outcomes_of(models[method, seed], split, calculator) for seed in seeds]
                right[method, split, calculator] = np.array(outcomes)
    lines = ["# The toy world: does self-training help, and does DPO help it?", ""]
    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    world = f"{toy.SIZES['train']} labelled and {toy.SIZES['unlabelled']} unlabelled questions"
    lines += [f"`python benchmarks/toy.py {command}` · {machine}, torch {torch.__version__} · {model}, {world}, seeds"]
    lines[-1] += f" {', '.join(map(str, seeds))}."
    lines += ["", *__doc__.split("\n\n", 1)[1].strip().split("\n"), "", "## Greedy accuracy, mean over seeds", ""]
    heads = [
        "method",
        *(f"toy/{split}" for split in toy.TEST_SPLITS),
        "toy/test, calculator off",
        "iteration chosen on dev",
    ]
    rows = []
    for method in ("sft", *METHODS):
        cells = [interval(right[method, split, True]) for split in toy.TEST_SPLITS]
        iterations = "0" if method == "sft" else ", ".join(str(chosen[method, seed]) for seed in seeds)
        rows.append([method, *cells, interval(right[method, "test", False]), iterations])
    lines += [markdown_table(heads, rows), "", "## Differences on toy/test, in points", ""]
    rows = []
    for a, b in (("st", "sft"), ("dpo-st", "sft"), ("dpo-st", "st")):
        rows.append([f"{a} − {b}", difference(right[a, "test", True] - right[b, "test", True])])
    for method in ("sft", *METHODS):
        gain = right[method, "test", True] - right[method, "test", False]
        rows.append([f"{method}: calculator on − off", difference(gain)])
    lines += [
        markdown_table(["difference", "points"], rows),
        "",
        "## Before and after the first DPO step, toy/test",
        "",
    ]
    before = [sampled(models["sft", seed]) for seed in seeds]
    after = [sampled(directories["dpo-st", seed] / "iteration-1" / "dpo") for seed in seeds]
    rows = []
    for k in (1, SAMPLES):
        old, new = (np.array([[pass_at_k(SAMPLES, c, k) for c in row] for row in rows_]) for rows_ in (before, after))
        rows.append([f"pass@{k}", interval(old), interval(new), difference(new - old)])
    lines += [markdown_table(["", "SFT (iteration 0)", "after DPO", "difference, points"], rows), ""]
    lines += ["## Every run", "", *every_run(directories), ""]
    return "\n".join(lines)


def best_iteration(directory: Path) -> int:
    """The iteration with the best accuracy on dev, the earliest in a tie."""
    iterations = json.loads((directory / "results.json").read_text(encoding="utf-8"))["iterations"]
    return max(iterations, key=lambda entry: (entry["accuracy"]["toy/dev"], -entry["iteration"]))["iteration"]


def outcomes_of(checkpoint: Path, split: str, calculator: bool) -> list[float]:
    """1.0 for each question of a test set that the greedy completion gets right."""
    settings = SamplingSettings(max_new_tokens=TINY_T5.max_new_tokens, slots=TINY_T5.slots)
    model, template, examples = load_model(checkpoint), load_template(checkpoint), toy.examples(split)
    texts = completions_by_question(model, template, examples, settings, 1, calculator, split)
    return [float(is_correct(text, example.answer)) for (text,), example in zip(texts, examples, strict=True)]


def sampled(checkpoint: Path) -> list[int]:
    """How many of ten samples are right, for each test question."""
    settings = SamplingSettings(max_new_tokens=TINY_T5.max_new_tokens, slots=TINY_T5.slots)
    settings = replace(settings, temperature=TINY_T5.temperature)
    model, template, examples = load_model(checkpoint), load_template(checkpoint), toy.examples("test")
    texts = completions_by_question(model, template, examples, settings, SAMPLES, True, "pass@k")
    return [sum(is_correct(text, e.answer) for text in row) for row, e in zip(texts, examples, strict=True)]


def bootstrap(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of (seeds × questions) and its 95 % interval, in percent, resampling questions."""
    by_question = 100 * values.mean(0)
    draws = np.random.default_rng(0).integers(len(by_question), size=(4000, len(by_question)))
    low, high = np.percentile(by_question[draws].mean(1), [2.5, 97.5])
    return float(by_question.mean()), float(low), float(high)


def interval(values: np.ndarray) -> str:
    return "{:.1f} % [{:.1f}, {:.1f}]".format(*bootstrap(values))


def difference(values: np.ndarray) -> str:
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*bootstrap(values))


def every_run(directories: dict) -> list[str]:
    """The runs' own tables."""
    lines = []
    for (method, seed), directory in directories.items():
        lines += [
            f"### {method}, seed {seed}",
            "",
            (directory / "report.md").read_text(encoding="utf-8").split("\n\n")[1],
            "",
        ]
    return lines


if __name__ == "__main__":
    main()
