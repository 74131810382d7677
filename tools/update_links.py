"""Point the links of README and docs at today's lines of code.

A link `[name](path#L12 "def name(")` carries in its title what the line must contain. This moves every anchor to the
first such line; tests/test_docs.py fails where one is out of date.

    python tools/update_links.py
"""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
CODE_LINK = re.compile(r'\]\((?P<path>[\w./-]+)(?:#L(?P<line>\d+))? "(?P<title>[^"]+)"\)')


def line_of(path: Path, text: str) -> int:
    """The number of the first line of a file that contains a text; ValueError where there is none."""
    for line_number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if text in line:
            return line_number
    raise ValueError(f"{path}: no line contains {text!r}")


def updated(page: Path) -> str:
    """The page with every code link at its line."""

    def moved(match: re.Match) -> str:
        target = (page.parent / match["path"]).resolve()
        return f']({match["path"]}#L{line_of(target, match["title"])} "{match["title"]}")'

    return CODE_LINK.sub(moved, page.read_text(encoding="utf-8"))


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(updated(path), encoding="utf-8")
