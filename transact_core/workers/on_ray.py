"""Points of a curve, or questions of tasks, on a Ray cluster: handed out here, measured by workers.

A worker (`workers.ray_worker`) opens the model once, which is named by its source and must have the
same fingerprint on every node. Texts need not be there: token ids, scores, statistics and the dense
model's losses come to every worker from the one that made them first. This process holds no model;
it keeps the points under the keys that they would have had if they had been measured here. So it
does with the answers to blocks of questions, whose token ids are all that is sent.

A worker that dies costs the time of its point, which another worker measures again. Where the
cluster's head goes away, Ray itself ends this process after a minute. Ray is imported when it is
asked for: it is an optional package.
"""

import logging
import os
import signal
import socket
import sys
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
from transformers import PreTrainedModel

from transact_core.base.errors import Progress, TransActError, first_line, silent
from transact_core.data.windows import Texts
from transact_core.experiments.bench import Bench, Choices, Measurement
from transact_core.experiments.cut_spec import BenchSpec
from transact_core.experiments.harness import HarnessTask
from transact_core.experiments.results import keep, keep_answers, keep_decision
from transact_core.experiments.sweep import Pair
from transact_core.experiments.tasks import Block, Contestant, count_blocks, missing_blocks
from transact_core.models.devices import dtype_name
from transact_core.workers import ray_worker, tasks
from transact_core.workers import work as curve_work
from transact_core.workers.ray_worker import RayWorker, Standing, surroundings
from transact_core.workers.tasks import Outcome, Task

TRIES = 3
"""How often a point is tried, and how many workers of a node may die, before it is given up."""
POLL_SECONDS = 0.5
"""How long answers are waited for before progress is reported, which may cancel the work."""
ANSWER_SECONDS = 10
"""How long an address may take to answer."""
LOCAL = "local"
"""The address of a cluster of this machine alone, which is started now and ends with the work."""
SAME_FOR_ALL = {
    "weights": "its model has other weights",
    "config": "its model has another configuration",
    "dtype": "it computes in another dtype",
    "device": "it computes on another kind of device, another GPU or with another version of CUDA",
}
"""Fields of `Bench.identity` in which a worker may differ from the others."""

Told = Callable[[str], None]
"""Called with a sentence on what the user should know, as a node that takes no part."""


def require_ray() -> ModuleType:
    """The package, told to send no statistics and to log nothing of its own.

    Raises:
        TransActError: it is not installed.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    try:
        import ray
    except ImportError:
        raise TransActError(
            "Ray is not installed here: run `make ray` in a clone, or "
            "`pip install 'transact-workbench[ray]'`."
        ) from None
    logging.getLogger("ray").setLevel(logging.CRITICAL)
    return ray


@contextmanager
def on_cluster(address: str, worker_threads: int, told: Told) -> Iterator["Cluster"]:
    """A connection to the cluster at an address, for workers of so many threads each.

    `auto` is the cluster that this machine is a node of, `local` one that is started for this. What
    runs on it for this connection ends with it.

    Raises:
        TransActError: Ray is not installed, or there is no such cluster.
    """
    ray = require_ray()
    # Kept results are looked up by the number of threads that they were computed with.
    before = torch.get_num_threads()
    torch.set_num_threads(worker_threads)
    try:
        _connect(ray, address)
        cluster = Cluster(ray, address, worker_threads, told)
        try:
            yield cluster
        finally:
            cluster.close()
            ray.shutdown()
    finally:
        torch.set_num_threads(before)


def _connect(ray: ModuleType, address: str) -> None:
    if "://" in address:
        raise TransActError(
            f"{address} is no address of a Ray cluster as it is asked for here: run this on one of "
            "its machines, and name auto, or the address that `ray start` was given there, as "
            "192.0.2.1:6379."
        )
    _require_answer(os.environ.get("RAY_ADDRESS", address) if address == "auto" else address)
    alone = {"include_dashboard": False} if address == LOCAL else {}
    in_main = threading.current_thread() is threading.main_thread()
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with _without_stderr():
            ray.init(address=address, configure_logging=False, log_to_driver=False, **alone)
        # There is no option for it: it prints each death of a worker on standard output.
        ray._private.worker._worker_logs_enabled = False
    except Exception as error:
        with suppress(Exception):
            ray.shutdown()
        raise TransActError(
            f"There is no Ray cluster at {address} that this machine is a node of, or it does not "
            f"take this process: {first_line(error)}. All of its machines need the same versions "
            "of Python and Ray and the same token (`ray get-auth-token`)."
        ) from None
    finally:
        if in_main:
            # Ray puts one of its own in its place.
            signal.signal(signal.SIGTERM, handler)


@contextmanager
def _without_stderr() -> Iterator[None]:
    """Drops what native code and new processes write to standard error: Ray logs there each of its
    attempts to connect."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _require_answer(address: str) -> None:
    """Refuses HOST:PORT where nothing listens: Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host.strip("[]"), int(port)), ANSWER_SECONDS).close()
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or first_line(error)
            raise TransActError(
                f"Nothing answers at {address}, where the Ray cluster should be: "
                f"{why}. Name the address that `ray start --head` printed."
            ) from None


@dataclass
class _Node:
    """A machine of the cluster."""

    id: str
    name: str
    cpus: int
    gpus: int
    deaths: int = 0
    """How many of its workers have died."""


@dataclass
class _Worker:
    """One worker, and what it has been asked for."""

    node: _Node
    actor: Any
    answer: Any = None
    """The reference to the answer that is waited for; None while it is idle."""
    take: Callable[["_Worker", Any], None] | None = None
    """What to do with the answer."""
    loaded: bool = False
    """Whether its model is open, and that of the others."""
    ready: bool = False
    """Whether it has what all points have in common."""
    piece: Any = None
    """The point that it measures, or the block of questions that it answers."""
    asked: Any = None
    """The reference to the answer to where it stands."""
    standing: Standing = ("", 0, 1)
    stages: int = 0
    """How many stages of its task were seen to end."""
    share: float = 0.0
    """Estimate of how much of its task is done, from 0 to 1."""


@dataclass(kw_only=True)
class _Work:
    """What the workers do now, piece by piece."""

    device: str
    """`cpu`, or `cuda` for a GPU each."""
    maker: _Worker | None = None
    """The worker that makes what all of them have in common."""
    waiting: deque[Any] = field(default_factory=deque)
    """The pieces that nobody has."""
    tries: Counter[Any] = field(default_factory=Counter)
    found: deque[tuple[Any, Any]] = field(default_factory=deque)
    """Pieces with their results, as they came."""


@dataclass(kw_only=True)
class _Curve(_Work):
    """A curve; its pieces are points, by their pairs of ratios."""

    spec: BenchSpec
    choices: Choices
    given: Bench | Texts
    fingerprint: Mapping[str, str]
    """The `weight_files` that every node's model must have."""
    bench: Bench | None = None
    """With all that the points have in common, once a worker has made it."""
    packed_bench: Any = None
    """The reference to it, from which workers take it."""


@dataclass(kw_only=True)
class _Questions(_Work):
    """Questions of tasks; their pieces are blocks, by their numbers."""

    specs: Sequence[BenchSpec]
    fingerprints: Sequence[Mapping[str, str]]
    """The `weight_files` of each model on every node."""
    introduced: tuple[ray_worker.Introduced, ...] = ()
    """The models, once a worker has loaded them."""
    blocks: list[Block] = field(default_factory=list)


class Cluster:
    """The nodes of a cluster and the workers on them; made by `on_cluster`."""

    def __init__(self, ray: ModuleType, address: str, threads: int, told: Told) -> None:
        self._ray, self._address, self._threads = ray, address, threads
        self._told, self._sentences = told, []
        self._workers: list[_Worker] = []
        self._work: _Curve | _Questions | None = None

    def open(
        self,
        spec: BenchSpec,
        given: Bench | Texts,
        fingerprint: Mapping[str, str],
        choices: Choices,
        points: int,
        progress: Progress = silent,
    ) -> Bench:
        """Starts workers for so many points at most; gives the bench that they have in common.

        That is `given`, completed, or made of these texts; it holds no model, and all that decides
        and measures points by these choices but the model. The device `auto` is a GPU for each
        worker where a node has one.

        Raises:
            TransActError: no node can take part, or as `open_bench` and `prepare` do.
        """
        nodes = self._nodes()
        kind = _kind(spec.device, nodes)
        if isinstance(given, Bench):
            given = given.without_model()
            kind = given.loaded.device.type
            spec = replace(spec, dtype=dtype_name(given.loaded.dtype))
        spec = replace(spec, device=kind)
        self._work = work = _Curve(
            device=kind, spec=spec, choices=choices, given=given, fingerprint=fingerprint
        )
        self._start(nodes, points)
        while work.bench is None:
            self._advance()
            progress(*self._opening())
        return work.bench

    def measure(
        self, bench: Bench, pairs: list[Pair], choices: Choices, progress: Progress = silent
    ) -> Iterator[Measurement]:
        """Yields the point of each pair as soon as a worker has measured it, and keeps it.

        `bench` is what `open` gave, for these choices.

        Raises:
            TransActError: a point was given up, or no worker is left; or as `point_at` does.
        """
        for _, point in self._results(pairs, "Measuring on Ray", progress):
            keep(bench, point)
            if not choices.single_pass:
                ratios = point.plan.mha_ratio, point.plan.mlp_ratio
                keep_decision(bench, *ratios, choices, point.decision)
            yield point

    def answer(
        self,
        specs: Sequence[BenchSpec],
        fingerprints: Sequence[Mapping[str, str]],
        harness_tasks: Sequence[HarnessTask],
        progress: Progress = silent,
    ) -> list[Contestant]:
        """Has the models of `specs` answer the questions of tasks, and keeps their answers, which
        `run_tasks` then finds with the contestants that this gives.

        `fingerprints` are the `weight_files` that each model must have everywhere. A worker holds
        all of them, whole.

        Raises:
            TransActError: a block was given up, no worker is left, or the answers cannot be kept;
                or as `score_continuations` does.
        """
        nodes = self._nodes()
        kind = _kind(specs[0].device, nodes)
        specs = [replace(spec, device=kind, offload="never") for spec in specs]
        self._work = work = _Questions(device=kind, specs=specs, fingerprints=fingerprints)
        self._start(nodes, count_blocks(harness_tasks, len(specs)))
        while not work.introduced:
            self._advance()
            progress(*self._opening())
        contestants = [
            Contestant(each.identity, each.config, each.tokenizer, _not_kept)
            for each in work.introduced
        ]
        work.blocks = list(missing_blocks(harness_tasks, *contestants))
        numbers = range(len(work.blocks))
        for number, answers in self._results(numbers, "Answering on Ray", progress):
            keep_answers(work.blocks[number].key, answers)
        return contestants

    def _results(
        self, pieces: Sequence[Any], stage: str, progress: Progress
    ) -> Iterator[tuple[Any, Any]]:
        """Each of these pieces with its result, as soon as a worker has it."""
        work = self._work
        work.waiting.extend(pieces)
        missing = len(pieces)
        while missing:
            self._advance()
            while work.found:
                missing -= 1
                yield work.found.popleft()
            under_way = sum(worker.share for worker in self._workers if worker.piece is not None)
            workers = len([worker for worker in self._workers if worker.ready])
            # In hundredths of a piece.
            done = 100 * (len(pieces) - missing) + int(100 * under_way)
            told = f"{stage}, {workers} worker" + "s" * (workers != 1)
            progress(told, done, 100 * len(pieces))

    def close(self) -> None:
        """Ends all workers, whatever they do."""
        for worker in self._workers:
            self._end(worker)
        self._workers.clear()

    # --- nodes and workers ---------------------------------------------------------------------

    def _nodes(self) -> list[_Node]:
        """The nodes that are alive, each with a name that no other one has."""
        alive = [node for node in self._ray.nodes() if node["Alive"]]
        named = Counter(_name(node) for node in alive)
        return [
            _Node(
                node["NodeID"],
                _name(node) + (f", node {node['NodeID'][:8]}" if named[_name(node)] > 1 else ""),
                int(node["Resources"].get("CPU", 0)),
                int(node["Resources"].get("GPU", 0)),
            )
            for node in alive
        ]

    def _start(self, nodes: list[_Node], most: int) -> None:
        """Starts as many workers as there is room for, at most so many, on all nodes alike."""
        places = {node.id: self._room(node) for node in nodes}
        for turn in range(max(places.values(), default=0)):
            for node in nodes:
                if turn < places[node.id] and len(self._workers) < most:
                    self._add(node)
        if not self._workers:
            self._give_up()

    def _room(self, node: _Node) -> int:
        """How many workers a node has room for."""
        on_gpus = self._work.device == "cuda"
        if node.cpus == 0:
            return 0  # A node that was started to compute nothing.
        if on_gpus and not node.gpus:
            self._say(f"{node.name} takes no part: it has no GPU.")
        elif node.cpus < self._threads:
            self._say(
                f"{node.name} takes no part: it has {node.cpus} CPUs, and a worker uses "
                f"{self._threads} threads."
            )
        places = node.cpus // self._threads
        return min(places, node.gpus) if on_gpus else places

    def _add(self, node: _Node) -> None:
        strategy = self._ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy
        actor = self._ray.remote(RayWorker).options(
            num_cpus=self._threads,
            num_gpus=1 if self._work.device == "cuda" else 0,
            # One thread works, and another one tells where it stands.
            max_concurrency=2,
            max_restarts=0,
            scheduling_strategy=strategy(node.id, soft=False),
        )
        worker = _Worker(node, actor.remote(self._threads))
        self._workers.append(worker)
        worker.answer, worker.take = worker.actor.surroundings.remote(), self._greeted

    def _end(self, worker: _Worker) -> None:
        with suppress(Exception):
            self._ray.kill(worker.actor, no_restart=True)

    def _remove(self, worker: _Worker) -> None:
        self._end(worker)
        self._workers.remove(worker)
        if self._work.maker is worker:
            self._work.maker = None

    def _drop(self, worker: _Worker, why: str) -> None:
        """Goes on without a worker, and says why."""
        self._remove(worker)
        self._say(f"{worker.node.name} takes no part: {why}.")
        if not self._workers:
            self._give_up()

    def _say(self, sentence: str) -> None:
        if sentence not in self._sentences:
            self._sentences.append(sentence)
            self._told(sentence)

    def _give_up(self) -> None:
        why = " ".join(self._sentences) or "none of its nodes has a CPU to give."
        raise TransActError(f"The Ray cluster at {self._address} has no worker left. {why}")

    # --- what is asked and answered ------------------------------------------------------------

    def _advance(self) -> None:
        """Hands out what is to be done, and takes the answers that come within a moment."""
        for worker in self._workers:
            if worker.answer is None:
                self._hand_out(worker)
        waited_for = {worker.answer: worker for worker in self._workers if worker.answer}
        ready, _ = self._ray.wait(list(waited_for), timeout=POLL_SECONDS)
        for answer in ready:
            self._take(waited_for[answer])
        for worker in self._workers:
            self._look(worker)

    def _hand_out(self, worker: _Worker) -> None:
        work = self._work
        if worker.ready and work.waiting:
            worker.piece = work.waiting.popleft()
            if isinstance(work, _Curve):
                arguments = work.spec, worker.piece, work.choices
                self._ask(worker, self._done, curve_work.curve_point, *arguments)
            else:
                block = work.blocks[worker.piece]
                arguments = work.specs[block.side], block
                self._ask(worker, self._done, ray_worker.answer_block, *arguments)
        elif isinstance(work, _Curve) and worker.loaded and not worker.ready:
            if work.bench is not None:
                worker.take = self._took_over
                worker.answer = worker.actor.run.remote(work.packed_bench)
            elif work.maker is None:
                work.maker = worker
                arguments = work.spec, work.given, work.choices
                self._ask(worker, self._shared, ray_worker.share, *arguments)

    def _ask(
        self,
        worker: _Worker,
        take: Callable[[_Worker, Outcome], None],
        function: Callable,
        *arguments: Any,
    ) -> None:
        worker.standing, worker.stages, worker.share = ("", 0, 1), 0, 0.0
        worker.take = take
        worker.answer = worker.actor.run.remote(_packed(function, *arguments))

    def _take(self, worker: _Worker) -> None:
        answer, worker.answer, worker.asked = worker.answer, None, None
        try:
            got = self._ray.get(answer)
        except self._ray.exceptions.RayError as error:
            self._lost(worker, error)
            return
        worker.take(worker, tasks.unpacked(got) if isinstance(got, bytes) else got)

    def _greeted(self, worker: _Worker, theirs: dict[str, str]) -> None:
        mine = surroundings()
        if theirs != mine:
            different = [
                f"{name} {theirs.get(name, 'missing')} in place of {value}"
                for name, value in mine.items()
                if theirs.get(name) != value
            ]
            self._drop(worker, f"it has {' and '.join(different)}")
            return
        work = self._work
        if isinstance(work, _Curve):
            self._ask(worker, self._loaded, ray_worker.load, work.spec)
        else:
            self._ask(worker, self._introduced, ray_worker.introduce, work.specs)

    def _loaded(self, worker: _Worker, outcome: Outcome) -> None:
        if outcome.state != tasks.DONE:
            self._drop(worker, _as_clause(outcome.words))
        elif outcome.result != dict(self._work.fingerprint):
            self._drop(worker, f"{SAME_FOR_ALL['weights']} (SHA-256)")
        else:
            worker.loaded = True

    def _introduced(self, worker: _Worker, outcome: Outcome) -> None:
        work = self._work
        if outcome.state != tasks.DONE:
            self._drop(worker, _as_clause(outcome.words))
            return
        theirs = [each.identity for each in outcome.result]
        mine = [each.identity for each in work.introduced]
        weights = [sorted(files.values()) for files in work.fingerprints]
        if [each["weights"] for each in theirs] != weights:
            self._drop(worker, f"{SAME_FOR_ALL['weights']} (SHA-256)")
        elif mine and theirs != mine:
            self._drop(worker, _differences(zip(theirs, mine, strict=True)))
        else:
            work.introduced = work.introduced or outcome.result
            worker.loaded = worker.ready = True

    def _shared(self, worker: _Worker, outcome: Outcome) -> None:
        curve = self._work
        if outcome.state == tasks.NO_MEMORY:
            self._drop(worker, _as_clause(outcome.words))
            return
        curve.bench = tasks.result_of(outcome)
        curve.packed_bench = self._ray.put(
            _packed(ray_worker.take_over, curve.spec, curve.bench.without_model())
        )
        worker.ready = True

    def _took_over(self, worker: _Worker, outcome: Outcome) -> None:
        if outcome.state != tasks.DONE:
            self._drop(worker, _as_clause(outcome.words))
            return
        if different := _differences([(outcome.result, self._work.bench.identity)]):
            self._drop(worker, different)
        else:
            worker.ready = True

    def _done(self, worker: _Worker, outcome: Outcome) -> None:
        piece, worker.piece = worker.piece, None
        if outcome.state == tasks.DONE:
            self._work.found.append((piece, outcome.result))
        # Another node may have more memory.
        elif self._tried(piece):
            tasks.result_of(outcome)

    def _lost(self, worker: _Worker, error: Exception) -> None:
        """A worker has died: another one does its piece, and one takes its place."""
        node, piece = worker.node, worker.piece
        if worker.take == self._greeted and "No module named" in str(error):
            self._drop(worker, "it has no transact_core, or another version")
            return
        node.deaths += 1
        self._say_ended(worker)
        if piece is not None and self._tried(piece):
            what = "A block of questions"
            if isinstance(self._work, _Curve):
                what = f"The point at MHA {piece[0]:g} and MLP {piece[1]:g}"
            raise TransActError(
                f"{what} was given up: each of the {TRIES} workers that had it ended before it was "
                f"done, the last one on {node.name}. Their machines may have too little memory."
            )
        alive = {each["NodeID"] for each in self._ray.nodes() if each["Alive"]}
        if node.id in alive and node.deaths <= TRIES:
            self._remove(worker)
            self._add(node)
        else:
            worker.piece = None
            self._drop(worker, "its workers end before they are done")

    def _say_ended(self, worker: _Worker) -> None:
        doing = "another one is started"
        if worker.piece is not None:
            curve = isinstance(self._work, _Curve)
            doing = "its point is measured again" if curve else "its questions are put again"
        self._told(f"A worker on {worker.node.name} has ended; {doing}.")

    def _tried(self, piece: Any) -> bool:
        """Notes that a piece was not done; whether it is given up. Else it is the next one."""
        self._work.tries[piece] += 1
        given_up = self._work.tries[piece] >= TRIES
        if not given_up:
            self._work.waiting.appendleft(piece)
        return given_up

    # --- progress ------------------------------------------------------------------------------

    def _look(self, worker: _Worker) -> None:
        """Asks a worker where it stands, and takes the answer to the last such question."""
        if worker.answer is None or worker.take == self._greeted:
            return
        if worker.asked is None:
            worker.asked = worker.actor.standing.remote()
            return
        ready, _ = self._ray.wait([worker.asked], timeout=0)
        if not ready:
            return
        worker.asked = None
        with suppress(self._ray.exceptions.RayError):
            stage, done, total = self._ray.get(ready[0])
            if worker.standing[0] not in ("", stage):
                worker.stages += 1
            worker.standing = stage, done, total
            # How many stages there will be is not known: each takes half of what is left.
            at = worker.stages + (min(1.0, done / total) if total else 0.0)
            worker.share = max(worker.share, 1 - 0.5**at)

    def _opening(self) -> Standing:
        """Where the opening stands."""
        if self._work.maker is not None and self._work.maker.standing[0]:
            return self._work.maker.standing
        if all(worker.take == self._greeted for worker in self._workers):
            return "Waiting for workers of the Ray cluster", 0, len(self._workers)
        loaded = len([worker for worker in self._workers if worker.loaded])
        return "Opening the model on the Ray cluster", loaded, len(self._workers)


def _packed(function: Callable, *arguments: Any) -> bytes:
    return tasks.packed(Task(f"{function.__module__}:{function.__qualname__}", arguments))


def _kind(device: str, nodes: Sequence[_Node]) -> str:
    """The kind of device that workers compute on; `auto` is a GPU each where a node has one."""
    kind = device.partition(":")[0]
    if kind == "auto":
        kind = "cuda" if any(node.gpus for node in nodes) else "cpu"
    return kind


def _differences(pairs: Iterable[tuple[Mapping[str, object], Mapping[str, object]]]) -> str:
    """In what identities differ from those that they should be, as a clause; empty in nothing."""
    different = [
        words
        for theirs, mine in pairs
        for name, words in SAME_FOR_ALL.items()
        if theirs[name] != mine[name]
    ]
    return " and ".join(dict.fromkeys(different))


def _not_kept(_: Progress) -> PreTrainedModel:
    """In place of opening a model whose answers came from the cluster."""
    raise TransActError(
        "What the cluster answered could not be kept; see that the cache folder can be written."
    )


def _name(node: Mapping[str, Any]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _as_clause(sentence: str) -> str:
    """A sentence to stand after a colon."""
    return sentence.rstrip(".")
