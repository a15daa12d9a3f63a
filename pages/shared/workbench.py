"""What the pages share: a visitor's request, the bench it opens, the points measured on it."""

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field, replace
from pathlib import Path

import streamlit as st
import torch
from transformers import LlamaForCausalLM

from pages.shared.jobs import DONE, Job, JobQueue, job_threads
from transact_core import corpora
from transact_core.bench import Bench, Choices, Measurement, compress
from transact_core.errors import Progress
from transact_core.export import describe_compression, require_room, write_checkpoint
from transact_core.files import cache_folder, require_free_output, staged_file
from transact_core.models import BUILTIN, LoadedModel, load_model
from transact_core.plan import Granularity, PruningPlan
from transact_core.sweep import sweep

MODELS_KEPT = 2
BENCHES_KEPT = 4


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


@dataclass
class Opening:
    """The jobs that open a request: first its bench, then the dense model's perplexity."""

    bench: Job
    dense: Job
    preparations: dict[Choices, Job] = field(default_factory=dict)
    """The jobs that measured what plans need beyond the opening."""


@dataclass(frozen=True)
class Cut:
    """What the controls of the Compress page say."""

    mha_ratio: float = 0.33
    mlp_ratio: float = 0.3
    granularity: Granularity = Choices.granularity
    importance: str = Choices.importance
    recovery: str = Choices.recovery

    @property
    def choices(self) -> Choices:
        return Choices(
            granularity=self.granularity, importance=self.importance, recovery=self.recovery
        )

    @classmethod
    def of(cls, point: Measurement) -> "Cut":
        plan = point.plan
        return cls(
            plan.mha_ratio, plan.mlp_ratio, plan.granularity, plan.importance, point.recovery
        )


@dataclass
class Visit:
    """One visitor's own things, kept in the session."""

    request: Request = field(default_factory=Request)
    cut: Cut = field(default_factory=Cut)
    points: dict[Request, list[Measurement]] = field(default_factory=dict)
    job: Job | None = None
    """The last job this visitor started from a page."""


class Workbench:
    """What all sessions of one server share: the queue, loaded models, open benches."""

    def __init__(self) -> None:
        # The number of threads that results depend on is the jobs' own.
        torch.set_num_threads(job_threads())
        self.queue = JobQueue()
        self._models: OrderedDict[tuple[str, str, str], LoadedModel] = OrderedDict()
        self._openings: OrderedDict[Request, Opening] = OrderedDict()
        self._last_cut: tuple[Request, PruningPlan, str, LlamaForCausalLM] | None = None

    def open(self, request: Request) -> Opening:
        """The jobs that open this request; sessions that ask for the same share them."""
        opening = self._openings.get(request)
        if opening is None:
            bench = self.queue.submit(
                "Opening the model", lambda report: self._bench(request, report)
            )
            opening = self._openings[request] = Opening(bench, self._dense(bench))
        self._openings.move_to_end(request)
        while len(self._openings) > BENCHES_KEPT:
            self._openings.popitem(last=False)
        return opening

    def reopen(self, request: Request) -> Opening:
        """Opens anew what failed or was cancelled, at the visitor's wish."""
        self._openings.pop(request, None)
        return self.open(request)

    def measure_dense(self, request: Request) -> None:
        """Measures the dense model anew where that failed or was cancelled."""
        opening = self.open(request)
        if opening.dense.finished:
            opening.dense = self._dense(opening.bench)

    def prepare(self, request: Request, choices: Choices, anew: bool = False) -> Job:
        """The job that measures what plans with these choices need; shared as openings are.

        The request must be open. `anew` is for what failed or was cancelled.
        """
        opening = self.open(request)
        # No plan looks at the recovery.
        wanted = replace(choices, recovery=Choices.recovery)
        job = opening.preparations.get(wanted)
        if job is None or (anew and job.finished):
            bench = opening.bench.result
            job = opening.preparations[wanted] = self.queue.submit(
                f"Scoring by {choices.importance}", lambda report: bench.prepare(wanted, report)
            )
        return job

    def _dense(self, bench: Job) -> Job:
        def measure(report: Progress) -> None:
            if bench.state == DONE:
                bench.result.dense(report)

        return self.queue.submit("Measuring the dense model", measure)

    def _bench(self, request: Request, report: Progress) -> Bench:
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
        key = (request.model, request.device, request.dtype)
        if key not in self._models:
            # Room is made first, so that the old and the new model are not held at once.
            while len(self._models) >= MODELS_KEPT:
                dropped, _ = self._models.popitem(last=False)
                self._forget(dropped)
            self._models[key] = load_model(*key, report)
        self._models.move_to_end(key)
        return self._models[key]

    def _forget(self, key: tuple[str, str, str]) -> None:
        for request in list(self._openings):
            if (request.model, request.device, request.dtype) == key:
                del self._openings[request]
        if self._last_cut and self._last_cut[0].model == key[0]:
            self._last_cut = None

    def cut(
        self,
        request: Request,
        bench: Bench,
        plan: PruningPlan,
        recovery: str,
        report: Progress,
        known: Measurement | None = None,
    ) -> tuple[LlamaForCausalLM, Measurement]:
        """Cuts and measures; the model is kept until the next cut, for an export.

        Where the last cut is the one asked for and its point is `known`, neither is made again.
        """
        asked = (request, plan, recovery)
        if known is None or self._last_cut is None or self._last_cut[:3] != asked:
            self._last_cut = None
            model, known = compress(bench, plan, recovery, report)
            self._last_cut = (*asked, model)
        return self._last_cut[3], known


@st.cache_resource(show_spinner=False)
def workbench() -> Workbench:
    return Workbench()


def begin_visit() -> None:
    """Called by app.py, through which every visit begins."""
    st.session_state.setdefault("visit", Visit())


def visit() -> Visit:
    """This session's own things."""
    if "visit" not in st.session_state:
        # A server's first visitor who comes by a page's own address gets that page run alone:
        # until `st.navigation` was called once, Streamlit takes `pages/` for its older kind of app.
        st.switch_page("app.py", query_params=st.query_params)
    return st.session_state["visit"]


def points() -> list[Measurement]:
    """What was measured in this session on the bench in view."""
    mine = visit()
    return mine.points.setdefault(mine.request, [])


def identity(plan: PruningPlan, recovery: str) -> tuple:
    """What makes two cuts of one bench the same, whatever ratio asked for them."""
    return plan.layers, plan.slots, plan.importance, recovery


def find_point(plan: PruningPlan, recovery: str) -> Measurement | None:
    """A point of this session with the same cut."""
    wanted = identity(plan, recovery)
    return next(
        (point for point in points() if identity(point.plan, point.recovery) == wanted), None
    )


def start_cut(bench: Bench, plan: PruningPlan, recovery: str) -> None:
    """Queues one cut; its point joins this session's when it is measured."""
    mine, mine_points, request = visit(), points(), visit().request

    def work(report: Progress) -> Measurement:
        measurement = workbench().cut(request, bench, plan, recovery, report)[1]
        mine_points.append(measurement)
        return measurement

    mine.job = workbench().queue.submit("Pruning and measuring", work)


def start_curve(bench: Bench, ratios: list[tuple[float, float]], choices: Choices) -> None:
    """Queues a curve; each point joins this session's as soon as it is measured."""
    mine, mine_points = visit(), points()

    def work(report: Progress) -> int:
        bench.prepare(choices, report)
        known = {identity(point.plan, point.recovery) for point in mine_points}
        missing = [
            pair
            for pair in ratios
            if identity(bench.plan(*pair, choices), choices.recovery) not in known
        ]
        for measurement in sweep(bench, missing, choices, report):
            mine_points.append(measurement)
        return len(missing)

    mine.job = workbench().queue.submit("Measuring a curve", work)


def start_export(bench: Bench, cut: Cut, folder: Path) -> None:
    """Queues the writing of a checkpoint; its cut is made and measured where none is at hand."""
    mine, mine_points, request = visit(), points(), visit().request
    plan = bench.plan(cut.mha_ratio, cut.mlp_ratio, cut.choices)
    point = find_point(plan, cut.recovery)

    def work(report: Progress) -> Path:
        require_free_output(folder)
        require_room(folder, bench.footprint(plan, cut.recovery))
        model, measurement = workbench().cut(request, bench, plan, cut.recovery, report, point)
        if point is None:
            mine_points.append(measurement)
        report("Writing the checkpoint", 0, 1)
        compression = describe_compression(bench, plan, cut.recovery)
        write_checkpoint(folder, model, bench, measurement, compression)
        return folder

    mine.job = workbench().queue.submit("Writing the checkpoint", work)


def keep_upload(name: str, content: bytes) -> str:
    """Stores an uploaded text under its fingerprint and gives its path as a source."""
    digest = hashlib.sha256(content).hexdigest()[:16]
    path = cache_folder() / "uploads" / digest / Path(name).name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with staged_file(path) as staging:
            staging.write_bytes(content)
    return str(path)
