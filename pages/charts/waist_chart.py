"""A section through one layer, to scale: its modules, their inner widths and the residual stream.

The inner width of a module is its waist: the input width of `o_proj` or of `down_proj`.
"""

import plotly.graph_objects as go

from pages.charts.common import COLOURS, DENSE, NAMES, RESIDUAL, laid_out
from transact_core.models.architecture import Architecture

SPANS = {"mha": (1.0, 4.4), "mlp": (5.6, 9.0)}
"""Where each module reads the residual stream and where it writes to it, on an axis of `LENGTH`."""
LENGTH = 10.0
"""Length of the x axis, in units of the drawing."""
READERS = {"mha": "Q, K, V", "mlp": "gate, up"}
WRITERS = {"mha": "O", "mlp": "down"}
ON = {"mha": "#ffffff", "mlp": "#000000"}
"""Colour of text that is drawn on a module's colour."""


def section(dense: Architecture, left: Architecture, title: str, height: int = 360) -> go.Figure:
    """One layer from left to right, widths to scale, the pruned modules drawn over the dense ones.

    `left` is the architecture that the cut leaves of `dense`.
    """
    stream = dense.hidden_size
    before = {"mha": dense.mha_width, "mlp": dense.intermediate_size}
    after = {"mha": left.mha_width, "mlp": left.intermediate_size}
    widest = max(stream, *before.values())
    gap = 0.45 * stream
    middle = -stream / 2 - gap - widest / 2
    figure = go.Figure()
    _fill(
        figure,
        [0, LENGTH, LENGTH, 0],
        [stream / 2] * 2 + [-stream / 2] * 2,
        RESIDUAL,
        f"residual stream: {stream:,}, whole",
        "residual stream",
        0.45,
    )
    _words(figure, LENGTH / 2, 0, f"residual stream: all {stream:,} stay")
    for module, (start, end) in SPANS.items():
        name, waist = NAMES[module], (start + end) / 2
        if after[module] < before[module]:
            words = f"{name}: {before[module] - after[module]:,} of {before[module]:,} removed"
            _fill(
                figure,
                *_hourglass(start, end, middle, stream, before[module]),
                DENSE,
                words,
                "removed",
                0.4,
                showlegend=module == "mlp" or after["mlp"] == before["mlp"],
            )
        words = f"{name} waist: {after[module]:,} of {before[module]:,} stay"
        _fill(
            figure,
            *_hourglass(start, end, middle, stream, after[module]),
            COLOURS[module],
            words,
            name,
        )
        figure.add_scatter(
            x=[waist, waist],
            y=[middle - after[module] / 2, middle + after[module] / 2],
            mode="lines",
            line={"color": ON[module], "width": 2, "dash": "dot"},
            hoverinfo="skip",
            showlegend=False,
        )
        for x, projection in (((start + waist) / 2, READERS), ((waist + end) / 2, WRITERS)):
            _words(figure, x, middle, projection[module], ON[module])
        _words(
            figure,
            waist,
            middle - widest / 2,
            f"{name} waist: {after[module]:,} of {before[module]:,}",
            yanchor="top",
        )
        _arrow(figure, start, -stream / 2, middle + stream / 2)
        _arrow(figure, end, middle + stream / 2, -stream / 2)
        _words(figure, end, -stream / 2 - gap / 2, "+", xanchor="left", xshift=4)
    bottom = middle - widest / 2 - gap
    figure.update_xaxes(visible=False, range=[0, LENGTH], fixedrange=True)
    figure.update_yaxes(visible=False, range=[bottom, stream / 2 + gap / 4], fixedrange=True)
    return laid_out(figure, title, height)


def _hourglass(
    start: float, end: float, middle: float, outer: float, waist: float
) -> tuple[list[float], list[float]]:
    """Outline of a module: from the residual stream's width to the waist and back."""
    centre = (start + end) / 2
    return (
        [start, centre, end, end, centre, start],
        [
            middle + sign * width / 2
            for sign, widths in ((1, (outer, waist, outer)), (-1, (outer, waist, outer)))
            for width in widths
        ],
    )


def _fill(
    figure: go.Figure,
    x: list[float],
    y: list[float],
    colour: str,
    words: str,
    name: str,
    opacity: float = 1.0,
    showlegend: bool = True,
) -> None:
    figure.add_scatter(
        x=[*x, x[0]],
        y=[*y, y[0]],
        mode="lines",
        line={"width": 0},
        fill="toself",
        fillcolor=colour,
        opacity=opacity,
        hoveron="fills",
        hoverinfo="text",
        text=words,
        name=name,
        showlegend=showlegend,
    )


def _words(
    figure: go.Figure, x: float, y: float, words: str, colour: str | None = None, **placed: object
) -> None:
    font = {"font": {"color": colour}} if colour else {}
    figure.add_annotation(x=x, y=y, text=words, showarrow=False, **font, **placed)


def _arrow(figure: go.Figure, x: float, tail: float, head: float) -> None:
    figure.add_annotation(
        x=x,
        y=head,
        ax=x,
        ay=tail,
        axref="x",
        ayref="y",
        text="",
        arrowhead=2,
        arrowwidth=1.5,
        arrowcolor=DENSE,
    )
