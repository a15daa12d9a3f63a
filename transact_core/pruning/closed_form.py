"""Closed-form repair after the cut; no training.

Layer by layer, the residual stream of the model as pruned so far runs over the calibration windows.
At each cut module the dense module is asked what it would have written on that same stream, and the
pruned one is repaired to write it too: by a bias (the mean of what went missing) or by fitting its
output projection anew (`least-squares`). Each later layer sees the repaired ones before it.

What a repair has seen it flatters, and a stream made of flattered layers hides from later layers
what awaits them on other text. So the windows are dealt into folds, and each fold's stream runs
through repairs that were fitted on the other folds only: every error, every choice of a ridge and
every later layer is judged on text that the repairs before it have not seen. What is written into
the model is then fitted on all windows.
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
from transact_core.forward.stream import run_module
from transact_core.forward.waists import (
    MODULES,
    head_rows,
    require_finite,
    transitional_inputs,
    windows_a_batch,
)
from transact_core.pruning.narrow_heads import fit_narrow_heads
from transact_core.pruning.plan import LayerPlan, PruningPlan
from transact_core.pruning.ridge import FoldedRidge, energy

RecoveryName = Literal["least-squares", "bias", "none"]
RECOVERIES: tuple[RecoveryName, ...] = get_args(RecoveryName)
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
"""Relative to each kept channel's own energy, so that loud and quiet channels shrink alike."""
FOLDS = 8
"""Of the calibration windows; the more, the more text is in each of the fits that judge."""


def require_recovery(name: str) -> None:
    """Refuses a recovery that is not known."""
    if name not in RECOVERIES:
        raise TransActError(f"The recovery {name!r} is not known; choose {', '.join(RECOVERIES)}.")


@dataclass(frozen=True)
class LayerFit:
    """Relative squared error of what one module writes, on windows that no fit of it has seen.

    1 means as bad as writing nothing. `ridge` is None where the output projection was not fitted,
    because no fit of it did better, and 0 for a bias.
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
    """What a repair did."""

    fits: tuple[LayerFit, ...]
    hidden: torch.Tensor = field(repr=False)
    """The last residual stream, each window through repairs that have not seen it: shape
    (windows, sequence_length, hidden_size)."""


Choose = Callable[[int, str, torch.Tensor, torch.Tensor], LayerPlan]
"""Cuts a module of the pruned model again before it is repaired, and gives its layer's new plan.

Called with the layer, the module, the dense module's transitional activation on the pruned stream,
shape (windows, sequence_length, width), and the tokens' weights, shape (windows, sequence_length).
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
    need be there only between `before_layer` and `after_layer`, called with its number. With
    `judge_only` the errors and the stream alone are to be used: `pruned` is left half repaired.

    Raises:
        TransActError: the recovery is not known, or a transitional activation is NaN or infinite.
    """
    require_recovery(recovery)
    repair = _Repair(dense, pruned, plan, windows, recovery, choose, judge_only)
    fits = []
    layers = len(pruned.model.layers)
    for number in range(layers):
        progress("Repairing layers", number, layers)
        before_layer(number)
        for module in MODULES:
            if fit := repair.advance(number, module):
                fits.append(fit)
        after_layer(number)
    progress("Repairing layers", layers, layers)
    return Recovery(fits=tuple(fits), hidden=repair.hidden)


class _Repair:
    """The residual stream of the model as pruned so far, repaired module by module."""

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
        self.dense, self.pruned, self.recovery, self.choose = dense, pruned, recovery, choose
        self.judge_only = judge_only
        self.layers, self.narrower = list(plan.layers), bool(plan.head_dim)
        ids = windows.ids.to(dense.device)
        self.hidden = dense.model.embed_tokens(ids)
        self.at_once = windows_a_batch(windows.sequence_length)
        self.positions = torch.arange(ids.shape[1], device=ids.device)[None]
        self.folds = torch.arange(len(windows)).tensor_split(min(FOLDS, len(windows)))
        self.ridges = RIDGES if recovery == "least-squares" else (0.0,)
        self.nearby = len(self.ridges) // 2
        """Where the search for the next module's ridge begins: at the last one chosen."""

    def advance(self, number: int, module: str) -> LayerFit | None:
        """Carries the stream past one module, repaired where it is cut."""
        projection = transitional_inputs(self.pruned, number)[module]
        cut = projection.weight is not transitional_inputs(self.dense, number)[module].weight
        if cut and self.recovery != "none":
            return self._repair(number, module)
        for batch, written, _ in self._batches(self.pruned, number, module):
            self.hidden[batch] += written
        return None

    def _repair(self, number: int, module: str) -> LayerFit:
        """Repairs one module, and carries each window past it as the other folds repaired it.

        Little that is as large as the stream is held at a time: it is what memory goes into.
        """
        narrows = module == "mha" and self.narrower
        projection = transitional_inputs(self.pruned, number)[module]
        whole = narrows or self.choose is not None
        kept = None if whole else self._kept(number, module)
        wanted, inputs = self._run(self.dense, number, module, kept)
        # By RMSNorm's division a squared error would be over the mean square, as in `elimination`;
        # its root did a little better on other text (docs/engine.md).
        eps = self.dense.config.rms_norm_eps
        weights = torch.stack(
            [
                inverse_rms(before + change, eps).squeeze(-1)
                for before, change in zip(self.hidden, wanted, strict=True)
            ]
        )
        if self.choose is not None:
            self.layers[number] = self.choose(number, module, inputs, weights)
        # Whole units compute what they computed before, so what they give is a selection.
        if narrows:
            inputs = self._run(self.pruned, number, module)[1]
        elif whole:
            inputs = inputs[..., self._kept(number, module)]
        scale = energy(wanted, weights) or 1.0
        missing = wanted - projection(inputs)
        bare_error = energy(missing, weights)
        narrowed = {}
        if narrows and self.recovery == "least-squares" and len(self.folds) > 1:
            narrowed, waist = self._narrow(number, weights)
            if narrowed:
                inputs, missing = waist, wanted - projection(waist)
        del wanted

        def fit(error: float, ridge: float | None) -> LayerFit:
            return LayerFit(number, module, bare_error / scale, error / scale, ridge)

        if len(self.folds) > 1:
            features = inputs if self.recovery == "least-squares" else _constant(inputs)
            fitted = FoldedRidge(features, missing, weights, self.folds)
            chosen = fitted.choose(self.ridges, self.nearby)
            if chosen.error < min(fitted.energy, bare_error):
                self.nearby = self.ridges.index(chosen.ridge)
                for fold, correction in fitted.corrections(chosen):
                    self.hidden[fold] += projection(inputs[fold]) + correction.to(inputs.dtype)
                if not self.judge_only:
                    _change(projection, fitted.solve(chosen.ridge), self.recovery)
                return fit(chosen.error, chosen.ridge)
            if fitted.energy < bare_error:
                self._carry(projection, inputs)
                return fit(fitted.energy, None)
        if narrowed:
            _put_back(narrowed)
            inputs = self._run(self.pruned, number, module)[1]
        self._carry(projection, inputs)
        return fit(bare_error, None)

    def _kept(self, number: int, module: str) -> torch.Tensor:
        """Places of the kept units in the dense module's transitional activation."""
        layer, attention = self.layers[number], self.dense.model.layers[number].self_attn
        kept = (
            head_rows(layer.kept_heads, attention.head_dim)
            if module == "mha"
            else torch.tensor(layer.kept_channels)
        )
        return kept.to(self.hidden.device)

    def _carry(self, projection: nn.Linear, inputs: torch.Tensor) -> None:
        """Adds to the stream what the projection makes of the inputs."""
        for hidden, batch in zip(
            self.hidden.split(self.at_once), inputs.split(self.at_once), strict=True
        ):
            hidden += projection(batch)

    def _narrow(
        self, number: int, weights: torch.Tensor
    ) -> tuple[dict[nn.Linear, tuple], torch.Tensor | None]:
        """Fits narrower heads; gives the projections of the bare cut, to go back to, and the waist.

        What cannot be fitted in numbers keeps its bare cut: there is nothing to go back to, and no
        other waist.
        """
        attention = self.pruned.model.layers[number].self_attn
        projections = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        before = {each: (each.weight, each.bias) for each in projections}
        rotary = tuple(
            model.model.rotary_emb(self.hidden, self.positions)
            for model in (self.dense, self.pruned)
        )
        decoder = self.dense.model.layers[number]
        normed = decoder.input_layernorm(self.hidden)
        try:
            waist = fit_narrow_heads(
                decoder.self_attn,
                attention,
                self.layers[number],
                normed,
                weights,
                rotary,
                self.judge_only,
            )
            if all(each.weight.isfinite().all() for each in projections):
                return before, waist
        except torch.linalg.LinAlgError:
            pass
        _put_back(before)
        return {}, None

    def _run(
        self,
        model: LlamaForCausalLM,
        number: int,
        module: str,
        kept: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a module writes on the stream, and the transitional activation it writes from.

        Of the latter all of it, or the places `kept`.
        """
        whole: list[torch.Tensor] = []
        for batch, written, transitional in self._batches(model, number, module):
            parts = written, transitional if kept is None else transitional[..., kept]
            # Filled in one by one: to join all batches in the end takes twice the memory.
            whole = whole or [each.new_empty(len(self.hidden), *each.shape[1:]) for each in parts]
            for each, part in zip(whole, parts, strict=True):
                each[batch] = part
        return whole[0], whole[1]

    def _batches(
        self, model: LlamaForCausalLM, number: int, module: str
    ) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
        """A few windows at a time: which, what the module writes there, and from what."""
        layer = model.model.layers[number]
        rotary = model.model.rotary_emb(self.hidden, self.positions)
        for start in range(0, len(self.hidden), self.at_once):
            batch = slice(start, start + self.at_once)
            written, transitional = run_module(layer, module, self.hidden[batch], rotary)
            require_finite(transitional, number, module)
            yield batch, written, transitional


def _constant(inputs: torch.Tensor) -> torch.Tensor:
    """A feature that is 1 for every token: what is fitted to it is a bias."""
    return torch.ones_like(inputs[..., :1])


def _put_back(before: dict[nn.Linear, tuple]) -> None:
    for projection, (weight, bias) in before.items():
        projection.weight, projection.bias = weight, bias


def _change(projection: nn.Linear, change: torch.Tensor, recovery: str) -> None:
    """Adds a change of shape (features, outputs) to the weight, or to the bias."""
    name, change = ("weight", change.T) if recovery == "least-squares" else ("bias", change[0])
    before = getattr(projection, name)
    changed = (before.float() + change).to(before.dtype)
    setattr(projection, name, nn.Parameter(changed, requires_grad=False))
