"""The formulas of the method page, and the papers that they come from."""

from dataclasses import dataclass

MEAN_AND_MAX = r"s_h = \operatorname{mean}_{j \in h} s_j + \tfrac{10}{d} \max_{j \in h} s_j"
WRITTEN = r"\lVert W_{:,j}\rVert"


@dataclass(frozen=True)
class Importance:
    channel: str
    """LaTeX, how the score s_j of channel j comes about."""
    head: str
    """LaTeX, and the score s_h of head h."""
    sources: tuple[str, ...] = ()
    """Keys of `SOURCES`."""
    note: str = ""


FORMULAS = {
    "activation": Importance(
        r"s_j = \sqrt{\textstyle\sum_t a_{tj}^2}",
        MEAN_AND_MAX,
        ("2407.05690",),
        "The score of the method.",
    ),
    "reconstruction": Importance(
        r"j^\ast = \arg\min_j \frac{" + WRITTEN + r"^2}{[P]_{jj}}, \quad "
        r"P = \bigl(\textstyle\sum_t w_t\, a_t a_t^{\!\top} + D\bigr)^{-1}",
        r"s_h = \operatorname{tr}\bigl(W_h\, P_{hh}^{-1}\, W_h^{\!\top}\bigr)",
        ("1993", "2208.11580", "2302.04089"),
        "Backward elimination (OBS pruning): the channel whose removal costs least is removed, $W$ "
        "and $P$ are updated, and so on; a channel's score is its place in that order. A head's "
        "score is what its removal cost. $D$ is damping, $w_t$ the square of the weight that the "
        "repair below gives a token.",
    ),
    "activation-weight": Importance(
        r"s_j = " + WRITTEN + r"\,\sqrt{\textstyle\sum_t a_{tj}^2}",
        MEAN_AND_MAX,
        ("2306.11695",),
        "With the norm of a column in place of a score for each weight.",
    ),
    "fluctuation": Importance(
        r"s_j = " + WRITTEN + r"^2\,\tfrac{1}{T-1}\textstyle\sum_t (a_{tj}-\bar a_j)^2",
        r"s_h = \operatorname{mean}_{j \in h} s_j",
        ("2312.11983",),
        "Without the standardisation of the source, which does not change the order in a module.",
    ),
    "taylor": Importance(
        r"s_j = \textstyle\sum_{w\in\Omega_j} \bigl|w\,\partial L/\partial w\bigr|",
        MEAN_AND_MAX,
        ("2305.11627", "2407.05690"),
        "$L$ is the summed loss of the next tokens. A group's heads share rows of K and V equally.",
    ),
    "magnitude": Importance(
        r"s_j = \sqrt{\textstyle\sum_{w\in\Omega_j} w^2}",
        MEAN_AND_MAX,
        ("1608.08710",),
        "With the L2 norm.",
    ),
    "random": Importance(
        r"s_j \sim \mathcal{U}[0, 1)",
        r"s_h \sim \mathcal{U}[0, 1)",
        note="No source: a random baseline.",
    ),
}
"""By the name that an importance is registered under."""

SOURCES = {
    "2407.05690": "Shen et al. 2024. *Pruning Large Language Models to Intra-module Low-rank "
    "Architecture with Transitional Activations* (TransAct). Findings of ACL.",
    "2306.11695": "Sun et al. 2023. *A Simple and Effective Pruning Approach for Large Language "
    "Models* (Wanda).",
    "2312.11983": "An et al. 2024. *Fluctuation-based Adaptive Structured Pruning for Large "
    "Language Models* (FLAP). AAAI.",
    "2305.11627": "Ma et al. 2023. *LLM-Pruner: On the Structural Pruning of Large Language "
    "Models*. NeurIPS.",
    "1608.08710": "Li et al. 2017. *Pruning Filters for Efficient ConvNets*. ICLR.",
    "1606.06031": "Paperno et al. 2016. *The LAMBADA dataset: Word prediction requiring a broad "
    "discourse context*. ACL.",
    "1503.02531": "Hinton, Vinyals & Dean 2015. *Distilling the Knowledge in a Neural Network*.",
    "2305.17888": "Liu et al. 2023. *LLM-QAT: Data-Free Quantization Aware Training for Large "
    "Language Models*.",
    "1993": "Hassibi & Stork 1993. *Second order derivatives for network pruning: Optimal Brain "
    "Surgeon*. Advances in Neural Information Processing Systems 5.",
    "2208.11580": "Frantar & Alistarh 2022. *Optimal Brain Compression: A Framework for Accurate "
    "Post-Training Quantization and Pruning*. NeurIPS.",
    "2302.04089": "Kurtic, Frantar & Alistarh 2023. *ZipLM: Inference-Aware Structured Pruning of "
    "Language Models*. NeurIPS.",
    "2403.07378": "Wang et al. 2024. *SVD-LLM: Truncation-aware Singular Value Decomposition for "
    "Large Language Model Compression*.",
}
"""By arXiv number, or by year where there is none."""


def cited(key: str) -> str:
    """A source in short, with its address where it has one."""
    authors = SOURCES[key].partition(". *")[0]
    return f"[{authors}]({address(key)})" if "." in key else authors


def address(key: str) -> str:
    return f"https://arxiv.org/abs/{key}"
