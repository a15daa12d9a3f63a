"""The dense and the pruned model side by side on the user's own prompt."""

import streamlit as st

from pages.charts.text import counted, plain
from pages.parts import marked_text
from pages.parts.cut_picker import model_in_words, require_cut_or_trained
from pages.parts.progress import show_job
from pages.parts.runtime_picker import choose_runtime, usable
from pages.server.request import Cut
from pages.server.side_by_side import Comparison, last_comparison, start_comparison
from pages.server.visits import visit
from transact_core.data.conversations import has_chat_template
from transact_core.experiments.bench import Bench
from transact_core.experiments.side_by_side import CONTINUATION, DENSE, PRUNED, TEXT
from transact_core.experiments.trained_cut import TrainedCut
from transact_core.forward.generation import Sampling, tokens_per_second
from transact_core.workers.process import worker_threads

PROMPT = "Explain in three sentences why the sky is blue."
MOST_CHARACTERS = 8000
"""Of a prompt."""
TEXTS = {"The dense model's answer": CONTINUATION, "My text": TEXT}
"""What losses are shown of, by label."""


def choose_and_start(bench: Bench, cut: Cut, trained: TrainedCut | None) -> None:
    prompt = st.text_area(
        "Prompt",
        PROMPT,
        max_chars=MOST_CHARACTERS,
        height=110,
        key="prompt",
        persist_state="session",
    )
    columns = st.columns([2, 2, 2, 2], vertical_alignment="bottom")
    has_template = has_chat_template(bench.loaded.tokenizer)
    chat = columns[0].toggle(
        "Chat template",
        value=has_template,
        disabled=not has_template,
        key="chat",
        persist_state="session",
        help="The prompt is written as a user's turn, in the format that this model was tuned for."
        if has_template
        else "This tokenizer has no chat template: the text is continued as it is.",
    )
    count = columns[1].number_input(
        "New tokens, at most", 1, 1024, 96, 16, key="new_tokens", persist_state="session"
    )
    temperature = columns[2].number_input(
        "Temperature",
        0.0,
        2.0,
        0.0,
        0.1,
        key="temperature",
        persist_state="session",
        help="0 always takes the most probable token (greedy decoding); above 0, tokens are "
        "sampled, for both models with the same seed.",
    )
    seed = columns[3].number_input(
        "Seed", 0, 2**31, 0, 1, key="seed", persist_state="session", disabled=temperature == 0
    )
    quantization = choose_runtime("compare")
    ready = usable(quantization)
    if show_job("compare", visit().request):
        return
    if st.button("Run both", type="primary", icon=":material/play_arrow:", disabled=not ready):
        start_comparison(
            cut,
            trained,
            prompt,
            chat and has_template,
            int(count),
            Sampling(temperature=temperature, seed=int(seed)),
            quantization,
        )
        st.rerun()


def show_answers(comparison: Comparison) -> None:
    speeds = {name: tokens_per_second(tokens) for name, tokens in comparison.tokens.items()}
    for column, name in zip(st.columns(2, gap="large"), (DENSE, PRUNED), strict=True):
        tokens = list(comparison.tokens[name])
        with column.container(border=True):
            st.subheader(name.capitalize())
            figures = st.columns(3)
            speed = speeds[name]
            change = (
                f"{speed / speeds[DENSE] - 1:+.0%}"
                if name == PRUNED and speed and speeds[DENSE]
                else None
            )
            figures[0].metric(
                "Tokens/s",
                f"{speed:,.1f}" if speed else "–",
                change,
                help="Without the first new token, which takes the pass over the prompt.",
            )
            figures[1].metric(
                "Prompt",
                f"{1e3 * tokens[0].seconds:,.0f} ms" if tokens else "–",
                help=f"The pass over the {comparison.prompt_tokens or 0:,} tokens of the prompt.",
            )
            figures[2].metric("New tokens", f"{len(tokens):,}")
            st.html(marked_text.plain(comparison.answers[name]))


def show_losses(comparison: Comparison) -> None:
    st.subheader("Where the loss changed")
    offered = [name for name, on in TEXTS.items() if on in comparison.losses]
    which = st.segmented_control(
        "Text",
        offered,
        default=offered[0],
        required=True,
        key="marked_text",
        label_visibility="collapsed",
    )
    text = comparison.losses[TEXTS[which]]
    table = marked_text.losses_of_pieces(
        text.pieces,
        text.losses[DENSE],
        text.losses[PRUNED],
        text.start,
    )
    if table.empty:
        st.caption("This text has no token to score.")
        return
    mean = table["change"].sum() / table["tokens"].sum()
    worse, better = (table["change"] > 1).sum(), (table["change"] < -1).sum()
    st.write(
        f"The pruned model's loss differs by **{mean:+.3f} nats** per token on average; on {worse} "
        f"of {len(table)} marks it is over 1 nat higher, on {better} over 1 nat lower."
    )
    st.html(marked_text.scale())
    with st.container(border=True):
        st.html(marked_text.marked(table))
    st.caption(
        "How to read it: each mark is one token, or the tokens that make one character. On orange "
        "marks the pruned model's loss is higher than the dense one's, on blue ones lower, given "
        "the same text before. Hover over a mark for its numbers; they are in the table as well."
    )
    with st.expander("As a table"):
        st.dataframe(table, hide_index=True)
        st.download_button(
            "CSV",
            table.to_csv(index=False).encode(),
            "losses.csv",
            "text/csv",
            icon=":material/download:",
            type="tertiary",
            on_click="ignore",
        )


def where(comparison: Comparison) -> str:
    kind = comparison.quantization
    return f"in llama.cpp as {kind}," if kind else "in transformers,"


@st.fragment(run_every=0.4 if visit().visitor.unfinished_jobs else None)
def show() -> None:
    comparison = last_comparison()
    if comparison is None:
        st.info(
            "Nothing is generated yet. If this cut was not measured before, the pruned model is "
            "made and measured first.",
            icon=":material/info:",
        )
        return
    if comparison.prompt_tokens is None and comparison.job.finished:
        return
    st.caption(f"Pruned: {plain(model_in_words(comparison.cut, comparison.trained))}")
    show_answers(comparison)
    st.caption(
        f"Both models take turns, token by token, {where(comparison)} on "
        f"{counted(worker_threads(), 'thread')} of this "
        "machine; other jobs wait meanwhile. The Latency page measures with repeats."
    )
    if comparison.losses and comparison.job.finished:
        show_losses(comparison)


st.title("Compare")
st.caption("One prompt, continued by the dense and by the pruned model, side by side.")
bench, cut, trained = require_cut_or_trained("compare")
choose_and_start(bench, cut, trained)
show()
