"""A width of its own for each layer: prices measured on held-out text, and the widths they make.

Each ratio still says how much is removed in all; the layers share it by what their cuts do to the
model's predictions (`planning.prices`) and by the error that each width makes (`planning.damage`),
for the least sum (`planning.allocation`). At high ratios cuts of several layers do not add up, so
the cut is then made on trial, its divergence is divided among its modules, and the widths are
chosen once more by that. Of the cuts that were tried, the one of the least divergence is taken.

Held-out windows are of more than one kind of text, since widths that are chosen on one kind alone
are worse on others. None of their tokens calibrates or judges the cut.
"""

import math
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import numpy as np
import torch

from transact_core.base.cache import sha256_of_tokens
from transact_core.base.errors import Progress, TransActError, silent
from transact_core.data.corpus import BUILTIN_TEXTS, read_corpus
from transact_core.data.windows import Windows, count_used, evaluation_windows
from transact_core.experiments.bench import Bench, Choices, require_memory
from transact_core.forward.writing import written_texts
from transact_core.models.architecture import Architecture, LayerWidths
from transact_core.planning.allocation import LossLaw, weights_of_kinds
from transact_core.planning.damage import kept_first
from transact_core.planning.prices import (
    RIDGE,
    SCORED_EVERY,
    HeldOut,
    marginal_losses,
    single_losses,
)
from transact_core.planning.width_table import WidthTable
from transact_core.pruning.on_disk import repaired_cut
from transact_core.pruning.plan import (
    WIDTHS,
    ByHand,
    PruningPlan,
    Widths,
    head_counts,
    layer_channel_counts,
    plan_of_layers,
    removed_by_hand,
    widths,
    widths_of_layer,
)

WINDOWS_A_KIND = 2
"""Held-out windows of each kind of text."""
WINDOW_TOKENS = 256
"""Tokens of a held-out window at most."""
KINDS_OF_TEXT = 1 + len(BUILTIN_TEXTS)
"""The calibration text and the built-in ones; one less where it is one of them."""
ALL_TOKENS = 1 << 30
"""More than any text has."""
TRIALS = 2
"""Cuts that are made on trial, each by what the one before has taught."""
MANY_WINDOWS = 16
"""With so many calibration windows, prices and trial cuts are repaired on every other one, which
halves the time."""


@dataclass(frozen=True)
class Allocated:
    """The plan that was chosen, and how."""

    plan: PruningPlan
    divergences: tuple[float, ...]
    """Of each trial cut from the dense model on the held-out windows, in nats a token: the
    geometric mean over kinds of text, by their weights."""
    seconds: float
    """How long choosing took, without what was known already and without the cut itself."""


def require_allocatable(
    architecture: Architecture, mha_ratio: float, mlp_ratio: float, choices: Choices
) -> None:
    """Refuses choices with which widths of their own cannot be given to layers.

    Raises:
        TransActError: another choice prevents it; the sentence names that choice.
    """
    if choices.widths not in WIDTHS:
        raise TransActError(
            f"The widths {choices.widths!r} are not known; choose {', '.join(WIDTHS)}."
        )
    if choices.by_hand and choices.widths != "by-hand":
        raise TransActError(
            "Widths of single layers are named where the widths are by-hand; choose that, or name "
            "none."
        )
    if choices.widths == "uniform":
        if choices.keep_layers:
            raise TransActError(
                "Layers are kept whole where the widths are allocated or traded; choose one of "
                "these, or keep no layers."
            )
        return
    if choices.granularity == "head-dims":
        raise TransActError(
            "The heads of all layers have the same dimensions, so head-dims cannot be cut to "
            "widths of their own; choose query-heads or kv-groups, or the widths uniform."
        )
    if choices.steps > 1:
        raise TransActError(
            "Widths are allocated in one step; leave out the steps, or choose the widths uniform."
        )
    if choices.widths == "by-hand":
        _require_by_hand(architecture, choices)
        return
    layers = architecture.num_hidden_layers
    wrong = [layer for layer in choices.keep_layers if not 0 <= layer < layers]
    if wrong:
        raise TransActError(
            f"There is no layer {wrong[0]} to be kept whole; the model's layers are 0 to "
            f"{layers - 1}."
        )
    if len(set(choices.keep_layers)) == layers and (mha_ratio or mlp_ratio):
        raise TransActError("All layers are to be kept whole, so that nothing can be cut.")


def _require_by_hand(architecture: Architecture, choices: Choices) -> None:
    if choices.keep_layers:
        raise TransActError(
            "Layers are kept whole where the widths are allocated or traded; widths by hand name "
            "the dense width for such a layer."
        )
    if choices.granularity == "auto":
        raise TransActError(
            "Widths by hand count the heads that a granularity leaves; choose query-heads or "
            "kv-groups in place of auto."
        )
    layers = architecture.num_hidden_layers
    if len(choices.by_hand) != layers:
        raise TransActError(
            f"Widths by hand are named for {len(choices.by_hand)} layers, where the model has "
            f"{layers}."
        )
    heads = head_counts(architecture, choices.granularity)
    dense = architecture.intermediate_size
    channels = layer_channel_counts(architecture, choices.multiple_of)
    for layer, (kept_heads, kept_channels) in enumerate(choices.by_hand):
        if kept_heads not in heads:
            raise TransActError(
                f"Layer {layer} cannot keep {kept_heads} query heads by {choices.granularity}; "
                f"possible are {', '.join(map(str, heads))}."
            )
        if kept_channels not in channels:
            raise TransActError(
                f"Layer {layer} cannot keep {kept_channels:,} channels; possible are multiples of "
                f"{choices.multiple_of} up to {dense:,}, and all of them."
            )


def plan_by_hand(bench: Bench, choices: Choices, progress: Progress = silent) -> PruningPlan:
    """The plan of widths that are named for each layer; its ratios are what these amount to.

    Raises:
        TransActError: as `require_allocatable` does.
    """
    architecture = bench.loaded.architecture
    require_allocatable(architecture, 0.0, 0.0, choices)
    layers = [
        widths_of_layer(architecture, choices.granularity, heads, channels)
        for heads, channels in choices.by_hand
    ]
    uniform = bench.plan(*removed_by_hand(choices.by_hand, architecture), choices, progress)
    scores = bench.scores(choices.importance, progress)
    return plan_of_layers(uniform, scores, layers, architecture)


def allocated_plan(
    bench: Bench,
    mha_ratio: float,
    mlp_ratio: float,
    choices: Choices,
    progress: Progress = silent,
) -> Allocated:
    """The plan for these ratios and choices, with widths of its own for each layer.

    Raises:
        TransActError: as `require_allocatable` does, or the layers that are kept whole leave too
            little to be cut elsewhere.
    """
    architecture = bench.loaded.architecture
    require_allocatable(architecture, mha_ratio, mlp_ratio, choices)
    uniform = bench.plan(mha_ratio, mlp_ratio, choices, progress)
    if not uniform.cuts_anything(architecture):
        return Allocated(uniform, (), 0.0)
    scores = bench.scores(choices.importance, progress)
    start = time.perf_counter()
    table = WidthTable.of(
        architecture,
        uniform.widths,
        {"mha": mha_ratio, "mlp": mlp_ratio},
        uniform.granularity,
        choices.multiple_of,
        bench.damage(choices, progress),
        choices.widths == "traded",
        choices.keep_layers,
    )
    table.layer_widths()  # refuses what does not fit before anything is priced
    held_out = HeldOut.of(bench.loaded.model, *price_windows(bench, progress))
    table = _priced(bench, table, held_out, choices, progress)
    windows, weights = fitted_on(bench.calibration), _weights(bench, held_out)
    tried: dict[tuple[LayerWidths, ...], float] = {}
    for trial in range(TRIALS):
        layers = table.layer_widths()
        if layers in tried:
            break

        def report(stage: str, done: int, total: int, trial: int = trial) -> None:
            progress(f"Trial cut {trial + 1}: {stage.lower()}", done, total)

        plan = plan_of_layers(uniform, scores, layers, architecture)
        require_memory(bench, plan, choices.recovery)
        dense = bench.loaded.model
        cut, _ = repaired_cut(dense, plan, windows, choices.recovery, dense.dtype, report)
        divergence, parts = marginal_losses(bench.loaded.model, cut, held_out, report)
        # On a logarithmic scale, so that no kind on which every cut loses much decides alone.
        tried[layers] = math.exp(weights @ held_out.by_kind(divergence).log().numpy())
        table = table.repriced(_by_kind(held_out, parts), layers, weights)
    best = min(tried, key=tried.get)
    return Allocated(
        plan_of_layers(uniform, scores, best, architecture),
        tuple(tried.values()),
        time.perf_counter() - start,
    )


def _priced(
    bench: Bench, table: WidthTable, held_out: HeldOut, choices: Choices, progress: Progress
) -> WidthTable:
    """With what each layer's module loses when it alone is cut."""
    orders = kept_first(bench.scores(choices.importance, progress), table.architecture)
    by_module = {"mha": orders["mha"][table.granularity], "mlp": orders["mlp"]["mlp"]}
    windows = fitted_on(bench.calibration)
    singles = {
        name: _alone(bench, held_out, windows, by_module[name], name, table, choices, progress)
        for name in table.modules
    }
    return table.priced(_by_kind(held_out, singles), _weights(bench, held_out))


def _weights(bench: Bench, held_out: HeldOut) -> np.ndarray:
    return weights_of_kinds(list(dict.fromkeys(held_out.kinds)), bench.calibration.source)


# --- what every width would lose, before one is chosen ---------------------------------------

Laws = dict[str, tuple[LossLaw, ...]]
"""From the error of each layer's module to the nats that it loses, by "mha" and "mlp"."""


def loss_laws(bench: Bench, choices: Choices, progress: Progress = silent) -> Laws:
    """What the cuts of each layer's modules do to the predictions, each made alone.

    They serve all ratios and multiples; `choices` must name a granularity that removes heads.
    """
    architecture = bench.loaded.architecture
    dense = Widths(
        architecture.num_attention_heads,
        architecture.num_key_value_heads,
        architecture.intermediate_size,
    )
    table = WidthTable.of(
        architecture,
        dense,
        {"mha": 1.0, "mlp": 1.0},
        choices.granularity,
        1,
        bench.damage(choices, progress),
        traded=False,
    )
    held_out = HeldOut.of(bench.loaded.model, *price_windows(bench, progress))
    priced = _priced(bench, table, held_out, choices, progress)
    return {name: module.laws for name, module in priced.modules.items()}


def filled(
    bench: Bench,
    mha_ratio: float,
    mlp_ratio: float,
    choices: Choices,
    laws: Laws,
    fixed: Mapping[str, Mapping[int, int]],
    progress: Progress = silent,
) -> ByHand:
    """The widths of least loss where some are fixed and each ratio is its module's mean.

    `laws` are those of `loss_laws`, and `fixed` the numbers of heads and of channels of layers, by
    "mha" and "mlp". It is the allocator's first choice: no cut is made on trial.

    Raises:
        TransActError: what is fixed leaves too little to be cut elsewhere.
    """
    architecture = bench.loaded.architecture
    table = WidthTable.of(
        architecture,
        widths(architecture, mha_ratio, mlp_ratio, choices.granularity, choices.multiple_of),
        {"mha": mha_ratio, "mlp": mlp_ratio},
        choices.granularity,
        choices.multiple_of,
        bench.damage(choices, progress),
        traded=False,
        fixed=fixed,
    )
    return tuple(
        (layer.num_attention_heads, layer.intermediate_size)
        for layer in table.with_laws(laws).layer_widths()
    )


def _alone(
    bench: Bench,
    held_out: HeldOut,
    windows: Windows,
    order: torch.Tensor,
    module: str,
    table: WidthTable,
    choices: Choices,
    progress: Progress,
) -> torch.Tensor:
    """What each layer's module loses when it alone is cut, from the cache if known."""
    levels = table.modules[module].waist[table.modules[module].levels()].tolist()
    what = (
        f"what {module} alone loses at {levels} by {choices.importance}, {table.granularity}, "
        f"seed {bench.seed}, {choices.recovery}, ridge {RIDGE}, {windows.tokens} tokens, on "
        f"{sha256_of_tokens(held_out.windows.ids)}, every {SCORED_EVERY}"
    )

    def measure() -> dict[str, torch.Tensor]:
        model = bench.loaded.model
        return {
            "losses": single_losses(
                model, windows, held_out, module, order, levels, choices.recovery, progress
            )
        }

    return bench.remember(what, measure)["losses"]


def fitted_on(calibration: Windows) -> Windows:
    """What prices and trial cuts are repaired on: every other window where there are many."""
    if len(calibration) < MANY_WINDOWS:
        return calibration
    return replace(calibration, ids=calibration.ids[::2])


def _by_kind(held_out: HeldOut, of_windows: Mapping[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """Means over the windows of each kind of text, by module."""
    return {name: held_out.by_kind(losses).numpy() for name, losses in of_windows.items()}


# --- held-out windows ------------------------------------------------------------------------


def price_windows(bench: Bench, progress: Progress = silent) -> tuple[Windows, tuple[str, ...]]:
    """Held-out windows, and the kind of text of each: its source.

    They are drawn, by the bench's seed, from what neither calibrates nor judges a cut: of the
    built-in texts, and of the calibration text.
    """
    used: dict[str, int] = {}
    for windows in (*bench.evaluated, bench.calibration):
        count_used(used, windows)
    generator = torch.Generator().manual_seed(bench.seed)
    length = min(WINDOW_TOKENS, bench.calibration.sequence_length)
    drawn, kinds = [], []
    for source in dict.fromkeys([bench.calibration.source, *BUILTIN_TEXTS]):
        # A text of which nothing is left, or that cannot be read again, is left out.
        with suppress(TransActError):
            (corpus,) = written_texts([read_corpus(source)], bench.loaded, progress)
            rest = evaluation_windows(
                corpus,
                bench.loaded.tokenizer,
                bench.loaded.architecture.vocab_size,
                ALL_TOKENS,
                length,
                used=used,
            )
            places = torch.randperm(len(rest), generator=generator)[:WINDOWS_A_KIND]
            drawn.append(rest.ids[places.sort().values])
            kinds += [source] * len(places)
    ids = torch.cat(drawn)
    return Windows(source="+".join(dict.fromkeys(kinds)), sha256="", ids=ids), tuple(kinds)
