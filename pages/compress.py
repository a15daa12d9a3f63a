"""Two sliders, what they mean at once, and the real cut behind a button."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any
from weakref import WeakKeyDictionary

import pandas as pd
import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from pages.charts import plan_charts
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
    follow,
    require_bench,
    require_prepared,
    show_dense_end,
    show_end,
    unfinished,
)
from pages.server.jobs import DONE, Job
from pages.server.open_models import workbench
from pages.server.points import find_cut, find_point, plan_at
from pages.server.request import Cut, first_look, what_to_learn
from pages.server.start_jobs import start_cut
from pages.server.visits import points, visit
from transact_core.base.errors import TransActError
from transact_core.experiments.bench import Bench, Choices, Measurement
from transact_core.experiments.decide import granularities_of, require_sequential
from transact_core.experiments.prediction import Point, keep_score, predict_grid, with_known_damage
from transact_core.importance.scores import IMPORTANCES
from transact_core.planning.law import Ratio
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
    told = {name: st.session_state[name] for name in CONTROLS}
    told["sequential"] = told["sequential"] and why_not_sequential(told) is None
    return Choices(**told)


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
    told = {name: str(value) for name, value in asdict(position).items()}
    if any(st.query_params.get(name) != value for name, value in told.items()):
        st.query_params.update(told)
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
                each,
                choices.multiple_of,
                choices.recovery == "bias",
                choices.head_dim_multiple_of,
            )
            for each in granularities
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
    mha = {option.width: number for number, option in enumerate(table.mha.options)}
    mlp = {option.width: number for number, option in enumerate(table.mlp.options)}
    return [
        Measured(
            mha[point.footprint.mha_width],
            mlp[point.footprint.mlp_width],
            round(math.exp(point.delta_nll), 4),
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


def learn(bench: Bench, choices: Choices) -> Job | None:
    """The job that measures what predictions need, if any; at the visitor's wish where it is long.

    What nobody asked for runs in the background, and gives way to whatever else waits.
    """
    if choices.granularity == "auto" or bench.damage_known(choices):
        return None
    request, board = visit().request, workbench()
    long = choices.granularity == "head-dims"
    job = board.open(request).damages.get(what_to_learn(choices))
    if job is None and not long:
        job = board.learn(request, choices)
    if job is not None and not job.finished:
        return job
    if bench.damage_known(choices):
        st.rerun()
    if job is not None and job.error:
        st.error(f"{job.title} failed. {job.error}", icon=":material/error:")
    if st.button(
        "Predict perplexity for these choices",
        icon=":material/query_stats:",
        help="Measures what each layer loses at every width"
        + (", by repairing each layer's attention several times." if long else "."),
    ):
        board.learn(request, choices, anew=True)
        st.rerun()
    return None


def show_score(bench: Bench) -> None:
    """How well what was predicted came out."""
    known = prediction_points(bench)
    scored = while_same("score", (visit().request, known), lambda: keep_score(bench, known))
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
) -> DeltaGenerator:
    """A popover in which a target is named; what is found moves the thumbs.

    Gives the room beside it.
    """

    def search() -> None:
        state = st.session_state
        goal, most = state["goal"], state[f"at-most-{state['goal']}"]
        scale = {"parameters": 1e6, "kv-cache": 0.01, "perplexity": 1.0}[goal]
        try:
            found = find(
                Target(goal, most * scale), table, prediction_of(bench, choices, table), energy
            )
        except TransActError as error:
            state["target-told"] = (False, str(error))
            return
        put_at(replace(state["position"], mha=found.mha_position, mlp=found.mlp_position))
        state["target-told"] = (True, found_in_words(found))

    dense = table.dense.parameters / 1e6
    usual = {"parameters": round(0.75 * dense, 3), "kv-cache": 50.0, "perplexity": 1.2}
    button, told, room = st.columns([5, 7, 6], vertical_alignment="center")
    with button.popover(
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
    met, words = st.session_state.pop("target-told", (True, ""))
    if words:
        (told.caption if met else told.warning)(words)
    return room


def found_in_words(found: Found) -> str:
    return (
        f"MHA {found.mha_position} %, MLP {found.mlp_position} %: of {found.of:,} pairs of widths "
        f"{found.meeting:,} meet the target; this one because {found.why}."
    )


# --- what is drawn on rest -------------------------------------------------------------------


def in_ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers in words: 0–2, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def show_pairs(bench: Bench, plan: PruningPlan) -> None:
    pairs = bench.pairs()
    effects = pairs.effects.numpy()
    show(
        plan_charts.pair_map(effects, plan, pairs.inv_freq.numpy()),
        "plan-pairs",
        "bright cells are pairs of dims that attention heeds; full cells stay, small pale ones go.",
        lambda: plan_charts.pairs_table(effects, plan),
    )
    if plan.head_dim:
        st.caption(
            "All heads share the frequencies of the slots "
            f"(▾): those of pairs {in_ranges(plan.slots)}. Each KV head puts its own "
            "best pairs into them. This choice is by effect on attention, whatever the importance."
        )


def show_reading(granularity: str) -> None:
    st.caption(
        "How to read it: in the anatomy each layer's MHA and MLP are two trapezoids around their "
        "waist, and the residual stream runs whole through all of them. Heads and channels are the "
        "brighter the higher they score; thin heads and veiled channels go. The strip under a "
        "slider is perplexity along it: the band where it is predicted, rings where it was "
        "measured. Energy is `Σ a²` over the calibration tokens. It says which units are quiet, "
        "not what their loss costs: that is measured."
        + (
            " For narrower heads it is that of the dims of the values that the bare cut keeps; "
            "`least-squares` finds a better basis of as many."
            if granularity == "head-dims"
            else ""
        )
    )


def show_point(point: Measurement) -> None:
    error = f" ± {point.delta_nll_se:.3f}" if math.isfinite(point.delta_nll_se) else ""
    with st.container(border=True):
        figures = st.columns(4)
        figures[0].metric("Perplexity, measured", f"{point.perplexity:.2f}")
        figures[1].metric("Of the dense model's", f"{math.exp(point.delta_nll):.2f} ×")
        figures[2].metric(
            "Δ NLL a token",
            f"{point.delta_nll:.3f}{error}",
            help="Mean per-token difference from the dense model in nats, with its standard "
            "error over evaluation windows (a single window has none).",
        )
        figures[3].metric("Took", f"{point.seconds:.0f} s")
        if point.fits:
            with st.expander("What the repair did in each layer"):
                show(
                    plan_charts.layer_fits(point.fits, point.recovery),
                    "fits",
                    "the lower the solid line under the dotted one, the more of what the bare cut "
                    "loses is made up for, on windows that the repair has not seen.",
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


def offer_cut(
    room: DeltaGenerator,
    bench: Bench,
    position: Position,
    structures: Sequence[Structure],
    busy: bool,
    point: Measurement | None,
) -> None:
    """The button that measures the cut at this position.

    It cuts at what the controls say when it is pressed: while a page is drawn anew, the button of
    what was chosen before is still there. And it is part of every drawing, since a click on a
    button that goes meanwhile would be lost.
    """

    def measure() -> None:
        in_view = workbench().open(visit().request).bench.result
        if in_view is not None:
            start_cut(in_view, cut_now())

    cuts = any(
        each.mha.option_at[position.mha] or each.mlp.option_at[position.mlp] for each in structures
    )
    if not cuts:
        explained = "Nothing is cut at these ratios."
    elif point is not None:
        explained = "Measured: the figures are below."
    else:
        tokens = f"{bench.evaluation.tokens:,} tokens"
        explained = f"Cuts the model, repairs it, and measures on {tokens}."
    room.button(
        "Prune and measure perplexity",
        key="measure-cut",
        type="primary",
        icon=":material/content_cut:",
        help=explained,
        width="stretch",
        on_click=measure,
        disabled=busy or not cuts or point is not None,
    )


def workbench_view(bench: Bench) -> None:
    choices = choose()
    structures, energy, given = tables_of(bench, choices)
    table = structures[0]
    room = choose_target(bench, choices, table, energy)
    position, revision = starting_position()
    dense = workbench().open(visit().request).dense
    under_way = unfinished(dense)
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
        "predicted once it is measured what each layer loses"
        if prediction is None
        else "not predicted at widths this narrow",
        restore_choices,
    )
    cut = keep(position, choices)
    measuring = visit().latest_job(("cut", visit().request, cut))
    cutting = unfinished(measuring)
    prepared = require_prepared(bench, choices, "cut")
    decision = find_cut(bench, cut) if prepared else None
    point = find_point(decision.plan, cut.recovery) if decision else None
    offer_cut(room, bench, position, structures, bool(cutting), point)
    if not prepared:
        return
    if learning := learn(bench, choices):
        under_way.append(learning)
    follow("cut", under_way + cutting)
    plan = plan_at(bench, cut, decision)
    for sentence in plan_notices(plan, bench.loaded.architecture):
        st.caption(f":material/info: {sentence}")
    show_reading(choices.granularity)
    show_decision(decision, plan)
    show_dense_end("cut")
    show_end(measuring)
    if point is not None:
        show_point(point)
    show_score(bench)
    if plan.granularity == "head-dims":
        show_pairs(bench, plan)


st.title("Compress")
st.caption("Move a slider: everything follows the thumb. The address keeps the view.")
workbench_view(require_bench())
