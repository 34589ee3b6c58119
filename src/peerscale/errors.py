"""Errors that are the user's to mend: one clear line and exit code 2, never a traceback."""

import errno
import sys
from collections.abc import Callable

USER_ERROR = 2
"""Exit code of a wrong input; 1 means that the input was fine and some cell of the work failed."""


class UserError(ValueError):
    """Wrong input. The message is one line: what was wrong, where, what is allowed."""


class FailedCells(Exception):
    """The sweep went through, but some cells of it failed; exit code 1."""


def exit_code(main: Callable[[], int | None]) -> int:
    """Run a program's `main`; turn a `UserError` or a full disk into one line on stderr and exit code 2."""
    try:
        return main() or 0
    except FailedCells as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        message = (
            f"no space left on disk{f' for {error.filename}' if error.filename else ''}; nothing half-written stays"
        )
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    print(f"error: {message}", file=sys.stderr)
    return USER_ERROR
