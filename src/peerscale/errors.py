"""Errors that are the user's to mend: one clear line and exit code 2, never a traceback."""

import argparse
import errno
import os
import sys
from collections.abc import Callable
from typing import Never

USER_ERROR = 2
"""Exit code of a wrong input; 1 means that the input was fine and some cell of the work failed."""


class UserError(ValueError):
    """Wrong input. The message is one line: what was wrong, where, what is allowed."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, whose complaints take one line too."""

    def error(self, message: str) -> Never:
        raise UserError(f"{message}; help: {self.prog} --help")


PLACE = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
)
"""What is wrong with a place that the user named, not with the program."""

FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""No more can be written."""


class FailedCells(Exception):
    """The sweep went through, but some cells of it failed; exit code 1."""


def exit_code(main: Callable[[], int | None]) -> int:
    """Run a program's `main`; turn a `UserError`, an unusable path or a full disk into a line and exit code 2."""
    try:
        return main() or 0
    except FailedCells as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except UserError as error:
        message = str(error)
    except OSError as error:
        where = f" for {error.filename}" if error.filename else ""
        if error.errno in FULL:
            message = f"no space left on disk{where}; nothing half-written stays"
        elif error.errno in PLACE and where:
            message = f"{error.filename}: {os.strerror(error.errno).lower()}"
        else:
            raise
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where this one stopped", file=sys.stderr)
        return 130
    print(f"error: {message}", file=sys.stderr)
    return USER_ERROR
