"""Charts of what a plan keeps, and of what its repair achieved."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from pages.charts.common import COLOURS, DENSE, MAGNITUDE, NAMES, laid_out, layer_axis
from transact_core.models.architecture import Architecture
from transact_core.pruning.closed_form import LayerFit
from transact_core.pruning.plan import PruningPlan


def energy_kept(shares: dict[str, np.ndarray]) -> go.Figure:
    """Share of each layer's activation energy that is in the units that a plan keeps."""
    figure = go.Figure()
    for module, values in shares.items():
        figure.add_scatter(
            y=values,
            name=NAMES[module],
            mode="lines+markers",
            line_color=COLOURS[module],
            hovertemplate=f"{NAMES[module]} layer %{{x}}: %{{y:.2%}} kept<extra></extra>",
        )
    lowest, module = min((values.min(), module) for module, values in shares.items())
    figure.update_xaxes(**layer_axis(len(shares[module]))).update_yaxes(
        title="activation energy kept", tickformat=".0%", range=[min(0.5, lowest) - 0.02, 1.02]
    )
    title = (
        "Nothing is cut: all of the energy is kept"
        if lowest > 1 - 1e-12
        else f"Least energy is kept in layer {int(shares[module].argmin())}'s {NAMES[module]}: "
        f"{lowest:.1%}"
    )
    return laid_out(figure, title, 320)


def layer_widths(plan: PruningPlan, dense: Architecture, height: int = 320) -> go.Figure:
    """Bars of the share of each module's width that a plan keeps in each layer."""
    table = widths_table(plan, dense)
    figure = go.Figure()
    for module in ("mha", "mlp"):
        figure.add_bar(
            x=table["layer"],
            y=table[f"{module}_share"],
            name=NAMES[module],
            marker={
                "color": COLOURS[module],
                "pattern": {"shape": "/" if module == "mha" else "", "solidity": 0.3},
            },
            customdata=table[["query_heads", "channels"]],
            hovertemplate="layer %{x}: %{customdata[0]} query heads, %{customdata[1]:,} channels"
            f"<extra>{NAMES[module]} %{{y:.1%}}</extra>",
        )
    figure.update_layout(barmode="group", bargap=0.15)
    figure.update_xaxes(**layer_axis(len(table)))
    figure.update_yaxes(title="width that stays", tickformat=".0%", range=[0, 1.02])
    shares = {NAMES[module]: table[f"{module}_share"] for module in ("mha", "mlp")}
    if all(share.nunique() == 1 for share in shares.values()):
        kept = " and ".join(f"{share.iloc[0]:.0%} of its {name}" for name, share in shares.items())
        return laid_out(figure, f"Every layer keeps {kept}", height)
    name = min(shares, key=lambda name: shares[name].min())
    layer = int(shares[name].idxmin())
    return laid_out(
        figure,
        f"Layer {layer} keeps least: {shares[name][layer]:.0%} of its {name}",
        height,
    )


def widths_table(plan: PruningPlan, dense: Architecture) -> pd.DataFrame:
    """One row per layer: what it keeps, and the shares of its widths that stay."""
    left = plan.applied_to(dense)
    return pd.DataFrame(
        {
            "layer": layer_index,
            "query_heads": kept.num_attention_heads,
            "key_value_heads": kept.num_key_value_heads,
            "channels": kept.intermediate_size,
            "mha_share": kept.num_attention_heads * left.head_dim / dense.mha_width,
            "mlp_share": kept.intermediate_size / dense.intermediate_size,
        }
        for layer_index, kept in enumerate(left.layers)
    )


def kept_channels(plan: PruningPlan, width: int, height: int = 320) -> go.Figure:
    """Heatmap of layer × channel index: the share of each bin of channels that a plan keeps."""
    kept = np.zeros((len(plan.layers), width), dtype=np.float32)
    for row, layer in zip(kept, plan.layers, strict=True):
        row[list(layer.kept_channels)] = 1
    bins = min(width, 128)
    starts = np.unique(np.linspace(0, width, bins, endpoint=False).astype(int))
    sizes = np.diff(np.append(starts, width))
    share = np.add.reduceat(kept, starts, axis=1) / sizes
    figure = go.Figure(
        go.Heatmap(
            z=share.astype(np.float32),
            x=starts,
            colorscale=MAGNITUDE,
            zmin=0,
            zmax=1,
            colorbar={"title": {"text": "kept", "side": "right"}, "tickformat": ".0%"},
            hovertemplate="layer %{y}, channels from %{x}: %{z:.0%} kept<extra></extra>",
        )
    )
    figure.update_xaxes(title="MLP channel, by index", range=[0, width], showgrid=False)
    figure.update_yaxes(**layer_axis(len(plan.layers), downwards=True), showgrid=False)
    counts = sorted(len(layer.kept_channels) for layer in plan.layers)
    stay = f"{counts[0]:,}" if counts[0] == counts[-1] else f"{counts[0]:,} to {counts[-1]:,}"
    return laid_out(figure, f"{stay} of {width:,} MLP channels stay in each layer", height)


def pair_map(
    effects: np.ndarray, plan: PruningPlan, inv_freq: np.ndarray, height: int = 660
) -> go.Figure:
    """Heatmap of layer and KV head × rotary pair: the pair's share of its head's effect.

    `effects` has shape (layers, groups, pairs). `inv_freq` has shape (pairs,), in radians per
    token. Removed pairs have small, pale cells. Triangles mark the slots: the frequencies that all
    heads of the pruned model share.
    """
    layers, groups, pairs = effects.shape
    total = effects.sum(axis=2, keepdims=True)
    share = np.divide(effects, total, out=np.zeros_like(effects), where=total > 0)
    slot = _slots_of_pairs(plan, effects.shape)
    kept = slot >= 0
    rows = layers * groups
    layer, head = np.divmod(np.arange(rows), groups)
    details = np.stack(
        [
            np.broadcast_to(layer[:, None], (rows, pairs)),
            np.broadcast_to(head[:, None], (rows, pairs)),
            share.reshape(rows, pairs),
            slot.reshape(rows, pairs),
        ],
        axis=2,
    ).astype(np.float32)
    room = (height - 130) / rows
    figure = go.Figure()
    for stays, what, gaps in (
        (
            True,
            "kept, in the slot of pair %{customdata[3]}",
            {"xgap": 1, "ygap": min(1, room / 8)},
        ),
        (False, "removed", {"xgap": 5, "ygap": room / 2.5, "opacity": 0.6}),
    ):
        figure.add_heatmap(
            z=np.where(kept == stays, np.log10(np.maximum(share, 1e-6)), np.nan)
            .reshape(rows, pairs)
            .astype(np.float32),
            y=(np.arange(rows) + 0.5) / groups - 0.5,
            colorscale=MAGNITUDE,
            zmin=-3.5,
            zmax=-0.5,
            showscale=stays,
            customdata=details,
            hoverongaps=False,
            **gaps,
            colorbar={
                "title": {"text": "share of the head's<br>effect on attention", "side": "right"},
                "tickvals": [-1, -2, -3],
                "ticktext": ["10 %", "1 %", "0.1 %"],
            },
            hovertemplate="layer %{customdata[0]}, KV head %{customdata[1]}, pair %{x}: "
            "%{customdata[2]:.2%} of the effect<br>" + what + "<extra></extra>",
        )
    slots = list(plan.slots) if plan.head_dim else list(range(pairs))
    above = -0.5 - layers / 50
    figure.add_scatter(
        x=slots,
        y=[above] * len(slots),
        mode="markers",
        marker={"symbol": "triangle-down", "size": 8, "color": DENSE},
        showlegend=False,
        customdata=2 * np.pi / inv_freq[slots],
        hovertemplate="slot of pair %{x}: one turn in %{customdata:,.0f} tokens<extra></extra>",
    )
    figure.update_xaxes(
        title="rotary pair, from fast to slow",
        range=[-0.5, pairs - 0.5],
        showgrid=False,
        tick0=0,
        dtick=4 if pairs <= 32 else 8,
    )
    figure.update_yaxes(**layer_axis(layers, downwards=True), showgrid=False, zeroline=False)
    figure.update_yaxes(range=[layers - 0.5, above - layers / 60])
    figure.update_yaxes(title="layer" if groups == 1 else "layer, and in it the KV heads")
    kept_share = (share * kept).sum(axis=2)
    title = (
        f"{len(slots)} of {pairs} rotary pairs hold {kept_share.mean():.1%} of a head's effect"
        if plan.head_dim
        else f"All {pairs} rotary pairs stay"
    )
    return laid_out(figure, title, height)


def pairs_table(effects: np.ndarray, plan: PruningPlan) -> pd.DataFrame:
    """One row per rotary pair: its effect and the slot it is moved into, empty if removed."""
    slot = _slots_of_pairs(plan, effects.shape)
    layer, head, pair = (index.ravel() for index in np.indices(effects.shape))
    return pd.DataFrame(
        {
            "layer": layer,
            "kv_head": head,
            "pair": pair,
            "effect": effects.ravel(),
            "slot": pd.Series(slot.ravel(), dtype="Int64").where(slot.ravel() >= 0),
        }
    )


def _slots_of_pairs(plan: PruningPlan, shape: tuple[int, int, int]) -> np.ndarray:
    """For each pair the slot it is moved into, by the slot's own pair index; -1 if removed."""
    if not plan.head_dim:
        return np.broadcast_to(np.arange(shape[2]), shape)
    slot = np.full(shape, -1)
    chosen = np.array([layer.slot_pairs for layer in plan.layers])
    np.put_along_axis(slot, chosen, np.broadcast_to(plan.slots, chosen.shape), axis=2)
    return slot


REPAIRS = {"least-squares": "Least squares lowers", "bias": "A bias lowers"}


def layer_fits(fits: Sequence[LayerFit], recovery: str) -> go.Figure:
    """Error of each module's output on held-out windows, for the bare cut and after the repair."""
    figure = go.Figure()
    for module in ("mha", "mlp"):
        of_module = [fit for fit in fits if fit.module == module]
        if not of_module:
            continue
        layers = [fit.layer for fit in of_module]
        for name, dash, values in (
            ("bare cut", "dot", [fit.bare_error for fit in of_module]),
            ("repaired", "solid", [fit.recovered_error for fit in of_module]),
        ):
            figure.add_scatter(
                x=layers,
                y=values,
                name=f"{NAMES[module]} {name}",
                mode="lines+markers",
                line={"color": COLOURS[module], "dash": dash},
                marker_size=5,
                hovertemplate=f"{NAMES[module]} layer %{{x}}, {name}: %{{y:.3f}}<extra></extra>",
            )
    figure.update_xaxes(**layer_axis(max(fit.layer for fit in fits) + 1)).update_yaxes(
        title="relative squared error, held out", rangemode="tozero"
    )
    kept = sum(fit.is_bare for fit in fits)
    better = len(fits) - kept
    repair = REPAIRS.get(recovery, f"The recovery {recovery} lowers")
    title = f"{repair} the error of {better} of {len(fits)} cut modules"
    if not better:
        title = f"No repair did better than the bare cut in any of {len(fits)} modules"
    elif kept:
        title += f"; {kept} keep the bare cut"
    return laid_out(figure, title, 340)
