"""A chart with what belongs to it: how to read it, and its numbers and its picture to take away."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import plotly.graph_objects as go
import streamlit as st

if TYPE_CHECKING:
    import pandas as pd

NARROW = 42
"""Characters of a title that fit half the width of a page 1280 pixels wide."""
LINE = 22
"""Pixels from one line of a title to the next."""


def show(
    figure: go.Figure,
    key: str,
    reading: str,
    frame: Callable[[], pd.DataFrame] | None = None,
    narrow: bool = False,
    **options: Any,
) -> Any:
    """Draws a chart, one sentence on how to read it, and a button for its numbers as CSV.

    `frame` is called when its button is pressed. `narrow` is for half a page: a long title is
    broken, and what is below it moves down. Plotly's own camera saves the chart as SVG.
    `options` go to `st.plotly_chart`, whose answer is given back: with `on_select`, what is chosen.
    """
    title = figure.layout.title.text
    if narrow:
        lines = textwrap.wrap(title, NARROW, break_long_words=False)
        more = LINE * (len(lines) - 1)
        figure = go.Figure(figure).update_layout(
            title_text="<br>".join(lines),
            margin_t=figure.layout.margin.t + more,
            height=figure.layout.height + more,
        )
    image = {"format": "svg", "filename": key}
    chosen = st.plotly_chart(
        figure,
        key=key,
        alt=title,
        **options,
        config={"displaylogo": False, "toImageButtonOptions": image},
    )
    with st.container(horizontal=True, vertical_alignment="top", key=f"below-{key}"):
        st.caption(f"How to read it: {reading}", width="stretch")
        if frame:
            st.download_button(
                "CSV",
                lambda: frame().to_csv(index=False).encode(),
                f"{key}.csv",
                "text/csv",
                key=f"{key}-csv",
                type="tertiary",
                icon=":material/download:",
                on_click="ignore",
                help="The chart's numbers. The camera above the chart saves it as SVG.",
            )
    return chosen
