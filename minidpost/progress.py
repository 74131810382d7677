"""Progress bars on a terminal; in a file or a pipe, where a bar would be one endless line, a line a minute instead."""

import sys
import time
from typing import Any

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 60.0
LINE = "{desc}: {percentage:.0f}%| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class Progress(tqdm):  # type: ignore[type-arg]  # generic for type checkers alone
    """tqdm's progress bar where standard error is a terminal; otherwise a line a minute, and one at the end."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Begin to count; the arguments are tqdm's."""
        self.is_on_terminal = sys.stderr.isatty()
        self.printed_at = time.monotonic()  # the last line, or the beginning
        if not self.is_on_terminal:
            options |= {"bar_format": LINE, "leave": True, "miniters": 1}
        super().__init__(*arguments, **options)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Show the state: the bar, or a line where one is due."""
        if self.is_on_terminal:
            super().display(msg, pos)
            return
        is_last = self.disable  # set by close(), which ends the line itself
        if is_last or time.monotonic() - self.printed_at >= SECONDS_BETWEEN_LINES:
            self.printed_at = time.monotonic()
            self.fp.write(str(self) + ("" if is_last else "\n"))
            self.fp.flush()

    def clear(self, *arguments: Any, **options: Any) -> None:
        """Make room for other output: what is written as lines can stay."""
        if self.is_on_terminal:
            super().clear(*arguments, **options)
