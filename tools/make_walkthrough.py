"""Write docs/walkthrough.md: one question of a run followed through an iteration, every number computed from its files.

    python train.py --seed 1 --iterations 1 --run-dir runs/walkthrough
    python tools/make_walkthrough.py runs/walkthrough    # from the run, writes docs/walkthrough.json too
    python tools/make_walkthrough.py                     # the page again, from docs/walkthrough.json

The page needs a question with one preference pair and one pseudo-label: --example, else the present one, else the
first one of the pool that has them. docs/walkthrough.json holds the run's own rows of that question;
docs/walkthrough.in.md the words, with {{names}} where a value goes. `values` computes each value
with the product's own functions.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from minidpost.cli import Parser, run_command  # noqa: E402
from minidpost.data.datasets import load  # noqa: E402
from minidpost.errors import UserError  # noqa: E402
from minidpost.models.hub import find_model  # noqa: E402
from minidpost.models.weights import load_model, load_template  # noqa: E402
from minidpost.sampling.generate import generate  # noqa: E402
from minidpost.sampling.sampler import SamplingSettings  # noqa: E402
from minidpost.selftraining.flags import flag_name, written  # noqa: E402
from minidpost.selftraining.presets import TINY_T5, preset_for  # noqa: E402
from minidpost.selftraining.selection import jaccard  # noqa: E402
from minidpost.storage import read_json, read_jsonl, write_json  # noqa: E402
from minidpost.text.calculator import evaluate_expression  # noqa: E402
from minidpost.text.grading import extract_answer, is_correct  # noqa: E402
from minidpost.text.templates import Template  # noqa: E402
from minidpost.text.tokenizer import load_tokenizer  # noqa: E402
from minidpost.training.batching import TokenizedExample  # noqa: E402
from minidpost.training.dpo import PreferencePair, reference_log_probabilities  # noqa: E402
from minidpost.training.losses import dpo_loss  # noqa: E402

ANNOTATION = re.compile(r"<<([^=<>]*)=([^<>]*)>>")
RECORD = ROOT / "docs" / "walkthrough.json"
WORDS = ROOT / "docs" / "walkthrough.in.md"
PAGE = ROOT / "docs" / "walkthrough.md"
REFERENCE_SAMPLER = ROOT / "tests" / "sampling" / "reference_sampler.py"
TEACHER = "tiny-t5-sft"  # the run's iteration-0/sft
EXAMPLE = 1010  # the question of the present page
SETTINGS = {"model": "tiny-t5", "method": "dpo-st", "data": "toy", "unlabelled": None, "limit": None}  # the page's


def main() -> None:
    """Parse the command line, render the page, and only then write it and its record."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, help="a finished run of tiny-t5 with an iteration of DPO-ST")
    parser.add_argument(
        "--example", type=int, help=f"the question's place in the pool (default: {EXAMPLE}, or the first that will do)"
    )
    options = parser.parse_args()
    record = read_run(options.run, options.example) if options.run else read_json(RECORD)
    page = render(record)
    if options.run:
        write_json(RECORD, record)
    PAGE.write_text(page, encoding="utf-8")
    print(f"{PAGE.name} is written")


# -- from the run ------------------------------------------------------------------------------------------------------


def read_run(run: Path, example_index: int | None) -> dict:
    """Everything the page needs of a run, for one question of its pool; UserError where none will do."""
    iteration = run / "iteration-1"
    if not (iteration / "evaluation.json").is_file():
        raise UserError(f"{run}: no run with a finished iteration 1 is here")
    settings = read_json(run / "config.json")["settings"]
    preset = settings["preset"]
    example_index = chosen_example(run, example_index)
    samples_dpo = [r for _, r in read_jsonl(iteration / "samples-dpo.jsonl") if r["example_index"] == example_index]
    question = samples_dpo[0]["question"]
    samples_sft = [r for _, r in read_jsonl(iteration / "samples-sft.jsonl") if r["example_index"] == example_index]
    all_pairs = [record for _, record in read_jsonl(iteration / "pairs.jsonl")]
    all_labels = [record for _, record in read_jsonl(iteration / "pseudo-labels.jsonl")]
    pairs = [record for record in all_pairs if record["question"] == question]
    before = read_json(run / "iteration-0" / "evaluation.json")["sft"]["greedy"]["toy/dev"]
    after = read_json(iteration / "evaluation.json")["sft"]["greedy"]["toy/dev"]
    pair = preference_pair(load_template(run / "iteration-0" / "sft"), pairs[0])
    return {
        "command": command(run, settings),
        "temperature": preset["temperature"],
        "beta": preset["beta"],
        "dpo_steps": sum(1 for _ in read_jsonl(iteration / "dpo" / "log.jsonl")),
        "example_index": example_index,
        "question": question,
        "answer": samples_dpo[0]["answer"],
        "samples_dpo": samples_dpo,
        "pairs": pairs,
        "samples_sft": samples_sft,
        "pseudo_labels": [record for record in all_labels if record["question"] == question],
        "reference": log_probabilities(run / "iteration-0" / "sft", pair),
        "policy": log_probabilities(iteration / "dpo", pair),
        "n_pairs": len(all_pairs),
        "n_gold": sum(record["source"] == "gold" for record in all_labels),
        "n_labels": sum(record["source"] == "sample" for record in all_labels),
        "dev_before": before,
        "dev_after": after,
        "greedy_before": greedy_completion(run / "iteration-0" / "sft", question),
        "greedy_after": greedy_completion(iteration / "sft", question),
    }


def command(run: Path, settings: dict) -> str:
    """The command that made a run: its seed, and every hyperparameter that is not the preset's."""
    for name, expected in SETTINGS.items():
        if settings[name] != expected:
            raise UserError(f"{run}: made with {name} = {settings[name]}, and the page is of {expected}")
    words = ["python train.py", f"--seed {settings['seed']}"]
    default = vars(preset_for(find_model("tiny-t5"), "dpo-st"))
    words += [
        f"{flag_name(name)} {written(value)}" for name, value in settings["preset"].items() if value != default[name]
    ]
    return " ".join(words)


def chosen_example(run: Path, example_index: int | None) -> int:
    """The question that is asked for, else the present page's, else the first one that the page can follow."""
    iteration = run / "iteration-1"
    samples: dict[int, list[dict]] = {}
    for _, record in read_jsonl(iteration / "samples-dpo.jsonl"):
        samples.setdefault(record["example_index"], []).append(record)
    n_pairs, n_labels = (
        Counter(record["question"] for _, record in read_jsonl(iteration / name))
        for name in ("pairs.jsonl", "pseudo-labels.jsonl")
    )
    labelled = {example.question for example in load("toy", "train")}

    def will_do(index: int) -> bool:
        question = samples[index][0]["question"]
        has_one_each = n_pairs[question] == 1 and n_labels[question] == 1
        return question not in labelled and has_one_each and is_shown_whole(samples[index])

    candidates = [index for index in sorted(samples) if will_do(index)]
    if example_index is not None and example_index not in candidates:
        raise UserError(f"--example {example_index}: no unlabelled question with one pair and one pseudo-label")
    if not candidates:
        raise UserError(f"{run}: no unlabelled question has one pair and one pseudo-label")
    if example_index is None:
        example_index = EXAMPLE if EXAMPLE in candidates else candidates[0]
    return example_index


def is_shown_whole(samples: list[dict]) -> bool:
    """Whether the first correct sample begins with an annotation that two forced tokens ended: result and bracket."""
    correct = next(sample for sample in samples if sample["is_correct"])
    annotation = ANNOTATION.search(correct["completion"])
    if annotation is None or True not in correct["forced"]:
        return False
    first = correct["forced"].index(True)
    has_two = correct["forced"][first : first + 3] == [True, True, False]
    return has_two and evaluate_expression(annotation[1]) == annotation[2]


def preference_pair(template: Template, record: dict) -> PreferencePair:
    """A line of pairs.jsonl as the training loop reads it."""
    prompt_ids = tuple(template.prompt_ids(record["question"]))
    return PreferencePair(
        TokenizedExample(prompt_ids, tuple(record["chosen_ids"])),
        TokenizedExample(prompt_ids, tuple(record["rejected_ids"])),
    )


def log_probabilities(directory: Path, pair: PreferencePair) -> dict[str, float]:
    """log π of a pair's two rationales under a model, in nats, to four digits after the point."""
    chosen, rejected = reference_log_probabilities(load_model(directory), [pair], micro_batch_tokens=4096)[0].tolist()
    return {"chosen": round(chosen, 4), "rejected": round(rejected, 4)}


def greedy_completion(directory: Path, question: str) -> str:
    """What a model answers greedily, calculator on."""
    settings = SamplingSettings(max_new_tokens=160)
    (sample,) = generate(load_model(directory), load_template(directory), [question], settings)
    return sample.completion


# -- the page ----------------------------------------------------------------------------------------------------------


def render(record: dict) -> str:
    """The page: the words with every {{name}} replaced by its value."""
    found = values(record)
    return re.sub(r"\{\{(\w+)\}\}", lambda match: found[match[1]], WORDS.read_text(encoding="utf-8"))


def values(record: dict) -> dict[str, str]:
    """Every value that the words ask for, as text."""
    directory = find_model(TEACHER)
    template, tokenizer = load_template(directory), load_tokenizer(directory)
    samples = record["samples_dpo"]
    correct = next(sample for sample in samples if sample["is_correct"])
    (pair,) = record["pairs"]
    chosen = TokenizedExample((), tuple(pair["chosen_ids"]))
    rejected = TokenizedExample((), tuple(pair["rejected_ids"]))
    rejected_sample = next(sample for sample in samples if sample["token_ids"] == pair["rejected_ids"])
    expression, result = ANNOTATION.search(correct["completion"]).groups()
    assert evaluate_expression(expression) == result
    forced_ids = [i for i, is_forced in zip(correct["token_ids"], correct["forced"], strict=True) if is_forced]
    reference, policy = record["reference"], record["policy"]
    difference = {side: policy[side] - reference[side] for side in ("chosen", "rejected")}
    policy_12 = torch.tensor([[policy["chosen"], policy["rejected"]]], dtype=torch.float64)
    reference_12 = torch.tensor([[reference["chosen"], reference["rejected"]]], dtype=torch.float64)
    loss, margin = dpo_loss(policy_12, reference_12, record["beta"])
    (label,) = record["pseudo_labels"]
    return {
        "command": record["command"],
        "question": record["question"],
        "answer": record["answer"],
        "example_index": str(record["example_index"]),
        "n_gold": f"{record['n_gold']:,}",
        "eos_id": str(template.eos_id),
        "prompt_ids": pieces_over_ids(tokenizer, template.prompt_ids(record["question"])),
        "temperature": str(record["temperature"]),
        "correct_sample": str(correct["sample_index"]),
        "marked_completion": marked(tokenizer, correct),
        "expression": expression,
        "result": result,
        "result_ids": " and ".join(str(token_id) for token_id in forced_ids[:2]),
        "grades": grades(record["samples_dpo"], record["answer"]),
        "samples_line": json.dumps(correct, ensure_ascii=False),
        "rejected_sample": str(rejected_sample["sample_index"]),
        "duplicates": duplicates(samples, rejected_sample),
        "intersection": str(len(chosen.distinct_target_ids & rejected.distinct_target_ids)),
        "union": str(len(chosen.distinct_target_ids | rejected.distinct_target_ids)),
        "jaccard": f"{jaccard(chosen, rejected):.3f}",
        "chosen": pair["chosen"].replace("\n", " ⏎ "),
        "rejected": pair["rejected"].replace("\n", " ⏎ "),
        "dpo_steps": str(record["dpo_steps"]),
        "n_pairs": f"{record['n_pairs']:,}",
        "reference_chosen": signed(reference["chosen"]),
        "reference_rejected": signed(reference["rejected"]),
        "policy_chosen": signed(policy["chosen"]),
        "policy_rejected": signed(policy["rejected"]),
        "difference_chosen": signed(difference["chosen"], plus="+"),
        "difference_rejected": signed(difference["rejected"], plus="+"),
        "beta": f"{record['beta']:g}",
        "ln2": f"{math.log(2):.4f}",
        "margin": signed(margin.item()),
        "negative_margin": signed(-margin.item()),
        "loss": f"{loss.item():.4f}",
        "new_grades": grades(record["samples_sft"], record["answer"]),
        "slip": slip(label["rationale"]),
        "label": label["rationale"].replace("\n", " ⏎ "),
        "n_examples": f"{record['n_gold'] + record['n_labels']:,}",
        "n_labels": f"{record['n_labels']:,}",
        "n_dev": f"{record['dev_before']['n']:,}",
        "accuracy_before": f"{record['dev_before']['value']:.1%}",
        "accuracy_after": f"{record['dev_after']['value']:.1%}",
        "greedy_before": f"`{record['greedy_before']}`".replace("\n", " ⏎ "),
        "greedy_after": f"`{record['greedy_after']}`".replace("\n", " ⏎ "),
        "reference_sampler": function_source(REFERENCE_SAMPLER),
    }


def signed(number: float, plus: str = "") -> str:
    """A number with two digits after the point and a real minus."""
    return f"{number:{plus}.2f}".replace("-", "−")


def pieces_over_ids(tokenizer, token_ids: list[int]) -> str:
    """Token texts in one line, their ids in the next, column under column."""
    pieces = [tokenizer.token_texts[token_id].replace(" ", "▁") or "(end)" for token_id in token_ids]
    widths = [max(len(piece), len(str(token_id))) for piece, token_id in zip(pieces, token_ids, strict=True)]
    lines = []
    for start in range(0, len(pieces), 12):
        columns = range(start, min(start + 12, len(pieces)))
        lines.append("  ".join(pieces[i].ljust(widths[i]) for i in columns).rstrip())
        lines.append("  ".join(str(token_ids[i]).ljust(widths[i]) for i in columns).rstrip())
    return "\n".join(lines)


def marked(tokenizer, sample: dict) -> str:
    """A completion token by token, forced ones in bold."""
    shown = []
    for token_id, forced in zip(sample["token_ids"], sample["forced"], strict=True):
        text = tokenizer.token_texts[token_id]
        piece = f"`{text.strip() or ('▁' if text else '(end)')}`"
        shown.append(f"**{piece}**" if forced else piece)
    return " ".join(shown)


def grades(samples: list[dict], answer: str) -> str:
    """A table: each sample's rationale, the answer found in it, and its grade."""
    lines = ["| sample | rationale | answer | correct |", "|---|---|---|---|"]
    for sample in samples:
        found = extract_answer(sample["completion"])
        assert is_correct(sample["completion"], answer) == sample["is_correct"]
        text = sample["completion"].replace("\n", " ⏎ ")
        lines.append(f"| {sample['sample_index']} | `{text}` | {found} | {'yes' if sample['is_correct'] else 'no'} |")
    return "\n".join(lines)


def duplicates(samples: list[dict], first: dict) -> str:
    """A table: the similarity of every other incorrect sample with the first."""
    lines = ["| sample | Jaccard | |", "|---|---|---|"]
    for sample in samples:
        if not sample["is_correct"] and sample is not first:
            similarity = jaccard(*(TokenizedExample((), tuple(s["token_ids"])) for s in (sample, first)))
            verdict = "near-duplicate, left out" if similarity > TINY_T5.max_similarity else "stays"
            lines.append(f"| {sample['sample_index']} | {similarity:.3f} | {verdict} |")
    return "\n".join(lines)


def slip(rationale: str) -> str:
    """A sentence on the first step that writes another number than it computed; empty where there is none."""
    for number, match in enumerate(re.finditer(r"<<[^<>]*=([^<>]*)>>(\d*)", rationale), start=1):
        if match[1] != match[2]:
            return f"Look closely: step {number} computes {match[1]} and then writes {match[2]}. "
    return ""


def function_source(path: Path) -> str:
    """The code of a file from its first function on."""
    text = path.read_text(encoding="utf-8")
    return text[text.index("def ") :].rstrip()


if __name__ == "__main__":
    run_command(main)
