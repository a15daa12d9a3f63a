"""Closed-form repair of o_proj and down_proj after the cut; no training.

Layer by layer, two streams run over the calibration windows: the dense model's residual stream and
that of the model as pruned so far. After each cut module its output projection is fitted anew, so
that what is left of the transitional activation reproduces what the dense module wrote, plus part
of what the pruned stream has drifted since. Each later layer sees the repaired ones before it.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from transformers import LlamaForCausalLM

from transact_core.activations import transitional_inputs
from transact_core.corpora import Windows
from transact_core.errors import Progress, TransActError, silent

RECOVERIES = ("least-squares", "none")
RIDGES = (1e-3, 1e-2, 1e-1)
"""Tried on held-out windows; relative to the mean energy of a kept channel."""
HELD_OUT_SHARE = 1 / 8
DRIFT_CORRECTED = 0.5
"""How much of the residual stream's drift each module is asked to correct."""


def require_recovery(name: str) -> None:
    """Refuses a recovery that is not known."""
    if name not in RECOVERIES:
        raise TransActError(f"The recovery {name!r} is not known; choose {', '.join(RECOVERIES)}.")


@dataclass(frozen=True)
class LayerFit:
    """Relative squared error of one module's output on held-out calibration windows.

    1 means as bad as writing nothing. `ridge` is None where the bare cut was kept because no
    repair did better on the held-out windows.
    """

    layer: int
    module: str
    bare_error: float
    recovered_error: float
    ridge: float | None


@torch.no_grad()
def least_squares(
    dense: LlamaForCausalLM,
    pruned: LlamaForCausalLM,
    windows: Windows,
    progress: Progress = silent,
) -> list[LayerFit]:
    """Repairs the cut modules of `pruned` in place; the dense model is only read.

    `pruned` must come from `surgery.prune` on `dense`: its cut projections are its own. Memory is
    two residual streams and one layer's activations over the calibration windows. Ridge and the
    choice between repair and bare cut are made on the last windows, which no fit has seen; the
    chosen repair is then fitted on all of them.
    """
    streams = _Streams(dense, pruned, windows)
    fits = []
    layers = len(pruned.model.layers)
    for number in range(layers):
        progress("Repairing layers", number, layers)
        for module, repair in (("mha", streams.attention), ("mlp", streams.mlp)):
            if fit := repair(number):
                fits.append(LayerFit(number, module, *fit))
    progress("Repairing layers", layers, layers)
    return fits


class _Streams:
    """The residual streams of the dense and of the pruned model, advanced module by module."""

    def __init__(self, dense: LlamaForCausalLM, pruned: LlamaForCausalLM, windows: Windows) -> None:
        self.models = (dense, pruned)
        ids = windows.ids.to(dense.device)
        embedded = dense.model.embed_tokens(ids)
        self.hidden = [embedded, embedded]
        positions = torch.arange(ids.shape[1], device=ids.device)[None]
        self.rotary = dense.model.rotary_emb(embedded, positions)
        self.held_out = max(1, round(len(ids) * HELD_OUT_SHARE)) if len(ids) > 1 else 0

    def attention(self, number: int) -> tuple[float, float, float | None] | None:
        def run(model: LlamaForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
            layer = model.model.layers[number]
            normed = layer.input_layernorm(hidden)
            return layer.self_attn(normed, position_embeddings=self.rotary)[0]

        return self._advance(number, "mha", run)

    def mlp(self, number: int) -> tuple[float, float, float | None] | None:
        def run(model: LlamaForCausalLM, hidden: torch.Tensor) -> torch.Tensor:
            layer = model.model.layers[number]
            return layer.mlp(layer.post_attention_layernorm(hidden))

        return self._advance(number, "mlp", run)

    def _advance(
        self,
        number: int,
        module: str,
        run: Callable[[LlamaForCausalLM, torch.Tensor], torch.Tensor],
    ) -> tuple[float, float, float | None] | None:
        dense, pruned = self.models
        dense_projection = transitional_inputs(dense, number)[module]
        projection = transitional_inputs(pruned, number)[module]
        wanted, _ = self._run(run, dense, self.hidden[0], None)
        cut = projection.in_features < dense_projection.in_features
        written, inputs = self._run(run, pruned, self.hidden[1], projection if cut else None)
        fit = None
        if cut:
            drift = self.hidden[0].float() - self.hidden[1].float()
            target = wanted.float() + DRIFT_CORRECTED * drift
            fit = self._repair(projection, inputs, target)
            written = projection(inputs)
        self.hidden = [self.hidden[0] + wanted, self.hidden[1] + written]
        return fit

    def _run(
        self,
        run: Callable[[LlamaForCausalLM, torch.Tensor], torch.Tensor],
        model: LlamaForCausalLM,
        hidden: torch.Tensor,
        watched: nn.Linear | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        seen: list[torch.Tensor] = []
        hook = watched and watched.register_forward_pre_hook(
            lambda _, inputs: seen.append(inputs[0])
        )
        try:
            outputs = torch.cat([run(model, window) for window in hidden.split(4)])
        finally:
            if hook:
                hook.remove()
        return outputs, torch.cat(seen) if seen else None

    def _repair(
        self, projection: nn.Linear, inputs: torch.Tensor, target: torch.Tensor
    ) -> tuple[float, float, float | None]:
        missing = target - projection(inputs).float()
        fitted = slice(None, len(inputs) - self.held_out)
        held_out = slice(len(inputs) - self.held_out, None)
        seen = _Moments.of(inputs[fitted], missing[fitted])
        unseen = _Moments.of(inputs[held_out], missing[held_out])
        scale = target[held_out].double().square().sum().item() or 1.0
        corrections = {ridge: seen.solve(ridge) for ridge in RIDGES}
        errors = {ridge: unseen.error(change) for ridge, change in corrections.items()}
        best = min(errors, key=errors.get)
        bare = unseen.energy
        if not errors[best] < bare:
            return bare / scale, bare / scale, None
        change = (seen + unseen).solve(best)
        repaired = projection.weight.double() + change.T
        projection.weight = nn.Parameter(repaired.to(projection.weight.dtype), requires_grad=False)
        return bare / scale, errors[best] / scale, best


@dataclass(frozen=True)
class _Moments:
    """Second moments of a projection's inputs and of what its output lacks, in float64."""

    gram: torch.Tensor
    cross: torch.Tensor
    energy: float

    @classmethod
    def of(cls, inputs: torch.Tensor, missing: torch.Tensor) -> "_Moments":
        x = inputs.reshape(-1, inputs.shape[-1]).float()
        y = missing.reshape(-1, missing.shape[-1]).float()
        return cls((x.T @ x).double(), (x.T @ y).double(), y.double().square().sum().item())

    def __add__(self, other: "_Moments") -> "_Moments":
        return _Moments(
            self.gram + other.gram, self.cross + other.cross, self.energy + other.energy
        )

    def solve(self, ridge: float) -> torch.Tensor:
        """The change of the weights, transposed, that leaves least missing under this ridge.

        The ridge pulls towards the bare cut, not towards zero: without data nothing changes.
        """
        diagonal = self.gram.diagonal()
        strength = ridge * diagonal.mean().clamp_min(torch.finfo(torch.float64).tiny)
        damped = self.gram + strength * torch.eye(
            len(diagonal), dtype=diagonal.dtype, device=diagonal.device
        )
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(damped))

    def error(self, change: torch.Tensor) -> float:
        """Energy of what is missing once the weights are changed."""
        explained = 2 * (change * self.cross).sum() - (change * (self.gram @ change)).sum()
        return self.energy - explained.item()
