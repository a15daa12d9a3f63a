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

Some families have a norm behind their modules, so that what enters the stream is not linear in what
the output projection writes. There a repair is fitted to the missing output before the norm, the
tokens weighted as the norm passes their errors on to first order, and it is judged behind the norm
as it is: errors, the choice of keeping the bare cut, and the stream that later layers see.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from transact_core.base.errors import Progress, TransActError, silent
from transact_core.base.linalg import inverse_rms
from transact_core.data.windows import Windows
from transact_core.forward.layers import Arguments, before_layers, layers_of
from transact_core.forward.stream import (
    Stream,
    added,
    gains,
    module_input,
    run_module,
    slopes,
)
from transact_core.forward.waists import (
    MODULES,
    Finite,
    head_rows,
    output_projections,
    windows_a_batch,
)
from transact_core.models.placement import device_of, placed
from transact_core.pruning.narrow_heads import fit_narrow_heads
from transact_core.pruning.plan import LayerPlan, PruningPlan
from transact_core.pruning.ridge import FoldedRidge, energy
from transact_core.pruning.surgery import Cut

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
    """Relative squared error of what one module adds to the stream, on windows held out from its
    fit.

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
stream, shape (windows, sequence_length, width), and what the tokens' rows of it are to be
multiplied by in an elimination, shape (windows, sequence_length); not called for an attention whose
heads became narrower.
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
        with dense_layers.borrow(layer_index) as dense_layer:
            # What is not cut is shared with the borrowed layer.
            before_layer(layer_index)
            with pruned_layers.borrow(layer_index) as pruned_layer:
                repair.enter_layer(layer_index, dense_layer, pruned_layer)
                for module in MODULES:
                    if fit := repair.advance(module):
                        fits.append(fit)
                repair.leave_layer()
        # The name would keep the weights of a layer that `after_layer` lets go of.
        del pruned_layer
        after_layer(layer_index)
    progress("Repairing layers", layers, layers)
    return Recovery(fits=tuple(fits), hidden=repair.hidden)


def recover_by_layers(
    cut: Cut,
    windows: Windows,
    recovery: str,
    progress: Progress = silent,
    after_layer: Callable[[int], None] | None = None,
    choose: Choose | None = None,
    judge_only: bool = False,
) -> Recovery:
    """As `recover`, of a cut none of whose layers is made yet: each is made, repaired and dropped.

    What is called after a layer, in place of dropping it, has to drop it itself.
    """
    return recover(
        cut.dense,
        cut.pruned,
        cut.plan,
        windows,
        recovery,
        progress,
        cut.make_layer,
        after_layer or cut.drop_layer,
        choose,
        judge_only,
    )


@dataclass(frozen=True)
class _Tokens:
    """What the tokens' errors count, each of shape (windows, sequence_length)."""

    fit: torch.Tensor
    """Weights of squared errors in what the output projection writes."""
    judge: torch.Tensor
    """Weights of squared errors in what is added to the stream; the same where that is linear in
    what is written."""
    row: torch.Tensor
    """Factors of rows in an elimination."""
    written: torch.Tensor | None = None
    """What the dense module's output projection writes, shaped like the stream, where a norm
    behind it makes that matter; None elsewhere."""


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
        self.last_ridge = dict.fromkeys(MODULES, len(self.ridges) // 2)
        """Index of the ridge chosen last for each kind of module, where the search begins."""

    def enter_layer(self, layer_index: int, dense: nn.Module, pruned: nn.Module) -> None:
        """Turns to a layer, whose modules `advance` then passes in the order of the model, and
        hands the stream on to its device. The pruned layer is on that of the dense one."""
        self.layer_index = layer_index
        device = device_of(dense)
        self.hidden = self.hidden.to(device)
        self.dense = _Side(dense, placed(self.dense_arguments[layer_index], device))
        self.pruned = _Side(pruned, placed(self.pruned_arguments[layer_index], device))

    def leave_layer(self) -> None:
        """Lets go of the layer."""
        del self.dense, self.pruned

    def advance(self, module: str) -> LayerFit | None:
        """Moves the stream past one module of the layer, repaired where it is cut.

        A repaired module is passed in two steps: the stream goes past the dense one, and what the
        pruned one fails to write is then taken away. Tensors as large as the stream are what
        memory is spent on, so few are held at a time.
        """
        projection = output_projections(self.pruned.layer)[module]
        cut = projection.weight is not output_projections(self.dense.layer)[module].weight
        if not cut or self.recovery == "none":
            self._pass(module)
            return None
        return self._narrowed(module) if module == "mha" and self.narrower else self._cut(module)

    def _cut(self, module: str) -> LayerFit:
        """Repairs a module that has lost whole heads or channels.

        Those that are kept compute the same as before, so the pruned waist is a selection from the
        dense one, and what is missing from the output is what the others wrote.
        """
        written_by = output_projections(self.dense.layer)[module].weight
        if self.choose is None:
            kept, gone = self._kept_and_gone(module)
            columns = written_by[:, gone]

            def look(written: torch.Tensor, waist: torch.Tensor) -> tuple[torch.Tensor, ...]:
                return functional.linear(waist[..., gone], columns), waist[..., kept]

            tokens, scale, (missing, inputs) = self._past_dense(module, look)
        else:
            tokens, scale, (waist,) = self._past_dense(module, lambda _, waist: (waist,))
            self.plans[self.layer_index] = self.choose(self.layer_index, module, waist, tokens.row)
            kept, gone = self._kept_and_gone(module)
            columns = written_by[:, gone]
            missing = torch.empty_like(self.hidden)
            for batch in self._places():
                missing[batch] = functional.linear(waist[batch][..., gone], columns)
            inputs = waist[..., kept]
            del waist
        bare_error = self._error(module, missing, tokens)
        found = self._solved(module, inputs, missing, tokens, bare_error)
        if found is None:
            self._take_away(module, missing, tokens)
        error, ridge = found or (bare_error, None)
        return LayerFit(self.layer_index, module, bare_error / scale, error / scale, ridge)

    def _narrowed(self, module: str) -> LayerFit:
        """Repairs an attention whose heads became narrower, whose attention weights are others."""
        projection = output_projections(self.pruned.layer)[module]
        before = self.hidden.clone()
        tokens, scale, (wanted,) = self._past_dense(module, lambda written, _: (written,))
        missing = torch.empty_like(wanted)
        inputs = wanted.new_empty(*wanted.shape[:2], projection.in_features)
        for batch, written, waist in self._batches(self.pruned, module, before):
            missing[batch], inputs[batch] = wanted[batch] - written, waist
        bare_error = self._error(module, missing, tokens)
        narrowed = {}
        if self.recovery == "least-squares" and len(self.folds) > 1:
            narrowed, waist = self._narrow(before, tokens.fit)
            if narrowed:
                inputs = waist
                for batch in self._places():
                    missing[batch] = wanted[batch] - projection(inputs[batch])
        del wanted
        found = self._solved(module, inputs, missing, tokens, bare_error)
        if found is None:
            _put_back(narrowed)
            self.hidden = before
            self._pass(module)
        error, ridge = found or (bare_error, None)
        return LayerFit(self.layer_index, module, bare_error / scale, error / scale, ridge)

    def _solved(
        self,
        module: str,
        inputs: torch.Tensor,
        missing: torch.Tensor,
        tokens: _Tokens,
        bare_error: float,
    ) -> tuple[float, float | None] | None:
        """Fits what is missing to the pruned waist, and moves each window on by the other folds'
        fit: the error on held-out windows and the ridge, or None and no move where the bare cut is
        no worse."""
        if len(self.folds) < 2:
            return None
        features = inputs if self.recovery == "least-squares" else _constant(inputs)
        factors = gains(self.dense.layer, module)
        folded = FoldedRidge(features, missing, tokens.fit, self.folds, gains=factors)
        chosen = folded.choose(self.ridges, self.last_ridge[module])
        fitted = folded.fit(chosen)
        error, unrepaired = fitted.error, folded.energy
        if tokens.written is not None:
            error, unrepaired = (
                self._error(module, lost, tokens) for lost in (fitted.left, missing)
            )
        if error < min(unrepaired, bare_error):
            self.last_ridge[module] = self.ridges.index(chosen.ridge)
            self._take_away(module, fitted.left, tokens)
            if not self.judge_only:
                projection = output_projections(self.pruned.layer)[module]
                _change(projection, fitted.change, self.recovery)
            return error, chosen.ridge
        if unrepaired < bare_error:
            self._take_away(module, missing, tokens)
            return unrepaired, None
        return None

    def _kept_and_gone(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions of the kept and of the removed channels in the dense module's waist."""
        plan = self.plans[self.layer_index]
        stays = torch.zeros(
            output_projections(self.dense.layer)[module].in_features, dtype=torch.bool
        )
        if module == "mha":
            stays[head_rows(plan.kept_heads, self.dense.layer.self_attn.head_dim)] = True
        else:
            stays[list(plan.kept_channels)] = True
        kept, gone = (which.nonzero().flatten() for which in (stays, ~stays))
        return kept.to(self.hidden.device), gone.to(self.hidden.device)

    def _take_away(self, module: str, lost: torch.Tensor, tokens: _Tokens) -> None:
        """Takes from the stream behind the dense module what the pruned one does not write."""
        for batch in self._places():
            self.hidden[batch] -= self._not_added(module, lost, tokens, batch)

    def _error(self, module: str, lost: torch.Tensor, tokens: _Tokens) -> float:
        """The weighted squared error where the pruned module does not write `lost`."""
        if tokens.written is None:
            return energy(lost, tokens.judge).item()
        return float(
            sum(
                energy(self._not_added(module, lost, tokens, batch), tokens.judge[batch])
                for batch in self._places()
            )
        )

    def _not_added(
        self, module: str, lost: torch.Tensor, tokens: _Tokens, batch: slice
    ) -> torch.Tensor:
        """What the stream of some windows misses where the pruned module does not write `lost`."""
        layer, missing = self.dense.layer, lost[batch].to(self.hidden.dtype)
        if tokens.written is None:
            return added(layer, module, missing)
        written = tokens.written[batch]
        return added(layer, module, written) - added(layer, module, written - missing)

    def _narrow(
        self, before: torch.Tensor, weights: torch.Tensor
    ) -> tuple[dict[nn.Linear, tuple], torch.Tensor | None]:
        """Fits narrower heads; gives the projections of the bare cut, to restore, and the waist.

        `before` is the stream before the attention.
        Where the fit is not finite, the bare cut is restored already, and the dict is empty.
        """
        attention = self.pruned.layer.self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        bare = {projection: (projection.weight, projection.bias) for projection in projections}
        normed = torch.empty_like(before)
        for batch in self._places():
            normed[batch] = module_input(self.dense.layer, "mha", before[batch])
        rotary = tuple(side.arguments["position_embeddings"] for side in (self.dense, self.pruned))
        try:
            waist = fit_narrow_heads(
                self.dense.layer.self_attn,
                attention,
                self.plans[self.layer_index],
                normed,
                weights,
                rotary,
                self.judge_only,
            )
            if all(projection.weight.isfinite().all() for projection in projections):
                return bare, waist
        except torch.linalg.LinAlgError:
            pass
        _put_back(bare)
        return {}, None

    def _pass(self, module: str) -> None:
        """Moves the stream past the pruned module as it is."""
        for batch, written, _ in self._batches(self.pruned, module, self.hidden):
            self.hidden[batch] += added(self.pruned.layer, module, written)

    def _past_dense(
        self,
        module: str,
        look: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, ...]],
    ) -> tuple[_Tokens, float, list[torch.Tensor]]:
        """Moves the stream past the dense module, and gives what is seen on the way.

        That is what the tokens' errors count, the weighted energy of the module's output, or 1
        where that is 0, and of all windows what `look` makes of a batch's output and transitional
        activation.
        """
        weights = torch.empty(self.hidden.shape[:2], device=self.hidden.device)
        tokens = _Tokens(weights, weights, weights)
        if gains(self.dense.layer, module) is not None:
            fit, row = (torch.empty_like(weights) for _ in range(2))
            tokens = _Tokens(fit, weights, row, torch.empty_like(self.hidden))
        scale = 0.0
        whole: list[torch.Tensor] = []
        for batch, written, waist in self._batches(self.dense, module, self.hidden):
            entering = added(self.dense.layer, module, written)
            self.hidden[batch] += entering
            # The next RMSNorm divides the stream by its RMS, so a squared error would be weighted
            # by one over the mean square, as in `elimination`; the root of that weight gave
            # slightly lower perplexity on other text (docs/engine.md).
            weights[batch] = inverse_rms(self.hidden[batch], self.eps).squeeze(-1)
            if tokens.written is None:
                scale += energy(written, weights[batch])
            else:
                scale += energy(entering, weights[batch])
                tokens.written[batch] = written
                slope = slopes(self.dense.layer, module, written).squeeze(-1)
                tokens.row[batch] = weights[batch] * slope
                tokens.fit[batch] = tokens.row[batch] * slope
            parts = look(written, waist)
            # Filled batch by batch: concatenating all batches at the end takes twice the memory.
            whole = whole or [part.new_empty(len(self.hidden), *part.shape[1:]) for part in parts]
            for target, part in zip(whole, parts, strict=True):
                target[batch] = part
        return tokens, float(scale) or 1.0, whole

    def _batches(
        self, side: _Side, module: str, hidden: torch.Tensor
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """A few windows at a time: which, what the module's output projection writes on this
        stream, and its transitional activation."""
        seen = Finite(self.layer_index, module)
        for batch in self._places():
            written, transitional = run_module(side.layer, module, hidden[batch], side.arguments)
            seen.add(transitional)
            yield batch, written, transitional
        seen.require()

    def _places(self) -> Iterator[slice]:
        """Where in the stream the windows are that are run at a time."""
        for start in range(0, len(self.hidden), self.at_once):
            yield slice(start, start + self.at_once)


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
