"""Charts of activation magnitudes, from `ActivationStatistics.to_frame()`."""

from collections.abc import Iterator

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pages.charts.common import COLOURS, NAMES, laid_out, layer_axis


def _sites(frame: pd.DataFrame) -> Iterator[tuple[str, pd.DataFrame]]:
    yield from frame.groupby("site", sort=False)


def _lines(frame: pd.DataFrame, column: str, words: str) -> go.Figure:
    """One column of the frame against the layer index, one line per site."""
    figure = go.Figure()
    for site, rows in _sites(frame):
        figure.add_scatter(
            x=rows["layer"],
            y=rows[column],
            name=NAMES[site],
            mode="lines+markers",
            line_color=COLOURS[site],
            hovertemplate=f"{NAMES[site]}, layer %{{x}}: {words} %{{y:.4g}}<extra></extra>",
        )
    return figure.update_xaxes(**layer_axis(int(frame["layer"].max()) + 1))


def magnitude(frame: pd.DataFrame) -> go.Figure:
    """Root mean square (RMS) over tokens and channels, by layer and site."""
    figure = _lines(frame, "rms", "RMS").update_yaxes(
        title="RMS over tokens and channels", type="log", dtick=1, exponentformat="none"
    )
    rms = frame.pivot(index="layer", columns="site", values="rms")
    times = {site: (rms["residual"] / rms[site]).median() for site in ("mha", "mlp")}
    return laid_out(
        figure,
        f"In the median layer the residual stream is {times['mha']:,.1f} × as large as MHA's waist "
        f"and {times['mlp']:,.1f} × as large as MLP's",
    )


def spread(frame: pd.DataFrame) -> go.Figure:
    """How the RMS differs between the channels of a layer; one panel per site."""
    sites = list(_sites(frame))
    figure = make_subplots(
        cols=len(sites),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[NAMES[site] for site, _ in sites],
    )
    for column, (site, rows) in enumerate(sites, start=1):
        colour = COLOURS[site]
        edge = {"x": rows["layer"], "mode": "lines", "line": {"color": colour, "width": 0}}
        figure.add_scatter(**edge, y=rows["low"], hoverinfo="skip", row=1, col=column)
        figure.add_scatter(
            **edge, y=rows["high"], fill="tonexty", hoverinfo="skip", row=1, col=column
        )
        for name, dash in (("median", "solid"), ("largest", "dot")):
            figure.add_scatter(
                x=rows["layer"],
                y=rows[name],
                line={"color": colour, "dash": dash},
                customdata=rows[["low", "high"]],
                row=1,
                col=column,
                hovertemplate=f"layer %{{x}}: {name} channel %{{y:.4g}}<br>90 % of channels from "
                "%{customdata[0]:.4g} to %{customdata[1]:.4g}<extra></extra>",
            )
    figure.update_xaxes(**layer_axis(int(frame["layer"].max()) + 1))
    figure.update_yaxes(type="log", dtick=1, exponentformat="none")
    figure.update_yaxes(title="RMS of a channel", col=1)
    ratios = (frame["largest"] / frame["median"]).groupby(frame["site"]).max()
    words = ", ".join(f"{ratios[site]:,.0f} × ({NAMES[site]})" for site, _ in sites)
    return (
        laid_out(figure, f"A layer's largest channel is up to {words} its median channel")
        .update_layout(showlegend=False)
        .update_annotations(font_size=14)
    )


def outliers(frame: pd.DataFrame) -> go.Figure:
    """The largest value of any token divided by the layer's RMS, by layer and site."""
    figure = _lines(frame, "outlier", "largest value over RMS").update_yaxes(
        title="largest value over the layer's RMS", type="log", dtick=1, exponentformat="none"
    )
    row = frame.loc[frame["outlier"].idxmax()]
    return laid_out(
        figure,
        f"The farthest outlier, {row['outlier']:,.0f} × its layer's RMS, is in the "
        f"{NAMES[row['site']]} of layer {row['layer']}",
    )
