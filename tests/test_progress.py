"""Progress on a terminal, and in a file or a pipe."""

import sys

from tqdm import tqdm

from minidpost import progress
from minidpost.progress import Progress


def test_a_pipe_gets_a_line_a_minute_and_one_at_the_end(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Progress(total=10, desc="rows", unit="row", mininterval=0) as bar:
        for _ in range(10):
            now[0] += 21
            bar.set_postfix({"right": "5%"}, refresh=False)
            bar.update()
            tqdm.write("between", file=sys.stderr)
    err = capsys.readouterr().err
    assert "\r" not in err
    lines = [line for line in err.split("\n") if line != "between"]
    expected = [f"rows: {n}0%| {n}/10" for n in (3, 6, 9, 10)]
    assert [line.split(" [")[0] for line in lines] == [*expected, ""]
    assert all("right=5%" in line for line in lines[:-1])


def test_a_terminal_gets_a_bar(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    for _ in Progress(range(2), desc="rows"):
        pass
    err = capsys.readouterr().err
    assert "\r" in err
    assert "rows: 100%|██" in err
