"""The report: one HTML file that explains a cut to a colleague, with interactive charts.

The file needs no network. The template escapes everything that it is given, except the figures and
Plotly's own script, which are passed as markup.
"""

import base64
import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from functools import cache
from pathlib import Path

import plotly.graph_objects as go
import plotly.io
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from pages.charts import common as charts
from pages.charts import curve_chart, plan_charts, tradeoff_charts
from pages.charts.latency_chart import latency_chart
from pages.charts.tasks_chart import tasks_chart
from pages.charts.text import counted
from pages.parts.sizes import SIZES, times_dense
from pages.parts.texts import like_calibration
from pages.server.side_by_side import LatencyRun
from pages.server.task_runs import TaskRun
from transact_core.data.corpus import describe, short_name
from transact_core.experiments.bench import Bench, Measurement
from transact_core.export.compression import (
    Compression,
    TextReference,
    apply_command,
    describe_compression,
    reproduce_command,
)
from transact_core.pruning.plan import Decision, PruningPlan

LIMITS = (
    "Perplexity was measured on the texts named above. It says nothing about other texts, other "
    "languages, instructions or safety; of tasks it says nothing that the table of tasks, where "
    "there is one, does not show.",
    "The interval covers the choice of windows within that text, not the choice of the text.",
    "Curves and frontiers show what was measured in one session. A cut that was not tried may be "
    "better.",
    "Sizes are exact. Times, where there are any, are from one machine and one batch size.",
)
"""What the figures of the report do not show."""


def make_report(
    bench: Bench,
    decision: Decision,
    recovery: str,
    point: Measurement | None,
    points: Sequence[Measurement],
    latency: LatencyRun | None,
    made: datetime,
    tasks: TaskRun | None = None,
) -> str:
    """Returns the report as HTML.

    `point` is the measurement of this cut, or None if it is not measured. `points` are all
    measurements on the bench; if there are any, the dense model must be measured too. `latency` has
    times of this cut, and `tasks` what it answered, if any.
    """
    plan, compression = decision.plan, describe_compression(bench, decision, recovery)
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    ).get_template("report.html")
    return template.render(
        name=bench.loaded.name,
        made=made.strftime("%d %B %Y, %H:%M %Z").strip(),
        choices=f"MHA −{plan.mha_ratio:.0%}, MLP −{plan.mlp_ratio:.0%} · {plan.granularity} · "
        f"importance {plan.importance} · recovery {recovery}",
        verdict=_verdict(bench, plan, recovery, point),
        sizes=_sizes(bench, plan, recovery, point),
        perplexity_note=_perplexity_note(bench, point),
        cut=_cut_in_words(bench, plan),
        cut_figures=_drawn(_cut_figures(bench, plan)),
        standing=_standing(point, points),
        standing_figures=_drawn(_standing_figures(bench, point, points)),
        tasks=_tasks(tasks),
        tasks_note=_tasks_note(tasks),
        tasks_figures=_drawn(_tasks_figures(tasks)),
        repair_figures=_drawn(_repair_figures(point)),
        latency_figures=_drawn(_latency_figures(bench, latency)),
        facts=_facts(bench, compression),
        compression_uri="data:application/json;base64,"
        + base64.b64encode(compression.to_json().encode()).decode(),
        apply_command=apply_command(),
        reproduce_command=reproduce_command(compression),
        limits=LIMITS,
        plotly_js=Markup(_plotly_js()),
        templates={
            scheme: plotly.io.templates[name].to_plotly_json()
            for scheme, name in (("light", "plotly_white"), ("dark", "plotly_dark"))
        },
    )


@cache
def _plotly_js() -> str:
    return get_plotlyjs()


Figure = tuple[go.Figure, str]
"""A figure and the sentence on how to read it."""


def _drawn(figures: list[Figure]) -> list[tuple[Markup, str]]:
    """The figures as HTML, with their captions."""
    drawn = []
    for figure, caption in figures:
        figure.update_layout(paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)")
        html = plotly.io.to_html(
            figure,
            full_html=False,
            include_plotlyjs=False,
            config={
                "responsive": True,
                "displaylogo": False,
                "toImageButtonOptions": {"format": "svg"},
            },
        )
        drawn.append((Markup(html), f"How to read it: {caption}"))
    return drawn


def _verdict(bench: Bench, plan: PruningPlan, recovery: str, point: Measurement | None) -> str:
    dense, pruned = bench.dense_footprint, bench.footprint(plan, recovery)
    sizes = (
        f"{pruned.parameters / 1e6:,.1f} M of {dense.parameters / 1e6:,.1f} M parameters and "
        f"{pruned.kv_bytes_per_token / dense.kv_bytes_per_token:.0%} of the KV cache stay."
    )
    if point is None:
        return f"{sizes} The perplexity of this cut is not measured yet; only its sizes are known."
    return (
        f"{sizes} Perplexity is {point.perplexity:.2f}, {times_dense(point)} the dense model's "
        f"{bench.dense().perplexity:.2f}."
    )


def _sizes(
    bench: Bench, plan: PruningPlan, recovery: str, point: Measurement | None
) -> list[tuple[str, ...]]:
    dense, pruned = bench.dense_footprint, bench.footprint(plan, recovery)
    rows = []
    for label, field, scale, digits in SIZES:
        before, after = getattr(dense, field), getattr(pruned, field)
        values = (f"{size / scale:,.{digits}f}" for size in (before, after))
        rows.append((label, *values, f"{after / before:.1%}"))
    if point is None:
        return [*rows, ("Perplexity", "–", "not measured", "–")]
    for place, windows in enumerate(bench.evaluated):
        if not bench.dense_known(windows):
            continue
        there, name = point.on_text(bench, place), short_name(windows.source)
        rows.append(
            (
                "Perplexity" if not bench.others else f"Perplexity on {name}",
                f"{bench.dense(windows=windows).perplexity:.2f}",
                f"{there.perplexity:.2f}",
                f"{math.exp(there.delta_nll):.1%}",
            )
        )
    return rows


def _perplexity_note(bench: Bench, point: Measurement | None) -> str:
    flops = f"FLOPs with attention at {bench.dense_footprint.context_length:,} tokens. "
    if point is None:
        return flops + "This cut's perplexity is not measured yet."
    interval = (
        "a single window, so there is no interval"
        if math.isnan(point.delta_nll_se)
        else f"difference of the loss from the dense model's {point.delta_nll:+.4f} ± "
        f"{point.delta_nll_se:.4f} nats a token (standard error over windows, paired)"
    )
    texts = " and ".join(
        f"{evaluation.scored_tokens:,} scored tokens of {describe(windows.source)}"
        for windows, evaluation in zip(
            bench.evaluated, (point.evaluation, *point.others), strict=True
        )
    )
    alike = (
        " Calibration and evaluation are of one kind: on other kinds of text the cut may cost more."
        if all(like_calibration(bench, place) for place in range(len(bench.evaluated)))
        else ""
    )
    of_which = f" on {short_name(bench.evaluation.source)}" if bench.others else ""
    return (
        f"{flops}Perplexity on {texts}, windows of {bench.evaluation.sequence_length}, each "
        f"scored alone; {interval}{of_which}.{alike}"
    )


def _cut_in_words(bench: Bench, plan: PruningPlan) -> str:
    shape = bench.loaded.architecture
    left = plan.applied_to(shape)
    if not plan.cuts_anything(shape):
        return "Nothing: at these ratios the model is the dense one."
    return (
        f"In each of {shape.num_hidden_layers} layers, inside attention and MLP; the residual "
        f"stream of {shape.hidden_size:,} stays whole. Attention keeps "
        f"{_span(layer.num_attention_heads for layer in left.layers)} of "
        f"{shape.num_attention_heads} query heads over "
        f"{_span(layer.num_key_value_heads for layer in left.layers)} of "
        f"{shape.num_key_value_heads} KV heads, {left.head_dim} of {shape.head_dim} dims in each; "
        f"the MLP keeps {_span(layer.intermediate_size for layer in left.layers)} of "
        f"{shape.intermediate_size:,} channels. Which "
        + ("ones differs" if left.uniform else "ones, and how many, differs")
        + " from layer to layer."
    )


def _span(counts: Iterable[int]) -> str:
    """A number, or from the smallest to the largest."""
    least, *_, most = sorted([*counts] * 2)
    return f"{least:,}" if least == most else f"{least:,} to {most:,}"


def _cut_figures(bench: Bench, plan: PruningPlan) -> list[Figure]:
    shape = bench.loaded.architecture
    figures = []
    if not plan.applied_to(shape).uniform:
        figures.append(
            (
                plan_charts.layer_widths(plan, shape),
                "each pair of bars is a layer; what is missing to 100 % is removed.",
            )
        )
    if plan.granularity == "head-dims" and plan.head_dim:
        pairs = bench.pairs()
        figures.append(
            (
                plan_charts.pair_map(pairs.effects.numpy(), plan, pairs.inv_freq.numpy(), 560),
                "large cells are rotary pairs that are kept; small, pale cells are removed.",
            )
        )
    elif plan.cuts_mha(shape):
        heads = shape.num_attention_heads
        removed = _span(heads - len(layer.kept_heads) for layer in plan.layers)
        figures.append(
            (
                charts.head_map(
                    bench.scores(plan.importance).heads.numpy(),
                    plan,
                    f"{removed} of {heads} heads are removed in each layer (×)",
                ),
                f"dark heads have low {plan.importance} scores; crossed-out heads are removed.",
            )
        )
    if plan.cuts_mlp(shape):
        figures.append(
            (
                plan_charts.kept_channels(plan, shape.intermediate_size),
                "in dark areas most of the neighbouring channels are removed.",
            )
        )
    return figures


def _standing(point: Measurement | None, points: Sequence[Measurement]) -> str:
    if not points:
        return "Nothing is measured on these texts yet."
    count = f"{len(points)} cut{'s are' if len(points) > 1 else ' is'} measured on these texts. "
    if point is None:
        return f"{count}This one is not, so it is not in the charts."
    sentences = []
    for field, (*_, saved) in tradeoff_charts.COSTS.items():
        better = sum(
            getattr(other.footprint, field) <= getattr(point.footprint, field)
            and other.perplexity < point.perplexity
            for other in points
        )
        sentences.append(
            f"{better or 'None'} of them ha{'ve' if better > 1 else 's'} no more {saved} and a "
            "lower perplexity than this one."
        )
    return count + " ".join(sentences)


def _standing_figures(
    bench: Bench, point: Measurement | None, points: Sequence[Measurement]
) -> list[Figure]:
    if not points:
        return []
    shape, dense = bench.loaded.architecture, bench.dense()
    widths = (shape.mha_width, shape.intermediate_size)
    name = short_name(bench.evaluation.source)
    curve = charts.on_text(curve_chart.perplexity_curve(points, dense, widths), name)
    figures = [(curve, "bars are 95 % intervals of the paired difference from the dense model.")]
    if point is not None:
        _mark(curve, max(curve_chart.removed_shares(point, widths)), point.perplexity)
    for field, (_, scale, *_) in tradeoff_charts.COSTS.items():
        figure = charts.on_text(
            tradeoff_charts.frontier_chart(points, (bench.dense_footprint, dense), widths, field),
            name,
        )
        if point is not None:
            _mark(figure, getattr(point.footprint, field) / scale, point.perplexity)
        figures.append(
            (figure, "filled markers on the line are the best cuts measured for their size.")
        )
    return figures


def _mark(figure: go.Figure, x: float, y: float) -> None:
    """Puts a ring around the reported cut."""
    figure.add_scatter(
        x=[x],
        y=[y],
        mode="markers",
        name="this cut",
        hoverinfo="skip",
        marker={"symbol": "circle-open", "size": 24, "color": "#D55E00", "line": {"width": 3}},
    )


def _repair_figures(point: Measurement | None) -> list[Figure]:
    if point is None or not point.fits:
        return []
    return [
        (
            plan_charts.layer_fits(point.fits, point.recovery),
            "the lower the line, the closer a module's output is to the dense module's. The error "
            "is measured on held-out windows, which the repair was not fitted on.",
        )
    ]


def _tasks(run: TaskRun | None) -> list[tuple[str, ...]]:
    """For each metric of each task its name, questions, and the figures of both models."""
    rows = []
    for result in run.standings.values() if run else ():
        for metric in result.model.values:
            cells = (
                f"{figures.values[metric]:.3f} ± {figures.errors[metric]:.3f}"
                for figures in (result.against, result.model, result.difference)
                if figures is not None
            )
            shots = f" ({result.shots}-shot)" if result.shots else ""
            rows.append((f"{result.task}{shots}, {metric}", f"{result.asked:,}", *cells))
    return rows


def _tasks_note(run: TaskRun | None) -> str:
    if run is None:
        return ""
    guessing = ", ".join(
        f"{result.task} {result.chance:.2f}"
        for result in run.standings.values()
        if result.chance is not None
    )
    versions = run.report()["versions"]
    return (
        "± is one standard error; differences are paired, question by question. "
        + (f"Guessing gives an accuracy of: {guessing}. " if guessing else "")
        + f"lm-evaluation-harness {versions['lm_eval']}, questions drawn with seed "
        f"{run.choice.seed}."
    )


def _tasks_figures(run: TaskRun | None) -> list[Figure]:
    standings = list(run.standings.values()) if run else []
    if not any("acc" in result.model.values for result in standings):
        return []
    return [
        (
            tasks_chart(standings),
            "bars are 95 % intervals over questions; a difference whose bar does not reach the "
            "dashed line is one that these questions show.",
        )
    ]


def _latency_figures(bench: Bench, run: LatencyRun | None) -> list[Figure]:
    if run is None or not run.points:
        return []
    return [
        (
            latency_chart(run.points),
            f"medians of {run.repeats} repeats; bars are the interquartile range; "
            f"{str(bench.loaded.dtype)[6:]} on {bench.loaded.device.type}, "
            f"{counted(run.threads, 'thread')}, batch 1.",
        )
    ]


def _facts(bench: Bench, compression: Compression) -> list[tuple[str, str]]:
    def text(reference: TextReference) -> str:
        return (
            f"{describe(reference.source)}, {reference.tokens:,} tokens, SHA-256 {reference.sha256}"
        )

    made_with = compression.environment
    packages = ", ".join(f"{name} {version}" for name, version in made_with.packages.items())
    return [
        ("Model", f"{bench.loaded.name} ({compression.model.source})"),
        *(
            (f"Weights {name}", f"SHA-256 {digest}")
            for name, digest in compression.model.weight_files.items()
        ),
        ("Calibration", text(compression.calibration)),
        ("Evaluation", text(compression.evaluation)),
        *(("Also evaluated on", text(other)) for other in compression.other_texts),
        ("Saved as", compression.save_dtype),
        (
            "Computed",
            f"in {made_with.dtype} on {made_with.device}, "
            f"{counted(made_with.threads, 'thread')}, "
            f"{made_with.cpu_capability}",
        ),
        ("Packages", packages),
    ]
