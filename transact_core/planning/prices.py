"""What cutting one module of one layer does to the model's predictions, on held-out windows.

The effect is the Kullback–Leibler divergence from the dense model's next-token distributions to
those of the model in which only that module is cut and repaired. The stream before that module is
the dense model's, so one pass over the held-out windows goes along, and from each module on the
stream of each cut runs to the end alone: half a pass on average.

A cut of all modules loses what they do to each other too. `marginal_losses` divides the divergence
of such a cut among its modules by one pass back: with each module's output going linearly from what
the dense module would give on the same stream to what the cut one gives, the derivative at the end
is twice the module's part where the divergence is quadratic in the errors, and all parts then sum
to the divergence.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from transact_core.base.errors import Progress, silent
from transact_core.base.linalg import (
    factored_in_place,
    in_float64,
    inverse_rms,
    second_moments,
    solve_factored,
)
from transact_core.data.windows import Windows
from transact_core.forward.layers import layers_of, logits_of
from transact_core.forward.stream import Stream, added, run_module
from transact_core.forward.waists import MODULES, output_projections
from transact_core.models.placement import device_of, placed
from transact_core.pruning.ridge import FLOOR

RIDGE = 0.3
"""The ridge of these repairs, as a share of each channel's energy: the middle one of those that
`closed_form` chooses in practice."""
SCORED_EVERY = 2
"""Of the tokens of a held-out window, one in so many is scored: neighbours tell nearly the same,
and the LM head is a large part of the work."""


@dataclass(frozen=True)
class HeldOut:
    """Held-out windows of several kinds of text, with what the dense model predicts there."""

    windows: Windows = field(repr=False)
    kinds: tuple[str, ...]
    """The kind of text of each window, by its source."""
    log_p: torch.Tensor = field(repr=False)
    """The dense model's log-probabilities at every `SCORED_EVERY`-th token, shape (windows, scored
    tokens, vocabulary), float32."""

    @classmethod
    @torch.no_grad()
    def of(cls, model: PreTrainedModel, windows: Windows, kinds: Sequence[str]) -> "HeldOut":
        """Runs the dense model over the windows."""
        stream = Stream(model, windows)
        for layer_index in range(len(stream.layers)):
            stream.pass_layer(layer_index)
        log_p = torch.stack([_log_probabilities(model, hidden) for hidden in stream.hidden])
        return cls(windows, tuple(kinds), log_p)

    def divergences(self, model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
        """Mean divergence of each window in nats a token, (windows,), float64 on the CPU.

        `hidden` is the stream after the last layer, shape (windows, sequence_length, hidden_size).
        """
        found = [
            _divergence(model, states, log_p)
            for states, log_p in zip(hidden, self.log_p, strict=True)
        ]
        return torch.stack(found).double().cpu()

    def by_kind(self, of_windows: torch.Tensor) -> torch.Tensor:
        """Means over the windows of each kind: from (…, windows) to (…, kinds)."""
        names = list(dict.fromkeys(self.kinds))
        columns = [[kind == name for kind in self.kinds] for name in names]
        return torch.stack([of_windows[..., column].mean(dim=-1) for column in columns], dim=-1)


def _log_probabilities(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """At the scored tokens of one window, from the stream after the last layer."""
    states = model.model.norm(hidden[::SCORED_EVERY])
    return logits_of(model, states).float().log_softmax(dim=-1)


def _divergence(model: PreTrainedModel, hidden: torch.Tensor, log_p: torch.Tensor) -> torch.Tensor:
    log_q = _log_probabilities(model, hidden)
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1).mean()


# --- one module alone ------------------------------------------------------------------------


@torch.no_grad()
def single_losses(
    model: PreTrainedModel,
    calibration: Windows,
    held_out: HeldOut,
    module: str,
    order: torch.Tensor,
    levels: Sequence[int],
    recovery: str,
    progress: Progress = silent,
) -> torch.Tensor:
    """The divergence of each window when one layer's "mha" or "mlp" alone is cut and repaired.

    `order` are the module's channels in every layer, kept longest first, shape (layers, width);
    `levels` is how many of them each cut keeps. The result has shape (layers, levels, windows),
    float64 on the CPU.

    Raises:
        TransActError: a transitional activation is NaN or infinite.
    """
    calibrated, seen = Stream(model, calibration), Stream(model, held_out.windows)
    layers = len(seen.layers)
    found = torch.zeros(layers, len(levels), len(held_out.windows), dtype=torch.float64)
    stage = f"Pricing the {'attention' if module == 'mha' else 'MLP'} of each layer"
    for layer_index in range(layers):
        progress(stage, layer_index, layers)
        for passed in MODULES:
            if passed != module:
                for stream in (calibrated, seen):
                    for _ in stream.advance(layer_index, passed):
                        pass
                continue
            moments = _advanced(calibrated, layer_index, module, model)
            with seen.enter(layer_index):
                before = [hidden.clone() for hidden in seen.batches()]
            waists = [waist for waist, _, _ in seen.advance(layer_index, module)]
            for level, kept in enumerate(levels):
                cut = seen.fork()
                with seen.layers.borrow(layer_index) as layer:
                    write = repaired(
                        output_projections(layer)[module],
                        moments,
                        order[layer_index],
                        kept,
                        recovery,
                    )
                    for hidden, start, waist in zip(cut.batches(), before, waists, strict=True):
                        hidden.copy_(start + added(layer, module, write(waist)))
                _to_the_end(cut, layer_index, module)
                found[layer_index, level] = held_out.divergences(model, cut.hidden)
    progress(stage, layers, layers)
    return found


def _to_the_end(stream: Stream, layer_index: int, module: str) -> None:
    """Passes what comes behind a module of a layer."""
    for later in MODULES[MODULES.index(module) + 1 :]:
        for _ in stream.advance(layer_index, later):
            pass
    for later_layer in range(layer_index + 1, len(stream.layers)):
        stream.pass_layer(later_layer)


def _advanced(
    stream: Stream, layer_index: int, module: str, model: PreTrainedModel
) -> torch.Tensor:
    """Moves the stream past a module; the weighted second moments of its waist with a constant 1 as
    the last channel."""
    batches = stream.advance(layer_index, module)
    eps = model.config.rms_norm_eps

    def rows() -> Iterator[torch.Tensor]:
        for waist, residual, slopes in batches:
            root = inverse_rms(residual, eps).sqrt()
            if slopes is not None:
                root = root * slopes
            yield torch.cat([waist.float() * root, root], dim=-1).flatten(0, 1)

    with stream.layers.borrow(layer_index) as layer:
        width = output_projections(layer)[module].in_features
    return second_moments(rows(), width + 1)


def repaired(
    projection: nn.Linear, moments: torch.Tensor, order: torch.Tensor, kept: int, recovery: str
) -> nn.Module:
    """What an output projection writes from the dense waist when it reads the first channels only.

    `moments` are the waist's second moments with a constant 1 last, `order` its channels of which
    the first `kept` stay. Repaired as `closed_form` does, but with one ridge and no folds.
    """
    order = order.to(projection.weight.device)
    stay, gone = order[:kept], order[kept:]
    weight = projection.weight.float().clone()
    missing = weight[:, gone]
    weight[:, gone] = 0
    bias = projection.bias
    if recovery == "bias":
        mean = missing @ (moments[gone, -1] / moments[-1, -1])
        bias = mean if bias is None else bias.float() + mean
    elif recovery == "least-squares":
        gram = moments[stay][:, stay].clone()
        cross = moments[stay][:, gone] @ missing.T
        energy = gram.diagonal().clone()
        floor = (FLOOR * energy.mean()).clamp_min(torch.finfo(energy.dtype).tiny)
        units = (energy + floor).sqrt()
        # In units in which each channel has energy 1, float32 suffices.
        gram = gram / units / units[:, None]
        gram.diagonal().add_(RIDGE)
        change = solve_factored(factored_in_place(gram), cross / units[:, None])
        weight[:, stay] += (change / units[:, None]).T
    made = nn.Linear(*reversed(weight.shape), bias=bias is not None, device="meta")
    dtype = projection.weight.dtype
    made.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
    if bias is not None:
        made.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
    return made


# --- a cut of all modules --------------------------------------------------------------------


def marginal_losses(
    dense: PreTrainedModel,
    pruned: PreTrainedModel,
    held_out: HeldOut,
    progress: Progress = silent,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The divergence of a cut on each window, (windows,), and how its modules share it.

    The shares are (layers, windows) for each module, float64 on the CPU. A share may be negative,
    where a module's error makes up for those of others.
    """
    stream, layers = Stream(pruned, held_out.windows), layers_of(dense)
    dense_arguments = Stream(dense, held_out.windows).arguments
    states: list[torch.Tensor] = []
    for layer_index in range(len(layers)):
        for module in MODULES:
            states.append(stream.hidden.clone())
            for _ in stream.advance(layer_index, module):
                pass
    losses, gradient = [], torch.empty_like(stream.hidden)
    for number, (hidden, log_p) in enumerate(zip(stream.hidden, held_out.log_p, strict=True)):
        last = hidden.detach().requires_grad_()
        with torch.enable_grad():
            loss = _divergence(pruned, last, log_p)
        (gradient[number],) = torch.autograd.grad(loss, last)
        losses.append(loss.detach())
    shares = {
        module: torch.zeros(len(layers), len(losses), dtype=torch.float64) for module in MODULES
    }
    for layer_index in reversed(range(len(layers))):
        progress("Pricing the cut", len(layers) - 1 - layer_index, len(layers))
        with (
            layers.borrow(layer_index) as dense_layer,
            stream.enter(layer_index) as (pruned_layer, arguments),
        ):
            device = device_of(dense_layer)
            wanted_by = placed(dense_arguments[layer_index], device)
            gradient = gradient.to(device)
            for module in reversed(MODULES):
                whole, found = states.pop().to(device), []
                for window in range(len(whole)):
                    before = whole[window : window + 1].detach().requires_grad_()
                    own = gradient[window : window + 1]
                    with torch.enable_grad():
                        entering = _entering(pruned_layer, module, before, arguments)
                    (through,) = torch.autograd.grad(entering, before, own)
                    with torch.no_grad():
                        wanted = _entering(dense_layer, module, before, wanted_by)
                        share = in_float64((entering.detach() - wanted) * own).sum() / 2
                    found.append(share)
                    gradient[window : window + 1] = own + through
                shares[module][layer_index] = torch.stack(found)
    progress("Pricing the cut", len(layers), len(layers))
    return torch.stack(losses).double().cpu(), shares


def _entering(
    layer: nn.Module, module: str, hidden: torch.Tensor, arguments: Mapping[str, object]
) -> torch.Tensor:
    """What a module adds to the stream."""
    return added(layer, module, run_module(layer, module, hidden, arguments)[0])
