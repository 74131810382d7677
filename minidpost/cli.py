"""What train.py, sample.py and eval.py share.

`run_command` turns exceptions into one line and an exit status; `Parser` and the types below it (`POSITIVE`,
`TEMPERATURE`, …) check flags before anything is read or written; `model_parser` and `open_model` are for the commands
that sample from one model.
"""

import argparse
import io
import os
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, TypeVar

import torch

from minidpost.errors import UserError, when_memory_runs_out
from minidpost.models.hf_config import Model, read_config
from minidpost.models.hub import find_model
from minidpost.models.weights import TEMPLATES, empty_model, load_model, load_template
from minidpost.precision import DTYPES, MIN_PARAMETERS_FOR_BF16, default_device, prepare_device, sampling_dtype
from minidpost.processes import (
    common_exit_status,
    is_first_to_fail,
    is_lost_connection,
    is_of_backend,
    on_rank_0,
    own_device,
    process_group,
    rank,
    started_by_torchrun,
    world_size,
)
from minidpost.selftraining.estimates import slots_for
from minidpost.selftraining.presets import n_parameters, preset_of
from minidpost.selftraining.run_directory import json_object
from minidpost.storage import no_room, read_json
from minidpost.text.templates import Template
from minidpost.training.state import Terminated, interrupt

RUNS = Path("runs")
SEED = 42
SLOTS = 64  # on a CPU
MAX_MESSAGE = 1000  # characters in a message
TEMPLATE_TEXT = (
    "how a decoder-only model is asked: the paper's Alpaca frame, or the checkpoint's own chat format (default: as the "
    "checkpoint was trained here, else alpaca)"
)
DEVICE_TEXT = "cpu, cuda, … (default: cuda if any)"
MAX_COUNT = 10**6  # of rows, tokens, samples …: what is larger must be a typing error

Value = TypeVar("Value", int, float)


def run_command(main: Callable[[], None], if_interrupted: str = "nothing was written") -> None:
    """Run a command's main and exit with a status that says how it ended.

    0: done. 1: the reader of a pipe went away. 2: a mistake of the user's, too little memory or a full disk, with one
    line on standard error. 130: Ctrl-C. 143: SIGTERM. `if_interrupted` is what becomes of the work after Ctrl-C,
    SIGTERM or a full disk, as the last words of that line, unless a note of the exception says it (see job.Job). Of
    several processes (torchrun) the one that fails first says why, and all end with its status.
    """
    try:
        with process_group():
            _run_process(main, if_interrupted)
    except UserError as error:  # there is no group, and so nobody to agree with on who speaks
        print(f"{os.path.basename(sys.argv[0])}: {one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as end:  # --help
        if started_by_torchrun():
            _end_at_once(int(end.code or 0))
        raise
    if started_by_torchrun():
        _end_at_once(0)


def _end_at_once(status: int) -> NoReturn:
    """End one of several processes without what Python and torch do at the end.

    After an error that may wait for ranks that are waiting for this one. After success a thread of gloo's may abort the
    process, by asking for Python's lock while Python ends: about one run in some hundred.
    """
    with suppress(OSError):  # a full disk
        sys.stderr.flush()
        sys.stdout.flush()
    os._exit(status)


def _run_process(main: Callable[[], None], if_interrupted: str) -> None:
    """`run_command` of one of the processes, or of the only one."""
    name = os.path.basename(sys.argv[0])

    def ending(error: BaseException) -> str:
        notes: list[str] = vars(error).get("__notes__", [])
        return notes[-1] if notes else if_interrupted

    # torchrun ends the other processes as soon as one has ended: they may end by themselves, with the same status.
    sigterm_at_the_end = signal.SIG_DFL if world_size() == 1 else signal.SIG_IGN

    def fail(status: int, message: str | None = None) -> NoReturn:
        signal.signal(signal.SIGTERM, sigterm_at_the_end)
        if not is_first_to_fail(status):
            status = common_exit_status(status)
        elif message is not None:
            print(message, file=sys.stderr)
        if world_size() == 1:
            sys.exit(status)
        _end_at_once(status)  # torchrun ends the others

    # What the handler raises may come out of a library's C code as another error, such as a ValueError.
    was_terminated = threading.Event()

    def terminate(number: int, frame: FrameType | None = None) -> None:
        was_terminated.set()
        interrupt(number, frame)

    def format_warning(
        message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
    ) -> str:
        return f"{name}: warning: {one_line(message)}\n"

    warnings.formatwarning = format_warning
    if rank() > 0:
        warnings.simplefilter("ignore")  # rank 0 warns of the same
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack characters that a model has
    try:
        signal.signal(signal.SIGTERM, terminate)
        with when_memory_runs_out("fewer --slots or --max-new-tokens need less"):
            main()
        sys.stdout.flush()  # here, so that a closed pipe is noticed while it can be handled
    except KeyboardInterrupt as interruption:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would only garble the message
        status = 143 if isinstance(interruption, Terminated) else 130
        fail(status, f"\n{name}: interrupted; {ending(interruption)}")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        fail(1)
    except Exception as error:
        if was_terminated.is_set():
            fail(143, f"\n{name}: interrupted; {ending(error)}")
        if isinstance(error, UserError):
            fail(2, f"{name}: {one_line(error)}")
        reason = no_room(error)
        if reason is not None:
            fail(2, f"{name}: cannot write ({reason}); {ending(error)}")
        if isinstance(error, OSError) and error.filename is not None:
            fail(2, f"{name}: {one_line(f'{error.filename}: {error.strerror}')}")
        if is_lost_connection(error):
            fail(1, f"{name}: another process has ended ({one_line(error):.200}); {ending(error)}")
        if is_of_backend(error):  # whose reason stands at the end
            fail(1, f"{name}: {one_line(error)}; {ending(error)}")
        if world_size() == 1:
            raise
        fail(1, traceback.format_exc().rstrip())
    finally:
        signal.signal(signal.SIGTERM, sigterm_at_the_end)


def one_line(message: object) -> str:
    """A message as it can be shown: one line of at most MAX_MESSAGE characters, control characters as U+FFFD."""
    text = " ".join(str(message).split())
    if len(text) > MAX_MESSAGE:
        text = text[: MAX_MESSAGE - 1] + "…"
    return "".join(character if character.isprintable() else "\ufffd" for character in text)


class Parser(argparse.ArgumentParser):
    """argparse's parser, but that a mistake is a UserError of one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Raise a UserError instead of printing the usage and exiting."""
        raise UserError(f"{message} (--help lists the flags)")

    def warn_without(self, options: argparse.Namespace, names: Sequence[str], needed: str) -> None:
        """A warning where one of these flags was given, without what it `needed` to have an effect.

        A flag that was not given is None or False, so that a default other than that is put in later.
        """
        for name in names:
            if vars(options)[name] not in (None, False):
                warnings.warn(f"--{name.replace('_', '-')}: has no effect without {needed}", stacklevel=1)

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """argparse's; UserError at arguments that are not UTF-8, as they could not be written into any file."""
        arguments = list(sys.argv[1:] if args is None else args)
        for argument in arguments:
            # Python has bytes that are not UTF-8 as lone surrogates.
            if any("\ud800" <= character <= "\udfff" for character in argument):
                self.error(f"argument {argument!r:.80} is not UTF-8")
        return super().parse_known_args(arguments, namespace)


def model_parser(description: str) -> Parser:
    """A parser with the flags of every command that loads one model and samples from it."""
    parser = Parser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--checkpoint",
        metavar="DIR",
        help="a directory, a model's name, a .gguf file (not of a T5), or OWNER/NAME[@REVISION] of the hub (default: "
        "the best on dev of the newest run, else tiny-t5-dpo-st)",
    )
    parser.add_argument("--template", choices=TEMPLATES, help=TEMPLATE_TEXT)
    parser.add_argument(
        "--max-new-tokens", type=POSITIVE, default=300, metavar="N", help="longest completion, in tokens (default: 300)"
    )
    parser.add_argument(
        "--slots",
        type=POSITIVE,
        metavar="N",
        help=f"rows decoded at once (default: {SLOTS}; on a GPU more, by its memory)",
    )
    parser.add_argument("--seed", type=int, default=SEED, metavar="N", help=f"of samples (default: {SEED})")
    parser.add_argument("--device", type=device, default=default_device(), help=DEVICE_TEXT)
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help=f"of weights: {dtype_text('sampling')}",
    )
    return parser


def dtype_text(work: str) -> str:
    """What a flag's "auto" is for "sampling" or "training"."""
    n_millions = MIN_PARAMETERS_FOR_BF16[work] / 1e6
    return (
        f"auto is bf16 on a GPU that has it and, for models of at least {n_millions:.0f} million parameters, on a CPU "
        "with AVX512-BF16 or AMX, else fp32 (default: auto)"
    )


def add_data_dir(parser: Parser) -> None:
    """Add --data-dir, of every command that reads datasets."""
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="where datasets lie or are fetched to (default: data)",
    )


def checked(kind: Callable[[str], Value], allowed: Callable[[Value], bool], wanted: str) -> Callable[[str], Value]:
    """A flag's type for argparse: what `kind` reads and `allowed` accepts; `wanted` says in words what that is."""

    def parse(text: str) -> Value:
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
# Logits divided by less than a thousandth may overflow.
TEMPERATURE = checked(float, lambda value: value == 0 or 1e-3 <= value <= 1e3, "0 or a number from 0.001 to 1000")
MINUTES = checked(float, lambda value: 0 <= value < float("inf"), "a number of minutes")
FRACTION = checked(float, lambda value: 0 < value <= 1, "a number above 0 and at most 1")


def device(text: str) -> str:
    """A flag's type for argparse: a device that tensors can be put on; of several processes each has its own GPU."""
    try:
        if started_by_torchrun() and torch.device(text).index is not None:
            raise argparse.ArgumentTypeError(f"each process has a device of its own, so that {text!r} cannot be used")
        text = own_device(text)
        torch.zeros(1, device=text).item()
    except (RuntimeError, AssertionError):  # torch asserts where it was built without the device
        raise argparse.ArgumentTypeError(f"{text!r} cannot be used here; cpu always can") from None
    prepare_device(text)
    return text


def add_output(parser: Parser, what: str) -> None:
    """Add --output and --overwrite, of a command whose output survives a kill (see job.py)."""
    parser.add_argument(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"{what}; it gets its name when it is whole. Until then FILE.progress has what is done, and the same "
        "command goes on there after Ctrl-C or a kill; with other settings it is refused. A FILE that is there "
        "already is refused too",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a FILE that is there, when the new one is whole; and drop what a command with other settings "
        "left unfinished",
    )


def check_output(flag: str, path: Path | None, *, overwrite: bool, progress: Path | None) -> None:
    """UserError where an output file exists and is not to be overwritten, or could not be written when it is needed.

    Where there is the `progress` of a job, the file may be what that job has just finished: the job decides (job.Job).
    """
    if path is None:
        return
    may_exist = overwrite or (progress is not None and progress.exists())
    if path.is_dir():
        raise UserError(f"{flag} {path}: is a directory")
    if path.exists() and not may_exist:
        raise UserError(f"{flag} {path}: exists already; --overwrite replaces it, or choose another name")
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f"{flag} {path}: {parent} is no directory that can be written to")


def open_model(options: argparse.Namespace) -> tuple[Path, Model, Template]:
    """The directory, the model and the template that --checkpoint, --template, --device and --dtype ask for.

    Without a checkpoint it is the newest run's model that was best on dev, which is then said on standard error.
    Without --slots as many are noted in `options` as the device has memory for. UserError: no such model, or a broken
    one.
    """
    template_name = options.template
    if options.checkpoint is not None:
        directory = on_rank_0(lambda: named_model(options.checkpoint))
    else:
        directory, template_of_run = on_rank_0(default_checkpoint)
        template_name = template_name or template_of_run
        if rank() == 0:
            print(f"model: {directory}", file=sys.stderr)
    template = load_template(directory, template_name)  # before the weights, which take longer to read
    dtype = sampling_dtype(options.dtype, options.device, n_parameters(empty_model(read_config(directory))))
    model = load_model(directory, dtype, options.device)
    if options.slots is None:
        preset = replace(preset_of(model.config, "sft"), slots=SLOTS, max_new_tokens=options.max_new_tokens)
        options.slots = slots_for(model, preset, dtype, options.device)
    return directory, model, template


def default_checkpoint() -> tuple[Path, str | None]:
    """The model of the newest run that was best on dev; without a run, the bundled one that has learnt the task.

    And the template that it was asked by, where the model does not record it: None for the one that it has.
    """
    for results in sorted(RUNS.glob("*/results.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        run = results.parent
        directory = best_of_run(run)
        if directory is not None:
            # A model of the run's records its template; the base, which may be the best without a warm-up, does not.
            return directory, None if directory.is_relative_to(run) else template_of_run(run)
    return find_model("tiny-t5-dpo-st"), None


def named_model(name: str) -> Path:
    """The directory of what --model or --checkpoint names (`find_model`).

    UserError also for the directory of a run or of one of its iterations, with the path of a model in it.
    """
    path = Path(name)
    if is_run_directory(path):
        best, last = best_of_run(path), last_of_run(path)
        if best is not None:
            advice = f"its best model on dev is {best}"
        elif last is not None:
            advice = f"its last model is {last}"
        else:
            advice = "no model of it is here yet"
        raise UserError(f"{name}: a run's directory, not a model's; {advice}")
    if not (path / "config.json").is_file():
        last = last_of_iteration(path)
        if last is not None:
            raise UserError(f"{name}: an iteration of a run, not a model's directory; its model is {last}")
    return find_model(name)


def is_run_directory(path: Path) -> bool:
    """Whether a directory's config.json is that of a run, and not a model's."""
    try:
        return "settings" in json_object(path / "config.json")
    except (OSError, ValueError, TypeError):
        return False


def best_of_run(run: Path) -> Path | None:
    """A run's model that was best on dev; None where results.json is missing, of an older format, or not ours."""
    try:
        content: Any = read_json(run / "results.json")
        checkpoint = content["iterations"][content["best_iteration"]]["checkpoint"]
        if checkpoint is None:  # without a warm-up the base itself may be the best one
            # Older runs do not say what --model was, only what the directory was called that it stood for.
            directory = find_model(content.get("base", content["model"]))
        else:
            directory = run / checkpoint
    except (OSError, ValueError, LookupError, TypeError, UserError):
        return None
    return directory if has_model(directory) else None


def template_of_run(run: Path) -> str | None:
    """The --template of a run; None where none was given, or its config.json is of an older format."""
    try:
        content: Any = read_json(run / "config.json")
        template: str | None = content["settings"]["template"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return template


def last_of_run(run: Path) -> Path | None:
    """The last model that a run has finished and kept; None where there is none."""
    iterations = [path for path in run.glob("iteration-*") if path.name.removeprefix("iteration-").isdecimal()]
    iterations.sort(key=lambda path: int(path.name.removeprefix("iteration-")), reverse=True)
    models = (last_of_iteration(path) for path in iterations)
    return next((model for model in models if model is not None), None)


def last_of_iteration(iteration: Path) -> Path | None:
    """The last model of an iteration that is finished and was kept: SFT's, else DPO's, else None."""
    return next((iteration / name for name in ("sft", "dpo") if has_model(iteration / name)), None)


def has_model(directory: Path) -> bool:
    """Whether a model's files are here; `--keep` removes weights."""
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))
