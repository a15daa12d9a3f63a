"""Closed-form repair after the cut; no training.

Layer by layer, the residual stream of the model as pruned so far runs over the calibration windows.
At each cut module, the output of the dense module on that same stream is the target, and the pruned
module is repaired to match it: by a bias (the mean of the missing output) or by fitting its output
projection again (`least-squares`). Each later layer sees the repaired ones before it.

In-sample error is optimistic, and it compounds over layers: a stream that has run through repairs
fitted on its own windows is better than it will be on other text, and misleads the repairs of later
layers. So repairs are cross-fitted. The windows are divided into eight folds, and each fold's
stream runs through repairs that were fitted on the other folds only: every error, every choice of a
ridge and every later layer is judged on text that is held out from the repairs before it. The
repair that is written into the model is then fitted on all windows.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import nn
from transformers import LlamaForCausalLM

from transact_core.base.errors import Progress, TransActError, silent
from transact_core.base.linalg import inverse_rms
from transact_core.data.windows import Windows
from transact_core.forward.layers import Arguments, before_layers, layers_of
from transact_core.forward.stream import Stream, added, module_input, run_module
from transact_core.forward.waists import (
    MODULES,
    head_rows,
    output_projections,
    require_finite,
    windows_a_batch,
)
from transact_core.pruning.narrow_heads import fit_narrow_heads
from transact_core.pruning.plan import LayerPlan, PruningPlan
from transact_core.pruning.ridge import FoldedRidge, energy

RecoveryName = Literal["least-squares", "bias", "none"]
RECOVERIES: tuple[RecoveryName, ...] = get_args(RecoveryName)
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Ridges to choose from, as shares of each kept channel's own energy, so that channels of large and
of small energy shrink by the same factor."""
FOLDS = 8
"""Folds of the calibration windows for cross-fitting: each fit is made on 7/8 of them."""


def require_recovery(name: str) -> None:
    """Refuses a recovery that is not known.

    Raises:
        TransActError: the name is none of `RECOVERIES`.
    """
    if name not in RECOVERIES:
        raise TransActError(f"The recovery {name!r} is not known; choose {', '.join(RECOVERIES)}.")


@dataclass(frozen=True)
class LayerFit:
    """Relative squared error of one module's output, on windows held out from its fit.

    1 is the error of an output of zero. `ridge` is None where no fit of the output projection was
    better than none, and 0 for a bias.
    """

    layer: int
    module: str
    bare_error: float
    recovered_error: float
    ridge: float | None

    @property
    def is_bare(self) -> bool:
        """Whether the bare cut was kept."""
        return self.ridge is None and self.recovered_error == self.bare_error


@dataclass(frozen=True)
class Recovery:
    """The result of repairing a model."""

    fits: tuple[LayerFit, ...]
    """One for each cut module, in the order of the model."""
    hidden: torch.Tensor = field(repr=False)
    """The residual stream after the last layer, each window through repairs fitted without it:
    shape (windows, sequence_length, hidden_size)."""


Choose = Callable[[int, str, torch.Tensor, torch.Tensor], LayerPlan]
"""Cuts a module of the pruned model again before it is repaired, and gives its layer's new plan.

Called with the layer's index, the module, the dense module's transitional activation on the pruned
stream, shape (windows, sequence_length, width), and the tokens' weights, shape (windows,
sequence_length).
"""


@torch.no_grad()
def recover(
    dense: LlamaForCausalLM,
    pruned: LlamaForCausalLM,
    plan: PruningPlan,
    windows: Windows,
    recovery: str,
    progress: Progress = silent,
    before_layer: Callable[[int], None] = lambda _: None,
    after_layer: Callable[[int], None] = lambda _: None,
    choose: Choose | None = None,
    judge_only: bool = False,
) -> Recovery:
    """Repairs the cut modules of `pruned` in place; the dense model is only read.

    `pruned` must come from `surgery.prune` on `dense` by `plan`: its cut projections are its own.
    Memory is one residual stream and one layer's activations over the calibration windows. With a
    single window nothing can be held out, and every module keeps its bare cut. A layer of `pruned`
    needs its weights only between `before_layer` and `after_layer`, which are called with its
    index. With `judge_only`, only the errors and the stream may be used: `pruned` is left partly
    repaired.

    Raises:
        TransActError: the recovery is not known, or a transitional activation is NaN or infinite.
    """
    require_recovery(recovery)
    repair = _Repair(dense, pruned, plan, windows, recovery, choose, judge_only)
    fits = []
    dense_layers, pruned_layers = layers_of(dense), layers_of(pruned)
    layers = len(dense_layers)
    for layer_index in range(layers):
        progress("Repairing layers", layer_index, layers)
        before_layer(layer_index)
        with (
            dense_layers.borrow(layer_index) as dense_layer,
            pruned_layers.borrow(layer_index) as pruned_layer,
        ):
            repair.enter_layer(layer_index, dense_layer, pruned_layer)
            for module in MODULES:
                if fit := repair.advance(module):
                    fits.append(fit)
            repair.leave_layer()
        after_layer(layer_index)
    progress("Repairing layers", layers, layers)
    return Recovery(fits=tuple(fits), hidden=repair.hidden)


@dataclass(frozen=True)
class _Side:
    """A layer of the dense or of the pruned model, and what its model calls it with."""

    layer: nn.Module
    arguments: Arguments


class _Repair:
    """The residual stream of the model as pruned so far, repaired module by module.

    It works on one layer at a time: between `enter_layer` and `leave_layer`, `dense` and `pruned`
    are that layer of both models.
    """

    dense: _Side
    pruned: _Side

    def __init__(
        self,
        dense: LlamaForCausalLM,
        pruned: LlamaForCausalLM,
        plan: PruningPlan,
        windows: Windows,
        recovery: str,
        choose: Choose | None,
        judge_only: bool,
    ) -> None:
        self.recovery, self.choose, self.judge_only = recovery, choose, judge_only
        self.plans, self.narrower = list(plan.layers), bool(plan.head_dim)
        stream = Stream(dense, windows)
        self.hidden, self.dense_arguments = stream.hidden, stream.arguments
        one_window = windows.ids[:1].to(dense.device)
        self.pruned_arguments = before_layers(pruned, one_window)[1]
        self.at_once = windows_a_batch(windows.sequence_length)
        self.eps = dense.config.rms_norm_eps
        self.folds = torch.arange(len(windows)).tensor_split(min(FOLDS, len(windows)))
        self.ridges = RIDGES if recovery == "least-squares" else (0.0,)
        self.last_ridge = len(self.ridges) // 2
        """Index of the ridge chosen last, where the search for the next module's begins."""

    def enter_layer(self, layer_index: int, dense: nn.Module, pruned: nn.Module) -> None:
        """Turns to a layer, whose modules `advance` then passes in the order of the model."""
        self.layer_index = layer_index
        self.dense = _Side(dense, self.dense_arguments[layer_index])
        self.pruned = _Side(pruned, self.pruned_arguments[layer_index])

    def leave_layer(self) -> None:
        """Lets go of the layer."""
        del self.dense, self.pruned

    def advance(self, module: str) -> LayerFit | None:
        """Moves the stream past one module of the layer, repaired where it is cut."""
        projection = output_projections(self.pruned.layer)[module]
        cut = projection.weight is not output_projections(self.dense.layer)[module].weight
        if cut and self.recovery != "none":
            return self._repair(module)
        for batch, written, _ in self._batches(self.pruned, module):
            self.hidden[batch] += added(self.pruned.layer, module, written)
        return None

    def _repair(self, module: str) -> LayerFit:
        """Repairs one module, and moves each window past it by the repair of the other folds.

        Tensors as large as the stream are what memory is spent on, so few are held at a time.
        """
        narrows = module == "mha" and self.narrower
        projection = output_projections(self.pruned.layer)[module]
        whole = narrows or self.choose is not None
        kept = None if whole else self._kept(module)
        wanted, inputs = self._run(self.dense, module, kept)
        # The next RMSNorm divides the stream by its RMS, so a squared error would be weighted by
        # one over the mean square, as in `elimination`; the root of that weight gave slightly lower
        # perplexity on other text (docs/engine.md).
        weights = torch.stack(
            [
                inverse_rms(before + added(self.dense.layer, module, change), self.eps).squeeze(-1)
                for before, change in zip(self.hidden, wanted, strict=True)
            ]
        )
        if self.choose is not None:
            self.plans[self.layer_index] = self.choose(self.layer_index, module, inputs, weights)
        # Heads and channels that are kept whole compute the same as before, so the pruned waist is
        # a selection from the dense one.
        if narrows:
            inputs = self._run(self.pruned, module)[1]
        elif whole:
            inputs = inputs[..., self._kept(module)]
        scale = energy(wanted, weights) or 1.0
        missing = wanted - projection(inputs)
        bare_error = energy(missing, weights)
        narrowed = {}
        if narrows and self.recovery == "least-squares" and len(self.folds) > 1:
            narrowed, waist = self._narrow(weights)
            if narrowed:
                inputs, missing = waist, wanted - projection(waist)
        del wanted

        def fit(error: float, ridge: float | None) -> LayerFit:
            return LayerFit(self.layer_index, module, bare_error / scale, error / scale, ridge)

        if len(self.folds) > 1:
            features = inputs if self.recovery == "least-squares" else _constant(inputs)
            fitted = FoldedRidge(features, missing, weights, self.folds)
            chosen = fitted.choose(self.ridges, self.last_ridge)
            if chosen.error < min(fitted.energy, bare_error):
                self.last_ridge = self.ridges.index(chosen.ridge)
                for fold, correction in fitted.corrections(chosen):
                    written = projection(inputs[fold]) + correction.to(inputs.dtype)
                    self.hidden[fold] += added(self.pruned.layer, module, written)
                if not self.judge_only:
                    _change(projection, fitted.solve(chosen.ridge), self.recovery)
                return fit(chosen.error, chosen.ridge)
            if fitted.energy < bare_error:
                self._add_output(module, inputs)
                return fit(fitted.energy, None)
        if narrowed:
            _put_back(narrowed)
            inputs = self._run(self.pruned, module)[1]
        self._add_output(module, inputs)
        return fit(bare_error, None)

    def _kept(self, module: str) -> torch.Tensor:
        """Positions of the kept channels in the dense module's transitional activation."""
        plan = self.plans[self.layer_index]
        kept = (
            head_rows(plan.kept_heads, self.dense.layer.self_attn.head_dim)
            if module == "mha"
            else torch.tensor(plan.kept_channels)
        )
        return kept.to(self.hidden.device)

    def _add_output(self, module: str, inputs: torch.Tensor) -> None:
        """Adds to the stream what the pruned module makes of its waist."""
        projection = output_projections(self.pruned.layer)[module]
        for hidden, batch in zip(
            self.hidden.split(self.at_once), inputs.split(self.at_once), strict=True
        ):
            hidden += added(self.pruned.layer, module, projection(batch))

    def _narrow(self, weights: torch.Tensor) -> tuple[dict[nn.Linear, tuple], torch.Tensor | None]:
        """Fits narrower heads; gives the projections of the bare cut, to restore, and the waist.

        Where the fit is not finite, the bare cut is restored already, and the dict is empty.
        """
        attention = self.pruned.layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        before = {projection: (projection.weight, projection.bias) for projection in projections}
        rotary = tuple(side.arguments["position_embeddings"] for side in (self.dense, self.pruned))
        try:
            waist = fit_narrow_heads(
                self.dense.layer.self_attn,
                attention,
                self.plans[self.layer_index],
                module_input(self.dense.layer, "mha", self.hidden),
                weights,
                rotary,
                self.judge_only,
            )
            if all(projection.weight.isfinite().all() for projection in projections):
                return before, waist
        except torch.linalg.LinAlgError:
            pass
        _put_back(before)
        return {}, None

    def _run(
        self, side: _Side, module: str, kept: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a module's output projection writes, and its transitional activation.

        Of the latter all channels, or those at the positions `kept`.
        """
        whole: list[torch.Tensor] = []
        for batch, written, transitional in self._batches(side, module):
            parts = written, transitional if kept is None else transitional[..., kept]
            # Filled batch by batch: concatenating all batches at the end takes twice the memory.
            whole = whole or [part.new_empty(len(self.hidden), *part.shape[1:]) for part in parts]
            for target, part in zip(whole, parts, strict=True):
                target[batch] = part
        return whole[0], whole[1]

    def _batches(
        self, side: _Side, module: str
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """A few windows at a time: which, what the module's output projection writes there, and its
        transitional activation."""
        for start in range(0, len(self.hidden), self.at_once):
            batch = slice(start, start + self.at_once)
            written, transitional = run_module(
                side.layer, module, self.hidden[batch], side.arguments
            )
            require_finite(transitional, self.layer_index, module)
            yield batch, written, transitional


def _constant(inputs: torch.Tensor) -> torch.Tensor:
    """A feature that is 1 for every token: its coefficient is a bias."""
    return torch.ones_like(inputs[..., :1])


def _put_back(before: dict[nn.Linear, tuple]) -> None:
    """Restores the weights and biases of these projections."""
    for projection, (weight, bias) in before.items():
        projection.weight, projection.bias = weight, bias


def _change(projection: nn.Linear, change: torch.Tensor, recovery: str) -> None:
    """Adds a change of shape (features, outputs) to the weight, or to the bias."""
    name, change = ("weight", change.T) if recovery == "least-squares" else ("bias", change[0])
    before = getattr(projection, name)
    changed = (before.float() + change).to(before.dtype)
    setattr(projection, name, nn.Parameter(changed, requires_grad=False))
