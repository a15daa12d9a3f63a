"""Jobs about GGUF files: their sizes before, writing one, measuring many, publishing."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from pages.server.jobs import Job
from pages.server.open_models import workbench
from pages.server.points import point_of
from pages.server.request import Cut
from pages.server.settings import require_writable, settings
from pages.server.start_jobs import start
from pages.server.visits import holding, points, visit
from pages.server.written import written_of
from transact_core.base.errors import Progress, TransActError
from transact_core.base.files import require_new_file
from transact_core.experiments.bench import Bench, Measurement, identity
from transact_core.experiments.trained_cut import Subject
from transact_core.export.gguf import WrittenFile
from transact_core.export.gguf_points import FilePoint, find_point
from transact_core.export.publish import Publication, publish, require_publishable
from transact_core.models.llama_cpp import require_llama_cpp
from transact_core.planning.preview import Structure
from transact_core.pruning.plan import PruningPlan
from transact_core.workers import work


def llama_cpp_missing() -> str | None:
    """Why llama.cpp cannot be used here, in a sentence of Markdown; None where it can."""
    try:
        require_llama_cpp()
    except TransActError as missing:
        return str(missing)
    return None


# --- one file --------------------------------------------------------------------------------


def sizes_job(plan: PruningPlan, recovery: str, name: str, with_imatrix: bool) -> Job:
    """The job that works out what a cut's files will be; its result is that of `work.plan_gguf`.

    It is queued at the first call, and again where it was cancelled.
    """
    key = identity(plan, recovery), name, with_imatrix
    return _sizes_job(key, work.plan_gguf, plan, recovery, name, with_imatrix)


def sizes_by_widths_job(table: Structure, recovery: str, chosen: str) -> Job:
    """The job that works out what a file of one type weighs at each pair of widths; queued as
    `sizes_job` does, with the result of `work.gguf_bytes_by_widths`."""
    options = (*table.mha.options, *table.mlp.options)
    key = tuple(option.widths for option in options), recovery, chosen
    return _sizes_job(key, work.gguf_bytes_by_widths, table, recovery, chosen)


def _sizes_job(key: tuple, function: Callable, *arguments: object) -> Job:
    request, held = visit().request, holding().found.setdefault("gguf sizes", {})
    job = held.get(key)
    if job is None or (job.finished and job.result is None and not job.refused):

        def planning(report: Progress) -> object:
            return workbench().run(request, function, report, *arguments)

        queue = workbench().lane(request).queue
        job = held[key] = queue.submit("Working out the sizes", planning, urgent=True)
    return job


def start_gguf(cut: Cut, chosen: str, name: str, with_imatrix: bool, output: Path) -> None:
    """Queues the writing of a GGUF file; its cut is made where it is not at hand."""
    mine, request, written = points(), visit().request, written_of()

    def writing(report: Progress) -> tuple[WrittenFile, float | None]:
        require_writable(output, settings())
        # Looked at before the cut is measured, which may take long; the worker looks again.
        require_new_file(output, needs_folder=False)
        point = point_of(cut, request, mine, report)
        file, perplexity = workbench().run(
            request, work.export_gguf, report, point, chosen, name, with_imatrix, output
        )
        written.keep_file(point.identity, file, perplexity)
        return file, perplexity

    start(f"Writing {chosen}", writing, ("gguf", request))


# --- measured files --------------------------------------------------------------------------


def known_file(bench: Bench, subject: Subject | None, chosen: str) -> FilePoint | None:
    """The measurement of a cut in a type, or of the dense model: of this visit, or kept."""
    held: dict[tuple[tuple | None, str], FilePoint | None]
    held = holding().found.setdefault("file points", {})
    key = subject and subject.identity, chosen
    if key not in held:
        held[key] = find_point(bench, subject, chosen)
    return held[key]


def start_files(
    subjects: Sequence[Subject | None], types: Sequence[str], timed: bool, about: str
) -> None:
    """Queues in the background the measurement of each subject in each type.

    A subject is a measured or a trained cut, or None for the dense model. Rows are kept as they
    are measured.
    """
    request, held = visit().request, holding().found.setdefault("file points", {})
    total = len(subjects) * len(types)

    def measuring(report: Progress) -> Iterator[tuple[int, int]]:
        done = 0
        yield done, total
        for subject in subjects:
            # A type at a time, so that other jobs have their turns.
            for chosen in types:

                def keep(row: FilePoint, subject: Subject | None = subject) -> None:
                    held[subject and subject.identity, row.quantization] = row

                def counted(stage: str, now: int, of: int, place: int = done) -> None:
                    report(f"file {place + 1} of {total}: {stage.lower()}", now, of)

                workbench().run(
                    request, work.measure_gguf, counted, subject, [chosen], timed, received=keep
                )
                done += 1
                yield done, total

    files = "one file" if total == 1 else f"{total} files"
    start(f"Measuring {files} in llama.cpp", measuring, (about, request), background=True)


# --- publishing ------------------------------------------------------------------------------


def uses_own_login() -> bool:
    """Whether who publishes without a token does so by this machine's login to the hub.

    Where others reach the server, they may not write in the name of whoever runs it.
    """
    return settings().local and not settings().controlled


def start_publication(point: Measurement, repository: str, token: str | None, public: bool) -> None:
    """Queues the publication of a cut's folder and GGUF files.

    The token is used by this job and kept nowhere.
    """
    written = written_of()
    folder, files = written.folders[point.identity], written.files_of(point.identity)

    def publishing(report: Progress) -> Publication:
        if not token and not uses_own_login():
            raise TransActError("Publishing from this server needs a token of your own.")
        require_publishable(repository, token)
        return publish(repository, folder, files, public, token, report)

    about = "publish", visit().request
    start(f"Publishing {repository}", publishing, about, queue=workbench().uploads)
