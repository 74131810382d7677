"""What the commands share: flags, the model to load, one line for a user's mistake, a quiet end for Ctrl-C."""

import argparse
import os
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from minidpost.errors import UserError
from minidpost.models.hub import find_model
from minidpost.models.weights import load_model, load_template
from minidpost.precision import DTYPES, default_device, sampling_dtype
from minidpost.storage import no_room
from minidpost.text.templates import Template
from minidpost.training.state import Terminated, interrupt

RUNS = Path("runs")
MAX_MESSAGE = 1000
MAX_COUNT = 10**6  # of rows, tokens, samples …: what lies above is a slip of the finger


def run_command(main: Callable[[], None], if_interrupted: str = "nothing was written") -> None:
    """Run a command's main and exit with its status.

    0; 2 for a mistake of the user's or a full disk; 130 for Ctrl-C; 143 for SIGTERM. What follows Ctrl-C and a full
    disk is said in the words of `if_interrupted`.
    """
    name = os.path.basename(sys.argv[0])
    warnings.formatwarning = lambda message, *_: f"{name}: warning: {one_line(message)}\n"
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack signs that a model has
    try:
        signal.signal(signal.SIGTERM, interrupt)
        main()
        sys.stdout.flush()  # here, so that a closed pipe is noticed while it can be handled
    except UserError as error:
        print(f"{name}: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "can't allocate memory" not in str(error):
            raise
        print(f"{name}: not enough memory; fewer --slots or --max-new-tokens need less", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as reason:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # one more would only garble the end
        print(f"\n{name}: interrupted; {if_interrupted}", file=sys.stderr)
        sys.exit(143 if isinstance(reason, Terminated) else 130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except Exception as error:
        if (reason := no_room(error)) is not None:
            print(f"{name}: cannot write ({reason}); {if_interrupted}", file=sys.stderr)
        elif isinstance(error, OSError) and error.filename is not None:
            print(f"{name}: {one_line(f'{error.filename}: {error.strerror}')}", file=sys.stderr)
        else:
            raise
        sys.exit(2)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def one_line(message: object) -> str:
    """A message as it can be shown: on one line, of at most MAX_MESSAGE signs, none of which commands a terminal."""
    text = " ".join(str(message).split())
    text = text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…"
    return "".join(sign if sign.isprintable() else "\ufffd" for sign in text)


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, without the usage."""

    def error(self, message: str) -> None:
        raise UserError(f"{message} (--help lists the flags)")

    def parse_known_args(self, args=None, namespace=None):
        """argparse's, of arguments that are text: others could not be written into any file."""
        for argument in sys.argv[1:] if args is None else args:
            if not argument.isascii() and any("\ud800" <= sign <= "\udfff" for sign in argument):
                self.error(f"argument {argument!r:.80} is not UTF-8")
        return super().parse_known_args(args, namespace)


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
    precision = "of weights and sums; bf16 pays on a GPU or on a CPU with AMX (default: bf16 on CUDA, else fp32)"
    parser.add_argument("--dtype", choices=DTYPES, help=precision)
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


POSITIVE = checked(int, lambda value: 1 <= value <= MAX_COUNT, f"a whole number from 1 to {MAX_COUNT:,}")
NOT_NEGATIVE = checked(int, lambda value: 0 <= value <= MAX_COUNT, f"a whole number from 0 to {MAX_COUNT:,}")
# Between the bounds logits divided by it stay what they are; nearer to 0 they overflow.
TEMPERATURE = checked(float, lambda value: value == 0 or 1e-3 <= value <= 1e3, "0 or a number from 0.001 to 1000")
MINUTES = checked(float, lambda value: 0 <= value < float("inf"), "a number of minutes")
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


def open_model(checkpoint: str | None, device: str, dtype: str | None = None) -> tuple[Path, nn.Module, Template]:
    """The model of a directory or a name, and how it writes; by default the newest fine-tuned one under runs/."""
    directory = find_model(checkpoint) if checkpoint is not None else default_checkpoint()
    template = load_template(directory)  # before the weights, which take longer to read
    return directory, load_model(directory, DTYPES[dtype] if dtype else sampling_dtype(device), device), template


def default_checkpoint() -> Path:
    """The model that the newest run made last; without a run, the embedded one that has learnt the task."""
    finished = sorted(RUNS.glob("*/iteration-*/sft/config.json"), key=lambda path: path.stat().st_mtime)
    return finished[-1].parent if finished else find_model("tiny-t5-dpo-st")
