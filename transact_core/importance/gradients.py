"""First-order saliences: how much the loss would change, to first order, were a weight zero.

The only pass that goes backwards. It does so layer by layer, for all windows at a time, so that one
layer's gradient is held and not the model's: the way there keeps the residual stream before every
few layers, the way back runs those few again. It runs copies of the layers on aliases of their
weights: the model itself is never asked for a gradient, and whoever else uses it is not disturbed.
"""

import copy
import math

import torch
from torch import nn
from torch.nn import functional
from transformers import LlamaForCausalLM

from transact_core.base.errors import Progress, TransActError, silent
from transact_core.data.windows import Windows
from transact_core.forward.statistics import collect
from transact_core.forward.stream import Rotary, Stream, run_attention, run_mlp
from transact_core.forward.waists import MODULES
from transact_core.models.architecture import Architecture

PROJECTIONS = {
    "mha": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    "mlp": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
"""Of each module the projections that lose width: the last one columns, the others rows."""


def channel_sums(matrices: tuple[torch.Tensor, ...], architecture: Architecture) -> torch.Tensor:
    """Sums what each weight is worth over the rows and columns that belong to a channel.

    Takes a matrix for each of a module's `PROJECTIONS`, gives shape (width of its waist,), float64
    on the CPU. Under grouped queries a row of K or V serves one channel of every query head that
    reads it, and each has an equal share of it. So what the channels of a group add up to is what
    goes with the group, every weight counted once; and the heads of one group, none of which takes
    the row along when it goes alone, have the same share of it.
    """
    *readers, writer = matrices
    total = writer.sum(dim=0).cpu().double()
    for matrix in readers:
        rows = matrix.sum(dim=1).cpu().double()
        sharing = len(total) // len(rows)
        if sharing > 1:
            heads = rows.unflatten(0, (-1, architecture.head_dim))
            rows = heads.repeat_interleave(sharing, dim=0).flatten() / sharing
        total += rows
    return total


def projection_weights(model: LlamaForCausalLM, number: int, module: str) -> list[torch.Tensor]:
    """The weights of a module's `PROJECTIONS` in layer `number`."""
    layer = model.model.layers[number]
    return [layer.get_submodule(name).weight for name in PROJECTIONS[module]]


def collect_saliences(
    model: LlamaForCausalLM,
    windows: Windows,
    architecture: Architecture,
    progress: Progress = silent,
) -> dict[str, torch.Tensor]:
    """Σ |weight · gradient| over the weights of each channel, by module, (layers, width), float64.

    The gradient is that of the summed next-token NLL of all windows, in nats; biases are left out.
    It is summed over windows in float32. Costs a forward and a backward pass and two more through
    the layers; memory is about 2 √layers residual streams of all windows, and one layer's gradient
    in float32.

    Raises:
        TransActError: an activation or a gradient is NaN or infinite.
    """
    stage, layers = "Measuring gradients", len(model.model.layers)
    stride = math.ceil(math.sqrt(layers))
    stream = Stream(model, windows)
    before = {}
    for number in range(layers):
        progress(stage, number, 2 * layers)
        if number % stride == 0:
            before[number] = stream.hidden.clone()
        stream.pass_layer(number)
    gradient = _of_hidden(model, stream.hidden, windows)
    rows: dict[str, list[torch.Tensor]] = {module: [] for module in MODULES}
    for first in sorted(before, reverse=True):
        stream.hidden = before.pop(first)
        numbers = range(first, min(first + stride, layers))
        inputs = []
        for number in numbers:
            inputs.append(stream.hidden.clone())
            if number < numbers[-1]:
                stream.pass_layer(number)
        for number in reversed(numbers):
            progress(stage, 2 * layers - 1 - number, 2 * layers)
            sums = _through_layer(
                model.model.layers[number], inputs.pop(), gradient, stream.rotary, architecture
            )
            for module, each in sums.items():
                if not each.isfinite().all():
                    # The loss spreads it everywhere; a forward pass knows where it began.
                    collect(model, windows)
                    raise TransActError(
                        f"The gradient of the {module} of layer {number} is NaN or infinite; "
                        "compute in float32."
                    )
                rows[module].append(each)
    progress(stage, 2 * layers, 2 * layers)
    return {module: torch.stack(each[::-1]) for module, each in rows.items()}


def _of_hidden(model: LlamaForCausalLM, hidden: torch.Tensor, windows: Windows) -> torch.Tensor:
    """The gradient of the loss by the last residual stream, shaped and typed like it."""
    gradients = []
    for states, window in zip(hidden, windows.ids.to(hidden.device), strict=True):
        with torch.enable_grad():
            states = states.detach().requires_grad_()
            logits = model.lm_head(model.model.norm(states))[:-1].float()
            loss = functional.cross_entropy(logits, window[1:], reduction="sum")
            gradients += torch.autograd.grad(loss, [states])
    return torch.stack(gradients)


def _through_layer(
    layer: nn.Module,
    inputs: torch.Tensor,
    gradient: torch.Tensor,
    rotary: Rotary,
    architecture: Architecture,
) -> dict[str, torch.Tensor]:
    """Carries the gradient from behind a layer to before it, in place; gives its saliences.

    `inputs` is the residual stream before the layer and `gradient` that of the loss, both of shape
    (windows, sequence_length, hidden_size).
    """
    twin = copy.deepcopy(layer, {id(tensor): tensor for tensor in layer.parameters()})
    leaves = {}
    for module in MODULES:
        for name in PROJECTIONS[module]:
            projection = twin.get_submodule(name)
            leaves[name] = projection.weight = nn.Parameter(projection.weight.detach())
    totals: dict[str, torch.Tensor] = {}
    for hidden, slot in zip(inputs.split(1), gradient.split(1), strict=True):
        with torch.enable_grad():
            hidden = hidden.detach().requires_grad_()
            after = hidden + run_attention(twin, hidden, rotary)[0]
            after = after + run_mlp(twin, after)[0]
            back, *found = torch.autograd.grad(after, [hidden, *leaves.values()], slot)
        slot.copy_(back)
        for name, each in zip(leaves, found, strict=True):
            totals[name] = totals[name].add_(each) if name in totals else each.float()
    with torch.no_grad():
        return {
            module: channel_sums(
                tuple(totals.pop(name).mul_(leaves[name]).abs_() for name in PROJECTIONS[module]),
                architecture,
            )
            for module in MODULES
        }
