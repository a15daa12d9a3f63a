"""A job on the page: what it is doing, how long it will take, a button to stop it."""

import streamlit as st

from pages.shared.jobs import CANCELLED, DONE, FAILED, QUEUED, Job
from pages.shared.workbench import Opening, visit, workbench
from transact_core.bench import Bench, Choices
from transact_core.evaluation import Evaluation

SOON = 0.4
"""Seconds that work may take before its progress is shown: a bar that flashes tells nothing."""


def seconds_in_words(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min"


@st.fragment(run_every=0.5)
def watch(job: Job, key: str) -> None:
    """Follows a job until it ends, then draws the whole page again."""
    if job.finished:
        st.rerun()
    with st.container(border=True):
        line, button = st.columns([6, 1], vertical_alignment="center")
        button.button(
            "Cancel", key=f"cancel-{key}", width="stretch", on_click=job.cancel,
            disabled=job.stopping,
        )  # fmt: skip
        ahead = workbench().queue.ahead_of(job)
        if job.state == QUEUED:
            waiting = "next in line" if ahead <= 1 else f"{ahead} jobs ahead"
            line.progress(0.0, f"**{job.title}** · waiting, {waiting}")
        else:
            left = None if job.stopping else job.seconds_left
            text = f"**{job.title}**"
            if job.stage != job.title:
                text += f" · {job.stage or 'starting'}"
            if job.stopping:
                text += " · stopping"
            if left is not None:
                text += f" · about {seconds_in_words(left)} left in this step"
            line.progress(job.fraction, text)


def show_job(key: str) -> bool:
    """Shows this session's own job where there is one; True while it is unfinished."""
    job = visit().job
    if job is None:
        return False
    if not job.finished:
        watch(job, key)
        return True
    if job.state == FAILED:
        st.error(f"{job.title} failed. {job.error}", icon=":material/error:")
    if job.state == CANCELLED:
        st.info(f"{job.title} was cancelled. What was measured before is kept.")
    return False


def require_bench() -> Bench:
    """The bench of this session's request; until it is open, its progress instead of the page."""
    opening: Opening = workbench().open(visit().request)
    job = opening.bench
    if not job.finished:
        st.caption("The first opening converts the built-in model once; later ones take seconds.")
        watch(job, "opening")
        st.stop()
    if job.state != DONE:
        st.error(job.error or "The loading was cancelled.", icon=":material/error:")
        st.caption("Change the model or the text in the sidebar, or try again.")
        if st.button("Try again", type="primary"):
            workbench().reopen(visit().request)
            st.rerun()
        st.stop()
    return job.result


def require_prepared(bench: Bench, choices: Choices, key: str) -> bool:
    """Whether plans with these choices can be made; until then the progress in their place."""
    if bench.prepared(choices):
        return True
    job = workbench().prepare(visit().request, choices)
    if not job.wait(SOON):
        watch(job, f"{key}-prepare")
        return False
    if job.state == DONE:
        return True
    if job.state == FAILED:
        st.error(job.error, icon=":material/error:")
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
    job = opening.dense
    if not job.finished:
        watch(job, key)
        return None
    if job.state == DONE:
        return opening.bench.result.dense()
    if job.state == FAILED:
        st.error(f"{job.title} failed. {job.error}", icon=":material/error:")
    if st.button("Measure the dense model", key=f"dense-{key}"):
        workbench().measure_dense(visit().request)
        st.rerun()
    return None
