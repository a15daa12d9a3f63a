"""The importance matrix that llama.cpp quantises with: how large the inputs of each matrix are.

For each projection of a decoder layer the mean square of each of its input channels over tokens,
as llama.cpp's own tool (`llama-imatrix`) collects it. Quantisation then minimises errors weighted
by these. Embedding and LM head have none there either.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel

from transact_core.base.errors import Progress, silent
from transact_core.base.linalg import in_float64
from transact_core.data.windows import Windows
from transact_core.models.families.table import family_of

SMALLEST = 1e-12
"""Smallest mean square that is kept: a channel that is always zero would have no weight at all, and
a block of such channels no scale."""
ALONE = {"self_attn": "o_proj", "mlp": "down_proj"}
"""The projection of each module that reads the transitional activation."""

Imatrix = dict[str, np.ndarray]
"""Mean squares, float32 of shape (columns,), by the name of the weight in transformers."""


@torch.inference_mode()
def importance_matrix(
    model: PreTrainedModel, windows: Windows, progress: Progress = silent
) -> Imatrix:
    """Mean squares of the input channels of every projection, each window fed alone."""
    stage = "Measuring the importance matrix"
    family = family_of(model.config.model_type)
    # Projections of a module that read the same input, which is observed at the first.
    shared = {"self_attn": tuple(family.attention_inputs), "mlp": tuple(family.mlp_inputs)}
    with _observed(model, shared) as sums:
        for done, window in enumerate(windows.ids.to(model.device)):
            progress(stage, done, len(windows))
            model.model(window[None], use_cache=False)
    progress(stage, len(windows), len(windows))
    matrix: Imatrix = {}
    for layer_index in range(len(model.model.layers)):
        for module, inputs in shared.items():
            for first, names in ((inputs[0], inputs), (ALONE[module], (ALONE[module],))):
                prefix = f"model.layers.{layer_index}.{module}"
                means = (sums[f"{prefix}.{first}"] / windows.tokens).float().cpu().numpy()
                for name in names:
                    matrix[f"{prefix}.{name}.weight"] = np.maximum(means, SMALLEST)
    return matrix


@contextmanager
def _observed(
    model: PreTrainedModel, shared: Mapping[str, Sequence[str]]
) -> Iterator[dict[str, torch.Tensor]]:
    """Sums of squares of inputs, by the name of the projection, while the model runs."""
    sums: dict[str, torch.Tensor] = {}
    hooks = []

    def observe(name: str):
        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].flatten(0, -2).float().square().sum(dim=0)
            sums[name] = sums.get(name, 0) + in_float64(squares)

        return add

    try:
        for layer_index, layer in enumerate(model.model.layers):
            for module, inputs in shared.items():
                for part in (inputs[0], ALONE[module]):
                    name = f"{module}.{part}"
                    hook = observe(f"model.layers.{layer_index}.{name}")
                    hooks.append(layer.get_submodule(name).register_forward_pre_hook(hook))
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
