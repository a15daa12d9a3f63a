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
from transact_core.pruning.plan import WIDTHS, PruningPlan, plan_of_layers

WINDOWS_A_KIND = 2
"""Held-out windows of each kind of text."""
WINDOW_TOKENS = 256
"""Tokens of a held-out window at most."""
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
    geometric mean over kinds of text."""
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
    layers = architecture.num_hidden_layers
    wrong = [layer for layer in choices.keep_layers if not 0 <= layer < layers]
    if wrong:
        raise TransActError(
            f"There is no layer {wrong[0]} to be kept whole; the model's layers are 0 to "
            f"{layers - 1}."
        )
    if len(set(choices.keep_layers)) == layers and (mha_ratio or mlp_ratio):
        raise TransActError("All layers are to be kept whole, so that nothing can be cut.")


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
    fitted_on = _some(bench.calibration)
    orders = kept_first(scores, architecture)
    by_module = {"mha": orders["mha"][uniform.granularity], "mlp": orders["mlp"]["mlp"]}
    singles = {
        name: _alone(bench, held_out, fitted_on, by_module[name], name, table, choices, progress)
        for name in table.modules
    }
    table = table.priced(_by_kind(held_out, singles))
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
        cut, _ = repaired_cut(dense, plan, fitted_on, choices.recovery, dense.dtype, report)
        divergence, parts = marginal_losses(bench.loaded.model, cut, held_out, report)
        # Kinds of text count the same, on whichever of them a cut loses more.
        tried[layers] = math.exp(float(held_out.by_kind(divergence).log().mean()))
        table = table.repriced(_by_kind(held_out, parts), layers)
    best = min(tried, key=tried.get)
    return Allocated(
        plan_of_layers(uniform, scores, best, architecture),
        tuple(tried.values()),
        time.perf_counter() - start,
    )


def _alone(
    bench: Bench,
    held_out: HeldOut,
    fitted_on: Windows,
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
        f"seed {bench.seed}, {choices.recovery}, ridge {RIDGE}, {fitted_on.tokens} tokens, on "
        f"{sha256_of_tokens(held_out.windows.ids)}, every {SCORED_EVERY}"
    )

    def measure() -> dict[str, torch.Tensor]:
        model = bench.loaded.model
        return {
            "losses": single_losses(
                model, fitted_on, held_out, module, order, levels, choices.recovery, progress
            )
        }

    return bench.remember(what, measure)["losses"]


def _some(windows: Windows) -> Windows:
    """Every other window where there are many."""
    if len(windows) < MANY_WINDOWS:
        return windows
    return replace(windows, ids=windows.ids[::2])


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
