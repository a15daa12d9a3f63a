"""Two sliders, what they would cost while they move, and a button that makes and measures the cut.

From the top: the controls; a bar that stays in view while the page scrolls, with the button, the
progress of the job that it starts and, where the thumbs stand on a measured cut, what came out; the
live view; and what explains the cut.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any
from weakref import WeakKeyDictionary

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from pages.charts import plan_charts
from pages.charts.text import plain
from pages.live import KEY, Measured, Position, live, position_of, predicted, tables
from pages.parts.figure import show
from pages.parts.help_texts import (
    GRANULARITY_HELP,
    IMPORTANCE_HELP,
    MULTIPLE_HELP,
    RECOVERY_HELP,
    SEQUENTIAL_HELP,
    STEPS_HELP,
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
    watch_in_one_line,
)
from pages.server.estimates import cuts_seconds, learning_seconds, pace_in_words
from pages.server.jobs import DONE, Job
from pages.server.open_models import workbench
from pages.server.points import find_cut, find_point, plan_at
from pages.server.request import Cut, first_look, what_to_learn
from pages.server.start_jobs import start_cut
from pages.server.visits import points, visit
from transact_core.base.errors import TransActError
from transact_core.data.corpus import BUILTIN_TEXT
from transact_core.experiments.bench import Bench, Choices, Measurement
from transact_core.experiments.decide import granularities_of, require_sequential
from transact_core.experiments.prediction import (
    Point,
    Scored,
    keep_score,
    predict_grid,
    with_known_damage,
)
from transact_core.importance.scores import IMPORTANCES
from transact_core.planning.law import MAX_DELTA, Ratio
from transact_core.planning.preview import EnergyKept, Structure, energy_kept, maps, structure
from transact_core.planning.targets import Found, Target, find
from transact_core.pruning.closed_form import RECOVERIES
from transact_core.pruning.plan import GRANULARITIES, Decision, PruningPlan, plan_notices

# For each bench, of the choices that were new last.
TABLES_KEPT = 24
MULTIPLES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# The choices beside the ratios, by the name that they have in the address, and what there is.
CONTROLS = {
    "granularity": (*GRANULARITIES, "auto"),
    "importance": tuple(IMPORTANCES),
    "recovery": RECOVERIES,
    "steps": tuple(range(1, 21)),
    "multiple_of": MULTIPLES,
    "sequential": (False, True),
}
GOALS = {
    "parameters": ("At most, in millions of parameters", 0.001, None),
    "kv-cache": ("At most, in % of the dense KV cache", 1.0, 100.0),
    "perplexity": ("At most, times the dense perplexity", 1.0, None),
}
GOAL_NAMES = {"parameters": "Parameters", "kv-cache": "KV cache", "perplexity": "Perplexity"}


# --- choices and position --------------------------------------------------------------------


def choose() -> Choices:
    """The choices beside the ratios, at their controls."""
    names = {
        "granularity": ("Granularity", GRANULARITY_HELP),
        "importance": ("Importance", IMPORTANCE_HELP),
        "recovery": ("Recovery", RECOVERY_HELP),
        "steps": ("Steps", STEPS_HELP),
        "multiple_of": ("Multiple of", MULTIPLE_HELP),
    }
    if KEY not in st.session_state:
        begin_choices()
    columns = st.columns([6, 6, 6, 3, 4, 5], vertical_alignment="bottom")
    others = {
        name: column.selectbox(
            label,
            CONTROLS[name],
            key=name,
            bind="query-params",
            persist_state="session",
            help=explained,
        )
        for column, (name, (label, explained)) in zip(columns[:-1], names.items(), strict=True)
    }
    refused = why_not_sequential(others)
    columns[-1].toggle(
        "Sequential",
        key="sequential",
        bind="query-params",
        persist_state="session",
        help=SEQUENTIAL_HELP if refused is None else f"{SEQUENTIAL_HELP}\n\n{refused}",
        disabled=refused is not None,
    )
    return choices_now()


def why_not_sequential(others: dict[str, Any]) -> str | None:
    """Why units cannot be chosen module by module beside the other choices, if they cannot."""
    try:
        require_sequential(Choices(**{**others, "sequential": True}))
    except TransActError as error:
        return str(error)
    return None


def choices_now() -> Choices:
    """As the controls stand in the browser; in a callback too, before the page is drawn."""
    values = {name: st.session_state[name] for name in CONTROLS}
    values["sequential"] = values["sequential"] and why_not_sequential(values) is None
    return Choices(**values)


def begin_choices() -> None:
    """At a visit's first sight of the page a link decides; without one, what the visitor left."""
    link = st.query_params
    if not {*CONTROLS, *Position.__dataclass_fields__} & set(link):
        for name in CONTROLS:
            st.session_state.setdefault(name, getattr(visit().cut, name))
    # A control that was seen before keeps its value, whatever a link from another page says.
    for name, options in CONTROLS.items():
        named = {str(option).lower(): option for option in options}
        if name in link and link[name].lower() in named:
            st.session_state[name] = named[link[name].lower()]


def in_address(choices: Choices) -> dict[str, Any]:
    return {name: getattr(choices, name) for name in CONTROLS}


def restore_choices() -> None:
    """Sets the controls as an undone or redone step has them; the browser asks for it."""
    view = st.session_state[KEY].get("view")
    wanted = view.get("choices") if isinstance(view, dict) else None
    if isinstance(wanted, dict):
        for name, options in CONTROLS.items():
            if wanted.get(name) in options:
                st.session_state[name] = wanted[name]


def starting_position() -> tuple[Position, int]:
    """Where the thumbs are put, and the number of times that they were put somewhere.

    A link decides at a visit's first sight of the page, and later what the visitor left.
    """
    state = st.session_state
    if KEY not in state:
        cut = visit().cut
        left = Position(round(100 * cut.mha_ratio), round(100 * cut.mlp_ratio))
        if "position" in state:
            left = replace(left, context=state["position"].context)
        put_at(Position.read(st.query_params, left))
    return state["start"]


def put_at(position: Position) -> None:
    _, before = st.session_state.get("start", (None, 0))
    st.session_state["start"] = (position, before + 1)


def cut_of(position: Position, choices: Choices) -> Cut:
    return Cut(position.mha / 100, position.mlp / 100, **in_address(choices))


def cut_now() -> Cut:
    """What thumbs and controls say in the browser, in a callback."""
    position = position_of(st.session_state[KEY].get("view"), *st.session_state["start"])
    return cut_of(position, choices_now())


def keep(position: Position, choices: Choices) -> Cut:
    """The address and the visit follow the thumbs."""
    st.session_state["position"] = position
    address = {name: str(value) for name, value in asdict(position).items()}
    if any(st.query_params.get(name) != value for name, value in address.items()):
        st.query_params.update(address)
    cut = visit().cut = cut_of(position, choices)
    return cut


# --- tables ----------------------------------------------------------------------------------


@st.cache_resource(show_spinner=False)
def _tables_of_benches() -> WeakKeyDictionary[Bench, dict[Choices, tuple]]:
    return WeakKeyDictionary()


def tables_of(
    bench: Bench, choices: Choices
) -> tuple[list[Structure], EnergyKept | None, dict[str, Any]]:
    """What the live view draws from, made once for each bench and choices."""
    prepared = bench.prepared(first_look(choices))
    mine = _tables_of_benches().setdefault(bench, {})
    # Of the recovery only this counts: biases are parameters.
    key = replace(choices, recovery="bias" if choices.recovery == "bias" else "none"), prepared
    known = mine.get(key)
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
        made = tables(shape, structures, drawn, energy, bench.save_dtype)
        known = mine[key] = (structures, energy, made)
        while len(mine) > TABLES_KEPT:
            mine.pop(next(iter(mine)), None)
    return known


def choices_of(point: Measurement) -> Choices:
    """With the granularity that was taken, where `auto` took one."""
    return replace(Cut.of(point).choices, granularity=point.plan.granularity)


def measured_at(table: Structure, choices: Choices) -> list[Measured]:
    """This visitor's points with these choices, at the options they have the widths of."""
    mha = {option.width: place for place, option in enumerate(table.mha.options)}
    mlp = {option.width: place for place, option in enumerate(table.mlp.options)}
    return [
        Measured(
            mha[point.footprint.mha_width],
            mlp[point.footprint.mlp_width],
            *(each and round(each, 4) for each in times_dense(point)),
        )
        for point in points()
        if choices_of(point) == choices
        and point.footprint.mha_width in mha
        and point.footprint.mlp_width in mlp
    ]


# --- prediction ------------------------------------------------------------------------------


def prediction_of(
    bench: Bench, choices: Choices, table: Structure
) -> dict[tuple[int, int], Ratio] | None:
    """Predicted perplexity by widths, once it is known what each layer loses."""
    if choices.granularity == "auto" or not bench.damage_known(choices):
        return None
    known = prediction_points(bench)

    def predict() -> dict[tuple[int, int], Ratio]:
        mha, mlp = ([option.width for option in side.options] for side in (table.mha, table.mlp))
        return predict_grid(bench, choices, known, mha, mlp)

    return while_same("prediction", (visit().request, choices, known), predict)


def prediction_points(bench: Bench) -> list[Point]:
    """This visitor's points whose damage is known."""
    made = [Point.of(point, choices_of(point)) for point in points()]
    return [point for point, _ in with_known_damage(bench, made)]


def while_same(name: str, key: Any, make: Callable[[], Any]) -> Any:
    """What was made last in this tab under that name, or made now where the key is another."""
    # A point may hold a NaN: equal to itself in a text, but not in a dataclass of Python 3.13.
    key = repr(key)
    if name not in st.session_state or st.session_state[name][0] != key:
        st.session_state[name] = key, make()
    return st.session_state[name][1]


def learn(bench: Bench, choices: Choices) -> tuple[Job | None, list[Job]]:
    """The job that measures what a prediction needs, if there is one, and it again if unfinished.

    Begins it in the background where it takes no time or little; see `Workbench.learn`. The job
    gives way to whatever else waits.
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
    """The button that measures what a prediction needs, and how long that takes."""
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
    """How well the predictions came out."""
    scored = scored_points(bench)
    if not scored:
        return
    errors = sorted(abs(each.relative_error) for each in scored)
    inside = sum(each.inside for each in scored)
    st.caption(
        f"Predictions so far: of {len(scored)} cuts predicted before they were measured {inside} "
        f"came out inside the interval, meant for 9 in 10; the median error is "
        f"{errors[len(errors) // 2]:.1%}."
    )


# --- targets ---------------------------------------------------------------------------------


def choose_target(
    bench: Bench, choices: Choices, table: Structure, energy: EnergyKept | None
) -> None:
    """A popover in which a target is named; what is found moves the thumbs."""

    def search() -> None:
        state = st.session_state
        goal, most = state["goal"], state[f"at-most-{state['goal']}"]
        scale = {"parameters": 1e6, "kv-cache": 0.01, "perplexity": 1.0}[goal]
        try:
            found = find(
                Target(goal, most * scale), table, prediction_of(bench, choices, table), energy
            )
        except TransActError as error:
            state["target-outcome"] = (False, str(error))
            return
        put_at(replace(state["position"], mha=found.mha_position, mlp=found.mlp_position))
        state["target-outcome"] = (True, found_in_words(found))

    dense = table.dense.parameters / 1e6
    usual = {"parameters": round(0.75 * dense, 3), "kv-cache": 50.0, "perplexity": 1.2}
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


def show_target_outcome() -> bool:
    """What the search for a target found, once; True where there was one."""
    met, words = st.session_state.pop("target-outcome", (True, ""))
    if words:
        (st.caption if met else st.warning)(words)
    return bool(words)


def found_in_words(found: Found) -> str:
    return (
        f"MHA {found.mha_position} %, MLP {found.mlp_position} %: of {found.of:,} pairs of widths "
        f"{found.meeting:,} meet the target; this one because {found.why}."
    )


# --- what is drawn on rest -------------------------------------------------------------------


def in_ranges(numbers: Sequence[int]) -> str:
    """Ascending integers in words: 0–2, 5."""
    runs: list[list[int]] = []
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
        "bright cells are rotary pairs with a large effect on attention; full cells stay, small "
        "pale ones go.",
        lambda: plan_charts.pairs_table(effects, plan),
    )
    if plan.head_dim:
        st.caption(
            "All heads share the frequencies of the slots "
            f"(▾): those of pairs {in_ranges(plan.slots)}. Each KV head puts its own "
            "best pairs into them. Pairs are chosen by their effect on attention: with least "
            "squares, head-dims does not depend on the importance."
        )


def show_reading(granularity: str) -> None:
    st.caption(
        "How to read it: everything follows the thumb while it is dragged, and the address keeps "
        "the view. In the anatomy each layer's MHA and MLP are two trapezoids around their "
        "waist, and the residual stream passes all of them at full width. Heads and channels are "
        "the brighter the higher they score; thin heads and veiled channels are removed. The strip "
        "under a slider is perplexity along it: a band where it is predicted, rings where it was "
        "measured. Energy is `Σ a²` over the calibration tokens: a low value means that the units "
        "are seldom active, not that the model can do without them, which only a measurement "
        "shows."
        + (
            " For narrower heads it is that of the dims of the values that the bare cut keeps; "
            "`least-squares` finds a better basis of as many."
            if granularity == "head-dims"
            else ""
        )
    )


def times_dense(point: Measurement) -> tuple[float, float | None, float | None]:
    """Measured perplexity over the dense model's, and the ends of its 95 % interval.

    The ends are None where a single window was evaluated, which has no spread.
    """
    middle, half = point.delta_nll, 1.96 * point.delta_nll_se
    if not math.isfinite(half):
        return math.exp(min(middle, MAX_DELTA)), None, None
    ratio, low, high = (math.exp(min(middle + side, MAX_DELTA)) for side in (0.0, -half, half))
    return ratio, low, high


def text_in_words(bench: Bench) -> str:
    """The evaluation text and how much of it."""
    windows = bench.evaluation
    name = "the built-in text" if windows.source == BUILTIN_TEXT else plain(windows.source)
    return f"{windows.tokens:,} tokens of {name} in windows of {windows.sequence_length:,}"


def show_point(
    bench: Bench, choices: Choices, point: Measurement, learning: Job | None, under_way: bool
) -> None:
    """What was measured where the thumbs stand, and beside it what had been predicted."""
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
            each.predicted
            for each in reversed(scored_points(bench))
            if (each.point.mha_width, each.point.mlp_width, each.point.choices)
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
        elif bench.damage_known(choices_of(point)):
            st.metric("Predicted before", "–", "not this narrow", **quiet)
        elif under_way:
            st.metric("Predicted before", "–", "under way", **quiet)
        else:
            offer_prediction(bench, choices, learning)
    error = f" ± {point.delta_nll_se:.3f}" if math.isfinite(point.delta_nll_se) else ""
    about.caption(
        f"On {text_in_words(bench)}.  \nΔ NLL {point.delta_nll:.3f}{error} nats a token. "
        f"Took {point.seconds:.0f} s.",
        help="Δ NLL is the mean per-token difference from the dense model, with its standard error "
        "over evaluation windows (a single window has none).",
    )


def show_fits(point: Measurement) -> None:
    if point.fits:
        with st.expander("What the repair did in each layer"):
            show(
                plan_charts.layer_fits(point.fits, point.recovery),
                "fits",
                "the lower the solid line under the dotted one, the more of what the bare cut "
                "loses is made up for, on held-out windows.",
                lambda: pd.DataFrame(map(asdict, point.fits)),
            )


def show_decision(decision: Decision | None, plan: PruningPlan) -> None:
    """How `auto` and steps decided, or what stands in for it until they have."""
    if decision is None:
        st.caption(
            "What `auto` takes, and which units several steps or a sequential choice keep, is "
            "found when the cut is measured. Until then the maps are of "
            f"`{plan.granularity}` scored once."
        )
        return
    if decision.why:
        st.caption(decision.why)
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
    """The button that measures the cut at this position.

    It cuts at what the controls say when it is pressed: while a page is drawn anew, the button of
    what was chosen before is still there. And it is part of every drawing, since a click on a
    button that goes meanwhile would be lost.
    """

    def measure() -> None:
        in_view = workbench().open(visit().request).bench.result
        if in_view is not None:
            start_cut(in_view, cut_now())

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
    """What it takes to measure this cut, and to predict it where it is not predicted yet."""
    seconds = cuts_seconds(bench, visit().request, [cut.ratios], cut.choices)
    st.caption(
        f"**Not measured yet.** Pruning, repairing and measuring takes "
        f"{estimate_in_words(seconds)}, on {text_in_words(bench)}.",
        help=pace_in_words(visit().request),
    )
    if cut.granularity == "auto" or predicted:
        return
    if under_way:
        watch_in_one_line("learning", *under_way)
    else:
        with st.container(horizontal=True, vertical_alignment="center"):
            offer_prediction(bench, cut.choices, learning)


def other_cuts(cutting: Job | None) -> list[Job]:
    """This visitor's unfinished cuts of this model at other positions."""
    return [
        job
        for job in visit().visitor.unfinished_jobs
        if job is not cutting
        and isinstance(job.about, tuple)
        and job.about[:2] == ("cut", visit().request)
    ]


def workbench_view(bench: Bench, beside_title: DeltaGenerator) -> None:
    choices = choose()
    structures, energy, given = tables_of(bench, choices)
    table = structures[0]
    bar = st.container(key="cut-bar")
    buttons, state = bar.columns([5, 13], gap="medium")
    room = buttons.container()
    with buttons:
        choose_target(bench, choices, table, energy)
    position, revision = starting_position()
    dense = workbench().open(visit().request).dense
    elsewhere = unfinished(dense)
    prediction = prediction_of(bench, choices, table)
    position = live(
        given,
        position,
        revision,
        in_address(choices),
        bench.dense().perplexity if dense.state == DONE else None,
        prediction and predicted(table, prediction),
        measured_at(table, choices),
        f"Scoring by {choices.importance}",
        "not predicted yet" if prediction is None else "not predicted at widths this narrow",
        restore_choices,
    )
    cut = keep(position, choices)
    measuring = visit().latest_job(("cut", visit().request, cut))
    cutting = unfinished(measuring)
    elsewhere += other_cuts(measuring)
    cuts = any(
        each.mha.option_at[position.mha] or each.mlp.option_at[position.mlp] for each in structures
    )
    with state:
        prepared = bool(cutting) or require_prepared(bench, choices, "cut")
    prepared = prepared and bench.prepared(choices)
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
                "The result appears here, and is kept if you go on to another position or page."
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
    for sentence in plan_notices(plan, bench.loaded.architecture):
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
