"""The method's premise, tried on a model: which activations may be disturbed?

TransAct removes width at the waists of the modules and leaves the residual stream between them
whole, because perplexity is said to suffer more from a disturbance there (Shen et al. 2024, arXiv
2407.05690). Here the same disturbance is made at each site, and perplexity measured.
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
    """What one disturbance does."""

    site: str
    layer: int | None
    """None is all layers at once."""
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
    """A fresh disturbance of the activation at one site of one layer.

    - `noise`: Gaussian noise whose RMS is `strength` × the RMS of each token's own activation.
    - `zero at random`: the share `strength` of the channels, drawn by lot, is zero.
    - `zero the weakest`: the share `strength` of the channels of lowest RMS over the calibration
      text is zero.

    What is drawn depends on the seed, the site and the layer alone, so a stronger noise is the same
    noise, louder, and a larger share holds the smaller one.

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
            loudness = activation.float().square().mean(dim=-1, keepdim=True).sqrt() * strength
            noise = torch.randn(activation.shape, generator=generator).to(activation.device)
            return (activation + loudness * noise).to(activation.dtype)

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

    What comes before a layer is the same for all sites and is run once. The first `windows`
    evaluation windows are used.

    Raises:
        TransActError: as `disturb` and `evaluate_changed`.
    """
    layers = sorted(layers)
    deep = bench.loaded.architecture.num_hidden_layers
    passes = len(SITES) * sum(deep - layer for layer in layers)
    trial = _Trial(bench, disturbance, windows, passes, progress)
    stream, passed = Stream(bench.loaded.model, trial.windows), 0
    for layer in layers:
        for number in range(passed, layer):
            stream.pass_layer(number)
        passed = layer
        for site in SITES:
            yield trial.measure(site, layer, strength, stream)


class _Trial:
    """What all disturbances of one experiment share; `passes` counts layers that will be passed."""

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
        every = range(bench.loaded.architecture.num_hidden_layers)
        changes = {
            (site, each): disturb(
                site, each, self.disturbance, strength, self.statistics, bench.seed
            )
            for each in (every if layer is None else [layer])
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
