"""The control that chooses the cut, or the trained cut, that a page shows."""

import streamlit as st

from pages.parts.progress import require_bench, require_prepared
from pages.server.points import asked_by, find_cut, find_point
from pages.server.request import Cut, first_look, layers_in_words
from pages.server.trainings import trained_cuts
from pages.server.visits import points, visit
from transact_core.experiments.bench import Bench, Measurement
from transact_core.experiments.trained_cut import TrainedCut

WIDTHS_IN_WORDS = {
    "allocated": "widths allocated",
    "traded": "widths traded",
    "by-hand": "widths by hand",
}


def require_cut(key: str) -> tuple[Bench, Cut]:
    """The bench and the cut that a page is about; until both can be had, progress in its place."""
    bench = require_bench()
    cut = choose_cut(bench)
    if not require_prepared(bench, cut.choices, key):
        st.stop()
    return bench, cut


def require_cut_or_trained(key: str) -> tuple[Bench, Cut, TrainedCut | None]:
    """As `require_cut`, with the visitor's trained cuts to choose from too; None for a mere cut."""
    bench = require_bench()
    trained = [(run.cut, found) for run, found in trained_cuts()]
    cut, chosen = _choose([*((cut, None) for cut in _cuts()), *trained], bench)
    if chosen is None and not require_prepared(bench, cut.choices, key):
        st.stop()
    return bench, cut, chosen


def choose_cut(bench: Bench) -> Cut:
    """The cut at the sliders, or one of those this visitor measured."""
    return _choose([(cut, None) for cut in _cuts()], bench)[0]


def _cuts() -> list[Cut]:
    """The cut at the sliders, and the measured ones, the latest first."""
    return list(dict.fromkeys([visit().cut, *(Cut.of(point) for point in reversed(points()))]))


def _choose(
    offered: list[tuple[Cut, TrainedCut | None]], bench: Bench
) -> tuple[Cut, TrainedCut | None]:
    """One of these, the first of which is at the sliders."""

    def point_of(cut: Cut) -> Measurement | None:
        own = asked_by(cut, points())
        if own or not bench.prepared(first_look(cut.choices)):
            return own
        decision = find_cut(bench, cut)
        return find_point(decision.plan, cut.recovery) if decision else None

    def describe(place: int) -> str:
        cut, trained = offered[place]
        known = trained or point_of(cut)
        return (
            f"{model_in_words(cut, trained)} · "
            + (f"perplexity {known.perplexity:.2f}" if known else "not measured yet")
            + ("" if place else " · at the sliders")
        )

    described = list(map(describe, range(len(offered))))
    place = st.selectbox("Cut", range(len(offered)), format_func=described.__getitem__)
    return offered[place]


def widths_in_words(cut: Cut) -> str:
    """How widths were given to layers, as the end of a description; empty where all are alike."""
    if cut.widths == "uniform":
        return ""
    whole = f", layers {layers_in_words(cut.keep_layers)} whole" if cut.keep_layers else ""
    return f" · {WIDTHS_IN_WORDS[cut.widths]}{whole}"


def in_words(cut: Cut) -> str:
    return (
        f"MHA {cut.mha_ratio:.0%}, MLP {cut.mlp_ratio:.0%} · {cut.granularity} · "
        f"{cut.importance} · {cut.recovery}"
        + (f" · {cut.steps} steps" if cut.steps > 1 else "")
        + (" · sequential" if cut.sequential else "")
        + widths_in_words(cut)
    )


def model_in_words(cut: Cut, trained: TrainedCut | None) -> str:
    """A cut, or what it became by training."""
    return in_words(cut) + (f" · {trained.words_with_text}" if trained else "")
