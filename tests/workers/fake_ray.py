"""What is used of Ray, with workers in this process: for how a curve is handed out."""

from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace
from typing import Any

from transact_core.workers import tasks


class DiedError(Exception):
    """In place of `ray.exceptions.RayError`."""


@dataclass(eq=False)
class Reference:
    """To what came of a call."""

    value: Any = None
    error: Exception | None = None
    number: int = field(default_factory=count().__next__)


class Actor:
    """A worker of a node; calls are carried out at once."""

    def __init__(self, ray, node, worker):
        self.ray, self.node, self.worker, self.killed = ray, node, worker, False

    def __getattr__(self, name):
        return SimpleNamespace(remote=lambda *arguments: self._call(name, arguments))

    def _call(self, name, arguments):
        values = [each.value if isinstance(each, Reference) else each for each in arguments]
        asked = name if name != "run" else tasks.unpacked(values[0]).function.partition(":")[2]
        self.ray.asked.append((self.node, asked))
        if self.killed or self.ray.dies(self, asked):
            return Reference(error=DiedError("it died"))
        if name == "surroundings":
            return Reference(self.worker.surroundings() | self.ray.differing.get(self.node, {}))
        return Reference(getattr(self.worker, name)(*values))


class FakeRay:
    """A cluster of these nodes, by name, each with a number of CPUs."""

    exceptions = SimpleNamespace(RayError=DiedError)
    _private = SimpleNamespace(worker=SimpleNamespace())

    def __init__(self, nodes, gpus=()):
        self.cpus, self.gpus = nodes, gpus
        self.asked = []
        """(node, function) of each call."""
        self.differing = {}
        """By node, what differs of a worker's surroundings there."""
        self.actors = []
        self.connected = None
        self.util = SimpleNamespace(
            scheduling_strategies=SimpleNamespace(
                NodeAffinitySchedulingStrategy=lambda node, soft: node
            )
        )

    def dies(self, actor, asked):
        """Whether a worker dies when it is asked for this; to be replaced."""
        return False

    def init(self, address, **named):
        assert named["log_to_driver"] is False
        self.connected = address

    def shutdown(self):
        self.connected = None

    def nodes(self):
        return [
            {
                "NodeID": name,
                "Alive": True,
                "NodeManagerHostname": name,
                "NodeManagerAddress": "192.0.2.1",
                "Resources": {"CPU": float(cpus)} | ({"GPU": 1.0} if name in self.gpus else {}),
            }
            for name, cpus in self.cpus.items()
        ]

    def remote(self, worker_class):
        def options(scheduling_strategy, num_cpus, **_):
            def made(*arguments):
                actor = Actor(self, scheduling_strategy, worker_class(*arguments))
                self.actors.append(actor)
                return actor

            return SimpleNamespace(remote=made)

        return SimpleNamespace(options=options)

    def put(self, value):
        return Reference(value)

    def get(self, reference):
        if reference.error:
            raise reference.error
        return reference.value

    def wait(self, references, timeout):
        first = min(references, key=lambda each: each.number)
        return [first], [each for each in references if each is not first]

    def kill(self, actor, no_restart):
        actor.killed = True
