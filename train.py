"""Train a model to solve word problems by its own rationales: DPO-augmented self-training and its relatives.

    python train.py                                         the toy world, a tiny T5: a few minutes on two cores
    python train.py --method st                             the same without DPO: plain self-training
    python train.py --model flan-t5-large --data gsm8k      the paper's recipe, on a GPU
    python train.py --data mine.jsonl --method sft          your own questions, rationales and answers

Everything goes to --run-dir: the models, the samples, report.md. The same command again continues a run that was
stopped; with more --iterations it takes a finished one further. The hyperparameters are those of the model's preset in
minidpost/selftraining/presets.py, which the file of --config and the flags below replace, in this order.
"""

import argparse
import dataclasses
import hashlib
import warnings
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from minidpost.cli import (
    DEVICE_TEXT,
    MINUTES,
    POSITIVE,
    TEMPLATE_TEXT,
    Parser,
    add_data_dir,
    device,
    dtype_text,
    named_model,
    run_command,
)
from minidpost.data import datasets, toy
from minidpost.data.example import Example
from minidpost.errors import UserError
from minidpost.models.hf_config import Model, read_config
from minidpost.models.hub import BUNDLED, PUBLISHED
from minidpost.models.lora import highest_rank
from minidpost.models.weights import TEMPLATES, check_weights, empty_model, load_template
from minidpost.precision import DTYPES, default_device, name_of, sampling_dtype, training_dtype
from minidpost.processes import on_rank_0, rank
from minidpost.selftraining.algorithm import self_train
from minidpost.selftraining.estimates import (
    Plan,
    check_disk,
    check_memory,
    micro_batch_tokens_for,
    model_size,
    planned_stages,
    slots_for,
    warn_of_hours,
)
from minidpost.selftraining.flags import (
    OF_DPO,
    add_hyperparameters,
    changes,
    flag_name,
    given,
    may_change,
    read_hyperparameters,
    written,
)
from minidpost.selftraining.methods import METHODS
from minidpost.selftraining.presets import Preset, for_lora, n_parameters, preset_for
from minidpost.selftraining.rehearsal import rehearse
from minidpost.selftraining.report import write_report
from minidpost.selftraining.run import Data, Keep, Run, tokenize
from minidpost.selftraining.run_directory import RunDirectory, finished_names, kind_of, model_hash
from minidpost.selftraining.steps import stopped_after

MAX_NAME = 100  # characters of a run directory's name that say what differs from the preset


def main() -> None:
    """Read and check everything, claim the run's directory, then self-train, with a new report after each iteration."""
    # 1) Everything that can be wrong is found before anything is written. What has to be fetched, rank 0 fetches.
    options = parse_options()
    base = on_rank_0(lambda: named_model(options.model))
    default = preset_for(base, options.method)
    replaced = replaced_hyperparameters(options, default)
    if replaced.get("lora_rank") is not None:
        default = for_lora(default)
    model = empty_model(read_config(base))
    dtype = sampling_dtype(options.dtype, options.device, n_parameters(model))
    default = replace(default, slots=slots_for(model, default, dtype, options.device))
    train_dtype = training_dtype(options.train_dtype, options.device, n_parameters(model))
    with_replaced = replace(default, **replaced)
    has_dpo = with_replaced.tunes_by_dpo(METHODS[options.method])
    micro_batch_tokens = micro_batch_tokens_for(model, with_replaced, train_dtype, options.device, has_dpo=has_dpo)
    default = replace(default, micro_batch_tokens=micro_batch_tokens)
    preset = resolve_preset(options, default, replaced, model)
    check_weights(base)
    data = on_rank_0(lambda: load_data(options))
    template = load_template(base, options.template)
    tokens = tokenize(data, template, base)
    differing = changes(default, preset, options.method)
    run_dir = options.run_dir or Path("runs") / run_name(options, data, base=base, differing=differing)
    plan = Plan(
        base=base,
        method=options.method,
        preset=preset,
        data=data,
        template=template,
        tokens=tokens,
        dtype=dtype,
        training_dtype=train_dtype,
        device=options.device,
    )
    finished = on_rank_0(lambda: set() if options.fresh else finished_names(run_dir))
    last = on_rank_0(lambda: None if options.fresh else stopped_after(run_dir, preset))
    planned = planned_stages(plan, model_size(model), last)
    resources = check_resources(options, plan, model, run_dir=run_dir, planned=planned, finished=finished)

    # 2) The run's directory: a new one, or one that the same command left.
    directory = RunDirectory(
        run_dir,
        on_rank_0(lambda: fingerprint(options, plan)),
        options.fresh,
        may_change=[f"preset.{name}" for name in may_change(options.method)],
        device=options.device,
    )
    for line in resources:
        directory.log(line)
    run = Run(
        directory=directory,
        base=base,
        method=options.method,
        preset=preset,
        data=data,
        template=template,
        template_name=options.template,
        tokens=tokens,
        seed=options.seed,
        calculator=not options.no_calculator,
        dtype=plan.dtype,
        training_dtype=plan.training_dtype,
        device=options.device,
        checkpoint_minutes=options.checkpoint_minutes,
        save_dtype=DTYPES[options.save_dtype],
        keep=options.keep,
    )

    # 3) The method.
    directory.planned = planned
    table = ""
    for _ in self_train(run):
        table = on_rank_0(lambda: write_report(run, base.name, options.model))
    if rank() == 0:
        print(f"\n{table}\n\n{run_dir}/report.md, results.json, figures/")


def parse_options() -> argparse.Namespace:
    """The command line's flags; UserError where one is unknown or out of range."""
    models = ", ".join([*BUNDLED, *PUBLISHED])
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default="tiny-t5",
        help=f"{models}; a directory; a .gguf file (not of a T5); OWNER/NAME[@REVISION] of the hub (default: tiny-t5)",
    )
    parser.add_argument("--method", default="dpo-st", choices=METHODS, help="what to train by (default: dpo-st)")
    parser.add_argument(
        "--data",
        default="toy",
        help="toy, gsm8k, or a JSONL file of question, rationale, answer, of which a tenth is held out as dev "
        "(default: toy)",
    )
    parser.add_argument(
        "--unlabelled", type=Path, metavar="FILE", help="JSONL of further questions and answers to sample for"
    )
    parser.add_argument(
        "--limit", type=POSITIVE, metavar="N", help="take only the first N examples of every set (default: all)"
    )
    add_data_dir(parser)
    parser.add_argument(
        "--run-dir",
        type=Path,
        metavar="DIR",
        help="where the run goes (default: runs/MODEL-METHOD-DATA-SEED, and what differs from the preset)",
    )
    parser.add_argument("--fresh", action="store_true", help="begin anew; the run that is there becomes NAME.1")
    parser.add_argument(
        "--checkpoint-minutes",
        type=MINUTES,
        default=5.0,
        metavar="X",
        help="save a training in progress this often (default: 5)",
    )
    parser.add_argument(
        "--keep",
        choices=get_args(Keep),
        default="all",
        help="which finished models stay on the disk: all; the last one, which a next iteration begins with; or also "
        "the best on dev so far. Logs and adapters stay (default: all)",
    )
    parser.add_argument(
        "--save-dtype",
        choices=DTYPES,
        default="fp32",
        help="of finished models on the disk; bf16 halves their size, and what follows begins with the rounded weights "
        "(default: fp32)",
    )
    parser.add_argument("--seed", type=int, default=42, metavar="N", help="seed of everything random (default: 42)")
    parser.add_argument("--no-calculator", action="store_true", help="let the model do its own arithmetic")
    parser.add_argument("--device", type=device, default=default_device(), help=DEVICE_TEXT)
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help=f"of weights in sampling and evaluation: {dtype_text('sampling')}",
    )
    parser.add_argument("--template", choices=TEMPLATES, help=TEMPLATE_TEXT)
    parser.add_argument(
        "--train-dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help=f"of training's forward passes, weights being fp32: {dtype_text('training')}",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="JSON object of hyperparameters, named as below with _ for -; the config.json of a run has all of them, "
        "of which those that a method sets are taken for the same method alone, and --slots and "
        "--micro-batch-tokens not of a run that was begun on another kind of device",
    )
    add_hyperparameters(parser)
    return parser.parse_args()


def replaced_hyperparameters(options: argparse.Namespace, default: Preset) -> dict[str, Any]:
    """The hyperparameters that the file of --config and the flags give; flags count more.

    Of a run by another method the file does not give what either of the two methods sets: that stays as in the
    `default`, and a warning names it.
    """
    by_flag = given(options)
    if options.config is None:
        return by_flag
    from_file, method = read_hyperparameters(options.config, options.device)
    if method not in (None, options.method):
        kept = []
        for name in {**METHODS[method].settings, **METHODS[options.method].settings}:
            value = vars(default)[name]
            if from_file.pop(name, value) != value and name not in by_flag:
                kept.append(f"{flag_name(name)} {written(value)}")
        if kept:
            warnings.warn(
                f"--config {options.config}: of a run by --method {method}; --method {options.method} keeps "
                f"{', '.join(kept)}",
                stacklevel=1,
            )
    return {**from_file, **by_flag}


def resolve_preset(options: argparse.Namespace, default: Preset, replaced: dict[str, Any], model: Model) -> Preset:
    """The preset of the model and the method, with what is replaced of it; UserError at a contradiction."""
    preset = dataclasses.replace(default, **replaced)
    unused = [flag_name(name) for name in OF_DPO if name in given(options)]
    if unused and not METHODS[options.method].has_dpo:
        warnings.warn(f"{', '.join(unused)}: no effect with --method {options.method}, which has no DPO", stacklevel=1)
    if preset.lora_alpha is not None and preset.lora_rank is None:
        raise UserError("--lora-alpha: has no effect without --lora-rank, which is expected too")
    if preset.lora_rank is not None and preset.lora_rank > highest_rank(model):
        raise UserError(
            f"--lora-rank {preset.lora_rank}: at most {highest_rank(model)} is expected, the smaller side of this "
            "model's largest adapted matrix"
        )
    if not preset.warm_up and not METHODS[options.method].iterates:
        raise UserError(f"--no-warm-up: leaves nothing to do for --method {options.method}")
    return preset


def check_resources(
    options: argparse.Namespace,
    plan: Plan,
    model: Model,
    *,
    run_dir: Path,
    planned: Collection[str],
    finished: Collection[str],
) -> list[str]:
    """Whether memory and disk suffice for the stages that are not finished, as lines for the log; UserError if not.

    The largest batches are rehearsed. Where every stage is finished there is nothing to check.
    """
    left = [name for name in planned if name not in finished]
    if not left:
        return ["every stage is finished"]
    memory = check_memory(
        model,
        plan.preset,
        dtype=plan.dtype,
        device=plan.device,
        training_dtype=plan.training_dtype,
        has_dpo=plan.has_dpo,
    )
    disk = on_rank_0(
        lambda: check_disk(
            model,
            plan.preset,
            method=plan.method,
            run_dir=run_dir,
            fresh=options.fresh,
            save_dtype=DTYPES[options.save_dtype],
            keep=options.keep,
            n_trainings=sum(kind_of(name) in ("sft", "dpo") for name in left) if finished else None,
        )
    )
    warn_of_hours(plan, model, finished)
    rehearsed = rehearse(plan, model)
    return [f"{memory}; {disk}", *([rehearsed] if rehearsed is not None else [])]


def fingerprint(options: argparse.Namespace, plan: Plan) -> dict[str, Any]:
    """What makes a run the same run: a directory that was begun with any of it different is not continued.

    A few hyperparameters may change (flags.may_change).
    """
    names = ("method", "data", "unlabelled", "limit", "seed", "no_calculator", "template")
    return {
        "model": plan.base.name,
        **{name: vars(options)[name] for name in names},
        **({"save_dtype": options.save_dtype} if options.save_dtype != "fp32" else {}),
        # What "auto" is here, so that a run goes on in the precisions it was begun in.
        "dtype": name_of(plan.dtype),
        "train_dtype": name_of(plan.training_dtype),
        "preset": dataclasses.asdict(plan.preset),
        "examples": plan.data.fingerprint(),
        "weights": model_hash(plan.base),
    }


def run_name(options: argparse.Namespace, data: Data, *, base: Path, differing: dict[str, Any]) -> str:
    """The name of a run's directory: model, method, data, seed, and every setting that is not the preset's.

    `differing` are the hyperparameters among those. So two runs that differ in a hyperparameter do not share one.
    """
    parts = []
    if options.unlabelled:
        parts.append(f"unlabelled={options.unlabelled.stem}")
    if options.limit:
        parts.append(f"limit={options.limit}")
    if options.no_calculator:
        parts.append("no-calculator")
    if options.template:
        parts.append(f"template={options.template}")
    for name, dtype in (("dtype", options.dtype), ("train-dtype", options.train_dtype)):
        if dtype != "auto":
            parts.append(f"{name}={dtype}")
    if options.save_dtype != "fp32":
        parts.append(f"save-dtype={options.save_dtype}")
    for name, value in differing.items():
        parts.append(f"{name.replace('_', '-')}={written(value)}")
    differences = "-".join(parts)
    if len(differences) > MAX_NAME:
        digest = hashlib.sha256(differences.encode()).hexdigest()[:12]
        differences = f"{len(parts)}-changes-{digest}"
    name = f"{base.name}-{options.method}-{data.name}-{options.seed}"
    return f"{name}-{differences}" if differences else name


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
    elif datasets.is_own(options.data):
        examples = datasets.load_jsonl(options.data, labelled=True)[: options.limit]
        labelled, dev = datasets.split_own(examples, options.data)
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
