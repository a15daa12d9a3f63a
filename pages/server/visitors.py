"""Visitors, their tabs, and what they hold of each request."""

import time
from collections.abc import Hashable
from dataclasses import dataclass, field, is_dataclass
from typing import Any

import torch

from pages.server.jobs import Job
from pages.server.request import Cut, Request
from transact_core.experiments.bench import Measurement
from transact_core.pruning.plan import Data

BYTES_OF_INDEX = 36
"""Of a number in Python and the place that a tuple has for it."""


@dataclass(eq=False)
class Holding:
    """What a visitor has of one request."""

    points: list[Measurement] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    """What pages found out beside points, each under a key of its own."""
    looked_at: float = 0.0
    """When a page last asked for it, by the clock of `time.monotonic`."""


@dataclass(eq=False)
class Visitor:
    """What one visitor has on this server, the same in every tab."""

    request: Request = field(default_factory=Request)
    """As it was last opened in any tab; a new tab begins with it."""
    cut: Cut = field(default_factory=Cut)
    """As the controls had it last in any tab."""
    holdings: dict[Request, Holding] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    """Those that this visitor started, the oldest first."""

    def of(self, request: Request) -> Holding:
        """What this visitor has of a request, if it is nothing yet."""
        holding = self.holdings.setdefault(request, Holding())
        holding.looked_at = time.monotonic()
        return holding

    @property
    def unfinished_jobs(self) -> list[Job]:
        return [job for job in self.jobs if not job.finished]


class Visit:
    """One tab of a visitor's: it looks at one request and one cut, and has the rest in common."""

    def __init__(self, visitor: Visitor | None = None) -> None:
        self.visitor = visitor or Visitor()
        self._request, self._cut = self.visitor.request, self.visitor.cut
        self.began_with = self._request
        """What the sidebar's controls stand at when the tab is new."""

    @property
    def request(self) -> Request:
        return self._request

    @request.setter
    def request(self, request: Request) -> None:
        self._request = self.visitor.request = request

    @property
    def cut(self) -> Cut:
        return self._cut

    @cut.setter
    def cut(self, cut: Cut) -> None:
        self._cut = self.visitor.cut = cut

    def latest_job(self, about: Hashable) -> Job | None:
        """This visitor's last job about this, or None."""
        return next((job for job in reversed(self.visitor.jobs) if job.about == about), None)


def size_of(thing: Any) -> int:
    """Bytes, roughly: of what makes things large, which is tensors and rows of indices."""
    if isinstance(thing, torch.Tensor):
        return thing.nbytes
    if isinstance(thing, Job):
        return size_of(thing.result)
    if is_dataclass(thing) or isinstance(thing, Data):
        thing = vars(thing)
    if isinstance(thing, dict):
        return sum(size_of(each) for each in list(thing.values()))
    if not isinstance(thing, list | tuple):
        return 0
    if thing and isinstance(thing[0], int):
        return BYTES_OF_INDEX * len(thing)
    return sum(size_of(each) for each in list(thing))
