"""Transitional activations: where they are in a decoder layer, and how their units are counted.

The transitional activation of a module is the input of its output projection: `o_proj` for the
attention, `down_proj` for the MLP.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from transact_core.base.errors import TransActError
from transact_core.data.windows import Windows

MODULES = ("mha", "mlp")
SITES = (*MODULES, "residual")
"""Where activations are observed: the waists of both modules, and the residual stream as it enters
a layer."""
BATCH_TOKENS = 2048
"""Tokens that run through a module at a time: enough to keep the matrix products efficient, few
enough that their activations are small beside the residual stream of all windows."""


def windows_a_batch(sequence_length: int) -> int:
    """Windows that make about `BATCH_TOKENS` tokens, one at least."""
    return max(1, BATCH_TOKENS // sequence_length)


def batches(windows: Windows, device: torch.device) -> Iterator[torch.Tensor]:
    """Windows in batches of about `BATCH_TOKENS` tokens, shape (batch, sequence_length)."""
    yield from windows.ids.to(device).split(windows_a_batch(windows.sequence_length))


def output_projections(layer: nn.Module) -> dict[str, nn.Linear]:
    """The projections of a decoder layer whose inputs are its transitional activations."""
    return {"mha": layer.self_attn.o_proj, "mlp": layer.mlp.down_proj}


def head_rows(heads: Sequence[int], head_dim: int) -> torch.Tensor:
    """Positions of whole heads in an attention's waist, in the order of the heads."""
    return (torch.tensor(heads)[:, None] * head_dim + torch.arange(head_dim)).flatten()


class Finite:
    """Whether the activations of one layer's site are numbers, looked at once for all batches.

    To look is to wait for the device, which meanwhile gets nothing new to compute.
    """

    def __init__(self, layer_index: int, site: str) -> None:
        self._layer_index, self._site = layer_index, site
        self._sum: torch.Tensor | None = None

    def add(self, values: torch.Tensor) -> None:
        """Notes values that are to be looked at."""
        # One sum is tested instead of every value; float16 alone could not hold it. Once a sum is
        # NaN or infinite, adding to it does not make it a number again.
        part = values.sum(dtype=torch.promote_types(values.dtype, torch.float32))
        self._sum = part if self._sum is None else self._sum + part

    def require(self) -> None:
        """Refuses activations that no score could be made of.

        Raises:
            TransActError: a value is NaN or infinite.
        """
        if self._sum is None or self._sum.isfinite():
            return
        what = (
            f"residual stream that enters layer {self._layer_index}"
            if self._site == "residual"
            else f"transitional activation of the {self._site} of layer {self._layer_index}"
        )
        raise TransActError(
            f"The {what} is NaN or infinite; compute in float32, and if it stays so the weights "
            "are damaged."
        )
