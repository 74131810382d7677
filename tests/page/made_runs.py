"""Run directories written by hand for the tests of the page: small, large, broken, hostile."""

import json
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minidpost.selftraining.evaluation import mean_score, pass_at_k
from minidpost.selftraining.presets import Preset
from minidpost.selftraining.run_directory import FORMAT
from minidpost.storage import write_json, write_jsonl

SETS = {"mine/dev": 20, "mine/test": 30}


def outcomes(n: int, n_correct: int) -> list[int]:
    return [1] * n_correct + [0] * (n - n_correct)


def greedy(rates: dict[str, float], sets: dict[str, int]) -> dict[str, Any]:
    found = {}
    for name, rate in rates.items():
        correct = outcomes(sets[name], round(rate * sets[name]))
        found[name] = {**asdict(mean_score(correct)), "correct": correct}
    return found


def sampled(n: int, k: int, n_right: int) -> dict[str, Any]:
    n_correct = [min(k, n_right + index % 3) for index in range(n)]
    majority = [int(2 * count >= k) for count in n_correct]
    return {
        "n_samples": k,
        "n_correct": n_correct,
        "majority": {str(k): majority},
        "pass_at": {
            str(j): asdict(mean_score([pass_at_k(k, count, j) for count in n_correct])) for j in range(1, k + 1)
        },
        "maj_at": {str(k): asdict(mean_score(majority))},
    }


def question_text(index: int) -> str:
    return f"Question {index}: Mia has {index} pens and buys {index % 7 + 1} more. How many pens does Mia have now?"


def completion(index: int, kind: str) -> tuple[str, list[bool]]:
    """A rationale and which of its tokens are forced; the tokens are made up."""
    a, b = index, index % 7 + 1
    right = f"Mia then has <<{a}+{b}={a + b}>>{a + b} pens.\n#### {a + b}"
    if kind == "right":
        return right, [False, False, True, True, False]
    if kind == "wrong":
        return f"Mia then has <<{a}-{b}={a - b}>>{a - b} pens.\n#### {a - b}", [False, False, True, True, False]
    if kind == "miscalculated":
        return f"Mia then has <<{a}+{b}={a + b + 1}>>{a + b + 1} pens.\n#### {a + b + 1}", [False] * 5
    return "Mia then has some pens.", [False] * 5  # no answer


def sample_record(example: int, sample: int, kind: str, **changes: Any) -> dict[str, Any]:
    text, forced = completion(example, kind)
    return {
        "example_index": example,
        "sample_index": sample,
        "question": question_text(example),
        "answer": str(example + example % 7 + 1),
        "completion": text,
        "is_correct": kind == "right",
        "token_ids": list(range(3, 3 + len(forced))),
        "forced": forced,
        "finish_reason": "stop",
        **changes,
    }


def make_run(
    path: Path,
    *,
    method: str = "dpo-st",
    seed: int = 1,
    data: str = "mine.jsonl",
    model: str = "tiny-t5",
    n_questions: int = 12,
    n_dpo: int = 4,
    n_sft: int = 2,
    n_iterations: int = 2,
    sets: dict[str, int] | None = None,
    rates: tuple[float, ...] = (0.2, 0.4, 0.5, 0.6),
    no_calculator: bool = False,
    **preset: Any,
) -> Path:
    """A finished run with everything the page reads."""
    sets = SETS if sets is None else sets
    dev = next(iter(sets))
    draw = random.Random(f"{seed}/{method}")
    settings = {
        "model": model,
        "method": method,
        "data": data,
        "seed": seed,
        "no_calculator": no_calculator,
        "examples": "0123456789abcdef",
        "preset": asdict(Preset(iterations=n_iterations, samples=n_sft, dpo_samples=n_dpo, pass_at=4, **preset)),
    }
    path.mkdir(parents=True)
    write_json(path / "config.json", {"format": FORMAT, "settings": settings, "versions": {"torch": "2"}})
    (path / "log.txt").write_text("10:00:00 iteration-0/sft\n")
    stages = []

    def stage(name: str, **metadata: Any) -> None:
        stages.append({"stage": name, "seconds": 1.5, "sha256": {}, **metadata})

    def log(folder: Path, kind: str) -> None:
        steps = []
        for step in range(6):
            values = {"step": step, "loss": round(2 / (step + 1), 4), "lr": 1e-3, "grad_norm": 1.5}
            if kind == "dpo":
                values |= {
                    "chosen_logp": -10 - step,
                    "rejected_logp": -20 - step,
                    "margin": 0.1 * step,
                    "accuracy": 0.5,
                }
            steps.append({**values, "n_tokens": 100, "tokens_per_second": 1000.0 + step})
        write_jsonl(folder / "log.jsonl", steps)

    for iteration in range(n_iterations + 1):
        folder = path / f"iteration-{iteration}"
        evaluation = {"sft": {"greedy": greedy(dict.fromkeys(sets, rates[iteration]), sets)}}
        evaluation["sft"]["sampled"] = sampled(sets[dev], 4, iteration)
        log(folder / "sft", "sft")
        if iteration:
            kinds = ["right", "wrong", "miscalculated", "none"]
            weights = [0.2 + 0.2 * iteration, 0.3, 0.1, 0.1]
            chosen = {}
            for kind, n in (("dpo", n_dpo), ("sft", n_sft)):
                if kind == "dpo" and method != "dpo-st":
                    continue
                chosen[kind] = [draw.choices(kinds, weights, k=n) for _ in range(n_questions)]
                write_jsonl(
                    folder / f"samples-{kind}.jsonl",
                    (
                        sample_record(example, index, of)
                        for example, row in enumerate(chosen[kind])
                        for index, of in enumerate(row)
                    ),
                )
                stage(f"iteration-{iteration}/samples-{kind}.jsonl", n_samples=n * n_questions, flops=1e9)
            if method == "dpo-st":
                pairs = [
                    {
                        "question": question_text(example),
                        "answer": "0",
                        "chosen": completion(example, "right")[0],
                        "rejected": completion(example, "wrong")[0],
                        "chosen_ids": [3, 4],
                        "rejected_ids": [3, 5],
                        "similarity": 0.3333,
                    }
                    for example, row in enumerate(chosen["dpo"])
                    if "wrong" in row and "right" in row
                ]
                write_jsonl(folder / "pairs.jsonl", pairs)
                stage(f"iteration-{iteration}/pairs.jsonl", pairs=len(pairs))
                log(folder / "dpo", "dpo")
                evaluation["dpo"] = {
                    "greedy": greedy({dev: rates[iteration]}, sets),
                    "sampled": sampled(sets[dev], 4, iteration),
                }
            labels = []
            for example, row in enumerate(chosen["sft"]):
                record = {"question": question_text(example), "answer": "0", "token_ids": [3, 4]}
                if example % 2 == 0:
                    text = f"Mia now has <<{example}+{example % 7 + 1}={example + example % 7 + 1}>> pens."
                    labels.append({**record, "rationale": text, "source": "gold"})
                if "right" in row:
                    labels.append({**record, "rationale": completion(example, "right")[0], "source": "sample"})
            write_jsonl(folder / "pseudo-labels.jsonl", labels)
            n_labels = sum(label["source"] == "sample" for label in labels)
            stage(f"iteration-{iteration}/pseudo-labels.jsonl", pseudo_labels=n_labels, examples=len(labels))
        stage(f"iteration-{iteration}/sft", flops=2e9)
        write_json(folder / "evaluation.json", evaluation)
        stage(f"iteration-{iteration}/evaluation.json")
    write_jsonl(path / "stages.jsonl", stages)
    return path


def edit_config(path: Path, **changes: Any) -> None:
    """Change fields of a run's config.json."""
    content = json.loads((path / "config.json").read_text())
    write_json(path / "config.json", {**content, **changes})
