"""A part of the corruption test, and that it would notice a command that behaves otherwise."""

import random

import pytest
from fault_injection import corrupt

REFUSED = corrupt.Case("flags", "", ["sample.py"])
HARMLESS = corrupt.Case("JSONL", "", ["sample.py"], expected="harmless")
WARNED = corrupt.Case("JSONL", "", ["sample.py"], expected="1 rows left out")
GOOD = corrupt.Outcome(0, "7", "sampling: 100%|███| 2/2\n", (), "7")


@pytest.mark.slow
def test_a_part_of_all_corrupted_inputs():
    every = list(corrupt.cases(seed=0))
    assert len(every) >= 300
    counts, failures = corrupt.run_cases(random.Random(1).sample(every, 100))
    assert failures == []
    assert counts.total() == 100


def outcome(**changes: object) -> corrupt.Outcome:
    return corrupt.Outcome(**{**vars(GOOD), **changes})


@pytest.mark.parametrize(
    ("case", "changes", "expected"),
    [
        (REFUSED, {"status": 2, "out": "", "err": "sample.py: no\n"}, "refused"),
        (REFUSED, {"status": 2, "out": "", "err": "sample.py: warning: odd\nx: 50%|█ |\rsample.py: no\n"}, "refused"),
        (REFUSED, {"status": 2, "out": "", "err": "sample.py: no\nand more\n"}, "failure"),
        (REFUSED, {"status": 2, "out": "", "err": "no\n"}, "failure"),
        (REFUSED, {"status": 2, "out": "", "err": "sample.py: \x1b[31mno\n"}, "failure"),
        (REFUSED, {"status": 2, "out": "", "err": "sample.py: warning: odd\n"}, "failure"),
        (REFUSED, {"status": 2, "out": "7", "err": "sample.py: no\n"}, "failure"),
        (REFUSED, {"status": 2, "out": "", "err": "sample.py: no\n", "changed": ("note",)}, "failure"),
        (REFUSED, {"status": 1, "out": "", "err": "Traceback\n"}, "failure"),
        (REFUSED, {"status": -11, "out": "", "err": ""}, "failure"),
        (REFUSED, {}, "failure"),
        (HARMLESS, {}, "harmless"),
        (HARMLESS, {"result": "8"}, "failure"),
        (HARMLESS, {"err": "sample.py: warning: odd\n"}, "failure"),
        (HARMLESS, {"status": 2, "err": "sample.py: no\n"}, "failure"),
        (WARNED, {"err": "sample.py: warning: a: 1 rows left out\n"}, "warned"),
        (WARNED, {}, "failure"),
    ],
)
def test_the_verdict(case, changes, expected):
    result, why = corrupt.verdict(case, outcome(**changes), GOOD)
    assert result == expected
    assert bool(why) == (expected == "failure")
