"""Which text a perplexity was measured on, in words, and what that text cannot tell."""

import math

import streamlit as st

from pages.charts.text import plain
from transact_core.data.corpus import of_one_kind, short_name
from transact_core.experiments.bench import Bench, Measurement


def text_in_words(bench: Bench, place: int = 0) -> str:
    """One of the bench's evaluation texts and how many tokens of it are used; 0 is the first."""
    windows = bench.evaluated[place]
    return (
        f"{windows.tokens:,} tokens of {plain(short_name(windows.source))} in windows of "
        f"{windows.sequence_length:,}"
    )


def choose_text(bench: Bench, key: str) -> int:
    """Which of the evaluation texts is shown, by its place; asked where there are several."""
    if not bench.others:
        return 0
    return st.segmented_control(
        "Evaluation text",
        list(range(len(bench.evaluated))),
        default=0,
        required=True,
        format_func=lambda place: plain(short_name(bench.evaluated[place].source)),
        key=f"{key}-text-{len(bench.evaluated)}",
    )


def like_calibration(bench: Bench, place: int = 0) -> bool:
    """Whether an evaluation text is known to be of the calibration text's kind."""
    windows = bench.evaluated[place]
    same = windows.sha256 == bench.calibration.sha256
    return same or of_one_kind(windows.source, bench.calibration.source)


def kind_warning(bench: Bench, place: int = 0) -> str | None:
    """A sentence where calibration and evaluation are of one kind, for `st.caption`."""
    if not like_calibration(bench, place):
        return None
    advice = (
        ""
        if any(not like_calibration(bench, other) for other in range(len(bench.evaluated)))
        else " Choose a second evaluation text in the sidebar."
    )
    return (
        ":orange[:material/warning: Calibration and evaluation are of one kind] "
        f"({plain(short_name(bench.evaluated[place].source))}): a repair fitted on one kind of "
        f"text can cost far more on another.{advice}"
    )


def on_other_texts(bench: Bench, point: Measurement) -> str | None:
    """Times dense of a cut on the bench's other texts, in a sentence; None without such texts."""
    said = [
        f"{plain(short_name(windows.source))} **{math.exp(there.delta_nll):.2f} ×**"
        for place, windows in enumerate(bench.others, start=1)
        if bench.dense_known(windows)
        for there in [point.on_text(bench, place)]
    ]
    return f"On {', '.join(said)}." if said else None
