"""How much memory a cut takes at its peak, beside the dense model, before it is made.

What is counted is what grows with the model and the text: the cut projections of the pruned model,
which are its own; the residual stream of the calibration windows; one module's outputs and
activations on them; and the second moments of its features. `benchmarks.cost --peak-memory` holds
the estimate against what was measured.
"""

from collections.abc import Iterable
from math import prod

from transact_core.models.architecture import Architecture
from transact_core.pruning.closed_form import FOLDS

STREAMS = 4
"""Tensors as large as the residual stream that a repair holds at once: the stream itself, the
module's output, what of it is missing, and what a repair leaves of that."""
MOMENTS = 2
"""Square matrices as wide as the features, in float32, that a repair by least squares holds at
once beside what it keeps of the folds."""


def cut_bytes(
    dense: Architecture,
    cut: Architecture,
    recovery: str,
    calibration_tokens: int,
    itemsize: int,
    layer_by_layer: bool = False,
    layers: Iterable[int] | None = None,
) -> int:
    """Peak bytes of cutting and repairing. `cut` is what is left, `itemsize` that of a weight.

    With `layer_by_layer` each layer of the cut is written and let go of before the next is made.
    `layers` are those of one device where the layers are on several; what a repair holds at once is
    on each of them at some time.
    """
    own_of_layers = []
    for layer_index in range(dense.num_hidden_layers) if layers is None else layers:
        before = dense.layer_tensors(layer_index)
        after = cut.layer_tensors(layer_index)
        # All projections of a cut module are its own, also those that keep their width.
        changed = {_module(name) for name, shape in after.items() if shape != before.get(name)}
        own_of_layers.append(
            sum(prod(shape) for name, shape in after.items() if _module(name) in changed)
        )
    needed = (max(own_of_layers) if layer_by_layer else sum(own_of_layers)) * itemsize
    widths = [
        width
        for width, before in (
            (cut.mha_width, dense.mha_width),
            (cut.intermediate_size, dense.intermediate_size),
        )
        if width < before
    ]
    if recovery == "none" or not widths:
        return needed
    hidden, width = dense.hidden_size, max(widths)
    # Where a norm stands behind the modules, what they write is kept beside what of it is missing.
    behind = any(norms.after for norms in dense.family.norms.values())
    needed += calibration_tokens * ((STREAMS + behind) * hidden + width) * itemsize
    if recovery == "least-squares":
        # Of each fold its second moments, or its rows where they are fewer.
        of_folds = min(FOLDS * width, calibration_tokens) * (width + hidden)
        needed += 4 * (MOMENTS * width**2 + of_folds)
    return needed


def _module(tensor_name: str) -> str:
    return tensor_name.partition(".")[0]
