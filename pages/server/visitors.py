"""Visitors, their tabs, and the results that they have for each request."""

import secrets
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
"""Bytes of an index in a tuple: the integer and the pointer to it."""


@dataclass(eq=False)
class Holding:
    """The results that a visitor has for one request."""

    points: list[Measurement] = field(default_factory=list)
    found: dict[str, Any] = field(default_factory=dict)
    """Results of pages other than points, each under a key of its own."""
    looked_at: float = 0.0
    """When a page last asked for it, in seconds of `time.monotonic`."""


@dataclass(eq=False)
class Visitor:
    """One visitor of this server, the same in every tab."""

    key: str = field(default_factory=lambda: secrets.token_hex(32))
    """Names the folder of this visitor's own files; the same after a restart of the server where
    the browser or the user is known again."""
    request: Request = field(default_factory=Request)
    """As it was last opened in any tab; a new tab begins with it."""
    cut: Cut = field(default_factory=Cut)
    """As the controls were last set in any tab."""
    holdings: dict[Request, Holding] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    """The jobs that this visitor started, the oldest first."""

    def of(self, request: Request) -> Holding:
        """This visitor's results for a request; empty at first."""
        holding = self.holdings.setdefault(request, Holding())
        holding.looked_at = time.monotonic()
        return holding

    @property
    def unfinished_jobs(self) -> list[Job]:
        return [job for job in self.jobs if not job.finished]


class Visit:
    """One tab of a visitor: a request and a cut of its own; the rest is shared by all tabs."""

    def __init__(self, visitor: Visitor | None = None) -> None:
        self.visitor = visitor or Visitor()
        self._request, self._cut = self.visitor.request, self.visitor.cut
        self.began_with = self._request
        """The request that the sidebar's controls show when the tab is new."""

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
        """This visitor's last job with this `about`, or None."""
        return next((job for job in reversed(self.visitor.jobs) if job.about == about), None)


def size_of(thing: Any) -> int:
    """Approximate size in bytes: of tensors and of tuples of indices, which are what is large."""
    if isinstance(thing, torch.Tensor):
        return thing.nbytes
    if isinstance(thing, Job):
        return size_of(thing.result)
    if is_dataclass(thing) or isinstance(thing, Data):
        thing = vars(thing)
    if isinstance(thing, dict):
        return sum(size_of(value) for value in list(thing.values()))
    if not isinstance(thing, list | tuple):
        return 0
    if thing and isinstance(thing[0], int):
        return BYTES_OF_INDEX * len(thing)
    return sum(size_of(item) for item in list(thing))
