"""Evidence to a score for each attention head and each MLP channel; low scores are cut first.

An importance is a function of the evidence, registered by one decorator line:

    @register("name")
    def name(evidence: Evidence) -> Scores: ...

Evidence is measured when a function asks for it; what no function asks for is not measured.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd
import torch
from transformers import PreTrainedModel

from transact_core.base.errors import Progress, TransActError, silent
from transact_core.data.windows import Windows
from transact_core.forward.layers import layers_of
from transact_core.forward.statistics import ActivationStatistics, ModuleStatistics, collect
from transact_core.forward.waists import MODULES, output_projections
from transact_core.importance.elimination import FLOOR, RIDGE, eliminate
from transact_core.importance.gradients import channel_sums, collect_saliences, projection_weights
from transact_core.models.architecture import Architecture

Tensors = dict[str, torch.Tensor]
Remember = Callable[[str, Callable[[], Tensors]], Tensors]
"""Called as ``remember(what, measure)``; gives what ``measure`` gives, or gave before."""


@dataclass(frozen=True)
class Scores:
    """Float64 on the CPU; comparable inside a layer and module, not across them."""

    heads: torch.Tensor
    """Shape (layers, num_attention_heads)."""
    head_channels: torch.Tensor
    """Of the attention's channels, shape (layers, num_attention_heads × head_dim)."""
    channels: torch.Tensor
    """Of the MLP's channels, shape (layers, intermediate_size)."""

    def to_frame(self, importance: str) -> pd.DataFrame:
        """One row a unit: layer, module, unit (head or channel), index, importance, score."""
        blocks = (
            ("mha", "head", self.heads),
            ("mha", "channel", self.head_channels),
            ("mlp", "channel", self.channels),
        )
        frames = []
        for module, unit, scores in blocks:
            layers, width = scores.shape
            frames.append(
                pd.DataFrame(
                    {
                        "layer": torch.arange(layers).repeat_interleave(width).numpy(),
                        "module": module,
                        "unit": unit,
                        "index": torch.arange(width).repeat(layers).numpy(),
                        "importance": importance,
                        "score": scores.flatten().numpy(),
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)


class Evidence:
    """What an importance may use: one model, its calibration windows, and measurements on them.

    Each measurement is made once, when it is first asked for. `remember` may keep measurements
    beyond that. It is given a description that names everything but the model and the windows, and
    is called only for passes over the windows, never for what depends on the weights alone.

    Raises:
        TransActError: the model's layers have widths of their own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        windows: Windows,
        architecture: Architecture,
        seed: int = 0,
        progress: Progress = silent,
        remember: Remember = lambda _, measure: measure(),
    ) -> None:
        if not architecture.uniform:
            raise TransActError(
                "The layers of this model have widths of their own, so its units are not scored "
                "and it is not cut again; cut the dense model that it was made of."
            )
        self.model = model
        self.windows = windows
        self.architecture = architecture
        self.seed = seed
        self._progress = progress
        self._remember = remember
        self._known: dict[str, Tensors] = {}
        self._column_norms: Tensors = {}
        """Of both modules, from one reading of the weights."""

    @property
    def statistics(self) -> ActivationStatistics:
        """Sums of the activations; one forward pass without the LM head."""
        tensors = self._measured(
            "activations and the residual stream",
            lambda: collect(self.model, self.windows, self._progress).to_tensors(),
        )
        return ActivationStatistics.from_tensors(tensors, self.windows.tokens)

    @property
    def saliences(self) -> Tensors:
        """`gradients.collect_saliences`, by module; a backward pass layer by layer."""
        return self._measured(
            "saliences",
            lambda: collect_saliences(self.model, self.windows, self.architecture, self._progress),
        )

    @property
    def elimination(self) -> Tensors:
        """`elimination.eliminate`, by unit; one forward pass with second moments."""
        return self._measured(
            f"elimination in rounds, ridge {RIDGE:g} and floor {FLOOR:g}",
            lambda: eliminate(self.model, self.windows, self._progress),
        )

    def _measured(self, what: str, measure: Callable[[], Tensors]) -> Tensors:
        # Not a `cached_property`: in Python 3.11 that holds one lock for all instances, and a page
        # would wait for a pass over another model.
        if what not in self._known:
            self._known[what] = self._remember(what, measure)
        return self._known[what]

    def column_norms(self, module: str) -> torch.Tensor:
        """L2 norm of each column of a module's output projection, (layers, width), float64."""
        if not self._column_norms:
            layers = layers_of(self.model)
            norms: dict[str, list[torch.Tensor]] = {each: [] for each in MODULES}
            for layer_index in range(len(layers)):
                with layers.borrow(layer_index) as layer:
                    for each, projection in output_projections(layer).items():
                        columns = projection.weight.detach().float().norm(dim=0)
                        norms[each].append(columns.cpu())
            self._column_norms = {each: torch.stack(rows).double() for each, rows in norms.items()}
        return self._column_norms[module]


Importance = Callable[[Evidence], Scores]
IMPORTANCES: dict[str, Importance] = {}


def register(name: str) -> Callable[[Importance], Importance]:
    """Makes a function of the evidence an importance, under the name it is chosen by."""

    def add(function: Importance) -> Importance:
        IMPORTANCES[name] = function
        return function

    return add


def score(importance: str, evidence: Evidence) -> Scores:
    """Scores by the registered importance of that name.

    Raises:
        TransActError: no importance has that name, or what it measures is NaN or infinite.
    """
    if importance not in IMPORTANCES:
        raise TransActError(
            f"The importance {importance!r} is not known; choose {', '.join(IMPORTANCES)}."
        )
    return IMPORTANCES[importance](evidence)


def head_scores(channel_scores: torch.Tensor, head_dim: int) -> torch.Tensor:
    """`mean(s) + (10 / head_dim) · max(s)` over each head's channels.

    Takes (layers, heads × head_dim), gives (layers, heads). Source: TransAct, head importance.
    """
    per_head = channel_scores.unflatten(-1, (-1, head_dim))
    return per_head.mean(dim=-1) + 10 / head_dim * per_head.amax(dim=-1)


def _from_channels(evidence: Evidence, mha: torch.Tensor, mlp: torch.Tensor) -> Scores:
    """Heads by TransAct's mean and maximum of their channels."""
    heads = head_scores(mha, evidence.architecture.head_dim)
    return Scores(heads=heads, head_channels=mha, channels=mlp)


@register("activation")
def activation(evidence: Evidence) -> Scores:
    """TransAct's score: `s_j = sqrt(Σ_tokens a_j²)` of the transitional activation.

    Source: Shen et al. 2024 (arXiv 2407.05690), transitional activation magnitude.
    """
    statistics = evidence.statistics
    return _from_channels(evidence, statistics.mha.norm, statistics.mlp.norm)


@register("activation-weight")
def activation_weight(evidence: Evidence) -> Scores:
    """`s_j = sqrt(Σ_tokens a_j²) · ‖W_j‖`: the norm of what channel j alone writes.

    a is the transitional activation and W_j column j of the output projection. Heads by TransAct's
    mean and maximum. Source: Sun et al. 2023, Wanda (arXiv 2306.11695), |weight| · activation norm,
    with the L2 norm over the weights of a column in place of a score for each weight.
    """
    mha, mlp = (
        getattr(evidence.statistics, module).norm * evidence.column_norms(module)
        for module in MODULES
    )
    return _from_channels(evidence, mha, mlp)


@register("fluctuation")
def fluctuation(evidence: Evidence) -> Scores:
    """`s_j = Σ_tokens (a_j − mean a_j)² / (tokens − 1) · ‖W_j‖²`: what a bias could not replace.

    a is the transitional activation and W_j column j of the output projection. A head's score is
    the mean of its channels', as in the source, without TransAct's share for the maximum: these
    are energies, and what the channels of a head write adds up. The source then standardises, so
    that it can compare layers and modules; that changes no order within one. Source: An et al.
    2024, FLAP (arXiv 2312.11983), weighted input feature variance.
    """
    mha, mlp = (
        _variance(getattr(evidence.statistics, module)) * evidence.column_norms(module).square()
        for module in MODULES
    )
    heads = mha.unflatten(-1, (-1, evidence.architecture.head_dim)).mean(dim=-1)
    return Scores(heads=heads, head_channels=mha, channels=mlp)


def _variance(statistics: ModuleStatistics) -> torch.Tensor:
    about_mean = statistics.sum_of_squares - statistics.sum.square() / statistics.tokens
    return about_mean.clamp_min(0) / max(1, statistics.tokens - 1)


@register("taylor")
def taylor(evidence: Evidence) -> Scores:
    """`s_j = Σ |w · ∂L/∂w|` over the weights that go with channel j, L the summed next-token NLL.

    Those are row j of Q, K, V and column j of O, or row j of gate and up and column j of down;
    heads by TransAct's mean and maximum. Under grouped queries the heads of a group share the rows
    of K and V equally, for the reason `gradients.channel_sums` gives. Sources: Ma et al. 2023,
    LLM-Pruner (arXiv 2305.11627), first-order importance of a coupled structure; Shen et al. 2024
    (arXiv 2407.05690), the ablation.
    """
    return _from_channels(evidence, evidence.saliences["mha"], evidence.saliences["mlp"])


@register("reconstruction")
def reconstruction(evidence: Evidence) -> Scores:
    """Backward elimination with the output projection refitted after each removal (OBS pruning).

    A channel's score is its position in the order of elimination, a head's the squared error that
    its removal added. Heads are eliminated as wholes and do not depend on their channels' scores;
    `elimination.head_energies` says how groups of heads are treated, and the docstring of
    `elimination` what is minimised, with the sources.
    """
    return Scores(**evidence.elimination)


@register("magnitude")
def magnitude(evidence: Evidence) -> Scores:
    """`s_j = sqrt(Σ w²)` over the weights that go with channel j; a baseline without any data.

    Rows and columns, and shares under grouped queries, as for `taylor`; heads by TransAct's mean
    and maximum. Source: Li et al. 2017, Pruning filters for efficient convnets (arXiv 1608.08710),
    with the L2 norm.
    """
    layers = layers_of(evidence.model)
    squares: dict[str, list[torch.Tensor]] = {module: [] for module in MODULES}
    for layer_index in range(len(layers)):
        with layers.borrow(layer_index) as layer:
            for module in MODULES:
                squared = {
                    name: weight.detach().float().square()
                    for name, weight in projection_weights(layer, module).items()
                }
                squares[module].append(channel_sums(squared, module, evidence.architecture))
    mha, mlp = (torch.stack(squares[module]).sqrt() for module in MODULES)
    return _from_channels(evidence, mha, mlp)


@register("random")
def random(evidence: Evidence) -> Scores:
    """Uniform in [0, 1), drawn from the seed, heads independently of channels; the baseline."""
    generator = torch.Generator().manual_seed(evidence.seed)
    shape = evidence.architecture
    heads, head_channels, channels = (
        torch.rand(shape.num_hidden_layers, width, generator=generator, dtype=torch.float64)
        for width in (shape.num_attention_heads, shape.mha_width, shape.intermediate_size)
    )
    return Scores(heads=heads, head_channels=head_channels, channels=channels)
