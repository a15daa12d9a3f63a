"""What the pages share: visitors and what is theirs, open models, the points measured on them."""

import gc
import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from itertools import cycle
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import urlsplit
from weakref import WeakSet

import streamlit as st
import torch
from transformers import LlamaForCausalLM

from pages.shared.jobs import DONE, Job, JobQueue, Work, job_threads
from pages.shared.settings import require_readable_source, require_writable, settings
from transact_core import corpora
from transact_core.bench import Bench, Choices, Measurement, carry_out, compress
from transact_core.errors import Progress, TransActError, silent
from transact_core.export import describe_compression, require_room, write_checkpoint
from transact_core.files import require_free_output
from transact_core.models import BUILTIN, LoadedModel, load_model
from transact_core.plan import Data, Decision, Granularity, PruningPlan
from transact_core.results import decided, find_decision, measured
from transact_core.sweep import Pair, most_informative_first, point_at
from transact_core.sweep import find_point as find_kept_point

MODELS_KEPT = 2
BENCHES_KEPT = 12
"""More than models: without its model a bench is small, and the pages need no more of it."""
VISITORS_KEPT = 200
HELD_BYTES = 1 << 30
"""Of what all visitors have measured and found out; on disk there is more of it."""
POINTS_KEPT = 300
"""Of one visitor with one request."""
FINISHED_JOBS_KEPT = 4
WANTED = "page"
"""In the address of app.py, the page that it shall go on to."""
BYTES_OF_INDEX = 36
"""Of a number in Python and the place that a tuple has for it."""
XSRF_COOKIE = "_streamlit_xsrf"


@dataclass(frozen=True)
class Request:
    """Which model, which texts, how much of them."""

    model: str = BUILTIN
    device: str = "auto"
    dtype: str = "auto"
    calibration: str = corpora.BUILTIN
    evaluation: str = corpora.BUILTIN
    calibration_tokens: int = 8192
    evaluation_tokens: int = 4096
    sequence_length: int = 512

    @property
    def model_key(self) -> tuple[str, str, str]:
        """What tells one loaded model from another."""
        return self.model, self.device, self.dtype


@dataclass
class Opening:
    """The jobs that open a request: first its bench, then the dense model's perplexity."""

    bench: Job
    dense: Job
    preparations: dict[Choices, Job] = field(default_factory=dict)
    """The jobs that measured what plans need beyond the opening."""
    damages: dict[Choices, Job] = field(default_factory=dict)
    """The jobs that measured what a prediction needs."""


@dataclass(frozen=True)
class Cut:
    """What the controls of the Compress page say."""

    mha_ratio: float = 0.33
    mlp_ratio: float = 0.3
    granularity: Granularity | Literal["auto"] = Choices.granularity
    importance: str = Choices.importance
    recovery: str = Choices.recovery
    steps: int = Choices.steps
    multiple_of: int = Choices.multiple_of
    sequential: bool = Choices.sequential

    @property
    def ratios(self) -> Pair:
        return self.mha_ratio, self.mlp_ratio

    @property
    def choices(self) -> Choices:
        return Choices(**{each.name: getattr(self, each.name) for each in fields(Choices)})

    @classmethod
    def of(cls, point: Measurement) -> "Cut":
        plan, decision = point.plan, point.decision
        return cls(
            plan.mha_ratio,
            plan.mlp_ratio,
            "auto" if decision.granularity_losses else plan.granularity,
            plan.importance,
            point.recovery,
            decision.steps,
            plan.multiple_of,
            decision.sequential,
        )


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


class Workbench:
    """What all sessions of one server share: the queue, visitors, loaded models, open benches."""

    def __init__(self) -> None:
        # The number of threads that results depend on is the jobs' own.
        torch.set_num_threads(job_threads())
        self.queue = JobQueue()
        # Sessions come in threads of their own; models and the last cut are the worker's alone.
        self._lock = threading.RLock()
        self._visitors: OrderedDict[str, Visitor] = OrderedDict()
        self._everyone: WeakSet[Visitor] = WeakSet()
        self._openings: OrderedDict[Request, Opening] = OrderedDict()
        self._models: OrderedDict[tuple[str, str, str], LoadedModel] = OrderedDict()
        self._benches: WeakSet[Bench] = WeakSet()
        self._in_use: LoadedModel | None = None
        self._last_cut: tuple[Request, tuple, LlamaForCausalLM] | None = None

    def visitor(self, identity: str | None) -> Visitor:
        """The visitor of that identity; without one, a new visitor that is not found again."""
        with self._lock:
            known = self._visitors.get(identity) or Visitor()
            self._everyone.add(known)
            if identity is None:
                return known
            self._visitors[identity] = known
            self._visitors.move_to_end(identity)
            idle = [key for key, each in self._visitors.items() if not each.unfinished_jobs]
            for key in idle[: max(0, len(self._visitors) - VISITORS_KEPT)]:
                if key != identity:
                    del self._visitors[key]
            return known

    def make_room(self) -> None:
        """Lets go of what visitors have beyond `HELD_BYTES`, what was looked at longest ago first.

        Those with unfinished jobs keep theirs. A point let go of is still on disk, and comes from
        there when it is asked for again.
        """
        with self._lock:
            everything = [
                (holding.looked_at, size_of(holding), visitor, request)
                for visitor in self._everyone
                for request, holding in list(visitor.holdings.items())
            ]
            held = sum(size for _, size, _, _ in everything)
            idle = [each for each in everything if not each[2].unfinished_jobs]
            # The last one looked at stays however large it is.
            for _, size, visitor, request in sorted(idle, key=lambda each: each[0])[:-1]:
                if held <= HELD_BYTES:
                    return
                visitor.holdings.pop(request, None)
                held -= size

    def open(self, request: Request) -> Opening:
        """The jobs that open this request; sessions that ask for the same share them."""
        with self._lock:
            opening = self._openings.get(request)
            if opening is None:
                bench = self.queue.submit(
                    "Opening the model", lambda report: self._opened(request, report), urgent=True
                )
                opening = self._openings[request] = Opening(bench, self._dense(request, bench))
            self._openings.move_to_end(request)
            ended = [key for key, each in self._openings.items() if each.bench.finished]
            for key in ended[: max(0, len(self._openings) - BENCHES_KEPT)]:
                if key != request:
                    del self._openings[key]
            return opening

    def reopen(self, request: Request) -> Opening:
        """Opens anew what failed or was cancelled, at the visitor's wish."""
        with self._lock:
            if self._openings[request].bench.finished:
                del self._openings[request]
            return self.open(request)

    def measure_dense(self, request: Request) -> None:
        """Measures the dense model anew where that failed or was cancelled."""
        with self._lock:
            opening = self.open(request)
            if opening.dense.finished:
                opening.dense = self._dense(request, opening.bench)

    def prepare(self, request: Request, choices: Choices, anew: bool = False) -> Job:
        """The job that measures what plans with these choices need; shared as openings are.

        The request must be open. `anew` is for what failed or was cancelled.
        """
        # No plan looks at the recovery, and what auto and steps try is tried when it is measured.
        wanted = replace(first_look(choices), recovery=Choices.recovery)
        with self._lock:
            opening = self.open(request)
            job = opening.preparations.get(wanted)
            if job is None or (anew and job.finished):
                job = opening.preparations[wanted] = self.queue.submit(
                    f"Scoring by {choices.importance}",
                    lambda report: self.bench(request, report).prepare(wanted, report),
                    urgent=True,
                )
            return job

    def learn(self, request: Request, choices: Choices, anew: bool = False) -> Job:
        """The job that measures what predictions with these choices need; shared as openings are.

        The request must be open. `anew` is for what failed or was cancelled.
        """
        wanted = what_to_learn(choices)
        with self._lock:
            opening = self.open(request)
            job = opening.damages.get(wanted)
            if job is None or (anew and job.finished):

                def measure(report: Progress) -> None:
                    bench = self.bench(request, silent)
                    # Others have turns in the midst of this, and may open models of their own.
                    self._in_use = bench.loaded
                    try:
                        bench.damage(wanted, report)
                    finally:
                        self._in_use = None

                job = opening.damages[wanted] = self.queue.submit(
                    "Measuring what each layer loses", measure, background=True
                )
            return job

    def bench(self, request: Request, report: Progress) -> Bench:
        """The bench of a request with its model at hand; for jobs, and held by none over a turn.

        Raises:
            TransActError: it cannot be opened any more, or the weights are not those they were.
        """
        opening = self._openings.get(request)
        if opening is None or opening.bench.state != DONE:
            return self._opened(request, report)
        bench = opening.bench.result
        if bench.loaded.released:
            loaded = self._model(request, report)
            if loaded.weight_files != bench.loaded.weight_files:
                with self._lock:
                    self._openings.pop(request, None)
                raise TransActError(
                    f"The weights of {loaded.source} have changed since they were opened; "
                    "try again with the new ones."
                )
            bench.loaded = loaded
        elif request.model_key in self._models:
            self._models.move_to_end(request.model_key)
        return bench

    def _dense(self, request: Request, bench: Job) -> Job:
        def measure(report: Progress) -> None:
            if bench.state == DONE:
                self.bench(request, report).dense(report)

        # Not urgent, so that it waits for every opening; its first turn comes before other jobs'.
        return self.queue.submit("Measuring the dense model", measure)

    def _opened(self, request: Request, report: Progress) -> Bench:
        bench = self._bench(request, report)
        self._benches.add(bench)
        return bench

    def _bench(self, request: Request, report: Progress) -> Bench:
        for source in (request.model, request.calibration, request.evaluation):
            require_readable_source(source, settings())
        calibration = corpora.read_corpus(request.calibration)
        evaluation = corpora.read_corpus(request.evaluation)
        loaded = self._model(request, report)
        bench = Bench(
            loaded,
            *corpora.calibration_and_evaluation(
                calibration,
                evaluation,
                loaded.tokenizer,
                loaded.architecture.vocab_size,
                request.calibration_tokens,
                request.evaluation_tokens,
                request.sequence_length,
                report,
            ),
        )
        bench.statistics(report)
        bench.scores(Choices().importance)
        return bench

    def _model(self, request: Request, report: Progress) -> LoadedModel:
        key = request.model_key
        if key not in self._models:
            # Room is made first, so that the old and the new model are not held at once.
            unused = [each for each, held in self._models.items() if held is not self._in_use]
            for dropped in unused[: max(0, len(self._models) - MODELS_KEPT + 1)]:
                self._forget(dropped)
            require_readable_source(request.model, settings())
            self._models[key] = load_model(*key, report)
        self._models.move_to_end(key)
        return self._models[key]

    def _forget(self, key: tuple[str, str, str]) -> None:
        """Lets go of a model: its benches stay, with what was measured on them."""
        loaded = self._models.pop(key)
        for bench in list(self._benches):
            if bench.loaded is loaded:
                bench.release_model()
        if self._last_cut and self._last_cut[0].model_key == key:
            self._last_cut = None

    def measure(self, request: Request, cut: Cut, report: Progress) -> Measurement:
        """The point of a cut; a model made for it is kept until the next cut, for an export."""
        bench = self.bench(request, report)

        def compress_and_hold(
            bench: Bench, plan: PruningPlan, recovery: str, progress: Progress
        ) -> tuple[LlamaForCausalLM, Measurement]:
            self._last_cut = None
            model, point = compress(bench, plan, recovery, progress)
            self._last_cut = (request, identity(plan, recovery), model)
            return model, point

        decision = decided(bench, *cut.ratios, cut.choices, report)
        return measured(bench, decision, cut.recovery, report, compress_and_hold)

    def model(self, request: Request, point: Measurement, report: Progress) -> LlamaForCausalLM:
        """The pruned model of a point: that of the last cut where it is the same, or made anew."""
        asked = (request, identity(point.plan, point.recovery))
        if self._last_cut is None or self._last_cut[:2] != asked:
            self._last_cut = None
            bench = self.bench(request, report)
            model, _ = carry_out(bench, point.plan, point.recovery, report)
            self._last_cut = (*asked, model)
        return self._last_cut[2]


@st.cache_resource(show_spinner=False)
def workbench() -> Workbench:
    # Streamlit collects garbage after every run of a page or a fragment. To look through the half
    # million objects of imported libraries each time took a third of a second, in which nothing
    # else in this process moved.
    gc.collect()
    gc.freeze()
    return Workbench()


def visitor_id() -> str | None:
    """What tells this browser from others and survives a reload; None where it has no cookie.

    It is made of the token that Streamlit gives each browser against forged requests, masked anew
    on every answer: `version|mask|masked token|time`. The token itself is kept nowhere.
    """
    try:
        _, mask, masked, _ = st.context.cookies.get(XSRF_COOKIE, "").strip('"').split("|")
        token = bytes(a ^ b for a, b in zip(bytes.fromhex(masked), cycle(bytes.fromhex(mask))))
    except ValueError:
        return None
    return hashlib.sha256(token).hexdigest() if len(token) >= 16 else None


def begin_visit(user: str | None = None) -> None:
    """Called by app.py, through which every visit begins; a user is one visitor in any browser."""
    if "visit" not in st.session_state:
        st.session_state["visit"] = Visit(workbench().visitor(user or visitor_id()))


def visit() -> Visit:
    """What this tab looks at, and what is its visitor's."""
    if "visit" not in st.session_state:
        # A server's first visitor who comes by a page's own address gets that page run alone:
        # until `st.navigation` was called once, Streamlit takes `pages/` for its older kind of app.
        name = PurePosixPath(urlsplit(st.context.url or "").path).name
        st.switch_page("app.py", query_params={**st.query_params, WANTED: name})
    return st.session_state["visit"]


def holding() -> Holding:
    """What this visitor has of the request in view."""
    mine = visit()
    return mine.visitor.of(mine.request)


def points() -> list[Measurement]:
    """What this visitor measured on the bench in view."""
    return holding().points


def identity(plan: PruningPlan, recovery: str) -> tuple:
    """What makes two cuts of one bench the same, whatever ratio asked for them."""
    return plan.layers, plan.slots, plan.importance, recovery


def find_point(plan: PruningPlan, recovery: str) -> Measurement | None:
    """A point of this visitor with the same cut."""
    wanted = identity(plan, recovery)
    return next(
        (point for point in points() if identity(point.plan, point.recovery) == wanted), None
    )


def asked_by(cut: Cut, known: Iterable[Measurement]) -> Measurement | None:
    """The point, among those known, that was asked for by these very controls."""
    return next((point for point in known if Cut.of(point) == cut), None)


def add_point(known: list[Measurement], point: Measurement) -> None:
    """A point joins others; it takes the place of one with the same cut."""
    same = identity(point.plan, point.recovery)
    others = [each for each in known if identity(each.plan, each.recovery) != same]
    known[:] = [*others, point][-POINTS_KEPT:]
    workbench().make_room()


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


def first_look(choices: Choices) -> Choices:
    """What a plan is drawn by while `auto`, steps and sequential choices are not decided."""
    granularity = choices.granularity if choices.granularity != "auto" else Choices.granularity
    return replace(choices, granularity=granularity, steps=1, sequential=False)


def what_to_learn(choices: Choices) -> Choices:
    """The choices that a prediction's measurements depend on; the rest are as usual."""
    if choices.granularity == "head-dims":
        return replace(choices, steps=1, multiple_of=1, sequential=False)
    return Choices(importance=choices.importance)


def find_cut(bench: Bench, cut: Cut) -> Decision | None:
    """How a cut was or would be decided; None where that takes trying, and it was not tried."""
    own = asked_by(cut, points())
    return own.decision if own else find_decision(bench, *cut.ratios, cut.choices)


def plan_at(bench: Bench, cut: Cut, decision: Decision | None) -> PruningPlan:
    """The plan of a cut as it was decided, or a first look at one that is not decided yet."""
    return decision.plan if decision else bench.plan(*cut.ratios, first_look(cut.choices))


def start(title: str, work: Work, about: Hashable) -> Job:
    """Queues work of this visitor's.

    The work asks `Workbench.bench` for its bench when its turn has come: what waits holds no model.
    """
    visitor = visit().visitor
    finished = [job for job in visitor.jobs if job.finished][-FINISHED_JOBS_KEPT:]
    job = workbench().queue.submit(title, work, owner=visitor, about=about)
    visitor.jobs[:] = [each for each in visitor.jobs if not each.finished or each in finished]
    visitor.jobs.append(job)
    return job


def kept_at_hand(bench: Bench, ratios: Pair, choices: Choices) -> Measurement | None:
    """The point on disk, where it can be looked up without measuring anything."""
    prepared = bench.prepared(first_look(choices))
    return find_kept_point(bench, ratios, choices) if prepared else None


def start_cut(bench: Bench, cut: Cut) -> None:
    """The point of a cut joins this visitor's: at once where it is kept, or measured by a job.

    Nothing more is started where a job measures it already.
    """
    mine, request = points(), visit().request
    about = "cut", request, cut
    earlier = visit().latest_job(about)
    if earlier is not None and not earlier.finished:
        return
    known = kept_at_hand(bench, cut.ratios, cut.choices)
    if known is not None:
        add_point(mine, known)
        return

    def work(report: Progress) -> Measurement:
        point = workbench().measure(request, cut, report)
        add_point(mine, point)
        return point

    start(f"Cut of {in_words(cut.ratios)}", work, about)


def start_curve(bench: Bench, ratios: list[Pair], choices: Choices) -> None:
    """Each point of a curve joins this visitor's as soon as it is measured, at once where kept."""
    mine, request = points(), visit().request
    kept = {pair: kept_at_hand(bench, pair, choices) for pair in ratios}
    missing = [pair for pair in ratios if kept[pair] is None]
    for pair in set(ratios) - set(missing):
        add_point(mine, kept[pair])
    if not missing:
        return
    missing = most_informative_first(missing)

    def work(report: Progress) -> Iterator[tuple[int, int]]:
        bench = workbench().bench(request, report)
        bench.prepare(first_look(choices), report)
        bench.dense(report)
        del bench
        yield 0, len(missing)
        for number, pair in enumerate(missing, start=1):

            def counted(stage: str, done: int, total: int, number: int = number) -> None:
                report(f"point {number} of {len(missing)}: {stage.lower()}", done, total)

            add_point(mine, point_at(workbench().bench(request, report), pair, choices, counted))
            yield number, len(missing)
        return len(missing)

    start(f"Curve up to {in_words(missing[0])}", work, ("curve", request))


def in_words(ratios: Pair) -> str:
    return f"MHA {ratios[0]:.0%}, MLP {ratios[1]:.0%}"


def point_of(cut: Cut, request: Request, known: list[Measurement], report: Progress) -> Measurement:
    """The point of a cut among those known, or measured now and added to them; for jobs."""
    point = asked_by(cut, known) or workbench().measure(request, cut, report)
    add_point(known, point)
    return point


def start_export(cut: Cut, folder: Path) -> None:
    """Queues the writing of a checkpoint; its cut is made and measured where that is not known."""
    mine, request = points(), visit().request

    def work(report: Progress) -> Path:
        require_writable(folder, settings())
        require_free_output(folder)
        point = point_of(cut, request, mine, report)
        require_room(folder, point.footprint)
        model = workbench().model(request, point, report)
        report("Writing the checkpoint", 0, 1)
        bench = workbench().bench(request, report)
        compression = describe_compression(bench, point.decision, point.recovery)
        write_checkpoint(folder, model, bench, point, compression)
        return folder

    start("Writing the checkpoint", work, ("export", request))
