"""Show runs: one HTML page of results, trainings and rationales, with the paper's tables and figures.

    python report.py                                   all runs under runs/, to report.html
    python report.py runs/mine runs/other --open       these two, and open the page
    python report.py runs/mine --export figures        also PNG, SVG, Markdown and LaTeX for a paper
    python report.py runs/mine scores.json             with what eval.py measured: greedy answers, the calculator off
    python report.py --watch 8000                      a page on this machine that shows runs as they grow

It reads the files of finished, stopped and running runs and changes none of them. The page is one file that needs
nothing else. What cannot be read is said on it.
"""

import argparse
import sys
import webbrowser
from pathlib import Path

from minidpost.cli import RUNS, Parser, add_data_dir, checked, one_line, run_command
from minidpost.errors import UserError
from minidpost.page.document import check_page, page_data, read_runs, write_page
from minidpost.page.export import export
from minidpost.page.runs import Files, RunFiles, find_runs, is_run
from minidpost.page.watch import Watched, new_server

BENCHMARK = Path("benchmarks") / "results" / "sampling.md"
OUTPUT = Path("report.html")
HOST = "127.0.0.1"
PORT = checked(int, lambda value: 0 <= value <= 65535, "a port from 0 (any that is free) to 65535")


def main() -> None:
    """Read the runs, write the page; or serve it."""
    options = parse_options()
    benchmark = options.benchmark or (BENCHMARK if BENCHMARK.is_file() else None)
    if options.watch is not None:
        serve(options, benchmark)
        return
    check_page(options.output)
    files = Files()
    runs = read_runs(find_runs(options.directories or default_runs()), files, evaluations=options.evaluations)
    check_any_readable(runs)
    write_page(
        options.output,
        runs,
        benchmark=benchmark,
        data_dir=options.data_dir,
        has_samples=not options.no_samples,
        files=files,
    )
    if options.export:
        data = page_data(runs, benchmark=benchmark, files=files, is_watched=False)
        names = export(data["exhibits"], options.export)
        print(f"{options.export}: {', '.join(names) or 'no exhibit can be drawn from these runs'}")
    for run in runs:
        for note in run.notes:
            print(f"{one_line(run.path)}: {one_line(note)}", file=sys.stderr)
    print(f"{options.output}: {len(runs)} run{'s' if len(runs) > 1 else ''}")
    if options.open:
        webbrowser.open(options.output.resolve().as_uri())


def parse_options() -> argparse.Namespace:
    """The command line; UserError for flags that contradict each other."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "runs",
        nargs="*",
        type=Path,
        metavar="RUN",
        help="a run's directory, or one that holds runs (default: runs); a .json file that eval.py --output wrote of a "
        "run's model, its completions beside it in a .jsonl of the same name",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"the page (default: {OUTPUT})")
    parser.add_argument("--open", action="store_true", help="open the page in the browser")
    parser.add_argument(
        "--export", type=Path, metavar="DIR", help="also write the exhibits as PNG, SVG, Markdown, LaTeX"
    )
    parser.add_argument(
        "--no-samples", action="store_true", help="leave the samples out: a smaller page, without questions to read"
    )
    parser.add_argument(
        "--benchmark",
        type=Path,
        metavar="FILE",
        help=f"what benchmarks/sampling.py wrote, for figure 4 (default: {BENCHMARK}, where it is there)",
    )
    parser.add_argument("--watch", type=PORT, metavar="PORT", help="serve the page instead of writing it")
    parser.add_argument("--host", help=f"with --watch: who may look (default: {HOST}, this machine alone)")
    add_data_dir(parser)
    options = parser.parse_args()
    options.evaluations = [path for path in options.runs if path.suffix == ".json"]
    options.directories = [path for path in options.runs if path.suffix != ".json"]
    if options.watch is None:
        parser.warn_without(options, ("host",), "--watch")
    else:
        parser.warn_without(options, ("output", "no_samples"), "a written page, and --watch writes none")
        if options.export:
            parser.error("--export writes files, which --watch does not")
    options.output = options.output or OUTPUT
    options.host = options.host or HOST
    return options


def default_runs() -> list[Path]:
    """The directory of all runs; UserError where there is none yet."""
    if not RUNS.is_dir() or not any(is_run(path) for path in RUNS.iterdir()):
        raise UserError(f"{RUNS}: no run here yet; python train.py makes one, or name a run's directory")
    return [RUNS]


def check_any_readable(runs: list[RunFiles]) -> None:
    """UserError where not one directory is a run's."""
    if not any(run.settings or run.results for run in runs):
        raise UserError(f"{runs[0].path}: {runs[0].notes[0] if runs[0].notes else 'nothing to show'}")


def serve(options: argparse.Namespace, benchmark: Path | None) -> None:
    """Serve the page until Ctrl-C; runs that begin meanwhile appear."""
    if options.directories:
        find_runs(options.directories)  # what is missing is said at once

    def find() -> list[Path]:
        named = [path for path in options.directories or [RUNS] if path.is_dir()]
        return [path for path in find_runs(named) if path != RUNS]

    watched = Watched(find, benchmark=benchmark, data_dir=options.data_dir, evaluations=options.evaluations)
    watched.runs()  # a file of eval.py that cannot be read is said at once
    server = new_server(watched, options.host, options.watch)
    host = f"[{options.host}]" if ":" in options.host else options.host
    address = f"http://{host}:{server.server_port}/"
    print(f"{address} (Ctrl-C ends it)", flush=True)
    if options.open:
        webbrowser.open(address)
    with server:
        server.serve_forever()


if __name__ == "__main__":
    run_command(main)
