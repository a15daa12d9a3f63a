"""Jobs that pages start: a cut, a curve, an export."""

import time
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

from pages.server.jobs import Job, JobQueue, Work
from pages.server.open_models import workbench
from pages.server.points import add_point, kept_at_hand, measure, point_of
from pages.server.request import Cut, Request, first_look, what_to_price
from pages.server.settings import require_writable, settings
from pages.server.visits import holding, points, visit
from pages.server.written import written_of
from transact_core.base.errors import Cancelled, Progress
from transact_core.base.files import require_free_output
from transact_core.experiments.bench import Bench, Choices, Measurement
from transact_core.experiments.sweep import Pair, most_informative_first
from transact_core.pruning.plan import ByHand
from transact_core.workers import work

FINISHED_JOBS_KEPT = 4
CLUSTER_TURN_SECONDS = 600
"""How long a curve keeps the workers of a cluster while another visitor's waits for them."""


def start(
    title: str,
    doing: Work,
    about: Hashable,
    background: bool = False,
    queue: JobQueue | None = None,
) -> Job:
    """Queues work of this visitor's, in the lane of the request in view or in another queue."""
    visitor, request = visit().visitor, visit().request
    finished = [job for job in visitor.jobs if job.finished][-FINISHED_JOBS_KEPT:]
    queue = queue or workbench().lane(request).queue
    job = queue.submit(title, doing, owner=visitor, about=about, background=background)
    visitor.jobs[:] = [old for old in visitor.jobs if not old.finished or old in finished]
    visitor.jobs.append(job)
    return job


def under_way(about: Hashable) -> bool:
    """Whether a job of this visitor's that is about this has not ended."""
    earlier = visit().latest_job(about)
    return earlier is not None and not earlier.finished


def start_cut(bench: Bench, cut: Cut) -> None:
    """The point of a cut joins this visitor's: at once where it is kept, or measured by a job.

    Nothing more is started where a job measures it already.
    """
    mine, request = points(), visit().request
    about = "cut", request, cut
    if under_way(about):
        return
    known = kept_at_hand(bench, cut.ratios, cut.choices)
    if known is not None:
        add_point(mine, known)
        return

    def measuring(report: Progress) -> Measurement:
        point = measure(cut, request, report)
        add_point(mine, point)
        return point

    start(f"Cut of {in_words(cut.ratios)}", measuring, about)


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
    title, about = f"Curve up to {in_words(missing[0])}", ("curve", request)
    if (cluster := settings().ray) is not None:
        said = holding().found["cluster"] = []
        start(
            title,
            lambda report: _on_cluster(
                cluster, request, bench, missing, choices, mine, said, report
            ),
            about,
            queue=workbench().cluster().queue,
        )
        return

    def measuring(report: Progress) -> Iterator[tuple[int, int]]:
        workbench().run(request, work.prepare, report, first_look(choices))
        workbench().run(request, work.measure_dense, report)
        yield 0, len(missing)
        for place, pair in enumerate(missing, start=1):

            def counted(stage: str, done: int, total: int, place: int = place) -> None:
                report(f"point {place} of {len(missing)}: {stage.lower()}", done, total)

            point = workbench().run(request, work.curve_point, counted, pair, choices)
            add_point(mine, point)
            yield place, len(missing)
        return len(missing)

    start(title, measuring, about)


def said_of_cluster() -> list[str]:
    """Sentences on the cluster's workers from this visitor's last curve with the bench in view."""
    return holding().found.get("cluster", [])


def _on_cluster(
    address: str,
    request: Request,
    bench: Bench,
    missing: list[Pair],
    choices: Choices,
    mine: list[Measurement],
    said: list[str],
    report: Progress,
) -> Iterator[tuple[int, int]]:
    """The work of a curve on a Ray cluster, which keeps its workers for a whole turn.

    What is under way at a turn's end is measured again at the next one.
    """
    left, lane = list(missing), workbench().cluster()

    def received(thing: Measurement | str) -> None:
        if isinstance(thing, str):
            said.append(thing)
            return
        add_point(mine, thing)
        left.remove((thing.plan.mha_ratio, thing.plan.mlp_ratio))

    while left:
        turn_ends, at_first, gave_up = time.monotonic() + CLUSTER_TURN_SECONDS, len(left), False

        def reporting(
            stage: str,
            done: int,
            total: int,
            turn_ends: float = turn_ends,
            at_first: int = at_first,
        ) -> None:
            nonlocal gave_up
            report(stage, done, total)
            # A turn has a point at least, however long models take to load.
            if time.monotonic() > turn_ends and len(left) < at_first and lane.queue.others_wait():
                gave_up = True
                raise Cancelled

        try:
            workbench().run(
                request,
                work.curve_on_ray,
                reporting,
                bench.without_model(),
                list(left),
                choices,
                address,
                received=received,
                lane=lane,
            )
        except Cancelled:
            if not gave_up:
                raise
        yield len(missing) - len(left), len(missing)
    return len(missing)


def start_pricing(choices: Choices) -> None:
    """Measures what the cuts of single layers lose; once, however often it is asked for."""
    request, wanted = visit().request, what_to_price(choices)
    about = "prices", request, wanted
    if under_way(about):
        return

    def pricing(report: Progress) -> None:
        workbench().keep_prices(
            request, wanted, workbench().run(request, work.price, report, wanted)
        )

    start("Measuring the layers' prices", pricing, about)


def start_filling(
    ratios: Pair, choices: Choices, fixed: Mapping[str, Mapping[int, int]], about: Hashable
) -> None:
    """Chooses the widths of all layers that are not fixed, so that the ratios hold.

    The job's result is the widths. What the cuts of single layers lose is measured on the way
    where it is not known.
    """
    request, wanted = visit().request, replace(choices.of_uniform, steps=1, sequential=False)
    if under_way(about):
        return

    def filling(report: Progress) -> ByHand:
        known = workbench().prices(request, wanted)
        laws, widths = workbench().run(request, work.fill, report, ratios, wanted, fixed, known)
        workbench().keep_prices(request, wanted, laws)
        return widths

    start("Filling the rest of the budget", filling, about)


def in_words(ratios: Pair) -> str:
    return f"MHA {ratios[0]:.0%}, MLP {ratios[1]:.0%}"


def start_export(
    cut: Cut, folder: Path, tasks: dict[str, object] | None = None, modeling_file: bool = False
) -> None:
    """Queues the writing of a checkpoint; its cut is made and measured where that is not known.

    `tasks` is what `tasks.json` would hold of this cut, for report.json and the model card;
    `modeling_file` as `write_checkpoint` takes it.
    """
    mine, request, written = points(), visit().request, written_of()

    def writing(report: Progress) -> Path:
        require_writable(folder, settings())
        # Looked at before the cut is measured, which may take long; the worker looks again.
        require_free_output(folder)
        point = point_of(cut, request, mine, report)
        place = workbench().run(request, work.export, report, point, folder, tasks, modeling_file)
        written.keep_folder(point.identity, place)
        return place

    start("Writing the checkpoint", writing, ("export", request))
