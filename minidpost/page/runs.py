"""What a run directory holds, as plain data: finished, stopped, running, of an older format, or broken.

Nothing here raises because of what a file holds, takes a lock or writes: what cannot be read is left out and said in
`RunFiles.notes`. Values are checked as they are read, so that the rest of the page need not: scores are finite numbers,
outcomes are 0 or 1, names are texts.
"""

import math
import os
import re
import stat
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from minidpost.errors import UserError
from minidpost.models.hf_config import LLAMA_FAMILIES
from minidpost.selftraining.methods import METHODS
from minidpost.selftraining.report import assemble_results
from minidpost.selftraining.run_directory import FORMAT, LOCK, json_object
from minidpost.storage import read_json, read_jsonl

# What broken or foreign JSON makes of reading it.
BROKEN = (OSError, ValueError, LookupError, TypeError, AttributeError, UserError, ArithmeticError)
LOCKS = Path("/proc/locks")  # Linux's list of locks, by which a running run is known without touching its lock
TEMPORARY = re.compile(r"\.?(.+?)(?:\.[0-9]+)?\.(?:unfinished|progress)")  # the names of a stage at work
MODEL = re.compile(r"iteration-([0-9]{1,4})/(sft|dpo)")  # a run's models, within its directory
BEGUN = re.compile(r"[0-9:]{8} (iteration-[0-9]{1,4}/[a-z.-]+)")  # a line of log.txt that begins a stage
# The decoder-only families, by a base model's name, where a run has no model yet whose config.json would say it.
DECODER_ONLY_NAMES = re.compile(r"llama|qwen|mistral|smollm", re.IGNORECASE)
MAX_LOG_LINES = 200  # of log.txt, the newest
MAX_NOTES = 20  # of one run
MAX_ITERATIONS = 1000

# The columns of log.jsonl that the page shows, of SFT and of DPO.
SFT_METRICS = ("loss", "lr", "grad_norm", "tokens_per_second", "n_tokens")
DPO_METRICS = ("chosen_logp", "rejected_logp", "margin", "accuracy")

Value = TypeVar("Value")


class Files:
    """Reads files, and keeps what it made of them for as long as their size and time of change stay the same."""

    def __init__(self) -> None:
        self._known: dict[tuple[Path, str], tuple[tuple[int, int], Any]] = {}

    def read(self, path: Path, parse: Callable[[Path], Value]) -> Value:
        """What `parse` makes of a file; whatever that raises is not kept."""
        status = path.stat()
        version = (status.st_size, status.st_mtime_ns)
        key = (path, parse.__name__)
        if key not in self._known or self._known[key][0] != version:
            self._known[key] = (version, parse(path))
        value: Value = self._known[key][1]
        return value


@dataclass
class Training:
    """The log of one training stage: columns of equal length, None where a value is no finite number."""

    stage: str
    is_finished: bool
    columns: dict[str, list[float | None]]


@dataclass(frozen=True)
class Measured:
    """What eval.py measured of a run's model: the file, the model ("2/sft"), scores by set and calculator.

    `completions` is the file of the completions themselves, where there is one.
    """

    path: Path
    model: str
    scores: dict[tuple[str, bool], dict[str, Any]]
    completions: Path | None


@dataclass
class RunFiles:
    """A run directory as it is on the disk.

    `state` is "finished", "running", "stopped", or "unfinished" where it cannot be said whether it runs. `results` has
    the shape of results.json, None before the first evaluation; `evaluations` are the contents of evaluation.json by
    iteration; `stages` the lines of stages.jsonl; `measured` is what files of eval.py say of the run's models.
    """

    path: Path
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    format: object = None
    model_type: str | None = None  # of the models that it has made, as their config.json names it
    versions: dict[str, str] = field(default_factory=dict)
    state: str = "unfinished"
    results: dict[str, Any] | None = None
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    stages: list[dict[str, Any]] = field(default_factory=list)
    trainings: list[Training] = field(default_factory=list)
    at_work: list[str] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    written_at: float = 0.0  # seconds since 1970: when the newest of its files was written
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> None:
        """Remember what could not be read, up to MAX_NOTES."""
        if len(self.notes) < MAX_NOTES and text not in self.notes:
            self.notes.append(text)

    def setting(self, name: str, default: Any = None) -> Any:
        """One of the run's settings, those of its preset included."""
        preset = self.settings.get("preset")
        values = {**(preset if isinstance(preset, dict) else {}), **self.settings}
        return values.get(name, default)

    @property
    def model(self) -> str:
        """The base model's name."""
        return str(self.settings.get("model", "?"))

    @property
    def is_decoder_only(self) -> bool:
        """Whether its models are of Llama's kind."""
        if self.model_type is not None:
            return self.model_type in LLAMA_FAMILIES
        return DECODER_ONLY_NAMES.search(self.model) is not None

    @property
    def method(self) -> str:
        """The method's name."""
        return str(self.settings.get("method", "?"))

    @property
    def data_name(self) -> str:
        """The name of the data: of the dataset, or of the user's file without its suffix."""
        return Path(str(self.settings.get("data", "?"))).stem

    @property
    def dev(self) -> str:
        """The name of the set by which an iteration is chosen."""
        return f"{self.data_name}/dev"

    @property
    def test(self) -> str:
        """The name of the test set of the same data."""
        return f"{self.data_name}/test"

    @property
    def seed(self) -> object:
        """The run's seed."""
        return self.settings.get("seed", "?")

    @property
    def n_iterations(self) -> int | None:
        """How many iterations there are to be after the warm-up; None where the settings do not say."""
        rules = METHODS.get(self.method)
        if rules is not None and not rules.iterates:
            return 0
        n_iterations = self.setting("iterations")
        return n_iterations if type(n_iterations) is int and 0 <= n_iterations <= MAX_ITERATIONS else None

    def correct(self, iteration: int, set_name: str, model: str = "sft") -> list[int] | None:
        """1 or 0 for each question of an evaluation set, as a model of an iteration answered it greedily."""
        if iteration >= len(self.evaluations):
            return None
        score = self.evaluations[iteration].get(model, {}).get("greedy", {}).get(set_name)
        return None if score is None else score["correct"]


# -- which runs -------------------------------------------------------------------------------------------------------


def find_runs(paths: list[Path]) -> list[Path]:
    """The run directories that were named, and those inside the directories that were named and are none themselves.

    UserError: a name that is no directory, or no run anywhere.
    """
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: no such directory; a run's directory, or one that holds some, is expected")
        inner = [] if is_run(path) else sorted(child for child in path.iterdir() if child.is_dir() and is_run(child))
        found += inner or [path]
    return list(dict.fromkeys(found))


def is_run(path: Path) -> bool:
    """Whether a directory is a run's, to judge by the names in it."""
    names = ("log.txt", "stages.jsonl", "results.json", "iteration-0")
    try:
        return (path / "config.json").is_file() and any((path / name).exists() for name in names)
    except OSError:  # a directory that may not be looked into
        return False


def run_names(paths: list[Path]) -> list[str]:
    """A name for each run: its directory's, with as much of the path before it as tells it from the others."""
    names = [path.resolve().name for path in paths]
    return [name if names.count(name) == 1 else str(path) for name, path in zip(names, paths, strict=True)]


# -- one run ----------------------------------------------------------------------------------------------------------


def read_run(path: Path, name: str, files: Files) -> RunFiles:
    """Everything about a run but its samples (questions.py)."""
    run = RunFiles(path, name)
    try:
        if not path.is_dir():
            run.note("no such directory")
            return run
        if not is_run(path):
            run.note("not a run directory: it has no config.json and log.txt as train.py writes them")
            return run
        read_config(run, files)
        read_stages(run, files)
        read_evaluations(run, files)
        read_results(run, files)
        read_model_type(run, files)
        read_trainings(run, files)
        read_log(run)
        run.state = state_of(run)
    except OSError as error:
        run.note(f"{error.filename}: {error.strerror}")
    return run


def read_config(run: RunFiles, files: Files) -> None:
    """Settings and versions; a note where the format is another than this code writes."""
    try:
        content = files.read(run.path / "config.json", json_object)
        settings = content.get("settings")
        if not isinstance(settings, dict):
            raise ValueError("no settings in it; a model's directory?")
        run.settings = settings
        run.format = content.get("format", 1)
        versions = content.get("versions")
        if isinstance(versions, dict):
            run.versions = {str(key): str(value) for key, value in versions.items()}
    except BROKEN as error:
        run.note(f"config.json: {reason(error)}")
        return
    if run.format != FORMAT:
        run.note(f"of format {run.format!r:.20}; this code writes {FORMAT}. Shown as far as it can be read")


def read_stages(run: RunFiles, files: Files) -> None:
    """The finished stages, and those at work under their temporary names."""
    path = run.path / "stages.jsonl"
    if path.is_file():
        for number, record in records_of(run, path, files):
            try:
                run.stages.append(checked_stage(record))
            except BROKEN as error:
                run.note(f"stages.jsonl, line {number}: {reason(error)}")
    at_work = set()
    for iteration in iterations_of(run.path):
        for entry in sorted(iteration.iterdir()):
            match = TEMPORARY.fullmatch(entry.name)
            if match and not (iteration / match[1]).exists():
                at_work.add(f"{iteration.name}/{match[1]}")
    run.at_work = sorted(at_work)


def iterations_of(path: Path) -> list[Path]:
    """The directories of a run's iterations, in order."""
    found = []
    for entry in path.glob("iteration-*"):
        number = entry.name.removeprefix("iteration-")
        if entry.is_dir() and number.isascii() and number.isdigit() and int(number) <= MAX_ITERATIONS:
            found.append((int(number), entry))
    return [entry for _, entry in sorted(found)]


def checked_stage(record: Mapping[str, Any]) -> dict[str, Any]:
    """A line of stages.jsonl without the hashes, and without what is no number: a name, and numbers."""
    stage: dict[str, Any] = {"stage": text(record["stage"])}
    for name, value in record.items():
        if name not in ("stage", "sha256", "removed", "continued"):
            stage[name] = number(value)
    stage.setdefault("seconds", 0.0)
    return stage


def read_evaluations(run: RunFiles, files: Files) -> None:
    """evaluation.json of each iteration, up to the first that is missing or broken."""
    for iteration in range(MAX_ITERATIONS):
        path = run.path / f"iteration-{iteration}" / "evaluation.json"
        if not path.is_file():
            return
        try:
            run.evaluations.append(checked_evaluation(files.read(path, read_json)))
        except BROKEN as error:
            run.note(f"iteration-{iteration}/evaluation.json: {reason(error)}")
            return


def read_results(run: RunFiles, files: Files) -> None:
    """What results.json has, or would have: it is written at the end of each iteration, the evaluations before that.

    A run that has no evaluation.json may still have its results.json.
    """
    path = run.path / "results.json"
    try:
        if run.evaluations:
            content: Any = assemble_results(
                model=run.model,
                method=run.method,
                seed=run.settings.get("seed", 0),
                settings=run.settings,
                data_name=run.data_name,
                has_warm_up=run.setting("warm_up") is not False,
                stages={stage["stage"]: stage for stage in run.stages},
                evaluations=run.evaluations,
            )
        elif path.is_file():
            content = files.read(path, read_json)
        else:
            return
        run.results = checked_results(content)
    except BROKEN as error:
        run.note(f"the results cannot be put together: {reason(error)}")


def read_model_type(run: RunFiles, files: Files) -> None:
    """The family of the first model that the run has made."""
    paths = [iteration / "sft" / "config.json" for iteration in iterations_of(run.path)]
    path = next((path for path in paths if path.is_file()), None)
    if path is not None:
        try:
            run.model_type = text(files.read(path, json_object)["model_type"])
        except BROKEN as error:
            run.note(f"{path.relative_to(run.path)}: {reason(error)}")


def read_trainings(run: RunFiles, files: Files) -> None:
    """The log of every training, in the order in which they are made; of one at work as far as it is."""
    for iteration in iterations_of(run.path):
        for kind in ("dpo", "sft"):
            finished = iteration / kind / "log.jsonl"
            at_work = iteration / f"{kind}.unfinished" / "log.jsonl"
            path = finished if finished.is_file() else at_work
            if path.is_file():
                columns = columns_of([record for _, record in records_of(run, path, files)], kind)
                run.trainings.append(Training(f"{iteration.name}/{kind}", path == finished, columns))


def columns_of(records: list[dict[str, Any]], kind: str) -> dict[str, list[float | None]]:
    """The lines of a log as columns."""
    names = ("step", *SFT_METRICS, *(DPO_METRICS if kind == "dpo" else ()))
    return {name: [number_or_none(record.get(name)) for record in records] for name in names}


def read_log(run: RunFiles) -> None:
    """The end of log.txt, and the stage that it says was begun last."""
    path = run.path / "log.txt"
    if path.is_file():
        with open(path, "rb") as stream:
            stream.seek(max(0, path.stat().st_size - 2**16))
            run.log = stream.read().decode("utf-8", "replace").splitlines()[-MAX_LOG_LINES:]
    # A stage is logged when it begins; some have nothing under a temporary name before they are nearly done.
    begun = [match[1] for line in run.log if (match := BEGUN.match(line))]
    if begun and not (run.path / begun[-1]).exists():
        run.at_work = sorted({*run.at_work, begun[-1]})


def state_of(run: RunFiles) -> str:
    """Whether a run is finished, at work, or stopped; sets when it was last written."""
    newest = 0.0
    for folder in (run.path, *iterations_of(run.path)):
        for entry in (*folder.iterdir(), *folder.glob("*.unfinished/log.jsonl"), *folder.glob("*.progress/*")):
            newest = max(newest, entry.lstat().st_mtime)
    run.written_at = newest
    has_stopped = (run.path / "stopped.json").is_file()
    is_complete = run.n_iterations is not None and len(run.evaluations) > run.n_iterations
    is_at_work = is_locked(run.path / LOCK)
    if is_at_work:
        return "running"
    if (has_stopped or is_complete) and not run.at_work:
        return "finished"
    return "unfinished" if is_at_work is None else "stopped"


def is_locked(path: Path) -> bool | None:
    """Whether a process has locked a file, by the system's list of locks; None where there is no such list.

    The file is not opened: where this process had locked it itself, closing it again would end that lock.
    """
    try:
        status = path.stat()
        held = LOCKS.read_text(encoding="ascii")
    except (OSError, ValueError):
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    inode = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    return any(inode in line.split() for line in held.splitlines())


# -- files of eval.py -------------------------------------------------------------------------------------------------


def attach_measured(runs: Sequence[RunFiles], paths: Sequence[Path], files: Files) -> None:
    """Give each run what `eval.py --output FILE` measured of its models, by the checkpoint that the file names.

    Completions (`--save-completions`) are looked for in a file of the same name that ends in .jsonl. UserError: a file
    that cannot be read, or that is of none of these runs.
    """
    for path in paths:
        try:
            content = files.read(path, json_object)
            checkpoint = Path(text(content["checkpoint"])).resolve()
            scores = {
                (text(result["task"]), result["calculator"] is True): checked_score(result["accuracy"])
                for result in content["results"]
            }
        except BROKEN as error:
            raise UserError(f"{path}: not what eval.py --output writes ({reason(error)})") from None
        owners = [run for run in runs if run.path.resolve() in checkpoint.parents]
        match = MODEL.fullmatch(f"{checkpoint.relative_to(owners[0].path.resolve())}") if owners else None
        if match is None:
            raise UserError(f"{path}: measures {checkpoint}, which is no model of these runs")
        completions = path.with_suffix(".jsonl")
        measured = Measured(path, f"{match[1]}/{match[2]}", scores, completions if completions.is_file() else None)
        owners[0].measured.append(measured)


# -- checked values ---------------------------------------------------------------------------------------------------


def records_of(run: RunFiles, path: Path, files: Files) -> list[tuple[int, dict[str, Any]]]:
    """The records of a JSONL file up to the first broken line, which is noted; the last one may be being written."""
    records, broken = files.read(path, whole_records)
    if broken is not None:
        run.note(f"{path.relative_to(run.path)}: {broken}")
    return records


def whole_records(path: Path) -> tuple[list[tuple[int, dict[str, Any]]], str | None]:
    """The line numbers and records of a JSONL file, and what is wrong with it from there on.

    A last line without its end is being written at this moment, which is nothing wrong.
    """
    records: list[tuple[int, dict[str, Any]]] = []
    try:
        for line_number, record in read_jsonl(path):
            records.append((line_number, record))
    except UserError as error:
        return records, None if ends_within_a_line(path) else str(error).removeprefix(f"{path}, ")
    return records, None


def ends_within_a_line(path: Path) -> bool:
    """Whether the broken line of a file is its last one, and lacks its end."""
    with open(path, "rb") as stream:
        stream.seek(max(0, path.stat().st_size - 1))
        return stream.read() not in (b"", b"\n") and path.parent.name.endswith((".unfinished", ".progress"))


def reason(error: BaseException) -> str:
    """Why something could not be read, in one short line."""
    if isinstance(error, OSError):
        return error.strerror or "cannot be read"
    if isinstance(error, KeyError):
        return f"{error.args[0]!r:.60} is missing"
    return f"not what train.py writes ({error!s:.120})"


def text(value: object) -> str:
    """A value that is a text; ValueError for others."""
    if not isinstance(value, str):
        raise ValueError(f"a text is expected, found {type(value).__name__}")
    return value


def number(value: object) -> float:
    """A value that is a finite number; ValueError for others."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"a finite number is expected, found {value!r:.40}")
    return value


def number_or_none(value: object) -> float | None:
    """A finite number, or None: a loss may have become NaN."""
    try:
        return number(value)
    except (ValueError, OverflowError):
        return None


def count(value: object) -> int:
    """A value that is a whole number from 0 up; ValueError for others."""
    if type(value) is not int or value < 0:
        raise ValueError(f"a count is expected, found {value!r:.40}")
    return value


def optional_count(value: object) -> int | None:
    """A count, or None."""
    return None if value is None else count(value)


def checked_score(score: Mapping[str, Any]) -> dict[str, Any]:
    """A score's value, n and interval."""
    return {**{name: number(score[name]) for name in ("value", "low", "high")}, "n": count(score["n"])}


def checked_scores(scores: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Scores by the name of a set, or by k."""
    return {text(name): checked_score(score) for name, score in scores.items()}


def checked_outcomes(outcomes: object, largest: int = 1) -> list[int]:
    """A list of counts up to `largest`, of which each is a question's."""
    if not isinstance(outcomes, list) or any(type(value) is not int or not 0 <= value <= largest for value in outcomes):
        raise ValueError(f"a list of whole numbers from 0 to {largest} is expected")
    return outcomes


def checked_evaluation(content: Any) -> dict[str, Any]:
    """The content of an evaluation.json: "sft", and "dpo" where there was one."""
    evaluation = {}
    for model in ("sft", "dpo"):
        if model not in content and model == "dpo":
            continue
        scores = content[model]
        greedy = {}
        for name, score in scores["greedy"].items():
            correct = checked_outcomes(score["correct"])
            greedy[text(name)] = {**checked_score(score), "correct": correct}
        sampled = scores["sampled"]
        if sampled is not None:
            n_samples = count(sampled["n_samples"])
            sampled = {
                "n_samples": n_samples,
                "n_correct": checked_outcomes(sampled["n_correct"], n_samples),
                "majority": {text(k): checked_outcomes(values) for k, values in sampled["majority"].items()},
                "pass_at": checked_scores(sampled["pass_at"]),
                "maj_at": checked_scores(sampled["maj_at"]),
            }
        evaluation[model] = {"greedy": greedy, "sampled": sampled}
    return evaluation


def checked_results(content: Any) -> dict[str, Any]:
    """The parts of a results.json that the page uses."""
    iterations = []
    for index, entry in enumerate(content["iterations"]):
        if count(entry["iteration"]) != index:
            raise ValueError("iterations out of order")
        iterations.append(
            {
                "iteration": index,
                "checkpoint": None if entry["checkpoint"] is None else text(entry["checkpoint"]),
                **checked_model_scores(entry),
                "dpo": None if entry["dpo"] is None else checked_dpo(entry["dpo"]),
                "pairs": optional_count(entry["pairs"]),
                "pseudo_labels": optional_count(entry["pseudo_labels"]),
                "seconds": number(entry["seconds"]),
                "flops": number(entry["flops"]),
            }
        )
    if not iterations:
        raise ValueError("no iteration in it")
    best = count(content["best_iteration"])
    dev = text(content["dev"])
    if best >= len(iterations) or any(dev not in entry["accuracy"] for entry in iterations):
        raise ValueError(f"no accuracy on {dev}")
    return {
        "model": text(content["model"]),
        "method": text(content["method"]),
        "seed": content["seed"] if isinstance(content["seed"], int) else 0,
        "dev": dev,
        "test": text(content["test"]),
        "iterations": iterations,
        "best_iteration": best,
    }


def checked_model_scores(scores: Mapping[str, Any]) -> dict[str, Any]:
    """The scores of one model in a results.json."""
    return {name: checked_scores(scores[name]) for name in ("accuracy", "pass_at", "maj_at")}


def checked_dpo(content: Mapping[str, Any]) -> dict[str, Any]:
    """What a results.json says of the model that a DPO made."""
    scores = {"checkpoint": text(content["checkpoint"]), **checked_model_scores(content)}
    difference = content["difference"]
    kinds = ("accuracy", "pass_at", "maj_at")
    return {**scores, "difference": {kind: checked_scores(difference[kind]) for kind in kinds}}
