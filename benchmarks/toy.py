"""The method on the toy world: SFT, ST and DPO-ST over several seeds, with intervals.

Each run is `python train.py --method M --seed S`. A method's model is that of the iteration with the best accuracy on
dev; every number in the tables is from the test sets, by which nothing was chosen. Intervals (95 %) are bootstraps over
test questions, each question's outcome averaged over the seeds, so that a difference is a paired one.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minidpost.data import toy  # noqa: E402
from minidpost.models.weights import load_model, load_template  # noqa: E402
from minidpost.sampling.generate import generate  # noqa: E402
from minidpost.sampling.sampler import SamplingSettings  # noqa: E402
from minidpost.selftraining.evaluation import pass_at_k  # noqa: E402
from minidpost.selftraining.presets import TINY_T5  # noqa: E402
from minidpost.selftraining.report import results_table  # noqa: E402
from minidpost.storage import markdown_table  # noqa: E402

METHODS = ("st", "dpo-st")
SAMPLES = 10  # for pass@k

RunName = tuple[str, int]  # method, seed


def main() -> None:
    """Train all runs, two at a time, then evaluate their models and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=("tiny-t5", "tiny-llama"), default="tiny-t5")
    parser.add_argument("--seeds", default="1,2,3", help="of the runs of each method (default: 1,2,3)")
    parser.add_argument("--iterations", type=int, default=3, help="of each run, at most")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, each on one thread")
    parser.add_argument("--runs", type=Path, help="where the runs lie, continued (default: runs/toy-benchmark…)")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/toy.md, or toy-llama.md")
    options = parser.parse_args()
    suffix = options.model.removeprefix("tiny").removesuffix("-t5")
    runs = options.runs or Path(f"runs/toy-benchmark{suffix}")
    output = options.output or ROOT / "benchmarks" / "results" / f"toy{suffix}.md"
    seeds = [int(seed) for seed in options.seeds.split(",")]
    directories = {(method, seed): runs / f"{method}-{seed}" for method in METHODS for seed in seeds}

    def train_run(name: RunName) -> None:
        method, seed = name
        flags = ["--model", options.model, "--method", method, "--seed", str(seed)]
        train([*flags, "--iterations", str(options.iterations)], directories[name])

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(train_run, directories))
    torch.set_num_threads(1)
    command = f"--model {options.model} --seeds {options.seeds} --iterations {options.iterations}"
    output.write_text(report(directories, seeds, options.model, command), encoding="utf-8")
    print(output.read_text(encoding="utf-8"))


def train(flags: list[str], directory: Path) -> None:
    """One run of train.py, on one thread; what it prints goes to a file beside the run."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "train.py"), "--run-dir", str(directory), *flags]
    with open(directory.with_suffix(".out"), "a", encoding="utf-8") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run(command, check=True, stdout=output, stderr=output, env=environment)


def report(directories: dict[RunName, Path], seeds: list[int], model: str, command: str) -> str:
    """The Markdown page."""
    iterations = {name: best_iteration(directory) for name, directory in directories.items()}
    models = {("sft", seed): directories["st", seed] / "iteration-0" / "sft" for seed in seeds}
    for name, directory in directories.items():
        models[name] = directory / f"iteration-{iterations[name]}" / "sft"

    correct = {}  # (method, split, calculator) -> 1.0 or 0.0, seeds × questions
    for method in ("sft", *METHODS):
        for split in toy.TEST_SPLITS:
            for calculator in (True, False) if split == "test" else (True,):
                outcomes = [greedy_outcomes(models[method, seed], split, calculator) for seed in seeds]
                correct[method, split, calculator] = np.stack(outcomes)

    machine = f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}"
    world = f"{toy.SIZES['train']} labelled and {toy.SIZES['unlabelled']} unlabelled questions"
    lines = [
        "# The toy world: does self-training help, and does DPO help it?",
        "",
        f"`python benchmarks/toy.py {command}` · {machine}, torch {torch.__version__} · {model}, {world}, seeds "
        f"{', '.join(map(str, seeds))}.",
        "",
        *(__doc__ or "").split("\n\n", 1)[1].strip().split("\n"),
        "",
    ]

    heads = ["method", *(f"toy/{split}" for split in toy.TEST_SPLITS)]
    heads += ["toy/test, calculator off", "iteration chosen on dev"]
    rows = []
    for method in ("sft", *METHODS):
        cells = [interval(correct[method, split, True]) for split in toy.TEST_SPLITS]
        chosen = "0" if method == "sft" else ", ".join(str(iterations[method, seed]) for seed in seeds)
        rows.append([method, *cells, interval(correct[method, "test", False]), chosen])
    lines += ["## Greedy accuracy, mean over seeds", "", markdown_table(heads, rows), ""]

    rows = []
    for a, b in (("st", "sft"), ("dpo-st", "sft"), ("dpo-st", "st")):
        rows.append([f"{a} − {b}", difference(correct[a, "test", True] - correct[b, "test", True])])
    for method in ("sft", *METHODS):
        gain = correct[method, "test", True] - correct[method, "test", False]
        rows.append([f"{method}: calculator on − off", difference(gain)])
    lines += ["## Differences on toy/test, in points", "", markdown_table(["difference", "points"], rows), ""]

    n_before = np.stack([n_correct_samples(models["sft", seed]) for seed in seeds])
    n_after = np.stack([n_correct_samples(directories["dpo-st", seed] / "iteration-1" / "dpo") for seed in seeds])
    rows = []
    for k in (1, SAMPLES):
        before = pass_at(n_before, k)
        after = pass_at(n_after, k)
        rows.append([f"pass@{k}", interval(before), interval(after), difference(after - before)])
    heads = ["", "SFT (iteration 0)", "after DPO", "difference, points"]
    lines += ["## Before and after the first DPO step, toy/test", "", markdown_table(heads, rows), ""]
    lines += ["## Every run", "", *every_run(directories), ""]
    return "\n".join(lines)


def best_iteration(directory: Path) -> int:
    """The iteration with the best accuracy on dev, the earliest in a tie."""
    return int(run_results(directory)["best_iteration"])


def run_results(directory: Path) -> dict[str, Any]:
    """A run's results.json."""
    results: dict[str, Any] = json.loads((directory / "results.json").read_text(encoding="utf-8"))
    return results


def greedy_outcomes(directory: Path, split: str, calculator: bool) -> np.ndarray:
    """1.0 for each question of a test set whose greedy completion is correct, 0.0 for the others."""
    return graded(directory, split, temperature=0.0, n_samples=1, calculator=calculator)[:, 0]


def n_correct_samples(directory: Path) -> np.ndarray:
    """How many of ten samples are correct, for each question of toy/test."""
    return graded(directory, "test", temperature=TINY_T5.temperature, n_samples=SAMPLES, calculator=True).sum(1)


def graded(directory: Path, split: str, *, temperature: float, n_samples: int, calculator: bool) -> np.ndarray:
    """Whether each sample of each question is correct, as 1.0 or 0.0, (questions, samples)."""
    examples = toy.examples(split)
    settings = SamplingSettings(temperature=temperature, max_new_tokens=TINY_T5.max_new_tokens, slots=TINY_T5.slots)
    samples = generate(
        load_model(directory),
        load_template(directory),
        [example.question for example in examples],
        settings,
        answers=[example.answer for example in examples],
        n_samples=n_samples,
        calculator=calculator,
        label=split,
    )
    outcomes = np.zeros((len(examples), n_samples))
    for sample in samples:
        outcomes[sample.example_index, sample.sample_index] = bool(sample.is_correct)
    return outcomes


def pass_at(n_correct: np.ndarray, k: int) -> np.ndarray:
    """pass@k of each question from its number of correct samples, (seeds, questions)."""
    return np.array([[pass_at_k(SAMPLES, int(n), k) for n in of_seed] for of_seed in n_correct])


def bootstrap(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of (seeds × questions) and its 95 % interval, in percent, resampling questions."""
    by_question = 100 * values.mean(0)
    resampled = np.random.default_rng(0).integers(len(by_question), size=(4000, len(by_question)))
    low, high = np.percentile(by_question[resampled].mean(1), [2.5, 97.5])
    return float(by_question.mean()), float(low), float(high)


def interval(values: np.ndarray) -> str:
    """Mean and interval, in percent."""
    return "{:.1f} % [{:.1f}, {:.1f}]".format(*bootstrap(values))


def difference(values: np.ndarray) -> str:
    """Mean and interval with their signs, in points."""
    return "{:+.1f} [{:+.1f}, {:+.1f}]".format(*bootstrap(values))


def every_run(directories: dict[RunName, Path]) -> list[str]:
    """The runs' own tables."""
    lines = []
    for (method, seed), directory in directories.items():
        lines += [f"### {method}, seed {seed}", "", results_table(run_results(directory)), ""]
    return lines


if __name__ == "__main__":
    main()
