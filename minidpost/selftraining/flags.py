"""A flag of train.py for every hyperparameter: made from the fields of Preset, checked the same way in a JSON file.

`--sft-epochs 4` replaces `sft_epochs` of the model's preset, and so does {"sft_epochs": 4} in the file of --config.
"""

import argparse
import difflib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_args

from minidpost.errors import UserError
from minidpost.selftraining.methods import METHODS
from minidpost.selftraining.presets import (
    LLAMA,
    MEDIUM_LLAMA,
    SMALL_LLAMA,
    SMALLEST_LLAMA,
    T5,
    TINY_LLAMA,
    TINY_T5,
    Preset,
)
from minidpost.storage import read_json

MANY = 10**6  # of rows, tokens, steps …: what is larger must be a typing error


@dataclass(frozen=True)
class Flag:
    """What --help says of a hyperparameter, and its bounds, ends included."""

    text: str
    low: float = 1
    high: float = MANY


# Every field of Preset stands here once, in the groups that --help shows.
GROUPS: dict[str, dict[str, Flag]] = {
    "iterations": {
        "iterations": Flag("iterations of self-training after the warm-up; a larger number takes a run further", low=0),
        "patience": Flag(
            "stop before that after so many iterations in which accuracy on dev did not rise above its best; none: "
            "make every iteration"
        ),
        "warm_up": Flag("fine-tune the base model on the labelled set first; without, the base itself is sampled from"),
    },
    "SFT": {
        "sft_epochs": Flag("epochs of each SFT"),
        "sft_examples_per_step": Flag("examples of an optimizer step of SFT"),
        "sft_learning_rate": Flag("peak learning rate of SFT", low=1e-9, high=1),
        "sft_dropout": Flag("dropout in SFT (DPO has none); none: the rate in the model's config.json", 0, 0.99),
    },
    "DPO": {
        "dpo_steps": Flag("optimizer steps of each DPO, at most"),
        "dpo_max_epochs": Flag("epochs of each DPO at most, which shortens --dpo-steps where pairs are few"),
        "dpo_pairs_per_step": Flag("preference pairs of an optimizer step of DPO"),
        "dpo_learning_rate": Flag("peak learning rate of DPO", low=1e-9, high=1),
        "beta": Flag("β of the DPO loss: how strongly the model is held to the reference", low=1e-6, high=1e3),
    },
    "optimizer and lengths, of SFT and DPO": {
        "learning_rate_warmup": Flag(
            "fraction of the optimizer steps in which the learning rate rises to its peak", 0, 1
        ),
        "learning_rate_floor": Flag("fraction of the peak that the learning rate falls to by the last step", 0, 1),
        "weight_decay": Flag("weight decay of AdamW, of matrices alone", 0, 1),
        "max_grad_norm": Flag("norm to which larger gradients are clipped", low=1e-6, high=1e6),
        "max_source": Flag("longest prompt that is trained on, in tokens; what is longer is left out and counted"),
        "max_target": Flag("longest completion that is trained on, in tokens; what is longer is left out and counted"),
    },
    "LoRA (without --lora-rank all weights are trained)": {
        "lora_rank": Flag(
            "train low-rank adapters of this rank on all linear layers, and nothing else: much less memory; the "
            "preset's learning rates are then ten times as high (0.006 at most); none: train all weights",
            high=2**14,
        ),
        "lora_alpha": Flag("adapters are multiplied by this over their rank; none: twice the rank", low=1e-3),
    },
    "sampling": {
        "samples": Flag("K: samples for each question, for the pseudo-labels"),
        "dpo_samples": Flag("samples for each question, for the preference pairs"),
        "temperature": Flag("temperature of the samples", low=1e-3, high=1e3),
        "top_k": Flag("sample among so many of the most likely tokens; 0: among all (the published code: 50)", low=0),
        "top_p": Flag("sample among the fewest tokens that have this probability together", low=1e-6, high=1),
        "max_new_tokens": Flag("longest completion, in tokens"),
    },
    "preference pairs and pseudo-labels": {
        "max_similarity": Flag("Jaccard similarity above which of two rationales of a question one is left out", 0, 1),
        "pairs_per_question": Flag("preference pairs of a question, at most: the least similar ones"),
        "label_percentile": Flag(
            "pseudo-labels of a question, at most this percentile of all questions' counts; none: no such limit", 0, 100
        ),
        "label_cap": Flag("pseudo-labels of a question, at most so many; none: no such limit"),
    },
    "evaluation": {
        "pass_at": Flag(
            "samples for each dev question, before and after each DPO, for pass@1 to this k and maj@k; 1: greedy "
            "accuracy alone"
        ),
        "pass_questions": Flag("take the first so many of dev for pass@k; none: all"),
        "test_questions": Flag("take the first so many of each test set; 0: no test sets, none: all", low=0),
    },
    "memory and speed (results change only by rounding and dropout's units; a run may go on with other values)": {
        "micro_batch_tokens": Flag(
            "tokens of a forward pass in training, at most, padding counted as a quarter; a question's pairs stay "
            "together even if they are more; on a GPU the default follows from its memory"
        ),
        "activation_checkpointing": Flag("compute activations twice in training, for less memory"),
        "slots": Flag("completions that are sampled at the same time; on a GPU more, by its memory"),
    },
}
FLAGS = {name: flag for group in GROUPS.values() for name, flag in group.items()}
TYPES = {field.name: field.type for field in fields(Preset)}

# What a continued run may change: how far it goes, and what changes results only by rounding and by dropout's units.
MAY_CHANGE = ("iterations", "patience", "micro_batch_tokens", "activation_checkpointing", "slots")
# What follows from a device's memory: not taken over from a run that was begun on a device of another kind.
OF_DEVICE = ("micro_batch_tokens", "slots")
# What DPO alone has a use for: with a method without it, any other values make the same run.
OF_DPO = (*GROUPS["DPO"], "dpo_samples", "pairs_per_question")


def flag_name(name: str) -> str:
    """The flag of an option: sft_epochs is --sft-epochs."""
    return f"--{name.replace('_', '-')}"


def add_hyperparameters(parser: argparse.ArgumentParser) -> None:
    """Add a flag for every hyperparameter. One that is not given leaves no attribute behind."""
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(title)
        for name, flag in flags.items():
            text = f"{flag.text} (default: {default_text(name)})".replace("%", "%%")
            if TYPES[name] is bool:
                action = argparse.BooleanOptionalAction
                group.add_argument(flag_name(name), action=action, default=argparse.SUPPRESS, help=text)
            else:
                metavar = "N" if int in kinds(name) else "X"
                group.add_argument(
                    flag_name(name), type=reader(name), default=argparse.SUPPRESS, metavar=metavar, help=text
                )


def default_text(name: str) -> str:
    """The default of a hyperparameter as --help shows it, by model where the models differ, and by method likewise."""
    smaller = {"Llama up to 4B": MEDIUM_LLAMA, "up to 700M": SMALL_LLAMA, "up to 250M": SMALLEST_LLAMA}
    by_model = {"T5": T5, "Llama": LLAMA, **smaller, "tiny-t5": TINY_T5, "tiny-llama": TINY_LLAMA}
    values = {model: written(vars(preset)[name]) for model, preset in by_model.items()}
    larger = "Llama"
    for model in smaller:  # named only where it differs from the next larger ones
        if values[model] == values[larger]:
            del values[model]
        else:
            larger = model
    if values["tiny-t5"] == values["tiny-llama"]:
        values["tiny models"] = values.pop("tiny-t5")
        del values["tiny-llama"]
    if len({*values.values()}) == 1:
        text = values["T5"]
    else:
        text = ", ".join(f"{model} {value}" for model, value in values.items())
    for method, rules in METHODS.items():
        if name in rules.settings:
            text += f"; with --method {method} {written(rules.settings[name])}"
    return text


def written(value: object) -> str:
    """A value as it is given on the command line."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def reader(name: str) -> Callable[[str], Any]:
    """A flag's type for argparse: reads and checks the value of one hyperparameter."""

    def read(text: str) -> Any:
        value: Any = text
        if text.lower() == "none":
            value = None
        else:
            for kind in (int, float):
                try:
                    value = kind(text)
                    break
                except ValueError:
                    continue
        try:
            return check(name, value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return read


def kinds(name: str) -> tuple[Any, ...]:
    """The types that a hyperparameter may have, NoneType among them where it may be None."""
    return get_args(TYPES[name]) or (TYPES[name],)


def check(name: str, value: Any) -> Any:
    """The value of a hyperparameter, a whole number as a float where it is one; ValueError says what is expected."""
    allowed = kinds(name)
    flag = FLAGS[name]
    if bool in allowed:
        if not isinstance(value, bool):
            raise ValueError(f"true or false is expected, found {value!r:.80}")
        return value
    is_none_allowed = type(None) in allowed
    if value is None and is_none_allowed:
        return None
    if float in allowed and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    is_number = type(value) in allowed
    if not is_number or not flag.low <= value <= flag.high:
        kind = "a number" if float in allowed else "a whole number"
        none = ", or none" if is_none_allowed else ""
        raise ValueError(f"{kind} from {flag.low:,} to {flag.high:,}{none} is expected, found {value!r:.80}")
    return value


def given(options: argparse.Namespace) -> dict[str, Any]:
    """The hyperparameters that the command line gives."""
    return {name: value for name, value in vars(options).items() if name in FLAGS}


def read_hyperparameters(path: Path, device: str = "cpu") -> tuple[dict[str, Any], str | None]:
    """The hyperparameters in a JSON file: an object of them, or the config.json of a run, which has all.

    Of a run that was begun on another kind of device than `device` those of its memory (OF_DEVICE) are left out. With
    them comes the run's method, None where the file is no run's or names no method that we have.
    UserError: no such file, no JSON, a name that is no hyperparameter, a value that is out of bounds.
    """
    try:
        content: Any = read_json(path)
    except FileNotFoundError:
        raise UserError(f"--config {path}: no such file") from None
    except (OSError, ValueError):
        raise UserError(f"--config {path}: not readable as JSON") from None
    method = None
    if isinstance(content, dict) and isinstance(content.get("settings"), dict):
        named = content["settings"].get("method")
        method = next((name for name in METHODS if name == named), None)
        kind = device.partition(":")[0]
        begun_on = content.get("device", kind)
        content = content["settings"].get("preset")
        if begun_on != kind and isinstance(content, dict):
            content = {name: value for name, value in content.items() if name not in OF_DEVICE}
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: an object of hyperparameters is expected, or a run's config.json")
    values = {}
    for name, value in content.items():
        if name not in FLAGS:
            closest = difflib.get_close_matches(name, FLAGS, n=1)
            hint = f" (did you mean {closest[0]}?)" if closest else ""
            raise UserError(f"--config {path}: {name!r:.80} is no hyperparameter{hint}")
        try:
            values[name] = check(name, value)
        except ValueError as error:
            raise UserError(f"--config {path}: {name}: {error}") from None
    return values, method


def may_change(method: str) -> tuple[str, ...]:
    """The hyperparameters that a continued run of a method may change."""
    return MAY_CHANGE if METHODS[method].has_dpo else (*MAY_CHANGE, *OF_DPO)


def changes(preset: Preset, other: Preset, method: str) -> dict[str, Any]:
    """The hyperparameters of `other` that differ from `preset`, but for those that a continued run may change."""
    before = asdict(preset)
    free = may_change(method)
    return {name: value for name, value in asdict(other).items() if value != before[name] and name not in free}
