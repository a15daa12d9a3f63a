"""One model on one pair of texts: plan a cut, carry it out, measure it.

A `Bench` holds what all cuts of the model share, and measures each of these once: the statistics of
the calibration windows and the losses of the dense model.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from transformers import PreTrainedModel

from transact_core.base.cache import Tensors, remembered, sha256_of_tokens
from transact_core.base.errors import Progress, TransActError, silent
from transact_core.data.windows import Windows
from transact_core.forward.perplexity import Evaluation, evaluate, paired_difference
from transact_core.forward.statistics import ActivationStatistics
from transact_core.importance.rotary_pairs import PairEffects, measure_pairs
from transact_core.importance.scores import Evidence, Scores, score
from transact_core.models.devices import dtype_name, free_memory, resolve_dtype
from transact_core.models.footprint import Footprint, footprint
from transact_core.models.load import LoadedModel
from transact_core.models.placement import layout_of
from transact_core.models.stock_class import require_biases
from transact_core.planning.damage import (
    NARROW_RATIOS,
    RIDGES,
    Damage,
    curves,
    kept_first,
    measure_curves,
    narrow_heads,
)
from transact_core.planning.memory_needed import cut_bytes
from transact_core.pruning.closed_form import LayerFit, require_recovery
from transact_core.pruning.on_disk import repaired_cut
from transact_core.pruning.plan import (
    ByHand,
    Decision,
    Granularity,
    PruningPlan,
    WidthsName,
    make_plan,
)
from transact_core.pruning.rope import require_narrowable


@dataclass(frozen=True)
class Choices:
    """What decides a cut beside its two ratios; the defaults of the command line."""

    granularity: Granularity | Literal["auto"] = "query-heads"
    importance: str = "activation"
    recovery: str = "least-squares"
    multiple_of: int = 1
    """What the MLP's width is rounded to."""
    head_dim_multiple_of: int = 1
    """What the dims of narrower heads are rounded to."""
    steps: int = 1
    """How often units are scored anew on the model as pruned so far; see `decide`."""
    sequential: bool = False
    """Whether each module's units are chosen on the stream of the model as pruned before it."""
    widths: WidthsName = "uniform"
    """Whether every layer keeps the same widths; see `allocate`."""
    keep_layers: tuple[int, ...] = ()
    """Layers that are not cut where others have widths of their own, counted from 0."""
    by_hand: ByHand = ()
    """What each layer keeps where the widths are by hand. The ratios are then those that these
    widths amount to, whatever was asked for."""

    @property
    def single_pass(self) -> bool:
        """Whether one set of scores decides, so that nothing need be tried on the way."""
        return (
            self.granularity != "auto"
            and self.steps == 1
            and not self.sequential
            and self.widths in ("uniform", "by-hand")
        )

    @property
    def of_uniform(self) -> "Choices":
        """The same with the same widths in every layer."""
        return replace(self, widths="uniform", keep_layers=(), by_hand=())


@dataclass(frozen=True)
class Findings:
    """What was measured on a bench: small, without models, to be handed to another process."""

    measured: dict[str, Tensors] = field(default_factory=dict)
    """By what was measured, as `statistics`."""
    scores: dict[str, Scores] = field(default_factory=dict)
    """By importance."""
    dense: dict[str, Evaluation] = field(default_factory=dict)
    """The dense model's losses, by the SHA-256 of the tokens."""

    def beyond(self, known: "Findings") -> "Findings":
        """Those that are not among what is known."""
        return Findings(
            {name: found for name, found in self.measured.items() if name not in known.measured},
            {name: found for name, found in self.scores.items() if name not in known.scores},
            {text: found for text, found in self.dense.items() if text not in known.dense},
        )

    def __bool__(self) -> bool:
        return bool(self.measured or self.scores or self.dense)


class Bench:
    """One model on one pair of texts, with what all cuts of it have in common.

    What is measured on the dense model is kept in the cache folder too, under the SHA-256 of all
    that determines it, and read from there by later runs.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        calibration: Windows,
        evaluation: Windows,
        *others: Windows,
        save_dtype: str | None = None,
        seed: int = 0,
    ) -> None:
        self.loaded = loaded
        self.calibration = calibration
        self.evaluation = evaluation
        self.others = others
        """Windows of further texts that every cut is evaluated on."""
        self.save_dtype = dtype_name(
            loaded.source_dtype if save_dtype is None else resolve_dtype(save_dtype, loaded.device)
        )
        self.seed = seed
        self._measured: dict[str, Tensors] = {}
        self._dense: dict[str, Evaluation] = {}
        self._scores: dict[str, Scores] = {}

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know of the model and the texts, a sentence each."""
        windows = (self.calibration, self.evaluation, *self.others)
        texts = [notice for text in windows for notice in text.notices]
        return tuple(dict.fromkeys([*self.loaded.notices, *texts]))

    def statistics(self, progress: Progress = silent) -> ActivationStatistics:
        """The statistics of the calibration windows; measured at the first call."""
        return self._evidence(progress).statistics

    def scores(self, importance: str, progress: Progress = silent) -> Scores:
        """Scores from the calibration windows; what they need is measured at the first call.

        Raises:
            TransActError: the importance is not known, or what it measures is NaN or infinite.
        """
        if importance not in self._scores:
            self._scores[importance] = score(importance, self._evidence(progress))
        return self._scores[importance]

    def _evidence(self, progress: Progress) -> Evidence:
        return Evidence(
            self.loaded.model,
            self.calibration,
            self.loaded.architecture,
            self.seed,
            progress,
            self.remember,
        )

    def remember(self, what: str, measure: Callable[[], Tensors]) -> Tensors:
        """What `measure` gives on the calibration windows, from memory or the cache if known."""
        if what not in self._measured:
            key = {"measured": what, **self._determined_by(self.calibration)}
            self._measured[what] = remembered(key, measure)
        return self._measured[what]

    def dense(self, progress: Progress = silent, windows: Windows | None = None) -> Evaluation:
        """The dense model's losses on the evaluation text, or on others; measured at first call."""
        windows = self.evaluation if windows is None else windows
        tokens = sha256_of_tokens(windows.ids)
        if tokens not in self._dense:

            def measure() -> dict[str, torch.Tensor]:
                stage = "Measuring the dense model"
                return {"nll": evaluate(self.loaded.model, windows, progress, stage).nll}

            key = {"measured": "nll", **self._model_identity, "tokens": tokens}
            self._dense[tokens] = Evaluation(**remembered(key, measure))
        return self._dense[tokens]

    def measure_dense(self, progress: Progress = silent) -> None:
        """Measures the dense model on every text, as long as its weights are there."""
        for windows in self.evaluated:
            self.dense(progress, windows)

    def dense_known(self, windows: Windows) -> bool:
        """Whether the dense model was measured on these windows."""
        return sha256_of_tokens(windows.ids) in self._dense

    @property
    def evaluated(self) -> tuple[Windows, ...]:
        """The windows of all texts that every cut is evaluated on, the evaluation text's first."""
        return self.evaluation, *self.others

    def _determined_by(self, windows: Windows) -> dict[str, object]:
        return {**self._model_identity, "tokens": sha256_of_tokens(windows.ids)}

    @cached_property
    def _model_identity(self) -> dict[str, object]:
        loaded = self.loaded
        return {
            "weights": sorted(loaded.weight_files.values()),
            "config": loaded.model.config.to_json_string(),
            "device": loaded.hardware,
            "dtype": dtype_name(loaded.dtype),
        }

    @cached_property
    def identity(self) -> dict[str, object]:
        """All that determines what a cut on this bench costs, beside the cut itself; JSON."""
        return {
            **self._model_identity,
            "calibration": sha256_of_tokens(self.calibration.ids),
            "evaluation": sha256_of_tokens(self.evaluation.ids),
            "save_dtype": self.save_dtype,
            "seed": self.seed,
        }

    def pairs(self, progress: Progress = silent) -> PairEffects:
        """The rotary pairs' effects on attention; measured at the first call."""
        require_narrowable(self.loaded.model.config, self.calibration.sequence_length)
        tensors = self.remember(
            "rotary pairs",
            lambda: measure_pairs(self.loaded.model, self.calibration, progress).to_tensors(),
        )
        return PairEffects(**tensors)

    def damage(self, choices: Choices, progress: Progress = silent) -> Damage:
        """The error from cutting each layer alone, at every width; measured at the first call.

        It is that of cuts in one step; `choices` must name a granularity, not `auto`. One pass
        serves all recoveries and granularities of an importance, except for `head-dims`: there the
        attention of every layer is repaired at each of `NARROW_RATIOS`, once for each recovery.
        """
        shape = self.loaded.architecture
        tensors = self.remember(
            self._curves_of(choices.importance),
            lambda: measure_curves(
                self.loaded.model,
                self.calibration,
                kept_first(self.scores(choices.importance, progress), shape),
                progress,
            ),
        )
        if choices.granularity == "head-dims":
            tensors = tensors | self.remember(
                self._narrowing_by(choices),
                lambda: narrow_heads(
                    self.loaded.model,
                    self.calibration,
                    self._narrow_plans(choices, progress),
                    choices.recovery,
                    progress,
                ),
            )
        return curves(tensors, shape, choices.granularity, choices.recovery)

    def damage_known(self, choices: Choices) -> bool:
        """Whether `damage` with these choices needs no measuring any more."""
        narrowed = (
            choices.granularity != "head-dims" or self._narrowing_by(choices) in self._measured
        )
        return self._curves_of(choices.importance) in self._measured and narrowed

    def _curves_of(self, importance: str) -> str:
        return f"what each width loses by {importance}, seed {self.seed}, ridges {RIDGES}"

    def _narrowing_by(self, choices: Choices) -> str:
        return (
            f"what narrower heads lose by {choices.importance}, seed {self.seed}, "
            f"{choices.recovery}, at {NARROW_RATIOS}"
        )

    def _narrow_plans(self, choices: Choices, progress: Progress) -> list[PruningPlan]:
        plans = {}
        for ratio in NARROW_RATIOS:
            any_width = replace(choices, multiple_of=1, head_dim_multiple_of=1)
            plan = self.plan(ratio, 0.0, any_width, progress)
            if plan.head_dim:
                plans[plan.head_dim] = plan
        return list(plans.values())

    def release_model(self) -> None:
        """Lets go of the dense weights and of the tokenizer: what was measured stays, and no more
        can be measured."""
        self.loaded = self.loaded.release()

    def require_recovery_of_class(self, recovery: str) -> None:
        """Refuses a recovery that the model's class has no tensors for.

        Raises:
            TransActError: the recovery is `bias`, and the class has not all the biases it writes.
        """
        if recovery == "bias":
            require_biases(self.loaded.model.config, attention=True, mlp=True)

    def findings(self) -> Findings:
        """All that was measured by now."""
        return Findings(dict(self._measured), dict(self._scores), dict(self._dense))

    def learn(self, findings: Findings) -> None:
        """Adds what was measured on the same bench in another process."""
        self._measured.update(findings.measured)
        self._scores.update(findings.scores)
        self._dense.update(findings.dense)

    def without_model(self) -> "Bench":
        """A copy with what was measured by now, whose model is released; it can be pickled."""
        copied = Bench(
            self.loaded.release(),
            self.calibration,
            self.evaluation,
            *self.others,
            save_dtype=self.save_dtype,
            seed=self.seed,
        )
        copied.learn(self.findings())
        return copied

    def prepared(self, choices: Choices) -> bool:
        """Whether a plan with these choices needs no measuring any more."""
        try:
            self.require_recovery_of_class(choices.recovery)
        except TransActError:
            return False  # `prepare` says why
        pairs_known = choices.granularity != "head-dims" or "rotary pairs" in self._measured
        return choices.importance in self._scores and pairs_known

    def prepare(self, choices: Choices, progress: Progress = silent) -> None:
        """Measures what every plan with these choices needs.

        Raises:
            TransActError: as `plan` and `require_recovery_of_class` do.
        """
        self.require_recovery_of_class(choices.recovery)
        self.plan(0.0, 0.0, choices, progress)

    def plan(
        self,
        mha_ratio: float,
        mlp_ratio: float,
        choices: Choices,
        progress: Progress = silent,
        scores: Scores | None = None,
    ) -> PruningPlan:
        """The units that these ratios and choices keep in one step; measures what that needs.

        `scores` are used in place of the dense model's where they are given.
        """
        return make_plan(
            self.loaded.architecture,
            scores or self.scores(choices.importance, progress),
            choices.importance,
            mha_ratio,
            mlp_ratio,
            choices.granularity,
            choices.multiple_of,
            self.pairs(progress) if choices.granularity == "head-dims" else None,
            choices.head_dim_multiple_of,
        )

    @cached_property
    def dense_footprint(self) -> Footprint:
        """The size and cost of the dense model as it is stored."""
        return footprint(self.loaded.architecture, dtype_name(self.loaded.source_dtype))

    def footprint(self, plan: PruningPlan, recovery: str = Choices.recovery) -> Footprint:
        """The size and cost of a cut as it would be saved."""
        cut = plan.applied_to(self.loaded.architecture, with_biases=recovery == "bias")
        return footprint(cut, self.save_dtype)


def identity(plan: PruningPlan, recovery: str) -> tuple:
    """What makes two cuts of one bench the same, whatever ratio asked for them."""
    return plan.layers, plan.slots, plan.importance, recovery


@dataclass(frozen=True)
class Measurement:
    """One measured cut: what was removed, what is left, what it costs in perplexity."""

    decision: Decision
    recovery: str
    footprint: Footprint
    evaluation: Evaluation = field(repr=False)
    delta_nll: float
    """Mean per-token difference of NLL from the dense model, in nats."""
    delta_nll_se: float
    """Its standard error, over evaluation windows."""
    fits: tuple[LayerFit, ...]
    seconds: float
    """How long cutting, repairing and measuring took when it was done."""
    others: tuple[Evaluation, ...] = field(default=(), repr=False)
    """Losses on the bench's other texts, in their order."""

    @property
    def plan(self) -> PruningPlan:
        return self.decision.plan

    @property
    def identity(self) -> tuple:
        """As `identity` of its plan and recovery."""
        return identity(self.plan, self.recovery)

    @property
    def perplexity(self) -> float:
        return self.evaluation.perplexity

    def on_text(self, bench: "Bench", place: int) -> "Measurement":
        """The same cut as if another of the bench's evaluation texts were the first.

        Place 0 is the first, 1 the first of `others`. The dense model must be measured there.
        """
        if place == 0:
            return self
        evaluation = self.others[place - 1]
        dense = bench.dense(windows=bench.others[place - 1])
        delta_nll, delta_nll_se = paired_difference(evaluation, dense)
        return replace(
            self, evaluation=evaluation, delta_nll=delta_nll, delta_nll_se=delta_nll_se, others=()
        )

    def row(self) -> dict[str, float]:
        """A row of `points.csv`."""
        return {
            "mha_ratio": self.plan.mha_ratio,
            "mlp_ratio": self.plan.mlp_ratio,
            **model_report(self.footprint, self.perplexity),
            "delta_nll": self.delta_nll,
            "delta_nll_se": self.delta_nll_se,
            "seconds": self.seconds,
        }


def model_report(cost: Footprint, perplexity: float) -> dict[str, float]:
    """The entry `dense` or `pruned` of `report.json`."""
    return {"perplexity": perplexity, **asdict(cost)}


def compress(
    bench: Bench, plan: PruningPlan, recovery: str, progress: Progress = silent
) -> tuple[PreTrainedModel, Measurement]:
    """Cuts, repairs and measures; perplexity is that of the weights as they would be saved.

    Raises:
        TransActError: the plan does not fit the model or the recovery is not known.
    """
    require_recovery(recovery)
    bench.measure_dense(progress)
    start = time.perf_counter()
    model, fits = carry_out(bench, plan, recovery, progress)
    return model, measure(bench, model, plan, recovery, fits, start, progress)


def carry_out(
    bench: Bench, plan: PruningPlan, recovery: str, progress: Progress = silent
) -> tuple[PreTrainedModel, tuple[LayerFit, ...]]:
    """Cuts, repairs, and rounds the weights to the dtype they are saved in; measures nothing.

    Where the dense model's layers are on disk, so are those of the pruned one.

    Raises:
        TransActError: it is estimated to take more memory than there is.
    """
    dense = bench.loaded.model
    require_memory(bench, plan, recovery)
    save_dtype = resolve_dtype(bench.save_dtype, bench.loaded.device)
    return repaired_cut(dense, plan, bench.calibration, recovery, save_dtype, progress)


def require_memory(bench: Bench, plan: PruningPlan, recovery: str) -> None:
    """Refuses a cut whose peak memory is estimated to be more than is free.

    Raises:
        TransActError: it is; the sentence says how much.
    """
    loaded = bench.loaded
    left = plan.applied_to(loaded.architecture, with_biases=recovery == "bias")
    layout = layout_of(loaded.model)
    for device in loaded.devices:
        layers = [index for index, place in enumerate(layout) if place == device]
        needed = cut_bytes(
            loaded.architecture,
            left,
            recovery,
            bench.calibration.tokens,
            loaded.dtype.itemsize,
            layer_by_layer=loaded.offloaded,
            layers=layers if layout else None,
        )
        free = free_memory(device)
        if needed > free:
            raise TransActError(
                f"This cut takes about {needed / 1e9:.1f} GB of memory on {device} beside the "
                f"dense model, where {free / 1e9:.1f} GB are free; free some memory, or choose "
                "fewer calibration tokens or a smaller model."
            )


def measure(
    bench: Bench,
    model: PreTrainedModel,
    plan: PruningPlan,
    recovery: str,
    fits: tuple[LayerFit, ...],
    start: float,
    progress: Progress = silent,
) -> Measurement:
    """Measures a pruned model whose weights are rounded to the dtype that they are saved in.

    `start` is the time at which cutting began, in seconds of `time.perf_counter`.
    """
    evaluation = evaluate(model, bench.evaluation, progress)
    others = tuple(evaluate(model, windows, progress) for windows in bench.others)
    delta_nll, delta_nll_se = paired_difference(evaluation, bench.dense())
    return Measurement(
        decision=Decision(plan),
        recovery=recovery,
        footprint=bench.footprint(plan, recovery),
        evaluation=evaluation,
        delta_nll=delta_nll,
        delta_nll_se=delta_nll_se,
        fits=fits,
        seconds=time.perf_counter() - start,
        others=others,
    )
