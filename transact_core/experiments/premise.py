"""A test of the method's premise on a model: which activations tolerate a disturbance?

TransAct removes width at the waists of the modules and leaves the residual stream between them at
full width, because perplexity is said to suffer more from a disturbance of the stream (Shen et al.
2024, arXiv 2407.05690). Here the same disturbance is applied at each site, and perplexity measured.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace

import torch

from transact_core.base.errors import Progress, TransActError, silent
from transact_core.experiments.bench import Bench
from transact_core.forward.interventions import evaluate_changed
from transact_core.forward.perplexity import Evaluation, paired_difference
from transact_core.forward.statistics import ActivationStatistics
from transact_core.forward.stream import Change, Stream
from transact_core.forward.waists import SITES

NOISE, ZERO, ZERO_WEAKEST = DISTURBANCES = ("noise", "zero at random", "zero the weakest")


@dataclass(frozen=True)
class Disturbed:
    """The effect of one disturbance."""

    site: str
    layer: int | None
    """None stands for all layers at once."""
    disturbance: str
    strength: float
    evaluation: Evaluation = field(repr=False)
    delta_nll: float
    """Mean per-token difference of NLL from the undisturbed model, in nats."""
    delta_nll_se: float
    """Its standard error, over evaluation windows; NaN with a single one."""

    @property
    def perplexity(self) -> float:
        return self.evaluation.perplexity


def disturb(
    site: str,
    layer: int,
    disturbance: str,
    strength: float,
    statistics: ActivationStatistics,
    seed: int = 0,
) -> Change:
    """A new disturbance of the activation at one site of one layer.

    - `noise`: Gaussian noise whose RMS is `strength` × the RMS of each token's own activation.
    - `zero at random`: the share `strength` of the channels, chosen at random, is set to zero.
    - `zero the weakest`: the share `strength` of the channels of lowest RMS over the calibration
      text is set to zero.

    The random numbers depend on the seed, the site and the layer alone, so a stronger noise is the
    same noise scaled up, and a larger share of channels contains the smaller one.

    Raises:
        TransActError: there is no such disturbance, or the strength is outside [0, 1].
    """
    if disturbance not in DISTURBANCES:
        raise TransActError(
            f"The disturbance {disturbance!r} is not known; choose {', '.join(DISTURBANCES)}."
        )
    if not 0 <= strength <= 1:
        raise TransActError(f"The strength {strength} is outside [0, 1].")
    generator = torch.Generator().manual_seed(
        (seed * statistics.residual.sum.shape[0] + layer) * len(SITES) + SITES.index(site)
    )
    if disturbance == NOISE:

        def add_noise(activation: torch.Tensor) -> torch.Tensor:
            scale = activation.float().square().mean(dim=-1, keepdim=True).sqrt() * strength
            noise = torch.randn(activation.shape, generator=generator).to(activation.device)
            return (activation + scale * noise).to(activation.dtype)

        return add_noise

    energies = getattr(statistics, site).sum_of_squares[layer]
    order = (
        energies.argsort(stable=True)
        if disturbance == ZERO_WEAKEST
        else torch.randperm(len(energies), generator=generator)
    )
    zeroed = order[: round(strength * len(order))]

    def zero(activation: torch.Tensor) -> torch.Tensor:
        return activation.index_fill(-1, zeroed.to(activation.device), 0)

    return zero


def disturb_all_layers(
    bench: Bench,
    disturbance: str,
    strengths: Iterable[float],
    windows: int,
    progress: Progress = silent,
) -> Iterator[Disturbed]:
    """Disturbs each site in every layer at once, by growing strengths.

    The first `windows` evaluation windows are used.

    Raises:
        TransActError: as `disturb` and `evaluate_changed`.
    """
    strengths = sorted(strengths)
    passes = len(strengths) * len(SITES) * bench.loaded.architecture.num_hidden_layers
    trial = _Trial(bench, disturbance, windows, passes, progress)
    for strength in strengths:
        for site in SITES:
            yield trial.measure(site, None, strength)


def disturb_layer_by_layer(
    bench: Bench,
    disturbance: str,
    strength: float,
    layers: Iterable[int],
    windows: int,
    progress: Progress = silent,
) -> Iterator[Disturbed]:
    """Disturbs each site in one layer at a time.

    The layers before the disturbed one are the same for all sites and are run once. The first
    `windows` evaluation windows are used.

    Raises:
        TransActError: as `disturb` and `evaluate_changed`.
    """
    layers = sorted(layers)
    deep = bench.loaded.architecture.num_hidden_layers
    passes = len(SITES) * sum(deep - layer for layer in layers)
    trial = _Trial(bench, disturbance, windows, passes, progress)
    stream, passed = Stream(bench.loaded.model, trial.windows), 0
    for layer in layers:
        for layer_before in range(passed, layer):
            stream.pass_layer(layer_before)
        passed = layer
        for site in SITES:
            yield trial.measure(site, layer, strength, stream)


class _Trial:
    """What all disturbances of one experiment share.

    `passes` is the number of layers that will be run in total, for the progress reports.
    """

    def __init__(
        self, bench: Bench, disturbance: str, windows: int, passes: int, progress: Progress
    ) -> None:
        self.bench, self.disturbance, self.progress = bench, disturbance, progress
        self.statistics = bench.statistics(progress)
        self.windows = replace(bench.evaluation, ids=bench.evaluation.ids[:windows])
        self.undisturbed = Evaluation(bench.dense(progress).nll[:windows])
        self.passed, self.passes = 0, passes

    def measure(
        self, site: str, layer: int | None, strength: float, begun: Stream | None = None
    ) -> Disturbed:
        bench = self.bench
        all_layers = range(bench.loaded.architecture.num_hidden_layers)
        changes = {
            (site, layer_index): disturb(
                site, layer_index, self.disturbance, strength, self.statistics, bench.seed
            )
            for layer_index in (all_layers if layer is None else [layer])
        }
        self.progress("Disturbing activations", self.passed, self.passes)
        evaluation = evaluate_changed(
            bench.loaded.model, self.windows, changes, self._passed_layer, begun, layer or 0
        )
        difference = paired_difference(evaluation, self.undisturbed)
        return Disturbed(site, layer, self.disturbance, strength, evaluation, *difference)

    def _passed_layer(self) -> None:
        self.passed += 1
        self.progress("Disturbing activations", self.passed, self.passes)
