"""The control that chooses the cut that a page shows."""

import streamlit as st

from pages.parts.progress import require_bench, require_prepared
from pages.server.points import asked_by, find_cut, find_point
from pages.server.request import Cut, first_look, layers_in_words
from pages.server.visits import points, visit
from transact_core.experiments.bench import Bench, Measurement

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


def choose_cut(bench: Bench) -> Cut:
    """The cut at the sliders, or one of those this visitor measured."""
    cuts = [visit().cut]
    cuts += [Cut.of(point) for point in reversed(points())]
    cuts = list(dict.fromkeys(cuts))

    def point_of(cut: Cut) -> Measurement | None:
        own = asked_by(cut, points())
        if own or not bench.prepared(first_look(cut.choices)):
            return own
        decision = find_cut(bench, cut)
        return find_point(decision.plan, cut.recovery) if decision else None

    def describe(cut: Cut) -> str:
        point = point_of(cut)
        return (
            f"{in_words(cut)} · "
            + (f"perplexity {point.perplexity:.2f}" if point else "not measured yet")
            + (" · at the sliders" if cut == cuts[0] else "")
        )

    described = {cut: describe(cut) for cut in cuts}
    return st.selectbox("Cut", cuts, format_func=described.__getitem__)


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
