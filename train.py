"""Train a model to solve word problems by its own rationales: DPO-augmented self-training and its relatives.

    python train.py                                         the toy world, a tiny T5: a few minutes on two cores
    python train.py --method st                             the same without DPO: plain self-training
    python train.py --model flan-t5-large --data gsm8k      the paper's recipe, on a GPU
    python train.py --data mine.jsonl --method sft          your own questions, rationales and answers

Everything goes to --run-dir: the models, the samples, report.md. The same command again continues a run that was
stopped. Any number of the recipe (minidpost/selftraining/presets.py) can be replaced by a flag.
"""

import argparse
import dataclasses
import warnings
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any

from minidpost.cli import MAX_COUNT, MINUTES, Parser, device, run_command
from minidpost.data import datasets, toy
from minidpost.data.example import Example
from minidpost.errors import UserError
from minidpost.models.hf_config import model_type, read_config
from minidpost.models.hub import BUNDLED, PUBLISHED, find_model
from minidpost.models.weights import empty_model, load_template
from minidpost.precision import default_device, sampling_dtype
from minidpost.selftraining.algorithm import self_train
from minidpost.selftraining.estimates import check_memory
from minidpost.selftraining.presets import METHODS, Preset, preset_for
from minidpost.selftraining.report import write_report
from minidpost.selftraining.run import Data, Run, tokenize
from minidpost.selftraining.run_directory import RunDirectory, model_hash

PRESET_FLAGS = {  # flags that replace one hyperparameter of the preset: its type and what it is
    "iterations": (int, "iterations of self-training at most"),
    "samples": (int, "K: samples for each question, for the pseudo-labels"),
    "dpo_samples": (int, "samples for each question, for the preference pairs"),
    "temperature": (float, "temperature of sampling"),
    "sft_epochs": (int, "epochs of each SFT"),
    "sft_learning_rate": (float, "peak learning rate of SFT"),
    "dpo_steps": (int, "optimizer steps of each DPO at most"),
    "dpo_learning_rate": (float, "peak learning rate of DPO"),
    "max_new_tokens": (int, "tokens of a completion at most"),
    "slots": (int, "completions that are sampled at the same time"),
    "micro_batch_tokens": (int, "padded tokens of a forward pass in training at most"),
}


def main() -> None:
    """Read and check everything, claim the run's directory, then self-train, with a new report after each iteration."""
    options = parse_options()
    base = find_model(options.model)
    preset = resolve_preset(options, base)
    memory = check_memory(
        empty_model(read_config(base)), preset, dtype=sampling_dtype(options.device), device=options.device
    )
    data = load_data(options)
    template = load_template(base)
    tokens = tokenize(data, template, base)

    run_dir = options.run_dir or Path("runs") / f"{base.name}-{options.method}-{data.name}-{options.seed}"
    directory = RunDirectory(run_dir, fingerprint(options, data, preset=preset, base=base), options.fresh)
    directory.log(memory)
    run = Run(
        directory=directory,
        base=base,
        method=options.method,
        preset=preset,
        data=data,
        template=template,
        tokens=tokens,
        seed=options.seed,
        calculator=not options.no_calculator,
        device=options.device,
        checkpoint_minutes=options.checkpoint_minutes,
    )
    table = ""
    for _ in self_train(run):
        table = write_report(run, options.model)
    print(f"\n{table}\n\n{run_dir}/results.json, report.md, figures/accuracy.png")


def parse_options() -> argparse.Namespace:
    """The command line's flags; UserError where one is unknown or out of range."""
    models = ", ".join([*BUNDLED, *PUBLISHED])
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-t5", help=f"{models}, or a directory (default: tiny-t5)")
    parser.add_argument("--method", default="dpo-st", choices=METHODS, help="what to train by (default: dpo-st)")
    parser.add_argument("--data", default="toy", help="toy, gsm8k, or a JSONL file of question, rationale, answer")
    parser.add_argument("--unlabelled", type=Path, help="JSONL of further questions and answers to sample for")
    parser.add_argument("--limit", type=int, help="take only the first N examples of every set")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where datasets lie or are fetched to")
    parser.add_argument("--run-dir", type=Path, help="where the run goes (default: runs/MODEL-METHOD-DATA-SEED)")
    parser.add_argument("--fresh", action="store_true", help="begin anew; the run that is there becomes NAME.1")
    parser.add_argument(
        "--checkpoint-minutes", type=MINUTES, default=5.0, help="save a training in progress this often (default: 5)"
    )
    parser.add_argument("--seed", type=int, default=42, help="seed of everything random (default: 42)")
    parser.add_argument("--no-calculator", action="store_true", help="let the model do its own arithmetic")
    parser.add_argument("--device", type=device, default=default_device(), help="cpu, cuda, … (default: cuda if any)")
    for name, (kind, text) in PRESET_FLAGS.items():
        parser.add_argument(flag(name), type=kind, help=f"{text} (default: the preset's)")
    parser.add_argument(
        "--activation-checkpointing",
        action=argparse.BooleanOptionalAction,
        help="compute activations twice in training: less memory, slower (default: the preset's)",
    )
    options = parser.parse_args()

    given = vars(options)
    for name in ("limit", *PRESET_FLAGS):
        value = given[name]
        if value is None:
            continue
        lowest, highest = (1, MAX_COUNT) if isinstance(value, int) else (1e-9, 1e3)
        if name == "iterations":
            lowest = 0
        if not lowest <= value <= highest:
            parser.error(f"{flag(name)} {value}: must be positive and at most {highest:,.0f}")
    return options


def flag(name: str) -> str:
    """The flag of an option: sft_epochs is --sft-epochs."""
    return f"--{name.replace('_', '-')}"


def resolve_preset(options: argparse.Namespace, base: Path) -> Preset:
    """The preset of the model and the method, with the hyperparameters that flags replace."""
    given = vars(options)
    names = (*PRESET_FLAGS, "activation_checkpointing")
    replaced = {name: given[name] for name in names if given[name] is not None}
    return dataclasses.replace(preset_for(options.model, model_type(base), options.method), **replaced)


def fingerprint(options: argparse.Namespace, data: Data, *, preset: Preset, base: Path) -> dict[str, Any]:
    """What makes a run the same run: a directory that was begun with any of it different is not continued."""
    given = vars(options)
    names = ("model", "method", "data", "unlabelled", "limit", "seed", "no_calculator")
    hyperparameters = dataclasses.asdict(preset)
    del hyperparameters["iterations"]  # a finished run may be taken further
    return {
        **{name: given[name] for name in names},
        "preset": hyperparameters,
        "examples": data.fingerprint(),
        "weights": model_hash(base),
    }


def load_data(options: argparse.Namespace) -> Data:
    """The labelled set, the questions to sample for, dev and the tests, by the name or file given."""
    further: Sequence[Example] = []
    if options.unlabelled:
        further = datasets.load_jsonl(options.unlabelled, labelled=False)[: options.limit]
    tests: dict[str, Sequence[Example]] = {}
    if options.data == "toy":
        labelled = load_split(options, "toy", "train")
        dev = load_split(options, "toy", "dev")
        further = further or load_split(options, "toy", "unlabelled")
        for split in toy.TEST_SPLITS:
            tests[f"toy/{split}"] = load_split(options, "toy", split)
    elif options.data == "gsm8k":
        labelled = load_split(options, "gsm8k", "train")
        dev = load_split(options, "gsm8k", "dev")
        for name in ("gsm8k", "multiarith", "asdiv", "svamp"):
            tests[f"{name}/test"] = load_split(options, name, "test")
    elif options.data.endswith(".jsonl"):
        examples = list(datasets.load_jsonl(options.data, labelled=True)[: options.limit])
        if len(examples) < 2:
            raise UserError(f"{options.data}: at least 2 examples are needed, a tenth being held out as dev")
        Random(options.seed).shuffle(examples)
        n_dev = max(1, len(examples) // 10)
        labelled = examples[n_dev:]
        dev = examples[:n_dev]
    else:
        raise UserError(f"--data {options.data}: toy, gsm8k or a file that ends in .jsonl is expected")

    # Neither the labelled set's questions, which are sampled for anyway, nor dev's, which must not be trained on.
    known = {example.question for example in [*labelled, *dev]}
    unlabelled = [example for example in further if example.question not in known]
    n_known = len(further) - len(unlabelled)
    if n_known:
        warnings.warn(f"{n_known} questions to sample for left out: the labelled set or dev has them", stacklevel=1)
    return Data(
        labelled=labelled,
        pool=[*labelled, *unlabelled],
        dev=dev,
        tests=tests,
        name=Path(options.data).stem,
    )


def load_split(options: argparse.Namespace, name: str, split: str) -> Sequence[Example]:
    """One split of a dataset, up to the limit."""
    return datasets.load(name, split, options.data_dir)[: options.limit]


if __name__ == "__main__":
    run_command(main, "the same command continues from here")
