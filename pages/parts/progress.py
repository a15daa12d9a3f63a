"""A job on the page: what it is doing, how long it will take, a button to stop it."""

from collections.abc import Hashable, Sequence

import streamlit as st

from pages.charts.text import plain
from pages.server.jobs import CANCELLED, DONE, FAILED, QUEUED, Job
from pages.server.open_models import Opening, workbench
from pages.server.visits import visit
from transact_core.experiments.bench import Bench, Choices
from transact_core.forward.perplexity import Evaluation

SOON = 0.4
"""Seconds that work may take before its progress is shown: a bar that flashes tells nothing."""


def seconds_in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min"


def waiting_in_words(job: Job) -> str:
    """What a job waits for; of other visitors' jobs only their number is told."""
    ahead = workbench().queue.ahead_of(job)
    if not ahead:
        return "next in line"
    told = [each.title for each in ahead if each.owner in (job.owner, each)]
    if others := len(ahead) - len(told):
        told.append("another visitor's" if others == 1 else f"{others} of other visitors")
    return f"waiting, {len(ahead)} ahead: {', '.join(told)}"


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


@st.fragment(run_every=0.5)
def watch(key: str, *jobs: Job) -> None:
    """Follows jobs until one of them ends, then draws the whole page again."""
    if any(job.finished for job in jobs):
        st.rerun()
    for number, job in enumerate(jobs):
        with st.container(border=True):
            line, button = st.columns([6, 1], vertical_alignment="center")
            button.button(
                "Cancel",
                key=f"cancel-{key}-{number}",
                width="stretch",
                on_click=job.cancel,
                disabled=job.stopping,
            )
            words = " · ".join(filter(None, (f"**{job.title}**", job_in_words(job))))
            line.progress(job.fraction, words)


def show_job(*about: Hashable) -> bool:
    """Shows this visitor's last job about this where there is one; True while it is unfinished."""
    job = visit().latest_job(about)
    under_way = unfinished(job)
    follow(f"job-{about[0]}", under_way)
    show_end(job)
    return bool(under_way)


def unfinished(*jobs: Job | None) -> list[Job]:
    """To be asked before what depends on these jobs is drawn: what ends later is followed still."""
    return [job for job in jobs if job is not None and not job.finished]


def follow(key: str, under_way: Sequence[Job]) -> None:
    """Shows the progress of jobs, if there are any, and draws the page anew when one ends.

    Not to be called in a fragment: what is nested and runs by itself can hide what is drawn around
    it (https://github.com/streamlit/streamlit/issues/16708).
    """
    if under_way:
        watch(key, *under_way)


def show_end(job: Job | None) -> None:
    """Why a job came to nothing, where it did."""
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

    @st.fragment(run_every=1.0 if unfinished else None)
    def list_jobs() -> None:
        if any(job.finished for job in unfinished):
            st.rerun()
        for number, job in enumerate(reversed(visitor.jobs)):
            if job.finished:
                reason = f": {plain(job.error)}" if job.error else ""
                st.caption(f"{STATES[job.state]} {job.title} · {job.state}{reason}")
                continue
            line, button = st.columns([5, 1], vertical_alignment="center", gap="small")
            line.progress(job.fraction, f"**{job.title}**")
            button.button(
                "",
                icon=":material/close:",
                key=f"cancel-job-{number}",
                type="tertiary",
                help=f"Cancel: {job.title}",
                on_click=job.cancel,
                disabled=job.stopping,
            )
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
