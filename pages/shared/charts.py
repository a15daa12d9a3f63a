"""Figures from numbers; nothing here computes more than a title needs.

Colours are Okabe and Ito's, which colour-blind readers tell apart, and cividis for magnitudes.
"""

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from transact_core.activations import ModuleStatistics
from transact_core.preview import are_positions, relative

MHA, MLP, BOTH, DENSE = "#0072B2", "#E69F00", "#009E73", "#999999"
COLOURS = {"mha": MHA, "mlp": MLP}
NAMES = {"mha": "MHA", "mlp": "MLP"}
MAGNITUDE = "cividis"
BEST = "share of the<br>layer's best"
MAX_COLUMNS = 512
"""More columns than this are more than a screen can show."""


def layer_axis(count: int, downwards: bool = False) -> dict:
    """An axis of layers without a tick where there is no layer."""
    ends = [-0.5, count - 0.5]
    step = next(step for step in (1, 5, 10, 20, 50) if count <= 10 * step or step == 50)
    return {
        "title": "layer", "tick0": 0, "dtick": step, "range": ends[::-1] if downwards else ends,
    }  # fmt: skip


def laid_out(figure: go.Figure, title: str, height: int = 380) -> go.Figure:
    return figure.update_layout(
        title={"text": title, "font": {"size": 16}, "x": 0, "xanchor": "left"},
        height=height,
        margin={"l": 10, "r": 10, "t": 70, "b": 10},
        legend={"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 1, "xanchor": "right"},
    )


# --- activations -----------------------------------------------------------------------------


def magnitude_by_layer(statistics: dict[str, ModuleStatistics]) -> go.Figure:
    """Root mean square of each module's transitional activation, by layer."""
    figure = go.Figure()
    for module, each in statistics.items():
        figure.add_scatter(
            y=each.layer_rms.numpy(), name=NAMES[module], mode="lines+markers",
            line_color=COLOURS[module],
            hovertemplate=f"{NAMES[module]} layer %{{x}}: RMS %{{y:.4g}}<extra></extra>",
        )  # fmt: skip
    layers = len(next(iter(statistics.values())).layer_rms)
    figure.update_xaxes(**layer_axis(layers)).update_yaxes(
        title="RMS over tokens and channels", type="log", dtick=1, exponentformat="none"
    )
    peaks = {name: int(each.layer_rms.argmax()) for name, each in statistics.items()}
    where = (
        f"layer {peaks['mha']}, in MHA and in MLP"
        if peaks["mha"] == peaks["mlp"]
        else f"layer {peaks['mha']} (MHA) and layer {peaks['mlp']} (MLP)"
    )
    return laid_out(figure, f"Activations are largest in {where}")


def spread_by_layer(statistics: dict[str, ModuleStatistics]) -> go.Figure:
    """Quantiles over the channels of a layer of their root mean square."""
    figure = make_subplots(cols=2, shared_yaxes=True, subplot_titles=list(NAMES.values()))
    dashes = {"median": "solid", "99 %": "dash", "largest": "dot"}
    for column, (module, each) in enumerate(statistics.items(), start=1):
        quantiles = {
            "median": each.rms.quantile(0.5, dim=1),
            "99 %": each.rms.quantile(0.99, dim=1),
            "largest": each.rms.amax(dim=1),
        }
        for name, values in quantiles.items():
            figure.add_scatter(
                y=values.numpy(), name=f"{NAMES[module]} {name}", row=1, col=column,
                line={"color": COLOURS[module], "dash": dashes[name]},
                hovertemplate=f"layer %{{x}}: {name} %{{y:.4g}}<extra></extra>",
            )  # fmt: skip
    layers = len(next(iter(statistics.values())).layer_rms)
    figure.update_xaxes(**layer_axis(layers)).update_yaxes(
        type="log", dtick=1, exponentformat="none"
    )
    figure.update_yaxes(title="RMS of a channel", col=1)
    ratios = {
        name: (each.rms.amax(dim=1) / each.rms.quantile(0.5, dim=1)).max().item()
        for name, each in statistics.items()
    }
    return (
        laid_out(
            figure,
            "A layer's largest channel is up to "
            f"{ratios['mha']:,.0f} × (MHA) and {ratios['mlp']:,.0f} × (MLP) its median channel",
        )
        .update_layout(legend={"y": -0.25, "yanchor": "top"})
        .update_annotations(font_size=14)
    )


# --- importance ------------------------------------------------------------------------------


def _shaded(share: np.ndarray, logarithmic: bool, label: str = BEST, **ticks: object) -> dict:
    """The colours of a heatmap of shares."""
    if logarithmic:
        ticks = {"tickvals": [0, -1, -2, -3], "ticktext": ["1", "0.1", "0.01", "≤ 0.001"]}
    return {
        "z": (np.log10(np.maximum(share, 1e-4)) if logarithmic else share).astype(np.float32),
        "zmin": -3 if logarithmic else 0,
        "zmax": 0 if logarithmic else 1,
        "colorscale": MAGNITUDE,
        "colorbar": {"title": {"text": label, "side": "right"}, **ticks},
    }


def head_differences(scores: np.ndarray) -> str:
    """A title for a map of heads."""
    weakest = relative(scores).min(axis=1)
    if weakest.min() > 1 - 1e-9 or not scores.any():
        return "All heads of a layer score alike"
    return f"Heads differ most in layer {int(weakest.argmin())}"


def head_map(scores: np.ndarray, title: str = "", height: int = 520) -> go.Figure:
    """Layer × head.

    `scores` has shape (layers, heads); shown as a share of the layer's best head, on a logarithmic
    scale where most are far below it.
    """
    share = relative(scores)
    heads = scores.shape[1]
    figure = go.Figure(
        go.Heatmap(
            **_shaded(share, np.median(share) < 0.1), xgap=1, ygap=1,
            customdata=np.stack([scores, share], axis=2),
            hovertemplate="layer %{y}, head %{x}<br>score %{customdata[0]:.4g} "
            "(%{customdata[1]:.2%} of the layer's best)<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(
        title="head", tick0=0, dtick=1 if heads <= 16 else 4 if heads <= 64 else 16, tickangle=0,
        range=[-0.5, heads - 0.5], showgrid=False,
    )  # fmt: skip
    figure.update_yaxes(**layer_axis(len(scores), downwards=True), showgrid=False)
    return laid_out(figure, title, height)


def channel_map(
    scores: np.ndarray, ordered: bool, module: str = "MLP", height: int = 520
) -> go.Figure:
    """Layer × channel, by index or from the best to the worst of each layer.

    `scores` has shape (layers, width); wide layers are shown by the largest score in each bin. The
    scale is logarithmic where most channels are far below their layer's best.
    """
    share = relative(scores)
    width = scores.shape[1]
    median, below = float(np.median(share)), float((share < 0.1).mean())
    shown, edges = _binned(-np.sort(-share, axis=1) if ordered else share)
    hover = "%{customdata:.3g} of the layer's best"
    if are_positions(scores):
        shades = _shaded(
            shown, False, "place in the<br>elimination",
            tickvals=[0, 1], ticktext=["first out", "last"],
        )  # fmt: skip
        hover = "after %{customdata:.1%} of the others"
        title = f"{module} channels by their place in each layer's order of elimination"
    elif median < 0.3:
        shades = _shaded(shown, True)
        title = f"{below:.0%} of {module} channels score under a tenth of their layer's best"
    else:
        shades = _shaded(shown, False)
        title = f"Half of the {module} channels score under {median:.0%} of their layer's best"
    figure = go.Figure(
        go.Heatmap(
            **shades, x=edges, customdata=shown.astype(np.float32),
            hovertemplate=f"layer %{{y}}, channel %{{x}}: {hover}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(
        title=f"{module} channel, " + ("best first" if ordered else "by index"), range=[0, width]
    )
    figure.update_yaxes(**layer_axis(len(scores), downwards=True))
    return laid_out(figure, title, height)


def _binned(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    width = values.shape[1]
    starts = np.unique(np.linspace(0, width, min(width, MAX_COLUMNS), endpoint=False).astype(int))
    return np.maximum.reduceat(values, starts, axis=1), starts


def concentration(shares: dict[str, np.ndarray], share: float) -> go.Figure:
    """For each layer, the share of channels that holds `share` of the energy."""
    figure = go.Figure()
    for module, values in shares.items():
        figure.add_bar(
            y=values, name=NAMES[module], marker_color=COLOURS[module],
            hovertemplate=f"{NAMES[module]} layer %{{x}}: %{{y:.1%}} of channels<extra></extra>",
        )  # fmt: skip
    layers = len(next(iter(shares.values())))
    figure.update_xaxes(**layer_axis(layers)).update_yaxes(
        title=f"channels that hold {share:.0%} of the energy", tickformat=".0%", range=[0, 1]
    )
    means = {NAMES[module]: values.mean() for module, values in shares.items()}
    wasteful = min(means, key=means.get)
    words = " and ".join(f"{mean:.0%} of {name} channels" for name, mean in means.items())
    return laid_out(
        figure,
        f"On average {words} hold {share:.0%} of the energy: {wasteful} is more concentrated",
    )
