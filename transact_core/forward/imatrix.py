"""The importance matrix that llama.cpp quantises with: how large the inputs of each matrix are.

For each projection of a decoder layer the mean square of each of its input channels over tokens,
as llama.cpp's own tool (`llama-imatrix`) collects it. Quantisation then minimises errors weighted
by these. Embedding and LM head have none there either.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from transformers import LlamaForCausalLM

from transact_core.base.errors import Progress, silent
from transact_core.data.windows import Windows

SMALLEST = 1e-12
"""Smallest mean square that is kept: a channel that is always zero would have no weight at all, and
a block of such channels no scale."""
SHARED = {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("gate_proj", "up_proj")}
"""Projections of a module that read the same input; it is observed at the first."""
ALONE = {"self_attn": "o_proj", "mlp": "down_proj"}
"""The projection of each module that reads the transitional activation."""

Imatrix = dict[str, np.ndarray]
"""Mean squares, float32 of shape (columns,), by the name of the weight in transformers."""


@torch.inference_mode()
def importance_matrix(
    model: LlamaForCausalLM, windows: Windows, progress: Progress = silent
) -> Imatrix:
    """Mean squares of the input channels of every projection, each window fed alone."""
    stage = "Measuring the importance matrix"
    with _observed(model) as sums:
        for done, window in enumerate(windows.ids.to(model.device)):
            progress(stage, done, len(windows))
            model.model(window[None], use_cache=False)
    progress(stage, len(windows), len(windows))
    matrix: Imatrix = {}
    for layer_index in range(len(model.model.layers)):
        for module, shared in SHARED.items():
            for first, names in ((shared[0], shared), (ALONE[module], (ALONE[module],))):
                prefix = f"model.layers.{layer_index}.{module}"
                means = (sums[f"{prefix}.{first}"] / windows.tokens).float().cpu().numpy()
                for name in names:
                    matrix[f"{prefix}.{name}.weight"] = np.maximum(means, SMALLEST)
    return matrix


@contextmanager
def _observed(model: LlamaForCausalLM) -> Iterator[dict[str, torch.Tensor]]:
    """Sums of squares of inputs, by the name of the projection, while the model runs."""
    sums: dict[str, torch.Tensor] = {}
    hooks = []

    def observe(name: str):
        def add(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].flatten(0, -2).float().square().sum(dim=0)
            # In float32 where the device has no float64; windows add up on the CPU.
            sums[name] = sums.get(name, 0) + squares.cpu().double()

        return add

    try:
        for layer_index, layer in enumerate(model.model.layers):
            for module in SHARED:
                for part in (SHARED[module][0], ALONE[module]):
                    name = f"{module}.{part}"
                    hook = observe(f"model.layers.{layer_index}.{name}")
                    hooks.append(layer.get_submodule(name).register_forward_pre_hook(hook))
        yield sums
    finally:
        for hook in hooks:
            hook.remove()
