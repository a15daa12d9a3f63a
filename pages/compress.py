"""The Compress page: two sliders, the predicted cost at their position, and the cut itself.

From top to bottom:

- the controls of the choices other than the ratios;
- a bar that stays in view while the page scrolls, with the button that makes and measures the cut,
  the progress of its job, and the measured figures if the cut at this position is measured;
- the live view with the sliders, and the bars of every layer's width;
- charts and sentences that explain the cut.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any
from weakref import WeakKeyDictionary

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from pages.charts import plan_charts
from pages.charts.text import plain
from pages.live import (
    KEY,
    NOT_PRICED,
    Measured,
    Position,
    live,
    position_of,
    predicted,
    tables,
)
from pages.live.layers import (
    decided_at,
    fill,
    filling_of,
    prices_of,
    pricing_in_words,
    what_comes_first,
    with_filled,
)
from pages.live.skyline import bar_tables, fitted, texts_of, why_fixed
from pages.parts.figure import show
from pages.parts.help_texts import (
    GRANULARITY_HELP,
    IMPORTANCE_HELP,
    KEEP_LAYERS_HELP,
    MULTIPLE_HELP,
    RECOVERY_HELP,
    SEQUENTIAL_HELP,
    STEPS_HELP,
    WIDTHS_HELP,
)
from pages.parts.progress import (
    SOON,
    estimate_in_words,
    follow,
    require_bench,
    require_prepared,
    show_dense_end,
    show_end,
    unfinished,
    watch,
    watch_in_one_line,
)
from pages.parts.runtime_picker import USUAL
from pages.parts.texts import kind_warning, on_other_texts, text_in_words
from pages.server.estimates import (
    cuts_seconds,
    learning_seconds,
    pace_in_words,
)
from pages.server.gguf_files import sizes_by_widths_job
from pages.server.jobs import DONE, Job
from pages.server.open_models import workbench
from pages.server.points import find_cut, find_point, plan_at
from pages.server.request import Cut, first_look, layers_in_words, what_to_learn, what_to_price
from pages.server.start_jobs import start_cut, start_pricing
from pages.server.visits import holding, points, visit
from transact_core.base.errors import TransActError
from transact_core.experiments.allocate import require_allocatable
from transact_core.experiments.bench import Bench, Choices, Measurement
from transact_core.experiments.decide import granularities_of, require_sequential
from transact_core.experiments.prediction import (
    Point,
    Scored,
    keep_score,
    predict_grid,
    with_known_damage,
)
from transact_core.export.gguf_types import QUANTIZATIONS
from transact_core.importance.scores import IMPORTANCES
from transact_core.models.architecture import Architecture
from transact_core.planning.law import MAX_DELTA, Ratio
from transact_core.planning.preview import (
    EnergyKept,
    Structure,
    energy_kept,
    layer_costs,
    maps,
    structure,
)
from transact_core.planning.targets import Found, Target, find
from transact_core.pruning.closed_form import RECOVERIES
from transact_core.pruning.plan import (
    GRANULARITIES,
    Decision,
    PruningPlan,
    plan_notices,
    removed_by_hand,
)

TABLES_KEPT = 24
"""Tables of the live view kept in memory for each bench, those of the latest choices."""
MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
"""Numbers of which the MLP's width can be made a multiple."""
# The choices other than the ratios: name in the address and in the session, and possible values.
CONTROLS = {
    "granularity": (*GRANULARITIES, "auto"),
    "importance": tuple(IMPORTANCES),
    "recovery": RECOVERIES,
    "steps": tuple(range(1, 21)),
    "multiple_of": MULTIPLES,
    "sequential": (False, True),
    "widths": ("uniform", "allocated", "traded"),
}
# One more is written and not chosen: the layers that are kept whole, as text.
WRITTEN = "keep_layers"
ALL_CONTROLS = (*CONTROLS, WRITTEN)
GOALS = {
    "parameters": ("At most, in millions of parameters", 0.001, None),
    "flops": ("At most, in millions of FLOPs a token", 0.001, None),
    "kv-cache": ("At most, in % of the dense KV cache", 1.0, 100.0),
    "file": ("At most, in MB of the GGUF file", 0.001, None),
    "perplexity": ("At most, times the dense perplexity", 1.0, None),
}
"""What a target can limit: label of its number, least value and largest value."""
GOAL_NAMES = {
    "parameters": "Parameters",
    "flops": "FLOPs",
    "kv-cache": "KV cache",
    "file": "GGUF file",
    "perplexity": "Perplexity",
}


# --- choices and position --------------------------------------------------------------------


def choose(shape: Architecture) -> Choices:
    """Draws the controls of all choices other than the ratios and returns their values."""
    labels = {
        "granularity": ("Granularity", GRANULARITY_HELP),
        "importance": ("Importance", IMPORTANCE_HELP),
        "recovery": ("Recovery", RECOVERY_HELP),
        "steps": ("Steps", STEPS_HELP),
        "multiple_of": ("Multiple of", MULTIPLE_HELP),
    }
    if KEY not in st.session_state:
        begin_choices()
        begin_position()
    own = st.session_state["widths"] != "uniform"
    parts = [5.6, 5, 5.6, 3.2, 3.8, 5.4, *([4.6] if own else []), 5.4]
    columns = st.columns(parts, vertical_alignment="bottom")
    others = {
        name: column.selectbox(
            label,
            CONTROLS[name],
            key=name,
            bind="query-params",
            persist_state="session",
            help=explained,
        )
        for column, (name, (label, explained)) in zip(columns[:5], labels.items(), strict=True)
    }
    with columns[5]:
        choose_widths(shape, others)
    if own:
        with columns[6]:
            name_kept_layers(shape)
    refused = why_not_sequential(others)
    columns[-1].toggle(
        "Sequential",
        key="sequential",
        bind="query-params",
        persist_state="session",
        help=SEQUENTIAL_HELP if refused is None else f"{SEQUENTIAL_HELP}\n\n{refused}",
        disabled=refused is not None,
    )
    return choices_now(shape)


def choose_widths(shape: Architecture, others: dict[str, Any]) -> None:
    """The control that says how widths are given to layers."""
    refused = why_not_own_widths(shape, Choices(**others))
    by_hand = bool(position_sent().by_hand)
    if by_hand:
        refused = "The bars below were set by hand; *Uniform again* there gives this back."
    st.selectbox(
        "Widths",
        CONTROLS["widths"],
        key="widths",
        bind="query-params",
        persist_state="session",
        help=WIDTHS_HELP if refused is None else f"{WIDTHS_HELP}\n\n{refused}",
        disabled=refused is not None,
    )


def name_kept_layers(shape: Architecture) -> None:
    """The field of layers that are not cut."""
    st.text_input(
        "Kept whole",
        key=WRITTEN,
        placeholder="no layer",
        bind="query-params",
        persist_state="session",
        help=KEEP_LAYERS_HELP,
    )
    text = st.session_state[WRITTEN]
    if kept_layers(text, shape.num_hidden_layers) is None:
        st.caption(
            f":red[{plain(text)} does not name layers from 0 to {shape.num_hidden_layers - 1}.]"
        )


def kept_layers(text: str, layers: int) -> tuple[int, ...] | None:
    """The layers that a text names, with commas between them; None where it names others."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not all(part.isdecimal() and int(part) < layers for part in parts):
        return None
    return tuple(sorted({int(part) for part in parts}))


def why_not_own_widths(shape: Architecture, others: Choices) -> str | None:
    """Why layers cannot have widths of their own with the other choices; None if they can."""
    try:
        require_allocatable(shape, 0.0, 0.0, replace(others, widths="allocated"))
    except TransActError as error:
        return str(error)
    return None


def why_not_sequential(others: dict[str, Any]) -> str | None:
    """Why the sequential choice is not possible with the other choices; None if it is possible."""
    try:
        require_sequential(Choices(**{**others, "sequential": True}))
    except TransActError as error:
        return str(error)
    return None


def choices_now(shape: Architecture) -> Choices:
    """The present values of the controls; correct in callbacks too, before the page is drawn."""
    values = {name: st.session_state[name] for name in CONTROLS}
    widths = values.pop("widths")
    values["sequential"] = values["sequential"] and why_not_sequential(values) is None
    choices = Choices(**values)
    if widths == "uniform" or why_not_own_widths(shape, choices) is not None:
        return choices
    named = kept_layers(st.session_state[WRITTEN], shape.num_hidden_layers) or ()
    return replace(choices, widths=widths, keep_layers=named)


def begin_choices() -> None:
    """First values of the controls: those that the address names, else the visitor's last ones."""
    link = st.query_params
    left = visit().cut
    if not {*ALL_CONTROLS, *Position.__dataclass_fields__} & set(link):
        for name in CONTROLS:
            st.session_state.setdefault(name, getattr(left.of_controls, name))
        st.session_state.setdefault(WRITTEN, layers_in_words(left.keep_layers))
    # Streamlit keeps the value of a control that was drawn before, whatever the address says.
    for name, options in CONTROLS.items():
        named = {str(option).lower(): option for option in options}
        if name in link and link[name].lower() in named:
            st.session_state[name] = named[link[name].lower()]
    st.session_state.setdefault("widths", Choices.widths)
    st.session_state[WRITTEN] = link.get(WRITTEN, st.session_state.get(WRITTEN, ""))


def in_address(choices: Choices) -> dict[str, Any]:
    """The controls as an address and the browser hold them."""
    named = {name: getattr(choices, name) for name in CONTROLS}
    return {**named, WRITTEN: layers_in_words(choices.keep_layers)}


def restore_choices() -> None:
    """Sets the controls to the choices of a step that the browser undid or redid."""
    view = st.session_state[KEY].get("view")
    wanted = view.get("choices") if isinstance(view, dict) else None
    if isinstance(wanted, dict):
        for name, options in CONTROLS.items():
            if wanted.get(name) in options:
                st.session_state[name] = wanted[name]
        st.session_state[WRITTEN] = str(wanted.get(WRITTEN, ""))


def begin_position() -> None:
    """The position that the sliders and bars start at: the address decides, and without one the
    visitor's last position."""
    state, cut = st.session_state, visit().cut
    left = Position(round(100 * cut.mha_ratio), round(100 * cut.mlp_ratio))
    left = replace(left, **dict(zip(("heads", "channels"), texts_of(cut.by_hand), strict=True)))
    # The ratios of a cut by hand are not where the sliders stand.
    put_at(Position.read(st.query_params, state.get("position", left)))


def put_at(position: Position) -> None:
    """Moves the sliders to a position when the live view is next drawn."""
    _, before = st.session_state.get("start", (None, 0))
    st.session_state["start"] = (position, before + 1)


def position_sent() -> Position:
    """The position that the browser last sent, or the one that Python has set since."""
    sent = st.session_state[KEY].get("view") if KEY in st.session_state else None
    return position_of(sent, *st.session_state["start"])


def fitted_position(shape: Architecture, choices: Choices) -> Position:
    """The position, after bars that these choices do not allow were moved to the nearest that can
    be, or taken away."""
    position = position_sent()
    if not position.by_hand:
        return position
    bars = "", ""
    if not why_fixed(choices):
        costs = layer_costs(shape, choices.granularity, choices.multiple_of)
        bars = fitted(position.heads, position.channels, costs, shape.num_hidden_layers)
    moved = replace(position, heads=bars[0], channels=bars[1])
    if moved != position:
        put_at(moved)
    return moved


def cut_of(position: Position, choices: Choices, shape: Architecture) -> Cut:
    """The cut at a position. Of bars the ratios are what they remove, wherever the sliders are."""
    if position.by_hand:
        ratios = removed_by_hand(position.by_hand, shape)
        choices = replace(choices.of_uniform, widths="by-hand", by_hand=position.by_hand)
    else:
        ratios = position.mha / 100, position.mlp / 100
    return Cut(*ratios, **{field.name: getattr(choices, field.name) for field in fields(Choices)})


def keep(position: Position, choices: Choices, shape: Architecture) -> Cut:
    """Stores the position in the address and the visit; returns the cut that it describes."""
    st.session_state["position"] = position
    address = {name: str(value) for name, value in asdict(position).items() if value != ""}
    for name in {"heads", "channels"} & set(st.query_params) - set(address):
        del st.query_params[name]
    if any(st.query_params.get(name) != value for name, value in address.items()):
        st.query_params.update(address)
    cut = visit().cut = cut_of(position, choices, shape)
    return cut


# --- tables ----------------------------------------------------------------------------------


@st.cache_resource(show_spinner=False)
def _tables_of_benches() -> WeakKeyDictionary[Bench, dict[Choices, tuple]]:
    return WeakKeyDictionary()


def tables_of(
    bench: Bench, choices: Choices
) -> tuple[list[Structure], EnergyKept | None, dict[str, Any]]:
    """The tables that the live view draws from, made once for each bench and choices."""
    prepared = bench.prepared(first_look(choices))
    of_bench = _tables_of_benches().setdefault(bench, {})
    # The tables depend on the recovery only in this: biases are parameters.
    recovery = "bias" if choices.recovery == "bias" else "none"
    key = replace(choices.of_uniform, recovery=recovery), prepared
    known = of_bench.get(key)
    if known is None:
        shape = bench.loaded.architecture
        several = choices.granularity == "auto"
        granularities = granularities_of(bench) if several else (choices.granularity,)
        structures = [
            structure(
                shape,
                granularity,
                choices.multiple_of,
                choices.recovery == "bias",
                choices.head_dim_multiple_of,
            )
            for granularity in granularities
        ]
        drawn = energy = None
        if prepared:
            scores = bench.scores(choices.importance)
            drawn = maps(structures[0], scores, shape)
            energy = energy_kept(structures[0], scores, bench.statistics(), shape)
        bars = bar_tables(shape, choices)
        made = tables(shape, structures, drawn, energy, bench.save_dtype, bars)
        known = of_bench[key] = (structures, energy, made)
        while len(of_bench) > TABLES_KEPT:
            of_bench.pop(next(iter(of_bench)), None)
    return known


def choices_of(point: Measurement) -> Choices:
    """The choices of a measured cut, with the granularity that `auto` took in place of `auto`."""
    return replace(Cut.of(point).choices, granularity=point.plan.granularity)


def measured_at(table: Structure, choices: Choices) -> list[Measured]:
    """This visitor's points with these choices, each at the options that have its widths or were
    its budget, and those of bars with the same choices otherwise."""
    mha = {option.width: place for place, option in enumerate(table.mha.options)}
    mlp = {option.width: place for place, option in enumerate(table.mlp.options)}
    found = []
    for point in points():
        of_point, cost = choices_of(point), point.footprint
        ratios = [ratio and round(ratio, 4) for ratio in times_dense(point)]
        if of_point.by_hand and of_point.of_uniform == choices.of_uniform:
            found.append(Measured(None, None, *ratios, *texts_of(of_point.by_hand)))
        alike = of_point == choices or (point.plan.uniform and choices.widths == "uniform")
        if of_point.of_uniform != choices.of_uniform or not alike:
            continue
        if of_point.widths in ("allocated", "traded"):
            places = [
                side.option_at[round(100 * ratio)]
                for side, ratio in (
                    (table.mha, point.plan.mha_ratio),
                    (table.mlp, point.plan.mlp_ratio),
                )
            ]
            found.append(Measured(*places, *ratios))
        elif cost.mha_width in mha and cost.mlp_width in mlp:
            found.append(Measured(mha[cost.mha_width], mlp[cost.mlp_width], *ratios))
    return found


# --- prediction ------------------------------------------------------------------------------


def prediction_of(
    bench: Bench, choices: Choices, table: Structure
) -> dict[tuple[int, int], Ratio] | None:
    """Predicted perplexity of uniform cuts by widths; None until the damage is measured."""
    choices = choices.of_uniform
    if choices.granularity == "auto" or not bench.damage_known(choices):
        return None
    known = prediction_points(bench)

    def predict() -> dict[tuple[int, int], Ratio]:
        mha, mlp = ([option.width for option in side.options] for side in (table.mha, table.mlp))
        return predict_grid(bench, choices, known, mha, mlp)

    return while_same("prediction", (visit().request, choices, known), predict)


def prediction_points(bench: Bench) -> list[Point]:
    """This visitor's measured points with choices whose damage is known, and whose prices are where
    layers have widths of their own."""
    request, made = visit().request, []
    own: dict[tuple, Point] = holding().found.setdefault("points of own widths", {})
    for measured in points():
        choices = choices_of(measured)
        if choices.widths == "uniform":
            made.append(Point.of(measured, choices))
            continue
        laws = workbench().prices(request, choices)
        if laws is None or not bench.damage_known(choices.of_uniform):
            continue
        # All widths of all layers are looked at for it, so it is made once.
        key = measured.identity, choices
        if key not in own:
            own[key] = Point.of_own_widths(bench, measured, choices, laws)
        made.append(own[key])
    return [point for point, _ in with_known_damage(bench, made)]


def while_same(name: str, key: Any, make: Callable[[], Any]) -> Any:
    """The value last made in this tab under `name`; made again if `key` has changed."""
    # Keys are compared as text, since a NaN in a point is not equal to itself in Python 3.13.
    key = repr(key)
    if name not in st.session_state or st.session_state[name][0] != key:
        st.session_state[name] = key, make()
    return st.session_state[name][1]


def why_unpredicted(choices: Choices, known: bool) -> str:
    """What stands in a prediction's place where there is none."""
    if choices.widths != "uniform":
        return "predicted once the widths are chosen"
    return "not predicted at widths this narrow" if known else "not predicted yet"


def learn(bench: Bench, choices: Choices) -> tuple[Job | None, list[Job]]:
    """The job that measures what a prediction needs, or None, and a list of it while it runs.

    The job is started here, in the background, if it is short; see `Workbench.learn`. Any other
    waiting job runs before it.
    """
    if choices.granularity == "auto" or bench.damage_known(choices):
        return None, []
    request, board = visit().request, workbench()
    job = board.open(request).damages.get(what_to_learn(choices))
    if job is None and choices.granularity != "head-dims":
        job = board.learn(request, choices, unasked=True)
        job.wait(SOON)
    under_way = unfinished(job)
    if bench.damage_known(choices):
        st.rerun()
    return job, under_way


def offer_prediction(bench: Bench, choices: Choices, learning: Job | None) -> None:
    """The button that measures what a prediction needs, with an estimate of its time."""
    if learning is not None and learning.error:
        st.error(f"{learning.title} failed. {plain(learning.error)}", icon=":material/error:")
    request = visit().request
    if st.button(
        "Predict perplexity",
        icon=":material/query_stats:",
        help="With these choices, at all positions: measures what each layer loses at every width"
        + (
            ", by repairing each layer's attention several times"
            if choices.granularity == "head-dims"
            else ""
        )
        + f". {pace_in_words(request)}",
    ):
        workbench().learn(request, choices, anew=True)
        st.rerun()
    seconds = learning_seconds(bench, request, choices)
    st.caption(f"Takes {estimate_in_words(seconds)}, in the background.")


def scored_points(bench: Bench) -> list[Scored]:
    """What was predicted of each of this visitor's points before it was measured."""
    known = prediction_points(bench)
    return while_same("score", (visit().request, known), lambda: keep_score(bench, known))


def show_score(bench: Bench) -> None:
    """A sentence on how accurate the predictions have been."""
    scored = scored_points(bench)
    if not scored:
        return
    errors = sorted(abs(score.relative_error) for score in scored)
    inside = sum(score.inside for score in scored)
    st.caption(
        f"Predictions so far: of {len(scored)} cuts predicted before they were measured, {inside} "
        f"were inside the interval, which should hold 9 of 10. The median error is "
        f"{errors[len(errors) // 2]:.1%}."
    )


# --- targets ---------------------------------------------------------------------------------


def choose_target(
    bench: Bench, choices: Choices, table: Structure, energy: EnergyKept | None
) -> None:
    """A popover for a target; the ratios that meet it are set on the sliders."""

    def search() -> None:
        state = st.session_state
        goal, most = state["goal"], state[f"at-most-{state['goal']}"]
        scale = {"kv-cache": 0.01, "perplexity": 1.0}.get(goal, 1e6)
        try:
            found = find(
                Target(goal, most * scale, state["position"].context),
                table,
                prediction_of(bench, choices, table),
                energy,
                sizes,
            )
        except TransActError as error:
            state["target-outcome"] = (False, str(error))
            return
        put_at(
            replace(
                state["position"],
                mha=found.mha_position,
                mlp=found.mlp_position,
                heads="",
                channels="",
            )
        )
        state["target-outcome"] = (True, found_in_words(found))

    dense, context = table.dense, st.session_state.get("position", Position()).context
    flops = dense.flops + dense.flops_per_context * context
    usual = {
        "parameters": round(0.75 * dense.parameters / 1e6, 3),
        "flops": round(0.75 * flops / 1e6, 3),
        "kv-cache": 50.0,
        "file": 1.0,
        "perplexity": 1.2,
    }
    with st.popover(
        "A target instead of ratios",
        icon=":material/target:",
        width="stretch",
        disabled=choices.granularity == "auto",
        help="Not with auto, whose widths are decided when a cut is measured."
        if choices.granularity == "auto"
        else None,
    ):
        goal = st.segmented_control(
            "Of what",
            list(GOALS),
            format_func=GOAL_NAMES.get,
            default="parameters",
            required=True,
            key="goal",
        )
        sizes = None
        if goal == "file":
            sizes = file_sizes(choices, table)
            if sizes is None:
                return
            usual["file"] = round(0.75 * max(sizes.values()) / 1e6, 1)
        label, least, most = GOALS[goal]
        st.number_input(
            label,
            min_value=least,
            max_value=most,
            value=max(least, usual[goal]),
            step=0.05 if goal == "perplexity" else 1.0,
            key=f"at-most-{goal}",
        )
        st.button("Find the ratios", type="primary", on_click=search)


def file_sizes(choices: Choices, table: Structure) -> Mapping[tuple[int, int], int] | None:
    """What a GGUF file of the chosen type weighs at each pair of widths; None until it is known."""
    types = list(QUANTIZATIONS)
    chosen = st.selectbox("Type", types, types.index(USUAL), key="target-type")
    block = QUANTIZATIONS[chosen].block
    if choices.multiple_of % block:
        st.caption(
            f"{chosen} takes {block} weights at a time: at an MLP width that is no multiple of "
            f"{block}, `down_proj` gets a larger type. *Multiple of* {block} avoids that."
        )
    job = sizes_by_widths_job(table, choices.recovery, chosen)
    if not job.wait(SOON):
        watch("target-sizes", job)
        return None
    if job.state != DONE:
        st.error(plain(job.error or "The sizes were not worked out."), icon=":material/error:")
        return None
    return job.result


def show_target_outcome() -> bool:
    """Shows once what the last search for a target found; True if there was a search."""
    met, words = st.session_state.pop("target-outcome", (True, ""))
    if words:
        (st.caption if met else st.warning)(words)
    return bool(words)


def found_in_words(found: Found) -> str:
    return (
        f"MHA {found.mha_position} %, MLP {found.mlp_position} %: of {found.of:,} pairs of widths "
        f"{found.meeting:,} meet the target; this one because {found.why}."
    )


# --- drawn when a slider rests ---------------------------------------------------------------


def in_ranges(numbers: Sequence[int]) -> str:
    """Ascending integers in words: 0–2, 5."""
    runs: list[list[int]] = []  # of consecutive integers
    for integer in numbers:
        if runs and integer == runs[-1][-1] + 1:
            runs[-1].append(integer)
        else:
            runs.append([integer])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def show_pairs(bench: Bench, plan: PruningPlan) -> None:
    pairs = bench.pairs()
    effects = pairs.effects.numpy()
    show(
        plan_charts.pair_map(effects, plan, pairs.inv_freq.numpy()),
        "plan-pairs",
        "bright cells are rotary pairs with a large effect on attention. Large cells are kept; "
        "small, pale cells are removed.",
        lambda: plan_charts.pairs_table(effects, plan),
    )
    if plan.head_dim:
        st.caption(
            "All heads share the frequencies of the slots "
            f"(▾): those of pairs {in_ranges(plan.slots)}. Each KV head moves its own "
            "best pairs into these slots. Pairs are chosen by their effect on attention: with "
            "least squares, head-dims does not depend on the importance."
        )


def show_reading(granularity: str) -> None:
    st.caption(
        "How to read it: all pictures follow the slider while it is dragged, and the address of "
        "the page keeps the position. In the anatomy, the MHA and the MLP of each layer are drawn "
        "as two trapezoids that meet at the module's inner width (its waist). The residual stream "
        "keeps its full width. Brighter heads and channels have higher scores; thin heads and "
        "veiled channels are removed. The strip under a slider shows perplexity along it: a band "
        "where it is predicted, rings where it was measured, both on the evaluation text. Energy "
        "is `Σ a²` over the calibration tokens. A low value means that the units are seldom "
        "active, not that the model can do without them; only a measurement shows that."
        + (
            " For narrower heads it is the energy of the value dims that the bare cut keeps; "
            "`least-squares` finds a better basis with as many dims."
            if granularity == "head-dims"
            else ""
        )
    )


def times_dense(point: Measurement) -> tuple[float, float | None, float | None]:
    """Measured perplexity as a multiple of the dense model's, and the ends of its 95 % interval.

    The ends are None for a single evaluation window, which has no spread.
    """
    middle, half = point.delta_nll, 1.96 * point.delta_nll_se
    if not math.isfinite(half):
        return math.exp(min(middle, MAX_DELTA)), None, None
    ratio, low, high = (math.exp(min(middle + side, MAX_DELTA)) for side in (0.0, -half, half))
    return ratio, low, high


def show_point(
    bench: Bench, choices: Choices, point: Measurement, learning: Job | None, under_way: bool
) -> None:
    """The measurement at the sliders' position, and what had been predicted for it."""
    ratio, low, high = times_dense(point)
    measured, times, before, about = st.columns([3, 3, 3, 4], gap="small")
    quiet = {"delta_color": "off", "delta_arrow": "off"}
    measured.metric(
        "Perplexity, measured",
        f"{point.perplexity:.2f}",
        f"dense {point.perplexity / ratio:.2f}",
        **quiet,
    )
    times.metric(
        "Relative to dense",
        f"{ratio:.2f} ×",
        "one window: no interval" if low is None else f"{low:.2f} to {high:.2f}, 95 %",
        **quiet,
        help="The interval is of the paired difference from the dense model, over evaluation "
        "windows.",
    )
    predicted = next(
        (
            score.predicted
            for score in reversed(scored_points(bench))
            if (score.point.mha_width, score.point.mlp_width, score.point.choices)
            == (point.footprint.mha_width, point.footprint.mlp_width, choices_of(point))
        ),
        None,
    )
    with before:
        if predicted is not None:
            st.metric(
                "Predicted before",
                f"{predicted.mid:.2f} ×",
                f"{predicted.low:.2f} to {predicted.high:.2f}, 9 in 10",
                **quiet,
                help="From what each layer loses and the points measured before this one.",
            )
        elif choices.granularity == "auto":
            st.metric("Predicted before", "–", "not with auto", **quiet)
        elif point.decision.widths != "uniform":
            st.metric("Predicted before", "–", "uniform only", **quiet)
        elif bench.damage_known(choices_of(point)):
            st.metric("Predicted before", "–", "not this narrow", **quiet)
        elif under_way:
            st.metric("Predicted before", "–", "under way", **quiet)
        else:
            offer_prediction(bench, choices, learning)
    error = f" ± {point.delta_nll_se:.3f}" if math.isfinite(point.delta_nll_se) else ""
    warning = kind_warning(bench)
    marked = " :orange[:material/warning: Of the calibration text's kind.]" if warning else ""
    elsewhere = on_other_texts(bench, point)
    about.caption(
        f"On {text_in_words(bench)}.{marked}" + (f"  \n{elsewhere}" if elsewhere else ""),
        help=f"{warning or ''}\n\nΔ NLL {point.delta_nll:.3f}{error} nats a token: the mean "
        "difference from the dense model, with its standard error over evaluation windows (a "
        f"single window has none). Took {point.seconds:.0f} s.",
    )


def show_fits(point: Measurement) -> None:
    if point.fits:
        with st.expander("What the repair did in each layer"):
            show(
                plan_charts.layer_fits(point.fits, point.recovery),
                "fits",
                "the distance from the dotted down to the solid line is how much of the bare cut's "
                "error the repair removes, on held-out windows.",
                lambda: pd.DataFrame(map(asdict, point.fits)),
            )


def show_decision(decision: Decision | None, plan: PruningPlan) -> None:
    """How `auto` and several steps decided, or a note that they have not decided yet."""
    if decision is None:
        st.caption(
            "What `auto` takes, which units several steps or a sequential choice keep, and how "
            "widths are allocated or traded is found when the cut is measured. Until then the "
            f"maps show `{plan.granularity}` scored once, with the same widths in every layer."
        )
        return
    for sentence in filter(None, (decision.why, decision.how_allocated)):
        st.caption(sentence)
    if decision.earlier_steps:
        st.caption(
            "On the way: "
            + "; ".join(
                f"{step.num_attention_heads} heads of {step.head_dim} and "
                f"{step.intermediate_size:,} channels, perplexity {step.perplexity:.2f}"
                for step in decision.earlier_steps
            )
            + "."
        )


# --- the bar ---------------------------------------------------------------------------------


def offer_cut(room: DeltaGenerator, enabled: bool, explained: str) -> None:
    """The button that makes and measures the cut at this position.

    The callback reads the controls when the button is pressed, because the button of an earlier
    draw stays on screen while the page is drawn again. The button is drawn every time, disabled
    where it does nothing, because a click on a button that disappears would be lost.
    """

    def measure() -> None:
        in_view = workbench().open(visit().request).bench.result
        if in_view is not None:
            shape = in_view.loaded.architecture
            start_cut(in_view, cut_of(position_sent(), choices_now(shape), shape))

    room.button(
        "Prune and measure perplexity",
        key="measure-cut",
        type="primary",
        icon=":material/content_cut:",
        help=explained,
        width="stretch",
        on_click=measure,
        disabled=not enabled,
    )


def show_unmeasured(
    bench: Bench, cut: Cut, predicted: bool, learning: Job | None, under_way: Sequence[Job]
) -> None:
    """How long this cut takes to measure, and the offer to predict it if it is not predicted."""
    seconds = cuts_seconds(bench, visit().request, [cut.ratios], cut.choices)
    st.caption(
        f"**Not measured yet.** {what_comes_first(bench, cut)}Pruning, repairing and measuring "
        f"takes {estimate_in_words(seconds)}{' in all' if cut.allocates else ''}, on "
        f"{text_in_words(bench)}.",
        help=pace_in_words(visit().request),
    )
    if cut.granularity == "auto" or predicted or cut.widths != "uniform":
        return
    if under_way:
        watch_in_one_line("learning", *under_way)
    else:
        with st.container(horizontal=True, vertical_alignment="center"):
            offer_prediction(bench, cut.choices, learning)


# --- widths of single layers -----------------------------------------------------------------


def fill_now() -> None:
    """Starts to fill the rest of the budget at the present position; for a callback."""
    bench = workbench().open(visit().request).bench.result
    if bench is not None:
        fill(position_sent(), choices_now(bench.loaded.architecture))


def price_now() -> None:
    """Starts to measure what each layer's cut loses; for a callback."""
    bench = workbench().open(visit().request).bench.result
    if bench is not None:
        start_pricing(choices_now(bench.loaded.architecture))


def take_filled(job: Job | None, position: Position) -> bool:
    """Puts the bars where a job that has ended says, once; whether it did."""
    state = st.session_state
    if job is None or job.state != DONE or state.get("filled") is job:
        return False
    state["filled"] = job
    put_at(with_filled(position, job.result))
    return True


def other_cuts(cutting: Job | None) -> list[Job]:
    """This visitor's unfinished cuts of this model, without the one at the present position."""
    return [
        job
        for job in visit().visitor.unfinished_jobs
        if job is not cutting
        and isinstance(job.about, tuple)
        and job.about[:2] == ("cut", visit().request)
    ]


def workbench_view(bench: Bench, beside_title: DeltaGenerator) -> None:
    shape = bench.loaded.architecture
    choices = choose(shape)
    structures, energy, given = tables_of(bench, choices)
    table = structures[0]
    position = fitted_position(shape, choices)
    filling = visit().latest_job(filling_of(position, choices))
    if take_filled(filling, position):
        position = position_sent()
    pricing = visit().latest_job(("prices", visit().request, what_to_price(choices)))
    bar = st.container(key="cut-bar")
    buttons, state = bar.columns([5, 13], gap="medium")
    room = buttons.container()
    with buttons:
        choose_target(bench, choices, table, energy)
    start, revision = st.session_state["start"]
    dense = workbench().open(visit().request).dense
    at_work = unfinished(filling, pricing)
    elsewhere = unfinished(dense)
    prediction = prediction_of(bench, choices, table)
    position = live(
        given,
        start,
        revision,
        in_address(choices),
        bench.dense().perplexity if dense.state == DONE else None,
        prediction and predicted(table, prediction),
        measured_at(table, choices),
        f"Scoring by {choices.importance}",
        why_unpredicted(choices, prediction is not None),
        decided_at(bench, cut_of(position, choices, shape), position),
        prices := prices_of(bench, choices),
        NOT_PRICED if prices else pricing_in_words(bench, choices, pricing),
        bool(unfinished(filling)),
        restore_choices,
        fill_now,
        price_now,
    )
    cut = keep(position, choices, shape)
    measuring = visit().latest_job(("cut", visit().request, cut))
    cutting = unfinished(measuring)
    elsewhere += other_cuts(measuring)
    cuts = (
        any(cut.ratios)
        if position.by_hand
        else any(
            candidate.mha.option_at[position.mha] or candidate.mlp.option_at[position.mlp]
            for candidate in structures
        )
    )
    with state:
        prepared = bool(cutting) or require_prepared(bench, choices, "cut")
    prepared = prepared and bench.prepared(choices)
    with state:
        follow("layers", at_work)
        show_end(filling)
        if filling is not pricing:
            show_end(pricing)
    decision = find_cut(bench, cut) if prepared else None
    point = find_point(decision.plan, cut.recovery) if decision else None
    if not cuts:
        explained = "Nothing is cut at these ratios."
    elif point is not None:
        explained = "Measured: the figures are beside this button."
    else:
        explained = "Cuts the model, repairs it, and measures its perplexity."
    offer_cut(room, cuts and point is None and not cutting, explained)
    learning, under_way = learn(bench, choices) if prepared else (None, [])
    with state:
        if cutting:
            follow("cut", cutting)
            st.caption(
                "The result appears here. It is kept if you move to another position or page."
            )
        elif point is not None:
            show_point(bench, choices, point, learning, bool(under_way))
        elif prepared and not cuts:
            st.caption("**Nothing is cut** at these ratios: this is the dense model.")
        elif prepared:
            show_end(measuring)
            show_unmeasured(bench, cut, prediction is not None, learning, under_way)
            under_way = []
    elsewhere += under_way
    with beside_title:
        if not show_target_outcome() and elsewhere:
            watch_in_one_line("elsewhere", *elsewhere)
    show_dense_end("cut")
    if not prepared:
        return
    plan = plan_at(bench, cut, decision)
    if cut.widths in ("uniform", "allocated"):
        for sentence in plan_notices(plan, shape):
            st.caption(f":material/info: {sentence}")
    show_reading(choices.granularity)
    show_decision(decision, plan)
    if point is not None:
        show_fits(point)
    show_score(bench)
    if plan.granularity == "head-dims":
        show_pairs(bench, plan)


title, beside_title = st.columns([2, 5], vertical_alignment="center")
title.title("Compress")
workbench_view(require_bench(), beside_title)
