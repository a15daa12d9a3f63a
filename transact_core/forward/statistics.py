"""Statistics of the activations, from one pass over the calibration windows.

The transitional activation of a module is what its output projection reads: the concatenated head
outputs before `o_proj`, and `silu(gate(x)) * up(x)` before `down_proj`. The inter-module activation
is the residual stream, observed where it enters a layer. Only sums over tokens are kept, and the
windows run through the layers in chunks, so memory is bounded however many windows there are.
"""

from dataclasses import dataclass, replace

import pandas as pd
import torch
from transformers import PreTrainedModel

from transact_core.base.errors import Progress, silent
from transact_core.base.linalg import in_float64
from transact_core.data.windows import Windows
from transact_core.forward.layers import layers_of
from transact_core.forward.stream import Stream
from transact_core.forward.waists import MODULES, SITES, Finite, windows_a_batch

SUMS = ("sum", "sum_of_squares", "max_abs")
CHUNK_BATCHES = 16
"""Batches of windows whose residual streams are held at a time, about 32,768 tokens: each layer is
borrowed once for all of them."""


@dataclass(frozen=True)
class ModuleStatistics:
    """Sums over calibration tokens at one site, shape (layers, width), float64 on the CPU."""

    sum: torch.Tensor
    sum_of_squares: torch.Tensor
    max_abs: torch.Tensor
    tokens: int

    @property
    def norm(self) -> torch.Tensor:
        """`sqrt(Σ a²)` over tokens: TransAct's channel score."""
        return self.sum_of_squares.sqrt()

    @property
    def rms(self) -> torch.Tensor:
        """Root mean square over tokens: the norm without its dependence on their number."""
        return (self.sum_of_squares / self.tokens).sqrt()

    @property
    def layer_rms(self) -> torch.Tensor:
        """Root mean square over tokens and channels, shape (layers,)."""
        return (self.sum_of_squares.mean(dim=1) / self.tokens).sqrt()


@dataclass(frozen=True)
class ActivationStatistics:
    mha: ModuleStatistics
    mlp: ModuleStatistics
    residual: ModuleStatistics
    """Of the residual stream as it enters each layer: its width is `hidden_size`."""

    @property
    def tokens(self) -> int:
        return self.mha.tokens

    def to_frame(self) -> pd.DataFrame:
        """One row a layer and site: how large the activations are and how they are spread.

        `rms` is over tokens and channels; `low`, `median`, `high` and `largest` are the 5th, 50th
        and 95th percentile and the maximum over channels of a channel's RMS over tokens; `peak` is
        the largest absolute value of any token, `outlier` that value over `rms`.
        """
        return pd.concat([_spread(site, getattr(self, site)) for site in SITES], ignore_index=True)

    def to_tensors(self) -> dict[str, torch.Tensor]:
        """The sums by name, as `from_tensors` takes them."""
        return {
            f"{site}.{name}": getattr(getattr(self, site), name) for site in SITES for name in SUMS
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor], tokens: int) -> "ActivationStatistics":
        return cls(
            **{
                site: ModuleStatistics(
                    **{name: tensors[f"{site}.{name}"] for name in SUMS}, tokens=tokens
                )
                for site in SITES
            }
        )


def _spread(site: str, statistics: ModuleStatistics) -> pd.DataFrame:
    low, median, high = statistics.rms.quantile(torch.tensor([0.05, 0.5, 0.95]).double(), dim=1)
    columns = {
        "rms": statistics.layer_rms,
        "low": low,
        "median": median,
        "high": high,
        "largest": statistics.rms.amax(dim=1),
        "peak": statistics.max_abs.amax(dim=1),
    }
    columns["outlier"] = columns["peak"] / columns["rms"]
    values = {name: column.numpy() for name, column in columns.items()}
    return pd.DataFrame({"layer": range(len(low)), "site": site, **values})


@torch.inference_mode()
def collect(
    model: PreTrainedModel, windows: Windows, progress: Progress = silent
) -> ActivationStatistics:
    """Runs the model without its LM head over the windows and sums up its activations.

    Raises:
        TransActError: an activation is NaN or infinite.
    """
    layers = layers_of(model)
    sums = {site: _Sums(site, len(layers)) for site in SITES}
    at_once = windows_a_batch(windows.sequence_length)
    done, total = 0, -(-len(windows) // at_once) * len(layers)
    for ids in windows.ids.split(at_once * CHUNK_BATCHES):
        stream = Stream(model, replace(windows, ids=ids))
        for layer_index in range(len(layers)):
            with stream.enter(layer_index):
                for hidden in stream.batches():
                    sums["residual"].add(layer_index, hidden)
                sums["residual"].require_finite(layer_index)
                for module in MODULES:
                    for transitional, *_ in stream.advance(layer_index, module):
                        # A batch may take many seconds, so each one reports in each layer.
                        if module == MODULES[0]:
                            progress("Measuring activations", done, total)
                            done += 1
                        sums[module].add(layer_index, transitional)
                    sums[module].require_finite(layer_index)
    progress("Measuring activations", total, total)
    return ActivationStatistics(
        **{site: total.finish(windows.tokens) for site, total in sums.items()}
    )


class _Sums:
    """Running sums of one site over all layers."""

    def __init__(self, site: str, layers: int) -> None:
        self.site = site
        self._of_layers: list[dict[str, torch.Tensor]] = [{} for _ in range(layers)]

    def add(self, layer_index: int, activation: torch.Tensor) -> None:
        """Adds an activation of one layer, shape (…, width)."""
        # A batch is short enough to be summed in float32. The long sums need float64, and are kept
        # on the device where it has that, so that no batch waits for a copy to the CPU.
        flat = activation.reshape(-1, activation.shape[-1]).float()
        found = dict(
            zip(SUMS, (flat.sum(0), flat.square().sum(0), flat.abs().amax(0)), strict=True)
        )
        sums = self._of_layers[layer_index]
        for name, values in found.items():
            values = in_float64(values)
            if name not in sums:
                sums[name] = values
            elif name == "max_abs":
                torch.maximum(sums[name], values, out=sums[name])
            else:
                sums[name] += values

    def require_finite(self, layer_index: int) -> None:
        """Refuses sums that no score could be made of.

        Raises:
            TransActError: one is NaN or infinite.
        """
        finite = Finite(layer_index, self.site)
        finite.add(self._of_layers[layer_index]["sum_of_squares"])
        finite.require()

    def finish(self, tokens: int) -> ModuleStatistics:
        return ModuleStatistics(
            **{name: torch.stack([sums[name].cpu() for sums in self._of_layers]) for name in SUMS},
            tokens=tokens,
        )


def energy_shares(statistics: ModuleStatistics) -> torch.Tensor:
    """Cumulative shares of the energy `Σ a²` of each layer's channels, largest channel first.

    Shape (layers, width); the last column is 1. A layer without any energy has zeros.
    """
    ordered = statistics.sum_of_squares.sort(dim=1, descending=True).values.cumsum(dim=1)
    return ordered / ordered[:, -1:].clamp_min(torch.finfo(torch.float64).tiny)


def channels_holding(statistics: ModuleStatistics, share: float = 0.9) -> torch.Tensor:
    """How many of a layer's channels hold `share` of its energy, as a share of its width.

    Shape (layers,), values in (0, 1].
    """
    shares = energy_shares(statistics)
    needed = (shares < share).sum(dim=1) + 1
    return needed.clamp_max(shares.shape[1]) / shares.shape[1]
