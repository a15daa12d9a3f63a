"""Train what a cut has left, from what the dense model says, and watch what comes back."""

from collections.abc import Sequence

import streamlit as st

from pages.charts.recover_charts import (
    divergence_chart,
    divergence_frame,
    loss_chart,
    loss_frame,
    text_names,
)
from pages.charts.text import plain
from pages.parts.cut_picker import choose_cut, in_words
from pages.parts.figure import show
from pages.parts.navigation import link
from pages.parts.progress import (
    require_bench,
    require_prepared,
    seconds_in_words,
    show_job,
    waiting_in_words,
)
from pages.parts.trained_cuts import trained_table
from pages.server.jobs import DONE, FAILED, QUEUED
from pages.server.points import find_cut, find_point
from pages.server.request import Cut, choices_in_name
from pages.server.settings import settings
from pages.server.task_runs import tasks_of_trained
from pages.server.trainings import (
    WATCHED_TOKENS,
    TrainingChoice,
    TrainingRun,
    elsewhere,
    memory_needed,
    pace_of,
    recall_cuts,
    remove,
    run_of,
    start_copy,
    start_training,
    trainings,
    written_bytes,
)
from pages.server.visits import visit
from transact_core.base.errors import TransActError
from transact_core.base.files import expanded
from transact_core.data.corpus import (
    BUILTIN_TEXTS,
    GENERATED,
    MIXED,
    mixed_sources,
    short_name,
)
from transact_core.experiments.bench import Bench, Measurement
from transact_core.export.compression import tune_command
from transact_core.training.loop import LEARNING_RATES
from transact_core.training.student import METHODS, require_method
from transact_core.training.teacher_cache import TOP

TOKENS, MINUTES = "Tokens", "Minutes"
USUAL_TOKENS, MOST_TOKENS = 32_768, 1_000_000_000
USUAL_MINUTES, MOST_MINUTES = 20, 100_000
LOSSES = {
    "kl": "the divergence from the dense model's next-token distribution",
    "kl+ce": "half that, half the loss on the text",
    "ce": "the loss on the text alone, without the dense model",
}
REFRESH_SECONDS = 1.0


def choose_training(cut: Cut) -> TrainingChoice | None:
    """What the controls say; None where they name no text."""
    # In a new tab, and after a reload, the controls are as in the last training.
    last = next(iter(trainings()), None)
    before = last.choice if last else TrainingChoice(MIXED.join(BUILTIN_TEXTS), tokens=USUAL_TOKENS)
    columns = st.columns([7, 3.3, 3, 2.8], vertical_alignment="bottom")
    chosen = choose_texts(
        columns[0],
        "Train on",
        mixed_sources(before.text),
        placeholder="A text",
        key="recover_text",
        help="Several are mixed, a window of each in turn. Any source can be typed: a file on the "
        "machine that runs this app, `hub:DATASET`, or `generated:TOKENS:SEED`, which the dense "
        "model writes. What calibrated or judged the cut, or is watched, is left out of it.",
    )
    unit = columns[1].segmented_control(
        "Budget in",
        [TOKENS, MINUTES],
        default=MINUTES if before.minutes else TOKENS,
        required=True,
        key="recover_unit",
        persist_state="session",
    )
    tokens = minutes = None
    if unit == TOKENS:
        tokens = columns[2].number_input(
            "Tokens to train on",
            1,
            MOST_TOKENS,
            before.tokens or USUAL_TOKENS,
            8192,
            key="recover_tokens",
            persist_state="session",
        )
    else:
        minutes = columns[2].number_input(
            "Minutes to train",
            1.0,
            float(MOST_MINUTES),
            before.minutes or float(USUAL_MINUTES),
            5.0,
            format="%g",
            key="recover_minutes",
            persist_state="session",
            help="The first steps are timed, and as many are planned as fit in.",
        )
    method = columns[3].segmented_control(
        "Method",
        METHODS,
        default=before.method,
        required=True,
        format_func={"full": "Full", "lora": "LoRA"}.__getitem__,
        key="recover_method",
        persist_state="session",
        help="Full trains all weights but the embedding. LoRA trains two thin matrices beside each "
        "projection, which takes less memory, and merges them.",
    )
    with st.expander("Watched texts, loss, learning rate, seed"):
        columns = st.columns([6, 2.4, 2, 2.6, 2.6], vertical_alignment="bottom")
        held_out = choose_texts(
            columns[0],
            "Watch as well",
            before.held_out,
            placeholder="Another kind of text",
            key="recover_held_out",
            help="A held-out part of each training text is always watched. Where nothing is named "
            "here another kind of text is watched beside a single training text, and of a chat "
            "model its own answers. The weights that are best on the mean of all are kept.",
        )
        watched = columns[1].number_input(
            "Watched tokens",
            16,
            1_000_000,
            before.held_out_tokens,
            1024,
            key="recover_watched",
            persist_state="session",
            help=f"Of each text. {WATCHED_TOKENS:,} are enough to tell which weights are better; "
            "more take time at each of the 16 looks.",
        )
        loss = columns[2].selectbox(
            "Loss",
            list(LOSSES),
            list(LOSSES).index(before.loss),
            key="recover_loss",
            persist_state="session",
            help="; ".join(f"`{name}`: {words}" for name, words in LOSSES.items()) + ".",
        )
        rate = columns[3].number_input(
            "Learning rate",
            0.0,
            1.0,
            before.learning_rate,
            format="%.1e",
            placeholder=f"{LEARNING_RATES[method]:g}",
            key="recover_rate",
            persist_state="session",
            help="The highest: it rises over the first steps and falls as a cosine. By default it "
            "is that of the method.",
        )
        seed = columns[4].number_input(
            "Seed", 0, 2**31, before.seed, key="recover_seed", persist_state="session"
        )
        written_down = st.toggle(
            "Write the dense model's predictions down",
            before.written_down,
            key="recover_written_down",
            persist_state="session",
            help=f"Of each token the {TOP} most likely next tokens, before training begins. "
            "Training then runs the cut alone, and a later training on the same text needs no pass "
            "of the dense model. The divergence is that of these tokens and of all others "
            "together. They are kept in the server's cache folder, and removed there as "
            "measurements are: what was used least recently goes first.",
        )
    if not chosen:
        return None
    return TrainingChoice(
        MIXED.join(chosen),
        tuple(held_out),
        int(tokens) if tokens else None,
        float(minutes) if minutes else None,
        method,
        loss,
        rate,
        int(seed),
        int(watched),
        written_down,
    )


def choose_texts(
    place: st.delta_generator.DeltaGenerator, label: str, before: Sequence[str], **options: str
) -> list[str]:
    """Sources: known ones by their names, and any that is typed, as it is typed."""
    # No `format_func`: with new options Streamlit knows an option by its formatted words alone.
    names: dict[str, str] = {}
    for source in (*visit().request.texts, GENERATED):
        names[source if short_name(source) in names else short_name(source)] = source
    named = {source: name for name, source in names.items()}
    labels = [named.get(source, source) for source in before]
    chosen = place.multiselect(
        label,
        list(dict.fromkeys([*names, *labels])),
        labels,
        accept_new_options=True,
        persist_state="session",
        **options,
    )
    return [names.get(name, name.strip()) for name in chosen]


def refusal(bench: Bench, point: Measurement, choice: TrainingChoice) -> str | None:
    """Why this cannot be trained here, in a sentence; None where it can."""
    try:
        require_method(choice.method)
        if choice.tokens:
            choice.settings().require(visit().request.sequence_length)
    except TransActError as error:
        return str(error)
    needed, free = memory_needed(bench, point, choice)
    if free is not None and needed > free:
        other = "" if choice.method == "lora" else ", choose LoRA"
        return (
            f"This training takes about {needed / 1e9:.1f} GB of memory, where {free / 1e9:.1f} GB "
            f"are free; free some memory{other}, or choose a shorter sequence length."
        )
    return None


def costs_in_words(bench: Bench, point: Measurement, choice: TrainingChoice) -> str:
    """Memory and time of a training before it begins."""
    needed, free = memory_needed(bench, point, choice)
    size = f"{needed / 1e9:.1f} GB" if needed >= 1e8 else f"{needed / 1e6:.0f} MB"
    memory = f"About {size} of memory" + ("" if free is None else f"; {free / 1e9:.1f} GB are free")
    pace, length = pace_of(choice), visit().request.sequence_length
    if pace is None:
        time = (
            "How long it takes is known after the first steps"
            if choice.tokens
            else "The first steps are timed, and say how many tokens that is"
        )
    elif choice.tokens:
        seconds = pace.seconds_left(choice.settings(), length, choice.watched)
        time = f"About {seconds_in_words(seconds)}, as your last training went here"
    else:
        tokens = pace.tokens_in(60 * choice.minutes, choice.settings(), length, choice.watched)
        time = f"About {tokens:,} tokens, as your last training went here"
    if choice.written_down:
        whole, of_token = written_bytes(bench, choice)
        size = f"{of_token:,} bytes a token"
        if whole is not None:
            size = f"at most {whole / 1e6:,.1f} MB"
        time += (
            ". Before that the dense model's predictions are written down, as far as they are not "
            f"yet: {size} of disk"
        )
    return f"{memory}. {time}. Watched: {watched_in_words(choice)}."


def watched_in_words(choice: TrainingChoice) -> str:
    """Which texts are watched by these choices, in words."""
    several = len(mixed_sources(choice.text)) > 1
    own = "a held-out part of each training text" if several else "a held-out part of the text"
    if choice.held_out:
        return f"{own}, {plain(', '.join(map(short_name, choice.held_out)))}"
    other = "" if several else ", another kind of text"
    return f"{own}{other}, and of a chat model its own answers"


def choose_and_start(bench: Bench, cut: Cut, point: Measurement) -> None:
    """The controls and the button; a training under way has its progress in the button's place."""
    choice = choose_training(cut)
    if is_busy():
        return
    why_not = choice and refusal(bench, point, choice)
    if why_not:
        st.error(plain(why_not), icon=":material/error:")
    run = choice and run_of(bench, cut, point, choice)
    button, beside = st.columns([1.5, 10], vertical_alignment="center")
    if button.button(
        "Train",
        type="primary",
        icon=":material/model_training:",
        width="stretch",
        disabled=not run or bool(why_not) or run.done or run.work.begun,
    ):
        st.session_state.pop("recover_shown", None)
        start_training(run)
        st.rerun()
    if run and run.done:
        beside.caption("This cut is trained so already; what came of it is below.")
    elif run and run.work.begun:
        beside.caption("This training was begun; go on with it below.")
    elif choice and not why_not:
        beside.caption(costs_in_words(bench, point, choice))


def is_busy() -> bool:
    """Whether one of the visitor's trainings is under way with the model and texts in view."""
    return any(run.under_way for run in trainings())


# --- one training ----------------------------------------------------------------------------


def shown_run(cut: Cut) -> TrainingRun | None:
    """The training under way, or one of this cut's: the latest, or the one that is chosen."""
    for run in trainings():
        if run.under_way:
            return run
    of_cut = {str(run.folder): run for run in trainings() if run.cut == cut}
    if len(of_cut) < 2:
        return next(iter(of_cut.values()), None)
    chosen = st.selectbox(
        "Training of this cut",
        list(of_cut),
        format_func=lambda folder: run_in_words(of_cut[folder]),
        key="recover_shown",
    )
    return of_cut[chosen]


def run_in_words(run: TrainingRun) -> str:
    choice = run.choice
    budget = f"{choice.minutes:g} minutes" if choice.minutes else f"{choice.tokens:,} tokens"
    rate = "" if choice.learning_rate is None else f" · rate {choice.learning_rate:g}"
    seed = f" · seed {choice.seed}" if choice.seed else ""
    seed += " · predictions written down" if choice.written_down else ""
    return (
        f"{budget} of {short_name(choice.text)} · {choice.method} · {choice.loss}{rate}{seed} · "
        f"{'done' if run.done else 'under way' if run.under_way else 'not finished'}"
    )


def standing_in_words(run: TrainingRun) -> str:
    """How far a training is."""
    job, parts = run.job, []
    if run.steps and run.curve.evaluated:
        done, total = run.step * run.tokens_a_step, run.steps * run.tokens_a_step
        parts.append(f"**{done:,} of {total:,} tokens**")
    if job.stopping:
        parts.append("pausing")
    elif job.state == QUEUED:
        parts.append(waiting_in_words(job))
    elif run.ending:
        parts.append("stopping, to keep the best")
    elif job.stage != "Training":
        # Names of texts are part of some stages.
        parts.append(f"{plain(job.stage or 'Starting')} {job.fraction:.0%}")
    if run.seconds_left is not None and not run.ending:
        parts.append(f"about {seconds_in_words(run.seconds_left)} left")
    elif job.stage != "Training" and job.seconds_left is not None and not job.pieces_done:
        parts.append(f"about {seconds_in_words(job.seconds_left)} left in this step")
    elif run.curve.evaluated and not run.step:
        parts.append("time left comes after the first steps")
    return " · ".join(parts)


def show_controls(run: TrainingRun) -> None:
    """Progress of a training under way, or how to go on with one that is not done."""
    if run.under_way:
        bar, pause, stop = st.columns([7, 1.7, 3], vertical_alignment="bottom", gap="small")
        # Loading is no part of it: a bar that fills more than once tells nothing.
        bar.progress(min(1.0, run.step / run.steps) if run.steps else 0.0, standing_in_words(run))
        pause.button(
            "Pause",
            icon=":material/pause:",
            width="stretch",
            on_click=run.job.cancel,
            disabled=run.job.stopping or run.ending,
            help="What is trained by now is kept on this server; go on at any time.",
        )

        def end() -> None:
            run.ending = True

        stop.button(
            "Stop and keep the best",
            icon=":material/stop:",
            width="stretch",
            on_click=end,
            disabled=run.job.stopping or run.ending,
            help="Trains no further, and writes the weights with the lowest mean divergence.",
        )
        return
    if run.done:
        return
    if run.job is not None and run.job.state == FAILED:
        st.error(f"The training ended early. {plain(run.job.error)}", icon=":material/error:")
    kept = run.work.begun
    words = "Nothing of it is trained yet."
    if kept:
        steps = f" of {run.steps:,}" if run.steps else ""
        words = f"Paused after step {run.step:,}{steps}; it is kept, also over a restart."
    with st.container(horizontal=True, vertical_alignment="center"):
        if st.button("Go on", type="primary", icon=":material/play_arrow:"):
            start_training(run)
            st.rerun()
        if st.button("Stop and keep the best", icon=":material/stop:", disabled=not kept):
            start_training(run, finish=True)
            st.rerun()
        if st.button("Remove", icon=":material/delete:", type="tertiary"):
            remove(run)
            st.rerun()
        st.caption(words)


def show_curves(run: TrainingRun) -> None:
    if not run.curve.evaluated:
        return
    show_shares(run)
    # One that ended before its budget was used up fills the charts all the same.
    steps = run.step if run.done else run.steps
    left, right = st.columns(2, gap="large")
    with left:
        show(
            divergence_chart(run.curve, run.tokens_a_step, steps),
            "divergence-chart",
            "how far the next-token distributions are from the dense model's, which is at 0. The "
            "dashed line is at the weights with the lowest mean, which are the ones that are kept.",
            lambda: divergence_frame(run.curve, run.tokens_a_step),
            narrow=True,
        )
    with right:
        show(
            loss_chart(run.curve, run.tokens_a_step, steps),
            "loss-chart",
            "each step has other windows of text, so that it goes up and down; whether training "
            "helps is told by the held-out texts.",
            lambda: loss_frame(run.curve, run.tokens_a_step),
            narrow=True,
        )
    for notice in run.notices:
        st.caption(f":material/info: {plain(notice)}")


def show_shares(run: TrainingRun) -> None:
    """Of each held-out text, the share of the lost nats that is back at the best look so far."""
    best = run.curve.best
    names = text_names(best.texts)
    for column, (source, name) in zip(st.columns(len(names)), names.items(), strict=True):
        share = run.curve.share_back(best, source)
        column.metric(
            f"Back on {plain(name)}",
            "nothing was lost" if share is None else f"{share:.0%}",
            border=True,
            help="Of the nats a token that the cut lost against the dense model on this held-out "
            "text, the share that is back with the best weights so far.",
        )


@st.fragment(run_every=REFRESH_SECONDS if visit().visitor.unfinished_jobs else None)
def show_run(run: TrainingRun, was_under_way: bool) -> None:
    if was_under_way and not run.under_way:
        st.rerun()
    st.caption(f"{in_words(run.cut)} · {plain(run_in_words(run))}")
    show_controls(run)
    if not run.done:
        show_curves(run)


# --- what came of it -------------------------------------------------------------------------


def show_result(bench: Bench, run: TrainingRun) -> None:
    try:
        record, trained, _ = run.outcome
    except TransActError as error:
        st.error(plain(str(error)), icon=":material/error:")
        return
    told = st.success if trained.improved else st.warning
    icon = ":material/check_circle:" if trained.improved else ":material/undo:"
    told(plain(trained.sentence), icon=icon)
    trained_table([run], with_cut=False)
    show_curves(run)
    left, right = st.columns(2, gap="large")
    with left:
        st.markdown("**Take it away**")
        take_away(bench, run)
    with right:
        st.markdown("**The same from the command line**")
        st.code(tune_command(record), language="bash", wrap_lines=True)
        st.caption("`out` is the cut's folder, as the Export page or `prune` writes it.")
        if st.button("Remove this training", icon=":material/delete:", type="tertiary"):
            remove(run)
            st.rerun()


def take_away(bench: Bench, run: TrainingRun) -> None:
    """The trained checkpoint, copied to a folder of the visitor's choice."""
    cut, seed = run.cut, run.folder.name[:6]
    ratios = f"mha{cut.mha_ratio * 100:.0f}-mlp{cut.mlp_ratio * 100:.0f}"
    name = f"{bench.loaded.name}-{ratios}{choices_in_name(cut.choices)}-trained-{seed}"
    folder = st.text_input(
        "Folder on the machine that runs this app",
        str(settings().export_folder / name),
        key=f"recover-folder-{name}",
        help="A new or empty folder: a checkpoint that stock transformers loads. As a local folder "
        "in the sidebar it is measured, run in llama.cpp, asked and published on all pages.",
    )
    tasks = tasks_of_trained(run.trained_cut) if run.trained_cut else None
    if tasks:
        st.caption("What it answered on the Tasks page goes into `report.json` and the model card.")
    about = "recover copy", visit().request
    busy = show_job(*about)
    job = visit().latest_job(about)
    if job and job.state == DONE:
        st.success(f"Written to {plain(job.result)}", icon=":material/check_circle:")
    if not busy and st.button("Write the checkpoint", disabled=not folder.strip()):
        start_copy(run, expanded(folder.strip()), tasks.report() if tasks else None)
        st.rerun()


st.title("Recover")
st.caption(
    "Train a cut to say what the dense model says of each next token. The weights that are nearest "
    "to it on held-out texts are kept, those of the cut included."
)
bench = require_bench()
recall_cuts(bench)
if others := elsewhere():
    st.caption(
        f":material/history: You have trainings of {plain(', '.join(others))} with other texts or "
        "settings; load them in the sidebar to see them."
    )
cut = choose_cut(bench)
if not require_prepared(bench, cut.choices, "recover"):
    st.stop()
decision = find_cut(bench, cut)
point = find_point(decision.plan, cut.recovery) if decision else None
if point is None:
    st.info(
        "This cut is not measured yet, and only measured cuts are trained: measure it on the "
        "Compress page, or choose another one.",
        icon=":material/info:",
    )
    link("compress", "Measure this cut on the Compress page")
else:
    choose_and_start(bench, cut, point)
run = shown_run(cut)
if run is not None:
    show_run(run, run.under_way)
    if run.done and not run.under_way:
        show_result(bench, run)
