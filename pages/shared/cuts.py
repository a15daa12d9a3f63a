"""Which cut a page is about."""

import streamlit as st

from pages.shared.workbench import Cut, find_point, points, visit
from transact_core.bench import Bench, Measurement


def choose_cut(bench: Bench) -> Cut:
    """The cut at the sliders, or one of those measured in this session."""
    cuts = [visit().cut]
    cuts += [Cut.of(point) for point in reversed(points())]
    cuts = list(dict.fromkeys(cuts))

    def point_of(cut: Cut) -> Measurement | None:
        if not bench.prepared(cut.choices):
            return next((point for point in points() if Cut.of(point) == cut), None)
        return find_point(bench.plan(cut.mha_ratio, cut.mlp_ratio, cut.choices), cut.recovery)

    def describe(cut: Cut) -> str:
        point = point_of(cut)
        return (
            f"{in_words(cut)} · "
            + (f"perplexity {point.perplexity:.2f}" if point else "not measured yet")
            + (" · at the sliders" if cut == cuts[0] else "")
        )

    described = {cut: describe(cut) for cut in cuts}
    return st.selectbox("Cut", cuts, format_func=described.__getitem__)


def in_words(cut: Cut) -> str:
    return (
        f"MHA {cut.mha_ratio:.0%}, MLP {cut.mlp_ratio:.0%} · {cut.granularity} · "
        f"{cut.importance} · {cut.recovery}"
    )
