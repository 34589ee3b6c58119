"""Errors that the user can fix, reported in one clear line without a traceback; and the exit codes of all programs.

0: everything is done. 1: a crash of the program, with Python's traceback. 2: `USER_ERROR`. 3: `FAILED_CELLS`.
4: `ABORTED`. 130: `INTERRUPTED`.
"""

import argparse
import errno
import math
import os
import select
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, Never, TextIO

USER_ERROR = 2
"""The input was wrong, or the disk full or broken; one line says what to fix."""

FAILED_CELLS = 3
"""The input was correct and the program ran to its end, but some cells failed."""

ABORTED = 4
"""The input was correct, but some cells could not be run to an end; the same command continues the work."""

INTERRUPTED = 130
"""Ctrl-C; the same command continues the work."""


GIVEN = "OVERRIDES="


class UserError(ValueError):
    """Wrong input. The message is one line: what was wrong, where, what is allowed."""


class ConfigError(UserError):
    """A configuration that cannot be run: the key, what was given, what is allowed."""


class ArgumentParser(argparse.ArgumentParser):
    """An argparse parser whose errors are `UserError`s of one line."""

    def error(self, message: str) -> Never:
        raise UserError(f"{message}; help: {self.prog} --help")

    def parse_intermixed_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore
        """As argparse does; `OVERRIDES=TEXT`, which make hands on, stands for the words that a shell makes of TEXT."""
        words: list[str] = []
        for word in sys.argv[1:] if args is None else args:
            try:
                words += shlex.split(word.removeprefix(GIVEN)) if word.startswith(GIVEN) else [word]
            except ValueError as error:
                raise UserError(f"{word}: {str(error).lower()}") from None
        return super().parse_intermixed_args(words, namespace)


def positive_number(text: str) -> float:
    """A finite number above 0, as a `type` for argparse, which uses this function's name in its error message."""
    if not 0 < (value := float(text)) < math.inf:
        raise ValueError
    return value


def natural_number(text: str) -> int:
    """A whole number of at least 0."""
    if (value := int(text)) < 0:
        raise ValueError
    return value


def positive_integer(text: str) -> int:
    """A whole number of at least 1."""
    if (value := int(text)) < 1:
        raise ValueError
    return value


PLACE = frozenset(
    (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP)
)
"""Errors about a path that the user chose, rather than about the program."""

DISK = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO))
"""Errors of the disk: no space is left, or it cannot be read or written."""


class FailedCells(Exception):
    """The sweep ran to its end, but some of its cells failed."""

    code = FAILED_CELLS


class Aborted(FailedCells):
    """Some cells of a sweep did not end, since their processes were killed."""

    code = ABORTED


def exit_code(main: Callable[[], int | None]) -> int:
    """Run a program's `main` and return its exit code; errors that the user can fix become one line on stderr."""
    try:
        code = main() or 0
        sys.stdout.flush()
        return code
    except FailedCells as error:
        print(f"error: {error}", file=sys.stderr)
        return error.code
    except UserError as error:
        message = str(error)
    except BrokenPipeError:
        if not _nobody_reads(sys.stdout):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python reports an error at exit
        return 0  # the reader of the output, such as `head`, has closed it
    except OSError as error:
        place = error.filename2 or error.filename  # for a renaming: its target
        where = f" for {place}" if place else ""
        if error.errno in DISK:
            message = f"{os.strerror(error.errno).lower()}{where}; no half-written file is left"
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
