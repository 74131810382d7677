"""Exhibits for papers: figures as PNG and SVG by matplotlib, tables as Markdown and LaTeX."""

import unicodedata
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from minidpost.selftraining.report import import_pyplot
from minidpost.storage import markdown_table, staged_file

COLOURS = ("#1f6fc4", "#c4531a", "#128a63", "#7a4fd0", "#b83280", "#8a6a00", "#0e7f97", "#a32f2f")  # the page's own
PAPER_COLOUR = "#777777"
DASHES = ("--", ":", "-.")  # of the paper's lines
PANELS_IN_A_ROW = 3
GROUP_WIDTH, LEGEND_WIDTH, TITLE_WIDTH = 24, 40, 50  # characters of a line, as names of runs may be long

_LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "−": "$-$",
    "–": "--",
    "±": r"$\pm$",
    "β": r"$\beta$",
    "|": r"\textbar{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
}


def export(exhibits: Sequence[dict[str, Any]], directory: Path) -> list[str]:
    """Write every exhibit that there is into a directory: id.png and id.svg, or id.md and id.tex. Returns the names."""
    names = []
    for exhibit in exhibits:
        if exhibit["kind"] == "table":
            for suffix, write in (("md", table_markdown), ("tex", table_latex)):
                with staged_file(directory / f"{exhibit['id']}.{suffix}") as temporary:
                    temporary.write_text(write(exhibit), encoding="utf-8")
                names.append(f"{exhibit['id']}.{suffix}")
        elif exhibit["kind"] in ("lines", "bars"):
            names += plot(exhibit, directory)
    return names


# -- tables -----------------------------------------------------------------------------------------------------------


def visible(text: str) -> str:
    """A text on one line, with characters that cannot be seen, or that turn the direction of writing, as U+FFFD."""
    words = " ".join(text.split())
    return "".join("\ufffd" if unicodedata.category(character)[0] == "C" else character for character in words)


def cell_text(cell: Any) -> str:
    """A cell of a table: a text, or a score's."""
    return visible(cell if isinstance(cell, str) else cell["text"])


def escaped_markdown(text: str) -> str:
    """A text that means itself in Markdown."""
    return "".join(f"\\{character}" if character in "\\`*_[]<>|#" else character for character in text)


def escaped_latex(text: str) -> str:
    """A text that means itself in LaTeX."""
    return "".join(_LATEX.get(character, character) for character in text)


def table_markdown(exhibit: dict[str, Any]) -> str:
    """A table as Markdown, its parts below one another; a column says whose numbers a row has."""
    pieces = [f"**{escaped_markdown(exhibit['title'])}**", escaped_markdown(exhibit["caption"])]
    for part in exhibit["parts"]:
        if part["title"]:
            pieces.append(escaped_markdown(visible(part["title"])))
        heads = ["from", *(escaped_markdown(visible(head)) for head in part["heads"])]
        rows = [[row["origin"], *(escaped_markdown(cell_text(cell)) for cell in row["cells"])] for row in part["rows"]]
        pieces.append(markdown_table(heads, rows))
    return "\n\n".join(pieces) + "\n"


def table_latex(exhibit: dict[str, Any]) -> str:
    """A table as LaTeX (booktabs), its parts below one another."""
    lines = [r"% needs \usepackage{booktabs}", r"\begin{table}", r"\centering", r"\small"]
    for part in exhibit["parts"]:
        if part["title"]:
            lines.append(rf"\textit{{{escaped_latex(visible(part['title']))}}}\\[2pt]")
        lines.append(rf"\begin{{tabular}}{{l{'l' * len(part['heads'])}}}")
        lines.append(r"\toprule")
        lines.append(latex_row(["from", *part["heads"]]))
        lines.append(r"\midrule")
        lines += [latex_row([row["origin"], *row["cells"]]) for row in part["rows"]]
        lines += [r"\bottomrule", r"\end{tabular}\\[8pt]"]
    lines.append(rf"\caption{{{escaped_latex(exhibit['title'])}. {escaped_latex(exhibit['caption'])}}}")
    lines.append(r"\end{table}")
    return "\n".join(lines) + "\n"


def latex_row(cells: Sequence[Any]) -> str:
    """One row of a tabular."""
    return " & ".join(escaped_latex(cell_text(cell)) for cell in cells) + r" \\"


# -- figures ----------------------------------------------------------------------------------------------------------


def plot(exhibit: dict[str, Any], directory: Path) -> list[str]:
    """Write a figure as PNG and SVG."""
    pyplot = import_pyplot()
    panels = exhibit["panels"]
    n_columns = min(len(panels), PANELS_IN_A_ROW)
    n_rows = -(-len(panels) // n_columns)  # rounded up
    figure, grid = pyplot.subplots(
        n_rows, n_columns, figsize=(4.6 * n_columns, 3.6 * n_rows), squeeze=False, layout="constrained"
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, panel in zip(grid.flat, panels, strict=False):
        axes.set_title(fill(plot_text(panel["title"]), TITLE_WIDTH), fontsize=10)
        axes.set_ylabel(plot_text(panel["y"]["label"]), fontsize=9)
        axes.grid(alpha=0.3)
        if exhibit["kind"] == "lines":
            plot_lines(axes, panel)
        else:
            plot_bars(axes, panel)
        axes.legend(fontsize=7, handlelength=3)
    figure.suptitle(plot_text(exhibit["title"]), fontsize=11)
    names = [f"{exhibit['id']}.{suffix}" for suffix in ("png", "svg")]
    for name in names:
        with staged_file(directory / name) as temporary:
            metadata = {"Date": None} if name.endswith("svg") else None
            figure.savefig(temporary, dpi=150, format=name.rpartition(".")[2], metadata=metadata)
    pyplot.close(figure)
    return names


def plot_lines(axes: Any, panel: dict[str, Any]) -> None:
    """The lines of a panel, with intervals where the points have them."""
    from matplotlib.ticker import MaxNLocator

    factor = 100 if panel["y"].get("is_percent") else 1
    for line in panel["series"]:
        is_paper = line["origin"] == "paper"
        found = line["points"]
        axes.errorbar(
            [point["x"] for point in found],
            [factor * point["value"] for point in found],
            yerr=[reach(found, "low", factor), reach(found, "high", factor)] if "low" in found[0] else None,
            fmt=DASHES[line["colour"] % len(DASHES)] if is_paper else "-",
            marker="o",
            markersize=4,
            capsize=3,
            color=PAPER_COLOUR if is_paper else COLOURS[line["colour"] % len(COLOURS)],
            label=fill(plot_text(line["name"]), LEGEND_WIDTH),
        )
    axes.set_xlabel(plot_text(panel["x"]["label"]), fontsize=9)
    if panel["x"].get("is_log"):
        axes.set_xscale("log")
    if panel["x"].get("is_whole"):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def plot_bars(axes: Any, panel: dict[str, Any]) -> None:
    """The bars of a panel, lying, two in each group; the paper's are grey."""
    factor = 100 if panel["y"].get("is_percent") else 1
    height = 0.8 / len(panel["series"])
    for place, line in enumerate(panel["series"]):
        known = [(index, point) for index, point in enumerate(line["points"]) if point is not None]
        for index, point in known:
            interval = [reach([point], "low", factor), reach([point], "high", factor)] if "low" in point else None
            is_paper = panel["origins"][index] == "paper"
            axes.barh(
                index + (place - (len(panel["series"]) - 1) / 2) * height,
                factor * point["value"],
                height=0.92 * height,
                xerr=interval,
                capsize=3,
                color=PAPER_COLOUR if is_paper else COLOURS[line["colour"] % len(COLOURS)],
                alpha=0.6 if is_paper and place == 0 else 1,
                label=plot_text(line["name"]) if index == known[0][0] else None,
            )
    names = [fill(plot_text(name), GROUP_WIDTH) for name in panel["groups"]]
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.invert_yaxis()  # the first group at the top
    axes.set_xlabel(plot_text(panel["y"]["label"]), fontsize=9)
    axes.set_ylabel("")


def reach(found: Sequence[dict[str, Any]], end: str, factor: float) -> list[float]:
    """How far the intervals of points reach below or above them."""
    return [factor * abs(point[end] - point["value"]) for point in found]


def plot_text(text: str) -> str:
    """A text for matplotlib, which would read formulas between dollar signs."""
    return visible(text).replace("$", r"\$")[:80]
