"""What the model loses when its activations are changed on the way.

The model is run by `stream`, which can change an activation as it passes, so the model itself is
not modified and carries no hooks. A site is one of `waists.SITES`: the waists of both modules, and
the residual stream as it enters a layer.
"""

from collections.abc import Callable

import torch
from transformers import PreTrainedModel

from transact_core.data.windows import Windows
from transact_core.forward.perplexity import Evaluation, losses_behind_layers, require_losses
from transact_core.forward.stream import Changes, Stream


@torch.no_grad()
def evaluate_changed(
    model: PreTrainedModel,
    windows: Windows,
    changes: Changes,
    after_layer: Callable[[], None] = lambda: None,
    begun: Stream | None = None,
    first: int = 0,
) -> Evaluation:
    """Scores every window alone, as `perplexity.evaluate` does, with changed activations.

    `begun` may be the windows' stream as it stands before layer `first`, which is then not run
    again; that stream is forked, not moved. `after_layer` is called after every layer.

    Raises:
        TransActError: an activation or the loss is not a number.
    """
    stream = begun.fork() if begun else Stream(model, windows)
    for layer_index in range(first, len(stream.layers)):
        stream.pass_layer(layer_index, changes)
        after_layer()
    return Evaluation(require_losses(losses_behind_layers(model, stream.hidden, windows)))
