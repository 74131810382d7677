"""What the three commands share: one line and status 2 for a user's mistake, a quiet end for Ctrl-C."""

import os
import sys
from collections.abc import Callable

from minidpost.files import UserError


def run_command(main: Callable[[], None]) -> None:
    """Run a command's main and exit with its status: 0, 2 for a mistake of the user's, 130 for Ctrl-C."""
    try:
        main()
    except UserError as error:
        print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\ninterrupted; the same command continues after the last finished stage", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
