"""The method on one page: formulas, their sources, and where this app differs from the paper."""

from importlib import import_module
from inspect import getdoc

import streamlit as st

from pages.charts import waist_chart
from pages.parts.example import example
from pages.parts.figure import show
from pages.parts.formulas import FORMULAS, SOURCES, address, cited
from pages.parts.help_texts import GRANULARITY_HELP, measures
from pages.parts.navigation import link
from pages.server.request import Request
from pages.server.visits import visit
from transact_core import ROOMS
from transact_core.importance.scores import IMPORTANCES
from transact_core.models.families.allowed import table
from transact_core.models.families.table import FAMILIES
from transact_core.pruning.closed_form import FOLDS, RIDGES

PAPER = "2407.05690"
"""arXiv identifier of the method's paper."""
LINE_WIDTH = 860
"""Pixels; longer lines are hard to read."""


def computed_by(*modules: str) -> None:
    names = ", ".join(f"`{name}.py`" for name in modules)
    st.caption(f"Computed by {names} in `transact_core/`.")


def show_idea() -> None:
    recorded = example()
    st.subheader("The idea", anchor="idea")
    st.markdown(
        "A decoder layer has two modules, attention (MHA) and the MLP. Each reads the residual "
        "stream $x$ and adds to it what it writes:"
    )
    st.latex(
        r"x \leftarrow x + W_O\, a^{\mathrm{MHA}}, \qquad a^{\mathrm{MHA}} = \bigl[\,\operatorname{"
        r"softmax}\bigl(q_h k_h^{\!\top}/\sqrt d\,\bigr)\, v_h\,\bigr]_{h = 1 \ldots H}"
    )
    st.latex(
        r"x \leftarrow x + W_{\mathrm{down}}\, a^{\mathrm{MLP}}, \qquad a^{\mathrm{MLP}} = "
        r"\operatorname{silu}(W_{\mathrm{gate}}\,\hat x) \odot W_{\mathrm{up}}\,\hat x"
    )
    st.markdown(
        r"$\hat x$ is the normalised stream, $q, k, v$ are made from it, with rotary positions in "
        r"$q$ and $k$. The vector $a$ that the output projection reads is the **transitional "
        "activation**, the module's waist. Without its channel $j$, a row goes of every matrix "
        "that makes it and a column of the one that reads it, and nothing else changes: what comes "
        "out is an ordinary, narrower model. The stream between the modules, the norms and the "
        "embeddings are left whole, because the paper finds that disturbances there cost most."
    )
    show(
        waist_chart.section(
            recorded.architecture,
            recorded.left,
            "Width goes at the two waists; the residual stream stays whole",
            400,
        ),
        "method-section",
        f"one layer of {recorded.name} from left to right, all widths to scale, cut as in the "
        "worked example of the first page; the removed width is grey.",
    )
    st.markdown(
        "| module | transitional activation | its width | removed with channel $j$ |\n"
        "| --- | --- | --- | --- |\n"
        "| MHA | head outputs, the input of `o_proj` | heads × head_dim | row $j$ of Q, K, V; "
        "column $j$ of O |\n"
        "| MLP | silu(gate) · up, the input of `down_proj` | `intermediate_size` | row $j$ of gate "
        "and up; column $j$ of down |"
    )
    computed_by("forward/statistics", "pruning/surgery", "experiments/premise")
    with st.container(horizontal=True, gap="medium"):
        for name in ("start", "premise", "activations"):
            link(name)


def show_importances() -> None:
    st.subheader("Which units are removed first: importance", anchor="importance")
    st.markdown(
        "Over the $T$ tokens $t$ of the calibration text each channel $j$ gets a score $s_j$ and "
        "each head $h$ a score $s_h$; low scores go first. $a_{tj}$ is the transitional "
        r"activation, $W$ the output projection, $\Omega_j$ the weights that go with channel $j$, "
        "$d$ the head_dim. Scores are compared "
        "within one module of one layer, never across layers: every layer keeps the same widths "
        "and chooses its own units."
    )
    computed_by("importance/scores", "importance/elimination", "importance/gradients")
    for name in IMPORTANCES:
        with st.container(border=True):
            show_importance(name)


def show_importance(name: str) -> None:
    st.markdown(f"**`{name}`**: {measures(name)}")
    formula = FORMULAS.get(name)
    if formula is None:
        st.text(getdoc(IMPORTANCES[name]) or "")
        return
    st.latex(rf"{formula.channel} \qquad {formula.head}")
    sources = ", ".join(map(cited, formula.sources))
    st.caption(" ".join(filter(None, (formula.note, sources and f"Source: {sources}."))))


def show_widths() -> None:
    st.subheader("What a ratio removes: granularity and steps", anchor="widths")
    st.markdown(
        "A ratio is the share of a waist that is removed. The nearest possible width is taken, the "
        "wider one on a tie, and a module whose ratio is 0 is not changed. " + GRANULARITY_HELP
    )
    st.markdown(
        "Narrower heads lose whole rotary pairs of queries and keys. A pair's worth is its effect "
        r"on attention: with $\ell^p_{qk}$ its share of the logit and $\alpha_{qk}$ the attention "
        "weights,"
    )
    st.latex(
        r"e_p = \sum_{q} \sum_{k} \alpha_{qk}\,\Bigl(\ell^p_{qk} - \textstyle\sum_{k'} "
        r"\alpha_{qk'}\,\ell^p_{qk'}\Bigr)^{2}"
    )
    st.markdown(
        "which grows as the second-order Kullback-Leibler divergence of the softmax without the "
        "pair. All heads share one set of frequencies, and each head assigns its own best pairs to "
        "them. Values get the basis that preserves most of the module's output, a truncated "
        f"singular value decomposition in the metric of the activations ({cited('2403.07378')})."
    )
    st.markdown(
        "In $K$ steps, units are scored anew on the model as pruned so far; with $r$ steps left, "
        r"the width goes from $c$ to $c - \lfloor (c - t) / r \rfloor$ on its way to the target "
        f"$t$, as in the paper ({cited(PAPER)})."
    )
    computed_by(
        "pruning/plan", "importance/rotary_pairs", "pruning/narrow_heads", "experiments/decide"
    )


def show_repair() -> None:
    st.subheader("The remaining weights are repaired: recovery", anchor="recovery")
    st.markdown(
        "Layer by layer, on the stream $x$ of the model as pruned so far. With $y_t$ what the "
        "dense module would write on that stream and $a'_t$ the transitional activation that is "
        "left, `least-squares` adds to the output projection $W'$ the change"
    )
    st.latex(
        r"\Delta = \arg\min_{\Delta} \sum_t w_t\,\bigl\lVert y_t - (W' + \Delta)\, a'_t "
        r"\bigr\rVert^2 + \rho \sum_j h_j\,\bigl\lVert \Delta_{:,j} \bigr\rVert^2, \qquad "
        r"w_t = \frac{1}{\sqrt{\operatorname{mean}_i\,(x_t + y_t)_i^2 + \varepsilon}}"
    )
    st.markdown(
        r"$w_t$ is one over what the next RMSNorm divides by, so that a few tokens of enormous "
        r"norm do not decide alone; $h_j = \sum_t w_t\, a'^{\,2}_{tj}$, a little raised, so that "
        r"loud and quiet channels shrink alike. `bias` is the same with a constant 1 in place of "
        r"$a'$. "
        rf"The ridge $\rho$ is one of {', '.join(f'{ridge:g}' for ridge in RIDGES)}, chosen by "
        f"cross-fitting: the calibration windows are split into {FOLDS} folds, and the error on "
        "each fold is that of repairs fitted on the other folds. Where no repair lowers that "
        "error, the weights stay as cut. No step of this follows a gradient."
    )
    computed_by("pruning/closed_form", "pruning/ridge", "pruning/narrow_heads", "forward/stream")


def show_training() -> None:
    st.subheader("What the repair leaves lost is trained back", anchor="training")
    st.markdown(
        "The Recover page and the command `tune` train a cut so that its distribution $q_t$ of the "
        f"next token comes nearer to the dense model's $p_t$ ({cited('1503.02531')}, at "
        "temperature 1), on text that has calibrated and judged nothing:"
    )
    st.latex(r"L = \frac1N \sum_t \sum_v p_t(v)\, \log \frac{p_t(v)}{q_t(v)}")
    st.markdown(
        "Held-out parts of several texts are watched; the weights with the lowest mean divergence "
        "over all of them are kept, and where nothing got better, the cut comes back as it was. "
        "Wherever a text is chosen, it may be one that the dense model writes itself, from random "
        f"first tokens, after {cited('2305.17888')}."
    )
    computed_by("training/objective", "training/loop", "forward/writing")


def show_measuring() -> None:
    st.subheader("What a cut costs, and how certain that is", anchor="cost")
    st.markdown(
        "Parameters, bytes and FLOPs follow from the widths exactly. Perplexity is measured on "
        "held-out text; each window is scored alone, and its first token is not scored:"
    )
    st.latex(
        r"\mathrm{PPL} = \exp\Bigl(\tfrac1N \textstyle\sum_n -\log p(x_n \mid x_{<n})\Bigr), "
        r"\qquad \frac{\mathrm{PPL}_{\mathrm{pruned}}}{\mathrm{PPL}_{\mathrm{dense}}} = "
        r"e^{\,\bar\delta\, \pm\, 1.96\, s/\sqrt{n}}"
    )
    st.markdown(
        r"$\bar\delta$ is the mean over the $n$ windows of the difference in loss from the dense "
        "model on the same tokens, and $s$ its standard deviation over windows: the interval "
        "covers the choice of windows, not other texts, on which a repair that was fitted to one "
        "kind may cost far more. Before a cut is measured, its loss is "
        "predicted from $m$ and $p$, the relative errors of the outputs of MHA and MLP, averaged "
        "over layers,"
    )
    st.latex(
        r"\bar\delta \approx (u^g + v^g)^{1/g}, \qquad u = A\,(m/0.1)^{\alpha}, \quad "
        r"v = B\,(p/0.1)^{\beta}"
    )
    st.markdown(
        "with five positive parameters, whose prior was measured on the built-in model and which "
        "are fitted to every measured point; a Gaussian process models the residuals of this law. "
        "This part is ours, not the paper's."
    )
    st.markdown(
        "As a GGUF file in llama.cpp, a model is measured by the same formula, from llama.cpp's "
        "own logits; times there are ratios to the dense F16 file, which takes turns with it. What "
        "a file weighs follows from the widths and the rules of its type, to the byte."
    )
    computed_by(
        "models/footprint",
        "forward/perplexity",
        "forward/in_llama_cpp",
        "export/gguf_types",
        "planning/damage",
        "planning/law",
    )


def show_tasks() -> None:
    st.subheader("What a cut costs in tasks, and where in a text", anchor="tasks")
    st.markdown(
        "Tasks are the stock ones of EleutherAI's lm-evaluation-harness, with their prompts and "
        "metrics: the answer with the largest $\\log p(\\text{answer} \\mid \\text{question})$ is "
        "taken, for `acc_norm` after a division by the answer's number of characters. Both models "
        "answer the same $n$ questions, so the difference of accuracies is paired, with $d_i$ the "
        "difference on question $i$ and $s_d$ the standard deviation of these:"
    )
    st.latex(
        r"\bar d = \tfrac1n \textstyle\sum_i d_i, \qquad \operatorname{se}(\bar d) = s_d / \sqrt{n}"
    )
    st.markdown(
        "An accuracy that is not above guessing by two standard errors is said to be at chance. "
        "Tasks from one's own text need no data set: which of four continuations is the true one, "
        f"and what is the last word of a sentence, as LAMBADA asks ({cited('1606.06031')}). The "
        "damage to a token is the divergence of the pruned model's distribution $q$ of the next "
        "token from the dense model's $p$, whatever the text says next:"
    )
    st.latex(r"D_t = \sum_v p_t(v)\, \log \frac{p_t(v)}{q_t(v)}")
    computed_by(
        "experiments/tasks", "forward/continuations", "data/own_text", "forward/token_damage"
    )
    with st.container(horizontal=True, gap="medium"):
        for name in ("tasks", "damage"):
            link(name)


def show_differences() -> None:
    usual = Request()
    st.subheader("Where this differs from the paper", anchor="differences")
    st.markdown(
        f"| | paper ({cited(PAPER)}) | here |\n"
        "| --- | --- | --- |\n"
        "| after the cut | training on plain text, between steps too | repair in closed form on "
        "the calibration text, no training |\n"
        "| steps | 8 by default | 1 by default, as many as asked for |\n"
        "| calibration | 128 samples of 4,096 tokens of RedPajama | "
        f"{usual.calibration_tokens:,} tokens by default, of any text |\n"
        "| score | norm of the transitional activation; Taylor in an ablation | the same, and "
        f"{len(IMPORTANCES) - 2} others |\n"
        "| number of heads | target over head_dim, rounded up | the nearest that whole "
        "groups allow |\n"
        "| grouped queries | not implemented in the published code | the same number of queries "
        "from every group, or whole groups |\n"
        "| narrower heads | the best dims of each head; new rotary frequencies | whole "
        "rotary pairs, with the original frequencies |\n"
        "| result | model classes of its own | the model's own stock class, or another stock "
        "class that computes the same |"
    )


def show_families() -> None:
    st.subheader("Which models, and what each allows", anchor="families")
    st.markdown(
        "Whole query heads, whole key-value groups and channels of the MLP can be removed from a "
        "model of any of these families, by every importance and with the recovery "
        "`least-squares`; sliding windows, layers without rotary embedding, norms and factors stay "
        "as they are. Where a norm stands behind the modules, as in Gemma 3, a repair is fitted "
        "before it and judged behind it. The rest is allowed where it is exact, and refused by "
        "name where it is not. "
        "Narrower heads are fitted on whole windows of text, so they also need a sliding window "
        "that is no shorter than those."
    )
    st.markdown(table(list(FAMILIES.values())))


def rooms() -> dict[str, str]:
    """The sub-packages of the library by name, and what each is for in one sentence."""
    return {
        name: (import_module(f"transact_core.{name}").__doc__ or "").strip().partition("\n")[0]
        for name in ROOMS
    }


def show_rooms() -> None:
    st.subheader("Where each part of the code is", anchor="modules")
    st.markdown(
        "`transact_core` has a sub-package for each job, and each file begins with what it does."
    )
    with st.expander("The sub-packages, in the order in which data flows through them"):
        st.markdown(
            "| sub-package | |\n| --- | --- |\n"
            + "\n".join(f"| `{name}` | {what} |" for name, what in rooms().items())
        )


def show_sources() -> None:
    st.subheader("Sources", anchor="sources")
    st.markdown(
        "\n".join(
            f"- {words}" + (f" [arXiv {key}]({address(key)})" if "." in key else "")
            for key, words in SOURCES.items()
        )
    )


# First of all: where this file was run alone, the visitor is led to app.py.
visit()
st.title("Method")
with st.container(width=LINE_WIDTH):
    st.markdown(
        f"What is computed here, with formulas and sources. The method is TransAct "
        f"({cited(PAPER)}); where this app differs from it, the text says so."
    )
    show_idea()
    show_importances()
    show_widths()
    show_repair()
    show_training()
    show_measuring()
    show_tasks()
    show_differences()
    show_families()
    show_rooms()
    show_sources()
