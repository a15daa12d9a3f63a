"""What the model loses when its activations are changed on the way.

The model is run by `streams`, which lets an activation be changed as it passes, so nothing is
hooked into the model and nothing of it is modified. A site is one of `activations.SITES`: the
waists of both modules, and the residual stream as it enters a layer.
"""

from collections.abc import Callable

import torch
from transformers import LlamaForCausalLM

from transact_core.data.windows import Windows
from transact_core.forward.perplexity import Evaluation, losses_behind_layers, require_losses
from transact_core.forward.stream import Changes, Stream


@torch.no_grad()
def evaluate_changed(
    model: LlamaForCausalLM,
    windows: Windows,
    changes: Changes,
    after_layer: Callable[[], None] = lambda: None,
    begun: Stream | None = None,
    first: int = 0,
) -> Evaluation:
    """Scores every window alone, as `evaluation.evaluate` does, with changed activations.

    `begun` is the windows' stream as it stands before layer `first`; it is left where it stands.

    Raises:
        TransActError: an activation or the loss is not a number.
    """
    stream = begun.fork() if begun else Stream(model, windows)
    for number in range(first, len(model.model.layers)):
        stream.pass_layer(number, changes)
        after_layer()
    return Evaluation(require_losses(losses_behind_layers(model, stream.hidden, windows)))
