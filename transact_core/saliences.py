"""First-order saliences: how much the loss would change, to first order, were a weight zero.

The only pass that goes backwards. It runs a copy of the model's modules on aliases of its weights:
the model itself is never asked for a gradient, and whoever else uses it is not disturbed.
"""

import copy

import torch
from torch.func import functional_call
from torch.nn import functional
from transformers import LlamaForCausalLM

from transact_core.activations import MODULES, collect
from transact_core.architecture import Architecture
from transact_core.corpora import Windows
from transact_core.errors import Progress, TransActError, silent

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
    It is gathered window by window in float32. Memory is one gradient of every projection that
    loses width, which for the whole model is nearly as much as its weights in float32, and what one
    window's backward pass holds.

    Raises:
        TransActError: an activation or a gradient is NaN or infinite.
    """
    layers = len(model.model.layers)
    leaves = {
        f"model.layers.{number}.{name}.weight": weight.detach().requires_grad_()
        for number in range(layers)
        for module in MODULES
        for name, weight in zip(
            PROJECTIONS[module], projection_weights(model, number, module), strict=True
        )
    }
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in model.parameters()})
    gradients: dict[str, torch.Tensor] = {}
    for done, window in enumerate(windows.ids.to(model.device)):
        progress("Measuring gradients", done, len(windows))
        with torch.enable_grad():
            output = functional_call(twin, leaves, (window[None],), {"use_cache": False})
            logits = output.logits[0, :-1].float()
            loss = functional.cross_entropy(logits, window[1:], reduction="sum")
            found = torch.autograd.grad(loss, list(leaves.values()))
        del output, logits, loss
        for name, gradient in zip(leaves, found, strict=True):
            if name in gradients:
                gradients[name] += gradient
            else:
                gradients[name] = gradient.float()
        del found
    progress("Measuring gradients", len(windows), len(windows))
    rows: dict[str, list[torch.Tensor]] = {module: [] for module in MODULES}
    with torch.no_grad():
        for number in range(layers):
            for module in MODULES:
                names = [f"model.layers.{number}.{name}.weight" for name in PROJECTIONS[module]]
                products = tuple(gradients.pop(name).mul_(leaves[name]).abs_() for name in names)
                sums = channel_sums(products, architecture)
                if not sums.isfinite().all():
                    # The loss spreads it everywhere; a forward pass knows where it began.
                    collect(model, windows)
                    raise TransActError(
                        f"The gradient of the {module} of layer {number} is NaN or infinite; "
                        "compute in float32."
                    )
                rows[module].append(sums)
    return {module: torch.stack(each) for module, each in rows.items()}
