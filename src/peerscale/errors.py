"""Errors that are the user's to mend, one clear line and never a traceback; and the exit codes of all programs.

0: all is done. 1: a crash of the program, with Python's traceback. 2: `USER_ERROR`. 3: `FAILED_CELLS`.
130: `INTERRUPTED`.
"""

import argparse
import errno
import math
import os
import select
import sys
from collections.abc import Callable
from typing import Never, TextIO

USER_ERROR = 2
"""The input was wrong, or there was no space left; one line says what to mend."""

FAILED_CELLS = 3
"""The input was fine and the program went through, but some cells of the work failed."""

INTERRUPTED = 130
"""Ctrl-C; the same command goes on."""


class UserError(ValueError):
    """Wrong input. The message is one line: what was wrong, where, what is allowed."""


class ConfigError(UserError):
    """A configuration that cannot be run: the key, what was given, what is allowed."""


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, whose complaints take one line too."""

    def error(self, message: str) -> Never:
        raise UserError(f"{message}; help: {self.prog} --help")


def positive_number(text: str) -> float:
    """A finite number above 0, as a `type` of argparse, which complains of a `ValueError` by this function's name."""
    if not 0 < (value := float(text)) < math.inf:
        raise ValueError
    return value


def natural_number(text: str) -> int:
    """A whole number from 0."""
    if (value := int(text)) < 0:
        raise ValueError
    return value


def positive_integer(text: str) -> int:
    """A whole number from 1."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


PLACE = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
)
"""What is wrong with a place that the user named, not with the program."""

FULL = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG))
"""No more can be written."""


class FailedCells(Exception):
    """The sweep went through, but some cells of it failed; exit code `FAILED_CELLS`."""


def exit_code(main: Callable[[], int | None]) -> int:
    """Run a program's `main` and return its exit code; errors that are the user's to mend become one line on stderr."""
    try:
        code = main() or 0
        sys.stdout.flush()
        return code
    except FailedCells as error:
        print(f"error: {error}", file=sys.stderr)
        return FAILED_CELLS
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        if not _nobody_reads(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains when it flushes at its end
        return 0  # who read the output, such as `head`, has seen enough
    except OSError as error:
        place = error.filename2 or error.filename  # of a renaming, where to
        where = f" for {place}" if place else ""
        if error.errno in FULL:
            message = f"no space left on disk{where}; nothing half-written stays"
        elif error.errno in PLACE and where:
            message = f"{place}: {os.strerror(error.errno).lower()}"
        else:
            raise
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where this one stopped", file=sys.stderr)
        return INTERRUPTED
    print(f"error: {message}", file=sys.stderr)
    return USER_ERROR


def _nobody_reads(stream: TextIO) -> bool:
    """Whether a stream leads into a pipe whose other end is closed."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))
