"""An evaluation against an earlier one, question by question: eval.py --baseline.

The earlier one is a JSON file of eval.py's, or a run directory of train.py's, of which the model that was best on dev
is taken. Both evaluations have the outcome of each question, so that the difference of two models has an interval of
its own, which is narrower than those of the two scores suggest (evaluation.paired_difference).
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from minidpost.data.example import Example
from minidpost.errors import UserError
from minidpost.selftraining.evaluation import Score, paired_difference, pass_at_k
from minidpost.selftraining.run_directory import json_object

Baseline = dict[tuple[str, bool], dict[str, Any]]  # by task and calculator: an entry of eval.py's results


def read_baseline(path: Path) -> Baseline:
    """The outcomes of an earlier evaluation; UserError where there are none at this path."""
    try:
        if path.is_dir():
            return _of_run(path)
        results = json_object(path)["results"]
        entries = {(entry["task"], entry["calculator"]): entry for entry in results}
        for entry in entries.values():
            _check_outcomes(entry["correct"], {0, 1})
            if "n_samples" in entry:
                _check_outcomes(entry["n_correct"], range(entry["n_samples"] + 1))
                for outcomes in entry["majority"].values():
                    _check_outcomes(outcomes, {0, 1})
    except OSError as error:
        raise UserError(f"--baseline {path}: cannot be read ({error.filename}: {error.strerror})") from None
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(
            f"--baseline {path}: a JSON file of eval.py --output with the outcomes of each question, or a finished run "
            "directory is expected"
        ) from None
    return entries


def questions_hash(examples: Sequence[Example]) -> str:
    """A short hash that identifies questions and their answers."""
    pairs = [(example.question, example.answer) for example in examples]
    return hashlib.sha256(repr(pairs).encode()).hexdigest()[:16]


def check_baseline(path: Path, baseline: Baseline, sets: Mapping[tuple[str, bool], Sequence[Example]]) -> None:
    """UserError where a baseline has none of the sets that are measured, or other questions in one of them."""
    if not sets.keys() & baseline.keys():
        known = ", ".join(f"{task} with calculator {'on' if on else 'off'}" for task, on in baseline)
        raise UserError(f"--baseline {path}: none of the tasks is in it; it has {known or 'nothing'}")
    for key in sets.keys() & baseline.keys():
        before = baseline[key]
        n = len(before["correct"])
        # A baseline of more questions than are measured now cannot be checked.
        if "questions" in before and n <= len(sets[key]) and questions_hash(sets[key][:n]) != before["questions"]:
            raise UserError(f"--baseline {path}: its questions of {key[0]} are others than those measured now")


def differences(result: Mapping[str, Any], before: Mapping[str, Any]) -> dict[str, Any]:
    """Result − baseline of every score that both entries have, over the first questions, which both have.

    As in a result, "accuracy" is a score's fields, "pass_at" and "maj_at" have them by k.
    """
    n = min(result["n"], len(before["correct"]))
    found: dict[str, Any] = {"accuracy": _difference(before["correct"], result["correct"], n)}
    n_samples = result.get("n_samples")
    if n_samples is None or before.get("n_samples") is None:
        return found
    found["pass_at"] = {}
    for k in result["pass_at"]:
        if int(k) <= before["n_samples"]:
            passed_before = [pass_at_k(before["n_samples"], c, int(k)) for c in before["n_correct"]]
            passed_after = [pass_at_k(n_samples, c, int(k)) for c in result["n_correct"]]
            found["pass_at"][k] = _difference(passed_before, passed_after, n)
    found["maj_at"] = {
        k: _difference(before["majority"][k], outcomes, n)
        for k, outcomes in result["majority"].items()
        if k in before["majority"]
    }
    return found


def _of_run(path: Path) -> Baseline:
    """The greedy outcomes of a run's best model on each of its sets."""
    best = json_object(path / "results.json")["best_iteration"]
    calculator = not json_object(path / "config.json")["settings"]["no_calculator"]
    evaluation = json_object(path / f"iteration-{best}" / "evaluation.json")
    entries = {}
    for task, scores in evaluation["sft"]["greedy"].items():
        _check_outcomes(scores["correct"], {0, 1})
        entries[task, calculator] = {"task": task, "calculator": calculator, "correct": scores["correct"]}
    return entries


def _check_outcomes(outcomes: Any, allowed: Any) -> None:
    """ValueError where outcomes are none, or others than allowed."""
    if not isinstance(outcomes, list) or not outcomes or any(outcome not in allowed for outcome in outcomes):
        raise ValueError("outcomes")


def _difference(before: Sequence[float], after: Sequence[float], n: int) -> dict[str, Any]:
    score: Score = paired_difference(before[:n], after[:n])
    return asdict(score)
