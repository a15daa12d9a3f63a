"""One attention head: its channel scores, its attention pattern, the perplexity without it."""

import numpy as np
import pandas as pd
import streamlit as st

from pages.charts import common as charts
from pages.charts import exploring_charts
from pages.charts.text import plain
from pages.parts.figure import show
from pages.parts.help_texts import IMPORTANCE_HELP
from pages.parts.progress import SOON, require_bench, require_prepared, show_dense, show_job, watch
from pages.server.exploring import findings, pattern_job, start_without_heads
from pages.server.jobs import DONE
from pages.server.visits import visit
from transact_core.data.corpus import short_name
from transact_core.experiments.bench import Bench, Choices
from transact_core.importance.scores import IMPORTANCES, Scores

MAP = "head-map"
"""Key of the chart of all heads; the number of its version follows."""


def take_click() -> None:
    """Sets the two menus to the head that was clicked. A click that deselects changes nothing."""
    points = st.session_state[f"{MAP}-{st.session_state['map_version']}"].selection.points
    if points:
        st.session_state["layer"], st.session_state["head"] = points[0]["y"], points[0]["x"]


def forget_click() -> None:
    """Gives the map a new key, so that it has nothing selected and any head can be clicked."""
    st.session_state["map_version"] += 1


def choose(bench: Bench) -> tuple[int, int]:
    """Indices of the layer and the head that the menus stand at."""
    shape = bench.loaded.architecture
    columns = st.columns(2)
    counts = {"layer": shape.num_hidden_layers, "head": shape.num_attention_heads}
    st.session_state.setdefault("map_version", 0)
    for name, count in counts.items():
        if st.session_state.get(name, 0) >= count:
            st.session_state[name] = 0
    return tuple(
        column.selectbox(
            name.capitalize(),
            range(count),
            key=name,
            persist_state="session",
            on_change=forget_click,
        )
        for column, (name, count) in zip(columns, counts.items(), strict=True)
    )


def show_channels(scores: Scores, layer: int, head: int) -> None:
    mine = scores.head_channels[layer].view(scores.heads.shape[1], -1)[head].numpy()
    show(
        exploring_charts.head_channels(mine, layer, head),
        "head-channels",
        "a few high bars mean that few of the head's dims matter.",
        lambda: pd.DataFrame({"channel": np.arange(len(mine)), "score": mine}),
    )


def show_attention(layer: int, head: int) -> None:
    columns = st.columns([5, 1])
    text = columns[0].text_area(
        "Text to attend over",
        key="head_text",
        persist_state="session",
        height=68,
        placeholder="Your own text; if empty, the beginning of the evaluation text",
    )
    tokens = columns[1].number_input(
        "Tokens", 4, 128, 48, 8, key="head_tokens", persist_state="session"
    )
    job = pattern_job(layer, text, int(tokens))
    if not job.wait(SOON):
        watch("pattern", job)
        return
    if job.state != DONE:
        st.error(job.error or "The pass over the text was cancelled.", icon=":material/error:")
        return
    labels, attention = job.result
    pattern = attention[head].numpy()
    show(
        exploring_charts.attention(pattern, labels, layer, head),
        "attention",
        "each row is a query token, and its weights over the tokens up to it sum to 1. A bright "
        "left edge means attention to the first token, a bright diagonal attention to near ones.",
        lambda: pd.DataFrame(
            {"query": query, "key": key, "attention": pattern[query, key]}
            for query in range(len(labels))
            for key in range(query + 1)
        ),
    )


def without_table(bench: Bench) -> pd.DataFrame:
    """A row for each head without which the model was measured."""
    dense = bench.dense().perplexity
    rows = []
    for (layer, head), measured in sorted(findings().without.items()):
        half = 1.96 * measured.delta_nll_se
        rows.append(
            {
                "layer": layer,
                "head": head,
                "perplexity": measured.evaluation.perplexity,
                "ratio": measured.evaluation.perplexity / dense,
                "delta_nll": measured.delta_nll,
                "low": measured.delta_nll - half,
                "high": measured.delta_nll + half,
            }
        )
    return pd.DataFrame(rows)


def show_without(bench: Bench, layer: int, head: int) -> None:
    st.subheader("Without this head")
    if show_dense("heads") is None:
        return
    heads = bench.loaded.architecture.num_attention_heads
    found = findings().without
    if not show_job("heads", visit().request):
        rest = [(layer, other) for other in range(heads) if (layer, other) not in found]
        with st.container(horizontal=True):
            one = st.button(
                f"Measure without head {head} of layer {layer}",
                type="primary",
                disabled=(layer, head) in found,
            )
            every = st.button(
                f"Measure without each head of layer {layer}",
                disabled=not rest,
                help=f"{len(rest)} evaluations of {bench.evaluation.tokens:,} tokens each.",
            )
        if one or every:
            start_without_heads([(layer, head)] if one else rest)
            st.rerun()
    show_measured(bench, layer, head)


@st.fragment(run_every=1.0 if visit().visitor.unfinished_jobs else None)
def show_measured(bench: Bench, layer: int, head: int) -> None:
    mine = findings().without.get((layer, head))
    if mine is not None:
        half = 1.96 * mine.delta_nll_se
        columns = st.columns(2)
        columns[0].metric("Perplexity without the head", f"{mine.evaluation.perplexity:.3f}")
        columns[1].metric("Dense perplexity", f"{bench.dense().perplexity:.3f}")
        certain = "" if np.isnan(half) else f" ± {half:.4f} (95 %, paired by window)"
        st.caption(
            f"With its output set to zero the loss changes by {mine.delta_nll:+.4f}{certain} nats "
            f"per token, over {mine.evaluation.scored_tokens:,} scored tokens of "
            f"{plain(short_name(bench.evaluation.source))}."
        )
    table = without_table(bench)
    if not table.empty:
        st.dataframe(
            table,
            hide_index=True,
            column_config={
                "ratio": st.column_config.NumberColumn("× dense", format="%.4f"),
                "delta_nll": st.column_config.NumberColumn("Δ nats", format="%.4f"),
                "low": st.column_config.NumberColumn("95 % from", format="%.4f"),
                "high": st.column_config.NumberColumn("to", format="%.4f"),
                "perplexity": st.column_config.NumberColumn(format="%.3f"),
            },
        )
        st.download_button(
            "CSV",
            lambda: table.to_csv(index=False).encode(),
            "without-heads.csv",
            "text/csv",
            icon=":material/download:",
            on_click="ignore",
            type="tertiary",
            key="without-csv",
        )


st.title("Heads")
bench = require_bench()
left, right = st.columns([2, 3], gap="large")
with left:
    importance = st.selectbox(
        "Importance", list(IMPORTANCES), key="importance", bind="query-params", help=IMPORTANCE_HELP
    )
    visit().cut = visit().cut.by(importance)
    if not require_prepared(bench, Choices(importance=importance), "heads"):
        st.stop()
    scores = bench.scores(importance)
    layer, head = choose(bench)
    heads = scores.heads.numpy()
    show(
        exploring_charts.clickable_heads(heads, (layer, head), charts.head_differences(heads)),
        f"{MAP}-{st.session_state['map_version']}",
        "a cut removes dark heads first. Click a head, or choose it above.",
        lambda: scores.to_frame(importance).query("unit == 'head'"),
        on_select=take_click,
        selection_mode="points",
    )
with right:
    show_channels(scores, layer, head)
    show_attention(layer, head)
    show_without(bench, layer, head)
