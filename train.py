"""Train a model to solve word problems by its own rationales: DPO-augmented self-training and its relatives."""

import argparse
import dataclasses
import warnings
from pathlib import Path
from random import Random

from minidpost.cli import MAX_COUNT, MINUTES, Parser, device, run_command
from minidpost.data import datasets
from minidpost.errors import UserError
from minidpost.models.hf_config import model_type, read_config
from minidpost.models.hub import BUNDLED, PUBLISHED, find_model
from minidpost.models.weights import empty_model
from minidpost.precision import default_device, sampling_dtype
from minidpost.selftraining.algorithm import Data, Run
from minidpost.selftraining.estimates import check_memory
from minidpost.selftraining.presets import METHODS, preset_for
from minidpost.selftraining.report import write_report
from minidpost.selftraining.run_directory import RunDirectory, model_hash

SETTINGS = ("model", "method", "data", "unlabelled", "limit", "seed", "no_calculator")  # what makes a run the same run
OVERRIDES = {  # flags that replace one setting of the preset
    "iterations": (int, "self-training rounds at most"),
    "samples": (int, "K: rationales a question for the pseudo-labels"),
    "dpo_samples": (int, "rationales a question for the preference pairs"),
    "temperature": (float, "of sampling"),
    "sft_epochs": (int, "epochs of each fine-tuning"),
    "sft_learning_rate": (float, "its peak"),
    "dpo_steps": (int, "optimizer steps of each DPO at most"),
    "dpo_learning_rate": (float, "its peak"),
    "max_new_tokens": (int, "longest completion"),
    "slots": (int, "rows decoded at once"),
    "micro_batch_tokens": (int, "padded tokens a forward pass in training"),
}


def main() -> None:
    options = parse_options()
    base = find_model(options.model)
    names = (*OVERRIDES, "activation_checkpointing")
    overrides = {name: value for name in names if (value := getattr(options, name)) is not None}
    preset = dataclasses.replace(preset_for(options.model, model_type(base), options.method), **overrides)
    memory = check_memory(empty_model(read_config(base)), preset, sampling_dtype(options.device), options.device)
    data = load_data(options)
    path = options.run_dir or Path("runs") / f"{base.name}-{options.method}-{data.name}-{options.seed}"
    settings = {name: getattr(options, name) for name in SETTINGS} | {"preset": dataclasses.asdict(preset)}
    settings["examples"], settings["weights"] = data.fingerprint(), model_hash(base)
    del settings["preset"]["iterations"]  # a finished run may be taken further
    directory = RunDirectory(path, settings, options.fresh)
    directory.say(memory)
    calculator, minutes = not options.no_calculator, options.checkpoint_minutes
    run = Run(directory, base, options.method, preset, data, options.seed, calculator, options.device, minutes)
    text = ""
    for _ in run.iterations():
        text = write_report(run, options.model)
    print(f"\n{text}\n\n{path}/results.json, report.md, figures/accuracy.png")


def parse_options() -> argparse.Namespace:
    parser = Parser(description=__doc__)
    parser.add_argument(
        "--model", default="tiny-t5", help=f"{', '.join([*BUNDLED, *PUBLISHED])}, or a directory (default: tiny-t5)"
    )
    parser.add_argument("--method", default="dpo-st", choices=METHODS)
    parser.add_argument("--data", default="toy", help="toy, gsm8k, or a JSONL file of question, rationale, answer")
    parser.add_argument("--unlabelled", type=Path, help="JSONL of further questions and answers to sample for")
    parser.add_argument("--limit", type=int, help="take only the first N examples of every set")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where datasets lie or are fetched to")
    parser.add_argument("--run-dir", type=Path, help="default: runs/MODEL-METHOD-DATA-SEED")
    parser.add_argument("--fresh", action="store_true", help="begin anew; the run that is there becomes NAME.1")
    parser.add_argument("--checkpoint-minutes", type=MINUTES, default=5.0, help="how often to save (default: 5)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--no-calculator", action="store_true", help="let the model do its own arithmetic")
    parser.add_argument("--device", type=device, default=default_device())
    for name, (kind, text) in OVERRIDES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{text} (default: the preset's)")
    parser.add_argument("--activation-checkpointing", action=argparse.BooleanOptionalAction, help="less memory, slower")
    options = parser.parse_args()
    for name in ("limit", *OVERRIDES):
        value = getattr(options, name)
        low, high = (0 if name == "iterations" else 1, MAX_COUNT) if isinstance(value, int) else (1e-9, 1e3)
        if value is not None and not low <= value <= high:
            parser.error(f"--{name.replace('_', '-')} {value}: must be positive and at most {high:,.0f}")
    return options


def load_data(options: argparse.Namespace) -> Data:
    """The labelled set, the questions to sample for, dev and the tests, by the name or file given."""

    def load(name: str, split: str) -> list:
        return datasets.load(name, split, options.data_dir)[: options.limit]

    extra = datasets.load_jsonl(options.unlabelled, labelled=False)[: options.limit] if options.unlabelled else []
    if options.data == "toy":
        labelled, dev, extra = load("toy", "train"), load("toy", "dev"), extra or load("toy", "unlabelled")
        tests = {f"toy/{split}": load("toy", split) for split in datasets.toy.TEST_SPLITS}
    elif options.data == "gsm8k":
        labelled, dev = load("gsm8k", "train"), load("gsm8k", "dev")
        tests = {f"{name}/test": load(name, "test") for name in ("gsm8k", "multiarith", "asdiv", "svamp")}
    elif options.data.endswith(".jsonl"):
        examples = datasets.load_jsonl(options.data, labelled=True)[: options.limit]
        if len(examples) < 2:
            raise UserError(f"{options.data}: at least 2 examples are needed, a tenth being held out as dev")
        Random(options.seed).shuffle(examples)
        n_dev = max(1, len(examples) // 10)
        labelled, dev, tests = examples[n_dev:], examples[:n_dev], {}
    else:
        raise UserError(f"--data {options.data}: toy, gsm8k or a file that ends in .jsonl is expected")
    known = {example.question for example in [*labelled, *dev]}
    further = [example for example in extra if example.question not in known]
    if n_known := len(extra) - len(further):
        warnings.warn(f"{n_known} questions to sample for left out: the labelled set or dev has them", stacklevel=1)
    return Data(labelled, [*labelled, *further], dev, tests, Path(options.data).stem)


if __name__ == "__main__":
    run_command(main, "the same command continues from here")
