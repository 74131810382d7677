"""Does the DPO step pay? ST against DPO-ST on the toy world with enough questions and seeds, and why it comes out so.

Three parts, each continued where it was stopped; what they find lies in benchmarks/results/effect/ as JSON:

    python -m benchmarks.effect explore --model tiny-t5 --seeds 11,12    which settings of the DPO step pay
    python -m benchmarks.effect measure --model tiny-t5 --seeds 1,2,3    all methods on the test questions
    python -m benchmarks.effect report                                   effect.md and its figures

Protocol, fixed before a test question was looked at. `explore` chooses settings by fresh questions alone: of the kind
of the labelled set, in none of the toy world's splits, and by seeds of their own. `measure` runs train.py for every
method and seed, all hyperparameters those of the model's preset but for the number of iterations, and grades greedy
answers to test questions that nothing had seen: 2,500 of the kind of toy/test, 500 of each kind out of domain. The main
figure is the difference DPO-ST − ST after iteration 1, where both start from the same warm-up (same seed), so that the
DPO step is all that differs; then after later iterations. Its interval is given twice: over the questions, for these
seeds; and over the seeds as well, which is wider, and is what another seed may expect.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from benchmarks.common import instruction_set, machine_line
from minidpost.data import datasets, toy
from minidpost.data.example import Example
from minidpost.models.hf_config import Model
from minidpost.models.hub import find_model
from minidpost.models.weights import load_model, load_template, save_model, tokenizer_files
from minidpost.sampling.generate import Sample
from minidpost.selftraining.evaluation import greedy_outcomes, pass_at_k, samples_by_question
from minidpost.selftraining.presets import Preset, preset_for
from minidpost.selftraining.selection import Candidates, jaccard, preference_pairs, without_near_duplicates
from minidpost.storage import markdown_table, read_json, read_jsonl, write_json
from minidpost.text.templates import Template
from minidpost.training.batching import TokenizedExample
from minidpost.training.dpo import PreferencePair, reference_log_probabilities, train_dpo
from minidpost.training.optim import read_log
from minidpost.training.sft import train_sft

ROOT = Path(__file__).resolve().parents[1]
FOUND = ROOT / "benchmarks" / "results" / "effect"  # what has been measured, as JSON
PAGE = ROOT / "benchmarks" / "results" / "effect.md"
RUNS = Path("runs") / "effect"

MODELS = {"tiny-t5": "t5", "tiny-llama": "llama"}
METHODS = ("st", "dpo-st", "rft", "rest-em")  # each with the warm-up, sft, as iteration 0
N_TEST = {"test": 2500, "longer": 500, "words": 500, "distractors": 500}  # fresh questions of each kind
N_FRESH_DEV = 1000
N_FRESH_UNLABELLED = 1600  # beside those of the toy world
N_SAMPLES = 10  # for pass@1 … pass@10

# Variants of the first DPO step: what differs from the preset; how many unlabelled questions are sampled for, the toy
# world's first and then fresh ones; and how a question's pairs are chosen.
VARIANTS: dict[str, dict[str, Any]] = {
    "preset": {},
    "400 unlabelled": {"n_unlabelled": 400},
    "800 unlabelled": {"n_unlabelled": 800},
    "800 unlabelled, 10 samples": {"n_unlabelled": 800, "dpo_samples": 10},
    "3,200 unlabelled": {"n_unlabelled": 3200},
    "3,200 unlabelled, 90 steps": {"n_unlabelled": 3200, "dpo_steps": 90},
    "10 samples": {"dpo_samples": 10},
    "15 steps": {"dpo_steps": 15},
    "90 steps": {"dpo_steps": 90},
    "β 0.1": {"beta": 0.1},
    "β 0.3": {"beta": 0.3},
    "learning rate 2e-5": {"dpo_learning_rate": 2e-5},
    "learning rate 2e-4": {"dpo_learning_rate": 2e-4},
    "most similar pairs": {"pairs": "most similar"},
    "random pairs": {"pairs": "random"},
}


def main() -> None:
    """Run one of the three parts."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=("explore", "measure", "report"))
    parser.add_argument("--model", choices=MODELS, default="tiny-t5")
    parser.add_argument("--seeds", default="1,2,3,4,5,6", help="of the runs (default: 1,2,3,4,5,6)")
    parser.add_argument("--methods", default="st,dpo-st", help=f"to measure, of {', '.join(METHODS)}")
    parser.add_argument("--iterations", type=int, default=1, help="of each measured run (default: 1)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in [int(seed) for seed in options.seeds.split(",")]:
        if options.part == "explore":
            explore(options.model, seed)
        elif options.part == "measure":
            for method in options.methods.split(","):
                measure(options.model, method, seed, options.iterations)
    if options.part == "report":
        report()


# -- questions --------------------------------------------------------------------------------------------------------


def all_fresh_questions() -> tuple[list[Example], list[Example], dict[str, list[Example]]]:
    """Fresh dev, fresh unlabelled and test questions; no two sets share one, nor has any split of the toy world it."""
    seen = {example.question for split in toy.SPLITS for example in toy.examples(split)}
    dev = toy.new_examples("dev", N_FRESH_DEV, Random("effect/dev"), seen)
    unlabelled = toy.new_examples("dev", N_FRESH_UNLABELLED, Random("effect/unlabelled"), seen)
    tests = {kind: toy.new_examples(kind, n, Random(f"effect/test/{kind}"), seen) for kind, n in N_TEST.items()}
    return dev, unlabelled, tests


def sampled(
    model: Model, template: Template, examples: Sequence[Example], preset: Preset, *, n_samples: int, seed: int
) -> list[list[Sample]]:
    """Graded samples, a list for each example."""
    settings = preset.sampling(seed)
    return samples_by_question(
        model, template, examples, settings, n_samples=n_samples, calculator=True, label="sampling"
    )


def greedy_bits(
    model: Model, template: Template, examples: Sequence[Example], preset: Preset, calculator: bool = True
) -> str:
    """A character for each example: 1 where the greedy completion is correct, else 0."""
    outcomes = greedy_outcomes(model, template, examples, preset.sampling(0), calculator=calculator)
    return "".join(map(str, outcomes))


# -- explore ----------------------------------------------------------------------------------------------------------


def explore(name: str, seed: int) -> None:
    """Measure every variant of the first DPO step for one seed, on fresh questions."""
    path = FOUND / f"explore-{MODELS[name]}-{seed}.json"
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    base = find_model(name)
    template = load_template(base)
    preset = preset_for(base, "dpo-st")
    dev, unlabelled, _ = all_fresh_questions()
    labelled = datasets.load("toy", "train")
    pool = [*labelled, *datasets.load("toy", "unlabelled"), *unlabelled]
    prompts = {example.question: tuple(template.prompt_ids(example.question)) for example in pool}
    gold = {
        example.question: TokenizedExample(
            prompts[example.question], tuple(template.target_ids(example.rationale or ""))
        )
        for example in labelled
    }

    # 1) The teacher, and its samples for the whole pool, of which each variant takes its part.
    scratch = RUNS / f"explore-{MODELS[name]}-{seed}"
    teacher_dir = scratch / "sft"
    if not (teacher_dir / "model.safetensors").is_file():
        teacher = load_model(base)
        train_sft(teacher, list(gold.values()), preset.sft(seed))
        save_model(teacher, teacher_dir, tokenizer_files(base))
    teacher = load_model(teacher_dir)
    if "teacher" not in found:
        found["teacher"] = measured(teacher, template, dev, preset)
        write_json(path, found)
    samples = sampled(teacher, template, pool, preset, n_samples=N_SAMPLES, seed=1000 + seed)

    # 2) DPO by each variant.
    for variant, differing in VARIANTS.items():
        if variant in found:
            continue
        print(f"{name}, seed {seed}: {variant}", flush=True)
        options = {"n_unlabelled": toy.SIZES["unlabelled"], "pairs": "least similar"} | differing
        n_questions = len(labelled) + options.pop("n_unlabelled")
        rule = options.pop("pairs")
        changed = replace(preset, **options, dpo_max_epochs=100)
        known = [Candidates(prompts[example.question], gold.get(example.question)) for example in pool[:n_questions]]
        for candidates, of_question in zip(known, samples, strict=False):  # of more questions than are known
            for sample in of_question[: changed.dpo_samples]:
                candidates.add(sample)
        pairs = chosen_pairs(known, changed, rule, seed)

        policy = load_model(teacher_dir)
        settings = changed.dpo(len(pairs), seed)
        started = time.perf_counter()
        reference_P2 = reference_log_probabilities(policy, pairs, micro_batch_tokens=settings.micro_batch_tokens)
        log = scratch / "log.jsonl"
        train_dpo(policy, pairs, reference_P2, settings, log_path=log)
        steps = [*read_log(log)]
        found[variant] = {
            "pairs": len(pairs),
            "seconds": round(time.perf_counter() - started),
            **{key: [ends(steps, key, slice(5)), ends(steps, key, slice(-5, None))] for key in LOG_KEYS},
            **measured(policy, template, dev, preset),
        }
        write_json(path, found)


LOG_KEYS = ("chosen_logp", "rejected_logp", "accuracy")


def ends(steps: Sequence[dict[str, Any]], key: str, part: slice) -> float:
    """The mean of a metric over the first or last steps of a log."""
    return round(float(np.mean([step[key] for step in steps[part]])), 3)


def chosen_pairs(known: Sequence[Candidates], preset: Preset, rule: str, seed: int) -> list[PreferencePair]:
    """The preference pairs of all questions: the least similar ones, as published, or by another rule."""
    random = Random(seed)
    pairs: list[PreferencePair] = []
    for candidates in known:
        of_question = preference_pairs(candidates, max_similarity=preset.max_similarity, pairs_per_question=10**6)
        if rule == "most similar":
            of_question.sort(key=lambda pair: -jaccard(pair.chosen, pair.rejected))
        elif rule == "random":
            random.shuffle(of_question)
        pairs += of_question[: preset.pairs_per_question]
    return pairs


def measured(model: Model, template: Template, dev: Sequence[Example], preset: Preset) -> dict[str, Any]:
    """What a model's samples for fresh questions are worth: how many are correct, how many different correct ones.

    `n_correct` counts the correct ones of ten samples for each question, `n_distinct` those of them without
    near-duplicates; `greedy` has a character for each question.
    """
    correct = [
        [TokenizedExample((), tuple(sample.token_ids)) for sample in of_question if sample.is_correct]
        for of_question in sampled(model, template, dev, preset, n_samples=N_SAMPLES, seed=777)
    ]
    n_distinct = [len(without_near_duplicates(of_question, preset.max_similarity)) for of_question in correct]
    return {
        "n_correct": [len(of_question) for of_question in correct],
        "n_distinct": n_distinct,
        "greedy": greedy_bits(model, template, dev, preset),
    }


# -- measure ----------------------------------------------------------------------------------------------------------


def measure(name: str, method: str, seed: int, iterations: int) -> None:
    """Run train.py for a method and a seed, then grade its models' greedy answers to the test questions."""
    directory = RUNS / f"{MODELS[name]}-{method}-{seed}"
    flags = ["--model", name, "--method", method, "--seed", str(seed), "--run-dir", str(directory)]
    if method != "rft":  # one iteration by definition
        flags += ["--iterations", str(iterations)]
    # Dev alone is evaluated in the runs, once and greedily: nothing stops or chooses by the test sets.
    flags += ["--test-questions", "0", "--pass-at", "1"]
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.with_suffix(".out"), "a", encoding="utf-8") as output:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(ROOT / "train.py"), *flags]
        subprocess.run(command, check=True, stdout=output, stderr=output, env=environment)

    path = FOUND / f"measure-{MODELS[name]}-{seed}.json"
    found: dict[str, Any] = read_json(path) if path.is_file() else {}
    base = find_model(name)
    preset = preset_for(base, method)
    dev, _, tests = all_fresh_questions()
    stages = {record["stage"]: record for _, record in read_jsonl(directory / "stages.jsonl")}
    for iteration in range(iterations + 1):
        for kind in ("sft", "dpo"):
            model_dir = directory / f"iteration-{iteration}" / kind
            key = "sft" if iteration == 0 else f"{method}/{iteration}" if kind == "sft" else f"{method}/{iteration}/dpo"
            if key in found or not model_dir.is_dir():
                continue
            print(f"{name}, seed {seed}: {key}", flush=True)
            model = load_model(model_dir)
            template = load_template(model_dir)
            entry: dict[str, Any] = {}
            if kind == "sft":
                for test, examples in tests.items():
                    entry[test] = greedy_bits(model, template, examples, preset)
                n = N_TEST["words"]
                entry["test, calculator off"] = greedy_bits(model, template, tests["test"][:n], preset, False)
            if iteration <= 1 and (kind == "dpo" or iteration == 0):  # before and after the first DPO step
                entry["fresh dev"] = measured(model, template, dev, preset)
            for stage, count in (("pairs.jsonl", "pairs"), ("pseudo-labels.jsonl", "pseudo_labels")):
                if (record := stages.get(f"iteration-{iteration}/{stage}")) is not None:
                    entry[count] = record[count]
            found[key] = entry
            write_json(path, found)


# -- statistics -------------------------------------------------------------------------------------------------------

# 97.5th percentile of Student's t by degrees of freedom, from 1
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


def interval(values_SN: np.ndarray) -> tuple[float, float, float]:
    """Mean of (seeds, questions) and the half-widths of its 95 % interval: over the questions, and over seeds as well.

    Over the questions: what other questions would change for these seeds. Over both, the variance of the seeds' means
    is added, and Student's t takes the place of 1.96.
    """
    n_seeds, n_questions = values_SN.shape
    by_question = values_SN.mean(0)
    question_variance = by_question.var(ddof=1) / n_questions
    over_questions = 1.96 * question_variance**0.5
    if n_seeds == 1:
        return float(by_question.mean()), float(over_questions), float("nan")
    seed_variance = values_SN.mean(1).var(ddof=1) / n_seeds
    over_both = STUDENT[n_seeds - 2] * (question_variance + seed_variance) ** 0.5
    return float(by_question.mean()), float(over_questions), float(over_both)


def percent(values_SN: np.ndarray) -> str:
    """A mean in percent with the half-width over questions."""
    mean, half, _ = interval(100 * values_SN)
    return f"{mean:.1f} ± {half:.1f}"


def points(values_SN: np.ndarray) -> list[str]:
    """A difference in points, its interval over the questions, its interval over seeds as well."""
    return with_intervals(100 * values_SN, 2)


def with_intervals(values_SN: np.ndarray, n_digits: int) -> list[str]:
    """A difference, its interval over the questions, its interval over seeds as well."""
    mean, questions, both = interval(values_SN)
    cells = [f"{mean:+.{n_digits}f}"]
    for half in (questions, both):
        cells.append("–" if np.isnan(half) else f"[{mean - half:+.{n_digits}f}, {mean + half:+.{n_digits}f}]")
    return cells


def bits(outcomes: str) -> np.ndarray:
    """0 and 1 for each question."""
    return np.frombuffer(outcomes.encode(), np.uint8) - ord("0") + 0.0


def pass_at(n_correct: Sequence[int], k: int) -> np.ndarray:
    """pass@k of each question from its number of correct samples."""
    return np.array([pass_at_k(N_SAMPLES, n, k) for n in n_correct])


# -- report -----------------------------------------------------------------------------------------------------------


def report() -> None:
    """Write effect.md and its figures from what has been found."""
    findings = FOUND / "findings.md"
    lines = [
        "# Does the DPO step pay?",
        "",
        f"`python -m benchmarks.effect` (explore, measure, report) · {machine_line()}, {instruction_set()}",
        "",
        *([findings.read_text(encoding="utf-8").strip(), ""] if findings.is_file() else []),
        "## Protocol",
        "",
        "Fixed" + (__doc__ or "").partition("Protocol, fixed")[2].rstrip(),
        "",
    ]
    for name, family in MODELS.items():
        seeds = sorted(int(path.stem.rpartition("-")[2]) for path in FOUND.glob(f"measure-{family}-*.json"))
        if seeds:
            lines += measured_section(
                name, [read_json(FOUND / f"measure-{family}-{seed}.json") for seed in seeds], seeds
            )
        seeds = sorted(int(path.stem.rpartition("-")[2]) for path in FOUND.glob(f"explore-{family}-*.json"))
        if seeds:
            lines += explored_section(
                name, [read_json(FOUND / f"explore-{family}-{seed}.json") for seed in seeds], seeds
            )
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(PAGE.read_text(encoding="utf-8"))


def measured_section(name: str, found: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[str]:
    """The test questions of one model: accuracy of every method, the differences, the first DPO step."""
    lines = [f"## {name}: the test questions", ""]

    # 1) Accuracy of each method by iteration, over the seeds that have it.
    keys = [key for key in found[0] if not key.endswith("/dpo")]
    heads = ["method/iteration", "seeds", *(f"{test} (n {n:,})" for test, n in N_TEST.items()), "test, calculator off"]
    heads += ["pairs", "pseudo-labels"]
    rows = []
    for key in keys:
        of_seeds = [of_seed[key] for of_seed in found if key in of_seed]
        cells = [
            percent(np.stack([bits(entry[test]) for entry in of_seeds])) for test in (*N_TEST, "test, calculator off")
        ]
        counts = []
        for count in ("pairs", "pseudo_labels"):
            numbers = [entry[count] for entry in of_seeds if count in entry]
            counts.append(f"{np.mean(numbers):,.0f}" if numbers else "–")
        rows.append([key, str(len(of_seeds)), *cells, *counts])
    lines += [
        f"Greedy accuracy in percent with the half-width of its 95 % interval over the questions; seeds {seeds}.",
        "",
    ]
    lines += [markdown_table(heads, rows), ""]

    # 2) Differences, paired by seed and question.
    rows = []
    for a, b in differences(keys):
        both = [of_seed for of_seed in found if a in of_seed and b in of_seed]
        for test in N_TEST:
            values = np.stack([bits(of_seed[a][test]) - bits(of_seed[b][test]) for of_seed in both])
            by_seed = ", ".join(f"{100 * mean:+.1f}" for mean in values.mean(1))
            rows.append([f"{a} − {b}", test, str(len(both)), *points(values), by_seed])
    heads = ["difference", "questions", "seeds", "points", "95 % over questions", "95 % over seeds too", "each seed"]
    lines += [markdown_table(heads, rows), ""]

    # 3) Before and after the first DPO step, on fresh dev questions.
    with_dpo = [of_seed for of_seed in found if "dpo-st/1/dpo" in of_seed]
    if with_dpo:
        before = [of_seed["sft"]["fresh dev"] for of_seed in with_dpo]
        after = [of_seed["dpo-st/1/dpo"]["fresh dev"] for of_seed in with_dpo]
        lines += [
            f"### {name}: what the first DPO step does, {N_FRESH_DEV:,} fresh questions, {len(with_dpo)} seeds",
            "",
        ]
        lines += [
            markdown_table(
                ["", "before", "after", "points", "95 % over questions", "95 % over seeds too"],
                before_and_after(before, after),
            ),
            "",
        ]
        figure = f"pass-at-k{name.removeprefix('tiny')}.png"
        plot_pass_at_k(before, after, name, FOUND / figure)
        lines += [f"![pass@k before and after the first DPO step, {name}](effect/{figure})", ""]
    return lines


def differences(keys: Sequence[str]) -> list[tuple[str, str]]:
    """Which of the measured models are compared: each method with ST at every iteration, and with the warm-up."""
    compared = []
    for key in keys:
        method, _, iteration = key.partition("/")
        if method not in ("sft", "st") and f"st/{iteration}" in keys:
            compared.append((key, f"st/{iteration}"))
    return compared + [(key, "sft") for key in keys if key != "sft"]


def before_and_after(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Rows of a table: greedy accuracy, pass@k and distinct correct rationales, of one entry for each seed."""
    rows = []
    greedy = [np.stack([bits(entry["greedy"]) for entry in entries]) for entries in (before, after)]
    rows.append(["greedy", *(percent(values) for values in greedy), *points(greedy[1] - greedy[0])])
    for k in range(1, N_SAMPLES + 1):
        passed = [np.stack([pass_at(entry["n_correct"], k) for entry in entries]) for entries in (before, after)]
        rows.append([f"pass@{k}", *(percent(values) for values in passed), *points(passed[1] - passed[0])])
    distinct = [np.stack([np.array(entry["n_distinct"]) for entry in entries]) for entries in (before, after)]
    means = [f"{values.mean():.3f}" for values in distinct]
    change = with_intervals(distinct[1] - distinct[0], 3)
    rows.append([f"distinct correct rationales of {N_SAMPLES} samples", *means, *change])
    return rows


def explored_section(name: str, found: Sequence[dict[str, Any]], seeds: Sequence[int]) -> list[str]:
    """The variants of the DPO step of one model, each against the teacher that it began with."""
    rows = []
    for variant in VARIANTS:
        both = [of_seed for of_seed in found if variant in of_seed]
        if not both:
            continue
        cells = []
        for values in (
            [bits(entry[variant]["greedy"]) - bits(entry["teacher"]["greedy"]) for entry in both],
            *(
                [pass_at(entry[variant]["n_correct"], k) - pass_at(entry["teacher"]["n_correct"], k) for entry in both]
                for k in (1, N_SAMPLES)
            ),
        ):
            mean, half, _ = interval(100 * np.stack(values))
            cells.append(f"{mean:+.1f} ± {half:.1f}")
        n_distinct = [[np.mean(entry[key]["n_distinct"]) for entry in both] for key in ("teacher", variant)]
        logs = []
        for key in ("chosen_logp", "rejected_logp"):
            first, last = np.mean([entry[variant][key] for entry in both], axis=0)
            logs.append(f"{first:.1f} → {last:.1f}")
        rows.append(
            [
                variant,
                str(len(both)),
                f"{np.mean([entry[variant]['pairs'] for entry in both]):,.0f}",
                *cells,
                f"{np.mean(n_distinct[1]) - np.mean(n_distinct[0]):+.3f}",
                *logs,
                f"{np.mean([entry[variant]['accuracy'][1] for entry in both]):.0%}",
            ]
        )
    heads = ["variant", "seeds", "pairs", "greedy", "pass@1", f"pass@{N_SAMPLES}", "distinct correct"]
    heads += ["log π chosen", "log π rejected", "pairs with a positive margin"]
    teacher = [of_seed["teacher"] for of_seed in found]
    greedy = percent(np.stack([bits(entry["greedy"]) for entry in teacher]))
    return [
        f"## {name}: which settings of the DPO step pay",
        "",
        f"Each variant's change against the teacher before it (greedy accuracy {greedy} %), in points with the "
        f"half-width of the 95 % interval over {N_FRESH_DEV:,} fresh questions, seeds {seeds}; log π in nats and "
        "margins are means of the first and last five steps.",
        "",
        markdown_table(heads, rows),
        "",
    ]


def plot_pass_at_k(before: Sequence[dict[str, Any]], after: Sequence[dict[str, Any]], name: str, path: Path) -> None:
    """Write a PNG of pass@k by k before and after DPO, greedy accuracy as dashed lines, as in the paper's figure 6."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    ks = range(1, N_SAMPLES + 1)
    for entries, label, colour in ((before, "before DPO", "tab:gray"), (after, "after DPO", "tab:blue")):
        values = [interval(100 * np.stack([pass_at(entry["n_correct"], k) for entry in entries])) for k in ks]
        means, halves, _ = zip(*values, strict=True)
        axes.errorbar(ks, means, yerr=halves, fmt="o-", color=colour, capsize=2, markersize=4, label=f"pass@k, {label}")
        greedy = 100 * np.mean([bits(entry["greedy"]).mean() for entry in entries])
        axes.axhline(greedy, color=colour, linestyle="--", linewidth=1, label=f"greedy, {label}")
    axes.set_xticks(ks)
    axes.set_xlabel("k")
    axes.set_ylabel(f"% of {N_FRESH_DEV:,} fresh questions, 95 % intervals")
    axes.set_title(f"{name}: the first DPO step, {len(before)} seeds")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    main()
