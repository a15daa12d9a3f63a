"""Figures from numbers; nothing here computes more than a title needs.

Colours are Okabe and Ito's, which colour-blind readers tell apart, and cividis for magnitudes.
"""

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from transact_core.activations import ModuleStatistics
from transact_core.bench import Measurement
from transact_core.evaluation import Evaluation
from transact_core.plan import PruningPlan
from transact_core.recovery import LayerFit

MHA, MLP, BOTH, DENSE = "#0072B2", "#E69F00", "#009E73", "#999999"
COLOURS = {"mha": MHA, "mlp": MLP}
NAMES = {"mha": "MHA", "mlp": "MLP"}
MAGNITUDE = "cividis"
MAX_COLUMNS = 512
"""More columns than this are more than a screen can show."""


def _layers(count: int, downwards: bool = False) -> dict:
    """An axis of layers without a tick where there is no layer."""
    ends = [-0.5, count - 0.5]
    step = next(step for step in (1, 5, 10, 20, 50) if count <= 10 * step or step == 50)
    return {
        "title": "layer", "tick0": 0, "dtick": step, "range": ends[::-1] if downwards else ends,
    }  # fmt: skip


def _layout(figure: go.Figure, title: str, height: int = 380) -> go.Figure:
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
    figure.update_xaxes(**_layers(layers)).update_yaxes(
        title="RMS over tokens and channels", type="log", dtick=1, exponentformat="none"
    )
    peaks = {name: int(each.layer_rms.argmax()) for name, each in statistics.items()}
    where = (
        f"layer {peaks['mha']}, in MHA and in MLP"
        if peaks["mha"] == peaks["mlp"]
        else f"layer {peaks['mha']} (MHA) and layer {peaks['mlp']} (MLP)"
    )
    return _layout(figure, f"Activations are largest in {where}")


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
    figure.update_xaxes(**_layers(layers)).update_yaxes(type="log", dtick=1, exponentformat="none")
    figure.update_yaxes(title="RMS of a channel", col=1)
    ratios = {
        name: (each.rms.amax(dim=1) / each.rms.quantile(0.5, dim=1)).max().item()
        for name, each in statistics.items()
    }
    return (
        _layout(
            figure,
            "A layer's largest channel is up to "
            f"{ratios['mha']:,.0f} × (MHA) and {ratios['mlp']:,.0f} × (MLP) its median channel",
        )
        .update_layout(legend={"y": -0.25, "yanchor": "top"})
        .update_annotations(font_size=14)
    )


# --- importance ------------------------------------------------------------------------------


def head_map(
    scores: np.ndarray, plan: PruningPlan | None = None, title: str = "", height: int = 520
) -> go.Figure:
    """Layer × head; removed heads are crossed out where a plan is given.

    `scores` has shape (layers, heads); shown as a share of the layer's best head.
    """
    share = scores / np.maximum(scores.max(axis=1, keepdims=True), np.finfo(float).tiny)
    heads = scores.shape[1]
    figure = go.Figure(
        go.Heatmap(
            z=share, colorscale=MAGNITUDE, zmin=0, zmax=1, xgap=1, ygap=1,
            colorbar={"title": {"text": "share of the<br>layer's best", "side": "right"}},
            customdata=scores,
            hovertemplate="layer %{y}, head %{x}<br>score %{customdata:.4g} "
            "(%{z:.0%} of the layer's best)<extra></extra>",
        )
    )  # fmt: skip
    if plan is not None:
        removed = [
            (layer, head)
            for layer, kept in enumerate(plan.layers)
            for head in sorted(set(range(heads)) - set(kept.kept_heads))
        ]
        figure.add_scatter(
            x=[head for _, head in removed], y=[layer for layer, _ in removed], mode="markers",
            marker={"symbol": "x", "color": "#ffffff", "size": 9,
                    "line": {"color": "#000000", "width": 1.5}},
            name="removed", hovertemplate="layer %{y}, head %{x}: removed<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(
        title="head", tick0=0, dtick=1 if heads <= 16 else 4 if heads <= 64 else 16, tickangle=0,
        range=[-0.5, heads - 0.5], showgrid=False,
    )  # fmt: skip
    figure.update_yaxes(**_layers(len(scores), downwards=True), showgrid=False)
    return _layout(figure, title, height)


def channel_map(
    scores: np.ndarray, ordered: bool, module: str = "MLP", height: int = 520
) -> go.Figure:
    """Layer × channel, on a log scale, by index or from the best to the worst of each layer.

    `scores` has shape (layers, width); wide layers are shown by the largest score in each bin.
    """
    shown = -np.sort(-scores, axis=1) if ordered else scores
    shown, edges = _binned(shown)
    relative = shown / np.maximum(shown.max(axis=1, keepdims=True), np.finfo(float).tiny)
    decibels = np.log10(np.maximum(relative, 1e-4))
    figure = go.Figure(
        go.Heatmap(
            z=decibels.astype(np.float32), x=edges, colorscale=MAGNITUDE, zmin=-3, zmax=0,
            colorbar={
                "title": {"text": "share of the<br>layer's best", "side": "right"},
                "tickvals": [0, -1, -2, -3], "ticktext": ["1", "0.1", "0.01", "≤ 0.001"],
            },
            hovertemplate="layer %{y}, channel %{x}: "
            "10^%{z:.2f} of the layer's best<extra></extra>",
        )
    )  # fmt: skip
    width = scores.shape[1]
    figure.update_xaxes(
        title=f"{module} channel, " + ("best first" if ordered else "by index"), range=[0, width]
    )
    figure.update_yaxes(**_layers(len(scores), downwards=True))
    below = float((scores < 0.1 * scores.max(axis=1, keepdims=True)).mean())
    return _layout(
        figure,
        f"{below:.0%} of {module} channels score under a tenth of their layer's best",
        height,
    )


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
    figure.update_xaxes(**_layers(layers)).update_yaxes(
        title=f"channels that hold {share:.0%} of the energy", tickformat=".0%", range=[0, 1]
    )
    means = {NAMES[module]: values.mean() for module, values in shares.items()}
    wasteful = min(means, key=means.get)
    words = " and ".join(f"{mean:.0%} of {name} channels" for name, mean in means.items())
    return _layout(
        figure,
        f"On average {words} hold {share:.0%} of the energy: {wasteful} is more concentrated",
    )


# --- compress --------------------------------------------------------------------------------


def energy_kept(shares: dict[str, np.ndarray]) -> go.Figure:
    """Share of each layer's activation energy in what a plan keeps."""
    figure = go.Figure()
    for module, values in shares.items():
        figure.add_scatter(
            y=values, name=NAMES[module], mode="lines+markers", line_color=COLOURS[module],
            hovertemplate=f"{NAMES[module]} layer %{{x}}: %{{y:.2%}} kept<extra></extra>",
        )  # fmt: skip
    lowest, module = min((values.min(), module) for module, values in shares.items())
    figure.update_xaxes(**_layers(len(shares[module]))).update_yaxes(
        title="activation energy kept", tickformat=".0%", range=[min(0.5, lowest) - 0.02, 1.02]
    )
    title = (
        "Nothing is cut: all of the energy is kept"
        if lowest > 1 - 1e-12
        else f"Least energy is kept in layer {int(shares[module].argmin())}'s {NAMES[module]}: "
        f"{lowest:.1%}"
    )
    return _layout(figure, title, 320)


def kept_channels(plan: PruningPlan, width: int, height: int = 320) -> go.Figure:
    """Layer × channel by index: the share of each bin of channels that a plan keeps."""
    kept = np.zeros((len(plan.layers), width), dtype=np.float32)
    for row, layer in zip(kept, plan.layers, strict=True):
        row[list(layer.kept_channels)] = 1
    bins = min(width, 128)
    starts = np.unique(np.linspace(0, width, bins, endpoint=False).astype(int))
    sizes = np.diff(np.append(starts, width))
    share = np.add.reduceat(kept, starts, axis=1) / sizes
    figure = go.Figure(
        go.Heatmap(
            z=share.astype(np.float32), x=starts, colorscale=MAGNITUDE, zmin=0, zmax=1,
            colorbar={"title": {"text": "kept", "side": "right"}, "tickformat": ".0%"},
            hovertemplate="layer %{y}, channels from %{x}: %{z:.0%} kept<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(title="MLP channel, by index", range=[0, width], showgrid=False)
    figure.update_yaxes(**_layers(len(plan.layers), downwards=True), showgrid=False)
    return _layout(
        figure, f"{plan.intermediate_size:,} of {width:,} MLP channels stay in each layer", height
    )


def layer_fits(fits: Sequence[LayerFit]) -> go.Figure:
    """Error of each repaired module's output on held-out windows, bare and repaired."""
    figure = go.Figure()
    for module in ("mha", "mlp"):
        mine = [fit for fit in fits if fit.module == module]
        if not mine:
            continue
        layers = [fit.layer for fit in mine]
        for name, dash, values in (
            ("bare cut", "dot", [fit.bare_error for fit in mine]),
            ("repaired", "solid", [fit.recovered_error for fit in mine]),
        ):
            figure.add_scatter(
                x=layers, y=values, name=f"{NAMES[module]} {name}", mode="lines+markers",
                line={"color": COLOURS[module], "dash": dash}, marker_size=5,
                hovertemplate=f"{NAMES[module]} layer %{{x}}, {name}: %{{y:.3f}}<extra></extra>",
            )  # fmt: skip
    figure.update_xaxes(**_layers(max(fit.layer for fit in fits) + 1)).update_yaxes(
        title="relative squared error, held out", rangemode="tozero"
    )
    kept = sum(fit.ridge is None for fit in fits)
    better = len(fits) - kept
    title = f"Least squares lowers the error of {better} of {len(fits)} cut modules"
    return _layout(figure, title + (f"; {kept} keep the bare cut" if kept else ""), 340)


# --- perplexity against ratio ----------------------------------------------------------------


def perplexity_curve(
    points: Sequence[Measurement],
    dense: Evaluation | None,
    widths: tuple[int, int],
    logarithmic: bool = False,
) -> go.Figure:
    """Perplexity against the share of width that was really removed.

    `widths` are the dense model's MHA and MLP widths. Bars are 95 % intervals of the paired
    difference from the dense model.
    """
    figure = go.Figure()
    symbols = {"least-squares": "circle", "none": "circle-open"}
    series: dict[tuple[str, str], list[tuple[float, Measurement]]] = {}
    for point in points:
        removed = (
            1 - point.footprint.mha_width / widths[0],
            1 - point.footprint.mlp_width / widths[1],
        )
        kind = "both" if all(removed) else "MHA only" if removed[0] else "MLP only"
        if any(removed):
            series.setdefault((kind, point.recovery), []).append((max(removed), point))
    colours = {"MHA only": MHA, "MLP only": MLP, "both": BOTH}
    for (kind, recovery), members in sorted(series.items()):
        members.sort(key=lambda member: member[0])
        measured = [point for _, point in members]
        error = [point.perplexity * np.expm1(1.96 * point.delta_nll_se) for point in measured]
        lower = [-point.perplexity * np.expm1(-1.96 * point.delta_nll_se) for point in measured]
        figure.add_scatter(
            x=[removed for removed, _ in members],
            y=[point.perplexity for point in measured],
            error_y={"type": "data", "array": error, "arrayminus": lower, "thickness": 1.2},
            mode="lines+markers", name=f"{kind}, {recovery}" if recovery != "none"
            else f"{kind}, bare cut",
            line={"color": colours[kind], "dash": "solid" if recovery != "none" else "dot"},
            marker={"symbol": symbols[recovery], "size": 10},
            customdata=[
                [cost.mha_width, cost.mlp_width, cost.parameters / 1e6]
                for cost in (point.footprint for point in measured)
            ],
            hovertemplate="perplexity %{y:.3f}<br>MHA width %{customdata[0]:,}, MLP width "
            "%{customdata[1]:,}<br>%{customdata[2]:.1f} M parameters<extra>" + kind + "</extra>",
        )  # fmt: skip
    if dense is not None:
        figure.add_hline(y=dense.perplexity, line={"color": DENSE, "dash": "dash", "width": 1})
        figure.add_scatter(
            x=[0], y=[dense.perplexity], mode="markers", name="dense",
            marker={"symbol": "diamond", "size": 12, "color": DENSE},
            hovertemplate="dense: perplexity %{y:.3f}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title="width removed (of both, the larger share)", tickformat=".0%")
    largest = max((removed for group in series.values() for removed, _ in group), default=0.5)
    figure.update_xaxes(range=[-0.03, largest + 0.05])
    figure.update_yaxes(title="perplexity", type="log" if logarithmic else "linear")
    return _layout(figure, _curve_title(points, dense), 460)


def _curve_title(points: Sequence[Measurement], dense: Evaluation | None) -> str:
    if dense is None:
        return "Perplexity against ratio"
    if not points:
        return f"The dense model's perplexity is {dense.perplexity:.2f}; no cut is measured yet"
    within = [point for point in points if point.perplexity <= 1.2 * dense.perplexity]
    if not within:
        return f"Every measured cut costs more than 1.2 × the dense {dense.perplexity:.2f}"
    smallest = min(within, key=lambda point: point.footprint.parameters)
    return (
        f"Within 1.2 × the dense {dense.perplexity:.2f}, the smallest model measured has "
        f"{smallest.footprint.parameters / 1e6:,.1f} M parameters"
    )
