"""What a cut costs in tasks: both models answer the same questions, and figures come in live."""

import json

import streamlit as st

from pages.charts.tasks_chart import (
    at_chance,
    narrowing_chart,
    shown_frame,
    tasks_chart,
    tasks_frame,
)
from pages.charts.text import counted, plain
from pages.parts.cut_picker import model_in_words, require_cut_or_trained
from pages.parts.figure import show
from pages.parts.progress import show_job
from pages.server.request import Cut
from pages.server.settings import settings
from pages.server.task_runs import TaskRun, last_tasks, start_tasks
from pages.server.visits import visit
from transact_core.base.errors import TransActError
from transact_core.data.corpus import BUILTIN_TEXT, describe, short_name
from transact_core.data.own_text import OWN_TEXT_TASKS
from transact_core.experiments.harness import require_harness
from transact_core.experiments.task_data import DEFAULT_SUITE, PAPER_SUITE, TaskChoice
from transact_core.experiments.tasks import Standing
from transact_core.experiments.trained_cut import TrainedCut

OWN_TEXT, SUITE, PAPER, NAMED = "From a text", "Default suite", "As the paper ran it", "By name"
CHOICES = {
    OWN_TEXT: "No data set is needed: which of four continuations is the true one, and what is the "
    "last word of a sentence. The questions come from the second half of the text.",
    SUITE: f"{', '.join(DEFAULT_SUITE)}, without examples: some twenty minutes with 500 questions "
    "each, for the built-in model and a cut of it on two cores.",
    PAPER: ", ".join(
        f"{name} ({shots} examples)" if shots else name for name, shots in PAPER_SUITE.items()
    )
    + ". With all questions this takes hours without a GPU.",
    NAMED: "Any task of EleutherAI's lm-evaluation-harness whose answers are given and scored.",
}
"""What can be chosen, and what it is."""
FEWEST, FIRST, USUAL, MOST = 25, 50, 500, 100_000
"""Questions of each task: at least, offered for tasks from a text and for others, and at most."""
HUB, FOLDER = "Hub", "Folder"
REFRESH_SECONDS = 1.0


def choose_tasks() -> TaskChoice | None:
    """What the widgets name; None where they name no task or no folder yet."""
    kind = st.segmented_control(
        "Tasks",
        list(CHOICES),
        default=OWN_TEXT,
        required=True,
        key="tasks_kind",
        persist_state="session",
    )
    st.caption(CHOICES[kind])
    columns = st.columns([5, 2, 2], vertical_alignment="bottom")
    names: str | None = {OWN_TEXT: ",".join(OWN_TEXT_TASKS), SUITE: "default", PAPER: "paper"}.get(
        kind
    )
    text, folder, shots = BUILTIN_TEXT, None, None
    if kind == OWN_TEXT:
        text = choose_text(columns[0])
    else:
        if kind == NAMED:
            names = st.text_input(
                "Names, with commas between them",
                key="tasks_names",
                placeholder="piqa, arc_easy",
                persist_state="session",
            ).strip()
            shots = int(
                st.number_input(
                    "Examples before each question",
                    0,
                    100,
                    0,
                    key="tasks_shots",
                    persist_state="session",
                )
            )
        folder = choose_data(columns[0])
    # In a new tab, and after a reload, the controls are as in the last run.
    last = last_tasks()
    alike = last is not None and last.choice.names == names
    count = FIRST if kind == OWN_TEXT else USUAL
    if alike and last.choice.limit:
        count = last.choice.limit
    limit = columns[1].number_input(
        "Questions a task",
        FEWEST,
        MOST,
        count,
        25,
        key=f"tasks_limit_{kind}",
        persist_state="session",
        help="Drawn with the seed, the same ones for both models. 500 give a standard error of "
        "about 2 points on a paired difference.",
    )
    seed = columns[2].number_input(
        "Seed",
        0,
        2**31,
        last.choice.seed if alike else 0,
        1,
        key="tasks_seed",
        persist_state="session",
    )
    if not names or folder == "":
        return None
    return TaskChoice(names, int(limit), shots, folder, text, int(seed))


def choose_text(place: st.delta_generator.DeltaGenerator) -> str:
    """One of the texts in the sidebar, or of the built-in ones."""
    return place.selectbox(
        "Text",
        visit().request.texts,
        format_func=short_name,
        key="tasks_text",
        persist_state="session",
    )


def choose_data(place: st.delta_generator.DeltaGenerator) -> str | None:
    """The folder of task data; None for the hub, empty where no folder is named yet."""
    source, name = place.columns([2, 5], vertical_alignment="bottom")
    where = source.selectbox("Data", (HUB, FOLDER), key="tasks_data", persist_state="session")
    if where == HUB:
        name.caption("Fetched as the harness does, once; needs a network.")
        return None
    allowed = " and ".join(map(str, settings().read_folders)) or "no folder"
    return name.text_input(
        "Folder of task data",
        key="tasks_folder",
        placeholder="/path/to/data",
        persist_state="session",
        help="On the machine that runs this app, below " + plain(allowed) + ": files TASK.jsonl "
        "with the columns of the stock tasks; examples come from TASK.train.jsonl.",
    ).strip()


def choose_and_start(cut: Cut, trained: TrainedCut | None) -> None:
    choice = choose_tasks()
    alone = st.toggle(
        "Dense model alone",
        key="tasks_alone",
        persist_state="session",
        help="Without the cut: half the work, and no difference.",
    )
    if show_job("tasks", visit().request):
        return
    pruned = (None, None) if alone else (cut, trained)
    run = last_tasks()
    again = run is not None and (run.cut, run.trained, run.choice) == (*pruned, choice)
    stopped = again and any(each.asked < each.total for each in run.standings.values())
    with st.container(horizontal=True, vertical_alignment="center"):
        if st.button(
            "Go on" if stopped else "Run the tasks",
            type="primary",
            icon=":material/play_arrow:",
            disabled=choice is None,
        ):
            start_tasks(pruned[0], choice, pruned[1])
            st.rerun()
        st.caption(
            "Stop whenever you have seen enough: every block of 25 questions is kept, and nothing "
            "is scored twice."
        )


def show_figures(run: TaskRun) -> None:
    standings = list(run.standings.values())
    asked, total = (sum(getattr(each, name) for each in standings) for name in ("asked", "total"))
    st.caption(
        (
            f"Pruned: {plain(model_in_words(run.cut, run.trained))}"
            if run.cut
            else "The dense model alone"
        )
        + f" · {asked:,} of {counted(total, 'question')} answered · seed {run.choice.seed}"
        + (
            f" · from {plain(describe(run.choice.text))}"
            if set(run.history) & set(OWN_TEXT_TASKS)
            else ""
        )
    )
    show(
        tasks_chart(standings),
        "tasks-chart",
        "bars are 95 % intervals over questions. Differences are paired, question by question, so "
        "their intervals are narrower than those of the accuracies suggest; one that does not "
        "reach the dashed line is a loss, or a gain, that these questions show.",
        lambda: tasks_frame(standings),
    )
    for sentence in filter(None, map(chance_in_words, standings)):
        st.warning(sentence, icon=":material/casino:")
    if run.cut and any(len(after) > 1 for after in run.history.values()):
        show(
            narrowing_chart(dict(run.history)),
            "narrowing-chart",
            "each mark is the paired difference of accuracy after one more block; the interval "
            "shrinks with the square root of the number of questions.",
        )
    show_table(run, standings)


def chance_in_words(result: Standing) -> str | None:
    """A sentence where a model does not answer better than by guessing."""
    who = at_chance(result)
    if not who:
        return None
    models = {"both": "both models are", "dense": "the dense model is", "pruned": "the cut is"}
    tells = "" if who == "pruned" else ", so this task says little about the cut"
    return (
        f"**{plain(result.task)}**: {models[who]} at chance ({result.chance:.0%}), not above "
        f"guessing by two standard errors{tells}."
    )


def show_table(run: TaskRun, standings: list[Standing]) -> None:
    st.dataframe(shown_frame(standings), hide_index=True)
    st.caption("± is one standard error; the CSV above has the figures in full.")
    st.download_button(
        "tasks.json",
        json.dumps(run.report(), indent=1) + "\n",
        "tasks.json",
        "application/json",
        icon=":material/download:",
        on_click="ignore",
        help="The figures, with versions and seed, as `python -m transact_core tasks` writes them.",
    )


@st.fragment(run_every=REFRESH_SECONDS if visit().visitor.unfinished_jobs else None)
def show_run() -> None:
    run = last_tasks()
    if run is None or not run.history:
        if run is None or run.job.finished:
            st.info(
                "No task is run yet. If the cut was not measured before, it is made and measured "
                "first.",
                icon=":material/info:",
            )
        return
    show_figures(run)


st.title("Tasks")
st.caption(
    "Accuracy of the dense and of the pruned model on the same questions, with the paired "
    "difference. Perplexity on one text can flatter a cut; tasks show what it costs. The page "
    "Token damage shows where in a text the cut changes the predictions."
)
try:
    require_harness()
except TransActError as error:
    st.error(plain(str(error)), icon=":material/error:")
    st.stop()
bench, cut, trained = require_cut_or_trained("tasks")
choose_and_start(cut, trained)
show_run()
