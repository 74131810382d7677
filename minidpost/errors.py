"""What the user got wrong, and what ran out: told in one line (cli.py prints it), never a traceback."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class UserError(Exception):
    """A mistake the user can mend; the message is one line that names the file, flag or value and what is expected."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that there is not enough memory, of the device or of the machine."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    # The second is of memory that the host pins for a GPU.
    texts = ("can't allocate memory", "CUDA error: out of memory")
    return isinstance(error, RuntimeError) and any(text in str(error) for text in texts)


@contextmanager
def when_memory_runs_out(advice: str) -> Iterator[None]:
    """Turn a lack of memory within the block into a UserError that says what needs less."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(f"not enough memory; {advice}") from None
