"""Progress of jobs on a page: what each is doing, how long it will take, a button to cancel it.

Progress belongs where the button is that began the job, and what comes of the job takes its place.
"""

from collections.abc import Hashable, Sequence

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from pages.charts.text import plain
from pages.server.jobs import CANCELLED, DONE, FAILED, QUEUED, RUNNING, Job
from pages.server.open_models import Opening, workbench
from pages.server.visits import visit
from transact_core.base.errors import TransActError
from transact_core.experiments.bench import Bench, Choices
from transact_core.forward.perplexity import Evaluation

SOON = 0.4
"""Seconds that a page waits for a job before it shows progress: a bar that flashes tells nothing.
"""
FOLLOWED_EVERY, LISTED_EVERY = 1.0, 2.0
"""Seconds between two looks at a job, where it was begun and in the sidebar's list. Each look of
each open page costs the server and the browser some hundredths of a second of the processor, which
the job itself may want."""
MINUTE, HOUR, DAY = 60, 3600, 86_400
"""In seconds."""


def seconds_in_words(seconds: float) -> str:
    """A duration in the largest unit of which there are about two or more."""
    if seconds < 1.5 * MINUTE:
        return f"{max(1, round(seconds))} s"
    for unit, name in ((DAY, "days"), (HOUR, "hours")):
        if seconds >= 1.5 * unit:
            count = seconds / unit
            return f"{count:.0f} {name}" if count >= 10 else f"{count:.1f} {name}"
    return f"{round(seconds / MINUTE)} min"


def estimate_in_words(seconds: float | None) -> str:
    """How long work takes that has not begun; goes on after "takes"."""
    if seconds is None:
        return "a time that is not known before the dense model is measured"
    return "a few seconds" if seconds < 5 else f"about {seconds_in_words(seconds)}"


def waiting_in_words(job: Job) -> str:
    """What a job waits for; of other visitors' jobs only their number is shown."""
    ahead = job.queue.ahead_of(job)
    if not ahead:
        return "next in line"
    # A job without an owner is its own: it belongs to no visitor.
    titles = [other.title for other in ahead if other.owner in (job.owner, other)]
    if others := len(ahead) - len(titles):
        titles.append("another visitor's" if others == 1 else f"{others} of other visitors")
    return f"waiting, {len(ahead)} ahead: {', '.join(titles)}"


def job_in_words(job: Job) -> str:
    """How far a job is, without its title."""
    parts = [job.stage] if job.stage and job.stage != job.title else []
    if job.stopping:
        return " · ".join([*parts, "stopping"])
    if job.state == QUEUED:
        parts = [f"{job.pieces_done} of {job.pieces} done"] if job.pieces_done else []
        parts.append(waiting_in_words(job))
    elif not job.stage:
        parts.append("starting")
    if (left := job.seconds_left) is not None:
        scope = "" if job.pieces_done else " in this step"
        parts.append(f"about {seconds_in_words(left)} left{scope}")
    return " · ".join(parts)


@st.fragment(run_every=FOLLOWED_EVERY)
def watch(key: str, *jobs: Job) -> None:
    """Follows jobs until one of them ends, then draws the whole page again."""
    if any(job.finished for job in jobs):
        st.rerun()
    for place, job in enumerate(jobs):
        with st.container(border=True):
            line, button = st.columns([6, 1], vertical_alignment="center")
            button.button(
                "Cancel",
                key=f"cancel-{key}-{place}",
                width="stretch",
                on_click=job.cancel,
                disabled=job.stopping,
            )
            line.progress(job.fraction, titled(job))


def titled(job: Job) -> str:
    """A job's title and how far it is."""
    return " · ".join(filter(None, (f"**{job.title}**", job_in_words(job))))


@st.fragment(run_every=FOLLOWED_EVERY)
def watch_in_one_line(key: str, *jobs: Job) -> None:
    """As `watch`, in the same height whatever the number of jobs: the one that runs is shown."""
    if any(job.finished for job in jobs):
        st.rerun()
    job = next((job for job in jobs if job.state == RUNNING), jobs[0])
    line, button = st.columns([12, 1], vertical_alignment="center", gap="small")
    more = f" · {len(jobs) - 1} more waiting" if len(jobs) > 1 else ""
    line.progress(job.fraction, titled(job) + more)
    cancel_button(button, job, f"cancel-{key}")


def cancel_button(place: DeltaGenerator, job: Job, key: str) -> None:
    """A small button that cancels a job."""
    place.button(
        "",
        icon=":material/close:",
        key=key,
        type="tertiary",
        help=f"Cancel: {job.title}",
        on_click=job.cancel,
        disabled=job.stopping,
    )


def show_job(*about: Hashable) -> bool:
    """Shows this visitor's last job of that `about`, if any; True while it is unfinished."""
    job = visit().latest_job(about)
    under_way = unfinished(job)
    follow(f"job-{about[0]}", under_way)
    show_end(job)
    return bool(under_way)


def unfinished(*jobs: Job | None) -> list[Job]:
    """Those of the jobs that have not ended.

    To be called before what depends on these jobs is drawn: a job that ends meanwhile is followed
    still, so that the page is drawn again.
    """
    return [job for job in jobs if job is not None and not job.finished]


def follow(key: str, under_way: Sequence[Job]) -> None:
    """Shows the progress of jobs, if there are any, and draws the page anew when one ends.

    Not to be called in a fragment: a fragment that runs by itself inside another one can hide what
    is drawn around it (https://github.com/streamlit/streamlit/issues/16708).
    """
    if under_way:
        watch(key, *under_way)


def show_end(job: Job | None) -> None:
    """Why a job failed, or that it was cancelled; nothing for any other job."""
    if job is None:
        return
    if job.state == FAILED:
        st.error(f"{job.title} failed. {plain(job.error)}", icon=":material/error:")
    if job.state == CANCELLED:
        st.info(f"{job.title} was cancelled. What was measured before is kept.")


STATES = {
    DONE: ":material/check_circle:",
    FAILED: ":material/error:",
    CANCELLED: ":material/cancel:",
}


def show_jobs() -> None:
    """This visitor's jobs, from every tab; the page is drawn again when one of them ends."""
    visitor = visit().visitor
    unfinished = visitor.unfinished_jobs

    @st.fragment(run_every=LISTED_EVERY if unfinished else None)
    def list_jobs() -> None:
        if any(job.finished for job in unfinished):
            st.rerun()
        for place, job in enumerate(reversed(visitor.jobs)):
            if job.finished:
                reason = f": {plain(job.error)}" if job.error else ""
                st.caption(f"{STATES[job.state]} {job.title} · {job.state}{reason}")
                continue
            line, button = st.columns([5, 1], vertical_alignment="center", gap="small")
            line.progress(job.fraction, f"**{job.title}**")
            cancel_button(button, job, f"cancel-job-{place}")
            st.caption(job_in_words(job))

    if visitor.jobs:
        st.divider()
        st.markdown("**Jobs**")
        list_jobs()


def show_opening() -> Bench | None:
    """The bench of this session's request; until it is open, its progress or the way to it."""
    opening: Opening = workbench().open(visit().request)
    job = opening.bench
    if not job.finished:
        st.caption("The first opening converts the built-in model once; later ones take seconds.")
        watch("opening", job)
        return None
    if job.state == DONE:
        return job.result
    st.error(plain(job.error or "The loading was cancelled."), icon=":material/error:")
    st.caption("Change the model or the text in the sidebar, or try again.")
    if st.button("Try again", type="primary"):
        workbench().reopen(visit().request)
        st.rerun()
    return None


def require_bench() -> Bench:
    """The bench of this session's request; without it the page ends here."""
    bench = show_opening()
    if bench is None:
        st.stop()
    return bench


def require_prepared(bench: Bench, choices: Choices, key: str) -> bool:
    """Whether plans with these choices can be made; until then the progress in their place."""
    if bench.prepared(choices):
        return True
    try:
        bench.require_recovery_of_class(choices.recovery)
    except TransActError as error:
        st.error(plain(str(error)), icon=":material/error:")
        return False
    job = workbench().prepare(visit().request, choices)
    if not job.wait(SOON):
        watch(f"{key}-prepare", job)
        return False
    if job.state == DONE:
        return True
    if job.state == FAILED:
        st.error(plain(job.error), icon=":material/error:")
    else:
        st.info(
            f"{job.title} was cancelled. Choose what was measured before, or measure this.",
            icon=":material/info:",
        )
    # What was refused in a sentence is refused again.
    if not job.refused and st.button("Measure it", key=f"measure-{key}", type="primary"):
        workbench().prepare(visit().request, choices, anew=True)
        st.rerun()
    return False


def show_dense(key: str) -> Evaluation | None:
    """The dense model's losses; while there are none, their progress or the way to them."""
    opening = workbench().open(visit().request)
    under_way = unfinished(opening.dense)
    follow(key, under_way)
    if not show_dense_end(key) or under_way:
        return None
    return opening.bench.result.dense()


def show_dense_end(key: str) -> bool:
    """True where the dense model's job has not come to nothing; else why, and the way on."""
    job = workbench().open(visit().request).dense
    if job.state not in (FAILED, CANCELLED):
        return True
    if job.state == FAILED:
        st.error(f"{job.title} failed. {plain(job.error)}", icon=":material/error:")
    if st.button("Measure the dense model", key=f"dense-{key}"):
        workbench().measure_dense(visit().request)
        st.rerun()
    return False
