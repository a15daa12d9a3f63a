"""Statistics of the activations, from one streamed pass over calibration windows.

The transitional activation of a module is what its output projection reads: the concatenated head
outputs before `o_proj`, and `silu(gate(x)) * up(x)` before `down_proj`. The inter-module activation
is the residual stream, looked at where it enters a layer. Only sums over tokens are kept, so memory
does not grow with the number of calibration tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

import pandas as pd
import torch
from transformers import LlamaForCausalLM

from transact_core.base.errors import Progress, silent
from transact_core.data.windows import Windows
from transact_core.forward.waists import SITES, batches, require_finite, transitional_inputs

SUMS = ("sum", "sum_of_squares", "max_abs")


@dataclass(frozen=True)
class ModuleStatistics:
    """Sums over calibration tokens at one site, shape (layers, width), float64, on the CPU."""

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
        """Root mean square over tokens: the norm made independent of how many there were."""
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
    model: LlamaForCausalLM, windows: Windows, progress: Progress = silent
) -> ActivationStatistics:
    """Runs the model without its LM head over the windows and sums up its activations.

    Raises:
        TransActError: an activation is NaN or infinite.
    """
    layers = len(model.model.layers)
    sums = {site: _Sums(site, layers, width) for site, width in _widths(model).items()}
    split = list(batches(windows, model.device))
    total, passed = len(split) * layers, count()

    def report() -> None:
        progress("Measuring activations", next(passed), total)

    with _watching(model, sums, report):
        for batch in split:
            model.model(batch, use_cache=False)
    report()
    return ActivationStatistics(
        **{name: total.finish(windows.tokens) for name, total in sums.items()}
    )


def _widths(model: LlamaForCausalLM) -> dict[str, int]:
    waists = {name: each.in_features for name, each in transitional_inputs(model, 0).items()}
    return {**waists, "residual": model.config.hidden_size}


class _Sums:
    """Running sums of one site over all layers."""

    def __init__(self, site: str, layers: int, width: int) -> None:
        self.site = site
        # float64 is not to be had on every accelerator, and a batch's own sum is short enough for
        # float32: the long sum is kept on the CPU.
        self.sum, self.sum_of_squares, self.max_abs = torch.zeros(
            3, layers, width, dtype=torch.float64
        )

    def add(self, layer: int, activation: torch.Tensor) -> None:
        flat = activation.reshape(-1, activation.shape[-1]).float()
        self.sum[layer] += flat.sum(dim=0).cpu()
        self.sum_of_squares[layer] += flat.square().sum(dim=0).cpu()
        require_finite(self.sum_of_squares[layer], layer, self.site)
        torch.maximum(
            self.max_abs[layer], flat.abs().amax(dim=0).cpu().double(), out=self.max_abs[layer]
        )

    def finish(self, tokens: int) -> ModuleStatistics:
        return ModuleStatistics(
            sum=self.sum, sum_of_squares=self.sum_of_squares, max_abs=self.max_abs, tokens=tokens
        )


@contextmanager
def _watching(
    model: LlamaForCausalLM, sums: dict[str, _Sums], report: Callable[[], None]
) -> Iterator[None]:
    """Adds up the activations; reports at each layer, as a batch may take many seconds."""
    handles = []
    for layer, decoder in enumerate(model.model.layers):
        readers = {"residual": decoder.input_layernorm, **transitional_inputs(model, layer)}
        for site, reader in readers.items():

            def add(_, inputs, layer=layer, site=site):
                if site == "residual":
                    report()
                sums[site].add(layer, inputs[0])

            handles.append(reader.register_forward_pre_hook(add))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def energy_shares(statistics: ModuleStatistics) -> torch.Tensor:
    """Energy `Σ a²` of each layer's channels as cumulated shares, largest channel first.

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
