"""Errors that are the user's to read, and how long work reports on itself and is called off."""

from collections.abc import Callable


class TransActError(Exception):
    """What was wrong and what to do about it, in one sentence fit to be shown as it is."""


class Cancelled(Exception):
    """Raised by a progress callback to stop the work that called it."""


def first_line(error: Exception) -> str:
    """What a library says of an error, short enough for a sentence of ours; without a full stop."""
    lines = str(error).strip().splitlines()
    if isinstance(error, KeyError):
        return f"{error} is missing or not known"
    return lines[0].rstrip(".") if lines else type(error).__name__


Progress = Callable[[str, int, int], None]
"""Called as ``progress(stage, done, total)``; may raise :class:`Cancelled`."""


def silent(stage: str, done: int, total: int) -> None:
    """Progress that nobody watches."""


INTERRUPTIONS = (KeyboardInterrupt, SystemExit, GeneratorExit, Cancelled)
"""What passes through where everything else is caught: a library written in Rust panics with an
exception that is no `Exception`."""
