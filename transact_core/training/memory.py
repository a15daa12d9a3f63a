"""How much memory a training takes beside the models that are loaded, before it begins."""

from math import prod

import torch

from transact_core.base.errors import TransActError
from transact_core.forward.perplexity import LOGITS_AT_ONCE
from transact_core.models.architecture import Architecture
from transact_core.models.devices import free_memory
from transact_core.training.student import Method

FLOAT = 4
"""Bytes of float32, which weights, gradients and moments are kept in."""
OF_TRAINED = 4
"""Numbers for each trained weight: itself, its gradient, and two moments."""
HIDDEN_KEPT, HEADS_KEPT, CHANNELS_KEPT = 10, 5, 5
"""Activations of a layer that the backward pass needs, for each token, as multiples of the residual
stream, the width of the heads and that of the MLP."""
LOGITS_KEPT = 5
"""Tensors as large as the logits of one chunk: student's and teacher's, their probabilities, and
the gradient."""


def training_bytes(
    architecture: Architecture, method: Method, rank: int, tokens_at_once: int
) -> int:
    """Bytes at the peak; `tokens_at_once` run through the model together."""
    matrices = [
        shape
        for layer in range(architecture.num_hidden_layers)
        for shape in architecture.layer_tensors(layer).values()
    ]
    own = sum(prod(shape) for shape in matrices)
    trained = own
    if method == "lora":
        trained = sum(rank * sum(shape) for shape in matrices if len(shape) == 2)
    kept = HIDDEN_KEPT * architecture.hidden_size + HEADS_KEPT * architecture.mha_width
    kept += CHANNELS_KEPT * architecture.intermediate_size
    numbers = OF_TRAINED * trained + (own if method == "lora" else 0)
    numbers += architecture.num_hidden_layers * tokens_at_once * kept
    at_once = min(LOGITS_AT_ONCE, tokens_at_once * architecture.vocab_size)
    return FLOAT * (numbers + LOGITS_KEPT * at_once)


def models_bytes(student: Architecture, teacher: Architecture, teacher_dtype: torch.dtype) -> int:
    """Bytes of both models as they are loaded; the student in float32."""
    return FLOAT * student.parameters + teacher_dtype.itemsize * teacher.parameters


def require_memory(
    architecture: Architecture,
    method: Method,
    rank: int,
    tokens_at_once: int,
    device: torch.device,
) -> None:
    """Refuses a training that is estimated to take more memory than is free.

    Raises:
        TransActError: it is; the sentence says how much.
    """
    needed = training_bytes(architecture, method, rank, tokens_at_once)
    free = free_memory(device)
    if needed > free:
        other = "" if method == "lora" else ", train by --method lora"
        raise TransActError(
            f"Training takes about {needed / 1e9:.1f} GB of memory on {device} beside the models, "
            f"where {free / 1e9:.1f} GB are free; free some memory{other}, or choose a shorter "
            "sequence length."
        )
