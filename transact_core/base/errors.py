"""Errors that the user reads, and how long-running work reports progress and is cancelled."""

from collections.abc import Callable


class TransActError(Exception):
    """An error of the user's: one sentence that says what is wrong and what to do about it."""


class Cancelled(Exception):
    """Raised by a progress callback to stop the work that called it."""


def first_line(error: Exception) -> str:
    """The first line of a library's error without its full stop, to be quoted in a sentence."""
    lines = str(error).strip().splitlines()
    if isinstance(error, KeyError):
        return f"{error} is missing or not known"
    return lines[0].rstrip(".") if lines else type(error).__name__


def last_line(error: Exception) -> str:
    """The last line of a library's error without its full stop, or its type where it says nothing.

    Errors of several lines about one field of a configuration end with what is wrong.
    """
    return [type(error).__name__, *str(error).strip().rstrip(".").splitlines()][-1].strip()


Progress = Callable[[str, int, int], None]
"""Called as `progress(stage, done, total)`, where `stage` is a phrase for the user; may raise
`Cancelled`."""


def silent(stage: str, done: int, total: int) -> None:
    """A progress callback that does nothing."""


INTERRUPTIONS = (KeyboardInterrupt, SystemExit, GeneratorExit, Cancelled)
"""Exceptions that end work on purpose. Code that calls libraries written in Rust lets these pass
and catches every other `BaseException`: a panic there raises one that is no `Exception`."""
