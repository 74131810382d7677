"""What the commands share: flags, the model to load, one line for a user's mistake, a quiet end for Ctrl-C."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from minidpost.checkpoint import load_format, load_model
from minidpost.files import UserError
from minidpost.formats import Format
from minidpost.generation import default_device, sampling_dtype
from minidpost.hub import find_model

RUNS = Path("runs")


def run_command(main: Callable[[], None], if_interrupted: str = "nothing was written") -> None:
    """Run a command's main and exit with its status: 0, 2 for a mistake of the user's, 130 for Ctrl-C."""
    name = os.path.basename(sys.argv[0])
    try:
        main()
        sys.stdout.flush()  # here, so that a closed pipe is noticed while it can be handled
    except UserError as error:
        print(f"{name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print(f"\n{name}: interrupted; {if_interrupted}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"{name}: {error.filename}: {error.strerror}", file=sys.stderr)
        sys.exit(2)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, without the usage."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (--help lists the flags)")


def model_parser(description: str) -> Parser:
    """A parser with the flags of every command that loads one model and samples from it."""
    parser = Parser(description=description)
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="a directory or a model's name (default: the newest under runs/, else tiny-t5-dpo-st)",
    )
    parser.add_argument("--max-new-tokens", type=POSITIVE, default=300, metavar="N", help="default: 300")
    parser.add_argument("--slots", type=POSITIVE, default=64, metavar="N", help="rows decoded at once (default: 64)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", type=device, default=default_device())
    return parser


def checked(kind: type, allowed: Callable[[float], bool], wanted: str) -> Callable[[str], float]:
    """A flag's type: what `kind` reads and `allowed` accepts; `wanted` says what that is."""

    def parse(text: str) -> float:
        try:
            value = kind(text)
            if not allowed(value):
                raise ValueError
        except ValueError:
            raise argparse.ArgumentTypeError(f"{wanted} is expected, found {text!r}") from None
        return value

    return parse


POSITIVE = checked(int, lambda value: value >= 1, "a whole number of at least 1")
NOT_NEGATIVE = checked(int, lambda value: value >= 0, "a whole number of at least 0")
TEMPERATURE = checked(float, lambda value: 0 <= value < float("inf"), "a number of at least 0")
SHARE = checked(float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


def device(text: str) -> str:
    """A flag's type: a device that tensors can be put on."""
    try:
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError):  # torch asserts where it was built without the device
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here; cpu always can") from None
    return text


def check_output(path: Path | None) -> None:
    """UserError where an output file exists, as nothing is overwritten, or where it could not be written in the end."""
    if path is None:
        return
    if path.exists():
        raise UserError(f"--output {path}: exists already; remove it or choose another name")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"--output {path}: {parent} is no directory that can be written to")


def open_model(checkpoint: str | None, device: str) -> tuple[Path, nn.Module, Format]:
    """The model of a directory or a name, and how it writes; by default the newest fine-tuned one under runs/."""
    directory = find_model(checkpoint) if checkpoint is not None else default_checkpoint()
    return directory, load_model(directory, sampling_dtype(device), device), load_format(directory)


def default_checkpoint() -> Path:
    """The model that the newest run made last; without a run, the embedded one that has learnt the task."""
    finished = sorted(RUNS.glob("*/iteration-*/sft/config.json"), key=lambda path: path.stat().st_mtime)
    return finished[-1].parent if finished else find_model("tiny-t5-dpo-st")
