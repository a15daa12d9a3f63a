"""Where in a text a cut changes the predictions: damage token by token, and text by text."""

import math

import streamlit as st

from pages.charts.damage_chart import pieces_frame, texts_chart, texts_frame
from pages.charts.text import plain
from pages.parts import marked_text
from pages.parts.cut_picker import model_in_words, require_cut_or_trained
from pages.parts.figure import show
from pages.parts.progress import show_job
from pages.server.request import Cut
from pages.server.side_by_side import DamageRun, last_damage, start_damage
from pages.server.visits import visit
from transact_core.data.corpus import describe, short_name
from transact_core.experiments.bench import Bench
from transact_core.experiments.text_damage import TextDamage
from transact_core.experiments.trained_cut import TrainedCut

USUAL_TOKENS = 1024
WORST_SHOWN = 200
"""Rows of the table of the worst tokens; the file has all of them."""


def choose_and_start(bench: Bench, cut: Cut, trained: TrainedCut | None) -> None:
    request = visit().request
    offered = request.texts
    evaluated = (request.evaluation, *request.others)

    def label(source: str) -> str:
        fitted = source == request.calibration and source not in evaluated
        return short_name(source) + (" (the repair was fitted on it)" if fitted else "")

    left, right = st.columns([5, 2], vertical_alignment="bottom")
    sources = left.multiselect(
        "Texts",
        offered,
        offered[:2],
        format_func=label,
        key="damage_texts",
        persist_state="session",
        help="Those of the sidebar and the built-in ones. Texts of different kinds show whether "
        "the repair holds beyond the text that it was fitted on.",
    )
    length = bench.evaluation.sequence_length
    tokens = right.number_input(
        "Tokens of each",
        length,
        1_000_000,
        max(length, USUAL_TOKENS),
        length,
        key="damage_tokens",
        persist_state="session",
        help=f"From the beginning of the text, in whole windows of {length:,}.",
    )
    if show_job("damage", request):
        return
    if st.button(
        "Compare the predictions",
        type="primary",
        icon=":material/play_arrow:",
        disabled=not sources,
    ):
        start_damage(cut, sources, int(tokens), trained)
        st.rerun()


def show_texts(texts: list[TextDamage]) -> None:
    frame = texts_frame(texts)
    show(
        texts_chart(texts),
        "damage-chart",
        "the longer the bar, the more the cut changes what the model expects next, whatever the "
        "text says. Bars of uncertainty are 95 % intervals over windows; with a single window "
        "there is none.",
        lambda: frame,
    )


def show_text(text: TextDamage, place: int) -> None:
    share = f"{text.worst_share:.0%}" if math.isfinite(text.worst_share) else "–"
    st.write(
        f"On {plain(describe(text.source))} the worst fifth of the tokens carries **{share}** of "
        f"the damage, which is {text.mean:.3f} nats a token on average."
    )
    windows = max(piece.window for piece in text.pieces) + 1
    window = 1
    if windows > 1:
        window = st.number_input(
            f"Window, of {windows}", 1, windows, key=f"damage-window-{place}", width=200
        )
    st.html(marked_text.damage_scale())
    with st.container(border=True):
        st.html(marked_text.damaged([piece for piece in text.pieces if piece.window == window - 1]))
    st.caption(
        "How to read it: each mark is one token, or the tokens that make one character. The "
        "stronger the colour, the further the pruned model's distribution of this token is from "
        "the dense one's. Hover over a mark for what each model expected there."
    )
    st.subheader("Worst first")
    frame = pieces_frame(text)
    st.dataframe(
        frame.head(WORST_SHOWN),
        hide_index=True,
        column_config={
            **{
                name: st.column_config.NumberColumn(format="%.3f")
                for name in ("damage_nats", "dense_nll", "pruned_nll")
            },
            **{
                f"{model}_probability": st.column_config.NumberColumn(format="percent")
                for model in ("dense", "pruned")
            },
        },
    )
    st.download_button(
        "CSV",
        lambda: frame.to_csv(index=False).encode(),
        "token-damage.csv",
        "text/csv",
        key=f"damage-csv-{place}",
        icon=":material/download:",
        type="tertiary",
        on_click="ignore",
        help="All tokens, the worst first.",
    )


@st.fragment(run_every=1.0 if visit().visitor.unfinished_jobs else None)
def show_run() -> None:
    run: DamageRun | None = last_damage()
    if run is None or not run.texts:
        if run is None or run.job.finished:
            st.info(
                "Nothing is compared yet. If this cut was not measured before, it is made and "
                "measured first.",
                icon=":material/info:",
            )
        return
    texts = list(run.texts)
    st.caption(f"Pruned: {plain(model_in_words(run.cut, run.trained))}")
    show_texts(texts)
    place = 0
    if len(texts) > 1:
        place = st.segmented_control(
            "Text",
            list(range(len(texts))),
            default=0,
            required=True,
            format_func=lambda place: plain(short_name(texts[place].source)),
            key=f"damage_text_{len(texts)}",
        )
    show_text(texts[place], place)


st.title("Token damage")
st.caption(
    "The same text under the dense and the pruned model: each token coloured by how far the two "
    "predictions of it are apart, the Kullback–Leibler divergence in nats."
)
bench, cut, trained = require_cut_or_trained("damage")
choose_and_start(bench, cut, trained)
show_run()
