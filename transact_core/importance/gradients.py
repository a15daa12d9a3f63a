"""First-order saliences: how much the loss changes, to first order, if a weight is set to zero.

This is the only backward pass. It goes layer by layer, for all windows at a time, so that the
gradient of one layer is held and not that of the model: the forward pass keeps the residual stream
before every few layers (checkpoints), and the backward pass runs those few layers again. It runs
copies of the layers that share their weights, so the model itself never requires a gradient and
others can use it at the same time.
"""

import copy
import math
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from transact_core.base.errors import Progress, TransActError, silent
from transact_core.data.windows import Windows
from transact_core.forward.layers import Arguments, layers_of, logits_of
from transact_core.forward.perplexity import tokens_at_once
from transact_core.forward.statistics import collect
from transact_core.forward.stream import Stream, added, run_module
from transact_core.forward.waists import MODULES
from transact_core.models.architecture import Architecture
from transact_core.models.families.description import Block
from transact_core.models.families.table import family_of_layer


def channel_sums(
    scores: Mapping[str, torch.Tensor], module: str, architecture: Architecture
) -> torch.Tensor:
    """Sums a score of each weight over the rows and columns that belong to a channel.

    Takes a matrix for each projection of the module, "mha" or "mlp", by its name in the decoder
    layer; gives shape (width of its waist,), float64 on the CPU. Under grouped queries a row of K
    or V serves one channel of every query head of its group, and each of these channels gets an
    equal share of it. So every weight is counted once, the channels of a group add up to what is
    removed with the whole group, and the heads of a group, none of which removes the row when it is
    removed alone, have the same share of it.
    """
    family = architecture.family
    *readers, writer = family.projections[module]
    inputs = family.attention_inputs if module == "mha" else family.mlp_inputs
    total = scores[writer].sum(dim=0).cpu().double()
    for name, blocks in zip(readers, inputs.values(), strict=True):
        rows = scores[name].sum(dim=1).cpu().double()
        sizes = _block_sizes(blocks, len(rows), len(total))
        for part in rows.split(sizes):
            sharing = len(total) // len(part)
            if sharing > 1:
                heads = part.unflatten(0, (-1, architecture.head_dim))
                part = heads.repeat_interleave(sharing, dim=0).flatten() / sharing
            total += part
    return total


def _block_sizes(blocks: Sequence[Block], rows: int, width: int) -> list[int]:
    """Rows of each block of a projection; `width` is that of the module's waist."""
    narrower = [block for block in blocks if block in ("keys", "values")]
    wide = len(blocks) - len(narrower)
    return [
        (rows - wide * width) // len(narrower) if block in narrower else width for block in blocks
    ]


def projection_weights(layer: nn.Module, module: str) -> dict[str, torch.Tensor]:
    """The weights of a module's projections in a decoder layer, by name."""
    names = family_of_layer(layer).projections[module]
    return {name: layer.get_submodule(name).weight for name in names}


def collect_saliences(
    model: PreTrainedModel,
    windows: Windows,
    architecture: Architecture,
    progress: Progress = silent,
) -> dict[str, torch.Tensor]:
    """Σ |weight · gradient| over the weights of each channel, by module, (layers, width), float64.

    The gradient is that of the summed next-token NLL of all windows, in nats; biases are left out.
    It is summed over windows in float32. Costs a forward pass, a backward pass and two more forward
    passes through the layers; memory is about 2 √layers residual streams of all windows, and one
    layer's gradient in float32.

    Raises:
        TransActError: an activation or a gradient is NaN or infinite.
    """
    stage, layers = "Measuring gradients", len(layers_of(model))
    stride = math.ceil(math.sqrt(layers))
    stream = Stream(model, windows)
    before = {}
    for layer_index in range(layers):
        progress(stage, layer_index, 2 * layers)
        if layer_index % stride == 0:
            before[layer_index] = stream.hidden.clone()
        stream.pass_layer(layer_index)
    gradient = _of_hidden(model, stream.hidden, windows)
    rows: dict[str, list[torch.Tensor]] = {module: [] for module in MODULES}
    for first in sorted(before, reverse=True):
        stream.hidden = before.pop(first)
        segment = range(first, min(first + stride, layers))
        inputs = []
        for layer_index in segment:
            inputs.append(stream.hidden.clone())
            if layer_index < segment[-1]:
                stream.pass_layer(layer_index)
        for layer_index in reversed(segment):
            progress(stage, 2 * layers - 1 - layer_index, 2 * layers)
            stream.hidden = inputs.pop()
            with stream.enter(layer_index) as (layer, arguments):
                gradient = gradient.to(stream.hidden.device)
                sums = _through_layer(layer, stream.hidden, gradient, arguments, architecture)
            for module, saliences in sums.items():
                if not saliences.isfinite().all():
                    # A bad loss spoils all gradients; a forward pass finds the layer it began in.
                    collect(model, windows)
                    raise TransActError(
                        f"The gradient of the {module} of layer {layer_index} is NaN or infinite; "
                        "compute in float32."
                    )
                rows[module].append(saliences)
    progress(stage, 2 * layers, 2 * layers)
    return {module: torch.stack(saliences[::-1]) for module, saliences in rows.items()}


def _of_hidden(model: PreTrainedModel, hidden: torch.Tensor, windows: Windows) -> torch.Tensor:
    """The gradient of the loss by the last residual stream, of the stream's shape and dtype.

    At most `LOGITS_AT_ONCE` logits are held at a time, one token's at least.
    """
    at_once = tokens_at_once(model)
    gradients = []
    for states, window in zip(hidden, windows.ids.to(model.device), strict=True):
        pieces: list[torch.Tensor] = []
        # Each token's loss depends on its own state alone, so the pieces have nothing in common.
        for start in range(0, len(window), at_once):
            end = start + at_once
            # The window's last token has a state and nothing to predict.
            targets = window[start + 1 : end + 1]
            with torch.enable_grad():
                piece = states[start:end].detach().requires_grad_()
                logits = logits_of(model, model.model.norm(piece))[: len(targets)].float()
                loss = functional.cross_entropy(logits, targets, reduction="sum")
                pieces += torch.autograd.grad(loss, [piece])
        gradients.append(torch.cat(pieces))
    return torch.stack(gradients)


def _through_layer(
    layer: nn.Module,
    inputs: torch.Tensor,
    gradient: torch.Tensor,
    arguments: Arguments,
    architecture: Architecture,
) -> dict[str, torch.Tensor]:
    """Propagates the gradient back through a layer, in place, and gives the layer's saliences.

    `inputs` is the residual stream before the layer and `gradient` that of the loss by the stream
    after it, both of shape (windows, sequence_length, hidden_size). Afterwards `gradient` is that
    by the stream before the layer.
    """
    twin = copy.deepcopy(layer, {id(tensor): tensor for tensor in layer.parameters()})
    family, leaves = family_of_layer(layer), {}
    for module in MODULES:
        for name in family.projections[module]:
            projection = twin.get_submodule(name)
            leaves[name] = projection.weight = nn.Parameter(projection.weight.detach())
    totals: dict[str, torch.Tensor] = {}
    for hidden, slot in zip(inputs.split(1), gradient.split(1), strict=True):
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            after = hidden
            for module in MODULES:
                written, _ = run_module(twin, module, after, arguments)
                after = after + added(twin, module, written)
            back, *found = torch.autograd.grad(after, [hidden, *leaves.values()], slot)
        slot.copy_(back)
        for name, slope in zip(leaves, found, strict=True):
            totals[name] = totals[name].add_(slope) if name in totals else slope.float()
    with torch.no_grad():
        return {
            module: channel_sums(
                {
                    name: totals.pop(name).mul_(leaves[name]).abs_()
                    for name in family.projections[module]
                },
                module,
                architecture,
            )
            for module in MODULES
        }
