"""Generators that report on the way and return what came of it."""

from collections.abc import Generator, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


class WithResult(Generic[Item, Result]):
    """Goes once through a generator, and keeps what it returns.

    A plain loop over a generator loses its return value:

        steps = WithResult(train(...))
        for standing in steps:
            show(standing)
        trained = steps.result
    """

    result: Result
    """There once the generator has ended."""

    def __init__(self, made: Generator[Item, None, Result]) -> None:
        self._made = made

    def __iter__(self) -> Iterator[Item]:
        self.result = yield from self._made
